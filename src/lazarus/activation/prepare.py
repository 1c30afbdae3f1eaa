"""Preparation: load both models, read the prompts, and decide what is run through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from lazarus.activation.accumulation import Plan
from lazarus.activation.attribution import check_attribution
from lazarus.activation.live import pair_facts
from lazarus.activation.readout import readable_layers
from lazarus.activation.runplan import RunPlan
from lazarus.activation.scope import find_scope
from lazarus.blame import MemoryFaults
from lazarus.engine import (
    ModelPair,
    PrefixPlan,
    check_positions,
    check_shapes,
    learn_pair,
    note_components,
    share_prefix,
    with_components,
)
from lazarus.facts import PairFacts
from lazarus.loading import Model, Role, Work, less_memory, load_alone, load_models
from lazarus.messages import option
from lazarus.metrics import FEWEST_FOR_CKA
from lazarus.models import LoadedModel
from lazarus.names.sublayers import sublayers
from lazarus.notes import Notes
from lazarus.options import EACH_TOKEN, Options, parse_position, parse_token_prompts
from lazarus.prompts import Prompt, PromptList
from lazarus.reading import Asked, Reading, read_prompts
from lazarus.results import PromptRecord, Settings
from lazarus.shards import WorkFolder, fingerprint
from lazarus.sites import Position, StatePair

CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 8192
CHARACTERS = 4
"""The characters of a token, about."""


@runtime_checkable
class Observer(Protocol):
    """An object that is told how far a run has come."""

    def loading(self, role: Role, name: str) -> None:
        """A model is about to be loaded."""

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Both models are there, and these are the prompts."""

    def running(self, n_tokens: int) -> None:
        """The batches begin: so many tokens in all. With `attribute` once more, for its own passes."""

    def advanced(self, n_tokens: int) -> None:
        """Count so many more tokens as run through both models."""


_PLAIN_GGUF = {"F64", "F32", "F16", "BF16"}
"""the types of GGUF that are no quantiser's"""


@dataclass(frozen=True)
class Given:
    """The arguments of a run, beside the models."""

    options: Options
    prompts: PromptList
    template: str | None
    tokenizer: Any | None
    folder: WorkFolder | None
    """where the work is kept, and shared with other processes"""
    device: torch.device
    can_stream: bool
    """whether the models may be read block by block: both were named"""
    tap: Callable[[Iterator[StatePair]], Iterator[StatePair]] = iter
    """lets the pairs of a recording pass, and sees them"""

    @property
    def batch_tokens(self) -> int:
        """Return how many tokens make a batch, padding included."""
        if self.options.batch_tokens is not None:
            return self.options.batch_tokens
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS

    @property
    def work(self) -> Work:
        """Return where the models run, and on how much, by the lengths of texts: nothing is tokenised yet."""
        lengths = [len(prompt.text) // CHARACTERS + 1 for prompt in self.prompts.prompts]
        n_tokens, n_prompts = sum(lengths), len(lengths)
        if not n_prompts:  # those of a recording
            return Work(self.device)
        at_once = min(n_tokens, max(self.batch_tokens, *lengths))
        if self.options.position in EACH_TOKEN:
            return Work(self.device, at_once)
        return Work(self.device, max(1, at_once * n_prompts // n_tokens))

    def memory_faults(self, *more: str) -> MemoryFaults:
        """Return a context that tells of a lack of memory, with the options that help, `more` among them."""
        can_stream = self.can_stream and self.options.memory != "stream"
        helps = less_memory(self.options.dtype, self.device, can_stream=can_stream)
        # Reading block by block helps most, whatever else is asked for.
        return MemoryFaults([*helps[:can_stream], *more, *helps[can_stream:]])

    def running(self) -> MemoryFaults:
        """Return the same for what runs in batches."""
        return self.memory_faults(f"a {option('batch_tokens')} below {self.batch_tokens}")


@dataclass(frozen=True)
class Prepared:
    """Two models that are loaded and known, and what is run through them."""

    given: Given
    pair: ModelPair
    reading: Reading
    run: RunPlan
    facts: PairFacts
    plan: Plan
    notes: Notes
    readout_layers: Sequence[int] = ()
    """the layers whose mean difference is read through the heads"""


def prepare(
    given: Given,
    base: Model,
    finetuned: Model,
    watcher: Observer,
    load: Callable[..., tuple[LoadedModel, LoadedModel]] = load_models,
) -> Prepared:
    """Load two models, read the prompts, and learn how the models behave.

    `load` takes what `load_models` takes.

    Raises:
        LazarusError: as `activation_diff`.
    """
    notes = Notes(given.prompts.notes)
    with given.memory_faults():
        models = load((base, finetuned), given.options, given.work, watcher.loading, notes)
    with given.running():
        watcher.testing(given.prompts.prompts)
        return learn_models(given, models, read_asked(given, models, notes), notes)


def prepare_alone(
    given: Given, model: Model, role: Role, watcher: Observer, read: Callable[..., Reading]
) -> Prepared:
    """Load one model, and learn how it behaves: a pair of it with itself.

    Args:
        given: the arguments of the run.
        model: the model.
        role: which of the two it is.
        watcher: is told how far the run has come.
        read: gives its prompts as token ids.

    Raises:
        LazarusError: as `activation_diff`.
    """
    notes = Notes(given.prompts.notes)
    with given.memory_faults():
        loaded = load_alone(model, role, given.options, given.work, watcher.loading, notes)
    with given.running():
        reading = read(loaded, notes=notes)
        return learn_models(given, (loaded, loaded), reading, notes)


def read_asked(given: Given, models: tuple[LoadedModel, LoadedModel], notes: Notes) -> Reading:
    """Tokenise the prompts that were given, for both models.

    Raises:
        LazarusError: as `read_prompts`.
    """
    asked = Asked(given.prompts.prompts, given.tokenizer, given.template)
    return read_prompts(models, asked, given.options, notes)


def take_up(prepared: Prepared, run: RunPlan, others: Mapping[str, str] | None = None) -> None:
    """Take up the run of the folder of `work_dir`, if there is one; `others` must be the same as well.

    Raises:
        UsageError: the folder belongs to another run.
    """
    given, reading, pair = prepared.given, prepared.reading, prepared.pair
    if given.folder is None:
        return
    settings = {
        "position": str(run.position),
        "device": given.device.type,
        "prefix": str(run.n_prefix),
        "padding": pair.padding(run.longest),
    }
    settings |= others or {}
    models, prompts = (pair.base, pair.finetuned), (reading.base, reading.finetuned)
    given.folder.begin(fingerprint(models, prompts, given.options, settings))


def learn_models(
    given: Given, models: tuple[LoadedModel, LoadedModel], reading: Reading, notes: Notes
) -> Prepared:
    """Learn how two loaded models behave, and settle what is run through them.

    Raises:
        LazarusError: as `activation_diff`.
    """
    options, prompts = given.options, reading.prompts
    _note_precision(models[0], notes)
    reading.note_apart(notes)
    pair = learn_pair(*models, reading.samples, reading.pad_ids, reading.align)
    check_shapes(pair, len(prompts), FEWEST_FOR_CKA, localize=options.localize)
    if options.attribute is not None:
        check_attribution(pair)
    if options.sites == "all":
        finders = sublayers(models[0].model, models[0].anatomy), sublayers(models[1].model, models[1].anatomy)
        pair = with_components(pair, reading.samples, finders)
        note_components(pair, notes)
    layers = readable_layers(options, pair, reading)
    run = _run_plan(given, pair, reading)
    lengths = [len(prompt.ids) for prompt in reading.base]
    pair.note_run(max(lengths), notes)
    check_positions(run.position, lengths, notes)
    prefix_plan = PrefixPlan(run.position, run.batch_tokens, reading.pad_ids[0], _whole_prompts(run, pair))
    # It runs prompts, so it comes after the checks that refuse them.
    run = replace(run, n_prefix=share_prefix(pair, reading.base, prefix_plan, notes))
    # Of a model alone nothing is compared, so nothing is told of what is not.
    scope = find_scope(pair, reading, Notes() if pair.is_alone else notes)
    if run.localize and not options.localize:
        told = f"one of the two is quantised: what each block costs was measured too ({option('localize')})"
        notes.add("quantised-pair", told)
    settings = _settings(given, pair, run)
    scored = None if pair.scored is None else pair.scored.plan
    plan = Plan(prompt_records(reading), settings, run.traced, scope.outcomes, run.repeats, scored)
    return Prepared(given, pair, reading, run, pair_facts(pair, scope), plan, notes, layers)


def _whole_prompts(run: RunPlan, pair: ModelPair) -> str | None:
    """Return why a prefix that prompts have in common runs with each of them; None where it need not."""
    if pair.is_alone:
        return "a recording has every token of a prompt"
    if run.localize:
        return f"{option('localize')} runs blocks twice, and a cache takes a token in once"
    if pair.base_conventions.components is not None:
        return f"{option('sites', 'all')} looks into blocks at every token of a prompt"
    return None if pair.scored is None else "scores and embeddings are made of whole prompts"


def _note_precision(model: LoadedModel, notes: Notes) -> None:
    """Note that the caller has set the precision of float32 products on a CPU, where that is so."""
    if model.run_dtype != "float32" or model.device.type != "cpu":
        return
    settings: Any = torch.backends.mkldnn
    if hasattr(settings, "matmul"):
        above = settings.fp32_precision  # a setting of matmul could not be told from this one
        precision = settings.matmul.fp32_precision if above == "none" else above
        is_set = precision not in ("none", "ieee") or above != "none"
    else:  # a torch that has only the older setting
        precision = torch.get_float32_matmul_precision()
        is_set = precision != "highest"
    if is_set:
        notes.add(
            "float32-precision",
            f"torch's precision of float32 products was set to {precision} before the run and was left so: "
            "the differences may be those of rounding",
        )


def _run_plan(given: Given, pair: ModelPair, reading: Reading) -> RunPlan:
    """Return what is run, with what `auto` comes to."""
    options, position = given.options, _position(given.options, pair)
    return RunPlan(
        base_prompts=reading.base,
        finetuned_prompts=reading.finetuned,
        pad_ids=reading.pad_ids,
        batch_tokens=given.batch_tokens,
        position=position,
        localize=options.localize or _is_quantised_alone(pair),
        # States of two widths have no distance that noise could be held against.
        noise_floor=not options.no_noise_floor and pair.same_width,
        seed=options.seed,
        token_prompts=token_prompts(options, position) if pair.same_width else [],
    )


def _is_quantised_alone(pair: ModelPair) -> bool:
    """Return whether one of two models of one design is quantised, and the question is what a layer costs."""
    ours, theirs = pair.base, pair.finetuned
    runs_alike = pair.same_design and ours.run_dtype == theirs.run_dtype
    return runs_alike and _is_dequantised(ours) != _is_dequantised(theirs)


def _is_dequantised(model: LoadedModel) -> bool:
    """Return whether a model runs on plain weights that were made of a quantiser's codes."""
    if model.source is None or not model.source.gguf_file:
        return model.codes is not None
    return model.stored_dtype not in _PLAIN_GGUF


def _position(options: Options, pair: ModelPair) -> Literal["last", "mean", "all", "response"] | int:
    position = parse_position(options.position)
    if position == "auto":
        return "last" if pair.base_conventions.causal else "mean"
    return position


def token_prompts(options: Options, position: Position) -> Literal["auto"] | list[int]:
    """Return the prompts of which every token is kept, where each of several tokens is compared."""
    found = parse_token_prompts(options.token_prompts)
    return [] if position not in EACH_TOKEN or found == "none" else found


def prompt_records(reading: Reading) -> list[PromptRecord]:
    """Return the prompts as a result has them."""
    apart = reading.align == "text"
    return [
        PromptRecord(
            index=index,
            text=prompt.text,
            group=prompt.group,
            n_tokens=len(base.ids),
            rendered=base.rendered,
            finetuned_n_tokens=len(finetuned.ids) if apart else None,
        )
        for index, (prompt, base, finetuned) in enumerate(
            zip(reading.prompts, reading.base, reading.finetuned, strict=True)
        )
    ]


def _attribute(options: Options) -> Literal["blocks", "tensors"] | None:
    chosen: tuple[Literal["blocks", "tensors"], ...] = ("blocks", "tensors")
    return next((each for each in chosen if each == options.attribute), None)


def _settings(given: Given, pair: ModelPair, run: RunPlan) -> Settings:
    """Every option that the run used."""
    options = given.options
    return Settings(
        position=str(run.position),
        threshold=options.threshold,
        dtype=pair.base.run_dtype,
        device=str(given.device),
        batch_tokens=run.batch_tokens,
        chat_template=options.chat_template,
        memory="resident" if pair.base.pager is None else "stream",
        dequantize=options.dequantize,
        align=pair.align,
        localize=run.localize,
        sites="all" if options.sites == "all" else "blocks",
        attribute=_attribute(options),
        readout=options.readout,
        noise_floor=run.noise_floor,
        noise_from=options.noise_from,
        fail_above=options.fail_above,
        expect=options.expect,
        only_compared=options.only_compared,
        no_split=options.no_split,
        truncate=options.truncate,
        layers_path=options.layers_path,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        no_digests=options.no_digests,
        work_dir=options.work_dir,
        anonymous=options.anonymous,
        token_prompts=options.token_prompts if run.position in EACH_TOKEN else None,
    )
