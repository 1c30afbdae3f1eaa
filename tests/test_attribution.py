"""Who caused the change of the output: the parts of KL(base‖fine-tuned), against hybrids and differences."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import lazarus
from architectures import CAUSAL, REFUSED, UNBUILDABLE, build, swept
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from layouts import save_adapter
from lazarus.activation.attribution import points_beside_base
from lazarus.batches import TokenBatch
from lazarus.engine import Path as WeightPath
from lazarus.engine import PathRunner, learn
from lazarus.errors import DeviceError, UnsupportedModelError, UsageError
from lazarus.models import wrap_model
from lazarus.results import Attribution
from lazarus.tokens import TokenizedPrompt
from test_architectures import BIDIRECTIONAL, TEXTS

CUT = {"hrm_text"}
IDS = [11, 45, 7, 93, 30, 62, 18]
STEP = 1e-3
PROMPTS = ["Hello there", "The cat sat on the mat", "17 + 15 =", "What is AI", "Once upon a time", "Yes"]


def attributed(base: Any, finetuned: Any, how: str = "blocks", **options: Any) -> Attribution:
    tokenizer = tiny_tokenizer() if isinstance(base, PreTrainedModel) else None
    options = {"tokenizer": tokenizer, "no_noise_floor": True, "prompts": PROMPTS, **options}
    found = lazarus.activation_diff(base, finetuned, attribute=how, **options).record.attribution
    assert found is not None
    return found


def ids_of(text: str) -> Tensor:
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


def last_log_p(model: PreTrainedModel, text: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids_of(text)).logits[0, -1].double().log_softmax(-1)
    return found


def mean_kl(base: PreTrainedModel, other: PreTrainedModel, texts: Sequence[str] = PROMPTS) -> float:
    found = []
    for text in texts:
        p, q = last_log_p(base, text), last_log_p(other, text)
        found.append(float((p.exp() * (p - q)).sum()))
    return float(np.mean(found))


def group_of(name: str) -> str:
    if name.startswith("model.layers."):
        return f"block {name.split('.')[2]}"
    return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "final_norm")


def with_groups(base: LlamaForCausalLM, other: LlamaForCausalLM, groups: Sequence[str]) -> LlamaForCausalLM:
    found, changed = copy.deepcopy(base), other.state_dict()
    found.load_state_dict(
        {name: changed[name] if group_of(name) in groups else own for name, own in base.state_dict().items()}
    )
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_the_parts_are_those_of_all_hybrids(seed: int) -> None:
    """Exact Shapley values: the mean gain of a group over all sets of the others."""
    base = tiny_llama(seed)
    other = perturbed(base, 0.05, seed)
    found = attributed(base, other)
    names = [group.name for group in found.groups]
    changed = other.state_dict()
    assert sorted(names) == sorted(
        {group_of(name) for name, own in base.state_dict().items() if not torch.equal(own, changed[name])}
    )
    n = len(names)
    kl = {
        chosen: mean_kl(base, with_groups(base, other, chosen))
        for size in range(n + 1)
        for chosen in combinations(names, size)
    }
    exact = []
    for name in names:
        rest = [each for each in names if each != name]
        gains = 0.0
        for size in range(n):
            for chosen in combinations(rest, size):
                joined = tuple(each for each in names if each in (*chosen, name))
                gains += (kl[joined] - kl[chosen]) / comb(n - 1, size) / n
        exact.append(gains)
    parts = [group.nats for group in found.groups]
    assert np.corrcoef(exact, parts)[0, 1] >= 0.98
    assert sum(exact) == pytest.approx(found.kl, rel=1e-4)
    assert found.sum == pytest.approx(found.kl, rel=0.01)
    assert found.completeness_error <= 0.01


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_block_that_alone_changed_has_all_of_it(block: int) -> None:
    base = tiny_llama()
    other = with_groups(base, perturbed(base, 0.1), [f"block {block}"])
    found = attributed(base, other)
    [group] = found.groups
    assert (group.name, group.layer) == (f"block {block}", block)
    assert group.nats == pytest.approx(mean_kl(base, other), rel=0.01)
    assert group.share == 1.0
    assert found.restored[0].groups == [f"block {block}"]
    assert found.restored[0].kl == 0.0


def test_a_tensor_that_alone_changed_has_all_of_it() -> None:
    base = tiny_llama()
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    found = attributed(base, other, "tensors")
    [group] = found.groups
    assert (group.name, group.layer, group.component) == (
        "model.layers.1.mlp.down_proj.weight",
        1,
        "mlp_down",
    )
    assert group.nats == pytest.approx(mean_kl(base, other), rel=0.01)


def test_four_points_are_enough_for_a_smooth_path() -> None:
    base = tiny_llama()
    found = attributed(base, perturbed(base, 0.02))
    assert found.n_points == 4
    assert found.completeness_error < 1e-4


@pytest.mark.parametrize("n_points", [4, 8, 16])
def test_the_quadrature_is_exact_for_polynomials_that_are_0_at_base(n_points: int) -> None:
    points = points_beside_base(n_points)
    assert len(points) == n_points - 1
    assert all(0 < at < 1 for at, _ in points)
    for degree in range(1, 2 * n_points - 1):
        found = sum(weight * at**degree for at, weight in points)
        assert found == pytest.approx(1 / (degree + 1), rel=1e-12)


@pytest.mark.parametrize(
    ("limit", "value"),
    [("lazarus.engine.path.MOST_ELEMENTS", 100), ("lazarus.activation.attribution.MOST_LOGITS", 1)],
)
def test_what_is_done_in_pieces_for_want_of_memory_gives_the_same_parts(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama()
    other = perturbed(base, 0.05)
    whole = attributed(base, other, "tensors", batch_tokens=16)
    monkeypatch.setattr(limit, value)
    in_pieces = attributed(base, other, "tensors", batch_tokens=16)
    assert in_pieces.restored == whole.restored
    for ours, theirs in zip(in_pieces.groups, whole.groups, strict=True):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-4, abs=1e-7)


def test_tensors_add_up_to_their_blocks() -> None:
    base = tiny_llama()
    other = perturbed(base, 0.05)
    blocks, tensors = attributed(base, other), attributed(base, other, "tensors")
    assert tensors.kl == blocks.kl
    assert len(tensors.groups) == sum(
        not torch.equal(own, other.state_dict()[name]) for name, own in base.state_dict().items()
    )
    for block in (group for group in blocks.groups if group.layer is not None):
        own = sum(group.nats for group in tensors.groups if group.layer == block.layer)
        assert own == pytest.approx(block.nats, rel=1e-5)


def test_a_small_change_has_half_of_the_fisher_form() -> None:
    """½⟨Δ_g, F Δ⟩ to second order, F the Fisher matrix of the next token (differences in float64)."""
    base = tiny_llama().double()
    other = perturbed(base, 0.001)
    found = attributed(base.float(), other.float())
    base, other = base.double(), other.double()

    def slopes(group: Sequence[str]) -> list[Tensor]:
        """The change of log p along these groups, by a central difference."""
        ahead, behind = (_along(base, other, group, step) for step in (0.5, -0.5))
        return [last_log_p(ahead, text) - last_log_p(behind, text) for text in PROMPTS]

    names = [group.name for group in found.groups]
    whole = slopes(names)
    for group in found.groups:
        own = slopes([group.name])
        form = np.mean(
            [
                float((last_log_p(base, text).exp() * mine * all_of).sum()) / 2
                for text, mine, all_of in zip(PROMPTS, own, whole, strict=True)
            ]
        )
        assert group.nats == pytest.approx(float(form), rel=0.02, abs=1e-3 * found.kl)


def _along(
    base: LlamaForCausalLM, other: LlamaForCausalLM, groups: Sequence[str], step: float
) -> LlamaForCausalLM:
    found, changed = copy.deepcopy(base), other.state_dict()
    found.load_state_dict(
        {
            name: own + step * (changed[name] - own) if group_of(name) in groups else own
            for name, own in base.state_dict().items()
        }
    )
    return found


@pytest.mark.parametrize("position", ["last", "all", "mean", "-1"])
def test_each_prompt_has_the_parts_that_it_has_alone(position: str) -> None:
    base = tiny_llama()
    other = perturbed(base, 0.05)
    options = {"tokenizer": tiny_tokenizer(), "attribute": "blocks", "no_noise_floor": True}
    together = lazarus.activation_diff(base, other, PROMPTS, position=position, **options)
    nats, output = together.results.column("nats"), together.record.output
    assert together.record.attribution is not None
    assert output is not None
    assert together.record.attribution.kl == pytest.approx(output.kl_base_finetuned, rel=1e-5)
    for i, prompt in enumerate(PROMPTS):
        alone = lazarus.activation_diff(base, other, [prompt], position=position, **options)
        np.testing.assert_allclose(alone.results.column("nats")[0], nats[i], rtol=1e-3, atol=1e-6)


def test_repeated_prompts_count_as_often_as_they_are_given() -> None:
    base = tiny_llama()
    other = perturbed(base, 0.05)
    once, twice = (
        attributed(base, other, prompts=prompts) for prompts in (PROMPTS[:2], [*PROMPTS[:2], *PROMPTS[:2]])
    )
    for ours, theirs in zip(once.groups, twice.groups, strict=True):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-6)


def test_the_models_stay_as_they_are() -> None:
    base = tiny_llama()
    other = perturbed(base, 0.05)
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in (base, other)]
    needed = [p.requires_grad for model in (base, other) for p in model.parameters()]
    attributed(base, other, "tensors")
    for model, kept in zip((base, other), before, strict=True):
        assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for model in (base, other) for p in model.parameters()] == needed


def test_an_observer_is_told_of_its_passes() -> None:
    told: list[list[int]] = []

    class Watcher:
        def loading(self, role: object, name: str) -> None: ...
        def testing(self, prompts: object) -> None: ...

        def running(self, n_tokens: int) -> None:
            told.append([n_tokens, 0])

        def advanced(self, n_tokens: int) -> None:
            told[-1][1] += n_tokens

    base = tiny_llama()
    attributed(base, perturbed(base, 0.02), observer=Watcher())
    [(compared, done), (passed, all_of_it)] = told
    assert compared == done
    assert passed == all_of_it == 3 * compared  # of four points one is base, which runs no more


def test_a_tied_table_is_one_group() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    found = attributed(base, perturbed(base, 0.05))
    assert "embedding and head" in [group.name for group in found.groups]
    assert found.completeness_error <= 0.01


def test_an_adapter_has_the_parts_of_its_merge(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    merged = save_adapter(adapter, base, config).merge_and_unload()
    save_model(tmp_path / "merged", merged, tiny_tokenizer())
    options: dict[str, Any] = {"tokenizer": None, "dtype": "float32"}
    for one, other in ((str(base), f"{base}+{adapter}"), (f"{base}+{adapter}", str(base))):
        before, after = (str(tmp_path / "merged") if "+" in each else each for each in (one, other))
        ours, theirs = (
            attributed(one, other, "tensors", **options),
            attributed(before, after, "tensors", **options),
        )
        assert [group.name for group in ours.groups] == [group.name for group in theirs.groups]
        for found, expected in zip(ours.groups, theirs.groups, strict=True):
            assert found.nats == pytest.approx(expected.nats, rel=1e-3, abs=1e-6 * theirs.kl)


def test_models_in_16_bits_are_attributed_in_float32() -> None:
    base = tiny_llama().to(torch.bfloat16)
    other = perturbed(tiny_llama(), 0.02).to(torch.bfloat16)
    narrow = attributed(base, other)
    wide = attributed(base.float(), other.float())
    for ours, theirs in zip(narrow.groups, wide.groups, strict=True):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-4)


def test_nothing_is_attributed_where_nothing_changed() -> None:
    found = attributed(tiny_llama(), tiny_llama())
    assert (found.kl, found.sum, found.completeness_error, found.groups) == (0.0, 0.0, 0.0, [])


@pytest.mark.parametrize(
    "name", swept(n for n in CAUSAL if n not in {*REFUSED, *BIDIRECTIONAL, *UNBUILDABLE, *CUT})
)
def test_it_is_the_slope_of_the_divergence_in_every_architecture(name: str) -> None:
    """Against a central difference of KL; of three points the middle one, because routers jump."""
    base = build(name)
    ours, theirs = (wrap_model(model, "model") for model in (base, perturbed(base, 0.05)))
    known = learn(ours, IDS, 0)
    assert known.head_reads is not None
    path = WeightPath(ours, theirs, None)
    runner = PathRunner(path, known.head_reads, "last")
    batch = TokenBatch([TokenizedPrompt(0, IDS)], 0)
    seen = runner.learn(batch)
    path.move(0.0)
    asked = runner.ask(batch)
    errors = []
    for alpha in (0.2, 0.5, 0.8):
        ends = []
        for step in (STEP, -STEP):
            path.move(alpha + step)
            ends.append(float(runner.kl(asked)))
        path.move(alpha)
        runner.add_up(asked, seen)
        slope, found = (ends[0] - ends[1]) / (2 * STEP), float(seen.found.sum())
        errors.append(abs(found - slope) / max(abs(slope), 1e-4))
    assert sorted(errors)[1] <= 0.03, errors


def test_a_model_that_cuts_its_gradient_is_told_to_be_rough() -> None:
    """HRM runs its first cycles without a gradient, so the parts do not add up."""
    base = build("hrm_text")
    diff = lazarus.activation_diff(
        base,
        perturbed(base, 0.05),
        TEXTS,
        tokenizer=word_tokenizer(),
        attribute="blocks",
        no_noise_floor=True,
    )
    assert "rough-attribution" in diff.record.note_codes
    assert diff.record.attribution is not None
    assert diff.record.attribution.completeness_error > 0.01


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"memory": "stream"}, "needs both models in memory"),
        ({"rope_theta": 5e5}, {}, "they differ in settings"),
        ({"vocab_size": 310}, {}, "the shapes of|differ in settings"),
        ({"num_hidden_layers": 3}, {}, "differ in settings"),
    ],
)
def test_what_cannot_be_attributed_is_refused_with_the_reason(
    change: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    other = save_model(tmp_path / "other", tiny_llama(1, **change), tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match=said) as told:
        lazarus.activation_diff(base, other, PROMPTS, attribute="blocks", **options)
    assert told.value.option == "attribute"


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, states: Tensor) -> Tensor:
        return states * 1

    @staticmethod
    def backward(_: Any, *_gradients: Any) -> Any:
        raise NotImplementedError("no way back")


class _Activation(torch.nn.Module):
    def forward(self, states: Tensor) -> Any:
        return _OneWay.apply(states)  # type: ignore[no-untyped-call]


def test_a_backward_pass_that_does_not_run_is_told() -> None:
    models = [tiny_llama(), perturbed(tiny_llama(), 0.05)]
    for model in models:
        model.model.layers[1].mlp.act_fn = _Activation()
    with pytest.raises(UnsupportedModelError, match="its backward pass does not run: no way back") as told:
        attributed(models[0], models[1])
    assert told.value.option == "attribute"


@pytest.mark.parametrize("is_learnt", [False, True])
def test_a_lack_of_memory_is_never_taken_for_a_part_that_is_not_known(
    is_learnt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    if is_learnt:
        learn_ways = PathRunner.learn

        def learn_and_break(runner: PathRunner, batch: TokenBatch) -> Any:
            found = learn_ways(runner, batch)
            monkeypatch.setattr("lazarus.engine.contributions._Call.product", fails)
            return found

        monkeypatch.setattr(PathRunner, "learn", learn_and_break)
    else:
        monkeypatch.setattr("lazarus.engine.contributions._Call.product", fails)
    base = tiny_llama()
    with pytest.raises(DeviceError):
        attributed(base, perturbed(base, 0.05))


def test_it_is_a_choice() -> None:
    with pytest.raises(UsageError, match="blocks"):
        lazarus.activation_diff(tiny_llama(), tiny_llama(), PROMPTS, attribute="heads")


def test_it_is_shown_saved_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama()
    diff = lazarus.activation_diff(
        base, perturbed(base, 0.05), PROMPTS, tokenizer=tiny_tokenizer(), attribute="blocks"
    )
    found = diff.record.attribution
    assert found is not None
    text = str(diff)
    assert (
        "        Nats"
        in text.splitlines()[[line.startswith("Layer ") for line in text.splitlines()].index(True)]
    )
    by_layer = {group.layer: group.nats for group in found.groups}
    for layer, line in zip(
        diff.layers, (line for line in text.splitlines() if line[:1].isdigit()), strict=True
    ):
        assert f"{by_layer[layer.layer]:>12.6f}" in line
    largest = max(found.groups, key=lambda group: group.nats)
    assert f"Who caused it: {largest.name} {largest.nats:.4f}" in text
    diff.save(tmp_path / "result.json")
    assert lazarus.load_result(tmp_path / "result.json").record == diff.record
    saved = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert saved["attribution"]["groups"][0]["nats"] == found.groups[0].nats
    assert saved["results"][0]["nats"] == diff.results.column("nats")[0, 0]
    diff.save(tmp_path / "result.csv")
    assert "nats" in (tmp_path / "result.csv").read_text(encoding="utf-8").splitlines()[0]
    diff.save(tmp_path / "result.html")
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    chart = page.partition('<svg class="bars"')[2].partition("</svg>")[0]
    assert chart.count("<rect") == len(found.groups)
    assert "Who caused it" in page
    diff.save(tmp_path / "result.svg")
    drawn = (tmp_path / "result.svg").read_text(encoding="utf-8")
    assert drawn.count('id="nats"') == len(diff.layers)
    bars: list[Any] = list(diff.plot_attribution().patches)
    assert [bar.get_height() for bar in bars] == [group.nats for group in found.groups]


def test_single_tensors_are_drawn_as_a_map(tmp_path: Path) -> None:
    base = tiny_llama()
    diff = lazarus.activation_diff(
        base,
        perturbed(base, 0.05),
        PROMPTS,
        tokenizer=tiny_tokenizer(),
        attribute="tensors",
        no_noise_floor=True,
    )
    [image] = diff.plot_attribution().images
    assert diff.record.attribution is not None
    inside = [group for group in diff.record.attribution.groups if group.layer is not None]
    drawn: Any = image.get_array()
    assert drawn.filled(0.0).sum() == pytest.approx(sum(group.nats for group in inside))
    diff.save(tmp_path / "result.html")
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    squares = re.findall(
        r'<rect class="frame( minus)?" x="([\d.]+)" y="(\d+)" [^>]*fill-opacity="([\d.]+)">'
        r"<title>layer (\d+), (\w+): (\S+) nats</title>",
        page.partition('<svg class="bars tensor-map"')[2].partition("</svg>")[0],
    )
    most = max(abs(group.nats) for group in inside)
    names = list(dict.fromkeys(group.component for group in inside))
    expected = {
        (group.layer, group.component): (group.nats < 0, 18 * names.index(group.component), group.nats)
        for group in inside
    }
    assert len(squares) == len(expected) == len(inside)
    for minus, x, y, strength, layer, component, told in squares:
        is_negative, row, nats = expected[int(layer), component]
        assert (bool(minus), int(y), told) == (is_negative, row, f"{nats:.6f}")
        assert float(x) == 160 + 24 * int(layer)
        assert float(strength) == pytest.approx(abs(nats) / most, abs=6e-4)


def test_an_attribution_to_blocks_has_no_map_of_tensors(tmp_path: Path) -> None:
    diff = lazarus.activation_diff(
        tiny_llama(), perturbed(tiny_llama(), 0.05), PROMPTS, tokenizer=tiny_tokenizer(), attribute="blocks"
    )
    diff.save(tmp_path / "result.html")
    assert 'tensor-map"' not in (tmp_path / "result.html").read_text(encoding="utf-8")


def test_a_result_without_one_says_how_to_get_it() -> None:
    diff = lazarus.activation_diff(tiny_llama(), tiny_llama(1), PROMPTS, tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError, match="attribute"):
        diff.plot_attribution()
