"""The renderers of compare: pure functions of its record.

tokens.py    how a token and a prompt are written, so that every space of them is seen
summary.py   what the numbers say together, in sentences
text.py      standard output
table.py     CSV, Parquet and Markdown
grids.py     the tables of a page
plots.py     small curves over layers, as SVG without scripts
page.py      one page of HTML
figure.py    layers by ranks, for a paper
notebook.py  how a result shows itself in a notebook
"""
