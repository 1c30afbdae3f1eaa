"""What lazarus is measured against: one prompt at a time, every hidden state, the last token's cosine.

Run as `python -m benchmarks.naive BASE FINETUNED PROMPTS DTYPE`. It knows nothing of lazarus.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def mean_cosines(base: Any, finetuned: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean cosine of each hidden state that transformers returns: embedding, blocks, final norm.

    transformers puts the final norm's output in the place of the last block's.
    """
    cosines = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt")
            ours = base(**inputs, output_hidden_states=True).hidden_states
            theirs = finetuned(**inputs, output_hidden_states=True).hidden_states
            cosines.append(torch.cosine_similarity(_last_token(ours), _last_token(theirs), dim=-1))
    return torch.stack(cosines).mean(dim=0)


def _last_token(states: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer[0, -1] for layer in states]).float()


def load_model(folder: str, dtype: str) -> Any:
    """A causal model with its head, on the CPU, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def main(base: str, finetuned: str, prompts: str, dtype: str) -> None:
    """Load, run, print a line a layer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours, theirs = load_model(base, dtype), load_model(finetuned, dtype)
    texts = Path(prompts).read_text(encoding="utf-8").splitlines()
    cosines = mean_cosines(ours, theirs, tokenizer, texts)
    for layer, cosine in enumerate(cosines[1:].tolist()):
        sys.stdout.write(f"{layer:5d} {cosine:11.4f} {1 - cosine:13.4f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
