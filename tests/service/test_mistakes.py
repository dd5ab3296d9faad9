"""Mistakes that people make on their first day, made as they make them: the real command line, real requests to a real
server, the simulator in Apple's place. Each ends in one sentence that says what to change, and in nothing half-done.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from urllib.error import HTTPError

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.certificates import push_certificate
from tests.service.test_cli import ALIVE, Started, private, run, start, unused_port, url_of

KEY = "AuthKey_HELIOGRAPH.p8"


@dataclass(frozen=True)
class Apple:
    """`heliograph simulate`, running."""

    folder: Path
    port: int
    control: str

    def ask(self, method: str, path: str, content: object = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(urllib.request.Request(self.control + path, body, method=method)) as answer:
            return json.load(answer)

    @property
    def shown(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/shown")["shown"]
        return found

    def configure(self, folder: Path, **changed: object) -> None:
        """Write a good heliograph.toml but for what is changed; None leaves a setting out."""
        good = {"topic": "com.example.shop", "key": str(self.folder / KEY), "team_id": "SIMULATION"}
        way = {"host": "localhost", "port": self.port, "ca": str(self.folder / "ca.pem")}
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**good, **way, **changed}.items() if value]
        (folder / "heliograph.toml").write_text("\n".join(["[api]", "port = 0", "[apps.shop]", *lines, ""]))


@contextmanager
def simulating(folder: Path, *options: str) -> Iterator[Apple]:
    with start(folder, "simulate", "--port", "0", "--json", "--folder", "apple", *options) as started:
        first = json.loads(started.wait_for("\n").splitlines()[0])
        yield Apple(folder / "apple", first["port"], first["control"])


@pytest.fixture
def apple(tmp_path: Path) -> Iterator[Apple]:
    with simulating(tmp_path) as found:
        yield found


def sentence(done: CompletedProcess[str]) -> str:
    """What a command says that did not work out: one line, and nothing on stdout."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def receipt(folder: Path, server: dict[str, str]) -> tuple[int, str]:
    """The exit code of `status` for the only notification there is, and its first two lines."""
    (line,) = run(folder, "list", "--json", **server).stdout.splitlines()
    done = run(folder, "status", json.loads(line)["id"], **server)
    return done.returncode, " ".join(done.stdout.splitlines()[:2])


# -- what only Apple can judge ---------------------------------------------------------------------------------------


def test_wrong_key_id_is_named_by_send_receipt_log_health_and_doctor(tmp_path: Path, apple: Apple) -> None:
    shutil.copy(apple.folder / KEY, tmp_path / "AuthKey_ABC123DEFG.p8")
    apple.configure(tmp_path, key="AuthKey_ABC123DEFG.p8")
    advice = "check key, key id and team id"
    with start(tmp_path, "serve") as serve:
        server = url_of(serve)
        done = run(tmp_path, "send", "--title", "x", "--wait", "1", ALIVE, **server)
        # It is kept: the operator is at fault, not the notification.
        assert done.returncode == 4
        assert re.fullmatch(
            rf"queued  InvalidProviderToken  \S+  It is waiting to be sent\. .*{advice}.*\n", done.stdout
        )
        code, said = receipt(tmp_path, server)
        assert (code, advice in said) == (4, True)
        (alarm,) = [line for line in serve.said().splitlines() if "error" in line]
        assert "credentials_refused" in alarm
        assert advice in alarm
        assert "ABC123DEFG" in alarm
        assert health(server)["status"] == "failing"
        doctor = run(tmp_path, "doctor", "--send")
        assert doctor.returncode == 1
        (problem,) = [line for line in doctor.stdout.splitlines() if line.startswith("problem")]
        assert "signing key ABC123DEFG is 403 InvalidProviderToken" in problem
        assert advice in problem
        assert serve.stop(signal.SIGTERM) == 0
    assert apple.shown == []


def health(server: dict[str, str]) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{server['HELIOGRAPH_URL']}/healthz") as answer:
            found: dict[str, Any] = json.load(answer)
    except HTTPError as error:
        found = json.load(error)
    return found


def test_doctor_says_what_the_running_server_cannot_send(tmp_path: Path, apple: Apple) -> None:
    shutil.copy(apple.folder / KEY, tmp_path / "AuthKey_ABC123DEFG.p8")
    port = str(unused_port())
    apple.configure(tmp_path, key="AuthKey_ABC123DEFG.p8")
    with start(tmp_path, "serve", HELIOGRAPH_API__PORT=port) as serve:
        url_of(serve)
        assert run(tmp_path, "doctor", HELIOGRAPH_API__PORT=port).returncode == 0
        assert run(tmp_path, "send", "--title", "x", "--wait", "1", ALIVE, HELIOGRAPH_API__PORT=port).returncode == 4
        doctor = run(tmp_path, "doctor", HELIOGRAPH_API__PORT=port)
        assert doctor.returncode == 1
        (problem,) = [line for line in doctor.stdout.splitlines() if line.startswith("problem")]
        assert problem.startswith("problem   app shop, production: ")
        assert "check key, key id and team id" in problem
        doctor = run(tmp_path, "doctor", HELIOGRAPH_API__PORT=port, HELIOGRAPH_KEY="hg_wrong")
        assert doctor.returncode == 1
        assert "problem   server: it is failing, and tells those with an API key for it why" in doctor.stdout


def test_topic_with_the_suffix_of_a_push_type_is_warned_of_by_log_and_doctor(tmp_path: Path, apple: Apple) -> None:
    apple.configure(tmp_path, topic="com.example.shop.voip")
    with start(tmp_path, "serve") as serve:
        url_of(serve)
        (warned,) = [line for line in serve.said().splitlines() if "warning" in line]
        assert "topic_with_suffix" in warned
        assert "write the bundle id" in warned
    doctor = run(tmp_path, "doctor")
    assert doctor.returncode == 0
    (warned,) = [line for line in doctor.stdout.splitlines() if line.startswith("warning")]
    assert warned == (
        "warning   app shop: com.example.shop.voip looks like a topic with the suffix of a push type: write the bundle "
        "id, the suffix is added"
    )


@pytest.mark.parametrize("how", ["strict", "registered"])
def test_sandbox_token_sent_to_production_is_told_by_the_environment(tmp_path: Path, how: str) -> None:
    with simulating(tmp_path, *(["--strict"] if how == "strict" else [])) as apple:
        if how == "registered":
            apple.ask("PUT", f"/devices/{ALIVE}", {"environment": "development"})
        apple.configure(tmp_path)
        with start(tmp_path, "serve") as serve:
            server = url_of(serve)
            done = run(tmp_path, "send", "--title", "x", ALIVE, **server)
            assert done.returncode == 1
            assert done.stdout.startswith("rejected  BadDeviceToken  ")
            assert "belongs to the other environment: check whether the app was built for development" in done.stdout
            code, said = receipt(tmp_path, server)
            assert (code, "the other environment" in said) == (1, True)
            # From now on it is held back here, and the sentence is the same advice.
            again = run(tmp_path, "send", "--title", "x", ALIVE, **server)
            assert again.returncode == 1
            assert "development or production, and send it to that environment" in sentence(again)
        assert apple.shown == []


@pytest.mark.parametrize("off_s, reason", [(-7200, "ExpiredProviderToken"), (7200, "InvalidProviderToken")])
def test_wrong_clock_is_told_by_send_log_and_doctor(tmp_path: Path, apple: Apple, off_s: int, reason: str) -> None:
    apple.configure(tmp_path)
    wrong = {"PYTHONPATH": str(shifted_clock(tmp_path, off_s))}
    with start(tmp_path, "serve", **wrong) as serve:
        server = url_of(serve)
        done = run(tmp_path, "send", "--title", "x", "--wait", "1", ALIVE, **server)
        assert done.returncode == 4
        assert done.stdout.startswith(f"queued  {reason}  ")
        assert "this machine's clock" in done.stdout
        assert "this machine's clock" in serve.said()
        doctor = run(tmp_path, "doctor", "--send", **wrong)
        assert doctor.returncode == 1
        (problem,) = [line for line in doctor.stdout.splitlines() if reason in line]
        assert "this machine's clock" in problem
        assert serve.stop(signal.SIGTERM) == 0
    assert apple.shown == []


def test_what_a_slow_clock_kept_waiting_is_sent_once_it_is_right(tmp_path: Path, apple: Apple) -> None:
    apple.configure(tmp_path)
    with start(tmp_path, "serve", PYTHONPATH=str(shifted_clock(tmp_path, -7200))) as serve:
        server = url_of(serve)
        assert run(tmp_path, "send", "--title", "x", "--wait", "1", ALIVE, **server).returncode == 4
        assert serve.stop(signal.SIGTERM) == 0
    assert apple.shown == []
    with start(tmp_path, "serve") as serve:
        serve.wait_for("first_accepted")
    assert len(apple.shown) == 1


def shifted_clock(folder: Path, off_s: int) -> Path:
    """A folder that, in PYTHONPATH, has a program's clock be wrong by so much."""
    own = folder / "clock"
    own.mkdir()
    (own / "sitecustomize.py").write_text(f"import time\nright = time.time\ntime.time = lambda: right() + {off_s}\n")
    return own


# -- what the server refuses before it takes anything ----------------------------------------------------------------


@dataclass(frozen=True)
class Shop:
    """A server with an app of two topics, and where commands find its key."""

    apple: Apple
    folder: Path
    server: dict[str, str]
    serve: Started

    def request(self, content: object = None) -> urllib.request.Request:
        """A POST of this, or a GET, of notifications."""
        key = (self.folder / "data" / "api-key").read_text().strip()
        return urllib.request.Request(
            f"{self.server['HELIOGRAPH_URL']}/v1/notifications",
            None if content is None else json.dumps(content).encode(),
            {"authorization": f"Bearer {key}"},
        )

    def post(self, content: object) -> tuple[int, dict[str, Any]]:
        with pytest.raises(HTTPError) as raised:
            urllib.request.urlopen(self.request(content))
        assert raised.value.headers["content-type"] == "application/problem+json"
        return raised.value.code, json.load(raised.value)

    def took_nothing(self) -> bool:
        with urllib.request.urlopen(self.request()) as answer:
            return json.load(answer)["notifications"] == [] and self.apple.shown == []


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with simulating(folder) as apple:
        apple.configure(folder, topic=None, topics=["com.example.shop", "com.example.till"])
        with start(folder, "serve") as serve:
            yield Shop(apple, folder, url_of(serve), serve)
            assert "Traceback" not in serve.said()


SHOP = ["--topic", "com.example.shop"]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        pytest.param(
            ["--title", "x", ALIVE],
            1,
            "refused  MissingTopic: The app has several topics: name one of com.example.shop, com.example.till.",
            id="missing topic",
        ),
        pytest.param(
            [*SHOP, "--body", "x" * 5000, ALIVE],
            1,
            "refused  PayloadTooLarge: The payload has 5029 octets and Apple takes 4096 with push type alert: shorten "
            "it by 933.",
            id="payload too large",
        ),
        pytest.param(
            [*SHOP, "--title", "x", "DEVICE_TOKEN"],
            1,
            "refused  BadDeviceToken: The device token must be hex digits only",
            id="no device token at all",
        ),
        pytest.param(
            ["--topic", "com.example.shop.voip", "--title", "x", ALIVE],
            1,
            "refused  TopicDisallowed: The topic 'com.example.shop.voip' is not the app's. With push type alert send "
            "com.example.shop or com.example.till.",
            id="suffix of another push type",
        ),
        pytest.param(
            [*SHOP, "--push-type", "voip", "--title", "x", ALIVE],
            1,
            "With push type voip send com.example.shop.voip or com.example.till.voip.",
            id="push type without its suffix",
        ),
        pytest.param(
            [*SHOP, "--title", "x", "--url", "127.0.0.1:8080", ALIVE],
            2,
            "The server's URL must be like http://127.0.0.1:8080: correct --url",
            id="URL without http",
        ),
    ],
)
def test_mistake_in_a_call_of_send_is_one_sentence(shop: Shop, arguments: list[str], code: int, words: str) -> None:
    done = run(shop.folder, "send", *arguments, **shop.server)
    assert done.returncode == code
    assert words in sentence(done)
    assert shop.took_nothing()


@pytest.mark.parametrize(
    "content, code, field, words",
    [
        pytest.param(
            {"token": ALIVE, "title": "x"},
            "MissingTopic",
            "topic",
            "name one of com.example.shop, com.example.till.",
            id="missing topic",
        ),
        pytest.param(
            {"token": ALIVE, "topic": "com.example.shop", "payload": {"aps": {"alert": "x" * 5000}}},
            "PayloadTooLarge",
            "payload",
            "The payload has 5022 octets and Apple takes 4096 with push type alert: shorten it by 926.",
            id="payload too large",
        ),
        pytest.param(
            {"token": ALIVE, "topic": "com.example.shop", "titel": "x"},
            "UnknownField",
            "titel",
            "There is no field 'titel' here. Did you mean title?",
            id="unknown field",
        ),
        pytest.param(
            {"deviceToken": ALIVE, "topic": "com.example.shop", "title": "x"},
            "UnknownField",
            "deviceToken",
            "Did you mean token?",
            id="field of another API",
        ),
        pytest.param(
            {"token": "<a1b2c3d4 a1b2c3d4>", "topic": "com.example.shop", "title": "x"},
            "BadDeviceToken",
            "token",
            "The device token holds blanks or angle brackets, as printed by Xcode: remove them.",
            id="token with blanks",
        ),
        pytest.param(
            {"tokens": [ALIVE, "a1b2c3d4 a1b2c3d4"], "topic": "com.example.shop", "title": "x"},
            "BadDeviceToken",
            "token",
            "blanks or angle brackets",
            id="one of many with blanks",
        ),
        pytest.param(
            {"token": b64encode(bytes(32)).decode(), "topic": "com.example.shop", "title": "x"},
            "BadDeviceToken",
            "token",
            "if it is base64, convert it",
            id="token in base64",
        ),
    ],
)
def test_mistake_in_a_request_is_one_sentence_with_its_field(
    shop: Shop, content: dict[str, Any], code: str, field: str, words: str
) -> None:
    status, problem = shop.post(content)
    assert (status, problem["code"]) == (400, code)
    assert words in problem["detail"]
    (error,) = problem["errors"]
    assert (error["code"], error["field"], error["detail"]) == (code, field, problem["detail"])
    assert shop.took_nothing()


def test_device_token_with_blanks_is_cleaned_by_the_command_line_which_says_so(tmp_path: Path, apple: Apple) -> None:
    apple.configure(tmp_path)
    with start(tmp_path, "serve") as serve:
        blocks = " ".join(re.findall(".{8}", ALIVE))
        done = run(tmp_path, "send", "--title", "x", f"<{blocks}>", **url_of(serve))
    assert done.returncode == 0
    assert done.stderr.startswith("Blanks and <> were left out of a device token.")
    assert [each["token"] for each in apple.shown] == [ALIVE]


def test_api_key_that_is_missing_or_wrong_is_told_with_where_to_find_it(shop: Shop) -> None:
    elsewhere = {**shop.server, "HELIOGRAPH_DATA": str(shop.folder / "elsewhere")}
    done = run(shop.folder, "send", *SHOP, "--title", "x", ALIVE, **elsewhere)
    assert done.returncode == 2
    assert "There is no API key at" in sentence(done)
    assert "$HELIOGRAPH_DATA, or the key with --key-file or $HELIOGRAPH_KEY" in sentence(done)
    done = run(shop.folder, "send", *SHOP, "--title", "x", ALIVE, **shop.server, HELIOGRAPH_KEY="hg_...")
    assert done.returncode == 2
    assert sentence(done).startswith("Error: The API key is not one of this server, or was removed: name the file of ")
    assert "with --key-file, or set $HELIOGRAPH_KEY" in sentence(done)
    assert "Bearer" not in done.stderr
    done = run(shop.folder, "send", *SHOP, "--title", "x", "--json", ALIVE, **shop.server, HELIOGRAPH_KEY="hg_...")
    assert done.returncode == 2
    assert "--key-file" in json.loads(done.stdout)["error"]["detail"]
    with pytest.raises(HTTPError) as raised:
        urllib.request.urlopen(f"{shop.server['HELIOGRAPH_URL']}/v1/notifications", b"{}")
    assert raised.value.code == 401
    assert "send a key as `Authorization: Bearer hg_...`" in json.load(raised.value)["detail"]
    assert shop.took_nothing()


def test_url_with_https_for_a_server_without_tls_is_told(shop: Shop) -> None:
    url = shop.server["HELIOGRAPH_URL"].replace("http:", "https:")
    done = run(shop.folder, "send", *SHOP, "--title", "x", "--url", url, ALIVE)
    assert done.returncode == 3
    assert sentence(done) == (f"Error: What answers at {url} speaks no TLS: write http:// in --url or $HELIOGRAPH_URL")
    assert shop.took_nothing()


def test_url_of_the_simulator_in_place_of_the_server_is_told(shop: Shop) -> None:
    url = shop.apple.control
    done = run(shop.folder, "send", *SHOP, "--title", "x", "--url", url, ALIVE)
    assert done.returncode == 3
    assert sentence(done) == (
        f"Error: What answers at {url} is not heliograph's API: name another --url or $HELIOGRAPH_URL"
    )
    assert shop.took_nothing()


def test_app_with_a_wrong_passphrase_is_refused_and_not_added(shop: Shop) -> None:
    file = private(shop.folder / "till.p12", push_certificate("com.example.till").p12(b"tea"))
    word = private(shop.folder / "word", b"coffee\n")
    done = run(
        shop.folder, "app", "add", "till", "--certificate", str(file), "--passphrase-file", str(word), **shop.server
    )
    assert done.returncode == 1
    assert "The passphrase does not open the .p12: give the one chosen when it was exported" in sentence(done)
    listed = run(shop.folder, "app", "list", **shop.server).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["shop"]


# -- what keeps a server from starting -------------------------------------------------------------------------------


def refused_to_start(folder: Path, **more: str) -> str:
    """What `serve` says, which has made nothing."""
    done = run(folder, "serve", **more)
    assert done.returncode == 2
    assert not (folder / "data").exists()
    return sentence(done)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"enviroment": "production"}, "apps.shop.enviroment is not a setting: did you mean environment?"),
        ({"environment": "sandbox"}, "apps.shop.environment does not fit: write one of production, development, both"),
        ({"host": "https://api.push.apple.com"}, "a host that is neither a name nor an address: write it alone"),
        ({"proxy": "proxy.example.com:3128"}, "a proxy that is not like http://proxy.example.com:3128: correct it"),
        ({"team_id": None}, "a key but no team_id: write the 10 characters that the developer account shows"),
        ({"key": "AuthKey_ABC123DEFG.p8"}, "there is no file"),
        ({"key": "-----BEGIN PRIVATE KEY-----"}, "must say where the secret is, not what it is: write a path"),
    ],
    ids=["misspelt", "not a value", "URL for a host", "proxy without http", "no team", "no key file", "key itself"],
)
def test_wrong_setting_is_named_with_what_to_write(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    Apple(tmp_path, 443, "").configure(tmp_path, **{"ca": None, "host": None, **changed})
    assert words in refused_to_start(tmp_path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("shop.p12", "shop.p12 is a certificate with its private key: name it in certificate instead"),
        ("shop.pem", "shop.pem is a certificate with its private key: name it in certificate instead"),
        ("aps.cer", "aps.cer is a certificate, and has no private key: in Keychain Access select the certificate and"),
    ],
)
@pytest.mark.parametrize("key_id", [None, "ABC123DEFG"])
def test_certificate_for_a_key_is_told_by_what_the_file_holds(
    tmp_path: Path, name: str, words: str, key_id: str | None
) -> None:
    made = push_certificate("com.example.shop")
    content = {".p12": made.p12(b"tea"), ".pem": made.pem, ".cer": made.certificate_der}[Path(name).suffix]
    private(tmp_path / name, content)
    Apple(tmp_path, 443, "").configure(tmp_path, ca=None, host=None, key=name, key_id=key_id)
    assert words in refused_to_start(tmp_path)


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused_to_start(tmp_path, HELIOGRAPH_API__PORT=str(port))
        assert said == f"Error: The port of the API, 127.0.0.1:{port}, is taken: stop what uses it, or set api.port"
        done = run(tmp_path, "simulate", "--port", str(port))
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port} (Address already in use): name another port" in sentence(done)


def test_key_file_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path: Path, apple: Apple) -> None:
    key = apple.folder / KEY
    key.chmod(0o644)
    apple.configure(tmp_path)
    advice = f"every user of this machine can read {key}: run chmod 600 {key}"
    assert advice in refused_to_start(tmp_path)
    doctor = run(tmp_path, "doctor", "--offline")
    assert doctor.returncode == 1
    assert advice in doctor.stdout
    key.chmod(0o600)
    with start(tmp_path, "serve") as serve:
        url_of(serve)


@pytest.mark.parametrize(
    "passphrase, words",
    [
        (None, 'is under a passphrase: give the one that was chosen when it was exported, as passphrase = "file:PATH"'),
        (b"coffee\n", "does not open the {what}: give the one chosen when it was exported, or export it again"),
    ],
    ids=["missing", "wrong"],
)
@pytest.mark.parametrize("kind", ["p12", "p8"])
def test_passphrase_that_does_not_open_a_file_is_told(
    tmp_path: Path, apple: Apple, kind: str, passphrase: bytes | None, words: str
) -> None:
    given = {} if passphrase is None else {"passphrase": f"file:{private(tmp_path / 'word', passphrase)}"}
    if kind == "p12":
        private(tmp_path / "shop.p12", push_certificate("com.example.shop").p12(b"tea"))
        apple.configure(tmp_path, certificate="shop.p12", key=None, team_id=None, **given)
    else:
        key = load_pem_private_key((apple.folder / KEY).read_bytes(), None)
        locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"tea"))
        private(tmp_path / "AuthKey_ABC123DEFG.p8", locked)
        apple.configure(tmp_path, key="AuthKey_ABC123DEFG.p8", **given)
    assert words.format(what=".p12" if kind == "p12" else "private key") in refused_to_start(tmp_path)


def test_certificate_without_its_key_is_told_how_to_export_both(tmp_path: Path) -> None:
    private(tmp_path / "aps.cer", push_certificate("com.example.shop").certificate_der)
    (tmp_path / "heliograph.toml").write_text(f'[api]\nport = {unused_port()}\n[apps.shop]\ncertificate = "aps.cer"\n')
    said = refused_to_start(tmp_path)
    assert "There is a certificate in the file but no private key: in Keychain Access" in said
    assert "export both as .p12" in said
