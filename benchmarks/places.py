"""The places of the benchmark's files."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

ROOT = _HERE.parent
PROMPTS = _HERE / "prompts.txt"
CACHE = _HERE / "cache"
BASE = CACHE / "smollm2"
RESULTS = _HERE / "results" / "speed.json"
LAST_RESULTS = CACHE / "last.json"
DOCS = ROOT / "docs" / "benchmarks.md"
TRUST = _HERE / "results" / "trust.json"
TRUST_DOCS = ROOT / "docs" / "trust.md"
MUTANTS = _HERE / "results" / "mutants.json"
MUTANTS_CACHE = CACHE / "mutants"

STEPS = 40
TRAINING_FACTS = "finetuning.json"


def finetuned(steps: int = STEPS) -> Path:
    """The folder of the fine-tune that took so many steps."""
    return CACHE / ("smollm2-arithmetic" if steps == STEPS else f"smollm2-arithmetic-{steps}-steps")


def pair_folder(name: str) -> Path:
    """The folder of one of the models that `python -m benchmarks.pairs` makes."""
    return CACHE / f"smollm2-{name}"
