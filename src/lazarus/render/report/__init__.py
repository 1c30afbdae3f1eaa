"""The report: a result as one HTML file that opens anywhere, offline.

frame.py      the file itself, whichever command it is of, and what its scripts may do
page.py       what activation-diff's page says
payload.py    the numbers that the page's scripts draw, as JSON
sample.py     which prompts, texts and tokens the page has room for
answers.py    what a reader must know in ten seconds
tables.py     the tables that need no script
cells.py      tables as plain data, for every page
assets.py     the style, the scripts and the vendored library
base.html     what every page has; macros.html: tables and maps; activation.html: activation-diff's page
"""

from lazarus.render.report.page import write_html
from lazarus.render.report.sample import is_sampled

__all__ = ["is_sampled", "write_html"]
