"""The Trainer's callback: real training, real event files, and training that does not notice it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel, Trainer, TrainingArguments

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from lazarus.errors import PromptDataError, UsageError
from lazarus.integrations import ActivationDiffCallback, copy_of_start, scalars

PROMPTS = ["Hello, how are you", "What is AI", "2 + 2"]
STEPS = 7


def dataset() -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 300, (32, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: PreTrainedModel, folder: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=dataset(), processing_class=tiny_tokenizer()
    )


def train(
    model: PreTrainedModel, folder: Path, *, arguments: dict[str, Any] | None = None, **options: Any
) -> tuple[Trainer, ActivationDiffCallback]:
    trainer = trainer_of(model, folder, **(arguments or {}))
    callback = ActivationDiffCallback(trainer, PROMPTS, **{"every": 3, **options})
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What the Trainer has in its history of the callback, by step."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("activation_diff/")}
        for entry in trainer.state.log_history
        if "activation_diff/max_divergence" in entry
    }


def test_tensorboards_event_file_has_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    arguments = {"report_to": ["tensorboard"]}
    train(tiny_llama(), tmp_path, arguments=arguments, save_dir=tmp_path / "results")
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    saved = {
        int(path.stem.removeprefix("step-")): lazarus.ActivationDiff.load(path)
        for path in (tmp_path / "results").iterdir()
    }
    assert sorted(saved) == [0, 3, 6, 7]
    names = [f"divergence_layer_{i}" for i in range(4)]
    names += ["max_divergence", "most_divergent_layer", "kl_base_finetuned", "top1_agreement"]
    for name in names:
        found = {event.step: event.value for event in events.Scalars(f"train/activation_diff/{name}")}
        expected = {step: scalars(diff)[f"activation_diff/{name}"] for step, diff in saved.items()}
        assert found == pytest.approx(expected, rel=1e-6)
    curve = [saved[step].summary.max_divergence or 0.0 for step in (0, 3, 6, 7)]
    assert curve[0] == 0
    assert curve[1] > 1e-4


def test_training_does_not_notice_it(tmp_path: Path) -> None:
    """Dropout draws random numbers, so weights would part at the first one drawn too many."""
    with_it, without = (tiny_llama(attention_dropout=0.3) for _ in range(2))
    trainer, _ = train(with_it, tmp_path)
    trainer_of(without, tmp_path).train()
    assert len(logged(trainer)) == 4
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]
    for (name, weight), other in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(weight, other), name
        assert weight.requires_grad
    assert with_it.training == without.training


def test_the_last_result_is_start_against_end(tmp_path: Path) -> None:
    model = tiny_llama()
    start = save_model(tmp_path / "start", model, tiny_tokenizer())
    _, callback = train(model, tmp_path, localize=True)
    end = save_model(tmp_path / "end", model, tiny_tokenizer())
    expected = lazarus.activation_diff(str(start), str(end), PROMPTS, localize=True)
    assert callback.last is not None
    assert [row.divergence for row in callback.last.layers] == pytest.approx(
        [row.divergence for row in expected.layers], rel=1e-6
    )
    assert callback.last.summary.most_changed_block == expected.summary.most_changed_block


def test_a_recording_of_the_start_stands_in_for_the_copy(tmp_path: Path) -> None:
    """No copy of the weights is kept; and it may be of what another environment makes of them."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    recording = lazarus.record(
        model, PROMPTS, tmp_path / "start", tokenizer=tokenizer, logits=True, top_k=0
    ).path
    trainer, callback = train(model, tmp_path / "one", base=recording)
    copied, _ = train(tiny_llama(), tmp_path / "other")
    for name, value in logged(copied)[STEPS].items():
        assert logged(trainer)[STEPS][name] == pytest.approx(value, rel=1e-6), name
    assert callback.last is not None
    assert callback.last.record.base.kind == "recording"


def test_an_adapter_is_measured_against_the_base_that_it_shares(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    copied = copy_of_start(model)
    for (name, weight), start in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (weight.data_ptr() == start.data_ptr()) == (not weight.requires_grad), name
    trainer, _ = train(model, tmp_path, localize=True)
    curve = [entry["activation_diff/max_divergence"] for entry in logged(trainer).values()]
    assert curve[0] == 0
    assert min(curve[1:]) > 1e-5


def test_mixed_precision_is_measured_as_well(tmp_path: Path) -> None:
    """Mixed precision puts a wrapper around `forward`, which a copy must not share with the original."""
    trainer, _ = train(tiny_llama(), tmp_path, arguments={"bf16": True})
    assert logged(trainer)[STEPS]["activation_diff/max_divergence"] > 1e-4


def test_another_base_can_be_given(tmp_path: Path) -> None:
    trainer, _ = train(tiny_llama(), tmp_path, base=tiny_llama(seed=5))
    assert logged(trainer)[0]["activation_diff/max_divergence"] > 0.1


class _Breaks(torch.optim.SGD):
    """Makes the weights NaN, as a learning rate that is far too high does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.fill_(torch.nan)


def test_weights_that_are_lost_do_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = _Breaks(model.parameters(), lr=1.0)
    trainer.add_callback(ActivationDiffCallback(trainer, PROMPTS, every=3))
    with caplog.at_level(logging.WARNING, logger="lazarus.integrations"):
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert list(logged(trainer)) == [0]
    assert "step 3 was not measured" in caplog.text


@pytest.mark.parametrize(
    ("gate", "met"), [({"fail_above": 1.9}, 1.0), ({"expect": "identical"}, 0.0), ({}, None)]
)
def test_gates_are_held_and_logged(gate: dict[str, Any], met: float | None, tmp_path: Path) -> None:
    trainer, _ = train(tiny_llama(), tmp_path, **gate)
    found = [entry.get("activation_diff/gate_met") for entry in logged(trainer).values()]
    assert found == [None, *[met] * (len(found) - 1)]


def test_a_step_that_could_not_be_measured_has_not_met_its_gate(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = _Breaks(model.parameters(), lr=1.0)
    trainer.add_callback(ActivationDiffCallback(trainer, PROMPTS, every=3, fail_above=2.0))
    trainer.train()
    found = [
        entry["activation_diff/gate_met"]
        for entry in trainer.state.log_history
        if "activation_diff/gate_met" in entry
    ]
    assert found
    assert set(found) == {0.0}


def test_prompts_that_do_not_fit_stop_it_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(ActivationDiffCallback(trainer, ["word " * 500]))
    with pytest.raises(PromptDataError, match="Prompt 0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_weights_spread_over_processes_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path)
    trainer.add_callback(ActivationDiffCallback(trainer, PROMPTS))
    trainer.is_fsdp_enabled = True
    with pytest.raises(UsageError, match="FSDP spread the weights"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"positon": "last"}, "positon"),
        ({"threshold": 3}, "`threshold=3`"),
        ({"work_dir": "runs"}, "`work_dir`: the weights are other ones at each step"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ActivationDiffCallback(trainer_of(tiny_llama(), tmp_path), PROMPTS, **options)


def test_without_a_tokenizer_it_asks_for_one(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path)
    trainer.processing_class = None
    with pytest.raises(UsageError, match="Give the callback a tokenizer"):
        ActivationDiffCallback(trainer, PROMPTS)
    with pytest.raises(UsageError, match="tokenizer=42: neither a tokenizer"):
        ActivationDiffCallback(trainer, PROMPTS, tokenizer=42)


def test_a_tokenizer_is_named_or_is_in_the_processor_of_the_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path)
    trainer.processing_class = None
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    named = ActivationDiffCallback(trainer, PROMPTS, tokenizer=str(tmp_path / "tokenizer"))
    assert named.tokenizer is not None
    assert named.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    trainer.processing_class = SimpleNamespace(tokenizer=named.tokenizer)
    assert ActivationDiffCallback(trainer, PROMPTS).tokenizer is named.tokenizer


# It ends by os._exit: with gloo, a process that has waited for another one now and then aborts while Python
# shuts down ("terminate called without an active exception"), with a callback that only sleeps as well.
# What each one tells is in a file of its own: lines that two processes print to one pipe may mix.
_IN_TWO = """
import json, os, sys
from pathlib import Path
import torch
from test_integrations import logged, tiny_llama, train
trainer, callback = train(tiny_llama(), Path(sys.argv[1]), save_dir=sys.argv[1] + "/results", every=4)
told = [trainer.args.world_size, len(logged(trainer)), callback.last is not None]
Path(sys.argv[1], f"of-process-{trainer.args.process_index}.json").write_text(json.dumps(told))
torch.distributed.destroy_process_group()
os._exit(0)
"""


def test_of_two_processes_the_first_one_measures(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{_IN_TWO}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"of-process-{process}.json").read_text()) for process in (0, 1)]
    assert told == [[2, 3, True], [2, 0, False]]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        f"step-{step}.json" for step in (0, 4, 7)
    ]
