"""AutoRound: GPTQ's layout, with zero points as they are or less one, or AWQ's.

`packing_format` says which (`inference/backend.py` and `inference/convert_model.py` in
github.com/intel/auto-round). The arithmetic is that of its `auto_round_extension/torch`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised import awq, gptq
from lazarus.models.quantised.coded import CodedTensor
from lazarus.models.quantised.finding import Checkpoint, Settings


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of an AutoRound checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    settings = checkpoint.settings
    layout = _layout(settings)
    if (bits := settings.get("act_bits")) is not None and bits <= 8:
        raise UnsupportedModelError(
            f"its activations are quantised to {bits} bits as it runs, and then its weights are stored in "
            "another way, which is not decoded"
        )
    if settings.get("rotation_config"):
        raise UnsupportedModelError(
            "its activations are rotated as it runs (rotation_config), so its weights alone are not the model"
        )
    for module in checkpoint.modules("qweight"):
        if layout == "awq":
            yield awq.coded(checkpoint, module, "auto-round")
        else:
            yield gptq.coded(checkpoint, module, "auto-round", layout)


def _layout(settings: Settings) -> str:
    """Return `awq`, or GPTQ's name of a layout.

    Raises:
        UnsupportedModelError: it is another one.
    """
    # Versions before 0.5 wrote what runs the weights, which says the same.
    packing = str(settings.get("packing_format") or settings.get("backend") or "auto")
    data_type = str(settings.get("data_type") or "int")
    words = packing.replace("autoround", "auto_round").split(":")
    if data_type != "int" or words[0] not in ("auto", "auto_round", "auto_gptq", "gptq", "auto_awq", "awq"):
        raise UnsupportedModelError(
            f"its weights are packed as {packing!r} of the data type {data_type!r}, which is not decoded"
        )
    if {"awq", "auto_awq"} & {*words}:
        return "awq"
    return "gptq" if {"auto", "gptq", "auto_gptq"} & {*words} else "gptq_v2"
