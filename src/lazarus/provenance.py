"""The provenance of a record: the program, the time, the software and the machine."""

from __future__ import annotations

import datetime
import platform

import torch
import transformers

from lazarus.results import Environment, Tool
from lazarus.version import __version__


def tool() -> Tool:
    """This program."""
    return Tool(name="lazarus", version=__version__)


def now() -> str:
    """The time, as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(device: torch.device | None = None) -> Environment:
    """Return the software of this process, and the hardware of a device: of the CPU, if none is given."""
    on_gpu = device is not None and device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        device_name=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        n_threads=torch.get_num_threads(),
    )
