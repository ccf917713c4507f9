"""Draw the pictures of chapter 01: tensors, the matrix product, the chain rule, and blame that flows back."""

from images.draw import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    VERMILION,
    Drawing,
)


def blame() -> Drawing:
    d = Drawing(
        800, 330, "Numbers flow forward to the loss, blame flows back to the weight, the weight is adjusted"
    )
    d.text(30, 24, "forward: predict, compare", size=14, anchor="start", fill=BLUE, weight="bold")
    d.arrow(222, 24, 300, 24, stroke=BLUE, width=2)
    steps = [("w", "3"), ("w · x", "6"), ("prediction", "7"), ("error", "2"), ("loss", "4")]
    givens = [None, "x = 2", "b = 1", "target = 5", None]
    slopes = ["× 2", "× 1", "× 1", "× 4"]
    blames = ["8", "4", "4", "4", "1"]
    signs = ["", "×", "+", "−", "square"]
    for i, ((name, number), given, sign) in enumerate(zip(steps, givens, signs, strict=True)):
        x = 30 + 160 * i
        fill, stroke = (PALE_GREEN, GREEN) if i == 0 else (PALE_GREY, GREY)
        d.rect(x, 124, 96, 58, fill=fill, stroke=stroke)
        d.text(x + 48, 141, name, size=13)
        d.text(x + 48, 164, number, size=17, fill=BLUE, weight="bold")
        d.text(x + 48, 200, f"blame {blames[i]}", size=14, fill=VERMILION, weight="bold")
        if given:
            d.text(x + 48, 70, given, size=14, fill=INK)
            d.arrow(x + 48, 82, x + 48, 121, stroke=BLUE)
        if i:
            d.arrow(x - 61, 142, x - 3, 142, stroke=BLUE, width=2)
            d.text(x - 32, 128, sign, size=13, fill=BLUE)
            d.arrow(x - 4, 166, x - 62, 166, stroke=VERMILION, width=2)
            d.text(x - 32, 181, slopes[i - 1], size=13, fill=VERMILION)
    d.text(770, 238, "backward: pass the blame on", size=14, anchor="end", fill=VERMILION, weight="bold")
    d.arrow(566, 238, 488, 238, stroke=VERMILION, width=2)
    d.arrow(78, 212, 78, 272, stroke=GREEN, width=2)
    d.text(30, 290, "adjust:  w ← 3 − 0.01 · 8 = 2.92", size=15, anchor="start", fill=GREEN, weight="bold")
    d.text(290, 290, "… and predict again: the loss is smaller now.", size=14, anchor="start", fill=GREY)
    return d


def grid(
    d: Drawing, x: float, y: float, rows, *, w: float = 34, h: float = 28, fill=PALE_BLUE, stroke=BLUE
) -> None:
    """Draw a matrix as boxes, its corner at (x, y)."""
    for i, row in enumerate(rows):
        for j, entry in enumerate(row):
            d.box(x + w * j, y + h * i, w, h, entry, fill=fill, stroke=stroke, size=13, rx=0)


def shapes() -> Drawing:
    d = Drawing(800, 260, "Scalar, vector, matrix, tensor of rank 3: each is a stack of the one before")
    blank = [""] * 4
    grid(d, 72, 94, [["0.7"]])
    grid(d, 170, 94, [blank])
    grid(d, 366, 66, [blank] * 3)
    for k in (1, 0):
        d.rect(598 + 16 * k, 74 - 16 * k, 136, 84, fill="#FFFFFF", stroke=BLUE)
        grid(d, 598 + 16 * k, 74 - 16 * k, [blank] * 3)
    for x, name, shape, example in (
        (89, "scalar", "rank 0, shape ()", "a loss"),
        (238, "vector", "rank 1, shape (4,)", "one token"),
        (434, "matrix", "rank 2, shape (3, 4)", "a sentence of 3 tokens"),
        (682, "stack of matrices", "rank 3, shape (2, 3, 4)", "a batch of 2 sentences"),
    ):
        d.text(x, 186, name, size=15, weight="bold")
        d.text(x, 210, shape, size=13, fill=GREY)
        d.text(x, 234, example, size=13, fill=BLUE)
    return d


def product() -> Drawing:
    d = Drawing(
        800, 270, "Each entry of a matrix product is one row of the left times one column of the right"
    )
    left, right = [[1, 2], [3, 4], [5, 6]], [[1, 0, 2, 3], [0, 1, 1, 1]]
    out = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*right, strict=True)]
        for row in left
    ]
    grid(d, 40, 84, left, w=42, h=38)
    grid(d, 40, 122, [left[1]], w=42, h=38, fill=PALE_ORANGE, stroke=VERMILION)
    d.text(154, 141, "@", size=22)
    grid(d, 186, 103, right, w=42, h=38)
    for i in range(2):
        grid(d, 270, 103 + 38 * i, [[right[i][2]]], w=42, h=38, fill=PALE_ORANGE, stroke=VERMILION)
    d.text(386, 141, "=", size=22)
    grid(
        d,
        416,
        84,
        [[entry for entry in row] for row in out],
        w=48,
        h=38,
        fill="#FFFFFF",
        stroke=GREY,
    )
    grid(d, 512, 122, [[out[1][2]]], w=48, h=38, fill=PALE_ORANGE, stroke=VERMILION)
    d.text(626, 141, "3 · 2 + 4 · 1 = 10", size=16, anchor="start", fill=VERMILION, weight="bold")
    for x, text in (
        (82, "X: 3 tokens,\n2 numbers each"),
        (270, "W: 2 numbers in,\n4 numbers out"),
        (512, "X @ W: 3 tokens,\n4 numbers each"),
    ):
        d.text(x, 46, text, size=13)
    for x, text in ((82, "(3, 2)"), (270, "(2, 4)"), (512, "(3, 4)")):
        d.text(x, 226, text, size=15, fill=GREY, mono=True)
    d.path("M98 238 V246 H258 V238", stroke=LIGHT)
    d.text(177, 258, "must be equal", size=12, fill=GREY)
    return d


def chain() -> Drawing:
    d = Drawing(800, 200, "A nudge grows by each slope on its way: the slopes multiply")
    stations = [
        (90, "x = 2", "nudge 0.001", 3),
        (400, "u = 3 · x = 6", "nudge 0.003", 9),
        (700, "y = u · u = 36", "nudge 0.036", 108),
    ]
    for x, name, nudge, size in stations:
        d.text(x, 30, name, size=16, weight="bold")
        d.rect(x - size / 2, 64, size, 26, fill=PALE_ORANGE, stroke=VERMILION)
        d.text(x, 112, nudge, size=14, fill=VERMILION)
    for x1, x2, slope in ((150, 330, "slope 3"), (466, 634, "slope 12")):
        d.arrow(x1, 77, x2, 77, stroke=BLUE, width=2)
        d.text((x1 + x2) / 2, 60, slope, size=15, fill=BLUE, weight="bold")
    d.path("M90 132 V150 H700 V132", stroke=GREY)
    d.text(400, 174, "from x to y: 3 · 12 = 36", size=16, fill=INK, weight="bold")
    return d


PICTURES = {
    "autograd-blame": blame,
    "autograd-shapes": shapes,
    "autograd-product": product,
    "autograd-chain": chain,
}
