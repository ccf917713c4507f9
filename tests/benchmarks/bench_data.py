"""Measure the loader beside torch's own way and beside what a training step consumes: run this file."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from llmlib.data import make_loader, save_tokens, token_windows

B, T, VOCAB_SIZE, N_TOKENS = 32, 128, 4096, 50_000_000


def seconds(work: Callable[[], None], repeats: int = 5) -> float:
    """Return the median time of `work`, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)


def tokens_per_second(loader: DataLoader, n_batches: int = 200) -> float:
    batches = iter(loader)
    next(batches)

    def read():
        for _ in range(n_batches):
            next(batches)

    return n_batches * B * T / seconds(read)


class TinyGPT(nn.Module):
    """Stand in for chapter 06's GPT with torch's own layers: 4 layers, d_model 256."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
        self.tok_emb = nn.Embedding(VOCAB_SIZE, 256)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.lm_head = nn.Linear(256, VOCAB_SIZE)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.lm_head(self.blocks(self.tok_emb(tokens), mask, is_causal=True))


def training_tokens_per_second() -> float:
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs, targets = torch.randint(VOCAB_SIZE, (2, B, T))

    def step():
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return B * T / seconds(step)


def measure() -> pd.DataFrame:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.npy"
        some = tokens[: N_TOKENS // 10].tolist()
        rates = {"save_tokens": len(some) / seconds(lambda: save_tokens(some, path, VOCAB_SIZE), 3)}
        np.save(path, tokens)
        rates |= {
            "one training step (4 layers, d_model 256)": training_tokens_per_second(),
            "torch's DataLoader, item by item": tokens_per_second(
                DataLoader(token_windows(tokens, T), B, shuffle=True)
            ),
            "make_loader, from memory": tokens_per_second(make_loader(tokens, T, B)),
            "make_loader, from disk": tokens_per_second(make_loader(path, T, B)),
        }
    table = pd.DataFrame({"tokens per second": pd.Series(rates)})
    step = rates["one training step (4 layers, d_model 256)"]
    table["training steps it feeds"] = table["tokens per second"] / step
    return table


if __name__ == "__main__":
    print(measure().to_string(float_format="{:,.1f}".format))
