"""GGUF files as models of transformers: all of their parts, with all of their settings.

choice.py    which file is meant by a folder or a repository
header.py    the header of one file
parts.py     the files of one model
refusals.py  what is no model, or contradicts itself
settings.py  the configuration that the metadata describe; rope.py its rotary positions
tensors.py   the tensors in transformers' names and layout, and a model loaded with them
opening.py   all that is known of a model before its tensors are read
"""
