"""The library's main function on tiny real models."""

from __future__ import annotations

from pathlib import Path

import lazarus


def test_a_model_against_itself_diverges_nowhere(base_folder: Path) -> None:
    for position in ("last", "mean", "all", 0, -1):
        diff = lazarus.activation_diff(
            str(base_folder), str(base_folder), ["Hello", "What is AI?"], position=position
        )
        assert [layer.divergence for layer in diff.layers] == [0.0] * 4
        assert [site.divergence for site in diff.sites] == [0.0] * 2


def test_a_changed_model_diverges(base_folder: Path, finetuned_folder: Path) -> None:
    diff = lazarus.activation_diff(str(base_folder), str(finetuned_folder), ["Hello", "What is AI?"])
    assert all((layer.divergence or 0) > 1e-4 for layer in diff.layers)
