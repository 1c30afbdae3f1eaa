"""What is inside blocks (`--sites all`): each sublayer's term and the routers, against hooks written here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import lazarus
from architectures import CAUSAL, REFUSED, UNBUILDABLE, WITHOUT_COMPONENTS, build, swept
from factories import notes_of, perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.activation import iter_state_pairs
from lazarus.engine import learn, learn_components, one_ulp_away
from lazarus.errors import ShapeMismatchError, UnsupportedModelError
from lazarus.facts import ComponentSite
from lazarus.models import dissect, wrap_model
from lazarus.names.sublayers import sublayers
from lazarus.render.activation.components import component_lines
from lazarus.render.activation.summary import summary_lines
from lazarus.results import ComponentRecord
from lazarus.statistics import FACTOR, share_floor
from made_records import whole_record
from reference import cosine, run_whole

PROMPTS = (
    [11, 45, 7, 93, 30, 62, 18, 77, 24, 50, 36, 81],
    [64, 9, 28, 71, 40],
    [33, 88],
    [59, 14, 72, 21, 66, 47, 95],
)
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in PROMPTS]
COMPARED = [name for name in CAUSAL if name not in UNBUILDABLE and name not in REFUSED]
Rows = dict[tuple[int, str], np.ndarray]
Local = Callable[[Any, Tensor, Tensor], Tensor]

TERMS: dict[str, dict[str, str]] = {
    "llama": {"attn_out": "self_attn", "mlp_out": "mlp"},
    "gpt2": {"attn_out": "attn", "mlp_out": "mlp"},
    "gpt_neox": {"attn_out": "attention", "mlp_out": "mlp"},
    "falcon": {"attn_out": "self_attention", "mlp_out": "mlp"},
    "bloom": {"attn_out": "self_attention.dense", "mlp_out": "mlp.dense_4h_to_h"},
    "opt": {"attn_out": "self_attn", "mlp_out": "fc2"},
    "gemma2": {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "olmo2": {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "mamba": {"attn_out": "mixer"},
    "mixtral": {"attn_out": "self_attn", "mlp_out": "mlp", "router": "mlp.gate"},
    "qwen3_moe": {"attn_out": "self_attn", "mlp_out": "mlp", "router": "mlp.gate"},
    "deepseek_v3": {"attn_out": "self_attn", "mlp_out": "mlp", "router": "mlp.gate"},
}
"""The module of a block that gives each term, of one architecture of each form."""

# What the fine-tuned block's MLP makes of base's state x and base's attention output a, by hand.
MLP_OF: dict[str, Local] = {
    "llama": lambda f, x, a: f.mlp(f.post_attention_layernorm(x + a)),
    "gpt2": lambda f, x, a: f.mlp(f.ln_2(x + a)),
    "gpt_neox": lambda f, x, _: f.mlp(f.post_attention_layernorm(x)),
    "bloom": lambda f, x, a: f.mlp(f.post_attention_layernorm(x + a), torch.zeros_like(x)),
    "opt": lambda f, x, a: f.fc2(f.activation_fn(f.fc1(f.final_layer_norm(x + a)))),
    "gemma2": lambda f, x, a: f.post_feedforward_layernorm(f.mlp(f.pre_feedforward_layernorm(x + a))),
    "olmo2": lambda f, x, a: f.post_feedforward_layernorm(f.mlp(x + a)),
    "mixtral": lambda f, x, a: f.mlp(f.post_attention_layernorm(x + a)),
}


def compare(base: PreTrainedModel, finetuned: PreTrainedModel, **options: Any) -> lazarus.ActivationDiff:
    options = {"sites": "all", "no_noise_floor": True, "tokenizer": word_tokenizer(), **options}
    return lazarus.activation_diff(base, finetuned, options.pop("prompts", TEXTS), **options)


def components(diff: lazarus.ActivationDiff) -> dict[tuple[int, str], ComponentRecord]:
    assert diff.record.components is not None
    return {(found.layer, found.name): found for found in diff.record.components}


def first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def precise(name: str) -> tuple[PreTrainedModel, float]:
    """Return a model in float64, where it runs in that, and how close to the oracle it must come.

    Experts do not; Mamba keeps its residual stream in float32, and Gemma 2 gives NaN where tokens are padded.
    """
    model = build(name)
    runs = name not in ("mamba", "gemma2") and "router" not in TERMS[name]
    return (model.double(), 1e-9) if runs else (model, 1e-5)


def states_of(model: PreTrainedModel, terms: Mapping[str, str], ids: Sequence[int]) -> Rows:
    """The oracle: one prompt alone, by a plain hook on each named module that a block has."""
    seen: Rows = {}
    handles = []
    for layer, block in enumerate(dissect(model).blocks):
        paths = dict(block.named_modules())
        for name, path in {**terms, "block": ""}.items():
            if path not in paths:
                continue

            def hook(_: nn.Module, _args: Any, output: Any, key: tuple[int, str] = (layer, name)) -> None:
                rows = first(output).double().numpy().copy()
                seen[key] = rows.reshape(len(ids), -1)
                if key[1] == "router":
                    seen[key[0], "picks"] = output[2].numpy().copy()

            handles.append(paths[path].register_forward_hook(hook))
    run_whole(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def compared(states: np.ndarray, position: str) -> np.ndarray:
    rows = states[-1:] if position == "last" else states[min(1, len(states) - 1) :]
    return rows.mean(0, keepdims=True) if position == "mean" else rows


@pytest.mark.parametrize(
    ("name", "position"),
    [*((name, "all") for name in TERMS), ("llama", "last"), ("mixtral", "mean"), ("gemma2", "last")],
)
def test_every_component_is_that_of_a_plain_hook(name: str, position: str) -> None:
    base, tolerance = precise(name)
    finetuned = perturbed(base, 0.05)
    found = components(compare(base, finetuned, position=position, batch_tokens=16))
    sides = [[states_of(model, TERMS[name], ids) for ids in PROMPTS] for model in (base, finetuned)]
    expected = {key for key in sides[0][0] if key[1] in ("attn_out", "mlp_out", "router")}
    assert found.keys() == expected
    for key, record in found.items():
        pairs = [[compared(s[key], position) for s in pair] for pair in zip(*sides, strict=True)]
        divergence = np.mean([1 - cosine(b, f).mean() for b, f in pairs])
        change = np.mean(
            [(np.linalg.norm(f - b, axis=1) / np.linalg.norm(b, axis=1)).mean() for b, f in pairs]
        )
        assert record.divergence == pytest.approx(divergence, abs=tolerance)
        assert record.relative_l2 == pytest.approx(change, rel=tolerance)
        assert record.n_prompts == len(PROMPTS)
        assert record.local is None


def calls_of(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[Any, Any]]:
    """What each block is called with."""
    received: list[tuple[Any, Any]] = []
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, __: received.append((args, kwargs)), with_kwargs=True
        )
        for block in dissect(model).blocks
    ]
    run_whole(model, ids)
    for handle in handles:
        handle.remove()
    return received


@pytest.mark.parametrize("name", MLP_OF)
def test_the_local_change_is_that_of_the_sublayers_called_by_hand(name: str) -> None:
    base, tolerance = precise(name)
    finetuned = perturbed(base, 0.05)
    found = components(compare(base, finetuned, position="all", localize=True))
    others = dissect(finetuned).blocks
    changes: dict[tuple[int, str], list[float]] = {}
    for ids in PROMPTS:
        ours = states_of(base, TERMS[name], ids)
        for layer, (other, (args, kwargs)) in enumerate(zip(others, calls_of(base, ids), strict=True)):
            a = torch.tensor(ours[layer, "attn_out"], dtype=base.dtype)[None]
            attention: list[Tensor] = []
            hook = other.get_submodule(TERMS[name]["attn_out"]).register_forward_hook(
                lambda _, __, output, attention=attention: attention.append(first(output).clone())
            )
            with torch.no_grad():
                other(*args, **kwargs)
                hook.remove()
                mlp = first(MLP_OF[name](other, args[0], a))
            for part, theirs in (("attn_out", attention[0]), ("mlp_out", mlp)):
                b, f = (
                    compared(rows.reshape(len(ids), -1), "all")
                    for rows in (ours[layer, part], theirs.numpy())
                )
                change = (np.linalg.norm(f - b, axis=1) / np.linalg.norm(b, axis=1)).mean()
                changes.setdefault((layer, part), []).append(change)
    for key, values in changes.items():
        local = found[key].local
        assert local is not None
        assert local.relative_l2 == pytest.approx(np.mean(values), rel=tolerance)


@pytest.mark.parametrize("part", ["self_attn", "mlp", "post_attention_layernorm"])
def test_only_the_changed_sublayer_has_a_local_change(part: str) -> None:
    """The norm before a sublayer is a part of it."""
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in getattr(finetuned.model.layers[2], part).parameters():
            parameter.mul_(1.1)
    found = components(compare(base, finetuned, localize=True))
    changed = [key for key, record in found.items() if record.local and record.local.relative_l2]
    assert changed == [(2, "attn_out" if part == "self_attn" else "mlp_out")]


@pytest.mark.parametrize("name", swept(COMPARED))
def test_every_architecture_is_found_or_refused_by_name(name: str) -> None:
    """Where it is found, the terms with the block's input give its output."""
    model = wrap_model(build(name), name)
    conventions = learn(model, PROMPTS[0], 0)

    def found() -> Any:
        return learn_components(model, conventions, PROMPTS[0], sublayers(model.model, model.anatomy))

    if name in WITHOUT_COMPONENTS:
        with pytest.raises(UnsupportedModelError, match="cannot be found") as caught:
            found()
        assert type(model.model).__name__ in str(caught.value)
        assert caught.value.option == "sites"
        return
    forms = found().of_blocks
    assert len(forms) == len(model.anatomy.blocks)
    for block, form in zip(model.anatomy.blocks, forms, strict=True):
        assert sums_up(model.model, block, [p for places in form.terms.values() for p in places], form.others)


def sums_up(model: PreTrainedModel, block: nn.Module, places: Sequence[Any], others: Sequence[str]) -> bool:
    """Whether y − x is, up to one factor, the sum of these modules' outputs in a pass of its own."""
    total, ends = list[Tensor](), list[Tensor]()
    paths = [(place.path, place.index) for place in places] + [(path, 0) for path in others]
    handles = [
        block.get_submodule(path).register_forward_hook(
            lambda _, __, output, i=index: total.append(
                (output if isinstance(output, Tensor) else output[i]).clone()
            )
        )
        for path, index in paths
    ]
    handles.append(
        block.register_forward_hook(lambda _, args, out: ends.extend((args[0].clone(), first(out).clone())))
    )
    run_whole(model, PROMPTS[0])
    for handle in handles:
        handle.remove()
    x, y = ends[:2]
    terms = torch.stack([t.reshape(x.shape) for t in total[: len(paths)]]).sum(0)
    factor = ((y - x) * terms).sum() / terms.square().sum()
    return bool((y - x - factor * terms).norm() < 1e-5 * y.norm())


def test_a_residual_multiplier_is_found() -> None:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=100, num_key_value_heads=2, residual_multiplier=0.22, **settings)
    torch.manual_seed(0)
    base = GraniteForCausalLM(config).eval()
    assert components(compare(base, perturbed(base))).keys() == {
        (layer, name) for layer in range(2) for name in ("attn_out", "mlp_out")
    }


def test_a_scaled_block_is_found() -> None:
    """Gemma 4 multiplies what leaves a block, the residual stream included."""
    base = build("gemma4_text")
    for block in base.model.layers:
        block.layer_scalar.fill_(0.37)
    diff = compare(base, perturbed(base))
    assert len(components(diff)) == 8
    [note] = notes_of(diff, "components-left-out")
    assert "post_per_layer_input_norm" in note


def test_blocks_of_another_form_are_refused_before_anything_runs() -> None:
    base = build("bert-generation")
    with pytest.raises(UnsupportedModelError) as caught:
        compare(base, base)
    assert "BertGenerationDecoder" in str(caught.value)
    assert "Leave `sites` out" in caught.value.marked or "sites" in str(caught.value)


# Routers


def tiny_mixtral(seed: int = 0, n_experts: int = 8, **changes: Any) -> MixtralForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": n_experts,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**settings, **changes})).eval()


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("mixtral", "last"),
        ("mixtral", "mean"),
        ("qwen3_moe", "all"),
        ("deepseek_v3", "all"),
        ("gpt_oss", "all"),
    ],
)
def test_the_experts_that_flip_are_those_of_a_plain_hook(name: str, position: str) -> None:
    base = build(name)
    finetuned = perturbed(base, 0.2)
    found = components(compare(base, finetuned, position=position))
    tokens = "last" if position == "last" else "all"  # there is no mean of experts
    expected: dict[int, list[list[float]]] = {}
    for ids in PROMPTS:
        router = {"router": "mlp.router" if name == "gpt_oss" else "mlp.gate"}
        ours, theirs = states_of(base, router, ids), states_of(finetuned, router, ids)
        for layer in [layer for layer, part in ours if part == "picks"]:
            sets = [
                [set(map(int, row)) for row in compared(side[layer, "picks"], tokens)]
                for side in (ours, theirs)
            ]
            pairs = list(zip(*sets, strict=True))
            states = [compared(side[layer, "block"], tokens) for side in (ours, theirs)]
            change = ((states[1] - states[0]) ** 2).sum(1)
            flipped = np.array([a != b for a, b in pairs])
            agreement = [len(a & b) / len(a) for a, b in pairs]
            row = (np.mean(agreement), flipped.mean(), (change * flipped).mean(), change.mean())
            expected.setdefault(layer, []).append(list(map(float, row)))
    assert expected
    assert {layer for layer, part in found if part == "router"} == expected.keys()
    for layer, values in expected.items():
        agrees, share, of_flipped, of_all = np.mean(values, axis=0)
        record = found[layer, "router"]
        assert record.expert_agreement == pytest.approx(agrees)
        assert record.flipped_share == pytest.approx(share)
        expected_share = None if position == "mean" else pytest.approx(of_flipped / of_all, rel=1e-5)
        assert record.flipped_change_share == expected_share
        assert record.flipped_share_noise is None


def test_a_changed_router_is_named() -> None:
    base = tiny_mixtral()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        weight = finetuned.model.layers[2].mlp.gate.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    found = components(compare(base, finetuned, localize=True, position="all", no_noise_floor=False))
    changed = {key for key, each in found.items() if each.local and each.local.relative_l2}
    assert changed == {(2, "router"), (2, "mlp_out")}
    routers = [found[layer, "router"] for layer in range(4)]
    assert [r.flipped_share for r in routers[:2]] == [0.0, 0.0]
    assert [r.expert_agreement for r in routers[:2]] == [1.0, 1.0]
    assert (routers[2].flipped_share or 0) > (routers[2].flipped_share_noise or 1)
    assert (routers[2].expert_agreement or 1) < (routers[2].expert_agreement_noise or 0)


def test_the_order_in_which_experts_are_picked_is_no_difference() -> None:
    base = tiny_mixtral()
    finetuned = copy.deepcopy(base)
    for block in finetuned.model.layers:
        block.mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[1].flip(-1), out[2].flip(-1)))
    found = components(compare(base, finetuned, position="all"))
    for layer in range(4):
        router = found[layer, "router"]
        assert (router.expert_agreement, router.flipped_share) == (1.0, 0.0)


@pytest.mark.parametrize("position", ["last", "all"])
def test_flips_of_two_clean_runs_in_bfloat16_are_within_their_floor(position: str) -> None:
    """The same model in other batches, and its embedding one rounding away: it decides between near ties."""
    model = tiny_mixtral(n_experts=16).bfloat16()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        weight = moved.model.embed_tokens.weight
        weight.copy_(one_ulp_away(weight, torch.Generator().manual_seed(7)))
    rows = torch.randint(0, 99, (60, 12), generator=torch.Generator().manual_seed(5)).tolist()
    texts = [" ".join(f"t{i}" for i in row[: 4 + index % 9]) for index, row in enumerate(rows)]
    found = components(compare(model, moved, prompts=texts, position=position, no_noise_floor=False))
    routers = [found[layer, "router"] for layer in range(4)]
    assert position == "last" or all((router.flipped_share or 0) > 0 for router in routers)
    for router in routers:
        assert router.flipped_share is not None
        assert router.flipped_share_noise is not None
        assert router.flipped_share <= router.flipped_share_noise < 1
        assert (router.expert_agreement or 0) >= (router.expert_agreement_noise or 1)


@pytest.mark.parametrize(("share", "n_tokens"), [(0.0, 8), (0.0, 400), (0.01, 400), (0.2, 50), (1.0, 10)])
def test_the_floor_of_a_share_is_the_end_of_its_score_interval(share: float, n_tokens: int) -> None:
    """The larger root p of (p̂ − p)² = z² p (1 − p) / n."""
    z2 = 1.959963984540054**2
    roots = np.roots([1 + z2 / n_tokens, -(2 * share + z2 / n_tokens), share**2])
    expected = min(1.0, max(float(max(roots.real)), FACTOR * share))
    assert share_floor(share, n_tokens) == pytest.approx(expected)


# Every way in which a pair runs


def told(diff: lazarus.ActivationDiff) -> list[ComponentRecord]:
    assert diff.record.components is not None
    return diff.record.components


@pytest.mark.parametrize(
    ("make", "position"), [(tiny_llama, "last"), (tiny_mixtral, "mean"), (tiny_mixtral, "all")]
)
def test_streamed_models_give_the_same(make: Any, position: str, tmp_path: Path) -> None:
    base = make(vocab_size=300, num_hidden_layers=2)
    tokenizer = tiny_tokenizer()
    models = [
        str(save_model(tmp_path / name, model, tokenizer))
        for name, model in (("base", base), ("finetuned", perturbed(base, 0.05)))
    ]
    options: Any = {"sites": "all", "localize": True, "position": position, "batch_tokens": 24}
    prompts = ["Hello, how are you?", "What is AI?", "Calculate 2 + 2", "Hello, how are you?"]
    held, streamed = (
        lazarus.activation_diff(models[0], models[1], prompts, memory=memory, **options)
        for memory in ("resident", "stream")
    )
    assert told(held) == told(streamed)
    assert all(record.local is not None and record.noise_floor is not None for record in told(held))


def test_a_streamed_model_of_other_depth_gives_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    models = [str(save_model(tmp_path / str(n), tiny_llama(num_hidden_layers=n), tokenizer)) for n in (3, 2)]
    held, streamed = (
        lazarus.activation_diff(
            models[0], models[1], ["Hello, how are you?", "What is AI?"], memory=memory, sites="all"
        )
        for memory in ("resident", "stream")
    )
    assert told(held) == told(streamed)
    assert len(told(held)) == 6


def test_common_blocks_and_repeated_prompts_count_as_if_they_had_run() -> None:
    base = tiny_mixtral()
    finetuned = copy.deepcopy(base)
    finetuned.model.layers[3].load_state_dict(perturbed(base.model.layers[3], 0.3).state_dict())
    options: Any = {"position": "all", "batch_tokens": 16}
    whole = told(compare(base, finetuned, **options))
    assert [record.divergence for record in whole[:9]] == [0.0] * 9
    twice = told(compare(base, finetuned, prompts=[*TEXTS, *TEXTS], **options))
    for one, other in zip(whole, twice, strict=True):
        assert other.n_prompts == 2 * one.n_prompts
        assert other.divergence == pytest.approx(one.divergence, rel=1e-12)
        if one.flipped_change_share is not None:
            assert other.flipped_change_share == pytest.approx(one.flipped_change_share, rel=1e-12)


def test_a_run_in_shards_gives_the_same(tmp_path: Path) -> None:
    base = tiny_mixtral(num_hidden_layers=2)
    finetuned = perturbed(base, 0.1)
    options: Any = {"localize": True, "no_noise_floor": False, "batch_tokens": 16, "position": "all"}
    whole = compare(base, finetuned, **options)
    shared = compare(base, finetuned, work_dir=str(tmp_path / "work"), **options)
    again = compare(base, finetuned, work_dir=str(tmp_path / "work"), **options)
    assert notes_of(again, "shards-reused")
    for one, other in zip(told(whole), told(shared), strict=True):
        assert other.divergence == pytest.approx(one.divergence, rel=1e-9)
        assert other.flipped_share == pytest.approx(one.flipped_share)
        assert (one.local is None) == (other.local is None)
    assert told(again) == told(shared)


def test_a_prefix_runs_with_every_prompt_and_a_note_says_why() -> None:
    base = tiny_llama(max_position_embeddings=128)
    prefix = " ".join(f"t{i}" for i in range(40))
    prompts = [f"{prefix} {text}" for text in (*TEXTS, *(f"t{i} t3" for i in range(60)))]
    diff = compare(base, perturbed(base), prompts=prompts)
    [note] = notes_of(diff, "shared-prefix")
    assert "--sites all" in note


def test_with_two_readings_of_a_text_no_router_is_compared() -> None:
    base = tiny_mixtral()
    diff = compare(base, perturbed(base), align="text")
    assert {name for _, name in components(diff)} == {"attn_out", "mlp_out"}
    [note] = notes_of(diff, "components-left-out")
    assert "router is not compared with --align text" in note


def test_models_of_other_classes_are_compared_where_both_have_a_component() -> None:
    base, finetuned = tiny_llama(vocab_size=100), tiny_mixtral()
    diff = compare(base, finetuned)
    assert {name for _, name in components(diff)} == {"attn_out", "mlp_out"}
    [note] = notes_of(diff, "components-left-out")
    assert note.startswith("router is not compared where one model alone has it")


def test_models_without_a_common_component_are_refused() -> None:
    base, finetuned = tiny_llama(vocab_size=100), tiny_llama(vocab_size=100, hidden_size=64)
    with pytest.raises(ShapeMismatchError, match="nothing inside their blocks"):
        compare(base, finetuned, prompts=TEXTS * 15)


def test_a_model_that_is_not_finite_is_compared_as_far_as_it_goes() -> None:
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    found = components(compare(base, finetuned, no_noise_floor=False, localize=True))
    assert found[2, "attn_out"].divergence == 0.0
    assert found[2, "mlp_out"].divergence is None
    assert found[3, "attn_out"].divergence is None


def test_without_the_option_nothing_of_it_is_there() -> None:
    base = tiny_llama()
    assert compare(base, perturbed(base), sites="blocks").record.components is None


def test_pairs_of_components_come_by_their_site() -> None:
    base = tiny_mixtral()
    pairs = iter_state_pairs(base, perturbed(base), TEXTS, sites="all", tokenizer=word_tokenizer())
    experts = [pair for pair in pairs if pair.site == ComponentSite(1, "experts")]
    assert experts
    for pair in experts:
        assert str(pair.site) == "1.experts"
        assert pair.base.sum(-1).tolist() == [2.0] * len(pair.base)
        assert pair.change is not None


def test_blocks_that_share_a_sublayer_are_told_apart() -> None:
    base = tiny_llama(vocab_size=100).double()
    base.model.layers[3].mlp = base.model.layers[1].mlp
    finetuned = perturbed(base, 0.05)
    found = components(compare(base, finetuned, position="all", localize=True))
    sides = [[states_of_shared(model, ids) for ids in PROMPTS] for model in (base, finetuned)]
    for layer in (1, 3):
        pairs = [(compared(b[layer], "all"), compared(f[layer], "all")) for b, f in zip(*sides, strict=True)]
        expected = np.mean([1 - cosine(b, f).mean() for b, f in pairs])
        assert found[layer, "mlp_out"].divergence == pytest.approx(expected, abs=1e-9)


def states_of_shared(model: Any, ids: Sequence[int]) -> list[np.ndarray]:
    """What each call of an MLP returns, in the order of the blocks."""
    seen: list[np.ndarray] = []
    modules = dict.fromkeys(block.mlp for block in model.model.layers)
    handles = [
        m.register_forward_hook(lambda _, __, out: seen.append(out[0].numpy().copy())) for m in modules
    ]
    run_whole(model, ids)
    for handle in handles:
        handle.remove()
    return seen


# What a reader sees


def test_the_summary_and_the_page_tell_of_components(tmp_path: Path) -> None:
    base = tiny_mixtral()
    diff = compare(base, perturbed(base, 0.2), localize=True, position="all", no_noise_floor=False)
    [line] = [line for line in summary_lines(diff.record) if line.startswith("Inside the blocks")]
    found = told(diff)
    largest = max(found, key=lambda record: record.divergence or 0)
    own = max(found, key=lambda record: (record.local and record.local.relative_l2) or 0)
    assert f"of block {largest.layer} diverges most" in line
    assert f"of block {own.layer} changes most" in line
    assert "experts flip at" in line
    diff.save(tmp_path / "diff.html")
    diff.save(tmp_path / "diff.json")
    page = (tmp_path / "diff.html").read_text()
    assert "Inside the blocks" in page
    assert page.count("<polyline") == 4  # two sublayers, and their floors
    assert told(lazarus.ActivationDiff.load(tmp_path / "diff.json")) == found


MOST = "Inside the blocks: the router of block 1 diverges most (0.0200)"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"divergence": None}, "Inside the blocks: nothing could be compared"),
        ({"divergence": 0.0}, "Inside the blocks: no component changes"),
        ({"divergence": 0.02}, MOST),
        (
            {"divergence": 0.02, "flipped_share": 0.0, "flipped_share_noise": 0.1},
            f"{MOST}; no token is sent to another expert",
        ),
        (
            {
                "divergence": 0.02,
                "flipped_share": 0.04,
                "flipped_share_noise": 0.1,
                "flipped_change_share": 0.5,
            },
            f"{MOST}; experts flip at 4.0% of the tokens in block 1 (noise: up to 10.0%), where 50% of that "
            "block's change is",
        ),
    ],
)
def test_the_line_says_no_more_than_was_measured(changes: dict[str, Any], expected: str) -> None:
    record = ComponentRecord(
        **{
            "layer": 1,
            "name": "router",
            "relative_l2": None,
            "norm_ratio": None,
            "n_prompts": 1,
            "noise_floor": None,
            "noise_floor_divergence": None,
            "local": None,
            **changes,
        }
    )
    whole = msgspec.structs.replace(whole_record(), components=[record])
    assert component_lines(whole) == [expected]


def test_a_sublayer_that_gives_zero_in_one_model_is_named() -> None:
    base = tiny_llama()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[2].mlp.down_proj.weight.zero_()
    diff = lazarus.activation_diff(base, tuned, TEXTS, tokenizer=word_tokenizer(), sites="all")
    assert diff.record.summary.verdict == "changed"
    (note,) = notes_of(diff, "states-left-out")
    assert note.startswith(
        "mlp_out of block 2: zero or not finite, and left out of the means, in 4 of 4 prompts"
    )
