"""Text of strangers stays text wherever it is read: on a terminal, in Markdown, in a spreadsheet."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import lazarus
from lazarus import demo, terminal
from lazarus.cli import main
from lazarus.errors import LazarusError
from lazarus.render.base.escape import escaped, legible
from lazarus.render.base.markdown import code, prose
from lazarus.render.base.rows import write_csv
from lazarus.result_classes import load_result

FORGED = "Verdict: IDENTICAL, nothing changed"
HOSTILE = (
    f"\n{FORGED}\x1b[2J\x9b2J\x07\r\u202e\u2028\ud800\U000e0041 ![x](https://evil.example/p.png) "
    "[y](http://evil.example) <img src=x> https://evil.example www.evil.example a@evil.example @team "
    "*a* _b_ `c` | d \\| e \\\\| <!-- [^1] ~~f~~ $g$ &lt; # h\n# i\n\n- j\n"
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A result of each command, as JSON."""
    texts, folder = ["Hello", "3 + 4 ="], tmp_path_factory.mktemp("results")
    found: dict[str, Any] = {
        "activation-diff": lazarus.activation_diff(demo.BASE, demo.FINETUNED, texts, localize=True),
        "weight-diff": lazarus.weight_diff(demo.BASE, demo.FINETUNED),
        "compare": lazarus.compare(demo.BASE, demo.FINETUNED, "Hello"),
        "series": lazarus.series(demo.BASE, [demo.FINETUNED, demo.BASE], texts),
    }
    for name, result in found.items():
        result.save(folder / f"{name}.json")
    return {name: json.loads((folder / f"{name}.json").read_bytes()) for name in found}


COMMANDS = ["activation-diff", "weight-diff", "compare", "series"]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every string of a document; of a list those of its first two items."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from places(value, (*path, name))
    elif isinstance(node, list):
        for i, value in enumerate(node[:2]):
            yield from places(value, (*path, i))
    elif isinstance(node, str):
        yield path


def spoilt(document: Any, paths: list[tuple[Any, ...]], text: str, *, first: bool = False) -> Any:
    found = json.loads(json.dumps(document))
    for path in paths:
        node = found
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = text + node[path[-1]] if first else node[path[-1]] + text
    return found


def loads(document: Any, path: Path) -> Any:
    path.write_bytes(json.dumps(document).encode())
    try:
        return load_result(path)
    except LazarusError:
        return None


def free_places(document: Any, path: Path, text: str) -> list[tuple[Any, ...]]:
    """Return where any text is taken for a result's."""
    return [place for place in places(document) if loads(spoilt(document, [place], text), path) is not None]


def shape(markdown: str) -> Counter[str]:
    """Count what a reader of Markdown makes of a page: headings, rows, cells, links, images, HTML."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(markdown)
    inline = [child for token in tokens for child in token.children or []]
    plain = {"text", "code_inline", "text_special", "softbreak"}
    return Counter(token.type for token in [*tokens, *inline] if token.type not in plain)


# --- A result that a stranger has made


@pytest.mark.parametrize("command", COMMANDS)
def test_no_string_of_a_result_leaves_its_place(
    command: str, documents: dict[str, Any], tmp_path: Path
) -> None:
    document, path = documents[command], tmp_path / "x.json"
    text = HOSTILE.replace("\ud800", "")  # JSON of a file has no half of a pair
    free = free_places(document, path, text)
    assert len(free) > 10
    plain, found = loads(document, path), loads(spoilt(document, free, text), path)
    assert legible(str(found)) == str(found)
    forged = [line for line in str(found).splitlines() if line.startswith(FORGED)]
    assert forged == [line for line in str(plain).splitlines() if line.startswith(FORGED)] == []
    assert len(str(found).splitlines()) == len(str(plain).splitlines())
    shapes = []
    for result in (plain, found):
        result.save(tmp_path / "x.md")
        shapes.append(shape((tmp_path / "x.md").read_text(encoding="utf-8")))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_cell_of_a_csv_file_is_a_formula(command: str, documents: dict[str, Any], tmp_path: Path) -> None:
    document, path = documents[command], tmp_path / "x.json"
    free = free_places(document, path, "=1+1")
    for mark in ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1"):
        result = loads(spoilt(document, free, mark, first=True), path)
        result.save(tmp_path / "x.csv")
        with open(tmp_path / "x.csv", encoding="utf-8", newline="") as stream:
            cells = [cell for row in csv.reader(stream) for cell in row]
        assert any(mark in cell for cell in cells) or command == "weight-diff"
        texts = [cell for cell in cells if not re.fullmatch(r"-?[\d.]+(e[+-]\d+)?", cell)]
        assert [cell for cell in texts if cell.startswith(tuple("=+-@\t\r"))] == []


# --- The pieces

MARKUP = st.text(st.sampled_from("\\`*_{}[]()<>#|&$~!^:@.-+=1a \n\t\x1b/w") | st.characters(), max_size=30)


@settings(max_examples=300)
@given(MARKUP.filter(lambda text: bool(text.strip())))
def test_text_in_markdown_is_text(text: str) -> None:
    page = f"# {code(text)}\n\n- {prose(text)}\n\n| a | b |\n|---|---|\n| {code(text)} | {prose(text)} |\n"
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    page = page.encode("utf-8", "replace").decode()
    heading, item, _, _, one, other = (
        token.children for token in parser.parse(page) if token.type == "inline"
    )
    expected = escaped(text)
    for children, told in ((heading, expected), (item, expected), (one, expected), (other, expected)):
        assert {child.type for child in children or []} <= {"text", "code_inline"}
        seen = "".join(child.content for child in children or [])
        assert seen.split() == told.split()


@given(st.text())
def test_what_is_escaped_has_no_control_character_and_stays_as_it_is(text: str) -> None:
    found = escaped(text)
    assert not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in found)
    assert not any(unicodedata.bidirectional(c) in {"RLO", "LRO", "RLI", "LRI", "FSI", "PDI"} for c in found)
    assert escaped(found) == found


def test_every_control_character_is_written_out_and_scripts_are_left_alone() -> None:
    seen = {"AN", "AL", "L"}  # signs of Arabic and other scripts, which are format characters too
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)
        is_format = category == "Cf" and unicodedata.bidirectional(character) not in seen
        if category in {"Cc", "Cs", "Zl", "Zp"} or (is_format and character not in "\u200c\u200d"):
            assert escaped(character) != character, hex(ord(character))
    for text in ("نمی‌خواهم", "👩‍💻 ❤️", "עברית", "ไทย", "é", "a\u0301"):
        assert escaped(text) == text
    for text in ("\u200e", "\u200f", "\u061c", "\u3164", "\ufe01", "\U000e0100"):
        assert escaped(text) != text


@given(st.lists(st.text(), min_size=1), st.floats(allow_nan=False))
def test_numbers_of_a_csv_file_are_as_they_are(texts: list[str], number: float) -> None:
    stream = io.BytesIO()
    write_csv({"text": texts, "number": [number] * len(texts)}, stream)
    _, *rows = csv.reader(io.StringIO(stream.getvalue().decode(), newline=""))
    for text, (cell, value) in zip(texts, rows, strict=True):
        assert cell.removeprefix("'") in (text, text.removeprefix("'"))
        assert float(value) == number


# --- The streams


def test_all_that_is_printed_leaves_by_one_module() -> None:
    source = Path(lazarus.__file__).parent
    found = []
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in {"print", "typer.echo", "typer.secho", "traceback.print_exc"}:
                found.append(path.name)
            if re.fullmatch(r"sys\.(__)?std(out|err)(__)?\.write", name):
                found.append(path.name)
    assert found == ["train.py"]  # a script of ours, of our own text


class Stream(io.StringIO):
    """A stream that says what it is."""

    def isatty(self) -> bool:
        return True


def test_whatever_a_library_writes_is_escaped_but_for_the_moves_of_a_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = Stream(), Stream()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    terminal.guard_streams()
    terminal.guard_streams()  # once is enough
    sys.stdout.write("\x1b]0;pwn\x07 one\ntwo\u202e\r")
    sys.stderr.write("\rLoading \x1b[2J\r 3/4")
    sys.stderr.write("\x1b[A\x1b[A")
    sys.stderr.writelines(["a\x1b[A", "\n"])
    assert sys.stdout.isatty()
    assert out.getvalue() == "\\x1b]0;pwn\\x07 one\ntwo\\u202e\\r"
    assert err.getvalue() == "\rLoading \\x1b[2J\\r 3/4\x1b[A\x1b[Aa\\x1b[A\n"


@pytest.mark.parametrize("arguments", [["\x1b[2Jx\u202e"], ["introspect", "compare", "--\x1b]0;x\x07"]])
def test_what_typer_quotes_of_the_command_line_is_escaped(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lazarus", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert legible(told) == told
    assert "\\x1b" in told


def closed(*numbers: int, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command without some of its streams."""

    def close() -> None:
        for number in numbers:
            os.close(number)

    return subprocess.run(
        [sys.executable, "-m", "lazarus", *arguments],
        cwd=cwd,
        preexec_fn=close,
        capture_output=True,
        text=True,
    )


def test_a_closed_stream_costs_no_result(tmp_path: Path, documents: dict[str, Any]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(documents["compare"]))
    show = ["show", "x.json", "-o", "y.csv"]
    done = closed(0, 2, arguments=show, cwd=tmp_path)
    assert (done.returncode, done.stdout.count("Results saved to: y.csv")) == (0, 1)
    whole = (tmp_path / "y.csv").read_bytes()
    (tmp_path / "y.csv").unlink()
    done = closed(0, 1, arguments=show, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output cannot be written: Bad file descriptor. It is closed.\n"
    (tmp_path / "z.csv").write_bytes(whole)
    assert (tmp_path / "y.csv").read_bytes() == whole
    done = closed(0, 1, 2, arguments=["show", "nothing.json"], cwd=tmp_path)
    assert done.returncode == 2
