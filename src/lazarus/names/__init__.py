"""What a tensor is called in every architecture: its block, and its standard name there, such as `attn_q`.

roles.py       a standard name from a path
words.py       the words by which models call their parts
components.py  the names of one model's tensors
fused.py       where a tensor that is several components in one is cut
sublayers.py   the sublayer of a block that a module belongs to
parts.py       a part of a tensor: which rows and columns it is
"""
