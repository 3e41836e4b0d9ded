"""Comparisons rather than scores (notes on CS 224R, Lecture 9, 4.3.3), and how clear they were
(four steps, as in Touvron et al. 2023, Llama 2; the form in ECE 7115, "RLHF Dataset", has two):
reward models trained on comparisons, on ratings and on marks.

    python -m assets.claims.marks --out OUT [--seed S] [--limit N]      after reward_model.py

The annotator is the same and so is its noise, a Gumbel(0, 1) on gold for every look at a response.
A comparison cancels what annotators differ in; a mark does not:

    mark     1 to 7: 4 + 0.75 (gold + noise - 2.5) + the annotator's own bias, rounded and clipped;
             sixteen annotators, their biases normal, standard deviation 1 mark
    rating   by how much the better response won, noise included: > 2 much better, > 1 better,
             > 0.3 slightly better, else negligibly; in the Bradley-Terry loss P(y_w ≻ y_l) is then
             0.95, 0.8, 0.65 or 0.5, and σ(win) is nearest to that one
"""

import random

import torch
import torch.nn.functional as F

import reward_model
from data.annotator import gold_margins, gold_reward, gumbel
from data.answer_key import cell, reward_model_figures
from data.files import InputError, read_comparisons, run_script, write_jsonl
from data.run import Parser, SilentRun, refuse_stale, stage_folder
from data.stories import parse_request
from data.table import Column, print_columns
from data.tokenizer import encode_comparisons
from gpt import (batches_by_length, get_device, learning_rate, load_checkpoint, make_optimizer,
                 optimizer_step, pad)
from sft import refuse_own_text

ANNOTATORS = 16
BIAS = 1.0      # standard deviation of the annotators' biases, marks


def noisy_gold(prompt, response, rng):
    """What the annotator sees in a response at one look: gold and a Gumbel noise, as choose has."""
    return gold_reward(prompt, response) + gumbel(rng)


def mark(seen, bias):
    """The mark, 1 to 7, of a noisy_gold by an annotator with this bias in marks."""
    return min(7, max(1, round(4 + 0.75 * (seen - 2.5) + bias)))


def rating(row, rng):
    """P(y_w ≻ y_l) as the four steps have it, of a comparison whose winner is known: noise as
    choose has it, given that it made "chosen" win."""
    margin = gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])
    win = 0.0
    while win <= 0:
        win = margin + gumbel(rng) - gumbel(rng)
    for least, probability in ((2.0, 0.95), (1.0, 0.8), (0.3, 0.65)):
        if win > least:
            return probability
    return 0.5


def fit_ratings(model, pairs, probabilities, config, rng):
    """Bradley-Terry with soft labels, in place: reward_model.fit where every probability is 1."""
    optimizer = make_optimizer(model, config.weight_decay)
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    batches = batches_by_length(lengths, config.batch, rng, config.epochs)
    p = torch.tensor(probabilities, device=model.head.weight.device)
    for step, batch in enumerate(batches):
        sequences = [pairs[i].chosen for i in batch] + [pairs[i].rejected for i in batch]
        chosen, rejected = model.score(*pad(sequences, p.device)).chunk(2)
        F.binary_cross_entropy_with_logits(chosen - rejected, p[batch]).backward()
        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        optimizer_step(optimizer, model, lr)


def fit_marks(model, responses, marks, batch, config, rng):
    """Regression on the marks of responses (lists of ids), `batch` in a step, in place: the squared
    error of r_φ, where the marks have mean 0 and standard deviation 1."""
    optimizer = make_optimizer(model, config.weight_decay)
    batches = batches_by_length([len(ids) for ids in responses], batch, rng, config.epochs)
    y = torch.tensor(marks, dtype=torch.float, device=model.head.weight.device)
    y = (y - y.mean()) / y.std()
    for step, chosen in enumerate(batches):
        r = model.score(*pad([responses[i] for i in chosen], y.device))
        F.mse_loss(r, y[chosen]).backward()
        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        optimizer_step(optimizer, model, lr)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1, help="fixes noise, biases and the order")
    parser.add_argument("--limit", type=int, default=0, help="the first so many pairs; 0: all")
    arguments = parser.parse_args(argv)
    config = reward_model.Config(**(reward_model.GPU if arguments.size == "gpu" else {}))
    config.out = arguments.out
    config.size = arguments.size
    folder = stage_folder(config, "reward_model")
    if not (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder}: no comparisons; python reward_model.py collects them")
    refuse_stale(folder)
    path = stage_folder(config, "sft") / "checkpoint.pt"
    policy, tokenizer, checkpoint = load_checkpoint(path, "sft", config.size, get_device())
    refuse_own_text(path, checkpoint)
    data = encode_comparisons(read_comparisons(folder), folder / "pairs.jsonl", tokenizer,
                              policy.config.block_size)
    if arguments.limit and arguments.limit < 16:
        raise InputError(f"--limit {arguments.limit}: must be at least 16 pairs, or 0 for all")
    if not all(parse_request(row["prompt"]) for row in data.rows):
        raise InputError(f"{folder / 'pairs.jsonl'}: is not of the little world, whose annotator "
                         "would mark the answers")
    count = min(arguments.limit, len(data.pairs)) or len(data.pairs)
    pairs = data.pairs[:count]
    rows = data.rows[:count]

    rng = random.Random(f"marks {arguments.seed}")
    ratings = [rating(row, rng) for row in rows]
    biases = [rng.gauss(0.0, BIAS) for _ in range(ANNOTATORS)]
    responses = []
    marks = []
    fair_marks = []     # of the same looks, by annotators without a bias
    for pair, row in zip(pairs, rows):
        answers = [(pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])]
        rng.shuffle(answers)
        for ids, text in answers:
            seen = noisy_gold(row["prompt"], text, rng)
            responses.append(ids)
            marks.append(mark(seen, rng.choice(biases)))
            fair_marks.append(mark(seen, 0.0))

    found = []
    for what, labels in (("comparisons", count), ("four-step ratings", count), ("marks", count),
                         ("marks, both of a pair", 2 * count),
                         ("the same without biases", 2 * count)):
        model = reward_model.start_from(policy)
        order = random.Random(f"pairs' order {arguments.seed}")
        if what == "comparisons":
            reward_model.fit(model, pairs, data.held_out, config, order, SilentRun())
        elif what == "four-step ratings":
            fit_ratings(model, pairs, ratings, config, order)
        elif what == "marks":       # of one response of every pair, drawn above
            fit_marks(model, responses[::2], marks[::2], config.batch, config, order)
        elif what == "marks, both of a pair":
            fit_marks(model, responses, marks, 2 * config.batch, config, order)
        else:
            fit_marks(model, responses, fair_marks, 2 * config.batch, config, order)
        margin = reward_model.held_out_margins(model, data.held_out)
        figures, _ = reward_model_figures(margin, gold_margins(data.held_out_rows))
        found.append({"what": what, "labels": labels, **figures})

    print_columns(
        [Column("trained on", [row["what"] for row in found]),
         Column("labels", [row["labels"] for row in found], "d"),
         Column("accuracy", [cell(row["expected_accuracy"], row["expected_accuracy_error"])
                             for row in found]),
         Column("of Bayes", [cell(row["share_of_bayes"], row["share_of_bayes_error"], ".1%")
                             for row in found]),
         Column("above chance", [cell(row["above_chance"], row["above_chance_error"], ".1%")
                                 for row in found])],
        [f"accuracy: how often the annotator agrees, over its noise, on {len(data.held_out)} "
         "held-out comparisons",
         f"(Bayes {found[0]['bayes_accuracy']:.3f}); above chance: (accuracy - 0.5) / (Bayes - "
         "0.5). ± over comparisons, not over trainings.",
         "all start from SFT; the same steps, epochs and learning rate."])
    folder = stage_folder(config, "claim-marks")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found)


if __name__ == "__main__":
    run_script(main)
