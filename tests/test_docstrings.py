"""The worked examples of the docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path.relative_to(ROOT) for folder in (ROOT, ROOT / "data") for path in sorted(folder.glob("*.py"))]
WITH_EXAMPLES = [".".join(path.with_suffix("").parts) for path in FILES if ">>> " in (ROOT / path).read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    """A worked example that no longer works, or never did."""
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted > 0


def test_the_examples_are_found():
    """A search that finds no file runs no example, and nothing fails."""
    assert {"gpt", "ppo", "best_of_n", "data.run", "data.stories", "data.tokenizer"} <= set(WITH_EXAMPLES)
