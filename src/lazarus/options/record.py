"""Every option of record, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypedDict

from lazarus.errors import UsageError
from lazarus.messages import option
from lazarus.options.activation import (
    BatchTokens,
    Memory,
    NoSplit,
    Options,
    Truncate,
    WorkDir,
)
from lazarus.options.checks import check_choice
from lazarus.options.common import (
    Anonymous,
    Dequantize,
    Device,
    Dtype,
    LayersPath,
    NoDigests,
    TrustRemoteCode,
)
from lazarus.options.option import COMPARE, READ, RUN, Checked, Option

_POSITIONS = ("all", "last", "response")
_RUNTIMES = ("transformers", "llama.cpp")


def _check_position(name: str, position: str | int) -> None:
    if isinstance(position, int) or position in _POSITIONS:
        return
    try:
        int(position)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{option(name, position)}: a recording has no such position. Write all, last, response, or a "
            "token's index such as 0 or -2; a mean is taken when recordings are compared.",
            option=name,
        ) from error


def _check_top_k(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(
            f"{option(name, value)}: not a number of tokens. Give a whole number, or 0 for all.", option=name
        )


Position = Annotated[
    str | int,
    Option(
        "Which tokens are recorded: every one, which any position can be compared at and blocks can run on; "
        "the last one; those of the response, and the one before it; or index N.",
        COMPARE,
        "all|last|response|N",
        check=_check_position,
    ),
]
Sites = Annotated[
    str,
    Option(
        "all also records what is inside each block: the outputs of attention and MLP, and router logits.",
        COMPARE,
        "blocks|all",
        check=partial(check_choice, choices=("blocks", "all")),
    ),
]
Logits = Annotated[
    bool,
    Option("Record the logits at these tokens too, so that the next token is compared.", COMPARE),
]
TopK = Annotated[
    int,
    Option(
        "With --logits, how many of the likeliest tokens are kept at each place; 0 for all.",
        COMPARE,
        "N",
        check=_check_top_k,
    ),
]
ChatTemplate = Annotated[str, Option("Wrap each prompt as a user turn.", READ, "none|model|FILE")]
Runtime = Annotated[
    str,
    Option(
        "What runs the model; llama.cpp runs a .gguf file as it is, by llama-cpp-python.",
        RUN,
        "transformers|llama.cpp",
        check=partial(check_choice, choices=_RUNTIMES),
    ),
]


@dataclass(frozen=True)
class RecordOptions(Checked):
    """The options of `record`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    position: Position = "all"
    sites: Sites = "blocks"
    logits: Logits = False
    top_k: TopK = 100
    chat_template: ChatTemplate = "none"
    no_split: NoSplit = False
    truncate: Truncate = False
    runtime: Runtime = "transformers"
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = None
    memory: Memory = "auto"
    dequantize: Dequantize = "auto"
    layers_path: LayersPath = None
    trust_remote_code: TrustRemoteCode = False
    no_digests: NoDigests = False
    anonymous: Anonymous = False
    work_dir: WorkDir = None

    def of_pair(self) -> Options:
        """Return the options of activation-diff for a pair in which this model is both of the two."""
        return Options(
            # What activation-diff compares by default has no bearing on what is kept of each prompt.
            position=self.position if self.position == "response" else "all",
            sites=self.sites,
            token_prompts="none",
            no_noise_floor=True,
            chat_template="base" if self.chat_template == "model" else self.chat_template,
            no_split=self.no_split,
            truncate=self.truncate,
            dtype=self.dtype,
            device=self.device,
            batch_tokens=self.batch_tokens,
            memory=self.memory,
            dequantize=self.dequantize,
            layers_path=self.layers_path,
            trust_remote_code=self.trust_remote_code,
            no_digests=self.no_digests,
            work_dir=self.work_dir,
        )


class RecordArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    position: Position
    sites: Sites
    logits: Logits
    top_k: TopK
    chat_template: ChatTemplate
    no_split: NoSplit
    truncate: Truncate
    runtime: Runtime
    dtype: Dtype
    device: Device
    batch_tokens: BatchTokens
    memory: Memory
    dequantize: Dequantize
    layers_path: LayersPath
    trust_remote_code: TrustRemoteCode
    no_digests: NoDigests
    anonymous: Anonymous
    work_dir: WorkDir
