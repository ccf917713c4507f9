"""Draw the pictures of chapter 05: words in context, query, key and value, many heads, self and cross."""

from images.draw import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PALE_VERMILION,
    PURPLE,
    VERMILION,
    Drawing,
)

QUERY, KEY, VALUE = (BLUE, PALE_BLUE), (VERMILION, PALE_VERMILION), (GREEN, PALE_GREEN)
PLAIN, MIXED = (GREY, PALE_GREY), (PURPLE, PALE_PURPLE)
SENTENCE = ["Le", "chat", "dort", "car", "il", "est", "fatigué"]


def box(d: Drawing, x: float, y: float, w: float, h: float, label, colours: tuple[str, str], **text) -> None:
    stroke, fill = colours
    d.box(x, y, w, h, label, fill=fill, stroke=stroke, **text)


def path() -> Drawing:
    d = Drawing(800, 330, "From tokens to queries, keys and values, to scores, to weights, to a weighted sum")
    box(d, 20, 140, 92, 50, "tokens x\n(T, C)", PLAIN, size=13)
    rows = [("queries", QUERY, 40), ("keys", KEY, 140), ("values", VALUE, 240)]
    for name, colours, y in rows:
        d.arrow(114, 165, 166, y + 25, stroke=colours[0])
        box(d, 170, y, 96, 50, f"{name}\n(T, D)", colours, size=13)
    steps = [
        ("scores", "every query\nmeets every key", 320),
        ("mask", "the future\nbecomes −∞", 444),
        ("weights", "softmax: each\nrow sums to 1", 568),
    ]
    d.arrow(268, 65, 316, 98, stroke=BLUE)
    d.arrow(268, 165, 316, 132, stroke=VERMILION)
    for name, note, x in steps:
        box(d, x, 90, 88, 50, f"{name}\n(T, T)", PLAIN, size=13)
        d.text(x + 44, 62, note, size=12, fill=GREY)
    d.arrow(410, 115, 440, 115)
    d.arrow(534, 115, 564, 115)
    d.arrow(612, 142, 612, 236)
    d.arrow(268, 265, 560, 265, stroke=GREEN)
    box(d, 564, 240, 96, 50, "weighted\nsum (T, D)", VALUE, size=13)
    d.arrow(662, 265, 690, 265)
    box(d, 694, 240, 90, 50, "new tokens\n(T, C)", PLAIN, size=13)
    notes = ("what a token asks for", "what a token offers", "what a token hands over")
    for note, (_, colours, y) in zip(notes, rows, strict=True):
        d.text(218, y + 64, note, size=12, fill=colours[0])
    return d


def arc(d: Drawing, x1: float, x2: float, y: float, height: float, stroke: str, width: float) -> None:
    d.path(f"M {x1} {y} C {x1} {y - height}, {x2} {y - height}, {x2} {y}", stroke=stroke, width=width)


def il() -> Drawing:
    d = Drawing(
        760, 300, "The word il looks back at chat; the word souris takes its meaning from its neighbours"
    )
    w, left = 92, 60
    xs = [left + w * i + w / 2 for i in range(len(SENTENCE))]
    for i, (x, word) in enumerate(zip(xs, SENTENCE, strict=True)):
        colours = QUERY if word == "il" else KEY if word == "chat" else PLAIN
        box(d, x - 40, 100, 80, 34, word, colours, size=15)
        if i < 4 and word != "chat":
            arc(d, xs[4], x, 98, 44 + 12 * (4 - i), LIGHT, 1.5)
    arc(d, xs[4], xs[1], 98, 96, BLUE, 5)
    d.text(xs[4], 152, "who is il?", size=14, fill=BLUE, italic=True)
    d.text(xs[1], 152, "a masculine noun", size=14, fill=VERMILION, italic=True)
    rows = [
        ("la souris mange le fromage", "the animal", 20),
        ("la souris du clavier est sans fil", "the device", 400),
    ]
    for text, meaning, x in rows:
        d.text(x + 10, 200, text, size=15, anchor="start")
        d.text(x + 10, 234, meaning, size=14, anchor="start", fill=PURPLE, weight="bold")
    d.text(380, 276, "A word alone does not say what it means. The words around it do.", size=13, fill=GREY)
    d.line(380, 180, 380, 250, stroke=LIGHT)
    return d


def bottleneck() -> Drawing:
    d = Drawing(
        800,
        330,
        "Left: an encoder squeezes a sentence into one state. Right: the decoder looks back at every state",
    )
    words = ["le", "chat", "dort"]
    for left, title, open_view in (
        (20, "one state carries everything", False),
        (420, "attention: look back", True),
    ):
        d.text(left + 175, 24, title, size=15, weight="bold")
        for i, word in enumerate(words):
            x = left + 20 + 70 * i
            box(d, x, 244, 56, 30, word, PLAIN, size=14)
            d.arrow(x + 28, 242, x + 28, 212)
            box(d, x, 176, 56, 34, f"h{'₁₂₃'[i]}", KEY if open_view else PLAIN, size=14)
            if i < 2:
                d.arrow(x + 57, 193, x + 69, 193, head=6)
        if open_view:
            for i in range(3):
                d.line(left + 48 + 70 * i, 174, left + 300, 112, stroke=VERMILION, width=(1.5, 5, 2)[i])
            d.text(left + 90, 118, "weights", size=13, fill=VERMILION)
        else:
            d.arrow(left + 217, 193, left + 270, 193)
            d.rect(left + 213, 168, 50, 50, stroke=VERMILION, width=2, dash="5 4")
            d.text(left + 262, 234, "bottleneck", size=13, fill=VERMILION)
        box(d, left + 272, 176, 56, 34, "s", QUERY if open_view else PLAIN, size=14)
        target = 110 if open_view else 174
        if open_view:
            d.line(left + 300, 174, left + 300, 112, stroke=BLUE, width=1.5)
            d.circle(left + 300, 112, 12, fill="#FFFFFF", stroke=INK)
            d.text(left + 300, 112, "+", size=16)
            target = 98
        d.arrow(left + 300, target, left + 300, 76)
        box(d, left + 266, 44, 68, 30, "sleeps", PLAIN, size=14)
        d.text(left + 118, 302, "encoder", size=13, fill=GREY)
        d.text(left + 300, 302, "decoder", size=13, fill=GREY)
    d.line(400, 20, 400, 310, stroke=LIGHT)
    return d


def library() -> Drawing:
    d = Drawing(
        760,
        280,
        "A question is compared with the titles of three books; their contents are mixed by the match",
    )
    box(d, 20, 100, 150, 64, "question\n“care of cats”", QUERY, size=14)
    d.text(95, 184, "query", size=14, fill=BLUE, weight="bold")
    books = [
        ("Cats and kittens", "milk, sleep, claws", 0.7),
        ("Dogs at home", "walks, bones", 0.25),
        ("Steam engines", "coal, water", 0.05),
    ]
    for i, (title, content, weight) in enumerate(books):
        y = 40 + 70 * i
        box(d, 250, y, 150, 46, title, KEY, size=14)
        d.line(172, 132, 248, y + 23, stroke=BLUE, width=0.8 + 6 * weight)
        d.text(424, y + 23, f"× {weight}", size=14, anchor="start")
        box(d, 490, y, 150, 46, content, VALUE, size=14)
        d.line(642, y + 23, 690, 132, stroke=GREEN, width=0.8 + 6 * weight)
    box(d, 676, 108, 70, 48, "answer", VALUE, size=14)
    d.text(325, 20, "titles: keys", size=14, fill=VERMILION, weight="bold")
    d.text(565, 20, "contents: values", size=14, fill=GREEN, weight="bold")
    d.text(445, 256, "the better the match, the larger the weight; weights sum to 1", size=13, fill=GREY)
    return d


def heads() -> Drawing:
    d = Drawing(
        780,
        290,
        "Each token is cut into heads, every head attends by itself, and the results are joined again",
    )
    colours = [(BLUE, PALE_BLUE), (ORANGE, PALE_ORANGE), (GREEN, PALE_GREEN), (PURPLE, PALE_PURPLE)]
    for row in range(3):
        y = 100 + 34 * row
        for h, (stroke, fill) in enumerate(colours):
            d.rect(24 + 30 * h, y, 30, 28, fill=fill, stroke=stroke, rx=0)
            d.rect(636 + 30 * h, y, 30, 28, fill=fill, stroke=stroke, rx=0)
    d.text(84, 78, "q, k or v: (T, C)", size=13)
    d.text(696, 78, "joined: (T, C)", size=13)
    for h, (stroke, fill) in enumerate(colours):
        y = 16 + 64 * h
        d.arrow(148, 150, 236, y + 26, stroke=stroke)
        for row in range(3):
            d.rect(242, y + 17 * row, 34, 15, fill=fill, stroke=stroke, rx=0)
        d.arrow(280, y + 26, 330, y + 26, stroke=stroke)
        box(d, 334, y + 2, 150, 46, f"head {h + 1} attends", (stroke, fill), size=14)
        d.arrow(486, y + 26, 526, y + 26, stroke=stroke)
        for row in range(3):
            d.rect(530, y + 17 * row, 34, 15, fill=fill, stroke=stroke, rx=0)
        d.arrow(568, y + 26, 632, 150, stroke=stroke)
    d.text(84, 226, "split", size=15, weight="bold")
    d.text(696, 226, "join, then o_proj", size=15, weight="bold")
    d.text(259, 276, "(T, D)", size=12, fill=GREY)
    d.text(547, 276, "(T, D)", size=12, fill=GREY)
    return d


def cross() -> Drawing:
    d = Drawing(
        760, 250, "Self-attention asks and answers within one sequence; cross-attention asks another sequence"
    )
    for left, title, source in ((20, "self-attention", "x"), (400, "cross-attention", "context")):
        d.text(left + 170, 24, title, size=16, weight="bold")
        x_left = left + 125 if source == "x" else left + 10
        box(d, x_left, 190, 90, 38, "x", PLAIN, size=15)
        middle = left + 170 if source == "x" else left + 235
        if source != "x":
            box(d, left + 190, 190, 90, 38, source, MIXED, size=15)
        for name, colours, x in (("q", QUERY, 30), ("k", KEY, 180), ("v", VALUE, 240)):
            start = x_left + 45 if name == "q" else middle
            d.arrow(start, 188, left + x + 25, 140, stroke=colours[0])
            box(d, left + x, 104, 50, 34, name, colours, size=15)
            d.arrow(left + x + 25, 102, left + (140, 170, 200)["qkv".index(name)], 76, stroke=colours[0])
        box(d, left + 110, 44, 120, 30, "attend", PLAIN, size=15)
    d.line(380, 20, 380, 230, stroke=LIGHT)
    return d


PICTURES = {
    "attention-path": path,
    "attention-il": il,
    "attention-bottleneck": bottleneck,
    "attention-library": library,
    "attention-heads": heads,
    "attention-cross": cross,
}
