"""Draw the pictures of chapter 06: the residual road, the transformer of 2017, pre-norm and post-norm."""

from images.draw import (
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    PALE_PURPLE,
    PURPLE,
    VERMILION,
    Drawing,
)

ATTENTION, FEED_FORWARD, NORM = (BLUE, PALE_BLUE), (ORANGE, PALE_ORANGE), (GREEN, PALE_GREEN)
TABLE, PLAIN = (PURPLE, PALE_PURPLE), (GREY, PALE_GREY)


def box(d: Drawing, x: float, y: float, w: float, h: float, label, colours: tuple[str, str], **text) -> None:
    stroke, fill = colours
    d.box(x, y, w, h, label, fill=fill, stroke=stroke, **text)


def plus(d: Drawing, x: float, y: float) -> None:
    d.circle(x, y, 11, fill="#FFFFFF")
    d.text(x, y, "+", size=16)


def road() -> Drawing:
    d = Drawing(
        800,
        330,
        "The residual path is a straight road from tokens to logits; layers read a normalized copy and add",
    )
    y = 240
    d.rect(106, y - 9, 520, 18, fill=LIGHT, stroke="none", rx=0)
    d.line(106, y, 626, y, stroke="#FFFFFF", width=2, dash="10 8")
    box(d, 16, y - 32, 90, 64, "tokens:\ntable +\npositions", TABLE, size=13)
    for i, left in enumerate((128, 376)):
        d.rect(left, 24, 238, 256, stroke=GREY, dash="5 4", rx=8)
        d.text(left + 119, 44, f"block {i + 1}", size=14, weight="bold")
        layers = (("attention", "look at others", ATTENTION), ("feed-forward", "think alone", FEED_FORWARD))
        for j, (name, note, colours) in enumerate(layers):
            x = left + 28 + 112 * j
            d.arrow(x, y - 9, x, 186)
            box(d, x - 20, 158, 50, 26, "norm", NORM, size=12)
            d.arrow(x, 156, x, 128, stroke=colours[0])
            box(d, x - 20, 78, 96, 48, name, colours, size=13)
            d.text(x + 28, 66, note, size=11, fill=GREY)
            d.arrow(x + 56, 128, x + 56, y - 12, stroke=colours[0])
            plus(d, x + 56, y)
    box(d, 626, y - 20, 60, 40, "norm", NORM, size=13)
    d.arrow(688, y, 702, y, head=6)
    box(d, 704, y - 32, 80, 64, "output\nhead:\nlogits", TABLE, size=13)
    d.path(f"M 744 {y + 34} C 744 330, 61 330, 61 {y + 38}", stroke=PURPLE, dash="4 4")
    d.text(400, 294, "one table, used twice", size=13, fill=PURPLE)
    return d


def encoder_decoder() -> Drawing:
    d = Drawing(
        760,
        400,
        "The transformer of 2017: an encoder reads cab, a decoder writes bac and looks at the encoder",
    )
    d.text(170, 24, "encoder: reads", size=16, weight="bold")
    d.text(560, 24, "decoder: writes", size=16, weight="bold")
    for x, letter in zip((110, 170, 230), "cab", strict=True):
        box(d, x - 20, 346, 40, 32, letter, PLAIN, size=15)
        d.arrow(x, 344, x, 296)
    box(d, 60, 246, 220, 48, "self-attention\nall see all", ATTENTION, size=13)
    d.arrow(170, 244, 170, 206)
    box(d, 60, 160, 220, 44, "feed-forward", FEED_FORWARD, size=13)
    d.path("M 170 158 L 170 132 L 330 132 L 330 184 L 440 184", stroke=VERMILION)
    d.arrow(438, 184, 446, 184, stroke=VERMILION, width=2)
    d.text(336, 116, "keys and values: what was read", size=13, fill=VERMILION)
    for x, given, wanted in zip((500, 560, 620), ("start", "b", "a"), "bac", strict=True):
        box(d, x - 24, 346, 48, 32, given, PLAIN, size=14)
        d.arrow(x, 344, x, 296)
        d.arrow(x, 96, x, 76)
        box(d, x - 20, 42, 40, 32, wanted, PLAIN, size=15)
    box(d, 450, 246, 220, 48, "causal self-attention\neach sees itself and the past", ATTENTION, size=13)
    d.arrow(560, 244, 560, 210)
    box(d, 450, 160, 220, 48, "cross-attention\nall see all that was read", (VERMILION, "#FBE1D1"), size=13)
    d.arrow(560, 158, 560, 142)
    box(d, 450, 98, 220, 42, "feed-forward", FEED_FORWARD, size=13)
    d.text(560, 390, "the wanted letters, shifted right by one", size=12, fill=GREY)
    return d


def norms() -> Drawing:
    d = Drawing(
        760,
        260,
        "Post-norm: each norm stands on the road. Pre-norm: the road is free and the norms stand beside it",
    )
    for top, title, pre in ((20, "post-norm (2017)", False), (142, "pre-norm (GPT-2)", True)):
        y = top + 84
        d.text(20, top + 8, title, size=15, anchor="start", weight="bold")
        d.rect(20, y - 6, 720, 12, fill=LIGHT, stroke="none", rx=0)
        for i in range(2):
            x = 70 + 350 * i
            name, colours = (("attention", ATTENTION), ("feed-forward", FEED_FORWARD))[i]
            if pre:
                d.path(f"M {x} {y - 6} L {x} {top + 38} L {x + 16} {top + 38}")
                box(d, x + 18, top + 24, 56, 28, "norm", NORM, size=13)
                d.arrow(x + 76, top + 38, x + 94, top + 38, head=6)
            else:
                d.path(f"M {x} {y - 6} L {x} {top + 38} L {x + 88} {top + 38}")
                d.arrow(x + 86, top + 38, x + 94, top + 38, head=6)
                box(d, x + 250, y - 15, 56, 30, "norm", NORM, size=13)
            box(d, x + 96, top + 22, 104, 32, name, colours, size=13)
            d.line(x + 200, top + 38, x + 224, top + 38)
            d.arrow(x + 224, top + 38, x + 224, y - 12)
            plus(d, x + 224, y)
    return d


PICTURES = {
    "gpt-road": road,
    "gpt-encoder-decoder": encoder_decoder,
    "gpt-norms": norms,
}
