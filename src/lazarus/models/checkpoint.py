"""The tensors that a checkpoint stores, and transformers' own way from them to a model's parameters.

What of transformers is used here and not public is used nowhere else. A checkpoint may name its tensors
otherwise than the model does, and may store in pieces what the model holds in one (a mixture's experts). So a
parameter has a target, the name under which transformers collects its pieces, and sources, their keys.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
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
from lazarus.models.wrappers import Wrappers, find_wrappers

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_IN_ORDER = (Concatenate, MergeModulelist)
"""the steps that keep every stored tensor as it is, as a part of what they make"""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PREFIX = 4096
_CHUNK = 2**22
"""how many bytes, or numbers of another type, are compared at first, and then at once"""
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is: `start` and `n_bytes` are of the file, and `dtype` is safetensors' name."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


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


def read_headers(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Every tensor of these files by its key; of two with one key, the later file's.

    Raises:
        SafetensorError: a file is damaged or cut short.
        OSError: a file is missing.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        with safe_open(path, framework="pt"):  # it checks the header against the file
            pass
        with Path(path).open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                stored[key] = StoredTensor(path, entry["dtype"], shape, 8 + n_header + begin, end - begin)
    return stored


def same_numbers(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, bit for bit; of two that do not, few are read as a rule.

    Floating-point numbers of two types are compared in the wider one.

    Raises:
        OSError: a file is gone, or was cut short since its header was read.
    """
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return _place(one) == _place(other) or _alike(one, other, (1, 1), bytes.__eq__)
    if not {one.dtype, other.dtype} <= _FLOATS:
        return False
    types = TORCH_TYPES[one.dtype], TORCH_TYPES[other.dtype]
    wider = torch.promote_types(*types)
    bits = torch.int64 if wider.itemsize == 8 else torch.int32

    def widened(part: bytes, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(part), dtype=dtype).to(wider).view(bits)

    return _alike(
        one,
        other,
        (types[0].itemsize, types[1].itemsize),
        lambda ours, theirs: torch.equal(widened(ours, types[0]), widened(theirs, types[1])),
    )


def _place(stored: StoredTensor) -> tuple[str, int]:
    return os.path.realpath(stored.path), stored.start


def _alike(
    one: StoredTensor, other: StoredTensor, units: tuple[int, int], same: Callable[[bytes, bytes], bool]
) -> bool:
    """Whether all parts of two tensors are the same; `units` are the bytes of what they have as many of."""
    with Path(one.path).open("rb") as ours, Path(other.path).open("rb") as theirs:
        ours.seek(one.start)
        theirs.seek(other.start)
        left, size = one.n_bytes // units[0], _PREFIX
        while left:
            size = min(size, left)
            parts = ours.read(size * units[0]), theirs.read(size * units[1])
            for stored, part, unit in zip((one, other), parts, units, strict=True):
                if len(part) < size * unit:  # two files that end too soon are not the same for that
                    raise OSError(f"{stored.path}: cut short")
            if not same(*parts):
                return False
            left, size = left - size, _CHUNK
    return True


class _Lazy:
    """A stored tensor that is read when it is indexed, as transformers does with safetensors' own slices.

    Into memory of its own: a view of a mapped file stays in memory for as long as the file is open. But at
    an address that is to a kernel what the view's would be, because sums depend on it in the last bit.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored

    def __getitem__(self, _everything: object) -> Tensor:
        stored, dtype = self.stored, TORCH_TYPES[self.stored.dtype]
        memory = torch.empty(stored.n_bytes + 2 * _ALIGNMENT, dtype=torch.uint8)
        shift = (stored.start - memory.data_ptr()) % _ALIGNMENT
        taken = memory[shift : shift + stored.n_bytes]
        with Path(stored.path).open("rb", buffering=0) as file:
            file.seek(stored.start)
            _fill(memoryview(taken.numpy().data), file)
        return taken.view(dtype).view(stored.shape)


def _fill(memory: memoryview, file: io.FileIO) -> None:
    """Read until the memory is full: one call reads two gigabytes at most."""
    done = 0
    while done < len(memory):
        n_read = file.readinto(memory[done:])
        if not n_read:
            raise OSError(f"{file.name}: cut short")
        done += n_read


def read_whole(stored: StoredTensor) -> Tensor:
    """Return a stored tensor in its stored dtype."""
    return _Lazy(stored)[...]


def read_rows(stored: StoredTensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a stored matrix, [rows, columns], in its stored type."""
    n_bytes = stored.n_bytes // stored.shape[0]
    taken = bytearray()
    with Path(stored.path).open("rb") as file:
        for _, run in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):  # neighbours at once
            wanted = [row for _, row in run]
            file.seek(stored.start + wanted[0] * n_bytes)
            taken += file.read(len(wanted) * n_bytes)
    return torch.frombuffer(taken, dtype=TORCH_TYPES[stored.dtype]).view(len(rows), *stored.shape[1:])


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
    for the model's state dict where an adapter has put modules around the model's own. `wrappers` is what was
    taken off the keys first.
    """

    def __init__(
        self, model: PreTrainedModel, keys: Iterable[str], names: Mapping[str, Any] | None = None
    ) -> None:
        # One list for all calls: some renamings hold only once an earlier key has been seen.
        self.mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._names = dict(names or model.state_dict())
        self._prefix = model.base_model_prefix
        self._converters: dict[str, WeightConverter] = {}
        self.made: set[str] = set()
        stored = sorted(keys, key=natural_key)
        self.wrappers = find_wrappers(stored, self._names, partial(_count_made, model, self._names))
        self.sources = self._find_sources(stored)

    def is_plain(self, target: str) -> bool:
        """Whether a target is one stored tensor as it is, but for its name and type."""
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


def _count_made(model: PreTrainedModel, names: Mapping[str, Any], keys: list[str]) -> int:
    """The number of the model's names that some keys make, under transformers' renamings."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    return len(
        {rename_source_key(key, renamings, converters, prefix, names)[0] for key in keys} & names.keys()
    )


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
        return self._into(model, {strip(key): _Lazy(self.stored[key]) for key in keys}, self.device)

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
        """Whether a target is one stored tensor as it is, but for its name and type."""
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
