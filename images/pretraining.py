"""Draw the pictures of chapter 08: the training loop, a batch that asks for recall, a kept checkpoint."""

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

STORY = ["Mia", "had", "a", "drum", ".", "One", "day", "the", "drum", "was", "gone", ".", "Mia"]
WHOLE, HALF, GONE = (GREEN, PALE_GREEN), (ORANGE, PALE_ORANGE), (LIGHT, "#FFFFFF")


def station(
    d: Drawing, x: float, y: float, name: str, note: str, colours: tuple[str, str], mono: bool = False
) -> None:
    """Draw a box of the loop: what it is, and below its shape, or a word on it."""
    stroke, fill = colours
    d.rect(x, y, 140, 56, fill=fill, stroke=stroke)
    d.text(x + 70, y + 19, name, size=15, weight="bold")
    d.text(x + 70, y + 40, note, size=13, fill="#444444", mono=mono)


def loop() -> Drawing:
    d = Drawing(
        800, 388, "The training loop: from a batch to a step of the optimizer, and on with new weights"
    )
    forward, backward, update = (BLUE, PALE_BLUE), (VERMILION, PALE_VERMILION), (ORANGE, PALE_ORANGE)
    left = [16, 225, 435, 644]
    top, bottom = 16, 236
    station(d, left[0], top, "batch", "(B, T)", (GREY, PALE_GREY), mono=True)
    station(d, left[1], top, "logits", "(B, T, V)", forward, mono=True)
    station(d, left[2], top, "loss", "one number", forward)
    station(d, left[3], top, "gradients", "one per weight", backward)
    station(d, left[3], bottom, "clip", "length at most 1", backward)
    station(d, left[2], bottom, "rate", "from the schedule", update)
    station(d, left[1], bottom, "step", "by the optimizer", update)
    for i in range(3):
        d.arrow(left[i] + 142, top + 28, left[i + 1] - 2, top + 28)
    d.text((left[0] + 140 + left[1]) / 2, top + 14, "model", size=12, fill=GREY)
    d.text((left[2] + 140 + left[3]) / 2, top + 14, "backward", size=12, fill=GREY)
    d.arrow(left[3] + 70, top + 58, left[3] + 70, bottom - 2)
    for i in (3, 2):
        d.arrow(left[i] - 2, bottom + 28, left[i - 1] + 142, bottom + 28)
    # The weights: read on the way to the logits, changed by the step.
    d.box(left[1], 136, 140, 38, "weights", fill=PALE_GREEN, stroke=GREEN, size=15, weight="bold")
    d.arrow(left[1] + 70, 134, left[1] + 70, top + 58, stroke=GREEN, width=2)
    d.text(left[1] + 80, 104, "used", size=13, anchor="start", fill=GREEN)
    d.arrow(left[1] + 70, bottom - 2, left[1] + 70, 176, stroke=GREEN, width=2)
    d.text(left[1] + 80, 206, "changed", size=13, anchor="start", fill=GREEN)
    # The schedule: up in a line, down along half a cosine wave.
    x, y = left[2] + 15, bottom - 12
    d.path(f"M{x} {y - 74} V{y} H{x + 112}", stroke=GREY, width=1)
    d.path(f"M{x} {y} l20 -64 c32 0 56 64 88 64", stroke=ORANGE, width=2)
    # Back to the start.
    d.path(f"M{left[1] - 2} {bottom + 28} H{left[0] + 70} V{top + 66}")
    d.arrow(left[0] + 70, top + 66, left[0] + 70, top + 58)
    d.text(left[0] + 80, 155, "the next\nbatch meets\nnew weights", size=13, anchor="start")
    # Beside the loop.
    d.arrow(left[1] + 70, bottom + 58, left[1] + 70, 328, stroke=PURPLE, width=2, dash="4 3")
    d.text(left[1] + 80, 310, "now and then", size=13, anchor="start", fill=GREY)
    d.box(left[1] - 20, 330, 180, 42, "evaluate and save", fill=PALE_PURPLE, stroke=PURPLE, size=15)
    return d


def recall() -> Drawing:
    d = Drawing(
        800, 290, "In a recall batch two targets count, drum and Mia; both stand earlier in the story"
    )
    left, w, inputs, targets = 82, 59.5, 128, 206
    asked = {7: 3, 11: 0}  # where the target is asked for, and where the word stood before
    d.text(left - 10, inputs + 17, "inputs", size=15, anchor="end", fill=BLUE, weight="bold")
    d.text(left - 10, targets + 17, "targets", size=15, anchor="end", fill=VERMILION, weight="bold")
    for i in range(12):
        x = left + w * i
        found = i in asked.values()
        stroke, fill = (GREEN, PALE_GREEN) if found else (BLUE, PALE_BLUE)
        weight = "bold" if found else "normal"
        d.box(
            x, inputs, w - 5, 34, STORY[i], fill=fill, stroke=stroke, width=2 if found else 1.2, weight=weight
        )
        if i in asked:
            d.box(
                x, targets, w - 5, 34, STORY[i + 1], fill=PALE_ORANGE, stroke=ORANGE, width=2, weight="bold"
            )
        else:
            d.rect(x, targets, w - 5, 34, fill=PALE_GREY, stroke=LIGHT)
            d.text(x + (w - 5) / 2, targets + 17, "−100", size=13, fill=GREY)
    for (now, before), height in zip(asked.items(), (64, 124), strict=True):
        x, back = (left + w * i + (w - 5) / 2 for i in (now, before))
        y = inputs - 3
        d.path(
            f"M{x:g} {y} C{x:g} {y - height} {back:g} {y - height} {back:g} {y - 6}", stroke=GREEN, width=2
        )
        d.arrow(back, y - 8, back, y, stroke=GREEN, width=2, head=8)
        d.text((x + back) / 2, y - 0.75 * height - 13, f"look back: “{STORY[before]}”", size=13, fill=GREEN)
        d.arrow(x, inputs + 36, x, targets - 3, stroke=ORANGE, width=2)
        d.text(x - 9, (inputs + 34 + targets) / 2, "predict", size=13, anchor="end", fill="#8A5F00")
    for x, stroke, fill, name in (
        (left, ORANGE, PALE_ORANGE, "counts: a rare word that stands in the text already"),
        (left + 385, LIGHT, PALE_GREY, "left out: a new word, or a frequent one"),
    ):
        d.rect(x, 260, 18, 18, fill=fill, stroke=stroke)
        d.text(x + 26, 269, name, size=13, anchor="start")
    return d


def folder(d: Drawing, x: float, y: float, name: str, colours: tuple[str, str], files: float = 3) -> None:
    """Draw a folder of three files; of the file being written, a part."""
    stroke, fill = colours
    ink = "#8C8C8C" if colours == GONE else INK
    dash = None if colours == WHOLE else "4 3"
    d.path(
        f"M{x} {y + 66} v-76 h54 l8 10 h94 v66 z",
        fill=fill,
        stroke=GREY if colours == GONE else stroke,
        dash=dash,
    )
    d.text(x + 78, y + 20, name, size=14, mono=True, fill=ink)
    for i, file in enumerate(("model", "state", "log")):
        part = max(0, min(1, files - i))
        left = x + 9 + 47 * i
        d.rect(left, y + 38, 44, 20, fill="#FFFFFF", stroke=LIGHT, rx=2)
        if part and colours != GONE:
            d.rect(left, y + 38, 44 * part, 20, fill="#FFFFFF" if part == 1 else stroke, stroke=stroke, rx=2)
        if part == 1:
            d.text(left + 22, y + 48, file, size=12, fill=ink)


def checkpoint() -> Drawing:
    d = Drawing(800, 352, "A checkpoint is written beside the old one, then renamed; the old one goes last")
    old, new, high, low = "step-0000200", "step-0000400", 66, 192
    stages = [("train", old), ("write beside it", old), ("rename", new), ("remove the old", new)]
    for i, (stage, left_whole) in enumerate(stages):
        x = 8 + 199.5 * i
        d.rect(x, 8, 185, 336, fill="#FFFFFF", stroke=LIGHT, rx=8)
        d.text(x + 92.5, 32, f"{i + 1}. {stage}", size=16, weight="bold")
        d.line(x, 276, x + 185, 276, stroke=LIGHT)
        d.text(x + 92.5, 297, "killed here, go on from", size=13)
        d.text(x + 92.5, 321, left_whole, size=15, mono=True, fill=GREEN, weight="bold")
        if i < 3:
            d.arrow(x + 186, 155, x + 199, 155)
    for i in range(3):
        folder(d, 22.5 + 199.5 * i, high, old, WHOLE)
    folder(d, 621, high, old, GONE, 1)
    d.text(100.5, low + 28, "training goes on,\nto step 400", size=13, fill=GREY)
    folder(d, 222, low, "unfinished", HALF, 1.5)
    folder(d, 421.5, low, new, WHOLE)
    folder(d, 621, low, new, WHOLE)
    # The rename: the name that goes, and the one that comes.
    d.text(500, 152, "unfinished", size=13, mono=True, fill="#8A5F00")
    d.line(456, 153, 544, 153, stroke="#8A5F00")
    d.arrow(500, 164, 500, 189, stroke=ORANGE, width=2)
    return d


PICTURES = {
    "pretraining-loop": loop,
    "pretraining-recall": recall,
    "pretraining-checkpoint": checkpoint,
}
