"""How much longer a tokenizer may make a text before it cuts it into tokens, by its definition."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from lazarus.bounds import LIFT, MOST_ADDED, MOST_GROWN, MOST_WORD, exceeds
from lazarus.foreign import UnreadableError, decoded

_PARTS = ("normalizers", "pretokenizers", "decoders")
_WRITES_BYTES = "ByteLevel"
"""the kind that writes each byte of a text as a character: of one there are at most four"""
_SPACES_OUT = "BertNormalizer"
"""the kind that puts a space before and after a Chinese character"""


def growth(definition: Any) -> float:
    """Return how many characters at most a normalizer, pre-tokenizer or decoder makes of one.

    What Unicode's own forms make of a character is not counted: they do it once.
    """
    if not isinstance(definition, Mapping):
        return 1
    found = 1.0
    for part in _PARTS:
        for each in definition.get(part) or ():
            found *= growth(each)
            if found > 1e30:  # far above every limit; thousands of parts more would overflow
                return found
    kind = definition.get("type")
    if kind == "Replace":
        return found * _of_replacement(definition)
    if kind == "Prepend":
        return found * (1 + len(str(definition.get("prepend", ""))))
    if kind == "Precompiled":
        return found * _of_map(definition.get("precompiled_charsmap"))
    return found * {_WRITES_BYTES: 4, _SPACES_OUT: 3}.get(str(kind), 1)


def growth_of(tokenizer: Any) -> float:
    """Return how many characters at most a tokenizer reads for one; 1 for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = 1.0
    for part in ("normalizer", "pre_tokenizer"):
        state = getattr(getattr(backend, part, None), "__getstate__", lambda: None)()
        try:
            found *= growth(decoded(state)) if isinstance(state, bytes) else 1
        except UnreadableError:  # a part that somebody has written in Python
            continue
    return found


def refusal(definition: Mapping[str, Any]) -> str | None:
    """Return why a tokenizer.json is refused, as a clause with advice; None where it is not.

    As it is loaded, its added tokens are normalised, and single tokens are decoded for a reader.
    """
    added = definition.get("added_tokens") or ()
    texts = [str(token.get("content", "")) for token in added if isinstance(token, Mapping)]
    model = definition.get("model") or {}
    vocabulary = model.get("vocab") or () if isinstance(model, Mapping) else ()
    longest = max((len(str(token)) for token in vocabulary if isinstance(token, str)), default=1)
    grown = {
        "normalizer": (growth(definition.get("normalizer")), sum(map(len, texts))),
        "pre_tokenizer": (growth(definition.get("pre_tokenizer")), 1),
        "decoder": (growth(definition.get("decoder")), longest),
    }
    for part, (factor, length) in grown.items():
        if exceeds(factor * max(length, 1), MOST_GROWN):
            return f"its {part} makes up to {factor:.3g} characters of one. {LIFT}"
    around = _added(definition.get("post_processor"))
    if exceeds(around, MOST_ADDED):
        return f"its post_processor adds {around} tokens to each text. {LIFT}"
    most = model.get("max_input_chars_per_word") if isinstance(model, Mapping) else None
    if isinstance(most, int) and exceeds(most, MOST_WORD):
        return f"it tries all pieces of words of up to {most} characters (max_input_chars_per_word). {LIFT}"
    return None


def _added(processor: Any) -> int:
    """Return how many tokens the templates of a post-processor put around a text."""
    if not isinstance(processor, Mapping):
        return 0
    tokens = processor.get("special_tokens")
    sizes = {
        name: len(each["ids"])
        for name, each in (tokens.items() if isinstance(tokens, Mapping) else ())
        if isinstance(each, Mapping) and isinstance(each.get("ids"), list)
    }
    found = sum(map(_added, processor.get("processors") or ()))
    for piece in processor.get("single") or ():
        token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
        found += sizes.get(str(token.get("id")), 0) if isinstance(token, Mapping) else 0
    return found


def _of_replacement(definition: Mapping[str, Any]) -> float:
    pattern, content = definition.get("pattern"), len(str(definition.get("content", "")))
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    if isinstance(text, str) and text:
        return max(1.0, content / len(text))
    # A regular expression may match nothing at all, before each character.
    return 1 + content


def _of_map(table: Any) -> float:
    """Return the length of the longest text in a table of SentencePiece's: a trie, then texts with zeros."""
    try:
        content = base64.b64decode(table) if isinstance(table, str) else bytes(table or b"")
    except (binascii.Error, TypeError, ValueError):
        return 1
    size = int.from_bytes(content[:4], "little")
    return max(1, *map(len, content[4 + size :].split(b"\0")))
