"""Small faults put into the code, to see whether the tests find them: `python -m benchmarks.mutants`.

Each mutant is a module with one change: `<` for `<=`, a constant one larger, a statement left out. The tests
that run the changed statement run on it, those of the module's own test file and the fastest first, until one
fails. Whatever no test kills either cannot change a result, and then `mutants.json` says why, or a test is
missing.

Every outcome is kept in benchmarks/cache/mutants, so a run that was stopped goes on where it was;
`--again` runs the survivors once more, after tests were added. The figures and the survivors are written to
benchmarks/results/mutants.json, where the reasons that are there already stay: those of a sample in place of
all that is there, those of `--only` in place of what is there of these modules. `--reasons` takes more
reasons from a file: a JSON object of keys and reasons.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TextIO

import msgspec
from msgspec import Struct
from rich.console import Console

from benchmarks import places
from benchmarks.mutant_results import MODULES, TESTED_BY, Figures, Results, Survivor, merged, read, save
from benchmarks.mutant_tests import SOURCE, Ran, Test, learn_tests, run_imported, run_swapped
from benchmarks.mutations import Mutant, mutants
from benchmarks.trust_report import mutants_table

FEWEST_TESTS = 12
TEST_SECONDS = 45.0
OWN_SECONDS = 2.0
"""Of the module's own test files the tests that run within this time come in one turn."""
VARIANTS = 3
"""So many parameters of one test run before those of others: hundreds of architectures are much alike."""


class Outcome(Struct, frozen=True):
    """The outcome of a mutant of this function."""

    key: str
    stamp: str
    ran: Ran


@dataclass
class Run:
    """The outcomes so far, in memory and in a file."""

    path: Path
    screen: TextIO
    outcomes: dict[str, Outcome]
    n_left: int = 0

    @classmethod
    def begin(cls, path: Path) -> Run:
        """Go on with what the file holds."""
        lines = path.read_bytes().splitlines() if path.exists() else []
        found = (msgspec.json.decode(line, type=Outcome) for line in lines)
        screen = os.fdopen(os.dup(2), "w", buffering=1)  # forks turn the usual one off
        return cls(path, screen, {outcome.key: outcome for outcome in found})

    def record(self, mutant: Mutant, ran: Ran) -> None:
        """Keep an outcome, also from a fork."""
        outcome = Outcome(mutant.key, stamp(mutant), ran)
        self.outcomes[mutant.key] = outcome
        with self.path.open("ab") as stream:
            stream.write(msgspec.json.encode(outcome) + b"\n")
        self.n_left -= 1
        verdict = ran.killed_by or "SURVIVED"
        print(f"{self.n_left:5} {ran.seconds:6.1f} s  {verdict:.70}  <- {mutant.key}", file=self.screen)

    def killers(self, mutant: Mutant) -> Counter[str]:
        """Return how many other mutants of the module each test killed; of the same function, by far more."""
        ours = f"{mutant.module}: {mutant.function}:"
        found = Counter[str]()
        for key, outcome in self.outcomes.items():
            if key.startswith(f"{mutant.module}:") and outcome.ran.killed_by:
                found[outcome.ran.killed_by] += 1000 if key.startswith(ours) else 1
        return found

    def is_done(self, mutant: Mutant, *, again: bool = False) -> bool:
        """Return whether the outcome on this very function is known."""
        known = self.outcomes.get(mutant.key)
        return known is not None and known.stamp == stamp(mutant) and bool(known.ran.killed_by or not again)


def stamp(mutant: Mutant) -> str:
    """Return a hash of the mutated function without docstrings; of the module, where the fault is in none.

    What other functions do is left to the tests: an outcome is kept when only they change.
    """
    tree = ast.parse(mutant.source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    found: list[ast.AST] = [tree]
    for name in mutant.function.split(".") if mutant.function else ():
        # Several have one name: a property and what sets it.
        found = [n for node in found for n in getattr(node, "body", ()) if getattr(n, "name", "") == name]
    return hashlib.sha256("\n".join(map(ast.unparse, found)).encode()).hexdigest()[:16]


@dataclass
class Picker:
    """Picks the tests of a mutant."""

    tests: Sequence[Test]
    seconds: float
    run: Run

    def pick(self, mutant: Mutant) -> list[Test]:
        """Return the tests that run its statement, those first that are likely to fail, while time allows.

        Those that killed others of the module come first, the most successful before the others. Tests of one
        file are much alike, so the fastest of each file follow, then the second ones, and so on; of the
        module's own files, many at a time.
        """
        own = own_tests(mutant.module)
        killers = self.run.killers(mutant)
        found, variants, seen = [], Counter[str](), defaultdict[str, float](float)
        for test in sorted((test for test in self.tests if _runs(test, mutant)), key=lambda t: t.seconds):
            function = test.id.split("[")[0]
            variants[function] += 1
            is_own = Path(test.file).stem in own
            is_one_of_many = variants[function] > VARIANTS and not is_own
            turn = int(seen[test.file] / OWN_SECONDS) if is_own else int(seen[test.file])
            seen[test.file] += test.seconds if is_own else 1
            found.append((-killers[test.id], is_one_of_many, turn, not is_own, test))
        found.sort(key=lambda ranked: ranked[:4])
        picked: list[Test] = []
        seconds = 0.0
        for *_, test in found:
            if len(picked) >= FEWEST_TESTS and seconds + test.seconds > self.seconds:
                break
            picked.append(test)
            seconds += test.seconds
        return picked


def own_tests(module: str) -> set[str]:
    """Return the names of the test files that hold a module."""
    name = Path(module).stem
    return {f"test_{each}" for each in (name, f"weight_{name}", *TESTED_BY.get(module, "").split())}


def _runs(test: Test, mutant: Mutant) -> bool:
    lines = test.lines.get(mutant.module, [])
    return bool(lines) and (not mutant.statements or not mutant.statements.isdisjoint(lines))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=MODULES, help="a module; may be given again")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=TEST_SECONDS, help="time of a mutant's tests")
    parser.add_argument("--own", action="store_true", help="only with the test files that hold a module")
    parser.add_argument("--again", action="store_true", help="run the survivors again")
    parser.add_argument("--reasons", type=Path, help="why survivors cannot change a result")
    options = parser.parse_args()
    found = every = [m for name in options.only or MODULES for m in mutants(name, source_of(name))]
    if options.sample is not None:
        found = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    reasons = (
        msgspec.json.decode(options.reasons.read_bytes(), type=dict[str, str]) if options.reasons else {}
    )
    import_what_tests_need()
    places.MUTANTS_CACHE.mkdir(parents=True, exist_ok=True)
    own = set().union(*map(own_tests, options.only or MODULES)) if options.own else None
    run = run_all(found, options.seconds, again=options.again, files=own)
    results = summed_up(found, run, reasons, Counter(mutant.module for mutant in every))
    Console(width=200).print(mutants_table(results.modules), highlight=False, markup=False)
    save(merged(results) if options.only or options.sample is None else results)


def import_what_tests_need() -> None:
    """Spare the forks what takes them seconds, set up as tests/conftest.py does."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch = import_module("torch")
    torch.set_num_threads(1)  # a fork has none of the other threads, and would wait for them
    import_module("transformers")
    import_module("peft")


def source_of(module: str) -> str:
    """The text of a module of lazarus."""
    return (SOURCE / module).read_text(encoding="utf-8")


def run_all(
    found: Sequence[Mutant], seconds: float, *, again: bool, files: Collection[str] | None = None
) -> Run:
    """Run whatever has no outcome yet: in one session what can be swapped, and the rest one by one.

    `files` are the names of the test files to run; None for all.
    """
    run = Run.begin(places.MUTANTS_CACHE / "outcomes.jsonl")
    left = [mutant for mutant in found if not run.is_done(mutant, again=again)]
    run.n_left = len(left)
    if left:
        print(f"{len(left)} of {len(found)} mutants to run", file=run.screen)
        needed = sorted({mutant.module for mutant in left})
        tests = learn_tests(MODULES, needed, partial(print, file=run.screen), files)
        picker = Picker(tests, seconds, run)
        before = dict(run.outcomes)
        run_swapped([mutant for mutant in left if mutant.function], picker.pick, run.record)
        run = Run.begin(run.path)
        left = [mutant for mutant in left if run.outcomes.get(mutant.key) == before.get(mutant.key)]
        run.n_left = len(left)
        run_imported(left, picker.pick, run.record)
    return run


def summed_up(
    found: Sequence[Mutant], run: Run, reasons: Mapping[str, str], n_mutants: Mapping[str, int]
) -> Results:
    """The figures of each module, and the survivors with the reasons that are known.

    `n_mutants` is how many each module has, of which those that are `found` were run.
    """
    known = {survivor.key: survivor.reason for survivor in read().survivors} | dict(reasons)
    survivors: list[Survivor] = []
    modules: list[Figures] = []
    for module in dict.fromkeys(mutant.module for mutant in found):
        ours = [(mutant, run.outcomes[mutant.key].ran) for mutant in found if mutant.module == module]
        alive = [
            Survivor(mutant.key, mutant.line, ran.n_tests, known.get(mutant.key, ""))
            for mutant, ran in ours
            if not ran.killed_by
        ]
        n_endless = sum(ran.killed_by == "time" for _, ran in ours)
        n_no_result = sum(bool(survivor.reason) for survivor in alive)
        n_killed = len(ours) - len(alive)
        modules.append(
            Figures(module, len(ours), n_killed, n_endless, len(alive), n_no_result, n_mutants[module])
        )
        survivors += alive
    return Results(modules, survivors)


if __name__ == "__main__":
    main()
