"""What somebody finds who has just come is there and of this version, and so is what it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from bad_input import SUBJECTS, BadInput, here, observe
from bad_input.kind import typed
from lazarus import provenance
from lazarus.version import __version__
from site_examples import PROJECT, ROOT
from test_bad_input import check

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "docs/roadmap.md"]


def test_the_citation_is_of_this_version_and_project() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert [author["name"] for author in cited["authors"]] == [each["name"] for each in PROJECT["authors"]]
    assert " AND ".join(cited["license"]) == PROJECT["license"]
    assert (cited["repository-code"], cited["url"]) == (
        PROJECT["urls"]["Source"],
        PROJECT["urls"]["Documentation"],
    )
    assert set(cited["keywords"]) <= set(PROJECT["keywords"])


@pytest.mark.parametrize(
    "path", [form for form in FORMS if form.stem != "config"], ids=lambda path: path.stem
)
def test_a_form_of_an_issue_asks_what_can_be_answered(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    options = set(re.findall(r"--[a-z-]+|-o\b", path.read_text(encoding="utf-8")))
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert [option for option in options if option not in reference] == []


def test_the_command_that_tells_the_versions_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(
        r'\$ python -c "(.*)"', (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8")
    )
    exec(compile(ast.parse(code), "bug.yml", "exec"), {})
    printed = capsys.readouterr().out
    assert __version__ in printed
    assert provenance.environment().torch in printed


def test_every_file_that_a_page_names_is_there() -> None:
    """Of one that stands for several, as in `docs/*.md`, some are."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"`((?:src|tests|docs|models|\.github|benchmarks)/[\w./*-]+)`", text)
        named += re.findall(r"\]\(((?!http)[\w./-]+)(?:#[\w-]+)?\)", text)
        roots = [ROOT, ROOT / "src/lazarus", (ROOT / page).parent]
        assert [name for name in named if not any(list(root.glob(name)) for root in roots)] == []


def test_every_badge_shows_a_state_and_leads_to_it() -> None:
    """A picture that is made when it is looked at: of a workflow that is there, or of what PyPI has."""
    head = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n", 1)[0]
    badges = re.findall(r"\[!\[([^\]]+)\]\(([^)]+)\)\]\(([^)]+)\)", head)
    assert len(badges) == 4
    for told, picture, target in badges:
        workflow = re.match(rf"{PROJECT['urls']['Source']}/actions/workflows/([\w.]+)/badge\.svg", picture)
        if workflow:
            assert (ROOT / ".github" / "workflows" / workflow[1]).is_file()
        else:
            assert re.fullmatch(rf"https://img\.shields\.io/pypi/[vl]/{PROJECT['name']}", picture)
        assert told
        assert target.startswith("https://") or (ROOT / target).is_file()


def test_the_first_change_that_is_told_is_one(tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (record,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert "READING = (\n" in (ROOT / "tests/bad_input/prompts.py").read_text(encoding="utf-8")
    (kind,) = eval(f"({record})", {"BadInput": BadInput, "typed": typed})
    assert kind.title not in {each.title for each in SUBJECTS["Prompts"]}, "it has been made: tell another"
    check(kind, observe(here, kind, tmp_path))
