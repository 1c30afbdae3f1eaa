"""Quantised checkpoints: what they claim, and their weights as an unquantised checkpoint would hold them.

claim.py       what a configuration claims of quantisation, and whether the stored weights are so
codes.py       the weights of a checkpoint, each decoded when it is read: which format decodes it
coded.py       one weight: the stored tensors that hold its codes and scales, and decoding rows of it
blocks.py      which elements of a weight have one scale in common
packing.py     codes out of words and bytes
finding.py     which stored tensors are codes, and which make one weight together
activations.py what a checkpoint does to activations as it runs
groups.py      which bits and groups a weight has, of those that a configuration states
compressed.py  … and one module for each format
"""

from lazarus.models.quantised.activations import UNKNOWN
from lazarus.models.quantised.claim import check_claim, claimed_method, is_left_over
from lazarus.models.quantised.coded import CodedTensor, Precision
from lazarus.models.quantised.codes import Codes, Weight, can_decode, same_weights
from lazarus.models.quantised.finding import stored_codes

__all__ = [
    "UNKNOWN",
    "CodedTensor",
    "Codes",
    "Precision",
    "Weight",
    "can_decode",
    "check_claim",
    "claimed_method",
    "is_left_over",
    "same_weights",
    "stored_codes",
]
