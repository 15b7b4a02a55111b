"""Rules about coroutines: what holds the event loop, and with it everybody else's request."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from headrace.profiling.pitfalls.rule import Hit, is_forward
from headrace.profiling.pitfalls.source import Scope, method, receiver, short
from headrace.profiling.pitfalls.tensors import Tensors

_BLOCKS = re.compile(
    r"""time\.sleep | requests\.(get|post|put|patch|delete|head|options|request)
      | urllib\.request\.(urlopen|urlretrieve) | httpx\.(get|post|put|patch|delete|head|options|request|stream)
      | subprocess\.(run|call|check_call|check_output|getoutput|getstatusoutput) | os\.(system|wait|waitpid)
      | socket\.create_connection""",
    re.VERBOSE,
)
_TOKENISES = {"__call__", "encode", "encode_plus", "batch_encode_plus", "encode_batch", "apply_chat_template"}


def _on_the_loop(tensors: Tensors) -> Iterator[tuple[ast.Call, Scope]]:
    """Calls that a coroutine makes itself and does not await."""
    for scope in tensors.source.scopes.values():
        if isinstance(scope.node, ast.AsyncFunctionDef):
            for call in scope.calls:
                if not isinstance(tensors.source.parents.get(call), ast.Await):
                    yield call, scope


def blocking_calls(tensors: Tensors) -> Iterator[Hit]:
    for call, scope in _on_the_loop(tensors):
        if _BLOCKS.fullmatch(tensors.source.dotted(call.func, scope)):
            yield call, f"`{short(call)}` stops the event loop, and every other coroutine with it"


def files(tensors: Tensors) -> Iterator[Hit]:
    for call, scope in _on_the_loop(tensors):
        if tensors.source.builtin(call.func, scope, "open"):
            yield call, f"`{short(call)}` waits for the disk on the event loop"


def tokenising(tensors: Tensors) -> Iterator[Hit]:
    for call, scope in _on_the_loop(tensors):
        called = tensors.is_tokenizer(call.func, scope)
        asked = method(call) in _TOKENISES and tensors.is_tokenizer(receiver(call), scope)
        if called or asked:
            yield call, f"`{short(call)}` tokenises on the event loop"


def forwards(tensors: Tensors) -> Iterator[Hit]:
    for call, scope in _on_the_loop(tensors):
        if is_forward(tensors, call, scope):
            yield call, f"`{short(call)}` runs a model on the event loop: nobody else is answered meanwhile"
