"""What runs on a GPU: against the CPU's numbers, and by laws that hold on every device.

`make test-gpu` runs these, and fails where there is no CUDA device; elsewhere they are skipped. With
`LAZARUS_TEST_DEVICE=cpu` they run on the CPU, which tries the tests themselves, and says nothing of a GPU.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import save_adapter
from lazarus.errors import DeviceError

DEVICE, REQUIRED = "LAZARUS_TEST_DEVICE", "LAZARUS_REQUIRE_GPU"
TEXTS = [
    "Hello, how are you?",
    "What is AI?",
    "The answer is 42.",
    "Calculate 2 + 2.",
    "Write",
    "Paris Paris Paris",
]
N_LAYERS, CHANGED = 4, 2

gpu = pytest.mark.gpu


def find_device() -> str | None:
    """The device that is asked for, or the GPU; None where there is none."""
    return os.environ.get(DEVICE) or ("cuda" if torch.cuda.is_available() else None)


@pytest.fixture(scope="module")
def device() -> str:
    """The device; without one the test is skipped, or fails where one is required."""
    found = find_device()
    if found is None:
        assert not os.environ.get(REQUIRED), "there is no CUDA device here, and make test-gpu needs one"
        pytest.skip("needs a CUDA device: make test-gpu")
    return found


@pytest.fixture(scope="module")
def card(device: str) -> str:
    """The same, for what can only be seen on a GPU."""
    if not device.startswith("cuda"):
        pytest.skip("says nothing on a CPU")
    return device


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama, and the same with its weights changed a little."""
    root, model = tmp_path_factory.mktemp("pair"), tiny_llama(num_hidden_layers=N_LAYERS)
    return (
        save_model(root / "base", model, tiny_tokenizer()),
        save_model(root / "finetuned", perturbed(model), tiny_tokenizer()),
    )


@pytest.fixture(scope="module")
def one_block(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base, and a model in which one block alone is another."""
    model = tiny_llama(num_hidden_layers=N_LAYERS)
    changed = copy.deepcopy(model)
    changed.model.layers[CHANGED] = perturbed(model).model.layers[CHANGED]
    return pair[0], save_model(tmp_path_factory.mktemp("one") / "changed", changed, tiny_tokenizer())


def compared(base: Path, finetuned: Any, device: str, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, device=device, **options)


def assert_as_close_as_noise(found: lazarus.ActivationDiff, wanted: lazarus.ActivationDiff) -> None:
    """Hold one device's relative L2 against another's.

    ‖f − b‖ / ‖b‖ of states that move by at most ε ‖·‖ each changes by at most ε (1 + ‖f‖/‖b‖ + ‖f − b‖/‖b‖),
    to first order. Another device rounds otherwise, which is what the noise floor measures: ε is the larger
    floor of the two.
    """
    for ours, theirs in zip(found.record.layers, wanted.record.layers, strict=True):
        assert ours.relative_l2 is not None
        assert theirs.relative_l2 is not None
        assert theirs.norm_ratio is not None
        noise = max(each.noise_floor or 0.0 for each in (ours, theirs))
        bound = noise * (1 + theirs.norm_ratio + theirs.relative_l2)
        assert abs(ours.relative_l2 - theirs.relative_l2) <= bound, ours.layer


OPTIONS: dict[str, dict[str, Any]] = {
    "the last token": {},
    "every token": {"position": "all", "readout": "all"},
    "means": {"position": "mean", "localize": True},
    "many batches": {"batch_tokens": 24},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
}


@gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_the_numbers_are_those_of_the_cpu(
    options: dict[str, Any], pair: tuple[Path, Path], device: str
) -> None:
    options = {"dtype": "float32", **options}
    found, wanted = compared(*pair, device, **options), compared(*pair, "cpu", **options)
    assert_as_close_as_noise(found, wanted)
    assert [layer.noise_floor for layer in found.record.layers if not layer.noise_floor] == []
    assert found.record.summary.verdict == wanted.record.summary.verdict == "changed"


@gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_a_model_is_identical_to_itself(
    dtype: str, position: str, pair: tuple[Path, Path], device: str
) -> None:
    found = compared(pair[0], pair[0], device, dtype=dtype, position=position).record
    assert found.summary.verdict == "identical"
    assert {layer.divergence for layer in found.layers} == {0.0}
    assert {layer.relative_l2 for layer in found.layers} == {0.0}
    assert found.output is not None
    assert found.output.kl_base_finetuned == 0.0


@gpu
def test_streamed_models_give_what_models_in_memory_give(pair: tuple[Path, Path], device: str) -> None:
    whole, streamed = (
        compared(*pair, device, memory=memory, dtype="float32") for memory in ("resident", "stream")
    )
    assert streamed.record.settings.memory == "stream"
    assert_as_close_as_noise(streamed, whole)


@gpu
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_local_change_is_that_of_the_block_alone(
    memory: str, one_block: tuple[Path, Path], device: str
) -> None:
    found = compared(*one_block, device, memory=memory, localize=True).record
    local = [layer.local.relative_l2 if layer.local else None for layer in found.layers]
    assert [value == 0.0 for value in local] == [index != CHANGED for index in range(N_LAYERS)]


@gpu
def test_the_attribution_adds_up_and_names_the_block(one_block: tuple[Path, Path], device: str) -> None:
    found = compared(*one_block, device, attribute="blocks", dtype="float32").record.attribution
    wanted = compared(*one_block, "cpu", attribute="blocks", dtype="float32").record.attribution
    assert found is not None
    assert wanted is not None
    assert found.completeness_error <= 0.01  # above it the run takes more points
    assert [group.name for group in found.groups if group.nats != 0] == [
        group.name for group in wanted.groups if group.nats != 0
    ]
    # Both are the one block's KL, each to its own error.
    most = (found.completeness_error + wanted.completeness_error) * max(found.kl, wanted.kl)
    assert abs(found.sum - wanted.sum) <= most + abs(found.kl - wanted.kl)


@gpu
def test_an_adapter_runs_over_its_base(pair: tuple[Path, Path], device: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
    save_adapter(tmp_path / "adapter", pair[0], config)
    found, wanted = (compared(pair[0], tmp_path / "adapter", where) for where in (device, "cpu"))
    assert [layer.relative_l2 for layer in found.record.layers[:2]] == [0.0, 0.0]
    assert_as_close_as_noise(found, wanted)


@gpu
def test_two_processes_share_the_work(pair: tuple[Path, Path], device: str, tmp_path: Path) -> None:
    if device.startswith("cuda") and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "found.json"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lazarus"]
    command += ["introspect", "activation-diff", "-b", str(pair[0]), "-f", str(pair[1])]
    command += ["-p", f"@{prompts}", "--device", device, "--work-dir", str(tmp_path / "work"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    alone = compared(*pair, device).record.layers
    shared = json.loads(out.read_text(encoding="utf-8"))["layers"]
    for layer, found in zip(alone, shared, strict=True):
        assert layer.noise_floor is not None
        assert abs(found["relative_l2"] - (layer.relative_l2 or 0)) <= 3 * layer.noise_floor


@gpu
def test_a_lack_of_memory_is_told_with_what_helps(pair: tuple[Path, Path], card: str) -> None:
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**21 / total, card)
    try:
        with pytest.raises(DeviceError, match=r"batch_tokens|memory"):
            lazarus.activation_diff(*pair, [" ".join(TEXTS)] * 500, device=card, position="all")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)


@pytest.fixture
def told_of_waits(card: str) -> Iterator[None]:
    """A warning each time that the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.usefixtures("told_of_waits")
def test_waits_of_a_batch_do_not_grow_with_the_number_of_sites(card: str) -> None:
    def waits(n_layers: int, batch_tokens: int) -> int:
        base = tiny_llama(num_hidden_layers=n_layers)
        finetuned = perturbed(base).to(card)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            lazarus.activation_diff(
                base.to(card), finetuned, TEXTS, tokenizer=tiny_tokenizer(), batch_tokens=batch_tokens
            )
        return sum("synchronizing" in str(each.message) for each in told)

    few, many = (waits(n_layers, 24) - waits(n_layers, 4096) for n_layers in (2, 6))
    assert many == few


def test_the_tests_themselves_run_on_a_cpu() -> None:
    """All but what starts processes; with two options alone of those that are many."""
    if os.environ.get(DEVICE):
        return
    wanted = "not share_the_work and not float16 and not means and not last and not many"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", wanted, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__))],
        env={**os.environ, DEVICE: "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_benchmark_runs_on_a_cpu(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    from benchmarks import gpu as bench

    parts = [word for part in bench.PARTS if part != "two-devices" for word in ("--part", part)]
    out = tmp_path / "found.json"
    assert bench.main(["--device", "cpu", "--small", *parts, "-o", str(out)]) == 0
    found = json.loads(out.read_bytes())
    assert json.loads(capsysbinary.readouterr().out) == found
    assert {figure["name"].split(":")[0] for figure in found["figures"]} >= {"speed", "streaming"}
    assert "mean nothing" in found["device_name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_benchmark_of_a_gpu_stops_without_one() -> None:
    from benchmarks import gpu as bench

    assert bench.main([]) == 1
