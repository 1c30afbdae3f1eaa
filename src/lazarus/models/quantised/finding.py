"""Which stored tensors are codes, and which make one weight together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lazarus.models.quantised.coded import damaged
from lazarus.models.stored import StoredTensor

Settings = Mapping[str, Any]
"""a configuration's `quantization_config`"""


@dataclass(frozen=True)
class Checkpoint:
    """A quantised checkpoint, as a finder of coded weights sees it."""

    stored: Mapping[str, StoredTensor]
    settings: Settings
    dtype: str
    """safetensors' name of the dtype in which the model runs by its configuration"""

    def modules(self, ending: str) -> Iterator[str]:
        """Yield the modules that have a tensor of this name, such as `weight_scale`."""
        for key in self.stored:
            module, dot, name = key.rpartition(".")
            if dot and name == ending:
                yield module

    def part(self, module: str, name: str, dtypes: Collection[str]) -> StoredTensor:
        """Return a tensor of a module.

        Raises:
            WeightsError: it is missing, or its dtype is not one of these.
        """
        found = self.optional(module, name, dtypes)
        if found is None:
            path = next((s.path for key, s in self.stored.items() if key.startswith(f"{module}.")), "")
            raise damaged(path, f"{module}.weight", f"its {name} is missing")
        return found

    def optional(self, module: str, name: str, dtypes: Collection[str]) -> StoredTensor | None:
        """Return a tensor of a module, or None where there is none.

        Raises:
            WeightsError: its dtype is not one of these.
        """
        found = self.stored.get(f"{module}.{name}")
        if found is not None and found.dtype not in dtypes:
            wanted = " or ".join(sorted(dtypes))
            why = f"its {name} is stored in {found.dtype}, and not in {wanted}"
            raise damaged(found.path, f"{module}.weight", why)
        return found


FLOATS = ("F32", "BF16", "F16", "F64")


def matches(name: str, pattern: str) -> bool:
    """Return whether a module's name is meant: `re:` begins a regular expression, anchored at its start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern


IGNORED = re.compile(
    r"(\.|_)(weight_shape|weight_scale|weight_scale_inv|weight_zero_point|weight_g_idx|weight_global_scale)$"
    r"|[._](input|output|activation)_(scale|zero_point|global_scale|scale_ub)$"
    r"|\.[kvq]_(scale|zero_point|global_scale)$|\.(input|output)_amax$|\.qscale_act$"
    r"|\._\w+_act_(quant_scale|quant_zero_point|per_tensor_scale)$|\.k_proj\.k_bias$|\.v_proj\.v_bias$"
)
"""what a quantiser stores beside the codes of weights: of activations and of the KV cache"""

NO_CODES = {"F64", "F32", "F16", "BF16", "C64", "BOOL", "I64"}
"""dtypes in which no quantiser stores codes; whole numbers in 64 bits are indices"""
_FLOAT8 = {"F8_E4M3", "F8_E5M2"}
"""codes where there are scales beside them, elements where there are none"""
_WEIGHT = re.compile(r"weight|qdata|W_q|_blocks$")
"""in the name of a tensor of codes; a model may have other whole numbers of its own, such as tables"""
_OF_EXPERTS = ("_scale", "_scale_inv", "_weight_scale")
"""what the name of stacked experts, which are no `weight`, has at its end where it is that of their scales"""
PARAMETER = re.compile(r"scale|zero_?point|qzeros|absmax|quant|g_idx|\bSCB$")
"""in the name of what a quantiser stores beside its codes, or beside elements that it rounds as it runs"""


def stored_codes(stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield the keys of tensors that look like the codes of a quantised weight."""
    scaled = {key.rpartition(".")[0] for key in stored if PARAMETER.search(key)}
    for key, tensor in stored.items():
        is_weight = _WEIGHT.search(key) or any(key + ending in stored for ending in _OF_EXPERTS)
        may_be = len(tensor.shape) > 1 and is_weight and tensor.dtype not in NO_CODES
        if may_be and (tensor.dtype not in _FLOAT8 or key.rpartition(".")[0] in scaled):
            yield key
