"""The limits on what an adapter asks of PEFT: real ones are as they were, and hostile ones end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig

import lazarus
from layouts import compare, edit_json, most, save_adapter
from lazarus.bounds import VARIABLE
from lazarus.errors import AdapterError
from lazarus.models.adapter_limits import check_settings

ENDLESS = r"(?:.|..|...|....)+(?<=!)"
"""a pattern that is catastrophic to the package regex, which sees through most, and to Python's own engine"""
PATTERNS: dict[str, Callable[[], PeftConfig]] = {
    "targets": lambda: LoraConfig(r=4, target_modules=r".*\.(?:[12])\.(?:self_attn|mlp)\.(?:q|down)_proj"),
    "unsloth": lambda: LoraConfig(
        r=4,
        target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    ),
    "excluded": lambda: LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\..*q_proj"
    ),
    "ranks": lambda: LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.[01]\.self_attn\.q_proj": 2, "v_proj": 3},
        alpha_pattern={r".*\.3\.self_attn\.(q|v)_proj": 16},
    ),
    "layers": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern="lay.rs"
    ),
    "hadamard": lambda: LoHaConfig(r=4, target_modules=r".*(q|k)_proj", rank_pattern={r"layers\.1\..*": 2}),
    "feedforward": lambda: IA3Config(target_modules=r".*(q|down)_proj", feedforward_modules=r".*down_proj"),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(
    kind: str, tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without limits PEFT matches them by Python's own engine."""
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base_folder, PATTERNS[kind]())
    within = compare(base_folder, adapter)
    assert most(within) > 1e-3
    monkeypatch.setenv(VARIABLE, "1")
    assert compare(base_folder, adapter).results == within.results


def test_names_without_number_are_those_that_match(tmp_path: Path, base_folder: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base_folder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    plain = compare(base_folder, adapter)
    names = [f"x{i}" for i in range(100_000)]
    edit_json(adapter / "adapter_config.json", target_modules=[*names, "q_proj", "self_attn.v_proj"])
    begun = time.process_time()
    assert compare(base_folder, adapter).results == plain.results
    assert time.process_time() - begun < 60
    edit_json(adapter / "adapter_config.json", target_modules=names)
    with pytest.raises(AdapterError, match="adapter does not fit"):
        compare(base_folder, adapter)


@pytest.mark.parametrize("base", ["org/\0", 5, ["org/model"]])
def test_a_base_that_is_no_name_is_refused(base: object) -> None:
    with pytest.raises(AdapterError, match=r"^adapter_config\.json: its base_model_name_or_path is no name"):
        check_settings("adapter_config.json", {"base_model_name_or_path": base})
    check_settings("adapter_config.json", {"base_model_name_or_path": None})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"layers_to_transform": [1], "layers_pattern": [ENDLESS]},
        {"rank_pattern": {f"a{{{i}}}": 4 for i in range(50_000)}},
    ],
)
def test_a_pattern_without_end_ends(
    settings: dict[str, object], tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.models.adapter_limits.SECONDS_OF_PATTERNS", 0.5)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base_folder, LoraConfig(r=4, target_modules=["q_proj"]))
    edit_json(adapter / "adapter_config.json", **settings)
    for command in (lazarus.weight_diff, compare):
        with pytest.raises(AdapterError, match=r"the patterns .* take more than 0\.5 s"):
            command(base_folder, adapter)
    patched = [n for n, m in sys.modules.items() if n.partition(".")[0] == "peft" and "re" in vars(m)]
    assert patched
    assert all(sys.modules[name].re is re for name in patched)
