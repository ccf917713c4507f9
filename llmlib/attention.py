"""Let each token gather what it needs from the tokens that it may see: multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

# Tells queries or keys (..., T, D) where they stand, the first of them at `start`: by turning them, say.
Positions = Callable[[Tensor, int], Tensor]


@runtime_checkable
class Cache(Protocol):
    """Keep the keys and values of earlier tokens.

    `n_tokens` counts the tokens seen so far. `update` takes the keys and values of T new tokens and returns
    those of the S tokens that the last query may look at, the new ones last.
    """

    n_tokens: int

    def update(
        self, k: Float[Tensor, "*B K T D"], v: Float[Tensor, "*B K T D"]
    ) -> tuple[Float[Tensor, "*B K S D"], Float[Tensor, "*B K S D"]]: ...


class MultiHeadAttention(nn.Module):
    """Attend to the past with `n_heads` heads side by side, each of width d_model / n_heads.

    Without `positions`, queries and keys stay as they are. `dropout` falls on the weights, in training.
    Vaswani et al. 2017, section 3.2.2, arXiv:1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        positions: Positions | None = None,
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"d_model={d_model} can't be split into n_heads={n_heads} equal heads: "
                "choose a number of heads that divides the width"
            )
        self.d_model, self.d_head, self.dropout = d_model, d_model // n_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.positions = positions or _leave

    def forward(
        self,
        x: Float[Tensor, "*B T C"],
        cache: Cache | None = None,
        mask: Bool[Tensor, "*#B #T S"] | None = None,
    ) -> Float[Tensor, "*B T C"]:
        """Return what each token gathers from itself and those before it.

        With a `cache`, `x` continues the tokens that it holds. `mask` is False where a query may not look,
        on top of the causal rule: at padding, say.
        """
        q, k, v = self.project(x, x)  # (B, H, T, D) each
        start = 0 if cache is None else cache.n_tokens
        q, k = self.positions(q, start), self.positions(k, start)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, S, D)
        return self.attend(q, k, v, mask)

    def project(
        self, x: Float[Tensor, "*B T C"], context: Float[Tensor, "*B S _"]
    ) -> tuple[Float[Tensor, "*B H T D"], Float[Tensor, "*B K S D"], Float[Tensor, "*B K S D"]]:
        """Return the queries of `x`, and the keys and values of `context`, head by head."""
        for tokens in (x, context):
            if tokens.shape[-1] != self.d_model:
                raise ValueError(
                    f"the tokens have width {tokens.shape[-1]}, this layer d_model={self.d_model}"
                )
        rows = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        q, k, v = (row.unflatten(-1, (-1, self.d_head)).transpose(-3, -2) for row in rows)
        return q, k, v

    def attend(
        self,
        q: Float[Tensor, "*B H T D"],
        k: Float[Tensor, "*B K S D"],
        v: Float[Tensor, "*B K S D"],
        mask: Bool[Tensor, "*#B #T S"] | None = None,
        *,
        causal: bool = True,
    ) -> Float[Tensor, "*B T C"]:
        """Let each head weigh its values, join the heads, and mix them with `o_proj`."""
        T, S = q.shape[-2], k.shape[-2]
        # PyTorch's own causal rule counts from the first key, not from the last, and takes no mask beside it.
        is_causal = causal and mask is None and T == S
        if causal and not is_causal and T > 1:
            visible = causal_mask(T, S, q.device)
            mask = visible if mask is None else mask & visible
        dropout = self.dropout if self.training else 0.0
        # On a CPU, in bfloat16, PyTorch's fused kernel takes three times as long on short texts.
        short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512
        if short and is_causal and not dropout and q.shape == k.shape:
            y = attention_weights(q, k, causal=True) @ v  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if mask is None else mask.unsqueeze(-3),  # the same for every head
                dropout_p=dropout,
                is_causal=is_causal,
                enable_gqa=True,  # where there are fewer key heads, each serves a group of query heads
            )  # (B, H, T, D)
        return self.o_proj(y.transpose(-3, -2).flatten(-2))  # (B, T, C)


class CrossAttention(MultiHeadAttention):
    """Attend to the whole of another sequence; from a sequence to itself, it is an encoder's attention."""

    def forward(
        self,
        x: Float[Tensor, "*B T C"],
        context: Float[Tensor, "*B S _"],
        mask: Bool[Tensor, "*#B #T S"] | None = None,
    ) -> Float[Tensor, "*B T C"]:
        """Return what each token of `x` gathers from `context`, where `mask` lets it look."""
        return self.attend(*self.project(x, context), mask, causal=False)


def attention_weights(
    q: Float[Tensor, "*B T D"], k: Float[Tensor, "*B S D"], *, causal: bool = False
) -> Float[Tensor, "*B T S"]:
    """Return softmax(q kᵀ / √D), the weights that `F.scaled_dot_product_attention` keeps to itself."""
    (T, D), S = q.shape[-2:], k.shape[-2]
    bias = q.new_zeros(T, S)
    if causal:
        bias = bias.masked_fill(~causal_mask(T, S, q.device), -math.inf)
    # Product, scale and mask in one pass over the scores: a training step in bfloat16 is 4 % faster so.
    scores = torch.baddbmm(bias, q.reshape(-1, T, D), k.reshape(-1, S, D).mT, alpha=1 / math.sqrt(D))
    return scores.softmax(dim=-1).view(*q.shape[:-1], S)  # (B, T, S)


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Bool[Tensor, "T S"]:
    """Say which of S keys each of the last T queries may see: its own, and those before it."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _leave(x: Tensor, start: int) -> Tensor:
    return x
