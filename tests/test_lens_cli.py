"""compare on the command line: the demo pair end to end, every form of its options, and exit codes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import typer.main
from typer.testing import CliRunner, Result

import lazarus
from lazarus.cli import app
from lazarus.demo import BASE, FINETUNED
from lazarus.options import CompareArguments
from lazarus.results import json_schema

Run = Callable[..., Result]
PROMPT = "12 + 30 ="


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder that has the demo's models as `base` and `arithmetic`."""
    for folder in (BASE, FINETUNED):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, models: bool = True, stdin: str | None = None) -> Result:
        pair = ["-m1", "base", "-m2", "arithmetic"] if models else []
        return CliRunner().invoke(app, ["introspect", "compare", *pair, *arguments], input=stdin)

    return call


def predictions(result: Result) -> list[str]:
    lines = result.stdout.splitlines()
    start = lines.index("=== Final Predictions ===")
    return lines[start + 3 : start + 5]


def test_the_demo_pair_prints_what_it_saves(run: Run) -> None:
    result = run("-p", PROMPT, "-o", "x.json", "-o", "x.csv")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = lazarus.Comparison.load("x.json")
    assert result.stdout == f"{found}\nResults saved to: x.json\nResults saved to: x.csv\n"
    assert result.stdout.splitlines()[:6] == [
        "Loading: base",
        "Loading: arithmetic",
        "",
        "=" * 70,
        f"Prompt: '{PROMPT}'",
        "=" * 70,
    ]
    document = json.loads(Path("x.json").read_bytes())
    jsonschema.Draft202012Validator(json_schema("compare")).validate(document)
    for line, model in zip(predictions(result), (document["model1"], document["model2"]), strict=True):
        top = model["layers"][-1]["top"][0]
        assert line == f"{model['info']['id']:<40} {top['token']:<16} {top['probability']:.4f}"
    with open("x.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["probability"]) for row in rows] == [
        token["probability"]
        for model in (document["model1"], document["model2"])
        for layer in model["layers"]
        for token in layer["top"]
    ]


def test_the_tracked_tokens_are_the_rows(run: Run) -> None:
    result = run("-p", PROMPT, "--track", "the,=", "-o", "x.json")
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^  (\S+) +: (.+), final prob (\S+)$", result.stdout, re.MULTILINE)
    document = json.loads(Path("x.json").read_bytes())
    assert document["tracked"] == ["the", "="]
    expected = [
        (
            model["info"]["id"],
            "never emerges"
            if (layer := model["tracked"][i]["emergence_layer"]) is None
            else f"emerges at layer {layer}",
            f"{model['tracked'][i]['final_probability']:.4f}",
        )
        for i in (0, 1)
        for model in (document["model1"], document["model2"])
    ]
    assert rows == expected
    assert "Token ' the':" in result.stdout
    absent = run("-p", PROMPT, "--track", '" ="').stdout
    assert "  base                                 : has no such token\n" in absent


def test_top_k_is_how_many_tokens_are_kept(run: Run) -> None:
    run("-p", PROMPT, "--top-k", "2", "-o", "x.json")
    document = json.loads(Path("x.json").read_bytes())
    assert {len(layer["top"]) for name in ("model1", "model2") for layer in document[name]["layers"]} == {2}
    assert document["settings"]["top_k"] == 2


@pytest.mark.parametrize(
    "names",
    [("--model1", "--model2"), ("-b", "-f"), ("--base", "--finetuned"), ("-b", "-m2")],
)
def test_the_models_have_every_name_of_the_contract(run: Run, names: tuple[str, str]) -> None:
    one, other = names
    result = run(one, "base", other, "arithmetic", "-p", PROMPT, "--top-k", "1", models=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Loading: base\nLoading: arithmetic\n")


@pytest.mark.parametrize(
    ("given", "stdin"),
    [
        (("-p", "Hello, world, again"), None),
        (("--prompt", "Hello, world, again"), None),
        (("-p", "@one.txt"), None),
        (("-p", "@one.jsonl"), None),
        (("-p", "@-"), "Hello, world, again\n"),
    ],
)
def test_one_prompt_in_every_form_keeps_its_commas(
    run: Run, given: tuple[str, ...], stdin: str | None
) -> None:
    Path("one.txt").write_text("\n  Hello, world, again \n", encoding="utf-8")
    Path("one.jsonl").write_text('{"text": "Hello, world, again"}\n', encoding="utf-8")
    result = run(*given, "--top-k", "1", "-o", "x.json", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("x.json").read_bytes())["prompt"] == "Hello, world, again"
    assert "Prompt: 'Hello, world, again'\n" in result.stdout


def test_a_chat_is_read_in_a_template(run: Run) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    row = {"messages": [*chat, {"role": "user", "content": "The answer is"}]}
    Path("chat.jsonl").write_text(json.dumps(row), encoding="utf-8")
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    Path("chat.jinja").write_text(template, encoding="utf-8")
    result = run("-p", "@chat.jsonl", "--chat-template", "chat.jinja", "-o", "x.json")
    assert result.exit_code == 0, result.output
    document = json.loads(Path("x.json").read_bytes())
    assert document["prompt"] == "The answer is"
    assert all("Yes?" in document[name]["rendered"] for name in ("model1", "model2"))


def test_a_prompt_may_begin_with_an_at_sign(run: Run) -> None:
    result = run("-p", "@@property", "--top-k", "1")
    assert "Prompt: '@property'\n" in result.stdout


BAD = {
    "two prompts": (("-p", "a", "-p", "b"), "-p: 2 prompts are given, and compare takes one."),
    "a file of two": (("-p", "@two.txt"), "-p: 2 prompts are given"),
    "a file that is not there": (("-p", "@none.txt"), "-p @none.txt: cannot be read"),
    "an empty prompt": (("-p", "  "), "Prompt 0 is empty."),
    "a chat without a template": (("-p", "@chat.jsonl"), "Prompt 0 is a chat (`messages`)"),
    "no tokens": (("-p", "a", "--top-k", "0"), "--top-k 0: give a number of at least 1."),
    "a token of nothing": (("-p", "a", "--track", " , "), "--track"),
    "a type that is none": (("-p", "a", "--dtype", "int8"), "--dtype int8: not a choice."),
    "a device that is none": (("-p", "a", "--device", "tpu"), "--device tpu: not a device."),
    "an output that is no file": (("-p", "a", "-o", "base"), "-o base: this is a folder."),
    "an output that is read": (("-p", "@two.txt", "-o", "two.txt"), "-o two.txt: this file is read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_command_line_exits_2_before_a_model_is_loaded(run: Run, name: str) -> None:
    Path("two.txt").write_text("one\ntwo\n", encoding="utf-8")
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    arguments, said = BAD[name]
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert said in result.stderr
    assert result.stdout == ""


def test_without_a_model_or_a_prompt_it_says_which_is_missing(run: Run) -> None:
    assert "No prompt: neither model is a recording" in run().stderr
    missing = run("-m1", "base", "-p", "a", models=False)
    assert missing.exit_code == 2
    assert "-m2" in missing.stderr


def test_a_model_that_is_not_there_exits_1_and_saves_nothing(run: Run) -> None:
    result = run("-m1", "base", "-m2", "./nowhere", "-p", PROMPT, "-o", "x.json", models=False)
    assert result.exit_code in (1, 2)
    assert "nowhere" in result.stderr
    assert not Path("x.json").exists()


def test_every_option_of_the_library_is_one_of_the_command_and_is_explained() -> None:
    root = typer.main.get_command(app)
    command = root.commands["introspect"].commands["compare"]  # type: ignore[attr-defined]
    options = {parameter.name: parameter for parameter in command.params}
    assert set(CompareArguments.__annotations__) < set(options)
    assert set(options) - set(CompareArguments.__annotations__) == {
        "model1", "model2", "prompt", "output", "quiet", "debug"
    }  # fmt: skip
    assert all(parameter.help for parameter in command.params)
    assert options["model1"].opts == ["-m1", "--model1", "-b", "--base"]
    assert options["model2"].opts == ["-m2", "--model2", "-f", "--finetuned"]
    shown = CliRunner().invoke(app, ["introspect", "compare", "--help"], env={"COLUMNS": "140"}).stdout
    for name in ("--model1", "-m2", "--track", "--top-k", "--chat-template", "none|model1|model2|FILE"):
        assert name in shown
    assert "lazarus introspect compare -m1" in shown


def test_the_defaults_are_those_of_the_library() -> None:
    from dataclasses import fields

    from lazarus.options import CompareOptions

    root = typer.main.get_command(app)
    command = root.commands["introspect"].commands["compare"]  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for field in fields(CompareOptions):
        assert defaults[field.name] == field.default, field.name


def test_a_saved_result_is_shown_again(run: Run) -> None:
    result = run("-p", PROMPT, "-o", "x.json")
    shown = CliRunner().invoke(app, ["show", "x.json", "-o", "x.html"])
    assert shown.exit_code == 0, shown.output
    body = result.stdout.removesuffix("Results saved to: x.json\n")
    assert shown.stdout == f"{body}Results saved to: x.html\n"
    assert "logit lens" in Path("x.html").read_text(encoding="utf-8")
