import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlib import gpt
from llmlib.attention import MultiHeadAttention
from llmlib.gpt import GPT, GPT2_SMALL, count_flops, count_parameters, greedy
from llmlib.llama import (
    LLAMA_TINY,
    SMOLLM2_135M,
    GroupedQueryAttention,
    LlamaConfig,
    RMSNorm,
    RotaryPositions,
    SwiGLU,
    deinterleave,
    interleave,
    rope_frequencies,
)
from tests.caches import GrowingCache

TINY = LlamaConfig(vocab_size=17, max_seq_len=12, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)

bases = st.sampled_from([10.0, 10_000.0, 500_000.0])
head_widths = st.integers(1, 6).map(lambda pairs: 2 * pairs)


def lively(config: LlamaConfig) -> GPT:
    """Make a model whose weights are large enough for each token to matter."""
    model = GPT(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.3)
    return model


def random_ids(config: LlamaConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape)


# RMSNorm and SwiGLU


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(6, eps=0.1), 1 + torch.randn(2, 3, 6)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_gradients_of_rms_norm_are_those_of_pytorch(shape):
    norm = RMSNorm(4, eps=0.1).double()
    nn.init.normal_(norm.weight)
    x, d_y = (torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape))[::-1]) for _ in "xy")
    x.requires_grad_()
    theirs = nn.functional.rms_norm(x, (4,), norm.weight, 0.1)
    inputs = [x, norm.weight]
    expected = torch.autograd.grad(theirs, inputs, d_y)
    torch.testing.assert_close(norm(x), theirs)
    torch.testing.assert_close(torch.autograd.grad(norm(x), inputs, d_y), expected)
    norm.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(norm(x), x, d_y)[0], expected[0])


def test_rms_norm_keeps_the_type_of_its_input():
    norm = RMSNorm(64).to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    traced = x.clone().requires_grad_()
    y = norm(traced)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x))
    y.sum().backward()
    assert traced.grad.dtype == torch.bfloat16


def test_swiglu_is_its_formula():
    ffn, x = SwiGLU(4, 9, bias=True), torch.randn(2, 3, 4)
    gate = x @ ffn.gate_proj.weight.T + ffn.gate_proj.bias
    up = x @ ffn.up_proj.weight.T + ffn.up_proj.bias
    y = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(ffn(x), y @ ffn.down_proj.weight.T + ffn.down_proj.bias)


@pytest.mark.parametrize("d_model", [64, 100, 256, 576, 768, 1024, 4096])
def test_swiglu_holds_about_what_gpt2s_layer_holds(d_model):
    with torch.device("meta"):
        d_ff = LlamaConfig(d_model=d_model, n_heads=2).feed_forward().up_proj.out_features
    assert d_ff % 32 == 0
    assert 0 <= 3 * d_ff - 8 * d_model < 3 * 32


# Rotary positions


@settings(deadline=None, max_examples=40)
@given(
    d_head=head_widths, base=bases, i=st.integers(0, 100), j=st.integers(0, 100), shift=st.integers(0, 100)
)
def test_scores_depend_on_offsets_alone(d_head, base, i, j, shift):
    rope, q, k = RotaryPositions(d_head, base), torch.randn(1, d_head), torch.randn(1, d_head)
    score = rope(q, i) @ rope(k, j).T
    shifted = rope(q, i + shift) @ rope(k, j + shift).T
    torch.testing.assert_close(score, shifted, atol=1e-3, rtol=1e-4)


def test_scores_depend_on_offsets():
    rope, q = RotaryPositions(8), torch.ones(1, 8)
    scores = torch.cat([rope(q, 0) @ rope(q, distance).T for distance in range(4)]).squeeze()
    expected = [2 * sum(math.cos(m * 10_000 ** (-i / 4)) for i in range(4)) for m in range(4)]
    torch.testing.assert_close(scores, torch.tensor(expected))


@settings(deadline=None, max_examples=30)
@given(d_head=head_widths, base=bases, T=st.integers(1, 9), start=st.integers(0, 100))
def test_a_turn_keeps_the_norm_and_start_shifts_it(d_head, base, T, start):
    rope, x = RotaryPositions(d_head, base), torch.randn(2, start + T, d_head)
    turned = rope(x, 0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    torch.testing.assert_close(rope(x[:, start:], start), turned[:, start:])


def test_frequencies_fall_from_one_radian_a_token():
    expected = [500_000 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(rope_frequencies(8, 500_000.0), torch.tensor(expected))


def su_rotation(x: torch.Tensor, base: float, start: int) -> torch.Tensor:
    """Turn x (..., T, D) as the paper does: numbers 2i and 2i + 1 are one complex number, times e^(i m θ)."""
    T, D = x.shape[-2:]
    theta = base ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    angles = torch.arange(start, start + T)[:, None] * theta  # (T, D / 2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


@settings(deadline=None, max_examples=30)
@given(d_head=head_widths, base=bases, T=st.integers(1, 9), start=st.integers(0, 100))
def test_the_half_split_layout_is_the_papers_reordered(d_head, base, T, start):
    rope, x = RotaryPositions(d_head, base), torch.randn(T, d_head)
    # Both conversions reorder rows, so the vectors stand in columns here.
    expected = su_rotation(interleave(x.T, d_head).T, base, start)
    torch.testing.assert_close(interleave(rope(x, start).T, d_head).T, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rope(x, start), deinterleave(expected.T, d_head).T, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(d_head=head_widths, n_heads=st.integers(1, 4), columns=st.lists(st.integers(1, 5), max_size=1))
def test_the_two_layouts_undo_each_other(d_head, n_heads, columns):
    weight = torch.randn(n_heads * d_head, *columns)  # a matrix, or a bias
    assert torch.equal(deinterleave(interleave(weight, d_head), d_head), weight)
    assert torch.equal(interleave(deinterleave(weight, d_head), d_head), weight)


def test_pairs_stand_side_by_side_in_each_head():
    assert interleave(torch.arange(8.0), 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(torch.arange(6.0), 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert deinterleave(torch.arange(6.0), 6).tolist() == [0, 2, 4, 1, 3, 5]


def test_reordered_projections_give_the_same_scores():
    q_proj, k_proj, x = torch.randn(12, 8), torch.randn(12, 8), torch.randn(5, 8)
    rope = RotaryPositions(6)

    def heads(weight):
        return (x @ weight.T).unflatten(-1, (2, 6)).transpose(0, 1)  # (H, T, D)

    scores = rope(heads(q_proj), 0) @ rope(heads(k_proj), 0).mT
    q, k = (su_rotation(heads(interleave(weight, 6)), 10_000.0, 0) for weight in (q_proj, k_proj))
    torch.testing.assert_close(scores, q @ k.mT, atol=1e-4, rtol=1e-4)


def test_angles_far_out_are_exact():
    x, base = torch.randn(1, 64), 100_000.0
    expected = deinterleave(su_rotation(interleave(x.T, 64).T, base, 8191).T, 64).T
    torch.testing.assert_close(RotaryPositions(64, base)(x, 8191), expected, atol=3e-3, rtol=0)


def test_frequencies_are_no_weights():
    assert not RotaryPositions(8).state_dict()


# Grouped heads


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_multi_head_at_as_many_heads(bias):
    full = MultiHeadAttention(24, 4, bias=bias, positions=RotaryPositions(6))
    grouped = GroupedQueryAttention(24, 4, 4, bias=bias, positions=RotaryPositions(6))
    grouped.load_state_dict(full.state_dict())
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(n_kv_heads=st.integers(1, 3), group=st.integers(1, 3), bias=st.booleans(), T=st.integers(1, 6))
def test_grouped_equals_multi_head_with_repeated_heads(n_kv_heads, group, bias, T):
    n_heads = n_kv_heads * group
    rope = RotaryPositions(4)
    grouped = GroupedQueryAttention(4 * n_heads, n_heads, n_kv_heads, bias=bias, positions=rope)
    full = MultiHeadAttention(4 * n_heads, n_heads, bias=bias, positions=rope)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            assert len(weight) == 4 * n_kv_heads
            weights[name] = weight.unflatten(0, (-1, 4)).repeat_interleave(group, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x, cache = torch.randn(2, T, 4 * n_heads), GrowingCache()
    torch.testing.assert_close(grouped(x), full(x), atol=1e-5, rtol=1e-5)
    grouped(x, cache)
    assert cache.k.shape == cache.v.shape == (2, n_kv_heads, T, 4)  # the cache holds the shared heads alone


# The whole model


def test_the_size_of_smollm2():
    with torch.device("meta"):
        counts = count_parameters(GPT(SMOLLM2_135M))
    assert sum(counts.values()) == 134_515_008
    assert counts["positions"] == counts["output head"] == 0


def test_the_parts_are_llamas():
    model = GPT(TINY)
    assert model.embeddings.pos_emb is None
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    C, d_ff = 16, 64  # 8/3 of 16, rounded up to 64
    assert count_parameters(model) == {
        "token table": 17 * C,
        "positions": 0,
        "norms": 5 * C,
        "attention": 2 * (2 * C * C + 2 * C * 8),
        "feed-forward": 2 * 3 * C * d_ff,
        "output head": 0,
    }
    assert GPT(replace(TINY, n_kv_heads=None)).blocks[0].attn.k_proj.out_features == C


def test_shared_heads_cost_less():
    flops, full = count_flops(GPT(TINY), 10), count_flops(GPT(replace(TINY, n_kv_heads=4)), 10)
    assert full["attention"] - flops["attention"] == 2 * 2 * 2 * 16 * 8


@settings(deadline=None, max_examples=20)
@given(n_kv_heads=st.sampled_from([1, 2, 4]), T=st.integers(1, 12), data=st.data())
def test_the_future_cannot_change_the_past(n_kv_heads, T, data):
    changed = data.draw(st.integers(0, T - 1))
    model, ids = lively(replace(TINY, n_kv_heads=n_kv_heads)), random_ids(TINY, 2, T)
    other = ids.clone()
    other[:, changed:] = (ids[:, changed:] + 1) % 17
    torch.testing.assert_close(model(ids)[:, :changed], model(other)[:, :changed], atol=1e-5, rtol=1e-5)


def test_the_small_preset_runs_and_is_causal():
    model = GPT(LLAMA_TINY)
    ids = random_ids(LLAMA_TINY, 1, 256)
    logits = model(ids)
    assert logits.shape == (1, 256, 4096)
    torch.testing.assert_close(model(ids[:, :9]), logits[:, :9], atol=1e-5, rtol=1e-5)


def test_the_order_of_tokens_matters():
    model, ids = lively(TINY), torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert not torch.allclose(model(ids)[:, -1], model(swapped)[:, -1], atol=1e-3)


def test_one_batch_overfits():
    torch.manual_seed(0)
    model = GPT(TINY)
    ids, targets = random_ids(TINY, 2, 4, 12)
    assert model.loss(ids, targets).item() == pytest.approx(math.log(17), abs=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert greedy(model, ids[:1, :1], 20).shape == (1, 21)


def test_fresh_residual_projections_are_scaled():
    model = GPT(replace(TINY, d_model=64, n_layers=8))
    for name in ("attn.o_proj", "ffn.down_proj", "ffn.gate_proj", "attn.k_proj"):
        std = 0.02 / 4 if name in ("attn.o_proj", "ffn.down_proj") else 0.02  # √(2 · 8) = 4
        for block in model.blocks:
            assert block.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.12), name


@settings(deadline=None, max_examples=20)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3), n_kv_heads=st.sampled_from([1, 2, 4]))
def test_cached_chunks_equal_the_whole(chunks, n_kv_heads):
    model = lively(replace(TINY, n_kv_heads=n_kv_heads))
    ids, caches = random_ids(TINY, 2, sum(chunks)), [GrowingCache() for _ in model.blocks]
    logits = torch.cat([model(part, caches) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=1e-5)


def test_bfloat16_loss_is_close():
    model = GPT(replace(TINY, d_model=64))
    ids, targets = random_ids(TINY, 2, 8, 12)
    exact = model.loss(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


def test_the_model_knows_nothing_of_these_parts():
    source = Path(gpt.__file__).read_text(encoding="utf-8").lower()
    assert "llama" not in source and "rotary" not in source


def test_replace_varies_the_sizes_and_d_ff_follows():
    assert replace(TINY, d_model=96).feed_forward().up_proj.weight.shape == (256, 96)
    assert replace(TINY, d_ff=10).feed_forward().up_proj.weight.shape == (10, 16)


# Errors


@pytest.mark.parametrize("n_kv_heads", [3, 0, 8])
def test_heads_that_cannot_share_evenly(n_kv_heads):
    message = f"n_heads=4 can't share n_kv_heads={n_kv_heads} evenly: choose a number of key/value heads"
    with pytest.raises(ValueError, match=message):
        replace(TINY, n_kv_heads=n_kv_heads)
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(16, 4, n_kv_heads)


def test_heads_of_odd_width():
    with pytest.raises(ValueError, match="d_head=3 is odd: rotary"):
        LlamaConfig(d_model=12, n_heads=4)


def test_what_the_gpt_checks():
    with pytest.raises(ValueError, match="n_layers must be at least 1, got 0"):
        replace(TINY, n_layers=0)
    with pytest.raises(ValueError, match="13 tokens don't fit into max_seq_len=12"):
        GPT(TINY)(random_ids(TINY, 1, 13))
    assert GPT2_SMALL.positions() is not None and TINY.positions() is None


def test_rotary_positions_stay_exact_in_a_model_of_bfloat16():
    x = torch.randn(1, 1, 1, 16)
    exact = RotaryPositions(16)(x, 1000)
    torch.testing.assert_close(
        RotaryPositions(16).bfloat16()(x.bfloat16(), 1000).float(), exact, atol=0.05, rtol=0.05
    )
