"""Tensors that are several components in one: which of their elements belong to which.

The order of the parts is in no configuration. It is how a model's code cuts what the tensor computes. So the
module that holds the tensor decides, and each layout of `_LAYOUTS` is that of transformers' own code. Without
a layout that is known for certain, the tensor stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lazarus.names.parts import Take

_ALL = slice(None)
_MATRICES = ("mlp_gate", "mlp_up", "mlp_gate_up", "mlp_down")


@dataclass(frozen=True)
class Holder:
    """The modules around a tensor; None where the model has no such module."""

    owner: nn.Module | None
    """the module that has it as an attribute"""
    parent: nn.Module | None
    """the module that has the owner"""


@dataclass(frozen=True)
class FusedLayout:
    """The division of one axis: into equal groups, in each of which every part has so many rows."""

    n_groups: int
    sizes: tuple[tuple[str, int], ...]

    def fits(self, n: int) -> bool:
        """Return whether the parts are all of an axis of length n."""
        return self.n_groups * sum(size for _, size in self.sizes) == n

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes into which the one is reshaped."""
        width = sum(size for _, size in self.sizes)
        return (width,) if self.n_groups == 1 else (self.n_groups, width)

    def parts(self) -> list[tuple[str, tuple[int | slice, ...]]]:
        """Each part's name and its index into `dims`."""
        ends = list(accumulate(size for _, size in self.sizes))
        if self.n_groups == 1:
            return [(name, (slice(end - n, end),)) for (name, n), end in zip(self.sizes, ends, strict=True)]
        return [
            # An int takes an axis of length 1 away, so that the part is a matrix as any other.
            (name, (_ALL, end - 1 if n == 1 else slice(end - n, end)))
            for (name, n), end in zip(self.sizes, ends, strict=True)
        ]


def pieces(component: str, shape: tuple[int, ...], holder: Holder) -> list[tuple[str, Take]]:
    """The components in a tensor, and which part of it each is; empty where it is one component.

    `component` is the name of the whole, such as `attn_qkv.bias` or `experts.mlp_gate_up`.
    """
    name, suffix = (component[:-5], ".bias") if component.endswith(".bias") else (component, "")
    # The group is that of experts, if there is one: `experts.mlp_gate_up`.
    group, _, bare = name.rpartition(".")
    if (group and not group.startswith(("expert", "shared_expert"))) or not shape:
        return []  # a part of a quantised weight, whose elements are in another order
    n_experts = _n_experts(group, bare, shape, holder)
    if not n_experts:
        return [
            (f"{group}.{part}" if group else part, take) for part, take in _cut(bare, suffix, shape, holder)
        ]
    inner = (shape[0] // n_experts, *shape[1:]) if shape[0] > n_experts else shape[1:]
    cuts = _cut(bare, suffix, inner, holder) or [(bare + suffix, Take(inner, ()))]
    owner = (group or "expert").removesuffix("s")
    return [
        (f"{owner}_{expert}.{part}", Take((n_experts, *take.dims), (expert, *take.index)))
        for expert in range(n_experts)
        for part, take in cuts
    ]


def _cut(bare: str, suffix: str, shape: tuple[int, ...], holder: Holder) -> list[tuple[str, Take]]:
    """The components in one tensor of attention or of one MLP; empty where it is one component."""
    axis = 0 if suffix else _output_axis(bare, shape, holder)
    stem, layout = _layout(bare, shape[axis], holder)
    if layout is None:
        return []
    dims = (*shape[:axis], *layout.dims, *shape[axis + 1 :])
    return [(f"{stem}{part}{suffix}", Take(dims, (_ALL,) * axis + index)) for part, index in layout.parts()]


def _n_experts(group: str, bare: str, shape: tuple[int, ...], holder: Holder) -> int:
    """Return how many experts' tensors are in one; 0 where it is one tensor."""
    if group == "experts" and len(shape) == 2:
        width = getattr(holder.owner, "ffn_hidden_size", None)
        if width is None:
            return shape[0]  # biases
        return shape[0] // int(width) if shape[0] % width == 0 else 0  # DBRX: [experts · width, hidden]
    stacked = group in ("experts", "shared_expert") or bare in _MATRICES
    return shape[0] if stacked and len(shape) == 3 else 0


def _output_axis(bare: str, shape: tuple[int, ...], holder: Holder) -> int:
    """The output axis of a matrix: the first, unless its module multiplies from the left, x W."""
    if isinstance(holder.owner, Conv1D) and len(shape) == 2:
        return 1
    down = getattr(holder.owner, "down_proj", None)
    if bare == "mlp_gate_up" and isinstance(down, Tensor) and down.ndim == 3:
        return int(shape[-1] == 2 * down.shape[1])  # down is [experts, inner, hidden] there too
    return 0


def _layout(bare: str, n: int, holder: Holder) -> tuple[str, FusedLayout | None]:
    """Return what stands before the parts' names, and the layout of an axis of length n.

    None if it is one part.
    """
    if bare.endswith("mlp_gate_up"):
        layout: FusedLayout | None = _gate_and_up(n, holder)
        stem = bare.removesuffix("gate_up")
    elif bare == "ssm_beta_alpha":
        stem, layout = "ssm_", _gated_delta(holder, "ba")
    elif bare.endswith(("attn_qkv", "attn_qkvz", "attn_kv")):
        stem, _, fused = bare.rpartition("_")
        stem, layout = f"{stem}_", _attention(fused, n, holder)
    else:
        return bare, None
    return stem, layout if layout is not None and layout.fits(n) else None


def _gate_and_up(n: int, holder: Holder) -> FusedLayout:
    """Two halves, the gate (what goes through the activation) first; or gate and up in turns (gpt-oss)."""
    # transformers' decorator for classes of experts sets this; a module without it has two halves.
    if getattr(holder.owner, "is_concatenated", True):
        return FusedLayout(1, (("gate", n // 2), ("up", n // 2)))
    return FusedLayout(n // 2, (("gate", 1), ("up", 1)))


def _attention(fused: str, n: int, holder: Holder) -> FusedLayout | None:
    parent: Any = holder.parent
    if isinstance(holder.owner, Conv1D):
        names = "kv" if getattr(parent, "is_cross_attention", False) else "qkv"
        return _in_order(names, n // len(names))
    if hasattr(parent, "in_proj_qkv") or hasattr(parent, "in_proj_qkvz"):
        return _gated_delta(holder, fused)
    # By a base as well: custom code often derives from a class of transformers, and cuts as it does.
    kinds = (each for each in type(parent).__mro__ if each.__module__.startswith("transformers."))
    layouts = (_LAYOUTS.get(each.__name__) for each in kinds)
    layout = next((each for each in layouts if each is not None), None)
    return layout(parent, n) if layout is not None else None


def _in_order(names: str, size: int, n_groups: int = 1) -> FusedLayout:
    return FusedLayout(n_groups, tuple((name, size) for name in names))


def _thirds(_: Any, n: int) -> FusedLayout:
    """All of q, then all of k, then all of v."""
    return _in_order("qkv", n // 3)


def _by_head(module: Any, n: int) -> FusedLayout:
    """q, k and v of the first head, of the second head, …"""
    n_heads = _size(module, "num_heads", "num_attention_heads")
    return _in_order("qkv", n // (3 * n_heads), n_heads)


def _grouped_queries(module: Any, n: int) -> FusedLayout:
    """All of q, k and v in order, of which k and v have fewer heads."""
    width = _size(module, "num_key_value_heads") * _size(module, "head_dim")
    return FusedLayout(1, (("q", n - 2 * width), ("k", width), ("v", width)))


def _falcon(module: Any, n: int) -> FusedLayout:
    n_heads, width = _size(module, "num_heads"), _size(module, "head_dim")
    if module.new_decoder_architecture:
        n_groups = _size(module, "num_kv_heads")
        return FusedLayout(n_groups, (("q", n_heads // n_groups * width), ("k", width), ("v", width)))
    if module.multi_query:
        return FusedLayout(1, (("q", n_heads * width), ("k", width), ("v", width)))
    return _by_head(module, n)


def _gpt_bigcode(module: Any, n: int) -> FusedLayout:
    if not module.multi_query:
        return _by_head(module, n)
    width = _size(module, "kv_dim")
    return FusedLayout(1, (("q", n - 2 * width), ("k", width), ("v", width)))


def _codegen(module: Any, n: int) -> FusedLayout:
    """Return the parts of CodeGen's fused matrix as it was on four devices: q, v and k of each."""
    return _in_order("qvk", n // (3 * _size(module, "mp_num")), _size(module, "mp_num"))


def _keys_and_values(_: Any, n: int) -> FusedLayout:
    return _in_order("kv", n // 2)


_LAYOUTS: dict[str, Callable[[Any, int], FusedLayout]] = {
    "BloomAttention": _by_head,
    "CodeGenAttention": _codegen,
    "DbrxAttention": _grouped_queries,
    "DisentangledSelfAttention": _by_head,
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _gpt_bigcode,
    "GPTNeoXAttention": _by_head,
    "GPTNeoXJapaneseAttention": _by_head,
    "JetMoeAttention": _keys_and_values,
    "MiniMaxLightningAttention": _by_head,
    "ModernBertAttention": _thirds,
    "MptAttention": _thirds,
    "PersimmonAttention": _by_head,
    "Phi3Attention": _grouped_queries,
    "Phi4MultimodalAttention": _grouped_queries,
}
"""by the class of attention, as far as a tensor of q, k and v is cut by rows in transformers' code"""


def _gated_delta(holder: Holder, fused: str) -> FusedLayout | None:
    """Linear attention by the gated delta rule: in order (Qwen 3.5), or by group of values (Qwen 3 Next)."""
    module: Any = holder.parent
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    if not all(hasattr(module, name) for name in names):
        return None
    n_keys, n_values, key, value = (int(getattr(module, name)) for name in names)
    per_group = n_values // n_keys
    if fused == "qkv":
        return FusedLayout(1, (("q", n_keys * key), ("k", n_keys * key), ("v", n_values * value)))
    if fused == "ba":
        return FusedLayout(n_keys, (("beta", per_group), ("alpha", per_group)))
    return FusedLayout(
        n_keys, (("q", key), ("k", key), ("v", per_group * value), ("gate", per_group * value))
    )


def _size(module: Any, *names: str) -> int:
    """The first of these attributes that the module or its configuration has."""
    owners = (module, getattr(module, "config", None))
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return int(next(size for size in found if size is not None))
