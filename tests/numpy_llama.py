"""Llama in NumPy, without torch and transformers: a runtime of its own, into which faults can be planted.

It reads a checkpoint's config.json and safetensors, and runs one prompt. Besides float32 it emulates bfloat16
(each operation's result is rounded, sums within a product are float32), and llama.cpp's CPU kernels.
Llama, Mistral (a sliding window in every block) and biases are known; rotary positions are the plain ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Config = Mapping[str, Any]
Weights = Mapping[str, Array]
Rounding = Callable[[Array], Array]

Fault = Literal[
    "norm_epsilon",
    "rope_base",
    "attention_scale",
    "sliding_window",
    "mask",
    "int4",
    "missing_bias",
    "bfloat16_sums",
]
SIZES: Mapping[Fault, float] = {
    "norm_epsilon": 10.0,
    "rope_base": 0.1,
    "attention_scale": 1.05,
    "sliding_window": 1,
    "mask": 1,
    "int4": 64,
    "missing_bias": 1,
    "bfloat16_sums": 16,
}
"""How large each fault is unless it is said: see `Defect`."""

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
QUANTS = 32
"""how many elements share a scale in llama.cpp's Q8_0 and Q8_1"""


@dataclass(frozen=True)
class Defect:
    """A fault of one block.

    norm_epsilon     the epsilon of both norms is multiplied by `size`
    rope_base        the base of the rotary positions is
    attention_scale  the attention's scale is
    sliding_window   the window is so many tokens larger than the configuration says (negative: smaller)
    mask             each token also sees so many of those that follow it (negative: the latest are hidden)
    int4             `matrix` is rounded to 4 bits, `size` columns to a scale
    missing_bias     the biases of `matrix` are not added, or of all four of the attention's if it has none
    bfloat16_sums    sums within products are rounded to bfloat16 after each `size` terms
    """

    fault: Fault
    layer: int
    size: float | None = None
    matrix: str = "mlp.down_proj"

    @property
    def amount(self) -> float:
        """The size of the fault, or the usual one."""
        return SIZES[self.fault] if self.size is None else self.size


@dataclass(frozen=True)
class Arithmetic:
    """How a runtime rounds."""

    result: Rounding
    """what each operation gives"""
    factor: Rounding
    """what a matrix of weights is multiplied by"""
    cached: Rounding
    """keys and values"""
    attending: Rounding
    """queries, and the weights of attention: what keys and values are multiplied by"""
    iterates_angles: bool = False
    """each rotary angle is the one before times a constant, in float32"""


def exact(array: Array) -> Array:
    return array


def to_bfloat16(array: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; as float32."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(array), array, rounded.view(np.float32)).astype(np.float32)


def bfloat16_bits(array: Array) -> NDArray[np.uint16]:
    """Return the upper halves of float32 that are bfloat16 already."""
    return (np.ascontiguousarray(array, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def to_float16(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float32)


def to_q8(array: Array) -> Array:
    """Round each 32 elements to 8 bits and a float16 scale, as llama.cpp does before a quantised product."""
    groups = array.reshape(*array.shape[:-1], -1, QUANTS)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    rounded: Array = (codes * to_float16(scale)).reshape(array.shape).astype(np.float32)
    return rounded


ARITHMETIC: Mapping[str, Arithmetic] = {
    "float32": Arithmetic(exact, exact, exact, exact),
    "bfloat16": Arithmetic(to_bfloat16, exact, exact, exact),
    # F16 weights and the cache meet float16, weights in 8 or 4 bits meet 8 bits; sums are float32.
    "llama.cpp-f16": Arithmetic(exact, to_float16, to_float16, to_float16, iterates_angles=True),
    "llama.cpp-q8": Arithmetic(exact, to_q8, to_float16, to_float16, iterates_angles=True),
}


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The configuration and the weights, as float32, of a checkpoint's folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            weights[name] = as_float32(data[begin:end], entry["dtype"]).reshape(entry["shape"])
    return config, weights


def as_float32(data: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def forward(
    weights: Weights,
    config: Config,
    ids: Sequence[int],
    *,
    defect: Defect | None = None,
    dtype: str = "float32",
    logits: bool = False,
) -> dict[str, Array]:
    """Run one prompt: {site: [tokens, width]} in float32, whose values are bfloat16's where `dtype` is.

    `dtype` is a name of `ARITHMETIC`; weights are taken as they are, so in bfloat16 they must be bfloat16's.
    Sites are `embedding`, `resid_post.N`, `final_norm`, and `logits` if asked.
    """
    arithmetic = ARITHMETIC[dtype]
    weights = {name: weight for name, weight in weights.items() if keeps(name, defect)}
    table = weights["model.embed_tokens.weight"]
    states = table[np.asarray(ids)]
    found = {"embedding": states}
    for layer in range(config["num_hidden_layers"]):
        planted = defect if defect is not None and defect.layer == layer else None
        prefix = f"model.layers.{layer}."
        parts = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        states = Block(config, parts, arithmetic, planted).run(states)
        found[f"resid_post.{layer}"] = states
    epsilon = float(config["rms_norm_eps"])
    found["final_norm"] = rms_norm(states, weights["model.norm.weight"], epsilon, arithmetic.result)
    if logits:
        factor = arithmetic.factor(found["final_norm"])
        found["logits"] = arithmetic.result(factor @ weights.get("lm_head.weight", table).T)
    return found


def keeps(name: str, defect: Defect | None) -> bool:
    """False of a bias that the defect leaves out."""
    if defect is None or defect.fault != "missing_bias" or not name.endswith(".bias"):
        return True
    return not any(name == f"model.layers.{defect.layer}.{of}.bias" for of in (*PROJECTIONS, defect.matrix))


@dataclass(frozen=True)
class Block:
    """One block, with its own weights by their names within it."""

    config: Config
    weights: Weights
    arithmetic: Arithmetic
    defect: Defect | None

    def amount(self, fault: Fault, otherwise: float) -> float:
        """The size of this fault if it is planted here."""
        planted = self.defect is not None and self.defect.fault == fault
        return self.defect.amount if planted and self.defect is not None else otherwise

    def run(self, states: Array) -> Array:
        """The residual stream after the block."""
        result = self.arithmetic.result
        states = result(states + self.attention(self.norm(states, "input_layernorm")))
        normed = self.norm(states, "post_attention_layernorm")
        gate = self.product(normed, "mlp.gate_proj")
        activated = result(gate / (1 + np.exp(-gate)))
        inner = result(activated * self.product(normed, "mlp.up_proj"))
        return result(states + self.product(inner, "mlp.down_proj"))

    def norm(self, states: Array, name: str) -> Array:
        epsilon = self.config["rms_norm_eps"] * self.amount("norm_epsilon", 1.0)
        return rms_norm(states, self.weights[f"{name}.weight"], epsilon, self.arithmetic.result)

    def product(self, states: Array, name: str) -> Array:
        """states · weightᵀ + bias."""
        weight = self.weights[f"{name}.weight"]
        if self.defect is not None and self.defect.fault == "int4" and self.defect.matrix == name:
            weight = to_int4(weight, int(self.defect.amount))
        factor = self.arithmetic.factor(states)
        terms = int(self.amount("bfloat16_sums", 0))
        product = summed_in_bfloat16(factor, weight, terms) if terms else factor @ weight.T
        bias = self.weights.get(f"{name}.bias")
        return self.arithmetic.result(product if bias is None else product + bias)

    def attention(self, states: Array) -> Array:
        """Grouped-query attention with rotary positions, before it is added to the stream."""
        config, result = self.config, self.arithmetic.result
        n_heads, n_tokens = config["num_attention_heads"], len(states)
        width = config.get("head_dim") or config["hidden_size"] // n_heads
        groups = n_heads // (config.get("num_key_value_heads") or n_heads)

        def heads(name: str) -> Array:
            split = self.product(states, f"self_attn.{name}").reshape(n_tokens, -1, width)
            return split.transpose(1, 0, 2)

        cosines, sines = self.rotations(n_tokens, width)
        query = rotated(heads("q_proj"), cosines, sines, result)
        key = self.arithmetic.cached(rotated(heads("k_proj"), cosines, sines, result))
        value = self.arithmetic.cached(heads("v_proj"))
        scale = np.float32(width**-0.5 * self.amount("attention_scale", 1.0))
        scores = self.arithmetic.attending(query) @ np.repeat(key, groups, axis=0).transpose(0, 2, 1)
        scores = np.where(self.visible(n_tokens), result(result(scores) * scale), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = result(weights / weights.sum(-1, keepdims=True))
        mixed = result(self.arithmetic.attending(weights) @ np.repeat(value, groups, axis=0))
        return self.product(mixed.transpose(1, 0, 2).reshape(n_tokens, -1), "self_attn.o_proj")

    def rotations(self, n_tokens: int, width: int) -> tuple[Array, Array]:
        """Cosine and sine of each token's angles: [tokens, width]."""
        rope = self.config.get("rope_parameters") or self.config
        assert rope.get("rope_type", "default") == "default", rope
        base = rope["rope_theta"] * self.amount("rope_base", 1.0)
        places = np.arange(n_tokens, dtype=np.float32)[:, None]
        if self.arithmetic.iterates_angles:
            factors = np.full((n_tokens, width // 2 - 1), np.float32(base) ** np.float32(-2 / width))
            half = np.cumprod(np.concatenate([places, factors], axis=1), axis=1, dtype=np.float32)
        else:
            exponents = np.arange(0, width, 2, dtype=np.float32) / width
            half = (places / np.float32(base) ** exponents).astype(np.float32)
        angles = np.concatenate([half, half], axis=1)
        return self.arithmetic.result(np.cos(angles)), self.arithmetic.result(np.sin(angles))

    def visible(self, n_tokens: int) -> Array:
        """Which keys each query sees: [queries, keys]. Every query sees one key at least."""
        behind = np.arange(n_tokens)[:, None] - np.arange(n_tokens)
        seen = behind >= -self.amount("mask", 0)
        window = self.config.get("sliding_window")
        if window is not None:
            seen &= behind < window + self.amount("sliding_window", 0)
        first: Array = np.arange(n_tokens) == 0
        return np.where(seen.any(-1, keepdims=True), seen, first)


def rms_norm(states: Array, weight: Array, epsilon: float, result: Rounding) -> Array:
    mean = np.mean(states * states, axis=-1, keepdims=True, dtype=np.float32)
    return result(weight * result(states / np.sqrt(mean + np.float32(epsilon))))


def rotated(heads: Array, cosines: Array, sines: Array, result: Rounding) -> Array:
    half = heads.shape[-1] // 2
    turned = np.concatenate([-heads[..., half:], heads[..., :half]], axis=-1)
    return result(result(heads * cosines) + result(turned * sines))


def to_int4(weight: Array, columns: int) -> Array:
    """Each group of `columns` in a row: 16 values around 0, by the largest of them."""
    groups = weight.reshape(len(weight), -1, columns)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7)
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    rounded: Array = (codes * scale).reshape(weight.shape).astype(np.float32)
    return rounded


def summed_in_bfloat16(states: Array, weight: Array, terms: int) -> Array:
    """states · weightᵀ, where the sum is rounded to bfloat16 after each `terms` terms."""
    total: Array = np.zeros((len(states), len(weight)), dtype=np.float32)
    for begin in range(0, weight.shape[1], terms):
        part = slice(begin, begin + terms)
        total = to_bfloat16(total + to_bfloat16(states[:, part] @ weight[:, part].T))
    return total
