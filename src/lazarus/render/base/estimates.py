"""The estimate of a run, as text."""

from __future__ import annotations

from collections.abc import Iterator

from lazarus.messages import in_flags
from lazarus.render.base.words import counted
from lazarus.results import Estimate

_BYTES = ("bytes", "kB", "MB", "GB", "TB")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
_MODES = {"resident": "all weights in memory", "stream": "a block of each model at a time"}
_WIDTH = 13


def text(found: Estimate) -> str:
    """Return the estimate in lines, with its units; options as they are typed."""
    return "\n".join(_lines(found))


def _lines(found: Estimate) -> Iterator[str]:
    others = counted(len(found.members), "member") if found.members else found.finetuned
    models = found.base if others is None else f"{found.base} and {others}"
    yield f"An estimate for {models}: nothing was run."
    yield ""
    threads = f", {counted(found.n_threads, 'thread')}" if found.device == "cpu" else ""
    memory = f"{_scaled(found.peak_bytes, _BYTES)} at its peak"
    rows = {
        "Mode": f"{found.mode}: {_MODES[found.mode]}, in {found.dtype} on {found.device}{threads}",
        "Prompts": f"{counted(found.n_prompts, 'prompt')}, {counted(found.n_tokens, 'token')}, in "
        f"{counted(found.n_batches, 'batch', 'batches')}",
        "Read": f"{_scaled(found.bytes_read, _BYTES)} of weights",
        "Memory": memory,
        "Computation": _scaled(found.flops, _FLOPS),
        "Time": duration(found.seconds),
    }
    if found.bytes_written:
        rows["Write"] = f"{_scaled(found.bytes_written, _BYTES)} of hidden states"
    if found.rows_read:
        rows["Write"] += f", read again as {_scaled(found.rows_read, _BYTES)}"
    if found.device_bytes is not None:
        rows["GPU memory"] = _scaled(found.device_bytes, _BYTES)
    for name, told in rows.items():
        yield f"{name:<{_WIDTH}}{told}"
    width = max((len(part.name) for part in found.parts), default=0)
    for part in found.parts:
        yield f"{'':<{_WIDTH}}  {part.name:<{width}}  {duration(part.seconds):>10}"
    yield from (f"Note: {in_flags(remark)}" for remark in found.remarks)


def duration(seconds: float) -> str:
    """Return a time as a person reads it.

    >>> duration(3.21), duration(75), duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Return a number in the unit in which it is below a thousand."""
    index = 0
    while number >= 1000 and index < len(units) - 1:
        number, index = number / 1000, index + 1
    return f"{number:.3g} {units[index]}"
