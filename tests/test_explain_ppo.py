"""ppo.py --explain: the numbers on the screen are those that the loop trains with."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import gpt
import ppo
from data.files import InputError
from helpers import snapshot

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with a PPO policy and a GRPO policy, after an iteration each."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("explained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--iterations", "1", "--max_new_tokens", "16"]
    ppo.main(common + ["--rollouts", "16"])
    ppo.main(common + ["--rollouts", "16", "--method", "grpo_kl_in_rewards", "--group", "4",
                       "--name", "ppo-grpo"])
    return out


def explained(out, monkeypatch, *flags):
    """What --explain prints: ({name: column} of each of its tables, the rollouts behind them)."""
    tables = []
    seen = []
    sample = ppo.sample

    def keep_rollouts(*arguments):
        seen.append(sample(*arguments))
        return seen[-1]

    def keep_columns(columns, legend=()):
        tables.append({column.name: column.values for column in columns})

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "sample", keep_rollouts)
        patch.setattr(ppo, "print_columns", keep_columns)
        ppo.main(["--out", str(out), "--size", "cpu", "--explain", *flags])
    return tables, seen[0]


def test_ppos_numbers_add_up(trained, monkeypatch, capsys):
    """A column off by one token, or of another quantity than its name, would teach what no run
    does: KL_t, r_t, δ_t, A_t for three λ and the clipped objective, worked out one by one."""
    (first, second), rollouts = explained(trained, monkeypatch)
    n = int(rollouts.mask[0].sum())
    R = float(rollouts.scores[0])
    assert len(first["a_t"]) == n

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

    # Whitening is over the batch, so it is the same line for every token.
    A = torch.tensor(first["A_t"])
    whitened = torch.tensor(first["whitened"])
    slope = (whitened[1:] - whitened[:-1]) / (A[1:] - A[:-1])
    assert slope.std() < 1e-2 * slope.mean()

    for t in range(n):
        ratio = second["ρ_t"][t]
        advantage = second["Â_t"][t]
        kept = min(max(ratio, 0.8), 1.2) * advantage
        assert second["min(…)"][t] == pytest.approx(min(ratio * advantage, kept), abs=1e-5)
        assert (second[""][t] == "clipped") == (kept < ratio * advantage)
    assert second["log π_old"] == first["log π_θ"]

    printed = capsys.readouterr().out
    assert f"Σ KL_t = {sum(kl):.3f} = " in printed
    assert f"Σ r_t = {sum(r):.3f} = R(x, y) - β Σ KL_t = {R:.3f} - " in printed


def test_the_numbers_are_the_policys_own(trained, monkeypatch):
    """The value model of the checkpoint was the reward model, or the log-probabilities those of
    another temperature: they are compared with a forward pass of the saved models."""
    (first, _), rollouts = explained(trained, monkeypatch)
    path = trained / "cpu/ppo/checkpoint.pt"
    policy, _, checkpoint = gpt.load_checkpoint(path, "ppo", "cpu")
    value_model = ppo.start_from(policy)
    value_model.load_state_dict(checkpoint["value_model"])
    reward_model, _, _ = gpt.load_checkpoint(trained / "cpu/reward_model/checkpoint.pt",
                                             "reward_model", "cpu", model_class=type(value_model))
    tokens = rollouts.tokens[:1, :int(rollouts.lengths[0])]
    with torch.no_grad():
        logprobs = gpt.token_logprobs(policy(tokens), tokens)[0]
        values = value_model(tokens)[0, :-1]
        before = reward_model(tokens)[0, :-1]
    n = len(first["a_t"])
    assert first["log π_θ"] == pytest.approx(logprobs[-n:].tolist(), abs=1e-5)
    assert first["V(s_t)"] == pytest.approx(values[-n:].tolist(), abs=1e-5)
    assert (values - before).abs().max() > 1e-3


def test_a_groups_scores(trained, monkeypatch, capsys):
    """GRPO's table of a group and the column of its advantages must be of the same response."""
    (first, group), _ = explained(trained, monkeypatch, "--name", "ppo-grpo")
    totals = torch.tensor(group["Σ r_t"], dtype=torch.float64)
    assert len(totals) == 4
    assert group["Â_1"] == pytest.approx((totals - totals.mean()).tolist(), abs=1e-5)
    assert first["Â_t"] == pytest.approx([group["Â_1"][0]] * len(first["a_t"]))
    assert sum(first["r_t"]) == pytest.approx(group["Σ r_t"][0], abs=1e-5)
    assert f"mean {totals.mean():.3f}, spread {totals.std(correction=0):.3f}" in \
        capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--lr", "1"], "--lr 1.0: cannot be used with --explain"),
    (["--name", "ppo-none"], "ppo-none/checkpoint.pt: no such checkpoint"),
    (["--prompt", "word " * 200], "exceed the context"),
    (["--prompt", ""], "--prompt: is empty"),
])
def test_what_cannot_be_explained(trained, monkeypatch, flags, words):
    """--explain trained a missing stage, ignored a flag, or left a file."""
    before = snapshot(trained)
    with pytest.raises(InputError) as error:
        explained(trained, monkeypatch, *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert snapshot(trained) == before


def test_the_readmes_table_is_of_this_format(trained, capsys):
    """A column was added, renamed or rounded otherwise, and the README still shows the old table;
    a row or a line under it is wider than 100 columns."""
    ppo.main(["--out", str(trained), "--size", "cpu", "--explain"])
    printed = capsys.readouterr().out.splitlines()
    shown = (ROOT / "README.md").read_text().splitlines()
    assert max(map(len, printed[2:])) <= 100  # the first two are the texts

    def table(lines):
        """The table's head, and its rows and what is under it with "#" for every number."""
        start = next(i for i, line in enumerate(lines) if line.startswith("a_t "))
        names = lines[start].split("  ")
        stop = next(i for i in range(start, len(lines)) if lines[i].startswith("J* = "))
        below = next(i for i in range(start, stop) if lines[i].startswith("KL_t, r_t"))
        for line in lines[start + 1:below]:
            assert re.fullmatch(r"\S+( +-?\d+\.\d{3}){9}", line), line
        under = [re.sub(r"-?\d+\.\d+", "#", line) for line in lines[below:stop + 1]]
        return [name.strip() for name in names if name.strip()], under

    assert table(printed) == table(shown)


def test_a_run_goes_on_from_another_policy(trained, tmp_path):
    """The reference was the policy that the run began from, and the KL that is already spent came
    for free; or V began anew. π_ref stays the SFT model: with --start the first batch has the
    KL of the policy it begins from."""
    out = shutil.copytree(trained, tmp_path / "out")
    flags = ["--out", str(out), "--size", "cpu", "--iterations", "1", "--max_new_tokens", "16",
             "--rollouts", "16"]
    ppo.main(flags + ["--start", "ppo", "--name", "ppo-on", "--lr", "1e-9", "--value_lr", "1e-9"])
    on = torch.load(out / "cpu/ppo-on/checkpoint.pt", weights_only=True)
    before = torch.load(out / "cpu/ppo/checkpoint.pt", weights_only=True)
    sft = torch.load(out / "cpu/sft/checkpoint.pt", weights_only=True)
    for name in ("model", "value_model"):
        for key, x in before[name].items():
            assert torch.allclose(on[name][key], x, atol=1e-6), key
    assert not torch.allclose(on["model"]["wte.weight"], sft["model"]["wte.weight"], atol=1e-6)
    assert abs(on["metrics"][0]["kl"]) > 1e-4 and before["metrics"][0]["kl"] == 0
    assert "ppo/checkpoint.pt" in on["made_from"]

    for start, words in (("ppo", "not this run's own"), ("sft", "must be the --name"),
                         ("dpo", "no such checkpoint")):
        with pytest.raises(InputError, match=words):
            ppo.main(flags + ["--start", start])
    with pytest.raises(InputError, match="was trained with --temperature 1.0"):
        ppo.main(flags + ["--start", "ppo", "--name", "ppo-hot", "--temperature", "0.9"])
