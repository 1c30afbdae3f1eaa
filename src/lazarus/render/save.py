"""Which format a path names, and how a file is written so that nobody ever reads half of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from lazarus.errors import MissingPackageError, OutputError, SaveError
from lazarus.render import table
from lazarus.render.lens import table as lens_table
from lazarus.render.weights import table as weight_table
from lazarus.results import ActivationDiffRecord, AnyRecord, CompareRecord, WeightDiffRecord, write_json

Writer = Callable[[Any, IO[bytes]], None]

LEAST_FREE_BYTES = 1 << 20
TEMPORARY = ".lazarus-"


@dataclass(frozen=True)
class Format:
    """A file format: what writes it, and the package and extra that it needs."""

    write: Writer
    package: str | None = None
    extra: str | None = None


def _picture(kind: Literal["png", "svg", "pdf"]) -> Format:
    def write(record: ActivationDiffRecord, stream: IO[bytes]) -> None:
        from lazarus.render.figure import write_figure

        write_figure(record, stream, kind)

    return Format(write, "matplotlib", "plot")


def _write_report(record: ActivationDiffRecord, stream: IO[bytes], rows_file: str | None = None) -> None:
    from lazarus.render.report import write_html

    write_html(record, stream, rows_file)


def _lens_picture(kind: Literal["png", "svg", "pdf"]) -> Format:
    def write(record: CompareRecord, stream: IO[bytes]) -> None:
        from lazarus.render.lens.figure import write_figure

        write_figure(record, stream, kind)

    return Format(write, "matplotlib", "plot")


def _write_lens_page(record: CompareRecord, stream: IO[bytes]) -> None:
    from lazarus.render.lens.page import write_html

    write_html(record, stream)


def _weight_picture(kind: Literal["png", "svg", "pdf"]) -> Format:
    def write(record: WeightDiffRecord, stream: IO[bytes]) -> None:
        from lazarus.render.weights.figure import write_figure

        write_figure(record, stream, kind)

    return Format(write, "matplotlib", "plot")


def _write_weight_page(record: WeightDiffRecord, stream: IO[bytes]) -> None:
    from lazarus.render.weights.page import write_html

    write_html(record, stream)


FORMATS: dict[str, dict[str, Format]] = {
    "activation-diff": {
        ".json": Format(write_json),
        ".csv": Format(table.write_csv),
        ".parquet": Format(table.write_parquet, "pyarrow", "parquet"),
        ".md": Format(table.write_markdown),
        ".html": Format(_write_report),
        ".png": _picture("png"),
        ".svg": _picture("svg"),
        ".pdf": _picture("pdf"),
    },
    "weight-diff": {
        ".json": Format(write_json),
        ".csv": Format(weight_table.write_csv),
        ".parquet": Format(weight_table.write_parquet, "pyarrow", "parquet"),
        ".md": Format(weight_table.write_markdown),
        ".html": Format(_write_weight_page),
        ".png": _weight_picture("png"),
        ".svg": _weight_picture("svg"),
        ".pdf": _weight_picture("pdf"),
    },
    "compare": {
        ".json": Format(write_json),
        ".csv": Format(lens_table.write_csv),
        ".parquet": Format(lens_table.write_parquet, "pyarrow", "parquet"),
        ".md": Format(lens_table.write_markdown),
        ".html": Format(_write_lens_page),
        ".png": _lens_picture("png"),
        ".svg": _lens_picture("svg"),
        ".pdf": _lens_picture("pdf"),
    },
}
"""The formats of each command's results."""

_KNOWN = {suffix for formats in FORMATS.values() for suffix in formats}


def format_of(path: str, command: str) -> Format:
    """The format that the suffix names; any other suffix, or none, is JSON.

    Raises:
        OutputError: it is the suffix of a format that this command's results are not written in.
        MissingPackageError: the package that the format needs is not installed.
    """
    suffix, formats = Path(path).suffix.lower(), FORMATS[command]
    if suffix in _KNOWN and suffix not in formats:
        raise OutputError(f"-o {path}: {command} writes no {suffix}. Choose one of {', '.join(formats)}.")
    chosen = formats.get(suffix, formats[".json"])
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        raise MissingPackageError(
            f"-o {path}: {suffix} needs the package {chosen.package}. Install it with "
            f"`pip install 'lazarus-introspect[{chosen.extra}]'`."
        )
    return chosen


def check_outputs(paths: Sequence[str], command: str, inputs: Sequence[str] = ()) -> None:
    """Check every output before anything is run: its format, its folder, its disk.

    `inputs` are what the run reads; no output may overwrite a file among them, or one of a model's.

    Raises:
        OutputError: a path that cannot be written, is given twice, or is an input.
    """
    parts = [part for path in inputs for part in (path, *path.split("+"))]  # MODEL+ADAPTER
    read = {os.path.realpath(os.path.expanduser(part)) for part in parts if part}
    seen: set[str] = set()
    for path in paths:
        check_output(path, command)
        real = os.path.realpath(path)
        overwrites = real in read or (os.path.dirname(real) in read and not _is_ours(real))
        overwrites = overwrites and os.path.isfile(real)
        if overwrites or (real in seen and not _is_special(path)):
            fault = "is read by this run" if overwrites else "is given twice"
            raise OutputError(f"-o {path}: this file {fault}. Give each output a path of its own.")
        seen.add(real)


def _is_ours(path: str) -> bool:
    """Return whether a file in a model's folder may be an earlier output, and not a part of the model.

    What has no suffix of another format is JSON.
    """
    file, suffix = Path(path), Path(path).suffix.lower()
    if suffix in _KNOWN - {".json"} or not file.is_file():
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
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise OutputError(
            f"-o {path}: no file can be made in {folder}: {error.strerror}. Choose another folder, or "
            "allow writing there."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OutputError(f"-o {path}: {free} bytes are free on that disk. Make room first.")


def save(record: AnyRecord, path: str) -> list[str]:
    """Write a record, and return the files that it is in.

    A page that cannot hold all rows has them in a file of its own, written first: `NAME.rows.parquet`, or
    `NAME.rows.csv` without pyarrow.

    Raises:
        SaveError: the disk gave out; whatever was there before is as it was.
    """
    write = format_of(path, record.command).write
    rows = _rows_beside(record, path)
    if rows is None:
        _save_one(record, path, write)
        return [path]
    _save_one(record, rows, format_of(rows, record.command).write)
    _save_one(record, path, partial(_write_report, rows_file=Path(rows).name))
    return [rows, path]


def _rows_beside(record: AnyRecord, path: str) -> str | None:
    """Return where the rows go that a page leaves out; None where the output is complete in itself."""
    is_page = Path(path).suffix.lower() == ".html" and not _is_special(path)
    if not is_page or not isinstance(record, ActivationDiffRecord):
        return None
    from lazarus.render.report import is_sampled

    has_parquet = importlib.util.find_spec("pyarrow") is not None
    suffix = ".rows.parquet" if has_parquet else ".rows.csv"
    return str(Path(path).with_suffix(suffix)) if is_sampled(record) else None


def _save_one(record: AnyRecord, path: str, write: Writer) -> None:
    """Write to a file beside the target, then rename it into its place."""
    try:
        if _is_special(path):
            with open(path, "wb") as stream:
                write(record, stream)
        else:
            _write_and_rename(record, Path(path), write)
    except OSError as error:
        older = "" if _is_special(path) else "An older file there is as it was. "
        raise SaveError(
            f"-o {path}: could not be written: {error.strerror}. {older}Make room or choose another "
            "path, and run again."
        ) from error


def _write_and_rename(record: AnyRecord, target: Path, write: Writer) -> None:
    target = Path(os.path.realpath(target))  # a link stays a link
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=TEMPORARY)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(_mode_for(target))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _mode_for(target: Path) -> int:
    """The permissions of the file that is replaced, or those that a new file gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _is_special(path: str) -> bool:
    """A device or a pipe (/dev/stdout), which must be written to and never replaced."""
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()
