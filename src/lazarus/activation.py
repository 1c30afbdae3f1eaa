"""activation_diff: the same prompts through both models, compared block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack, runtime_checkable

import torch
from torch import nn

from lazarus.assemble import RunFacts, assemble
from lazarus.blame import MemoryFaults
from lazarus.engine import (
    NO_HEAD,
    ModelPair,
    PrefixPlan,
    Product,
    SharedPrefix,
    check_positions,
    check_shapes,
    choose_product,
    confirm_product,
    head_reads_blocks,
    learn_pair,
    share_prefix,
)
from lazarus.errors import UnsupportedModelError, UsageError
from lazarus.faces import ActivationDiff
from lazarus.findings import read_differences
from lazarus.loading import Loaded, Model, Role, less_memory, load_models, pick_device
from lazarus.measure import Plan, measure
from lazarus.metrics import FEWEST_FOR_CKA
from lazarus.models import find_tokenizer
from lazarus.options import (
    OptionArguments,
    Options,
    check_token_prompts,
    make_options,
    parse_position,
    parse_token_prompts,
    read_template,
    readout_layers,
)
from lazarus.prompts import Prompt, PromptList, check_chats, make_prompts
from lazarus.ranks import Rank, find_rank
from lazarus.reading import Reading, read_prompts
from lazarus.results import ActivationDiffRecord
from lazarus.scope import find_scope
from lazarus.shards import WorkFolder, fingerprint

Prompts = str | Path | Mapping[str, Any] | Prompt | Iterable[str | Mapping[str, Any] | Prompt] | PromptList

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
    rank: Rank | None = None,
    **options: Unpack[OptionArguments],
) -> ActivationDiff:
    """Run the same prompts through two models and compare their hidden states layer by layer.

    Args:
        base: a Hub id, a folder, a `.gguf` file, MODEL+ADAPTER, or a transformers model in memory.
        finetuned: the same; an adapter alone runs on top of `base`.
        prompts: texts, or mappings with the fields of a `.jsonl` row (`prompt`, `text` or `messages`,
            and `group`). One string is read as the command line's `-p`, a `Path` as a file of prompts.
        tokenizer: the tokenizer of models in memory, or a folder or Hub id that holds it; it stands in for
            both models' own.
        observer: is told how far the run has come.
        rank: which of several processes this one is, instead of what the environment says (torchrun, Slurm).
        options: the command line's options, with underscores: `position="last"`, `batch_tokens=512`.

    Returns:
        The cosine similarity and the divergence (1 − cosine, 0 to 2) of the two residual streams after
        each block, averaged over prompts, each prompt's own values, and notes on what was assumed.

    Raises:
        UsageError: an option or the prompts are wrong, or the folder of `work_dir` belongs to another run.
        ModelError: a model cannot be loaded or has no blocks that can be found.
        PairError: the two differ in tokenizer, depth or width.
        PromptDataError: a prompt does not fit the models or the position.
        NoDataError: not one pair of states is finite.
        DeviceError: memory ran out, or the device lacks an operator.
    """
    chosen = make_options(**options)
    found = make_prompts(prompts, no_split=chosen.no_split)
    template = read_template(chosen)
    check_chats(found.prompts, chosen.chat_template)
    check_token_prompts(chosen.token_prompts, len(found.prompts))
    watcher = observer or _Silence()
    rank = rank or find_rank()
    folder = _open_folder(chosen, rank)
    device = pick_device(chosen.device, rank)
    tokenizer = find_tokenizer(tokenizer, trust_remote_code=chosen.trust_remote_code)
    by_name = not any(isinstance(model, nn.Module) for model in (base, finetuned))
    helps = less_memory(chosen.dtype, device, can_stream=by_name and chosen.memory != "stream")
    with MemoryFaults(helps):
        loaded = load_models(base, finetuned, chosen, device, watcher.loading)
    smaller_batches = f"a --batch-tokens below {_batch_tokens(chosen, device)}"
    with MemoryFaults([smaller_batches, *helps]):
        given = _Given(chosen, found, template, tokenizer, folder, device)
        return ActivationDiff(_compare(given, loaded, watcher))


@dataclass(frozen=True)
class _Given:
    """What a run was given, beside the models."""

    options: Options
    prompts: PromptList
    template: str | None
    tokenizer: Any | None
    folder: WorkFolder | None
    device: torch.device


def _compare(given: _Given, loaded: Loaded, watcher: Observer) -> ActivationDiffRecord:
    """Compare two models that are loaded."""
    chosen, found, device, models = given.options, given.prompts, given.device, loaded.models
    watcher.testing(found.prompts)
    reading = read_prompts(models, given.tokenizer, found.prompts, given.template, chosen)
    pair = learn_pair(*models, reading.samples, reading.pad_ids, reading.align)
    check_shapes(pair, len(found.prompts), FEWEST_FOR_CKA, localize=chosen.localize)
    layers = _readout_layers(chosen, pair, reading)
    notes = [*found.notes, *loaded.notes, *models[0].notes, *models[1].notes, *reading.notes]
    facts = _facts(chosen, device, pair, reading, notes)
    prefix = _share_prefix(facts, reading, pair)
    scope = find_scope(pair, reading)
    facts = replace(facts, notes=[*facts.notes, *prefix.notes, *scope.notes], outside=scope.outside)
    plan = _plan(facts, reading, pair, given.folder)
    plan = replace(plan, n_prefix=prefix.n_tokens, outcomes=scope.outcomes)
    product = _begin(plan, facts, reading, pair)
    facts = replace(facts, matmul=product.path, notes=[*facts.notes, *product.notes])
    with product.used():
        measured = measure(pair, plan, watcher.running, watcher.advanced)
        readout = read_differences(pair, measured, layers, reading.tokenizers) if layers else None
    return assemble(pair, facts, reading, measured, readout)


def _open_folder(options: Options, rank: Rank) -> WorkFolder | None:
    """The folder of `work_dir`, before anything is loaded.

    Raises:
        UsageError: it is not given and there are several processes, or it cannot be used.
    """
    if options.work_dir is not None:
        return WorkFolder.open(options.work_dir, rank)
    if rank.world > 1:
        raise UsageError(
            f"this is one of {rank.world} processes, and there is no folder in which they share the work. "
            "Give one that all of them see: --work-dir DIR. To run this one alone, unset RANK, WORLD_SIZE, "
            "SLURM_PROCID and SLURM_NTASKS."
        )
    return None


def _begin(plan: Plan, facts: RunFacts, reading: Reading, pair: ModelPair) -> Product:
    """Take up the folder's run, which must be this one; what was measured there holds here. Else measure.

    Raises:
        UsageError: the folder belongs to another run.
    """
    n_tokens = sum(len(prompt.ids) for prompt in reading.base)
    if plan.folder is None:
        return choose_product(pair.base, n_tokens, facts.batch_tokens)
    settings = {
        "position": str(facts.position),
        "device": facts.device.type,
        "prefix": str(plan.n_prefix),
        "padding": pair.padding(max(len(p.ids) for p in (*reading.base, *reading.finetuned))),
    }
    models, prompts = (pair.base, pair.finetuned), (reading.base, reading.finetuned)
    found = plan.folder.begin(
        fingerprint(models, prompts, facts.options, settings),
        lambda: {"product": choose_product(pair.base, n_tokens, facts.batch_tokens).as_json()},
    )
    return confirm_product(Product.from_json(found["product"]), pair.base, facts.batch_tokens)


def _facts(
    options: Options, device: torch.device, pair: ModelPair, reading: Reading, notes: Sequence[str]
) -> RunFacts:
    """Return what `auto` comes to, and what is to be noted of the pair and of the position."""
    position, lengths = _position(options, pair), [len(prompt.ids) for prompt in reading.base]
    notes = [*notes, *reading.apart(), *pair.notes(max(lengths)), *check_positions(position, lengths)]
    return RunFacts(options, device, position, _batch_tokens(options, device), notes)


def _share_prefix(facts: RunFacts, reading: Reading, pair: ModelPair) -> SharedPrefix:
    """The prefix that runs once, where the run allows it."""
    twice = "--localize runs blocks twice, and a cache takes a token in once"
    plan = PrefixPlan(
        facts.position, facts.batch_tokens, reading.pad_ids[0], twice if facts.options.localize else None
    )
    return share_prefix(pair, reading.base, plan)


def _plan(facts: RunFacts, reading: Reading, pair: ModelPair, folder: WorkFolder | None) -> Plan:
    return Plan(
        base_prompts=reading.base,
        finetuned_prompts=reading.finetuned,
        pad_ids=reading.pad_ids,
        batch_tokens=facts.batch_tokens,
        position=facts.position,
        localize=facts.options.localize,
        noise_floor=not facts.options.no_noise_floor and pair.same_width,
        seed=facts.options.seed,
        folder=folder,
        token_prompts=_token_prompts(facts, pair),
    )


def _token_prompts(facts: RunFacts, pair: ModelPair) -> Literal["auto"] | list[int]:
    """The prompts of which every token is kept, where every token is compared."""
    found = parse_token_prompts(facts.options.token_prompts)
    return [] if facts.position != "all" or found == "none" or not pair.same_width else found


def _readout_layers(options: Options, pair: ModelPair, reading: Reading) -> list[int]:
    """The layers whose mean difference is read through the heads; none unless that was asked for.

    Raises:
        UsageError: the models have no such layer.
        UnsupportedModelError: a head cannot be run by itself, or there is no difference to read.
    """
    if options.readout is None:
        return []
    for model, conventions, ids, pad_id in zip(
        (pair.base, pair.finetuned),
        (pair.base_conventions, pair.finetuned_conventions),
        reading.samples,
        reading.pad_ids,
        strict=True,
    ):
        if conventions.head_reads is None:
            why = conventions.why_no_head
            why = f"{model.name} has {NO_HEAD}" if why == NO_HEAD else why
            raise UnsupportedModelError(f"--readout {options.readout}: {why}. Leave --readout out.")
        reads = head_reads_blocks(model, ids, pad_id)
        if reads is None:
            raise UnsupportedModelError(
                f"--readout {options.readout}: the logits of {model.name} are not finite, so it is not known "
                "whether its head reads a block's states. Leave --readout out."
            )
        if not reads:
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


def _position(options: Options, pair: ModelPair) -> Literal["last", "mean", "all"] | int:
    position = parse_position(options.position)
    if position == "auto":
        return "last" if pair.base_conventions.causal else "mean"
    return position


def _batch_tokens(options: Options, device: torch.device) -> int:
    if options.batch_tokens is not None:
        return options.batch_tokens
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
