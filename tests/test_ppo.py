"""ppo.py against brute force, enumeration, autograd and the lecture's own table. The gradients of a
minibatch are in test_policy_gradients.py, where training ends is in test_enumerable.py.
"""

import copy
import itertools
import math
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import dpo
import gpt
import ppo
import reward_model
import sft
from data import stories
from data.files import InputError, split_prompts, write_jsonl
from data.judges import annotator_judge
from data.run import SilentRun, read_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import load_checkpoint, pad, response_mask, save_checkpoint, token_logprobs
from helpers import (END, LIMIT, PROMPTS, V, cpu_only, draw_prompts, first_step, made_up_rollouts,
                     metrics, noise, optimize, ragged_mask, response_reward, snapshot, tiny_gpt,
                     tiny_reward_model, untimed)
from reward_model import RewardModel, make_reward

# --------------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("junk", [1e30, -math.inf, math.nan])
def test_padding_never_counts(junk):
    """Whitening over the padding (lm-human-preferences), or 0 * nan = nan out of a product with the
    mask; a division by 0 where all advantages are the same."""
    mask, _, _ = ragged_mask(0)
    x = 3 * noise(1, *mask.shape) + 7
    inside = x[mask].double().numpy()
    x[~mask] = junk
    assert ppo.masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-5)
    white = ppo.whiten(x, mask)
    expected = (inside - inside.mean()) / inside.std()
    np.testing.assert_allclose(white[mask], expected, rtol=1e-4, atol=1e-5)
    assert (white[~mask] == 0).all()
    assert (ppo.whiten(torch.where(mask, 0.1, junk), mask) == 0).all()


def test_score_lands_on_the_last_response_token():
    """The score on the last column of the batch, or one beside <|end|>, where rows have other
    lengths; the ratio upside down (rlhf-book)."""
    mask, prompts, lengths = ragged_mask(3)
    logprobs = noise(1, *mask.shape)
    ref_logprobs = noise(2, *mask.shape)
    scores = 10 * noise(3, len(mask))
    logprobs[~mask] = math.nan
    ref_logprobs[~mask] = math.inf
    rewards = ppo.shaped_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    expected = torch.zeros(mask.shape)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        for position in range(prompt, length):  # the column before emits its token
            t = position - 1
            expected[b, t] = -0.3 * (logprobs[b, t] - ref_logprobs[b, t])
        expected[b, length - 2] += scores[b]
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("junk", [1e6, math.nan])
def test_gae_is_the_sum_of_residuals(gamma, lam, junk):
    """Bootstrapping from V at the padding, from the prompt's V or across <|end|>; gamma or lambda
    forgotten."""
    mask, prompts, lengths = ragged_mask(4, B=7)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    values = noise(2, *mask.shape)
    values[~mask] = junk
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


@pytest.mark.parametrize("ratio, advantage, stopped", [
    (0.5, 2.0, False), (1.1, 2.0, False), (1.5, 2.0, True),     # A > 0: only above 1+ε
    (0.5, -2.0, True), (0.9, -2.0, False), (1.5, -2.0, False),  # A < 0: only below 1-ε
    (0.5, 0.0, False), (1.0, 0.0, False), (1.5, 0.0, False),    # A = 0: no update, nothing stopped
])
def test_clipping_table_of_the_lecture(ratio, advantage, stopped):
    """max for min, or a clamp on both sides: a token that went wrong could then never come back.
    exp(1e4) of the padding is inf, and its gradient nan in every weight."""
    old = noise(0, 1, 4)
    mask = torch.tensor([[True, False, True, True]])
    logprobs = old.clone()
    logprobs[0, 0] += math.log(ratio)
    logprobs[0, 1] += 1e4  # padding
    logprobs.requires_grad_()
    advantages = torch.tensor([[advantage, math.nan, 0.3, -0.4]])
    loss, clip_fraction = ppo.clipped_policy_loss(logprobs, old, advantages, mask, clip=0.2)
    loss.backward()
    first = 0.0 if stopped else -advantage * ratio / 3  # -A ρ / n
    expected = torch.tensor([[first, 0.0, -0.3 / 3, 0.4 / 3]])
    torch.testing.assert_close(logprobs.grad, expected)
    if stopped:
        ratio = 1.2 if advantage > 0 else 0.8
    objective = advantage * ratio + 0.3 - 0.4
    assert loss.item() == pytest.approx(-objective / 3, abs=1e-6)
    assert clip_fraction.item() == pytest.approx(stopped / 3)


def test_clipped_value_loss():
    """min for max, ε as a factor instead of an amount, or the mean over the padding."""
    mask, _, _ = ragged_mask(6)
    old, values, returns = (3 * noise(seed, *mask.shape) for seed in (1, 2, 3))
    for x in (old, values, returns):
        x[~mask] = 1e6
    values.requires_grad_()
    loss = ppo.clipped_value_loss(values, old, returns, mask, clip=0.5)
    loss.backward()
    total = 0.0
    gradient = torch.zeros(mask.shape)
    for b, t in mask.nonzero().tolist():
        v = values[b, t].item()
        o = old[b, t].item()
        g = returns[b, t].item()
        near = min(max(v, o - 0.5), o + 0.5)
        total += max(0.5 * (v - g) ** 2, 0.5 * (near - g) ** 2)
        if abs(v - g) > abs(near - g) or near == v:
            gradient[b, t] = v - g
    n = mask.sum().item()
    assert 0 < (gradient != 0).sum() < n  # both cases occur
    assert loss.item() == pytest.approx(total / n, rel=1e-5)
    torch.testing.assert_close(values.grad, gradient / n, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kl, expected", [
    (6.0, 0.5), (6.6, 0.505), (5.4, 0.495),     # 10 % off the target of 6: 1 % of beta
    (7.2, 0.51), (60.0, 0.51), (0.0, 0.49),     # never more than 2 % in one step
])
def test_adaptive_beta(kl, expected):
    """A controller that lowers beta when the KL is too high, or whose step isn't clipped."""
    assert ppo.adapt_beta(0.5, kl, kl_target=6.0) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Rollouts and minibatches


def test_pick_keeps_the_rows_together():
    """An advantage beside the tokens of another row, or columns cut by the lengths of rows that
    were not picked."""
    batch = made_up_rollouts(tiny_gpt(0), tiny_reward_model(1))
    shape = batch.mask.shape
    batch = batch._replace(advantages=noise(7, *shape), returns=noise(8, *shape))
    for rows in ([4], [2, 4, 0], [3, 1, 5, 0, 4, 2]):
        part = batch.pick(torch.tensor(rows))
        T = batch.lengths[rows].max()
        for name in batch._fields:
            expected = getattr(batch, name)[rows]
            if expected.dim() == 2:
                expected = expected[:, :T if name == "tokens" else T - 1]
            assert torch.equal(getattr(part, name), expected), name


def test_every_pass_takes_every_row_once():
    """Rows that are drawn with replacement, left over at the end, or in the same order again."""
    batches = ppo.minibatches(10, 3, 4, random.Random(0), "cpu")
    assert [len(rows) for rows in batches] == [4, 4, 2] * 3
    orders = [torch.cat(batches[i:i + 3]).tolist() for i in (0, 3, 6)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2]


def test_rows_of_one_length_stand_together(monkeypatch):
    """Micro-batches cut from the rows as they come: half of what is computed is padding."""
    policy = tiny_gpt(0)
    value_model = tiny_reward_model(1)
    shapes = []
    for model in (policy, value_model.trunk):
        model.wte.register_forward_hook(
            lambda module, inputs, output: shapes.append(inputs[0].shape))
    batch = made_up_rollouts(policy, value_model)
    shapes.clear()
    config = ppo.Config(iterations=1, rollouts=6, micro_batch=2)
    first_step(monkeypatch, policy, value_model, batch, config, [3, 1, 5, 0, 4, 2])
    assert shapes == [(2, T) for T in (5, 11, 21) for _ in range(2)]


# --------------------------------------------------------------------------------------------------
# Scoring


def task_of(score):
    """A task whose responses earn score(ids)."""
    return ppo.Task(draw_prompts, response_reward(score), END)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_score_is_what_the_full_logits_say(micro_batch, monkeypatch):
    """Rows that come back in the order of their lengths; a score read at the padding, or where a
    longer row ends; a value where no response is; the reference at the policy's temperature, where
    it is another model than the SFT model. The oracle reads everything off one batch with all its
    padding."""
    policy = tiny_gpt(0)
    reference = tiny_gpt(1)
    scorer = tiny_reward_model(2)
    value_model = tiny_reward_model(3)
    prompts = torch.tensor([3, 1, 5, 2, 4, 1, 6])
    lengths = torch.tensor([4, 15, 7, 11, 5, 21, 13])
    tokens = torch.randint(V, (7, 24), generator=torch.Generator().manual_seed(4))  # padding too
    tokens[range(7), lengths - 1] = END
    mask = response_mask(prompts, lengths, 24)
    monkeypatch.setattr(ppo, "generate",
                        lambda *args, **more: gpt.Rollout(tokens, prompts, lengths))
    config = ppo.Config(micro_batch=micro_batch, temperature=0.7)
    task = ppo.Task(None, make_reward("reward_model", scorer, None, micro_batch), END)
    found = ppo.sample(policy, reference, value_model, task, [], config, random.Random(0),
                       SilentRun())
    with torch.no_grad():
        plain = [(found.old_logprobs, token_logprobs(policy(tokens), tokens, 0.7)),
                 (found.ref_logprobs, token_logprobs(reference(tokens), tokens)),
                 (found.old_values, value_model(tokens)[:, :-1])]
        last = scorer(tokens)[range(7), lengths - 1]
    for fast, slow in plain:
        torch.testing.assert_close(fast, torch.where(mask, slow, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores, last, rtol=1e-5, atol=1e-5)
    assert not found.token_rewards.any()


def test_rollouts_follow_the_scored_distribution():
    """Rollouts sampled with top-k or at temperature 1, but scored at another: importance ratios of
    the wrong policy."""
    count = 1000
    policy = tiny_gpt(0)
    config = ppo.Config(micro_batch=4000, max_new_tokens=1, temperature=0.5)
    rollouts = ppo.sample(policy, policy, None, task_of(len), PROMPTS * count, config,
                          random.Random(0), SilentRun())
    for i, prompt in enumerate(PROMPTS):
        drawn = rollouts.tokens[i::len(PROMPTS), len(prompt)]
        with torch.no_grad():
            p = (policy(torch.tensor([prompt]))[0, -1] / 0.5).softmax(0)
        frequency = torch.bincount(drawn, minlength=V) / count
        error = (p * (1 - p) / count).sqrt()
        assert ((frequency - p).abs() < 4.5 * error + 1e-3).all()


# --------------------------------------------------------------------------------------------------
# The loop, in the small world


def one_iteration(monkeypatch, policy, reference, value_model, task, **flags):
    """(Rollouts with their advantages, figures) of one iteration with a learning rate of 0."""
    config = ppo.Config(iterations=1, lr=0.0, value_lr=0.0, epochs=1, max_new_tokens=LIMIT, **flags)
    seen = []
    log_rollouts = ppo.log_rollouts

    def spy(run, iteration, rollouts, *others):
        seen.append(rollouts)
        log_rollouts(run, iteration, rollouts, *others)

    monkeypatch.setattr(ppo, "log_rollouts", spy)
    figures, = optimize(policy, reference, value_model, task, config)
    return seen[0], figures


def test_first_minibatch_is_on_policy(monkeypatch):
    """Another temperature, position or padding in the scoring than in the sampling: the ratio
    starts off at 1 no more. Every row alone, in float64: what was sampled, V of the prefix, the KL
    to the reference, and the entropy that a sample's -log π estimates."""
    policy = tiny_gpt(0)
    value_model = tiny_reward_model(1)
    batch, figures = one_iteration(monkeypatch, policy, copy.deepcopy(policy), value_model,
                                   task_of(len), rollouts=32, minibatch=32, micro_batch=5,
                                   temperature=0.7)
    mask = batch.mask
    assert len(set(mask.sum(dim=1).tolist())) > 1
    assert len(set(mask.int().argmax(dim=1).tolist())) > 1
    assert figures["clip_fraction"] == 0 and abs(figures["approx_kl"]) < 1e-6
    whitened = batch.advantages[mask]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert figures["length"] == pytest.approx(mask.sum().item() / 32)
    entropy = -batch.old_logprobs[mask].mean().item()
    assert figures["entropy"] == pytest.approx(entropy, rel=1e-5)

    double = copy.deepcopy(policy).double()
    surprise = []
    kl = 0.0
    for row, t in mask.nonzero().tolist():
        prefix = batch.tokens[row:row + 1, :t + 1]
        with torch.no_grad():
            alone = value_model(prefix)[0, -1]
            plain = double(prefix)[0, -1]
        colder = torch.distributions.Categorical(logits=plain / 0.7)
        action = batch.tokens[row, t + 1]
        logprob = colder.log_prob(action)
        assert batch.old_values[row, t].item() == pytest.approx(alone.item(), abs=1e-4)
        assert batch.old_logprobs[row, t].item() == pytest.approx(logprob.item(), abs=1e-4)
        kl += (logprob - plain.log_softmax(0)[action]).item() / 32
        surprise.append((-logprob - colder.entropy()).item())
    assert figures["kl"] == pytest.approx(kl, abs=1e-5)
    assert abs(np.mean(surprise)) < 4 * np.std(surprise) / len(surprise) ** 0.5


def test_response_without_end_is_terminal_and_fined(monkeypatch):
    """A cut response that keeps the reward model's score, or whose last return bootstraps from
    V."""
    value_model = tiny_reward_model(1)
    torch.nn.init.constant_(value_model.head.bias, 100.0)  # a bootstrap would be seen
    batch, figures = one_iteration(
        monkeypatch, tiny_gpt(3), tiny_gpt(3), value_model, task_of(lambda response: 7.0),
        rollouts=64, missing_end_score=-3.0)
    ended = batch.tokens[range(64), batch.lengths - 1] == END
    assert 0 < ended.sum() < 64
    expected = torch.where(ended, 7.0, -3.0)
    assert figures["no_end"] == pytest.approx(1 - ended.float().mean().item())
    assert figures["reward"] == pytest.approx(expected.mean().item(), rel=1e-5)
    last_returns = batch.returns[range(64), batch.lengths - 2]
    torch.testing.assert_close(last_returns, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_value_explained_is_measured_against_what_came(monkeypatch, factor):
    """Values compared with λ-returns, which are half made of those values: whatever V says, it
    explains itself. Here every G_t is the response's score, and V = factor · G_t + 7 leaves
    (1 - factor)² of its variance. And where all responses earn the same: -1e8, a rounding error
    over another."""
    flags = dict(rollouts=32, lam=0.5, beta=0.0)

    def all_values(value_model, rollout, mask, micro_batch):
        scores = 2.0 * mask.sum(dim=1)
        G = torch.where(rollout.ended(END), scores, -5.0)
        return torch.where(mask, factor * G[:, None] + 7, 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "all_values", all_values)
        _, figures = one_iteration(patch, tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2),
                                   task_of(lambda response: 2 * len(response)), **flags)
    assert figures["value_explained"] == pytest.approx(1 - (1 - factor) ** 2, abs=1e-4)
    _, figures = one_iteration(monkeypatch, tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2),
                               task_of(lambda response: 1.0), missing_end_score=1.0, **flags)
    assert figures["value_explained"] == 0


def test_a_process_reward_stands_at_its_steps(monkeypatch):
    """A dense reward that is whitened away, paid once more at the end, or paid to a response that
    never ended; the reward on the screen that is not what the policy got. With λ = 1 and V = 0 the
    returns are sums of rewards, which tell them apart."""
    rollouts = []

    def dense(rollout):
        steps = rollout.tokens[:, 1:] == 2  # a step ends with a 2
        return noise(7, *steps.shape) * steps

    def reward(rollout):
        rollouts.append(rollout)
        return torch.zeros(32), dense(rollout)

    reference = tiny_gpt(1)
    batch, figures = one_iteration(
        monkeypatch, tiny_gpt(0), reference, RewardModel(reference.config),
        ppo.Task(draw_prompts, reward, END), rollouts=32, beta=0.3, lam=1.0, missing_end_score=-4.0)
    rollout, = rollouts
    tokens = rollout.tokens
    ended = rollout.ended(END)
    assert 0 < ended.sum() < 32
    with torch.no_grad():
        rewards = -0.3 * token_logprobs(tiny_gpt(0)(tokens), tokens)
        rewards += 0.3 * token_logprobs(reference(tokens), tokens)
    earned = torch.where(ended[:, None], dense(rollout), 0.0)
    earned[range(32), rollout.lengths - 2] -= torch.where(ended, 0.0, 4.0)
    rewards = torch.where(batch.mask, rewards + earned, 0.0)
    expected = rewards.flip(1).cumsum(dim=1).flip(1) * batch.mask
    torch.testing.assert_close(batch.returns, expected, atol=1e-4, rtol=1e-4)
    assert figures["reward"] == pytest.approx(earned.sum().item() / 32, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The script

FLAGS = ["--rollouts", "6", "--minibatch", "4", "--micro_batch", "3", "--epochs", "2",
         "--max_new_tokens", "16", "--size", "cpu"]


def train(out, flags="", *more):
    """Run the script. Returns the rows of its metrics.jsonl."""
    argv = ["--out", str(out), *FLAGS, *flags.split(), *more]
    ppo.main(argv)
    name = argv[argv.index("--name") + 1] if "--name" in argv else "ppo"
    return metrics(out / "cpu" / name / "metrics.jsonl")


def test_main(out, capsys):
    """A run that cannot be repeated, a figure that the README explains and nothing logs, a
    checkpoint that won't load."""
    before = snapshot(out)
    rows = train(out, "--iterations 3")
    printed = capsys.readouterr().out
    assert untimed(train(out, "--iterations 3 --name ppo-again")) == untimed(rows)
    assert untimed(train(out, "--iterations 1 --name ppo-other --seed 2"))[0] != untimed(rows)[0]
    hidden = {"beta", "approx_kl", "value_loss", "memory_mb", "rollout_s", "scoring_s", "update_s",
              "seconds"}
    assert rows[0].keys() - hidden == {
        "step", "reward", "gold", "kl", "J", "entropy", "clip_fraction", "value_explained",
        "length", "no_end"}
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["beta"] == 0.2  # the README's, and the default
        assert row["J"] == pytest.approx(row["reward"] - 0.2 * row["kl"], abs=1e-4)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[2]["kl"] != 0
    policy, _, _ = load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
    reference, _, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    assert any((p != q).any() for p, q in zip(policy.parameters(), reference.parameters()))
    assert before.items() <= snapshot(out).items()  # the stages before it are as they were
    assert "next: python dpo.py" in printed
    header = next(line for line in printed.splitlines() if line.startswith("     step  ")).split()
    # The names' last words; the words before them are in the line above.
    shown = [name.split("_")[-1] for name in rows[0] if name not in hidden]
    assert header == shown + ["left"]


def test_kl_target_moves_beta(out, monkeypatch):
    """A controller that is never called, or that sees another KL than the one that is logged; a
    checkpoint that names the first beta, not the last one, or does not say how its policy was
    trained; the same after a run that was killed once all iterations were done."""
    flags = ("--iterations 3 --kl_target 3 --lr 1e-2 --temperature 0.8 --missing_end_score -3 "
             "--name ppo-killed")

    def killed(*args, **extra):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(out, flags)
    rows = train(out, flags, "--resume")
    assert len(rows) == 3
    expected = 0.2
    for row in rows:
        assert row["beta"] == pytest.approx(expected, rel=1e-5)
        expected = ppo.adapt_beta(row["beta"], row["kl"], 3.0)
    assert len({row["beta"] for row in rows}) == 3
    _, _, checkpoint = load_checkpoint(out / "cpu/ppo-killed/checkpoint.pt", "ppo", "cpu")
    assert checkpoint["beta"] == rows[-1]["beta"]
    assert checkpoint["temperature"] == 0.8
    assert checkpoint["missing_end_score"] == -3
    assert untimed(checkpoint["metrics"]) == untimed(rows)


def test_no_held_out_request_is_trained_on(out, monkeypatch):
    """A held-out request that a demonstration, a pair or a rollout has shown before: drawn with
    another seed, a few of them occur in training all the same."""
    _, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    data = sft.read_data(sft.Config(size="cpu", demonstrations=1500), None, tokenizer, 128)
    trained_on = [[one.ids[:one.prompt_length] for one in data.demonstrations]]
    held_out = [[one.ids[:one.prompt_length] for one in data.held_out]]
    assert [tokenizer.prompt(question) for question in data.questions] == held_out[0][:200]

    def respond(model, tokenizer, prompts, *rest, **more):
        return [str(i) for i in range(len(prompts))], [True] * len(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "respond", respond)
        config = reward_model.Config(size="cpu", pairs=1500, held_out=150)
        for part, rows in zip((trained_on, held_out), reward_model.collect(
                tiny_gpt(0, block_size=128), tokenizer, annotator_judge, config)):
            part.append([tokenizer.prompt(row["prompt"]) for row in rows])

    def loop(policy, reference, value_model, task, config, run):
        trained_on.append(task.draw_prompts(1500, random.Random(0)))
        run.record(beta=0.2)

    def generate(model, prompts, *rest, **more):
        held_out.append(prompts)
        return gpt.generate(model, prompts, *rest, **more)

    monkeypatch.setattr(ppo, "ppo", loop)
    monkeypatch.setattr(sft, "generate", generate)
    ppo.main(["--out", str(out), *FLAGS])
    assert [len(prompts) for prompts in trained_on] == [1500] * 3
    assert [len(prompts) for prompts in held_out] == [500, 150, 33, 33]
    for sequences, expected in ((trained_on, False), (held_out, True)):
        for ids in itertools.chain(*sequences):
            assert stories.is_held_out(tokenizer.decode(ids[1:-1])) == expected


@cpu_only
def test_a_prompt_is_answered_by_the_stages_own_policy(out, capsys):
    """--prompt that asks the SFT model whatever the stage and the --name, a --top_k that does not
    reach the sampler, a temperature that is not the trained one times the given one."""
    question = "Tell me a story about a shy fox and a kite."
    answers = set()
    for k, (stage, name, trained) in enumerate(((sft, "sft", 1.0), (ppo, "ppo", 1.0),
                                                (ppo, "ppo-sharp", 0.5), (dpo, "dpo", 1.0))):
        policy, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.3 * noise(k, *parameter.shape)
        path = out / "cpu" / name / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        extra = {"temperature": 0.5} if name == "ppo-sharp" else {}
        save_checkpoint(path, stage.__name__, "cpu", policy, tokenizer, **extra)
        before = snapshot(out)
        ids = tokenizer.prompt(question)

        def ask(flags=""):
            argv = ["--out", str(out), "--size", "cpu", "--prompt", question, *flags.split()]
            argv += ["--max_new_tokens", "12", *(["--name", name] if stage != sft else [])]
            stage.main(argv)
            return capsys.readouterr().out.removesuffix("\n")

        def sampled(seed, temperature, **more):
            return gpt.respond(policy, tokenizer, [ids], 12, seed, temperature, **more)[0][0]

        answers.add(ask())
        assert ask() == sampled(1, trained)
        hotter = ask("--seed 3 --temperature 2")
        assert hotter == sampled(3, 2 * trained) != sampled(3, 2.5)
        assert ask("--top_k 1") == sampled(2, 1e-4)
        assert snapshot(out) == before
    assert len(answers) == 4


def test_prompts_of_somebodys_own(out, tmp_path, capsys):
    """The annotator asked about prompts that it cannot judge; a prompt cut to fit, or that crashes
    the sampler; a held-out prompt that is trained on; an empty pool of prompts that ends in a
    traceback out of random.choices."""
    path = tmp_path / "prompts.jsonl"
    too_long = [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)] + too_long
    write_jsonl(path, rows + [{"prompt": "Who sings 3?", "chosen": "So."}])
    for row in train(out, "--iterations 2 --data", str(path)):
        assert "gold" not in row and "reward" in row
    line = re.search(r": (\d+) prompts, dropped (\d+) that leave no room for 16 new",
                     capsys.readouterr().out)
    kept, held_out = split_prompts(path)
    assert len(kept) + len(held_out) == 40 and held_out
    fitting = [prompt for prompt in kept if "long" not in prompt]
    assert (int(line[1]), int(line[2])) == (len(fitting), len(kept) - len(fitting))

    before = snapshot(out)
    the_same = [{"prompt": "Why?"}] * 9
    for rows, reason in ((too_long, "max_new_tokens 16"), (the_same, "same prompt")):
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            train(out, "--data", str(path))
    assert snapshot(out) == before


PLACE = "--name .*must be ppo"
VALUES = "goes with --method ppo or ppo_penalty or a2c"
RATIO = "goes with --method ppo or ppo_penalty or grpo"
GROUP = "must be at least 2 and divide --rollouts"


@pytest.mark.parametrize("flags, reason", [
    # Another stage's folder, of the reference for instance.
    ("--name sft", "--name sft: must be ppo"), ("--name my-ppo", PLACE), ("--name ../ppo", PLACE),
    ("--name ppo/../sft", PLACE),
    # A division by zero in the first rollout; a controller that multiplies 0.
    ("--temperature 0", "--temperature 0.0: must be at least"),
    ("--beta 0 --kl_target 6", "--kl_target 6.0: cannot be used with --beta 0"),
    ("--ptx -1", "--ptx -1.0: must be a number, and not negative"),
    ("--ptx nan", "--ptx nan: must be a number, and not negative"),
    # Whoever gives it believes that the rollouts are truncated.
    ("--top_k 3", "--top_k 3.*goes with --prompt only"),
    # A reward that there is not, or that cannot judge these prompts.
    ("--reward verifyer", "--reward verifyer: no such program"),
    ("--reward verifier --data {data}", "--reward verifier: knows the little world only"),
    ("--reward process --data {data}", "--reward process: knows the little world only"),
    # Ten runs with a flag tuned, of a method that has no use for it.
    ("--method reinforce --clip 0.1", "--clip 0.1: goes with --method ppo or grpo"),
    ("--method ppo_penalty --clip 0.1", "--clip 0.1: goes with --method ppo or grpo"),
    ("--penalty 2", "--penalty 2.0: goes with --method ppo_penalty only"),
    ("--method grpo --penalty_target 0.1", "--penalty_target 0.1: goes with --method ppo_penalty"),
    ("--method grpo --lam 0.5", f"--lam 0.5: {VALUES} only"),
    ("--method reinforce --value_lr 1e-3", f"--value_lr 0.001: {VALUES} only"),
    ("--method rloo --value_clip 1", f"--value_clip 1.0: {VALUES} only"),
    ("--method grpo --gamma 0.9", f"--gamma 0.9: {VALUES} or"),
    ("--method reinforce --epochs 4", f"--epochs 4: {RATIO}"),
    ("--method a2c --minibatch 4", f"--minibatch 4: {RATIO}"),
    ("--method ppo_penalty --kl_target 3", "--kl_target 3.0: goes with --method ppo only"),
    ("--method grpo --ptx 0.5", "--ptx 0.5: goes with --method ppo only"),
    ("--method reinforce_baseline --group 4", "--group 4: goes with --method rloo or grpo"),
    ("--group 4", "--group 4: goes with --method rloo or grpo"),
    # A group of one, compared with itself: no gradient at all.
    ("--method grpo --group 1", f"--group 1: {GROUP} 64"),
    ("--method grpo --rollouts 60", f"--group 8: {GROUP} 60"),
    ("--method rloo --group 3", f"--group 3: {GROUP} 64"),
    ("--method rloo --group 128", f"--group 128: {GROUP} 64"),
    ("--method rloo --group 0", "--group 0: must be positive")])
def test_flags_that_would_cost_a_run(stages, flags, reason):
    """A flag that is found to be wrong after minutes of training, or never. Refused in one line,
    before anything is written."""
    before = snapshot(stages)
    flags = flags.format(data=stages / "demonstrations.jsonl")
    with pytest.raises(InputError, match=f"^{reason}") as error:
        ppo.main(["--out", str(stages), "--size", "cpu", *flags.split()])
    assert "\n" not in str(error.value)
    assert snapshot(stages) == before


def test_reward_model_of_another_vocabulary(out):
    """Ids of one tokenizer scored by a model of another: numbers come out, and they mean
    nothing. An earlier result must survive."""
    (out / "cpu/ppo").mkdir()
    (out / "cpu/ppo/metrics.jsonl").write_text("{}\n")
    path = out / "cpu/reward_model/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "reward_model", "cpu", model_class=RewardModel)
    strings = list(tokenizer.vocabulary)  # the same size
    strings[-2:] = reversed(strings[-2:])
    save_checkpoint(path, "reward_model", "cpu", model, Tokenizer(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="reward_model.checkpoint.pt: its vocabulary"):
        train(out)
    assert snapshot(out) == before


@pytest.mark.parametrize("fine, noted", [("9", True), ("-9", False)])
def test_a_fine_that_pays_is_told(out, fine, noted, capsys):
    """A policy that learns never to end, because its finished responses score less than the fine
    for unfinished ones, without a word; or the word in every iteration."""
    train(out, f"--iterations 2 --missing_end_score={fine}")
    assert capsys.readouterr().out.count("never ending pays") == noted


# --------------------------------------------------------------------------------------------------
# Other rewards


def test_a_reward_of_texts_is_asked_once_a_batch(monkeypatch):
    """A program that is started for every few responses, or asked about some of them in another
    order."""
    asked = []
    tokenizer = Tokenizer(train_vocabulary("a b c d e f", 270))
    rows = [(f"{i}?", "abc " * (1 + 7 * i % 5)) for i in range(20)]
    prompts = [tokenizer.prompt(prompt) for prompt, _ in rows]
    tokens, lengths = pad([ids + tokenizer.response(text)
                           for ids, (_, text) in zip(prompts, rows)])
    rollout = gpt.Rollout(tokens, torch.tensor([len(ids) for ids in prompts]), lengths)

    def program(texts):
        asked.append(texts)
        return [len(text) for _, text in texts]

    monkeypatch.setattr(reward_model, "reward_of", lambda name: program)
    scores, token_rewards = make_reward("count", None, tokenizer, 4)(rollout)
    assert asked == [rows]
    assert scores.tolist() == [len(text) for _, text in rows]
    assert token_rewards.shape == tokens[:, 1:].shape and not token_rewards.any()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_verifier_needs_no_reward_model(out, method, capsys):
    """A reward model that is trained first, and never asked; a fine for missing ends, under which
    J* is not that of a reward of 0 and 1; a value model that starts from nowhere."""
    shutil.rmtree(out / "cpu/reward_model")
    rows = train(out, f"--iterations 2 --reward verifier --method {method} --rollouts 8 "
                      "--max_new_tokens 4")
    printed = capsys.readouterr().out
    assert "plan" not in printed and not (out / "cpu/reward_model").exists()
    assert "; reward: verifier\n" in printed
    models = "2 (policy, reference)"
    if method == "ppo":
        models = "3 (policy, reference, value_model)"
    assert f"models in memory: {models}" in printed
    assert "before and after on 33 held-out prompts: reward 0.00 → 0.00" in printed
    assert [row["reward"] for row in rows] == [0.0, 0.0]
    assert read_torch(out / "cpu/ppo/checkpoint.pt")["missing_end_score"] == 0.0
    assert any(row["no_end"] > 0 for row in rows)


PROGRAM = """import json, os, sys
rows = [json.loads(line) for line in sys.stdin]
count = len(open({0!r}).readlines()) if os.path.exists({0!r}) else 0
open({0!r}, "a").write("run\\n")
if count == {1}:
    sys.exit("out of credit")
for row in rows:
    print(json.dumps(dict(reward=len(row["response"]) / 10)))
"""


def test_a_program_as_the_reward(out, tmp_path):
    """Rewards of a program that reach no policy; prompts of one's own that only a reward model may
    judge; a program that fails in the middle of a run, and takes it along."""
    prompts = tmp_path / "prompts.jsonl"
    program = tmp_path / "reward.py"
    write_jsonl(prompts, [{"prompt": f"Who sings {i}?"} for i in range(20)])
    argv = ["--data", str(prompts), "--reward", f"{sys.executable} {program}"]
    flags = "--iterations 3 --save 1"
    program.write_text(PROGRAM.format(str(tmp_path / "whole.txt"), -1))
    whole = untimed(train(out, flags, *argv))
    assert len(whole) == 3 and any(row["reward"] > 0 for row in whole) and "gold" not in whole[0]
    # Once an iteration, and for before and after.
    assert (tmp_path / "whole.txt").read_text() == 5 * "run\n"
    program.write_text(PROGRAM.format(str(tmp_path / "killed.txt"), 2))
    with pytest.raises(InputError, match="gave 0 of .* answers and ended with status 1; it said: "
                                         "out of credit; "):
        train(out, flags, *argv)
    assert untimed(train(out, flags, *argv, "--resume")) == whole


def test_ppo_on_the_process_model(out, monkeypatch, capsys):
    """The outcome model's scores under the name of the process model; a stage that is missing, and
    is not trained."""
    loop = ppo.ppo
    seen = []

    def spy(policy, reference, value_model, task, config, run):
        path = out / "cpu/process_model/checkpoint.pt"
        weights, tokenizer, _ = load_checkpoint(path, "process_model", "cpu", gpt.get_device(),
                                                RewardModel)
        for trained, loaded in zip(value_model.parameters(), weights.parameters()):
            assert torch.equal(trained, loaded)
        prompt, = task.draw_prompts(1, random.Random(0))
        rollout = gpt.generate(policy, [prompt] * 4, 16, task.end_token, seed=1)
        expected, _ = reward_model.step_rewards(weights, rollout, tokenizer)
        scores, token_rewards = task.reward(rollout)
        assert torch.equal(token_rewards, expected) and not scores.any()
        seen.append(True)
        loop(policy, reference, value_model, task, config, run)

    monkeypatch.setattr(ppo, "ppo", spy)
    assert len(train(out, "--iterations 2 --reward process")) == 2 and seen
    assert "plan    process_model → ppo, " in capsys.readouterr().out
