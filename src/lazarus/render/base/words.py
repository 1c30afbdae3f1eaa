"""Lines and numbers that every command writes alike."""

from __future__ import annotations

from lazarus.render.base.escape import escaped


def loading(role: str, name: str) -> str:
    """The line that is printed before a model is loaded; `role` is `base` or `finetuned`."""
    return f"Loading {'fine-tuned' if role == 'finetuned' else role} model: {escaped(name)}"


def saved(path: str) -> str:
    """The line that tells where a result is."""
    return f"Results saved to: {escaped(path)}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and its noun: `1 tensor`, `272 tensors`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def times(ratio: float) -> str:
    """Return a ratio with no more digits than the noise has, which is another one on another machine."""
    most = next((limit for limit in (1000, 100, 10) if ratio > limit), None)
    return f"{ratio:.1f} times" if most is None else f"over {most:,} times"


def short(value: float | None) -> str:
    """Four decimals, or as many digits as a small number needs to be told from zero."""
    value = float("nan") if value is None else value
    return f"{value:.4f}" if value == 0 or value >= 0.0001 else f"{value:.1e}"
