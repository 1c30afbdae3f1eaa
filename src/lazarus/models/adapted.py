"""Adapters on a model: the model's own modules under them, and whether they change anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.models.equality import Equality, every, same_bits

_UNDER = ("base_layer", "original_module", "model")
"""Under which of these names a layer of PEFT's keeps the module that it was put around."""
_FACTORS = {"lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"}
_MAGNITUDE = "lora_magnitude_vector"


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that an adapter has put around modules of this one, or in their place."""
    return [layer for _, layer in _walk(module, "") if _is_adapters(layer)]


def own_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return what a model stores but for what an adapter brought, by the names that it has without one.

    Buffers that are stored count: the bias by which DeepSeek's router chooses is one. What a module keeps
    beside its tensors, its "extra state", may be of any type.
    """
    for path, module in _walk(model, ""):
        if not _is_adapters(module):
            stored: dict[str, Any] = {}
            # By torch's own rule of what is stored, of this module alone: `state_dict` goes into children.
            module._save_to_state_dict(stored, path, keep_vars=True)
            yield from stored.items()


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model that it does not store, as its configuration has made them."""
    return {
        f"{path}{name}": buffer
        for path, module in _walk(model, "")
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and not _is_adapters(module)
    }


def brought_state(model: nn.Module) -> dict[str, Any]:
    """Return what an adapter brought of what a model stores."""
    held = [value for _, value in own_state(model)]  # while they are compared, so that ids stay theirs
    own = {id(value) for value in held}
    return {name: v for name, v in model.state_dict(keep_vars=True).items() if id(v) not in own}


def is_off(layer: nn.Module) -> bool:
    """Return whether a layer of an adapter is switched off, or no adapter of it is active."""
    return bool(getattr(layer, "disable_adapters", False)) or not getattr(layer, "active_adapters", True)


def has_zero_product(layer: nn.Module) -> bool:
    """Return whether a layer is a LoRA whose product is zero in every active adapter, as before training."""
    parts = list(_active_parts(layer)) if hasattr(layer, "adapter_layer_names") else []
    return bool(parts) and all(_is_plain_lora(layer, *each) and _has_zero_factor(each[1]) for each in parts)


def adds_nothing(layer: nn.Module) -> bool | None:
    """Return whether a layer of an adapter gives what the module under it gives; None if that is not known.

    That is known of a LoRA with a product of zero, of factors of one, and of modules, or rows of one, that
    are still what they were copied from. A magnitude (DoRA) scales a layer anew and counts as a change.
    """
    if is_off(layer):
        return True
    if not hasattr(layer, "adapter_layer_names"):
        return None  # one that keeps its weights in a way of its own
    return every(_part_adds_nothing(layer, name, part) for name, part in _active_parts(layer))


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those in it, with their prefixes; of an adapter's layer, only what is under it."""
    if "token_adapter" in module._modules and _is_adapters(module):  # a wrapper around the layer itself
        yield from _walk(module.get_submodule("token_adapter"), path)
        return
    yield path, module
    if not _is_adapters(module):
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{path}{name}.")
    elif (under := _under(module)) is not None:
        # Without the name of the wrapper, so that paths are those of the model alone.
        yield from _walk(under, path)


def _is_adapters(module: nn.Module) -> bool:
    kind = type(module)
    return hasattr(kind, "adapter_layer_names") or kind.__module__.partition(".")[0] == "peft"


def _under(layer: nn.Module) -> nn.Module | None:
    """The module that a layer of an adapter was put around."""
    found = (layer._modules.get(name) for name in _UNDER)
    return next((module for module in found if module is not None), None)


def _active_parts(layer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each active adapter of a layer, and what it has there, by the names of PEFT's containers."""
    containers = {name: getattr(layer, name, None) for name in (*layer.adapter_layer_names, _MAGNITUDE)}
    for adapter in layer.active_adapters:
        part = {}
        for name, container in containers.items():
            if not isinstance(container, nn.ModuleDict | nn.ParameterDict | dict | None):
                part[name] = container
            elif container is not None and adapter in container:
                part[name] = container[adapter]
        yield adapter, part


def _part_adds_nothing(layer: Any, adapter: str, part: dict[str, Any]) -> bool | None:
    under: Any = _under(layer)
    if _MAGNITUDE in part:
        return False
    if not part:
        return True  # the adapter is not on this layer
    # A variant of LoRA may compute anything of its factors.
    if adapter in getattr(layer, "lora_variant", {}) or under is None:
        return None
    if part.keys() <= _FACTORS:
        return _has_zero_factor(part, layer.scaling[adapter])
    [value, *others] = part.values()
    if others:
        return None
    if "ia3_l" in part:
        return bool((value == 1).all())
    if "trainable_tokens_delta" in part:
        # PEFT stores whole rows under this name, not what is added to the old ones.
        rows = under.weight[torch.tensor(layer.token_indices[adapter])]
        return same_bits(value, rows)
    # A module of the same kind stands in for the one under it; of another kind, it does something with it.
    return Equality().same_module(value, under) if type(value) is type(under) else None


def _is_plain_lora(layer: Any, adapter: str, part: dict[str, Any]) -> bool:
    """Return whether an adapter adds a product to what a layer gives, and perhaps scales that (DoRA)."""
    is_variant = adapter in getattr(layer, "lora_variant", {}) and _MAGNITUDE not in part
    return part.keys() <= {*_FACTORS, _MAGNITUDE} and not is_variant


def _has_zero_factor(part: dict[str, Any], scaling: float = 1.0) -> bool | None:
    """Return whether one factor of a product is zero, and no bias is added to it.

    None where 0 meets NaN or ∞.

    The scaling is a factor of the product, and of the bias.
    """
    zero, biases = [], []
    for factor in (value for name, value in part.items() if name in _FACTORS):
        tensors = {"weight": factor} if isinstance(factor, Tensor) else dict(factor.named_parameters())
        if any(tensor.is_meta or not tensor.isfinite().all() for tensor in tensors.values()):
            return None
        zero.append(not any(tensor.any() for tensor in tensors.values()))
        biases += [tensor for name, tensor in tensors.items() if name.endswith("bias")]
    return scaling == 0 or (any(zero) and not any(bias.any() for bias in biases))
