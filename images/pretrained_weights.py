"""Draw the pictures of chapter 12: from a file to a model, two files, GPT-2's layer, a block, a chat."""

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
    PALE_SKY,
    PALE_VERMILION,
    PURPLE,
    SKY,
    VERMILION,
    Drawing,
)


def road() -> Drawing:
    d = Drawing(
        800,
        276,
        "A file of named numbers is read, renamed and reordered into our model; equal logits check it",
    )
    d.box(14, 40, 168, 150, fill=PALE_ORANGE, stroke=ORANGE)
    d.text(98, 60, "a file", size=16, weight="bold")
    for i, (name, shape) in enumerate((("wte", "50257 × 768"), ("c_attn", "768 × 2304"), ("…", ""))):
        d.text(26, 92 + 34 * i, name, size=13, anchor="start", mono=True)
        d.text(172, 92 + 34 * i, shape, size=12, anchor="end", fill=GREY)
    steps = ["turn bytes into numbers", "rename", "transpose, split, reorder"]
    for i, step in enumerate(steps):
        y = 50 + 50 * i
        d.arrow(190, y + 18, 222, y + 18, stroke=ORANGE, width=2)
        d.box(226, y, 208, 38, step, fill="#FFFFFF", stroke=ORANGE, size=14)
        d.arrow(438, y + 18, 470, y + 18, stroke=ORANGE, width=2)
    d.box(476, 40, 168, 150, fill=PALE_GREEN, stroke=GREEN)
    d.text(560, 60, "our model", size=16, weight="bold")
    for i, name in enumerate(("tok_emb", "q_proj", "k_proj", "v_proj", "…")):
        d.text(560, 86 + 23 * i, name, size=13, mono=True)
    d.box(656, 92, 132, 46, "their model,\ntheir program", fill=PALE_BLUE, stroke=BLUE, size=13)
    d.text(330, 224, "a slip in any of these\nmay pass without an error", size=14, fill="#8A5F00")
    d.box(
        476,
        216,
        312,
        46,
        "same tokens in: equal logits out?",
        fill=PALE_GREY,
        stroke=INK,
        size=15,
        weight="bold",
    )
    d.arrow(560, 192, 560, 214)
    d.arrow(722, 140, 722, 214)
    return d


def band(d: Drawing, y: float, parts: list[tuple[float, str, str, str]]) -> None:
    """Draw a file as a row of parts: width, label, fill, stroke."""
    x = 20.0
    for width, label, fill, stroke in parts:
        d.rect(x, y, width, 56, fill=fill, stroke=stroke, rx=2)
        d.text(x + width / 2, y + 28, label, size=13)
        x += width


def files() -> Drawing:
    d = Drawing(
        800, 336, "safetensors: length, a header of names, numbers. GGUF: counts, metadata, a table, blocks"
    )
    d.text(20, 22, "safetensors", size=16, anchor="start", weight="bold")
    band(
        d,
        40,
        [
            (86, "8 bytes:\nlength", PALE_GREY, GREY),
            (290, "header: name, dtype, shape,\nfrom byte … to byte", PALE_BLUE, BLUE),
            (384, "the numbers, one tensor after the other", PALE_GREEN, GREEN),
        ],
    )
    d.path("M 330 98 C 360 134, 520 134, 552 100", stroke=BLUE)
    d.arrow(546, 107, 553, 99, stroke=BLUE)
    d.text(452, 138, "each name knows its place", size=13, fill=BLUE)
    d.text(20, 186, "GGUF", size=16, anchor="start", weight="bold")
    band(
        d,
        204,
        [
            (86, "24 bytes:\ncounts", PALE_GREY, GREY),
            (200, "metadata: sizes, names,\nthe whole tokenizer", PALE_PURPLE, PURPLE),
            (174, "table: name, shape,\nencoding, place", PALE_BLUE, BLUE),
            (300, "the numbers, in blocks of 32", PALE_GREEN, GREEN),
        ],
    )
    for i in range(1, 12):
        d.line(480 + 25 * i, 252, 480 + 25 * i, 260, stroke=GREEN, width=1)
    d.path("M 446 262 C 462 296, 560 296, 590 264", stroke=BLUE)
    d.arrow(584, 271, 591, 263, stroke=BLUE)
    d.text(
        20, 114, "no settings, no tokenizer:\nthey are in files beside it", size=13, anchor="start", fill=GREY
    )
    d.text(518, 308, "the same idea", size=13, fill=BLUE)
    return d


def grid(
    d: Drawing, x: float, y: float, rows: list[list[str]], colours: list[tuple[str, str]], by_row: bool
) -> None:
    """Draw a matrix of labels; a colour belongs to each row, or to each column."""
    for i, row in enumerate(rows):
        for j, label in enumerate(row):
            stroke, fill = colours[i if by_row else j]
            d.rect(x + 36 * j, y + 30 * i, 36, 30, fill=fill, stroke=stroke, rx=0)
            d.text(x + 36 * j + 18, y + 30 * i + 15, label, size=13)


def qkv() -> Drawing:
    d = Drawing(
        800,
        270,
        "GPT-2's c_attn, 2 × 6: transposed to 6 × 2, then cut into q_proj, k_proj and v_proj, 2 × 2 each",
    )
    q, k, v = (BLUE, PALE_BLUE), (VERMILION, PALE_VERMILION), (GREEN, PALE_GREEN)
    colours = [q, q, k, k, v, v]
    numbers = [[str(6 * i + j + 1) for j in range(6)] for i in range(2)]
    d.text(128, 24, "c_attn, as GPT-2 has it", size=15, weight="bold")
    grid(d, 20, 90, numbers, colours, by_row=False)
    d.text(128, 68, "columns: what comes out", size=13, fill=GREY)
    d.text(128, 170, "y = x W", size=15, mono=True)
    d.arrow(246, 120, 306, 120, width=2)
    d.text(276, 102, "transpose", size=13)
    turned = [list(column) for column in zip(*numbers, strict=True)]
    d.text(350, 24, "as nn.Linear", size=15, weight="bold")
    grid(d, 314, 42, turned, colours, by_row=True)
    d.text(350, 244, "y = x Wᵀ", size=15, mono=True)
    d.arrow(396, 132, 456, 132, width=2)
    d.text(426, 114, "cut", size=13)
    for i, (name, (stroke, _)) in enumerate((("q_proj", q), ("k_proj", k), ("v_proj", v))):
        y = 36 + 78 * i
        grid(d, 466, y, turned[2 * i : 2 * i + 2], colours[2 * i : 2 * i + 2], by_row=True)
        d.text(550, y + 30, name, size=15, anchor="start", mono=True, fill=stroke, weight="bold")
    d.text(
        640,
        136,
        "three layers of ours.\nA square matrix fits\nturned or not: only\nthe logits tell.",
        size=13,
        anchor="start",
        fill=GREY,
    )
    return d


def block() -> Drawing:
    d = Drawing(800, 300, "A block of Q4_1: 20 bytes, a scale, a minimum, and 32 whole numbers from 0 to 15")
    d.text(20, 22, "one block: 32 weights in 20 bytes", size=16, anchor="start", weight="bold")
    d.box(20, 42, 92, 46, "scale d\n2 bytes", fill=PALE_BLUE, stroke=BLUE, size=13)
    d.box(116, 42, 92, 46, "minimum m\n2 bytes", fill=PALE_VERMILION, stroke=VERMILION, size=13)
    for i in range(16):
        x = 216 + 35 * i
        d.rect(x, 42, 33, 46, fill=PALE_GREEN, stroke=GREEN, rx=2)
        d.line(x, 65, x + 33, 65, stroke=GREEN, width=1)
        d.text(x + 16.5, 53, i + 16, size=12)
        d.text(x + 16.5, 77, i, size=12)
    d.text(
        496,
        104,
        "a byte holds two: number i in its lower half, number i + 16 in the upper",
        size=13,
        fill=GREY,
    )
    d.text(20, 152, "what a number means", size=16, anchor="start", weight="bold")
    left, step, y = 110.0, 40.0, 226.0
    d.line(left, y, left + 15 * step, y, stroke=INK)
    for i in range(16):
        d.line(left + step * i, y - 6, left + step * i, y + 6, stroke=INK)
        d.text(left + step * i, y + 20, i, size=13)
    d.text(left - 10, y - 26, "m", size=16, fill=VERMILION, weight="bold")
    d.line(left, y - 16, left, y - 8, stroke=VERMILION, width=2)
    d.line(left + 5 * step, y - 16, left + 6 * step, y - 16, stroke=BLUE, width=2)
    d.text(left + 5.5 * step, y - 30, "d", size=16, fill=BLUE, weight="bold")
    d.circle(left + 11.3 * step, y, 5, fill=ORANGE, stroke=ORANGE)
    d.arrow(left + 11.3 * step, y - 22, left + 11.05 * step, y - 8, stroke=ORANGE)
    d.text(left + 11.3 * step, y - 34, "a weight goes to the nearest step", size=13)
    d.text(410, 280, "weight = d · number + m", size=16, weight="bold")
    return d


def chat() -> Drawing:
    d = Drawing(
        800, 296, "A conversation becomes one text: each message between two special tokens, with its role"
    )
    d.text(150, 24, "what you have", size=15, weight="bold")
    d.text(556, 24, "what the model reads", size=15, weight="bold")
    rows = [
        ("system", "You are a helpful …", PALE_PURPLE, PURPLE),
        ("user", "What is the capital of France?", PALE_BLUE, BLUE),
        ("assistant", "", PALE_GREEN, GREEN),
    ]
    for i, (role, content, fill, stroke) in enumerate(rows):
        y = 50 + 82 * i
        if content:
            d.box(20, y, 260, 60, fill=fill, stroke=stroke)
            d.text(32, y + 18, role, size=13, anchor="start", weight="bold", fill=stroke)
            d.text(32, y + 40, content, size=14, anchor="start")
            d.arrow(286, y + 30, 326, y + 30, width=2)
        else:
            d.text(150, y + 30, "(the answer, to come)", size=14, fill=GREY, italic=True)
        token(d, 336, y + 4, 116, "<|im_start|>")
        d.text(462, y + 16, role, size=14, anchor="start", mono=True, fill=stroke, weight="bold")
        if content:
            d.text(348, y + 44, content, size=14, anchor="start", mono=True)
            token(d, 356 + 8.45 * len(content), y + 32, 100, "<|im_end|>")
        else:
            d.rect(342, y + 32, 210, 26, fill="none", stroke=GREEN, width=1.5, dash="4 3")
            d.text(447, y + 45, "here it goes on", size=13, fill=GREEN)
            token(d, 560, y + 32, 100, "<|im_end|>", faint=True)
            d.text(668, y + 45, "it says when to stop", size=12, anchor="start", fill=GREY)
    return d


def token(d: Drawing, x: float, y: float, w: float, label: str, *, faint: bool = False) -> None:
    fill, stroke, ink = ("#FFFFFF", LIGHT, GREY) if faint else (PALE_SKY, SKY, INK)
    d.box(x, y, w, 24, label, fill=fill, stroke=stroke, size=12, mono=True)
    if faint:
        d.text(x + w / 2, y + 12, label, size=12, mono=True, fill=ink)


PICTURES = {
    "pretrained-road": road,
    "pretrained-files": files,
    "pretrained-qkv": qkv,
    "pretrained-block": block,
    "pretrained-chat": chat,
}
