"""The benchmarks: their arithmetic against torch's own counter; they leave nothing behind."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpt
from data import run
from reward_model import RewardModel
from tests import bench


@pytest.mark.parametrize("shape", [gpt.GPTConfig(50, 16, 2, 2, 8),
                                   gpt.GPTConfig(1024, 128, 4, 4, 128)])
def test_flops_are_torchs(shape):
    """A factor 2 lost, or the output layer forgotten: a utilisation that flatters. Attention is
    counted apart."""
    tokens = torch.zeros(3, shape.block_size, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, shape.block_size - 1, generator=generator) < 0.4
    model = RewardModel(shape)
    places = tokens.numel()
    some = int(mask.sum())
    calls = [(lambda: model.trunk(tokens), places, shape.vocab_size),
             (lambda: gpt.masked_logprobs(model.trunk, tokens, mask), some, shape.vocab_size),
             (lambda: model(tokens), places, 1)]
    for call, places, outputs in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        linear = 0
        for name, count in counter.get_flop_counts()["Global"].items():
            if "scaled_dot" not in str(name):
                linear += count
        assert linear == bench.forward_flops(shape, tokens.numel(), 0, places, outputs)
    per_token = bench.forward_flops(shape, 1, 10, 0, 0) - bench.forward_flops(shape, 1, 0, 0, 0)
    q = torch.zeros(1, shape.n_head, 1, 8)
    k, v = torch.zeros(2, 1, shape.n_head, 10, 8)
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(2, 3)) @ v
    assert per_token * 8 * shape.n_head == counter.get_total_flops() * shape.n_layer * shape.n_embd


def test_median_leaves_the_warm_up_out():
    """A first call that compiles or allocates, counted: the figure tells of the start, not of the
    work."""
    calls = []

    def call():
        if not calls:
            torch.ones(2000, 2000).exp().sum()
        calls.append(1)

    seconds = bench.median_seconds(call, repeats=4)
    assert len(calls) == 5 and 0 <= seconds < 0.01


def test_the_benchmarks_print_and_save_nothing(tmp_path, capsys):
    """A benchmark that overwrites a checkpoint, or whose rows do not add up."""
    out = ["--size", "cpu", "--out", str(tmp_path)]
    small = "--n_layer 1 --n_embd 16 --block_size 16 --vocab_size 300 --batch 2".split()
    bench.main(["gpt", *out, *small])
    text = capsys.readouterr().out
    assert len(re.findall(r"[\d,]+ tokens/s, +\d+% of the", text)) == 3
    assert re.search(r"^peak memory [\d,]+ MB$", text, re.M)
    bench.main(["ppo", *out, *"--rollouts 2 --minibatch 2 --epochs 1 --max_new_tokens 4".split()])
    rows = re.findall(r"^ +(\d+) +(\d+)((?: +[\d.]+){5}) +[\d,]+$", capsys.readouterr().out, re.M)
    assert [row[:2] for row in rows] == [("1", "2"), ("2", "2"), ("8", "2"), ("2", "1"), ("2", "4")]
    for _, _, seconds in rows:
        *parts, total, bound = map(float, seconds.split())
        assert total == pytest.approx(sum(parts), abs=0.05) and bound <= total
    assert list(tmp_path.iterdir()) == []


def test_without_a_memory_figure(monkeypatch):
    """Windows tells no peak memory: a line that ends after "peak memory", or a traceback after a
    minute."""
    monkeypatch.setattr(run, "resource", None)
    assert bench.memory_line() == "peak memory unknown"


@pytest.mark.parametrize("argv", [[], ["sft"], ["--help"]])
def test_an_unknown_benchmark_is_one_line(argv):
    """A benchmark that isn't there: nothing printed, status 0."""
    with pytest.raises(SystemExit, match="^bench: say gpt or ppo.*$"):
        bench.main(argv)
