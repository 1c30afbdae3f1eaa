"""MODEL, as the user typed it → a loaded model whose blocks are known, and its tokenizer.

reference.py   what a MODEL names: a Hub id, a folder, a GGUF file, an adapter, MODEL+ADAPTER
load.py        from that name to weights in memory, each set of weights once
tokenizer.py   the tokenizer that belongs to it
adapters.py    PEFT adapters, and two module trees over one storage
faults.py      the faults of the libraries below, told as what to do about them
sameness.py    what two models have in common in their weights, and why a fine-tune may change nothing
anatomy.py     where a transformers model keeps its blocks, and how long its context is
"""

from lazarus.models.anatomy import Anatomy, dissect
from lazarus.models.load import LoadedModel, LoadOptions, load_one, load_pair, wrap_model
from lazarus.models.reference import ModelReference, Source, parse_model
from lazarus.models.sameness import weights_identical, why_the_same
from lazarus.models.tokenizer import load_tokenizer

__all__ = [
    "Anatomy",
    "LoadOptions",
    "LoadedModel",
    "ModelReference",
    "Source",
    "dissect",
    "load_one",
    "load_pair",
    "load_tokenizer",
    "parse_model",
    "weights_identical",
    "why_the_same",
    "wrap_model",
]
