"""A saved result shown again: as it was, in other formats, with another threshold, and by older versions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from typer.testing import CliRunner, Result

import lazarus
from lazarus import Comparison, WeightDiff, compare, weight_diff
from lazarus.cli import app
from lazarus.demo import BASE, FINETUNED
from lazarus.errors import GateNotMetError, ResultFileError, SaveError, UsageError
from made_records import divergences, record_of

SAVED = Path(__file__).parent / "saved"
PROMPTS = "Hello,How are you,What is AI,The answer is,Write a list,One,Two words"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, finetuned_folder: Path) -> Path:
    """What one run printed (`printed.txt`) and saved (`diff.json`)."""
    folder = tmp_path_factory.mktemp("saved")
    pair = ("-b", str(base_folder), "-f", str(finetuned_folder), "-p", PROMPTS)
    done = run("introspect", "activation-diff", *pair, "--localize", "-o", str(folder / "diff.json"))
    assert done.exit_code == 0, done.output
    (folder / "printed.txt").write_text(done.stdout.rpartition("Results saved to")[0], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def diff(folder: Path) -> lazarus.ActivationDiff:
    return lazarus.ActivationDiff.load(folder / "diff.json")


def test_it_prints_what_the_run_printed(folder: Path) -> None:
    shown = run("show", str(folder / "diff.json"))
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == (folder / "printed.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md", ".html", ".svg"])
def test_it_saves_what_the_run_would_have_saved(
    folder: Path, diff: lazarus.ActivationDiff, suffix: str, tmp_path: Path
) -> None:
    target = tmp_path / f"again{suffix}"
    shown = run("show", str(folder / "diff.json"), "-o", str(target))
    assert shown.stdout.endswith(f"Results saved to: {target}\n")
    diff.save(tmp_path / f"once{suffix}")
    assert target.read_bytes() == (tmp_path / f"once{suffix}").read_bytes()


@pytest.mark.parametrize("threshold", [0.0, 0.02, 2.0])
def test_another_threshold_gives_what_a_run_with_it_gives(
    diff: lazarus.ActivationDiff, threshold: float, base_folder: Path, finetuned_folder: Path
) -> None:
    texts = [prompt.text for prompt in diff.prompts]
    anew = lazarus.activation_diff(
        str(base_folder), str(finetuned_folder), texts, threshold=threshold, localize=True
    )
    found = diff.with_threshold(threshold)
    assert found.layers == anew.layers
    assert found.sites == anew.sites
    assert found.summary == anew.summary
    assert found.record.settings.threshold == threshold
    assert diff.record.settings.threshold == 0.1


def test_the_command_marks_by_the_threshold_given(folder: Path, diff: lazarus.ActivationDiff) -> None:
    lowest = min(layer.divergence or 0.0 for layer in diff.layers)
    shown = run("show", str(folder / "diff.json"), "--threshold", str(lowest))
    assert shown.stdout.count(" ***\n") == len(diff.layers) - 1


def test_gates_are_those_that_are_given_now(folder: Path, diff: lazarus.ActivationDiff) -> None:
    worst = max(layer.divergence or 0.0 for layer in diff.layers)
    path = str(folder / "diff.json")
    assert run("show", path, "--fail-above", str(worst), "--expect", "changed").exit_code == 0
    failed = run("show", path, "--fail-above", str(worst * 0.99))
    assert failed.exit_code == 3
    assert f"--fail-above {worst * 0.99:g}" in failed.stderr
    assert run("show", path, "--expect", "identical").exit_code == 3
    with pytest.raises(GateNotMetError, match=r"`expect=.identical.`"):
        diff.check_gates(expect="identical")
    with pytest.raises(UsageError, match="`fail_above=3`"):
        diff.check_gates(fail_above=3)


def test_a_gate_of_the_run_does_not_fail_the_showing(tmp_path: Path, folder: Path) -> None:
    saved = json.loads((folder / "diff.json").read_bytes())
    saved["settings"] |= {"fail_above": 0.0, "expect": "identical"}
    (tmp_path / "gated.json").write_text(json.dumps(saved), encoding="utf-8")
    assert run("show", str(tmp_path / "gated.json")).exit_code == 0


def test_it_does_not_write_over_the_result(folder: Path) -> None:
    path = str(folder / "diff.json")
    refused = run("show", path, "-o", path)
    assert refused.exit_code == 2
    assert "is read by this run" in refused.stderr


@pytest.mark.parametrize("name", ["activation-diff-1", "activation-diff-2"])
def test_a_result_of_an_earlier_version_is_shown(name: str, golden: Callable[[str, str], None]) -> None:
    """1 is from before intervals, noise floor and local change were measured; 2 from before streams."""
    shown = run("show", str(SAVED / f"{name}.json"))
    assert shown.exit_code == 0, shown.stderr
    golden(f"show-{name}.txt", shown.stdout)
    saved = json.loads((SAVED / f"{name}.json").read_bytes())
    found = lazarus.ActivationDiff.load(SAVED / f"{name}.json")
    assert [layer.divergence for layer in found.layers] == [row["divergence"] for row in saved["layers"]]
    assert found.record.tokens is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": "2.0"}, "activation-diff, schema version 2.0, saved by lazarus 0.1.0"),
        (
            {"schema_version": "0.9"},
            "reads activation-diff, weight-diff, compare, series of schema version 1.0",
        ),
        ({"command": "token-diff"}, "a result of token-diff, schema version 1.0"),
    ],
)
def test_one_that_it_cannot_read_says_why(folder: Path, changes: Any, says: str, tmp_path: Path) -> None:
    saved = json.loads((folder / "diff.json").read_bytes())
    (tmp_path / "other.json").write_text(json.dumps({**saved, **changes}), encoding="utf-8")
    shown = run("show", str(tmp_path / "other.json"))
    assert shown.exit_code == 2
    assert says in shown.stderr
    with pytest.raises(ResultFileError, match=r"other\.json: .*compare again"):
        lazarus.ActivationDiff.load(tmp_path / "other.json")


def test_a_result_of_another_command_is_shown_and_is_no_activation_diff(tmp_path: Path) -> None:
    weight_diff(BASE, FINETUNED).save(tmp_path / "weights.json")
    compare(BASE, FINETUNED, "Hello").save(tmp_path / "lens.json")
    for name, kind in (("weights", WeightDiff), ("lens", Comparison)):
        found = lazarus.load_result(tmp_path / f"{name}.json")
        assert isinstance(found, kind)
        shown = run("show", str(tmp_path / f"{name}.json"), "-o", str(tmp_path / f"{name}.csv"))
        assert shown.exit_code == 0, shown.stderr
        assert shown.stdout.startswith(f"{found}\n")
        assert (tmp_path / f"{name}.csv").read_text(encoding="utf-8").count("\n") > 10
        with pytest.raises(ResultFileError, match="no ActivationDiff"):
            lazarus.ActivationDiff.load(tmp_path / f"{name}.json")
    again = run("show", str(tmp_path / "weights.json"), "--threshold", "0.05", "--fail-above", "0.1")
    assert again.exit_code == 3
    assert "embed has a relative change of" in again.stderr
    assert again.stdout.count(" ***") > str(weight_diff(BASE, FINETUNED)).count(" ***")
    refused = run("show", str(tmp_path / "lens.json"), "--fail-above", "0.1")
    assert refused.exit_code == 2
    assert "no threshold and no gates" in refused.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of more prompts than a page has room for."""
    path = tmp_path_factory.mktemp("large") / "large.json"
    lazarus.ActivationDiff(record_of(divergences(3000, 40))).save(path)
    return path


@pytest.mark.parametrize("suffix", [".rows.parquet", ".rows.csv"])
def test_rows_that_a_page_lacks_are_beside_it(
    large: Path, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, rows = tmp_path / "page.html", tmp_path / f"page{suffix}"
    with monkeypatch.context() as world:
        if suffix == ".rows.csv":
            world.setitem(sys.modules, "pyarrow", None)
        shown = run("show", str(large), "-o", str(page))
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.endswith(f"Results saved to: {rows}\nResults saved to: {page}\n")
    assert f"All of them are in {rows.name}." in page.read_text(encoding="utf-8")
    frame = (
        pandas.read_parquet(rows)
        if suffix == ".rows.parquet"
        else pandas.read_csv(rows, float_precision="round_trip")
    )
    saved = lazarus.ActivationDiff.load(large).results.column("divergence")
    np.testing.assert_array_equal(frame["divergence"].to_numpy().reshape(saved.shape), saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == [page.name, rows.name]


def test_a_page_that_has_all_rows_stands_alone(diff: lazarus.ActivationDiff, tmp_path: Path) -> None:
    assert diff.save(tmp_path / "page.html") == [str(tmp_path / "page.html")]
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_rows_that_cannot_be_written_leave_the_older_page(large: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("older", encoding="utf-8")
    (tmp_path / "page.rows.parquet").mkdir()
    with pytest.raises(SaveError, match=r"page\.rows\.parquet: could not be written"):
        lazarus.ActivationDiff.load(large).save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "older"


def test_neither_torch_nor_transformers_is_loaded(folder: Path, tmp_path: Path) -> None:
    outputs = [argument for name in ("x.html", "x.svg", "x.csv") for argument in ("-o", str(tmp_path / name))]
    code = (
        "import sys, lazarus.cli as cli\n"
        f"sys.argv = ['lazarus', 'show', {str(folder / 'diff.json')!r}, *{outputs!r}]\n"
        "try: cli.main()\n"
        "finally: sys.stderr.write(str({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.html", "x.svg"]
