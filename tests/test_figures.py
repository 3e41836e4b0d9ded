"""assets/figures.py, and the README against the figures that it was written from."""

import builtins
import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

from data.files import write_jsonl

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "assets/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_was_measured(figures):
    """A table that was typed, or left behind when the figures were made anew."""
    readme, data = (ROOT / "README.md").read_text(), json.loads((ROOT / "assets/figures.json").read_text())
    for name, table in figures.tables(data).items():
        assert table in readme, f"the table {name} of assets/figures.json is not in README.md"


def test_every_picture_is_there(figures):
    """A link to a picture that nobody has drawn, or a picture of older figures' names."""
    readme = (ROOT / "README.md").read_text()
    drawn = {path.name for path in (ROOT / "assets").glob("*.svg")}
    assert drawn and all(f"(assets/{name})" in readme for name in drawn)
    assert all((ROOT / part.split(")")[0]).exists() for part in readme.split("](")[1:] if part.startswith("assets/"))


def test_what_the_readme_names_is_there():
    """A function that was renamed, a test that moved: a row of the lecture's table that leads nowhere."""
    readme, tests = (ROOT / "README.md").read_text(), "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    modules = {name: importlib.import_module(name) for name in ("gpt", "sft", "reward_model", "ppo", "dpo", "best_of_n")}
    modules.update({name: importlib.import_module(f"data.{name}") for name in ("annotator", "stories")})
    named = re.findall(r"`(\w+)\.([A-Za-z_]\w*)`", readme)
    missing = [f"{module}.{name}" for module, name in named
               if module in modules and name != "py" and not hasattr(modules[module], name)]
    missing += [name for name in re.findall(r"`(test_\w+)`", readme) if f"def {name}(" not in tests]
    assert not missing and sum(module in modules and name != "py" for module, name in named) > 30


def test_spreads(figures):
    """A population's deviation for a sample's, percent taken twice, "± 0.0" of a single seed."""
    assert figures.spread([0.9, 0.92, 0.97], ".1%") == f"93.0 ± {100 * statistics.stdev([0.9, 0.92, 0.97]):.1f} %"
    assert figures.spread([1.5], ".2f") == "1.50" and figures.spread([4, 4, 4], ".0f") == "4"
    assert figures.spread([], ".1f") == "-"


def test_collect_keeps_seeds_and_policies_apart(figures, tmp_path):
    """One seed's figure beside another's, the share under gold in the column of the reward model, the first rows of a run
    for its last."""
    for seed in (1, 2):
        cpu = tmp_path / f"seed{seed}/cpu"
        for name in ("gpt", "ppo", "best_of_n-1"):
            (cpu / name).mkdir(parents=True)
        write_jsonl(cpu / "gpt/metrics.jsonl", [dict(step=1, held_out=2.0), dict(step=2, held_out=1.0 + seed, entropy=0.5)])
        keys = ("reward", "gold", "kl", "clip_fraction", "value_explained", "length")
        write_jsonl(cpu / "ppo/metrics.jsonl", [dict(step=i, entropy=i + seed, seconds=i, **dict.fromkeys(keys, i))
                                                for i in range(1, 21)])
        row = dict(policy="ppo", reward=seed, gold=2, win_rate=0.6, kl=0.25 * seed, length=9, distinct_2=0.5, ended=1)
        optimum = dict(J_star=1.0, J_star_kl=2.0, left_by_policy=0.7)
        write_jsonl(cpu / "best_of_n-1/metrics.jsonl", [
            row, *(dict(under=under, policy=name, share=share / seed, **optimum) for name, under, share in (
                ("sft", "gold", 0), ("ppo", "gold", 0.5), ("sft", "reward model", 0), ("ppo", "reward model", 0.9))),
            dict(under="gold", policy="frontier", beta=0.1, kl=3 + seed, reward=1, gold=2, effective_samples=50)])
        (cpu / "ppo.txt").write_text("models in memory: 4 (policy, …), 38 MB with gradients")
    data = figures.collect([tmp_path / "seed1", tmp_path / "seed2"])
    ppo = {name: list(by_seed.values()) for name, by_seed in data["policies"]["ppo"].items()}
    assert ppo["share_gold"] == [0.5, 0.25] and ppo["share_reward"] == [0.9, 0.45] and ppo["kl"] == [0.25, 0.5]
    assert ppo["entropy"] == [16.5, 17.5] and ppo["seconds"] == [20, 20] and ppo["models"] == [4, 4]
    assert data["stages"]["gpt held_out"] == {"1": 2.0, "2": 3.0}
    assert list(data["frontier"].values()) == [dict(kl={"1": 4, "2": 5}, reward={"1": 1, "2": 1}, gold={"1": 2, "2": 2},
                                                    effective_samples={"1": 50, "2": 50})]
    assert data["runs"]["ppo"]["2"]["kl"] == list(range(1, 21))
    columns = [("share_reward", ".1%"), ("share_gold", ".1%"), ("seconds", ".0f")]
    assert figures.policy_rows(data, figures.METHODS, columns) == [["PPO", "67.5 ± 31.8 %", "37.5 ± 17.7 %", "20"]]


def test_collect_reads_what_was_printed(figures, tmp_path):
    """An error taken for the next figure, a share in per cent beside one of 1, a line of the description for a row."""
    cpu = tmp_path / "cpu"
    (cpu / "gpt-curated").mkdir(parents=True)
    write_jsonl(cpu / "gpt-curated/metrics.jsonl", [dict(step=0, held_out=0.9, old_held_out=0.7, excess=0.2),
                                                    dict(step=9, held_out=0.6, old_held_out=0.8, excess=0.1)])
    (cpu / "sft_curve.txt").write_text(
        "data    1,024 demonstrations\ndemonstrations  held out, nats a token  excess  answers with a story  with a flawless one"
        "\n           512                   0.642   18.2%          97.5 ± 1.1 %          70.0 ± 3.2 %\n")
    (cpu / "reward_model_curve.txt").write_text(
        "pairs   pairs.jsonl\n        10,240 pairs, dropped 0\n   pairs  held-out accuracy  share of Bayes accuracy  above chance"
        "\n  10,240      0.752 ± 0.007           94.8% ± 0.5%  86.0% ± 1.5%\n")
    (cpu / "reward_model-both.txt").write_text("judge   the annotator agrees with 71.5% ± 0.2% of the labels; at best 79.5%\n")
    (tmp_path / "variance.txt").write_text("in units of |∇J|²  variance    bias\n- mean of the 7 others          16.7    2.5%       "
                                           "16.7   bias ± 3.7%: sampled\n1 passed in 9.00s\n")
    data = figures.collect([tmp_path])
    assert data["curves"] == {
        "sft": {"512": dict(held_out={"1": 0.642}, excess={"1": 0.182}, answers={"1": 0.975}, flawless={"1": 0.7})},
        "reward_model": {"10,240": dict(accuracy={"1": 0.752}, share_of_bayes={"1": 0.948}, above_chance={"1": 0.86})}}
    assert data["stages"]["reward_model-both agreement"] == {"1": 0.715} and data["stages"]["before held_out"] == {"1": 0.9}
    assert data["stages"]["gpt-curated old_held_out"] == {"1": 0.8}
    assert data["variance"] == [["- mean of the 7 others", 16.7, 0.025]]


def test_the_laws_are_found_again(figures):
    """α and β exchanged, KL taken for its root, a natural logarithm for another: points that follow the laws exactly."""
    best = lambda d: 1.0 + d * (1.5 - 0.4 * d)
    ladder = {f"best of {n}": dict(kl={"1": d * d}, gold={"1": best(d)}) for n, d in ((1, 0.0), (2, 0.3), (4, 1.0), (8, 5.0))}
    d = [0.5, 1.0, 2.0, 3.0, 5.0]
    run = dict(kl=[x * x for x in d], gold=[1.0 + x * (0.8 - 0.2 * math.log(x)) for x in d])
    small = dict(best=[[0.0, 2.0]] + [[x * x, 2.0 + 2 * x] for x in d], run=[])
    data = dict(frontier=ladder, runs={"ppo-beta0": {"1": run}}, laws={"256": small})
    rows = [line.strip("| ").split(" | ") for line in figures.laws(data).splitlines()[2:]]
    assert rows[0][2:5] == ["1.50", "0.40", "1.00"] and rows[0][7] != "1.00"
    assert rows[1][5:8] == ["0.80", "0.20", "1.00"] and rows[1][4] != "1.00"
    assert rows[2][:2] == ["256 comparisons", "best-of-N, N to 64"] and rows[2][2] == rows[2][5] == "2.00" and len(rows) == 3
    alpha, beta, fit = figures.fit_law([(x * x, 3 * (1 - math.exp(-x)) - 0.2 * x) for x in d], *list(figures.FORMS.values())[2])
    assert (alpha, beta, fit) == pytest.approx((3, 0.2, 1))


def test_gold_at_equal_kl(figures):
    """Gold of another batch than the one with that KL; a seed that never came there counted as 0."""
    runs = {"ppo-beta0": {"1": dict(kl=[0.4, 0.6, 1.1, 9.0], gold=[1.0, 3.0, 5.0, 7.0])},
            "ppo": {"1": dict(kl=[0.5, 2.0], gold=[1.0, 2.0]), "2": dict(kl=[0.5], gold=[2.0])}}
    assert figures.equal_kl(dict(runs=runs)).splitlines()[2:] == [
        "| no penalty | 2.00 | 5.00 | - | - |", "| β = 0.2 | 1.50 ± 0.71 | - | - | 2.00 |"]


def test_without_matplotlib(figures, monkeypatch, capsys):
    """A traceback for a package that nothing else needs."""
    plain = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    figures.draw({})
    assert capsys.readouterr().err == "the pictures need matplotlib: pip install matplotlib\n"
