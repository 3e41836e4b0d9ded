"""assets/figures.py, and the READMEs against the figures, names and flags that they mention."""

import importlib.util
import json
import math
import re
import sys
import typing
from pathlib import Path

import pytest

from data.files import write_jsonl

ROOT = Path(__file__).parent.parent
READMES = [ROOT / name for name in
           ("README.md", "assets/README.md", "tests/README.md", "data/README.md")]
SCRIPTS = ("gpt", "sft", "reward_model", "ppo", "dpo", "best_of_n")


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "assets/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of_all():
    """The text of all READMEs."""
    return "\n".join(path.read_text() for path in READMES)


def modules():
    """{name as the READMEs have it: module}: the scripts and the files of data/."""
    found = {name: importlib.import_module(name) for name in SCRIPTS}
    for path in (ROOT / "data").glob("*.py"):
        found[path.stem] = importlib.import_module(f"data.{path.stem}")
    return found


def test_the_readmes_say_what_was_measured(figures):
    """A table that was typed, or left behind when the figures were measured again."""
    text = text_of_all()
    tables = figures.tables(json.loads((ROOT / "assets/figures.json").read_text()))
    for name, table in tables.items():
        assert text.count(f"<!-- table: {name} -->\n{table}\n\n") == 1, f"the table {name}"
    assert text.count("<!-- table: ") == len(tables) + text.count("`<!-- table: ")


def test_only_the_table_below_its_mark_is_replaced(figures, tmp_path):
    """Another table, or the text behind it, overwritten; a README without the mark touched."""
    old = "a\n<!-- table: x -->\n| 1 |\n| 2 |\n\n| kept |\n<!-- table: y -->\n\nb\n"
    readme = tmp_path / "README.md"
    other = tmp_path / "other.md"
    readme.write_text(old)
    other.write_text("| 1 |\n")
    figures.write_tables({"x": "| 3 |", "y": "| 4 |\n| 5 |"}, [readme, other, tmp_path / "none.md"])
    assert readme.read_text() == ("a\n<!-- table: x -->\n| 3 |\n\n| kept |\n"
                                  "<!-- table: y -->\n| 4 |\n| 5 |\n\nb\n")
    assert other.read_text() == "| 1 |\n"


def test_every_link_leads_somewhere():
    """A link to a picture that was never drawn, to a file that moved, to a heading of another name;
    a picture that is shown nowhere."""
    shown = set()
    for path in READMES:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            assert linked.exists(), f"{path}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                           for heading in headings]  # as GitHub makes them
                assert anchor in anchors, f"{path}: {target}"
            shown.add(linked)
    pictures = set((ROOT / "assets").resolve().glob("*.svg"))
    assert pictures and pictures <= shown


def test_what_the_readmes_name_exists():
    """A function that was renamed, a test or a file that moved: a row of the lecture's table that
    leads nowhere."""
    text = text_of_all()
    found = modules()
    named = [(module, name) for module, name in re.findall(r"`(\w+)\.([A-Za-z_]\w*)`", text)
             if module in found and name not in ("py", "json")]
    assert [pair for pair in named if not hasattr(found[pair[0]], pair[1])] == []

    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named_tests = re.findall(r"`(test_\w+)`", text)
    assert [name for name in named_tests if f"def {name}(" not in tests] == []
    assert len(named) > 60 and len(named_tests) > 15

    for path in READMES:
        for name in re.findall(r"`([\w/]+\.py)\b", path.read_text()):
            assert (path.parent / name).exists() or (ROOT / name).exists(), f"{path}: {name}"


def test_the_flags_of_all_commands_exist():
    """A flag that was renamed, a method that has another name: a command that is refused."""
    found = modules()
    flags = {}  # {script: {flag: its values, () where it takes any}}
    for name in (*SCRIPTS, "huggingface"):
        kinds = typing.get_type_hints(found[name].Config)
        flags[name] = {flag: typing.get_args(kind) for flag, kind in kinds.items()}
    wrong = []
    checked = 0

    peers = sorted((ROOT / "assets/peers").glob("*.py"))
    for path in [*READMES, ROOT / "assets/experiments.sh", *peers]:
        text = path.read_text().replace("\\\n", " ")
        for script, arguments in re.findall(r"\b(\w+)(?:\.py| load| export) ([^`\n#>]*)", text):
            if script not in flags:
                continue
            for flag, value in re.findall(r"--(\w+)(?: ([\w.-]+))?", arguments):
                values = flags[script].get(flag)
                if values is None or values and value and value not in values:
                    wrong.append(f"{path.name}: {script} --{flag} {value}")
                checked += 1

    every = {"help"}.union(*flags.values())
    alone = re.findall(r"`--(\w+)", text_of_all())  # beside no script
    assert wrong + sorted(set(alone) - every) == [] and checked > 150


def test_the_first_readme_stays_readable():
    """A page that grows until its reader no longer finds the way, or folds half of it away."""
    text = READMES[0].read_text()
    assert len(text.splitlines()) <= 280 and "<details" not in text
    for path in READMES:
        prose = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
        for line in prose.splitlines():
            assert len(line) <= 120 or line.startswith(("|", "!", ">")), f"{path}: {line}"


def test_collect_keeps_seeds_and_policies_apart(figures, tmp_path):
    """One seed's figure beside another's, the share under gold in the column of the reward model,
    the first rows of a run for its last; a population's deviation for a sample's."""
    keys = ("reward", "gold", "kl", "clip_fraction", "value_explained", "length")
    for seed in (1, 2):
        rows = {"gpt": [dict(held_out=2.0), dict(held_out=1.0 + seed)], "ppo": []}
        for i in range(1, 21):
            rows["ppo"].append(dict(entropy=i + seed, seconds=i, **dict.fromkeys(keys, i)))
        yard = [dict(policy="ppo", reward=seed, gold=2, win_rate=0.6, kl=0.25 * seed, length=9,
                     distinct_2=0.5, ended=1)]
        for name, under, share in (("sft", "gold", 0), ("ppo", "gold", 0.5),
                                   ("sft", "reward model", 0), ("ppo", "reward model", 0.9)):
            yard.append(dict(under=under, policy=name, share=share / seed, J_star=1, J_star_kl=2,
                             left_by_policy=0.7))
        yard.append(dict(under="gold", policy="frontier", beta=0.1, kl=3 + seed, reward=1, gold=2,
                         effective_samples=50))
        rows.update({"best_of_n-1-pipeline": yard, "best_of_n-orders": yard})
        for name in rows:
            path = tmp_path / f"seed{seed}/cpu/{name}/metrics.jsonl"
            path.parent.mkdir(parents=True)
            write_jsonl(path, rows[name])

    data = figures.collect([tmp_path / "seed1", tmp_path / "seed2"])
    ppo = {name: list(by_seed.values()) for name, by_seed in data["policies"]["ppo"].items()}
    assert ppo["share_gold"] == [0.5, 0.25] and ppo["share_reward"] == [0.9, 0.45]
    assert ppo["kl"] == [0.25, 0.5] and ppo["entropy"] == [16.5, 17.5]
    for group in ("pipeline", "orders"):
        assert data[group]["ppo"]["share_gold"] == {"1": 0.5, "2": 0.25}
    assert data["stages"]["gpt held_out"] == {"1": 2.0, "2": 3.0}
    assert next(iter(data["frontier"].values()))["kl"] == {"1": 4, "2": 5}
    assert data["runs"]["ppo"]["2"]["kl"] == list(range(1, 21))
    columns = [("share_reward", ".1%"), ("share_gold", ".1%"), ("seconds", ".0f")]
    rows = figures.policy_rows(data, figures.METHODS, columns)
    assert rows == [["PPO", "67.5 ± 31.8 %", "37.5 ± 17.7 %", "20"]]


def test_collect_reads_what_was_printed(figures, tmp_path):
    """An error taken for the next figure, a share in per cent beside one of 1, a line of the
    description for a row."""
    cpu = tmp_path / "cpu"
    cpu.mkdir()
    (cpu / "sft_curve.txt").write_text(
        "data    1,024 demonstrations\n"
        "demonstrations  held out, nats a token  excess  with a story  with a flawless one\n"
        "           512                   0.642   18.2%  97.5 ± 1.1 %         70.0 ± 3.2 %\n")
    (cpu / "reward_model_curve.txt").write_text(
        "pairs   pairs.jsonl\n        10,240 pairs, dropped 0\n"
        "  10,240      0.752 ± 0.007           94.8% ± 0.5%  86.0% ± 1.5%\n")
    (cpu / "reward_model-both.txt").write_text(
        "judge   the annotator agrees with 71.5% ± 0.2% of the labels; at best 79.5%\n")
    (cpu / "ppo.txt").write_text("models in memory: 4 (policy, …), 38 MB with gradients")
    (tmp_path / "variance.txt").write_text(
        "in units of |∇J|²  variance    bias\n"
        "- mean of the 7 others          16.7    2.5%       16.7   bias ± 3.7%: sampled\n"
        "1 passed in 9.00s\n")
    data = figures.collect([tmp_path])
    assert data["curves"] == {
        "sft": {"512": dict(held_out={"1": 0.642}, excess={"1": 0.182}, answers={"1": 0.975},
                            flawless={"1": 0.7})},
        "reward_model": {"10,240": dict(accuracy={"1": 0.752}, share_of_bayes={"1": 0.948},
                                        above_chance={"1": 0.86})}}
    assert data["stages"] == {"reward_model-both agreement": {"1": 0.715}}
    assert data["policies"]["ppo"] == {"models": {"1": 4}, "memory_mb": {"1": 38}}
    assert data["variance"] == [["- mean of the 7 others", 16.7, 0.025]]


def test_the_laws_are_found_again(figures):
    """α and β exchanged, KL taken for its root, a natural logarithm for another: points that follow
    the laws exactly."""
    ladder = {}
    for n, d in ((1, 0.0), (2, 0.3), (4, 1.0), (8, 5.0)):
        ladder[f"best of {n}"] = dict(kl={"1": d * d}, gold={"1": 1.0 + d * (1.5 - 0.4 * d)})
    ds = [0.5, 1.0, 2.0, 3.0, 5.0]
    run = dict(kl=[d * d for d in ds], gold=[1.0 + d * (0.8 - 0.2 * math.log(d)) for d in ds])
    small = dict(best=[[0.0, 2.0]] + [[d * d, 2.0 + 2 * d] for d in ds], run=[])
    data = dict(frontier=ladder, runs={"ppo-beta0": {"1": run}}, laws={"256": small})

    rows = [line.strip("| ").split(" | ") for line in figures.laws(data).splitlines()[2:]]
    assert rows[0][2:5] == ["1.50", "0.40", "1.00"] and rows[0][7] != "1.00"
    assert rows[1][5:8] == ["0.80", "0.20", "1.00"] and rows[1][4] != "1.00"
    assert rows[2][:2] == ["256 comparisons", "best-of-N, N to 64"]
    assert rows[2][2] == rows[2][5] == "2.00" and len(rows) == 3

    pairs = [(d * d, 3 * (1 - math.exp(-d)) - 0.2 * d) for d in ds]
    assert figures.fit_law(pairs, *list(figures.FORMS.values())[2]) == pytest.approx((3, 0.2, 1))


def test_gold_at_equal_kl(figures):
    """Gold of another batch than the one with that KL; a seed that never got there counted as 0."""
    runs = {"ppo-beta0": {"1": dict(kl=[0.4, 0.6, 1.1, 9.0], gold=[1.0, 3.0, 5.0, 7.0])},
            "ppo": {"1": dict(kl=[0.5, 2.0], gold=[1.0, 2.0]), "2": dict(kl=[0.5], gold=[2.0])}}
    assert figures.equal_kl(dict(runs=runs)).splitlines()[2:] == [
        "| no penalty | 2.00 | 5.00 | - | - |", "| β = 0.2 | 1.50 ± 0.71 | - | - | 2.00 |"]


@pytest.fixture
def run(tmp_path):
    """A folder with what two steps of PPO, and what came before them, have written."""
    rows = [dict(step=0, round=1, kl=9), dict(step=1, reward=0.5, gold=None, kl=0),
            dict(step=2, reward=1, gold=2, kl=0.5, entropy=0.6), dict(policy="sft", entropy=1)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    return tmp_path


def test_what_is_drawn_of_a_run(figures, run, monkeypatch, capsys):
    """A figure at another's steps, a curve of one point, a number that was not measured as 0; a
    traceback for a package that nothing else needs."""
    assert figures.curves_of(run / "metrics.jsonl") == [
        {"reward": ([1, 2], [0.5, 1])}, {"kl": ([0, 1, 2], [9, 0, 0.5])}]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # import raises ImportError
        figures.draw({})
        with pytest.raises(SystemExit):
            figures.draw_run(run)
    assert capsys.readouterr().err == 2 * "the pictures need matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("content, message", [
    (None, "does not exist; name the folder of a run"), ("{}\n{", "not a metrics.jsonl"),
    ("[1]\n", "no two steps"), ('{"policy": "sft", "kl": 1}\n' * 2, "no two steps")])
def test_what_is_no_run_is_one_line(figures, tmp_path, monkeypatch, content, message):
    """A traceback for a wrong folder, or an empty picture of a file that has nothing to draw; hours
    of work, figures.json, overwritten by nothing because of a typing error."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=message) as stopped:
        figures.main(["--run", str(tmp_path)])
    assert "\n" not in stopped.value.code and not (tmp_path / "metrics.svg").exists()

    monkeypatch.setattr(figures, "collect", None)  # is not called
    for arguments in ([str(tmp_path / "seed9")], ["--runs", "out"], ["--run"], ["--run", "a", "b"]):
        with pytest.raises(SystemExit):
            figures.main(arguments)
