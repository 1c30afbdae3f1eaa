"""Whether two values are the same: yes, no, or not known, which is never yes."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

from factories import tiny_llama
from flattened import Scaled, Sealed
from lazarus.models import Equality, same_bits
from lazarus.models.equality import every

NAN = float("nan")


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Scale:
    factor: float
    steps: list[Any] = field(default_factory=list)

    def double(self) -> float:
        return 2 * self.factor


class Plain:
    """An object of which all is in its attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Secretive(Plain):
    """One that pickles as it likes, so that its attributes need not be all of it."""

    def __getstate__(self) -> object:
        return {}


class Labelled(UserDict[str, Any]):
    """A mapping that says more than its items do."""

    def __init__(self, label: int, **items: Any) -> None:
        super().__init__(items)
        self.label = label


def scaled_by(factor: Any) -> Callable[[Any], Any]:
    return lambda value: value * factor


def ring(value: int) -> list[Any]:
    """A list that holds itself."""
    made: list[Any] = [value]
    made.append(made)
    return made


def same(one: Any, other: Any) -> bool | None:
    answer = Equality().same(one, other)
    assert Equality().same(other, one) is answer
    return answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NAN, float("nan")),
        ((1, "a", None), (1, "a", None)),
        ([torch.float16, torch.device("cpu"), Color.RED], [torch.float16, torch.device("cpu"), Color.RED]),
        ({"a": torch.ones(2), "b": [NAN]}, {"b": [NAN], "a": torch.ones(2)}),
        (UserDict(a=1), UserDict(a=1)),
        (OrderedDict(a=1, b=2), OrderedDict(a=1, b=2)),
        (Labelled(1, a=1), Labelled(1, a=1)),
        (BaseModelOutput(torch.ones(2)), BaseModelOutput(torch.ones(2))),
        (Scale(2.0, [torch.ones(1)]), Scale(2.0, [torch.ones(1)])),
        (Plain(a=1, b=Plain(c=torch.ones(2))), Plain(a=1, b=Plain(c=torch.ones(2)))),
        (scaled_by(2.0), scaled_by(2.0)),
        (scaled_by(torch.ones(2)), scaled_by(torch.ones(2))),
        (partial(torch.clamp, min=0), partial(torch.clamp, min=0)),
        (nn.functional.silu, nn.functional.silu),
        (Scale(1.0).double, Scale(1.0).double),
        (LlamaConfig(), LlamaConfig(name_or_path="elsewhere")),
        ({1, 2}, {2, 1}),
        (ring(1), ring(1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_the_same_contents_is_the_same(one: Any, other: Any) -> None:
    assert same(one, other) is True


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (1.0, NAN),
        (1, True),
        (1, 1.0),
        ("a", "b"),
        (torch.float16, torch.bfloat16),
        (Color.RED, Color.BLUE),
        ((1, 2), [1, 2]),
        ((1, 2), (1, 2, 3)),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
        (UserDict(a=1), UserDict(a=2)),
        (Scale(2.0), Scale(3.0)),
        (Scale(2.0).double, Scale(3.0).double),
        (Plain(a=1), Plain(a=1, b=1)),
        (scaled_by(2.0), scaled_by(3.0)),
        (scaled_by(torch.ones(2)), scaled_by(torch.zeros(2))),
        (scaled_by, same),
        (partial(torch.clamp, min=0), partial(torch.clamp, min=1)),
        (nn.functional.silu, nn.functional.gelu),
        (LlamaConfig(), LlamaConfig(rms_norm_eps=1e-3)),
        (torch.ones(2), "ones"),
        (ring(1), ring(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_differs_in_anything_is_not_the_same(one: Any, other: Any) -> None:
    assert same(one, other) is False


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: np.ones(2),
        lambda: iter([1]),
        lambda: torch.Generator(),
        lambda: Secretive(a=1),
        lambda: Slotted(1),
        lambda: {"a": [threading.Lock()]},
        lambda: Plain(a=threading.Lock()),
        lambda: {Plain()},
        lambda: defaultdict(int, a=1),
    ],
)
def test_of_what_keeps_its_state_to_itself_nothing_is_known(make: Callable[[], Any]) -> None:
    assert same(make(), make()) is not True
    assert same([make(), 1], [make(), 2]) is False, "what is known to differ differs"


def test_a_mapping_with_something_else_beside_the_same_items_is_not_the_same() -> None:
    assert same(Labelled(1, a=1), Labelled(2, a=1)) is None


def test_of_several_answers_no_is_final_and_unknown_is_not_yes() -> None:
    assert every([]) is True
    assert every([True, True]) is True
    assert every([True, None, True]) is None
    assert every([None, False, True]) is False


# --- Tensors

BITS = torch.tensor([1.0, NAN, torch.inf, -0.0])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (BITS, BITS.clone(), True),
        (BITS, nn.Parameter(BITS.clone()), True),
        (BITS, torch.tensor([1.0, NAN, torch.inf, 0.0]), False),
        (BITS.to(torch.float8_e4m3fn), BITS.to(torch.float8_e4m3fn), True),
        (BITS.bfloat16(), BITS.half(), False),
        (BITS, BITS.view(2, 2), False),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous(), True),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(3, 2), False),
        (torch.ones(1, 3).expand(4, 3), torch.ones(1, 3).expand(4, 3), True),
        (torch.ones(1, 3).expand(4, 3), torch.ones(4, 3), True),
        (torch.ones(1, 3).expand(4, 3), torch.zeros(1, 3).expand(4, 3), False),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([1 + 2j]).to(torch.complex128), torch.tensor([1 + 3j]).to(torch.complex128), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.ones(0), torch.ones(0), True),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), None),
        (torch.ones(2), torch.ones(2, device="meta"), None),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), None),
    ],
)
def test_tensors_are_compared_by_their_bits(one: Tensor, other: Tensor, expected: bool | None) -> None:
    assert same_bits(one, other) is expected
    assert same_bits(other, one) is expected


def test_two_views_of_one_memory_are_not_the_same_for_that() -> None:
    square = torch.arange(4.0).view(2, 2)
    assert square.data_ptr() == square.T.data_ptr()
    assert same_bits(square, square.T) is False
    conjugate = torch.tensor([1 + 2j])
    assert same_bits(conjugate, conjugate.conj()) is False


def test_a_subclass_is_compared_by_what_it_is_made_of() -> None:
    codes = torch.tensor([1, -2, 3], dtype=torch.int8)
    one = Scaled(codes, torch.tensor(0.5), "rows")
    assert same_bits(one, Scaled(codes.clone(), torch.tensor(0.5), "rows")) is True
    assert same_bits(one, Scaled(codes + 1, torch.tensor(0.5), "rows")) is False
    assert same_bits(one, Scaled(codes, torch.tensor(0.25), "rows")) is False
    assert same_bits(one, Scaled(codes, torch.tensor(0.5), "columns")) is False
    assert same_bits(one, torch.tensor([0.5, -1.0, 1.5])) is False, "another way to store the same numbers"
    assert same_bits(Sealed(codes), Sealed(codes)) is None
    with pytest.raises(NotImplementedError):
        torch.equal(one, one)


class Quantised(nn.Parameter):
    """As bitsandbytes' parameters: elements of its own, and scales beside them in an attribute."""

    scales: Any


def with_scales(value: float, scales: Any) -> Quantised:
    made = Quantised(torch.full((2,), value), requires_grad=False)
    made.scales = scales
    return made


def test_what_a_parameter_holds_beside_its_elements_counts() -> None:
    one = with_scales(1.0, torch.ones(1))
    assert same_bits(one, with_scales(1.0, torch.ones(1))) is True
    assert same_bits(one, with_scales(2.0, torch.ones(1))) is False
    assert same_bits(one, with_scales(1.0, torch.zeros(1))) is not True
    assert same_bits(one, with_scales(1.0, threading.Lock())) is not True


def test_a_tensor_that_was_written_to_is_compared_again() -> None:
    equality, one, other = Equality(), torch.ones(2), torch.ones(2)
    assert equality.same(one, other) is True
    other[0] = 2
    assert equality.same(one, other) is False


# --- Modules


def eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def function(model: Any) -> None:
    model.model.layers[1].mlp.plain = scaled_by(2.0)


def hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output * 2)


def pre_hook(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))


def forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda states: states


def training(model: Any) -> None:
    model.model.layers[1].train()


@pytest.mark.parametrize("change", [eps, activation, function, hook, pre_hook, forward, training])
def test_layers_are_the_same_only_where_all_that_computes_is(change: Callable[[Any], None]) -> None:
    one, other = tiny_llama(), tiny_llama(seed=1)
    assert Equality().same_layers(one, other) is True, "of other weights, but the same layers"
    assert Equality().same_module(one, other) is False
    other.load_state_dict(one.state_dict())
    assert Equality().same_module(one, other) is True
    change(other)
    assert Equality().same_layers(one, other) is False
    both = copy.deepcopy(other)
    assert Equality().same_layers(other, both) is True, "both were changed in the same way"
