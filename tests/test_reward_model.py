"""The Bradley-Terry reward model: its loss, its score, its pairs, the stage as a whole, and the
process reward model."""

import copy
import itertools
import math
import random
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gpt
import reward_model
import sft
from data import annotator, stories
from data.answer_key import reward_model_figures
from data.corpus import draw_requests
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.run import SilentRun
from data.tokenizer import Pair, Tokenizer, encode_pairs, train as train_vocabulary
from helpers import ASKED, HAPPY, SAD, metrics, snapshot, story_of, tiny_reward_model
from reward_model import RewardModel, bradley_terry_loss, score_all

V = 11


def tiny_model(seed):
    """A reward model in float64, none of whose parameters is 0 as a new one's are."""
    model = tiny_reward_model(seed, vocab=V, block_size=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.double()


def random_rows(seed, count, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def reward_of(model, ids):
    """A sequence's reward, without padding."""
    return model(torch.tensor([ids]))[0, -1]


def test_only_differences_count():
    """A loss that pushes the rewards' level, which is free; a pair that is surely right and still
    pulls; a sum for the mean. log(sigmoid(x)) in two steps is -inf at x = -104 in float32."""
    margins = torch.tensor([1.5, -1.5, 0.0, -400.0, 600.0])
    for level in (0.0, 7.0):
        chosen = (level + margins).requires_grad_()
        rejected = torch.full((5,), level, requires_grad=True)
        loss = 5 * bradley_terry_loss(chosen, rejected)
        loss.backward()
        expected = 1 / (1 + margins.exp())  # the probability of the other order
        assert loss.item() == pytest.approx(0.2014 + 1.7014 + math.log(2) + 400)    # CS 224R, ch. 6
        torch.testing.assert_close(chosen.grad, -expected)
        torch.testing.assert_close(rejected.grad, expected)


def test_score_reads_the_last_token_whatever_the_padding():
    """A score read at column -1 is that of the padding; one that looks for the padding token stops
    at the first <|end|>; one that sees what stands behind the last token."""
    model = tiny_model(1)
    rows = random_rows(1, 12)
    alone = torch.stack([reward_of(model, row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.randint(V, (12, 50), generator=torch.Generator().manual_seed(1))
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    torch.testing.assert_close(model.score(tokens, lengths), alone)
    torch.testing.assert_close(score_all(model, rows, 5), alone.detach())
    assert alone.std() > 0.1


def test_the_head_reads_what_the_language_model_reads():
    """A head behind a second LayerNorm: the reward model then isn't the SFT model with another
    head. A head in bf16: scores near 3 are rounded to 1/64, and two answers get one score."""
    model = tiny_model(3).float()
    tokens = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(3))
    states = []
    model.trunk.ln_f.register_forward_hook(lambda *call: states.append(call[2]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rewards = model(tokens)
        model.trunk(tokens)
    assert torch.equal(states[0], states[1]) and rewards.dtype == torch.float32
    by_hand = (states[0].float() * model.head.weight[0]).sum(dim=2) + model.head.bias
    torch.testing.assert_close(rewards, by_hand)


def share_right(margin):
    return (margin > 0).float().mean().item()


def check_step(train, twin, items, micro_batch, loss, margin, monkeypatch):
    """One step of a training loop, fit or fit_process, on all items, which are held out too: it has
    the gradient of this loss, reports it, and the share of the margins that are right."""
    gradients = []

    def look(optimizer, model, lr):
        gradients.extend(parameter.grad.clone() for parameter in model.parameters())

    monkeypatch.setattr(reward_model, "optimizer_step", look)
    config = reward_model.Config(batch=len(items), micro_batch=micro_batch)
    run = SilentRun()
    train(copy.deepcopy(twin), items, items, config, random.Random(0), run)
    loss.backward()
    expected = [parameter.grad for parameter in twin.parameters()]
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)
    row = run.rows[-1]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) == row["held_out_loss"]
    assert row["held_out_accuracy"] == pytest.approx(share_right(margin)) and 0 < margin.max()


def test_micro_batches_give_the_gradient_of_the_whole_batch(monkeypatch):
    """A last micro-batch that is smaller and counts as much as the others; chosen and rejected cut
    apart at the wrong row; an accuracy of 30 % that is one of 70 % with a sign turned."""
    twin = tiny_model(5)
    rows = random_rows(5, 14)
    pairs = [Pair(chosen, rejected, 1) for chosen, rejected in zip(rows[:7], rows[7:])]
    margins = [reward_of(twin, pair.chosen) - reward_of(twin, pair.rejected) for pair in pairs]
    margin = torch.stack(margins)   # pair by pair, without padding
    loss = torch.log1p(torch.exp(-margin)).mean()
    check_step(reward_model.fit, twin, pairs, 3, loss, margin, monkeypatch)
    torch.testing.assert_close(reward_model.held_out_margins(twin, pairs, 3), margin.detach())


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(7)
    text = "\n".join(stories.document(rng).text for _ in range(50))
    return Tokenizer(train_vocabulary(text, 400))


def of_context(block_size):
    """A policy of which only the context matters."""
    return SimpleNamespace(config=SimpleNamespace(block_size=block_size))


ANSWERS = [     # first, second, whether the second ended, why they can't be compared
    ("A fox.", "A bear.", True, ""), ("B.", "C.", False, "no end"), (" \n", "D.", True, "blank"),
    ("F.", "F.", True, "equal texts"), ("G.", "Anew. " * 90, True, "longer than the context")]


def test_collected_pairs_are_comparable_and_labelled_by_the_judge(tokenizer, monkeypatch):
    """An answer under another's prompt, an unfinished or too long one compared with a whole one; a
    label turned round; the same samples again. A policy that never ends, asked for ever."""
    answers = itertools.cycle(ANSWERS)
    seeds = set()
    usable = []
    counts = Counter()

    def respond(model, tokenizer, prompts, max_new_tokens, seed):
        seeds.add(seed)
        texts = []
        ended = []
        for ids in prompts[::2]:    # each prompt twice in a row
            first, second, second_ended, reason = next(answers)
            texts += [first, second]
            ended += [True, second_ended]
            counts[reason] += 1
            if not reason:
                usable.append((tokenizer.decode(ids[1:-1]), first, second))
        return texts, ended

    monkeypatch.setattr(reward_model, "respond", respond)
    collect = partial(reward_model.collect_pairs, of_context(100), tokenizer, draw_requests, 12,
                      lambda batch, rng: [(len(prompt) % 2, "") for prompt, _, _ in batch],
                      reward_model.Config(sample_batch=8), random.Random(10))
    rows, dropped = collect()
    assert dropped == {reason: counts[reason] for reason in dropped} and len(dropped) == 4
    for row, (prompt, *texts) in zip(rows, usable, strict=True):
        choice = len(prompt) % 2
        assert row == dict(prompt=prompt, chosen=texts[choice], rejected=texts[1 - choice])
    assert {row["chosen"] for row in rows} == {"A fox.", "A bear."} and len(seeds) > 5

    answers = itertools.repeat(ANSWERS[1])
    with pytest.raises(InputError, match="0 can be compared, dropped 128 no end, .* 96; if"):
        collect()


def test_a_reward_model_judges_with_bradley_terrys_noise(tokenizer):
    """The better score always, which no finite margin can fit; a choice turned round, or of another
    pair's scores."""
    model = tiny_reward_model(1, vocab=tokenizer.n_vocab, block_size=64)
    model.head.weight.data *= 0.3
    judge = reward_model.reward_model_judge(model, tokenizer)
    asked = [("Hi.", "Good morning.", "No."), ("Hi.", "No.", "Good morning."),
             ("Who?", "A fox.", "Me."), ("Why?", "So.", "So so.")]
    labels = [choice for choice, _ in judge(asked * 1000, random.Random(3))]
    share = 1 - torch.tensor(labels).view(1000, 4).float().mean(dim=0)
    margins = []
    for prompt, *texts in asked:
        first, second = [reward_of(model, tokenizer.prompt(prompt) + tokenizer.response(text))
                         for text in texts]
        margins.append((first - second).item())
    p = torch.sigmoid(torch.tensor(margins))
    assert ((share - p).abs() < 4 * (p * (1 - p) / 1000).sqrt()).all()
    assert p.max() - p.min() > 0.3 and 0.02 < p.min()


def rollout_of(rows, tokenizer):
    """A Rollout of (prompt, text, whether it ended)."""
    sequences = []
    prompt_lengths = []
    for prompt, text, ended in rows:
        ids = tokenizer.prompt(prompt)
        prompt_lengths.append(len(ids))
        response = tokenizer.response(text)
        sequences.append(ids + (response if ended else response[:-1]))
    tokens, lengths = gpt.pad(sequences)
    return gpt.Rollout(tokens, torch.tensor(prompt_lengths), lengths)


def test_the_text_that_is_shown_is_the_median_one(tokenizer, monkeypatch, capsys):
    """The luckiest of 33 prompts shown as the rule; two seeds, or a temperature at which the policy
    was not trained."""
    before = of_context(400)
    after = of_context(400)
    rng = random.Random(16)
    settings = []
    asked = []
    texts = []

    def generate(policy, ids, max_new_tokens, end_token, temperature, seed, **_):
        settings.append((policy, temperature, seed))
        asked[:] = [tokenizer.decode(row[1:-1]) for row in ids]
        texts.append([stories.story(rng, request).text for request in asked])
        return rollout_of([(*row, True) for row in zip(asked, texts[-1])], tokenizer)

    monkeypatch.setattr(sft, "generate", generate)
    config = reward_model.Config(seed=5, max_new_tokens=96)
    sft.show_before_and_after(None, before, after, tokenizer, config, temperature=0.7)
    assert settings == [(before, 1.0, 5), (after, 0.7, 5)] and len(set(asked)) == 33
    x, y = [torch.tensor(list(map(annotator.gold_reward, asked, told))) for told in texts]
    error = (y - x).std() / math.sqrt(33)
    head, prompt, *shown = capsys.readouterr().out.splitlines()
    assert head.endswith(f": gold {x.mean():.2f} → {y.mean():.2f} (± {error:.2f})")
    which = asked.index(prompt.removeprefix("prompt   "))
    assert (y - x)[which] == (y - x).median()
    assert [line.split("] ")[1] for line in shown] == [told[which] for told in texts]


PAIRS = [{"prompt": f"Color {i}?", "chosen": f"Red {i % 5}.", "rejected": f"Mud {i % 7}."}
         for i in range(60)]


def load(path, stage="reward_model"):
    model, _, _ = gpt.load_checkpoint(path, stage, "cpu", model_class=RewardModel)
    return model


def train(folder, *flags):
    """Run the script; the model that it leaves."""
    common = "--size cpu --batch 8 --warmup 1 --lr 0.01".split()
    reward_model.main([*common, "--out", str(folder), *flags])
    return load(folder / "cpu/reward_model/checkpoint.pt")


def test_training_on_your_own_pairs(out, tmp_path, capsys):
    """Rewards that are shifted the wrong way, rescaled, or saved before the shift; a trunk that
    isn't the SFT model's; a pair that was dropped here and comes back in DPO."""
    rows = list(PAIRS)
    for row in PAIRS:
        rows.append({**row, "chosen": "Red " * 100})
        rows.append({**row, "chosen": row["rejected"]})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    model = train(out, "--data", str(tmp_path / "pairs.jsonl"), "--epochs", "3")
    sft_model, tokenizer, _ = gpt.load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")

    # 1. It learnt what was preferred, and stayed near the SFT model, from which it started.
    pairs, _, _ = encode_pairs(PAIRS, tokenizer, 128)
    margin = reward_model.held_out_margins(model, pairs)
    assert share_right(margin) > 0.95 and margin.mean() > 1
    change = model.trunk.wte.weight - sft_model.wte.weight
    assert change.abs().mean() < 0.5 * sft_model.wte.weight.abs().mean()

    # 2. The mean over fresh samples of the SFT model is 0; the spread is that before the shift.
    prompts = [tokenizer.prompt(row["prompt"]) for row in PAIRS * 10]
    rollout = gpt.generate(sft_model, prompts, 20, tokenizer.end_token, seed=99)
    scores = model.score(rollout.tokens, rollout.lengths).detach()
    assert scores.mean().abs() < 4 * scores.std() * (1 / 512 + 1 / 600) ** 0.5
    printed = capsys.readouterr().out
    deviation = float(printed.split("standard deviation ")[1].split()[0])
    assert scores.std().item() == pytest.approx(deviation, rel=0.2) and deviation > 0.5

    # 3. The files beside the checkpoint are the pairs it was made of, for a dpo.py without --data.
    found = [read_pairs(out / f"cpu/reward_model/{x}.jsonl") for x in ("pairs", "held_out")]
    assert found == list(hold_out(PAIRS))   # the same prompts, so the same ones held out
    assert " 57 pairs, dropped 57 longer than the context, 57 equal texts\n" in printed


def test_both_models_on_the_world(out, monkeypatch, capsys):
    """Held-out pairs that are trained on; figures of other pairs or steps; noise in the learning
    curve; that, or a process model, saved over the reward model; --pairs ignored."""
    rng = random.Random(9)

    def respond(model, tokenizer, prompts, max_new_tokens, seed):
        texts = [stories.story(rng, tokenizer.decode(ids[1:-1])).text for ids in prompts]
        return texts, [True] * len(texts)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "respond", respond)
        model = train(out, *"--pairs 48 --held_out 40 --sample_batch 32".split())
    stage = out / "cpu/reward_model"
    pairs = metrics(stage / "pairs.jsonl")
    held_out = metrics(stage / "held_out.jsonl")
    assert (len(pairs), len(held_out)) == (48, 40)
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    _, tokenizer, _ = gpt.load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    encoded, _, _ = encode_pairs(held_out, tokenizer, 128)
    margin = reward_model.held_out_margins(model, encoded)
    *_, figures = metrics(stage / "metrics.jsonl")
    expected, _ = reward_model_figures(margin, annotator.gold_margins(held_out))
    assert expected == pytest.approx({name: figures[name] for name in expected}, rel=1e-3, abs=1e-5)

    # The learning curve's last point has all pairs.
    before = snapshot(out)
    train(out, "--learning_curve")
    for job, flag in (("--learning_curve", "--pairs 8"), ("--process", "--max_new_tokens 8"),
                      ("--process --resume", "--pairs 8")):
        with pytest.raises(InputError, match=f"{flag}: .*reward_model has its comparisons already"):
            train(out, *job.split(), *flag.split())
    with pytest.raises(InputError, match="--resume True: cannot be used with --learning_curve"):
        train(out, "--learning_curve", "--resume")
    assert snapshot(out) == before
    line = capsys.readouterr().out.splitlines()[-1].replace("%", "")
    count, accuracy, _, _, share, *_ = line.split()
    bayes = expected["bayes_accuracy"]
    assert count == "48" and 0.6 < bayes < 0.95
    assert float(share) / 100 == pytest.approx(float(accuracy) / bayes, abs=2e-3)

    # The process model learns from marks of the same responses.
    train(out, "--process", "--batch", "4")
    assert {path: x for path, x in snapshot(out).items() if path in before} == before
    rng = random.Random("marks 1")
    responses = annotator.mark(pairs, tokenizer, rng)
    marked = annotator.mark(held_out, tokenizer, rng)
    folder = out / "cpu/process_model"
    *_, learnt, figures = metrics(folder / "metrics.jsonl")
    assert learnt["step"] == len(responses) / 8 == 12   # as many in a step as a reward model sees
    margin = reward_model.step_margins(load(folder / "checkpoint.pt", "process_model"), marked)
    assert figures["accuracy"] == pytest.approx(share_right(margin), abs=1e-3)
    assert figures["loss"] == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-3)


JUDGE = """import json, os, sys
most = 99 if os.path.exists({asked!r}) else 20
rows = [json.loads(line) for line in sys.stdin]
open({asked!r}, "a").writelines(json.dumps(row) + "\\n" for row in rows)
for row in rows[:most]:
    print(json.dumps(dict(choice=len(row["first"]) % 2, why="parity")))
"""


def test_a_program_labels_every_pair_once(out, tmp_path):
    """A label paid for twice, or for another pair, where the program died and the run goes on."""
    asked = tmp_path / "asked.jsonl"
    program = tmp_path / "judge.py"
    flags = "--size cpu --pairs 64 --held_out 16 --batch 8 --max_new_tokens 16 --sample_batch 32"
    argv = ["--out", str(out), "--judge", f"{sys.executable} {program}", *flags.split()]
    program.write_text(JUDGE.format(asked=str(asked)))
    with pytest.raises(InputError, match="gave 20 of .* answers"):
        reward_model.main(argv)
    first = len(metrics(asked))
    reward_model.main([*argv, "--resume"])
    labelled = []
    for row in metrics(asked)[:20] + metrics(asked)[first:]:
        texts = [row["first"], row["second"]]
        choice = len(texts[0]) % 2
        labelled.append(dict(prompt=row["prompt"], chosen=texts[choice], rejected=texts[1 - choice],
                             why="parity"))
    assert metrics(out / "cpu/reward_model/pairs.jsonl") == labelled and len(labelled) == 64


def test_the_loss_of_marks_is_a_binary_loss_per_step(monkeypatch):
    """A mean over each response's steps first, in which a sentence of a long story counts less; a
    mark read at another step; the padding's reward."""
    rng = random.Random(20)
    responses = []
    for ids in random_rows(20, 9, 60):
        ends = sorted(rng.sample(range(len(ids)), rng.randint(1, min(6, len(ids)))))
        marks = [rng.random() < 0.6 for _ in ends]
        responses.append(annotator.Marked(ids, ends, [0.0] * len(ends), marks))

    twin = tiny_model(20)
    rewards = [twin(torch.tensor([response.ids]))[0, response.ends] for response in responses]
    rewards = torch.cat(rewards)
    good = torch.tensor(sum((response.marks for response in responses), []))
    margin = torch.where(good, rewards, -rewards).detach()  # positive where the mark is guessed
    loss = F.binary_cross_entropy_with_logits(rewards, good.double())
    check_step(reward_model.fit_process, twin, responses, 2, loss, margin, monkeypatch)
    found = reward_model.step_margins(twin, responses, 4)
    torch.testing.assert_close(found, margin, check_dtype=False)


def test_a_reward_of_rollouts(tokenizer):
    """Rows that were sorted by length and never put back; a step's reward one action too early or
    too late, at <|end|>, or of the prompt's sentences; an answer judged by another's prompt."""
    model = tiny_reward_model(2, vocab=tokenizer.n_vocab, block_size=128)
    rollout = rollout_of([("", "Hi there. You!", True), ("Why? ", "One", True),
                          ("Why? " * 2, "A. B. C.", False), ("Why? " * 3, "", True)], tokenizer)
    told = [["Hi there.", "Hi there. You!"], ["One"], ["A.", "A. B.", "A. B. C."], []]
    scores, token_rewards = reward_model.make_reward("reward_model", model, tokenizer, 3)(rollout)
    assert not token_rewards.any()
    _, rewards = reward_model.make_reward("process", model, tokenizer, 3)(rollout)
    _, steps = reward_model.step_rewards(model, rollout, tokenizer)
    assert not rewards[~steps].any()
    for row, ids in enumerate(rollout.tokens.tolist()):
        whole = reward_of(model, ids[:rollout.lengths[row]]).item()
        assert scores[row].item() == pytest.approx(whole, abs=1e-5)
        columns = steps[row].nonzero().flatten().tolist()
        start = rollout.prompt_lengths[row]
        assert [tokenizer.decode(ids[start:column + 2]) for column in columns] == told[row]
        for column in columns:
            alone = reward_of(model, ids[:column + 2]).item()
            assert rewards[row, column].item() == pytest.approx(alone, abs=1e-5)

    rollout = rollout_of([(ASKED, story_of(HAPPY), True), (ASKED, story_of(SAD), False)], tokenizer)
    scores, _ = reward_model.make_reward("verifier", None, tokenizer, 3)(rollout)
    assert scores.tolist() == [1, 0]
    assert annotator.gold_rewards(rollout, tokenizer).tolist() == [1.75 + 1.5, 1.75]
