"""Give changed files to every reader: `make fuzz`. Only a LazarusError may come out, in time and in memory.

Half of the time goes to files that are changed by their structure (`mutations.py`), for all targets; half
to those that atheris makes, guided by the lines that they reach, for the cheap ones. Each finding is
printed with its file, which is kept. What was mended goes into `tests/corpus/`, which `--corpus` gives to
its targets again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import forks
from fuzz_targets import TARGETS, Target, make_ground, prepare
from lazarus.blame import is_out_of_memory, raised_at
from lazarus.errors import LazarusError
from mutations import mutated

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FINDINGS = HERE.parent / "fuzz-findings"
LIMIT_SECONDS = 20
MORE_BYTES = 3 * 2**30
"""the address space that an input may take, beyond the process as it is"""
A_ROUND = {True: 60, False: 4}
"""how many inputs a fork has, cheap ones and others"""


@dataclass(frozen=True)
class Finding:
    """What should not have come out, and the file it came of."""

    target: str
    what: str
    data: bytes

    @property
    def name(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:12]


def check(target: Target, path: Path) -> str | None:
    """Give a file to its target; return what came out, where it was no result and no error of ours."""
    try:
        target.run(path)
    except LazarusError:
        return None
    except MemoryError as error:
        return None if is_out_of_memory(error) else _told(error)
    except BaseException as error:  # noqa: BLE001 - this is what is looked for
        return _told(error)
    return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__} at {raised_at(error)}: {str(error)[:160]!r}"


def attempt(name: str, inputs: list[bytes], ground: Path, root: Path) -> Iterator[Finding]:
    """Give inputs to a target, in forks: one that hangs or crashes costs itself alone."""
    target = TARGETS[name]
    left = inputs
    while left:
        progress = root / "progress"
        progress.write_bytes(b"")
        now = left

        def go(now: list[bytes] = now, progress: Path = progress) -> None:
            os.environ["LAZARUS_FUZZ"] = "1"
            with progress.open("ab", buffering=0) as told:
                for data in now:
                    path = prepare(target, ground, root / "changed")
                    path.write_bytes(data)
                    found = check(target, path)
                    told.write((found or "").replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n")

        outcome, n_done, told = _watched(go, root, progress)
        yield from (Finding(name, text, data) for text, data in zip(told, left, strict=False) if text)
        if n_done < len(left):
            yield Finding(
                name, outcome.fault or f"ended with {outcome.code}: {outcome.err[-200:]}", left[n_done]
            )
            n_done += 1
        left = left[n_done:]


def _watched(go: Callable[[], None], root: Path, progress: Path) -> tuple[forks.Outcome, int, list[str]]:
    """Run a fork until it ends, or until one input has taken too long."""
    trial = forks.start(go, root / "fork", more_bytes=MORE_BYTES)
    n_seen, since = -1, time.monotonic()
    while not trial.is_over():
        n_done = progress.read_bytes().count(b"\n")
        if n_done != n_seen:
            n_seen, since = n_done, time.monotonic()
        if time.monotonic() - since > LIMIT_SECONDS:
            break
        time.sleep(0.01)
    outcome = trial.ended(limit_seconds=0)
    told = progress.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
    return outcome, len(told), told


def by_structure(seconds: float, names: list[str], seed: int, root: Path, ground: Path) -> Counter[str]:
    """Mutate the seeds of all targets in turn, as long as there is time; return how many each had."""
    counts: Counter[str] = Counter()
    dice, end, seen = random.Random(seed), time.monotonic() + seconds, set[tuple[str, str]]()
    while time.monotonic() < end:
        for name in names:
            target = TARGETS[name]
            good = (ground / target.seed).read_bytes()
            inputs = [mutated(good, target.kind, dice) for _ in range(A_ROUND[target.is_cheap])]
            for finding in attempt(name, inputs, ground, root):
                report(finding, seen)
            counts[name] += len(inputs)
            if time.monotonic() > end:
                break
    counts["findings"] = len(seen)
    return counts


def report(finding: Finding, seen: set[tuple[str, str]]) -> None:
    """Print a finding and keep its file, once for each place that raised it."""
    place = finding.what.partition(": ")[0]
    if (finding.target, place) in seen:
        return
    seen.add((finding.target, place))
    folder = FINDINGS / finding.target.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / finding.name).write_bytes(finding.data)
    sys.stdout.write(f"{finding.target}: {finding.what} [{finding.name}, {len(finding.data):,} bytes]\n")
    sys.stdout.flush()


def by_coverage(seconds: float, names: list[str], ground: Path) -> int:
    """Let atheris make the inputs of each target in turn; return how many targets failed."""
    n_failed = 0
    for name in names:
        share = str(max(5, round(seconds / len(names))))
        command = [sys.executable, str(HERE / "fuzz_coverage.py"), name, str(ground), share]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = (done.stdout + done.stderr).splitlines()
        found = [line for line in lines if line.startswith(f"{name}: ")]
        n_failed += bool(done.returncode or found)
        told = [line for line in lines if line.startswith("Done ")]
        sys.stdout.write("\n".join([*found, *(lines[-20:] if done.returncode else told)]) + f" ({name})\n")
        sys.stdout.flush()
    return n_failed


def replay(ground: Path, root: Path) -> int:
    """Give the corpus to its targets; return how many of its files fail."""
    n_failed, n_tried = 0, 0
    for folder in sorted(CORPUS.iterdir()):
        name = next(name for name in TARGETS if name.replace("/", "-") == folder.name)
        inputs = [path.read_bytes() for path in sorted(folder.iterdir())]
        n_tried += len(inputs)
        for finding in attempt(name, inputs, ground, root):
            n_failed += 1
            sys.stdout.write(f"{name}: {finding.what} [{finding.data[:60]!r}]\n")
    sys.stdout.write(f"{n_tried - n_failed} passed, {n_failed} failed\n")
    return n_failed


def main() -> None:
    """Fuzz, or give the corpus to its targets again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--corpus", action="store_true", help="the files of tests/corpus alone")
    parser.add_argument("--no-coverage", action="store_true", help="without atheris")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root, ground = Path(folder), Path(folder) / "ground"
        made = forks.run(lambda: make_ground(ground), root / "fork", limit_seconds=300)
        assert made.code == 0, made.err[-2000:]
        if chosen.corpus:
            sys.exit(bool(replay(ground, root)))
        cheap = [name for name in chosen.target if TARGETS[name].is_cheap]
        share = chosen.seconds if chosen.no_coverage or not cheap else chosen.seconds / 2
        counts = by_structure(share, chosen.target, chosen.seed, root, ground)
        n_found = counts.pop("findings")
        n_failed = 0 if share == chosen.seconds else by_coverage(share, cheap, ground)
    for name, n in counts.items():
        sys.stdout.write(f"{n:>8,}  {name}\n")
    sys.stdout.write(f"seed {chosen.seed}: {counts.total():,} inputs, {n_found + n_failed} findings\n")
    sys.exit(bool(n_found or n_failed))


if __name__ == "__main__":
    try:
        main()
    except AssertionError:
        traceback.print_exc()
        sys.exit(2)
