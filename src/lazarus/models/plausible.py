"""Settings that ask for more than a checkpoint's files could hold are refused before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lazarus.bounds import LIFT, MOST_EXPERTS, MOST_LABELS, MOST_LAYERS, MOST_SIZE, exceeds
from lazarus.errors import ModelError, UnsupportedModelError, WeightsError
from lazarus.foreign import read_json
from lazarus.models.reference import Source

_LAYERS = re.compile(r"(?i)(.*_)?(layers?|depths?|blocks?|stages?|block_count)")
_EXPERTS = re.compile(r"(?i)(.*_)?(experts?|expert_count)")
_LABELS = re.compile(r"num_labels")
_KERNELS = re.compile(r".*(attn|attention|experts)_implementation.*")
_SIZES = re.compile(
    r"(?i)(num|n)_.*|.*_(dim|size|rank|heads?|width|channels|count)|d_(model|ff|kv|inner|state|conv)|hidden_dim"
    r"|(embedding|feed_forward|key|value)_length"
)


def check_config(source: Source) -> None:
    """Refuse a config.json that makes transformers build lists without end as it is read.

    Raises:
        ModelError: it cannot be read, or asks for too many layers or labels.
    """
    path = source.file("config.json")
    if path is None:
        return
    settings = read_json(path, ModelError, "It is damaged or cut short: fetch it again.")
    for key, value in _values(settings):
        if _KERNELS.fullmatch(key.rpartition(".")[2]) and isinstance(value, str) and "/" in value:
            raise UnsupportedModelError(
                f"{path}: {key} names a kernel of the Hub, {value!r:.80}, which is code that would run. Take "
                "the setting out of a copy of the file."
            )
    for key, number in _integers(settings):
        _check(path, key, number, _LABELS, (MOST_LABELS, ""))
        # How many tensors there are is not known yet. Even so many layers are but a list of as many words.
        _check(path, key, number, _LAYERS, (100 * MOST_LAYERS, ""))


def check_weights(source: Source, stored: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for more than its stored tensors could be.

    Raises:
        WeightsError: it asks for more layers or experts than there are tensors, or for a size that is larger
            than all of them.
    """
    path = source.file("config.json")
    if path is None:
        return
    n_bytes = sum(tensor.n_bytes for tensor in stored.values())
    check_sizes(path, read_json(path, ModelError, "Fetch it again."), len(stored), n_bytes)


def check_sizes(where: str, settings: Any, n_tensors: int, n_bytes: int) -> None:
    """Refuse settings, a mapping, that ask for more than so many tensors of so many bytes could be.

    Raises:
        WeightsError: it names the setting.
    """
    held = f"{n_tensors} tensors are stored"
    for key, number in _integers(settings):
        _check(where, key, number, _LAYERS, (max(MOST_LAYERS, n_tensors), held))
        _check(where, key, number, _EXPERTS, (max(MOST_EXPERTS, n_tensors), held))
        # No format stores an element in less than a bit.
        _check(where, key, number, _SIZES, (max(MOST_SIZE, 8 * n_bytes), f"{n_bytes} bytes are stored"))


def _check(where: str, key: str, number: int, pattern: re.Pattern[str], most: tuple[int, str]) -> None:
    if pattern.fullmatch(key.rpartition(".")[2]) and exceeds(number, most[0]):
        held = f", since {most[1]}" if most[1] else ""
        raise WeightsError(
            f"{where}: {key} is {number}, and the limit is {most[0]}{held}. The file is damaged, or not of "
            f"these weights: fetch it again. {LIFT}"
        )


def _integers(settings: Any, within: str = "") -> Iterator[tuple[str, int]]:
    """Yield each whole number of settings, with its key, also those in lists and within other settings."""
    for key, value in _values(settings, within):
        if isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _values(settings: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each plain value of settings, with its key."""
    items = settings.items() if isinstance(settings, Mapping) else ()
    for key, value in items:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield from _values(each, f"{within}{key}.")
            else:
                yield f"{within}{key}", each
