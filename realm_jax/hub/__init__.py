"""A model reference becomes a local file.

A reference is a path, a known name (``configs/models.toml``), or ``hf:owner/repo/file.gguf[@revision]``.
Files are kept in the cache directory and fetched once, however many processes ask.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from realm_jax.errors import DownloadError
from realm_jax.hub import download
from realm_jax.hub.download import Expected, Unavailable
from realm_jax.hub.progress import Arrival
from realm_jax.hub.references import DEFAULT_MODEL, KnownModel, known_models, parse
from realm_jax.hub.sources import HuggingFaceFile, Source, WheelMember

__all__ = [
    "DEFAULT_MODEL",
    "HuggingFaceFile",
    "KnownModel",
    "Source",
    "WheelMember",
    "cache_dir",
    "cached_path",
    "known_models",
    "resolve",
]


def cache_dir() -> Path:
    """Where files are kept: REALM_CACHE, else the platform's cache directory."""
    return Path(os.environ.get("REALM_CACHE") or user_cache_dir("realm_jax", appauthor=False)).expanduser()


def resolve(
    reference: str | Path | None = None, *, offline: bool = False, progress: bool | None = None
) -> Path:
    """The local file of the model, whole and verified; of a split model, the first part.

    No reference means the default model.
    ``offline`` (or REALM_OFFLINE=1) never touches the network. ``progress``: True = a bar on stderr,
    False = none, None = as fits stderr. A source that fails is named on stderr with its reason.
    A branch of ``hf:`` is looked up once; delete the file to get a newer one.
    Raises `RequestError` for a reference that names nothing, `DownloadError` when no source has the file.
    """
    offline = offline or os.environ.get("REALM_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")
    match parse(reference):
        case Path() as path:
            return path
        case KnownModel() as model:
            target = _target(model)
            _obtain(target, model.sources, Expected(model.size, model.sha256), offline, progress)
            return target
        case HuggingFaceFile() as file:
            for part in file.parts():
                _obtain(_target(part), (part,), Expected(), offline, progress)
            return _target(file.parts()[0])


def cached_path(reference: str | Path | None = None) -> Path | None:
    """What `resolve` would return without the network; None if it would need it. Raises `RequestError`."""
    match parse(reference):
        case Path() as path:
            return path
        case KnownModel() as model:
            target = _target(model)
            return target if _is_whole(target, model.size) else None
        case HuggingFaceFile() as file:
            targets = [_target(part) for part in file.parts()]
            return targets[0] if all(_is_whole(target, None) for target in targets) else None


def _target(model: KnownModel | HuggingFaceFile) -> Path:
    """Where the file lies, or will."""
    if isinstance(model, KnownModel):
        return cache_dir() / "models" / model.name / model.file
    return cache_dir() / "huggingface" / model.repo / quote(model.revision, safe="") / model.file


def _is_whole(target: Path, size: int | None) -> bool:
    # Verified before it got this name, so its length is enough; a full check would cost every start.
    return target.is_file() and size in (None, target.stat().st_size)


def _obtain(
    target: Path, sources: tuple[Source, ...], expected: Expected, offline: bool, progress: bool | None
) -> None:
    """The target is whole. Raises `DownloadError` that lists every source with its reason."""
    if _is_whole(target, expected.size):
        return
    if offline:
        origins = " or ".join(map(str, sources))
        raise DownloadError(f"offline, and {target.name} is not cached (from {origins}; put it at {target})")
    try:
        with _one_at_a_time(target):
            if not _is_whole(target, expected.size):
                _fetch(target, sources, expected, progress)
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {error.strerror or error} (set REALM_CACHE)") from error


def _fetch(target: Path, sources: tuple[Source, ...], expected: Expected, progress: bool | None) -> None:
    failures = []
    for source in sources:
        try:
            with Arrival(f"{target.name} ({source})", progress) as arrival:
                source.fetch(target, arrival, expected)
            download.discard(target)  # what a source before this one left
            return
        except Unavailable as reason:
            failures.append(f"{source}: {reason}")
            if len(sources) > 1:
                print(failures[-1], file=sys.stderr)
    raise DownloadError(f"no source gave {target.name}: {'; '.join(failures)} (or put the file at {target})")


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """No other process is fetching the target; waits for one that is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is fetching {target.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
