"""The benchmarks: their arithmetic against torch's own counter; they leave nothing behind."""

import functools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpt
from data import run
from reward_model import RewardModel
from tests import bench


def counted(call, *arguments):
    """The floating-point operations of a call but for attention's, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if "scaled_dot" not in str(name))


def test_flops_are_torchs():
    """A factor 2 lost, or the output layer forgotten: a utilisation that flatters."""
    shape = gpt.GPTConfig(50, 16, n_layer=2, n_head=2, n_embd=16)
    model = RewardModel(shape)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    mask = torch.arange(45).view(3, 15) % 5 < 2
    some = counted(gpt.masked_logprobs, model.trunk, tokens, mask)
    assert some == bench.forward_flops(shape, 48, 0, 18, 50)
    assert counted(model, tokens) == bench.forward_flops(shape, 48, 0, 48, 1)
    attention = bench.forward_flops(shape, 1, 10, 0, 0) - bench.forward_flops(shape, 1, 0, 0, 0)
    q, k, v = torch.zeros(3, 2, 10, 8)  # of two heads
    assert attention == shape.n_layer * counted(lambda: (q[:, :1] @ k.transpose(1, 2)) @ v)


def test_the_benchmarks_print_and_save_nothing(tmp_path, capsys, monkeypatch):
    """A benchmark that overwrites a checkpoint, or whose rows do not add up; a first call, which
    compiles or allocates, that is counted; "peak memory" without a figure, on Windows."""
    calls = []
    assert 0 <= bench.median_seconds(lambda: calls.append(1), repeats=4) < 0.01 and len(calls) == 5
    monkeypatch.setattr(bench, "median_seconds", functools.partial(bench.median_seconds, repeats=1))
    out = ["--size", "cpu", "--out", str(tmp_path)]
    small = "--n_layer 1 --n_embd 16 --block_size 16 --vocab_size 300 --batch 2".split()
    bench.main(["gpt", *out, *small])
    text = capsys.readouterr().out
    assert len(re.findall(r"[\d,]+ tokens/s, +\d+% of the", text)) == 3
    assert re.search(r"^peak memory [\d,]+ MB$", text, re.M)

    monkeypatch.setattr(run, "resource", None)
    shape = gpt.GPTConfig(300, 16, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setattr(bench, "shape_of", lambda config: shape)
    bench.main(["ppo", *out, *"--rollouts 2 --minibatch 2 --epochs 1 --max_new_tokens 4".split()])
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(\d+)((?: +[\d.]+){5}) +[\d,]+$", printed, re.M)
    assert [row[:2] for row in rows] == [("1", "2"), ("2", "2"), ("8", "2"), ("2", "1"), ("2", "4")]
    for _, _, seconds in rows:
        *parts, total, bound = map(float, seconds.split())
        assert total == pytest.approx(sum(parts), abs=0.02) and bound <= total
    assert "\npeak memory unknown" in printed and list(tmp_path.iterdir()) == []
