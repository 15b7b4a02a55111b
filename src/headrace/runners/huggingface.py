"""Hugging Face encoders: embeddings and sequence classification.

Works from a directory or a hub id. Text is tokenised in front ends (`text.py`); this module sees token ids. Remote code
is never run, weights are safetensors or loaded with ``weights_only``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.config import ModelConfig
from headrace.core import ModelInfo, TextSpec
from headrace.errors import LoadError, Unavailable
from headrace.runners import Loaded, text

_TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Files:
    """The small JSON files of a model directory, read once."""

    directory: Path
    config: dict[str, Any]
    modules: list[dict[str, Any]]
    pooling: dict[str, Any]
    sentences: dict[str, Any]
    prompts: dict[str, Any]
    max_tokens: int

    @classmethod
    def read(cls, directory: Path) -> Files:
        config = _read_json(directory / "config.json")
        if not config:
            raise LoadError(f"{directory} has no config.json", field="target", hint="give a Hugging Face directory")
        modules = _read_json(directory / "modules.json") or []
        pooling = next((m["path"] for m in modules if m["type"].endswith(".Pooling")), "1_Pooling")
        sentences = _read_json(directory / "sentence_bert_config.json") or {}
        limits = [
            sentences.get("max_seq_length"),
            (_read_json(directory / "tokenizer_config.json") or {}).get("model_max_length"),
            config.get("max_position_embeddings"),
        ]
        # RoBERTa counts positions from its padding id: two fewer tokens fit than it has positions.
        if limits[2] and config.get("model_type") in {"roberta", "xlm-roberta", "camembert"}:
            limits[2] -= config.get("pad_token_id", 1) + 1
        return cls(
            directory,
            config,
            modules,
            _read_json(directory / pooling / "config.json") or {},
            sentences,
            _read_json(directory / "config_sentence_transformers.json") or {},
            int(min((limit for limit in limits if limit), default=512)),
        )

    def task(self, wanted: str) -> str:
        if wanted != "auto":
            return wanted
        names = self.config.get("architectures") or []
        if any(name.endswith("ForSequenceClassification") for name in names):
            return "classify"
        if self.modules or any(name.endswith(("Model", "ForMaskedLM")) for name in names):
            return "embed"
        raise LoadError(
            f"cannot tell what {self.directory.name} ({', '.join(names) or 'no architecture named'}) is for",
            field="task",
            hint="say --task embed, classify, logits or generate",
        )

    def optimised_as(self, wanted: str) -> str:
        """As `task`; and what writes is known by its name, though it is not served from here."""
        names = self.config.get("architectures") or []
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
        return "generate" if wanted == "auto" and causal else self.task(wanted)

    def prefix(self) -> str:
        """The prompt that sentence-transformers puts before every text unless told otherwise.

        Raises:
            LoadError: there is no prompt of that name, or it should not be pooled.
        """
        name = self.prompts.get("default_prompt_name")
        if name is None:
            return ""
        prompt = (self.prompts.get("prompts") or {}).get(name)
        if prompt is None:
            raise LoadError(
                f"{self.directory} has no prompt {name!r}",
                field="target",
                hint="mend default_prompt_name in config_sentence_transformers.json",
            )
        if prompt and not self.pooling.get("include_prompt", True):
            raise LoadError(
                f"cannot leave the prompt {name!r} out of the pooling",
                field="target",
                hint="serve it as a class with run()",
            )
        return str(prompt)


def open_huggingface(config: ModelConfig, device: str) -> Loaded:
    """Load a model directory or hub id.

    Raises:
        LoadError: a file is missing or unreadable, or asks for something that is not done here.
        Unavailable: torch or transformers is not installed.
    """
    try:
        import torch  # noqa: F401 - said here, by its name, when it is missing
        import transformers
    except ImportError as error:
        raise Unavailable(f"{config.target} needs {error.name}", hint="pip install 'headrace[torch]'") from None

    transformers.utils.logging.disable_progress_bar()
    files = Files.read(locate(config.target))
    if not (files.directory / _TOKENIZER_FILE).exists():
        raise LoadError(
            f"{files.directory} has no {_TOKENIZER_FILE}",
            field="target",
            hint="save the model's fast tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(DIR)",
        )
    task = files.task(config.task)
    model = load_model(files, task, config.target)
    spec = text_spec(files, model, task, min(files.max_tokens, config.max_batch_tokens))
    text.TextPreparer(spec)  # front ends make their own; what is wrong with it must be said at load
    vocabulary = spec.vocabulary
    runner = _EncoderRunner(model, _head(task, files, model.config), padding(task, model.config, vocabulary))
    runner.load(device)
    info = ModelInfo(
        name=config.name,
        task=task,
        platform="transformers",
        device=device,
        item_schema=msgspec.json.encode({"type": "string", "maxLength": config.max_input_chars}),
        output_schema=msgspec.json.encode(OUTPUT_SCHEMAS[task]),
        text=spec,
        width=model.config.hidden_size if task == "embed" else 0,
    )
    ids = np.arange(spec.max_tokens, dtype=np.int32) % max(1, vocabulary // 2)
    return Loaded(runner, info, cost=text.cost, example=lambda length: ids[:length])


def load_model(files: Files, task: str, target: str, **options: Any) -> Any:
    """The directory's model for a task, in float32, for inference. Raises `LoadError`."""
    import torch

    kind = _auto_class(task)
    try:
        model = kind.from_pretrained(files.directory, trust_remote_code=False, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load {target}: {error}", field="target") from error
    return model.eval()


def empty_model(files: Files, task: str) -> Any:
    """The directory's model with all its layers and no weights: its tensors have shapes and no memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
    with torch.device("meta"):
        return _auto_class(task).from_config(config, trust_remote_code=False)


def _auto_class(task: str) -> Any:
    import transformers

    return {"embed": transformers.AutoModel, "generate": transformers.AutoModelForCausalLM}.get(
        task, transformers.AutoModelForSequenceClassification
    )


def text_spec(files: Files, model: Any, task: str, max_tokens: int) -> TextSpec:
    """How texts become token ids for this model."""
    vocabulary = model.get_input_embeddings().num_embeddings
    spec = TextSpec(str(files.directory / _TOKENIZER_FILE), max_tokens, vocabulary, _token_types(model))
    if task == "embed":
        lower = bool(files.sentences.get("do_lower_case"))
        spec = msgspec.structs.replace(spec, prefix=files.prefix(), lower=lower)
    return spec


_NUMBERS = {"type": "array", "items": {"type": "number"}}
OUTPUT_SCHEMAS: dict[str, Any] = {
    "embed": _NUMBERS,
    "logits": _NUMBERS,
    "generate": {"type": "object", "properties": {"text": {"type": "string"}, "tokens": {"type": "integer"}}},
    "classify": {
        "type": "object",
        "properties": {
            "label": {"type": "string"},
            "score": {"type": "number"},
            "scores": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    },
}


def _token_types(model: Any) -> int:
    """Rows of the table of token types. GPT-2 looks them up among the tokens and has no such table."""
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return 0
    return int(getattr(model.config, "type_vocab_size", 0))


def padding(task: str, config: Any, vocabulary: int) -> int:
    """The token id to pad with.

    Raises:
        LoadError: it is not known, and a classifier may look for an item's end by it.
    """
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    if padding is not None and 0 <= padding < vocabulary:
        return int(padding)
    if task != "embed":
        raise LoadError(
            f"the classifier has no pad_token_id from 0 to {vocabulary - 1}: its items cannot be batched",
            field="target",
            hint="set pad_token_id in config.json to the tokenizer's padding token",
        )
    return 0  # the attention mask hides whatever stands there


class _EncoderRunner:
    """Pads a batch of token ids, runs the encoder, applies the head."""

    def __init__(self, model: Any, head: Callable[[Any, Any], list[Any]], padding: int) -> None:
        self._model = model
        self._head = head
        self._padding = padding
        self._device = "cpu"

    def load(self, device: str) -> None:
        self._device = device
        self._model.to(device)

    def run(self, inputs: list[Any]) -> list[Any]:
        import torch

        batch = {name: torch.from_numpy(values) for name, values in _collate(inputs, self._padding).items()}
        if self._device != "cpu":
            batch = {name: values.pin_memory().to(self._device, non_blocking=True) for name, values in batch.items()}
        with torch.inference_mode():
            return self._head(self._model(**batch), batch["attention_mask"])


def _collate(items: list[Any], padding: int) -> dict[str, np.ndarray[Any, Any]]:
    """Right-pad to the longest, ids with ``padding``, all else with 0: int64 arrays of shape (items, longest)."""
    shape = (len(items), max(map(text.cost, items)))
    batch = {"input_ids": np.full(shape, padding, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for row, item in enumerate(items):
        if isinstance(item, dict):
            for name, values in item.items():
                batch.setdefault(name, np.zeros(shape, np.int64))[row, : len(values)] = values
            if "attention_mask" not in item:
                batch["attention_mask"][row, : text.cost(item)] = 1
        else:
            batch["input_ids"][row, : len(item)] = item
            batch["attention_mask"][row, : len(item)] = 1
    return batch


def _head(task: str, files: Files, config: Any) -> Callable[[Any, Any], list[Any]]:
    """What turns the encoder's output and the attention mask into one answer per item."""
    if task == "embed":
        return _embedding_head(files)

    def logits(output: Any, _: Any) -> list[Any]:
        return list(output.logits.float().cpu().numpy())

    def classify(output: Any, _: Any) -> list[Any]:
        logits = output.logits.float()
        kind = activation(config, logits.shape[-1])
        shares = logits if kind == "none" else logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
        names = [str(config.id2label[index]) for index in range(shares.shape[-1])]
        answers = []
        for row in shares.cpu().tolist():
            best = max(range(len(row)), key=row.__getitem__)
            answers.append({"label": names[best], "score": row[best], "scores": dict(zip(names, row, strict=True))})
        return answers

    return classify if task == "classify" else logits


def activation(config: Any, classes: int) -> str:
    """What makes scores of a classifier's logits: softmax, sigmoid, or none for a regression."""
    if config.problem_type == "regression":
        return "none"
    # A softmax over one label is 1 whatever the input.
    return "sigmoid" if config.problem_type == "multi_label_classification" or classes == 1 else "softmax"


def _embedding_head(files: Files) -> Callable[[Any, Any], list[Any]]:
    pooled = pooling(files)
    return lambda output, mask: list(pooled(output, mask).cpu().numpy())


def pooling(files: Files) -> Callable[[Any, Any], Any]:
    """Pooling as sentence-transformers' files describe it; mean and unit length where they say nothing."""
    unknown = [
        m["type"] for m in files.modules if m["type"].rpartition(".")[2] not in {"Transformer", "Pooling", "Normalize"}
    ]
    if unknown:
        raise LoadError(f"cannot apply the module {unknown[0]}", field="target", hint="serve it as a class with run()")
    normalize = not files.modules or any(m["type"].endswith(".Normalize") for m in files.modules)
    modes = [name for name, on in files.pooling.items() if name.startswith("pooling_mode_") and on]
    mode = modes[0] if modes else "pooling_mode_mean_tokens"
    if len(modes) > 1 or mode not in _POOLING:
        raise LoadError(f"cannot pool by {', '.join(modes)}", field="target", hint="serve it as a class with run()")
    pool = _POOLING[mode]

    def embed(output: Any, mask: Any) -> Any:
        import torch

        vectors = pool(output.last_hidden_state.float(), mask)
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    return embed


def _mean(states: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _last(states: Any, mask: Any) -> Any:
    positions = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return states[range(len(states)), positions]


_POOLING: dict[str, Callable[[Any, Any], Any]] = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_cls_token": lambda states, mask: states[:, 0],
    "pooling_mode_max_tokens": lambda states, mask: states.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1),
    "pooling_mode_lasttoken": _last,
}


def locate(target: str) -> Path:
    """A directory as it is; a hub id through the hub's cache, downloading what is missing."""
    path = Path(target).expanduser()
    if path.is_dir():
        return path.resolve()
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                target, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"]
            )
        )
    except Exception as error:  # the hub client raises a wide family, network errors included
        raise LoadError(
            f"{target} is neither a directory nor a model the hub gives: {error}",
            field="target",
            hint="give module:callable, a Hugging Face directory or id, or a TorchScript .pt file",
        ) from error


def _read_json(path: Path) -> Any:
    return msgspec.json.decode(path.read_bytes()) if path.exists() else None
