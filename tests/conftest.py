"""What all tests share."""

import shutil

import pytest
import torch

import gpt
import reward_model
import sft
from helpers import enumerable_world, short_demonstrations


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small run faster on one thread, many times faster where the other cores are
    busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world():
    """The world that can be listed; its reference must not be trained."""
    return enumerable_world()


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """A folder with base, SFT and reward model of one layer, trained in seconds; the SFT model
    answers with half a sentence and ends. It must not be written to."""
    out = tmp_path_factory.mktemp("stages")
    common = ["--out", str(out), "--size", "cpu"]
    gpt.main(common + "--n_layer 1 --n_head 2 --n_embd 32 --steps 20 --batch 8".split())
    data = out / "demonstrations.jsonl"
    short_demonstrations(data)
    flags = "--batch 16 --lr 1e-2 --epochs 2 --max_new_tokens 16 --seed 2"
    sft.main(common + ["--data", str(data)] + flags.split())
    flags = "--pairs 64 --held_out 16 --batch 8 --epochs 2 --max_new_tokens 16"
    reward_model.main(common + flags.split())
    return out


@pytest.fixture
def out(stages, tmp_path):
    """A copy of it, to write to."""
    return shutil.copytree(stages, tmp_path / "out")
