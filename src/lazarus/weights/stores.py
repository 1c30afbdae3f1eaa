"""A checkpoint's tensors by their keys, wherever they are: safetensors, GGUF, or pickled files."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazarus.errors import WeightsError
from lazarus.messages import option
from lazarus.models.contents import Unread
from lazarus.models.faults import translated
from lazarus.models.opening import Opened, decoding, find_weights
from lazarus.models.quantised import CodedTensor, Weight
from lazarus.models.reference import INDEX, PICKLED, WEIGHTS, Source
from lazarus.models.stored import read_headers
from lazarus.names.parts import Take
from lazarus.notes import Notes
from lazarus.tokens import listed
from lazarus.weights.coded import CodedView
from lazarus.weights.views import MemoryView, StoredView, View, dtype_name


@dataclass(frozen=True)
class Store:
    """Every tensor of a checkpoint: its shape, and a view of it or of a part of it when it is asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    tensors: Mapping[str, Any]
    unread: tuple[Unread, ...] = ()
    """other sets of weights in its folder"""

    def view(self, key: str, take: Take | None) -> View:
        """A tensor, or a part of it."""
        tensor = self.tensors[key]
        if isinstance(tensor, Tensor):
            return MemoryView(tensor, self.dtypes[key], take)
        return _view(tensor, take)


def _view(weight: Weight, take: Take | None) -> CodedView | StoredView:
    return CodedView(weight, take) if isinstance(weight, CodedTensor) else StoredView(weight, take)


def open_store(opened: Opened, notes: Notes, *, allow_pickle: bool) -> Store:
    """Return the tensors of a checkpoint in safetensors files, or in .bin files where that is allowed.

    Raises:
        UnsupportedModelError: its weights are quantised in a way that cannot be decoded.
        WeightsError: there are no weights, they are pickled, or a file is damaged.
    """
    source = opened.source
    if not allow_pickle:
        _refuse_pickles_there(source)
    # Pickled files are found in any case, so that the refusal below can name --allow-pickle.
    opened, files = find_weights(opened, pickled=True)
    opened = decoding(opened) if opened.quantised else opened
    opened.note(notes)
    with translated(source.name):
        if all(file.endswith(".safetensors") for file in files):
            headers = read_headers(files)
            stored: Mapping[str, Weight] = headers if opened.codes is None else opened.codes.weights(headers)
            views = {key: _view(tensor, None) for key, tensor in stored.items()}
            return Store(
                {key: tensor.shape for key, tensor in stored.items()},
                {key: view.dtype for key, view in views.items()},
                stored,
                opened.contents.unread,
            )
        if not allow_pickle:
            raise _is_pickled(source, Path(files[0]).name)
        return _read_pickles(files, opened, notes)


def _refuse_pickles_there(source: Source) -> None:
    """Refuse a repository that holds pickled weights alone, before they are fetched."""
    if source.repository is None:
        return
    there = {name.removeprefix(source.prefix) for name in source.repository.names()}
    pickled = sorted(there.intersection(PICKLED))
    if pickled and not there.intersection((WEIGHTS, INDEX)):
        raise _is_pickled(source, pickled[0])


def _is_pickled(source: Source, file: str) -> WeightsError:
    return WeightsError(
        f"{source.name}: its weights are pickled ({file}), and a pickle can run code when it is read. Allow "
        f"torch's reader of plain tensors with {option('allow_pickle', True)}, or load the model where you "
        "trust it and write it again with save_pretrained.",
        option="allow_pickle",
    )


def _read_pickles(files: Sequence[str], opened: Opened, notes: Notes) -> Store:
    """The tensors of .bin files, mapped into memory where the file allows; nothing else is unpickled."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_pickle(file)
        if not isinstance(found, dict):
            raise WeightsError(f"{file}: holds no tensors by their names. Write the model again.")
        own = {k: value for k, value in found.items() if isinstance(k, str) and isinstance(value, Tensor)}
        tensors |= {key: _plain(file, key, tensor) for key, tensor in own.items()}
        others = [str(key) for key in found if key not in own]
        if others:
            told = f"{file}: not compared, because they are no tensors: {listed(others, 5)}"
            notes.add("not-tensors", told, model=opened.source.name)
    return Store(
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: dtype_name(tensor.dtype) for key, tensor in tensors.items()},
        tensors,
        opened.contents.unread,
    )


def _plain(file: str, key: str, tensor: Tensor) -> Tensor:
    """Return the tensor with plain elements in memory.

    Raises:
        WeightsError: it is sparse or quantised, or has no elements.
    """
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not is_dense:
        kind = "quantised" if tensor.is_quantized else "without numbers" if tensor.is_meta else "sparse"
        raise WeightsError(
            f"{file}: {key} is {kind}, and plain numbers are compared. Load the model and write it again "
            "with save_pretrained."
        )
    # A lazy conjugate or negative would be read as the elements under it.
    return tensor.resolve_conj().resolve_neg()


def _read_pickle(file: str) -> Any:
    """Return what one file holds.

    Raises:
        WeightsError: it holds more than plain tensors.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
        return torch.load(file, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: holds more than plain tensors, and reading the rest could run code, or it is damaged. "
            "Load the model where you trust it and write it again with save_pretrained."
        ) from error
    except (EOFError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{file}: is damaged or cut short. Fetch the model again.") from error
