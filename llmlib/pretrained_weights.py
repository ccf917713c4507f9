"""Load weights that others trained into this course's own model, save its own for others, and shrink them."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float, Float32, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlib import resources
from llmlib.generation import for_inference
from llmlib.gpt import GPT, GPTConfig
from llmlib.llama import LlamaConfig, deinterleave
from llmlib.tokenization import BPETokenizer, visible_bytes

# The commit of each repository openai-community/… that the course was written with.
GPT2_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# What a weight is called here, in GPT-2 and in Llama at Hugging Face, and in a Llama's GGUF file.
_WEIGHTS = """
    embeddings.tok_emb   wte           model.embed_tokens         token_embd
    embeddings.pos_emb   wpe           -                          -
    blocks               h             model.layers               blk
    attn_norm            ln_1          input_layernorm            attn_norm
    attn.q_proj          attn.c_attn   self_attn.q_proj           attn_q
    attn.k_proj          attn.c_attn   self_attn.k_proj           attn_k
    attn.v_proj          attn.c_attn   self_attn.v_proj           attn_v
    attn.o_proj          attn.c_proj   self_attn.o_proj           attn_output
    ffn_norm             ln_2          post_attention_layernorm   ffn_norm
    ffn.gate_proj        -             mlp.gate_proj              ffn_gate
    ffn.up_proj          mlp.c_fc      mlp.up_proj                ffn_up
    ffn.down_proj        mlp.c_proj    mlp.down_proj              ffn_down
    final_norm           ln_f          model.norm                 output_norm
    lm_head              lm_head       lm_head                    output
"""
# The same for the settings of a configuration.
_SETTINGS = """
    vocab_size    vocab_size            vocab_size                llama.vocab_size
    max_seq_len   n_positions           max_position_embeddings   llama.context_length
    d_model       n_embd                hidden_size               llama.embedding_length
    n_layers      n_layer               num_hidden_layers         llama.block_count
    n_heads       n_head                num_attention_heads       llama.attention.head_count
    n_kv_heads    -                     num_key_value_heads       llama.attention.head_count_kv
    d_ff          n_inner               intermediate_size         llama.feed_forward_length
    rope_base     -                     rope_theta                llama.rope.freq_base
    norm_eps      layer_norm_epsilon    rms_norm_eps              llama.attention.layer_norm_rms_epsilon
    tied          tie_word_embeddings   tie_word_embeddings       tied
    bias          -                     attention_bias            -
    bias          -                     mlp_bias                  -
"""


def _columns(table: str, theirs: int) -> list[tuple[str, str]]:
    """Return our name and theirs in each line of a table, where they have one."""
    rows = [line.split() for line in table.strip().splitlines()]
    return [(row[0], row[theirs]) for row in rows if row[theirs] != "-"]


class Family:
    """Say how a kind of checkpoint, a column of the tables, names what this course has.

    `weights` gives their name for ours, `settings` ours for theirs. `defaults` hold where a file leaves a
    setting out, and `fixed` are those that our parts take for granted.
    """

    def __init__(
        self, config: type[GPTConfig], column: int, defaults: dict[str, Any], fixed: dict[str, Any]
    ) -> None:
        self.config, self.defaults, self.fixed = config, defaults, fixed
        self.weights = dict(_columns(_WEIGHTS, column))
        self.settings = {theirs: ours for ours, theirs in _columns(_SETTINGS, column)}

    def rename(self, name: str) -> str:
        """Return their name for our weight `name`."""
        for ours, theirs in self.weights.items():
            name = name.replace(ours, theirs)
        return name


GPT2 = Family(
    GPTConfig,
    1,
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    fixed={
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
)
LLAMA = Family(
    LlamaConfig,
    2,
    defaults={
        "num_key_value_heads": None,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    fixed={"model_type": "llama", "hidden_act": "silu", "rope_type": "default", "rope_scaling": None},
)
GGUF_LLAMA = Family(
    LlamaConfig,
    3,
    defaults={"llama.attention.head_count_kv": None, "llama.rope.freq_base": 10_000.0},
    fixed={"general.architecture": "llama", "llama.rope.scaling.type": "none"},
)


def dequantize_q8_0(blocks: UInt8[Tensor, "N 34"]) -> Float32[Tensor, "N 32"]:
    """Multiply each block's 32 whole numbers from −128 to 127 by its scale, a float16.

    `block_q8_0` in github.com/ggml-org/ggml, src/ggml-common.h.
    """
    d, q = blocks.split([2, 32], dim=1)  # (N, 2), (N, 32)
    return q.view(torch.int8) * d.view(torch.float16).float()


def dequantize_q4_1(blocks: UInt8[Tensor, "N 20"]) -> Float32[Tensor, "N 32"]:
    """Multiply each block's 32 whole numbers from 0 to 15 by its scale, and add its minimum, both float16.

    `block_q4_1` in github.com/ggml-org/ggml, src/ggml-common.h.
    """
    d, low, q = blocks.split([2, 2, 16], dim=1)  # (N, 2), (N, 2), (N, 16)
    q = torch.cat([q & 15, q >> 4], dim=1)  # (N, 32): the lower halves of the bytes, then the upper
    return q * d.view(torch.float16).float() + low.view(torch.float16).float()


class Encoding(NamedTuple):
    """Say how a tensor is stored: `n_bytes` for each block of `n_weights`."""

    name: str
    n_weights: int
    n_bytes: int
    decode: Callable[[Tensor], Tensor]


ENCODINGS = {
    0: Encoding("F32", 1, 4, lambda blocks: blocks.view(torch.float32)),
    1: Encoding("F16", 1, 2, lambda blocks: blocks.view(torch.float16).float()),
    3: Encoding("Q4_1", 32, 20, dequantize_q4_1),
    8: Encoding("Q8_0", 32, 34, dequantize_q8_0),
}
# The kinds of metadata: numbers, by their letters in Python's `struct`, texts and lists.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class Place(NamedTuple):
    """Say where in a file a tensor lies: from byte `start` on."""

    shape: tuple[int, ...]
    encoding: Encoding
    start: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) // self.encoding.n_weights * self.encoding.n_bytes


class GGUF:
    """Open a GGUF file: `metadata` by key, the `places` of its tensors by name, each tensor when asked for.

    A file that is damaged, or of a kind that this course doesn't read, raises ValueError. Nothing is laid out
    for bytes that aren't there. The format: github.com/ggml-org/ggml, docs/gguf.md.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.places: dict[str, Place] = {}
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._bytes,
            ):
                self._read()
        except ValueError as error:
            raise ValueError(f"{path} is not a GGUF file to read here ({error}): fetch it again") from error

    def tensor(self, name: str) -> Float32[Tensor, "*shape"]:
        """Read one tensor from the file, as float32."""
        if name not in self.places:
            raise ValueError(f"{self.path} has no tensor {name!r}; there are {', '.join(self.places)}")
        place = self.places[name]
        stored = np.fromfile(self.path, np.uint8, place.n_bytes, offset=place.start)
        blocks = torch.from_numpy(stored).view(-1, place.encoding.n_bytes)  # (N, bytes of a block)
        return place.encoding.decode(blocks).view(place.shape)

    def _read(self) -> None:
        if (magic := self._take(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic} in place of b'GGUF'")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, in place of 2 or 3")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        for _ in range(n_values):
            key, kind = self._text(), self._number("I")
            self.metadata[_new(key, self.metadata)] = self._value(kind)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment}, in place of a number of bytes")
        table = [self._entry() for _ in range(n_tensors)]
        start = end = _round_up(self._bytes.tell(), alignment)
        for name, shape, encoding, offset in table:
            place = Place(shape, encoding, _round_up(end, alignment))
            if start + offset != place.start:
                raise ValueError(f"{name} begins at byte {start + offset}, in place of {place.start}")
            end = place.start + place.n_bytes
            self.places[_new(name, self.places)] = place
        if end > len(self._bytes):
            raise ValueError(f"its tensors end at byte {end}, and it at byte {len(self._bytes)}")

    def _entry(self) -> tuple[str, tuple[int, ...], Encoding, int]:
        """Read a line of the table of tensors: name, shape, encoding, and offset from the first."""
        name, n_dims = self._text(), self._number("I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"{name} has {n_dims} dimensions, in place of 1 to 4")
        shape = tuple(reversed(self._numbers("Q", n_dims)))  # theirs begins with the innermost
        kind, offset = self._number("I"), self._number("Q")
        if kind not in ENCODINGS:
            known = ", ".join(f"{i} ({encoding.name})" for i, encoding in ENCODINGS.items())
            raise ValueError(f"{name} has the encoding {kind}, in place of one of {known}")
        if min(shape) < 1 or shape[-1] % ENCODINGS[kind].n_weights:
            raise ValueError(f"{name} has the shape {shape}, which is not made of whole blocks")
        return name, shape, ENCODINGS[kind], offset

    def _value(self, kind: int) -> Any:
        """Read a number, a text, or a list of either: numbers stay packed, as a memoryview."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            kind, n = self._number("I"), self._number("Q")
            if kind in _NUMBERS:
                return self._numbers(_NUMBERS[kind], n)
            if kind == _TEXT:
                return [self._text() for _ in range(n)]
        raise ValueError(f"the kind {kind} of metadata is none that can stand there")

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _number(self, code: str) -> int | float | bool:
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, n: int) -> memoryview:
        return memoryview(self._take(n * np.dtype(code).itemsize)).cast(code)

    def _take(self, n: int) -> bytes:
        """Read `n` bytes, after a look at whether they are there."""
        left = len(self._bytes) - self._bytes.tell()
        if n > left:
            raise ValueError(f"it ends {n - left} bytes too early")
        return self._bytes.read(n)


def _new(name: str, names: Mapping[str, Any]) -> str:
    if name in names:
        raise ValueError(f"{name!r} stands there twice")
    return name


def _round_up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def load_gguf(file: GGUF) -> GPT:
    """Load a Llama from a GGUF file, whose queries and keys are interleaved; ValueError on anything else."""
    found = {**file.metadata, "tied": "output.weight" not in file.places}
    shapes = {name: place.shape for name, place in file.places.items()}
    model = _make_empty(GGUF_LLAMA, found, shapes, file.path)
    d_head = model.blocks[0].attn.d_head
    if (n_turned := found.get("llama.rope.dimension_count", d_head)) != d_head:
        raise ValueError(f"{file.path} turns {n_turned} of {d_head} numbers of a head: this model turns all")

    def read(name: str) -> Tensor:
        weight = file.tensor(GGUF_LLAMA.rename(name))
        return deinterleave(weight, d_head) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight

    return _fill(model, read)


class SmolLM2Tokenizer(BPETokenizer):
    """Split numbers into single digits, and the rest as GPT-2 does.

    21 bytes have no token: 13 never stand in UTF-8, six are control characters, and 0xF1 and 0xF2 begin
    characters that are not in use.
    """

    pattern = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
    dropped = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])


def load_smollm2() -> tuple[GPT, SmolLM2Tokenizer]:
    """Load SmolLM2-135M-Instruct, a small chat model, with its tokenizer.

    Allal et al. 2025, arXiv:2502.02737.
    """
    file = GGUF(resources.path("smollm2"))
    return load_gguf(file), gguf_tokenizer(file)


def gguf_tokenizer(file: GGUF) -> SmolLM2Tokenizer:
    """Make the tokenizer that a GGUF file of SmolLM2 holds; ValueError where it holds another."""
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre != "smollm":
        raise ValueError(f"{file.path} splits texts by the rules of {pre!r}: only those of 'smollm' are here")
    byte_of = visible_bytes()

    def to_bytes(token: str) -> bytes:
        return bytes([byte_of[character] for character in token])

    try:
        names = ("tokens", "token_type", "merges")
        tokens, kinds, merges = (file.metadata[f"tokenizer.ggml.{name}"] for name in names)
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 3}
        vocab = {i: to_bytes(token) for i, token in enumerate(tokens) if token not in special}
        pairs = [(to_bytes(left), to_bytes(right)) for left, right in map(str.split, merges)]
        return SmolLM2Tokenizer(vocab, pairs, special)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file.path} holds no whole tokenizer ({error}): fetch it again") from error


def chat_text(messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
    """Write a conversation as SmolLM2 has learned to read it; with `reply`, up to where its answer begins.

    A message has a "role" (system, user or assistant) and a "content". `SMOLLM2_SYSTEM` comes first unless
    the messages begin with a system message of their own. Encode the text with `allowed_special="all"`.
    """
    for message in messages:
        if not message.keys() >= {"role", "content"}:
            raise ValueError(f"the message {message} needs a 'role' and a 'content'")
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SMOLLM2_SYSTEM}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if reply else "")


def load_gpt2(name_or_path: str | os.PathLike = "gpt2") -> GPT:
    """Load GPT-2 by its name, a key of `GPT2_REVISIONS`, or from a folder in the format of Hugging Face.

    By name, it is fetched once (0.5 to 6.4 GB). Dropout is off. OSError without a network or a file;
    ValueError on a damaged file, and on a checkpoint that isn't GPT-2. Radford et al. 2019.
    """
    if name_or_path in GPT2_REVISIONS:
        return _load_folder(_fetch(str(name_or_path)), GPT2)
    return _load_folder(Path(name_or_path), GPT2)


def load_llama(path: str | os.PathLike) -> GPT:
    """Load a Llama from a folder in the format of Hugging Face; errors as in `load_gpt2`."""
    return _load_folder(Path(path), LLAMA)


def save_pretrained(model: GPT, path: str | os.PathLike, tokenizer: BPETokenizer | None = None) -> None:
    """Write a folder that `transformers` loads: `AutoModelForCausalLM` and, of a tokenizer, `AutoTokenizer`.

    ValueError on a model with parts that have no name there.
    """
    families = {family.config: family for family in (GPT2, LLAMA)}
    if type(model.config) not in families:
        raise ValueError(
            f"the parts of {type(model.config).__name__} have no name in the format of Hugging Face"
        )
    family, folder = families[type(model.config)], Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())
    if family is GPT2 and not model.config.bias:  # GPT-2 always has them
        layers = [name for name in weights if name.endswith("_proj.weight")]
        weights |= {
            name.replace("weight", "bias"): weights[name].new_zeros(len(weights[name])) for name in layers
        }
    weights = {name: w.detach().contiguous() for name, w in _to_theirs(weights, family).items()}
    with resources.write_beside(folder / "model.safetensors") as new:
        save_file(weights, new, metadata={"format": "pt"})
    _write_json(folder / "config.json", _settings(model, family))
    if tokenizer is not None:
        _write_json(folder / "tokenizer.json", _tokenizer_settings(tokenizer))
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


class Int8Linear(nn.Module):
    """Keep a layer's weights as whole numbers from −127 to 127, with a scale for each row.

    Most of the time of writing is the way of the weights from memory, and these are a quarter of float32. The
    product with up to 16 vectors is in bfloat16, with more in the type of the vectors.
    Dettmers et al. 2022, section 2.1, arXiv:2208.07339, who round the vectors as well.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        smallest = torch.finfo(torch.bfloat16).tiny  # where a row is all zeros
        self.scale = nn.Buffer((weight.abs().amax(dim=1) / 127).clamp(min=smallest).bfloat16())
        q = (weight / self.scale[:, None]).round().clamp(-127, 127)
        self.q = nn.Buffer(q.to(torch.int8).contiguous())
        self.bias = layer.bias

    @property
    def weight(self) -> Float32[Tensor, "N C"]:
        """Make the weights that the whole numbers stand for, anew each time."""
        return self.q * self.scale[:, None].float()

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B N"]:
        rows = x.reshape(-1, self.q.shape[1])  # (R, C)
        # PyTorch's product reads 16 numbers at a time, from even places, without a look at where they end:
        # other widths and places crash. On Windows it is slow.
        if len(rows) > 16 or rows.shape[1] % 16 or x.device.type != "cpu" or os.name == "nt":
            parts = [F.linear(x, q.to(x.dtype)) for q in self.q.split(1024)]  # which fit into a CPU's cache
            y = torch.cat(parts, dim=-1) * self.scale  # (B, N)
        else:
            rows = rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            y = torch._weight_int8pack_mm(rows, self.q, self.scale.bfloat16())  # (R, N)
            y = y.to(x.dtype).view(*x.shape[:-1], len(self.q))  # (B, N)
        return y if self.bias is None else y + self.bias


def quantize(model: GPT) -> GPT:
    """Return a copy of `model` like that of `for_inference`, with weights in 8 bits: less than half its size.

    All layers become `Int8Linear`, the output head too; the token table stays as it is.
    """
    small = for_inference(model)
    for module in [*small.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer))
    return small


def _fetch(name: str) -> Path:
    """Return the folder of a GPT-2 that huggingface_hub fetched, now or before."""
    repository, revision = f"openai-community/{name}", GPT2_REVISIONS[name]
    files = ("config.json", "model.safetensors")
    try:
        try:
            fetched = [
                hf_hub_download(repository, f, revision=revision, local_files_only=True) for f in files
            ]
        except LocalEntryNotFoundError:
            # Without a network this fails at once; the download would try for half a minute.
            get_hf_file_metadata(hf_hub_url(repository, files[0], revision=revision))
            fetched = [hf_hub_download(repository, f, revision=revision) for f in files]
    except (OSError, httpx.HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{name} could not be fetched from huggingface.co ({reason}): try again with a network, or put "
            f"{' and '.join(files)} of {repository} into a folder, and give load_gpt2 its path"
        ) from error
    return Path(fetched[0]).parent


def _load_folder(folder: Path, family: Family) -> GPT:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: give a folder that save_pretrained wrote, or the name of a GPT-2: "
                f"{', '.join(GPT2_REVISIONS)}"
            )
    path = folder / "model.safetensors"
    found = _read_settings(folder / "config.json")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # The hub's GPT-2 has no "transformer." before its names, and keeps causal masks as well.
            names = {name.removeprefix("transformer."): name for name in file.keys()}  # noqa: SIM118
            shapes = {
                name: tuple(file.get_slice(full_name).get_shape())
                for name, full_name in names.items()
                if not name.endswith((".attn.bias", ".attn.masked_bias"))
            }
            model = _make_empty(family, found, shapes, path)
            return _fill(model, lambda name: _from_theirs(name, lambda n: file.get_tensor(names[n]), family))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): fetch or save it again"
        ) from error


def _read_settings(path: Path) -> dict[str, Any]:
    """Read a config.json; those of its settings that stand one level deeper come up."""
    try:
        settings = json.loads(path.read_bytes())
        return {**settings, **(settings.get("rope_parameters") or {})}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a configuration ({error}): fetch or save it again") from error


def _make_empty(
    family: Family, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> GPT:
    """Make the model that the settings describe, on no memory, after a look at whether the tensors fit it."""
    values = _translate(family, found, path)
    try:
        if values["n_layers"] > len(shapes):  # so that nobody's number makes a billion blocks
            raise ValueError(f"n_layers={values['n_layers']} with {len(shapes)} tensors")
        with torch.device("meta"):
            model = GPT(family.config(**values))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the settings of {path} make no model ({error}): take a whole checkpoint"
        ) from error
    weights = _to_theirs(dict(model.named_parameters()), family)
    expected = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wrong := [name for name in sorted(expected | shapes) if expected.get(name) != shapes.get(name)]:
        there, here = (sizes.get(wrong[0], "missing") for sizes in (shapes, expected))
        raise ValueError(
            f"{path} doesn't fit its own settings: {wrong[0]} is {there} and should be {here}, "
            f"{len(wrong)} such tensors in all; take a whole checkpoint"
        )
    return model


def _translate(family: Family, found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return their settings under our names; ValueError on those that our parts can't follow."""
    settings = {**family.defaults, **found}
    for name, value in family.fixed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path} has {name}={settings[name]!r}: this course's model has {value!r}")
    if missing := family.settings.keys() - settings.keys():
        raise ValueError(f"{path} doesn't say its {', '.join(sorted(missing))}: take a whole checkpoint")
    return {ours: settings[theirs] for theirs, ours in family.settings.items()}


@torch.no_grad()
def _fill(model: GPT, read: Callable[[str], Tensor]) -> GPT:
    """Give memory to an empty model, and write its weights there one by one: only one is ever there twice."""
    model.to_empty(device="cpu")
    if model.config.tied:
        model.lm_head.weight = model.embeddings.tok_emb.weight
    positions = model.config.attention().positions  # its angles are no weights, and had no memory either
    for block in model.blocks:
        block.attn.positions = positions
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model


def _to_theirs(weights: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Rename weights, and make one of those that share a name; GPT-2's layers, c_…, lie transposed."""
    parts = defaultdict(list)
    for name, weight in weights.items():
        parts[family.rename(name)].append(weight)
    joined = {name: torch.cat(same) for name, same in parts.items()}
    return {name: weight.t() if ".c_" in name else weight for name, weight in joined.items()}


def _from_theirs(name: str, read: Callable[[str], Tensor], family: Family) -> Float[Tensor, "*shape"]:
    """Read our weight `name`, undoing `_to_theirs`."""
    theirs = family.rename(name)
    weight = read(theirs)
    if ".c_" in theirs:
        weight = weight.t()
    if "c_attn" in theirs:
        part = ("q_proj", "k_proj", "v_proj").index(name.split(".")[-2])
        weight = weight.chunk(3)[part]
    return weight


def _settings(model: GPT, family: Family) -> dict[str, Any]:
    """Return the config.json of a model."""
    config = replace(model.config, d_ff=model.blocks[0].ffn.up_proj.out_features)
    return family.fixed | {theirs: getattr(config, ours) for theirs, ours in family.settings.items()}


def _tokenizer_settings(tokenizer: BPETokenizer) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer, which writes bytes as visible characters."""
    character_of = {b: character for character, b in visible_bytes().items()}

    def show(token: bytes) -> str:
        return "".join([character_of[b] for b in token])

    special_tokens = tokenizer.special_tokens
    special_ids = set(special_tokens.values())
    vocab = {show(token): i for i, token in tokenizer.vocab.items() if i not in special_ids} | special_tokens
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **added} for token, i in special_tokens.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[show(left), show(right)] for left, right in tokenizer.merges],
        },
    }


def _write_json(path: Path, settings: Mapping[str, Any]) -> None:
    with resources.write_beside(path) as new:
        new.write_text(json.dumps(settings, indent=2), encoding="utf-8")
