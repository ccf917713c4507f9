"""Stack blocks of attention and feed-forward layers into a language model: GPT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from llmlib.attention import Cache, CrossAttention, MultiHeadAttention
from llmlib.data import IGNORE_INDEX
from llmlib.embeddings import InputEmbeddings, LearnedPositions, SinusoidalPositions

# What a name holds, and the part that it counts in: the first that fits, so attn_norm is a norm.
_PARTS = {
    "tok_emb": "token table",
    "pos_emb": "positions",
    "norm": "norms",
    "attn": "attention",
    "ffn": "feed-forward",
    "lm_head": "output head",
}


# From the probabilities and targets of n tokens, the sum of their losses, and its gradient for each logit.
LossOf = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Say how large a model is, and which parts it is made of: here those of GPT-2.

    The methods make the parts, so a model with other parts has a subclass of its own, which overrides them.
    `d_ff` is 4 d_model unless given. ValueError on sizes that don't fit together.
    Radford et al. 2019 (GPT-2).
    """

    vocab_size: int = 50_257
    max_seq_len: int = 1024
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int | None = None
    dropout: float = 0.0
    bias: bool = True
    tied: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share of the numbers, from 0 to below 1, got {self.dropout}")
        with torch.device("meta"):  # where it costs nothing: attention knows which sizes fit together
            self.attention()

    def positions(self) -> nn.Module | None:
        """Make what adds positions to the token vectors, or None where attention tells them itself."""
        return LearnedPositions(self.max_seq_len, self.d_model)

    def norm(self) -> nn.Module:
        return LayerNorm(self.d_model, self.norm_eps)

    def attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(self.d_model, self.n_heads, dropout=self.dropout, bias=self.bias)

    def feed_forward(self) -> nn.Module:
        return FeedForward(self.d_model, self.d_ff or 4 * self.d_model, bias=self.bias)


GPT2_SMALL = GPTConfig()
GPT2_MEDIUM = GPTConfig(d_model=1024, n_layers=24, n_heads=16)
GPT2_LARGE = GPTConfig(d_model=1280, n_layers=36, n_heads=20)
GPT2_XL = GPTConfig(d_model=1600, n_layers=48, n_heads=25)


class LayerNorm(nn.Module):
    """Give each vector mean 0 and variance 1, then stretch it by `weight` and shift it by `bias`.

    Ba et al. 2016, eq. 3, arXiv:1607.06450.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x.to(compute_dtype(x))  # once here, and not in each layer that reads it


class FeedForward(nn.Module):
    """Let each token think alone: widen it to `d_ff`, bend it with GELU, and come back to `d_model`.

    GELU in its tanh form, as GPT-2 has it. Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """

    def __init__(self, d_model: int, d_ff: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # (B, T, F), then (B, T, C)


class Block(nn.Module):
    """Add to each token what it gathers from the others, then what it makes of that.

    Both layers read a normalized copy and add to the residual path (pre-norm).
    Radford et al. 2019, section 2.3.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm, self.attn = config.norm(), config.attention()
        self.ffn_norm, self.ffn = config.norm(), config.feed_forward()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cache: Cache | None = None,
        mask: Bool[Tensor, "#B #T S"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        x = x + self.dropout(self.attn(self.attn_norm(x), cache, mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def cross_entropy(
    p: Float[Tensor, "n V"], targets: Int64[Tensor, "n 1"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n V"]]:
    """Return the sum of −log p(target), and the gradient for each logit: its p, less 1 at the target."""
    loss = -p.gather(1, targets).clamp(min=torch.finfo(p.dtype).tiny).log().sum()
    return loss, p.scatter_add(1, targets, p.new_full(targets.shape, -1))


class GPT(nn.Module):
    """Predict, at every position of a text, the token that follows.

    The parts come from the configuration; with `tied`, the output head is the token table. Fresh weights are
    as in the paper of GPT-2: normal with deviation 0.02, divided by √(2 n_layers) in the two projections of
    each block that write to the residual path, so that its variance doesn't grow with depth.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InputEmbeddings(config.vocab_size, config.d_model, config.positions())
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = config.norm()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embeddings.tok_emb.weight
        init_weights(self, config.n_layers)

    def forward(
        self,
        ids: Int64[Tensor, "B T"],
        caches: Sequence[Cache] | None = None,
        padding: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token, at each position.

        With `caches`, one for each block, `ids` continue the tokens that they hold. `padding` says how many
        tokens at the left of each row, cached ones among them, are none and are not seen. ValueError on an
        empty batch, on IDs beyond the vocabulary, and on more than `max_seq_len` tokens.
        """
        return self.lm_head(self.hidden(ids, caches, padding))  # (B, T, V)

    def hidden(
        self,
        ids: Int64[Tensor, "B T"],
        caches: Sequence[Cache] | None = None,
        padding: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Return the vectors that the output head reads."""
        caches = [None] * len(self.blocks) if caches is None else caches
        if len(caches) != len(self.blocks):
            raise ValueError(f"{len(caches)} caches for {len(self.blocks)} blocks: give one for each")
        start = 0 if caches[0] is None else caches[0].n_tokens
        shift, mask = 0, None
        if padding is not None:
            shift = padding[:, None]  # (B, 1)
            mask = _unpadded(start, start + ids.shape[1], padding)  # (B, T, S)
        x = self.dropout(_embed(self, ids, start, shift))  # (B, T, C)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, mask)
        return self.final_norm(x)

    def loss(
        self, ids: Int64[Tensor, "B T"], targets: Int64[Tensor, "B _"], *, of: LossOf = cross_entropy
    ) -> Float[Tensor, ""]:
        """Return the mean of −log p(target), in nats, over the targets that are not −100.

        Another loss of the probabilities can be given with `of`.
        """
        if ids.shape != targets.shape:
            raise ValueError(
                f"tokens of shape {tuple(ids.shape)} need as many targets, got {tuple(targets.shape)}"
            )
        x = self.hidden(ids).flatten(0, 1)  # (B T, C)
        return linear_loss(x, self.lm_head.weight, targets.flatten(), of)


def _unpadded(start: int, end: int, padding: Int64[Tensor, " B"]) -> Bool[Tensor, "B T S"]:
    """Let the tokens from `start` to `end` see no padding, but themselves: a softmax over nothing is NaN."""
    if padding.min() < 0:
        raise ValueError(f"padding {padding.min()} is no number of tokens: give 0 or more for each row")
    keys = torch.arange(end, device=padding.device)  # (S)
    queries = keys[start:, None]  # (T, 1)
    return (keys >= padding[:, None, None]) | (keys == queries)


def _embed(
    model: GPT | EncoderDecoder,
    ids: Int64[Tensor, "B T"],
    start: int = 0,
    shift: int | Int64[Tensor, "B 1"] = 0,
) -> Float[Tensor, "B T C"]:
    """Embed tokens whose positions begin at `start - shift`, after a look at whether they fit the model."""
    if ids.numel() == 0:
        raise ValueError(f"no token in a batch of shape {tuple(ids.shape)}: give at least one text of one")
    if start + ids.shape[1] > model.config.max_seq_len:
        raise ValueError(
            f"{start + ids.shape[1]} tokens don't fit into max_seq_len={model.config.max_seq_len}: "
            "shorten the text, or build the model with a longer max_seq_len"
        )
    _check_ids("token IDs", ids, model.config.vocab_size)
    return model.embeddings(ids, start - shift)


def _check_ids(what: str, ids: Tensor, vocab_size: int) -> None:
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{what} {low} to {high} don't fit into vocab_size={vocab_size} (0 to {vocab_size - 1}): "
            "take the tokenizer that the model was built for"
        )


@torch.no_grad()
def init_weights(model: nn.Module, n_layers: int) -> None:
    """Draw the weights of GPT-2: see `GPT`."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.normal_(std=0.02 / math.sqrt(2 * n_layers))
        elif parameter.ndim > 1:  # all but the scales of the norms
            parameter.normal_(std=0.02)


def linear_loss(
    x: Float[Tensor, "N C"],
    weight: Float[Tensor, "V C"],
    targets: Int64[Tensor, " N"],
    of: LossOf = cross_entropy,
    n_rows: int = 256,
) -> Float[Tensor, ""]:
    """Return the mean loss of the probabilities softmax(x weightᵀ), over the targets that are not −100.

    Probabilities and logits, the largest tensors of a training step, exist for `n_rows` tokens at a time, and
    never for the whole batch. `of` gives the sum of their losses, and the gradients of the logits.
    ValueError on targets beyond the vocabulary, and where all of them are −100.
    """
    counted = targets != IGNORE_INDEX
    if not counted.any():
        raise ValueError(f"all {len(targets)} targets are {IGNORE_INDEX}: give at least one token to predict")
    if not counted.all():
        x, targets = x[counted], targets[counted]
    _check_ids("targets", targets, len(weight))
    if not torch.is_grad_enabled():  # a Function would compute gradients even so
        x, weight = x.detach(), weight.detach()
    return _LinearLoss.apply(x, weight, targets, of, n_rows) / len(targets)


class _LinearLoss(torch.autograd.Function):
    """Sum the losses of softmax(x weightᵀ), and take the gradients at once, while the logits are there."""

    @staticmethod
    def forward(ctx, x, weight, targets, of, n_rows):
        dtype = compute_dtype(x)
        exact = torch.promote_types(dtype, torch.float32)
        x, w = x.to(dtype), weight.to(dtype)
        loss = x.new_zeros((), dtype=exact)
        d_x = torch.empty_like(x)
        d_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for rows, d_rows, ids in zip(*(t.split(n_rows) for t in (x, d_x, targets[:, None])), strict=True):
            p = F.softmax(rows @ w.mT, dim=-1, dtype=exact)  # (n, V)
            part, d_logits = of(p, ids)
            loss, d_logits = loss + part, d_logits.to(dtype)
            if any(ctx.needs_input_grad):
                torch.mm(d_logits, w, out=d_rows)
            if d_weight is not None:
                d_weight += d_logits.mT @ rows
        ctx.save_for_backward(d_x, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        if torch.is_grad_enabled():  # the gradients are constants here, and would have none of their own
            raise NotImplementedError(
                "this loss has first derivatives only: use F.cross_entropy on the logits"
            )
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_loss, None if d_weight is None else d_weight * d_loss, None, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a matrix product with `x` runs: autocast's, which spares float64, or x's."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


@torch.no_grad()
def greedy(model: GPT, ids: Int64[Tensor, "B T"], n_tokens: int) -> Int64[Tensor, "B _"]:
    """Append the most likely next token, `n_tokens` times; the model sees the last `max_seq_len` tokens.

    Dropout stays as the model has it: call `model.eval()` first.
    """
    for _ in range(n_tokens):
        x = model.hidden(ids[:, -model.config.max_seq_len :])[:, -1]  # (B, C)
        logits = model.lm_head(x)  # (B, V)
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)  # (B, T + 1)
    return ids


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters in each part of a model; a tied head counts with the token table."""
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        parts[_part(name)] += parameter.numel()
    return parts


def count_flops(model: GPT, seq_len: int) -> dict[str, int]:
    """Return the additions and multiplications, in each part, that predict what follows `seq_len` tokens.

    This is the forward pass of the last token alone: 2 for each weight of a matrix, and in each layer
    4 d_model for each token that it looks at. Norms, softmax and GELU are left out. A training step costs
    three times the forward pass. Hoffmann et al. 2022, appendix F, arXiv:2203.15556.
    """
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parts[_part(name)] += 2 * layer.weight.numel()
    parts["attention"] += 4 * model.config.d_model * seq_len * model.config.n_layers
    return parts


def _part(name: str) -> str:
    for key, part in _PARTS.items():
        if key in name:
            return part
    raise ValueError(
        f"no part of {list(_PARTS.values())} fits {name}: its name must hold one of {list(_PARTS)}"
    )


class EncoderBlock(nn.Module):
    """Let every token look at all tokens, then think; each sum is normalized (post-norm).

    Vaswani et al. 2017, section 3.1, arXiv:1706.03762.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn, self.attn_norm = _cross_attention(config), config.norm()
        self.ffn, self.ffn_norm = config.feed_forward(), config.norm()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        x = self.attn_norm(x + self.dropout(self.attn(x, x)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DecoderBlock(nn.Module):
    """Let every token look at those before it, then at all that the encoder made, then think."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn, self.attn_norm = config.attention(), config.norm()
        self.cross_attn, self.cross_norm = _cross_attention(config), config.norm()
        self.ffn, self.ffn_norm = config.feed_forward(), config.norm()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T C"], memory: Float[Tensor, "B S C"]) -> Float[Tensor, "B T C"]:
        x = self.attn_norm(x + self.dropout(self.attn(x)))
        x = self.cross_norm(x + self.dropout(self.cross_attn(x, memory)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class EncoderDecoder(nn.Module):
    """Read one sequence whole, then predict another from left to right: the transformer of 2017.

    One token table serves both sides and the output, as in Vaswani et al. 2017, section 3.4. Unlike theirs,
    it has GELU for ReLU, doesn't multiply the token vectors by √d_model, and spares them in dropout.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        positions = SinusoidalPositions(config.max_seq_len, config.d_model)
        self.embeddings = InputEmbeddings(config.vocab_size, config.d_model, positions)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layers))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.embeddings.tok_emb.weight
        # So that the logits begin near deviation 1.
        nn.init.normal_(self.lm_head.weight, std=config.d_model**-0.5)

    def forward(self, source: Int64[Tensor, "B S"], ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the target's next token, after each of its tokens `ids`."""
        return self.decode(ids, self.encode(source))

    def encode(self, source: Int64[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
        x = _embed(self, source)
        for block in self.encoder:
            x = block(x)
        return x

    def decode(self, ids: Int64[Tensor, "B T"], memory: Float[Tensor, "B S C"]) -> Float[Tensor, "B T V"]:
        x = _embed(self, ids)
        for block in self.decoder:
            x = block(x, memory)
        return self.lm_head(x)


def _cross_attention(config: GPTConfig) -> CrossAttention:
    return CrossAttention(config.d_model, config.n_heads, dropout=config.dropout, bias=config.bias)
