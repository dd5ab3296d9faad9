"""The configuration: one tree of frozen structs, read from a TOML file and from HELIOGRAPH_* variables.

A variable spells the way to its setting with two underscores: `HELIOGRAPH_API__PORT` is `port` in `[api]`; it wins over
the file, and a list is written with commas. Relative paths start at the file's folder, without a file at the current
one. What is not a setting is refused by name. A secret never stands in the file or in a variable: `file:PATH` or
`credential:NAME` (a file in $CREDENTIALS_DIRECTORY, as systemd gives) says where it is.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from heliograph.errors import ConfigError
from heliograph.model import Environment

PREFIX = "HELIOGRAPH_"
"""What the names of our variables begin with."""

NOT_SETTINGS = frozenset({"HELIOGRAPH_CONFIG", "HELIOGRAPH_URL", "HELIOGRAPH_KEY", "HELIOGRAPH_CRASH_AT"})
"""Variables with the prefix that others read: the command line, `crash`."""

_MAX_SECRET_BYTES = 64 * 1024
_OTHERS_MAY = 0o007
_is_app_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch

Port = Annotated[int, Meta(ge=0, le=65535)]

S = TypeVar("S", bound=Struct)


class Environments(StrEnum):
    """Which of Apple's environments an app is sent to."""

    PRODUCTION = "production"
    DEVELOPMENT = "development"
    BOTH = "both"

    def each(self) -> tuple[Environment, ...]:
        return tuple(Environment) if self is Environments.BOTH else (Environment(self.value),)


class ApiSettings(Struct, frozen=True):
    """`[api]`: where the HTTP API listens."""

    host: str = "127.0.0.1"
    port: Port = 8080
    """0: any free one."""
    key: str | None = None
    """The API key, as `file:PATH` or `credential:NAME`; None: `api-key` in the data folder, made on the first start."""


class AppSettings(Struct, frozen=True, kw_only=True):
    """`[apps.NAME]`: an app, and what Apple knows us by."""

    key: str
    """The .p8 file that Apple issued: a path (`file:PATH` after `load`), or `credential:NAME`."""
    team_id: str
    topic: str | None = None
    topics: tuple[str, ...] = ()
    """Bundle ids; `topic` where there is one only."""
    key_id: str | None = None
    """None: as in the name of the file, AuthKey_<key id>.p8."""
    environment: Environments = Environments.PRODUCTION
    host: str | None = None
    """Send there and not to Apple; None: Apple."""
    port: Port = 443
    ca: str | None = None
    """A PEM file with the certificates to trust on `host`; None: those of the system."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if (self.topic is None) == (not self.topics):
            raise ValueError("needs either topic, the app's bundle id, or topics, a list of them")
        if self.host is None and (self.ca is not None or self.port != 443):
            raise ValueError("has a port or a ca, but no host that they could be for: add host")


class Config(Struct, frozen=True):
    """Everything that can be set. Paths are absolute after `load`."""

    data: str = "heliograph-data"
    """The folder of the database and of the API key."""
    api: ApiSettings = ApiSettings()
    apps: dict[str, AppSettings] = {}


_HINTS = {
    "key": "write the path of the .p8 file that Apple issued",
    "team_id": "write the 10 characters that the developer account shows as Team ID",
}


def load(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration from a TOML file, if there is one, and the environment.

    Raises ConfigError: what is wrong where, and what to change.
    """
    tree = {} if file is None else _read_toml(file)
    reader = _Reader(str(file) if file else "The configuration")
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            reader.put(tree, name, environ[name])
    config = reader.struct(Config, tree, ())
    folder = Path.cwd() if file is None else file.absolute().parent
    api = config.api
    if api.key is not None:
        api = replace(api, key=_reference(folder, api.key, "api.key", bare_path=False))
    apps = {
        name: replace(
            app,
            key=_reference(folder, app.key, f"apps.{name}.key", bare_path=True),
            ca=None if app.ca is None else _absolute(folder, app.ca),
        )
        for name, app in config.apps.items()
    }
    return Config(data=_absolute(folder, config.data), api=api, apps=apps)


def read_secret(reference: str, setting: str) -> bytes:
    """The contents of the file that `file:PATH` or `credential:NAME` stands for.

    Raises ConfigError, also where other users of the machine could read the file. `setting` is for its text.
    """
    path = secret_path(reference, setting)
    try:
        with path.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            # What is read-only to us, as secrets in containers are, nobody could change as we advise.
            if mode & _OTHERS_MAY and not os.fstatvfs(opened.fileno()).f_flag & os.ST_RDONLY:
                raise ConfigError(
                    f"{setting}: every user of this machine can read {path}: run chmod 600 {path} "
                    "(or 640, with a group that only heliograph is in)"
                )
            content = opened.read(_MAX_SECRET_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{setting}: there is no file {path}: correct the path, or put the file there") from None
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror}): correct path or mode") from error
    if len(content) > _MAX_SECRET_BYTES:
        raise ConfigError(f"{setting}: {path} is longer than {_MAX_SECRET_BYTES} octets, so no key: name another file")
    return content


def secret_path(reference: str, setting: str) -> Path:
    """The file that `file:PATH` or `credential:NAME` stands for. Raises ConfigError."""
    scheme, _, rest = reference.partition(":")
    if scheme == "file":
        return Path(rest)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"{setting} names a credential, but $CREDENTIALS_DIRECTORY is not set: have systemd start heliograph with "
            "LoadCredential=, or write file:PATH"
        )
    if "/" in rest or rest in ("", ".", ".."):
        raise ConfigError(f"{setting}: write the credential's name alone, the name of a file in {folder}")
    return Path(folder) / rest


class _Reader:
    """Turns a tree of plain values into structs, and knows where each value came from."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._variables: dict[tuple[str, ...], str] = {}

    def put(self, tree: dict[str, Any], variable: str, value: str) -> None:
        """Set what a variable names. Raises ConfigError."""
        path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        self._variables[path] = variable
        for part in path[:-1]:
            inner = tree.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{variable}: there is nothing below {part}, which is a single value")
            tree = inner
        tree[path[-1]] = value

    def struct(self, type_: type[S], tree: Any, path: tuple[str, ...]) -> S:
        """A settings struct from its table. Raises ConfigError."""
        if not isinstance(tree, dict):
            raise ConfigError(f"{self._where(path)} must be a table, [{'.'.join(path)}]")
        hints = get_type_hints(type_, include_extras=True)
        for name in tree:
            if name not in hints:
                raise ConfigError(
                    f"{self._where((*path, name))} is not a setting: {self._suggestion(hints, path, name)}"
                )
        values = {name: self._value(hints[name], value, (*path, name)) for name, value in tree.items()}
        for field in msgspec.structs.fields(type_):
            if field.required and field.name not in values:
                raise ConfigError(f"{self._where((*path, field.name))} is missing: {_HINTS[field.name]}")
        try:
            return type_(**values)
        except ValueError as error:
            raise ConfigError(f"{self._where(path)} {error}") from None

    def _value(self, type_: Any, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(type_, type) and issubclass(type_, Struct):
            return self.struct(type_, value, path)
        if get_origin(type_) is dict:
            if not isinstance(value, dict):
                raise ConfigError(f"{self._where(path)} must hold tables, [{'.'.join(path)}.NAME]")
            (_, inner) = get_args(type_)
            return {name: self.struct(inner, each, (*path, self._app_name(name, path))) for name, each in value.items()}
        from_variable = path in self._variables
        if from_variable and get_origin(type_) is tuple:
            value = [part.strip() for part in value.split(",")]
        try:
            return msgspec.convert(value, type_, strict=not from_variable)
        except msgspec.ValidationError as error:
            is_choice = isinstance(type_, type) and issubclass(type_, StrEnum)
            wanted = f"write one of {', '.join(type_)}" if is_choice else _plain(str(error))
            raise ConfigError(f"{self._where(path)} does not fit: {wanted}") from None

    def _app_name(self, name: str, path: tuple[str, ...]) -> str:
        if not _is_app_name(name):
            raise ConfigError(
                f"{self._where((*path, name))} is no name for an app: use letters, digits, dots, hyphens and "
                "underscores, 64 at most"
            )
        return name

    def _suggestion(self, known: Iterable[str], path: tuple[str, ...], name: str) -> str:
        """Half a sentence that names the closest of the known settings, or all of them where none is close."""
        from difflib import get_close_matches

        names = list(known)
        close = get_close_matches(name.lower(), names, n=1)
        if (*path, name) in self._variables:
            names, close = ([PREFIX + "__".join((*path, each)).upper() for each in some] for some in (names, close))
        return f"did you mean {close[0]}?" if close else f"known here are {', '.join(names)}"

    def _where(self, path: tuple[str, ...]) -> str:
        """How people find this setting again."""
        variable = self._variables.get(path)
        return variable or f"{self._source}: {'.'.join(path)}"


_TOML_NAMES = {
    "int": "a whole number",
    "float": "a number with a fraction",
    "str": "text in quotes",
    "str | null": "text in quotes",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}


def _plain(text: str) -> str:
    """The words of msgspec for someone who writes TOML."""
    text = re.sub("`([^`]*)`", lambda name: _TOML_NAMES.get(name[1], name[1]), text)
    return text[:1].lower() + text[1:]


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {file}: correct the path, or leave --config out") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): correct the path or its mode") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8: save it as such") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _absolute(folder: Path, path: str) -> str:
    return str(folder / Path(path).expanduser())


def _reference(folder: Path, text: str, setting: str, *, bare_path: bool) -> str:
    """`file:` with an absolute path, or `credential:NAME`. Raises ConfigError, which never repeats what it refuses."""
    if text.startswith("credential:"):
        return text
    if text.startswith("file:") or (bare_path and text and "\n" not in text and "-----" not in text):
        return f"file:{_absolute(folder, text.removeprefix('file:'))}"
    ways = "a path or credential:NAME" if bare_path else "file:PATH or credential:NAME"
    raise ConfigError(f"{setting} must say where the secret is, not what it is: write {ways}")
