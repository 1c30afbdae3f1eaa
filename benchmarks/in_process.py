"""Lazarus, the naive loop and two bare forward passes in turn, in one process, the models loaded once.

Run as `python -m benchmarks.in_process BASE FINETUNED PROMPTS DTYPE RUNS`; prints an `InProcess` record
as JSON. One round more than asked for is run: the first warms up the kernels and is thrown away.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.naive import load_model, mean_cosines
from benchmarks.results import InProcess, Round
from lazarus import ActivationDiff, activation_diff
from lazarus.activation import Observer
from lazarus.batches import TokenBatch, make_batches
from lazarus.loading import Role
from lazarus.models import dissect
from lazarus.notes import Notes
from lazarus.prompts import Prompt
from lazarus.tokens import TokenOptions, tokenize_pair

GEMM_PASSES = 3

console = Console(stderr=True)


@dataclass
class Stopwatch(Observer):
    """Notes when both models were there, and when the batches began."""

    loaded: float = 0.0
    began: float = 0.0

    def loading(self, role: Role, name: str) -> None:
        """Nothing is loaded: the models are in memory."""

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Both models are there."""
        self.loaded = time.perf_counter()

    def running(self, n_tokens: int) -> None:
        """The batches begin."""
        self.began = time.perf_counter()

    def advanced(self, n_tokens: int) -> None:
        """Nothing to note."""


@dataclass(frozen=True)
class Pair:
    """Both models in memory, and what is run through them."""

    base: Any
    finetuned: Any
    tokenizer: Any
    texts: list[str]

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module]:
        """Both models without their heads."""
        return dissect(self.base).stack, dissect(self.finetuned).stack

    @property
    def linears(self) -> list[nn.Linear]:
        """Every Linear layer of one model's blocks."""
        blocks = dissect(self.base).blocks
        return [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]

    def run_lazarus(self, stopwatch: Stopwatch) -> ActivationDiff:
        """The whole of lazarus but the loading and the noise; what that costs is in `benchmarks.trust`."""
        return activation_diff(
            self.base,
            self.finetuned,
            self.texts,
            tokenizer=self.tokenizer,
            observer=stopwatch,
            device="cpu",
            no_noise_floor=True,
        )

    def run_naive(self) -> Tensor:
        """The loop that lazarus replaces."""
        return mean_cosines(self.base, self.finetuned, self.tokenizer, self.texts)

    def batches(self, batch_tokens: int) -> list[TokenBatch]:
        """The batches that lazarus makes."""
        prompts = [Prompt(text) for text in self.texts]
        tokenized, _ = tokenize_pair(prompts, (self.tokenizer, self.tokenizer), TokenOptions(), Notes())
        return make_batches(tokenized, batch_tokens, "right", self.tokenizer.pad_token_id or 0)


def run_bare(stacks: Sequence[nn.Module], batches: Sequence[TokenBatch]) -> None:
    """Both forward passes over every batch, and nothing else."""
    with torch.no_grad():
        for batch in batches:
            input_ids, mask = batch.padded()
            for stack in stacks:
                stack(input_ids=input_ids, attention_mask=mask, use_cache=False)


def timed(work: Callable[[], object], precision: str = "highest") -> float:
    """Seconds that `work` takes, under torch's default precision of float32 products or the given one."""
    torch.set_float32_matmul_precision(precision)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def gemm_rates(linears: Sequence[nn.Linear], n_rows: int) -> dict[str, float]:
    """FLOP a second of the blocks' own products on random rows, each precision's best pass.

    In float32, "medium" may take another library, and on a processor with AMX a lower precision.
    """
    dtype = linears[0].weight.dtype
    rows = {n: torch.randn(n_rows, n, dtype=dtype) for n in {layer.in_features for layer in linears}}
    flops = 2.0 * n_rows * count_parameters(linears)

    def every_product() -> None:
        with torch.no_grad():
            for layer in linears:
                layer(rows[layer.in_features])

    precisions = ("highest", "medium") if dtype is torch.float32 else ("highest",)
    return {
        precision: flops / min(timed(every_product, precision) for _ in range(GEMM_PASSES))
        for precision in precisions
    }


def count_parameters(linears: Sequence[nn.Linear]) -> int:
    """Weights in these layers."""
    return sum(layer.weight.numel() for layer in linears)


def measure_round(pair: Pair, batches: Sequence[TokenBatch], batch_tokens: int) -> Round:
    """Each of the three once."""
    stopwatch = Stopwatch()
    gemm = gemm_rates(pair.linears, batch_tokens)
    timed(lambda: pair.run_lazarus(stopwatch))
    ended = time.perf_counter()
    naive = timed(pair.run_naive)
    stacks = pair.stacks
    bare = timed(lambda: run_bare(stacks, batches))
    return Round(
        lazarus=ended - stopwatch.loaded,
        preparation=stopwatch.began - stopwatch.loaded,
        naive=naive,
        bare=bare,
        gemm=gemm,
    )


def measure(pair: Pair, dtype: str, n_runs: int) -> InProcess:
    """Warm up, check that lazarus and the naive loop agree, and measure every round."""
    diff, naive = pair.run_lazarus(Stopwatch()), pair.run_naive()
    batch_tokens = diff.record.settings.batch_tokens
    batches = pair.batches(batch_tokens)
    run_bare(pair.stacks, batches)
    rounds = []
    for number in range(1, n_runs + 1):
        rounds.append(measure_round(pair, batches, batch_tokens))
        console.print(f"{dtype}, run {number} of {n_runs}: {_told(rounds[-1])}", highlight=False)
    return InProcess(
        dtype=dtype,
        n_threads=torch.get_num_threads(),
        n_tokens=sum(batch.n_tokens for batch in batches),
        n_padded=sum(batch.padded()[0].numel() for batch in batches),
        n_batches=len(batches),
        batch_tokens=batch_tokens,
        linear_parameters=count_parameters(pair.linears),
        worst_difference=_worst_difference(diff, naive),
        rounds=rounds,
    )


def _worst_difference(diff: ActivationDiff, naive: Tensor) -> float:
    """Over every block but the last, in whose place transformers returns the final norm's output."""
    ours = torch.tensor([layer.cosine_similarity for layer in diff.layers[:-1]])
    return float((ours - naive[1:-1]).abs().max())


def _told(found: Round) -> str:
    return f"lazarus {found.lazarus:.2f} s, naive loop {found.naive:.2f} s, bare {found.bare:.2f} s"


def main(base: str, finetuned: str, prompts: str, dtype: str, runs: str) -> None:
    """Load, measure, write the record to standard output."""
    pair = Pair(
        load_model(base, dtype),
        load_model(finetuned, dtype),
        AutoTokenizer.from_pretrained(base),
        Path(prompts).read_text(encoding="utf-8").splitlines(),
    )
    sys.stdout.buffer.write(msgspec.json.encode(measure(pair, dtype, int(runs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
