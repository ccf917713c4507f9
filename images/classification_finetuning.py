"""Draw the pictures of chapter 13: the last token reads all others, and what is frozen and trained."""

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
    VERMILION,
    Drawing,
)


def last_token() -> Drawing:
    d = Drawing(
        800, 300, "Each token reads those to its left: only the last one has read all, and the head reads it"
    )
    words = ["WIN", "a", "prize", "now", "pad", "pad"]
    xs = [70 + 106 * i for i in range(len(words))]
    for i, (x, word) in enumerate(zip(xs, words, strict=True)):
        padding = word == "pad"
        fill, stroke = (PALE_GREY, LIGHT) if padding else (PALE_BLUE, BLUE)
        if i == 3:
            fill, stroke = PALE_ORANGE, ORANGE
        d.box(x - 42, 226, 84, 36, fill="#FFFFFF" if padding else PALE_GREY, stroke=LIGHT)
        d.text(x, 244, word, size=15, fill=GREY if padding else INK, italic=padding)
        d.box(x - 42, 112, 84, 36, fill=fill, stroke=stroke)
        d.text(x, 130, f"state {i + 1}", size=14, fill=GREY if padding else INK)
        for j in range(i + 1):
            if not padding:
                colour = ORANGE if i == 3 else LIGHT
                d.arrow(xs[j], 224, x, 151, stroke=colour, width=2 if i == 3 else 1.2)
    d.arrow(xs[3], 110, xs[3], 68, stroke=ORANGE, width=2)
    d.box(xs[3] - 42, 30, 84, 36, "head", fill=PALE_GREEN, stroke=GREEN, size=15, weight="bold")
    d.arrow(xs[3] + 44, 48, xs[3] + 92, 48, stroke=GREEN, width=2)
    d.text(xs[3] + 102, 48, "ham or spam", size=15, anchor="start", weight="bold")
    d.text(28, 48, "state 1 knows only WIN;\nstate 4 has read all", size=14, anchor="start", fill=GREY)
    d.text((xs[4] + xs[5]) / 2, 186, "to the right of the last token:\nnobody looks here", size=13, fill=GREY)
    return d


def frozen() -> Drawing:
    d = Drawing(
        800, 290, "Frozen blocks are computed once for each message; what lies above is trained, in four ways"
    )
    ways = [
        ("head only", 4, 0, False),
        ("last block", 3, 1, False),
        ("last 4 blocks", 0, 4, False),
        ("LoRA", 4, 0, True),
    ]
    for i, (name, n_frozen, n_trained, thin) in enumerate(ways):
        x = 40 + 150 * i
        d.text(x + 55, 22, name, size=15, weight="bold")
        d.box(x, 40, 110, 26, "head", fill=PALE_ORANGE, stroke=ORANGE, size=13)
        for k in range(n_frozen + n_trained):
            trained = k < n_trained
            fill, stroke = (PALE_ORANGE, ORANGE) if trained else (PALE_BLUE, BLUE)
            d.box(x, 74 + 30 * k, 110, 24, f"block {24 - k}", fill=fill, stroke=stroke, size=12)
            if thin:
                d.rect(x + 114, 74 + 30 * k, 8, 24, fill=PALE_ORANGE, stroke=ORANGE, rx=2)
        d.box(x, 198, 110, 62, "blocks 1 to 20\nand tokens", fill=PALE_BLUE, stroke=BLUE, size=13)
        y = 71 + 30 * (4 if thin else n_trained)
        d.line(x - 10, y, x + 126, y, stroke=VERMILION, width=1.5, dash="5 4")
    d.text(636, 192, "states kept here:\ncomputed once", size=13, anchor="start", fill=VERMILION)
    d.box(640, 60, 22, 18, fill=PALE_ORANGE, stroke=ORANGE)
    d.text(670, 69, "trained", size=13, anchor="start")
    d.box(640, 88, 22, 18, fill=PALE_BLUE, stroke=BLUE)
    d.text(670, 97, "frozen", size=13, anchor="start")
    return d


PICTURES = {"classification-last": last_token, "classification-frozen": frozen}
