"""Finds where a model's hidden states stop being finite, and why: weights, dtype, or computation.

One text runs alone until the first block whose output is not finite. That block runs again in a wider dtype,
on what it received: where its output is finite then, the narrow dtype overflowed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lazarus.blame import is_out_of_memory
from lazarus.engine.head import Head
from lazarus.engine.recorder import Recorder, RowSelection, calling, first_tensor
from lazarus.engine.replay import StoppedError
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.facts import Site
from lazarus.messages import option
from lazarus.metrics import MOST_LOGITS
from lazarus.models import Fault, LoadedModel, fault_of, is_hollow
from lazarus.notes import Note
from lazarus.tokens import listed

_NAMED = 3
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


@dataclass(frozen=True)
class _Call:
    """A block, what it was called on, and what it returned."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Break:
    """The place at which the states of one text stop being finite, and why."""

    site: Site
    tokens: tuple[int, ...]
    """the places in the text where they are not finite"""
    has_nan: bool
    weights: tuple[str, ...] = ()
    """the names of the tensors there that hold NaN or infinity"""
    in_wider: Literal["finite", "not finite", "unknown"] = "unknown"
    """what the same block makes of the same states in a wider dtype"""

    def note(self, model: LoadedModel, text: str = "the text") -> Note:
        """Return a note on it, with options marked as errors have them; `text` names what was run."""
        if self.weights:
            return note_of_weights(model, self.weights)
        layers = (self.site,) if isinstance(self.site, int) else ()
        return Note("not-finite", self.told(model, text), model.name, layers)

    def told(self, model: LoadedModel, text: str = "the text") -> str:
        """Return a sentence on it without a full stop; `text` names what was run."""
        what = "logits" if self.site == "logits" else "states"
        start = {
            "embedding": "from the embedding on",
            "final_norm": "after the final norm",
            "logits": f"though its states are, on {text}",
        }.get(str(self.site), f"from layer {self.site} on")
        dtype, name = model.run_dtype, model.name
        if self.weights:
            return _told_of_weights(model, self.weights)
        overflows = self.in_wider == "finite" or (self.in_wider == "unknown" and not self.has_nan)
        if overflows and dtype == "float16":
            where = "" if self.site == "logits" else f" {start}"
            return f"{name}: its {what} overflow float16{where}: {_remedy(model, 'bfloat16', 'float32')}"
        if self.in_wider == "finite" and dtype == "bfloat16":
            return f"{name}: its {what} are finite in float32 and not in bfloat16 {start}: " + _remedy(
                model, "float32"
            )
        if self.in_wider == "finite":
            return (
                f"{name}: its {what} overflow {dtype} {start}, though all weights there are finite: no wider "
                "dtype is at hand, so use another checkpoint"
            )
        if self.in_wider == "not finite":
            kind = "NaN" if self.has_nan else "infinity"
            return (
                f"{name}: layer {self.site} makes {kind} of finite states, though all its weights are "
                f"finite, at tokens {listed(self.tokens)} of {text}; it does so in a wider dtype too, so its "
                "computation is at fault"
            )
        told = f"{name}: its {what} are not finite {start}, and no weight was seen to hold NaN or infinity"
        if dtype in ("float32", "float64"):
            return f"{told}: its numbers are too large for {dtype}, so use another checkpoint"
        return f"{told}: if {dtype} is too narrow, float32 mends it ({_remedy(model, 'float32')})"


def find_break(
    model: LoadedModel, ids: Sequence[int], time_axis: int, head_reads: type[ModelOutput] | None = None
) -> Break | None:
    """Run a text until its states, or with `head_reads` its logits, are not finite; None where all are.

    Raises:
        DeviceError: the device lacks an operator.
        UnsupportedModelError: the forward pass fails on token ids alone.
    """
    found: list[tuple[Break, _Call | None]] = []
    numbers = count()

    def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer, entered, left = next(numbers), next(iter(args), None), first_tensor(output)
        if layer == 0 and isinstance(entered, Tensor) and not _is_finite(entered):
            found.append((_break("embedding", entered, time_axis), None))
        elif not _is_finite(left):
            found.append((_break(layer, left, time_axis), _Call(block, args, kwargs, output)))
        if found:
            raise StoppedError

    input_ids, seen = torch.tensor([list(ids)]), None
    with suppress(StoppedError), ExitStack() as stack:
        # A block that stands in the list several times is hooked once.
        for block in dict.fromkeys(model.anatomy.blocks):
            stack.callback(block.register_forward_hook(take, with_kwargs=True).remove)
        seen = Recorder(model).run(
            input_ids,
            torch.ones_like(input_ids),
            RowSelection(lambda states: states.new_empty(0), torch.Tensor.detach),
        )
    # Not in an `except`: what fails from here on would count as ours, with an error of ours as its context.
    if found:
        return _explained(model, *found[0])
    assert seen is not None
    assert seen.final is not None
    if not _is_finite(seen.final):
        return _explained(model, _break("final_norm", seen.final, 1), None)
    if head_reads is None:
        return None
    broken_logits = _break_of_logits(Head(model, head_reads), seen.final[0])
    return None if broken_logits is None else _explained(model, broken_logits, None)


def broken_weights(model: LoadedModel, modules: Iterable[nn.Module] | None = None) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity, of all or of some modules."""
    return [name for name, fault in faulty_weights(model, modules).items() if fault == "not finite"]


def faulty_weights(model: LoadedModel, modules: Iterable[nn.Module] | None = None) -> dict[str, Fault]:
    """Return the tensors that hold NaN, infinity or an absurd magnitude, of all or of some modules.

    Of a model that is read block by block they are those of the blocks that have been read, and of what is
    in memory.
    """
    among = None if modules is None else {id(p) for m in modules for p in m.parameters()}
    named = model.model.named_parameters()
    held = [(name, p) for name, p in named if (among is None or id(p) in among) and not is_hollow(p)]
    if model.pager is not None:
        held = [(name, p) for name, p in held if not model.pager.is_table(p)]
    found = {name: fault for name, p in held if (fault := fault_of(p))}
    if modules is None and model.pager is not None:
        for seen in model.pager.seen.values():
            found |= seen
    return found


def note_of_absurd(model: LoadedModel, names: Sequence[str]) -> Note:
    """Return a note on weights that hold a number too large for any weight."""
    return Note(
        "absurd-weights",
        f"{model.name}: numbers above 2⁴⁰ among ordinary ones in {listed(names, _NAMED)}: a bit of the file "
        "may have flipped, so hold the file against its source",
        model.name,
    )


def note_of_weights(model: LoadedModel, names: Sequence[str]) -> Note:
    """Return a note on weights that hold NaN or infinity, with options marked as errors have them."""
    return Note("broken-weights", _told_of_weights(model, names), model.name)


def _told_of_weights(model: LoadedModel, names: Sequence[str]) -> str:
    """Return what is wrong with weights that hold NaN or infinity, perhaps by their dtype alone."""
    infinite = dict(model.model.named_parameters())
    stored, run = model.stored_dtype, model.run_dtype
    narrowed = run == "float16" and stored is not None and stored.lower() not in ("float16", "f16")
    # Narrowing makes infinity of a finite element, never NaN: a NaN was in the checkpoint before.
    if narrowed and not any(bool(infinite[name].isnan().any()) for name in names if name in infinite):
        return (
            f"{model.name}: {len(names)} weights overflow float16, first {names[0]}, and are stored in "
            f"{stored}: {_remedy(model, 'bfloat16', 'float32')}"
        )
    return (
        f"{model.name}: {len(names)} weights hold NaN or infinity, first {names[0]}: fetch or train that "
        "model again"
    )


def _remedy(model: LoadedModel, *dtypes: str) -> str:
    if model.kind == "loaded":
        return f"load it in {' or '.join(dtypes)}"
    if getattr(model.model.config, "quantization_config", None) is not None:
        return (
            f"it is quantised and keeps its dtype, so use an unquantised checkpoint in {' or '.join(dtypes)}"
        )
    return "run with " + " or ".join(option("dtype", dtype) for dtype in dtypes)


def _break(site: Site, states: Tensor, time_axis: int) -> Break:
    others = [axis for axis in range(states.dim()) if axis != time_axis]
    bad = ~states.isfinite()
    tokens = bad.sum(dim=others).nonzero().flatten().tolist() if others else []
    return Break(site, tuple(tokens), has_nan=bool(states.isnan().any()))


def _break_of_logits(head: Head, rows: Tensor) -> Break | None:
    n_rows = max(1, MOST_LOGITS // head.n_tokens)
    for start in range(0, len(rows), n_rows):
        logits = head.logits(rows[start : start + n_rows])
        # −∞ is a token that cannot come.
        bad = logits.isnan() | (logits == torch.inf)
        if bad.any():
            tokens = (bad.any(-1).nonzero().flatten() + start).tolist()
            return Break("logits", tuple(tokens), has_nan=bool(logits.isnan().any()))
    return None


def _explained(model: LoadedModel, broken: Break, call: _Call | None) -> Break:
    """The break, with what is behind it."""
    stack, blocks = model.anatomy.stack, model.anatomy.blocks
    if call is None:
        inside = {id(p) for block in blocks for p in block.parameters()}
        # What breaks before or after the blocks is a fault of weights outside them.
        own = stack if broken.site in ("embedding", "final_norm") else model.model
        outside = [m for m in own.modules() if all(id(p) not in inside for p in m.parameters())]
        # All broken tensors are named, but only where one of them stands at the place of the break.
        weights = broken_weights(model) if broken_weights(model, outside) else []
        return replace(broken, weights=tuple(weights))
    with _in_memory(model, call.block):
        if broken_weights(model, [call.block]):
            return replace(broken, weights=tuple(broken_weights(model)))
        return replace(broken, in_wider=_in_wider(model, call))


@contextmanager
def _in_memory(model: LoadedModel, block: nn.Module) -> Iterator[None]:
    """Hold a block of a model that is read block by block."""
    pager = model.pager
    if pager is None:
        yield
        return
    index = next(i for i, each in enumerate(model.anatomy.blocks) if each is block)
    pager.load(index)
    try:
        yield
    finally:
        pager.free(index)


def _in_wider(model: LoadedModel, call: _Call) -> Literal["finite", "not finite", "unknown"]:
    """Return what a block makes of the same arguments in a wider dtype, all by itself."""
    dtype = first_tensor(call.output).dtype
    wider, entered = _WIDER.get(dtype), next(iter(call.args), None)
    # Quantised weights are integers or subclasses of `Parameter`: a cast gives no wider computation of them.
    is_plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in call.block.parameters())
    if wider is None or not is_plain or (isinstance(entered, Tensor) and not _is_finite(entered)):
        return "unknown"

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(wider) if value.is_floating_point() else value
        # Mappings are copied: the block writes into them, and they belong to the call that is looked into.
        return type(value)(map(cast, value)) if type(value) in (tuple, list) else copy.copy(value)

    try:
        # The hooks that this package has on a block outside a run load its weights, and here they are loaded.
        block = copy.deepcopy(call.block).to(wider)
        shape = first_tensor(call.output).shape
        with torch.no_grad(), calling(model, shape):
            output = block(*map(cast, call.args), **{k: cast(v) for k, v in call.kwargs.items()})
    except (UnsupportedModelError, DeviceError):
        return "unknown"  # a block that names its dtype somewhere
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return "unknown"
        raise
    return "finite" if _is_finite(first_tensor(output)) else "not finite"


def _is_finite(states: Tensor) -> bool:
    return bool(states.isfinite().all())
