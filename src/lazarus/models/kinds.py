"""Models that take the same to run beside a base, and the size of their files, by their headers."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from lazarus.errors import AdapterError
from lazarus.foreign import read_text
from lazarus.models.adapter_files import WEIGHTS
from lazarus.models.checkpoint import find_files
from lazarus.models.design import shaping
from lazarus.models.faults import translated
from lazarus.models.opening import LoadOptions, Opened, open_to_load
from lazarus.models.reference import ModelReference, adapter_base
from lazarus.models.stored import read_headers
from lazarus.models.underneath import adapter_of, source_under

_SETTINGS = "adapter_config.json"


def kind_of(reference: ModelReference, base: ModelReference, options: LoadOptions) -> tuple[Hashable, int]:
    """Return what is equal for models that take the same beside base, and the bytes of a model's files.

    Raises:
        ModelError: it cannot be opened.
    """
    source = source_under(reference, base)
    opened = open_to_load(source, options)
    with translated(source.name):
        if opened.gguf is not None:
            tensors = opened.gguf.file.tensors
            stored: Hashable = tuple((name, each.n_bytes) for name, each in tensors.items())
        else:
            headers = read_headers(find_files(source, opened.config, opened.model_class))
            stored = tuple(
                sorted((name, str(each.dtype), tuple(each.shape)) for name, each in headers.items())
            )
        adapters = [Path(path) for each in reference.adapters if (path := each.file(_SETTINGS))]
        settings = tuple(read_text(path, AdapterError, "Fetch the adapter again.") for path in adapters)
    own = base.model or adapter_base(adapter_of(base))
    is_over = source.place == own.place
    n_bytes = bytes_of_adapters(reference) + (0 if is_over else file_bytes(opened))
    return (repr(sorted(shaping(opened.config).items())), stored, settings, is_over), n_bytes


def file_bytes(opened: Opened) -> int:
    """Return the size of a checkpoint's weights as stored."""
    if opened.gguf is not None:
        return sum(tensor.n_bytes for tensor in opened.gguf.file.tensors.values())
    found = find_files(opened.source, opened.config, opened.model_class)
    return sum(Path(path).stat().st_size for path in found)


def bytes_of_adapters(reference: ModelReference) -> int:
    """Return the size of the files of a model's adapters."""
    files = [path for each in reference.adapters if (path := each.file(WEIGHTS)) is not None]
    return sum(Path(path).stat().st_size for path in files)
