"""PEFT adapters: put on a model unmerged, over the very weights that the base holds."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.errors import AdapterError, MissingPackageError, ModelError, WeightsError
from lazarus.models.faults import one_line, translated
from lazarus.models.reference import Source, adapter_settings

WEIGHTS = "adapter_model.safetensors"
_STARTS = {"true", "false", "gaussian", "eva", "orthogonal"}
"""how a LoRA may have begun without the weights of its model being changed"""
_OUTER = "base_model.model."
_TUNER = (
    r"\.(?:lora_|ia3_|hada_|lokr_|vera_|boft_|oft_|adaption_|ln_tuning|trainable_tokens|token_adapter"
    r"|base_layer)"
)
_ADDED = re.compile(_TUNER + r"|\.(?=[^.]+$)")
"""what PEFT adds to the path of a module, or the name of one of its own tensors"""
_TABLE = re.compile(r"\b(embed_tokens|wte|word_embeddings|lm_head|embed_out)(\.base_layer)?\.weight$")
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


def put_all_on(
    model: PreTrainedModel, adapters: Sequence[Source], notes: list[str]
) -> tuple[PreTrainedModel, list[str]]:
    """Inject adapters into `model`, unmerged, one on top of the other; return the model and their types.

    The updates of several LoRAs add up: W + D₁ + D₂ is what merging the first and then the second gives. What
    is left out of an adapter is noted.

    Raises:
        AdapterError: one does not fit, or several are given and one of them is no LoRA.
    """
    kinds = []
    for number, adapter in enumerate(adapters):
        kind = str(adapter_settings(adapter).get("peft_type"))
        if len(adapters) > 1 and (kind != "LORA" or adapter_settings(adapter).get("use_dora")):
            raise AdapterError(
                f"{adapter.name}: an adapter of the type {'DoRA' if kind == 'LORA' else kind} cannot be "
                "put on another: its change depends on the weights below it. Merge the first, and name the "
                "merged model."
            )
        model, found = put_on(model, adapter, notes, name="default" if number == 0 else f"adapter-{number}")
        kinds.append(found)
    if len(adapters) > 1:
        names = ["default", *(f"adapter-{number}" for number in range(1, len(adapters)))]
        for module in model.modules():
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                module.set_adapter(
                    [name for name in names if name in module.lora_A or name in module.lora_embedding_A]
                )
    return model, kinds


def put_on(
    model: PreTrainedModel, adapter: Source, notes: list[str] | None = None, name: str = "default"
) -> tuple[PreTrainedModel, str]:
    """Inject an adapter into `model`, unmerged; return the model and the adapter's type.

    An adapter that was trained on another class over the same blocks, such as a classifier, is put on the
    blocks; what of it the model has no module for, such as a score head, is left out, with a note.

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
        wrapped, loaded, left_out = _inject(peft, model, adapter, (str(Path(weights).parent), name))
    unplaced = [*loaded.missing_keys, *loaded.unexpected_keys]
    if left_out and notes is not None:
        notes.append(
            f"{adapter.name} was trained as {settings.get('task_type') or 'another class'}: {len(left_out)} "
            f"of its tensors, first {left_out[0]}, have no module in {type(model).__name__} and were left out"
        )
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


def _inject(
    peft: Any, model: PreTrainedModel, adapter: Source, place: tuple[str, str]
) -> tuple[Any, Any, list[str]]:
    """The wrapped model, PEFT's report of what had no place, and the tensors that were left out."""
    folder, name = place
    config = peft.PeftConfig.from_pretrained(folder)
    refuse_virtual(adapter.name, config)
    config.inference_mode = True
    if str(getattr(config, "init_lora_weights", "")).lower() == "olora":
        # PEFT takes OLoRA's start off the weights in place: not off those that the base shares.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    stored = load_file(Path(folder) / WEIGHTS, device=str(model.device))
    _resize(model, adapter, stored)
    moved, left_out = _onto(model, stored)
    if left_out and getattr(config, "modules_to_save", None):
        kept = [
            each for each in config.modules_to_save if any(n.endswith(each) for n, _ in model.named_modules())
        ]
        config.modules_to_save = kept or None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one adapter is on another
        wrapped = peft.PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
    for key, parameter in wrapped.named_parameters(remove_duplicate=False):  # tied ones have two names
        if key in moved:  # an embedding or a bias of the model itself, which the base shares
            parameter.data = parameter.data.clone()
    # Neither is from_pretrained, which warns of keys that are missing instead of saying which.
    if moved.keys() == stored.keys():
        device = str(model.device)
        return (
            wrapped,
            wrapped.load_adapter(folder, name, torch_device=device, autocast_adapter_dtype=False),
            [],
        )
    loaded = peft.set_peft_model_state_dict(wrapped, moved, adapter_name=name)
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    loaded.missing_keys[:] = [key for key in loaded.missing_keys if prefix in key and f".{name}" in key]
    return wrapped, loaded, left_out


def _onto(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """An adapter's tensors under the names that they have on this model, and those that it has no module for.

    Of a class over the same blocks, the names differ by a prefix: `layers.0` and `model.layers.0`.
    """
    modules = {name for name, _ in model.named_modules()}
    inner = model.base_model_prefix
    moved, left_out = {}, []
    for key, tensor in stored.items():
        if ".original_module." in key:
            continue  # the base's own, which PEFT saves with an embedding that was resized
        path = key.removeprefix(_OUTER).replace(".modules_to_save.", ".")
        module = _ADDED.split(path)[0]
        forms = [module, f"{inner}.{module}", module.removeprefix(f"{inner}.")]
        found = next((form for form in forms if form in modules), None)
        if found is None and not re.search(_TUNER, path):
            left_out.append(path)
            continue
        moved[_OUTER + path if found is None else _OUTER + found + path[len(module) :]] = tensor
    return moved, left_out


def _resize(model: PreTrainedModel, adapter: Source, stored: Mapping[str, Tensor]) -> None:
    """Give the model as many rows of the vocabulary as the adapter's embedding or LM head has."""
    table = model.get_input_embeddings()
    n_rows = {t.shape[0] for key, t in stored.items() if _TABLE.search(key)}
    n_rows |= {t.shape[1] for key, t in stored.items() if "lora_embedding_A" in key}
    if len(n_rows) != 1 or not isinstance(table, nn.Embedding) or n_rows == {table.num_embeddings}:
        return
    if any(not any(p.stride()) and p.numel() > 1 for p in model.parameters()):
        return  # weights that are not in memory have no rows to add to: PEFT says what does not fit
    model.resize_token_embeddings(n_rows.pop(), mean_resizing=False)


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
