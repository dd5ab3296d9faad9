"""The configuration: one tree of frozen structs, read from a TOML file and from HELIOGRAPH_* variables.

A variable spells the way to its setting with two underscores: `HELIOGRAPH_API__PORT` is `port` in `[api]`; it wins over
the file, and a list is written with commas. Relative paths start at the file's folder, without a file at the current
one. What is not a setting is refused by name. A secret never stands in the file or in a variable: `file:PATH` or
`credential:NAME` (a file in $CREDENTIALS_DIRECTORY, as systemd gives) says where it is.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
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

NOT_SETTINGS = frozenset({"HELIOGRAPH_CONFIG", "HELIOGRAPH_URL", "HELIOGRAPH_KEY", "HELIOGRAPH_CRASH_AT"})
"""Variables with the prefix that others read: the command line, `crash`."""

MAX_CREDENTIALS = 16
"""Of one app: opening each may take some time."""

MAX_SECRET_BYTES = 64 * 1024
"""No file of keys or certificates is longer."""
_OTHERS_MAY = 0o007
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_is_host_name = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?").fullmatch
_is_topic = re.compile(r"[!-~]{1,255}").fullmatch
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
                _check_credentials(each)
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


def _check_credentials(given: CredentialSettings) -> None:
    """Raises ValueError."""
    if given.key is not None and given.certificate is not None:
        raise ValueError("has both a key and a certificate: keep one, or give each a [[credentials]] table")
    if given.key is None and given.certificate is None:
        raise ValueError("has no credentials: add key, the .p8 file that Apple issued, or certificate, a .p12 or .pem")
    if given.key is not None:
        if given.certificate_key is not None:
            raise ValueError("has certificate_key, which goes with a certificate and not with a key: remove it")
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
    tree = {} if file is None else _read_toml(file)
    reader = _Reader(str(file) if file else "The configuration")
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            reader.put(tree, name, environ[name])
    config = reader.struct(Config, tree, ())
    folder = Path.cwd() if file is None else file.absolute().parent
    return Config(
        data=_absolute(folder, config.data),
        api=_settle(folder, "api", config.api, {"key": False}),
        store=_settle(folder, "store", config.store, {"master_key": False}),
        apps={name: _settle_app(folder, f"apps.{name}", app) for name, app in config.apps.items()},
    )


def read_secret(reference: str, setting: str) -> bytes:
    """The contents of the file that `file:PATH` or `credential:NAME` stands for.

    Raises ConfigError, also where other users of the machine could read the file. `setting` is for its text.
    """
    return read_file(secret_path(reference, setting), setting, secret=True)


def read_file(path: Path, setting: str, *, secret: bool = False, most: int = MAX_SECRET_BYTES) -> bytes:
    """The contents of a file of `most` octets at most. `secret`: other users of the machine must not read it.

    Raises ConfigError; `setting` is for its text.
    """
    try:
        # Without O_NONBLOCK a FIFO would have us wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{setting}: {path} is a pipe or a device: name a regular file")
            # What is read-only to us, as secrets in containers are, nobody could change as we advise.
            if secret and mode & _OTHERS_MAY and not os.fstatvfs(opened.fileno()).f_flag & os.ST_RDONLY:
                raise ConfigError(
                    f"{setting}: every user of this machine can read {path}: run chmod 600 {path} "
                    "(or 640, with a group that only heliograph is in)"
                )
            content = opened.read(most + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: cannot be read, as there is no file {path}: correct the path, or put the file there"
        ) from None
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror}): correct path or mode") from error
    if len(content) > most:
        raise ConfigError(
            f"{setting}: {path} is longer than {most} octets, so no key or certificate: name another file"
        )
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
        if get_origin(type_) is tuple and issubclass(get_args(type_)[0], Struct):
            if not isinstance(value, list):
                raise ConfigError(f"{self._where(path)} must be tables in the file, [[{'.'.join(path)}]]")
            return tuple(self.struct(get_args(type_)[0], each, path) for each in value)
        from_variable = path in self._variables
        if from_variable and get_origin(type_) is tuple:
            value = [part.strip() for part in value.split(",")]
        try:
            return msgspec.convert(value, type_, strict=not from_variable)
        except msgspec.ValidationError as error:
            kinds = get_args(type_) or (type_,)
            choices = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)), ())
            wanted = f"write one of {', '.join(choices)}" if choices else _plain(str(error))
            raise ConfigError(f"{self._where(path)} does not fit: {wanted}") from None

    def _app_name(self, name: str, path: tuple[str, ...]) -> str:
        if not is_app_name(name):
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
