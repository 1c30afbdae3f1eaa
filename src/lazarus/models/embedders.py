"""The modules of a sentence-transformers model after its transformer: pooling, dense layers and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lazarus.errors import ModelError
from lazarus.foreign import read_json
from lazarus.models.faults import translated
from lazarus.models.files import ReadFiles
from lazarus.models.reference import Source, read_modules
from lazarus.models.stored import read_headers, same_elements
from lazarus.results import NotCompared

_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
_INERT = {"__version__"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

Part = tuple[NotCompared | None, NotCompared | None]
"""what base and the fine-tuned model have of it; None where one has nothing"""


@dataclass(frozen=True)
class _Module:
    """One module, or one file of settings: where it is, its settings, and the file of its weights."""

    what: str
    settings: Any
    weights: str | None = None

    @property
    def n_tensors(self) -> int:
        """Return how many tensors its file holds; 1 of a pickled one, which is not opened."""
        if self.weights is None:
            return 0
        return len(read_headers([self.weights])) if self.weights.endswith(".safetensors") else 1


def embedder_parts(base: Source | None, finetuned: Source | None, *, embeds: bool = False) -> list[Part]:
    """Return the modules of two sentence-transformers models that come after their transformers.

    With `embeds` the modules are compared by what they make, and only files of settings are left.

    Raises:
        ModelError: a `modules.json`, or the configuration of a module, is no JSON.
        WeightsError: a module's weights cannot be read.
    """
    ours, theirs = (_modules(source) if source else {} for source in (base, finetuned))
    parts: list[Part] = []
    for path in dict.fromkeys([*ours, *theirs]):
        if embeds and path not in _SETTINGS:
            continue
        one, other = ours.get(path), theirs.get(path)
        differs = True if one is None or other is None else _differ(one, other)
        parts.append((_part(one, differs), _part(other, differs)))
    return parts


def add_modules(files: ReadFiles, source: Source) -> None:
    """Add the files of the modules of a sentence-transformers model, which are read after its transformer.

    Raises:
        OSError: one is not there any more, or is no file.
    """
    root = replace(source, subfolder="")
    if source.gguf_file or (listed := root.file("modules.json")) is None:
        return
    try:
        inside = [replace(root, subfolder=path) for path, _ in read_modules(listed) if path]
    except ModelError:
        return  # told by whoever runs or compares the modules
    found = [module.file(name) for module in inside for name in ("config.json", *_WEIGHTS)]
    found += map(root.file, _SETTINGS)
    files.add(Path(listed).parent, [listed, *(path for path in found if path is not None)])


def _part(module: _Module | None, differs: bool | None) -> NotCompared | None:
    if module is None:
        return None
    return NotCompared(what=module.what, n_tensors=module.n_tensors, differs=differs)


def _modules(source: Source) -> dict[str, _Module]:
    """The modules by their folders; none where the source is no sentence-transformers model."""
    if source.gguf_file:
        return {}
    root = replace(source, subfolder="")
    listed = root.file("modules.json")
    if listed is None:
        return {}
    found = {}
    for path, module in read_modules(listed):
        kind = module.rpartition(".")[2]
        if not path or path == source.subfolder or kind == "Transformer":
            continue
        folder = replace(root, subfolder=path)
        config = folder.file("config.json")
        weights = next(filter(None, map(folder.file, _WEIGHTS)), None)
        found[path] = _Module(f"{kind} module ({path})", config and _json(config), weights)
    for name in _SETTINGS:
        if (config := root.file(name)) is not None:
            found[name] = _Module(name, _json(config))
    return found


def _json(path: str) -> Any:
    return read_json(path, ModelError, "Fetch the model again.")


def _differ(one: _Module, other: _Module) -> bool | None:
    """Return whether two modules compute something else; None where pickled weights are not the same file."""
    if one.what != other.what or _active(one.settings) != _active(other.settings):
        return True
    if one.weights is None or other.weights is None:
        return one.weights != other.weights
    if not one.weights.endswith(".safetensors") or not other.weights.endswith(".safetensors"):
        # Reading a pickle could run code. The same bytes are the same weights; other bytes may be, too.
        return False if Path(one.weights).read_bytes() == Path(other.weights).read_bytes() else None
    with translated(one.what):
        ours, theirs = read_headers([one.weights]), read_headers([other.weights])
    return ours.keys() != theirs.keys() or not all(same_elements(ours[key], theirs[key]) for key in ours)


def _active(settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    return {key: value for key, value in settings.items() if key not in _INERT and value is not None}
