"""The renderers of weight-diff: pure functions of its record.

summary.py  what the numbers say together, in sentences
text.py     standard output
table.py    CSV, Parquet and Markdown
recipe.py   tensors by their error, as a list of modules to leave out of a quantisation
grid.py     components by layers, as every map shows them
page.py     one page of HTML that needs nothing but itself (answers.py, payload.py, tables.py, page.html, js/)
figure.py   the map for a paper
notebook.py how a result shows itself in a notebook
"""
