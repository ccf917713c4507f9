"""Turn token IDs into vectors: word2vec, which learns them from a text, and positions, which a model adds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm


class InputEmbeddings(nn.Module):
    """Add to the vector of each token the vector of its position.

    `positions` is LearnedPositions, SinusoidalPositions, any module that maps positions to vectors, or None
    for a model that tells positions in another way.
    """

    def __init__(self, vocab_size: int, d_model: int, positions: nn.Module | None) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.pos_emb = positions

    def forward(
        self, ids: Int64[Tensor, "*B T"], start: int | Int64[Tensor, "*B 1"] = 0
    ) -> Float[Tensor, "*B T C"]:
        """Embed tokens, the first of which stands at position `start`: one for all rows, or one for each.

        A row that starts before 0 is padded there; its padding gets the vector of position 0.
        """
        x = self.tok_emb(ids)  # (B, T, C)
        if self.pos_emb is None:
            return x
        positions = start + torch.arange(ids.shape[-1], device=ids.device)  # (T), or (B, T)
        return x + self.pos_emb(positions.clamp(min=0))


class LearnedPositions(nn.Embedding):
    """Hold one vector for each position, learned like all other parameters. Radford et al. 2018 (GPT)."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__(max_seq_len, d_model)

    def forward(self, positions: Int64[Tensor, "*T"]) -> Float[Tensor, "*T C"]:
        return _look_up(self.weight, positions)


class SinusoidalPositions(nn.Module):
    """Hold the fixed vectors of `sinusoidal_positions`: no parameters, nothing to save."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoidal_positions(max_seq_len, d_model), persistent=False)

    def forward(self, positions: Int64[Tensor, "*T"]) -> Float[Tensor, "*T C"]:
        return _look_up(self.weight, positions)


def sinusoidal_positions(max_seq_len: int, d_model: int) -> Float[Tensor, "T C"]:
    """Return the sine (even columns) and cosine (odd) of each position at d_model / 2 frequencies.

    Vaswani et al. 2017, section 3.5, arXiv:1706.03762.
    """
    if d_model % 2:
        raise ValueError(f"d_model={d_model} is odd: sine and cosine come in pairs, choose an even width")
    # In double precision, so that far positions are as exact as near ones.
    frequencies = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)  # (T, C / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()  # (T, C)


def _look_up(table: Float[Tensor, "T C"], positions: Int64[Tensor, "*T"]) -> Float[Tensor, "*T C"]:
    try:
        return F.embedding(positions, table)
    except IndexError:
        raise ValueError(
            f"positions {int(positions.min())} to {int(positions.max())} don't fit into "
            f"max_seq_len={len(table)}: shorten the text, or build the model with a longer max_seq_len"
        ) from None


class SkipGram(nn.Module):
    """Score how well two words go together: the dot product of a center vector and a context vector.

    Mikolov et al. 2013, arXiv:1310.4546.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.context_emb = nn.Embedding(vocab_size, d_model)
        nn.init.zeros_(self.context_emb.weight)

    def forward(
        self, centers: Int64[Tensor, " B"], contexts: Int64[Tensor, " B"], negatives: Int64[Tensor, "B N"]
    ) -> Float[Tensor, ""]:
        """Return the mean of −log σ(true pair) − Σ log σ(−negative pair), in nats."""
        center = self.tok_emb(centers)  # (B, C)
        true = (center * self.context_emb(contexts)).sum(-1)  # (B)
        false = (center[:, None] * self.context_emb(negatives)).sum(-1)  # (B, N)
        return -(F.logsigmoid(true) + F.logsigmoid(-false).sum(-1)).mean()


def word2vec(
    documents: Sequence[Sequence[int]],
    vocab_size: int,
    *,
    d_model: int = 32,
    window: int = 5,
    n_negatives: int = 5,
    n_epochs: int = 1,
    batch_size: int = 16384,
    lr: float = 0.05,
    threshold: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, "V C"]:
    """Learn a vector for each word from the words around it: skip-gram with negative sampling.

    `documents` holds word IDs; no pair spans two documents. Negatives are drawn in proportion to count^0.75,
    as Mikolov et al. 2013 do; Adam takes the place of their plain gradient descent.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([i for document in documents for i in document], dtype=torch.int64)
    document_ids = torch.arange(len(documents)).repeat_interleave(
        torch.tensor([len(document) for document in documents], dtype=torch.int64)
    )
    counts = tokens.bincount(minlength=vocab_size)
    kept = torch.rand(len(tokens), generator=generator) < keep_probability(counts, threshold)[tokens]
    pairs = skip_gram_pairs(tokens[kept], document_ids[kept], window)  # (N, 2)
    if len(pairs) == 0:
        raise ValueError(
            f"no pair of words in {len(tokens)} words: give longer documents or a larger threshold"
        )

    model = SkipGram(vocab_size, d_model)
    nn.init.uniform_(model.tok_emb.weight, -0.5 / d_model, 0.5 / d_model, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    batches = [
        batch
        for _ in range(n_epochs)
        for batch in torch.randperm(len(pairs), generator=generator).split(batch_size)
    ]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for batch in tqdm(batches, desc="word2vec", unit="batch", leave=False, disable=not progress):
        centers, contexts = pairs[batch].unbind(1)  # (B), (B)
        negatives = torch.multinomial(
            counts**0.75, len(batch) * n_negatives, replacement=True, generator=generator
        ).view(-1, n_negatives)  # (B, N)
        loss = model(centers, contexts, negatives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.tok_emb.weight.detach()


def keep_probability(counts: Int64[Tensor, " V"], threshold: float) -> Float[Tensor, " V"]:
    """Return √(threshold / frequency), at most 1: the share of its copies that a frequent word keeps."""
    return (threshold * counts.sum() / counts).sqrt().clamp(max=1.0)


def skip_gram_pairs(
    tokens: Int64[Tensor, " T"], document_ids: Int64[Tensor, " T"], window: int
) -> Int64[Tensor, "N 2"]:
    """Return each pair (center, context) of words of one document that are at most `window` apart."""
    pairs = []
    for distance in range(1, min(window, len(tokens) - 1) + 1):
        left, right = tokens[:-distance], tokens[distance:]
        together = document_ids[:-distance] == document_ids[distance:]
        pairs += [torch.stack([left, right], -1)[together], torch.stack([right, left], -1)[together]]
    return torch.cat(pairs) if pairs else tokens.new_empty(0, 2)


def nearest(
    vectors: Float[Tensor, "V C"], query: Float[Tensor, " C"], k: int
) -> tuple[Float[Tensor, " k"], Int64[Tensor, " k"]]:
    """Return the `k` largest cosine similarities to `query`, and the rows of `vectors` that have them."""
    return F.cosine_similarity(vectors, query, dim=-1).topk(k)


def neighbor_purity(
    vectors: Float[Tensor, "N C"], labels: Int64[Tensor, " N"], k: int
) -> Float[Tensor, " N"]:
    """Return, for each vector, the share of its `k` nearest neighbors by cosine that have its own label."""
    if not 0 < k < len(vectors):
        raise ValueError(
            f"k={k} neighbors among {len(vectors)} vectors: choose k from 1 to {len(vectors) - 1}"
        )
    unit = F.normalize(vectors, dim=-1)
    similarity = (unit @ unit.mT).fill_diagonal_(-math.inf)  # no vector is its own neighbor
    neighbors = similarity.topk(k).indices  # (N, k)
    return (labels[neighbors] == labels[:, None]).float().mean(dim=-1)
