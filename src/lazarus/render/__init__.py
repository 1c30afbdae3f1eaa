"""Renderers: pure functions from a record to what a person or a program reads.

base/        what all commands share
activation/  what activation-diff shows
weights/     the same of weight-diff
lens/        the same of compare
series/      the same of series
save.py      which format a path names, and how a file is written so that nobody reads half of it
"""
