"""Every option of activation-diff, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypedDict

from lazarus.errors import UsageError
from lazarus.foreign import UnreadableError, as_text, content, user_path
from lazarus.messages import option
from lazarus.options.checks import check_bound, check_choice, check_count, check_named
from lazarus.options.common import (
    Anonymous,
    Dequantize,
    Device,
    Dtype,
    Expectation,
    LayersPath,
    NoDigests,
    OnlyCompared,
    Seed,
    TrustRemoteCode,
    check_expectation,
)
from lazarus.options.option import COMPARE, READ, RUN, Checked, Option
from lazarus.options.values import EACH_TOKEN, NAMED_POSITIONS, parse_readout, parse_token_prompts

MEMORY_MODES = ("auto", "resident", "stream")
ALIGNMENTS = ("ids", "text")
SITES = ("blocks", "all")
ATTRIBUTED = ("blocks", "tensors")


def _check_position(name: str, position: str | int) -> None:
    if isinstance(position, int) or position in NAMED_POSITIONS:
        return
    try:
        int(position)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{option(name, position)}: not a position. Write auto, last, mean, all, response, or a token's "
            "index such as 0 or -2.",
            option=name,
        ) from error


def _check_readout(_: str, value: str) -> None:
    parse_readout(value)


def _check_token_prompts(_: str, value: str) -> None:
    parse_token_prompts(value)


Position = Annotated[
    str | int,
    Option(
        "Which tokens are compared: the last one; the mean of the hidden states; every token, averaged "
        "within a prompt; every token of the response, and the one before it; or index N. auto is last for a "
        "causal model, mean for an encoder.",
        COMPARE,
        "auto|last|mean|all|response|N",
        check=_check_position,
    ),
]
Threshold = Annotated[float, Option("The divergence that *** marks.", COMPARE, "X", check=check_bound)]
Align = Annotated[
    str,
    Option(
        "The same token ids for both, refused where the tokenizers differ on these prompts; or each model "
        "reads the text with its own tokenizer, compared where the text ends.",
        COMPARE,
        "ids|text",
        check=partial(check_choice, choices=ALIGNMENTS),
    ),
]
Localize = Annotated[
    bool, Option("Also measure what each block itself adds, apart from what it inherits.", COMPARE)
]
Sites = Annotated[
    str,
    Option(
        "all also compares what is inside each block: the outputs of attention and MLP, and in a mixture of "
        "experts the router's logits and the experts that it picks.",
        COMPARE,
        "blocks|all",
        check=partial(check_choice, choices=SITES),
    ),
]
Attribute = Annotated[
    str | None,
    Option(
        "What each block, or each tensor, contributes to KL(base‖fine-tuned) of the next token, in nats that "
        "add up; by gradients, in memory.",
        COMPARE,
        "blocks|tensors",
        shown_default="off",
        check=partial(check_choice, choices=ATTRIBUTED),
    ),
]
Readout = Annotated[
    str | None,
    Option(
        "The tokens that the fine-tune promotes and suppresses: mined from the logits at every compared "
        "position, and of the mean difference at these layers (7,15,-1).",
        COMPARE,
        "auto|all|LAYERS",
        shown_default="off",
        check=_check_readout,
    ),
]
TokenPrompts = Annotated[
    str,
    Option(
        "With --position all or response, the prompts (counted from 0) of which every token is kept; auto is "
        "the most divergent ones.",
        COMPARE,
        "auto|none|N,M,...",
        check=_check_token_prompts,
    ),
]
NoiseFrom = Annotated[
    str | None,
    Option(
        "Another recording of base, such as the other runtime's: what it differs by counts as noise too.",
        COMPARE,
        "RECORDING",
        shown_default="off",
        check=partial(check_named, advice="Name the folder of a recording."),
    ),
]
NoNoiseFloor = Annotated[bool, Option("Leave out the measurement of the numerical noise.", COMPARE)]
FailAbove = Annotated[
    float | None,
    Option(
        "Exit 3 where a layer's divergence is above X.",
        COMPARE,
        "X",
        shown_default="off",
        check=check_bound,
    ),
]
Expect = Annotated[
    Expectation | None,
    Option(
        "Exit 3 where the two models are not that, beyond the noise.",
        COMPARE,
        "identical|changed",
        shown_default="off",
        check=check_expectation,
    ),
]
ChatTemplate = Annotated[
    str,
    Option(
        "Wrap each prompt as a user turn, the same text for both models.", READ, "none|base|finetuned|FILE"
    ),
]
NoSplit = Annotated[bool, Option("Each -p is one prompt.", READ)]
Truncate = Annotated[bool, Option("Cut prompts at the models' context instead of refusing them.", READ)]
BatchTokens = Annotated[
    int | None, Option("Tokens in one batch.", RUN, "N", shown_default="auto", check=check_count)
]
Memory = Annotated[
    str,
    Option(
        "Both models in memory, or a block of each at a time, read from disk.",
        RUN,
        "auto|resident|stream",
        check=partial(check_choice, choices=MEMORY_MODES),
    ),
]
WorkDir = Annotated[
    str | None,
    Option(
        "Keep what is done in this folder, so that an interrupted run goes on where it was, and several "
        "processes share the work.",
        RUN,
        "DIR",
        shown_default="off",
        check=partial(check_named, advice="Name a folder."),
    ),
]


@dataclass(frozen=True)
class Options(Checked):
    """The options of `activation_diff`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    position: Position = "auto"
    threshold: Threshold = 0.1
    align: Align = "ids"
    localize: Localize = False
    sites: Sites = "blocks"
    attribute: Attribute = None
    readout: Readout = None
    token_prompts: TokenPrompts = "auto"
    no_noise_floor: NoNoiseFloor = False
    noise_from: NoiseFrom = None
    fail_above: FailAbove = None
    expect: Expect = None
    only_compared: OnlyCompared = False
    chat_template: ChatTemplate = "none"
    no_split: NoSplit = False
    truncate: Truncate = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = None
    memory: Memory = "auto"
    dequantize: Dequantize = "auto"
    layers_path: LayersPath = None
    seed: Seed = 0
    trust_remote_code: TrustRemoteCode = False
    no_digests: NoDigests = False
    anonymous: Anonymous = False
    work_dir: WorkDir = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align == "text" and self.position not in ("auto", "last", "mean"):
            raise UsageError(
                f"{option('align', 'text')} compares where the text ends, and {option('position')} is "
                f"{self.position}. Use last or mean.",
                option="position",
            )
        if self.noise_from is not None and self.no_noise_floor:
            raise UsageError(
                f"{option('noise_from', self.noise_from)} measures the noise, and "
                f"{option('no_noise_floor', True)} leaves it unmeasured. Leave one of the two out.",
                option="noise_from",
            )
        if self.expect is not None and self.no_noise_floor:
            raise UsageError(
                f"{option('expect', self.expect)} asks for more than the noise, and "
                f"{option('no_noise_floor', True)} leaves the noise unmeasured. Leave one of the two out.",
                option="no_noise_floor",
            )
        if not isinstance(parse_token_prompts(self.token_prompts), str) and self.position not in EACH_TOKEN:
            raise UsageError(
                f"{option('token_prompts', self.token_prompts)} keeps every token of these prompts, and "
                f"{option('position')} is {self.position}. Use {option('position', 'all')} or response.",
                option="token_prompts",
            )

    def template_file(self) -> Path | None:
        """The file that `chat_template` names, if it names one."""
        return None if self.chat_template in ("none", "base", "finetuned") else Path(self.chat_template)


class OptionArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    position: Position
    threshold: Threshold
    align: Align
    localize: Localize
    sites: Sites
    attribute: Attribute
    readout: Readout
    token_prompts: TokenPrompts
    no_noise_floor: NoNoiseFloor
    noise_from: NoiseFrom
    fail_above: FailAbove
    expect: Expect
    only_compared: OnlyCompared
    chat_template: ChatTemplate
    no_split: NoSplit
    truncate: Truncate
    dtype: Dtype
    device: Device
    batch_tokens: BatchTokens
    memory: Memory
    dequantize: Dequantize
    layers_path: LayersPath
    seed: Seed
    trust_remote_code: TrustRemoteCode
    no_digests: NoDigests
    anonymous: Anonymous
    work_dir: WorkDir


def read_template(options: Options) -> str | None:
    """The text of the template file, if `chat_template` names one.

    Raises:
        UsageError: the file cannot be read.
    """
    path = options.template_file()
    if path is None:
        return None
    try:
        return as_text(content(user_path(path), may_be_piped=True))
    except UnreadableError as error:
        raise UsageError(
            f"{option('chat_template', path)}: cannot be read: {error}. Write none, base or finetuned (in "
            "compare: model1 or model2), or the path of a Jinja template.",
            option="chat_template",
        ) from error
