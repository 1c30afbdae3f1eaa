"""A model that the caller has in memory, as a loaded model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lazarus.errors import UnsupportedModelError
from lazarus.models.adapters import refuse_virtual, share_storage
from lazarus.models.anatomy import dissect
from lazarus.models.loaded import LoadedModel
from lazarus.models.whole import run_once_whole
from lazarus.notes import Notes


def wrap_model(model: nn.Module, name: str, layers_path: str | None = None) -> LoadedModel:
    """Return a model that the caller has in memory as a loaded model, without PEFT's wrapper around it.

    A model in training mode is run as a second module tree over the same weights, so that it stays as it is.
    """
    notes = Notes()
    model = _unwrapped(model, name, notes)
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name}: {type(model).__name__} is not a transformers model. Give an id, a path, or a "
            "PreTrainedModel."
        )
    adapter = _adapters_in(model, inner, name, notes)
    if any(module.training for module in inner.modules()):
        inner = share_storage(inner).eval()
    anatomy = dissect(inner, layers_path)
    run_once_whole(inner, anatomy.stack, name, notes)
    dtype = str(inner.dtype).removeprefix("torch.")
    anatomy.note(name, notes)
    return LoadedModel(
        name, "loaded", inner, anatomy, adapter=adapter, stored_dtype=dtype, notes=tuple(notes)
    )


def _unwrapped(model: nn.Module, name: str, notes: Notes) -> nn.Module:
    """Return the model inside what torch.compile, or training in parallel, has put around it."""
    # Anything may be given here; what is no module at all is refused by the caller.
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        # `_modules`, not getattr: these wrappers hand every attribute on to the model inside. PEFT's has no
        # submodule of these names.
        inside = next(
            (model._modules[each] for each in ("_orig_mod", "module") if model._modules.get(each)), None
        )
        if inside is None:
            break
        told = f"{name}: taken out of its {type(model).__name__}, and run as it is inside"
        notes.add("unwrapped-model", told, model=name)
        model = inside
    return model


def _adapters_in(model: Any, inner: PreTrainedModel, name: str, notes: Notes) -> str | None:
    """Return the adapters that run with a model in memory; where PEFT put them into its base, note it."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    active = configs if inner is model else model.active_adapters
    for each in active:
        refuse_virtual(name, configs[each])
    told = ", ".join(f"{each} ({configs[each].peft_type.value})" for each in active) or None
    if told is not None and inner is model:
        notes.add("adapter-in-model", f"{name} runs with the adapter that is in it: {told}", model=name)
    return told
