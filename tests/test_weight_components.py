"""The standard names of all architectures' tensors, and how fused tensors are cut.

Names are held against a table that was written by hand, cuts and norms against what the models do: a part
that is named `attn_v` is the values if nothing enters the output projection without it. `docs/components.md`
is written from what is found here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, MULTIMODAL, UNBUILDABLE, build
from lazarus.errors import BlocksNotFoundError
from lazarus.models import Anatomy, dissect
from lazarus.names.components import Namer, Part, Place, name_by_path
from lazarus.names.fused import FusedLayout

ALL = tuple(n for n in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL) if n not in UNBUILDABLE)
WITHOUT_BLOCKS = ("blt", "xlm")
IDS = torch.tensor([[11, 45, 7, 93, 30, 62]])

_LLAMA = "attn_q attn_k attn_v attn_o mlp_gate mlp_up mlp_down attn_norm mlp_norm"
_GEMMA = "attn_norm attn_post_norm mlp_norm mlp_post_norm"
_QK = "attn_q attn_k attn_v attn_o attn_q_norm attn_k_norm"
_BIASED = "attn_q+ attn_k+ attn_v+"
_MOE = "router expert_N.mlp_gate expert_N.mlp_up expert_N.mlp_down"
_SHARED = "shared_expert.mlp_gate shared_expert.mlp_up shared_expert.mlp_down"
_GPT2 = f"attn_norm+ {_BIASED} attn_o+ mlp_norm+ mlp_up+ mlp_down+"
_POST = f"{_BIASED} attn_o+ attn_post_norm+ mlp_up+ mlp_down+ mlp_post_norm+"
_MAMBA = "attn_norm ssm_a ssm_d ssm_conv1d+ ssm_in ssm_x ssm_dt+ ssm_out"
_LATENT = "attn_q_a attn_q_a_norm attn_q_b attn_kv_a attn_kv_a_norm attn_kv_b attn_o attn_norm mlp_norm"
_LRU = "lru_x+ lru_y+ lru_conv1d+ lru_out+ lru_input_gate+ lru_recurrent_gate+ lru_recurrent"
_RWKV = (
    "attn_norm+ mlp_norm+ time_mix_decay time_mix_first time_mix_lerp_k time_mix_lerp_v time_mix_lerp_r "
    "time_mix_key time_mix_value time_mix_receptance time_mix_output channel_mix_lerp_k channel_mix_lerp_r "
    "channel_mix_key channel_mix_value channel_mix_receptance"
)

# The names of one block, and those outside. `x+` is a weight and its bias; all experts are called N.
EXPECTED: dict[str, tuple[int, str, str]] = {
    "bart:seq2seq": (0, _POST, "embed pos_embed embed_norm+"),
    "bert:masked": (
        1,
        _POST,
        "embed pos_embed token_type_embed embed_norm+ lm_head.bias lm_head_dense+ lm_head_norm+",
    ),
    "bloom": (0, _GPT2, "embed embed_norm+ final_norm+"),
    "codegen": (
        0,
        "attn_norm+ attn_q attn_k attn_v attn_o mlp_up+ mlp_down+",
        "embed final_norm+ lm_head+",
    ),
    "dbrx": (0, f"attn_q attn_k attn_v attn_o attn_norm mlp_norm {_MOE}", "embed final_norm lm_head"),
    "deepseek_v3": (1, f"{_LATENT} {_MOE} router.correction_bias {_SHARED}", "embed final_norm lm_head"),
    "falcon": (0, "attn_q attn_k attn_v attn_o mlp_up mlp_down attn_norm+", "embed final_norm+"),
    "gemma2": (0, f"attn_q attn_k attn_v attn_o mlp_gate mlp_up mlp_down {_GEMMA}", "embed final_norm"),
    "gemma3": (0, f"{_QK} mlp_gate mlp_up mlp_down {_GEMMA}", "embed final_norm"),
    "glm4": (0, f"{_BIASED} attn_o mlp_gate mlp_up mlp_down {_GEMMA}", "embed final_norm lm_head"),
    "gpt2": (1, _GPT2, "embed pos_embed final_norm+"),
    "gpt_neox": (0, _GPT2, "embed final_norm+ lm_head"),
    "gpt_oss": (
        0,
        f"{_BIASED} attn_o+ attn_sinks attn_norm mlp_norm router+ expert_N.mlp_gate+ expert_N.mlp_up+ "
        "expert_N.mlp_down+",
        "embed final_norm lm_head",
    ),
    "gptj": (
        0,
        "attn_norm+ attn_q attn_k attn_v attn_o mlp_up+ mlp_down+",
        "embed final_norm+ lm_head+",
    ),
    "granitemoe": (0, f"attn_q attn_k attn_v attn_o attn_norm mlp_norm {_MOE}", "embed final_norm lm_head"),
    "jamba": (
        0,
        f"{_MAMBA} ssm_dt_norm ssm_b_norm ssm_c_norm mlp_gate mlp_up mlp_down mlp_norm",
        "embed final_norm lm_head",
    ),
    "jetmoe": (
        0,
        f"expert_N.attn_q expert_N.attn_o attn_k attn_v attn_router attn_experts.bias {_MOE} mlp.bias "
        "attn_norm mlp_norm",
        "embed final_norm",
    ),
    "lfm2": (
        0,
        "shortconv_in shortconv_conv1d shortconv_out mlp_gate mlp_up mlp_down attn_norm mlp_norm",
        "embed final_norm",
    ),
    "llama": (1, _LLAMA, "embed final_norm lm_head"),
    "llama4_text": (
        1,
        f"attn_q attn_k attn_v attn_o {_MOE} {_SHARED} attn_norm mlp_norm",
        "embed final_norm lm_head",
    ),
    "longcat_flash": (
        0,
        " ".join(re.sub(r"(attn|mlp)_", rf"\1_{i}_", f"{_LATENT} mlp_gate mlp_up mlp_down") for i in range(2))
        + f" {_MOE} router.correction_bias",
        "embed final_norm lm_head",
    ),
    "mamba": (0, _MAMBA, "embed final_norm"),
    "mamba2": (
        0,
        "attn_norm ssm_in ssm_conv1d+ ssm_dt.bias ssm_a ssm_d ssm_norm ssm_out",
        "embed final_norm lm_head",
    ),
    "mbart:seq2seq": (0, _GPT2, "embed pos_embed embed_norm+ final_norm+"),
    "mixtral": (0, f"attn_q attn_k attn_v attn_o attn_norm mlp_norm {_MOE}", "embed final_norm lm_head"),
    "modernbert:masked": (
        1,
        _LLAMA,
        "embed embed_norm final_norm lm_head_dense lm_head_norm lm_head.bias",
    ),
    "olmo2": (0, f"{_QK} mlp_gate mlp_up mlp_down attn_post_norm mlp_post_norm", "embed final_norm lm_head"),
    "openai-gpt": (0, _POST, "embed pos_embed"),
    "opt": (0, _GPT2, "embed pos_embed final_norm+"),
    "phi3": (0, _LLAMA, "embed final_norm lm_head"),
    "qwen2_moe": (
        1,
        f"{_BIASED} attn_o attn_norm mlp_norm {_MOE} {_SHARED} shared_expert_gate",
        "embed final_norm lm_head",
    ),
    "qwen3": (0, f"{_QK} mlp_gate mlp_up mlp_down attn_norm mlp_norm", "embed final_norm lm_head"),
    "qwen3_next": (
        0,
        f"attn_q attn_k attn_v attn_gate attn_o ssm_beta ssm_alpha ssm_conv1d ssm_dt.bias ssm_a ssm_norm "
        f"attn_norm mlp_norm {_MOE} {_SHARED} shared_expert_gate",
        "embed final_norm lm_head",
    ),
    "recurrent_gemma": (0, f"{_LRU} attn_norm mlp_norm mlp_gate+ mlp_up+ mlp_down+", "embed final_norm"),
    "rwkv": (1, _RWKV, "embed final_norm+ lm_head"),
    "t5:seq2seq": (
        0,
        "attn_q attn_k attn_v attn_o attn_rel_b attn_norm mlp_up mlp_down mlp_norm",
        "embed final_norm",
    ),
}


class Named:
    """An architecture, empty, and what its tensors are called. One of several names of a tensor counts."""

    def __init__(self, name: str) -> None:
        with torch.device("meta"):
            model = build(name)
        self.anatomy = _anatomy(model)
        self.namer = Namer(model, self.anatomy)
        state = model.state_dict(keep_vars=True)
        first = {id(tensor): path for path, tensor in reversed(state.items())}
        self.shapes = {path: tuple(state[path].shape) for path in state if first[id(state[path])] == path}
        self.parts = {path: self.namer.parts(path, shape) for path, shape in self.shapes.items()}
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        table, head = (getattr(end, "weight", None) for end in ends)
        self.tied = head is None or head is table
        paths = {id(module): path for path, module in model.named_modules()}
        self.stack = paths[id(self.anatomy.stack)] if self.anatomy else ""

    @property
    def places(self) -> list[Place]:
        return [part.place for parts in self.parts.values() for part in parts]

    def components(self, layer: int | None) -> set[str]:
        return {place.component for place in self.places if place.layer == layer}

    def text(self) -> list[str]:
        """The tensors of the text stack and its head: no other towers, no decoder behind an encoder."""
        other = r"vision|visual|image|audio|multi_modal|embed_tokens_extend"
        other += r"|^(model\.)?decoder\." if self.stack.endswith("encoder") else ""
        return [path for path in self.shapes if not re.search(other, path)]

    def unknown(self) -> list[str]:
        """Those that keep their paths."""
        return [path for path in self.text() if not self.namer.is_named(path)]


@cache
def named(name: str) -> Named:
    return Named(name)


def _anatomy(model: PreTrainedModel) -> Anatomy | None:
    try:
        return dissect(model)
    except BlocksNotFoundError:
        return None


def _spelled(names: str) -> set[str]:
    words = names.split()
    return {word.rstrip("+") for word in words} | {f"{w[:-1]}.bias" for w in words if w.endswith("+")}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_are_those_of_the_table(name: str) -> None:
    layer, inside, outside = EXPECTED[name]
    found = {re.sub(r"^expert_\d+", "expert_N", c) for c in named(name).components(layer)}
    assert found == _spelled(inside)
    own = {c for c in named(name).components(None) if not re.match(r"model\.|decoder\.|final_logits_bias", c)}
    assert own == _spelled(outside)


@pytest.mark.parametrize("name", ALL)
def test_no_two_tensors_have_one_place(name: str) -> None:
    assert [place for place, count in Counter(named(name).places).items() if count > 1] == []


@pytest.mark.parametrize("name", ALL)
def test_the_parts_of_a_tensor_are_each_of_its_numbers_once(name: str) -> None:
    for path, parts in named(name).parts.items():
        numbers = torch.arange(torch.Size(named(name).shapes[path]).numel())
        found = torch.cat([_taken(numbers, part).flatten() for part in parts])
        assert torch.equal(found.sort().values, numbers), path


def _taken(numbers: Tensor, part: Part) -> Tensor:
    return numbers if part.take is None else numbers.reshape(part.take.dims)[part.take.index]


@pytest.mark.parametrize("name", [name for name in CAUSAL if name in ALL and name not in WITHOUT_BLOCKS])
def test_a_causal_model_has_what_every_one_has(name: str) -> None:
    outside = named(name).components(None)
    ends = {"embed", "embed_0"} | ({"lm_head"} if named(name).tied else set())
    assert outside & ends
    assert named(name).tied or "lm_head" in outside
    for layer in {place.layer for place in named(name).places} - {None}:
        ends = {component.rpartition(".")[2] for component in named(name).components(layer)}
        if ends & {"attn_q", "attn_q_b", "attn_query_key", "attn_v", "attn_qkv"}:
            assert ends & {"attn_q", "attn_q_b", "attn_query_key"}
            keys = {"attn_k", "attn_kv_b", "attn_kv", "attn_query_key"}
            assert ends & keys or _shares_keys(name, layer)
            assert ends & {"attn_o", "attn_o_b"}
        if "mlp_up" in ends:
            assert "mlp_down" in ends


def _shares_keys(name: str, layer: int | None) -> bool:
    """Gemma 3n and 4: the last layers use the keys and values of earlier ones."""
    return name.startswith(("gemma3n", "gemma4")) and layer is not None and layer >= 2


def test_rules_know_nearly_all_tensors() -> None:
    n_unknown = sum(len(named(name).unknown()) for name in ALL if name not in WITHOUT_BLOCKS)
    n_tensors = sum(len(named(name).text()) for name in ALL if name not in WITHOUT_BLOCKS)
    assert n_unknown <= 0.01 * n_tensors


def test_the_page_of_components_is_what_was_found(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/components.md", page())


# What the models do with the parts.


class Run:
    """A tiny real model whose parts can be changed, and what its modules read and give."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.anatomy = dissect(model)
        self.namer = Namer(model, self.anatomy)
        self.state = model.state_dict(keep_vars=True)
        self.places: dict[Place, list[tuple[str, Part]]] = defaultdict(list)
        for path, tensor in self.state.items():
            for part in self.namer.parts(path, tuple(tensor.shape)):
                self.places[part.place].append((path, part))

    @contextmanager
    def changed(
        self, pattern: str, change: Callable[[Tensor], Tensor], layer: int | None = None
    ) -> Iterator[None]:
        """All parts of a name, in one layer or in all of them, changed for a while."""
        before = {path: tensor.detach().clone() for path, tensor in self.state.items()}
        chosen = [
            found
            for place, found in self.places.items()
            if re.fullmatch(pattern, place.component) and layer in (None, place.layer)
        ]
        assert chosen, pattern
        with torch.no_grad():
            for path, part in (each for found in chosen for each in found[:1]):
                numbers = _taken(self.state[path].data, part)
                numbers.copy_(change(numbers.clone()))
            yield
            for path, tensor in self.state.items():
                tensor.copy_(before[path])

    def seen(self, module: nn.Module, *, given: bool = False) -> Tensor:
        """The first tensor that a module reads in a run, or that it gives."""
        found: list[Tensor] = []

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            what = output if given else (args[0] if args else next(iter(kwargs.values())))
            found.append((what[0] if isinstance(what, tuple) else what).detach().clone())

        handle = module.register_forward_hook(hook, with_kwargs=True)
        with torch.no_grad():
            run_on(self.model, IDS)
        handle.remove()
        return found[0]

    def owner(self, component: str, layer: int = 0) -> nn.Module:
        path = self.places[Place(layer, component)][0][0]
        found: nn.Module = self.model.get_submodule(path.rpartition(".")[0])
        return found


def run_on(model: PreTrainedModel, ids: Tensor) -> Any:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **extra)


def _falcon(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.2, bias=True, **changes)).eval()


def _bigcode() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=128, n_embd=32, n_layer=1, n_head=4, multi_query=False, initializer_range=0.2
    )
    return GPTBigCodeForCausalLM(config).eval()


BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon by head": lambda: _falcon(multi_query=False, new_decoder_architecture=False),
    "falcon by group": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "gpt_bigcode by head": _bigcode,
}
FUSED_ATTENTION = (
    *("bloom", "codegen", "dbrx", "deberta:masked", "falcon", "fuyu", "gpt2", "gpt_bigcode", "gpt_neox"),
    *("gpt_neox_japanese", "minimax", "modernbert:masked", "mpt", "openai-gpt", "persimmon", "phi3"),
    *("phi4_multimodal", "qwen3_5", "qwen3_next", *BUILT),
)
LINEAR = ("minimax", "qwen3_5", "qwen3_next")


@cache
def run(name: str) -> Run:
    return Run(BUILT[name]() if name in BUILT else build(name))


def _fused_layer(name: str) -> int:
    """The first layer that has a fused attention."""
    paths = run(name).places
    return next(
        place.layer
        for place, found in paths.items()
        if place.component == "attn_k" and place.layer is not None and found[0][1].take is not None
    )


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_without_the_values_nothing_enters_the_output_projection(name: str) -> None:
    output = run(name).owner("attn_o", _fused_layer(name))
    assert run(name).seen(output).abs().max() > 1e-3
    with run(name).changed(r"attn_v(\.bias)?", torch.zeros_like):
        assert run(name).seen(output).abs().max() <= 1e-6
    with run(name).changed(r"attn_k(\.bias)?", torch.zeros_like):
        if name not in LINEAR:  # which gives nothing without keys
            assert run(name).seen(output).abs().max() > 1e-3


def _in_double(name: str) -> Run:
    """Where queries are normed, what is nearly nothing is scaled up."""
    model = build(name)
    model.config._experts_implementation = "eager"
    return Run(model.double())


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_a_token_without_queries_does_not_ask_for_keys(name: str) -> None:
    """Keys that were called queries would not do: the keys of the first tokens are still there."""
    # Linear attention has a convolution over four tokens.
    tiny = _in_double(name) if name in (*LINEAR, "fuyu", "persimmon") else run(name)
    layer = _fused_layer(name)
    asking, output = tiny.owner("attn_q", layer), tiny.owner("attn_o", layer)
    basis = torch.linalg.qr(tiny.seen(asking)[0, -4:].T).Q
    is_transposed = isinstance(asking, Conv1D)

    def orthogonal(numbers: Tensor) -> Tensor:
        is_bias = numbers.ndim == 1 or numbers.shape[0 if is_transposed else -1] != len(basis)
        if is_bias:
            return torch.zeros_like(numbers)
        return numbers.sub(basis @ (basis.T @ numbers) if is_transposed else (numbers @ basis) @ basis.T)

    before = tiny.seen(output)[0, -1]
    with tiny.changed(r"attn_k(\.bias)?", torch.neg, layer):
        assert not torch.allclose(tiny.seen(output)[0, -1], before, atol=1e-4)
    with tiny.changed(r"attn_q(\.bias)?|attn_q_norm\.bias", orthogonal, layer):
        without = tiny.seen(output)[0, -1]
        with tiny.changed(r"attn_k(\.bias)?", torch.neg, layer):
            torch.testing.assert_close(tiny.seen(output)[0, -1], without, atol=1e-5, rtol=1e-4)


def test_what_qwen3_next_fuses_is_cut_as_its_own_code_cuts_it() -> None:
    tiny = run("qwen3_next")
    module: Any = tiny.model.get_submodule("model.layers.0.linear_attn")
    numbers = [torch.arange(size, dtype=torch.float32) for size in (96, 8)]
    expected = module.fix_query_key_value_ordering(*(each[None, None] for each in numbers))
    names = ("attn_q", "attn_k", "attn_v", "attn_gate", "ssm_beta", "ssm_alpha")
    for name, rows in zip(names, expected, strict=True):
        [(path, part)] = tiny.places[Place(0, name)]
        whole = numbers["in_proj_ba" in path][:, None].expand(-1, 32)
        assert torch.equal(_taken(whole, part)[..., 0].flatten(), rows.flatten()), name


def test_jetmoe_keys_and_values() -> None:
    jetmoe = run("jetmoe")
    attention = jetmoe.model.get_submodule("model.layers.0.self_attention")
    bias = jetmoe.owner("attn_experts.bias").get_parameter("bias")
    with jetmoe.changed("attn_v", torch.zeros_like):
        torch.testing.assert_close(jetmoe.seen(attention, given=True), bias.expand(1, IDS.shape[1], -1))
    with jetmoe.changed("attn_k", torch.zeros_like):
        assert not torch.allclose(jetmoe.seen(attention, given=True), bias.expand(1, IDS.shape[1], -1))


GATED = (
    *("aria_text", "dbrx", "glm4", "granitemoe", "granitemoeshared", "llama4_text", "mixtral"),
    *("modernbert:masked", "phi3", "phi4_multimodal", "qwen2_moe", "qwen3_next"),
)
_UP, _GATE = r"(.*\.)?mlp_up(\.bias)?", r"(.*\.)?mlp_gate(\.bias)?"


def _gated(name: str) -> tuple[nn.Module, bool, int]:
    """What reads the gated numbers of a fused MLP, or the experts that give what becomes of them; its layer.

    True for the experts, of which only what they give can be seen.
    """
    for place, found in run(name).places.items():
        path, part = found[0]
        if (
            re.fullmatch(r"(expert_\d+\.|shared_expert\.)?mlp_gate", place.component)
            and part.take is not None
        ):
            owner, down = path.rpartition(".")[0], place.component.replace("gate", "down")
            if place.component.startswith("expert"):
                layer = place.layer or 0
                return run(name).model.get_submodule(owner.removesuffix(".mlp")), True, layer
            return run(name).owner(down, place.layer or 0), False, place.layer or 0
    raise AssertionError(f"{name} has no fused MLP")


@pytest.mark.parametrize("name", GATED)
def test_what_is_gated_is_linear_in_up_and_not_in_gate(name: str) -> None:
    module, given, layer = _gated(name)
    before = run(name).seen(module, given=given)
    assert before.abs().max() > 1e-4
    with run(name).changed(_UP, torch.neg, layer):
        torch.testing.assert_close(run(name).seen(module, given=given), -before)
    with run(name).changed(_GATE, torch.neg, layer):
        assert not torch.allclose(run(name).seen(module, given=given), -before, atol=1e-4)
    with run(name).changed(_UP, torch.zeros_like, layer):
        assert run(name).seen(module, given=given).abs().max() == 0


@pytest.mark.parametrize("name", ["gpt_oss", "minimax_m3_vl_text"])
def test_gates_whose_up_has_one_added_are_nothing_without_their_gate(name: str) -> None:
    module, given, layer = _gated(name)
    with run(name).changed(r"(.*\.)?mlp_down(\.bias)?", _without_biases):
        with run(name).changed(_GATE, torch.zeros_like, layer):
            assert run(name).seen(module, given=given).abs().max() == 0
        with run(name).changed(_UP, torch.zeros_like, layer):
            assert run(name).seen(module, given=given).abs().max() > 1e-4


def _without_biases(numbers: Tensor) -> Tensor:
    return torch.zeros_like(numbers) if numbers.ndim == 1 else numbers


def test_jetmoe_gate_and_up() -> None:
    jetmoe = run("jetmoe")
    mlp = jetmoe.model.get_submodule("model.layers.0.mlp")
    bias = mlp.get_parameter("bias")
    before = jetmoe.seen(mlp, given=True) - bias
    with jetmoe.changed(r"expert_\d+\.mlp_up", torch.neg):
        torch.testing.assert_close(jetmoe.seen(mlp, given=True) - bias, -before)
    with jetmoe.changed(r"expert_\d+\.mlp_gate", torch.neg):
        assert not torch.allclose(jetmoe.seen(mlp, given=True) - bias, -before, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx", "llama4_text", "mixtral", "jetmoe", "granitemoe"])
def test_without_its_gate_an_expert_gives_as_much_as_without_its_down_matrix(name: str) -> None:
    """So the parts that are called expert N's are all of one expert."""
    tiny, module, n_that_matter = run(name), _experts(name), 0
    with tiny.changed(r"(.*\.)?mlp_down(\.bias)?", _without_biases):
        whole = tiny.seen(module, given=True)
        for expert in range(4):
            with tiny.changed(rf"expert_{expert}\.mlp_gate(\.bias)?", torch.zeros_like):
                without_gate = tiny.seen(module, given=True)
            with tiny.changed(rf"expert_{expert}\.mlp_down", torch.zeros_like):
                torch.testing.assert_close(tiny.seen(module, given=True), without_gate)
            n_that_matter += not torch.allclose(without_gate, whole, atol=1e-6)
    assert n_that_matter >= 2


def _experts(name: str) -> nn.Module:
    """The first module that runs experts."""
    path = next(found[0][0] for p, found in run(name).places.items() if p.component == "expert_0.mlp_down")
    owner = re.sub(r"(\.mlp\.w2|\.output_linear\.weight|\.down_proj)$", "", path)
    found: nn.Module = run(name).model.get_submodule(owner)
    return found


NORMED = (
    *("bart", "bert:masked", "biogpt", "bloom", "cohere", "ctrl", "distilbert:masked", "exaone4", "gemma2"),
    *("glm4", "gpt2", "gpt_neox", "hyperclovax", "lfm3", "llama", "mamba", "mbart", "megatron-bert", "mpt"),
    *("olmo2", "openai-gpt", "opt", "roberta-prelayernorm", "rwkv", "xglm", "xlm-roberta-xl", "afmoe"),
    *("albert:masked", "t5:seq2seq", "olmo_hybrid", "recurrent_gemma", "xlnet", "dbrx", "kolibri1", "jamba"),
)


@pytest.mark.parametrize("name", NORMED)
def test_a_norm_is_before_its_sublayer_if_the_sublayer_reads_what_it_gives(name: str) -> None:
    tiny = run(name)
    layer = len(tiny.anatomy.blocks) - 1
    found = {p.component for p in tiny.places if p.layer == layer}
    for component in found & {"attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"}:
        sublayer = component.partition("_")[0]
        given, read = _around(tiny, component, layer)
        readers = {
            c for c, tensor in read.items() if tensor.numel() == given.numel() and _same(tensor, given)
        }
        mixers = {
            c for c in readers if not c.startswith(("mlp", "channel_mix", "router", "expert", "shared"))
        }
        its = mixers if sublayer == "attn" else readers - mixers
        if component.endswith("post_norm"):
            assert not its, (component, its)
        elif name != "rwkv":  # its layers read two tokens mixed
            assert its, component


def _same(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(tensor.flatten(), other.flatten())


def _around(tiny: Run, norm: str, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What a norm gives, and what the matrices of its block read, by their names."""
    read: dict[str, Tensor] = {}
    handles = []

    def keep(component: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            what = args[0] if args else next(iter(kwargs.values()))
            read[component] = what.detach().clone()

        return hook

    for place, found in tiny.places.items():
        if place.layer == layer and "norm" not in place.component and not place.component.endswith("bias"):
            owner = tiny.owner(place.component, layer)
            handles.append(owner.register_forward_pre_hook(keep(place.component), with_kwargs=True))
            assert found
    given = tiny.seen(tiny.owner(norm, layer), given=True)
    for handle in handles:
        handle.remove()
    return given, read


# Names without a module of their own.


def test_a_piece_of_a_stacked_parameter_has_the_place_of_its_part() -> None:
    namer = named("mixtral").namer
    for word, component in (("w1", "mlp_gate"), ("w2", "mlp_down"), ("w3", "mlp_up")):
        path = f"model.layers.1.block_sparse_moe.experts.3.{word}.weight"
        assert namer.parts(path, (48, 32)) == [Part(Place(1, f"expert_3.{component}"), None)]
    gate = namer.parts("model.layers.1.block_sparse_moe.gate.weight", (4, 32))
    assert gate == [Part(Place(1, "router"), None)]
    piece = named("deepseek_v3").namer.parts("model.layers.1.mlp.experts.3.gate_proj.weight", (24, 32))
    assert piece == [Part(Place(1, "expert_3.mlp_gate"), None)]


def test_what_is_no_part_of_the_model_keeps_its_path() -> None:
    namer = named("deepseek_v3").namer
    for path in ("model.layers.2.self_attn.q_proj.weight", "model.layers.61.eh_proj.weight"):
        assert namer.parts(path, (32, 32)) == [Part(Place(None, path.removesuffix(".weight")), None)]
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    [part] = namer.parts(inverse, (8,))
    assert part == Part(Place(0, "attn_rotary_emb_inv_freq"), None)


def test_only_matrices_of_an_mlp_are_stacks_of_experts() -> None:
    [part] = named("inkling_text").parts["model.layers.0.mlp_sconv.conv1d.weight"]
    assert part == Part(Place(0, "mlp_conv1d"), None)
    shared = named("inkling_text").parts["model.layers.0.mlp.shared_experts.up_proj"]
    assert [part.place.component for part in shared] == ["shared_expert_0.mlp_up", "shared_expert_1.mlp_up"]


def test_parts_of_a_quantised_weight_are_not_cut() -> None:
    namer = named("phi3").namer
    path = "model.layers.0.self_attn.qkv_proj.qweight"
    assert namer.parts(path, (4, 64)) == [Part(Place(0, "attn_qkv.qweight"), None)]


def test_a_tensor_of_another_shape_than_its_layout_stays_whole() -> None:
    namer = named("phi4_multimodal").namer
    path = "model.layers.0.self_attn.qkv_proj.weight"
    assert [part.place.component for part in namer.parts(path, (64, 32))] == ["attn_q", "attn_k", "attn_v"]
    assert named("gpt_neox").namer.parts("gpt_neox.layers.0.attention.query_key_value.weight", (97, 32)) == [
        Part(Place(0, "attn_qkv"), None)
    ]


def test_a_layout_is_fitting_or_not() -> None:
    layout = FusedLayout(2, (("q", 3), ("k", 1)))
    assert (layout.fits(8), layout.fits(9), layout.dims) == (True, False, (2, 4))
    assert dict(layout.parts())["k"] == (slice(None), 3)


def test_names_by_path_alone() -> None:
    assert name_by_path("model.layers.7.self_attn.q_proj.weight") == Place(7, "attn_q")
    assert name_by_path("transformer.h.3.mlp.c_proj.bias") == Place(3, "mlp_down.bias")
    assert name_by_path("model.layers.1.mlp.experts.12.down_proj.weight") == Place(1, "expert_12.mlp_down")
    assert name_by_path("encoder.layer.0.attention.self.query.weight") == Place(0, "attn_q")
    assert name_by_path("model.embed_tokens.weight") == Place(None, "embed")
    assert name_by_path("model.norm.weight") == Place(None, "final_norm")
    assert name_by_path("lm_head.weight") == Place(None, "lm_head")
    assert name_by_path("something.else") == Place(None, "something.else")
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert name_by_path(tower) == Place(None, tower.removesuffix(".weight"))


def page() -> str:
    """The page of the documentation, from what was found."""
    counted = [name for name in ALL if name not in WITHOUT_BLOCKS]
    n_tensors = sum(len(named(name).text()) for name in counted)
    n_unknown = sum(len(named(name).unknown()) for name in counted)
    left = {name: sorted({re.sub(r"\d+", "N", path) for path in named(name).unknown()}) for name in counted}
    fused: dict[str, set[str]] = defaultdict(set)
    for name in counted:
        for path, parts in named(name).parts.items():
            if len(parts) > 1 and not path.rpartition(".")[0].endswith(("experts", "experts.mlp")):
                word = path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
                fused[word].add(name)
    return "\n".join(
        [
            "# Components",
            "",
            "`weight-diff` calls the tensors of every architecture by the same names. A name is made from",
            "what a tensor is and what it lies in, not from a list of families. This page is written by the",
            "test over every causal language model of transformers (and encoders, encoder-decoders and a",
            "multimodal one).",
            "",
            f"{n_tensors - n_unknown} of {n_tensors} tensors of {len(counted)} architectures are named by",
            "rules. The others are listed below, but for those of vision and audio towers and of an",
            "encoder-decoder's decoder: they keep their paths too, and are not counted. No two tensors of a",
            "model have the same block and name.",
            "",
            *_GUIDE,
            "",
            "## Cut into components",
            "",
            "Stacked experts are cut in all architectures that have them, and these tensors in these:",
            "",
            "| tensor | model types |",
            "|---|---|",
            *[f"| `{word}` | {', '.join(f'`{n}`' for n in sorted(fused[word]))} |" for word in sorted(fused)],
            "",
            "## Keep their paths",
            "",
            "| model type | tensors |",
            "|---|---|",
            *[
                f"| `{name}` | {', '.join(f'`{p}`' for p in paths)} |"
                for name, paths in left.items()
                if paths
            ],
            "",
            f"The blocks of {' and '.join(f'`{name}`' for name in WITHOUT_BLOCKS)} cannot be found: their",
            "tensors are named by their paths alone, and keep these where two would have the same name.",
            "",
        ]
    )


_GUIDE = """\
| name | what it is |
|---|---|
| `attn_q`, `attn_k`, `attn_v`, `attn_o` | projections of attention, of linear attention too |
| `cross_attn_q`, … | those of cross-attention |
| `attn_q_a`, `attn_q_b`, `attn_kv_a`, `attn_kv_b` | latent attention: down and up |
| `attn_gate`, `attn_sinks`, `attn_rel_b` | an output's gate, attention sinks, relative positions |
| `attn_q_norm`, `attn_k_norm` | the norms of queries and keys |
| `mlp_gate`, `mlp_up`, `mlp_down` | an MLP; the gate is what goes through the activation, if there is one |
| `router`, `expert_N.mlp_up`, `shared_expert.mlp_up`, … | a mixture of experts |
| `attn_norm`, `mlp_norm` | the norm that a sublayer reads through, a Mamba's `attn_norm` too |
| `attn_post_norm`, `mlp_post_norm` | the norm after a sublayer |
| `ssm_…` | state spaces, and the recurrence of linear attention |
| `time_mix_…`, `channel_mix_…` | RWKV |
| `lru_…`, `mlstm_…`, `shortconv_…` | RG-LRU, xLSTM, short convolutions |
| `embed`, `pos_embed`, `token_type_embed`, `embed_norm`, `final_norm`, `lm_head` | outside the blocks |

A bias has its weight's name and `.bias`. Of two attentions or MLPs in one block, the first has a 0 in its
name: `attn_0_q`. Where a rule knows only what a tensor lies in, its own name follows: `attn_lambda_q1`.

Kept whole are `ssm_in` of Mamba, `ssm_conv1d` of linear attention, and `attn_q` where it makes a gate beside
the queries (Qwen 3 Next). Where a model's own Python code fuses queries, keys and values they stay
`attn_qkv`: in which order they are is in no configuration.""".splitlines()
