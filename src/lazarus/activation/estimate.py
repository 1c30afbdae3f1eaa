"""Estimates of activation_diff and record: their own code on stand-ins for models, on a few batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch

from lazarus.activation.flops import flops_of_run
from lazarus.activation.measure import FEWER_IF_STREAMED
from lazarus.activation.record_trial import RecordTrial
from lazarus.activation.run import Prompts, given_for
from lazarus.activation.trial import DiffTrial, Trial
from lazarus.errors import UsageError
from lazarus.estimating import device_peak, peak_bytes
from lazarus.loading import Model
from lazarus.messages import option
from lazarus.models import Clock
from lazarus.options import OptionArguments, Options, RecordArguments, RecordOptions
from lazarus.ranks import Rank
from lazarus.recorded import opened
from lazarus.recordings import Recording
from lazarus.recordings.llama_cpp import RUNTIME
from lazarus.results import Estimate, EstimatedPart
from lazarus.scratch import ScratchFolder
from lazarus.shards import FEWEST_SHARDS

ATTRIBUTION_PASSES, ATTRIBUTION_MEMORY = 14.2, 1.6
"""the passes of base that `attribute` takes with four points, and its memory as a factor, as measured for
docs/attribution.md"""


def estimate_run(
    base: Model,
    finetuned: Model,
    prompts: Prompts | None,
    *,
    tokenizer: Any | None = None,
    start_seconds: float = 0.0,
    **options: Unpack[OptionArguments],
) -> Estimate:
    """Estimate what `activation_diff` would take on this machine; no weights are loaded.

    The prompts are read, and some of their batches run through models of random weights, of which a few
    blocks alone are in memory. That takes some seconds.

    Args:
        base: as for `activation_diff`, and so are `prompts`, `tokenizer` and `options`; no model in memory.
        finetuned: the same.
        start_seconds: what comes before, such as the imports of a process; it is told as a part of the run.

    Returns:
        Bytes read, peak memory, floating-point operations and seconds, in all and by parts.

    Raises:
        UsageError: a model is in memory, or as for `activation_diff`.
        UnsupportedModelError: a model is built only from its weights, or as for `activation_diff`.
        LazarusError: as `activation_diff`.
    """
    chosen = Options.make(**options)
    if prompts is None or any(isinstance(opened(model), Recording) for model in (base, finetuned)):
        raise UsageError(
            "an estimate is of two models that run, and one of these is a recording: its states are read. "
            "Estimate the run of the other model, with itself as the fine-tuned one."
        )
    # No folder is made, and no work shared: the estimate is of one process that runs all.
    given = given_for((base, finetuned), prompts, tokenizer, Rank(), replace(chosen, work_dir=None))
    with given.running():
        trial = DiffTrial(given, (base, finetuned), Clock(given.device))
        if chosen.attribute is not None:
            trial.time_base()
        return estimated("activation-diff", trial, chosen, start_seconds)


def estimate_record(
    model: Model,
    prompts: Prompts,
    *,
    tokenizer: Any | None = None,
    start_seconds: float = 0.0,
    **options: Unpack[RecordArguments],
) -> Estimate:
    """Estimate what `record` would take on this machine; no weights are loaded.

    Args:
        model: as for `record`, and so are `prompts`, `tokenizer` and `options`; no model in memory.
        prompts: the same.
        start_seconds: as for `estimate_run`.

    Raises:
        LazarusError: as `estimate_run`.
    """
    chosen = RecordOptions.make(**options)
    if chosen.runtime == RUNTIME:
        raise UsageError(
            f"{option('runtime', RUNTIME)}: what llama.cpp takes is not known: an estimate runs blocks of "
            "transformers. Record a few prompts instead.",
            option="runtime",
        )
    of_pair = chosen.of_pair()
    given = given_for((model, model), prompts, tokenizer, Rank(), replace(of_pair, work_dir=None))
    with given.running(), ScratchFolder() as folder:
        trial = RecordTrial(given, model, Clock(given.device), chosen, folder.path)
        return estimated("record", trial, of_pair, start_seconds)


def estimated(command: str, trial: Trial[Any], chosen: Options, start_seconds: float) -> Estimate:
    """Run a trial, and return what all of the run would take."""
    device = trial.given.device
    trial.run()
    peak, on_device = peak_bytes(), device_peak(device)
    flops = flops_of_run(trial.job(lambda _: None), trial.work, trial.clock)
    parts = list(_parts(trial, chosen, start_seconds))
    pair, run = trial.pair, trial.prepared.run
    return Estimate(
        command=command,
        base=pair.base.name,
        finetuned=None if pair.is_alone else pair.finetuned.name,
        mode="stream" if pair.base.pager is not None else "resident",
        dtype=pair.base.run_dtype,
        device=str(device),
        n_threads=torch.get_num_threads(),
        n_prompts=len(run.base_prompts),
        n_tokens=sum(len(prompt.ids) for prompt in run.base_prompts),
        n_batches=len(trial.work.batches),
        bytes_read=_bytes_read(trial, chosen),
        bytes_written=trial.bytes_written,
        peak_bytes=_peak(trial, chosen, peak) if on_device is None else peak + trial.found.growth,
        device_bytes=None if on_device is None else _peak(trial, chosen, on_device),
        flops=flops,
        seconds=sum(part.seconds for part in parts),
        parts=parts,
        remarks=list(_remarks(trial, chosen)),
    )


def _parts(trial: Trial[Any], chosen: Options, start_seconds: float) -> Iterator[EstimatedPart]:
    found, each_model = trial.found, trial.standing.each
    loading = sum(
        each.opening_seconds if trial.standing.streams else each.loading_seconds for each in each_model
    )
    seconds = {
        "start": start_seconds,
        "loading": loading,
        "prompts and probes": found.learning,
        "passes and metrics": found.passes,
        "noise": found.noise,
        "attribution": ATTRIBUTION_PASSES * found.base_passes if chosen.attribute else 0.0,
        "result": found.conclusion,
    }
    for name, each in seconds.items():
        if each:
            yield EstimatedPart(name=name, seconds=each)


def _bytes_read(trial: Trial[Any], chosen: Options) -> int:
    pair = trial.standing.each
    adapters = sum(each.adapter_bytes for each in pair)
    if not trial.standing.streams:
        return adapters + sum(each.size.files for each in pair)
    # Each shard of a shared run reads all blocks once.
    most = FEWEST_SHARDS // FEWER_IF_STREAMED if chosen.work_dir is not None else 1
    n_parts = len(trial.work.cut(most)) if most > 1 else 1
    return adapters + trial.learnt_bytes + n_parts * trial.run_bytes


def _peak(trial: Trial[Any], chosen: Options, measured: int) -> int:
    """Return the peak of memory: that of the stand-ins' run, with the models in their place."""
    each = trial.standing.each
    sizes = [one.size for one in each]
    around = measured - sum(one.held for one in each)
    around += trial.found.growth if trial.given.device.type == "cpu" else 0
    if trial.standing.streams:
        # Two blocks of each model: one computes while the next one is read. At the end what is outside of
        # blocks is read once more, to see whether the weights are the same.
        blocks, rest = 2 * sum(max(size.blocks) for size in sizes), sum(size.rest for size in sizes)
        read_again = 0 if trial.pair.is_alone else rest
        return around + rest + max(blocks, read_again) + trial.waiting_bytes
    running = around + sum(size.whole for size in sizes)
    if chosen.attribute is not None:
        running = round(running * ATTRIBUTION_MEMORY)
    return running


def _remarks(trial: Trial[Any], chosen: Options) -> Iterator[str]:
    finetuned = trial.standing.each[-1]
    if finetuned.is_over and finetuned.size.files:
        yield "tensors that both checkpoints hold alike are found by the run, and make it take less"
    if chosen.attribute is not None:
        rule = f"{ATTRIBUTION_PASSES:g} passes of base, and {ATTRIBUTION_MEMORY:g} times the memory"
        yield f"{option('attribute', chosen.attribute)} is in it by a rule: {rule}; its operations are not"
    if chosen.work_dir is not None:
        alone = "one process that begins anew, without what the folder itself takes"
        yield f"{option('work_dir')} is in it as {alone}"
    if not trial.knows_peak:
        yield "the memory is no less than what this process has held before: here that cannot be told apart"
    yield "what is not in the system's cache is read more slowly than what was tried here"
    if not chosen.no_digests:
        yield "the digests of the models' files are not in it: they are computed beside the run, and kept"
    yield "saving results is not in it"
