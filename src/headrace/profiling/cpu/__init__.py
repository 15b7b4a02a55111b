"""Where time goes: a sampler of threads and tasks, a tracer of calls, and programs run under both.

The sampler alone (`sampler.py`) is what a serving process may run: it imports nothing heavy, needs nothing else of the
process, and keeps to a budget.
"""
