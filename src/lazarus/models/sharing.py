"""A fine-tune over its base's weights: what both checkpoints hold is in memory once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from lazarus.models.adapters import share_storage
from lazarus.models.checkpoint import Conversion
from lazarus.models.quantised import Weight, same_weights


def load_over(
    base: PreTrainedModel, ours: Mapping[str, Weight], theirs: Mapping[str, Weight], device: torch.device
) -> PreTrainedModel | None:
    """Load a second model over base's weights: only the tensors that differ are read.

    `ours` and `theirs` are what both checkpoints store; both must be of one class and configuration, in one
    dtype. None where they do not hold the same keys and shapes, where not one tensor is the same, or where
    their keys carry a wrapper's prefix: load it by itself.
    """
    same = _same_keys(ours, theirs)
    if not same:
        return None
    conversion = Conversion(base, theirs, device)
    if conversion.wrappers or _ties_what_is_stored(base, conversion):
        return None
    model = share_storage(base)
    differing = [keys for keys in conversion.sources.values() if not same.issuperset(keys)]
    # All sources of a target, also those that are the same: transformers makes a target of all its pieces.
    conversion.convert(model, (key for keys in differing for key in keys))
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    # Converting replaced one of two tied parameters: until this call the other still holds base's weight.
    # With missing_keys the one that is stored is taken, whichever it is.
    model.tie_weights(missing_keys=tied - conversion.sources.keys(), recompute_mapping=False)
    return model.eval().requires_grad_(requires_grad=False)


def _same_keys(ours: Mapping[str, Weight], theirs: Mapping[str, Weight]) -> set[str]:
    """Return the keys of the tensors with the same elements; none where the two list other keys or shapes."""
    if {key: s.shape for key, s in ours.items()} != {key: s.shape for key, s in theirs.items()}:
        return set()
    return {key for key in ours if same_weights(ours[key], theirs[key])}


def _ties_what_is_stored(model: PreTrainedModel, conversion: Conversion) -> bool:
    """Return whether two tied weights are both stored: whether they are tied then depends on their values."""
    return any(
        {target, source} <= conversion.sources.keys()
        for target, source in model.all_tied_weights_keys.items()
    )
