"""Compares two values bit for bit: the same, not the same, or not known.

What cannot be looked into is answered by None, never by True: a tensor without elements, an object that keeps
its state where Python does not see it. The caller decides what None means; nobody may take it for equal.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lazarus.models.design import same_config

Hook = TypeVar("Hook", bound=Callable[..., Any])

Fault = Literal["not finite", "absurd"]
ABSURD = 2.0**40
"""More than any weight of a trained model: the largest, of norms and attention sinks, are some thousands, and
what is saved in float16 is below 2¹⁶. A flip of the top bit of the exponent makes more of every weight of
bfloat16 or float32 that is above 1e-26; in float16 it stays below, and only a digest tells."""
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (
    *(bool, int, str, bytes, type(None), range, slice, type, Enum),
    *(BuiltinFunctionType, CodeType, ModuleType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Values that never change, and that compare by what they are."""
_NOT_COMPARED = {
    # compared by themselves, by the caller or below
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_forward_hooks", "_forward_pre_hooks"),
    # of training, saving and loading
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_is_hf_initialized"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "name_or_path"),
    # left by transformers on a model that was once asked for its hidden states
    "_output_capturing_hooks_installed",
    # by the number of each hook, and that number is another one in each module
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
}
"""Attributes of a module that say nothing of what its forward pass computes from its tensors."""
_MAPPINGS = (object, dict, OrderedDict)
_HEAP_TYPE = 1 << 9
"""the flag of a class that is made at run time, as classes in Python are"""


_INERT = "_computes_nothing"
_CAPTURING = "transformers.utils.output_capturing"
"""Where transformers defines the hooks that it leaves on a model which was once asked for hidden states."""


def inert(hook: Hook) -> Hook:
    """Mark a hook that changes nothing of what a module computes: one more or less makes no difference."""
    setattr(hook, _INERT, True)
    return hook


def every(answers: Iterable[bool | None]) -> bool | None:
    """Return True where all answers are; False at the first that is; None where one is not known."""
    unknown = False
    for answer in answers:
        if answer is False:
            return False
        unknown = unknown or answer is None
    return None if unknown else True


def same_bits(one: Tensor, other: Tensor) -> bool | None:
    """Return whether two tensors have one shape, dtype and kind, and the same bits, on whatever device.

    A tensor subclass with `__tensor_flatten__` (torchao's) is compared by its inner tensors and its context.
    """
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if type(one) in _PLAIN_TENSORS and type(other) in _PLAIN_TENSORS:
        return _same_elements(one, other)
    if type(one) is not type(other):
        return False
    if hasattr(one, "__tensor_flatten__"):
        return _same_inside(one, other)
    # Other subclasses that dispatch by themselves are wrappers: they have no storage to look into.
    if type(one).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    # Without this, `as_subclass` and the comparison would run through the overrides of the subclass.
    with torch._C.DisableTorchFunctionSubclass():
        same = _same_elements(one.as_subclass(Tensor), other.as_subclass(Tensor))
    # The rest of it, such as the scales of bitsandbytes' parameters, is in plain attributes.
    return same and (Equality().same(vars(one), vars(other)) or None)


def _same_inside(one: Any, other: Any) -> bool | None:
    ours, theirs = one.__tensor_flatten__(), other.__tensor_flatten__()
    if list(ours[0]) != list(theirs[0]):
        return False
    parts = (same_bits(getattr(one, name), getattr(other, name)) for name in ours[0])
    return every([Equality().same(ours[1], theirs[1]), *parts])


def _same_elements(one: Tensor, other: Tensor) -> bool | None:
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return None
    if one.is_meta or other.is_meta or one.is_quantized or other.is_quantized:
        return None
    if is_one(one, other):
        return True
    ours, theirs = _bits(one), _bits(other)
    for axis, (mine, its) in enumerate(zip(ours.stride(), theirs.stride(), strict=True)):
        if mine == its == 0 and ours.shape[axis] > 1:  # expanded: one element stands for all
            ours, theirs = ours.narrow(axis, 0, 1), theirs.narrow(axis, 0, 1)
    return torch.equal(ours, theirs.to(ours.device))


def has_non_finite(weight: Tensor) -> bool:
    """Return whether NaN or infinity is among the elements of a tensor, as far as they can be read."""
    return fault_of(weight) == "not finite"


def fault_of(weight: Tensor) -> Fault | None:
    """Return what is wrong with the elements of a tensor, as far as they can be read; None if nothing is.

    The smallest and the largest element tell, in one pass: both are NaN where one element is.
    """
    if weight.is_meta or type(weight) not in _PLAIN_TENSORS or not weight.is_floating_point():
        return None
    if not weight.numel() or weight.layout is not torch.strided:
        return None
    if weight.element_size() == 1:
        # torch has no `aminmax` for float8.
        weight = weight.float()
    least, most = (float(end) for end in torch.aminmax(weight.detach()))
    if not math.isfinite(most - least):
        # The difference of two finite ends may overflow.
        return "absurd" if math.isfinite(least) and math.isfinite(most) else "not finite"
    if max(-least, most) <= ABSURD:
        return None
    # A constant that stands for infinity, as in a mask, fills its tensor.
    return "absurd" if 2 * int((weight.abs() > ABSURD).sum()) < weight.numel() else None


def is_one(one: Tensor, other: Tensor) -> bool:
    """Return whether two plain tensors are the same elements of the same memory."""
    places = (
        (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()) for t in (one, other)
    )
    # Two tensors without memory of their own have the address 0 in common, and nothing else.
    return len(set(places)) == 1 and (one.data_ptr() != 0 or not one.numel())


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as integers: NaN is then equal to NaN, and 0 is not equal to −0."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype.itemsize not in _INTEGERS:
        # complex128: there is no integer of 16 bytes
        plain = torch.view_as_real(plain)
    return plain.view(_INTEGERS[plain.dtype.itemsize])


class Equality:
    """Compares values of any type.

    A pair of objects is looked into once. Both are held from then on, so that no other object gets their ids.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[Any, Any, bool | None]] = {}

    def same(self, one: Any, other: Any) -> bool | None:
        """Return whether two values are the same: of one type, and with the same contents."""
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return self._once(one, other, same_bits)
        if one is other:
            return True
        if type(one) is not type(other):
            return False
        # By their bits, as tensors: NaN is then equal to NaN, and 0.0 is not equal to −0.0.
        if isinstance(one, float):
            return struct.pack("d", one) == struct.pack("d", other)
        if isinstance(one, _PLAIN):
            return bool(one == other)
        return self._once(one, other, self._same_contents)

    def same_module(self, one: nn.Module, other: nn.Module) -> bool | None:
        """Return whether two modules are the same layers over the same parameters and buffers."""
        tensors = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
        return every([self.same_layers(one, other), self.same(*tensors)])

    def same_layers(self, one: nn.Module, other: nn.Module) -> bool | None:
        """Return whether two modules compute the same from the same parameters and buffers.

        They have the same submodules by name and type, with the same attributes, hooks and replaced forwards.
        An adapter's layers are others.
        """
        if one is other:
            return True
        ours, theirs = (list(module.named_modules()) for module in (one, other))
        if [(name, type(m)) for name, m in ours] != [(name, type(m)) for name, m in theirs]:
            return False
        return every(
            self.same(_attributes(mine), _attributes(its))
            for (_, mine), (_, its) in zip(ours, theirs, strict=True)
        )

    def _once(self, one: Any, other: Any, compare: Callable[[Any, Any], bool | None]) -> bool | None:
        # A tensor that was written to since is another one, though its id is the same.
        pair = (id(one), id(other), _version(one), _version(other))
        if pair not in self._known:
            self._known[pair] = (one, other, True)  # what leads back to itself does not differ by that
            self._known[pair] = (one, other, compare(one, other))
        return self._known[pair][2]

    def _same_contents(self, one: Any, other: Any) -> bool | None:
        if isinstance(one, nn.Module):
            return self.same_module(one, other)
        if isinstance(one, PretrainedConfig):
            return same_config(one, other)
        if isinstance(one, Mapping):
            if one.keys() != other.keys():
                return False
            beside = ({n: v for n, v in _state(m).items() if n != "data"} for m in (one, other))
            # A mapping of another class may answer by more than its items, such as a default.
            if type(one) is not dict and not (_keeps_items_alone(one) and self.same(*beside)):
                return None
            if isinstance(one, OrderedDict) and list(one) != list(other):
                return False
            return every(self.same(one[key], other[key]) for key in one)
        if isinstance(one, set | frozenset):
            # Other items may be equal by an `__eq__` that does not look at all of them.
            return one == other if all(isinstance(item, _PLAIN) for item in one | other) else None
        ours, theirs = _parts(one), _parts(other)
        if ours is None or theirs is None:
            return None
        if len(ours) != len(theirs):
            return False
        return every(self.same(mine, its) for mine, its in zip(ours, theirs, strict=True))


def _version(value: object) -> int:
    """Return how often a tensor was written to in place, where it counts that."""
    # An inference tensor raises RuntimeError when it is asked for its version.
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return all that shapes a module's forward pass, its tensors and submodules aside."""
    plain = {name: value for name, value in vars(module).items() if name not in _NOT_COMPARED}
    hooks = [
        [hook for hook in kind.values() if not hasattr(hook, _INERT) and hook.__module__ != _CAPTURING]
        for kind in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return {**plain, "forward hooks": hooks}


def _parts(value: Any) -> list[Any] | None:
    """Return the parts that a value is made of, in order; None where it may have others."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, FunctionType):
        empty = CellType()  # a name that is not bound yet
        brought = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
        # The globals by their id: the same code in another module may call other functions.
        return [value.__code__, id(value.__globals__), value.__defaults__, value.__kwdefaults__, *brought]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    return [_state(value)] if dataclasses.is_dataclass(value) or _is_transparent(value) else None


def _keeps_items_alone(value: Mapping[Any, Any]) -> bool:
    """Return whether a mapping has no state in C besides its items, as a defaultdict has its default."""
    return all(base in _MAPPINGS or base.__flags__ & _HEAP_TYPE for base in type(value).__mro__)


def _is_transparent(value: object) -> bool:
    """Return whether an object keeps all of its state in attributes: a class in Python, pickled as usual."""
    kind = type(value)
    # A class that says itself how it is pickled has state that its attributes may not show.
    pickling = ("__reduce__", "__reduce_ex__", "__getstate__")
    return (
        hasattr(value, "__dict__")
        and type(kind) in (type, ABCMeta)
        and all(getattr(kind, name) is getattr(object, name) for name in pickling)
        # A base that is built in (an int, a lock) holds more than attributes.
        and all(base is object or base.__flags__ & _HEAP_TYPE for base in kind.__mro__)
    )


def _state(value: object) -> dict[str, Any]:
    """Return the attributes of an object, those in slots among them."""
    slots: list[str] = []
    for kind in type(value).__mro__:
        own = vars(kind).get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    return {**getattr(value, "__dict__", {}), **{n: getattr(value, n) for n in slots if hasattr(value, n)}}
