"""Hold the cleaning of messages to definitions, and the classifier to plain passes of a tiny model."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib.classification_finetuning import (
    ByLength,
    Classifier,
    FinetuningConfig,
    Message,
    balance,
    deduplicate,
    finetune,
    fit_head,
    frozen_states,
    load_classifier,
    load_messages,
    predict,
    save_classifier,
    shingles,
    split,
)
from llmlib.gpt import GPT, GPTConfig
from llmlib.llama import LlamaConfig
from llmlib.tokenization import train_bpe

TOKENIZER = train_bpe("win a prize now see you at home " * 9, 290, ["<|endoftext|>"])
SIZES = dict(vocab_size=TOKENIZER.vocab_size, max_seq_len=64, d_model=32, n_layers=3, n_heads=4)
WORDS = (
    "win a prize",
    "see you at home",
    "now",
    "prize prize",
    "you",
    "home now see",
    "win",
    "a prize now win",
)
MESSAGES = [Message(text, "spam" if "win" in text or "prize" in text else "ham") for text in WORDS]


def make_classifier(config=LlamaConfig, model=None, **how) -> Classifier:
    torch.manual_seed(0)
    model = GPT(config(**SIZES)).eval() if model is None else model
    classifier = Classifier(model, TOKENIZER, ("ham", "spam"), **how)
    torch.nn.init.normal_(classifier.head.weight)
    return classifier


# ---- messages ----


def test_the_collection_is_read_whole():
    messages = load_messages()
    assert len(messages) == 4862
    assert {message.label for message in messages} == {"ham", "spam"}


def test_a_file_is_read_line_by_line(tmp_path):
    (tmp_path / "some.csv").write_text("ham\tOk, see\tyou\nspam\tWIN «now»\n", encoding="utf-8")
    assert load_messages(tmp_path / "some.csv") == [("Ok, see\tyou", "ham"), ("WIN «now»", "spam")]
    (tmp_path / "some.csv").write_text("ham\tOk\nno label here\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2, 'no label here', has no label"):
        load_messages(tmp_path / "some.csv")


def test_shingles_ignore_case_punctuation_and_the_values_of_digits():
    assert shingles("WIN £900, now!!") == shingles("win £123 Now")
    assert shingles("abcdefg") == {"abcde", "bcdef", "cdefg"}
    assert shingles("ab") == {"ab"}
    assert shingles(":-)") == {":-)"} != shingles(";-(")
    assert shingles("你好") == {"你好"}


def jaccard(a: str, b: str) -> float:
    first, second = shingles(a), shingles(b)
    return len(first & second) / len(first | second)


@settings(max_examples=200)
@given(st.lists(st.text("ab 1", max_size=14), max_size=12), st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_deduplicate_keeps_what_a_plain_loop_keeps(texts, threshold):
    expected = []
    for text in texts:
        if all(jaccard(text, other) < threshold for other in expected):
            expected.append(text)
    kept = deduplicate([Message(text, "ham") for text in texts], threshold)
    assert [message.text for message in kept] == expected


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold} is a share"):
        deduplicate(MESSAGES, threshold)


def test_balance_draws_equally_many_and_repeats_itself():
    many = [Message(f"text {i}", "spam" if i % 5 == 0 else "ham") for i in range(100)]
    drawn = balance(many, seed=1)
    assert Counter(message.label for message in drawn) == {"ham": 20, "spam": 20}
    assert len(set(drawn)) == 40 and set(drawn) <= set(many)
    assert drawn == balance(many, seed=1) != balance(many, seed=2)
    with pytest.raises(ValueError, match="at least 2 labels"):
        balance(many[:1])


def test_split_loses_nothing_and_keeps_the_shares_of_the_labels():
    many = [Message(f"text {i}", "spam" if i % 4 == 0 else "ham") for i in range(200)]
    parts = split(many, (0.7, 0.1, 0.2), seed=3)
    assert [Counter(m.label for m in part) for part in parts] == [
        {"ham": 105, "spam": 35},
        {"ham": 15, "spam": 5},
        {"ham": 30, "spam": 10},
    ]
    assert sorted(message for part in parts for message in part) == sorted(many)
    assert parts == split(many, (0.7, 0.1, 0.2), seed=3) != split(many, (0.7, 0.1, 0.2), seed=4)
    with pytest.raises(ValueError, match="1 in sum"):
        split(many, (0.7, 0.1))


# ---- the classifier ----


@pytest.mark.parametrize("config", [GPTConfig, LlamaConfig])
@pytest.mark.parametrize("first_block", [0, 2, 3])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_head_reads_what_the_model_has_at_the_end_or_on_average(config, first_block, pool):
    model = GPT(config(**SIZES)).eval()
    classifier = make_classifier(config, model, first_block=first_block, pool=pool)
    p = predict(classifier, frozen_states(classifier, list(WORDS))).softmax(dim=-1)
    for text, row in zip(WORDS, p, strict=True):
        states = model.hidden(torch.tensor([classifier.encode(text)]))  # (1, T, C)
        read = states[:, -1] if pool == "last" else states.mean(dim=1)
        wanted = classifier.head(read).softmax(dim=-1)[0]
        torch.testing.assert_close(row, wanted, atol=0.05, rtol=0)  # bfloat16 where it is built in


def test_dropout_is_for_the_trained_blocks_alone():
    classifier = make_classifier(model=GPT(GPTConfig(**SIZES, dropout=0.5)), first_block=1)
    once, again = (classifier.classify(list(WORDS)) for _ in range(2))
    assert once == again
    assert classifier.training and not classifier.frozen.training and classifier.trained.training


def test_padding_on_the_right_changes_nothing():
    for pool in ("last", "mean"):
        classifier = make_classifier(first_block=1, pool=pool)
        ids = torch.tensor([classifier.encode("win a prize")])
        padded = F.pad(ids, (0, 5), value=7)
        last = torch.tensor([ids.shape[1] - 1])
        torch.testing.assert_close(classifier(padded, last), classifier(ids, last))


def test_the_mean_is_over_all_tokens_of_the_text():
    classifier = make_classifier(model=(model := GPT(LlamaConfig(**SIZES)).eval()), pool="mean")
    ids = torch.tensor([classifier.encode("win a prize")])
    wanted = classifier.head(model.hidden(ids).mean(dim=1))
    torch.testing.assert_close(classifier(ids, torch.tensor([ids.shape[1] - 1])), wanted)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_head_reads_lower_states_beside_those_of_the_trained_blocks(pool):
    model = GPT(LlamaConfig(**SIZES)).eval()
    classifier = make_classifier(model=model, n_blocks=2, first_block=1, lower=(0,), pool=pool)
    ids = torch.tensor([classifier.encode("win a prize")])
    below = model.embeddings(ids, 0)
    above = model.blocks[1](model.blocks[0](below))  # no norm: it was made for the states above all blocks
    both = torch.cat([below, above], dim=-1)
    wanted = classifier.head(both[:, -1] if pool == "last" else both.mean(dim=1))
    torch.testing.assert_close(classifier(ids, torch.tensor([ids.shape[1] - 1])), wanted)


def test_a_text_goes_into_its_template_and_is_cut():
    classifier = make_classifier(template="see {} now", max_tokens=12)
    end, before, after = TOKENIZER.special_tokens["<|endoftext|>"], *map(TOKENIZER.encode, ("see ", " now"))
    assert classifier.encode("home") == [end, *before, *TOKENIZER.encode("home"), *after]
    cut = classifier.encode("prize you home " * 20)
    assert len(cut) == 12 and cut[-len(after) :] == after
    assert classifier.encode("<|endoftext|>").count(end) == 1


def test_any_alphabet_and_any_length_get_an_answer():
    texts = ["你好,你中奖了", "نعم", "🎉", "x" * 5000, "ok"]
    answers = make_classifier(max_tokens=40).classify(texts)
    assert [answer.label in ("ham", "spam") for answer in answers] == [True] * 5


@pytest.mark.parametrize(
    ("texts", "message"),
    [([""], "'' is empty"), ([" \n"], "is empty"), ([], "0 texts"), ("win", r"such as \['win'\]")],
)
def test_nothing_to_sort_is_a_clear_error(texts, message):
    with pytest.raises(ValueError, match=message):
        make_classifier().classify(texts)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(first_block=4), "first_block=4 must be from 0 to 3"),
        (dict(first_block=2, lower=(1, 2)), r"lower=\[1, 2\] must lie from 0 to below first_block=2"),
        (dict(template="no place"), "must have one"),
        (dict(pool="first"), "pool='first'"),
        (dict(max_tokens=1), "max_tokens=1 must leave room"),
        (dict(max_tokens=65), "at most max_seq_len=64"),
    ],
)
def test_settings_that_fit_nothing_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(**how)
    with pytest.raises(ValueError, match="at least 2 different"):
        Classifier(GPT(GPTConfig(**SIZES)), TOKENIZER, ("spam", "spam"))


def test_a_label_that_the_classifier_lacks_is_refused():
    with pytest.raises(ValueError, match=r"\['eggs'\] are none of \['ham', 'spam'\]"):
        frozen_states(make_classifier(), [Message("you", "eggs")])
    with pytest.raises(ValueError, match="1 of 2 texts have a label"):
        frozen_states(make_classifier(), ["you", Message("you", "ham")])


def test_labels_are_numbered_in_the_order_of_the_classifier():
    classifier = Classifier(GPT(LlamaConfig(**SIZES)), TOKENIZER, ("spam", "ham"))
    assert frozen_states(classifier, MESSAGES[:2]).labels.tolist() == [0, 1]


# ---- states ----


def test_a_batch_has_its_label_at_the_last_token_alone():
    states = frozen_states(make_classifier(), MESSAGES[:3])
    ids, targets = states[torch.tensor([2, 1]).numpy()]
    lengths = states.lengths[[2, 1]]
    for row, last, number in zip(range(2), lengths - 1, (2, 1), strict=True):
        assert targets[row, last] == states.labels[number]
        assert ids[row, : last + 1].tolist() == list(
            range(states.starts[number], states.starts[number] + last + 1)
        )
    assert (targets != -100).sum() == 2
    assert states.select([2, 1]).labels.tolist() == states.labels[[2, 1]].tolist()


def test_batches_of_about_one_length_hold_every_text_once_and_go_on_where_they_stopped():
    lengths = np.random.default_rng(0).integers(1, 50, size=83)

    def order(start=0):
        return ByLength(83, 8, True, 1, drop_last=False, start=start, lengths=lengths, n_batches=4)

    first, second = (list(epoch) for epoch in [order()] * 2)
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(83))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    longest = [lengths[batch].max() for batch in first]
    assert longest != sorted(longest)  # the batches themselves are shuffled
    assert np.mean([np.ptp(lengths[batch]) for batch in first]) < 20  # 35 unsorted
    assert [b.tolist() for b in order(start=3)] == [b.tolist() for b in first[3:]]


# ---- training ----


@pytest.mark.parametrize("first_block", [1, 3])
def test_finetuning_learns_and_leaves_the_model_as_it_was(first_block):
    torch.manual_seed(0)
    model = GPT(LlamaConfig(**SIZES)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    classifier = Classifier(model, TOKENIZER, ("ham", "spam"), first_block=first_block)
    states = frozen_states(classifier, MESSAGES)
    config = FinetuningConfig(n_steps=80, lr=3e-3, head_lr=1e-2, n_warmup=5, eval_every=40)
    log = finetune(classifier, states, config, validation=states, batch_size=4, progress=False)
    assert log.loss.iloc[-4:].mean() < 0.3 < 0.6 < log.loss.iloc[0]
    assert log.val_loss.iloc[-1] < 0.3
    assert [answer.label for answer in classifier.classify(list(WORDS))] == [m.label for m in MESSAGES]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(
        p.grad is None for part in (classifier.embeddings, classifier.frozen) for p in part.parameters()
    )


def test_the_head_has_a_rate_of_its_own():
    classifier = make_classifier(first_block=2)
    groups = FinetuningConfig(n_steps=20, lr=1e-4, head_lr=1e-2).optimizer(classifier).param_groups
    assert [group["lr"] for group in groups] == [1e-2, 1e-4]
    assert [len(group["params"]) for group in groups] == [2, 10]


def test_states_without_labels_and_of_two_tables_are_refused():
    classifier, config = make_classifier(), FinetuningConfig(n_steps=20)
    with pytest.raises(ValueError, match="8 texts have no labels"):
        finetune(classifier, frozen_states(classifier, list(WORDS)), config)
    a, b = (frozen_states(classifier, MESSAGES) for _ in range(2))
    with pytest.raises(ValueError, match="another table"):
        finetune(classifier, a, config, validation=b)


# ---- files ----


def test_a_saved_classifier_answers_alike_and_holds_only_what_was_learned(tmp_path):
    model = GPT(LlamaConfig(**SIZES)).eval()
    classifier = make_classifier(
        model=model, n_blocks=2, first_block=1, lower=[0], template="see {}", pool="mean", max_tokens=30
    )
    with torch.no_grad():
        for p in classifier.trained.parameters():
            p.add_(0.1)
    save_classifier(classifier, tmp_path / "spam.safetensors")
    loaded = load_classifier(tmp_path / "spam.safetensors", model, TOKENIZER)
    assert loaded.classify(list(WORDS)) == classifier.classify(list(WORDS))
    assert torch.equal(loaded.mean, classifier.mean)
    assert (loaded.template, loaded.pool, loaded.max_tokens) == ("see {}", "mean", 30)
    assert loaded.lower == (0,)
    n_block = sum(p.numel() for p in model.blocks[2].parameters())
    assert (tmp_path / "spam.safetensors").stat().st_size < 4 * (n_block + 4 * 64 + 130) + 4000
    assert [path.name for path in tmp_path.iterdir()] == ["spam.safetensors"]


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    save_classifier(make_classifier(first_block=2), path := tmp_path / "spam.safetensors")
    other = GPT(LlamaConfig(**SIZES | dict(d_model=16)))
    with pytest.raises(ValueError, match=r"made for another model: deviation has the shape \(32,\)"):
        load_classifier(path, other, TOKENIZER)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole file of save_classifier"):
        load_classifier(path, other, TOKENIZER)


# ---- the head ----


def test_the_head_may_stand_above_some_of_the_blocks():
    model = GPT(LlamaConfig(**SIZES)).eval()
    short = make_classifier(model=model, n_blocks=1)
    ids = torch.tensor([short.encode("win a prize")])
    assert torch.equal(short.read(ids), model.blocks[0](model.embeddings(ids, 0)))
    with pytest.raises(ValueError, match=r"n_blocks=9 must be from 0 to 3"):
        make_classifier(n_blocks=9)
    with pytest.raises(ValueError, match=r"first_block=2 must be from 0 to 1"):
        make_classifier(n_blocks=1, first_block=2)


def test_what_the_head_reads_is_standardized_once():
    classifier = make_classifier(first_block=1)
    torch.nn.init.zeros_(classifier.head.weight)
    states = frozen_states(classifier, MESSAGES)
    config = FinetuningConfig(n_steps=3, n_warmup=0)
    finetune(classifier, states, config, progress=False)
    mean, deviation = classifier.mean.clone(), classifier.deviation.clone()
    plain = make_classifier(first_block=1)
    ids = [torch.tensor([plain.encode(message.text)]) for message in MESSAGES]
    with torch.no_grad():
        rows = torch.cat(
            [plain.features(plain.read(some), torch.tensor([some.shape[1] - 1])) for some in ids]
        )
    torch.testing.assert_close(mean, rows.mean(dim=0), atol=2e-2, rtol=0)
    torch.testing.assert_close(deviation, rows.std(dim=0, correction=0), atol=2e-2, rtol=0)
    finetune(classifier, states, config, progress=False)
    assert torch.equal(classifier.mean, mean)
    assert torch.equal(classifier.deviation, deviation)


def test_a_number_that_never_varies_is_not_divided_by_zero():
    classifier = make_classifier()
    fit_head(classifier, frozen_states(classifier, [Message("you", "ham"), Message("you", "spam")]))
    assert classifier.classify(["you"])[0].probability == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_fitted_head_is_the_best_one(pool):
    classifier = make_classifier(pool=pool)
    states = frozen_states(classifier, MESSAGES)
    fit_head(classifier, states, pull=0.1)
    found = classifier.head.weight.detach().clone()

    def value() -> float:
        loss = F.cross_entropy(predict(classifier, states), states.labels)
        return (loss + 0.1 * classifier.head.weight.square().sum()).item()

    best, draws = value(), torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            classifier.head.weight.copy_(found + 0.02 * torch.randn(found.shape, generator=draws))
        assert value() > best
    torch.nn.init.normal_(classifier.head.weight)
    fit_head(classifier, states, pull=0.1)
    torch.testing.assert_close(classifier.head.weight.detach(), found, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="have no labels"):
        fit_head(classifier, frozen_states(classifier, ["a text"]))
