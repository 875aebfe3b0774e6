"""Laws of kept programs: the same bits, found in the same circumstances only, and nothing compiles twice."""

import functools
import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import count_compilations
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import realm_jax
from realm_jax import programs
from realm_jax.programs import Programs


@dataclass(frozen=True)
class Scaled:
    """Stands for a strategy: a static object with a jitted method that takes its state."""

    factor: float

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def step(self, params: dict, state: dict, active: jax.Array) -> tuple[dict, jax.Array]:
        made = jnp.sin(state["x"] @ params["w"]) * jnp.float32(self.factor)
        return {"x": jnp.where(active[:, None], made, state["x"])}, made.sum()


def arguments(rows: int = 8) -> tuple[dict, dict, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    return {"w": jnp.asarray(draw((8, 8)))}, {"x": jnp.asarray(draw((rows, 8)))}, np.arange(rows) % 2 == 0


def forget() -> None:
    """Nothing in this process holds a program: the next one comes from the folder or the compiler."""
    gc.collect()
    jax.clear_caches()


def compiles(source: Programs, function: Callable = Scaled(2.0).step, rows: int = 8) -> bool:
    """Whether the source compiles the function anew."""
    announced: list[None] = []
    given = arguments(rows)
    with count_compilations() as compiled:
        program = source.get(function, *given, on_compile=lambda: announced.append(None))
    assert len(compiled) == len(announced)
    del program
    forget()
    return bool(announced)


@pytest.fixture(autouse=True, scope="module")
def no_other_cache() -> Iterator[None]:
    """Neither JAX's cache on disk nor what other tests compiled: whatever is found here was kept here."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture(autouse=True)
def nobody_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package counts as unchanged, also where somebody edits it while tests run."""
    monkeypatch.setattr(realm_jax, "IMPORTED", float("inf"))


def test_a_kept_program_gives_the_same_bits_and_takes_its_state(tmp_path: Path) -> None:
    step = Scaled(2.0).step
    expected = jax.tree.map(np.asarray, step(*arguments()))
    forget()
    assert compiles(Programs(tmp_path))
    for _ in range(2):
        params, state, active = arguments()
        with count_compilations() as compiled:
            program = Programs(tmp_path).get(step, params, state, active, on_compile=pytest.fail)
            done = program.run(params, state, active)
        assert not compiled
        assert state["x"].is_deleted() and not params["w"].is_deleted()
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, done), expected)
        del program
        forget()


def entries(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".json"]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _foreign(file: Path) -> None:
    """An entry that is whole and says something else."""
    data = pickle.dumps((0, b"no program", None, None))
    file.write_bytes(programs._checksum(file.name, data) + data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _foreign,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_entry_is_replaced(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    assert compiles(Programs(tmp_path)) and not compiles(Programs(tmp_path))
    (entry,) = entries(tmp_path)
    damage(entry)
    assert compiles(Programs(tmp_path))
    if entry.is_file():
        assert not compiles(Programs(tmp_path))


def test_an_entry_of_another_program_is_not_taken(tmp_path: Path) -> None:
    assert compiles(Programs(tmp_path), rows=4)
    (other,) = entries(tmp_path)
    assert compiles(Programs(tmp_path))
    (mine,) = set(entries(tmp_path)) - {other}
    mine.write_bytes(other.read_bytes())
    assert compiles(Programs(tmp_path))


def test_what_decides_the_code_is_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiles(Programs(tmp_path)) and not compiles(Programs(tmp_path))
    assert compiles(Programs(tmp_path), Scaled(3.0).step)
    assert compiles(Programs(tmp_path), rows=4)
    with jax.default_matmul_precision("highest"):
        assert compiles(Programs(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        assert compiles(Programs(tmp_path))
    source = tmp_path / "layers.py"
    monkeypatch.setattr(programs, "_sources", lambda: [source])
    monkeypatch.setattr(programs, "_build", programs._build.__wrapped__)
    for text in ("x @ kernel", "x @ kernel + 1"):
        source.write_text(text)
        assert compiles(Programs(tmp_path)) and not compiles(Programs(tmp_path))


def test_a_process_whose_files_have_changed_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realm_jax, "IMPORTED", 0.0)
    assert compiles(Programs(tmp_path)) and compiles(Programs(tmp_path))


def test_what_a_name_cannot_say_is_refused() -> None:
    hidden = 2.0
    with pytest.raises(AssertionError, match="make them static"):
        Programs().get(jax.jit(lambda x: x * hidden), np.ones(3), on_compile=lambda: None)
    with pytest.raises(AssertionError, match="must say its value"):
        Programs().get(functools.partial(Scaled.step, object()), *arguments(), on_compile=lambda: None)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_of_others_is_not_used(tmp_path: Path) -> None:
    assert compiles(Programs(tmp_path))
    (entry,) = entries(tmp_path)
    for folder in (tmp_path, entry.parent):
        assert folder.stat().st_mode & 0o077 == 0
        folder.chmod(0o777)
        assert compiles(Programs(tmp_path))
        folder.chmod(0o700)
    assert not compiles(Programs(tmp_path))


def test_old_builds_go(tmp_path: Path) -> None:
    for age in range(programs.BUILDS + 2):
        old = tmp_path / f"old{age}"
        old.mkdir()
        os.utime(old, (1e9 - age, 1e9 - age))
    assert compiles(Programs(tmp_path))
    kept = sorted(each.name for each in tmp_path.iterdir())
    assert len(kept) == programs.BUILDS and set(kept) >= {"old0", "old1", "old2"}


def test_the_next_run_expects_the_first_programs(tmp_path: Path) -> None:
    used = [4, 8, 12, 16, 20]
    first = Programs(tmp_path)
    first.expect("this model")
    assert all(compiles(first, rows=rows) for rows in used)
    second, other = Programs(tmp_path), Programs(tmp_path)
    second.expect("this model")
    other.expect("another model")
    assert len(second._expected) == programs.AHEAD and not other._expected
    for future in second._expected.values():
        assert future.result() is not None
    for entry in entries(tmp_path):
        entry.unlink()
    assert [compiles(second, rows=rows) for rows in used] == [False] * 3 + [True] * 2


def test_a_program_of_unknown_origin_is_not_kept(tmp_path: Path) -> None:
    """One that this process has in memory may come from JAX's cache on disk: it cannot be written again."""
    step = Scaled(2.0).step
    held = step(*arguments())
    announced: list[None] = []
    Programs(tmp_path).get(step, *arguments(), on_compile=lambda: announced.append(None))
    assert announced and not entries(tmp_path)
    del held
    forget()
    assert compiles(Programs(tmp_path)) and entries(tmp_path)


RUN = """
import json, sys
import jax.monitoring
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
import realm_jax
from realm_jax import LLM, SamplingParams
realm_jax.IMPORTED = float("inf")
announced = []
llm = LLM(sys.argv[1], on_compile=announced.append, max_num_seqs=5)
params = SamplingParams(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True, logprobs=2)
outputs = llm.generate(["a fox", "b" * 90], params)
print(json.dumps({
    "said": [[output.token_ids, output.logprobs] for output in outputs],
    "announced": announced,
    "compiled": sum("backend_compile" in event for event in events),
    "lowered": sum("jaxpr_to_mlir" in event for event in events),
}))
"""


def run_alone(model: Path, cache: Path, **variables: str) -> dict:
    """What a process of its own says of a generation."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env = {**mine, "REALM_CACHE": str(cache), **variables}
    code = [sys.executable, "-c", RUN, str(model)]
    root = Path(programs.__file__).parents[1]
    done = subprocess.run(code, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.unoptimized
def test_a_second_process_compiles_nothing(tiny_model: Path, tmp_path: Path) -> None:
    first, second = (run_alone(tiny_model, tmp_path) for _ in range(2))
    assert first["compiled"] and len(first["announced"]) == 2
    assert not second["compiled"] and not second["lowered"] and not second["announced"]
    assert second["said"] == first["said"]


@pytest.mark.slow
@pytest.mark.unoptimized
def test_programs_of_jax_own_cache_run_and_are_not_kept(tiny_model: Path, tmp_path: Path) -> None:
    """XLA's CPU backend cannot write a program that it has read: such an entry would fail when it runs."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    said = [run_alone(tiny_model, tmp_path / name, **variables)["said"] for name in ("a", "b", "b")]
    assert said[0] == said[1] == said[2]
    assert len(entries(tmp_path / "a" / "xla")) == 3
    assert not entries(tmp_path / "b" / "xla")
