"""Outputs that cannot be written, or must not be."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from bad_input.kind import BadInput, compare, holding, typed
from factories import save_model, tiny_llama, tiny_tokenizer

A_FILE_AT_MOST = 512
"""bytes: less than any result, and far less than a disk that is full leaves behind"""


@contextmanager
def _stdout_full() -> Iterator[None]:
    """`> /dev/full`; what could not be written fails once more when the stream is closed."""
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    try:
        with patch("sys.stdout", stream):
            yield
    finally:
        with suppress(OSError):
            stream.close()


@contextmanager
def _files_limited() -> Iterator[None]:
    """The kernel refuses to write more into a file than this, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (A_FILE_AT_MOST, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _into_a_folder(folder: Path) -> list[str]:
    (folder / "results").mkdir()
    return compare(o="results")


def _a_gguf_as_output(folder: Path) -> list[str]:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return compare(f="model.gguf", o="model.gguf")


def _two_widths(folder: Path) -> list[str]:
    save_model(folder / "wider", tiny_llama(hidden_size=48), tiny_tokenizer())
    (folder / "fifty.txt").write_text("".join(f"Number {i}\n" for i in range(50)), encoding="utf-8")
    return compare(f="wider", p="@fifty.txt", o="shift.safetensors")


KINDS = (
    BadInput(
        "output without a name",
        "`-o ''`",
        typed(o=""),
        ("-o ''", "no file is named"),
        exit_code=2,
    ),
    BadInput(
        "output to standard output",
        "`-o -`",
        typed(o="-"),
        ("-o '-'", "no file is named", "standard output"),
        exit_code=2,
    ),
    BadInput(
        "output folder missing",
        "`-o results/diff.json`, without that folder",
        typed(o="results/diff.json"),
        ("-o results/diff.json", "no folder results", "Make it first"),
        exit_code=2,
    ),
    BadInput(
        "output is a folder",
        "`-o results`, which is a folder",
        _into_a_folder,
        ("-o results", "this is a folder", "Name a file"),
        exit_code=2,
    ),
    BadInput(
        "output read-only",
        "`-o diff.json`, which is read-only",
        holding("diff.json", "{}"),
        ("-o diff.json", "read-only", "allow writing"),
        exit_code=2,
        # Root may write everywhere, so that the permissions alone would not bite in every test.
        around=lambda: patch("os.access", return_value=False),
    ),
    BadInput(
        "output folder not writable",
        "`-o /proc/diff.json`, where no file can be made",
        typed(o="/proc/diff.json"),
        ("-o /proc/diff.json", "no file can be made in /proc", "another"),
        exit_code=2,
    ),
    BadInput(
        "output name too long",
        "`-o` with a file name of 300 characters",
        typed(o="x" * 300),
        ("-o xxx", "File name too long", "another path"),
        exit_code=2,
    ),
    BadInput(
        "output without matplotlib",
        "`-o figure.svg` without the package matplotlib",
        typed(o="figure.svg"),
        ("-o figure.svg", "matplotlib", "pip install 'lazarus-introspect[plot]'"),
        exit_code=2,
        around=lambda: patch.dict(sys.modules, {"matplotlib": None}),
    ),
    BadInput(
        "output without pyarrow",
        "`-o diff.parquet` without the package pyarrow",
        typed(o="diff.parquet"),
        ("-o diff.parquet", "pyarrow", "pip install 'lazarus-introspect[parquet]'"),
        exit_code=2,
        around=lambda: patch.dict(sys.modules, {"pyarrow": None}),
    ),
    BadInput(
        "output twice",
        "`-o diff.json -o ./diff.json`",
        typed("-o", "./diff.json"),
        ("-o ./diff.json", "given twice", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "output over the prompts",
        "`-p @prompts.txt -o prompts.txt`",
        holding("prompts.txt", "Hello\n", p="@prompts.txt", o="prompts.txt"),
        ("-o prompts.txt", "is read by this run", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "output over the template",
        "`--chat-template chat.jinja -o chat.jinja`",
        holding("chat.jinja", "Hello", "--chat-template", "chat.jinja", o="chat.jinja"),
        ("-o chat.jinja", "is read by this run", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "output over a model",
        "`-f model.gguf -o model.gguf`",
        _a_gguf_as_output,
        ("-o model.gguf", "is read by this run", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "output over a part of a model",
        "`-o base/config.json`",
        typed(o="base/config.json"),
        ("-o base/config.json", "is read by this run", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "disk full before",
        "a disk with no room for a result",
        typed(),
        ("-o diff.json", "1000 bytes are free", "Make room"),
        exit_code=2,
        around=lambda: patch("shutil.disk_usage", return_value=SimpleNamespace(free=1000)),
    ),
    BadInput(
        "disk full on the way",
        "a disk that fills up while `diff.json` is written over an older one",
        holding("diff.json", '{"older": "result"}\n'),
        ("-o diff.json", "File too large", "as it was", "Make room"),
        around=_files_limited,
    ),
    BadInput(
        "device full",
        "`-o /dev/full`",
        typed(o="/dev/full"),
        ("-o /dev/full", "No space left on device", "another path", "run again"),
    ),
    BadInput(
        "standard output full",
        "standard output into a full disk (`> /dev/full`)",
        typed(),
        ("standard output", "No space left on device", "Make room"),
        around=_stdout_full,
        saves=("diff.json",),
    ),
)

VECTORS = (
    BadInput(
        "vectors in the folder of a model",
        "`-o base/shift.safetensors`, in the folder of the base model",
        typed(o="base/shift.safetensors"),
        ("-o base/shift.safetensors", "folder of a model", "taken for its weights", "another folder"),
        exit_code=2,
    ),
    BadInput(
        "vectors of two widths",
        "`-o shift.safetensors` for models of different width",
        _two_widths,
        ("-o shift.safetensors", "32 and 48 features", "no difference", "Leave this output out"),
        exit_code=2,
    ),
)
"""Of activation-diff alone: its siblings write no such format."""
