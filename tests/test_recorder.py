"""One forward pass: what the model is given, what is read of its output, and what is told of errors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from factories import tiny_llama
from lazarus._transformers import idle_layers
from lazarus.engine.prefix_cache import PrefixCache, holds_keys_and_values, widened
from lazarus.engine.recorder import Recorder, RowSelection, accepted, calling, first_tensor
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.messages import in_flags
from lazarus.models import wrap_model

WHOLE = RowSelection(Tensor.detach, Tensor.detach)


def llama() -> Any:
    return tiny_llama(num_hidden_layers=1)


def final(model: Any, ids: list[list[int]], mask: list[list[int]], prefix: PrefixCache | None = None) -> Any:
    recorder = Recorder(wrap_model(model, "model"))
    return recorder.run(torch.tensor(ids), torch.tensor(mask), WHOLE, prefix_cache=prefix)


# --- What the model is given


def test_a_masked_token_changes_nothing() -> None:
    model = llama()
    seen = final(model, [[7, 3, 41], [50, 3, 41]], [[0, 1, 1]] * 2).final
    assert torch.equal(seen[0, 1:], seen[1, 1:])
    before = PrefixCache(2, final(model, [[5, 17]], [[1, 1]], PrefixCache()).cache)
    seen = final(model, [[7, 3, 41], [50, 3, 41]], [[0, 1, 1]] * 2, before).final
    assert torch.equal(seen[0, 1:], seen[1, 1:])


def test_a_module_is_given_what_it_takes_and_no_cache_unless_one_is_asked_for() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> None: ...

    class Open(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> None: ...

    assert accepted(Plain(), attention_mask=1, other=2) == {"attention_mask": 1, "use_cache": False}
    assert accepted(Open(), other=2) == {"other": 2, "use_cache": False, "return_dict": True}
    assert accepted(Open(), use_cache=True) == {"use_cache": True, "return_dict": True}


# --- What it returns


@dataclass
class Other(ModelOutput):  # type: ignore[misc]
    """An output that does not begin with the last states."""

    pooled: Tensor | None = None
    last_hidden_state: Tensor | None = None


@pytest.mark.parametrize("as_tuple", [True, False])
def test_the_last_states_are_read_by_name_and_else_by_place(as_tuple: bool) -> None:
    model = llama()
    expected = final(model, [[7, 3]], [[1, 1]]).final

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        last = output.last_hidden_state
        return (last, last * 2) if as_tuple else Other(last * 2, last)

    model.model.register_forward_hook(hook)
    assert torch.equal(final(model, [[7, 3]], [[1, 1]]).final, expected)


def test_a_blocks_states_are_the_first_of_what_it_returns() -> None:
    states, other = torch.zeros(1), torch.ones(1)
    for output in (states, (states, other), [states, other], {"a": states, "b": other}):
        assert first_tensor(output) is states
    with pytest.raises(UnsupportedModelError, match="a block returns tuple whose first item is str, not its"):
        first_tensor(("states", states))
    with pytest.raises(UnsupportedModelError, match="a block returns int whose first item is NoneType"):
        first_tensor(3)


# --- A cache that a batch goes on from


def test_a_cache_is_widened_to_a_batch_and_stays_as_it_is() -> None:
    cache, unused = DynamicCache(), DynamicLayer(**({"config": None} if _wants_config() else {}))
    cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    cache.layers += [unused, *(kind() for kind in idle_layers())]
    assert holds_keys_and_values(cache)
    wide = widened(cache, 5)
    assert (wide.layers[0].keys.shape, wide.layers[0].values.shape) == ((5, 2, 3, 4),) * 2
    assert (wide.layers[0].keys == 1).all()
    assert not wide.layers[1].is_initialized
    assert cache.layers[0].keys.shape == (1, 2, 3, 4)


def _wants_config() -> bool:
    """Newer versions of transformers make a layer of a model's configuration."""
    return "config" in inspect.signature(DynamicLayer.__init__).parameters


def test_a_cache_with_anything_else_is_not_one_of_keys_and_values() -> None:
    class Recurrent(DynamicLayer): ...  # type: ignore[misc]  # transformers says nothing of its types

    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert holds_keys_and_values(cache)
    cache.layers.append(Recurrent.__new__(Recurrent))
    assert not holds_keys_and_values(cache)
    assert not holds_keys_and_values(None)


# --- Errors

WHERE = "model, on a batch of (2, 7) tokens"
NOT_ALONE = f"{WHERE}: LlamaForCausalLM does not run on token ids alone:"
OWN_CODE = "is in the model's own code: --debug shows where."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no INDEX\n  there."), f"{NOT_ALONE} no INDEX there. The error (ValueError) {OWN_CODE}"),
        (ValueError("no INDEX."), f"{NOT_ALONE} no INDEX. The error (ValueError) {OWN_CODE}"),
        (ValueError("x" * 400), f"{NOT_ALONE} {'x' * 300}. The error (ValueError) {OWN_CODE}"),
        (KeyError(), f"{NOT_ALONE} KeyError. The error (KeyError) {OWN_CODE}"),
    ],
)
def test_an_error_of_the_model_is_told_on_one_line(error: Exception, expected: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught, calling(wrap_model(llama(), "model"), (2, 7)):
        raise error
    assert in_flags(caught.value.marked) == expected


def test_a_model_of_something_else_than_text_is_told_as_that() -> None:
    model = llama()
    model.main_input_name = "pixel_values"
    with pytest.raises(UnsupportedModelError) as caught, calling(wrap_model(model, "model"), (2, 7)):
        raise ValueError("no pixels")
    assert str(caught.value) == f"{NOT_ALONE} no pixels. Lazarus compares models of text."


LACKS = (
    "\"mm\" not implemented for 'Half'",
    "Could not run 'aten::mm' with it",
    "mm is not currently implemented for the MPS device",
)


@pytest.mark.parametrize("text", LACKS)
@pytest.mark.parametrize(
    ("device", "option", "advice"),
    [
        (
            "cpu",
            "dtype",
            "The CPU has no such operator for this dtype: use another --dtype or --device cuda; quantised "
            "weights keep their dtype, so use an unquantised checkpoint.",
        ),
        ("meta", "device", "Use --device cpu, or another --dtype."),
    ],
)
def test_an_operator_that_a_device_lacks_is_told_with_the_options_that_help(
    device: str, option: str, advice: str, text: str
) -> None:
    model = wrap_model(llama(), "model")
    model.model.to(device)
    with pytest.raises(DeviceError) as caught, calling(model, (2, 7)):
        raise NotImplementedError(text)
    assert in_flags(caught.value.marked) == f"{WHERE}: {text}. {advice}"
    assert caught.value.option == option
