"""The quantisation that a configuration claims, checked against the dtypes of the stored weights.

The claim outlives a model that was dequantised and saved again, and it is lost where a configuration comes
from elsewhere. transformers believes it in both cases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lazarus import _transformers
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.quantised.codes import can_decode
from lazarus.models.stored import StoredTensor

_NO_CODES = {"F64", "F32", "F16", "BF16", "C64", "BOOL", "I64"}
"""dtypes in which no quantiser stores codes; whole numbers in 64 bits are indices"""
_FLOAT8 = {"F8_E4M3", "F8_E5M2"}
"""codes where there are scales beside them, elements where there are none"""
_WEIGHT = re.compile(r"weight|qdata|W_q|_blocks$")
"""in the name of a tensor of codes; a model may have other whole numbers of its own, such as tables"""
_OF_EXPERTS = ("_scale", "_scale_inv", "_weight_scale")
"""what the name of stacked experts, which are no `weight`, has at its end where it is that of their scales"""
_PARAMETER = re.compile(r"scale|zero_?point|qzeros|absmax|quant|g_idx|\bSCB$")
"""in the name of what a quantiser stores beside its codes, or beside elements that it rounds as it runs"""


def claimed_method(config: Any) -> str | None:
    """Return the quantisation that a configuration claims, such as `gptq`; None where it claims none."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    # bitsandbytes was the only method once, and had no name.
    is_bitsandbytes = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    method = settings.get("quant_method", "bitsandbytes" if is_bitsandbytes else None)
    return str(getattr(method, "value", method))


def is_left_over(stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether a claim of quantisation is not true of these tensors: all are plain elements."""
    return all(t.dtype in _NO_CODES and not _PARAMETER.search(key) for key, t in stored.items())


def stored_codes(stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield the keys of the weights that are stored as a quantiser's codes."""
    scaled = {key.rpartition(".")[0] for key in stored if _PARAMETER.search(key)}
    for key, tensor in stored.items():
        is_weight = _WEIGHT.search(key) or any(key + ending in stored for ending in _OF_EXPERTS)
        may_be = len(tensor.shape) > 1 and is_weight and tensor.dtype not in _NO_CODES
        if may_be and (tensor.dtype not in _FLOAT8 or key.rpartition(".")[0] in scaled):
            yield key


def check_claim(name: str, config: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a quantised checkpoint that does not say how, or in a way that transformers does not know.

    transformers would read the codes as elements, with at most a warning.

    Raises:
        UnsupportedModelError: transformers does not know the quantisation.
        WeightsError: there are codes, and the configuration has no `quantization_config`.
    """
    method = claimed_method(config)
    if method is None:
        codes = sorted(stored_codes(stored))
        if codes:
            dtype = stored[codes[0]].dtype
            raise WeightsError(
                f"{name}: {len(codes)} of its weights are stored as a quantiser's codes, first {codes[0]} "
                f"({dtype}), and config.json has no quantization_config: what they stand for is not known. "
                "Fetch the config.json that was saved with these weights."
            )
    elif not can_decode(method) and not _transformers.knows_quantisation(config.quantization_config):
        raise UnsupportedModelError(
            f"{name}: its weights are quantised by {method!r}, which transformers cannot read, and which is "
            "not decoded here. Use an unquantised checkpoint."
        )
