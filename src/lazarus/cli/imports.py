"""torch and transformers are imported when a command runs, and take most of a short one's time."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without collecting garbage: none of the million objects that come is garbage.

    They are not looked through later either, nor when the process ends (but see `_end`).
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(_end)


def _end() -> None:
    # triton, which comes with the CUDA builds of torch, prints a line for each of its objects that is left
    # when the process ends, and what is frozen is never freed.
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()
