"""A tensor's standard name from its path: the role of its leaf, by the roles of what it lies in.

The vocabulary is llama.cpp's for GGUF files, with `mlp_` for its `ffn_` and `attn_o` for its `attn_output`.
There is no list of families: a path is read as containers (attention, MLP, experts, router, state space, …)
and a leaf, and where a word means two things, the other tensors of the same block decide. No model is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lazarus.names.words import (
    ATTRIBUTES,
    EXPERT_ATTENTION,
    HEAD_LEAVES,
    IN_BLOCK,
    IN_HEAD,
    KINDS,
    LEAVES,
    OUTSIDE,
    PACKED,
    PREFIX,
    WRAPPERS,
    Table,
)


@dataclass(frozen=True)
class Block:
    """Facts on a block that decide the role of one of its tensors."""

    names: frozenset[str] = frozenset()
    """the paths of all its tensors from the block; empty where the model is not known"""
    pre_norm: bool = True
    """a norm whose name does not say where it stands is before its sublayer, not after it"""

    def has(self, pattern: str, inside: str = "") -> bool:
        """Return whether the path of a tensor of the block is `inside` and then something that matches."""
        return any(re.search(pattern, n[len(inside) :]) for n in self.names if n.startswith(inside))


@dataclass(frozen=True)
class _Owner:
    """The containers of a tensor: what they are, and which of several."""

    kind: str = ""
    group: str = ""
    """`experts`, `expert_N`, `shared_expert` or `shared_expert_N`"""
    number: str = ""
    """which of several attentions or MLPs of one block"""


def component_of(path: str, block: Block) -> str | None:
    """The standard name of the tensor at a path from its block, or None where no rule knows it.

    A fused tensor has the name of all that is in it: `attn_qkv`, `mlp_gate_up`, `experts.mlp_gate_up`.
    """
    stem, suffix = _without_attribute(path)
    # A block of Zamba holds the transformer that several of them share under this name.
    found = _at_block(re.sub(r"^shared_transf(ormer)?\.", "", stem), block) or _in_owner(
        stem.split("."), block
    )
    return found + suffix if found else None


def _without_attribute(path: str) -> tuple[str, str]:
    """`x.weight` → x and nothing; `x.bias`, `x_bias` → x and `.bias`; `x.weight_scale` → x and that."""
    owner, _, leaf = path.rpartition(".")
    if leaf == "weight":
        return owner, ""
    if owner and ATTRIBUTES.fullmatch(leaf):
        return owner, f".{leaf}"
    packed = PACKED.fullmatch(path)
    if packed:
        return packed[1], "" if packed[2] == "weight" else ".bias"
    return path, ""


def _at_block(stem: str, block: Block) -> str | None:
    numbered = re.fullmatch(r"(\w+)\.(\d+)", stem)
    if numbered and "norm" in numbered[1]:
        name = _at_block(numbered[1], block)
        return name and name.replace("_", f"_{numbered[2]}_", 1)
    if stem == "post_attention_layernorm":
        return "attn_post_norm" if _norms_what_attention_adds(block) else "mlp_norm"
    inside = re.fullmatch(r"((?:input|post_attention)_layernorm)\.(.+)", stem)
    if inside:
        name = _at_block(inside[1], block)
        return name if inside[2] == "norm" else f"{name}_{_tidy(inside[2])}"
    sublayer = re.fullmatch(r"layer\.(\d+)\.layer_norm", stem)
    if sublayer:
        return _placed(f"{_sublayer(sublayer[1], block)}_norm?", block)
    return _looked_up(IN_BLOCK, stem, "", block)


def _norms_what_attention_adds(block: Block) -> bool:
    """Return whether `post_attention_layernorm` norms the output of attention.

    It stands before the MLP, as in Llama, unless the MLP has other norms.
    """
    if block.has(r"^pre_(feedforward|mlp|ff)_layernorm\."):
        return True
    return block.has(r"^post_feedforward_layernorm\.") and not block.has(r"^input_layernorm\.")


def _sublayer(index: str, block: Block) -> str:
    """Return which sublayer T5's `layer.N` is: what else is in it says so."""
    inside = f"layer.{index}."
    if block.has(r"^EncDecAttention", inside):
        return "cross_attn"
    return "attn" if index == "0" or block.has(r"^SelfAttention", inside) else "mlp"


def _in_owner(tokens: list[str], block: Block) -> str | None:
    owner, depth = _Owner(), 0
    while depth < len(tokens):
        entered = _enter(owner, tokens, depth, block)
        if entered is None:
            break
        owner, depth = entered, depth + 1
    if not owner.kind:
        return None
    return _named(owner, ".".join(tokens[depth:]), block)


def _enter(owner: _Owner, tokens: list[str], depth: int, block: Block) -> _Owner | None:
    """Return the owner of a tensor with one container more; None where the next token is no container."""
    token, is_leaf = tokens[depth], depth == len(tokens) - 1
    inside = ".".join(tokens[: depth + 1]) + "."
    if owner.kind == "mlp" and _is_router(token, inside, block):
        return replace(owner, kind="router")
    if is_leaf:
        return None
    if token.isdigit():
        return _numbered(owner, token)
    if token in ("experts", "shared_expert", "shared_experts", "shared_mlp"):
        return _grouped(owner, token, block)
    if owner.kind == "mlp" and token in ("mlp", "ffn"):
        return owner
    if owner.kind in ("", "attn"):
        kind = _kind(token, inside, tokens[-1], block)
        return replace(owner, kind=kind) if kind else owner if WRAPPERS.fullmatch(token) else None
    return owner if WRAPPERS.fullmatch(token) else None


def _is_router(token: str, inside: str, block: Block) -> bool:
    """Return whether a container is a router: `gate` is none in a block that is known to have no experts."""
    if token == "router":
        return True
    return token == "gate" and (not block.names or block.has(r"experts?\b|input_linear"))


def _numbered(owner: _Owner, token: str) -> _Owner:
    if owner.group in ("experts", "shared_expert"):
        return replace(owner, group=f"{owner.group.removesuffix('s')}_{token}")
    return replace(owner, number=f"_{token}") if owner.kind else owner


def _grouped(owner: _Owner, token: str, block: Block) -> _Owner:
    kind = owner.kind or "mlp"
    if token == "shared_mlp" and not block.has(r"\bexperts\."):
        return replace(owner, kind=kind)  # with no experts beside it, it is the MLP
    return replace(owner, kind=kind, group="experts" if token == "experts" else "shared_expert")


def _kind(token: str, inside: str, leaf: str, block: Block) -> str | None:
    found = next((kind for pattern, kind in KINDS if re.fullmatch(pattern, token)), None)
    if found == "mixer":
        # Without a model, the tensor itself is all that is known of the mixer.
        return _mixer(token, inside, block if block.names else Block(frozenset({inside + leaf})))
    if found == "mlp" and block.has(r"^receptance\.", inside):
        return "channel_mix"
    return found.format(token) if found else None


def _mixer(token: str, inside: str, block: Block) -> str:
    """Return what mixes tokens in a block, or is there in its place, by what it is made of."""
    if block.has(r"^time_decay$", inside):
        return "time_mix"
    if block.has(r"^(rg_lru\.|linear_x\.)", inside):
        return "lru"
    if block.has(r"(^|\.)A_log$", inside):
        return "ssm" if block.has(r"^(D|x_proj|in_proj)\b", inside) else "linear_attn"
    if token == "mixer" and block.has(r"^(experts|up_proj|down_proj|gate)\b", inside):
        return "mlp"
    if token in ("mamba", "ssm") or (token == "mixer" and not block.has(r"^[qkvo]_proj", inside)):
        return "ssm"
    return "linear_attn" if token == "linear_attn" else "attn"


def _named(owner: _Owner, leaf: str, block: Block) -> str:
    prefix = "attn" if owner.kind == "linear_attn" else owner.kind
    prefix += owner.number
    table = LEAVES.get(owner.kind, ())
    if owner.group and owner.kind == "attn":
        table = EXPERT_ATTENTION
    name = _looked_up(table, leaf, prefix, block) or _own_name(prefix, leaf)
    return f"{owner.group}.{name}" if owner.group and not name.partition(".")[0].endswith("router") else name


def _own_name(prefix: str, leaf: str) -> str:
    """Return the name of what no table knows: its own after its owner's, without saying a word twice."""
    last = prefix.rpartition("_")[2]
    return f"{prefix}_{_tidy(leaf).removeprefix(last + '_')}"


def _looked_up(table: Table, leaf: str, prefix: str, block: Block) -> str | None:
    for pattern, template in table:
        match = re.fullmatch(pattern, leaf)
        if match:
            first, second, *_ = (*(_tidy(group or "") for group in match.groups()), "", "")
            first = "attn" if first == "attention" else first
            name = template.format(p=prefix, leaf=_tidy(leaf), rest=first, second=second)
            return _placed(name, block)
    return None


def _placed(name: str, block: Block) -> str:
    """`mlp_norm?` → mlp_norm, or mlp_post_norm in a model whose norms are after their sublayers."""
    if not name.endswith("_norm?"):
        return name
    return name.removesuffix("?") if block.pre_norm else name.removesuffix("norm?") + "post_norm"


def _tidy(leaf: str) -> str:
    """Return a leaf without words that say nothing: `q_a_layernorm` → q_a_norm, `in_proj` → in."""
    words = re.sub(r"_proj\b|_proj(?=_)", "", leaf).replace("layernorm", "norm")
    return re.sub(r"\W+", "_", words).strip("_").lower()


def outside(path: str) -> str | None:
    """Return the name of a tensor outside the blocks, by its path in the text stack; None without a rule."""
    stem, suffix = _without_attribute(path)
    if re.fullmatch(r"(.*\.)?embeddings\.(LayerNorm|norm)", stem):
        return "embed_norm" + suffix
    if re.fullmatch(PREFIX + r"(layer_norm|layernorm|ln|LayerNorm)", stem):
        return "final_norm" + suffix
    for pattern, name in OUTSIDE:
        match = re.fullmatch(f"{PREFIX}(?:{pattern})", stem)
        if match:
            first = next(iter(match.groups()), None) or ""
            return name.format(rest=first, n=match.groupdict().get("n")) + suffix
    return None


def head(path: str) -> str | None:
    """Return the name of a tensor of the LM head, from its path in the model; None without a rule."""
    stem, suffix = _without_attribute(path)
    if stem in ("lm_head", "lm_head.decoder"):
        return "lm_head" + suffix
    several = re.fullmatch(r"lm_heads\.(\d+)", stem)
    if several:
        return f"lm_head_{several[1]}{suffix}"
    match = IN_HEAD.fullmatch(stem)
    if match is None:
        return None
    name = "lm_head_norm" if "norm" in match["leaf"].lower() else HEAD_LEAVES.get(match["leaf"])
    return name and name + suffix


def own_name(path: str) -> str:
    """Return the path without `.weight`: the name of what no rule knows."""
    return path.removesuffix(".weight")
