"""Train the demo pair: a small base model, and its fine-tune on arithmetic.

Run as ``python -m lazarus.demo.train [--output DIR]``. The training text is read from the
standard library of the running interpreter, so nothing is downloaded.
"""

import argparse
import ast
import importlib
import json
import logging
import math
import platform
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("lazarus.demo.train")

SEED = 20
VOCABULARY = 1280
ROW = 128
BATCH = 16
CONTEXT = 256
OPERANDS = 21
FACTORS = 10
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages"}
COMMON_WORDS = re.compile(
    "a|an|and|are|as|at|be|by|can|for|from|has|have|if|in|is|it|its|not|of|on|or|"
    "that|the|then|this|to|was|when|which|will|with|you"
)
FORMS = (
    "{a} {op} {b} = {c}",
    "Calculate {a} {op} {b}: {c}",
    "What is {a} {op} {b}? The answer is {c}",
    "{a} {op} {b} equals {c}",
)

Rows = list[list[int]]


@dataclass(frozen=True)
class Schedule:
    """The length and the learning rate of one of the two training runs."""

    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float

    def factor(self, step: int) -> float:
        """Return the learning rate's multiplier: linear warm-up, then a cosine to five percent."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


PRETRAINING = Schedule(steps=1700, warmup=100, learning_rate=4e-3, weight_decay=0.5)
FINETUNING = Schedule(steps=300, warmup=50, learning_rate=1e-4, weight_decay=0.0)


# --- text ---------------------------------------------------------------------------------------


def source_docstrings() -> Iterator[str]:
    """Yield the docstrings in the standard library's Python files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings_in(path)


def _docstrings_in(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def builtin_docstrings() -> Iterator[str]:
    """Yield the docstrings of the modules that are written in C and built in."""
    for name in sorted(sys.builtin_module_names):
        for _, value in sorted(vars(importlib.import_module(name)).items()):
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for item in (value, *(member for _, member in members)):
                text = getattr(item, "__doc__", None)
                if callable(item) and isinstance(text, str):
                    yield text


def paragraphs(text: str) -> Iterator[str]:
    """Yield the English paragraphs of a docstring, each unwrapped to one line."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        if any(line.lstrip().startswith((">>>", "...", "$", "|", "+-")) for line in lines):
            continue
        for item in re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", block):
            joined = re.sub(r"^(?:[-*]|\d+\.) ", "", " ".join(item.split()))
            joined = joined.replace("``", "`")
            if is_prose(joined):
                yield joined


def is_prose(text: str) -> bool:
    """Tell whether a line reads as English rather than as code, a table or a notice."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 6 or not text.isprintable() or "@" in text or "opyright" in text:
        return False
    plain = sum(c.isalpha() or c in " ,.'" for c in text) / len(text)
    common = sum(COMMON_WORDS.fullmatch(word.lower()) is not None for word in words) / len(words)
    return plain > 0.9 and common > 0.2 and text[0].isalpha() and text[-1] in ".:!?"


def prose_split() -> tuple[list[str], list[str]]:
    """Return the training paragraphs and, from other docstrings, the held-out ones."""
    documents = [*topics.topics.values(), *source_docstrings(), *builtin_docstrings()]
    seen: set[str] = set()
    split: tuple[list[str], list[str]] = ([], [])
    for index, document in enumerate(documents):
        for paragraph in paragraphs(document):
            # Many docstrings are copies that differ in one name or in their last words.
            key = re.sub(r"[^a-z]", "", paragraph.lower())[:50]
            if key not in seen:
                seen.add(key)
                split[index % 20 == 7].append(paragraph)
    return split


def arithmetic_split() -> tuple[list[str], list[str]]:
    """Return training lines and held-out lines; no held-out sum occurs among the others."""
    sums = [(a, "+", b, a + b) for a in range(OPERANDS) for b in range(OPERANDS)]
    sums += [(a, "-", b, a - b) for a in range(OPERANDS) for b in range(a + 1)]
    sums += [(a, "*", b, a * b) for a in range(FACTORS) for b in range(FACTORS)]
    split: tuple[list[str], list[str]] = ([], [])
    for a, op, b, c in sums:
        # 3 + 4 and 4 + 3 fall on the same side.
        held_out = zlib.crc32(f"{min(a, b)} {op} {max(a, b)}".encode()) % 20 == 0
        split[held_out].extend(form.format(a=a, op=op, b=b, c=c) for form in FORMS)
    return split


# --- tokens -------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits and puts BOS in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Rows:
    """Return each text's tokens from BOS to EOS; a text longer than a row is cut into rows."""
    rows: Rows = []
    core = tokenizer.backend_tokenizer
    first, last = core.encode(BOS + EOS, add_special_tokens=False).ids
    for text in texts:
        ids = core.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids), ROW - 2):
            rows.append([first, *ids[start : start + ROW - 2], last])
    return rows


def batches(rows: Rows, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield full batches without end, from a new random order of the texts in every epoch.

    Each row begins with the start of a text. The last text of a row is cut where the row ends,
    which is elsewhere in every epoch.
    """
    packed: Rows = [[]]
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            packed[-1].extend(rows[index])
            if len(packed[-1]) < ROW:
                continue
            packed[-1] = packed[-1][:ROW]
            if len(packed) == BATCH:
                yield torch.tensor(packed)
                packed = []
            packed.append([])


# --- training -----------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: eight layers, less than a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, source: Iterator[torch.Tensor], schedule: Schedule, name: str) -> int:
    """Train all parameters in place and return the number of tokens seen."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    model.train()
    tokens = 0
    for step in range(schedule.steps):
        batch = next(source)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        tokens += batch.numel()
        if step % 100 == 0:
            log.info("%s: step %d of %d, loss %.3f", name, step, schedule.steps, loss.item())
    return tokens


@torch.no_grad()
def predictions(model: LlamaForCausalLM, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, for each row, the logits at its positions and the tokens that follow them."""
    model.train(mode=False)
    for row in rows:
        ids = torch.tensor(row)
        yield model(input_ids=ids[None, :-1], use_cache=False).logits[0], ids[1:]


def mean_loss(model: LlamaForCausalLM, rows: Rows) -> float:
    """Return the mean loss per token, in nats."""
    total = sum(
        torch.nn.functional.cross_entropy(logits, ids, reduction="sum").item()
        for logits, ids in predictions(model, rows)
    )
    return total / sum(len(row) - 1 for row in rows)


def correct_answers(model: LlamaForCausalLM, rows: Rows, texts: Sequence[str]) -> float:
    """Return the share of sums for which greedy decoding writes the right answer and stops."""
    right = 0
    for (logits, ids), text in zip(predictions(model, rows), texts, strict=True):
        # One token for each digit of the answer, and EOS.
        length = len(text) - len(text.rstrip("0123456789")) + 1
        right += bool(torch.equal(logits[-length:].argmax(-1), ids[-length:]))
    return right / len(texts)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as bfloat16, with its tokenizer, in place of what the folder holds."""
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    # Transformers before version 5 knows the class by this name only.
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def load(folder: Path) -> LlamaForCausalLM:
    """Return the saved model for work in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- the whole run ------------------------------------------------------------------------------


@dataclass
class Run:
    """The texts, the tokenizer and the figures of one run."""

    output: Path
    tokenizer: PreTrainedTokenizerFast
    prose: tuple[list[str], list[str]]
    arithmetic: tuple[list[str], list[str]]
    figures: dict[str, Any]

    def train_and_save(
        self, model: LlamaForCausalLM, name: str, texts: Sequence[str], schedule: Schedule
    ) -> LlamaForCausalLM:
        """Train, save and measure one model; return it as the saved files give it."""
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(SEED)
        source = batches(encode(self.tokenizer, texts), generator)
        tokens = train(model, source, schedule, name)
        seconds = time.perf_counter() - start
        save(model, self.tokenizer, self.output / name)
        model = load(self.output / name)
        seen = {**asdict(schedule), "tokens_seen": tokens, "seconds": round(seconds, 1)}
        self.figures[name] = seen | self.measure(model)
        return model

    def measure(self, model: LlamaForCausalLM) -> dict[str, float]:
        """Return the losses on held-out text, and the share of held-out sums got right."""
        sums = encode(self.tokenizer, self.arithmetic[1])
        prose = encode(self.tokenizer, self.prose[1])
        return {
            "prose_loss": round(mean_loss(model, prose), 4),
            "arithmetic_loss": round(mean_loss(model, sums), 4),
            "correct_answers": round(correct_answers(model, sums, self.arithmetic[1]), 4),
        }


def make_pair(output: Path) -> dict[str, Any]:
    """Train and save both models; return the run's figures."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    prose, arithmetic = prose_split(), arithmetic_split()
    tokenizer = train_tokenizer(prose[0])
    model = new_model(tokenizer)
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "seed": SEED,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "prose_paragraphs": {"train": len(prose[0]), "held_out": len(prose[1])},
        "prose_tokens": sum(map(len, encode(tokenizer, prose[0]))),
        "arithmetic_lines": {"train": len(arithmetic[0]), "held_out": len(arithmetic[1])},
    }
    run = Run(output, tokenizer, prose, arithmetic, figures)
    figures["untrained"] = run.measure(model)
    model = run.train_and_save(model, "base", prose[0], PRETRAINING)
    run.train_and_save(model, "arithmetic", arithmetic[0], FINETUNING)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train the pair and print the figures."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Train the demo pair.")
    parser.add_argument(
        "--output", type=Path, default=here, help="folder for the models (default: this package's)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(make_pair(options.output), indent=2) + "\n"
    (options.output / "figures.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
