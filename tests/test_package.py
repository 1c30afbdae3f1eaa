"""The wheel and the sdist: what is in them, that they are built the same anywhere, and that the wheel works.

`make test-dist` holds the files in `dist/` against the same, as the release workflow does.
"""

from __future__ import annotations

import contextlib
import email
import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import readme_renderer.markdown
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import changes
from lazarus.demo import BASE, FINETUNED
from site_examples import blocks_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Source"]
PAGE = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
WRITTEN = {".md", ".toml", ".yml", ".yaml", ".cff", ".py", ".txt", ".ipynb", ".html", ""}
"""suffixes of the files in which the address of the repository may stand"""
GIVEN = os.environ.get("LAZARUS_DIST")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Dist:
    """What a build made."""

    wheel: Path
    sdist: Path

    @staticmethod
    def of(folder: Path) -> Dist:
        (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        return Dist(wheel, sdist)


def in_repository() -> set[str]:
    """The files that git has, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a clone")
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@functools.cache
def epoch() -> str:
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "1796000000"


def build(folder: Path, time: str | None) -> Dist:
    """Run the release workflow's step in a folder, with this environment and not one that make would make.

    It is not told the time of the commit where that is None, and there is no git to ask.
    """
    assert "make dist" in steps_of("build")
    ready = ["-o", f"{sys.prefix}/.installed-dev", f"VENV={sys.prefix}"]
    told = {**os.environ, "SOURCE_DATE_EPOCH": time or "", "GIT_DIR": os.devnull}
    told.pop("PYTHONPATH", None)
    done = subprocess.run(["make", "dist", *ready], cwd=folder, capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stdout + done.stderr
    return Dist.of(folder / "dist")


def steps_of(job: str) -> list[str]:
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold."""
    folder = tmp_path_factory.mktemp("clone")
    for name in in_repository():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(source: Path) -> Dist:
    """What is in dist/ where that is asked for, and else a build of the repository as it is."""
    if GIVEN:
        return Dist.of(ROOT / GIVEN)
    with umask(0o022):
        return build(source, epoch())


@pytest.fixture(scope="module")
def unpacked(dist: Dist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    with tarfile.open(dist.sdist) as archive:
        archive.extractall(folder, filter="data")
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def metadata(dist: Dist) -> Message:
    (name,) = [name for name in in_wheel(dist) if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(dist.wheel).read(name))


def in_wheel(dist: Dist) -> list[str]:
    return zipfile.ZipFile(dist.wheel).namelist()


# --- What is in them


def rows(heading: str) -> list[str]:
    """The patterns in the first column of the table under a heading of the page."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r"^\| `([^`]+)` \|", found[1], flags=re.MULTILINE)


def test_the_page_gives_every_file_of_the_wheel_one_reason(dist: Dist) -> None:
    patterns = rows("What is in the wheel")
    reasons = {name: [p for p in patterns if fnmatch.fnmatchcase(name, p)] for name in in_wheel(dist)}
    assert {name: found for name, found in reasons.items() if len(found) != 1} == {}
    assert {pattern for found in reasons.values() for pattern in found} == set(patterns)


def test_the_wheel_has_the_whole_package_and_nothing_of_a_cache(dist: Dist) -> None:
    there = {name.removeprefix("src/") for name in in_repository() if name.startswith("src/")}
    assert {name for name in in_wheel(dist) if ".dist-info/" not in name} == there


def test_the_sdist_is_the_repository_but_for_what_the_page_names(unpacked: Path) -> None:
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    there = {name for name in there if not name.startswith("dist/")}
    left_out = rows("What is in the sdist")
    named = {n for n in in_repository() if any(fnmatch.fnmatchcase(n, pattern) for pattern in left_out)}
    assert there == (in_repository() - named) | {"PKG-INFO"}
    assert all(fnmatch.filter(named, pattern) for pattern in left_out)


def test_the_licences_are_those_of_what_is_inside(dist: Dist, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    texts = {
        name.rpartition("/licenses/")[2]: zipfile.ZipFile(dist.wheel).read(name).decode()
        for name in in_wheel(dist)
        if "/licenses/" in name
    }
    assert sorted(texts) == sorted(metadata.get_all("License-File", []))
    assert "Apache License" in texts["LICENSE"]
    assert "MIT License" in texts["src/lazarus/render/base/vendor/LICENSE"]


def test_the_list_of_what_is_not_ours_follows_its_schema_and_is_true(dist: Dist) -> None:
    with zipfile.ZipFile(dist.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if "/sboms/" in name]
        text = wheel.read(name).decode()
        (part,) = json.loads(text)["components"]
        code = wheel.read(part["description"].rpartition(": ")[2])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert part["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(code).hexdigest()}]
    assert part["licenses"] == [{"license": {"id": "MIT"}}]


# --- Built the same anywhere


def test_another_build_has_the_same_bytes(dist: Dist, unpacked: Path) -> None:
    """From the sdist, in another folder, without git, with other rights and times of all other files."""
    for number, path in enumerate(sorted(unpacked.rglob("*"), reverse=True)):
        path.chmod(path.stat().st_mode & 0o700)
        if path != unpacked / "pyproject.toml":
            os.utime(path, (number, number))
    with umask(0o077):
        again = build(unpacked, None)
    assert again.wheel.read_bytes() == dist.wheel.read_bytes()
    assert again.sdist.read_bytes() == dist.sdist.read_bytes()


def test_no_name_of_who_built_it_is_inside(dist: Dist) -> None:
    with tarfile.open(dist.sdist) as archive:
        members = archive.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert {m.mode for m in members} <= {0o644, 0o755}
    assert {info.external_attr >> 16 & 0o777 for info in zipfile.ZipFile(dist.wheel).infolist()} == {0o644}


# --- Installed alone


@pytest.fixture(scope="module")
def bare(dist: Dist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; it finds the packages of this one, but not the lazarus tested here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # As plain folders: the .pth files inside, among them that of an editable install, are not read.
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "zz_shared.pth").write_text("".join(f"{path}\n" for path in shared), encoding="utf-8")
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        folder / "bin" / "python",
    ]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", dist.wheel], check=True)
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the home too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def ran(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_runs_from_the_wheel_by_the_packages_name(bare: Path, nowhere: Path) -> None:
    """As `uvx lazarus-introspect demo` runs it."""
    printed = ran(bare / "bin" / PROJECT["name"], "demo", "-o", "report.html")
    assert "Verdict: changed" in printed
    assert "</html>" in (nowhere / "report.html").read_text(encoding="utf-8")
    told = "import lazarus, lazarus.demo as d; print(lazarus.__file__, d.BASE, d.FINETUNED, sep='\\n')"
    found = ran(bare / "bin" / "python", "-c", told).splitlines()
    assert [path for path in found if not Path(path).is_relative_to(bare.resolve())] == []


def test_two_folders_are_compared_from_the_wheel(bare: Path, nowhere: Path) -> None:
    for name, folder in (("base", BASE), ("finetuned", FINETUNED)):
        shutil.copytree(folder, nowhere / name)
    models = ("-b", "base", "-f", "finetuned", "-p", "12 + 7 =,The file")
    compare = ("introspect", "activation-diff", *models, "-o", "report.html", "-o", "diff.json")
    ran(bare / "bin" / "lazarus", *compare)
    assert (nowhere / "report.html").stat().st_size > 1_500_000  # with plotly.js
    assert json.loads((nowhere / "diff.json").read_bytes())["tool"]["version"] == changes.version()


def test_the_version_is_told_by_each_name(bare: Path, nowhere: Path) -> None:
    ways: list[list[str | Path]] = [[bare / "bin" / name] for name in ("lazarus", PROJECT["name"])]
    ways.append([bare / "bin" / "python", "-m", "lazarus"])
    assert {ran(*way, "--version").strip() for way in ways} == {f"lazarus {changes.version()}"}


# --- What PyPI shows


class Links(HTMLParser):
    """Where the links and pictures of a page lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("href", "src")]


@pytest.fixture(scope="module")
def shown(metadata: Message) -> str:
    """The README as it is in the metadata."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    return text.decode("utf-8")


def test_every_link_of_the_readme_leads_somewhere_from_pypi(shown: str) -> None:
    """To a file that the repository has, of the same version; rendered as PyPI does it."""
    html = readme_renderer.markdown.render(shown)
    assert html is not None
    links = Links(html).found
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    raw = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com")
    tag = f"v{changes.version()}"
    inside = [link for link in links if link.startswith((f"{REPOSITORY}/blob/", f"{raw}/"))]
    named = [re.sub(rf"^(?:{re.escape(REPOSITORY)}/blob|{re.escape(raw)})/{tag}/|#.*", "", n) for n in inside]
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert f"{raw}/{tag}/docs/assets/report-demo.png" in inside


def test_nothing_else_of_the_readme_is_changed(shown: str) -> None:
    """But that spaces at the end go."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [[block.text for block in blocks_of("README.md", text)] for text in (readme, shown)]
    assert blocks[0] == blocks[1]
    without = [re.sub(r"\]\([^)]*\)", "]()", text).split() for text in (readme, shown)]
    assert without[0] == without[1]


def test_the_first_lines_install_it(shown: str) -> None:
    first = shown.split("\n\n")[2:4]
    assert f"pip install {PROJECT['name']}" in first[0]
    assert f"uvx {PROJECT['name']} demo" in first[1]
    assert {"lazarus", PROJECT["name"]} == set(PROJECT["scripts"])


def test_every_mention_of_the_repository_is_its_address() -> None:
    """And of the documentation; a copy of this project elsewhere changes pyproject, and is told the rest."""
    site = PROJECT["urls"]["Documentation"].removeprefix("https://").rstrip("/")
    owned = r"(?:github\.com|githubusercontent\.com)/[\w.-]+/lazarus(?![\w-])|[\w-]+\.github\.io/lazarus"
    own = REPOSITORY.removeprefix("https://")
    right = {own, own.replace("github.com", "githubusercontent.com"), site}
    wrong: dict[str, set[str]] = {}
    for name in in_repository():
        if Path(name).suffix in WRITTEN:
            found = set(re.findall(owned, (ROOT / name).read_text(encoding="utf-8", errors="replace")))
            wrong |= {name: found - right} if found - right else {}
    assert wrong == {}


# --- The release


def test_the_changelog_names_the_version_and_real_days() -> None:
    """Above it there may be `Unreleased`; the newest is on top."""
    names = [name for name, _, _ in changes.sections()]
    numbered = [section for section in changes.sections() if section[0] != "Unreleased"]
    assert "Unreleased" not in names[1:]
    assert numbered[0][0] == changes.version()
    days = [date for _, date, _ in numbered]
    assert all(day and re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in days)
    assert days == sorted(days, key=str, reverse=True)
    assert all(text for _, _, text in changes.sections())


HISTORY = "# Changelog\n\n## 1.2.0 (2027-01-31)\n\n- New.\n\n## 1.1.0 (2026-12-01)\n\n- Old.\n"


@pytest.mark.parametrize(
    ("tag", "history", "told"),
    [
        ("v1.2.0", HISTORY, "- New.\n"),
        ("v1.3.0", HISTORY, "the tag is v1.3.0, and version.py has 1.2.0"),
        ("1.2.0", HISTORY, "the tag is 1.2.0, and version.py has 1.2.0: tag v1.2.0"),
        ("v1.2.0", HISTORY.replace("## 1.2.0 (2027-01-31)", "## Unreleased"), "it begins with 'Unreleased'"),
        ("v1.2.0", HISTORY.replace("(2027-01-31)", "(soon)"), "Invalid isoformat string: 'soon'"),
    ],
)
def test_a_tag_is_released_only_with_its_version_and_changes(
    tag: str, history: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "changes.py", tmp_path / "tests")
    (tmp_path / "src" / "lazarus").mkdir(parents=True)
    (tmp_path / "src" / "lazarus" / "version.py").write_text('__version__ = "1.2.0"\n', encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(history, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    step = ["bash", "-eo", "pipefail", "-c", steps_of("build")[0]]
    environment = {"PATH": path, "GITHUB_REF_NAME": tag}
    done = subprocess.run(step, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        assert (tmp_path / "changes.md").read_text(encoding="utf-8") == told
    else:
        assert told in done.stderr


def test_what_is_announced_was_uploaded(tmp_path: Path, dist: Dist) -> None:
    """With a `gh` that wants its files to be there."""
    for path in (dist.wheel, dist.sdist):
        (tmp_path / path.name).touch()
    uploads: list[dict[str, Any]] = [
        step["with"]
        for step in WORKFLOW["jobs"]["build"]["steps"]
        if "upload-artifact" in step.get("uses", "")
    ]
    assert [upload["name"] for upload in uploads] == ["dist", "about"]
    for name in uploads[1]["path"].split():
        (tmp_path / name).touch()
    gh = tmp_path / "bin" / "gh"
    gh.parent.mkdir()
    gh.write_text('#!/bin/sh\nls -- "${9}" "${10}" "${11}" changes.md >listed && echo "$@" >arguments\n')
    gh.chmod(0o755)
    told = {"PATH": f"{gh.parent}:{os.environ['PATH']}", "GITHUB_REF_NAME": "v1", "GITHUB_REPOSITORY": "a/b"}
    (step,) = steps_of("announce")
    subprocess.run(["bash", "-eo", "pipefail", "-c", step], cwd=tmp_path, env=told, check=True)
    listed = {Path(name).name for name in (tmp_path / "listed").read_text().split()}
    assert listed == {dist.wheel.name, dist.sdist.name, "sbom.cdx.json", "changes.md"}
    assert (tmp_path / "arguments").read_text().startswith("release create v1 --repo a/b --verify-tag ")


def test_only_the_job_that_publishes_may_ask_for_an_identity() -> None:
    assert WORKFLOW["permissions"] == {}
    allowed = {name: job["permissions"] for name, job in WORKFLOW["jobs"].items()}
    assert allowed == {
        "build": {"contents": "read"},
        "publish": {"id-token": "write", "attestations": "write"},
        "announce": {"contents": "write"},
    }
    assert WORKFLOW["jobs"]["publish"]["environment"]["name"] == "pypi"
    assert steps_of("publish") == []
    assert steps_of("build")[1:] == ["make dist", "make test-dist", "make sbom"]
