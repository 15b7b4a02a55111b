"""The routes that are not in a hurry: health, metrics, the list of models, and the documentation page.

The page is served from the package's own files: it works without the internet. The document behind it is made from
what the workers say of their models, so that it shows the user's own types.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from headrace import metrics
from headrace.clock import wall
from headrace.core import ModelInfo
from headrace.errors import HeadraceError, ModelNotFound, NotReady
from headrace.serving.protocols import inference, native, openai
from headrace.serving.router import Router
from headrace.version import __version__
from headrace.web import make_app as make_web_app
from headrace.web import native_error


def make_app(router: Router, reader: metrics.Reader, parts: Sequence[Any] = ()) -> FastAPI:
    """The application beside the hot path; ``parts`` say in the health report how they are."""
    app = make_web_app("headrace", __version__, error_bytes)
    started = int(wall())

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", tags=["health"], summary="Whether this process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", tags=["health"], summary="Whether every model has a warm worker")
    async def ready() -> Response:
        states = {name: route.state for name, route in router.routes.items()}
        well = router.ready and all(part.ready for part in parts)
        body = {"status": "ready" if well else "not_ready", "models": states}
        body |= {part.name: part.state for part in parts}
        return JSONResponse(body, 200 if well else 503, None if well else {"Retry-After": "1"})

    _add_inference(app, router)

    @app.get("/metrics", tags=["watch"], summary="Metrics of all processes, in the Prometheus text format")
    async def prometheus(request: Request) -> Response:
        content, kind = reader.answer(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": kind})

    @app.get("/v1/models", tags=["openai"], summary="The models of this server")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [openai.model_object(name, started) for name in router.routes]}

    @app.get("/v1/models/{name}", tags=["openai"], summary="One model")
    async def model(name: str) -> dict[str, Any]:
        return openai.model_object(router.route(name).config.name, started)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS_PAGE)

    app.mount("/docs/assets", StaticFiles(directory=_swagger_files()), name="docs")
    frame = app.openapi

    def openapi() -> dict[str, Any]:
        app.openapi_schema = None
        document = frame()
        infos = [route.info for route in router.routes.values() if route.info]
        document["paths"] |= hot_paths(router.default, infos)
        document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def error_bytes(path: str, error: HeadraceError, request_id: str | None) -> bytes:
    """The body of an error, in the shape of the protocol that a path belongs to."""
    if path.startswith("/v1/"):
        return native.to_json(openai.error_body(error))
    if path == "/v2" or path.startswith("/v2/"):
        return native.to_json(inference.error_body(error))
    return native_error(path, error, request_id)


def _add_inference(app: FastAPI, router: Router) -> None:
    """Health and metadata of the Open Inference Protocol; its infer call is on the hot path."""
    tags: list[str | Enum] = ["open inference protocol"]

    def ready_info(name: str) -> ModelInfo:
        route = router.route(name)
        if route.info is None or not route.ready:
            raise NotReady(f"model {name} is {route.state}", retry_after_s=1.0)
        return route.info

    def known_version(version: str) -> None:
        if version not in inference.VERSIONS:
            raise ModelNotFound(f"there is no version {version!r}", field="version", hint="a model has version 1 only")

    @app.get("/v2", tags=tags, summary="What this server is")
    async def server() -> dict[str, Any]:
        return inference.server_metadata(__version__)

    @app.get("/v2/health/live", tags=tags, summary="Whether this process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", tags=tags, summary="Whether every model has a warm worker")
    async def ready() -> Response:
        return JSONResponse({"ready": router.ready}, 200 if router.ready else 503)

    @app.get("/v2/models/{name}/ready", tags=tags, summary="Whether a model has a warm worker")
    @app.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, version: str = "1") -> dict[str, Any]:
        known_version(version)
        return {"name": ready_info(name).name, "ready": True}

    @app.get("/v2/models/{name}", tags=tags, summary="Inputs and outputs of a model")
    @app.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
    async def model(name: str, version: str = "1") -> dict[str, Any]:
        known_version(version)
        return inference.metadata(ready_info(name))


def hot_paths(default: str, infos: list[ModelInfo]) -> dict[str, Any]:
    """OpenAPI path items of the hot routes, one per ready model, with the types of its items."""
    paths: dict[str, Any] = {}
    for info in infos:
        paths[f"/models/{info.name}/predict"] = _predict(info, f"predict_{info.name}")
        if info.name == default:
            paths["/predict"] = _predict(info, "predict")
    names = [info.name for info in infos if info.width]
    if names:
        paths["/v1/embeddings"] = _embeddings(names)
    return paths


def _predict(info: ModelInfo, ident: str) -> dict[str, Any]:
    item = msgspec.json.decode(info.item_schema)
    output = msgspec.json.decode(info.output_schema)
    # A schema with local definitions keeps them where its references point: at the root of its own component.
    forms: list[dict[str, Any]] = [
        _object({"input": item if not info.text else {"anyOf": [item, _TOKENS]}}, ["input"]),
        _object({"inputs": {"type": "array", "minItems": 1, "items": {}}}, ["inputs"]),
    ]
    if info.text:
        forms += [_TOKENS, _TOKEN_BATCH]
    elif info.tensors:
        forms.append({"type": "object", "minProperties": 1, "additionalProperties": {"type": "array"}})
    body = {"anyOf": forms} | ({"$defs": item["$defs"]} if "$defs" in item else {})
    answer = {
        "oneOf": [
            _object({"prediction": output, **_TIMINGS}, ["prediction", "latency_ms"]),
            _object({"predictions": {"type": "array", "items": {}}, **_TIMINGS}, ["predictions", "latency_ms"]),
        ]
    }
    return {"post": _operation(ident, f"Predict with {info.name}", _lift(body, info.name), _lift(answer, info.name))}


def _embeddings(names: list[str]) -> dict[str, Any]:
    tokens = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    texts = {"type": "array", "items": {"anyOf": [{"type": "string"}, tokens]}, "minItems": 1}
    body = _object(
        {
            "input": {"anyOf": [{"type": "string"}, tokens, texts]},
            "model": {"type": "string", "enum": names},
            "encoding_format": {"type": "string", "enum": ["float", "base64"]},
            "dimensions": {"type": ["integer", "null"]},
            "user": {},
        },
        ["input", "model"],
    )
    return {"post": _operation("embeddings", "Embeddings, OpenAI-compatible", body, {"type": "object"}, "openai")}


def _operation(ident: str, summary: str, body: Any, answer: Any, tag: str = "predict") -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"} if tag == "predict" else {"type": "object"}
    failed = {"description": "An error", "content": {"application/json": {"schema": error}}}
    return {
        "operationId": ident,
        "tags": [tag],
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {"schema": answer}}},
            "4XX": failed,
            "5XX": failed,
        },
    }


def _lift(schema: Any, name: str) -> Any:
    """Inline nothing, move nothing: only make local references absolute within this body's own schema object."""
    definitions = schema.get("$defs", {}) if isinstance(schema, dict) else {}

    def walk(node: Any, depth: int = 0) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref", "")
            if reference.startswith("#/$defs/") and depth < 32:
                return walk(definitions.get(reference.removeprefix("#/$defs/"), {}), depth + 1)
            return {key: walk(value, depth) for key, value in node.items() if key != "$defs"}
        return [walk(each, depth) for each in node] if isinstance(node, list) else node

    return walk(schema)


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _swagger_files() -> Path:
    import swagger_ui_bundle

    return Path(swagger_ui_bundle.swagger_ui_path)


_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_ROWS = {"type": "array", "items": _INTEGERS}
_NAMES = ("input_ids", "token_ids", "attention_mask", "token_type_ids")
_ONE_OF_IDS = {"oneOf": [{"required": ["input_ids"]}, {"required": ["token_ids"]}]}
_TOKENS: dict[str, Any] = _object(dict.fromkeys(_NAMES, _INTEGERS), []) | _ONE_OF_IDS
_TOKEN_BATCH: dict[str, Any] = _object(dict.fromkeys(_NAMES, _ROWS), []) | _ONE_OF_IDS
_TIMINGS = {
    "latency_ms": {"type": "number"},
    "timings": {
        "type": "object",
        "properties": {
            "queue_ms": {"type": "number"},
            "run_ms": {"type": "number"},
            "batch_size": {"type": "integer"},
        },
    },
}
_COMPONENTS = {
    "Error": _object(
        {
            "error": {
                "type": "object",
                "required": ["code", "message", "retryable"],
                "properties": {
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                    "field": {"type": "string"},
                    "hint": {"type": "string"},
                    "retryable": {"type": "boolean"},
                    "request_id": {"type": "string"},
                },
            },
            "predictions": {"type": "array"},
            **_TIMINGS,
        },
        ["error"],
    )
}
_DOCS_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>headrace API</title>
<link rel="icon" href="docs/assets/favicon-32x32.png">
<link rel="stylesheet" href="docs/assets/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})</script>
</body></html>
"""
