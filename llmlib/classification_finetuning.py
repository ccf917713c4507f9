"""Finetune a language model to sort texts: clean data, a head on its states, few blocks trained or none."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llmlib import resources
from llmlib.data import IGNORE_INDEX, BatchOrder
from llmlib.gpt import GPT
from llmlib.pretraining import END, TrainingConfig, autocast, precision, train
from llmlib.tokenization import BPETokenizer

SETTINGS = ("labels", "n_blocks", "first_block", "lower", "pool", "template", "max_tokens")

# ------------------------------------------------------------------------------ messages


class Message(NamedTuple):
    text: str
    label: str


def load_messages(path: str | os.PathLike | None = None) -> list[Message]:
    """Read the SMS Spam Collection, or a file in the same form: a line is a label, a tab, and a message.

    Almeida, Hidalgo and Yamakami 2011, archive.ics.uci.edu/dataset/228.
    """
    path = resources.path("spam") if path is None else Path(path)
    messages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        label, tab, text = line.partition("\t")
        if line and not (label and tab):
            raise ValueError(
                f"{path}: line {number}, {line[:40]!r}, has no label before its message: "
                "write a label, a tab, and the message"
            )
        if line:
            messages.append(Message(text, label))
    return messages


def shingles(text: str, n: int = 5) -> set[str]:
    """Return all runs of `n` characters, once case, punctuation and the values of digits are ignored.

    Broder 1997, "On the resemblance and containment of documents".
    """
    words = re.findall(r"[^\W_]+|[£$€]", re.sub(r"\d", "0", text.casefold()))
    plain = " ".join(words) or text
    return {plain[i : i + n] for i in range(max(1, len(plain) - n + 1))}


def deduplicate(messages: Sequence[Message], threshold: float = 0.7) -> list[Message]:
    """Keep each message unless it is near one that is kept: no two that stay are near each other.

    Two texts are near where at least `threshold` of all their shingles are in both (Jaccard's index).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is a share of the shingles: give more than 0, at most 1")
    sets = [shingles(message.text) for message in messages]
    frequency = Counter(shingle for some in sets for shingle in some)
    kept, holders = [], defaultdict(list)  # the numbers of those that stay: of all, and of each rare shingle
    for i, mine in enumerate(sets):
        # A near text has at least `n_shared` of these. So of any len(mine) − n_shared + 1 it has one: take
        # the rarest. The rarest that both have is among the rarest of both.
        n_shared = math.ceil(threshold * len(mine))
        rarest = sorted(mine, key=lambda shingle: (frequency[shingle], shingle))[: len(mine) - n_shared + 1]
        others = {j for shingle in rarest for j in holders[shingle]}
        if all(len(mine & sets[j]) < threshold * len(mine | sets[j]) for j in others):
            kept.append(i)
            for shingle in rarest:
                holders[shingle].append(i)
    return [messages[i] for i in kept]


def balance(messages: Sequence[Message], seed: int = 0) -> list[Message]:
    """Draw as many messages of each label as there are of the rarest, and mix them."""
    groups, draw = _by_label(messages), random.Random(seed)
    n = min(map(len, groups.values()))
    chosen = [message for label in sorted(groups) for message in draw.sample(groups[label], n)]
    return draw.sample(chosen, len(chosen))


def split(
    messages: Sequence[Message], shares: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[list[Message]]:
    """Cut messages at random into parts of these shares, with the labels in each part as in the whole."""
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares {tuple(shares)} must be above 0, and 1 in sum")
    groups, draw, parts = _by_label(messages), random.Random(seed), [[] for _ in shares]
    for label in sorted(groups):
        mixed = draw.sample(groups[label], len(groups[label]))
        ends = [round(end * len(mixed)) for end in accumulate(shares, initial=0)]
        for part, (start, end) in zip(parts, pairwise(ends), strict=True):
            part += mixed[start:end]
    return [draw.sample(part, len(part)) for part in parts]


def _by_label(messages: Sequence[Message]) -> dict[str, list[Message]]:
    groups = defaultdict(list)
    for message in messages:
        groups[message.label].append(message)
    if len(groups) < 2:
        raise ValueError(f"{len(messages)} messages with the labels {list(groups)}: give at least 2 labels")
    return groups


# ------------------------------------------------------------------------------ the classifier


class Answer(NamedTuple):
    label: str
    probability: float


class Classifier(nn.Module):
    """Sort texts by a linear head on the state of the last token, the only one that has read all others.

    The head stands above the first `n_blocks` blocks of `model` (all, unless given). The classifier shares
    the frozen weights of `model`, which stays as it is; the blocks from `first_block` on (none, unless
    given) are copies, to be trained, and so is the last norm, where the head stands above all blocks. A text
    is put into `template`, encoded after an end token, and cut to `max_tokens` (200, unless given). With
    `pool="mean"` the head reads the mean of all states in place of the last. With `lower=(8,)`, it also reads
    the states above 8 blocks. What it reads has mean 0 and deviation 1 over the texts of the last
    `fit_head`, or else of the first `finetune`. Radford et al. 2018 (GPT), section 3.2; for `lower`, Peters
    et al. 2018 (ELMo), section 3.2.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: BPETokenizer,
        labels: Sequence[str],
        *,
        n_blocks: int | None = None,
        first_block: int | None = None,
        lower: Sequence[int] = (),
        pool: str = "last",
        template: str = "{}",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.n_blocks = len(model.blocks) if n_blocks is None else n_blocks
        if not 0 <= self.n_blocks <= len(model.blocks):
            raise ValueError(f"n_blocks={n_blocks} must be from 0 to {len(model.blocks)}, as the model has")
        self.first_block = self.n_blocks if first_block is None else first_block
        if not 0 <= self.first_block <= self.n_blocks:
            raise ValueError(
                f"first_block={first_block} must be from 0 to {self.n_blocks}, where none is trained"
            )
        if any(not 0 <= depth < self.first_block for depth in lower):
            raise ValueError(f"lower={list(lower)} must lie from 0 to below first_block={self.first_block}")
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels={list(labels)} must be at least 2 different ones")
        if pool not in ("last", "mean"):
            raise ValueError(f"pool={pool!r} must be 'last' or 'mean'")
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r} must have one {{}}, where the text goes")
        self.tokenizer, self.labels, self.pool, self.template = tokenizer, tuple(labels), pool, template
        self.lower, self.d_model = tuple(sorted(lower)), model.config.d_model
        self.before, self.after = (tokenizer.encode(part) for part in template.split("{}"))
        self.max_tokens = min(200, model.config.max_seq_len) if max_tokens is None else max_tokens
        self.room = self.max_tokens - len(self.before) - len(self.after) - 1  # for the text itself
        if self.room < 1 or self.max_tokens > model.config.max_seq_len:
            raise ValueError(
                f"max_tokens={max_tokens} must leave room for a text beside the template, and be at most "
                f"max_seq_len={model.config.max_seq_len}"
            )
        self.embeddings = _share(model.embeddings)
        self.frozen = nn.ModuleList(_share(block) for block in model.blocks[: self.first_block])
        trained = model.blocks[self.first_block : self.n_blocks]
        self.trained = nn.ModuleList(copy.deepcopy(block) for block in trained)
        whole = self.n_blocks == len(model.blocks)  # the last norm was made for the states above all blocks
        self.final_norm = copy.deepcopy(model.final_norm) if whole else nn.Identity()
        width = self.d_model * (len(self.lower) + 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.head = nn.Linear(width, len(labels))
        nn.init.zeros_(self.head.weight)  # no opinion: both labels are equally likely at the start
        nn.init.zeros_(self.head.bias)
        for part in (self.trained, self.final_norm):
            part.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Classifier:
        """Switch dropout on or off in the trained blocks alone: frozen states are computed without it."""
        super().train(mode)
        self.embeddings.eval()
        self.frozen.eval()
        return self

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; ValueError on one without a letter, a digit or a sign."""
        if not text.strip():
            raise ValueError(f"the text {text!r} is empty: there is nothing to sort")
        ids = self.tokenizer.encode(text)[: self.room]
        return [self.tokenizer.special_tokens[END], *self.before, *ids, *self.after]

    @torch.no_grad()
    def read(self, ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T F"]:
        """Return the states that the trained blocks read, after those of the `lower` depths.

        F is C for each depth. No gradient goes further down.
        """
        x = self.embeddings(ids, 0)  # (B, T, C)
        states = [x]
        for block in self.frozen:
            x = block(x)
            states.append(x)
        return torch.cat([states[depth] for depth in (*self.lower, self.first_block)], dim=-1)

    def features(self, x: Float[Tensor, "B T F"], last: Integer[Tensor, " B"]) -> Float[Tensor, "B F"]:
        """Return one vector a text from what `read` returns; `last` is the place of each text's last token.

        Padding stands to the right of it, where causal attention doesn't look.
        """
        *lower, x = x.split(self.d_model, dim=-1)
        for block in self.trained:
            x = block(x)
        x = torch.cat([*lower, self.final_norm(x)], dim=-1).float()
        if self.pool == "last":
            return x[torch.arange(len(x), device=x.device), last]
        inside = torch.arange(x.shape[1], device=x.device) <= last[:, None]  # (B, T)
        return (x * inside[..., None]).sum(dim=1) / inside.sum(dim=1, keepdim=True)

    def decide(self, x: Float[Tensor, "B T F"], last: Integer[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """Return the logits of the labels from the states that `read` returns."""
        x = self.features(x, last)  # (B, F)
        with torch.autocast(x.device.type, enabled=False):  # so few products may be exact
            return self.head((x - self.mean) / self.deviation)  # (B, K)

    def forward(self, ids: Int64[Tensor, "B T"], last: Integer[Tensor, " B"]) -> Float[Tensor, "B K"]:
        return self.decide(self.read(ids), last)

    def classify(self, texts: Sequence[str]) -> list[Answer]:
        """Return the likeliest label of each text, and its probability; errors as in `encode`."""
        if isinstance(texts, str):
            raise ValueError(f"give a list of texts, such as [{texts[:20]!r}]")
        p = predict(self, frozen_states(self, texts)).softmax(dim=-1)
        return [
            Answer(self.labels[i], row[i].item()) for row, i in zip(p, p.argmax(dim=-1).tolist(), strict=True)
        ]


def _share(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters are frozen, and lie in the same memory."""
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, frozen)


# ------------------------------------------------------------------------------ states, computed once


@dataclass(frozen=True, eq=False)
class States(Dataset):
    """Hold the states of all tokens of many texts in one table, and where each text begins and ends in it.

    An index that is a row of text numbers gives a batch for `train`: the rows of the table, and as targets
    the label at each last token, and −100 elsewhere.
    """

    table: Float[Tensor, "N F"]
    starts: Int64[Tensor, " M"]
    lengths: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, numbers: Sequence[int] | Tensor) -> States:
        """Return the same states, of these texts alone."""
        numbers = torch.as_tensor(numbers, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[numbers]
        return replace(self, starts=self.starts[numbers], lengths=self.lengths[numbers], labels=labels)

    def __getitem__(
        self, index: Integer[np.ndarray, " B"]
    ) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
        numbers = torch.as_tensor(index)
        rows = self.rows(numbers)  # (B, T)
        targets = torch.full(rows.shape, IGNORE_INDEX)
        return rows, targets.scatter(1, self.lengths[numbers, None] - 1, self.labels[numbers, None])

    def rows(self, numbers: Int64[Tensor, " B"]) -> Int64[Tensor, "B T"]:
        """Return where in the table the states of these texts lie; the last one, again, is padding."""
        last = self.lengths[numbers, None] - 1  # (B, 1)
        places = torch.arange(int(last.max()) + 1)  # (T)
        return self.starts[numbers, None] + places.minimum(last)


@dataclass(eq=False)
class ByLength(BatchOrder):
    """Yield batches of about one length, in an order that is a function of the seed and the epoch.

    Shuffled numbers are sorted by length, `n_batches` at a time, cut into batches, and these shuffled again.
    """

    lengths: Integer[np.ndarray, " N"] = field(kw_only=True)
    n_batches: int = field(default=16, kw_only=True)

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, n_seen = divmod(self.start, len(self))
        self.start = (epoch + 1) * len(self)
        order, draw = np.arange(self.n_windows), np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            order = draw.permutation(order)
        pools = np.split(order, range(0, len(order), self.n_batches * self.batch_size)[1:])
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        starts = np.arange(len(self)) * self.batch_size
        for start in (draw.permutation(starts) if self.shuffle else starts)[n_seen:]:
            yield order[start : start + self.batch_size]


@torch.no_grad()
def frozen_states(
    classifier: Classifier, messages: Sequence[Message] | Sequence[str], *, progress: bool = False
) -> States:
    """Read each text once through the frozen blocks, texts of like length together.

    Where these are messages, their labels come along. ValueError on none, on an empty one, on another label.
    """
    if not messages:
        raise ValueError("0 texts to read: give at least one")
    labels = _numbers(classifier, messages)
    texts = [m if isinstance(m, str) else m.text for m in messages]
    ids = [torch.tensor(classifier.encode(text)) for text in texts]
    lengths = torch.tensor([len(some) for some in ids])
    device, states = classifier.head.weight.device, [None] * len(ids)
    with autocast(classifier), tqdm(total=len(ids), leave=False, disable=not progress) as bar:
        for numbers in _batches(lengths):
            rows = pad_sequence([ids[i] for i in numbers], batch_first=True).to(device)  # (B, T)
            for i, x in zip(numbers.tolist(), classifier.read(rows), strict=True):
                states[i] = x[: lengths[i]].to(precision(device).dtype)  # (T, F)
            bar.update(len(numbers))
    return States(torch.cat(states), lengths.cumsum(0) - lengths, lengths, labels)


def _batches(lengths: Int64[Tensor, " M"], n_tokens: int = 2048) -> Iterator[Int64[Tensor, " B"]]:
    """Yield the numbers of all texts, the shortest first, about `n_tokens` with their padding at a time."""
    order, start = lengths.argsort(stable=True), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > n_tokens:
            yield order[start:end]
            start = end


def _numbers(classifier: Classifier, messages: Sequence[Message] | Sequence[str]) -> Tensor | None:
    labels = [message.label for message in messages if not isinstance(message, str)]
    if not labels:
        return None
    if len(labels) < len(messages):
        raise ValueError(
            f"{len(labels)} of {len(messages)} texts have a label: give all of them one, or none"
        )
    if unknown := set(labels) - set(classifier.labels):
        raise ValueError(
            f"the labels {sorted(unknown)} are none of {list(classifier.labels)}: "
            "make the classifier with them, or leave these texts out"
        )
    return torch.tensor([classifier.labels.index(label) for label in labels])


def predict(classifier: Classifier, states: States) -> Float[Tensor, "M K"]:
    """Return the logits of the labels of all texts, in their order."""
    return _each(classifier, classifier.decide, states)


def standardize(classifier: Classifier, states: States) -> Float[Tensor, "M F"]:
    """Let each number that the head reads have mean 0 and deviation 1 over these texts; return them so.

    Otherwise a head learns fast from the large numbers, and hardly from the small ones.
    """
    features = _each(classifier, classifier.features, states)  # (M, F)
    classifier.mean.copy_(features.mean(dim=0))
    classifier.deviation.copy_(features.std(dim=0, correction=0).clamp(min=1e-6))
    return (features.to(classifier.mean.device) - classifier.mean) / classifier.deviation


@torch.no_grad()
def _each(
    classifier: Classifier, function: Callable[[Tensor, Tensor], Tensor], states: States
) -> Float[Tensor, "M _"]:
    """Return `function` of the states of each text, a row each; texts of like length go together."""
    was_training, device, results = classifier.training, states.table.device, [None] * len(states)
    classifier.eval()
    with autocast(classifier):
        for numbers in _batches(states.lengths):
            x = states.table[states.rows(numbers)].float()  # (B, T, F)
            last = states.lengths[numbers].to(device) - 1
            for i, row in zip(numbers.tolist(), function(x, last).cpu(), strict=True):
                results[i] = row
    classifier.train(was_training)
    return torch.stack(results)


# ------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig(TrainingConfig):
    """Train the head at the rate `head_lr`, and what is pretrained at `lr`."""

    lr: float = 2e-4
    head_lr: float = 2e-3
    n_warmup: int = 20
    weight_decay: float = 0.01

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if "head" in name.split(".")]
        rest = [p for name, p in trained.items() if "head" not in name.split(".")]
        return self._adamw(
            {"params": head, "lr": self.head_lr, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": self.weight_decay},
        )


class _OnStates(nn.Module):
    """Give `train` the loss of a classifier: "tokens" are the rows of a table of states."""

    def __init__(self, classifier: Classifier, table: Float[Tensor, "N F"]) -> None:
        super().__init__()
        self.classifier, self.table = classifier, table

    def loss(self, ids: Int64[Tensor, "B T"], targets: Int64[Tensor, "B T"]) -> Float[Tensor, ""]:
        last = (targets != IGNORE_INDEX).int().argmax(dim=1)  # (B)
        logits = self.classifier.decide(self.table[ids].float(), last)  # (B, K)
        return F.cross_entropy(logits.float(), targets.gather(1, last[:, None])[:, 0])


def finetune(
    classifier: Classifier,
    states: States,
    config: TrainingConfig,
    *,
    validation: States | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the head and the trained blocks on labelled states; return the log of `pretraining.train`.

    What a head reads that is still zero is standardized first. `validation` must be states of the same table.
    ValueError where there are no labels.
    """
    for some in (states, validation):
        if some is not None and some.labels is None:
            raise ValueError(f"the {len(some)} texts have no labels: make their states from messages")
        if some is not None and some.table is not states.table:
            raise ValueError("validation has another table: compute all states in one call, then select")

    def loader(some: States, shuffle: bool) -> DataLoader:
        size = min(batch_size, len(some))
        order = ByLength(len(some), size, shuffle, seed, drop_last=False, lengths=some.lengths.numpy())
        return DataLoader(some, sampler=order, batch_size=None, generator=torch.Generator())

    held_out = None if validation is None else loader(validation, False)
    if not classifier.head.weight.any():  # a head that has learned would read other numbers than before
        standardize(classifier, states)
    model = _OnStates(classifier, states.table)
    return train(model, loader(states, True), config, validation=held_out, progress=progress)


def fit_head(classifier: Classifier, states: States, pull: float = 0.02) -> None:
    """Find the best head for labelled states, all else left as it is: logistic regression, in a second.

    The mean loss in nats, plus `pull` × the sum of the squared weights, has one lowest point, which L-BFGS
    finds from any start. ValueError where there are no labels.
    """
    if states.labels is None:
        raise ValueError(f"the {len(states)} texts have no labels: make their states from messages")
    x, head = standardize(classifier, states), classifier.head
    labels = states.labels.to(x.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + pull * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


# ------------------------------------------------------------------------------ files


def save_classifier(classifier: Classifier, path: str | os.PathLike) -> None:
    """Write what differs from the pretrained model, and the settings, to a safetensors file."""
    weights = {name: p.detach().contiguous() for name, p in _learned(classifier).items()}
    settings = {name: getattr(classifier, name) for name in SETTINGS}
    with resources.write_beside(path) as new:
        save_file(weights, new, metadata={"classifier": json.dumps(settings)})


def load_classifier(path: str | os.PathLike, model: GPT, tokenizer: BPETokenizer) -> Classifier:
    """Read what `save_classifier` wrote, onto the pretrained model that it was trained from.

    ValueError where the file is damaged, or made for a model of other sizes.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["classifier"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole file of save_classifier ({error}): save it again") from error
    classifier = Classifier(model, tokenizer, **settings)
    learned = _learned(classifier)
    for name in sorted(learned.keys() | weights.keys()):
        there, here = (tuple(some[name].shape) if name in some else None for some in (weights, learned))
        if there != here:
            raise ValueError(
                f"{path} was made for another model: {name} has the shape {there} there, and {here} here; "
                "load the model that it was trained from"
            )
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(weights[name])
    return classifier.eval()


def _learned(classifier: Classifier) -> dict[str, Tensor]:
    trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    return trained | {"mean": classifier.mean, "deviation": classifier.deviation}
