"""From a record to what a person or a program reads: pure functions of the result.

summary.py   what the numbers say together, in sentences
text.py      standard output
table.py     CSV, Parquet and Markdown
series.py    what every plot shows
report/      one page of HTML that needs nothing but itself, and the frame of every such page
weights/     the same of weight-diff
lens/        the same of compare
figure.py    the curve for a paper (curve.py draws it)
notebook.py  how a result shows itself in a notebook
escape.py    text that stays on its line, whatever is in it
save.py      which format a path names, and how a file is written so that nobody reads half of it
"""
