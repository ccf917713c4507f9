"""Draw the pictures of chapter 07: the four swaps, rotary positions, shared heads, blocks, experts."""

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
    PALE_PURPLE,
    PALE_VERMILION,
    PURPLE,
    VERMILION,
    Drawing,
)

NORM, FFN = (BLUE, PALE_BLUE), (GREEN, PALE_GREEN)
POSITIONS, HEADS = (ORANGE, PALE_ORANGE), (PURPLE, PALE_PURPLE)
PLAIN = (GREY, PALE_GREY)


def box(d: Drawing, x: float, y: float, w: float, h: float, label, colours: tuple[str, str], **text) -> None:
    stroke, fill = colours
    d.box(x, y, w, h, label, fill=fill, stroke=stroke, **text)


def clock(
    d: Drawing, x: float, y: float, r: float, angle: float, stroke: str, *, trail: bool = False
) -> None:
    """Draw a hand at `angle` radians from the right, turning against the clock, as in mathematics."""
    d.circle(x, y, r, fill="#FFFFFF", stroke=LIGHT, width=1.5)
    if trail and angle > 0:
        large, near = int(angle % (2 * math.pi) > math.pi), 0.45 * r
        end_x, end_y = x + near * math.cos(angle), y - near * math.sin(angle)
        d.path(
            f"M {x + near:.1f} {y:.1f} A {near:.1f} {near:.1f} 0 {large} 0 {end_x:.1f} {end_y:.1f}",
            stroke=LIGHT,
            width=3,
        )
    d.arrow(x, y, x + r * math.cos(angle), y - r * math.sin(angle), stroke=stroke, width=2.5, head=9)


def block() -> Drawing:
    d = Drawing(800, 470, "The block of GPT-2 and the block of Llama side by side, with four parts changed")
    sides = [
        ("GPT-2", 80, "LayerNorm", "attention:\neach head has\nits own k and v", "GELU\nfeed-forward"),
        ("Llama", 450, "RMSNorm", "attention:\nheads share\nk and v", "SwiGLU\nfeed-forward"),
    ]
    for name, left, norm, attention, ffn in sides:
        x, path = left + 90, left
        d.text(left + 90, 20, name, size=18, weight="bold")
        d.line(path, 436, path, 52)
        d.arrow(path, 56, path, 36)
        for norm_y, part_y, label, colours in ((336, 254, attention, HEADS), (158, 92, ffn, FFN)):
            part_h = 58 if colours == HEADS else 44
            d.line(path, norm_y + 56, x + 60, norm_y + 56)
            d.arrow(x + 60, norm_y + 56, x + 60, norm_y + 34)
            box(d, x, norm_y, 120, 32, norm, NORM, size=14)
            d.arrow(x + 60, norm_y - 1, x + 60, part_y + part_h + 2)
            box(d, x, part_y, 120, part_h, label, colours, size=13)
            d.line(x + 60, part_y - 1, x + 60, part_y - 18)
            d.arrow(x + 60, part_y - 18, path + 12, part_y - 18)
            d.circle(path, part_y - 18, 11, fill="#FFFFFF")
            d.text(path, part_y - 18, "+", size=16)
        box(d, path - 52, 436, 104, 28, "token vector", PLAIN, size=13)
    d.circle(80, 414, 11, fill="#FFFFFF")
    d.text(80, 414, "+", size=16)
    box(d, 152, 422, 156, 42, "learned vector\nof the position", POSITIONS, size=13)
    d.arrow(150, 440, 93, 419, stroke=ORANGE)
    clock(d, 730, 276, 22, 0.9, ORANGE, trail=True)
    d.text(730, 330, "q and k are turned\nby the position", size=13)
    d.line(662, 283, 706, 279, stroke=ORANGE)
    for y, colours in ((352, NORM), (283, HEADS), (174, NORM), (114, FFN)):
        d.arrow(304, y, 524, y, stroke=colours[0], width=1.5, dash="6 5")
    d.line(312, 424, 730, 424, stroke=ORANGE, dash="6 5")
    d.arrow(730, 424, 730, 354, stroke=ORANGE, dash="6 5")
    return d


def clocks() -> Drawing:
    d = Drawing(
        800,
        330,
        "Clock hands that turn with the position: one fast, one slow; the angle between two is fixed",
    )
    xs = [190 + 100 * t for t in range(6)]
    rows = [
        ("pair 0", "1 radian a token", 1.0, 84, VERMILION),
        ("pair 1", "0.1 radian a token", 0.1, 192, BLUE),
    ]
    for t, x in enumerate(xs):
        d.text(x, 22, f"position {t}", size=13, fill=GREY)
    for name, speed, frequency, y, stroke in rows:
        d.text(20, y - 10, name, size=15, anchor="start", weight="bold", fill=stroke)
        d.text(20, y + 12, speed, size=12, anchor="start", fill=GREY)
        for t, x in enumerate(xs):
            clock(d, x, y, 38, frequency * t, stroke, trail=True)
    for a, b in ((1, 3), (3, 5)):
        x1, x2 = xs[a] + (6 if a == 3 else 0), xs[b] - (6 if b == 3 else 0)
        d.path(f"M {x1} 242 V 256 H {x2} V 242", stroke=GREY)
        d.text((x1 + x2) / 2, 274, "2 apart: 2 radians, and 0.2", size=13)
    d.text(
        400,
        310,
        "A query and a key meet at an angle that depends on how far apart they stand, not on where.",
        size=14,
        fill=INK,
    )
    return d


def layouts() -> Drawing:
    d = Drawing(800, 210, "Which numbers make a pair: neighbours in one layout, i and i + D/2 in the other")
    colours = [(BLUE, PALE_BLUE), (VERMILION, PALE_VERMILION), (GREEN, PALE_GREEN)]
    sides = [
        (30, "interleaved: 2i with 2i + 1", [(0, 1), (2, 3), (4, 5)], [0, 1, 2, 3, 4, 5]),
        (430, "half-split: i with i + D/2", [(0, 3), (1, 4), (2, 5)], [0, 2, 4, 1, 3, 5]),
    ]
    for left, title, pairs, content in sides:
        d.text(left + 170, 22, title, size=15, weight="bold")
        for pair, (stroke, fill) in zip(pairs, colours, strict=True):
            x1, x2 = (left + 22 + 56 * i + 26 for i in pair)
            height = 26 if pair[1] - pair[0] == 1 else 64
            d.path(
                f"M {x1} 122 C {x1} {122 - height}, {x2} {122 - height}, {x2} 122", stroke=stroke, width=2.5
            )
            for i in pair:
                box(d, left + 22 + 56 * i, 124, 52, 38, f"x{'₀₁₂₃₄₅'[content[i]]}", (stroke, fill), size=16)
    d.text(
        400, 190, "The same six numbers in another order: the pairs, and the scores, are the same.", size=13
    )
    d.line(400, 20, 400, 168, stroke=LIGHT)
    return d


def groups() -> Drawing:
    d = Drawing(800, 250, "Eight query heads with eight, two or one head of keys and values")
    sides = [(20, "multi-head", 8), (290, "grouped-query", 2), (560, "multi-query", 1)]
    for left, title, n_kv_heads in sides:
        d.text(left + 110, 20, title, size=16, weight="bold")
        share = 8 // n_kv_heads
        for h in range(8):
            x = left + 14 + 27.5 * h
            group = h // share
            target = left + 14 + 27.5 * (group * share + (share - 1) / 2)
            d.line(x, 76, target, 140, stroke=GREY)
            d.circle(x, 64, 11, fill=PALE_BLUE, stroke=BLUE)
        for g in range(n_kv_heads):
            x = left + 14 + 27.5 * (g * share + (share - 1) / 2)
            d.rect(x - 10, 140, 20, 24, fill=PALE_VERMILION, stroke=VERMILION)
            d.rect(x - 10, 168, 20, 24, fill=PALE_GREEN, stroke=GREEN)
        cached = 2 * n_kv_heads
        d.text(left + 110, 222, f"one token, one layer: {cached} vectors", size=14)
    d.text(270, 64, "q", size=15, fill=BLUE, weight="bold")
    d.text(270, 152, "k", size=15, fill=VERMILION, weight="bold")
    d.text(270, 180, "v", size=15, fill=GREEN, weight="bold")
    return d


def online() -> Drawing:
    d = Drawing(
        800, 280, "The table of scores, worked through block by block, with a running maximum, sum and output"
    )
    size, left, top, n = 46, 60, 40, 5
    for i in range(n):
        for j in range(n):
            done, now, future = j < 2 and i == 3, (i, j) == (3, 2), j > i
            fill = PALE_ORANGE if now else PALE_GREEN if done else "#FFFFFF" if future else PALE_GREY
            d.rect(
                left + size * j,
                top + size * i,
                size - 3,
                size - 3,
                fill=fill,
                stroke=ORANGE if now else LIGHT,
                width=3 if now else 1,
            )
    d.text(left + size * n / 2, 22, "blocks of keys →", size=13, fill=VERMILION)
    d.text(28, top + size * n / 2, "blocks\nof\nqueries\n↓", size=12, fill=BLUE)
    d.arrow(left + size * 3 + 2, top + size * 3.5 - 2, 350, 118, stroke=ORANGE)
    box(d, 352, 80, 130, 76, "scores of\none block", (ORANGE, PALE_ORANGE), size=15)
    d.arrow(484, 118, 546, 118)
    rows = [("m", "largest score so far"), ("l", "sum of e^(score − m)"), ("o", "weighted sum of values")]
    for i, (name, meaning) in enumerate(rows):
        y = 62 + 40 * i
        box(d, 550, y, 40, 32, name, FFN, size=16, mono=True)
        d.text(600, y + 16, meaning, size=14, anchor="start")
    d.text(560, 216, "When m grows, l and o shrink by e^(old m − new m).", size=14)
    d.text(560, 240, "At the end of the row, o / l is the exact result.", size=14)
    return d


def experts() -> Drawing:
    d = Drawing(800, 270, "A router gives a token to two of four experts, and mixes their answers")
    box(d, 20, 110, 90, 44, "token x", PLAIN, size=15)
    d.arrow(112, 132, 160, 132)
    box(d, 164, 106, 100, 52, "router", POSITIONS, size=15)
    weights = [None, 0.7, None, 0.3]
    for i, weight in enumerate(weights):
        y = 16 + 62 * i
        chosen = weight is not None
        stroke = GREEN if chosen else LIGHT
        d.line(266, 132, 348, y + 24, stroke=stroke, width=5 * weight + 1 if chosen else 1.2)
        d.box(
            350,
            y,
            150,
            48,
            f"expert {i + 1}" if chosen else f"expert {i + 1} rests",
            fill=PALE_GREEN if chosen else "#FFFFFF",
            stroke=stroke,
            size=15,
        )
        if chosen:
            d.arrow(502, y + 24, 640, 126 if i < 2 else 140, stroke=GREEN, width=1.5)
            d.text(*((560, 92) if i < 2 else (594, 200)), f"× {weight}", size=15, fill=GREEN, weight="bold")
    d.circle(656, 132, 14, fill="#FFFFFF")
    d.text(656, 132, "+", size=18)
    d.arrow(672, 132, 706, 132)
    box(d, 708, 110, 76, 44, "output", PLAIN, size=15)
    return d


PICTURES = {
    "llama-block": block,
    "llama-clocks": clocks,
    "llama-layouts": layouts,
    "llama-groups": groups,
    "llama-online": online,
    "llama-experts": experts,
}
