"""Loading: weights in memory for what MODEL names, each set of weights once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus import _transformers
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.messages import option
from lazarus.models.adapter_files import files_of_adapter
from lazarus.models.adapters import Adapted, put_all_on, share_storage
from lazarus.models.anatomy import dissect
from lazarus.models.checkpoint import Conversion, build_empty, find_files
from lazarus.models.design import same_config
from lazarus.models.faults import translated
from lazarus.models.formats import refuse_empty
from lazarus.models.gguf.tensors import load as load_gguf
from lazarus.models.loaded import LoadedModel
from lazarus.models.opening import LoadOptions, Opened, open_to_load, stored_dtype, stored_weights
from lazarus.models.pager import Pager
from lazarus.models.reference import ModelReference, Source, adapter_base
from lazarus.models.sharing import load_over
from lazarus.models.underneath import adapter_of, note_base, source_under
from lazarus.models.whole import is_hooked, run_once_whole
from lazarus.models.wrappers import refuse_unmerged
from lazarus.notes import Notes


@dataclass
class Weights:
    """A checkpoint as it was loaded, before any adapter."""

    opened: Opened
    model: PreTrainedModel
    report: dict[str, Any]
    """transformers' account of what is missing, and of what has no place"""
    notes: Notes = field(default_factory=Notes)
    pager: Pager | None = None
    is_changed: bool = False
    """whether its first pass may have made other parameters of those that were loaded"""

    @property
    def source(self) -> Source:
        """Return where it was loaded from."""
        return self.opened.source


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
    weights = load_base(base, options)
    announce("finetuned", finetuned.name)
    return load_beside(base, weights, finetuned, options)


def load_base(base: ModelReference, options: LoadOptions) -> Weights:
    """Load the checkpoint that base stands on.

    Raises:
        ModelError: it cannot be loaded; the subclass and the message say why.
    """
    source = base.model or adapter_base(adapter_of(base))
    return _load(open_to_load(source, options), options)


def load_beside(
    base: ModelReference, weights: Weights, finetuned: ModelReference, options: LoadOptions
) -> tuple[LoadedModel, LoadedModel]:
    """Load a model beside base, which is in memory already, over its weights where they are common.

    Where base has an adapter, or another kernel of attention is needed, base's weights are changed by this.

    Raises:
        ModelError: it cannot be loaded; the subclass and the message say why.
    """
    finetuned_source = source_under(finetuned, base)
    # Storage is shared between the bare models; `finish` puts adapters on at the end.
    if finetuned_source.place == weights.source.place:
        opened = replace(weights.opened, source=finetuned_source)
        other = Weights(opened, share_storage(weights.model), weights.report, Notes(weights.notes))
    else:
        opened = open_to_load(finetuned_source, options)
        other = _load_over(weights, opened, options) or _load(opened, options)
    same_attention(weights.model, other.model, weights.notes)
    return finish(base, weights, options), finish(finetuned, other, options)


def load_one(reference: ModelReference, options: LoadOptions) -> LoadedModel:
    """Load one model by itself; an adapter alone runs on the model that it names.

    Raises:
        ModelError: it cannot be loaded.
    """
    source = reference.model or adapter_base(adapter_of(reference))
    return finish(reference, _load(open_to_load(source, options), options), options)


def _load(opened: Opened, options: LoadOptions) -> Weights:
    """Load one checkpoint in evaluation mode, refusing one whose weights are not all there."""
    kind = _class_to_convert(opened)
    weights = _load_by_transformers(opened, options) if kind is None else _convert(opened, kind, options)
    check_report(weights, options)
    model, stack = weights.model, dissect(weights.model, options.layers_path).stack
    # Before the pass, because a hook that makes weights ready may take itself off.
    weights.is_changed = is_hooked(model, stack)
    run_once_whole(model, stack, opened.source.name, weights.notes)
    model.requires_grad_(requires_grad=False)  # what a quantiser has unpacked is new
    return weights


def _class_to_convert(opened: Opened) -> type[PreTrainedModel] | None:
    """Return the class whose parameters are made here of what is stored; None for `from_pretrained`.

    `from_pretrained` knows quantisers and models with code of their own. It would misread a checkpoint whose
    names carry a wrapper's prefix, whose file of weights was named, or beside which there is an adapter: it
    would put that on.

    Raises:
        UnsupportedModelError: only `from_pretrained` can load it, and would misread it.
    """
    source = opened.source
    if opened.gguf is not None:
        return None
    kind: type[PreTrainedModel] | None = _transformers.registered_class(opened.model_class, opened.config)
    if kind is not None and not opened.quantised:
        return kind
    if (
        source.weights_file is not None
        or source.file("adapter_config.json") is not None
        or opened.codes is not None
    ):
        raise UnsupportedModelError(
            f"{source.name}: a {'quantised model' if opened.quantised else 'model with its own code'} is "
            "read from a folder that holds nothing else. Move it into a folder of its own."
        )
    return None


def _convert(opened: Opened, kind: type[PreTrainedModel], options: LoadOptions) -> Weights:
    """Make a model of what is stored, tensor by tensor, as a model that is read block by block is made."""
    source = opened.source
    with translated(source.name):
        model, conversion = build(opened, kind, options)
        report = conversion.finish(model, conversion.convert(model, conversion.stored, shows_bar=True))
    weights = Weights(opened, model.eval().requires_grad_(requires_grad=False), report)
    conversion.wrappers.note(source.name, conversion.stored, weights.notes)
    return weights


def _load_by_transformers(opened: Opened, options: LoadOptions) -> Weights:
    """Load a checkpoint by `from_pretrained`, or a GGUF file by its rules."""
    source = opened.source
    arguments = source.where(trust_remote_code=options.trust_remote_code)
    if options.device.type != "cpu":
        arguments["device_map"] = {"": options.device}
    if opened.left_over is not None:
        # `from_pretrained` would read config.json again, with the claim that is not true.
        arguments["config"] = opened.config
    with translated(source.name), _transformers.BUILDING:
        if opened.gguf is not None:
            model, report = load_gguf(opened.gguf, opened.model_class, options.dtype, options.device)
        else:
            model, report = opened.model_class.from_pretrained(
                source.path,
                dtype="auto" if opened.quantised or options.dtype is None else options.dtype,
                # a pickled file can run code when it is read
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them; transformers' own error does not
                **arguments,
            )
    _unmap(model)
    weights = Weights(opened, model.eval().requires_grad_(requires_grad=False), report)
    if opened.quantised and options.dtype is not None:
        weights.notes.add(
            "dtype-not-applied",
            f"{source.name} is quantised and runs in its own type: {option('dtype')} did not apply to it",
            model=source.name,
        )
    return weights


def _unmap(model: PreTrainedModel) -> None:
    """Take a model's tensors off the files that they are mapped from.

    A file that is cut short while it is mapped kills the process that looks at it, without a word.
    """
    memory: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None:
            own = memory.setdefault(tensor.data_ptr(), tensor.data.clone())
            tensor.data = own


def build(
    opened: Opened, kind: type[PreTrainedModel], options: LoadOptions
) -> tuple[PreTrainedModel, Conversion]:
    """Build a checkpoint's model empty, and find out which stored tensors make which of its parameters."""
    files = find_files(opened.source, opened.config, opened.model_class)
    # A model takes its configuration for its own and writes into it.
    config = copy.deepcopy(opened.config)
    model = build_empty(kind, config, files, "auto" if options.dtype is None else options.dtype)
    model.config.name_or_path = model.name_or_path = opened.source.path
    return model, Conversion(model, stored_weights(opened), options.device)


def _load_over(base: Weights, opened: Opened, options: LoadOptions) -> Weights | None:
    """Load a checkpoint over base's weights where both hold some alike; None where it must be by itself."""
    ours = base.opened
    if (
        # its weights may no longer be those that its files hold
        base.is_changed
        or ours.source.gguf_file
        or opened.source.gguf_file
        or ours.quantised
        or opened.quantised
        or ours.model_class is not opened.model_class
        or not same_config(ours.config, opened.config)
        # without --dtype, the configuration alone says whether both are stored in one dtype
        or (options.dtype is None and (ours.config.dtype is None or ours.config.dtype != opened.config.dtype))
    ):
        return None
    with translated(opened.source.name):
        model = load_over(base.model, stored_weights(ours), stored_weights(opened), options.device)
    if model is None:
        return None
    model.config.name_or_path = model.name_or_path = opened.source.path
    # Keys and shapes are base's, and so is what transformers said of them.
    weights = Weights(opened, model, base.report)
    check_report(weights, options)
    return weights


def check_report(weights: Weights, options: LoadOptions) -> None:
    """Refuse a model that transformers filled up with random numbers; note what plays no part.

    Raises:
        WeightsError: tensors that are needed are missing, or have another shape.
    """
    source, model, report, notes = weights.source, weights.model, weights.report, weights.notes
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    needed = sorted(_needed_keys(model, options).intersection(missing)) if missing else []
    if needed:
        refuse_unmerged(source.name, unexpected)
        raise WeightsError(
            f"{source.name}: missing tensors of {type(model).__name__}: {len(needed)}, first "
            f"{needed[0]}. The checkpoint is incomplete or of another class: fetch it again."
        )
    refuse_empty(source.name, sorted(name for name, stored, _ in report["mismatched_keys"] if 0 in stored))
    if report["mismatched_keys"]:
        raise other_shape(source, *min(report["mismatched_keys"]))
    if missing:
        notes.add(
            "missing-tensors",
            f"{source.name}: {len(missing)} tensors that play no part in the comparison are missing, "
            f"first {missing[0]}",
            model=source.name,
        )
    if unexpected:
        notes.add(
            "unplaced-tensors",
            f"{source.name}: {len(unexpected)} tensors of the checkpoint have no place in "
            f"{type(model).__name__}, first {unexpected[0]}; they were left out",
            model=source.name,
        )


def other_shape(source: Source, name: str, stored: Sequence[int], configured: Sequence[int]) -> WeightsError:
    """An error on a tensor that has another shape than the configuration asks for."""
    if source.gguf_file:
        asks, remedy = (
            "its metadata asks",
            "Metadata and tensors are not of one model: fetch or convert it again.",
        )
    else:
        asks, remedy = "config.json asks", "Weights and configuration are not of one model: fetch both again."
    shapes = f"has the shape {list(stored)}, and {asks} for {list(configured)}"
    return WeightsError(f"{source.name}: {name} {shapes}. {remedy}")


def _needed_keys(model: PreTrainedModel, options: LoadOptions) -> set[str]:
    """Return the names of the tensors of the text stack and of the LM head."""
    stack = dissect(model, options.layers_path).stack
    needed = _tensors(stack) | _tensors(model.get_output_embeddings())
    needed -= _tensors(getattr(stack, "pooler", None))  # it only reads the last hidden states
    # A tied tensor has several names, and the report may have any of them.
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in named if id(tensor) in needed}


def _tensors(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(t) for t in [*module.parameters(), *module.buffers()]}


def same_attention(base: PreTrainedModel, finetuned: PreTrainedModel, notes: Notes) -> None:
    """Give both one implementation of attention: two kernels differ by more than the noise."""
    ours, theirs = (model.config._attn_implementation for model in (base, finetuned))
    if ours == theirs:
        return
    for model in (base, finetuned):
        model.set_attn_implementation("eager")
    told = f"both ran with eager attention: left alone, base takes {ours} and fine-tuned {theirs}"
    notes.add("eager-attention", told)


def finish(reference: ModelReference, weights: Weights, options: LoadOptions) -> LoadedModel:
    """Put the adapter on, if there is one, and name the parts."""
    notes, sources, files = Notes(), [weights.source], weights.opened.files
    weights.opened.note(notes)
    notes.extend(weights.notes)
    adapted = Adapted(weights.model, "", {})
    for adapter in reference.adapters:  # before they are read
        files = files.joined(files_of_adapter(adapter))
    if reference.adapters:
        adapted = put_all_on(weights.model, reference.adapters, notes)
        for each in reference.adapters:
            each.note(notes)
            note_base(each, weights.source, notes)
        sources = [*reversed(reference.adapters), *sources]
    anatomy = dissect(adapted.model, options.layers_path)
    anatomy.note(reference.name, notes)
    return LoadedModel(
        name=reference.name,
        kind="adapter" if reference.adapters else weights.source.kind,
        model=adapted.model,
        anatomy=anatomy,
        source=weights.source,
        tokenizer_sources=tuple(sources),
        adapter=adapted.description or None,
        left_out=adapted.left_out,
        revision=weights.source.revision,
        stored_dtype=stored_dtype(weights.opened),
        codes=weights.opened.codes,
        pager=weights.pager,
        untaken=weights.opened.untaken,
        missing=frozenset(weights.report["missing_keys"]),
        unread=(*weights.opened.contents.unread, *adapted.unread),
        files=files,
        notes=tuple(notes),
    )
