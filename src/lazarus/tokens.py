"""Prompts and two tokenizers → the ids that each model reads: the same for both, or its own reading."""

from __future__ import annotations

import codecs
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import TracebackType
from typing import Any, Literal

from lazarus._transformers import byte_alphabet
from lazarus.blame import is_a_fault, is_ours, is_out_of_memory, one_line
from lazarus.bounds import CHARACTERS_A_TOKEN, LIFT, MOST_CHARACTERS, MOST_GROWN, exceeds
from lazarus.errors import LazarusError, PromptDataError, PromptTooLongError, TokenizerMismatchError
from lazarus.growth import growth_of
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.prompts import Prompt

PORTION = 512


@dataclass(frozen=True)
class TokenOptions:
    """The options by which prompts become ids."""

    contexts: tuple[int | None, int | None] = (None, None)
    """how many tokens base and the fine-tuned model have positions for; None for no limit"""
    truncate: bool = False
    align: Literal["ids", "text"] = "ids"


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's ids, and the text that they are of where that is not the prompt's own."""

    index: int
    ids: Sequence[int]
    rendered: str | None = None
    response: tuple[range, ...] = ()
    """which tokens `position` response compares, in order: those of each response, and the one before it"""


def tokenize_pair(
    prompts: Sequence[Prompt],
    tokenizers: tuple[Any, Any],
    options: TokenOptions,
    notes: Notes,
    rendered: list[str] | None = None,
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    """Return each prompt's ids for base and for the fine-tuned model; what was assumed is noted.

    They are the same list, unless `align` is `text`: then each tokenizer reads the text its own way.
    `rendered` is what a chat template made of the prompts, special tokens and all.

    Raises:
        TokenizerMismatchError: the tokenizers give different ids for one of these prompts.
        PromptTooLongError: a prompt is longer than the context, and `truncate` is off.
        PromptDataError: a prompt has no token.
    """
    base, finetuned = tokenizers
    texts = _Texts(prompts, rendered)
    _check_lengths(texts, tokenizers, options.contexts)
    ours: list[array[int]] = list(_encode(base, texts))
    if options.align == "text" and finetuned is not base:
        theirs: list[array[int]] = list(_encode(finetuned, texts))
        _note_other_special_tokens(tokenizers, rendered, notes)
        _fit(texts, tokenizers, (ours, theirs), options, notes)
        return texts.with_ids(ours), texts.with_ids(theirs)
    if finetuned is not base:
        _check_same(prompts, ours, _encode(finetuned, texts), base, finetuned)
        _compare_vocabularies(base, finetuned, notes)
    _fit(texts, tokenizers, (ours, ours), options, notes)
    tokenized = texts.with_ids(ours)
    return tokenized, tokenized


@dataclass(frozen=True)
class _Texts:
    """The texts that the tokenizers read: the prompts, or what a chat template made of them."""

    prompts: Sequence[Prompt]
    rendered: list[str] | None

    @property
    def special(self) -> bool:
        """Return whether special tokens are added: a chat template has written its own, such as the BOS."""
        return self.rendered is None

    def __len__(self) -> int:
        return len(self.prompts)

    def some(self, indices: Sequence[int]) -> list[str]:
        """The texts of these prompts."""
        return [self.prompts[i].text if self.rendered is None else self.rendered[i] for i in indices]

    def cut(self, index: int, n_characters: int) -> _Texts:
        """The first characters of one text."""
        prompt = self.prompts[index]
        if self.rendered is None:
            return _Texts([replace(prompt, text=prompt.text[:n_characters])], None)
        return _Texts([prompt], [self.rendered[index][:n_characters]])

    def with_ids(self, ids: Sequence[Sequence[int]]) -> list[TokenizedPrompt]:
        """The prompts, tokenised."""
        rendered: Sequence[str | None] = self.rendered or [None] * len(self)
        return [
            TokenizedPrompt(i, found, text) for i, (found, text) in enumerate(zip(ids, rendered, strict=True))
        ]


def _check_lengths(
    texts: _Texts, tokenizers: tuple[Any, Any], contexts: tuple[int | None, int | None]
) -> None:
    """Refuse texts that would take minutes and gigabytes to tokenise, before that is done.

    Raises:
        PromptTooLongError: a text is longer than any context, or a tokenizer makes it so.
    """
    context = max((each for each in contexts if each is not None), default=0)
    most = max(MOST_CHARACTERS, CHARACTERS_A_TOKEN * context)
    factor = max(growth_of(tokenizer) for tokenizer in dict.fromkeys(tokenizers))
    for index, prompt in enumerate(texts.prompts):
        length = len(texts.some([index])[0])
        if exceeds(length, most):
            raise PromptTooLongError(
                f"{_named(index, prompt)} has {length} characters; the context is {context} tokens, and "
                f"{most} characters are the limit. Shorten it. {LIFT}"
            )
        if exceeds(length * factor, MOST_GROWN):
            raise PromptTooLongError(
                f"{_named(index, prompt)} has {length} characters, of each of which a tokenizer may make "
                f"{factor:.3g} (normalizer and pre_tokenizer in tokenizer.json), and {MOST_GROWN} in all are "
                f"the limit. Shorten it, or mend the tokenizer. {LIFT}"
            )


def _fit(
    texts: _Texts,
    tokenizers: tuple[Any, Any],
    readings: tuple[list[array[int]], list[array[int]]],
    options: TokenOptions,
    notes: Notes,
) -> None:
    """Cut what is too long, in place, where that is allowed, and note it; no prompt may be empty.

    Both models read the same: the same first tokens or, where their tokens differ, the same first characters.
    """
    context = min((c for c in options.contexts if c is not None), default=None)
    limits = options.contexts if options.align == "text" else (context, context)
    for index, prompt in enumerate(texts.prompts):
        if not all(ids[index] for ids in readings):
            raise PromptDataError(f"{_named(index, prompt)} has no token at all. Leave it out.")
    cut = []
    for index, prompt in enumerate(texts.prompts):
        lengths = [len(ids[index]) for ids in readings]
        over = [side for side in (0, 1) if lengths[side] > (limits[side] or lengths[side])]
        if not over:
            continue
        if not options.truncate:
            raise PromptTooLongError(
                f"{_named(index, prompt)} has {lengths[over[0]]} tokens; the models' context is "
                f"{limits[over[0]]}. Shorten it, or cut it there with {option('truncate', True)}.",
                option="truncate",
            )
        if readings[0][index] == readings[1][index]:
            readings[0][index] = readings[1][index] = next(_encode(tokenizers[0], texts, [index], context))
        else:
            _cut_apart(texts, tokenizers, readings, limits, index)
        cut.append(index)
    if not cut:
        return
    one_limit = limits[0] == limits[1] or None in limits
    fits = f"what fits both contexts, of {limits[0]} and {limits[1]} tokens"
    where = f"the context of {context} tokens" if one_limit else fits
    told = f"prompts cut to {where}: {listed(cut)} ({len(cut)} of {len(texts)})"
    notes.add("cut-prompts", told, prompts=cut)


def _cut_apart(
    texts: _Texts,
    tokenizers: tuple[Any, Any],
    readings: tuple[list[array[int]], list[array[int]]],
    limits: tuple[int | None, int | None],
    index: int,
) -> None:
    """Cut one prompt to the most characters that fit both contexts; more characters are no fewer tokens."""

    def encoded(n_characters: int) -> list[array[int]]:
        return [next(_encode(tokenizer, texts.cut(index, n_characters))) for tokenizer in tokenizers]

    def is_over(n_characters: int) -> bool:
        pairs = zip(encoded(n_characters), limits, strict=True)
        return any(limit is not None and len(ids) > limit for ids, limit in pairs)

    (text,) = texts.some([index])
    # Each probe encodes a beginning of the text, and about log2 of its length are enough.
    n_characters = bisect_left(range(1, len(text) + 1), True, key=is_over)
    for ids, shorter in zip(readings, encoded(n_characters), strict=True):
        ids[index] = shorter
    if not all(ids[index] for ids in readings):
        raise PromptTooLongError(
            f"{_named(index, texts.prompts[index])} has no beginning that fits the models' contexts of "
            f"{limits[0]} and {limits[1]} tokens. Leave it out."
        )


def _encode(
    tokenizer: Any, texts: _Texts, indices: Sequence[int] | None = None, most: int | None = None
) -> Iterator[array[int]]:
    """The ids of each text, cut to `most`; in portions, since a tokenizer keeps what one call needed."""
    indices = range(len(texts)) if indices is None else indices
    for start in range(0, len(indices), PORTION):
        portion = indices[start : start + PORTION]
        with TokenizerFaults.of(portion[0], portion[-1]):
            yield from encode(tokenizer, texts.some(portion), special=texts.special, most=most)


def encode(
    tokenizer: Any, texts: Sequence[str], *, special: bool, most: int | None = None
) -> list[array[int]]:
    """Return the ids of each text, with special tokens around it where that is asked for, cut to `most`."""
    with _cut_at_the_end(tokenizer):
        encoded = tokenizer(
            list(texts),
            add_special_tokens=special,
            # A tokenizer.json may carry a fixed padding or truncation: both are said here, always.
            padding=False,
            truncation=most is not None,
            max_length=most,
        )
    # 4 bytes a token: a list of Python integers takes several times that.
    return [array("i", ids) for ids in encoded["input_ids"]]


@contextmanager
def _cut_at_the_end(tokenizer: Any) -> Iterator[None]:
    """Make a tokenizer cut a text at its end: those of some chat models would cut the beginning."""
    before = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = before


@dataclass(frozen=True)
class TokenizerFaults:
    """A call of a tokenizer, for `what`: some prompts, or a token that is shown."""

    what: str

    @classmethod
    def of(cls, first: int, last: int) -> TokenizerFaults:
        """Return the context of a call for the prompts from `first` to `last`."""
        return cls(f"Prompt {first}" if first == last else f"Prompts {first} to {last}")

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LazarusError) or not is_a_fault(error):
            return
        if kind is Exception:  # what tokenizers, written in Rust, raises; no except clause can name it
            raise PromptDataError(
                f"{self.what}: the tokenizer fails: {error}. It has no token for a part of the text: leave "
                "the prompt out, or mend tokenizer.json."
            ) from error
        if not isinstance(error, Exception) or not (is_out_of_memory(error) or is_ours(error)):
            raise PromptDataError(
                f"{self.what}: the tokenizer fails: {type(error).__name__}: {one_line(error)}. Mend its "
                "files, or fetch them again."
            ) from error


def _note_other_special_tokens(
    tokenizers: tuple[Any, Any], rendered: Sequence[str] | None, notes: Notes
) -> None:
    """Note where a template wrote special tokens that the other model calls otherwise."""
    names = [(t.bos_token, t.eos_token) for t in tokenizers]
    own = {name for pair in zip(*names, strict=True) if pair[0] != pair[1] for name in pair if name}
    if not any(name in text for text in rendered or () for name in own):
        return
    ours, theirs = (" and ".join(repr(name) for name in side) for side in names)
    notes.add(
        "special-tokens",
        f"the two tokenizers begin and end a text with other tokens ({ours}; {theirs}), and both models read "
        "those that the chat template wrote",
    )


def _check_same(
    prompts: Sequence[Prompt],
    base_ids: Sequence[Sequence[int]],
    finetuned_ids: Iterable[Sequence[int]],
    base: Any,
    finetuned: Any,
) -> None:
    for index, (ours, theirs) in enumerate(zip(base_ids, finetuned_ids, strict=True)):
        if ours == theirs:
            continue
        place, (left, right) = next(
            (i, pair) for i, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1]
        )
        raise TokenizerMismatchError(
            f"{_named(index, prompts[index])}: the two tokenizers give different ids. At token {place} "
            f"base has {_token(base, left)}, fine-tuned has {_token(finetuned, right)}. States can be "
            "compared token by token only on the same ids: use the same tokenizer files in both "
            "folders if the vocabulary is the same, leave out the prompts that differ, or compare where "
            f"the texts end with {option('align', 'text')}.",
            option="align",
        )


def _token(tokenizer: Any, token_id: int | None) -> str:
    if token_id is None:
        return "no token"
    return f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"


def _compare_vocabularies(base: Any, finetuned: Any, notes: Notes) -> None:
    ours, theirs = base.get_vocab(), finetuned.get_vocab()
    if ours == theirs:
        return
    differing = sum(ours.get(token) != theirs.get(token) for token in ours.keys() | theirs.keys())
    notes.add(
        "tokenizers-differ",
        f"entries in which the tokenizers' vocabularies differ: {differing}; they give the same ids for "
        "these prompts",
    )


def listed(numbers: Sequence[object], most: int = 10) -> str:
    """The numbers, the first few if they are many.

    >>> listed([1, 2, 3], most=2)
    '1, 2 and 1 more'
    """
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def _named(index: int, prompt: Prompt) -> str:
    return f"Prompt {index} ({prompt.text[:40]!r})"


class OnlyIds:
    """Stands in for a tokenizer where only token ids are known: a token's text is its id."""

    pad_token_id = 0
    eos_token_id: int | None = None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as text."""
        return "".join(f"<{i}>" for i in ids)


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text; the bytes of one that is only a part of a character are named, as in `<0xC3>`.

    Such a token decodes to the replacement character, and so do all the others; the vocabulary may spell it
    as another token reads.
    """
    with TokenizerFaults(f"Token {token_id}"):
        text = str(tokenizer.decode([token_id]))
        if "\ufffd" not in text:
            return text
        spelled = str(tokenizer.convert_ids_to_tokens(token_id))
    alphabet = byte_alphabet()
    if not alphabet.keys() >= set(spelled):
        return spelled
    data = bytes(alphabet[character] for character in spelled)
    return data.decode("utf-8", _NAMED_BYTES) if data.decode("utf-8", "replace") == text else spelled


def _name_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


_NAMED_BYTES = "lazarus.named_bytes"
codecs.register_error(_NAMED_BYTES, _name_bytes)
