"""The studies of the documentation: their arithmetic, and that the pages say what was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from benchmarks import depth, depth_report, gallery
from benchmarks.depth_training import EqualSteps

from lazarus import load_result

RUNS = msgspec.json.decode(depth.RESULTS.read_bytes(), type=list[depth_report.Run])
MARKS = ("<!-- measured: begin -->\n\n", "\n\n<!-- measured: end -->")


def measured(page: Path) -> str:
    """What stands between the marks of a page."""
    return page.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]


def test_the_page_on_depth_says_what_was_measured() -> None:
    assert measured(depth.DOCS) == "\n\n".join(depth_report.page(RUNS))


def test_the_gallery_says_what_its_results_say() -> None:
    assert measured(gallery.DOCS) == "\n\n".join(gallery.page())


@pytest.mark.parametrize("entry", gallery.ENTRIES, ids=lambda entry: entry.name)
def test_a_result_of_the_gallery_is_of_its_command(entry: gallery.Entry) -> None:
    record = load_result(gallery.FOLDER / f"{entry.name}.json").record
    assert record.command == entry.command.split()[0]


def test_a_flat_profile_has_no_slope_and_a_straight_line_from_zero_has_two() -> None:
    assert depth_report.slope([3.0, 3.0, 3.0, 3.0]) == 0
    assert depth_report.slope([0.0, 1.0, 2.0, 3.0]) == pytest.approx(2)
    assert depth_report.slope([3.0, 2.0, 1.0, 0.0]) == pytest.approx(-2)
    assert depth_report.late_share([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(1 / 3)


def test_equal_steps_move_every_layer_by_the_same_share_in_the_direction_of_adamw() -> None:
    chance = torch.Generator().manual_seed(0)
    layers = [torch.randn(4, 3, generator=chance, dtype=torch.float64) * scale for scale in (1.0, 30.0, 0.1)]
    gradients = [torch.randn(4, 3, generator=chance, dtype=torch.float64) for _ in layers]
    moved = {}
    for optimiser in (torch.optim.AdamW, EqualSteps):
        weights = [torch.nn.Parameter(layer.clone()) for layer in layers]
        stepping = optimiser([{"params": [weight]} for weight in weights], lr=1e-3)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        stepping.step()
        moved[optimiser] = [(w.detach() - layer).numpy() for w, layer in zip(weights, layers, strict=True)]
    sizes = [float(layer.norm()) for layer in layers]
    plain, equal = moved[torch.optim.AdamW], moved[EqualSteps]
    for one, other in zip(plain, equal, strict=True):
        cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
        assert cosine == pytest.approx(1, abs=1e-9)
    shares = [np.linalg.norm(move) / size for move, size in zip(equal, sizes, strict=True)]
    was = [np.linalg.norm(move) / size for move, size in zip(plain, sizes, strict=True)]
    assert max(was) / min(was) > 100
    assert shares == pytest.approx([float(np.exp(np.mean(np.log(was))))] * 3, rel=1e-9)
