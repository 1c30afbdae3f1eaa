"""Two models of which one is the other, rounded to the dtype in which it is stored.

A right merge of an adapter is stored in 16 bits as a rule, and differs from base + adapter by that rounding.
It shows in the hidden states, far above the noise. The weights tell it from a wrong merge.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor, nn

from lazarus.errors import AdapterError
from lazarus.facts import Rounded
from lazarus.metrics.rounding import RoundingTest, beyond_rounding, unit_in_the_last_place
from lazarus.models import LoadedModel, Parts, effective_tensors, settings_that_differ

_NARROW = (torch.bfloat16, torch.float16)
_TYPES = (Tensor, nn.Parameter, nn.Buffer)
PART = 2**16
"""Elements that are looked at together: few enough to stay in a processor's cache."""


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
    found, source = ({each.name: each.read for each in effective_tensors(m.model)} for m in (stored, exact))
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
