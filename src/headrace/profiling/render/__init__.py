"""What people and other programs read, made from a record: a table, files of other tools, a page with a flame graph.

Nothing here runs or measures anything, and nothing judges: findings are handed in.
"""

from headrace.profiling.render.formats import as_collapsed, as_speedscope, write_prof
from headrace.profiling.render.page import as_diff_html, as_html
from headrace.profiling.render.table import as_table

__all__ = ["as_collapsed", "as_diff_html", "as_html", "as_speedscope", "as_table", "write_prof"]
