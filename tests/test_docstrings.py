"""The worked examples of the docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_with_examples():
    """The names of all modules whose text holds an example: "gpt", "data.run"."""
    names = []
    for path in sorted(ROOT.glob("*.py")) + sorted((ROOT / "data").glob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    """A worked example that no longer works, or never did."""
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted > 0


def test_the_examples_are_found():
    """A search that finds no file runs no example, and nothing fails."""
    expected = {"gpt", "ppo", "best_of_n", "data.answer_key", "data.run", "data.stories",
                "data.tokenizer"}
    assert expected <= set(modules_with_examples())
