"""`serve.toml`: the models and the tenants of a server, read strictly."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from realm_jax.config import size_in_bytes
from realm_jax.errors import RequestError
from realm_jax.serving.model_entries import ModelEntry, read_models
from realm_jax.serving.tenants import Tenant, check_name, shortened

MAX_BYTES = 1 << 20
MAX_TENANTS = 1000
MAX_SECONDS = 10**9
KNOWN = ("keys", "memory", "idle_unload", "models", "defaults", "tenants")
MAX_DOTS = 1000  # in a line: the parser's time for a dotted key grows with the square of its parts


@dataclass(frozen=True)
class ServeConfig:
    """What a `serve.toml` says.

    tenants: by name. keys: the file of API keys, None if it names none. memory: bytes that all loaded models
    may need together. idle_unload: seconds after which a model that nobody uses is unloaded.
    """

    tenants: Mapping[str, Tenant]
    keys: Path | None = None
    models: tuple[ModelEntry, ...] = ()
    memory: int | None = None
    idle_unload: float | None = None


def read_serve_config(path: str | Path) -> ServeConfig:
    """The file's models, and its tenants, each with `[defaults]` where it says nothing else.

    Paths in it are relative to its folder. Raises RequestError that names the file, the model or tenant and
    the field for anything that is not understood.
    """
    path = Path(path)
    found = _parsed(path)
    try:
        if unknown := sorted(found.keys() - set(KNOWN)):
            raise RequestError(f"unknown field {unknown[0][:64]!r}; known: {', '.join(KNOWN)}")
        keys = found.get("keys")
        if keys is not None and (not isinstance(keys, str) or not keys or "\0" in keys):
            raise RequestError(f"keys is {str(keys)[:60]!r}; give the path of a file")
        models = read_models(found.get("models", []), path.parent)
        named, defaults = _table(found, "tenants"), _table(found, "defaults")
        tenants = {} if models and "tenants" not in found else _tenants(named, defaults)
        memory, idle_unload = _memory(found.get("memory")), _seconds(found.get("idle_unload"))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    return ServeConfig(
        MappingProxyType(tenants),
        path.parent / Path(keys).expanduser() if keys is not None else None,
        models,
        memory,
        idle_unload,
    )


def _memory(value: object) -> int | None:
    if value is None or (type(value) is int and 1 <= value < 10**18):
        return value
    if not isinstance(value, str):
        raise RequestError(f"memory is {shortened(value)}; give a size such as 800M or 2.5G")
    return size_in_bytes(value, "memory")


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SECONDS:
        raise RequestError(
            f"idle_unload is {shortened(value)}; give seconds, more than 0 and at most {MAX_SECONDS:,}"
        )
    return float(value)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"{path} has more than {MAX_BYTES:,} bytes; it should have a few lines for each tenant"
        )
    if any(line.count(b".") > MAX_DOTS for line in data.splitlines()):
        raise RequestError(f"{path} has a line of more than {MAX_DOTS:,} dots; break it, or shorten the key")
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise RequestError(f"{path}: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{path} nests too deep; nothing in it nests more than twice") from error


def _table(found: dict[str, Any], name: str) -> dict[str, Any]:
    table = found.get(name, {})
    if not isinstance(table, dict):
        raise RequestError(f"{name} must be a table: [{name}]")
    return table


def _tenants(named: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Tenant]:
    if not named:
        raise RequestError("tenants is empty; add [tenants.NAME] for each")
    if len(named) > MAX_TENANTS:
        raise RequestError(f"tenants has {len(named):,}; the most is {MAX_TENANTS:,}")
    _made("defaults", "defaults", defaults)
    tenants = {}
    for name, given in named.items():
        where = f"tenants.{name[:64]}"
        if not isinstance(given, dict):
            raise RequestError(f"{where} must be a table: [tenants.NAME]")
        tenants[name] = _made(where, name, defaults | given)
    return tenants


def _made(where: str, name: str, given: dict[str, Any]) -> Tenant:
    try:
        check_name(name)
        if "name" in given:
            raise RequestError("unknown field 'name'; the name stands in the brackets: [tenants.NAME]")
        return Tenant.from_options(name=name, **given)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
