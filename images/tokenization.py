"""Draw the pictures of chapter 02: the way from text to IDs, merging by hand, the parts of a vocabulary."""

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
    PALE_VERMILION,
    VERMILION,
    Drawing,
)

WORDS = ["Hello", "·fishmonger"]
TOKENS = [("Hello", 15496), ("·fish", 5916), ("mong", 31059), ("er", 263)]
FILLS = [(BLUE, PALE_BLUE), (ORANGE, PALE_ORANGE), (GREEN, PALE_GREEN), (VERMILION, PALE_VERMILION)]


def pipeline() -> Drawing:
    d = Drawing(
        950, 372, "GPT-2's tokenizer turns the text Hello fishmonger into four token IDs, and back into text"
    )
    left, cell = 176, 38
    steps = ["text", "1  cut by a pattern", "2  bytes", "3  merge", "4  look up the IDs"]
    rows = [26, 98, 170, 242, 314]
    for label, y in zip(steps, rows, strict=True):
        d.text(22, y + 17, label, size=14, anchor="start", fill=GREY, weight="bold")

    d.box(left, rows[0], 16 * cell, 34, "Hello fishmonger", size=16, mono=True, fill="#FFFFFF", stroke=GREY)
    start = 0
    for word in WORDS:
        x, w = left + start * cell, len(word) * cell
        d.box(x + 2, rows[1], w - 4, 34, word, size=16, mono=True, fill=PALE_GREY, stroke=GREY)
        for i, character in enumerate(word):
            byte = 32 if character == "·" else ord(character)
            d.box(
                x + i * cell + 2,
                rows[2],
                cell - 4,
                34,
                byte,
                size=12,
                mono=True,
                fill="#FFFFFF",
                stroke=LIGHT,
            )
        start += len(word)
    start = 0
    for (token, token_id), (strong, pale) in zip(TOKENS, FILLS, strict=True):
        x, w = left + start * cell, len(token) * cell
        d.box(x + 2, rows[3], w - 4, 34, token, size=16, mono=True, fill=pale, stroke=strong)
        d.box(
            x + 2, rows[4], w - 4, 34, token_id, size=16, mono=True, weight="bold", fill=pale, stroke=strong
        )
        start += len(token)
    for y in rows[:-1]:
        d.arrow(left + 8 * cell, y + 40, left + 8 * cell, y + 66, stroke=GREY)

    x = left + 16 * cell + 34
    d.path(
        f"M {x - 20} {rows[4] + 17} C {x + 50} {rows[4]}, {x + 50} {rows[0] + 30}, {x} {rows[0] + 19}",
        stroke=BLUE,
    )
    d.arrow(x + 2, rows[0] + 19.6, x - 18, rows[0] + 15, stroke=BLUE)
    d.text(x + 46, rows[2] + 17, "decode", anchor="start", size=14, fill=BLUE, weight="bold")
    return d


def merges() -> Drawing:
    d = Drawing(760, 262, "The nine bytes of abab abab become five tokens, then three, by two merges")
    left, cell = 150, 48
    rows = [
        (26, list("abab·abab"), "9 tokens", ""),
        (114, ["ab", "ab", "·", "ab", "ab"], "5 tokens", "merge a + b"),
        (202, ["abab", "·", "abab"], "3 tokens", "merge ab + ab"),
    ]
    colours = {1: ("#FFFFFF", GREY), 2: (PALE_BLUE, BLUE), 4: (PALE_ORANGE, ORANGE)}
    for y, row, count, step in rows:
        start = 0
        for token in row:
            fill, stroke = colours[len(token)]
            x, w = left + start * cell, len(token) * cell
            d.box(x + 3, y, w - 6, 38, token, size=18, mono=True, fill=fill, stroke=stroke)
            if len(token) > 1:
                for quarter in (0.25, 0.75):
                    d.line(x + w * quarter, y - 48, x + w / 2, y - 2, stroke=stroke)
            start += len(token)
        d.text(left + 9 * cell + 24, y + 19, count, size=16, anchor="start", weight="bold")
        d.text(22, y + 19, step, size=14, anchor="start", fill=GREY, weight="bold")
    return d


def vocabulary() -> Drawing:
    d = Drawing(820, 214, "A BPE vocabulary: 256 bytes, then merges, and a few special tokens")
    rows = [
        (
            52,
            "ours, on the story",
            [("256", PALE_GREY, 150), ("4", PALE_GREEN, 60), ("740 merges", PALE_BLUE, 210)],
            "1,000",
        ),
        (
            138,
            "GPT-2",
            [("256", PALE_GREY, 150), ("50,000 merges", PALE_BLUE, 290), ("1", PALE_GREEN, 60)],
            "50,257",
        ),
    ]
    d.text(245, 26, "bytes", size=13, fill=GREY)
    d.text(350, 26, "special", size=13, fill=GREEN)
    d.text(485, 26, "learned from text", size=13, fill=BLUE)
    for y, name, parts, total in rows:
        d.text(22, y + 22, name, size=15, anchor="start", weight="bold")
        x = 170
        for label, fill, w in parts:
            d.box(x, y, w, 44, label, size=16, fill=fill, stroke=GREY, rx=2)
            x += w
        d.text(x + 16, y + 22, f"= {total} tokens", size=15, anchor="start")
    d.text(22, 200, "Widths are not to scale.", size=11, anchor="start", fill=GREY, italic=True)
    return d


PICTURES = {
    "tokenization-pipeline": pipeline,
    "tokenization-merges": merges,
    "tokenization-vocabulary": vocabulary,
}
