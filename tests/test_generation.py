import copy
import itertools
import math
import re
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlib import generation
from llmlib.generation import (
    KVCache,
    beam_search,
    distribution,
    draw,
    for_inference,
    generate,
    last_logits,
    make_caches,
    min_p,
    pad_left,
    repetition_penalty,
    speculative,
    stream,
    stream_text,
    temperature,
    top_k,
    top_p,
    verify,
)
from llmlib.gpt import GPT, GPTConfig, greedy
from llmlib.llama import LlamaConfig
from llmlib.tokenization import train_bpe

SIZES = dict(vocab_size=17, max_seq_len=12, d_model=16, n_layers=2, n_heads=4)
GREEDY = [temperature(0.0)]


def lively(config: GPTConfig, seed: int = 0) -> GPT:
    """Make a model whose weights are large enough for each token to matter."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.4, generator=generator)
    return model


MODELS = {
    "GPT-2": lively(GPTConfig(**SIZES)),
    "Llama": lively(LlamaConfig(**SIZES, n_kv_heads=2)),
}
both = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


def random_ids(*shape: int, vocab_size: int = 17) -> torch.Tensor:
    return torch.randint(vocab_size, shape)


def probabilities(row: list[float], *strategies, ids: list[int] = (0,)) -> list[float]:
    return distribution(torch.tensor([row]), torch.tensor([list(ids)]), strategies)[0].tolist()


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x - max(row)) for x in row]
    return [x / sum(exps) for x in exps]


def keep(row: list[float], kept: set[int]) -> list[float]:
    """Return the softmax over the kept tokens, 0 for all others."""
    return softmax([x if i in kept else -math.inf for i, x in enumerate(row)])


# Strategies


@given(logit_rows)
def test_without_a_strategy_the_distribution_is_the_softmax(row):
    assert probabilities(row) == pytest.approx(softmax(row), abs=1e-6)


@given(logit_rows, st.floats(0.1, 10))
def test_temperature_divides(row, t):
    assert probabilities(row, temperature(t)) == pytest.approx(softmax([x / t for x in row]), abs=1e-5)


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=1, max_size=40))
def test_temperature_zero_keeps_the_first_of_the_likeliest(row):
    expected = [0.0] * len(row)
    expected[row.index(max(row))] = 1.0
    assert probabilities(row, temperature(0.0)) == expected


@given(logit_rows, st.integers(1, 15))
def test_top_k_keeps_the_k_largest(row, k):
    p = probabilities(row, top_k(k))
    kept = {i for i, x in enumerate(p) if x > 0}
    assert len(kept) == min(k, len(row))
    assert sorted(row[i] for i in kept) == sorted(row)[-k:]
    assert p == pytest.approx(keep(row, kept), abs=1e-6)


@given(logit_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(row, share):
    p = probabilities(row, top_p(share))
    kept = {i for i, x in enumerate(p) if x > 0}
    before = softmax(row)
    masses = sorted((before[i] for i in kept), reverse=True)
    assert sorted(row[i] for i in kept) == sorted(row)[-len(kept) :]
    assert sum(masses) >= share - 1e-5
    assert sum(masses[:-1]) < share + 1e-5
    assert p == pytest.approx(keep(row, kept), abs=1e-5)


def test_top_p_on_exact_shares():
    row = [math.log(x) for x in (0.1, 0.5, 0.15, 0.25)]
    assert probabilities(row, top_p(0.3)) == [0, 1, 0, 0]
    assert probabilities(row, top_p(0.6)) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probabilities(row, top_p(0.8)) == pytest.approx([0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9])


def test_top_p_of_equals_keeps_no_more_than_it_needs():
    assert sum(x > 0 for x in probabilities([0.0] * 8, top_p(0.5))) == 4


def test_top_p_of_one_keeps_all():
    row = torch.linspace(0, -80, 5000).tolist()
    assert probabilities(row, top_p(1.0)) == probabilities(row)


@given(logit_rows, st.floats(0, 1))
def test_min_p_keeps_what_is_a_share_of_the_likeliest(row, share):
    p = probabilities(row, min_p(share))
    before = softmax(row)
    for x, kept in zip(before, p, strict=True):
        if abs(x - share * max(before)) > 1e-6:
            assert (kept > 0) == (x > share * max(before))
    assert p == pytest.approx(keep(row, {i for i, x in enumerate(p) if x > 0}), abs=1e-5)


def test_min_p_of_one_keeps_ties():
    assert probabilities([1.0, 3.0, 3.0, 2.0], min_p(1.0)) == [0, 0.5, 0.5, 0]


@given(logit_rows, st.floats(0.5, 3), st.data())
def test_repetition_penalty_makes_seen_tokens_less_likely(row, penalty, data):
    ids = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1))
    expected = [(x / penalty if x > 0 else x * penalty) if i in ids else x for i, x in enumerate(row)]
    assert probabilities(row, repetition_penalty(penalty), ids=ids) == pytest.approx(
        softmax(expected), abs=1e-5
    )


@given(logit_rows, st.data())
def test_any_composition_is_a_distribution(row, data):
    made = st.one_of(
        st.builds(temperature, st.floats(0.05, 5) | st.just(0.0)),
        st.builds(top_k, st.integers(1, 20)),
        st.builds(top_p, st.floats(0.01, 1)),
        st.builds(min_p, st.floats(0, 1)),
        st.builds(repetition_penalty, st.floats(0.5, 2)),
    )
    p = probabilities(row, *data.draw(st.lists(made, max_size=5)))
    assert sum(p) == pytest.approx(1, abs=1e-5)
    assert min(p) >= 0


def test_strategies_apply_in_turn():
    row = [math.log(x) for x in (0.5, 0.3, 0.2)]
    assert probabilities(row, top_k(2), top_p(0.6)) == [1, 0, 0]  # 0.5 / 0.8 is enough
    assert probabilities(row, top_p(0.6), top_k(2)) == pytest.approx([5 / 8, 3 / 8, 0])


def test_strategies_treat_each_row_alone():
    logits, ids = torch.randn(3, 9), random_ids(3, 4, vocab_size=9)
    strategies = [repetition_penalty(1.5), temperature(0.7), top_k(6), top_p(0.8), min_p(0.1)]
    for i in range(3):
        alone = distribution(logits[i : i + 1], ids[i : i + 1], strategies)
        torch.testing.assert_close(distribution(logits, ids, strategies)[i : i + 1], alone)


def test_a_new_strategy_is_a_function():
    def never(banned):
        return lambda logits, ids: logits.index_fill(-1, torch.tensor(banned), -math.inf)

    ids = generate(MODELS["GPT-2"], torch.tensor([[3]]), 40, [never(list(range(15)))])
    assert set(ids[0, 1:].tolist()) == {15, 16}


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.7, 0.0], [0.3, 0.0, 0.2, 0.4, 0.1, 0.0]])
    tokens = torch.cat([draw(p, torch.Generator().manual_seed(i)) for i in range(4000)], dim=1)  # (2, 4000)
    for row, expected in zip(tokens, p, strict=True):
        assert p_value(row.bincount(minlength=6), 4000 * expected) > 0.001


@pytest.mark.parametrize(("chance", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_least_and_the_greatest_random_number_draw_what_is_possible(monkeypatch, chance, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, chance))
    p = torch.tensor([[0.0, 0.3, 0.4, 0.3, 0.0]])
    for total in (1 - 2e-7, 1.0, 1 + 2e-7):  # a softmax may round to each
        assert draw(p * total).tolist() == [[token]]


# The cache


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(list(MODELS.values())),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) <= 18),
    padding=st.none() | st.lists(st.integers(0, 5), min_size=2, max_size=2),
    data=st.data(),
)
@torch.no_grad()
def test_chunks_of_any_size_give_the_logits_of_the_whole(model, chunks, padding, data):
    """Beyond the window of 12 too, where the whole is the last 12 tokens."""
    T = sum(chunks)
    ids, caches = random_ids(2, T), make_caches(model)
    padding = None if padding is None else torch.tensor(padding).clamp(max=chunks[0] - 1)
    end = 0
    for size in chunks:
        end += size
        n_last = data.draw(st.integers(1, size))
        logits = last_logits(model, ids[:, :end], caches, padding, n_last)
        n_lost = max(0, end - 12)
        shifted = None if padding is None else (padding - n_lost).clamp(min=0)
        whole = model(ids[:, n_lost:end], padding=shifted)[:, -n_last:]
        torch.testing.assert_close(logits, whole, atol=2e-5, rtol=2e-5)


@both
@torch.no_grad()
def test_what_the_cache_holds_is_not_read_again(model):
    ids, caches = random_ids(1, 8), make_caches(model)
    first = last_logits(model, ids, caches)
    ids[0, :7] = 0
    caches[0].n_tokens = caches[1].n_tokens = 7
    torch.testing.assert_close(last_logits(model, ids, caches), first)


@both
@torch.no_grad()
def test_only_the_last_logits_are_computed(model):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda head, args, y: shapes.append(y.shape))
    generate(model, random_ids(2, 6), 3)
    handle.remove()
    assert shapes == [(2, 1, 17)] * 3


@both
def test_the_memory_is_laid_out_once_and_no_longer_than_needed(model):
    caches, k = make_caches(model, 10), model.blocks[0].attn.k_proj
    addresses = set()
    for end in range(4, 10):
        with torch.no_grad():
            last_logits(model, random_ids(3, end), caches)
        addresses.add(caches[1].k.data_ptr())
    assert len(addresses) == 1
    assert caches[1].v.shape == (3, k.out_features // 4, 10, 4)
    assert make_caches(model, 99)[0].max_seq_len == make_caches(model)[0].max_seq_len == 12


@both
@torch.no_grad()
def test_rows_of_a_cache_can_be_selected(model):
    ids, caches, rows = random_ids(3, 5), make_caches(model), torch.tensor([2, 0, 0, 1])
    last_logits(model, ids, caches)
    for cache in caches:
        cache.select(rows)
    ids = torch.cat([ids[rows], random_ids(4, 1)], dim=1)
    torch.testing.assert_close(last_logits(model, ids, caches), model(ids)[:, -1:])


@pytest.mark.parametrize("precision", ["bfloat16", "autocast", "float64"])
@both
def test_the_cache_has_the_type_of_the_keys(model, precision):
    model = lively(model.config)
    if precision != "autocast":
        model = model.to(getattr(torch, precision))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ids, caches = random_ids(2, 8), make_caches(model)
        whole = model(ids)
        steps = [last_logits(model, ids[:, :end], caches) for end in range(1, 9)]
        generate(model, ids, 6)
    assert caches[0].k.dtype == (torch.float64 if precision == "float64" else torch.bfloat16)
    assert (torch.cat(steps, dim=1) - whole).norm() < 0.05 * whole.norm()


# Generating


def draw_one_by_one(model, ids, n_tokens, strategies, generator):
    """Read the whole text again for each token."""
    for _ in range(n_tokens):
        logits = model(ids[:, -12:])[:, -1]
        token = draw(distribution(logits, ids, strategies), generator)
        ids = torch.cat([ids, token], dim=1)
    return ids


@pytest.mark.parametrize("T", [1, 5, 12, 15])
@both
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(model, T):
    ids, strategies = random_ids(2, T), [repetition_penalty(1.2), temperature(0.8), top_p(0.9)]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = draw_one_by_one(model, ids, 14, strategies, generators[0])
    assert generate(model, ids, 14, strategies, generator=generators[1]).equal(expected)


@both
def test_temperature_zero_is_greedy(model):
    ids = random_ids(3, 4)
    assert generate(model, ids, 15, GREEDY).equal(greedy(model, ids, 15))


@both
def test_prompts_of_unequal_length_share_a_batch(model):
    """Through and beyond the window of 12."""
    prompts = [random_ids(n).tolist() for n in (1, 6, 3, 6)]
    ids, padding = pad_left(prompts, pad_id=0)
    strategies = [repetition_penalty(1.3), temperature(0.0)]
    together = generate(model, ids, 12, strategies, padding=padding)
    assert together[:, :6].equal(ids)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, torch.tensor([prompt]), 12, strategies)
        assert row[6 - len(prompt) :].equal(alone[0])


def test_pad_left():
    ids, padding = pad_left([[4, 5, 6], [7]], pad_id=9)
    assert ids.tolist() == [[4, 5, 6], [9, 9, 7]]
    assert padding.tolist() == [0, 2]


def test_what_stands_in_the_padding_does_not_matter():
    model, strategies = MODELS["GPT-2"], [repetition_penalty(3.0), temperature(0.0)]
    rows = [
        generate(model, pad_left([[4, 5, 6], [7]], pad_id=i)[0], 8, strategies, padding=torch.tensor([0, 2]))
        for i in range(17)
    ]
    assert all(row[:, 3:].equal(rows[0][:, 3:]) for row in rows)


def test_a_row_that_stops_waits_for_the_others():
    model, ids = MODELS["Llama"], torch.tensor([[1], [2], [3]])
    free = generate(model, ids, 10, generator=torch.Generator().manual_seed(5))[:, 1:]
    stop_ids = {int(free[0, 2]), int(free[1, 4]), int(free[2, 3])}
    stopped = generate(model, ids, 10, stop_ids=stop_ids, generator=torch.Generator().manual_seed(5))[:, 1:]
    lengths = []
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        n = next(i for i, token in enumerate(expected) if token in stop_ids)
        assert row[: n + 1] == expected[: n + 1]
        assert set(row[n:]) == {expected[n]}
        lengths.append(n + 1)
    assert stopped.shape[1] == max(lengths) < 10
    assert min(lengths) < max(lengths)


def test_tokens_come_one_by_one():
    model, n_calls = MODELS["GPT-2"], []
    handle = model.lm_head.register_forward_hook(lambda *_: n_calls.append(1))
    tokens = stream(model, random_ids(2, 3), 5)
    assert next(tokens).shape == (2,)
    assert len(n_calls) == 1
    handle.remove()


def test_the_mode_of_the_model_stays():
    model = lively(GPTConfig(**SIZES))
    generate(model.train(), random_ids(1, 2), 2)  # without dropout there is no difference
    assert model.training
    generate(model.eval(), random_ids(1, 2), 2)
    assert not model.training


# A copy for inference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("Config", [GPTConfig, LlamaConfig])
@torch.no_grad()
def test_the_copy_for_inference_is_the_model_but_for_rounding(Config, bias):
    """In chunks of any size, with padding too."""
    model = lively(Config(**SIZES, bias=bias))
    fast, ids, padding = for_inference(model), random_ids(2, 12), torch.tensor([0, 3])
    torch.testing.assert_close(fast(ids), model(ids), atol=1e-5, rtol=1e-5)
    for sizes in ([12], [4, 1, 1, 3, 2, 1]):
        caches, ends = make_caches(fast), itertools.accumulate(sizes)
        chunks = [
            last_logits(fast, ids[:, :end], caches, padding, n) for n, end in zip(sizes, ends, strict=True)
        ]
        whole = model(ids, padding=padding)
        torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("Config", [GPTConfig, LlamaConfig])
@torch.no_grad()
def test_one_text_token_by_token_is_the_model_but_for_rounding(monkeypatch, Config, bias, dtype, packed):
    """With oneDNN's products in bfloat16, and where PyTorch lacks them."""
    if not packed:
        monkeypatch.setattr(generation, "_has_packed_products", lambda: False)
    model = lively(Config(**SIZES, bias=bias)).to(dtype)
    for norm in (model.blocks[0].attn_norm, model.blocks[1].ffn_norm):
        norm.weight.normal_()
    fast, ids = for_inference(model), random_ids(1, 12)
    has_packed = packed and dtype == torch.bfloat16 and generation._has_packed_products()
    assert (fast.lm_head.packed is not None) == has_packed
    steps = []
    caches = make_caches(fast)
    for n, end in zip([4, 1, 1, 3, 2, 1], [4, 5, 6, 9, 11, 12], strict=True):
        steps.append(last_logits(fast, ids[:, :end], caches, n_last=n))
    found, whole = torch.cat(steps, dim=1), model(ids)
    assert found.dtype == dtype
    assert (found - whole).norm() < (0.05 if dtype == torch.bfloat16 else 1e-5) * whole.norm()
    assert copy.deepcopy(fast)(ids).equal(fast(ids))


@both
def test_the_copy_for_inference_writes_the_same(model):
    """Beyond the window of 12 too, and where few key heads serve all queries."""
    fast, ids, strategies = (
        for_inference(model),
        random_ids(3, 4),
        [repetition_penalty(1.2), temperature(0.0)],
    )
    assert generate(fast, ids, 15, strategies).equal(generate(model, ids, 15, strategies))
    found, expected = (beam_search(m, ids[0], 6, 3) for m in (fast, model))
    assert [text.tolist() for text, _ in found] == [text.tolist() for text, _ in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@both
@torch.no_grad()
def test_the_copy_for_inference_has_the_type_of_the_model(model, dtype):
    model, ids = lively(model.config).to(dtype), random_ids(2, 8)
    logits, expected = for_inference(model)(ids), model(ids)
    assert logits.dtype == dtype
    assert (logits - expected).norm() < (0.05 if dtype == torch.bfloat16 else 1e-6) * expected.norm()


@torch.no_grad()
def test_the_copy_for_inference_keeps_the_frequencies_of_each_block():
    model, ids = lively(MODELS["Llama"].config), random_ids(1, 8)
    model.blocks[1].attn.positions.frequencies = torch.tensor([0.3, 0.02])
    torch.testing.assert_close(for_inference(model)(ids), model(ids), atol=1e-5, rtol=1e-5)


@both
def test_the_copy_for_inference_leaves_the_model_as_it_is(model):
    model = lively(replace(model.config, dropout=0.1)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fast = for_inference(model)
    assert not fast.training
    assert not any(weight.requires_grad for weight in fast.parameters())
    for weight in fast.parameters():
        weight.data.zero_()
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())


def test_float32_weights_lie_column_by_column():
    model = MODELS["Llama"]
    for fast, columns in (
        (for_inference(model), True),
        (for_inference(lively(model.config).bfloat16()), False),
    ):
        weights = [layer.weight for layer in fast.modules() if isinstance(layer, nn.Linear)]
        assert len(weights) == 4 * len(model.blocks) + 1
        assert all(weight.T.is_contiguous() == columns for weight in weights)


# Text

TOKENIZER = train_bpe("Mira ran. Mira ran to the den. " * 3, 270, ["<|end|>"])
END, N_TOKENS = TOKENIZER.special_tokens["<|end|>"], TOKENIZER.vocab_size
WRITER = lively(GPTConfig(vocab_size=N_TOKENS, max_seq_len=48, d_model=8, n_layers=1, n_heads=2))


def script(ids, n_prompt):
    """Write these tokens, whatever the model says."""
    return lambda logits, text: generation._only(logits, torch.tensor([[ids[text.shape[1] - n_prompt]]]))


def pieces(new_ids, n_tokens=None, prompt="Mira", **options):
    n_prompt = len(TOKENIZER.encode(prompt, options.get("allowed_special", ())))
    strategies = [script(new_ids, n_prompt)]
    return list(stream_text(WRITER, TOKENIZER, prompt, n_tokens or len(new_ids), strategies, **options))


def test_pieces_of_text_are_whole_characters():
    text = " ran. 🦊🐻 Ærø 你好"
    ids = TOKENIZER.encode(text)
    assert "�" in TOKENIZER.decode(ids[:-1])  # so that there is something to hold back
    assert len(ids) > len(pieces(ids)) > 3
    assert "".join(pieces(ids)) == text
    assert pieces(ids)[-1] == "好"
    assert not any("�" in piece for piece in pieces(ids))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 259), min_size=1, max_size=20))
def test_any_tokens_give_the_text_that_the_tokenizer_gives(ids):
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_the_stop_token_is_not_shown():
    ids = [*TOKENIZER.encode(" ran."), END, *TOKENIZER.encode(" Mira")]
    assert "".join(pieces(ids, stop_ids=[END])) == " ran."
    assert "".join(pieces(ids)) == " ran.<|end|> Mira"


def test_a_character_that_never_ends_is_shown_as_such():
    ids = [*TOKENIZER.encode("好")[:1], END]
    assert pieces(ids, stop_ids=[END]) == ["�"]


def test_a_prompt_may_hold_special_tokens():
    assert "".join(pieces([65], prompt="<|end|>", allowed_special="all")) == "A"


def test_text_comes_from_the_model():
    prompt = torch.tensor([TOKENIZER.encode("Mira ran")])
    ids = generate(WRITER, prompt, 9, generator=torch.Generator().manual_seed(3))[0, prompt.shape[1] :]
    text = stream_text(WRITER, TOKENIZER, "Mira ran", 9, generator=torch.Generator().manual_seed(3))
    assert "".join(text) == TOKENIZER.decode(ids.tolist())


# Beam search


@both
def test_one_beam_is_greedy(model):
    ids = random_ids(5)
    [(beam, log_p)] = beam_search(model, ids, 10, 1)
    assert beam.equal(greedy(model, ids[None], 10)[0])
    assert log_p == pytest.approx(log_probability(model, beam, 5), abs=1e-4)


@torch.no_grad()
def log_probability(model, ids, n_prompt):
    """Add up log p of the tokens after the prompt."""
    return sum(
        model(ids[None, max(0, i - 12) : i])[0, -1].log_softmax(-1)[ids[i]].item()
        for i in range(n_prompt, len(ids))
    )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("stop_ids", [[], [1]])
@pytest.mark.parametrize("Config", [GPTConfig, LlamaConfig])
def test_beams_for_all_texts_are_an_exhaustive_search(Config, stop_ids, length_penalty):
    model, prompt = lively(Config(**SIZES | dict(vocab_size=4))), [2, 0]
    texts = set()
    for text in itertools.product(range(4), repeat=3):
        n = next((i + 1 for i, token in enumerate(text) if token in stop_ids), 3)
        texts.add(text[:n])
    expected = {text: log_probability(model, torch.tensor([*prompt, *text]), 2) for text in texts}
    order = sorted(expected, key=lambda text: -expected[text] / len(text) ** length_penalty)
    found = beam_search(
        model, torch.tensor(prompt), 3, 4**3, stop_ids=stop_ids, length_penalty=length_penalty
    )
    assert [tuple(ids[2:].tolist()) for ids, _ in found] == order
    assert [log_p for _, log_p in found] == pytest.approx([expected[text] for text in order], abs=1e-4)


@both
def test_a_beam_holds_what_a_loop_without_cache_finds(model):
    """Beyond the window of 12 too."""
    ids = random_ids(8)
    beams = [(ids.tolist(), 0.0)]
    for _ in range(7):
        with torch.no_grad():
            log_p = [model(torch.tensor([text[-12:]]))[0, -1].log_softmax(-1).tolist() for text, _ in beams]
        longer = [
            ([*text, i], p + row[i]) for (text, p), row in zip(beams, log_p, strict=True) for i in range(17)
        ]
        beams = sorted(longer, key=lambda beam: -beam[1])[:3]
    found = beam_search(model, ids, 7, 3)
    assert [text.tolist() for text, _ in found] == [text for text, _ in beams]
    assert [p for _, p in found] == pytest.approx([p for _, p in beams], abs=1e-4)


def test_one_beam_that_stops_ends_the_search():
    model, ids = MODELS["GPT-2"], torch.tensor([3])
    text = greedy(model, ids[None], 8)[0].tolist()
    [(beam, _)] = beam_search(model, ids, 8, 1, stop_ids=[text[4]])
    assert beam.tolist() == text[: text.index(text[4], 1) + 1]


# Speculative decoding

SMALL = dict(vocab_size=5, max_seq_len=8, d_model=8, n_layers=1, n_heads=2)
TARGET, DRAFT = lively(GPTConfig(**SMALL), 1), lively(LlamaConfig(**SMALL), 2)
CHOICES = {
    "as it is": [],
    "temperature": [temperature(1.7)],
    "top_k": [repetition_penalty(1.5), temperature(0.8), top_k(3)],
}


def p_value(counts, expected) -> float:
    """Return the chance of counts that are as far from the expected ones, in the chi-squared test."""
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    chi_squared = ((counts - expected)[possible].square() / expected[possible]).sum()
    return torch.special.gammaincc((possible.sum() - 1) / 2, chi_squared / 2).item()


@torch.no_grad()
def pair_p_value(strategies, n_draws=1000) -> float:
    """Compare the first two tokens of many speculative texts with their exact distribution."""
    ids, generator, counts = torch.tensor([[1, 3]]), torch.Generator().manual_seed(0), torch.zeros(25)
    for _ in range(n_draws):
        tokens = []
        for block in speculative(TARGET, DRAFT, ids, 3, 2, strategies, generator=generator):
            tokens += block.tolist()
            if len(tokens) >= 2:
                break
        counts[5 * tokens[0] + tokens[1]] += 1
    first = distribution(TARGET(ids)[:, -1], ids, strategies)[0]
    longer = torch.cat([ids.expand(5, 2), torch.arange(5)[:, None]], dim=1)
    second = distribution(TARGET(longer)[:, -1], longer, strategies)
    return p_value(counts, n_draws * (first[:, None] * second).flatten())


@pytest.fixture
def no_shape_checks():
    """Draw often: with the checks of tests/conftest.py, a draw takes four times as long."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("strategies", CHOICES.values(), ids=CHOICES)
def test_speculative_texts_are_distributed_as_plain_ones(strategies):
    assert pair_p_value(strategies) > 0.001


@pytest.mark.usefixtures("no_shape_checks")
def test_the_comparison_notices_a_wrong_acceptance(monkeypatch):
    monkeypatch.setattr(
        generation, "verify", lambda drafts, q, p, generator: verify(drafts, p[:-1], p, generator)
    )
    assert pair_p_value([], n_draws=300) < 1e-6


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("wrong", ["", "keeps all", "draws anew from p", "draws anew from q"])
def test_verified_tokens_are_drawn_from_p(wrong):
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
    q = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.2, 0.6]])
    n_draws, counts = 4000, torch.zeros(3, 3)
    for drafts in torch.multinomial(q, n_draws, replacement=True, generator=generator).T:
        tokens = verify(drafts, q, p, generator)
        n_kept = len(tokens) - 1
        if wrong == "keeps all":
            tokens = torch.cat([drafts, tokens[:1]])
        elif wrong and n_kept < 2:
            source = p if wrong == "draws anew from p" else q
            tokens[-1] = torch.multinomial(source[n_kept], 1, generator=generator)
        counts[
            tokens[0], tokens[1] if len(tokens) > 1 else torch.multinomial(p[1], 1, generator=generator)
        ] += 1
    expected = n_draws * p[0][:, None] * p[1]
    assert (p_value(counts.flatten(), expected.flatten()) > 0.001) == (not wrong)


def test_equal_models_accept_every_draft():
    blocks = list(speculative(TARGET, TARGET, torch.tensor([[1]]), 7, 3, [temperature(0.9)]))
    assert [len(block) for block in blocks] == [4, 3]


def test_drafts_are_accepted_as_often_as_the_distributions_overlap():
    p, q = torch.tensor([[0.1, 0.2, 0.7]] * 2), torch.tensor([[0.4, 0.4, 0.2]])
    drafts = torch.multinomial(q[0], 4000, replacement=True)
    n_kept = sum(len(verify(draft[None], q, p)) - 1 for draft in drafts)
    assert n_kept / 4000 == pytest.approx(0.1 + 0.2 + 0.2, abs=0.04)  # 5 deviations


@pytest.mark.parametrize("n_draft", [1, 3, 20])
@pytest.mark.parametrize("draft_window", [6, 12, 40])
@both
def test_greedy_speculative_is_greedy(model, draft_window, n_draft):
    """Through and beyond the window of both models, with a draft that is often right, and one seldom."""
    ids = random_ids(1, 3)
    strategies = [repetition_penalty(1.3), temperature(0.0)]
    for seed, n_layers in [(0, 2), (1, 1)]:
        draft = lively(replace(model.config, max_seq_len=draft_window, n_layers=n_layers), seed)
        blocks = list(speculative(model, draft, ids, 16, n_draft, GREEDY))
        assert torch.cat(blocks).equal(greedy(model, ids, 16)[0, 3:])
        fresh = torch.cat(list(speculative(model, draft, ids, 16, n_draft, strategies)))
        assert fresh.equal(generate(model, ids, 16, strategies)[0, 3:])
        assert max(map(len, blocks)) <= n_draft + 1


def test_accepted_drafts_save_calls_and_both_caches_roll_back():
    model, n_read = MODELS["Llama"], []
    handle = model.embeddings.register_forward_hook(lambda layer, args, y: n_read.append(y.shape[1]))
    draft = lively(model.config, seed=0)
    blocks = list(speculative(model, draft, torch.tensor([[3, 4]]), 9, 2, GREEDY))
    handle.remove()
    assert [len(block) for block in blocks] == [3, 3, 3]
    assert n_read == [4, 3, 3]


# Errors


@pytest.mark.parametrize("t", [-0.1, math.nan, math.inf])
def test_a_temperature_that_is_none(t):
    with pytest.raises(ValueError, match=f"temperature must be a number from 0 up, got {t}"):
        temperature(t)


def test_top_k_of_nothing():
    with pytest.raises(ValueError, match="top_k must keep at least 1 token, got 0"):
        top_k(0)


@pytest.mark.parametrize("p", [0.0, 1.1, math.nan])
def test_top_p_beyond_its_range(p):
    with pytest.raises(ValueError, match=f"top_p must be a probability above 0, up to 1, got {p}"):
        top_p(p)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_min_p_beyond_its_range(p):
    with pytest.raises(ValueError, match=f"min_p must be a share from 0 to 1, got {p}"):
        min_p(p)


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan])
def test_a_repetition_penalty_that_is_none(penalty):
    with pytest.raises(ValueError, match=f"a repetition penalty must be a number above 0, got {penalty}"):
        repetition_penalty(penalty)


def test_a_cache_that_is_full():
    cache = KVCache(4)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="5 tokens don't fit into a cache of max_seq_len=4: make it longer"):
        cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("prompts", [[], [[1, 2], []]])
def test_prompts_that_are_empty(prompts):
    message = f"prompts of {[len(prompt) for prompt in prompts]} tokens: give at least one prompt"
    with pytest.raises(ValueError, match=re.escape(message)):
        pad_left(prompts, 0)


def test_a_row_of_padding_alone():
    with pytest.raises(ValueError, match=re.escape("padding [1, 3] leaves no token of 3 in some row")):
        generate(MODELS["GPT-2"], random_ids(2, 3), 2, padding=torch.tensor([1, 3]))


WRITERS = {
    "generate": lambda model, ids, n: generate(model, ids, n),
    "stream_text": lambda model, ids, n: list(
        stream_text(model, TOKENIZER, TOKENIZER.decode(ids[0].tolist()), n)
    ),
    "beam_search": lambda model, ids, n: beam_search(model, ids[0], n, 2),
    "speculative": lambda model, ids, n: list(speculative(model, WRITER, ids, n, 2)),
}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@each_writer
def test_no_token_to_write(write):
    with pytest.raises(ValueError, match="n_tokens must be at least 1, got 0"):
        write(WRITER, torch.tensor([[65]]), 0)


@each_writer
def test_a_prompt_that_is_empty(write):
    with pytest.raises(ValueError, match=re.escape("no token in a batch of shape (1, 0): give at least one")):
        write(WRITER, torch.empty(1, 0, dtype=torch.int64), 3)


@each_writer
def test_a_model_that_drops_out_numbers(write):
    model = GPT(replace(WRITER.config, dropout=0.1))
    with pytest.raises(ValueError, match=re.escape("drops out 0.1 of its numbers: call model.eval() first")):
        write(model, torch.tensor([[65]]), 3)
    write(model.eval(), torch.tensor([[65]]), 3)


def test_no_beam():
    with pytest.raises(ValueError, match="n_beams must be at least 1, got 0"):
        beam_search(WRITER, torch.tensor([65]), 3, 0)


def test_no_draft():
    with pytest.raises(ValueError, match="n_draft must be at least 1, got 0"):
        list(speculative(WRITER, WRITER, torch.tensor([[65]]), 3, 0))


def test_a_draft_with_another_vocabulary():
    with pytest.raises(ValueError, match="the draft has vocab_size=5, the model 17: both need the same"):
        list(speculative(MODELS["GPT-2"], DRAFT, torch.tensor([[1]]), 3, 2))


def test_a_tokenizer_that_lacks_a_token_of_the_model():
    model = lively(replace(WRITER.config, vocab_size=999))
    text = stream_text(model, TOKENIZER, "Mira", 3, [script([998] * 3, len(TOKENIZER.encode("Mira")))])
    with pytest.raises(
        ValueError, match=f"vocab_size=999 drew 998, which is not among the {N_TOKENS} tokens"
    ):
        next(text)
