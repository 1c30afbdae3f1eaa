"""Two models and the prompts → the token ids that each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lazarus.errors import PairError, PromptDataError
from lazarus.messages import option
from lazarus.models import (
    ChatTemplate,
    LoadedModel,
    load_tokenizer,
    render_chats,
    render_responses,
    uncached_tokenizer,
)
from lazarus.notes import Notes
from lazarus.options import Options
from lazarus.prompts import Prompt
from lazarus.responses import Responses, mark_responses
from lazarus.tokens import TokenizedPrompt, TokenOptions, listed, tokenize_pair

Models = tuple[LoadedModel, LoadedModel]

SAMPLE_PROMPTS = 16


@dataclass(frozen=True)
class Asked:
    """The prompts as the caller gave them, and what turns them into tokens."""

    prompts: Sequence[Prompt]
    tokenizer: Any | None = None
    """stands in for both models' own"""
    template: str | None = None
    """the text of a chat template from a file"""


@dataclass(frozen=True)
class Reading:
    """The prompts as each model reads them: one list for both, unless they are aligned by their text."""

    prompts: Sequence[Prompt]
    base: Sequence[TokenizedPrompt]
    finetuned: Sequence[TokenizedPrompt]
    tokenizers: tuple[Any, Any]
    align: Literal["ids", "text"]

    @property
    def pad_ids(self) -> tuple[int, int]:
        """Return what each one's batches are padded with. Any id will do: it is masked and never compared."""
        base, finetuned = (
            next((i for i in (t.pad_token_id, t.eos_token_id) if isinstance(i, int)), 0)
            for t in self.tokenizers
        )
        return base, finetuned

    @property
    def samples(self) -> tuple[list[int], list[int]]:
        """Some ids of real text for each model."""
        base, finetuned = (
            [token for prompt in side[:SAMPLE_PROMPTS] for token in prompt.ids]
            for side in (self.base, self.finetuned)
        )
        return base, finetuned

    def note_apart(self, notes: Notes) -> None:
        """Note where each model read the texts with its own tokenizer."""
        if self.align == "ids":
            return
        differing = sum(b.ids != f.ids for b, f in zip(self.base, self.finetuned, strict=True))
        notes.add(
            "own-tokenizers",
            f"each model read the texts with its own tokenizer: {differing} of {len(self.base)} prompts have "
            "other ids; next-token distributions over two vocabularies are not compared",
        )


def read_prompts(models: Models, asked: Asked, options: Options, notes: Notes) -> Reading:
    """Tokenise the prompts for both models.

    Raises:
        PairError: neither model brings a tokenizer, or the two give different ids.
        ChatTemplateError: there is no such template, or it fails on a prompt.
        PromptDataError: a prompt is empty, too long, or has ids that a model has no embedding for.
        PositionError: responses are compared, and that of a prompt is not found in what the models read.
    """
    prompts, given = asked.prompts, asked.tokenizer
    tokenizers = (given, given) if given is not None else _tokenizers(models, options, notes)
    # Special tokens that a template from a file writes are those of base.
    side = 1 if options.chat_template == "finetuned" else 0
    owner = models[side].name if given is None else "the given tokenizer"
    has_template = options.chat_template != "none"
    chat_template = ChatTemplate(tokenizers[side], owner, asked.template) if has_template else None
    written = _write(prompts, chat_template, notes, responses=options.position == "response")
    _note_other_template(tokenizers, options, notes)
    align: Literal["ids", "text"] = "text" if options.align == "text" else "ids"
    contexts = (models[0].anatomy.context, models[1].anatomy.context)
    token_options = TokenOptions(contexts, options.truncate, align)
    base, finetuned = tokenize_pair(written.prompts, tokenizers, token_options, notes, written.rendered)
    if written.responses is not None:  # one reading for both: `align` is `ids`
        base = finetuned = mark_responses(base, written.responses, tokenizers[0])
    for model, tokenized in zip(models, (base, finetuned), strict=True):
        check_vocabulary(model, tokenized)
        model.finish_reading()
    return Reading(prompts, base, finetuned, tokenizers, align)


def _tokenizers(models: Models, options: Options, notes: Notes) -> tuple[Any, Any]:
    """Return each model's tokenizer; one that brings none is read with the other's."""
    base = load_tokenizer(models[0], trust_remote_code=options.trust_remote_code)
    finetuned = base
    if models[1] is not models[0]:
        finetuned = load_tokenizer(models[1], trust_remote_code=options.trust_remote_code)
    if base is None and finetuned is None:
        for model in models:
            if (why := uncached_tokenizer(model)) is not None:
                raise PairError(f"{model.name}: {why}")
        raise PairError(
            f"neither {models[0].name} nor {models[1].name} brings a tokenizer. Put the tokenizer's "
            "files beside the weights or, from Python, give a tokenizer."
        )
    for own, model in zip((base, finetuned), models, strict=True):
        if own is None:
            lack = (
                "brings no tokenizer"
                if uncached_tokenizer(model) is None
                else "has no tokenizer in the cache"
            )
            told = f"{model.name} {lack}; the other model's was used for both"
            notes.add("missing-tokenizer", told, model=model.name)
    return finetuned if base is None else base, base if finetuned is None else finetuned


@dataclass(frozen=True)
class _Written:
    """The prompts as texts for the tokenizers: their own or what a chat template made of them."""

    prompts: Sequence[Prompt]
    rendered: list[str] | None = None
    responses: Responses | None = None


def _write(
    prompts: Sequence[Prompt], template: ChatTemplate | None, notes: Notes, *, responses: bool
) -> _Written:
    """Return the prompts as texts, with their responses if they are asked for; what is left out is noted."""
    if not responses:
        prompts = _without_responses(prompts, notes)
    if template is None:
        _note_left_out(prompts, notes)
        if not responses:
            return _Written(prompts)
        texts = [f"{prompt.text}{prompt.response}" for prompt in prompts]
        spans = [[(len(p.text), len(text))] for p, text in zip(prompts, texts, strict=True)]
        whole = [replace(prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]
        return _Written(whole, None, Responses(texts, spans, special=True))
    if responses:
        rendered, found, remarks = render_responses(prompts, template)
    else:
        rendered, remarks = render_chats(prompts, template)
    for remark, indices in remarks.items():
        if indices:
            told = f"{remark}: prompts {listed(indices)} ({len(indices)} of {len(prompts)})"
            notes.add("chat-template", told, prompts=indices)
    return _Written(prompts, rendered, Responses(rendered, found, special=False) if responses else None)


def _without_responses(prompts: Sequence[Prompt], notes: Notes) -> Sequence[Prompt]:
    """Return the prompts alone; that they have responses is noted."""
    having = [index for index, prompt in enumerate(prompts) if prompt.response is not None]
    if not having:
        return prompts
    which = f"prompts {listed(having)} ({len(having)} of {len(prompts)})"
    told = (
        f"responses are left out, which {option('position', 'response')} of activation-diff compares: {which}"
    )
    notes.add("prompt-rows", told, prompts=having)
    return [replace(prompt, response=None) for prompt in prompts]


def _note_left_out(prompts: Sequence[Prompt], notes: Notes) -> None:
    """Note what the rows have for a chat template, where there is none."""
    without = [index for index, prompt in enumerate(prompts) if prompt.for_template]
    if without:
        names = ", ".join(sorted({f"`{name}`" for prompt in prompts for name in prompt.for_template}))
        which = f"prompts {listed(without)} ({len(without)} of {len(prompts)})"
        notes.add(
            "chat-template",
            f"without {option('chat_template')} the rows' {names} are left out: {which}",
            prompts=without,
        )


def _note_other_template(tokenizers: tuple[Any, Any], options: Options, notes: Notes) -> None:
    """Note where both models bring a chat template, and not the same."""
    ours, theirs = (getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers)
    if options.chat_template not in ("base", "finetuned") or not ours or not theirs or ours == theirs:
        return
    notes.add(
        "chat-templates-differ",
        f"the two models bring different chat templates: both read the prompts in that of "
        f"{'base' if options.chat_template == 'base' else 'fine-tuned'}",
    )


def check_vocabulary(model: LoadedModel, tokenized: Sequence[TokenizedPrompt]) -> None:
    """Refuse prompts with ids that a model has no embedding for.

    Raises:
        PromptDataError: it names the first one.
    """
    table = model.model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    for prompt in tokenized:
        if size is not None and max(prompt.ids) >= size:
            raise PromptDataError(
                f"Prompt {prompt.index} has the token id {max(prompt.ids)}, and {model.name} has "
                f"embeddings for {size}. Its tokenizer belongs to another model: use its own."
            )
