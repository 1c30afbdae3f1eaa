"""Measure lazarus on a GPU, as ratios within one run: `python -m benchmarks.gpu` (`make bench-gpu`).

The models are random and made here, so that nothing is fetched: what is measured does not depend on what
they say. Every time is a ratio of medians of rounds that are interleaved, after a round to warm up.
`--device cpu --small` runs all of it on a CPU in seconds: that tries the script; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lazarus
from lazarus.loading import pick_device
from lazarus.ranks import Rank

CHANGE = 0.02
LARGE_VOCABULARY = 150_000
SEED = 0

console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """The sizes of the models and of the prompts."""

    n_layers: int = 24
    width: int = 2048
    vocabulary: int = 32_000
    large_vocabulary: int = LARGE_VOCABULARY
    n_prompts: int = 64
    n_words: int = 96
    rounds: int = 5
    dtype: str = "bfloat16"


SMALL = Size(
    n_layers=2,
    width=32,
    vocabulary=120,
    large_vocabulary=400,
    n_prompts=3,
    n_words=4,
    rounds=1,
    dtype="float32",
)


class Figure(msgspec.Struct):
    """One figure: what was measured, and each round's seconds, or the count."""

    name: str
    value: float
    unit: str
    rounds: dict[str, list[float]] = {}


class Results(msgspec.Struct):
    """All figures of a run, and the machine."""

    device: str
    device_name: str
    torch: str
    cuda: str | None
    n_devices: int
    size: dict[str, Any]
    figures: list[Figure]


@dataclass
class Bench:
    """A pair in memory on a device, and what runs on it."""

    device: torch.device
    size: Size
    folder: Path
    tokenizer: PreTrainedTokenizerFast = field(init=False)
    base: LlamaForCausalLM = field(init=False)
    finetuned: LlamaForCausalLM = field(init=False)
    prompts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        words = [f"w{number}" for number in range(100)]
        ids = {word: number for number, word in enumerate(["<pad>", *words])}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>"
        )
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randint(0, len(words), (self.size.n_prompts, self.size.n_words), generator=generator)
        self.prompts = [" ".join(words[i] for i in row) for row in drawn.tolist()]
        self.base, self.finetuned = self.pair(self.size.n_layers, self.size.vocabulary)

    def pair(self, n_layers: int, vocabulary: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
        """Return a random Llama, and the same with every matrix moved by a share of its own size."""
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.size.width,
            intermediate_size=self.size.width * 11 // 4,
            num_hidden_layers=n_layers,
            num_attention_heads=max(1, self.size.width // 64),
            num_key_value_heads=max(1, self.size.width // 64),
            pad_token_id=0,
        )
        base = LlamaForCausalLM(config).to(self.device, getattr(torch, self.size.dtype)).eval()
        finetuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in finetuned.parameters():
                if parameter.dim() == 2:
                    parameter += CHANGE * parameter.std() * torch.randn_like(parameter)
        return base, finetuned

    def compare(self, *pair: Any, **options: Any) -> lazarus.ActivationDiff:
        """Run lazarus on models in memory, or on those in the folders."""
        base, finetuned = pair or (self.base, self.finetuned)
        options = {"no_noise_floor": True, "tokenizer": self.tokenizer, **options}
        return lazarus.activation_diff(base, finetuned, self.prompts, **options)

    def save(self) -> tuple[Path, Path]:
        """Save both models, for runs that read them from disk."""
        found = self.folder / "base", self.folder / "finetuned"
        for folder, model in zip(found, (self.base, self.finetuned), strict=True):
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return found

    def batches(self) -> list[Tensor]:
        """Return the prompts as ids, in batches of as many tokens as lazarus takes."""
        ids = self.tokenizer(self.prompts, return_tensors="pt").input_ids.to(self.device)
        n_rows = max(1, (512 if self.device.type == "cpu" else 8192) // ids.shape[1])
        return list(torch.split(ids, n_rows))

    @torch.no_grad()
    def bare(self) -> None:
        """Run two bare forward passes: without heads, hooks and metrics."""
        for batch in self.batches():
            for model in (self.base, self.finetuned):
                model.model(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def naive(self) -> None:
        """Run one prompt at a time, every hidden state; the last token's cosine."""
        for row in self.tokenizer(self.prompts, return_tensors="pt").input_ids.to(self.device):
            ours, theirs = (
                model(row[None], output_hidden_states=True).hidden_states
                for model in (self.base, self.finetuned)
            )
            torch.stack(
                [
                    torch.cosine_similarity(b[0, -1].double(), f[0, -1].double(), dim=0)
                    for b, f in zip(ours, theirs, strict=True)
                ]
            ).tolist()

    def seconds(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each way, round by round: one after the other, after a round to warm up."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.size.rounds + 1):
            for name, run in ways.items():
                self._wait()
                started = time.perf_counter()
                run()
                self._wait()
                if number:
                    found[name].append(time.perf_counter() - started)
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def against(bench: Bench, name: str, ways: Mapping[str, Callable[[], object]]) -> Iterator[Figure]:
    """Measure ways to run; yields the first one's time as a ratio to each of the others'."""
    rounds = bench.seconds(ways)
    first, *others = ways
    for other in others:
        ratio = statistics.median(rounds[first]) / statistics.median(rounds[other])
        yield Figure(f"{name}: {first} ÷ {other}", ratio, "×", {n: rounds[n] for n in (first, other)})


def speed(bench: Bench) -> Iterator[Figure]:
    """Against two bare forward passes, the naive loop, and what options cost."""
    compare = bench.compare
    ways: dict[str, Callable[[], object]] = {
        "lazarus": compare,
        "two bare passes": bench.bare,
        "the naive loop": bench.naive,
    }
    yield from against(bench, "speed", ways)
    plain = {"without": compare}
    costly: dict[str, dict[str, Any]] = {
        "the noise floor": {"no_noise_floor": False},
        "every token": {"position": "all"},
        "local changes": {"localize": True},
        "attribution": {"attribute": "blocks"},
    }
    for name, options in costly.items():
        yield from against(bench, name, {"with": partial(compare, **options), **plain})


def vocabulary(bench: Bench) -> Iterator[Figure]:
    """Compare every token's logits, with a large vocabulary, against the same with a small one."""
    pair = bench.pair(2, bench.size.large_vocabulary)
    few = bench.pair(2, bench.size.vocabulary)
    ways = {
        f"{bench.size.large_vocabulary:,} tokens": partial(bench.compare, *pair, position="all"),
        f"{bench.size.vocabulary:,} tokens": partial(bench.compare, *few, position="all"),
    }
    yield from against(bench, "every token's logits, two layers", ways)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        bench.compare(*pair, position="all")
        peak = (torch.cuda.max_memory_allocated(bench.device) - before) / 2**30
        yield Figure("every token's logits: peak memory beside the weights", peak, "GiB")


@contextmanager
def counting_waits(found: list[str]) -> Iterator[None]:
    """Note each time that the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [str(each.message) for each in told if "synchronizing" in str(each.message)]


def waits(bench: Bench) -> Iterator[Figure]:
    """Count how often the host waits for the device: for a batch more, and for a layer more of a batch."""
    if bench.device.type != "cuda":
        return
    n_tokens = bench.size.n_words * 4

    def count(n_layers: int, batch_tokens: int) -> int:
        told: list[str] = []
        pair = bench.pair(n_layers, bench.size.vocabulary)
        with counting_waits(told):
            bench.compare(*pair, batch_tokens=batch_tokens)
        return len(told)

    n_batches = -(-bench.size.n_prompts // 4) - 1
    few, many = ((count(n, n_tokens) - count(n, 10**9)) / n_batches for n in (2, 6))
    yield Figure("waits of the host: a batch", few, "")
    yield Figure("waits of the host: a layer and batch", (many - few) / 4, "")


def streaming(bench: Bench) -> Iterator[Figure]:
    """Read blocks from disk while others compute, against reading alone and against computing alone."""
    folders = bench.save()
    device = {"device": str(bench.device), "dtype": bench.size.dtype}

    def read() -> None:
        """Read every tensor of both models onto the device."""
        for folder in folders:
            for file in sorted(folder.glob("*.safetensors")):
                load_onto(file, bench.device)

    ways: dict[str, Callable[[], object]] = {
        "streamed": partial(bench.compare, *folders, memory="stream", **device),
        "reading alone": read,
        "computing alone": bench.compare,
    }
    rounds = bench.seconds(ways)
    streamed, reading, computing = (statistics.median(rounds[name]) for name in ways)
    # Of the shorter of the two, the share that the longer one hides.
    hidden = (reading + computing - streamed) / min(reading, computing)
    yield Figure("streaming: share of reading or computing that is hidden", hidden, "", rounds)
    yield Figure("streaming: streamed ÷ in memory", streamed / computing, "×")


def load_onto(file: Path, device: torch.device) -> None:
    """Read all tensors of a file onto a device."""
    for tensor in load_file(file).values():
        tensor.to(device)


def two_devices(bench: Bench) -> Iterator[Figure]:
    """Two processes on two devices against one, whole commands."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        return
    base, finetuned = bench.save()
    prompts = bench.folder / "prompts.txt"
    prompts.write_text("\n".join(bench.prompts), encoding="utf-8")
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
    words = ["lazarus", "introspect", "activation-diff", "-b", str(base), "-f", str(finetuned)]
    words += ["-p", f"@{prompts}", "--device", bench.device.type, "--dtype", bench.size.dtype]

    def run(before: Sequence[str], number: list[int]) -> None:
        number.append(0)
        work = bench.folder / f"work-{len(before)}-{len(number)}"
        command = [sys.executable, "-m", *before, *words, "--work-dir", str(work)]
        subprocess.run(command, check=True, capture_output=True, timeout=3600)

    ways: dict[str, Callable[[], object]] = {
        "two processes": partial(run, torchrun, []),
        "one": partial(run, [], []),
    }
    yield from against(bench, "two devices, whole commands", ways)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "speed": speed,
    "vocabulary": vocabulary,
    "waits": waits,
    "streaming": streaming,
    "two-devices": two_devices,
}


def measure(device: torch.device, size: Size, parts: Sequence[str]) -> Results:
    """Measure these parts on a device."""
    figures = list[Figure]()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, size, Path(folder))
        for name in parts:
            console.print(f"{name} …")
            figures += PARTS[name](bench)
    on_gpu = device.type == "cuda"
    return Results(
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_gpu else "CPU: these figures mean nothing",
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        n_devices=torch.cuda.device_count(),
        size={name: getattr(size, name) for name in Size.__dataclass_fields__},
        figures=figures,
    )


def table(results: Results) -> Table:
    """Return the figures as a table."""
    found = Table("figure", "value", title=f"{results.device_name}, torch {results.torch}")
    for figure in results.figures:
        found.add_row(figure.name, f"{figure.value:.3g} {figure.unit}".strip())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts, and print a table and JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--small", action="store_true", help="try everything out; figures mean nothing")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; repeatable")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        console.print("There is no CUDA device here. To try the script itself: --device cpu --small")
        return 1
    size = SMALL if chosen.small else Size()
    results = measure(pick_device(chosen.device, Rank()), size, chosen.part or list(PARTS))
    console.print(table(results))
    told = msgspec.json.format(msgspec.json.encode(results))
    sys.stdout.buffer.write(told + b"\n")
    if chosen.output is not None:
        chosen.output.write_bytes(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
