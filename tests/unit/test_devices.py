from __future__ import annotations

import pytest

from heliograph.errors import Refused
from heliograph.model import DeviceToken, Environment
from heliograph.protocols.provider_token import mint
from heliograph.simulator.apple import Apple, Verdict, Visit
from heliograph.simulator.devices import STORED_S, Device, Shown
from heliograph.simulator.server import new_signing_key

NOW = 1_700_000_000.0
ONE, TWO = "ab" * 32, "cd" * 32
TOPIC = "com.example.app"
KEY = new_signing_key("KEYKEYKEY1", "TEAMTEAM01")
JWT = mint(KEY, NOW)


def simulated(*, strict: bool = False, keep: int = 1000) -> Apple:
    apple = Apple(strict=strict, keep=keep)
    apple.add_key(KEY)
    return apple


@pytest.fixture
def apple() -> Apple:
    return simulated()


def push(
    apple: Apple,
    payload: str,
    token: str = ONE,
    *,
    topic: str = TOPIC,
    collapse_id: str | None = None,
    expiration: int | None = None,
    now: float = NOW,
) -> Verdict:
    fields = {
        ":method": "POST",
        ":path": f"/3/device/{token}",
        "apns-topic": topic,
        "authorization": f"bearer {JWT}",
    }
    if collapse_id is not None:
        fields["apns-collapse-id"] = collapse_id
    if expiration is not None:
        fields["apns-expiration"] = str(expiration)
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    return apple.judge(Visit(), encoded, payload.encode(), now)


def payloads(shown: list[Shown]) -> list[str]:
    return [each.received.payload.decode() for each in shown]


def accepted(apple: Apple) -> list[str]:
    return [received.payload.decode() for received in apple.received]


# -- what there is -----------------------------------------------------------------------------------------------


def test_device_appears_by_being_pushed_to(apple: Apple) -> None:
    assert apple.devices() == []
    push(apple, "1", ONE)
    push(apple, "2", TWO)
    push(apple, "3", ONE)
    assert apple.devices() == [Device(DeviceToken(ONE), None, None), Device(DeviceToken(TWO), None, None)]


def test_device_that_was_refused_something_does_not_appear(apple: Apple) -> None:
    push(apple, "", ONE)
    assert apple.devices() == []


def test_registered_device_tells_its_topic_and_environment(apple: Apple) -> None:
    apple.register(ONE.upper(), topic=TOPIC, environment=Environment.PRODUCTION)
    assert apple.devices() == [Device(DeviceToken(ONE), TOPIC, Environment.PRODUCTION)]


def test_environment_may_be_a_word_and_one_that_there_is_not_is_refused(apple: Apple) -> None:
    with pytest.raises(ValueError, match="'prod' is not a valid Environment"):
        apple.register(ONE, environment="prod")  # type: ignore[arg-type]
    assert apple.devices() == []
    apple.register(ONE, environment="production")  # type: ignore[arg-type]
    assert apple.devices() == [Device(DeviceToken(ONE), None, Environment.PRODUCTION)]


def test_uninstalled_device_tells_since_when_and_comes_back_by_being_registered(apple: Apple) -> None:
    apple.unregister(ONE, 1_699_999_999_123)
    (device,) = apple.devices()
    assert (device.state, device.since) == ("uninstalled", 1_699_999_999_123)
    assert push(apple, "1").status == 410
    apple.register(ONE)
    (device,) = apple.devices()
    assert (device.state, device.since) == ("installed", None)
    assert push(apple, "1").status == 200


def test_strict_simulator_knows_registered_devices_only() -> None:
    apple = simulated(strict=True)
    verdict = push(apple, "1")
    assert (verdict.status, verdict.reason) == (400, "BadDeviceToken")
    apple.register(ONE, topic=TOPIC)
    assert push(apple, "1").status == 200
    assert push(apple, "1", topic="com.example.other").reason == "DeviceTokenNotForTopic"
    apple.register(ONE, environment=Environment.DEVELOPMENT)
    assert push(apple, "1").reason == "BadDeviceToken"


def test_strict_simulator_says_when_there_is_no_such_device() -> None:
    apple = simulated(strict=True)
    with pytest.raises(Refused, match="register its token first"):
        apple.go_offline(ONE)
    with pytest.raises(Refused, match="register its token first"):
        apple.come_online(ONE, NOW)


def test_device_shows_no_token_and_no_payload_in_its_repr(apple: Apple) -> None:
    apple.go_offline(ONE)
    push(apple, "secret")
    assert ONE not in repr(apple.devices())
    assert "secret" not in repr(apple.devices())


def test_token_that_is_none_is_refused(apple: Apple) -> None:
    for what in (apple.register, apple.go_offline, apple.shown):
        with pytest.raises(Refused, match="hex digits only"):
            what("not-a-token")


# -- what is shown -----------------------------------------------------------------------------------------------


def test_devices_show_what_was_accepted_in_order_with_its_time(apple: Apple) -> None:
    push(apple, "1", ONE, now=NOW)
    push(apple, "2", TWO, now=NOW + 1)
    push(apple, "3", ONE, now=NOW + 2)
    assert payloads(apple.shown()) == ["1", "2", "3"]
    assert payloads(apple.shown(ONE.upper())) == ["1", "3"]
    assert [each.at for each in apple.shown(ONE)] == [NOW, NOW + 2]
    assert [each.received for each in apple.shown()] == apple.received


def test_later_one_with_the_same_collapse_id_takes_the_place_of_the_former(apple: Apple) -> None:
    push(apple, "1", collapse_id="score")
    push(apple, "2")
    push(apple, "3", TWO, collapse_id="score")
    push(apple, "4", collapse_id="weather")
    push(apple, "5", collapse_id="score")
    push(apple, "6")
    assert payloads(apple.shown(ONE)) == ["2", "4", "5", "6"]
    assert payloads(apple.shown(TWO)) == ["3"]
    assert accepted(apple) == ["1", "2", "3", "4", "5", "6"]


def test_only_the_last_are_kept_over_all_devices() -> None:
    apple = simulated(keep=2)
    for number in range(4):
        push(apple, str(number), f"{number:064x}")
    assert payloads(apple.shown()) == ["2", "3"]
    assert [int(device.token, 16) for device in apple.devices()] == [2, 3]


def test_what_was_shown_is_forgotten_with_what_was_received(apple: Apple) -> None:
    push(apple, "1")
    apple.clear_received()
    assert not apple.shown()
    assert not apple.received


# -- without a network -------------------------------------------------------------------------------------------


def test_device_without_a_network_shows_nothing_and_its_pushes_are_accepted(apple: Apple) -> None:
    apple.go_offline(ONE)
    assert push(apple, "1").status == 200
    assert accepted(apple) == ["1"]
    assert apple.shown() == []
    (device,) = apple.devices()
    assert not device.online
    assert device.waiting == apple.received[0]


def test_newest_one_is_shown_when_the_network_is_back(apple: Apple) -> None:
    apple.go_offline(ONE)
    push(apple, "1", collapse_id="a")
    push(apple, "2", collapse_id="b")
    push(apple, "3", TWO)
    apple.come_online(ONE, NOW + 60)
    assert payloads(apple.shown()) == ["3", "2"]
    assert apple.shown(ONE)[0].at == NOW + 60
    (device,) = [device for device in apple.devices() if device.token == ONE]
    assert (device.online, device.waiting) == (True, None)
    apple.come_online(ONE, NOW + 61)
    assert payloads(apple.shown(ONE)) == ["2"]


def test_what_waited_collapses_with_what_was_shown_before(apple: Apple) -> None:
    push(apple, "1", collapse_id="score")
    apple.go_offline(ONE)
    push(apple, "2", collapse_id="score")
    apple.come_online(ONE, NOW)
    assert payloads(apple.shown()) == ["2"]


@pytest.mark.parametrize(
    "expiration, back_at, is_shown",
    [
        (int(NOW) + 10, NOW + 9, True),
        (int(NOW) + 10, NOW + 10, False),
        (None, NOW + STORED_S - 1, True),
        (None, NOW + STORED_S, False),
        (int(NOW) + 2 * STORED_S, NOW + STORED_S, False),
        (0, NOW, False),
        (int(NOW) - 1, NOW - 2, False),
    ],
)
def test_apple_keeps_it_until_its_expiration_and_thirty_days_at_most(
    apple: Apple, expiration: int | None, back_at: float, is_shown: bool
) -> None:
    apple.go_offline(ONE)
    push(apple, "1", expiration=expiration)
    apple.come_online(ONE, back_at)
    assert payloads(apple.shown()) == ["1"] * is_shown


def test_one_that_is_tried_once_does_not_displace_what_waits(apple: Apple) -> None:
    apple.go_offline(ONE)
    push(apple, "1")
    push(apple, "2", expiration=0)
    apple.come_online(ONE, NOW)
    assert payloads(apple.shown()) == ["1"]


def test_device_with_a_network_shows_what_has_expired_as_well(apple: Apple) -> None:
    push(apple, "1", expiration=int(NOW) - 100)
    push(apple, "2", expiration=0)
    assert payloads(apple.shown()) == ["1", "2"]


def test_uninstalled_app_gets_nothing_of_what_waited(apple: Apple) -> None:
    apple.go_offline(ONE)
    push(apple, "1")
    apple.unregister(ONE, 1)
    apple.register(ONE)
    (device,) = apple.devices()
    assert (device.online, device.waiting) == (False, None)
    apple.come_online(ONE, NOW)
    assert apple.shown() == []


def test_what_waits_survives_that_received_is_cleared(apple: Apple) -> None:
    apple.go_offline(ONE)
    push(apple, "1")
    apple.clear_received()
    apple.come_online(ONE, NOW)
    assert payloads(apple.shown()) == ["1"]


# -- who follows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1000])
def test_follower_is_called_for_each_as_it_is_shown(keep: int) -> None:
    apple = simulated(keep=keep)
    seen: list[Shown] = []
    end = apple.follow(seen.append)
    push(apple, "1", collapse_id="a")
    push(apple, "", ONE)
    apple.go_offline(ONE)
    push(apple, "2", collapse_id="a")
    push(apple, "3", TWO, collapse_id="a")
    assert payloads(seen) == ["1", "3"]
    apple.come_online(ONE, NOW + 5)
    assert payloads(seen) == ["1", "3", "2"]
    assert seen[-1].at == NOW + 5
    end()
    end()
    push(apple, "4")
    assert len(seen) == 3


def test_same_callback_may_follow_twice_and_each_ends_by_itself(apple: Apple) -> None:
    seen: list[Shown] = []
    first, second = apple.follow(seen.append), apple.follow(seen.append)
    push(apple, "1")
    first()
    push(apple, "2")
    second()
    push(apple, "3")
    assert payloads(seen) == ["1", "1", "2"]


def test_follower_may_end_itself(apple: Apple) -> None:
    seen: list[Shown] = []

    def once(shown: Shown) -> None:
        seen.append(shown)
        end()

    end = apple.follow(once)
    apple.follow(seen.append)
    push(apple, "1")
    push(apple, "2")
    assert payloads(seen) == ["1", "1", "2"]


# -- from the beginning ------------------------------------------------------------------------------------------


def test_reset_forgets_everything_but_who_follows(apple: Apple) -> None:
    seen: list[Shown] = []
    apple.follow(seen.append)
    apple.unregister(ONE, 1)
    apple.go_offline(TWO)
    apple.add_app("com.example.other", KEY.team_id)
    apple.rejects(None, "Shutdown")
    push(apple, "1", "ef" * 32, topic="com.example.other")
    apple.reset()
    for left in (apple.devices(), apple.shown(), apple.received, apple.keys(), apple.apps(), apple.rules()):
        assert not left
    apple.add_key(KEY)
    assert push(apple, "2").status == 200
    assert payloads(seen) == ["1", "2"]
