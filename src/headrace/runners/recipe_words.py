"""Words of recipes that more than one module heeds; what each does to a module is in `recipes.py`. Without torch."""

PACKED = "packed"
GRAPHS = "graphs"
# For the run around the module, not for the module itself: what was exported is run by these, too.
AROUND = frozenset({PACKED, GRAPHS})
VARLEN = "varlen"
CACHES = ("kv-off", "kv-dynamic", "kv-static")
COMPILE = "compile"
# Repeated layers compiled, instead of the whole.
REGIONAL = "regional"
# Modes of torch.compile that are made for one shape each.
BY_SHAPE = frozenset({"reduce-overhead", "max-autotune"})
