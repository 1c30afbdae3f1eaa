"""compare: the logit lens on two models, side by side, for one prompt.

run.py         the order of a run
live.py        the lens of a model that runs
recorded.py    the same with a recording in place of one of the two
reading.py     what each block's output would give as logits, by the model's own norm and LM head
lens.py        what one model's lens shows: first choices, probabilities, ranks
vocabulary.py  a model's tokens as texts, and a text's first token
parting.py     where the two models' first choices first differ
tracking.py    which tokens are followed through the layers, and where they emerge
distance.py    how far apart two layers' distributions are, over one vocabulary or two
record.py      from these to the record
"""

from lazarus.lens.live import Observer
from lazarus.lens.run import compare

__all__ = ["Observer", "compare"]
