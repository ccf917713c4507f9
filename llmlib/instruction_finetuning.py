"""Finetune a chat model on instructions, by small matrices beside its own (LoRA), and talk with it."""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors
import torch
from jaxtyping import Float, Int64, Integer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llmlib import resources
from llmlib.classification_finetuning import ByLength
from llmlib.data import IGNORE_INDEX
from llmlib.evaluation import log_likelihoods
from llmlib.generation import Strategy, for_inference, generate, pad_left, stream_text, temperature
from llmlib.gpt import GPT, compute_dtype
from llmlib.pretrained_weights import SMOLLM2_SYSTEM, load_smollm2
from llmlib.pretraining import TrainingConfig, autocast, precision, train
from llmlib.tokenization import BPETokenizer

SYSTEM = "Answer briefly."
START, STOP = "<|im_start|>", "<|im_end|>"
FIELDS = ("instruction", "input", "output", "kind", "split")
ADAPTER = resources.DATA / "assistant-lora.safetensors"  # what the train command wrote for the course
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Entry = Mapping[str, str]
Message = dict[str, str]

# ------------------------------------------------------------------------------ from instructions to tokens


def load_instructions(
    split: str | None = None, path: str | os.PathLike | None = None
) -> list[dict[str, str]]:
    """Read the course's instructions, or those of a file in the same form: all, or one split of them."""
    path = resources.data("instructions.json") if path is None else Path(path)
    entries = json.loads(path.read_text(encoding="utf-8"))
    for number, entry in enumerate(entries, start=1):
        if missing := [name for name in FIELDS if name not in entry]:
            raise ValueError(f"{path}: entry {number} has no {', '.join(missing)}: give each all of {FIELDS}")
    splits = sorted({entry["split"] for entry in entries})
    if split is not None and split not in splits:
        raise ValueError(f"there is no split {split!r}: {path} has {', '.join(splits)}")
    return [entry for entry in entries if split in (None, entry["split"])]


def question(entry: Entry) -> str:
    """Return what a person would type: the instruction, and the input below it, if there is one."""
    return "\n".join(filter(None, [entry["instruction"], entry["input"]]))


def alpaca_prompt(entry: Entry) -> str:
    """Write an instruction in the template of Alpaca, up to where the response begins.

    Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca.
    """
    with_input = ", paired with an input that provides further context" if entry["input"] else ""
    parts = [
        f"Below is an instruction that describes a task{with_input}. "
        "Write a response that appropriately completes the request.",
        f"### Instruction:\n{entry['instruction']}",
        f"### Input:\n{entry['input']}" if entry["input"] else "",
        "### Response:\n",
    ]
    return "\n\n".join(filter(None, parts))


def encode_chat(tokenizer: BPETokenizer, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
    """Return the tokens of `pretrained_weights.chat_text`, in which only the template has special ones.

    A message that spells "<|im_end|>" gets ordinary tokens for it, so nobody can end a turn from within.
    """
    start, stop = (tokenizer.special_tokens[token] for token in (START, STOP))
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SMOLLM2_SYSTEM}, *messages]
    turns = [f"{message['role']}\n{message['content']}" for message in messages]
    newline = tokenizer.encode("\n")
    ids = [i for turn in turns for i in (start, *tokenizer.encode(turn), stop, *newline)]
    return [*ids, start, *tokenizer.encode("assistant\n")] if reply else ids


class Example(NamedTuple):
    """Hold the tokens that a model reads, and those that it is to write, with the one that ends them."""

    prompt: list[int]
    response: list[int]


def chat_example(tokenizer: BPETokenizer, entry: Entry, system: str = SYSTEM) -> Example:
    """Encode an instruction and its answer by the chat template."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question(entry)}]
    response = [*tokenizer.encode(entry["output"]), tokenizer.special_tokens[STOP]]
    return Example(encode_chat(tokenizer, messages), response)


def collate(
    examples: Sequence[Example], pad_id: int, *, mask_prompt: bool = True
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """Make one batch of examples of any lengths: inputs, and the targets one token later.

    Padding goes to the right, where no token sees it. Its targets are −100, and so are those within the
    prompt, unless `mask_prompt` is False: they don't count.
    """
    T = max(len(prompt) + len(response) for prompt, response in examples) - 1
    ids = torch.full((len(examples), T), pad_id)
    targets = torch.full((len(examples), T), IGNORE_INDEX)
    for row, (prompt, response) in enumerate(examples):
        text = torch.tensor([*prompt, *response])
        first = len(prompt) - 1 if mask_prompt else 0
        ids[row, : len(text) - 1] = text[:-1]
        targets[row, first : len(text) - 1] = text[first + 1 :]
    return ids, targets


@dataclass(frozen=True, eq=False)
class ExampleRows(Dataset):
    """Hold examples; an index that is a row of numbers gives them as one batch of `collate`."""

    examples: Sequence[Example]
    pad_id: int
    mask_prompt: bool = True

    def __getitem__(
        self, index: Integer[np.ndarray, " B"]
    ) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
        return collate([self.examples[i] for i in index], self.pad_id, mask_prompt=self.mask_prompt)


def make_example_loader(
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    mask_prompt: bool = True,
    shuffle: bool = True,
    seed: int = 0,
) -> DataLoader:
    """Return a loader of batches for `pretraining.train`: examples of about one length stand together."""
    if not 1 <= batch_size <= len(examples):
        raise ValueError(f"batch_size={batch_size} must be from 1 to the {len(examples)} examples")
    lengths = np.array([len(prompt) + len(response) for prompt, response in examples])
    order = ByLength(len(examples), batch_size, shuffle, seed, drop_last=False, lengths=lengths)
    rows = ExampleRows(examples, pad_id, mask_prompt)
    return DataLoader(rows, sampler=order, batch_size=None, generator=torch.Generator())


# ------------------------------------------------------------------------------ LoRA


class LoRALinear(nn.Module):
    """Add to a frozen layer the product of two thin matrices: W x + (alpha / rank) B A x.

    A is drawn at random and B is zero, so that nothing changes at the start. Hu et al. 2021, section 4.1,
    arXiv:2106.09685.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(
                f"rank={rank} must be from 1 to {min(d_in, d_out)} for a layer of {d_out} × {d_in}"
            )
        if not alpha > 0:
            raise ValueError(f"alpha={alpha} must be above 0: it multiplies what is learned")
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(torch.randn(rank, d_in, device=linear.weight.device) / d_in**0.5)
        self.b = nn.Parameter(torch.zeros(d_out, rank, device=linear.weight.device))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return _AddLowRank.apply(x, self.linear.weight, self.linear.bias, self.a, self.scale * self.b)

    def delta(self) -> Float[Tensor, "O I"]:
        """Return what is added to the weights."""
        return self.scale * self.b @ self.a


class _AddLowRank(torch.autograd.Function):
    """Return W x + B A x, or its gradients for x, A and B.

    Written out, since a training step is a tenth faster so: sums are made in place, and the thin matrices lie
    along the tokens, the way round in which a product with them takes a half to a quarter of the time.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        dtype = compute_dtype(x)
        rows, weight, a, b = (t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), weight, a, b))  # (N, I)
        low = a @ rows.mT  # (rank, N)
        y = nn.functional.linear(rows, weight, bias).addmm_(low.mT, b.mT)  # (N, O)
        ctx.save_for_backward(rows, weight, a, b, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        rows, weight, a, b, low = ctx.saved_tensors
        shape, d_y = d_y.shape[:-1], d_y.reshape(-1, d_y.shape[-1])  # (N, O)
        d_low = b.mT @ d_y.mT  # (rank, N)
        d_x = (d_y @ weight).addmm_(d_low.mT, a).view(*shape, -1) if ctx.needs_input_grad[0] else None
        return d_x, None, None, d_low @ rows, (low @ d_y).mT


def lora(
    model: GPT,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Collection[str] = PROJECTIONS,
    first_block: int = 0,
) -> GPT:
    """Return the model with a LoRA beside each layer named in `targets`, and nothing else to train.

    It shares its frozen weights with `model`, which stays as it is. Blocks before `first_block` get none: no
    gradient then goes down to them. ValueError on ranks, targets and blocks that don't fit.
    """
    if not 0 <= first_block < len(model.blocks):
        raise ValueError(f"first_block={first_block} must be from 0 to {len(model.blocks) - 1}")
    layers = [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]
    known = {name.rpartition(".")[2] for name in layers}
    if not targets or not set(targets) <= known:
        raise ValueError(
            f"targets={targets!r} must be some of the layers {sorted(known)} of this model's blocks"
        )
    chosen = [n for n in layers if n.rpartition(".")[2] in targets and int(n.split(".")[1]) >= first_block]
    return _adapt(model, {name: rank for name in chosen}, alpha)


def _adapt(model: GPT, ranks: Mapping[str, int], alpha: float) -> GPT:
    adapted = _share(model)
    for name, rank in ranks.items():
        parent, _, leaf = name.rpartition(".")
        linear = adapted.get_submodule(name)
        setattr(adapted.get_submodule(parent), leaf, LoRALinear(linear, rank, alpha))
    return adapted


def _share(model: GPT) -> GPT:
    """Return a copy whose parameters are frozen, and lie in the same memory."""
    return copy.deepcopy(
        model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    )


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """Return the model with its adapters added into its weights: equal but for rounding, and faster.

    The weights without an adapter are shared with `model`, which stays as it is.
    """
    merged = _share(model)
    for name, layer in _adapters(merged).items():
        parent, _, leaf = name.rpartition(".")
        weight = layer.linear.weight
        layer.linear.weight = nn.Parameter(weight + layer.delta().to(weight.dtype), requires_grad=False)
        setattr(merged.get_submodule(parent), leaf, layer.linear)
    return merged


def save_adapter(model: GPT, path: str | os.PathLike) -> None:
    """Write the adapters alone to a safetensors file, beside the old one, then rename it."""
    layers = _adapters(model)
    if not layers:
        raise ValueError(
            "the model has 0 adapters to save: make it with lora, and save it before it is merged"
        )
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach() for name, layer in layers.items() for part in "ab"
    }
    alpha = next(layer.scale * len(layer.a) for layer in layers.values())
    with resources.write_beside(path) as new:
        save_file(tensors, new, metadata={"alpha": json.dumps(alpha)})


def load_adapter(model: GPT, path: str | os.PathLike) -> GPT:
    """Return the model with the adapters that `save_adapter` wrote; it shares its weights, as in `lora`.

    ValueError where the file is damaged, or made for a model of other sizes.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            alpha = json.loads((file.metadata() or {})["alpha"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ranks = {name.removesuffix(".a"): len(a) for name, a in tensors.items() if name.endswith(".a")}
        sizes = {name: (len(tensors[f"{name}.b"]), tensors[f"{name}.a"].shape[1]) for name in ranks}
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole file of save_adapter ({error}): save it again") from error
    linears = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, made_for in sizes.items():
        if linears.get(name) != made_for:
            here = tuple(linears.get(name, ())) or "no such layer"
            raise ValueError(
                f"{path} was made for another model: {name} is {made_for} there, and {here} here; "
                "load the model that it was trained with"
            )
    adapted = _adapt(model, ranks, alpha)
    with torch.no_grad():
        for name, layer in _adapters(adapted).items():
            layer.a.copy_(tensors[f"{name}.a"])
            layer.b.copy_(tensors[f"{name}.b"])
    return adapted


# ------------------------------------------------------------------------------ answers and their scores


def score(
    model: GPT,
    tokenizer: BPETokenizer,
    entries: Sequence[Entry],
    *,
    system: str = SYSTEM,
    progress: bool = True,
) -> pd.DataFrame:
    """Return a row for each instruction: how likely is its reference answer, and would it be written?

    "tokens" counts the reference's, with the one that ends it; "nats a token" is its −log p over them. It is
    "exact" where each of them is the likeliest: greedy decoding then writes it, and nothing else.
    """
    examples = [chat_example(tokenizer, entry, system) for entry in entries]
    with autocast(model):
        asked = [(prompt, [response]) for prompt, response in examples]
        scored = log_likelihoods(model, asked, progress=progress)
    columns = {
        "kind": [entry["kind"] for entry in entries],
        "tokens": [len(response) for _, response in examples],
        "nats a token": [-p / len(e.response) for ((p, _),), e in zip(scored, examples, strict=True)],
        "exact": [is_first for ((_, is_first),) in scored],
    }
    return pd.DataFrame(columns)


def answer(
    model: GPT,
    tokenizer: BPETokenizer,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Return the text that greedy decoding writes after each prompt, up to a special token or `n_tokens`."""
    stop_ids, device = list(tokenizer.special_tokens.values()), model.lm_head.weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), leave=False, disable=not progress):
        some = order[start : start + batch_size]
        ids, padding = (t.to(device) for t in pad_left([prompts[i] for i in some], stop_ids[0]))
        written = generate(model, ids, n_tokens, [temperature(0.0)], stop_ids=stop_ids, padding=padding)
        for i, new in zip(some, written[:, ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in stop_ids), len(new))
            answers[i] = tokenizer.decode(new[:end])
    return answers


# ------------------------------------------------------------------------------ a chat


def for_chat(model: GPT) -> GPT:
    """Return a copy that writes fast: adapters merged, and numbers as `pretraining.precision` chooses."""
    merged = merge(model)
    return for_inference(merged.to(precision(merged.lm_head.weight.device).dtype))


def fit(tokenizer: BPETokenizer, messages: Sequence[Message], n_tokens: int) -> list[Message]:
    """Leave out the oldest turns, but not a system message at the start, until the rest takes `n_tokens`.

    ValueError where the last turn alone takes more.
    """
    kept = list(messages)
    first = sum(message["role"] == "system" for message in kept[:1])
    while (n := len(encode_chat(tokenizer, kept))) > n_tokens:
        later = [i for i in range(first + 1, len(kept)) if kept[i]["role"] == "user"]
        if not later:
            raise ValueError(
                f"the message takes {n} tokens, and there is room for {n_tokens}: "
                "shorten it, or let the reply have fewer"
            )
        del kept[first : later[0]]
    return kept


def chat(
    model: GPT,
    tokenizer: BPETokenizer,
    history: list[Message],
    message: str,
    n_tokens: int = 200,
    strategies: Sequence[Strategy] = (),
    *,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the reply to a message, piece by piece, up to a special token or `n_tokens`.

    `history` gets both, the reply as far as it was read. Turns that no longer fit in the window, the oldest
    first, are deleted from it. ValueError, with the first piece, where the message alone doesn't fit.
    """
    asked = [*history, {"role": "user", "content": message}]
    history[:] = fit(tokenizer, asked, model.config.max_seq_len - n_tokens)
    prompt, reply = encode_chat(tokenizer, history), {"role": "assistant", "content": ""}
    history.append(reply)
    stop_ids = list(tokenizer.special_tokens.values())
    how = dict(stop_ids=stop_ids, generator=generator)
    for piece in stream_text(model, tokenizer, prompt, n_tokens, strategies, **how):
        reply["content"] += piece
        yield piece


# ------------------------------------------------------------------------------ the command line


def talk(
    model: GPT, tokenizer: BPETokenizer, *, system: str, n_tokens: int, strategies: Sequence[Strategy]
) -> None:
    """Chat in the terminal until the input ends; /new begins anew, and Ctrl-C stops a reply."""
    history = [{"role": "system", "content": system}]
    print("Type a message. /new forgets all, Ctrl-C stops a reply, Ctrl-D ends.")
    while (message := _ask()) is not None:
        if message == "/new":
            del history[1:]
        elif message:
            expected = len(history) + 2
            try:
                for piece in chat(model, tokenizer, history, message, n_tokens, strategies):
                    print(piece, end="", flush=True)
                print()
            except KeyboardInterrupt:
                print(" …")
            except ValueError as error:
                print(f"error: {error}")
                expected = len(history)
            if (n_lost := expected - len(history)) > 0:
                print(f"(the oldest {n_lost} messages no longer fit, and are forgotten)")


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmlib.instruction_finetuning", description="Finetune SmolLM2, and chat with it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    add = commands.add_parser("train", help="train an adapter", formatter_class=style).add_argument
    add("--out", type=Path, required=True, help="file for the adapter")
    add("--instructions", type=Path, help="JSON file in the form of the course's own; without it, these")
    add("--epochs", type=int, default=1)
    add("--rank", type=int, default=8)
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add = commands.add_parser("chat", help="chat in the terminal", formatter_class=style).add_argument
    add("--adapter", type=Path, default=ADAPTER, help="file that train wrote")
    add("--untuned", action="store_true", help="chat with SmolLM2 as it came")
    add("--system", default=SYSTEM, help="what the assistant is told before all else")
    add("--tokens", type=int, default=200, help="the most tokens of a reply")
    add("--temperature", type=float, default=0.0)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train an adapter, or chat, from the command line."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    try:
        {"train": _train, "chat": _chat}[options.command](options)
    except (ValueError, OSError, FloatingPointError, resources.ResourceError) as error:
        parser.exit(1, f"error: {error}\n")


def _train(options: argparse.Namespace) -> None:
    model, tokenizer = load_smollm2()
    torch.manual_seed(0)
    adapted = lora(model, options.rank, 2.0 * options.rank, first_block=len(model.blocks) // 2)
    loaders = {}
    for split in ("train", "validation"):
        entries = load_instructions(split, options.instructions)
        examples = [chat_example(tokenizer, entry) for entry in entries]
        size = min(8, len(examples))
        loaders[split] = make_example_loader(examples, size, tokenizer.special_tokens[STOP])
    n_steps = options.epochs * len(loaders["train"].sampler)
    config = TrainingConfig(
        n_steps=n_steps, lr=options.lr, n_warmup=n_steps // 20, weight_decay=0.0, eval_every=n_steps
    )
    log = train(adapted, loaders["train"], config, validation=loaders["validation"])
    save_adapter(adapted, options.out)
    print(f"{options.out}: held-out loss {log['val_loss'].iloc[-1]:.3f} nats a token")


def _chat(options: argparse.Namespace) -> None:
    model, tokenizer = load_smollm2()
    if not options.untuned:
        model = load_adapter(model, options.adapter)
    strategies = [temperature(options.temperature)]
    talk(for_chat(model), tokenizer, system=options.system, n_tokens=options.tokens, strategies=strategies)


if __name__ == "__main__":
    main()
