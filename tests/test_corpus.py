"""Every file that fuzzing once found a fault with is a result, or an error of ours: `tests/corpus`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_what_was_found_once_is_an_error_of_ours() -> None:
    script = Path(__file__).with_name("fuzz.py")
    # In a process of its own: its forks need one in which nothing was computed.
    done = subprocess.run([sys.executable, script, "--corpus"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
