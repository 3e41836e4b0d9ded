"""Runs that are killed, interrupted, starved of disk or fed a damaged state, and go on bit for bit.

Every test says which bug it is for. The scripts run in processes of their own, forked from a server that has imported
torch already: each starts in milliseconds, and may kill itself, run out of disk, or lose its rights.
"""

import contextlib
import copy
import ctypes
import errno
import functools
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer would import it, in every process again

import dpo
import gpt
import ppo
import reward_model
import sft
from data.files import InputError
from data.run import Run, read_torch, restore, train_missing, write_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import metrics, short_demonstrations, snapshot, untimed

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"gpt": gpt, "sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}
FLAGS = {
    "gpt": "--n_layer 1 --n_head 2 --n_embd 32 --steps 15 --batch 8 --warmup 2 --report 4",
    "sft": "--data {data} --batch 16 --lr 1e-2 --max_new_tokens 16 --report 10",
    "reward_model": "--pairs 32 --held_out 8 --batch 4 --max_new_tokens 16 --report 3",
    "ppo": "--iterations 4 --rollouts 8 --minibatch 4 --epochs 2 --max_new_tokens 16 --kl_target 3 --lr 1e-3 --save 2",
    "dpo": "--batch 4 --max_new_tokens 16 --report 3"}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Bit for bit is promised on the CPU only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


# ----------------------------------------------------------------------------------------------------------------------
# A script in a process of its own

CONTEXT = multiprocessing.get_context("forkserver")
CALLS = {"step": (torch.optim.AdamW, "step"), "write": (os, "fsync"), "replace": (os, "replace"),
         "move": (os, "replace"), "rename": (os, "rename"), "unlink": (Path, "unlink"), "rmdir": (Path, "rmdir")}


@pytest.fixture(scope="module", autouse=True)
def server():
    """The server finds this module, and torch with it, by PYTHONPATH: before Python 3.14 it looks nowhere else. A process
    that has seen a GPU could not be forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        CONTEXT.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def at_call(what, n, *signals):
    """The n-th call of what in this process sends it the signals. "write" dies with half of the file written; "move"
    counts the files only that take their places when a run is over."""
    (owner, name), calls = CALLS[what], itertools.count(1)
    original = getattr(owner, name)

    def patched(*arguments, **keywords):
        if (what != "move" or Path(arguments[0]).parent.name == "finished") and next(calls) == n:
            if what == "write":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            for number in signals:
                os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    setattr(owner, name, patched)


def no_room_for(size):
    """Every write beyond this many bytes of a file fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_privileges():
    """Even root may write only where the permissions say so: all capabilities are given up."""
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def child(stage, argv, setup, logs):
    """`python STAGE.py ARGV`, after setup()."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    torch.set_num_threads(1)
    setup()
    sys.argv = [f"{stage}.py", *argv]
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def start(stage, argv, setup, logs):
    process = CONTEXT.Process(target=child, args=(stage, argv, setup, logs))
    process.start()
    return process


def run(stage, argv, out, *setup):
    """Run it to its end: (exit status, negative for a signal, stdout, stderr)."""
    process = start(stage, argv, functools.partial(*setup) if setup else int, out)
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode, (out / "stdout").read_text(), (out / "stderr").read_text()


def real_process(*argv):
    """`python ARGV` from a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The chain, run once without a stop


def arguments(stage, out, data):
    return ["--size", "cpu", "--out", str(out), *FLAGS[stage].format(data=data).split()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder in which every stage ran without a stop, with what each has printed; nobody may write to it."""
    out = tmp_path_factory.mktemp("chain")
    short_demonstrations(out / "demonstrations.jsonl")
    for stage, module in MODULES.items():
        with open(out / f"{stage}.txt", "w") as screen, contextlib.redirect_stdout(screen):
            module.main(arguments(stage, out, out / "demonstrations.jsonl"))
    return out


def before(stage, chain, tmp_path):
    """A folder where all stages but this one are finished: (folder, its command line)."""
    out = tmp_path / "out"
    for earlier in itertools.takewhile(lambda name: name != stage, MODULES):
        shutil.copytree(chain / "cpu" / earlier, out / "cpu" / earlier)
    out.mkdir(exist_ok=True)
    return out, arguments(stage, out, chain / "demonstrations.jsonl")


def read_metrics(folder):
    rows = metrics(folder / "metrics.jsonl")
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    return untimed(rows)


def same(a, b):
    """Equal in type and value, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(x, y) for x, y in zip(a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


OLD = b"of an earlier run"


def an_earlier_run(folder, reference):
    """Put the files into a folder that a finished run leaves there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in left_behind(reference):
        (folder / name).write_bytes(OLD)


def left_behind(folder):
    """The files of a finished run: not its lock, and not the tokens of a text, which every run of these settings may read."""
    return [path.name for path in folder.iterdir()
            if path.is_file() and not path.name.startswith(("lock", "documents-", "text-"))]


def check_finished(folder, reference):
    """The files of both folders are the same, all of one run, and nothing else is left behind."""
    found, expected = (read_torch(path / "checkpoint.pt") for path in (folder, reference))
    assert found["metrics"] == untimed(metrics(folder / "metrics.jsonl")) and same(found, expected)
    assert read_metrics(folder) == read_metrics(reference)
    for name in set(left_behind(reference)) - {"checkpoint.pt", "metrics.jsonl"}:
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(reference))


def check_unfinished(folder, reference):
    """What a killed run leaves is whole: the files of the run before it; a state that loads, figures that are the first
    ones of the unbroken run."""
    for name in left_behind(folder):
        assert (folder / name).read_bytes() == OLD
    unfinished = folder / "unfinished"
    if (unfinished / "state.pt").exists():
        state, rows = read_torch(unfinished / "state.pt"), read_metrics(unfinished)
        assert rows == read_metrics(reference)[:len(rows)]
        assert len(state["rows"]) <= len(rows) <= len(state["rows"]) + 2
    if (unfinished / "checkpoint.pt").exists():
        found, expected = (read_torch(path / "checkpoint.pt") for path in (unfinished, reference))
        assert untimed(found.pop("metrics")) == untimed(expected.pop("metrics")) and same(found, expected)
    assert len(list(folder.rglob("*.tmp"))) <= 1


def check_over(folder, reference):
    """A run that was killed while its files took their places: the next stage finds them in their places."""
    assert (folder / "finished").exists() and not (folder / "unfinished").exists()
    earlier = {folder.name: lambda argv: pytest.fail("is trained again")}
    train_missing(gpt.Config(size="cpu", out=str(folder.parent.parent)), earlier, "the next stage")
    check_finished(folder, reference)


# ----------------------------------------------------------------------------------------------------------------------
# Kill it anywhere


@pytest.mark.parametrize("stage", MODULES)
def test_killed_anywhere_it_goes_on_bit_for_bit(stage, chain, tmp_path):
    """A momentum, a half-averaged loss, an adapted beta or a generator's state that nobody saved: resumed runs differ.
    A finished run that is lost, or half of it, to one that is not yet over."""
    (out, argv), rng = before(stage, chain, tmp_path), random.Random(f"kills of {stage}")
    folder, reference = out / "cpu" / stage, chain / "cpu" / stage
    an_earlier_run(folder, reference)
    resume = []
    for what, most in (("step", 7), ("write", 3), ("step", 9), ("replace", 5), ("step", 3), ("rename", 1)):
        status, _, stderr = run(stage, argv + resume, out, at_call, what, rng.randint(1, most), signal.SIGKILL)
        assert status == -signal.SIGKILL and stderr == ""
        check_unfinished(folder, reference)
        resume = ["--resume"]
    n = rng.randint(1, len(left_behind(reference)))
    assert run(stage, argv + resume, out, at_call, "move", n, signal.SIGKILL)[0] == -signal.SIGKILL
    check_over(folder, reference)


def test_killed_in_the_middle_of_every_write(chain, tmp_path):
    """Half a checkpoint in the old one's place, a state without its figures, a .tmp file that stays for ever; a
    checkpoint beside the figures of another run."""
    (out, argv), folder, reference = before("dpo", chain, tmp_path), tmp_path / "out/cpu/dpo", chain / "cpu/dpo"
    counts = {}
    for what in ("write", "replace", "rename", "unlink", "rmdir"):
        for n in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            an_earlier_run(folder, reference)
            status, _, stderr = run("dpo", argv, out, at_call, what, n, signal.SIGKILL)
            if status == 0:
                break
            assert status == -signal.SIGKILL and stderr == ""
            counts[what] = n
            if (folder / "finished").exists():
                check_over(folder, reference)
                continue
            assert len(list(folder.rglob("*.tmp"))) == (what in ("write", "replace"))
            check_unfinished(folder, reference)
            if n <= 2 and what in ("write", "replace"):    # no state is there yet
                with pytest.raises(InputError, match="is finished, nothing to resume"):
                    dpo.main([*argv, "--resume"])
                dpo.main(argv)
            else:
                dpo.main([*argv, "--resume"])
            check_finished(folder, reference)
        check_finished(folder, reference)
    # 2 writes at the start, 2 a report, the checkpoint; 2 files that take their places, and 2 that are of no use any more.
    assert counts == {"write": 9, "replace": 11, "rename": 1, "unlink": 2, "rmdir": 1}


LONG = "--vocab_size 280 --block_size 32 --n_layer 1 --n_head 2 --n_embd 32 --steps 600 --batch 8 --report 10".split()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """(folder, command line but for --out) of a run of a second on a text, with 60 reports."""
    out = tmp_path_factory.mktemp("long")
    (out / "corpus.txt").write_text("The fox had a kite. The hen had a drum, and the kite flew over the hill.\n" * 40)
    argv = ["--size", "cpu", "--text", str(out / "corpus.txt"), *LONG]
    gpt.main([*argv, "--out", str(out)])
    return out / "cpu/gpt", argv


def wait_for(condition):
    """Wait until it is true, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_from_outside(long_run, tmp_path):
    """kill -9, the out-of-memory killer, a power cut: they come at a moment that no test has thought of."""
    (reference, argv), rng, resume = long_run, random.Random(3), []
    screen = tmp_path / "stdout"
    for _ in range(3):
        process, count = start("gpt", [*argv, "--out", str(tmp_path), *resume], int, tmp_path), rng.randint(1, 8)
        wait_for(lambda: screen.exists() and screen.read_text().count("/600 ") >= count)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        check_unfinished(tmp_path / "cpu/gpt", reference)
        screen.unlink()
        resume = ["--resume"]
    gpt.main([*argv, "--out", str(tmp_path), "--resume"])
    check_finished(tmp_path / "cpu/gpt", reference)


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_in_a_terminal(long_run, tmp_path, capsys):
    """A traceback, a step that is lost, a run that cannot be gone on with or that nobody is told how to."""
    reference, argv = long_run
    process = real_process("gpt.py", *argv, "--out", tmp_path)
    while "/600 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    step = read_torch(tmp_path / "cpu/gpt/unfinished/state.pt")["step"]
    assert process.returncode == 130 and 10 <= step < 600 and "stops after this step (press again" in stdout
    assert stderr == f"gpt.py: gpt: saved after step {step} of 600; --resume goes on\n"
    gpt.main([*argv, "--out", str(tmp_path), "--resume"])
    assert f"gpt: goes on after step {step}\n" in capsys.readouterr().out
    check_finished(tmp_path / "cpu/gpt", reference)


@pytest.mark.parametrize("stage", MODULES)
def test_ctrl_c_finishes_the_step(stage, chain, tmp_path):
    """Ctrl-C between two saves: the steps since the last one are lost, or half of a PPO iteration is saved."""
    out, argv = before(stage, chain, tmp_path)
    folder = out / "cpu" / stage
    an_earlier_run(folder, chain / "cpu" / stage)
    # PPO takes 8 steps an iteration, 2 models times 2 epochs times 2 minibatches: the 11th stands in the second one.
    status, stdout, stderr = run(stage, argv, out, at_call, "step", 11 if stage == "ppo" else 5, signal.SIGINT)
    step = 2 if stage == "ppo" else 5
    assert status == 130 and "stops after this step" in stdout and "saved " not in stdout
    assert f"{stage}.py: {stage}: saved after step {step} of " in stderr and stderr.endswith("; --resume goes on\n")
    assert stderr.count("\n") == 1 and read_torch(folder / "unfinished/state.pt")["step"] == step
    check_unfinished(folder, chain / "cpu" / stage)
    MODULES[stage].main([*argv, "--resume"])
    check_finished(folder, chain / "cpu" / stage)


def test_ctrl_c_twice_stops_at_once(chain, tmp_path):
    """A step of an hour, and no way out but kill -9."""
    out, argv = before("dpo", chain, tmp_path)
    status, stdout, stderr = run("dpo", argv, out, at_call, "step", 5, signal.SIGINT, signal.SIGINT)
    assert status == 130 and "stops after this step" in stdout and stderr == "dpo.py: interrupted\n"
    assert read_torch(out / "cpu/dpo/unfinished/state.pt")["step"] == 3
    dpo.main([*argv, "--resume"])
    check_finished(out / "cpu/dpo", chain / "cpu/dpo")


@pytest.mark.parametrize("what, n", [
    ("step", 1), ("replace", 2), ("replace", 9), ("step", 8), ("rename", 1), ("move", 2)])
def test_ctrl_c_at_the_edges(chain, tmp_path, what, n):
    """In the first step or the last, or while a file is written or moved: nothing to save yet, or nothing to do."""
    out, argv = before("dpo", chain, tmp_path)
    status, _, stderr = run("dpo", argv, out, at_call, what, n, signal.SIGINT)
    assert status == 130 and stderr.count("\n") == 1 and not list(out.rglob("*.tmp"))
    if what == "move":
        return check_over(out / "cpu/dpo", chain / "cpu/dpo")
    check_unfinished(out / "cpu/dpo", chain / "cpu/dpo")
    assert run("dpo", [*argv, "--resume"], out)[0] == 0
    check_finished(out / "cpu/dpo", chain / "cpu/dpo")


def test_ctrl_c_is_as_before_after_a_run(chain, tmp_path):
    """A program that calls a stage, and whose own Ctrl-C is gone afterwards."""
    out, argv = before("dpo", chain, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    dpo.main(argv)
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(InputError, match="finished"):
        dpo.main([*argv, "--resume"])
    assert signal.getsignal(signal.SIGINT) is handler


# ----------------------------------------------------------------------------------------------------------------------
# Reproducible


def test_two_runs_of_the_chain_are_equal_and_global_generators_are_left_alone(chain, tmp_path):
    """A result that hangs on what ran before; a library that reseeds its user's generators behind his back."""
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    python, numpy = random.getstate(), np.random.get_state()
    for stage, module in MODULES.items():
        module.main(arguments(stage, tmp_path, chain / "demonstrations.jsonl"))
        assert random.getstate() == python and str(np.random.get_state()) == str(numpy), stage
        assert torch.initial_seed() == 7, stage  # new weights are drawn from torch's, but it is never reseeded
        check_finished(tmp_path / "cpu" / stage, chain / "cpu" / stage)


# ----------------------------------------------------------------------------------------------------------------------
# The rows on the screen

LARGE = dict(loss=123.456, held_out=12.345, excess=9.999, accuracy=1.0, held_out_accuracy=1.0, lr=1.5e-5, reward=-99.99,
             gold=-99.99, kl=1234.56, J=-234.56, value_explained=-1234.56, clip_fraction=1.0, length=1024.0, no_end=1.0,
             margin=-123.45, chosen_log_ratio=-1234.56, rejected_log_ratio=-12345.67, grad_norm=1234.56)


def names_of(heading):
    """The names above the columns, each with the place where its column ends."""
    upper, lower = ({match.end(): match.group() for match in re.finditer(r"\S+", line)} for line in heading)
    assert set(upper) <= set(lower)
    return {end: (f"{upper[end]}_" if end in upper else "") + name for end, name in lower.items()}


@pytest.mark.parametrize("stage", MODULES)
def test_every_row_fits_the_screen(stage, chain, tmp_path, capsys):
    """A row that a terminal breaks in two, or a figure that stands below the name of another one."""
    lines = (chain / f"{stage}.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r" *\d+/\d+ ", line))
    heading, rows = lines[first - 2:first], [line for line in lines if re.match(r" *\d+/\d+ ", line)]
    names = names_of(heading)
    figures = metrics(chain / "cpu" / stage / "metrics.jsonl")
    assert list(names.values())[0] == "step" and list(names.values())[-1] == "left"
    assert set(names.values()) <= {*figures[0], "left"} and len(names) > 4 and len(rows) > 1

    with Run("gpt", tmp_path, gpt.Config(), every=100) as one:      # the same row with large figures, in the last step
        one.total, one.start = 1000, one.start - 50_000
        one(999, **{name: LARGE.get(name, 99.999) for name in names.values() if name not in ("step", "left")})
    *large_heading, large = capsys.readouterr().out.splitlines()
    assert large_heading == heading
    for row in [*heading, *rows, large]:
        assert len(row) <= 100
    for row in [*rows, large]:
        ends = [match.end() for match in re.finditer(r"\S+", row)]
        assert ends[1:] == list(names)[1:] and ends[0] <= list(names)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers gone wrong


def poison(monkeypatch, module, n, what):
    """The n-th optimizer step gets a loss or a gradient that is not a number; it must leave the weights as they are."""
    real, calls = gpt.optimizer_step, itertools.count(1)

    def step(optimizer, model, lr, loss):
        if next(calls) != n:
            return real(optimizer, model, lr, loss)
        if what == "loss":
            loss = loss * math.nan
        else:
            next(model.parameters()).grad[0, 0] = {"nan": math.nan, "inf": math.inf}[what]
        weights = copy.deepcopy(model.state_dict())
        try:
            return real(optimizer, model, lr, loss)
        finally:
            assert same(model.state_dict(), weights)

    monkeypatch.setattr(module, "optimizer_step", step)


@pytest.mark.parametrize("stage", MODULES)
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(stage, chain, tmp_path, monkeypatch):
    """A night of steps on weights that are all NaN, saved over the last good ones."""
    out, argv = before(stage, chain, tmp_path)
    folder, (module, steps) = out / "cpu" / stage, (MODULES[stage], 8 if stage == "ppo" else 1)
    an_earlier_run(folder, chain / "cpu" / stage)
    every = {"gpt": 4, "sft": 10, "ppo": 2}.get(stage, 3)
    for what, n, step, resume in (("nan", 1, 1, []), ("inf", every * steps + steps, every + 1, []),
                                  ("loss", 2 * steps, every + 2, ["--resume"])):
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
            poison(patch, module, n, what)
            module.main(argv + resume)
        message = str(error.value)
        assert message.startswith(f"{stage}, step {step}: loss ") and "\n" not in message
        assert "gradient norm " in message and "no step taken" in message and ("nan" in message or "inf" in message)
        saved = read_torch(folder / "unfinished/state.pt")
        if step == 1:
            assert message.endswith("last figures: none yet") and saved["step"] == 0
        else:
            last = step - 1 if stage == "ppo" else every
            assert f"last figures: step {last}, " in message and saved["step"] == (step - 1) // every * every
        check_unfinished(folder, chain / "cpu" / stage)
        assert all(tensor.isfinite().all() for tensor in saved.get("model", saved.get("policy", {})).values())
    module.main([*argv, "--resume"])
    check_finished(folder, chain / "cpu" / stage)


def test_a_policy_that_cannot_be_sampled_stops_the_run(chain, tmp_path, monkeypatch):
    """NaN among the probabilities: the sampler takes some token, the reward model scores it, and PPO goes on."""
    (out, argv), real, calls = before("ppo", chain, tmp_path), gpt.generate, itertools.count(1)

    def generate(model, *arguments, **keywords):
        if next(calls) == 4:
            model.wte.weight.data[3] = math.nan
        return real(model, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(ppo, "generate", generate)
        ppo.main(argv)
    assert str(error.value).startswith("ppo, step 4: the model's probabilities are not finite")
    assert "last figures: step 3, gold " in str(error.value) and "\n" not in str(error.value)
    assert not (out / "cpu/ppo/checkpoint.pt").exists() and read_torch(out / "cpu/ppo/unfinished/state.pt")["step"] == 2
    ppo.main([*argv, "--resume"])
    check_finished(out / "cpu/ppo", chain / "cpu/ppo")


def test_broken_weights_of_an_earlier_stage_are_one_line(chain, tmp_path):
    """NaN in the SFT model's checkpoint: forty lines of traceback in the stage that meets it first."""
    out, argv = before("dpo", chain, tmp_path)
    checkpoint = read_torch(out / "cpu/sft/checkpoint.pt")
    checkpoint["model"]["ln_f.weight"][0] = math.nan
    torch.save(checkpoint, out / "cpu/sft/checkpoint.pt")
    status, _, stderr = run("dpo", argv, out)
    assert status == 1 and stderr.startswith("dpo.py: dpo, step 1: loss nan, ") and stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Two runs in one folder, a full disk, a read-only folder


def test_a_second_run_in_one_folder_is_refused(chain, tmp_path):
    """Two runs that write to one folder: a checkpoint of one, figures of both, the .tmp file of the first lost."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    (tmp_path / "logs").mkdir()
    process = start("dpo", argv, functools.partial(at_call, "step", 5, signal.SIGSTOP), tmp_path / "logs")
    try:
        figures = folder / "unfinished/metrics.jsonl"
        wait_for(lambda: figures.exists() and figures.read_text())
        time.sleep(0.2)
        (folder / "unfinished/state.pt.1.tmp").write_bytes(b"the first run is writing this")
        found = snapshot(folder)
        for flags in ([], ["--resume"]):
            status, _, stderr = run("dpo", argv + flags, out)
            assert status == 1 and stderr.startswith(f"dpo.py: {folder}: another run is using this folder; wait for it")
            assert stderr.count("\n") == 1
        assert snapshot(folder) == found
    finally:
        process.kill()
        process.join(60)
    dpo.main([*argv, "--resume"])  # the lock died with its process
    check_finished(folder, chain / "cpu/dpo")


def test_a_run_that_was_refused_gives_its_folder_back(chain, tmp_path):
    """A notebook keeps the last traceback, which keeps the lock: the next cell is told that another run is there."""
    out, argv = before("dpo", chain, tmp_path)
    assert run("dpo", argv, out, at_call, "step", 5, signal.SIGKILL)[0] == -signal.SIGKILL
    with pytest.raises(InputError, match="--lr") as kept:
        dpo.main([*argv, "--resume", "--lr", "0.5"])
    dpo.main([*argv, "--resume"])
    check_finished(out / "cpu/dpo", chain / "cpu/dpo")
    assert kept


def test_a_full_disk(chain, tmp_path):
    """The disk is full: the old checkpoint is gone, half of the new one is there, and Python prints forty lines."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    an_earlier_run(folder, chain / "cpu/dpo")
    size = (chain / "cpu/dpo/checkpoint.pt").stat().st_size  # the state, with two moments for each weight, is larger
    for resume in ([], ["--resume"]):
        status, _, stderr = run("dpo", argv + resume, out, no_room_for, size)
        assert status == 1 and stderr.startswith(f"dpo.py: {folder}") and stderr.count("\n") == 1
        assert os.strerror(errno.EFBIG) in stderr and not list(folder.rglob("*.tmp"))
        check_unfinished(folder, chain / "cpu/dpo")
        assert read_torch(folder / "unfinished/state.pt")["step"] == 0
    dpo.main([*argv, "--resume"])  # somebody made room
    check_finished(folder, chain / "cpu/dpo")


def test_a_read_only_folder(chain, tmp_path):
    """A folder of somebody else's: a traceback, or a run that notices after hours that it cannot save."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    try:
        for made in (False, True):
            if made:
                shutil.copytree(chain / "cpu/dpo", folder)
            found = snapshot(out / "cpu")
            for path in [out / "cpu", folder][:1 + made]:
                path.chmod(0o555)
            status, stdout, stderr = run("dpo", argv, out, without_privileges)
            assert status == 1 and stderr.count("\n") == 1 and stderr.startswith(f"dpo.py: {folder}")
            assert stderr.endswith(": Permission denied\n") and "/8 " not in stdout and snapshot(out / "cpu") == found
    finally:
        for path in (out / "cpu", folder):
            if path.exists():
                path.chmod(0o755)


# ----------------------------------------------------------------------------------------------------------------------
# What --resume refuses, and what it says


def interrupted(stage, chain, tmp_path, n=5):
    out, argv = before(stage, chain, tmp_path)
    assert run(stage, argv, out, at_call, "step", n, signal.SIGKILL)[0] == -signal.SIGKILL
    return out, argv, out / "cpu" / stage


@pytest.mark.parametrize("stage, flags, began", [
    ("dpo", "--lr 0.001", "--lr 0.0002"), ("dpo", "--seed 2", "--seed 1"), ("dpo", "--batch 5", "--batch 4"),
    ("dpo", "--report 1", "--report 3"), ("dpo", "--beta 0.7", "--beta 0.2"), ("sft", "--epochs 2", "--epochs 1")])
def test_other_settings_are_refused(stage, flags, began, chain, tmp_path):
    """Half of a run with one learning rate and half with another, under the name of one of them."""
    out, argv, folder = interrupted(stage, chain, tmp_path)
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        MODULES[stage].main([*argv, "--resume", *flags.split()])
    assert str(error.value) == (f"{folder / 'unfinished/state.pt'}: the run began with {began}, not "
                                f"{flags.split()[1]}; resume it with its settings, or begin anew without --resume")
    assert snapshot(folder) == found


@pytest.mark.parametrize("stage, source", [
    ("sft", "gpt/checkpoint.pt"), ("reward_model", "sft/checkpoint.pt"), ("ppo", "sft/checkpoint.pt"),
    ("ppo", "reward_model/checkpoint.pt"), ("dpo", "sft/checkpoint.pt"), ("dpo", "reward_model/pairs.jsonl"),
    ("dpo", "reward_model/held_out.jsonl")])
def test_a_stage_that_was_trained_anew_in_between_is_refused(stage, source, chain, tmp_path):
    """A policy whose second half is held to another reference than its first, or learns from other pairs."""
    out, argv, folder = interrupted(stage, chain, tmp_path)
    path = out / "cpu" / source
    before_it = path.read_bytes()
    if path.suffix == ".pt":
        write_torch(path, {**read_torch(path), "note": "another one"})
    else:
        path.write_bytes(b"".join(reversed(before_it.splitlines(keepends=True))))
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        MODULES[stage].main([*argv, "--resume"])
    assert str(error.value) == (f"{folder / 'unfinished/state.pt'}: the run began with another {source}; "
                                f"begin anew without --resume")
    assert snapshot(folder) == found
    path.write_bytes(before_it)
    MODULES[stage].main([*argv, "--resume"])
    assert (folder / "checkpoint.pt").exists()


def test_the_state_of_another_stage_is_refused(chain, tmp_path):
    """The wrong file copied: weights of the SFT model under the optimizer of DPO."""
    out, argv, folder = interrupted("dpo", chain, tmp_path)
    for name in ("ppo", "ppo-2"):
        shutil.copytree(folder / "unfinished", out / "cpu" / name / "unfinished")
        message = f"cpu/{name}/unfinished/state.pt: is the state of a run of dpo, but {name} is wanted"
        with pytest.raises(InputError, match=message):
            ppo.main([*arguments("ppo", out, ""), "--name", name, "--resume"])


def test_what_a_run_says_of_an_unfinished_one(chain, tmp_path, capsys):
    """--resume that starts from scratch, or a new start that throws a night away, and neither says a word."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    dpo.main([*argv, "--resume"])
    assert f"dpo: nothing to resume in {folder}, begins anew\n" in capsys.readouterr().out
    check_finished(folder, chain / "cpu/dpo")
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        dpo.main([*argv, "--resume"])
    assert str(error.value) == (f"{folder / 'checkpoint.pt'}: is finished, nothing to resume; without --resume it is "
                                f"trained anew")
    del error
    assert snapshot(folder) == found

    assert run("dpo", argv, out, at_call, "step", 5, signal.SIGKILL)[0] == -signal.SIGKILL
    capsys.readouterr()
    dpo.main(argv)
    assert "dpo: begins anew and gives up an unfinished run (--resume would go on with it)\n" in capsys.readouterr().out
    check_finished(folder, chain / "cpu/dpo")


def test_the_flag_goes_down_the_chain(chain, tmp_path, monkeypatch, capsys):
    """ppo.py trains what is missing; interrupted in the middle of that, ppo.py --resume would begin SFT anew."""
    out, _, folder = interrupted("sft", chain, tmp_path, n=25)
    data = chain / "demonstrations.jsonl"
    mains = {stage: lambda argv, main=MODULES[stage].main, flags=FLAGS[stage].format(data=data).split(): main(argv + flags)
             for stage in ("sft", "reward_model")}
    monkeypatch.setattr(ppo, "stages_until", lambda last: {"gpt": gpt.main, **mains})
    ppo.main([*arguments("ppo", out, data), "--resume"])
    printed = capsys.readouterr().out
    assert printed.startswith("plan    sft → reward_model → ppo, about 5 minutes on two cores\n")
    assert "sft: goes on after step 20\n" in printed and "reward_model: nothing to resume" in printed
    for stage in ("sft", "reward_model", "ppo"):
        check_finished(out / "cpu" / stage, chain / "cpu" / stage)


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


class Evil:
    """A pickle that runs code: it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def small_stage(folder, last, resume=False):
    """A stage as small as can be, 6 steps on 4 tensors; it stops after step `last`. Returns what it began with."""
    config = gpt.Config(size="cpu", resume=resume)
    model = gpt.GPT(gpt.GPTConfig(5, 4, 0, 1, 4), torch.Generator().manual_seed(1))
    optimizer = gpt.make_optimizer(model, 0.1)
    with Run("gpt", folder, config, every=2) as run:
        run.total = 6
        losses = restore(run.saved, 6, model=model, optimizer=optimizer, losses=[])["losses"]
        found = copy.deepcopy(run.saved)
        for step in range(run.saved["step"], 6):
            if step == last:
                break
            tokens = torch.tensor([[step % 5, 1, 2]])
            loss = -gpt.token_logprobs(model(tokens), tokens).mean()
            loss.backward()
            gpt.optimizer_step(optimizer, model, 0.01, loss)
            losses.append(loss.item())
            if (step + 1) % 2 == 0:
                run(step + 1, loss=sum(losses) / len(losses))
                losses = []
            run.end_step(step + 1, model=model, optimizer=optimizer, losses=losses)
    return found


def small_checkpoint(path, stage="sft", words="the fox and the kite and the fox"):
    tokenizer = Tokenizer(train_vocabulary(words, 262))
    gpt.save_checkpoint(path, stage, "cpu", gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 4, 1, 1, 4)), tokenizer)


def flipped(whole, position, bit):
    return whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1:]


def damaged(whole, rng):
    """(what was done, content) of some 700 damaged files."""
    directory = whole.index(b"PK\x01\x02")
    for where in (range(len(whole)), range(directory, len(whole)), range(len(whole) - 98, len(whole))):
        for position in rng.sample(where, min(len(where), 130)):
            bit = rng.randrange(8)
            yield f"bit {bit} of byte {position} flipped", flipped(whole, position, bit)
    for entry in range(12):  # the table of contents says how each of the first records is packed, and where
        start = directory
        for _ in range(entry):
            start = whole.index(b"PK\x01\x02", start + 4)
        for offset, bit in [(10, 3)] + [(offset, rng.randrange(8)) for offset in (8, 10, 20, 24, 28, 30, 42)]:
            yield f"bit {bit} of byte {offset} of entry {entry} flipped", flipped(whole, start + offset, bit)
    for length in [0, 1, len(whole) - 1] + rng.sample(range(len(whole)), 70):
        yield f"cut to {length} bytes", whole[:length]
    for _ in range(70):
        start, length = rng.randrange(len(whole)), rng.choice([1, 2, 4, 16, 256, 4096])
        yield f"{length} random bytes at {start}", whole[:start] + rng.randbytes(length) + whole[start + length:]
        yield f"{length} zeros at {start}", whole[:start] + bytes(length) + whole[start + length:]
    for length in (1, 22, 100, 5000, 50000):
        yield f"{length} random bytes", rng.randbytes(length)
        yield f"{length} bytes added", whole + rng.randbytes(length)
        yield f"{length} bytes before", rng.randbytes(length) + whole
        yield f"{length} bytes lost", whole[:directory // 2] + whole[directory // 2 + length:]
    yield "twice", whole + whole
    yield "text", "Es war einmal ein Füchslein.\n".encode() * 9


def torch_bytes(values, **options):
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


def evil_files(whole, values, marker):
    """Files that run code where a pickle is loaded without care."""
    yield "a pickle", pickle.dumps(Evil(marker))
    yield "a torch file", torch_bytes(Evil(marker))
    yield "an old torch file", torch_bytes(Evil(marker), _use_new_zipfile_serialization=False)
    for name in values:
        yield f"a torch file's {name}", torch_bytes({**values, name: Evil(marker)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            evil = record.filename.endswith("data.pkl")
            new.writestr(record, pickle.dumps(Evil(marker), 2) if evil else old.read(record))
    yield "another pickle in the archive", buffer.getvalue()


JUNK = [None, 3, -1, 2.5, math.nan, "3", b"x", [], [1], ["x"], {}, {"x": 1}, [{}], [[1, 2]], torch.zeros(2)]


HOLDS_MORE = ("settings", "config", "model", "optimizer", "vocabulary")


def wrong_types(values):
    """values with something else in one place."""
    for name in values:
        yield f"without {name}", {key: x for key, x in values.items() if key != name}
        for junk in JUNK:
            numbers = isinstance(junk, (int, float)) and isinstance(values[name], float)
            if not numbers and (type(junk) is not type(values[name]) or name in HOLDS_MORE):
                yield f"{name} = {junk!r:.30}", {**values, name: junk}
    for junk in JUNK:
        yield f"just {junk!r:.30}", junk


def outcomes(path, cases, load, expected):
    """What goes wrong: damaged files neither refused in one line that names them nor loaded (None: must not be)."""
    wrong, count = {}, 0
    for count, (damage, content) in enumerate(cases, start=1):
        path.write_bytes(content)
        try:
            loaded = load()
            if expected is None or not same(loaded, expected):
                wrong[damage] = "loads something else"
        except InputError as error:
            if path.name not in str(error) or "\n" in str(error):
                wrong[damage] = str(error)
        except BaseException as error:
            wrong[damage] = repr(error)
    return wrong, count


@pytest.fixture
def small_state(tmp_path, monkeypatch):
    """(path of a state.pt after step 4 of 6, its bytes, what it holds). Nobody waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    small_stage(tmp_path, 4)
    path = tmp_path / "unfinished/state.pt"
    return path, path.read_bytes(), read_torch(path)


def test_a_damaged_state_is_refused(small_state, tmp_path):
    """A bad disk, a copy that broke off, a stranger's file: a traceback, other weights than those saved, code run."""
    path, whole, values = small_state
    assert values["step"] == 4
    cases = [*damaged(whole, random.Random("damaged states")), *evil_files(whole, values, tmp_path / "marker")]
    wrong, count = outcomes(path, cases, lambda: small_stage(tmp_path, 4, resume=True), values)
    assert wrong == {} and count > 600 and not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))  # it does run, where it is let
    assert (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_a_state_with_other_things_in_it_is_refused(small_state, tmp_path):
    """A state of an older version of this project, or one that somebody wrote by hand: a traceback out of the loop."""
    path, _, values = small_state
    cases = [(label, torch_bytes(content)) for label, content in wrong_types(values) if "losses" not in label]
    cases.append(("step = -1", torch_bytes({**values, "step": -1})))
    for name in ("model", "optimizer"):
        for part, content in wrong_types(values[name]):
            cases.append((f"{name}: {part}", torch_bytes({**values, name: content})))
    wrong, count = outcomes(path, cases, lambda: small_stage(tmp_path, None, resume=True), values)
    assert wrong == {} and count > 200


@pytest.mark.parametrize("stage, name, n", [
    ("sft", "losses", 12), ("reward_model", "losses", 5), ("dpo", "figures", 5), ("ppo", "beta", 20)])
def test_a_stages_own_values_are_checked_too(stage, name, n, chain, tmp_path):
    """A traceback for what only this stage keeps; or a state from beyond the last step: over at once, untrained."""
    _, argv, folder = interrupted(stage, chain, tmp_path, n)
    values = read_torch(folder / "unfinished/state.pt")
    assert values["step"] > 0
    cases = [(f"{name} = {junk!r}", torch_bytes({**values, name: junk})) for junk in (None, "3", ["x"], {"x": 1})]
    cases += [(f"without {name}", torch_bytes({key: x for key, x in values.items() if key != name}))]
    cases += [(f"step = {step}", torch_bytes({**values, "step": step})) for step in (100, 10 ** 6)]
    wrong, _ = outcomes(folder / "unfinished/state.pt", cases, lambda: MODULES[stage].main([*argv, "--resume"]), None)
    assert wrong == {} and not (folder / "checkpoint.pt").exists()


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_a_damaged_checkpoint_is_refused(tmp_path):
    """The same of a checkpoint: the next stage trains for hours on weights that nobody ever saved."""
    path = tmp_path / "checkpoint.pt"
    small_checkpoint(path)
    whole, values = path.read_bytes(), read_torch(path)
    cases = [*damaged(whole, random.Random("damaged checkpoints")), *evil_files(whole, values, tmp_path / "marker")]
    cases += [(label, torch_bytes(content)) for label, content in wrong_types(values)]
    cases += [(f"config: {label}", torch_bytes({**values, "config": content}))
              for label, content in wrong_types(values["config"])]
    for stage, words in (("gpt", "the fox"), ("ppo", "the fox"), ("sft", "a hen, a drum, a hen")):
        small_checkpoint(tmp_path / "other.pt", stage, words)
        other = read_torch(tmp_path / "other.pt")
        cases += [(f"of {stage}", torch_bytes(other))] * (stage != "sft")
        cases += [("another vocabulary", torch_bytes({**values, "vocabulary": other["vocabulary"][:-1]}))]
    cases += [("another size", torch_bytes({**values, "size": "gpu"}))]
    wrong, count = outcomes(path, cases, lambda: gpt.load_checkpoint(path, "sft", "cpu")[2], values)
    assert wrong == {} and count > 800 and not (tmp_path / "marker").exists()
