"""Strict numerics and runtime shape checks for every test."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("realm_jax", "beartype.beartype")

FIXTURES = Path(os.environ.get("REALM_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Golden data from llama.cpp; tests that need it say so when they skip."""
    if not FIXTURES.is_dir():
        pytest.skip(f"golden data not found: {FIXTURES} (set REALM_FIXTURES)")
    return FIXTURES
