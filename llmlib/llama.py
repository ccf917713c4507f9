"""Give the GPT the parts of Llama: RMSNorm, SwiGLU, rotary positions, heads that share keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmlib.attention import MultiHeadAttention, Positions
from llmlib.gpt import GPTConfig, compute_dtype


class RMSNorm(nn.Module):
    """Divide each vector by the root of its mean square, then stretch it by `weight`: no mean, no shift.

    Zhang and Sennrich 2019, eq. 4, arXiv:1910.07467.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        x = _RMSNorm.apply(x, self.weight, self.eps)
        return x.to(compute_dtype(x))  # once here, and not in each layer that reads it


class _RMSNorm(torch.autograd.Function):
    """Return u w, where u is x over the root r of its mean square; or, with g = d_y w, the gradients for x,
    (g − u mean(g u)) / r, and for w.

    The gradients are written out: with them, both passes take about a quarter less time on a CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        exact = torch.promote_types(x.dtype, torch.float32)
        x, d_y = x.to(exact), d_y.to(exact)
        mean_square = torch.linalg.vecdot(x, x)[..., None] / len(weight)  # (B, 1)
        scale = (mean_square + ctx.eps).rsqrt()  # 1 / r
        unit, g = x * scale, d_y * weight  # (B, C) each
        mean = torch.linalg.vecdot(g, unit)[..., None] / len(weight)  # (B, 1)
        d_weight = (d_y * unit).reshape(-1, len(weight)).sum(dim=0) if ctx.needs_input_grad[1] else None
        return g.addcmul_(unit, mean, value=-1).mul_(scale), d_weight, None


class SwiGLU(nn.Module):
    """Let a second projection, bent by SiLU, open or close each of the `d_ff` numbers.

    Shazeer 2020, eq. 6, arXiv:2002.05202.
    """

    def __init__(self, d_model: int, d_ff: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RotaryPositions(nn.Module):
    """Turn each pair of numbers of a query or key by an angle: the position times the pair's frequency.

    A pair is number i and number i + D/2 (the half-split layout). Su et al. 2021, eq. 34, arXiv:2104.09864.
    """

    def __init__(self, d_head: int, base: float = 10_000.0) -> None:
        super().__init__()
        if d_head % 2:
            raise ValueError(f"d_head={d_head} is odd: rotary positions turn pairs, choose an even width")
        # No buffer: it must stay in float32 in a model of bfloat16, which can't tell position 1000 from 1001.
        self.frequencies = rope_frequencies(d_head, base)

    def forward(self, x: Float[Tensor, "*B T D"], start: int) -> Float[Tensor, "*B T D"]:
        """Turn T vectors, the first of which stands at position `start`."""
        positions = torch.arange(start, start + x.shape[-2], device=x.device)
        angles = torch.outer(positions, self.frequencies.to(x.device))  # (T, D / 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, H, T, D)


def rope_frequencies(d_head: int, base: float = 10_000.0) -> Float[Tensor, " {d_head}//2"]:
    """Return the d_head / 2 frequencies base^(−2i / d_head), in radians a token."""
    return base ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


class GroupedQueryAttention(MultiHeadAttention):
    """Let groups of query heads share the keys and values of `n_kv_heads` heads.

    Ainslie et al. 2023, arXiv:2305.13245; with one head, the multi-query attention of Shazeer 2019,
    arXiv:1911.02150.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        positions: Positions | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, dropout=dropout, bias=bias, positions=positions)
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads={n_heads} can't share n_kv_heads={n_kv_heads} evenly: "
                "choose a number of key/value heads that divides the number of heads"
            )
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)

    def attend(
        self,
        q: Float[Tensor, "*B H T D"],
        k: Float[Tensor, "*B K S D"],
        v: Float[Tensor, "*B K S D"],
        mask: Bool[Tensor, "*#B #T S"] | None = None,
        *,
        causal: bool = True,
    ) -> Float[Tensor, "*B T C"]:
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] == k.shape[-2] <= 512:
            # For the way that is faster there, which takes as many keys as queries: a copy for each head.
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
        return super().attend(q, k, v, mask, causal=causal)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(GPTConfig):
    """Say how large a Llama is: `GPT(LlamaConfig(…))` is the model.

    `n_kv_heads` is `n_heads` unless given: 1 is multi-query attention. `d_ff` is 8/3 d_model unless given,
    rounded up to a multiple of 32, so that SwiGLU's three matrices hold about what GPT-2's two hold.
    ValueError where heads can't be shared evenly or are too odd to turn.
    Touvron et al. 2023, arXiv:2302.13971.
    """

    n_kv_heads: int | None = None
    rope_base: float = 10_000.0
    bias: bool = False

    def positions(self) -> None:
        return None

    def norm(self) -> nn.Module:
        return RMSNorm(self.d_model, self.norm_eps)

    def attention(self) -> MultiHeadAttention:
        return GroupedQueryAttention(
            self.d_model,
            self.n_heads,
            self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            dropout=self.dropout,
            bias=self.bias,
            positions=RotaryPositions(self.d_model // self.n_heads, self.rope_base),
        )

    def feed_forward(self) -> nn.Module:
        d_ff = self.d_ff or 32 * math.ceil(self.d_model / 12)  # 8/3 d_model, in multiples of 32
        return SwiGLU(self.d_model, d_ff, bias=self.bias)


SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    max_seq_len=8192,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    d_ff=1536,
    rope_base=100_000.0,
)
LLAMA_TINY = LlamaConfig(vocab_size=4096, max_seq_len=256, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2)


def interleave(weight: Float[Tensor, "R ..."], d_head: int) -> Float[Tensor, "R ..."]:
    """Reorder the rows of a query or key projection, so that pairs that turn together stand side by side.

    This is the interleaved layout of the paper and of Llama's own files: numbers 2i and 2i + 1 are a pair, in
    place of i and i + D/2.
    """
    return weight.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)


def deinterleave(weight: Float[Tensor, "R ..."], d_head: int) -> Float[Tensor, "R ..."]:
    """Undo `interleave`: from pairs side by side to the half-split layout."""
    return weight.unflatten(0, (-1, d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
