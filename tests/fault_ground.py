"""The ground of `make faults`: jobs, what they give undisturbed, and what must hold after a fault."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from forks import Outcome, emptied, run
from lazarus.demo import BASE, FINETUNED

N_PROMPTS = 300
"""so many that a run takes a second"""
FOUND_ANEW = ("checksum", "created", "notes", "note_codes")
"""What differs between two runs, or from one that was taken up; a checksum is of the time, too."""


def little_memory() -> None:
    """Tell this process that so little memory is free that hidden states go to files."""
    vars(psutil)["virtual_memory"] = lambda: SimpleNamespace(available=32 * 2**20, total=2**34)


@dataclass(frozen=True)
class Job:
    """One command, with what it leaves."""

    name: str
    arguments: tuple[str, ...]
    product: str = "x.json"
    keeps: tuple[str, ...] = ()
    """what may be in its folder besides, before it is done and after"""
    before: Callable[[], None] | None = None


def jobs(base: Path, finetuned: Path, prompts: Path) -> dict[str, Job]:
    """Return every job, by its name."""
    pair = ("introspect", "activation-diff", "-b", str(base), "-f", str(finetuned), "-p", f"@{prompts}")
    end = ("-o", "x.json", "-q")
    models, few = ("-m1", str(base), "-m2", str(finetuned)), ("-p", "3 + 4 =", "-p", "Hello")
    listed = [
        Job("activation-diff", (*pair, *end)),
        Job("--work-dir", (*pair, *end, "--work-dir", "work"), keeps=("work",)),
        Job("--memory stream", (*pair, *end, "--memory", "stream"), before=little_memory),
        Job("weight-diff", ("introspect", "weight-diff", *pair[2:6], *end)),
        Job("compare", ("introspect", "compare", *models, "-p", "3 + 4 =", *end)),
        Job("series", ("introspect", "series", "-b", str(base), *("-f", str(base)), *pair[4:], *end)),
        Job("record", ("introspect", "record", "-m", str(base), *pair[6:], "-o", "x", "-q"), "x"),
        Job("html", (*pair[:6], *few, "-o", "x.html", "-q"), "x.html"),
    ]
    return {job.name: job for job in listed}


@dataclass
class Ground:
    """A folder with the demo pair, the jobs, and what each gives when nothing happens."""

    root: Path
    jobs: dict[str, Job] = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    """the bytes of the largest file that a job writes"""
    expected: dict[str, Any] = field(default_factory=dict)
    of_the_other_state: dict[str, Any] = field(default_factory=dict)
    """with the fine-tune's weights in base's place"""

    def __post_init__(self) -> None:
        self.base, self.finetuned = self.root / "base", self.root / "arithmetic"
        shutil.copytree(BASE, self.base)
        shutil.copytree(FINETUNED, self.finetuned)
        self.prompts = self.root / "prompts.txt"
        self.prompts.write_text("\n".join(f"{i} + {i % 7} =" for i in range(N_PROMPTS)), encoding="utf-8")
        self.jobs = jobs(self.base, self.finetuned, self.prompts)

    def know(self, names: Sequence[str]) -> None:
        """Run jobs undisturbed, where that is not done yet."""
        for name in names:
            if name not in self.expected:
                self.expected[name] = self.undisturbed(self.jobs[name])

    def undisturbed(self, job: Job) -> Any:
        """Run a job with nothing in its way, and return its result."""
        folder = emptied(self.root / "undisturbed")
        outcome = run(job.arguments, folder, before=job.before)
        assert outcome.code == 0, outcome
        self.seconds[job.name] = outcome.seconds
        self.largest[job.name] = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return read_product(folder / job.product)

    def complaints(
        self, job: Job, folder: Path, outcome: Outcome, *, meant: Collection[int] = ()
    ) -> list[str]:
        """Return what is wrong after a trial; `meant` are exit codes that the fault itself gives."""
        found = []
        if outcome.code not in meant and outcome.fault is not None:
            found.append(outcome.fault)
        found += self._of_the_product(job, folder, outcome)
        return found

    def leftovers(self, job: Job, folder: Path) -> list[str]:
        """Return what lies about in a trial's folder, and in its temporary one."""
        known = {job.product, "tmp", *job.keeps}
        left = [path.name for path in folder.iterdir() if path.name not in known]
        left += [f"tmp/{path.name}" for path in (folder / "tmp").iterdir()]
        left += [f"{name}/{path.name}" for name in job.keeps for path in folder.glob(f"{name}/*.part")]
        return sorted(left)

    def next_run(self, job: Job, folder: Path) -> list[str]:
        """Run a job again, undisturbed, and return what is wrong then."""
        if job.product == "x" and is_there(folder / job.product):
            return []  # a recording that is whole is never written over
        outcome = run(job.arguments, folder, before=job.before)
        self.seconds[job.name] = min(self.seconds[job.name], outcome.seconds)
        found = self.complaints(job, folder, outcome)
        if outcome.code:
            found.append(f"exit {outcome.code}: {outcome.err.strip()[-300:]}")
        return [
            f"the next run: {told}" for told in [*found, *map("left: {}".format, self.leftovers(job, folder))]
        ]

    def _of_the_product(self, job: Job, folder: Path, outcome: Outcome) -> list[str]:
        product = folder / job.product
        if not is_there(product):
            return ["exit 0 without a result"] if outcome.code == 0 else []
        try:
            found = read_product(product)
        except ValueError as error:
            return [f"half a file: {error}"]
        wrong = differing(found, self.expected[job.name])
        return [f"a wrong result: {wrong}"] if wrong else []


def is_there(product: Path) -> bool:
    """Whether a job's result is there; a recording is when it has its manifest."""
    return (product / "recording.json").exists() if product.is_dir() else product.exists()


def read_product(product: Path) -> Any:
    """Return what is in a result, but for what differs from run to run.

    Raises:
        ValueError: it is not whole.
    """
    if product.is_dir():
        files = sorted(path for path in product.iterdir() if path.name != "recording.json")
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {
            **without_times(json.loads(product.joinpath("recording.json").read_bytes())),
            "files": digests,
        }
    if product.suffix == ".html":
        text = product.read_text(encoding="utf-8")
        if not text.rstrip().endswith("</html>"):
            raise ValueError("no end of the page")
        return {"is whole": True}
    return without_times(json.loads(product.read_bytes()))


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in FOUND_ANEW}


def differing(found: Any, expected: Any, where: str = "") -> str | None:
    """Return the first place in which two JSON values differ; sums of shards may differ by rounding."""
    if type(found) is not type(expected):
        return f"{where}: {found!r:.60} and not {expected!r:.60}"
    if isinstance(found, dict):
        if found.keys() != expected.keys():
            return f"{where}: {sorted(found.keys() ^ expected.keys())}"
        pairs = [(f"{where}.{key}", found[key], expected[key]) for key in found]
    elif isinstance(found, list) and len(found) == len(expected):
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(found, expected, strict=True))]
    elif isinstance(found, float) and abs(found - expected) <= 1e-12 * max(1.0, abs(expected)):
        return None
    else:
        return None if found == expected else f"{where}: {found!r:.60} and not {expected!r:.60}"
    return next((told for place, one, other in pairs if (told := differing(one, other, place))), None)
