"""Tell short stories in simple words by a hand-written grammar whose entropy is known exactly."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

PARTS = ("beginning", "wish", "trouble", "turn", "end")
PRONOUN_FORMS = ("they", "them", "their", "theirs", "themself", "child", "adult")
PRONOUNS = {
    "she": ("she", "her", "her", "hers", "herself", "girl", "woman"),
    "he": ("he", "him", "his", "his", "himself", "boy", "man"),
}

# ------------------------------------------------------------------------------ what a story is made of


@dataclass(frozen=True)
class Choice:
    """Go on with one of the options, drawn in proportion to the weights."""

    options: tuple[Nodes, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Draw:
    """Mention a variable for the first time: draw one of its words, but none that a rival holds.

    Where a word leaves its pronoun open, the pronoun is drawn too; `owner` then drew the word it stands for.
    """

    variable: str
    forms: dict[str, str]  # word → how it stands in the text
    rivals: tuple[str, ...] = ()
    owner: Draw | None = None


@dataclass(frozen=True)
class Recall:
    """Mention a variable again."""

    variable: str
    forms: dict[str, str]


Node = str | Choice | Draw | Recall
Nodes = tuple[Node, ...]
Bias = Mapping[str, float]
Choose = Callable[[Sequence[float]], int]


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

    def __init__(self, text: str, end: int, variable: str | None = None) -> None:
        problem = f"this is the wrong word for {variable!r}" if variable else "no story goes on like this"
        super().__init__(f"{problem}: {text[end : end + 30]!r}, after {text[max(0, end - 40) : end]!r}")
        self.prefix, self.variable = text[:end], variable


# ------------------------------------------------------------------------------ telling, parsing, counting


class Grammar:
    """Tell and parse stories by the rules in `files` (name → text), and measure their entropy.

    A story has five lines: its beginning, wish, trouble, turn and end. A `bias` gives the probability that
    whoever does a job is a "she" ({"nurse": 0.9}); it is 0.5 for every job that is not named.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        reader = _Reader(files)
        plots = {name: reader.compile_plot(plot) for name, plot in reader.plots.items()}
        for a, b in combinations(plots, 2):
            if _overlap(plots[a], plots[b]):
                raise reader.plots[b].error(f"it can't be told apart from plot {a}")
        self.lists, self.plots = reader.lists, reader.plots
        words = [word for words in self.lists.values() for word in words.values()]
        self.jobs = {word.text for word in words if word.pronoun == "she/he"}
        self.story = Choice(tuple(plots.values()), (1.0,) * len(plots))

    @classmethod
    def read(cls, folder: Path) -> Grammar:
        """Read the grammar from the `.txt` files of a folder."""
        return cls({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))})

    def tell(self, choose: Choose, bias: Bias | None = None) -> str:
        """Tell the story in which `choose(weights)` gives the index of the option taken at each choice."""
        return "".join(_tell((self.story,), {}, choose, bias or {}))

    def tales(self, n: int, seed: int, bias: Bias | None = None) -> list[str]:
        """Tell n stories; a seed tells the same stories on every machine."""
        self._check(bias)
        uniform = random.Random(seed).random

        def choose(weights: Sequence[float]) -> int:
            point = uniform() * sum(weights)
            for i, weight in enumerate(weights):
                point -= weight
                if point < 0:
                    return i
            return len(weights) - 1

        return [self.tell(choose, bias) for _ in range(n)]

    def parse(self, story: str, bias: Bias | None = None) -> Tale:
        """Recover the choices that made a story. Raises ParseError if the text is no story."""
        self._check(bias)
        parser = _Parser(story, bias or {})
        end = parser.match((self.story,), 0)
        if end != len(story):
            raise parser.error() if end is None else ParseError(story, end)
        choices, probs = zip(*parser.trail, strict=True)
        plot = list(self.plots)[choices[0]]
        lists = {name: self.plots[plot].variables[name] for name in parser.words if "." not in name}
        words = {name: parser.words[name] for name in lists}
        known = {name: self.lists[lists[name]][word].pronoun for name, word in words.items()}
        pronouns = {name: parser.words.get(f"{name}.pronoun", known[name]) for name in words}
        return Tale(
            plot=plot,
            parts=dict(zip(PARTS, story.split("\n"), strict=True)),
            words=words,
            lists=lists,
            pronouns={name: pronoun for name, pronoun in pronouns.items() if pronoun in PRONOUNS},
            choices=choices,
            log_prob=math.fsum(math.log(p) if p else -math.inf for p in probs),
        )

    def entropy_per_story(self, bias: Bias | None = None) -> float:
        """Sum the entropies of all choices, each times the probability that a story comes to it, in nats.

        The sum is exact: a text has one parse, and how many words are left to draw never depends on which.
        """
        self._check(bias)
        return _entropy((self.story,), bias or {})

    def n_stories(self) -> int:
        """Count the distinct stories."""
        return _count((self.story,))

    def categories(self) -> dict[str, tuple[str, ...]]:
        """Return the words of each list."""
        return {name: tuple(words) for name, words in self.lists.items()}

    def _check(self, bias: Bias | None) -> None:
        for name, p in (bias or {}).items():
            if name not in self.jobs:
                jobs = ", ".join(sorted(self.jobs))
                raise ValueError(f"bias names {name!r}, which is in no list marked she/he: {jobs}")
            if not 0 <= p <= 1:
                raise ValueError(f"bias gives {name!r} the probability {p}; it must lie between 0 and 1")


def _left(draw: Draw, words: Mapping[str, str], bias: Bias) -> tuple[list[str], Sequence[float]]:
    """Return the words that are left to draw, and their weights."""
    if draw.owner:
        she = bias.get(words[draw.owner.variable], 0.5)
        return ["she", "he"], (she, 1 - she)
    taken = {words[rival] for rival in draw.rivals}
    left = [word for word in draw.forms if word not in taken]
    return left, (1.0,) * len(left)


def _tell(nodes: Nodes, words: dict[str, str], choose: Choose, bias: Bias) -> Iterator[str]:
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


class _Parser:
    """Match a text from left to right: no option's text begins another's, so the first that fits is right."""

    def __init__(self, text: str, bias: Bias) -> None:
        self.text, self.bias = text, bias
        self.words: dict[str, str] = {}
        self.trail: list[tuple[int, float]] = []  # each choice and its probability
        self.furthest = 0
        self.stuck: list[Node] = []  # what did not fit there

    def match(self, nodes: Nodes, start: int) -> int | None:
        """Return where the text of the nodes ends, if it begins at `start`, or None."""
        for node in nodes:
            if isinstance(node, Choice):
                end = self._choice(node, start)
            elif isinstance(node, Draw):
                end = self._draw(node, start)
            else:
                text = node if isinstance(node, str) else node.forms[self.words[node.variable]]
                end = start + len(text) if self.text.startswith(text, start) else None
            if end is None:
                if start > self.furthest:
                    self.furthest, self.stuck = start, []
                if start == self.furthest:
                    self.stuck.append(node)
                return None
            start = end
        return start

    def _choice(self, node: Choice, start: int) -> int | None:
        words, n_before = dict(self.words), len(self.trail)
        for i, option in enumerate(node.options):
            self.trail.append((i, node.weights[i] / sum(node.weights)))
            end = self.match(option, start)
            if end is not None:
                return end
            self.words = dict(words)
            del self.trail[n_before:]
        return None

    def _draw(self, node: Draw, start: int) -> int | None:
        left, weights = _left(node, self.words, self.bias)
        for i, word in enumerate(left):
            if self.text.startswith(node.forms[word], start):
                self.trail.append((i, weights[i] / sum(weights)))
                self.words[node.variable] = word
                return start + len(node.forms[word])
        return None

    def error(self) -> ParseError:
        """Name the furthest point that the match came to, and the variable that is mixed up there."""
        rest = self.text[self.furthest :]
        for node in self.stuck:
            forms = node.forms.values() if isinstance(node, Recall) else ()
            if any(re.match(rf"{re.escape(form)}\b", rest) for form in forms):
                return ParseError(self.text, self.furthest, node.variable)
        shared = max((_n_shared(node, rest) for node in self.stuck if isinstance(node, str)), default=0)
        return ParseError(self.text, self.furthest + shared)


def _n_shared(a: str, b: str) -> int:
    """Count the characters that two texts share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


def _count(nodes: Nodes) -> int:
    choices = (node for node in nodes if isinstance(node, Choice))
    draws = (node for node in nodes if isinstance(node, Draw))
    n_texts = math.prod(sum(map(_count, choice.options)) for choice in choices)
    return n_texts * math.prod(len(draw.forms) - len(draw.rivals) for draw in draws)


# ------------------------------------------------------------------------------ reading the grammar


@dataclass(frozen=True)
class Word:
    """Hold a word of a list, its pronoun ("she", "he", "she/he" if drawn, or "") and its row of the table."""

    text: str
    pronoun: str
    row: dict[str, str]

    def form(self, name: str) -> str:
        """Return the word (""), its plural ("s"), a form of its pronoun ("their") or a cell of its row."""
        if name in PRONOUN_FORMS and self.pronoun in PRONOUNS:
            return PRONOUNS[self.pronoun][PRONOUN_FORMS.index(name)]
        if name == "s":
            stem = re.sub("(?<=[^aeiou])y$", "ie", self.text)
            return stem + ("es" if re.search("(s|x|ch|sh)$", stem) else "s")
        return self.row[name] if name else self.text

    def show(self, article: str, name: str, capital: bool) -> str:
        """Return a form with its article, if it has one, and with a capital, if it needs one."""
        text = self.form(name)
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}" if article else text
        return text[0].upper() + text[1:] if capital else text


class Line(NamedTuple):
    """Hold a line of a grammar file, and where it stands ("file:line")."""

    text: str
    where: str


@dataclass(frozen=True)
class Rule:
    """Hold a rule or a plot: `slots[part]` lists the sentences of a part, each as a list of wordings."""

    title: str
    where: str
    parameters: list[str] = field(default_factory=list)
    slots: dict[str, list[list[Line]]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a plot: variable → list

    def error(self, problem: str, where: str = "") -> ValueError:
        """Return the error that names file, line and rule."""
        return ValueError(f"{where or self.where}: {self.title}: {problem}")


@dataclass
class Scope:
    """Follow which variables every telling has drawn by now, and which only some tellings have."""

    plot: Rule
    drawn: dict[str, Draw] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)


class _Reader:
    """Read the lists, rules and plots of the grammar files, and compile plots into nodes."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.lists: dict[str, dict[str, Word]] = {}
        self.rules: dict[str, Rule] = {}
        self.plots: dict[str, Rule] = {}
        self.forms: dict[tuple, dict[str, str]] = {}  # what mentions of a list show: made once
        self.open: list[Rule] = []  # the rules that are being compiled, each called by the one before
        blocks = [block for name, text in files.items() for block in _blocks(name, text)]
        for read, pattern in (
            (self._list, "list [^=]*"),
            (self._union, "list .*=.*"),
            (self._rule, "(rule|plot) .*"),
        ):
            for head, body in blocks:
                if re.fullmatch(pattern, head.text):
                    read(head, body)

    def _list(self, head: Line, body: list[Line]) -> None:
        title, *columns = re.split(r"\s*\|\s*", head.text)
        name, pronoun = f"{title} ".split(" ")[1:3]
        words = self.lists[name] = {}
        for line in body:
            cells = [line.text.split("|")] if columns else [[text] for text in line.text.split(",")]
            for text, *row in ([cell.strip() for cell in row] for row in cells):
                if not text or text in words:
                    raise ValueError(
                        f"{line.where}: list {name}: the word {text!r} is empty or stands there twice"
                    )
                row = {column: cell for column, cell in zip(columns, row, strict=False) if cell}
                words[text] = Word(text, row.get("pronoun", pronoun), row)
        if not words:
            raise ValueError(f"{head.where}: list {name}: it has no words")

    def _union(self, head: Line, body: list[Line]) -> None:
        name, *parts = re.split(r"\s*[=+]\s*", head.text.removeprefix("list "))
        for part in parts:
            if part not in self.lists:
                raise ValueError(f"{head.where}: list {name}: there is no list {part!r}")
        self.lists[name] = {text: word for part in parts for text, word in self.lists[part].items()}

    def _rule(self, head: Line, body: list[Line]) -> None:
        kind, name, *parameters = head.text.split()
        rule = Rule(f"{kind} {name}", head.where, parameters)
        rules = self.rules if kind == "rule" else self.plots
        if name in rules:
            raise rule.error(f"there is another one at {rules[name].where}")
        rules[name] = rule
        slots = rule.slots.setdefault("rule", []) if kind == "rule" else []
        for line in body:
            declaration = re.fullmatch(r"(\w+): (\w+)", line.text)
            if kind == "plot" and line.text in PARTS:
                slots = rule.slots.setdefault(line.text, [])
            elif kind == "plot" and declaration:
                rule.variables[declaration[1]] = declaration[2]
            elif line.text.startswith("- ") and rule.slots:
                slots.append([Line(line.text[2:], line.where)])
            elif line.text.startswith("| ") and slots:
                slots[-1].append(Line(line.text[2:], line.where))
            else:
                raise rule.error(f"can't read {line.text!r}", line.where)

    def compile_plot(self, plot: Rule) -> Nodes:
        """Turn a plot into nodes: the sentences of a part joined by spaces, the parts by line ends."""
        if tuple(plot.slots) != PARTS:
            raise plot.error(
                f"its parts must be {', '.join(PARTS)}, and they are {', '.join(plot.slots) or 'none'}"
            )
        scope = Scope(plot)
        nodes: list[Node] = []
        for part in PARTS:
            nodes += ["\n"] * bool(nodes) + self._sentences(plot, part, scope, {})
        for variable in plot.variables:
            if variable not in scope.drawn and variable not in scope.unsure:
                raise plot.error(f"the variable {variable!r} is never mentioned")
        return _joined(nodes)

    def _sentences(self, rule: Rule, part: str, scope: Scope, names: dict[str, str]) -> list[Node]:
        if not rule.slots[part]:
            raise rule.error(f"the {part} is empty")
        nodes: list[Node] = []
        for slot in rule.slots[part]:
            options = [(_tree(rule, line), line.where) for line in slot]
            nodes += [" "] * bool(nodes) + self._choice(rule, options, scope, names)
        return nodes

    def _choice(self, rule: Rule, options: list[tuple[list, str]], scope: Scope, names: dict) -> list[Node]:
        compiled: list[Nodes] = []
        weights: list[float] = []
        scopes: list[Scope] = []
        for tree, where in options:
            starred = re.match(r"\*(\S*) *", tree[0]) if tree and isinstance(tree[0], str) else None
            if starred and not re.fullmatch("[1-9][0-9]*", starred[1]):
                raise rule.error(f"the weight {starred[1]!r} is not a whole number above 0", where)
            tree = [*filter(None, [tree[0][starred.end() :]]), *tree[1:]] if starred else tree
            if not tree:
                raise rule.error("a wording is empty", where)
            scopes.append(Scope(scope.plot, dict(scope.drawn), set(scope.unsure)))
            compiled.append(self._text(rule, tree, where, scopes[-1], names))
            weights.append(float(starred[1]) if starred else 1.0)
        for (i, a), (j, b) in combinations(enumerate(compiled), 2):
            if _overlap(a, b):
                raise rule.error(
                    f"wordings {i + 1} and {j + 1} of a choice can't be told apart", options[j][1]
                )
        drawn = set.intersection(*(set(branch.drawn) for branch in scopes))
        scope.unsure = set().union(*(branch.unsure | (set(branch.drawn) - drawn) for branch in scopes))
        scope.drawn = {name: draw for name, draw in scopes[0].drawn.items() if name in drawn}
        return [Choice(tuple(compiled), tuple(weights))] if len(options) > 1 else list(compiled[0])

    def _text(self, rule: Rule, tree: list, where: str, scope: Scope, names: dict[str, str]) -> Nodes:
        nodes: list[Node] = []
        for piece in tree:
            if isinstance(piece, list):
                nodes += self._choice(rule, [(option, where) for option in piece], scope, names)
            elif piece[0] == "<":
                nodes += self._call(rule, Line(piece[1:-1], where), scope, names)
            elif piece[0] == "{":
                nodes.append(self._mention(rule, Line(piece[1:-1], where), scope, names))
            else:
                nodes.append(piece)
        return _joined(nodes)

    def _call(self, rule: Rule, call: Line, scope: Scope, names: dict[str, str]) -> list[Node]:
        name, *arguments = call.text.split() or [""]
        called = self.rules.get(name)
        if not called:
            raise rule.error(f"there is no rule <{name}>", call.where)
        if len(arguments) != len(called.parameters):
            n = len(called.parameters)
            raise rule.error(f"<{call.text}> names {len(arguments)} variables, not {n}", call.where)
        if called in self.open:
            raise rule.error(f"<{name}> ends up in itself", call.where)
        bound = dict(zip(called.parameters, (names.get(a, a) for a in arguments), strict=True))
        self.open.append(called)
        nodes = self._sentences(called, "rule", scope, bound)
        self.open.pop()
        return nodes

    def _mention(self, rule: Rule, line: Line, scope: Scope, names: dict[str, str]) -> Draw | Recall:
        mention = re.fullmatch(r"(?:([aA]) )?(\w+)(?:\.(\w+))?", line.text)
        article, name, form = mention.groups("") if mention else ("", line.text, "")
        capital = (article or name)[:1].isupper()
        variable = name[:1].lower() + name[1:]
        variable = names.get(variable, variable)
        source = scope.plot.variables.setdefault(variable, variable)
        words = self.lists.get(source)
        if not words:
            raise rule.error(f"{{{line.text}}}: there is no list {source!r}", line.where)

        shown = article, form, capital
        try:
            drawn_pronoun = form in PRONOUN_FORMS and "she/he" in {word.pronoun for word in words.values()}
            if drawn_pronoun and variable in scope.drawn:
                forms = {p: Word("", p, {}).show(*shown) for p in PRONOUNS}
                draw = Draw(f"{variable}.pronoun", forms, owner=scope.drawn[variable])
            else:
                if (source, shown) not in self.forms:
                    self.forms[source, shown] = {text: word.show(*shown) for text, word in words.items()}
                rivals = tuple(other for other in scope.drawn if scope.plot.variables.get(other) == source)
                draw = Draw(variable, self.forms[source, shown], rivals)
        except KeyError as missing:
            problem = f"{{{line.text}}}: a word of list {source!r} has no {missing}"
            raise rule.error(problem, line.where) from None
        if draw.variable in scope.drawn:
            return Recall(draw.variable, draw.forms)
        self._check_draw(rule, draw, line, scope)
        scope.drawn[draw.variable] = draw
        return draw

    def _check_draw(self, rule: Rule, draw: Draw, line: Line, scope: Scope) -> None:
        if draw.variable in scope.unsure:
            raise rule.error(f"only some tellings have named {draw.variable!r} before", line.where)
        for other in {*scope.drawn, *scope.unsure} - set(draw.rivals):
            if not draw.owner and set(draw.forms) & set(self.lists.get(scope.plot.variables.get(other), ())):
                raise rule.error(f"{draw.variable!r} could be the same word as {other!r}", line.where)
        for a, b in pairwise(sorted(draw.forms.values())):
            if b.startswith(a):
                raise rule.error(f"a first mention {{{line.text}}} can't tell {a!r} from {b!r}", line.where)


def _blocks(name: str, text: str) -> Iterator[tuple[Line, list[Line]]]:
    """Cut a file where a list, a rule or a plot begins. An indented line continues the one before."""
    block: list[Line] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = Line(raw.strip(), f"{name}:{number}")
        if not line.text or line.text.startswith("#"):
            continue
        if re.match("(list|rule|plot) ", raw):
            if block:
                yield block[0], block[1:]
            block = [line]
        elif not block:
            raise ValueError(f"{line.where}: {line.text!r} stands before the first list, rule or plot")
        elif raw.startswith(" "):
            block[-1] = Line(f"{block[-1].text} {line.text}", block[-1].where)
        else:
            block.append(line)
    if block:
        yield block[0], block[1:]


def _tree(rule: Rule, line: Line) -> list:
    """Nest a text: [a|b] becomes a list of options, and an option is a list of pieces."""
    levels: list[list[list]] = [[[]]]  # the options of each open bracket
    for piece in re.findall(r"\{[^{}]*\}|<[^<>]*>|[^][|{}<>]+|.", line.text):
        if piece == "[":
            levels.append([[]])
        elif piece == "|" and len(levels) > 1:
            levels[-1].append([])
        elif piece == "]" and len(levels) > 1:
            options = levels.pop()
            levels[-1][-1].append(options)
        elif piece in "[]|{}<>":
            raise rule.error(f"{piece!r} has no partner in {line.text!r}", line.where)
        else:
            levels[-1][-1].append(piece)
    if len(levels) > 1:
        raise rule.error(f"'[' has no partner in {line.text!r}", line.where)
    return levels[0][0]


def _joined(nodes: Iterable[Node]) -> Nodes:
    """Join neighboring pieces of plain text."""
    joined: list[Node] = []
    for node in nodes:
        if joined and isinstance(node, str) and isinstance(joined[-1], str):
            joined[-1] += node
        else:
            joined.append(node)
    return tuple(joined)


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


# ------------------------------------------------------------------------------ the course's own grammar


@cache
def grammar() -> Grammar:
    """Read the grammar of the course, in `data/tales`."""
    return Grammar.read(Path(__file__).parents[1] / "data" / "tales")


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
    return grammar().categories()
