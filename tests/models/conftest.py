"""The tiny policy, whole and fresh for each test that changes it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corrigible.models import LanguagePolicy, load_policy

# The tests are imported one by one, not as a package; this lets them share their examples.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shared_policy() -> LanguagePolicy:
    """tiny-random, for tests that only read."""
    return load_policy("tiny-random")


@pytest.fixture
def policy() -> LanguagePolicy:
    """tiny-random, for tests that change it."""
    return load_policy("tiny-random")
