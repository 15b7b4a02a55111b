"""What `headrace.profiling.watch` puts into torch for as long as it watches, and what it makes of what it saw."""
