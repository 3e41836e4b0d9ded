"""ppo.py against brute force, enumeration and autograd. The gradients of a minibatch are in
test_policy_gradients.py, where training ends is in test_enumerable.py."""

import math
import random
import re
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import gpt
import ppo
import reward_model
from data.files import InputError, read_comparisons, write_jsonl
from data.run import SilentRun, read_torch
from data.stories import is_held_out
from gpt import load_checkpoint, save_checkpoint, token_logprobs
from helpers import (ASKED, END, LIMIT, PROMPTS, V, cpu_only, draw_prompts, metrics, noise,
                     optimize, ragged_mask, response_reward, snapshot, tiny_gpt,
                     tiny_reward_model, untimed)
from reward_model import RewardModel


def test_padding_never_counts():
    """Whitening over the padding (lm-human-preferences), or 0 * nan = nan out of a product with the
    mask; a division by 0 where all advantages are the same."""
    mask, _, _ = ragged_mask(0)
    x = 3 * noise(1, *mask.shape) + 7
    inside = x[mask].double().numpy()
    x[~mask] = math.nan
    assert ppo.masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-5)
    white = ppo.whiten(x, mask)
    expected = (inside - inside.mean()) / inside.std()
    np.testing.assert_allclose(white[mask], expected, rtol=1e-4, atol=1e-5)
    assert (white[~mask] == 0).all()
    assert (ppo.whiten(torch.where(mask, 0.1, math.nan), mask) == 0).all()


def test_score_lands_on_the_last_response_token():
    """The score on the batch's last column, or one beside <|end|>; the ratio upside down
    (rlhf-book)."""
    mask, _, lengths = ragged_mask(3)
    logprobs = torch.where(mask, noise(1, *mask.shape), math.nan)
    ref_logprobs = noise(2, *mask.shape)
    scores = 10 * noise(3, len(mask))
    rewards = ppo.shaped_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    expected = -0.3 * (logprobs - ref_logprobs).nan_to_num()
    for b, length in enumerate(lengths):
        expected[b, length - 2] += scores[b]  # the column before emits the token
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


def test_gae_is_the_sum_of_residuals():
    """Bootstrapping from V at the padding, from the prompt's V or across <|end|>; gamma or lambda
    forgotten."""
    gamma = 0.9
    lam = 0.8
    mask, prompts, lengths = ragged_mask(4, B=7)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    values = noise(2, *mask.shape)
    values[~mask] = math.nan
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)

    A = torch.zeros(mask.shape)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        r = rewards[b].tolist()
        v = values[b].tolist()[:length - 1] + [0.0]  # terminal
        for t in range(prompt - 1, length - 1):
            for k in range(t, length - 1):
                A[b, t] += (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
    torch.testing.assert_close(advantages, A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, torch.where(mask, A + values, 0.0), rtol=1e-4, atol=1e-5)


def test_adaptive_beta():
    """A controller that lowers beta when the KL is too high, or whose step isn't clipped."""
    found = [ppo.adapt_beta(0.5, kl, kl_target=6.0) for kl in (6.6, 5.4, 60.0, 0.0)]
    assert found == pytest.approx([0.505, 0.495, 0.51, 0.49])


def test_every_pass_takes_every_row_once():
    """Rows that are drawn with replacement, left over at the end, or in the same order again."""
    batches = ppo.minibatches(10, 3, 4, random.Random(0), "cpu")
    assert [len(rows) for rows in batches] == [4, 4, 2] * 3
    orders = [torch.cat(batches[i:i + 3]).tolist() for i in (0, 3, 6)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2]


def one_iteration(monkeypatch, reference, value_model, reward, **flags):
    """(Rollouts with advantages, figures) of an iteration of tiny_gpt(0), learning rate 0."""
    config = ppo.Config(iterations=1, rollouts=32, lr=0.0, value_lr=0.0, epochs=1,
                        max_new_tokens=LIMIT, **flags)
    spy = mock.Mock(wraps=ppo.log_rollouts)
    monkeypatch.setattr(ppo, "log_rollouts", spy)
    task = ppo.Task(draw_prompts, reward, END)
    figures, = optimize(tiny_gpt(0), reference, value_model, task, config)
    return spy.call_args.args[2], figures


def test_first_minibatch_is_on_policy(monkeypatch):
    """Another temperature, position or padding in the scoring than in the sampling; rows in the
    order of their lengths; a reference at the policy's temperature. The oracle: every row alone."""
    policy = tiny_gpt(0).double()
    reference = tiny_gpt(1)
    value_model = tiny_reward_model(1)
    batch, figures = one_iteration(monkeypatch, reference, value_model, response_reward(len),
                                   minibatch=32, micro_batch=5, temperature=0.7)
    mask = batch.mask
    assert len(set(mask.sum(dim=1).tolist())) > 1
    assert figures["clip_fraction"] == 0 and abs(figures["approx_kl"]) < 1e-6
    assert figures["length"] == pytest.approx(mask.sum().item() / 32)
    assert figures["entropy"] == pytest.approx(-batch.old_logprobs[mask].mean().item(), rel=1e-5)

    kl = 0.0
    for row, t in mask.nonzero().tolist():
        prefix = batch.tokens[row:row + 1, :t + 1]
        action = batch.tokens[row, t + 1]
        with torch.no_grad():
            value = value_model(prefix)[0, -1]
            colder = torch.distributions.Categorical(logits=policy(prefix)[0, -1] / 0.7)
            ref = reference(prefix)[0, -1].log_softmax(0)[action]
        logprob = colder.log_prob(action)
        assert batch.old_values[row, t].item() == pytest.approx(value.item(), abs=1e-4)
        assert batch.old_logprobs[row, t].item() == pytest.approx(logprob.item(), abs=1e-4)
        kl += (logprob - ref).item() / 32
    assert figures["kl"] == pytest.approx(kl, abs=1e-4)


def test_rollouts_follow_the_scored_distribution():
    """Rollouts sampled with top-k or at temperature 1, but scored at another: importance ratios of
    the wrong policy."""
    count = 1000
    policy = tiny_gpt(0)
    config = ppo.Config(micro_batch=4000, max_new_tokens=1, temperature=0.5)
    task = ppo.Task(draw_prompts, response_reward(len), END)
    rollouts = ppo.sample(policy, policy, None, task, PROMPTS * count, config, random.Random(0),
                          SilentRun())
    for i, prompt in enumerate(PROMPTS):
        drawn = rollouts.tokens[i::len(PROMPTS), len(prompt)]
        with torch.no_grad():
            p = (policy(torch.tensor([prompt]))[0, -1] / 0.5).softmax(0)
        frequency = torch.bincount(drawn, minlength=V) / count
        assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / count).sqrt() + 1e-3).all()


def test_value_explained_is_measured_against_what_came(monkeypatch):
    """Values compared with λ-returns, which are half made of those values: whatever V says, it
    explains itself."""
    def all_values(value_model, rollout, mask, micro_batch):
        G = torch.where(rollout.ended(END), 2.0 * mask.sum(dim=1), -5.0)  # the score: no KL
        return torch.where(mask, 3 * G[:, None] + 7, 0.0)  # leaves (1 - 3)² of its variance

    monkeypatch.setattr(ppo, "all_values", all_values)
    reward = response_reward(lambda response: 2 * len(response))
    _, figures = one_iteration(monkeypatch, tiny_gpt(1), tiny_reward_model(2), reward, lam=0.5,
                               beta=0.0, missing_end_score=-5.0)
    assert figures["value_explained"] == pytest.approx(1 - (1 - 3) ** 2, abs=1e-4)


def test_what_a_response_earns(monkeypatch):
    """A cut response that keeps its score, is paid for its steps, or bootstraps from V; rewards of
    steps that are paid twice. With λ = 1 the returns are sums of rewards, whatever V is."""
    def dense(tokens):
        steps = tokens[:, 1:] == 2  # a step ends with a 2
        return noise(7, *steps.shape) * steps

    def reward(rollout):
        return torch.full((32,), 7.0), dense(rollout.tokens)

    reference = tiny_gpt(1)
    value_model = RewardModel(reference.config)
    torch.nn.init.constant_(value_model.head.bias, 100.0)  # a bootstrap would be seen
    batch, figures = one_iteration(monkeypatch, reference, value_model, reward, beta=0.3, lam=1.0,
                                   missing_end_score=-4.0)
    tokens = batch.tokens
    ended = tokens[range(32), batch.lengths - 1] == END
    assert 0 < ended.sum() < 32
    earned = torch.where(ended[:, None], dense(tokens), 0.0)
    earned[range(32), batch.lengths - 2] += torch.where(ended, 7.0, -4.0)
    with torch.no_grad():
        rewards = earned - 0.3 * token_logprobs(tiny_gpt(0)(tokens), tokens)
        rewards += 0.3 * token_logprobs(reference(tokens), tokens)
    rewards = torch.where(batch.mask, rewards, 0.0)
    expected = rewards.flip(1).cumsum(dim=1).flip(1) * batch.mask
    torch.testing.assert_close(batch.returns, expected, atol=1e-3, rtol=1e-4)
    assert figures["reward"] == pytest.approx(earned.sum().item() / 32, abs=1e-5)
    assert figures["no_end"] == pytest.approx(1 - ended.float().mean().item())


# --------------------------------------------------------------------------------------------------
# The script


def train(out, flags="", *more):
    """Run the script. Returns the rows of its metrics.jsonl."""
    flags = ("--size cpu --rollouts 6 --minibatch 4 --micro_batch 3 --epochs 2 --max_new_tokens 16 "
             + flags)
    ppo.main(["--out", str(out), *flags.split(), *more])
    return metrics(out / "cpu/ppo/metrics.jsonl")


def test_main(out):
    """A run that cannot be repeated; a figure of the README's that nothing logs; a controller of
    another KL than the logged one; a checkpoint that won't load, or of another iteration's beta."""
    before = snapshot(out)
    flags = "--iterations 3 --kl_target 3 --lr 1e-2"
    rows = train(out, flags)
    checkpoint = load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")[2]
    assert before.items() <= snapshot(out).items()  # the stages before it are as they were
    assert untimed(train(out, flags)) == untimed(rows)
    assert untimed(train(out, "--iterations 1 --seed 2"))[0] != untimed(rows)[0]
    assert rows[0].keys() == {
        "step", "reward", "gold", "kl", "J", "entropy", "clip_fraction", "value_explained",
        "length", "no_end", "beta", "approx_kl", "value_loss", "memory_mb", "rollout_s",
        "scoring_s", "update_s", "seconds"}
    beta = 0.2  # the README's, and the default
    for row in rows:
        assert row["beta"] == pytest.approx(beta, rel=1e-5)
        assert row["J"] == pytest.approx(row["reward"] - beta * row["kl"], abs=1e-4)
        beta = ppo.adapt_beta(row["beta"], row["kl"], 3.0)
    assert len({row["beta"] for row in rows}) == 3 and checkpoint["beta"] == rows[-1]["beta"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[2]["kl"] != 0


@cpu_only
def test_a_prompt_is_answered_by_the_policy(out, capsys):
    """--prompt that asks another policy than --name's, or at a temperature that is not the trained
    one times the given one."""
    policy, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    with torch.no_grad():
        policy.wte.weight += 0.3 * noise(0, *policy.wte.weight.shape)
    (out / "cpu/ppo-sharp").mkdir()
    save_checkpoint(out / "cpu/ppo-sharp/checkpoint.pt", "ppo", "cpu", policy, tokenizer,
                    temperature=0.5)
    for flags, seed, temperature in (("", 1, 0.5), ("--seed 3 --temperature 2", 3, 1.0),
                                     ("--top_k 1", 2, 1e-4)):
        ppo.main(["--out", str(out), "--size", "cpu", "--name", "ppo-sharp", "--prompt", ASKED,
                  "--max_new_tokens", "12", *flags.split()])
        [text], _ = gpt.respond(policy, tokenizer, [tokenizer.prompt(ASKED)], 12, seed, temperature)
        assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("flags, reason", [
    ("--name ppo/../sft", "--name ppo/../sft: must be ppo"),
    ("--reward process --data {data}", "--reward process: knows the little world only"),
    # Ten runs with a flag tuned, of a method that has no use for it.
    ("--method grpo --lam 0.5", "--lam 0.5: goes with --method ppo or ppo_penalty or a2c only"),
    ("--method reinforce --epochs 4", "--epochs 4: goes with --method ppo or ppo_penalty or grpo"),
    ("--method a2c --clip 0.3", "--clip 0.3: goes with --method ppo or grpo"),
    ("--method grpo --gamma 0.9", "--gamma 0.9: goes with --method ppo or ppo_penalty or a2c"),
    ("--kl_target 3 --beta 0", "--kl_target 3.0: cannot be used with --beta 0"),
    # A group of one, compared with itself: no gradient at all.
    ("--method grpo --group 1", "--group 1: must be at least 2 and divide --rollouts 64"),
    ("--method grpo --group 3", "--group 3: must be at least 2 and divide --rollouts 64")])
def test_flags_that_would_cost_a_run(stages, flags, reason):
    """A flag that is found to be wrong after minutes of training, or never."""
    before = snapshot(stages)
    flags = flags.format(data=stages / "demonstrations.jsonl")
    with pytest.raises(InputError, match=f"^{reason}") as error:
        ppo.main(["--out", str(stages), "--size", "cpu", *flags.split()])
    assert "\n" not in str(error.value)
    assert snapshot(stages) == before


@pytest.mark.parametrize("fine, noted", [("9", True), ("-9", False)])
def test_a_fine_that_pays_is_told(out, fine, noted, capsys):
    """A policy that learns never to end, because that costs less than its scores, without a word;
    or the word in every iteration; no fine in the scores before and after. A checkpoint that does
    not say how it was trained."""
    train(out, f"--iterations 2 --temperature 0.8 --max_new_tokens 5 --missing_end_score={fine}")
    printed = capsys.readouterr().out
    assert printed.count("never ending pays") == noted
    before, after = map(float, re.search(r"reward (\S+) → (\S+)", printed).groups())
    assert (before > 0.3, after > 0.3) == (noted, noted)
    checkpoint = read_torch(out / "cpu/ppo/checkpoint.pt")
    assert (checkpoint["temperature"], checkpoint["missing_end_score"]) == (0.8, float(fine))


def test_the_verifier_needs_no_reward_model(out, capsys):
    """A reward model that is trained first, and never asked; a fine for missing ends, under which
    J* is not that of a reward of 0 and 1."""
    shutil.rmtree(out / "cpu/reward_model")
    rows = train(out, "--iterations 2 --reward verifier --max_new_tokens 4")
    assert "models in memory: 3 (policy, reference, value_model)" in capsys.readouterr().out
    assert not (out / "cpu/reward_model").exists()
    assert [row["reward"] for row in rows] == [0.0, 0.0]
    assert read_torch(out / "cpu/ppo/checkpoint.pt")["missing_end_score"] == 0.0
    assert any(row["no_end"] > 0 for row in rows)


def test_a_program_as_the_reward(out, tmp_path):
    """Rewards of a program that reach no policy, or that is started for every few responses, or by
    --explain, from somebody else's checkpoint; the annotator asked about prompts not its own."""
    prompts = tmp_path / "prompts.jsonl"
    program = tmp_path / "reward.py"
    runs = tmp_path / "runs.txt"
    write_jsonl(prompts, [{"prompt": f"Who sings {i}?"} for i in range(20)])
    program.write_text(f"""import json, sys
open({str(runs)!r}, "a").write("run\\n")
for line in sys.stdin:
    print(json.dumps(dict(reward=len(json.loads(line)["response"]) / 10)))
""")
    rows = train(out, "--iterations 3", "--data", str(prompts), "--reward",
                 f"{sys.executable} {program}")
    assert "gold" not in rows[0] and any(row["reward"] > 0 for row in rows)
    with pytest.raises(InputError, match="trained with a program, .* give --reward '.*reward.py'"):
        ppo.main(["--out", str(out), "--size", "cpu", "--explain"])
    assert runs.read_text() == (3 + 2) * "run\n"  # once an iteration, and before and after


def test_ppo_on_the_process_model(out, monkeypatch):
    """The outcome model's scores under the name of the process model; a stage that is missing, and
    is not trained; a value model that starts from nowhere. A held-out request that a pair or a
    rollout has shown before: drawn with another seed, a few occur in training all the same."""
    loop = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(ppo, "ppo", loop)
    with pytest.raises(KeyboardInterrupt):
        train(out, "--reward process")
    policy, _, value_model, task, *_ = loop.call_args.args
    path = out / "cpu/process_model/checkpoint.pt"
    weights, tokenizer, _ = load_checkpoint(path, "process_model", "cpu", gpt.get_device(),
                                            RewardModel)
    torch.testing.assert_close(value_model.state_dict(), weights.state_dict(), atol=0, rtol=0)
    prompts = task.draw_prompts(1500, random.Random(0))
    rollout = gpt.generate(policy, prompts[:4], 16, task.end_token, seed=1)
    expected, _ = reward_model.step_rewards(weights, rollout, tokenizer, 3)
    assert torch.equal(task.reward(rollout)[1], expected)

    pairs, held_out_pairs = read_comparisons(out / "cpu/reward_model")
    trained_on = [row["prompt"] for row in pairs]
    trained_on += [tokenizer.decode(ids[1:-1]) for ids in prompts]
    assert len(trained_on) == 64 + 1500 and not any(map(is_held_out, trained_on))
    assert all(is_held_out(row["prompt"]) for row in held_out_pairs)
