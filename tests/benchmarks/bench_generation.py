"""Measure generation with a cache beside `transformers`: run this file.

Each library runs in a process of its own, in turn, from the same random weights of SmolLM2-135M's shape, and
writes 64 tokens, the likeliest ones, after a prompt of 16.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from torch import Tensor

from llmlib.generation import for_inference, generate, temperature
from llmlib.gpt import GPT
from llmlib.llama import SMOLLM2_135M as CONFIG

N_PROMPT, N_TOKENS, N_RUNS, N_ROUNDS = 16, 64, 3, 3

Writer = Callable[[Tensor], Tensor]


def ours(model: GPT) -> Writer:
    fast = for_inference(model)
    return lambda ids: generate(fast, ids, N_TOKENS, [temperature(0.0)])


def transformers(model: GPT) -> Writer:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.d_model,
        intermediate_size=CONFIG.d_ff,
        num_hidden_layers=CONFIG.n_layers,
        num_attention_heads=CONFIG.n_heads,
        num_key_value_heads=CONFIG.n_kv_heads,
        max_position_embeddings=CONFIG.max_seq_len,
        rope_parameters=dict(rope_type="default", rope_theta=CONFIG.rope_base),
        rms_norm_eps=CONFIG.norm_eps,
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).to(model.lm_head.weight.dtype)
    names = {
        "embeddings.tok_emb": "model.embed_tokens",
        "blocks": "model.layers",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn.": "self_attn.",
        "ffn.": "mlp.",
        "final_norm": "model.norm",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight
    theirs.load_state_dict(weights)
    theirs.eval().generation_config.eos_token_id = None
    return lambda ids: theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS, do_sample=False, use_cache=True
    )


CONTENDERS = {"llmlib": ours, "transformers": transformers}


def measure(name: str, precision: str) -> None:
    """Print the text, and the median of new tokens a second."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for block in model.blocks:  # fresh weights would repeat one token
        block.ffn.down_proj.weight.data *= 50
    if precision == "bf16":
        model.bfloat16()
    ids = torch.randint(CONFIG.vocab_size, (1, N_PROMPT))
    write, times = CONTENDERS[name](model), []
    for _ in range(N_RUNS + 1):
        begin = time.perf_counter()
        text = write(ids)
        times.append(time.perf_counter() - begin)
    print(",".join(map(str, text[0, N_PROMPT:].tolist())), N_TOKENS / median(times[1:]))


def main() -> None:
    rows = []
    for _ in range(N_ROUNDS):
        for precision in ("float32", "bf16"):
            for name in CONTENDERS:
                command = [sys.executable, __file__, name, precision]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                text, speed = result.stdout.split()[-2:]
                rows.append((precision, name, text, float(speed)))
    table = pd.DataFrame(rows, columns=["precision", "library", "text", "tokens/s"])
    exact = table[table["precision"] == "float32"]
    if exact["text"].nunique() > 1 or len(exact["text"].iloc[0].split(",")) != N_TOKENS:
        raise SystemExit(f"not the same work: in float32 the libraries wrote {exact['text'].unique()}")
    speeds = table.groupby(["precision", "library"], sort=False)[["tokens/s"]].median()
    ratios = speeds["tokens/s"] / speeds["tokens/s"].xs("transformers", level="library")
    speeds["times transformers"] = ratios.round(2)
    print(speeds.round({"tokens/s": 1}).to_string())


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
