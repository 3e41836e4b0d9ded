"""
figures.py: the pictures and the tables of the READMEs, from what the scripts have written.

    sh assets/experiments.sh               makes the data (hours): out/seed1, out/seed2, out/seed3
    python assets/figures.py out/seed?     reads it into figures.json, then does what follows
    python assets/figures.py               draws the pictures of figures.json, writes its tables
                                           into the READMEs, below their marks <!-- table: NAME -->
    python assets/figures.py --run out/cpu/ppo     draws one run's metrics.jsonl, beside it

The pictures need matplotlib, which no other file does.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
READMES = [HERE.parent / name for name in
           ("README.md", "assets/README.md", "tests/README.md", "data/README.md")]

# Each maps the folder of a run (its --name in experiments.sh) to its name in tables and pictures.
METHODS = {
    "ppo": "PPO",
    "ppo-ppo_penalty": "PPO, KL penalty",
    "ppo-a2c": "A2C",
    "ppo-a2c-four_steps": "A2C, four steps a batch",
    "ppo-reinforce": "REINFORCE",
    "ppo-reinforce_baseline": "REINFORCE, batch mean",
    "ppo-rloo": "REINFORCE, leave-one-out",
    "ppo-grpo": "GRPO as published",
    "ppo-grpo_no_division": "GRPO, no division",
    "ppo-grpo_kl_in_rewards": "GRPO, also KL in the rewards",
    "ppo-grpo_token_mean": "GRPO, also a mean over tokens",
    "ppo-ptx": "PPO-ptx",
}
DIRECT = {
    "dpo": "DPO",
    "dpo-ipo": "IPO",
    "dpo-kto": "KTO",
    "dpo-simpo": "SimPO",
    "dpo-orpo": "ORPO",
    "dpo-online": "online DPO",
    "dpo-online-annotator": "online DPO, annotator's labels",
    "rsft-per_prompt": "RSFT, best per prompt",
    "rsft-overall": "RSFT, best overall",
}
ORDERS = {"ppo": "PPO", "dpo": "DPO", "dpo-1.25e-4": "DPO, lr 1.25e-4",
          "dpo-2e-4": "DPO, lr 2e-4"}
BEST = ("best of 4", "best of 16", "best of 64")
VERIFIED = {
    "sft": "SFT",
    "ppo-verifier": "PPO",
    "ppo-verifier-grpo": "GRPO",
    "ppo-verifier-beta0": "PPO, β = 0",
    "ppo-verifier-grpo-beta0": "GRPO, β = 0",
}
PEERS = {
    "dpo-2e-4": "DPO, ours",
    "dpo-trl": "DPO, TRL 1.16",
    "ppo": "PPO, ours",
    "ppo-trl": "PPO, TRL 1.12",
    "ppo-grpo": "GRPO as published, ours",
    "ppo-trl-grpo-group": "GRPO as published, TRL 1.16",
    "ppo-grpo_no_division": "GRPO, no division, ours",
    "ppo-trl-grpo-none": "GRPO, no division, TRL 1.16",
}

STAGES = ("gpt", "sft", "reward_model", "reward_model-constitution", "reward_model-both",
          "process_model", "gpt-curated", "sft-curated")
JUDGES = {"": "the annotator", "-constitution": "the constitution", "-both": "both in turn"}
RULES = {"": "the outcome model", ", sum": "the steps' sum", ", smallest": "the smallest step",
         ", product": "the product of P(good)"}
GRID = {"DPO": ("dpo", ("5e-5", "2e-4", "8e-4", "3.2e-3")),
        "PPO": ("ppo", ("7.5e-5", "3e-4", "1.2e-3", "4.8e-3"))}
BETAS = ("0.05", "0.2", "0.8")
ALONE = {"dpo": "dpo-2e-4", "ppo": "ppo"}   # the runs with β = 0.2 and the second learning rate
# PPO with K passes over each batch of 64: OUT/cpu/ppo-passes-K-RESPONSES, and its learning rate
PASSES = {"1": ("K = 1", "3e-4"), "2": ("K = 2", "2e-4"), "4": ("K = 4", "1e-4"),
          "8": ("K = 8", "1e-4"), "8-no_clip": ("K = 8, no clip", "1e-4")}
RESPONSES = ("1280", "2560", "6400")
CLIPS = {"0.05": "0.05", "0.1": "0.1", "0.2": "0.2", "0.5": "0.5", "1e9": "none"}
# PPO and DPO with other β: OUT/cpu/KIND-beta-β; with 0.2 they are the pipeline's
TRIED = ("0.02", "0.05", "0.1", "0.2", "0.4", "0.8")
# Groups of policies that are also kept by themselves, from one set of chains
GROUPS = {"best_of_n-1-pipeline": "pipeline", "best_of_n-2-methods": "methods",
          "best_of_n-4-direct": "direct", "best_of_n-5-online": "direct",
          "best_of_n-8-turns": "turns", "best_of_n-8-betas": "betas"}
FULL = "12288"  # demonstrations of the default SFT
LAWS = {"": "10,240 comparisons, 4 layers", "4096": "4,096 comparisons",  # of the reward models in
        "1024": "1,024 comparisons", "256": "256 comparisons",            # OUT/laws/NAME
        "2-layers": "2 layers", "1-layer": "1 layer"}


def read_rows(path):
    """The rows of a metrics.jsonl; none if the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(rows, key):
    """A figure in the last row that has it, or None."""
    for row in reversed(rows):
        if key in row:
            return row[key]
    return None


def text_of(path):
    """What a script printed; "" if the file does not exist."""
    return path.read_text() if path.exists() else ""


def undisturbed(rows):
    """The seconds of a run as if nothing else had used the machine: the first row's seconds (RSFT
    samples before it), and for each other row the mean of the quickest ones (one in ten)."""
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    if not seconds:
        return None
    steps = sorted(after - before for before, after in zip(seconds, seconds[1:]))
    if not steps:
        return seconds[0]
    quickest = statistics.mean(steps[:max(1, len(steps) // 10)])
    return seconds[0] + len(steps) * quickest


# --------------------------------------------------------------------------------------------------
# From the output folders to figures.json


def put(figures, key, seed, x):
    """figures[key][seed] = x, rounded; nothing where x was not measured (None)."""
    if x is not None:
        figures.setdefault(key, {})[str(seed)] = float(f"{x:.5g}")


def collect(folders):
    """All that is drawn and printed, from one output folder a seed:
    {name: {figure: {seed: number}}}, and the curves."""
    data = {"seeds": len(folders), "stages": {}, "policies": {}, "frontier": {}, "runs": {},
            "curves": {}, "laws": {}, "variance": [], "peers": {}, "claims": {}, "orders": {},
            "few": {}, "pipeline": {}, "methods": {}, "direct": {}, "turns": {}, "betas": {},
            "epochs": {}}
    for seed, folder in enumerate(folders, start=1):
        folder = Path(folder)
        cpu = folder / "cpu"
        collect_stages(data, seed, cpu)
        collect_yardstick(data, seed, cpu)
        collect_peers(data, seed, cpu)
        collect_training(data, seed, cpu)
        collect_epochs(data, seed, folder)
        collect_curves(data, seed, cpu)
        collect_laws(data, folder)
        collect_claims(data, seed, cpu)
        collect_orders(data, seed, cpu)
        collect_orders(data, 4, folder / "chain4/cpu")
        collect_few(data, seed, folder)
    return data


def collect_stages(data, seed, cpu):
    """The last figures of the stages before a policy is trained, and how often a judge agrees."""
    for stage in STAGES:
        rows = read_rows(cpu / stage / "metrics.jsonl")
        for key in ("held_out", "old_held_out", "entropy", "excess", "base_answers", "answers",
                    "flawless", "expected_accuracy", "bayes_accuracy", "share_of_bayes",
                    "above_chance", "annotator_loss"):
            put(data["stages"], f"{stage} {key}", seed, last(rows, key))

    before_mid_training = read_rows(cpu / "gpt-curated/metrics.jsonl")[:1]
    for key in ("held_out", "old_held_out", "excess"):
        put(data["stages"], f"before {key}", seed, last(before_mid_training, key))

    for suffix in JUDGES:
        printed = text_of(cpu / f"reward_model{suffix}.txt")
        agreed = re.search(r"agrees with ([\d.]+)%", printed)
        if agreed:
            share = float(agreed[1]) / 100
            put(data["stages"], f"reward_model{suffix} agreement", seed, share)


def collect_yardstick(data, seed, cpu):
    """Every row of best_of_n.py's metrics. Several groups of policies were compared, each beside
    SFT, best-of-N and the frontier: these are taken from the first group."""
    seen = set()
    for path in sorted(cpu.glob("best_of_n-*/metrics.jsonl")):
        rows = read_rows(path)
        for row in rows:
            if path.parent.name in GROUPS:
                collect_row(data[GROUPS[path.parent.name]], {}, seed, row)
            if row["policy"] not in seen or row.get("under") == "verifier":
                collect_row(data["policies"], data["frontier"], seed, row)
        seen.update(row["policy"] for row in rows)


def collect_row(policies, frontier, seed, row):
    """One row of best_of_n.py's metrics."""
    under = row.get("under")
    name = row["policy"]

    if name == "frontier" or under == "best of N":
        point = f"{under} {row['beta']:.3f}" if name == "frontier" else name
        figures = frontier.setdefault(point, {})
        for key in ("kl", "reward", "gold", "effective_samples"):
            put(figures, key, seed, row.get(key))
        return

    figures = policies.setdefault(name, {})
    if under in ("reward model", "gold"):
        kind = under.split()[0]
        put(figures, f"share_{kind}", seed, row["share"])
        put(figures, f"own_J_star_{kind}", seed, row.get("own_J_star"))
        if name == "sft":  # its row also describes the optimum
            optimum = policies.setdefault(f"optimum under {under}", {})
            for key in ("J_star", "J_star_kl", "left_by_policy"):
                put(optimum, key, seed, row[key])
    elif under == "verifier":
        for key in ("verified", "pass_16", "J", "J_star", "share"):
            put(figures, f"verifier_{key}", seed, row.get(key))
    elif under == "pretraining":
        put(figures, "pretraining", seed, row["loss"])
    elif under is None:
        for key in ("reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"):
            put(figures, key, seed, row[key])


def collect_peers(data, seed, cpu):
    """Ours beside other trainers: measured for one seed, so the errors are over prompts."""
    for path in sorted(cpu.glob("best_of_n-*peers*/metrics.jsonl")):
        for row in read_rows(path):
            under = (row.get("under") or "policy").split()[0]
            if row["policy"] not in PEERS or under not in ("policy", "gold", "reward"):
                continue
            figures = data["peers"].setdefault(row["policy"], {})
            for key in ("share", "share_error", "kl"):
                if key in row:
                    figures[f"{key}_{under}"] = float(f"{row[key]:.5g}")

    if seed > 1:
        return
    for name, figures in data["peers"].items():
        ours = last(read_rows(cpu / name / "metrics.jsonl"), "seconds")
        if ours:
            figures["seconds"] = ours
            continue
        printed = text_of(cpu / f"{name}.txt")
        seconds = [float(x) for x in re.findall(r"'train_runtime': '?([\d.]+)", printed)]
        if not seconds:  # TRL's PPO prints no runtime: its progress bar
            bars = re.findall(r"100/100 \[(\d+):(\d+)", printed)
            seconds = [60.0 * int(minutes) + int(rest) for minutes, rest in bars]
        figures["seconds"] = seconds[-1]


def collect_training(data, seed, cpu):
    """What the runs themselves say: seconds, memory, entropy; and every batch of two PPO runs."""
    several = [path.name for path in sorted(cpu.glob("ppo-passes-*")) if path.is_dir()]
    clipped = [f"ppo-clip-{clip}" for clip in CLIPS]
    for name in [*METHODS, *DIRECT, *several, *clipped]:
        group = "direct" if name in DIRECT else "policies"
        figures = data[group].setdefault(name, {})
        rows = read_rows(cpu / name / "metrics.jsonl")
        for key in ("held_out_accuracy", "chosen_log_ratio", "rejected_log_ratio"):
            put(figures, key, seed, last(rows, key))
        put(figures, "seconds", seed, undisturbed(rows))
        for key in ("prompts", "prompts_reward", "all_reward"):  # RSFT's selection
            put(figures, f"kept_{key}", seed, last(rows, key))
        if rows and "entropy" in rows[-1]:
            put(figures, "entropy", seed, statistics.mean(row["entropy"] for row in rows[-10:]))
        fractions = [row["clip_fraction"] for row in rows if "clip_fraction" in row]
        if fractions:
            put(figures, "clip_fraction", seed, statistics.mean(fractions))

        printed = text_of(cpu / f"{name}.txt")
        models = re.search(r"models in memory: (\d) .*, (\d+) MB", printed)
        if models:
            put(figures, "models", seed, int(models[1]))
            put(figures, "memory_mb", seed, int(models[2]))

    for name in ("ppo", "ppo-beta0"):
        rows = read_rows(cpu / name / "metrics.jsonl")
        if rows:
            run = data["runs"].setdefault(name, {}).setdefault(str(seed), {})
            for key in ("reward", "gold", "kl", "entropy", "clip_fraction", "value_explained",
                        "length"):
                run[key] = [float(f"{row[key]:.4g}") for row in rows]


def collect_epochs(data, seed, folder):
    """The reward model after one epoch and after two, from OUT/epochs2."""
    for count, out in (("1", folder), ("2", folder / "epochs2")):
        figures = data["epochs"].setdefault(count, {})
        rows = read_rows(out / "cpu/reward_model/metrics.jsonl")
        trained = [row["loss"] for row in rows if "held_out_loss" in row]
        if trained:
            put(figures, "training_loss", seed, trained[-1])
        for key in ("held_out_loss", "share_of_bayes"):
            put(figures, key, seed, last(rows, key))


def collect_curves(data, seed, cpu):
    """The learning curves as they were printed. A row: number of examples, then the figures, most
    of them with an error."""
    columns = {"sft": ("held_out", "excess", "answers", "flawless"),
               "reward_model": ("accuracy", "share_of_bayes", "above_chance")}
    for stage, keys in columns.items():
        printed = text_of(cpu / f"{stage}_curve.txt")
        for count, row in re.findall(r"^ *([\d,]+)  (.*)$", printed, re.MULTILINE):
            numbers = re.sub(r" ± [\d.]+", "", row).replace("%", "").split()
            figures = data["curves"].setdefault(stage, {}).setdefault(count, {})
            for key, number in zip(keys, numbers):
                in_percent = key not in ("held_out", "accuracy")
                put(figures, key, seed, float(number) / (100 if in_percent else 1))


def collect_laws(data, folder):
    """(KL, gold) of best-of-N and of PPO without a penalty for each reward model; the variances."""
    for path in sorted((folder / "laws").glob("*")):
        yardstick = read_rows(path / "cpu/best_of_n/metrics.jsonl")
        ladder = [row for row in yardstick if row.get("under") == "best of N"]
        run = read_rows(path / "cpu/ppo-beta0/metrics.jsonl")
        data["laws"][path.name] = {"best": pairs_of(ladder), "run": pairs_of(run)}

    printed = text_of(folder / "variance.txt")
    for what, variance, bias in re.findall(
            r"^(\S.*?) {2,}([\d.]+) +([\d.]+)%", printed, re.MULTILINE):
        data["variance"].append([what, float(variance), float(bias) / 100])


def collect_claims(data, seed, cpu):
    """What the scripts in assets/claims/ measured: {"writers SFT gold": {seed: number}}."""
    for path in sorted(cpu.glob("claim-*/metrics.jsonl")):
        claim = path.parent.name.removeprefix("claim-")
        for row in read_rows(path):
            for key, x in row.items():
                if isinstance(x, (int, float)):
                    put(data["claims"], f"{claim} {row['what']} {key}", seed, x)


def collect_orders(data, chain, cpu):
    """PPO and DPO, each on the same data in two orders: {policy: {"share_gold": {chain: x}}}."""
    for row in read_rows(cpu / "best_of_n-orders/metrics.jsonl"):
        if row["policy"].removesuffix("-order2") not in ORDERS:
            continue
        figures = data["orders"].setdefault(row["policy"], {})
        if row.get("under") in ("reward model", "gold"):
            put(figures, f"share_{row['under'].split()[0]}", chain, row["share"])
        elif row.get("under") is None:
            put(figures, "kl", chain, row["kl"])


def collect_few(data, seed, folder):
    """What follows from SFT on few demonstrations: {how many: {"ppo gold": {seed: x}}}."""
    places = {path.name: path / "cpu" for path in (folder / "few").glob("*")}
    places[FULL] = folder / "cpu"
    for count, cpu in places.items():
        figures = data["few"].setdefault(count, {})
        for row in read_rows(cpu / "claim-writers/metrics.jsonl"):
            for key in ("gold", "flawless"):
                put(figures, f"{row['what']} {key}", seed, row.get(key))
        for path in cpu.glob("best_of_n-*pipeline/metrics.jsonl"):
            for row in read_rows(path):
                if row.get("under") == "gold" and "J" in row:
                    put(figures, f"{row['policy']} J", seed, row["J"])
                    put(figures, "J_star", seed, row["J_star"])


def pairs_of(rows):
    """[KL, gold] of every row."""
    return [[float(f"{row['kl']:.4g}"), float(f"{row['gold']:.4g}")] for row in rows]


# --------------------------------------------------------------------------------------------------
# Tables


def values(data, name, key):
    """The seeds' figures of a policy; [] if it was not measured."""
    return list(data["policies"].get(name, {}).get(key, {}).values())


def stage_values(data, key):
    """The seeds' figures of a stage; [] if it was not measured."""
    return list(data["stages"].get(key, {}).values())


def spread(xs, form):
    """Mean ± standard deviation of the seeds: "91.6 ± 2.5 %". One seed, or equal ones: the number
    alone. None: "-". A form that ends with % prints per cent."""
    if not xs:
        return "-"
    unit = ""
    if form.endswith("%"):
        xs = [100 * x for x in xs]
        form = form[:-1] + "f"
        unit = " %"
    text = f"{statistics.mean(xs):{form}}"
    error = statistics.stdev(xs) if len(xs) > 1 else 0
    if error:
        text += f" ± {error:{form}}"
    return text + unit


def table(head, rows):
    """A table in Markdown, of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_rows(data, names, columns):
    """A row for each policy that was measured. columns: (figure, format). Of the seconds only the
    least disturbed seed's."""
    rows = []
    for name, label in names.items():
        if not values(data, name, "share_gold"):
            continue
        row = [label]
        for key, form in columns:
            xs = values(data, name, key)
            if key == "seconds" and xs:
                xs = [min(xs)]
            row.append(spread(xs, form))
        rows.append(row)
    return rows


SHARES = [("share_reward", ".1%"), ("share_gold", ".1%"), ("kl", ".2f")]


def tables(data):
    """{name: table in Markdown}: those of the READMEs, which hold them word for word."""
    return {
        "stages": stages(data),
        "policies": policies(data),
        "methods": methods(data),
        "passes": passes(data),
        "clips": clips(data),
        "betas": betas(data),
        "orders": orders(data),
        "few": few(data),
        "direct": direct(data),
        "turns": turns(data),
        "judges": judges(data),
        "steps": steps(data),
        "right": right(data),
        "better": better(data),
        "curves": curves(data),
        "grid": grid(data),
        "peers": peers(data),
        "claims": claims(data),
        "trained": trained(data),
        "parts": parts(data),
        "labels": labels(data),
        "asked": asked(data),
        "others": others(data),
        "answer": answer(data),
        "loops": loops(data),
        "laws": laws(data),
        "equal_kl": equal_kl(data),
    }


def stages(data):
    """How close the stages before the policies are to the best possible."""
    def ratio(a, b):
        return [x / y for x, y in zip(stage_values(data, a), stage_values(data, b))]

    def of(key, form):
        return spread(stage_values(data, key), form)

    return table(["", "measured", "best possible", "share of the best"], [
        ["pretraining, held-out nats a token",
         of("gpt held_out", ".3f"),
         of("gpt entropy", ".3f") + " (the entropy)",
         spread(ratio("gpt entropy", "gpt held_out"), ".1%")],
        ["SFT, held-out nats a response token",
         of("sft held_out", ".3f"),
         of("sft entropy", ".3f") + " (the entropy)",
         spread(ratio("sft entropy", "sft held_out"), ".1%")],
        ["reward model, accuracy without the labels' noise",
         of("reward_model expected_accuracy", ".3f"),
         of("reward_model bayes_accuracy", ".3f") + " (Bayes)",
         of("reward_model share_of_bayes", ".1%") + "; above chance "
         + of("reward_model above_chance", ".1%")]])


def policies(data):
    """The main table: best-of-N, PPO, DPO and the exact optima."""
    data = {"policies": data["pipeline"]}

    def optimum(under, key, form):
        return spread(values(data, f"optimum under {under}", key), form)

    names = {name: name for name in BEST}
    names["ppo"] = "PPO"
    names["dpo"] = "DPO"
    rows = policy_rows(data, names, SHARES + [("win_rate", ".1%"), ("distinct_2", ".2f")])
    rows.append(["the reward model's exact optimum", "100 %",
                 optimum("gold", "left_by_policy", ".1%"),
                 optimum("reward model", "J_star_kl", ".2f"), "", ""])
    rows.append(["gold's exact optimum, J\\*", "", "100 %",
                 optimum("gold", "J_star_kl", ".2f"), "", ""])
    head = ["", "J's share, reward model", "J's share, gold", "KL, nats", "wins against SFT",
            "distinct-2"]
    return table(head, rows)


def methods(data):
    """Every method of ppo.py. PPO's shares are those of as many samples as the others'."""
    beside = {**data["policies"]["ppo"], **data["methods"]["ppo"]}
    data = {**data, "policies": {**data["policies"], "ppo": beside}}
    columns = SHARES + [("entropy", ".2f"), ("distinct_2", ".2f"), ("seconds", ".0f"),
                        ("models", ".0f"), ("memory_mb", ".0f")]
    rows = []
    for name, label in METHODS.items():
        for row in policy_rows(data, {name: label}, columns):
            threshold = 0.8 * min(values({"policies": data["pipeline"]}, "sft", "distinct_2"))
            collapsed = min(values(data, name, "distinct_2")) < threshold
            rows.append(row + ["yes" if collapsed else "no"])
    head = ["`ppo.py`", "J's share, reward model", "J's share, gold", "KL, nats", "entropy",
            "distinct-2", "seconds", "models", "MB", "collapsed"]
    return table(head, rows)


def passes(data):
    """PPO with K passes over each batch, on few and on many responses."""
    rows = []
    for K, (label, rate) in PASSES.items():
        row = [label, rate]
        for count in RESPONSES:
            name = f"ppo-passes-{K}-{count}"
            shares = [spread(values(data, name, key), ".0%").removesuffix(" %")
                      for key in ("share_reward", "share_gold")]
            row.append(" / ".join(shares))
        name = f"ppo-passes-{K}-2560"
        row.append(spread(values(data, name, "kl"), ".2f"))
        row.append(spread(values(data, name, "clip_fraction"), ".1%"))
        rows.append(row)
    counts = [f"{int(count):,} responses" for count in RESPONSES]
    return table(["passes", "learning rate", *counts, "KL, nats", "clip fraction"], rows)


def clips(data):
    """PPO with 4 passes and several ε, on 2,560 responses."""
    names = {f"ppo-clip-{clip}": label for clip, label in CLIPS.items()}
    rows = policy_rows(data, names, SHARES + [("clip_fraction", ".1%")])
    head = ["ε", "J's share, reward model", "J's share, gold", "KL, nats", "clip fraction"]
    return table(head, rows)


def betas(data):
    """PPO and DPO with several β: gold, the reward model's score, the KL that was spent."""
    data = {"policies": data["betas"]}
    rows = []
    for beta in TRIED:
        row = [beta]
        for kind in ("ppo", "dpo"):
            name = kind if beta == "0.2" else f"{kind}-beta-{beta}"
            for key, form in (("kl", ".1f"), ("gold", ".2f"), ("reward", ".2f")):
                row.append(spread(values(data, name, key), form))
        rows.append(row)
    head = ["β", "PPO: KL, nats", "gold", "score", "DPO: KL, nats", "gold", "score"]
    return table(head, rows)


def orders(data):
    """PPO and DPO on four chains, the data in two orders; DPO with more lr in one."""
    rows = []
    for name, label in ORDERS.items():
        names = [name, f"{name}-order2"]
        both = [data["orders"][one] for one in names if one in data["orders"]]
        row = [label]
        shares = []
        for chain in "1234":
            pair = [figures["share_gold"][chain] for figures in both]
            row.append(" / ".join(f"{100 * share:.0f}" for share in pair) + " %")
            shares += pair
        under_model = [x for figures in both for x in figures["share_reward"].values()]
        kls = [x for figures in both for x in figures["kl"].values()]
        row += [f"{100 * min(shares):.1f} %", spread(shares, ".1%"), spread(under_model, ".1%"),
                spread(kls, ".2f")]
        rows.append(row)
    return table(["", "chain 1", "chain 2", "chain 3", "chain 4", "worst", "J's share, gold",
                  "J's share, reward model", "KL, nats"], rows)


def few(data):
    """What PPO and DPO make of an SFT model that few demonstrations taught."""
    rows = []
    for count, figures in sorted(data["few"].items(), key=lambda item: int(item[0])):
        optimum = spread(list(figures["J_star"].values()), ".2f")
        for name, label in (("sft", "SFT"), ("dpo", "DPO"), ("ppo", "PPO")):
            row = [f"{int(count):,}", optimum] if name == "sft" else ["", ""]
            row.append(label)
            for key, form in (("gold", ".2f"), ("J", ".2f"), ("flawless", ".0%")):
                row.append(spread(list(figures[f"{name} {key}"].values()), form))
            rows.append(row)
    return table(["demonstrations", "J\\* of this reference", "", "gold", "J under gold",
                  "flawless"], rows)


def direct(data):
    """DPO and its relatives, and rejection-sampling fine-tuning."""
    columns = [("share_gold", ".1%"), ("share_reward", ".1%"), ("kl", ".2f"), ("length", ".0f"),
               ("held_out_accuracy", ".1%"), ("distinct_2", ".2f"), ("seconds", ".0f"),
               ("models", ".0f")]
    head = ["", "J's share, gold", "J's share, reward model", "KL, nats", "length",
            "held-out accuracy", "distinct-2", "seconds", "models"]
    return table(head, policy_rows({"policies": data["direct"]}, DIRECT, columns))


def turns(data):
    """Rejection sampling and PPO, each alone and in turn."""
    names = {"rsft-per_prompt": "RSFT", "ppo": "PPO", "ppo-after_rsft": "RSFT, then PPO",
             "rsft-after_ppo": "PPO, then RSFT"}
    columns = SHARES + [("reward", ".2f"), ("gold", ".2f")]
    head = ["", "J's share, reward model", "J's share, gold", "KL, nats", "score", "gold"]
    return table(head, policy_rows({"policies": data["turns"]}, names, columns))


def judges(data):
    """Whose labels the reward model and DPO were trained on."""
    rows = []
    for suffix, label in JUDGES.items():
        agreement = stage_values(data, f"reward_model{suffix} agreement")
        accuracy = stage_values(data, f"reward_model{suffix} share_of_bayes")
        name = f"dpo{suffix or '-2e-4'}"
        share = values(data, name, "share_gold")
        kl = values(data, name, "kl")
        rows.append([label, spread(agreement, ".1%"), spread(accuracy, ".1%"), spread(share, ".1%"),
                     spread(kl, ".2f")])
    head = ["labels by", "the annotator, asked again, agrees",
            "reward model, share of Bayes accuracy", "DPO, J's share, gold", "KL, nats"]
    return table(head, rows)


def steps(data):
    """Best of 16 by the outcome model and by the process model."""
    rows = []
    for rule, label in RULES.items():
        share = values(data, f"best of 16{rule}", "share_gold")
        gold = values(data, f"best of 16{rule}", "gold")
        rows.append([label, spread(share, ".1%"), spread(gold, ".2f")])
    return table(["best of 16 by", "J's share, gold", "gold"], rows)


def right(data):
    """Policies trained on a verifier."""
    columns = [("verifier_verified", ".1%"), ("verifier_pass_16", ".1%"), ("kl", ".2f"),
               ("verifier_J", ".3f"), ("verifier_share", ".1%")]
    rows = []
    for name, label in VERIFIED.items():
        if values(data, name, "verifier_J"):
            figures = [spread(values(data, name, key), form) for key, form in columns]
            rows.append([label] + figures)
    best = spread(values(data, "sft", "verifier_J_star"), ".3f")
    rows.append(["the optimum, J\\*", "", "", "", best, "100 %"])
    head = ["", "right", "right, one of 16", "KL, nats", "J", "share of the way to J\\*"]
    return table(head, rows)


def better(data):
    """Mid-training on better text."""
    def of(key, form):
        return spread(stage_values(data, key), form)

    return table(["", "pretraining", "after mid-training"], [
        ["curated text, nats a token", of("before held_out", ".3f"),
         of("gpt-curated held_out", ".3f")],
        ["curated text, above its entropy", of("before excess", ".1%"),
         of("gpt-curated excess", ".1%")],
        ["the old text, nats a token", of("before old_held_out", ".3f"),
         of("gpt-curated old_held_out", ".3f")],
        ["SFT, above its entropy", of("sft excess", ".1%"), of("sft-curated excess", ".1%")],
        ["SFT, flawless stories of 200", of("sft flawless", ".1%"),
         of("sft-curated flawless", ".1%")]])


def curves(data):
    """SFT and the reward model by the number of examples."""
    def of(stage, count, key):
        figures = data["curves"].get(stage, {}).get(count, {}).get(key, {})
        return spread(list(figures.values()), ".1%")

    counts = set()
    for rows in data["curves"].values():
        counts.update(rows)
    rows = []
    for count in sorted(counts, key=number):
        rows.append([count, of("sft", count, "excess"), of("sft", count, "flawless"),
                     of("reward_model", count, "share_of_bayes")])
    head = ["examples", "SFT, above the entropy", "flawless stories",
            "reward model, share of Bayes accuracy"]
    return table(head, rows)


def number(count):
    """10240 of "10,240"."""
    return int(count.replace(",", ""))


def peers(data):
    """Ours beside other trainers, from the same exported models with the same settings: one seed,
    errors over prompts."""
    def share(figures, under):
        mean = 100 * figures[f"share_{under}"]
        error = 100 * figures[f"share_error_{under}"]
        return f"{mean:.1f} ± {error:.1f} %"

    rows = []
    for name, label in PEERS.items():
        if name in data["peers"]:
            figures = data["peers"][name]
            seconds = figures.get("seconds", math.nan)
            rows.append([label, share(figures, "reward"), share(figures, "gold"),
                         f"{figures['kl_policy']:.2f}", f"{seconds:.0f}"])
    head = ["", "J's share, reward model", "J's share, gold", "KL, nats", "seconds"]
    return table(head, rows)


def grid_shares(data):
    """{"DPO": {β: [J's share under gold, at β = 0.2, for each learning rate]}, "PPO": ...} of one
    seed."""
    shares = {}
    for label, (kind, rates) in GRID.items():
        shares[label] = {}
        for beta in BETAS:
            shares[label][beta] = []
            for rate in rates:
                xs = values(data, f"{kind}-grid-{beta}-{rate}", "share_gold")
                if beta == "0.2" and rate == rates[1]:
                    xs = xs or values(data, ALONE[kind], "share_gold")
                shares[label][beta].append(xs[0] if xs else math.nan)
    return shares


def grid(data):
    """The table of grid_shares."""
    rows = []
    for label, by_beta in grid_shares(data).items():
        for beta, shares in by_beta.items():
            rows.append([f"{label}, β = {beta}"] + [f"{100 * x:.0f} %" for x in shares])
    return table(["learning rate, in units of 2e-4 (DPO) and 3e-4 (PPO)", "¼", "1", "4", "16"],
                 rows)


def grid_summary(data):
    """Best, median and worst share of the grid, for each of its two methods."""
    parts = []
    for label, by_beta in grid_shares(data).items():
        shares = []
        for row in by_beta.values():
            shares += row
        numbers = (max(shares), statistics.median(shares), min(shares))
        parts.append(f"{label} " + ", ".join(f"{100 * x:.0f}" for x in numbers) + " %")
    return "; ".join(parts)


LISTED = "pytest tests/test_enumerable.py -s -k"


def claims(data):
    """The lecture's claims, each with the command whose output shows it, what came out and the
    verdict. Numbers without a figure in figures.json are what the tests print."""
    def stage(key, form):
        return spread(stage_values(data, key), form)

    def of(name, key, form):
        return spread(values(data, name, key), form)

    def of_pipeline(name, key, form):
        """From the chains of the README's first table."""
        return spread(values({"policies": data["pipeline"]}, name, key), form)

    def of_direct(name, key, form):
        """From the chains of DPO's relatives."""
        return spread(values({"policies": data["direct"]}, name, key), form)

    def of_epochs(key, form):
        """The reward model after one epoch and after two."""
        found = [spread(list(data["epochs"][count][key].values()), form) for count in ("1", "2")]
        return " after one, ".join(found) + " after two"

    def in_turn(name):
        """A policy's two shares, from rejection sampling and PPO in turn."""
        shares = [spread(values({"policies": data["turns"]}, name, key), ".0%").removesuffix(" %")
                  for key in ("share_reward", "share_gold")]
        return " / ".join(shares)

    def by_responses(K):
        """The shares with K passes, on few and on many responses."""
        shares = [of(f"ppo-passes-{K}-{count}", "share_reward", ".0%").removesuffix(" %")
                  for count in RESPONSES]
        return " / ".join(shares)

    def of_few(name, count):
        """Gold and flawless stories after SFT on that many demonstrations."""
        figures = data["few"][count]
        found = [spread(list(figures[f"{name} {key}"].values()), form)
                 for key, form in (("gold", ".2f"), ("flawless", ".0%"))]
        return " and ".join(found)

    def mended(count):
        """How many of SFT's stories that are not flawless PPO mends, the least and the most."""
        figures = data["few"][count]
        shares = []
        for seed, before in figures["sft flawless"].items():
            shares.append((figures["ppo flawless"][seed] - before) / (1 - before))
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"

    def of_orders(name, key, form):
        """Over four chains and both orders of the data."""
        xs = []
        for order in ("", "-order2"):
            xs += data["orders"][f"{name}{order}"][key].values()
        return spread(xs, form)

    def of_betas(kind, key, form):
        """With β = 0.2, 0.05 and 0.02."""
        found = []
        for name in (kind, f"{kind}-beta-0.05", f"{kind}-beta-0.02"):
            found.append(spread(values({"policies": data["betas"]}, name, key), form))
        return ", ".join(found)

    def unpenalized(key, iterations):
        """PPO without a penalty, the mean over a slice of its iterations."""
        runs = data["runs"]["ppo-beta0"].values()
        return spread([statistics.mean(run[key][iterations]) for run in runs], ".2f")

    def of_possible(count):
        """The reward model's accuracy above chance, of Bayes', after that many comparisons."""
        figures = data["curves"]["reward_model"][count]["above_chance"]
        return spread(list(figures.values()), ".1%")

    def frontier_kl(beta):
        """The nats of the reward model's optimum at that β."""
        return spread(list(data["frontier"][f"reward model {beta}"]["kl"].values()), ".2f")

    def of_turns(key, form):
        """RSFT on PPO's samples."""
        return spread(values({"policies": data["turns"]}, "rsft-after_ppo", key), form)

    def quickest(loop):
        """The seconds of the least disturbed seed."""
        return f"{min(data['claims'][f'cost {loop} seconds'].values()):.0f}"

    def claim(key, form):
        """What a script in assets/claims/ measured."""
        return spread(list(data["claims"].get(key, {}).values()), form)

    beside_ptx = spread(values({"policies": data["methods"]}, "ppo", "share_gold"), ".1%")
    easier = []
    overall = data["direct"]["rsft-overall"]
    for seed, every in overall["kept_all_reward"].items():
        easier.append(overall["kept_prompts_reward"][seed] - every)
    other_seed = "other_pairs another seed's SFT gold"
    of_base = "other_pairs the base model's gold"
    gradients = []
    for pairs in ("its own", "another seed's SFT", "the base model's"):
        gradients.append(claim(f"other_pairs {pairs} gradient", ".1f"))
    first_gradients = ", ".join(gradients)
    early = slice(5, 10)
    late = slice(90, 100)

    return table(["claim", "where", "command", "what came out", "verdict"], [
        ["the base model continues, it does not answer", "CS 224R ch. 3",
         "`sft.py`, `python -m assets.claims.writers`",
         f"{stage('sft base_answers', '.1%')} of 200 held-out requests get a story; "
         f"{claim('writers base, requests share', '.1%')} of 1,000 are continued with more "
         "requests",
         "holds"],
        ["SFT closes that gap", "CS 224R ch. 4", "`sft.py`",
         f"{stage('sft answers', '.1%')}; flawless {stage('sft flawless', '.1%')}",
         "holds"],
        ["SFT can't beat its writers, preference tuning can", "CS 224R notes 4.2.1, 4.3",
         "`python -m assets.claims.writers`",
         f"gold: the writers {claim('writers the writers gold', '.2f')}, "
         f"SFT {claim('writers sft gold', '.2f')}, DPO {claim('writers dpo gold', '.2f')}, "
         f"PPO {claim('writers ppo gold', '.2f')}; "
         f"SFT at temperature 0.1 {claim('writers SFT at temperature 0.1 gold', '.2f')}",
         "at temperature 1 only: sampled colder, SFT beats them without preferences"],
        ["a bad SFT model can't be mended by preference tuning", "CME 295",
         "`sft.py --demonstrations 512`, `ppo.py`, `dpo.py`, `python -m assets.claims.writers`",
         f"gold and flawless stories after 512 demonstrations: SFT {of_few('sft', '512')}, "
         f"DPO {of_few('dpo', '512')}, PPO {of_few('ppo', '512')}; after 2,048: "
         f"{of_few('sft', '2048')}, {of_few('dpo', '2048')}, {of_few('ppo', '2048')}; after "
         f"12,288: {of_few('sft', FULL)}, {of_few('dpo', FULL)}, {of_few('ppo', FULL)}",
         f"holds for DPO; PPO mends {mended('512')} of the broken stories after 512, "
         f"{mended('2048')} after 2,048"],
        ["instruction tuning generalizes (there: to new tasks; here: to new phrasings)",
         "CS 224R ch. 4", "`python -m assets.claims.phrasings`",
         "two of twelve ways to ask left out: a story for "
         f"{claim('phrasings ten of them, the two ways answers', '.0%')} of such requests, a "
         f"flawless one for {claim('phrasings ten of them, the two ways flawless', '.0%')}; "
         "with all twelve "
         f"{claim('phrasings all twelve ways, the two ways answers', '.0%')} and "
         f"{claim('phrasings all twelve ways, the two ways flawless', '.0%')}",
         "new phrasings are answered, with more slips; tasks are not tested"],
        ["only differences of rewards matter", "CS 224R ch. 6", "`pytest -k only_differences`",
         "a constant on all rewards changes neither loss nor gradient",
         "holds exactly"],
        ["a second epoch overfits the reward model", "ECE 7115", "`reward_model.py --epochs 2`",
         f"held-out loss {of_epochs('held_out_loss', '.3f')} (training loss "
         f"{of_epochs('training_loss', '.3f')}); of Bayes accuracy "
         f"{of_epochs('share_of_bayes', '.1%')}",
         "not with 10,240 pairs"],
        ["more comparisons, better rewards", "ours (CS 224R ch. 9 assumes infinite data)",
         "`reward_model.py --learning_curve`",
         f"above chance, of what is possible: {of_possible('256')} with 256, "
         f"{of_possible('10,240')} with 10,240",
         "holds, still rising"],
        ["comparisons are better labels than scores", "CS 224R notes 4.3.3",
         "`python -m assets.claims.marks`",
         "above chance, of what is possible, with 10,240 labels: comparisons "
         f"{claim('marks comparisons above_chance', '.1%')}, in four steps "
         f"{claim('marks four-step ratings above_chance', '.1%')}, marks from 1 to 7 "
         f"{claim('marks marks above_chance', '.1%')}",
         "a tie, where a mark is as noisy as a look in a comparison and each annotator biased; "
         "that people's marks are noisier is not tested"],
        ["the reward model is right only where it was trained", "CS 224R notes 4.3.4",
         "`python -m assets.claims.where_trained`",
         "above chance, of what is possible: on SFT's answers "
         f"{claim('where_trained sft share', '.0%')}, "
         f"best of 16 {claim('where_trained best of 16 share', '.0%')}, "
         f"PPO {claim('where_trained ppo share', '.0%')}, "
         f"PPO without a penalty {claim('where_trained ppo-beta0 share', '.0%')}; on the "
         f"first three a point of score is {claim('where_trained sft slope', '.1f')}, "
         f"{claim('where_trained best of 16 slope', '.1f')} and "
         f"{claim('where_trained ppo slope', '.1f')} of gold",
         "holds: far away, without a penalty, it is hardly better than a coin; on SFT's own best "
         "answers it is worse, too"],
        ["without a KL penalty the reward is hacked", "CME 295; ECE 7115",
         "`ppo.py --beta 0 --name ppo-beta0`",
         f"iterations 6-10: score {unpenalized('reward', early)}, "
         f"gold {unpenalized('gold', early)}; "
         f"91-100: {unpenalized('reward', late)}, {unpenalized('gold', late)}",
         "holds"],
        ["the penalty prevents it", "CS 224R ch. 7", "`ppo.py`",
         f"score {of_pipeline('ppo', 'reward', '.2f')}, "
         f"gold {of_pipeline('ppo', 'gold', '.2f')}",
         "holds"],
        ["β → 0 is greedy, β → ∞ the reference", "CS 224R ch. 7", "`best_of_n.py`, its frontier",
         f"π* at β = 0.05 is {frontier_kl('0.050')} nats from the reference, "
         f"at 6.4 {frontier_kl('6.400')}",
         "β → ∞ holds; towards 0 the nats grow, and few samples weigh anything"],
        ["alignment forgets", "CME 295", "`best_of_n.py`",
         f"pretraining loss: base {of_pipeline('base', 'pretraining', '.2f')}, "
         f"SFT {of_pipeline('sft', 'pretraining', '.2f')}, "
         f"PPO {of_pipeline('ppo', 'pretraining', '.2f')}, "
         f"DPO {of_pipeline('dpo', 'pretraining', '.2f')}, PPO without a penalty "
         f"{of('ppo-beta0', 'pretraining', '.2f')} nats",
         "SFT does, PPO and DPO add little; PPO without a penalty forgets most"],
        ["PPO-ptx mends it", "ECE 7115", "`ppo.py --ptx 0.5`",
         f"{of('ppo-ptx', 'pretraining', '.2f')} nats; J's share under gold "
         f"{of('ppo-ptx', 'share_gold', '.1%')}, PPO {beside_ptx}",
         "holds, for some seven points of the share"],
        ["a baseline lowers the variance", "ECE 7115", f"`{LISTED} variance`",
         "of the gradient, in units of its squared length: none 42, batch mean 12, V 12, "
         "GAE λ = 0.5 7; with 2 added to every reward: none 14.5, leave-one-out 16.7",
         "holds where the mean return is far from 0; near 0 leave-one-out is noisier than none"],
        ["λ trades bias against variance", "ECE 7115", f"`{LISTED} variance`",
         "with a wrong V: λ = 1 variance 14, bias 0; λ = 0 variance 8, bias 48 %",
         "holds"],
        ["several epochs on one batch need the ratio, and the clip", "ECE 7115",
         f"`{LISTED} passes`",
         "8 passes, nats from π*: no ratio 0.75 to 2.01, ratio 0.96 to 2.26, ratio and clip 0.06 "
         "to 0.09 (three seeds; the command prints one)",
         "holds in this world: with both it ends near π*, with a ratio alone no nearer than "
         "without"],
        ["several passes save samples", "ECE 7115", "`ppo.py --epochs K`",
         "J's share, reward model, after 1,280 / 2,560 / 6,400 responses: "
         f"K = 1 {by_responses('1')}, 2 {by_responses('2')}, 4 {by_responses('4')}, "
         f"8 {by_responses('8')}, 8 without the clip {by_responses('8-no_clip')}",
         "holds where responses are few; without the clip, at the same rate, 8 passes are no "
         "better than one after 2,560"],
        ["four models, three, two in memory", "CME 295; ECE 7115", "`ppo.py --method …`",
         f"PPO {of('ppo', 'models', '.0f')}, {of('ppo', 'memory_mb', '.0f')} MB; "
         f"GRPO {of('ppo-grpo', 'models', '.0f')}, {of('ppo-grpo', 'memory_mb', '.0f')} MB; "
         f"DPO {of_direct('dpo', 'models', '.0f')}, {of_direct('dpo', 'memory_mb', '.0f')} MB",
         "holds"],
        ["best-of-N: N times the cost, KL ≤ log N − (N−1)/N", "CME 295 (the cost)",
         f"`{LISTED} exact_law`, `python -m assets.claims.cost`",
         "the bound, reached where ties are rare; best of 16 takes "
         f"{claim('cost best of 16 one_at_a_time', '.2f')} s an answer, in one batch "
         f"{claim('cost best of 16 batched', '.2f')} s, PPO "
         f"{claim('cost PPO, one answer batched', '.2f')} s",
         "N times the samples; in one batch a few times the seconds"],
        ["top-K overall favours easy prompts", "ECE 7115", "`best_of_n.py --finetune overall`",
         "the best 1,024 of 16,384 responses come from "
         f"{of_direct('rsft-overall', 'kept_prompts', '.0f')} of 1,024 prompts, "
         f"on which SFT's mean reward is higher by {spread(easier, '.2f')}",
         "holds"],
        ["RL and rejection sampling, in turn", "ECE 7115 \"The Full Pipeline\"",
         "`ppo.py --start rsft-per_prompt --name ppo-after_rsft`, "
         "`python -m assets.claims.in_turn`",
         f"J's share in %, reward model / gold: RSFT {in_turn('rsft-per_prompt')}, "
         f"PPO {in_turn('ppo')}, RSFT then PPO {in_turn('ppo-after_rsft')}, "
         f"PPO then RSFT {in_turn('rsft-after_ppo')}; its score {of_turns('reward', '.2f')}, "
         f"gold {of_turns('gold', '.2f')} at {of_turns('kl', '.1f')} nats",
         "RSFT after PPO has the best score and gold of the four; in J it pays too much"],
        ["PPO and DPO share an optimum", "CS 224R ch. 9",
         f"`{LISTED} \"boltzmann or same_policy\"`",
         "both end within 0.02 nats of π*",
         "holds"],
        ["PPO ends slightly better", "CME 295; CS 224R ch. 9 (notes 4.4.2: the contrary)",
         "`best_of_n.py`",
         "over four chains and two orders, gold share: "
         f"PPO {of_orders('ppo', 'share_gold', '.1%')}, "
         f"DPO {of_orders('dpo', 'share_gold', '.1%')}; under the reward model "
         f"{of_orders('ppo', 'share_reward', '.1%')}, {of_orders('dpo', 'share_reward', '.1%')}",
         "holds here; on the GPU DPO leads under gold (88.9 to 87.3 %)"],
        ["DPO is dramatically cheaper", "CS 224R ch. 9; notes 4.4.2",
         "`python -m assets.claims.cost`",
         f"loop and losses: {claim('cost dpo lines', '.0f')} lines and "
         f"{claim('cost dpo settings', '.0f')} settings, PPO "
         f"{claim('cost ppo lines', '.0f')} and {claim('cost ppo settings', '.0f')}; 2 models, "
         f"PPO 4; {quickest('dpo')} s, PPO {quickest('ppo')} s after {quickest('reward_model')} s "
         "for its reward model",
         "simpler; faster, once PPO's reward model is counted"],
        ["DPO is hacked less", "CS 224R ch. 9", "`dpo.py --beta 0.05`, `ppo.py --beta 0.05`",
         f"gold with β = 0.2, 0.05 and 0.02: DPO {of_betas('dpo', 'gold', '.2f')} at "
         f"{of_betas('dpo', 'kl', '.0f')} nats; PPO {of_betas('ppo', 'gold', '.2f')} at "
         f"{of_betas('ppo', 'kl', '.0f')}",
         "not here: DPO loses gold first, not to the score but to sentences of no world"],
        ["DPO raises the chosen response's probability", "ECE 7115 \"DPO Loss\"", "`dpo.py`",
         "log-ratios of the pairs it trains on, last 64 steps: chosen "
         f"{of_direct('dpo', 'chosen_log_ratio', '.1f')}, rejected "
         f"{of_direct('dpo', 'rejected_log_ratio', '.1f')} nats",
         "not here: both fall"],
        ["DPO is easier to tune", "CME 295; CS 224R ch. 9", "`dpo.py`, `ppo.py`, `--lr`, `--beta`",
         "gold share over 4 learning rates and 3 β, best, median, worst: "
         f"{grid_summary(data)} (seed 1)",
         "as easy at a quarter of these rates, not at four times: there DPO is behind SFT with two "
         "of three β, PPO with none"],
        ["DPO is off its distribution, online DPO the cure", "CS 224R ch. 9, 11",
         "`dpo.py --online 5 --judge annotator`",
         f"gold share: offline {of_direct('dpo', 'share_gold', '.1%')}, "
         "online with the annotator's labels "
         f"{of_direct('dpo-online-annotator', 'share_gold', '.1%')}, "
         f"with the reward model's {of_direct('dpo-online', 'share_gold', '.1%')}",
         "not here: as good with the annotator's labels, worse with a reward model's, the "
         "lecture's way"],
        ["pairs of other policies teach less", "CS 224R ch. 9",
         "`python -m assets.claims.other_pairs --other OUT`",
         "gold after DPO on 2,560 pairs of samples: its own "
         f"{claim('other_pairs its own gold', '.2f')}, another seed's SFT model "
         f"{claim(other_seed, '.2f')}, the base model {claim(of_base, '.2f')}; "
         f"SFT {claim('other_pairs SFT gold', '.2f')}; norm of the first gradient "
         f"{first_gradients}",
         "not if they write alike; a far policy's teach nothing, though their gradient is "
         "the largest"],
        ["SimPO corrects for length", "ECE 7115", "`dpo.py --loss simpo`",
         f"tokens: SFT {of_direct('sft', 'length', '.0f')}, "
         f"DPO {of_direct('dpo', 'length', '.0f')}, "
         f"SimPO {of_direct('dpo-simpo', 'length', '.0f')}",
         "it shortens"],
        ["too much optimization collapses modes", "ECE 7115", "`ppo.py --beta 0 --name ppo-beta0`, "
         "`best_of_n.py --policies ppo,ppo-beta0`",
         f"distinct-2: SFT {of_pipeline('sft', 'distinct_2', '.2f')}, "
         f"PPO {of_pipeline('ppo', 'distinct_2', '.2f')}, "
         f"without the penalty {of('ppo-beta0', 'distinct_2', '.2f')}; J* under gold, "
         f"{of_pipeline('optimum under gold', 'J_star', '.2f')}, estimated from a policy's own "
         f"samples: PPO {of_pipeline('ppo', 'own_J_star_gold', '.2f')}, without the penalty "
         f"{of('ppo-beta0', 'own_J_star_gold', '.0f')}",
         "holds: without the penalty only"],
        ["AI preferences align as well as people's", "CS 224R ch. 11",
         "`reward_model.py --judge constitution`",
         "the annotator, asked again, agrees with "
         f"{stage('reward_model-constitution agreement', '.1%')} of them, with "
         f"{stage('reward_model agreement', '.1%')} of its own; gold share of DPO on them "
         f"{of('dpo-constitution', 'share_gold', '.1%')}, "
         f"on its own {of('dpo-2e-4', 'share_gold', '.1%')}",
         "not these six rules: the annotator's noise averages out, their systematic errors do not"],
        ["one reward at the end is sparse", "CME 295; CS 224R ch. 11",
         "`best_of_n.py --process`, `ppo.py --reward process`",
         f"gold share of best-of-16: outcome model {of('best of 16', 'share_gold', '.1%')}, "
         f"sum of the steps' {of('best of 16, sum', 'share_gold', '.1%')}; "
         f"gold of PPO on the steps {of('ppo-process', 'gold', '.2f')} "
         f"at {of('ppo-process', 'kl', '.1f')} nats",
         "dense, and hacked at the β at which the outcome's reward is not"],
        ["verifiable rewards need no reward model", "CS 224R ch. 11", "`ppo.py --reward verifier`",
         f"right: SFT {of('sft', 'verifier_verified', '.1%')}, "
         f"PPO {of('ppo-verifier', 'verifier_verified', '.1%')} with 3 models, "
         f"GRPO {of('ppo-verifier-grpo', 'verifier_verified', '.1%')} with 2",
         "holds"],
        ["DPO's margin runs away, IPO's does not", "CS 224R ch. 10", f"`{LISTED} run_away`",
         "with certain labels DPO's keeps growing, IPO's stays at 1/(2β)",
         "holds"]])


def claim_rows(data, claim, names, columns):
    """A row for each thing that a script in assets/claims/ measured. names: {what it calls it:
    label}; columns: (figure, format)."""
    rows = []
    for name, label in names.items():
        row = [label]
        for key, form in columns:
            row.append(spread(list(data["claims"].get(f"{claim} {name} {key}", {}).values()), form))
        rows.append(row)
    return rows


def trained(data):
    """The reward model on the answers of policies that were trained against it."""
    names = {"sft": "SFT", "best of 16": "best of 16", "ppo": "PPO",
             "ppo-beta0": "PPO without a penalty"}
    columns = [("reward", ".2f"), ("gold", ".2f"), ("accuracy", ".3f"), ("bayes", ".3f"),
               ("share", ".0%"), ("slope", ".2f")]
    head = ["answers of", "score", "gold", "accuracy", "Bayes", "above chance, of what is possible",
            "gold for a point of score"]
    return table(head, claim_rows(data, "where_trained", names, columns))


def parts(data):
    """Every part of gold: what it is worth to the reward model, and what PPO makes of it."""
    names = {part: part for part in ("on request", "kindness", "ending", "brevity", "repetition")}
    names["gold"] = "all, and the score"
    columns = [("correlation", ".2f"), ("price", ".2f")]
    for policy in ("ppo", "ppo-beta0"):
        columns += [(policy, ".2f"), (f"{policy}_seen", ".2f")]
    head = ["part of gold", "correlation with the score", "price in the score", "PPO gains",
            "the score pays", "without a penalty PPO gains", "the score pays"]
    return table(head, claim_rows(data, "where_trained", names, columns))


def labels(data):
    """Reward models trained on comparisons, on four-step ratings and on marks."""
    names = {"comparisons": "10,240 comparisons", "four-step ratings": "10,240 in four steps",
             "marks": "10,240 marks, of one of each pair", "marks, both of a pair": "20,480 marks",
             "the same without biases": "20,480 marks without biases"}
    columns = [("above_chance", ".1%"), ("correlation", ".2f")]
    head = ["labels", "above chance, of what is possible", "correlation with gold"]
    return table(head, claim_rows(data, "marks", names, columns))


def asked(data):
    """SFT with and without demonstrations of two of the twelve ways to ask."""
    rows = []
    for trained_on, label in (("all twelve ways", "all twelve ways"), ("ten of them", "ten")):
        names = {f"{trained_on}, the ten ways": "ten", f"{trained_on}, the two ways": "the two"}
        columns = [("answers", ".0%"), ("flawless", ".0%"), ("on_request", ".0%")]
        rows += [[label, *row] for row in claim_rows(data, "phrasings", names, columns)]
    return table(["demonstrations of", "asked in", "a story", "flawless", "on request"], rows)


def others(data):
    """DPO on comparisons of its own samples, of another seed's and of the base model's."""
    names = {"its own": "its own SFT model", "another seed's SFT": "another seed's SFT model",
             "the base model's": "the base model"}
    columns = [("logprob", ".2f"), ("gradient", ".1f"), ("weight", ".2f"), ("kl", ".2f"),
               ("gold", ".2f")]
    head = ["samples of", "log π_ref, nats a token", "norm of the first gradient", "σ(−z) after",
            "KL after, nats", "gold after"]
    return table(head, claim_rows(data, "other_pairs", names, columns))


def answer(data):
    """What one answer costs."""
    names = {"PPO, one answer": "PPO", "SFT, one answer": "SFT", "best of 4": "best of 4",
             "best of 16": "best of 16", "best of 64": "best of 64"}
    columns = [("tokens", ".0f"), ("one_at_a_time", ".2f"), ("batched", ".2f")]
    head = ["an answer of", "tokens sampled", "seconds, one at a time", "in one batch"]
    return table(head, claim_rows(data, "cost", names, columns))


def loops(data):
    """What training costs. Of the seconds the least disturbed seed's."""
    rows = []
    for name, label in (("reward_model", "the reward model"), ("ppo", "PPO, after that"),
                        ("dpo", "DPO")):
        row = [label]
        for key in ("seconds", "lines", "settings"):
            xs = data["claims"][f"cost {name} {key}"].values()
            row.append(f"{min(xs):.0f}")
        rows.append(row)
    return table(["training of", "seconds", "lines", "settings"], rows)


def identity(d):
    """d itself: rises in proportion to the root of the KL."""
    return d


def square(d):
    """d², which is the KL."""
    return d ** 2


def times_log(d):
    """d log d."""
    return d * np.log(d)


def saturating(d):
    """1 - e^-d: rises at first, then no more."""
    return 1 - np.exp(-d)


FORMS = {  # of the law: gold gained = α rise(d) - β fall(d), with d = √KL
    "d(α − β d)": (identity, square),
    "d(α − β log d)": (identity, times_log),
    "α(1 − e^−d) − β d": (saturating, identity),
}


def fit_law(pairs, rise, fall):
    """gold gained = α rise(d) - β fall(d), with d = √KL, by least squares over pairs
    (KL, gold gained): (α, β, R²)."""
    d = np.sqrt([kl for kl, _ in pairs])
    y = np.array([gold for _, gold in pairs])
    design = np.stack([rise(d), -fall(d)], axis=1)
    alpha, beta = np.linalg.lstsq(design, y, rcond=None)[0]
    unexplained = ((y - design @ [alpha, beta]) ** 2).sum()
    return alpha, beta, 1 - unexplained / ((y - y.mean()) ** 2).sum()


def batches(data, name):
    """(KL, gold) of every batch of every seed's run."""
    pairs = []
    for run in data["runs"].get(name, {}).values():
        pairs += zip(run["kl"], run["gold"])
    return pairs


def ladder(data, field):
    """(KL, gold or reward) of best of 1, 2, 4, … 64: the means of the seeds."""
    points = []
    for name, figures in data["frontier"].items():
        if name.startswith("best of "):
            points.append((statistics.mean(figures["kl"].values()),
                           statistics.mean(figures[field].values())))
    return points


def laws(data):
    """Gao, Schulman, Hilton 2023: with d = √KL, gold - gold of SFT = d(α - β d) for best-of-N and
    d(α - β log d) for RL. All FORMS are fitted to both, for every reward model: to the means of the
    seeds, and to every batch of their runs."""
    rows = []
    for name, label in LAWS.items():
        if name:
            best = data["laws"].get(name, {}).get("best", [])
            run = data["laws"].get(name, {}).get("run", [])
        else:
            best = ladder(data, "gold")
            run = batches(data, "ppo-beta0")
        start = min(best)[1] if best else 0.0  # best of 1: SFT
        for policy, pairs in (("best-of-N, N to 64", best), ("PPO without a penalty", run)):
            gained = [(kl, gold - start) for kl, gold in pairs if kl > 0.05]
            if len(gained) > 2:
                row = [label, policy]
                for rise, fall in FORMS.values():
                    row += [f"{x:.2f}" for x in fit_law(gained, rise, fall)]
                rows.append(row)

    head = ["reward model", "policy"]
    for form in FORMS:
        head += [f"{form}: α", "β", "R²"]
    return table(head, rows)


def equal_kl(data):
    """Gold at equal KL, without a penalty and with it: of every seed's run the mean of the batches
    within ¼ nat."""
    rows = []
    for name, label in (("ppo-beta0", "no penalty"), ("ppo", "β = 0.2")):
        row = [label]
        for kl in (0.5, 1.0, 1.5, 2.0):
            means = []
            for run in data["runs"].get(name, {}).values():
                near = [gold for x, gold in zip(run["kl"], run["gold"]) if abs(x - kl) <= 0.25]
                if near:
                    means.append(statistics.mean(near))
            row.append(spread(means, ".2f"))
        rows.append(row)
    return table(["gold at a KL of", "0.5", "1", "1.5", "2 nats"], rows)


def write_tables(found, paths=READMES):
    """Replace every table below a mark <!-- table: NAME --> in the READMEs by the one found."""
    for path in paths:
        if not path.exists():
            continue
        old = path.read_text()
        new = old
        for name, text in found.items():
            mark = f"<!-- table: {name} -->\n"
            before, _, after = new.partition(mark)
            if after:
                rest = re.sub(r"\A(\|.*\n)*", "", after)
                new = f"{before}{mark}{text}\n{rest}"
        if new != old:
            path.write_text(new)
            print(f"{path}: tables written")


# --------------------------------------------------------------------------------------------------
# Pictures: legible on a phone, on white and on black

GRAY = "#7d8590"
BLUE = "#3b82f6"
ORANGE = "#f08c2e"
GREEN = "#2fa866"


def axes(plt, rows=1, height=4.2):
    """A figure and its axes, one below the other; height of each in inches."""
    figure, found = plt.subplots(rows, 1, figsize=(6.8, height * rows), squeeze=False)
    for ax in found[:, 0]:
        ax.grid(color=GRAY, alpha=0.25)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, found[:, 0]


def save(figure, name, folder=HERE):
    """Write a picture, without a background and without the date: the same figures give the same
    file."""
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})


def deviation(xs):
    """The standard deviation of the seeds; 0 of one seed."""
    return statistics.stdev(xs) if len(xs) > 1 else 0


# Where the frontier's picture has the names of its points: by hand, so that no line crosses a text.
NAMED = {
    "gold": {
        "rsft-per_prompt": ("RSFT", 1.12, 3.05),
        "ppo": ("PPO", 1.75, 2.8),
        "ppo-rloo": ("leave-one-out", 2.3, 2.5),
        "dpo-online-annotator": ("online DPO, fresh labels", 1.1, 2.6),
        "dpo": ("DPO", 3.1, 3.2),
        "ppo-grpo": ("GRPO", 3.6, 3.5),
    },
    "reward": {
        "rsft-per_prompt": ("RSFT", 1.1, 0.95),
        "ppo": ("PPO", 1.7, 0.8),
        "ppo-rloo": ("leave-one-out", 2.3, 0.5),
        "dpo-online-annotator": ("online DPO, fresh labels", 1.0, 0.6),
        "dpo": ("DPO", 3.1, 1.1),
        "ppo-grpo": ("GRPO", 3.6, 1.45),
    },
}


def points(ax, data, field):
    """Every policy within 4 nats as a point, the mean of its seeds. The best known ones have their
    spread and a name; the others are gray."""
    named = NAMED[field]
    for group, names, color in (("policies", METHODS, BLUE), ("direct", DIRECT, ORANGE)):
        for name in names:
            xs = values({"policies": data[group]}, name, "kl")
            ys = values({"policies": data[group]}, name, field)
            if not xs or statistics.mean(xs) > 4:
                continue
            x = statistics.mean(xs)
            y = statistics.mean(ys)
            if name not in named:
                ax.plot(x, y, color=GRAY, marker="o", markersize=4, alpha=0.6)
                continue
            ax.errorbar(x, y, xerr=deviation(xs), yerr=deviation(ys), color=color, marker="o",
                        markersize=5, linewidth=1, zorder=3)
            label, label_x, label_y = named[name]
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.7}
            ax.annotate(label, (x, y), xytext=(label_x, label_y), color=color, ha="center",
                        va="top", arrowprops=arrow)


def draw_frontier(plt, data):
    """Every method below the frontier, which no policy can cross."""
    figure, found = axes(plt, rows=2)
    for ax, field, under in zip(found, ("gold", "reward"), ("gold", "reward model")):
        curve = []
        for name, figures in data["frontier"].items():
            if name.startswith(f"{under} "):
                if statistics.mean(figures["effective_samples"].values()) >= 20:
                    curve.append((statistics.mean(figures["kl"].values()),
                                  statistics.mean(figures[field].values()),
                                  statistics.pstdev(figures[field].values()),
                                  float(name.split()[-1])))
        if curve:
            kl, mean, error, betas = map(np.array, zip(*sorted(curve)))
            ax.plot(kl, mean, color=GRAY, linewidth=2)
            ax.fill_between(kl, mean - error, mean + error, color=GRAY, alpha=0.3, linewidth=0)
            ax.text(0.98, 0.04, "gray line: π* for every β, no policy is above it;\n"
                    "gray points: the other methods", color=GRAY, ha="right", fontsize=9,
                    transform=ax.transAxes)
            for x, y, beta in zip(kl, mean, betas):
                if beta in (0.2, 0.4, 0.8, 1.6):
                    ax.plot(x, y, color=GRAY, marker="|", markersize=8)
                    ax.annotate(f"β = {beta:g}", (x, y), xytext=(-4, 5), ha="right",
                                textcoords="offset points", fontsize=9, color=GRAY)

        best = ladder(data, field)
        if best:
            kl, mean = zip(*sorted(best))
            ax.plot(kl, mean, color=GREEN, marker=".", linewidth=1)
            ax.annotate("SFT: best of 1", (kl[0], mean[0]), xytext=(8, -3), color=GREEN,
                        textcoords="offset points", va="center")
            ax.annotate("best of 64", (kl[-1], mean[-1]), xytext=(6, 0), color=GREEN,
                        textcoords="offset points", va="center")
        points(ax, data, field)
        ax.set_xlim(-0.05, 4)
        ax.set_xlabel("KL to the reference, nats (best-of-N: its bound)")
        ax.set_ylabel("gold, the true reward" if field == "gold" else "reward model's score")
    save(figure, "frontier")


def draw_over_optimization(plt, data):
    """Without a penalty the reward keeps rising while gold falls; with it both stay high."""
    figure, (ax,) = axes(plt)
    for name, style, label in (("ppo-beta0", "-", "no penalty"), ("ppo", "--", "β = 0.2")):
        for i, run in enumerate(data["runs"].get(name, {}).values()):
            d = np.sqrt(np.maximum(run["kl"], 0))
            hidden = "_" if i > 0 else ""  # matplotlib leaves such a label out of the legend
            for field, color in (("reward", ORANGE), ("gold", BLUE)):
                ax.plot(d, run[field], style, color=color, linewidth=1,
                        label=f"{hidden}{field}, {label}")

    found = batches(data, "ppo-beta0")
    start = data["frontier"].get("best of 1", {}).get("gold", {})
    if found and start:
        start = statistics.mean(start.values())
        pairs = [(kl, gold - start) for kl, gold in found if kl > 0.05]
        d = np.linspace(0.3, np.sqrt(max(kl for kl, _ in found)), 100)
        for (label, (rise, fall)), style in zip(FORMS.items(), (":", "-.", "-")):
            alpha, beta, _ = fit_law(pairs, rise, fall)
            ax.plot(d, start + alpha * rise(d) - beta * fall(d), style, color=GRAY, linewidth=1.2,
                    label=f"fitted: {label}")
    ax.set_xlabel("d = √KL to the reference, √nats")
    ax.set_ylabel("score")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.32), ncol=2)
    save(figure, "over_optimization")


def draw_how_close(plt, data):
    """The share of the gap between SFT and the optimum that each policy closes, under gold and
    under the reward model."""
    names = {name: name for name in BEST}
    names.update(METHODS)
    names.update(DIRECT)
    direct = {name: data["direct"].get(name, {}) for name in DIRECT}
    data = {**data, "policies": {**data["policies"], **direct}}
    names = {name: label for name, label in names.items() if values(data, name, "share_gold")}

    figure, (ax,) = axes(plt, height=0.36 * len(names) + 1)
    for offset, field, color, label in ((-0.2, "share_reward", ORANGE, "under the reward model"),
                                        (0.2, "share_gold", BLUE, "under gold")):
        for i, name in enumerate(names):
            xs = [100 * x for x in values(data, name, field)]
            error = statistics.stdev(xs) if len(xs) > 1 else None
            ax.barh(i + offset, statistics.mean(xs), height=0.36, color=color, xerr=error,
                    ecolor=GRAY, label=label if i == 0 else None)
    ax.set_yticks(range(len(names)), names.values())
    ax.invert_yaxis()
    ax.set_xlim(right=105)
    ax.set_xlabel("% of the way from SFT to J*")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=2)
    save(figure, "how_close")


def draw_one_run(plt, data):
    """What a healthy PPO run looks like."""
    runs = data["runs"].get("ppo", {})
    panels = (("reward", "gold", "kl"), ("entropy", "value_explained"), ("clip_fraction",))
    figure, found = axes(plt, rows=3, height=2.4)
    for ax, fields in zip(found, panels):
        for field, color in zip(fields, (ORANGE, BLUE, GREEN)):
            for seed, run in runs.items():
                label = field.replace("_", " ") if seed == min(runs) else None
                ax.plot(range(1, len(run[field]) + 1), run[field], color=color, linewidth=1,
                        alpha=0.8, label=label)
        ax.legend(frameon=False)
    found[-1].set_xlabel("iteration")
    save(figure, "one_run")


def draw_learning_curves(plt, data):
    """How far from the best possible SFT and the reward model are, by the number of examples."""
    figure, (ax,) = axes(plt)
    for stage, key, color, label in (
            ("sft", "excess", BLUE, "SFT: loss above the entropy"),
            ("reward_model", "share_of_bayes", ORANGE, "reward model: accuracy below Bayes'")):
        curve = []
        for count, row in data["curves"].get(stage, {}).items():
            shares = [x if stage == "sft" else 1 - x for x in row[key].values()]
            percents = [100 * x for x in shares]
            curve.append((number(count), statistics.mean(percents), deviation(percents)))
        if curve:
            counts, means, errors = zip(*sorted(curve))
            ax.errorbar(counts, means, yerr=errors, color=color, marker="o", markersize=4,
                        label=label)
    ax.set_xscale("log", base=2)
    ticks = [2 ** k for k in range(8, 15)]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("demonstrations, or comparisons")
    ax.set_ylabel("% from the best possible")
    ax.legend(frameon=False)
    save(figure, "learning_curves")


def draw_hacked(plt, data):
    """Who loses gold first: gold and the reward model's score against the KL that was spent, over
    β, for PPO and DPO."""
    figure, (ax,) = axes(plt)
    for kind, label, color in (("ppo", "PPO", BLUE), ("dpo", "DPO", ORANGE)):
        runs = []
        for beta in TRIED:
            name = kind if beta == "0.2" else f"{kind}-beta-{beta}"
            found = data["betas"].get(name, {})
            if found:
                means = [statistics.mean(found[key].values()) for key in ("kl", "gold", "reward")]
                runs.append((*means, beta))
        if not runs:
            continue
        kls, golds, rewards, _ = zip(*sorted(runs))
        ax.plot(kls, golds, color=color, marker="o", markersize=5, label=f"{label}, gold")
        ax.plot(kls, rewards, color=color, marker="o", markersize=4, linestyle=":",
                label=f"{label}, reward model's score")
        side, place = ("right", (-3, 6)) if label == "PPO" else ("center", (0, -18))
        for kl, gold, _, beta in runs:
            ax.annotate(f"β = {beta}", (kl, gold), color=color, fontsize=9, ha=side,
                        xytext=place, textcoords="offset points")
    ax.set_xscale("log", base=2)
    ticks = [0.5, 1, 2, 4, 8, 16, 32]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_ylim(0, 5)
    ax.set_xlabel("KL to the SFT model, nats")
    ax.set_ylabel("score")
    ax.legend(frameon=False, loc="lower right", ncol=2)
    save(figure, "hacked")


def draw_passes(plt, data):
    """What passes over each batch save: the share of the gap between SFT and J* by the number of
    responses."""
    figure, (ax,) = axes(plt)
    colors = {"1": GRAY, "2": GREEN, "4": BLUE, "8": ORANGE, "8-no_clip": ORANGE}
    for place, (K, (label, _)) in enumerate(PASSES.items()):
        aside = 1.02 ** (place - 2)  # so that no error lies on another
        curve = []
        for count in RESPONSES:
            shares = values(data, f"ppo-passes-{K}-{count}", "share_reward")
            if shares:
                percents = [100 * share for share in shares]
                curve.append((aside * int(count), statistics.mean(percents), deviation(percents)))
        if curve:
            counts, means, errors = zip(*curve)
            style = ":" if K == "8-no_clip" else "-"
            ax.errorbar(counts, means, yerr=errors, linestyle=style, color=colors[K], marker="o",
                        markersize=4, elinewidth=1, label=label)
    ax.set_xscale("log", base=2)
    counts = [int(count) for count in RESPONSES]
    ax.set_xticks(counts, [f"{count:,}" for count in counts])
    ax.set_xlabel("responses sampled")
    ax.set_ylabel("% of the way to J*, reward model")
    ax.legend(frameon=False, loc="lower right")
    save(figure, "passes")


def draw_variance(plt, data):
    """What a baseline, a value model and λ do to the variance of the gradient, and the bias that a
    wrong V costs."""
    rows = data["variance"]
    figure, (ax,) = axes(plt, height=0.36 * max(1, len(rows)) + 1)
    for i, (_, variance, bias) in enumerate(rows):
        biased = bias >= 0.02
        ax.barh(i, variance, color=ORANGE if biased else BLUE, height=0.6)
        ax.annotate(f"bias {bias:.0%}" if biased else "", (variance, i), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=9, color=ORANGE)
    ax.set_yticks(range(len(rows)), [what for what, *_ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("variance of one response's gradient, in units of |∇J|²")
    save(figure, "variance")


def pyplot():
    """matplotlib's, in the style of our pictures; None, and one line that says how to get it, where
    it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("the pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "text.color": GRAY, "axes.labelcolor": GRAY,
                         "xtick.color": GRAY, "ytick.color": GRAY, "svg.hashsalt": "rlhf",
                         "legend.fontsize": 9})
    return plt


def draw(data):
    """Draw all pictures, where matplotlib is installed."""
    plt = pyplot()
    if plt is None:
        return
    draw_frontier(plt, data)
    draw_over_optimization(plt, data)
    draw_how_close(plt, data)
    draw_one_run(plt, data)
    draw_learning_curves(plt, data)
    draw_hacked(plt, data)
    draw_passes(plt, data)
    draw_variance(plt, data)


# --------------------------------------------------------------------------------------------------
# One run of the reader's own

# What is drawn of a metrics.jsonl, of whatever stage, from top to bottom: figures with one axis.
PANELS = (("reward", "gold", "J"), ("kl",), ("loss", "held_out", "held_out_loss", "entropy"),
          ("clip_fraction",), ("accuracy", "held_out_accuracy"), ("margin",), ("length",))


def curves_of(path):
    """What can be drawn of a metrics.jsonl: a list of panels, {figure: ([step], [value])}. Exits
    with one line where that is nothing."""
    if not path.exists():
        sys.exit(f"{path}: does not exist; name the folder of a run, for example out/cpu/ppo")
    try:
        rows = read_rows(path)
        steps = [row for row in rows if "step" in row]
    except (ValueError, TypeError):
        sys.exit(f"{path}: not a metrics.jsonl of this project, whose lines are JSON objects")

    panels = []
    for names in PANELS:
        curves = {}
        for name in names:
            measured = [row for row in steps if row.get(name) is not None]
            if len(measured) > 1:  # one point is no curve
                curves[name] = ([row["step"] for row in measured], [row[name] for row in measured])
        if curves:
            panels.append(curves)
    if not panels:
        known = ", ".join(name for names in PANELS for name in names)
        sys.exit(f"{path}: has no two steps of any of these figures: {known}")
    return panels


def draw_run(folder):
    """Draw a run's figures over its steps, to a file beside its metrics.jsonl."""
    folder = Path(folder)
    panels = curves_of(folder / "metrics.jsonl")
    plt = pyplot()
    if plt is None:
        sys.exit(1)

    figure, found = axes(plt, rows=len(panels), height=2)
    for ax, curves in zip(found, panels):
        for (name, (steps, values)), color in zip(curves.items(), (ORANGE, BLUE, GREEN, GRAY)):
            ax.plot(steps, values, color=color, linewidth=1, label=name.replace("_", " "))
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    found[-1].set_xlabel("step")
    save(figure, "metrics", folder)
    print(f"drawn   {folder / 'metrics.svg'}")


def main(arguments):
    if arguments[:1] == ["--run"]:
        if len(arguments) != 2:
            sys.exit("--run takes one folder, for example out/cpu/ppo")
        draw_run(arguments[1])
        return
    for folder in arguments:
        if not Path(folder).is_dir():  # no figure at all would replace those of figures.json
            sys.exit(f"{folder}: is no folder")

    path = HERE / "figures.json"
    if arguments:
        path.write_text(json.dumps(collect(arguments), indent=0, sort_keys=True) + "\n")
    data = json.loads(path.read_text())
    draw(data)
    write_tables(tables(data))


if __name__ == "__main__":
    main(sys.argv[1:])
