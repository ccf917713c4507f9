import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from llmlib import plots


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        plots.use_style()
        yield
        plt.close("all")


def test_the_style_gives_the_lines_the_course_colours():
    _, ax = plt.subplots()
    colours = [ax.plot([0, 1])[0].get_color() for _ in range(4)]
    assert colours == [plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE]


def test_label_line_writes_the_name_at_the_right_end_in_the_line_colour():
    _, ax = plt.subplots()
    (line,) = ax.plot([0, 5], [1, 3], label="ours")
    label = plots.label_line(line)
    assert (label.get_text(), label.xy, label.get_color()) == ("ours", (5, 3), plots.BLUE)


def test_heat_map_writes_dark_on_light_and_light_on_dark():
    _, ax = plt.subplots()
    plots.heat_map(ax, [[0.0, 1.0]], ["row"], ["left", "right"])
    assert [(t.get_text(), t.get_color()) for t in ax.texts] == [("0.00", "black"), ("1.00", "white")]


def test_a_live_curve_is_one_picture_that_grows(monkeypatch):
    shown = []

    class Picture:
        def update(self, figure):
            shown.append(("update", figure))

    def display(figure, display_id):
        shown.append(("new", figure))
        return Picture()

    monkeypatch.setattr(plots, "display", display)
    log = pd.DataFrame(
        {"step": [1, 2, 3, 4], "loss": [3.0, 2.5, 2.0, 1.5], "val_loss": [None, 2.6, None, 1.7]}
    )
    curve = plots.LiveCurve(floor=0.5)
    curve(None, log[:2])
    curve(None, log)
    assert [kind for kind, _ in shown] == ["new", "update"] and not plt.get_fignums()
    dots, held_out, floor = shown[1][1].axes[0].lines
    assert dots.get_ydata().tolist() == [3.0, 2.5, 2.0, 1.5]
    assert held_out.get_xdata().tolist() == [2, 4] and held_out.get_ydata().tolist() == [2.6, 1.7]
    assert set(floor.get_ydata()) == {0.5}
    assert len(plots.LiveCurve().draw(log).axes[0].lines) == 2
