"""A recording from the hidden states that vLLM writes to disk.

Its method `extract_hidden_states` with `ExampleHiddenStatesConnector` writes one safetensors file a request:
`token_ids` [tokens], and `hidden_states` [tokens, layers asked for, hidden]. Layer 0 is what enters the first
block, layer i the residual stream after i blocks; none has been through the final norm. So say vLLM's
documentation from 0.18 to 0.22, its connector and its models' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazarus.errors import RecordingError, UsageError
from lazarus.recordings.arrays import dtype_name, prompts_in, read_arrays, token_ids
from lazarus.recordings.recording import Recording
from lazarus.recordings.sites import EMBEDDING, site_name
from lazarus.recordings.tensors import Array, BFloat16Bits

IDS, STATES = "token_ids", "hidden_states"


def from_vllm(
    source: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    model: str,
    n_layers: int,
    layers: Sequence[int] | None = None,
    **known: Any,
) -> Recording:
    """Make a recording of the files of vLLM's hidden states connector.

    Args:
        source: the `shared_storage_path`, whose files are taken in the order of their requests; or the files
            in the order of the prompts, as `output.kv_transfer_params["hidden_states_path"]` has them.
        folder: where the recording goes; it must be empty.
        model: what the model is called.
        n_layers: how many blocks it has.
        layers: the `eagle_aux_hidden_state_layer_ids` that vLLM was given, ascending; None for all, which are
            0 to n_layers.
        known: what `Recording.create` takes besides, such as `runtime_version` and `device`.

    Raises:
        RecordingError: a file is not whole, or not of that layout.
        UsageError: there is no file, or the layers are not ascending numbers of the model's.
    """
    asked = list(range(n_layers + 1)) if layers is None else list(layers)
    if asked != sorted(set(asked)) or not asked or not 0 <= asked[0] <= asked[-1] <= n_layers:
        raise UsageError(
            f"layers={asked}: of {n_layers} blocks there are the layers 0 to {n_layers}, and vLLM gives them "
            "in ascending order, each once."
        )
    files = [path for path in prompts_in(source) if path.suffix == ".safetensors"]
    if not files:
        raise UsageError(f"{source}: no .safetensors file is there. Name vLLM's shared_storage_path.")
    _, states = read_request(files[0], len(asked))
    about = {
        "n_layers": n_layers,
        "hidden_size": _bits(states).shape[-1],
        "run_dtype": dtype_name(states),
        "causal": True,
        "runtime": "vllm",
    }
    with Recording.create(folder, model=model, **(about | known)) as writer:
        for path in files:
            ids, states = read_request(path, len(asked))
            found = {_site(layer): _layer(states, i) for i, layer in enumerate(asked)}
            _refuse_empty_rows(path, found)
            writer.add(ids, found)
    return Recording.open(folder)


def read_request(path: Path, n_asked: int) -> tuple[list[int], Array]:
    """Return the ids and the states of one request.

    Raises:
        RecordingError: it is not whole, or not of vLLM's layout.
    """
    arrays = read_arrays(path)
    if not {IDS, STATES} <= arrays.keys():
        raise RecordingError(
            f"{path}: it holds {', '.join(sorted(arrays)) or 'nothing'}, and vLLM writes {IDS} and {STATES}."
        )
    ids, states = token_ids(path, arrays[IDS]), arrays[STATES]
    shape = _bits(states).shape
    if len(shape) != 3 or shape[:2] != (len(ids), n_asked):
        raise RecordingError(
            f"{path}: {STATES} has the shape {list(shape)}, and [{len(ids)}, {n_asked}, hidden] is expected: "
            "tokens, layers, features. Name the layers that vLLM was given in `layers`."
        )
    return ids, states


def _site(layer: int) -> str:
    return EMBEDDING if layer == 0 else site_name(layer - 1)


def _bits(states: Array) -> Any:
    return states.bits if isinstance(states, BFloat16Bits) else states


def _layer(states: Array, place: int) -> Array:
    if isinstance(states, BFloat16Bits):
        return BFloat16Bits(states.bits[:, place])
    return states[:, place]


def _refuse_empty_rows(path: Path, found: dict[str, Array]) -> None:
    """Refuse rows of zeros: a residual stream is never zero after a block, so these were not computed."""
    for site, rows in found.items():
        empty = ~_bits(rows).any(axis=1)
        if site != EMBEDDING and empty.any():
            raise RecordingError(
                f"{path}: {site} of token {int(empty.argmax())} is all zeros, so vLLM did not write it. Its "
                "documentation asks for --no-enable-chunked-prefill with this feature."
            )
