"""a2: the Rust library for APNs (hyper, rustls).

It knows Apple's two addresses and the public CAs only, with no way in. So its client file gets two changes when it is
built here: the address and the CA come from the environment. Nothing on the path of a request changes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.building import BENCH, BUILD, Failed, build, copy_sources, need, say
from bench.rounds import Contestant

VERSION = "0.10.0"
PRODUCT = "target/release/a2-bench"
CHANGES = {
    'Endpoint::Production => "api.push.apple.com",': "Endpoint::Production => bench_authority(),",
    "fn default_connector() -> HyperConnector {": "fn default_connector() -> HyperConnector {\n"
    "    return HttpsConnectorBuilder::new().with_tls_config(bench_tls()).https_only().enable_http2().build();\n"
    "    #[allow(unreachable_code)]",
}
ADDITION = """
fn bench_authority() -> &'static str {
    static AUTHORITY: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    AUTHORITY.get_or_init(|| format!("127.0.0.1:{}", std::env::var("BENCH_PORT").expect("BENCH_PORT is set")))
}

fn bench_tls() -> rustls::ClientConfig {
    let file = format!("{}/ca.pem", std::env::var("BENCH_DATA").expect("BENCH_DATA is set"));
    let pem = std::fs::read(file).expect("the CA is readable");
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pemfile::certs(&mut pem.as_slice()) {
        roots.add(certificate.expect("the CA is PEM")).expect("the CA is a certificate");
    }
    rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
}
"""


def prepare() -> Sequence[str]:
    cargo = need("cargo", "https://rustup.rs")
    need("cc", "apt-get install gcc")
    source, target = BENCH / "peers" / "a2", BUILD / "a2"
    product = target / PRODUCT
    sources = [Path(__file__), source / "Cargo.toml", source / "src" / "main.rs"]
    if not product.exists() or any(one.stat().st_mtime > product.stat().st_mtime for one in sources):
        copy_sources(source, target)
        _change_a2(cargo, target)
        say("a2 takes a minute or more to build")
        build(product, sources, [[cargo, "build", "--release", "--quiet"]], target)
    return [str(product)]


def _change_a2(cargo: str, target: Path) -> None:
    changed = target / "a2-changed"
    command = [cargo, "metadata", "--format-version", "1", "--quiet"]
    done = subprocess.run(command, cwd=target, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"cargo could not get a2: {done.stderr}")
    packages = json.loads(done.stdout)["packages"]
    manifest = next(one["manifest_path"] for one in packages if one["name"] == "a2" and one["version"] == VERSION)
    shutil.copytree(Path(manifest).parent, changed, dirs_exist_ok=True)
    client = changed / "src" / "client.rs"
    text = client.read_text()
    for old, new in CHANGES.items():
        if text.count(old) != 1:
            raise Failed(f"a2 {VERSION} is not what was expected: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    client.write_text(text + ADDITION)
    with (target / "Cargo.toml").open("a") as file:
        file.write('\n[patch.crates-io]\na2 = { path = "a2-changed" }\n')


CONTESTANTS = (Contestant("a2", "sender", prepare, share=0.25),)
