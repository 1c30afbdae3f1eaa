"""How often a clean pair of processes is called changed: `python -m benchmarks.crossed [--runs N]`.

One process records a model, another one compares the same model with that recording. What they do not have in
common ought not to matter: the number of threads, the attention kernel, the size of batches. Each is called
identical, within noise, or changed; the last is a mistake.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from benchmarks import places
from benchmarks.trust_report import fill_in, table
from lazarus import ActivationDiff, activation_diff, record
from lazarus.demo import BASE
from lazarus.options import RecordArguments

RESULTS = places.ROOT / "benchmarks" / "results" / "crossed.json"
DOCS = places.ROOT / "docs" / "upgrade.md"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "In 1969 the first humans landed on the",
    "My favourite food is pizza because",
    "If the file does not exist, then the",
    "12 + 7 =",
)
SUBJECTS = ("SmolLM2-135M", "the demo's base", "a random GPT-2", "a random Mixtral")
DTYPES = ("float32", "bfloat16")
THREADS, KERNELS, BATCHES = (1, 2), ("sdpa", "eager"), (32, 512)
FACTORS = ("threads", "attention", "batch_tokens")
console = Console(stderr=True)


class Environment(Struct, frozen=True):
    """What is set for a whole process."""

    threads: int
    attention: str


class Condition(Struct, frozen=True):
    """How a model is run."""

    threads: int
    attention: str
    batch_tokens: int

    @property
    def environment(self) -> Environment:
        """Return what of it is set for the process."""
        return Environment(self.threads, self.attention)


class Job(Struct, frozen=True):
    """One comparison: of what, recorded how, and compared how."""

    subject: str
    dtype: str
    recorded: Condition
    live: Condition

    @property
    def differing(self) -> tuple[str, ...]:
        """Return what the two processes do not have in common."""
        return tuple(name for name in FACTORS if getattr(self.recorded, name) != getattr(self.live, name))

    def folder(self, root: Path) -> Path:
        """Return where the recording of it is: other jobs may use it as well."""
        told = (SUBJECTS.index(self.subject), self.dtype, *msgspec.structs.astuple(self.recorded))
        return root / "-".join(map(str, told))


class Found(Struct, frozen=True):
    """What a comparison came to: its verdict, and how far the worst site was above its floor."""

    job: Job
    verdict: str | None
    worst: float
    """relative L2 as a multiple of the noise floor, where that is largest"""
    where: str


class Results(Struct, frozen=True):
    """All that was measured."""

    n_prompts: int
    found: list[Found]


def jobs(n_runs: int) -> list[Job]:
    """Return so many comparisons, as many of each model in each type as of any other, drawn at random."""
    conditions = [Condition(*told) for told in itertools.product(THREADS, KERNELS, BATCHES)]
    pairs = list(itertools.permutations(conditions, 2))
    cells = []
    for number, (subject, dtype) in enumerate(itertools.product(SUBJECTS, DTYPES)):
        drawn = random.Random(number).sample(pairs, len(pairs))
        cells.append([Job(subject, dtype, recorded, live) for recorded, live in drawn])
    return [job for row in zip(*cells, strict=True) for job in row][:n_runs]


@cache
def model_of(subject: str, dtype: str, attention: str) -> Any:
    """Return a model in memory, with the kernel that its attention is to run with."""
    settings: Any = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if subject == SUBJECTS[0]:
        return AutoModelForCausalLM.from_pretrained(places.BASE, **settings)
    if subject == SUBJECTS[1]:
        return AutoModelForCausalLM.from_pretrained(BASE, **settings)
    torch.manual_seed(0)
    known: Any = {"vocab_size": len(tokenizer_of(subject)), "attn_implementation": attention}
    if subject == SUBJECTS[2]:
        size = {"n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
        return GPT2LMHeadModel(GPT2Config(**size, **known)).to(settings["dtype"]).eval()
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "initializer_range": 0.1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    return MixtralForCausalLM(MixtralConfig(**size, **heads, **known)).to(settings["dtype"]).eval()


@cache
def tokenizer_of(subject: str) -> Any:
    """Return the tokenizer of a model; those that are random have that of the demo."""
    return AutoTokenizer.from_pretrained(places.BASE if subject == SUBJECTS[0] else BASE)


def record_all(wanted: Iterable[Job], environment: Environment, root: Path) -> None:
    """Record what the jobs of one environment need, in this process."""
    for job in wanted:
        folder, how = job.folder(root), job.recorded
        if how.environment == environment and not folder.exists():
            model = model_of(job.subject, job.dtype, environment.attention)
            tokenizer = tokenizer_of(job.subject)
            options: RecordArguments = {"batch_tokens": how.batch_tokens, "device": "cpu"}
            options |= {"logits": True, "top_k": 0}
            record(model, PROMPTS, folder, tokenizer=tokenizer, **options)


def compare_all(wanted: Iterable[Job], environment: Environment, root: Path) -> list[Found]:
    """Compare what is recorded with the models of one environment, in this process."""
    found = []
    for job in wanted:
        if job.live.environment == environment:
            model = model_of(job.subject, job.dtype, environment.attention)
            diff = activation_diff(
                model,
                job.folder(root),
                tokenizer=tokenizer_of(job.subject),
                batch_tokens=job.live.batch_tokens,
                device="cpu",
            )
            found.append(Found(job, diff.summary.verdict, *worst(diff)))
    return found


def worst(diff: ActivationDiff) -> tuple[float, str]:
    """Return the largest multiple of its noise floor that the relative L2 of any site is, and the site."""
    places = [(f"layer {layer.layer}", layer) for layer in diff.layers]
    multiples = {
        name: found.relative_l2 / found.noise_floor
        for name, found in [*places, *((site.name, site) for site in diff.record.sites)]
        if found.relative_l2 is not None and found.noise_floor
    }
    name = max(multiples, key=lambda each: multiples[each], default="")
    return multiples.get(name, float("nan")), name


def in_process(step: str, environment: Environment, n_runs: int, root: Path) -> bytes:
    """Run one step of one environment in a process of its own."""
    told = [step, environment.attention, str(environment.threads), str(n_runs), str(root)]
    threads = {"OMP_NUM_THREADS": str(environment.threads), "MKL_NUM_THREADS": str(environment.threads)}
    command = [sys.executable, "-m", "benchmarks.crossed", "--step", *told]
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True)
    return done.stdout


def step(told: Sequence[str]) -> None:
    """Do one step, as the process of it."""
    name, attention, threads, n_runs, root = told
    environment, wanted = Environment(int(threads), attention), jobs(int(n_runs))
    if name == "record":
        record_all(wanted, environment, Path(root))
    else:
        found = compare_all(wanted, environment, Path(root))
        sys.stdout.buffer.write(msgspec.json.encode(found))


def measure(n_runs: int) -> Results:
    """Record in one process an environment, then compare in others."""
    environments = [Environment(*told) for told in itertools.product(THREADS, KERNELS)]
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as root:
        for environment in environments:
            in_process("record", environment, n_runs, Path(root))
            console.print(f"recorded: {environment}", highlight=False)
        for environment in environments:
            answer = in_process("compare", environment, n_runs, Path(root))
            found += msgspec.json.decode(answer, type=list[Found])
            console.print(f"compared: {environment}", highlight=False)
    return Results(len(PROMPTS), found)


def report(results: Results) -> str:
    """What was measured, as two tables and a sentence."""
    n_changed = sum(each.verdict == "changed" for each in results.found)
    told = (
        f"{len(results.found)} clean pairs of processes, {results.n_prompts} prompts: {n_changed} called "
        f"changed ({n_changed / len(results.found):.0%})."
    )
    kinds = [(" and ".join(f"`{n}`" for n in names), names) for names in _combinations()]
    by_factor = _rows(results, [(name, _differs_in(names)) for name, names in kinds])
    cells = list(itertools.product(SUBJECTS, DTYPES))
    by_model = _rows(results, [(f"{subject}, {dtype}", _is_of(subject, dtype)) for subject, dtype in cells])
    head = ("pairs", "identical", "within noise", "changed", "largest multiple of the floor, states")
    return "\n\n".join([told, table(("what differs", *head), by_factor), table(("model", *head), by_model)])


def _combinations() -> list[tuple[str, ...]]:
    sizes = range(1, len(FACTORS) + 1)
    return [names for size in sizes for names in itertools.combinations(FACTORS, size)]


def _differs_in(names: tuple[str, ...]) -> Callable[[Job], bool]:
    return lambda job: job.differing == names


def _is_of(subject: str, dtype: str) -> Callable[[Job], bool]:
    return lambda job: (job.subject, job.dtype) == (subject, dtype)


def _rows(results: Results, kinds: Iterable[tuple[str, Callable[[Job], bool]]]) -> list[list[str]]:
    rows = []
    for name, belongs in kinds:
        some = [each for each in results.found if belongs(each.job)]
        if some:
            verdicts = [each.verdict for each in some]
            counts = [str(verdicts.count(each)) for each in ("identical", "within_noise", "changed")]
            rows.append([name, str(len(some)), *counts, f"{max(each.worst for each in some):.2f}"])
    return rows


def main() -> None:
    """Measure, save, and write the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step(given.step)
        return
    results = measure(given.runs)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    console.print(report(results), highlight=False)
    if DOCS.exists():
        fill_in(DOCS, report(results))


if __name__ == "__main__":
    main()
