"""What the names of a file hold, as far as its own text shows it: models, tensors on a device, tokenizers.

Everything here answers "surely" or "no": a name with one binding that is not understood is not understood.
"""

from __future__ import annotations

import ast
import re

from headrace.profiling.pitfalls.source import Scope, Source, arguments, key, keyword, method, receiver

# How sure a value is a tensor on a device: a container of some (a model's output, a tuple), or one.
NONE, SOME, ONE = 0, 1, 2
_DEPTH = 12

_KEEPS_MODEL = {"to", "cuda", "cpu", "eval", "train", "half", "float", "bfloat16", "requires_grad_", "share_memory"}
_WRAPPERS = {
    "torch.compile",
    "torch.nn.DataParallel",
    "torch.nn.parallel.DataParallel",
    "torch.nn.parallel.DistributedDataParallel",
}
_OPENERS = {"torch.jit.load", "torch.jit.script", "torch.jit.trace", "torch.hub.load"}
_PLAIN_NAMES = {"model", "net", "self.model", "self.net", "self._model"}
_NOT_MODELS = re.compile(r"(Tokenizer|Processor|Config|Extractor|Dataset|Scheduler)")
_MODULE_HINT = re.compile(r"(torch\.)?(nn\.)?Module|(transformers\.)?(PreTrainedModel|AutoModel\w*)")
_META = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "grad_fn", "layout", "names", "is_leaf"}
_ONE_OF_OUTPUT = {"loss", "logits", "last_hidden_state", "pooler_output", "sample", "prev_sample", "image_embeds"}
_TENSOR_TO_TENSOR = re.compile(
    r"""
    abs|add|all|amax|amin|any|argmax|argmin|argsort|bool|ceil|clamp|clip|clone|contiguous|cos|
    cosine_similarity|cross_entropy|cumsum|detach|div|double|eq|exp|expand|flatten|float|floor|gather|ge|
    gelu|gt|half|int|isfinite|isinf|isnan|le|log|log_softmax|logsumexp|long|lt|masked_fill|matmul|mean|
    mse_loss|mul|multinomial|ne|nll_loss|norm|normalize|permute|pow|prod|relu|repeat|reshape|round|rsqrt|
    sigmoid|sign|sin|softmax|sqrt|square|squeeze|std|sub|sum|tanh|transpose|type_as|unsqueeze|var|view|
    view_as|where|bfloat16|t
    """,
    re.VERBOSE,
)
_TENSOR_TO_TUPLE = {"max", "min", "sort", "topk", "split", "chunk", "unbind", "median", "mode"}
_FACTORIES = {"zeros", "ones", "empty", "full", "rand", "randn", "randint", "tensor", "as_tensor", "arange", "linspace"}


class Tensors:
    """Answers about the values of one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        imported = {name.partition(".")[0] for name in source.aliases.values()}
        self.torch = bool(imported & {"torch", "transformers", "torchvision", "lightning", "pytorch_lightning"})
        self.gpu = self.torch and any(re.match(r"(cuda|mps|xpu|hpu)(:\d+)?$", text) for text in source.strings)
        self.gpu = self.gpu or (self.torch and self._calls_cuda())
        self._kinds: dict[tuple[str, Scope], int] = {}
        self._models: dict[tuple[str, Scope], bool] = {}
        self._losses: dict[Scope, dict[str, ast.Call]] = {}
        self._spoken: dict[Scope, set[str]] = {}

    def _calls_cuda(self) -> bool:
        calls = (call for scope in self.source.scopes.values() for call in scope.calls)
        return any(method(call) == "cuda" and not call.args for call in calls)

    # Models.

    def is_module_class(self, node: ast.ClassDef, depth: int = 0) -> bool:
        """Whether a class of this file derives from ``torch.nn.Module`` or one of the well-known kinds of it."""
        if depth > _DEPTH:
            return False
        for base in node.bases:
            name = self.source.dotted(base, self.source.top)
            if name.startswith(("torch.nn.", "transformers.", "lightning.", "pytorch_lightning.")):
                return name.rpartition(".")[2].endswith(("Module", "Model", "Sequential"))
            own = self.source.classes.get(base.id) if isinstance(base, ast.Name) else None
            if own is not None and own is not node and self.is_module_class(own, depth + 1):
                return True
        return False

    def is_model(self, node: ast.expr, scope: Scope, depth: int = 0) -> bool:
        """Whether an expression is surely a module with weights."""
        if depth > _DEPTH or not self.torch:
            return False
        if isinstance(node, ast.Call):
            return self._makes_model(node, scope, depth)
        name = key(node)
        if not name:
            return False
        if (name, scope) not in self._models:
            self._models[name, scope] = False  # what a name is bound to may name it again
            self._models[name, scope] = self._is_model_name(name, scope, depth)
        return self._models[name, scope]

    def _is_model_name(self, name: str, scope: Scope, depth: int) -> bool:
        values = self.source.values(name, scope)
        if values is not None:
            makers = [each for each in values if not (isinstance(each.expression, ast.Constant))]
            known = [
                not (each.part or each.item) and self.is_model(each.expression, scope, depth + 1) for each in makers
            ]
            if known and all(known):
                return True
            if any(self._is_something_else(each.expression, scope) for each in makers):
                return False
        hint = self._hint(name, scope)
        if hint:
            return bool(_MODULE_HINT.fullmatch(hint))
        return self._treated_as_model(name, scope)

    def _is_something_else(self, node: ast.expr, scope: Scope) -> bool:
        """A value made by something known that is no torch model: ONNX sessions, pipelines, functions."""
        if isinstance(node, (ast.Lambda, ast.Dict, ast.List)):
            return True
        if not isinstance(node, ast.Call):
            return False
        name = self.source.dotted(node.func, scope)
        return bool(name) and not name.startswith(("torch", ".", "transformers.Auto", "timm")) and "odel" not in name

    def _hint(self, name: str, scope: Scope) -> str:
        """The annotation of an argument."""
        function = scope.function
        given = [] if function is None else arguments(function)
        hint = next((each.annotation for each in given if each.arg == name and each.annotation is not None), None)
        if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
            return hint.value
        return "" if hint is None else ast.unparse(hint)

    def _treated_as_model(self, name: str, scope: Scope) -> bool:
        """A plain name for a model, put into a mode or asked for its parameters where it is used."""
        if scope not in self._spoken:
            found: set[str] = set()
            for call in scope.calls:
                if (method(call) == "eval" and not call.args) or method(call) in ("parameters", "named_parameters"):
                    found.add(key(receiver(call)))
                if method(call) == "train" and all(isinstance(each, (ast.Constant, ast.Name)) for each in call.args):
                    found.add(key(receiver(call)))
            self._spoken[scope] = found
        if name in self._spoken[scope]:
            return True
        return name in _PLAIN_NAMES and self._is_plainly_a_model(name, scope)

    def _is_plainly_a_model(self, name: str, scope: Scope) -> bool:
        function = scope.function
        if function is None:
            return False
        if name.startswith("self."):
            values = self.source.values(name, scope)
            return values is not None and any("odel" in ast.unparse(each.expression) for each in values)
        return any(each.arg == name for each in [*function.args.posonlyargs, *function.args.args])

    def _makes_model(self, call: ast.Call, scope: Scope, depth: int) -> bool:
        if method(call) in _KEEPS_MODEL and self.is_model(receiver(call), scope, depth + 1):
            return True
        name = self.source.dotted(call.func, scope)
        if method(call) == "from_pretrained":
            kind = self.source.dotted(receiver(call), scope)
            return kind.startswith("transformers.") and not _NOT_MODELS.search(kind)
        if name in _WRAPPERS:
            return bool(call.args) and self.is_model(call.args[0], scope, depth + 1)
        if name in _OPENERS or re.match(r"torchvision\.models\.\w+$|timm\.create_model$", name):
            return True
        if re.match(r"torch\.nn\.[A-Z]\w*$", name):
            return not name.endswith(("Parameter", "Buffer"))
        if isinstance(call.func, ast.Name) and not name:
            own = self.source.classes.get(call.func.id)
            return own is not None and self.is_module_class(own)
        return False

    # Tensors.

    def kind(self, node: ast.expr, scope: Scope, depth: int = 0) -> int:
        """`ONE`: a tensor that is on the device when the program uses one. `SOME`: holds such. `NONE`: not known."""
        if depth > _DEPTH or not self.torch:
            return NONE
        if isinstance(node, (ast.Name, ast.Attribute)) and (name := key(node)):
            return max(self._kind_of_name(name, scope, depth), self._kind_of_attribute(node, scope, depth))
        if isinstance(node, ast.Attribute):
            return self._kind_of_attribute(node, scope, depth)
        if isinstance(node, ast.Call):
            return self._kind_of_call(node, scope, depth + 1)
        if isinstance(node, ast.BinOp):
            return max(self.kind(node.left, scope, depth + 1), self.kind(node.right, scope, depth + 1))
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            return self.kind(node.operand, scope, depth + 1)
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                return NONE
            return self.kind(node.value, scope, depth + 1)
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
            return ONE if any(self.kind(each, scope, depth + 1) == ONE for each in _sides(node)) else NONE
        return NONE

    def _kind_of_name(self, name: str, scope: Scope, depth: int) -> int:
        if (name, scope) in self._kinds:
            return self._kinds[name, scope]
        self._kinds[name, scope] = NONE
        values = self.source.values(name, scope) if "." not in name else None
        found = NONE
        if values:
            kinds = [min(self.kind(each.expression, scope, depth + 1), SOME if each.part else ONE) for each in values]
            found = min(kinds)
        if name in self.losses(scope) and not any(is_plain(each.expression) for each in values or []):
            found = ONE
        self._kinds[name, scope] = found
        return found

    def losses(self, scope: Scope) -> dict[str, ast.Call]:
        """Names in a scope on which ``backward`` is called, however it is spelt, with that call."""
        if scope not in self._losses:
            self._losses[scope] = {
                name: call for call in scope.calls if is_backward(call) and (name := _given_to_backward(call))
            }
        return self._losses[scope]

    def _kind_of_attribute(self, node: ast.expr, scope: Scope, depth: int) -> int:
        if not isinstance(node, ast.Attribute) or node.attr in _META:
            return NONE
        if self.kind(node.value, scope, depth + 1) == NONE:
            return NONE
        return ONE if node.attr in _ONE_OF_OUTPUT or node.attr in ("data", "T", "grad", "mT") else SOME

    def _kind_of_call(self, call: ast.Call, scope: Scope, depth: int) -> int:
        name = self.source.dotted(call.func, scope)
        last = name.rpartition(".")[2] or method(call)
        if name.startswith("torch."):
            return self._kind_of_torch(call, last, scope, depth)
        if self.is_model(call.func, scope, depth):
            return ONE if self.is_criterion(call.func, scope) else SOME
        if not isinstance(call.func, ast.Attribute):
            return NONE
        if last in ("to", "cuda"):
            return self._kind_of_move(call, last, scope, depth)
        held = self.kind(call.func.value, scope, depth)
        if held == NONE:
            return NONE
        if _TENSOR_TO_TENSOR.fullmatch(last) or (last in ("max", "min") and not (call.args or call.keywords)):
            return ONE
        return SOME if last in _TENSOR_TO_TUPLE else NONE

    def _kind_of_torch(self, call: ast.Call, last: str, scope: Scope, depth: int) -> int:
        if last in _FACTORIES:
            device = keyword(call, "device")
            return NONE if device is None or (isinstance(device, ast.Constant) and device.value == "cpu") else ONE
        if not any(self.kind(each, scope, depth) for each in call.args):
            return NONE
        if (
            _TENSOR_TO_TENSOR.fullmatch(last)
            or last in ("stack", "cat")
            or (last in ("max", "min") and len(call.args) == 1)
        ):
            return ONE
        return SOME if last in _TENSOR_TO_TUPLE else NONE

    def _kind_of_move(self, call: ast.Call, last: str, scope: Scope, depth: int) -> int:
        if self.is_model(receiver(call), scope, depth):
            return NONE
        where = call.args[0] if call.args else keyword(call, "device")
        if isinstance(where, ast.Constant) and where.value == "cpu":
            return NONE
        moves = last == "cuda" or (where is not None and "device" in ast.unparse(where).lower())
        moves = moves or (isinstance(where, ast.Constant) and str(where.value).startswith("cuda"))
        return max(self.kind(receiver(call), scope, depth), SOME if moves and self.gpu else NONE)

    def is_criterion(self, node: ast.expr, scope: Scope) -> bool:
        """Whether a model is a loss function, which has no weights."""
        values = self.source.values(key(node), scope) if key(node) else None
        made = [each.expression for each in values] if values else [node]
        calls = [each for each in made if isinstance(each, ast.Call)]
        return bool(calls) and all(self.source.dotted(each.func, scope).endswith("Loss") for each in calls)

    # Tokenizers.

    def is_tokenizer(self, node: ast.expr, scope: Scope) -> bool:
        """Whether an expression is a tokenizer of transformers or tokenizers."""
        name = key(node)
        values = self.source.values(name, scope) if name else None
        if values:
            return all(self._makes_tokenizer(each.expression, scope) for each in values)
        imported = {each.partition(".")[0] for each in self.source.aliases.values()}
        return name.rpartition(".")[2] == "tokenizer" and bool(imported & {"transformers", "tokenizers"})

    def _makes_tokenizer(self, node: ast.expr, scope: Scope) -> bool:
        if not isinstance(node, ast.Call):
            return False
        if method(node) in ("from_pretrained", "from_file"):
            return "Tokenizer" in self.source.dotted(receiver(node), scope)
        return False


def is_backward(node: ast.AST) -> bool:
    """``loss.backward()``, and ``backward(loss)`` of an accelerator, a fabric or a Lightning module."""
    return method(node) in ("backward", "manual_backward")


def is_plain(node: ast.expr) -> bool:
    """Whether a value has surely no graph: a number, or something made with ``item``, ``detach`` and the like."""
    plain = {"item", "detach", "tolist", "numpy", "data"}
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and each.attr in plain:
            return True
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id in ("float", "int"):
            return True
    return isinstance(node, ast.Constant)


def _given_to_backward(call: ast.Call) -> str:
    given: ast.expr = call.func.value if isinstance(call.func, ast.Attribute) else call
    if call.args and "loss" in key(call.args[0]):
        given = call.args[0]
    if method(given) == "scale" and isinstance(given, ast.Call) and given.args:
        given = given.args[0]
    if isinstance(given, ast.BinOp) and isinstance(given.op, ast.Div):
        given = given.left
    return given.id if isinstance(given, ast.Name) else ""


def _sides(node: ast.Compare) -> list[ast.expr]:
    return [node.left, *node.comparators]
