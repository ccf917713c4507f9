import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
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
