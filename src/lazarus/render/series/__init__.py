"""The renderers of series: pure functions of its record.

summary.py   what the numbers say together, in sentences
text.py      standard output
table.py     CSV, Parquet and Markdown
grid.py      layers by members, and members by members, as every map shows them
plots.py     curves over the steps, as SVG without scripts
page.py      one page of HTML (page.html, page.css)
figure.py    the trajectory for a paper
notebook.py  how a result shows itself in a notebook
"""
