"""The quantisation that a configuration claims, checked against the dtypes of the stored weights.

The claim outlives a model that was dequantised and saved again, and it is lost where a configuration comes
from elsewhere. transformers believes it in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazarus import _transformers
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.quantised.codes import can_decode
from lazarus.models.quantised.finding import NO_CODES, PARAMETER, stored_codes
from lazarus.models.stored import StoredTensor


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
    return all(t.dtype in NO_CODES and not PARAMETER.search(key) for key, t in stored.items())


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
