"""Users' annotations: what pydantic cannot describe is served all the same, arrays and images are made."""

from __future__ import annotations

import base64
import functools
import io
import sys
import types
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import BaseModel, computed_field

from headrace.config import ModelConfig
from headrace.errors import InvalidInput
from headrace.runners import Loaded
from headrace.runners.user import open_user


class Alien:
    """A type that pydantic has no schema for."""


class Square(BaseModel):
    side: float = 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> float:
        return self.side**2


def aliens(inputs: list[Alien]) -> list[Alien]:
    return inputs


def arrays(inputs: list[np.ndarray]) -> list[np.ndarray]:
    return inputs


def typed_arrays(inputs: list[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    return inputs


def blobs(inputs: list[bytes]) -> list[bytes]:
    return inputs


def squares(inputs: list[Square]) -> list[Square]:
    return inputs


class MakesArrays:
    def load(self, device: str) -> None:
        self.prepare = lambda item: np.frombuffer(item, np.uint8)  # as a tokenizer that is loaded would be

    def run(self, inputs: list[npt.NDArray[np.uint8]]) -> list[int]:
        return [int(array.sum()) for array in inputs]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Loaded]:
    def load(thing: Any) -> Loaded:
        module = types.ModuleType("users_module")
        module.thing = thing  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_module", module)
        return open_user(ModelConfig(name="m", target="users_module:thing"), "cpu")

    return load


def schemas(loaded: Loaded) -> tuple[Any, Any]:
    return msgspec.json.decode(loaded.info.item_schema), msgspec.json.decode(loaded.info.output_schema)


def refused(loaded: Loaded, item: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        loaded.prepare(item)
    assert caught.value.field == "input"
    return caught.value.message


def test_a_type_that_cannot_be_described_is_anything(load: Callable[[Any], Loaded]) -> None:
    loaded = load(aliens)
    assert schemas(loaded) == ({"not": {"type": "null"}}, {})
    assert loaded.prepare({"x": 1}) == {"x": 1}


def test_partials_and_objects_that_can_be_called_are_described_by_what_they_call(load: Callable[[Any], Loaded]) -> None:
    def scaled(inputs: list[float], by: int = 1) -> list[float]:
        return [each * by for each in inputs]

    class Scaler:
        def __call__(self, inputs: list[float]) -> list[float]:
            return scaled(inputs, 2)

    for thing in (functools.partial(scaled, by=2), Scaler):
        loaded = load(thing)
        assert schemas(loaded) == ({"type": "number"}, {"type": "number"})
        assert loaded.runner.run([loaded.prepare(3)]) == [6]


def test_outputs_are_described_as_they_are_sent(load: Callable[[Any], Loaded]) -> None:
    item, output = schemas(load(squares))
    assert set(item["properties"]) == {"side"}
    assert set(output["properties"]) == {"side", "area"}


def test_bytes_stay_bytes(load: Callable[[Any], Loaded]) -> None:
    loaded = load(blobs)
    assert schemas(loaded)[0] == {"type": "string", "format": "binary"}
    assert loaded.prepare(b"\xff\x00") == b"\xff\x00"


@pytest.mark.parametrize("function", [arrays, typed_arrays])
def test_lists_become_arrays(load: Callable[[Any], Loaded], function: Any) -> None:
    loaded = load(function)
    assert schemas(loaded) == ({"type": ["array", "number"]}, {})
    made = loaded.prepare([[1, 2], [3, 4.5]])
    assert isinstance(made, np.ndarray)
    assert made.tolist() == [[1, 2], [3, 4.5]]
    assert loaded.prepare(3).shape == ()
    array = np.zeros(3, np.float16)
    assert loaded.prepare(array) is array


@pytest.mark.parametrize("item", [["a"], [None], {"x": 1}, b"abc", [2**70]])
def test_what_is_no_number_is_no_array(load: Callable[[Any], Loaded], item: Any) -> None:
    assert refused(load(arrays), item) == "must be numbers"


def test_ragged_lists_are_no_array(load: Callable[[Any], Loaded]) -> None:
    assert "differ in length" in refused(load(arrays), [[1], [1, 2]])


def test_a_prepare_of_the_users_own_makes_the_arrays(load: Callable[[Any], Loaded]) -> None:
    loaded = load(MakesArrays)
    assert schemas(loaded)[0] == {"not": {"type": "null"}}
    assert loaded.runner.run([loaded.prepare(b"\x01\x02")]) == [3]


class TestImages:
    @pytest.fixture
    def pillow(self) -> Any:
        return pytest.importorskip("PIL.Image")

    @pytest.fixture
    def images(self, pillow: Any, load: Callable[[Any], Loaded]) -> Loaded:
        def run(inputs: list[Any]) -> list[Any]:
            return inputs

        run.__annotations__ = {"inputs": list[pillow.Image], "return": list[pillow.Image]}
        return load(run)

    @pytest.fixture
    def png(self, pillow: Any) -> bytes:
        file = io.BytesIO()
        pillow.new("RGB", (20, 10), "red").save(file, "png")
        return file.getvalue()

    def test_bytes_become_images(self, images: Loaded, png: bytes) -> None:
        assert schemas(images) == ({"type": "string", "format": "binary"}, {})
        image = images.prepare(png)
        assert (image.size, image.getpixel((0, 0))) == ((20, 10), (255, 0, 0))

    def test_what_is_no_image_is_refused(self, images: Loaded, png: bytes) -> None:
        assert refused(images, b"no image") == "not an image"
        assert refused(images, png[:-30]) == "not an image"
        assert refused(images, base64.b64encode(png).decode()).startswith("not an image: send the bytes")

    @pytest.mark.parametrize("limit", [199, 50])  # Pillow warns past its limit and raises past twice that
    @pytest.mark.filterwarnings("ignore:Image size")
    def test_an_image_of_too_many_pixels_is_refused(
        self, images: Loaded, png: bytes, pillow: Any, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", limit)
        assert refused(images, png) == "the image has too many pixels"
        monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 200)
        assert images.prepare(png).size == (20, 10)
