"""Tensor subclasses as quantisation libraries make them: no storage of their own, and hardly an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Sealed(Tensor):
    """Wraps another tensor and says nothing of it."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, *_others: Any) -> Sealed:
        made: Sealed = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        return made

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def whole(self) -> Tensor:
        """The plain tensor that it stands for."""
        return self.codes.float()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{cls.__name__} dispatch: no implementation of {func}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Scaled(Sealed):
    """Codes and their scale, which it shows by `__tensor_flatten__`."""

    def __init__(self, codes: Tensor, scale: Tensor, axis: str = "rows") -> None:
        super().__init__(codes)
        self.scale = scale
        self.axis = axis

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["codes", "scale"], {"axis": self.axis}

    def whole(self) -> Tensor:
        return self.codes * self.scale


class ScaledLinear(nn.Linear):
    """A linear layer over such a weight."""

    def forward(self, states: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(states, weight.whole())


def quantised(model: nn.Module, kind: type[Sealed] = Scaled) -> nn.Module:
    """Store every matrix of the MLPs of a model in 8 bits, in place; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".mlp." in name:
            scale = module.weight.detach().abs().max() / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.__class__ = ScaledLinear
            made = kind(codes, scale) if kind is Scaled else kind(codes)
            module.weight = nn.Parameter(made, requires_grad=False)
    return model
