import xml.etree.ElementTree as ET

from llmlib import exercises, show
from llmlib.autograd import Value


def test_source_shows_the_code_and_its_full_name():
    html = show.source(exercises.check).data
    assert "llmlib.exercises.check" in html
    assert "untouched" in html


def test_source_shows_a_whole_module():
    assert "llmlib.show" in show.source(show).data


def test_tokens_shows_spaces_line_ends_and_ids_and_escapes_markup():
    html = show.tokens({"ours": [(" <b>", 7), ("\n", 8)]}).data
    assert "·&lt;b&gt;" in html and "↵" in html and ">7<" in html and "2 tokens" in html


def test_tokens_writes_bytes_that_are_no_text_as_numbers():
    assert "\\xc3" in show.tokens({"bytes": [(b"\xc3", 195)]}).data


def test_the_drawing_shows_each_value_once_and_each_use_of_it():
    x = Value(3.0)
    y = x * x + x
    y.backward()
    svg = ET.fromstring(show.graph(y, x=x).data)
    tag = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in svg.iter(f"{tag}text")]
    assert len(list(svg.iter(f"{tag}path"))) == 4
    assert len(list(svg.iter(f"{tag}rect"))) == 1 + 3
    assert texts.count("×3") == 2
    assert {"x", "3", "grad 7", "[×]", "[+]"} <= set(texts)


def test_no_two_values_of_a_drawing_overlap():
    a, b = Value(2.0), Value(3.0)
    svg = ET.fromstring(show.graph((a + b) * (a * b)).data)
    tag = "{http://www.w3.org/2000/svg}rect"
    corners = [(float(r.get("x")), float(r.get("y"))) for r in svg.iter(tag) if r.get("width") == "80"]
    for i, (x1, y1) in enumerate(corners):
        assert all(abs(x1 - x2) >= 80 or abs(y1 - y2) >= 62 for x2, y2 in corners[:i])
