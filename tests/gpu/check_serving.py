"""On a machine with a GPU: right answers, device binding, out of memory, a lost device, and the rate beside its limit.

    python tests/gpu/check_serving.py [--out FILE.json]

A script of its own, since time on a GPU is dear: one call checks and measures everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from headrace.clock import perf_counter
from headrace.config import load
from headrace.loadgen import driver
from headrace.runners import open_target
from headrace.runners.text import TextPreparer

HERE = Path(__file__).parent
PORT = 18200


def make_encoder(directory: Path) -> None:
    """BERT-base with random weights and a word tokenizer: real shapes, no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=4096)
    transformers.BertModel(config).save_pretrained(directory)
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {f"w{n}": n for n in range(4, 4096)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


@contextlib.contextmanager
def serving(*arguments: str, port: int = PORT) -> Iterator[str]:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", *arguments, "--port", str(port), "--admin-port", "-1"],
        stdout=log,
        stderr=log,
        cwd=HERE,
    )
    try:
        wait(lambda: status("/health/ready", port) == 200 or process.poll() is not None, 120)
        assert process.poll() is None, "it ended"
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        log.seek(0)
        print(log.read().decode()[-6000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def wait(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.05)


def status(path: str, port: int = PORT) -> int:
    try:
        return int(urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def metric(line: str) -> float:
    text = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10).read().decode()
    return next(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line + " "))


def check_binding() -> str:
    with serving("gpu_models:Where", "--devices", "0"):
        _, body = ask({"input": "x"})
    assert body["prediction"] == "cuda:0 of 0", body
    return str(body["prediction"])


def check_memory() -> dict[str, float]:
    with serving("gpu_models:Hungry", "--max-batch-size", "16", "--max-wait-ms", "200"):
        code, body = ask({"inputs": list(range(16))})
        assert code == 200, body
        assert body["predictions"] == list(range(16)), body
        first = metric('headrace_out_of_memory_total{model="Hungry"}')
        code, body = ask({"inputs": list(range(16))})
        assert body["predictions"] == list(range(16)), body
        second = metric('headrace_out_of_memory_total{model="Hungry"}') - first
        assert metric('headrace_worker_restarts_total{model="Hungry"}') == 0
    assert first >= 1
    assert second == 0, "the ceiling spares the second list the failed attempts"
    return {"batches that did not fit, first list of 16": first, "second list": second}


def check_lost_device() -> dict[str, Any]:
    with serving("gpu_models:Lookup", "--workers", "2"):
        assert ask({"input": 3})[1]["prediction"] == 3.0
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(ask({"input": 5})[0])) for _ in range(30)]
        for thread in threads[:15]:
            thread.start()
        code, body = ask({"input": 99})
        for thread in threads[15:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert (code, body["error"]["code"]) == (503, "worker_lost"), body
        # Two workers died of the one bad item; nobody else may have noticed more than a retryable 503.
        assert set(answers) <= {200, 503}, answers
        wait(lambda: ask({"input": 5})[0] == 200, 60)
        assert ask({"input": 5})[1]["prediction"] == 5.0
        return {"neighbours answered": answers.count(200), "of": len(answers)}


class Asked:
    """Texts, and what the model answers to each alone: load on a server whose every answer is checked."""

    def __init__(self, directory: Path) -> None:
        pick = random.Random(7)
        self.texts = [" ".join(f"w{pick.randrange(4, 4096)}" for _ in range(pick.randint(5, 60))) for _ in range(400)]
        config = load({"device": "cuda"}, targets={"m": str(directory)}, environment={}).models["m"]
        self.model = open_target(config, "cuda:0")
        assert self.model.info.text
        tokenizer = TextPreparer(self.model.info.text)
        self.items = [tokenizer.text(text) for text in self.texts]
        self.expected = [self.model.runner.run([item])[0] for item in self.items]

    def load(self, url: str, clients: int, seconds: float) -> Any:
        bodies = [json.dumps({"input": text}).encode() for text in self.texts]
        plan = driver.Plan(url=url, bodies=bodies, duration_s=seconds, check=self._check)
        level = driver.run(plan, [driver.Level(concurrency=clients)]).levels[0]
        assert not level.errors, level.errors
        return level

    def _check(self, index: int, code: int, body: bytes) -> None:
        vector = np.array(json.loads(body)["prediction"], np.float32)
        assert float(vector @ self.expected[index]) > 0.999


def check_rate(directory: Path, seconds: float) -> dict[str, Any]:
    asked = Asked(directory)
    model, items = asked.model, asked.items

    def offline(size: int, *, near: bool) -> float:
        order = sorted(items, key=len) if near else items
        start = perf_counter()
        for at in range(0, len(order), size):
            model.runner.run(order[at : at + size])
        return len(order) / (perf_counter() - start)

    offline(32, near=False)
    found: dict[str, Any] = {}
    with serving(str(directory), "--name", "bert", "--http-workers", "4") as url:
        for _ in range(2):
            found.setdefault("offline, 32 in order of arrival, items/s", []).append(round(offline(32, near=False), 1))
            found.setdefault("offline, 32 sorted by length, items/s", []).append(round(offline(32, near=True), 1))
            for clients in (1, 64, 256):
                level = asked.load(url, clients, seconds)
                found.setdefault(f"{clients} clients, req/s", []).append(level.achieved_rate)
                found.setdefault(f"{clients} clients, p50 ms", []).append(level.p50_ms)
                found.setdefault(f"{clients} clients, p99 ms", []).append(level.p99_ms)
                found.setdefault(f"{clients} clients, mean batch", []).append(level.batch_size_mean)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "BERT-base shapes, random weights, FP32, 400 texts of 5 to 60 words",
    }
    with tempfile.TemporaryDirectory() as directory:
        make_encoder(Path(directory))
        for name, part in {
            "bound to": check_binding,
            "out of memory": check_memory,
            "lost device": check_lost_device,
            "rate": lambda: check_rate(Path(directory), options.seconds),
        }.items():
            try:
                result[name] = part()
            except BaseException as error:
                result[name] = f"FAILED: {error!r}"
            print(name, result[name], flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
