"""From a TOML file and variables to `Config`: where each value came from, and what to say where it does not fit."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from heliograph.config.files import read_file
from heliograph.config.settings import (
    AppleProxySettings,
    AppSettings,
    Config,
    LegacySettings,
    Setting,
    are_same,
    is_app_name,
    is_reference,
)
from heliograph.errors import ConfigError

PREFIX = "HELIOGRAPH_"
"""What the names of our variables begin with."""

NOT_SETTINGS = frozenset(
    PREFIX + name for name in ("CONFIG", "URL", "KEY", "KEY_FILE", "LOG_LEVEL", "LOG_FORMAT", "CRASH_AT")
)
"""Variables with the prefix that others read: the command line, `crash`."""
_OTHERS = NOT_SETTINGS - {PREFIX + "CRASH_AT"}

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_PROTOCOL = r"(?:TCP|UDP|SCTP)"
_is_of_kubernetes = re.compile(
    rf"(?:\w+_)?(?:SERVICE_HOST=.*|SERVICE_PORT(?:_\w+)?=\d+|PORT=\w+://.*|PORT_\d+_{_PROTOCOL}(?:_\w+)?=.*)", re.DOTALL
).fullmatch
"""What each container finds in its environment where a service begins with our name (Kubernetes, "Accessing the
Service")."""
_Way = tuple[str, ...]
"""To a setting: `("apps", "shop", "credentials[1]", "key")`."""

S = TypeVar("S", bound=Struct)


def load(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration from a TOML file, if there is one, and the environment.

    Raises ConfigError: what is wrong where, and what to change.
    """
    return _load(file, environ)[0]


def explain(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """What `load` gives, setting by setting, and where each is from. Raises ConfigError."""
    config, reader = _load(file, environ)
    return list(reader.explain(config))


def _load(file: Path | None, environ: Mapping[str, str]) -> tuple[Config, _Reader]:
    tree = {} if file is None else _read_toml(file)
    reader = _Reader(str(file) if file else "The configuration")
    reader.put_all(tree, {name.removeprefix(PREFIX): environ[name] for name in environ if _is_meant(name, environ)})
    config = reader.struct(Config, tree, ())
    folder = Path.cwd() if file is None else file.absolute().parent
    settled = Config(
        data=_absolute(folder, config.data),
        api=_settle(folder, "api", config.api, {"key": False}),
        store=_settle(folder, "store", config.store, {"master_key": False}),
        apps={name: _settle_app(folder, f"apps.{name}", app) for name, app in config.apps.items()},
        legacy={name: _settle_legacy(folder, f"legacy.{name}", each) for name, each in config.legacy.items()},
        apple_proxy={
            name: _settle(folder, f"apple_proxy.{name}", each, _LISTENER_FILES)
            for name, each in config.apple_proxy.items()
        },
    )
    reader.check_addresses(settled)
    return settled, reader


def _is_meant(name: str, environ: Mapping[str, str]) -> bool:
    """Whether this variable is one of ours, and says anything."""
    return (
        name.startswith(PREFIX)
        and environ[name] != ""
        and name not in NOT_SETTINGS
        and not _is_of_kubernetes(f"{name.removeprefix(PREFIX)}={environ[name]}")
    )


class _Reader:
    """Turns a tree of plain values into structs, and knows where each value came from."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._variables: dict[_Way, str] = {}
        """By the way to the setting, or to an app or a listener that only variables tell of."""
        self._given: set[_Way] = set()

    def put_all(self, tree: dict[str, Any], variables: Mapping[str, str]) -> None:
        """Set what variables name, here without their prefix. Raises ConfigError."""
        by_path = {tuple(name.lower().split("__")): name for name in variables}
        for path in sorted(by_path, key=lambda path: [part.zfill(9) for part in path]):  # 2 before 10
            name = by_path[path]
            kind = path[0]
            tables = tree.setdefault(kind, {}) if kind in _NAMED else None
            if len(path) < 3 or not isinstance(tables, dict):
                self._put(tree, path, PREFIX + name, variables[name])
                continue
            table = _table_of(path[1], tables, variables.get(by_path.get((kind, path[1], "name"), "")))
            if table not in tables:
                self._variables[kind, table] = PREFIX + "__".join(name.split("__")[:2])
            tables.setdefault(table, {})
            if path[2:] != ("name",):
                self._put(tree, (kind, table, *path[2:]), PREFIX + name, variables[name])

    def _put(self, tree: Any, path: _Way, variable: str, value: str) -> None:
        way: list[str] = []
        for part in path[:-1]:
            if isinstance(tree, list):
                number = int(part) if part.isascii() and part.isdecimal() else 0
                if not 1 <= number <= len(tree) + 1:
                    raise ConfigError(f"{variable}: number the tables 1, 2, ... without a gap")
                if number > len(tree):
                    tree.append({})
                tree = tree[number - 1]
                way[-1] += f"[{number}]"
            else:
                tree = tree.setdefault(part, [] if way[:1] == ["apps"] and part == "credentials" else {})
                way.append(part)
            if not isinstance(tree, dict | list):
                raise ConfigError(f"{variable}: there is nothing below {part}, which is a single value")
        if isinstance(tree, list) or (way[:1] == ["apps"] and path[-1] == "credentials"):
            raise ConfigError(f"{variable} is a table: spell its settings, as {_tables(path)}__1__KEY")
        self._variables[*way, path[-1]] = variable
        tree[path[-1]] = value

    def explain(self, settings: Any, way: _Way = ()) -> Iterator[Setting]:
        """The settings below, that have a value, and where each is from."""
        if isinstance(settings, Struct):
            # Tables behind single values, as TOML has it.
            for name in sorted(settings.__struct_fields__, key=lambda name: _is_table(getattr(settings, name))):
                yield from self.explain(getattr(settings, name), (*way, name))
        elif isinstance(settings, dict):
            for name, each in settings.items():
                yield from self.explain(each, (*way, name))
        elif _is_table(settings):
            for number, each in enumerate(settings, 1):
                yield from self.explain(each, _numbered(way, number))
        elif settings not in (None, ()):
            origin = self._variables.get(way) or (self._source if way in self._given else "default")
            yield Setting(way, settings, origin)

    def struct(self, type_: type[S], tree: Any, path: tuple[str, ...]) -> S:
        """A settings struct from its table. Raises ConfigError."""
        if not isinstance(tree, dict):
            raise self._no_table(path, f"must be a table, [{'.'.join(path)}]")
        hints = get_type_hints(type_, include_extras=True)
        for name in tree:
            if name not in hints:
                raise self._unknown(hints, (*path, name), tree[name])
        values = {name: self._value(hints[name], value, (*path, name)) for name, value in tree.items()}
        try:
            return type_(**values)
        except ValueError as error:
            raise ConfigError(f"{self._where(path)} {error}") from None

    def _value(self, type_: Any, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(type_, type) and issubclass(type_, Struct):
            return self.struct(type_, value, path)
        if get_origin(type_) is dict:
            (_, inner) = get_args(type_)
            if inner is str:
                return self._texts(value, path)
            if not isinstance(value, dict):
                raise self._no_table(path, f"must hold tables, {_a_table(path)}")
            if not value and path[0] in _LISTENERS:
                raise self._no_table(path, f"needs a name: write {_a_table(path)} instead of [{path[0]}]")
            for name, each in value.items():
                if name in inner.__struct_fields__ and not isinstance(each, dict):
                    raise self._no_table(
                        (*path, name),
                        f"stands below [{path[0]}], which needs a name: write {_a_table(path)} instead of [{path[0]}]",
                    )
            return {name: self.struct(inner, each, (*path, self._checked(name, path))) for name, each in value.items()}
        if get_origin(type_) is tuple and issubclass(get_args(type_)[0], Struct):
            if not isinstance(value, list):
                raise ConfigError(f"{self._where(path)} must be tables in the file, [[{'.'.join(path)}]]")
            (inner, _) = get_args(type_)
            return tuple(self.struct(inner, each, _numbered(path, number)) for number, each in enumerate(value, 1))
        self._given.add(path)
        below = self._variable_below(path) if isinstance(value, dict) else None
        if below is not None:
            raise ConfigError(f"{below}: there is nothing below {path[-1]}, which is a single value")
        from_variable = path in self._variables
        if from_variable and get_origin(type_) is tuple:
            value = [part.strip() for part in value.split(",")]
        try:
            return msgspec.convert(value, type_, strict=not from_variable)
        except msgspec.ValidationError as error:
            kinds = get_args(type_) or (type_,)
            choices = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)), ())
            wanted = f"write one of {', '.join(choices)}" if choices else _plain(str(error))
            if choices and not isinstance(value, str):
                wanted += ", in double quotes"
            if value == "sandbox" and "development" in list(choices):
                wanted += "; Apple's sandbox is called development here"
            if from_variable:  # all is text there, and nothing in quotes
                wanted = wanted.removesuffix(", got text in quotes")
            raise ConfigError(f"{self._where(path)} does not fit: {wanted}") from None

    def _texts(self, value: Any, path: _Way) -> dict[str, str]:
        """A table of texts, which stands in the file alone."""
        below = self._variable_below(path)
        if below is not None:
            raise ConfigError(f"{below}: {path[-1]} stand in the file alone, below [{'.'.join(path)}]")
        if not isinstance(value, dict):
            raise ConfigError(f"{self._where(path)} must hold texts, below [{'.'.join(path)}]")
        for name, text in value.items():
            if isinstance(text, dict):  # so TOML has a name with dots
                raise ConfigError(
                    f'{self._where(path)} has a name without quotes: write "{_with_dots(name, text)}" = ...'
                )
            if not isinstance(text, str):
                raise ConfigError(f"{self._where((*path, name))} does not fit: expected text in quotes")
            self._given.add((*path, name.lower()))
        return value

    def check_addresses(self, config: Config) -> None:
        """Whether everything that listens can have its port. Raises ConfigError."""
        known: dict[_Way, tuple[str, int]] = {}
        for way, (host, port) in config.addresses().items():
            for other, (its_host, its_port) in known.items():
                if port == its_port != 0 and are_same(host, its_host):
                    raise ConfigError(
                        f"{self._where(way)} is {port} on {host}, which {'.'.join(other)} is too: give one of them "
                        "another port"
                    )
            known[way] = host, port

    def _checked(self, name: str, path: tuple[str, ...]) -> str:
        """The name of an app or a listener."""
        if not is_app_name(name):
            what = "an app" if path[0] == "apps" else "a listener"
            raise ConfigError(
                f"{self._where((*path, name))} is no name for {what}: use letters, digits, dots, hyphens and "
                "underscores, 64 at most"
            )
        return name

    def _unknown(self, known: Collection[str], path: _Way, value: Any) -> ConfigError:
        """Names the closest of the known settings, or all of them where none is close."""
        from difflib import get_close_matches

        of_listener = path[0] in _LISTENERS
        others = _NAMES_OF_LISTENERS if of_listener else _OTHER_NAMES
        variable = self._variable_below(path)
        if variable is None:
            name = path[-1].lower()
            if len(path) == 1 and isinstance(value, dict) and name in _OTHER_TABLES:
                table = _a_table((_OTHER_TABLES[name],))
                return ConfigError(f"{self._where(path)} is not a setting: did you mean {table}?")
            meant = others.get(name, name)
            if of_listener and meant == "passphrase":
                text = "its private key is not encrypted, but in a file that others cannot read"
                return ConfigError(f"{self._where(path)} is not a setting: a listener needs none, as {text}")
            elsewhere = " or ".join(_tables_with(meant))
            close = [meant] if meant in known else get_close_matches(name, known, n=1)
            if elsewhere and meant not in known and not (close and isinstance(value, dict)):
                what = "it" if meant == name else f"did you mean {meant}? It"
                return ConfigError(f"{self._where(path)} is not a setting here: {what} belongs below {elsewhere}")
            hint = f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"
            return ConfigError(f"{self._where(path)} is not a setting: {hint}")
        front, _, last = variable.rpartition("__")
        label = variable.split("__")[1] if variable.count("__") > 1 else "NAME"
        common = f"{PREFIX}{path[0].upper()}__{label}__" if path[0] in _NAMED else PREFIX  # what is alike anyway
        names = [PREFIX + name for name in _variables_of(Config, label)]
        alike = {
            name.removeprefix(common).replace("__", "_"): name
            for name in (*names, *sorted(_OTHERS))
            if name.startswith(common)
        }
        meant = f"{front}__{others.get(last.lower(), '')}".upper()
        if path[0] in _OTHER_TABLES:
            meant = "__".join((f"{PREFIX}{_OTHER_TABLES[path[0]].upper()}", *variable.split("__")[1:]))
        if meant in names:
            return ConfigError(f"{variable} is not a setting: did you mean {meant}?")
        close = get_close_matches(variable.upper().removeprefix(common).replace("__", "_"), alike, n=1)
        if close:
            return ConfigError(f"{variable} is not a setting: did you mean {alike[close[0]]}?")
        if path[0] in _NAMED:
            some = [each for each in names if each.startswith(common) and "__1__" not in each]
            more = [f"{common}CREDENTIALS__1__..."] if path[0] == "apps" else []
        else:
            fronts = [f"{PREFIX}{each.upper()}__{label}__" for each in sorted(_NAMED)]
            some = [each for each in names if not each.startswith(tuple(fronts))]
            more = [*(f"{each}..." for each in fronts), *sorted(_OTHERS)]
        return ConfigError(f"{variable} is not a setting: known are {', '.join(some + more)}")

    def _no_table(self, path: _Way, wanted: str) -> ConfigError:
        if path in self._variables:
            wanted = f"is a table: spell its settings, as {PREFIX}API__PORT does"
            if path[0] in _NAMED:
                label = "MAIN" if path[0] in _LISTENERS else "SHOP"
                is_setting = len(path) > 1 and path[1] in _NAMED[path[0]].__struct_fields__
                setting = path[1].upper() if is_setting else "PORT"
                wanted = f"is a table: spell its settings, as {PREFIX}{path[0].upper()}__{label}__{setting} does"
        return ConfigError(f"{self._where(path)} {wanted}")

    def _variable_below(self, path: _Way) -> str | None:
        return next((name for way, name in self._variables.items() if way[: len(path)] == path), None)

    def _where(self, path: _Way) -> str:
        """How people find this setting again."""
        variable = self._variables.get(path)
        return variable or f"{self._source}: {'.'.join(path)}"


def _table_of(label: str, tables: Collection[str], named: str | None) -> str:
    """The app or listener that variables mean: as NAME says, or one of the file that has hyphens or dots instead."""
    if named:
        return named
    alike = [name for name in tables if re.sub("[.-]", "_", name.lower()) == label]
    return alike[0] if label not in tables and len(alike) == 1 else label


def _with_dots(name: str, below: Any) -> str:
    """The name that TOML took for tables in each other."""
    while isinstance(below, dict) and below:
        part, below = next(iter(below.items()))
        name += f".{part}"
    return name


def _is_table(value: Any) -> bool:
    return isinstance(value, Struct | dict) or (isinstance(value, tuple) and any(isinstance(v, Struct) for v in value))


def _numbered(way: _Way, number: int) -> _Way:
    return (*way[:-1], f"{way[-1]}[{number}]")


_OTHER_NAMES = {
    **dict.fromkeys(("bundle_id", "bundleid", "bundle_identifier", "app_id"), "topic"),
    "bundle_ids": "topics",
    **dict.fromkeys(("key_file", "key_path", "p8"), "key"),
    **dict.fromkeys(("p12", "pem"), "certificate"),
    "password": "passphrase",
}
"""Of settings of an app, as others call them."""
_NAMES_OF_LISTENERS = {
    **dict.fromkeys(("key", "key_file", "key_path", "private_key", "certificate_key_file"), "certificate_key"),
    **dict.fromkeys(("cert", "pem", "certificate_file", "chain"), "certificate"),
    **dict.fromkeys(("min_tls", "tls_version", "minimum_tls_version"), "minimum_tls"),
    **dict.fromkeys(("server_names", "sni"), "names"),
    "password": "passphrase",
    "bind": "host",
    "listen": "port",
}
_NAMED: dict[str, type[Struct]] = {"apps": AppSettings, "legacy": LegacySettings, "apple_proxy": AppleProxySettings}
"""Tables of tables with names of the operator's choice."""
_LISTENERS = ("legacy", "apple_proxy")
_OTHER_TABLES = {
    **dict.fromkeys(("gateway", "binary", "feedback", "legacy_gateway"), "legacy"),
    **dict.fromkeys(("proxy", "apple", "apns", "apns_proxy", "proxies"), "apple_proxy"),
}
"""As others may call them."""


def _tables_with(name: str) -> Iterator[str]:
    """The tables of the file with a setting of this name."""
    for table, hint in sorted(get_type_hints(Config).items(), key=lambda each: get_origin(each[1]) is not dict):
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        if name in getattr(inner, "__struct_fields__", ()):
            yield f"{'a' if table == 'legacy' else 'an'} [{table}.NAME]" if inner is not hint else f"[{table}]"


def _a_table(path: _Way) -> str:
    """How to begin a table among those there."""
    return f"[{'.'.join(path)}.{'main' if path[0] in _LISTENERS else 'NAME'}]"


def _tables(path: _Way) -> str:
    return (PREFIX + "__".join(path[: path.index("credentials") + 1])).upper()


def _variables_of(type_: Any, label: str) -> Iterator[str]:
    """The names of all variables without their prefix, with this label for the app."""
    for name, hint in get_type_hints(type_).items():
        if get_origin(hint) is dict:
            inner, between = get_args(hint)[1], f"__{label}__"
        elif get_origin(hint) is tuple and issubclass(get_args(hint)[0], Struct):
            inner, between = get_args(hint)[0], "__1__"
        else:
            inner, between = hint, "__"
        if get_origin(hint) is dict and inner is str:
            continue  # in the file only
        if isinstance(inner, type) and issubclass(inner, Struct):
            yield from (name.upper() + between + each for each in _variables_of(inner, label))
        else:
            yield name.upper()
    if type_ in _NAMED.values():
        yield "NAME"


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
    if file == Path(os.devnull):
        return {}
    content = read_file(file, "The configuration", most=_MAX_CONFIG_BYTES)
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8: save it as such") from None
    except RecursionError:
        raise ConfigError(f"{file} has lists or tables too deep in one another: no setting is like that") from None
    except tomllib.TOMLDecodeError as error:
        hint = '; texts stand in double quotes, as in topic = "com.example.shop"' if _is_bare(content, error) else ""
        raise ConfigError(f"{file} is not TOML: {error}{hint}") from None


_is_bare_text = re.compile(r"\s*[\w.-]+\s*=\s*(?![\"'{\[])\S*[^\W\d].*").fullmatch


def _is_bare(content: bytes, error: tomllib.TOMLDecodeError) -> bool:
    """Whether there is text without quotes around it in the line that could not be read."""
    place = re.search(r"\(at line (\d+),", str(error))
    lines = content.decode().split("\n")
    return place is not None and _is_bare_text(lines[int(place[1]) - 1].rstrip("\r")) is not None


def _settle(folder: Path, where: str, settings: S, references: Mapping[str, bool]) -> S:
    """With references in place of what was written in these fields, where a bare path will do or not."""
    found = {name: getattr(settings, name) for name in references}
    return replace(
        settings,
        **{
            name: _reference(folder, text, f"{where}.{name}", bare_path=references[name])
            for name, text in found.items()
            if text is not None
        },
    )


def _settle_app(folder: Path, where: str, app: AppSettings) -> AppSettings:
    if app.ca is not None:
        app = replace(app, ca=_absolute(folder, app.ca))
    if app.proxy is not None and is_reference(app.proxy):
        app = _settle(folder, where, app, {"proxy": False})
    tables = [
        _settle(folder, f"{where}.credentials[{number}]", each, _CREDENTIAL_FILES)
        for number, each in enumerate(app.credentials, 1)
    ]
    return replace(_settle(folder, where, app, _CREDENTIAL_FILES), credentials=tuple(tables))


def _settle_legacy(folder: Path, where: str, listener: LegacySettings) -> LegacySettings:
    listener = replace(listener, names={name.lower(): app for name, app in listener.names.items()})
    return _settle(folder, where, listener, _LISTENER_FILES)


_LISTENER_FILES = {"certificate": True, "certificate_key": True}
_CREDENTIAL_FILES = {"key": True, "certificate": True, "certificate_key": True, "passphrase": False}


def _absolute(folder: Path, path: str) -> str:
    if "\0" in path:
        raise ConfigError("A path in the configuration has a NUL in it: correct it")
    return str(folder / Path(path).expanduser())


def _reference(folder: Path, text: str, setting: str, *, bare_path: bool) -> str:
    """`file:` with an absolute path, or `credential:NAME`. Raises ConfigError, which never repeats what it refuses."""
    if text.startswith("credential:"):
        return text
    if text.startswith("file:") or (bare_path and text and "\n" not in text and "-----" not in text):
        return f"file:{_absolute(folder, text.removeprefix('file:'))}"
    ways = "a path or credential:NAME" if bare_path else "file:PATH or credential:NAME"
    raise ConfigError(f"{setting} must say where the secret is, not what it is: write {ways}")
