"""The report: a result as one HTML file that opens anywhere, offline.

page.py       the file itself: what is written into the template, and what its scripts may do
payload.py    the numbers that the page's scripts draw, as JSON
sample.py     which prompts, texts and tokens the page has room for
answers.py    what a reader must know in ten seconds
tables.py     the tables that need no script
assets.py     the template, style, scripts and the vendored library
"""

from lazarus.render.report.page import write_html
from lazarus.render.report.sample import is_sampled

__all__ = ["is_sampled", "write_html"]
