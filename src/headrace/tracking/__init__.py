"""Metrics of users' own code: requests, calls of language models, calls of tools, and their export."""
