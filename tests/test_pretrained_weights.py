"""Hold loaded and saved weights to transformers, tokenizers and gguf, and the readers to any bytes."""

import json
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from functools import reduce
from http.server import BaseHTTPRequestHandler, HTTPServer

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as TheirLlamaConfig
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from llmlib import pretrained_weights, resources
from llmlib.generation import for_inference, generate, pad_left, temperature
from llmlib.gpt import GPT, GPTConfig
from llmlib.llama import LlamaConfig, interleave
from llmlib.pretrained_weights import (
    GGUF,
    GPT2_REVISIONS,
    Int8Linear,
    SmolLM2Tokenizer,
    chat_text,
    dequantize_q4_1,
    dequantize_q8_0,
    gguf_tokenizer,
    load_gguf,
    load_gpt2,
    load_llama,
    quantize,
    save_pretrained,
)
from llmlib.tokenization import gpt2_tokenizer, train_bpe

logging.disable_progress_bar()

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "2 + 2 =",
    "Water boils at",
    "My favourite colour is",
    "The opposite of hot is",
    "import numpy as",
    "In 1969, people",
    "She opened the door and",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "A haiku about rain:\n",
    "Roses are red,",
    "How do I bake bread?",
    "Paris, London, Berlin,",
    "<html>\n<head>",
    "Q: What is DNA?\nA:",
    "One, two, three,",
    "¿Cómo estás?",
]
SMALL = dict(vocab_size=31, max_seq_len=16, d_model=24, n_layers=2, n_heads=4)


@pytest.fixture(scope="module")
def file():
    return GGUF(resources.path("smollm2"))


@pytest.fixture(scope="module")
def smollm2(file):
    return load_gguf(file), gguf_tokenizer(file)


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(resources.path("smollm2"))


@torch.no_grad()
def random_model(config):
    """Make a model whose weights are large enough for each detail to show in the logits."""
    torch.manual_seed(0)
    model = GPT(config)
    for weight in model.parameters():
        weight.normal_(mean=float(weight.ndim == 1), std=0.2)
    return model


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same_logits(ours, theirs):
    ids = torch.randint(ours.config.vocab_size, (2, ours.config.max_seq_len))
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)


# ---- GGUF: what it holds ----


@given(st.binary(min_size=34 * 4, max_size=34 * 4))
def test_dequantizers_equal_gguf_bit_for_bit(data):
    for decode, kind, n_bytes in (
        (dequantize_q8_0, gguf.GGMLQuantizationType.Q8_0, 34),
        (dequantize_q4_1, gguf.GGMLQuantizationType.Q4_1, 20),
    ):
        blocks = np.frombuffer(data, np.uint8)[: 4 * n_bytes].reshape(4, n_bytes).copy()
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(blocks, kind)
        found = decode(torch.from_numpy(blocks)).numpy()
        assert ((found.view(np.int32) == expected.view(np.int32)) | np.isnan(expected)).all()
        assert (np.isnan(found) == np.isnan(expected)).all()


def test_smollm2_metadata_and_tensors_equal_gguf(file, reader):
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for key, value in fields.items():
        found = file.metadata[key]
        assert (found.tolist() if isinstance(found, memoryview) else found) == value
    assert list(file.places) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors[:12]:  # the token table, and a block and more
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = file.tensor(tensor.name)
        assert torch.equal(found.view(torch.int32), torch.from_numpy(expected.copy()).view(torch.int32))


def gguf_names(model):
    """Return the weights of a Llama as llama.cpp has them, without asking the library how."""
    d_head = model.blocks[0].attn.d_head
    weights = {"token_embd": model.embeddings.tok_emb.weight, "output_norm": model.final_norm.weight}
    if not model.config.tied:
        weights["output"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        weights |= {
            f"blk.{i}.attn_norm": block.attn_norm.weight,
            f"blk.{i}.attn_q": interleave(attn.q_proj.weight, d_head),
            f"blk.{i}.attn_k": interleave(attn.k_proj.weight, d_head),
            f"blk.{i}.attn_v": attn.v_proj.weight,
            f"blk.{i}.attn_output": attn.o_proj.weight,
            f"blk.{i}.ffn_norm": block.ffn_norm.weight,
            f"blk.{i}.ffn_gate": ffn.gate_proj.weight,
            f"blk.{i}.ffn_up": ffn.up_proj.weight,
            f"blk.{i}.ffn_down": ffn.down_proj.weight,
        }
    return {f"{name}.weight": weight.detach().numpy() for name, weight in weights.items()}


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, **extra):
    """Write a model with the gguf package; matrices are of a kind, and norms stay in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads or config.n_heads)
    writer.add_feed_forward_length(model.blocks[0].ffn.up_proj.out_features)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in extra.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, weight in gguf_names(model).items():
        stored = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA = LlamaConfig(**SMALL | dict(d_model=64, d_ff=96, n_kv_heads=2))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_that_the_gguf_package_wrote(tmp_path, kind, tied):
    kind = gguf.GGMLQuantizationType[kind]
    model = random_model(replace(LLAMA, tied=tied, rope_base=500.0, norm_eps=2.0**-10))
    write_gguf(tmp_path / "model.gguf", model, kind)
    loaded = load_gguf(GGUF(tmp_path / "model.gguf"))
    assert loaded.config == model.config
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                stored = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
                weight.copy_(torch.from_numpy(stored))
    ids = torch.randint(31, (2, 16))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (loaded.lm_head.weight is loaded.embeddings.tok_emb.weight) == tied
    loaded.loss(ids, ids).backward()  # it can be trained on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(general__architecture="mamba"), "general.architecture='mamba'"),
        (dict(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type='yarn'"),
        (dict(llama__rope__dimension_count=8), "turns 8 of 16 numbers of a head"),
        (dict(llama__block_count=3), r"blk\.2\.attn_k\.weight is missing and should be \(32, 64\), 9 such"),
        (dict(llama__block_count=1), r"blk\.1\.attn_k\.weight is \(32, 64\) and should be missing"),
        (dict(llama__block_count=10**9), "make no model .n_layers=1000000000 with 20 tensors"),
        (dict(llama__embedding_length=32), r"is \(32, 64\) and should be \(16, 32\)"),
        (dict(llama__embedding_length=2**60), "make no model"),
        (dict(llama__attention__head_count="four"), "make no model"),
        (dict(llama__attention__head_count=[4, 4]), "make no model"),
    ],
)
def test_gguf_whose_settings_do_not_fit(tmp_path, change, message):
    write_gguf(tmp_path / "model.gguf", random_model(LLAMA))
    file = GGUF(tmp_path / "model.gguf")
    file.metadata |= {key.replace("__", "."): value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        load_gguf(file)


def test_gguf_without_a_setting_or_with_no_such_tensor(tmp_path):
    write_gguf(tmp_path / "model.gguf", random_model(LLAMA))
    file = GGUF(tmp_path / "model.gguf")
    del file.metadata["llama.context_length"]
    with pytest.raises(ValueError, match=r"doesn't say its llama\.context_length"):
        load_gguf(file)
    with pytest.raises(ValueError, match=r"no tensor 'tok_emb'; there are .*token_embd\.weight"):
        file.tensor("tok_emb")


# ---- GGUF: any bytes ----

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def text(string):
    data = string if isinstance(string, bytes) else string.encode()
    return U64(len(data)) + data


def value(key, kind, data):
    return text(key) + U32(kind) + data


def entry(name, shape, kind, offset):
    return text(name) + U32(len(shape)) + b"".join(map(U64, shape)) + U32(kind) + U64(offset)


@dataclass(frozen=True)
class Small:
    """A GGUF file by its parts, each of which a test may replace."""

    magic: bytes = b"GGUF"
    version: int = 3
    values: tuple = (
        value("a.text", 8, text("é")),
        value("a.number", 4, U32(7)),
        value("a.truth", 7, b"\1"),
        value("a.list", 9, U32(5) + U64(3) + struct.pack("<3i", -1, 2, 3)),
        value("texts", 9, U32(8) + U64(2) + text("ab") + text("")),
        value("general.alignment", 4, U32(16)),
    )
    table: tuple = (
        entry("float", (3, 2), 0, 0),
        entry("half", (5,), 1, 32),
        entry("q4", (64, 1), 3, 48),
        entry("q8", (32,), 8, 96),
    )
    data: bytes = bytes(range(96)) + bytes(range(34))
    n_values: int | None = None
    n_tensors: int | None = None

    def build(self):
        n_values = len(self.values) if self.n_values is None else self.n_values
        n_tensors = len(self.table) if self.n_tensors is None else self.n_tensors
        head = self.magic + U32(self.version) + U64(n_tensors) + U64(n_values)
        head += b"".join(self.values) + b"".join(self.table)
        return head + bytes(-len(head) % 16) + self.data


SMALL_BYTES = Small().build()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file.gguf"


def read_all(path, data):
    """Read a file of these bytes: all its tensors, or None where it is refused."""
    path.write_bytes(data)
    try:
        file = GGUF(path)
    except ValueError:
        return None
    assert sum(place.n_bytes for place in file.places.values()) <= len(data)
    return {name: file.tensor(name) for name in file.places}


def test_small_file_is_read(tmp_path):
    (tmp_path / "small.gguf").write_bytes(SMALL_BYTES)
    file = GGUF(tmp_path / "small.gguf")
    assert file.metadata.pop("a.list").tolist() == [-1, 2, 3]
    expected = {"a.text": "é", "a.number": 7, "a.truth": True, "texts": ["ab", ""], "general.alignment": 16}
    assert file.metadata == expected
    shapes = {name: tuple(file.tensor(name).shape) for name in file.places}
    assert shapes == {"float": (2, 3), "half": (5,), "q4": (1, 64), "q8": (32,)}
    expected = np.frombuffer(bytes(range(24)), "<f4").reshape(2, 3)
    assert np.array_equal(file.tensor("float").numpy(), expected)


HUGE = 2**63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(magic=b"GGML"), "begins with b'GGML'"),
        (dict(version=1), "its version is 1"),
        (dict(version=1 << 24), "its version is 16777216"),
        (dict(n_values=HUGE), "bytes too early|kind"),
        (dict(n_tensors=HUGE), "too early|dimensions"),
        (dict(values=Small.values * 2), "'a.text' stands there twice"),
        (dict(table=(Small.table[0], entry("float", (4,), 0, 32))), "'float' stands there twice"),
        (dict(values=(value("k", 8, U64(HUGE)),)), "too early"),
        (dict(values=(value("k", 9, U32(4) + U64(HUGE)),)), "too early"),
        (dict(values=(value("k", 9, U32(8) + U64(HUGE)),)), "too early"),
        (dict(values=(value("k", 9, U32(9) + U64(1)),)), "the kind 9"),
        (dict(values=(value("k", 13, b""),)), "the kind 13"),
        (dict(values=(value("k", 8, text(b"\xff")),)), "can't decode byte 0xff"),
        (dict(values=(value("general.alignment", 4, U32(0)),)), "its alignment is 0"),
        (dict(values=(value("general.alignment", 8, text("x")),)), "its alignment is x"),
        (dict(table=(entry("t", (), 0, 0),)), "t has 0 dimensions"),
        (dict(table=(entry("t", (1,) * 5, 0, 0),)), "t has 5 dimensions"),
        (dict(table=(entry("t", (4,), 14, 0),)), r"t has the encoding 14, in place of one of 0 \(F32\)"),
        (dict(table=(entry("t", (0,), 0, 0),)), r"t has the shape \(0,\), which is not made of whole blocks"),
        (dict(table=(entry("t", (33,), 3, 0),)), r"t has the shape \(33,\)"),
        (dict(table=(entry("t", (4,), 0, 16),)), "t begins at byte .*, in place of"),
        (dict(table=(Small.table[0], entry("t", (4,), 0, 0))), "t begins at byte"),
        (dict(table=(entry("t", (HUGE, HUGE), 0, 0),)), "its tensors end at byte"),
        (dict(data=Small.data[:-1]), "its tensors end at byte 514, and it at byte 513"),
    ],
)
def test_gguf_that_is_damaged(tmp_path, change, message):
    path = tmp_path / "small.gguf"
    path.write_bytes(replace(Small(), **change).build())
    with pytest.raises(ValueError, match=message) as error:
        GGUF(path)
    assert str(error.value).startswith(f"{path} is not a GGUF file to read here (")
    assert str(error.value).endswith("): fetch it again")


def test_gguf_cut_off_anywhere(fuzzed):
    for n in range(len(SMALL_BYTES)):
        assert read_all(fuzzed, SMALL_BYTES[:n]) is None
    assert read_all(fuzzed, SMALL_BYTES) is not None


numbers = st.sampled_from([0, 1, 7, 8, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]) | st.integers(
    0, 300
)
positions = st.integers(0, len(SMALL_BYTES))
changes = st.one_of(
    st.tuples(st.just("set"), positions, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("set"), positions, numbers.map(U64)),
    st.tuples(st.just("set"), positions, numbers.map(lambda n: U32(n % 2**32))),
    st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), positions, st.integers(1, 40).map(bytes)),
    st.tuples(st.just("end"), positions, st.just(b"")),
)


def change(data, kind, i, new):
    if kind == "end":
        return data[:i]
    return data[:i] + (b"" if kind == "cut" else new) + data[i if kind == "insert" else i + len(new) :]


names = st.sampled_from(["a", "general.alignment", "é"]) | st.binary(max_size=4)
kinds = st.integers(0, 13) | numbers.map(lambda n: n % 2**32)
lists = st.builds(lambda kind, n, data: U32(kind) + U64(n) + data, kinds, numbers, st.binary(max_size=30))
any_value = st.builds(value, names, kinds, lists | st.binary(max_size=30) | names.map(text))
shapes = st.lists(numbers | st.sampled_from([32, 64]), max_size=5)
any_entry = st.builds(entry, names, shapes, st.sampled_from([0, 1, 3, 8, 8, 14]), numbers | st.just(32))
counts = st.none() | numbers
mutated = st.lists(changes, min_size=1, max_size=4)
built = st.builds(
    Small,
    values=st.lists(any_value, max_size=3).map(tuple) | st.just(Small.values),
    table=st.lists(any_entry, max_size=4).map(tuple),
    data=st.binary(max_size=120),
    n_values=counts,
    n_tensors=counts,
)
damaged = st.one_of(
    mutated.map(lambda made: reduce(lambda data, new: change(data, *new), made, SMALL_BYTES)),
    built.map(Small.build),
    st.binary(max_size=200).map(lambda data: SMALL_BYTES[:8] + data),
    st.binary(max_size=60),
)


@settings(max_examples=400, deadline=None)
@given(data=damaged)
def test_gguf_reader_survives_any_bytes(fuzzed, data):
    read_all(fuzzed, data)


# Any values where a Llama's settings stand: a model, or a ValueError.
setting = st.one_of(numbers, st.booleans(), st.floats(), st.text(max_size=3), st.just(memoryview(b"ab")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_gguf(path, random_model(LLAMA))
    return GGUF(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_gguf_settings_of_any_kind(tiny, data):
    kept = dict(tiny.metadata)
    keys = [key for key in kept if key.startswith("llama.")] + ["llama.rope.dimension_count"]
    try:
        tiny.metadata |= data.draw(st.dictionaries(st.sampled_from(keys), setting, min_size=1, max_size=2))
        load_gguf(tiny)
    except ValueError:
        pass
    finally:
        tiny.metadata = kept


# ---- SmolLM2 ----


def test_smollm2_predicts_and_continues_as_in_transformers(smollm2, reader, monkeypatch):
    model, tokenizer = smollm2
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)  # which takes seconds, and transformers two
    path = resources.path("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids, padding = pad_left([tokenizer.encode(prompt) for prompt in PROMPTS], pad_id=0)
    written = generate(model, ids, 8, [temperature(0.0)], padding=padding)
    real = torch.arange(written.shape[1]) >= padding[:, None]  # (B, T)
    with torch.no_grad():
        ours = model(written, padding=padding)[real].log_softmax(-1)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        output = theirs(written, attention_mask=real.long(), position_ids=positions)
        expected = output.logits[real].log_softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    # Greedy decoding is one token after the other that their model finds likeliest, given those before.
    assert torch.equal(written[:, -8:], output.logits.argmax(-1)[:, -9:-1])


def test_smollm2_loads_in_little_memory():
    if sys.platform == "win32":
        pytest.skip("the module resource is not there on Windows")
    script = """
import resource, torch
from llmlib.gpt import GPT
from llmlib.llama import LLAMA_TINY
from llmlib.pretrained_weights import load_smollm2
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.device("meta"):
    GPT(LLAMA_TINY)
before = peak()
model, _ = load_smollm2()
print(peak() - before, sum(p.numel() for p in model.parameters()))
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    used, n_parameters = map(int, ran.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert n_parameters == 134_515_008
    assert used * unit < 1.2 * 4 * n_parameters


@pytest.fixture(scope="module")
def reference(reader):
    """Return SmolLM2's tokenizer as its own tokenizer.json describes it."""
    found = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")}
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: i for i, token in enumerate(found["tokens"])}
    theirs = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in found["merges"]]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(
        [token for token, kind in zip(found["tokens"], kinds, strict=True) if kind == 3]
    )
    return theirs


# Digits of Unicode 17, which tokenizers knows and the pinned regex does not.
newest = "".join(map(chr, [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]))
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=newest))
pieces = [
    " ",
    "  ",
    "\n",
    "\t",
    "1",
    "23",
    "½",
    "٣",
    "don't",
    "'s",
    "!\x04!",
    "a\U00050000b",
    "<|im_start|>",
    "<|im",
]
dense = st.lists(st.sampled_from([*pieces, "hello", " world", "é", "日本"])).map("".join)


@settings(deadline=None)
@given(any_text | dense | st.tuples(dense, any_text, dense).map("".join))
def test_smollm2_tokenizer_equals_tokenizers(smollm2, reference, string):
    _, tokenizer = smollm2
    ids = tokenizer.encode(string, allowed_special="all")
    assert ids == reference.encode(string).ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_smollm2_tokenizer_drops_only_bytes_that_it_lacks(smollm2, tmp_path):
    _, tokenizer = smollm2
    assert tokenizer.vocab_size == 49_152
    string = "".join(map(chr, range(0x300))) + " 1234 日本 🙂 \U0010ffff"
    lost = "\x04\x06\x13\x14\x16\x1d"
    assert tokenizer.decode(tokenizer.encode(string)) == string.translate(dict.fromkeys(map(ord, lost)))
    assert tokenizer.encode("!\x04!") == tokenizer.encode("!!")
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = SmolLM2Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(string, "all") == tokenizer.encode(string, "all")
    with pytest.raises(ValueError, match="tiktoken needs a token for each byte"):
        tokenizer.to_tiktoken()


def test_gguf_without_smollm2s_tokenizer(tiny):
    with pytest.raises(ValueError, match="splits texts by the rules of None: only those of 'smollm'"):
        gguf_tokenizer(tiny)
    tiny.metadata["tokenizer.ggml.pre"] = "smollm"
    with pytest.raises(
        ValueError, match=r"holds no whole tokenizer .'tokenizer\.ggml\.tokens'.: fetch it again"
    ):
        gguf_tokenizer(tiny)
    tiny.metadata |= {f"tokenizer.ggml.{name}": ["a"] for name in ("tokens", "token_type", "merges")}
    with pytest.raises(ValueError, match="holds no whole tokenizer"):
        gguf_tokenizer(tiny)


roles = st.sampled_from(["system", "user", "assistant"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": any_text | dense}), max_size=4)


@settings(deadline=None)
@given(messages, st.booleans())
def test_chat_text_equals_the_template_of_the_file(file, conversation, reply):
    template = file.metadata["tokenizer.chat_template"]
    (expected,), _ = render_jinja_template(
        conversations=[conversation], chat_template=template, add_generation_prompt=reply
    )
    assert chat_text(conversation, reply=reply) == expected


def test_chat_text_of_something_else():
    with pytest.raises(ValueError, match=r"the message {'role': 'user'} needs a 'role' and a 'content'"):
        chat_text([{"role": "user"}])


# ---- folders of Hugging Face: loading ----


def save_their_gpt2(path, **changes):
    sizes = dict(vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes | changes)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(mean=float(weight.ndim == 1), std=0.2)
    theirs.save_pretrained(path)
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(n_head=1, n_layer=1),
        dict(n_layer=12, n_embd=8),
        dict(n_inner=7, n_embd=40, n_positions=33, vocab_size=101),
        dict(tie_word_embeddings=False, layer_norm_epsilon=1e-2),
    ],
    ids=str,
)
def test_gpt2_that_transformers_saved(tmp_path, changes):
    theirs = save_their_gpt2(tmp_path, **changes)
    assert_same_logits(load_gpt2(tmp_path), theirs)


def rewrite(path, edit):
    weights = load_file(path / "model.safetensors")
    save_file(edit(weights), path / "model.safetensors")


def test_gpt2_as_the_hub_has_it(tmp_path):
    theirs = save_their_gpt2(tmp_path)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()} | masks)
    old = dict(vocab_size=31, n_positions=16, n_ctx=16, n_embd=24, n_layer=2, n_head=4, model_type="gpt2")
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same_logits(load_gpt2(tmp_path), theirs)


def test_llama_that_transformers_saved(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
    config = TheirLlamaConfig(
        vocab_size=31,
        max_position_embeddings=16,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=300.0),
        **sizes,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_llama(tmp_path), theirs)


NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != NAME}, r"h\.0\.attn\.c_attn\.weight is missing and"),
        (lambda w: w | {"extra": torch.ones(3)}, r"extra is \(3,\) and should be missing, 1 such tensors"),
        (lambda w: w | {NAME: torch.ones(24, 71)}, r"is \(24, 71\) and should be \(24, 72\)"),
        (lambda w: w | {NAME: w[NAME].T.contiguous()}, r"is \(72, 24\) and should be \(24, 72\)"),
    ],
)
def test_gpt2_with_a_wrong_tensor(tmp_path, edit, message):
    save_their_gpt2(tmp_path)
    rewrite(tmp_path, edit)
    with pytest.raises(ValueError, match=message) as error:
        load_gpt2(tmp_path)
    assert str(tmp_path) in str(error.value) and str(error.value).endswith("take a whole checkpoint")


@pytest.mark.parametrize(
    "edit",
    [lambda data: data[:-1], lambda data: data[:100], lambda _: b"", lambda _: b"PK\3\4 a zip file" * 99],
)
def test_gpt2_file_that_is_none(tmp_path, edit):
    save_their_gpt2(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .*: fetch or save it again"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a configuration .*: fetch or save it again"),
        ("[]", "is not a configuration"),
        ("{}", "doesn't say its n_embd, n_head, n_layer, n_positions, vocab_size: take a whole checkpoint"),
        ('{"model_type": "bert"}', "has model_type='bert': this course's model has 'gpt2'"),
        ('{"activation_function": "relu"}', "has activation_function='relu'"),
        (dict(n_head=5), "make no model .d_model=24 can't be split into n_heads=5"),
        (dict(n_embd="wide"), "make no model"),
        (dict(n_layer=10**12), "make no model .n_layers=1000000000000 with 28 tensors"),
        (dict(vocab_size=2**70), "make no model"),
    ],
)
def test_gpt2_with_wrong_settings(tmp_path, text, message):
    save_their_gpt2(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path)


def test_gpt2_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"gpt3 has no config\.json: give a folder .* gpt2, gpt2-medium"
    ):
        load_gpt2(tmp_path / "gpt3")
    save_their_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_gpt2(tmp_path)


# ---- folders of Hugging Face: the hub ----


class Hub(BaseHTTPRequestHandler):
    """Serve one folder as huggingface.co would, at the pinned revision alone."""

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        self.server.asked.append(f"{self.command} {self.path}")
        repository, _, rest = self.path.removeprefix("/openai-community/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = self.server.folder / name
        if GPT2_REVISIONS.get(repository) != revision or not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: self.server.n_bytes])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked, server.n_bytes = tmp_path / "hub", [], None
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_gpt2_by_name_is_fetched_once(hub):
    theirs = save_their_gpt2(hub.folder)
    assert_same_logits(load_gpt2("gpt2-medium"), theirs)
    hub.asked.clear()
    assert_same_logits(load_gpt2("gpt2-medium"), theirs)
    assert hub.asked == []


def test_gpt2_by_name_without_a_network(hub, monkeypatch):
    closed = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", closed)
    with pytest.raises(
        OSError, match=r"gpt2 could not be fetched from huggingface\.co .*: try again with a net"
    ):
        load_gpt2("gpt2")


def test_gpt2_that_the_hub_does_not_have(hub):
    with pytest.raises(
        OSError, match=r"gpt2-xl could not be fetched .*404.*config\.json and model\.safetensors"
    ):
        load_gpt2("gpt2-xl")


# ---- folders of Hugging Face: saving ----


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(**SMALL),
        GPTConfig(**SMALL, tied=False, bias=False, d_ff=7, norm_eps=1e-2),
        GPTConfig(**SMALL | dict(n_layers=12, n_heads=1, max_seq_len=5), dropout=0.1),
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, tied=False, n_kv_heads=2, bias=True, d_ff=10),
        LlamaConfig(**SMALL | dict(n_layers=12), n_kv_heads=1, rope_base=300.0, norm_eps=1e-2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_saved_model_loads_in_transformers_and_here(tmp_path, config):
    model = random_model(config).eval()
    save_pretrained(model, tmp_path / "new" / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert_same_logits(model, theirs)
    assert theirs.config.tie_word_embeddings == config.tied
    load = load_llama if isinstance(config, LlamaConfig) else load_gpt2
    assert_same_logits(load(tmp_path / "new" / "folder"), theirs)


def test_model_with_parts_of_its_own_is_not_saved(tmp_path):
    class OwnConfig(GPTConfig):
        pass

    with pytest.raises(ValueError, match="the parts of OwnConfig have no name in the format of Hugging Face"):
        save_pretrained(GPT(OwnConfig(**SMALL)), tmp_path)


def test_saving_that_fails_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = random_model(GPTConfig(**SMALL)).eval()
    save_pretrained(model, tmp_path)

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(pretrained_weights, "save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_pretrained(random_model(GPTConfig(**SMALL | dict(d_model=12))), tmp_path)
    assert_same_logits(load_gpt2(tmp_path), model)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.fixture(scope="module", params=["trained", "gpt2", "smollm2"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    story = "the cat sat on the mat, and the rat's hat sat on 12 cats.\n" * 9
    if request.param == "smollm2":
        tokenizer = request.getfixturevalue("smollm2")[1]
    else:
        tokenizer = gpt2_tokenizer() if request.param == "gpt2" else train_bpe(story, 300, ["<é|>", "<|im"])
    save_pretrained(GPT(GPTConfig(**SMALL)), path, tokenizer)
    return tokenizer, AutoTokenizer.from_pretrained(path)


@settings(deadline=None)
@given(st.lists(any_text | dense | st.just("<é|>") | st.just("<|endoftext|>")).map("".join))
def test_saved_tokenizer_gives_the_same_ids(saved, string):
    ours, theirs = saved
    assert theirs.encode(string) == ours.encode(string, allowed_special="all")


# ---- weights in 8 bits ----

# Widths of whole blocks of 16 numbers, for which there is a product of its own, and others.
WIDTHS = [(16, 1), (48, 31), (576, 192), (1, 1), (20, 7), (24, 33)]


def layer_in_8_bits(d_in, d_out, bias=True):
    torch.manual_seed(0)
    layer = torch.nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.logspace(-20, 20, d_out)[:, None]  # rows of all sizes
    return layer, Int8Linear(layer)


@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_weights_in_8_bits_are_off_by_half_a_step_at_most(d_in, d_out):
    layer, small = layer_in_8_bits(d_in, d_out)
    assert small.q.dtype == torch.int8 and small.q.abs().amax(dim=1).eq(127).all()
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((small.weight - layer.weight).abs() <= 0.502 * step).all()  # the scale has 8 bits itself
    layer.weight = torch.nn.Parameter(small.weight)
    assert torch.equal(Int8Linear(layer).q, small.q) and torch.equal(Int8Linear(layer).weight, small.weight)


def test_row_of_zeros_in_8_bits_stays_one():
    layer = torch.nn.Linear(32, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    small = Int8Linear(layer)
    assert small.scale.gt(0).all()
    assert torch.equal(small.weight[0], torch.zeros(32)) and torch.equal(
        small(torch.ones(32))[0], layer.bias[0]
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@torch.no_grad()
def test_layer_in_8_bits_multiplies_as_its_weights_do(d_in, d_out, bias):
    _, small = layer_in_8_bits(d_in, d_out, bias)
    size = small.weight.norm(dim=1) + 1
    for shape in [(), (0,), (1,), (3,), (2, 8), (17,), (2, 50)]:
        x = torch.randn(*shape, d_in)
        expected = torch.nn.functional.linear(x, small.weight, small.bias)
        error = (small(x) - expected) / size
        assert error.shape == expected.shape and (error.abs() < 0.02).all()
    for x in (torch.randn(1, d_in), torch.randn(17, d_in)):
        assert small.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_layer_in_8_bits_takes_numbers_from_any_place():
    _, small = layer_in_8_bits(48, 5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 200).to(dtype)
        for start in range(33):
            piece = x[:, start : start + 48]
            assert torch.equal(small(piece), small(piece.clone()))
        turned = torch.randn(48, 3).to(dtype).T
        assert torch.equal(small(turned), small(turned.contiguous()))


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(**SMALL | dict(d_model=32)),
        GPTConfig(**SMALL),
        LlamaConfig(**SMALL | dict(d_model=64), n_kv_heads=2),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.d_model}",
)
@torch.no_grad()
def test_model_in_8_bits_is_near_and_writes(config):
    model = random_model(config).eval()
    small = quantize(model)
    kinds = {type(module) for module in small.modules()}
    assert Int8Linear in kinds and torch.nn.Linear not in kinds
    ids = torch.randint(31, (2, 8))
    expected = logits(for_inference(model), ids)
    assert ((logits(small, ids) - expected).norm() / expected.norm()).item() < 0.05
    written = generate(small, ids[:1], 8, [temperature(0.0)])
    # Each token is the one that all of the text together makes likeliest, or as good as that.
    found = logits(small, written)[0, 7:-1]
    chosen = found.gather(1, written[0, 8:, None]).squeeze(1)
    assert (found.amax(dim=1) - chosen < 0.1 * found.std(dim=1)).all()
    assert small.loss(ids, ids).isfinite()
