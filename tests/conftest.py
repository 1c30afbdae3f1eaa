"""Fixtures that every test may use. No network, no GPU; shapes are checked at run time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it runs in the background. The tests of Ctrl-C need it as it usually is.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import transformers
from jaxtyping import install_import_hook

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer

SHAPED = [
    "activation",
    "engine",
    "estimating",
    "lens.reading",
    "metrics",
    "models",
    "provenance",
    "reading",
    "tokens",
    "weights.gguf",
    "weights.numbers",
    "weights.spectrum",
    "weights.updates",
    "weights.views",
]
install_import_hook([f"lazarus.{name}" for name in SHAPED], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"
collect_ignore = [
    "fourth.py",  # importing it puts its command on the command line
    "fuzz_coverage.py",  # needs atheris, which `make fuzz` installs
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files again")
    parser.addoption("--fast", action="store_true", help="one case of each test, of the files that are fast")


SLOW = {
    "anonymous", "architectures", "attribution", "bad_input", "blame", "claims", "commands", "compat",
    "contents", "corpus", "demo", "determinism", "docs", "endings", "estimate", "faults", "fitting",
    "flipped", "gguf", "gpu", "hostile_text", "hub", "hub_situations", "integrations", "lens_cli",
    "lens_report_browser", "loading", "model_rounding", "noise", "notebook", "outside", "package",
    "portable", "prefix", "quantised", "repeats", "report", "report_browser", "runtimes", "sameness",
    "security", "shards", "show", "site", "ties", "weight_components", "weight_rounding",
    "weights_report_browser",
}  # fmt: skip
"""Test files that `--fast` leaves out: they start processes or browsers, run whole commands on many models,
or hold much against much."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            if item.path.stem.removeprefix("test_") not in SLOW:
                first.setdefault(item.nodeid.split("[")[0], item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = first.values()
    if "real" in (config.getoption("-m") or ""):
        return
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason="needs real weights: make test-real"))


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> None:
    """Two workers on two cores: one thread each, and the same sums every time."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in tests/golden (or in docs, with a path from here)."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-golden"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: see pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved as safetensors."""
    return save_model(tmp_path_factory.mktemp("models") / "base", tiny_llama(), tiny_tokenizer())


@pytest.fixture(scope="session")
def finetuned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its weights changed a little."""
    folder = tmp_path_factory.mktemp("models") / "finetuned"
    return save_model(folder, perturbed(tiny_llama()), tiny_tokenizer())
