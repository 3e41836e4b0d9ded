"""The human ceiling (notes on CS 224R, Lecture 9, 4.2.1): SFT can't beat those who wrote its
demonstrations, preference tuning can. Does it hold where SFT is sampled nearly greedily? And what a
base model does with a request (CS 224R, ch. 3).

    python -m assets.claims.writers --out OUT [--seed S]    after ppo.py and dpo.py
"""

import random

import torch

import sft
from data.annotator import answers, gold_reward
from data.answer_key import cell, mean_and_error
from data.corpus import draw_demonstrations
from data.files import InputError, run_script, write_jsonl
from data.run import (Parser, complete, kind_of_policy, positive, refuse_stale, stage_folder,
                      with_error)
from data.stories import parse_request, split_sentences
from data.table import Column, print_columns
from gpt import get_device, load_checkpoint, respond


def load_policy(config, name):
    """(the policy of the folder OUT/SIZE/NAME, its tokenizer, its checkpoint)."""
    stage = kind_of_policy(name) or name[:3]  # gpt or sft
    if stage not in ("gpt", "sft", "ppo", "dpo", "rsft"):
        raise InputError(f"--policies {name}: must be the --name of a run of ppo, dpo or RSFT")
    folder = stage_folder(config, name)
    complete(folder)
    refuse_stale(folder)
    found = load_checkpoint(folder / "checkpoint.pt", stage, config.size, get_device())
    sft.refuse_own_text(folder, found[2])
    return found


def what_follows(text, ended):
    """What a continuation of a request is: "a story" (annotator.answers), "requests", if more than
    half of its sentences are some, or "neither"."""
    told, _ = answers([text], [ended])
    sentences = split_sentences(text)
    requests = sum(parse_request(sentence) is not None for sentence in sentences)
    if told:
        return "a story"
    if 2 * requests > len(sentences):
        return "requests"
    return "neither"


def read_arguments(description, questions, argv):
    """(arguments, config) of a script that asks policies questions: the command line, and the
    settings of sft.py at that size. questions: how many of them, where none are given."""
    parser = Parser(description=description.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1, help="fixes the samples")
    parser.add_argument("--policies", default="ppo,dpo", help="folders, with commas between")
    parser.add_argument("--questions", type=positive, default=questions, help="held-out requests")
    arguments = parser.parse_args(argv)
    config = sft.Config(**(sft.GPU if arguments.size == "gpu" else {}))
    config.out = arguments.out
    config.size = arguments.size
    config.seed = arguments.seed
    return arguments, config


def main(argv=None):
    arguments, config = read_arguments(__doc__, 1000, argv)
    policies = {}
    for name in ["sft", *arguments.policies.split(",")]:
        policies[name] = load_policy(config, name)
    model, its_tokenizer, sft_checkpoint = policies["sft"]
    base, tokenizer, checkpoint = load_policy(config, sft_checkpoint.get("base", "gpt"))
    policies["SFT at temperature 0.1"] = (model, its_tokenizer, {"temperature": 0.1})

    # Gold of the writers' own answers, and of every policy's to the same requests.
    rows, _ = draw_demonstrations(random.Random("writers"), arguments.questions, held_out=True)
    prompts = [row["prompt"] for row in rows]
    texts = {"the writers": [row["completion"] for row in rows]}
    ended = {"the writers": [True] * len(rows)}
    for name, (policy, its_tokenizer, its_checkpoint) in policies.items():
        ids = [its_tokenizer.prompt(prompt) for prompt in prompts]
        texts[name], ended[name] = respond(
            policy, its_tokenizer, ids, config.max_new_tokens, config.seed,
            its_checkpoint.get("temperature", 1.0), at_once=config.sample_batch)
    golds = {}
    for name, answered in texts.items():
        gold = [gold_reward(prompt, text) for prompt, text in zip(prompts, answered)]
        golds[name] = torch.tensor(gold)

    found = []
    for name, gold in golds.items():
        row = {"what": name}
        row["gold"], row["gold_error"] = mean_and_error(gold)
        gain = gold - golds["the writers"]
        row["gain"], row["gain_error"] = mean_and_error(gain)
        _, row["flawless"] = answers(texts[name], ended[name])
        found.append(row)
    gains = [cell(row["gain"], row["gain_error"], ".2f") for row in found[1:]]
    print_columns(
        [Column("whose answers", [row["what"] for row in found]),
         Column("gold", [cell(row["gold"], row["gold_error"], ".2f") for row in found]),
         Column("above the writers", [None, *gains]),
         Column("flawless", [with_error(row["flawless"], len(prompts)) for row in found])],
        [f"gold: mean over {len(prompts)} held-out requests ± standard error, one answer to each;",
         "above the writers: of the differences between the answers to one request;",
         "flawless: every sentence is one of the world, the first an opening."])

    # The base model is asked as sft.py asks it: a line on a page.
    start = [] if checkpoint["text"] else [tokenizer.end_token]
    ids = [start + tokenizer.encode(prompt + "\n") for prompt in prompts]
    continued = [what_follows(*pair) for pair in zip(*sft.ask(base, tokenizer, ids, config))]
    kinds = ("a story", "requests", "neither")
    shares = [continued.count(kind) / len(prompts) for kind in kinds]
    print()
    print_columns(
        [Column("the base model goes on with", list(kinds)),
         Column("share", [with_error(share, len(prompts)) for share in shares])],
        ["of the same requests; requests: more than half of its sentences are."])
    found += [{"what": f"base, {kind}", "share": share} for kind, share in zip(kinds, shares)]
    folder = stage_folder(config, "claim-writers")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found)


if __name__ == "__main__":
    run_script(main)
