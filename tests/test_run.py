"""What every stage shares: command line, screen, a run's folder, files. How runs are killed:
tests/test_resume.py."""

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
from data.run import (Run, SilentRun, allow_flags, check_name, complete, memory_mapped,
                      parse_config, progress, refuse_flags, refused_if_broken, train_missing,
                      write_torch)
from helpers import metrics, untimed

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gpt", "sft", "reward_model", "ppo", "dpo", "best_of_n")
BROKEN = "not a whole file of this project"

# --------------------------------------------------------------------------------------------------
# The command line


# As on Windows, which has neither of the two modules.
RUN_ALL = """
import runpy, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
commands = [[name + ".py", "--help"] for name in sys.argv[2:]]
commands.append(["tests.bench", "gpt", "--help"])
commands.append(["gpt.py", "--size", "cpu", *sys.argv[1].split()])
for sys.argv in commands:
    run = runpy.run_module
    if sys.argv[0].endswith(".py"):
        run = runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        print("exit status", stop.code, flush=True)
"""
TRAINING = ("--text {0}/text.txt --out {0} --block_size 9 --vocab_size 259 --n_layer 1 --n_head 1 "
            "--n_embd 8 --steps 3")


def run_python(*arguments):
    """`python ARGUMENTS` in the project's folder."""
    environment = {**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment,
                          capture_output=True, encoding="utf-8", timeout=120)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """(folder, what `python X.py --help` prints, for each script X, `python -m tests.bench gpt
    --help`, and a short run of gpt.py), without the modules that only Unix has; one process runs
    them all, because torch loads slowly."""
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


class Parses(Exception):
    """Instead of a stage."""


def presets_of(module, monkeypatch):
    """{value of a flag: the defaults that it changes}, as the script gives them to parse_config."""
    found = {"gpu": module.GPU}

    def parse(Config, gpu, argv, description, needs={}, presets={}):
        assert Config is module.Config and gpu is module.GPU
        for rows in presets.values():
            found.update(rows)
        raise Parses

    with monkeypatch.context() as patch, pytest.raises(Parses):
        patch.setattr(module, "parse_config", parse)
        module.main([])
    return found


def comments_of(name):
    """{field: its comment} in the source of a script's Config, the lines of a long one joined."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    comments = {}
    for line in source.split("class Config:\n")[1].split("\n\n\n")[0].splitlines():
        code, _, comment = line.partition("#")
        found = re.match(r"    (\w+): ", code)
        if found:
            field = found[1]
            comments[field] = []
        if comment and code != "    ":  # else a heading
            comments[field].append(comment.strip())
    return {field: " ".join(lines) for field, lines in comments.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(helps, name, monkeypatch):
    """A flag without a word of help; a help that states another default than the one in force."""
    module = importlib.import_module(name)
    comments = comments_of(name)
    presets = presets_of(module, monkeypatch)
    assert set(comments) == {field.name for field in fields(module.Config)} and len(comments) > 5
    assert helps[name].startswith(f"usage: {name}.py")
    for changed in presets.values():
        assert set(changed) <= set(comments)
    for field in fields(module.Config):
        default = repr(field.default)
        for value, changed in presets.items():
            if field.name in changed:
                default += f"; {value}: {changed[field.name]!r}"
        assert f"--{field.name} " in helps[name] and len(comments[field.name]) > 4
        assert f" {comments[field.name]} (default: {default})\n" in helps[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_choices(helps, name, capsys):
    """A --size whose values the help doesn't tell, or of which `--size GPU` makes the default
    without a word."""
    module = importlib.import_module(name)
    choices = {}
    for field in fields(module.Config):
        if typing.get_origin(field.type) is Literal:
            choices[field.name] = typing.get_args(field.type)
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
            for text in (f"--{flag}", value, *values):
                assert text in error


@dataclass
class Uncommented:
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    width: int = 3


def test_a_field_without_a_comment_is_a_bug():
    """A flag without help: a KeyError that names no file, or an empty line in --help."""
    with pytest.raises(TypeError, match=r"test_run\.Uncommented\.width has no comment"):
        parse_config(Uncommented, {}, [], "")


def test_training_on_a_system_without_file_locks(windows):
    """An import of fcntl or resource that ends every script on Windows; a run that is not finished
    there, or that doesn't say that nothing keeps a second one from the folder."""
    out, texts = windows
    folder = out / "cpu/gpt"
    assert "Benchmark training and sampling" in texts["bench"] and "--n_layer" in texts["bench"]
    no_locks = f"{folder}: this system locks no files; start no second run in this folder\n"
    assert no_locks in texts["training"] and "saved " in texts["training"]
    assert [row["step"] for row in metrics(folder / "metrics.jsonl")] == [3]
    names = sorted(path.name for path in folder.iterdir())
    assert names[:3] == ["checkpoint.pt", "lock", "metrics.jsonl"]
    assert [name[-4:] for name in names[3:]] == [".ids"]


def test_memory_where_the_system_tells_it(monkeypatch):
    """Kilobytes for megabytes, or a figure of 0 on a system that tells none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    held = torch.ones(20, 2 ** 20)      # 80 MB
    memory = run.peak_memory()
    assert list(memory) == ["memory_mb"] and held.nbytes / 2 ** 20 < memory["memory_mb"] < 2 ** 20
    monkeypatch.setattr(run, "resource", None)
    assert run.peak_memory() == {}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("argv", [
    ["--see", "3"], ["--nonsense", "1"], ["--seed", "three"], ["--seed"], ["file.txt"]])
def test_a_wrong_command_line_is_one_line(name, argv, capsys):
    """An abbreviation that is taken for one flag today and for another when a flag is added; a
    screenful of usage in which the one wrong word is hard to find."""
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        parse_config(module.Config, module.GPU, argv, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and argv[0].split()[0] in error


def parse(*argv):
    return parse_config(gpt.Config, gpt.GPU, list(argv), "")


def test_defaults_sizes_and_flags():
    """--size gpu that wins over what the user typed, or that changes nothing; a flag equal to the
    default is lost."""
    assert parse("--size", "cpu") == gpt.Config(size="cpu")
    assert parse("--size", "gpu") == gpt.Config(**{"size": "gpu", **gpt.GPU})
    flags = f"--size gpu --n_embd 64 --lr 0.1 --n_layer {gpt.Config.n_layer} --text a.txt"
    typed = parse(*flags.split())
    assert (typed.n_embd, typed.lr, typed.text) == (64, 0.1, "a.txt")
    assert typed.n_layer == gpt.Config.n_layer
    assert typed.n_head == gpt.GPU["n_head"] != gpt.Config.n_head
    assert parse().size == ("gpu" if torch.cuda.is_available() else "cpu")
    assert parse("--resume").resume is True
    assert parse("--no-resume").resume is False is parse().resume


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


NEEDS = {"rate": ("kind", "plain", "fast"), "width": ("text",), "depth": ("count",),
         "speed": ("goal", "near")}
PRESETS = {"kind": {"fast": dict(rate=2.0, width=7), "odd": dict(width=9, goal="far")}}


def choose(*argv):
    return parse_config(Choices, dict(width=64, rate=0.1), list(argv), "", NEEDS, PRESETS)


@pytest.mark.parametrize("argv, kind", [
    ("--rate 1", "plain"), ("--rate 1 --kind fast", "fast"), ("--kind plain --rate 1", "plain"),
    ("--width 4 --text a", "plain"), ("--depth 5 --count 2", "plain"), ("", "plain"),
    ("--count 0 --kind odd", "odd"), ("--speed 2", "plain"),
    ("--speed 2 --kind odd --goal near", "odd")])
def test_flags_that_mean_something(argv, kind):
    """The default of the other flag that is not counted; a flag that is refused beside the very
    value that it needs."""
    assert choose(*argv.split()).kind == kind


@pytest.mark.parametrize("argv, message", [
    ("--kind odd --rate 1", "--rate 1.0: goes with --kind plain or fast only"),
    ("--width 4", "--width 4: goes with --text only"),
    ("--depth 5", "--depth 5: goes with --count only"),
    ("--depth 2", "--depth 2: goes with --count only"),
    ("--count 0 --depth 5", "--depth 5: goes with --count only"),
    ("--speed 2 --goal far", "--speed 2: goes with --goal near only"),
    ("--speed 2 --kind odd", "--speed 2: goes with --goal near only")])
def test_flags_that_would_be_ignored_are_refused(argv, message):
    """--count 0 that counts as given; a flag equal to its default that slips through; a preset of
    the other flag's."""
    with pytest.raises(InputError) as error:
        choose(*argv.split())
    assert str(error.value) == message


def test_flags_that_a_job_has_no_use_for():
    """A flag that is ignored: somebody thinks that it has done something. A default is no flag."""
    config = choose(*"--count 0 --width 3 --text a".split())
    assert set(config.given) == {"count", "width", "text"}
    refuse_flags(config, ("size", "rate"), "is not said")
    allow_flags(config, ("count", "width"), "text")
    with pytest.raises(InputError, match="^--width 3: is too much$"):
        refuse_flags(config, ("rate", "width"), "is too much")
    with pytest.raises(InputError, match="^--count 0: cannot be used with --text$"):
        allow_flags(config, ("width", "rate"), "text")


def test_presets(capsys):
    """A preset that wins over what was typed, loses to --size gpu, leaks into another value, or is
    not in --help."""
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
    assert "a flag that is set or not (default: '')" in text
    assert "a rate, 10 % of something (default: 0.5; gpu: 0.1; fast: 2.0)" in text
    assert "a width (default: 3; gpu: 64; fast: 7; odd: 9)" in text
    assert "only with a count (default: 2)" in text


@pytest.mark.parametrize("argv", [
    ["--steps", "0"], ["--batch", "-3"], ["--n_layer", "-1"], ["--seed", "-1"], ["--report", "0"],
    ["--top_k", "-1", "--sample", "x"]])
def test_impossible_values_are_refused(argv):
    """--report 0 divides by zero after an hour; --batch -3 trains on nothing and saves it."""
    with pytest.raises(InputError, match=f"^{argv[0]} {argv[1]}: must be positive$"):
        parse(*argv)
    assert parse("--seed", "0").seed == 0 == parse("--top_k", "0", "--sample", "x").top_k


def test_a_seed_of_64_bits_is_refused():
    """torch's generators take no more: a traceback after the minute in which the documents were
    drawn."""
    for seed in (2 ** 63, 2 ** 64 - 1, 2 ** 64, 10 ** 30):
        with pytest.raises(InputError, match=f"^--seed {seed}: is too large; 63 bits are the most"):
            parse("--seed", str(seed))
    seed = parse("--seed", str(2 ** 63 - 1)).seed
    weights = []
    for x in (seed, seed - 1):
        generator = torch.Generator().manual_seed(x)
        weights.append(gpt.GPT(gpt.GPTConfig(5, 4, 1, 1, 4), generator).wte.weight)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("name, other, flags", [
    ("gpt", "sample", ("temperature", "top_k")), ("sft", "prompt", ("temperature", "top_k")),
    ("ppo", "prompt", ("top_k",)), ("dpo", "prompt", ("temperature", "top_k"))])
def test_flags_that_mean_nothing_without_another_one(name, other, flags, tmp_path, monkeypatch):
    """--temperature without --sample: somebody thinks that he trains at this temperature."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "train", lambda config: pytest.fail("trains"))
    for flag in flags:
        default = "1" if flag == "temperature" else "0"
        for value in ("2", default):    # also the default, when it is said
            with pytest.raises(InputError, match=f"^--{flag} [0-9.]+: goes with --{other} only$"):
                module.main(["--size", "cpu", "--out", str(tmp_path), f"--{flag}", value])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.001", "1e999"])
@pytest.mark.parametrize("name, flag", [
    ("gpt", "lr"), ("gpt", "weight_decay"), ("sft", "lr"), ("reward_model", "lr"), ("ppo", "beta"),
    ("ppo", "value_lr"), ("ppo", "lam"), ("dpo", "beta"), ("best_of_n", "beta")])
def test_numbers_that_are_none_are_refused(name, flag, value):
    """--lr nan makes every weight nan; a negative --beta pays the policy for leaving the
    reference."""
    module = importlib.import_module(name)
    message = f"--{flag} {float(value)}: must be a number, and not negative"
    with pytest.raises(InputError, match=message):
        parse_config(module.Config, module.GPU, [f"--{flag}={value}"], "")
    zero = ["--size", "cpu", f"--{flag}=0"]
    if flag == "lr":
        with pytest.raises(InputError, match="^--lr 0.0: must be positive; with 0 nothing is lear"):
            parse_config(module.Config, module.GPU, zero, "")
    else:   # beta 0 is the README's experiment
        assert getattr(parse_config(module.Config, module.GPU, zero, ""), flag) == 0


@pytest.mark.parametrize("name, asked", [
    ("gpt", ["--sample", "Once"]), ("sft", ["--prompt", "Why?"]), ("ppo", []),
    ("dpo", ["--prompt", "Why?"])])
def test_a_temperature_of_zero_is_refused(name, asked, tmp_path):
    """--temperature 0 for greedy: a division by zero in the sampler, after the minutes that the
    earlier stages took."""
    argv = ["--size", "cpu", "--out", str(tmp_path), "--temperature", "0", *asked]
    with pytest.raises(InputError, match="^--temperature 0.0: must be at least 0.0001; --top_k 1"):
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
    """`ppo.py --data $FILE` with FILE unset trains on the little world, and best_of_n.py --prompt
    "" measures."""
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
    """--name sft puts the policy where the reference was; --name ../x leaves the folder of the
    outputs."""
    for name in (stage, stage + "2", stage + "-beta0", stage + "_a.b-1"):
        check_name(name, stage)
    for name in ("", other, "sft", "gpt", "reward_model", "best_of_n", f"my-{stage}", stage.upper(),
                 f" {stage}", f"{stage} ", f"{stage}\n", f"../{stage}", f"{stage}/../sft",
                 f"{stage}/x", f"{stage}\\x", f"{stage}\0", f"/{stage}"):
        with pytest.raises(InputError, match="(?s)--name .*must be " + stage):
            check_name(name, stage)


# --------------------------------------------------------------------------------------------------
# Stages that are missing


def trained(out, *names, **values):
    """Put a checkpoint, which holds these values, into the folders of these stages."""
    for name in names:
        (out / "cpu" / name).mkdir(parents=True, exist_ok=True)
        write_torch(out / "cpu" / name / "checkpoint.pt", values)


@pytest.fixture
def calls(monkeypatch):
    """The (script, command line) of every stage that is trained, which takes no time here."""
    calls = []

    def record(name):
        def main(argv):
            calls.append((name, argv))
            print("trains", name)
        return main

    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "main", record(name))
    return calls


RLHF = ["gpt", "sft", "reward_model"]


@pytest.mark.parametrize("there, needed, stage, asked, plan", [
    ([], RLHF, "ppo", RLHF, "gpt → sft → reward_model → ppo, about 7 minutes on two cores"),
    (["gpt"], RLHF, "ppo-beta0", ["sft", "reward_model"],
     "sft → reward_model → ppo-beta0, about 5 minutes on two cores"),
    (["sft"], RLHF, "dpo", ["reward_model"],     # gpt's is not asked for
     "reward_model → dpo, about 4 minutes on two cores"),
    (["reward_model"], RLHF, "ppo", [], ""), (RLHF, RLHF, "ppo", [], ""), ([], [], "gpt", [], ""),
    (["sft"], RLHF, "the curve", ["reward_model"],
     "reward_model → the curve, about 2 minutes on two cores"),
    (RLHF, [*RLHF, "process_model"], "ppo-process", ["process_model"],
     "process_model → ppo-process, about 4 minutes on two cores"),
    (RLHF, [*RLHF, "ppo", "dpo"], "best_of_n", ["ppo", "dpo"],
     "ppo → dpo → best_of_n, about 6 minutes on two cores")])
def test_what_is_missing_is_announced_and_trained(there, needed, stage, asked, plan, calls,
                                                  tmp_path, capsys):
    """Stages in the wrong order, or trained again because one before them was thrown away; minutes
    not told; another seed or folder; a reward model trained in the process model's place."""
    trained(tmp_path, *there)
    for resume in (False, True):
        config = gpt.Config(size="cpu", out=str(tmp_path), seed=7, resume=resume)
        train_missing(config, needed, stage)
        found = capsys.readouterr().out.splitlines()
        assert found[:1] == ([f"plan    {plan}"] if plan else []) and len(found[1:]) == len(asked)
        for name, (script, argv) in zip(asked, calls):
            expected = ["--size", "cpu", "--out", str(tmp_path), "--seed", "7"]
            if resume:
                expected.append("--resume")
            if name == "process_model":
                name = "reward_model"
                expected.append("--process")
            assert (script, argv) == (name, expected)
        calls.clear()
    if asked == RLHF:
        train_missing(gpt.Config(size="gpu", out=str(tmp_path)), needed, stage)
        plan = "plan    gpt → sft → reward_model → ppo\n"    # the minutes are another machine's
        assert capsys.readouterr().out.startswith(plan)


def test_a_stage_that_is_stale_is_refused(calls, tmp_path, capsys):
    """The base model is trained again, and the old SFT model is compared with the new one's loss;
    a base model from another folder that is taken for the one in this folder."""
    trained(tmp_path, "gpt")
    trained(tmp_path / "elsewhere", "gpt", seed=2)
    folder = tmp_path / "cpu/sft"
    base = tmp_path / "cpu/gpt/checkpoint.pt"
    other = tmp_path / "elsewhere/cpu/gpt/checkpoint.pt"
    data = tmp_path / "cpu/gpt/pairs.jsonl"
    data.write_text("{}")
    config = gpt.Config(size="cpu", out=str(tmp_path))
    with Run("sft", folder, config, 1, [other]) as one:
        assert one.made_from() == {}
    with Run("sft", folder, config, 1, [base, data]) as one:
        made_from = one.made_from()
        write_torch(one.folder / "checkpoint.pt", {"made_from": made_from})
        one.finish()
    assert list(made_from) == ["gpt/checkpoint.pt", "gpt/pairs.jsonl"]
    train_missing(config, ["gpt", "sft"], "ppo")
    data.write_text("{}\n")     # policies of several judges may be compared
    capsys.readouterr()
    train_missing(config, ["gpt", "sft"], "ppo")
    assert capsys.readouterr().out == (
        f"note    sft was made from other comparisons than {data} has now\n")
    trained(tmp_path, "gpt", seed=3)
    with pytest.raises(InputError) as error:
        train_missing(config, ["gpt", "sft"], "ppo")
    message = f"{folder / 'checkpoint.pt'}: was made from another {base}; train sft again"
    assert str(error.value) == message
    base.unlink()   # not known to be another one
    train_missing(config, ["gpt", "sft"], "ppo")
    (folder / "checkpoint.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match=f"checkpoint.pt: {BROKEN}"):
        train_missing(config, ["gpt", "sft"], "ppo")
    assert calls == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_train_what_is_missing(name, calls, tmp_path):
    """A script without --resume, in an empty folder, ended in an AttributeError instead of training
    a stage."""
    config = importlib.import_module(name).Config(size="cpu", out=str(tmp_path), seed=7)
    train_missing(config, ["sft"], name)
    assert calls == [("sft", ["--size", "cpu", "--out", str(tmp_path), "--seed", "7"])]


# --------------------------------------------------------------------------------------------------
# The screen


def screen(text):
    """What a terminal shows: "\\r" goes back to the line's beginning, what is written then covers
    what was there."""
    lines = []
    for line in text.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part):]
        lines.append(cells.rstrip())
    return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock to be set: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, clock, monkeypatch):
    """A log file of a thousand lines, or a terminal that shows nothing for minutes; rests of a
    longer line behind a shorter one; a division by zero before anything is done."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    began = clock[0]
    report = progress("texts", 1000)
    shown = []
    for seconds, done in ((0.45, 0), (0.55, 0), (0.8, 7), (31, 0), (33, 50), (60, 99), (62, 100),
                          (90, 1000)):
        clock[0] = began + seconds
        report(done)
        shown.append(screen(stream.getvalue()))
    zero = "texts: 0 of 1,000"
    fifty = "texts: 50 of 1,000, 10:27 left"
    many = "texts: 99 of 1,000, 9:06 left"
    most = "texts: 100 of 1,000, 9:18 left"
    end = "texts: 1,000 in 90 s"
    if terminal:
        assert shown == [[""], [zero], [zero], [zero], [fifty], [many], [most], [end, ""]]
    else:
        assert shown[:3] == [[""]] * 3 and shown[3:6] == [[zero, ""]] * 3
        assert shown[6:] == [[zero, most, ""], [zero, most, end, ""]]
        assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (119.5, "2:00"), (3723, "62:03")])
def test_clock(seconds, text):
    """0:60, because the rest is rounded and not the whole."""
    assert run.clock(seconds) == text


def test_counts_are_words():
    """A dict with braces and quotes in a line for people."""
    assert run.counts({"equal texts": 0, "longer than the context": 3}) == (
        "0 equal texts, 3 longer than the context")


# --------------------------------------------------------------------------------------------------
# A run's steps and figures


def test_figures_are_means_since_the_last_row():
    """A short last batch that counts as much as a full one; figures from before the last row in the
    next one; a figure that few steps have, divided by all steps; a graph that is kept alive."""
    one = SilentRun(report=2)
    weight = torch.ones((), requires_grad=True)
    due = []
    for step in one.steps(5):
        one.log(step, weight=torch.tensor(3), loss=weight * step)
        one.log(step, loss=10.0)    # weight 1
        if one.due(step):
            due.append(step)
            one.log(step, held_out=float(step))
        if step == 2:
            one.log(step, rare=7)
        for values in one.pending.values():
            assert not any(torch.is_tensor(value) and value.requires_grad for value, _ in values)
    assert due == [1, 3, 4]
    assert untimed(one.rows) == [
        {"step": 2, "loss": (3 * (0 + 1) + 2 * 10) / 8, "held_out": 1.0},
        {"step": 4, "loss": (3 * (2 + 3) + 2 * 10) / 8, "rare": 7.0, "held_out": 3.0},
        {"step": 5, "loss": (3 * 4 + 10) / 4, "held_out": 4.0}]

    silent = SilentRun()    # one row, at the end
    for step in silent.steps(3):
        silent.log(step, loss=step)
    assert untimed(silent.rows) == [{"step": 3, "loss": 1.0}]


def test_loops_of_one_run_continue_counting():
    """Round 2 whose rows bear the numbers of round 1, or whose learning rate starts again."""
    one = SilentRun(report=2, total=5)
    steps = []
    for loop in (3, 2):
        for step in one.steps(loop):
            steps.append((one.before, step, one.total))
            one.log(step, loss=step)
        one.record(round=loop)
    assert steps == [(0, 0, 5), (0, 1, 5), (0, 2, 5), (3, 0, 5), (3, 1, 5)]
    assert untimed(one.rows) == [
        {"step": 2, "loss": 0.5}, {"step": 3, "loss": 2.0}, {"step": 3, "round": 3},
        {"step": 4, "loss": 0.0}, {"step": 5, "loss": 1.0}, {"step": 5, "round": 2}]


def test_a_runs_figures(tmp_path, clock, monkeypatch, capsys):
    """A figure that is neither printed nor written; "0:60" left, or time that was never left; 1.000
    for 100 %; seconds of one part of a step counted to another."""
    monkeypatch.setattr(run, "peak_memory", lambda: {"memory_mb": 5.0})
    folder = tmp_path / "new" / "stage"
    unprinted = ("hidden", "absent", "rollout_s", "update_s")
    rows = [{"step": 6, "loss": 0.5, "hidden": 7.0, "rollout_s": 1.0, "update_s": 1.5, "lr": 1.5e-5,
             "tall_name": -12.0, "excess": 0.25, "seconds": 159.25, "memory_mb": 5.0},
            {"step": 8, "loss": 0.25, "hidden": 7.0, "rollout_s": 1.0, "update_s": 1.5, "lr": 0.0,
             "tall_name": 3.0, "excess": 0.0625, "seconds": 180.0, "memory_mb": 5.0},
            {"step": 8, "unseen": 1.0, "seconds": 180.0, "memory_mb": 5.0}]
    # 149.25 s for 5 steps: 59.7 for the 2 that are left.
    ends = [110.0, 120.0, 130.0, 140.0, 150.0, 259.25, 270.0, 280.0]

    with Run("gpt", folder, gpt.Config(), 6, unprinted=unprinted) as one:
        for step in one.steps(8):
            one.log(step, loss=0.5 if step < 6 else 0.25, hidden=torch.tensor(7.0))
            clock[0] += 1
            one.time("rollout_s")
            clock[0] += 1.5
            one.time("update_s")
            one.note("once")
            if one.due(step):
                row = rows[step // 6]
                one.log(step, lr=row["lr"], tall_name=row["tall_name"], excess=row["excess"])
            clock[0] = ends[step]
        one.record(unseen=1.0)
        assert one.rows == rows == metrics(one.folder / "metrics.jsonl")
        assert one.figures() == untimed(rows)
    assert capsys.readouterr().out.splitlines() == [
        "note    once",
        "                                tall",
        "     step     loss       lr     name   excess   left",
        "   6/8       0.500  1.5e-05  -12.000    25.0%   1:00",
        "   8/8       0.250  0.0e+00    3.000     6.2%   0:00"]
    with Run("gpt", folder, gpt.Config(), 6) as one:    # the figures of a new run alone
        assert metrics(one.folder / "metrics.jsonl") == []


def test_time_left_after_a_break(tmp_path, clock, capsys):
    """The hours before the break counted as if they had gone into the steps since."""
    for seconds, stop, resume in ((60, 4, False), (2, 8, True)):
        with Run("gpt", tmp_path, gpt.Config(resume=resume), 1, save=4) as one:
            clock[0] += 100     # before the first step: weights, data
            for step in one.steps(10):
                if step == stop:
                    break
                clock[0] += seconds
                one.log(step, loss=1.0)
        clock[0] += 10_000
    rows = [line for line in capsys.readouterr().out.splitlines() if "/10 " in line]
    assert [row.split()[-1] for row in rows] == [
        "24:00", "8:00", "7:00", "6:00", "7:22", "0:08", "0:06", "0:04"]


def test_metrics_are_whole_lines_at_any_time(tmp_path, monkeypatch):
    """Half a line, because the disk was full or the power went: json.loads fails on the night's
    figures."""
    with Run("gpt", tmp_path, gpt.Config(), 100) as one:
        one.record(loss=3.0)
        path = one.folder / "metrics.jsonl"
        before = path.read_bytes()
        assert before.endswith(b"}\n")

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError):
            one.record(loss=2.0)
        assert path.read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


# --------------------------------------------------------------------------------------------------
# A run's folder. With whole stages, and real kills: tests/test_resume.py.


def small_run(folder, text, stop=None, resume=False):
    """A Run of 3 steps that leaves a.txt and b.txt, each with this text; KeyboardInterrupt after
    step `stop`."""
    with Run("gpt", folder, gpt.Config(resume=resume), 1) as one:
        (one.folder / "a.txt").write_text(text)
        for step in one.steps(3):
            if step == stop:
                raise KeyboardInterrupt
            one.log(step, loss=len(text))
        (one.folder / "b.txt").write_text(text)
        one.finish()


def check_left(folder, text):
    """A small_run with this text is what has left the files in the folder, and all of them."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert files == ["a.txt", "b.txt", "lock", "metrics.jsonl"]
    assert (folder / "a.txt").read_text() == text == (folder / "b.txt").read_text()
    rows = [{"step": step, "loss": float(len(text))} for step in (1, 2, 3)]
    assert untimed(metrics(folder / "metrics.jsonl")) == rows


def test_files_change_together_when_a_run_has_finished(tmp_path):
    """A run that is begun and dropped: its figures lie beside the checkpoint of the one before it,
    or none."""
    small_run(tmp_path, "first")
    check_left(tmp_path, "first")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for stop, resume in ((1, False), (2, True), (1, False)):    # continued; dropped for another one
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path, "second", stop, resume)
        assert {path: path.read_bytes() for path in before} == before
        assert len(os.listdir(tmp_path)) == 5
        if resume:
            (tmp_path / "unfinished/c.txt").write_text("of the run that is then dropped")
    small_run(tmp_path, "second", resume=True)
    check_left(tmp_path, "second")
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("who", ["a reader", "the next stage", "the next run"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_that_was_killed_while_its_files_were_moved_up(n, who, tmp_path, monkeypatch):
    """a.txt of one run beside the b.txt of another: the policy of one seed with the comparisons of
    the other."""
    folder = tmp_path / "cpu/sft"
    small_run(folder, "first")
    moves = []
    replace = os.replace

    def killed(source, target):
        if Path(source).parent.name == "finished":
            moves.append(source)
            if len(moves) == n:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        small_run(folder, "second")
    assert len(moves) == n and (folder / "finished").exists()
    if who == "a reader":
        complete(folder)
    elif who == "the next stage":
        trained(tmp_path, "sft")
        train_missing(gpt.Config(size="cpu", out=str(tmp_path)), ["sft"], "ppo")
        (folder / "checkpoint.pt").unlink()
    else:
        with pytest.raises(KeyboardInterrupt):
            small_run(folder, "third", stop=1)
    check_left(folder, "second")
    assert not (folder / "finished").exists()


def test_nothing_is_completed_behind_a_runs_back(tmp_path):
    """A reader that takes the files away from under the run that moves them; a lock in a folder
    that isn't there."""
    complete(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished/a.txt").write_text("second")
    with lock_folder(tmp_path), pytest.raises(InputError, match="another run is using this folder"):
        complete(tmp_path)
    assert not (tmp_path / "a.txt").exists()
    for _ in range(2):
        complete(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["a.txt", "lock"]
        assert (tmp_path / "a.txt").read_text() == "second"


# --------------------------------------------------------------------------------------------------
# The file of documents


def some_documents():
    """Lists of ids, of lengths 0 to 40."""
    rng = random.Random(24)
    documents = []
    for _ in range(50):
        documents.append([rng.randrange(1472) for _ in range(rng.randint(0, 40))])
    return documents + [[7]]


def test_documents_from_the_file_are_those_that_were_drawn(tmp_path):
    """A second run that draws for minutes again, or that reads documents cut at the wrong
    places."""
    path = tmp_path / "new" / "documents.npy"
    drawn = []

    def draw():
        drawn.append(some_documents())
        return drawn[-1]

    first = memory_mapped(path, draw)
    second = memory_mapped(path, draw)
    assert len(drawn) == 1 and drawn[0] == some_documents()
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in second] == some_documents()
    assert os.listdir(path.parent) == [path.name]
    batch = [ids for ids in second if len(ids)][:9]     # what training does with them
    expected = [ids for ids in some_documents() if ids][:9]
    for ours, theirs in zip(gpt.pad(batch), gpt.pad(expected)):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_writing_to_the_views_leaves_the_file_alone(tmp_path):
    """A batch changed in place that changes the file too, or torch's warning of memory that must
    not be written."""
    path = tmp_path / "documents.npy"
    ids = memory_mapped(path, some_documents)[-1]
    before = path.read_bytes()
    torch.as_tensor(ids)[0] = 9
    assert ids.tolist() == [9] and path.read_bytes() == before


def test_a_file_of_documents_that_is_not_whole(tmp_path):
    """A disk that was full: training on the documents that are left, or on the next document's
    tokens."""
    path = tmp_path / "documents.npy"
    memory_mapped(path, some_documents)
    whole = path.read_bytes()
    numbers = np.frombuffer(whole, np.int32)
    contents = [whole[:n] for n in (0, 1, 4, 8, 12, len(whole) // 2, -4, -1)]
    contents += [bytes(5000), whole + bytes(4), whole + whole]
    for wrong in (np.delete(numbers, 0), numbers + 1, numbers.astype(np.int64)):
        contents.append(wrong.tobytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            memory_mapped(path, some_documents)
        message = str(error.value)
        assert BROKEN in message and str(path) in message and "\n" not in message
        assert path.read_bytes() == content     # the user is told; nothing is thrown away


def test_a_flipped_bit_in_a_file_of_documents(tmp_path):
    """A bad disk: another token, or lengths by which every text begins in the middle of another
    one, and no word of it; a traceback out of the parser of a file format."""
    path = tmp_path / "documents.npy"
    memory_mapped(path, lambda: [[3, 1, 4], [], [1471, 0], [2 ** 31 - 1, 9]])
    whole = path.read_bytes()
    flips = [(0, bit) for bit in range(8)]
    flips += [(position, position % 8) for position in range(len(whole))]
    for position, bit in flips:
        content = bytearray(whole)
        content[position] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            memory_mapped(path, None)
        message = str(error.value)
        assert message.startswith(f"{path}: {BROKEN} (checksum error); ") and "\n" not in message


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


@pytest.mark.parametrize("error, message", [
    (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
    (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
    (OSError(22, "Invalid argument"), f"{BROKEN} ([Errno 22] Invalid argument); delete it and x"),
    (ValueError("its values are none"), f"{BROKEN} (its values are none); delete it and x"),
])
def test_only_damage_is_called_damage(tmp_path, error, message):
    """ "not a whole file ...; delete it and train the stage again" of a file without the right to
    read it: who obeys loses a good checkpoint."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError) as found:
        with refused_if_broken(path, "x"):
            raise error
    assert str(found.value) == f"{path}: {message}"


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_not_called_damage(tmp_path, error):
    """A checkpoint that does not fit the GPU beside another program's memory: "delete it"."""
    with pytest.raises(type(error)) as found:
        with refused_if_broken(tmp_path / "checkpoint.pt", "train the stage again"):
            raise error
    assert found.value is error


def test_files_of_the_users_own_beside_those_of_rounds(tmp_path):
    """pairs-mine.jsonl in the folder of online DPO: a traceback after all was saved."""
    for name in ("pairs-1", "pairs-2", "pairs-mine"):
        (tmp_path / f"{name}.jsonl").touch()
    run.forget_rounds(tmp_path, "pairs", 1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["pairs-1", "pairs-mine"]
