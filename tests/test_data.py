import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llmlib.data import (
    TokenWindows,
    document_rows,
    join_documents,
    make_document_loader,
    make_loader,
    open_tokens,
    save_tokens,
    split_documents,
    token_windows,
)

sizes = st.integers(1, 12)


def row(n: int) -> torch.Tensor:
    return torch.arange(n)


# Windows


@given(n_spare=st.integers(1, 40), max_seq_len=sizes, stride=sizes)
def test_windows_equal_torch_unfold(n_spare, max_seq_len, stride):
    tokens = torch.randint(0, 50, (max_seq_len + n_spare,))
    expected = tokens.unfold(0, max_seq_len + 1, stride)
    inputs, targets = token_windows(tokens, max_seq_len, stride)[range(len(expected))]
    assert torch.equal(inputs, expected[:, :-1]) and torch.equal(targets, expected[:, 1:])
    assert len(token_windows(tokens, max_seq_len, stride)) == len(expected)


def test_one_window_has_targets_one_token_later():
    inputs, targets = token_windows(row(6), 4)[0]
    assert inputs.tolist() == [0, 1, 2, 3] and targets.tolist() == [1, 2, 3, 4]


def test_without_stride_every_token_is_an_input_once():
    windows = token_windows(row(21), 5)
    assert torch.cat([inputs for inputs, _ in windows]).tolist() == list(range(20))


def test_windows_are_contiguous_int64_whatever_the_tokens_are():
    for tokens in (row(9).to(torch.uint8), row(9).to(torch.int32), np.arange(9, dtype=np.uint16)):
        inputs, targets = token_windows(tokens, 4)[[0, 1]]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()


def test_index_from_the_end_and_beyond_it():
    windows = token_windows(row(9), 4)
    assert windows[-1][0].tolist() == [4, 5, 6, 7]
    for wrong in (2, -3, [0, 2]):
        with pytest.raises(IndexError, match="outside the 2 windows"):
            windows[wrong]


def test_a_dataset_works_in_a_plain_dataloader():
    inputs, targets = next(iter(DataLoader(token_windows(row(13), 4), batch_size=3)))
    assert inputs.shape == targets.shape == (3, 4)


def test_changing_a_batch_leaves_the_tokens_alone():
    tokens = row(9)
    token_windows(tokens, 4)[0][0].zero_()
    assert torch.equal(tokens, row(9))


@pytest.mark.parametrize(
    ("tokens", "sizes", "message"),
    [
        (row(4), (4,), "4 tokens is too short: a window of max_seq_len 4 needs 5"),
        (row(0), (4,), "0 tokens is too short"),
        (row(9), (0,), "at least 1, got 0 and 0"),
        (row(9), (4, 0), "at least 1, got 4 and 0"),
        (row(9), (4, -2), "got 4 and -2"),
        (row(8).view(2, 4), (2,), r"got int64 of shape \(2, 4\)"),
        (torch.rand(9), (2,), "got float32"),
    ],
)
def test_windows_that_do_not_fit(tokens, sizes, message):
    with pytest.raises(ValueError, match=message):
        token_windows(tokens, *sizes)


def test_a_text_of_one_window_is_enough():
    assert len(token_windows(row(5), 4, 7)) == 1


@pytest.mark.parametrize(
    ("bad", "message"), [(50, "token ID 50 is outside"), (-1, r"token ID -1 .* \(0 to 49\)")]
)
def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(bad, message):
    tokens = torch.tensor([1, 2, 3, 4, bad])
    token_windows(tokens, 4)[0]
    with pytest.raises(ValueError, match=message):
        token_windows(tokens, 4, vocab_size=50)[0]


# Batches


def starts(loader: DataLoader) -> list[list[int]]:
    """Return the first token of each window, batch by batch, of one pass."""
    return [inputs[:, 0].tolist() for inputs, _ in loader]


@given(
    n_windows=st.integers(1, 30),
    batch_size=sizes,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_shows_each_window_once(n_windows, batch_size, shuffle, drop_last, seed):
    batch_size = min(batch_size, n_windows)
    loader = make_loader(
        row(n_windows + 3), 3, batch_size, stride=1, shuffle=shuffle, seed=seed, drop_last=drop_last
    )
    batches = starts(loader)
    shown = [window for batch in batches for window in batch]
    assert len(batches) == len(loader)
    assert len(shown) == len(set(shown)) == (n_windows // batch_size * batch_size if drop_last else n_windows)
    assert shuffle or shown == list(range(len(shown)))


def test_the_last_batch_is_short_or_dropped():
    shapes = [inputs.shape for inputs, _ in make_loader(row(41), 4, 4, drop_last=False)]
    assert shapes == [(4, 4), (4, 4), (2, 4)]
    assert len(make_loader(row(41), 4, 4)) == 2


def test_a_seed_fixes_the_order_of_every_epoch():
    first, same, other = (make_loader(row(401), 4, 8, seed=seed) for seed in (1, 1, 2))
    epochs = [starts(first), starts(first)]
    assert epochs == [starts(same), starts(same)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != starts(other) != epochs[1]


def test_the_order_is_the_same_on_every_machine():
    assert starts(make_loader(row(9), 1, 8, seed=0)) == [[2, 4, 3, 6, 5, 0, 1, 7]]


@given(start=st.integers(0, 35))
def test_a_run_goes_on_after_any_batch(start):
    def batches(loader, n_epochs):
        return [batch for _ in range(n_epochs) for batch in starts(loader)]

    settings = dict(max_seq_len=4, batch_size=4, seed=3, drop_last=False)
    whole = batches(make_loader(row(39), **settings), 16)
    resumed = batches(make_loader(row(39), **settings, start=start), 3)
    assert resumed == whole[start : start + len(resumed)]


def test_a_loader_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    next(iter(make_loader(row(99), 4, 4)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1 and start at least 0, got 0 and 0"),
        ({"batch_size": 2, "start": -1}, "got 2 and -1"),
        ({"batch_size": 6}, "batch_size 6 is more than the 5 windows"),
    ],
)
def test_batches_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loader(row(21), 4, **settings)


def test_a_batch_larger_than_the_text_is_allowed_without_drop_last():
    assert starts(make_loader(row(21), 4, 6, drop_last=False, shuffle=False)) == [[0, 4, 8, 12, 16]]


# Documents


def test_each_document_is_followed_by_the_end_token():
    assert list(join_documents([[5, 6], [], [7]], end_id=0)) == [5, 6, 0, 0, 7, 0]


documents = st.lists(st.text(max_size=2), min_size=2).filter(lambda texts: len(set(texts)) > 1)


@given(documents=documents, validation=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_a_split_keeps_every_document_on_one_side(documents, validation, seed):
    train, held_out = split_documents(documents, validation, seed)
    assert train and held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert (train, held_out) == split_documents(documents, validation, seed)


def test_a_split_has_the_share_that_was_asked_for_and_depends_on_the_seed():
    texts = [str(i) for i in range(200)]
    train, held_out = split_documents(texts, 0.25)
    assert len(held_out) == 50
    assert train == sorted(train, key=int)
    assert split_documents(texts, 0.25, seed=1)[1] != held_out


@pytest.mark.parametrize(
    ("texts", "validation", "message"),
    [
        (["a", "b"], 0.0, "between 0 and 1, got 0.0"),
        (["a", "b"], 1.5, "between 0 and 1, got 1.5"),
        (["a", "a"], 0.5, "at least 2 distinct documents, got 1"),
        ([], 0.5, "at least 2 distinct documents, got 0"),
    ],
)
def test_splits_that_do_not_fit(texts, validation, message):
    with pytest.raises(ValueError, match=message):
        split_documents(texts, validation)


# Tokens on disk


@given(ids=st.lists(st.integers(0, 70_000), min_size=1), chunk=st.integers(1, 5))
def test_what_is_saved_is_opened(tmp_path_factory, ids, chunk):
    path = tmp_path_factory.mktemp("tokens") / "text.npy"
    assert save_tokens(iter(ids), path, vocab_size=70_001, chunk=chunk) == len(ids)
    assert open_tokens(path).tolist() == ids == np.load(path).tolist()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(256, 2), (65_536, 2), (65_537, 4)])
def test_a_token_takes_two_bytes_where_two_are_enough(tmp_path, vocab_size, itemsize):
    save_tokens([0, vocab_size - 1], tmp_path / "text.npy", vocab_size)
    tokens = open_tokens(tmp_path / "text.npy")
    assert isinstance(tokens, np.memmap) and tokens.itemsize == itemsize
    assert tokens.tolist() == [0, vocab_size - 1]


def test_batches_from_disk_equal_batches_from_memory(tmp_path):
    tokens = torch.randint(0, 999, (500,))
    save_tokens(tokens.tolist(), tmp_path / "text.npy", 999)
    from_disk, from_memory = (make_loader(t, 8, 4, seed=5) for t in (tmp_path / "text.npy", tokens))
    for disk, memory in zip(from_disk, from_memory, strict=True):
        assert torch.equal(disk[0], memory[0]) and torch.equal(disk[1], memory[1])


@pytest.mark.skipif(sys.platform == "win32", reason="a file with a hole in it needs another file system")
def test_a_file_larger_than_memory_is_read_at_both_ends(tmp_path):
    path, n = tmp_path / "text.npy", 1 << 39  # 1 TiB of tokens, nearly all of it a hole that takes no room
    save_tokens([7] * 5, path, 50_257)
    with path.open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (n,)})
        start = file.tell()
        try:
            file.truncate(start + 2 * n)
        except OSError:
            pytest.skip("this file system holds no file of 1 TiB")
        file.seek(-2, 2)
        file.write(np.uint16(9).tobytes())
    windows = token_windows(path, 4)
    assert isinstance(windows, TokenWindows) and len(windows) == (n - 1) // 4
    assert windows[0][0].tolist() == [7, 7, 7, 7]
    assert token_windows(path, 4, stride=n - 5)[1][1].tolist() == [0, 0, 0, 9]


@pytest.mark.parametrize("bad", [50, -1])
def test_an_id_beyond_the_vocabulary_is_not_saved(tmp_path, bad):
    with pytest.raises(ValueError, match=f"token ID {bad} is outside a vocabulary of 50"):
        save_tokens([1, 2, bad], tmp_path / "text.npy", 50, chunk=2)
    assert not list(tmp_path.iterdir())


def test_a_broken_stream_leaves_the_old_file_and_nothing_else(tmp_path):
    def broken():
        yield 1
        raise RuntimeError("the stream broke off")

    save_tokens([4, 5], tmp_path / "text.npy", 50)
    with pytest.raises(RuntimeError):
        save_tokens(broken(), tmp_path / "text.npy", 50)
    assert open_tokens(tmp_path / "text.npy").tolist() == [4, 5]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_text_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"0 tokens to write to text\.npy"):
        save_tokens([], tmp_path / "text.npy", 50)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_tokens(tmp_path):
    whole, path = tmp_path / "whole.npy", tmp_path / "text.npy"
    save_tokens(range(10), whole, 50)
    for content in (b"", b"Once upon a time", whole.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^text\.npy holds no tokens, or not all of them: write it with save"
        ):
            open_tokens(path)


# Documents in rows


@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6),
    max_seq_len=st.integers(1, 8),
)
def test_a_row_holds_one_document_and_padding(documents, max_seq_len):
    tokens = np.array([i for document in documents for i in [*document, 0]])
    rows = document_rows(tokens, max_seq_len, end_id=0)
    ids, targets = rows[np.arange(len(rows))]
    width = min(max_seq_len, max(map(len, documents)) + 1)
    assert len(rows) == len(documents) and ids.shape == targets.shape == (len(documents), width)
    for document, row, row_targets in zip(documents, ids.tolist(), targets.tolist(), strict=True):
        n_padding = max(0, width - len(document) - 1)
        assert row == [0, *document, *[0] * width][:width]
        assert row_targets == [*document, 0, *[-100] * n_padding][:width]


def test_a_single_row_and_a_batch_agree():
    rows = document_rows(torch.tensor([5, 6, 0, 7, 0]), 4, end_id=0)
    for i in (0, 1, -1):
        for one, batch in zip(rows[i], rows[[i]], strict=True):
            assert torch.equal(one, batch[0])


def test_document_batches_repeat_and_go_on():
    tokens = np.array([1, 0, 2, 0, 3, 0, 4, 0])
    whole = [ids[:, 1].tolist() for ids, _ in make_document_loader(tokens, 3, 2, 0, seed=3)]
    rest = [ids[:, 1].tolist() for ids, _ in make_document_loader(tokens, 3, 2, 0, seed=3, start=1)]
    assert sorted(i for batch in whole for i in batch) == [1, 2, 3, 4] and rest == whole[1:]


def test_a_text_without_an_end_has_no_documents():
    with pytest.raises(ValueError, match="0 documents end with the token 9"):
        document_rows(np.array([1, 2, 3]), 4, end_id=9)
