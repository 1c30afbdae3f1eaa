"""transformers' own way from the tensors that a checkpoint stores to a model's parameters.

What of transformers is used here and not public is used nowhere else. A checkpoint may name its tensors
otherwise than the model does, and may store in pieces what the model holds in one (a mixture's experts). So a
parameter has a target, the name under which transformers collects its pieces, and sources, their keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_dtype, _get_resolved_checkpoint_files
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from lazarus.models.faults import ConversionError
from lazarus.models.reference import Source
from lazarus.models.stored import TORCH_TYPES, LazyTensor, StoredTensor
from lazarus.models.wrappers import Wrappers, find_wrappers

_IN_ORDER = (Concatenate, MergeModulelist)
"""the steps that keep every stored tensor as it is, as a part of what they make"""


def find_files(source: Source, config: Any, head: Any, *, pickled: bool = False) -> list[str]:
    """The safetensors files that `head.from_pretrained` would read, fetched from the Hub if need be.

    With `pickled`, those of a checkpoint that has none: its .bin files.
    """
    where = {"revision": source.revision, "subfolder": source.subfolder}
    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=source.path,
        variant=None,
        gguf_file=None,
        use_safetensors=None if pickled else True,
        user_agent={},
        is_remote_code=False,
        transformers_explicit_filename=source.weights_file or getattr(config, "transformers_weights", None),
        download_kwargs=where,
    )
    more = [source.file(name) for name in getattr(head, "extra_files", ())]
    return list(dict.fromkeys([*(files or []), *(path for path in more if path is not None)]))


def model_class(head: Any, config: Any) -> Any:
    """The class of model that `head`, perhaps one of the Auto classes, makes of a configuration."""
    if not hasattr(head, "_model_mapping"):
        return head
    found = head._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, list | tuple) else found


def build_empty(kind: type[PreTrainedModel], config: Any, files: list[str], dtype: Any) -> PreTrainedModel:
    """A model as `from_pretrained` builds it before it reads weights: on no device; `dtype` may be "auto"."""
    # Building sets the attention's implementation on the configuration: that of another model may be it.
    config, dtype = _get_dtype(dtype, files, copy.deepcopy(config), None, None, True)
    with ExitStack() as contexts:
        for context in kind.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        model = kind(config)
    patch_output_recorders(model)
    return model


def natural_key(key: str) -> Any:
    """Sorts keys with the numbers in them as numbers: layer 2 before layer 10."""
    return dot_natural_key(key)


class KeyMap:
    """Which stored tensors make which parameters of a model, by their keys.

    `sources` has, for each target, the keys that are collected for it, and `made` all that comes of these:
    more than the targets, where one stored tensor is split. `mapping` is transformers' own. `names` stands in
    for the model's state dict where an adapter has put modules around the model's own. `wrappers` is what
    is taken off the keys first; found where it is not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Iterable[str],
        names: Mapping[str, Any] | None = None,
        wrappers: Wrappers | None = None,
    ) -> None:
        # One list for all calls: some renamings hold only once an earlier key has been seen.
        self.mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._names = dict(names or model.state_dict())
        self._prefix = model.base_model_prefix
        self._converters: dict[str, WeightConverter] = {}
        self.made: set[str] = set()
        stored = sorted(keys, key=natural_key)
        if wrappers is None:
            wrappers = find_wrappers(
                stored, self._names, lambda tried: len(KeyMap(model, tried, self._names, Wrappers()).made)
            )
        self.wrappers = wrappers
        self.sources = self._find_sources(stored)

    def is_plain(self, target: str) -> bool:
        """Return whether a target is one stored tensor as it is, but for its name and type."""
        return target not in self._converters and len(self.sources[target]) == 1

    def is_in_order(self, target: str) -> bool:
        """Return whether a target has its elements as they are stored: stacked or joined, never turned."""
        converter = self._converters.get(target)
        return converter is None or all(type(step) in _IN_ORDER for step in converter.operations)

    def renamed(self, key: str) -> str:
        """A key as the model would name it, if what is stored under it were a parameter of its own."""
        inside = self.wrappers.strip(key)
        path: str = rename_source_key(inside, self._renamings, [], self._prefix, self._names)[0]
        return path

    def _find_sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        names, prefix = self._names, self._prefix
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        sources: dict[str, list[str]] = {}
        for key in keys:
            inside = self.wrappers.strip(key)
            target, pattern = rename_source_key(inside, self._renamings, converters, prefix, names)
            if target not in names and inside in names:
                target, pattern = rename_source_key(inside, [], [], prefix, names)
            if target in names:
                sources.setdefault(target, []).append(key)
                self.made.add(target)
                if pattern is not None:
                    converter = next(c for c in converters if pattern in c.source_patterns)
                    self._converters[target] = converter
                    first, *others = converter.target_patterns
                    self.made |= {target.replace(first, other) for other in others}
        return {target: tuple(found) for target, found in sources.items()}


class Conversion:
    """How stored tensors become the parameters of one model.

    `sources` has, for each target, the keys that are collected for it.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, StoredTensor], device: torch.device):
        self.stored = stored
        self.device = device
        self.dtype = model.config.dtype
        self.dtype_plan = model._get_dtype_plan(self.dtype)
        self._keys = KeyMap(model, stored)
        self.sources = self._keys.sources
        self.wrappers: Wrappers = self._keys.wrappers

    def convert(self, model: PreTrainedModel, keys: Iterable[str]) -> Any:
        """Read these tensors and put what they make into the model, in new Parameters.

        Returns transformers' report. Give all sources of a target, or none of them.

        Raises:
            ConversionError: they do not make what the model wants.
        """
        strip = self.wrappers.strip
        return self._into(model, {strip(key): LazyTensor(self.stored[key]) for key in keys}, self.device)

    def check(self, model: PreTrainedModel) -> Any:
        """Put empty parameters of the type and shape that the checkpoint makes into an empty model.

        Returns transformers' report of what is missing, left over or of another shape.

        Raises:
            ConversionError: the tensors do not make what the model wants.
        """
        meta = torch.device("meta")
        empty = {
            self.wrappers.strip(key): torch.empty(
                s.shape, dtype=TORCH_TYPES.get(s.dtype, torch.uint8), device=meta
            )
            for key, s in self.stored.items()
        }
        # What transformers converts on the CPU whatever the device, for its size, has none here.
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
        config = self._load_config(self.device)
        return dict(model._finalize_model_loading(model, config, report).to_dict())

    def is_plain(self, target: str) -> bool:
        """Return whether a target is one stored tensor as it is, but for its name and type."""
        return self._keys.is_plain(target)

    def n_bytes(self, keys: Iterable[str]) -> int:
        """The stored size of some tensors."""
        return sum(self.stored[key].n_bytes for key in keys)

    def _load_config(self, device: torch.device) -> LoadStateDictConfig:
        return LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.dtype_plan,
            weight_mapping=self._keys.mapping,
            ignore_mismatched_sizes=True,
        )

    def _into(self, model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Any:
        with _quietly():
            report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), self._load_config(device))
        if report.conversion_errors:
            raise ConversionError.of(report.conversion_errors)
        return report


def names_loaded(model: PreTrainedModel, report: Any) -> set[str]:
    """The names of the state dict that a call of `convert` or `check` gave a value."""
    mismatched = {name for name, _, _ in report.mismatched_keys}
    return set(model.state_dict()).difference(report.missing_keys, mismatched)


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar: there would be one for each block."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
