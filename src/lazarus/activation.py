"""activation_diff: the same prompts through both models, compared block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack, runtime_checkable

import torch
from torch import nn

from lazarus.assemble import RunFacts, assemble
from lazarus.diff import ActivationDiff
from lazarus.engine import ModelPair, Site, check_positions, learn_pair, run_pairs
from lazarus.errors import ChatTemplateError, DeviceError, PairError, PromptDataError
from lazarus.metrics import PromptMeans
from lazarus.models import (
    LoadedModel,
    LoadOptions,
    ModelReference,
    load_one,
    load_pair,
    load_tokenizer,
    parse_model,
    wrap_model,
)
from lazarus.options import OptionArguments, Options, make_options, parse_position, read_template
from lazarus.prompts import Prompt, PromptList, check_chats, make_prompts
from lazarus.tokens import TokenBatch, TokenizedPrompt, TokenOptions, make_batches, tokenize_pair

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
    notes = [*found.notes, *models[0].notes, *models[1].notes]
    tokenizers = _tokenizers(models, tokenizer, chosen, notes)
    tokenized = _tokenize(models, tokenizers, found.prompts, template, chosen, notes)
    pad_id = _pad_id(tokenizers[0])
    sample = [token for prompt in tokenized[:16] for token in prompt.ids]
    pair = learn_pair(*models, sample, pad_id)
    facts = RunFacts(chosen, device, _position(chosen, pair), _batch_tokens(chosen, device))
    lengths = [len(prompt.ids) for prompt in tokenized]
    notes += pair.notes(max(lengths)) + check_positions(facts.position, lengths)
    batches = make_batches(tokenized, facts.batch_tokens, pair.padding(max(lengths)), pad_id)
    means = _measure(pair, batches, len(tokenized), facts, watcher)
    return ActivationDiff(assemble(pair, facts, found.prompts, tokenized, means, notes))


def _measure(
    pair: ModelPair,
    batches: Sequence[TokenBatch],
    n_prompts: int,
    facts: RunFacts,
    watcher: Observer,
) -> dict[Site, PromptMeans]:
    """The one loop over pairs of states: each goes into its site's accumulator and is forgotten."""
    centered = pair.base.anatomy.uses_layer_norm and pair.finetuned.anatomy.uses_layer_norm
    means = {site: PromptMeans(n_prompts, centered) for site in pair.sites}
    watcher.running(sum(batch.n_tokens for batch in batches))
    for states in run_pairs(pair, batches, facts.position, watcher.advanced):
        means[states.site].update(states.prompts, states.base, states.finetuned)
    return means


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


def _tokenizers(
    models: tuple[LoadedModel, LoadedModel], given: Any | None, options: Options, notes: list[str]
) -> tuple[Any, Any]:
    """Each model's tokenizer; one that brings none is read with the other's."""
    if given is not None:
        return given, given
    base, finetuned = (load_tokenizer(model, trust_remote_code=options.trust_remote_code) for model in models)
    if base is None and finetuned is None:
        raise PairError(
            f"neither {models[0].name} nor {models[1].name} brings a tokenizer. Put the tokenizer's "
            "files beside the weights, or give activation_diff a tokenizer."
        )
    for lacking, model in zip((base, finetuned), models, strict=True):
        if lacking is None:
            notes.append(f"{model.name} brings no tokenizer; the other model's was used for both")
    return (finetuned, finetuned) if base is None else (base, base if finetuned is None else finetuned)


def _tokenize(
    models: tuple[LoadedModel, LoadedModel],
    tokenizers: tuple[Any, Any],
    prompts: Sequence[Prompt],
    template: str | None,
    options: Options,
    notes: list[str],
) -> list[TokenizedPrompt]:
    if options.chat_template in ("base", "finetuned"):
        side = ("base", "finetuned").index(options.chat_template)
        template = _own_template(tokenizers[side], models[side].name, options)
    contexts = [m.anatomy.context for m in models if m.anatomy.context is not None]
    token_options = TokenOptions(template, min(contexts, default=None), options.truncate)
    tokenized, token_notes = tokenize_pair(prompts, *tokenizers, token_options)
    notes += token_notes
    for model in models:
        _check_vocabulary(model, tokenized)
    return tokenized


def _own_template(tokenizer: Any, name: str, options: Options) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ChatTemplateError(
            f"--chat-template {options.chat_template}: {name} has no chat template. Use the other "
            "model's, or a file."
        ) from error


def _check_vocabulary(model: LoadedModel, tokenized: Sequence[TokenizedPrompt]) -> None:
    table = model.model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    for prompt in tokenized:
        if size is not None and max(prompt.ids) >= size:
            raise PromptDataError(
                f"Prompt {prompt.index} has the token id {max(prompt.ids)}, and {model.name} has "
                f"embeddings for {size}. Its tokenizer belongs to another model: use its own."
            )


def _pad_id(tokenizer: Any) -> int:
    """Any id will do for padding: it is masked and never compared."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _position(options: Options, pair: ModelPair) -> Literal["last", "mean", "all"] | int:
    position = parse_position(options.position)
    if position == "auto":
        return "last" if pair.base_conventions.causal else "mean"
    return position


def _batch_tokens(options: Options, device: torch.device) -> int:
    if options.batch_tokens is not None:
        return options.batch_tokens
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
