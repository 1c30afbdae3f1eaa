"""Let atheris make the inputs of one target, guided by the lines that they reach: a part of `make fuzz`.

`fuzz_coverage.py TARGET GROUND SECONDS`. atheris lies beside the environment, in `.venv/fuzz`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lazarus"]):
    import forks  # noqa: F401 - imports lazarus
    from fuzz import FINDINGS, LIMIT_SECONDS, Finding, check, report
    from fuzz_targets import TARGETS, prepare
from mutations import mutated

MOST_BYTES = 2**16
"""Longer seeds, such as whole models, are cut: their headers are in front."""


def main() -> None:
    """Fuzz until the time is up; exits with 1 where something was found."""
    name, ground, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    target, seen = TARGETS[name], set[tuple[str, str]]()
    seed = (ground / target.seed).read_bytes()[:MOST_BYTES]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = prepare(target, ground, Path(folder) / "changed")
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        seeds.joinpath("good").write_bytes(seed)

        def one_input(data: bytes) -> None:
            path.write_bytes(data)
            found = check(target, path)
            if found is not None:
                report(Finding(name, found, data), seen)

        def change(data: bytes, most: int, number: int) -> bytes:
            dice = random.Random(number)
            return mutated(data, target.kind, dice)[:most] if number % 2 else atheris.Mutate(data, most)

        # What is found is reported and passed over, so that one fault does not hide the others.
        options = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", f"-timeout={LIMIT_SECONDS}"]
        options += ["-rss_limit_mb=4096", f"-artifact_prefix={FINDINGS}/", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(seeds)], one_input, custom_mutator=change)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        atheris.Fuzz()


if __name__ == "__main__":
    main()
