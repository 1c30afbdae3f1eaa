"""Whether two values are the same: yes, no, or not known, which is never yes."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import CellType, FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

from factories import tiny_llama
from flattened import Scaled, Sealed
from lazarus.models import Equality, has_non_finite, same_bits
from lazarus.models.equality import every, inert, is_one

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


# --- Edges: of each answer the value, not only that it is no yes


@dataclass(slots=True)
class Slots:
    value: Any
    later: Any = field(init=False)


class OneSlot(Plain):
    """An object with attributes, and one more in a slot."""

    __slots__ = "extra"

    def __init__(self, extra: Any) -> None:
        super().__init__(a=1)
        self.extra = extra


class Phase(complex):
    """A number, and attributes that it has besides."""


class Meta(type):
    pass


class Odd(Plain, metaclass=Meta):
    """One whose class may answer for it."""


def unbound() -> Callable[[Any], Any]:
    """A function over a name that is not bound yet."""
    return FunctionType(scaled_by(1).__code__, globals(), closure=(CellType(),))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Slots(1), Slots(1), True),
        (Slots(1), Slots(2), False),
        (OneSlot(1), OneSlot(1), True),
        (OneSlot(1), OneSlot(2), False),
        (unbound(), unbound(), True),
        (Phase(1), Phase(1), None),
        (Phase(1), Phase(2), None),
        (Odd(a=1), Odd(a=1), None),
        ({Plain()}, {Plain()}, None),
        ({1, Plain()}, {1, Plain()}, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_is_looked_for_in_slots_and_what_hides_it_is_not_known(
    one: Any, other: Any, expected: bool | None
) -> None:
    assert same(one, other) is expected


def test_inference_tensors_do_not_count_what_is_written_to_them() -> None:
    with torch.inference_mode():
        one, other, third = torch.ones(2), torch.ones(2), torch.zeros(2)
    assert same(one, other) is True
    assert same(one, third) is False


class Overriding(nn.Parameter):
    """A parameter that answers for itself to what it is asked by name, and not by its attributes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.as_subclass, torch.equal):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def overriding(value: float) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return Overriding(torch.full((2,), value), requires_grad=False)


class Shifted(Scaled):
    """One that has a zero point or has none."""

    zero: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names, context = super().__tensor_flatten__()
        return ([*names, "zero"] if hasattr(self, "zero") else names), context


def shifted(*zero: Tensor) -> Shifted:
    made = Shifted(torch.tensor([1, 2], dtype=torch.int8), torch.tensor(0.5))
    for each in zero:
        made.zero = each
    return made


EMPTY = torch.ones(1, 2).expand(0, 2), torch.ones(1, 4)[:, ::2].expand(0, 2)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (overriding(1.0), overriding(1.0), True),
        (overriding(1.0), overriding(2.0), False),
        (shifted(), shifted(), True),
        (shifted(), shifted(torch.ones(1)), False),
        (shifted(torch.ones(1)), shifted(torch.zeros(1)), False),
        (torch.ones(2), shifted(), False),
        # Of other scales the elements may still stand for the same numbers: that is not known.
        (with_scales(1.0, torch.ones(1)), with_scales(1.0, torch.zeros(1)), None),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0]).expand(2), False),
        (*EMPTY, True),
        (torch.eye(2), torch.eye(2).to_sparse(), None),
    ],
)
def test_tensors_of_two_kinds_or_layouts(one: Tensor, other: Tensor, expected: bool | None) -> None:
    assert same_bits(one, other) is expected
    assert same_bits(other, one) is expected


def test_one_memory_is_one_tensor_and_no_memory_is_none() -> None:
    tensor = torch.ones(4)
    assert is_one(tensor, tensor.view(4))
    assert not is_one(tensor, tensor.clone())
    assert not is_one(tensor, tensor[:3])
    assert is_one(torch.ones(0), torch.ones(0))
    without = torch.ones(4, device="meta"), torch.ones(4, device="meta")
    assert without[0].data_ptr() == without[1].data_ptr() == 0
    assert not is_one(*without)


MOST, MOST_HALF = torch.finfo(torch.float32).max, torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.ones(3), False),
        (torch.ones(0), False),
        (torch.tensor([1.0, NAN, 1.0]), True),
        (torch.tensor([1.0, torch.inf]), True),
        (torch.tensor([-torch.inf, torch.inf]), True),
        (torch.full((4,), MOST), False),
        (torch.tensor([MOST, MOST, NAN]), True),
        (torch.full((4,), MOST_HALF).half(), False),
        (torch.tensor([1.0, torch.inf]).half(), True),
        (torch.tensor([1.0, NAN]).bfloat16(), True),
        (torch.ones(3).to(torch.float8_e4m3fn), False),
        (torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn), True),
        (torch.tensor([1, 2]), False),
        (nn.Parameter(torch.tensor([1.0, NAN])), True),
        (torch.ones(2, device="meta"), False),
        (shifted(), False),
    ],
)
def test_nan_and_infinity_are_found_where_a_sum_overflows_or_not(weight: Tensor, expected: bool) -> None:
    assert has_non_finite(weight) is expected


class Shift(nn.Module):
    """Adds a buffer; its parameter and its type are those of any other."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("by", torch.tensor([by]))


def test_modules_are_the_same_with_their_buffers_and_inside_of_other_values() -> None:
    assert Equality().same_layers(Shift(1.0), Shift(2.0)) is True
    for one, other, expected in ((1.0, 1.0, True), (1.0, 2.0, False)):
        assert Equality().same_module(Shift(one), Shift(other)) is expected
        assert same([Shift(one)], [Shift(other)]) is expected


def test_a_module_is_the_same_as_itself_whatever_it_holds() -> None:
    module: Any = Shift(1.0)
    module.lock = threading.Lock()
    assert Equality().same_layers(module, module) is True


def plain_hook(_module: nn.Module, _args: Any) -> None:
    """A hook of whoever uses the model: nothing says that it changes nothing."""


def test_hooks_count_but_for_those_that_are_known_to_compute_nothing() -> None:
    one, other = Shift(1.0), Shift(1.0)
    one.register_forward_pre_hook(inert(lambda _module, _args: None))
    assert Equality().same_layers(one, other) is True
    one.register_forward_pre_hook(plain_hook)
    assert Equality().same_layers(one, other) is False
    other.register_forward_pre_hook(plain_hook)
    assert Equality().same_layers(one, other) is True


def test_what_transformers_leaves_on_a_model_that_was_asked_for_hidden_states_does_not_count() -> None:
    one, other = (tiny_llama(num_hidden_layers=1) for _ in range(2))
    one(torch.tensor([[1, 2]]), output_hidden_states=True)
    asked, plain = one.model.layers[0], other.model.layers[0]
    assert asked._forward_hooks
    assert Equality().same_layers(asked, plain) is True
    assert Equality().same_layers(one, other) is True
