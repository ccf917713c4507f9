"""Build a large language model from scratch: a course in notebooks.

python3 -m llmlib          make .venv if needed, and open JupyterLab on the first notebook;
                           JupyterLab's own options may follow, such as --no-browser or --port=9000
python3 -m llmlib test     run every test and every notebook; pytest's own arguments may follow
python3 -m llmlib fetch    download all that the course needs, so that it then runs with no network
"""

# Every Python must be able to parse this file, to reach the line that asks for a newer one: no f-string here.
# ruff: noqa: RUF005, UP031, UP036
import sys

if sys.version_info < (3, 10):
    sys.exit(
        "The course needs Python 3.10 or newer, and this is Python %d.%d. Install a newer one from "
        "https://www.python.org/downloads/ and run the same command with it." % sys.version_info[:2]
    )

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
STAMP = VENV / "llmlib-stamp"
UNFINISHED = "unfinished"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
# Prints the version; fails where there is no pip, or where the interpreter belongs to no virtual environment.
PROBE = "import sys, pip; print('%d.%d' % sys.version_info[:2]); sys.exit(sys.prefix == sys.base_prefix)"
REASONS = {
    r"No space left|not enough space|WinError 112|Disk quota": "The disk is full: free some gigabytes.",
    r"Retrying \(|ConnectionError|Timeout|ProxyError|SSLError|IncompleteRead|Connection broken": (
        "The package index does not answer: check the network (or the proxy, or pip's index-url)."
    ),
}


def say(line):
    print(line)
    sys.stdout.flush()


def stop(line):
    sys.exit("%s Then run the same command again." % line)


def venv_version():
    """Return the Python version of .venv, or None where its interpreter or its pip does not work."""
    try:
        done = subprocess.run([str(PYTHON), "-I", "-c", PROBE], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def wanted_stamp(version):
    requirements = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    return "requirements %s\nPython %s\nfolder %s\n" % (requirements, version, ROOT)


def read_stamp():
    return STAMP.read_text(encoding="utf-8") if STAMP.is_file() else None


def write_stamp(text):
    beside = STAMP.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, STAMP)


def is_ready():
    version = venv_version()
    return version is not None and read_stamp() == wanted_stamp(version)


def fault():
    """Name the reason why .venv must be made anew, or return None."""
    if venv_version() is None:
        return "its Python or its pip does not work"
    return "its installation was interrupted" if read_stamp() == UNFINISHED else None


@contextmanager
def locked():
    """Wait for other launchers on the same folder; the lock of a process that died is free again."""
    with open(LOCK, "a") as file:
        if not try_lock(file.fileno()):
            say("Waiting for another installation in this folder ...")
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        # A pip that outlives a killed launcher keeps the lock, so that no second pip writes beside it.
        os.set_inheritable(file.fileno(), True)
        yield


def try_lock(descriptor):
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def known_reason(output):
    return next((advice for pattern, advice in REASONS.items() if re.search(pattern, output)), None)


def run_step(failure, command):
    """Run one step of the installation, its progress shown; where it fails, stop with the reason."""
    # The inheritable descriptor is the lock's.
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, close_fds=False)
    if done.returncode:
        output = done.stderr.decode(errors="replace")
        if not known_reason(output):
            sys.stderr.write(output)
        stop(known_reason(output) or "%s; the reason stands above." % failure)


def remove_venv():
    if VENV.is_dir() and not VENV.is_symlink():
        shutil.rmtree(VENV)
    else:
        VENV.unlink()


def base_python():
    """Return the interpreter to make .venv with, which is never one that stands in .venv itself."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def make_venv():
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        package = "python%d.%d-venv" % sys.version_info[:2]
        stop("This Python has no venv module: on Debian or Ubuntu, type `sudo apt install %s`." % package)
    say("Making .venv with Python %d.%d ..." % sys.version_info[:2])
    VENV.mkdir()
    write_stamp(UNFINISHED)
    run_step("Python could not make .venv", [base_python(), "-m", "venv", str(VENV)])


def install():
    say("Installing the packages that requirements.txt names (a few minutes the first time) ...")
    write_stamp(UNFINISHED)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run_step("pip could not install the packages", pip + ["install", "-r", "requirements.txt"])
    write_stamp(wanted_stamp(venv_version()))


def prepare():
    """Bring .venv to what requirements.txt says, doing only what is not done yet."""
    if is_ready():
        return
    with locked():
        if is_ready():
            return
        reason = fault()
        if reason and os.path.lexists(VENV):
            say("Making .venv anew: %s." % reason)
            remove_venv()
        if reason:
            make_venv()
        install()


def hand_over(arguments, **variables):
    """Run .venv's Python to its end and return its exit status; Ctrl-C is for it to answer."""
    path = str(BIN) + os.pathsep + os.environ.get("PATH", "")
    environment = dict(os.environ, PATH=path, **variables)
    process = subprocess.Popen([str(PYTHON)] + arguments, cwd=ROOT, env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def open_lab(options):
    say("Opening JupyterLab on the first notebook. Ctrl-C, pressed twice here, ends it.")
    settings = [
        "--ServerApp.root_dir=%s" % ROOT,
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb",
        "--LabApp.news_url=None",  # no question before the first page
        "--log-level=WARN",  # of the server's messages, the address is left
        "--allow-root",  # the user of a container
    ]
    return hand_over(["-m", "jupyterlab"] + settings + options)


def run_tests(arguments):
    """Run pytest with one file at a time on each worker, and the cores' threads shared among the workers."""
    cores = os.cpu_count() or 1
    workers = min(cores, 8)
    parallel = ["-n", str(workers), "--dist", "loadfile"]
    return hand_over(["-m", "pytest"] + parallel + arguments, OMP_NUM_THREADS=str(cores // workers))


def fetch(arguments):
    return hand_over(["-m", "llmlib.resources"] + arguments)


def main(arguments):
    commands = {"test": run_tests, "fetch": fetch}
    if arguments and arguments[0] in ("-h", "--help", "help"):
        say(__doc__.strip())
        return 0
    if arguments and arguments[0] not in commands and not arguments[0].startswith("-"):
        sys.exit("There is no command %r: try test, fetch, --help, or none for JupyterLab." % arguments[0])
    try:
        prepare()
    except KeyboardInterrupt:
        sys.exit("Stopped. To go on, run the same command again.")
    except OSError as error:
        stop(known_reason(str(error)) or "The installation failed: %s." % error)
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return open_lab(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
