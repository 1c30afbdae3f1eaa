"""Two models of which one is the other, rounded to the dtype in which it is stored.

A right merge of an adapter is stored in 16 bits as a rule, and differs from base + adapter by that rounding.
It shows in the hidden states, far above the noise. The weights tell it from a wrong merge.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.blame import Translated
from lazarus.errors import AdapterError
from lazarus.facts import Rounded
from lazarus.metrics.rounding import RoundingTest, beyond_rounding, unit_in_the_last_place
from lazarus.models import LoadedModel, settings_that_differ

_NARROW = (torch.bfloat16, torch.float16)
_TYPES = (Tensor, nn.Parameter, nn.Buffer)
PART = 2**16
"""Elements that are looked at together: few enough to stay in a processor's cache."""

Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""
a tensor without its adapters; what they add to it, in float64, or None; and, of several adapters, the sum of
the absolute values of what each adds
"""


def find_rounding(base: LoadedModel, finetuned: LoadedModel) -> Rounded | None:
    """Return which model is the other one, rounded; None where neither is, or it cannot be known.

    Every tensor in which they differ must be the other model's, with its adapter, rounded to a 16-bit dtype
    (`RoundingTest`). Models that are read block by block are not tested.
    """
    models = base.model, finetuned.model
    if base.pager is not None or finetuned.pager is not None or type(models[0]) is not type(models[1]):
        return None
    if settings_that_differ(models[0].config, models[1].config):
        return None
    try:
        return _test(finetuned, base) or _test(base, finetuned)
    except AdapterError:  # what an adapter adds is not known
        return None


def _test(stored: LoadedModel, exact: LoadedModel) -> Rounded | None:
    """Test whether `stored` is `exact`, rounded."""
    found, source = dict(_effective(stored.model)), dict(_effective(exact.model))
    if found.keys() != source.keys():
        return None
    tests: list[RoundingTest] = []
    dtype: torch.dtype | None = None
    with torch.no_grad():
        for name, read in found.items():
            (x, own, _), parts = read(), source[name]()
            w, update, _ = parts
            # A quantised weight is a subclass of these, and its elements are not those of the weight.
            if own is not None or type(x) not in _TYPES or type(w) not in _TYPES or x.shape != w.shape:
                return None
            # Shared storage needs no look at its elements.
            if update is None and (x.data_ptr() == w.data_ptr() or torch.equal(x, w.to(x.device))):
                continue
            # Of most fine-tunes the first part tells, and neither all weights nor a whole tensor are read.
            if all(_cannot_be(x, parts, each) for each in ([dtype] if dtype else _NARROW)):
                return None
            dtype = dtype or _stored_dtype(stored.model)
            if dtype is None:
                return None
            tests.append(RoundingTest(dtype))
            tests[-1].add(*_in_float64(x, parts, dtype))
            if tests[-1].result not in ("exact", "rounded"):
                return None
    if dtype is None:
        return None
    square = sum(test.update_square for test in tests)
    kept = sum(test.update_stored for test in tests) / square if square else None
    return Rounded(stored.name, exact.name, str(dtype).removeprefix("torch."), len(tests), kept)


def _cannot_be(stored: Tensor, source: Parts, dtype: torch.dtype) -> bool:
    """Look for a part of a tensor that is not base + update, rounded to `dtype`; one is enough."""
    # A buffer may keep a wider dtype, but a weight that was rounded holds nothing that 16 bits do not.
    is_weight = isinstance(stored, nn.Parameter) and stored.is_floating_point()
    columns = (repeat(None) if t is None else torch.split(t.flatten(), PART) for t in source)
    # Not strict: `repeat(None)` has no end.
    for x, w, update, size in zip(torch.split(stored.flatten(), PART), *columns, strict=False):
        if is_weight and not _holds(dtype, x):
            return True
        if beyond_rounding(dtype, *_in_float64(x, (w, update, size), dtype)).any():
            return True
    return False


def _stored_dtype(model: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype that holds every weight of a model; None where none does.

    One tensor does not tell: a norm's weights, all 1, are numbers of every dtype.
    """
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    return next((dtype for dtype in _NARROW if all(_holds(dtype, weight) for weight in weights)), None)


def _holds(dtype: torch.dtype, weight: Tensor) -> bool:
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)


def _in_float64(
    stored: Tensor, source: Parts, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A stored tensor, base, the update, and what computing it has lost.

    Of several adapters, each merge may have rounded.
    """
    base, update, size = source
    x, w = stored.double(), base.to(stored.device).double()
    d = torch.zeros_like(w) if update is None else update.to(stored.device)
    return x, w, d, None if size is None else unit_in_the_last_place(w.abs() + size.to(w.device), dtype)


def _effective(model: nn.Module) -> Iterator[tuple[str, Callable[[], Parts]]]:
    """Yield a model's tensors by the names that they have without an adapter, with what its adapters add."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    copied = {name: module for name, module in model.named_modules() if hasattr(module, "modules_to_save")}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((path for path in (*copied, *layers) if name.startswith(f"{path}.")), None)
        if owner is None:
            yield name, partial(_plain, tensor)
            continue
        inside = name.removeprefix(f"{owner}.")
        if owner in layers and inside.startswith("base_layer."):
            attribute = inside.removeprefix("base_layer.")
            path = owner.removesuffix(".token_adapter")  # PEFT wraps a table whose tokens are trained twice
            yield f"{path}.{attribute}", partial(_with_update, layers[owner], attribute, tensor)
        elif owner in copied:
            for active in copied[owner].active_adapters:
                if inside.startswith(f"modules_to_save.{active}."):
                    yield (
                        f"{owner}.{inside.removeprefix(f'modules_to_save.{active}.')}",
                        partial(_plain, tensor),
                    )


def _plain(tensor: Tensor) -> Parts:
    return tensor, None, None


def _with_update(layer: nn.Module, attribute: str, tensor: Tensor) -> Parts:
    """A tensor under adapters: what merging them adds to it, computed on a copy in float64.

    Of several, with the sum of their sizes: one may have been merged and rounded before the next.
    """
    # A copy, because merging changes the layer in place, and base may share its weights.
    merged: Any = copy.deepcopy(layer).double()

    def held() -> Tensor:
        tensor: Tensor = dict(merged.base_layer.named_parameters())[attribute]
        return tensor.detach().clone()

    first = before = held()
    size = torch.zeros_like(before)
    adapters = list(merged.active_adapters)
    # One at a time: `size` is the sum of what each of them adds.
    for adapter in adapters:
        # PEFT refuses some, as a bias of LoRA's own; a lack of memory is no refusal, and passes.
        with warnings.catch_warnings(), Translated("merging an adapter", _refusal):
            warnings.filterwarnings("ignore", "Already following adapters were merged")
            merged.merge(adapter_names=[adapter])
        after = held()
        size += (after - before).abs()
        before = after
    return tensor, before - first, size if len(adapters) > 1 else None


def _refusal(error: Exception) -> AdapterError:
    return AdapterError(f"PEFT does not merge it: {error}")
