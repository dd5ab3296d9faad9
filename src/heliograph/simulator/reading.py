"""What programs and people tell the simulator, as JSON or TOML: typed, or refused with what to change.

A fault script is a list of rules: in JSON the list itself or `{"rules": [...]}`, in TOML one `[[rules]]` after another.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from enum import EnumType
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Struct

from heliograph.complaints import Dislike, closest, dissect, shown
from heliograph.errors import ConfigError, Refused
from heliograph.simulator.faults import Action, Faults, Rule

T = TypeVar("T", bound=Struct)

ACTIONS: dict[str, type[Struct]] = {str(each.__struct_config__.tag): each for each in get_args(Action)}
"""By the `kind` that names them."""

_TAG = "kind"
_MISSING = "Object missing required field "
_steps = re.compile(r"\[(\d+)\]|([a-z_]+)").findall


def parse_json(octets: bytes) -> Any:
    """Any JSON; nothing at all is an empty object. Raises ConfigError."""
    try:
        return msgspec.json.decode(octets) if octets.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"This is not JSON in UTF-8: {error}") from None


def read(document: object, kind: type[T]) -> T:
    """A decoded object as such a struct. Raises ConfigError."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_complaint(error, document, kind)) from None


def read_rules(document: object) -> list[Rule]:
    """A rule, a list of rules, or a list under the name `rules`. Raises ConfigError, for the first that is wrong."""
    if isinstance(document, dict) and "rules" in document:
        if len(document) > 1:
            raise ConfigError("Beside rules there is nothing: a rule's own fields go into the rule")
        document = document["rules"]
    if not isinstance(document, list):
        return [read(document, Rule)]
    rules = []
    for number, each in enumerate(document, 1):
        try:
            rules.append(read(each, Rule))
        except ConfigError as error:
            raise ConfigError(f"Rule {number}: {error}") from None
    return rules


def load_rules(path: Path) -> Sequence[Rule]:
    """A fault script. Raises ConfigError."""
    octets = read_file(path, "The fault script")
    try:
        document = _parse_toml(octets) if path.suffix == ".toml" else parse_json(octets)
        if isinstance(document, dict) and not {"rules", "action"} & document.keys():
            raise ConfigError("There are no rules in it: in TOML each begins with [[rules]], in JSON they are a list")
        return read_rules(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_file(path: Path, what: str) -> bytes:
    """Raises ConfigError; `what` begins its sentence."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} in {path} cannot be read ({error.strerror}): name another file") from None


def add_rules(faults: Faults, rules: Sequence[Rule]) -> list[int]:
    """Add all of them, or none. Their ids. Raises what `Faults.add_rule` does."""
    added: list[int] = []
    try:
        added.extend(faults.add_rule(rule) for rule in rules)
    except (ConfigError, Refused):
        for number in added:
            faults.remove_rule(number)
        raise
    return added


def _parse_toml(octets: bytes) -> Any:
    try:
        return tomllib.loads(octets.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"This is not TOML in UTF-8: {error}") from None


def _complaint(error: msgspec.ValidationError, document: object, kind: type[Struct]) -> str:
    """The words of msgspec in ours, after the place that they are about."""
    dislike = dissect(error)
    words = _reworded(dislike, document, kind)
    if dislike.place:
        return f"{dislike.place}: {words}"
    return words if dislike.words.startswith("`") else f"{words[:1].upper()}{words[1:]}"  # names stay as they are


def _reworded(dislike: Dislike, document: object, kind: type[Struct]) -> str:
    place, _, field = dislike.place.rpartition(".")
    if dislike.unknown is not None:
        fields = _struct(document, dislike.place, kind).__struct_fields__
        return f"there is no field {shown(dislike.unknown)!r} here: {_hint(dislike.unknown, fields)}"
    if place and field == _TAG:
        named, known = str(_at(document, dislike.place)), _actions(document, place)
        if named in ACTIONS:
            return f"{named} cannot stand here: known here are {', '.join(known)}"
        return f"there is no action {shown(named)!r}: {_hint(named, known)}"
    plain = dislike.words.replace("`", "")
    if plain.startswith(_MISSING):
        missing = plain.removeprefix(_MISSING)
        choice = f", one of {', '.join(_actions(document, dislike.place))}" if missing == _TAG else ""
        return f"the field {missing} is missing{choice}"
    if plain.startswith("Invalid enum value"):
        return f"it must be one of {', '.join(_choices(_struct(document, place, kind), field))}"
    return f"{plain[:1].lower()}{plain[1:]}"


def _hint(name: str, known: Sequence[str]) -> str:
    close = closest(name, known)
    return f"did you mean {close}?" if close else f"known here are {', '.join(known)}"


def _struct(document: object, place: str, kind: type[Struct]) -> type[Struct]:
    """What is read at that place: the whole, or one of its actions."""
    return ACTIONS[str(_at(document, f"{place}.{_TAG}"))] if place else kind


def _actions(document: object, place: str) -> list[str]:
    """Which actions there may be at that place: after some only a few."""
    outer, _, field = place.rpartition(".")
    if field != "then":
        return list(ACTIONS)
    then = get_type_hints(_struct(document, outer, Rule))["then"]
    return [tag for tag, action in ACTIONS.items() if action in get_args(then)]


def _choices(struct: type[Struct], field: str) -> list[str]:
    """The words that there are for a field."""
    hint = get_type_hints(struct)[field]
    kinds = get_args(hint) or (hint,)
    enums = [each for each in kinds if isinstance(each, EnumType)]
    return [str(word) for word in (enums[0] if enums else kinds)]


def _at(document: Any, place: str) -> object:
    for index, name in _steps(place):
        document = document[int(index)] if index else document[name]
    return document
