"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and speech; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("INTQ_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set INTQ_ASSETS")
    return folder
