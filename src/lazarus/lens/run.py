"""compare: one prompt through both models, and the logit lens on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

from lazarus.blame import MemoryFaults
from lazarus.engine import Conventions, broken_weights, learn, note_of_weights
from lazarus.errors import PromptsError
from lazarus.lens.lens import Lens
from lazarus.lens.live import Observer, Silence, look_at
from lazarus.lens.parting import cut_at_parting
from lazarus.lens.record import LensFacts, make_record
from lazarus.lens.recorded import AskedOfRecording, compare_recorded
from lazarus.loading import Model, Work, less_memory, load_models, pick_device
from lazarus.models import LoadedModel, find_tokenizer, same_design
from lazarus.notes import Notes
from lazarus.options import CompareArguments, CompareOptions, Options, read_template
from lazarus.prompts import ASSISTANT, Prompt, PromptList, check_chats, make_prompts
from lazarus.ranks import Rank
from lazarus.reading import Asked, Reading, read_prompts
from lazarus.recorded import opened
from lazarus.recordings import Recording, check_brought
from lazarus.result_classes import Comparison


def compare(
    model1: Model,
    model2: Model,
    prompt: str | Mapping[str, Any] | Prompt | PromptList | None = None,
    *,
    tokenizer: Any | None = None,
    observer: Observer | None = None,
    **options: Unpack[CompareArguments],
) -> Comparison:
    """Read what two models would say after each layer: the logit lens, side by side, for one prompt.

    Args:
        model1: a Hub id, a folder, a `.gguf` file, MODEL+ADAPTER, or a transformers model in memory; or a
            recording, whose states are read through the final norm and the LM head of the other model.
        model2: the same; an adapter alone runs on top of `model1`.
        prompt: a text, taken whole, or a mapping with the fields of a `.jsonl` row, such as a chat in
            `messages`; what comes after its last token is read. None for the one prompt of a recording.
        tokenizer: the tokenizer of models in memory, or a folder or Hub id that holds it; it stands in for
            both models' own.
        observer: is told how far the run has come.
        options: the command line's options, with underscores: `top_k=10`, `track=["Paris", "Rome"]`.

    Returns:
        For each model and layer the most probable next tokens; for each tracked token its probability and
        rank (from 1) at every layer, and the layer from which it is the first choice to the end; for each
        layer of model 1 and its counterpart KL and Jensen-Shannon divergence in nats; and notes on what was
        assumed.

    Raises:
        UsageError: an option or the prompt is wrong.
        ModelError: a model cannot be loaded, predicts no next token, or cannot be read layer by layer.
        PairError: neither model brings a tokenizer.
        PromptDataError: the prompt does not fit the models.
        RecordingError: a recording lacks the prompt, or the states of its last token.
        NoDataError: the logits of a model are finite at no layer.
        DeviceError: memory ran out, or the device lacks an operator.
    """
    chosen = CompareOptions.make(**options)
    check_brought(prompt, (model1, model2))
    found = None if prompt is None else _one_prompt(prompt, chosen)
    sides = opened(model1), opened(model2)
    watcher = observer or Silence()
    device = pick_device(chosen.device, Rank())
    tokenizer = find_tokenizer(tokenizer, trust_remote_code=chosen.trust_remote_code)
    if any(isinstance(side, Recording) for side in sides):
        return compare_recorded(sides, AskedOfRecording(found, chosen, tokenizer, device), watcher)
    assert found is not None  # no recording brings one
    asked = Asked(found.prompts, tokenizer, read_template(_of_pair(chosen, found.prompts[0])))
    return _compare_live((model1, model2), asked, chosen, watcher, Notes(found.notes))


def _compare_live(
    named: tuple[Model, Model], asked: Asked, chosen: CompareOptions, watcher: Observer, notes: Notes
) -> Comparison:
    """Compare two models that run."""
    prompt, device = asked.prompts[0], pick_device(chosen.device, Rank())
    of_pair, helps = _of_pair(chosen, prompt), less_memory(chosen.dtype, device, can_stream=False)
    with MemoryFaults(helps):
        models = load_models(named, of_pair, Work(device), watcher.loading, notes)
    with MemoryFaults([*helps, "a shorter prompt"]):
        reading = read_prompts(models, asked, of_pair, notes)
        conventions = _learn(models, reading)
        _note_other_ids(reading, notes)
        if chosen.at == "parting":
            reading = cut_at_parting(models, conventions, reading, notes)
        lenses = _look(models, conventions, reading, watcher)
        broken = [note_of_weights(m, names) for m in models if (names := broken_weights(m))]
        notes.extend(broken)
        return Comparison(make_record(lenses, LensFacts(prompt.text, chosen, device), notes))


def _note_other_ids(reading: Reading, notes: Notes) -> None:
    """Note where one vocabulary was read in two ways, such as with a BOS token and without."""
    base, finetuned = reading.tokenizers
    ours, theirs = reading.base[0].ids, reading.finetuned[0].ids
    if base is finetuned or ours == theirs or base.get_vocab() != finetuned.get_vocab():
        return
    notes.add(
        "other-ids",
        f"the two tokenizers have one vocabulary and read the prompt as other ids ({len(ours)} tokens and "
        f"{len(theirs)}): part of the difference may come of that alone",
    )


def _one_prompt(prompt: str | Mapping[str, Any] | Prompt | PromptList, options: CompareOptions) -> PromptList:
    """The one prompt, in whatever form it was given.

    Raises:
        PromptsError: there is none or more than one, it is empty or no Unicode, or a chat without a template.
    """
    if not isinstance(prompt, str | Mapping | Prompt | PromptList):
        raise PromptsError(f"{prompt!r:.40} is no prompt: give a text, or a mapping as in a .jsonl row.")
    at_parting = options.at == "parting"
    found = prompt if isinstance(prompt, PromptList) else make_prompts([prompt], responses=at_parting)
    if len(found.prompts) != 1:
        raise PromptsError(
            f"-p: {len(found.prompts)} prompts are given, and compare takes one. Give one -p, or a file with "
            "one prompt in it."
        )
    check_chats(found.prompts, options.chat_template)
    return found


def _of_pair(options: CompareOptions, prompt: Prompt) -> Options:
    """Return the options by which the models are loaded and the prompt is read.

    Where the two part is looked for in the response, if there is one.
    """
    found = options.of_pair()
    turns = [message.get("role") for message in prompt.messages or ()]
    if options.at == "parting" and (prompt.response is not None or ASSISTANT in turns):
        return replace(found, position="response", align="ids")
    return found


def _learn(models: tuple[LoadedModel, LoadedModel], reading: Reading) -> tuple[Conventions, Conventions]:
    ours = learn(models[0], reading.samples[0], reading.pad_ids[0])
    alike = same_design(models[0].model, models[1].model)
    # Two models of one design differ in their weights alone, and one probe tells of both.
    return ours, ours if alike else learn(models[1], reading.samples[1], reading.pad_ids[1])


def _look(
    models: tuple[LoadedModel, LoadedModel],
    conventions: tuple[Conventions, Conventions],
    reading: Reading,
    watcher: Observer,
) -> tuple[Lens, Lens]:
    """Each model's lens on the prompt, one model after the other."""
    watcher.running(sum(each.n_layers for each in conventions))
    one, other = (
        look_at(model, known, prompt[0], tokenizer, watcher.advanced)
        for model, known, prompt, tokenizer in zip(
            models, conventions, (reading.base, reading.finetuned), reading.tokenizers, strict=True
        )
    )
    return one, other
