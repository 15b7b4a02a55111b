"""Put as ``sitecustomize`` before everything else that a child process finds: it is then looked at from its start.

Runs in any Python that the program starts, also in one that has no headrace, and must never be noticed.
"""


def _begin() -> None:
    import importlib
    import os
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    # The one of that environment, if it has one.
    mine = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if mine is not None:
            sys.modules["sitecustomize"] = mine
        if error.name != "sitecustomize":
            raise
    try:
        from headrace.profiling.cpu.children import begin
    except Exception:
        return
    begin()


if __name__ == "sitecustomize":
    _begin()
