"""The documentation that the server itself shows: /docs and /docs/errors, and the document behind them.

Plain HTML of the OpenAPI document and of `problems`, with nothing from elsewhere: no script, no font, no image. It is
made when it is first asked for.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec

from heliograph import __version__
from heliograph.doors import openapi, problems
from heliograph.doors.exchange import Answer

DOCS = "/docs"
ERRORS = "/docs/errors"

_NOSNIFF = (b"x-content-type-options", b"nosniff")
_SEND_TO_DOCS = Answer(
    307, b"", ((b"location", DOCS.encode()), (b"vary", b"accept")), content_type=b"text/plain; charset=utf-8"
)


@cache
def page(path: str) -> Answer:
    """What is at `DOCS`, `ERRORS` or `openapi.PATH`."""
    if path == openapi.PATH:
        return Answer(200, openapi.encoded(), (_NOSNIFF,))
    return _html(_docs() if path == DOCS else _errors())


def front(accept: bytes) -> Answer:
    """What is at `/`: browsers are sent on to the documentation, others are told where it is."""
    if b"text/html" in accept:
        return _SEND_TO_DOCS
    body = msgspec.json.encode({"heliograph": __version__, "docs": DOCS, "openapi": openapi.PATH})
    return Answer(200, body, ((b"vary", b"accept"), _NOSNIFF))


def _html(parts: Iterator[str]) -> Answer:
    style = Path(__file__).with_name("pages.css").read_text()
    digest = b64encode(sha256(style.encode()).digest()).decode()
    text = "".join(parts).replace("<style></style>", f"<style>{style}</style>")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        (b"content-security-policy", policy.encode()),
        (b"referrer-policy", b"no-referrer"),
        _NOSNIFF,
    )
    return Answer(200, text.encode(), headers, b"text/html; charset=utf-8")


def _frame(title: str, navigation: Iterable[str], content: Iterable[str]) -> Iterator[str]:
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style></style></head><body>"
        '<a class="skip" href="#content">To the content</a>'
        f'<nav aria-label="Contents"><p class="brand"><a href="{DOCS}">heliograph</a> '
        f'<span class="faint">{escape(__version__)}</span></p><div class="rest">'
    )
    yield from navigation
    yield '</div></nav><main id="content">'
    yield from content
    yield "</main></body></html>\n"


def _group(heading: str, links: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Part of the navigation. The links' texts are HTML."""
    yield f'<div class="group"><h2>{escape(heading)}</h2><ul>'
    for target, text in links:
        yield f'<li><a href="{escape(target)}">{text}</a></li>'
    yield "</ul></div>"


_code = re.compile(r"`([^`]+)`")
_link = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def _words(text: str) -> str:
    """Text with `code` and [links](target) as HTML."""
    return _link.sub(r'<a href="\2">\1</a>', _code.sub(r"<code>\1</code>", escape(text, quote=False)))


def _prose(text: str) -> str:
    return "".join(f"<p>{_words(paragraph)}</p>" for paragraph in text.split("\n\n"))


# -- /docs/errors ----------------------------------------------------------------------------------------------------


def _errors() -> Iterator[str]:
    def navigation() -> Iterator[str]:
        yield from _group("Documentation", [(DOCS, "The HTTP API")])
        for origin in problems.Origin:
            links = [(f"#{entry.slug}", escape(entry.code)) for entry in problems.of(origin)]
            yield from _group(origin.value, links)

    def content() -> Iterator[str]:
        yield f"<h1>Errors</h1>{_prose(problems.INTRODUCTION)}"
        for origin in problems.Origin:
            yield f"<h2>{escape(origin.value)}</h2>{_prose(problems.INTRODUCTIONS[origin])}"
            for entry in problems.of(origin):
                statuses = " or ".join(map(str, entry.statuses))
                yield (
                    f'<section id="{entry.slug}"><h3><a href="#{entry.slug}">{escape(entry.title)}</a></h3>'
                    f'<p class="call">{escape(entry.code)} <span class="faint">{statuses}</span></p>'
                    f"{_prose(entry.meaning)}{_prose(entry.remedy) if entry.remedy else ''}</section>"
                )

    return _frame("Errors - heliograph", navigation(), content())


# -- /docs -----------------------------------------------------------------------------------------------------------

_START = """\
export HELIOGRAPH_URL=http://127.0.0.1:8080
export HELIOGRAPH_KEY="$(cat heliograph-data/api-key)\""""

Schema = Mapping[str, Any]


def _docs() -> Iterator[str]:
    document = openapi.document()
    operations = [
        (method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    schemas = document["components"]["schemas"]
    shown: set[str] = set()
    """The bodies, each at the first operation that takes it."""

    def navigation() -> Iterator[str]:
        yield from _group(
            "Documentation",
            [("#start", "Start"), (ERRORS, "Errors"), (openapi.PATH, "OpenAPI document"), ("#objects", "Objects")],
        )
        for tag in document["tags"]:
            yield from _group(
                tag["name"],
                [
                    (f"#{operation['operationId']}", f"{_method(method)} {escape(operation['summary'])}")
                    for method, _, operation in operations
                    if tag["name"] in operation["tags"]
                ],
            )

    def content() -> Iterator[str]:
        yield f"<h1>The HTTP API</h1>{_prose(document['info']['description'])}"
        yield '<section id="start"><h2>Start</h2>'
        yield _prose(document["components"]["securitySchemes"][openapi.SECURITY]["description"])
        yield f"<p>The examples below read both from the shell:</p>{_shell(_START)}</section>"
        for tag in document["tags"]:
            yield f"<h2>{escape(tag['name'])}</h2>{_prose(tag['description'])}"
            for method, path, operation in operations:
                if tag["name"] in operation["tags"]:
                    yield from _operation(method, path, operation, document, shown)
        yield '<section id="objects"><h2>Objects</h2><p>What bodies are made of, beside those above.</p>'
        for name, schema in sorted(schemas.items()):
            if name not in shown:
                yield f'<section id="{name}"><h3><a href="#{name}">{name}</a></h3>'
                yield from _object(schema)
                yield "</section>"
        yield "</section>"

    return _frame("The HTTP API - heliograph", navigation(), content())


def _body_name(operation: Schema) -> str:
    body = operation.get("requestBody")
    return "" if body is None else _name_of(body["content"]["application/json"]["schema"])


def _name_of(schema: Schema) -> str:
    return str(schema["$ref"].rpartition("/")[2])


def _method(method: str) -> str:
    return f'<span class="method {method}">{method.upper()}</span>'


def _operation(method: str, path: str, operation: Schema, document: Schema, shown: set[str]) -> Iterator[str]:
    anchor = operation["operationId"]
    yield f'<section id="{anchor}"><h3><a href="#{anchor}">{escape(operation["summary"])}</a></h3>'
    yield f'<p class="call">{_method(method)} {escape(path)}</p>'
    if "description" in operation:
        yield _prose(operation["description"])
    yield _needs(operation["security"])
    if "parameters" in operation:
        yield "<h4>Parameters</h4>"
        yield from _fields(_parameter(each) for each in operation["parameters"])
    examples = [("", None)]
    name = _body_name(operation)
    if name:
        told = operation["requestBody"]["content"]["application/json"]["examples"].values()
        examples = [(f"<p>{_words(each['summary'])}:</p>", each["value"]) for each in told]
    yield f"<h4>{'Examples' if len(examples) > 1 else 'Example'}</h4>"
    for summary, value in examples:
        yield f"{summary}{_shell(_curl(method, path, operation, value))}"
    if name in shown:
        yield f'<h4>Body: <a href="#{name}">{name}</a></h4>'
    elif name:
        shown.add(name)
        yield f'<h4 id="{name}">Body: {name}</h4>'
        yield from _members(document["components"]["schemas"][name])
    yield "<h4>Answers</h4>"
    yield from _fields(_answer(status, reply, document) for status, reply in operation["responses"].items())
    yield from _replies(operation)
    yield "</section>"


def _needs(security: list[Schema]) -> str:
    scopes = [scope for each in security for scope in each.get(openapi.SECURITY, ())]
    if not scopes:
        return '<p class="faint">Needs no API key.</p>'
    if len(scopes) > 2:
        return '<p class="faint">Needs an API key.</p>'
    named = " or ".join(f"<code>{escape(scope)}</code>" for scope in scopes)
    return f'<p class="faint">Needs an API key with the scope {named}.</p>'


Field = tuple[str, str, str]
"""Name, type and meaning; all but the name are HTML."""


def _fields(fields: Iterable[Field]) -> Iterator[str]:
    yield "<dl>"
    for name, kind, meaning in fields:
        yield f'<dt><code>{escape(name)}</code></dt><dd><span class="type">{kind}</span>{meaning}</dd>'
    yield "</dl>"


def _parameter(parameter: Schema) -> Field:
    where = {"path": "in the path", "query": "in the query", "header": "a header"}[parameter["in"]]
    return parameter["name"], f"{_type(parameter['schema'])}, {where}", _prose(parameter["description"])


def _object(schema: Schema) -> Iterator[str]:
    if "description" in schema:
        yield _prose(schema["description"])
    if "properties" not in schema:
        yield f'<p class="type">{_type(schema)}</p>'
    else:
        yield from _members(schema)


def _members(schema: Schema) -> Iterator[str]:
    must = schema.get("required", ())
    takes = "additionalProperties" in schema  # is sent, so that it matters what may be left out
    yield from _fields(
        (
            name,
            _type(inner, null=not takes) + (", required" if takes and name in must else ""),
            _prose(inner["description"]) if "description" in inner else "",
        )
        for name, inner in schema["properties"].items()
    )


def _type(schema: Schema, *, null: bool = True) -> str:
    """What a value is, in words, as HTML. `null`: whether it matters that it may be null."""
    if "$ref" in schema:
        name = escape(_name_of(schema))
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(each))}</code>" for each in schema["enum"] if each is not None)
    if "anyOf" in schema:
        limits = {key: value for key, value in schema.items() if key != "anyOf"}
        kinds = [each for each in schema["anyOf"] if null or each.get("type") != "null"]
        return " or ".join(_type({**limits, **each} if "type" in each else each) for each in kinds)
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        items = _type(schema.get("items", {}))
        return f"list of {'strings' if items == 'string' else items}{_limits(schema, 'Items')}"
    names = {"integer": "whole number", "boolean": "true or false", "object": "object"}
    if schema.get("format") == "date-time" and kind == "string":
        return "time (RFC 3339)"
    return names.get(kind, kind) + ("" if kind == "null" else _limits(schema, "Length"))


def _limits(schema: Schema, of: str) -> str:
    least = schema.get("minimum", schema.get(f"min{of}"))
    most = schema.get("maximum", schema.get(f"max{of}"))
    words = [f"{least:g} or more"] if least and most is None else []
    if most is not None:
        words = [f"{least or 0:g} to {most:g}"]
    if words and of != "Items" and schema.get("type") == "string":
        words.append("characters")
    if "default" in schema and schema["default"] not in ("", [], False):
        words.append(f"{'; ' if words else ''}default {escape(json.dumps(schema['default']))}")
    return f", {' '.join(words).replace(' ;', ';')}" if words else ""


def _answer(status: str, reply: Schema, document: Schema) -> Field:
    if "$ref" in reply:
        reply = document["components"]["responses"][_name_of(reply)]
    ((content_type, content),) = reply["content"].items()
    schema = content.get("schema")
    kind = _type(schema) if schema else escape(content_type)
    headers = "".join(
        f"<p><code>{escape(name)}</code>: {_words(each['description'])}</p>"
        for name, each in reply.get("headers", {}).items()
    )
    return status, kind, _prose(reply["description"]) + headers


def _replies(operation: Schema) -> Iterator[str]:
    """Examples of what comes back, where it is a success."""
    seen = []
    for status, reply in operation["responses"].items():
        for content in reply.get("content", {}).values():
            if "example" in content and content["example"] not in seen:
                seen.append(content["example"])
                yield f"<h4>A {escape(status)}</h4>{_shell(_json(content['example']))}"


def _curl(method: str, path: str, operation: Schema, body: Any) -> str:
    given = operation.get("parameters", ())
    for each in given:
        path = path.replace(f"{{{each['name']}}}", str(each.get("example", "")))
    query = urlencode({each["name"]: each["example"] for each in given if each["in"] == "query" and "example" in each})
    path += f"?{query}" if query else ""
    name = "" if method in ("get", "post") else f" -X {method.upper()}"
    parts = [f'curl{name} "$HELIOGRAPH_URL{path}"']
    if any(openapi.SECURITY in each for each in operation["security"]):
        parts.append('-H "Authorization: Bearer $HELIOGRAPH_KEY"')
    if body is not None:
        quoted = _json(body).replace("'", "'\\''")
        parts += ['-H "Content-Type: application/json"', f"-d '{quoted}'"]
    return " \\\n  ".join(parts)


_WIDTH = 88


def _json(value: Any, margin: str = "") -> str:
    """What fits in a line in one, else a line a member."""
    short = json.dumps(value, ensure_ascii=False)
    if len(margin) + len(short) <= _WIDTH or not isinstance(value, dict | list):
        return short
    inner = margin + "  "
    if isinstance(value, list):
        lines = [inner + _json(each, inner) for each in value]
        return "[\n" + ",\n".join(lines) + f"\n{margin}]"
    lines = [f"{inner}{json.dumps(name)}: {_json(each, inner)}" for name, each in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def _shell(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text, quote=False)}</code></pre>'
