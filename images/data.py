"""Draw the pictures of chapter 03: from a text to batches of inputs and targets."""

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

INPUT, TARGET = (BLUE, PALE_BLUE), (ORANGE, PALE_ORANGE)
PHRASE = ["This", "is", "a", "simple", "phrase", "to", "write"]


def row(d: Drawing, x: float, y: float, labels, w: float, h: float = 30, colours=(GREY, PALE_GREY), size=13):
    """Draw boxes side by side, one a token."""
    stroke, fill = colours
    for i, label in enumerate(labels):
        d.box(x + i * w, y, w - 4, h, label, fill=fill, stroke=stroke, size=size)


def path() -> Drawing:
    d = Drawing(780, 250, "From documents to batches: join, encode, cut into windows, shuffle, stack")
    heads = ["documents", "one row of token IDs", "windows", "a batch"]
    for x, head in zip((80, 290, 490, 682), heads, strict=True):
        d.text(x, 26, head, size=14, weight="bold")
    for i, y in enumerate((58, 108, 158)):
        d.rect(30, y, 100, 38, fill=PALE_GREY, stroke=GREY)
        for line in range(3):
            d.line(
                40,
                y + 10 + 9 * line,
                120 - 26 * (line == 2) - 8 * i,
                y + 10 + 9 * line,
                stroke=LIGHT,
                width=3,
            )
    d.arrow(138, 127, 186, 127)
    ids = [818, 262, 2612, 286, 262, 1748, 6204, 262, 1468]
    for i, number in enumerate(ids):
        d.box(196 + 64 * (i % 3), 70 + 40 * (i // 3), 58, 32, number, fill="#FFFFFF", stroke=INK, size=13)
    d.arrow(392, 127, 426, 127)
    for i in range(4):
        row(d, 436, 60 + 36 * i, [""] * 4, 27, 24, INPUT)
    d.arrow(552, 127, 586, 127)
    for i in range(4):
        row(d, 596, 66 + 32 * i, [""] * 4, 20, 22, INPUT)
        row(d, 692, 66 + 32 * i, [""] * 4, 20, 22, TARGET)
    d.text(634, 54, "inputs", size=12, fill=BLUE)
    d.text(730, 54, "targets", size=12, fill=VERMILION)
    notes = [
        "joined by\n<|endoftext|>",
        "in memory, or on disk",
        "max_seq_len long,\na stride apart",
        "shuffled by a seed,\n(B, T) each",
    ]
    for x, note in zip((80, 290, 490, 682), notes, strict=True):
        d.text(x, 225, note, size=12, fill=GREY)
    return d


def visible() -> Drawing:
    d = Drawing(
        760, 270, "Each row of the sentence: words the model sees, the word to predict, words still hidden"
    )
    w, left = 92, 20
    for i in range(1, len(PHRASE)):
        y = 12 + 36 * (i - 1)
        for j, word in enumerate(PHRASE):
            if j < i:
                d.box(left + j * w, y, w - 6, 29, word, fill=PALE_BLUE, stroke=BLUE, size=14)
            elif j == i:
                d.box(
                    left + j * w, y, w - 6, 29, word, fill=PALE_ORANGE, stroke=ORANGE, size=14, weight="bold"
                )
            else:
                d.rect(left + j * w, y, w - 6, 29, fill=PALE_GREY, stroke=LIGHT, dash="4 3")
    for x, fill, stroke, name in (
        (150, PALE_BLUE, BLUE, "input so far"),
        (330, PALE_ORANGE, ORANGE, "target"),
        (470, PALE_GREY, LIGHT, "not to be seen"),
    ):
        d.rect(x, 238, 18, 18, fill=fill, stroke=stroke)
        d.text(x + 26, 247, name, size=13, anchor="start")
    return d


def shift() -> Drawing:
    d = Drawing(760, 200, "Inputs and targets are the same row, cut one token apart")
    words, w = ["In", " the", " heart", " of", " the"], 92
    d.text(96, 40, "inputs", size=15, anchor="end", fill=BLUE, weight="bold")
    d.text(96, 160, "targets", size=15, anchor="end", fill=VERMILION, weight="bold")
    row(d, 120, 24, [word.replace(" ", "·") for word in words[:-1]], w, 32, INPUT, 15)
    row(d, 120, 144, [word.replace(" ", "·") for word in words[1:]], w, 32, TARGET, 15)
    for i in range(4):
        d.arrow(120 + i * w + 44, 60, 120 + i * w + 44, 138, stroke=GREY)
        if i < 3:
            d.line(120 + (i + 1) * w + 30, 62, 120 + i * w + 62, 138, stroke=LIGHT, dash="4 3")
    d.text(508, 85, "solid: predict this", size=13, anchor="start", fill=GREY)
    d.text(508, 111, "dashed: the same token twice", size=13, anchor="start", fill=GREY)
    return d


def stride() -> Drawing:
    d = Drawing(760, 360, "Windows of four tokens with stride 1, 2 and 4 over the same nine tokens")
    w, left, y = 50, 130, 16
    row(d, left, y, range(9), w, 28, size=14)
    d.text(left - 20, y + 14, "tokens", size=14, anchor="end", weight="bold")
    y += 48
    for step, note in (
        (1, "5 windows, a token up to 4 times"),
        (2, "3 windows"),
        (4, "2 windows, no overlap"),
    ):
        starts = range(0, 5, step)
        d.text(left - 20, y + 10 * len(starts) - 2, f"stride = {step}", size=14, anchor="end", weight="bold")
        d.text(
            left + 9 * w + 12,
            y + 10 * len(starts) - 2,
            note.replace(", ", ",\n"),
            size=12,
            anchor="start",
            fill=GREY,
        )
        for start in starts:
            d.rect(left + start * w, y, 4 * w - 4, 14, fill=PALE_BLUE, stroke=BLUE)
            d.rect(left + (start + 4) * w + 2, y, w - 8, 14, fill=PALE_ORANGE, stroke=ORANGE)
            y += 20
        y += 22
    d.text(
        left,
        y + 2,
        "blue: the inputs of a window; orange: the one token more that its last target needs",
        size=12,
        anchor="start",
        fill=GREY,
    )
    return d


def batch() -> Drawing:
    d = Drawing(760, 230, "A batch stacks B windows of T tokens into one tensor of shape (B, T)")
    for i, (x, y) in enumerate(((30, 40), (150, 84), (60, 128), (180, 172))):
        row(d, x, y, [f"{i}{j}" for j in range(4)], 36, 26, INPUT, 12)
    d.text(170, 20, "windows, anywhere in the text", size=13, fill=GREY)
    d.arrow(350, 120, 430, 120)
    d.text(390, 104, "stack", size=13)
    for i in range(4):
        row(d, 480, 56 + 34 * i, [f"{i}{j}" for j in range(4)], 44, 30, INPUT, 13)
    d.line(470, 56, 470, 188, stroke=INK)
    d.text(456, 122, "B", size=16, weight="bold")
    d.line(480, 46, 652, 46, stroke=INK)
    d.text(566, 30, "T", size=16, weight="bold")
    d.text(672, 122, "one tensor,\none step", size=13, anchor="start", fill=GREY)
    return d


def documents() -> Drawing:
    d = Drawing(760, 190, "Documents joined by an end token, cut into windows that may cross a border")
    parts = [(5, PALE_BLUE, BLUE), (4, PALE_VERMILION, VERMILION), (6, PALE_GREEN, GREEN)]
    x, w = 30, 38
    for number, (n, fill, stroke) in enumerate(parts, 1):
        d.text(x + n * w / 2, 22, f"document {number}", size=13, fill=stroke, weight="bold")
        for i in range(n):
            d.rect(x + i * w, 40, w - 5, 30, fill=fill, stroke=stroke)
        d.rect(x + n * w, 40, w - 5, 30, fill=INK)
        d.text(x + n * w + (w - 5) / 2, 55, "end", size=12, fill="#FFFFFF")
        x += (n + 1) * w
    for i in range(4):
        left = 30 + i * 4 * w
        d.path(f"M{left} 84 v10 h{4 * w - 5} v-10", stroke=GREY)
        d.text(left + 2 * w, 110, f"window {i + 1}", size=13, fill=GREY)
    d.text(
        380,
        150,
        "“end” stands for <|endoftext|>. Windows 2 and 3 hold the end\nof one text and the start of another.",
        size=13,
    )
    return d


def split() -> Drawing:
    d = Drawing(
        760, 250, "Overlapping windows leak text into validation; whole documents keep them on one side"
    )
    for left, head, held_out in ((20, "split by window", (1, 4)), (400, "split by document", ())):
        d.text(left + 170, 20, head, size=15, weight="bold")
        for doc in range(2):
            whole = not held_out and doc == 1
            for i in range(3):
                chosen = whole or 3 * doc + i in held_out
                stroke, fill = TARGET if chosen else INPUT
                d.rect(left + 170 * doc + 26 * i, 56 + 30 * i, 96, 22, fill=fill, stroke=stroke)
            d.text(left + 170 * doc + 74, 44, f"document {doc + 1}", size=12, fill=GREY)
    d.text(
        190, 172, "each validation window overlaps\na training window: it was seen", size=13, fill=VERMILION
    )
    d.text(570, 172, "a validation document\nhas no window in training", size=13, fill=GREEN)
    for x, (stroke, fill), name in ((270, INPUT, "training"), (400, TARGET, "validation")):
        d.rect(x, 218, 18, 18, fill=fill, stroke=stroke)
        d.text(x + 26, 227, name, size=13, anchor="start")
    return d


PICTURES = {
    "data-path": path,
    "data-visible": visible,
    "data-shift": shift,
    "data-stride": stride,
    "data-batch": batch,
    "data-documents": documents,
    "data-split": split,
}
