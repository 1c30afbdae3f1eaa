"""Standard output of compare."""

from __future__ import annotations

from collections.abc import Iterator

from lazarus.render.base.escape import escaped
from lazarus.render.lens.summary import last_choice, summary_lines, title
from lazarus.render.lens.tokens import quoted, quoted_token, shortened
from lazarus.results import CompareRecord, LensModel, TokenEvolution

BAR = "=" * 70
HEADER = "Model                                    Top Token        Prob"
RULE = "-" * 65


def loading(name: str) -> str:
    """The line that is printed before a model is loaded."""
    return f"Loading: {escaped(name)}"


def body(record: CompareRecord) -> str:
    """The prompt, the final predictions, the tracked tokens, and the summary with its notes."""
    prompt = f"{BAR}\nPrompt: {quoted(shortened(record.prompt))}\n{BAR}"
    return "\n\n".join([prompt, predictions(record), evolution(record), summary(record)])


def predictions(record: CompareRecord) -> str:
    """Return what each model's lens reads after the last block: its first choice."""
    rows = [_prediction(model) for model in (record.model1, record.model2)]
    return "\n".join(["=== Final Predictions ===", HEADER, RULE, *rows])


def evolution(record: CompareRecord) -> str:
    """Return where each tracked token emerges, in each of the models."""
    blocks = [
        "\n".join([f"Token {quoted_token(title(record, index))}:", *_evolutions(record, index)])
        for index in range(len(record.tracked))
    ]
    return "\n\n".join(["=== Token Evolution Comparison ===", *blocks])


def summary(record: CompareRecord) -> str:
    """Return what a reader needs besides the rows, and then the notes."""
    return "\n".join([*summary_lines(record), *(f"Note: {escaped(note)}" for note in record.notes)])


def page(record: CompareRecord) -> str:
    """All of it, as the command line prints it."""
    head = [loading(model.info.id) for model in (record.model1, record.model2)]
    return "\n".join([*head, "", body(record)])


def emergence(found: TokenEvolution) -> str:
    """`emerges at layer 12`, `never emerges`, or why that is not known."""
    if found.token is None:
        return "has no such token"
    if found.final_probability is None:
        return "not known, since nothing is read at the end"
    if found.emergence_layer is None:
        return "never emerges"
    return f"emerges at layer {found.emergence_layer}"


def _prediction(model: LensModel) -> str:
    choice = last_choice(model)
    token = "-" if choice is None else escaped(choice.token)
    probability = None if choice is None else choice.probability
    return f"{escaped(model.info.id):<40} {token:<16} {_nan(probability):.4f}"


def _evolutions(record: CompareRecord, index: int) -> Iterator[str]:
    for model in (record.model1, record.model2):
        found, name = model.tracked[index], escaped(model.info.id)
        final = "" if found.token is None else f", final prob {_nan(found.final_probability):.4f}"
        yield f"  {name:<37}: {emergence(found)}{final}"


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
