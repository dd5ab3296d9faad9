"""Who may import whom: the table is the rule. To change a rule, change the table and say why.

A room is a module or a folder directly under `heliograph`. What a room holds may import its own room freely.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

FACTS = {"reasons", "errors"}
COMMON = {*FACTS, "telemetry", "config", "crash"}
BELOW = {"relay", "ports", "net", "protocols", "payload", "model"}

ROOMS: dict[str, set[str]] = {
    # pure: no sockets, no clock, no event loop
    "reasons": set(),
    "crash": set(),
    "errors": {"reasons"},
    "complaints": set(),
    "model": FACTS,
    "payload": {"model", *FACTS},
    "policy": {"model", *FACTS},
    "protocols": {"model", *FACTS},
    "batches": {"model", *FACTS},
    "admission": {
        "policy",
        "payload",
        "protocols",
        "model",
        *FACTS,
    },  # what Apple's headers may say is in protocols.apns
    "credentials": {"protocols", "model", *FACTS},
    # the middle
    "vault": {"model", *COMMON},
    "apps": {"credentials", "vault", "net", "carriers", "ports", "protocols", "model", *COMMON},
    "config": {"model", *COMMON},
    "telemetry": {"model", *COMMON},  # counts outcomes by their reason
    "logs": {"model", *COMMON},
    "ports": {"model", *COMMON},
    "net": {"protocols", "model", *COMMON},  # model: a client certificate goes into a TLS context
    "keys": {"ports", "model", *COMMON},
    "callers": {"ports", "protocols", "model", *COMMON},  # what clients show is a certificate or a provider token
    "relay": {"admission", "batches", "policy", "ports", "model", *COMMON},
    # the edges, which do not know one another
    "doors": {"callers", "complaints", "keys", *BELOW, *COMMON},
    "dashboard": {*BELOW, *COMMON},
    "carriers": {"net", "protocols", "ports", "model", *COMMON},  # ports: a carrier calls the port's Report
    "stores": {"ports", "batches", "model", *COMMON},
    "simulator": {"complaints", "net", "protocols", "model", *COMMON},  # its control API is typed JSON as well
    "client": {"payload", "model", *COMMON},
    "django": {"client", *COMMON},
}
ROOMS["__main__"] = {"cli"}
ROOMS["listeners"] = {"callers", "doors", "keys", *BELOW, *COMMON}
ROOMS["service"] = ROOMS["cli"] = ROOMS["commands"] = {*ROOMS, "service", "commands"}

PURE = {"reasons", "errors", "complaints", "model", "payload", "policy", "protocols", "batches", "admission"}

IMPURE = {
    *("asyncio", "concurrent", "multiprocessing", "queue", "sched", "selectors", "signal", "subprocess", "threading"),
    *("http", "os", "pathlib", "shutil", "smtplib", "socket", "socketserver", "ssl", "tempfile", "urllib"),
    *("sqlite3", "time", "datetime", "random", "secrets", "logging"),
}
"""Standard modules that bring sockets, files, processes, a clock or chance."""

LIBRARIES = {
    "heliograph.protocols.http2": {"hpack"},  # its tables, and the slow path
    "heliograph.protocols.provider_token": {"cryptography"},
    "heliograph.protocols.certificate": {"cryptography"},
}
"""What part of a pure room may import beside the standard library and msgspec."""


def imports(source: str, package: str) -> Iterator[str]:
    """Every imported name in full, those inside functions too; `package` is what relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(paths.items())}


MODULES = modules()


def room_of(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def imported_by(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return set(imports(path.read_text(), package))


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_rooms_that_the_table_allows(module: str) -> None:
    room = room_of(module)
    assert not room or room in ROOMS, f"{module} is in no room of the table"
    ours = {name for name in imported_by(module) if name.startswith("heliograph.")}
    # What is no room is a name of the package itself, as __version__.
    rooms = {room_of(name) for name in ours} & ROOMS.keys()
    assert rooms <= {room, *ROOMS.get(room, set())}


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in PURE])
def test_pure_module_imports_no_sockets_clock_loop_or_database(module: str) -> None:
    foreign = {name.split(".")[0] for name in imported_by(module)} - {"heliograph"}
    assert not foreign & IMPURE
    allowed = {"msgspec"}.union(*(names for part, names in LIBRARIES.items() if f"{module}.".startswith(f"{part}.")))
    assert foreign - sys.stdlib_module_names <= allowed


def test_imports_are_seen_in_every_form() -> None:
    source = """
import heliograph.relay as engine
from heliograph import stores
from . import pool
from ..errors import Refused
def late():
    from heliograph.doors.api import routes
"""
    assert set(imports(source, "heliograph.carriers")) == {
        "heliograph.relay",
        "heliograph.stores",
        "heliograph.carriers.pool",
        "heliograph.errors.Refused",
        "heliograph.doors.api.routes",
    }
