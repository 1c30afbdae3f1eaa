"""A recording from arrays that another program wrote: for each prompt a file, or a folder of npy files."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import RecordingError, UsageError
from lazarus.foreign import user_path
from lazarus.recordings.recording import Recording
from lazarus.recordings.tensors import Array, BFloat16Bits, TensorReader
from lazarus.results import natural

LAYER = "{layer}"


def from_arrays(
    source: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    sites: Mapping[str, str],
    ids: str = "ids",
    model: str,
    **known: Any,
) -> Recording:
    """Make a recording of arrays on disk.

    Args:
        source: the prompts, each a `.safetensors` file, an `.npz` file, or a folder of `.npy` files, whose
            names are those of their arrays. As one folder, it holds the prompts, in the order of their names
            (2 before 10); or name them in their order.
        folder: where the recording goes; it must be empty.
        sites: for each site, the array that holds it: `{"resid_post.{layer}": "hidden_{layer}"}` stands for
            every layer that is there. Arrays are [tokens, hidden]; axes of length 1 in front are dropped.
        ids: the array with the token ids, [tokens].
        model: what the model is called.
        known: what `Recording.create` takes besides. `n_layers` is counted, and `hidden_size` and
            `run_dtype` are those of the arrays, unless they are given.

    Raises:
        RecordingError: a file cannot be read, or lacks an array.
        UsageError: there is no prompt, or an array has another shape than a site has.
    """
    prompts = prompts_in(source)
    first = read_arrays(prompts[0])
    named = expanded(sites, first)
    if not named:
        raise UsageError(
            f"{prompts[0]}: none of the arrays in `sites` is there. It holds {_listed(first)}; of each site, "
            f"name the array, with {LAYER} for the number of a block."
        )
    _refuse_missing(prompts[0], first, [ids, *named.values()])
    layers = [int(site.partition(".")[2]) for site in named if site.startswith("resid_post.")]
    sample = next(iter(named.values()))
    known = {"n_layers": max(layers, default=0) + 1, "hidden_size": width(first[sample])} | known
    known.setdefault("run_dtype", dtype_name(first[sample]))
    with Recording.create(folder, model=model, **known) as writer:
        for path in prompts:
            arrays = read_arrays(path)
            _refuse_missing(path, arrays, [ids, *named.values()])
            states = {site: without_batch(arrays[name]) for site, name in named.items()}
            writer.add(token_ids(path, arrays[ids]), states)
    return Recording.open(folder)


def prompts_in(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files and folders that are prompts, in order.

    Raises:
        UsageError: there are none.
    """
    if not isinstance(source, str | Path):
        found = [user_path(path) for path in source]
    else:
        within = user_path(source)
        if not within.is_dir():
            raise UsageError(f"{within}: no such folder. Name the one that holds the prompts' arrays.")
        entries = (path for path in within.iterdir() if not path.name.startswith("."))
        found = [path for path in entries if path.is_dir() or path.suffix in (".safetensors", ".npz")]
        found.sort(key=lambda path: natural(path.name))
    if not found:
        raise UsageError(f"{source}: no prompt is there: no .safetensors or .npz file, and no folder.")
    return found


def read_arrays(path: Path) -> dict[str, Array]:
    """Read every array of a prompt.

    Raises:
        RecordingError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        reader = TensorReader(path)
        return {
            name: narrowed(reader.read(name)) if spec.dtype == "BF16" else reader.read(name)
            for name, spec in reader.specs.items()
        }
    try:
        if path.is_dir():
            return {file.stem: np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))}
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RecordingError(f"{path}: cannot be read: {error}. Write it again.") from error


def expanded(sites: Mapping[str, str], arrays: Mapping[str, Array]) -> dict[str, str]:
    """Return the array of each site, layer by layer where it is so written."""
    found = {}
    for site, name in sites.items():
        if LAYER not in site:
            found[site] = name
            continue
        before, _, after = name.partition(LAYER)
        pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        numbers = sorted(int(match[1]) for match in map(pattern.fullmatch, arrays) if match)
        found |= {site.replace(LAYER, str(n)): name.replace(LAYER, str(n)) for n in numbers}
    return found


def narrowed(array: NDArray[Any]) -> BFloat16Bits:
    """Return float32 that was widened from bfloat16 as the bits that it was."""
    return BFloat16Bits((np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16))


def without_batch(array: Array) -> Array:
    """Drop axes of length 1 in front of [tokens, hidden]."""
    if isinstance(array, BFloat16Bits):
        return BFloat16Bits(_without_batch(array.bits))
    return _without_batch(array)


def _without_batch(array: NDArray[Any]) -> NDArray[Any]:
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    return array


def width(array: Array) -> int:
    """Return the length of the last axis."""
    shape = (array.bits if isinstance(array, BFloat16Bits) else array).shape
    return int(shape[-1]) if shape else 1


def dtype_name(array: Array) -> str:
    """Return the type as recordings name it."""
    return "bfloat16" if isinstance(array, BFloat16Bits) else array.dtype.name


def token_ids(path: Path, array: Array) -> list[int]:
    """Return the ids of one prompt.

    Raises:
        RecordingError: they are no row of whole numbers.
    """
    if isinstance(array, BFloat16Bits) or array.dtype.kind not in "iu":
        raise RecordingError(f"{path}: its ids are of type {dtype_name(array)}, and ids are integers.")
    row = array.squeeze() if array.ndim > 1 else array
    if row.ndim != 1:
        raise RecordingError(
            f"{path}: its ids have the shape {list(array.shape)}, and one prompt is one row."
        )
    return [int(i) for i in row]


def _refuse_missing(path: Path, arrays: Mapping[str, Array], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise RecordingError(
            f"{path}: it has no array {missing[0]!r}, but {_listed(arrays)}. Every prompt has the "
            "same arrays, and its ids."
        )


def _listed(arrays: Mapping[str, Array]) -> str:
    names = sorted(arrays)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "none") + more
