"""The scripts under examples/ run on a tiny model, print what they promise and draw their pictures."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG"


def example(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options", "said", "lines"),
    [
        ("logit_lens", [], "rank of the answer", 7),
        ("steering_vector", ["--tokens", "0"], "log-odds of cheerful words", 7),
        ("train_and_serve_adapter", ["--steps", "10"], "geographer: ", 13),
    ],
)
def test_example(
    name: str,
    options: list[str],
    said: str,
    lines: int,
    fixtures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    plot, model = tmp_path / "plot.png", fixtures / "stories260K" / "model.gguf"
    monkeypatch.setattr(sys, "argv", [name, "-m", str(model), "--plot", str(plot), *options])
    with jax.numpy_rank_promotion("allow"):  # as it is where nothing else was said
        example(name).main()
    out = capsys.readouterr().out
    assert said in out
    assert len(out.splitlines()) == lines
    assert plot.read_bytes().startswith(PNG)


def test_a_layer_that_is_not_there_is_told_at_once(
    fixtures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = fixtures / "stories260K" / "model.gguf"
    monkeypatch.setattr(sys, "argv", ["steering_vector", "-m", str(model), "--layer", "5"])
    with pytest.raises(SystemExit):
        example("steering_vector").main()
    assert "--layer is 5; the model has layers 0 to 4" in capsys.readouterr().err
