"""The limits on what a stranger's file may ask for, each with its reason, and the one way to lift all."""

from __future__ import annotations

import os

VARIABLE = "LAZARUS_NO_LIMITS"
"""the environment variable that lifts every limit where it is 1"""
LIFT = f"Where that is meant, set {VARIABLE}=1 in the environment, which lifts this limit."

MOST_BYTES = 2**26
"""of a small file, 64 MiB: the longest index of a published checkpoint has 15 MB, and JSON takes twenty times
its size when it is read"""
MOST_PIPED = 2**30
"""of a result that comes through a pipe, 1 GiB: where it ends, nobody knows before"""
MOST_VOCABULARY_BYTES = 2**27
"""of a file with a vocabulary, 128 MiB: those of a million tokens have 60 MB"""
MOST_NESTED = 100
"""brackets within brackets in JSON: no file of a checkpoint has twenty, and copying them is recursive"""

MOST_LAYERS = 1000
"""of a model with fewer tensors than that: each is a module tree, and the deepest published has 126"""
MOST_EXPERTS = 8192
"""of a block with fewer tensors than that: the most published is 2,048, which may be stored as one tensor"""
MOST_LABELS = 2**20
"""of a classifier: transformers makes a dictionary of them, and the most published is 21,843"""
MOST_SIZE = 2**20
"""of a dimension that the files could not hold: what has no more elements than this is made at once"""

MOST_STRINGS = 2**22
"""in a list of texts of a GGUF file, which are read one by one: the largest vocabularies have a million"""
MOST_ENTRIES = 2**17
"""tensors, or keys of metadata, of a GGUF file: those with the most experts have 50,000"""

MOST_RANK = 1024
"""of an adapter whose tensors are smaller than that"""
MOST_NAMES = 1000
"""in a list of an adapter's modules, each of which is compared with every module of the model"""
MOST_PISSA_ITERATIONS = 100
"""of its singular value decomposition: PEFT advises 4 to 16"""
SECONDS_OF_PATTERNS = 10
"""for all patterns in an adapter's configuration: those of published ones take milliseconds"""

SECONDS_OF_A_TEMPLATE = 10
"""for a chat in a chat template: it takes milliseconds"""
MEMORY_OF_A_TEMPLATE = 2**30
"""bytes that a chat template may take beside what this process has"""
MOST_RENDERED = 2**26
"""characters that a chat template may write of one chat: no context has as many tokens"""

MOST_UNPACKED = 2**30
"""bytes of the rows of a Parquet file that has less than a hundredth of that: with a dictionary, a text that
comes again takes a few bits"""
MOST_CHARACTERS = 2**22
"""of a prompt, where the context is not so long that CHARACTERS_A_TOKEN for each token are more"""
CHARACTERS_A_TOKEN = 64
"""that no real text has on average: English has four"""
MOST_GROWN = 2**26
"""characters that a tokenizer may make of a text before it cuts it: replacements may replace each other's"""
MOST_ADDED = 1000
"""tokens that a tokenizer's template may put around a text: real ones have two"""
MOST_WORD = 1000
"""characters of a word whose pieces are all tried: transformers' own have 100"""


def exceeds(found: float, most: float) -> bool:
    """Return whether a number is above a limit that is not lifted."""
    return found > most and not lifted()


def lifted() -> bool:
    """Return whether the environment lifts the limits."""
    return os.environ.get(VARIABLE) == "1"
