"""The weights of a quantised checkpoint as an unquantised one would hold them, decoded when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised import (
    auto_round,
    awq,
    bitsandbytes,
    compressed,
    fp8,
    gptq,
    hqq,
    modelopt,
    mxfp4,
    quanto,
    torchao,
)
from lazarus.models.quantised.activations import quantised_activations
from lazarus.models.quantised.coded import CodedTensor
from lazarus.models.quantised.finding import IGNORED, Checkpoint, stored_codes
from lazarus.models.stored import StoredTensor, same_elements

Weight = StoredTensor | CodedTensor
"""a tensor of a checkpoint: stored as it is, or as codes"""
_FINDERS: Mapping[str, Callable[[Checkpoint], Iterator[CodedTensor]]] = {
    **dict.fromkeys(("auto-round", "intel/auto-round"), auto_round.find),
    "awq": awq.find,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed.find,
    "fbgemm_fp8": fp8.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "hqq": hqq.find,
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"), modelopt.find),
    "mxfp4": mxfp4.find,
    "mxfp8": fp8.find,
    "quanto": quanto.find,
    "torchao": torchao.find,
}
"""what finds the coded weights of a checkpoint, by its quantisation method"""
_REASONS = {
    "aqlm": "its codes stand for vectors, added up out of trained codebooks",
    "bitnet": "its weights are rounded again for each pass, and so are its activations",
    "eetq": "its codes are laid out for the kernels of one kind of GPU",
    "fp_quant": "its activations are rotated as it runs, so its weights alone are not the model",
    "higgs": "its codes stand for vectors of rotated weights, laid out for the kernels of one kind of GPU",
    "spqr": "its codes are in tiles of a kernel, with single weights beside them",
    "vptq": "its codes stand for vectors out of trained codebooks",
}
"""why the weights of other methods are not decoded"""


def can_decode(method: str | None) -> bool:
    """Return whether weights of this quantisation method can be decoded."""
    return method in _FINDERS


@dataclass(frozen=True)
class Codes:
    """The quantisation of a checkpoint, by its configuration."""

    name: str
    method: str
    settings: Mapping[str, Any]
    dtype: str
    """safetensors' name of the dtype in which the model runs by its configuration"""

    @property
    def activations(self) -> str | None:
        """Return how it quantises activations, by its configuration; None where it does not."""
        return quantised_activations(self.method, self.settings)

    def weights(self, stored: Mapping[str, StoredTensor]) -> dict[str, Weight]:
        """Return the tensors that an unquantised checkpoint would hold, in the order of these.

        What belongs to codes and is no weight, such as the scales of activations, is left out.

        Raises:
            UnsupportedModelError: the weights are in a form that cannot be decoded.
            WeightsError: a part of a weight is missing, or does not fit the others.
        """
        if self.method not in _FINDERS:
            reason = _REASONS.get(self.method)
            raise UnsupportedModelError(
                f"{self.name}: its weights are quantised by {self.method!r}, which cannot be decoded"
                f"{f': {reason}' if reason else ''}. The methods that can are {', '.join(sorted(_FINDERS))}. "
                "Compare an unquantised checkpoint."
            )
        try:
            coded = list(_FINDERS[self.method](Checkpoint(stored, self.settings, self.dtype)))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{self.name}: {error}. Compare an unquantised checkpoint."
            ) from error
        first = {id(next(iter(weight.parts.values()))): weight for weight in coded}
        parts = {id(part) for weight in coded for part in weight.parts.values()}
        found: dict[str, Weight] = {}
        for key, tensor in stored.items():
            if id(tensor) in first:
                found[first[id(tensor)].key] = first[id(tensor)]
            elif id(tensor) not in parts and not IGNORED.search(key):
                found[key] = tensor
        self._check_all_found(found)
        return found

    def _check_all_found(self, weights: Mapping[str, Weight]) -> None:
        """Refuse codes that no format has taken: they would pass for elements, or for missing tensors.

        Raises:
            UnsupportedModelError: there are some.
        """
        plain = {key: weight for key, weight in weights.items() if isinstance(weight, StoredTensor)}
        if left := sorted(stored_codes(plain)):
            raise UnsupportedModelError(
                f"{self.name}: {len(left)} of its weights are stored as codes in a layout that is not one of "
                f"{self.method!r} as it is read here, first {left[0]} ({plain[left[0]].dtype} "
                f"{list(plain[left[0]].shape)}). Compare an unquantised checkpoint."
            )


def same_weights(one: Weight, other: Weight) -> bool:
    """Return whether two tensors hold the same elements, bit for bit, however they are stored.

    Raises:
        OSError: a file is gone, or was cut short since its header was read.
        WeightsError: the parts of a coded weight contradict each other.
    """
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return same_elements(one, other)
    if one.shape != other.shape:
        return False
    if isinstance(one, CodedTensor) and isinstance(other, CodedTensor) and one.same_codes(other):
        return True
    ours, theirs = one.read().to(torch.float64), other.read().to(torch.float64)
    return torch.equal(ours.view(torch.int64), theirs.view(torch.int64))
