"""The keys of a soaked server: good ones, ones that are refused, and whether any can be read by others."""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from realm_jax.serving.keys import KeyStore

TENANTS = """
[tenants.one]
[tenants.two]
weight = 2.0
[tenants.operators]
is_admin = true
"""


@dataclass(frozen=True)
class Keys:
    """What clients send. None: no key at all."""

    good: tuple[str | None, ...] = (None,)
    bad: Mapping[str, str | None] = field(default_factory=dict)  # by why it is refused
    admin: str | None = None


class KeyFolder:
    """A folder with a `serve.toml` and keys of its tenants, one of which is revoked when it was used."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        self._store = KeyStore(folder / "keys.sqlite")
        made = {name: self._store.create(name) for name in ("one", "two", "operators")}
        self._leaver = self._store.create("two")
        self._texts = {name: key.text for name, key in made.items()}
        (folder / "serve.toml").write_text(TENANTS)
        self.flags = ("--tenants", folder / "serve.toml", "--keys", folder / "keys.sqlite")
        other = made["one"].text.rpartition("-")[0] + "-" + made["two"].text.rpartition("-")[2]
        self._bad = {
            "no key": None,
            "no key's form": f"realm-nobody-{secrets.token_hex(16)}",
            "unknown id": f"realm-{0:012x}-{1:064x}",
            "another's secret": other,
        }

    def before(self) -> Keys:
        """All keys count."""
        good = (self._texts["one"], self._texts["two"], self._leaver.text)
        return Keys(good, self._bad, self._texts["operators"])

    def after(self) -> Keys:
        """One, which the server has verified and remembers, was revoked just now."""
        self._store.revoke(self._leaver.key.id)
        good = (self._texts["one"], self._texts["two"])
        return Keys(good, self._bad | {"revoked": self._leaver.text}, self._texts["operators"])

    def seen(self, log: Iterable[Mapping[str, object]]) -> list[str]:
        """Where a key's secret stands that it must not: in the server's log, or in the list of processes."""
        places = {"the log": json.dumps(list(log))}
        for process in psutil.process_iter(["pid", "cmdline"]):
            places[f"the arguments of process {process.pid}"] = " ".join(process.info["cmdline"] or ())
        texts = [*self._texts.values(), self._leaver.text, *filter(None, self._bad.values())]
        hidden = [text.rpartition("-")[2] for text in texts]
        return [place for place, text in places.items() if any(each in text for each in hidden)]

    def close(self) -> None:
        """The file is let go."""
        self._store.close()
