"""Draw the pictures of chapter 09: the loop that writes, beams, the cache, padding, a draft and its check."""

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
    PALE_VERMILION,
    VERMILION,
    Drawing,
)

NOW, AGAIN, KEPT = (GREEN, PALE_GREEN), (VERMILION, PALE_VERMILION), (LIGHT, "#FFFFFF")
WORDS = ["fish", "mouse", "cake", "hat", "moon"]


def bars(d: Drawing, left: float, bottom: float, heights: list[float], kept: int = 5) -> None:
    """Draw the bars of the five words from `left` on; those that are not kept are hollow."""
    for i, (word, height) in enumerate(zip(WORDS, heights, strict=True)):
        x = left + 38 * i
        fill, stroke = (PALE_BLUE, BLUE) if i < kept else ("#FFFFFF", LIGHT)
        d.rect(x, bottom - height, 30, height, fill=fill, stroke=stroke, rx=2)
        d.text(x + 15, bottom + 12, word, size=11, fill=GREY)
    d.line(left - 6, bottom, left + 38 * 5 - 2, bottom, stroke=GREY)


def token(
    d: Drawing, x: float, y: float, w: float, label: str, colours: tuple[str, str], ink: str = INK
) -> None:
    stroke, fill = colours
    d.rect(x, y, w, 34, fill=fill, stroke=stroke)
    d.text(x + w / 2, y + 17, label, fill=ink)


def loop() -> Drawing:
    d = Drawing(
        800, 290, "Text goes into the model, out come bars; a strategy reshapes them; one word is drawn"
    )
    d.box(14, 84, 128, 52, "the cat ate\nthe", fill=PALE_GREY, stroke=GREY, size=15)
    d.arrow(144, 110, 176, 110)
    d.box(178, 84, 84, 52, "model", fill=PALE_GREEN, stroke=GREEN, size=15)
    d.arrow(264, 110, 292, 110)
    bars(d, 302, 160, [100, 40, 30, 20, 10])
    d.text(392, 22, "probabilities of the next word", size=14)
    d.arrow(500, 110, 584, 110, stroke=ORANGE, width=2)
    d.text(541, 90, "strategies", size=14, fill="#8A5F00", weight="bold")
    bars(d, 602, 160, [118, 47, 35, 20, 10], kept=3)
    d.text(692, 22, "after “keep the best three”", size=14)
    d.arrow(692, 184, 692, 216)
    d.box(622, 218, 140, 40, "draw one: “fish”", fill=PALE_ORANGE, stroke=ORANGE, size=14)
    d.line(620, 238, 78, 238, width=1.5)
    d.arrow(78, 238, 78, 138)
    d.text(350, 258, "put it at the end of the text, and ask again", size=14)
    return d


def beams() -> Drawing:
    d = Drawing(
        800, 300, "A tree of two words: greedy takes the branch of 0.6 and ends at 0.24; two beams find 0.36"
    )
    firsts = [("The", 0.6, 84), ("A", 0.4, 232)]
    ends = [
        ("The", "cat", 0.4, "0.24", 34),
        ("The", "dog", 0.35, "0.21", 84),
        ("The", "hen", 0.25, "0.15", 134),
        ("A", "bear", 0.9, "0.36", 208),
        ("A", "bee", 0.1, "0.04", 258),
    ]
    y_of = {word: y for word, _, y in firsts}
    d.box(30, 138, 70, 40, "start", fill=PALE_GREY, stroke=GREY, size=15)
    for word, p, y in firsts:
        colours = (VERMILION, PALE_VERMILION) if word == "The" else (GREEN, PALE_GREEN)
        d.line(102, 158, 238, y, stroke=colours[0], width=1 + 4 * p)
        d.text(158, (158 + y) / 2 - 14 if y < 158 else (158 + y) / 2 + 16, p, size=14)
        d.box(240, y - 20, 80, 40, word, fill=colours[1], stroke=colours[0], size=16)
    for first, word, p, product, y in ends:
        best, greedy = word == "bear", word == "cat"
        stroke, fill = (
            (GREEN, PALE_GREEN) if best else (VERMILION, PALE_VERMILION) if greedy else (LIGHT, "#FFFFFF")
        )
        d.line(322, y_of[first], 458, y, stroke=stroke if best or greedy else GREY, width=1 + 4 * p)
        d.text(432, y - 10 if y <= y_of[first] else y + 10, p, size=13)
        d.box(460, y - 18, 80, 36, word, fill=fill, stroke=stroke if best or greedy else GREY, size=15)
        numbers = f"{dict(The=0.6, A=0.4)[first]} × {p} = {product}"
        d.text(556, y, numbers, size=14, anchor="start", weight="bold" if best or greedy else "normal")
    d.text(722, 34, "← greedy", size=15, fill=VERMILION, weight="bold")
    d.text(734, 208, "← two beams", size=15, fill=GREEN, weight="bold")
    return d


def cache() -> Drawing:
    d = Drawing(
        800, 312, "Without a cache each step reads all tokens again; with one it reads the new token alone"
    )
    words = ["the", "cat", "ate", "the", "fish"]
    for left, title, cached, total in (
        (90, "without a cache", False, "1 + 2 + 3 + 4 + 5 = 15 tokens read"),
        (470, "with a cache", True, "1 + 1 + 1 + 1 + 1 = 5 tokens read"),
    ):
        d.text(left + 140, 22, title, size=16, weight="bold")
        for step in range(5):
            y = 66 + 40 * step
            if left == 90:
                d.text(46, y + 16, f"step {step + 1}", size=13, fill=GREY)
            for i in range(step + 1):
                colours, ink = KEPT if cached else AGAIN, GREY if cached else INK
                if i == step:
                    colours, ink = NOW, INK
                token(d, left + 56 * i, y, 50, words[i], colours, ink)
        d.text(left + 140, 290, total, size=15)
    for i, ((stroke, fill), name) in enumerate(((NOW, "read now"), (AGAIN, "read again"), (KEPT, "kept"))):
        d.rect(250 + 120 * i, 40, 14, 14, fill=fill, stroke=stroke, rx=2)
        d.text(270 + 120 * i, 47, name, size=13, anchor="start", fill=GREY)
    return d


def padding() -> Drawing:
    d = Drawing(
        800,
        230,
        "Three prompts of unequal length: padded right, the next tokens are scattered; left, aligned",
    )
    prompts = [["Tim", "saw", "a"], ["It"], ["The", "cat"]]
    for left, title, to_left in ((20, "padding on the right", False), (430, "padding on the left", True)):
        d.text(left + 120, 22, title, size=16, weight="bold")
        for row, prompt in enumerate(prompts):
            y, empty = 50 + 46 * row, 3 - len(prompt)
            cells = [""] * empty + prompt if to_left else prompt + [""] * empty
            for i, word in enumerate(cells):
                colours, ink = ((BLUE, PALE_BLUE), INK) if word else ((LIGHT, PALE_GREY), GREY)
                token(d, left + 68 * i, y, 62, word or "pad", colours, ink)
            x = left + 68 * (3 if to_left else len(prompt))
            d.rect(x, y, 62, 34, fill=PALE_ORANGE if to_left else "none", stroke=ORANGE, width=2, dash="4 3")
            if to_left:
                d.text(x + 31, y + 17, "next", size=14)
        note = "all next tokens: one column" if to_left else "next tokens (dashed): three columns"
        d.text(left + 134, 206, note, size=14)
    return d


def speculative() -> Drawing:
    d = Drawing(
        800,
        262,
        "A small model drafts four tokens; the large one reads them at once, keeps two, mends the third",
    )
    d.text(20, 46, "small model:\nfour steps", size=14, anchor="start", fill=VERMILION, weight="bold")
    d.text(20, 128, "large model:\none pass", size=14, anchor="start", fill=BLUE, weight="bold")
    d.text(20, 212, "new text", size=14, anchor="start", weight="bold")
    drafts = ["sat", "on", "a", "mat"]
    d.box(150, 26, 92, 38, "the cat", fill=PALE_GREY, stroke=GREY, size=15)
    d.box(150, 194, 92, 38, "the cat", fill=PALE_GREY, stroke=GREY, size=15)
    d.rect(150, 106, 92 + 4 * 104, 42, fill=PALE_BLUE, stroke=BLUE)
    d.text(404, 127, "reads all of it, and says how likely it finds each draft", size=14)
    for i, word in enumerate(drafts):
        x = 258 + 104 * i
        d.box(x, 26, 80, 38, word, fill=PALE_VERMILION, stroke=VERMILION, size=15)
        d.arrow(x - 14, 45, x - 2, 45, stroke=VERMILION, head=6)
        d.arrow(x + 40, 66, x + 40, 104, stroke=GREY)
    marks = [("kept", GREEN), ("kept", GREEN), ("rejected", VERMILION)]
    for i, (mark, colour) in enumerate(marks):
        x = 258 + 104 * i
        d.arrow(x + 40, 150, x + 40, 192, stroke=colour, width=2)
        d.text(x + 48, 170, mark, size=13, fill=colour, anchor="start", weight="bold")
    for i, word in enumerate(["sat", "on"]):
        d.box(258 + 104 * i, 194, 80, 38, word, fill=PALE_GREEN, stroke=GREEN, size=15)
    d.box(466, 194, 80, 38, "the", fill=PALE_BLUE, stroke=BLUE, size=15)
    d.text(562, 213, "drawn anew; what followed is dropped", size=13, anchor="start", fill=GREY)
    return d


PICTURES = {
    "generation-loop": loop,
    "generation-beams": beams,
    "generation-cache": cache,
    "generation-padding": padding,
    "generation-speculative": speculative,
}
