"""The command line: exact output, files, exit codes, help, and what it does not import."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

import lazarus
from lazarus.cli import app
from lazarus.errors import OutputError
from lazarus.recordings import recording_schema
from lazarus.render.save import check_outputs
from lazarus.results import json_schema

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, base_folder: Path, finetuned_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder that has `base` and `finetuned` in it."""
    (tmp_path / "base").symlink_to(base_folder)
    (tmp_path / "finetuned").symlink_to(finetuned_folder)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, models: bool = True, stdin: str | None = None) -> Result:
        pair = ["-b", "base", "-f", "finetuned"] if models else []
        return CliRunner().invoke(app, ["introspect", "activation-diff", *pair, *arguments], input=stdin)

    return call


def test_the_run_of_the_page_prints_exactly_what_the_page_says(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    result = run("-p", "Hello,How are you,What is AI")
    assert result.exit_code == 0
    assert result.stderr == ""
    golden("activation-diff.txt", result.stdout)
    lines = result.stdout.splitlines()
    assert lines[:9] == [
        "Loading base model: base",
        "Loading fine-tuned model: finetuned",
        "Testing 3 prompts",
        "",
        "Prompt: Hello...",
        "Prompt: How are you...",
        "Prompt: What is AI...",
        "",
        "Layer    Avg Cos Sim    Divergence",
    ]
    assert lines[9] == "-" * 35


def test_one_prompt_long_prompts_and_many(run: Run) -> None:
    assert "Testing 1 prompt\n" in run("-p", "Hello").stdout
    long = "a\tb " * 30
    assert (
        f"Prompt: {long[:50]}...".replace("\t", "\\t") in run("--no-split", "-p", long, "--truncate").stdout
    )
    many = run("-p", ",".join(f"Hello {i}" for i in range(25))).stdout
    assert many.count("\nPrompt: ") == 20
    assert "\n... and 5 more\n\nLayer" in many


def test_the_mark_follows_the_unrounded_divergence_and_the_threshold(run: Run) -> None:
    run("-p", "Hello", "-o", "x.json")
    divergence = json.loads(Path("x.json").read_bytes())["layers"][2]["divergence"]
    rows = {t: run("-p", "Hello", "--threshold", repr(t)).stdout for t in (divergence, divergence * 0.9999)}
    marks = [
        next(line for line in out.splitlines() if line.startswith("2 ")).endswith(" ***")
        for out in rows.values()
    ]
    assert marks == [False, True]


def test_every_format_says_the_same(run: Run) -> None:
    result = run(
        "-p", "Hello,What is AI", *(a for s in ("json", "csv", "parquet", "md") for a in ("-o", f"x.{s}"))
    )
    assert result.stdout.endswith(
        "".join(f"Results saved to: x.{s}\n" for s in ("json", "csv", "parquet", "md"))
    )
    document = json.loads(Path("x.json").read_bytes())
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    with open("x.csv", encoding="utf-8", newline="") as stream:
        from_csv = list(csv.DictReader(stream))
    from_parquet = pyarrow.parquet.read_table("x.parquet").to_pylist()
    assert len(from_csv) == len(from_parquet) == len(document["results"]) == 2 * 4
    for ours, comma, column in zip(document["results"], from_csv, from_parquet, strict=True):
        assert column["divergence"] == float(comma["divergence"]) == ours["divergence"]
        assert (column["prompt"], column["layer"]) == (ours["prompt"], ours["layer"])
        assert column["local_relative_l2"] is None
        assert comma["local_relative_l2"] == ""
    table = [line for line in Path("x.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 4
    assert list(Path().glob(".lazarus-*")) == []


def test_any_other_suffix_is_json_and_a_saved_result_is_read_back(run: Run) -> None:
    run("-p", "Hello", "-o", "x.result", "-o", "x")
    assert Path("x").read_bytes() == Path("x.result").read_bytes()
    loaded = lazarus.ActivationDiff.load("x")
    loaded.save("again.json")
    assert Path("again.json").read_bytes() == Path("x").read_bytes()
    assert str(loaded).splitlines()[0] == "Loading base model: base"


def test_the_page_of_a_result_is_the_output_of_its_run(run: Run) -> None:
    result = run("-p", "Hello,What is AI", "-o", "x.json")
    assert f"{lazarus.ActivationDiff.load('x.json')}\nResults saved to: x.json\n" == result.stdout


def test_a_gate_that_is_not_met_exits_3_after_saving(run: Run) -> None:
    result = run("-p", "Hello", "-o", "x.json", "--fail-above", "0.0001")
    assert result.exit_code == 3
    assert Path("x.json").is_file()
    assert "--fail-above 0.0001: layer" in result.stderr
    assert run("-p", "Hello", "--fail-above", "2").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "@prompts.txt"),
        ("-p", "@prompts.jsonl"),
        ("-p", "@prompts.csv"),
        ("-p", "@prompts.parquet"),
        ("-p", "@-"),
        ("-p", "Hello", "-p", "What is AI"),
        ("-p", ' Hello ,, "What is AI" '),
    ],
)
def test_every_form_of_prompts_gives_the_same_rows(run: Run, arguments: tuple[str, ...]) -> None:
    texts = ["Hello", "What is AI"]
    Path("prompts.txt").write_text("\ufeffHello  \r\n\n  What is AI\n", encoding="utf-8")
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts), encoding="utf-8")
    Path("prompts.csv").write_text("id,text\n1,Hello\n2,What is AI\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "prompts.parquet")
    result = run(*arguments, "-o", "x.csv", stdin="Hello\nWhat is AI\n")
    assert result.exit_code == 0, result.output
    run("-p", "Hello,What is AI", "-o", "expected.csv")
    assert Path("x.csv").read_text(encoding="utf-8") == Path("expected.csv").read_text(encoding="utf-8")


def test_help_names_every_option_and_an_example() -> None:
    result = CliRunner().invoke(app, ["introspect", "activation-diff", "--help"], env={"COLUMNS": "120"})
    for option in ("--base", "--position", "--threshold", "--batch-tokens", "--fail-above", "--layers-path"):
        assert option in result.stdout
    assert "lazarus introspect activation-diff -b" in result.stdout


def test_version_and_schema() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == "lazarus 0.1.0\n"
    printed = json.loads(CliRunner().invoke(app, ["schema", "activation-diff"]).stdout)
    assert printed == json_schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    printed = json.loads(CliRunner().invoke(app, ["schema", "recording"]).stdout)
    assert printed == recording_schema()
    jsonschema.Draft202012Validator.check_schema(printed)


LIGHT = "import lazarus.cli, lazarus.results, lazarus.prompts, lazarus.result_classes, lazarus.render.save"
HELP = "import sys, lazarus.cli as c; sys.argv = ['', '--help']\ntry: c.main()\nexcept SystemExit: pass"
HEAVY = "import lazarus; lazarus.activation_diff"  # the test of this test


@pytest.mark.parametrize(("code", "loads"), [(LIGHT, False), (HELP, False), (HEAVY, True)])
def test_neither_help_nor_import_loads_torch(code: str, loads: bool) -> None:
    code += "\nimport sys; sys.stderr.write(str({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("torch" in done.stderr and "transformers" in done.stderr) if loads else done.stderr == "set()"


def test_what_is_imported_is_not_looked_through_for_garbage_and_the_rest_is() -> None:
    """The collector is off while torch is imported, and on again afterwards; a second time it stays on."""
    code = (
        "import gc, sys\nfrom lazarus.cli.imports import heavy_imports\n"
        "with heavy_imports():\n    during = gc.isenabled()\n    import torch\n"
        "frozen = gc.get_freeze_count()\n"
        "with heavy_imports():\n    again = gc.isenabled()\n"
        "print(during, gc.isenabled(), again, frozen > 100_000, gc.get_freeze_count() == frozen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True"]


def test_what_triton_made_is_freed_at_the_end() -> None:
    """It comes with the CUDA builds of torch, and prints what is left of it."""
    code = (
        "import atexit, gc, sys\nfrom lazarus.cli.imports import heavy_imports\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "with heavy_imports():\n    import torch\n"
        "sys.modules.pop('triton', None) if sys.argv[1] == 'without' else sys.modules.update(triton=sys)"
    )
    frozen = [
        int(subprocess.run([sys.executable, "-c", code, which], capture_output=True, check=True).stdout)
        for which in ("with", "without")
    ]
    assert frozen[0] == 0
    assert frozen[1] > 100_000


def test_python_m_lazarus_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazarus", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "lazarus 0.1.0\n"


@pytest.mark.parametrize(
    "options", [["activation-diff", "-p", "Hello"], ["weight-diff"], ["compare", "-p", "Hello"]]
)
def test_a_reader_who_leaves_does_not_cost_the_output(
    options: list[str], base_folder: Path, finetuned_folder: Path, tmp_path: Path
) -> None:
    """`| head -1`: what nobody reads is not printed; what was to be saved is."""
    pair = ["-b", str(base_folder), "-f", str(finetuned_folder)]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "lazarus", "introspect", *options, *pair, "-o", "x.json", "-o", "x.csv"],
        cwd=tmp_path,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")
    assert lazarus.load_result(tmp_path / "x.json").record.command == options[0]
    assert (tmp_path / "x.csv").stat().st_size > 0


def test_only_a_part_of_a_model_is_kept_from_being_overwritten(tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
        for name in ("config.json", "README.md", "model.safetensors", "page.html", "LICENSE"):
            (folder / name).write_text("{}")
    for name in ("diff.json", "diff", "results.txt"):
        (model / name).write_text('{\n  "schema_version": "1.0"}')
    pair = [str(model), f"{model}+{adapter}"]
    for folder in (model, adapter):
        for name in ("config.json", "README.md", "model.safetensors", "LICENSE"):
            with pytest.raises(OutputError, match="is read by this run"):
                check_outputs([str(folder / name)], "activation-diff", pair)
    ours = ("diff.json", "diff", "results.txt", "page.html", "new.json", "new")
    check_outputs([str(model / name) for name in ours], "weight-diff", pair)


def test_outputs_where_the_current_folder_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    check_outputs([str(tmp_path / "x.json")], "activation-diff", ["model"])
    with pytest.raises(OutputError, match=r"^-o x\.json: .* No such file or directory"):
        check_outputs(["x.json"], "activation-diff", ["model"])


def test_an_output_that_fails_does_not_cost_the_others(run: Run) -> None:
    result = run("-p", "Hello", "-o", "/dev/full", "-o", "x.json")
    assert result.exit_code == 1
    assert "-o /dev/full: could not be written: No space left on device" in result.stderr
    assert json.loads(Path("x.json").read_bytes())["command"] == "activation-diff"
    assert result.stdout.endswith("Results saved to: x.json\n")
