"""Off-distribution pairs (CS 224R, Lecture 9, ch. 9): DPO on comparisons of the policy's own
samples, of another seed's SFT model's, and of the base model's.

    python -m assets.claims.other_pairs --out OUT --other OUT2 [--seed S]

OUT, OUT2: folders of two seeds, each after gpt.py and sft.py. The same number of requests and of
labels by the annotator for each; DPO with the settings of dpo.py.
"""

import random
from copy import deepcopy
from pathlib import Path

import torch

import dpo
import reward_model
from data.annotator import gold_rewards
from data.corpus import draw_requests
from data.files import InputError, run_script, write_jsonl
from data.judges import annotator_judge
from data.run import Parser, SilentRun, positive, stage_folder
from data.table import Column, print_columns
from data.tokenizer import encode_pairs
from gpt import generate, get_device, load_checkpoint, response_logprobs, respond
from sft import refuse_own_text


def base_comparisons(base, tokenizer, prompts, config, seed):
    """Two continuations of each request, a line of plain text, by the base model: what fits."""
    ids = []
    for prompt in prompts:
        ids += [[tokenizer.end_token] + tokenizer.encode(prompt + "\n")] * 2
    texts, _ = respond(base, tokenizer, ids, config.max_new_tokens, seed)

    comparisons = []
    for i, prompt in enumerate(prompts):
        first, second = texts[2 * i:2 * i + 2]
        longest = max(len(tokenizer.response(first)), len(tokenizer.response(second)))
        fits = len(tokenizer.prompt(prompt)) + longest <= base.config.block_size
        if fits and first.strip() and second.strip() and first != second:
            comparisons.append((prompt, first, second))
    return comparisons


def pairs_of(comparisons, tokenizer, rng, block_size):
    """Comparisons labelled by the annotator, as Pairs of ids."""
    rows = []
    labels = annotator_judge(comparisons, rng)
    for (prompt, first, second), (choice, _) in zip(comparisons, labels):
        chosen, rejected = (first, second) if choice == 0 else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    pairs, _, _ = encode_pairs(rows, tokenizer, block_size)
    return pairs


@torch.no_grad()
def log_probability(model, pairs):
    """The mean log π(y|x) a token of both responses, in nats."""
    total = 0.0
    tokens = 0
    for start in range(0, len(pairs), 64):
        part = pairs[start:start + 64]
        chosen, rejected = dpo.pair_logprobs(model, part)
        total += (chosen + rejected).sum().item()
        tokens += sum(len(pair.chosen) + len(pair.rejected) - 2 * pair.prompt_length
                      for pair in part)
    return total / tokens


def gradient_of_one_step(policy, reference, pairs, config):
    """The norm of the mean gradient of 256 pairs at the start, where σ(-z) = 1/2 for every pair."""
    policy = deepcopy(policy)
    for start in range(0, 256, 32):
        part = pairs[start:start + 32]
        with torch.no_grad():
            ref_chosen, ref_rejected = dpo.pair_logprobs(reference, part)
        chosen, rejected = dpo.pair_logprobs(policy, part)
        loss = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        (loss / 8).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()


@torch.no_grad()
def how_wrong(policy, reference, pairs, beta):
    """The mean of σ(-z), the weight of a pair in DPO's gradient."""
    weights = []
    for start in range(0, len(pairs), 64):
        part = pairs[start:start + 64]
        ref_chosen, ref_rejected = dpo.pair_logprobs(reference, part)
        chosen, rejected = dpo.pair_logprobs(policy, part)
        z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        weights.append(torch.sigmoid(-z))
    return torch.cat(weights).mean().item()


@torch.no_grad()
def sampled_figures(policy, reference, tokenizer, prompts, config):
    """(gold, KL(π || π_ref)), means over one answer to each prompt."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    rollout = generate(policy, ids, config.max_new_tokens, tokenizer.end_token, seed=config.seed)
    logprobs = response_logprobs(policy, *rollout)
    ref_logprobs = response_logprobs(reference, *rollout)
    gold = gold_rewards(rollout, tokenizer)
    return gold.mean().item(), (logprobs - ref_logprobs).mean().item()


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--other", required=True, help="the folder of another seed")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=positive, default=2560)
    parser.add_argument("--questions", type=positive, default=256, help="held-out requests")
    arguments = parser.parse_args(argv)
    if arguments.pairs < 512:
        raise InputError(f"--pairs {arguments.pairs}: must be at least 512")
    sizes = dpo.GPU if arguments.size == "gpu" else {}
    config = dpo.Config(out=arguments.out, size=arguments.size, seed=arguments.seed,
                        **sizes)

    device = get_device()
    path = stage_folder(config, "sft") / "checkpoint.pt"
    reference, tokenizer, checkpoint = load_checkpoint(path, "sft", config.size, device)
    refuse_own_text(path, checkpoint)
    path = Path(arguments.other) / config.size / "sft/checkpoint.pt"
    other, other_tokenizer, _ = load_checkpoint(path, "sft", config.size, device)
    path = stage_folder(config, checkpoint.get("base", "gpt")) / "checkpoint.pt"
    base, _, _ = load_checkpoint(path, "gpt", config.size, device)
    models = {"its own": (reference, tokenizer),
              "another seed's SFT": (other, other_tokenizer),
              "the base model's": (base, tokenizer)}
    held_out = draw_requests(arguments.questions, random.Random("other pairs"), held_out=True)

    found = []
    for name, (model, its_tokenizer) in models.items():
        rng = random.Random(f"other pairs {config.seed} {name}")
        comparisons = []
        sampled = 0
        while len(comparisons) < arguments.pairs:
            prompts = draw_requests(512, rng)
            seed = rng.getrandbits(48)
            if name == "the base model's":
                comparisons += base_comparisons(model, tokenizer, prompts, config, seed)
            else:
                drawn, _ = reward_model.sample_comparisons(
                    model, its_tokenizer, prompts, config.max_new_tokens, seed)
                comparisons += drawn
                sampled += len(prompts)
                if sampled > 10 * arguments.pairs:
                    raise InputError(f"{name}: of {sampled:,} pairs of its samples "
                                     f"{len(comparisons):,} can be compared; train it longer")
        comparisons = comparisons[:arguments.pairs]
        pairs = pairs_of(comparisons, tokenizer, rng, reference.config.block_size)

        policy = deepcopy(reference)
        row = {"what": name, "pairs": len(pairs),
               "logprob": log_probability(reference, pairs),
               "gradient": gradient_of_one_step(policy, reference, pairs, config)}
        dpo.dpo(policy, reference, pairs, [], config, rng, SilentRun())
        row["weight"] = how_wrong(policy, reference, pairs, config.beta)
        gold, kl = sampled_figures(policy, reference, tokenizer, held_out, config)
        row["gold"] = gold
        row["kl"] = kl
        found.append(row)
    sft_gold, _ = sampled_figures(reference, reference, tokenizer, held_out, config)

    print_columns(
        [Column("pairs of samples", [row["what"] for row in found]),
         Column("log π_ref", [row["logprob"] for row in found], ".2f"),
         Column("gradient", [row["gradient"] for row in found], ".2f"),
         Column("σ(-z) after", [row["weight"] for row in found], ".3f"),
         Column("gold after", [row["gold"] for row in found], ".2f"),
         Column("KL after", [row["kl"] for row in found], ".2f")],
        ["log π_ref: nats a token under the SFT model. gradient: norm of DPO's first gradient, of "
         "256 pairs.",
         "σ(-z) after: mean weight of these pairs in the gradient after one pass; 0.5 at first.",
         f"gold of the SFT model on the same {arguments.questions} held-out requests: "
         f"{sft_gold:.2f}."])
    found.append({"what": "SFT", "gold": sft_gold})
    folder = stage_folder(config, "claim-other_pairs")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found)


if __name__ == "__main__":
    run_script(main)
