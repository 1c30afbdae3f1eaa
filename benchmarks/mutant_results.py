"""The outcome of small faults in the code, as records: benchmarks/results/mutants.json."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from benchmarks import places

_ENGINE = (
    "noise positions spill work run resident runner streamed pair replay prefix probe head recorder "
    "prefix_cache local arguments coverage finite"
)
MODULES = (
    *(f"engine/{name}.py" for name in _ENGINE.split()),
    "statistics/verdict.py",
    "activation/accumulation.py",
    "activation/findings.py",
    "models/sameness.py",
    "models/equality.py",
    "models/adapted.py",
    "models/sharing.py",
    "weights/pairs.py",
    "weights/record.py",
)


TESTED_BY = {
    "engine/arguments.py": "replay prefix streamed",
    "engine/coverage.py": "outside claims weight_diff",
    "engine/finite.py": "finite breaks gates claims",
    "engine/pair.py": "engine align streamed repeats",
    "engine/head.py": "probe engine finite",
    "engine/local.py": "resident engine",
    "engine/prefix_cache.py": "prefix replay recorder",
    "engine/probe.py": "engine architectures finite head",
    "engine/recorder.py": "engine head finite resident",
    "engine/replay.py": "prefix",
    "engine/resident.py": "engine streamed local",
    "engine/runner.py": "engine streamed prefix",
    "models/adapted.py": "sameness claims adapters",
    "models/equality.py": "equality sameness sharing replay",
    "models/sameness.py": "sameness sharing paging",
    "models/sharing.py": "sharing ties loading",
    "activation/accumulation.py": "accumulation repeats noise",
    "activation/findings.py": "accumulation gates verdict noise outside claims model_rounding",
    "weights/pairs.py": "weight_diff weight_vocabulary weight_components",
    "weights/record.py": "weight_diff weight_rounding weight_gguf weight_vocabulary weight_spectrum "
    "weights_render outside gates claims",
}
"""the test files that hold a module, beside the one of its own name"""


class Survivor(Struct, frozen=True):
    """A mutant that no test kills."""

    key: str
    line: int
    n_tests: int
    """how many tests ran on it"""
    reason: str = ""
    """why it cannot change a result; empty where a test is missing"""


class Figures(Struct, frozen=True):
    """The mutants of a module."""

    module: str
    mutants: int
    """those that were run"""
    killed: int
    """the endless ones among them"""
    endless: int
    survived: int
    no_result: int
    """those of the survivors that cannot change a result"""
    of: int = 0
    """all mutants of the module"""

    @property
    def share(self) -> float:
        """The part of the mutants which can change a result that is killed."""
        return self.killed / max(1, self.mutants - self.no_result)


class Results(Struct, frozen=True):
    """What benchmarks/results/mutants.json holds."""

    modules: list[Figures]
    survivors: list[Survivor]


def read() -> Results:
    """Return what is saved."""
    if not places.MUTANTS.exists():
        return Results([], [])
    return msgspec.json.decode(places.MUTANTS.read_bytes(), type=Results)


def merged(results: Results) -> Results:
    """Put the modules that were run in the place of what is saved of them."""
    before = read()
    others = set(MODULES) - {figures.module for figures in results.modules}
    modules = [*results.modules, *(figures for figures in before.modules if figures.module in others)]
    kept = [survivor for survivor in before.survivors if survivor.key.split(":")[0] in others]
    modules.sort(key=lambda figures: MODULES.index(figures.module))
    survivors = sorted([*results.survivors, *kept], key=lambda s: MODULES.index(s.key.split(":")[0]))
    return Results(modules, survivors)


def save(results: Results) -> None:
    """Write the results."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    places.MUTANTS.write_bytes(text + b"\n")


def total(modules: Sequence[Figures]) -> Figures:
    """The figures of all modules together."""
    names = ("mutants", "killed", "endless", "survived", "no_result", "of")
    return Figures("all", *(sum(getattr(figures, name) for figures in modules) for name in names))
