"""What two models have in common in their weights, and why a fine-tune may have changed nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lazarus.models.design import same_design, same_structure
from lazarus.models.load import LoadedModel

_PEFT_BASE = ".base_layer"
_SMALL_BYTES = 2**16
"""up to here buffers are compared by their bits"""


def weights_identical(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """Whether both run on the same weights, bit for bit; an adapter that adds exactly nothing is none."""
    if _same_files(base, finetuned) or _one_in_memory(base, finetuned):
        return True
    if any(model.adapter and not adds_nothing(model) for model in (base, finetuned)):
        return False
    if base.pager is not None and finetuned.pager is not None:
        return finetuned.pager.has_weights_of(base.pager)
    ours, theirs = dict(_own_weights(base.model)), dict(_own_weights(finetuned.model))
    return ours.keys() == theirs.keys() and all(_same_bits(ours[name], theirs[name]) for name in ours)


def shared_blocks(base: LoadedModel, finetuned: LoadedModel) -> list[bool]:
    """For each block of base, whether the fine-tuned model has the same one, at the same place.

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
    return [_one_block(block, other) for block, other in zip(blocks, others, strict=True)]


def _one_block(base: nn.Module, finetuned: nn.Module) -> bool:
    """Whether two blocks are the same layers over the same weights."""
    if base is finetuned:
        return True
    if not same_structure(base, finetuned):
        return False
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (base, finetuned))
    return ours.keys() == theirs.keys() and all(_one_tensor(ours[name], theirs[name]) for name in ours)


def _one_tensor(base: Tensor, finetuned: Tensor) -> bool:
    """Whether two tensors are one in memory, or small buffers of the same bits."""
    if (base.shape, base.dtype, base.device) != (finetuned.shape, finetuned.dtype, finetuned.device):
        return False
    if base.data_ptr() == finetuned.data_ptr() and base.stride() == finetuned.stride():
        return True
    is_small = not isinstance(base, nn.Parameter) and base.nbytes <= _SMALL_BYTES
    return is_small and torch.equal(base, finetuned)


def why_the_same(base: LoadedModel, finetuned: LoadedModel, identical: bool) -> list[str]:
    """What can be checked of the causes for which a fine-tune changes nothing, most likely first."""
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


def adds_nothing(model: LoadedModel) -> bool:
    """Whether a model's adapters change no state: none acts, or every one's product is exactly zero."""
    layers = list(_adapted(model.model))
    return all(_is_off(layer) or (_is_zero(layer) and not _has_magnitude(layer)) for layer in layers)


def _same_files(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """Whether both were loaded from the same files, adapters included."""
    if base.source is None or finetuned.source is None:
        return False
    return base.source.place == finetuned.source.place and base.adapter == finetuned.adapter


def _one_in_memory(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """Whether the caller gave one model twice; one in training mode runs as a tree of its own."""
    if base.kind != "loaded" or finetuned.kind != "loaded":
        return False
    ours, theirs = ([p.data_ptr() for p in m.model.parameters()] for m in (base, finetuned))
    return base.model is finetuned.model or ours == theirs


def _why_adapter_does_nothing(model: LoadedModel) -> list[str]:
    layers = list(_adapted(model.anatomy.stack))
    if not layers:
        return [f"no layer that is compared carries the adapter {model.adapter}: its targets are elsewhere"]
    if all(_is_off(layer) for layer in layers):
        return [f"the adapter {model.adapter} is not applied: it is switched off"]
    if all(_is_zero(layer) for layer in layers):
        return [
            f"the adapter {model.adapter} adds nothing: B is still zero in all of its {len(layers)} layers, "
            "as it is before the first step of training"
        ]
    return []


def _adapted(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that carry an adapter."""
    return (layer for layer in module.modules() if hasattr(layer, "base_layer"))


def _is_off(layer: nn.Module) -> bool:
    return bool(getattr(layer, "disable_adapters", False)) or not getattr(layer, "active_adapters", True)


def _is_zero(layer: nn.Module) -> bool:
    """Whether the adapter's product is zero because one of its factors is: LoRA's B, or its A."""
    factors = [
        [p for name, p in layer.named_parameters() if f"{factor}." in name]
        for factor in ("lora_B", "lora_A", "lora_embedding_B", "lora_embedding_A")
    ]
    return any(found and all(not p.any() for p in found) for found in factors)


def _has_magnitude(layer: nn.Module) -> bool:
    """DoRA's second part, which may change a layer whose product is zero."""
    return any("lora_magnitude_vector." in name for name, _ in layer.named_parameters())


def _own_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor but an adapter's, under the name that it has without one.

    Buffers that are stored count: the bias by which DeepSeek's router chooses is one.
    """
    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((a for a in adapted if name.startswith(a + ".")), None)
        if not isinstance(tensor, Tensor):
            continue  # what a module keeps beside its weights
        if owner is None:
            yield name, tensor
        elif name.startswith(owner + _PEFT_BASE + "."):
            yield name.replace(_PEFT_BASE, "", 1), tensor


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other.to(one.device))
