"""The contribution of each changed parameter to a gradient, prompt by prompt.

The derivative of a loss along a change Δ of a module's parameter is Σ g · u over the module's output: g is
the gradient of the loss there, and u is what Δ does to the output, to first order. Each row of an output
belongs to a prompt, so the sum splits by prompt. Of a linear layer u = x Δᵀ, of an embedding u is rows of Δ,
and of any other module it is the forward-mode derivative. No parameter needs a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from lazarus.blame import is_out_of_memory
from lazarus.engine.path import Change
from lazarus.metrics import on_device, to_float64


@dataclass(frozen=True)
class Owners:
    """The prompts to which the rows of outputs belong, by the number of rows."""

    of_rows: Mapping[int, Tensor]
    n_prompts: int
    is_batch: bool
    """whether the first axis of outputs is that of the prompts"""

    @classmethod
    def of_batch(cls, n_prompts: int, n_tokens: int) -> Owners:
        """Return those of a batch: its outputs have a row for each prompt, or for each token."""
        prompts = torch.arange(n_prompts)
        of_rows = {n_prompts * n_tokens: prompts.repeat_interleave(n_tokens), n_prompts: prompts}
        return cls(of_rows, n_prompts, is_batch=True)

    @classmethod
    def of_tokens(cls, prompts: Tensor, n_prompts: int) -> Owners:
        """Return those of single tokens, each of which belongs to a prompt."""
        return cls({len(prompts): prompts}, n_prompts, is_batch=False)

    def split(self, values: Tensor) -> Float64[Tensor, " prompts"] | None:
        """Return the sum of each prompt's values; None where it is not known whose they are."""
        # Over features as they are, and then in float64.
        values = to_float64(values.sum(-1) if values.ndim > 1 else values)
        if self.n_prompts == 1:
            return values.sum()[None]
        if values.shape[0] == 1 and values.ndim > 1:
            values = values[0]
        rows = self.of_rows.get(values.shape[0])
        if rows is None:
            return None
        sums = values.flatten(1).sum(1) if values.ndim > 1 else values
        return sums.new_zeros(self.n_prompts).index_add_(0, on_device(rows, sums.device), sums)


class UnsplitError(Exception):
    """An output has rows of which it is not known to which prompt they belong."""


@dataclass
class Contributions:
    """Collects ⟨∇L, Δ⟩ of every change while a loss is propagated back."""

    changes: Sequence[Change]
    model: nn.Module
    by_gradient: set[int] = field(default_factory=set)
    """the changes whose gradient is computed: of one prompt at a time"""
    one_by_one: bool = False
    """whether prompts must run one at a time"""
    is_learning: bool = False
    """whether a contribution that cannot be found is kept in `faults`, and is no error"""
    faults: dict[int, Exception] = field(default_factory=dict)
    """why the contribution of a change is not known"""
    owners: Owners = field(init=False)
    """of the part of the model that runs next"""
    _found: Float64[Tensor, "changes prompts"] = field(init=False)
    """on the model's device while a loss is propagated back: the host would have to wait for each change"""
    _is_busy: bool = field(init=False, default=False)

    def begin(self, n_prompts: int) -> None:
        """Begin a batch."""
        some = next(self.model.parameters()).detach()
        self._found = to_float64(some.new_zeros(0)).new_zeros(len(self.changes), n_prompts)

    @property
    def found(self) -> Float64[Tensor, "changes prompts"]:
        """Return what was found of the last batch, in the host's memory."""
        return self._found.cpu()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every module that holds a changed parameter while the context lasts."""
        index_of = {id(change.parameter): i for i, change in enumerate(self.changes)}
        handles = []
        try:
            for module in self.model.modules():
                held = {
                    attribute: index_of[id(parameter)]
                    for attribute, parameter in module._parameters.items()
                    if id(parameter) in index_of
                }
                watched = {name: i for name, i in held.items() if i not in self.by_gradient}
                if watched:
                    hook = partial(self._on_output, watched)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
            for i in self.by_gradient:
                parameter: Any = self.changes[i].parameter
                parameter.requires_grad = True
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, i)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for i in self.by_gradient:
                self.changes[i].parameter.requires_grad = False

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        for rows, delta in self.changes[index].pieces():
            part = gradient[rows].mul_(delta)
            # MPS has no float64.
            self._found[index] += (part.cpu() if part.device.type == "mps" else part).sum(dtype=torch.float64)

    def _on_output(
        self, held: Mapping[str, int], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        """Watch what a module returns; its outputs need a gradient from here on."""
        if self._is_busy:
            return None
        call = _Call(module, held, _detached(args), _detached(kwargs), self.owners)

        def watched(place: int, tensor: Tensor) -> Tensor:
            if self.owners.is_batch and tensor.ndim == 3 and tensor.shape[0] == 1:
                # One row for all prompts, such as of positions: a row for each, so that gradients part.
                tensor = tensor.expand(self.owners.n_prompts, -1, -1)
            is_first = not tensor.requires_grad
            untyped: Any = tensor.detach().requires_grad_() if is_first else tensor
            untyped.register_hook(partial(self._on_output_gradient, call, place))
            # A copy, because a leaf may not be changed in place, and some models scale their embeddings so.
            found: Tensor = untyped.clone() if is_first else untyped
            return found

        return _map_tensors(output, watched)

    def _on_output_gradient(self, call: _Call, place: int, gradient: Tensor) -> None:
        self._is_busy = True
        try:
            for attribute, index in call.held.items():
                try:
                    self._add(index, call, attribute, place, gradient)
                # torch raises the first where there is no forward-mode derivative, and for a lack of memory.
                except (RuntimeError, UnsplitError) as error:
                    if not self.is_learning or is_out_of_memory(error):
                        raise
                    self.faults.setdefault(index, error)
        finally:
            self._is_busy = False

    def _add(self, index: int, call: _Call, attribute: str, place: int, gradient: Tensor) -> None:
        values = call.product(attribute, self.changes[index], place, gradient)
        if values is None:
            return
        split = call.owners.split(values)
        if split is None:
            raise UnsplitError
        self._found[index] += split


@dataclass(frozen=True)
class _Call:
    """One call of a module that holds changed parameters."""

    module: nn.Module
    held: Mapping[str, int]
    args: Any
    kwargs: Any
    owners: Owners
    _tangents: dict[str, list[Tensor | None]] = field(default_factory=dict)

    def product(self, attribute: str, change: Change, place: int, gradient: Tensor) -> Tensor | None:
        """Return g · u, or a tensor of the same sums over rows; None where u is 0."""
        inputs: Tensor | None = self.args[0] if self.args else None
        if type(self.module) is nn.Linear and inputs is not None:
            if attribute == "bias":
                return gradient * change.delta()
            return self._linear(change, inputs, gradient)
        if type(self.module) is nn.Embedding and inputs is not None:
            return gradient * change.delta(inputs)
        if attribute not in self._tangents:
            self._tangents[attribute] = self._forward(attribute, change)
        tangent = self._tangents[attribute][place]
        return None if tangent is None else gradient * tangent

    def _linear(self, change: Change, inputs: Tensor, gradient: Tensor) -> Tensor:
        found = gradient.new_zeros(*gradient.shape[:-1], 1)
        is_narrow = inputs.shape[-1] < gradient.shape[-1]
        for rows, delta in change.pieces():
            part = gradient[..., rows]
            # On the side with fewer features.
            product = (part @ delta) * inputs if is_narrow else (inputs @ delta.T) * part
            found += product.sum(-1, keepdim=True)
        return found

    def _forward(self, attribute: str, change: Change) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        dual_numbers: Any = forward_ad

        def keep(_: int, tensor: Tensor) -> Tensor:
            found.append(dual_numbers.unpack_dual(tensor).tangent)
            return tensor

        with torch.no_grad(), dual_numbers.dual_level():
            dual = dual_numbers.make_dual(change.parameter.detach(), change.delta())
            _map_tensors(functional_call(self.module, {attribute: dual}, self.args, self.kwargs), keep)
            return [None if tangent is None else tangent.clone() for tangent in found]


def _map_tensors(output: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """Return an output with its tensors of real numbers changed; they are numbered in order."""
    count = iter(range(1 << 30))

    def mapped(item: Any) -> Any:
        if isinstance(item, Tensor):
            return change(next(count), item) if item.is_floating_point() else item
        if isinstance(item, tuple | list):
            return type(item)(mapped(each) for each in item)
        return item

    return mapped(output)


def _detached(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.detach()
    if isinstance(given, tuple | list):
        return type(given)(_detached(each) for each in given)
    return {key: _detached(each) for key, each in given.items()} if isinstance(given, dict) else given
