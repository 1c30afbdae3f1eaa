"""With `anonymous`, nothing that is saved or printed has a path of the machine, or the user's name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import lazarus
from lazarus import demo
from lazarus.cli import app
from lazarus.result_classes import load_result
from lazarus.results.anonymous import without_paths

USER = "zacharias"
SUFFIXES = (".json", ".csv", ".md", ".html", ".svg", ".parquet", ".pdf")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's home with the demo pair in it, which is the working folder's parent."""
    folder = tmp_path_factory.mktemp("users") / USER
    for name, source in (("base", demo.BASE), ("arithmetic", demo.FINETUNED)):
        shutil.copytree(source, folder / "my models" / "run-1" / name)
    (folder / "own-templates").mkdir()
    (folder / "own-templates" / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.chdir(folder / "work")
        yield folder


def told(path: Path) -> str:
    """All text of a file."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return str(table.to_pydict()) + str(table.schema.metadata)
    return path.read_bytes().decode("utf-8", "replace")


def check(text: str, home: Path) -> None:
    """Hold that a text has nothing of the machine."""
    secrets = (USER, str(home), "run-1", "my models", "own-templates", "/work", tempfile.gettempdir())
    assert [secret for secret in secrets if secret in text] == []


COMMANDS = {
    "activation-diff": ("-p", "Hello", "--work-dir", "shards", "--readout", "auto"),
    "weight-diff": ("--spectrum",),
    "compare": ("-p", "Hello"),
    "series": ("-p", "Hello"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_output_has_a_path_of_the_machine(command: str, home: Path, tmp_path: Path) -> None:
    models = home / "my models" / "run-1"
    pair = ["-b", str(models / "base"), "-f", str(models / "arithmetic")]
    options = list(COMMANDS[command])
    if command != "weight-diff":
        options += ["--chat-template", str(home / "own-templates" / "chat.jinja")]
    if "--work-dir" in options:
        options[options.index("shards")] = str(home / "work" / "shards")
    outputs = [part for suffix in SUFFIXES for part in ("-o", str(tmp_path / f"x{suffix}"))]
    done = CliRunner().invoke(app, ["introspect", command, *pair, *options, *outputs, "--anonymous"])
    assert done.exit_code == 0, done.stderr
    # Where the results are is for the one who typed it.
    check("\n".join(line for line in done.stdout.splitlines() if "Results saved to" not in line), home)
    for suffix in SUFFIXES:
        check(told(tmp_path / f"x{suffix}"), home)
    result: Any = load_result(tmp_path / "x.json")
    assert result.record.settings.anonymous
    assert "arithmetic" in str(result)
    if command != "weight-diff":
        assert result.record.settings.chat_template == "chat.jinja"


def test_a_recording_has_none_either(home: Path, tmp_path: Path) -> None:
    model = home / "my models" / "run-1" / "base"
    folder = tmp_path / "recording"
    recording = lazarus.record(model, ["Hello"], folder, anonymous=True)
    check((folder / "recording.json").read_text(), home)
    assert recording.contents.model.id == "base"
    result = lazarus.activation_diff(folder, model, anonymous=True)
    check(str(result), home)


def test_without_it_a_result_names_models_as_they_were_named(home: Path) -> None:
    models = home / "my models" / "run-1"
    found = lazarus.weight_diff(models / "base", models / "arithmetic").record
    assert found.base.id == str(models / "base")
    assert not found.settings.anonymous


def test_what_prompts_say_is_left_alone_but_for_folders_of_the_user(home: Path) -> None:
    texts = ["cat /etc/passwd and a/b", f"ls {home}/secret/x.txt", "/usr/bin/env"]
    models = home / "my models" / "run-1"
    found = lazarus.activation_diff(models / "base", models / "arithmetic", texts, anonymous=True).record
    assert [prompt.text for prompt in found.prompts] == [texts[0], "ls x.txt", texts[2]]
    assert found.results.prompts == [texts[0], "ls x.txt", texts[2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/models/base", "base"),
        ("/data/models/base+/data/adapters/one", "base+one"),
        ("/data/models/base: a note, of /data/x/y's z", "base: a note, of y's z"),
        ("C:\\Users\\me\\model.gguf is read", "model.gguf is read"),
        ("~/models/base", "base"),
        ("file:///data/models/base", "base"),
        (
            "org/model@main, https://huggingface.co/org/model",
            "org/model@main, https://huggingface.co/org/model",
        ),
        (
            "‖f − b‖ / ‖b‖ and KL(base‖fine-tuned)/2, and/or",
            "‖f − b‖ / ‖b‖ and KL(base‖fine-tuned)/2, and/or",
        ),
        (f"../{USER}/models/base", "../models/base"),
    ],
)
def test_a_path_in_a_sentence_is_its_last_part(text: str, expected: str, home: Path) -> None:
    assert without_paths(text) == expected
    assert without_paths(expected) == expected
