"""The files of an adapter: its tensors under PEFT's names, and what else is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazarus.errors import AdapterError, WeightsError
from lazarus.models.contents import Unread
from lazarus.models.faults import translated
from lazarus.models.files import ReadFiles
from lazarus.models.fitting import OUTER
from lazarus.models.reference import Source, adapter_settings
from lazarus.models.stored import read_headers
from lazarus.notes import Notes

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
"""what torch.compile, DDP and FSDP put into names"""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it is stored."""

    folder: str
    tensors: Mapping[str, Tensor]
    """by the names that PEFT gives them, each once"""
    is_as_stored: bool
    """whether the file has these names, and no others"""
    unread: tuple[Unread, ...]


def read_adapter(adapter: Source, model: PreTrainedModel, notes: Notes) -> AdapterFiles:
    """Read the tensors of an adapter, for a model.

    Raises:
        AdapterError: its configuration names modules whose tensors are not there.
        WeightsError: its weights are pickled, damaged or absent.
    """
    path = adapter.file(WEIGHTS)
    if path is None:
        raise WeightsError(
            f"{adapter.name}: no adapter_model.safetensors there. Pickled adapters (.bin) can run "
            "code when they are read and are refused: save it again as safetensors."
        )
    with translated(adapter.name):
        stored = {key: each.read().to(model.device) for key, each in read_headers([path]).items()}
    named = {_peft_name(key, stored): key for key in stored}
    tensors = _once(model, {name: stored[key] for name, key in named.items()})
    _check_saved(adapter, tensors, [path for path, _ in model.named_modules()])
    folder = str(Path(path).parent)
    _note_prefix(adapter, named, notes)
    _note_others(adapter, folder, notes)
    return AdapterFiles(folder, tensors, tensors.keys() == stored.keys(), _unread(adapter))


def files_of_adapter(adapter: Source) -> ReadFiles:
    """Return the files of an adapter, by names that begin with that of its folder."""
    folder, prefix = Path(adapter.path), f"{Path(adapter.path).name}/"
    files = ReadFiles(adapter.name)
    for name in ("adapter_config.json", WEIGHTS):
        if (path := adapter.file(name)) is not None:
            folder = Path(path).parent
            files.add(folder, [path], prefix)
    files.add_settings(folder, prefix)
    return files


def _peft_name(key: str, stored: Mapping[str, Tensor]) -> str:
    """The name that PEFT gives a tensor, without what a wrapper has put into it."""
    for wrapper in _WRAPPERS:
        # `module.` is taken off the front alone: it may also be the name of a module within the model.
        key = key.removeprefix(wrapper).replace(f".{wrapper}", ".") if wrapper != "module." else key
    key = key.removeprefix("module.")
    has_outer = any(OUTER in each for each in stored)
    return key if has_outer else OUTER + key


def _note_prefix(adapter: Source, named: Mapping[str, str], notes: Notes) -> None:
    other = [key for name, key in named.items() if name != key]
    if other:
        notes.add(
            "wrapped-names",
            f"{adapter.name}: {len(other)} of its {len(named)} tensor names are not those that PEFT gives, "
            f"first {other[0]}: they were read without a wrapper's prefix, and other tools need them renamed",
            model=adapter.name,
        )


def _note_others(adapter: Source, folder: str, notes: Notes) -> None:
    others = sorted(path.parent.name for path in Path(folder).glob("*/adapter_config.json"))
    if adapter.kind == "folder" and others:
        notes.add(
            "other-adapters",
            f"{adapter.name}: it holds other adapters besides, which were not put on: {', '.join(others)}. "
            f"Name one as {adapter.name}/{others[0]}",
            model=adapter.name,
        )


def _unread(adapter: Source) -> tuple[Unread, ...]:
    path = adapter.file(_PICKLED) if adapter.kind == "folder" else None
    return () if path is None else (Unread(f"{adapter.name}/{_PICKLED}", (path,)),)


def _check_saved(adapter: Source, tensors: Mapping[str, Tensor], modules: Sequence[str]) -> None:
    """Refuse an adapter that lacks what it says to bring whole of this model's modules.

    PEFT names heads of several classes, such as `classifier` and `score`, of which a model has one.
    """
    named = adapter_settings(adapter).get("modules_to_save")
    for module in named if isinstance(named, list) else ():
        is_there = any(f".{path}".endswith(f".{module}") for path in modules)
        if is_there and not any(f".{module}." in key for key in tensors):
            raise AdapterError(
                f"{adapter.name}: adapter_config.json names {module} in modules_to_save, and {WEIGHTS} holds "
                "no tensor of it. Fetch it again, or take the name out."
            )


def _once(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter without the trained tokens that it holds a second time, for a tied LM head.

    PEFT saves those of a tied table under both of its names, and has one parameter for them when it loads.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(table, "weight", head):
        return dict(stored)
    paths = {path: module for path, module in model.named_modules() if module in (table, head)}
    own = next((path for path, module in paths.items() if module is table), "")
    twin = next((path for path, module in paths.items() if module is head), "")
    found = {}
    for key, tensor in stored.items():
        first = stored.get(key.replace(f"{OUTER}{twin}.", f"{OUTER}{own}.", 1))
        is_second = ".token_adapter." in key and first is not None and first is not tensor
        if not is_second or first is None or not torch.equal(first, tensor):
            found[key] = tensor
    return found
