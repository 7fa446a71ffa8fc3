"""The tiny policy's renderer, and the folder on the path so that the tests share their examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corrigible.models import Renderer
from corrigible.models.tiny import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    """ChatML, one token per byte: what a token is can be read off the text."""
    return Renderer(tiny_tokenizer())
