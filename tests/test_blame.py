"""Whose an exception is: a fault of ours never reads as the user's model's, nor the model's as ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.blame import MemoryFaults, Translated, is_ours, is_out_of_memory
from lazarus.cli import reporting
from lazarus.cli.app import app
from lazarus.engine import positions
from lazarus.errors import (
    BlocksNotFoundError,
    DeviceError,
    LazarusError,
    ModelError,
    SaveError,
    UnsupportedModelError,
    WeightsError,
)
from lazarus.models import stored
from lazarus.models.faults import translated

TEXTS = ["t5 t17 t80", "t9 t33", "t12 t77 t31"]
FAULTS = [AttributeError, TypeError, KeyError, AssertionError, ValueError, RuntimeError, ZeroDivisionError]
TOO_MUCH = 2**50


def compare(base: Any, finetuned: Any, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), **options)


def breaking(raise_it: Callable[[], Any], layer: int = 2, model: Any = None) -> Any:
    """A model of which a module of one block raises something in its own forward."""
    model = model or tiny_llama()
    mlp = model.model.layers[layer].mlp
    mlp.forward = lambda *_args: raise_it()
    return model


def raiser(kind: type[Exception]) -> Callable[[], Any]:
    def raise_it() -> None:
        raise kind("something is missing")

    return raise_it


# --- The model's fault


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_models_forward_raises_is_the_models_fault(kind: type[Exception]) -> None:
    model = breaking(raiser(kind))
    with pytest.raises(UnsupportedModelError, match="something is missing") as caught:
        compare(model, model)
    assert kind.__name__ in str(caught.value)
    assert "Lazarus compares models of text" not in str(caught.value)  # it is one


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_block_raises_on_the_others_states_is_told_of_localize(kind: type[Exception]) -> None:
    """Only the pass of base's states through the fine-tuned block fails: its own has other values."""
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    mlp, calls = finetuned.model.layers[2].mlp, list[int]()
    plain = mlp.forward

    def failing(states: torch.Tensor) -> Any:
        calls.append(1)
        if any("local" in (frame.filename) for frame in _stack()):
            raise kind("something is missing")
        return plain(states)

    mlp.forward = failing
    with pytest.raises(UnsupportedModelError, match="`localize`: block 2 of"):
        compare(base, finetuned, localize=True, no_noise_floor=True)
    assert calls


def _stack() -> list[Any]:
    import traceback

    return list(traceback.extract_stack())


def test_a_model_that_cannot_name_its_own_stack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(model.model, "get_decoder", raiser(AttributeError), raising=False)
    with pytest.raises(BlocksNotFoundError, match="something is missing"):
        compare(model, model)


def test_a_hidden_size_that_is_no_number_is_none() -> None:
    model = tiny_llama()
    model.config.__dict__["hidden_size"] = [32, 64]
    with pytest.raises(BlocksNotFoundError, match="no hidden_size"):
        compare(model, model)


# --- Ours


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_hook_of_ours_raises_passes_as_it_is(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are picked in a hook that torch calls inside the model's forward."""
    _break_picking(kind, monkeypatch)
    with pytest.raises(kind, match="a slip"):
        compare(tiny_llama(), perturbed(tiny_llama()))


def _break_picking(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in our own code: the function runs as if it were written in its module."""
    names: dict[str, Any] = {"__name__": positions.__name__, "kind": kind}
    exec("def pick(self, states):\n    raise kind('a slip')\n", names)
    monkeypatch.setattr(positions.RowPicker, "pick", names["pick"])


@pytest.mark.parametrize("kind", FAULTS)
def test_what_our_part_of_loading_raises_passes_as_it_is(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, base_folder: Path, finetuned_folder: Path
) -> None:
    names: dict[str, Any] = {"__name__": stored.__name__, "kind": kind}
    exec("def same(one, other):\n    raise kind('a slip')\n", names)
    monkeypatch.setattr("lazarus.models.sharing._same_keys", names["same"])
    with pytest.raises(kind, match="a slip"):
        lazarus.activation_diff(str(base_folder), str(finetuned_folder), ["Hello"])


def test_a_torch_function_that_a_hook_of_ours_misuses_is_ours() -> None:
    """torch's functions in Python have frames of their own, below ours."""
    names: dict[str, Any] = {"__name__": "lazarus.engine.made_up", "torch": torch}
    exec("def hook(*_):\n    torch.zeros(2).split([1, 2])\n", names)
    linear = nn.Linear(2, 2)
    linear.register_forward_hook(names["hook"])
    with pytest.raises(RuntimeError, match="split_with_sizes"), Translated("here", _refuse):
        linear(torch.zeros(1, 2))


def _refuse(error: BaseException) -> LazarusError:
    return UnsupportedModelError(str(error))


def test_our_fault_that_another_library_wraps_is_ours() -> None:
    names: dict[str, Any] = {"__name__": "lazarus.engine.made_up"}
    exec("def hook():\n    raise KeyError('a slip')\n", names)

    def library() -> None:
        try:
            names["hook"]()
        except KeyError as error:
            raise RuntimeError("a hook failed") from error

    with pytest.raises(RuntimeError, match="a hook failed"), Translated("here", _refuse):
        library()


def test_an_error_of_ours_that_another_library_wraps_is_told() -> None:
    names: dict[str, Any] = {"__name__": "lazarus.engine.made_up", "SaveError": SaveError}
    exec("def hook():\n    raise SaveError('no room')\n", names)

    def library() -> None:
        try:
            names["hook"]()
        except SaveError as error:
            raise RuntimeError("a hook failed") from error

    with pytest.raises(SaveError, match="no room"), Translated("here", _refuse):
        library()


def test_files_are_at_fault_whoever_opens_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="base: a file is missing"), translated("base"):
        stored.read_rows(stored.StoredTensor(str(tmp_path / "no"), "F32", (1,), 0, 4), [0])
    (tmp_path / "short").write_bytes(bytes(6))
    with pytest.raises(OSError, match="short: cut short"):
        stored.read_rows(stored.StoredTensor(str(tmp_path / "short"), "F32", (2, 1), 0, 8), [0, 1])


def test_a_full_disk_is_told_as_that() -> None:
    with pytest.raises(ModelError, match=r"base: no room on the disk.*HF_HOME"), translated("base"):
        raise OSError(28, "No space left on device")


def test_a_warning_that_is_an_error_is_no_fault_of_the_model() -> None:
    def warn() -> None:
        raise UserWarning("deprecated")

    with pytest.raises(UserWarning, match="deprecated"):
        compare(breaking(warn), tiny_llama())


def test_ctrl_c_inside_a_model_is_ctrl_c() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(breaking(interrupt), tiny_llama())


def test_a_warning_of_whose_it_is_needs_a_frame() -> None:
    assert is_ours(KeyError("never raised"))


def test_experts_that_do_not_fit_together_are_told_with_transformers_reason(tmp_path: Path) -> None:
    """transformers puts the reason into a report that nobody sees, and raises an error that points to it."""
    from safetensors.torch import load_file, save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=2, **sizes)
    folder = save_model(tmp_path / "mixture", MixtralForCausalLM(config), tiny_tokenizer())
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "experts.1" in key)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mixture: transformers cannot load it: .*experts.*stack expects"):
        lazarus.activation_diff(str(folder), str(folder), ["Hello"])


# --- An operator that the device lacks


@pytest.mark.parametrize(
    "text", ["\"addmm_impl_cpu_\" not implemented for 'Float8_e4m3fn'", "Could not run 'aten::mm' with CPU"]
)
def test_an_operator_that_the_cpu_lacks_is_not_to_be_had_from_the_cpu(text: str) -> None:
    def lack() -> None:
        raise NotImplementedError(text)

    with pytest.raises(DeviceError, match="The CPU has no such operator for this dtype") as caught:
        compare(breaking(lack), tiny_llama())
    assert '`device="cpu"`' not in str(caught.value)


def test_real_float8_weights_that_do_not_run_here() -> None:
    model = tiny_llama()
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises((DeviceError, UnsupportedModelError)) as caught:
        compare(model, model)
    assert "Lazarus compares models of text" not in str(caught.value)


def test_code_that_was_never_written_is_no_lack_of_the_device() -> None:
    def unwritten() -> None:
        raise NotImplementedError

    with pytest.raises(UnsupportedModelError, match="NotImplementedError"):
        compare(breaking(unwritten), tiny_llama())


# --- Memory


def exhaust(*_: Any) -> Any:
    """What torch does where there is no memory: it is asked for a petabyte."""
    return torch.empty(TOO_MUCH)


def in_the_stack(model: Any) -> None:
    breaking(exhaust, model=model)


def in_the_head(model: Any) -> None:
    model.lm_head.forward = exhaust


def on_the_compared_rows(model: Any) -> None:
    """In the head once the probe is over: it knows how many rows that has."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: exhaust() if states.shape[1] == len(TEXTS) else plain(states)


def going_on_from_a_cache(model: Any) -> None:
    plain = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values") or kwargs.get("cache")
        return exhaust() if cache is not None and cache.get_seq_length() else plain(*args, **kwargs)

    model.model.forward = forward


@pytest.mark.parametrize("where", [in_the_stack, in_the_head, on_the_compared_rows])
def test_memory_that_runs_out_is_told_wherever_it_does(where: Callable[[Any], None]) -> None:
    model = tiny_llama()
    where(model)
    with pytest.raises(DeviceError, match=r"out of memory.*`batch_tokens` below 512") as caught:
        compare(tiny_llama(hidden_act="relu"), model, no_noise_floor=True)
    assert str(TOO_MUCH * 4) in str(caught.value)
    assert "batch of" in str(caught.value)


def test_memory_that_a_cache_lacks_is_not_the_caches_fault() -> None:
    base, finetuned = (
        tiny_llama(max_position_embeddings=128),
        perturbed(tiny_llama(max_position_embeddings=128)),
    )
    going_on_from_a_cache(base)
    prefix = " ".join(f"t{i}" for i in range(20, 60))
    texts = [f"{prefix} t{i} t{i + 1}" for i in range(16)]
    with pytest.raises(DeviceError, match="out of memory"):
        lazarus.activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), no_noise_floor=True)


def test_memory_of_a_block_on_the_others_states() -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    mlp = finetuned.model.layers[2].mlp
    plain = mlp.forward
    mlp.forward = lambda states: (
        exhaust() if any("local" in frame.filename for frame in _stack()) else plain(states)
    )
    with pytest.raises(DeviceError, match=r"`localize`: block 2 of .* out of memory"):
        compare(base, finetuned, localize=True, no_noise_floor=True)


def test_compare_names_what_it_has() -> None:
    model = tiny_llama()
    in_the_head(model)
    with pytest.raises(DeviceError, match=r"out of memory.*`dtype=.bfloat16.` or a shorter prompt") as caught:
        lazarus.compare(model, model, "t5 t17", tokenizer=word_tokenizer())
    assert "batch_tokens" not in str(caught.value)


def test_models_that_are_named_can_be_streamed(
    monkeypatch: pytest.MonkeyPatch, base_folder: Path, finetuned_folder: Path
) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM.__init__", lambda *_: bytearray(TOO_MUCH))
    with pytest.raises(
        DeviceError, match=r"loading .*base.*out of memory.*Use `memory=.stream.` or"
    ) as caught:
        lazarus.activation_diff(str(base_folder), str(finetuned_folder), ["Hello"])
    assert "batch_tokens" not in str(caught.value)


@pytest.mark.parametrize(
    "exhausted",
    [
        exhaust,
        lambda: np.empty(TOO_MUCH),
        lambda: bytearray(TOO_MUCH),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")),
        lambda: _raise(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")),
        lambda: _raise(ImportError("/x.so: failed to map segment from shared object")),
        lambda: _raise(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
        lambda: _raise(OSError(12, "Cannot allocate memory")),
    ],
)
def test_every_lack_of_memory_is_one(exhausted: Callable[[], Any]) -> None:
    with (
        pytest.raises(DeviceError, match=r"the batch: .*memory.*Use A or B\."),
        MemoryFaults(["A", "B"]),
        Translated("the batch", _refuse),
    ):
        exhausted()


def test_what_a_gpu_asked_for_is_told() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    with pytest.raises(DeviceError, match=r"The GPU is out of memory \(2\.00 GiB more"), MemoryFaults(["A"]):
        raise error


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [KeyError("out of memory"), UnsupportedModelError("out of memory"), RuntimeError("other")]
)
def test_other_errors_may_speak_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


_LITTLE = """
import resource, sys
import lazarus
from factories import tiny_llama, word_tokenizer
model = tiny_llama()
lazarus.activation_diff(model, model, ["t1 t2"], tokenizer=word_tokenizer())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20),) * 2)
texts = [f"t{i % 100} " * 60 for i in range(4000)]
texts = [f"{t}t{i % 97} t{i // 97}" for i, t in enumerate(texts)]
try:
    options = {"tokenizer": word_tokenizer(), "position": "all", "batch_tokens": 10**6}
    lazarus.activation_diff(model, model, texts, **options)
except lazarus.errors.DeviceError as error:
    sys.exit(0 if "out of memory" in str(error) else str(error))
sys.exit("it did not run out")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what a process uses from /proc")
def test_a_real_lack_of_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LITTLE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- The command


def test_a_fault_of_ours_is_told_as_that_with_its_trace(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    base_folder: Path,
    finetuned_folder: Path,
    tmp_path: Path,
) -> None:
    _break_picking(KeyError, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [
        "introspect",
        "activation-diff",
        "-b",
        str(base_folder),
        "-f",
        str(finetuned_folder),
        "-p",
        "Hi",
    ]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, KeyError)
    reporting.unexpected(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "This is a fault of lazarus" in told
    [trace] = tmp_path.glob("lazarus-*.txt")
    assert str(trace) in told
    assert "Traceback" in trace.read_text(encoding="utf-8")


def test_what_another_library_raised_is_not_called_a_fault_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    vector: Any = torch.zeros(2)
    try:
        vector.split([1, 2])
    except RuntimeError as error:
        reporting.unexpected(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert "a fault of lazarus" not in told
    assert "torch/" in told


def test_a_trace_that_cannot_be_written_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    reporting.unexpected(KeyError, KeyError("x"), None)
    assert "run again with --debug" in capsys.readouterr().err


def test_a_file_on_a_full_disk_is_not_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="1"), reporting.reported(debug=False):
        raise OSError(28, "No space left on device", "/scratch/part")
    assert "/scratch/part cannot be written" in capsys.readouterr().err


def test_the_command_tells_of_memory_that_no_run_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="1"), reporting.reported(debug=False):
        raise MemoryError
    assert capsys.readouterr().err.startswith("Error: Out of memory")
