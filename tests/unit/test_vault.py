from __future__ import annotations

import os
import stat
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.errors import ConfigError, StoreError
from heliograph.vault import KEY_BYTES, Vault, load_or_make, rotate

OLD, NEW = bytes(range(32)), bytes(range(100, 132))
SECRET = b'{"key": "-----BEGIN PRIVATE KEY-----"}'
VAULT = Vault([OLD])


def test_what_was_sealed_opens_under_its_name() -> None:
    for plaintext in (b"", SECRET, bytes(100_000)):
        assert VAULT.open("credentials/shop", VAULT.seal("credentials/shop", plaintext)) == plaintext


@given(st.text(st.characters(codec="utf-8")), st.binary())
def test_any_record_opens_again(name: str, plaintext: bytes) -> None:
    assert VAULT.open(name, VAULT.seal(name, plaintext)) == plaintext


def test_sealed_octets_hold_nothing_of_the_record_and_differ_each_time() -> None:
    plaintext = b"the same line of text over and over again, " * 10
    one, other = (VAULT.seal("shop", plaintext) for _ in range(2))
    for sealed in (one, other):
        assert not any(plaintext[at : at + 8] in sealed for at in range(100))
        assert OLD not in sealed
        assert b"shop" not in sealed
    # All but the version and which master key it was.
    assert sum(a == b for a, b in zip(one[9:], other[9:], strict=True)) < len(one) // 10
    assert one[:9] == other[:9]


def test_record_in_another_s_place_does_not_open() -> None:
    sealed = VAULT.seal("credentials/shop", SECRET)
    for name in ("credentials/news", "settings/shop", "", "credentials/shop\0"):
        with pytest.raises(StoreError, match="was changed, or is another's"):
            VAULT.open(name, sealed)


def test_parts_of_two_records_do_not_make_a_third() -> None:
    one, other = VAULT.seal("shop", SECRET), VAULT.seal("shop", SECRET[::-1])
    for place in (21, 69, 80):
        with pytest.raises(StoreError, match="was changed"):
            VAULT.open("shop", one[:place] + other[place:])


@pytest.mark.parametrize("place", range(len(VAULT.seal("shop", b"secret"))))
def test_record_with_a_bit_flipped_does_not_open(place: int) -> None:
    sealed = VAULT.seal("shop", b"secret")
    for bit in range(8):
        damaged = bytearray(sealed)
        damaged[place] ^= 1 << bit
        with pytest.raises(StoreError, match="The record of shop"):
            VAULT.open("shop", bytes(damaged))


@given(st.binary(max_size=200))
def test_any_other_octets_do_not_open(octets: bytes) -> None:
    for sealed in (octets, VAULT.seal("shop", SECRET)[:9] + octets):
        with pytest.raises(StoreError, match="The record of shop"):
            VAULT.open("shop", sealed)


def test_record_cut_short_and_one_of_a_later_version_are_told() -> None:
    sealed = VAULT.seal("shop", SECRET)
    with pytest.raises(StoreError, match="is cut short"):
        VAULT.open("shop", sealed[:84])
    with pytest.raises(StoreError, match="is of version 2"):
        VAULT.open("shop", b"\2" + sealed[1:])


def test_after_rotation_old_records_open_and_new_ones_are_sealed_with_the_new_key() -> None:
    both = Vault([NEW, OLD])
    sealed = VAULT.seal("shop", SECRET)
    assert both.open("shop", sealed) == SECRET
    assert VAULT.is_current(sealed)
    assert not both.is_current(sealed)
    again = both.seal("shop", both.open("shop", sealed))
    assert both.is_current(again)
    assert Vault([NEW]).open("shop", again) == SECRET
    with pytest.raises(StoreError, match="sealed with a master key that is not here"):
        VAULT.open("shop", again)
    assert not both.is_current(b"")


@pytest.mark.parametrize("keys", [[], [b""], [OLD, OLD[1:]], [OLD + b"\n"]])
def test_master_keys_of_another_length_are_refused(keys: list[bytes]) -> None:
    with pytest.raises(ConfigError, match="32 octets"):
        Vault(keys)


def test_vault_does_not_show_its_keys() -> None:
    assert repr(Vault([NEW, OLD])) == "<vault with 2 master keys>"
    assert not hasattr(VAULT, "__dict__")


# The file of master keys.


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_master_key_is_made_once_for_our_eyes_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "master-key"
    sealed = load_or_make(path).seal("shop", SECRET)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert load_or_make(path).open("shop", sealed) == SECRET
    assert [each.name for each in path.parent.iterdir()] == ["master-key"]


def test_each_installation_has_a_master_key_of_its_own(tmp_path: Path) -> None:
    load_or_make(tmp_path / "one")
    load_or_make(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_of_two_that_start_together_the_first_makes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "master-key"
    first = load_or_make(path)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as the other saw it a moment before
    second = load_or_make(path)
    assert second.open("shop", first.seal("shop", SECRET)) == SECRET
    assert [each.name for each in tmp_path.iterdir()] == ["master-key"]


def test_rotation_puts_a_new_key_in_front_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    vaults = [load_or_make(path), rotate(path), rotate(path), load_or_make(path)]
    sealed = [vault.seal("shop", SECRET) for vault in vaults]
    assert all(vaults[-1].open("shop", each) == SECRET for each in sealed)
    assert [vaults[-1].is_current(each) for each in sealed] == [False, False, True, True]
    assert len(path.read_text().splitlines()) == 3
    assert mode(path) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["master-key"]


def test_rotations_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    with ThreadPoolExecutor(8) as several:
        vaults = list(several.map(rotate, [path] * 32))
    last = load_or_make(path)
    assert all(last.open("shop", each.seal("shop", SECRET)) == SECRET for each in vaults)
    assert len(path.read_text().splitlines()) == 33


def test_old_line_may_be_taken_out_when_all_is_sealed_anew(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    old = load_or_make(path).seal("shop", SECRET)
    again = rotate(path).seal("shop", SECRET)
    path.write_text(path.read_text().splitlines()[0])
    vault = load_or_make(path)
    assert vault.open("shop", again) == SECRET
    with pytest.raises(StoreError, match="put its line back"):
        vault.open("shop", old)


def test_rotation_keeps_the_mode_that_the_file_had(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    path.chmod(0o640)
    rotate(path)
    assert mode(path) == 0o640


def test_rotation_by_another_user_leaves_the_file_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "fchown", lambda descriptor, uid, gid: given.append((uid, gid)))
    owner = path.stat().st_uid, path.stat().st_gid
    rotate(path)
    assert given == [owner]


def test_rotation_that_cannot_be_written_leaves_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be written to .*master-key \(No space left"):
        rotate(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["master-key"]


def test_master_key_is_on_the_disk_with_its_folder_before_anything_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        synced.append((about.st_ino, about.st_size if stat.S_ISREG(about.st_mode) else 0))

    monkeypatch.setattr(os, "fsync", note)
    path = tmp_path / "master-key"
    load_or_make(path)
    assert synced == [(path.stat().st_ino, path.stat().st_size), (tmp_path.stat().st_ino, 0)]


def test_master_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"every user of this machine can read .*: run chmod 600"):
        load_or_make(path)


LINE = b64encode(OLD)


@pytest.mark.parametrize(
    "content", [b"", b"\n", LINE[:-1], LINE[:-4], LINE + b"\nnonsense\n", b"\xff" * 44, LINE + LINE]
)
def test_damaged_file_of_master_keys_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "master-key"
    path.touch(0o600)
    path.write_bytes(content)
    for use in (load_or_make, rotate):
        with pytest.raises(ConfigError, match="is damaged, it must have 32 octets as base64"):
            use(path)
    assert path.read_bytes() == content


def test_file_of_master_keys_may_have_lines_of_windows_and_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    path.touch(0o600)
    path.write_bytes(b"\r\n" + b64encode(NEW) + b"\r\n\r\n" + LINE)
    vault = load_or_make(path)
    assert vault.open("shop", VAULT.seal("shop", SECRET)) == SECRET
    assert vault.is_current(Vault([NEW]).seal("shop", SECRET))


def test_rotation_without_a_master_key_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        rotate(tmp_path / "master-key")
    with pytest.raises(ConfigError, match="No such file"):
        rotate(tmp_path / "absent" / "master-key")


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigError, match=r"The master key: .* cannot be read"):
        load_or_make(tmp_path / "data" / "master-key")
    with pytest.raises(ConfigError, match=r"The master key cannot be written to .* name another file"):
        load_or_make(tmp_path / "data" / "keys" / "master-key")


def test_master_keys_are_never_the_same(tmp_path: Path) -> None:
    path = tmp_path / "master-key"
    load_or_make(path)
    for _ in range(5):
        rotate(path)
    lines = sorted(path.read_bytes().split())
    assert all(one != other for one, other in pairwise(lines))
    assert {len(line) for line in lines} == {len(b64encode(bytes(KEY_BYTES)))}
