"""The wheel holds the whole package and works outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive of a copy of the tree, and a wheel built from that archive.

    By the setuptools that is installed, and without a compiler: nothing is downloaded, no kernel is built.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "realm_jax", source / "realm_jax", ignore=ignored)
    options = ["--no-isolation", "--skip-dependency-check", "--outdir", str(source / "dist")]
    run("-m", "build", *options, str(source), cwd=source, CC="/bin/false", CXX="/bin/false")
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    (path,) = built.glob("*.whl")
    return path


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


def run(*arguments: str, cwd: Path, **variables: str) -> str:
    """What python prints with these arguments; its error output where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    return done.stdout


def files_of_the_package() -> set[str]:
    """Those that belong into an archive, by their paths from the project's folder."""
    files = {path for path in (ROOT / "realm_jax").rglob("*") if path.is_file() and path.suffix != ".so"}
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    """But for the sources of the kernels, and their library, which cannot be built without a compiler."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("realm_jax/")}
    assert packed == {name for name in files_of_the_package() if not name.endswith((".cpp", ".h", ".inl"))}


def test_the_source_archive_holds_what_the_kernels_are_built_from(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= files_of_the_package() | {"setup.py", "pyproject.toml"}


def test_a_package_without_kernels_says_so_and_works(installed: Path):
    code = """
from realm_jax import runtime
from realm_jax.config import EngineConfig
from realm_jax.kernels import native
print(native.problem(), runtime.resolve_numerics(EngineConfig()).kernels, sep="\\n")
"""
    problem, kernels = run("-c", code, cwd=installed).splitlines()
    assert problem == "they were not built when realm-jax was installed, which takes a C++ compiler"
    assert kernels == "xla"


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
