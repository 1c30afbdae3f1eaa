"""From what MODEL names to weights in memory, each set of weights once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from lazarus.errors import (
    AdapterError,
    MissingPackageError,
    UnsupportedModelError,
    WeightsError,
)
from lazarus.models.adapters import put_on, refuse_virtual, share_storage
from lazarus.models.anatomy import Anatomy, dissect
from lazarus.models.faults import translated
from lazarus.models.reference import ModelReference, Source, adapter_base, adapter_settings

_SAFETENSORS_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LoadOptions:
    """How to load: `dtype` is None for the stored one."""

    dtype: torch.dtype | None
    device: torch.device
    trust_remote_code: bool = False
    layers_path: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its parts named."""

    name: str
    kind: Literal["hub", "folder", "gguf", "adapter", "loaded"]
    model: PreTrainedModel
    anatomy: Anatomy
    source: Source | None = None
    tokenizer_sources: tuple[Source, ...] = ()
    adapter: str | None = None
    revision: str | None = None
    stored_dtype: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def run_dtype(self) -> str:
        """The type in which it runs, such as `float32`."""
        return str(self.model.dtype).removeprefix("torch.")


@dataclass
class _Weights:
    """A checkpoint as it was loaded, before any adapter."""

    source: Source
    model: PreTrainedModel
    notes: list[str] = field(default_factory=list)


def load_pair(
    base: ModelReference,
    finetuned: ModelReference,
    options: LoadOptions,
    announce: Callable[[Literal["base", "finetuned"], str], None],
) -> tuple[LoadedModel, LoadedModel]:
    """Load both models; where both stand on the same checkpoint, its weights are in memory once.

    `announce` is told the role and the name of each model before it is loaded.

    Raises:
        ModelError: one of them cannot be loaded; the subclass and the message say why.
    """
    announce("base", base.name)
    base_source = base.model or adapter_base(_adapter_of(base))
    weights = _load(base_source, options)
    announce("finetuned", finetuned.name)
    finetuned_source = _source_under(finetuned, base)
    if finetuned_source.place == base_source.place:
        other = _Weights(finetuned_source, share_storage(weights.model), list(weights.notes))
    else:
        other = _load(finetuned_source, options)
    weights.notes += _same_attention(weights.model, other.model)
    return _finish(base, weights, options), _finish(finetuned, other, options)


def load_one(reference: ModelReference, options: LoadOptions) -> LoadedModel:
    """Load one model by itself; an adapter alone runs on the model that it names.

    Raises:
        ModelError: it cannot be loaded.
    """
    source = reference.model or adapter_base(_adapter_of(reference))
    return _finish(reference, _load(source, options), options)


def wrap_model(model: nn.Module, name: str, layers_path: str | None = None) -> LoadedModel:
    """A model that the caller has in memory, an adapter's wrapper taken off its outside.

    One in training mode runs as a second tree over the same weights, so that it stays as it is.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name}: {type(model).__name__} is not a transformers model. Give an id, a path, or a "
            "PreTrainedModel."
        )
    adapter, notes = _adapters_in(model, inner, name)
    if any(module.training for module in inner.modules()):
        inner = share_storage(inner).eval()
    anatomy = dissect(inner, layers_path)
    dtype = str(inner.dtype).removeprefix("torch.")
    notes += [f"{name}: {note}" for note in anatomy.notes]
    return LoadedModel(
        name, "loaded", inner, anatomy, adapter=adapter, stored_dtype=dtype, notes=tuple(notes)
    )


def _adapters_in(model: Any, inner: PreTrainedModel, name: str) -> tuple[str | None, list[str]]:
    """The adapters that run with a model in memory, and a note where PEFT put them into its base."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    active = configs if inner is model else model.active_adapters
    for each in active:
        refuse_virtual(name, configs[each])
    told = ", ".join(f"{each} ({configs[each].peft_type.value})" for each in active) or None
    if told is None or inner is not model:
        return told, []
    return told, [f"{name} runs with the adapter that is in it: {told}"]


def _adapter_of(reference: ModelReference) -> Source:
    assert reference.adapter is not None, reference
    return reference.adapter


def _source_under(finetuned: ModelReference, base: ModelReference) -> Source:
    """The checkpoint that FINETUNED stands on: its own, or BASE's under an adapter alone."""
    if finetuned.model is not None:
        return finetuned.model
    if base.model is None or base.adapter is not None:
        raise AdapterError(
            f"{finetuned.name}: an adapter alone runs on top of BASE, and BASE ({base.name}) is an "
            f"adapter too. Say which model it belongs to: MODEL+{finetuned.name}"
        )
    return base.model


def _other_base(adapter: Source, base: Source) -> list[str]:
    """A note, if the adapter names another base than the one that it is on; any spelling will do."""
    named = str(adapter_settings(adapter).get("base_model_name_or_path") or "")
    if not named or os.path.realpath(os.path.expanduser(named)) == os.path.realpath(base.place[0]):
        return []
    return [f"{adapter.name} names {named} as its base; it was put on {base.name}"]


def _load(source: Source, options: LoadOptions) -> _Weights:
    """Load one checkpoint in evaluation mode, refusing one whose weights are not all there."""
    if source.gguf_file:
        _require_gguf(source)
    where: dict[str, Any] = {
        "revision": source.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    if source.subfolder:
        where["subfolder"] = source.subfolder
    if source.gguf_file:
        where["gguf_file"] = source.gguf_file
    with translated(source.name):
        config = AutoConfig.from_pretrained(source.path, **where)
        head = _head_class(config)
        if options.device.type != "cpu":
            where["device_map"] = {"": options.device}
        quantised = _is_quantised(source, config)
        model, report = head.from_pretrained(
            source.path,
            dtype="auto" if quantised or options.dtype is None else options.dtype,
            use_safetensors=None if source.gguf_file else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them; transformers' own error does not
            **where,
        )
    weights = _Weights(source, model.eval().requires_grad_(requires_grad=False))
    if quantised and options.dtype is not None:
        weights.notes.append(
            f"{source.name} is quantised and runs in its own type: --dtype did not apply to it"
        )
    weights.notes += _check_report(source, model, report, options)
    return weights


def _is_quantised(source: Source, config: Any) -> bool:
    """transformers reads a quantisation that it does not know as plain numbers, with a warning."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None and not AutoHfQuantizer.supports_quant_method(settings):
        raise UnsupportedModelError(
            f"{source.name}: its weights are quantised by {settings.get('quant_method')!r}, which "
            "transformers cannot read. Use an unquantised checkpoint."
        )
    return settings is not None


def _require_gguf(source: Source) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"{source.name}: a GGUF file needs the package gguf. Install it with "
            "`pip install 'lazarus-introspect[gguf]'`."
        ) from error


def _head_class(config: Any) -> Any:
    """The checkpoint's own class, so that every one of its tensors has a place."""
    for name in config.architectures or ():
        if (own := getattr(transformers, name, None)) is not None:
            return own
    remote = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    return AutoModel


def _check_report(
    source: Source, model: PreTrainedModel, report: dict[str, Any], options: LoadOptions
) -> list[str]:
    """transformers fills missing tensors with random numbers and warns; that is no model to compare."""
    missing = sorted(report["missing_keys"])
    needed = sorted(_needed_keys(model, options).intersection(missing)) if missing else []
    if needed:
        raise WeightsError(
            f"{source.name}: missing tensors of {type(model).__name__}: {len(needed)}, first "
            f"{needed[0]}. The checkpoint is incomplete or of another class: fetch it again."
        )
    if report["mismatched_keys"]:
        name, stored, configured = min(report["mismatched_keys"])
        raise WeightsError(
            f"{source.name}: {name} has the shape {list(stored)}, and config.json asks for "
            f"{list(configured)}. Weights and configuration are not of one model: fetch both again."
        )
    notes = []
    if missing:
        notes.append(
            f"{source.name}: {len(missing)} tensors that play no part in the comparison are missing, "
            f"first {missing[0]}"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        notes.append(
            f"{source.name}: {len(unexpected)} tensors of the checkpoint have no place in "
            f"{type(model).__name__}, first {unexpected[0]}; they were left out"
        )
    return notes


def _needed_keys(model: PreTrainedModel, options: LoadOptions) -> set[str]:
    """The names of the tensors of the text stack and of the head that reads it."""
    stack = dissect(model, options.layers_path).stack
    needed = _tensors(stack) | _tensors(model.get_output_embeddings())
    needed -= _tensors(getattr(stack, "pooler", None))  # it only reads the last states
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in named if id(tensor) in needed}


def _tensors(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(t) for t in [*module.parameters(), *module.buffers()]}


def _same_attention(base: PreTrainedModel, finetuned: PreTrainedModel) -> list[str]:
    """One attention implementation for both: two kernels differ by more than the noise."""
    ours, theirs = (model.config._attn_implementation for model in (base, finetuned))
    if ours == theirs:
        return []
    for model in (base, finetuned):
        model.set_attn_implementation("eager")
    return [f"both ran with eager attention: left alone, base takes {ours} and fine-tuned {theirs}"]


def _finish(reference: ModelReference, weights: _Weights, options: LoadOptions) -> LoadedModel:
    model, adapter, notes = weights.model, None, list(weights.notes)
    sources = [weights.source]
    if reference.adapter is not None:
        model, kind = put_on(model, reference.adapter)
        commit = f", commit {reference.adapter.revision}" if reference.adapter.revision else ""
        adapter = f"{reference.adapter.name} ({kind}{commit})"
        notes += _other_base(reference.adapter, weights.source)
        sources.insert(0, reference.adapter)
    anatomy = dissect(model, options.layers_path)
    return LoadedModel(
        name=reference.name,
        kind="adapter" if adapter else weights.source.kind,
        model=model,
        anatomy=anatomy,
        source=weights.source,
        tokenizer_sources=tuple(sources),
        adapter=adapter,
        revision=weights.source.revision,
        stored_dtype=_stored_dtype(weights.source),
        notes=(*notes, *(f"{reference.name}: {note}" for note in anatomy.notes)),
    )


def _stored_dtype(source: Source) -> str | None:
    """The type of most of the stored numbers, read from the files' headers."""
    counts: Counter[str] = Counter()
    if source.gguf_file:
        import gguf

        for tensor in gguf.GGUFReader(Path(source.path) / source.gguf_file).tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    elif listed := source.file("config.json"):
        for path in Path(listed).parent.glob("*.safetensors"):
            counts += _dtypes_in(path)
    return counts.most_common(1)[0][0] if counts else None


def _dtypes_in(path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                part = tensors.get_slice(key)
                counts[_SAFETENSORS_NAMES.get(part.get_dtype(), part.get_dtype())] += torch.Size(
                    part.get_shape()
                ).numel()
    except SafetensorError:  # not one of the files that were loaded: those were readable
        return Counter()
    return counts
