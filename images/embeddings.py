"""Draw the pictures of chapter 04: objects as points, a look-up, a skip-gram window, a GPT's input."""

import math

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

TOKEN, POSITION, TOTAL = (BLUE, PALE_BLUE), (ORANGE, PALE_ORANGE), (GREEN, PALE_GREEN)


def vector(d: Drawing, x: float, y: float, n: int, colours: tuple[str, str], w: float = 22, h: float = 22):
    """Draw a vector as a row of n squares."""
    stroke, fill = colours
    for i in range(n):
        d.rect(x + i * w, y, w - 3, h, fill=fill, stroke=stroke, rx=2)


def objects() -> Drawing:
    d = Drawing(800, 300, "A word, a sound and a picture each become a list of numbers: a point in a space")
    d.box(30, 30, 130, 50, "rabbit", fill="#FFFFFF", size=18)
    wave = " ".join(
        f"{'L' if i else 'M'}{30 + i * 2} {145 + 20 * math.sin(i / 3.1) * math.sin(i / 21):.1f}"
        for i in range(66)
    )
    d.path(wave, stroke=VERMILION)
    shades = [LIGHT, "#FFFFFF", GREY, LIGHT, GREY, INK, "#FFFFFF", GREY, LIGHT, "#FFFFFF", GREY, INK]
    for i, shade in enumerate(shades):
        d.rect(57 + 19 * (i % 4), 205 + 19 * (i // 4), 19, 19, fill=shade, stroke=LIGHT, rx=0)
    rows = [
        (55, "a token of text", "row 22,746 of GPT-2's", "0.3  −1.2  0.8  …", TOKEN),
        (145, "25 ms of sound", "loudness at each pitch", "0.0  0.4  2.1  …", (VERMILION, PALE_VERMILION)),
        (233, "a patch of a picture", "brightness of each pixel", "0.9  1.0  0.2  …", TOTAL),
    ]
    for y, name, how, numbers, (stroke, fill) in rows:
        d.text(186, y - 9, name, size=14, anchor="start", weight="bold")
        d.text(186, y + 11, how, size=13, anchor="start", fill=GREY)
        d.arrow(352, y, 392, y)
        d.box(402, y - 17, 150, 34, numbers, fill=fill, stroke=stroke, size=14, mono=True)
        d.arrow(560, y, 596, 145 + (y - 145) * 0.45)
    d.line(610, 240, 770, 240, stroke=GREY)
    d.line(610, 240, 610, 60, stroke=GREY)
    for x, y, (stroke, fill) in (
        (650, 95, TOKEN),
        (735, 140, (VERMILION, PALE_VERMILION)),
        (680, 200, TOTAL),
    ):
        d.circle(x, y, 7, fill=fill, stroke=stroke, width=2)
    d.text(690, 262, "each kind in a space of its own", size=13, fill=GREY)
    return d


def look_up() -> Drawing:
    d = Drawing(800, 270, "A one-hot row times the table picks the row that the look-up picks")
    chosen, n, w, h, top = 3, 6, 46, 30, 56
    d.text(150, 26, "one-hot vector of token 3", size=14, weight="bold")
    for i in range(n):
        hot = i == chosen
        fill, stroke = (PALE_ORANGE, ORANGE) if hot else ("#FFFFFF", LIGHT)
        d.box(14 + i * w, 131, w - 4, 32, int(hot), fill=fill, stroke=stroke, size=15)
    d.text(306, 147, "×", size=22)
    d.text(440, 26, "table: vocab_size × d_model", size=14, weight="bold")
    numbers = ["0.1 −0.4 0.9", "0.7 0.2 −0.1", "−0.3 0.5 0.6", "0.8 −0.9 0.4", "0.2 0.0 −0.7", "−0.5 0.3 0.1"]
    rows = [row.split() for row in numbers]
    for i, row in enumerate(rows):
        fill, stroke = (PALE_BLUE, BLUE) if i == chosen else ("#FFFFFF", LIGHT)
        d.text(340, top + h * i + 13, i, size=13, fill=GREY)
        for j, number in enumerate(row):
            d.box(356 + 58 * j, top + h * i, 54, h - 4, number, fill=fill, stroke=stroke, size=14)
    d.text(560, 147, "=", size=22)
    d.text(690, 26, "row 3", size=14, weight="bold")
    for j, number in enumerate(rows[chosen]):
        d.box(592 + 62 * j, 131, 58, 32, number, fill=PALE_BLUE, stroke=BLUE, size=15)
    d.text(
        400, 254, "every other row is multiplied by 0: the look-up leaves that work out", size=13, fill=GREY
    )
    return d


def skip_gram() -> Drawing:
    d = Drawing(800, 250, "The center word rabbit with the words around it, and with words drawn at random")
    words = ["the", "small", "rabbit", "ate", "the", "clover"]
    w, left = 104, 92
    for i, word in enumerate(words):
        stroke, fill = TOKEN if i == 2 else TOTAL if i < 5 else (GREY, PALE_GREY)
        d.box(left + i * w, 88, w - 10, 34, word, fill=fill, stroke=stroke, size=15)
    center = left + 2 * w + 47
    for i in (0, 1, 3, 4):
        x, rise = left + i * w + 47, 26 + 12 * abs(i - 2)
        d.path(f"M{center} 88 Q{(center + x) / 2} {88 - 2 * rise + 20} {x} 86", stroke=GREEN, width=2)
    d.text(left + 5 * w + 47, 72, "too far", size=12, fill=GREY)
    d.text(40, 105, "text", size=14, weight="bold")
    d.text(720, 34, "push together", size=14, fill=GREEN, weight="bold")
    d.text(40, 205, "drawn", size=14, weight="bold")
    for x, word in ((250, "lantern"), (400, "Monday"), (550, "said")):
        d.box(x - 47, 188, 94, 34, word, fill=PALE_VERMILION, stroke=VERMILION, size=15)
        d.line(center, 122, x, 188, stroke=VERMILION, dash="5 4")
    d.text(715, 205, "push apart", size=14, fill=VERMILION, weight="bold")
    return d


def inputs() -> Drawing:
    d = Drawing(800, 330, "Token vectors plus position vectors are the input of a GPT, one row a token")
    words, ids, left, w = ["dog", "·bites", "·man"], [9703, 26081, 582], 190, 196
    labels = [
        (34, "tokens"),
        (88, "token IDs"),
        (150, "token vectors\n(from tok_emb)"),
        (216, "position vectors\n(from pos_emb)"),
        (290, "input vectors\nshape (B, T, C)"),
    ]
    for y, label in labels:
        d.text(150, y, label, size=14, anchor="end", weight="bold" if "vectors" not in label else "normal")
    for i, (word, number) in enumerate(zip(words, ids, strict=True)):
        x = left + i * w
        d.box(x + 24, 18, 84, 32, word, fill="#FFFFFF", size=15)
        d.arrow(x + 66, 52, x + 66, 72)
        d.box(x + 24, 74, 84, 28, number, fill=PALE_GREY, stroke=GREY, size=14)
        d.arrow(x + 66, 104, x + 66, 134)
        vector(d, x, 138, 6, TOKEN)
        d.text(x + 64, 183, "+", size=20)
        vector(d, x, 204, 6, POSITION)
        d.text(x + 64, 250, "=", size=20)
        vector(d, x, 278, 6, TOTAL)
        d.text(x + 138, 216, f"pos. {i}", size=12, anchor="start", fill=GREY)
    return d


PICTURES = {
    "embeddings-inputs": inputs,
    "embeddings-objects": objects,
    "embeddings-look-up": look_up,
    "embeddings-skip-gram": skip_gram,
}
