"""Every option of activation-diff, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from lazarus.errors import UsageError
from lazarus.options.checks import DTYPES, check_bound, check_choice, check_device, check_gates, check_known

NAMED_POSITIONS = ("auto", "last", "mean", "all")
MEMORY_MODES = ("auto", "resident", "stream")
ALIGNMENTS = ("ids", "text")


@dataclass(frozen=True)
class Options:
    """The options of `activation_diff`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    position: str | int = "auto"
    threshold: float = 0.1
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int | None = None
    chat_template: str = "none"
    memory: str = "auto"
    align: str = "ids"
    localize: bool = False
    readout: str | None = None
    token_prompts: str = "auto"
    no_noise_floor: bool = False
    fail_above: float | None = None
    expect: Literal["identical", "changed"] | None = None
    only_compared: bool = False
    no_split: bool = False
    truncate: bool = False
    layers_path: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    work_dir: str | None = None

    def __post_init__(self) -> None:
        _check_position(self.position)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("memory", self.memory, MEMORY_MODES)
        check_choice("align", self.align, ALIGNMENTS)
        if self.align == "text" and self.position not in ("auto", "last", "mean"):
            raise UsageError(
                f"--align text compares where the text ends, and --position is {self.position}. "
                "Use last or mean."
            )
        check_gates(self.fail_above, self.expect)
        if self.expect is not None and self.no_noise_floor:
            raise UsageError(
                f"--expect {self.expect} asks for more than the noise, and --no-noise-floor leaves the "
                "noise unmeasured. Leave one of the two out."
            )
        if self.readout is not None:
            parse_readout(self.readout)
        if not isinstance(parse_token_prompts(self.token_prompts), str) and self.position != "all":
            raise UsageError(
                f"--token-prompts {self.token_prompts} keeps every token of these prompts, and --position is "
                f"{self.position}. Use --position all."
            )
        check_bound("threshold", self.threshold)
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise UsageError(f"--batch-tokens {self.batch_tokens}: give a number of at least 1.")
        check_device(self.device)
        if self.layers_path == "":
            raise UsageError("--layers-path is empty. Give a path such as model.layers.")
        if self.work_dir == "":
            raise UsageError("--work-dir is empty. Name a folder.")

    def template_file(self) -> Path | None:
        """The file that `chat_template` names, if it names one."""
        return None if self.chat_template in ("none", "base", "finetuned") else Path(self.chat_template)


class OptionArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    position: str | int
    threshold: float
    dtype: str
    device: str
    batch_tokens: int | None
    chat_template: str
    memory: str
    align: str
    localize: bool
    readout: str | None
    token_prompts: str
    no_noise_floor: bool
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    only_compared: bool
    no_split: bool
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool
    work_dir: str | None


def make_options(**given: Any) -> Options:
    """Options from keyword arguments.

    Raises:
        UsageError: an unknown option, or a value that it does not take.
    """
    check_known(Options, given)
    return Options(**given)


def read_template(options: Options) -> str | None:
    """The text of the template file, if `--chat-template` names one.

    Raises:
        UsageError: the file cannot be read.
    """
    path = options.template_file()
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--chat-template {path}: not UTF-8: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}. Convert the file to UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--chat-template {path}: cannot be read: {reason}. Write none, base or finetuned (in "
            "compare: model1 or model2), or the path of a Jinja template."
        ) from error


def _check_position(position: str | int) -> None:
    if isinstance(position, int) or position in NAMED_POSITIONS:
        return
    try:
        int(position)
    except ValueError as error:
        raise UsageError(
            f"--position {position}: not a position. Write auto, last, mean, all, or a token's index "
            "such as 0 or -2."
        ) from error


def parse_position(position: str | int) -> Literal["auto", "last", "mean", "all"] | int:
    """`auto`, `last`, `mean`, `all`, or an index (negative from the end), already checked.

    >>> parse_position("-2")
    -2
    """
    match position:
        case "auto" | "last" | "mean" | "all":
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
            f"--readout {readout}: not layers. Write auto, all, or layers such as 7,15,-1."
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
    numbers = [number.strip() for number in chosen.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UsageError(
            f"--token-prompts {chosen}: not prompts. Write auto, none, or numbers of prompts, from 0, such "
            "as 0,3."
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
            f"--token-prompts {chosen}: there is no prompt {absent[0]} among {n_prompts}, counted from 0."
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
        return sorted({max(0, round(n_layers * quarter / 4) - (quarter == 4)) for quarter in (1, 2, 3, 4)})
    for layer in chosen:
        if not -n_layers <= layer < n_layers:
            raise UsageError(
                f"--readout {readout}: there is no layer {layer} in models of {n_layers} layers."
            )
    return sorted({layer % n_layers for layer in chosen})
