import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmlib.attention import MultiHeadAttention
from llmlib.data import IGNORE_INDEX
from llmlib.gpt import (
    GPT,
    GPT2_LARGE,
    GPT2_MEDIUM,
    GPT2_SMALL,
    GPT2_XL,
    EncoderDecoder,
    FeedForward,
    GPTConfig,
    LayerNorm,
    compute_dtype,
    count_flops,
    count_parameters,
    greedy,
    linear_loss,
)
from llmlib.llama import LlamaConfig
from tests.caches import GrowingCache

CONFIG_SIZES = dict(vocab_size=17, max_seq_len=12, d_model=16, n_layers=2, n_heads=4)
TINY = GPTConfig(**CONFIG_SIZES)

configs = st.builds(
    lambda d_head, **sizes: GPTConfig(d_model=d_head * sizes["n_heads"], **sizes),
    d_head=st.integers(1, 5),
    vocab_size=st.integers(2, 30),
    max_seq_len=st.integers(1, 10),
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 4),
    d_ff=st.none() | st.integers(1, 20),
    bias=st.booleans(),
    tied=st.booleans(),
)


def lively(config: GPTConfig) -> GPT:
    """Make a model whose weights are large enough for each token to matter."""
    model = GPT(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.3)
    return model


def random_ids(config: GPTConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape)


# The parts


def test_layer_norm_is_its_formula():
    norm, x = LayerNorm(6, eps=0.1), torch.randn(3, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centered / (variance + 0.1).sqrt() * norm.weight + norm.bias)


def test_feed_forward_is_its_formula():
    ffn, x = FeedForward(4, 9), torch.randn(2, 3, 4)
    h = x @ ffn.up_proj.weight.T + ffn.up_proj.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(ffn(x), h @ ffn.down_proj.weight.T + ffn.down_proj.bias)


def test_layers_compute_in_autocasts_type():
    x = torch.randn(2, 8)
    assert compute_dtype(x) == LayerNorm(8)(x).dtype == torch.float32
    assert compute_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == LayerNorm(8)(x).dtype == torch.bfloat16


# The configuration


def test_replace_varies_the_sizes_and_d_ff_follows():
    model = GPT(replace(TINY, d_model=32, n_layers=3))
    assert len(model.blocks) == 3
    assert model.blocks[2].ffn.up_proj.weight.shape == (128, 32)
    assert GPT(replace(TINY, d_ff=10)).blocks[0].ffn.up_proj.weight.shape == (10, 16)


def test_without_biases_only_norms_shift():
    names = [name for name, _ in GPT(replace(TINY, bias=False)).named_parameters() if name.endswith("bias")]
    assert names and all("norm" in name for name in names)


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


@dataclass(frozen=True, kw_only=True)
class OtherConfig(GPTConfig):
    def positions(self):
        return None

    def norm(self):
        return nn.Identity()

    def feed_forward(self):
        return Doubling()


def test_a_subclass_of_the_configuration_swaps_parts():
    model = GPT(OtherConfig(vocab_size=17, d_model=16, n_layers=2, n_heads=4))
    for block in model.blocks:
        nn.init.zeros_(block.attn.o_proj.weight)
    ids = random_ids(model.config, 2, 5)
    table = model.embeddings.tok_emb.weight
    torch.testing.assert_close(model(ids), 9 * table[ids] @ table.T)  # x + 2x, twice
    counts = count_parameters(model)
    assert counts["positions"] == counts["norms"] == counts["feed-forward"] == 0
    assert sum(counts.values()) == 17 * 16 + 2 * 4 * (16 * 16 + 16)


# Fresh weights


def test_fresh_weights_are_those_of_gpt2():
    model = GPT(GPTConfig(vocab_size=200, max_seq_len=200, d_model=64, n_layers=8, n_heads=4, tied=False))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert weight.eq(0).all(), name
        elif "norm" in name:
            assert weight.eq(1).all(), name
        else:
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02  # √(2 · 8) = 4
            assert weight.std().item() == pytest.approx(std, rel=0.08), name
            assert abs(weight.mean().item()) < 0.1 * std, name


def test_the_residual_path_does_not_grow_with_depth():
    stds = []
    for n_layers in (1, 16):
        model = GPT(replace(TINY, d_model=64, n_layers=n_layers))
        seen = []
        model.final_norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].std()))
        model(random_ids(TINY, 8, 12))
        stds.append(seen[0].item())
    assert stds[1] < 1.5 * stds[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_starts_near_that_of_a_guess(tied):
    model = GPT(replace(TINY, vocab_size=300, d_model=64, tied=tied))
    ids, targets = random_ids(model.config, 2, 16, 12)
    assert model.loss(ids, targets).item() == pytest.approx(math.log(300), abs=0.1)


# Learning, and not from the future


def test_one_batch_overfits():
    torch.manual_seed(0)
    model = GPT(TINY)
    ids, targets = random_ids(TINY, 2, 4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@settings(deadline=None, max_examples=20)
@given(config=configs, B=st.integers(1, 3), data=st.data())
def test_the_future_cannot_change_the_past(config, B, data):
    T = data.draw(st.integers(1, config.max_seq_len))
    changed = data.draw(st.integers(0, T - 1))
    model, ids = lively(config), random_ids(config, B, T)
    other = ids.clone()
    other[:, changed:] = (ids[:, changed:] + 1) % config.vocab_size
    logits, logits_other = model(ids), model(other)
    assert logits.shape == (B, T, config.vocab_size)
    torch.testing.assert_close(logits[:, :changed], logits_other[:, :changed], atol=1e-5, rtol=1e-5)


def test_the_past_changes_the_future():
    model, ids = lively(TINY), torch.zeros(1, 12, dtype=torch.int64)
    other = ids.clone()
    other[:, 3] = 1
    differences = (model(ids) - model(other)).abs().amax(-1).squeeze()
    assert differences[3:].min() > 1e-4


def test_loss_is_the_cross_entropy_of_the_logits():
    model, twin = lively(TINY), GPT(TINY)
    twin.load_state_dict(model.state_dict())
    ids, targets = random_ids(TINY, 2, 3, 12)
    targets[0, :5] = -100
    loss = model.loss(ids, targets)
    expected = F.cross_entropy(twin(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


# Dropout


PLACES = ["embeddings", "attention weights", "attention output", "feed-forward output"]


@pytest.mark.parametrize("place", PLACES)
def test_dropout_falls_in_training_alone(place):
    model, still = GPT(replace(TINY, dropout=0.5)), GPT(TINY)
    still.load_state_dict(model.state_dict())
    ids = random_ids(TINY, 2, 12)
    torch.testing.assert_close(model.eval()(ids), still(ids))
    model.train()
    model.dropout.p *= place == "embeddings"
    for block in model.blocks:  # nothing drops at the other places
        block.attn.dropout *= place == "attention weights"
        block.dropout.p *= place.endswith("output")
        if place == "attention output":
            nn.init.zeros_(block.ffn.down_proj.weight)
        if place == "feed-forward output":
            nn.init.zeros_(block.attn.o_proj.weight)
    assert not torch.equal(model(ids), model(ids))


# The loss over the vocabulary


def loss_case(N=10, C=5, V=7, dtype=torch.float32, ignored=3):
    x, weight = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(V, (N,))
    targets[torch.randperm(N)[:ignored]] = -100
    return x, weight, targets


def gradients_of(loss_function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_function(*leaves)
    (3 * loss).backward()  # an outer factor must reach the gradients
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("ignored", [0, 3, 9])
@pytest.mark.parametrize("n_rows", [1, 3, 5, 10, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_loss_is_pytorchs(dtype, n_rows, ignored):
    x, weight, targets = loss_case(dtype=dtype, ignored=ignored)
    ours = gradients_of(lambda x, w: linear_loss(x, w, targets, n_rows=n_rows), x, weight)
    theirs = gradients_of(lambda x, w: F.cross_entropy(x @ w.T, targets), x, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


def test_linear_loss_by_finite_differences():
    x, weight, targets = loss_case(N=4, C=3, V=3, dtype=torch.float64, ignored=1)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_loss(x, w, targets, n_rows=3), inputs)


def test_linear_loss_in_bfloat16():
    x, weight, targets = loss_case(N=60, C=32, V=50)
    weight /= math.sqrt(32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients_of(lambda x, w: linear_loss(x, w, targets, n_rows=16), x, weight)
    theirs = gradients_of(lambda x, w: F.cross_entropy(x @ w.T, targets), x, weight)
    torch.testing.assert_close(ours[0], theirs[0], atol=0, rtol=5e-3)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_linear_loss_stays_finite_for_large_logits():
    x, weight, targets = loss_case()
    ours = gradients_of(lambda x, w: linear_loss(x, w, targets), 300 * x, weight)
    assert all(tensor.isfinite().all() for tensor in ours)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_linear_loss_where_one_side_is_frozen(wanted):
    x, weight, targets = loss_case()
    leaf = {"x": x, "weight": weight}[wanted].requires_grad_()
    linear_loss(x, weight, targets, n_rows=4).backward()
    ours, leaf.grad = leaf.grad, None
    F.cross_entropy(x @ weight.T, targets).backward()
    torch.testing.assert_close(ours, leaf.grad)
    assert (weight if wanted == "x" else x).grad is None


def test_linear_loss_without_gradients():
    x, weight, targets = loss_case()
    expected = F.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(linear_loss(x, weight, targets), expected)
    x.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_loss(x, weight, targets)
    n_counted = int((targets != IGNORE_INDEX).sum())
    assert counter.get_total_flops() == 2 * n_counted * x.shape[1] * len(
        weight
    )  # the logits, and no gradient
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_logits_of_the_whole_batch():
    x, weight, targets = loss_case(N=64, C=4, V=100)
    x.requires_grad_()
    with LargestTensor() as largest:
        linear_loss(x, weight, targets, n_rows=8).backward()
    assert largest.numel == 8 * 100


# Greedy completion


@pytest.mark.parametrize("T", [1, 5, 12, 15])
def test_greedy_repeats_the_argmax_and_slides(T):
    model, prompt = lively(TINY), random_ids(TINY, 3, T)
    ids = greedy(model, prompt, 10)
    assert ids.shape == (3, T + 10)
    assert torch.equal(ids[:, :T], prompt)
    for end in range(T, T + 10):
        logits = model(ids[:, max(0, end - 12) : end])[:, -1]
        assert torch.equal(ids[:, end], logits.argmax(-1))


def test_greedy_of_no_tokens_is_the_prompt():
    prompt = random_ids(TINY, 2, 3)
    assert torch.equal(greedy(GPT(TINY), prompt, 0), prompt)


# Counts


@settings(deadline=None, max_examples=30)
@given(config=configs)
def test_parameters_are_counted_by_formula(config):
    with torch.device("meta"):
        model = GPT(config)
    C, L, V = config.d_model, config.n_layers, config.vocab_size
    d_ff = config.d_ff or 4 * C
    counts = count_parameters(model)
    assert counts == {
        "token table": V * C,
        "positions": config.max_seq_len * C,
        "norms": (2 * L + 1) * 2 * C,
        "attention": 4 * L * (C * C + config.bias * C),
        "feed-forward": L * (2 * C * d_ff + config.bias * (C + d_ff)),
        "output head": 0 if config.tied else V * C,
    }
    assert sum(counts.values()) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2_SMALL, 124_439_808),
        (replace(GPT2_SMALL, tied=False), 163_037_184),
        (GPT2_MEDIUM, 354_823_168),
        (GPT2_LARGE, 774_030_080),
        (GPT2_XL, 1_557_611_200),
    ],
)
def test_the_sizes_of_gpt2(config, expected):
    with torch.device("meta"):
        model = GPT(config)
    assert sum(count_parameters(model).values()) == expected


@settings(deadline=None, max_examples=10)
@given(config=configs, data=st.data())
def test_flops_are_those_that_pytorch_counts(config, data):
    T = data.draw(st.integers(1, config.max_seq_len))
    model, ids = GPT(config), random_ids(config, 2, T)
    # PyTorch's plain attention computes the scores of the future too: each token looks at T tokens.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(ids)
    each = sum(count_flops(model, T).values())
    assert forward.get_total_flops() == 2 * T * each
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        model.loss(ids, random_ids(config, 2, T)).backward()
    assert training.get_total_flops() == 3 * 2 * T * each


def test_flops_of_each_part():
    flops = count_flops(GPT(TINY), seq_len=10)
    assert flops["output head"] == 2 * 17 * 16  # tied or not, the product is made
    assert flops["attention"] == 2 * (2 * 4 * 16 * 16 + 4 * 16 * 10)
    assert flops["feed-forward"] == 2 * 2 * 2 * 16 * 64
    assert flops["token table"] == flops["positions"] == flops["norms"] == 0


# Caches and masks


@settings(deadline=None, max_examples=20)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3), B=st.integers(1, 3))
def test_cached_chunks_equal_the_whole(chunks, B):
    model, ids = lively(TINY), random_ids(TINY, B, sum(chunks))
    caches = [GrowingCache() for _ in model.blocks]
    logits = torch.cat([model(part, caches) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, LlamaConfig(**CONFIG_SIZES)], ids=["GPT-2", "Llama"])
def test_padding_changes_nothing(config):
    model, short, long = lively(config), random_ids(config, 1, 4), random_ids(config, 1, 6)
    ids = torch.cat([F.pad(short, (2, 0)), long])  # (2, 6)
    logits = model(ids, padding=torch.tensor([2, 0]))
    torch.testing.assert_close(logits[:1, 2:], model(short), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], model(long), atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


def test_padding_and_caches_go_together():
    model, ids, padding = lively(TINY), random_ids(TINY, 2, 6), torch.tensor([4, 0])
    caches = [GrowingCache() for _ in model.blocks]
    parts = [model(ids[:, a:b], caches, padding) for a, b in ((0, 3), (3, 5), (5, 6))]
    expected = model(ids, padding=padding)
    torch.testing.assert_close(torch.cat(parts, dim=1)[0, 4:], expected[0, 4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(parts, dim=1)[1], expected[1], atol=1e-5, rtol=1e-5)


# bfloat16


def test_bfloat16_loss_is_close():
    model = GPT(replace(TINY, d_model=64))
    ids, targets = random_ids(TINY, 2, 8, 12)
    exact = model.loss(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


@pytest.mark.parametrize("T", [1, 24, 513])  # short texts take another path than long ones
def test_bfloat16_attention_is_close(T):
    attn, x = MultiHeadAttention(32, 4), torch.randn(2, T, 32)
    nn.init.normal_(attn.q_proj.weight, std=0.5)  # weights far from equal
    results = []
    for enabled in (True, False):
        attn.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = attn(leaf).float()
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(weight.grad for weight in attn.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 0.03 * exact.norm() + 1e-4


# The encoder and the decoder


def pair() -> EncoderDecoder:
    return EncoderDecoder(replace(TINY, d_model=32))


def test_the_decoder_cannot_look_ahead_and_reads_the_source():
    model, source, ids = pair(), random_ids(TINY, 2, 7), random_ids(TINY, 2, 6)
    later, other = ids.clone(), source.clone()
    later[:, 4:] = (ids[:, 4:] + 1) % 17
    other[:, -1] = (source[:, -1] + 1) % 17
    logits = model(source, ids)
    assert logits.shape == (2, 6, 17)
    torch.testing.assert_close(logits[:, :4], model(source, later)[:, :4], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[:, 4:], model(source, later)[:, 4:], atol=1e-2)
    assert not torch.allclose(logits[:, 0], model(other, ids)[:, 0], atol=1e-2)


def test_the_encoder_looks_ahead():
    model, source = pair(), random_ids(TINY, 2, 7)
    other = source.clone()
    other[:, -1] = (source[:, -1] + 1) % 17
    assert not torch.allclose(model.encode(source)[:, 0], model.encode(other)[:, 0], atol=1e-3)


def test_decoding_from_memory_equals_the_forward():
    model, source, ids = pair(), random_ids(TINY, 2, 7), random_ids(TINY, 2, 6)
    torch.testing.assert_close(model.decode(ids, model.encode(source)), model(source, ids))


def test_one_token_table_serves_both_sides():
    model = pair()
    assert model.lm_head.weight is model.embeddings.tok_emb.weight
    counts = count_parameters(model)
    assert counts["token table"] == 17 * 32
    assert counts["attention"] == 2 * 3 * 4 * (32 * 32 + 32)
    assert sum(counts.values()) == sum(weight.numel() for weight in model.parameters())


def test_the_encoder_and_decoder_learn_to_reverse():
    torch.manual_seed(0)
    model = EncoderDecoder(replace(TINY, d_model=32, n_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        source = torch.randint(1, 9, (32, 4))
        target = source.flip(1)
        ids = F.pad(target[:, :-1], (1, 0))  # token 0 opens the target
        logits = model(source, ids)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == target).float().mean() > 0.9


# Errors


@pytest.mark.parametrize("name", ["vocab_size", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff"])
def test_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(TINY, **{name: 0})


def test_heads_that_do_not_divide_the_width():
    message = "d_model=16 can't be split into n_heads=3 equal heads: choose a number of heads that divides"
    with pytest.raises(ValueError, match=message):
        replace(TINY, n_heads=3)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_that_is_no_share(dropout):
    with pytest.raises(ValueError, match=f"from 0 to below 1, got {dropout}"):
        replace(TINY, dropout=dropout)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch(shape):
    message = f"no token in a batch of shape {shape}: give at least one text of one"
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(TINY)(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("ids", "span"), [([3, 17], "3 to 17"), ([-1, 5], "-1 to 5")])
def test_ids_beyond_the_vocabulary(ids, span):
    message = f"token IDs {span} don't fit into vocab_size=17 (0 to 16): take the tokenizer"
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(TINY)(torch.tensor([ids]))


def test_a_text_that_is_too_long():
    with pytest.raises(ValueError, match="13 tokens don't fit into max_seq_len=12: shorten the text"):
        GPT(TINY)(random_ids(TINY, 1, 13))


def test_a_cache_that_is_full():
    model = GPT(TINY)
    caches = [GrowingCache() for _ in model.blocks]
    model(random_ids(TINY, 1, 10), caches)
    with pytest.raises(ValueError, match="13 tokens don't fit into max_seq_len=12: shorten the text"):
        model(random_ids(TINY, 1, 3), caches)


@pytest.mark.parametrize(("targets", "span"), [([3, 17], "3 to 17"), ([-1, 5], "-1 to 5")])
def test_targets_beyond_the_vocabulary(targets, span):
    message = f"targets {span} don't fit into vocab_size=17 (0 to 16): take the tokenizer"
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(TINY).loss(random_ids(TINY, 1, 2), torch.tensor([targets]))


def test_targets_that_all_do_not_count():
    with pytest.raises(ValueError, match="all 6 targets are -100: give at least one token to predict"):
        GPT(TINY).loss(random_ids(TINY, 2, 3), torch.full((2, 3), -100))


def test_targets_must_be_as_many_as_tokens():
    with pytest.raises(
        ValueError, match=re.escape("tokens of shape (1, 3) need as many targets, got (1, 2)")
    ):
        GPT(TINY).loss(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2]]))


def test_every_block_needs_a_cache():
    with pytest.raises(ValueError, match="1 caches for 2 blocks: give one for each"):
        GPT(TINY)(torch.tensor([[1]]), [GrowingCache()])


def test_the_encoder_decoder_refuses_what_does_not_fit():
    model = EncoderDecoder(TINY)
    with pytest.raises(ValueError, match="token IDs 17 to 17 don't fit into vocab_size=17"):
        model(torch.tensor([[1]]), torch.tensor([[17]]))
    with pytest.raises(ValueError, match="13 tokens don't fit into max_seq_len=12"):
        model(torch.ones(1, 13, dtype=torch.int64), torch.tensor([[1]]))


def test_the_encoder_decoder_begins_near_a_guess():
    model, ids = EncoderDecoder(replace(TINY, d_model=64)), random_ids(TINY, 64, 8)
    loss = F.cross_entropy(model(ids, ids).flatten(0, 1), random_ids(TINY, 64, 8).flatten())
    assert loss < 2 * math.log(TINY.vocab_size)


def test_an_ignored_row_may_hold_anything():
    x, weight, targets = loss_case()
    ignored = (targets == IGNORE_INDEX)[:, None]
    expected = linear_loss(x, weight, targets)
    x = x.masked_fill(ignored, math.nan).requires_grad_()
    loss = linear_loss(x, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert x.grad.isfinite().all()


def test_the_number_of_rows_at_once_changes_no_gradient_of_bfloat16_weights():
    x, weight = torch.randn(4096, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    targets, gradients = torch.randint(16, (4096,)), []
    for n_rows in (32, 4096):
        leaf = weight.clone().requires_grad_()
        linear_loss(x, leaf, targets, n_rows=n_rows).backward()
        gradients.append(leaf.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.005 * gradients[1].norm()


def test_a_frozen_head_costs_no_gradient():
    x, weight, targets = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))
    with FlopCounterMode(display=False) as counter:
        linear_loss(x, weight, targets).backward()
    assert counter.get_total_flops() == 2 * (2 * 6 * 4 * 9)  # the logits, and the gradient of x


def test_second_derivatives_are_refused():
    x, weight, targets = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(linear_loss(x, weight, targets), x, create_graph=True)


def test_autocast_spares_double_precision():
    model, ids = GPT(TINY).double(), random_ids(TINY, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.float64


def test_padding_is_no_negative_number():
    with pytest.raises(ValueError, match="padding -1 is no number of tokens"):
        GPT(TINY)(random_ids(TINY, 2, 5), padding=torch.tensor([0, -1]))


def test_a_name_that_fits_no_part_is_not_counted_in_silence():
    model = GPT(TINY)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no part of .* fits extra\.weight"):
        count_parameters(model)
