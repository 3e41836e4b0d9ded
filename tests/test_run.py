"""What every stage shares: command line, screen, a run's folder, files. How runs are killed: tests/test_resume.py."""

import importlib
import io
import os
import random
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import gpt
from data import run
from data.files import InputError, lock_folder
from data.run import Run, check_name, complete, memory_mapped, parse_config, progress, train_missing
from helpers import metrics

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gpt", "sft", "reward_model", "ppo", "dpo", "best_of_n")
BROKEN = "not a whole file of this project"

# ----------------------------------------------------------------------------------------------------------------------
# The command line


# As on Windows, which has neither of the two modules.
RUN_ALL = """
import runpy, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
commands = [[name + ".py", "--help"] for name in sys.argv[2:]] + [["tests.bench", "gpt", "--help"]]
for sys.argv in [*commands, ["gpt.py", "--size", "cpu", *sys.argv[1].split()]]:
    try:
        (runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        print("exit status", stop.code, flush=True)
"""
TRAINING = "--text {0}/text.txt --out {0} --block_size 9 --vocab_size 259 --n_layer 1 --n_head 1 --n_embd 8 --steps 3"


def run_python(*arguments):
    """`python ARGUMENTS` in the project's folder."""
    environment = {**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          encoding="utf-8", timeout=120)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """(folder, what `python X.py --help` prints, for each script X, `python -m tests.bench gpt --help`, and a short run
    of gpt.py), without the modules that only Unix has; one process runs them all, because torch loads slowly."""
    out = tmp_path_factory.mktemp("windows")
    (out / "text.txt").write_text("The fox had a kite. " * 40)
    process = run_python("-c", RUN_ALL, TRAINING.format(out), *SCRIPTS)
    assert process.returncode == 0 and process.stderr == ""
    texts = process.stdout.split("exit status 0\n")
    assert len(texts) == len(SCRIPTS) + 2
    return out, dict(zip([*SCRIPTS, "bench", "training"], texts))


@pytest.fixture
def helps(windows):
    """The help of each script."""
    return windows[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(helps, name):
    """A flag without a word of help; a help that states another default than the one in force."""
    module = importlib.import_module(name)
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8").split("class Config:")[1].split("\n\n")[0]
    comments = {line.split(":")[0].strip(): line.split("  # ")[-1].split(" # ")[-1].strip()
                for line in source.splitlines()[1:]}
    assert set(comments) == {field.name for field in fields(module.Config)} and len(comments) > 5
    assert set(module.GPU) <= set(comments) and helps[name].startswith(f"usage: {name}.py")
    presets = [preset for rows in getattr(module, "PRESETS", {}).values() for preset in rows.items()]
    for field in fields(module.Config):
        default = repr(field.default) + "".join(f"; {name}: {row[field.name]!r}" for name, row in
                                                [("gpu", module.GPU), *presets] if field.name in row)
        assert f"--{field.name} " in helps[name]
        assert f" {comments[field.name]} (default: {default})\n" in helps[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_choices(helps, name, capsys):
    """A --size whose values the help doesn't tell, or of which `--size GPU` makes the default without a word."""
    module = importlib.import_module(name)
    choices = {field.name: typing.get_args(field.type) for field in fields(module.Config)
               if not isinstance(field.type, type)}
    assert choices["size"] == ("auto", "cpu", "gpu", "gpt2")
    for flag, values in choices.items():
        assert f"\n  --{flag} {{{','.join(values)}}}" in helps[name]
        for value in values:
            config = parse_config(module.Config, module.GPU, [f"--{flag}", value], "")
            assert getattr(config, flag) == value or (flag, value) == ("size", "auto")
        for value in ("nonsense", values[-1].upper(), ""):
            with pytest.raises(SystemExit) as stop:
                parse_config(module.Config, module.GPU, [f"--{flag}", value], "")
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1
            assert all(text in error for text in (f"--{flag}", value, *values))


@dataclass
class Uncommented:
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    width: int = 3


def test_a_field_without_a_comment_is_a_bug():
    """A flag without help: a KeyError that names no file, or an empty line in --help."""
    with pytest.raises(TypeError, match=r"test_run\.Uncommented\.width has no comment"):
        parse_config(Uncommented, {}, [], "")


def test_training_on_a_system_without_file_locks(windows):
    """An import of fcntl or resource that ends every script on Windows; a run that is not finished there, or that
    doesn't say that nothing keeps a second one from the folder."""
    out, texts = windows
    assert "Benchmark training and sampling" in texts["bench"] and "--n_layer" in texts["bench"]
    assert f"{out}/cpu/gpt: this system locks no files; start no second run in this folder\n" in texts["training"]
    assert "saved " in texts["training"] and [row["step"] for row in metrics(out / "cpu/gpt/metrics.jsonl")] == [3]
    names = sorted(path.name for path in (out / "cpu/gpt").iterdir())
    assert names[:3] == ["checkpoint.pt", "lock", "metrics.jsonl"] and [name[-4:] for name in names[3:]] == [".ids"]


def test_memory_where_the_system_tells_it(monkeypatch):
    """Kilobytes for megabytes, or a figure of 0 on a system that tells none."""
    held = torch.ones(20, 2 ** 20)      # 80 MB
    memory = run.peak_memory(torch.device("cpu"))
    assert list(memory) == ["memory_mb"] and held.nbytes / 2 ** 20 < memory["memory_mb"] < 2 ** 20
    monkeypatch.setattr(run, "resource", None)
    assert run.peak_memory(torch.device("cpu")) == {}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("argv", [["--see", "3"], ["--nonsense", "1"], ["--seed", "three"], ["--seed"], ["file.txt"]])
def test_a_wrong_command_line_is_one_line(name, argv, capsys):
    """An abbreviation that is taken for one flag today and for another when a flag is added; a screenful of usage in
    which the one wrong word is hard to find."""
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        parse_config(module.Config, module.GPU, argv, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and argv[0].split()[0] in error


def parse(*argv):
    return parse_config(gpt.Config, gpt.GPU, list(argv), "")


def test_defaults_sizes_and_flags():
    """--size gpu that wins over what the user typed, or that changes nothing; a flag equal to the default is lost."""
    assert parse("--size", "cpu") == gpt.Config(size="cpu")
    assert parse("--size", "gpu") == gpt.Config(**{"size": "gpu", **gpt.GPU})
    typed = parse(*f"--size gpu --n_embd 64 --lr 0.1 --n_layer {gpt.Config.n_layer} --text a.txt".split())
    assert (typed.n_embd, typed.lr, typed.n_layer, typed.text) == (64, 0.1, gpt.Config.n_layer, "a.txt")
    assert typed.n_head == gpt.GPU["n_head"] != gpt.Config.n_head
    assert parse().size == ("gpu" if torch.cuda.is_available() else "cpu")
    assert parse("--resume").resume is True and parse("--no-resume").resume is False is parse().resume


@dataclass
class Choices:
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    kind: Literal["plain", "fast", "odd"] = "plain"     # changes some of the defaults below
    text: str = ""      # a flag that is set or not
    rate: float = 0.5   # a rate, 10 % of something
    width: int = 3      # a width
    count: int = 0      # a number; 0: none
    depth: int = 2      # only with a count
    goal: Literal["near", "far"] = "near"   # changed by a kind
    speed: int = 1      # only on the way to what is near


NEEDS = {"rate": ("kind", "plain", "fast"), "width": ("text",), "depth": ("count",), "speed": ("goal", "near")}
PRESETS = {"kind": {"fast": dict(rate=2.0, width=7), "odd": dict(width=9, goal="far")}}


def choose(*argv):
    return parse_config(Choices, dict(width=64, rate=0.1), list(argv), "", NEEDS, PRESETS)


@pytest.mark.parametrize("argv, kind", [
    ("--rate 1", "plain"), ("--rate 1 --kind fast", "fast"), ("--kind plain --rate 1", "plain"),
    ("--width 4 --text a", "plain"), ("--depth 5 --count 2", "plain"), ("", "plain"), ("--count 0 --kind odd", "odd"),
    ("--speed 2", "plain"), ("--speed 2 --kind odd --goal near", "odd")])
def test_flags_that_mean_something(argv, kind):
    """The default of the other flag that is not counted; a flag that is refused beside the very value that it needs."""
    assert choose(*argv.split()).kind == kind


@pytest.mark.parametrize("argv, message", [
    ("--kind odd --rate 1", "--rate 1.0: goes with --kind plain or fast only"),
    ("--width 4", "--width 4: goes with --text only"),
    ("--depth 5", "--depth 5: goes with --count only"), ("--depth 2", "--depth 2: goes with --count only"),
    ("--count 0 --depth 5", "--depth 5: goes with --count only"),
    ("--speed 2 --goal far", "--speed 2: goes with --goal near only"),
    ("--speed 2 --kind odd", "--speed 2: goes with --goal near only")])
def test_flags_that_would_be_ignored_are_refused(argv, message):
    """--count 0 that counts as given; a flag equal to its default that slips through; a preset of the other flag's."""
    with pytest.raises(InputError) as error:
        choose(*argv.split())
    assert str(error.value) == message


def test_presets(capsys):
    """A preset that wins over what was typed, loses to --size gpu, leaks into another value, or is not in --help."""
    def found(*argv):
        config = choose("--size", *argv)
        return config.rate, config.width
    assert found("cpu") == (0.5, 3) and found("cpu", "--kind", "fast") == (2.0, 7)
    assert found("gpu") == (0.1, 64) and found("gpu", "--kind", "fast") == (2.0, 7)
    assert found("cpu", "--kind", "odd") == (0.5, 9) and found("gpu", "--kind", "odd") == (0.1, 9)
    assert found("cpu", *"--kind fast --rate 0.5 --text a --width 3".split()) == (0.5, 3)
    with pytest.raises(SystemExit):
        choose("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "a rate, 10 % of something (default: 0.5; gpu: 0.1; fast: 2.0)" in text
    assert "a width (default: 3; gpu: 64; fast: 7; odd: 9)" in text and "only with a count (default: 2)" in text


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--batch", "-3"], ["--n_layer", "-1"], ["--seed", "-1"],
                                  ["--report", "0"], ["--top_k", "-1", "--sample", "x"]])
def test_impossible_values_are_refused(argv):
    """--report 0 divides by zero after an hour; --batch -3 trains on nothing and saves it."""
    with pytest.raises(InputError, match=f"^{argv[0]} {argv[1]}: must be positive$"):
        parse(*argv)
    assert parse("--seed", "0").seed == 0 == parse("--top_k", "0", "--sample", "x").top_k


def test_a_seed_of_64_bits_is_refused():
    """torch's generators take no more: a traceback after the minute in which the documents were drawn."""
    for seed in (2 ** 63, 2 ** 64 - 1, 2 ** 64, 10 ** 30):
        with pytest.raises(InputError, match=f"^--seed {seed}: is too large; 63 bits are the most$"):
            parse("--seed", str(seed))
    seed, weights = parse("--seed", str(2 ** 63 - 1)).seed, []
    for x in (seed, seed - 1):
        weights.append(gpt.GPT(gpt.GPTConfig(5, 4, 1, 1, 4), torch.Generator().manual_seed(x)).wte.weight)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("name, other, flags", [
    ("gpt", "sample", ("temperature", "top_k")), ("sft", "prompt", ("temperature", "top_k")),
    ("ppo", "prompt", ("top_k",)), ("dpo", "prompt", ("temperature", "top_k"))])
def test_flags_that_mean_nothing_without_another_one(name, other, flags, tmp_path, monkeypatch):
    """--temperature without --sample: somebody thinks that he trains at this temperature."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "train", lambda config: pytest.fail("trains"))
    for flag in flags:
        for value in ("2", "1" if flag == "temperature" else "0"):      # also the default, when it is said
            with pytest.raises(InputError, match=f"^--{flag} [0-9.]+: goes with --{other} only$"):
                module.main(["--size", "cpu", "--out", str(tmp_path), f"--{flag}", value])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.001", "1e999"])
@pytest.mark.parametrize("name, flag", [("gpt", "lr"), ("gpt", "weight_decay"), ("sft", "lr"), ("reward_model", "lr"),
                                        ("ppo", "beta"), ("ppo", "value_lr"), ("ppo", "lam"), ("dpo", "beta"),
                                        ("best_of_n", "beta")])
def test_numbers_that_are_none_are_refused(name, flag, value):
    """--lr nan makes every weight nan; a negative --beta pays the policy for leaving the reference."""
    module = importlib.import_module(name)
    with pytest.raises(InputError, match=f"--{flag} {float(value)}: must be a number, and not negative"):
        parse_config(module.Config, module.GPU, [f"--{flag}={value}"], "")
    config = parse_config(module.Config, module.GPU, ["--size", "cpu", f"--{flag}=0"], "")
    assert getattr(config, flag) == 0      # beta 0 is the README's experiment


@pytest.mark.parametrize("name", ["gpt", "sft", "ppo", "dpo"])
def test_a_temperature_of_zero_is_refused(name, tmp_path):
    """--temperature 0 for greedy: a division by zero in the sampler, after the minutes that the earlier stages took."""
    asked = {"gpt": ["--sample", "Once"], "ppo": []}.get(name, ["--prompt", "Why?"])
    argv = ["--size", "cpu", "--out", str(tmp_path), "--temperature", "0", *asked]
    with pytest.raises(InputError, match="^--temperature 0.0: must be positive; --top_k 1 is greedy$"):
        importlib.import_module(name).main(argv)


def test_only_a_score_may_be_negative():
    """The default of --missing_end_score refused, or nan let in through it."""
    for name in ("ppo", "best_of_n"):
        module = importlib.import_module(name)
        config = parse_config(module.Config, module.GPU, ["--missing_end_score", "-7.5"], "")
        assert config.missing_end_score == -7.5
        for value in ("nan", "-inf"):
            with pytest.raises(InputError, match="--missing_end_score .*must be a number"):
                parse_config(module.Config, module.GPU, [f"--missing_end_score={value}"], "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_empty_texts_are_refused(name):
    """`ppo.py --data $FILE` with FILE unset trains on the little world, and best_of_n.py --prompt "" measures."""
    module = importlib.import_module(name)
    texts = [field.name for field in fields(module.Config) if field.type is str]
    assert {"out"} < set(texts)
    for flag in texts:
        for argv in (["--" + flag, ""], [f"--{flag}="]):
            with pytest.raises(InputError, match=f"--{flag} ?:") as error:
                parse_config(module.Config, module.GPU, argv, "")
            assert "\n" not in str(error.value)
    assert parse_config(module.Config, module.GPU, ["--out", " "], "").out == " "


@pytest.mark.parametrize("stage, other", [("ppo", "dpo"), ("dpo", "ppo"), ("rsft", "ppo")])
def test_a_runs_name_begins_with_its_stage(stage, other):
    """--name sft puts the policy where the reference was; --name ../x leaves the folder of the outputs."""
    for name in (stage, stage + "2", stage + "-beta0", stage + "_a.b-1"):
        check_name(name, stage)
    for name in ("", other, "sft", "gpt", "reward_model", "best_of_n", "my-" + stage, stage.upper(), " " + stage,
                 stage + " ", stage + "\n", f"../{stage}", f"{stage}/../sft", f"{stage}/x", f"{stage}\\x", stage + "\0",
                 f"/{stage}"):
        with pytest.raises(InputError, match="(?s)--name .*must be " + stage):
            check_name(name, stage)


# ----------------------------------------------------------------------------------------------------------------------
# Stages that are missing


def trained(out, *names):
    """Put a checkpoint into the folders of these stages."""
    for name in names:
        (out / "cpu" / name).mkdir(parents=True, exist_ok=True)
        (out / "cpu" / name / "checkpoint.pt").touch()


@pytest.mark.parametrize("there, stage, asked, plan", [
    ([], "ppo", ["gpt", "sft", "reward_model"], "gpt → sft → reward_model → ppo, about 7 minutes on two cores"),
    (["gpt"], "ppo-beta0", ["sft", "reward_model"], "sft → reward_model → ppo-beta0, about 5 minutes on two cores"),
    (["sft"], "dpo", ["reward_model"], "reward_model → dpo, about 4 minutes on two cores"),     # gpt's is not asked for
    (["reward_model"], "ppo", [], ""), (["gpt", "sft", "reward_model"], "ppo", [], ""),
    (["sft"], "the curve", ["reward_model"], "reward_model → the curve, about 2 minutes on two cores")])
def test_what_is_missing_is_announced_and_trained(there, stage, asked, plan, tmp_path, capsys):
    """Stages in the wrong order, or trained again because one before them was thrown away; minutes not told."""
    trained(tmp_path, *there)
    calls, trains = [], [f"trains {name}" for name in asked]
    earlier = {name: lambda argv, name=name: (calls.append((name, argv)), print("trains", name))
               for name in ("gpt", "sft", "reward_model")}
    argv = ["--size", "cpu", "--out", str(tmp_path), "--seed", "7"]
    for resume in (False, True):
        train_missing(gpt.Config(size="cpu", out=str(tmp_path), seed=7, resume=resume), earlier, stage)
        assert calls == [(name, argv + ["--resume"] * resume) for name in asked]
        assert capsys.readouterr().out.splitlines() == [f"plan    {plan}"] * bool(plan) + trains
        calls.clear()
    if asked:
        train_missing(gpt.Config(size="gpu", out=str(tmp_path)), earlier, stage)    # minutes of another machine
        assert capsys.readouterr().out.startswith(f"plan    gpt → sft → reward_model → {stage}\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_train_what_is_missing(name, tmp_path):
    """A script without --resume, in an empty folder, ended in an AttributeError instead of training a stage."""
    config, calls = importlib.import_module(name).Config(size="cpu", out=str(tmp_path), seed=7), []
    train_missing(config, {"sft": calls.append}, name)
    assert calls == [["--size", "cpu", "--out", str(tmp_path), "--seed", "7"]]


# ----------------------------------------------------------------------------------------------------------------------
# The screen


def screen(text):
    """What a terminal shows: "\\r" goes back to the line's beginning, what is written then covers what was there."""
    lines = []
    for line in text.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part):]
        lines.append(cells.rstrip())
    return lines


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch):
    """A log file of a thousand lines, or a terminal that stands still for minutes; rests of a longer line behind a
    shorter one; a division by zero before anything is done."""
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    now, stream = [50.0], Stream()
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "stdout", stream)
    report, shown, began = progress("texts", 1000), [], now[0]
    for seconds, done in ((0.45, 0), (0.55, 0), (0.8, 7), (31, 0), (33, 50), (60, 99), (62, 100), (90, 1000)):
        now[0] = began + seconds
        report(done)
        shown.append(screen(stream.getvalue()))
    zero, fifty, many, most, end = (
        "texts: 0 of 1,000", "texts: 50 of 1,000, 10:27 left", "texts: 99 of 1,000, 9:06 left",
        "texts: 100 of 1,000, 9:18 left", "texts: 1,000 in 90 s")
    if terminal:
        assert shown == [[""], [zero], [zero], [zero], [fifty], [many], [most], [end, ""]]
    else:
        assert shown == [[""]] * 3 + [[zero, ""]] * 3 + [[zero, most, ""], [zero, most, end, ""]]
        assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (119.5, "2:00"), (3723, "62:03")])
def test_clock(seconds, text):
    """0:60, because the rest is rounded and not the whole."""
    assert run.clock(seconds) == text


def test_counts_are_words():
    """A dict with braces and quotes in a line for people."""
    assert run.counts({"equal texts": 0, "longer than the context": 3}) == "0 equal texts, 3 longer than the context"


def test_a_runs_figures(tmp_path, monkeypatch, capsys):
    """A figure that is neither printed nor written; "0:60" left, or time that was never left; 1.000 for 100 %."""
    now = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    folder = tmp_path / "new" / "stage"
    with Run("gpt", folder, gpt.Config(), every=100, unprinted=("hidden", "absent")) as one:
        one.total = 8
        now[0] = 119.9
        one(2, loss=0.5, hidden=7.0, lr=1.5e-5, tall_name=-12.0, excess=0.25)       # 19.9 s for 2 of 8: 59.7 left
        now[0] = 180.0
        one(8, loss=0.25, hidden=8.0, lr=0.0, tall_name=3.0, excess=0.0625)
        one.record(8, unseen=1.0)
        assert metrics(one.folder / "metrics.jsonl") == [
            {"step": 2, "loss": 0.5, "hidden": 7.0, "lr": 1.5e-5, "tall_name": -12.0, "excess": 0.25, "seconds": 19.9},
            {"step": 8, "loss": 0.25, "hidden": 8.0, "lr": 0.0, "tall_name": 3.0, "excess": 0.0625, "seconds": 80.0},
            {"step": 8, "unseen": 1.0, "seconds": 80.0}]
    assert capsys.readouterr().out.splitlines() == [
        "                                tall",
        "     step     loss       lr     name   excess   left",
        "   2/8       0.500  1.5e-05  -12.000    25.0%   1:00",
        "   8/8       0.250  0.0e+00    3.000     6.2%   0:00"]
    with Run("gpt", folder, gpt.Config(), every=100) as one:
        assert metrics(one.folder / "metrics.jsonl") == []     # a new run's figures, not two runs in one file


def test_time_left_after_a_break(tmp_path, monkeypatch, capsys):
    """The hours before the break counted as if they had gone into the steps since."""
    now = [1000.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    for first, resume in ((1, False), (5, True)):
        with Run("gpt", tmp_path, gpt.Config(resume=resume), every=4) as one:
            one.total = 10
            now[0] += 100       # before the first step: weights, data
            for step in range(first, first + 4):
                now[0] += 2 if resume else 60
                one(step, loss=1.0)
                one.end_step(step)
        now[0] += 10_000
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "/10 " in line] == [
        "24:00", "8:00", "7:00", "6:00", "7:22", "0:08", "0:06", "0:04"]


def test_metrics_are_whole_lines_at_any_time(tmp_path, monkeypatch):
    """Half a line, because the disk was full or the power went: json.loads fails on the night's figures."""
    with Run("gpt", tmp_path, gpt.Config(), every=100) as one:
        one.record(1, loss=3.0)
        path = one.folder / "metrics.jsonl"
        before = path.read_bytes()
        assert before.endswith(b"}\n")

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError):
            one.record(2, loss=2.0)
        assert path.read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# A run's folder. With whole stages, and real kills: tests/test_resume.py.


def small_run(folder, text, steps=3, fail_at=None, resume=False):
    """A Run of 3 steps that leaves a.txt and b.txt, each with this text; KeyboardInterrupt after step fail_at."""
    with Run("gpt", folder, gpt.Config(resume=resume), every=1) as one:
        one.total = steps
        (one.folder / "a.txt").write_text(text)
        for step in range(one.saved["step"], steps):
            one.record(step + 1, loss=float(len(text)))
            one.end_step(step + 1)
            if step + 1 == fail_at:
                raise KeyboardInterrupt
        (one.folder / "b.txt").write_text(text)
        one.finish()


def files_in(folder):
    """{name: content} of the files that a finished run left; without seconds."""
    return {path.name: re.sub(r', "seconds": [\d.]+', "", path.read_text()) for path in folder.iterdir()
            if path.is_file() and path.name != "lock"}


def left_by(text):
    """What small_run with this text leaves."""
    rows = "".join(f'{{"step": {step}, "loss": {float(len(text))}}}\n' for step in (1, 2, 3))
    return {"a.txt": text, "b.txt": text, "metrics.jsonl": rows}


def test_files_change_together_when_a_run_has_finished(tmp_path):
    """A run that is begun and given up: its figures stand beside the checkpoint of the one before it, or none."""
    small_run(tmp_path, "first")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "lock", "metrics.jsonl"]
    assert files_in(tmp_path) == left_by("first")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for resume in (False, True, False):     # stopped, gone on with and stopped again, given up for another one
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path, "second", fail_at=1 + resume, resume=resume)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        if resume:
            (tmp_path / "unfinished/c.txt").write_text("of the run that is then given up")
    small_run(tmp_path, "second", resume=True)
    assert files_in(tmp_path) == left_by("second") and len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("who", ["a reader", "the next stage", "the next run"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_that_was_killed_while_its_files_took_their_places(n, who, tmp_path, monkeypatch):
    """a.txt of one run beside the b.txt of another: the policy of one seed with the comparisons of the other."""
    small_run(tmp_path / "cpu/sft", "first")
    moves, replace = [], os.replace

    def killed(source, target):
        if Path(source).parent.name == "finished":
            moves.append(source)
            if len(moves) == n:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        small_run(tmp_path / "cpu/sft", "second")
    assert len(moves) == n and (tmp_path / "cpu/sft/finished").exists()
    if who == "a reader":
        complete(tmp_path / "cpu/sft")
    elif who == "the next stage":
        trained(tmp_path, "sft")
        train_missing(gpt.Config(size="cpu", out=str(tmp_path)), {"sft": None}, "ppo")
        (tmp_path / "cpu/sft/checkpoint.pt").unlink()
    else:
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path / "cpu/sft", "third", fail_at=1)
    assert files_in(tmp_path / "cpu/sft") == left_by("second") and not (tmp_path / "cpu/sft/finished").exists()


def test_nothing_is_completed_behind_a_runs_back(tmp_path):
    """A reader that takes the files away from under the run that moves them; a lock in a folder that isn't there."""
    complete(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished/a.txt").write_text("second")
    with lock_folder(tmp_path), pytest.raises(InputError, match="another run is using this folder"):
        complete(tmp_path)
    assert not (tmp_path / "a.txt").exists()
    for _ in range(2):
        complete(tmp_path)
        assert files_in(tmp_path) == {"a.txt": "second"} and not (tmp_path / "finished").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The file of documents


def some_documents():
    """(path-independent) lists of ids, of lengths 0 to 40."""
    rng = random.Random(24)
    return [[rng.randrange(1472) for _ in range(rng.randint(0, 40))] for _ in range(50)] + [[7]]


def test_documents_from_the_file_are_those_that_were_drawn(tmp_path):
    """A second run that draws for minutes again, or that reads documents cut at the wrong places."""
    path, drawn = tmp_path / "new" / "documents.npy", []

    def draw():
        drawn.append(some_documents())
        return drawn[-1]

    first, second = (memory_mapped(path, draw) for _ in range(2))
    assert len(drawn) == 1 and drawn[0] == some_documents()
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in second] == some_documents()
    assert os.listdir(path.parent) == [path.name]
    batch = [i for i, ids in enumerate(second) if len(ids)][:9]      # what training does with them
    for ours, theirs in zip(gpt.pad([second[i] for i in batch]), gpt.pad([some_documents()[i] for i in batch])):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_nobody_writes_through_the_views(tmp_path):
    """A batch changed in place that changes the file too, or torch's warning of memory that must not be written."""
    path = tmp_path / "documents.npy"
    ids = memory_mapped(path, some_documents)[-1]
    before = path.read_bytes()
    torch.as_tensor(ids)[0] = 9
    assert ids.tolist() == [9] and path.read_bytes() == before


def test_a_file_of_documents_that_is_not_whole(tmp_path):
    """A disk that was full: training on the documents that are left, or on the next document's tokens."""
    path = tmp_path / "documents.npy"
    memory_mapped(path, some_documents)
    whole = path.read_bytes()
    numbers = np.frombuffer(whole, np.int32)
    contents = [whole[:n] for n in (0, 1, 4, 8, 12, len(whole) // 2, -4, -1)]
    contents += [bytes(5000), whole + bytes(4), whole + whole]
    contents += [wrong.tobytes() for wrong in (np.delete(numbers, 0), numbers + 1, numbers.astype(np.int64))]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            memory_mapped(path, some_documents)
        assert BROKEN in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
        assert path.read_bytes() == content     # the user is told; nothing is thrown away


def test_a_flipped_bit_in_a_file_of_documents(tmp_path):
    """A bad disk: another token, or lengths by which every text begins in the middle of another one, and no word of it;
    a traceback out of the parser of a file format."""
    path = tmp_path / "documents.npy"
    memory_mapped(path, lambda: [[3, 1, 4], [], [1471, 0], [2 ** 31 - 1, 9]])
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8) if position < 8 else [position % 8]:
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1:])
            with pytest.raises(InputError) as error:
                memory_mapped(path, None)
            assert str(error.value).startswith(f"{path}: {BROKEN} (checksum error); ") and "\n" not in str(error.value)


def test_an_interrupted_draw_leaves_no_file_of_documents(tmp_path, monkeypatch):
    """Ctrl-C while the documents are written: the next run takes half of them for all."""
    def interrupt(*arguments):
        raise KeyboardInterrupt

    path = tmp_path / "documents.npy"
    with pytest.raises(KeyboardInterrupt):
        memory_mapped(path, interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory_mapped(path, some_documents)
    assert not os.listdir(tmp_path) and len(memory_mapped(path, some_documents)) == 51


