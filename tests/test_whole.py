"""A model that makes its weights ready when the whole of it first runs, though only its stack is compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.models import wrap_model
from lazarus.models.load import load_pair
from lazarus.models.opening import LoadOptions
from lazarus.models.reference import parse_model

TEXTS = ["t5 t17 t80", "t9 t33", "t12 t77 t31"]


def packed(model: Any, at: Any = None) -> Any:
    """A copy whose down projections are stored in 8 bits, until what `at` picks of it first runs."""
    model = copy.deepcopy(model)
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    for linear in layers:
        scale = linear.weight.abs().amax() / 100
        linear.scale = scale
        linear.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def unpack(_module: nn.Module, _args: Any, _kwargs: Any = None) -> None:
        for linear in layers:
            linear.weight = nn.Parameter(linear.weight.to(torch.float32) * linear.scale)
        handle.remove()

    handle = (at(model) if at else model).register_forward_pre_hook(unpack)
    return model


def unpacked(model: Any) -> Any:
    """The same weights, unpacked by hand."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            weight: Tensor = layer.mlp.down_proj.weight
            scale = weight.abs().amax() / 100
            weight.copy_((weight / scale).round() * scale)
    return model


def compare(base: Any, finetuned: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), no_noise_floor=True)


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_the_first_whole_pass_unpacks_are_unpacked(side: int) -> None:
    """Of two models of one design only the first is probed with its head."""
    plain = tiny_llama()
    pair, expected = [plain, plain], [plain, plain]
    pair[side], expected[side] = packed(plain), unpacked(plain)
    found, wanted = compare(*pair), compare(*expected)
    assert [layer.divergence for layer in found.layers] == [layer.divergence for layer in wanted.layers]
    assert found.summary.max_divergence


def test_it_is_so_too_where_the_hook_is_replaced_by_a_forward_of_the_models_own() -> None:
    plain = tiny_llama()
    model = packed(plain)
    hook = next(iter(model._forward_pre_hooks.values()))
    model._forward_pre_hooks.clear()
    forward, done = model.forward, list[bool]()

    def unpacking(*args: Any, **kwargs: Any) -> Any:
        if not done:
            hook(model, ())
            done.append(True)
        return forward(*args, **kwargs)

    model.forward = unpacking
    found = compare(plain, model)
    assert [r.divergence for r in found.layers] == [
        r.divergence for r in compare(plain, unpacked(plain)).layers
    ]


def test_the_stack_alone_would_not_run_on_packed_weights() -> None:
    """Otherwise the tests above would prove nothing."""
    model = packed(tiny_llama())
    with pytest.raises(RuntimeError, match=r"dtype|Char"):
        model.model(torch.tensor([[1, 2]]))


def test_a_checkpoint_is_run_once_when_it_is_loaded_and_what_is_unpacked_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of transformers that hooks itself, as a quantiser does while a checkpoint is loaded."""
    folders = [
        save_model(tmp_path / name, model, tiny_tokenizer())
        for name, model in (("base", tiny_llama()), ("tuned", perturbed(tiny_llama())))
    ]
    ran: list[tuple[int, ...]] = []
    original = type(tiny_llama()).__init__

    def hooked(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.register_forward_pre_hook(
            lambda _m, _a, given: ran.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )

    monkeypatch.setattr(type(tiny_llama()), "__init__", hooked)
    options = LoadOptions(None, torch.device("cpu"))
    base, finetuned = (parse_model(str(folder)) for folder in folders)
    pair = load_pair(base, finetuned, options, lambda _role, _name: None)
    assert len(ran) == len({id(model.model) for model in pair})
    assert not any(p.requires_grad for model in pair for p in model.model.parameters())


def test_a_model_in_memory_keeps_what_is_trained() -> None:
    model = packed(tiny_llama())
    wrapped = wrap_model(model, "model")
    assert wrapped.notes == ()
    assert model.lm_head.weight.requires_grad


def test_a_model_that_does_not_run_whole_is_noted() -> None:
    model = tiny_llama()

    def images_too(_module: nn.Module, _args: Any) -> None:
        raise ValueError("pixel_values are missing")

    model.register_forward_pre_hook(images_too)
    [note] = wrap_model(model, "model").notes
    assert note.code == "hooked-model"
    assert "pixel_values are missing" in note.text


def test_nothing_runs_where_nothing_is_hooked() -> None:
    model = tiny_llama()
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert wrap_model(model, "model").notes == ()
