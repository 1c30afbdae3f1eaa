"""PEFT adapters: put on a model unmerged, over the very weights that the base holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from lazarus.errors import AdapterError, MissingPackageError, ModelError, WeightsError
from lazarus.models.faults import one_line, translated
from lazarus.models.reference import Source, adapter_settings

WEIGHTS = "adapter_model.safetensors"
_STARTS = {"true", "false", "gaussian", "eva", "orthogonal"}
"""how a LoRA may have begun without the weights of its model being changed"""
_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)")


def share_storage(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights: new Parameters, the same data.

    The Parameters must be new: PEFT changes `requires_grad` and replaces modules, and neither may
    reach the base. A quantised one has a class of its own, with more than data in it, and nothing to
    train: both trees hold it. Only bitsandbytes' 8-bit ones are copied, because they hand their scales
    over to the first tree that runs. So are all weights of a model that rescales them when it first runs
    (RWKV): it would do so once for each tree.
    """
    if any(hasattr(module, "layers_are_rescaled") for module in model.modules()):
        return copy.deepcopy(model)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False) if type(p) is nn.Parameter else p
        for p in model.parameters()
        if not hasattr(p, "SCB")
    }
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def put_on(model: PreTrainedModel, adapter: Source) -> tuple[PreTrainedModel, str]:
    """Inject an adapter into `model`, unmerged; returns the model and the adapter's type.

    Raises:
        AdapterError: it does not fit this model, or works by virtual tokens instead of weights.
        MissingPackageError: PEFT is not installed.
        WeightsError: its weights are pickled.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"{adapter.name}: an adapter needs the package peft. Install it with "
            "`pip install 'lazarus-introspect[adapters]'`."
        ) from error
    settings = adapter_settings(adapter)
    weights = adapter.file(WEIGHTS)
    if weights is None:
        raise WeightsError(
            f"{adapter.name}: no adapter_model.safetensors there. Pickled adapters (.bin) can run "
            "code when they are read and are refused: save it again as safetensors."
        )
    _check_type(peft, adapter, settings.get("peft_type"))
    with _fitted(adapter, model), translated(adapter.name):
        wrapped, loaded = _inject(peft, model, adapter, str(Path(weights).parent))
    unplaced = [*loaded.missing_keys, *loaded.unexpected_keys]
    if unplaced:
        raise AdapterError(
            f"{adapter.name} does not fit {type(model).__name__}: {len(unplaced)} of its tensors have "
            f"no counterpart, first {unplaced[0]}. Put it on the model that it was trained on."
        )
    return wrapped.get_base_model().eval(), str(settings.get("peft_type"))


def _check_type(peft: Any, adapter: Source, kind: object) -> None:
    if kind not in list(peft.PeftType):
        raise AdapterError(
            f"{adapter.name}: adapter_config.json names the peft_type {kind!r}, which this "
            "version of peft does not know. Check it, or upgrade peft."
        )


def _inject(peft: Any, model: PreTrainedModel, adapter: Source, folder: str) -> tuple[Any, Any]:
    config = peft.PeftConfig.from_pretrained(folder)
    refuse_virtual(adapter.name, config)
    config.inference_mode = True
    if str(getattr(config, "init_lora_weights", "")).lower() == "olora":
        # PEFT takes OLoRA's start off the weights in place: not off those that the base shares.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    wrapped = peft.PeftModel(model, config, autocast_adapter_dtype=False)
    brought = _keys(Path(folder) / WEIGHTS)
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):  # tied ones have two names
        if name in brought:  # an embedding or a bias of the model itself, which the base shares
            parameter.data = parameter.data.clone()
    # load_adapter, not from_pretrained: it says which keys were missing instead of warning.
    device = str(model.device)
    loaded = wrapped.load_adapter(folder, "default", torch_device=device, autocast_adapter_dtype=False)
    return wrapped, loaded


def _keys(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as tensors:
        return set(tensors.keys())


def rewriting_start(settings: Mapping[str, object]) -> str | None:
    """How a LoRA began, where that was taken off the weights of its model (PiSSA, OLoRA); None elsewhere."""
    start = str(settings.get("init_lora_weights", True))
    return None if start.lower() in _STARTS else start


def refuse_virtual(name: str, config: Any) -> None:
    """Refuse an adapter that does not act by weights, on every token alike.

    Raises:
        AdapterError: it adds virtual tokens, or waits for tokens of its own.
    """
    if config.is_prompt_learning:
        raise AdapterError(
            f"{name}: a {config.peft_type.value} adapter adds virtual tokens, so the two "
            "models would not read the same ones. Adapters of weights (LoRA and its kin) work."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise AdapterError(
            f"{name}: an activated LoRA acts only after its invocation tokens, and the rest of the time "
            "its model is the base. Adapters that act on every token (LoRA and its kin) work."
        )


@contextmanager
def _fitted(adapter: Source, model: PreTrainedModel) -> Iterator[None]:
    """What goes wrong inside is the fit of the adapter, unless its file or a package is at fault."""
    try:
        yield
    except ModelError as error:
        fault = error.__cause__
        if fault is None or isinstance(fault, SafetensorError | ImportError):
            raise
        raise AdapterError(
            f"{adapter.name} does not fit {type(model).__name__}: {_misfit(fault)}. Put it on the "
            "model that it was trained on."
        ) from error


def _misfit(fault: BaseException) -> str:
    """The first tensor of another shape, out of the page that torch writes about all of them."""
    text = one_line(fault)
    if found := _SIZE_MISMATCH.search(text):
        tensor, theirs, ours = found.groups()
        return f"its {tensor} has the shape {theirs}, and the model has {ours} there"
    return text[:400]
