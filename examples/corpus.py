"""The text every Python installation carries: its own standard library, some modules held out."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.byte_lm import END_OF_DOCUMENT

# Never trained on, nor are their tests: long, varied, and in every Python since 3.8.
HELD_OUT = (
    "argparse.py",
    "asyncio/queues.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "doctest.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "mailbox.py",
    "pdb.py",
    "shlex.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "typing.py",
    "unittest/mock.py",
)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "cjkencodings"}


@dataclass(frozen=True)
class Corpus:
    """Text and where it came from.

    Attributes:
        data: u8, all documents one after the other, each ending in the end-of-document byte.
        files: paths below the library folder, in order.
        sha256: of `data`.
    """

    data: np.ndarray
    files: tuple[str, ...]
    sha256: str


def library_folder(folder: Path | None = None) -> Path:
    """`folder`, or the standard library of the running Python."""
    found = folder or Path(sysconfig.get_path("stdlib"))
    if not (found / "argparse.py").is_file():
        raise FileNotFoundError(
            f"{found}: no Python standard library here (argparse.py is missing); give the folder "
            "that holds it."
        )
    return found


def is_held_out(path: str) -> bool:
    """Whether `path` is a held-out module or that module's test."""
    if path in HELD_OUT:
        return True
    parts = Path(path).with_suffix("").parts
    if parts[0] != "test":
        return False
    stems = {Path(module).stem for module in HELD_OUT} | {"mock"}
    return any(part.removeprefix("test_").removeprefix("test") in stems for part in parts[1:])


def training_corpus(folder: Path | None = None) -> Corpus:
    """Every UTF-8 source of the library that is not held out, in path order."""
    root = library_folder(folder)
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    return _read(root, [path for path in paths if not is_held_out(path)])


def held_out_corpus(folder: Path | None = None) -> Corpus:
    """The held-out modules."""
    return _read(library_folder(folder), list(HELD_OUT))


def held_out_windows(length: int, count: int, folder: Path | None = None) -> np.ndarray:
    """`count` windows of `length` bytes, u8 `[count, length]`, spread over the held-out modules.

    Each lies inside one module; modules take turns, and a module's windows do not overlap.
    """
    root = library_folder(folder)
    texts = [(root / name).read_bytes() for name in HELD_OUT]
    rounds = max(len(text) // length for text in texts)
    windows = [
        np.frombuffer(text[turn * length : (turn + 1) * length], np.uint8)
        for turn in range(rounds)
        for text in texts
        if len(text) >= (turn + 1) * length
    ]
    if len(windows) < count:
        raise ValueError(
            f"{count=} windows of {length=} bytes: the held-out modules hold {len(windows)}; "
            "ask for fewer or shorter ones."
        )
    return np.stack(windows[:count])


def _read(root: Path, paths: list[str]) -> Corpus:
    end = bytes([END_OF_DOCUMENT])
    documents, files = [], []
    for path in paths:
        content = (root / path).read_bytes()
        if end in content:
            continue
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        documents.append(content + end)
        files.append(path)
    joined = b"".join(documents)
    return Corpus(
        data=np.frombuffer(joined, np.uint8),
        files=tuple(files),
        sha256=hashlib.sha256(joined).hexdigest(),
    )
