"""The renderers of activation-diff: pure functions of its record.

summary.py   what the numbers say together, in sentences
text.py      standard output
table.py     rows as columns, and Markdown
series.py    what every plot shows
page.py      one page of HTML that opens anywhere, offline (page.html, js/)
payload.py   the numbers that the page's scripts draw
sample.py    which prompts, texts and tokens the page has room for
answers.py   what a reader must know in ten seconds
tables.py    the tables that need no script
attribution.py  who caused the change: a line, bars, a table (tensor_map.py: components by layers)
components.py   what is inside the blocks: a line, curves and tables
scores.py    scores and embeddings: a line and a table
figure.py    the curve for a paper (curve.py draws it)
vectors.py   the mean difference of every layer as tensors
recipe.py    modules by what they cost, as another tool's ignore list
notebook.py  how a result shows itself in a notebook
"""
