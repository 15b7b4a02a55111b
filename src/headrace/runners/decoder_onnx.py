"""A language model as an ONNX file, without torch: keys and values of all slots so far go in and come out at each step.

Inputs: ``input_ids`` (items, slots), ``pads`` (items,), ``at`` (slots,), ``keep`` (kept,), and per layer ``keys_N`` and
``values_N`` of shape (items, heads, slots before, width). Outputs: ``logits`` (items, kept, vocabulary), then the keys
and values of all slots, as `runners.decoder.Decoder` has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headrace.clock import perf_counter
from headrace.runners.collate import Array
from headrace.runners.engines import onnx_session
from headrace.runners.language import Generated

STEP_BYTES = "step_bytes"


class OnnxLanguage:
    """Raises `Unavailable` as `engines.onnx_session` does."""

    def __init__(self, directory: Path, device: str, threads: int) -> None:
        import onnxruntime

        self._session = onnx_session(directory, device, threads)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        past = [each for each in self._session.get_inputs() if each.name.startswith(("keys_", "values_"))]
        self._empty = {each.name: (each.shape[1], each.shape[3]) for each in past}
        self._outputs = [each.name for each in self._session.get_outputs()]
        self.step_bytes = int(self._session.get_modelmeta().custom_metadata_map.get(STEP_BYTES, 0))

    def logits(self, ids: Array, pads: Array, last: int) -> Array:
        found, _ = self._run(ids, pads, np.arange(ids.shape[1]), np.arange(ids.shape[1] - last, ids.shape[1]), None)
        return found

    def generate(self, ids: Array, pads: Array, new: int) -> Generated:
        start = perf_counter()
        slots = ids.shape[1]
        logits, past = self._run(ids, pads, np.arange(slots), np.array([slots - 1]), None)
        tokens = [logits[:, -1].argmax(-1)]
        prefilled = perf_counter()
        for number in range(new - 1):
            at = np.array([slots + number])
            logits, past = self._run(tokens[-1][:, None], pads, at, np.zeros(1, np.int64), past)
            tokens.append(logits[:, -1].argmax(-1))
        return Generated(np.stack(tokens, axis=1), prefilled - start, perf_counter() - prefilled)

    def _run(self, ids: Array, pads: Array, at: Array, keep: Array, past: list[Any] | None) -> tuple[Array, list[Any]]:
        named = {"input_ids": ids, "pads": pads, "at": at, "keep": keep}
        feeds = {name: self._value(np.ascontiguousarray(value, np.int64)) for name, value in named.items()}
        if past is None:
            past = [
                self._value(np.zeros((len(ids), heads, 0, width), np.float32)) for heads, width in self._empty.values()
            ]
        feeds |= dict(zip(self._empty, past, strict=True))
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        found: Array = logits.numpy()
        return found, present
