"""Give every plot of the course one style and one set of colours."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

# Okabe and Ito's colour-blind-safe palette: four colours for lines, two for fills.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
QUERY, KEY, VALUE = BLUE, VERMILION, GREEN


def use_style() -> None:
    """Apply the course's style to every plot drawn from now on, sharp on any screen."""
    plt.style.use(Path(__file__).with_name("course.mplstyle"))


def label_line(line: Line2D, text: str | None = None, *, dy: float = 0) -> Annotation:
    """Write a line's name at its right end, in its colour; `dy` moves it up, in points.

    Without `text`, the line's own label is written. The plot is widened so that nothing is cut.
    """
    return line.axes.annotate(
        text or str(line.get_label()),
        (line.get_xdata()[-1], line.get_ydata()[-1]),
        xytext=(6, dy),
        textcoords="offset points",
        color=line.get_color(),
        va="center",
        fontweight="bold",
    )


def heat_map(ax: Axes, values, rows: list[str], columns: list[str], *, digits: int | None = 2) -> None:
    """Draw a matrix as coloured squares, with a name at each row and column.

    With `digits`, each square also shows its number; without, the colour alone speaks.
    """
    image = ax.imshow(values, aspect="equal")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if digits is None:
        return
    for i in range(len(rows)):
        for j in range(len(columns)):
            ink = "white" if image.norm(values[i][j]) > 0.6 else "black"
            ax.text(j, i, f"{values[i][j]:.{digits}f}", ha="center", va="center", color=ink)


class LiveCurve:
    """Draw the losses of a run at each evaluation, in one picture that grows: a watcher for `train`.

    A dot is the training loss of a step, the line is the held-out loss, both in nats a token. `floor` is the
    lowest that a model can reach.
    """

    def __init__(self, floor: float | None = None) -> None:
        self.floor, self.picture = floor, None

    def __call__(self, model, log: pd.DataFrame) -> None:
        figure = self.draw(log)
        plt.close(figure)
        if self.picture is None:
            self.picture = display(figure, display_id=True)
        else:
            self.picture.update(figure)

    def draw(self, log: pd.DataFrame) -> Figure:
        figure, ax = plt.subplots()
        ax.plot(log["step"], log["loss"], ".", color=SKY, markersize=2)
        held_out = log.dropna(subset="val_loss")
        (line,) = ax.plot(held_out["step"], held_out["val_loss"], "o-", color=BLUE)
        label_line(line, f"held out {held_out['val_loss'].iloc[-1]:.2f}", dy=8.0)
        if self.floor is not None:
            ax.axhline(self.floor, color=GREEN, linestyle=":")
            ax.text(0, self.floor, f"floor {self.floor:.2f}", color=GREEN, va="bottom")
        ax.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        return figure
