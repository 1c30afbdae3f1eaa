"""Options of activation-diff that are written as text: what each of them says."""

from __future__ import annotations

from typing import Literal

from lazarus.errors import UsageError
from lazarus.messages import option

NAMED_POSITIONS = ("auto", "last", "mean", "all", "response")
EACH_TOKEN = ("all", "response")
"""positions at which several tokens of a prompt are compared, each by itself"""


def parse_position(position: str | int) -> Literal["auto", "last", "mean", "all", "response"] | int:
    """`auto`, `last`, `mean`, `all`, `response`, or an index (negative from the end), already checked.

    >>> parse_position("-2")
    -2
    """
    match position:
        case "auto" | "last" | "mean" | "all" | "response":
            return position
        case _:
            return int(position)


def parse_readout(readout: str) -> Literal["auto", "all"] | list[int]:
    """`auto`, `all`, or layers (negative from the end), separated by commas.

    Raises:
        UsageError: it is none of these.

    >>> parse_readout("7,-1")
    [7, -1]
    """
    match readout:
        case "auto" | "all":
            return readout
    try:
        return [int(layer) for layer in readout.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option('readout', readout)}: not layers. Write auto, all, or layers such as 7,15,-1.",
            option="readout",
        ) from error


def parse_token_prompts(chosen: str) -> Literal["auto", "none"] | list[int]:
    """`auto`, `none`, or the numbers of prompts, from 0, separated by commas.

    Raises:
        UsageError: it is none of these.

    >>> parse_token_prompts("3,0")
    [3, 0]
    """
    match chosen:
        case "auto" | "none":
            return chosen
    numbers = [number.strip() for number in str(chosen).split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UsageError(
            f"{option('token_prompts', chosen)}: not prompts. Write auto, none, or numbers of prompts, from "
            "0, such as 0,3.",
            option="token_prompts",
        )
    return list(dict.fromkeys(map(int, numbers)))


def check_token_prompts(chosen: str, n_prompts: int) -> None:
    """Refuse a prompt that is not there.

    Raises:
        UsageError: it names the first one.
    """
    found = parse_token_prompts(chosen)
    absent = [number for number in found if number >= n_prompts] if isinstance(found, list) else []
    if absent:
        raise UsageError(
            f"{option('token_prompts', chosen)}: there is no prompt {absent[0]} among {n_prompts}, counted "
            "from 0.",
            option="token_prompts",
        )


def readout_layers(readout: str, n_layers: int) -> list[int]:
    """The layers that are read out, in order; `auto` is a quarter, half, three quarters and the end.

    Raises:
        UsageError: the models have no such layer.

    >>> readout_layers("auto", 30), readout_layers("7,-1", 30)
    ([8, 15, 22, 29], [7, 29])
    """
    chosen = parse_readout(readout)
    if chosen == "all":
        return list(range(n_layers))
    if chosen == "auto":
        # The end is the last layer, whose index is one less than their number.
        return sorted({max(0, round(n_layers * quarter / 4) - (quarter == 4)) for quarter in (1, 2, 3, 4)})
    for layer in chosen:
        if not -n_layers <= layer < n_layers:
            raise UsageError(
                f"{option('readout', readout)}: there is no layer {layer} in models of {n_layers} layers.",
                option="readout",
            )
    return sorted({layer % n_layers for layer in chosen})
