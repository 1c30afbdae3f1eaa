"""PEFT adapters: put on a model unmerged, over the very weights that the base holds."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.blame import one_line
from lazarus.errors import AdapterError, MissingPackageError, ModelError
from lazarus.models.adapter_files import AdapterFiles, read_adapter
from lazarus.models.adapter_limits import check_sizes, patterns_within_time, reduce_names
from lazarus.models.contents import Unread
from lazarus.models.faults import translated
from lazarus.models.fitting import OUTER, Fit, adjust, find_fit, owner_of, resize
from lazarus.models.reference import Source, adapter_settings
from lazarus.notes import Notes

_STARTS = {"true", "false", "gaussian", "eva", "orthogonal"}
"""how a LoRA may have begun without the weights of its model being changed"""
_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)")


def share_storage(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second module tree over the same weights: new Parameters over the same data.

    The Parameters must be new: PEFT changes `requires_grad` and replaces modules, and neither may reach the
    base. A quantised Parameter has a class of its own, with more than data in it, and nothing to train: both
    trees hold the same object. Only the 8-bit ones of bitsandbytes are copied, because they hand their scales
    over to the first tree that runs. All weights are copied of a model that rescales them when it first runs
    (RWKV): it would rescale them once for each tree.
    """
    if any(hasattr(module, "layers_are_rescaled") for module in model.modules()):
        return copy.deepcopy(model)
    # deepcopy takes what is in the memo for a copy that was made already.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False) if type(p) is nn.Parameter else p
        for p in model.parameters()
        if not hasattr(p, "SCB")
    }
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Adapted:
    """A model with its adapters on it."""

    model: PreTrainedModel
    description: str
    """the adapters, each with its type and its commit"""
    left_out: Mapping[str, Tensor]
    """what has no place on the model, such as a score head, by the names that it had in training"""
    unread: tuple[Unread, ...] = ()
    """other weights in the folders of the adapters"""


def put_all_on(model: PreTrainedModel, adapters: Sequence[Source], notes: Notes) -> Adapted:
    """Inject adapters into `model`, unmerged, one on top of the other.

    The updates of several LoRAs add up: W + D₁ + D₂ is what merging the first and then the second gives.

    Raises:
        AdapterError: one does not fit, or several are given and one of them is no LoRA.
    """
    if len(adapters) > 1:
        _check_stack(adapters)
    names = ["default", *(f"adapter-{number}" for number in range(1, len(adapters)))]
    found = []
    for adapter, name in zip(adapters, names, strict=True):
        found.append(put_on(model, adapter, notes, name))
        model = found[-1].model
    for layer in model.modules() if len(adapters) > 1 else ():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            held = {*layer.lora_A, *layer.lora_embedding_A}
            # PEFT leaves one adapter active; a sum of several needs all that are on the layer.
            layer.set_adapter([name for name in names if name in held])
            layer.requires_grad_(False)  # which PEFT turned on again
    left_out = {path: tensor for each in found for path, tensor in each.left_out.items()}
    unread = tuple(other for each in found for other in each.unread)
    return Adapted(model, " + ".join(each.description for each in found), left_out, unread)


def put_on(model: PreTrainedModel, adapter: Source, notes: Notes, name: str = "default") -> Adapted:
    """Inject an adapter into `model`, unmerged, under a name.

    An adapter that was trained on another class over the same blocks, such as a classifier, is put on the
    blocks; what of it the model has no module for, such as a score head, is left out.

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
    kind = settings.get("peft_type")
    _check_type(peft, adapter, kind)
    files = read_adapter(adapter, model, notes)
    check_sizes(adapter.name, settings, [tuple(tensor.shape) for tensor in files.tensors.values()])
    fit = find_fit(adapter.name, model, files.tensors)
    _note_fit(adapter, model, fit, notes)
    with _fitted(adapter, model), translated(adapter.name), patterns_within_time(adapter.name):
        wrapped, report = _inject(peft, model, (adapter, name), (fit, files))
    _check_placed(adapter, model, report)
    commit = f", commit {adapter.revision}" if adapter.revision else ""
    left_out = {key.removeprefix(OUTER): files.tensors[key] for key in fit.left_out}
    description = f"{adapter.name} ({kind}{commit})"
    return Adapted(wrapped.get_base_model().eval(), description, left_out, files.unread)


def _check_stack(adapters: Sequence[Source]) -> None:
    """Refuse adapters of which one changes what another one finds."""
    for adapter in adapters:
        settings = adapter_settings(adapter)
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"{adapter.name}: an adapter of the type {kind} cannot be put on another: its change depends "
                "on the weights below it. Merge the first, and name the merged model."
            )


def _check_type(peft: Any, adapter: Source, kind: object) -> None:
    if kind not in list(peft.PeftType):
        raise AdapterError(
            f"{adapter.name}: adapter_config.json names the peft_type {kind!r:.60}, which this "
            "version of peft does not know. Check it, or upgrade peft."
        )


def _note_fit(adapter: Source, model: PreTrainedModel, fit: Fit, notes: Notes) -> None:
    """Note what of an adapter is left out, and what it takes to put it on."""
    if fit.left_out:
        task = adapter_settings(adapter).get("task_type")
        kind = f"as {task}" if task else "on another class of model"
        first = fit.left_out[0].removeprefix(OUTER)
        notes.add(
            "adapter-tensors",
            f"{adapter.name} was trained {kind}: {len(fit.left_out)} of its tensors, first {first}, have "
            f"no module in {type(model).__name__} and were left out",
            model=adapter.name,
        )
    if fit.n_rows is not None:
        notes.add(
            "resized-vocabulary",
            f"{adapter.name} was trained with a vocabulary of {fit.n_rows} rows: the model that it was put "
            f"on has {model.get_input_embeddings().num_embeddings}, and was resized to them",
            model=adapter.name,
        )


def _inject(
    peft: Any,
    model: PreTrainedModel,
    place: tuple[Source, str],
    found: tuple[Fit, AdapterFiles],
) -> tuple[Any, Any]:
    """The wrapped model, and PEFT's report of what is missing or has no place."""
    (adapter, name), (fit, files) = place, found
    config = peft.PeftConfig.from_pretrained(files.folder)
    refuse_virtual(adapter.name, config)
    # PEFT freezes what an adapter brings only in this mode.
    config.inference_mode = True
    if str(getattr(config, "init_lora_weights", "")).lower() == "olora":
        # PEFT takes OLoRA's start off float32 weights in place, and the base must keep its own.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if fit.n_rows is not None:
        resize(model, fit.n_rows)
    adjust(config, fit, (path for path, _ in model.named_modules()))
    reduce_names(config, (path for path, _ in model.named_modules()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one adapter is on another
        # By default PEFT would cast an adapter in float16 or bfloat16 to float32.
        wrapped = peft.PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
    moved = {fit.moved[key]: tensor for key, tensor in files.tensors.items() if key in fit.moved}
    for key, parameter in wrapped.named_parameters(remove_duplicate=False):  # tied ones have two names
        if key in moved:  # an embedding or a bias of the model itself, which the base shares
            parameter.data = parameter.data.clone()
    # Neither is from_pretrained, which warns of keys that are missing instead of saying which.
    if files.is_as_stored and moved.keys() == files.tensors.keys():
        # PEFT chooses a device by itself where none is given: a GPU, if there is one.
        device = str(model.device)
        report = wrapped.load_adapter(files.folder, name, torch_device=device, autocast_adapter_dtype=False)
        return wrapped, report
    report = peft.set_peft_model_state_dict(wrapped, moved, adapter_name=name)
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    # As `load_adapter` does it: the state dict of an adapter lacks all keys of its model. In place, because
    # the report is a named tuple.
    report.missing_keys[:] = [key for key in report.missing_keys if prefix in key and f".{name}" in key]
    return wrapped, report


def _check_placed(adapter: Source, model: PreTrainedModel, report: Any) -> None:
    """Refuse an adapter of which a tensor has no place, or that lacks one for a module it is put on."""
    kind = type(model).__name__
    modules = {path for path, _ in model.named_modules()}
    unnamed = [key for key in report.unexpected_keys if owner_of(key) in modules]
    if unnamed:
        raise AdapterError(
            f"{adapter.name}: {len(unnamed)} of its tensors, first {unnamed[0]}, act on modules that its "
            "adapter_config.json does not name (target_modules). Configuration and tensors are not of one "
            "adapter: fetch it again."
        )
    if report.unexpected_keys:
        raise AdapterError(
            f"{adapter.name} does not fit {kind}: {len(report.unexpected_keys)} of its tensors have no "
            f"counterpart, first {report.unexpected_keys[0]}. Put it on the model that it was trained on."
        )
    if report.missing_keys:
        raise AdapterError(
            f"{adapter.name} does not fit {kind}: it acts on modules there for which it has no tensors: "
            f"{len(report.missing_keys)} are missing, first {report.missing_keys[0]}. Put it on the model "
            "that it was trained on, or fetch it again if that is this one."
        )


def rewriting_start(settings: Mapping[str, object]) -> str | None:
    """Return how a LoRA began, where that was taken off the weights of its model (PiSSA, OLoRA).

    None elsewhere.
    """
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
    """Report what goes wrong inside as a misfit of the adapter, unless a file or a package is at fault."""
    try:
        yield
    except ModelError as error:
        fault = error.__cause__
        if fault is None or isinstance(fault, SafetensorError | ImportError):
            raise
        text = one_line(fault)
        # torch raises a RuntimeError on shapes; PEFT a ValueError on target modules, in several spellings.
        is_of_the_fit = isinstance(fault, RuntimeError) or "arget modules" in text or "arget_modules" in text
        if not is_of_the_fit:
            raise AdapterError(
                f"{adapter.name}: PEFT cannot use its adapter_config.json: {text[:400]}. Check the file, or "
                "fetch the adapter again."
            ) from error
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
