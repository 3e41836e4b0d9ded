"""
figures.py: the README's pictures and tables, from what the scripts have written.

    sh assets/experiments.sh                        makes the data (hours): out/seed1, out/seed2, out/seed3
    python assets/figures.py out/seed?              reads it into figures.json, then as below
    python assets/figures.py                        draws the pictures and prints the tables of figures.json

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
METHODS = {  # folder: its name in tables and pictures
    "ppo": "PPO", "ppo-ppo_penalty": "PPO, KL penalty", "ppo-a2c": "A2C", "ppo-reinforce": "REINFORCE",
    "ppo-reinforce_baseline": "REINFORCE, batch mean", "ppo-leave_one_out": "REINFORCE, leave-one-out",
    "ppo-grpo": "GRPO as published", "ppo-grpo-no_scale": "GRPO, no division",
    "ppo-grpo-rewards": "GRPO, also KL in the rewards", "ppo-grpo-tokens": "GRPO, also a mean over tokens",
    "ppo-ptx": "PPO-ptx"}
DIRECT = {"dpo": "DPO", "dpo-ipo": "IPO", "dpo-kto": "KTO", "dpo-simpo": "SimPO", "dpo-orpo": "ORPO",
          "dpo-online": "online DPO", "dpo-online-annotator": "online DPO, annotator's labels",
          "rsft-per_prompt": "RSFT, best per prompt", "rsft-overall": "RSFT, best overall"}
BEST = ("best of 4", "best of 16", "best of 64")
STAGES = ("gpt", "sft", "reward_model", "reward_model-constitution", "reward_model-both", "process_model", "gpt-curated",
          "sft-curated")
JUDGES = {"": "the annotator", "-constitution": "the constitution", "-both": "both in turn"}
VERIFIED = {"sft": "SFT", "ppo-verifier": "PPO", "ppo-verifier-grpo": "GRPO", "ppo-verifier-beta0": "PPO, β = 0",
            "ppo-verifier-grpo-beta0": "GRPO, β = 0"}
GRID = {"DPO": ("dpo", ("5e-5", "2e-4", "8e-4", "3.2e-3")), "PPO": ("ppo", ("7.5e-5", "3e-4", "1.2e-3", "4.8e-3"))}
BETAS = ("0.05", "0.2", "0.8")
PEERS = {"dpo": "DPO, ours", "dpo-trl": "DPO, TRL 1.16", "ppo": "PPO, ours", "ppo-trl": "PPO, TRL 1.12",
         "ppo-grpo": "GRPO as published, ours", "ppo-trl-grpo-group": "GRPO as published, TRL 1.16",
         "ppo-grpo-no_scale": "GRPO, no division, ours", "ppo-trl-grpo-none": "GRPO, no division, TRL 1.16"}
LAWS = {"": "10,240 comparisons, 4 layers", "4096": "4,096 comparisons", "1024": "1,024 comparisons",
        "256": "256 comparisons", "2-layers": "2 layers", "1-layer": "1 layer"}  # the reward models of laws/NAME


def read_rows(path):
    """The rows of a metrics.jsonl; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last(rows, key):
    """A figure in the last row that has it, or None."""
    return next((row[key] for row in reversed(rows) if key in row), None)


def text_of(path):
    """What a script printed, "" if that is not there."""
    return path.read_text() if path.exists() else ""


def undisturbed(rows):
    """The seconds of a run on a machine that did nothing else: the first row's (before it RSFT samples), and for all others
    as many times the quickest ones (one in ten)."""
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    steps = sorted(after - before for before, after in zip(seconds, seconds[1:]))
    quickest = statistics.mean(steps[:max(1, len(steps) // 10)]) if steps else 0.0
    return seconds[0] + len(steps) * quickest if seconds else None


# ----------------------------------------------------------------------------------------------------------------------
# From the output folders to figures.json


def collect(folders):
    """All that is drawn and said, from one output folder a seed: {name: {figure: [a number for each seed]}} and curves."""
    data = dict(seeds=len(folders), stages={}, policies={}, frontier={}, runs={}, curves={}, laws={}, variance=[], peers={})
    for i, folder in enumerate(folders):
        cpu = Path(folder) / "cpu"
        for stage in STAGES:
            rows = read_rows(cpu / stage / "metrics.jsonl")
            for key in ("held_out", "old_held_out", "entropy", "excess", "base_answers", "answers", "flawless",
                        "expected_accuracy", "bayes_accuracy", "share_of_bayes", "above_chance", "annotator_loss"):
                put(data["stages"], f"{stage} {key}", i, last(rows, key))
        for key in ("held_out", "old_held_out", "excess"):  # before mid-training
            put(data["stages"], f"before {key}", i, last(read_rows(cpu / "gpt-curated/metrics.jsonl")[:1], key))
        seen = set()
        for path in sorted(cpu.glob("best_of_n-*/metrics.jsonl")):  # the frontier, SFT and best-of-N are the first one's
            rows = [row for row in read_rows(path) if row["policy"] not in seen or row.get("under") == "verifier"]
            for row in rows:
                under, name = row.get("under"), row["policy"]
                if name == "frontier" or under == "best of N":
                    key = f"{under} {row['beta']:.3f}" if name == "frontier" else name
                    for figure in ("kl", "reward", "gold", "effective_samples"):
                        put(data["frontier"].setdefault(key, {}), figure, i, row.get(figure))
                elif under in ("reward model", "gold"):
                    figures = data["policies"].setdefault(name, {})
                    put(figures, f"share_{under.split()[0]}", i, row["share"])
                    put(figures, f"own_J_star_{under.split()[0]}", i, row.get("own_J_star"))
                    if name == "sft":  # of the optimum itself
                        for key in ("J_star", "J_star_kl", "left_by_policy"):
                            put(data["policies"].setdefault(f"optimum under {under}", {}), key, i, row[key])
                elif under == "verifier":
                    for key in ("verified", "pass_16", "J", "J_star", "share"):
                        put(data["policies"].setdefault(name, {}), f"verifier_{key}", i, row.get(key))
                elif under == "pretraining":
                    put(data["policies"].setdefault(name, {}), "pretraining", i, row["loss"])
                elif under is None:
                    for key in ("reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"):
                        put(data["policies"].setdefault(name, {}), key, i, row[key])
            seen |= {row["policy"] for row in rows}
        for path in sorted(cpu.glob("best_of_n-*peers*/metrics.jsonl")):  # one seed: errors over prompts
            for row in read_rows(path):
                under = (row.get("under") or "policy").split()[0]
                if row["policy"] in PEERS and under in ("policy", "gold", "reward"):
                    found = {f"{key}_{under}": row[key] for key in ("share", "share_error", "kl") if key in row}
                    data["peers"].setdefault(row["policy"], {}).update({k: float(f"{x:.5g}") for k, x in found.items()})
        for name in data["peers"] if not i else ():  # of theirs what TRL says at the end, or its progress bar
            ran, log = last(read_rows(cpu / name / "metrics.jsonl"), "seconds"), text_of(cpu / f"{name}.txt")
            theirs = re.findall(r"'train_runtime': '?([\d.]+)", log) or [
                60 * int(minutes) + int(seconds) for minutes, seconds in re.findall(r"100/100 \[(\d+):(\d+)", log)]
            data["peers"][name]["seconds"] = ran or float(theirs[-1])
        for name in {**METHODS, **DIRECT}:
            rows = read_rows(cpu / name / "metrics.jsonl")
            found = dict(held_out_accuracy=last(rows, "held_out_accuracy"), seconds=undisturbed(rows))
            found |= {f"kept_{key}": last(rows, key) for key in ("prompts", "prompts_reward", "all_reward")}  # RSFT
            if rows and "entropy" in rows[-1]:
                found["entropy"] = statistics.mean(row["entropy"] for row in rows[-10:])
            models = re.search(r"models in memory: (\d) .*, (\d+) MB", text_of(cpu / f"{name}.txt"))
            found |= dict(zip(("models", "memory_mb"), map(int, models.groups()))) if models else {}
            for key, x in found.items():
                put(data["policies"].setdefault(name, {}), key, i, x)
        for suffix in JUDGES:
            agreed = re.search(r"agrees with ([\d.]+)%", text_of(cpu / f"reward_model{suffix}.txt"))
            put(data["stages"], f"reward_model{suffix} agreement", i, agreed and float(agreed[1]) / 100)
        for stage in ("sft", "reward_model"):  # a row: number of examples, then the figures, each with its error
            for count, row in re.findall(r"^ *([\d,]+)  (.*)$", text_of(cpu / f"{stage}_curve.txt"), re.MULTILINE):
                row = re.sub(r" ± [\d.]+", "", row).replace("%", "").split()
                for key, x in zip(dict(sft=("held_out", "excess", "answers", "flawless"),
                                       reward_model=("accuracy", "share_of_bayes", "above_chance"))[stage], row):
                    x = float(x) / (1 if key in ("held_out", "accuracy") else 100)
                    put(data["curves"].setdefault(stage, {}).setdefault(count, {}), key, i, x)
        for path in sorted((Path(folder) / "laws").glob("*")):  # one reward model each
            ladder = [row for row in read_rows(path / "cpu/best_of_n/metrics.jsonl") if row.get("under") == "best of N"]
            found = dict(best=ladder, run=read_rows(path / "cpu/ppo-beta0/metrics.jsonl"))
            data["laws"][path.name] = {key: [[float(f"{row[x]:.4g}") for x in ("kl", "gold")] for row in rows]
                                       for key, rows in found.items()}
        data["variance"] += [[what, float(variance), float(bias) / 100] for what, variance, bias in re.findall(
            r"^(\S.*?) {2,}([\d.]+) +([\d.]+)%", text_of(Path(folder) / "variance.txt"), re.MULTILINE)]
        for name in ("ppo", "ppo-beta0"):
            rows = read_rows(cpu / name / "metrics.jsonl")
            if rows:
                data["runs"].setdefault(name, {})[str(i + 1)] = {
                    key: [float(f"{row[key]:.4g}") for row in rows]
                    for key in ("reward", "gold", "kl", "entropy", "clip_fraction", "value_explained", "length")}
    return data


def put(figures, key, i, x):
    """figures[key][i] = x, rounded; nothing where it was not measured."""
    if x is not None:
        figures.setdefault(key, {})[str(i + 1)] = float(f"{x:.5g}")


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def values(data, name, key):
    """The seeds' figures of a policy, [] if it was not measured."""
    return list(data["policies"].get(name, {}).get(key, {}).values())


def spread(xs, form):
    """Mean ± standard deviation of the seeds: "91.6 ± 2.5 %"; one seed or equal ones: the number alone; none: "-"."""
    if not xs:
        return "-"
    scale, form, unit = (100, form[:-1] + "f", " %") if form.endswith("%") else (1, form, "")
    mean, error = scale * statistics.mean(xs), scale * (statistics.stdev(xs) if len(xs) > 1 else 0)
    return f"{mean:{form}}" + (f" ± {error:{form}}" if error else "") + unit


def table(head, rows):
    """A table in Markdown, of texts."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def policy_rows(data, names, columns):
    """One row for each policy that was measured; columns: (figure, format). Of seconds the least disturbed seed's."""
    return [[label, *(spread([min(xs)] if key == "seconds" and xs else xs, form)
                      for key, form in columns for xs in [values(data, name, key)])]
            for name, label in names.items() if values(data, name, "share_gold")]


def tables(data):
    """{name: table in Markdown}: those of the README, which holds them word for word."""
    stage = lambda key: list(data["stages"].get(key, {}).values())
    ratio = lambda a, b: [x / y for x, y in zip(stage(a), stage(b))]
    shares = [("share_reward", ".1%"), ("share_gold", ".1%"), ("kl", ".2f")]
    optimum = lambda under, key: values(data, f"optimum under {under}", key)
    found = dict(stages=table(["", "measured", "best possible", "share of the best"], [
        ["pretraining, held-out nats a token", spread(stage("gpt held_out"), ".3f"),
         spread(stage("gpt entropy"), ".3f") + " (the entropy)", spread(ratio("gpt entropy", "gpt held_out"), ".1%")],
        ["SFT, held-out nats a response token", spread(stage("sft held_out"), ".3f"),
         spread(stage("sft entropy"), ".3f") + " (the entropy)", spread(ratio("sft entropy", "sft held_out"), ".1%")],
        ["reward model, accuracy without the labels' noise", spread(stage("reward_model expected_accuracy"), ".3f"),
         spread(stage("reward_model bayes_accuracy"), ".3f") + " (Bayes)",
         spread(stage("reward_model share_of_bayes"), ".1%") + "; above chance "
         + spread(stage("reward_model above_chance"), ".1%")]]))
    best = {name: name for name in BEST}
    found["policies"] = table(
        ["", "J's share, reward model", "J's share, gold", "KL, nats", "wins against SFT", "distinct-2"],
        policy_rows(data, {**best, "ppo": "PPO", "dpo": "DPO"}, [*shares, ("win_rate", ".1%"), ("distinct_2", ".2f")])
        + [["the reward model's exact optimum", "100 %", spread(optimum("gold", "left_by_policy"), ".1%"),
            spread(optimum("reward model", "J_star_kl"), ".2f"), "", ""],
           ["gold's exact optimum, J\\*", "", "100 %", spread(optimum("gold", "J_star_kl"), ".2f"), "", ""]])
    collapsed = lambda name: min(values(data, name, "distinct_2")) < 0.8 * min(values(data, "sft", "distinct_2"))
    rows = policy_rows(data, METHODS, [*shares, ("entropy", ".2f"), ("distinct_2", ".2f"), ("seconds", ".0f"),
                                       ("models", ".0f"), ("memory_mb", ".0f")])
    found["methods"] = table(
        ["`ppo.py`", "J's share, reward model", "J's share, gold", "KL, nats", "entropy", "distinct-2", "seconds", "models",
         "MB", "collapsed"],
        [[*row, "yes" if collapsed(name) else "no"] for name in METHODS for row in rows if row[0] == METHODS[name]])
    found["direct"] = table(
        ["", "J's share, gold", "J's share, reward model", "KL, nats", "length", "held-out accuracy", "distinct-2",
         "seconds", "models"],
        policy_rows(data, DIRECT, [shares[1], shares[0], shares[2], ("length", ".0f"), ("held_out_accuracy", ".1%"),
                                   ("distinct_2", ".2f"), ("seconds", ".0f"), ("models", ".0f")]))
    return {**found, **feedback(data), "grid": grid(data), "peers": peers(data), "claims": claims(data), "laws": laws(data),
            "equal_kl": equal_kl(data)}


def feedback(data):
    """Tables of what the feedback is and where it comes from: judges, steps, right or wrong, better text, more of it."""
    stage = lambda key, form: spread(list(data["stages"].get(key, {}).values()), form)
    of = lambda name, key, form: spread(values(data, name, key), form)
    judges = table(["labels by", "the annotator, asked again, agrees", "reward model, share of Bayes accuracy",
                    "DPO, J's share, gold", "KL, nats"], [
        [label, stage(f"reward_model{suffix} agreement", ".1%"), stage(f"reward_model{suffix} share_of_bayes", ".1%"),
         of(f"dpo{suffix}", "share_gold", ".1%"), of(f"dpo{suffix}", "kl", ".2f")] for suffix, label in JUDGES.items()])
    steps = table(["best of 16 by", "J's share, gold", "gold"], [
        [label, of(f"best of 16{rule}", "share_gold", ".1%"), of(f"best of 16{rule}", "gold", ".2f")]
        for rule, label in {"": "the outcome model", ", sum": "the steps' sum", ", smallest": "the smallest step",
                            ", product": "the product of P(good)"}.items()])
    right = table(["", "right", "right, one of 16", "KL, nats", "J", "share of the way to J\\*"], [
        [label, *(of(name, key, form) for key, form in (("verifier_verified", ".1%"), ("verifier_pass_16", ".1%"),
                                                        ("kl", ".2f"), ("verifier_J", ".3f"), ("verifier_share", ".1%")))]
        for name, label in VERIFIED.items() if values(data, name, "verifier_J")]
        + [["the optimum, J\\*", "", "", "", of("sft", "verifier_J_star", ".3f"), "100 %"]])
    better = table(["", "pretraining", "after mid-training"], [
        ["curated text, nats a token", stage("before held_out", ".3f"), stage("gpt-curated held_out", ".3f")],
        ["curated text, above its entropy", stage("before excess", ".1%"), stage("gpt-curated excess", ".1%")],
        ["the old text, nats a token", stage("before old_held_out", ".3f"), stage("gpt-curated old_held_out", ".3f")],
        ["SFT, above its entropy", stage("sft excess", ".1%"), stage("sft-curated excess", ".1%")],
        ["SFT, flawless stories of 200", stage("sft flawless", ".1%"), stage("sft-curated flawless", ".1%")]])
    curve = lambda stage, count, key: spread(list(data["curves"].get(stage, {}).get(count, {}).get(key, {}).values()),
                                             ".1%")
    counts = {int(count.replace(",", "")): count for rows in data["curves"].values() for count in rows}
    curves = table(["examples", "SFT, above the entropy", "flawless stories", "reward model, share of Bayes accuracy"],
                   [[count, curve("sft", count, "excess"), curve("sft", count, "flawless"),
                     curve("reward_model", count, "share_of_bayes")] for _, count in sorted(counts.items())])
    found = dict(judges=judges, steps=steps, right=right, better=better, curves=curves)
    # A table in which more cells than rows are missing has not been measured yet.
    return {name: text for name, text in found.items() if text.count("| - ") < text.count("\n") - 1}


def peers(data):
    """Ours beside other trainers, from the same exported models with the same settings: one seed, errors over prompts."""
    share = lambda x, under: f"{100 * x[f'share_{under}']:.1f} ± {100 * x[f'share_error_{under}']:.1f} %"
    return table(["", "J's share, reward model", "J's share, gold", "KL, nats", "seconds"], [
        [label, share(x, "reward"), share(x, "gold"), f"{x['kl_policy']:.2f}", f"{x.get('seconds', math.nan):.0f}"]
        for name, label in PEERS.items() for x in [data["peers"].get(name)] if x])


def grid_shares(data):
    """{"DPO": {β: [J's share under gold, at β = 0.2, for each learning rate]}, "PPO": ...} of one seed; the default is the
    second learning rate at β = 0.2."""
    share = lambda name: (values(data, name, "share_gold") or [math.nan])[0]
    return {label: {beta: [share(kind if (beta, rate) == ("0.2", rates[1]) else f"{kind}-grid-{beta}-{rate}")
                           for rate in rates] for beta in BETAS} for label, (kind, rates) in GRID.items()}


def grid(data):
    """The table of grid_shares."""
    return table(["learning rate, in units of the default", "¼", "1", "4", "16"], [
        [f"{label}, β = {beta}", *(f"{100 * x:.0f} %" for x in shares)]
        for label, rows in grid_shares(data).items() for beta, shares in rows.items()])


def claims(data):
    """The lecture's claims, each with the command whose output shows it, what came out and the verdict."""
    stage = lambda key, form: spread(list(data["stages"].get(key, {}).values()), form)
    of = lambda name, key, form: spread(values(data, name, key), form)
    run = lambda key, rows: spread([statistics.mean(one[key][rows]) for one in data["runs"]["ppo-beta0"].values()], ".2f")
    pairs = lambda count: spread(list(data["curves"]["reward_model"][count]["share_of_bayes"].values()), ".1%")
    early, late = slice(5, 10), slice(90, 100)
    limits = [data["frontier"][f"reward model {beta:.3f}"] for beta in (0.05, 6.4)]
    greedy, timid = (spread(list(x["kl"].values()), ".2f") for x in limits)
    listed = "`pytest tests/test_enumerable.py -s -k"
    return table(["claim", "where", "command", "what came out", "verdict"], [
        ["the base model continues, it does not answer", "CS 224R ch. 3", "`sft.py`",
         f"{stage('sft base_answers', '.1%')} of 200 held-out requests get a story", "holds"],
        ["SFT closes that gap", "CS 224R ch. 4", "`sft.py`",
         f"{stage('sft answers', '.1%')}; flawless {stage('sft flawless', '.1%')}", "holds"],
        ["only differences of rewards matter", "CS 224R ch. 6", "`pytest -k only_differences`",
         "a constant on all rewards changes neither loss nor gradient", "holds exactly"],
        ["a second epoch overfits the reward model", "ECE 7115", "`reward_model.py --epochs 2`",
         "held-out loss 0.506 after one, 0.494 after two (training 0.468); 94.2 and 95.0 % of Bayes accuracy (seed 1)",
         "not with 10,240 pairs"],
        ["more comparisons, better rewards", "ECE 7115", "`reward_model.py --learning_curve`",
         f"{pairs('256')} of Bayes accuracy with 256, {pairs('10,240')} with 10,240", "holds, still rising"],
        ["without a KL penalty the reward is hacked", "CME 295; ECE 7115", "`ppo.py --beta 1e-6`",
         f"iterations 6-10: score {run('reward', early)}, gold {run('gold', early)}; 91-100: {run('reward', late)}, "
         f"{run('gold', late)}", "holds"],
        ["the penalty holds it", "CS 224R ch. 7", "`ppo.py`",
         f"score {of('ppo', 'reward', '.2f')}, gold {of('ppo', 'gold', '.2f')}", "holds"],
        ["β → 0 is greedy, β → ∞ the reference", "CS 224R ch. 7", "`best_of_n.py`, `frontier`",
         f"π* at β = 0.05 is {greedy} nats from the reference, at 6.4 {timid}", "holds"],
        ["alignment forgets", "CME 295", "`best_of_n.py`",
         f"pretraining loss: base {of('base', 'pretraining', '.2f')}, SFT {of('sft', 'pretraining', '.2f')}, "
         f"PPO {of('ppo', 'pretraining', '.2f')}, DPO {of('dpo', 'pretraining', '.2f')} nats", "SFT does, PPO adds little"],
        ["PPO-ptx mends it", "ECE 7115", "`ppo.py --ptx 0.5`",
         f"{of('ppo-ptx', 'pretraining', '.2f')} nats; J's share under gold {of('ppo-ptx', 'share_gold', '.1%')}, PPO "
         f"{of('ppo', 'share_gold', '.1%')}", "holds"],
        ["a baseline lowers the variance", "ECE 7115", f"{listed} variance`",
         "of the gradient, in units of its squared length: none 42, batch mean 12, V 12, GAE λ = 0.5 7", "holds"],
        ["λ trades bias against variance", "ECE 7115", f"{listed} variance`",
         "with a wrong V: λ = 1 variance 14, bias 0; λ = 0 variance 8, bias 48 %", "holds"],
        ["several epochs on one batch need the ratio, and the clip", "ECE 7115", f"{listed} passes`",
         "8 passes, nats from π*: no ratio 0.43, ratio 2.80, ratio and clip 0.07", "holds"],
        ["four models, three, two in memory", "CME 295; ECE 7115", "`ppo.py --method …`",
         f"PPO {of('ppo', 'models', '.0f')}, {of('ppo', 'memory_mb', '.0f')} MB; GRPO {of('ppo-grpo', 'models', '.0f')}, "
         f"{of('ppo-grpo', 'memory_mb', '.0f')} MB", "holds"],
        ["best-of-N: N times the cost, KL ≤ log N − (N−1)/N", "ECE 7115", f"{listed} exact_law`",
         "the bound, reached where ties are rare", "holds"],
        ["top-K overall favours easy prompts", "ECE 7115", "`best_of_n.py --finetune overall`",
         f"the best 1,024 of 16,384 responses come from {of('rsft-overall', 'kept_prompts', '.0f')} of 1,024 prompts, on "
         f"which SFT's mean reward is {of('rsft-overall', 'kept_prompts_reward', '.2f')}; on all of them "
         f"{of('rsft-overall', 'kept_all_reward', '.2f')}", "holds"],
        ["PPO and DPO share an optimum", "CS 224R ch. 9", f"{listed} \"boltzmann or same_policy\"`",
         "both end within 0.02 nats of π*", "holds"],
        ["PPO ends slightly better", "CME 295; CS 224R ch. 9", "`best_of_n.py`",
         f"gold share: PPO {of('ppo', 'share_gold', '.1%')}, DPO {of('dpo', 'share_gold', '.1%')}; under the reward model "
         f"{of('ppo', 'share_reward', '.1%')}, {of('dpo', 'share_reward', '.1%')}", "under gold a tie"],
        ["DPO is easier to tune", "CS 224R ch. 9", "`dpo.py`, `ppo.py`, `--lr`, `--beta`",
         f"gold share over 4 learning rates and 3 β, best, median, worst: " + "; ".join(
             f"{label} {100 * max(xs):.0f}, {100 * statistics.median(xs):.0f}, {100 * min(xs):.0f} %"
             for label, rows in grid_shares(data).items() for xs in [sum(rows.values(), [])]) + " (seed 1)",
         "not here: at 4 times the learning rate PPO holds, DPO does not"],
        ["DPO is off its distribution, online DPO the cure", "CS 224R ch. 9, 11", "`dpo.py --online 5 --judge annotator`",
         f"gold share: offline {of('dpo', 'share_gold', '.1%')}, online with the annotator's labels "
         f"{of('dpo-online-annotator', 'share_gold', '.1%')}, with the reward model's {of('dpo-online', 'share_gold', '.1%')}",
         "holds, if the labels stay the annotator's"],
        ["SimPO corrects for length", "ECE 7115", "`dpo.py --loss simpo`",
         f"tokens: SFT {of('sft', 'length', '.0f')}, DPO {of('dpo', 'length', '.0f')}, SimPO "
         f"{of('dpo-simpo', 'length', '.0f')}", "it shortens"],
        ["alignment collapses modes", "ECE 7115", "`best_of_n.py`, `ppo.py --beta 1e-6`",
         f"distinct-2: SFT {of('sft', 'distinct_2', '.2f')}, PPO {of('ppo', 'distinct_2', '.2f')}, without the penalty "
         f"{of('ppo-beta0', 'distinct_2', '.2f')}; J* under gold, {of('optimum under gold', 'J_star', '.2f')}, as its own "
         f"samples show it: PPO {of('ppo', 'own_J_star_gold', '.2f')}, without the penalty "
         f"{of('ppo-beta0', 'own_J_star_gold', '.0f')}", "without the penalty only"],
        ["AI preferences align as well as people's", "CS 224R ch. 11", "`reward_model.py --judge constitution`",
         f"the annotator, asked again, agrees with {stage('reward_model-constitution agreement', '.1%')} of them, with "
         f"{stage('reward_model agreement', '.1%')} of its own; gold share of DPO on them "
         f"{of('dpo-constitution', 'share_gold', '.1%')}, on its own {of('dpo', 'share_gold', '.1%')}",
         "not here: noise averages out, principles that err do not"],
        ["one reward at the end is sparse", "CME 295; CS 224R ch. 11",
         "`best_of_n.py --process`, `ppo.py --reward process`",
         f"gold share of best-of-16: outcome model {of('best of 16', 'share_gold', '.1%')}, sum of the steps' "
         f"{of('best of 16, sum', 'share_gold', '.1%')}; gold of PPO on the steps {of('ppo-process', 'gold', '.2f')} at "
         f"{of('ppo-process', 'kl', '.1f')} nats", "dense, and hacked sooner"],
        ["verifiable rewards need no reward model", "CS 224R ch. 11", "`ppo.py --reward verifier`",
         f"right: SFT {of('sft', 'verifier_verified', '.1%')}, PPO {of('ppo-verifier', 'verifier_verified', '.1%')} with 3 "
         f"models, GRPO {of('ppo-verifier-grpo', 'verifier_verified', '.1%')} with 2", "holds"],
        ["DPO's margin runs away, IPO's does not", "CS 224R ch. 10", f"{listed} run_away`",
         "with certain labels DPO's grows on, IPO's stays at 1/(2β)", "holds"]])


FORMS = {  # of the law: gold gained = α rise(d) - β fall(d), with d = √KL
    "d(α − β d)": (lambda d: d, lambda d: d ** 2), "d(α − β log d)": (lambda d: d, lambda d: d * np.log(d)),
    "α(1 − e^−d) − β d": (lambda d: 1 - np.exp(-d), lambda d: d)}


def fit_law(pairs, rise, fall):
    """gold gained = α rise(d) - β fall(d) with d = √KL by least squares, pairs (KL, gold gained): (α, β, R²)."""
    d, y = np.sqrt([kl for kl, _ in pairs]), np.array([gold for _, gold in pairs])
    design = np.stack([rise(d), -fall(d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, y, rcond=None)
    return alpha, beta, 1 - ((y - design @ [alpha, beta]) ** 2).sum() / ((y - y.mean()) ** 2).sum()


def batches(data, name):
    """(KL, gold) of every batch of every seed's run."""
    return [pair for run in data["runs"].get(name, {}).values() for pair in zip(run["kl"], run["gold"])]


def laws(data):
    """Gao, Schulman, Hilton 2023: with d = √KL, gold - gold of SFT = d(α - β d) for best-of-N and d(α - β log d) for RL.
    All FORMS are fitted to both, for every reward model: the means of the seeds, and every batch of their runs."""
    rows = []
    for name, label in LAWS.items():
        if name:
            best, run = (data["laws"].get(name, {}).get(key, []) for key in ("best", "run"))
        else:
            best = [(statistics.mean(x["kl"].values()), statistics.mean(x["gold"].values()))
                    for key, x in data["frontier"].items() if key.startswith("best of ")]
            run = batches(data, "ppo-beta0")
        for policy, pairs in (("best-of-N, N to 64", best), ("PPO without a penalty", run)):
            start = min(best)[1] if best else 0.0  # best of 1: SFT
            pairs = [(kl, gold - start) for kl, gold in pairs if kl > 0.05]
            if len(pairs) > 2:
                rows.append([label, policy, *(f"{x:.2f}" for form in FORMS.values() for x in fit_law(pairs, *form))])
    return table(["reward model", "policy", *(x for form in FORMS for x in (f"{form}: α", "β", "R²"))], rows)


def equal_kl(data):
    """Gold at equal KL, without a penalty and with it: of every seed's run the mean of the batches within ¼ nat."""
    rows = []
    for name, label in (("ppo-beta0", "no penalty"), ("ppo", "β = 0.2")):
        row = []
        for kl in (0.5, 1.0, 1.5, 2.0):
            near = [[gold for x, gold in zip(run["kl"], run["gold"]) if abs(x - kl) <= 0.25]
                    for run in data["runs"].get(name, {}).values()]
            row.append(spread([statistics.mean(golds) for golds in near if golds], ".2f"))
        rows.append([label, *row])
    return table(["gold at a KL of", "0.5", "1", "1.5", "2 nats"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: legible on a phone, on white and on black

GRAY, BLUE, ORANGE, GREEN, RED, PURPLE = "#7d8590", "#3b82f6", "#f08c2e", "#2fa866", "#e5484d", "#a56bd8"


def axes(plt, rows=1, height=4.2):
    """A figure and its axes, one below the other; height of each in inches."""
    figure, found = plt.subplots(rows, 1, figsize=(6.8, height * rows), squeeze=False)
    for ax in found[:, 0]:
        ax.grid(color=GRAY, alpha=0.25)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, found[:, 0]


def save(figure, name):
    """Write a picture beside this file, without a background and without the date: the same figures give the same file."""
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", transparent=True, metadata={"Date": None})


def points(ax, data, field):
    """Every policy's place, the mean of its seeds with their spread, its name in a column on the right. What lies beyond 4
    nats is left out, and said in the caption."""
    found = []
    for names, color in ((METHODS, BLUE), (DIRECT, ORANGE)):
        for name, label in names.items():
            xs, ys = values(data, name, "kl"), values(data, name, field)
            if xs and statistics.mean(xs) <= 4:
                x, y = statistics.mean(xs), statistics.mean(ys)
                x_error, y_error = (statistics.stdev(v) if len(v) > 1 else 0 for v in (xs, ys))
                ax.errorbar(x, y, xerr=x_error, yerr=y_error, color=color, marker="o", markersize=4, linewidth=1)
                found.append((y, x, label, color))
    low, high = min(y for y, *_ in found) - 0.15, ax.get_ylim()[1]
    ax.set_ylim(low, high)
    for k, (y, x, label, color) in enumerate(sorted(found)):
        height = low + (high - low) * (k + 0.5) / len(found)
        ax.annotate(label, (x, y), xytext=(1.04, height), textcoords=("axes fraction", "data"), fontsize=9, color=color,
                    va="center", arrowprops=dict(arrowstyle="-", color=color, linewidth=0.5, alpha=0.5))


def draw_frontier(plt, data):
    """Every method on the frontier that no policy can cross."""
    figure, found = axes(plt, rows=2)
    for ax, field, under in zip(found, ("gold", "reward"), ("gold", "reward model")):
        rows = [x for name, x in data["frontier"].items() if name.startswith(f"{under} ")
                and statistics.mean(x["effective_samples"].values()) >= 20]
        curve = sorted((statistics.mean(x["kl"].values()), statistics.mean(x[field].values()),
                        statistics.pstdev(x[field].values())) for x in rows)
        if curve:
            kl, mean, deviation = map(np.array, zip(*curve))
            ax.plot(kl, mean, color=GRAY, linewidth=2)
            ax.fill_between(kl, mean - deviation, mean + deviation, color=GRAY, alpha=0.3, linewidth=0)
            ax.text(0.02, 0.94, "no policy is above this line", fontsize=10, color=GRAY, transform=ax.transAxes)
        best = [x for name, x in data["frontier"].items() if name.startswith("best of ")]
        if best:
            ax.plot(*zip(*sorted((statistics.mean(x["kl"].values()), statistics.mean(x[field].values())) for x in best)),
                    color=GREEN, marker=".", linewidth=1, label="best of 1, 2, 4, … 64 (KL: its bound)")
        points(ax, data, field)
        ax.set_xlim(1, 4)
        ax.set_xlabel("KL to the reference, nats")
        ax.set_ylabel("gold, the true reward" if field == "gold" else "reward model's score")
        ax.legend(frameon=False, loc="lower left")
    save(figure, "frontier")


def draw_over_optimization(plt, data):
    """Without a penalty the reward goes on rising while gold falls; with it the run stays where both are high."""
    figure, (ax,) = axes(plt)
    for name, style, label in (("ppo-beta0", "-", "no penalty"), ("ppo", "--", "β = 0.2")):
        for i, run in enumerate(data["runs"].get(name, {}).values()):
            d = np.sqrt(np.maximum(run["kl"], 0))
            for field, color in (("reward", ORANGE), ("gold", BLUE)):
                ax.plot(d, run[field], style, color=color, linewidth=1, label="_" * bool(i) + f"{field}, {label}")
    found, start = batches(data, "ppo-beta0"), data["frontier"].get("best of 1", {}).get("gold", {})
    if found and start:
        start = statistics.mean(start.values())
        pairs = [(kl, gold - start) for kl, gold in found if kl > 0.05]
        d = np.linspace(0.3, np.sqrt(max(kl for kl, _ in found)), 100)
        for (label, (rise, fall)), style in zip(FORMS.items(), (":", "-.", "-")):
            alpha, beta, _ = fit_law(pairs, rise, fall)
            ax.plot(d, start + alpha * rise(d) - beta * fall(d), style, color=GRAY, linewidth=1.2, label=f"fitted: {label}")
    ax.set_xlabel("d = √KL to the reference")
    ax.set_ylabel("score")
    ax.legend(frameon=False)
    save(figure, "over_optimization")


def draw_how_close(plt, data):
    """How much of the way from SFT to the optimum each policy goes, under gold and under the reward model."""
    names = {**{name: name for name in BEST}, **METHODS, **DIRECT}
    names = {name: label for name, label in names.items() if values(data, name, "share_gold")}
    figure, (ax,) = axes(plt, height=0.36 * len(names) + 1)
    for offset, field, color in ((-0.2, "share_reward", ORANGE), (0.2, "share_gold", BLUE)):
        for i, name in enumerate(names):
            xs = [100 * x for x in values(data, name, field)]
            ax.barh(i + offset, statistics.mean(xs), height=0.36, color=color,
                    xerr=statistics.stdev(xs) if len(xs) > 1 else None, ecolor=GRAY,
                    label=dict(share_reward="under the reward model", share_gold="under gold")[field] if i == 0 else None)
    ax.set_yticks(range(len(names)), names.values())
    ax.invert_yaxis()
    ax.set_xlim(right=105)
    ax.set_xlabel("% of the way from SFT to J*")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=2)
    save(figure, "how_close")


def draw_one_run(plt, data):
    """What a healthy PPO run looks like."""
    runs = data["runs"].get("ppo", {})
    figure, found = axes(plt, rows=3, height=2.4)
    for ax, fields in zip(found, (("reward", "gold", "kl"), ("entropy", "value_explained"), ("clip_fraction",))):
        for field, color in zip(fields, (ORANGE, BLUE, GREEN)):
            for seed, run in runs.items():
                ax.plot(range(1, len(run[field]) + 1), run[field], color=color, linewidth=1, alpha=0.8,
                        label=field.replace("_", " ") if seed == min(runs) else None)
        ax.legend(frameon=False)
    found[-1].set_xlabel("iteration")
    save(figure, "one_run")


def draw_learning_curves(plt, data):
    """How far from the best SFT and the reward model are, by the number of examples."""
    figure, (ax,) = axes(plt)
    for stage, key, color, label in (("sft", "excess", BLUE, "SFT: loss above the entropy"),
                                     ("reward_model", "share_of_bayes", ORANGE, "reward model: accuracy below Bayes'")):
        found = sorted((int(count.replace(",", "")), [100 * (x if stage == "sft" else 1 - x) for x in row[key].values()])
                       for count, row in data["curves"].get(stage, {}).items())
        if found:
            counts, xs = zip(*found)
            error = [statistics.stdev(x) if len(x) > 1 else 0 for x in xs]
            ax.errorbar(counts, list(map(statistics.mean, xs)), yerr=error, color=color, marker="o", markersize=4,
                        label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks([2 ** k for k in range(8, 15)], [f"{2 ** k:,}" for k in range(8, 15)])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("demonstrations, or comparisons")
    ax.set_ylabel("% from the best possible")
    ax.legend(frameon=False)
    save(figure, "learning_curves")


def draw_variance(plt, data):
    """What a baseline, a value model and λ do to the variance of the gradient, and the bias that a wrong V is paid with."""
    rows = data["variance"]
    figure, (ax,) = axes(plt, height=0.36 * max(1, len(rows)) + 1)
    for i, (what, variance, bias) in enumerate(rows):
        ax.barh(i, variance, color=BLUE if bias < 0.02 else ORANGE, height=0.6)
        ax.annotate(f"bias {bias:.0%}" if bias >= 0.02 else "", (variance, i), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=9, color=ORANGE)
    ax.set_yticks(range(len(rows)), [what for what, *_ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("variance of one response's gradient, in units of |∇J|²")
    save(figure, "variance")


def draw(data):
    """Draw all pictures; without matplotlib one line says how to get it."""
    try:
        import matplotlib
    except ImportError:
        return print("the pictures need matplotlib: pip install matplotlib", file=sys.stderr)
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "text.color": GRAY, "axes.labelcolor": GRAY, "xtick.color": GRAY,
                         "ytick.color": GRAY, "svg.hashsalt": "rlhf", "legend.fontsize": 9})
    for picture in (draw_frontier, draw_over_optimization, draw_how_close, draw_one_run, draw_learning_curves,
                    draw_variance):
        picture(plt, data)


def main(folders):
    path = HERE / "figures.json"
    if folders:
        path.write_text(json.dumps(collect(folders), indent=0, sort_keys=True) + "\n")
    data = json.loads(path.read_text())
    draw(data)
    for name, text in tables(data).items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
