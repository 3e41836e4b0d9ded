"""Unseen phrasings (CS 224R, Lecture 9, ch. 4: instruction tuning generalizes). Two of the twelve
ways to ask are left out of the demonstrations: does SFT answer them?

    python -m assets.claims.phrasings --out OUT [--seed S]      after gpt.py and sft.py

The base model has read all twelve on the pages of its pretraining text, never in the chat format.
"""

import random

import sft
from data.annotator import answers, rubric
from data.corpus import draw_demonstrations, draw_requests
from data.files import InputError, run_script, write_jsonl
from data.run import Parser, SilentRun, positive, stage_folder
from data.stories import WORLD, parse_request
from data.table import Column, print_columns
from data.tokenizer import encode_demonstrations
from gpt import get_device, load_checkpoint

# "What happened when a shy fox found a kite?", "Do you know a story about a kite and a shy fox?":
# no other way to ask begins with their first word.
UNSEEN = (5, 10)


def is_unseen(prompt):
    """Whether a request is asked in one of the two ways."""
    return parse_request(prompt).ask in UNSEEN


def demonstrations_without(count, seed):
    """Demonstrations of the ten other ways to ask, as many as the stage has."""
    rng = random.Random(f"phrasings {seed}")
    rows = []
    while len(rows) < count:
        drawn, _ = draw_demonstrations(rng, 1)
        if not is_unseen(drawn[0]["prompt"]):
            rows += drawn
    return rows


def questions(unseen, count):
    """Held-out requests asked in the two ways, or in the ten others."""
    rng = random.Random("phrasings, questions")
    found = []
    while len(found) < count:
        prompts = draw_requests(1, rng, held_out=True)
        if is_unseen(prompts[0]) == unseen:
            found += prompts
    return found


def figures(model, tokenizer, prompts, config):
    """The shares of a model's answers that are a story, a flawless one, and on request."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    texts, ended = sft.ask(model, tokenizer, ids, config)
    told, flawless = answers(texts, ended)
    on_request = 0
    for prompt, text in zip(prompts, texts):
        on_request += rubric(prompt, text)["on request"] == 1.75  # hero and thing
    return {"answers": told, "flawless": flawless, "on_request": on_request / len(prompts)}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--demonstrations", type=positive, default=sft.Config.demonstrations)
    parser.add_argument("--questions", type=positive, default=400, help="of each kind")
    arguments = parser.parse_args(argv)
    sizes = sft.GPU if arguments.size == "gpu" else {}
    config = sft.Config(out=arguments.out, size=arguments.size, seed=arguments.seed,
                        **sizes)

    device = get_device()
    path = stage_folder(config, "sft") / "checkpoint.pt"
    stage, _, checkpoint = load_checkpoint(path, "sft", config.size, device)
    sft.refuse_own_text(path, checkpoint)
    had = checkpoint.get("demonstrations", arguments.demonstrations)
    if had != arguments.demonstrations:
        raise InputError(f"--demonstrations {arguments.demonstrations}: {path} was trained on "
                         f"{had}; give that number, to compare like with like")
    path = stage_folder(config, checkpoint.get("base", "gpt")) / "checkpoint.pt"
    without, tokenizer, _ = load_checkpoint(path, "gpt", config.size, device)

    rows = demonstrations_without(arguments.demonstrations, config.seed)
    demonstrations, dropped = encode_demonstrations(rows, tokenizer, without.config.block_size)
    if dropped:
        raise InputError(f"{path}: its context is too short for {dropped} demonstrations")
    rng = random.Random(f"demonstrations' order {config.seed}")
    sft.fine_tune(without, demonstrations, [], None, config, rng, SilentRun())

    found = []
    for model, of in ((stage, "all twelve ways"), (without, "ten of them")):
        for unseen in (False, True):
            asked = "the two ways" if unseen else "the ten ways"
            prompts = questions(unseen, arguments.questions)
            found.append({"what": f"{of}, {asked}", "of": of, "asked": asked,
                          **figures(model, tokenizer, prompts, config)})

    print_columns(
        [Column("demonstrations of", [row["of"] for row in found]),
         Column("asked in", [row["asked"] for row in found]),
         Column("a story", [row["answers"] for row in found], ".1%"),
         Column("flawless", [row["flawless"] for row in found], ".1%"),
         Column("on request", [row["on_request"] for row in found], ".1%")],
        [f"of {arguments.questions} held-out requests each, one answer at temperature 1; on "
         "request: names the hero and the thing.",
         "the two ways: " + " ".join(WORLD.patterns["ask"][ask] for ask in UNSEEN)])
    folder = stage_folder(config, "claim-phrasings")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found)


if __name__ == "__main__":
    run_script(main)
