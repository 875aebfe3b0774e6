"""Folders of Hugging Face's form for tests: the golden ones, put together, and changed ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "hf"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").is_file())
TOKENIZERS = sorted(path.name for path in (GOLDEN / "tokenizers").iterdir())


def golden(name: str, into: Path) -> Path:
    """The golden model's folder, complete with its tokenizer's files, below `into`."""
    folder = into / name
    shutil.copytree(GOLDEN / name, folder)
    for file in tokenizer_folder(name).iterdir():
        if file.name != "expected.json":
            shutil.copy(file, folder)
    return folder


def tokenizer_folder(model: str) -> Path:
    config = json.loads((GOLDEN / model / "config.json").read_text())
    return GOLDEN / "tokenizers" / config["tokenizer_golden"]


def expected_logits(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "expected.npz") as found:
        return dict(found)


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder, after `change` has had the object in one of its JSON files."""
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))
    return folder
