import contextlib
import math
import multiprocessing
import random
import re
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from llmlib import pretraining, tales
from llmlib.data import join_documents, make_document_loader, make_loader, open_tokens
from llmlib.generation import generate
from llmlib.gpt import GPT, GPTConfig
from llmlib.llama import LlamaConfig, RMSNorm
from llmlib.pretraining import (
    Muon,
    MuonConfig,
    Precision,
    Recall,
    RecallUnknown,
    TrainingConfig,
    accumulate_gradients,
    deepen,
    evaluate,
    last_checkpoint,
    learning_rate,
    load_checkpoint,
    load_model,
    load_tales_gpt,
    main,
    measure_tail,
    orthogonalize,
    part_twins,
    precision,
    punish_tail,
    rare_tokens,
    save_checkpoint,
    save_model,
    train,
)
from llmlib.tokenization import BPETokenizer

TINY = GPTConfig(vocab_size=11, max_seq_len=8, d_model=16, n_layers=1, n_heads=2, dropout=0.1)
SHORT = TrainingConfig(n_steps=12, n_warmup=2, eval_every=4)
KILLED = TrainingConfig(n_steps=300, n_warmup=2, eval_every=1)
COUNTING = torch.arange(2000) % 11


def loader(batch_size=4, **options):
    return make_loader(COUNTING, 8, batch_size, **options)


def tiny(seed=0, config=TINY) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def losses(log: pd.DataFrame) -> list[float]:
    return log["loss"].tolist()


# The loop


def test_a_model_learns_to_count():
    config = TrainingConfig(n_steps=150, lr=1e-2, n_warmup=10, eval_every=150)
    log = train(tiny(), loader(), config, validation=loader(shuffle=False), progress=False)
    assert log["loss"].iloc[0] == pytest.approx(math.log(11), rel=0.1)
    assert log["val_loss"].iloc[-1] < 0.1


def test_the_log_has_a_row_for_each_step():
    log = train(tiny(), loader(), SHORT, validation=loader(shuffle=False), progress=False)
    assert log["step"].tolist() == list(range(1, 13))
    assert log["tokens"].tolist() == [32 * step for step in range(1, 13)]
    assert log["val_loss"].notna().tolist() == [step % 4 == 0 for step in range(1, 13)]
    assert log["seconds"].is_monotonic_increasing
    assert log["lr"].tolist() == [learning_rate(step, SHORT) for step in range(1, 13)]


def test_accumulated_gradients_are_those_of_the_large_batch():
    config = replace(TINY, dropout=0.0)
    large, parts = tiny(config=config), tiny(config=config)
    whole = loader(batch_size=8, shuffle=False)
    halves = loader(batch_size=4, shuffle=False)
    loss, n_tokens = accumulate_gradients(large, iter(whole), 1)
    half_loss, half_tokens = accumulate_gradients(parts, iter(halves), 2)
    assert loss == pytest.approx(half_loss, rel=1e-2) and n_tokens == half_tokens == 64
    for a, b in zip(large.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-3, rtol=0.05)


def test_the_tail_is_what_is_unlikely_and_did_not_come():
    p = torch.tensor([[0.5, 0.4995, 0.0002, 0.0003], [0.0004, 0.9988, 0.0003, 0.0005]], dtype=torch.float64)
    targets = torch.tensor([[0], [0]])  # unlikely in the second row, but it came
    loss, _ = punish_tail(10.0)(p, targets)
    tail = (0.0002 + 0.0003) + (0.0003 + 0.0005)
    assert loss.item() == pytest.approx(-math.log(0.5) - math.log(0.0004) + 10 * tail)
    assert punish_tail(10.0, limit=0.00025)(p, targets)[0] < loss


def test_the_tail_is_measured():
    model = tiny().eval()
    batches = [(ids, targets.clone()) for ids, targets in islice(loader(), 2)]
    batches[0][1][0, :3] = -100
    p = torch.cat([model(ids)[targets >= 0].softmax(dim=-1) for ids, targets in batches])
    came = torch.cat([targets[targets >= 0] for _, targets in batches])
    limit = p.median().item()
    drawn, n_came = measure_tail(model, batches, limit)
    assert len(p) == 61 and drawn == pytest.approx(p[p < limit].sum().item())
    assert 0 < n_came < 61 and n_came == (p[range(61), came] < limit).sum()
    assert measure_tail(model, batches, limit=0.0) == (0.0, 0)


def test_the_gradients_of_the_tail_are_pytorchs():
    logits = torch.randn(6, 40, dtype=torch.float64).mul_(4).requires_grad_()
    targets = torch.randint(40, (6, 1))
    p = logits.softmax(dim=-1)
    unlikely = (p < 0.01).scatter(1, targets, False)
    assert 20 < unlikely.sum() < 230
    loss = -p.gather(1, targets).log().sum() + 5 * p[unlikely].sum()
    ours, d_logits = punish_tail(5.0, limit=0.01)(p.detach(), targets)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(d_logits, torch.autograd.grad(loss, logits)[0])


def test_training_with_the_tail_makes_it_smaller():
    ids, targets = next(iter(loader(shuffle=False)))
    wasted = []
    for tail in (0.0, 10.0):
        model = tiny(config=replace(TINY, dropout=0.0))
        config = TrainingConfig(n_steps=300, n_warmup=5, lr=1e-2, tail=tail)
        train(model, loader(), config, progress=False)
        p = model(ids).softmax(dim=-1)  # (B, T, V)
        wasted.append(1 - p.gather(-1, targets[..., None]).mean().item())
    assert 0 < wasted[1] < 0.5 * wasted[0]


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(n_steps=110, lr=1.0, final_lr=0.1, n_warmup=10)
    assert [learning_rate(step, config) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_norms_and_biases_do_not_decay():
    model = tiny()
    decayed, kept = replace(SHORT, weight_decay=0.3).optimizer(model).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_optimizer_leaves_frozen_weights_alone():
    model = tiny()
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    before = [p.clone() for p in model.blocks.parameters()]
    train(model, loader(), SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.blocks.parameters(), strict=True))


def test_orthogonalize_keeps_directions_and_evens_their_lengths():
    stack = torch.randn(3, 5, 4)
    torch.testing.assert_close(orthogonalize(stack), torch.stack([orthogonalize(x) for x in stack]))
    for shape in ((6, 6), (4, 9), (9, 4)):
        x = torch.randn(shape)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        y = orthogonalize(x, 8)
        values = (u.mT @ y @ v.mT).diagonal()
        torch.testing.assert_close(u @ values.diag() @ v, y)
        assert values.min() > 0.6 and values.max() < 1.25 < s.max()


def test_muon_is_that_of_torch(monkeypatch):
    """PyTorch's orthogonalizes in bfloat16: here both are told to keep float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(pretraining, "precision", lambda device: Precision(torch.float32, "for this test"))
    start = torch.ones(6, 3), torch.eye(4), torch.zeros(6, 3)
    ours, theirs = [[nn.Parameter(m.clone()) for m in start] for _ in range(2)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.2)
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for seed in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_muon_in_bfloat16_steps_alike(monkeypatch):
    gradient, steps = torch.randn(32, 16), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(
            pretraining, "precision", lambda device, dtype=dtype: Precision(dtype, "for this test")
        )
        p = nn.Parameter(torch.zeros(32, 16))
        p.grad = gradient.clone()
        Muon([p], lr=1.0).step()
        assert p.dtype == torch.float32
        steps.append(p.detach())
    assert 0 < (steps[0] - steps[1]).norm() < 0.06 * steps[0].norm()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    config = MuonConfig(n_steps=12, n_warmup=2, lr=0.01)
    model = tiny()
    muon, adamw = config.optimizer(model).param_groups
    assert (muon["lr"], adamw["lr"], adamw["weight_decay"]) == (0.02, 0.01, 0.0)
    assert len(muon["params"]) == 6 and all(p.ndim == 2 for p in muon["params"])
    assert {id(p) for p in muon["params"] + adamw["params"]} == {id(p) for p in model.parameters()}
    assert any(p is model.lm_head.weight for p in adamw["params"])
    with pytest.raises(ValueError, match="none of 2 trained parameters is a matrix of a module named blocks"):
        config.optimizer(torch.nn.Linear(2, 2))


def test_all_rates_follow_the_schedule():
    optimizers = []

    class Watched(MuonConfig):
        def optimizer(self, model):
            optimizers.append(super().optimizer(model))
            return optimizers[-1]

    config, rates = Watched(n_steps=12, n_warmup=2, eval_every=4), []

    def watch(model, log):
        rates.append([group["lr"] for group in optimizers[0].param_groups])

    train(tiny(), loader(), config, watchers=[watch], progress=False)
    for step, (muon, adamw) in zip((4, 8, 12), rates, strict=True):
        assert adamw == pytest.approx(learning_rate(step, config))
        assert muon == pytest.approx(2 * learning_rate(step, config))


# A trained model that goes on


def test_part_twins_turns_apart_what_fell_together():
    model = tiny()
    table = model.embeddings.tok_emb.weight
    with torch.no_grad():
        table[3], table[4] = 2 * table[2] + 1e-3 * table[5], 3 * table[2]
    before = table.detach().clone()
    assert part_twins(model, torch.tensor([1, 2, 3, 5])).tolist() == [2, 3]  # 4 isn't among them
    moved = (table != before).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == [2, 3]
    torch.testing.assert_close(table.norm(dim=1), before.norm(dim=1))
    cosines = torch.cosine_similarity(table[2:4], before[2:4])
    assert torch.cosine_similarity(table[2], table[3], dim=0) < 0.95 and (cosines > 0.6).all()
    assert part_twins(model, torch.tensor([1, 2, 3, 5])).tolist() == []


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_new_blocks_pass_on_what_they_read_and_are_trained_alone(n_kv_heads):
    sizes = dict(vocab_size=11, max_seq_len=8, d_model=16, n_layers=1, n_heads=4, n_kv_heads=n_kv_heads)
    model = tiny(config=LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        model.embeddings.tok_emb.weight.normal_()  # as long as the vectors of a trained model
    deeper = deepen(model, 2).eval()
    assert deeper.config == replace(model.config, n_layers=3)
    ids = torch.arange(8)[None]
    shift = (deeper.hidden(ids) - model.hidden(ids)).norm() / model.hidden(ids).norm()
    assert 0 < shift < 0.3
    q, k, _ = deeper.blocks[-1].attn.project(*2 * [torch.randn(1, 3, 16)])  # (1, H, 3, D)
    torch.testing.assert_close(q, k.repeat_interleave(4 // k.shape[1], dim=1))
    fresh = deeper.blocks[-1].attn.k_proj.weight.detach().clone()
    train(deeper, loader(), MuonConfig(n_steps=3, n_warmup=1), progress=False)
    before, after = model.state_dict(), deeper.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(fresh, deeper.blocks[-1].attn.k_proj.weight)
    with pytest.raises(ValueError, match="n_blocks=-1 must be at least 1"):
        deepen(model, -1)


def test_a_new_block_copies_what_resembles():
    model = tiny(config=replace(TINY, bias=False)).eval()
    attn = deepen(model, 1).blocks[-1].attn
    x = 4 * torch.nn.functional.normalize(torch.randn(1, 5, 16), dim=-1)
    x[:, -1] = x[:, 1]  # the last token resembles the second
    added = attn(x)[0, -1]
    assert torch.cosine_similarity(added, x[0]).argmax().item() in (1, 4)


# Batches that ask for what came before


def test_recall_asks_for_rare_words_that_came_before():
    rare = torch.ones(11, dtype=torch.bool)
    rare[1] = False
    ids = torch.tensor([[1, 5, 1, 6, 5, 7]])
    targets = torch.tensor([[5, 1, 6, 5, 7, -100]])
    asked = Recall(loader(), rare, 1, 0).ask(ids, targets)
    assert asked.tolist() == [[-100, -100, -100, 5, -100, -100]]
    fresh = torch.tensor([[2, 3, 4, 5, 6, 7]])  # nothing comes again: all count
    assert Recall(loader(), rare, 1, 0).ask(fresh - 1, fresh).equal(fresh)


def test_recall_comes_first_and_then_in_every_fourth_batch():
    rare = torch.ones(11, dtype=torch.bool)
    plain = make_loader(torch.arange(2000) % 5, 8, 20)  # 12 batches an epoch; in each, tokens come again
    for start in (0, 5, 13):
        batches = list(islice(pretraining._endless(Recall(plain, rare, 3, 9), start), 14))
        asked = [bool((targets == -100).any()) for _, targets in batches]
        numbers = range(start + 1, start + 15)
        assert asked == [n <= 3 or n in (4, 8) for n in numbers]
        expected = islice(pretraining._endless(plain, start), 14)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, expected, strict=True))


def test_recall_unknown_leaves_out_what_the_model_knows():
    model = tiny().eval()
    with torch.no_grad():  # a model that always says 5
        model.embeddings.tok_emb.weight.zero_()[5] = 100
        model.final_norm.weight.zero_(), model.final_norm.bias.fill_(1.0)
    asking = RecallUnknown(loader(), torch.ones(11, dtype=torch.bool), model)
    ids = torch.tensor([[5, 6, 5, 6, 7]])
    targets = torch.tensor([[6, 5, 6, 7, -100]])
    assert asking.ask(ids, targets).tolist() == [[-100, -100, 6, -100, -100]]
    known = torch.tensor([[6, 5, 1, 5, -100]])
    assert asking.ask(ids, known).tolist() == [[-100, 5, -100, 5, -100]]  # all are known: none is left out


def test_recall_unknown_asks_in_every_second_batch():
    plain = make_loader(torch.arange(2000) % 5, 8, 20)
    for start in (0, 3):
        asking = RecallUnknown(plain, torch.ones(11, dtype=torch.bool), tiny().eval())
        batches = list(islice(pretraining._endless(asking, start), 14))
        asked = [bool((targets == -100).any()) for _, targets in batches]
        assert asked == [n % 2 == 0 for n in range(start + 1, start + 15)]


def test_rare_tokens_are_all_but_the_most_frequent():
    tokens = torch.tensor([3] * 5 + [0] * 4 + [1] * 2 + [4])
    assert rare_tokens(tokens, 6, 2).tolist() == [False, True, True, False, True, True]


def test_evaluation_weighs_batches_by_their_targets_and_leaves_no_trace():
    model = tiny().train()
    ids, targets = torch.randint(11, (2, 3, 8))
    targets[1:] = -100
    batches = [(ids, targets), (ids, ids)]
    state = torch.get_rng_state()
    loss = evaluate(model, batches)
    model.eval()
    parts = [evaluate(model, [batch]) for batch in batches]
    assert loss == pytest.approx((8 * parts[0] + 24 * parts[1]) / 32, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training and evaluate(model.train(), batches) == loss and model.training


def test_a_batch_of_padding_alone_is_not_evaluated():
    model, (ids, targets) = tiny().eval(), torch.randint(11, (2, 3, 8))
    padding = (ids, torch.full_like(ids, -100))
    assert evaluate(model, [padding, (ids, targets)]) == evaluate(model, [(ids, targets)])
    with pytest.raises(ValueError, match="padding alone"):
        evaluate(model, [padding])


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match="0 batches"):
        evaluate(tiny(), [])


def test_watchers_see_model_and_log():
    seen = []
    train(
        tiny(),
        loader(),
        SHORT,
        watchers=[lambda model, log: seen.append((type(model), len(log)))],
        progress=False,
    )
    assert seen == [(GPT, 4), (GPT, 8), (GPT, 12)]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = tiny()

    def spoil(model, log):
        if len(log) == 8:
            model.final_norm.weight.data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match=r"loss nan.* at step 9, learning rate .*step-0000008"):
        train(model, loader(), SHORT, folder=tmp_path, watchers=[spoil], progress=False)
    with pytest.raises(FloatingPointError, match="none was kept"):
        train(model, loader(), SHORT, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(n_steps=0), "n_steps must be at least 1, got 0"),
        (dict(n_accumulate=0), "n_accumulate must be at least 1, got 0"),
        (dict(lr=0.0), "lr must be above 0, got 0.0"),
        (dict(lr=math.nan), "lr must be above 0, got nan"),
        (dict(tail=-1.0), "tail is a weight, 0 for none, got -1.0"),
        (dict(n_warmup=13), "n_warmup=13 must lie between 0 and n_steps=12"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **wrong)


def test_precision_says_what_and_why():
    dtype, reason = precision()
    assert dtype in (torch.bfloat16, torch.float32) and reason.startswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("built_in", "expected", "reason"),
    [
        ({}, torch.float32, "float32: this cpu has no bfloat16 instructions"),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, r"hardware \(avx512_bf16\)"),
    ],
)
def test_precision_asks_the_cpu(monkeypatch, built_in, expected, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: built_in)
    dtype, why = precision()
    assert dtype == expected and re.search(reason, why)


# Checkpoints


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    expected = train(tiny(), loader(), SHORT, validation=loader(shuffle=False), progress=False)

    class Stop(Exception):
        pass

    def stop(model, log):
        if len(log) == 8:
            raise Stop

    with pytest.raises(Stop):
        train(
            tiny(),
            loader(),
            SHORT,
            validation=loader(shuffle=False),
            folder=tmp_path,
            watchers=[stop],
            progress=False,
        )
    other = tiny(seed=5)  # neither its weights nor the random state matter
    log = train(other, loader(), SHORT, validation=loader(shuffle=False), folder=tmp_path, progress=False)
    columns = ["step", "tokens", "lr", "loss", "norm", "val_loss"]
    pd.testing.assert_frame_equal(log[columns], expected[columns], check_exact=True)
    again = train(tiny(), loader(), SHORT, folder=tmp_path, progress=False)  # nothing is left to do
    pd.testing.assert_frame_equal(again[columns], expected[columns], check_exact=True)


def test_a_stopped_run_with_muon_and_recall_goes_on_bit_for_bit(tmp_path):
    config = MuonConfig(n_steps=12, n_warmup=2, eval_every=4)
    rare = torch.ones(11, dtype=torch.bool)

    def run(**options):
        return train(tiny(), Recall(loader(), rare, 3, 10), config, **options, progress=False)

    def stop(model, log):
        raise KeyboardInterrupt

    expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, watchers=[stop])
    assert last_checkpoint(tmp_path).name == "step-0000004"
    columns = ["step", "tokens", "lr", "loss", "norm"]
    pd.testing.assert_frame_equal(run(folder=tmp_path)[columns], expected[columns], check_exact=True)


def test_only_the_last_checkpoint_stays(tmp_path):
    train(tiny(), loader(), SHORT, folder=tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000012"]
    assert last_checkpoint(tmp_path) == tmp_path / "step-0000012"
    assert last_checkpoint(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("broken", ["save_model", "torch.save"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, broken):
    model = tiny()
    optimizer = SHORT.optimizer(model)
    row = dict(step=1, tokens=1, lr=0.1, loss=1.0, norm=1.0, seconds=1.0)
    save_checkpoint(tmp_path, model, optimizer, [row])

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretraining if broken == "save_model" else torch, broken.split(".")[-1], full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, model, optimizer, [row, row])
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
    assert len(load_checkpoint(last_checkpoint(tmp_path), model, optimizer)) == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tiny(), loader(), SHORT, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds another model: .* has the shape"):
        train(tiny(config=replace(TINY, d_model=32)), loader(), SHORT, folder=tmp_path, progress=False)


def train_and_save_each_step(folder: str) -> None:
    """Train in a process of its own, from what `folder` holds to the end."""
    torch.set_num_threads(1)
    config = replace(TINY, d_model=64, n_layers=2)
    train(tiny(config=config), loader(), KILLED, folder=folder, progress=False)


def test_a_run_killed_twenty_times_gives_the_same_losses(tmp_path):
    """Kill with SIGKILL at random moments, writes among them, since it saves after every step."""
    train_and_save_each_step(tmp_path / "whole")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["llmlib.pretraining"])  # so that a process starts at once
    folder, n_kills, moments = tmp_path / "killed", 0, random.Random(0)
    while n_kills < 20:
        before = last_checkpoint(folder)
        child = processes.Process(target=train_and_save_each_step, args=(folder,))
        child.start()
        while last_checkpoint(folder) == before and child.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        n_kills += child.is_alive()
        child.kill()
        child.join()
        assert last_checkpoint(folder) != before
    train_and_save_each_step(folder)
    logs = [pd.read_csv(last_checkpoint(f) / "log.csv") for f in (tmp_path / "whole", folder)]
    pd.testing.assert_frame_equal(*(log[["step", "loss", "norm"]] for log in logs), check_exact=True)


# Models on disk


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, tied=False),
        LlamaConfig(vocab_size=11, max_seq_len=8, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2),
    ],
)
def test_a_saved_model_is_the_same(tmp_path, config):
    model, ids = tiny(config=config).eval(), torch.randint(11, (2, 5))
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").eval()
    assert loaded.config == config and torch.equal(loaded(ids), model(ids))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_of_other_parts_needs_its_configuration(tmp_path):
    class Own(GPTConfig):
        def norm(self):
            return RMSNorm(self.d_model)

    config = Own(vocab_size=11, max_seq_len=8, d_model=16, n_layers=1, n_heads=2)
    save_model(GPT(config), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"saved with the parts of Own: give load_model\(path, config=Own"):
        load_model(tmp_path / "own.safetensors")
    assert isinstance(load_model(tmp_path / "own.safetensors", config).final_norm, RMSNorm)


def test_a_damaged_model_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(tiny(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole file of save_model"):
        load_model(path)


# The command line


def run(tmp_path, *arguments):
    small = (
        "--vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --max-seq-len 16 "
        "--batch-size 2 --steps 6 --eval-every 3 --warmup 1"
    )
    main([*arguments, *small.split(), "--out", str(tmp_path / "out")])


def test_the_command_line_trains_on_files_of_any_language(tmp_path, capsys):
    (tmp_path / "zh.txt").write_text("从前有一只小猫。\n它喜欢吃鱼。\n" * 40, encoding="utf-8")
    (tmp_path / "fr.txt").write_text(
        "Il était une fois un chat.<|endoftext|>Il aimait le poisson.\n" * 40, encoding="utf-8"
    )
    run(tmp_path, str(tmp_path / "zh.txt"), str(tmp_path / "fr.txt"))
    out = tmp_path / "out"
    assert "held-out loss" in capsys.readouterr().out
    assert load_model(out / "model.safetensors").config.max_seq_len == 16
    first = (out / "log.csv").read_bytes()
    run(tmp_path, str(tmp_path / "zh.txt"), str(tmp_path / "fr.txt"))  # the run is over: nothing changes
    assert (out / "log.csv").read_bytes() == first


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_command_line_holds_out_the_end_of_a_single_text(tmp_path, seed):
    text = "".join(f"line {i}, " for i in range(400))  # no line break at all
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    run(tmp_path, str(tmp_path / "book.txt"), "--validation", "0.25", "--seed", seed)
    out, cut = tmp_path / "out", round(0.75 * len(text))
    tokenizer = BPETokenizer.load(out / "tokenizer.json")
    for name, part in (("train.npy", text[:cut]), ("validation.npy", text[cut:])):
        assert tokenizer.decode(open_tokens(out / name).tolist()) == part + "<|endoftext|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "No such file"),
        (["latin.txt"], "is not UTF-8"),
        (["ascii.txt", "--validation", "1.5"], "validation must be a share between 0 and 1, got 1.5"),
        ([], "at least 2 distinct documents, got 0"),
        (["--tales", "20", "--d-model", "17"], "can't be split into n_heads=2"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ascii.txt").write_text("a text", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        main(
            ["--steps", "2", "--warmup", "1", "--n-heads", "2", "--d-model", "16", "--out", "out", *arguments]
        )
    assert stopped.value.code == 1 and message in capsys.readouterr().err


def test_the_command_line_puts_one_document_in_a_row(tmp_path):
    run(tmp_path, "--tales", "30", "--by-document")
    log = pd.read_csv(tmp_path / "out" / "log.csv")
    assert log["tokens"].iloc[-1] == 6 * 2 * 16 and log["val_loss"].notna().sum() == 2


def test_the_command_line_has_muon_and_recall(tmp_path):
    run(tmp_path, "--tales", "30", "--by-document", "--muon", "--recall", "2")
    state = torch.load(last_checkpoint(tmp_path / "out" / "checkpoints") / "training.pt", weights_only=True)
    assert len(state["optimizer"]) == 2


def test_the_command_line_punishes_the_tail(tmp_path, monkeypatch):
    weights = []
    monkeypatch.setattr(
        pretraining, "punish_tail", lambda weight: weights.append(weight) or punish_tail(weight)
    )
    run(tmp_path, "--tales", "30", "--by-document", "--tail", "7")
    assert weights == [7.0]


def test_the_command_line_goes_on_from_a_finished_run(tmp_path, capsys):
    run(tmp_path, "--tales", "30")
    first = tmp_path / "out"
    rest = ["--start", str(first), "--max-seq-len", "16", "--batch-size", "2", "--steps", "1", "--lr", "1e-9"]
    second = ["--tales", "20", *rest, "--warmup", "1", "--out", str(tmp_path / "second")]
    main([*second])
    models = [load_model(folder / "model.safetensors") for folder in (first, tmp_path / "second")]
    assert models[0].config == models[1].config
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (first, tmp_path / "second")]
    assert tokenizers[0] == tokenizers[1]
    with pytest.raises(SystemExit):
        main([*second, "--max-seq-len", "32", "--out", str(tmp_path / "third")])
    assert "sees 16: it can't go on with 300 and 32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*second, "--n-layers", "2", "--vocab-size", "280", "--out", str(tmp_path / "third")])
    assert "--vocab-size --n-layers: the model of" in capsys.readouterr().err


def test_the_command_line_goes_on_with_a_deeper_model(tmp_path, capsys):
    run(tmp_path, "--tales", "30")
    first = load_model(tmp_path / "out" / "model.safetensors")
    options = "--tales 20 --max-seq-len 16 --batch-size 2 --steps 3 --warmup 1 --part-twins --recall-unknown"
    out = tmp_path / "deeper"
    main([*options.split(), "--start", str(tmp_path / "out"), "--deepen", "2", "--out", str(out)])
    deeper = load_model(out / "model.safetensors")
    assert deeper.config == replace(first.config, n_layers=first.config.n_layers + 2)
    assert "tokens had fallen together" in capsys.readouterr().out
    assert (deeper.blocks[-1].attn.o_proj.weight != 0).any()
    for old, new in zip(first.blocks.parameters(), deeper.blocks[:-2].parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(SystemExit):
        main(["--tales", "20", "--deepen", "2", "--out", str(tmp_path / "third")])
    assert "--deepen: give --start too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--tales", "20", "--recall", "2", "--recall-unknown", "--out", str(tmp_path / "third")])
    assert "--recall and --recall-unknown" in capsys.readouterr().err


def test_a_run_keeps_its_settings(tmp_path, capsys):
    run(tmp_path, "--tales", "30")
    with pytest.raises(SystemExit):
        run(tmp_path, "--tales", "31")
    assert "tales was 30, is 31" in capsys.readouterr().err
    run(tmp_path, "--tales", "30", "--lr", "1e-4")  # a run that came apart goes on with a smaller rate


def test_a_command_that_failed_can_be_corrected(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "missing.txt")
    with pytest.raises(SystemExit):
        run(tmp_path, "--tales", "30", "--lr", "0")  # fails when its tokens are on disk
    run(tmp_path, "--tales", "40")
    saved = BPETokenizer.load(tmp_path / "out" / "tokenizer.json")
    held_out = open_tokens(tmp_path / "out" / "validation.npy").tolist()
    told = tales.tales(40, seed=0)
    assert all(story in told for story in saved.decode(held_out).split("<|endoftext|>")[:-1])
    assert "held-out loss" in capsys.readouterr().out


def test_tensorboard_is_asked_for(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            written.append("flush")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = pretraining.TensorBoard(tmp_path / "board")
    train(tiny(), loader(), SHORT, watchers=[board], progress=False)
    assert (
        written[0] == str(tmp_path / "board") and ("loss", 12) in written and ("val_loss", 12) not in written
    )


def test_tensorboard_missing_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        pretraining.TensorBoard(tmp_path)


def test_the_model_of_the_tales_tells_whole_stories():
    model, tokenizer = load_tales_gpt()
    end = tokenizer.special_tokens["<|endoftext|>"]
    dice, starts = torch.Generator().manual_seed(0), torch.full((200, 1), end)
    n_whole = 0
    for row in generate(model.eval(), starts, 300, stop_ids=[end], generator=dice).tolist():
        text = tokenizer.decode(row[1 : row.index(end, 1)] if end in row[1:] else row[1:])
        with contextlib.suppress(tales.ParseError):
            n_whole += bool(tales.parse(text))
    assert n_whole >= 170  # of 200, where nine in ten are usual


def test_the_model_of_the_tales_is_near_the_floor():
    model, tokenizer = load_tales_gpt()
    end, stories = tokenizer.special_tokens["<|endoftext|>"], tales.tales(40, seed=77)
    tokens = np.array([*join_documents(map(tokenizer.encode, stories), end)])
    told = make_document_loader(tokens, model.config.max_seq_len, 10, end, shuffle=False)
    log_p = sum(tales.parse(story).log_prob for story in stories)
    assert 0 <= evaluate(model, told) + log_p / len(tokens) < 0.03
