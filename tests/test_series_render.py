"""What a series looks like: standard output, tables, the page, the figure, a notebook."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus import Series, activation_diff, load_result, series
from lazarus.cli import app
from lazarus.errors import ResultFileError
from lazarus.results import SeriesFinding

PROMPTS = "one two,three four,five"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base", tiny_llama(), tiny_tokenizer())
    for step in (50, 100):
        save_model(folder / f"step-{step}", perturbed(tiny_llama(), amount=step / 1000), tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def found(models: Path) -> Series:
    """A series of them."""
    return series(models / "base", [models / "step-50", models / "step-100"], PROMPTS)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["introspect", "series", *map(str, arguments)])


def test_the_command_prints_a_row_a_model_and_the_findings(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "series.json"
    done = run("-b", models / "base", "-f", f"{models}/step-*", "-p", PROMPTS, "-o", output)
    assert done.exit_code == 0, done.output
    found = load_result(output)
    assert isinstance(found, Series)
    lines = done.stdout.splitlines()
    assert lines[:6] == [
        f"Loading base model: {models / 'base'}",
        "Comparing 2 models",
        "Testing 3 prompts",
        "",
        "Model                                    Divergence  Layer         KL    Verdict",
        "-" * 80,
    ]
    first = found.members[0]
    assert first.output is not None
    numbers = (
        first.summary.max_divergence,
        first.summary.most_divergent_layer,
        first.output.kl_base_finetuned,
    )
    divergence, layer, kl = numbers
    assert lines[6] == f"{first.model.id:<40} {divergence:>10.4f} {layer:>6} {kl:>10.4f}    changed"
    assert lines[8:10] == ["", "Findings: none"]
    assert lines[-1] == f"Results saved to: {output}"
    assert done.stdout.startswith(str(found).split("\n\n", 1)[0])


def test_gates_and_usage_errors_have_their_exit_codes(models: Path) -> None:
    common = ("-b", models / "base", "-p", PROMPTS)
    assert run(*common, "-f", models / "step-50", "--fail-above", "0").exit_code == 3
    assert run(*common, "-f", models / "base", "--expect", "changed").exit_code == 3
    copies = run(*common, "-f", models / "step-50", "-f", models / "step-50", "--expect-path")
    assert copies.exit_code == 3
    assert "bit for bit" in copies.output
    missing = run(*common, "-f", f"{models}/none-*")
    assert missing.exit_code == 2
    assert "none-*" in missing.output
    assert run("-b", models / "base", "-f", models / "step-50").exit_code == 2


def test_every_format_is_written(found: Series, tmp_path: Path) -> None:
    for suffix in ("csv", "md", "html", "svg", "png", "pdf", "parquet"):
        found.save(tmp_path / f"series.{suffix}")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "series.csv").read_text())))
    assert len(rows) == 8
    assert rows[4]["step"] == "100"
    assert float(rows[4]["divergence"]) == found.members[1].layers[0].divergence
    markdown = (tmp_path / "series.md").read_text()
    assert "| Model | Divergence | Layer | KL |" in markdown
    page = (tmp_path / "series.html").read_text()
    assert "default-src &#39;none&#39;" in page
    assert repr(found.members[1].layers[3].divergence) in page
    assert repr(float(found.distances[0, 1])) in page
    first = (tmp_path / "series.svg").read_bytes()
    found.save(tmp_path / "series.svg")
    assert (tmp_path / "series.svg").read_bytes() == first


def test_findings_are_told_wherever_the_series_is(found: Series, tmp_path: Path) -> None:
    text = "the training changed after <b>step-50</b>"
    change = SeriesFinding(kind="change_point", members=[0], text=text, interval=(0, 1), strength=1.5)
    told = Series(replace(found.record, findings=[change]))
    assert f"Finding: {text}" in str(told)
    assert "&lt;b&gt;step-50" in told._repr_html_()
    told.save(tmp_path / "series.html")
    page = (tmp_path / "series.html").read_text()
    assert "&lt;b&gt;step-50" in page
    assert "<b>step-50" not in page
    told.save(tmp_path / "series.svg")
    told.check_gates(expect_path=True)


def test_a_plot_draws_the_map(found: Series) -> None:
    axes = found.plot()
    assert axes.get_ylabel() == "Layer"


def test_results_of_a_callback_are_a_series(models: Path, tmp_path: Path) -> None:
    for step in (100, 50):
        diff = activation_diff(models / "base", models / f"step-{step}", PROMPTS)
        diff.save(tmp_path / f"step-{step}.json")
    found = load_result(tmp_path)
    assert isinstance(found, Series)
    assert [member.model.id for member in found.members] == ["step-50", "step-100"]
    assert [member.step for member in found.members] == [50, 100]
    assert "Findings: not looked for" in str(found)
    found.save(tmp_path / "series.html")
    done = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stdout.startswith(str(found).split("\n\n", 1)[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultFileError, match="no results in this folder"):
        load_result(tmp_path / "empty")
