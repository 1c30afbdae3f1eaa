"""What a comparison of two models sees of each: the modules that it runs, and the tensors that these read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import lazarus
from architectures import build
from factories import tiny_llama, word_tokenizer
from lazarus.engine import Coverage, find_coverage
from lazarus.models import wrap_model


def coverage_of(model: Any, *, with_head: bool = True) -> Coverage:
    return find_coverage(
        wrap_model(model, "m"), BaseModelOutputWithPastAndCrossAttentions if with_head else None
    )


def test_the_head_is_compared_where_logits_are() -> None:
    model = tiny_llama()
    whole, stack = coverage_of(model), coverage_of(model, with_head=False)
    assert (whole.n_logits, stack.n_logits) == (300, None)
    assert whole.compared.modules - stack.compared.modules == {"", "lm_head"}
    assert whole.compared.tensors == set(model.state_dict())
    assert stack.compared.tensors == set(model.state_dict()) - {"lm_head.weight"}


def test_a_head_that_wants_a_token_is_given_one() -> None:
    """MusicGen's cannot be run on none."""
    model = build("musicgen")
    assert coverage_of(model).n_logits == model.config.vocab_size


def test_a_tied_tensor_is_compared_under_all_of_its_names() -> None:
    compared = coverage_of(tiny_llama(tie_word_embeddings=True), with_head=False).compared
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= compared.tensors
    assert "lm_head" not in compared.modules


def test_a_module_is_compared_under_all_of_its_names() -> None:
    model: Any = tiny_llama()
    model.again = model.model.norm
    assert {"again", "model.norm"} <= coverage_of(model).compared.modules


def test_whatever_runs_between_the_stack_and_the_logits_is_compared() -> None:
    """BERT transforms the states before its LM head."""
    model = build("bert")
    whole, stack = coverage_of(model), coverage_of(model, with_head=False)
    assert whole.n_logits == model.config.vocab_size
    transform = "cls.predictions.transform.dense"
    assert transform in whole.compared.modules - stack.compared.modules
    assert f"{transform}.weight" in whole.compared.tensors - stack.compared.tensors


class Scaled(nn.Linear):
    """A head that reads a tensor of a part that it does not call."""

    def __init__(self) -> None:
        super().__init__(32, 300, bias=False)
        self.scale = nn.Linear(1, 1)

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) * self.scale.weight


def test_a_part_of_the_head_is_compared_though_it_is_not_called() -> None:
    model: Any = tiny_llama()
    model.lm_head = Scaled()
    assert "lm_head.scale.weight" in coverage_of(model).compared.tensors


def test_the_head_is_run_where_the_model_is_and_in_its_dtype() -> None:
    """A device without memory stands for one that tests do not have."""
    model = tiny_llama().to("meta", torch.bfloat16)
    received: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: received.append(args[0]))
    assert coverage_of(model).n_logits == 300
    assert [(states.device.type, states.dtype) for states in received] == [("meta", torch.bfloat16)]


def test_looking_leaves_no_hook_behind() -> None:
    model = tiny_llama()
    coverage_of(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("n_layers", [2, 3], ids=["one design", "two designs"])
def test_heads_whose_logits_are_compared_are_no_part_that_is_not(n_layers: int) -> None:
    base, finetuned = tiny_llama(num_hidden_layers=2), tiny_llama(1, num_hidden_layers=n_layers)
    diff = lazarus.activation_diff(
        base, finetuned, ["t5 t17 t80"], tokenizer=word_tokenizer(), no_noise_floor=True
    )
    assert diff.record.output is not None
    parts = [part.what for side in (diff.record.base, diff.record.finetuned) for part in side.not_compared]
    assert [what for what in parts if "head" in what] == []
