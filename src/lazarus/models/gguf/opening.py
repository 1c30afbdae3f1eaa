"""All that is known of a GGUF model before its tensors are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath
from typing import Any

from transformers import PretrainedConfig

from lazarus.errors import MissingPackageError
from lazarus.models.faults import translated
from lazarus.models.gguf.parts import Gguf, read_files
from lazarus.models.gguf.refusals import refuse_other_kinds, refuse_other_sizes, refuse_unreadable_types
from lazarus.models.gguf.settings import read_config
from lazarus.models.plausible import check_sizes
from lazarus.models.reference import Source
from lazarus.notes import Note, Notes


@dataclass(frozen=True)
class OpenedGguf:
    """A GGUF model that can be loaded: its files, its configuration, and what a reader must know of both."""

    file: Gguf
    config: PretrainedConfig
    notes: tuple[Note, ...]
    untaken: Mapping[str, Any]
    """the settings of the file that transformers has no place for"""


def open_gguf(source: Source) -> OpenedGguf:
    """Read the headers of a GGUF model and the configuration that they describe.

    Raises:
        MissingPackageError: the package gguf is not installed.
        ModelError: there is no model in it, or not one that can be read; the message says why.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"{source.name}: a GGUF file needs the package gguf. Install it with "
            "`pip install 'lazarus-introspect[gguf]'`."
        ) from error
    file = read_files(source)
    own = {key: value for key, value in file.metadata.items() if key.startswith(file.key(""))}
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    check_sizes(file.name, own, len(file.tensors), n_bytes)
    refuse_other_kinds(file)
    refuse_unreadable_types(file)
    refuse_other_sizes(file)
    notes = Notes()
    named = PurePosixPath(source.gguf_file or "").name
    if named not in source.name and len(file.paths) == 1:
        told = f"{source.name} holds one model, the GGUF file {named}, which was read"
        notes.add("gguf-file", told, model=source.name)
    if len(file.paths) > 1:
        told = f"{source.name}: all {len(file.paths)} parts of the GGUF model were read"
        notes.add("gguf-file", told, model=source.name)
    with translated(source.name):
        config, untaken = read_config(file, notes)
    return OpenedGguf(file, config, tuple(notes), untaken)


def usual_type(file: Gguf) -> str:
    """Return the ggml type of most of the stored elements."""
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[tensor.kind.name] += prod(tensor.shape)
    return counts.most_common(1)[0][0]
