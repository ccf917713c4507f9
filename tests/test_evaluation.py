import json
import math
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmlib import evaluation
from llmlib.data import make_loader
from llmlib.evaluation import (
    HarnessModel,
    Item,
    bits_per_byte,
    bootstrap_interval,
    few_shot,
    for_harness,
    lettered,
    load_bigbench,
    load_mmlu,
    load_truthfulqa,
    load_wic,
    load_winobias,
    log_likelihoods,
    multiple_choice,
    perplexity,
    table,
    text_nats,
)
from llmlib.gpt import GPT, GPTConfig, greedy
from llmlib.llama import LlamaConfig
from llmlib.pretraining import END
from llmlib.resources import DATA
from llmlib.tokenization import train_bpe

BENCHMARKS = DATA / "benchmarks"
TOKENIZER = train_bpe("the cat sat on the mat and the dog sat on the cat " * 9, 290, [END])
SIZES = dict(vocab_size=TOKENIZER.vocab_size, max_seq_len=80, d_model=16, n_layers=2, n_heads=4)


def lively(config: GPTConfig) -> GPT:
    """Make a model whose weights are large enough for each token to matter, in numbers that round little."""
    model = GPT(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.4, generator=generator)
    return model


def guesser(max_seq_len: int = 8) -> GPT:
    """Make a model to which all tokens are equally likely."""
    model = GPT(GPTConfig(**{**SIZES, "max_seq_len": max_seq_len}))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


MODELS = {"GPT-2": lively(GPTConfig(**SIZES)), "Llama": lively(LlamaConfig(**SIZES, n_kv_heads=2))}
both = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
END_ID = TOKENIZER.special_tokens[END]
texts = st.text(st.sampled_from("theca .\né1?"), max_size=12)

ITEMS = [
    Item("The cat sat on the", ("mat", "dog and the cat", "hat"), (0,), "cats"),
    Item("On", ("the mat", "a"), (1,), "cats"),
    Item("the dog sat and the cat sat and the dog", ("sat", "on", "the", "cat and mat"), (0, 2), "dogs"),
    Item("", ("The cat", "A dog sat"), (1,), "dogs"),
    Item("The cat sat:\n", ("on the mat", "never"), (0,), "cats"),
]


def log_p(model: GPT, text: str, prompt: str) -> float:
    """Read the whole text at once, and add up what the tokens after the prompt cost."""
    ids = torch.tensor([[END_ID, *TOKENIZER.encode(text)]])
    n_before = 1 + len(TOKENIZER.encode(prompt.rstrip()))
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, n_before - 1 :]
    return -F.cross_entropy(logits, ids[0, n_before:], reduction="sum").item()


# Perplexity and bits per byte


def test_a_model_that_guesses_has_the_perplexity_of_its_vocabulary():
    loader = make_loader(torch.arange(100), max_seq_len=8, batch_size=2)
    assert perplexity(guesser(), loader) == pytest.approx(TOKENIZER.vocab_size, rel=1e-5)


@pytest.mark.parametrize("text", ["the cat", "the cat sat on the mat and the dog sat " * 4, "é"])
def test_bits_per_byte_of_a_guess_count_its_tokens(text):
    bits = len(TOKENIZER.encode(text)) * math.log2(TOKENIZER.vocab_size)
    n_bytes = len(text.encode())
    assert bits_per_byte(guesser(), TOKENIZER, [text]) == pytest.approx(bits / n_bytes, rel=1e-5)


@both
def test_bits_per_byte_add_up_over_texts_and_start_after_an_end_token(model):
    some = ["the cat sat", "", "dogs é"]
    nats = -sum(log_p(model, text, "") for text in some if text)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in some)
    assert bits_per_byte(model, TOKENIZER, iter(some)) == pytest.approx(expected, rel=1e-5)


@both
@pytest.mark.parametrize("n_words", [1, 4, 5, 8, 9, 13])
def test_a_long_text_is_read_in_windows_the_last_of_which_is_full(model, n_words):
    text = "cat" + " cat" * (n_words - 1)
    ids = torch.tensor([END_ID, *TOKENIZER.encode(text)])
    n, nats = len(ids) - 1, 0.0
    for i in range(n):  # what predicts token i + 1 begins at a multiple of 4, or 4 before the end
        start = i // 4 * 4
        first = max(0, min(start, n - 4))
        with torch.no_grad():
            nats -= model(ids[None, first : i + 1])[0, -1].log_softmax(-1)[ids[i + 1]].item()
    assert text_nats(model, TOKENIZER, text, window=4) == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_tokens_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window} must be at least 1"):
        text_nats(MODELS["GPT-2"], TOKENIZER, "a text", window=window)


def test_texts_without_bytes_and_tokenizers_without_an_end_are_errors():
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(guesser(), TOKENIZER, [""])
    with pytest.raises(ValueError, match=r"not among the special tokens \[\]: train the tokenizer with it"):
        text_nats(guesser(), train_bpe("a b", 260, []), "a")


# Multiple choice


@both
@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
@pytest.mark.parametrize("normalize", ["bytes", "tokens", None])
def test_choices_score_as_if_each_text_were_read_alone(model, batch_tokens, normalize, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    shots = few_shot(ITEMS, [Item("A cat", ("sat", "is"), (1,))])
    for items in (ITEMS, shots, ITEMS[:1], [*ITEMS, *shots], []):
        result = multiple_choice(model, TOKENIZER, items, normalize=normalize, progress=False)
        assert len(result) == len(items)
        for item, row in zip(items, result.to_dict("records"), strict=True):
            space = "" if item.prompt[-1:] in ("", "\n") else " "
            alone = [log_p(model, item.prompt + space + choice, item.prompt) for choice in item.choices]
            assert row["log p (nats)"] == pytest.approx(alone, abs=1e-8)
            tokens = [len(TOKENIZER.encode(" " + choice)) for choice in item.choices]
            if normalize == "bytes":
                alone = [p / len(choice.encode()) for p, choice in zip(alone, item.choices, strict=True)]
            elif normalize == "tokens" and space:
                alone = [p / n for p, n in zip(alone, tokens, strict=True)]
            elif normalize == "tokens":
                continue
            assert row["score"] == pytest.approx(alone, abs=1e-8)
            chosen = alone.index(max(alone))
            assert row["chosen"] == item.choices[chosen]
            assert row["correct"] == (chosen in item.answers)


def test_a_row_says_what_was_asked_chosen_and_right():
    item = Item("a", ("b", "cc", "d", "e"), (1, 3), "letters")
    row = multiple_choice(MODELS["GPT-2"], TOKENIZER, [item], progress=False).iloc[0]
    assert (row["group"], row["prompt"], row["answer"], row["chance"]) == ("letters", "a", "cc", 0.5)
    assert row["chosen"] in item.choices


@both
def test_of_equal_scores_the_first_wins(model):
    items = [Item("On", ("the mat", "the mat"), (answer,)) for answer in (0, 1)]
    result = multiple_choice(model, TOKENIZER, items, progress=False)
    assert list(result["correct"]) == [True, False]


def test_by_default_a_long_choice_is_not_worse_for_its_length():
    item = Item("a", ("cat", "zzzz", "xxxxxxxxx"), (1,))  # a token each for three, four and nine bytes
    model = guesser(80)
    scores = multiple_choice(model, TOKENIZER, [item], progress=False)["score"][0]
    n = [len(TOKENIZER.encode(" " + choice)) / len(choice) for choice in item.choices]
    assert scores == pytest.approx([-math.log(TOKENIZER.vocab_size) * share for share in n], rel=1e-5)


def test_what_prompts_share_is_read_once_and_each_prompt_once_for_all_its_choices(monkeypatch):
    model, n_read = MODELS["Llama"], 0
    hidden = GPT.hidden

    def counting(self, ids, *rest):
        nonlocal n_read
        n_read += ids.numel()
        return hidden(self, ids, *rest)

    monkeypatch.setattr(GPT, "hidden", counting)
    shared, prompts = list(range(1, 31)), [[i] * 10 for i in range(40, 45)]
    log_likelihoods(model, [([*shared, *prompt], [[7, 8], [9], [6, 5]]) for prompt in prompts])
    # 30 tokens once, 9 more of each prompt, and for each choice the prompt's last and up to one of its own
    assert n_read == 30 + 5 * 9 + 5 * 3 * 2


def test_a_batch_holds_whole_questions_of_like_length_and_no_more_rows_than_fit():
    lengths, n_choices = [9, 3, 5, 4, 8, 2], [2, 2, 3, 1, 2, 7]
    questions = [([0] * n, [[1]] * k) for n, k in zip(lengths, n_choices, strict=True)]
    assert [*evaluation._batches(questions, 4)] == [[5], [1, 3], [2], [4, 0]]
    assert [*evaluation._batches(questions, 99)] == [[5, 1, 3], [2], [4, 0]]


@given(texts, texts)
def test_the_tokens_are_those_of_the_whole_text(prompt, choice):
    text = evaluation._join(prompt, choice)
    (end, *before), [after] = evaluation._encode(TOKENIZER, prompt, [text])
    assert end == END_ID
    assert TOKENIZER.decode([*before, *after]) == text
    if prompt.strip() and not choice[:1].isspace():
        assert [*before, *after] == TOKENIZER.encode(text)


def test_a_continuation_that_belongs_to_a_word_is_encoded_alone():
    assert evaluation._encode(TOKENIZER, "the", ["thecat"])[1] != [[]]
    before, [after] = evaluation._encode(TOKENIZER, "ca", ["cat"])
    assert TOKENIZER.decode(before[1:]) == "ca" and TOKENIZER.decode(after) == "t"


def test_a_model_in_training_is_asked_without_dropout_and_trains_on():
    model = GPT(GPTConfig(**SIZES, dropout=0.5)).train()
    first, second = (multiple_choice(model, TOKENIZER, ITEMS, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert model.training


def test_items_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="at least 2 choices, none of them empty"):
        Item("a", ("b",), (0,))
    with pytest.raises(ValueError, match="none of them empty"):
        Item("a", ("b", ""), (0,))
    with pytest.raises(ValueError, match=r"answers \(2,\) must be some of 0 to 1"):
        Item("a", ("b", "c"), (2,))
    with pytest.raises(ValueError, match="normalize='words'"):
        multiple_choice(guesser(), TOKENIZER, ITEMS, normalize="words")
    long = Item("1", ("2", "2345678"), (0,))  # 10 tokens, the last of which is not read
    with pytest.raises(ValueError, match="item 1 takes 9 tokens, more than max_seq_len=8: leave it out"):
        multiple_choice(guesser(), TOKENIZER, [ITEMS[1], long], progress=False)
    assert len(multiple_choice(guesser(9), TOKENIZER, [ITEMS[1], long], progress=False)) == 2


def test_lettered_choices_stand_before_the_last_line():
    item = Item("Question: Why?\nAnswer:", ("so", "for fun"), (1,))
    expected = Item("Question: Why?\nA. so\nB. for fun\nAnswer:", ("A", "B"), (1,))
    assert lettered([item]) == [expected]


def test_more_choices_than_letters_are_refused():
    item = Item("Which?", tuple(str(i) for i in range(27)), (0,))
    with pytest.raises(ValueError, match="27 choices, and 26 letters"):
        lettered([item])


def test_examples_stand_solved_before_the_question():
    example = Item("Question: 1?\nAnswer:", ("no", "yes"), (1,))
    (item,) = few_shot([Item("Question: 2?\nAnswer:", ("a", "b"), (0,), "x")], [example, ITEMS[4]])
    prompt = "Question: 1?\nAnswer: yes\n\nThe cat sat:\non the mat\n\nQuestion: 2?\nAnswer:"
    assert item == Item(prompt, ("a", "b"), (0,), "x")
    with pytest.raises(ValueError, match="1 of the 2 examples are among the items, such as 'On'"):
        few_shot(ITEMS, [ITEMS[1], example])


# Error bars


def test_the_interval_of_a_share_is_that_of_the_normal_law():
    values = [1] * 120 + [0] * 80
    low, high = bootstrap_interval(values)
    deviation = math.sqrt(0.6 * 0.4 / 200)
    assert low == pytest.approx(0.6 - 1.96 * deviation, abs=0.006)
    assert high == pytest.approx(0.6 + 1.96 * deviation, abs=0.006)
    narrow = bootstrap_interval(values, 0.5)
    assert low < narrow[0] < 0.6 < narrow[1] < high
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)


def test_a_level_is_how_often_the_truth_lies_within():
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        values = torch.rand(50, generator=generator) < 0.7
        low, high = bootstrap_interval(values.tolist(), 0.9, n=300)
        hits += low <= 0.7 <= high
    assert 0.82 < hits / 200 < 0.97


@pytest.mark.parametrize("values, level, n", [([1.0], 0.95, 9), ([0, 1], 1.0, 9), ([0, 1], 0.5, 0)])
def test_an_interval_needs_values_a_level_and_samples(values, level, n):
    with pytest.raises(ValueError, match=f"{len(values)} values, level={level}, n={n}: give"):
        bootstrap_interval(values, level, n=n)


def test_the_table_has_a_row_for_each_result():
    right = pd.DataFrame({"correct": [True] * 30 + [False] * 10, "chance": [0.25] * 20 + [0.5] * 20})
    rows = table({"good": right, "perfect": right[:30]})
    assert list(rows.index) == ["good", "perfect"]
    assert list(rows.columns) == ["items", "accuracy (%)", "from (%)", "to (%)", "chance (%)"]
    assert rows.loc["good", ["items", "accuracy (%)", "chance (%)"]].tolist() == [40, 75.0, 37.5]
    assert 55 < rows.loc["good", "from (%)"] < 65 and 85 < rows.loc["good", "to (%)"] < 92
    assert rows.loc["perfect", ["accuracy (%)", "from (%)", "to (%)"]].tolist() == [100.0] * 3
    assert table({"good": right}, 0.5)["from (%)"].item() > rows.loc["good", "from (%)"]


# Our own items


OURS = {
    "mmlu": (load_mmlu, 156),
    "truthfulqa.csv": (load_truthfulqa, 123),
    "bigbench": (load_bigbench, 120),
    "wic": (load_wic, 118),
    "winobias": (load_winobias, 116),
}


@pytest.mark.parametrize("name", OURS)
def test_our_items_are_there_distinct_and_balanced(name):
    load, n_items = OURS[name]
    items = load(BENCHMARKS / name)
    assert len(items) == n_items
    assert len({item.prompt + str(item.choices) for item in items}) == n_items
    for item in items:
        assert len(item.answers) == 1 and len(set(item.choices)) == len(item.choices)
        assert item.group and "  " not in item.prompt + "".join(item.choices)
    places = Counter((len(item.choices), item.answers[0]) for item in items)
    if name != "winobias":  # where the first choice is the stereotype
        for n in {n for n, _ in places}:
            counts = [places[n, i] for i in range(n)]
            assert max(counts) - min(counts) <= 3


def test_our_mmlu_has_subjects_of_one_size_and_examples_for_each():
    tests, examples = load_mmlu(BENCHMARKS / "mmlu"), load_mmlu(BENCHMARKS / "mmlu", split="dev")
    assert set(Counter(item.group for item in tests).values()) == {12}
    assert set(Counter(item.group for item in examples).values()) == {3}
    assert len({item.group for item in tests}) == 13
    assert not {item.prompt for item in tests} & {item.prompt for item in examples}


def test_our_words_in_context_stand_where_the_file_says():
    for line in (BENCHMARKS / "wic" / "test.data.txt").read_text(encoding="utf-8").splitlines():
        word, _, places, *sentences = line.split("\t")
        for place, sentence in zip(places.split("-"), sentences, strict=True):
            used = sentence.split()[int(place)].lower()
            forms = {"broke": "break", "caught": "catch", "fell": "fall", "flew": "fly", "held": "hold"}
            forms |= {"ran": "run", "drew": "draw", "struck": "strike", "lost": "lose"}
            assert forms.get(used, used).startswith(word)


def test_our_pairs_of_winobias_differ_in_a_pronoun_alone():
    pronouns = {"he": "she", "she": "he", "him": "her", "her": "him"}
    kinds = Counter()
    for item in load_winobias(BENCHMARKS / "winobias"):
        (pro, *rest), (anti, *other) = (choice.split(" ") for choice in item.choices)
        assert rest == other and pronouns[pro.rstrip(".")] == anti.rstrip(".")
        kinds[item.group, pro[0] == "h" and pro != "her" and pro != "her."] += 1
    assert kinds == {(kind, is_male): 29 for kind in ("type1", "type2") for is_male in (True, False)}


# The real files, as they are


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_mmlu_is_read_from_its_folders_by_split(tmp_path):
    row = '"Which ""sign""\nis first, if any?",yes,yes,"a, b",None,D\n'
    write(tmp_path / "data" / "test" / "high_school_biology_test.csv", row)
    write(tmp_path / "data" / "dev" / "high_school_biology_dev.csv", "\ufeff1+1,1,2,3,4,B\n")
    write(tmp_path / "data" / "README.txt", "no items")
    (item,) = load_mmlu(tmp_path / "data")
    prompt = 'Question: Which "sign"\nis first, if any?\nAnswer:'
    assert item == Item(prompt, ("yes", "yes", "a, b", "None"), (3,), "high_school_biology")
    (item,) = load_mmlu(tmp_path, split="dev")
    assert item == Item("Question: 1+1\nAnswer:", ("1", "2", "3", "4"), (1,), "high_school_biology")


def test_truthfulqa_is_read_with_its_old_and_its_new_columns(tmp_path):
    head = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source"
    text = (
        f'\ufeff{head}\nAdversarial,Law,Is it?,"No, never.",Yes,"No, never.; No","Yes; Yes, often. ;",url\n'
    )
    text += "Adversarial,Law,Or not?,Yes,No,Yes,No,url\n"
    first, second = load_truthfulqa(write(tmp_path / "TruthfulQA.csv", text))
    assert first == Item("Question: Is it?\nAnswer:", ("No, never.", "Yes.", "Yes, often."), (0,), "Law")
    assert second == Item("Question: Or not?\nAnswer:", ("No.", "Yes."), (1,), "Law")


def test_bigbench_is_read_with_its_extra_keys(tmp_path):
    task = {
        "canary": "x",
        "name": "months",
        "task_prefix": "Think.\n",
        "example_output_prefix": "\nMonth: ",
        "preferred_score": "multiple_choice_grade",
        "examples": [
            {"input": "Cold?", "target_scores": {"July": 0, "January": 1, "December": 1}, "comment": ""},
            {"input": "Hot?", "target_scores": {"May": 0.2, "July": 0.7}, "target": "July"},
        ],
    }
    write(tmp_path / "months" / "task.json", json.dumps(task))
    first, second = load_bigbench(tmp_path)
    assert first == Item("Think.\n\nQ: Cold?\nMonth:", ("July", "January", "December"), (1, 2), "months")
    assert second.answers == (1,)


def test_wic_is_read_with_its_gold_beside(tmp_path):
    write(
        tmp_path / "dev" / "dev.data.txt",
        "go\tV\t1-0\tI went .\tGo home !\ncup\tN\t1-1\tA cup .\tTwo cups .\n",
    )
    write(tmp_path / "dev" / "dev.gold.txt", "T\nF\n")
    verb, noun = load_wic(tmp_path)
    question = 'Question: Does the word "go" mean the same in both sentences?'
    assert verb == Item(f"I went .\nGo home !\n{question}\nAnswer:", ("no", "yes"), (1,), "verb")
    assert (noun.answers, noun.group) == ((0,), "noun")


def test_winobias_is_read_with_and_without_numbers(tmp_path):
    pro = "1 [The cook] met the maid because [he] took [his] hat.\nThe cook fed [the maid] with [her] soup.\n"
    anti = (
        "1 [The cook] met the maid because [she] took [her] hat.\nThe cook fed the [maid] with [his] soup.\n"
    )
    write(tmp_path / "pro_stereotyped_type1.txt.dev", pro)
    write(tmp_path / "anti_stereotyped_type1.txt.dev", anti)
    first, second = load_winobias(tmp_path)
    choices = ("he took his hat.", "she took her hat.")
    assert first == Item("The cook met the maid because", choices, (0,), "type1")
    assert second == Item("The cook fed the maid with", ("her soup.", "his soup."), (0,), "type1")


HEAD = "Category,Question,Best Answer,Incorrect Answers\n"
BAD = [
    (load_mmlu, {"a_test.csv": "q,1,2,3,4,A\nq,1,2,3,A\n"}, "a_test.csv, line 2: 5 cells: write question"),
    (load_mmlu, {"a_test.csv": "q,1,2,3,4,E\n"}, "a_test.csv, line 1: 6 cells: write question"),
    (load_mmlu, {"a_test.csv": "q,1,,3,4,B\n"}, "a_test.csv, line 1: an item needs at least 2 choices"),
    (load_mmlu, {"a_test.csv": 'q,1,2,3,4,A\n"q,1,2,3,4,A\n'}, "line 2: .*: close each quote"),
    (load_mmlu, {"a_dev.csv": "q,1,2,3,4,A\n"}, r"no file \*_test.csv in it: give the folder"),
    (load_truthfulqa, {"t.csv": "a,b\n"}, "t.csv, line 1: the columns must be named"),
    (load_truthfulqa, {"t.csv": ""}, "t.csv, line 1: the columns must be named"),
    (load_truthfulqa, {"t.csv": HEAD + "Law,Is it, or not?,no,yes\n"}, "line 2: 5 cells for 4 columns"),
    (load_truthfulqa, {"t.csv": HEAD + "Law,Is it?,,yes\n"}, "line 2: an item needs"),
    (load_truthfulqa, {"t.csv": HEAD + "Law,Is it?,no,\n"}, "line 2: an item needs"),
    (load_bigbench, {"t.json": '{"name":\n}'}, "t.json, line 2: this is no JSON"),
    (load_bigbench, {"t.json": "[]"}, "t.json, line 1: a task must have a name and examples"),
    (
        load_bigbench,
        {"t.json": '{"name": "a", "examples": [{"input": "", "target": ""}]}'},
        "example 1: it needs",
    ),
    (
        load_wic,
        {"a.data.txt": "go\tV\t0-0\tGo !\tGo .\n", "a.gold.txt": "T\nF\n"},
        "gold.txt, line 2: here it ends",
    ),
    (
        load_wic,
        {"a.data.txt": "go\tV\t0-0\tGo !\tGo .\n", "a.gold.txt": "X\n"},
        "gold.txt, line 1: 'X' must be",
    ),
    (
        load_wic,
        {"a.data.txt": "go\tV\t0-2\tGo !\tGo .\n", "a.gold.txt": "T\n"},
        "data.txt, line 1: write word",
    ),
    (load_wic, {"a.data.txt": "go V 0-0\n", "a.gold.txt": "T\n"}, "data.txt, line 1: write word"),
    (load_wic, {"a.data.txt": "go\tV\t0-0\tGo !\tGo .\n"}, "a.gold.txt is not there"),
    (load_winobias, {"pro_stereotyped_type1.txt.dev": "1 A [he].\n"}, "anti_.* is not there"),
    (
        load_winobias,
        {"pro_stereotyped_type1.txt.dev": "A he.\n", "anti_stereotyped_type1.txt.dev": "A he.\n"},
        "dev, line 1: an item needs",
    ),
]


@pytest.mark.parametrize("load, files, message", BAD, ids=[f"{b[0].__name__}-{i}" for i, b in enumerate(BAD)])
def test_a_bad_file_is_named_with_its_line_and_the_way_out(load, files, message, tmp_path):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none_test\.csv is not there"):
        load_mmlu(tmp_path / "none_test.csv")
    (tmp_path / "a_test.csv").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a_test\.csv is not UTF-8 \(unexpected end of data at byte 3\)"):
        load_mmlu(tmp_path)


# The harness


def requests(*args) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=arg) for arg in args]


@both
def test_the_harness_gets_log_p_and_whether_it_is_greedy(model):
    asked = [
        ("the cat", " sat"),
        ("The dog", " sat on"),
        ("the cat", " and"),
        ("", "on"),
        ("the cat ", "sat"),
    ]
    found = HarnessModel(model, TOKENIZER).loglikelihood(requests(*asked))
    expected = [log_p(model, context + text, context) for context, text in asked]
    assert [p for p, _ in found] == pytest.approx(expected, abs=1e-8)
    assert found[0] == found[4]
    prompt = [END_ID, *TOKENIZER.encode("the cat")]
    first, second = greedy(model, torch.tensor([prompt]), 2)[0, -2:].tolist()
    choices = [[first], [first, second], [first, (second + 1) % 200], [(first + 1) % 200, first]]
    (scores,) = log_likelihoods(model, [(prompt, choices)])
    assert [is_greedy for _, is_greedy in scores] == [True, True, False, False]


def test_the_harness_may_ask_for_more_than_the_model_sees():
    model = lively(GPTConfig(**{**SIZES, "max_seq_len": 6}))
    context = "the cat sat on the mat and the dog"
    (found,) = HarnessModel(model, TOKENIZER).loglikelihood(requests((context, " sat on")))
    ids = torch.tensor([TOKENIZER.encode(context + " sat on")])[:, -7:]
    with torch.no_grad():
        log_p = model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert found[0] == pytest.approx(log_p[-2:].sum().item(), abs=1e-8)


def test_the_harness_gets_log_p_of_whole_texts():
    some = ["the cat sat", "on the mat " * 30]
    found = HarnessModel(MODELS["Llama"], TOKENIZER).loglikelihood_rolling(
        requests(*((text,) for text in some))
    )
    assert found == [-text_nats(MODELS["Llama"], TOKENIZER, text) for text in some]


@both
def test_the_harness_gets_greedy_text_up_to_the_first_stop(model):
    ids = torch.tensor([[END_ID, *TOKENIZER.encode("the cat")]])
    new = greedy(model, ids, 12)[0, ids.shape[1] :].tolist()
    assert END_ID not in new
    text = TOKENIZER.decode(new)
    early, late = text[4:6], text[-2:]
    assert text.index(early) < text.index(late)
    stops = [[], late, [late, early], [early, late]]
    asked = [("the cat", {"until": until, "max_gen_toks": 12}) for until in stops]
    found = HarnessModel(model, TOKENIZER).generate_until(requests(*asked, ("the cat", {"max_gen_toks": 1})))
    before = text.split(early)[0]
    assert found == [text, text.split(late)[0], before, before, TOKENIZER.decode(new[:1])]


def test_an_end_token_ends_the_text():
    model = GPT(GPTConfig(**SIZES, tied=False))
    with torch.no_grad():
        model.final_norm.bias.fill_(1)
        model.lm_head.weight.zero_()[END_ID] = 1
    assert HarnessModel(model, TOKENIZER).generate_until(requests(("the cat", {}))) == [""]


def test_without_the_harness_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=re.escape("pip install lm-eval==")):
        for_harness(MODELS["Llama"], TOKENIZER)


TASK = """
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_real_harness_finds_the_accuracy_that_we_find(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: it is no part of the course")
    from lm_eval.tasks import TaskManager

    items = [item for item in ITEMS if len(item.answers) == 1 and item.prompt.strip() == item.prompt != ""]
    rows = [{"prompt": i.prompt, "choices": i.choices, "answer": i.answers[0]} for i in items]
    file = write(tmp_path / "cats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "tasks" / "cats.yaml", TASK.replace("FILE", json.dumps(str(file))))
    found = lm_eval.simple_evaluate(
        model=for_harness(MODELS["Llama"], TOKENIZER),
        tasks=["cats"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["cats"]
    for metric, normalize in (("acc", None), ("acc_norm", "bytes")):
        ours = multiple_choice(MODELS["Llama"], TOKENIZER, items, normalize=normalize, progress=False)
        assert found[f"{metric},none"] == ours["correct"].mean()
