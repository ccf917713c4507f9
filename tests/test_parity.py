import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as TheirLlamaConfig

from llmlib.gpt import GPT, GPTConfig
from llmlib.llama import LlamaConfig

GPT2_NAMES = {
    "embeddings.tok_emb": "transformer.wte",
    "embeddings.pos_emb": "transformer.wpe",
    "blocks": "transformer.h",
    "attn_norm": "ln_1",
    "attn.qkv_proj": "attn.c_attn",
    "attn.o_proj": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
}
LLAMA_NAMES = {
    "embeddings.tok_emb": "model.embed_tokens",
    "blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.": "self_attn.",
    "ffn.": "mlp.",
    "final_norm": "model.norm",
}


SMALL = dict(vocab_size=31, max_seq_len=16, d_model=24, n_layers=2, n_heads=4)

GPT2_CASES = {
    "tied": {},
    "untied": dict(tied=False),
    "one head, one layer": dict(n_heads=1, n_layers=1),
    "heads of width 1": dict(n_heads=24),
    "deep": dict(n_layers=5),
    "narrow feed-forward": dict(d_ff=7),
    "one token": dict(max_seq_len=1),
    "longer and wider": dict(max_seq_len=70, d_model=64, n_heads=8, vocab_size=101),
    "another epsilon": dict(norm_eps=1e-2),
}
LLAMA_CASES = {
    "tied": {},
    "untied": dict(tied=False),
    "grouped heads": dict(n_kv_heads=2),
    "multi-query": dict(n_kv_heads=1, tied=False),
    "a small RoPE base": dict(rope_base=100.0),
    "SmolLM2's RoPE base": dict(rope_base=100_000.0, n_kv_heads=2),
    "Llama 3's RoPE base": dict(rope_base=500_000.0, max_seq_len=40),
    "heads of width 2": dict(n_heads=12, n_kv_heads=3),
    "a feed-forward width": dict(d_ff=10),
    "biases": dict(bias=True, n_kv_heads=2),
    "deep": dict(n_layers=5),
    "one token": dict(max_seq_len=1),
    "another epsilon": dict(norm_eps=1e-2),
}


def as_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights or gradients: GPT-2 fuses queries, keys and values, and keeps matrices transposed."""
    theirs = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.cat([tensors[part] for part in parts])
            name = name.replace("q_proj", "qkv_proj")
        theirs[rename(name, GPT2_NAMES)] = tensor.T if name.endswith("_proj.weight") else tensor
    return theirs


def as_llama(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {rename(name, LLAMA_NAMES): tensor for name, tensor in tensors.items()}


def rename(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def gpt2_pair(**changes):
    config = GPTConfig(**SMALL | changes)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
            attn_implementation="eager",
        )
    )
    return random_pair(GPT(config), theirs, as_gpt2)


def llama_pair(**changes):
    config = LlamaConfig(**SMALL | changes)
    ours = GPT(config)
    theirs = LlamaForCausalLM(
        TheirLlamaConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            hidden_size=config.d_model,
            intermediate_size=ours.blocks[0].ffn.up_proj.out_features,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
            attention_bias=config.bias,
            mlp_bias=config.bias,
            tie_word_embeddings=config.tied,
            attn_implementation="eager",
        )
    )
    return random_pair(ours, theirs, as_llama)


@torch.no_grad()
def random_pair(ours: GPT, theirs: nn.Module, translate):
    """Give both models the same weights, large enough for each detail to show in the logits."""
    torch.manual_seed(0)
    for name, weight in ours.named_parameters():
        if "norm.weight" in name:
            weight.normal_(mean=1.0, std=0.3)
        else:
            weight.normal_(std=0.05 if "emb" in name else 0.2)
    copies = translate(dict(ours.named_parameters()))
    for name, weight in theirs.named_parameters():
        weight.copy_(copies.pop(name))
    assert not copies
    return ours, theirs.eval(), translate


PAIRS = [
    pytest.param(make, case, id=f"{family}: {name}")
    for family, make, cases in [("GPT-2", gpt2_pair, GPT2_CASES), ("Llama", llama_pair, LLAMA_CASES)]
    for name, case in cases.items()
]


@pytest.mark.parametrize(("make", "case"), PAIRS)
def test_logits_and_gradients(make, case):
    ours, theirs, translate = make(**case)
    ids, targets = torch.randint(ours.config.vocab_size, (2, 3, ours.config.max_seq_len))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)

    loss, expected_loss = ours.loss(ids, targets), F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected_loss.backward()
    gradients = translate({name: weight.grad for name, weight in ours.named_parameters()})
    expected_gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], atol=1e-5, rtol=1e-5, msg=lambda s, name=name: f"{name}: {s}"
        )


@pytest.mark.parametrize("make", [gpt2_pair, llama_pair])
def test_logits_behind_padding(make):
    ours, theirs, _ = make()
    ids = torch.randint(ours.config.vocab_size, (2, 9))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    logits = ours(ids, padding=torch.tensor([0, 4]))
    expected = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[1, 4:], ours(ids)[1, 4:])
