"""Conversion of the tensors that a checkpoint stores to a model's parameters, transformers' own way.

A checkpoint may name its tensors otherwise than the model does. It may also store in pieces what the model
holds as one tensor, such as the experts of a mixture. So a parameter has a target, the name under which
transformers collects its pieces, and sources, which are the keys of these pieces.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import digits
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazarus import _transformers
from lazarus.errors import WeightsError
from lazarus.models.contents import read_index
from lazarus.models.faults import ConversionError
from lazarus.models.inside import check_plain
from lazarus.models.quantised import Weight
from lazarus.models.reference import INDEX, PICKLED, WEIGHTS, Source
from lazarus.models.stored import TORCH_DTYPES
from lazarus.models.wrappers import Wrappers, find_wrappers


def find_files(source: Source, config: Any, model_class: Any, *, pickled: bool = False) -> list[str]:
    """Return the safetensors files that `from_pretrained` of the model class would read.

    Files on the Hub are fetched. With `pickled`, a checkpoint that has none gives its .bin files.

    Raises:
        WeightsError: config.json or an index names what is no file of weights in its folder.
    """
    chosen = getattr(config, "transformers_weights", None)
    if chosen is not None:
        check_plain(source.name, [str(chosen).removesuffix(".index.json")], ".safetensors", "config.json")
    explicit = source.weights_file or chosen
    _fetch(source, explicit, pickled=pickled)
    where = {"revision": source.revision, "subfolder": source.subfolder}
    is_fetched = {"local_files_only": source.repository is not None}
    files = _transformers.checkpoint_files(source.path, where | is_fetched, explicit, pickled=pickled)
    _check_found(source, files, pickled=pickled)
    more = [source.file(name) for name in getattr(type(config), "extra_files", ())]
    return list(dict.fromkeys([*files, *(path for path in more if path is not None)]))


def _fetch(source: Source, explicit: str | None, *, pickled: bool) -> None:
    """Fetch the files of weights that `from_pretrained` would read, where the source is on the Hub.

    Raises:
        WeightsError: its index is none, or names a file that the repository does not hold.
    """
    if source.repository is None:
        return
    names = [explicit] if explicit else [WEIGHTS, INDEX, *(PICKLED if pickled else ())]
    path = next((path for name in names if (path := source.file(name)) is not None), None)
    if path is None and source.repository.is_cached:
        raise WeightsError(f"{source.name}: its weights are {source.repository.not_cached()}")
    if path is None or not path.endswith(".index.json"):
        return
    shards = read_index(source, Path(path), ".bin" if path.endswith(".bin.index.json") else ".safetensors")
    missing = [shard for shard in shards if source.file(shard) is None]
    if missing:
        told = f"{source.name}: {len(missing)} of its {len(shards)} files of weights are"
        if source.repository.is_cached:
            raise WeightsError(f"{told} {source.repository.not_cached()}")
        raise WeightsError(
            f"{told} missing, first {missing[0]}, which {Path(path).name} names. The upload is not whole: "
            "ask its authors, or name another revision."
        )


def _check_found(source: Source, files: Sequence[str], *, pickled: bool) -> None:
    """Refuse no files, files that are not in one folder, or of another kind than safetensors in an index."""
    if not files:
        raise WeightsError(f"{source.name}: its index of weights names no file of weights. Fetch it again.")
    ending = os.path.splitext(files[0])[1] if pickled else ".safetensors"
    folder = os.path.dirname(files[0])
    check_plain(source.name, [os.path.relpath(file, folder) for file in files], ending, "its index")


def build_empty(kind: type[PreTrainedModel], config: Any, files: list[str], dtype: Any) -> PreTrainedModel:
    """Build a model on no device, as `from_pretrained` does before it reads weights.

    `dtype` may be "auto".
    """
    # Building sets the attention implementation on the configuration, which another model may hold too.
    return _transformers.empty_model(kind, copy.deepcopy(config), files, dtype)


def natural_key(key: str) -> list[tuple[bool, str, int, str]]:
    """Return a sort key that compares the digits in names as numbers: layer 2 comes before layer 10.

    >>> sorted(["h.10.w", "h.2.w", "h.w"], key=natural_key)
    ['h.2.w', 'h.10.w', 'h.w']
    """
    found = []
    for part in key.split("."):
        before = part.rstrip(digits)
        number = part[len(before) :].lstrip("0")
        # Of two numbers the one with more digits is larger. Python reads none of more than 4,300.
        found.append((bool(before), before, len(number) if part != before else -1, number))
    return found


class KeyMap:
    """Maps stored tensors to the parameters of a model that they make, by their keys.

    `sources` has, for each target, the keys that are collected for it. `made` has all parameters that come of
    them, which are more than the targets where one stored tensor is split. `names` stands in for the model's
    state dict where an adapter has put modules around the model's own. `wrappers` is what is taken off the
    keys first; it is found where it is not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Iterable[str],
        names: Mapping[str, Any] | None = None,
        wrappers: Wrappers | None = None,
    ) -> None:
        self._rules = _transformers.Renaming(model)
        self._names = dict(names or model.state_dict())
        self._converters: dict[str, Any] = {}
        self.made: set[str] = set()
        # In transformers' own order: some of its renamings begin to act once an earlier key was seen.
        stored = sorted(keys, key=natural_key)
        if wrappers is None:
            wrappers = find_wrappers(
                stored, self._names, lambda tried: len(KeyMap(model, tried, self._names, Wrappers()).made)
            )
        self.wrappers = wrappers
        self.sources = self._find_sources(stored)

    def is_plain(self, target: str) -> bool:
        """Return whether a target is one stored tensor as it is, but for its name and dtype."""
        return target not in self._converters and len(self.sources[target]) == 1

    def is_in_order(self, target: str) -> bool:
        """Return whether a target has its elements as they are stored: stacked or joined, never turned."""
        converter = self._converters.get(target)
        return converter is None or _transformers.keeps_order(converter)

    @property
    def mapping(self) -> list[Any]:
        """Return transformers' own entries, for its own functions."""
        return self._rules.mapping

    def renamed(self, key: str) -> str:
        """Return a key as the model would name it, if what is stored under it were a parameter of its own."""
        return self._rules.rename(self.wrappers.strip(key), self._names, converts=False)[0]

    def _find_sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        names, rules = self._names, self._rules
        sources: dict[str, list[str]] = {}
        for key in keys:
            inside = self.wrappers.strip(key)
            target, pattern = rules.rename(inside, names)
            # A rule for older names may also match a key that has the model's own name already.
            if target not in names and inside in names:
                target, pattern = rules.rename(inside, names, renames=False, converts=False)
            if target in names:
                sources.setdefault(target, []).append(key)
                self.made.add(target)
                if pattern is not None:
                    converter = next(c for c in rules.converters if pattern in c.source_patterns)
                    self._converters[target] = converter
                    first, *others = converter.target_patterns
                    # A split gives several parameters; transformers names the target after the first.
                    self.made |= {target.replace(first, other) for other in others}
        return {target: tuple(found) for target, found in sources.items()}


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is read when it is indexed, as transformers does with safetensors' own slices."""

    weight: Weight

    def __getitem__(self, _everything: object) -> Tensor:
        return self.weight.read()


class Conversion:
    """Makes the parameters of one model out of stored tensors.

    `sources` has, for each target, the keys that are collected for it.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Weight], device: torch.device):
        self.stored = stored
        self.device = device
        self.dtype = model.config.dtype
        self._dtype_plan = _transformers.dtype_plan(model)
        self._keys = KeyMap(model, stored)
        self.sources = self._keys.sources
        self.wrappers: Wrappers = self._keys.wrappers

    def convert(self, model: PreTrainedModel, keys: Iterable[str], *, shows_bar: bool = False) -> Any:
        """Read these tensors and put what they make into the model, in new Parameters.

        Returns transformers' report. Give all sources of a target, or none of them.

        Raises:
            ConversionError: they do not make what the model wants.
        """
        strip = self.wrappers.strip
        tensors = {strip(key): _Lazy(self.stored[key]) for key in keys}
        return self._into(model, tensors, self.device, shows_bar=shows_bar)

    def check(self, model: PreTrainedModel) -> Any:
        """Put empty parameters of the dtype and shape that the checkpoint makes into an empty model.

        Returns transformers' report of what is missing, left over or of another shape.

        Raises:
            ConversionError: the tensors do not make what the model wants.
        """
        meta = torch.device("meta")
        empty = {
            self.wrappers.strip(key): torch.empty(
                s.shape, dtype=TORCH_DTYPES.get(s.dtype, torch.uint8), device=meta
            )
            for key, s in self.stored.items()
        }
        # transformers moves some large tensors to the CPU to convert them. Tensors on meta have no data.
        on_cpu = [entry for entry in self._keys.mapping if getattr(entry, "force_cpu", False)]
        for entry in on_cpu:
            entry.force_cpu = False
        try:
            return self._into(model, empty, meta)
        finally:
            for entry in on_cpu:
                entry.force_cpu = True

    def finish(self, model: PreTrainedModel, report: Any) -> dict[str, Any]:
        """Make what the files do not hold as `from_pretrained` does: initial values, buffers, tied weights.

        Returns the report as `from_pretrained` gives it.
        """
        return _transformers.finish(model, report, self._load_config(self.device))

    def is_plain(self, target: str) -> bool:
        """Return whether a target is one stored tensor as it is, but for its name and dtype."""
        return self._keys.is_plain(target)

    def n_bytes(self, keys: Iterable[str]) -> int:
        """The stored size of some tensors."""
        return sum(self.stored[key].n_bytes for key in keys)

    def _load_config(self, device: torch.device) -> Any:
        return _transformers.load_config(device, self.dtype, self._dtype_plan, self._keys.mapping)

    def _into(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, Any],
        device: torch.device,
        *,
        shows_bar: bool = False,
    ) -> Any:
        report = _transformers.put_into(model, tensors, self._load_config(device), shows_bar=shows_bar)
        if report.conversion_errors:
            raise ConversionError.of(report.conversion_errors)
        return report


def names_loaded(model: PreTrainedModel, report: Any) -> set[str]:
    """The names of the state dict that a call of `convert` or `check` gave a value."""
    mismatched = {name for name, _, _ in report.mismatched_keys}
    return set(model.state_dict()).difference(report.missing_keys, mismatched)
