"""`serve.toml`: what is not understood is refused by name."""

import dataclasses
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm_jax.errors import RequestError
from realm_jax.serving.model_entries import OWN
from realm_jax.serving.serve_config import KNOWN, MAX_BYTES, read_serve_config
from realm_jax.serving.tenants import Tenant


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def test_the_example_is_read_and_shows_every_field():
    with resources.as_file(resources.files("realm_jax") / "configs" / "serve.toml") as path:
        config = read_serve_config(path)
        text = path.read_text()
    assert [entry.names for entry in config.models] == [("big", "gpt-4o-mini"), ("small",)]
    assert config.models[0].options == {"ctx_size": 8192, "max_num_seqs": 16} and config.models[0].preload
    assert config.models[0].adapters == {"poet": path.parent / "poet.gguf", "clerk": path.parent / "clerk"}
    assert config.memory == 24 * 10**9 and config.idle_unload == 600
    assert [name for name in (*OWN, *KNOWN) if name not in text] == []
    assert list(config.tenants) == ["team-a", "visitors", "operators"] and config.keys is None
    fields = [field.name for field in dataclasses.fields(Tenant) if field.name != "name"]
    assert [name for name in fields if f"\n{name} = " not in text] == []
    assert config.tenants["visitors"].tokens_per_minute == 20_000
    assert config.tenants["operators"].is_admin and not config.tenants["team-a"].is_admin


def test_defaults_hold_where_a_tenant_says_nothing_else(tmp_path: Path):
    config = read_serve_config(
        written(
            tmp_path,
            'keys = "k.db"\n[defaults]\nweight = 2\nmax_tokens = 7\n[tenants]\na = {}\nb = {weight = 3}',
        )
    )
    assert config.tenants == {
        "a": Tenant("a", weight=2.0, max_tokens=7),
        "b": Tenant("b", weight=3.0, max_tokens=7),
    }
    assert config.keys == tmp_path / "k.db"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenants is empty; add"),
        ("[tenants.a]\nweigth = 1", "tenants.a: unknown field 'weigth'; known: name, models"),
        ("[tenants.a]\nweight = 0", "tenants.a: weight is 0; give a number from 0.001 to 1000"),
        ("[tenants.a]\nmax_tokens = 1.5", "tenants.a: max_tokens is 1.5; give a whole number"),
        ("[tenants.a]\nname = 'b'", "tenants.a: unknown field 'name'; the name stands in the brackets"),
        ("[tenants.'a b']", "tenants.a b: name is 'a b'; a tenant's has 1 to 64"),
        (f"[tenants.{'a' * 9999}]", "name is 'aaaa"),
        ("[tenants.a]\nmodels = 'x'", "tenants.a: models is 'x'; give a list"),
        ("[defaults]\nx = 1\n[tenants.a]", "defaults: unknown field 'x'"),
        ("[tenants]\na = 1", "tenants.a must be a table"),
        ("tenants = 1", "tenants must be a table"),
        ("defaults = []", "defaults must be a table"),
        (
            "port = 80\n[tenants.a]",
            "unknown field 'port'; known: keys, memory, idle_unload, models, defaults, tenants",
        ),
        ("keys = 5\n[tenants.a]", "keys is '5'; give the path of a file"),
        ("[tenants.a]\n[tenants.a]", "Cannot declare"),
        ("x = " + "[" * 5000, "nests too deep"),
        ("\n".join(f"[tenants.t{i}]" for i in range(1001)), "tenants has 1,001; the most is 1,000"),
        ("a." * 500_000 + "a = 1", "has a line of more than 1,000 dots"),
        ("[tenants.a]\nmax_tokens = " + "9" * 9999, "integer string conversion"),
        ("[tenants.a]\nmax_tokens = 0x" + "f" * 9999, "max_tokens is a number of thousands of digits; give"),
        ("#" * (MAX_BYTES + 1), "has more than 1,048,576 bytes"),
        ("models = 1", "models must be tables: [[models]]"),
        ("[[models]]\nname = 'a'", "models[0]: model is missing; give a path"),
        ("[[models]]\nmodel = 5", "models[0]: model is 5; give a path, a known name or hf:..."),
        (
            "[[models]]\nmodel = 'a.gguf'\nctx_sise = 1",
            "models[0]: unknown field 'ctx_sise'; known: name, alia",
        ),
        ("[[models]]\nmodel = 'a.gguf'\nthreads = 1", "models[0]: unknown field 'threads'"),
        ("[[models]]\nmodel = 'a.gguf'\nctx_size = 0", "models[0]: ctx_size is 0; it must be a whole number"),
        ("[[models]]\nmodel = 'a.gguf'\npreload = 1", "models[0]: preload is 1; give true or false"),
        ("[[models]]\nmodel = 'a.gguf'\nname = 'a b'", "name is 'a b'; a name has 1 to 256 characters"),
        ("[[models]]\nmodel = 'a.gguf'\naliases = ['a']", "'a' names two models or adapters"),
        ("[[models]]\nmodel = 'b'\nadapters = {b = 'x'}", "'b' names two models or adapters"),
        ("[[models]]\nmodel = 'b'\nadapters = {c = 1}", "models[0]: adapters.c is 1; give a path"),
        ("[[models]]\nmodel = 'b'\nadapters = 1", "models[0]: adapters must be a table"),
        ("[[models]]\nmodel = 'b'\n" * 65, "models has 65; the most is 64"),
        ("memory = '1X'\n[[models]]\nmodel = 'b'", "memory is '1X'; give a size such as 800M"),
        ("memory = 0\n[[models]]\nmodel = 'b'", "memory is 0; give a size such as 800M"),
        ("idle_unload = 0\n[[models]]\nmodel = 'b'", "idle_unload is 0; give seconds, more than 0"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_field(tmp_path: Path, text: str, message: str):
    path = written(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        read_serve_config(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and message in said and len(said) < len(str(path)) + 400


def test_models_need_no_tenants_and_their_paths_are_the_files(tmp_path: Path):
    text = (
        "[[models]]\nmodel = 'x/a.gguf'\n[[models]]\nmodel = 'hf:o/r/b.gguf'\n[[models]]\nmodel = 'known'\n"
    )
    config = read_serve_config(written(tmp_path, text + "draft_model = '/d.gguf'\n"))
    assert not config.tenants and (config.memory, config.idle_unload) == (None, None)
    assert [entry.names for entry in config.models] == [("a",), ("hf:o/r/b.gguf",), ("known",)]
    assert [entry.model for entry in config.models] == [tmp_path / "x/a.gguf", "hf:o/r/b.gguf", "known"]
    assert config.models[2].draft_model == Path("/d.gguf")


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path):
    with pytest.raises(RequestError, match="No such file"):
        read_serve_config(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match=r"bytes\.toml: .*utf-8"):
        read_serve_config(tmp_path / "bytes.toml")


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_changed_in_the_example_is_read_or_refused_by_name(tmp_path: Path, data: st.DataObject):
    text = (resources.files("realm_jax") / "configs" / "serve.toml").read_text()
    at = data.draw(st.integers(0, len(text)))
    piece = data.draw(st.one_of(st.text("[]{}=\"'.,0-9a\n#", max_size=6), st.text(max_size=3)))
    path = tmp_path / "serve.toml"
    path.write_text(text[:at] + piece + text[at + data.draw(st.integers(0, 30)) :], "utf-8", "surrogatepass")
    try:
        assert all(isinstance(each, Tenant) for each in read_serve_config(path).tenants.values())
    except RequestError as error:
        assert str(error).startswith(str(path))
