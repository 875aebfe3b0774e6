"""What a model reference may say, and the known models that ship."""

import re
from pathlib import Path

import pytest

from realm_jax import hub
from realm_jax.errors import RequestError


def test_the_default_model_ships():
    known = hub.known_models()
    model = known[hub.DEFAULT_MODEL]
    assert (model.licence, model.file) == ("Apache-2.0", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    for name, model in known.items():
        wheels = [source for source in model.sources if isinstance(source, hub.WheelMember)]
        assert name == model.name == name.lower()
        assert model.sources
        assert all(re.fullmatch("[0-9a-f]{64}", entry.sha256) for entry in [model, *wheels])


@pytest.mark.parametrize("write", [str, Path])
def test_an_existing_file_is_itself(tmp_path: Path, write: type):
    path = tmp_path / "a model"
    path.touch()
    assert hub.resolve(write(path)) == hub.cached_path(write(path)) == path


def test_a_bare_name_in_this_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    assert hub.resolve("model.gguf") == Path("model.gguf")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nothing/here.gguf", "file not found: nothing/here.gguf"),
        ("here.gguf", "file not found"),
        (Path("here"), "file not found"),
        (".", "is a folder: . (pass the .gguf file"),
        ("/dev/null", "not a regular file"),
        ("x\0.gguf", "not found"),
        ("x" * 5000 + ".gguf", "not"),
        ("gpt-9", "one of: smollm2"),
        ("", "one of: smollm2"),
        ("https://example.org/x.gguf", "not a reference"),
        ("hf:owner/repo", "the form is hf:owner/repo/file.gguf"),
        ("hf:owner/repo/file.bin", "the form is"),
        ("hf:owner/repo/x.gguf@", "the form is"),
        ("hf:owner/repo/a b\n.gguf", "the form is"),
        ("hf:owner/repo/../../x.gguf", "'..'"),
        ("hf:owner/repo//x.gguf", "empty"),
        ("hf:../repo/x.gguf", "the form is"),
        ("hf:owner/repo/x.gguf@a/../../b", "'..'"),
    ],
)
def test_a_reference_that_names_nothing_is_refused(reference: str | Path, words: str):
    for ask in (hub.resolve, hub.cached_path):
        with pytest.raises(RequestError) as failure:
            ask(reference)
        assert words in str(failure.value)
        assert len(str(failure.value).splitlines()) == 1
