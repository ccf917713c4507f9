"""Hold the whole project to its house rules: staircase, notebooks, pictures, README."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from images.build import pictures

ROOT = Path(__file__).parents[1]
# A step may import only the steps before it.
STAIRCASE = [
    "autograd",
    "tokenization",
    "data",
    "embeddings",
    "attention",
    "gpt",
    "llama",
    "pretraining",
    "generation",
    "evaluation",
    "scaling_laws",
    "pretrained_weights",
    "classification_finetuning",
    "instruction_finetuning",
    "preference_tuning",
    "distributed_training",
    "interpretability",
]
BESIDE = {"resources", "tales", "plots", "show", "exercises"}
MODULES = sorted((ROOT / "llmlib").glob("[!_]*.py"))
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
NOTEBOOKS = CHAPTERS + SOLUTIONS
STEPS = [path for path in CHAPTERS if not path.stem.startswith("00")]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def code(path: Path) -> str:
    """Join the Python of a notebook; a line of IPython's own (%time, !ls) is no Python and is left out."""
    lines = "\n".join(cell.source for cell in cells(path, "code")).split("\n")
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def imported_steps(python: str) -> set[str]:
    """Name the modules of llmlib that a piece of Python imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(python)):
        assert not getattr(node, "level", 0), "import from llmlib by its full name"
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llmlib.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "llmlib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmlib."):
            found.add(node.module.split(".")[1])
    return found


def text_outputs(path: Path) -> str:
    """Join all that the code cells print or show as text."""
    parts = []
    for cell in cells(path, "code"):
        for output in cell.outputs:
            parts.append(output.get("text", ""))
            parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


# ---- the staircase ----


def test_every_module_has_its_place():
    assert {path.stem for path in MODULES} <= set(STAIRCASE) | BESIDE


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_a_module_imports_only_steps_above_it(path):
    above = set(STAIRCASE[: STAIRCASE.index(path.stem)]) if path.stem in STAIRCASE else set()
    assert imported_steps(path.read_text(encoding="utf-8")) <= above | BESIDE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_imports_only_steps_up_to_its_own(path):
    number, _, name = path.stem.partition("_")
    if number == "00":
        return
    assert name == STAIRCASE[int(number) - 1]
    assert imported_steps(code(path)) <= set(STAIRCASE[: int(number)]) | BESIDE


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_a_module_opens_with_one_sentence(path):
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert re.fullmatch(r"[A-Z][^.]*(\.\S[^.]*)*\.", first), (
        f"the first line should be one sentence: {first!r}"
    )


# ---- notebooks ----


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_saved_as_it_ran(path):
    ran = [cell for cell in cells(path, "code") if cell.source.strip()]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert not [output for cell in ran for output in cell.outputs if output.output_type == "error"]
    metadata = nbformat.read(path, as_version=4).metadata
    assert set(metadata) == {"kernelspec", "language_info"}
    assert dict(metadata.language_info) == {"name": "python"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_prints_no_warning_and_no_path(path):
    printed = text_outputs(path)
    assert "Warning" not in printed
    assert str(ROOT) not in printed and str(Path.home()) not in printed
    assert not re.search(r"(^|[\s'\"(=])(/(home|root|tmp|usr|var|Users|private)/|[A-Z]:\\)", printed)


@pytest.mark.parametrize("path", STEPS, ids=by_name)
def test_a_chapter_keeps_the_rhythm(path):
    code_lines = sorted(len(cell.source.split("\n")) for cell in cells(path, "code"))
    words = [len(cell.source.split()) for cell in cells(path, "markdown")]
    assert 60 <= len(code_lines) + len(words) <= 110
    assert statistics.median(code_lines) <= 5
    assert code_lines[int(0.9 * (len(code_lines) - 1))] <= 15
    assert code_lines[-1] <= 30
    assert 20 <= statistics.median(words) <= 60
    assert max(words) <= 120


@pytest.mark.parametrize("path", STEPS, ids=by_name)
def test_a_chapter_has_its_parts(path):
    markdown = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    assert 5 <= markdown.count("<details>") <= 8, "check questions"
    assert 3 <= len(re.findall(r"\*\*Exercise \d", markdown)) <= 4
    assert "source(" in code(path), "the finished code"
    assert (
        len([cell for cell in cells(path, "code") if "nbval-check-output" in cell.metadata.get("tags", [])])
        >= 5
    )


@pytest.mark.parametrize("path", STEPS, ids=by_name)
def test_a_chapter_defines_nothing_that_the_library_has(path):
    name = path.stem[3:]
    module = ast.parse((ROOT / "llmlib" / f"{name}.py").read_text(encoding="utf-8"))
    definitions = ast.FunctionDef | ast.ClassDef
    finished = {node.name for node in module.body if isinstance(node, definitions)}
    assert not finished & {node.name for node in ast.parse(code(path)).body if isinstance(node, definitions)}


@pytest.mark.parametrize("path", CHAPTERS, ids=by_name)
def test_every_exercise_waits_in_the_chapter_and_is_solved_in_the_solutions(path):
    stubs = re.findall(r"^check\((\w+)\)", code(path), flags=re.M)
    for stub in stubs:
        assert f"○ {stub} is waiting for you" in text_outputs(path)
    solutions = path.parent / "solutions" / path.name
    if not stubs:
        assert not solutions.exists()
        return
    assert re.findall(r"^check\((\w+)\)", code(solutions), flags=re.M) == stubs
    for stub in stubs:
        assert f"✓ {stub}: all checks passed" in text_outputs(solutions)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_the_prose_keeps_to_plain_words(path):
    markdown = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert not re.findall(r"\b(?:simply|just|obviously|of course|easy|easily)\b", markdown, flags=re.I)
    prose = re.sub(r"`[^`]*`|\$[^$]*\$|!\[|<!--.*?-->|\"[^\"]*\"|“[^”]*”", "", markdown)
    assert "!" not in prose


# ---- pictures ----


def test_every_picture_is_rebuilt_byte_for_byte():
    drawn = {f"{name}.svg": draw().svg() for name, draw in pictures().items()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "images").glob("*.svg")}
    assert drawn.keys() == kept.keys(), "run python -m images.build, and remove what it no longer draws"
    assert drawn == kept


@pytest.mark.parametrize("path", sorted((ROOT / "images").glob("*.svg")), ids=by_name)
def test_a_picture_has_a_title_and_a_white_ground_and_keeps_its_text(path):
    svg = path.read_text(encoding="utf-8")
    assert re.search(r"<title>[^<]{10,}</title>", svg)
    assert 'fill="#FFFFFF"' in svg.split("\n")[2]
    assert "<text" in svg


def all_pages() -> dict[str, str]:
    """Return the text of every notebook and of the README."""
    pages = {by_name(path): "\n".join(cell.source for cell in cells(path, "markdown")) for path in NOTEBOOKS}
    return pages | {"README.md": README}


def shown_pictures() -> list[tuple[str, str, str]]:
    """List every picture that a page shows: page, alt text, address."""
    pages = all_pages()
    return [
        (page, *found)
        for page, text in pages.items()
        for found in re.findall(r"!\[([^]]*)\]\(([^)]*)\)", text)
    ]


def test_every_picture_shown_exists_and_has_an_alt_text():
    for page, alt, address in shown_pictures():
        assert len(alt) >= 10, f"{page}: {address} needs an alt text"
        assert (ROOT / page).parent.joinpath(address).is_file(), f"{page} shows {address}, which is not there"


def test_every_picture_is_shown_somewhere():
    shown = {Path(address).name for _, _, address in shown_pictures()}
    assert {f"{name}.svg" for name in pictures()} <= shown


# ---- README and layout ----


def test_the_readme_table_lists_what_is_there():
    listed = re.findall(r"^\| *(\d\d) *\| *\[[^]]+\]\(notebooks/([\w.]+)\)", README, flags=re.M)
    assert [name for _, name in listed] == [path.name for path in CHAPTERS]
    assert all(name.startswith(number) for number, name in listed)


def test_every_local_link_of_a_page_leads_somewhere():
    for page, text in all_pages().items():
        for address in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)[^)]*\)", text):
            if "://" not in address:
                assert (ROOT / page).parent.joinpath(address).exists(), f"{page} links to {address}"


SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_python_snippet_of_the_readme_runs(snippet):
    ran = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    promised = re.findall(r"^print\(.*#\s*(.+)$", snippet, flags=re.M)
    assert ran.stdout.split("\n")[:-1] == promised


@pytest.mark.skipif(not TRACKED, reason="not a git clone")
def test_the_top_level_holds_what_the_layout_names():
    layout = {"README.md", "requirements.txt", "pyproject.toml", "LICENSE"}
    layout |= {"notebooks", "llmlib", "images", "data", "tests"}
    assert {path.split("/")[0] for path in TRACKED if not path.startswith(".")} <= layout


@pytest.mark.skipif(not TRACKED, reason="not a git clone")
def test_data_readme_names_every_file():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name in {path.split("/")[1] for path in TRACKED if path.startswith("data/")} - {"README.md"}:
        assert f"`{name}" in readme, f"data/README.md does not say what {name} is"


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted[-1] == "-e ."
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; python_version .*)?", line) for line in wanted[:-1])


@pytest.mark.parametrize(
    "command", [["check"], ["format", "--check", "llmlib", "tests", "images"]], ids=lambda c: c[0]
)
def test_ruff_is_content(command):
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
