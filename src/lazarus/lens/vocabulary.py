"""A model's tokens as texts, and the token that a text begins with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import Any

from lazarus.blame import is_a_panic
from lazarus.tokens import TokenizerFaults, token_text

_ANCHOR = "\n"
"""What every text is put after: at the very beginning, a tokenizer may add a space of its own."""


class Vocabulary:
    """The tokens that a model has logits for, by its tokenizer.

    A token's text is what it adds to a text: SentencePiece drops the space of the very first token, so a
    token is decoded after itself. The bytes of one that is only a part of a character are named.
    """

    def __init__(self, tokenizer: Any, n_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.n_tokens = n_tokens
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self._known = {i for i in self.ids.values() if i < n_tokens}

    def text(self, token_id: int) -> str:
        """Return the text of a token; `[id N]` where it has a logit, and the tokenizer has no text for it."""
        return self._decoded([token_id])[0] if token_id in self._known else f"[id {token_id}]"

    @cached_property
    def texts(self) -> list[str | None]:
        """The text of every token, by its id; None where the tokenizer has none."""
        known = sorted(self._known)
        texts: list[str | None] = [None] * self.n_tokens
        for token_id, text in zip(known, self._decoded(known), strict=True):
            texts[token_id] = text
        return texts

    def first_tokens(self, word: str) -> list[int]:
        """The tokens that a word begins with: with and without a space before it, each once.

        A word that has white space in front is taken as it is. Empty where the tokenizer has no token for it.
        """
        forms = [word] if word[:1].isspace() else [word, f" {word}"]
        found = [self._first_token(form) for form in forms]
        return list(dict.fromkeys(i for i in found if i is not None))

    def _decoded(self, ids: Sequence[int]) -> list[str]:
        with TokenizerFaults("A token"):
            once, twice = (
                # Cleaning up would take away spaces before punctuation.
                self.tokenizer.batch_decode([[i] * n for i in ids], clean_up_tokenization_spaces=False)
                for n in (1, 2)
            )
        return [
            both.removeprefix(one)
            # A part of a character decodes to U+FFFD.
            if "\ufffd" not in both and both.startswith(one)
            else token_text(self.tokenizer, i)
            for i, one, both in zip(ids, once, twice, strict=True)
        ]

    def _first_token(self, form: str) -> int | None:
        before, after = self._encode(_ANCHOR), self._encode(_ANCHOR + form)
        if before is None or after is None or after[: len(before)] != before:
            before, after = [], self._encode(form) or []  # the two melt into one token
        rest = after[len(before) :]
        return rest[0] if rest and self._begins(rest[0], form) else None

    def _encode(self, text: str) -> list[int] | None:
        """The ids of a text without special tokens; None where the tokenizer fails on it."""
        with _Failing():
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return None

    def _begins(self, token_id: int, form: str) -> bool:
        """Return whether a token begins a text: not the unknown one, a mere space, or one without a logit."""
        if token_id not in self._known or token_id == self.tokenizer.unk_token_id:
            return False
        with TokenizerFaults(f"Token {token_id}"):
            text = self.tokenizer.decode([token_id])
        if "\ufffd" in text:
            return True  # a part of the first character
        text = self.text(token_id)
        same = form.lstrip().casefold().startswith(text.strip().casefold())
        return same and bool(text.strip() or not form.strip())


class _Failing:
    """Stands for `Exception`, the class that tokenizers raises on a text that it has no token for."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        return kind is Exception or (error is not None and is_a_panic(error))
