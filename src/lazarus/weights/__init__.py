"""weight-diff: what changed in the weights, tensor pair by tensor pair.

run.py          the order of a run
structure.py    what a checkpoint's tensors belong to: the model's modules, built empty
stores.py       tensors in safetensors and pickled files; gguf.py those of a GGUF file
checkpoints.py  one checkpoint as components
adapters.py     which of them an adapter changes; updates.py what it adds to one
views.py        a tensor that is read a few rows at a time; coded.py one that is quantised
vocabulary.py   which row of a table is the same token's in the other
pairs.py        which tensor of one belongs to which of the other
copies.py       which layers of models of different depth are copies
numbers.py      what is measured of a pair; parallel.py of many at once
rounding.py     which tensors differ by the rounding of a merge or of a copy alone
quantisation.py what a quantisation did to a tensor, beside what rounding to nearest would have done
spectrum.py     the singular values of an update
record.py       from what was measured to the record
"""

from lazarus.weights.run import weight_diff

__all__ = ["weight_diff"]
