"""What an adapter's layers are told apart by: the model's own weights, and whether they add anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from factories import tiny_llama
from lazarus.models.adapted import (
    adapter_layers,
    adds_nothing,
    brought_state,
    computed_buffers,
    has_zero_product,
    is_off,
    own_state,
)


class Net(nn.Module):
    """Layers for adapters, and buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(5, 3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("made", torch.arange(3.0), persistent=False)
        self.register_buffer("absent", None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.second(self.first(self.table(ids)))
        return states


def lora(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), **settings)


def put_on(net: nn.Module, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one with biases cannot be merged
        return get_peft_model(net, config)


def layer_of(config: PeftConfig, name: str = "first") -> Any:
    return put_on(Net(), config).get_submodule(f"base_model.model.{name}")


# --- Whose a tensor is


def test_the_models_own_state_and_what_an_adapter_brought_are_all_that_is_stored() -> None:
    net = Net()
    before = net.state_dict(keep_vars=True)
    put_on(net, lora("first"))
    own = dict(own_state(net))
    assert own.keys() == before.keys()
    assert all(own[name] is before[name] for name in before)
    assert brought_state(net).keys() == {"first.lora_A.default.weight", "first.lora_B.default.weight"}


def test_a_module_of_the_models_own_may_have_the_name_that_peft_gives_to_its() -> None:
    net: Any = Net()
    net.token_adapter = nn.Linear(3, 3)
    assert dict(own_state(net)).keys() == net.state_dict().keys()


def test_computed_buffers_are_those_that_the_model_itself_does_not_store() -> None:
    net: Any = Net()
    put_on(net, lora("first"))
    net.first.register_buffer("cache", torch.ones(1), persistent=False)  # such as BOFT's permutation
    found = computed_buffers(net)
    assert found.keys() == {"made"}
    assert found["made"] is net.made


# --- Layers of other kinds


def test_a_layer_of_pefts_that_is_no_tuner_is_an_adapters_and_may_do_anything() -> None:
    """It has no switch, and no list of adapters."""
    attention = tiny_llama(num_hidden_layers=1).model.layers[0].self_attn
    layer = AdaptedAttention("llama", 2, attention)
    model = nn.ModuleDict({"attention": layer})
    assert adapter_layers(model) == [layer]
    assert [name for name, _ in own_state(model)] == [f"attention.{name}" for name in attention.state_dict()]
    assert not is_off(layer)
    assert not has_zero_product(layer)
    assert adds_nothing(layer) is None


class Gated(LoraLinear):  # type: ignore[misc]  # it has no types
    """Another library's kind of LoRA, with one gate for all adapters beside their factors."""

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "gate")


def test_a_tuner_of_another_library_is_an_adapters_layer_and_may_do_anything() -> None:
    net: Any = Net()
    put_on(net, lora("first"))
    net.first.__class__ = Gated
    net.first.gate = nn.Parameter(torch.ones(1))
    assert adapter_layers(net) == [net.first]
    assert not has_zero_product(net.first)
    assert adds_nothing(net.first) is None


def test_of_a_layer_without_a_module_under_it_nothing_is_known() -> None:
    layer = layer_of(lora("first"))
    layer.inner = layer._modules.pop("base_layer")
    assert adds_nothing(layer) is None


# --- Which adapters act


def test_a_layer_is_off_when_it_is_switched_off_or_no_adapter_of_it_is_active() -> None:
    layer = layer_of(lora("first"))
    layer.lora_B["default"].weight.data.fill_(1.0)
    assert (is_off(layer), adds_nothing(layer)) == (False, False)
    layer.enable_adapters(False)
    assert (is_off(layer), adds_nothing(layer)) == (True, True)
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert (is_off(layer), adds_nothing(layer)) == (True, True)
    assert not has_zero_product(layer)


def test_of_several_adapters_each_counts_where_it_is() -> None:
    net: Any = Net()
    wrapped = put_on(net, lora("first"))
    wrapped.add_adapter("other", lora("second"))
    wrapped.add_adapter("third", lora("first"))
    wrapped.base_model.set_adapter(["default", "other"])
    assert adds_nothing(net.first) is True
    wrapped.base_model.set_adapter(["default", "third"])
    assert has_zero_product(net.first)
    net.first.lora_B["third"].weight.data.fill_(1.0)
    assert not has_zero_product(net.first)
    assert adds_nothing(net.first) is False


# --- Whether they add anything


def _fill(part: str, value: float) -> Callable[[Any], None]:
    """Set all of one tensor of a layer."""
    return lambda layer: layer.get_parameter(part).data.fill_(value)


def _set(part: str, value: float) -> Callable[[Any], None]:
    """Set the first number of one tensor of a layer."""

    def change(layer: Any) -> None:
        layer.get_parameter(part).data.view(-1)[0] = value

    return change


def _as_variant(layer: Any) -> None:
    layer.lora_variant["default"] = object()


A, B, BIAS = (f"lora_{name}" for name in ("A.default.weight", "B.default.weight", "B.default.bias"))
MAGNITUDE = "lora_magnitude_vector.default.weight"
PLAIN, BIASED, DORA = lora("first"), lora("first", lora_bias=True), lora("first", use_dora=True)
IA3 = IA3Config(target_modules=["first"], feedforward_modules=[])


@pytest.mark.parametrize(
    ("config", "changes", "nothing", "zero"),
    [
        (PLAIN, [], True, True),
        (PLAIN, [_set(B, 1.0)], False, False),
        (PLAIN, [_set(A, 0.0)], True, True),
        (PLAIN, [_fill(A, 0.0), _fill(B, 1.0)], True, True),
        (PLAIN, [_set(A, torch.inf)], None, False),
        (PLAIN, [lambda layer: layer.to("meta")], None, False),
        (PLAIN, [_as_variant], None, False),
        (BIASED, [], True, True),
        (BIASED, [_set(B, 1.0)], False, False),
        (BIASED, [_fill(A, 0.0), _set(BIAS, 1.0)], False, False),
        (BIASED, [_set(BIAS, 1.0)], False, False),
        (BIASED, [_fill(A, 0.0), _set(B, torch.inf)], None, False),
        (DORA, [], False, True),
        (DORA, [_set(MAGNITUDE, torch.nan)], False, True),
        (DORA, [_fill(MAGNITUDE, 0.0), _set(B, 1.0)], False, False),
        (IA3, [], True, False),
        (IA3, [_set("ia3_l.default", 2.0)], False, False),
    ],
)
def test_an_adapter_adds_nothing_where_a_factor_is_zero_and_nothing_else_acts(
    config: PeftConfig, changes: list[Callable[[Any], None]], nothing: bool | None, zero: bool
) -> None:
    layer = layer_of(config)
    for change in changes:
        change(layer)
    assert adds_nothing(layer) is nothing
    assert has_zero_product(layer) is zero


def test_so_it_is_on_an_embedding() -> None:
    layer = layer_of(lora("table"), "table")
    assert (adds_nothing(layer), has_zero_product(layer)) == (True, True)
    for factor in ("lora_embedding_A", "lora_embedding_B"):
        getattr(layer, factor)["default"].data.fill_(1.0)
    assert (adds_nothing(layer), has_zero_product(layer)) == (False, False)


def test_single_rows_of_an_embedding_add_nothing_while_they_are_its_own() -> None:
    net: Any = Net()
    stored = net.state_dict().keys()
    put_on(net, lora("first", trainable_token_indices={"table": [0, 3]}))
    assert dict(own_state(net)).keys() == stored
    assert [adds_nothing(layer) for layer in adapter_layers(net)] == [True, True]
    net.table.token_adapter.trainable_tokens_delta["default"].data[1, 0] += 1
    assert [adds_nothing(layer) for layer in adapter_layers(net)] == [True, False]
