"""ppo.py --explain: the numbers on the screen are those that the loop trains with."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import gpt
import ppo
from data.run import read_torch
from helpers import explained, snapshot

ROOT = Path(__file__).parent.parent
SHORT = "--size cpu --iterations 1 --max_new_tokens 16 --rollouts 16".split()


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with a PPO policy and a GRPO policy, after an iteration each."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("explained") / "out")
    ppo.main(["--out", str(out), *SHORT])
    flags = "--name ppo-grpo --method grpo_kl_in_rewards --group 6 --rollouts 18"
    ppo.main(["--out", str(out), *SHORT, *flags.split()])
    return out


def test_ppos_numbers(trained, monkeypatch, capsys):
    """A column off by one token, or of another quantity than its name: log-probabilities, V, and
    what follows from them, KL_t, r_t, δ_t, A_t for three λ and the clipped objective."""
    seen = []
    sample = ppo.sample

    def keep_rollouts(*arguments):
        seen.append(sample(*arguments))
        return seen[-1]

    monkeypatch.setattr(ppo, "sample", keep_rollouts)
    (first, second), _ = explained(ppo, trained, monkeypatch, "--explain")
    policy, _, checkpoint = gpt.load_checkpoint(trained / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
    value_model = ppo.start_from(policy)
    value_model.load_state_dict(checkpoint["value_model"])
    tokens = seen[0].tokens[:1, :int(seen[0].lengths[0])]
    n = int(seen[0].mask[0].sum())
    with torch.no_grad():
        logprobs = gpt.token_logprobs(policy(tokens), tokens)[0, -n:]
        values = value_model(tokens)[0, -n - 1:-1]
    assert first["log π_θ"] == pytest.approx(logprobs.tolist(), abs=1e-5)
    assert first["V(s_t)"] == pytest.approx(values.tolist(), abs=1e-5)

    R = float(seen[0].scores[0])
    kl = [a - b for a, b in zip(first["log π_θ"], first["log π_ref"])]
    r = [-0.2 * x for x in kl]
    r[-1] += R
    V = first["V(s_t)"] + [0.0]
    deltas = [r[t] + V[t + 1] - V[t] for t in range(n)]
    for name, expected in (("KL_t", kl), ("r_t", r), ("δ_t", deltas)):
        assert first[name] == pytest.approx(expected, abs=1e-5), name
    for name, lam in (("A_t", 0.9), ("G_t - V", 1.0)):
        expected = [sum(lam ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        assert first[name] == pytest.approx(expected, abs=1e-4), name

    for t in range(n):
        ratio = second["ρ_t"][t]
        advantage = second["Â_t"][t]
        kept = min(max(ratio, 0.8), 1.2) * advantage
        assert second["min(…)"][t] == pytest.approx(min(ratio * advantage, kept), abs=1e-5)
        assert (second[""][t] == "clipped") == (kept < ratio * advantage)
    assert second["log π_old"] == first["log π_θ"]
    assert f"Σ r_t = {sum(r):.3f} = R(x, y) - β Σ KL_t = {R:.3f} - " in capsys.readouterr().out


def test_a_groups_scores(trained, monkeypatch):
    """GRPO's table of a group and the column of its advantages must be of the same response; a
    traceback where 64 responses are no whole groups."""
    (first, group), _ = explained(ppo, trained, monkeypatch, "--explain", "--name", "ppo-grpo")
    totals = torch.tensor(group["Σ r_t"], dtype=torch.float64)
    assert len(totals) == 6
    assert group["Â_1"] == pytest.approx((totals - totals.mean()).tolist(), abs=1e-5)
    assert first["Â_t"] == pytest.approx([group["Â_1"][0]] * len(first["a_t"]))
    assert sum(first["r_t"]) == pytest.approx(group["Σ r_t"][0], abs=1e-5)


def test_the_readmes_table_is_of_this_format(trained, capsys):
    """A column was added, renamed or rounded otherwise, and the README still shows the old table;
    the command left a file."""
    before = snapshot(trained)
    ppo.main(["--out", str(trained), "--size", "cpu", "--explain"])
    assert snapshot(trained) == before
    printed = capsys.readouterr().out.splitlines()
    shown = (ROOT / "README.md").read_text().splitlines()

    def table(lines):
        """The table's head, and its rows and what is under it with "#" for every number."""
        start = next(i for i, line in enumerate(lines) if line.startswith("a_t "))
        stop = next(i for i in range(start, len(lines)) if lines[i].startswith("J* = "))
        below = next(i for i in range(start, stop) if lines[i].startswith("KL_t, r_t"))
        for line in lines[start + 1:below]:
            assert re.fullmatch(r"\S+( +-?\d+\.\d{3}){9}", line), line
        under = [re.sub(r"-?\d+\.\d+", "#", line) for line in lines[below:stop + 1]]
        return re.split("  +", lines[start]), under

    assert table(printed) == table(shown)


def test_a_run_goes_on_from_another_policy(trained, tmp_path):
    """The policy that the run began from was the reference, and the KL already spent came for free;
    or V began anew."""
    out = shutil.copytree(trained, tmp_path / "out")
    flags = ["--out", str(out), *SHORT]
    ppo.main(flags + ["--start", "ppo", "--name", "ppo-on", "--lr", "1e-9", "--value_lr", "1e-9"])
    on = read_torch(out / "cpu/ppo-on/checkpoint.pt")
    before = read_torch(out / "cpu/ppo/checkpoint.pt")
    for name in ("model", "value_model"):
        for key, x in before[name].items():
            assert torch.allclose(on[name][key], x, atol=1e-6), key
    assert abs(on["metrics"][0]["kl"]) > 1e-4 and before["metrics"][0]["kl"] == 0
    assert "ppo/checkpoint.pt" in on["made_from"]
