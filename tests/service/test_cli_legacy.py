"""`heliograph legacy certificate`, `callers` and `removals`: the real program, against a real server.

The files that it makes are opened by the programs that old scripts are written in.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    pkcs12,
)

from heliograph.config.settings import TlsVersion
from heliograph.model import Environment
from heliograph.net.identity import server_identity
from heliograph.net.tls import legacy_context
from heliograph.protocols.certificate import load
from heliograph.simulator.server import Simulator
from tests.certificates import Issued, authority, key_pem, push_certificate, rsa_key
from tests.programs import need
from tests.service.house import token
from tests.service.test_cli import run
from tests.service.test_keys import TOPICS, Asking, app_for, asking
from tests.service.test_removals import remove

LONG_AGO = datetime(2018, 3, 2, tzinfo=UTC)
PASSPHRASE = "Ünter 4 eyes"
PAIR = ec.derive_private_key(41, ec.SECP256R1())
PATIENCE_S = 60


class Home(NamedTuple):
    """Where somebody types commands."""

    server: Asking
    folder: Path

    async def type(self, *arguments: str, code: int = 0) -> str:
        """What the command says, if it ends with this exit code: results, or else the error."""
        where = {"HELIOGRAPH_URL": self.server.running.url, "HELIOGRAPH_KEY": self.server.running.key}
        done = await asyncio.to_thread(run, self.folder, *arguments, **where)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code:
            assert done.stdout == ""
            assert done.stderr.startswith("Error: ")
        return done.stderr if code else done.stdout

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.type(*arguments, "--json"))

    async def callers(self) -> list[dict[str, Any]]:
        return list((await self.server.ask("GET", "/v1/callers"))[1]["callers"])

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.touch(0o600)
        path.write_bytes(content)
        return path

    def passphrase(self, passphrase: str = PASSPHRASE) -> str:
        return str(self.write("passphrase", passphrase.encode() + b"\n"))


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    """With the apps `shop` (both environments), `shop2` (production) and `both` (two topics)."""
    async with Simulator() as apple, asking(tmp_path) as server:
        shop, shop2 = (app_for(apple, topic) for topic in TOPICS.values())
        both = {name: value for name, value in shop.items() if name != "topic"}
        for name, content in (
            ("shop", {**shop, "environment": "both"}),
            ("shop2", {**shop2, "environment": "production"}),
            ("both", {**both, "topics": ["com.example.one", "com.example.two"]}),
        ):
            status, answer = await server.ask("PUT", f"/v1/apps/{name}", content)
            assert status == 201, answer
        yield Home(server, tmp_path)


def old(topic: str = TOPICS["shop"]) -> Issued:
    """As a script has it: from Apple, and ended."""
    return push_certificate(topic, uid=topic, environments=[Environment.PRODUCTION], now=LONG_AGO)


# -- a certificate is made -------------------------------------------------------------------------------------------


async def test_the_files_hold_a_certificate_like_apple_s_and_the_server_knows_it(home: Home) -> None:
    said = await home.type("legacy", "certificate", "shop")
    pem, p12 = (home.folder / name for name in ("shop.pem", "shop.p12"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (pem, p12)] == [0o600, 0o600]
    loaded = load(pem.read_bytes())
    assert loaded.topics == ("com.example.shop",)
    assert set(loaded.environments) == set(Environment)
    assert load(p12.read_bytes()) == loaded
    (caller,) = await home.callers()
    assert caller["id"] == loaded.fingerprint
    assert (caller["app"], caller["topic"], caller["environment"]) == ("shop", "com.example.shop", None)
    first, *steps = said.splitlines()
    assert first.startswith(f"{caller['id'][:16]} sends for shop (com.example.shop, production and development)")
    assert [step.split()[0] for step in steps[:3]] == ["host", "port", "file"]
    assert "gateway.push.apple.com" in steps[0]
    assert "2195" in steps[1]
    assert "shop.pem or shop.p12" in steps[2]
    assert "Which of the two environments the port says" in steps[3]
    said = await home.type("legacy", "certificate", "shop", "--environment", "production", "--force")
    assert len(said.splitlines()) == 4


async def test_it_is_rsa_and_says_what_old_clients_look_for(home: Home) -> None:
    await home.type("legacy", "certificate", "shop", "--environment", "development", "--days", "30")
    certificate = x509.load_pem_x509_certificate((home.folder / "shop.pem").read_bytes())
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048
    assert isinstance(certificate.signature_hash_algorithm, SHA256)
    assert certificate.subject.rfc4514_string() == "CN=Apple Push Services: com.example.shop,UID=com.example.shop"
    oids = {each.oid.dotted_string.removeprefix("1.2.840.113635.100.6.3.") for each in certificate.extensions}
    assert {"1", "2", "6"} <= oids  # of both environments, whichever it sends to: some clients insist on one
    assert (certificate.not_valid_after_utc - datetime.now(UTC)).days in (29, 30)
    (caller,) = await home.callers()
    assert caller["environment"] == "development"


async def test_the_private_key_never_leaves_the_machine(home: Home) -> None:
    await home.type("legacy", "certificate", "shop")
    key = load_pem_private_key((home.folder / "shop.pem").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    prime = key.private_numbers().p.to_bytes(128, "big")
    kept = b"".join(path.read_bytes() for path in (home.folder / "data").iterdir())
    assert prime[:32] not in kept
    assert b"PRIVATE KEY" not in kept.replace(b"BEGIN PRIVATE KEY", b"", kept.count(b"doors"))


async def test_both_files_are_under_the_passphrase_and_open_with_it_only(home: Home) -> None:
    answer = await home.json("legacy", "certificate", "shop", "--passphrase-file", home.passphrase(), "--output", "a/b")
    assert (answer["pem"], answer["p12"]) == ("a/b.pem", "a/b.p12")
    for name in ("a/b.pem", "a/b.p12"):
        content = (home.folder / name).read_bytes()
        assert load(content, passphrase=PASSPHRASE.encode()).fingerprint == answer["caller"]["id"]
        with pytest.raises(Exception, match="passphrase"):
            load(content)
        with pytest.raises(Exception, match="passphrase"):
            load(content, passphrase=b"wrong")


async def test_a_file_that_is_there_is_kept_unless_it_is_forced(home: Home) -> None:
    home.write("shop.p12", b"somebody's")
    said = await home.type("legacy", "certificate", "shop", code=2)
    assert "There is a file shop.p12 already: name another --output, or write over it with --force" in said
    assert (home.folder / "shop.p12").read_bytes() == b"somebody's"
    assert not (home.folder / "shop.pem").exists()
    assert await home.callers() == []
    (home.folder / "shop.p12").chmod(0o644)
    await home.type("legacy", "certificate", "shop", "--force")
    (caller,) = await home.callers()
    assert load((home.folder / "shop.p12").read_bytes()).fingerprint == caller["id"]
    assert stat.S_IMODE((home.folder / "shop.p12").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["nope"], 1, "There is no app 'nope'. Known apps: both, shop, shop2"),
        (["both"], 2, "several topics: name one with --topic, com.example.one or com.example.two"),
        (["both", "--topic", "com.example.three"], 1, "The topic is not the app's: send com.example.one"),
        (["shop2", "--environment", "development"], 2, "is set up for production only: leave it out"),
        (["shop", "--output", "passphrase/x"], 2, "cannot be"),
        (["shop", "--passphrase-file", "empty"], 2, "write the passphrase into the file"),
        (["shop", "--days", "0"], 2, "0 is not in the range"),
    ],
)
async def test_what_cannot_be_made_is_told_and_leaves_nothing(
    home: Home, arguments: list[str], code: int, words: str
) -> None:
    home.passphrase()
    home.write("empty", b"\n")
    before = sorted(home.folder.iterdir())
    where = {"HELIOGRAPH_URL": home.server.running.url, "HELIOGRAPH_KEY": home.server.running.key}
    done = await asyncio.to_thread(run, home.folder, "legacy", "certificate", *arguments, **where)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(home.folder.iterdir()) == before
    assert await home.callers() == []


async def test_one_of_several_topics_and_a_voip_topic_are_as_apple_lists_them(home: Home) -> None:
    await home.type("legacy", "certificate", "both", "--topic", "com.example.two")
    assert load((home.folder / "both.pem").read_bytes()).topics == ("com.example.two",)
    await home.type("legacy", "certificate", "shop", "--topic", "com.example.shop.voip")
    assert load((home.folder / "shop.pem").read_bytes()).topics == ("com.example.shop.voip",)
    assert {each["topic"] for each in await home.callers()} == {"com.example.two", "com.example.shop.voip"}


async def test_a_very_long_topic_fits(home: Home, tmp_path: Path) -> None:
    topic = "com.example." + "x" * 200
    async with Simulator() as apple:
        assert (await home.server.ask("PUT", "/v1/apps/long", app_for(apple, topic)))[0] == 201
    await home.type("legacy", "certificate", "long")
    assert load((tmp_path / "long.pem").read_bytes()).topics == (topic,)


# -- who opens the files ---------------------------------------------------------------------------------------------


def call(*command: str, folder: Path, text: str = "") -> str:
    done = subprocess.run(
        command, cwd=folder, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def with_openssl(folder: Path, passphrase: str) -> None:
    openssl = need("openssl")
    shown = call(openssl, "x509", "-in", "s.pem", "-noout", "-subject", "-purpose", folder=folder)
    assert "UID = com.example.shop, CN = Apple Push Services: com.example.shop" in shown
    assert "SSL client : Yes" in shown
    source = f"pass:{passphrase}"
    assert "key ok" in call(openssl, "rsa", "-in", "s.pem", "-passin", source, "-check", "-noout", folder=folder)
    opened = call(openssl, "pkcs12", "-in", "s.p12", "-passin", source, "-nodes", "-info", folder=folder)
    assert "MAC: sha1, Iteration 2048" in opened
    assert "pbeWithSHA1And3-KeyTripleDES-CBC" in opened
    assert "PRIVATE KEY-----" in opened


def with_python(folder: Path, passphrase: str) -> None:
    ssl.create_default_context().load_cert_chain(folder / "s.pem", password=passphrase)
    key, certificate, _ = pkcs12.load_key_and_certificates((folder / "s.p12").read_bytes(), passphrase.encode() or None)
    assert key is not None
    assert certificate is not None
    assert certificate.public_key() == key.public_key()


_NODE = """
const [tls, fs, passphrase] = [require('tls'), require('fs'), process.argv[1]];
const pem = fs.readFileSync('s.pem');
tls.createSecureContext({cert: pem, key: pem, passphrase});
tls.createSecureContext({pfx: fs.readFileSync('s.p12'), passphrase});
if (passphrase === '') tls.createSecureContext({pfx: fs.readFileSync('s.p12')});
"""


def with_node(folder: Path, passphrase: str) -> None:
    call(need("node"), "-e", _NODE, "--", passphrase, folder=folder)


_PHP = """
$p = $argv[1];
if (!openssl_pkcs12_read(file_get_contents('s.p12'), $found, $p)) { echo openssl_error_string(); exit(1); }
if (!openssl_x509_check_private_key($found['cert'], $found['pkey'])) exit(2);
$pem = file_get_contents('s.pem');
if (!openssl_x509_check_private_key($pem, [$pem, $p])) exit(3);
"""


def with_php(folder: Path, passphrase: str) -> None:
    call(need("php"), "-r", _PHP, "--", passphrase, folder=folder)


_JAVA = """
import java.io.FileInputStream;
import java.security.KeyStore;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.X509KeyManager;

public class Open {
    public static void main(String[] given) throws Exception {
        char[] passphrase = given.length > 0 ? given[0].toCharArray() : new char[0];
        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(new FileInputStream("s.p12"), passphrase);
        KeyManagerFactory factory = KeyManagerFactory.getInstance("SunX509");
        factory.init(store, passphrase);
        X509KeyManager keys = (X509KeyManager) factory.getKeyManagers()[0];
        System.out.println(keys.getPrivateKey(keys.getClientAliases("RSA", null)[0]).getAlgorithm());
    }
}
"""


def with_java(folder: Path, passphrase: str) -> None:
    java = need("java")
    (folder / "Open.java").write_text(_JAVA)
    given = [passphrase] if passphrase else []
    assert call(java, "-XX:TieredStopAtLevel=1", "Open.java", *given, folder=folder).strip() == "RSA"
    keytool = Path(java).with_name("keytool")
    listed = call(
        *(str(keytool), "-list", "-keystore", "s.p12", "-storetype", "PKCS12", "-storepass", passphrase), folder=folder
    )
    assert "PrivateKeyEntry" in listed


@pytest.mark.parametrize("opens", [with_openssl, with_python, with_node, with_php, with_java])
async def test_programs_open_both_files_with_a_passphrase_and_without(
    home: Home, opens: Callable[[Path, str], None]
) -> None:
    for passphrase in ("", "secret 42"):
        given = ["--passphrase-file", home.passphrase(passphrase)] if passphrase else []
        await home.type("legacy", "certificate", "shop", "--output", "s", "--force", *given)
        await asyncio.to_thread(opens, home.folder, passphrase)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_listener_that_knows_the_certificate_shakes_hands_with_it(home: Home, version: ssl.TLSVersion) -> None:
    await home.type("legacy", "certificate", "shop")
    identity = server_identity(home.folder / "doors", None, None)
    anchor = x509.load_pem_x509_certificate((home.folder / "shop.pem").read_bytes()).public_bytes(Encoding.PEM)
    context = legacy_context(*identity, anchors=[anchor], minimum=TlsVersion.TLS_1_2, required=True)
    client = ssl.create_default_context(cafile=home.folder / "doors" / "doors-ca.pem")
    client.load_cert_chain(home.folder / "shop.pem")
    client.maximum_version = version
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(back, there, server_hostname="gateway.push.apple.com")
    ours = context.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = ours.getpeercert(binary_form=True)
    assert shown is not None
    assert x509.load_der_x509_certificate(shown).public_bytes(Encoding.PEM) == anchor


# -- callers ---------------------------------------------------------------------------------------------------------


async def test_an_ended_certificate_is_registered_and_its_end_is_no_matter(home: Home) -> None:
    issued = old()
    home.write("old.pem", issued.key_pem + issued.certificate_pem + authority().certificate_pem)
    said = await home.type("callers", "add", "shop", "old.pem")
    assert "Apple Push Services: com.example.shop may come to shop." in said
    assert re.search(r"topic +com\.example\.shop\n", said)
    assert re.search(r"sends to +production\n", said)
    assert "ended 2019-03-02: it opens heliograph all the same" in said
    (caller,) = await home.callers()
    assert caller["id"] == issued.loaded().fingerprint
    listed = await home.type("callers", "list")
    assert listed.startswith(caller["id"][:16])
    assert "ended 2019-03-02" in listed
    assert (await home.json("callers", "list"))["callers"] == [caller]


async def test_every_form_of_a_certificate_is_read(home: Home) -> None:
    issued = push_certificate(TOPICS["shop"], uid=TOPICS["shop"], key=rsa_key(), now=LONG_AGO)
    locked = key_pem(issued.key, PrivateFormat.TraditionalOpenSSL, PASSPHRASE.encode())
    for name, content, more in (
        ("aps.cer", issued.certificate_der, []),
        ("aps.crt", issued.certificate_pem, []),
        ("locked.pem", issued.certificate_pem + locked, []),  # nobody has to open the key
        ("bare.p12", issued.p12(), []),
        ("aps.p12", issued.p12(PASSPHRASE.encode()), ["--passphrase-file", home.passphrase()]),
    ):
        home.write(name, content)
        await home.type("callers", "add", "shop", name, "--name", name, *more)
        (caller,) = await home.callers()
        assert (caller["id"], caller["name"]) == (issued.loaded().fingerprint, name)


async def test_a_signing_key_is_registered_by_its_public_half(home: Home) -> None:
    home.write("AuthKey_ABC123DEFG.p8", key_pem(PAIR))
    said = await home.type("callers", "add", "shop", "AuthKey_ABC123DEFG.p8", "--team-id", "DEF123GHIJ")
    assert "ABC123DEFG may come to shop." in said
    (caller,) = await home.callers()
    assert (caller["id"], caller["kind"]) == ("DEF123GHIJ.ABC123DEFG", "signing key")
    public = PAIR.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    home.write("public.pem", public)
    ids = ["--key-id", "HIJ456KLMN", "--team-id", "DEF123GHIJ"]
    await home.type("callers", "add", "shop", "public.pem", *ids, "--name", "robot")
    home.write("locked.p8", key_pem(PAIR, passphrase=PASSPHRASE.encode()))
    ids[1] = "LOCKED1234"
    await home.type("callers", "add", "shop", "locked.p8", *ids, "--passphrase-file", home.passphrase())
    assert {each["id"] for each in await home.callers()} == {
        "DEF123GHIJ.ABC123DEFG",
        "DEF123GHIJ.HIJ456KLMN",
        "DEF123GHIJ.LOCKED1234",
    }
    keys = {each.public_key for each in await home.server.running.relay._store.find_callers()}
    assert keys == {public}


def files() -> dict[str, bytes]:
    issued = old()
    return {
        "key.pem": key_pem(rsa_key()),
        "ec.pem": key_pem(PAIR),
        "AuthKey_ABC123DEFG.p8": key_pem(PAIR),
        "aps.p12": issued.p12(PASSPHRASE.encode()),
        "aps.pem": issued.pem,
        "two.pem": issued.certificate_pem + old().certificate_pem,
        "cut.pem": issued.certificate_pem[:200],
        "empty.pem": b"",
        "letter.txt": b"Dear all,\n",
        "other.pem": old("com.other").certificate_pem,
        "wrong": b"not it\n",
    }


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["shop", "key.pem"], 2, "key.pem: there is the private key of a certificate in the file, and no certificate"),
        (["shop", "ec.pem"], 2, "ec.pem: it is a signing key: write with --key-id what"),
        (["shop", "AuthKey_ABC123DEFG.p8"], 2, "write with --team-id what the client has been told"),
        (["shop", "ec.pem", "--key-id", "x", "--team-id", "DEF123GHIJ"], 2, "10 capital letters and digits"),
        (["shop", "aps.p12"], 2, "under a passphrase: give the one that was chosen when it was exported, in a file"),
        (["shop", "aps.p12", "--passphrase-file", "wrong"], 2, "The passphrase does not open the .p12"),
        (["shop", "two.pem"], 2, "There are 2 certificates of clients in the file: give them one by one"),
        (["shop", "cut.pem"], 2, "has no end"),
        (["shop", "empty.pem"], 2, "There is no certificate in the file"),
        (["shop", "letter.txt"], 2, "There is no certificate in the file"),
        (["shop", "none.pem"], 2, "does not exist"),
        (["shop", "aps.pem", "--team-id", "DEF123GHIJ"], 2, "--key-id and --team-id go with a signing key"),
        (["nope", "aps.pem"], 1, "There is no app 'nope'. Known apps: both, shop, shop2"),
        (["shop2", "aps.pem"], 1, "is for com.example.shop, which is no topic of the app 'shop2'"),
        (["shop", "other.pem"], 1, "is for com.other, which is no topic of the app 'shop'"),
        (["shop2", "aps.pem", "--environment", "development"], 1, "not set up for development"),
    ],
)
async def test_what_cannot_be_registered_is_told(home: Home, arguments: list[str], code: int, words: str) -> None:
    for name, content in files().items():
        home.write(name, content)
    where = {"HELIOGRAPH_URL": home.server.running.url, "HELIOGRAPH_KEY": home.server.running.key}
    done = await asyncio.to_thread(run, home.folder, "callers", "add", *arguments, **where)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert await home.callers() == []


async def test_a_certificate_opens_one_app_only(home: Home) -> None:
    home.write("aps.pem", old().pem)
    await home.type("callers", "add", "shop", "aps.pem")
    said = await home.type("callers", "add", "shop2", "aps.pem", "--topic", TOPICS["shop2"], code=1)
    assert "This certificate is known already, and opens the app 'shop': remove it there first" in said
    await home.type("callers", "remove", (await home.callers())[0]["id"][:16])
    await home.type("callers", "add", "shop2", "aps.pem", "--topic", TOPICS["shop2"])
    assert [each["app"] for each in await home.callers()] == ["shop2"]


async def test_the_beginning_of_an_id_is_enough_where_it_fits_one(home: Home) -> None:
    home.write("key.p8", key_pem(PAIR))
    for key_id in ("ABC123DEFG", "ABC123DEFX"):
        await home.type("callers", "add", "shop", "key.p8", "--key-id", key_id, "--team-id", "DEF123GHIJ")
    said = await home.type("callers", "remove", "DEF123GHIJ.ABC", code=2)
    assert "2 callers have an ID that begins with DEF123GHIJ.ABC: write more of it" in said
    assert "The ID is empty" in await home.type("callers", "remove", "", code=2)
    listed = (await home.type("callers", "list")).splitlines()
    assert [line.split()[0] for line in listed] == ["DEF123GHIJ.ABC123DEFG", "DEF123GHIJ.ABC123DEFX"]
    assert len(await home.callers()) == 2
    assert "is removed" in await home.type("callers", "remove", "DEF123GHIJ.ABC123DEFX")
    assert await home.json("callers", "remove", "DEF") == {"removed": "DEF123GHIJ.ABC123DEFG"}
    said = await home.type("callers", "remove", "DEF", code=1)
    assert "There is no caller with this id here" in said
    assert await home.type("callers", "list") == "There are none.\n"


# -- removals --------------------------------------------------------------------------------------------------------


async def test_removals_are_listed_from_where_the_last_reading_ended(home: Home) -> None:
    assert await home.type("removals", "shop") == ""
    await remove(home.server, 1, 2)
    await remove(home.server, 3, environment=Environment.DEVELOPMENT)
    lines = (await home.type("removals", "shop")).splitlines()
    assert [line.split()[3] for line in lines] == [token(1), token(2), token(3)]
    second = lines[1].split()[0]
    rest = (await home.type("removals", "shop", "--after", second, "--json")).splitlines()
    assert [json.loads(line)["token"] for line in rest] == [token(3)]
    assert len((await home.type("removals", "shop", "--environment", "production")).splitlines()) == 2
    assert len((await home.type("removals", "shop", "--limit", "1")).splitlines()) == 1
    assert "Say which app: there are both, shop, shop2" in await home.type("removals", code=2)
    said = await home.type("removals", "shop", "--after", "9" * 19, code=2)
    assert "after must be what the former answer gave in next" in said


async def test_many_removals_come_in_several_pages_and_each_once(home: Home) -> None:
    await remove(home.server, *range(1, 2051))
    lines = (await home.type("removals", "shop")).splitlines()
    assert len({line.split()[3] for line in lines}) == len(lines) == 2050
