"""The benchmarks: their arithmetic against torch's own counter, and that they leave nothing behind."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpt
import ppo
from reward_model import RewardModel


@pytest.mark.parametrize("shape", [gpt.GPTConfig(50, 16, 2, 2, 8), gpt.GPTConfig(1024, 128, 4, 4, 128)])
def test_flops_are_torchs(shape):
    """A factor 2 lost, or the output layer forgotten: a utilisation that flatters. Attention is counted apart, at its sdpa."""
    tokens = torch.zeros(3, shape.block_size, dtype=torch.long)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    model, places = RewardModel(shape), int(mask.sum())
    for call, asked, width in ((lambda: model.trunk(tokens), tokens.numel(), shape.vocab_size),
                               (lambda: model.trunk.logits(model.trunk.hidden(tokens, mask)), places, shape.vocab_size),
                               (lambda: model(tokens, mask), places, 1)):
        with FlopCounterMode(display=False) as counter:
            call()
        by_name = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        linear = sum(count for name, count in by_name.items() if "scaled_dot" not in name)
        assert linear == gpt.forward_flops(shape, tokens.numel(), 0, asked, width)
    per_token = gpt.forward_flops(shape, 1, 10, 0, 0) - gpt.forward_flops(shape, 1, 0, 0, 0)
    q, k, v = torch.zeros(1, shape.n_head, 1, 8), torch.zeros(1, shape.n_head, 10, 8), torch.zeros(1, shape.n_head, 10, 8)
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(2, 3)) @ v
    assert per_token * 8 * shape.n_head == counter.get_total_flops() * shape.n_layer * shape.n_embd


def test_median_leaves_the_warm_up_out():
    """A first call that compiles or allocates, counted: the figure tells of the start, not of the work."""
    calls = []
    seconds = gpt.median_seconds(lambda: calls.append(torch.ones(2000, 2000).exp().sum() if not calls else 0), repeats=4)
    assert len(calls) == 5 and 0 <= seconds < 0.01


def test_the_benchmarks_print_and_save_nothing(tmp_path, capsys):
    """A benchmark that overwrites a checkpoint, or whose rows do not add up."""
    out = ["--size", "cpu", "--out", str(tmp_path), "--bench"]
    gpt.main([*out, "--n_layer", "1", "--n_embd", "16", "--block_size", "16", "--vocab_size", "300", "--batch", "2"])
    text = capsys.readouterr().out
    assert len(re.findall(r"[\d,]+ tokens/s, +\d+% of the", text)) == 3 and "peak memory" in text
    ppo.main([*out, "--rollouts", "2", "--minibatch", "2", "--epochs", "1", "--max_new_tokens", "4"])
    rows = re.findall(r"^ +(\d+) +(\d+)((?: +[\d.]+){5}) +[\d,]+$", capsys.readouterr().out, re.M)
    assert [(int(rollouts), int(response)) for rollouts, response, _ in rows] == [(1, 2), (2, 2), (8, 2), (2, 1), (2, 4)]
    for _, _, seconds in rows:
        *parts, total, bound = map(float, seconds.split())
        assert total == pytest.approx(sum(parts), abs=0.05) and bound <= total
    assert list(tmp_path.iterdir()) == []
