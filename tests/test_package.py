"""The wheel holds the whole package and works outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, by the setuptools that is installed: nothing is downloaded."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "realm_jax", source / "realm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source), cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's contents and stands before the checkout on the path."""
    target = tmp_path_factory.mktemp("installed")
    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


def run(*arguments: str, cwd: Path) -> str:
    """What python prints with these arguments; its error output where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    files = [
        path for path in (ROOT / "realm_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("realm_jax/")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_says_what_pyproject_says(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        info = f"realm_jax-{PROJECT['version']}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert f"\nVersion: {PROJECT['version']}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "realm = realm_jax.cli:main" in scripts


def test_the_package_works_outside_the_checkout(installed: Path):
    code = """
import json, realm_jax
from realm_jax import hub
print(json.dumps([realm_jax.__file__, realm_jax.__version__, list(hub.known_models())]))
"""
    file, version, models = json.loads(run("-c", code, cwd=installed))
    assert Path(file) == installed / "realm_jax" / "__init__.py"
    assert version == PROJECT["version"]
    assert "smollm2-135m-instruct" in models


def test_every_public_name_loads(installed: Path):
    run("-c", "import realm_jax; [getattr(realm_jax, name) for name in realm_jax.__all__]", cwd=installed)


def test_the_command_line_starts(installed: Path):
    assert "generate" in run("-m", "realm_jax", "--help", cwd=installed)
