"""The limits on what an adapter's configuration may ask of PEFT: from its tensors, or of time."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import regex

from lazarus.bounds import (
    LIFT,
    MOST_LAYERS,
    MOST_NAMES,
    MOST_PISSA_ITERATIONS,
    MOST_RANK,
    SECONDS_OF_PATTERNS,
    exceeds,
    lifted,
)
from lazarus.errors import AdapterError

_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters")
_RANKS = ("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length", "bottleneck_size")
"""settings by which PEFT makes tensors that an adapter then stores"""
_FULL_IF_LARGE = "LOKR"
"""the type whose rank may be larger than every matrix: it then stores them whole"""
_PATCHING = threading.RLock()


def check_settings(path: str, settings: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that PEFT must not be given.

    Raises:
        AdapterError: it would import code, asks for endless work, or names modules by what are no names.
    """
    if settings.get("megatron_config") is not None:
        raise AdapterError(
            f"{path}: has a megatron_config, for which PEFT may import Python code from the current "
            "folder. Take it out: the adapter's weights do not need it."
        )
    base = settings.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or "\0" in base):
        raise AdapterError(
            f"{path}: its base_model_name_or_path is no name of a model. Fetch the adapter again."
        )
    for name in _NAMES:
        named = settings.get(name)
        each = named if isinstance(named, list) else [named]
        if named is not None and not all(isinstance(item, str) for item in each):
            raise AdapterError(f"{path}: {name} is no list of names. Fetch the adapter again.")
        if name not in ("target_modules", "exclude_modules") and exceeds(len(each), MOST_NAMES):
            raise AdapterError(f"{path}: {name} has {len(each)} names, and the limit is {MOST_NAMES}. {LIFT}")
    niter = re.fullmatch(r"pissa_niter_(\d{1,9}).*", str(settings.get("init_lora_weights")))
    if niter and exceeds(int(niter[1]), MOST_PISSA_ITERATIONS):
        raise AdapterError(
            f"{path}: init_lora_weights asks for {niter[1]} iterations of PiSSA, and the limit is "
            f"{MOST_PISSA_ITERATIONS}. {LIFT}"
        )


def check_sizes(name: str, settings: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse an adapter whose configuration asks for more than its tensors, of these shapes, could be.

    Raises:
        AdapterError: a rank is above every size of a tensor, or more layers are replicated than there are
            tensors.
    """
    most = max(MOST_RANK, *(size for shape in shapes for size in shape), 0)
    ranks: dict[str, Any] = {key: settings.get(key) for key in _RANKS}
    for tokens in _lists(settings.get("trainable_token_indices")):
        ranks["the number of its trainable_token_indices"] = len(tokens)
    if isinstance(pattern := settings.get("rank_pattern"), Mapping):
        ranks |= {f"rank_pattern[{key!r:.60}]": value for key, value in pattern.items()}
    for key, rank in ranks.items() if settings.get("peft_type") != _FULL_IF_LARGE else ():
        if isinstance(rank, int | float) and exceeds(rank, most):
            raise AdapterError(
                f"{name}: its adapter_config.json sets {key} to {rank}, and no tensor of it has more than "
                f"{most} rows or columns. The two are not of one adapter: fetch it again. {LIFT}"
            )
    n_layers = n_replicated(settings)
    if exceeds(n_layers, most := max(MOST_LAYERS, len(shapes))):
        raise AdapterError(
            f"{name}: layer_replication in its adapter_config.json makes {n_layers} layers, and the limit is "
            f"{most}: its {len(shapes)} tensors, or {MOST_LAYERS}. {LIFT}"
        )


def _lists(found: Any) -> list[Any]:
    """Return the lists of token ids of one embedding, or of several by their names."""
    return [
        each for each in (found.values() if isinstance(found, Mapping) else [found]) if isinstance(each, list)
    ]


def n_replicated(settings: Mapping[str, Any]) -> int:
    """Return how many layers `layer_replication` makes; 0 where there is none.

    Raises:
        AdapterError: it is no list of two numbers each.
    """
    ranges = settings.get("layer_replication") or []
    try:
        return sum(max(0, end - start) for start, end in ranges)
    except (TypeError, ValueError) as error:
        raise AdapterError(
            "layer_replication in adapter_config.json is no list of a first and a last layer each. Fetch the "
            "adapter again."
        ) from error


def reduce_names(config: Any, modules: Iterable[str]) -> None:
    """Take the names that no module has out of a PEFT configuration; those that are meant stay the same.

    PEFT compares each name with each module, and looks for the fewest names that do.
    """
    ends = {path[start:] for path in modules for start in _starts(path)}
    for setting in ("target_modules", "exclude_modules"):
        named = getattr(config, setting, None)
        if isinstance(named, set | list | tuple) and len(named) > MOST_NAMES:
            # Where none is left, PEFT says that of the names that it is given.
            left = [name for name in named if name in ends] or sorted(named)[:1]
            setattr(config, setting, type(named)(left))


def _starts(path: str) -> Iterator[int]:
    yield 0
    yield from (found.end() for found in re.finditer(r"\.", path))


@contextmanager
def patterns_within_time(name: str) -> Iterator[None]:
    """Match the patterns of an adapter's configuration by an engine that has a limit of time.

    PEFT matches most of what a configuration names as a regular expression, in other places in each version,
    and Python's `re` goes on with a catastrophic one for years. So PEFT's modules get another `re` meanwhile.

    Raises:
        AdapterError: the time is over.
    """
    if lifted():
        yield
        return
    with _PATCHING:
        engine = _Timed(name, time.monotonic() + SECONDS_OF_PATTERNS)
        patched = [module for module in _modules_of_peft() if vars(module).get("re") is re]
        try:
            for module in patched:
                vars(module)["re"] = engine
            yield
        finally:
            for module in patched:
                vars(module)["re"] = re


def _modules_of_peft() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "peft"]


class _Timed:
    """The functions of `re` that PEFT matches names by; all else is that of `re`."""

    def __init__(self, name: str, end: float) -> None:
        self._name = name
        self._end = end

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)

    def match(self, pattern: Any, text: str, flags: int = 0) -> Any:
        """Match the beginning of a text."""
        return self._within_time(regex.match, pattern, text, flags)

    def fullmatch(self, pattern: Any, text: str, flags: int = 0) -> Any:
        """Match a whole text."""
        return self._within_time(regex.fullmatch, pattern, text, flags)

    def search(self, pattern: Any, text: str, flags: int = 0) -> Any:
        """Find a pattern in a text."""
        return self._within_time(regex.search, pattern, text, flags)

    def _within_time(self, call: Callable[..., Any], pattern: Any, text: str, flags: int) -> Any:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            pattern = getattr(pattern, "pattern", pattern)
            return call(pattern, text, flags, timeout=left)
        except regex.error as error:
            raise AdapterError(
                f"{self._name}: a pattern in its adapter_config.json is no regular expression: {error}. "
                "Check the file, or fetch the adapter again."
            ) from None
        except TimeoutError:
            raise AdapterError(
                f"{self._name}: the patterns in its adapter_config.json (target_modules, exclude_modules, "
                f"rank_pattern and the like) take more than {SECONDS_OF_PATTERNS} s to match with the names "
                f"of the modules. Write the names themselves. {LIFT}"
            ) from None
