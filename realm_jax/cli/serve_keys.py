"""`realm serve keys`: the API keys of a server's tenants."""

import json
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from realm_jax.cli.flags import command, flag
from realm_jax.cli.text import table
from realm_jax.errors import RequestError

app = typer.Typer(
    help="Create, list and revoke API keys; a running server sees it at the next request.",
    rich_markup_mode=None,
)

Keys = Annotated[
    Path | None,
    flag(
        "--keys",
        "The file of keys (SQLite, yours alone).",
        metavar="FILE",
        default="keys.sqlite in the user's data directory",
    ),
]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@app.command("create")
@command
def create(
    *,
    tenant: Annotated[str, flag("--tenant", "Whose key it is, as serve.toml names it.", metavar="NAME")],
    name: Annotated[str, flag("--name", "What to call the key in lists.", metavar="LABEL")] = "",
    expires: Annotated[
        str | None,
        flag("--expires", "After so long it counts no more: 12h, 30d, 8w.", metavar="TIME", default="never"),
    ] = None,
    keys: Keys = None,
) -> None:
    """Make a key and print it, this once: the file has only its hash.

    Example: realm serve keys create --tenant team-a --name laptop --expires 30d
    """
    from realm_jax.serving.keys import KeyStore

    seconds = None if expires is None else _seconds(expires)
    with KeyStore(keys or default_keys()) as store:
        made = store.create(tenant, name, seconds)
    print(f"key {made.key.id} of {tenant} is in {store.path}; keep what follows", file=sys.stderr)
    print(made.text)


@app.command("list")
@command
def list_keys(
    *,
    keys: Keys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List all keys, without their secrets.

    Example: realm serve keys list
    """
    from realm_jax.serving.keys import KeyStore

    with KeyStore(_existing(keys)) as store:
        found = store.all()
    if as_json:
        print(json.dumps([asdict(key) for key in found]))
        return
    rows = [("ID", "TENANT", "NAME", "CREATED", "EXPIRES", "COUNTS")]
    for key in found:
        state = "revoked" if key.revoked is not None else "yes" if key.counts(time.time()) else "expired"
        rows.append((key.id, key.tenant, key.label or "-", _day(key.created), _day(key.expires), state))
    print(table(rows))


@app.command("revoke")
@command
def revoke(
    *,
    key_id: Annotated[str, typer.Argument(help="The key's id (realm serve keys list).", metavar="ID")],
    keys: Keys = None,
) -> None:
    """Let a key count no more.

    Example: realm serve keys revoke 0123456789ab
    """
    from realm_jax.serving.keys import KeyStore

    with KeyStore(_existing(keys)) as store:
        before = store.revoke(key_id)
    was = "" if before.revoked is None else f" (it was, since {_day(before.revoked)})"
    print(f"key {before.id} of {before.tenant} is revoked{was}")


def default_keys() -> Path:
    """Where keys are if nobody says where: the platform's directory for a user's data."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("realm_jax", appauthor=False)) / "keys.sqlite"


def _existing(keys: Path | None) -> Path:
    path = keys or default_keys()
    if not path.exists():
        raise RequestError(f"there is no file of keys {path}; realm serve keys create makes one")
    return path


def _seconds(text: str) -> int:
    if not (found := re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip())):
        raise RequestError(f"--expires is {text[:40]!r}; give a time such as 12h, 30d or 8w")
    return int(found[1]) * _UNITS[found[2]]


def _day(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
