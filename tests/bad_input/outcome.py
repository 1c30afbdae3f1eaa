"""Run one kind of bad input for real, and see what comes of it."""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bad_input.kind import BadInput
from lazarus import cli

BOX = str.maketrans("╭╮╰╯│─", "      ")
LOGGERS = ("", "transformers", "huggingface_hub", "torch")


@dataclass(frozen=True)
class Outcome:
    """What came of a command: its exit code, what it wrote, and the files that it left or changed."""

    exit_code: int
    stdout: str
    stderr: str
    touched: tuple[str, ...]

    @property
    def message(self) -> str:
        """The message on one line, without `Error:`, and out of the box in which Typer draws its own."""
        _, _, boxed = self.stderr.partition("╭─ Error")
        return " ".join((boxed or self.stderr).translate(BOX).split()).removeprefix("Error: ")


Run = Callable[[BadInput, list[str], Path], tuple[int, str, str]]


def observe(run: Run, kind: BadInput, folder: Path) -> Outcome:
    """Prepare the folder, run the command from it, and compare the files before and after."""
    arguments = kind.prepare(folder)
    before = _digests(folder)
    exit_code, stdout, stderr = run(kind, arguments, folder)
    after = _digests(folder)
    touched = sorted(name for name in before | after if before.get(name) != after.get(name))
    return Outcome(exit_code, stdout, stderr, tuple(touched))


def here(kind: BadInput, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Run it in this process, which is fast."""
    stdin, stdout, stderr = (
        io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8") for raw in (kind.stdin, b"", b"")
    )
    state: dict[str, Any] = {
        "argv": ["lazarus", *arguments],
        "excepthook": sys.excepthook,
        "stdin": stdin,
        "stdout": stdout,
        "stderr": stderr,
    }
    with (
        chdir(folder),
        patch.multiple(sys, **state),
        _logs_to(stderr),
        warnings.catch_warnings(),
        kind.around(),
    ):
        exit_code = _exit_code_of_main()
    return exit_code, _written(stdout), _written(stderr)


def alone(kind: BadInput, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Run it in a process of its own, as a user does."""
    with kind.around():
        done = subprocess.run(
            [sys.executable, "-m", "lazarus", *arguments],
            cwd=folder,
            input=kind.stdin,
            capture_output=True,
            check=False,
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def _exit_code_of_main() -> int:
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _written(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def _digests(folder: Path) -> dict[str, str]:
    """Every file below the folder, and a digest of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def _logs_to(stream: io.TextIOWrapper) -> Iterator[None]:
    """Let the libraries log there: their handlers hold on to the standard error that they first saw."""
    found = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    handlers = [handler for handler in found if type(handler) is logging.StreamHandler]
    before = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(stream)
    try:
        yield
    finally:
        for handler, old in zip(handlers, before, strict=True):
            handler.setStream(old)
