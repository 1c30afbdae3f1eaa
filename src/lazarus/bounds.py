"""The limits on what a stranger's file may ask for, each with its reason, and the one way to lift all."""

from __future__ import annotations

import os

VARIABLE = "LAZARUS_NO_LIMITS"
"""the environment variable that lifts every limit where it is 1"""
LIFT = f"Where that is meant, set {VARIABLE}=1 in the environment, which lifts this limit."

MOST_BYTES = 2**26
"""of a small file, 64 MiB: the longest index of a published checkpoint has 15 MB, and JSON takes twenty times
its size when it is read"""
MOST_VOCABULARY_BYTES = 2**27
"""of a file with a vocabulary, 128 MiB: those of a million tokens have 60 MB"""
MOST_NESTED = 100
"""brackets within brackets in JSON: no file of a checkpoint has twenty, and copying them is recursive"""


def exceeds(found: float, most: float) -> bool:
    """Return whether a number is above a limit that is not lifted."""
    return found > most and not lifted()


def lifted() -> bool:
    """Return whether the environment lifts the limits."""
    return os.environ.get(VARIABLE) == "1"
