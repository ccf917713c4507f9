"""Write with a language model: shape its next-token distribution, draw from it, compute nothing twice."""

from __future__ import annotations

import codecs
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from llmlib.attention import Cache, MultiHeadAttention, Positions
from llmlib.gpt import GPT
from llmlib.llama import RotaryPositions, SwiGLU
from llmlib.tokenization import BPETokenizer

# Turns the logits (B, V) of the next token into others, given the tokens (B, T) so far.
Strategy = Callable[[Tensor, Tensor], Tensor]


def temperature(t: float) -> Strategy:
    """Divide the logits by `t`: below 1, likely tokens gain; above 1, unlikely ones. At 0, one is left."""
    if not 0 <= t < math.inf:
        raise ValueError(f"temperature must be a number from 0 up, got {t}")
    if t == 0:
        return lambda logits, ids: _only(logits, logits.argmax(-1, keepdim=True))
    return lambda logits, ids: logits / t


def top_k(k: int) -> Strategy:
    """Keep the `k` likeliest tokens. Fan et al. 2018, arXiv:1805.04833."""
    if k < 1:
        raise ValueError(f"top_k must keep at least 1 token, got {k}")
    return lambda logits, ids: _only(logits, logits.topk(min(k, logits.shape[-1])).indices)


def top_p(p: float) -> Strategy:
    """Keep the fewest tokens that together have the probability `p`.

    Holtzman et al. 2019, arXiv:1904.09751.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be a probability above 0, up to 1, got {p}")
    if p == 1:  # where rounding would lose some
        return lambda logits, ids: logits

    def keep(logits: Tensor, ids: Tensor) -> Tensor:
        values, tokens = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what all likelier tokens have together
        return logits.scatter(-1, tokens, values.masked_fill(before >= p, -math.inf))

    return keep


def min_p(p: float) -> Strategy:
    """Keep the tokens that have at least `p` times the likeliest one's probability.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be a share from 0 to 1, got {p}")

    def keep(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        least = p * probabilities.amax(-1, keepdim=True)
        return logits.masked_fill(probabilities < least, -math.inf)

    return keep


def repetition_penalty(penalty: float) -> Strategy:
    """Divide the positive logits of tokens already there by `penalty`, and multiply the negative ones.

    Keskar et al. 2019, section 4.1, arXiv:1909.05858, divide all of them, which favours negative ones.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"a repetition penalty must be a number above 0, got {penalty}")

    def punish(logits: Tensor, ids: Tensor) -> Tensor:
        seen = logits.gather(-1, ids)
        return logits.scatter(-1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))

    return punish


def _only(logits: Float[Tensor, "B V"], tokens: Int64[Tensor, "B k"]) -> Float[Tensor, "B V"]:
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, logits.gather(-1, tokens))


def distribution(
    logits: Float[Tensor, "B V"], ids: Int64[Tensor, "B T"], strategies: Iterable[Strategy] = ()
) -> Float[Tensor, "B V"]:
    """Return the probabilities of the next token, after each strategy in turn."""
    logits = logits.float()
    for strategy in strategies:
        logits = strategy(logits, ids)
    return logits.softmax(-1)


def draw(p: Float[Tensor, "B V"], generator: torch.Generator | None = None) -> Int64[Tensor, "B 1"]:
    """Draw a token for each row: the first at which the sum of the probabilities exceeds a random number.

    One number for a row, where `torch.multinomial` takes one for each token of the vocabulary.
    """
    sums = p.cumsum(-1)  # (B, V)
    chances = torch.rand(len(p), 1, generator=generator, device=p.device) * sums[:, -1:]  # (B, 1)
    return torch.searchsorted(sums, chances, right=True)  # (B, 1)


class KVCache:
    """Hold the keys and values that one block computed, in memory laid out once for `max_seq_len` tokens.

    The first tokens decide its type, device and number of rows. To take tokens back, lower `n_tokens`.
    """

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len, self.n_tokens = max_seq_len, 0
        self.k = self.v = torch.empty(0)

    def update(
        self, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Add the keys and values of T tokens, and return all of them."""
        start, end = self.n_tokens, self.n_tokens + k.shape[-2]
        if end > self.max_seq_len:
            raise ValueError(
                f"{end} tokens don't fit into a cache of max_seq_len={self.max_seq_len}: make it longer"
            )
        if start == 0:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.max_seq_len, x.shape[-1]) for x in (k, v))
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        self.n_tokens = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (B, K, S, D) each

    def select(self, rows: Int64[Tensor, " N"]) -> None:
        """Go on with these rows, in this order; a row may come twice."""
        self.k, self.v = self.k[rows], self.v[rows]


def make_caches(model: GPT, n_tokens: int | None = None) -> list[KVCache]:
    """Make an empty cache for each block, for a text of `n_tokens`, but no longer than the model's window.

    Together they hold 2 n_layers n_kv_heads d_head numbers for each token of a row.
    """
    max_seq_len = model.config.max_seq_len
    return [KVCache(min(n_tokens or max_seq_len, max_seq_len)) for _ in model.blocks]


def last_logits(
    model: GPT,
    ids: Int64[Tensor, "B T"],
    caches: Sequence[KVCache],
    padding: Int64[Tensor, " B"] | None = None,
    n_last: int = 1,
) -> Float[Tensor, "B {n_last} V"]:
    """Return the logits after the last tokens of `ids`; the model reads only those that no cache holds yet.

    Of a longer text, the model sees the last `max_seq_len` tokens. Their positions shift with each new token,
    so that nothing computed before can serve: it reads all of them, and leaves the caches as they are.
    """
    n_lost = max(0, ids.shape[1] - model.config.max_seq_len)
    if n_lost == 0:
        x = model.hidden(ids[:, caches[0].n_tokens :], caches, padding)
    else:
        x = model.hidden(
            ids[:, n_lost:], padding=None if padding is None else (padding - n_lost).clamp(min=0)
        )
    return model.lm_head(x[:, -n_last:])


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"]]:
    """Make prompts of any lengths equally long, and return them and the length of each one's padding.

    It goes to the left, so that the next token of all of them has the same place. The model doesn't see it.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) == 0:
        raise ValueError(
            f"prompts of {lengths} tokens: give at least one prompt, and each at least one token"
        )
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    rows = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)


@torch.no_grad()
def stream(
    model: GPT,
    ids: Int64[Tensor, "B T"],
    n_tokens: int,
    strategies: Sequence[Strategy] = (),
    *,
    stop_ids: Iterable[int] = (),
    padding: Int64[Tensor, " B"] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int64[Tensor, " B"]]:
    """Yield up to `n_tokens` new tokens, one for each row, as soon as each is drawn.

    It ends early once every row has drawn one of `stop_ids`; a row that has goes on with that token.
    `padding` is that of `pad_left`. The model sees the last `max_seq_len` tokens, the strategies see all.
    ValueError, with the first token, on what can't be continued, and on a model that drops out numbers.
    """
    _check(model, ids, n_tokens)
    if padding is not None:
        ids = _fill_padding(ids, padding)
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    caches = make_caches(model, ids.shape[1] + n_tokens)
    for _ in range(n_tokens):
        logits = last_logits(model, ids, caches, padding).squeeze(1)  # (B, V)
        token = draw(distribution(logits, ids, strategies), generator)  # (B, 1)
        token = torch.where(done[:, None], ids[:, -1:], token)
        yield token.squeeze(1)
        ids = torch.cat([ids, token], dim=1)
        done |= torch.isin(token.squeeze(1), stop)
        if done.all():
            return


def generate(
    model: GPT,
    ids: Int64[Tensor, "B T"],
    n_tokens: int,
    strategies: Sequence[Strategy] = (),
    *,
    stop_ids: Iterable[int] = (),
    padding: Int64[Tensor, " B"] | None = None,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, "B _"]:
    """Return `ids` and the tokens that `stream` yields after them."""
    options = dict(stop_ids=stop_ids, padding=padding, generator=generator)
    return torch.cat([ids, torch.stack([*stream(model, ids, n_tokens, strategies, **options)], dim=1)], dim=1)


def stream_text(
    model: GPT,
    tokenizer: BPETokenizer,
    prompt: str | Sequence[int],
    n_tokens: int,
    strategies: Sequence[Strategy] = (),
    *,
    stop_ids: Collection[int] = (),
    allowed_special: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the text of up to `n_tokens` new tokens, piece by piece, without the token that stops it.

    A token may end within a character: its bytes wait until the rest has come. Bytes that are no UTF-8 become
    U+FFFD, as in `tokenizer.decode`. The prompt is a text, in which `allowed_special` counts as in
    `tokenizer.encode`, or its tokens.
    """
    tokens = tokenizer.encode(prompt, allowed_special) if isinstance(prompt, str) else prompt
    ids = torch.tensor([[*tokens]], dtype=torch.int64, device=model.lm_head.weight.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in stream(model, ids, n_tokens, strategies, stop_ids=stop_ids, generator=generator):
        if token.item() in stop_ids:
            break
        if token.item() not in tokenizer.vocab:
            raise ValueError(
                f"the model of vocab_size={model.config.vocab_size} drew {token.item()}, which is not among "
                f"the {tokenizer.vocab_size} tokens: take the tokenizer that the model was built for"
            )
        if piece := decoder.decode(tokenizer.vocab[token.item()]):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


@torch.no_grad()
def beam_search(
    model: GPT,
    ids: Int64[Tensor, " T"],
    n_tokens: int,
    n_beams: int,
    *,
    stop_ids: Iterable[int] = (),
    length_penalty: float = 0.0,
) -> list[tuple[Int64[Tensor, " _"], float]]:
    """Return the `n_beams` best continuations found, the best first, each with its log-probability in nats.

    Each step extends all beams by all tokens, and keeps those with the greatest log p / lengthᵃ, where a is
    the `length_penalty` and length counts new tokens. A beam that draws a stop token stays as it is,
    and has to keep its place among the others.
    Wu et al. 2016, section 7, arXiv:1609.08144, who have another function of the length.
    """
    _check(model, ids[None], n_tokens)
    if n_beams < 1:
        raise ValueError(f"n_beams must be at least 1, got {n_beams}")
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=ids.device)
    beams, log_p = ids[None], torch.zeros(1, device=ids.device)  # (N, T), (N)
    length, done = torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool)  # (N) each
    caches = make_caches(model, len(ids) + n_tokens)
    for _ in range(n_tokens):
        extended = last_logits(model, beams, caches).squeeze(1).float().log_softmax(-1)  # (N, V)
        # A beam that is done draws the same token again, at no cost.
        extended[done] = _only(torch.zeros_like(extended[done]), beams[done, -1:])
        extended += log_p[:, None]
        length = length + ~done
        scores = (extended / length[:, None] ** length_penalty).flatten()
        best = scores.topk(min(n_beams, int(scores.isfinite().sum()))).indices
        rows, tokens = best // extended.shape[1], best % extended.shape[1]  # (N) each
        beams = torch.cat([beams[rows], tokens[:, None]], dim=1)
        log_p, length = extended[rows, tokens], length[rows]
        done = done[rows] | torch.isin(tokens, stop)
        for cache in caches:
            cache.select(rows)
        if done.all():
            break
    return [
        (beam[: len(ids) + int(n)], p)
        for beam, n, p in zip(beams, length.tolist(), log_p.tolist(), strict=True)
    ]


def verify(
    drafts: Int64[Tensor, " N"],
    q: Float[Tensor, "N V"],
    p: Float[Tensor, "N+1 V"],
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " _"]:
    """Turn N tokens drawn from `q` into at least one, and up to N + 1, drawn from `p`.

    A draft is kept with probability min(1, p / q). The first that is not gives way to a draw from what p has
    and q lacks, max(0, p − q), and ends the block; after N kept ones comes a draw from the last p.
    Leviathan et al. 2022, algorithm 1, arXiv:2211.17192.
    """
    chances = torch.rand(len(drafts), generator=generator, device=drafts.device)
    for i, draft in enumerate(drafts):
        if chances[i] * q[i, draft] >= p[i, draft]:
            rest = (p[i] - q[i]).clamp(min=0)
            rest = rest if rest.any() else p[i]  # p and q are equal but for rounding
            return torch.cat([drafts[:i], draw(rest[None], generator)[0]])
    return torch.cat([drafts, draw(p[-1:], generator)[0]])


@torch.no_grad()
def speculative(
    model: GPT,
    draft: GPT,
    ids: Int64[Tensor, "1 T"],
    n_tokens: int,
    n_draft: int,
    strategies: Sequence[Strategy] = (),
    *,
    generator: torch.Generator | None = None,
) -> Iterator[Int64[Tensor, " _"]]:
    """Yield blocks of new tokens, `n_tokens` in all, distributed exactly as those of `stream`.

    The small model `draft` proposes `n_draft` tokens one by one, and `model` reads them all at once: a block
    is the drafts that it kept, and one token more. Beyond its window it goes on alone, token by token.
    Leviathan et al. 2022, arXiv:2211.17192.
    """
    _check(model, ids, n_tokens)
    _check(draft, ids, n_tokens)
    if n_draft < 1:
        raise ValueError(f"n_draft must be at least 1, got {n_draft}")
    if draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft has vocab_size={draft.config.vocab_size}, the model {model.config.vocab_size}: "
            "both need the same tokens"
        )
    caches, draft_caches = (make_caches(m, ids.shape[1] + n_tokens) for m in (model, draft))
    end = ids.shape[1] + n_tokens
    while (start := ids.shape[1]) < end:
        n = max(0, min(n_draft, end - start - 1, model.config.max_seq_len - start))
        q = []
        for _ in range(n):
            logits = last_logits(draft, ids, draft_caches).squeeze(1)  # (1, V)
            q.append(distribution(logits, ids, strategies))
            ids = torch.cat([ids, draw(q[-1], generator)], dim=1)
        logits = last_logits(model, ids, caches, n_last=n + 1)  # (1, N + 1, V)
        p = [distribution(logits[:, i], ids[:, : start + i], strategies) for i in range(n + 1)]
        p, q = torch.cat(p), torch.cat([*q, p[0][:0]])  # (N + 1, V), (N, V)
        block = verify(ids[0, start:], q, p, generator)
        yield block
        ids = torch.cat([ids[:, :start], block[None]], dim=1)
        # The last token is still to be read; what the drafts after it left is taken back.
        for cache in (*caches, *draft_caches):
            cache.n_tokens = min(cache.n_tokens, ids.shape[1] - 1)


@torch.no_grad()
def for_inference(model: GPT) -> GPT:
    """Return a copy of `model` that writes faster, and can't be trained: the same but for rounding.

    Layers that read the same vector become one, and the angles of all positions are computed once, for all
    blocks. Autocast would convert the copy's weights for each token: convert the model before.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)

    @functools.cache
    def turn(*frequencies: float) -> RotaryTable:
        return RotaryTable(torch.tensor(frequencies), fast.config.max_seq_len).to(fast.lm_head.weight)

    for block in fast.blocks:
        positions, ffn = block.attn.positions, block.ffn
        if isinstance(positions, RotaryPositions):
            positions = turn(*positions.frequencies.tolist())
        block.attn, block.dropout = FusedAttention(block.attn, positions), nn.Identity()
        if isinstance(ffn, SwiGLU):
            block.ffn = FusedSwiGLU(ffn)
        else:
            ffn.up_proj, ffn.down_proj = FastLinear(ffn.up_proj), FastLinear(ffn.down_proj)
    fast.lm_head = FastLinear(fast.lm_head)
    return fast


class FastLinear(nn.Linear):
    """Make one layer of those that read the same vector: what they return, it returns side by side.

    The product with one vector is most of the work of writing. On a CPU it is up to twice as fast where the
    weights lie as it reads them: column by column in float32, in bfloat16 as oneDNN lays them out.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight for layer in layers])
        super().__init__(*weight.T.shape, bias=layers[0].bias is not None, device="meta")
        self.packed = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            weight = weight.T.contiguous().T
        # These are no public functions of PyTorch: its compiler calls them, and not every build has them.
        elif weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_packed_products():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if layers[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)

    def __deepcopy__(self, memo: dict) -> FastLinear:
        return FastLinear(self)  # what oneDNN laid out can't be copied

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B N"]:
        one = x.numel() == self.in_features and x.device.type == "cpu" and x.dtype == self.weight.dtype
        if self.packed is None or not one:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def _has_packed_products() -> bool:
    mkldnn, names = torch.ops.mkldnn, ("_is_mkldnn_bf16_supported", "_linear_pointwise")
    return all(hasattr(mkldnn, name) for name in names) and mkldnn._is_mkldnn_bf16_supported()


class FusedAttention(MultiHeadAttention):
    """Do what `attn` does, with one product for queries, keys and values, and one turn by `positions`."""

    def __init__(self, attn: MultiHeadAttention, positions: Positions) -> None:
        nn.Module.__init__(self)
        self.d_model, self.d_head, self.dropout, self.positions = attn.d_model, attn.d_head, 0.0, positions
        self.n_heads, self.n_kv_heads = (p.out_features // attn.d_head for p in (attn.q_proj, attn.k_proj))
        self.qkv_proj, self.o_proj = (
            FastLinear(attn.q_proj, attn.k_proj, attn.v_proj),
            FastLinear(attn.o_proj),
        )

    def forward(
        self,
        x: Float[Tensor, "*B T C"],
        cache: Cache | None = None,
        mask: Bool[Tensor, "*#B #T S"] | None = None,
    ) -> Float[Tensor, "*B T C"]:
        H, K = self.n_heads, self.n_kv_heads
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.d_head)).transpose(-3, -2)  # (B, H + 2 K, T, D)
        qk, v = heads.split([H + K, K], dim=-3)
        q, k = self.positions(qk, 0 if cache is None else cache.n_tokens).split([H, K], dim=-3)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, D)
        return self.attend(q, k, v, mask)


class FusedSwiGLU(nn.Module):
    """Do what `ffn` does, with one product for the gate and what it opens."""

    def __init__(self, ffn: SwiGLU) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = FastLinear(ffn.gate_proj, ffn.up_proj), FastLinear(ffn.down_proj)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down_proj(F.silu(gate) * up)


class RotaryTable(nn.Module):
    """Turn queries or keys as `RotaryPositions` does, by cosines and sines that it looks up."""

    def __init__(self, frequencies: Float[Tensor, " F"], max_seq_len: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_seq_len), frequencies)  # (T, D / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1))  # (T, D)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1))

    def forward(self, x: Float[Tensor, "*B T D"], start: int) -> Float[Tensor, "*B T D"]:
        """Turn T vectors, the first of which stands at position `start`."""
        rows, swapped = slice(start, start + x.shape[-2]), x.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(x * self.cos[rows], swapped, self.sin[rows])


def _check(model: GPT, ids: Int64[Tensor, "B T"], n_tokens: int) -> None:
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    if model.training and model.config.dropout > 0:  # what the caches hold would lack other numbers each time
        raise ValueError(
            f"a model in training drops out {model.config.dropout} of its numbers: call model.eval() first"
        )


def _fill_padding(ids: Int64[Tensor, "B T"], padding: Int64[Tensor, " B"]) -> Int64[Tensor, "B T"]:
    """Put each row's first token in place of its padding, which strategies would else take for text."""
    T = ids.shape[1]
    if padding.max() >= T:
        raise ValueError(
            f"padding {padding.tolist()} leaves no token of {T} in some row: give each row at least one"
        )
    return ids.gather(1, torch.maximum(torch.arange(T, device=ids.device), padding[:, None]))
