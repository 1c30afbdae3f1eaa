"""A device that is none: its tensors lie on the CPU, and every time that the host waits for it is counted.

It stands in for a GPU where there is none. What runs on it gives the CPU's numbers, bit for bit, so that only
what a device asks of the code is tried: that no operation mixes devices, and how often the host waits. It is
called `lazy`, after a backend of torch that no build has: torch takes the name, and asks no driver about it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)

WAITING = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "masked_select", "is_nonzero"}
"""Operations whose result, or whose size, the host has to know."""


class There(Tensor):
    """A tensor on the device; `here` holds its elements."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        """Wrap a tensor of the CPU."""
        make: Any = Tensor._make_wrapper_subclass
        made: There = make(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: only the mode runs operations on such tensors."""
        raise AssertionError(f"{func} ran outside of the device's mode")


class Accelerator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is active there is such a device; `waits` counts how often the host waited, by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.n_operations = 0

    def put(self, model: nn.Module) -> None:
        """Move a model's parameters and buffers to the device; tied ones stay tied."""
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    on_device = nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
                    module._parameters[name] = moved.setdefault(id(parameter), on_device)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(DEVICE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        is_there = [isinstance(each, There) for each in tensors]
        goes_there, name = any(is_there), func.overloadpacket.__name__
        if kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif name != "copy_":
            apart = [each for each, there in zip(tensors, is_there, strict=True) if not there and each.ndim]
            assert not (any(is_there) and apart), f"{func} mixes devices"
        self._count(name, tensors, is_there, goes_there)
        here = [tree_map(lambda x: x.here if isinstance(x, There) else x, each) for each in (args, kwargs)]
        found = func(*here[0], **here[1])
        if not goes_there:
            return found
        # What is written in place, or returned as it was given, is the very tensor that was given.
        given = {id(each.here): each for each in tensors if isinstance(each, There)}
        return tree_map(lambda x: _there(x, given), found)

    def _count(self, name: str, tensors: list[Tensor], is_there: list[bool], goes_there: bool) -> None:
        if name in ("_to_copy", "copy_") and any(there != goes_there for there in is_there):
            self.waits["copy to the device" if goes_there else "copy to the host"] += 1
        elif any(is_there):
            self.n_operations += 1
            # A mask as an index is `nonzero` inside.
            is_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in tensors[1:])
            if name in WAITING or is_mask:
                self.waits[name] += 1


def _there(found: Any, given: dict[int, There]) -> Any:
    if not isinstance(found, Tensor):
        return found
    return given[id(found)] if id(found) in given else There(found)
