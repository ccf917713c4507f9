"""Test the tales: each story parses back to its choices, and the entropy is exact."""

import hashlib
import importlib.util
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmlib


def load_without_shape_checks():
    """Load tales.py past the import hook of conftest.py: it has no tensors, and the hook is slow."""
    spec = importlib.util.spec_from_file_location("tales", Path(llmlib.__file__).with_name("tales.py"))
    sys.modules["tales"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tales"])
    return sys.modules["tales"]


tales = load_without_shape_checks()
Grammar, ParseError = tales.Grammar, tales.ParseError

SMALL = """
list girl she
Mia, Zoe

list boy he
Tom, Ben, Leo

list child = girl + boy

list job she/he | shop
baker | bakery
doctor | clinic

list toy
kite, ball

plot one
hero: child
friend: child
beginning
- {hero} met {friend}.
| [*2 Once|Early one day] {hero} saw {friend}.
wish
- {Hero.they} wanted {a toy}.
trouble
- The {job} had lost {job.their} hat.
| The {job} was tired. {Job.they} [sat|lay] down.
turn
- <help hero job>
end
- "For {friend}," said {hero}[.|, and gave away the {toy}.]

plot two
beginning
- At the {job.shop} was a {job}, {job.adult} and friend.
wish
- {A toy}!
trouble
- No.
turn
- Yes.
end
- {Job.they} was glad.

rule help x y
- {x} went to the {y.shop}.
"""


def all_stories(grammar: Grammar, bias: dict[str, float] | None = None) -> dict[str, float]:
    """Tell every story, by taking every option in turn: text → probability."""
    stories = Counter()
    paths = [()]
    while paths:
        path = paths.pop()
        weights_met = []

        def choose(weights, path=path, met=weights_met):
            met.append(weights)
            return path[len(met) - 1] if len(met) <= len(path) else 0

        text = grammar.tell(choose, bias)
        full = path + (0,) * (len(weights_met) - len(path))
        stories[text] += math.prod(w[i] / sum(w) for w, i in zip(weights_met, full, strict=True))
        for depth in range(len(path), len(weights_met)):
            paths += [(*full[:depth], i) for i in range(1, len(weights_met[depth]))]
    return stories


def replay(grammar: Grammar, choices: tuple[int, ...]) -> str:
    rest = iter(choices)
    return grammar.tell(lambda weights: next(rest))


@pytest.fixture(scope="module")
def small() -> Grammar:
    return Grammar({"small.txt": SMALL})


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return tales.tales(10_000, seed=1)


@pytest.fixture(scope="module")
def parsed(stories) -> list[tales.Tale]:
    return [tales.parse(story) for story in stories]


@pytest.mark.parametrize("bias", [None, {"baker": 0.9}, {"baker": 1.0, "doctor": 0.25}])
def test_entropy_equals_the_sum_over_all_stories_of_a_small_grammar(small, bias):
    probability = all_stories(small, bias)
    assert math.isclose(sum(probability.values()), 1)
    assert math.isclose(
        small.entropy_per_story(bias), -sum(p * math.log(p) for p in probability.values() if p)
    )
    for story, p in probability.items():
        assert math.isclose(math.exp(small.parse(story, bias).log_prob), p, abs_tol=1e-15)


def test_10000_stories_parse_back_to_their_choices(stories, parsed):
    for story, tale in zip(stories, parsed, strict=True):
        assert replay(tales.grammar(), tale.choices) == story


@given(st.randoms(use_true_random=False))
def test_any_choices_are_recovered(random):
    made = []

    def choose(weights):
        made.append(random.randrange(len(weights)))
        return made[-1]

    story = tales.grammar().tell(choose)
    assert tales.parse(story).choices == tuple(made)


def test_entropy_is_the_mean_of_minus_log_p(parsed):
    surprises = [-tale.log_prob for tale in parsed]
    standard_error = statistics.stdev(surprises) / len(surprises) ** 0.5
    assert abs(statistics.mean(surprises) - tales.entropy_per_story()) < 4 * standard_error


def test_the_tales_are_rich(stories, parsed):
    words = [re.findall(r"[A-Za-z]+(?:[-'][a-z]+)*", story) for story in stories]
    lengths = sorted(map(len, words))
    assert len({tale.plot for tale in parsed}) >= 40
    assert len({word.lower() for story in words for word in story}) >= 1500
    assert lengths[100] >= 80 and lengths[-100] <= 200
    assert math.exp(tales.entropy_per_story()) > 10**12  # n stories have an entropy of log n at most
    assert len(set(stories)) == len(stories)


def test_a_tale_exposes_its_truth():
    story = next(s for s in tales.tales(500, seed=0) if tales.parse(s).plot == "lost_thing")
    tale = tales.parse(story)
    assert tuple(tale.parts) == tales.PARTS and "\n".join(tale.parts.values()) == story
    assert tale.lists["hero"] == "child" and tale.words["hero"] != tale.words["friend"]
    assert tale.words["thing"] in tales.categories()["thing"] and tale.words["thing"] in tale.parts["end"]
    assert tale.pronouns["hero"] == ("she" if tale.words["hero"] in tales.categories()["girl"] else "he")
    assert tale.words["place"] in tales.categories()["place"]
    assert "thing" not in tale.pronouns


def test_the_english_of_the_tales(stories):
    for story in stories:
        assert story.isascii() and story.count("\n") == 4
        wrong = re.search(
            r"(?:^|(?<!\.\.)[.!?] \"?|\n\"?)[a-z]\w*"  # a sentence begins with a capital
            r"|  | \n|\n | [.,!?]|[][{}<>|]|(?<!\.)\.\.(?!\.)|,\.|(?<!\.\.)\.\" (?:he|she|said)\b"
            r"|\b[Aa] (?!use)[aeiou]\w+|\b[Aa]n [^aeiou]\w*|\b(?!had)(\w+) \1\b",
            story,
        )
        assert not wrong, (wrong[0], story)


def test_pronouns_belong_to_their_words(parsed):
    for tale in parsed:
        if tale.plot == "last_piece":  # only the hero and the friend speak here, and they never change
            text = " ".join(tale.parts.values())
            said = set(re.findall(r"\b(?:she|he)\b", text.lower()))
            assert said <= {tale.pronouns[name] for name in ("hero", "friend", "family")}


def test_every_word_of_the_main_lists_is_used_often(stories):
    counts = Counter(re.findall(r"[A-Za-z]+", " ".join(stories)))
    for name in ("child", "animal", "pet", "place", "food", "job", "color", "instrument", "flower"):
        for word in tales.categories()[name]:
            assert counts[word] + counts[word.capitalize()] * (not word[0].isupper()) > 50, word


def test_jobs_are_free_of_bias_unless_told(parsed):
    women = Counter(tale.pronouns["job"] for tale in parsed if "job" in tale.words and "job" in tale.pronouns)
    n = sum(women.values())
    assert set(women) == {"she", "he"} and abs(women["she"] - n / 2) < 4 * (n / 4) ** 0.5


def test_bias_is_obeyed_and_costs_entropy():
    bias = {"doctor": 0.0, "nurse": 1.0}
    for story in tales.tales(500, seed=2, bias=bias):
        tale = tales.parse(story, bias)
        if tale.words.get("job") in bias and "job" in tale.pronouns:
            assert tale.pronouns["job"] == ("she" if tale.words["job"] == "nurse" else "he")
        assert tale.log_prob > -math.inf
    assert (
        tales.entropy_per_story(bias) < tales.entropy_per_story() == tales.entropy_per_story({"doctor": 0.5})
    )


def test_the_same_seed_tells_the_same_stories_on_every_machine():
    digest = hashlib.sha256("\n\n".join(tales.tales(1000, seed=0)).encode()).hexdigest()
    assert digest == "19f588d8016ad261a2af29bc0ebb47a72e918e52b189830a1300116f3625bcca"
    assert tales.tales(5, seed=3) == tales.tales(10, seed=3)[:5] != tales.tales(5, seed=4)


def test_a_parse_error_names_the_longest_prefix(small):
    story = "Mia met Tom.\nShe wanted a kite.\nThe baker had lost her hat.\nMia went to the bakery."
    story += '\n"For Tom," said Mia.'
    assert small.parse(story).words == {"hero": "Mia", "friend": "Tom", "toy": "kite", "job": "baker"}
    for wrong, right, variable in [("For Ben", "For Tom", "friend"), ("He wanted", "She wanted", "hero")]:
        with pytest.raises(ParseError, match=f"the wrong word for {variable!r}") as error:
            small.parse(story.replace(right, wrong))
        assert error.value.variable == variable
        assert error.value.prefix == story[: story.index(right) + (4 if "For" in right else 0)]
    with pytest.raises(ParseError, match="the wrong word for 'friend'") as error:
        small.parse(story.replace("Tom", "Mia"))  # a word that is taken can't be drawn again
    assert error.value.variable == "friend" and error.value.prefix == "Mia met "
    with pytest.raises(ParseError) as error:
        small.parse(story.replace("a kite", "a kitchen"))
    assert error.value.prefix == "Mia met Tom.\nShe wanted a kit" and error.value.variable is None
    with pytest.raises(ParseError, match="no story goes on like this") as error:
        small.parse(story.replace("wanted", "wasted"))
    assert error.value.prefix == "Mia met Tom.\nShe wa" and error.value.variable is None
    for more in [" The end.", "\0"]:
        with pytest.raises(ParseError) as error:
            small.parse(story + more)
        assert error.value.prefix == story
    with pytest.raises(ParseError) as error:
        small.parse("Mia met Tom.")
    assert error.value.prefix == "Mia met Tom."


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"queen": 0.5}, "bias gives 'queen' 0.5; .* to baker, doctor"),
        ({"baker": 1.5}, "bias gives 'baker' 1.5"),
    ],
)
def test_a_wrong_bias_is_refused(small, bias, message):
    with pytest.raises(ValueError, match=message):
        small.tales(1, seed=0, bias=bias)


@pytest.mark.parametrize(
    ("old", "new", "culprit", "message"),
    [
        ("- No.", "- {nobody}", "{nobody}", "plot two: {nobody}: there is no list 'nobody'"),
        ("- No.", "- {A toy of}", "{A toy of}", "plot two: can't read '{' in '{A toy of}'"),
        ("hero: child", "hero: person", "{hero} met", "plot one: {hero}: there is no list 'person'"),
        ("{job.shop} was", "{job.size} was", "{job.size}", "{job.size}: a word of list 'job' has no 'size'"),
        (
            "doctor | clinic",
            "doctor |",
            "- {x} went",
            "rule help: {y.shop}: a word of list 'job' has no 'shop'",
        ),
        ("{A toy}!", "{A toy} of {toy.theirs}!", "{A toy} of", "a word of list 'toy' has no 'theirs'"),
        (
            "- Yes.",
            "- <shout toy>",
            "<shout toy>",
            "plot two: no other rule 'shout' has 1 parameters, as <shout toy> needs",
        ),
        (
            "- <help hero job>",
            "- <help hero>",
            "<help hero>",
            "plot one: no other rule 'help' has 1 parameters",
        ),
        ("went to", "<help x y>", "<help x y>", "rule help: no other rule 'help' has 2 parameters"),
        ("- Yes.", "- [Yes|].", "[Yes|]", "plot two: this wording can't be told apart"),
        ("*2 Once", "*0 Once", "*0 Once", "plot one: can't read '[' in '[*0 Once"),
        ("*2 Once", "*two Once", "*two Once", "plot one: can't read '[' in '[*two Once"),
        (
            "[sat|lay]",
            "[sat|sat]",
            "[sat|sat]",
            "plot one: this wording can't be told apart from the one at small.txt:27",
        ),
        (
            "[sat|lay] down",
            "[sat|sat down]",
            "[sat|sat down]",
            "plot one: this wording can't be told apart from the one at small.txt:27",
        ),
        ("plot two", "plot one", "plot one\nbeginning", "plot one: there is another one before"),
        ("- No.", "- No].", "No].", "plot two: can't read ']' in 'No].'"),
        ("- No.", "- [No.", "[No.", "plot two: can't read '[' in '[No.'"),
        ("- No.", "- {No.", "{No.", "plot two: can't read '{' in '{No.'"),
        ("- No.", "No.", "No.", "plot two: can't read 'No.'"),
        (
            "trouble\n- No.",
            "- No.",
            "plot two",
            "its parts must be beginning, wish, trouble, turn, end; those with a text are",
        ),
        ("- No.\n", "", "plot two", "those with a text are beginning, wish, turn, end"),
        ("Tom, Ben", "Tom,, Ben", "Tom,, Ben", "list boy: a word is missing in 'Tom,, Ben, Leo'"),
        (
            "kite, ball\n",
            "",
            "{Hero.they} wanted",
            "plot one: {a toy}: there is no list 'toy', or it is empty",
        ),
        ("= girl + boy", "= girl + dog", "list child", "list child: there is no list 'dog' before"),
        ("Mia, Zoe", "Mia, Miana", "{hero} met", "a first mention {hero} can't tell 'Mia' from 'Miana'"),
        (
            "friend: child",
            "friend: girl",
            "{hero} met",
            "plot one: {friend}: 'friend' could be the same word as 'hero'",
        ),
        (
            "Yes.",
            "[{child}|No]. {child}!",
            "[{child}",
            "plot two: {child}: only some tellings have mentioned 'child' before",
        ),
        (
            "\nlist girl she",
            "Hello.\nlist girl she",
            "Hello.",
            "'Hello.' stands before the first list, rule or plot",
        ),
    ],
)
def test_a_broken_grammar_names_file_line_and_rule(old, new, culprit, message):
    assert SMALL.count(old) == 1
    text = SMALL.replace(old, new)
    line = text[: text.index(culprit)].count("\n") + 1
    with pytest.raises(ValueError, match=rf"^small\.txt:{line}: .*{re.escape(message)}"):
        Grammar({"small.txt": text})


def test_two_plots_that_tell_the_same_story_are_refused():
    copy = SMALL[SMALL.index("plot two") : SMALL.index("rule help")].replace("plot two", "plot three")
    with pytest.raises(
        ValueError, match="plot three: this wording can't be told apart from the one at small"
    ):
        Grammar({"small.txt": SMALL, "three.txt": copy})
