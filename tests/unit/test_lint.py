"""Pitfalls read from the source. A case marks the line that must be found with ``# HERE``; a clean one has no mark."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from headrace.profiling.lint import RULES, check, check_text
from headrace.profiling.pitfalls.source import Source

# What the cases have in common: a model and its training.
TRAINING = """
import torch
from torch import nn

device = "cpu"
model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).to(device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
ON_A_GPU = TRAINING.replace('"cpu"', '"cuda"')
# A model of one's own, and its weights.
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    def forward(self, x):
        return self.layers(x)
"""


def text(case: str, before: str = TRAINING) -> str:
    return before + textwrap.dedent(case)


def found(source: str) -> list[tuple[str, int]]:
    return [(each.code, each.line) for each in check_text(source.encode(), "case.py")]


def marked(source: str) -> list[int]:
    return [number for number, line in enumerate(source.splitlines(), 1) if "# HERE" in line]


def assert_found(code: str, source: str) -> None:
    """Exactly the marked lines are found, and by no other rule."""
    assert marked(source)
    assert found(source) == [(code, line) for line in marked(source)]


def assert_clean(source: str) -> None:
    ast.parse(source)
    assert found(source) == []


GRAPH_KEPT = [
    """
    def train(batches):
        losses = []
        for x, y in batches:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)  # HERE
        return losses
    """,
    """
    def train(batches, total=0.0):
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            total += loss  # HERE
        return total
    """,
    """
    def train(batches):
        total = 0.0
        for x, y in batches:
            loss = criterion(model(x), y)
            (loss / 4).backward()
            total = total + loss * len(x)  # HERE
        return total
    """,
    """
    class Trainer:
        def step(self, x, y):
            loss = criterion(model(x), y)
            self.scaler.scale(loss).backward()
            self.history["loss"].append((1, loss))  # HERE
    """,
    """
    seen = []
    for x, y in batches:
        loss = criterion(model(x), y)
        accelerator.backward(loss)
        seen.append({"loss": loss.cpu()})  # HERE
    """,
]
GRAPH_NOT_KEPT = [
    # The number, the detached tensor, a sum without gradients.
    """
    def train(batches):
        losses, total = [], 0.0
        for step, (x, y) in enumerate(batches):
            loss = criterion(model(x), y)
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                total += loss
    """,
    # The sum is what backward needs.
    """
    def train(batches):
        for x, y in batches:
            loss = 0.0
            for part in x:
                loss += criterion(model(part), y)
            loss.backward()
    """,
    """
    def train(batches):
        for x, y in batches:
            losses = []
            for part in x:
                loss = criterion(model(part), y)
                losses.append(loss)
            loss = torch.stack(losses).mean()
            loss.backward()
    """,
    # The name is a number by then.
    """
    def train(batches):
        total = 0.0
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            loss = loss.detach()
            total += loss
    """,
    # A container with a bound, one that is emptied, one that is new in every turn.
    """
    from collections import deque
    def train(batches):
        last, some = deque(maxlen=10), []
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            new = []
            new.append(loss)
            last.append(loss)
            some.append(loss)
            some.clear()
    """,
    # A meter may take the number for itself.
    """
    from meters import Mean
    def train(batches, tracker):
        mean = Mean()
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            mean.append(loss)
            tracker.append(loss)
            mean += loss
    """,
    # A step count beside the loss.
    """
    def train(batches, steps):
        count = 0
        for x, y in batches:
            loss = criterion(model(x), y)
            (loss / steps).backward()
            count += steps
    """,
    # Once, and not in a loop.
    """
    def train(x, y):
        kept = []
        loss = criterion(model(x), y)
        loss.backward()
        kept.append(loss)
        return kept
    """,
]


@pytest.mark.parametrize("case", GRAPH_KEPT)
def test_a_loss_that_is_kept_with_its_graph_is_found(case: str) -> None:
    assert_found("graph_kept", text(case))


@pytest.mark.parametrize("case", GRAPH_NOT_KEPT)
def test_a_loss_that_is_kept_as_a_number_or_needed_is_not(case: str) -> None:
    assert "graph_kept" not in dict(found(text(case)))


WITH_GRAD = [
    """
    def validate(model, batches):
        hits = 0
        for x, y in batches:
            out = model(x)  # HERE
            hits += (out.argmax(1) == y).sum()
        return hits
    """,
    """
    def scores(batches):
        net = Net()
        net.eval()
        return [net(x).tolist() for x in batches]  # HERE
    """,
    """
    from fastapi import FastAPI
    app = FastAPI()
    net = Net().eval()

    @app.post("/predict")
    def answer(body: list[float]):
        return net(torch.tensor(body))  # HERE
    """,
    """
    class Classify:
        def load(self, device):
            self.net = Net().to(device).eval()

        def run(self, inputs):
            return list(self.net(torch.stack(inputs)))  # HERE
    """,
    """
    import litserve as ls

    class Api(ls.LitAPI):
        def setup(self, device):
            self.model = Net().eval()

        def predict(self, x):
            return self.model(x)  # HERE
    """,
    """
    from transformers import AutoModel

    def embed_all(texts, tokenizer):
        encoder = AutoModel.from_pretrained("name")
        encoder.eval()
        return encoder(**tokenizer(texts)).last_hidden_state.detach().numpy()  # HERE
    """,
]
WITHOUT_GRAD = [
    """
    @torch.no_grad()
    def validate(model, batches):
        return [model(x).argmax(1).tolist() for x in batches]
    """,
    """
    def validate(model, batches):
        model.eval()
        with torch.inference_mode():
            return [model(x).argmax(1).tolist() for x in batches]
    """,
    # The caller sees to it.
    """
    def validate(model, batches):
        return [model(x).argmax(1).tolist() for x in batches]

    def fit(model, batches):
        with torch.no_grad():
            validate(model, batches)
    """,
    # Off for the whole file, or for the weights.
    """
    torch.set_grad_enabled(False)

    def validate(model, batches):
        return [model(x).argmax(1).tolist() for x in batches]
    """,
    """
    net = Net().eval().requires_grad_(False)

    def predict(x):
        return net(x).tolist()
    """,
    # Gradients are wanted: an attack, a map of what matters.
    """
    def evaluate(model, x, y):
        x.requires_grad_()
        model.eval()
        model(x)[0, y].backward()
        return x.grad.abs().tolist()
    """,
    # Lightning turns them off; a module's own method is called by who knows whom.
    """
    import lightning as L

    class Lit(L.LightningModule):
        def validation_step(self, batch, index):
            return self.net(batch).argmax(1).tolist()

        def predict(self, x):
            return self.net(x).tolist()
    """,
    # No torch model: an ONNX session, a pipeline, a pydantic class, and something that is only called model.
    """
    import onnxruntime as ort
    from transformers import pipeline

    def predict(x):
        session = ort.InferenceSession("model.onnx")
        answer = pipeline("sentiment-analysis")
        return session(x).tolist(), answer(x)

    def evaluate(model: type, x):
        return model(x).tolist()
    """,
    # generate has no_grad inside.
    """
    from transformers import AutoModelForCausalLM

    def predict(ids):
        lm = AutoModelForCausalLM.from_pretrained("name").eval()
        return lm.generate(ids).tolist()
    """,
]


@pytest.mark.parametrize("case", WITH_GRAD)
def test_a_forward_with_gradients_in_evaluation_or_serving_is_found(case: str) -> None:
    assert_found("grad_in_inference", text(case, NET))


@pytest.mark.parametrize("case", WITHOUT_GRAD)
def test_a_forward_without_gradients_or_that_needs_them_is_not(case: str) -> None:
    assert_clean(text(case, NET))


SERVED_IN_TRAIN_MODE = [
    """
    net = Net()
    net.load_state_dict(torch.load("net.pt"))

    @torch.inference_mode()
    def predict(x):
        return net(x).tolist()  # HERE
    """,
    """
    class Classify:
        def load(self, device):
            self.net = Net().to(device)
            self.net.load_state_dict(torch.load("net.pt"))

        @torch.inference_mode()
        def run(self, inputs):
            return list(self.net(torch.stack(inputs)))  # HERE
    """,
]
SERVED_IN_EVAL_MODE = [
    """
    net = Net()
    net.load_state_dict(torch.load("net.pt"))
    net.eval()

    @torch.inference_mode()
    def predict(x):
        return net(x).tolist()
    """,
    # from_pretrained has done it.
    """
    from transformers import AutoModel

    net = AutoModel.from_pretrained("name")
    net.load_state_dict(torch.load("net.pt"))

    @torch.inference_mode()
    def predict(x):
        return net(x).tolist()
    """,
    # Whoever made it may have done it.
    """
    def predict(model, x):
        model.load_state_dict(torch.load("net.pt"))
        with torch.no_grad():
            return model(x).tolist()
    """,
]


@pytest.mark.parametrize("case", SERVED_IN_TRAIN_MODE)
def test_a_model_that_is_served_in_train_mode_is_found(case: str) -> None:
    assert_found("train_mode_in_inference", text(case, NET))


@pytest.mark.parametrize("case", SERVED_IN_EVAL_MODE)
def test_a_model_that_is_in_eval_mode_or_may_be_is_not(case: str) -> None:
    assert_clean(text(case, NET))


def test_a_model_whose_modes_do_not_differ_may_be_served_in_either() -> None:
    source = text(SERVED_IN_TRAIN_MODE[0], NET).replace(", nn.Dropout(0.1)", "")
    assert_clean(source)


EVAL_KEPT = [
    """
    model.train()
    for epoch in range(3):
        for x, y in batches:
            criterion(model(x), y).backward()
            optimizer.step()
        model.eval()  # HERE
        with torch.no_grad():
            print(len(model(x)))
    """,
    """
    def validate(net, batches):
        net.eval()
        with torch.no_grad():
            return [net(x).argmax(1).tolist() for x in batches]

    def train_epoch(net, batches):
        for x, y in batches:
            criterion(net(x), y).backward()

    def fit(batches):
        net = nn.Linear(4, 4)
        params = net.parameters()
        for epoch in range(3):
            train_epoch(net, batches)
            validate(net, batches)  # HERE
    """,
]
EVAL_LEFT = [
    """
    for epoch in range(3):
        model.train()
        for x, y in batches:
            criterion(model(x), y).backward()
        model.eval()
        with torch.no_grad():
            print(len(model(x)))
    """,
    # Restored by the one that changed it, or set by the one that trains.
    """
    def validate(net, batches):
        was = net.training
        net.eval()
        with torch.no_grad():
            rows = [len(net(x)) for x in batches]
        net.train(was)
        return rows

    def fit(net, batches):
        params = net.parameters()
        for epoch in range(3):
            for x, y in batches:
                criterion(net(x), y).backward()
            validate(net, batches)
    """,
    # Another model: a teacher that is not trained.
    """
    def fit(batches, teacher):
        for x, y in batches:
            teacher.eval()
            with torch.no_grad():
                wanted = teacher(x)
            criterion(model(x), wanted).backward()
    """,
    # The last thing that the loop does.
    """
    for x, y in batches:
        criterion(model(x), y).backward()
        if done:
            model.eval()
            break
    """,
]


@pytest.mark.parametrize("case", EVAL_KEPT)
def test_training_that_goes_on_in_eval_mode_is_found(case: str) -> None:
    assert_found("eval_mode_in_training", text(case))


@pytest.mark.parametrize("case", EVAL_LEFT)
def test_training_that_goes_back_to_train_mode_is_not(case: str) -> None:
    assert_clean(text(case))


SYNCS = [
    """
    for x, y in batches:
        loss = criterion(model(x), y)
        loss.backward()
        total += loss.item()  # HERE
    """,
    """
    for x, y in batches:
        loss = criterion(model(x), y)
        loss.backward()
        print(f"loss {loss}")  # HERE
        seen.append(float(loss))  # HERE
        if loss > 10:  # HERE
            print("large")
    """,
    """
    with torch.no_grad():
        for x, y in batches:
            out = model(x)
            hits += (out.argmax(-1) == y).sum().item()  # HERE
    """,
    """
    for x, y in batches:
        out = model(x)
        criterion(out, y).backward()
        seen.extend(out.argmax(-1).cpu().tolist())  # HERE
    """,
]
NO_SYNCS = [
    # Every so many steps; after the loop; once per epoch.
    """
    for epoch in range(3):
        for step, (x, y) in enumerate(batches):
            loss = criterion(model(x), y)
            loss.backward()
            if step % 100 == 0:
                print(loss.item())
        print(loss.item())
    print(loss.item())
    """,
    # Shapes are known to the host; the number is one already.
    """
    for x, y in batches:
        out = model(x)
        loss = criterion(out, y)
        loss.backward()
        if out.shape[0] > 1 and out.device.type == "cuda" and out is not None:
            seen.append(int(out.shape[0]))
    """,
    # The results of an inference.
    """
    with torch.no_grad():
        while True:
            guess = model(x).argmax(-1)
            words.append(guess.item())
            rows.append(model(y).softmax(-1).cpu().numpy())
    """,
    # Not a tensor, as far as can be seen.
    """
    for x, y in batches:
        model(x)
        row.item()
        other.cpu()
    """,
    # Left at once.
    """
    for x in batches:
        out = model(x)
        print(out.argmax(-1).tolist())
        break
    """,
]


@pytest.mark.parametrize("case", SYNCS)
def test_waiting_for_the_device_in_every_step_is_found(case: str) -> None:
    assert_found("sync_in_loop", text(case, ON_A_GPU))


@pytest.mark.parametrize("case", NO_SYNCS)
def test_waiting_for_the_device_now_and_then_is_not(case: str) -> None:
    assert_clean(text(case, ON_A_GPU))


def test_a_program_for_the_cpu_alone_waits_for_no_device() -> None:
    for case in (*SYNCS, *PER_ITEM):
        assert_clean(text(case))


PER_ITEM = [
    """
    probs = model(x).softmax(-1)
    numbers = [p.item() for p in probs]  # HERE
    """,
    """
    probs = model(x).argmax(-1)
    for i in range(len(probs)):
        print(names[probs[i].item()])  # HERE
    """,
    """
    probs = model(x).argmax(-1)
    for i, p in enumerate(probs):
        table[i] = int(p)  # HERE
    """,
    """
    probs = model(x).argmax(-1)
    pairs = [(name, float(p)) for name, p in zip(names, probs)]  # HERE
    """,
]


@pytest.mark.parametrize("case", PER_ITEM)
def test_fetching_number_by_number_is_found(case: str) -> None:
    assert_found("sync_per_item", text(case, ON_A_GPU))


def test_fetching_once_and_then_looping_is_not() -> None:
    assert_clean(
        text(
            """
        probs = model(x).argmax(-1).tolist()
        for i, p in enumerate(probs):
            table[i] = int(p)
        numbers = [float(p) for p in probs]
        """,
            ON_A_GPU,
        )
    )


EMPTIED = [
    """
    for x, y in batches:
        criterion(model(x), y).backward()
        torch.cuda.empty_cache()  # HERE
    """,
    """
    def train_step(x, y):
        loss = criterion(model(x), y)
        loss.backward()
        return loss.detach()

    def train(batches):
        for x, y in batches:
            train_step(x, y)
            torch.cuda.empty_cache()  # HERE
    """,
]
NOT_EMPTIED = [
    # Once per epoch; every so many steps; after an error; between models.
    """
    for epoch in range(3):
        for step, (x, y) in enumerate(batches):
            try:
                criterion(model(x), y).backward()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            if step % 1000 == 0:
                torch.cuda.empty_cache()
        torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    """,
    """
    for width in (1, 2, 4):
        net = nn.Linear(4, width).cuda()
        net(x).sum().backward()
        del net
        torch.cuda.empty_cache()
    """,
]


@pytest.mark.parametrize("case", EMPTIED)
def test_emptying_the_cache_in_every_step_is_found(case: str) -> None:
    assert_found("empty_cache_in_loop", text(case, ON_A_GPU))


@pytest.mark.parametrize("case", NOT_EMPTIED)
def test_emptying_the_cache_between_phases_is_not(case: str) -> None:
    assert_clean(text(case, ON_A_GPU))


CYCLES = [
    "self.layers.register_forward_hook(self.seen)  # HERE",
    "self.layers[0].register_forward_hook(lambda module, args, out: self.seen(module, args, out))  # HERE",
    "self.act = self.seen  # HERE",
    "self.act = lambda x: self.seen(x)  # HERE",
    "self.act = functools.partial(self.seen, 1)  # HERE",
]
NO_CYCLES = [
    "self.act = nn.functional.relu",
    "self.act = lambda x: x * 2",
    "self.act = self.layers",
    "self.act = self.fixed",
    "out = self.seen(1)",
    "self.layers.register_forward_hook(print)",
    "self.handle = self.layers.register_forward_hook(self.seen); self.handle.remove()",
]


def module_with(line: str) -> str:
    return f"""
import functools
{NET}
    def prepare(self):
        {line}

    def seen(self, *args):
        return args

    @staticmethod
    def fixed(x):
        return x
"""


@pytest.mark.parametrize("line", CYCLES)
def test_a_module_that_holds_itself_is_found(line: str) -> None:
    source = module_with(line)
    assert [each for each in found(source) if each[1] > 1] == [("cycle_holds_tensors", marked(source)[0])]


@pytest.mark.parametrize("line", NO_CYCLES)
def test_a_module_that_does_not_is_not(line: str) -> None:
    assert_clean(module_with(line))


LOADING = [
    """
    from PIL import Image
    for path, y in paths:
        x = Image.open(path)  # HERE
        criterion(model(x), y).backward()
    """,
    """
    import json
    for path in paths:
        with open(path) as file:  # HERE
            x = json.load(file)  # HERE
        model(x).sum().backward()
    """,
    """
    import requests
    for epoch in range(3):
        for url in urls:
            for part in (1, 2):
                x = requests.get(url, timeout=5).json()  # HERE
            model(x).sum().backward()
    """,
    """
    import numpy as np

    def load(path):
        return torch.from_numpy(np.load(path))

    for path in paths:
        model(load(path)).sum().backward()  # HERE
    """,
]
NOT_LOADING = [
    # Before the loop, per epoch, now and then; and writing is no loading.
    """
    import json
    table = json.load(open("labels.json"))
    for epoch in range(3):
        weights = torch.load("weights.pt")
        for step, (x, y) in enumerate(batches):
            model(x).sum().backward()
            if step % 100 == 0:
                limits = json.load(open("limits.json"))
            with open("log.txt", "a") as file:
                file.write("step")
    """,
    # A loop that does not train; a function that is no file's.
    """
    for path in paths:
        print(open(path).read())
    """,
    """
    def open(path):
        return path

    for path in paths:
        model(open(path)).sum().backward()
    """,
]


@pytest.mark.parametrize("case", LOADING)
def test_loading_on_the_path_of_a_step_is_found(case: str) -> None:
    assert_found("loading_on_step_path", text(case))


@pytest.mark.parametrize("case", NOT_LOADING)
def test_loading_beside_the_steps_is_not(case: str) -> None:
    assert_clean(text(case))


def test_a_loader_without_workers_is_found_where_there_is_a_gpu() -> None:
    case = text(
        """
    from torch.utils.data import DataLoader, TensorDataset
    import torch.utils.data as data
    one = DataLoader(files, batch_size=8)  # HERE
    two = data.DataLoader(files, 8, num_workers=0)  # HERE
    """,
        ON_A_GPU,
    )
    assert_found("loader_without_workers", case)
    assert_clean(case.replace('"cuda"', '"cpu"'))


def test_a_loader_with_workers_or_with_all_in_memory_is_not() -> None:
    assert_clean(
        text(
            """
        from torch.utils.data import DataLoader, TensorDataset
        one = DataLoader(files, batch_size=8, num_workers=4)
        two = DataLoader(files, num_workers=workers)
        three = DataLoader(files, **options)
        four = DataLoader(TensorDataset(xs, ys), batch_size=8)
        pairs = TensorDataset(xs, ys)
        five = DataLoader(pairs)
        """,
            ON_A_GPU,
        )
    )


ON_THE_LOOP = [
    ("blocking_in_async", "import time\nasync def handle():\n    time.sleep(1)  # HERE\n"),
    ("blocking_in_async", "from time import sleep\nasync def handle():\n    sleep(1)  # HERE\n"),
    ("blocking_in_async", "import requests as r\nasync def handle(url):\n    return r.get(url)  # HERE\n"),
    ("blocking_in_async", "import subprocess\nasync def handle():\n    subprocess.run(['ls'])  # HERE\n"),
    ("file_in_async", "async def handle(path):\n    with open(path) as file:  # HERE\n        return file.read()\n"),
    (
        "tokenise_on_event_loop",
        """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("name")
async def handle(text):
    return tokenizer(text)  # HERE
""",
    ),
    (
        "tokenise_on_event_loop",
        """
from tokenizers import Tokenizer
class Handler:
    def __init__(self):
        self.words = Tokenizer.from_file("tokenizer.json")
    async def handle(self, text):
        return self.words.encode(text).ids  # HERE
""",
    ),
    (
        "forward_on_event_loop",
        """
import torch
from torch import nn
net = nn.Linear(4, 4)
async def handle(x):
    with torch.inference_mode():
        return net(x).tolist()  # HERE
""",
    ),
]
OFF_THE_LOOP = [
    "import time\ndef handle():\n    time.sleep(1)\n",
    "import asyncio\nasync def handle():\n    await asyncio.sleep(1)\n",
    "import time\nasync def handle(time):\n    time.sleep(1)\n",
    "import asyncio, time\nasync def handle():\n    await asyncio.to_thread(time.sleep, 1)\n",
    "import time\nasync def handle():\n    def work():\n        time.sleep(1)\n    return work\n",
    "import asyncio, time\nasync def handle():\n    await asyncio.to_thread(lambda: time.sleep(1))\n",
    "from aiofiles import open\nasync def handle(path):\n    async with open(path) as file:\n        return file\n",
    "import httpx\nasync def handle(url):\n    return await httpx.AsyncClient().get(url)\n",
    """
import asyncio
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("name")
async def handle(text):
    return await asyncio.to_thread(tokenizer, text)
def plain(text):
    return tokenizer(text)
async def remote(client, text):
    return await client.tokenizer(text)
""",
]


@pytest.mark.parametrize(("code", "source"), ON_THE_LOOP)
def test_what_holds_the_event_loop_is_found(code: str, source: str) -> None:
    assert_found(code, source)


@pytest.mark.parametrize("source", OFF_THE_LOOP)
def test_what_awaits_or_runs_elsewhere_is_not(source: str) -> None:
    assert_clean(source)


def test_every_rule_has_a_case_and_something_to_do() -> None:
    codes = {rule.code for rule in RULES}
    assert len(codes) == len(RULES)
    written = Path(__file__).read_text()
    for rule in RULES:
        assert f'"{rule.code}"' in written
        assert rule.advice
        assert rule.severity in ("info", "warning")


def test_a_comment_on_the_line_silences_one_rule() -> None:
    source = "import time\nasync def handle():\n    time.sleep(1)  # {}\n"
    assert found(source.format("headrace: ignore[file_in_async]")) == [("blocking_in_async", 3)]
    assert found(source.format("headrace: ignore[file_in_async, blocking_in_async]")) == []
    assert found(source.format("headrace:ignore[blocking_in_async] because")) == []
    assert found(source.format("ignore[blocking_in_async]")) == [("blocking_in_async", 3)]


def test_a_comment_on_any_line_of_a_call_silences_it() -> None:
    source = (
        "import time\nasync def handle():\n    time.sleep(\n        1\n    )  # headrace: ignore[blocking_in_async]\n"
    )
    assert found(source) == []


def test_a_finding_says_where_and_what_to_do() -> None:
    source = 'import time\nasync def handle():\n    é = "é"; time.sleep(1)\n'
    (finding,) = check_text(source.encode(), "é.py")
    assert (finding.file, finding.line, finding.column) == ("é.py", 3, 14)
    assert finding.evidence == 'é = "é"; time.sleep(1)'
    assert "time.sleep(1)" in finding.title
    assert "asyncio.sleep" in finding.advice
    assert finding.severity == "warning"


def test_what_is_no_python_is_skipped_and_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("async def f(:\n")
    (tmp_path / "null.py").write_bytes(b"async def f(): pass\n\0")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nasync def f(): open('\xe9')\n")
    (tmp_path / "wrong.py").write_bytes(b"async def f(): open('\xe9')\n")
    (tmp_path / "deep.py").write_text("async def f(): return " + "(" * 5000 + ")" * 5000)
    (tmp_path / "sum.py").write_text("async def f(x):\n    open(x)\n    return " + "+".join(["x"] * 20_000))
    report = check([tmp_path])
    assert report.files == 6
    names = [each.file.rpartition("/")[2] for each in report.skipped]
    assert sorted(names) in (
        ["broken.py", "deep.py", "null.py", "sum.py", "wrong.py"],
        ["broken.py", "deep.py", "null.py", "wrong.py"],  # an interpreter with a deeper stack
    )
    assert all(each.reason for each in report.skipped)
    assert ("latin.py", 2) in [(each.file.rpartition("/")[2], each.line) for each in report.findings]


def test_folders_of_others_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    for folder in (".venv/lib", "site-packages", "__pycache__", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("async def f(): open('x')\n")
    (tmp_path / "mine" / "a.txt").write_text("async def f(): open('x')\n")
    assert [each.file for each in check([tmp_path]).findings] == [str(tmp_path / "mine" / "a.py")]
    assert len(check([tmp_path / "site-packages"]).findings) == 1
    assert check([tmp_path, tmp_path / "mine" / "a.py"]).files == 1  # named twice, read once


def test_what_is_read_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    (tmp_path / "a.py").write_text(f"import torch\nopen({str(target)!r}, 'w')\nasync def f(): open('x')\n")
    assert check([tmp_path]).findings
    assert not target.exists()


def test_a_name_is_what_it_is_bound_to_where_it_is_read() -> None:
    source = Source("a.py", b"import torch as t\nx = 1\ndef f(t):\n    t.zeros(1)\ndef g():\n    t.zeros(1)\n")
    f, g = (source.scopes[source.functions[name][0]] for name in "fg")
    assert source.dotted(f.calls[0].func, f) == ""
    assert source.dotted(g.calls[0].func, g) == "torch.zeros"
    assert source.values("x", g) is not None
    assert source.values("t", f) is None
