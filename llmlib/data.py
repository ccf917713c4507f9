"""Cut a long row of tokens into batches of inputs and targets, from memory or from disk."""

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from llmlib.resources import write_beside

IGNORE_INDEX = -100  # a target that doesn't count: the convention of PyTorch

Document = TypeVar("Document", bound=Hashable)


def join_documents(documents: Iterable[Iterable[int]], end_id: int) -> Iterator[int]:
    """Yield the tokens of all documents in one row, with `end_id` after each document."""
    for document in documents:
        yield from document
        yield end_id


def split_documents(
    documents: Sequence[Document], validation: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split documents into a training and a validation list, each in the order in which they came.

    `validation` is a share of the distinct documents, at least one of them; copies stay on one side.
    """
    distinct = list(dict.fromkeys(documents))
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, got {validation}")
    if len(distinct) < 2:
        raise ValueError(f"a split needs at least 2 distinct documents, got {len(distinct)}: add some")
    n_held_out = min(max(1, round(validation * len(distinct))), len(distinct) - 1)
    chosen = np.random.default_rng(seed).permutation(len(distinct))[:n_held_out]
    held_out = {distinct[i] for i in chosen}
    return [d for d in documents if d not in held_out], [d for d in documents if d in held_out]


def save_tokens(tokens: Iterable[int], path: str | os.PathLike, vocab_size: int, chunk: int = 1 << 20) -> int:
    """Write tokens to a .npy file, in constant memory, and return how many there were.

    A token takes 2 bytes if the vocabulary has at most 65,536 entries, else 4. The file gets its name only
    when it is whole. ValueError on an ID beyond the vocabulary, and on no token at all.
    """
    stream, n_tokens = iter(tokens), 0
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    with write_beside(path) as new, new.open("wb") as file:
        _write_header(file, dtype, 0)
        while len(ids := np.fromiter(islice(stream, chunk), np.int64)):
            _check_ids(ids, vocab_size)
            file.write(ids.astype(dtype).tobytes())
            n_tokens += len(ids)
        if n_tokens == 0:
            name = Path(path).name
            raise ValueError(f"0 tokens to write to {name}: the text is empty, give one that is not")
        file.seek(0)
        _write_header(file, dtype, n_tokens)
    return n_tokens


def open_tokens(path: str | os.PathLike) -> Integer[np.ndarray, " N"]:
    """Open a file of `save_tokens` as a memory-mapped array: only what is read comes into memory."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        name = Path(path).name
        raise ValueError(f"{name} holds no tokens, or not all of them: write it with save_tokens") from error


@dataclass(frozen=True, eq=False)
class TokenWindows(Dataset):
    """Hold windows of a row of tokens: number i starts at token `i * stride`, its targets one token later.

    The index may be a row of numbers: the windows then come as one batch. Tokens after the last whole window
    are left out.
    """

    tokens: Integer[np.ndarray, " N"]
    max_seq_len: int
    stride: int
    vocab_size: int | None = None

    def __len__(self) -> int:
        return (len(self.tokens) - self.max_seq_len - 1) // self.stride + 1

    def __getitem__(
        self, index: int | Sequence[int] | Integer[np.ndarray, " B"]
    ) -> tuple[Int64[Tensor, "*B T"], Int64[Tensor, "*B T"]]:
        index, n = np.asarray(index), len(self)
        if ((index < -n) | (index >= n)).any():
            raise IndexError(f"window {index} is outside the {n} windows")
        starts = index % n * self.stride
        ids = self.tokens[starts[..., None] + np.arange(self.max_seq_len + 1)]  # (B, T + 1)
        if self.vocab_size is not None:
            _check_ids(ids, self.vocab_size)
        inputs, targets = ids[..., :-1], ids[..., 1:]  # (B, T) each
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))


def token_windows(
    tokens: Tensor | np.ndarray | str | os.PathLike,
    max_seq_len: int,
    stride: int | None = None,
    vocab_size: int | None = None,
) -> TokenWindows:
    """Return the windows of a row of tokens: a tensor, an array, or the path of a file of `save_tokens`.

    Without `stride`, windows stand side by side: `stride = max_seq_len`. With `vocab_size`, every ID is
    checked when it is read. ValueError on a misfit.
    """
    row = _token_row(tokens)
    stride = max_seq_len if stride is None else stride
    if max_seq_len < 1 or stride < 1:
        raise ValueError(f"max_seq_len and stride must be at least 1, got {max_seq_len} and {stride}")
    if len(row) < max_seq_len + 1:
        raise ValueError(
            f"a text of {len(row)} tokens is too short: a window of max_seq_len {max_seq_len} needs "
            f"{max_seq_len + 1}, one more for the last target; take a longer text or a smaller max_seq_len"
        )
    return TokenWindows(row, max_seq_len, stride, vocab_size)


@dataclass(frozen=True, eq=False)
class DocumentRows(Dataset):
    """Hold one document a row, from its first token, which follows `end_id`, to the `end_id` that ends it.

    A document longer than `max_seq_len` is cut there. The index may be a row of numbers: the documents then
    come as one batch, as wide as the longest of them. The rest of a row is padding: `end_id` as input,
    −100 as target.
    """

    tokens: Integer[np.ndarray, " N"]
    ends: Int64[np.ndarray, " M"]
    max_seq_len: int
    end_id: int

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(
        self, index: int | Sequence[int] | Integer[np.ndarray, " B"]
    ) -> tuple[Int64[Tensor, "*B T"], Int64[Tensor, "*B T"]]:
        index = np.asarray(index) % len(self)
        ends = self.ends[index][..., None]  # (B, 1)
        starts = np.where(index[..., None] == 0, 0, self.ends[index - 1][..., None] + 1)
        T = min(self.max_seq_len, int((ends - starts).max()) + 1)
        places = starts + np.arange(-1, T)  # (B, T + 1)
        ids = self.tokens[places.clip(0, len(self.tokens) - 1)].astype(np.int64)
        ids[..., 0] = self.end_id
        inputs = np.where(places <= ends, ids, self.end_id)[..., :-1]
        targets = np.where(places <= ends, ids, IGNORE_INDEX)[..., 1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def document_rows(
    tokens: Tensor | np.ndarray | str | os.PathLike, max_seq_len: int, end_id: int
) -> DocumentRows:
    """Return the documents of a row of tokens in which `end_id` ends each: see `join_documents`."""
    row = _token_row(tokens)
    ends = np.flatnonzero(row == end_id)
    if len(ends) == 0 or max_seq_len < 1:
        raise ValueError(
            f"{len(ends)} documents end with the token {end_id} in rows of max_seq_len {max_seq_len}: "
            "both numbers must be at least 1"
        )
    return DocumentRows(row, ends, max_seq_len, end_id)


@dataclass(eq=False)
class BatchOrder(Sampler[np.ndarray]):
    """Yield the window numbers of each batch, in an order that is a pure function of the seed and the epoch.

    Each pass is the next epoch. The first one begins after `start` batches, counted over all epochs.
    """

    n_windows: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    start: int = 0

    def __len__(self) -> int:
        return self.n_windows // self.batch_size if self.drop_last else -(-self.n_windows // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, n_seen = divmod(self.start, len(self))
        self.start = (epoch + 1) * len(self)
        order = np.arange(self.n_windows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        for i in range(n_seen, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


def make_loader(
    tokens: Tensor | np.ndarray | str | os.PathLike,
    max_seq_len: int,
    batch_size: int,
    *,
    stride: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = True,
    start: int = 0,
    vocab_size: int | None = None,
) -> DataLoader:
    """Return a loader of (inputs, targets), each of shape (B, T), over the windows of `token_windows`.

    One seed gives the same batches on every machine, in a new order each epoch. A run that stopped after
    `start` batches, counted over all epochs, goes on with the next one. Without `drop_last`, an epoch's last
    batch may be short.
    """
    windows = token_windows(tokens, max_seq_len, stride, vocab_size)
    return _load(windows, batch_size, shuffle, seed, drop_last, start)


def make_document_loader(
    tokens: Tensor | np.ndarray | str | os.PathLike,
    max_seq_len: int,
    batch_size: int,
    end_id: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = True,
    start: int = 0,
) -> DataLoader:
    """Return a loader like `make_loader`'s, with one document of `document_rows` in each row of a batch."""
    rows = document_rows(tokens, max_seq_len, end_id)
    return _load(rows, batch_size, shuffle, seed, drop_last, start)


def _load(
    rows: TokenWindows | DocumentRows, batch_size: int, shuffle: bool, seed: int, drop_last: bool, start: int
) -> DataLoader:
    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size must be at least 1 and start at least 0, got {batch_size} and {start}")
    if drop_last and batch_size > len(rows):
        raise ValueError(
            f"batch_size {batch_size} is more than the {len(rows)} windows of the text: no batch is full; "
            "take a smaller batch or stride, a longer text, or drop_last=False"
        )
    order = BatchOrder(len(rows), batch_size, shuffle, seed, drop_last, start)
    # Its own generator: each epoch a DataLoader draws a number, which must not move the global random state.
    return DataLoader(rows, sampler=order, batch_size=None, generator=torch.Generator())


def _token_row(tokens: Tensor | np.ndarray | str | os.PathLike) -> Integer[np.ndarray, " N"]:
    if isinstance(tokens, str | os.PathLike):
        tokens = open_tokens(tokens)
    row = tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise ValueError(f"tokens must be one row of integers, got {row.dtype} of shape {row.shape}")
    return row


def _write_header(file: BinaryIO, dtype: np.dtype, n_tokens: int) -> None:
    """Write a .npy header, which NumPy pads so that it can be written again once the length is known."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (n_tokens,)})


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    worst = ids.min() if ids.min() < 0 else ids.max()
    if not 0 <= worst < vocab_size:
        raise ValueError(
            f"token ID {worst} is outside a vocabulary of {vocab_size} (0 to {vocab_size - 1}): "
            "take the vocabulary size of the tokenizer that made these tokens"
        )
