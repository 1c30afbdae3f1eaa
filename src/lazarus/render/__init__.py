"""From a record to what a person or a program reads: pure functions of the result.

text.py    standard output
table.py   CSV, Parquet and Markdown
save.py    which format a path names, and how a file is written so that nobody reads half of it
"""
