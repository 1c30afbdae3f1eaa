"""The rotary positions of a GGUF file as transformers' `rope_parameters`.

Of them transformers takes the base of the frequencies from a file, and nothing else. llama.cpp divides all
frequencies by one factor (linear), each by its own of the tensor `rope_freqs.weight` (Llama 3.1) or of one of
two such tensors (LongRoPE), or passes from undivided to divided ones (YaRN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.models.gguf.parts import Gguf

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BASE = 10_000.0
"""llama.cpp's, for a file that does not say"""
_UNROTATED = 1e6
"""a factor so large that its dimension does not turn"""
_YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
_USED = {
    "yarn": {*_YARN, "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"},
    "longrope": {"rope.scaling.attn_factor"},
}
"""The keys that are read for one type of scaling alone."""
_OF_EVERY_TYPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Rope:
    """A model's `rope_parameters`, and the keys of the file that they are made of."""

    parameters: dict[str, Any]
    taken: frozenset[str]
    untaken: tuple[str, ...] = ()
    """tensors of the file that transformers has no setting for"""
    rotated_share: float | None = None
    """how much of an attention head turns, where that is not what the class has: `partial_rotary_factor`"""


def rope_of(file: Gguf, plain: Mapping[str, Any], head_dim: int) -> Rope:
    """Return the rotary positions of a file whose model has the `rope_parameters` `plain` by default."""
    if _FULL not in plain:
        return _one_rope(file, plain, head_dim)
    full = _one_rope(file, plain[_FULL], head_dim)
    parameters, taken = {**plain, _FULL: full.parameters}, set(full.taken)
    if plain.get(_SLIDING) is not None and (base := file.get("rope.freq_base_swa")):
        parameters[_SLIDING] = {**plain[_SLIDING], "rope_theta": base}
        taken.add("rope.freq_base_swa")
    if file.get("rope.dimension_count_swa") in (head_dim, file.get("attention.key_length_swa")):
        taken.add("rope.dimension_count_swa")
    return Rope(parameters, frozenset(taken), full.untaken)


def _one_rope(file: Gguf, plain: Mapping[str, Any], head_dim: int) -> Rope:
    parameters, taken = dict(plain), {"rope.freq_base", "rope.scale_linear"}
    parameters["rope_theta"] = file.get("rope.freq_base") or _BASE
    if parameters.get("rope_type") == "proportional":
        untaken = () if _is_proportional(file, parameters, head_dim) else (FACTORS,)
        return Rope(parameters, frozenset({*taken, "rope.dimension_count"}), untaken)
    width, share = file.get("rope.dimension_count") or head_dim, None
    if "partial_rotary_factor" in parameters:
        taken.add("rope.dimension_count")
        if parameters["partial_rotary_factor"] != width / head_dim:
            parameters["partial_rotary_factor"] = share = width / head_dim
    elif width == head_dim:
        taken.add("rope.dimension_count")
    if (scaling := _scaling(file, parameters["rope_theta"], width)) is None:
        tensors = tuple(name for name in (FACTORS, LONG, SHORT) if name in file.tensors)
        return Rope(parameters, frozenset(taken), tensors, share)
    kind = scaling["rope_type"]
    # Entries of another type of scaling would be read as those of this one.
    if kind != parameters.get("rope_type", "default"):
        parameters = {key: value for key, value in parameters.items() if key in _OF_EVERY_TYPE}
    taken |= {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"}
    taken |= _USED.get(kind, set())
    if kind == "yarn" and file.get("rope.scaling.yarn_ext_factor") == 1.0:
        taken.add("rope.scaling.yarn_ext_factor")
    return Rope({**parameters, **scaling}, frozenset(taken), (), share)


def _is_proportional(file: Gguf, parameters: Mapping[str, Any], head_dim: int) -> bool:
    """Return whether the file turns as many dimensions as the configuration does, and no others."""
    if FACTORS not in file.tensors:
        return True
    factors = _factors(file, FACTORS)
    n_turning = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
    return bool((factors[:n_turning] == 1).all() and (factors[n_turning:] > _UNROTATED).all())


def _scaling(file: Gguf, base: float, width: int) -> dict[str, Any] | None:
    """The scaling of the frequencies; None where the file has one that transformers does not know."""
    kind = file.get("rope.scaling.type") or "linear"  # llama.cpp's default
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    context = file.get("context_length")
    original = file.get("rope.scaling.original_context_length") or context
    if kind == "none":
        factor = 1.0
    if LONG in file.tensors and SHORT in file.tensors:
        found = {
            name: _factors(file, tensor) for name, tensor in (("long_factor", LONG), ("short_factor", SHORT))
        }
        return _longrope(found, file.get("rope.scaling.attn_factor"), original, context)
    if FACTORS in file.tensors:
        factors = _factors(file, FACTORS)
        # llama.cpp divides by both, the factors of the tensor and the one factor of the metadata.
        if kind == "linear" and len(factors) == width // 2:
            return _by_frequency(factors * factor, base, width, context)
        return None
    if kind == "yarn":
        return _yarn(file, factor, original)
    if kind not in ("none", "linear") or LONG in file.tensors or SHORT in file.tensors:
        return None
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _factors(file: Gguf, tensor: str) -> NDArray[np.float64]:
    return np.asarray(file.tensors[tensor].elements(), dtype=np.float64).reshape(-1)


def _yarn(file: Gguf, factor: float, original: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    found |= {name: value for key, name in _YARN.items() if (value := file.get(key)) is not None}
    if (stated := file.get("rope.scaling.yarn_attn_factor")) is not None:
        found["attention_factor"] = stated
    elif (times := file.get("rope.scaling.attn_factor")) not in (None, 1.0):
        # llama.cpp multiplies it by what YaRN itself does to the attention
        found["attention_factor"] = times * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return found


def _longrope(
    factors: Mapping[str, NDArray[Any]], attention: float | None, original: int, context: int
) -> dict[str, Any]:
    found = {name: values.tolist() for name, values in factors.items()}
    found |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    ratio = context / original
    # What transformers computes by itself from the two lengths; only another value needs an entry.
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if attention is not None and not math.isclose(attention, usual, rel_tol=1e-6):
        found["attention_factor"] = attention
    return found


def _by_frequency(factors: NDArray[np.float64], base: float, width: int, context: int) -> dict[str, Any]:
    """Return a scaling that divides each frequency by its own factor: Llama 3's, where it fits."""
    if (factors == factors[0]).all():
        one = float(factors[0])
        return {"rope_type": "default"} if one == 1 else {"rope_type": "linear", "factor": one}
    if (found := _llama3(factors, base, width)) is not None:
        return found
    # LongRoPE with the same factors for long and short texts is just that: each frequency has its own factor.
    listed = factors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": listed,
        "short_factor": listed,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3(factors: NDArray[np.float64], base: float, width: int) -> dict[str, Any] | None:
    """Return the parameters of Llama 3's rule that give these factors; None without a single set of them.

    Between the high and the low frequencies the inverse of a factor is linear in the frequency. This gives
    the original length and the low and high factor, but for a common multiple: low is 1, as in every Llama.
    """
    largest = float(factors.max())
    turns = base ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
    between = (factors > factors.min() * (1 + 1e-6)) & (factors < largest * (1 - 1e-6))
    if factors.min() != 1 or not between.any():
        return None
    shares = ((1 / factors - 1 / largest) / (1 - 1 / largest))[between]
    high = 4.0  # as in every Llama, where one frequency alone is between
    if len(shares) > 1:
        _, offset = np.polyfit(turns[between], shares, 1)
        high = round(1 - 1 / float(offset), 3) if offset < 0 else 0.0
    if high <= 1:
        return None
    original = round(float(np.mean((shares * (high - 1) + 1) / turns[between])))
    smooth = ((original * turns - 1) / (high - 1)).clip(0, 1)
    # The fit may be of another rule: the factors that it gives must be those of the file.
    if not np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
