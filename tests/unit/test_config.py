"""The configuration: TOML, variables, what is refused and in which words."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from heliograph.config import (
    AppleProxySettings,
    AppSettings,
    Config,
    CredentialSettings,
    Environments,
    LegacySettings,
    Setting,
    TlsVersion,
    explain,
    files,
    load,
    read_file,
    read_secret,
    reading,
)
from heliograph.errors import ConfigError
from heliograph.model import Environment

SHOP = """
[apps.shop]
topic = "com.example.shop"
key = "AuthKey_ABC123DEFG.p8"
team_id = "DEF123GHIJ"
"""

TABLES = """
[apps.shop]
topic = "com.example.shop"
team_id = "DEF123GHIJ"

[[apps.shop.credentials]]
certificate = "voip.p12"
passphrase = "credential:word"
environment = "both"

[[apps.shop.credentials]]
key = "AuthKey_ABC123DEFG.p8"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "heliograph.toml"


def complaint(file: Path | None, text: str = "", **environ: str) -> str:
    """The words of the refusal."""
    if file is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ)
    return str(caught.value)


def test_nothing_at_all_is_a_configuration() -> None:
    config = load(None, {})
    assert (config.api.host, config.api.port, config.api.key, config.apps) == ("127.0.0.1", 8080, None, {})
    assert config.data == str(Path.cwd() / "heliograph-data")


def test_four_lines_are_an_app(file: Path) -> None:
    file.write_text(SHOP)
    config = load(file, {})
    app = config.apps["shop"]
    assert app.topic == "com.example.shop"
    assert (app.environment, app.host, app.port, app.ca, app.proxy) == (None, None, 443, None, None)
    assert (config.store.receipts_days, config.store.max_waiting) == (7, 5_000_000)


def test_relative_paths_start_at_the_folder_of_the_file(file: Path) -> None:
    file.write_text('data = "state"\n[api]\nkey = "file:key"\n' + SHOP + 'host = "localhost"\nca = "ca.pem"\n')
    config = load(file, {})
    folder = file.parent
    assert config.data == str(folder / "state")
    assert config.api.key == f"file:{folder / 'key'}"
    assert config.apps["shop"].key == f"file:{folder / 'AuthKey_ABC123DEFG.p8'}"
    assert config.apps["shop"].ca == str(folder / "ca.pem")


def test_a_credential_stays_a_credential(file: Path) -> None:
    file.write_text(SHOP.replace("AuthKey_ABC123DEFG.p8", "credential:shop.p8"))
    assert load(file, {}).apps["shop"].key == "credential:shop.p8"


def test_several_credentials_are_tables_that_take_team_and_environment_from_the_app(file: Path) -> None:
    file.write_text(TABLES.replace("team_id", 'environment = "development"\nteam_id'))
    voip, key = load(file, {}).apps["shop"].each_credentials()
    assert (voip.certificate, voip.passphrase) == (f"file:{file.parent / 'voip.p12'}", "credential:word")
    assert (voip.environment, voip.team_id) == (Environments.BOTH, None)
    assert key.key == f"file:{file.parent / 'AuthKey_ABC123DEFG.p8'}"
    assert (key.environment, key.team_id) == (Environments.DEVELOPMENT, "DEF123GHIJ")


def test_a_certificate_needs_no_topic_and_apple_listens_on_two_ports(file: Path) -> None:
    file.write_text('[apps.shop]\ncertificate = "shop.p12"\nport = 2197\n')
    app = load(file, {}).apps["shop"]
    assert (app.certificate, app.bundle_ids, app.port) == (f"file:{file.parent / 'shop.p12'}", (), 2197)


def test_the_master_key_and_a_proxy_may_be_files_of_their_own(file: Path) -> None:
    file.write_text('[store]\nmaster_key = "file:master"\n' + SHOP + 'proxy = "file:proxy"\n')
    config = load(file, {})
    assert config.store.master_key == f"file:{file.parent / 'master'}"
    assert config.apps["shop"].proxy == f"file:{file.parent / 'proxy'}"
    file.write_text(SHOP + 'proxy = "http://me@proxy.example.com:3128"\n')
    assert load(file, {}).apps["shop"].proxy == "http://me@proxy.example.com:3128"


def test_variables_win_over_the_file(file: Path) -> None:
    file.write_text("[api]\nport = 1000\nhost = '::1'\n")
    config = load(file, {"HELIOGRAPH_API__PORT": "9000", "HELIOGRAPH_DATA": "/srv/push", "PATH": "/bin"})
    assert (config.api.host, config.api.port, config.data) == ("::1", 9000, "/srv/push")


def test_variables_alone_make_an_app_and_lists_have_commas() -> None:
    config = load(
        None,
        {
            "HELIOGRAPH_APPS__SHOP__TOPICS": "com.example.shop, com.example.till",
            "HELIOGRAPH_APPS__SHOP__KEY": "credential:shop",
            "HELIOGRAPH_APPS__SHOP__TEAM_ID": "DEF123GHIJ",
            "HELIOGRAPH_APPS__SHOP__ENVIRONMENT": "both",
        },
    )
    app = config.apps["shop"]
    assert app.topics == ("com.example.shop", "com.example.till")
    assert app.environment is Environments.BOTH
    assert app.environment.each() == (Environment.PRODUCTION, Environment.DEVELOPMENT)


def test_an_empty_variable_is_none() -> None:
    names = ("HELIOGRAPH_DATA", "HELIOGRAPH_API__KEY", "HELIOGRAPH_APPS__SHOP__PORT", "HELIOGRAPH_APPS__SHOP__NAME")
    assert load(None, dict.fromkeys(names, "")) == load(None, {})


def test_variables_of_the_command_line_are_no_settings() -> None:
    environ = dict.fromkeys(reading.NOT_SETTINGS, "x")
    assert load(None, environ) == load(None, {})


def test_what_kubernetes_tells_of_services_is_no_setting() -> None:
    environ = {
        "HELIOGRAPH_SERVICE_HOST": "10.0.0.7",
        "HELIOGRAPH_SERVICE_PORT": "8080",
        "HELIOGRAPH_SERVICE_PORT_HTTP_API": "8080",
        "HELIOGRAPH_PORT": "tcp://10.0.0.7:8080",
        "HELIOGRAPH_PORT_8080_TCP": "tcp://10.0.0.7:8080",
        "HELIOGRAPH_PORT_8080_TCP_PROTO": "tcp",
        "HELIOGRAPH_PORT_8080_TCP_ADDR": "10.0.0.7",
        "HELIOGRAPH_API_SERVICE_HOST": "10.0.0.7",
        "HELIOGRAPH_API_PORT": "tcp://10.0.0.7:8080",
    }
    assert load(None, environ) == load(None, {})
    assert "did you mean HELIOGRAPH_API__PORT?" in complaint(None, HELIOGRAPH_API_PORT="8080")


def test_variables_reach_every_setting(file: Path) -> None:
    text = """
    data = "state"
    [api]
    host = "::1"
    port = 1
    key = "file:api"
    [store]
    receipts_days = 2
    max_waiting = 3
    master_key = "file:master"
    [apps.key]
    topics = ["a", "b"]
    key = "AuthKey.p8"
    key_id = "c"
    team_id = "d"
    passphrase = "file:word"
    environment = "both"
    host = "localhost"
    port = 4
    ca = "ca.pem"
    proxy = "http://proxy:3128"
    [apps.several]
    topic = "a"
    [[apps.several.credentials]]
    certificate = "a.pem"
    certificate_key = "b.pem"
    passphrase = "credential:word"
    environment = "development"
    [[apps.several.credentials]]
    key = "AuthKey.p8"
    key_id = "c"
    team_id = "d"
    [legacy.key]
    host = "::1"
    port = 5
    feedback_port = 6
    environment = "development"
    app = "shop"
    certificate = "chain.pem"
    certificate_key = "credential:key"
    minimum_tls = "1.0"
    max_payload = 256
    max_item_payload = 2048
    refuse_removed = false
    max_connections = 7
    [apple_proxy.key]
    host = "localhost"
    port = 8
    environment = "production"
    tls = true
    certificate = "chain.pem"
    certificate_key = "file:chain.key"
    durable = ["shop", "till"]
    max_connections = 9
    """
    file.write_text(text)
    config = load(file, {})
    variables = {}
    for each in explain(file, {}):
        name = "__".join(each.way).upper().replace("[", "__").replace("]", "")
        value = ", ".join(each.value) if isinstance(each.value, tuple) else str(each.value)
        variables["HELIOGRAPH_" + name] = value
    assert load(None, variables) == config
    known = {
        name.replace("NAME", "KEY", 1) for name in reading._variables_of(Config, "NAME") if "NAME__NAME" not in name
    }
    given = {name.removeprefix("HELIOGRAPH_").replace("SEVERAL", "KEY").replace("__2__", "__1__") for name in variables}
    assert known - given == {"APPS__KEY__CERTIFICATE", "APPS__KEY__CERTIFICATE_KEY"}


def test_tables_of_credentials_are_numbered_in_variables(file: Path) -> None:
    file.write_text(TABLES)
    more = {
        "HELIOGRAPH_APPS__SHOP__CREDENTIALS__1__ENVIRONMENT": "development",
        "HELIOGRAPH_APPS__SHOP__CREDENTIALS__3__CERTIFICATE": "third.p12",
    }
    voip, key, third = load(file, more).apps["shop"].each_credentials()
    assert (voip.certificate, voip.environment) == (f"file:{file.parent / 'voip.p12'}", Environments.DEVELOPMENT)
    assert key.key == f"file:{file.parent / 'AuthKey_ABC123DEFG.p8'}"
    assert third.certificate == f"file:{file.parent / 'third.p12'}"


def test_more_than_nine_tables_keep_their_order() -> None:
    variables = {f"HELIOGRAPH_APPS__SHOP__CREDENTIALS__{n}__CERTIFICATE": f"/{n}.p12" for n in range(1, 13)}
    found = load(None, variables).apps["shop"].credentials
    assert [each.certificate for each in found] == [f"file:/{n}.p12" for n in range(1, 13)]


def test_an_app_whose_name_no_variable_can_spell_is_named_by_one() -> None:
    variables = {
        "HELIOGRAPH_APPS__SHOP_EU__NAME": "Shop.eu-west",
        "HELIOGRAPH_APPS__SHOP_EU__CERTIFICATE": "/shop.p12",
    }
    assert list(load(None, variables).apps) == ["Shop.eu-west"]


def test_underscores_in_a_variable_find_the_app_of_the_file_that_has_hyphens_and_dots(file: Path) -> None:
    file.write_text(SHOP.replace("apps.shop", 'apps."Shop.eu-west"'))
    config = load(file, {"HELIOGRAPH_APPS__SHOP_EU_WEST__PORT": "2197"})
    assert config.apps["Shop.eu-west"].port == 2197
    # Of two that are spelt alike none is taken: it is an app of its own, which lacks a lot.
    file.write_text(SHOP.replace("shop", "a-b") + SHOP.replace("shop", "a_b") + SHOP.replace("shop", "a-c"))
    assert load(file, {"HELIOGRAPH_APPS__A_B__PORT": "2197"}).apps["a_b"].port == 2197
    file.write_text(SHOP.replace("apps.shop", "apps.a-b") + SHOP.replace("apps.shop", 'apps."a.b"'))
    assert "HELIOGRAPH_APPS__A_B has no credentials" in complaint(None, HELIOGRAPH_APPS__A_B__PORT="2197")


@pytest.mark.parametrize(
    "variable, words",
    [
        ("APPS__SHOP__CREDENTIALS__3__KEY=a", "CREDENTIALS__3__KEY: number the tables 1, 2, ... without a gap"),
        ("APPS__SHOP__CREDENTIALS__X__KEY=a", "CREDENTIALS__X__KEY: number the tables 1, 2, ... without a gap"),
        ("APPS__SHOP__CREDENTIALS__0__KEY=a", "CREDENTIALS__0__KEY: number the tables 1, 2, ... without a gap"),
        ("APPS__SHOP__CREDENTIALS__1=a", "CREDENTIALS__1 is a table: spell its settings, as HELIOGRAPH_APPS__SHOP__"),
        (
            "APPS__SHOP__CREDENTIALS=a",
            "CREDENTIALS is a table: spell its settings, as HELIOGRAPH_APPS__SHOP__CREDENTIA",
        ),
        ("APPS__SHOP__CREDENTIALS__1__KEYID=a", "did you mean HELIOGRAPH_APPS__SHOP__CREDENTIALS__1__KEY_ID?"),
        ("APPS__SHOP__TEAMID=a", "did you mean HELIOGRAPH_APPS__SHOP__TEAM_ID?"),
        ("APPS__SHOP__BUNDLE_ID=a", "did you mean HELIOGRAPH_APPS__SHOP__TOPIC?"),
        ("APPS__TOPIC=a", "HELIOGRAPH_APPS__TOPIC is a table: spell its settings, as HELIOGRAPH_APPS__SHOP__TOPIC"),
        ("APPS__SHOP__FOO=a", "known are HELIOGRAPH_APPS__SHOP__KEY, "),
        ("APP__SHOP__KEY=a", "did you mean HELIOGRAPH_APPS__SHOP__KEY?"),
        ("APPS__SHOP__PORT=443", "HELIOGRAPH_APPS__SHOP has no credentials: add key"),
        ("APPS__SHOP__NAME=a b", "HELIOGRAPH_APPS__SHOP is no name for an app"),
        ("APPS__SHOP=a", "HELIOGRAPH_APPS__SHOP is a table: spell its settings"),
        ("APPS=a", "HELIOGRAPH_APPS is a table: spell its settings"),
        ("API=a", "HELIOGRAPH_API is a table: spell its settings, as HELIOGRAPH_API__PORT does"),
        ("API__PORT__X=1", "HELIOGRAPH_API__PORT__X: there is nothing below port, which is a single value"),
        ("API__PORT=x", "HELIOGRAPH_API__PORT does not fit: expected a whole number"),
        ("PORT=9000", "did you mean HELIOGRAPH_API__PORT?"),
        ("API_PORT=9000", "did you mean HELIOGRAPH_API__PORT?"),
        ("LOGLEVEL=info", "did you mean HELIOGRAPH_LOG_LEVEL?"),
        ("WHATEVER=1", "known are HELIOGRAPH_DATA, HELIOGRAPH_API__HOST, "),
        ("WHATEVER=1", "HELIOGRAPH_APPLE_PROXY__NAME__..., HELIOGRAPH_APPS__NAME__..., HELIOGRAPH_LEGACY__NAME__..., "),
        ("LEGACY=1", "HELIOGRAPH_LEGACY is a table: spell its settings, as HELIOGRAPH_LEGACY__MAIN__PORT does"),
        ("LEGACY__MAIN=1", "HELIOGRAPH_LEGACY__MAIN is a table: spell its settings, as HELIOGRAPH_LEGACY__MAIN__PORT"),
        (
            "LEGACY__APP=a",
            "HELIOGRAPH_LEGACY__APP is a table: spell its settings, as HELIOGRAPH_LEGACY__MAIN__APP does",
        ),
        ("LEGACY__MAIN__PROT=1", "did you mean HELIOGRAPH_LEGACY__MAIN__PORT?"),
        (
            "LEGACY__MAIN__TOPIC=a",
            "HELIOGRAPH_LEGACY__MAIN__TOPIC is not a setting: known are HELIOGRAPH_LEGACY__MAIN__",
        ),
        ("LEGACY__MAIN__CERT=a", "did you mean HELIOGRAPH_LEGACY__MAIN__CERTIFICATE?"),
        (
            "LEGACY__MAIN__NAMES=a",
            "HELIOGRAPH_LEGACY__MAIN__NAMES: names stand in the file alone, below [legacy.main.n",
        ),
        ("LEGACY__MAIN__NAMES__X=a", "HELIOGRAPH_LEGACY__MAIN__NAMES__X: names stand in the file alone, below [legacy"),
        ("LEGACY__MAIN__MINIMUM_TLS=1.4", "MINIMUM_TLS does not fit: write one of 1.0, 1.1, 1.2, 1.3"),
        ("LEGACY_MAIN_PORT=1", "did you mean HELIOGRAPH_LEGACY__NAME__PORT?"),
        ("LEGACY__A_B__NAME=a b", "HELIOGRAPH_LEGACY__A_B is no name for a listener: use letters"),
        ("APPLE_PROXY__MAIN__TLS=maybe", "HELIOGRAPH_APPLE_PROXY__MAIN__TLS does not fit: expected true or false"),
        ("PROXY__MAIN__PORT=1", "did you mean HELIOGRAPH_APPLE_PROXY__MAIN__PORT?"),
        ("GATEWAY__MAIN__PORT=1", "did you mean HELIOGRAPH_LEGACY__MAIN__PORT?"),
    ],
)
def test_a_variable_that_does_not_fit_is_told_with_its_name(variable: str, words: str) -> None:
    name, _, value = variable.partition("=")
    said = complaint(None, **{f"HELIOGRAPH_{name}": value})
    assert words in said
    assert f"HELIOGRAPH_{name}" in said or re.search("HELIOGRAPH_(APPS__SHOP|LEGACY__A_B) ", said)


def test_each_setting_tells_where_it_is_from(file: Path) -> None:
    file.write_text(SHOP)
    told = explain(file, {"HELIOGRAPH_APPS__SHOP__PORT": "2197"})
    assert Setting(("data",), str(file.parent / "heliograph-data"), "default") in told
    assert Setting(("apps", "shop", "topic"), "com.example.shop", str(file)) in told
    assert Setting(("apps", "shop", "port"), 2197, "HELIOGRAPH_APPS__SHOP__PORT") in told
    assert "proxy" not in {each.way[-1] for each in told}


@pytest.mark.parametrize(
    "text, words",
    [
        ("prot = 1", ["prot is not a setting", "known here are data, api, store, apps, legacy, apple_proxy"]),
        ("[api]\nprot = 1", ["heliograph.toml: api.prot is not a setting: did you mean port?"]),
        ("[app.shop]", ["app is not a setting: did you mean apps?"]),
        (SHOP + "keyid = 'x'", ["apps.shop.keyid is not a setting: did you mean key_id?"]),
        (SHOP.replace("team_id", "#"), ["apps.shop has a key but no team_id", "Team ID"]),
        (SHOP.replace("key =", "#"), ["apps.shop has no credentials: add key", ".p8", "certificate"]),
        (SHOP.replace("topic =", "#"), ["apps.shop needs either topic", "or topics"]),
        (SHOP + "topics = ['a']", ["apps.shop has both topic and topics: keep one of them"]),
        (SHOP + "certificate = 'a.p12'", ["apps.shop has both a key and a certificate", "[[credentials]] table"]),
        (SHOP + "certificate_key = 'a'", ["apps.shop has certificate_key, which goes with a certificate", "remove it"]),
        (SHOP + "host = 'localhost'\nport = 0", ["apps.shop has port 0", "write the port of host"]),
        (SHOP + "host = 'https://x/'", ["apps.shop has a host that is neither a name nor an address"]),
        (SHOP + "host = ''", ["apps.shop has a host that is neither a name nor an address"]),
        (SHOP.replace("key =", "certificate ="), ["apps.shop has a key_id or a team_id", "remove them"]),
        (SHOP + "[[apps.shop.credentials]]\nkey = 'a'", ["apps.shop has key beside [[credentials]] tables: move it"]),
        (TABLES + "[[apps.shop.credentials]]", ["apps.shop (credentials, table 3) has no credentials: add key"]),
        (TABLES + "keyid = 'x'", ["apps.shop.credentials[2].keyid is not a setting: did you mean key_id?"]),
        (SHOP + "credentials = 'x'", ["apps.shop.credentials must be tables in the file, [[apps.shop.credentials]]"]),
        (SHOP + "proxy = 'proxy:3128'", ["apps.shop has a proxy that is not like http://proxy.example.com:3128"]),
        (SHOP + "proxy = 'https://proxy:3128'", ["apps.shop has a proxy that is not like http://"]),
        (SHOP + "proxy = 'http://proxy'", ["apps.shop has a proxy that is not like http://"]),
        (SHOP + "port = 80", ["apps.shop has port 80, but Apple listens on 443 and 2197", "or add host"]),
        (SHOP + "ca = 'ca.pem'", ["apps.shop has a ca, but no host that it could be for: add host"]),
        ("[store]\nreceipts_days = 0", ["store.receipts_days does not fit: expected a whole number >= 1"]),
        ("[store]\nmax_waiting = 0", ["store.max_waiting does not fit: expected a whole number >= 1"]),
        (SHOP + "environment = 'sandbox'", ["apps.shop.environment", "production, development, both"]),
        (SHOP + "port = 99999", ["apps.shop.port does not fit: expected a whole number <= 65535"]),
        ("[api]\nport = '80'", ["api.port does not fit: expected a whole number, got text in quotes"]),
        ("data = 3", ["data does not fit: expected text in quotes, got a whole number"]),
        ("api = 3", ["api must be a table, [api]"]),
        ("apps = 3", ["apps must hold tables, [apps.NAME]"]),
        ("[apps.'a b']", ["apps.a b is no name for an app", "letters"]),
        ("data =\n", ["is not TOML", "line 1"]),
        (SHOP + "environment = 'sandbox'", ["Apple's sandbox is called development here"]),
        (SHOP + "bundle_id = 'x'", ["apps.shop.bundle_id is not a setting: did you mean topic?"]),
        (SHOP + "key_file = 'x'", ["apps.shop.key_file is not a setting: did you mean key?"]),
        ("[apps]\ntopic = 'x'", ["apps.topic stands below [apps], which needs a name: write [apps.NAME] instead"]),
        ("[apps]\nshop = 'x'", ["apps.shop must be a table, [apps.shop]"]),
        ("topic = 'x'", ["topic is not a setting here: it belongs below an [apps.NAME]"]),
        ("key = 'x'", ["key is not a setting here: it belongs below an [apps.NAME] or [api]"]),
        ("team_id = 'x'", ["team_id is not a setting here: it belongs below an [apps.NAME]"]),
        ("bundle_id = 'x'", ["not a setting here: did you mean topic? It belongs below an [apps.NAME]"]),
        (SHOP + "receipts_days = 3", ["receipts_days is not a setting here: it belongs below [store]"]),
        (
            "[apps.shop]\nkey = 'shop.p12'",
            ["apps.shop has a key whose name is that of a certificate", "write certificate"],
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(file: Path, text: str, words: list[str]) -> None:
    said = complaint(file, text)
    assert all(word in said for word in words), said
    assert str(file) in said


@pytest.mark.parametrize("line", ["topic = com.example.shop", "team_id = 1A2B3C4D5E", "topic = “shop”", "key=a.p8 # b"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_without_quotes_is_told_from_other_mistakes(file: Path, line: str, end: str) -> None:
    said = complaint(file, f"[apps.shop]{end}{line}{end}")
    assert 'texts stand in double quotes, as in topic = "com.example.shop"' in said
    assert "line 2" in said
    assert line.partition("=")[2] not in said


@pytest.mark.parametrize(
    "line", ["data =", "data = 'x", 'data = "x', "data = [a]", "port = 80 80", "topic", "[apps.shop"]
)
def test_other_mistakes_in_toml_are_not_taken_for_missing_quotes(file: Path, line: str) -> None:
    said = complaint(file, line)
    assert "is not TOML" in said
    assert "double quotes" not in said


HOSTS = [
    "",
    " ",
    "a b",
    "push.example.com ",
    "push.example.com\r\nX: y",
    "push.example.com\n",
    "push.example.com:443",
    "[::1]",
    "[::1]:443",
    "::1:x",
    "http://push.example.com",
    "me@push.example.com",
    "push..example.com",
    "-push.example.com",
    "x" * 64,
    "x." * 127,
    "push.exämple.com",
    "push\0",
]


@pytest.mark.parametrize("topic", ["", " ", "com.example shop", "com.example.shop\n", "com.exämple", "a\0b", "a" * 256])
def test_a_topic_is_printable_ascii_without_blanks(topic: str) -> None:
    for given in ({"topic": topic}, {"topics": ("com.example.shop", topic)}):
        with pytest.raises(ValueError, match=r"^has a topic that is not 1 to 255 printable ASCII characters"):
            AppSettings(key="file:a", team_id="b", **given)
    assert AppSettings(key="file:a", team_id="b", topic="a" * 255).bundle_ids == ("a" * 255,)


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_a_name_or_an_address_and_nothing_else(host: str) -> None:
    with pytest.raises(ValueError, match=r"^has a host that is neither a name nor an address: write it alone"):
        AppSettings(topic="a", key="file:a", team_id="b", host=host)


@pytest.mark.parametrize(
    "host",
    ["localhost", "push.example.com", "push.example.com.", "my_apple", "127.0.0.1", "::1", "fe80::1%eth0", "x." * 126],
)
def test_what_names_a_machine_is_a_host(host: str) -> None:
    assert AppSettings(topic="a", key="file:a", team_id="b", host=host).host == host


def test_settings_do_not_show_what_may_be_a_secret() -> None:
    table = CredentialSettings(key="very_secret", team_id="b")
    shop = AppSettings(topic="a", credentials=(table,), proxy="file:very_secret")
    assert "very_secret" not in repr(table) + repr(shop) + repr(Config(apps={"shop": shop}))


def test_what_does_not_fit_in_a_variable_is_told_by_its_name() -> None:
    assert complaint(None, HELIOGRAPH_API__PORT="x").startswith("HELIOGRAPH_API__PORT does not fit")
    assert "did you mean HELIOGRAPH_API__PORT?" in complaint(None, HELIOGRAPH_API__PROT="1")
    assert "did you mean HELIOGRAPH_DATA?" in complaint(None, HELIOGRAPH_DATTA="1")


def test_a_variable_below_a_single_value_is_refused(file: Path) -> None:
    assert "HELIOGRAPH_DATA__X: there is nothing below data" in complaint(file, "data = 'x'", HELIOGRAPH_DATA__X="1")


def test_a_file_that_is_not_there_or_not_text_is_told(file: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(file, {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(file.parent, {})
    with pytest.raises(ConfigError, match="is a device"):
        load(Path("/dev/zero"), {})
    assert load(Path(os.devnull), {}).apps == {}
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file, {})


def test_a_file_that_nests_without_end_is_told(file: Path) -> None:
    assert "too deep in one another" in complaint(file, "x = " + "[" * 100_000)


@pytest.mark.parametrize(
    "text",
    [
        "[api]\nkey = 'hg_very_secret'",
        SHOP.replace("AuthKey_ABC123DEFG.p8", "-----BEGIN PRIVATE KEY-----very_secret"),
        SHOP + "proxy = 'http://me:very_secret@proxy:3128'",
        "[store]\nmaster_key = 'very_secret'",
        '[apps.shop]\ncertificate = "shop.p12"\npassphrase = "very_secret"',
        SHOP.replace('"AuthKey_ABC123DEFG.p8"', '"""very_secret\nvery_secret"""'),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(file: Path, text: str) -> None:
    said = complaint(file, text)
    assert "where the secret is, not what it is" in said or "put the URL into a file" in said
    assert "very_secret" not in said


# -- secrets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"octets")
    return path


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_secret_that_is_kept_is_read(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    assert read_secret(f"file:{secret}", "api.key") == b"octets"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_a_secret_that_others_may_read_is_refused_with_what_to_run(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=f"^api.key: every user .* run chmod 600 {secret}"):
        read_secret(f"file:{secret}", "api.key")


def test_a_credential_is_a_file_in_the_folder_of_credentials(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret.chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secret.parent))
    assert read_secret("credential:secret", "api.key") == b"octets"


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "a/b"])
def test_a_credential_stays_in_its_folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(ConfigError, match="name alone"):
        read_secret(f"credential:{name}", "api.key")


def test_a_credential_without_a_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="LoadCredential="):
        read_secret("credential:shop", "apps.shop.key")


def test_a_secret_that_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_secret(f"file:{tmp_path / 'absent'}", "api.key")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(f"file:{tmp_path}", "api.key")
    with pytest.raises(ConfigError, match=r"^api.key: /dev/zero is a device: name a file$"):
        read_secret("file:/dev/zero", "api.key")
    with pytest.raises(ConfigError, match=r"cannot be read .*null"):
        read_secret("file:\0", "api.key")
    (tmp_path / "long").write_bytes(bytes(70_000))
    (tmp_path / "long").chmod(0o600)
    with pytest.raises(ConfigError, match="longer than"):
        read_secret(f"file:{tmp_path / 'long'}", "api.key")


# -- pipes -----------------------------------------------------------------------------------------------------------


@contextmanager
def process_substitution(content: bytes, *, after: threading.Event | None = None) -> Iterator[Path]:
    """As `<(...)` gives it: the end of a pipe that somebody writes into, under a name."""
    reading, writing = os.pipe()

    def write() -> None:
        if after is not None:
            after.wait()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield Path(f"/dev/fd/{reading}")
    finally:
        writer.join()
        os.close(reading)


def test_a_secret_may_come_through_a_pipe() -> None:
    with process_substitution(b"octets") as path:
        assert read_secret(f"file:{path}", "--key-file") == b"octets"
    with process_substitution(b"data = '/srv/push'") as path:
        assert load(path, {}).data == "/srv/push"


def test_a_secret_may_come_through_a_fifo_that_somebody_opens(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    writer = threading.Thread(target=path.write_bytes, args=(b"x" * 60_000,))
    writer.start()
    try:
        assert read_secret(f"file:{path}", "--key-file") == b"x" * 60_000
    finally:
        writer.join()


def test_a_writer_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WRITER_S", 0.01)
    go = threading.Event()
    slow = threading.Timer(0.1, go.set)
    slow.start()
    with process_substitution(b"octets", after=go) as path:
        assert read_secret(f"file:{path}", "--key-file") == b"octets"
    slow.join()


def test_a_fifo_that_nobody_writes_into_is_waited_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WRITER_S", 0.01)
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match=rf"^api.key: {path} is a pipe, and nobody writes into it within 0 s: start"):
        read_secret(f"file:{path}", "api.key")
    monkeypatch.setattr(files, "_WRITTEN_S", 0.01)
    writer = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(ConfigError, match="who writes into it has not ended within 0 s"):
            read_secret(f"file:{path}", "api.key")
    finally:
        os.close(writer)


def test_a_pipe_through_which_nothing_or_too_much_comes_is_told() -> None:
    with process_substitution(b"") as path, pytest.raises(ConfigError, match="nothing came through the pipe"):
        read_secret(f"file:{path}", "api.key")
    with process_substitution(bytes(100)) as path, pytest.raises(ConfigError, match="longer than 99 octets"):
        read_file(path, "api.key", most=99)


def test_a_fifo_that_others_may_read_is_no_place_for_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"run chmod 600 {path}"):
        read_secret(f"file:{path}", "api.key")


# -- listeners -------------------------------------------------------------------------------------------------------


def test_an_empty_table_is_a_listener_with_what_nobody_said(file: Path) -> None:
    file.write_text("[legacy.main]\n[apple_proxy.main]\n")
    config = load(file, {})
    assert config.legacy == {"main": LegacySettings()}
    assert config.apple_proxy == {"main": AppleProxySettings()}
    main = config.legacy["main"]
    assert (main.host, main.port, main.feedback_port, main.minimum_tls) == ("127.0.0.1", 2195, 2196, TlsVersion.TLS_1_2)
    assert (main.app, main.names, main.certificate) == (None, {}, None)


def test_any_one_variable_makes_a_listener() -> None:
    config = load(None, {"HELIOGRAPH_LEGACY__MAIN__PORT": "2195", "HELIOGRAPH_APPLE_PROXY__LAN__TLS": "false"})
    assert config.legacy == {"main": LegacySettings(port=2195)}
    assert config.apple_proxy == {"lan": AppleProxySettings(tls=False)}


def test_variables_find_the_listener_of_the_file_or_name_one(file: Path) -> None:
    file.write_text("[legacy.sand-box]\nport = 1\n")
    config = load(file, {"HELIOGRAPH_LEGACY__SAND_BOX__APP": "shop", "HELIOGRAPH_APPLE_PROXY__A_B__NAME": "a-b"})
    assert config.legacy == {"sand-box": LegacySettings(port=1, app="shop")}
    assert config.apple_proxy == {"a-b": AppleProxySettings()}


def test_what_a_listener_shows_is_a_path_or_a_credential(file: Path) -> None:
    file.write_text(
        "[legacy.main]\ncertificate = 'chain.pem'\ncertificate_key = 'credential:key'\n"
        "[apple_proxy.main]\ncertificate = 'file:both.pem'\n"
    )
    config = load(file, {})
    assert config.legacy["main"].certificate == f"file:{file.parent / 'chain.pem'}"
    assert config.legacy["main"].certificate_key == "credential:key"
    assert config.apple_proxy["main"].certificate == f"file:{file.parent / 'both.pem'}"


def test_server_names_are_told_apart_in_small_letters_and_shown(file: Path) -> None:
    file.write_text('[legacy.main.names]\n"Gateway.Example.com" = "shop"\nlocalhost = "till"\n')
    assert load(file, {}).legacy["main"].names == {"gateway.example.com": "shop", "localhost": "till"}
    told = {each.way: each for each in explain(file, {}) if each.way[0] == "legacy"}
    way = ("legacy", "main", "names", "gateway.example.com")
    assert told[way] == Setting(way, "shop", str(file))
    assert told["legacy", "main", "port"] == Setting(("legacy", "main", "port"), 2195, "default")


LAN = "[apple_proxy.lan]\n"
MAIN = "[legacy.main]\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("[legacy]", ["legacy needs a name: write [legacy.main] instead of [legacy]"]),
        (
            "[legacy]\nport = 2195",
            ["legacy.port stands below [legacy], which needs a name: write [legacy.main] instead"],
        ),
        ("[legacy]\nprot = 2195", ["legacy.prot must be a table, [legacy.prot]"]),
        ("[apple_proxy]\nport = 1", ["which needs a name: write [apple_proxy.main] instead"]),
        ("[proxy]\nport = 1", ["proxy is not a setting: did you mean [apple_proxy.main]?"]),
        ("[apple.main]", ["apple is not a setting: did you mean [apple_proxy.main]?"]),
        ("[gateway]", ["gateway is not a setting: did you mean [legacy.main]?"]),
        ("proxy = 'http://x:1'", ["proxy is not a setting here: it belongs below an [apps.NAME]"]),
        ("feedback_port = 1", ["feedback_port is not a setting here: it belongs below a [legacy.NAME]"]),
        ("durable = []", ["durable is not a setting here: it belongs below an [apple_proxy.NAME]"]),
        ("['legacy'.'a b']", ["legacy.a b is no name for a listener: use letters"]),
        (MAIN + "prot = 1", ["legacy.main.prot is not a setting: did you mean port?"]),
        (MAIN + "xyz = 1", ["legacy.main.xyz is not a setting: known here are host, port, feedback_port, "]),
        (MAIN + "key = 'x'", ["legacy.main.key is not a setting: did you mean certificate_key?"]),
        (MAIN + "topic = 'x'", ["legacy.main.topic is not a setting here: it belongs below an [apps.NAME]"]),
        (MAIN + "passphrase = 'x'", ["legacy.main.passphrase is not a setting: a listener needs none, as its private"]),
        (MAIN + "sni = 'x'", ["legacy.main.sni is not a setting: did you mean names?"]),
        (MAIN + "environment = 'both'", ["legacy.main.environment", "write one of production, development"]),
        (MAIN + "environment = 'sandbox'", ["Apple's sandbox is called development here"]),
        (MAIN + "minimum_tls = 1.0", ["minimum_tls does not fit: write one of 1.0, 1.1, 1.2, 1.3, in double quotes"]),
        (MAIN + "minimum_tls = 'TLSv1'", ["minimum_tls does not fit: write one of 1.0, 1.1, 1.2, 1.3"]),
        (MAIN + "max_payload = 9999", ["max_payload does not fit: expected a whole number <= 5120"]),
        (MAIN + "host = '*'", ["legacy.main has a host that is neither a name nor an address", "0.0.0.0 for all"]),
        (MAIN + "host = ''", ["legacy.main has a host that is neither a name nor an address"]),
        (MAIN + "feedback_port = 2195", ["legacy.main has port and feedback_port 2195: give the feedback service"]),
        (MAIN + "certificate_key = 'x'", ["legacy.main has certificate_key, but no certificate", "add certificate"]),
        (MAIN + "app = ''", ["legacy.main has '' in app, which is no name of an app"]),
        (MAIN + "names = 'a'", ["legacy.main.names must hold texts, below [legacy.main.names]"]),
        (
            MAIN + "names = {a.example.com = 'x'}",
            ['legacy.main.names has a name without quotes: write "a.example.com"'],
        ),
        (MAIN + "names = {a = 1}", ["legacy.main.names.a does not fit: expected text in quotes"]),
        (MAIN + "names = {a = 'b c'}", ["legacy.main has 'b c' in names, which is no name of an app"]),
        (MAIN + "names = {'10.0.0.7' = 'x'}", ["has the server name '10.0.0.7' in names: write names of the DNS"]),
        (MAIN + "names = {'a b' = 'x'}", ["has the server name 'a b' in names: write names of the DNS"]),
        (MAIN + "names = {a = 'x', A = 'y'}", ["has a server name twice in names"]),
        (LAN + "certificate_key = 'x'", ["apple_proxy.lan has certificate_key, but no certificate"]),
        (LAN + "tls = false\nhost = '0.0.0.0'", ["apple_proxy.lan has tls = false and host 0.0.0.0, so anybody"]),
        (LAN + "tls = false\nhost = 'push.lan'", ["apple_proxy.lan has tls = false and host push.lan, so anybody"]),
        (LAN + "tls = false\ncertificate = 'a'", ["apple_proxy.lan has tls = false and a certificate"]),
        (LAN + "durable = ['a b']", ["apple_proxy.lan has 'a b' in durable, which is no name of an app"]),
        (LAN + "tls = 'no'", ["apple_proxy.lan.tls does not fit: expected true or false, got text in quotes"]),
    ],
)
def test_what_does_not_fit_in_a_listener_is_told_with_its_place(file: Path, text: str, words: list[str]) -> None:
    said = complaint(file, text)
    assert all(word in said for word in words), said
    assert str(file) in said


@pytest.mark.parametrize(
    "text, words",
    [
        (
            MAIN + "[legacy.old]\nfeedback_port = 1",
            "legacy.old.port is 2195 on 127.0.0.1, which legacy.main.port is too",
        ),
        (MAIN + "[legacy.old]\nport = 1", "legacy.old.feedback_port is 2196 on 127.0.0.1, which legacy.main.feedback_"),
        (
            MAIN + "port = 8080",
            "legacy.main.port is 8080 on 127.0.0.1, which api.port is too: give one of them another",
        ),
        (MAIN + "port = 8080\nhost = '0.0.0.0'", "legacy.main.port is 8080 on 0.0.0.0, which api.port is too"),
        (MAIN + "port = 8080\nhost = 'localhost'", "legacy.main.port is 8080 on localhost, which api.port is too"),
        (
            MAIN + "feedback_port = 2197\n" + LAN,
            "apple_proxy.lan.port is 2197 on 127.0.0.1, which legacy.main.feedback",
        ),
        (MAIN + "host = 'push.lan'\n" + LAN + "port = 2195\nhost = 'PUSH.lan'", "apple_proxy.lan.port is 2195 on PUSH"),
        (MAIN + "host = '::'\n" + LAN + "port = 2195\nhost = '::1'", "apple_proxy.lan.port is 2195 on ::1, which"),
    ],
)
def test_what_listens_on_a_port_keeps_others_from_it(file: Path, text: str, words: str) -> None:
    said = complaint(file, text)
    assert words in said
    assert str(file) in said


def test_a_port_from_a_variable_that_is_taken_is_told_by_its_name(file: Path) -> None:
    said = complaint(file, MAIN, HELIOGRAPH_LEGACY__MAIN__PORT="8080")
    assert said.startswith("HELIOGRAPH_LEGACY__MAIN__PORT is 8080 on 127.0.0.1, which api.port is too")


@pytest.mark.parametrize(
    "text",
    [
        MAIN + "port = 0\nfeedback_port = 0\n" + LAN + "port = 0\n[api]\nport = 0",
        MAIN + "[legacy.old]\nhost = '127.0.0.2'",
        MAIN + "[legacy.old]\nhost = '::1'",
        MAIN + "host = '0.0.0.0'\n[legacy.old]\nhost = '::'",
        MAIN + "[legacy.old]\nhost = 'push.lan'",
        LAN + "tls = false\nhost = '127.0.0.2'",
        LAN + "tls = false\nhost = 'localhost'",
        LAN + "tls = false\nhost = '::1'",
        MAIN + "app = 'unheard.of'\n" + LAN + "durable = ['unheard-of']",
    ],
)
def test_what_can_listen_side_by_side_may(file: Path, text: str) -> None:
    file.write_text(text)
    assert load(file, {}).legacy.keys() | load(file, {}).apple_proxy.keys()


def test_the_tree_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().data = "x"  # type: ignore[misc]


def test_more_credentials_than_an_app_can_need_are_refused() -> None:
    with pytest.raises(ValueError, match="has 17 credentials, and 16 are enough"):
        AppSettings(topic="com.example.shop", credentials=(CredentialSettings(certificate="a.p12"),) * 17)
