"""Figures as records, and the spread of a figure over the runs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct

PACKAGES = ("lazarus-introspect", "torch", "transformers")


class Spread(Struct, frozen=True):
    """A figure over several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The median of the values, the smallest and the largest."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, form: str = ".2f", unit: str = "") -> str:
        """The median with the unit, and the range in parentheses."""
        return f"{self.median:{form}}{unit} ({self.low:{form}}–{self.high:{form}})"


class Finetuning(Struct, frozen=True):
    """How the fine-tuned model was made; the losses are of rows that were not trained on."""

    steps: int
    learning_rate: float
    loss_before: float
    loss_after: float
    seconds: float


class Round(Struct, frozen=True):
    """One round in one process: seconds of each, and the rate of matrix products before it."""

    lazarus: float
    preparation: float
    """the part of it before the first batch: tokens and the probe"""
    naive: float
    bare: float
    gemm: dict[str, float]
    """FLOP a second, for each float32 precision of torch that was tried"""


class InProcess(Struct, frozen=True):
    """Every round of one dtype, the models loaded once."""

    dtype: str
    n_threads: int
    n_tokens: int
    n_padded: int
    """the same with padding"""
    n_batches: int
    batch_tokens: int
    linear_parameters: int
    """in the Linear layers of one model's blocks"""
    worst_difference: float
    """between lazarus's and the naive loop's mean cosine, over the layers that both have"""
    rounds: list[Round]

    @property
    def flops(self) -> float:
        """Of both models' Linear layers on the real tokens; attention itself is left out."""
        return 2 * 2.0 * self.linear_parameters * self.n_tokens


class Command(Struct, frozen=True):
    """A whole command: seconds from start to end, and the most memory that it held, in bytes."""

    seconds: float
    peak: int


class CommandRound(Struct, frozen=True):
    """The command line of lazarus, then the naive loop as a script."""

    lazarus: Command
    naive: Command


class MemoryRun(Struct, frozen=True):
    """The command on so many prompts; `rows` is the size of the numbers in its result, in bytes."""

    n_prompts: int
    peak: int
    rows: int


class Help(Struct, frozen=True):
    """`lazarus --help`: seconds of each run, and which heavy modules it imported."""

    seconds: list[float]
    imported: list[str]


class PrefixRuns(Struct, frozen=True):
    """Seconds of each round, with the prefix run once and with every prompt; and what came of it."""

    n_prefix: int
    once: list[float]
    each: list[float]
    worst_divergence: float
    """the largest difference between the two ways' divergences, over prompts and layers"""

    @property
    def ratios(self) -> list[float]:
        """The time with the prefix run once over the time without, a round each."""
        return [once / each for once, each in zip(self.once, self.each, strict=True)]


class Machine(Struct, frozen=True):
    """The machine, its software, and how busy it was when the run began."""

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    load_average: float


class Results(Struct):
    """Everything of one run; a part that was not run is empty."""

    created: str
    machine: Machine
    n_prompts: int
    finetuning: Finetuning | None = None
    in_process: list[InProcess] = []
    commands: dict[str, list[CommandRound]] = {}
    memory: list[MemoryRun] = []
    help: Help | None = None


def describe_machine() -> Machine:
    """The facts of this machine."""
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        load_average=os.getloadavg()[0],
    )


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(results: Results, path: Path) -> None:
    """Write the results as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


def read(path: Path) -> Results:
    """Read the results back."""
    return msgspec.json.decode(path.read_bytes(), type=Results)
