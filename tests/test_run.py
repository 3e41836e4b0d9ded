"""What every stage shares: command line, screen, a run's folder, files. How runs are killed:
tests/test_resume.py."""

import importlib
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import gpt
from data import files, run
from data.files import InputError
from data.run import (Run, SilentRun, memory_mapped, parse_config, refused_if_broken,
                      train_missing, write_torch)
from helpers import metrics, untimed

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gpt", "sft", "reward_model", "ppo", "dpo", "best_of_n")

# --------------------------------------------------------------------------------------------------
# The command line


def test_a_run_on_a_system_without_file_locks(tmp_path, monkeypatch, capsys):
    """An import of fcntl or resource that ends every script on Windows, which has neither; a run
    that isn't finished there, or doesn't say that nothing keeps a second one from the folder."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "tests/bench.py"]:
        runpy.run_path(str(path))
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(run, "resource", None)
    with Run("gpt", tmp_path, gpt.Config(), 3) as one:
        for step in one.steps(3):
            one.log(step, loss=1.0)
        one.finish()
    no_locks = f"{tmp_path}: this system locks no files; start no second run in this folder\n"
    assert no_locks in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "metrics.jsonl")] == [3]


def parse(*argv, name="gpt"):
    module = importlib.import_module(name)
    return parse_config(module.Config, module.GPU, list(argv), "")


@pytest.mark.parametrize("argv", ["--see 3", "--seed three", "--size GPU", "--lr=nan"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_command_line_is_one_line(name, argv, monkeypatch, capsys):
    """An abbreviation that is taken for another flag when one is added; a screenful of usage, or a
    traceback; a --size GPU that makes the default without a word."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: ") and error.count("\n") == 1
    assert argv[:4] in error and ("GPU" not in argv or "auto" in error)


def test_defaults_sizes_and_flags():
    """--size gpu that wins over what the user typed, or that changes nothing; a flag equal to the
    default is lost; 0 refused where it means something."""
    assert parse("--size", "cpu") == gpt.Config(size="cpu")
    assert parse("--size", "gpu") == gpt.Config(**{"size": "gpu", **gpt.GPU})
    assert gpt.GPU["n_layer"] != gpt.Config.n_layer
    typed = parse(*f"--size gpu --n_embd 64 --n_layer {gpt.Config.n_layer} --text a.txt".split())
    changed = dict(size="gpu", n_embd=64, n_layer=gpt.Config.n_layer, text="a.txt")
    assert typed == gpt.Config(**{**gpt.GPU, **changed})
    assert parse().size == ("gpu" if torch.cuda.is_available() else "cpu")
    assert parse("--beta", "0", name="ppo").beta == 0 == parse("--seed", "0").seed


@dataclass
class Choices:
    # what the flags of a stage may be
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    kind: Literal["plain", "fast", "odd"] = "plain"     # changes some of the defaults below
    text: str = ""      # a flag that is set or not

    # a heading that is no help
    rate: float = 0.5   # a rate,
                        # 10 % of something
    width: int = 3      # a width
    count: int = 0      # a number; 0: none
    depth: int = 2      # only with a count
    goal: Literal["near", "far"] = "near"   # changed by a kind
    speed: int = 1      # only on the way to what is near


def choose(argv):
    needs = {"width": ("text",), "depth": ("count",), "speed": ("goal", "near")}
    presets = {"kind": {"fast": dict(rate=2.0, width=7), "odd": dict(width=9, goal="far")}}
    return parse_config(Choices, dict(width=64, rate=0.1), argv.split(), "", needs, presets)


def test_presets_and_flags_that_would_be_ignored(capsys):
    """A preset that wins over what was typed, loses to --size gpu, leaks into another value, or is
    not in --help; --count 0 that counts as given; a preset of the other flag's, not counted."""
    def found(argv):
        config = choose(argv)
        return config.rate, config.width

    assert found("--size cpu") == (0.5, 3) and found("--size cpu --kind fast") == (2.0, 7)
    assert found("--size gpu") == (0.1, 64) and found("--size gpu --kind fast") == (2.0, 7)
    assert found("--size cpu --kind odd") == (0.5, 9) and found("--size gpu --kind odd") == (0.1, 9)
    assert found("--size cpu --kind fast --rate 0.5 --text a --width 3") == (0.5, 3)
    with pytest.raises(SystemExit):
        choose("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "a rate, 10 % of something (default: 0.5; gpu: 0.1; fast: 2.0)" in text
    assert "a width (default: 3; gpu: 64; fast: 7; odd: 9)" in text

    assert choose("--depth 5 --count 2").given == ("count", "depth")
    assert choose("--speed 2 --kind odd --goal near").speed == 2
    for argv, message in (("--count 0 --depth 5", "--depth 5: goes with --count only"),
                          ("--speed 2 --kind odd", "--speed 2: goes with --goal near only")):
        with pytest.raises(InputError, match=f"^{message}$"):
            choose(argv)


NUMBER = "must be a number, and not negative$"
GREEDY = "must be at least 0.0001; --top_k 1 is greedy$"
NOTHING = "must be positive; with 0 nothing is learnt$"


@pytest.mark.parametrize("name, argv, message", [
    ("gpt", "--report 0", "must be positive$"), ("gpt", "--lr=nan", NUMBER),
    ("ppo", "--beta -1", NUMBER), ("gpt", "--lr 0", NOTHING),
    ("ppo", "--clip 0", NOTHING), ("ppo", "--value_clip 0", NOTHING),
    ("gpt", "--temperature 0 --sample Once", GREEDY), ("ppo", "--temperature 1e-39", GREEDY),
    ("ppo", "--data=", "is empty; leave the flag out or give it a value$"),
    ("sft", "--temperature 1", "goes with --prompt only$"),
    ("reward_model", "--judge both --data x", "compares nothing where --data has the pairs"),
    ("reward_model", "--process --data x", "cannot be used with --data"),
    ("best_of_n", "--rounds 2", "goes with --finetune per_prompt or overall only$"),
    ("best_of_n", "--policies ppo,foo", "must be ppo or dpo, or the --name"),
    ("best_of_n", "--beta 0", "must be positive"), ("best_of_n", "--n 4", "goes with --prompt or "),
    ("best_of_n", "--finetune overall --prompt x", "rsft-overall is not trained yet; without --pr"),
    ("best_of_n", "--name sft --finetune overall", "must be rsft")])
def test_impossible_values_are_refused(name, argv, message, tmp_path, monkeypatch):
    """--report 0 divides by zero after an hour, --lr nan makes every weight nan; --data $FILE with
    FILE unset trains on the little world; a flag that changes nothing; a stage overwritten."""
    module = importlib.import_module(name)
    for step in ("train", "train_missing"):
        monkeypatch.setattr(module, step, lambda *arguments: pytest.fail("trains"), raising=False)
    flag = argv.replace("=", " ").split()[0]
    with pytest.raises(InputError, match=rf"^{flag}( \S+)?: {message}") as error:
        module.main(["--size", "cpu", "--out", str(tmp_path), *argv.split()])
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Stages that are missing


def trained(out, *names, **values):
    """Put a checkpoint, which holds these values, into the folders of these stages."""
    for name in names:
        (out / "cpu" / name).mkdir(parents=True, exist_ok=True)
        write_torch(out / "cpu" / name / "checkpoint.pt", values)


@pytest.fixture
def calls(monkeypatch):
    """The command line of every stage that is trained, which takes no time here."""
    calls = []
    for name in SCRIPTS:
        def main(argv, name=name):
            calls.append([name, *argv])

        monkeypatch.setattr(importlib.import_module(name), "main", main)
    return calls


RLHF = ["gpt", "sft", "reward_model"]


@pytest.mark.parametrize("there, needed, stage, asked, plan", [
    ([], RLHF, "ppo", RLHF, "gpt → sft → reward_model → ppo, about 7 minutes on two cores"),
    (["sft"], RLHF, "dpo-beta0", ["reward_model"],     # gpt's is not asked for
     "reward_model → dpo-beta0, about 4 minutes on two cores"),
    (RLHF, [*RLHF, "process_model"], "ppo-process", ["reward_model --process"],
     "process_model → ppo-process, about 4 minutes on two cores")])
def test_what_is_missing_is_announced_and_trained(there, needed, stage, asked, plan, calls,
                                                  tmp_path, capsys):
    """Stages in the wrong order, or trained again without need; another seed or folder; a reward
    model trained in the process model's place; --resume that ends at the first stage."""
    trained(tmp_path, *there)
    common = ["--size", "cpu", "--out", str(tmp_path), "--seed", "7", "--resume"]
    train_missing(gpt.Config(size="cpu", out=str(tmp_path), seed=7, resume=True), needed, stage)
    assert capsys.readouterr().out == f"plan    {plan}\n"
    expected = []
    for name in asked:
        script, *flags = name.split()
        expected.append([script, *common, *flags])
    assert calls == expected


def test_a_stage_that_is_stale_is_refused(calls, tmp_path, capsys):
    """The base model is trained again, and the old SFT model is compared with the new one's loss;
    a base model from another folder that is taken for the one in this folder."""
    trained(tmp_path, "gpt")
    trained(tmp_path / "elsewhere", "gpt", seed=2)
    folder = tmp_path / "cpu/sft"
    base = tmp_path / "cpu/gpt/checkpoint.pt"
    data = tmp_path / "cpu/gpt/pairs.jsonl"
    data.write_text("{}")
    config = gpt.Config(size="cpu", out=str(tmp_path))
    with Run("sft", folder, config, 1, [tmp_path / "elsewhere/cpu/gpt/checkpoint.pt"]) as one:
        assert one.made_from() == {}
    with Run("sft", folder, config, 1, [base, data]) as one:
        write_torch(one.folder / "checkpoint.pt", {"made_from": one.made_from()})
        one.finish()
    capsys.readouterr()

    train_missing(config, ["gpt", "sft"], "ppo")
    assert capsys.readouterr().out == ""
    data.write_text("{}\n")     # policies of several judges may be compared
    train_missing(config, ["gpt", "sft"], "ppo")
    note = f"note    sft was made from other comparisons than {data} has now\n"
    assert capsys.readouterr().out == note
    trained(tmp_path, "gpt", seed=3)
    message = f"^{folder / 'checkpoint.pt'}: was made from another {base}; train sft again$"
    with pytest.raises(InputError, match=message):
        train_missing(config, ["gpt", "sft"], "ppo")
    assert calls == []


# --------------------------------------------------------------------------------------------------
# A run's steps and figures


def test_figures_are_means_since_the_last_row():
    """A short last batch that counts as much as a full one; figures from before the last row in the
    next one; a figure that few steps have, divided by all steps; a graph that is kept alive."""
    one = SilentRun(report=2)
    weight = torch.ones((), requires_grad=True)
    for step in one.steps(5):
        one.log(step, weight=torch.tensor(3), loss=weight * step)
        one.log(step, loss=10.0)    # weight 1
        assert not one.pending["loss"][-2][0].requires_grad
        if one.due(step):
            one.log(step, held_out=float(step))
        if step == 2:
            one.log(step, rare=7)
    assert untimed(one.rows) == [
        {"step": 2, "loss": (3 * (0 + 1) + 2 * 10) / 8, "held_out": 1.0},
        {"step": 4, "loss": (3 * (2 + 3) + 2 * 10) / 8, "rare": 7.0, "held_out": 3.0},
        {"step": 5, "loss": (3 * 4 + 10) / 4, "held_out": 4.0}]


def test_a_runs_figures(tmp_path, monkeypatch, capsys):
    """A figure that is neither printed nor written; "0:60" left, or time that was never left; 1.000
    for 100 %; seconds of one part of a step counted to another."""
    monkeypatch.setattr(run, "peak_memory", lambda: {"memory_mb": 5.0})
    clock = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    figures = {"loss": 0.5, "lr": 1.5e-5, "tall_name": -12.0, "excess": 0.25, "hidden": 7.0}
    with Run("gpt", tmp_path, gpt.Config(), 2, unprinted=("hidden", "absent", "update_s")) as one:
        for step in one.steps(4):
            one.log(step, **figures)
            clock[0] += 1
            one.time("rollout_s")
            clock[0] += 28.875
            one.time("update_s")
        expected = []
        for step in (2, 4):
            expected.append({"step": step, **figures, "rollout_s": 1.0, "update_s": 28.875,
                             "seconds": 29.875 * step, "memory_mb": 5.0})
        assert one.rows == expected == metrics(one.folder / "metrics.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "                                tall           rollout",
        "     step     loss       lr     name   excess        s   left",
        "   2/4       0.500  1.5e-05  -12.000    25.0%    1.000   1:00",
        "   4/4       0.500  1.5e-05  -12.000    25.0%    1.000   0:00"]


DOCUMENTS = [[3, 1, 4], [], [1471, 0], [2 ** 31 - 1, 9]]


@pytest.mark.filterwarnings("error")
def test_documents_from_the_file_are_those_that_were_drawn(tmp_path):
    """A second run that draws again, or reads documents cut at the wrong places; a batch changed in
    place that changes the file too; an interrupted draw that the next run takes for all."""
    path = tmp_path / "new" / "documents.npy"

    def interrupted():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory_mapped(path, interrupted)
    assert os.listdir(path.parent) == []
    for draw in (lambda: DOCUMENTS, None):
        found = memory_mapped(path, draw)
        assert [ids.tolist() for ids in found] == DOCUMENTS
    joined, = memory_mapped(path, None, joined=True)
    assert joined.tolist() == sum(DOCUMENTS, [])

    before = path.read_bytes()
    torch.as_tensor(found[-1])[0] = 8
    assert found[-1].tolist() == [8, 9] and path.read_bytes() == before


@pytest.mark.parametrize("error, message", [
    (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
    (ValueError("its values are none"), "not a whole file of this project (its values are none); "
                                     "delete it and x"),
    (OSError(12, "Cannot allocate memory"), None),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None)])
def test_only_damage_is_called_damage(tmp_path, error, message):
    """ "not a whole file ...; delete it" of a file without the right to read it, or that doesn't
    fit the GPU's memory: who obeys loses a good checkpoint."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError if message else type(error)) as found:
        with refused_if_broken(path, "x"):
            raise error
    assert found.value is error or str(found.value) == f"{path}: {message}"


def test_files_of_the_users_own_beside_those_of_rounds(tmp_path):
    """pairs-mine.jsonl in the folder of online DPO: a traceback after all was saved."""
    for name in ("pairs-1", "pairs-2", "pairs-mine"):
        (tmp_path / f"{name}.jsonl").touch()
    run.forget_rounds(tmp_path, "pairs", 1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["pairs-1", "pairs-mine"]
