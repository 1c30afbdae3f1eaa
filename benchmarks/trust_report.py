"""docs/trust.md and its figure, from what `benchmarks.trust` measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.mutant_results import Figures, Results, read, total
from benchmarks.results import Spread
from benchmarks.trust_results import Cost, Trust, Truth

FIGURE = "local-change.svg"
SHOWN = ("block-7", "block-15", "block-23", "lora-15-29")


def write(source: Path, target: Path) -> None:
    """Write the page and, beside it, the figure."""
    trust = msgspec.json.decode(source.read_bytes(), type=Trust)
    target.write_text("\n\n".join(_page(trust)) + "\n", encoding="utf-8")
    draw([row for row in trust.truth if row.dtype == "float32" and row.name in SHOWN], target.parent / FIGURE)


def draw(rows: Sequence[Truth], target: Path) -> None:
    """Raw divergence above, local change below, one column a pair."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lazarus"
    figure, axes = pyplot.subplots(2, len(rows), figsize=(3 * len(rows), 4.2), sharex=True, squeeze=False)
    for column, row in enumerate(rows):
        layers = range(len(row.local))
        axes[0][column].plot(layers, row.divergence, color="#0072b2")
        axes[1][column].bar(layers, row.local, color="#d55e00")
        axes[0][column].set_title(row.name)
        axes[1][column].set_xlabel("layer")
    axes[0][0].set_ylabel("divergence")
    axes[1][0].set_ylabel("local change (rel. L2)")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _page(trust: Trust) -> list[str]:
    machine = trust.machine
    where = f"{machine.cpu}, {machine.cores} cores" if machine else ""
    return [
        "# What the numbers were held against",
        "Written by `python -m benchmarks.trust --write-docs` from `benchmarks/results/trust.json`, which "
        f"`make trust` measured ({where}). The model is SmolLM2-135M-Instruct unless another "
        "is named. What each number means is in [how-to-read-it.md](how-to-read-it.md).",
        *_truth(trust.truth),
        *_null(trust),
        *_coverage(trust),
        *_readout(trust),
        *_cost(trust.cost),
        *_mutants(read()),
    ]


MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"


def fill_in(page: Path, lines: str, marks: tuple[str, str] = MARKS) -> None:
    """Write what was measured between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    after = rest.partition(marks[1])[2]
    page.write_text(f"{before}{marks[0]}\n\n{lines}\n\n{marks[1]}{after}", encoding="utf-8")


def mutants_table(modules: Sequence[Figures]) -> str:
    """The mutants of each module, and of all together."""
    head = ("module", "mutants", "run", "killed", "survive", "of these, no change of a result")
    rows = [
        (
            f"`{m.module}`",
            *(f"{n}" for n in (m.of, m.mutants, m.killed, m.survived, m.no_result)),
            f"{m.share:.1%}",
        )
        for m in (*modules, total(modules))
    ]
    return table((*head, "killed of the rest"), rows)


def _mutants(results: Results) -> list[str]:
    return [
        "## Whether the tests would notice",
        "`python -m benchmarks.mutants` puts one small fault at a time into the code that decides on numbers "
        "and verdicts: `<` for `<=`, a constant one larger, a statement left out. The tests that run the "
        "statement run on it. A mutant is killed where one of them fails, or does not end. Those that "
        "survive are in `benchmarks/results/mutants.json`, each with the reason why it changes no result, "
        "or with none where a test is missing. Where fewer were run than there are, "
        "they were drawn at random.",
        mutants_table(results.modules),
    ]


def _truth(rows: Sequence[Truth]) -> list[str]:
    zeros = [_truth_row(row) for row in rows]
    return [
        "## Known truth",
        "Models that differ from the base in a known place and nowhere else, on 50 prompts. `block-k`: only "
        "the MLP of block k is fine-tuned. `lora-15-29`: an adapter on the layers from 15 on. "
        "`lora-zero`: an adapter that was never trained. `head`, `norm`: only the output head, only one "
        "norm's scale.",
        table(
            (
                "pair",
                "type",
                "verdict",
                "onset",
                "most divergent",
                "most changed block",
                "local change exactly 0 in",
            ),
            zeros,
        ),
        f"![The raw divergence goes on through later layers; the local change shows the block]({FIGURE})",
        "Above: the raw divergence, which a changed block leaves to every later layer. Below: what each "
        "block's own weights change.",
    ]


def _truth_row(row: Truth) -> list[str]:
    zero = [layer for layer, value in enumerate(row.local) if value == 0]
    told = f"{len(zero)} of {len(row.local)} blocks"
    return [
        row.name,
        row.dtype,
        row.verdict,
        *(_layer(v) for v in (row.onset, row.most_divergent, row.most_changed)),
        told,
    ]


def _layer(value: int | None) -> str:
    return "–" if value is None else str(value)


def _null(trust: Trust) -> list[str]:
    return [
        "## The noise floor: copies that compute the same function",
        "The MLP neurons of every block are put into another order, which changes rounding and nothing else; "
        "1, 5, 10 or 50 prompts a run, drawn anew. The ratio is the largest relative L2 over its floor, over "
        "all sites and the logits: above 1 is called `changed`. The target is at most 5 %.",
        table(
            ("model", "type", "runs", "called changed", "ratio, median", "ratio, 95 %", "ratio, highest"),
            [
                [
                    n.name,
                    n.dtype,
                    str(n.n_runs),
                    f"{n.n_changed} ({n.n_changed / n.n_runs:.1%})",
                    *(f"{r:.2f}" for r in (n.ratio_median, n.ratio_95, n.ratio_highest)),
                ]
                for n in trust.null
            ],
        ),
        "## The smallest change that is found",
        "All matrices of block 15 are moved at random by a share of their norm; ten prompts a run.",
        table(
            ("type", "share of the norm", "called changed"),
            [[p.dtype, f"{p.share:.1e}", f"{p.n_changed} of {p.n_runs}"] for p in trust.power],
        ),
    ]


def _coverage(trust: Trust) -> list[str]:
    found = trust.coverage
    if found is None:
        return []
    return [
        "## The interval",
        f"SmolLM2 and its fine-tune on arithmetic on 1,000 prompts; 100 of them are drawn {found.n_draws:,} "
        "times. The 95 % interval of the 100 holds the mean divergence of all 1,000 in "
        f"{found.lowest:.1%} to {found.highest:.1%} of the draws, by layer "
        f"({found.mean:.1%} over all layers). The target is 90 % to 98 %.",
    ]


def _readout(trust: Trust) -> list[str]:
    rows = [
        [
            r.name,
            f"`{r.position}`",
            str(r.layer),
            f"{r.n_subject} of {len(r.promoted)}",
            " ".join(f"`{t!r}`".replace("|", "\\|") for t in r.promoted),
            "–" if r.static_share is None else f"{r.static_share:.0%}",
        ]
        for r in trust.readout
        if r.layer in _late(trust, r.name)
    ]
    return [
        "## What a fine-tune was on",
        "The mean difference on prompts that have nothing to do with arithmetic, read through the fine-tuned "
        "model's head: after a fine-tune on arithmetic alone, and after one of which every other row was "
        "prose. Counted are digits, operators and the words of the training lines among the ten tokens "
        "promoted most; the static share is how much of the change is one shift for all prompts.",
        table(("pair", "position", "layer", "of arithmetic", "promotes", "static share"), rows),
    ]


def _late(trust: Trust, name: str) -> set[int]:
    """The last two layers that were read: earlier states are not yet in the head's terms."""
    return set(sorted({r.layer for r in trust.readout if r.name == name})[-2:])


def _cost(rows: Sequence[Cost]) -> list[str]:
    found = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        ratios = (
            ("without the noise floor / two bare passes", [r.without_noise / r.bare for r in mine]),
            ("default / two bare passes", [r.default / r.bare for r in mine]),
            ("everything but `--localize` / two bare passes", [r.everything_else / r.bare for r in mine]),
            ("default / without the noise floor", [r.default / r.without_noise for r in mine]),
            ("`--localize` / without", [r.localized / r.default for r in mine]),
        )
        found += [[dtype, name, Spread.of(values).text(unit="x")] for name, values in ratios]
    return [
        "## What it costs",
        "200 prompts, runs of each kind in turn in one process, median and range. Targets: `--localize` at "
        "most 1.6 times a run without; all the rest at most 1.25 times.",
        table(("type", "ratio", "measured"), found),
    ]
