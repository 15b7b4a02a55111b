"""Pitfalls that can be read from the source: the tree of a file, what its names hold, and the rules."""
