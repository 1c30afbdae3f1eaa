"""Names that a wrapper has put around those of a model: torch.compile, DDP, FSDP, Lightning, PEFT."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lazarus.errors import WeightsError
from lazarus.notes import Notes

_log = logging.getLogger(__name__)
_DEEPEST = 6
"""how many wrappers may be around each other"""
_INNER = {"language_model", "text_model"}
"""modules in which a multimodal model keeps its text model"""
_ADAPTED = ".base_layer."
"""what PEFT puts into the name of a tensor that an unmerged adapter acts on"""


@dataclass(frozen=True)
class Wrappers:
    """The wrapper's names in a checkpoint's keys: parts anywhere in them, then a prefix."""

    parts: tuple[str, ...] = ()
    prefix: str = ""

    def __bool__(self) -> bool:
        return bool(self.parts or self.prefix)

    def strip(self, key: str) -> str:
        """Return a key as the model inside the wrappers names it."""
        if self.parts:
            key = ".".join(part for part in key.split(".") if part not in self.parts)
        return key.removeprefix(self.prefix)

    def note(self, name: str, keys: Collection[str], notes: Notes) -> None:
        """Note how the keys of a checkpoint were read, if anything was taken off them.

        It is logged as a warning too: with another tool than this one, the checkpoint may not load.
        """
        if not self:
            return
        wrapped = [key for key in keys if self.strip(key) != key]
        heads = {key.removesuffix(self.strip(key)) for key in wrapped}
        parts = " and ".join([*self.parts, *filter(None, [self.prefix])])
        where = f"begin with {heads.pop()}" if len(heads) == 1 else f"have {parts} in them"
        told = (
            f"{name}: {len(wrapped)} of its {len(keys)} tensor names {where} (a wrapped model was saved, "
            "such as a compiled one): they were read without it, and other tools need them renamed"
        )
        _log.warning("Warning: %s.", told)
        notes.add("wrapped-names", told, model=name)


def find_wrappers(keys: Sequence[str], names: Iterable[str], count: Callable[[list[str]], int]) -> Wrappers:
    """Find what to take off the keys of a checkpoint so that they are the names of a model.

    `count` returns how many of the model's `names` some keys make. Nothing is taken off where that makes no
    more of them, or where two keys would become one.
    """
    names = list(names)
    own = {part for name in names for part in name.split(".")}
    first = {name.split(".")[0] for name in names}
    inner = {part for key in keys for part in key.split(".")} & _INNER
    # A name that the model itself has is not taken off, even where a wrapper could have put it there.
    found = Wrappers(tuple(sorted((_private(keys) | inner) - own)))
    stripped = [found.strip(key) for key in keys]
    for _ in range(_DEEPEST):
        prefix = next(
            (part for part in _common(stripped) if part not in first or _doubled(stripped, part)), None
        )
        if prefix is None:
            break
        found = Wrappers(found.parts, f"{found.prefix}{prefix}.")
        stripped = [found.strip(key) for key in keys]
    if not found or len(set(stripped)) < len(keys) or count(stripped) <= count(list(keys)):
        return Wrappers()
    return found


def refuse_unmerged(name: str, keys: Iterable[str]) -> None:
    """Refuse a checkpoint in which some tensors are those of a model with an adapter on it.

    Raises:
        WeightsError: it names the first of them.
    """
    adapted = sorted(key for key in keys if _ADAPTED in key)
    if adapted:
        raise WeightsError(
            f"{name}: an adapter was saved together with its model, unmerged: {len(adapted)} tensors are "
            f"named as PEFT names them, first {adapted[0]}. Save it with merge_and_unload().save_pretrained, "
            "or save the adapter alone."
        )


def _private(keys: Iterable[str]) -> set[str]:
    """Return the parts of keys that begin with an underscore, as wrappers call the module inside them."""
    return {part for key in keys for part in key.split(".")[:-1] if part.startswith("_")}


def _common(keys: Collection[str]) -> list[str]:
    """The modules with which at least half of the keys begin."""
    counts = Counter(key.split(".")[0] for key in keys if "." in key)
    return [part for part, n_keys in counts.most_common() if 2 * n_keys >= len(keys)]


def _doubled(keys: Iterable[str], part: str) -> bool:
    # A wrapper may have the name of a module of the model: model.model.layers is model.layers in a wrapper.
    return any(key.startswith(f"{part}.{part}.") for key in keys)
