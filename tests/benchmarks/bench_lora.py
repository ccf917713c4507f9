"""Measure a LoRA training step of SmolLM2 beside `transformers` with `peft`: install peft, and run this.

Both train in one process, on one thread, in turn, from the same weights and adapters, on the same batches of
the course's instructions, and must come to the same losses. Get peft by `pip install peft`.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice

import pandas as pd
import torch
from torch import Tensor, nn

from llmlib.gpt import GPT
from llmlib.instruction_finetuning import (
    LoRALinear,
    chat_example,
    load_instructions,
    lora,
    make_example_loader,
)
from llmlib.pretrained_weights import load_smollm2, save_pretrained

try:
    import peft
except ImportError:
    sys.exit("skipped: peft is not installed; pip install peft, and run this file again")

BATCH_SIZE, N_STEPS, RANK, ALPHA = 16, 7, 8, 16.0
NAMES = {"blocks": "model.layers", "attn.": "self_attn.", "ffn.": "mlp."}

Trainer = Callable[[Tensor, Tensor], Tensor]


def ours(model: GPT, first_block: int) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(0)
    adapted = lora(model, RANK, ALPHA, first_block=first_block)
    return adapted, adapted.loss


def theirs(model: GPT, first_block: int, adapters: dict[str, LoRALinear]) -> tuple[nn.Module, Trainer]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = sorted({name.rpartition(".")[2] for name in adapters})
    blocks = list(range(first_block, len(model.blocks)))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, layers_to_transform=blocks, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(plain, config).train()
    with torch.no_grad():
        for name, layer in adapters.items():
            for old, new in NAMES.items():
                name = name.replace(old, new)
            twin = adapted.base_model.model.get_submodule(name)
            twin.lora_A["default"].weight.copy_(layer.a)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # Padding stands at the right, so no mask is needed; the targets are shifted already.
        return adapted(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss

    return adapted, loss


def measure(
    model: GPT, batches: list[tuple[Tensor, Tensor]], first_block: int, precision: str
) -> pd.DataFrame:
    first, loss = ours(model, first_block)
    adapters = {name: m for name, m in first.named_modules() if isinstance(m, LoRALinear)}
    second, their_loss = theirs(model, first_block, adapters)
    contenders = {"llmlib": (first, loss), "transformers + peft": (second, their_loss)}
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3, fused=True)
        for name, (m, _) in contenders.items()
    }
    rows = []
    for step, (ids, targets) in enumerate(batches):
        for name, (_, loss_of) in contenders.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(ids, targets)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            rows.append((name, step, loss.item(), ids.numel() / seconds, ids.numel() / cpu))
    return pd.DataFrame(rows, columns=["library", "step", "loss", "tokens/s", "tokens/CPU s"])


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    examples = [chat_example(tokenizer, entry) for entry in load_instructions("train")]
    batches = list(islice(make_example_loader(examples, BATCH_SIZE, pad_id=0), N_STEPS))
    rows = {}
    for first_block in (len(model.blocks) // 2, 0):  # the chapter's setting, and all blocks
        for precision in ("float32", "bf16"):
            result = measure(model, batches, first_block, precision)
            losses = result.pivot(index="step", columns="library", values="loss")
            if (losses.diff(axis=1).iloc[:, 1].abs() > {"float32": 0.01, "bf16": 0.1}[precision]).any():
                raise SystemExit(f"not the same work: in {precision} the losses are\n{losses}")
            speeds = result[result["step"] > 0].groupby("library")[["tokens/s", "tokens/CPU s"]].median()
            ratio = (speeds.loc["llmlib"] / speeds.loc["transformers + peft"]).round(2)
            blocks = f"blocks {first_block + 1} to {len(model.blocks)}"
            for name, row in speeds.iterrows():
                rows[blocks, precision, name] = [*row.round(0), *ratio]
    columns = ["tokens/s", "tokens/CPU s", "times peft", "times peft (CPU)"]
    print(f"batches of {BATCH_SIZE}, {sum(ids.numel() for ids, _ in batches) / len(batches):.0f} tokens")
    print(pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_string())


if __name__ == "__main__":
    main()
