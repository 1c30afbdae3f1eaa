"""Call the library in one process for half an hour, and watch what it holds: `make soak`.

Memory, open files, threads, child processes and temporary files must be flat once the process is warm. Three
sizes that are seldom met come first, each in a fork: very many prompts, a prompt of the whole context, 200
layers.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import forks
import lazarus
from factories import perturbed, save_model, word_tokenizer
from lazarus.demo import BASE, FINETUNED

PROMPTS = [f"{i} + {i % 7} =" for i in range(40)]
WARM = 10
"""rounds until allocators and caches have what they need"""
MOST_GROWTH_BYTES = 64 * 2**20
"""of the resident set from the first third of the rounds to the last: the allocator's own ups and downs"""


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    n_bytes: int
    n_files: int
    n_threads: int
    n_children: int
    n_temporary: int

    @classmethod
    def now(cls, folder: Path) -> Held:
        gc.collect()
        this = psutil.Process()
        return cls(
            this.memory_info().rss,
            len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else this.num_fds(),
            this.num_threads(),
            len(this.children(recursive=True)),
            len(list(folder.rglob("*"))),
        )


def one_round(folder: Path) -> None:
    """Call everything once."""
    pair = lazarus.activation_diff(BASE, FINETUNED, PROMPTS, localize=True, readout="auto")
    pair.save(folder / "a.json")
    pair.save(folder / "a.html")
    lazarus.activation_diff(BASE, FINETUNED, PROMPTS[:4], memory="stream")
    lazarus.activation_diff(BASE, FINETUNED, PROMPTS[:4], work_dir=str(folder / "work"))
    lazarus.weight_diff(BASE, FINETUNED).save(folder / "w.json")
    lazarus.compare(BASE, FINETUNED, "3 + 4 =").save(folder / "c.json")
    lazarus.series(BASE, [BASE, FINETUNED], PROMPTS[:4]).save(folder / "s.json")
    lazarus.activation_diff(BASE, lazarus.record(BASE, PROMPTS[:4], folder / "recording").path)
    for name in ("a", "w", "c", "s"):
        str(lazarus.load_result(folder / f"{name}.json"))
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def soak(seconds: float) -> list[str]:
    """Call everything as long as there is time; return what is not flat."""
    temporary = Path(tempfile.mkdtemp(prefix="soak-"))
    tempfile.tempdir = str(temporary / "tmp")
    os.makedirs(tempfile.tempdir)
    (temporary / "out").mkdir()
    held, end = list[Held](), time.monotonic() + seconds
    while time.monotonic() < end or len(held) < WARM + 6:
        one_round(temporary / "out")
        held.append(Held.now(temporary))
        if len(held) % 5 == 0:
            sys.stdout.write(f"{len(held):>5} rounds: {held[-1]}\n")
            sys.stdout.flush()
    shutil.rmtree(temporary)
    return faults(held[WARM:])


def faults(held: list[Held]) -> list[str]:
    """Return what grew between the first third of the rounds and the last."""
    third = len(held) // 3
    first, last = held[:third], held[-third:]
    grown = np.median([each.n_bytes for each in last]) - np.median([each.n_bytes for each in first])
    found = [f"{grown / 2**20:.0f} MiB more"] if grown > MOST_GROWTH_BYTES else []
    for name in ("n_files", "n_threads", "n_children", "n_temporary"):
        before, after = (max(getattr(each, name) for each in part) for part in (first, last))
        if after > before:
            found.append(f"{name}: {before} and then {after}")
    sys.stdout.write(f"{len(held)} rounds after {WARM}: {grown / 2**20:+.1f} MiB; {held[0]} to {held[-1]}\n")
    return found


# --- sizes --------------------------------------------------------------------------------------


def _tiny(folder: Path, **sizes: int) -> tuple[Path, Path]:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=100, **(settings | {"num_key_value_heads": 2} | sizes))
    model = LlamaForCausalLM(config)
    models = {"base": model, "finetuned": perturbed(model)}
    base, finetuned = (save_model(folder / name, each, word_tokenizer()) for name, each in models.items())
    return base, finetuned


def many_prompts(folder: Path, n_prompts: int) -> None:
    """Compare two models of a few dimensions on very many prompts, from a file."""
    pair, file = _tiny(folder), folder / "prompts.txt"
    with file.open("w", encoding="utf-8") as stream:
        for i in range(n_prompts):
            stream.write(f"t{3 + i % 90} t{3 + i // 90 % 90} t{3 + i // 8100 % 90} t{3 + i // 729000 % 90}\n")
    found = lazarus.activation_diff(*pair, prompts=f"@{file}", no_noise_floor=True)
    assert len(found.record.prompts) == n_prompts
    found.save(folder / "x.json")


def whole_context(folder: Path) -> None:
    """Compare on one prompt as long as the context."""
    pair = _tiny(folder, max_position_embeddings=4096)
    text = " ".join(f"t{3 + i % 90}" for i in range(4096))
    lazarus.activation_diff(*pair, prompts=[text, "t3 t4"], localize=True, position="all").save(
        folder / "x.json"
    )
    lazarus.compare(*pair, text).save(folder / "c.json")


def many_layers(folder: Path) -> None:
    """Compare models of 200 layers, with all that is asked of a layer."""
    pair = _tiny(folder, num_hidden_layers=200)
    found = lazarus.activation_diff(*pair, prompts=["t3 t4", "t5 t6 t7"], localize=True, sites="all")
    found.save(folder / "x.html")
    assert len(found.layers) == 200
    lazarus.activation_diff(*pair, prompts=["t3 t4"], memory="stream")
    lazarus.weight_diff(*pair).save(folder / "w.html")
    lazarus.compare(*pair, "t3 t4").save(folder / "c.html")


def size(name: str, call: Callable[[Path], None], limit_seconds: float) -> list[str]:
    """Call in a fork, and tell its time and memory."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        outcome = forks.run(lambda: call(Path(folder)), Path(folder) / "fork", limit_seconds=limit_seconds)
    sys.stdout.write(
        f"{name}: exit {outcome.code}, {outcome.seconds:.1f} s, {outcome.peak_bytes / 2**20:,.0f} MiB\n"
    )
    sys.stdout.flush()
    return [f"{name}: {outcome.fault or outcome.err[-500:]}"] if outcome.code else []


def main() -> None:
    """Try the sizes, then soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--prompts", type=int, default=1_000_000, help="of the largest of three sizes")
    chosen = parser.parse_args()
    found = []
    for n in (chosen.prompts // 100, chosen.prompts // 10, chosen.prompts):
        found += size(f"{n:,} prompts", lambda folder, n=n: many_prompts(folder, n), 3600)  # type: ignore[misc]
    found += size("a prompt of the whole context, 4,096 tokens", whole_context, 600)
    found += size("200 layers", many_layers, 600)
    if chosen.minutes:
        found += soak(60 * chosen.minutes)
    sys.stdout.write("".join(f"{told}\n" for told in found) + f"{'failed' if found else 'flat'}\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
