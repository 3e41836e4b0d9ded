"""best_of_n.py against the lecture's matrix and numbers, enumeration and brute force."""

import itertools
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch

import best_of_n
import dpo
import ppo
import reward_model
import sft
from best_of_n import best_of_n_kl, distinct_2, optimality_gap, pooled_optimum, top_k_overall, top_per_prompt, win_rate
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.tokenizer import Tokenizer
from gpt import load_checkpoint, save_checkpoint
from reward_model import RewardModel
from test_ppo import metrics, noise, snapshot

MATRIX = torch.tensor([[0.7, 0.3, 0.5, 0.2],        # ECE 7115, "Rejection Sampling": 5 prompts, 4 completions
                       [0.4, 0.8, 0.6, 0.5],
                       [0.9, 0.3, 0.4, 0.7],
                       [0.2, 0.5, 0.8, 0.6],
                       [0.5, 0.4, 0.3, 0.6]])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def boltzmann(reference, rewards, beta):
    """π*, the optimum of the objective (CS 224R, ch. 7)."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum()


def draw(p, count, seed):
    """`count` draws from the probabilities p, as indices."""
    return torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def world(seed, n=8):
    """(π_ref, rewards) over n responses, in float64."""
    return noise(seed, n).double().softmax(0), 2 * noise(seed + 100, n).double()


# ----------------------------------------------------------------------------------------------------------------------
# Selection


def test_top_per_prompt_of_the_lecture():
    """The best over the wrong axis: the slide has S(R) = [1, 2, 1, 3, 4], counted from 1."""
    assert (top_per_prompt(MATRIX) + 1).tolist() == [1, 2, 1, 3, 4]


def test_top_overall_of_the_lecture():
    """Worst for best, or row and column swapped: "Prompt 3 gets two completions (0.9 and 0.7), while prompt 5 gets none"."""
    best = top_k_overall(MATRIX, 5)
    rewards = [MATRIX[i, j].item() for i, j in best.tolist()]
    assert rewards == pytest.approx([0.9, 0.8, 0.8, 0.7, 0.7])
    prompts = (best[:, 0] + 1).tolist()
    assert prompts.count(3) == 2 and prompts.count(5) == 0
    assert {tuple(pair) for pair in best.tolist()} == {(2, 0), (1, 1), (3, 2), (0, 0), (2, 3)}
    assert len(top_k_overall(MATRIX, 20)) == 20  # all of them, each once
    assert len({tuple(pair) for pair in top_k_overall(MATRIX, 20).tolist()}) == 20


# ----------------------------------------------------------------------------------------------------------------------
# Best-of-n's divergence


def law_of_best_of_n(p, n):
    """The exact distribution of the best of n draws, by going through all of them; p in increasing order of reward."""
    law = torch.zeros_like(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        law[max(draws)] += math.prod(p[i].item() for i in draws)
    return law


def test_best_of_n_kl_bounds_the_exact_one():
    """log n alone, or log n - 1 + n: the figure stands in the yardstick's tables as best-of-N's KL."""
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    for seed, n in itertools.product(range(3), (1, 2, 3, 4)):
        p, _ = world(seed, n=5)
        law = law_of_best_of_n(p, n)
        assert law.sum().item() == pytest.approx(1)
        assert kl(law, p) <= best_of_n_kl(n) + 1e-12
    for n in (2, 4, 16, 64):  # many equally likely responses: the bound is reached, from below
        size = 100_000
        rank = torch.arange(size + 1, dtype=torch.float64) / size
        law = (rank ** n).diff()  # P(best is the k-th) = F(k)^n - F(k-1)^n
        exact = kl(law, torch.full((size,), 1 / size, dtype=torch.float64))
        assert best_of_n_kl(n) - 0.01 < exact <= best_of_n_kl(n)


# ----------------------------------------------------------------------------------------------------------------------
# The answer key


def test_boltzmann_of_the_lecture():
    """r·β for r/β, or a log Z that isn't the objective's maximum: 0.6/0.4, rewards 1 and 3, beta 2 give Z = 2.782."""
    reference, rewards, beta = double(0.6, 0.4), double(1.0, 3.0), 2.0
    Z = (reference * (rewards / beta).exp()).sum().item()
    best = boltzmann(reference, rewards, beta)
    assert Z == pytest.approx(2.782, abs=1e-3)
    assert best.tolist() == pytest.approx([0.355, 0.645], abs=1e-3)
    J_best = (best * rewards).sum().item() - beta * kl(best, reference)
    assert J_best == pytest.approx(beta * math.log(Z))

    # Six and four of ten samples are exactly π_ref: its J is E[r], and its own estimate of J* is exact.
    samples = torch.tensor([[0] * 6 + [1] * 4])
    J, J_star = optimality_gap(rewards[samples], torch.zeros(1, 10, dtype=torch.float64), beta)
    assert J.item() == pytest.approx(0.6 * 1 + 0.4 * 3) and J_star.item() == pytest.approx(J_best)
    # At the optimum w is the same for every response: one sample of either tells all.
    for i in (0, 1):
        J, J_star = optimality_gap(rewards[None, i:i + 1], (best / reference).log()[None, i:i + 1], beta)
        assert J.item() == pytest.approx(J_best) and J_star.item() == pytest.approx(J_best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gap_is_the_divergence_from_the_optimum(seed, beta):
    """w with the ratio's sign turned, or beta on one of its parts only: J* - J is then no beta KL(π || π*)."""
    reference, rewards = world(seed)
    policy = noise(seed + 50, 8).double().softmax(0)
    log_Z = (reference * (rewards / beta).exp()).sum().log()
    best = boltzmann(reference, rewards, beta)
    exact_J = ((policy * rewards).sum() - beta * kl(policy, reference)).item()
    exact_gap = beta * kl(policy, best)
    assert beta * log_Z.item() - exact_J == pytest.approx(exact_gap)

    M, N = 30, 4000
    samples = draw(policy, M * N, seed).view(M, N)
    J, J_star = optimality_gap(rewards[samples], (policy / reference).log()[samples], beta)
    assert J.shape == J_star.shape == (M,)
    for estimate, exact in ((J, exact_J), (J_star - J, exact_gap)):
        error = estimate.std().item() / math.sqrt(M)
        assert estimate.mean().item() == pytest.approx(exact, abs=4 * error + 0.01 * beta)
        assert error < 0.05  # so the comparison means something
    assert (J_star >= J).all()


def test_huge_rewards_do_not_overflow():
    """log of the mean of exp(r/β) is inf from r/β = 89 on."""
    J, J_star = optimality_gap(torch.tensor([[1000.0, 1000.0]]), torch.zeros(1, 2), beta=0.5)
    assert J.item() == J_star.item() == 1000
    J_star, divergence = pooled_optimum(torch.full((1, 2), -1000.0), torch.zeros(1, 2, 1), beta=0.5)
    assert J_star.item() == -1000 and divergence.item() == 0


def test_dropped_mode_and_the_pooled_optimum():
    """A collapsed policy takes itself for the optimum: it never samples what it dropped. The pool sees it."""
    reference, rewards, beta = double(0.5, 0.3, 0.2), double(1.0, 0.0, 3.0), 1.0
    collapsed = double(1 - 2e-9, 1e-9, 1e-9)
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    log_ratio = (collapsed / reference).log()
    N = 1000  # exact samples: all of the policy's are response 0; the reference's have its proportions
    own = torch.zeros(1, N, dtype=torch.long)
    of_reference = torch.tensor([[0] * 500 + [1] * 300 + [2] * 200])
    J, J_star = optimality_gap(rewards[own], log_ratio[own], beta)
    assert J_star.item() == pytest.approx(J.item()) and J_star.item() < exact - 0.8
    samples = torch.cat([of_reference, own], dim=1)
    log_ratios = torch.stack([torch.zeros(3, dtype=torch.float64), log_ratio], dim=1)[samples]
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    assert J_star.item() == pytest.approx(exact, abs=1e-6)
    assert divergence.item() == pytest.approx(kl(boltzmann(reference, rewards, beta), reference), abs=1e-6)


@pytest.mark.parametrize("policies", [1, 2, 4])
def test_pooled_optimum_is_unbiased_for_z(policies):
    """Weights by the policy that drew the sample, or a sum over policies for their mean: Z is then off by K."""
    reference, rewards = world(7)
    beta, counts = 0.8, torch.tensor([3, 1, 2, 4, 1, 2, 1, 2])
    reference = counts.double() / 16  # multiples of 1/16, so 16 draws of each policy can be exact
    shuffled = [counts[torch.randperm(8, generator=torch.Generator().manual_seed(k))] for k in range(policies - 1)]
    all_counts = [counts, *shuffled]
    samples = torch.cat([torch.repeat_interleave(torch.arange(8), count) for count in all_counts])[None]
    log_ratios = torch.stack([(count.double() / 16 / reference).log() for count in all_counts], dim=1)[samples]
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    assert samples.shape == (1, 16 * policies) and log_ratios.shape == (1, 16 * policies, policies)
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    assert J_star.item() == pytest.approx(exact)
    assert divergence.item() == pytest.approx(kl(boltzmann(reference, rewards, beta), reference))


# ----------------------------------------------------------------------------------------------------------------------
# The yardstick's figures


def test_win_rate_counts_ties_half():
    """Ties as losses: SFT against itself then loses, most of all where the annotator's rewards are coarse."""
    generator = torch.Generator().manual_seed(0)
    gold, opponents = (torch.randint(4, (3, n), generator=generator).float() for n in (5, 7))
    expected = [np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs])
                for ours, theirs in zip(gold.tolist(), opponents.tolist())]
    assert win_rate(gold, opponents).tolist() == pytest.approx(expected)
    assert win_rate(gold, gold).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("texts, share", [
    (["a b c", "a b d"], 3 / 4), (["a a a a"], 1 / 3), (["a b", "b a"], 1.0), (["a", "b"], 0.0), ([], 0.0),
    (["a b"] * 5, 0.2)])
def test_distinct_2_by_hand(texts, share):
    """Pairs that reach from one text into the next, or a division by zero for texts of one word."""
    assert distinct_2(texts) == pytest.approx(share)


def test_best_of_n_row_keeps_the_pieces_together():
    """The reward of one sample beside the gold or text of another; groups that overlap, or best chosen by gold."""
    M, N = 3, 10
    names = [f"text {i} {j}" for i in range(M) for j in range(N)]
    one = best_of_n.Samples([], names, noise(0, M, N), noise(1, M, N), torch.arange(M * N).view(M, N).float(),
                            (noise(2, M, N) > 0).float())
    for n in (1, 3, 4, 10):
        row = best_of_n.best_of_n_row(one, n)
        assert row.rewards.shape == (M, N // n)
        for i in range(M):
            for g in range(N // n):
                j = max(range(g * n, (g + 1) * n), key=lambda j: one.rewards[i, j].item())
                assert row.rewards[i, g] == one.rewards[i, j] and row.gold[i, g] == one.gold[i, j]
                assert row.lengths[i, g] == one.lengths[i, j] and row.ended[i, g] == one.ended[i, j]
                assert g > 0 or row.texts[i] == f"text {i} {j}"
        assert row.log_ratios.flatten().tolist() == pytest.approx([best_of_n_kl(n)] * (M * (N // n)))
    assert best_of_n.best_of_n_row(one._replace(gold=None), 4).gold is None


# ----------------------------------------------------------------------------------------------------------------------
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


def test_prompt_prints_candidates_and_the_winner(trained, capsys):
    """A winner that isn't the best candidate, or an annotator asked for a prompt that it cannot judge."""
    for prompt, gold in (("Tell me a story about a shy fox and a kite.", True), ("Who are you?", False)):
        printed = run(trained, capsys, "--prompt", prompt, "--n", "6")
        candidates = re.findall(r"^ *([+-]\d+\.\d{3})(  gold +[+-]\d+\.\d{3})?  (.*)$", printed, re.M)
        rewards = [float(reward) for reward, _, _ in candidates]
        assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
        assert all(bool(found) == gold for _, found, _ in candidates)
        assert f"winner of 6: {candidates[0][2]}\n" in printed


def test_prompt_that_does_not_fit(trained, capsys):
    """A long prompt ends in a traceback out of the sampler."""
    with pytest.raises(InputError, match="a prompt of .* exceed the context of 128"):
        run(trained, capsys, "--prompt", "long " * 200)


def test_yardstick(trained, capsys):
    """A table that changes from run to run, a policy left out, a stage written over, nan in the figures."""
    before = snapshot(trained)
    flags = "--prompts 3 --samples 8 --sample_batch 5".split()  # batches that end in the middle of a prompt
    printed = run(trained, capsys, *flags)
    rows = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    table = {row["policy"]: row for row in rows if "under" not in row}
    assert list(table) == ["sft", "best of 4", "ppo", "dpo"]
    assert table["sft"]["kl"] == 0 and table["best of 4"]["kl"] == pytest.approx(best_of_n_kl(4))
    assert table["best of 4"]["reward"] > table["sft"]["reward"]
    for row in table.values():
        assert set(row) == {"policy", "reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"}
        assert 0 <= row["win_rate"] <= 1 and 0 <= row["ended"] <= 1 and 1 <= row["length"] <= 16
    optima = [row for row in rows if "under" in row]
    assert [(row["under"], row["policy"]) for row in optima] == [
        (kind, name) for kind in ("reward model", "gold") for name in table]
    for row in optima:
        figure = table[row["policy"]]["reward" if row["under"] == "reward model" else "gold"]
        assert row["J"] == pytest.approx(figure - 0.2 * table[row["policy"]]["kl"], abs=1e-4)  # the README's beta
    assert "How close to the best" in printed and all(name in printed for name in table)
    assert "the little world: 3 held-out prompts; 8 samples each" in printed
    assert re.findall(r"^sampled (.*) in \d+ s$", printed, re.M) == ["sft", "ppo", "dpo"]
    after = snapshot(trained)
    assert {path: after[path] for path in before} == before
    again = run(trained, capsys, *flags)
    assert re.sub(r" in \d+ s\n", "\n", again) == re.sub(r" in \d+ s\n", "\n", printed)
    assert snapshot(trained) == after


def test_yardstick_on_somebodys_own_prompts(trained, tmp_path, capsys, monkeypatch):
    """Gold columns for prompts that the annotator cannot judge; prompts too long for the context, or trained on."""
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)] + [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    held_out = hold_out(rows, 1)[1]
    short = [row["prompt"] for row in held_out if "long" not in row["prompt"]]
    assert len(held_out) == 4 and 0 < len(short) < 4  # so the test sees both kinds
    asked, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: asked.append(arguments[3]) or draw_samples(*arguments))
    printed = run(trained, capsys, "--data", str(tmp_path / "prompts.jsonl"), "--samples", "4", "--policies", "dpo")
    assert asked == [short] * 2  # SFT and DPO, each once
    assert f"{len(short)} of {len(short)} held-out prompts, dropped {4 - len(short)} that leave no room" in printed
    assert "gold" not in printed and "win_rate" not in printed
    rows = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    assert [row["policy"] for row in rows if "under" not in row] == ["sft", "best of 4", "dpo"]
    assert {row["under"] for row in rows if "under" in row} == {"reward model"}

    before = snapshot(trained)
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)], "no held-out prompt leaves room"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(tmp_path / "prompts.jsonl", rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            run(trained, capsys, "--data", str(tmp_path / "prompts.jsonl"), "--samples", "4", "--policies", "dpo")
    assert snapshot(trained) == before


@pytest.mark.parametrize("stage", [sft, reward_model, ppo, dpo, best_of_n], ids=lambda stage: stage.__name__)
def test_a_wrong_file_is_found_before_anything_is_trained(stage, tmp_path):
    """A typing error in the file's name that comes out after the minutes which the missing stages took."""
    for argv in (["--data", str(tmp_path / "none.jsonl")], ["--data", str(tmp_path)]):
        with pytest.raises(InputError, match=str(tmp_path)):
            stage.main(["--out", str(tmp_path / "out"), "--size", "cpu", *argv])
    assert not (tmp_path / "out").exists()


def test_every_stage_holds_out_the_same_prompts(trained, tmp_path, capsys, monkeypatch):
    """A prompt that one stage trains on and another one measures itself on: the figure is of what was learnt by heart."""
    path, names = tmp_path / "pairs.jsonl", [f"Who sings {i}?" for i in range(30)]
    rows = [{"prompt": name, "chosen": "Yes." if i else "Yes. " * 200, "rejected": "No."}
            for name in random.Random(0).sample(names, 30) for i in (0, 1) if i or name.endswith("7?")]
    write_jsonl(path, rows)  # three prompts have two rows, one of them too long for all but PPO
    out = shutil.copytree(trained, tmp_path / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "4", "--data", str(path)]
    seen = {name: set() for name in ("sft", "reward_model", "ppo", "dpo")}

    def prompt_of(ids):
        return tokenizer.decode(ids[1:ids.index(tokenizer.assistant_token)])

    def spy(module, name, stage, sequences):
        original = getattr(module, name)

        def spying(*arguments, **keywords):
            seen[stage].update(map(prompt_of, sequences(arguments)))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, spying)

    tokenizer = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1]
    spy(sft, "backward", "sft", lambda arguments: arguments[1])
    spy(reward_model, "backward", "reward_model", lambda arguments: [ids for pair in arguments[1] for ids in pair[:2]])
    spy(dpo, "backward", "dpo", lambda arguments: [ids for pair in arguments[2] for ids in pair[:2]])
    spy(ppo, "generate", "ppo", lambda arguments: arguments[1])
    sft.main(common)
    reward_model.main(common)
    ppo.main(common + "--iterations 1 --rollouts 400 --minibatch 400 --micro_batch 400 --epochs 1".split())
    dpo.main(common)
    held_out = {stage: set(names) - prompts for stage, prompts in seen.items()}
    assert len(held_out["sft"]) == 3 and all(prompts == held_out["sft"] for prompts in held_out.values())
    assert {row["prompt"] for row in read_pairs(out / "cpu/reward_model/held_out.jsonl")} == held_out["sft"]

    asked, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: asked.append(set(arguments[3])) or draw_samples(*arguments))
    best_of_n.main(common + ["--samples", "4"])
    assert asked == [held_out["sft"]] * 3  # SFT, PPO and DPO are compared on prompts that none of them has seen


def test_draws_come_from_the_given_generator(trained, monkeypatch):
    """One seed for every batch, or for every policy: the samples are then copies, and their errors hidden."""
    policy, tokenizer, _ = load_checkpoint(trained / "cpu/sft/checkpoint.pt", "sft", "cpu")
    scorer = load_checkpoint(trained / "cpu/reward_model/checkpoint.pt", "reward_model", "cpu", model_class=RewardModel)[0]
    config = best_of_n.Config(size="cpu", max_new_tokens=16, sample_batch=4)
    seeds, generate = [], best_of_n.generate
    monkeypatch.setattr(best_of_n, "generate", lambda *arguments, seed: seeds.append(seed) or generate(*arguments, seed=seed))

    def texts(rng):
        return best_of_n.draw(policy, scorer, tokenizer, ["Who sings?"] * 2, 6, config, False, rng).texts

    rng = random.Random(0)
    first, second = texts(rng), texts(rng)
    assert len(first) == 12 and len(set(seeds)) == len(seeds) == 6  # 3 batches each
    assert first[:4] != first[4:8] and first != second
    random.seed()
    assert texts(random.Random(0)) == first and seeds[6:] == seeds[:3]


def test_policy_of_another_vocabulary(trained, tmp_path, capsys):
    """Log-ratios of two policies whose ids mean different words."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
    strings = [token.decode("latin-1") for token in tokenizer.vocabulary]
    strings[-2:] = strings[:-3:-1]
    save_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu", model, Tokenizer.from_strings(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="ppo.checkpoint.pt: its vocabulary"):
        run(out, capsys, "--prompts", "2", "--samples", "4")
    assert snapshot(out) == before
