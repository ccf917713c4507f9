"""Test the launcher in tiny folders: real virtual environments, and a pip that the tests write."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "llmlib" / "__main__.py"
NO_PYTHON = "Making .venv anew: its Python or its pip does not work."


def copy_launcher(folder):
    (folder / "llmlib").mkdir()
    (folder / "requirements.txt").write_text("# nothing yet\n")
    return Path(shutil.copy(SOURCE, folder / "llmlib" / "__main__.py"))


def load(path):
    spec = importlib.util.spec_from_file_location("launcher", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pip(launcher, code):
    """Give .venv a pip that runs `code`."""
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([launcher.PYTHON, "-c", purelib], capture_output=True, text=True, check=True)
    package = Path(site.stdout.strip()) / "pip"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(code)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """The launcher of a folder of its own, where making .venv takes no second and pip only leaves a trace."""
    launcher = load(copy_launcher(tmp_path))

    def make_venv():
        command = [launcher.base_python(), "-m", "venv", "--without-pip", str(launcher.VENV)]
        subprocess.run(command, check=True)
        launcher.write_stamp(launcher.UNFINISHED)
        write_pip(launcher, "import sys; open('pip-ran', 'a').write(' '.join(sys.argv[1:]) + '\\n')")

    monkeypatch.setattr(launcher, "real_make_venv", launcher.make_venv, raising=False)
    monkeypatch.setattr(launcher, "make_venv", make_venv)
    monkeypatch.setattr(launcher, "hand_over", lambda arguments, **variables: (arguments, variables))
    return launcher


def pip_runs(launcher):
    trace = launcher.ROOT / "pip-ran"
    return trace.read_text().splitlines() if trace.exists() else []


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 9)])
def test_an_old_python_gets_one_line(version, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(
        SystemExit, match=rf"^The course needs Python 3\.10 .* this is Python {version[0]}\.{version[1]}\."
    ):
        load(SOURCE)


def test_old_pythons_can_parse_the_launcher():
    too_new = (
        ast.JoinedStr,
        ast.AnnAssign,
        ast.NamedExpr,
        ast.Match,
        ast.Starred,
        ast.Nonlocal,
        ast.YieldFrom,
    )
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        assert not isinstance(node, too_new), ast.unparse(node)
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.args
            assert node.returns is None and not any(argument.annotation for argument in arguments)
            assert not node.args.kwonlyargs
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            assert not node.keywords
    assert SOURCE.read_text().isascii()


def test_help_names_each_command_and_makes_nothing(launcher, capsys):
    assert launcher.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("llmlib test", "llmlib fetch", "--no-browser"))
    assert not launcher.VENV.exists()


def test_an_unknown_command_gets_one_line(launcher):
    with pytest.raises(SystemExit, match=r"^There is no command 'tset': try test, fetch, --help"):
        launcher.main(["tset"])
    assert not launcher.VENV.exists()


def test_the_first_run_installs_and_the_second_does_not(launcher, capsys):
    launcher.main(["test"])
    assert [run.split()[-3:] for run in pip_runs(launcher)] == [["install", "-r", "requirements.txt"]]
    assert launcher.is_ready()
    assert "anew" not in capsys.readouterr().out
    launcher.main(["fetch"])
    assert len(pip_runs(launcher)) == 1
    assert capsys.readouterr().out == ""


def test_new_requirements_are_installed_into_the_same_venv(launcher, capsys):
    launcher.main(["test"])
    (launcher.VENV / "mark").touch()
    (launcher.ROOT / "requirements.txt").write_text("# another\n")
    assert not launcher.is_ready()
    launcher.main(["test"])
    assert len(pip_runs(launcher)) == 2
    assert launcher.is_ready()
    assert (launcher.VENV / "mark").exists()


def test_a_venv_from_another_hand_is_completed(launcher):
    launcher.make_venv()
    launcher.STAMP.unlink()
    (launcher.VENV / "mark").touch()
    launcher.main(["test"])
    assert len(pip_runs(launcher)) == 1
    assert (launcher.VENV / "mark").exists()


def test_a_copied_folder_is_installed_again(launcher, tmp_path_factory):
    launcher.main(["test"])
    copy = tmp_path_factory.mktemp("copy") / "course"
    shutil.copytree(launcher.ROOT, copy, symlinks=True)
    assert not load(copy / "llmlib" / "__main__.py").is_ready()


def empty_folder(launcher):
    shutil.rmtree(launcher.VENV)
    launcher.VENV.mkdir()


def a_file(launcher):
    shutil.rmtree(launcher.VENV)
    launcher.VENV.touch()


def link_to_nothing(launcher):
    shutil.rmtree(launcher.VENV)
    launcher.VENV.symlink_to(launcher.ROOT / "nowhere")


def no_python(launcher):
    launcher.PYTHON.unlink()


def dangling_python(launcher):
    launcher.PYTHON.unlink()
    launcher.PYTHON.symlink_to(launcher.ROOT / "no-such-python")


def python_that_does_not_run(launcher):
    launcher.PYTHON.unlink()
    launcher.PYTHON.write_bytes(b"\0")


def python_of_no_venv(launcher):
    (launcher.VENV / "pyvenv.cfg").unlink()


def no_pip(launcher):
    for package in launcher.VENV.rglob("pip"):
        shutil.rmtree(package)


BREAKAGES = [
    empty_folder,
    a_file,
    link_to_nothing,
    no_python,
    dangling_python,
    python_that_does_not_run,
    python_of_no_venv,
    no_pip,
]


@pytest.mark.parametrize("break_it", BREAKAGES)
def test_a_broken_venv_is_made_anew(launcher, break_it, capsys):
    launcher.main(["test"])
    capsys.readouterr()
    break_it(launcher)
    assert not launcher.is_ready()
    launcher.main(["test"])
    assert capsys.readouterr().out.splitlines()[0] == NO_PYTHON
    assert launcher.is_ready()


def test_an_interrupted_installation_is_made_anew(launcher, capsys):
    launcher.make_venv()
    launcher.main(["test"])
    assert capsys.readouterr().out.startswith("Making .venv anew: its installation was interrupted.\n")
    assert launcher.is_ready()


@pytest.mark.parametrize(
    "printed, line, shown",
    [
        ("Retrying (Retry(total=4)) after connection broken", "^The package index does not answer", False),
        ("[Errno 28] No space left on device", "^The disk is full: free some gigabytes", False),
        ("No matching distribution found", "^pip could not install the packages; the reason stands", True),
    ],
)
def test_a_failing_pip_gets_one_line_and_leaves_no_stamp(launcher, printed, line, shown, capfd):
    launcher.make_venv()
    launcher.STAMP.unlink()
    write_pip(launcher, f"import sys; sys.exit({printed!r})")
    with pytest.raises(SystemExit, match=line + r".*run the same command again\.$"):
        launcher.main(["test"])
    assert launcher.read_stamp() == launcher.UNFINISHED
    assert (printed in capfd.readouterr().err) == shown


def test_a_python_without_venv_gets_one_line(launcher, monkeypatch):
    monkeypatch.setattr(launcher, "make_venv", launcher.real_make_venv)
    monkeypatch.setattr(
        launcher.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name
    )
    with pytest.raises(SystemExit, match=r"^This Python has no venv module: .*apt install python3\.\d+-venv"):
        launcher.main(["test"])
    assert not launcher.VENV.exists()


def test_make_venv_marks_the_venv_before_it_makes_it(launcher, monkeypatch):
    def killed(failure, command):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "make_venv", launcher.real_make_venv)
    monkeypatch.setattr(launcher, "run_step", killed)
    with pytest.raises(SystemExit, match=r"^Stopped\. To go on, run the same command again\.$"):
        launcher.main(["test"])
    assert launcher.read_stamp() == launcher.UNFINISHED


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device"), "^The disk is full: free some gigabytes"),
        (PermissionError(13, "Permission denied", ".venv"), "^The installation failed: .*Permission denied"),
    ],
)
def test_an_error_of_the_system_gets_one_line(launcher, monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr(launcher, "make_venv", fail)
    with pytest.raises(SystemExit, match=line):
        launcher.main(["test"])


def test_the_interpreter_that_makes_the_venv_stands_outside_it(launcher):
    launcher.make_venv()
    load_and_print = (
        "import importlib.util as u; s = u.spec_from_file_location('launcher', 'llmlib/__main__.py');"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.base_python())"
    )
    command = [launcher.PYTHON, "-c", load_and_print]
    done = subprocess.run(command, cwd=launcher.ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()
    assert launcher.VENV not in Path(done.stdout.strip()).parents


def test_one_launcher_at_a_time(launcher):
    with open(launcher.LOCK, "a") as file:
        with launcher.locked():
            assert not launcher.try_lock(file.fileno())
        assert launcher.try_lock(file.fileno())


@pytest.mark.skipif(os.name == "nt", reason="Windows gives a lock back with the process that took it")
def test_a_pip_that_outlives_the_launcher_keeps_the_lock(launcher):
    with launcher.locked():
        pip = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with open(launcher.LOCK, "a") as file:
        assert not launcher.try_lock(file.fileno())
        pip.communicate(b"\n")
        assert launcher.try_lock(file.fileno())


def test_tests_share_the_cores_among_the_workers(launcher, monkeypatch):
    launcher.main(["test"])
    for cores, workers, threads in [(2, "2", "1"), (32, "8", "4"), (None, "1", "1")]:
        monkeypatch.setattr(launcher.os, "cpu_count", lambda cores=cores: cores)
        arguments, variables = launcher.main(["test", "-k", "bpe"])
        assert arguments == ["-m", "pytest", "-n", workers, "--dist", "loadfile", "-k", "bpe"]
        assert variables == {"OMP_NUM_THREADS": threads}


def test_lab_opens_the_first_notebook_and_takes_options(launcher):
    arguments, _ = launcher.main(["--no-browser"])
    assert arguments[:2] == ["-m", "jupyterlab"]
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in arguments
    assert f"--ServerApp.root_dir={launcher.ROOT}" in arguments
    assert arguments[-1] == "--no-browser"


@pytest.mark.parametrize("status", [0, 5])
def test_the_exit_status_and_the_arguments_are_handed_on(launcher, status):
    launcher.main(["test"])
    (launcher.ROOT / "llmlib" / "resources.py").write_text(
        f"import sys; print(sys.argv[1:]); sys.exit({status})"
    )
    command = [sys.executable, "-m", "llmlib", "fetch", "one"]
    done = subprocess.run(command, cwd=launcher.ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.strip() == "['one']"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
def test_a_launcher_that_is_ended_ends_what_it_runs(launcher):
    launcher.main(["test"])
    (launcher.ROOT / "llmlib" / "resources.py").write_text("print('runs', flush=True); input()")
    command = [sys.executable, "-m", "llmlib", "fetch"]
    with subprocess.Popen(
        command, cwd=launcher.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"runs\n"
        process.send_signal(2)
        process.terminate()
        assert process.wait(timeout=20) == 128 + 15


def test_ci_hands_on_the_status_of_the_test_command(tmp_path):
    if os.name == "nt":
        pytest.skip("CI runs on Linux")
    (tmp_path / ".ci").mkdir()
    (tmp_path / "llmlib").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "llmlib" / "__main__.py").write_text("import sys; sys.exit(sys.argv[1:] == ['test'] and 7)")
    assert subprocess.run([tmp_path / ".ci" / "run"], cwd="/").returncode == 7
