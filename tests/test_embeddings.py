"""Hold the embeddings to their formulas: pairs against a loop, the loss by hand, positions, word groups."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmlib import tales
from llmlib.embeddings import (
    InputEmbeddings,
    LearnedPositions,
    SinusoidalPositions,
    SkipGram,
    keep_probability,
    nearest,
    neighbor_purity,
    sinusoidal_positions,
    skip_gram_pairs,
    word2vec,
)
from llmlib.tokenization import WordTokenizer

POSITIONS = [LearnedPositions, SinusoidalPositions]


# ---- positions ----


def test_sinusoidal_positions_follow_the_formula():
    table = sinusoidal_positions(50, 6)
    for t in (0, 1, 7, 49):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@given(st.integers(1, 8), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_the_dot_product_of_two_positions_depends_on_their_distance_alone(half, a, distance, shift):
    table = sinusoidal_positions(a + distance + shift + 1, 2 * half)
    here = table[a] @ table[a + distance]
    there = table[a + shift] @ table[a + distance + shift]
    assert torch.allclose(here, there, atol=1e-4)


def test_far_positions_are_as_exact_as_near_ones():
    angle = 100_000 / 10_000 ** (2 / 6)
    assert sinusoidal_positions(100_001, 6)[100_000, 2] == pytest.approx(math.sin(angle), abs=1e-6)


def test_a_longer_table_begins_with_the_shorter_one():
    assert torch.equal(sinusoidal_positions(100, 8)[:10], sinusoidal_positions(10, 8))


def test_an_odd_width_has_no_sinusoidal_positions():
    with pytest.raises(ValueError, match="d_model=5 is odd: sine and cosine come in pairs"):
        sinusoidal_positions(4, 5)


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_can_be_exchanged(kind):
    positions = kind(10, 4)
    assert torch.equal(positions(torch.tensor([3, 0])), positions.weight[[3, 0]])
    per_row = positions(torch.tensor([[0, 1], [5, 6]]))  # a batch whose rows start at different places
    assert per_row.shape == (2, 2, 4)
    assert torch.equal(per_row[1], positions.weight[5:7])


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_text_longer_than_the_table_names_both_numbers(kind):
    emb = InputEmbeddings(7, 4, kind(8, 4))
    with pytest.raises(ValueError, match=r"positions 0 to 8 don't fit into max_seq_len=8: shorten the text"):
        emb(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions 6 to 9 don't fit"):
        emb(torch.zeros(4, dtype=torch.int64), start=6)


def test_learned_positions_have_parameters_and_fixed_ones_have_none():
    assert [name for name, _ in LearnedPositions(8, 4).named_parameters()] == ["weight"]
    fixed = SinusoidalPositions(8, 4)
    assert not list(fixed.parameters()) and not fixed.state_dict()
    assert fixed.double().weight.dtype == torch.float64  # it moves with the model


# ---- input embeddings ----


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2, 5)])
def test_input_embeddings_are_token_plus_position(kind, shape):
    emb = InputEmbeddings(11, 4, kind(8, 4))
    ids = torch.randint(11, shape)
    x = emb(ids, start=2)
    assert x.shape == (*shape, 4)
    for t in range(5):
        assert torch.allclose(x[..., t, :], emb.tok_emb.weight[ids[..., t]] + emb.pos_emb.weight[2 + t])


def test_input_embeddings_continue_where_the_cache_ends():
    emb = InputEmbeddings(11, 4, LearnedPositions(8, 4))
    ids = torch.randint(11, (2, 6))
    assert torch.equal(torch.cat([emb(ids[:, :4]), emb(ids[:, 4:], start=4)], dim=1), emb(ids))


def test_a_look_up_equals_one_hot_times_table_with_the_same_gradients():
    emb = nn.Embedding(6, 3)
    ids = torch.tensor([[1, 5, 1], [0, 1, 2]])
    weights = torch.randn(2, 3, 3)
    table = emb.weight.detach().clone().requires_grad_()
    (emb(ids) * weights).sum().backward()
    product = F.one_hot(ids, 6).float() @ table
    (product * weights).sum().backward()
    assert torch.equal(emb(ids), product)
    assert torch.allclose(emb.weight.grad, table.grad)


# ---- word2vec ----


def pairs_by_loop(documents, window):
    return sorted(
        (center, document[j])
        for document in documents
        for i, center in enumerate(document)
        for j in range(max(0, i - window), min(len(document), i + window + 1))
        if j != i
    )


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=5), st.integers(1, 12))
def test_pairs_equal_those_of_a_loop_and_stay_within_documents(documents, window):
    tokens = torch.tensor([i for d in documents for i in d], dtype=torch.int64)
    document_ids = torch.tensor([n for n, d in enumerate(documents) for _ in d], dtype=torch.int64)
    pairs = skip_gram_pairs(tokens, document_ids, window)
    assert sorted(map(tuple, pairs.tolist())) == pairs_by_loop(documents, window)


def test_a_frequent_word_keeps_few_of_its_copies_and_a_rare_one_all():
    kept = keep_probability(torch.tensor([900, 99, 1, 0]), 0.01)
    assert kept.tolist() == pytest.approx([math.sqrt(0.01 / 0.9), math.sqrt(0.01 / 0.099), 1.0, 1.0])


def test_the_loss_is_the_one_of_the_paper():
    model = SkipGram(5, 2)
    nn.init.normal_(model.context_emb.weight)
    loss = model(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4, 3], [0, 0]]))
    center, context = model.tok_emb.weight.tolist(), model.context_emb.weight.tolist()

    def log_sigmoid(c, o, sign):
        return -math.log(1 + math.exp(-sign * sum(a * b for a, b in zip(center[c], context[o], strict=True))))

    rows = [(0, 2, (4, 3)), (1, 3, (0, 0))]
    by_hand = [-log_sigmoid(c, o, 1) - sum(log_sigmoid(c, k, -1) for k in ks) for c, o, ks in rows]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_at_the_start_every_pair_is_a_coin_toss():
    loss = SkipGram(5, 2)(torch.tensor([0]), torch.tensor([1]), torch.tensor([[2, 3, 4]]))
    assert loss.item() == pytest.approx(4 * math.log(2))


def test_words_of_the_same_surroundings_end_close_and_a_seed_repeats_them():
    # Words 0 to 3 stand among 8 and 9, words 4 to 7 among 10 and 11.
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(3000):
        side = int(torch.randint(2, (), generator=generator))
        word = 4 * side + int(torch.randint(4, (), generator=generator))
        documents.append([8 + 2 * side, word, 9 + 2 * side])

    def learn(seed):
        return word2vec(documents, 12, d_model=8, batch_size=64, threshold=1.0, seed=seed, progress=False)

    vectors = learn(0)
    assert torch.equal(vectors, learn(0))
    assert not torch.equal(vectors, learn(1))
    labels = torch.tensor([0] * 4 + [1] * 4)
    assert neighbor_purity(vectors[:8], labels, 3).min() == 1


def test_word2vec_finds_the_categories_of_the_tales():
    stories = [story.lower() for story in tales.tales(1500, seed=4)]
    tokenizer = WordTokenizer(" ".join(stories))
    vectors = word2vec([tokenizer.encode(s) for s in stories], len(tokenizer.vocab), progress=False)
    lists = tales.categories()
    groups = [set(lists["animal"]), set(lists["food"]), {name.lower() for name in lists["child"]}]
    words = [(w, n) for n, group in enumerate(groups) for w in sorted(group) if w in tokenizer.vocab]
    rows = torch.tensor([tokenizer.vocab[w] for w, _ in words])
    labels = torch.tensor([n for _, n in words])
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    assert neighbor_purity(vectors[rows], labels, 10).mean() > 0.8
    assert neighbor_purity(noise[rows], labels, 10).mean() < 0.55


@pytest.mark.parametrize("documents", [[], [[]], [[3], [4]]])
def test_a_text_without_pairs_is_refused(documents):
    n_words = sum(map(len, documents))
    with pytest.raises(ValueError, match=re.escape(f"no pair of words in {n_words} words")):
        word2vec(documents, 5, progress=False)


# ---- neighbors ----


def test_nearest_ranks_by_angle_and_not_by_length():
    vectors = torch.tensor([[0.0, 1.0], [100.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    similarities, rows = nearest(vectors, torch.tensor([1.0, 0.0]), 3)
    assert rows.tolist() == [1, 2, 0]
    assert similarities.tolist() == pytest.approx([1.0, 1 / math.sqrt(1.01), 0.0])


def test_purity_counts_the_neighbors_of_the_own_kind_without_oneself():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.2], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert neighbor_purity(vectors, labels, 1).tolist() == [1, 1, 0, 0]
    assert neighbor_purity(vectors, labels, 2).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_purity_needs_neighbors(k):
    with pytest.raises(ValueError, match=f"k={k} neighbors among 4 vectors: choose k from 1 to 3"):
        neighbor_purity(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), k)
