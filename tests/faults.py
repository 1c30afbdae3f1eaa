"""Run commands while something goes wrong, and see that nothing is lost and nothing is wrong: `make faults`.

Signals at random moments, disks that are full, files that change while they are read, too little memory,
processes of a shared run that die, and surroundings that lack something. After each trial: no wrong result,
no half of a file, nothing left over, and the same command runs. A table is printed; the exit code is 1
where a trial went wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from fault_ground import Ground
from fault_kinds import KINDS, Told

QUICK = 1
"""trials of each kind in the form that is a test"""


def table(found: Sequence[Told]) -> str:
    """Return what happened as a table of Markdown."""
    trials: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: Counter[str] = Counter()
    for told in found:
        fault = told.fault.partition(", ")[0]
        trials[fault][told.what] += 1
        wrong[fault] += bool(told.complaints)
    lines = ["| fault | trials | what happened | wrong |", "|---|---|---|---|"]
    for fault, counts in trials.items():
        told_all = ", ".join(f"{what}: {n}" for what, n in counts.most_common())
        lines.append(f"| {fault} | {counts.total()} | {told_all} | {wrong[fault]} |")
    return "\n".join(lines)


def main() -> None:
    """Run the trials that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a handful of each kind")
    parser.add_argument("--trials", type=float, default=1.0, help="times as many trials as by default")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="which faults")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    found: list[Told] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        ground = Ground(Path(folder))
        for name in chosen.kind:
            kind, usual = KINDS[name]
            n_trials = QUICK if chosen.quick else max(1, round(usual * chosen.trials))
            for told in kind(ground, n_trials, random.Random(f"{chosen.seed} {name}")):
                found.append(told)
                for complaint in told.complaints:
                    sys.stderr.write(f"{told.fault} ({told.what}): {complaint}\n")
    sys.stdout.write(table(found) + "\n")
    n_wrong = sum(bool(told.complaints) for told in found)
    sys.stdout.write(f"\n{len(found) - n_wrong} passed, {n_wrong} failed\n")
    sys.exit(bool(n_wrong))


if __name__ == "__main__":
    main()
