"""Metrics: the catalogue as data, rows in shared memory where processes count, the merged view that is exported.

Names, labels and buckets are declared in `catalogue`, values live in `rows`, `reader` sums and writes them.
"""

from headrace.metrics.catalogue import *  # noqa: F403 - the names of the families are names of this package
from headrace.metrics.reader import CONTENT_TYPE, OPENMETRICS_TYPE, Reader
from headrace.metrics.rows import Counter, Gauge, Histogram, Row, clear_gauges

__all__ = [
    "CONTENT_TYPE",
    "OPENMETRICS_TYPE",
    "Counter",
    "Gauge",
    "Histogram",
    "Reader",
    "Row",
    "clear_gauges",
]
