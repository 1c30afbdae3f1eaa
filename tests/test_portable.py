"""Every module imports and every command runs where Linux is not: CI runs these tests on macOS and Windows.

On Linux they run without what Windows lacks (`as_windows.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazarus.demo import BASE, FINETUNED, PROMPTS

HERE = Path(__file__).parent
OPTIONS = ["--windows"] if sys.platform == "linux" else []
DIFF = ["introspect", "activation-diff", "-b", str(BASE), "-f", str(FINETUNED)]
SUFFIXES = ["json", "csv", "parquet", "md", "html", "svg", "png", "pdf", "safetensors"]
COMMANDS = [
    ["--help"],
    ["schema", "activation-diff"],
    ["demo"],
    [*DIFF, "-p", f"@{PROMPTS}", "--localize", *(f"-odiff.{suffix}" for suffix in SUFFIXES)],
    ["show", "diff.json", "-o", "again.html"],
    [*DIFF, "-p", f"@{PROMPTS}", "--memory", "stream", "--work-dir", "work", "-o", "streamed.json"],
    [*DIFF, "-p", "Hello", "--estimate"],
    [*DIFF, "-p", "Hello", "--chat-template", "chat.jinja"],
    ["introspect", "record", "-m", str(BASE), "-p", "Hello", "-o", "recorded"],
    ["introspect", "activation-diff", "-b", str(BASE), "-f", "recorded", "--expect", "changed"],
    ["introspect", "weight-diff", "-b", str(BASE), "-f", str(FINETUNED), "-o", "weights.json"],
    ["introspect", "compare", "-m1", str(BASE), "-m2", str(FINETUNED), "-p", "Hello", "-o", "lens.html"],
    ["introspect", "series", "-b", str(BASE), "-f", str(BASE), "-f", str(FINETUNED), "-p", "Hello"],
    [*DIFF[:-1], "absent", "-p", "Hello"],
]
CODES = [0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1]
MADE = [
    *(f"diff.{suffix}" for suffix in SUFFIXES),
    *("again.html", "chat.jinja", "lens.html", "recorded", "streamed.json", "temp", "weights.json", "work"),
]


def test_every_command_runs_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "temp"
    temporary.mkdir()
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8"
    )
    told = ended(COMMANDS, tmp_path, temporary)
    assert [each["code"] for each in told["ended"]] == CODES
    assert "lazarus.estimating.memory" in told["modules"]
    assert "KL(base\\u2016fine-tuned)" in told["ended"][2]["printed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(MADE)
    assert not list(temporary.glob(".lazarus-*"))
    assert not [path for path in (tmp_path / "recorded").iterdir() if path.name.startswith(".")]


def ended(commands: list[list[str]], folder: Path, temporary: Path) -> Any:
    """Run the commands one after the other in one process, and return what it tells of them."""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", str(HERE / "as_windows.py"), *OPTIONS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        encoding="cp1252",
        cwd=folder,
        env={
            **os.environ,
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
            "PYTHONIOENCODING": "cp1252",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is taken away: what is open is read from /proc")
def test_what_windows_lacks_is_lacking(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import as_windows
as_windows.hide_posix()
as_windows.hold_open_files()
told = {{"__name__": "lazarus.any"}}
for line in ("import resource", "import os; os.fork", "from signal import SIGKILL", "import fcntl"):
    try:
        exec(line, dict(told))
    except (ImportError, AttributeError):
        continue
    sys.exit(line)
exec("import os; os.getpid(); import signal; signal.SIGINT", told)
import os, pathlib, fcntl
held = open("held", "w", encoding="utf-8")
for step in (lambda: os.unlink("held"), lambda: pathlib.Path("other").replace("held")):
    pathlib.Path("other").touch()
    try:
        step()
    except PermissionError:
        continue
    sys.exit("an open file was removed")
held.close()
os.unlink("held")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
