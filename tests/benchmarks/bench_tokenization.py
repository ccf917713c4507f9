"""Time training beside tokenizers, and encoding beside tiktoken.

Run: python -m tests.benchmarks.bench_tokenization
"""

import inspect
import pkgutil
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from llmlib import resources
from llmlib.tokenization import GPT2_PATTERN, gpt2_tokenizer, train_bpe

VOCAB_SIZE = 4096
TEXT_BYTES = 1_000_000
COPIES = 10
REPEATS = 5


def english_text() -> str:
    """Return 1 MB of English: the docstrings of Python's standard library, in the order of file names."""
    folder = Path(inspect.getfile(pkgutil)).parent
    docstrings, size = [], 0
    for file in sorted(folder.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        for part in file.read_text(encoding="utf-8", errors="ignore").split('"""')[1::2]:
            docstrings.append(inspect.cleandoc(part))
            size += len(docstrings[-1].encode())
        if size > TEXT_BYTES:
            break
    return "\n\n".join(docstrings).encode()[:TEXT_BYTES].decode(errors="ignore")


def train_rust(text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<unk>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each work, measured in turns so that a busy moment meets all of them."""
    times = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(task: str, works: dict[str, Callable[[], object]], peer: str, n_bytes: int) -> pd.DataFrame:
    times = pd.Series(seconds(works), name="median (s)")
    return pd.DataFrame(
        {
            "task": task,
            "by": times.index,
            "median (s)": times.values,
            "speed (MB/s)": n_bytes / 1e6 / times.values,
            "time / peer's time": times.values / times[peer],
        }
    )


def main() -> None:
    text = english_text()
    n_bytes = len(text.encode())
    ours = gpt2_tokenizer()
    ours_as_tiktoken = ours.to_tiktoken()
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(resources.path("gpt2-merges")), str(resources.path("gpt2-vocab"))
    )
    reference = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    rust = f"tokenizers {version('tokenizers')}"
    openai = f"tiktoken {version('tiktoken')}"
    tables = [
        table(
            f"train {VOCAB_SIZE} tokens",
            {
                rust: lambda: train_rust(text),
                "llmlib": lambda: train_bpe(text, VOCAB_SIZE),
            },
            rust,
            n_bytes,
        ),
        table(
            f"train {VOCAB_SIZE} tokens, {COPIES} times the text",
            {
                rust: lambda: train_rust(text * COPIES),
                "llmlib": lambda: train_bpe(text * COPIES, VOCAB_SIZE),
                "llmlib, 2 processes": lambda: train_bpe(text * COPIES, VOCAB_SIZE, n_workers=2),
            },
            rust,
            n_bytes * COPIES,
        ),
        table(
            "encode with GPT-2's tokens",
            {
                openai: lambda: reference.encode_ordinary(text),
                "llmlib, to_tiktoken()": lambda: ours_as_tiktoken.encode_ordinary(text),
                "llmlib, new tokenizer": lambda: (ours._cache.clear(), ours.encode(text)),
                "llmlib, words seen before": lambda: ours.encode(text),
                "llmlib, encode_iterable": lambda: list(ours.encode_iterable(text.splitlines(keepends=True))),
            },
            openai,
            n_bytes,
        ),
    ]
    print(pd.concat(tables).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
