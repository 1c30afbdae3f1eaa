"""SmolLM2 in llama.cpp against transformers: `python -m benchmarks.runtimes`, with llama-cpp-python there.

same      the F32 file, KV cache in float32: do the two mean the same by every block?
rounding  the F16 file: how far llama.cpp is from exact arithmetic, how far NumPy with its roundings is, and
          what is left of each block's own distance when the same roundings are made
ranking   Q4_1 against F16: are the blocks ranked in llama.cpp as they are on dequantised weights?

It prints the figures of docs/runtimes.md.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

import lazarus
from benchmarks import places
from benchmarks.ggufs import file_of
from lazarus.recordings import LlamaCppOptions, Recording, record_gguf

# The NumPy runtime is the tests' own.
sys.path.insert(0, str(places.ROOT / "tests"))

import numpy_llama

N_LAYERS, N_HEADS, N_KEY_HEADS, WIDTH = 30, 9, 3, 576
CONFIG: dict[str, Any] = {
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KEY_HEADS,
    "hidden_size": WIDTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
N_PROMPTS = 20
EXACT = LlamaCppOptions(cache_dtype="float32", flash_attention=False, repacked=False)
PLAIN = LlamaCppOptions(flash_attention=False, repacked=False)
USUAL = LlamaCppOptions(repacked=False)

Array = NDArray[Any]


def named_weights(path: Path) -> dict[str, Array]:
    """Return the weights of a GGUF file of SmolLM2 as float32, by transformers' names and in its layout."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(tuple(reversed(tensor.shape.tolist())))
        *block, name, _ = tensor.name.split(".")
        heads = {"attn_q": N_HEADS, "attn_k": N_KEY_HEADS}.get(name)
        if heads:  # llama.cpp rotates neighbours, transformers the halves of a head
            weight = weight.reshape(heads, -1, 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        found[f"{prefix}{NAMES[name]}.weight"] = weight
    return found


def local_errors(recording: Recording, weights: dict[str, Array], dtype: str) -> Array:
    """Return each block's distance from NumPy's block on the recorded states before it, over what it adds."""
    arithmetic = numpy_llama.ARITHMETIC[dtype]
    found = []
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        parts = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        block = numpy_llama.Block(CONFIG, parts, arithmetic, None)
        apart = added = 0.0
        for prompt in recording.prompts:
            before = recording.rows(prompt.index, f"resid_post.{layer - 1}" if layer else "embedding")
            after = recording.rows(prompt.index, f"resid_post.{layer}")
            apart += float(np.square(block.run(before) - after, dtype=np.float64).sum())
            added += float(np.square(after - before, dtype=np.float64).sum())
        found.append((apart / added) ** 0.5)
    return np.array(found)


def own_errors(recording: Recording, weights: dict[str, Array], dtype: str) -> Array:
    """Return how far a block is from itself on states that are one unit in the last place of float32 away."""
    found = []
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        parts = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        block = numpy_llama.Block(CONFIG, parts, numpy_llama.ARITHMETIC[dtype], None)
        before = recording.rows(0, f"resid_post.{layer - 1}" if layer else "embedding")
        ours, theirs = block.run(before), block.run(np.nextafter(before, np.float32(np.inf)))
        found.append(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - before))
    return np.array(found)


def recorded(name: str, path: Path, options: LlamaCppOptions) -> Recording:
    """Record the benchmark's prompts in llama.cpp; they are recorded anew."""
    folder = places.CACHE / "recordings" / name
    shutil.rmtree(folder, ignore_errors=True)
    return record_gguf(path, texts(), folder, options)


def texts() -> list[str]:
    """Return the prompts."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_PROMPTS]


def distances(recording: Recording, runs: Sequence[dict[str, Array]]) -> Array:
    """Return how far the blocks' outputs of a recording are from a run's: ‖ours − theirs‖ / ‖theirs‖."""
    found = []
    for layer in range(N_LAYERS):
        site = f"resid_post.{layer}"
        apart = sum(np.square(recording.rows(i, site) - run[site]).sum() for i, run in enumerate(runs))
        found.append((apart / sum(np.square(run[site]).sum() for run in runs)) ** 0.5)
    return np.array(found)


def same() -> None:
    """The F32 file: the same numbers, so the same definitions."""
    path = file_of("F32")
    recording = recorded("f32", path, EXACT)
    diff = lazarus.activation_diff(str(path), recording.path, position="all", dtype="float32")
    say("F32 file, KV cache in float32, against transformers, relative L2:")
    say(f"  largest of {N_LAYERS} blocks {max(layer.relative_l2 or 0.0 for layer in diff.layers):.1e}")
    say(f"  verdict: {diff.summary.verdict}")


def rounding() -> None:
    """The F16 file: how far apart, and whether llama.cpp's roundings explain it."""
    path = file_of("F16")
    weights = named_weights(path)
    recording = recorded("f16", path, PLAIN)
    prompts = [prompt.ids for prompt in recording.prompts]
    exact = [numpy_llama.forward(weights, CONFIG, ids) for ids in prompts]
    emulated = [numpy_llama.forward(weights, CONFIG, ids, dtype="llama.cpp-f16") for ids in prompts]
    observed, predicted = distances(recording, exact), _apart(emulated, exact)
    ratio = observed / predicted
    say("F16 file, KV cache in float16, against exact arithmetic:")
    say(f"  observed  {_range(observed)}")
    say(f"  predicted {_range(predicted)}")
    say(f"  observed / predicted, block by block: {ratio.min():.2f} to {ratio.max():.2f}")
    for kind, options, dtype in (
        ("F16", PLAIN, "llama.cpp-f16"),
        ("F16", USUAL, "llama.cpp-f16"),
        ("Q8_0", PLAIN, "llama.cpp-q8"),
    ):
        weights, made = named_weights(file_of(kind)), recorded("each", file_of(kind), options)
        plain, rounded = (local_errors(made, weights, how) for how in ("float32", dtype))
        flash = "flash attention" if options.flash_attention is None else "without flash attention"
        say(f"  {kind}, {flash}, each block on llama.cpp's states before it, over what the block adds:")
        say(f"    exact {_range(plain)}; with llama.cpp's roundings {_range(rounded)}")
        moved = _range(own_errors(made, weights, dtype))
        say(f"    the rounded block, on states one unit in the last place away: {moved}")


def ranking() -> None:
    """Q4_1 against F16: the order of the blocks in llama.cpp and on dequantised weights."""
    for dithered in (True, False):
        f16, q4 = file_of("F16", dithered=dithered), file_of("Q4_1", dithered=dithered)
        base, tuned = recorded("base", f16, USUAL), recorded("q4", q4, USUAL)
        live = lazarus.activation_diff(
            str(f16), str(q4), texts(), position="all", localize=True, dtype="float32"
        )
        both = lazarus.activation_diff(base.path, tuned.path, position="all")
        one = lazarus.activation_diff(str(f16), tuned.path, position="all", localize=True, dtype="float32")
        say(f"Q4_1 against F16, {'dithered' if dithered else 'as it is'}:")
        for name, ours, theirs in (
            ("divergence, both in llama.cpp", _column(both, "divergence"), _column(live, "divergence")),
            ("local change, base in transformers", _column(one, "local"), _column(live, "local")),
        ):
            say(f"  {name}: Spearman {spearmanr(ours, theirs).statistic:.3f} with the dequantised weights'")
            say(f"    first five {_first(ours)}; dequantised {_first(theirs)}")


def _column(diff: lazarus.ActivationDiff, name: str) -> Array:
    if name == "local":
        return np.array([layer.local and layer.local.relative_l2 for layer in diff.layers], dtype=float)
    return np.array([layer.divergence for layer in diff.layers], dtype=float)


def _first(values: Array) -> list[int]:
    return [int(layer) for layer in np.argsort(-values)[:5]]


def _apart(ours: Sequence[dict[str, Array]], theirs: Sequence[dict[str, Array]]) -> Array:
    found = []
    for layer in range(N_LAYERS):
        site = f"resid_post.{layer}"
        apart = sum(np.square(a[site] - b[site]).sum() for a, b in zip(ours, theirs, strict=True))
        found.append((apart / sum(np.square(b[site]).sum() for b in theirs)) ** 0.5)
    return np.array(found)


def _range(values: Array) -> str:
    return f"{values.min():.1e} to {values.max():.1e} (median {np.median(values):.1e})"


def say(line: str) -> None:
    """Print a line as soon as it is known."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(parts: Sequence[str]) -> None:
    """Run the parts that are named, or all."""
    for part in (same, rounding, ranking):
        if not parts or part.__name__ in parts:
            part()


if __name__ == "__main__":
    main(sys.argv[1:])
