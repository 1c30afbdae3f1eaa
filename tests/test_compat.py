"""The demo pair through the public surface: what every version of transformers from 5.5 on must do.

`make test-compat` runs this file with the oldest version, one in the middle and the newest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lazarus
from factories import save_model, tiny_tokenizer
from ggufs import write_gguf
from lazarus import _transformers
from lazarus.demo import BASE, FINETUNED, PROMPTS
from lazarus.errors import MissingPackageError, TokenizerMismatchError
from lazarus.integrations import ActivationDiffCallback

RECORDINGS = "LAZARUS_RECORDINGS"
"""the folder in which each version has recorded the demo's base"""
TEXTS = ["12 + 7 =", "If the file does not exist, then the", "What is 6 * 9? The answer is"]


Refused = Callable[[str], None]


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Refused:
    """Return what notes that this version refuses, and why: the table in the docs has it."""
    return partial(record_property, "refused")


def states_of(folder: Path, text: str) -> np.ndarray:
    """What transformers itself says of the last token: [layers, width], in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    found = []
    hooks = [
        block.register_forward_hook(
            lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[0, -1].double())
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).numpy()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj", "down_proj"], r=4, layers_to_transform=[5]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_activation_diff_is_what_transformers_says() -> None:
    diff = lazarus.activation_diff(BASE, FINETUNED, TEXTS, no_noise_floor=True)
    pairs = [(states_of(BASE, text), states_of(FINETUNED, text)) for text in TEXTS]
    cosines = [(b * f).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(f, axis=1) for b, f in pairs]
    found = np.array([layer.cosine_similarity for layer in diff.layers], dtype=np.float64)
    np.testing.assert_allclose(found, np.mean(cosines, axis=0), atol=1e-5)


def test_a_model_is_identical_to_itself() -> None:
    assert lazarus.activation_diff(BASE, BASE, TEXTS, localize=True).summary.verdict == "identical"


def test_weight_diff_is_what_numpy_says() -> None:
    diff = lazarus.weight_diff(BASE, FINETUNED)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (BASE, FINETUNED))
    row = next(row for row in diff.results if row.name == "model.layers.3.mlp.up_proj.weight")
    b, f = (tensors[row.name].double().numpy() for tensors in (ours, theirs))
    assert row.relative_change == pytest.approx(np.linalg.norm(f - b) / np.linalg.norm(b), rel=1e-9)
    assert (row.component, row.layer) == ("mlp_up", 3)


def test_compare_ends_with_what_the_models_say() -> None:
    found = lazarus.compare(BASE, FINETUNED, "12 + 7 =")
    for model, folder in zip(found.models, (BASE, FINETUNED), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([tokenizer("12 + 7 =")["input_ids"]])
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -1]
        assert model.layers[-1].top[0].token_id == int(logits.argmax())


def test_recordings_of_every_version_are_of_the_same_model(tmp_path: Path) -> None:
    """`make test-compat` records with each version first; elsewhere there is that of this one alone."""
    folder = Path(os.environ.get(RECORDINGS, tmp_path))
    if RECORDINGS not in os.environ:
        lazarus.record(BASE, TEXTS, tmp_path / "own", logits=True, top_k=0)
    recordings = sorted(folder.iterdir())
    assert recordings
    for recording in recordings:
        diff = lazarus.activation_diff(BASE, recording, TEXTS, localize=True)
        assert diff.summary.verdict in ("identical", "within_noise"), recording
        diff.check_gates(expect="identical", only_compared=True)
        assert lazarus.compare(BASE, recording, TEXTS[0]).record.summary.max_js == pytest.approx(0, abs=1e-9)


def test_an_adapter_changes_what_comes_after_it(adapter: Path) -> None:
    diff = lazarus.activation_diff(BASE, f"{BASE}+{adapter}", TEXTS, localize=True)
    changed = [layer.layer for layer in diff.layers if layer.relative_l2]
    assert changed == [5, 6, 7]
    assert [layer.layer for layer in diff.layers if layer.local and layer.local.relative_l2] == [5]


def test_weight_diff_sees_the_update_of_an_adapter(adapter: Path) -> None:
    rows = lazarus.weight_diff(BASE, f"{BASE}+{adapter}").results
    changed = {(row.layer, row.component) for row in rows if row.relative_change}
    assert changed == {(5, "attn_q"), (5, "mlp_down")}


def test_a_pair_that_is_read_block_by_block_is_the_same_pair() -> None:
    streamed, resident = (
        lazarus.activation_diff(BASE, FINETUNED, TEXTS, memory=memory) for memory in ("stream", "resident")
    )
    assert [layer.divergence for layer in streamed.layers] == [layer.divergence for layer in resident.layers]


def test_a_prefix_that_all_prompts_share_runs_once() -> None:
    texts = [f"{' '.join(TEXTS * 4)} {number} + 1 =" for number in range(20)]
    shared = lazarus.activation_diff(BASE, FINETUNED, texts)
    alone = lazarus.activation_diff(BASE, FINETUNED, [*texts, "1 + 1 ="])
    assert "shared-prefix" in shared.note_codes
    assert any(note.endswith("the same in all prompts, ran once") for note in shared.notes)
    found, expected = shared.record.results.column("divergence"), alone.record.results.column("divergence")
    np.testing.assert_allclose(found, expected[:-1], rtol=1e-3, atol=1e-7)


def test_a_gguf_file_is_the_checkpoint_that_it_was_made_of(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    saved = save_model(tmp_path / "base", model, tiny_tokenizer(model.config.vocab_size))
    rows = lazarus.weight_diff(saved, write_gguf(tmp_path / "base.gguf", "llama", model)).results
    assert {row.relative_change for row in rows} == {0.0}


def test_prompts_run_through_a_gguf_file(tmp_path: Path, refused: Refused) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    saved = save_model(tmp_path / "base", model, tiny_tokenizer(model.config.vocab_size))
    file = write_gguf(tmp_path / "base.gguf", "llama", model)
    ours = AutoTokenizer.from_pretrained(saved)(TEXTS)["input_ids"]
    if AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(TEXTS)["input_ids"] != ours:
        with pytest.raises(TokenizerMismatchError):
            lazarus.activation_diff(saved, file, TEXTS)
        refused("transformers reads another tokenizer from the file: it leaves BOS out")
        return
    assert lazarus.activation_diff(saved, file, TEXTS).summary.verdict in ("identical", "within noise")


def test_the_callback_measures_a_model_while_it_is_trained(tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    callback = ActivationDiffCallback(trainer, TEXTS, every=1)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.last is not None
    assert callback.last.summary.verdict == "changed"


def test_the_command_line_prints_and_saves_and_shows_again(tmp_path: Path) -> None:
    saved = tmp_path / "found.json"
    run = [sys.executable, "-m", "lazarus"]
    pair = ["-b", str(BASE), "-f", str(FINETUNED)]
    done = subprocess.run(
        [*run, "introspect", "activation-diff", *pair, "-p", f"@{PROMPTS}", "-o", str(saved)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(saved.read_bytes())["environment"]["transformers"] == _transformers.VERSION
    shown = subprocess.run([*run, "show", str(saved)], capture_output=True, text=True)
    assert shown.stdout.strip() in done.stdout


@pytest.mark.parametrize("version", ["4.57.6", "5.4.1"])
def test_a_transformers_that_is_too_old_is_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(
        MissingPackageError, match=rf"needs transformers 5\.5 or newer, and {version} is installed"
    ):
        _transformers.check_version(version)


def test_a_series_is_measured_step_by_step() -> None:
    found = lazarus.series(BASE, [BASE, FINETUNED], TEXTS)
    assert [member.summary.verdict for member in found.record.members] == ["identical", "changed"]
