"""The worked examples of the docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = []  # of all modules whose text holds an example: "gpt", "data.run"
for path in sorted(ROOT.glob("*.py")) + sorted((ROOT / "data").glob("*.py")):
    if ">>> " in path.read_text(encoding="utf-8"):
        NAMES.append(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    """A worked example that no longer works, or never did; a search that finds no file."""
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted > 0
    assert {"gpt", "ppo", "best_of_n", "data.run", "data.stories", "data.tokenizer"} <= set(NAMES)
