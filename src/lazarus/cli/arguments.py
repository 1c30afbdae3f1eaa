"""Every option as the user types it: its names, its help and the panel of the help it stands in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

RUN, COMPARE, READ, SHOW = "How it runs", "What is compared", "How prompts are read", "What it shows"


def _option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


Base = Annotated[
    str, _option("-b", "--base", metavar="MODEL", help="Base model: Hub id, folder, .gguf, MODEL+ADAPTER.")
]
Finetuned = Annotated[
    str,
    _option(
        "-f",
        "--finetuned",
        metavar="MODEL",
        help="Fine-tuned model; an adapter alone runs on top of BASE.",
    ),
]
Prompts = Annotated[
    list[str],
    _option(
        "-p",
        "--prompts",
        metavar="PROMPTS",
        help='Prompts: "one,two,three", @FILE (.txt, .jsonl, .json, .csv, .tsv, .parquet) or @- for standard '
        "input. Repeatable.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    _option(
        "-o",
        "--output",
        metavar="FILE",
        help="Save the results; the suffix names the format (.json, .csv, .parquet, .md, .html, .png, "
        ".svg, .pdf; any other is JSON). Repeatable.",
    ),
]
Result = Annotated[str, typer.Argument(metavar="RESULT.json", help="What a command saved with -o FILE.json.")]
Position = Annotated[
    str,
    _option(
        panel=COMPARE,
        metavar="auto|last|mean|all|N",
        help="Which tokens are compared: the last one; the mean of the hidden states; every token, averaged "
        "within a prompt; or index N. auto is last for a causal model, mean for an encoder.",
    ),
]
Threshold = Annotated[float, _option(panel=COMPARE, metavar="X", help="The divergence that *** marks.")]
AnotherThreshold = Annotated[
    float | None,
    _option(
        "--threshold",
        panel=COMPARE,
        metavar="X",
        help="The divergence that *** marks.",
        show_default="that of the run",
    ),
]
Align = Annotated[
    str,
    _option(
        panel=COMPARE,
        metavar="ids|text",
        help="The same token ids for both, refused where the tokenizers differ on these prompts; or each "
        "model reads the text with its own tokenizer, compared where the text ends.",
    ),
]
Localize = Annotated[
    bool,
    _option(
        "--localize",
        panel=COMPARE,
        help="Also measure what each block itself adds, apart from what it inherits.",
    ),
]
ReadoutLayers = Annotated[
    str | None,
    _option(
        "--readout",
        panel=COMPARE,
        metavar="auto|all|LAYERS",
        help="Read the mean difference at these layers (7,15,-1) as the tokens that it promotes and "
        "suppresses.",
        show_default="off",
    ),
]
TokenPrompts = Annotated[
    str,
    _option(
        "--token-prompts",
        panel=COMPARE,
        metavar="auto|none|N,M,...",
        help="With --position all, the prompts (counted from 0) of which every token is kept; auto is the "
        "most divergent ones.",
    ),
]
NoNoiseFloor = Annotated[
    bool,
    _option("--no-noise-floor", panel=COMPARE, help="Leave out the measurement of the numerical noise."),
]
Expect = Annotated[
    str | None,
    _option(
        panel=COMPARE,
        metavar="identical|changed",
        help="Exit 3 where the two models are not that, beyond the noise.",
        show_default="off",
    ),
]
OnlyCompared = Annotated[
    bool,
    _option(
        "--only-compared",
        panel=COMPARE,
        help="Gates look at what was compared, and not at what else the two checkpoints hold.",
    ),
]
FailAbove = Annotated[
    float | None,
    _option(
        panel=COMPARE, metavar="X", help="Exit 3 where a layer's divergence is above X.", show_default="off"
    ),
]
ChatTemplate = Annotated[
    str,
    _option(
        panel=READ,
        metavar="none|base|finetuned|FILE",
        help="Wrap each prompt as a user turn, the same text for both models.",
    ),
]
NoSplit = Annotated[bool, _option("--no-split", panel=READ, help="Each -p is one prompt.")]
Truncate = Annotated[
    bool,
    _option("--truncate", panel=READ, help="Cut prompts at the models' context instead of refusing them."),
]
Dtype = Annotated[
    str,
    _option(
        panel=RUN,
        metavar="auto|float32|bfloat16|float16",
        help="What the models run in; auto is float32 on a CPU, the stored type on a GPU.",
    ),
]
Device = Annotated[str, _option(panel=RUN, metavar="auto|cpu|cuda[:N]|mps", help="Where the models run.")]
BatchTokens = Annotated[
    int | None, _option(panel=RUN, metavar="N", help="Tokens in one batch.", show_default="auto")
]
Memory = Annotated[
    str,
    _option(
        panel=RUN,
        metavar="auto|resident|stream",
        help="Both models in memory, or a block of each at a time, read from disk.",
    ),
]
LayersPath = Annotated[
    str | None,
    _option(
        panel=RUN,
        metavar="PATH",
        help="Where the blocks are, such as model.layers, when they cannot be found.",
        show_default="found",
    ),
]
Seed = Annotated[int, _option(panel=RUN, metavar="N", help="Of every random choice.")]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", panel=RUN, help="Allow a model's own Python code.")
]
WorkDir = Annotated[
    str | None,
    _option(
        panel=RUN,
        metavar="DIR",
        help="Keep what is done in this folder, so that an interrupted run goes on where it was, and several "
        "processes share the work.",
        show_default="off",
    ),
]
Quiet = Annotated[bool, _option("-q", "--quiet", panel=SHOW, help="No progress bars, no logs.")]
Debug = Annotated[bool, _option("--debug", panel=SHOW, help="Tracebacks and logs.")]

WeightThreshold = Annotated[
    float, _option("--threshold", panel=COMPARE, metavar="X", help="The relative change that *** marks.")
]
SpectrumOption = Annotated[
    bool,
    _option(
        "--spectrum",
        panel=COMPARE,
        help="Also each update's singular values: its rank, and whether it looks like an adapter's.",
    ),
]
WeightFailAbove = Annotated[
    float | None,
    _option(
        "--fail-above",
        panel=COMPARE,
        metavar="X",
        help="Exit 3 where a tensor's relative change is above X.",
        show_default="off",
    ),
]
WeightExpect = Annotated[
    str | None,
    _option(
        "--expect",
        panel=COMPARE,
        metavar="identical|changed",
        help="Exit 3 where the two checkpoints are not that, bit for bit.",
        show_default="off",
    ),
]
AllowPickle = Annotated[
    bool,
    _option(
        "--allow-pickle",
        panel=RUN,
        help="Read .bin checkpoints too, by torch's loader of plain tensors (weights_only).",
    ),
]

Model1 = Annotated[
    str,
    _option(
        "-m1",
        "--model1",
        "-b",
        "--base",
        metavar="MODEL",
        help="First model: Hub id, folder, .gguf, MODEL+ADAPTER.",
    ),
]
Model2 = Annotated[
    str,
    _option(
        "-m2",
        "--model2",
        "-f",
        "--finetuned",
        metavar="MODEL",
        help="Second model; an adapter alone runs on top of MODEL1.",
    ),
]
OnePrompt = Annotated[
    list[str],
    _option(
        "-p",
        "--prompt",
        metavar="PROMPT",
        help="The prompt, its commas kept; or @FILE (.txt, .jsonl, .json, .csv, .tsv, .parquet) with one "
        "prompt in it, or @- for standard input.",
    ),
]
TopK = Annotated[
    int, _option("--top-k", panel=COMPARE, metavar="N", help="How many tokens are kept of each layer.")
]
Track = Annotated[
    str | None,
    _option(
        "--track",
        panel=COMPARE,
        metavar="TOKENS",
        help='Tokens that are followed through the layers: "42, Paris". A word is its first token, with or '
        "without a space before it.",
        show_default="the first choices of both",
    ),
]
LensChatTemplate = Annotated[
    str,
    _option(
        "--chat-template",
        panel=READ,
        metavar="none|model1|model2|FILE",
        help="Wrap the prompt as a user turn, the same text for both models.",
    ),
]
LensTruncate = Annotated[
    bool,
    _option("--truncate", panel=READ, help="Cut the prompt at the models' context instead of refusing it."),
]
