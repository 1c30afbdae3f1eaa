"""A fourth command is one module (`fourth.py`) and one registration: everything else knows it by itself."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lazarus.commands import commands

REGISTER = """
import sys
from lazarus.commands import Command, register
register(Command(name="tally", record="fourth:Tally", result="fourth:TallyResult", view="fourth",
                 metrics="fourth:METRICS", cli="fourth"))
"""
RUN = "from lazarus.cli import main; main()"


def with_fourth(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which the fourth command is registered."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    script = [sys.executable, "-c", f"{here}\n{REGISTER}\n{code}", *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the fourth command writes."""
    folder = tmp_path_factory.mktemp("tally")
    outputs = [word for suffix in ("json", "csv", "md") for word in ("-o", folder / f"found.{suffix}")]
    done = with_fourth(RUN, "introspect", "tally", "to be or not", *outputs)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 words\n")
    return folder


def test_it_writes_every_format_that_it_has_a_renderer_for(saved: Path) -> None:
    assert json.loads((saved / "found.json").read_text())["words"] == ["to", "be", "or", "not"]
    rows = list(csv.reader((saved / "found.csv").read_text().splitlines()))
    assert rows == [["word"], ["to"], ["be"], ["or"], ["not"]]
    assert (saved / "found.md").read_text() == "- to\n- be\n- or\n- not\n"


def test_a_format_that_it_has_no_renderer_for_is_refused_with_those_that_it_has(saved: Path) -> None:
    done = with_fourth(RUN, "introspect", "tally", "to be", "-o", saved / "found.html")
    assert done.returncode == 2
    assert "tally writes no .html. Choose one of .json, .csv, .parquet, .md." in " ".join(done.stderr.split())


def test_show_reads_it_back(saved: Path) -> None:
    done = with_fourth(RUN, "show", saved / "found.json", "-o", saved / "again.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 words\n")
    assert (saved / "again.csv").read_bytes() == (saved / "found.csv").read_bytes()


def test_load_result_reads_it_back(saved: Path) -> None:
    code = "from lazarus import load_result; print(type(found := load_result(sys.argv[1])).__name__, found)"
    assert with_fourth(code, saved / "found.json").stdout == "TallyResult 4 words\n"


def test_schema_describes_it() -> None:
    schema = json.loads(with_fourth(RUN, "schema", "tally").stdout)
    assert schema["title"] == "lazarus tally"
    assert set(schema["$defs"]) == {"Tally", "Tool"}


def test_the_reference_of_the_docs_has_it() -> None:
    done = with_fourth("from test_docs import reference; print(reference())")
    assert "## `lazarus introspect tally`" in done.stdout, done.stderr
    assert "### Of tally" in done.stdout
    assert "| `n_words` | words of a text | 0 to ∞ | counting |" in done.stdout


def test_the_page_of_the_json_format_has_it() -> None:
    done = with_fourth("from site_json import json_page; print(json_page())")
    assert "## Tally\n" in done.stdout, done.stderr


def test_no_other_process_knows_it() -> None:
    assert list(commands()) == ["activation-diff", "weight-diff", "compare", "series"]
