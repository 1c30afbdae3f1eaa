"""A record without the paths of the machine: of each, its last part stays."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lazarus.results.rows import ResultRows

T = TypeVar("T")

_END = r"\s\"'`()\[\]{},;|<>+@"
# A path from the root, of Windows or of the home folder: in a sentence it has two parts at least.
_PATH = re.compile(
    rf"(?<![\w.:/\\~-])(?:file://)?(?:~[^/\\{_END}:]*|[A-Za-z]:|\\)?[/\\](?:[^{_END}:/\\]+[/\\]+)+[^{_END}:/\\]*"
    rf"|(?<![\w.:/\\-])~[^/\\{_END}:]*[/\\][^{_END}:/\\]*"
)
_WHOLE = re.compile(r"(?:file://)?(?:~[^/\\]*|[A-Za-z]:|\\)?[/\\][^:]*")

_SAID = {"prompt", "prompts", "tracked", "track", "prompt_tokens", "rendered"}
"""fields whose texts are what a prompt or a model says"""
_SAYING = {
    "PromptRecord", "RecordedPrompt", "ReadoutToken", "MinedToken", "LensToken", "TokenEvolution",
    "TokenChoice", "Parting", "TokenTrace", "GroupCurve", "GroupContrast",
}  # fmt: skip
"""records of which all texts are"""


@dataclass(frozen=True)
class _Machine:
    """The folders of this machine, as they stand in texts, and the user's name."""

    folders: dict[str, str]
    """what each is called instead, the longest path first"""
    user: str
    paths: tuple[str, ...] = ()
    """those that are known to be paths from end to end, the longest first"""

    @classmethod
    def here(cls) -> _Machine:
        home = Path(os.path.expanduser("~"))
        names = {home: "~", Path.cwd(): Path.cwd().name, Path(tempfile.gettempdir()): "tmp"}
        found = {str(each): name for place, name in names.items() for each in (place, place.resolve())}
        # A root is no folder of anyone's.
        kept = sorted((each for each in found if len(Path(each).parts) > 1), key=len, reverse=True)
        return cls({each: found[each] for each in kept}, home.name)

    def without_folders(self, text: str) -> str:
        """Return the text in which what is in a known folder is named by its last part."""
        for folder, name in self.folders.items():
            if folder in text:
                below = rf"(?:[/\\][^{_END}:/\\]+)*[/\\](?=[^{_END}:/\\])"
                text = re.sub(re.escape(folder) + below, "", text)
                text = re.sub(rf"{re.escape(folder)}(?![\w-])[/\\]?", name, text)
        return text

    def without_paths(self, text: str) -> str:
        """Return the text in which every path is its last part."""
        for path in self.paths:
            text = text.replace(path, _last(path))
        text = _PATH.sub(lambda found: _last(found[0]), self.without_folders(text))
        if self.user:
            text = re.sub(rf"(?<![\w.-]){re.escape(self.user)}[/\\]+", "", text)
        return text


def anonymised(record: T) -> T:
    """Return a record, or any data in it, of which no text has a path of the machine or its user's name.

    What prompts and models say is left alone, but for the paths of the home, working and temporary folders.
    """
    machine = _Machine.here()
    # Blanks in a path are told from those around it only where a field is nothing but the path.
    whole = sorted({path for text in _texts(record) for path in _whole_paths(text)}, key=len, reverse=True)
    return _mapped(record, replace(machine, paths=tuple(whole)), said=False)  # type: ignore[no-any-return]


def without_paths(text: str) -> str:
    """Return a text, or a name, in which every path of the machine is its last part."""
    return replace(_Machine.here(), paths=tuple(_whole_paths(text))).without_paths(text)


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _mapped(node: Any, machine: _Machine, *, said: bool) -> Any:
    if isinstance(node, str):
        return machine.without_folders(node) if said else machine.without_paths(node)
    if isinstance(node, list | tuple):
        return type(node)([_mapped(item, machine, said=said) for item in node])
    if isinstance(node, dict):
        return {name: _mapped(value, machine, said=said) for name, value in node.items()}
    if isinstance(node, ResultRows):
        return ResultRows([machine.without_folders(text) for text in node.prompts], node.columns)
    if isinstance(node, msgspec.Struct):
        says = type(node).__name__ in _SAYING
        fields = {
            name: _mapped(getattr(node, name), machine, said=said or says or name in _SAID)
            for name in node.__struct_fields__
        }
        return msgspec.structs.replace(node, **fields)
    return node


def _texts(node: Any) -> Iterator[str]:
    """Yield what is called something in a record: every text that is neither said nor a note."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _texts(item)
    elif isinstance(node, msgspec.Struct) and type(node).__name__ not in _SAYING:
        for name in node.__struct_fields__:
            if name not in _SAID:
                yield from _texts(getattr(node, name))


def _whole_paths(text: str) -> list[str]:
    """Return the paths that a text consists of: one, or a model's and its adapters'."""
    return [part for part in text.split("+") if _WHOLE.fullmatch(part) and _last(part)]
