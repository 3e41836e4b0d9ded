"""assets/claims: the scripts behind rows of the claims table, on small stages and by hand."""

import math
import random
import re
from copy import deepcopy
from unittest import mock

import pytest
import torch

import dpo
import ppo
import reward_model
from assets.claims import (cost, four_steps, marks, other_pairs, phrasings, where_nats,
                           where_trained, writers)
from data import stories
from data.annotator import choose, gold_reward, rubric
from data.files import InputError, read_pairs
from data.run import SilentRun
from data.tokenizer import Pair, encode_pairs
from gpt import generate, load_checkpoint, response_logprobs, save_checkpoint
from helpers import ASKED, HAPPY, KIND, SAD, metrics, noise, story_of, tiny_reward_model


def copy_sft(out):
    """The SFT model once more, as PPO's policy."""
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    (out / "cpu/ppo").mkdir()
    save_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu", model, tokenizer)


def test_writers(out):
    """Gold of other stories than the writers' own; policies that answer other requests; a page of
    requests counted as an answer; a missing policy that is no line but a traceback."""
    flags = ["--out", str(out), "--questions", "20", "--policies", "ppo"]
    with pytest.raises(InputError, match="python ppo.py makes one"):
        writers.main(flags)
    copy_sft(out)
    writers.main(flags)
    written, sft, ppo, _, *base = metrics(out / "cpu/claim-writers/metrics.jsonl")
    rng = random.Random("writers")
    gold = 0.0
    for _ in range(20):
        request = stories.request(rng, held_out=True).text
        gold += gold_reward(request, stories.story(rng, request).text) / 20
    assert written["gold"] == pytest.approx(gold)
    assert written["flawless"] == 1 and ppo["flawless"] == sft["flawless"]
    assert ppo["gain"] == sft["gain"] == pytest.approx(sft["gold"] - gold, abs=1e-5)

    assert sum(row["share"] for row in base) == pytest.approx(1)
    assert writers.what_follows(stories.page(rng).text, True) == "requests"
    assert writers.what_follows(stories.story(rng, ASKED).text, True) == "a story"
    assert writers.what_follows("The the the.", True) == "neither"


def test_where_trained(out):
    """Pairs with themselves or of equal texts; prices that see the prompts' offsets, which are
    free; gains whose parts do not add up to gold's."""
    gold = 2 * noise(0, 6, 8)
    other = noise(1, 6, 8)
    r = 0.5 * gold + 10 * noise(2, 6, 1)
    figures = {"reward": r, "gold": gold, "ended": torch.ones(6, 8),
               "text": torch.arange(8).repeat(6, 1)}
    means = where_trained.pair_figures(figures)
    torch.testing.assert_close(means["accuracy"], means["bayes"])
    torch.testing.assert_close(means["product"], 2 * means["square"])
    figures["text"] = torch.zeros(6, 8)
    assert not where_trained.pair_figures(figures)["bayes"].any()

    inside = [where_trained.within(x, figures["ended"])
              for x in (r - 3 * other, torch.stack([gold, other], dim=2))]
    price, error = where_trained.prices(*inside)
    torch.testing.assert_close(price, torch.tensor([0.5, -3.0]))
    assert error.max() < 1e-4

    copy_sft(out)
    where_trained.main(["--out", str(out), "--prompts", "3", "--samples", "2"])
    rows = {row["what"]: row for row in metrics(out / "cpu/claim-where_trained/metrics.jsonl")}
    for name in ("best of 16", "ppo"):
        gains = [rows[part][name] for part in rubric(ASKED, "")]
        assert sum(gains) == pytest.approx(rows[name]["gold"] - rows["sft"]["gold"], abs=1e-5)


def test_where_nats(out):
    """A sentence's first token counted to the one before; a second ending that is no longer after
    the first; nats that do not add up to log π(y|x)/π_ref(y|x)."""
    found = where_nats.places(re.findall(r" ?\w+|\W", story_of(KIND[0], HAPPY, KIND[1], HAPPY)))
    assert list(dict.fromkeys(found)) == list(where_nats.PLACES[:5])
    assert found.count("after an ending") == len(re.findall(r"\w+|\.", KIND[1] + HAPPY))

    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    base, _, _ = load_checkpoint(out / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    rollouts = generate(model, [tokenizer.prompt(ASKED)] * 5, 12, tokenizer.end_token, seed=1)
    spent = where_nats.nats(model, 0.7, base, tokenizer, rollouts, 2)
    expected = [response_logprobs(m, *rollouts, temperature)
                for m, temperature in ((model, 0.7), (base, 1.0))]
    torch.testing.assert_close(sum(spent.values()), (expected[0] - expected[1]).detach())

    where_nats.main(["--out", str(out), "--policies", "gpt", "--questions", "3"])
    row, = metrics(out / "cpu/claim-where_nats/metrics.jsonl")
    assert row["in all"] == pytest.approx(sum(row[place] for place in where_nats.PLACES))


def test_four_steps(out):
    """One step a batch after all, so that what is compared is equal."""
    with mock.patch("ppo.optimizer_step", wraps=ppo.optimizer_step) as steps:
        four_steps.main(["--out", str(out), "--iterations", "1"])
    assert steps.call_count == 8    # the policy's and the value model's


def test_marks(out):
    """Marks or ratings with another noise than the comparisons have: the larger noisy_gold is
    choose's winner, and a rating has the odds of logistic noise, given who won. Soft labels turned
    around: certain ones are comparisons."""
    texts = [story_of(KIND[0], SAD), story_of(HAPPY)]
    for seed in range(50):
        rng = random.Random(seed)
        first, second = [marks.noisy_gold(ASKED, text, rng) for text in texts]
        assert choose(ASKED, *texts, random.Random(seed)) == (second > first)
    assert [marks.mark(x, 1.0) for x in (-9.0, 2.5, 2.5 + 4 / 3, 9.0)] == [1, 5, 6, 7]

    row = {"prompt": ASKED, "chosen": texts[0], "rejected": texts[1]}   # the worse one won
    margin = gold_reward(ASKED, texts[0]) - gold_reward(ASKED, texts[1])
    rng = random.Random(0)
    drawn = [marks.rating(row, rng) for _ in range(1000)]
    for least, probability in ((2.0, 0.95), (1.0, 0.8), (0.3, 0.65)):
        p = (1 + math.exp(-margin)) / (1 + math.exp(least - margin))     # P(win > least | win > 0)
        share = sum(x >= probability for x in drawn) / 1000
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 1000)

    pairs = [Pair([1, 2, i % 4, 4], [1, 2, 0, i % 3, 4], 2) for i in range(24)]
    config = reward_model.Config(batch=8)
    soft = tiny_reward_model(0)
    hard = deepcopy(soft)
    marks.fit_ratings(soft, pairs, [1.0] * 24, config, random.Random(0))
    reward_model.fit(hard, pairs, pairs, config, random.Random(0), SilentRun())
    margins = [reward_model.held_out_margins(model, pairs) for model in (soft, hard)]
    torch.testing.assert_close(*margins, atol=1e-3, rtol=1e-3)

    marks.main(["--out", str(out), "--limit", "32"])
    rows = metrics(out / "cpu/claim-marks/metrics.jsonl")
    assert [row["labels"] for row in rows] == [32, 32, 32, 64, 64]


def test_the_unseen_phrasings_are_in_no_demonstration():
    """A way to ask that is also among the demonstrations would be answered from memory; so would a
    request that is not held out."""
    rows = phrasings.demonstrations_without(200, 1)
    unseen = phrasings.questions(True, 20)
    assert len({stories.parse_request(row["prompt"]).ask for row in rows}) == 10
    assert not any(phrasings.is_unseen(row["prompt"]) for row in rows)
    assert all(phrasings.is_unseen(prompt) and stories.is_held_out(prompt) for prompt in unseen)
    assert not any(phrasings.is_unseen(prompt) for prompt in phrasings.questions(False, 20))


def test_the_weight_of_a_pair_is_one_half_at_first(stages):
    """σ(z) for σ(-z), or the reference in the policy's place: a pair that DPO has learnt would
    seem to weigh more."""
    model, tokenizer, _ = load_checkpoint(stages / "cpu/sft/checkpoint.pt", "sft", "cpu")
    rows = read_pairs(stages / "cpu/reward_model/pairs.jsonl")[:16]
    pairs, _, _ = encode_pairs(rows, tokenizer, model.config.block_size)
    assert other_pairs.how_wrong(model, model, pairs, 0.2) == pytest.approx(0.5)

    policy = deepcopy(model)
    config = dpo.Config(lr=1e-2, epochs=3, batch=8)
    dpo.dpo(policy, model, pairs, [], config, random.Random(0), SilentRun())
    assert other_pairs.how_wrong(policy, model, pairs, 0.2) < 0.4


def test_code_is_counted_without_its_prose():
    """Docstrings and comments were counted as code, and the better explained loop seemed the longer
    one."""
    assert cost.code_lines([dpo.dpo_loss]) == 4
    assert cost.settings_of([dpo.dpo]) == ["beta", "lr", "warmup"]
