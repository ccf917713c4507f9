"""Draw the pictures of chapter 14: the path, masks, LoRA, where gradients stop, a chat's window."""

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
    PURPLE,
    VERMILION,
    Drawing,
)


def path() -> Drawing:
    d = Drawing(
        800,
        250,
        "Instructions become tokens by a template; the loss counts answers alone; it trains a small adapter "
        "beside a frozen model; together they are the assistant",
    )
    d.box(14, 70, 150, 64, "instructions\nand answers", fill=PALE_GREY, stroke=GREY, size=15)
    d.arrow(166, 102, 204, 102)
    d.box(206, 70, 140, 64, "template:\nturns, tokens", fill=PALE_BLUE, stroke=BLUE, size=15)
    d.arrow(348, 102, 386, 102)
    d.rect(388, 30, 200, 144, fill="#FFFFFF", stroke=GREY)
    d.text(488, 48, "SmolLM2", size=15, weight="bold")
    d.box(402, 66, 108, 92, "frozen\nweights", fill=PALE_GREY, stroke=GREY, size=15)
    d.box(522, 66, 52, 92, "adapter\n(LoRA)", fill=PALE_ORANGE, stroke=ORANGE, size=12)
    d.arrow(590, 102, 628, 102)
    d.box(630, 70, 156, 64, "loss of the\nanswer's tokens", fill=PALE_GREEN, stroke=GREEN, size=15)
    d.line(708, 136, 708, 212, stroke=VERMILION, width=2)
    d.line(708, 212, 548, 212, stroke=VERMILION, width=2)
    d.arrow(548, 212, 548, 162, stroke=VERMILION, width=2)
    d.text(628, 230, "gradients change the adapter alone", size=14, fill=VERMILION)
    d.text(180, 200, "then: chat with both, or add\nthe adapter into the weights", size=14, fill=GREY)
    return d


def masks() -> Drawing:
    d = Drawing(
        800,
        292,
        "Three examples in one batch, inputs above targets; targets within prompts and at padding are minus "
        "100, only the answers and their end count",
    )
    rows = [
        (["say", "hello", "now", ":"], ["hello", "end"]),
        (["2", "+", "2", "is", ":"], ["4", "end"]),
        (["hi", ":"], ["hi", "you", "end"]),
    ]
    T, w = 6, 56
    for left, title in ((20, "inputs"), (424, "targets: one token later")):
        d.text(left + T * w / 2, 22, title, size=16, weight="bold")
    for i, (prompt, answer) in enumerate(rows):
        y, text = 46 + 58 * i, prompt + answer
        for t in range(T):
            x = 20 + w * t
            if t >= len(text) - 1:
                colours, word = (LIGHT, "#FFFFFF"), "pad"
            else:
                colours, word = ((BLUE, PALE_BLUE) if t < len(prompt) else (GREEN, PALE_GREEN)), text[t]
            d.rect(x, y, w - 6, 40, fill=colours[1], stroke=colours[0])
            d.text(x + (w - 6) / 2, y + 20, word, size=14, fill=GREY if word == "pad" else INK)
            x = 424 + w * t
            counts = len(prompt) <= t + 1 < len(text)
            fill, stroke = (PALE_GREEN, GREEN) if counts else ("#FFFFFF", LIGHT)
            d.rect(x, y, w - 6, 40, fill=fill, stroke=stroke, width=2 if counts else 1.2)
            d.text(
                x + (w - 6) / 2,
                y + 20,
                text[t + 1] if counts else "−100",
                size=14,
                fill=INK if counts else GREY,
            )
    for i, ((stroke, fill), name) in enumerate(
        (
            ((BLUE, PALE_BLUE), "prompt"),
            ((GREEN, PALE_GREEN), "answer"),
            ((LIGHT, "#FFFFFF"), "does not count"),
        )
    ):
        x = 210 + 140 * i
        d.rect(x, 244, 16, 16, fill=fill, stroke=stroke, rx=2)
        d.text(x + 24, 252, name, size=14, anchor="start", fill=GREY)
    return d


def low_rank() -> Drawing:
    d = Drawing(
        800,
        300,
        "A vector goes through the frozen matrix W and, beside it, through thin A and B; both are added",
    )
    d.text(34, 150, "x", size=20, italic=True)
    d.line(48, 150, 96, 150)
    d.line(96, 96, 96, 226)
    d.arrow(96, 96, 148, 96)
    d.arrow(96, 226, 148, 226)
    d.rect(150, 26, 300, 140, fill=PALE_GREY, stroke=GREY)
    d.text(300, 84, "W", size=26, weight="bold")
    d.text(300, 116, "frozen: 1536 × 576 = 884,736", size=14, fill=GREY)
    d.rect(150, 202, 190, 48, fill=PALE_ORANGE, stroke=ORANGE)
    d.text(245, 219, "A", size=18, weight="bold")
    d.text(245, 238, "8 × 576 = 4,608", size=13, fill=GREY)
    d.arrow(342, 226, 408, 226)
    d.text(374, 210, "8 numbers", size=12, fill=GREY)
    d.rect(410, 186, 48, 80, fill=PALE_ORANGE, stroke=ORANGE)
    d.text(434, 226, "B", size=18, weight="bold")
    d.text(466, 226, "1536 × 8 = 12,288", size=12, fill=GREY, anchor="start")
    d.line(452, 96, 640, 96)
    d.arrow(640, 96, 640, 134)
    d.text(606, 226, "× α/r", size=15)
    d.line(626, 226, 640, 226)
    d.arrow(640, 226, 640, 166)
    d.circle(640, 150, 14, fill="#FFFFFF")
    d.text(640, 149, "+", size=18)
    d.arrow(656, 150, 700, 150)
    d.text(718, 150, "y", size=20, italic=True)
    d.text(434, 282, "zero at the start: y is what it was", size=13, fill=VERMILION)
    return d


def blocks() -> Drawing:
    d = Drawing(
        800,
        190,
        "Thirty blocks: the forward pass goes through all; adapters stand beside the last fifteen, where the "
        "backward pass stops",
    )
    d.box(10, 70, 70, 44, "tokens", fill=PALE_GREY, stroke=GREY, size=14)
    for i in range(30):
        x = 96 + 20 * i
        d.rect(x, 66, 15, 52, fill=PALE_GREY, stroke=GREY, rx=2)
        if i >= 15:
            d.rect(x + 2, 122, 11, 18, fill=PALE_ORANGE, stroke=ORANGE, rx=2)
    d.box(712, 70, 70, 44, "loss", fill=PALE_GREEN, stroke=GREEN, size=14)
    d.arrow(96, 40, 706, 40, stroke=BLUE, width=2.5)
    d.text(246, 22, "forward: blocks 1 to 30", size=14, fill=BLUE, weight="bold")
    d.arrow(706, 160, 398, 160, stroke=VERMILION, width=2.5)
    d.text(552, 176, "backward: blocks 30 to 16", size=14, fill=VERMILION, weight="bold")
    d.line(394, 54, 394, 168, stroke=VERMILION, dash="4 3")
    d.text(240, 150, "nothing to train here,\nso no gradient is needed", size=14, fill=GREY)
    return d


def window() -> Drawing:
    d = Drawing(
        800,
        232,
        "A chat in its window: the system message stays, the oldest turn has fallen out, and the reply needs "
        "room of its own",
    )
    d.rect(150, 40, 636, 118, fill="#FFFFFF", stroke=INK, width=2, dash="6 4")
    d.text(468, 24, "what the model reads: at most max_seq_len tokens", size=15, weight="bold")
    y, h = 60, 78
    d.box(164, y, 86, h, "system:\nanswer\nbriefly", fill=PALE_PURPLE, stroke=PURPLE, size=13)
    d.box(12, y + 90, 62, 34, "user", fill=PALE_BLUE, stroke=LIGHT, size=13)
    d.box(78, y + 90, 62, 34, "reply", fill=PALE_GREEN, stroke=LIGHT, size=13)
    d.text(76, y + 144, "the oldest turn: forgotten", size=13, fill=VERMILION)
    turns = [("user", BLUE, PALE_BLUE, 74), ("reply", GREEN, PALE_GREEN, 96), ("user", BLUE, PALE_BLUE, 60)]
    turns += [("reply", GREEN, PALE_GREEN, 80), ("user", BLUE, PALE_BLUE, 84)]
    x = 258
    for name, stroke, fill, width in turns:
        d.box(x, y, width, h, name, fill=fill, stroke=stroke, size=13)
        x += width + 6
    d.rect(x, y, 90, h, fill=PALE_ORANGE, stroke=ORANGE, dash="4 3", width=2)
    d.text(x + 45, y + h / 2, "room for\nthe reply", size=13)
    d.arrow(254, 168, 156, 168, stroke=VERMILION)
    return d


PICTURES = {
    "instruction-path": path,
    "instruction-masks": masks,
    "instruction-lora": low_rank,
    "instruction-blocks": blocks,
    "instruction-chat": window,
}
