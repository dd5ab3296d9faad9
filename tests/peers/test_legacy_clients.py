"""Foreign clients of the binary protocol, at the gateway and the feedback service, with a simulator as Apple."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
from cryptography.x509 import load_pem_x509_certificate

from heliograph.config import ApiSettings, AppSettings, Config, LegacySettings, TlsVersion
from heliograph.model import Filter, Headers, Receipt, State
from heliograph.net.identity import AUTHORITY
from heliograph.relay import Relay
from heliograph.service import serving
from heliograph.simulator.apple import Verdict, Visit
from heliograph.simulator.faults import Answer, Delay
from heliograph.simulator.legacy import Legacy
from heliograph.simulator.server import Simulator
from heliograph.simulator.threaded import ThreadedSimulator
from tests.certificates import Issued, key_pem, push_certificate, rsa_key
from tests.peers.foreign import HERE, build, build_go, run
from tests.programs import need

LEGACY = HERE / "legacy"
APP, TOPIC = "shop", "com.example.shop"
PASSPHRASE = "correct horse"
BAD, LATE, DEAD = "ba" * 32, "1a" * 32, "dead" * 16
COUNT, BAD_AT = 40, 17
SINCE = 1_700_000_000
PATIENCE_S = 30.0
"""After this a test gives up."""


class Wanted(NamedTuple):
    """A notification as the client has it, or as Apple gets it."""

    token: str
    alert: str
    expiration: int | None
    priority: int


class Client(NamedTuple):
    """One that runs: what its program makes of its one argument, see `tests/peers/legacy/contract.py`."""

    command: Sequence[str | Path]
    more: dict[str, str]


class Ports(NamedTuple):
    gateway: int
    feedback: int


class Kind(NamedTuple):
    """A sort of client."""

    name: str
    programs: tuple[str, ...]
    """What it needs on this machine."""
    start: Callable[[Path, str], Client]
    """From the folder with `ca.pem`, and what it is to do."""
    says: str
    """What its frames have besides token and payload: `nothing`, `expiration`, `all`."""
    goes_on: bool = True
    """After an error, with what was behind the one at fault."""
    keeps_key_open: bool = False
    """It knows no passphrase of a .pem file."""
    shows_expired: bool = True
    """It gives a certificate that has ended."""
    insists: bool = False
    """It takes no .p12 without a passphrase."""
    minimum_tls: TlsVersion = TlsVersion.TLS_1_2


def php(folder: Path, task: str) -> Client:
    # PHP verifies since 5.6, and this is the setting for those that never heard of it.
    return Client([need("php"), "-d", f"openssl.cafile={folder / 'ca.pem'}", LEGACY / "php" / f"{task}.php"], {})


def node(folder: Path, task: str) -> Client:
    return Client([need("node"), LEGACY / "node" / "stream.cjs", task], {})


def apn(folder: Path, task: str) -> Client:
    install = ["install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    built = build("legacy/node", [[need("npm"), *install]])
    return Client([need("node"), built / "with_apn.cjs", task], {})


def python(module: str, folder: Path, task: str) -> Client:
    get = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", "lib", "--upgrade"]
    built = build("legacy/python", [[sys.executable, *get, "-r", "requirements.txt"]])
    # In an interpreter of its own with libraries of its own: which ours are is not its business.
    more = {"PYTHONPATH": f"{HERE.parent.parent}:{built / 'lib'}"}
    return Client([sys.executable, "-m", f"tests.peers.legacy.python.{module}", task], more)


def pyapns(folder: Path, task: str) -> Client:
    if sys.version_info >= (3, 12):
        pytest.skip("PyAPNs calls ssl.wrap_socket, which Python 3.12 has not any more")
    return python("with_pyapns", folder, task)


def notnoop(folder: Path, task: str) -> Client:
    copy = ["dependency:copy-dependencies", "-DoutputDirectory=lib"]
    compiling = [need("javac"), "-cp", "lib/*", "Client.java"]
    built = build("legacy/java", [[need("mvn"), "--quiet", "--batch-mode", *copy], compiling])
    authority = load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    trusted = [pkcs12.PKCS12Certificate(authority, b"doors")]
    (folder / "trust.p12").write_bytes(
        pkcs12.serialize_java_truststore(trusted, BestAvailableEncryption(PASSPHRASE.encode()))
    )
    trust = [f"-Djavax.net.ssl.trustStore={folder / 'trust.p12'}", f"-Djavax.net.ssl.trustStorePassword={PASSPHRASE}"]
    return Client([need("java"), *trust, "-cp", f"{built}:{built / 'lib' / '*'}", "Client", task], {})


def go(folder: Path, task: str) -> Client:
    return Client([build_go("legacy/go", "."), task], {})


def s_client(folder: Path, task: str) -> Client:
    return Client(["bash", LEGACY / "s_client.sh", task], {})


KINDS = {
    each.name: each
    for each in (
        Kind("php", ("php",), php, "nothing"),
        Kind("node", ("node",), node, "all"),
        Kind("apn", ("node", "npm"), apn, "all", shows_expired=False),
        Kind("pyopenssl", (), partial(python, "with_pyopenssl"), "expiration"),
        Kind("twisted", (), partial(python, "with_twisted"), "expiration"),
        Kind("pyapns", (), pyapns, "nothing", goes_on=False, keeps_key_open=True),
        Kind("clerk", (), partial(python, "with_clerk"), "all", minimum_tls=TlsVersion.TLS_1_0),
        Kind("notnoop", ("java", "javac", "mvn"), notnoop, "expiration", insists=True),
        Kind("go", ("go",), go, "all", keeps_key_open=True),
        Kind("s_client", ("openssl",), s_client, "expiration", goes_on=False),
    )
}

each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.name, marks=pytest.mark.peer(*kind.programs)) for kind in KINDS.values()]
)


class Attentive(Simulator):
    """It keeps what Apple was asked for besides the payload."""

    def __init__(self) -> None:
        super().__init__(keep=20_000)
        self.taken: list[Wanted] = []

    def judge(self, visit: Visit, fields: Sequence[tuple[bytes, bytes]], *others: Any, **more: Any) -> Verdict:
        verdict = super().judge(visit, fields, *others, **more)
        if verdict.status == 200:
            named = dict(fields)
            expiration = named.get(b"apns-expiration")
            self.taken.append(
                Wanted(
                    named[b":path"].decode().rpartition("/")[2],
                    json.loads(others[0])["aps"]["alert"],
                    None if expiration is None else int(expiration),
                    int(named.get(b"apns-priority", b"10")),
                )
            )
        return verdict


class Doors:
    """The gateway and the feedback service of one listener, and what is behind them."""

    def __init__(self, kind: Kind, folder: Path, apple: Attentive, relay: Relay, ports: Ports) -> None:
        self.kind = kind
        self.folder = folder
        self.apple = apple
        self.relay = relay
        self._ports = ports

    async def client(self, task: str, pushes: Sequence[Wanted] = ()) -> list[dict[str, Any]]:
        """See `tell`."""
        return await tell(self.kind, self.folder, self._ports, task, pushes)

    async def find_out_that_it_is_gone(self, token: str) -> None:
        admitted = await self.relay.admit(APP, None, [Headers(TOPIC)], [token], [b'{"aps":{"alert":"Still there?"}}'])
        await self.relay.enqueue(admitted.batches)
        receipt = await self.relay.receipt(f"{admitted.batches[0].id}0001", PATIENCE_S)
        assert receipt is not None
        assert receipt.reason == "Unregistered"

    async def receipts(self, tokens: Sequence[str], connections_before: frozenset[str] = frozenset()) -> list[Receipt]:
        """All there are, once each of these tokens has come by another connection, and all have come to an end."""
        wanted = Counter[str | None](tokens)
        until = time.monotonic() + PATIENCE_S
        while True:
            found = (await self.relay.notifications(Filter(apps=frozenset([APP])), None, 1000)).receipts
            came = Counter[str | None](each.token for each in found if each.connection not in connections_before)
            if came >= wanted and all(each.state not in (State.QUEUED, State.SENT) for each in found):
                return list(found)
            assert time.monotonic() < until, f"{(wanted - came).total()} of {wanted.total()} did not come"
            await asyncio.sleep(0.02)


async def tell(
    kind: Kind, folder: Path, ports: Ports, task: str, pushes: Sequence[Wanted] = ()
) -> list[dict[str, Any]]:
    """What the client tells. `task`: `careless`, `careful` or `feedback`."""
    file = folder / "pushes"
    file.write_text("".join(f"{number} {_line(push)}\n" for number, push in enumerate(pushes, 1)))
    command, more = kind.start(folder, task)
    told = {
        "LEGACY_PORT": str(ports.gateway),
        "LEGACY_FEEDBACK_PORT": str(ports.feedback),
        "LEGACY_PEM": str(folder / "own.pem"),
        "LEGACY_P12": str(folder / "own.p12"),
        "LEGACY_PASSPHRASE": (folder / "passphrase").read_text(),
        "LEGACY_CA": str(folder / "ca.pem"),
        "LEGACY_PUSHES": str(file),
    }
    output = await run(*command, more={**told, **more})
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _line(push: Wanted) -> str:
    payload = json.dumps({"aps": {"alert": push.alert}}, separators=(",", ":"), ensure_ascii=False)
    return f"{push.expiration or 0} {push.priority} {push.token} {payload}"


def write_certificate(issued: Issued, folder: Path, passphrase: str) -> None:
    """Put a certificate where the client looks. In the .pem the key comes first, which some programs write so."""
    (folder / "own.pem").write_bytes(key_pem(issued.key, passphrase=passphrase.encode()) + issued.certificate_pem)
    (folder / "own.p12").write_bytes(issued.p12(passphrase.encode()))


@asynccontextmanager
async def open_doors(
    kind: Kind, folder: Path, passphrase: str = PASSPHRASE, issued: Issued | None = None
) -> AsyncIterator[Doors]:
    """`issued`: what the client shows, by which it is to be known; None: what heliograph gives it."""
    if kind.keeps_key_open:
        passphrase = ""
    async with Attentive() as apple:
        apple.add_app(TOPIC)
        signing_key = folder / f"AuthKey_{apple.signing_key.key_id}.p8"
        signing_key.touch(0o600)
        signing_key.write_bytes(apple.signing_key.pem)
        (folder / "apple.pem").write_bytes(apple.ca_pem)
        app = AppSettings(
            key=f"file:{signing_key}",
            team_id=apple.signing_key.team_id,
            topic=TOPIC,
            host="localhost",
            port=apple.port,
            ca=str(folder / "apple.pem"),
        )
        config = Config(
            data=str(folder / "data"),
            api=ApiSettings(port=0),
            legacy={"main": LegacySettings(port=0, feedback_port=0, minimum_tls=kind.minimum_tls)},
            apps={APP: app},
        )
        async with serving(config) as running:
            if issued is None:
                command = ["legacy", "certificate", APP, "--output", str(folder / "own")]
            else:
                write_certificate(issued, folder, passphrase)
                command = ["callers", "add", APP, str(folder / "own.p12")]
            (folder / "passphrase").touch(0o600)
            (folder / "passphrase").write_text(passphrase)
            if passphrase:
                command += ["--passphrase-file", str(folder / "passphrase")]
            server = {"HELIOGRAPH_URL": running.url, "HELIOGRAPH_KEY": running.key}
            await run(sys.executable, "-m", "heliograph", *command, more=server)
            (folder / "ca.pem").write_bytes((folder / "data" / AUTHORITY).read_bytes())
            ports = Ports(*(running.ports["legacy", "main", name] for name in ("port", "feedback_port")))
            yield Doors(kind, folder, apple, running.relay, ports)


def pushes_to(tokens: Sequence[str], text: str) -> list[Wanted]:
    soon = int(time.time()) + 3600
    return [
        Wanted(token, f"{text} {number} für alle", soon + number, 5 if number % 2 else 10)
        for number, token in enumerate(tokens)
    ]


def as_apple_gets(kind: Kind, push: Wanted, identifier: int) -> Wanted:
    if kind.says == "nothing":
        return push._replace(expiration=None, priority=10)
    if kind.says == "expiration" or (kind.name == "go" and identifier % 2):
        return push._replace(priority=10)
    return push


TOKENS = [f"{number:064x}" for number in range(1, COUNT + 1)]


@pytest.mark.timeout(180)  # a first build
@each_kind
async def test_what_a_client_writes_before_it_is_gone_arrives_once(kind: Kind, tmp_path: Path) -> None:
    async with open_doors(kind, tmp_path, passphrase=PASSPHRASE if kind.insists else "") as doors:
        pushes = pushes_to(TOKENS, "Tea")
        assert await doors.client("careless", pushes) == []
        receipts = await doors.receipts(TOKENS)
        assert Counter(each.state for each in receipts) == {State.ACCEPTED: COUNT}
        expected = [as_apple_gets(kind, push, number) for number, push in enumerate(pushes, 1)]
        assert sorted(doors.apple.taken) == sorted(expected)


@pytest.mark.timeout(180)
@each_kind
async def test_a_client_hears_which_token_was_bad_and_the_rest_arrives_once(kind: Kind, tmp_path: Path) -> None:
    async with open_doors(kind, tmp_path) as doors:
        doors.apple.rejects(BAD, "BadDeviceToken")
        doors.apple.misbehaves(Delay(0.5, then=Answer(400, "BadDeviceToken")), token=LATE)
        doors.apple.unregister(DEAD, since=int(time.time() - 600) * 1000)
        await doors.find_out_that_it_is_gone(DEAD)
        # Apple alone knows at first; then the token is held back here, and the answer is there at once, as for a token
        # that is gone; and at last Apple takes so long that what is behind is there before.
        for text, bad in (("first", BAD), ("again", BAD), ("gone", DEAD), ("late", LATE)):
            before = frozenset(each.connection or "" for each in await doors.receipts([]))
            ahead, behind = TOKENS[:BAD_AT], TOKENS[BAD_AT:]
            pushes = pushes_to([*ahead, bad, *behind], text)
            assert await doors.client("careful", pushes) == [{"status": 8, "token": bad}]
            receipts = await doors.receipts(ahead, before)
            if kind.goes_on:
                (first,) = {each.connection or "" for each in receipts if each.token == ahead[0]} - before
                await doors.receipts(behind, before | {first})
            taken = Counter(each.token for each in doors.apple.taken if each.alert.startswith(text))
            assert max(taken.values()) == 1
            assert set(ahead) <= taken.keys() <= {*ahead, *behind}
            assert not kind.goes_on or taken.keys() == {*ahead, *behind}


@pytest.mark.timeout(180)
@each_kind
async def test_a_client_reads_once_which_tokens_are_gone(kind: Kind, tmp_path: Path) -> None:
    async with open_doors(kind, tmp_path) as doors:
        gone = {token: int(time.time()) - 600 + place for place, token in enumerate([DEAD, *TOKENS[3:9]])}
        for token, since in gone.items():
            doors.apple.unregister(token, since * 1000)
        tokens = [*TOKENS, DEAD]
        assert await doors.client("careless", pushes_to(tokens, "Tea")) == []
        receipts = await doors.receipts(tokens)
        assert {each.token for each in receipts if each.reason == "Unregistered"} == gone.keys()
        told = await doors.client("feedback")
        assert {each["token"]: each["at"] for each in told} == gone
        assert len(told) == len(gone)
        assert await doors.client("feedback") == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=pytest.mark.peer(*kind.programs))
        for kind in KINDS.values()
        if kind.shows_expired
    ],
)
async def test_a_client_still_gets_in_with_apples_certificate_that_ended_long_ago(kind: Kind, tmp_path: Path) -> None:
    issued = push_certificate(uid=TOPIC, key=rsa_key(), now=datetime(2014, 6, 1, tzinfo=UTC))
    async with open_doors(kind, tmp_path, issued=issued) as doors:
        assert await doors.client("careless", pushes_to(TOKENS[:3], "Tea")) == []
        receipts = await doors.receipts(TOKENS[:3])
        assert Counter(each.state for each in receipts) == {State.ACCEPTED: 3}


@pytest.mark.timeout(180)
@each_kind
async def test_a_client_finds_in_the_simulator_what_it_found_at_apple(kind: Kind, tmp_path: Path) -> None:
    passphrase = "" if kind.keeps_key_open else PASSPHRASE
    write_certificate(push_certificate(uid=TOPIC, key=rsa_key()), tmp_path, passphrase)
    (tmp_path / "passphrase").write_text(passphrase)
    with ThreadedSimulator(legacy=Legacy(topic=TOPIC)) as apple:
        ports = Ports(apple.legacy_port, apple.feedback_port)
        (tmp_path / "ca.pem").write_bytes(apple.ca_pem)
        apple.rejects(BAD, "BadDeviceToken")
        apple.unregister(DEAD, since=SINCE * 1000)
        pushes = pushes_to([DEAD, *TOKENS[:5], BAD, *TOKENS[5:]], "Tea")
        assert await tell(kind, tmp_path, ports, "careful", pushes) == [{"status": 8, "token": BAD}]
        expected = TOKENS if kind.goes_on else TOKENS[:5]
        received = await apple.wait_for_async(len(expected), PATIENCE_S)
        assert sorted(each.token for each in received) == expected
        assert await tell(kind, tmp_path, ports, "feedback") == [{"token": DEAD, "at": SINCE}]
        assert await tell(kind, tmp_path, ports, "feedback") == []


@pytest.mark.timeout(180)
@pytest.mark.peer("php")
async def test_of_a_hundred_connections_that_php_closes_at_once_no_message_is_lost(tmp_path: Path) -> None:
    async with open_doors(KINDS["php"], tmp_path) as doors:
        tokens = [f"{number:064x}" for number in range(300)]
        assert await doors.client("careless", pushes_to(tokens, "Tea")) == []
        receipts = await doors.receipts(tokens)
        assert Counter(each.state for each in receipts) == {State.ACCEPTED: 300}
        assert len({each.connection for each in receipts}) == 100
        assert sorted(each.token for each in doors.apple.taken) == tokens
