"""A few trials of every kind of fault: `make faults` has hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_whatever_goes_wrong_no_result_is_wrong_and_nothing_is_left() -> None:
    script = Path(__file__).with_name("faults.py")
    # In a process of its own: its forks need one in which nothing was computed.
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
