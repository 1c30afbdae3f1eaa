"""Whole commands, each in a process of its own: seconds with imports and loading, and peak memory.

The kernel counts the memory of the process that starts another one into the peak of the other, so this
module imports neither torch nor transformers, and must be used by a process that has not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from benchmarks.places import ROOT
from benchmarks.results import Command, CommandRound, Help, MemoryRun
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED

COMPARE = ("lazarus", "introspect", "activation-diff")
HEAVY = {"torch", "transformers"}
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def python_module(*arguments: str | Path) -> list[str]:
    """The command that runs a module of this Python."""
    return [sys.executable, "-m", *map(str, arguments)]


def run_module(*arguments: str | Path) -> bytes:
    """Run a module and return what it writes; its messages stay visible."""
    command = python_module(*arguments)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True).stdout


def measure(command: Sequence[str]) -> Command:
    """Run a command to its end; one that fails ends the benchmark with what it wrote."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read().decode()}")
    return Command(seconds, usage.ru_maxrss * RSS_UNIT)


def compare_models(base: Path, finetuned: Path, prompts: Path, *options: str) -> list[str]:
    """The command line of lazarus for two models."""
    where = ("-b", base, "-f", finetuned, "-p", f"@{prompts}", "--device", "cpu", "-q")
    return python_module(*COMPARE, *where, *options)


def whole_commands(
    base: Path, finetuned: Path, prompts: Path, dtype: str, n_runs: int
) -> Iterator[CommandRound]:
    """The command of lazarus and the naive script in turn."""
    ours = compare_models(base, finetuned, prompts, "--dtype", dtype)
    theirs = python_module("benchmarks.naive", base, finetuned, prompts, dtype)
    for _ in range(n_runs):
        yield CommandRound(measure(ours), measure(theirs))


def memory_by_prompts(texts: Sequence[str], counts: Sequence[int], n_runs: int) -> Iterator[MemoryRun]:
    """The demo pair on few prompts and on many, in turn; no two prompts are the same."""
    with _numbered_prompts(texts, max(counts)) as (folder, numbered):
        files = {count: folder / f"{count}.txt" for count in counts}
        for count, file in files.items():
            file.write_text("\n".join(numbered[:count]), encoding="utf-8")
        per_prompt = _row_bytes(folder, files[min(counts)], min(counts))
        for _ in range(n_runs):
            for count, file in files.items():
                peak = measure(compare_models(DEMO_BASE, DEMO_FINETUNED, file)).peak
                yield MemoryRun(count, peak, count * per_prompt)


@contextmanager
def _numbered_prompts(texts: Sequence[str], count: int) -> Iterator[tuple[Path, list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), [f"{number}. {text}" for number, text in enumerate(islice(cycle(texts), count))]


def _row_bytes(folder: Path, prompts: Path, count: int) -> int:
    """The size of the numbers that a result holds for one prompt, 8 bytes each."""
    saved = folder / "result.json"
    measure(compare_models(DEMO_BASE, DEMO_FINETUNED, prompts, "-o", str(saved)))
    rows = json.loads(saved.read_bytes())["results"]
    numbers = sum(isinstance(value, float) for value in rows[0].values())
    return 8 * numbers * len(rows) // count


def measure_help(n_runs: int) -> Help:
    """`lazarus --help`, after one run that fills the caches, and what it imports."""
    command = python_module("lazarus", "--help")
    measure(command)
    seconds = [measure(command).seconds for _ in range(n_runs)]
    traced = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], cwd=ROOT, capture_output=True, check=True, text=True
    )
    modules = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    return Help(seconds, sorted(HEAVY & modules))
