"""Rules about training: graphs that are kept, and data that is loaded where the device waits for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from headrace.profiling.pitfalls.rule import Hit, flag, grad_is_off, own_function
from headrace.profiling.pitfalls.source import Scope, key, method, receiver, short
from headrace.profiling.pitfalls.tensors import Tensors, is_backward, is_plain

_KEEPS_GRAPH = {"cpu", "cuda", "to", "float", "half", "mean", "sum", "clone", "view", "squeeze", "reshape"}
_SOUNDS_LIKE_A_LIST = re.compile(r"loss|hist|record|result|output")
_KEEPERS = re.compile(r"list|dict|float|int|(collections\.)?(deque|defaultdict)|torch\.\w+")
_READERS = re.compile(
    r"""PIL\.Image\.open | requests\.(get|post|request) | urllib\.request\.(urlopen|urlretrieve)
      | (json|pickle|yaml)\.(load|safe_load) | numpy\.(load|loadtxt|genfromtxt|fromfile)
      | pandas\.read_\w+ | cv2\.(imread|VideoCapture) | imageio(\.v\d)?\.imread | skimage\.io\.imread
      | torchvision\.io\.read_\w+ | torchaudio\.load | torch\.load | librosa\.load | soundfile\.read | h5py\.File""",
    re.VERBOSE,
)


def graphs_kept(tensors: Tensors) -> Iterator[Hit]:
    """A loss that is put into a list or added to a sum as it is, once ``backward`` was called on it."""
    for scope in tensors.source.scopes.values():
        losses = {name for name in tensors.losses(scope) if not _is_replaced(name, scope)}
        if not losses:
            continue
        needed = _reaching_backward(tensors, scope)
        for node, place, kept in _keepings(tensors, scope):
            if _carries(kept, losses) and _base(place) not in needed and _outlives(tensors, node, place, scope):
                yield node, f"`{short(node)}` keeps the graph of every step: `{short(kept)}` is not detached"


def _keepings(tensors: Tensors, scope: Scope) -> Iterator[tuple[ast.expr | ast.stmt, ast.expr, ast.expr]]:
    """Where something is added: the node, what it is added to, and what is added."""
    source = tensors.source
    for call in scope.calls:
        if method(call) in ("append", "appendleft") and len(call.args) == 1:
            yield call, receiver(call), call.args[0]
    for node in source.augmented:
        if not isinstance(node.op, ast.Add) or source.scope(node) is not scope:
            continue
        if isinstance(node.value, ast.List) or not grad_is_off(tensors, node):
            yield node, node.target, node.value
    for name, values in scope.values.items():
        for value in values:
            sum_ = value.expression
            if not (isinstance(sum_, ast.BinOp) and isinstance(sum_.op, ast.Add) and key(sum_.left) == name):
                continue
            if not grad_is_off(tensors, sum_):
                yield sum_, sum_.left, sum_.right


def _carries(node: ast.expr, losses: set[str]) -> bool:
    """Whether a value drags the graph of a loss along."""
    if isinstance(node, ast.Name):
        return node.id in losses
    if isinstance(node, ast.BinOp):
        return _carries(node.left, losses) or _carries(node.right, losses)
    if isinstance(node, (ast.Tuple, ast.List)):
        return any(_carries(each, losses) for each in node.elts)
    if isinstance(node, ast.Dict):
        return any(_carries(each, losses) for each in node.values)
    if isinstance(node, ast.Call) and method(node) in _KEEPS_GRAPH:
        return _carries(receiver(node), losses)
    return False


def _is_replaced(name: str, scope: Scope) -> bool:
    """Whether the loss is, somewhere in the function, replaced by a plain number or detached in place."""
    if any(is_plain(value.expression) for value in scope.values.get(name, [])):
        return True
    return any(method(call) == "detach_" and key(receiver(call)) == name for call in scope.calls)


def _reaching_backward(tensors: Tensors, scope: Scope) -> set[str]:
    """Names whose values go into something that ``backward`` is called on: those must keep their graph."""
    reached: set[str] = set()
    for call in scope.calls:
        if is_backward(call):
            reached |= _names(call)
    known = set(tensors.losses(scope))
    for _ in range(8):
        more = {name for each in known for value in scope.values.get(each, []) for name in _names(value.expression)}
        if more <= reached:
            break
        reached |= more
        known |= more
    return reached


def _base(place: ast.expr) -> str:
    return key(place.value if isinstance(place, ast.Subscript) else place)


def _names(node: ast.AST) -> set[str]:
    return {name for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute)) and (name := key(each))}


def _outlives(tensors: Tensors, node: ast.AST, place: ast.expr, scope: Scope) -> bool:
    """Whether what it is added to is there in the next turn as well."""
    name = _base(place)
    loops = tensors.source.loops_around(node)
    if not name or not (loops or name.startswith("self.")):
        return False
    values = scope.values.get(name, [])
    bound = [value.expression for value in tensors.source.values(name, scope) or scope.values.get(name, [])]
    if any(_is_bounded(each) for each in bound) or not _keeps(tensors, name, node, bound, scope):
        return False
    for call in scope.calls:
        if method(call) in ("clear", "pop", "popleft", "detach_") and key(receiver(call)) == name:
            return False
    for value in values:
        again = loops and loops[0] in tensors.source.loops_around(value.expression)
        sums_up = name in _names(value.expression) and not is_plain(value.expression)
        if again and not sums_up:
            return False
    return True


def _keeps(tensors: Tensors, name: str, node: ast.AST, bound: list[ast.expr], scope: Scope) -> bool:
    """Whether what it is added to keeps it as it is: a list or a number, and no meter of somebody's."""
    if not bound:
        return not isinstance(node, ast.Call) or bool(_SOUNDS_LIKE_A_LIST.search(name))
    for each in bound:
        made_by = tensors.source.dotted(each.func, scope) or key(each.func) if isinstance(each, ast.Call) else ""
        if isinstance(each, ast.Call) and not _KEEPERS.fullmatch(made_by):
            return False
    return True


def _is_bounded(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and (any(each.arg == "maxlen" for each in node.keywords) or len(node.args) > 1)


def loading_on_step_path(tensors: Tensors) -> Iterator[Hit]:
    """Reading files or the network in the loop that also calls ``backward``."""
    for scope in tensors.source.scopes.values():
        loops = {found[0] for call in scope.calls if is_backward(call) and (found := tensors.source.loops_around(call))}
        for call in scope.calls if loops else []:
            around = [loop for loop in tensors.source.loops_around(call) if loop in loops]
            if around and not tensors.source.rare(call, around[-1]) and (what := _loads(tensors, call, scope)):
                yield call, f"{what} on the path of every step: the device waits for it"


def _loads(tensors: Tensors, call: ast.Call, scope: Scope) -> str:
    if reads(tensors, call, scope):
        return f"`{short(call)}` is"
    inner = own_function(tensors, call)
    for each in inner.calls if inner is not None else []:
        if reads(tensors, each, scope) and not tensors.source.rare(each, None):
            return f"`{short(call)}` runs `{short(each)}`"
    return ""


def reads(tensors: Tensors, call: ast.Call, scope: Scope) -> bool:
    """Whether a call reads a file or the network."""
    if tensors.source.builtin(call.func, scope, "open"):
        mode = flag(call, "mode", 1)
        return mode is None or (isinstance(mode, str) and not set(mode) & set("wax+"))
    return bool(_READERS.fullmatch(tensors.source.dotted(call.func, scope)))


def loaders_without_workers(tensors: Tensors) -> Iterator[Hit]:
    """A DataLoader whose items are made by the process that should feed a GPU."""
    if not tensors.gpu:
        return
    for scope in tensors.source.scopes.values():
        for call in scope.calls:
            if tensors.source.dotted(call.func, scope) not in (
                "torch.utils.data.DataLoader",
                "torch.utils.data.dataloader.DataLoader",
            ):
                continue
            spread = any(each.arg is None for each in call.keywords) or any(
                isinstance(each, ast.Starred) for each in call.args
            )
            if not spread and flag(call, "num_workers", 5) in (None, 0) and not _in_memory(tensors, call, scope):
                yield call, "this DataLoader has no workers: its items are made while the GPU waits"


def _in_memory(tensors: Tensors, call: ast.Call, scope: Scope) -> bool:
    data = call.args[0] if call.args else next((each.value for each in call.keywords if each.arg == "dataset"), None)
    if data is None:
        return False
    values = tensors.source.values(key(data), scope) if key(data) else None
    made: list[ast.expr] = [each.expression for each in values] if values else [data]
    return any(
        re.match(r"(torch\.utils\.data\.)?TensorDataset|range\(|list\(", ast.unparse(each))
        or isinstance(each, (ast.List, ast.ListComp))
        for each in made
    )
