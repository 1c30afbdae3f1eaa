"""activation_diff: the same prompts through both models, compared block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack, runtime_checkable

import torch
from torch import nn

from lazarus.assemble import RunFacts, assemble
from lazarus.diff import ActivationDiff
from lazarus.engine import ModelPair, check_positions, check_shapes, learn_pair
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.findings import read_differences
from lazarus.measure import Plan, measure
from lazarus.metrics import FEWEST_FOR_CKA
from lazarus.models import (
    LoadedModel,
    LoadOptions,
    ModelReference,
    load_one,
    load_pair,
    parse_model,
    wrap_model,
)
from lazarus.options import (
    OptionArguments,
    Options,
    make_options,
    parse_position,
    read_template,
    readout_layers,
)
from lazarus.prompts import Prompt, PromptList, check_chats, make_prompts
from lazarus.reading import Reading, read_prompts

Model = str | Path | nn.Module | ModelReference
Prompts = str | Iterable[str | Mapping[str, Any] | Prompt] | PromptList
Role = Literal["base", "finetuned"]

CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 8192


@runtime_checkable
class Observer(Protocol):
    """What is told how far a run has come."""

    def loading(self, role: Role, name: str) -> None:
        """A model is about to be loaded."""

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Both models are there, and these are the prompts."""

    def running(self, n_tokens: int) -> None:
        """The batches begin: so many tokens in all."""

    def advanced(self, n_tokens: int) -> None:
        """So many tokens more have been through both models."""


class _Silence:
    def loading(self, role: Role, name: str) -> None: ...
    def testing(self, prompts: Sequence[Prompt]) -> None: ...
    def running(self, n_tokens: int) -> None: ...
    def advanced(self, n_tokens: int) -> None: ...


def activation_diff(
    base: Model,
    finetuned: Model,
    prompts: Prompts,
    *,
    tokenizer: Any | None = None,
    observer: Observer | None = None,
    **options: Unpack[OptionArguments],
) -> ActivationDiff:
    """Run the same prompts through two models and compare their hidden states layer by layer.

    Args:
        base: a Hub id, a folder, a `.gguf` file, MODEL+ADAPTER, or a transformers model in memory.
        finetuned: the same; an adapter alone runs on top of `base`.
        prompts: texts, or mappings with the fields of a `.jsonl` row (`prompt`, `text` or `messages`,
            and `group`). One string is read as the command line's `-p`.
        tokenizer: the tokenizer of models in memory; it stands in for both models' own.
        observer: is told how far the run has come.
        options: the command line's options, with underscores: `position="last"`, `batch_tokens=512`.

    Returns:
        The cosine similarity and the divergence (1 − cosine, 0 to 2) of the two residual streams after
        each block, averaged over prompts, each prompt's own values, and notes on what was assumed.

    Raises:
        UsageError: an option or the prompts are wrong.
        ModelError: a model cannot be loaded or has no blocks that can be found.
        PairError: the two differ in tokenizer, depth or width.
        PromptDataError: a prompt does not fit the models or the position.
        NoDataError: not one pair of states is finite.
    """
    chosen = make_options(**options)
    found = make_prompts(prompts, no_split=chosen.no_split)
    template = read_template(chosen)
    check_chats(found.prompts, chosen.chat_template)
    watcher = observer or _Silence()
    device = _pick_device(chosen.device)
    models = _load_models(base, finetuned, _load_options(chosen, device), watcher)
    watcher.testing(found.prompts)
    reading = read_prompts(models, tokenizer, found.prompts, template, chosen)
    pair = learn_pair(*models, reading.samples, reading.pad_ids, reading.align)
    check_shapes(pair, len(found.prompts), FEWEST_FOR_CKA, localize=chosen.localize)
    layers = _readout_layers(chosen, pair)
    position, lengths = _position(chosen, pair), [len(prompt.ids) for prompt in reading.base]
    notes = [*found.notes, *models[0].notes, *models[1].notes, *reading.notes]
    notes += pair.notes(max(lengths)) + check_positions(position, lengths)
    facts = RunFacts(chosen, device, position, _batch_tokens(chosen, device), notes)
    measured = measure(pair, _plan(facts, reading, pair), watcher.running, watcher.advanced)
    readout = read_differences(pair, measured, layers, reading.tokenizers) if layers else None
    return ActivationDiff(assemble(pair, facts, reading, measured, readout))


def _plan(facts: RunFacts, reading: Reading, pair: ModelPair) -> Plan:
    return Plan(
        base_prompts=reading.base,
        finetuned_prompts=reading.finetuned,
        pad_ids=reading.pad_ids,
        batch_tokens=facts.batch_tokens,
        position=facts.position,
        localize=facts.options.localize,
        noise_floor=not facts.options.no_noise_floor and pair.same_width,
        seed=facts.options.seed,
    )


def _readout_layers(options: Options, pair: ModelPair) -> list[int]:
    """The layers whose mean difference is read through the heads; none unless that was asked for.

    Raises:
        UsageError: the models have no such layer.
        UnsupportedModelError: a head cannot be run by itself, or there is no difference to read.
    """
    if options.readout is None:
        return []
    for model, conventions in (
        (pair.base, pair.base_conventions),
        (pair.finetuned, pair.finetuned_conventions),
    ):
        if conventions.head_reads is None:
            raise UnsupportedModelError(
                f"--readout {options.readout}: {model.name} has no next-token head that can be run by "
                "itself. Leave --readout out."
            )
        if not conventions.head_reads_blocks:
            raise UnsupportedModelError(
                f"--readout {options.readout}: {model.name} makes more than a norm of what leaves its last "
                "block, so a block's states cannot be read through its head. Leave --readout out."
            )
    if not pair.same_width:
        raise UnsupportedModelError(
            f"--readout {options.readout}: states of {pair.widths[0]} and {pair.widths[1]} features have no "
            "difference to read. Leave --readout out."
        )
    return readout_layers(options.readout, pair.base_conventions.n_layers)


def _load_models(
    base: Model, finetuned: Model, options: LoadOptions, watcher: Observer
) -> tuple[LoadedModel, LoadedModel]:
    """Both models; two that are named are loaded as a pair, so that common weights are held once."""
    named = [parse_model(str(m)) if isinstance(m, str | Path) else m for m in (base, finetuned)]
    match named:
        case [ModelReference() as first, ModelReference() as second]:
            return load_pair(first, second, options, watcher.loading)
        case _:
            roles: tuple[Role, Role] = ("base", "finetuned")
            one, other = (
                _load_or_wrap(m, role, options, watcher) for m, role in zip(named, roles, strict=True)
            )
            return one, other


def _load_or_wrap(
    model: nn.Module | ModelReference, role: Role, options: LoadOptions, watcher: Observer
) -> LoadedModel:
    if isinstance(model, ModelReference):
        watcher.loading(role, model.name)
        return load_one(model, options)
    watcher.loading(role, type(model).__name__)
    return wrap_model(model, type(model).__name__, options.layers_path)


def _load_options(options: Options, device: torch.device) -> LoadOptions:
    if options.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else None
    else:
        dtype = getattr(torch, options.dtype)
    return LoadOptions(dtype, device, options.trust_remote_code, options.layers_path)


def _pick_device(name: str) -> torch.device:
    """The device; `auto` is the first GPU there is.

    Raises:
        DeviceError: it is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(name)
    n_cuda = torch.cuda.device_count()
    absent = device.type == "mps" and not has_mps
    if absent or (device.type == "cuda" and (device.index or 0) >= n_cuda):
        raise DeviceError(
            f"--device {name}: there is no such device here ({n_cuda} CUDA devices). Use --device cpu."
        )
    return device


def _position(options: Options, pair: ModelPair) -> Literal["last", "mean", "all"] | int:
    position = parse_position(options.position)
    if position == "auto":
        return "last" if pair.base_conventions.causal else "mean"
    return position


def _batch_tokens(options: Options, device: torch.device) -> int:
    if options.batch_tokens is not None:
        return options.batch_tokens
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
