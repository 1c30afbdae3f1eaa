"""Make a pair of random Llamas: `python -m benchmarks.random_llama FOLDER LAYERS WIDTH [DTYPE]`.

DTYPE is bfloat16 unless it is named.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.places import BASE

CHANGE = 0.02
VOCABULARY = 49152


def main(folder: Path, n_layers: int, width: int, dtype: str = "bfloat16") -> None:
    """Save base and fine-tuned, which is base with every matrix moved by a share of its own size."""
    if (folder / "finetuned").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    _save(model, folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += CHANGE * parameter.std() * torch.randn_like(parameter)
    _save(model, folder / "unfinished")
    (folder / "unfinished").rename(folder / "finetuned")


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
