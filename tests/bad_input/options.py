"""Options that are missing, unknown, or of a value that they do not take."""

from __future__ import annotations

from unittest.mock import patch

from bad_input.kind import BadInput, compare, typed

DIFF = ("introspect", "activation-diff")

KINDS = (
    BadInput(
        "no base model",
        "left out `-b`",
        lambda _: [*DIFF, "-f", "finetuned", "-p", "Hello"],
        ("Missing option", "--base"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "no fine-tuned model",
        "left out `-f`",
        lambda _: [*DIFF, "-b", "base", "-p", "Hello"],
        ("Missing option", "--finetuned"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "no prompts option",
        "left out `-p`",
        lambda _: [*DIFF, "-b", "base", "-f", "finetuned"],
        ("Missing option", "--prompts"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "unknown command",
        "`lazarus introspect activation-dif`",
        lambda _: ["introspect", "activation-dif"],
        ("No such command", "activation-dif"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "unknown option",
        "`--treshold 0.2`",
        typed("--treshold", "0.2"),
        ("No such option: --treshold", "--threshold"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "unquoted prompt",
        "`-p What is AI`, without quotation marks",
        lambda _: [*compare(p="What"), "is", "AI"],
        ("unexpected extra argument", "is AI"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "threshold not a number",
        "`--threshold high`",
        typed("--threshold", "high"),
        ("Invalid value for '--threshold'", "number"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "threshold NaN",
        "`--threshold nan`",
        typed("--threshold", "nan"),
        ("--threshold nan", "from 0 to 2"),
        exit_code=2,
    ),
    BadInput(
        "threshold negative",
        "`--threshold -0.1`",
        typed("--threshold", "-0.1"),
        ("--threshold -0.1", "from 0 to 2"),
        exit_code=2,
    ),
    BadInput(
        "threshold infinite",
        "`--threshold inf`",
        typed("--threshold", "inf"),
        ("--threshold inf", "from 0 to 2"),
        exit_code=2,
    ),
    BadInput(
        "gate NaN",
        "`--fail-above nan`",
        typed("--fail-above", "nan"),
        ("--fail-above nan", "from 0 to 2"),
        exit_code=2,
    ),
    BadInput(
        "position unknown",
        "`--position middle`",
        typed("--position", "middle"),
        ("--position middle", "auto, last, mean, all", "index"),
        exit_code=2,
    ),
    BadInput(
        "position not whole",
        "`--position 1.5`",
        typed("--position", "1.5"),
        ("--position 1.5", "index"),
        exit_code=2,
    ),
    BadInput(
        "dtype unknown",
        "`--dtype int8`",
        typed("--dtype", "int8"),
        ("--dtype int8", "float32", "bfloat16"),
        exit_code=2,
    ),
    BadInput(
        "device unknown",
        "`--device tpu`",
        typed("--device", "tpu"),
        ("--device tpu", "cpu", "cuda:N"),
        exit_code=2,
    ),
    BadInput(
        "device without its number",
        "`--device cuda:`",
        typed("--device", "cuda:"),
        ("--device cuda:", "cuda:N"),
        exit_code=2,
    ),
    BadInput(
        "device absent",
        "`--device cuda:7` where there is none",
        typed("--device", "cuda:7"),
        ("--device cuda:7", "no such device", "0 CUDA devices", "--device cpu"),
        around=lambda: patch("torch.cuda.device_count", return_value=0),
    ),
    BadInput(
        "batch of nothing",
        "`--batch-tokens 0`",
        typed("--batch-tokens", "0"),
        ("--batch-tokens 0", "at least 1"),
        exit_code=2,
    ),
    BadInput(
        "memory unknown",
        "`--memory stream`",
        typed("--memory", "stream"),
        ("--memory stream", "auto or resident"),
        exit_code=2,
    ),
    BadInput(
        "alignment unknown",
        "`--align words`",
        typed("--align", "words"),
        ("--align words", "ids or text"),
        exit_code=2,
    ),
    BadInput(
        "layers path empty",
        "`--layers-path ''`",
        typed("--layers-path", ""),
        ("--layers-path", "empty", "model.layers"),
        exit_code=2,
    ),
    BadInput(
        "layers path wrong",
        "`--layers-path transformer.h`",
        typed("--layers-path", "transformer.h"),
        ("--layers-path transformer.h", "LlamaForCausalLM", "model.layers"),
    ),
)
