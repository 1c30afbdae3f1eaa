"""The parts that the renderers of all commands share.

escape.py    text that stays on its line, whatever is in it
markdown.py  text in Markdown that stays text
words.py     lines and numbers that every command writes alike
rows.py      rows as CSV and Parquet
figure.py    how every figure looks, and how it is written
notebook.py  what every result shows in a notebook
frame.py     a page as one file, and what its scripts may do
cells.py     tables of a page as plain data
script.py    what a page's scripts read
estimates.py the estimate of a run, as text
recipe.py    modules by what their quantisation costs, as an ignore list
assets.py    the style, the common scripts and the vendored library
base.html    what every page has; macros.html: tables and maps
"""
