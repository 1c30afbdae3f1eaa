"""A signal that ends a command leaves nothing behind, and gives the exit code that shells have for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import psutil
import pytest

from lazarus import demo
from lazarus.cli import main
from lazarus.cli.endings import Ended, ended_by_signals
from lazarus.render import save

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_a_command_with_its_code(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        os.kill(os.getpid(), number)
    assert ended.value.code == code
    assert signal.getsignal(number) == before


def test_a_second_signal_lets_the_first_one_clean_up() -> None:
    """Ctrl-C under torchrun: each rank gets SIGINT from the terminal and SIGTERM from torchrun."""
    done = []

    def run() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("cleaned up")

    with pytest.raises(SystemExit) as ended, ended_by_signals():
        run()
    assert (ended.value.code, done) == (130, ["cleaned up"])


def test_what_a_library_makes_of_a_signal_is_still_the_signal() -> None:
    """A module written in C that is imported just then raises ImportError."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Ended as error:
            raise ImportError("initialization failed") from error

    with pytest.raises(SystemExit) as ended, ended_by_signals():
        load()
    assert ended.value.code == 143


def test_an_ignored_signal_stays_ignored() -> None:
    """Of nohup, and of a shell that starts a command in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    went_on = False
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            went_on = True
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert went_on


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_an_output_that_is_being_written_is_not_there(number: int, code: int, tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("older")

    def write(_record: Any, stream: IO[bytes]) -> None:
        stream.write(b"half")
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as ended, ended_by_signals():
        save._write_and_rename(None, target, write)
    assert ended.value.code == code
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "older")]


def test_spilled_states_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be as large as the disk."""
    little = SimpleNamespace(available=32 * 2**20, total=2**34)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    spill, prompts = tmp_path / "spill", tmp_path / "many.txt"
    spill.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spill))
    prompts.write_text("".join(f"{i} + {i % 97} = the number {i}\n" for i in range(20_000)))
    pair = ["-b", str(demo.BASE), "-f", str(demo.FINETUNED), "-p", f"@{prompts}"]
    monkeypatch.setattr(
        "sys.argv", ["lazarus", "introspect", "activation-diff", *pair, "--memory", "stream", "-q"]
    )
    seen, over = [], threading.Event()

    def end_it() -> None:
        while not over.is_set():
            if found := [path.name for path in spill.glob("*/*")]:
                seen.extend(found)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            over.wait(0.01)

    watcher = threading.Thread(target=end_it)
    watcher.start()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        over.set()
        watcher.join()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "Interrupted.\n"
    assert seen
    assert list(spill.iterdir()) == []


def test_a_signal_while_torch_is_imported(tmp_path: Path) -> None:
    """The command ends with the code of the signal, wherever in the import it comes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch.nn':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    pair = ["-b", str(demo.BASE), "-f", str(demo.FINETUNED), "-p", "Hello"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "lazarus", "introspect", "activation-diff", *pair],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (143, "Interrupted.\n")
