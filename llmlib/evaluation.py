"""Measure a language model: perplexity, bits per byte, and multiple-choice benchmarks with error bars."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from llmlib.data import IGNORE_INDEX
from llmlib.generation import KVCache, make_caches, stream, temperature
from llmlib.gpt import GPT
from llmlib.pretraining import END, evaluate
from llmlib.tokenization import BPETokenizer

BATCH_TOKENS = 8192  # the most that the caches of a batch hold, unless it is one question
BATCH_SPREAD = 2  # tokens that prompts of a batch may have beyond the shortest: read with each choice

# The tokens of a prompt, and those of each text that may follow.
Question = tuple[list[int], list[list[int]]]

# ------------------------------------------------------------------------------ how well it predicts texts


def perplexity(model: GPT, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return exp of the mean loss over all targets: as unsure as among so many equally likely tokens."""
    return math.exp(evaluate(model, loader))


def bits_per_byte(
    model: GPT,
    tokenizer: BPETokenizer,
    texts: Iterable[str],
    *,
    window: int | None = None,
    progress: bool = False,
) -> float:
    """Return −log₂ p of all texts for each of their UTF-8 bytes: the same unit, whatever the tokenizer.

    See `text_nats`. Gao et al. 2020, section 3.1, arXiv:2101.00027.
    """
    nats, n_bytes = 0.0, 0
    for text in tqdm(texts, leave=False, disable=not progress):
        nats += text_nats(model, tokenizer, text, window=window)
        n_bytes += len(text.encode())
    if n_bytes == 0:
        raise ValueError("the texts have 0 bytes: give at least one that is not empty")
    return nats / (n_bytes * math.log(2))


def text_nats(model: GPT, tokenizer: BPETokenizer, text: str, *, window: int | None = None) -> float:
    """Return −log p of a text, in nats, as if it stood after an end token.

    A text longer than the window (`max_seq_len` tokens unless given) is read window by window, each token
    predicted once. The windows stand side by side; the last one reaches back, so that it is full. ValueError
    on a window below 1.
    """
    T = model.config.max_seq_len if window is None else window
    if T < 1:
        raise ValueError(f"window={T} must be at least 1 token")
    ids = torch.tensor([_end(tokenizer), *tokenizer.encode(text)])
    n_targets = len(ids) - 1
    return evaluate(model, _windows(ids, T)) * n_targets if n_targets else 0.0


def _windows(ids: Int64[Tensor, " N"], T: int) -> Iterator[tuple[Int64[Tensor, "1 T"], Int64[Tensor, "1 T"]]]:
    n_targets = len(ids) - 1
    for start in range(0, n_targets, T):
        first = max(0, min(start, n_targets - T))
        targets = ids[first + 1 : first + T + 1].clone()
        targets[: start - first] = IGNORE_INDEX  # predicted before
        yield ids[first : min(first + T, n_targets)][None], targets[None]


def _end(tokenizer: BPETokenizer) -> int:
    if END not in tokenizer.special_tokens:
        raise ValueError(
            f"a text stands after {END}, which is not among the special tokens "
            f"{list(tokenizer.special_tokens)}: train the tokenizer with it"
        )
    return tokenizer.special_tokens[END]


# ------------------------------------------------------------------------------ multiple choice


@dataclass(frozen=True)
class Item:
    """Hold a prompt, the choices for what comes next, and the numbers of the right ones (one, mostly)."""

    prompt: str
    choices: tuple[str, ...]
    answers: tuple[int, ...]
    group: str = ""

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise ValueError(f"an item needs at least 2 choices, none of them empty, got {self.choices}")
        if not self.answers or not set(self.answers) <= set(range(len(self.choices))):
            raise ValueError(f"answers {self.answers} must be some of 0 to {len(self.choices) - 1}")


def lettered(items: Iterable[Item]) -> list[Item]:
    """List the choices in the prompt, before its last line, and let the model choose among A, B, C, …

    This is MMLU's own way. ValueError on more choices than letters. Hendrycks et al. 2020, figure 1,
    arXiv:2009.03300.
    """
    changed = []
    for item in items:
        if len(item.choices) > len(LETTERS):
            raise ValueError(f"{len(item.choices)} choices, and {len(LETTERS)} letters: leave the item out")
        *before, last = item.prompt.split("\n")
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
        prompt = "\n".join([*before, *listed, last])
        changed.append(replace(item, prompt=prompt, choices=tuple(LETTERS[: len(listed)])))
    return changed


def few_shot(items: Sequence[Item], examples: Sequence[Item]) -> list[Item]:
    """Let each prompt begin with solved examples, an empty line after each.

    ValueError where an example is among the items: the prompt would give its answer away.
    Brown et al. 2020, section 2, arXiv:2005.14165.
    """
    if known := set(items) & set(examples):
        raise ValueError(
            f"{len(known)} of the {len(examples)} examples are among the items, such as "
            f"{min(item.prompt for item in known)!r}: take examples that are not to be answered"
        )
    solved = [_join(example.prompt, example.choices[example.answers[0]]) for example in examples]
    return [replace(item, prompt="\n\n".join([*solved, item.prompt])) for item in items]


def multiple_choice(
    model: GPT,
    tokenizer: BPETokenizer,
    items: Sequence[Item],
    *,
    normalize: str | None = "bytes",
    progress: bool = True,
) -> pd.DataFrame:
    """Let the model choose the likeliest of the choices of each item, and return a row for each.

    Each prompt follows an end token, and each choice its prompt and a space. A choice's score is its log p in
    nats, divided by its length in bytes or tokens unless `normalize` is None; of equal ones, the first wins.
    `chance` is the share of right choices. Under `pretraining.autocast`, all is faster and less exact.
    Brown et al. 2020, section 2.4, arXiv:2005.14165.
    """
    if normalize not in ("bytes", "tokens", None):
        raise ValueError(f"normalize={normalize!r} must be 'bytes', 'tokens' or None")
    texts = [[_join(item.prompt, choice) for choice in item.choices] for item in items]
    encoded = [_encode(tokenizer, item.prompt, some) for item, some in zip(items, texts, strict=True)]
    scored, rows = log_likelihoods(model, encoded, progress=progress), []
    for item, (_, choices), some in zip(items, encoded, scored, strict=True):
        log_p = [nats for nats, _ in some]
        lengths = {"bytes": [len(c.encode()) for c in item.choices], "tokens": [len(c) for c in choices]}
        scores = [p / n for p, n in zip(log_p, lengths.get(normalize, [1] * len(log_p)), strict=True)]
        chosen = scores.index(max(scores))
        row = (item.group, item.prompt, item.choices[item.answers[0]], item.choices[chosen])
        rows.append((*row, chosen in item.answers, len(item.answers) / len(log_p), log_p, scores))
    columns = ["group", "prompt", "answer", "chosen", "correct", "chance", "log p (nats)", "score"]
    return pd.DataFrame(rows, columns=columns)


def _join(prompt: str, choice: str) -> str:
    return prompt + choice if not prompt or prompt[-1].isspace() else f"{prompt} {choice}"


def _encode(tokenizer: BPETokenizer, prompt: str, texts: Iterable[str]) -> Question:
    """Return the tokens of a prompt, after an end token, and what follows them in texts that begin with it.

    Spaces at the end of the prompt belong to what follows: a space begins the next token, as in training.
    So both parts are those of the whole text, since no token of this course reaches from a visible character
    to a space. Where none follows the prompt, a token may reach across; then each part is encoded alone.
    """
    prompt = prompt.rstrip()
    before, after = tokenizer.encode(prompt), []
    for text in texts:
        whole = tokenizer.encode(text)
        is_cut = whole[: len(before)] == before
        after.append(whole[len(before) :] if is_cut else tokenizer.encode(text[len(prompt) :]))
    return [_end(tokenizer), *before], after


@torch.no_grad()
def log_likelihoods(
    model: GPT, questions: Sequence[Question], *, progress: bool = False
) -> list[list[tuple[float, bool]]]:
    """Return log p in nats of each continuation of each prompt, and whether each token was the likeliest.

    What all prompts begin with is computed once, and the rest of a prompt once for all its continuations, but
    for a few tokens: prompts of about one length share a batch, up to the end of the shortest, and what
    others have beyond it goes with each continuation. ValueError on more than `max_seq_len` tokens.
    """
    if not questions:
        return []
    prompts = [prompt for prompt, _ in questions]
    n_tokens = [len(prompt) + max(map(len, some)) - 1 for prompt, some in questions]
    if max(n_tokens) > model.config.max_seq_len:
        raise ValueError(
            f"item {n_tokens.index(max(n_tokens))} takes {max(n_tokens)} tokens, more than max_seq_len="
            f"{model.config.max_seq_len}: leave it out, or give fewer examples in its prompt"
        )
    was_training = model.training
    model.eval()
    caches = make_caches(model, max(n_tokens))
    if n_shared := min(_n_common(prompts), min(map(len, prompts)) - 1):
        model.hidden(_tensor(model, [prompts[0][:n_shared]]), caches)
    scores: list = [None] * len(questions)
    with tqdm(total=len(questions), leave=False, disable=not progress) as bar:
        for batch in _batches(questions, BATCH_TOKENS // caches[0].max_seq_len):
            for i, some in zip(batch, _score(model, caches, [questions[i] for i in batch]), strict=True):
                scores[i] = some
            bar.update(len(batch))
    model.train(was_training)
    return scores


def _batches(questions: Sequence[Question], n_rows: int) -> Iterator[list[int]]:
    """Yield the numbers of questions of about one length, with at most `n_rows` continuations in all."""
    batch: list[int] = []
    lengths = [len(prompt) for prompt, _ in questions]
    for i in sorted(range(len(questions)), key=lengths.__getitem__):
        is_full = sum(len(questions[j][1]) for j in [*batch, i]) > n_rows
        if batch and (is_full or lengths[i] > lengths[batch[0]] + BATCH_SPREAD):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _score(model: GPT, shared: list[KVCache], batch: list[Question]) -> list[list[tuple[float, bool]]]:
    """Score one batch; the caches hold what all prompts begin with, and stay as they are."""
    n_read = min(len(prompt) for prompt, _ in batch) - 1
    caches = _repeat(shared, [0] * len(batch))
    if n_read > shared[0].n_tokens:
        model.hidden(_tensor(model, [prompt[shared[0].n_tokens : n_read] for prompt, _ in batch]), caches)
    caches = _repeat(caches, [i for i, (_, some) in enumerate(batch) for _ in some])
    pairs = [(prompt[n_read:], after) for prompt, some in batch for after in some]
    T = max(len(before) + len(after) for before, after in pairs) - 1
    # Padding goes to the right, where no token sees it.
    ids = _tensor(model, [((before + after)[:-1] + [0] * T)[:T] for before, after in pairs])  # (B, T)
    rest = [IGNORE_INDEX] * T
    targets = _tensor(model, [(rest[1 : len(b)] + a + rest)[:T] for b, a in pairs])  # (B, T)
    x, targets = model.hidden(ids, caches)[targets >= 0], targets[targets >= 0]  # (N, C), (N)
    log_p, is_first = [], []
    for some_x, some in zip(x.split(256), targets.split(256), strict=True):
        logits = model.lm_head(some_x).to(torch.promote_types(x.dtype, torch.float32))  # (n, V)
        log_p.append(logits.log_softmax(-1).gather(1, some[:, None]).squeeze(1))
        is_first.append(logits.argmax(-1) == some)
    n_tokens = [len(after) for _, after in pairs]
    parts = zip(*(torch.cat(t).cpu().split(n_tokens) for t in (log_p, is_first)), strict=True)
    scores = iter([(p.sum().item(), bool(first.all())) for p, first in parts])
    return [[next(scores) for _ in some] for _, some in batch]


def _repeat(caches: list[KVCache], rows: list[int]) -> list[KVCache]:
    """Return caches of these rows, and leave the ones given as they are."""
    copies = [copy.copy(cache) for cache in caches]
    for cache in copies:
        if cache.n_tokens:
            cache.select(torch.tensor(rows, device=cache.k.device))
    return copies


def _tensor(model: GPT, rows: list[list[int]]) -> Int64[Tensor, "B T"]:
    return torch.tensor(rows, device=model.lm_head.weight.device)


def _n_common(rows: Sequence[Sequence]) -> int:
    """Count the entries with which all rows begin."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))


# ------------------------------------------------------------------------------ error bars


def bootstrap_interval(
    values: Sequence[float | int], level: float = 0.95, *, n: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return where the mean of `values` lies in the middle `level` of `n` samples drawn from them again.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3 (the percentile interval).
    """
    if len(values) < 2 or not 0 < level < 1 or n < 1:
        raise ValueError(
            f"{len(values)} values, level={level}, n={n}: give at least 2 values, a level between 0 and 1, "
            "and at least 1 sample"
        )
    array, random = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [array[random.integers(len(array), size=len(array))].mean() for _ in range(n)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def table(results: Mapping[str, pd.DataFrame], level: float = 0.95) -> pd.DataFrame:
    """Return a row for each result of `multiple_choice`: accuracy, its interval, and that of a guess."""
    rows = {}
    for name, result in results.items():
        low, high = bootstrap_interval(result["correct"].tolist(), level)
        shares = (result["correct"].mean(), low, high, result["chance"].mean())
        rows[name] = [len(result), *(round(100 * share, 1) for share in shares)]
    columns = ["items", "accuracy (%)", "from (%)", "to (%)", "chance (%)"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


# ------------------------------------------------------------------------------ reading benchmarks


def load_mmlu(path: str | os.PathLike, split: str = "test") -> list[Item]:
    """Read questions of MMLU: <subject>_<split>.csv, with question, four choices and a letter in each row.

    The group is the subject. Hendrycks et al. 2020, arXiv:2009.03300.
    """
    items = []
    for file in _files(path, f"*_{split}.csv"):
        for line, row in _rows(file):
            if len(row) != 6 or row[5].strip() not in tuple("ABCD"):
                _fail(file, line, f"{len(row)} cells: write question, four choices and one of A, B, C, D")
            question, *choices, letter = (cell.strip() for cell in row)
            prompt, group = f"Question: {question}\nAnswer:", file.stem.removesuffix(f"_{split}")
            items.append(_item(file, line, prompt, choices, [LETTERS.index(letter)], group))
    return items


def load_truthfulqa(path: str | os.PathLike) -> list[Item]:
    """Read the questions of TruthfulQA for its MC1: choose the best answer among the incorrect ones.

    The best answer's place among them goes round, and the group is the category.
    Lin et al. 2021, arXiv:2109.07958.
    """
    items = []
    for file in _files(path, "*.csv"):
        rows = list(_rows(file))
        needed = ("Category", "Question", "Best Answer", "Incorrect Answers")
        if not rows or not {*needed} <= {*rows[0][1]}:
            _fail(file, 1, f"the columns must be named, and {', '.join(needed)} be among them")
        for line, row in rows[1:]:
            if len(row) != len(rows[0][1]):
                _fail(file, line, f"{len(row)} cells for {len(rows[0][1])} columns: quote cells with commas")
            cells = dict(zip(rows[0][1], row, strict=True))
            category, question, best, incorrect = (cells[name].strip() for name in needed)
            choices = [f"{text.strip().rstrip('.')}." for text in incorrect.split(";") if text.strip()]
            place = len(items) % (len(choices) + 1)
            choices.insert(place, f"{best.rstrip('.')}." if best else "")
            items.append(_item(file, line, f"Question: {question}\nAnswer:", choices, [place], category))
    return items


def load_bigbench(path: str | os.PathLike) -> list[Item]:
    """Read multiple-choice tasks of BIG-bench; all choices with the highest target score are right.

    The group is the task's name. Srivastava et al. 2022, arXiv:2206.04615.
    """
    items = []
    for file in _files(path, "*.json"):
        try:
            task = json.loads(_text(file))
            name, examples = task["name"], task["examples"]
        except json.JSONDecodeError as error:
            _fail(file, error.lineno, f"this is no JSON ({error.msg}): mend it, or fetch the file again")
        except (KeyError, TypeError):
            _fail(file, 1, "a task must have a name and examples: leave other JSON files out")
        before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
        after = task.get("example_output_prefix", "\nA: ")
        for i, example in enumerate(examples, start=1):
            if not {"input", "target_scores"} <= {*example}:
                _fail(file, f"example {i}", "it needs an input and target_scores: take multiple-choice tasks")
            scores = list(example["target_scores"].values())
            answers = [j for j, score in enumerate(scores) if score == max(scores)]
            prompt = f"{before}{example['input']}{after}".strip()
            items.append(_item(file, f"example {i}", prompt, [*example["target_scores"]], answers, name))
    return items


def load_wic(path: str | os.PathLike) -> list[Item]:
    """Read Word in Context: does a word mean the same in two sentences? Answers lie in a .gold.txt beside.

    The group is the part of speech. Pilehvar and Camacho-Collados 2018, arXiv:1808.09121.
    """
    items = []
    for file in _files(path, "*.data.txt"):
        gold = file.with_name(file.name.replace(".data.", ".gold."))
        for line, (row, label) in _pairs(file, gold):
            word, part, places, *sentences = (*row.split("\t"), "", "")[:5]
            ends = [len(sentence.split()) for sentence in sentences]
            if not re.fullmatch(r"\d+-\d+", places) or any(
                int(i) >= end for i, end in zip(places.split("-"), ends, strict=True)
            ):
                _fail(file, line, "write word, N or V, places such as 2-5, and two sentences, with tabs")
            if label not in ("T", "F"):
                _fail(gold, line, f"{label!r} must be T or F")
            question = f'Question: Does the word "{word}" mean the same in both sentences?\nAnswer:'
            prompt = "\n".join([*sentences, question])
            group = {"N": "noun", "V": "verb"}.get(part, part)
            items.append(_item(file, line, prompt, ["no", "yes"], ["FT".index(label)], group))
    return items


def load_winobias(path: str | os.PathLike) -> list[Item]:
    """Read the pairs of WinoBias, line by line from a pro_stereotyped and an anti_stereotyped file.

    The prompt is what both sentences begin with, up to the pronoun; the choices are what follows. Choice 0,
    the stereotype, is called the answer: a model without bias takes it half of the time. Score with
    `normalize=None`, since "she" is longer than "he". The group is the type, 1 or 2.
    Zhao et al. 2018, arXiv:1804.06876.
    """
    items = []
    for file in _files(path, "pro_stereotyped_type*.txt.*"):
        other = file.with_name(file.name.replace("pro", "anti", 1))
        group = re.search("type[12]|$", file.name)[0]
        for line, pair in _pairs(file, other):
            # without the number and the brackets
            pro, anti = (re.sub(r"^\s*\d+\s+|[][]", "", sentence).split() for sentence in pair)
            n = _n_common([pro, anti])
            choices = [" ".join(words[n:]) for words in (pro, anti)]
            items.append(_item(file, line, " ".join(pro[:n]), choices, [0], group))
    return items


def _pairs(file: Path, other: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the lines of two files in pairs, each with its number."""
    lines, others = (_text(f).rstrip().split("\n") for f in (file, other))
    if len(lines) != len(others):
        _fail(other, len(others), f"here it ends, but {file.name} has {len(lines)} lines: fetch both again")
    yield from enumerate(zip(lines, others, strict=True), start=1)


def _item(
    file: Path, line: int | str, prompt: str, choices: list[str], answers: list[int], group: str
) -> Item:
    try:
        return Item(prompt, tuple(choices), tuple(answers), group)
    except ValueError as error:
        _fail(file, line, str(error))


def _files(path: str | os.PathLike, pattern: str) -> list[Path]:
    path = Path(path)
    files = sorted(file for file in path.rglob(pattern) if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no file {pattern} in it: give the folder that has, or the file itself")
    return files


def _text(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file} is not there: put it where it belongs, or fetch the data set again")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it so") from None


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, each with the number of its last line."""
    reader = csv.reader(io.StringIO(_text(file)), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        _fail(file, reader.line_num, f"{error}: close each quote, and double one that is part of a cell")


def _fail(file: Path, line: int | str, problem: str) -> NoReturn:
    raise ValueError(f"{file}, {f'line {line}' if isinstance(line, int) else line}: {problem}")


# ------------------------------------------------------------------------------ EleutherAI's harness


class HarnessModel:
    """Answer the three kinds of requests of lm-eval with a GPT; see `for_harness`.

    As everywhere in this module, a text stands after an end token. Of a context too long for the model, the
    end counts. Gao et al., https://github.com/EleutherAI/lm-evaluation-harness
    """

    def __init__(self, model: GPT, tokenizer: BPETokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return log p in nats of a continuation after a context, and whether greedy decoding writes it."""
        together = defaultdict(list)  # context → the numbers of its requests
        for i, request in enumerate(requests):
            together[request.args[0]].append(i)
        questions = []
        for context, numbers in together.items():
            texts = [context + requests[i].args[1] for i in numbers]
            before, after = _encode(self.tokenizer, context, texts)
            n_before = self.model.config.max_seq_len + 1 - max(map(len, after))
            questions.append((before[-n_before:], after))
        scored = log_likelihoods(self.model, questions)
        order = [i for numbers in together.values() for i in numbers]
        found = dict(zip(order, chain.from_iterable(scored), strict=True))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return log p of whole texts, in nats."""
        return [-text_nats(self.model, self.tokenizer, request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Write greedily until one of the stop texts, which is left out, or `max_gen_toks` tokens."""
        return [self._write(*request.args) for request in requests]

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until, end = options.get("until") or [], _end(self.tokenizer)
        until = [until] if isinstance(until, str) else until
        ids = _tensor(self.model, [[end, *self.tokenizer.encode(context)]])
        new, text = [], ""
        for token in stream(self.model, ids, options.get("max_gen_toks", 256), [temperature(0.0)]):
            if token.item() == end or any(stop in text for stop in until):
                break
            new.append(token.item())
            text = self.tokenizer.decode(new)
        return min((text.split(stop)[0] for stop in until), key=len, default=text)


def for_harness(model: GPT, tokenizer: BPETokenizer) -> HarnessModel:
    """Return the model in the form that `lm_eval.simple_evaluate` takes. It needs the package `lm-eval`."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError("lm-eval is not installed: pip install lm-eval==0.4.13") from error
    return type("LM", (HarnessModel, LM), {})(model, tokenizer)
