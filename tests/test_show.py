from llmlib import exercises, show


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
