"""The reward model is right only where it was trained (notes on CS 224R, Lecture 9, 4.3.4): on the
samples of SFT, of best-of-16 and of policies trained against it, beside the annotator's truth.

    python -m assets.claims.where_trained --out OUT [--seed S]      after ppo.py
"""

import random

import torch

import best_of_n
from assets.claims.writers import load_policy
from data.annotator import rubric
from data.answer_key import cell, mean_and_error, share_and_error
from data.corpus import draw_requests
from data.files import run_script, write_jsonl
from data.run import Parser, complete, positive, refuse_stale, stage_folder
from data.table import Column, print_columns
from gpt import get_device, load_checkpoint
from reward_model import RewardModel

N = 16      # of best-of-N


def sample_figures(prompts, samples):
    """What is known of the K answers to each of M prompts (best_of_n.Samples), (M, K) each: reward,
    gold, ended, "text", a number that equal answers to a prompt share, and every part of the
    annotator's rubric."""
    M, K = samples.figures["reward"].shape
    found = dict(samples.figures)
    found["text"] = torch.tensor([hash(text) for text in samples.texts]).view(M, K)
    rubrics = [rubric(prompts[i // K], text) for i, text in enumerate(samples.texts)]
    for part in rubrics[0]:
        found[part] = torch.tensor([parts[part] for parts in rubrics]).view(M, K)
    return found


def best_of(figures, n):
    """sample_figures of the best of n by reward: (M, K) -> (M, K/n) each."""
    M, K = figures["reward"].shape
    winners = figures["reward"].view(M, K // n, n).argmax(dim=2, keepdim=True)
    return {name: x.view(M, K // n, n).gather(2, winners).squeeze(2) for name, x in figures.items()}


def pair_figures(figures):
    """The reward model on all pairs of different, finished answers to one prompt: {name: (M,)},
    each prompt's mean over its pairs; a pair counts in both orders."""
    def differences(x):
        """Of every answer and every other one to its prompt: (M, K) -> (M, K, K)."""
        return x[:, :, None] - x[:, None, :]

    r = differences(figures["reward"])
    gold = differences(figures["gold"])
    ended = figures["ended"] > 0
    asked = ended[:, :, None] & ended[:, None, :] & (differences(figures["text"]) != 0)
    p = gold.sigmoid()
    agreed = torch.where(r > 0, p, 1 - p)
    agreed[r == 0] = 0.5
    means = {}
    for name, x in (("accuracy", agreed), ("bayes", torch.maximum(p, 1 - p)),
                    ("product", r * gold), ("square", r * r)):
        means[name] = (x * asked).sum(dim=(1, 2)) / asked.sum(dim=(1, 2)).clamp(min=1)
    return means


def within(x, ended):
    """x (M, K, ...) less its mean over the finished answers to each prompt; 0 where unfinished."""
    w = ended.view(*ended.shape, *[1] * (x.dim() - 2))
    return w * (x - (w * x).sum(dim=1, keepdim=True) / w.sum(dim=1, keepdim=True).clamp(min=1))


def prices(r, parts):
    """Least squares of r (M, K) on the parts of the rubric (M, K, P), both from within: (the price
    of each part, its standard error by leaving out one prompt after the other), both (P,)."""
    squares = torch.einsum("mkp,mkq->mpq", parts, parts)
    products = torch.einsum("mkp,mk->mp", parts, r)
    price = torch.linalg.pinv(squares.sum(0)) @ products.sum(0)
    without = torch.linalg.pinv(squares.sum(0) - squares)       # (M, P, P)
    left_out = torch.einsum("mpq,mq->mp", without, products.sum(0) - products)
    M = len(r)
    error = ((M - 1) / M * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    return price, error


def compare(under):
    """Rows and columns of the first table: the reward model beside gold, {name: sample_figures}."""
    found = []
    for name, figures in under.items():
        row = {"what": name, "ended": figures["ended"].mean().item()}
        for figure in ("reward", "gold"):
            row[figure], row[f"{figure}_error"] = mean_and_error(figures[figure].mean(dim=1))
        means = pair_figures(figures)
        for figure in ("accuracy", "bayes"):
            row[figure], row[f"{figure}_error"] = mean_and_error(means[figure])
        row["share"], row["share_error"] = share_and_error(means["accuracy"] - 0.5,
                                                           means["bayes"] - 0.5)
        row["slope"], row["slope_error"] = share_and_error(means["product"], means["square"])
        found.append(row)

    columns = [Column("answers of", [row["what"] for row in found])]
    for title, figure, form in (("r_φ", "reward", ".2f"), ("gold", "gold", ".2f"),
                                ("accuracy", "accuracy", ".3f"), ("above chance", "share", ".1%"),
                                ("Δgold per Δr", "slope", ".2f")):
        cells = [cell(row[figure], row[f"{figure}_error"], form) for row in found]
        columns.append(Column(title, cells))
    columns.insert(4, Column("Bayes", [row["bayes"] for row in found], ".3f"))
    return found, columns


def part_by_part(under, parts):
    """Rows and columns of the second table: the price of every part of the rubric in r_φ on SFT's
    samples, what each policy gains of it in truth, and what that is worth at this price."""
    sft = under["sft"]
    r = within(sft["reward"], sft["ended"])
    x = within(torch.stack([sft[part] for part in parts], dim=2), sft["ended"])
    price, error = prices(r, x)
    found = []
    for i, name in enumerate([*parts, "gold"]):
        row = {"what": name}
        ours = within(sft[name], sft["ended"])
        row["correlation"] = ((r * ours).sum() / (r.norm() * ours.norm()).clamp(min=1e-9)).item()
        if name != "gold":
            row["price"] = price[i].item()
            row["price_error"] = error[i].item()
        for policy in list(under)[1:]:
            gain = under[policy][name].mean(dim=1) - sft[name].mean(dim=1)
            row[policy], row[f"{policy}_error"] = mean_and_error(gain)
            seen = under[policy]["reward"].mean(dim=1) - sft["reward"].mean(dim=1)
            if name != "gold":
                seen = gain * price[i]
            row[f"{policy}_seen"], row[f"{policy}_seen_error"] = mean_and_error(seen)
        found.append(row)

    columns = [Column("part of gold", [row["what"] for row in found]),
               Column("corr.", [row["correlation"] for row in found], ".2f"),
               Column("price", [cell(row.get("price"), row.get("price_error"), ".2f")
                                for row in found])]
    for policy in list(under)[2:]:      # best-of-N's are in the file
        for title, figure in ((f"{policy}: truth", policy), ("r_φ", f"{policy}_seen")):
            cells = [cell(row[figure], row[f"{figure}_error"], ".2f") for row in found]
            columns.append(Column(title, cells))
    return found, columns


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1, help="fixes the samples")
    parser.add_argument("--prompts", type=positive, default=64, help="held-out requests")
    parser.add_argument("--samples", type=positive, default=8,
                        help="answers to each; SFT: 16 times")
    arguments = parser.parse_args(argv)
    config = best_of_n.Config(**(best_of_n.GPU if arguments.size == "gpu" else {}))
    config.out = arguments.out
    config.size = arguments.size
    names = ["sft", "ppo"]
    if (stage_folder(config, "ppo-beta0") / "checkpoint.pt").exists():
        names.append("ppo-beta0")
    folder = stage_folder(config, "reward_model")
    complete(folder)
    refuse_stale(folder)
    reward_model, tokenizer, _ = load_checkpoint(folder / "checkpoint.pt", "reward_model",
                                                 config.size, get_device(), RewardModel)

    prompts = draw_requests(arguments.prompts, random.Random("where trained"), held_out=True)
    rng = random.Random(f"where trained {arguments.seed}")
    under = {}
    for name in names:
        model, _, checkpoint = load_policy(config, name)
        policy = best_of_n.Policy(model, checkpoint.get("temperature", 1.0))
        count = arguments.samples * (N if name == "sft" else 1)
        samples = best_of_n.draw(name, policy, reward_model, tokenizer, prompts, count, config,
                                 True, rng)
        under[name] = sample_figures(prompts, samples)
        if name == "sft":
            under[f"best of {N}"] = best_of(under["sft"], N)

    found, columns = compare(under)
    print_columns(columns, [
        f"to {len(prompts)} held-out requests, {arguments.samples} each (SFT {N} times as many); ± "
        "standard error over requests;",
        "accuracy: how often the annotator agrees, over its noise, on pairs of answers to one "
        "request;",
        "Bayes: the true reward's own; above chance: (accuracy - 0.5) / (Bayes - 0.5);",
        "Δgold per Δr: least squares over these pairs, 1 is calibrated, less is overconfident.",
        f"r_φ of an answer without an end is {config.missing_end_score}, and no pair has one; "
        f"SFT: {1 - found[0]['ended']:.1%}, {names[-1]}: {1 - found[-1]['ended']:.1%}."])
    rows, columns = part_by_part(under, list(rubric(prompts[0], "")))
    print()
    print_columns(columns, [
        "corr.: of r_φ with the part, among SFT's answers to one request; price: of the part in "
        "r_φ there,",
        "least squares on all five; in gold each is 1. truth: what the policy gains over SFT; r_φ: "
        "at this price.",
        "gold: the sum in truth, and what the policy really gains in r_φ."])
    folder = stage_folder(config, "claim-where_trained")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found + rows)


if __name__ == "__main__":
    run_script(main)
