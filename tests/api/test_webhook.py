"""Standard Webhooks: what is signed verifies, and nothing else does."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.platforms.webhook import ID, SIGNATURE, TIMESTAMP, new_secret, read_secret, secret_key, sign, verify
from citybrain.errors import ConfigError, SignatureError

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the example of the standard's own test suites
BODY = b'{"test": 2432232314}'
NOW = 1_614_265_330


def test_the_standards_own_example() -> None:
    headers = sign(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", NOW, BODY)
    assert headers == {
        ID: "msg_p5jXN8AQM9LWM0D4loKWxJek",
        TIMESTAMP: "1614265330",
        SIGNATURE: "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert verify([SECRET], headers, BODY, NOW) == "msg_p5jXN8AQM9LWM0D4loKWxJek"


@given(st.binary(max_size=300), st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=40))
def test_what_is_signed_verifies_whatever_the_case_of_its_headers(body: bytes, id: str) -> None:
    secret = new_secret()
    headers = {name.title(): value for name, value in sign(secret, id, NOW, body).items()}
    assert verify([SECRET, secret], headers, body, NOW + 300) == id


@pytest.mark.parametrize("change", ["body", "id", "time", "secret", "version", "signature"])
def test_any_change_is_wrong(change: str) -> None:
    headers, body, secret = sign(SECRET, "a.1", NOW, BODY), BODY, SECRET
    match change:
        case "body":
            body = BODY + b" "
        case "id":
            headers[ID] = "a.2"
        case "time":
            headers[TIMESTAMP] = str(NOW + 1)
        case "secret":
            secret = new_secret()
        case "version":
            headers[SIGNATURE] = headers[SIGNATURE].replace("v1,", "v1a,")
        case "signature":
            headers[SIGNATURE] = "v1," + base64.b64encode(bytes(32)).decode()
    with pytest.raises(SignatureError) as caught:
        verify([secret], headers, body, NOW)
    assert caught.value.reason == "wrong"


@pytest.mark.parametrize("name", [ID, TIMESTAMP, SIGNATURE])
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_header_is_named(name: str, value: str | None) -> None:
    headers = sign(SECRET, "a.1", NOW, BODY)
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    with pytest.raises(SignatureError, match=f"no header {name}") as caught:
        verify([SECRET], headers, BODY, NOW)
    assert caught.value.reason == "missing"


@pytest.mark.parametrize("stamp", ["soon", "-5", "１２", "9" * 13])
def test_a_time_that_is_none_is_missing(stamp: str) -> None:
    with pytest.raises(SignatureError, match="no Unix time") as caught:
        verify([SECRET], {**sign(SECRET, "a.1", NOW, BODY), TIMESTAMP: stamp}, BODY, NOW)
    assert caught.value.reason == "missing"


@pytest.mark.parametrize(("away", "taken"), [(300, True), (-300, True), (301, False), (-301, False)])
def test_a_signature_is_good_for_five_minutes_on_either_side(away: int, taken: bool) -> None:
    headers = sign(SECRET, "a.1", NOW, BODY)
    if taken:
        assert verify([SECRET], headers, BODY, NOW + away) == "a.1"
        return
    with pytest.raises(SignatureError) as caught:
        verify([SECRET], headers, BODY, NOW + away)
    assert caught.value.reason == "old"


def test_several_signatures_let_a_secret_be_changed() -> None:
    new = new_secret()
    headers = sign(SECRET, "a.1", NOW, BODY)
    headers[SIGNATURE] = f"v1a,xxx {headers[SIGNATURE]} {sign(new, 'a.1', NOW, BODY)[SIGNATURE]}"
    assert verify([new], headers, BODY, NOW) == verify([SECRET], headers, BODY, NOW) == "a.1"
    with pytest.raises(SignatureError):
        verify([], headers, BODY, NOW)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ="])
def test_a_secret_that_is_none_is_refused_and_not_shown(tmp_path: Path, secret: str) -> None:
    path = tmp_path / "platform.key"
    path.write_text(secret)
    with pytest.raises(ConfigError, match=r"platform.key: expected whsec_ and the base64 of 24 to 64 bytes") as caught:
        read_secret(path)
    assert not secret or secret == "whsec_" or secret not in str(caught.value)


def test_secrets_are_read_from_files_and_fresh_ones_are_good(tmp_path: Path) -> None:
    assert read_secret(tmp_path / "none.key") is None
    secret = new_secret()
    (tmp_path / "one.key").write_text(secret + "\n")
    assert read_secret(tmp_path / "one.key") == secret
    assert len(secret_key(secret)) == 32
    assert new_secret() != secret
