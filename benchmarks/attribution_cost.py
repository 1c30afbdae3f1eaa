"""What `--attribute blocks` costs: seconds in passes of base, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import AutoTokenizer

from benchmarks import places
from benchmarks.attribution_pairs import attributed, load, prompts
from benchmarks.attribution_results import Cost
from benchmarks.in_process import Pair, Stopwatch, run_bare
from benchmarks.one_run import OneRun, Task
from benchmarks.size import numbered_prompts, one_run

N_PROMPTS, N_ROUNDS = 200, 3


def measure_cost() -> Cost:
    """Run a pass of base, a run without and a run with an attribution in turn."""
    # Before this process is large: its children inherit its peak.
    peaks = [_in_process_of_its_own(options).peak for options in ({}, {"attribute": "blocks"})]
    torch.set_num_threads(1)
    texts = prompts(N_PROMPTS)
    pair = Pair(
        load(places.BASE), load(places.finetuned()), AutoTokenizer.from_pretrained(places.BASE), texts
    )
    batches = pair.batches(pair.run_lazarus(Stopwatch()).record.settings.batch_tokens)

    def attribute() -> None:
        attributed(pair.base, pair.finetuned, texts, tokenizer=pair.tokenizer, device="cpu")

    rounds = [
        (
            _timed(lambda: run_bare(pair.stacks[:1], batches)),
            _timed(lambda: pair.run_lazarus(Stopwatch())),
            _timed(attribute),
        )
        for _ in range(N_ROUNDS)
    ]
    forward, without, with_it = (list(seconds) for seconds in zip(*rounds, strict=True))
    return Cost(len(texts), forward, without, with_it, *peaks)


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the processor, which other processes on a busy machine do not add to."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _in_process_of_its_own(options: dict[str, str]) -> OneRun:
    file = numbered_prompts(N_PROMPTS, prompts(N_PROMPTS))
    kept = {"no_noise_floor": True, "dtype": "float32", **options}
    return one_run(Task(str(places.BASE), str(places.finetuned()), str(file), kept), threads=1)
