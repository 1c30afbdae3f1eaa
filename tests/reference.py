"""The oracle: what the numbers must be, written without a line of lazarus.

One prompt at a time, unpadded, through the whole model with its head; states in NumPy float64; cosine
by the textbook's formula. Slow and plain on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

States = NDArray[np.float64]
Convention = Literal["standard", "shifted", "none"]


def cosine(base: States, finetuned: States) -> States:
    """Cosine similarity of each pair of rows, by b·f / (‖b‖‖f‖)."""
    dots: States = np.einsum("ij,ij->i", base, finetuned)
    lengths = np.sqrt(np.einsum("ij,ij->i", base, base) * np.einsum("ij,ij->i", finetuned, finetuned))
    cosines: States = dots / lengths
    return cosines


def recorded_states(model: PreTrainedModel, ids: Sequence[int]) -> tuple[States, ...]:
    """transformers' own `hidden_states` for one prompt alone: each [tokens, features]."""
    output = run_whole(model, ids, output_hidden_states=True)
    recorded = output.get("hidden_states") or output.get("encoder_hidden_states") or ()
    return tuple(as_rows(states, len(ids)) for states in recorded)


def block_outputs(model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Sequence[int]) -> list[States]:
    """Each block's output for one prompt alone, by a wrapper around its `forward`, not by a hook."""
    seen: list[States] = []

    def wrapped(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            states = returned if isinstance(returned, torch.Tensor) else returned[0]
            seen.append(as_rows(states, len(ids)))
            return returned

        return call

    originals = [block.forward for block in blocks]
    try:
        for block, forward in zip(blocks, originals, strict=True):
            block.forward = wrapped(forward)
        run_whole(model, ids)
    finally:
        for block in blocks:
            del block.forward
    return seen


def run_whole(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> Any:
    """The whole model on one prompt without padding and without a mask."""
    input_ids = torch.tensor([list(ids)])
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = input_ids[:, :1]
    model.config.get_text_config().use_cache = False
    with torch.no_grad():
        return model(input_ids=input_ids, return_dict=True, **options)


def as_rows(states: torch.Tensor, n_tokens: int) -> States:
    """States of one prompt as [tokens, features], wherever the axis of the tokens is."""
    array = states.detach().double().numpy()
    axis = next(i for i, size in enumerate(array.shape[:-1]) if size == n_tokens)
    return np.moveaxis(array, axis, 0).reshape(n_tokens, -1)


def convention_of(recorded: Sequence[States], blocks: Sequence[States]) -> Convention:
    """How transformers' list relates to the blocks: entry i + 1, or entry i, is block i's output.

    The last block is left out: its entry has been through the final norm.
    """
    for name, offset in (("standard", 1), ("shifted", 0)):
        pairs = list(zip(recorded[offset:], blocks[:-1], strict=False))
        if (
            len(pairs) == len(blocks) - 1
            and pairs
            and all(r.shape == b.shape and np.allclose(r, b, rtol=1e-5, atol=1e-6) for r, b in pairs)
        ):
            return name  # type: ignore[return-value]
    return "none"
