"""Whatever a user does wrong: one message that helps, the right exit code, no traceback, and no file left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bad_input import SUBJECTS, BadInput, Outcome, alone, compare, here, observe, page, siblings

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="/dev/full, /proc and RLIMIT_FSIZE are Linux's"
)

SHARED = {k.title: k for command in ("weight-diff", "compare") for k in siblings.shared_by(command)}
KINDS = {kind.title: kind for kinds in SUBJECTS.values() for kind in kinds}
IN_A_PROCESS = (
    "unknown option",
    "bytes that are no text",
    "prompt file not UTF-8",
    "weights cut short",
    "disk full on the way",
)

MakeFolder = Callable[[], Path]


@pytest.fixture(scope="session")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, finetuned_folder: Path
) -> MakeFolder:
    """Makes new folders in which `base` and `finetuned` are good models."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("mistake")
        (folder / "base").symlink_to(base_folder)
        (folder / "finetuned").symlink_to(finetuned_folder)
        return folder

    return make


@pytest.fixture(scope="session")
def outcome_of(make_folder: MakeFolder) -> Callable[[BadInput], Outcome]:
    """What comes of a kind; each is run once, for its own test and for the page."""

    @cache
    def run(kind: BadInput) -> Outcome:
        folder = make_folder()
        outcome = observe(here, kind, folder)
        return replace(outcome, stderr=outcome.stderr.replace(f"{folder}/", ""))

    return run


def test_every_title_is_used_once() -> None:
    assert len(KINDS) == sum(len(kinds) for kinds in SUBJECTS.values()) >= 55


@pytest.mark.parametrize("title", KINDS)
def test_a_mistake_is_told_in_one_message(title: str, outcome_of: Callable[[BadInput], Outcome]) -> None:
    check(KINDS[title], outcome_of(KINDS[title]))


@pytest.mark.parametrize("title", SHARED)
def test_the_other_commands_say_the_same_of_models_and_outputs(
    title: str, outcome_of: Callable[[BadInput], Outcome]
) -> None:
    check(SHARED[title], outcome_of(SHARED[title]))


def test_what_the_other_commands_do_otherwise_is_a_mistake_that_there_is() -> None:
    titles = {kind.title for kind in siblings.SHARED}
    assert titles >= siblings.OTHERWISE_IN_WEIGHT_DIFF.keys() | siblings.OTHERWISE_IN_COMPARE.keys()


@pytest.mark.parametrize("title", IN_A_PROCESS)
def test_a_process_of_its_own_says_the_same(title: str, make_folder: MakeFolder) -> None:
    check(KINDS[title], observe(alone, KINDS[title], make_folder()))


def check(kind: BadInput, outcome: Outcome) -> None:
    """Hold what came of it against what must come of it."""
    assert outcome.exit_code == kind.exit_code, outcome.stderr
    assert [part for part in kind.says if part not in outcome.message] == [], outcome.message
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert "unexpected" not in outcome.stderr or kind.by_typer, outcome.stderr
    if kind.by_typer:
        assert outcome.stderr.startswith("Usage: ")
        assert outcome.stderr.count("─ Error ─") == 1
        assert "-h' for help." in outcome.stderr
    else:
        start = "Interrupted." if kind.exit_code == 130 else "Error: "
        assert outcome.stderr.startswith(start)
        assert outcome.stderr.splitlines(keepends=True) == [outcome.stderr]
    assert outcome.touched == kind.saves


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_in_a_process_of_its_own(number: str, code: int, make_folder: MakeFolder) -> None:
    folder = make_folder()
    os.mkfifo(folder / "prompts.txt")
    command = [sys.executable, "-m", "lazarus", *compare(p="@prompts.txt")]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            pipe = _once_it_is_read(folder / "prompts.txt", process)
            process.send_signal(getattr(signal, number))
            # Python sees a signal that comes just before a read once the read is over: end it.
            os.close(pipe)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (code, "Interrupted.\n")


def _once_it_is_read(fifo: Path, process: subprocess.Popen[str]) -> int:
    """Open the pipe for writing as soon as the process has opened it for reading."""
    while process.poll() is None:
        with suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_the_page_of_errors_is_what_the_command_says(
    golden: Callable[[str, str], None], outcome_of: Callable[[BadInput], Outcome]
) -> None:
    golden("../../docs/errors.md", page(SUBJECTS, outcome_of))
