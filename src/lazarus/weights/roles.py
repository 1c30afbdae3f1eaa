"""A tensor's standard name from its path: the role of its leaf, by the roles of what it lies in.

The vocabulary is llama.cpp's for GGUF files, with `mlp_` for its `ffn_` and `attn_o` for its `attn_output`. There is
no list of families: a path is read as containers (attention, MLP, experts, router, state space, …) and a leaf, and
where a word means two things, the other tensors of the same block decide. Nothing here needs a model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

Table = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Block:
    """What the rest of a block says about one of its tensors."""

    names: frozenset[str] = frozenset()
    """the paths of all its tensors from the block; empty where the model is not known"""
    pre_norm: bool = True
    """a norm whose name does not say where it stands is before its sublayer, not after it"""

    def has(self, pattern: str, inside: str = "") -> bool:
        """Whether a tensor of the block has a path that begins with `inside` and goes on with a match."""
        return any(re.search(pattern, n[len(inside) :]) for n in self.names if n.startswith(inside))


@dataclass(frozen=True)
class _Owner:
    """The containers of a tensor: what they are, and which of several."""

    kind: str = ""
    group: str = ""
    """`experts`, `expert_N`, `shared_expert` or `shared_expert_N`"""
    number: str = ""
    """which of several attentions or MLPs of one block"""


# Containers, by their names alone. A mixer is told by what is in it.
_KINDS: Table = (
    (r"encoder_attn|cross_?attn|cross_?attention|EncDecAttention", "cross_attn"),
    (r"(self_?)?(attn|att|attention)|SelfAttention|multi_head_attention|rel_attn|self|linear_attn", "mixer"),
    (r"mixer|temporal_block|mamba|ssm", "mixer"),
    (r"conv|short_conv", "shortconv"),
    (r"mlstm_layer", "mlstm"),
    (r"mlps?|feed_forward|ffn?|block_sparse_moe|moe|mlp_block|DenseReluDense", "mlp"),
    (r"(attn|self_attn|attention)_(hc|hyper_connection)", "attn_hc"),
    (r"(mlp|ffn)_(hc|hyper_connection)", "mlp_hc"),
    (r"altup|laurel|ple", "{}"),
)
_WRAPPERS = re.compile(r"norm_attn_norm|shared_transf(ormer)?|mamba_decoder|layer|rg_lru|forget_gate|qkv_proj")

_PACKED = re.compile(r"(.*(?:_proj|_gate|\b(?:gate|dense|q|v|dt)))_(weight|bias)")
"""a parameter that has no module of its own: `gate_up_proj_bias`, `dt_bias`"""
_CORRECTION = r"(.*\.)?(e_score_correction|expert)_bias"

_ATTENTION: Table = (
    (r"(q|query|Wq|project_q)(_proj|_lin|_attn)?(\.linear)?", "{p}_q"),
    (r"(k|key|Wk|project_k)(_proj|_lin)?(\.linear)?", "{p}_k"),
    (r"(v|value|Wv|project_v)(_proj|_lin)?(\.linear)?", "{p}_v"),
    (r"(o|out|c)(_proj|_lin)?(\.linear)?|Wo|dense|output(\.dense)?|attention_out", "{p}_o"),
    (r"qkv(_proj)?|Wqkv|W_pack|c_attn|query_key_value|in_proj(_qkv)?", "{p}_qkv"),
    (r"in_proj_qkvz", "{p}_qkvz"),
    (r"kv_a_proj_with_mqa", "{p}_kv_a"),
    (r"(q|query)_?(layer)?norm|q_proj\.norm\.scale", "{p}_q_norm"),
    (r"(k|key)_?(layer)?norm", "{p}_k_norm"),
    (r"(gate|g|output_gate|o_proj\.gate)(_proj)?|in_proj_z", "{p}_gate"),
    (r"(o_)?norm", "{p}_o_norm"),
    (r"attn_sub_norm", "{p}_sub_norm"),
    (r"indexer\.w(k|q_b)", "{p}_indexer_{rest}"),
    (r"relative_attention_bias", "{p}_rel_b"),
    (r"(output\.)?(LayerNorm|layer_norm|ln|self_attn_layer_norm|layernorm_before_attention)", "{p}_norm?"),
)
_EXPERT_ATTENTION: Table = (
    (r"input_linear", "{p}_q"),
    (r"output_linear", "{p}_o"),
    (r"router(\.layer)?", "{p}_router"),
)
_STATE_SPACE: Table = ((r"A_log", "ssm_a"), (r"D", "ssm_d"), (r"conv_?1d", "ssm_conv1d"))
# The recurrence of linear attention is named as a state space, the rest as an attention.
_LINEAR_ATTENTION: Table = (
    *_STATE_SPACE,
    (r"(in_proj_)?b(_proj)?", "ssm_beta"),
    (r"(in_proj_)?a(_proj)?", "ssm_alpha"),
    (r"in_proj_ba", "ssm_beta_alpha"),
    (r"dt", "ssm_dt"),
    (r"(o_)?norm", "ssm_norm"),
    (r"(f|f_a|f_b|g_a|g_b)_proj", "ssm_{leaf}"),
)
_MLP: Table = (
    (r"gate_proj|proj_up_gate|wi_0|w1|w_in\.w_0", "{p}_gate"),
    (r"up_proj|proj_up|c_fc|fc1|fc_in|dense_h_to_4h|lin1|layer_1|wi|wi_1|w3|v1|0|intermediate|dense\.dense|w_in\.w_1", "{p}_up"),
    (r"down_proj|proj_down|c_proj|fc2|fc_out|dense_4h_to_h|lin2|layer_2|output_linear|wo|Wo|w2|2|output|output\.dense|w_out", "{p}_down"),
    (r"gate_up_proj|input_linear|Wi", "{p}_gate_up"),
    (r"shared_expert_gate", "shared_expert_gate"),
    (r"ffn_sub_norm", "{p}_sub_norm"),
    (r"post_mlp_layernorm", "{p}_post_norm"),
    (r"LayerNorm|layer_norm|ln|layernorm_before_ffn", "{p}_norm?"),
    (_CORRECTION, "router.correction_bias"),
)
_ROUTER: Table = (
    (r"|wg|classifier|layer|gate", "router"),
    (_CORRECTION, "router.correction_bias"),
)
_TIME_MIX: Table = ((r"time_(decay|first)", "{p}_{rest}"), (r"time_mix_(k|v|r)\w+", "{p}_lerp_{rest}"))
_LRU: Table = (
    (r"linear_(x|y|out)", "{p}_{rest}"),
    (r"conv_1d", "{p}_conv1d"),
    (r"recurrent_param", "{p}_recurrent"),
)
_GATED_LSTM: Table = ((r"([ifo]gate)_preact", "{p}_{rest}"), (r"multihead_norm", "{p}_norm"))
_SHORT_CONVOLUTION: Table = ((r"conv", "{p}_conv1d"),)
_LAUREL: Table = ((r"linear_(left|right)", "{p}_{rest}"), (r"post_laurel_norm", "{p}_post_norm"))

_LEAVES: dict[str, Table] = {
    "attn": _ATTENTION,
    "cross_attn": _ATTENTION,
    "linear_attn": (*_LINEAR_ATTENTION, *_ATTENTION),
    "ssm": _STATE_SPACE,
    "mlp": _MLP,
    "router": _ROUTER,
    "time_mix": _TIME_MIX,
    "channel_mix": _TIME_MIX,
    "lru": _LRU,
    "mlstm": _GATED_LSTM,
    "shortconv": _SHORT_CONVOLUTION,
    "laurel": _LAUREL,
}

# Tensors and norms that lie directly in the block. A question mark: before or after, as the model has it.
_BLOCK: Table = (
    (r"input_layernorm|operator_norm|temporal_pre_norm|norm_mlstm|norm_attn_norm\.norm_1", "attn_norm"),
    (r"(attn|attention)_(layer_?)?norm|norm_?1|ln_?1|ln_attn|layernorm_?1|self_attn_layer_norm|norm", "attn_norm?"),
    (r"post_self_attn_layernorm|post_norm1|post_operator_norm|sa_layer_norm", "attn_post_norm"),
    (r"pre_(feedforward|mlp|ff)_layernorm|channel_pre_norm|norm_ffn|norm_attn_norm\.norm_2", "mlp_norm"),
    (r"(mlp|ffn|feedforward)_(layer)?norm|norm_?2|ln_?2|ln_mlp|layernorm_?2|ln|LayerNorm|feed_forward_layer_norm", "mlp_norm?"),
    (r"final_layer_norm|output\.LayerNorm|intermediate\.LayerNorm", "mlp_norm?"),
    (r"post_(feedforward|mlp)_layernorm|post_norm2|post_ffn_norm|output_layer_norm", "mlp_post_norm"),
    (r"full_layer_layer_norm", "mlp_post_norm"),
    (r"encoder_attn_layer_norm|cross_attn_layer_norm", "cross_attn_norm?"),
    (r"mamba_decoder\.input_layernorm", "ssm_pre_norm"),
    (r"pre_ln", "embed_norm"),
    (r"intermediate\.dense|fc1|ffn", "mlp_up"),
    (r"output\.dense|fc2|ffn_output", "mlp_down"),
    (r"per_layer_input_gate", "per_layer_inp_gate"),
    (r"per_layer_projection", "per_layer_proj"),
    (r"post_per_layer_input_norm", "per_layer_post_norm"),
    (r"layer_scalar", "layer_scalar"),
    (r"(q|k|v)_input_layernorm", "attn_{rest}_input_norm"),
    (r"(attn|mlp)_sconv\.conv1d", "{rest}_conv1d"),
    (r"post_(attention|mlp)_convolution\.conv1d", "{rest}_conv1d"),
    (r"post_(attention|mlp)_residual_scale\.(\w+)", "{rest}_residual_{second}"),
    (r"(attention|mlp)_input\.query", "{rest}_input_query"),
    (r"input_residual", "attn_residual"),
    (r"post_attention_residual", "mlp_residual"),
    (r"(q|k|v)_message_gate\.(\w+?)(_proj)?", "attn_{rest}_message_gate_{second}"),
    (r"(mlp)_message_gate\.(\w+?)(_proj)?", "{rest}_message_gate_{second}"),
)

def component_of(path: str, block: Block) -> str | None:
    """The standard name of the tensor at a path from its block, or None where no rule knows it.

    A fused tensor has the name of all that is in it: `attn_qkv`, `mlp_gate_up`, `experts.mlp_gate_up`.
    """
    stem, suffix = _without_attribute(path)
    found = _at_block(re.sub(r"^shared_transf(ormer)?\.", "", stem), block) or _in_owner(stem.split("."), block)
    return found + suffix if found else None


def _without_attribute(path: str) -> tuple[str, str]:
    """`x.weight` → x and nothing; `x.bias`, `x_bias` → x and `.bias`; `x.weight_scale` → x and that."""
    owner, _, leaf = path.rpartition(".")
    if leaf == "weight":
        return owner, ""
    if leaf in _ATTRIBUTES and owner:
        return owner, f".{leaf}"
    packed = _PACKED.fullmatch(path)
    if packed:
        return packed[1], "" if packed[2] == "weight" else ".bias"
    return path, ""


_ATTRIBUTES = frozenset(
    "bias qweight qzeros scales g_idx weight_scale weight_scale_inv weight_scale_2 input_scale "
    "weight_packed weight_shape weight_zero_point absmax quant_map".split()
)
"""what a module has beside its weight: a bias, or the parts of a quantised weight"""


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
    return _looked_up(_BLOCK, stem, "", block)


def _norms_what_attention_adds(block: Block) -> bool:
    """Llama's `post_attention_layernorm` is before the MLP; where another norm is, it is after the attention."""
    if block.has(r"^pre_(feedforward|mlp|ff)_layernorm\."):
        return True
    return block.has(r"^post_feedforward_layernorm\.") and not block.has(r"^input_layernorm\.")


def _sublayer(index: str, block: Block) -> str:
    """Which sublayer T5's `layer.N` is: what else is in it says so."""
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
    """What a tensor lies in once a container more is known; None where that token is no container."""
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
        return replace(owner, kind=kind) if kind else owner if _WRAPPERS.fullmatch(token) else None
    return owner if _WRAPPERS.fullmatch(token) else None


def _is_router(token: str, inside: str, block: Block) -> bool:
    """`gate` is a router where there are experts, and the gate of an MLP where the block is known to have none."""
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
    found = next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, token)), None)
    if found == "mixer":
        return _mixer(token, inside, block if block.names else Block(frozenset({inside + leaf})))
    if found == "mlp" and block.has(r"^receptance\.", inside):
        return "channel_mix"
    return found.format(token) if found else None


def _mixer(token: str, inside: str, block: Block) -> str:
    """What mixes tokens in a block, or is there in its place, by what it is made of."""
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
    table = _LEAVES.get(owner.kind, ())
    if owner.group and owner.kind == "attn":
        table = _EXPERT_ATTENTION
    name = _looked_up(table, leaf, prefix, block) or _own_name(prefix, leaf)
    return f"{owner.group}.{name}" if owner.group and owner.kind != "router" else name


def _own_name(prefix: str, leaf: str) -> str:
    """What no table knows has its own name behind its owner's, without a word said twice."""
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
    """A leaf's own words, without those that say nothing: `q_a_layernorm` → q_a_norm, `in_proj` → in."""
    words = re.sub(r"_proj\b|_proj(?=_)", "", leaf).replace("layernorm", "norm")
    return re.sub(r"\W+", "_", words).strip("_").lower()


_PREFIX = r"(?:(?:encoder|decoder|embeddings|transformer|model|backbone)\.)*"
_OUTSIDE: Table = (
    (r"word_embeddings?|embed_tokens|wte|tok_embeddings|tokens_embed|embed_in|token_embedding", "embed"),
    (r"position_embeddings?|embed_positions|wpe|positions_embed", "pos_embed"),
    (r"token_type_embeddings", "token_type_embed"),
    (r"word_embeddings_layernorm|layernorm_embedding|embed_tokens\.embed_norm|embed_norm", "embed_norm"),
    # LFM2 norms its last state with a norm of this name.
    (r"norm|norm_f|ln_f|ln_out|out_norm|final_(layer_?)?norm|embedding_norm", "final_norm"),
    (r"lm_head|embed_out|output_projection|lm_head\.decoder", "lm_head"),
    (r"relative_attention_bias", "rel_b"),
    (r"embedding_hidden_mapping_in", "embed_proj"),
)


def outside(path: str) -> str | None:
    """The standard name of a tensor that is in no block, from its path in the text stack; None without a rule."""
    stem, suffix = _without_attribute(path)
    if re.fullmatch(r"(.*\.)?embeddings\.(LayerNorm|norm)", stem):
        return "embed_norm" + suffix
    if re.fullmatch(_PREFIX + r"(layer_norm|layernorm|ln|LayerNorm)", stem):
        return "final_norm" + suffix
    for pattern, name in _OUTSIDE:
        if re.fullmatch(f"{_PREFIX}({pattern})", stem):
            return name + suffix
    return None


def own_name(path: str) -> str:
    """What no rule knows keeps its path, without `.weight`."""
    return path.removesuffix(".weight")
