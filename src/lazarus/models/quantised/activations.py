"""What a quantised checkpoint does to activations as it runs, by its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lazarus.models.quantised.finding import Settings

_WEIGHTS_ALONE = {"awq", "gptq", "hqq", "mxfp4"}
"""methods that leave activations as they are"""
_FP8 = {"fbgemm_fp8": "fp8", "fp8": "fp8", "mxfp8": "mxfp8"}
"""methods whose kernels multiply 8-bit floats, and what they round the inputs of a layer to"""
UNKNOWN = "not known"


def quantised_activations(method: str, settings: Settings) -> str | None:
    """Return how a checkpoint quantises activations, such as `int8, dynamic`; None where it does not.

    What its configuration does not tell is `UNKNOWN`.
    """
    if method in _WEIGHTS_ALONE:
        return None
    if method in _FP8:
        return f"{_FP8[method]}, {settings.get('activation_scheme') or 'dynamic'}"
    if method == "bitsandbytes":
        return "int8, dynamic, but for outliers" if settings.get("load_in_8bit") else None
    if "config_groups" in settings:
        return _of_groups(settings)
    if method.startswith("modelopt"):
        algorithm = str(settings.get("quant_algo") or UNKNOWN)
        return None if re.search(r"A16|WO$", algorithm.upper()) else algorithm
    if method.endswith("auto-round"):
        bits = int(settings.get("act_bits") or 16)
        return None if bits >= 16 else f"{settings.get('act_data_type', 'int')}{bits}"
    if method == "torchao":
        found = re.search(r"\w*Activation\w*Config|\w*activation\w*weight", json.dumps(settings, default=str))
        return found[0] if found else None if "quant_type" in settings else UNKNOWN
    if method == "quanto":
        kinds = {str(kind) for kind in _all_under("activations", settings) if kind not in (None, "none")}
        return ", ".join(sorted(kinds)) or None
    return UNKNOWN


def _of_groups(settings: Settings) -> str | None:
    """Return what the groups of compressed-tensors' settings say, and its KV cache."""
    found = []
    for name, group in settings["config_groups"].items():
        if not isinstance(group, Mapping):  # a preset by its name, such as W4A16
            found += [] if "A16" in name else [name]
        elif (scheme := group.get("input_activations")) is not None:
            found.append(_scheme(scheme))
    if (scheme := settings.get("kv_cache_scheme")) is not None:
        found.append(f"KV cache {_scheme(scheme)}")
    return "; ".join(dict.fromkeys(found)) or None


def _scheme(scheme: Mapping[str, Any]) -> str:
    kind = {"float": "fp"}.get(str(scheme.get("type")), scheme.get("type"))
    return f"{kind}{scheme.get('num_bits')}, {'dynamic' if scheme.get('dynamic') else 'static'}"


def _all_under(name: str, settings: object) -> list[Any]:
    """Return every value of this name, at any depth."""
    if not isinstance(settings, Mapping):
        return []
    inner = [value for each in settings.values() for value in _all_under(name, each)]
    return [settings[name], *inner] if name in settings else inner
