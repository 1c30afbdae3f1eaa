"""A pair of models bigger than memory: built empty, and read block by block (pager.py does the reading)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lazarus import _transformers
from lazarus.errors import UnsupportedModelError
from lazarus.messages import option
from lazarus.models.adapter_files import WEIGHTS
from lazarus.models.adapters import rewriting_start, share_storage
from lazarus.models.anatomy import dissect
from lazarus.models.checkpoint import Conversion, find_files
from lazarus.models.faults import translated
from lazarus.models.fitting import find_fit
from lazarus.models.load import Weights, build, check_report, finish, same_attention
from lazarus.models.loaded import LoadedModel
from lazarus.models.opening import LoadOptions, Opened, open_checkpoint, open_to_load
from lazarus.models.pager import Pager
from lazarus.models.reference import ModelReference, Source, adapter_base, adapter_settings
from lazarus.models.stored import read_headers
from lazarus.models.underneath import adapter_of, source_under
from lazarus.notes import Notes

_ADAPTERS = {"LORA", "IA3", "LOHA", "LOKR"}


def load_paged(
    base: ModelReference,
    finetuned: ModelReference,
    options: LoadOptions,
    announce: Callable[[Literal["base", "finetuned"], str], None],
) -> tuple[LoadedModel, LoadedModel]:
    """Open both models without their blocks, which their pagers load; a plain pass loads them one by one.

    `announce` is told the role and the name of each model before it is opened.

    Raises:
        UnsupportedModelError: one of them cannot be read block by block; the message says why.
        ModelError: one of them cannot be loaded; the subclass and the message say why.
    """
    announce("base", base.name)
    base_source = base.model or adapter_base(adapter_of(base))
    ours = _open(open_to_load(base_source, options), options)
    announce("finetuned", finetuned.name)
    finetuned_source = source_under(finetuned, base)
    if finetuned_source.place == base_source.place:
        theirs = _beside(ours, finetuned_source)
    else:
        theirs = _open(open_to_load(finetuned_source, options), options, ours.pager)
    same_attention(ours.model, theirs.model, ours.notes)
    pair = _finish(base, ours, options), _finish(finetuned, theirs, options)
    for model in pair:
        assert model.pager is not None
        model.pager.use_blocks_on_demand()
    return pair


def check_paged(base: ModelReference, finetuned: ModelReference, options: LoadOptions) -> None:
    """Refuse a pair that cannot be read block by block, before any weight is read.

    Raises:
        UnsupportedModelError: the message says why.
        ModelError: one of them cannot be opened.
    """
    for source in (base.model or adapter_base(adapter_of(base)), source_under(finetuned, base)):
        _class_of(open_to_load(source, options))
    for reference in (base, finetuned):
        for adapter in reference.adapters:
            _check_adapter(adapter, adapter_settings(adapter))


def _open(opened: Opened, options: LoadOptions, base: Pager | None = None) -> Weights:
    """Build one model empty, and read what is outside its blocks."""
    source = opened.source
    with translated(source.name):
        model, conversion = _build(opened, options)
        # With empty tensors: the report is that of `from_pretrained`, and no weight has been read.
        report = conversion.finish(model, conversion.check(model))
    model.eval().requires_grad_(requires_grad=False)
    weights = Weights(opened, model, report)
    conversion.wrappers.note(source.name, conversion.stored, weights.notes)
    check_report(weights, options)
    blocks = dissect(model, options.layers_path).blocks
    with translated(source.name):
        weights.pager = Pager(model, blocks, conversion, base)
    if unfilled := weights.pager.unfilled():
        raise _refusal(source, f"nothing in its files makes {unfilled[0]} by itself")
    return weights


def _build(opened: Opened, options: LoadOptions) -> tuple[PreTrainedModel, Conversion]:
    source = opened.source
    model, conversion = build(opened, _class_of(opened), options)
    if any(hasattr(module, "layers_are_rescaled") for module in model.modules()):
        raise _refusal(source, "it rescales all its weights when it first runs")
    return model, conversion


def _class_of(opened: Opened) -> type[PreTrainedModel]:
    """The class of a checkpoint that can be read block by block."""
    if opened.source.gguf_file:
        raise _refusal(opened.source, "a GGUF file is read as a whole")
    if opened.quantised:
        raise _refusal(opened.source, "quantised weights are read as a whole")
    kind: type[PreTrainedModel] | None = _transformers.registered_class(opened.model_class, opened.config)
    if kind is None:
        raise _refusal(opened.source, "a model with Python code of its own loads itself")
    return kind


def _beside(base: Weights, source: Source) -> Weights:
    """Open a second model on the same files, over what base has read."""
    assert base.pager is not None
    model = share_storage(base.model)
    index = {id(module): i for i, module in enumerate(base.model.modules())}
    # A deep copy lists its modules in the same order.
    modules = list(model.modules())
    blocks = [modules[index[id(block)]] for block in base.pager.blocks]
    pager = Pager(model, blocks, base.pager.conversion, base.pager)
    return Weights(replace(base.opened, source=source), model, base.report, Notes(base.notes), pager)


def _finish(reference: ModelReference, weights: Weights, options: LoadOptions) -> LoadedModel:
    """Put the adapters on, if there are any: their own weights are small, and stay."""
    pager = weights.pager
    assert pager is not None
    for adapter in reference.adapters:
        settings = adapter_settings(adapter)
        brought = _brought_whole(adapter, settings)
        _check_adapter(adapter, settings)
        _check_brought(adapter, brought, pager)
        _check_rows(adapter, pager)
        if brought or settings.get("trainable_token_indices"):
            pager.keep_embeddings()
    if not reference.adapters:
        return finish(reference, weights, options)
    with pager.hollow():
        return finish(reference, weights, options)


def _brought_whole(adapter: Source, settings: dict[str, Any]) -> set[str]:
    """Return the modules that an adapter brings whole, by the last parts of their names."""
    saved = settings.get("modules_to_save")
    names = set(saved) if isinstance(saved, list) else set()
    if (path := adapter.file(WEIGHTS)) is not None:
        with translated(adapter.name):
            keys = read_headers([path])
        # PEFT saves an embedding whole when an adapter is on it.
        names |= {key.split(".base_layer.")[0].rpartition(".")[2] for key in keys if ".base_layer." in key}
    return names


def _check_adapter(adapter: Source, settings: dict[str, Any]) -> None:
    """Refuse an adapter that changes weights of its model when it is put on."""
    kind, start = settings.get("peft_type"), rewriting_start(settings)
    if kind not in _ADAPTERS:
        raise _refusal(adapter, f"an adapter of the type {kind} may change its model's weights")
    if start is not None:
        raise _refusal(adapter, f"its start, {start}, was taken off its model's weights")
    if settings.get("bias", "none") != "none":
        raise _refusal(adapter, "it brings biases for its model's layers")


def _check_brought(adapter: Source, brought: set[str], pager: Pager) -> None:
    """Refuse an adapter that brings modules of blocks whole."""
    inside = {id(module) for block in pager.blocks for module in block.modules()}
    names = [f".{name}" for name, module in pager.model.named_modules() if id(module) in inside]
    for module in sorted(brought):
        if any(name.endswith(f".{module}") for name in names):
            raise _refusal(adapter, f"it brings {module} of its model's blocks whole")


def _check_rows(adapter: Source, pager: Pager) -> None:
    """Refuse an adapter that was trained with another vocabulary: the tables are those of the files."""
    if (path := adapter.file(WEIGHTS)) is not None:
        with translated(adapter.name):
            stored = read_headers([path])
        if find_fit(adapter.name, pager.model, stored).n_rows is not None:
            raise _refusal(adapter, "it brings a vocabulary of another size")


def _refusal(source: Source, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.name}: cannot be read block by block: {reason}. Use {option('memory', 'resident')}.",
        option="memory",
    )


WIDEST = 8
"""How much larger weights can be in memory than in their files: float64 for 8 bits."""


@dataclass(frozen=True)
class Footprint:
    """The memory that a pair takes, in bytes, in the dtype in which it runs."""

    resident: int
    """both models whole; once if they stand on the same files"""
    block: int
    """the largest block of each model"""
    rest: int
    """what is in memory beside the blocks, with large embeddings and LM heads whole"""
    row: int
    """a row of hidden states at every site of each model"""
    width: int
    """the numbers in a row of the widest model"""
    logits: int
    """a row of logits of the model with the most tokens, in numbers"""


def estimate(base: ModelReference, finetuned: ModelReference, options: LoadOptions) -> Footprint | None:
    """Return what a pair will take in memory, from its files' headers and its configurations alone.

    None where one of the two cannot be read block by block.

    Raises:
        ModelError: a configuration or a header cannot be read.
    """
    sources = [base.model or adapter_base(adapter_of(base)), source_under(finetuned, base)]
    # By their places: two names of the same files are in memory once.
    sizes = {source.place: source for source in sources}
    try:
        parts = [_sizes(source, options) for source in sizes.values()]
    except UnsupportedModelError:
        return None
    return Footprint(
        resident=sum(part.resident for part in parts),
        block=sum(part.block for part in parts),
        rest=sum(part.rest for part in parts),
        # Both run, also where they stand on the same files.
        row=sum(part.row for part in parts) * len(sources) // len(parts),
        width=max(part.width for part in parts),
        logits=max(part.logits for part in parts),
    )


def fits_surely(base: ModelReference, finetuned: ModelReference, options: LoadOptions, room: int) -> bool:
    """Return whether a pair fits into so many bytes in any dtype, by its files' sizes; False if not known."""
    sources = {base.model or adapter_base(adapter_of(base)), source_under(finetuned, base)}
    n_bytes = 0
    for source in sources:
        if source.gguf_file:
            return False
        opened = open_checkpoint(source, options)
        if opened.quantised:
            return False  # codes of 2 bits become 16 times as large in float32
        with translated(source.name):
            n_bytes += sum(
                Path(f).stat().st_size for f in find_files(source, opened.config, opened.model_class)
            )
    return n_bytes * WIDEST <= room


def _sizes(source: Source, options: LoadOptions) -> Footprint:
    """Return what one model takes."""
    opened = open_to_load(source, options)
    with translated(source.name):
        model, conversion = _build(opened, replace(options, device=torch.device("meta")))
        conversion.finish(model, conversion.check(model))
    anatomy = dissect(model, options.layers_path)
    blocks = [_n_bytes(block) for block in anatomy.blocks]
    whole, width = _n_bytes(model), anatomy.hidden_size
    # Beside the blocks there are the embedding and the end.
    row = (len(blocks) + 2) * width * model.dtype.itemsize
    n_tokens = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    return Footprint(whole, max(blocks), whole - sum(blocks), row, width, n_tokens)


def _n_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
