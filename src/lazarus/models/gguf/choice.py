"""The GGUF file that a folder or a repository without other weights stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from lazarus.errors import ModelNotFoundError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""The name of a part of a split model, as llama.cpp gives and finds it; numbers begin with 1."""
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
_NO_MODEL = re.compile(r"(?i).*(mmproj|imatrix).*")
"""What a GGUF file is called that belongs to a model beside it."""


def first_part(file: str) -> str:
    """Return the name of the first part of the split model that a file is a part of; its own elsewhere."""
    name = PurePosixPath(file).name
    if (part := PART.fullmatch(name)) is None:
        return file
    return f"{file.removesuffix(name)}{part['stem']}-00001-of-{part['count']}{name[-len('.gguf') :]}"


def only_gguf(name: str, files: Iterable[str], naming: str) -> str | None:
    """Return the GGUF file among `files`, of several parts the first; None where there are other weights.

    `naming` is how the user names one of several, with `{}` for the file.

    Raises:
        ModelNotFoundError: there are several.
    """
    listed = sorted(files)
    # With other weights beside it, the folder is a checkpoint as usual, and that is what is meant.
    if any(file.lower().endswith(_OTHER_WEIGHTS) for file in listed):
        return None
    found: dict[str, str] = {}
    for file in listed:
        base = PurePosixPath(file).name
        if base.lower().endswith(".gguf") and not _NO_MODEL.fullmatch(base):
            part = PART.fullmatch(base)
            # All parts of a split model count as one; the list is sorted, so the first part stands for them.
            found.setdefault(file.removesuffix(base) + (part["stem"] if part else base), file)
    if len(found) > 1:
        choices = [naming.format(file) for file in found.values()]
        more = f" and {len(choices) - 10} more" if len(choices) > 10 else ""
        raise ModelNotFoundError(
            f"{name}: it holds {len(choices)} GGUF models. Name one of them: {', '.join(choices[:10])}{more}"
        )
    return next(iter(found.values()), None)
