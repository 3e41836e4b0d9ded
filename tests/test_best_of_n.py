"""best_of_n.py against the lecture's matrix and numbers, enumeration and brute force."""

import copy
import itertools
import math
import random
import re
import shutil
import statistics

import numpy as np
import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from best_of_n import (Policy, Samples, best_of_n_kl, forgetting, select, sequence_logprobs,
                       top_k_overall, top_per_prompt)
from data import stories
from data.annotator import step_ends
from data.answer_key import (best_of_n_win_rate, cell, optimality_gap, subset_weights, win_rate)
from data.files import InputError, hold_out, read_demonstrations, read_pairs, write_jsonl
from data.run import Run, read_torch, write_torch
from data.tokenizer import Tokenizer, encode_demonstrations
from gpt import Rollout, load_checkpoint, pad, save_checkpoint, token_logprobs
from helpers import cpu_only, metrics, noise, snapshot, tiny_gpt
from reward_model import RewardModel

MATRIX = torch.tensor([[0.7, 0.3, 0.5, 0.2],        # ECE 7115, "Rejection Sampling"
                       [0.4, 0.8, 0.6, 0.5],        # 5 prompts, 4 completions
                       [0.9, 0.3, 0.4, 0.7],
                       [0.2, 0.5, 0.8, 0.6],
                       [0.5, 0.4, 0.3, 0.6]])


# --------------------------------------------------------------------------------------------------
# Selection


def test_top_per_prompt_of_the_lecture():
    """The best over the wrong axis: the slide has S(R) = [1, 2, 1, 3, 4], counted from 1."""
    assert (top_per_prompt(MATRIX) + 1).tolist() == [1, 2, 1, 3, 4]


def test_top_overall_of_the_lecture():
    """Worst for best, or row and column swapped: "Prompt 3 gets two completions (0.9 and 0.7),
    while prompt 5 gets none"."""
    best = top_k_overall(MATRIX, 5)
    rewards = [MATRIX[i, j].item() for i, j in best.tolist()]
    assert rewards == pytest.approx([0.9, 0.8, 0.8, 0.7, 0.7])
    prompts = (best[:, 0] + 1).tolist()
    assert prompts.count(3) == 2 and prompts.count(5) == 0
    assert {tuple(pair) for pair in best.tolist()} == {(2, 0), (1, 1), (3, 2), (0, 0), (2, 3)}
    assert len(top_k_overall(MATRIX, 20)) == 20  # all of them, each once
    assert len({tuple(pair) for pair in top_k_overall(MATRIX, 20).tolist()}) == 20


# --------------------------------------------------------------------------------------------------
# Best-of-n's divergence


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def law_of_best_of_n(p, n):
    """The exact distribution of the best of n draws, by going through all of them; p in increasing
    order of reward."""
    law = torch.zeros_like(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        law[max(draws)] += math.prod(p[i].item() for i in draws)
    return law


def test_best_of_n_kl_bounds_the_exact_one():
    """log n alone, or log n - 1 + n: the figure is in the yardstick's tables as best-of-N's KL."""
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    for seed, n in itertools.product(range(3), (1, 2, 3, 4)):
        p = noise(seed, 5).double().softmax(0)
        law = law_of_best_of_n(p, n)
        assert law.sum().item() == pytest.approx(1)
        assert kl(law, p) <= best_of_n_kl(n) + 1e-12
    for n in (2, 4, 16, 64):  # many equally likely responses: the bound is reached, from below
        size = 100_000
        rank = torch.arange(size + 1, dtype=torch.float64) / size
        law = (rank ** n).diff()  # P(best is the k-th) = F(k)^n - F(k-1)^n
        exact = kl(law, torch.full((size,), 1 / size, dtype=torch.float64))
        assert best_of_n_kl(n) - 0.01 < exact <= best_of_n_kl(n)


# --------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with all stages, PPO and DPO too."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("trained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "16"]
    ppo.main(common + "--iterations 2 --rollouts 8 --minibatch 4 --lr 1e-3".split())
    dpo.main(common + "--batch 8".split())
    return out


def run(out, capsys, *flags):
    best_of_n.main(["--out", str(out), "--size", "cpu", "--max_new_tokens", "16", *flags])
    return capsys.readouterr().out


def without_seconds(printed):
    """What the yardstick printed, without the seconds that it took."""
    return re.sub(r" in \d+ s$", "", printed, flags=re.M)


def table_of(printed, heading):
    """The lines of the table under the first line that holds `heading`, up to a blank one."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if heading in line)
    return list(itertools.takewhile(str.strip, lines[start + 1:]))


def watch_draw(monkeypatch):
    """What is drawn from here on: [(arguments, Samples), ...]."""
    drawn = []
    draw = best_of_n.draw

    def watched(*arguments):
        samples = draw(*arguments)
        drawn.append((arguments, samples))
        return samples

    monkeypatch.setattr(best_of_n, "draw", watched)
    return drawn


def taste(rollout, tokenizer):
    """An annotator for models that learnt nothing: they would all get the same from ours."""
    return torch.tensor([sum(row) % 17 / 4 for row in rollout.responses()])


def test_sequence_logprobs_keep_the_order_of_the_samples():
    """Rows sorted by length and not put back, or a temperature left out: log π of another response
    or policy."""
    model = tiny_gpt(0, vocab=11)
    rollouts = []
    expected = []
    with torch.no_grad():
        model.wte.weight *= 10  # so that a temperature matters
        for seed, size in ((0, 300), (1, 7)):
            rng = random.Random(seed)
            rows = [[rng.randrange(11) for _ in range(rng.randint(4, 32))] for _ in range(size)]
            prompt_lengths = [rng.randint(1, 3) for _ in rows]
            tokens, lengths = pad(rows)
            rollouts.append(Rollout(tokens, torch.tensor(prompt_lengths), lengths))
            for row, start in zip(rows, prompt_lengths):
                tokens = torch.tensor([row])
                logits = model(tokens)
                expected.append([
                    token_logprobs(logits, tokens, temperature)[0, start - 1:].sum().item()
                    for temperature in (1.0, 0.5)])
    expected = torch.tensor(expected)
    assert ((expected[:, 0] - expected[:, 1]).abs() > 0.01).float().mean() > 0.95
    for column, temperature in enumerate((1.0, 0.5)):
        found = sequence_logprobs(Policy(model, temperature), rollouts)
        assert torch.allclose(found, expected[:, column], rtol=1e-4)


def test_prompt_prints_candidates_and_the_winner(trained, capsys):
    """A winner that isn't the best candidate, or an annotator asked for a prompt that it cannot
    judge."""
    line = r"^ *([+-]\d+\.\d{3})(  gold +[+-]\d+\.\d{3})?  (.*)$"
    for prompt, gold in (("Tell me a story about a shy fox and a kite.", True),
                         ("Who are you?", False)):
        printed = run(trained, capsys, "--prompt", prompt, "--n", "6")
        candidates = re.findall(line, printed, re.M)
        rewards = [float(reward) for reward, _, _ in candidates]
        assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
        assert all(bool(found) == gold for _, found, _ in candidates)
        assert f"winner of 6: {candidates[0][2]}\n" in printed
    printed = run(trained, capsys, "--prompt", "Why?", "--n", "6", "--missing_end_score", "99")
    assert "note    sft: finished responses score less than unfinished ones" in printed


def test_candidates_of_no_prompt(tmp_path):
    """--n without a prompt, which starts the minutes of the yardstick, whose N it does not set."""
    with pytest.raises(InputError, match="--n 4: goes with --prompt or --finetune only"):
        best_of_n.main(["--out", str(tmp_path), "--size", "cpu", "--n", "4",
                        "--data", "found-wrong-later.jsonl"])


def test_found_before_the_sampling(trained, tmp_path, monkeypatch):
    """A folder that cannot be written to, found after minutes of sampling, whose tables are lost; a
    blank in a list of policies; β = 0, which gave tables of nan."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "cpu/best_of_n", ignore_errors=True)
    (out / "cpu/best_of_n").write_text("a file")
    monkeypatch.setattr(best_of_n, "draw", None)
    flags = ["--size", "cpu", "--out", str(out), "--policies"]
    with pytest.raises(FileExistsError):
        best_of_n.main([*flags, "ppo, dpo"])
    with pytest.raises(InputError, match="--beta 0.0: must be positive"):
        best_of_n.main([*flags, "ppo", "--beta", "0"])


def test_prompt_that_does_not_fit(trained, capsys):
    """A long prompt ends in a traceback out of the sampler."""
    with pytest.raises(InputError, match="a prompt of .* exceed the context of 128"):
        run(trained, capsys, "--prompt", "long " * 200)


@cpu_only
def test_yardstick(trained, capsys):
    """A table that changes from run to run, a policy left out, a stage written over, nan in the
    figures."""
    before = snapshot(trained)
    flags = "--prompts 3 --samples 8 --sample_batch 5".split()  # a batch ends within a prompt
    printed = run(trained, capsys, *flags)
    rows = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    table = {row["policy"]: row for row in rows if "under" not in row}
    assert list(table) == ["sft", "best of 4", "ppo", "dpo"]
    assert table["sft"]["kl"] == 0
    assert table["best of 4"]["kl"] == pytest.approx(best_of_n_kl(4))
    assert table["best of 4"]["reward"] > table["sft"]["reward"]
    figures = {"reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"}
    for row in table.values():
        assert set(row) == {"policy"} | figures | {f"{name}_error" for name in figures}
        assert row["distinct_2_error"] is None
        assert all(row[f"{name}_error"] >= 0 for name in figures - {"distinct_2"})
        assert 0 <= row["win_rate"] <= 1 and 0 <= row["ended"] <= 1 and 1 <= row["length"] <= 16
    assert sum(row["policy"] == "frontier" for row in rows) == 30
    ladder = {row["policy"]: row for row in rows if row.get("under") == "best of N"}
    assert list(ladder) == [f"best of {n}" for n in (1, 2, 4, 8)]
    for name in ("reward", "gold", "kl", "length"):
        assert ladder["best of 4"][name] == table["best of 4"][name]

    judges = ("reward model", "gold")
    optima = [row for row in rows if row.get("under") in judges and row["policy"] != "frontier"]
    names = [(row["under"], row["policy"]) for row in optima]
    assert names == list(itertools.product(judges, table))
    shares = ("share", "left_by_policy", "lost_to_reward_model")
    for row in optima:
        field = "reward" if row["under"] == "reward model" else "gold"
        of_policy = table[row["policy"]]
        J = of_policy[field] - 0.2 * of_policy["kl"]  # with the README's beta
        assert row["J"] == pytest.approx(J, abs=1e-4)
        for name in ("J", "J_star", "J_star_kl", "reward_model_J", *shares):
            assert row[f"{name}_error"] >= 0
        assert sum(row[name] for name in shares) == pytest.approx(1, abs=1e-4)
        assert row["lost_to_reward_model"] > -1e-6 and 1 <= row["effective_samples"] <= 32
        if row["under"] == "reward model":
            assert row["reward_model_J"] == pytest.approx(row["J_star"], abs=1e-5)
        else:
            block = re.search(r"where gold is lost(.|\n)*?\n\n", printed).group()
            J = cell(row["reward_model_J"], row["reward_model_J_error"])
            assert f"J = {J} under gold" in block
            parts = [cell(row[name], row[f"{name}_error"], ".1%") for name in shares]
            assert re.search(rf"^{row['policy']} +{' +'.join(parts)}$", block, re.M)

    loss = {row["policy"]: row["loss"] for row in rows if row.get("under") == "pretraining"}
    assert list(loss) == ["base", "sft", "ppo", "dpo"]
    assert ", ".join(f"{name} {x:.3f}" for name, x in loss.items()) in printed
    last = read_torch(trained / "cpu/gpt/checkpoint.pt")["metrics"][-1]
    assert loss["base"] == last["held_out"]
    assert table["sft"]["win_rate"] == pytest.approx(0.5)
    assert table["sft"]["win_rate_error"] == pytest.approx(0, abs=1e-6)
    assert "How close to the best" in printed and all(name in printed for name in table)
    assert "the little world: 3 held-out prompts; 8 samples each, 16 of SFT" in printed
    tables = printed[printed.index("sampled dpo"):printed.index("\nsaved ")]
    assert max(map(len, tables.splitlines())) <= 100
    assert re.search(r"^ +reward +gold +win_rate +kl +length +distinct_2 +ended$", tables, re.M)
    assert re.search(r"^sft +-?\d\.\d\d ± \d\.\d\d .* 50\.0 ± 0\.0 % +0\.00 ± 0\.00 +\d+ "
                     r"+[01]\.\d\d +\d+ %$", tables, re.M)
    assert re.findall(r"^(.*) in \d+ s$", printed, re.M) == [
        "sampled sft: 48", "sampled ppo: 24", "sampled dpo: 24",
        "log-probabilities under every policy: 9"]

    after = snapshot(trained)
    assert {path: after[path] for path in before} == before
    assert without_seconds(run(trained, capsys, *flags)) == without_seconds(printed)
    assert snapshot(trained) == after
    base, tokenizer, _ = load_checkpoint(trained / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    again = forgetting([dict(held_out=0.0)], {"gpt": Policy(base)}, tokenizer)
    assert again["gpt"] == pytest.approx(loss["base"])  # on the same documents as pretraining


def test_the_yardstick_asks_reserved_requests(trained, capsys, monkeypatch):
    """Requests that may have occurred in training, one in 32 of them at least, or others for every
    seed."""
    drawn = watch_draw(monkeypatch)
    for seed in "1", "2":
        run(trained, capsys, *f"--prompts 40 --samples 1 --policies , --seed {seed}".split())
    first, second = (arguments[4] for arguments, _ in drawn)
    assert first == second and len(set(first)) == 40 and all(map(stories.is_held_out, first))


@cpu_only
def test_yardstick_figures_are_of_the_samples(trained, tmp_path, monkeypatch):
    """One policy's gold beside another's, ours and theirs swapped in the win rate, all rows of
    best-of-N with the same N, or an own J* with the log-ratios of another policy."""
    out = shutil.copytree(trained, tmp_path / "out")
    drawn = watch_draw(monkeypatch)
    monkeypatch.setattr(best_of_n, "gold_rewards", taste)
    best_of_n.main(["--out", str(out), "--size", "cpu",
                    *"--max_new_tokens 16 --prompts 3 --samples 16".split()])
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    found = {(row.get("under"), row["policy"]): row for row in rows}
    models = []
    for name in ("sft", "ppo", "dpo"):
        models.append(load_checkpoint(out / "cpu" / name / "checkpoint.pt", name, "cpu")[0])
    samples = [samples for _, samples in drawn]
    assert [x.figures["gold"].shape for x in samples] == [(3, 32), (3, 16), (3, 16)]
    reward = samples[0].figures["reward"]
    gold = samples[0].figures["gold"]
    assert gold.std() > 0.5

    for name, n in (("sft", 1), ("best of 4", 4), ("best of 16", 16)):
        expected = best_of_n_win_rate(reward, gold, n).mean().item()
        assert found[None, name]["win_rate"] == pytest.approx(expected)
        mean = (subset_weights(reward, n) * gold).sum(dim=1).mean().item()
        assert found["gold", name]["J"] == pytest.approx(mean - 0.2 * best_of_n_kl(n))
    for name, model, other in zip(("ppo", "dpo"), models[1:], samples[1:]):
        wins = win_rate(other.figures["gold"], gold).mean().item()
        assert found[None, name]["win_rate"] == pytest.approx(wins)
        log_ratios = sequence_logprobs(Policy(model), other.rollouts)
        log_ratios = log_ratios - sequence_logprobs(Policy(models[0]), other.rollouts)
        for under, field in (("gold", "gold"), ("reward model", "reward")):
            J, J_star = optimality_gap(other.figures[field], log_ratios.view(3, 16), 0.2)
            row = found[under, name]
            assert row["J"] == pytest.approx(J.mean().item(), abs=1e-5)
            assert row["own_J_star"] == pytest.approx(J_star.mean().item(), abs=1e-5)


def test_who_is_right_how_often(trained, tmp_path, monkeypatch, capsys):
    """A pass@16 of the mean over all prompts, where easy ones make up for hard ones; J* of SFT's
    mean rate instead of each prompt's; an unfinished response that is right."""
    M = 3
    N = 16
    right = []

    def verifier(asked):
        right.append([float(len(text) % (2 + len(prompt) % 3) == 0) for prompt, text in asked])
        return right[-1]

    drawn = watch_draw(monkeypatch)
    monkeypatch.setattr(best_of_n, "verifier", verifier)
    out = shutil.copytree(trained, tmp_path / "out")
    flags = f"--verify --policies ppo --prompts {M} --samples {N} --beta 0.5"
    printed = run(out, capsys, *flags.split())
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    found = {row["policy"]: row for row in rows if row.get("under") == "verifier"}
    kl = next(row["kl"] for row in rows if row["policy"] == "ppo")
    verified = []
    for x, (_, samples) in zip(right, drawn):
        verified.append(torch.tensor(x).view(M, -1) * samples.figures["ended"])
    assert [x.shape[1] for x in verified] == [32, 16] and list(found) == ["sft", "ppo"]
    p = verified[0].mean(dim=1).tolist()
    J_star = statistics.mean(0.5 * math.log(1 - x + x * math.exp(2)) for x in p)
    for (name, row), x in zip(found.items(), verified):
        count = x.shape[1]
        wrong = (1 - x).sum(dim=1).int().tolist()
        passed = [1 - math.comb(k, 16) / math.comb(count, 16) for k in wrong]
        assert row["verified"] == pytest.approx(x.mean().item()) and 0.05 < row["verified"] < 0.95
        assert row["pass_16"] == pytest.approx(statistics.mean(passed), abs=1e-6)
        assert row["J_star"] == pytest.approx(J_star, abs=1e-5) and len(set(p)) > 1
        price = 0.5 * kl if name == "ppo" else 0.0
        assert row["J"] == pytest.approx(row["verified"] - price, abs=1e-5)
    block = printed.split("under the verifier")[1]
    assert "pass_16" in block and "ppo, J under verifier" in printed
    assert "verified" not in run(out, capsys, *"--policies ppo --prompts 3 --samples 4".split())


@cpu_only
def test_best_of_n_by_the_process_model(trained, tmp_path, monkeypatch, capsys):
    """Candidates chosen by one model's score of other samples, or shown with the process model's
    scores as the reward; an unfinished answer whose few steps are all good wins."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/reward_model/checkpoint.pt", "reward_model",
                                          "cpu", model_class=RewardModel)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(70))
    (out / "cpu/process_model").mkdir()
    path = out / "cpu/process_model/checkpoint.pt"
    save_checkpoint(path, "process_model", "cpu", model, tokenizer)
    drawn = watch_draw(monkeypatch)
    monkeypatch.setattr(best_of_n, "gold_rewards", taste)
    run(out, capsys, *"--process --policies , --prompts 3 --samples 8".split())
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    found = {row["policy"]: row for row in rows if "under" not in row}
    assert list(found) == ["sft", "best of 4", "best of 4, smallest", "best of 4, product",
                           "best of 4, sum"]

    (_, samples), = drawn
    scores = []         # the sum of the steps, response by response
    for rollout in samples.rollouts:
        starts = rollout.prompt_lengths.tolist()
        for row, start, length in zip(rollout.tokens.tolist(), starts, rollout.lengths.tolist()):
            row = row[:length]
            ends = []
            if row[-1] == tokenizer.end_token:
                ends = step_ends(tokenizer.pieces(row[start:-1]))
            with torch.no_grad():
                values = model(torch.tensor([row]))[0]
            score = sum(values[start + end].item() for end in ends)
            scores.append(score if ends else -math.inf)
    scores = torch.tensor(scores).view(samples.figures["reward"].shape)
    assert 0 < scores.isinf().sum() < scores.numel()
    weights = subset_weights(scores, 4)
    for name in ("reward", "gold", "ended"):
        expected = (weights * samples.figures[name]).sum(dim=1).mean().item()
        assert found["best of 4, sum"][name] == pytest.approx(expected, abs=1e-4)

    with pytest.raises(InputError, match="--process True: cannot be used with --data"):
        run(out, capsys, "--process", "--data", str(tmp_path / "prompts.jsonl"))
    shutil.rmtree(out / "cpu/process_model")
    with pytest.raises(InputError, match="process_model/checkpoint.pt: no such checkpoint"):
        run(out, capsys, "--process")


def test_yardstick_on_somebodys_own_prompts(trained, tmp_path, capsys, monkeypatch):
    """Gold columns for prompts that the annotator cannot judge; prompts too long for the context,
    or trained on."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)]
    rows += [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(path, rows)
    held_out = hold_out(rows)[1]
    short = [row["prompt"] for row in held_out if "long" not in row["prompt"]]
    assert 0 < len(short) < len(held_out)  # so the test sees both kinds
    flags = ["--data", str(path), "--samples", "4", "--policies", "dpo"]
    drawn = watch_draw(monkeypatch)
    printed = run(trained, capsys, *flags)
    assert [arguments[4] for arguments, _ in drawn] == [short] * 2  # SFT and DPO, each once
    dropped = len(held_out) - len(short)
    assert (f"held out of {path}: {len(short)} prompts, dropped {dropped} that leave no "
            f"room for 16 new tokens; {len(short)} of them; 4 samples each, 8 of SFT\n") in printed
    assert "gold" not in printed and "win_rate" not in printed
    found = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    table = [row["policy"] for row in found if "under" not in row]
    assert table == ["sft", "best of 4", "dpo"]
    assert {row["under"] for row in found if "under" in row} == {"reward model", "best of N"}

    before = snapshot(trained)
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)],
                          "no prompt leaves room"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            run(trained, capsys, *flags)
    assert snapshot(trained) == before


@pytest.mark.parametrize("stage", [sft, reward_model, ppo, dpo, best_of_n],
                         ids=lambda stage: stage.__name__)
def test_a_wrong_file_is_found_before_anything_is_trained(stage, tmp_path):
    """A typing error in the file's name that comes out after the minutes which the missing stages
    took."""
    for argv in (["--data", str(tmp_path / "none.jsonl")], ["--data", str(tmp_path)]):
        with pytest.raises(InputError, match=str(tmp_path)):
            stage.main(["--out", str(tmp_path / "out"), "--size", "cpu", *argv])
    assert not (tmp_path / "out").exists()


def test_every_stage_holds_out_the_same_prompts(trained, tmp_path, capsys, monkeypatch):
    """A prompt that one stage trains on and another one measures itself on: its figure is what was
    learnt by heart."""
    path = tmp_path / "pairs.jsonl"
    names = [f"Who sings {i}?" for i in range(30)]
    rows = []
    for name in random.Random(0).sample(names, 30):
        if name.endswith("7?"):  # three prompts have two rows, one too long for all but PPO
            rows.append({"prompt": name, "chosen": "Yes. " * 200, "rejected": "No."})
        rows.append({"prompt": name, "chosen": "Yes.", "rejected": "No."})
    write_jsonl(path, rows)
    out = shutil.copytree(trained, tmp_path / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "4", "--data", str(path)]
    tokenizer = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1]
    seen = {"sft": set(), "reward_model": set(), "ppo": set(), "dpo": set()}

    def spy(module, name, position):
        """Note the prompts of the sequences of ids that a function is called with while it
        trains."""
        original = getattr(module, name)

        def spying(*arguments, **keywords):
            if torch.is_grad_enabled() or module is ppo:
                for ids in arguments[position]:
                    for sequence in ids[:2] if isinstance(ids[0], list) else [ids]:
                        prompt = sequence[1:sequence.index(tokenizer.assistant_token)]
                        seen[module.__name__].add(tokenizer.decode(prompt))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, spying)

    spy(sft, "pad", 0)
    spy(reward_model, "pad", 0)
    spy(dpo, "pair_logprobs", 1)
    spy(ppo, "generate", 1)
    sft.main(common)
    reward_model.main(common)
    ppo.main(common + "--iterations 1 --rollouts 400 --minibatch 400 --micro_batch 400 "
                      "--epochs 1".split())
    dpo.main(common)
    held_out = {stage: set(names) - prompts for stage, prompts in seen.items()}
    assert held_out["sft"] == {row["prompt"] for row in hold_out(rows)[1]}
    assert all(prompts == held_out["sft"] for prompts in held_out.values())
    pairs = read_pairs(out / "cpu/reward_model/held_out.jsonl")
    assert {row["prompt"] for row in pairs} == held_out["sft"]

    drawn = watch_draw(monkeypatch)
    best_of_n.main(common + ["--samples", "4"])
    # SFT, PPO and DPO are compared on prompts that none of them has seen.
    assert [set(arguments[4]) for arguments, _ in drawn] == [held_out["sft"]] * 3


def test_draws_come_from_the_given_generator(trained, monkeypatch):
    """One seed for every batch, or for every policy: the samples are then copies, and their errors
    hidden."""
    model, tokenizer, _ = load_checkpoint(trained / "cpu/sft/checkpoint.pt", "sft", "cpu")
    path = trained / "cpu/reward_model/checkpoint.pt"
    scorer, _, _ = load_checkpoint(path, "reward_model", "cpu", model_class=RewardModel)
    config = best_of_n.Config(size="cpu", max_new_tokens=16, sample_batch=4)
    seeds = []
    generate = best_of_n.generate

    def watched(*arguments, seed):
        seeds.append(seed)
        return generate(*arguments, seed=seed)

    def texts(rng):
        prompts = ["Who sings?"] * 2
        return best_of_n.draw("sft", Policy(model), scorer, tokenizer, prompts, 6, config, False,
                              rng).texts

    monkeypatch.setattr(best_of_n, "generate", watched)
    rng = random.Random(0)
    first = texts(rng)
    second = texts(rng)
    assert len(first) == 12 and len(set(seeds)) == len(seeds) == 6  # 3 batches each
    assert first[:4] != first[4:8] and first != second
    random.seed()
    assert texts(random.Random(0)) == first and seeds[6:] == seeds[:3]


def test_policies_are_compared_at_their_own_temperature(trained, tmp_path, capsys, monkeypatch):
    """A policy that was trained at one temperature, sampled or scored at another: its J is that of
    a policy that was never trained. And shares that were reached under another price or penalty,
    with no word about it. A policy that is named twice is one."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name, settings in (("ppo", {}),
                           ("ppo-hot", dict(temperature=1.5, missing_end_score=-2.0, beta=0.3))):
        (out / "cpu" / name).mkdir(exist_ok=True)
        path = out / "cpu" / name / "checkpoint.pt"
        save_checkpoint(path, "ppo", "cpu", model, tokenizer, **settings)
    temperatures = []
    generate = best_of_n.generate

    def watched(*arguments, seed):
        temperatures.append(arguments[4])
        return generate(*arguments, seed=seed)

    monkeypatch.setattr(best_of_n, "generate", watched)
    printed = run(out, capsys, "--prompts", "4", "--samples", "16",
                  "--policies", "ppo,ppo-hot,ppo,ppo-hot")
    assert temperatures == [1.0, 1.0, 1.5]
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    rows = {row["policy"]: row for row in rows if "under" not in row}
    hot = rows["ppo-hot"]
    assert rows["ppo"]["kl"] == 0 and hot["kl"] > 5 * hot["kl_error"] > 0  # both have SFT's weights
    assert re.findall(r"^.* was trained with .*$", printed, re.M) == [
        "ppo-hot was trained with beta 0.3; J and J* are those of beta 0.2",
        "ppo-hot was trained with missing_end_score -2.0; J and J* are those of missing_end_score "
        "-5.0"]


@pytest.mark.parametrize("damage", ["empty", "cut off", "one bit", "of another kind", "no figures"])
def test_damaged_checkpoint_of_a_stage(trained, tmp_path, capsys, damage):
    """A file that was cut off ends the yardstick in a traceback, after its minutes of sampling,
    with nothing saved."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "cpu/gpt/checkpoint.pt"  # none but the table of all stages reads it
    data = bytearray(path.read_bytes())
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut off":
        path.write_bytes(data[:len(data) // 2])
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "of another kind":
        path.write_bytes(b'{"step": 20, "held_out": 0.7, "entropy": 0.6}\n')
    else:
        content = read_torch(path)
        del content["metrics"]
        write_torch(path, content)
    before = snapshot(out)
    reason = "gpt.checkpoint.pt: .*train the stage again"
    if damage == "no figures":  # a whole file, but not the one that SFT began with
        reason = "sft.checkpoint.pt: was made from another .*gpt.checkpoint.pt; train sft again"
    with pytest.raises(InputError, match=reason) as error:
        run(out, capsys, "--prompts", "2", "--samples", "4")
    assert "\n" not in str(error.value) and "sampled" not in capsys.readouterr().out
    assert snapshot(out) == before


def test_missing_figures_of_a_stage(trained, tmp_path, capsys):
    """A stage whose checkpoint was removed, a text of one's own, whose entropy is unknown, or a
    single prompt, whose figures have no errors, ends the yardstick."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "cpu/gpt")
    rows = read_torch(out / "cpu/sft/checkpoint.pt")["metrics"]
    assert not any("entropy" in row for row in rows)
    printed = run(out, capsys, *"--prompts 1 --samples 4 --policies ppo".split())
    table = table_of(printed, "How close to the best")
    assert [re.split(r"  +", line)[0] for line in table[:4]] == [
        "", "reward model, accuracy", "reward model, accuracy above chance", "reward model, loss"]
    assert not (out / "cpu/gpt").exists()


def test_figures_are_those_of_the_checkpoint_that_is_there(trained, tmp_path, capsys, monkeypatch):
    """A new run of an earlier stage emptied its metrics.jsonl at once: interrupted, it left the
    loss of an untrained model in it, and "How close to the best" printed that beside the old
    checkpoint."""
    def close():
        printed = run(out, capsys, *"--prompts 2 --samples 4 --policies dpo".split())
        return table_of(printed, "How close to the best")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    out = shutil.copytree(trained, tmp_path / "out")
    table = close()
    figures = read_torch(out / "cpu/gpt/checkpoint.pt")["metrics"][-1]
    expected = f"pretraining, nats per token +{figures['held_out']:.3f} +{figures['entropy']:.3f} "
    assert re.match(expected, table[1])
    monkeypatch.setattr(Run, "end_step", interrupted)
    for stage, flags in ((gpt, "--steps 2 --batch 8 --n_layer 1 --n_head 2 --n_embd 32"),
                         (reward_model, "--pairs 8 --held_out 4 --batch 4 --max_new_tokens 16")):
        with pytest.raises(KeyboardInterrupt):
            stage.main(["--out", str(out), "--size", "cpu", "--report", "1", *flags.split()])
        folder = out / "cpu" / stage.__name__
        begun = (folder / "unfinished/metrics.jsonl").read_bytes()
        assert b'"step": 1, "loss"' in begun
        (folder / "metrics.jsonl").write_bytes(begun)  # where it was at that time
    assert close() == table
    (out / "cpu/gpt/metrics.jsonl").write_bytes(b'{"held_out": \xff')  # it is not read
    assert close() == table


def test_a_run_that_was_killed_in_its_last_moment_is_completed_first(trained, tmp_path, capsys):
    """A run that is over, but was killed before its files were moved to their places: the yardstick
    compares the policy of the run before it, or trains a finished stage again."""
    out = shutil.copytree(trained, tmp_path / "out")
    flags = "--prompts 2 --samples 4 --policies ppo,dpo-late".split()
    shutil.copytree(out / "cpu/dpo", out / "cpu/dpo-late")
    printed = run(out, capsys, *flags)
    before = snapshot(out)
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name in ("gpt", "reward_model", "ppo", "dpo-late"):
        folder = out / "cpu" / name
        (folder / "finished").mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name != "lock":
                path.rename(folder / "finished" / path.name)
        (folder / "finished/state.pt").write_bytes(b"")
    path = out / "cpu/dpo-late/checkpoint.pt"
    save_checkpoint(path, "dpo", "cpu", model, tokenizer)  # the run before
    assert without_seconds(run(out, capsys, *flags)) == without_seconds(printed)
    assert snapshot(out) == before


def test_all_that_is_missing_is_trained_under_one_plan(trained, tmp_path, capsys, monkeypatch):
    """A plan that names PPO's minutes and not DPO's, an existing policy trained again, or a name
    that is none and is found after these minutes."""
    out = tmp_path / "out"
    asked = []

    def main_of(name):
        def main(argv):
            asked.append((name, *argv))
            shutil.copytree(trained / "cpu" / name, out / "cpu" / name)
        return main

    for stage in (gpt, sft, reward_model, ppo, dpo):
        monkeypatch.setattr(stage, "main", main_of(stage.__name__))
    for name, folder in (("foo", out), ("ppo-none", out), ("sft", trained), ("gpt", trained)):
        message = f"--policies {name}: must be ppo or dpo, or the --name"
        with pytest.raises(InputError, match=message):
            run(folder, capsys, "--policies", f"ppo,{name}")
    assert not asked and not out.exists()

    flags = ["--prompts", "2", "--samples", "4", "--seed", "7"]
    assert re.findall(r"^plan .*$", run(out, capsys, *flags), re.M) == [
        "plan    gpt → sft → reward_model → ppo → dpo → best_of_n, about 11 minutes on two cores"]
    argv = ("--size", "cpu", "--out", str(out), "--seed", "7")
    assert asked == [(name, *argv) for name in ("gpt", "sft", "reward_model", "ppo", "dpo")]
    shutil.rmtree(out / "cpu/ppo")
    shutil.rmtree(out / "cpu/gpt")  # no policy needs it any more
    assert "plan    ppo → best_of_n, about 4 minutes" in run(out, capsys, *flags)
    assert asked[5:] == [("ppo", *argv)]
    assert "plan" not in run(out, capsys, *flags)


def test_policy_of_another_vocabulary(trained, tmp_path, capsys):
    """Log-ratios of two policies whose ids mean different words."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "cpu/ppo/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "ppo", "cpu")
    strings = [token.decode("latin-1") for token in tokenizer.vocabulary]
    strings[-2:] = strings[:-3:-1]
    save_checkpoint(path, "ppo", "cpu", model, Tokenizer.from_strings(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="ppo.checkpoint.pt: its vocabulary"):
        run(out, capsys, "--prompts", "2", "--samples", "4")
    assert snapshot(out) == before


# --------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


def samples_of(rewards, ended=None, texts=None):
    """Samples with these rewards (M, N); the text of (i, j) is "i j"."""
    M, N = rewards.shape
    if texts is None:
        texts = [f"{i} {j}" for i in range(M) for j in range(N)]
    if ended is None:
        ended = torch.ones(M, N)
    return Samples([], texts, {"reward": rewards, "ended": ended})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def test_the_best_overall_favour_easy_prompts(tokenizer, capsys):
    """Both selections the same, or of another size; the lecture: the best overall are better, but
    "can bias toward easy prompts"."""
    M = 12
    N = 8
    easy = torch.tensor([3.0] * 3 + [0.0] * 9)[:, None]  # all responses to three prompts are better
    rewards = easy + 0.5 * noise(0, M, N).clamp(-2, 2)
    prompts = [f"prompt {i}" for i in range(M)]
    samples = samples_of(rewards)
    per_prompt, figures = select(prompts, samples, "per_prompt", tokenizer, 128)
    overall, overall_figures = select(prompts, samples, "overall", tokenizer, 128)

    best = [max(range(N), key=rewards[i].tolist().__getitem__) for i in range(M)]
    assert per_prompt == [{"prompt": f"prompt {i}", "completion": f"{i} {j}"}
                          for i, j in enumerate(best)]
    assert len(overall) == M and {row["prompt"] for row in overall} == set(prompts[:3])
    assert len({row["completion"] for row in overall}) == M  # none twice
    assert all(row["prompt"] == f"prompt {row['completion'].split()[0]}" for row in overall)
    assert (figures["prompts"], figures["most"], overall_figures["prompts"]) == (M, 1, 3)
    assert figures["prompts_reward"] == pytest.approx(figures["all_reward"], abs=1e-5)
    assert overall_figures["prompts_reward"] > overall_figures["all_reward"] + 2
    assert overall_figures["reward"] > figures["reward"] + 1
    assert overall_figures["spread"] < figures["spread"] and 4 <= overall_figures["most"] <= N
    printed = capsys.readouterr().out
    assert ("kept    12 of 96 responses, for 12 of 12 prompts, at most 1 for one\n"
            "        dropped 0 without") in printed
    assert ("kept    12 of 96 responses, for 3 of 12 prompts, at most "
            f"{overall_figures['most']} for one\n") in printed


def test_what_cannot_be_learnt_from_is_counted(tokenizer, capsys):
    """A response cut off at the limit, learnt as if it ended there; one that data/files.py refuses
    to read back, so that --resume can't continue; a sequence beyond the context; all of them, and a
    division by zero."""
    texts = ["fine", "cut", " \n", "N\0", "long " * 50, "fine too"]
    ended = torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None]
    samples = samples_of(torch.zeros(6, 1), ended, texts)
    rows, _ = select(list("abcdef"), samples, "per_prompt", tokenizer, 64)
    short = [(row["prompt"], row["completion"]) for row in rows if len(row["completion"]) < 64]
    assert short == [("a", "fine"), ("f", "fine too")]
    dropped = "\n        dropped 3 without an end or a text, 1 longer than the context\n"
    assert dropped in capsys.readouterr().out
    rest = samples_of(torch.zeros(4, 1), ended[1:5], texts[1:5])
    message = "of the 4 best responses dropped 3 without .*, 1 longer .*: none is left"
    with pytest.raises(InputError, match=message):
        select(list("bcde"), rest, "overall", tokenizer, 64)


def rsft(out, *flags, how="per_prompt"):
    small = ("--rsft_prompts 12 --n 4 --max_new_tokens 16 --batch 4 --epochs 2 --report 4 "
             "--lr 1e-2 --warmup 1")
    best_of_n.main(["--out", str(out), "--size", "cpu", "--finetune", how, *small.split(), *flags])


def equal(a, b):
    return all(torch.equal(x.cpu(), b[name].cpu()) for name, x in a.items())


def watch(monkeypatch):
    """What every round does from here on: [[prompts, Samples, weights that sampled, sequences that
    were learnt], ...]."""
    rounds = []
    draw = best_of_n.draw
    padded = sft.pad

    def drawing(name, policy, scorer, tokenizer, prompts, *arguments):
        samples = draw(name, policy, scorer, tokenizer, prompts, *arguments)
        rounds.append([prompts, samples, copy.deepcopy(policy.model.state_dict()), []])
        return samples

    def learning(sequences, *arguments):
        rounds[-1][3].extend(map(tuple, sequences))
        return padded(sequences, *arguments)

    monkeypatch.setattr(best_of_n, "draw", drawing)
    monkeypatch.setattr(sft, "pad", learning)
    return rounds


@pytest.mark.parametrize("how", ["per_prompt", "overall"])
def test_rounds_of_finetuning(how, out, monkeypatch, capsys):
    """Every round on samples of the SFT model; the worst of N, or all; held-out requests; another
    stage written over; a policy that learns from other responses than those beside its checkpoint;
    after for before on the screen."""
    before = snapshot(out)
    rounds = watch(monkeypatch)
    shown = []
    monkeypatch.setattr(best_of_n, "show_before_and_after", lambda *x: shown.extend(x))
    rsft(out, "--rounds", "2", how=how)
    printed = capsys.readouterr().out
    folder = out / "cpu" / f"rsft-{how}"
    after = {path: data for path, data in snapshot(out).items() if folder not in path.parents}
    assert after == before
    reference, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    assert len(rounds) == 2 and equal(reference.state_dict(), rounds[0][2])
    assert not equal(rounds[0][2], rounds[1][2])
    assert not set(rounds[0][0]) & set(rounds[1][0])

    steps = 0
    rows = metrics(folder / "metrics.jsonl")
    for number, (prompts, samples, _, learnt) in enumerate(rounds, start=1):
        rewards = samples.figures["reward"]
        assert rewards.shape == (12, 4) and not any(map(stories.is_held_out, prompts))
        kept = read_demonstrations(folder / f"kept-{number}.jsonl")
        demonstrations, _ = encode_demonstrations(kept, tokenizer, 128)
        sequences = [tuple(one.ids) for one in demonstrations]
        assert sorted(learnt) == sorted(2 * sequences)  # two epochs
        steps += 2 * math.ceil(len(sequences) / 4)

        flat = sorted(((rewards[i, j].item(), i, j) for i in range(12) for j in range(4)),
                      reverse=True)
        best = flat[:12]
        if how == "per_prompt":
            best = [max(row for row in flat if row[1] == i) for i in range(12)]
        expected = [(prompts[i], samples.texts[4 * i + j]) for _, i, j in best
                    if samples.figures["ended"][i, j]]
        assert sorted((row["prompt"], row["completion"]) for row in kept) == sorted(expected)
        assert len(expected) > 6
        found = next(row for row in rows if row.get("round") == number)
        mean = np.mean([reward for reward, _, _ in best])
        assert found["reward"] == pytest.approx(mean, abs=1e-5)

    assert rows[-1]["step"] == steps
    assert [row["round"] for row in rows if "round" in row] == [1, 2]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert ("fresh requests of the little world; 2 rounds of 4 responses to each of 12\n"
            in printed)
    assert printed.count("kept    12 of 48 responses, for ") == 2
    policy, _, checkpoint = load_checkpoint(folder / "checkpoint.pt", "rsft", "cpu")
    assert checkpoint["distils"] == 16 and not equal(policy.state_dict(), rounds[1][2])
    assert equal(shown[1].state_dict(), rounds[0][2])
    assert equal(shown[2].state_dict(), checkpoint["model"])


@pytest.mark.parametrize("where, n, report", [
    ("end_step", 1, 4), ("end_step", 4, 4), ("end_step", 6, 4), ("end_step", 6, 3),
    ("end_step", 11, 4), ("draw", 1, 4), ("draw", 2, 4), ("write_jsonl", 1, 4),
    ("write_jsonl", 2, 3)])
def test_finetuning_continues_bit_for_bit(where, n, report, out, monkeypatch):
    """A round that is sampled again from a policy further on, or learnt twice; figures of a round
    that are lost or written twice; a schedule that starts again. Rounds end after step 6, the state
    is saved every `report` steps."""
    argv = ["--rounds", "2", "--report", str(report), "--name"]
    rsft(out, *argv, "rsft-whole")
    owner = Run if where == "end_step" else best_of_n
    original = getattr(owner, where)
    calls = []

    def interrupted(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls.append(where)
        if len(calls) == n:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            rsft(out, *argv, "rsft-killed")
    assert not (out / "cpu/rsft-killed/checkpoint.pt").exists()
    rsft(out, *argv, "rsft-killed", "--resume")
    whole = out / "cpu/rsft-whole"
    killed = out / "cpu/rsft-killed"
    found = read_torch(killed / "checkpoint.pt")
    expected = read_torch(whole / "checkpoint.pt")
    assert equal(found["model"], expected["model"]) and found["metrics"] == expected["metrics"]
    files = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == files
    for name in ("kept-1.jsonl", "kept-2.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_fewer_rounds_leave_no_responses_of_a_run_before(out):
    """kept-2.jsonl of last week beside the checkpoint of a run of one round."""
    for rounds in (2, 1):
        rsft(out, "--rounds", str(rounds), "--epochs", "1")
        assert len(list((out / "cpu/rsft-per_prompt").glob("kept-*.jsonl"))) == rounds


def test_finetuning_on_somebodys_own_prompts(out, tmp_path, monkeypatch, capsys):
    """Held-out prompts that are learnt; the world's requests put to a policy of other prompts; a
    prompt asked twice and another one never; prompts too long to answer, left out without a
    word."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)]
    rows += [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(path, rows)
    trained_on = hold_out(rows)[0]
    short = [row["prompt"] for row in trained_on if "long" not in row["prompt"]]
    rounds = watch(monkeypatch)
    rsft(out, "--data", str(path), "--rsft_prompts", "999", "--rounds", "2")
    assert [sorted(prompts) for prompts, *_ in rounds] == [sorted(short)] * 2 and len(short) < 20
    count = len(short)
    dropped = len(trained_on) - count
    assert (f"prompts.jsonl: {count} prompts, dropped {dropped} that leave no room for 16 new "
            f"tokens; 2 rounds of 4 responses to each of {count}\n") in capsys.readouterr().out
    rsft(out, "--data", str(path), "--rsft_prompts", "7")
    assert len(set(rounds[-1][0])) == 7 and set(rounds[-1][0]) < set(short)

    before = snapshot(out)
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)],
                          "no prompt leaves room"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            rsft(out, "--data", str(path))
    assert snapshot(out) == before


RSFT_ONLY = ("name rsft-x", "rounds 2", "rsft_prompts 8", "epochs 2", "batch 8", "lr 0.1",
             "warmup 1", "weight_decay 0.0", "report 2")
YARDSTICK_ONLY = ("policies ppo", "prompts 8", "samples 8", "beta 0.2")


@pytest.mark.parametrize("argv, message", [
    *((f"--{flag}", f"--{flag}: goes with --finetune per_prompt or overall only$")
      for flag in RSFT_ONLY),
    *((f"--finetune overall --{flag}", f"--{flag}: goes with --finetune no only$")
      for flag in YARDSTICK_ONLY),
    ("--finetune overall --verify", "--finetune overall: cannot be used with --process or"),
    ("--finetune overall --rounds 0", "--rounds 0: must be positive"),
    ("--finetune overall --name rsft/../sft", "--name .*: must be rsft"),
    ("--finetune overall --name ppo", "--name ppo: must be rsft"),
    ("--finetune overall --name best_of_n", "--name best_of_n: must be rsft"),
    ("--finetune overall --data none.jsonl", "none.jsonl: no such file"),
    ("--finetune overall --prompt Why?",
     "--policies rsft-overall: must be ppo or dpo, or the --name of a finished run")])
def test_what_finetuning_would_ignore_is_refused(argv, message, tmp_path):
    """A sweep over a flag that changes nothing; the reference written over; minutes of training
    before a refusal."""
    with pytest.raises(InputError, match=message) as error:
        best_of_n.main(["--size", "cpu", "--out", str(tmp_path / "out"), *argv.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_finetuned_policy_in_the_yardstick(trained, tmp_path, capsys, monkeypatch):
    """A policy that the yardstick does not find, or takes for another stage's; the best-of-N that
    it distils, which the table leaves out unless N is 4, 16 or 64; --prompt that asks the SFT model
    whatever was fine-tuned."""
    out = shutil.copytree(trained, tmp_path / "out")
    rsft(out, "--n", "3")
    rsft(out, "--rounds", "2", "--n", "3", "--name", "rsft-2", how="overall")
    capsys.readouterr()
    flags = "--prompts 3 --samples 8 --policies rsft-2,ppo,rsft-per_prompt"
    printed = run(out, capsys, *flags.split())
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    names = ["sft", "best of 3", "best of 4", "rsft-2", "ppo", "rsft-per_prompt"]  # 9 is above 8
    for under in (None, "reward model", "gold"):
        found = [row["policy"] for row in rows if row.get("under") == under]
        assert [name for name in found if name != "frontier"] == names
    table = {row["policy"]: row for row in rows if "under" not in row}
    assert table["rsft-per_prompt"]["kl"] != 0
    assert table["best of 3"]["kl"] == pytest.approx(best_of_n_kl(3))
    assert "rsft-per_prompt, J under gold" in printed

    drawn = watch_draw(monkeypatch)
    printed = run(out, capsys, "--finetune", "per_prompt", "--prompt", "Who are you?", "--n", "2")
    (name, policy, *_), _ = drawn[0]
    assert name == "rsft-per_prompt" and "winner of 2: " in printed
    learnt = read_torch(out / "cpu/rsft-per_prompt/checkpoint.pt")["model"]
    assert equal(policy.model.state_dict(), learnt)
