"""Big models and many prompts: `python -m benchmarks.size` from the root of the repository.

Each part takes its ratios within one run, its commands in turn; all figures are saved. The parts that hold
a limit of memory make a cgroup (version 1) for it, and need root.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks import places
from benchmarks.commands import ENVIRONMENT, compare_models, measure, python_module, run_module
from benchmarks.figures import Figure, Page, run_parts
from benchmarks.one_run import OneRun, Task
from benchmarks.results import PrefixRuns
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED

CGROUP = Path("/sys/fs/cgroup/memory/lazarus-benchmark")
LIMIT_BYTES = 1_500_000_000
GIGABYTE = 1e9
MEBIBYTE = 2**20
KILLS = 20

progress = Console(stderr=True)


# --- models and prompts -------------------------------------------------------------------------


def random_llamas(n_layers: int, width: int, dtype: str = "bfloat16") -> tuple[str, str]:
    """A random Llama with SmolLM2's tokenizer, and a second one that differs a little everywhere."""
    name = f"random-llama-{n_layers}x{width}" + ("" if dtype == "bfloat16" else f"-{dtype}")
    folder = places.CACHE / name
    run_module("benchmarks.random_llama", folder, str(n_layers), str(width), dtype)
    return str(folder / "base"), str(folder / "finetuned")


def numbered_prompts(count: int, texts: Sequence[str]) -> Path:
    """A file of so many prompts; no two are the same."""
    path = places.CACHE / f"prompts-{count}-{len(texts)}.txt"
    lines = (f"{number}. {text}" for number, text in enumerate(islice(cycle(texts), count)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def benchmark_texts() -> list[str]:
    """The benchmark's prompts."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()


# --- one run ------------------------------------------------------------------------------------


def one_run(task: Task, *, limit: int | None = None, threads: int | None = None) -> OneRun:
    """Run a task in a process of its own, within a limit of memory where one is given."""
    environment = dict(ENVIRONMENT)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with memory_limited(limit) as enter:
        process = subprocess.run(
            python_module("benchmarks.one_run", msgspec.json.encode(task).decode()),
            cwd=places.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            preexec_fn=enter,
            check=True,
        )
    found = msgspec.json.decode(process.stdout, type=OneRun)
    told = f"{found.loading:.1f} + {found.running:.1f} s, {found.peak / MEBIBYTE:.0f} MiB, {found.memory}"
    progress.print(f"{Path(task.base).parent.name} {task.options}: {told}", highlight=False)
    return found


@contextlib.contextmanager
def memory_limited(limit: int | None) -> Iterator[Callable[[], None] | None]:
    """Yield what a child calls to be in a cgroup of so much memory."""
    if limit is None:
        yield None
        return
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(limit), encoding="ascii")

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    try:
        yield enter
    finally:
        CGROUP.rmdir()


# --- the parts ----------------------------------------------------------------------------------


def measure_stream(n_runs: int) -> Iterator[Figure]:
    """A pair of 2.5 GB a model in 1.5 GB of memory, against both models in memory."""
    base, finetuned = random_llamas(24, 2048)
    prompts = str(numbered_prompts(200, benchmark_texts()))
    ratios, differences, peaks = [], [], []
    for _ in range(n_runs):
        options = {"dtype": "bfloat16", "memory": "resident"}
        resident = one_run(Task(base, finetuned, prompts, options))
        streamed = one_run(Task(base, finetuned, prompts, {**options, "memory": "stream"}), limit=LIMIT_BYTES)
        ratios.append(streamed.seconds / resident.seconds)
        both = zip(streamed.divergence, resident.divergence, strict=True)
        differences.append(max(abs(a - b) for a, b in both))
        peaks.append(streamed.peak / MEBIBYTE)
    size = sum(f.stat().st_size for f in Path(base).glob("*.safetensors")) / GIGABYTE
    yield Figure("stream", f"{size:.1f} GB a model in 1.5 GB: seconds, streamed / resident", ratios, most=1.5)
    yield Figure("stream", "the same: largest difference of a layer's divergence", differences, "", most=0.0)
    yield Figure("stream", "the same: peak memory", peaks, "MiB")


def measure_flat(n_runs: int) -> Iterator[Figure]:
    """Peak memory by layers and by prompts, all in a cgroup of 1.5 GB."""
    del n_runs
    few, many = (str(numbered_prompts(count, benchmark_texts())) for count in (200, 2000))
    shallow, deep = random_llamas(12, 1024), random_llamas(48, 1024)
    options = {"dtype": "bfloat16", "memory": "stream"}
    first = one_run(Task(*shallow, few, options), limit=LIMIT_BYTES)
    layers = one_run(Task(*deep, few, options), limit=LIMIT_BYTES)
    prompts = one_run(Task(*shallow, many, options), limit=LIMIT_BYTES)
    yield Figure("flat", "peak memory, 48 layers / 12 layers", [layers.peak / first.peak], most=1.1)
    yield Figure("flat", "peak memory, 2,000 prompts / 200 prompts", [prompts.peak / first.peak], most=1.1)


def measure_once(n_runs: int, count: int = 200) -> Iterator[Figure]:
    """An adapter, and a fine-tune of the last two blocks, against a full fine-tune."""
    run_module("benchmarks.pairs", "last-two", "lora-15-29")
    prompts = str(numbered_prompts(count, benchmark_texts()))
    pairs = {name: str(places.pair_folder(name)) for name in ("lora-15-29", "last-two")}
    pairs["full"] = str(places.finetuned())
    targets = {"lora-15-29": ("an adapter on layers 15 to 29", 0.8), "last-two": ("the last two blocks", 0.6)}
    part = "once" if count == 200 else f"once-{count}"
    for dtype in ("float32", "bfloat16"):
        name_of_run = f"{dtype}, {count:,} prompts"
        rounds = [
            {name: one_run(Task(str(places.BASE), f, prompts, {"dtype": dtype})) for name, f in pairs.items()}
            for _ in range(n_runs)
        ]
        for name, (what, most) in targets.items():
            ratios = [r[name].running / r["full"].running for r in rounds]
            yield Figure(part, f"{name_of_run}: {what} / a full fine-tune, seconds", ratios, most=most)
            peaks = [r[name].peak / r["full"].peak for r in rounds]
            yield Figure(part, f"{name_of_run}: {what} / a full fine-tune, peak memory", peaks)


def measure_check(n_runs: int) -> Iterator[Figure]:
    """Yield what looking for common tensors costs a pair that has none."""
    prompts = str(numbered_prompts(200, benchmark_texts()))
    ratios = []
    for _ in range(n_runs):
        task = Task(str(places.BASE), str(places.finetuned()), prompts, {"dtype": "bfloat16"})
        without = one_run(msgspec.structs.replace(task, looks_for_common=False))
        ratios.append(one_run(task).seconds / without.seconds)
    yield Figure("check", "a full fine-tune, seconds: looking for common tensors / not", ratios, most=1.03)


def measure_prefix(n_runs: int) -> Iterator[Figure]:
    """200 prompts with a system prompt, which runs once or with each of them."""
    prompts = numbered_prompts(200, benchmark_texts())
    for dtype in ("float32", "bfloat16"):
        pair = (places.BASE, places.finetuned(), prompts)
        said = run_module("benchmarks.prefix", *pair, dtype, str(n_runs))
        found = msgspec.json.decode(said, type=PrefixRuns)
        what = f"{dtype}: a system prompt of {found.n_prefix} tokens run once / with each of 200 prompts"
        yield Figure("prefix", f"{what}, seconds", found.ratios, most=0.6)
        yield Figure("prefix", f"{what}, largest difference of a divergence", [found.worst_divergence], "")


def measure_ranks(n_runs: int) -> Iterator[Figure]:
    """Two ranks of one thread against one process of two."""
    prompts = numbered_prompts(600, benchmark_texts())
    ratios = []
    for _ in range(n_runs):
        two = _seconds_of_ranks(2, prompts, threads=1)
        one = _seconds_of_ranks(1, prompts, threads=2)
        progress.print(f"two ranks {two:.1f} s, one process {one:.1f} s", highlight=False)
        ratios.append(one / two)
    yield Figure("ranks", "prompts a second, two ranks of one thread / one process of two", ratios, least=0.9)


def _seconds_of_ranks(n_ranks: int, prompts: Path, threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = compare_models(places.BASE, places.finetuned(), prompts, "--work-dir", folder)
        if n_ranks > 1:
            launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks))
            command = python_module(*launcher, *command[1:])
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        subprocess.run(command, cwd=places.ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started


def measure_kills(n_runs: int) -> Iterator[Figure]:
    """A rank killed at a random moment, and what comes out in the end."""
    del n_runs
    prompts = numbered_prompts(3000, benchmark_texts())
    chance = random.Random(0)
    expected = _numbers(_run_to_end(prompts, None))
    differing = 0
    for number in range(KILLS):
        found = _numbers(_run_to_end(prompts, chance))
        differing += found != expected
        progress.print(f"killed {number + 1} of {KILLS}: {differing} differ", highlight=False)
    yield Figure("kills", f"results that differ, of {KILLS} with a rank killed", [differing], "", most=0)


def _run_to_end(prompts: Path, chance: random.Random | None) -> Path:
    """Two ranks; one of them is killed at a random moment and started again. Returns the saved result."""
    folder = Path(tempfile.mkdtemp(dir=places.CACHE))
    saved = folder / "result.json"
    command = [
        *compare_models(DEMO_BASE, DEMO_FINETUNED, prompts, "--work-dir", str(folder / "work")),
        "-o",
        str(saved),
    ]

    def start(rank: int) -> subprocess.Popen[bytes]:
        ranked = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(command, cwd=places.ROOT, env=ranked, stdout=subprocess.DEVNULL)

    ranks = [start(0), start(1)]
    if chance is not None:
        time.sleep(chance.uniform(3, 12))
        victim = chance.randrange(2)
        ranks[victim].send_signal(signal.SIGKILL)
        ranks[victim].wait()
        ranks[victim] = start(victim)
    for rank in ranks:
        if rank.wait():
            raise SystemExit(f"a rank ended with {rank.returncode}")
    return saved


def _numbers(saved: Path) -> dict[str, Any]:
    """The result, less what may differ: when it was made, and what was found in the folder."""
    record: dict[str, Any] = json.loads(saved.read_bytes())
    for name in ("created", "notes", "settings"):
        record.pop(name)
    return record


def measure_many(n_runs: int) -> Iterator[Figure]:
    """100,000 short prompts on the demo pair: memory beyond the result's rows, and time a prompt."""
    del n_runs
    texts = [" ".join(text.split()[:5]) for text in benchmark_texts()]
    runs = {}
    for count in (10_000, 100_000):
        prompts, saved = numbered_prompts(count, texts), str(places.CACHE / "many.csv")
        runs[count] = measure(compare_models(DEMO_BASE, DEMO_FINETUNED, prompts, "-o", saved))
        told = f"{runs[count].seconds:.1f} s, {runs[count].peak / MEBIBYTE:.0f} MiB"
        progress.print(f"{count} prompts: {told}", highlight=False)
    few, many = runs[10_000], runs[100_000]
    yield Figure("many", "100,000 / 10,000 short prompts, seconds", [many.seconds / few.seconds], most=10)
    grown = (many.peak - few.peak) / 90_000
    yield Figure("many", "the same: further memory a prompt", [grown / 1024], "KiB")
    yield Figure("many", "the same: peak memory at 100,000", [many.peak / MEBIBYTE], "MiB")


PARTS: dict[str, Callable[[int], Iterator[Figure]]] = {
    "stream": measure_stream,
    "flat": measure_flat,
    "once": measure_once,
    "once-1000": partial(measure_once, count=1000),
    "check": measure_check,
    "prefix": measure_prefix,
    "ranks": measure_ranks,
    "kills": measure_kills,
    "many": measure_many,
}


if __name__ == "__main__":
    run_parts("benchmarks.size", __doc__ or "", PARTS, Page("size.json", "big-models.md"))
