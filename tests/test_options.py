"""The options of every command: a value of another type is refused by name before anything is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lazarus.errors import UsageError
from lazarus.options.activation import Options
from lazarus.options.lens import CompareOptions
from lazarus.options.option import Checked, Described, described
from lazarus.options.weights import WeightOptions

RECORDS: tuple[Any, ...] = (Options, WeightOptions, CompareOptions)
EVERY = [(record, option) for record in RECORDS for option in described(record).values()]
WRONG: tuple[Any, ...] = (object(), {"a": 1}, b"text", 1.5j)


@pytest.mark.parametrize(("record", "option"), EVERY, ids=lambda value: getattr(value, "name", ""))
def test_a_value_of_another_type_is_refused_by_name(record: type[Checked], option: Described) -> None:
    for value in WRONG:
        with pytest.raises(UsageError, match=r"is of the wrong type\. Give ") as told:
            record.make(**{option.name: value})
        assert told.value.option == option.name


@pytest.mark.parametrize(("record", "option"), EVERY, ids=lambda value: getattr(value, "name", ""))
def test_the_default_is_of_the_right_type(record: type[Checked], option: Described) -> None:
    assert getattr(record.make(**{option.name: option.default}), option.name) == option.default


@pytest.mark.parametrize("value", ["no", "false", "yes", 0, 1, None])
@pytest.mark.parametrize("name", ["trust_remote_code", "localize", "truncate"])
def test_a_switch_is_true_or_false_and_nothing_that_python_takes_for_one(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="Give True or False"):
        Options.make(**{name: value})


@pytest.mark.parametrize(
    ("record", "given", "expected"),
    [
        (Options, {"threshold": True}, "Give a number"),
        (Options, {"threshold": "a"}, "Give a number"),
        (Options, {"batch_tokens": 1.5}, "Give a whole number"),
        (Options, {"position": 1.0}, "Give a text or a whole number"),
        (Options, {"readout": [1]}, "Give a text"),
        (Options, {"seed": 2**70}, "from 0 to"),
        (Options, {"seed": -1}, "from 0 to"),
        (CompareOptions, {"top_k": "5"}, "Give a whole number"),
        (CompareOptions, {"track": 3}, "Give a text or a list of texts"),
        (WeightOptions, {"allow_pickle": "no"}, "Give True or False"),
    ],
    ids=str,
)
def test_a_wrong_value_says_what_to_give(record: type[Checked], given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as told:
        record.make(**given)
    assert told.value.option in given


def test_numbers_of_numpy_are_numbers() -> None:
    options = Options.make(threshold=np.float32(0.5), batch_tokens=np.int64(8), fail_above=1)
    assert (options.threshold, options.batch_tokens, options.fail_above) == (0.5, 8, 1)
