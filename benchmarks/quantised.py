"""Quantised models of which it is known what costs most: `python -m benchmarks.quantised [--only PART]`.

truth    SmolLM2 with one layer in 3 bits and all others in 8, for 20 choices of the layer: which layer do
         activation-diff and weight-diff name first?
example  SmolLM2 in 8, 4 and 3 bits, by two methods: what activation-diff says, and what the next-token
         distribution gains where the layers that it ranks first are restored, against as many others
size     weight-diff of a checkpoint of 3 GB against itself in 4 bits: memory, and its time over that of
         reading both files and one pass of NumPy over them

The checkpoints are in compressed-tensors' format, packed here. The results are written to
benchmarks/results/quantised.json; `--write-docs` writes them into docs/quantised.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from msgspec import Struct
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import lazarus
from benchmarks import places
from benchmarks.commands import measure, python_module
from benchmarks.size import random_llamas
from benchmarks.trust_report import fill_in, table
from benchmarks.weights import make_base, make_once

Method = Literal["nearest", "mse"]
PARTS = ["truth", "example", "size"]
GROUP = 64
N_CHOICES, N_PROMPTS, SEED = 20, 16, 0
N_RESTORED = 5
RESULTS = places.ROOT / "benchmarks" / "results" / "quantised.json"
DOCS = places.ROOT / "docs" / "quantised.md"
console = Console(stderr=True)


class Choice(Struct, frozen=True):
    """One layer in 3 bits, and the layer that each command names first."""

    layer: int
    by_local_change: int
    by_divergence: int
    by_weight_error: int


class Example(Struct, frozen=True):
    """SmolLM2 in so many bits, and what restoring five of its layers gains."""

    method: str
    bits: int
    kl: float
    agreement: float
    weight_error: float
    ranked: list[int]
    """the layers by their local change, the largest first"""
    kl_restored: float
    """with the five that are ranked first restored"""
    kl_others: list[float]
    """with five others, drawn at random, three times"""
    kl_by_error: float
    """with the five restored whose weights have the largest error"""


class Size(Struct, frozen=True):
    """weight-diff of a large checkpoint against itself in 4 bits, a whole command in turn with the other."""

    gigabytes: float
    seconds: float
    numpy_seconds: float
    peak_mebibytes: float


class Results(Struct, frozen=True):
    """All that was measured."""

    truth: list[Choice] = []
    example: list[Example] = []
    size: list[Size] = []


def quantise(weight: Tensor, bits: int, method: Method) -> tuple[Tensor, Tensor]:
    """Return codes from −2^(bits − 1) on, and a scale for each 64 columns of a row."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    largest, most = groups.abs().amax(-1, keepdim=True), 2 ** (bits - 1)
    shrinks = [1.0] if method == "nearest" else [1 - step / 40 for step in range(20)]
    best, least = largest * 2 / (2**bits - 1), torch.full_like(largest, torch.inf)
    for shrink in shrinks:
        scale = (largest * shrink * 2 / (2**bits - 1)).bfloat16().float()
        rounded = (groups / scale.where(scale > 0, 1.0)).round().clamp(-most, most - 1)
        error = (rounded * scale - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    codes = (groups / best.where(best > 0, 1.0)).round().clamp(-most, most - 1)
    return codes.reshape(weight.shape).to(torch.int64), best.squeeze(-1).bfloat16()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the words of compressed-tensors: code i at the bits from i·bits on, lowest first."""
    n_words = -(-codes.shape[1] * bits // 32)
    words = torch.zeros(len(codes), n_words + 1, dtype=torch.int64)
    for i, code in enumerate((codes + (1 << (bits - 1))).unbind(1)):
        word, shift = divmod(i * bits, 32)
        shifted = code << shift
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> 32
    return words[:, :n_words].where(words[:, :n_words] < 2**31, words[:, :n_words] - 2**32).to(torch.int32)


def save_quantised(
    folder: Path, bits: Mapping[int, int], method: Method = "nearest", base: Path = places.BASE
) -> Path:
    """Save a model with the matrices of each layer in so many bits; 16 leaves a layer as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for key, weight in _weights_of(base):
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else -1
        width = bits.get(layer, 16)
        if width == 16 or not key.endswith("_proj.weight"):
            tensors[key] = weight
            continue
        codes, scales = quantise(weight, width, method)
        module = key.removesuffix(".weight")
        tensors[f"{module}.weight_packed"] = pack(codes, width)
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:model.layers.{n}\\..*" for n, width in bits.items() if width == 16)],
        "config_groups": {
            f"of {width} bits": {
                "targets": [f"re:model.layers.{n}\\..*" for n in bits if bits[n] == width],
                "weights": {"num_bits": width, "type": "int", "strategy": "group", "group_size": GROUP},
            }
            for width in sorted({*bits.values()} - {16})
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _weights_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def prompts() -> list[str]:
    """The first prompts of the benchmark."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_PROMPTS]


def measure_truth(n_layers: int) -> list[Choice]:
    """Quantise one layer to 3 bits and the others to 8, for each choice."""
    found = []
    for layer in sorted(random.Random(SEED).sample(range(n_layers), N_CHOICES)):
        folder = save_quantised(
            places.CACHE / "quantised", {n: 3 if n == layer else 8 for n in range(n_layers)}
        )
        states = lazarus.activation_diff(places.BASE, folder, prompts(), no_noise_floor=True)
        weights = lazarus.weight_diff(places.BASE, folder)
        local = {each.layer: each.local.relative_l2 for each in states.layers if each.local}
        errors = {each.layer: each.relative_change or 0.0 for each in weights.layers}
        rises = {
            after.layer: (after.divergence or 0.0) - ((before.divergence or 0.0) if before else 0.0)
            for before, after in zip([None, *states.layers], states.layers, strict=False)
        }
        choice = Choice(
            layer,
            max(local, key=lambda n: local[n] or 0.0),
            max(rises, key=lambda n: rises[n]),
            max(errors, key=lambda n: errors[n]),
        )
        console.print(choice)
        found.append(choice)
    return found


def measure_example(n_layers: int) -> list[Example]:
    """Quantise all layers by two methods, and restore five of them, ranked in three ways."""
    found = []
    for bits in (8, 4, 3):
        for method in ("nearest", "mse"):
            found.append(_example(bits, method, n_layers))
            console.print(found[-1])
    return found


def _example(bits: int, method: Method, n_layers: int) -> Example:
    def run(restored: Sequence[int] = ()) -> Any:
        widths = {n: 16 if n in restored else bits for n in range(n_layers)}
        folder = save_quantised(places.CACHE / "quantised", widths, method)
        return lazarus.activation_diff(places.BASE, folder, prompts(), no_noise_floor=True), folder

    def kl(restored: Sequence[int]) -> float:
        return float(run(restored)[0].record.output.kl_base_finetuned)

    whole, folder = run()
    weights = lazarus.weight_diff(places.BASE, folder)
    local = {each.layer: each.local.relative_l2 or 0.0 for each in whole.layers if each.local}
    ranked = sorted(local, key=lambda n: -local[n])
    errors = sorted(weights.layers, key=lambda each: -(each.relative_change or 0.0))
    chance = random.Random(SEED)
    others = [chance.sample(ranked[N_RESTORED:], N_RESTORED) for _ in range(3)]
    return Example(
        method=method,
        bits=bits,
        kl=float(whole.record.output.kl_base_finetuned),
        agreement=float(whole.record.output.top1_agreement),
        weight_error=weights.summary.relative_change or 0.0,
        ranked=ranked,
        kl_restored=kl(ranked[:N_RESTORED]),
        kl_others=[kl(each) for each in others],
        kl_by_error=kl([each.layer for each in errors[:N_RESTORED]]),
    )


def _make_large() -> tuple[Path, Path]:
    """A checkpoint of 3 GB, and its version in 4 bits."""
    base, folder = Path(random_llamas(27, 2048)[0]), places.CACHE / "quantised-large"
    if not folder.exists():
        save_quantised(folder, dict.fromkeys(range(27), 4), base=base)
    return base, folder


def measure_size(n_runs: int = 3) -> list[Size]:
    """Time weight-diff and the pass of NumPy in turn, the files in the system's cache."""
    # In a process of its own: the kernel counts this one's memory into that of the commands that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        base, folder = pool.submit(_make_large).result()
    size = sum(path.stat().st_size for each in (base, folder) for path in each.glob("*.safetensors"))
    numpy_pass = python_module("benchmarks.quantised_pass", base, folder)
    diff = python_module("lazarus", "introspect", "weight-diff", "-b", base, "-f", folder, "-q")
    measure(numpy_pass)
    found = []
    for _ in range(n_runs):
        theirs, ours = measure(numpy_pass), measure(diff)
        found.append(Size(size / 1e9, ours.seconds, theirs.seconds, ours.peak / 2**20))
        console.print(found[-1])
    return found


def page(results: Results) -> list[str]:
    """The measured part of docs/quantised.md."""
    choices = results.truth
    named = {
        "activation-diff, local change": sum(c.layer == c.by_local_change for c in choices),
        "activation-diff, rise of the divergence": sum(c.layer == c.by_divergence for c in choices),
        "weight-diff, relative error": sum(c.layer == c.by_weight_error for c in choices),
    }
    rows = [
        [
            {"nearest": "nearest", "mse": "least squares"}[e.method],
            str(e.bits),
            f"{e.weight_error:.4f}",
            f"{e.kl:.4f}",
            f"{e.agreement:.0%}",
            ", ".join(map(str, e.ranked[:N_RESTORED])),
            f"{e.kl_restored:.4f}",
            f"{e.kl_by_error:.4f}",
            ", ".join(f"{kl:.4f}" for kl in e.kl_others),
        ]
        for e in results.example
    ]
    heads = ["method", "bits", "weight error", "KL", "agree", "ranked first", "KL, these restored"]
    sizes = [
        [f"{s.gigabytes:.1f} GB", f"{s.seconds / s.numpy_seconds:.2f}", f"{s.peak_mebibytes:.0f} MiB"]
        for s in results.size
    ]
    tables = [
        (["named first", f"of {len(choices)} layers"], [[k, str(v)] for k, v in named.items()], choices),
        ([*heads, "KL, by weight error", "KL, others"], rows, results.example),
        (["both files", "time of weight-diff / NumPy", "peak memory"], sizes, results.size),
    ]
    return [table(head, body) for head, body, measured in tables if measured]


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be given again")
    parser.add_argument("--write-docs", action="store_true", help="write docs/quantised.md from the results")
    options = parser.parse_args()
    parts = options.only or PARTS
    results = Results()
    if RESULTS.exists():
        results = msgspec.json.decode(RESULTS.read_bytes(), type=Results)
    if not options.write_docs:
        make_once(places.BASE, make_base)
        n_layers = json.loads((places.BASE / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        if "truth" in parts:
            results = msgspec.structs.replace(results, truth=measure_truth(n_layers))
        if "example" in parts:
            results = msgspec.structs.replace(results, example=measure_example(n_layers))
        if "size" in parts:
            results = msgspec.structs.replace(results, size=measure_size())
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    lines = "\n\n".join(page(results))
    if options.write_docs:
        fill_in(DOCS, lines)
    Console().print(lines, highlight=False, markup=False)


if __name__ == "__main__":
    main()
