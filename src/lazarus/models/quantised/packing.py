"""Codes out of the words that hold them, and the numbers that 4, 6 and 8 bits stand for."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, Shaped, UInt8
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""what the lower three bits of a 4-bit float stand for (OCP Microscaling Formats 1.0, section 5.3.3)"""


def unpack_words(words: Int32[Tensor, "rows words"], bits: int, n_codes: int) -> Int32[Tensor, "rows codes"]:
    """Return the codes that are packed into each row of words, lowest bits first.

    Code i is at the bits from i·`bits` on, counted through the row; it may straddle two words.

    Raises:
        ValueError: the words are too few for so many codes.
    """
    if words.shape[1] * 32 < n_codes * bits:
        raise ValueError(f"{words.shape[1]} words of 32 bits do not hold {n_codes} codes of {bits} bits")
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        # The shift is arithmetic: the copies of the sign are above the mask.
        codes = (words[:, : -(-n_codes * bits // 32), None] >> shifts) & mask
        return codes.reshape(len(words), -1)[:, :n_codes]
    places = torch.arange(n_codes, device=words.device) * bits
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    first = places // 32
    joined = wide[:, first] | (wide[:, first + 1] << 32)
    return ((joined >> (places % 32)) & mask).to(torch.int32)


def unpack_planes(words: Int32[Tensor, "rows words"], bits: int, n_codes: int) -> Int32[Tensor, "rows codes"]:
    """Return the codes of which 32 are in each `bits` words of a row, in planes: the lowest bits first.

    A plane has 4, 2 or 1 bits of each code, the widest first; so 7 bits are planes of 4, 2 and 1.

    Raises:
        ValueError: the words are too few for so many codes.
    """
    if words.shape[1] < -(-n_codes // 32) * bits:
        raise ValueError(f"{words.shape[1]} words of 32 bits do not hold {n_codes} codes of {bits} bits")
    blocks = words.reshape(len(words), -1, bits)
    found = torch.zeros(len(words), blocks.shape[1] * 32, dtype=torch.int32, device=words.device)
    done = 0
    for width in (4, 2, 1):
        if bits & width:
            plane = blocks[:, :, done : done + width].reshape(len(words), -1)
            found |= unpack_words(plane, width, found.shape[1]) << done
            done += width
    return found[:, :n_codes]


def unpack_nibbles(packed: UInt8[Tensor, "*rows bytes"]) -> UInt8[Tensor, "*rows codes"]:
    """Return the two 4-bit codes of each byte, the lower one first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def from_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return what 4-bit floats stand for, in float32; code 8 is −0.0."""
    table = torch.cat((E2M1, -E2M1)).to(codes.device)
    # Twice as fast as an index: these are most of the work.
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def from_e2m3(codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return what 6-bit floats with three bits of mantissa stand for, in float32."""
    steps = torch.arange(8) / 8
    positive = torch.cat((steps, *((1 + steps) * 2**exponent for exponent in range(3))))
    return torch.cat((positive, -positive)).to(codes.device)[codes.to(torch.int32)]


def from_e8m0(codes: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the powers of two that 8-bit exponents stand for, in float32: 2^(code − 127).

    Code 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1).
    """
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)
