"""What a record says of its own making: the program, the models as they ran, the software and the machine."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Literal

import torch
import transformers

from lazarus.engine import Conventions
from lazarus.models import LoadedModel
from lazarus.results import Environment, ModelInfo, NotCompared, Tool
from lazarus.version import __version__


def tool() -> Tool:
    """This program."""
    return Tool(name="lazarus", version=__version__)


def now() -> str:
    """The time, as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_info(
    model: LoadedModel, conventions: Conventions, outside: Sequence[NotCompared] = ()
) -> ModelInfo:
    """Describe one of the two models as it was run, and what it holds `outside` of what was compared."""
    return ModelInfo(
        id=model.name,
        revision=model.revision,
        kind=model.kind,
        architecture=type(model.model).__name__,
        n_layers=conventions.n_layers,
        hidden_size=model.anatomy.hidden_size,
        stored_dtype=model.stored_dtype,
        run_dtype=model.run_dtype,
        attention=getattr(model.model.config, "_attn_implementation", None),
        adapter=model.adapter,
        not_compared=list(outside),
    )


def environment(device: torch.device, matmul: Literal["default", "onednn"] | None = None) -> Environment:
    """The software and the hardware; `matmul` is how float32 matrices were multiplied, if chosen."""
    on_gpu = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        device_name=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        n_threads=torch.get_num_threads(),
        matmul=matmul,
    )
