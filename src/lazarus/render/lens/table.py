"""CSV, Parquet and Markdown of compare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from lazarus.render.base.markdown import code, ending, page
from lazarus.render.base.rows import Kind
from lazarus.render.lens.summary import last_choice, names, summary_lines, title
from lazarus.render.lens.text import emergence
from lazarus.render.lens.tokens import quoted, quoted_token
from lazarus.results import CompareRecord, LensModel


def columns(record: CompareRecord) -> dict[str, list[Any]]:
    """The tokens of every layer as columns: one row a model, layer and rank, from 1."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("model", "model_id", "layer", "rank", "token", "token_id", "probability")
    }
    for number, model in enumerate((record.model1, record.model2), 1):
        for layer in model.layers:
            for rank, token in enumerate(layer.top, 1):
                row = (
                    number,
                    model.info.id,
                    layer.layer,
                    rank,
                    token.token,
                    token.token_id,
                    token.probability,
                )
                for values, value in zip(found.values(), row, strict=True):
                    values.append(value)
    return found


KINDS: dict[str, Kind] = {
    "model": "int64",
    "model_id": "string",
    "layer": "int64",
    "rank": "int64",
    "token": "string",
    "token_id": "int64",
    "probability": "float64",
}
"""the types of the columns"""


def write_markdown(record: CompareRecord, stream: IO[bytes]) -> None:
    """The final predictions, the tracked tokens, and the summary with its notes."""
    one, other = names(record)
    lines = [
        f"# {code(one)} against {code(other)}",
        "",
        f"The logit lens at the last token of {code(quoted(record.prompt))}.",
        "",
        *_table("| Model | Top token | Prob |", "|---|---|---:|", _predictions(record)),
        "",
        *_table("| Token | Model | Emergence | Final prob |", "|---|---|---|---:|", _evolutions(record)),
        "",
        *ending(summary_lines(record), record.notes),
    ]
    stream.write(page(lines))


def _table(head: str, rule: str, rows: Iterable[Iterable[str]]) -> list[str]:
    return [head, rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _models(record: CompareRecord) -> list[tuple[str, LensModel]]:
    return list(zip(names(record), (record.model1, record.model2), strict=True))


def _predictions(record: CompareRecord) -> Iterable[Iterable[str]]:
    for name, model in _models(record):
        choice = last_choice(model)
        if choice is None:
            yield code(name), "-", _number(None)
        else:
            yield code(name), code(quoted_token(choice.token)), _number(choice.probability)


def _evolutions(record: CompareRecord) -> Iterable[Iterable[str]]:
    for index in range(len(record.tracked)):
        for name, model in _models(record):
            found = model.tracked[index]
            final = "" if found.token is None else _number(found.final_probability)
            yield code(quoted_token(title(record, index))), code(name), emergence(found), final


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
