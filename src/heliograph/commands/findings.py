"""What `heliograph doctor` sees on this machine. Nothing is changed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import apsw

from heliograph import credentials, vault
from heliograph.apps.building import Contexts, Entry, build, kind_and_name, read_content, suffixed
from heliograph.apps.directory import master_key_path, sealed_name
from heliograph.commands.calling import call, find_key, own_url
from heliograph.commands.telling import RefusedError, UnreachableError
from heliograph.config import Config
from heliograph.errors import ConfigError, HeliographError, StoreError
from heliograph.model import Access, SigningKey

DATABASE = "heliograph.db"

_CHECK_S = 5.0
"""How long the database is looked through."""
_LITTLE_BYTES = 1_000_000_000
_NEARLY_NOTHING_BYTES = 100_000_000
_SOON_DAYS = 30
_BUILT = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""No machine runs this program before."""
_TOLERANCE_S = 60.0
_PRIVATE = (DATABASE, f"{DATABASE}-wal", "api-key", "master-key", "doors.pem", "doors-ca-key.pem")

Level = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """A line: what was looked at, and what to do about it."""

    level: Level
    about: str
    text: str


def ok(about: str, text: str) -> Finding:
    return Finding("ok", about, text)


def warning(about: str, text: str) -> Finding:
    return Finding("warning", about, text)


def problem(about: str, text: str) -> Finding:
    return Finding("problem", about, text)


def of_machine(config: Config) -> Iterator[Finding]:
    """The clock, the data folder, the database, disk space, the port."""
    data = Path(config.data)
    yield _of_clock(data)
    yield from _of_folder(data)
    yield from _of_master_key(config)
    holder = holder_of(config)
    yield from _of_database(data / DATABASE, holder)
    yield _of_disk(data)
    yield _of_port(config, holder)


def of_apps(config: Config) -> Iterator[tuple[Entry | None, list[Finding]]]:
    """Each app and what there is to say about it; None where it is not ours to connect with, or cannot be used."""
    now = time.time()
    contexts = Contexts()
    for name, settings in config.apps.items():
        about = f"app {name}"
        try:
            entry = build(name, read_content(name, settings), f"apps.{name}", contexts, stored=False)
        except ConfigError as error:
            yield None, [problem(about, str(error))]
            continue
        certified = (topic for access in entry.app.access for topic in access.topics or ())
        yield (
            entry,
            [
                *(_of_access(about, access, now) for access in entry.app.access),
                *_of_topics(about, entry.app.topics, certified),
            ],
        )
    added = []
    try:
        if key := _ask(config, "/v1/keys/self"):
            yield None, [ok("API key", f"{key['name']}, may {', '.join(key['scopes'])} for {_for(key['apps'])}")]
        running = _ask(config, "/v1/apps").get("apps", ())
        added = [each for each in running if each["source"] == "api" or each["name"] not in config.apps]
    except HeliographError as error:
        yield None, [warning("apps", f"what the running server has besides cannot be seen: {error}")]
    for shown in added:
        about = f"app {shown['name']}"
        certified = (topic for each in shown["credentials"] for topic in each["topics"] or ())
        yield (
            None,
            [
                *(_of_shown(about, each, shown["source"]) for each in shown["credentials"]),
                *_of_topics(about, shown["topics"], certified),
            ],
        )
    unwell = list(_of_health(config))
    yield None, unwell
    if not unwell and not config.apps and not added and not _stored(config):
        yield None, [warning("apps", "there are none, so every notification is refused: add an [apps.NAME]")]


def _of_clock(data: Path) -> Finding:
    now = time.time()
    told = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    newest = max((file.stat().st_mtime for file in _files(data)), default=now)
    if now < _BUILT or newest > now + _TOLERANCE_S:
        return problem(
            "clock", f"it says {told}, which has passed long since: set it, as Apple refuses provider tokens by time"
        )
    return ok("clock", told)


def _files(data: Path) -> Sequence[Path]:
    return [path for path in (data / name for name in _PRIVATE) if path.exists()]


def _of_folder(data: Path) -> Iterator[Finding]:
    if not data.exists():
        above = next(each for each in data.parents if each.exists())
        if os.access(above, os.W_OK):
            yield ok("data folder", f"{data} is not there yet, and is made on the first start")
        else:
            yield problem("data folder", f"{data} is not there, and cannot be made: make it for the server's user")
        return
    if not data.is_dir() or not os.access(data, os.R_OK | os.W_OK | os.X_OK):
        yield problem("data folder", f"{data} cannot be written: run this as the server's user, or correct its mode")
        return
    mode = stat.S_IMODE(data.stat().st_mode)
    if mode & 0o007:
        yield warning("data folder", f"every user of this machine can look into {data}: run chmod 700 {data}")
    else:
        yield ok("data folder", str(data))
    for path in _files(data):
        if stat.S_IMODE(path.stat().st_mode) & 0o007:
            yield problem(path.name, f"every user of this machine can read {path}: run chmod 600 {path}")


def _of_master_key(config: Config) -> Iterator[Finding]:
    try:
        path = master_key_path(config)
        if path.exists():
            yield from _of_records(vault.load_or_make(path), path, _stored(config))
        elif stored := _stored(config):
            yield problem(
                "master key",
                f"{path} is gone, and the database has apps that only it opens ({', '.join(stored)}): put it back",
            )
    except ConfigError as error:
        yield problem("master key", str(error))


def _of_records(opener: vault.Vault, path: Path, stored: Mapping[str, bytes]) -> Iterator[Finding]:
    opened = 0
    for name, record in stored.items():
        try:
            opener.open(sealed_name(name), record)
            opened += 1
        except StoreError as error:
            yield problem("master key", str(error))
    if opened == len(stored):
        yield ok(
            "master key", f"{path}, opens {opened} stored app{'' if opened == 1 else 's'}" if stored else str(path)
        )


def _stored(config: Config) -> dict[str, bytes]:
    """The sealed records of the database by app; none where they cannot be read, of which `_of_database` tells."""
    path = Path(config.data) / DATABASE
    if not path.exists():
        return {}
    try:
        with contextlib.closing(_read_only(path)) as database:
            rows = database.execute("SELECT name, record FROM app ORDER BY name").fetchall()
    except apsw.Error:
        return {}
    return dict(cast("list[tuple[str, bytes]]", rows))


def _read_only(path: Path) -> apsw.Connection:
    return apsw.Connection(
        f"{path.absolute().as_uri()}?mode=ro", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    )


def holder_of(config: Config) -> str | None:
    """The process id of who has the database open; None: nobody."""
    lock = Path(config.data) / f"{DATABASE}.lock"
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(file)
    return None


def _of_database(path: Path, holder: str | None) -> Iterator[Finding]:
    if not path.exists():
        yield ok("database", f"{path} is not there yet, and is made on the first start")
        return
    yield ok("database lock", "free: no server runs on it" if holder is None else f"held by process {holder}")
    try:
        database = _read_only(path)
        try:
            until = time.monotonic() + _CHECK_S
            database.set_progress_handler(lambda: time.monotonic() > until, 10_000)
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone() or ("nothing",)
        finally:
            database.close()
    except apsw.InterruptError:
        yield ok("database", f"no fault found in {_CHECK_S:.0f} s of looking; it is too large to be looked through")
    except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError) as error:
        yield problem(
            "database",
            f"{path} or its folder cannot be written by this user ({error}): run this as the server's user, or correct "
            "owner and mode",
        )
    except apsw.Error as error:
        yield problem("database", f"{path} cannot be read ({error}): put it back from a backup")
    else:
        if said == "ok":
            yield ok("database", f"sound, {path.stat().st_size:,} octets")
        else:
            yield problem("database", f"{path} is damaged: stop the server, and put the file back from a backup")


def _of_disk(data: Path) -> Finding:
    free = shutil.disk_usage(next(each for each in (data, *data.parents) if each.exists())).free
    told = f"{free / 1e9:.1f} GB free for {data}"
    if free < _NEARLY_NOTHING_BYTES:
        return problem("disk", f"{told}: make room, as nothing can be taken in without")
    if free < _LITTLE_BYTES:
        return warning("disk", f"{told}: make room soon")
    return ok("disk", told)


def _of_port(config: Config, holder: str | None) -> Finding:
    host, port = config.api.host, config.api.port
    where = f"{host}:{port}"
    if port == 0:
        return ok("port of the API", "any free one, as configured")
    why = no_port(host, port)
    if why is not None:
        if why != _TAKEN:
            return problem("port of the API", f"{where} cannot be listened on ({why}): set api.host or api.port")
        if holder is not None and _is_ours(own_url(config)):
            return ok("port of the API", f"the server answers on {where}")
        return problem("port of the API", f"another program listens on {where}: stop it, or set api.port")
    if holder is not None:
        return warning(
            "port of the API", f"a server runs on this data, but not on {where}: is this the configuration it has?"
        )
    return ok("port of the API", f"{where} is free")


_TAKEN = os.strerror(errno.EADDRINUSE)


def no_port(host: str, port: int) -> str | None:
    """Why nothing can listen there; None: it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno is None:
            return error.strerror or str(error)
        return os.strerror(error.errno)  # its own text repeats the address
    return None


def _is_ours(url: str) -> bool:
    try:
        health = call(url, "", "GET", "/healthz", b"").body
    except UnreachableError:
        return False
    return {"status", "lanes", "problems"} <= health.keys()  # it may be unwell, and is ours all the same


def _ask(config: Config, path: str) -> dict[str, Any]:
    """What a running server has there; nothing where it cannot be found. Raises HeliographError."""
    if config.api.port == 0 or holder_of(config) is None:
        return {}
    reply = call(own_url(config), find_key(None, config), "GET", path, b"")
    if reply.status != 200 and "lanes" not in reply.body:  # which /healthz says with 503 too
        raise RefusedError(reply.status, reply.body)
    return reply.body


def _of_health(config: Config) -> Iterator[Finding]:
    """What a running server says is not well."""
    try:
        told = _ask(config, "/healthz")
    except HeliographError as error:
        yield warning("server", f"how the running server is cannot be seen: {error}")
        return
    if told.get("problems", 0) == 0:
        return
    failing = told["status"] == "failing"
    for each in told.get("reasons", ()):
        about = f"app {each['app']}, {each['environment']}" if "app" in each else each["about"]
        # Nothing goes out for an app that the server complains of, whatever others do.
        text = f"{each['problem'].removesuffix('.')}: {each['advice']}"
        yield (problem if failing or "app" in each else warning)(about, text)
    if not told.get("reasons"):
        text = f"it is {told['status']}, and tells those with an API key for it why: name one in $HELIOGRAPH_KEY"
        yield (problem if failing else warning)("server", text)


def _of_topics(about: str, topics: Iterable[str], certified: Iterable[str]) -> Iterator[Finding]:
    for topic in suffixed(topics, certified):
        yield warning(
            about,
            f"{topic} looks like a topic with the suffix of a push type: write the bundle id, the suffix is added",
        )


def _for(apps: Sequence[str] | None) -> str:
    return "all apps" if apps is None else ", ".join(apps)


def _of_access(about: str, access: Access, now: float) -> Finding:
    found = access.credentials
    kind, name = kind_and_name(found)
    where = " and ".join(access.environments)
    if isinstance(found, SigningKey):
        return ok(about, f"{kind} {name} of team {found.team_id}, for {where}")
    if found.not_before > now:
        return problem(about, f"{kind} {name} is not valid yet: set the clock of this machine")
    days = credentials.days_left(found, now) or 0
    return _of_days(about, f"{kind} {name}, for {', '.join(access.topics or ())} in {where}", days)


def _of_shown(about: str, shown: dict[str, Any], source: str) -> Finding:
    origin = "added by the API" if source == "api" else "from the running server's own configuration"
    told = f"{shown['kind']} {shown['name']}, for {' and '.join(shown['environments'])}, {origin}"
    return ok(about, told) if shown["days_left"] is None else _of_days(about, told, shown["days_left"])


def _of_days(about: str, told: str, days: int) -> Finding:
    if days < 0:
        return problem(about, f"{told}: it ended {-days} days ago, make a new one in the developer account")
    if days < _SOON_DAYS:
        return warning(about, f"{told}: {days} days left, make a new one in the developer account")
    return ok(about, f"{told}, {days} days left")
