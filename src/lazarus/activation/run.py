"""activation_diff: the same prompts through both models, compared block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from lazarus.activation.accumulation import Accumulation, Plan
from lazarus.activation.attributed import Attributed
from lazarus.activation.attribution import attribute
from lazarus.activation.breaks import note_breaks
from lazarus.activation.live import facts_after, weight_facts
from lazarus.activation.measure import Job, measure
from lazarus.activation.mined import mined_tokens
from lazarus.activation.prepare import Given, Observer, Prepared, prepare, take_up
from lazarus.activation.readers import TokenReader
from lazarus.activation.readout import read_differences
from lazarus.activation.recorded import compare_recorded
from lazarus.activation.result import About, conclude
from lazarus.errors import UsageError
from lazarus.facts import PairFacts
from lazarus.loading import Model, Role, pick_device
from lazarus.messages import option
from lazarus.models import find_tokenizer
from lazarus.notes import Note, Notes
from lazarus.options import OptionArguments, Options, check_token_prompts, read_template
from lazarus.prompts import Prompt, PromptList, check_chats, check_responses, make_prompts
from lazarus.provenance import environment
from lazarus.ranks import Rank, find_rank
from lazarus.recorded import opened
from lazarus.recordings import Recording, check_brought
from lazarus.result_classes import ActivationDiff
from lazarus.shards import WorkFolder
from lazarus.sites import StatePair
from lazarus.tokens import token_text

Prompts = str | Path | Mapping[str, Any] | Prompt | Iterable[str | Mapping[str, Any] | Prompt] | PromptList


class Silence:
    """An observer that tells nobody."""

    def loading(self, role: Role, name: str) -> None:
        """Ignore it."""

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Ignore it."""

    def running(self, n_tokens: int) -> None:
        """Ignore it."""

    def advanced(self, n_tokens: int) -> None:
        """Ignore it."""


def activation_diff(
    base: Model,
    finetuned: Model,
    prompts: Prompts | None = None,
    *,
    tokenizer: Any | None = None,
    observer: Observer | None = None,
    rank: Rank | None = None,
    **options: Unpack[OptionArguments],
) -> ActivationDiff:
    """Run the same prompts through two models and compare their hidden states layer by layer.

    Args:
        base: a Hub id, a folder, a `.gguf` file, MODEL+ADAPTER, a recording, or a transformers model in
            memory.
        finetuned: the same; an adapter alone runs on top of `base`.
        prompts: texts, or mappings with the fields of a `.jsonl` row (`prompt`, `text` or `messages`,
            `response`, and `group`). One string is read as the command line's `-p`, a `Path` as a file of
            prompts. None for those of a recording.
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
    watcher = observer or Silence()
    sides = opened(base), opened(finetuned)
    is_recorded = any(isinstance(side, Recording) for side in sides)
    if "noise_from" in options and options["noise_from"] is not None and not is_recorded:
        raise UsageError(
            f"{option('noise_from', options['noise_from'])} is another recording of base, for a comparison "
            "with a recording, and neither model is one. Leave it out.",
            option="noise_from",
        )
    check_brought(prompts, (base, finetuned))
    given = given_for((base, finetuned), prompts, tokenizer, rank or find_rank(), Options.make(**options))
    if is_recorded:
        return compare_recorded(given, *sides, watcher)
    prepared = prepare(given, base, finetuned, watcher)
    with given.running():
        return _compare(prepared, watcher)


def iter_state_pairs(
    base: Model,
    finetuned: Model,
    prompts: Prompts,
    *,
    tokenizer: Any | None = None,
    with_noise: bool = False,
    **options: Unpack[OptionArguments],
) -> StatePairs:
    """Run the same prompts through two models and yield the states of both, site by site.

    Args:
        base: as for `activation_diff`, and so are `finetuned`, `prompts`, `tokenizer` and `options`.
        with_noise: whether trials of the noise come too: base against base, with their number as `trial`.

    Returns:
        What can be iterated once: a `StatePair` for each batch and site, [rows, width] of each model, in the
        dtype of the run and on its device. The order is that of the batches, or of the layers where the
        models are streamed. `facts` and `plan` are what `Accumulation` takes.

    Raises:
        LazarusError: as `activation_diff`; also while it is iterated.
    """
    # `Rank()`: whoever iterates gets every pair, also in one process of several.
    given = given_for((base, finetuned), prompts, tokenizer, Rank(), Options.make(**options))
    prepared = prepare(given, base, finetuned, Silence())

    def pairs() -> Iterator[StatePair]:
        with given.running():
            # `run` is bound below, before anyone can ask for the first pair.
            for pair in Job(prepared.pair, run, lambda _: None).run_all():
                yield from run.repeats.spread(pair) if pair.trial is None else [pair]

    run = replace(prepared.run, noise_floor=with_noise and prepared.run.noise_floor)
    # Without repeats: each prompt comes with rows of its own by now.
    return StatePairs(prepared.facts, replace(prepared.plan, repeats=None), pairs())


@dataclass(frozen=True)
class StatePairs:
    """Pairs of states that come while two models run, and what is known of them before."""

    facts: PairFacts
    plan: Plan
    _pairs: Iterator[StatePair]

    def __iter__(self) -> Iterator[StatePair]:
        return self._pairs


def given_for(
    models: tuple[Model, Model],
    prompts: Prompts | None,
    tokenizer: Any | None,
    rank: Rank,
    chosen: Options,
) -> Given:
    """Check what the caller has given, before anything is loaded."""
    found = PromptList()
    if prompts is not None:
        found = make_prompts(prompts, no_split=chosen.no_split, responses=chosen.position == "response")
    template = read_template(chosen)
    check_chats(found.prompts, chosen.chat_template)
    check_responses(found.prompts, chosen.position)
    if prompts is not None:
        check_token_prompts(chosen.token_prompts, len(found.prompts))
    folder = _open_folder(chosen, rank)
    device = pick_device(chosen.device, rank)
    tokenizer = find_tokenizer(tokenizer, trust_remote_code=chosen.trust_remote_code)
    # A model in memory has no files from which its blocks could be read.
    by_name = not any(isinstance(model, nn.Module) for model in models)
    return Given(chosen, found, template, tokenizer, folder, device, by_name)


def _compare(prepared: Prepared, watcher: Observer) -> ActivationDiff:
    """Run two models that are prepared, and conclude."""
    # Before anything runs: a folder of another run is refused here.
    take_up(prepared, prepared.run)
    seen = Accumulation(prepared.facts, prepared.plan)
    job = Job(prepared.pair, prepared.run, watcher.advanced)
    on_shards = measure(job, prepared.given.folder, seen, watcher.running)
    return concluded(prepared, seen, watcher, on_shards)


def concluded(
    prepared: Prepared, seen: Accumulation, watcher: Observer, on_shards: Iterable[Note] = ()
) -> ActivationDiff:
    """Return the result of two live models that have run, with what their weights tell."""
    given, pair = prepared.given, prepared.pair
    # Apart, because `breaks` is the error message where no state at all is finite.
    notes, breaks = Notes(prepared.notes), Notes()
    pair.note_common(notes)
    prepared.run.note(notes)
    notes.extend(on_shards)
    attributed = _attributed(prepared, seen, watcher, notes) if given.options.attribute else None
    return conclude_run(prepared, seen, attributed, (notes, breaks))


def conclude_run(
    prepared: Prepared, seen: Accumulation, attributed: Attributed | None, told: tuple[Notes, Notes]
) -> ActivationDiff:
    """Return the result of what was accumulated: `told` are the notes, and those on states not finite."""
    given, pair, reading, layers = prepared.given, prepared.pair, prepared.reading, prepared.readout_layers
    notes, breaks = told
    seen.facts = facts_after(pair, seen.facts, breaks, notes)
    note_breaks(pair, seen, reading, breaks)
    text_of = partial(token_text, reading.tokenizers[0])
    about = About(
        environment=environment(given.device),
        notes=notes,
        breaks=breaks,
        attributed=attributed,
        mined=mined_tokens(seen, text_of, notes) if layers else None,
        readout=read_differences(pair, seen, layers, reading.tokenizers) if layers else None,
        reader=TokenReader(reading, prepared.run.position),
        chooses_prompts=given.options.token_prompts == "auto",
    )
    return conclude(seen, weight_facts(pair, seen), about)


def _attributed(prepared: Prepared, seen: Accumulation, watcher: Observer, notes: Notes) -> Attributed | None:
    """Attribute the change of the output; what the run has measured in float32 is not measured again."""
    known = None
    if prepared.pair.base.run_dtype == prepared.pair.finetuned.run_dtype == "float32":
        kl = seen.output.means()["kl_base_finetuned"]
        known = kl if np.isfinite(kl).all() else None
    found = attribute(prepared.pair, prepared.run, prepared.given.options, watcher, known)
    if found is None:
        notes.add(
            "no-attribution",
            "the change of the output was not attributed: KL(base‖fine-tuned) is not finite on every prompt",
        )
    elif found.is_rough:
        notes.add(
            "rough-attribution",
            f"with {found.n_points} points the parts add up to {found.total:.4g} nats of "
            f"{float(found.kl.mean()):.4g}: shares are rough",
        )
    return found


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
            f"Give one that all of them see: {option('work_dir', 'DIR')}. To run this one alone, unset RANK, "
            "WORLD_SIZE, SLURM_PROCID and SLURM_NTASKS.",
            option="work_dir",
        )
    return None
