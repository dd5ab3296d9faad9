"""The HTTP API as an OpenAPI 3.1 document, made of `contract`, of `problems` and of the structs that bodies are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from inspect import get_annotations, getsource
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import Struct

from heliograph import __version__
from heliograph.doors import decoding, problems
from heliograph.doors.contract import JSON, LIMITS, OPERATIONS, TAGS, Operation, Parameter, Reply
from heliograph.doors.exchange import ProblemBody

PATH = "/openapi.json"
PROBLEM = "application/problem+json"
SECURITY = "key"
"""The name of the security scheme."""

_NAMES: dict[type, str] = {decoding.Post: "Send", decoding.Item: "Entry"}
"""What structs are called where their own name says too little; of others, `Body` at the end is left out."""

_ALWAYS = ("InternalError", "StoreUnavailable", "Busy")
_WITH_KEY = ("Unauthorized", "ExpiredKey", "MissingScope")
_WITH_BODY = ("InvalidJson", "BadType", "UnknownField", "RequestTimeout", "RequestTooLarge", "UnsupportedEncoding")

_REASONS = {
    400: "The request is wrong.",
    401: "There is no good API key.",
    403: "The API key may not do this.",
    404: "It is not there.",
    408: "The body did not come in time.",
    409: "It cannot be changed.",
    413: "It is too much.",
    415: "The body is encoded.",
    422: "It contradicts what was sent before.",
    429: "There is no room: nothing was taken.",
    500: "A mistake of ours.",
    503: "Not now: nothing was taken.",
}
_RETRY = {"Retry-After": "Seconds after which to try again."}
_CHALLENGE = {"WWW-Authenticate": "`Bearer`, with what is wrong with the key (RFC 6750)."}
_HEADERS = {401: _CHALLENGE, 403: _CHALLENGE, 429: _RETRY, 503: _RETRY}

_ABOUT = """\
A provider server for Apple Push Notification service: it takes notifications in, keeps them on disk until Apple has
answered, and tells what became of each.

Bodies are JSON in UTF-8. An answer that is no success is `application/problem+json` (RFC 9457): its `code` is a word
that stays, its `detail` says what to change, and its `type` leads to the code at `/docs/errors`. Where there is `GET`
there is `HEAD`; other methods get a 405 whose `Allow` says which there are."""


def codes(operation: Operation) -> list[str]:
    """All problems that an operation can answer."""
    found = [*operation.codes]
    if operation.scopes is not None:
        found += _WITH_KEY + _ALWAYS
    if operation.body is not None:
        found += _WITH_BODY
    return sorted(set(found))


@cache
def document() -> dict[str, Any]:
    """The whole. It takes some milliseconds, once."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "heliograph",
            "version": __version__,
            "description": _ABOUT.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that this document is from."}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _problem(status, named) for status, named in _SHARED.items()},
            "securitySchemes": {
                SECURITY: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key: `Authorization: Bearer hg_...`. The server makes one on its first "
                    "start and keeps it in the file `api-key` of its data folder; that one may do everything. "
                    "What an operation needs is one of the scopes that it lists.",
                }
            },
        },
    }


@cache
def encoded() -> bytes:
    """The document as JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=1) + b"\n"


# -- operations ------------------------------------------------------------------------------------------------------


def _operation(operation: Operation) -> dict[str, Any]:
    made: dict[str, Any] = {"operationId": operation.id, "tags": [operation.tag], "summary": operation.summary}
    if operation.description:
        made["description"] = operation.description
    if operation.scopes is None:
        made["security"] = [{}, {SECURITY: []}] if operation.id == "getHealth" else []
    else:
        made["security"] = [{SECURITY: [scope]} for scope in sorted(operation.scopes)]
    if operation.parameters:
        made["parameters"] = [_parameter(each) for each in operation.parameters]
    if operation.body is not None:
        examples = {each.name: {"summary": each.summary, "value": each.value} for each in operation.examples}
        content = {"schema": _ref(operation.body), "examples": examples}
        made["requestBody"] = {"required": True, "content": {JSON: content}}
    made["responses"] = {
        **{str(reply.status): _reply(reply) for reply in operation.replies},
        **_problems(operation),
    }
    return made


def _parameter(parameter: Parameter) -> dict[str, Any]:
    made = {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.where == "path",
        "description": parameter.description,
        "schema": {"type": "string", **parameter.schema},
    }
    return made if parameter.example is None else {**made, "example": parameter.example}


def _reply(reply: Reply) -> dict[str, Any]:
    made: dict[str, Any] = {"description": reply.description}
    if reply.headers:
        made["headers"] = _headers(reply.headers)
    content: dict[str, Any] = {}
    if reply.kinds:
        refs = [_ref(kind) for kind in reply.kinds]
        content = {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}, "example": reply.example}
    made["content"] = {reply.content_type: content}
    if reply.links:
        made["links"] = dict(reply.links)
    return made


def _headers(headers: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()}


def _problems(operation: Operation) -> dict[str, Any]:
    """Responses by status; those that say what others say too are references."""
    return {
        str(status): {"$ref": f"#/components/responses/{status}"}
        if _SHARED.get(status) == named
        else _problem(status, named)
        for status, named in sorted(_by_status(codes(operation), named_by_path="{" in operation.path).items())
    }


def _by_status(wrong: Iterable[str], *, named_by_path: bool = False) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for code in wrong:
        entry = problems.CATALOGUE[code]
        # What Apple would refuse is refused here as a bad request; what is not there is a 404 where the path names it.
        statuses = (400,) if entry.origin is problems.Origin.APPLE else entry.statuses
        for status in statuses if len(statuses) == 1 else {404} if named_by_path else {*statuses} - {404}:
            found.setdefault(status, []).append(code)
    return found


_SHARED = {
    status: named for status, named in _by_status(sorted(_ALWAYS + _WITH_KEY + _WITH_BODY)).items() if status != 400
}


def _problem(status: int, named: Sequence[str]) -> dict[str, Any]:
    told = ", ".join(f"[`{code}`](/docs/errors#{problems.slug(code)})" for code in named)
    made: dict[str, Any] = {"description": f"{_REASONS[status]} {told}."}
    if status in _HEADERS:
        made["headers"] = _headers(_HEADERS[status])
    made["content"] = {PROBLEM: {"schema": _ref(ProblemBody)}}
    return made


# -- schemas ---------------------------------------------------------------------------------------------------------


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name_of(kind)}"}


def name_of(kind: type) -> str:
    """What the document calls a struct."""
    return _NAMES.get(kind, "") or kind.__name__.removeprefix("_").removesuffix("Body")


def _kinds() -> set[type]:
    """All structs and enums that bodies are made of."""
    found: set[type] = {ProblemBody}
    for operation in OPERATIONS:
        found.update(filter(None, [operation.body]), *(reply.kinds for reply in operation.replies))
    new = found
    while new:
        new = {inner for kind in new for inner in _inner(kind)} - found
        found = found | new
    return found


def _inner(kind: type) -> Iterator[type]:
    """Structs and enums that the fields of a struct hold."""
    waiting: list[Any] = list(get_type_hints(kind).values()) if issubclass(kind, Struct) else []
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if isinstance(hint, type) and issubclass(hint, (Struct, Enum)):
            yield hint


def _schemas() -> dict[str, Any]:
    """All structs as schemas, as msgspec sees them, with what stands below each field."""
    kinds = sorted(_kinds(), key=name_of)
    refs, found = msgspec.json.schema_components(kinds, ref_template="{name}")
    kind_of = {ref["$ref"]: kind for ref, kind in zip(refs, kinds, strict=True)}

    def finish(schema: Any) -> Any:
        if isinstance(schema, list):
            return [finish(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return {**schema, **_ref(kind_of[schema["$ref"]])}
        return {key: finish(value) for key, value in schema.items() if value != [] or key != "required"}

    made = {}
    for name, schema in found.items():
        kind = kind_of[name]
        finished = finish({key: value for key, value in schema.items() if key != "title"})
        if "properties" in finished:
            finished["properties"] = {
                field: _field(finished["properties"][field], kind, field) for field in _own_first(kind)
            }
        elif said := _values(kind):
            finished["description"] = " ".join([finished.get("description", ""), said]).strip()
        made[name_of(kind)] = finished
    return made


def _values(kind: type) -> str:
    """What the values of an enum mean."""
    said = _docstrings(kind.__module__)
    assert issubclass(kind, Enum)
    told = {each.value: said.get((kind.__name__, each.name)) for each in kind}
    return " ".join(f"`{value}`: {text[:1].lower()}{text[1:]}" for value, text in told.items() if text)


def _own_first(kind: type) -> list[str]:
    """The fields of a struct; those of its own before those that it has from others."""
    told = [field for each in kind.__mro__ for field in get_annotations(each)]
    assert issubclass(kind, Struct)
    return list(dict.fromkeys(field for field in told if field in kind.__struct_fields__))


def _field(schema: dict[str, Any], kind: type, field: str) -> dict[str, Any]:
    made = {key: value for key, value in schema.items() if key != "default" or value is not None}
    for each in reversed(kind.__mro__):
        if text := _docstrings(each.__module__).get((each.__name__, field)):
            made["description"] = text
        made |= LIMITS.get(each, {}).get(field, {})
    return made


@cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """What stands below the members of a module's classes, by class and member; nothing where there is no source."""
    try:
        tree = ast.parse(getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {
        (kind.name, ast.unparse(target)): " ".join(text.split())
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for field, below in pairwise(kind.body)
        if isinstance(field, ast.AnnAssign | ast.Assign)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(text := below.value.value, str)
        for target in (field.targets if isinstance(field, ast.Assign) else [field.target])
    }
