"""The KV cache of a prefix: a pass over more tokens goes on from it.

A cache is extended while a pass goes on, and one prefix is followed by many batches: each gets a copy of its
own. Keys and values are extended by concatenation, which makes new tensors, so a copy is a view of the same
ones, as wide as the batch, and costs nothing. Other states (of a recurrence, a convolution, an index) are
written in place, and some architectures do not go on from them as they should, without a word: no prefix is
shared where the cache has any.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from lazarus._transformers import cache_name, idle_layers, kv_layers


@dataclass(frozen=True)
class PrefixCache:
    """The tokens before those of a pass, the same ones for every row, and the model's cache of them."""

    n_tokens: int = 0
    cache: DynamicCache | None = None

    def arguments(self, attention_mask: Int[Tensor, "batch time"]) -> dict[str, Any]:
        """Return what a pass over a batch is given to go on from here, with a cache of its own.

        No positions are among it: the model counts on from its cache, in whichever way it counts.
        """
        # The mask covers the cached tokens too: attention looks at both.
        before = attention_mask.new_ones(len(attention_mask), self.n_tokens)
        return {
            "attention_mask": torch.cat([before, attention_mask], dim=1),
            cache_name(): None if self.cache is None else widened(self.cache, len(attention_mask)),
            "use_cache": True,
        }


def holds_keys_and_values(cache: Any) -> bool:
    """Return whether a cache is keys and values of attention, and nothing else."""
    # Exact types: a subclass may hold more, or write in place.
    return type(cache) is DynamicCache and all(
        type(layer) in (*kv_layers(), *idle_layers()) for layer in cache.layers
    )


def widened(cache: DynamicCache, n_rows: int) -> DynamicCache:
    """A copy of the cache of one row, for so many rows; what extends the copy leaves the cache as it is."""
    # Shallow: an update binds new tensors to the copied layer, and the original layer keeps its own.
    wide = copy(cache)
    wide.layers = [copy(layer) for layer in cache.layers]
    for layer in wide.layers:
        if type(layer) in kv_layers() and layer.is_initialized:
            # `expand` is a view: the rows share one row's memory until the batch's own keys are joined to it.
            layer.keys = layer.keys.expand(n_rows, *layer.keys.shape[1:])
            layer.values = layer.values.expand(n_rows, *layer.values.shape[1:])
    return wide
