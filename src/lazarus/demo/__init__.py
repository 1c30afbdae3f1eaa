"""A pair of small models that ships with the package: a base and its arithmetic fine-tune.

``train.py`` in this folder made both from the documentation of Python's standard library.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

BASE = _HERE / "base"
"""Folder of the base model, trained on English documentation prose."""

FINETUNED = _HERE / "arithmetic"
"""Folder of the same model after fine-tuning on lines of arithmetic."""

PROMPTS = _HERE / "prompts.jsonl"
"""Prompts in two groups, ``arithmetic`` and ``prose``, one JSON object per line."""

__all__ = ["BASE", "FINETUNED", "PROMPTS"]
