"""How far a rung's answers may be from the model's own, by task. The measures are in `runners/drift.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.errors import ConfigError
from headrace.runners.drift import Array, batch_drift, breaches, compared_as, drift

__all__ = ["PRESETS", "batch_drift", "breaches", "budget", "check_shapes", "compared_as", "drift"]

# Least and most allowed, by preset and task. With all-MiniLM-L6-v2 balanced lets ONNX Runtime's INT8 pass and keeps out
# torch-int8-dynamic, see docs/optimize.md.
PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "exact": {
        "embed": {"cos_min": 0.9999, "spearman": 0.9999},
        "classify": {"top1": 1.0, "kl_mean": 1e-4},
        "logits": {"relative_error": 1e-3},
        "generate": {"kl_mean": 1e-4, "top1": 0.98},
    },
    "balanced": {
        "embed": {"cos_mean": 0.99, "spearman": 0.985},
        "classify": {"top1": 0.98, "kl_mean": 0.02},
        "logits": {"relative_error": 0.05},
        "generate": {"kl_mean": 0.02, "perplexity_ratio": 1.05},
    },
    "small": {
        "embed": {"cos_mean": 0.97, "spearman": 0.95},
        "classify": {"top1": 0.95, "kl_mean": 0.25},
        "logits": {"relative_error": 0.15},
        "generate": {"kl_mean": 0.25, "perplexity_ratio": 1.35},
    },
}


def budget(task: str, preset: str, overrides: Mapping[str, float]) -> dict[str, float]:
    """The bounds of a preset with those that the user names: least for agreements, most for errors.

    Raises:
        ConfigError: no such preset or measure.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}", field="preset", hint=", ".join(PRESETS))
    found = dict(PRESETS[preset][task])
    known = {"embed": _EMBED_MEASURES, "classify": _CLASS_MEASURES, "generate": _LANGUAGE_MEASURES}.get(
        task, _OTHER_MEASURES
    )
    for name, value in overrides.items():
        if name not in known:
            raise ConfigError(f"{name!r} is no measure of {task}", field="max_drift", hint=", ".join(sorted(known)))
        found[name] = value
    return found


def check_shapes(kind: str, answers: Sequence[Array]) -> None:
    """Refuse answers that the measures are not made for.

    Raises:
        ConfigError: one vector for each item is compared, all of one length, and these are something else.
    """
    shapes = sorted({each.shape for each in answers})
    if kind in ("embed", "classify") and (len(shapes) > 1 or len(shapes[0]) != 1):
        raise ConfigError(
            f"{kind} compares one vector for each item, and the model's answers have shapes "
            f"{', '.join(str(list(shape)) for shape in shapes[:3])}",
            field="task",
            hint="--task logits compares whatever there is",
        )


_BATCH = {"batch_cos_mean", "batch_cos_min"}
_EMBED_MEASURES = {"cos_mean", "cos_p1", "cos_min", "spearman", "neighbours"} | _BATCH
_CLASS_MEASURES = {"top1", "kl_mean", "max_logit_diff", "flips"} | _BATCH
_LANGUAGE_MEASURES = {"kl_mean", "kl_p99", "top1", "perplexity_ratio", "batch_kl_mean", "batch_top1"}
_OTHER_MEASURES = {"relative_error", "cos_mean", "cos_min"} | _BATCH
