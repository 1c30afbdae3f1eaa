"""Weights that two models have in common, and why a fine-tune may have changed nothing."""

from __future__ import annotations

from torch import Tensor, nn

from lazarus.models.adapted import (
    adapter_layers,
    adds_nothing,
    brought_state,
    computed_buffers,
    has_zero_product,
    is_off,
    own_state,
)
from lazarus.models.design import same_design
from lazarus.models.equality import Equality, every, is_one, same_bits
from lazarus.models.loaded import LoadedModel

_SMALL_BYTES = 2**16
"""up to here buffers are compared by their bits"""


def weights_identical(base: LoadedModel, finetuned: LoadedModel) -> bool | None:
    """Return whether both run on the same weights, bit for bit; None where that is not known.

    An adapter that adds exactly nothing does not count. Adapters that act count as weights: they are the same
    where all that they brought is the same.
    """
    if _same_files(base, finetuned) or _one_in_memory(base, finetuned):
        return True
    equality = Equality()
    adapters = _same_adapters(base, finetuned, equality)
    return False if adapters is False else every([_same_own(base, finetuned, equality), adapters])


def shared_blocks(base: LoadedModel, finetuned: LoadedModel) -> list[bool]:
    """Return for each block of base whether the fine-tuned model is known to have the same one at its place.

    Then both are of one design, with the same layers in the block, over the same weights: in memory by their
    addresses, and of models that are read block by block by what their files hold. A copy of a weight that
    is in memory twice is not looked into.
    """
    blocks, others = base.anatomy.blocks, finetuned.anatomy.blocks
    if len(blocks) != len(others) or not same_design(base.model, finetuned.model):
        return [False] * len(blocks)
    if base.pager is not None or finetuned.pager is not None:
        if finetuned.pager is None or finetuned.pager.base is not base.pager:
            return [False] * len(blocks)
        return [finetuned.pager.same_as_base(index) for index in range(len(blocks))]
    equality = Equality()
    return [_one_module(block, other, equality) for block, other in zip(blocks, others, strict=True)]


def _one_module(base: nn.Module, finetuned: nn.Module, equality: Equality) -> bool:
    """Return whether two modules are the same layers over the same weights."""
    if base is finetuned:
        return True
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (base, finetuned))
    if ours.keys() != theirs.keys() or not all(_one_tensor(ours[name], theirs[name]) for name in ours):
        return False
    # What is not known does not count as the same.
    return equality.same_layers(base, finetuned) is True


def _one_tensor(base: Tensor, finetuned: Tensor) -> bool:
    """Return whether two tensors are one in memory, or small buffers of the same bits."""
    if base is finetuned:
        return True
    plain = type(base) in (Tensor, nn.Parameter) and type(finetuned) in (Tensor, nn.Parameter)
    if plain and is_one(base, finetuned):
        return True
    is_small = not isinstance(base, nn.Parameter) and base.nbytes <= _SMALL_BYTES
    return is_small and base.device == finetuned.device and same_bits(base, finetuned) is True


def why_the_same(base: LoadedModel, finetuned: LoadedModel, identical: bool | None) -> list[str]:
    """Return what can be checked of the causes for which a fine-tune changes nothing, most likely first."""
    if _same_files(base, finetuned):
        return ["both names are the same files"]
    if _one_in_memory(base, finetuned):
        return ["both are one model in memory"]
    causes = []
    for model in (base, finetuned):
        if model.adapter:
            causes += _why_adapter_does_nothing(model)
    if identical and not causes:
        causes.append("both checkpoints hold the same weights, bit for bit: one is a copy of the other")
    return causes


def _same_files(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """Return whether both were loaded from the same files, adapters included."""
    if base.source is None or finetuned.source is None:
        return False
    return base.source.place == finetuned.source.place and base.adapter == finetuned.adapter


def _one_in_memory(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """Return whether the caller gave one model twice; one in training mode runs as a tree of its own."""
    if base.kind != "loaded" or finetuned.kind != "loaded":
        return False
    same = same_design(base.model, finetuned.model)
    return same and _one_module(base.model, finetuned.model, Equality())


def _same_own(base: LoadedModel, finetuned: LoadedModel, equality: Equality) -> bool | None:
    """Return whether all that both models have without their adapters is the same."""
    models = base.model, finetuned.model
    if base.pager is not None and finetuned.pager is not None:
        same = finetuned.pager.has_weights_of(base.pager)
    else:
        ours, theirs = (dict(own_state(model)) for model in models)
        if ours.keys() != theirs.keys() and type(models[0]) is not type(models[1]):
            # Of another class over the same stack, such as one without an LM head.
            stacks = (dict(own_state(model.anatomy.stack)) for model in (base, finetuned))
            return False if equality.same(*stacks) is False else None
        same = equality.same(ours, theirs)
    # A buffer that is no weight, such as the frequencies of a rotation, may have been changed in memory.
    return same and (equality.same(*map(computed_buffers, models)) or None)


def _same_adapters(base: LoadedModel, finetuned: LoadedModel, equality: Equality) -> bool | None:
    """Return whether the adapters of both make the same change: none, or the same tensors in one place."""
    layers = [layer for model in (base, finetuned) for layer in adapter_layers(model.model)]
    nothing = every(adds_nothing(layer) for layer in layers)
    if nothing is True:
        return True
    same: bool | None = equality.same_layers(base.model, finetuned.model)
    if same is True:
        same = equality.same(*(brought_state(model.model) for model in (base, finetuned)))
    # One that acts is no weight of the other model; of one that may not act, nothing is known.
    return nothing if same is False else same


def _why_adapter_does_nothing(model: LoadedModel) -> list[str]:
    compared, layers = adapter_layers(model.anatomy.stack), adapter_layers(model.model)
    if not compared:
        return [f"no layer that is compared carries the adapter {model.adapter}: its targets are elsewhere"]
    if all(is_off(layer) for layer in layers):
        return [f"the adapter {model.adapter} is not applied: it is switched off"]
    if not all(has_zero_product(layer) or adds_nothing(layer) for layer in layers):
        return []
    if n_layers := sum(map(has_zero_product, compared)):
        return [
            f"the adapter {model.adapter} adds nothing: B is still zero in all of its {n_layers} layers, "
            "as it is before the first step of training"
        ]
    return [f"the adapter {model.adapter} adds nothing: what it brings is what its model has without it"]
