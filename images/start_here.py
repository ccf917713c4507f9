"""Draw the pictures of the first page: the whole path, and what a language model does."""

from pathlib import Path

from images.draw import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_VERMILION,
    VERMILION,
    Drawing,
)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
STAGES = [
    (
        "Building an LLM",
        "from text to a model that guesses at random",
        (BLUE, PALE_BLUE),
        [
            "01 Tensors and autograd",
            "02 Tokenization",
            "03 Data and sampling",
            "04 Embeddings",
            "05 Attention",
            "06 GPT",
            "07 From GPT-2 to Llama",
        ],
    ),
    (
        "Foundation model",
        "from random guesses to sentences",
        (VERMILION, PALE_VERMILION),
        ["08 Pretraining", "09 Generation", "10 Evaluation", "11 Scaling laws", "12 Pretrained weights"],
    ),
    (
        "Finetuning",
        "from sentences to useful answers",
        (GREEN, PALE_GREEN),
        ["13 Classification finetuning", "14 Instruction finetuning", "15 Preference tuning"],
    ),
    (
        "Further",
        "many machines, and a look inside",
        (GREY, PALE_GREY),
        ["16 Distributed training", "17 Interpretability"],
    ),
]


def stage(
    d: Drawing, x: float, y: float, h: float, name: str, result: str, colours: tuple, chapters: list
) -> None:
    """Draw one stage; a chapter that is there today has a full number, one to come a hollow number."""
    strong, pale = colours
    d.rect(x, y, 270, h, fill=pale, stroke=strong, rx=10)
    d.text(x + 135, y + 24, name, size=18, weight="bold")
    d.text(x + 135, y + 46, result, size=12, fill=GREY, italic=True)
    for i, chapter in enumerate(chapters):
        number, title = chapter.split(" ", 1)
        middle = y + 78 + 34 * i
        is_there = bool(list(NOTEBOOKS.glob(f"{number}_*.ipynb")))
        d.rect(x + 16, middle - 14, 238, 28, fill="#FFFFFF", stroke=LIGHT)
        d.circle(x + 34, middle, 11, fill=strong if is_there else "#FFFFFF", stroke=strong)
        d.text(x + 34, middle, number, size=11, weight="bold", fill="#FFFFFF" if is_there else strong)
        d.text(x + 54, middle, title, size=14, anchor="start", fill=INK if is_there else GREY)


def path() -> Drawing:
    d = Drawing(
        920, 340, "The path of the course: building an LLM, then a foundation model, then finetuning it"
    )
    stage(d, 15, 15, 335, *STAGES[0])
    stage(d, 325, 15, 335, *STAGES[1])
    stage(d, 635, 15, 180, *STAGES[2])
    stage(d, 635, 205, 145, *STAGES[3])
    d.arrow(287, 180, 323, 180, stroke=INK, width=2.5, head=10)
    d.arrow(597, 105, 633, 105, stroke=INK, width=2.5, head=10)
    d.arrow(597, 275, 633, 275, stroke=GREY, width=2, head=9, dash="5 4")
    return d


def next_word() -> Drawing:
    d = Drawing(
        715,
        235,
        "A language model reads the words so far, gives each possible next word a probability, and repeats",
    )
    words = ["Le", "chat", "mange", "la", "souris"]
    for row, seen in enumerate((2, 3, 4)):
        y = 40 + 68 * row
        for i in range(seen):
            new = i == seen - 1 and row > 0
            d.box(20 + 76 * i, y, 68, 36, words[i], fill=PALE_VERMILION if new else PALE_BLUE, stroke=BLUE)
        d.arrow(20 + 76 * seen, y + 18, 440, y + 18, stroke=GREY)
        d.box(442, y - 4, 120, 44, "model", fill=PALE_GREY)
        d.arrow(564, y + 18, 610, y + 18, stroke=GREY)
        d.box(612, y, 80, 36, words[seen], fill=PALE_VERMILION, stroke=VERMILION, weight="bold")
        if row < 2:
            d.path(
                f"M 652 {y + 37} C 652 {y + 58}, {90 + 76 * seen} {y + 44}, {64 + 76 * seen} {y + 62}",
                stroke=VERMILION,
                dash="4 4",
            )
    d.text(230, 20, "the words so far", size=13, fill=GREY)
    d.text(652, 20, "the next word", size=13, fill=GREY)
    return d


PICTURES = {"path": path, "next-word": next_word}
