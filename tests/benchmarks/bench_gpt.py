"""Measure a training step beside `transformers` and `llms-from-scratch`: run this file.

Each library runs in a process of its own, in turn, from the same weights on the same batch.
`pip install --no-deps llms-from-scratch==1.0.19` brings the third, whose head is not tied; without it,
its rows are left out.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlib.gpt import GPT, GPTConfig

B, T, VOCAB_SIZE, N_LAYERS = 32, 128, 4096, 4
CONFIG = GPTConfig(vocab_size=VOCAB_SIZE, max_seq_len=T, d_model=256, n_layers=N_LAYERS, n_heads=4)
N_STEPS, N_ROUNDS = 6, 3

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(weights: dict[str, Tensor]) -> tuple[nn.Module, Loss]:
    model = GPT(CONFIG)
    model.load_state_dict(weights)
    return model, model.loss


def transformers(weights: dict[str, Tensor]) -> tuple[nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_positions=T, n_embd=CONFIG.d_model, n_layer=N_LAYERS, n_head=CONFIG.n_heads)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **no_dropout))
    names = {
        "embeddings.tok_emb": "transformer.wte",
        "embeddings.pos_emb": "transformer.wpe",
        "blocks": "transformer.h",
        "attn_norm": "ln_1",
        "ffn_norm": "ln_2",
        "attn.o_proj": "attn.c_proj",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
        "final_norm": "transformer.ln_f",
    }
    theirs = rename({name: w for name, w in weights.items() if "_proj" not in name}, names)
    for name, w in weights.items():
        if name.endswith(("o_proj.weight", "up_proj.weight", "down_proj.weight")):
            theirs |= rename({name: w.T}, names)
        elif name.endswith(("o_proj.bias", "up_proj.bias", "down_proj.bias")):
            theirs |= rename({name: w}, names)
    for i in range(N_LAYERS):
        for kind in ("weight", "bias"):
            fused = torch.cat([weights[f"blocks.{i}.attn.{part}_proj.{kind}"] for part in "qkv"])
            theirs[f"transformer.h.{i}.attn.c_attn.{kind}"] = fused.T if kind == "weight" else fused
    model.load_state_dict(theirs)
    return model, lambda ids, targets: model(input_ids=ids, labels=targets, shift_labels=targets).loss


def llms_from_scratch(weights: dict[str, Tensor]) -> tuple[nn.Module, Loss]:
    from llms_from_scratch.ch04 import GPTModel

    sizes = dict(emb_dim=CONFIG.d_model, n_layers=N_LAYERS, n_heads=CONFIG.n_heads, context_length=T)
    model = GPTModel(dict(vocab_size=VOCAB_SIZE, **sizes, drop_rate=0.0, qkv_bias=True))
    names = {
        "embeddings.": "",
        "blocks": "trf_blocks",
        "attn_norm.weight": "norm1.scale",
        "attn_norm.bias": "norm1.shift",
        "ffn_norm.weight": "norm2.scale",
        "ffn_norm.bias": "norm2.shift",
        "attn.q_proj": "att.W_query",
        "attn.k_proj": "att.W_key",
        "attn.v_proj": "att.W_value",
        "attn.o_proj": "att.out_proj",
        "ffn.up_proj": "ff.layers.0",
        "ffn.down_proj": "ff.layers.2",
        "final_norm.weight": "final_norm.scale",
        "final_norm.bias": "final_norm.shift",
        "lm_head": "out_head",
    }
    model.load_state_dict(rename(weights, names), strict=False)  # its causal masks are its own
    return model, lambda ids, targets: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    def theirs(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    return {theirs(name): weight for name, weight in weights.items()}


CONTENDERS = {"llmlib": ours, "transformers": transformers, "llms-from-scratch": llms_from_scratch}


def measure(name: str, precision: str) -> None:
    """Print the loss of the first step and the median of tokens a second."""
    torch.manual_seed(0)
    weights = GPT(CONFIG).state_dict()
    ids, targets = torch.randint(VOCAB_SIZE, (2, B, T))
    model, loss_of = CONTENDERS[name](weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses, times = [], []
    for _ in range(N_STEPS + 2):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
    print(losses[0], losses[-1], B * T / median(times[2:]))


def main() -> None:
    names = [
        name for name in CONTENDERS if importlib.util.find_spec(name.replace("-", "_")) or name == "llmlib"
    ]
    rows = []
    for _ in range(N_ROUNDS):
        for precision in ("float32", "bf16"):
            for name in names:
                command = [sys.executable, __file__, name, precision]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                first, last, speed = map(float, result.stdout.split()[-3:])
                rows.append((precision, name, first, last, speed))
    columns = ["precision", "library", "first loss", f"loss {N_STEPS + 2}", "tokens/s"]
    table = pd.DataFrame(rows, columns=columns).groupby(["precision", "library"], sort=False).median()
    for precision, losses in table["first loss"].groupby(level="precision"):
        if losses.max() - losses.min() > 1e-3:
            raise SystemExit(f"not the same work: first losses {losses.to_dict()} in {precision}")
    ratios = table["tokens/s"] / table["tokens/s"].xs("transformers", level="library")
    table["times transformers"] = ratios.round(2)
    print(table.round({"first loss": 5, f"loss {N_STEPS + 2}": 5, "tokens/s": 0}).to_string())


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
