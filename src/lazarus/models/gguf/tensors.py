"""The tensors of a GGUF model as transformers would load them: its names for them, and its layout.

llama.cpp has other names, and other layouts for some tensors (Llama's queries and keys are permuted).
transformers has two tables of them: processors of numpy arrays, and for newer architectures conversions like
those of its other checkpoints. Each of the two is a `Translation`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lazarus import _transformers
from lazarus.models.checkpoint import build_empty
from lazarus.models.gguf.opening import OpenedGguf
from lazarus.models.gguf.parts import Gguf, read_files
from lazarus.models.gguf.rope import FACTORS, LONG, SHORT
from lazarus.models.reference import Source

SETTINGS = re.compile(
    "|".join([*map(re.escape, (FACTORS, LONG, SHORT)), r"blk\.\d+\.attn_rot_embd(\.weight)?"])
)
"""Tensors that are settings, which the configuration has, or that follow from them."""

Change = Literal["nothing", "order of rows", "anything"]
_READING = "Dequantising GGUF tensors"


@dataclass(frozen=True)
class _Outside:
    """A module with its children, which have none: transformers would go through every module of the model.

    It looks at children because some files were written from the stack alone (BLOOM's).
    """

    module: nn.Module
    children: Iterable[tuple[str, nn.Module]] = ()

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.module.config

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by their names."""
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, _Outside]]:
        """Its children, which have none."""
        return [(name, _Outside(child)) for name, child in self.children]


@runtime_checkable
class Translation(Protocol):
    """transformers' names and layout for the tensors of a file."""

    @property
    def rule(self) -> object:
        """Return what decides how tensors are laid out: two files with equal ones are laid out alike."""
        ...

    def target(self, key: str) -> str | None:
        """Return the parameter that a tensor makes, or a part of it; None where it has no place."""
        ...

    def processed(self, key: str, weights: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor's elements in transformers' layout."""
        ...

    def changes(self, key: str, shape: tuple[int, ...]) -> Change:
        """Return what transformers does to a tensor of this shape."""
        ...

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read every tensor that has a place in the model."""
        ...


class _Processed:
    """transformers' processors of one architecture, for the empty `model` of a file."""

    def __init__(self, file: Gguf, model: PreTrainedModel) -> None:
        self.file = file
        self._processor = _transformers.gguf_processor(file.architecture, model.config)
        self._names = _transformers.gguf_names(_Outside(model, model.named_children()), self._processor)
        self._held = set(model.state_dict())

    @property
    def rule(self) -> object:
        """Return what decides how tensors are laid out: two files with equal ones are laid out alike."""
        return type(self._processor), self._processor.config

    def target(self, key: str) -> str | None:
        """Return the parameter that a tensor makes, or a part of it; None where it has no place."""
        found: str | None = self._names.get(key) or self._names.get(key.removesuffix(".weight"))
        if found is None and key == "output.weight" and "lm_head.weight" in self._held:
            return "lm_head.weight"
        return found

    def processed(self, key: str, weights: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor's elements in transformers' layout."""
        kept: dict[str, Any] = {"tensors": {}}
        result = self._process(key, weights, kept)
        if result.name is None and kept["tensors"]:  # it has put the tensor there by itself
            (tensor,) = kept["tensors"].values()
            return np.asarray(tensor)
        return np.asarray(result.weights)

    def changes(self, key: str, shape: tuple[int, ...]) -> Change:
        """Return what transformers does to a tensor, by trying it on the indices of its rows."""
        numbers = np.arange(1.0, shape[0] + 1)
        numbers = numbers if len(shape) == 1 else numbers.reshape(-1, *[1] * (len(shape) - 1))
        found = self.processed(key, numbers)
        if np.array_equal(found, numbers):
            return "nothing"
        is_sorted_anew = found.shape == numbers.shape and np.array_equal(np.sort(found, axis=0), numbers)
        return "order of rows" if is_sorted_anew else "anything"

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read every tensor that has a place in the model."""
        kept: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for key, tensor in logging.tqdm(self.file.tensors.items(), desc=_READING):
            if (target := self.target(key)) is None:
                continue
            result = self._process(key, tensor.elements(), kept)
            if result.name is not None:
                kept["tensors"][target] = torch.tensor(np.asarray(result.weights)).to(dtype)
        # Some processors put their tensors in there themselves, in float32.
        return {name: tensor.to(dtype) for name, tensor in kept["tensors"].items()}

    def _process(self, key: str, weights: NDArray[Any], kept: dict[str, Any]) -> Any:
        return self._processor.process(
            weights=weights, name=key, tensor_key_mapping=self._names, parsed_parameters=kept
        )


class _Converted:
    """transformers' conversions of one architecture."""

    def __init__(self, file: Gguf, model: PreTrainedModel, rules: _transformers.Renaming) -> None:
        self.file = file
        self._rule = file.architecture, model.config.to_dict()
        self._held = set(model.state_dict())
        by_pattern = {pattern: entry for entry in rules.converters for pattern in entry.source_patterns}
        self._places: dict[str, tuple[str, str | None, Any]] = {}
        for key in file.tensors:
            name, pattern = rules.rename(key, None)
            self._places[key] = name, pattern, by_pattern.get(pattern or "")

    @property
    def rule(self) -> object:
        """Return what decides how tensors are laid out: two files with equal ones are laid out alike."""
        return self._rule

    def target(self, key: str) -> str | None:
        """Return the parameter that a tensor makes, or a part of it; None where it has no place."""
        name = self._places[key][0]
        return name if name in self._held else None

    def processed(self, key: str, weights: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor's elements in transformers' layout."""
        _, pattern, converter = self._places[key]
        # A copy, because torch warns of an array that cannot be written to, such as a mapped one.
        found = {pattern: torch.from_numpy(np.array(weights))}
        return np.asarray(self._convert(converter, found))

    def changes(self, key: str, shape: tuple[int, ...]) -> Change:
        """Return what transformers does to a tensor; some conversions change columns alone."""
        return "nothing" if self._places[key][2] is None else "anything"

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read every tensor that has a place in the model."""
        keys: dict[str, list[str]] = defaultdict(list)
        for key in self.file.tensors:
            if (target := self.target(key)) is not None:
                keys[target].append(key)
        found = {}
        for target, sources in logging.tqdm(keys.items(), desc=_READING):
            pieces = {
                self._places[key][1]: torch.from_numpy(np.array(self.file.tensors[key].elements()))
                for key in sources
            }
            found[target] = self._convert(self._places[sources[0]][2], pieces).to(dtype)
        return found

    @staticmethod
    def _convert(converter: Any, pieces: Mapping[str | None, Tensor]) -> Tensor:
        current: dict[Any, Any] = dict(pieces)
        for operation in () if converter is None else converter.operations:
            current = operation.convert(
                current, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
            )
        (tensor,) = current.values()
        assert isinstance(tensor, Tensor)
        return tensor


def translate(file: Gguf, model: PreTrainedModel) -> Translation:
    """Return transformers' names and layouts for the tensors of a file, whose empty model is `model`."""
    rules = _transformers.Renaming.of_gguf(file.architecture, model.config)
    return _Processed(file, model) if rules is None else _Converted(file, model, rules)


def load(
    opened: OpenedGguf, model_class: Any, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a GGUF model, dequantised; returns it and transformers' report on its tensors.

    The tensors are read here: transformers opens one file, and leaves queries and keys in llama.cpp's layout
    where the file does not say how many heads there are for keys. `dtype` is None for the stored one.
    """
    file, config = opened.file, opened.config
    kind = _transformers.registered_class(model_class, config) or model_class
    dtype = stored_dtype(file) if dtype is None else dtype
    translation = translate(file, build_empty(kind, config, [], dtype))
    arguments = {} if device.type == "cpu" else {"device_map": {"": device}}
    # With a state dict and no name, `from_pretrained` loads what it is given, and reports on it as on files.
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=translation.state_dict(dtype),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # as for other checkpoints
        **arguments,
    )
    model.config.name_or_path = model.name_or_path = file.paths[0]
    return model, {**report, "unexpected_keys": {*report["unexpected_keys"], *_unplaced(file, translation)}}


def _unplaced(file: Gguf, translation: Translation) -> list[str]:
    return [key for key in file.tensors if translation.target(key) is None and not SETTINGS.fullmatch(key)]


def read_unplaced(source: Source, kind: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, Tensor]:
    """Return what is stored of the tensors of a file that have no place in a model of class `kind`.

    They have llama.cpp's names, but for the blocks', which have the model's.

    Raises:
        WeightsError: a file is gone, or was cut short since the model was loaded.
    """
    file = read_files(source)
    translation = translate(file, build_empty(kind, config, [], torch.float32))
    targets = [translation.target(key) for key in file.tensors if key.startswith("blk.0.")]
    blocks = next((target.partition(".0.")[0] for target in targets if target is not None), "blk")
    return {
        re.sub(r"^blk(?=\.)", blocks, key): torch.from_numpy(np.array(file.tensors[key].data()))
        for key in _unplaced(file, translation)
    }


def stored_dtype(file: Gguf) -> torch.dtype:
    """Return the dtype that holds every element of a file: float32 where any is quantised."""
    # llama.cpp stores vectors in float32, whatever the matrices are stored in.
    kinds = {tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    plain = {"BF16": torch.bfloat16, "F16": torch.float16}
    return plain.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
