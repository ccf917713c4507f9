"""Draw the pictures of chapter 10: the ladder from loss to bits per byte, choices, the bootstrap."""

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


def ladder() -> Drawing:
    d = Drawing(
        800, 250, "Three tokens cost 6 bits: 2 bits a token, a perplexity of 4, 0.86 bits for each byte"
    )
    tokens = [("the", "½", "1 bit"), ("·ca", "¼", "2 bits"), ("t", "⅛", "3 bits")]
    for i, (token, p, bits) in enumerate(tokens):
        x = 20 + 92 * i
        d.box(x, 70, 80, 38, token, fill=PALE_GREY, stroke=GREY, size=16)
        d.text(x + 40, 50, f"p = {p}", size=14)
        d.text(x + 40, 128, bits, size=14, fill=BLUE, weight="bold")
    d.text(152, 22, "what the model gave the right tokens", size=14)
    d.text(152, 160, "together 6 bits", size=15, fill=BLUE, weight="bold")
    d.arrow(300, 96, 382, 62, stroke=ORANGE, width=2)
    d.text(322, 58, "÷ 3 tokens", size=14, fill="#8A5F00")
    d.box(386, 36, 170, 50, "loss\n2 bits = 1.39 nats", fill=PALE_ORANGE, stroke=ORANGE, size=15)
    d.arrow(558, 61, 618, 61, stroke=ORANGE, width=2)
    d.text(588, 44, "exp", size=14, fill="#8A5F00")
    d.box(622, 36, 160, 50, "perplexity 4", fill=PALE_ORANGE, stroke=ORANGE, size=15)
    d.arrow(300, 134, 382, 172, stroke=GREEN, width=2)
    d.text(322, 184, "÷ 7 bytes", size=14, fill=GREEN)
    d.box(386, 148, 170, 50, "0.86 bits per byte", fill=PALE_GREEN, stroke=GREEN, size=15)
    d.text(584, 104, "changes with the tokenizer", size=14, fill="#8A5F00")
    d.text(584, 218, "the same for every tokenizer", size=14, fill=GREEN)
    return d


def choices() -> Drawing:
    d = Drawing(
        800, 262, "The question is read once; each of four choices follows it, and the likeliest is chosen"
    )
    d.text(185, 40, "the prompt: read once, its keys and values kept", size=14, fill=GREY)
    for i, word in enumerate(["What", "do cows", "eat", "? Answer:"]):
        d.box(20 + 88 * i, 108, 80, 40, word, fill=PALE_BLUE, stroke=BLUE, size=15)
    rows = [
        (["a", "hat"], "−9.0", "−1.80", False),
        (["a", "stone"], "−9.8", "−1.40", False),
        (["the", "sea"], "−8.4", "−1.20", False),
        (["much", "grass"], "−5.0", "−0.50", True),
    ]
    d.text(480, 22, "the choices", size=14, fill=GREY)
    d.text(610, 22, "log p", size=14, fill=GREY)
    d.text(710, 22, "÷ bytes", size=14, fill=GREY)
    for row, (words, log_p, score, best) in enumerate(rows):
        y = 44 + 54 * row
        stroke, fill = (GREEN, PALE_GREEN) if best else (GREY, PALE_GREY)
        d.line(366, 128, 416, y + 20, stroke=stroke, width=2 if best else 1.5)
        for i, word in enumerate(words):
            d.box(418 + 66 * i, y, 60, 40, word, fill=fill, stroke=stroke, size=15)
        weight = "bold" if best else "normal"
        d.text(610, y + 20, log_p, size=15, weight=weight)
        d.text(710, y + 20, score, size=15, weight=weight)
        if best:
            d.text(770, y + 20, "✓", size=20, fill=GREEN, weight="bold")
    return d


def bootstrap() -> Drawing:
    d = Drawing(
        800,
        270,
        "Ten items, six right; samples of ten drawn from them again have other shares, and these spread",
    )
    right = [1, 1, 0, 1, 0, 1, 1, 0, 0, 1]
    draws = [[3, 0, 8, 3, 5, 9, 1, 6, 2, 5], [7, 4, 4, 0, 2, 8, 6, 9, 7, 1], [2, 2, 5, 6, 0, 9, 4, 3, 3, 7]]

    def row(y: float, numbers: list[int], label: str) -> None:
        d.text(16, y + 15, label, size=14, anchor="start")
        for i, n in enumerate(numbers):
            fill, stroke = (PALE_GREEN, GREEN) if right[n] else (PALE_VERMILION, VERMILION)
            d.box(110 + 34 * i, y, 30, 30, n + 1, fill=fill, stroke=stroke, size=13)
        share = sum(right[n] for n in numbers) / len(numbers)
        d.text(476, y + 15, f"{100 * share:.0f} %", size=15, weight="bold")

    row(40, [*range(10)], "the items")
    d.text(280, 20, "green: answered rightly", size=13, fill=GREY)
    d.line(16, 88, 500, 88, stroke=LIGHT)
    for i, numbers in enumerate(draws):
        row(104 + 46 * i, numbers, f"sample {i + 1}")
    d.text(280, 252, "drawn with replacement: some come twice, some not at all", size=13, fill=GREY)
    d.arrow(508, 160, 548, 160, stroke=BLUE, width=2)
    heights = [4, 12, 32, 64, 90, 76, 46, 20, 6]  # of the shares 0.2, 0.3, … 1.0
    for i, height in enumerate(heights):
        inside = 1 <= i <= 7
        d.rect(
            562 + 24 * i, 200 - height, 20, height, fill=PALE_BLUE if inside else "#FFFFFF", stroke=BLUE, rx=1
        )
    d.line(556, 200, 782, 200, stroke=GREY)
    d.line(586, 214, 750, 214, stroke=BLUE, width=3)
    d.text(668, 232, "the middle 95 %: the error bar", size=14, fill=BLUE, weight="bold")
    d.text(668, 84, "10,000 samples", size=14, fill=GREY)
    return d


PICTURES = {
    "evaluation-ladder": ladder,
    "evaluation-choices": choices,
    "evaluation-bootstrap": bootstrap,
}
