"""The OpenAPI page: written from the table of fields, since requests are read by hand."""

from typing import Any

from .. import __version__
from .schema import FILES, Schema, known_fields
from .settings import Settings

ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

USAGE: Schema = {
    "type": "object",
    "required": ["input_tokens", "input_tokens_details", "output_tokens", "total_tokens"],
    "properties": {
        "input_tokens": {"type": "integer"},
        "input_tokens_details": {
            "type": "object",
            "required": ["text_tokens", "image_tokens"],
            "properties": {
                "text_tokens": {"type": "integer"},
                "image_tokens": {"type": "integer", "description": "Reference tokens that were kept."},
            },
        },
        "output_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
    },
}

PICTURES: Schema = {
    "type": "object",
    "required": ["created", "data", "background", "output_format", "size", "usage", "sparse_context"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["b64_json"], "properties": {"b64_json": {"type": "string"}}},
        },
        "background": {"type": "string"},
        "output_format": {"type": "string"},
        "size": {"type": "string"},
        "usage": USAGE,
        "sparse_context": {
            "type": "object",
            "required": ["request_id", "selection", "queue_seconds", "pictures"],
            "properties": {
                "request_id": {"type": "string"},
                "selection": {"type": ["object", "null"], "description": "What was kept of each reference."},
                "queue_seconds": {"type": "number"},
                "pictures": {"type": "array", "items": {"type": "object"}},
            },
        },
    },
}

EVENT: Schema = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "description": "What data is: a picture on the way, the answer, or error."},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}

STATUS: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}

REFUSALS = {
    400: "A field is wrong, or a picture cannot be used.",
    401: "The key is missing or wrong.",
    403: "Without a key, this machine alone is answered.",
    404: "There is nothing of this name.",
    405: "The method is another one.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another type.",
    429: "The queue is full; Retry-After says for how long.",
    500: "The pipeline failed.",
    503: "The server is stopping, or its model does not load.",
    504: "The deadline has passed.",
}

MAKING = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def page(settings: Settings) -> dict[str, Any]:
    """The page of a server with these settings."""
    binary = {"type": "string", "format": "binary"}
    edit_fields = known_fields(settings, edits=True)
    files: dict[str, dict[str, Any]] = {
        "image": {"description": "References.", "anyOf": [binary, {"type": "array", "minItems": 1, "items": binary}]},
        "mask": {"description": "For models that paint: transparent, or white, where to paint.", **binary},
        "reference_masks": {
            "description": "White where to keep, one for each image.",
            "type": "array",
            "items": binary,
        },
    }
    assert set(files) == set(FILES)
    makes = {"application/json": {"schema": PICTURES}, "text/event-stream": {"schema": EVENT}}
    spec: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Sparse Context", "version": __version__},
        "paths": {
            "/v1/images/edits": {
                "post": _operation(
                    "createImageEdit", "Pictures of a prompt and references.", makes, MAKING,
                    {"multipart/form-data": _object({**files, **edit_fields}, ["image", "prompt"])},
                )
            },
            "/v1/images/generations": {
                "post": _operation(
                    "createImage", "Pictures of a prompt alone.", makes, MAKING,
                    {"application/json": _object(known_fields(settings, edits=False), ["prompt"])},
                )
            },
            "/v1/models": {
                "get": _operation(
                    "listModels", "The one model, in a list.",
                    _json({
                        "type": "object",
                        "required": ["object", "data"],
                        "properties": {"object": {"type": "string"}, "data": {"type": "array", "items": MODEL}},
                    }),
                )
            },
            "/v1/models/{model}": {
                "get": {
                    **_operation("retrieveModel", "The model, by its id.", _json(MODEL), (404,)),
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health": {"get": _operation("health", "Whether the server is there.", _json(STATUS))},
            "/ready": {"get": _operation("ready", "Whether it begins at once; 503 while it loads.", _json(STATUS))},
            "/metrics": {
                "get": _operation("metrics", "Figures for Prometheus.", {"text/plain": {"schema": {"type": "string"}}})
            },
        },
    }  # fmt: skip
    spec["paths"]["/ready"]["get"]["responses"]["503"] = {"description": "Not now.", "content": _json(STATUS)}
    if settings.api_key is not None:
        spec["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        spec["security"] = [{"key": []}]
        for path in ("/health", "/ready"):
            spec["paths"][path]["get"]["security"] = []
    return spec


def _object(properties: dict[str, Schema], required: list[str]) -> dict[str, Schema]:
    return {"schema": {"type": "object", "required": required, "additionalProperties": False, "properties": properties}}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(
    name: str, summary: str, content: dict[str, Any], refusals: tuple[int, ...] = (), body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An operation that answers with this content, and refuses in these ways, or by the guard."""
    told = {str(status): {"description": REFUSALS[status], "content": _json(ERROR)} for status in (401, 403, *refusals)}
    operation = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": content}, **told},
    }
    return operation if body is None else operation | {"requestBody": {"required": True, "content": body}}
