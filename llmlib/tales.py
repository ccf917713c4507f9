"""Tell short stories in simple words by a hand-written grammar whose entropy is known exactly."""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

PARTS = ("beginning", "wish", "trouble", "turn", "end")
PRONOUN_FORMS = ("they", "them", "their", "theirs", "themself", "child", "adult")
PRONOUNS = {
    "she": dict(zip(PRONOUN_FORMS, ("she", "her", "her", "hers", "herself", "girl", "woman"), strict=True)),
    "he": dict(zip(PRONOUN_FORMS, ("he", "him", "his", "his", "himself", "boy", "man"), strict=True)),
}

# ------------------------------------------------------------------------------ what a story is made of


@dataclass(frozen=True)
class Choice:
    """Go on with one of the options, drawn in proportion to the weights."""

    options: tuple[Nodes, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mention:
    """Show the word that a variable holds."""

    variable: str
    forms: dict[str, str]  # word → how it stands in the text


@dataclass(frozen=True)
class Draw(Mention):
    """Mention a variable for the first time: draw its word, but none that a rival holds.

    If the variable is a pronoun, `owner` drew the word that it stands for.
    """

    rivals: tuple[str, ...] = ()
    owner: Draw | None = None


Nodes = Sequence["str | Choice | Mention"]
Bias = Mapping[str, float]
Choose = Callable[[Sequence[float]], int]  # given the weights of the options, the index of the one taken


@dataclass(frozen=True)
class Tale:
    """Hold what the text of a story says about itself.

    `parts` maps beginning, wish, trouble, turn and end to their text. `words` maps each variable (hero,
    place, thing, …) to its word, `lists` to the list it was drawn from, `pronouns` to "she" or "he".
    `choices` holds every choice in the order of the telling, `log_prob` the sum of their logarithms in nats.
    """

    plot: str
    parts: dict[str, str]
    words: dict[str, str]
    lists: dict[str, str]
    pronouns: dict[str, str]
    choices: tuple[int, ...]
    log_prob: float


class ParseError(ValueError):
    """Say where a text leaves the grammar.

    `prefix` is the longest start of the text that is also the start of a story. `variable` names the variable
    that is mixed up right after it (another name, object or pronoun stands in its place), or is None.
    """

    def __init__(self, text: str, end: int, stuck: Sequence[str | Mention]) -> None:
        """Look at `end`, the furthest point to which the text fits, where these nodes got stuck."""
        self.variable, rest = None, text[end:]
        for node in stuck:
            forms = node.forms.values() if isinstance(node, Mention) else ()
            if any(re.match(rf"{re.escape(form)}\b", rest) for form in forms):
                self.variable = node.variable
        if not self.variable:
            texts = [node for node in stuck if isinstance(node, str)]
            end += max(
                (n for node in texts for n in range(len(node)) if rest.startswith(node[:n])), default=0
            )
        self.prefix = text[:end]
        problem = f"the wrong word for {self.variable!r}" if self.variable else "no story goes on like this"
        super().__init__(f"{problem}: {text[end : end + 30]!r}, after {self.prefix[-40:]!r}")


# ------------------------------------------------------------------------------ telling, parsing, measuring


class Grammar:
    """Tell and parse stories by the rules in `files` (name → text), and measure their entropy.

    A story has five lines: its beginning, wish, trouble, turn and end. A `bias` gives the probability that
    whoever does a job is a "she" ({"nurse": 0.9}); it is 0.5 for every job that is not named.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.lists, rules, self.plots = _read(files)
        plots = [_Compiler(self.lists, rules, plot).nodes for plot in self.plots.values()]
        _check_apart(plots, [plot.body[0].where for plot in self.plots.values()])
        self.story = Choice(tuple(plots), (1.0,) * len(plots))

    def tell(self, choose: Choose, bias: Bias | None = None) -> str:
        """Tell the story that `choose` makes."""
        return "".join(_tell((self.story,), {}, choose, bias or {}))

    def tales(self, n: int, seed: int, bias: Bias | None = None) -> list[str]:
        """Tell n stories; a seed tells the same stories on every machine."""
        bias = self._checked(bias)
        uniform = random.Random(seed).random

        def choose(weights: Sequence[float]) -> int:
            bounds = list(accumulate(weights))
            return bisect(bounds, uniform() * bounds[-1])

        return [self.tell(choose, bias) for _ in range(n)]

    def parse(self, story: str, bias: Bias | None = None) -> Tale:
        """Recover the choices that made a story. Raises ParseError if the text is no story."""
        words, trail = _find(self.story, story, self._checked(bias))
        choices, probs = zip(*trail, strict=True)
        plot = list(self.plots)[choices[0]]
        lists = {name: source for name, source in self.plots[plot].variables.items() if name in words}
        known = {name: self.lists[source][words[name]].get("pronoun") for name, source in lists.items()}
        pronouns = {name: words.get(f"{name}.pronoun", pronoun) for name, pronoun in known.items()}
        return Tale(
            plot=plot,
            parts=dict(zip(PARTS, story.split("\n"), strict=True)),
            words={name: words[name] for name in lists},
            lists=lists,
            pronouns={name: pronoun for name, pronoun in pronouns.items() if pronoun in PRONOUNS},
            choices=choices,
            log_prob=math.fsum(math.log(p) if p else -math.inf for p in probs),
        )

    def entropy_per_story(self, bias: Bias | None = None) -> float:
        """Sum the entropies of all choices, each times the probability that a story comes to it, in nats.

        The sum is exact: a text has one parse, and how many words are left to draw never depends on which.
        """
        return _entropy((self.story,), self._checked(bias))

    def _checked(self, bias: Bias | None) -> Bias:
        words = [item for words in self.lists.values() for item in words.items()]
        jobs = sorted({word for word, forms in words if forms.get("pronoun") == "she/he"})
        for name, p in (bias or {}).items():
            if name not in jobs or not 0 <= p <= 1:
                raise ValueError(f"bias gives {name!r} {p}; it can give probabilities to {', '.join(jobs)}")
        return bias or {}


def _left(draw: Draw, words: Mapping[str, str], bias: Bias) -> tuple[list[str], Sequence[float]]:
    """Return the words that are left to draw, and their weights."""
    if draw.owner:
        she = bias.get(words[draw.owner.variable], 0.5)
        return ["she", "he"], (she, 1 - she)
    taken = {words[rival] for rival in draw.rivals}
    left = [word for word in draw.forms if word not in taken]
    return left, (1.0,) * len(left)


def _tell(nodes: Nodes, words: dict[str, str], choose: Choose, bias: Bias) -> Iterator[str]:
    """Yield the pieces of a text, and leave the words drawn in `words` (variable → word)."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Choice):
            yield from _tell(node.options[choose(node.weights)], words, choose, bias)
        else:
            if isinstance(node, Draw):
                left, weights = _left(node, words, bias)
                words[node.variable] = left[choose(weights)]
            yield node.forms[words[node.variable]]


def _find(story: Choice, text: str, bias: Bias) -> tuple[dict[str, str], tuple]:
    """Return the words and the choices, each with its probability, of the one telling that fits the text.

    All tellings are followed as far as they fit: no option's text begins another's, so one at most comes far.
    """
    stuck = defaultdict(list)  # position → the nodes that did not fit there
    tellings = [(0, (story, ""), {}, ())]  # the last node, "", stands for the end of the text
    while tellings:
        start, (node, *rest), words, trail = tellings.pop()
        if isinstance(node, Choice):
            for i, (option, weight) in enumerate(zip(node.options, node.weights, strict=True)):
                step = (i, weight / sum(node.weights))
                tellings.append((start, (*option, *rest), words, (*trail, step)))
        elif isinstance(node, Draw):
            left, weights = _left(node, words, bias)
            forms = [node.forms[word] for word in left]
            fitting = [i for i, form in enumerate(forms) if text.startswith(form, start)]
            for i in fitting:
                step = (i, weights[i] / sum(weights))
                end = start + len(forms[i])
                tellings.append((end, rest, {**words, node.variable: left[i]}, (*trail, step)))
            if not fitting:
                stuck[start] += [node, *forms]
        else:
            piece = node if isinstance(node, str) else node.forms[words[node.variable]]
            if not text.startswith(piece, start) or (not rest and start < len(text)):
                stuck[start].append(node)
            elif rest:
                tellings.append((start + len(piece), rest, words, trail))
            else:
                return words, trail
    raise ParseError(text, max(stuck), stuck[max(stuck)])


def _entropy(nodes: Nodes, bias: Bias) -> float:
    total = 0.0
    for node in nodes:
        if isinstance(node, Choice):
            inner = (w * _entropy(option, bias) for w, option in zip(node.weights, node.options, strict=True))
            total += _h(node.weights) + sum(inner) / sum(node.weights)
        elif isinstance(node, Draw) and node.owner:
            jobs = node.owner.forms  # each of them is as likely as the others
            total += sum(_h(_left(node, {node.owner.variable: job}, bias)[1]) for job in jobs) / len(jobs)
        elif isinstance(node, Draw):
            total += math.log(len(node.forms) - len(node.rivals))
    return total


def _h(weights: Sequence[float]) -> float:
    """Return the entropy of a choice, in nats."""
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w)


# ------------------------------------------------------------------------------ reading the grammar

Lists = dict[str, dict[str, dict[str, str]]]  # list → word → form ("" itself, "s", "their", a column) → text
PIECE = re.compile(
    r"\{(?:[aA] )?\w+(?:\.\w+)?\}"  # a mention: {hero}, {A thing}, {hero.their}
    r"|<\w+(?: \w+)*>"  # a call of a rule: <meet hero>
    r"|(?<=[\[|])\*[1-9]\d* "  # the weight of a wording: *3
    r"|[^][|{}<>*]+|."  # plain text, or a mark
)


class Text(NamedTuple):
    """Hold a line of a grammar file, or a piece of one, and where it stands ("file:line: rule NAME")."""

    text: str
    where: str


class Rule(NamedTuple):
    """Hold a rule with its parameters, or a plot with its variables (variable → list).

    The body is one text, cut into pieces, in which each sentence is a choice: "[One day|Once] [he|she] …".
    """

    parameters: list[str]
    variables: dict[str, str]
    body: list[Text]


def _fail(where: str, problem: str) -> NoReturn:
    raise ValueError(f"{where}: {problem}")


def _read(files: Mapping[str, str]) -> tuple[Lists, dict[str, Rule], dict[str, Rule]]:
    """Return the lists, the rules and the plots."""
    lists, rules, plots = {}, {}, {}
    for head, *lines in _blocks(files):
        kind, name, *rest = head.text.split()
        book = {"list": lists, "rule": rules, "plot": plots}[kind]
        if name in book:
            _fail(head.where, "there is another one before")
        if kind != "list":
            book[name] = _read_rule(head, lines)
        elif "=" not in rest:
            book[name] = _read_list(head.text, lines)
        elif unknown := [part for part in rest[1::2] if part not in lists]:
            _fail(head.where, f"there is no list {unknown[0]!r} before")
        else:
            book[name] = {word: forms for part in rest[1::2] for word, forms in lists[part].items()}
    return lists, rules, plots


def _blocks(files: Mapping[str, str]) -> list[list[Text]]:
    """Cut the files into lists, rules and plots. An indented line continues the one before."""
    blocks = []
    for file, lines in files.items():
        title = None
        for number, line in enumerate(lines.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            if head := re.match(r"(list|rule|plot) \w+", line):
                title = head[0]
                blocks.append([])
            where = f"{file}:{number}: {title}"
            if not title:
                _fail(where, f"{line!r} stands before the first list, rule or plot")
            if line.startswith(" "):
                start, where = blocks[-1].pop()
                line = f"{start} {line.strip()}"
            blocks[-1].append(Text(line.rstrip(), where))
    return blocks


def _read_list(head: str, lines: list[Text]) -> dict[str, dict[str, str]]:
    """Read words with commas between them or, if the head names columns, a table with one word a line."""
    title, *columns = re.split(r"\s*\|\s*", head)
    pronoun = {"pronoun": title.split()[2]} if title.count(" ") > 1 else {}
    words = {}
    for line in lines:
        for cells in [line.text.split("|")] if columns else [[word] for word in line.text.split(",")]:
            named = zip(["", *columns], map(str.strip, cells), strict=False)
            row = pronoun | {column: cell for column, cell in named if cell}
            word = row.get("") or _fail(line.where, f"a word is missing in {line.text!r}")
            stem = re.sub("(?<=[^aeiou])y$", "ie", word)
            plural = stem + ("es" if re.search("(s|x|ch|sh)$", stem) else "s")
            words[word] = {"s": plural} | PRONOUNS.get(row.get("pronoun", ""), {}) | row
    return words


def _read_rule(head: Text, lines: list[Text]) -> Rule:
    kind, _, *parameters = head.text.split()
    variables, body, parts = {}, [], []
    part = gap = ""  # the gap stands before the next sentence
    for text, where in lines:
        mark, _, wording = text.partition(" ")
        if kind == "plot" and text in PARTS:
            part, gap = text, "\n" if body else ""
        elif kind == "plot" and mark.endswith(":"):
            variables[mark[:-1]] = wording
        elif mark == "-":
            parts += [part] * (gap != " ")
            body += [Text(gap, where), *_pieces("[", wording, where)]
            gap = " "
        elif mark == "|" and gap == " ":
            body[-1:] = _pieces("|", wording, where)
        else:
            _fail(where, f"can't read {text!r}")
    if kind == "plot" and tuple(parts) != PARTS:
        _fail(head.where, f"its parts must be {', '.join(PARTS)}; those with a text are {', '.join(parts)}")
    return Rule(parameters, variables, body)


def _pieces(mark: str, wording: str, where: str) -> list[Text]:
    """Cut a wording into pieces, from the mark before it to the bracket that closes the sentence."""
    pieces = PIECE.findall(f"{mark}{wording}]")
    marks = "".join(piece for piece in pieces[1:-1] if piece in "[]|{}<>*")
    for _ in marks:
        marks = re.sub(r"\[\|*\]", "", marks)  # brackets that are closed
    if marks:
        _fail(where, f"can't read {marks[0]!r} in {wording!r}")
    return [Text(piece, where) for piece in pieces]


class _Compiler:
    """Turn a plot into nodes.

    `names` maps the parameters of a rule to variables of the plot. `scope` maps each variable mentioned so
    far to its draw, or to None if only some tellings have drawn it.
    """

    def __init__(self, lists: Lists, rules: dict[str, Rule], plot: Rule) -> None:
        self.lists, self.rules, self.variables = lists, dict(rules), plot.variables
        self.nodes, *_ = self._wording(iter(plot.body), {}, {})

    def _wording(self, pieces: Iterator[Text], names: dict, scope: dict) -> tuple[Nodes, float, Text | None]:
        """Compile up to the mark that ends the wording; return the nodes, the weight and the mark."""
        nodes, weight = [], 1.0
        for piece in pieces:
            if piece.text in ("|", "]"):
                return tuple(nodes), weight, piece
            if piece.text == "[":
                nodes += self._choice(piece, pieces, names, scope)
            elif piece.text.startswith("*"):
                weight = float(piece.text[1:])
            elif piece.text.startswith("<"):
                nodes += self._call(piece, names, scope)
            elif piece.text.startswith("{"):
                nodes.append(self._mention(piece, names, scope))
            else:
                nodes.append(piece.text)
        return tuple(nodes), weight, None

    def _choice(self, mark: Text, pieces: Iterator[Text], names: dict, scope: dict) -> Nodes:
        options, weights, wheres, branches = [], [], [], []
        while mark.text != "]":
            wheres.append(mark.where)
            branches.append(dict(scope))
            option, weight, mark = self._wording(pieces, names, branches[-1])
            options.append(option)
            weights.append(weight)
        _check_apart(options, wheres)
        for name in [name for branch in branches for name in branch]:
            scope[name] = branches[0][name] if all(branch.get(name) for branch in branches) else None
        return (Choice(tuple(options), tuple(weights)),) if len(options) > 1 else options[0]

    def _call(self, piece: Text, names: dict, scope: dict) -> Nodes:
        name, *arguments = piece.text[1:-1].split()
        rule = self.rules.pop(name, None)  # until the call is done, so that no rule can call itself
        if not rule or len(rule.parameters) != len(arguments):
            _fail(
                piece.where, f"no other rule {name!r} has {len(arguments)} parameters, as {piece.text} needs"
            )
        bound = dict(zip(rule.parameters, (names.get(a, a) for a in arguments), strict=True))
        nodes, *_ = self._wording(iter(rule.body), bound, scope)
        self.rules[name] = rule
        return nodes

    def _mention(self, piece: Text, names: dict, scope: dict) -> Mention:
        article, name, form = re.fullmatch(r"\{(?:([aA]) )?(\w+)(?:\.(\w+))?\}", piece.text).groups("")
        variable = name[0].lower() + name[1:]
        variable = names.get(variable, variable)
        source = self.variables.setdefault(variable, variable)
        words = self.lists.get(source) or _fail(
            piece.where, f"{piece.text}: there is no list {source!r}, or it is empty"
        )
        drawn = form in PRONOUN_FORMS and any(forms.get("pronoun") == "she/he" for forms in words.values())
        owner = scope.get(variable) if drawn else None
        if owner:
            variable, words = f"{variable}.pronoun", PRONOUNS
        if not all(form in forms for forms in words.values()):
            _fail(piece.where, f"{piece.text}: a word of list {source!r} has no {form!r}")
        capital = (article or name)[0].isupper()
        shown = {word: _show(forms[form], article, capital) for word, forms in words.items()}
        if variable not in scope:
            scope[variable] = self._draw(piece, variable, shown, owner, scope)
            return scope[variable]
        if not scope[variable]:
            _fail(piece.where, f"{piece.text}: only some tellings have mentioned {variable!r} before")
        return Mention(variable, shown)

    def _draw(self, piece: Text, variable: str, shown: dict, owner: Draw | None, scope: dict) -> Draw:
        source = self.variables.get(variable, "")
        rivals = tuple(other for other in scope if self.variables.get(other) == source and scope[other])
        for other in scope:
            if other not in rivals and shown.keys() & self.lists.get(self.variables.get(other, ""), ()):
                _fail(piece.where, f"{piece.text}: {variable!r} could be the same word as {other!r}")
        for a, b in pairwise(sorted(shown.values())):
            if b.startswith(a):
                _fail(piece.where, f"a first mention {piece.text} can't tell {a!r} from {b!r}")
        return Draw(variable, shown, rivals, owner)


@cache
def _show(text: str, article: str, capital: bool) -> str:
    text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}" if article else text
    return text[0].upper() + text[1:] if capital else text


def _check_apart(options: Sequence[Nodes], wheres: Sequence[str]) -> None:
    for (a, where), (b, other) in combinations(zip(options, wheres, strict=True), 2):
        if _overlap(a, b):
            _fail(other, f"this wording can't be told apart from the one at {where}")


def _overlap(a: Nodes, b: Nodes) -> bool:
    """Tell whether a text of `a` may begin a text of `b`, or the other way round: a parse could go wrong.

    Careful rather than exact: words are compared as if each mention were drawn anew.
    """
    while a and b:
        x, y = a[0], b[0]
        if x == y:
            a, b = a[1:], b[1:]
        elif not isinstance(x, str):
            starts = x.options if isinstance(x, Choice) else {(form,) for form in x.forms.values()}
            if isinstance(y, str):
                starts = [s for s in starts if not isinstance(s[0], str) or s[0][: len(y)] == y[: len(s[0])]]
            return any(_overlap((*start, *a[1:]), b) for start in starts)
        elif not isinstance(y, str):
            a, b = b, a
        elif x.startswith(y) or y.startswith(x):
            n = min(len(x), len(y))
            a, b = (*filter(None, [x[n:]]), *a[1:]), (*filter(None, [y[n:]]), *b[1:])
        else:
            return False
    return True


@cache
def grammar() -> Grammar:
    """Read the grammar of the course, in `data/tales`."""
    files = sorted((Path(__file__).parents[1] / "data" / "tales").glob("*.txt"))
    return Grammar({file.name: file.read_text(encoding="utf-8") for file in files})


def tales(n: int, seed: int, bias: Bias | None = None) -> list[str]:
    """Tell n stories of five lines each, without an end token; see `Grammar`."""
    return grammar().tales(n, seed, bias)


def parse(story: str, bias: Bias | None = None) -> Tale:
    """Recover the choices that made a story; see `Grammar.parse`."""
    return grammar().parse(story, bias)


def entropy_per_story(bias: Bias | None = None) -> float:
    """Return the entropy of a story in nats: the lowest expected loss that a model can reach."""
    return grammar().entropy_per_story(bias)


def categories() -> dict[str, tuple[str, ...]]:
    """Return the words of each list of the grammar: animal, food, place, …"""
    return {name: tuple(words) for name, words in grammar().lists.items()}
