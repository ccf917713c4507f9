"""Train a language model: the loop, its schedule, its checkpoints, and a command line for your own texts."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from llmlib import tales
from llmlib.data import (
    IGNORE_INDEX,
    BatchOrder,
    join_documents,
    make_document_loader,
    make_loader,
    open_tokens,
    save_tokens,
    split_documents,
)
from llmlib.gpt import GPT, GPTConfig, LossOf, cross_entropy
from llmlib.llama import LlamaConfig
from llmlib.resources import write_beside
from llmlib.tokenization import BPETokenizer, train_bpe

END = "<|endoftext|>"

# Called after each evaluation with the model and the log so far: to draw a curve, say, or to tell a sample.
Watcher = Callable[[GPT, pd.DataFrame], None]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Say how to train: `n_steps` steps of AdamW, each on `n_accumulate` batches.

    The learning rate rises to `lr` in `n_warmup` steps, and falls along a cosine to `final_lr` × `lr`.
    Gradients longer than `max_norm` are shortened to it. Every `eval_every` steps the model is evaluated,
    and saved where `train` has a folder. `tail` is the weight of `punish_tail` in the loss, for a GPT.
    A subclass with another `optimizer` trains by another rule.
    """

    n_steps: int
    lr: float = 3e-3
    final_lr: float = 0.0
    n_warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_norm: float = 1.0
    n_accumulate: int = 1
    eval_every: int = 200
    tail: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_steps", "n_accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.tail < 0:
            raise ValueError(f"tail is a weight, 0 for none, got {self.tail}: it can't be negative")
        if not 0 <= self.n_warmup <= self.n_steps:
            raise ValueError(f"n_warmup={self.n_warmup} must lie between 0 and n_steps={self.n_steps}")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | Together:
        """Make AdamW, with weight decay on matrices and tables, and none on biases and the scales of norms.

        Loshchilov and Hutter 2017, arXiv:1711.05101.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        decayed, kept = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
        return self._adamw({"params": decayed, "weight_decay": self.weight_decay}, {"params": kept})

    def _adamw(self, *groups: dict) -> torch.optim.AdamW:
        filled = [group for group in groups if group["params"]]
        return torch.optim.AdamW(filled, lr=self.lr, betas=self.betas, weight_decay=0.0, fused=True)


@dataclass(frozen=True, kw_only=True)
class MuonConfig(TrainingConfig):
    """Train the matrices of the blocks by Muon, at twice the rate `lr`, and all else by AdamW, at `lr`.

    Weight decay is for the matrices.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)

    def optimizer(self, model: nn.Module) -> Together:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in trained.items() if name.startswith("blocks.") and p.ndim == 2}
        rest = [p for name, p in trained.items() if name not in matrices]
        if not matrices:
            raise ValueError(
                f"none of {len(trained)} trained parameters is a matrix of a module named blocks, where Muon "
                "works: take TrainingConfig"
            )
        muon = Muon(matrices.values(), lr=2 * self.lr, weight_decay=self.weight_decay)
        return Together(muon, self._adamw({"params": rest}))


def train(
    model: nn.Module,
    loader: DataLoader | Recall | RecallUnknown,
    config: TrainingConfig,
    *,
    validation: DataLoader | None = None,
    folder: str | os.PathLike | None = None,
    watchers: Sequence[Watcher] = (),
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` on the batches of `loader`; return the log, a row for each step.

    The loader is one of `make_loader` or `make_document_loader`. Any module will do that has a method
    `loss(ids, targets)`, as `GPT` has; with a `folder`, it needs a dataclass `config` too, to be saved.

    A row holds the tokens so far, padding among them, the learning rate, the loss in nats (`tail` in it), the
    length of the gradient, the seconds so far, and at every evaluation the validation loss. With a `folder`,
    a run that was stopped goes on from its last checkpoint, and on a CPU repeats bit for bit what it would
    have done. FloatingPointError where loss or gradient are no longer finite; the weights are then still
    those of the step before.
    """
    optimizer = config.optimizer(model)
    highest = [group["lr"] for group in optimizer.param_groups]
    last = None if folder is None else last_checkpoint(folder)
    rows = [] if last is None else load_checkpoint(last, model, optimizer)
    batches = _endless(loader, len(rows) * config.n_accumulate)
    n_tokens, seconds = (rows[-1]["tokens"], rows[-1]["seconds"]) if rows else (0, 0.0)
    begin = time.perf_counter() - seconds
    loss_of = partial(model.loss, of=punish_tail(config.tail)) if config.tail else model.loss
    model.train()
    steps = range(len(rows) + 1, config.n_steps + 1)
    with tqdm(steps, initial=len(rows), total=config.n_steps, leave=False, disable=not progress) as bar:
        for step in bar:
            lr = learning_rate(step, config)
            for group, high in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = high * lr / config.lr
            loss, n_new = accumulate_gradients(model, batches, config.n_accumulate, loss_of)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm).item()
            if not math.isfinite(loss + norm):
                saved = None if folder is None else last_checkpoint(folder)
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} at step {step}, learning rate {lr:.3g}: go on from "
                    f"the last good checkpoint ({saved or 'none was kept'}) with a smaller learning rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            n_tokens, seconds = n_tokens + n_new, time.perf_counter() - begin
            rows.append(dict(step=step, tokens=n_tokens, lr=lr, loss=loss, norm=norm, seconds=seconds))
            bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s", refresh=False)
            if step % config.eval_every == 0 or step == config.n_steps:
                if validation is not None:
                    rows[-1]["val_loss"] = evaluate(model, validation)
                if folder is not None:
                    save_checkpoint(folder, model, optimizer, rows)
                for watch in watchers:
                    watch(model, log_table(rows))
    return log_table(rows)


def accumulate_gradients(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    n_batches: int,
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[float, int]:
    """Add up the gradients of the mean loss of `n_batches` batches; return that loss, and the tokens read.

    The loss of IDs and targets is `model.loss` unless given.
    """
    loss_of = loss_of or model.loss
    loss, n_tokens = 0.0, 0
    for _ in range(n_batches):
        ids, targets = (t.to(_device(model)) for t in next(batches))
        with autocast(model):
            part = loss_of(ids, targets) / n_batches
        part.backward()
        loss, n_tokens = loss + part.item(), n_tokens + ids.numel()
    return loss, n_tokens


def punish_tail(weight: float, limit: float = 1e-3) -> LossOf:
    """Add to the cross-entropy `weight` times the probability of the tail: of all tokens but the target that
    the model gives less than `limit`.

    A softmax gives no token 0, and what it gives to thousands that can't come adds up. This suits texts
    in which whatever can come is likelier than the limit. It is a kind of unlikelihood (Welleck et al. 2019,
    arXiv:1908.04319), whose candidates are the tokens that the model itself holds for unlikely.
    """

    def loss_of(p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        tail = p.where(p < limit, 0).scatter(1, targets, 0)  # (n, V)
        mass = tail.sum(dim=-1, keepdim=True)  # (n, 1)
        loss, d_logits = cross_entropy(p, targets)
        return loss + weight * mass.sum(), d_logits.add_(tail.addcmul_(p, mass, value=-1), alpha=weight)

    return loss_of


@torch.no_grad()
def measure_tail(
    model: GPT, loader: Iterable[tuple[Tensor, Tensor]], limit: float = 1e-3
) -> tuple[float, int]:
    """Return what `model` gives to the tail of `punish_tail`, the target included, added up over all targets
    of `loader`, and how many targets came from it. Where the first number is larger, the model wastes it.
    """
    drawn, came = 0.0, 0
    for ids, targets in loader:
        counted = (targets != IGNORE_INDEX).to(_device(model))
        p = model(ids.to(_device(model))).softmax(dim=-1)[counted]  # (N, V)
        drawn += p[p < limit].sum().item()
        came += int((p.gather(1, targets.to(p.device)[counted][:, None]) < limit).sum())
    return drawn, came


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss in nats over all targets of `loader`, without dropout."""
    was_training, total, n_targets = model.training, 0.0, 0
    model.eval()
    for ids, targets in loader:
        n = int((targets != IGNORE_INDEX).sum())
        if n == 0:  # the mean of no target is nan
            continue
        with autocast(model):
            total += model.loss(ids.to(_device(model)), targets.to(_device(model))).item() * n
        n_targets += n
    model.train(was_training)
    if n_targets == 0:
        raise ValueError(
            "no target to evaluate: the loader gave 0 batches, or padding alone; give it a longer text"
        )
    return total / n_targets


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the rate of step 1, 2, …: up in a line, then down half a cosine wave.

    Loshchilov and Hutter 2016, eq. 5, arXiv:1608.03983.
    """
    if step <= config.n_warmup:
        return config.lr * step / config.n_warmup
    done = (step - config.n_warmup) / (config.n_steps - config.n_warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)


class Muon(torch.optim.Optimizer):
    """Step each matrix along its momentum, made orthogonal: strong and weak directions move alike.

    The step of a matrix that widens its input is longer, by the root of its height over its width. The
    products run in the numbers that `precision` chooses.
    Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                alike[p.shape].append(p)
            for matrices in alike.values():  # in one product for all of a shape, and in short numbers: faster
                self._step(matrices, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in matrices]
        for p, mean in zip(matrices, means, strict=True):
            mean.lerp_(p.grad, 1 - momentum)
        ahead = torch.stack([p.grad for p in matrices]).lerp(torch.stack(means), momentum)  # Nesterov
        steps = orthogonalize(ahead.to(precision(ahead.device).dtype))  # (N, R, C)
        R, C = matrices[0].shape
        for p, step in zip(matrices, steps, strict=True):
            p.mul_(1 - lr * weight_decay).sub_(step, alpha=lr * math.sqrt(max(1, R / C)))


def orthogonalize(x: Float[Tensor, "*N R C"], n_steps: int = 5) -> Float[Tensor, "*N R C"]:
    """Bring the singular values of each matrix near 1 (0.7 to 1.2), and keep its singular vectors.

    Each step sends a singular value s to 3.4445 s − 4.775 s³ + 2.0315 s⁵ (Newton–Schulz), by products alone.
    Values below about 0.002 of the norm of the matrix need more than five steps, and stay smaller.
    Jordan et al. 2024.
    """
    if x.shape[-2] > x.shape[-1]:  # the products are smaller on the short side
        return orthogonalize(x.mT, n_steps).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_steps):
        squares = x @ x.mT  # (N, R, R)
        x = 3.4445 * x + (-4.775 * squares + 2.0315 * squares @ squares) @ x
    return x


class Together:
    """Let several optimizers step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


@dataclass(eq=False)
class _Asking:
    """Yield the batches of `loader`, some of which ask only for `rare` tokens that came before."""

    loader: DataLoader
    rare: Bool[Tensor, " V"]

    @property
    def sampler(self) -> BatchOrder:
        return self.loader.sampler

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (ids, targets) in enumerate(self.loader, self.sampler.start + 1):
            yield ids, self.ask(ids, targets) if self.asks(number) else targets

    def asks(self, number: int) -> bool:
        raise NotImplementedError

    def ask(self, ids: Int64[Tensor, "B T"], targets: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
        """Keep the targets that came before; where there are none, keep all of them."""
        seen = (targets[:, :, None] == ids[:, None, :]).tril().any(dim=-1)  # (B, T)
        asked = targets.where(seen & self.rare[targets.clamp(min=0)], IGNORE_INDEX)
        return targets if (asked == IGNORE_INDEX).all() else asked


@dataclass(eq=False)
class Recall(_Asking):
    """Yield the batches of `loader`, some of which ask only for words that came before.

    Such are the first `n_first` batches, and then every fourth up to number `n_mixed`. In them, only those
    targets count that are `rare` tokens and stand in the text already: to copy them is all there is to learn.
    """

    n_first: int
    n_mixed: int

    def asks(self, number: int) -> bool:
        return number <= self.n_first or (number <= self.n_mixed and number % 4 == 0)


@dataclass(eq=False)
class RecallUnknown(_Asking):
    """Let every second batch ask only for words that came before, and that `model` doesn't know yet.

    It knows a word to which it gives at least a half.
    """

    model: GPT

    def asks(self, number: int) -> bool:
        return number % 2 == 0

    @torch.no_grad()
    def ask(self, ids: Int64[Tensor, "B T"], targets: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
        asked = super().ask(ids, targets)
        counted = asked != IGNORE_INDEX  # (B, T)
        p = self.model(ids.to(_device(self.model))).softmax(dim=-1).cpu()[counted]  # (N, V)
        known = torch.zeros_like(counted)
        known[counted] = p.gather(1, asked[counted][:, None])[:, 0] >= 0.5
        return asked if known.equal(counted) else asked.masked_fill(known, IGNORE_INDEX)


def rare_tokens(
    tokens: Tensor | np.ndarray | str | os.PathLike, vocab_size: int, n_frequent: int = 150
) -> Bool[Tensor, " {vocab_size}"]:
    """Say of each token whether it is rare: not among the `n_frequent` most frequent ones of a text."""
    row = open_tokens(tokens) if isinstance(tokens, str | os.PathLike) else np.asarray(tokens)
    counts = torch.from_numpy(np.bincount(row, minlength=vocab_size))
    rare = torch.ones(vocab_size, dtype=torch.bool)
    rare[counts.argsort(descending=True, stable=True)[:n_frequent]] = False
    return rare


@torch.no_grad()
def part_twins(model: GPT, tokens: Int64[Tensor, " N"], cosine: float = 0.95) -> Int64[Tensor, " _"]:
    """Turn the vectors of those `tokens` that have fallen together into random directions; return their IDs.

    Words that stand in the same places, such as the days of the week, can end as one vector, with a cosine
    above `cosine`. The model can't tell them apart then, and training, which moves them alike, doesn't part
    them. Each vector keeps its length, and most of what it shares with its twins.
    """
    table = model.embeddings.tok_emb.weight
    directions = F.normalize(table[tokens], dim=-1)  # (N, C)
    twins = (directions @ directions.mT > cosine).sum(dim=-1) > 1  # one of them is itself
    noise = F.normalize(torch.randn_like(directions[twins]), dim=-1)
    lengths = table[tokens[twins]].norm(dim=-1, keepdim=True)
    table[tokens[twins]] = lengths * F.normalize(directions[twins] + 0.7 * noise, dim=-1)
    return tokens[twins]


@torch.no_grad()
def deepen(model: GPT, n_blocks: int) -> GPT:
    """Return a copy with `n_blocks` more blocks on top, which alone are trained: the rest is frozen.

    A new block begins by passing on almost what it reads. Its feed-forward layer adds nothing. Its attention
    looks for what resembles, queries and keys being alike, and adds a tenth of that: so it learns soon what
    to copy, as in Trockman and Kolter 2023, arXiv:2305.09828.
    """
    if n_blocks < 1:
        raise ValueError(f"n_blocks={n_blocks} must be at least 1: blocks are added, none is taken away")
    n_old = model.config.n_layers
    deeper = GPT(replace(model.config, n_layers=n_old + n_blocks))
    deeper.load_state_dict(model.state_dict(), strict=False)
    deeper.requires_grad_(False)
    for block in deeper.blocks[n_old:]:
        block.requires_grad_(True)
        attn, heads = block.attn, (-1, block.attn.d_head, model.config.d_model)
        n_sharing = attn.q_proj.out_features // attn.k_proj.out_features  # query heads to a head of keys
        nn.init.orthogonal_(attn.k_proj.weight, gain=0.5)
        nn.init.orthogonal_(attn.v_proj.weight)
        k, v = (
            layer.weight.view(heads).repeat_interleave(n_sharing, dim=0).flatten(0, 1)  # (C, C)
            for layer in (attn.k_proj, attn.v_proj)
        )
        attn.q_proj.weight.copy_(k)
        attn.o_proj.weight.copy_(0.1 * v.mT)
        block.ffn.down_proj.weight.zero_()
    return deeper


class Precision(NamedTuple):
    dtype: torch.dtype
    reason: str


def precision(device: torch.device | None = None) -> Precision:
    """Say in which numbers matrix products run best on a device, and why: bfloat16 where it is built in."""
    device = device or torch.device("cpu")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision(torch.bfloat16, "bfloat16: this GPU multiplies it in hardware")
    if device.type == "cpu":
        built_in = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
        if built_in:
            return Precision(torch.bfloat16, f"bfloat16: this CPU multiplies it in hardware ({built_in[0]})")
    return Precision(torch.float32, f"float32: this {device.type} has no bfloat16 instructions")


def autocast(model: nn.Module) -> contextlib.AbstractContextManager:
    """Run the matrix products of a block of code in the type that `precision` chooses."""
    device = _device(model)
    dtype = precision(device).dtype
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def log_table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["step", "tokens", "lr", "loss", "norm", "seconds", "val_loss"])


def save_model(model: GPT, path: str | os.PathLike) -> None:
    """Write the weights and the configuration to a safetensors file, beside the old one, then rename it."""
    config = {"kind": type(model.config).__name__, **asdict(model.config)}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head once
    with write_beside(path) as new:
        save_file(weights, new, metadata={"config": json.dumps(config)})


def load_model(path: str | os.PathLike, config: GPTConfig | None = None) -> GPT:
    """Read what `save_model` wrote; a model with parts of your own needs its `config`.

    ValueError where the file is damaged, or doesn't hold this model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["config"])
        weights = load_file(path)
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole file of save_model ({error}): save it again") from error
    kind = saved.pop("kind")
    kinds = {kind.__name__: kind for kind in (GPTConfig, LlamaConfig)}
    if config is None and kind not in kinds:
        raise ValueError(
            f"{path} was saved with the parts of {kind}: give load_model(path, config={kind}(…))"
        )
    model = GPT(config or kinds[kind](**saved))
    _load_weights(model, weights, path)
    return model


def load_tales_gpt() -> tuple[GPT, BPETokenizer]:
    """Read the model that this module's command trained on the course's tales, and its tokenizer."""
    data = Path(__file__).parents[1] / "data"
    return load_model(data / "tales-gpt.safetensors"), BPETokenizer.load(data / "tales-tokenizer.json")


def save_checkpoint(
    folder: str | os.PathLike, model: GPT, optimizer: torch.optim.Optimizer | Together, rows: list[dict]
) -> None:
    """Keep model, optimizer, random state and log, all or nothing, in place of the last checkpoint."""
    folder = Path(folder)
    whole, beside = folder / f"step-{len(rows):07d}", folder / "unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_model(model, beside / "model.safetensors")
        state = {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        torch.save(state, beside / "training.pt")
        log_table(rows).to_csv(beside / "log.csv", index=False)
        beside.replace(whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint in `folder`, if there is one."""
    return next(reversed(_checkpoints(Path(folder))), None)


def load_checkpoint(checkpoint: Path, model: GPT, optimizer: torch.optim.Optimizer | Together) -> list[dict]:
    """Put model, optimizer and random state back as they were, and return the rows of the log."""
    _load_weights(model, load_file(checkpoint / "model.safetensors"), checkpoint)
    state = torch.load(checkpoint / "training.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return pd.read_csv(checkpoint / "log.csv", float_precision="round_trip").to_dict("records")


class TensorBoard:
    """Write the log where TensorBoard reads it: a watcher for `train`. It needs the package `tensorboard`."""

    def __init__(self, folder: str | os.PathLike) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install tensorboard") from error
        self.writer, self.n_written = SummaryWriter(os.fspath(folder)), 0

    def __call__(self, model: GPT, log: pd.DataFrame) -> None:
        for row in log.iloc[self.n_written :].itertuples():
            for name in ("loss", "lr", "norm", "val_loss"):
                if math.isfinite(getattr(row, name)):
                    self.writer.add_scalar(name, getattr(row, name), row.step)
        self.n_written = len(log)
        self.writer.flush()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _endless(loader: DataLoader | Recall | RecallUnknown, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of epoch after epoch, the first `start` of them left out."""
    loader.sampler.start = start
    while True:
        yield from loader


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + "[0-9]" * 7))


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if expected != found:
        wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        raise ValueError(
            f"{path} holds another model: {wrong[0]} has the shape {found.get(wrong[0])} there and "
            f"{expected.get(wrong[0])} here, {len(wrong)} such tensors in all; build the model that was saved"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmlib.pretraining",
        description="Train a tokenizer and a GPT on text files of your own, in any language (UTF-8). "
        f"A file is one document, unless {END} separates several. Stopped, the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("texts", nargs="*", type=Path, help="text files")
    add(
        "--out", type=Path, required=True, help="folder for the tokenizer, the model, the log and checkpoints"
    )
    add("--tales", type=int, default=0, metavar="N", help="add N of the course's own tales")
    add("--by-document", action="store_true", help="one document a row, padded: for many short texts")
    add("--start", type=Path, help="go on from the model of a finished run, in this folder, not from nothing")
    add("--parts", choices=("gpt", "llama"), default="llama", help="whose parts the model has")
    add("--vocab-size", type=int, default=4096)
    add("--max-seq-len", type=int, default=256, help="tokens that the model sees at once")
    add("--d-model", type=int, default=256)
    add("--n-layers", type=int, default=4)
    add("--n-heads", type=int, default=4)
    add("--batch-size", type=int, default=16)
    add("--muon", action="store_true", help="train the matrices of the blocks by Muon")
    add(
        "--recall",
        type=int,
        default=0,
        metavar="N",
        help="in the first N steps, and in a quarter of those after them up to three quarters of the run, "
        "ask only for words that came before",
    )
    add(
        "--recall-unknown",
        action="store_true",
        help="in every second step, ask only for words that came before and that the model doesn't know yet",
    )
    add(
        "--part-twins", action="store_true", help="with --start: turn apart vectors that have fallen together"
    )
    add("--deepen", type=int, default=0, metavar="N", help="with --start: train N new blocks on top, alone")
    add(
        "--tail",
        type=float,
        default=0.0,
        metavar="W",
        help="add W times the probability of unlikely tokens that did not come to the loss",
    )
    add("--steps", type=int, default=2000)
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--warmup", type=int, default=100, help="steps until the highest learning rate")
    add("--eval-every", type=int, default=200, help="steps between two evaluations and checkpoints")
    add("--validation", type=float, default=0.05, help="share of the documents that is held out")
    add("--seed", type=int, default=0)
    add("--tensorboard", action="store_true", help="write for TensorBoard, into the folder `out`, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    parser = _arguments()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")


def _run(options: argparse.Namespace) -> None:
    out = options.out
    _check(options)
    _remember(options)
    tokenizer = _tokens(options)
    torch.manual_seed(options.seed)
    model = _model(options, tokenizer)
    if options.by_document:
        make, unit = make_document_loader, {"end_id": tokenizer.special_tokens[END]}
    else:
        make, unit = make_loader, {"vocab_size": tokenizer.vocab_size}
    sizes = {"max_seq_len": options.max_seq_len, "batch_size": options.batch_size, **unit}
    loader = make(out / "train.npy", seed=options.seed, **sizes)
    held_out = make(out / "validation.npy", shuffle=False, drop_last=False, **sizes)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {precision().reason}")
    rare = rare_tokens(out / "train.npy", tokenizer.vocab_size)
    if options.recall:
        loader = Recall(loader, rare, options.recall, 3 * options.steps // 4)
    elif options.recall_unknown:
        loader = RecallUnknown(loader, rare, model)
    config = (MuonConfig if options.muon else TrainingConfig)(
        n_steps=options.steps,
        lr=options.lr,
        n_warmup=options.warmup,
        eval_every=options.eval_every,
        tail=options.tail,
    )
    watchers: list[Watcher] = [_report]
    if options.tensorboard:
        watchers.append(TensorBoard(out / "tensorboard"))
    log = train(model, loader, config, validation=held_out, folder=out / "checkpoints", watchers=watchers)
    save_model(model, out / "model.safetensors")
    with write_beside(out / "log.csv") as new:
        log.to_csv(new, index=False)
    print(f"{out / 'model.safetensors'}: held-out loss {log['val_loss'].iloc[-1]:.3f} nats a token")


def _check(options: argparse.Namespace) -> None:
    """Refuse a shape beside --start, whose model has its own, and without it what needs a model."""
    if options.recall and options.recall_unknown:
        raise ValueError("--recall and --recall-unknown say what to ask for in two ways: give one")
    shape = ("parts", "vocab_size", "d_model", "n_layers", "n_heads")
    changes = ("part_twins", "deepen")
    barred = shape if options.start else changes
    given = [name for name in barred if getattr(options, name) != _arguments().get_default(name)]
    names = " ".join("--" + name.replace("_", "-") for name in given)
    if given and not options.start:
        raise ValueError(f"{names}: give --start too, the folder of the model to change")
    if given:
        raise ValueError(f"{names}: the model of {options.start} has its own shape, leave them out")


def _model(options: argparse.Namespace, tokenizer: BPETokenizer) -> GPT:
    vocab_size = tokenizer.vocab_size
    if options.start:
        model = load_model(options.start / "model.safetensors")
        if model.config.vocab_size != vocab_size or model.config.max_seq_len < options.max_seq_len:
            raise ValueError(
                f"the model of {options.start} knows {model.config.vocab_size} tokens and sees "
                f"{model.config.max_seq_len}: it can't go on with {vocab_size} and {options.max_seq_len}"
            )
        if options.part_twins:
            used = torch.from_numpy(np.unique(open_tokens(options.out / "train.npy")).astype(np.int64))
            twins = part_twins(model, used)
            words = [tokenizer.decode([i]) for i in twins.tolist()]
            print(f"{len(words)} tokens had fallen together: {words}")
        return deepen(model, options.deepen) if options.deepen else model
    kind = {"gpt": GPTConfig, "llama": LlamaConfig}[options.parts]
    return GPT(
        kind(
            vocab_size=vocab_size,
            max_seq_len=options.max_seq_len,
            d_model=options.d_model,
            n_layers=options.n_layers,
            n_heads=options.n_heads,
        )
    )


def _report(model: GPT, log: pd.DataFrame) -> None:
    last = log.iloc[-1]
    tqdm.write(f"step {last.step:.0f}: loss {last.loss:.3f}, held-out {last.val_loss:.3f} nats a token")


def _remember(options: argparse.Namespace) -> None:
    """Write the options down, or hold a run that goes on to those of its beginning.

    Only the learning rate may change, for a run that has come apart. Before the first checkpoint there is no
    run to go on with: a command that failed can be corrected, and begins anew.
    """
    settings = {name: str(value) for name, value in sorted(vars(options).items()) if name != "out"}
    path = options.out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)}, is {settings[name]}"
            for name in settings
            if before.get(name) != settings[name] and name != "lr"
        ]
        if not changed:
            return
        if last_checkpoint(options.out / "checkpoints"):
            raise ValueError(
                f"{options.out} holds a run with other settings ({'; '.join(changed)}): give another --out"
            )
        (options.out / "validation.npy").unlink(missing_ok=True)  # its tokens are made anew: see _tokens
    options.out.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as new:
        new.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _tokens(options: argparse.Namespace) -> BPETokenizer:
    """Make the tokenizer and the files of tokens, where a run before this one has not made them."""
    out = options.out
    if not (out / "validation.npy").exists():  # the last that is written
        split = _split(_documents(options), options)
        if options.start:
            tokenizer = BPETokenizer.load(options.start / "tokenizer.json")
        else:
            tokenizer = train_bpe(split[0], options.vocab_size, special_tokens=[END])
        tokenizer.save(out / "tokenizer.json")
        for name, part in zip(("train.npy", "validation.npy"), split, strict=True):
            ids = join_documents(map(tokenizer.encode, part), tokenizer.special_tokens[END])
            save_tokens(ids, out / name, tokenizer.vocab_size)
    return BPETokenizer.load(out / "tokenizer.json")


def _documents(options: argparse.Namespace) -> list[str]:
    documents = tales.tales(options.tales, seed=options.seed) if options.tales else []
    for path in options.texts:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from None
        documents += [document for document in text.split(END) if document.strip()]
    return documents


def _split(documents: list[str], options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Hold out some documents, or the end of the only one."""
    if len(documents) != 1:
        return split_documents(documents, options.validation, options.seed)
    if not 0 < options.validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, got {options.validation}")
    cut = round(len(documents[0]) * (1 - options.validation))
    return [documents[0][:cut]], [documents[0][cut:]]


if __name__ == "__main__":
    main()
