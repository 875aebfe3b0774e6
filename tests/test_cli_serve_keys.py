"""`realm serve keys`: a key is printed once, and never taken as an argument."""

import json
from pathlib import Path

import pytest
from command_line import Done, realm, spawn

from realm_jax.errors import AuthenticationError
from realm_jax.serving.keys import KeyStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


def made(path: Path, *arguments: object) -> str:
    done = realm("serve", "keys", "create", "--keys", path, *arguments)
    assert done.code == 0, done.err
    (text,) = done.out.splitlines()
    assert text not in done.err
    return text


def listed(path: Path) -> list[dict]:
    return json.loads(realm("serve", "keys", "list", "--keys", path, "--json").out)


def test_a_key_lives_from_create_to_revoke(path: Path):
    text = made(path, "--tenant", "team-a", "--name", "laptop", "--expires", "30d")
    other = made(path, "--tenant", "team-b")
    with KeyStore(path) as store:
        key = store.verify(text)
        assert (key.tenant, key.label, key.expires) == ("team-a", "laptop", key.created + 30 * 86400)
        assert store.verify(other).expires is None
        shown = realm("serve", "keys", "list", "--keys", path)
        assert shown.code == 0 and text[-64:] not in shown.out and shown.err == ""
        row = next(line.split() for line in shown.out.splitlines() if line.startswith(key.id))
        assert row[1:3] == ["team-a", "laptop"] and row[-1] == "yes"
        done = realm("serve", "keys", "revoke", key.id, "--keys", path)
        assert (done.code, done.out) == (0, f"key {key.id} of team-a is revoked\n")
        with pytest.raises(AuthenticationError):
            store.verify(text)
        assert "it was, since" in realm("serve", "keys", "revoke", key.id, "--keys", path).out
        store.verify(other)
    assert {each["id"]: each["revoked"] is None for each in listed(path)}[key.id] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create",), "tenant"),
        (("create", "--tenant", "a b"), "name is 'a b'"),
        (("create", "--tenant", "a", "--expires", "soon"), "--expires is 'soon'; give a time such as 12h"),
        (("create", "--tenant", "a", "--expires", "999999999w"), "expires is "),
        (("revoke", "0123456789ab"), "there is no file of keys"),
        (("list",), "there is no file of keys"),
    ],
)
def test_a_wrong_command_is_one_line(path: Path, arguments: tuple[str, ...], message: str):
    done: Done = realm("serve", "keys", *arguments, "--keys", path)
    assert message in done.error and done.code == 2


def test_an_unknown_id_and_an_open_file_are_refused(path: Path):
    made(path, "--tenant", "a")
    assert "has no key 0123456789ab" in realm("serve", "keys", "revoke", "0123456789ab", "--keys", path).error
    path.chmod(0o644)
    done = realm("serve", "keys", "list", "--keys", path)
    assert "is open to others (mode 644); chmod 600" in done.error and done.code == 1


def test_the_default_file_is_in_the_users_data_and_a_process_of_its_own_can_make_it(tmp_path: Path):
    env = {"XDG_DATA_HOME": str(tmp_path)}
    done = spawn("serve", "keys", "create", "--tenant", "a", env=env)
    assert done.code == 0, done.err
    with KeyStore(tmp_path / "realm_jax" / "keys.sqlite") as store:
        assert store.verify(done.out.strip()).tenant == "a"
