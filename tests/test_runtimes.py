"""Other runtimes, for real: llama.cpp and ONNX Runtime against transformers.

A test is skipped where its runtime is not installed: `make test-runtimes` builds and installs both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from ggufs import write_gguf
from layouts import save_gguf
from lazarus.cli import app
from lazarus.errors import LazarusError, PromptTooLongError, UnsupportedModelError, UsageError, WeightsError
from lazarus.recordings import LlamaCppOptions, RecordedPrompt, Recording, record_gguf
from numpy_llama import Array, forward
from reference import block_outputs, run_whole
from site_examples import ROOT, Block, Terminal, blocks_of, steps_of

in_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: make test-runtimes"
)
in_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None, reason="onnxruntime is not installed: make test-runtimes"
)
PAGE = ROOT / "docs" / "runtimes.md"
IDS = [[0, 17, 255, 3, 99, 42, 17, 5, 120, 7], [0, 5], [0, 250, 11, 8]]
EXACT = LlamaCppOptions(cache_dtype="float32", flash_attention=False, repacked=False, n_threads=2)
PLAIN = LlamaCppOptions(repacked=False, n_threads=2)


def asked(ids: list[list[int]], **more: Any) -> list[RecordedPrompt]:
    return [RecordedPrompt(index=index, ids=each, **more) for index, each in enumerate(ids)]


def relative(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def furthest(recording: Recording, model: PreTrainedModel, ids: list[list[int]]) -> float:
    """The largest relative distance at any site of any prompt."""
    apart = []
    for index, each in enumerate(ids):
        output: Any = run_whole(model, each, output_hidden_states=True)
        wanted = {"embedding": output.hidden_states[0][0], "final_norm": output.hidden_states[-1][0]}
        blocks: Any = model.get_decoder()
        outputs = block_outputs(model, blocks.layers, each)
        wanted |= {f"resid_post.{layer}": torch.from_numpy(out) for layer, out in enumerate(outputs)}
        if "logits" in recording.sites:
            wanted["logits"] = output.logits[0]
        assert recording.sites == [*sorted(wanted, key=recording.sites.index)]
        apart += [relative(recording.rows(index, site), rows.numpy()) for site, rows in wanted.items()]
    return max(apart)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", tiny_llama())


@in_llama_cpp
def test_llama_cpp_gives_the_states_of_transformers(model_file: Path, tmp_path: Path) -> None:
    options = LlamaCppOptions(**{**vars(EXACT), "logits": True})
    made = record_gguf(model_file, asked(IDS), tmp_path / "recording", options)
    assert furthest(made, tiny_llama(), IDS) < 1e-5
    assert [prompt.ids for prompt in made.prompts] == IDS
    model, runtime = made.contents.model, made.contents.runtime
    assert (model.architecture, model.n_layers, model.hidden_size) == ("llama", 4, 32)
    assert (model.causal, model.layer_norm, model.stored_dtype) == (True, False, "all F32")
    assert runtime.name == "llama.cpp"
    assert runtime.details["kv_cache"] == "float32"
    assert made.contents.notes == []


@in_llama_cpp
def test_its_own_settings_round_keys_and_values_alone(model_file: Path, tmp_path: Path) -> None:
    made = record_gguf(model_file, asked(IDS), tmp_path / "recording", PLAIN)
    assert 1e-6 < furthest(made, tiny_llama(), IDS) < 2e-3


@in_llama_cpp
def test_a_prompt_goes_in_pieces(model_file: Path, tmp_path: Path) -> None:
    options = LlamaCppOptions(**{**vars(EXACT), "n_batch": 4})
    made = record_gguf(model_file, asked(IDS), tmp_path / "recording", options)
    assert furthest(made, tiny_llama(), IDS) < 1e-5


@in_llama_cpp
def test_only_the_tokens_that_are_asked_for_are_kept(model_file: Path, tmp_path: Path) -> None:
    whole = record_gguf(model_file, asked(IDS), tmp_path / "whole", EXACT)
    made = record_gguf(model_file, asked(IDS[:1], positions=[2, 9]), tmp_path / "recording", EXACT)
    np.testing.assert_array_equal(made.rows(0, "resid_post.2"), whole.rows(0, "resid_post.2")[[2, 9]])


@in_llama_cpp
def test_a_text_is_read_by_its_own_tokenizer_and_a_difference_is_told(
    model_file: Path, tmp_path: Path
) -> None:
    text, tokenizer = "Hello, how are you?", tiny_tokenizer()
    ids = tokenizer(text).input_ids
    made = record_gguf(model_file, [text], tmp_path / "text", EXACT)
    assert made.prompts[0].ids == ids
    given = [
        RecordedPrompt(index=0, ids=ids, text=text, group="a"),
        RecordedPrompt(index=1, ids=ids[1:], text=text),
        RecordedPrompt(index=2, ids=ids, rendered=f"<s>{text}", text=text),
    ]
    made = record_gguf(model_file, given, tmp_path / "given", EXACT)
    assert made.contents.notes == [
        "llama.cpp's own tokenizer reads 1 of 3 prompts otherwise (prompt 1: token 0 is "
        f"{ids[1]}, and 0 by llama.cpp). The ids that were given were run."
    ]
    assert [prompt.group for prompt in made.prompts] == ["a", None, None]


def no_file(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def other_names(path: Path) -> Path:
    model = tiny_llama(num_hidden_layers=1, hidden_act="gelu")
    return write_gguf(path, "llama", model, without=["block_count"])


@in_llama_cpp
@pytest.mark.parametrize(
    ("write", "ids", "kind", "told"),
    [
        (None, [[0, 300]], UsageError, "the id 300, and the vocabulary of"),
        (None, [[0] * 65], PromptTooLongError, "prompt 0: 65 tokens, and the context of"),
        (no_file, IDS, WeightsError, "llama.cpp cannot load it"),
        (other_names, IDS, WeightsError, "llama.cpp cannot load it"),
        (lambda path: path, IDS, LazarusError, "no such file"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    model_file: Path,
    tmp_path: Path,
    write: Callable[[Path], Path] | None,
    ids: list[list[int]],
    kind: type[LazarusError],
    told: str,
) -> None:
    path = model_file if write is None else write(tmp_path / "other.gguf")
    with pytest.raises(kind, match=told):
        record_gguf(path, asked(ids), tmp_path / "recording", EXACT)
    assert not (tmp_path / "recording" / "recording.json").exists()


@in_llama_cpp
def test_a_model_whose_blocks_have_no_name_is_refused(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.recordings.ggml.BLOCK_OUTPUT", "block_output-")
    with pytest.raises(UnsupportedModelError, match=r"names no tensor of llama that is resid_post\.0"):
        record_gguf(model_file, asked(IDS), tmp_path / "recording", EXACT)


@in_llama_cpp
def test_the_command_records_what_activation_diff_compares(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    save_gguf(tmp_path / "model.gguf", tiny_llama(), tiny_tokenizer(), gguf.GGMLQuantizationType.F16)
    model, recording = str(tmp_path / "model.gguf"), str(tmp_path / "recording")
    prompts = ["-p", "Hello, What is AI?"]
    command = ["introspect", "record", "-m", model, *prompts, "-o", recording]
    command += ["--runtime", "llama.cpp", "--logits", "--top-k", "5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    diff = lazarus.activation_diff(base, recording, localize=True)
    assert diff.record.finetuned.runtime == "llama.cpp llama-cpp-python 0.3.36"
    ours = Recording.open(recording)
    texts = [str(prompt.text) for prompt in ours.prompts]
    theirs = lazarus.record(base, texts, tmp_path / "ours", logits=True, top_k=5)
    np.testing.assert_array_equal(ours.rows(0, "top_ids"), theirs.rows(0, "top_ids"))
    np.testing.assert_allclose(ours.rows(0, "top_logprobs"), theirs.rows(0, "top_logprobs"), atol=1e-2)
    for layer in diff.layers:
        assert layer.relative_l2 is not None
        assert layer.relative_l2 < 2e-3
        assert layer.local is not None
        assert layer.local.relative_l2 is not None
        assert layer.local.relative_l2 < 2e-3


@in_llama_cpp
def test_the_examples_of_the_page_run_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    save_gguf(tmp_path / "model-q8_0.gguf", tiny_llama(), tiny_tokenizer(), gguf.GGMLQuantizationType.Q8_0)
    (tmp_path / "prompts.txt").write_text("Hello, how are you?\nWhat is AI?\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(script("record_llama_cpp.py"), "record_llama_cpp.py", "exec"), {})
    exact = Recording.open("in-llama.cpp-exact")
    assert exact.contents.runtime.details["kv_cache"] == "float32"
    (block,) = [
        block for block in blocks() if block.first_line.startswith("lazarus introspect record -m model")
    ]
    Terminal(tmp_path).run(steps_of(block))
    assert len(Recording.open("in-llama.cpp").prompts) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "bfloat16"}, 'dtype="bfloat16"` is about how transformers runs'),
        ({"sites": "all"}, 'sites="all"` is about how transformers runs'),
        ({"position": "response"}, "is not recorded from llama.cpp"),
        ({}, "runs .gguf files, and"),
    ],
)
def test_options_that_are_not_of_llama_cpp_are_refused(
    tmp_path: Path, base_folder: Path, options: dict[str, Any], told: str
) -> None:
    prompts: Any = [{"prompt": "Hello", "response": " you"}]
    with pytest.raises(UsageError, match=told):
        lazarus.record(base_folder, prompts, tmp_path / "recording", runtime="llama.cpp", **options)


def script(title: str) -> str:
    """A block of the page, by its title."""
    return next(block.text for block in blocks() if block.title == title)


def blocks() -> list[Block]:
    """The blocks of the page."""
    return blocks_of("docs/runtimes.md", PAGE.read_text(encoding="utf-8"))


@in_onnx
def test_the_script_of_the_page_records_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    save_model(tmp_path / "base", model, tiny_tokenizer())
    (tmp_path / "prompts.txt").write_text("Hello, how are you?\nWhat is AI?\nHi\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(script("record_onnx.py"), "record_onnx.py", "exec"), {})
    made = Recording.open(tmp_path / "in-onnx")
    assert furthest(made, model, [prompt.ids for prompt in made.prompts]) < 1e-5
    assert made.contents.runtime.name == "onnxruntime"
    diff = lazarus.activation_diff(tmp_path / "base", tmp_path / "in-onnx", localize=True)
    assert diff.summary.verdict != "changed"


# --- SmolLM2

TEXTS = 3


def smollm2(kind: str) -> tuple[Path, Any]:
    """SmolLM2 as a GGUF file, and as transformers reads that file."""
    from benchmarks.ggufs import file_of

    path = file_of(kind)
    where: dict[str, Any] = {"gguf_file": path.name}
    return path, AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)


def recorded(path: Path, folder: Path, options: LlamaCppOptions) -> Recording:
    from benchmarks import places

    texts = places.PROMPTS.read_text(encoding="utf-8").splitlines()[:TEXTS]
    return record_gguf(path, texts, folder, options)


@pytest.mark.real
@in_onnx
def test_smollm2_in_onnx_runtime_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import places

    (tmp_path / "base").symlink_to(places.BASE)
    shutil.copy(places.PROMPTS, tmp_path / "prompts.txt")
    monkeypatch.chdir(tmp_path)
    exec(compile(script("record_onnx.py"), "record_onnx.py", "exec"), {})
    made = Recording.open("in-onnx")
    model = AutoModelForCausalLM.from_pretrained(places.BASE, dtype=torch.float32)
    assert furthest(made, model, [prompt.ids for prompt in made.prompts[:TEXTS]]) < 1e-5


@pytest.mark.real
@in_llama_cpp
def test_smollm2_in_float32_is_that_of_transformers(tmp_path: Path) -> None:
    path, model = smollm2("F32")
    made = recorded(path, tmp_path / "recording", EXACT)
    assert furthest(made, model, [prompt.ids for prompt in made.prompts]) < 1e-5


@pytest.mark.real
@in_llama_cpp
@pytest.mark.parametrize(
    ("kind", "rounding", "usual"), [("F16", "llama.cpp-f16", 3), ("Q8_0", "llama.cpp-q8", 5)]
)
def test_what_llama_cpp_adds_is_how_it_rounds(kind: str, rounding: str, usual: float, tmp_path: Path) -> None:
    """Each block in NumPy, on llama.cpp's own states before it: with its roundings it is closer to it."""
    from benchmarks.runtimes import CONFIG, local_errors, named_weights

    path, _ = smollm2(kind)
    options = LlamaCppOptions(flash_attention=False, repacked=False, n_threads=2)
    made, weights = recorded(path, tmp_path / "recording", options), named_weights(path)
    exact, rounded = (local_errors(made, weights, dtype) for dtype in ("float32", rounding))
    assert np.all(exact / rounded > 1.5), (exact / rounded).min()
    assert np.median(exact / rounded) > usual
    ids = made.prompts[0].ids
    assert relative(forward(weights, CONFIG, ids)["embedding"], made.rows(0, "embedding")) == 0
