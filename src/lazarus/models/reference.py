"""Meaning of MODEL. A file or folder of exactly that name comes first, and is never split at @ or +."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lazarus.errors import AdapterError, ModelError, ModelNotFoundError
from lazarus.foreign import read_json, user_path
from lazarus.models.adapter_limits import check_settings
from lazarus.models.faults import translated
from lazarus.models.gguf.choice import first_part, only_gguf
from lazarus.models.hub import Repository, find_repository
from lazarus.models.inside import check_files, is_plain
from lazarus.notes import Notes

Kind = Literal["hub", "folder", "gguf"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MODEL_FILES = (WEIGHTS, INDEX, *PICKLED)
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")
# In git no name begins with a slash or has two dots: it would lead out of the cache, which has a file for it.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@(?!/|.*\.\.)[^@+\s]+)?")
_HUB_FILE = re.compile(r"(?i)(\w[\w.-]*/\w[\w.-]*)(?:@(?!/|[^:]*\.\.)([^@+:\s]+):|[:/])([^:\s]+\.gguf)")
"""org/name:file.gguf, org/name@revision:file.gguf, org/name/file.gguf"""


@dataclass(frozen=True)
class Source:
    """The place of weights: a folder, a GGUF file, or a Hub id at a commit.

    `gguf_file` is an absolute path, or one in the repository `path`; of a split model it is the first part.
    `revision` is the commit that the name stood for when it was read, so that every file is of that one.
    """

    name: str
    kind: Kind
    path: str
    revision: str | None = None
    gguf_file: str | None = None
    subfolder: str = ""
    weights_file: str | None = None
    """the file of weights, or their index, that was named; None where transformers' rule chooses it"""
    repository: Repository | None = None
    """where it is on the Hub"""

    def __post_init__(self) -> None:
        if os.path.isabs(self.subfolder) or not all(map(is_plain, Path(self.subfolder).parts)):
            raise ModelError(
                f"{self.name}: modules.json names the folder {self.subfolder!r:.80}, and its modules are in "
                "folders of its own. Fetch the model again."
            )

    @property
    def place(self) -> tuple[str, str | None, str]:
        """Return a key that is equal for two sources of the same weights, however they are spelled."""
        path = os.path.join(self.path, self.gguf_file) if self.gguf_file else self.path
        return path if self.is_on_hub else os.path.realpath(path), self.revision, self._inside

    @property
    def folder_name(self) -> str:
        """Its folder, as a user would type it in front of a file's name."""
        named = Path(self.name)
        folder = named.parent if self.weights_file else named
        return str(folder / self.subfolder)

    @property
    def _inside(self) -> str:
        return os.path.join(self.subfolder, self.weights_file or "")

    @property
    def prefix(self) -> str:
        """Return what the names of its files begin with in the folder or the repository that holds it."""
        return f"{self.subfolder}/" if self.subfolder else ""

    @property
    def is_on_hub(self) -> bool:
        """Return whether its files are those of a repository, in the cache or not."""
        return self.repository is not None

    def file(self, name: str) -> str | None:
        """The path of one of its files, fetched from the Hub if need be; None if it has none."""
        if self.repository is None:
            path = os.path.join(self.path, self.subfolder, name)
            return path if os.path.isfile(path) else None
        with translated(self.name):
            return self.repository.file(self.prefix + name)

    def where(self, *, trust_remote_code: bool) -> dict[str, Any]:
        """Return how transformers finds its files: in the cache, where it is on the Hub.

        Raises:
            ModelNotFoundError: the Hub does not give its settings.
        """
        arguments: dict[str, Any] = {"revision": self.revision, "trust_remote_code": trust_remote_code}
        if self.subfolder:
            arguments["subfolder"] = self.subfolder
        # Code of a model may be in another repository.
        if self.repository is not None and not trust_remote_code:
            with translated(self.name):
                self.repository.fetch_settings(self.subfolder)
            arguments["local_files_only"] = self.repository.listed is not None or self.repository.is_cached
        return arguments

    def note(self, notes: Notes) -> None:
        """Note where it is read from the cache alone, and what the cache may lack."""
        settings = "tokenizer_config.json"
        if self.repository and self.repository.lacks(settings) and self.file("tokenizer.json") is not None:
            notes.add(
                "partial-cache",
                f"{self.name}: the cache holds tokenizer.json and no {settings}, which the Hub may have: "
                "with it the tokens may be others",
                model=self.name,
            )
        if self.repository is not None and self.repository.unreachable is not None:
            notes.add(
                "hub-unreachable",
                f"{self.name}: the Hub could not be asked ({self.repository.unreachable}), so what the cache "
                f"holds was read, at commit {self.revision}: there may be a newer one",
                model=self.name,
            )


@dataclass(frozen=True)
class ModelReference:
    """A MODEL: weights, adapters on them in that order, or an adapter alone (`model` is None)."""

    name: str
    model: Source | None
    adapters: tuple[Source, ...] = ()


def parse_model(name: str) -> ModelReference:
    """Find out what a MODEL names.

    Raises:
        ModelNotFoundError: nothing is there under that name, and it cannot be a Hub id.
        AdapterError: in MODEL+ADAPTER, MODEL is an adapter or ADAPTER is none.
    """
    # Where no split works, the whole name goes on, so that the error shows what the user typed.
    parts = _parts(name) or [name]
    if len(parts) > 1:
        return _with_adapters(name, _source(parts[0]), [_adapter(part) for part in parts[1:]])
    source = _source(name)
    # A file that was named counts for more than what else is in its folder.
    if source.kind == "gguf" or source.weights_file or not source.file("adapter_config.json"):
        if source.weights_file in ADAPTER_FILES:
            return ModelReference(name, None, (replace(source, weights_file=None),))
        return ModelReference(name, source)
    if own := _own_weights(source):
        raise AdapterError(
            f"{name}: holds both a model ({own}) and an adapter (adapter_config.json). Say which: "
            f"{_ways_to_say(source, own)}."
        )
    return ModelReference(name, None, (source,))


def adapter_base(adapter: Source) -> Source:
    """The model that an adapter says it belongs to.

    Raises:
        AdapterError: its configuration does not name one.
        ModelNotFoundError: nothing is there under the name in its configuration.
    """
    settings = adapter_settings(adapter)
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not named:
        raise AdapterError(
            f"{adapter.name}: this adapter does not say which model it belongs to. "
            f"Name it: MODEL+{adapter.name}"
        )
    try:
        # PEFT's `revision` is that of the base model. A folder has none, so there it is dropped.
        base = _source(f"{named}@{revision}" if revision and _on_disk(str(named)) is None else str(named))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{adapter.name}: the model that this adapter belongs to is not there: {error.marked} Or name "
            f"another: MODEL+{adapter.name}"
        ) from error
    return replace(base, name=f"{base.name} (base of {adapter.name})")


def adapter_settings(adapter: Source) -> dict[str, object]:
    """The adapter's `adapter_config.json`."""
    path = adapter.file("adapter_config.json")
    if path is None:
        raise AdapterError(f"{adapter.name}: no adapter_config.json there. Name a PEFT adapter.")
    settings = read_json(path, AdapterError, "Fetch the adapter again.")
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: holds no JSON object. Fetch the adapter again.")
    check_settings(path, settings)
    return settings


def read_modules(listed: str) -> list[tuple[str, str]]:
    """Return the folder and the type of each module of a sentence-transformers model, by its `modules.json`.

    Raises:
        ModelError: the file cannot be read, or is no list of modules.
    """
    modules = read_json(listed, ModelError, "Fetch the model again.")
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ModelError(f"{listed}: is no list of modules. Fetch the model again.")
    return [(str(each.get("path", "")), str(each.get("type", ""))) for each in modules]


def _parts(name: str) -> list[str] | None:
    """Split MODEL+ADAPTER+ADAPTER into its parts; None where some part cannot be the name of anything.

    A `+` may also belong to the name of a file. The first way to split that works is taken. Those whose model
    is on disk are tried first, the longest name before the others.
    """
    if _on_disk(name) is not None:
        return [name]
    places = [i for i, character in enumerate(name) if character == "+"]
    on_disk = [i for i in reversed(places) if _on_disk(name[:i]) is not None]
    for place in [*on_disk, *(i for i in places if i not in on_disk)]:
        right = _parts(name[place + 1 :]) if _may_exist(name[:place]) else None
        if right is not None:
            return [name[:place], *right]
    return [name] if _may_exist(name) else None


def _own_weights(source: Source) -> str | None:
    """The file of a model's own weights beside an adapter; None where there is none."""
    if not source.file("config.json"):
        return None
    return next((name for name in _MODEL_FILES if source.file(name)), None)


def _ways_to_say(source: Source, own: str) -> str:
    """Return what to type for a model, for the adapter beside it, and for both."""
    name = source.name.rstrip("/")
    both = f"{name}+{name} for the model with the adapter on it"
    if source.kind == "hub":
        return f"{both}; for one of the two alone, download it and name its file"
    # Pickled weights are refused, so their file is not offered.
    model = f"{name}/{own} for the model, " if "safetensors" in own else ""
    return f"{model}{name}/{ADAPTER_FILES[0]} for the adapter on BASE, {both}"


def _adapter(name: str) -> Source:
    source = _source(name)
    return replace(source, weights_file=None) if source.weights_file in ADAPTER_FILES else source


def _with_adapters(name: str, model: Source, adapters: list[Source]) -> ModelReference:
    is_adapter = model.kind != "gguf" and not model.weights_file and model.file("adapter_config.json")
    if model.weights_file in ADAPTER_FILES or (is_adapter and not _own_weights(model)):
        raise AdapterError(
            f"{name}: {model.name} is itself an adapter. Write MODEL+ADAPTER, with the model first."
        )
    for adapter in adapters:
        adapter_settings(adapter)
    return ModelReference(name, model, tuple(adapters))


def _source(name: str) -> Source:
    path = _on_disk(name)
    if path is not None and path.is_file():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return _of_file(name, path)
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"{name}: this is a file, and neither a .safetensors nor a .gguf one. Name the folder that "
                "the model is in."
            )
        # The whole path: transformers looks for a bare name in the current folder before any other.
        return Source(name, "gguf", str(path.parent), gguf_file=first_part(str(path.absolute())))
    if path is not None:
        check_files(name, path)
        return _gguf_of(_transformer_of(Source(name, "folder", str(path))))
    if (file := _HUB_FILE.fullmatch(name)) is not None:
        return replace(_on_hub(name, file[1], file[2]), kind="gguf", gguf_file=first_part(file[3]))
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"{name!r}: no such folder or file, and not a Hub id (org/name, org/name@revision, "
            "org/name:file.gguf). Check the path."
        )
    hub_id, _, revision = name.partition("@")
    if _on_disk(hub_id) is not None:  # transformers would read the folder, and forget the revision
        raise ModelNotFoundError(
            f"{name}: {hub_id} is a folder here, and folders have no revisions. Name it without "
            f"@{revision}, or run in another folder to have it from the Hub."
        )
    return _gguf_of(_transformer_of(_on_hub(name, hub_id, revision or None)))


def _on_hub(name: str, hub_id: str, revision: str | None) -> Source:
    with translated(name):
        repository = find_repository(hub_id, revision)
    return Source(name, "hub", hub_id, repository.commit, repository=repository)


def _gguf_of(source: Source) -> Source:
    """Return the source, or its GGUF file where a folder or a repository holds no other weights."""
    if source.subfolder:
        return source
    if source.repository is None:
        files = [path.name for path in Path(source.path).iterdir() if path.is_file()]
        file = only_gguf(source.name, files, f"{source.name.rstrip('/')}/{{}}")
        file = file and str(Path(source.path, file).absolute())
    # A repository of GGUF files may hold a config.json as well; its name then usually says GGUF. Of any other
    # repository with a configuration the list of files is not asked for: that is one request less.
    elif "gguf" in source.path.lower() or not (
        source.file("config.json") or source.file("adapter_config.json")
    ):
        file = only_gguf(source.name, source.repository.names(), f"{source.name}:{{}}")
    else:
        file = None
    return source if file is None else replace(source, kind="gguf", gguf_file=file)


def _of_file(name: str, path: Path) -> Source:
    """Return the folder of a safetensors file, or of an index, of which that file alone is read."""
    if path.name not in ADAPTER_FILES and not (path.parent / "config.json").is_file():
        raise ModelNotFoundError(
            f"{name}: no config.json beside it, so what model its tensors are of is not known. Put the "
            "model's config.json into that folder."
        )
    shard = _SHARD.fullmatch(path.name)
    if shard and (path.parent / f"{shard[1]}.safetensors.index.json").is_file():
        raise ModelNotFoundError(
            f"{name}: one shard of several. Name their index: {Path(name).parent}/{shard[1]}"
            ".safetensors.index.json"
        )
    check_files(name, path.parent)
    return Source(name, "folder", str(path.parent), weights_file=path.name)


def _transformer_of(source: Source) -> Source:
    """Return the transformer of a sentence-transformers folder, which may be in a folder of its own."""
    if source.file("config.json") or not (listed := source.file("modules.json")):
        return source
    folders = [path for path, kind in read_modules(listed) if kind.endswith("Transformer")]
    return replace(source, subfolder=folders[0]) if folders else source


def _on_disk(name: str) -> Path | None:
    path = user_path(name)
    try:
        return path if name and path.exists() else None
    except (OSError, ValueError):  # a name that is too long for a path is none
        return None


def _may_exist(name: str) -> bool:
    return _on_disk(name) is not None or any(form.fullmatch(name) for form in (_HUB_ID, _HUB_FILE))
