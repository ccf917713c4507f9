"""Finetune a language model to sort texts: clean data, a head on the last token, few blocks trained."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llmlib import resources
from llmlib.data import IGNORE_INDEX, BatchOrder
from llmlib.gpt import GPT
from llmlib.pretraining import END, TrainingConfig, autocast, train
from llmlib.tokenization import BPETokenizer

SETTINGS = ("labels", "n_blocks", "first_block", "pool", "template", "max_tokens")

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
            raise ValueError(f"{path}: line {number}, {line[:40]!r}, has no label and tab before its message")
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
    kept, holders = [], defaultdict(list)
    for message, some in zip(messages, sets, strict=True):
        # Two near sets must share one of the rarest shingles of each: only those are looked up.
        rarest = sorted(some, key=lambda shingle: (frequency[shingle], shingle))
        rarest = rarest[: len(some) - int(np.ceil(threshold * len(some) - 1e-9)) + 1]
        others = {id(other): other for shingle in rarest for other in holders[shingle]}
        if all(len(some & other) < threshold * len(some | other) for other in others.values()):
            kept.append(message)
            for shingle in rarest:
                holders[shingle].append(some)
    return kept


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
        ends = [round(float(end) * len(mixed)) for end in np.cumsum([0, *shares])]
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
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
    given) and the last norm are copies, to be trained. A text is put into `template`, encoded after an
    end token, and cut to `max_tokens` (200, unless given). With `pool="mean"` the head reads the mean of all
    states in place of the last. What the head reads has mean 0 and deviation 1 over the texts that it was
    first trained on. Radford et al. 2018 (GPT), section 3.2.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: BPETokenizer,
        labels: Sequence[str],
        *,
        n_blocks: int | None = None,
        first_block: int | None = None,
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
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels={list(labels)} must be at least 2 different ones")
        if pool not in ("last", "mean"):
            raise ValueError(f"pool={pool!r} must be 'last' or 'mean'")
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r} must have one {{}}, where the text goes")
        self.tokenizer, self.labels, self.pool, self.template = tokenizer, tuple(labels), pool, template
        self.before, self.after = (tokenizer.encode(part) for part in template.split("{}"))
        max_tokens = min(200, model.config.max_seq_len) if max_tokens is None else max_tokens
        self.max_tokens, room = max_tokens, max_tokens - len(self.before) - len(self.after) - 1
        if room < 1 or max_tokens > model.config.max_seq_len:
            raise ValueError(
                f"max_tokens={max_tokens} must leave room for a text beside the template, and be at most "
                f"max_seq_len={model.config.max_seq_len}"
            )
        self.embeddings = _share(model.embeddings)
        self.frozen = nn.ModuleList(_share(block) for block in model.blocks[: self.first_block])
        trained = model.blocks[self.first_block : self.n_blocks]
        self.trained = nn.ModuleList(copy.deepcopy(block) for block in trained)
        self.final_norm = copy.deepcopy(model.final_norm)
        self.register_buffer("mean", torch.zeros(model.config.d_model))
        self.register_buffer("deviation", torch.ones(model.config.d_model))
        self.head = nn.Linear(model.config.d_model, len(labels))
        nn.init.zeros_(self.head.weight)  # no opinion: both labels are equally likely at the start
        nn.init.zeros_(self.head.bias)
        for part in (self.trained, self.final_norm):
            part.requires_grad_(True)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; ValueError on one without a letter, a digit or a sign."""
        if not text.strip():
            raise ValueError(f"the text {text!r} is empty: there is nothing to sort")
        room = self.max_tokens - len(self.before) - len(self.after) - 1
        ids = self.tokenizer.encode(text)[:room]
        return [self.tokenizer.special_tokens[END], *self.before, *ids, *self.after]

    def read(self, ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        """Return the states that the trained blocks read; no gradient goes further down."""
        with torch.no_grad():
            x = self.embeddings(ids, 0)  # (B, T, C)
            for block in self.frozen:
                x = block(x)
        return x

    def features(self, x: Float[Tensor, "B T C"], last: Integer[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """Return one vector a text from such states; `last` is the place of each text's last token.

        Padding stands to the right of it, where causal attention doesn't look.
        """
        for block in self.trained:
            x = block(x)
        if self.pool == "last":
            return self.final_norm(x[torch.arange(len(x), device=x.device), last]).float()
        inside = torch.arange(x.shape[1], device=x.device) <= last[:, None]  # (B, T)
        return (self.final_norm(x).float() * inside[..., None]).sum(dim=1) / inside.sum(dim=1, keepdim=True)

    def decide(self, x: Float[Tensor, "B T C"], last: Integer[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """Return the logits of the labels from the states that `read` returns."""
        x = self.features(x, last)  # (B, C)
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

    table: Float[Tensor, "N C"]
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
        last = self.lengths[numbers, None] - 1  # (B, 1)
        places = torch.arange(int(last.max()) + 1)  # (T)
        rows = self.starts[numbers, None] + places.minimum(last)  # (B, T): the last state, again, is padding
        targets = torch.full(rows.shape, IGNORE_INDEX)
        return rows, targets.scatter(1, last, 0 if self.labels is None else self.labels[numbers, None])


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
        order, random = np.arange(self.n_windows), np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            order = random.permutation(order)
        pools = np.split(order, range(0, len(order), self.n_batches * self.batch_size)[1:])
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        starts = np.arange(len(self)) * self.batch_size
        for start in (random.permutation(starts) if self.shuffle else starts)[n_seen:]:
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
    texts = [m if isinstance(m, str) else m.text for m in messages]
    ids = [classifier.encode(text) for text in texts]
    lengths = torch.tensor([len(some) for some in ids])
    starts = lengths.cumsum(0) - lengths
    device, order = classifier.head.weight.device, lengths.argsort(stable=True).tolist()
    table = None
    with autocast(classifier), tqdm(total=len(ids), leave=False, disable=not progress) as bar:
        while order:
            # About 2,048 tokens in a batch.
            T = len(ids[order[0]])
            n = next((n for n in range(1, len(order)) if (n + 1) * len(ids[order[n]]) > 2048), len(order))
            batch, order = order[:n], order[n:]
            T = len(ids[batch[-1]])
            rows = torch.tensor([ids[i] + [0] * (T - len(ids[i])) for i in batch], device=device)  # (B, T)
            x = classifier.read(rows)  # (B, T, C)
            if table is None:
                dtype = torch.get_autocast_dtype(device.type) if _casts(device) else x.dtype
                table = torch.empty(int(lengths.sum()), x.shape[-1], dtype=dtype, device=device)
            for i, row in zip(batch, x, strict=True):
                table[starts[i] : starts[i] + lengths[i]] = row[: lengths[i]]
            bar.update(n)
    return States(table, starts, lengths, _numbers(classifier, messages))


def _casts(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _numbers(classifier: Classifier, messages: Sequence[Message] | Sequence[str]) -> Tensor | None:
    labels = [message.label for message in messages if not isinstance(message, str)]
    if not labels:
        return None
    if unknown := set(labels) - set(classifier.labels):
        raise ValueError(f"the labels {sorted(unknown)} are none of {list(classifier.labels)}")
    return torch.tensor([classifier.labels.index(label) for label in labels])


def predict(classifier: Classifier, states: States) -> Float[Tensor, "M K"]:
    """Return the logits of the labels of all texts, in their order."""
    return _each(classifier, classifier.decide, states)


def standardize(classifier: Classifier, states: States) -> Float[Tensor, "M C"]:
    """Let each number that the head reads have mean 0 and deviation 1 over these texts; return them so.

    Otherwise a head learns fast from the large numbers, and hardly from the small ones.
    """
    features = _each(classifier, classifier.features, states)  # (M, C)
    classifier.mean.copy_(features.mean(dim=0))
    classifier.deviation.copy_(features.std(dim=0, correction=0).clamp(min=1e-6))
    return (features.to(classifier.mean.device) - classifier.mean) / classifier.deviation


@torch.no_grad()
def _each(
    classifier: Classifier, function: Callable[[Tensor, Tensor], Tensor], states: States
) -> Float[Tensor, "M _"]:
    """Return `function` of the states of each text, a row each; texts of like length go together."""
    was_training, order, results = classifier.training, states.lengths.argsort(stable=True), []
    classifier.eval()
    with autocast(classifier):
        for some in order.split(32):
            rows, _ = states[some.numpy()]
            results.append(function(states.table[rows].float(), states.lengths[some] - 1).cpu())
    classifier.train(was_training)
    return torch.cat(results)[order.argsort()]


# ------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig(TrainingConfig):
    """Train the head, which begins at zero, at the rate `head_lr`, and what is pretrained at `lr`."""

    lr: float = 2e-4
    head_lr: float = 2e-3
    n_warmup: int = 20
    weight_decay: float = 0.01

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if name.rpartition(".")[0].endswith("head")]
        rest = [p for name, p in trained.items() if not name.rpartition(".")[0].endswith("head")]
        return self._adamw(
            {"params": head, "lr": self.head_lr, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": self.weight_decay},
        )


class _OnStates(GPT):
    """Look like a language model to `train`: "tokens" are the rows of a table of states."""

    def __init__(self, classifier: Classifier, table: Float[Tensor, "N C"]) -> None:
        nn.Module.__init__(self)  # none of the parts of a GPT: they are the classifier's
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

    `validation` must be states of the same table. ValueError where there are no labels.
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
