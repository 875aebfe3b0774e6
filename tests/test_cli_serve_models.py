"""Which models `realm serve` has: those of flags, then those of the file."""

from pathlib import Path

import pytest
from command_line import realm

from realm_jax.cli.options import EngineFlags
from realm_jax.cli.serve_models import served_models
from realm_jax.serving.model_entries import ModelEntry
from realm_jax.serving.server.model_loader import ModelLoader

OF_FILE = ModelEntry(("c", "d"), "c.gguf", options={"ctx_size": 64}, preload=True)


def loaders(flags: EngineFlags, *added: str, of_file: tuple[ModelEntry, ...] = ()) -> list[ModelLoader]:
    models = served_models(flags, {"max_num_seqs": 3}, added, of_file, None, warmup=True)
    assert [model.preload for model in models] == [len(models) == 1 or model.name == "c" for model in models]
    found = [model.loader for model in models]
    assert all(isinstance(each, ModelLoader) and each.warmup for each in found)
    return [each for each in found if isinstance(each, ModelLoader)]


def test_flags_come_first_and_each_model_has_its_own_options() -> None:
    flags = EngineFlags(model="x/a.gguf", ctx_size=128, lora=["poet=p.gguf", "f.gguf:0.5"], draft_model="s")
    first, second, third = loaders(flags, "b=hf:o/r/b.gguf", of_file=(OF_FILE,))
    assert first.entry.names == ("a",) and first.entry.adapters == {"poet": Path("p.gguf")}
    assert first.entry.fold == ((Path("f.gguf"), 0.5),) and first.entry.draft_model == "s"
    assert (second.entry.names, second.entry.model) == (("b",), "hf:o/r/b.gguf")
    assert second.entry.draft_model is None and not second.entry.adapters and third.entry is OF_FILE
    options = [each._options(None) for each in (first, second, third)]
    assert [each["ctx_size"] for each in options] == [128, 128, 64]
    assert all(each["max_num_seqs"] == 3 and "lora" not in each for each in options)
    (default,) = loaders(EngineFlags())
    assert default.entry.names == ("smollm2-135m-instruct",) and default.entry.model is None
    assert [each.entry.names for each in loaders(EngineFlags(), of_file=(OF_FILE,))] == [("c", "d")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--add-model", "b"], "--add-model is 'b'; give NAME=REF"),
        (["--add-model", "b=x.gguf", "--add-model", "b=y.gguf"], "'b' names two models or adapters"),
        (["-m", "b.gguf", "--lora", "b=y.gguf"], "'b' names two models or adapters"),
        (
            ["--add-model", "b=x.gguf", "--lora", "p=y.gguf"],
            "--lora is of the model of -m, which is not given",
        ),
        (["--add-model", "b=x.gguf", "--draft-model", "y"], "--draft-model is of the model of -m"),
        (["--add-model", "a b=x.gguf"], "name is 'a b'; a name has 1 to 256 characters and no spaces"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], words: str) -> None:
    done = realm("serve", "--port", "0", *arguments)
    assert done.code in (1, 2) and words in done.error
