"""The format that a path names, and writing a file so that nobody ever reads half of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lazarus.commands import commands
from lazarus.errors import MissingPackageError, OutputError, SaveError
from lazarus.render.base.rows import write_csv, write_parquet
from lazarus.results import write_json
from lazarus.scratch import ScratchFolder

Writer = Callable[..., None]

LEAST_FREE_BYTES = 1 << 20
RECIPE = "recipe.json"
"""the end of a name that asks for the list of modules by their cost"""
VECTORS = ".safetensors"


@dataclass(frozen=True)
class Format:
    """A file format: the module of a command's renderers that writes it, and the package that it needs."""

    renderer: str
    package: str | None = None
    extra: str | None = None


FORMATS: dict[str, Format] = {
    ".json": Format(""),
    ".csv": Format("table"),
    ".parquet": Format("table", "pyarrow", "parquet"),
    ".md": Format("table"),
    ".html": Format("page"),
    ".png": Format("figure", "matplotlib", "plot"),
    ".svg": Format("figure", "matplotlib", "plot"),
    ".pdf": Format("figure", "matplotlib", "plot"),
    RECIPE: Format("recipe"),
    VECTORS: Format("vectors"),
}
"""The formats of results."""


def formats_of(command: str) -> list[str]:
    """Return the suffixes of the formats in which a command's results are written."""
    found = commands()[command]
    return [suffix for suffix, kind in FORMATS.items() if not kind.renderer or found.renderer(kind.renderer)]


def format_of(path: str, command: str) -> str:
    """Return the suffix of the format that a path names; any other suffix, or none, is JSON.

    Raises:
        OutputError: it is the suffix of a format that this command's results are not written in.
        MissingPackageError: the package that the format needs is not installed.
    """
    name, known = Path(path).name.lower(), formats_of(command)
    suffix = RECIPE if name.endswith(RECIPE) and RECIPE in known else Path(name).suffix
    if suffix in FORMATS and suffix not in known:
        raise OutputError(f"-o {path}: {command} writes no {suffix}. Choose one of {', '.join(known)}.")
    chosen = suffix if suffix in known else ".json"
    package, extra = FORMATS[chosen].package, FORMATS[chosen].extra
    if package and importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"-o {path}: {suffix} needs the package {package}. Install it with "
            f"`pip install 'lazarus-introspect[{extra}]'`."
        )
    return chosen


def writer_of(command: str, suffix: str) -> Writer:
    """Return what writes a command's record in the format of a suffix."""
    if suffix == ".json":
        return write_json
    found = commands()[command]
    renderer = found.renderer(FORMATS[suffix].renderer)
    match suffix:
        case ".csv":
            return lambda record, stream: write_csv(renderer.columns(record), stream)
        case ".parquet":
            return lambda record, stream: write_parquet(renderer.columns(record), renderer.KINDS, stream)
        case ".md":
            write: Writer = renderer.write_markdown
        case "recipe.json":
            write = renderer.write_recipe
        case ".safetensors":
            write = renderer.write_vectors
        case ".html":
            write = renderer.write_html
        case _:
            write = partial(renderer.write_figure, format=suffix[1:])
    return write


def check_outputs(paths: Sequence[str], command: str, inputs: Sequence[str] = ()) -> None:
    """Check every output before anything is run: its format, its folder, its disk.

    `inputs` are what the run reads; no output may overwrite a file among them, or one of a model's.

    Raises:
        OutputError: a path that cannot be written, is given twice, or is an input.
    """
    parts = [part for path in inputs for part in (path, *path.split("+"))]  # MODEL+ADAPTER
    read = {_real(os.path.expanduser(part)) for part in parts if part}
    seen: set[str] = set()
    for path in paths:
        check_output(path, command)
        real = os.path.realpath(path)
        is_in_model = os.path.dirname(real) in read
        # A file of a model need not be named to be read: its whole folder is an input.
        overwrites = real in read or (is_in_model and not _is_ours(real))
        overwrites = overwrites and os.path.isfile(real)
        if is_in_model and not overwrites and path.endswith(VECTORS):
            raise OutputError(
                f"-o {path}: in the folder of a model, where this file would be taken for its weights. "
                "Choose another folder."
            )
        if overwrites or (real in seen and not _is_special(path)):
            fault = "is read by this run" if overwrites else "is given twice"
            raise OutputError(f"-o {path}: this file {fault}. Give each output a path of its own.")
        seen.add(real)


def _real(path: str) -> str:
    """Return a path without links; the path itself where none of it can be there."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # in a current folder that was removed, or with a null byte in it
        return path


def _is_ours(path: str) -> bool:
    """Return whether a file in a model's folder may be an earlier output, and not a part of the model.

    What has no suffix of another format is JSON.
    """
    file, suffix = Path(path), Path(path).suffix.lower()
    if suffix in FORMATS.keys() - {".json", VECTORS} or not file.is_file():
        return file.name != "README.md"
    with file.open("rb") as stream:
        return b'"schema_version"' in stream.read(200)


def check_output(path: str, command: str) -> None:
    """Check that a path can be written, without touching what is there.

    Raises:
        OutputError: it cannot, with the reason.
    """
    if path in ("", "-"):
        raise OutputError(f"-o {path!r}: no file is named. The table is on standard output as it is.")
    format_of(path, command)
    try:
        _check_place(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"-o {path}: cannot be written: {reason}. Choose another path.") from error


def _check_place(path: str) -> None:
    if _is_special(path):
        return
    folder = Path(path).parent
    if Path(path).is_dir():
        raise OutputError(f"-o {path}: this is a folder. Name a file in it.")
    if not folder.is_dir():
        raise OutputError(f"-o {path}: there is no folder {folder}. Make it first.")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise OutputError(f"-o {path}: this file is read-only. Choose another, or allow writing.")
    try:
        # By trying: permissions say nothing of a read-only file system or a quota.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"-o {path}: no file can be made in {folder}: {error.strerror}. Choose another folder, or "
            "allow writing there."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OutputError(f"-o {path}: {free} bytes are free on that disk. Make room first.")


def save(record: Any, path: str, vectors: Mapping[str, NDArray[Any]] | None = None) -> list[str]:
    """Write a record, and return the files that it is in.

    A page that cannot hold all rows has them in a file of its own, written first: `NAME.rows.parquet`, or
    `NAME.rows.csv` without pyarrow. `vectors` are arrays that stand in no record: `.safetensors` holds them.

    Raises:
        OutputError: the record lacks what this format holds.
        SaveError: the disk gave out; whatever was there before is as it was.
    """
    suffix = format_of(path, record.command)
    write = writer_of(record.command, suffix)
    if suffix == VECTORS:
        write = partial(write, vectors=vectors)
    rows = _rows_beside(record, path)
    if rows is None:
        _save_one(record, path, write)
        return [path]
    # The rows first: a page must never name a file that is not there.
    _save_one(record, rows, writer_of(record.command, format_of(rows, record.command)))
    _save_one(record, path, partial(write, rows_file=Path(rows).name))
    return [rows, path]


def _rows_beside(record: Any, path: str) -> str | None:
    """Return where the rows go that a page leaves out; None where the output is complete in itself."""
    if Path(path).suffix.lower() != ".html" or _is_special(path):
        return None
    page = commands()[record.command].renderer("page")
    if not hasattr(page, "is_sampled") or not page.is_sampled(record):
        return None
    has_parquet = importlib.util.find_spec("pyarrow") is not None
    return str(Path(path).with_suffix(".rows.parquet" if has_parquet else ".rows.csv"))


def _save_one(record: Any, path: str, write: Writer) -> None:
    """Write to a file beside the target, then rename it into its place."""
    try:
        if _is_special(path):
            with open(path, "wb") as stream:
                write(record, stream)
        else:
            _write_and_rename(record, Path(path), write)
    except OutputError as error:
        raise OutputError(f"-o {path}: {error.marked}", option=error.option) from error
    except OSError as error:
        older = "" if _is_special(path) else "An older file there is as it was. "
        raise SaveError(
            f"-o {path}: could not be written: {error.strerror}. {older}Make room or choose another "
            "path, and run again."
        ) from error


def _write_and_rename(record: Any, target: Path, write: Writer) -> None:
    target = Path(os.path.realpath(target))  # a link stays a link
    # In the same folder, because only within one file system a rename is atomic.
    with ScratchFolder(target.parent) as folder:
        temporary = folder.path / target.name
        with temporary.open("wb") as stream:
            write(record, stream)
            stream.flush()
            # The new name may reach the disk before the bytes do, and a crash would leave an empty file.
            os.fsync(stream.fileno())
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)


def _is_special(path: str) -> bool:
    """Return whether a path is a device or a pipe (/dev/stdout), which must never be replaced."""
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()
