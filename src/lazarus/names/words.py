"""The words by which transformers' models call their parts, and what each part is called here.

A table is pairs of a pattern for the whole word and a name, and the first match counts. In a name, {p} is
what the part lies in, {leaf} the word itself, {rest} and {second} the pattern's groups. A name that ends in
`norm?` is a norm of which the word does not say whether it stands before its sublayer or after it.
"""

from __future__ import annotations

import re

Table = tuple[tuple[str, str], ...]

# Containers, by their names alone. A mixer is known by what is in it.
KINDS: Table = (
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
WRAPPERS = re.compile(r"norm_attn_norm|shared_transf(ormer)?|mamba_decoder|layer|rg_lru|forget_gate|qkv_proj")

PACKED = re.compile(r"(.*(?:_proj|_gate|\b(?:gate|dense|q|v|dt)))_(weight|bias)")
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
EXPERT_ATTENTION: Table = (
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
# The digits are places in an nn.Sequential: 0 is the first Linear, 1 the activation, 2 the second Linear.
_MLP: Table = (
    (r"gate_proj|proj_up_gate|wi_0|w1|w_in\.w_0", "{p}_gate"),
    (
        r"up_proj|proj_up|c_fc|fc1|fc_in|dense_h_to_4h|lin1|layer_1|wi|wi_1|w3|v1|0|intermediate|dense\.dense|w_in\.w_1",
        "{p}_up",
    ),
    (
        r"down_proj|proj_down|c_proj|fc2|fc_out|dense_4h_to_h|lin2|layer_2|output_linear|wo|Wo|w2|2|output|output\.dense|w_out",
        "{p}_down",
    ),
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

LEAVES: dict[str, Table] = {
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
IN_BLOCK: Table = (
    (r"input_layernorm|operator_norm|temporal_pre_norm|norm_mlstm|norm_attn_norm\.norm_1", "attn_norm"),
    (
        r"(attn|attention)_(layer_?)?norm|norm_?1|ln_?1|ln_attn|layernorm_?1|self_attn_layer_norm|norm",
        "attn_norm?",
    ),
    (r"post_self_attn_layernorm|post_norm1|post_operator_norm|sa_layer_norm", "attn_post_norm"),
    (r"pre_(feedforward|mlp|ff)_layernorm|channel_pre_norm|norm_ffn|norm_attn_norm\.norm_2", "mlp_norm"),
    (
        r"(mlp|ffn|feedforward)_(layer)?norm|norm_?2|ln_?2|ln_mlp|layernorm_?2|ln|LayerNorm|feed_forward_layer_norm",
        "mlp_norm?",
    ),
    (r"final_layer_norm|output\.LayerNorm|intermediate\.LayerNorm", "mlp_norm?"),
    (r"post_(feedforward|mlp)_layernorm|post_norm2|post_ffn_norm|output_layer_norm", "mlp_post_norm"),
    (r"full_layer_layer_norm", "mlp_post_norm"),
    (r"encoder_attn_layer_norm|cross_attn_layer_norm", "cross_attn_norm?"),
    (r"mamba_decoder\.input_layernorm", "ssm_pre_norm"),
    # RWKV norms the embedding in its first block.
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

ATTRIBUTES = re.compile(
    r"bias|q(weight|zeros)|scales|g_idx|(weight|input)_(scale\w*|packed|shape|zero_point)|absmax"
)
"""what a module has beside its weight: a bias, or the parts of a quantised weight"""

PREFIX = r"(?:(?:encoder|decoder|embeddings|transformer|model|backbone)\.)*"
OUTSIDE: Table = (
    (r"word_embeddings?|embed_tokens|wte|tok_embeddings|tokens_embed|embed_in|token_embedding", "embed"),
    (r"position_embeddings?|embed_positions|wpe|positions_embed", "pos_embed"),
    (r"token_type_embeddings", "token_type_embed"),
    (r"word_embeddings_layernorm|layernorm_embedding|embed_tokens\.embed_norm|embed_norm", "embed_norm"),
    # LFM2 norms its last hidden state with a norm of this name.
    (r"norm|norm_f|ln_f|ln_out|out_norm|final_(layer_?)?norm|embedding_norm", "final_norm"),
    (r"lm_head|embed_out|output_projection|lm_head\.decoder", "lm_head"),
    (r"embed_tokens\.(\d+)", "embed_{rest}"),
    (r"relative_attention_bias", "rel_b"),
    (r"embedding_hidden_mapping_in", "embed_proj"),
    (r"embed_tokens_per_layer", "per_layer_embed"),
    (r"per_layer_model_projection", "per_layer_model_proj"),
    (r"per_layer_projection_norm", "per_layer_proj_norm"),
    (r"altup_(unembed_)?projections\.(?P<n>\d+)", "altup_{rest}proj_{n}"),
    (r"hc_head\.hc_(base|fn|scale)", "hc_head_{rest}"),
    (r"hyper_connection_mixer\.(hc_)?(?P<n>\w+)", "hc_head_{n}"),
)
IN_HEAD = re.compile(
    r"(?:(?:cls\.|generator_)?predictions|lm_head|head|vocab)[._](?:transform\.)?(?P<leaf>\w+)"
)
HEAD_LEAVES = {"dense": "lm_head_dense", "transform": "lm_head_dense", "logit_scale": "lm_head_scale"}
