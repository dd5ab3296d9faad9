"""The configuration: one tree of frozen structs, read from a TOML file and from HELIOGRAPH_* variables.

A variable spells the way to its setting with two underscores: `HELIOGRAPH_API__PORT` is `port` in `[api]`; it wins over
the file, a list is written with commas, and an empty one is none. Relative paths start at the file's folder, without a
file at the current one. What is not a setting is refused by name. A secret never stands in the file or in a variable:
`file:PATH` or `credential:NAME` (a file in $CREDENTIALS_DIRECTORY, as systemd gives) says where it is.
"""

from __future__ import annotations

import os
import re
import select
import stat
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from heliograph.errors import ConfigError
from heliograph.model import Environment

PREFIX = "HELIOGRAPH_"
"""What the names of our variables begin with."""

NOT_SETTINGS = frozenset(
    PREFIX + name for name in ("CONFIG", "URL", "KEY", "KEY_FILE", "LOG_LEVEL", "LOG_FORMAT", "CRASH_AT")
)
"""Variables with the prefix that others read: the command line, `crash`."""
_OTHERS = NOT_SETTINGS - {PREFIX + "CRASH_AT"}

MAX_CREDENTIALS = 16
"""Of one app: opening each may take some time."""

MAX_SECRET_BYTES = 64 * 1024
"""No file of keys or certificates is longer."""
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_WRITER_S = 5.0
"""How long somebody may take to open a pipe for writing."""
_WRITTEN_S = 120.0
"""How long who has opened it may take to write: a program may ask a person for a passphrase first."""
_OTHERS_MAY = 0o007
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_is_host_name = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?").fullmatch
_is_topic = re.compile(r"[!-~]{1,255}").fullmatch
_PROTOCOL = r"(?:TCP|UDP|SCTP)"
_is_of_kubernetes = re.compile(
    rf"(?:\w+_)?(?:SERVICE_HOST=.*|SERVICE_PORT(?:_\w+)?=\d+|PORT=\w+://.*|PORT_\d+_{_PROTOCOL}(?:_\w+)?=.*)", re.DOTALL
).fullmatch
"""What each container finds in its environment where a service begins with our name (Kubernetes, "Accessing the
Service")."""
_Way = tuple[str, ...]
"""To a setting: `("apps", "shop", "credentials[1]", "key")`."""
is_app_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch
"""Whether an app may be called so."""

Port = Annotated[int, Meta(ge=0, le=65535)]

APPLE_PORTS = (443, 2197)
"""Apple listens on both (Apple, "Sending notification requests to APNs")."""

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


class StoreSettings(Struct, frozen=True):
    """`[store]`: how much is kept, and for how long."""

    receipts_days: Annotated[int, Meta(ge=1, le=3650)] = 7
    """How long receipts are kept after the end of what they tell of."""
    max_waiting: Annotated[int, Meta(ge=1)] = 5_000_000
    """Unfinished notifications at most; more are refused until some have left."""
    master_key: str | None = None
    """What seals stored apps, as `file:PATH` or `credential:NAME`; None: `master-key` in the data folder, made on the
    first start."""


class CredentialSettings(Struct, frozen=True, kw_only=True):
    """`[[apps.NAME.credentials]]`: a signing key, or a certificate. Secrets are references after `load`."""

    key: str | None = None
    """The .p8 file that Apple issued: a path (`file:PATH` after `load`), or `credential:NAME`."""
    key_id: str | None = None
    """None: as in the name of the file, AuthKey_<key id>.p8."""
    team_id: str | None = None
    certificate: str | None = None
    """A .p12 or .pem file, as `key`."""
    certificate_key: str | None = None
    """The certificate's private key, where it is in a file of its own; as `key`."""
    passphrase: str | None = None
    """Of the .p12, the private key or the .p8: `file:PATH` or `credential:NAME`."""
    environment: Environments | None = None
    """None: production for a key, what the certificate says for a certificate."""

    def __repr__(self) -> str:
        return "<settings of credentials>"  # before `load` has looked, a secret may stand where a reference should


class AppSettings(CredentialSettings, frozen=True, kw_only=True):
    """`[apps.NAME]`: an app, and what Apple knows us by."""

    topic: str | None = None
    topics: tuple[str, ...] = ()
    """Bundle ids; `topic` where there is one only. A certificate says them itself."""
    credentials: tuple[CredentialSettings, ...] = ()
    """Where one key or certificate is not enough; the first that fits is used."""
    host: str | None = None
    """Send there and not to Apple; None: Apple."""
    port: Port = 443
    """Apple listens on 443 and 2197."""
    ca: str | None = None
    """A PEM file with the certificates to trust on `host`; None: those of the system."""
    proxy: str | None = None
    """An HTTP proxy to go through: http://HOST:PORT, or a reference to a file with the URL."""

    def __repr__(self) -> str:
        return "<settings of an app>"

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if len(self.credentials) > MAX_CREDENTIALS:
            raise ValueError(f"has {len(self.credentials)} credentials, and {MAX_CREDENTIALS} are enough: remove some")
        for number, each in enumerate(self.each_credentials(), 1):
            try:
                check_credentials(each)
            except ValueError as error:
                raise ValueError(f"(credentials, table {number}) {error}" if self.credentials else str(error)) from None
        if self.topic is not None and self.topics:
            raise ValueError("has both topic and topics: keep one of them")
        if not self.bundle_ids and not any(each.certificate for each in self.each_credentials()):
            raise ValueError("needs either topic, the app's bundle id, or topics, a list of them")
        if not all(map(_is_topic, self.bundle_ids)):
            raise ValueError(
                "has a topic that is not 1 to 255 printable ASCII characters without blanks: write the app's bundle "
                "id, as com.example.shop"
            )
        check_target(self.host, self.port, ca=self.ca is not None)
        if self.proxy is not None and not is_reference(self.proxy):
            check_proxy(self.proxy)

    @property
    def bundle_ids(self) -> tuple[str, ...]:
        return self.topics if self.topic is None else (self.topic,)

    def each_credentials(self) -> tuple[CredentialSettings, ...]:
        """One at least. What the app says of team and environment holds where a table does not say it."""
        own = CredentialSettings(
            **{name: getattr(self, name) for name in CredentialSettings.__struct_fields__}  # msgspec knows no upcast
        )
        if not self.credentials:
            return (own,)
        alone = ("key", "key_id", "certificate", "certificate_key", "passphrase")
        stray = next((name for name in alone if getattr(own, name) is not None), None)
        if stray is not None:
            raise ValueError(f"has {stray} beside [[credentials]] tables: move it into a table of its own")
        return tuple(
            replace(
                each,
                team_id=each.team_id or (own.team_id if each.key else None),
                environment=each.environment or own.environment,
            )
            for each in self.credentials
        )


class Setting(Struct, frozen=True):
    """A setting that has a value, which never is a secret."""

    way: tuple[str, ...]
    """To it: `("apps", "shop", "credentials[1]", "key")`."""
    value: Any
    origin: str
    """The file, the variable, or `default`."""


class Config(Struct, frozen=True):
    """Everything that can be set. Paths are absolute after `load`."""

    data: str = "heliograph-data"
    """The folder of the database, the API key and the master key."""
    api: ApiSettings = ApiSettings()
    store: StoreSettings = StoreSettings()
    apps: dict[str, AppSettings] = {}


class CredentialContent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As `CredentialSettings`, with what the files hold."""

    key: bytes | None = None
    key_id: str | None = None
    team_id: str | None = None
    certificate: bytes | None = None
    certificate_key: bytes | None = None
    passphrase: bytes | None = None
    environment: Environments | None = None
    file: str | None = None
    """Where it is from, for people."""

    def __repr__(self) -> str:
        return "<credentials>"


class AppContent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As `AppSettings`, with what the files hold: all that an app is made of."""

    topics: tuple[str, ...] = ()
    credentials: tuple[CredentialContent, ...]
    host: str | None = None
    port: Port = 443
    ca: bytes | None = None
    proxy: str | None = None

    def __repr__(self) -> str:
        return f"<app with {len(self.credentials)} credentials>"


_OF_CERTIFICATES = (".p12", ".pfx", ".cer", ".crt")


def check_credentials(given: CredentialSettings) -> None:
    """Whether they belong together. Raises ValueError."""
    if given.key is not None and given.certificate is not None:
        raise ValueError("has both a key and a certificate: keep one, or give each a [[credentials]] table")
    if given.key is None and given.certificate is None:
        raise ValueError("has no credentials: add key, the .p8 file that Apple issued, or certificate, a .p12 or .pem")
    if given.key is not None:
        if given.certificate_key is not None:
            raise ValueError("has certificate_key, which goes with a certificate and not with a key: remove it")
        if given.team_id is None and given.key.lower().endswith(_OF_CERTIFICATES):
            raise ValueError("has a key whose name is that of a certificate: if it is one, write certificate, not key")
        if given.team_id is None:
            raise ValueError(
                "has a key but no team_id: write the 10 characters that the developer account shows as Team ID"
            )
    elif given.key_id is not None or given.team_id is not None:
        raise ValueError("has a key_id or a team_id, which go with a key and not with a certificate: remove them")


def check_target(host: str | None, port: int, *, ca: bool) -> None:
    """Whether an app can be sent there. Raises ValueError."""
    if host is None and port not in APPLE_PORTS:
        raise ValueError(f"has port {port}, but Apple listens on 443 and 2197: take one of these, or add host")
    if port == 0:
        raise ValueError("has port 0, where nobody can listen: write the port of host")
    if host is None and ca:
        raise ValueError("has a ca, but no host that it could be for: add host")
    if host is not None and not _is_host(host):
        raise ValueError(
            "has a host that is neither a name nor an address: write it alone, without http://, brackets and blanks; a "
            "port goes into port"
        )


def _is_host(text: str) -> bool:
    """A name of the DNS (RFC 1123, with the underscores that containers have; IDNs as xn--), or an IP address."""
    if ":" not in text:
        return _is_host_name(text) is not None
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text or _is_host_name(text.partition("%")[2]) is not None


def check_proxy(url: str, *, secret: bool = False) -> None:
    """Whether it is the URL of a proxy. Raises ValueError, which never repeats it.

    `secret`: it is kept as one, so there may be a password in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path.strip("/") or parts.query:
        raise ValueError("has a proxy that is not like http://proxy.example.com:3128: correct it")
    if parts.password is not None and not secret:
        raise ValueError(
            "has a proxy with a password in it: put the URL into a file, and write file:PATH or credential:NAME"
        )


def is_reference(text: str) -> bool:
    """Whether it says where something is, not what it is."""
    return text.startswith(("file:", "credential:"))


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
    )
    return settled, reader


def _is_meant(name: str, environ: Mapping[str, str]) -> bool:
    """Whether this variable is one of ours, and says anything."""
    return (
        name.startswith(PREFIX)
        and environ[name] != ""
        and name not in NOT_SETTINGS
        and not _is_of_kubernetes(f"{name.removeprefix(PREFIX)}={environ[name]}")
    )


def read_secret(reference: str, setting: str) -> bytes:
    """The contents of the file that `file:PATH` or `credential:NAME` stands for.

    Raises ConfigError, also where other users of the machine could read the file. `setting` is for its text.
    """
    return read_file(secret_path(reference, setting), setting, secret=True)


def read_file(path: Path, setting: str, *, secret: bool = False, most: int = MAX_SECRET_BYTES) -> bytes:
    """The contents of a file of `most` octets at most, or what somebody writes into a pipe.

    `secret`: other users of the machine must not read it. Raises ConfigError; `setting` is for its text.
    """
    try:
        # Without O_NONBLOCK a pipe would have us wait for a writer, for ever if none comes.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ConfigError(f"{setting}: {path} is a device: name a file")
            # What is read-only to us, as secrets in containers are, nobody could change as we advise.
            if secret and mode & _OTHERS_MAY and not os.fstatvfs(opened.fileno()).f_flag & os.ST_RDONLY:
                raise ConfigError(
                    f"{setting}: every user of this machine can read {path}: run chmod 600 {path} "
                    "(or 640, with a group that only heliograph is in)"
                )
            if stat.S_ISFIFO(mode):
                content = _read_pipe(opened.fileno(), most + 1)
                if not content:
                    raise ConfigError(
                        f"{setting}: nothing came through the pipe {path}: see whether the program that writes into it "
                        "works, or name a file (a pipe can be read once only)"
                    )
            else:
                content = opened.read(most + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: cannot be read, as there is no file {path}: correct the path, or put the file there"
        ) from None
    except TimeoutError as error:
        raise ConfigError(f"{setting}: {path} is a pipe, and {error}: start what should, or name a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: {path} cannot be read ({why}): correct path or mode") from error
    if len(content) > most:
        raise ConfigError(f"{setting}: {path} is longer than {most} octets, the most that belongs here: name another")
    return content


def _read_pipe(descriptor: int, most: int) -> bytes:
    """What comes until its writers have closed it, `most` octets at most. Raises TimeoutError: what nobody does."""
    pipe = select.poll()
    pipe.register(descriptor, select.POLLIN)
    content = b""
    began = time.monotonic()
    while len(content) < most:
        ready = pipe.poll(_WRITER_S * 1000)
        try:
            part = os.read(descriptor, most - len(content))
        except BlockingIOError:  # there is a writer, which has nothing yet
            if time.monotonic() - began < _WRITTEN_S:
                continue
            raise TimeoutError(f"who writes into it has not ended within {_WRITTEN_S:.0f} s") from None
        if not part and not ready:
            raise TimeoutError(f"nobody writes into it within {_WRITER_S:.0f} s")
        if not part:
            break
        content += part
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
        self._variables: dict[_Way, str] = {}
        """By the way to the setting, or to an app that only variables tell of."""
        self._given: set[_Way] = set()

    def put_all(self, tree: dict[str, Any], variables: Mapping[str, str]) -> None:
        """Set what variables name, here without their prefix. Raises ConfigError."""
        by_path = {tuple(name.lower().split("__")): name for name in variables}
        apps = tree.get("apps", {})
        for path in sorted(by_path, key=lambda path: [part.zfill(9) for part in path]):  # 2 before 10
            name = by_path[path]
            if path[0] != "apps" or len(path) < 3 or not isinstance(apps, dict):
                self._put(tree, path, PREFIX + name, variables[name])
                continue
            app = _app_of(path[1], apps, variables.get(by_path.get(("apps", path[1], "name"), "")))
            if app not in apps:
                self._variables["apps", app] = PREFIX + "APPS__" + name.split("__")[1]
            tree.setdefault("apps", {}).setdefault(app, {})
            if path[2:] != ("name",):
                self._put(tree, ("apps", app, *path[2:]), PREFIX + name, variables[name])

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
                raise self._unknown(hints, (*path, name))
        values = {name: self._value(hints[name], value, (*path, name)) for name, value in tree.items()}
        try:
            return type_(**values)
        except ValueError as error:
            raise ConfigError(f"{self._where(path)} {error}") from None

    def _value(self, type_: Any, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(type_, type) and issubclass(type_, Struct):
            return self.struct(type_, value, path)
        if get_origin(type_) is dict:
            if not isinstance(value, dict):
                raise self._no_table(path, f"must hold tables, {_a_table(path)}")
            (_, inner) = get_args(type_)
            for name, each in value.items():
                if name in inner.__struct_fields__ and not isinstance(each, dict):
                    raise self._no_table(
                        (*path, name), f"is a setting of a single one: write {_a_table(path)} above it"
                    )
            return {name: self.struct(inner, each, (*path, self._app_name(name, path))) for name, each in value.items()}
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
            if value == "sandbox" and Environments.DEVELOPMENT in choices:
                wanted += "; Apple's sandbox is called development here"
            if from_variable:  # all is text there, and nothing in quotes
                wanted = wanted.removesuffix(", got text in quotes")
            raise ConfigError(f"{self._where(path)} does not fit: {wanted}") from None

    def _app_name(self, name: str, path: tuple[str, ...]) -> str:
        if not is_app_name(name):
            raise ConfigError(
                f"{self._where((*path, name))} is no name for an app: use letters, digits, dots, hyphens and "
                "underscores, 64 at most"
            )
        return name

    def _unknown(self, known: Collection[str], path: _Way) -> ConfigError:
        """Names the closest of the known settings, or all of them where none is close."""
        from difflib import get_close_matches

        variable = self._variable_below(path)
        if variable is None:
            name = path[-1].lower()
            meant = _OTHER_NAMES.get(name, name)
            elsewhere = " or ".join(_tables_with(meant))
            close = [meant] if meant in known else get_close_matches(name, known, n=1)
            if elsewhere and meant not in known:
                what = "it" if meant == name else f"did you mean {meant}? It"
                return ConfigError(f"{self._where(path)} is not a setting here: {what} belongs below {elsewhere}")
            hint = f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"
            return ConfigError(f"{self._where(path)} is not a setting: {hint}")
        of_app = path[0] == "apps"
        label = variable.split("__")[1] if variable.count("__") > 1 else "NAME"
        names = [PREFIX + name for name in _variables_of(Config, label)]
        common = len(f"{PREFIX}APPS__{label}__" if of_app else PREFIX)  # what is alike anyway
        alike = {name[common:].replace("__", "_"): name for name in (*names, *sorted(_OTHERS))}
        front, _, last = variable.rpartition("__")
        meant = f"{front}__{_OTHER_NAMES.get(last.lower(), '')}".upper()
        if meant in names:
            return ConfigError(f"{variable} is not a setting: did you mean {meant}?")
        close = get_close_matches(variable[common:].upper().replace("__", "_"), alike, n=1)
        if close:
            return ConfigError(f"{variable} is not a setting: did you mean {alike[close[0]]}?")
        of_apps = f"{PREFIX}APPS__{label}__"
        some = [each for each in names if each.startswith(of_apps) == of_app and "__1__" not in each]
        more = [f"{of_apps}CREDENTIALS__1__..."] if of_app else [f"{of_apps}...", *sorted(_OTHERS)]
        return ConfigError(f"{variable} is not a setting: known are {', '.join(some + more)}")

    def _no_table(self, path: _Way, wanted: str) -> ConfigError:
        if path in self._variables:
            wanted = f"is a table: spell its settings, as {PREFIX}API__PORT does"
        return ConfigError(f"{self._where(path)} {wanted}")

    def _variable_below(self, path: _Way) -> str | None:
        return next((name for way, name in self._variables.items() if way[: len(path)] == path), None)

    def _where(self, path: _Way) -> str:
        """How people find this setting again."""
        variable = self._variables.get(path)
        return variable or f"{self._source}: {'.'.join(path)}"


def _app_of(label: str, apps: Collection[str], named: str | None) -> str:
    """The app that variables mean: what NAME says, or one of the file that has hyphens or dots for underscores."""
    if named:
        return named
    alike = [name for name in apps if re.sub("[.-]", "_", name.lower()) == label]
    return alike[0] if label not in apps and len(alike) == 1 else label


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


def _tables_with(name: str) -> Iterator[str]:
    """The tables of the file with a setting of this name."""
    for table, hint in sorted(get_type_hints(Config).items(), key=lambda each: get_origin(each[1]) is not dict):
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        if name in getattr(inner, "__struct_fields__", ()):
            yield f"an {_a_table((table,))}" if inner is not hint else f"[{table}]"


def _a_table(path: _Way) -> str:
    """How to begin a table among those there."""
    return f"[{'.'.join(path)}.NAME]"


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
        if isinstance(inner, type) and issubclass(inner, Struct):
            yield from (name.upper() + between + each for each in _variables_of(inner, label))
        else:
            yield name.upper()
    if type_ is AppSettings:
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
