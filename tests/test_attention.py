import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlib.attention import CrossAttention, MultiHeadAttention, attention_weights, causal_mask
from tests.caches import GrowingCache

heads = st.integers(1, 4)
widths = st.integers(1, 6)
lengths = st.integers(1, 9)
batches = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def twin_of(attn: MultiHeadAttention, n_heads: int) -> nn.MultiheadAttention:
    """Return PyTorch's layer with the same weights."""
    twin = nn.MultiheadAttention(attn.d_model, n_heads, bias=attn.q_proj.bias is not None, batch_first=True)
    with torch.no_grad():
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        twin.out_proj.weight.copy_(attn.o_proj.weight)
        if attn.q_proj.bias is not None:
            twin.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            twin.out_proj.bias.copy_(attn.o_proj.bias)
    return twin


def assert_same_gradients(attn: MultiHeadAttention, twin: nn.MultiheadAttention) -> None:
    ours = torch.cat([p.weight.grad for p in (attn.q_proj, attn.k_proj, attn.v_proj)])
    torch.testing.assert_close(ours, twin.in_proj_weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attn.o_proj.weight.grad, twin.out_proj.weight.grad, atol=1e-5, rtol=1e-5)


class Turn:
    """Turn each pair of numbers by an angle that grows with the position: rotary positions in small."""

    def __call__(self, x, start):
        angle = torch.arange(start, start + x.shape[-2])[:, None] / 3  # (T, 1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class GroupedHeads(MultiHeadAttention):
    """Give each group of query heads one key head and one value head."""

    def __init__(self, d_model, n_heads, n_kv_heads, **parts):
        super().__init__(d_model, n_heads, **parts)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)


# The same as PyTorch's


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_model", "n_heads", "T"), [(8, 1, 5), (12, 4, 7), (64, 8, 33), (6, 6, 1)])
def test_equals_torch_forward_and_gradients(d_model, n_heads, T, bias):
    attn = MultiHeadAttention(d_model, n_heads, bias=bias)
    twin = twin_of(attn, n_heads)
    x = torch.randn(3, T, d_model)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    hidden = ~causal_mask(T, T)  # in PyTorch's layer, True hides
    y, expected = attn(ours), twin(theirs, theirs, theirs, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    assert_same_gradients(attn, twin)


@pytest.mark.parametrize(("T", "S"), [(4, 7), (7, 4), (1, 5), (5, 5)])
def test_cross_attention_equals_torch(T, S):
    attn = CrossAttention(12, 3)
    twin = twin_of(attn, 3)
    x, context = torch.randn(2, T, 12), torch.randn(2, S, 12)
    mask = torch.rand(2, 1, S) < 0.5
    mask[..., 0] = True
    padding = ~mask.squeeze(1)
    y = attn(x, context, mask)
    expected = twin(x, context, context, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(attn, twin)


def test_cross_attention_looks_ahead():
    x = torch.randn(5, 8)
    later = x.clone()
    later[-1] += 1
    attn = CrossAttention(8, 2)
    assert not torch.allclose(attn(x, x)[0], attn(later, later)[0])


# Causality and shapes


@settings(deadline=None, max_examples=30)
@given(n_heads=heads, d_head=widths, T=lengths, batch=batches, data=st.data())
def test_the_future_cannot_change_the_past(n_heads, d_head, T, batch, data):
    changed = data.draw(st.integers(0, T - 1))
    attn = MultiHeadAttention(n_heads * d_head, n_heads)
    x = torch.randn(*batch, T, n_heads * d_head)
    other = x.clone()
    other[..., changed:, :] = torch.randn_like(other[..., changed:, :])
    y, y_other = attn(x), attn(other)
    torch.testing.assert_close(y[..., :changed, :], y_other[..., :changed, :])
    assert not torch.allclose(y[..., changed, :], y_other[..., changed, :])


@settings(deadline=None, max_examples=30)
@given(n_heads=heads, d_head=widths, T=lengths, S=lengths, batch=batches)
def test_every_element_of_any_batch_is_worked_on_alone(n_heads, d_head, T, S, batch):
    d_model = n_heads * d_head
    x, context = torch.randn(*batch, T, d_model), torch.randn(*batch, S, d_model)
    attn, cross = MultiHeadAttention(d_model, n_heads), CrossAttention(d_model, n_heads)
    y, z = attn(x), cross(x, context)
    assert y.shape == z.shape == x.shape
    for i in range(math.prod(batch)):
        one, its_context = x.reshape(-1, T, d_model)[i], context.reshape(-1, S, d_model)[i]
        torch.testing.assert_close(y.reshape(-1, T, d_model)[i], attn(one), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            z.reshape(-1, T, d_model)[i], cross(one, its_context), atol=1e-6, rtol=1e-5
        )


def test_padding_hides_and_leaves_no_nan():
    attn = MultiHeadAttention(8, 2)
    x = torch.randn(2, 6, 8)
    mask = torch.ones(2, 1, 6, dtype=torch.bool)
    mask[1, :, :2] = False  # the second text is two tokens shorter, padded on the left
    y = attn(x, mask=mask)
    torch.testing.assert_close(y[0], attn(x[0]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y[1, 2:], attn(x[1, 2:]), atol=1e-6, rtol=1e-5)
    assert y.isfinite().all()


# The seams: positions, cache, grouped heads


@settings(deadline=None, max_examples=30)
@given(n_heads=st.integers(1, 3), chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5), batch=batches)
def test_cached_chunks_equal_the_whole(n_heads, chunks, batch):
    attn = MultiHeadAttention(4 * n_heads, n_heads, positions=Turn())
    x = torch.randn(*batch, sum(chunks), 4 * n_heads)
    cache = GrowingCache()
    y = torch.cat([attn(part, cache) for part in x.split(chunks, dim=-2)], dim=-2)
    torch.testing.assert_close(y, attn(x), atol=1e-6, rtol=1e-5)


def test_a_mask_and_a_cache_go_together():
    attn = MultiHeadAttention(8, 2)
    x, mask, cache = torch.randn(2, 6, 8), torch.ones(2, 1, 6, dtype=torch.bool), GrowingCache()
    mask[1, :, 0] = False
    parts = [attn(x[:, a:b], cache, mask[..., :b]) for a, b in ((0, 3), (3, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), attn(x, mask=mask), atol=1e-6, rtol=1e-5)


def test_positions_reach_queries_and_keys_but_not_values():
    attn = MultiHeadAttention(8, 2, positions=Turn())
    x = torch.randn(8).expand(5, 8)  # the same token five times: whatever the weights are, so is the mean
    torch.testing.assert_close(attn(x), MultiHeadAttention.forward(attn, x[:1]).expand(5, 8))
    y = torch.randn(5, 8)
    without = MultiHeadAttention(8, 2)
    without.load_state_dict(attn.state_dict())
    assert not torch.allclose(attn(y), without(y))


def test_turned_scores_depend_on_offsets_alone():
    attn, late = MultiHeadAttention(8, 2, positions=Turn()), GrowingCache()
    late.n_tokens = 40
    x = torch.randn(5, 8)
    torch.testing.assert_close(attn(x, late), attn(x), atol=1e-6, rtol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    grouped, full = GroupedHeads(12, 6, 2), MultiHeadAttention(12, 6)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].reshape(2, 2, 12).repeat_interleave(3, dim=0).reshape(12, 12)
    full.load_state_dict(weights)
    x, cache = torch.randn(2, 5, 12), GrowingCache()
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)
    grouped(x[:, :3], cache)
    assert cache.k.shape == (2, 2, 3, 2)  # the cache holds two heads, not six
    torch.testing.assert_close(grouped(x[:, 3:], cache), full(x)[:, 3:], atol=1e-6, rtol=1e-5)


# Dropout


def test_dropout_falls_on_the_weights_in_training_alone():
    attn = MultiHeadAttention(8, 2, dropout=0.5)
    still = MultiHeadAttention(8, 2)
    still.load_state_dict(attn.state_dict())
    x = torch.randn(2, 6, 8)
    assert not torch.allclose(attn(x), attn(x))
    torch.testing.assert_close(attn.eval()(x), still(x))


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    attn = MultiHeadAttention(8, 2, dropout=0.25)
    x = torch.randn(4, 8)
    mean = attn(x.expand(20_000, 4, 8)).mean(dim=0)
    torch.testing.assert_close(mean, attn.eval()(x), atol=0.02, rtol=0)


# The weights, by themselves


@settings(deadline=None, max_examples=30)
@given(T=lengths, spare=st.integers(0, 4), d_head=widths, batch=batches)
def test_weights_give_what_torch_gives(T, spare, d_head, batch):
    S = T + spare
    q, k, v = (torch.randn(*batch, n, d_head) for n in (T, S, S))
    for causal in (False, True):
        weights = attention_weights(q, k, causal=causal)
        mask = causal_mask(T, S) if causal else None
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(weights.sum(-1), torch.ones(*batch, T))
        torch.testing.assert_close(weights @ v, expected, atol=1e-5, rtol=1e-5)


def test_the_last_queries_see_the_keys_up_to_their_own():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(3, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


# Errors


@pytest.mark.parametrize(("d_model", "n_heads"), [(10, 3), (4, 8), (8, 0)])
def test_a_width_that_heads_do_not_divide(d_model, n_heads):
    message = f"d_model={d_model} can't be split into n_heads={n_heads} equal heads: choose"
    with pytest.raises(ValueError, match=re.escape(message)):
        MultiHeadAttention(d_model, n_heads)


def test_tokens_of_another_width():
    with pytest.raises(ValueError, match="the tokens have width 6, this layer d_model=8"):
        MultiHeadAttention(8, 2)(torch.randn(3, 6))
    with pytest.raises(ValueError, match="the tokens have width 5, this layer d_model=8"):
        CrossAttention(8, 2)(torch.randn(3, 8), torch.randn(4, 5))
