"""The configuration: one tree of frozen structs, read from a TOML file and from HELIOGRAPH_* variables.

A variable spells the way to its setting with two underscores: `HELIOGRAPH_API__PORT` is `port` in `[api]`; it wins over
the file, a list is written with commas, and an empty one is none. Relative paths start at the file's folder, without a
file at the current one. What is not a setting is refused by name. A secret never stands in the file or in a variable:
`file:PATH` or `credential:NAME` (a file in $CREDENTIALS_DIRECTORY, as systemd gives) says where it is.
"""

from heliograph.config.files import MAX_SECRET_BYTES, read_file, read_secret, secret_path
from heliograph.config.reading import NOT_SETTINGS, PREFIX, explain, load
from heliograph.config.settings import (
    APPLE_PORTS,
    MAX_CREDENTIALS,
    ApiSettings,
    AppContent,
    AppleProxySettings,
    AppSettings,
    Config,
    CredentialContent,
    CredentialSettings,
    Environments,
    LegacySettings,
    Port,
    Setting,
    StoreSettings,
    TlsVersion,
    check_credentials,
    check_proxy,
    check_target,
    is_app_name,
    is_loopback,
    is_reference,
)

__all__ = [
    "APPLE_PORTS",
    "MAX_CREDENTIALS",
    "MAX_SECRET_BYTES",
    "NOT_SETTINGS",
    "PREFIX",
    "ApiSettings",
    "AppContent",
    "AppSettings",
    "AppleProxySettings",
    "Config",
    "CredentialContent",
    "CredentialSettings",
    "Environments",
    "LegacySettings",
    "Port",
    "Setting",
    "StoreSettings",
    "TlsVersion",
    "check_credentials",
    "check_proxy",
    "check_target",
    "explain",
    "is_app_name",
    "is_loopback",
    "is_reference",
    "load",
    "read_file",
    "read_secret",
    "secret_path",
]
