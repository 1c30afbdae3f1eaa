"""The site is true: every example on its pages runs, its options are there, it builds without a warning."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import jsonschema
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import typer.main
import yaml
from peft import IA3Config, LoraConfig
from safetensors.numpy import save_file

from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import publish, save_adapter, save_gguf
from lazarus import activation_diff
from lazarus.cli import app
from lazarus.commands import commands
from lazarus.results import json_schema
from numpy_llama import forward, read_model
from packed import quantised_copy
from site_examples import ROOT, Block, Step, Terminal, blocks_of, matches, steps_of
from site_json import MEANINGS, NULL_WHEN, described_fields, is_nullable, json_page, meaning, null_when
from site_workflows import check_safe

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
}
GENERATED_FROM_TESTS = "docs/errors.md"

COMPARE = "lazarus introspect activation-diff"
IN_RUNTIMES = "needs a runtime that `make test-runtimes` installs: tests/test_runtimes.py runs it"
NOT_RUN = {
    ("CONTRIBUTING.md", "git clone"): "needs the network; the rest is tests/test_visitor.py's",
    ("CONTRIBUTING.md", "python3 -m venv"): "needs the network",
    ("CONTRIBUTING.md", "    BadInput("): "a part of a file: tests/test_visitor.py runs it",
    ("CONTRIBUTING.md", ".venv/bin/python -m pytest"): "the tests that this one is beside",
    ("README.md", "src/lazarus/"): "a map; tests/test_docs.py holds it against the source",
    ("docs/architecture.md", "prompts ─ tokens ─►"): "a drawing",
    ("docs/architecture.md", "two checkpoints ─"): "a drawing",
    ("docs/architecture.md", "cli > "): "the order of the rooms, which import-linter holds",
    ("docs/benchmarks.md", "make bench"): "written by benchmarks.speed, which measures for an hour",
    ("docs/big-models.md", "Mode         resident"): "what an estimate of the real pair printed",
    ("docs/demo.md", "python -m lazarus.demo.train"): "trains for minutes",
    (
        "docs/errors.md",
        f"{COMPARE} -b base -f finetuned -p Hello",
    ): "tests/bad_input writes the page and runs it",
    (
        "docs/gallery.md",
        "$ lazarus introspect",
    ): "needs the real pairs; tests/test_studies.py holds what is shown",
    ("docs/study-depth.md", f"{COMPARE} -b smollm2"): "needs what `python -m benchmarks.depth` makes",
    ("docs/hub.md", f"{COMPARE} -b org/base"): "tests/test_hub.py has a server for such names",
    ("docs/how-to-read-it.md", f"{COMPARE} -b smollm2"): "needs the real pair that `make bench` makes",
    ("docs/how-to-read-it.md", "Layer    Avg Cos Sim    Divergence       Local"): "what that run printed",
    ("docs/models.md", f"{COMPARE} -b base -f finetuned -p @prompts.txt --device cuda:1"): "needs two GPUs",
    ("docs/releasing.md", "gh attestation verify"): "asks GitHub of a release",
    ("docs/releasing.md", "git checkout"): "of a tag; tests/test_package.py builds it twice",
    ("docs/upgrade.md", f"$ {COMPARE} -b smollm2"): "needs what another version has recorded",
    ("docs/upgrade.md", f"$ {COMPARE} -b olmo3"): "needs what another version has recorded",
    ("docs/runtimes.md", "lazarus introspect record -m model-q8_0.gguf"): IN_RUNTIMES,
    ("docs/runtimes.md", "from lazarus.recordings import LlamaCppOptions"): IN_RUNTIMES,
    ("docs/runtimes.md", "import onnxruntime"): IN_RUNTIMES,
    ("docs/runtimes.md", "lazarus introspect record -m smollm2-f16"): "needs SmolLM2, and llama.cpp",
    ("docs/runtimes.md", "Verdict: changed: relative L2 0.0008"): "what that run printed",
    ("docs/runtimes.md", "lazarus introspect record -m smollm2-q4_1"): "needs SmolLM2, and llama.cpp",
    ("docs/runtimes.md", "Verdict: changed: relative L2 0.3340"): "what that run printed",
    ("docs/runtimes.md", "from vllm import LLM"): "needs vLLM and a GPU; it was not run",
}
"""Blocks that are not run: the page, how the first line begins, and the reason."""

OPTIONS_OF_OTHERS = {
    "--update-golden": "pytest",
    "--nproc-per-node": "torchrun",
    "--write-docs": "benchmarks",
    "--quick": "benchmarks",
    "--part": "benchmarks",
    "--repo": "gh",
    "--torch-backend": "uv",
    "--small": "benchmarks",
}

# --- The examples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, finetuned_folder: Path) -> Path:
    """Every model that the pages name, tiny, under those names."""
    root = tmp_path_factory.mktemp("site")
    for name in ("base", "google/gemma-3-1b-pt", "org/base", "org/base-70b"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(base_folder)
    for name in ("finetuned", "google/gemma-3-1b-it", "org/tuned", "org/tuned-70b"):
        (root / name).symlink_to(finetuned_folder)
    wrapped = save_adapter(
        root / "adapter", base_folder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    save_model(root / "merged", wrapped.merge_and_unload(), tiny_tokenizer())
    ia3 = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    save_adapter(root / "adapter-2", base_folder, ia3)
    quantised_copy(base_folder, root / "base-w4")
    save_gguf(root / "model-q8_0.gguf", tiny_llama(), tiny_tokenizer(), gguf.GGMLQuantizationType.Q8_0)
    write_requests(root / "hidden-states", base_folder)
    commits = {"v1": ("a" * 40, base_folder), "main": ("b" * 40, finetuned_folder)}
    publish(root / "hub", "org/model", commits)
    return root


def write_requests(folder: Path, base: Path) -> None:
    """What vLLM writes of two requests."""
    folder.mkdir()
    config, weights = read_model(base)
    for number, ids in enumerate(([0, 17, 255, 3, 99], [0, 250, 11])):
        states = list(forward(weights, config, ids).values())[:-1]  # but for the final norm
        request = {"token_ids": np.array(ids), "hidden_states": np.stack(states, axis=1)}
        save_file(request, folder / f"{number}-a1f0.safetensors")


@pytest.fixture(scope="module")
def saved(models: Path) -> Path:
    """A result that pages speak of before they have made one."""
    prompts = [{"prompt": text, "group": group} for text, group in GROUPED]
    diff = activation_diff(models / "base", models / "finetuned", prompts, localize=True, position="all")
    diff.save(models / "diff.json")
    return models / "diff.json"


GROUPED = [
    ("17 + 15 =", "arithmetic"),
    ("9 * 6 =", "arithmetic"),
    ("Hello", "prose"),
    ("What is AI", "prose"),
]


@pytest.fixture
def here(models: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and the prompts, in which a page is read from top to bottom."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "diff.json").unlink()
    shutil.copy(saved, tmp_path / "diff.json")
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text, _ in GROUPED), encoding="utf-8")
    rows = [{"prompt": text, "group": group} for text, group in GROUPED]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step-summary.md"))
    return tmp_path


def examples(page: str) -> list[Block]:
    """The blocks of a page that are run."""
    return [block for block in blocks_of(page, PAGES[page]) if not_run(block) is None]


def not_run(block: Block) -> tuple[str, str] | None:
    """The entry of the table that a block is in."""
    return next((e for e in NOT_RUN if e[0] == block.page and block.first_line.startswith(e[1])), None)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_every_example_of_a_page_runs(page: str, here: Path) -> None:
    for block in examples(page):
        try:
            run(block, here)
        except BaseException as fault:
            fault.add_note(f"in the block at {block}: {block.first_line}")
            raise


def run(block: Block, folder: Path) -> None:
    """Run a block as its language asks; one with a title is a file, which later blocks read."""
    if block.title is not None:
        (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.title).write_text(block.text, encoding="utf-8")
    match block.language:
        case "bash" if block.title:
            subprocess.run(["bash", "-n", block.title], cwd=folder, check=True)
        case "bash" | "console":
            Terminal(folder).run(steps_of(block))
        case "python":
            exec(compile(block.text, str(block), "exec"), {})
        case "pycon":
            run_session(block)
        case "yaml":
            run_workflow(block, folder)
        case "json":
            check_json(block)
        case "text" | "jinja" if block.title:
            pass
        case _:
            raise AssertionError(
                f"no rule for a block of {block.language or 'no language'}: run it or list it"
            )


def run_session(block: Block) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, block.page, block.page, block.line)
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert not told, "".join(told)


def run_workflow(block: Block, folder: Path) -> None:
    """The `run:` steps of a workflow, or of an action where its use is shown, with the inputs given there."""
    check_safe(block.text)
    found = yaml.safe_load(block.text)
    if isinstance(found, list):  # steps of a workflow that are shown by themselves
        for step in found:
            action = yaml.safe_load((folder / step["uses"] / "action.yml").read_text(encoding="utf-8"))
            unknown = set(step["with"]) - set(action["inputs"])
            assert not unknown, f"{step['uses']} has no input {unknown}"
            run_steps(action["runs"]["steps"], {f"inputs.{n}": v for n, v in step["with"].items()}, folder)
        return
    if "jobs" in found:
        assert found[True], "a workflow begins `on` something, which YAML 1.1 reads as true"
        for job in found["jobs"].values():
            run_steps(job["steps"], {"vars.LAZARUS": "git+https://example.org/lazarus"}, folder)
    else:
        assert all(step["shell"] == "bash" for step in found["runs"]["steps"] if "run" in step)


def run_steps(steps: list[dict[str, Any]], values: dict[str, str], folder: Path) -> None:
    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda found: values[found.group(1)], text)

    for step in steps:
        assert ("run" in step) != ("uses" in step), f"a step runs something or uses something: {step}"
        if "run" in step:
            script = f"set -eo pipefail\n{filled(step['run'])}"
            environment = {name: filled(value) for name, value in step.get("env", {}).items()}
            Terminal(folder).run([Step(f"(\n{script}\n)")], environment)


def check_json(block: Block) -> None:
    """Prompts in a `.jsonl` file are lines of JSON; anything else is a result, or one of its records."""
    if block.title and block.title.endswith(".jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
        return
    schemas, found = [json_schema(command) for command in commands()], json.loads(block.text)
    kinds = ({**schema, "$ref": f"#/$defs/{name}"} for schema in schemas for name in schema["$defs"])
    assert any(jsonschema.Draft202012Validator(kind).is_valid(found) for kind in kinds), (
        "no record of a result"
    )


def test_every_block_that_is_not_run_is_there() -> None:
    there = {not_run(block) for page in PAGES for block in blocks_of(page, PAGES[page])}
    assert there - {None} == NOT_RUN.keys()


# --- The runner itself: each fault of a page must be seen

SAFE = "on: push\npermissions: {contents: read}\n"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "lazarus schema activation-diff --colour\n"),
        ("bash", "lazarus schema activation-diff  # exit code 3\n"),
        ("bash", "lazarus introspect activation-diff -b base -f absent -p Hello\n"),
        ("bash", "lazarus schema activation-diff\nfalse\ntrue\n"),
        ("bash", "pip install 'lazarus-introspect[everything]'\n"),
        ("bash", "make nothing\n"),
        ("console", "$ lazarus --version\nlazarus 99\n"),
        ("python", "assert False\n"),
        ("pycon", ">>> 1 + 1\n3\n"),
        ("json", '{"layer": 1}\n'),
        ("yaml", f"{SAFE}jobs: {{a: {{steps: [{{run: 'lazarus schema nothing'}}]}}}}\n"),
        ("yaml", "on: push\njobs: {a: {steps: [{run: 'lazarus --version'}]}}\n"),
        ("yaml", "on: push\npermissions: write-all\njobs: {a: {steps: [{run: 'true'}]}}\n"),
        ("yaml", f"{SAFE}jobs:\n  a:\n    steps:\n      - uses: actions/checkout@v5\n"),
        ("yaml", f"{SAFE}jobs:\n  a:\n    steps:\n      - run: 'true ${{{{ vars.LAZARUS }}}}'\n"),
        ("yaml", f"{SAFE}jobs:\n  a:\n    steps:\n      - run: pip install lazarus-introspect\n"),
        ("text", "what was printed\n"),
        ("", "lazarus --version\n"),
    ],
)
def test_a_false_example_fails(language: str, text: str, here: Path) -> None:
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        run(Block("page.md", 1, language, None, text), here)


def test_bash_is_bash(here: Path) -> None:
    text = """for name in a b; do
  echo "$name" >>names.txt
done
printf 'Hello\\nWhat is AI\\n' | lazarus introspect activation-diff -b base -f finetuned \\
  -p @- --no-noise-floor -o piped.json
lazarus show piped.json --fail-above 0  # exit code 3
"""
    run(Block("page.md", 1, "bash", None, text), here)
    assert Path("names.txt").read_text(encoding="utf-8") == "a\nb\n"
    assert len(json.loads(Path("piped.json").read_text(encoding="utf-8"))["prompts"]) == 2


def test_three_dots_stand_for_lines() -> None:
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("a\n...\nd\n", "a\nd\n")
    assert not matches("a\n...\nd\n", "a\nb\nc\n")
    assert not matches("a b\n", "a  b\n")


# --- What the pages say


def test_every_option_that_a_page_names_is_one() -> None:
    known = {name for command in _commands(typer.main.get_command(app)) for name in _options(command)}
    named = {
        option: page
        for page, text in PAGES.items()
        if page != GENERATED_FROM_TESTS
        for option in re.findall(r"(?<![\w#-])--[a-z][a-z0-9-]+", re.sub("(?m)^#SBATCH.*", "", text))
    }
    unknown = {
        option: page for option, page in named.items() if option not in known | OPTIONS_OF_OTHERS.keys()
    }
    assert not unknown
    assert OPTIONS_OF_OTHERS.keys() <= named.keys()


def _commands(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from _commands(child)


def _options(command: Any) -> list[str]:
    return ["--help", *(name for parameter in command.params for name in parameter.opts)]


def test_the_json_page_is_what_the_schema_says(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/json.md", json_page())


@pytest.mark.parametrize("field", described_fields())
def test_every_field_of_the_json_is_explained(field: str) -> None:
    told = described_fields()[field]
    assert meaning(field, told)
    assert is_nullable(told) <= bool(null_when(field)), f"{field}: when is it null?"


def test_no_explanation_is_of_a_field_that_is_gone() -> None:
    names = described_fields().keys() | {field.partition(".")[2] for field in described_fields()}
    assert {*MEANINGS, *NULL_WHEN} <= names


# --- The site as it is built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; links, anchors and pages that are in no menu are errors."""
    folder = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    built = {path.stem for path in site.glob("*.html")} - {"404"}
    assert built == {path.stem for path in DOCS.glob("*.md")}


def test_a_browser_is_sent_nowhere_else(site: Path) -> None:
    """Fonts, scripts, styles and pictures all come with the site."""
    pages = list(site.rglob("*.html"))
    assert pages
    sent = {
        f"{page.name}: {resource}"
        for page in pages
        for resource in resources(page.read_text(encoding="utf-8"))
        if re.match(r"(?:[a-z]+:)?//", resource)
    }
    styles = list(site.rglob("*.css"))
    assert styles
    loads = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""")
    sent |= {f"{p.name}: {u}" for p in styles for u in loads.findall(p.read_text(encoding="utf-8"))}
    assert not sent


def resources(html: str) -> list[str]:
    """What a browser loads by itself for a page."""

    class Reader(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            held = dict(attributes)
            self.found += [held[name] or "" for name in ("src", "srcset", "poster", "data") if name in held]
            if tag == "link" and not {"canonical", "prev", "next"} & set((held.get("rel") or "").split()):
                self.found.append(held.get("href") or "")

    reader = Reader()
    reader.found = []
    reader.feed(html)
    return reader.found


def test_a_resource_from_elsewhere_is_seen() -> None:
    page = (
        '<link rel=stylesheet href="https://fonts.example/a.css"><script src="//cdn.example/b.js"></script>'
    )
    assert resources(page) == ["https://fonts.example/a.css", "//cdn.example/b.js"]
