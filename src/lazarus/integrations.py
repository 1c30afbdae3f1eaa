"""Lazarus where users already log: a callback that measures a model while transformers' Trainer trains it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lazarus.activation import Prompts, activation_diff
from lazarus.errors import GateNotMetError, LazarusError, UsageError
from lazarus.messages import option
from lazarus.models import find_tokenizer
from lazarus.options import OptionArguments, Options
from lazarus.prompts import make_prompts
from lazarus.ranks import Rank
from lazarus.result_classes import ActivationDiff

if TYPE_CHECKING:
    from transformers import Trainer

PREFIX = "activation_diff"

_log = logging.getLogger(__name__)


class ActivationDiffCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures the model in training against its start, every so many steps, on given prompts.

        trainer = Trainer(model, args, train_dataset=..., processing_class=tokenizer)
        trainer.add_callback(ActivationDiffCallback(trainer, ["Hello", "17 + 15 ="], every=100))

    What it finds goes through `trainer.log`, so to every reporter that the Trainer has (TensorBoard, Weights
    & Biases, Trackio): `activation_diff/max_divergence`, `/most_divergent_layer`, `/divergence_layer_N` (1 −
    cosine similarity, 0 to 2, mean over prompts), and, of causal models, `/kl_base_finetuned` (nats) and
    `/top1_agreement` (0 to 1); of classifiers and reward models `/mean_absolute_difference`, `/agreement` and
    `/rank_correlation`. `last` is the latest result, whole.

    Gates (`fail_above`, `expect`) are held at every measurement after the first: `activation_diff/gate_met`
    is 1 or 0, with a warning that says why. A step that could not be measured has not met its gate. Training
    goes on in any case.

    The start is a copy of the weights that are trained; frozen ones are shared, so with an adapter it costs
    next to nothing. Where training resumes from a checkpoint, it is that checkpoint: give `base` for another
    one. It is measured before the first step too, so that what is wrong with the prompts is said then.
    Training is not touched: weights, random numbers and modes are as without the callback. Of several
    processes the first one measures and the others wait.

    Args:
        trainer: the Trainer that it is added to.
        prompts: as those of `activation_diff`.
        every: the number of steps between two measurements; the last step is measured as well.
        base: a model in memory, or a recording of one, to measure against, instead of the start.
        tokenizer: instead of the Trainer's `processing_class`; a folder or Hub id names one.
        save_dir: a folder for every result, as `step-N.json`.
        options: those of `activation_diff`.

    Raises:
        UsageError: an option, the prompts or `every` are wrong, or there is no tokenizer.
        ModelError: the tokenizer that is named cannot be loaded.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Prompts,
        *,
        every: int = 100,
        base: PreTrainedModel | str | Path | None = None,
        tokenizer: Any | None = None,
        save_dir: str | Path | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        chosen = Options.make(**options)
        if every < 1:
            raise UsageError(f"every={every}: give a number of steps of at least 1.")
        if chosen.work_dir is not None:
            raise UsageError(
                f"{option('work_dir')}: the weights are other ones at each step, so no step can go on with "
                "what another has left. Leave it out.",
                option="work_dir",
            )
        self.trainer, self.every, self.base = trainer, every, base
        self.prompts = make_prompts(
            prompts, no_split=chosen.no_split, responses=chosen.position == "response"
        )
        self.options = options
        own = getattr(trainer, "processing_class", None)
        self.tokenizer = find_tokenizer(
            own if tokenizer is None else tokenizer, trust_remote_code=chosen.trust_remote_code
        )
        if self.tokenizer is None:
            raise UsageError("the Trainer has no processing_class. Give the callback a tokenizer.")
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.last: ActivationDiff | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the start, and measure once.

        Raises:
            UsageError: the weights are spread over several processes.
            LazarusError: this model cannot be measured on these prompts.
        """
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            raise UsageError(
                "ActivationDiffCallback: DeepSpeed and FSDP spread the weights over processes, so none has a "
                "model to measure. Save checkpoints, and compare those by their folders."
            )
        if not state.is_world_process_zero:
            return
        if self.base is None:
            self.base = copy_of_start(kwargs["model"])
        if self.save_dir is not None:
            self.save_dir.mkdir(parents=True, exist_ok=True)
        self._measure(kwargs["model"], state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure every so many steps, and the last one; what cannot be measured is warned of.

        Hours of training are not lost to a measurement that fails, such as one of weights that are NaN. (Not
        in `on_train_end`: by then, reporters have closed their files.)
        """
        step = state.global_step
        is_last = step == state.max_steps or control.should_training_stop
        if not state.is_world_process_zero or not (is_last or step % self.every == 0):
            return
        try:
            self._measure(kwargs["model"], state, control)
        except LazarusError as error:
            _log.warning("step %d was not measured: %s", step, error)
            self._log(dict.fromkeys(self._gate_names(), 0.0), control)

    def _measure(self, model: Any, state: TrainerState, control: TrainerControl) -> None:
        assert self.base is not None
        options: OptionArguments = {"device": _device_of(model), **self.options}
        # `Rank()`: the other processes wait, so this one must not share the work with them.
        self.last = activation_diff(
            self.base, model, self.prompts, tokenizer=self.tokenizer, rank=Rank(), **options
        )
        if self.save_dir is not None:
            self.last.save(self.save_dir / f"step-{state.global_step}.json")
        self._log(scalars(self.last) | (self._hold_gates(state) if state.global_step else {}), control)

    def _gate_names(self) -> list[str]:
        """The name under which the gates are logged; none where there is no gate."""
        given = self.options.get("fail_above") is not None or self.options.get("expect") is not None
        return [f"{PREFIX}/gate_met"] if given else []

    def _hold_gates(self, state: TrainerState) -> dict[str, float]:
        """Hold the latest result against the gates."""
        assert self.last is not None
        try:
            self.last.check_gates(
                fail_above=self.options.get("fail_above"),
                expect=self.options.get("expect"),
                only_compared=self.options.get("only_compared", False),
            )
        except GateNotMetError as error:
            _log.warning("step %d: %s", state.global_step, error)
            return dict.fromkeys(self._gate_names(), 0.0)
        return dict.fromkeys(self._gate_names(), 1.0)

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        # Logging tells the Trainer that this step has been logged. It has not: the loss is still to come, and
        # all processes gather it together.
        should_log = control.should_log
        if values:
            self.trainer.log(values)
        control.should_log = should_log


def copy_of_start(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in which what is trained is its own, and what is frozen is shared."""
    # `deepcopy` takes what its memo has as copied already: the frozen weights stay the same objects.
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, frozen)


def scalars(diff: ActivationDiff) -> dict[str, float]:
    """Return what is logged of a result; what could not be measured is left out."""
    found: dict[str, float | None] = {
        "max_divergence": diff.summary.max_divergence,
        "most_divergent_layer": diff.summary.most_divergent_layer,
        **{f"divergence_layer_{layer.layer}": layer.divergence for layer in diff.layers},
    }
    output = diff.record.output
    if output is not None:
        found |= {
            "kl_base_finetuned": output.kl_base_finetuned,
            "top1_agreement": output.top1_agreement,
        }
    if output is not None and output.scores is not None:
        found |= {
            "mean_absolute_difference": output.scores.mean_absolute_difference,
            "agreement": output.scores.agreement,
            "rank_correlation": output.scores.rank_correlation,
        }
    return {f"{PREFIX}/{name}": value for name, value in found.items() if value is not None}


def _device_of(model: PreTrainedModel) -> str:
    """Return the device's name as the option `device` spells it."""
    device = model.device
    return str(device) if device.type == "cuda" else device.type
