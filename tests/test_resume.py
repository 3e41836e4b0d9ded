"""Runs that are killed, interrupted, starved of disk or fed a damaged state, and continue bit for
bit.

The scripts run in processes of their own, forked from a server that has imported torch already:
each starts in milliseconds, and may kill itself, run out of disk, or lose its rights.
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
from data.run import Run, read_torch, train_missing, write_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import metrics, short_demonstrations, snapshot, untimed

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"gpt": gpt, "sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}
FLAGS = {
    "gpt": "--n_layer 1 --n_head 2 --n_embd 32 --steps 15 --batch 8 --warmup 2 --report 4",
    "sft": "--data {data} --batch 16 --lr 1e-2 --max_new_tokens 16 --report 10",
    "reward_model": "--pairs 32 --held_out 8 --batch 4 --max_new_tokens 16 --report 3",
    "ppo": "--iterations 4 --rollouts 8 --minibatch 4 --epochs 2 --max_new_tokens 16 --kl_target 3 "
           "--lr 1e-3 --save 2",
    "dpo": "--batch 4 --max_new_tokens 16 --report 3"}


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Bit for bit is promised on the CPU only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


# --------------------------------------------------------------------------------------------------
# A script in a process of its own

CONTEXT = multiprocessing.get_context("forkserver")
CALLS = {"step": (torch.optim.AdamW, "step"), "write": (os, "fsync"), "replace": (os, "replace"),
         "move": (os, "replace"), "rename": (os, "rename"), "unlink": (Path, "unlink"),
         "rmdir": (Path, "rmdir")}


@pytest.fixture(scope="module", autouse=True)
def server():
    """The server finds this module, and torch with it, by PYTHONPATH: before Python 3.14 it looks
    nowhere else. A process that has seen a GPU could not be forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        CONTEXT.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def at_call(what, n, *signals):
    """The n-th call of what in this process sends it the signals. "write" dies with half of the
    file written; "move" counts only the files that are moved up when a run is over."""
    owner, name = CALLS[what]
    original = getattr(owner, name)
    calls = itertools.count(1)

    def patched(*arguments, **keywords):
        counts = what != "move" or Path(arguments[0]).parent.name == "finished"
        if counts and next(calls) == n:
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
    # A shell's background jobs inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    setup()
    sys.argv = [f"{stage}.py", *argv]
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def start(stage, argv, setup, logs):
    process = CONTEXT.Process(target=child, args=(stage, argv, setup, logs))
    process.start()
    return process


def run(stage, argv, out, setup=int, *values):
    """Run it to its end, after setup(*values): (exit status, negative for a signal, stdout,
    stderr)."""
    process = start(stage, argv, functools.partial(setup, *values), out)
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode, (out / "stdout").read_text(), (out / "stderr").read_text()


def killed(stage, argv, out, what, n):
    """Run it, and kill it at the n-th call of what."""
    status, _, stderr = run(stage, argv, out, at_call, what, n, signal.SIGKILL)
    assert status == -signal.SIGKILL and stderr == ""


def real_process(*argv):
    """`python ARGV` from a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The chain, run once without a stop


def arguments(stage, out, data):
    return ["--size", "cpu", "--out", str(out), *FLAGS[stage].format(data=data).split()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder in which every stage ran without a stop, with what each has printed. It must not be
    written to."""
    out = tmp_path_factory.mktemp("chain")
    short_demonstrations(out / "demonstrations.jsonl")
    for stage, module in MODULES.items():
        with open(out / f"{stage}.txt", "w") as screen, contextlib.redirect_stdout(screen):
            module.main(arguments(stage, out, out / "demonstrations.jsonl"))
    return out


def before(stage, chain, tmp_path):
    """A folder where all stages but this one are finished: (folder, its command line)."""
    out = tmp_path / "out"
    out.mkdir()
    for earlier in MODULES:
        if earlier == stage:
            break
        shutil.copytree(chain / "cpu" / earlier, out / "cpu" / earlier)
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
        whole = a.dtype == b.dtype and a.shape == b.shape
        return whole and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
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
    """The files of a finished run: not its lock, and not the tokens of a text, which every run of
    these settings may read."""
    names = []
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(("lock", "documents-", "text-")):
            names.append(path.name)
    return names


def check_finished(folder, reference):
    """The files of both folders are the same, all of one run, and nothing else is left behind."""
    found = read_torch(folder / "checkpoint.pt")
    assert same(found, read_torch(reference / "checkpoint.pt"))
    assert found["metrics"] == read_metrics(folder) == read_metrics(reference)
    for name in set(left_behind(reference)) - {"metrics.jsonl"}:
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(reference))


def check_unfinished(folder, reference):
    """What a killed run leaves is whole: the files of the run before it; a state that loads,
    figures that are the first ones of the unbroken run."""
    for name in left_behind(folder):
        assert (folder / name).read_bytes() == OLD
    unfinished = folder / "unfinished"
    if (unfinished / "state.pt").exists():
        state = read_torch(unfinished / "state.pt")
        rows = read_metrics(unfinished)
        assert rows == read_metrics(reference)[:len(rows)]
        assert len(state["rows"]) <= len(rows) <= len(state["rows"]) + 2
    if (unfinished / "checkpoint.pt").exists():
        found = read_torch(unfinished / "checkpoint.pt")
        assert same(found, read_torch(reference / "checkpoint.pt"))
    assert len(list(folder.rglob("*.tmp"))) <= 1


def check_over(folder, reference):
    """A run that was killed while its files were moved up: the next stage finds them in their
    places, and trains nothing again."""
    assert (folder / "finished").exists() and not (folder / "unfinished").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES[folder.name], "main", lambda argv: pytest.fail("is trained again"))
        config = gpt.Config(size="cpu", out=str(folder.parent.parent))
        train_missing(config, [folder.name], "the next stage")
    check_finished(folder, reference)


# --------------------------------------------------------------------------------------------------
# Kill it anywhere


@pytest.mark.parametrize("stage", MODULES)
def test_killed_anywhere_it_continues_bit_for_bit(stage, chain, tmp_path):
    """A momentum, a half-averaged loss, an adapted beta or a generator's state that was not saved:
    resumed runs differ. A finished run that is lost, or half of it, to one that is not yet over."""
    out, argv = before(stage, chain, tmp_path)
    folder = out / "cpu" / stage
    reference = chain / "cpu" / stage
    rng = random.Random(f"kills of {stage}")
    an_earlier_run(folder, reference)
    resume = []
    for what, most in (("step", 7), ("write", 3), ("step", 9), ("replace", 5), ("step", 3),
                       ("rename", 1)):
        killed(stage, argv + resume, out, what, rng.randint(1, most))
        check_unfinished(folder, reference)
        resume = ["--resume"]
    killed(stage, argv + resume, out, "move", rng.randint(1, len(left_behind(reference))))
    check_over(folder, reference)


def test_killed_in_the_middle_of_every_write(chain, tmp_path):
    """Half a checkpoint in the old one's place, a state without its figures, a .tmp file that stays
    for ever; a checkpoint beside the figures of another run."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    reference = chain / "cpu/dpo"
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
            if n <= 2 and what in ("write", "replace"):    # there is no state yet
                with pytest.raises(InputError, match="is finished, nothing to resume"):
                    dpo.main([*argv, "--resume"])
                dpo.main(argv)
            else:
                dpo.main([*argv, "--resume"])
            check_finished(folder, reference)
        check_finished(folder, reference)
    # 2 writes at the start, 2 a report, the checkpoint; 2 files that are moved up, and 2 that are
    # of no use any more.
    assert counts == {"write": 9, "replace": 11, "rename": 1, "unlink": 2, "rmdir": 1}


LONG = ("--vocab_size 280 --block_size 32 --n_layer 1 --n_head 2 --n_embd 32 --steps 600 --batch 8 "
        "--report 10").split()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """(folder, command line but for --out) of a run of a second on a text, with 60 reports."""
    out = tmp_path_factory.mktemp("long")
    line = "The fox had a kite. The hen had a drum, and the kite flew over the hill.\n"
    (out / "corpus.txt").write_text(line * 40)
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
    """kill -9, the out-of-memory killer, a power cut: they come at a moment that no test has
    thought of."""
    reference, argv = long_run
    screen = tmp_path / "stdout"
    rng = random.Random(3)
    resume = []
    for _ in range(3):
        process = start("gpt", [*argv, "--out", str(tmp_path), *resume], int, tmp_path)
        count = rng.randint(1, 8)
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


# --------------------------------------------------------------------------------------------------
# Several loops in one run


def two_rounds(folder, keep, stop=None, resume=False):
    """A run of two rounds of 5 steps, each round on "samples" of the model; keep: both use one
    optimizer, as online DPO does, or each has its own, as RSFT's do. It is stopped before its
    stop-th event. Returns the model's weights and the rows."""
    events = itertools.count()

    def event():
        if next(events) == stop:
            raise KeyboardInterrupt

    model = gpt.GPT(gpt.GPTConfig(5, 4, 0, 1, 4), torch.Generator().manual_seed(1))
    optimizer = gpt.make_optimizer(model, 0.1)
    adaptive = {"factor": 1.0}
    with Run("gpt", folder, gpt.Config(resume=resume), 3, total=10, save=2) as one:
        for number in (1, 2):
            path = one.folder / f"samples-{number}"
            if not path.exists():
                event()
                path.write_text(str(model.wte.weight.sum().item()))
            if number not in [row.get("round") for row in one.rows]:
                event()
                one.record(round=number, samples=float(path.read_text()))
            if not keep:
                optimizer = gpt.make_optimizer(model, 0.1)
            for step in one.steps(5, model=model, optimizer=optimizer, adaptive=adaptive):
                event()
                tokens = torch.tensor([[step % 5, number, 2]])
                loss = -gpt.token_logprobs(model(tokens), tokens).mean() * float(path.read_text())
                (loss * adaptive["factor"]).backward()
                gpt.optimizer_step(optimizer, model, 0.01)
                adaptive["factor"] *= 1.1
                one.log(step, loss=loss, factor=adaptive["factor"])
        event()
        return model.state_dict(), untimed(one.rows)


@pytest.mark.parametrize("keep", [True, False])
def test_rounds_continue_bit_for_bit(keep, tmp_path):
    """Round 2's optimizer with the moments of round 1's; rounds that sample again, from another
    policy; a round that is skipped or done twice; figures that are averaged over two rounds."""
    expected = two_rounds(tmp_path, keep)
    for first in range(15):
        with pytest.raises(KeyboardInterrupt):
            two_rounds(tmp_path, keep, stop=first)
        for again in (3, 1, 0):
            with contextlib.suppress(KeyboardInterrupt):    # unless it gets to the end
                two_rounds(tmp_path, keep, again, resume=True)
        assert same(two_rounds(tmp_path, keep, resume=True), expected), first
    assert [row["step"] for row in expected[1] if "loss" in row] == [3, 5, 6, 9, 10]


# --------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_in_a_terminal(long_run, tmp_path, capsys):
    """A traceback, a step that is lost, a run that cannot be continued or a user who isn't told
    how."""
    reference, argv = long_run
    process = real_process("gpt.py", *argv, "--out", tmp_path)
    while "/600 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    step = read_torch(tmp_path / "cpu/gpt/unfinished/state.pt")["step"]
    assert process.returncode == 130 and 10 <= step < 600
    assert "stops after this step (press again" in stdout
    assert stderr == f"gpt.py: gpt: saved after step {step} of 600; --resume continues\n"
    gpt.main([*argv, "--out", str(tmp_path), "--resume"])
    assert f"gpt: continues after step {step}\n" in capsys.readouterr().out
    check_finished(tmp_path / "cpu/gpt", reference)


@pytest.mark.parametrize("stage", MODULES)
def test_ctrl_c_finishes_the_step(stage, chain, tmp_path):
    """Ctrl-C between two saves: the steps since the last one are lost, or half of a PPO iteration
    is saved."""
    out, argv = before(stage, chain, tmp_path)
    folder = out / "cpu" / stage
    an_earlier_run(folder, chain / "cpu" / stage)
    call = 5
    step = 5
    if stage == "ppo":
        # 8 optimizer steps an iteration, 2 models times 2 epochs times 2 minibatches: this one is
        # in the second iteration.
        call = 11
        step = 2
    status, stdout, stderr = run(stage, argv, out, at_call, "step", call, signal.SIGINT)
    assert status == 130 and "stops after this step" in stdout and "saved " not in stdout
    assert f"{stage}.py: {stage}: saved after step {step} of " in stderr
    assert stderr.endswith("; --resume continues\n") and stderr.count("\n") == 1
    assert read_torch(folder / "unfinished/state.pt")["step"] == step
    check_unfinished(folder, chain / "cpu" / stage)
    MODULES[stage].main([*argv, "--resume"])
    check_finished(folder, chain / "cpu" / stage)


def test_ctrl_c_twice_stops_at_once(chain, tmp_path):
    """A step of an hour, and no way out but kill -9."""
    out, argv = before("dpo", chain, tmp_path)
    status, stdout, stderr = run("dpo", argv, out, at_call, "step", 5, signal.SIGINT, signal.SIGINT)
    assert status == 130 and "stops after this step" in stdout
    assert stderr == "dpo.py: interrupted\n"
    assert read_torch(out / "cpu/dpo/unfinished/state.pt")["step"] == 3
    dpo.main([*argv, "--resume"])
    check_finished(out / "cpu/dpo", chain / "cpu/dpo")


@pytest.mark.parametrize("what, n", [
    ("step", 1), ("replace", 2), ("replace", 9), ("step", 8), ("rename", 1), ("move", 2)])
def test_ctrl_c_at_the_edges(chain, tmp_path, what, n):
    """In the first step or the last, or while a file is written or moved: nothing to save yet, or
    nothing to do."""
    out, argv = before("dpo", chain, tmp_path)
    status, _, stderr = run("dpo", argv, out, at_call, what, n, signal.SIGINT)
    assert status == 130 and stderr.count("\n") == 1 and not list(out.rglob("*.tmp"))
    if what == "move":
        check_over(out / "cpu/dpo", chain / "cpu/dpo")
        return
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


# --------------------------------------------------------------------------------------------------
# Reproducible


def test_two_runs_of_the_chain_are_equal_and_global_generators_are_left_alone(chain, tmp_path):
    """A result that depends on what ran before; a library that reseeds its user's generators behind
    his back."""
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    python = random.getstate()
    numpy = str(np.random.get_state())
    for stage, module in MODULES.items():
        module.main(arguments(stage, tmp_path, chain / "demonstrations.jsonl"))
        assert random.getstate() == python and str(np.random.get_state()) == numpy, stage
        # New weights are drawn from torch's, but it is never reseeded.
        assert torch.initial_seed() == 7, stage
        check_finished(tmp_path / "cpu" / stage, chain / "cpu" / stage)


# --------------------------------------------------------------------------------------------------
# The rows on the screen

LARGE = dict(loss=123.456, held_out=12.345, excess=9.999, accuracy=1.0, held_out_accuracy=1.0,
             lr=1.5e-5, reward=-99.99, gold=-99.99, kl=1234.56, J=-234.56, value_explained=-1234.56,
             clip_fraction=1.0, length=1024.0, no_end=1.0, margin=-123.45,
             chosen_log_ratio=-1234.56, rejected_log_ratio=-12345.67, grad_norm=1234.56)


def words(line):
    """{where a word ends: the word}."""
    return {match.end(): match.group() for match in re.finditer(r"\S+", line)}


def names_of(heading):
    """The names above the columns, each with the place where its column ends."""
    upper, lower = map(words, heading)
    assert set(upper) <= set(lower)
    for end, first in upper.items():
        lower[end] = f"{first}_{lower[end]}"
    return lower


@pytest.mark.parametrize("stage", MODULES)
def test_every_row_fits_the_screen(stage, chain, tmp_path, capsys):
    """A row that a terminal breaks in two, or a figure below the name of another one."""
    lines = (chain / f"{stage}.txt").read_text().splitlines()
    rows = [line for line in lines if re.match(r" *\d+/\d+ ", line)]
    first = lines.index(rows[0])
    heading = lines[first - 2:first]
    names = names_of(heading)
    ends = list(names)
    step, *figures, left = names.values()
    assert (step, left) == ("step", "left") and len(figures) > 2 and len(rows) > 1
    assert set(figures) <= set(metrics(chain / "cpu" / stage / "metrics.jsonl")[0])

    with Run("gpt", tmp_path, gpt.Config(), 999) as one:    # the same row with large figures
        for step in one.steps(1000):
            if one.due(step):
                one.log(step, **{name: LARGE.get(name, 99.999) for name in figures})
            if step == 999:
                break
    *large_heading, large = capsys.readouterr().out.splitlines()
    assert large_heading == heading
    for row in [*heading, *rows, large]:
        assert len(row) <= 100
    for row in [*rows, large]:
        found = list(words(row))
        assert found[1:] == ends[1:] and found[0] <= ends[0]


# --------------------------------------------------------------------------------------------------
# Numbers gone wrong


def poison(monkeypatch, module, n, value, everywhere):
    """The n-th optimizer step meets a gradient of this value, in one place or everywhere; it must
    leave the weights as they are."""
    real = gpt.optimizer_step
    calls = itertools.count(1)

    def step(optimizer, model, lr):
        if next(calls) != n:
            return real(optimizer, model, lr)
        for parameter in model.parameters():
            if everywhere:
                parameter.grad.fill_(value)
        next(model.parameters()).grad[0, 0] = value
        weights = copy.deepcopy(model.state_dict())
        try:
            return real(optimizer, model, lr)
        finally:
            assert same(model.state_dict(), weights)

    monkeypatch.setattr(module, "optimizer_step", step)


@pytest.mark.parametrize("stage", MODULES)
def test_a_gradient_that_is_no_number_stops_the_run(stage, chain, tmp_path, monkeypatch):
    """A night of steps on weights that are all NaN, saved over the last good ones."""
    out, argv = before(stage, chain, tmp_path)
    folder = out / "cpu" / stage
    module = MODULES[stage]
    an_earlier_run(folder, chain / "cpu" / stage)
    every = {"gpt": 4, "sft": 10, "ppo": 2}.get(stage, 3)   # steps between two saves
    calls = 8 if stage == "ppo" else 1
    for value, everywhere, n, step, resume in (
            (math.nan, False, 1, 1, []), (math.inf, False, every * calls + calls, every + 1, []),
            (math.nan, True, 2 * calls, every + 2, ["--resume"])):
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
            poison(patch, module, n, value, everywhere)
            module.main(argv + resume)
        message = str(error.value)
        # One nan or inf makes the norm nan or inf.
        assert message.startswith(f"{stage}, step {step}: gradient norm {value}: no step taken; ")
        assert "\n" not in message
        saved = read_torch(folder / "unfinished/state.pt")
        if step == 1:
            assert message.endswith("last figures: none yet") and saved["step"] == 0
        else:
            last = step - 1 if stage == "ppo" else every
            assert f"last figures: step {last}, " in message
            assert saved["step"] == (step - 1) // every * every
            trained = saved["state"].get("model") or saved["state"]["policy"]
            assert all(tensor.isfinite().all() for tensor in trained.values())
        check_unfinished(folder, chain / "cpu" / stage)
    module.main([*argv, "--resume"])
    check_finished(folder, chain / "cpu" / stage)


def test_a_policy_that_cannot_be_sampled_stops_the_run(chain, tmp_path, monkeypatch):
    """NaN among the probabilities: the sampler takes some token, the reward model scores it, and
    PPO continues."""
    out, argv = before("ppo", chain, tmp_path)
    folder = out / "cpu/ppo"
    real = gpt.generate
    calls = itertools.count(1)

    def generate(model, *arguments, **keywords):
        if next(calls) == 4:
            model.wte.weight.data[3] = math.nan
        return real(model, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(ppo, "generate", generate)
        ppo.main(argv)
    message = str(error.value)
    assert message.startswith("ppo, step 4: the model's output is not finite")
    assert "last figures: step 3, " in message and ", gold " in message and "\n" not in message
    assert not (folder / "checkpoint.pt").exists()
    assert read_torch(folder / "unfinished/state.pt")["step"] == 2
    ppo.main([*argv, "--resume"])
    check_finished(folder, chain / "cpu/ppo")


def test_broken_weights_of_an_earlier_stage_are_one_line(chain, tmp_path):
    """NaN in the SFT model's checkpoint: forty lines of traceback in the stage that meets it
    first."""
    out, argv = before("dpo", chain, tmp_path)
    checkpoint = read_torch(out / "cpu/sft/checkpoint.pt")
    checkpoint["model"]["ln_f.weight"][0] = math.nan
    write_torch(out / "cpu/sft/checkpoint.pt", checkpoint)
    checkpoint = read_torch(out / "cpu/reward_model/checkpoint.pt")
    checkpoint["made_from"] = {}    # else it would be refused, for it is of another SFT model
    write_torch(out / "cpu/reward_model/checkpoint.pt", checkpoint)
    status, _, stderr = run("dpo", argv, out)
    assert status == 1 and stderr.count("\n") == 1
    assert stderr.startswith("dpo.py: dpo, step 1: gradient norm nan: no step taken; ")


# --------------------------------------------------------------------------------------------------
# Two runs in one folder, a full disk, a read-only folder


def test_a_second_run_in_one_folder_is_refused(chain, tmp_path):
    """Two runs that write to one folder: a checkpoint of one, figures of both, the .tmp file of the
    first lost."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    (tmp_path / "logs").mkdir()
    stop = functools.partial(at_call, "step", 5, signal.SIGSTOP)
    process = start("dpo", argv, stop, tmp_path / "logs")
    try:
        figures = folder / "unfinished/metrics.jsonl"
        wait_for(lambda: figures.exists() and figures.read_text())
        time.sleep(0.2)
        written = folder / f"unfinished/state.pt.{process.pid}.tmp"
        written.write_bytes(b"the first run is writing this")
        found = snapshot(folder)
        for flags in ([], ["--resume"]):
            status, _, stderr = run("dpo", argv + flags, out)
            assert status == 1 and stderr.count("\n") == 1
            assert stderr.startswith(f"dpo.py: {folder}: another run is using this folder; wait fo")
        assert snapshot(folder) == found
    finally:
        process.kill()
        process.join(60)
    dpo.main([*argv, "--resume"])  # the lock died with its process
    check_finished(folder, chain / "cpu/dpo")


def test_a_run_that_was_refused_gives_its_folder_back(chain, tmp_path):
    """A notebook keeps the last traceback, which keeps the lock: the next cell is told that another
    run is there."""
    out, argv = before("dpo", chain, tmp_path)
    killed("dpo", argv, out, "step", 5)
    with pytest.raises(InputError, match="--lr") as kept:
        dpo.main([*argv, "--resume", "--lr", "0.5"])
    dpo.main([*argv, "--resume"])
    check_finished(out / "cpu/dpo", chain / "cpu/dpo")
    assert kept


def test_a_full_disk(chain, tmp_path):
    """The disk is full: the old checkpoint is gone, half of the new one is there, and Python prints
    forty lines."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    an_earlier_run(folder, chain / "cpu/dpo")
    # The state, with two moments for each weight, is larger.
    size = (chain / "cpu/dpo/checkpoint.pt").stat().st_size
    for resume in ([], ["--resume"]):
        status, _, stderr = run("dpo", argv + resume, out, no_room_for, size)
        assert status == 1 and stderr.startswith(f"dpo.py: {folder}") and stderr.count("\n") == 1
        assert os.strerror(errno.EFBIG) in stderr and not list(folder.rglob("*.tmp"))
        check_unfinished(folder, chain / "cpu/dpo")
        assert read_torch(folder / "unfinished/state.pt")["step"] == 0
    dpo.main([*argv, "--resume"])  # somebody made room
    check_finished(folder, chain / "cpu/dpo")


def test_a_read_only_folder(chain, tmp_path):
    """A folder of somebody else's: a traceback, or a run that notices after hours that it cannot
    save."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    try:
        for exists in (False, True):
            if exists:
                shutil.copytree(chain / "cpu/dpo", folder)
                folder.chmod(0o555)
            found = snapshot(out / "cpu")
            (out / "cpu").chmod(0o555)
            status, stdout, stderr = run("dpo", argv, out, without_privileges)
            assert status == 1 and stderr.count("\n") == 1
            assert stderr.startswith(f"dpo.py: {folder}")
            assert stderr.endswith(": Permission denied\n")
            assert "/8 " not in stdout and snapshot(out / "cpu") == found
            (out / "cpu").chmod(0o755)
    finally:
        for path in (out / "cpu", folder):
            if path.exists():
                path.chmod(0o755)


# --------------------------------------------------------------------------------------------------
# What --resume refuses, and what it says


def interrupted(stage, chain, tmp_path, n=5):
    """A folder where this stage was killed in its n-th step: (folder, command line, the stage's
    folder)."""
    out, argv = before(stage, chain, tmp_path)
    killed(stage, argv, out, "step", n)
    return out, argv, out / "cpu" / stage


@pytest.mark.parametrize("stage, flags, began", [
    ("dpo", "--lr 0.001", "--lr 0.0002"), ("dpo", "--seed 2", "--seed 1"),
    ("dpo", "--batch 5", "--batch 4"),
    ("dpo", "--beta 0.7", "--beta 0.2"), ("sft", "--epochs 2", "--epochs 1")])
def test_other_settings_are_refused(stage, flags, began, chain, tmp_path):
    """Half of a run with one learning rate and half with another, under the name of one of them."""
    out, argv, folder = interrupted(stage, chain, tmp_path)
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        MODULES[stage].main([*argv, "--resume", *flags.split()])
    path = folder / "unfinished/state.pt"
    assert str(error.value) == (
        f"{path}: the run began with {began}, not {flags.split()[1]}; resume it with its settings, "
        "or start again without --resume")
    assert snapshot(folder) == found


def test_what_changes_nothing_may_change(chain, tmp_path):
    """A run that ran out of memory refused with the smaller micro-batch that it needs; the same
    file refused because it has been moved."""
    out, argv, folder = interrupted("sft", chain, tmp_path, 15)
    moved = shutil.copy(chain / "demonstrations.jsonl", tmp_path / "moved.jsonl")
    flags = ["--resume", "--data", str(moved), "--micro_batch", "3", "--sample_batch", "7",
             "--report", "4"]
    sft.main([*argv, *flags])
    rows = read_metrics(folder)
    reference = read_metrics(chain / "cpu/sft")
    assert [row["step"] for row in rows] == [10, 12, 16, 20, 24, 28, 32, 35]
    for a, b in ((rows[3], reference[1]), (rows[-1], reference[-1])):   # steps 20 and 35
        assert a["step"] == b["step"] and a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)


@pytest.mark.parametrize("save", ["1", "3"])
def test_another_number_of_steps_between_saves(save, chain, tmp_path):
    """The same of --save, and the run is the one that was stopped, bit for bit."""
    out, argv, folder = interrupted("ppo", chain, tmp_path, 10)
    ppo.main([*argv, "--resume", "--save", save])
    check_finished(folder, chain / "cpu/ppo")


def test_another_file_under_the_same_name_is_refused(chain, tmp_path):
    """Half of a run on a file, half on what somebody has put in its place."""
    out, argv = before("sft", chain, tmp_path)
    data = shutil.copy(chain / "demonstrations.jsonl", tmp_path / "mine.jsonl")
    killed("sft", [*argv, "--data", str(data)], out, "step", 15)
    lines = Path(data).read_bytes().splitlines(keepends=True)
    Path(data).write_bytes(b"".join(reversed(lines)))
    with pytest.raises(InputError, match="the run began with --data of checksum [0-9a-f]{8}, not "
                                         "of checksum [0-9a-f]{8}; resume it with its settings"):
        sft.main([*argv, "--data", str(data), "--resume"])


@pytest.mark.parametrize("stage, source", [
    ("sft", "gpt/checkpoint.pt"), ("reward_model", "sft/checkpoint.pt"),
    ("ppo", "sft/checkpoint.pt"), ("ppo", "reward_model/checkpoint.pt"),
    ("dpo", "sft/checkpoint.pt"), ("dpo", "reward_model/pairs.jsonl"),
    ("dpo", "reward_model/held_out.jsonl")])
def test_a_stage_that_was_trained_again_in_between_is_refused(stage, source, chain, tmp_path):
    """A policy whose second half is held to another reference than its first, or learns from other
    pairs."""
    out, argv, folder = interrupted(stage, chain, tmp_path)
    path = out / "cpu" / source
    original = path.read_bytes()
    if path.suffix == ".pt":
        write_torch(path, {**read_torch(path), "note": "another one"})
    else:
        path.write_bytes(b"".join(reversed(original.splitlines(keepends=True))))
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        MODULES[stage].main([*argv, "--resume"])
    state = folder / "unfinished/state.pt"
    message = f"{state}: the run began with another {source}; start again without --resume"
    if source == "sft/checkpoint.pt" and stage != "reward_model":   # which is of that SFT model too
        model = out / "cpu/reward_model/checkpoint.pt"
        message = f"{model}: was made from another {path}; train reward_model again"
    assert str(error.value) == message
    assert snapshot(folder) == found
    path.write_bytes(original)
    MODULES[stage].main([*argv, "--resume"])
    assert (folder / "checkpoint.pt").exists()


def test_the_state_of_another_stage_is_refused(chain, tmp_path):
    """The wrong file copied: weights of the SFT model under the optimizer of DPO."""
    out, argv, folder = interrupted("dpo", chain, tmp_path)
    for name in ("ppo", "ppo-2"):
        path = out / "cpu" / name / "unfinished"
        shutil.copytree(folder / "unfinished", path)
        message = f"{path}/state.pt: is the state of a run of dpo, but {name} is wanted"
        with pytest.raises(InputError, match=re.escape(message)):
            ppo.main([*arguments("ppo", out, ""), "--name", name, "--resume"])


def test_what_a_run_says_of_an_unfinished_one(chain, tmp_path, capsys):
    """--resume that starts from scratch, or a new start that throws a night away, and neither says
    a word."""
    out, argv = before("dpo", chain, tmp_path)
    folder = out / "cpu/dpo"
    dpo.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    assert f"dpo: nothing to resume in {folder}, starts from the beginning\n" in printed
    check_finished(folder, chain / "cpu/dpo")
    found = snapshot(folder)
    with pytest.raises(InputError) as error:
        dpo.main([*argv, "--resume"])
    assert str(error.value) == (
        f"{folder / 'checkpoint.pt'}: is finished, nothing to resume; without --resume it is "
        "trained again")
    del error
    assert snapshot(folder) == found

    killed("dpo", argv, out, "step", 5)
    capsys.readouterr()
    dpo.main(argv)
    printed = capsys.readouterr().out
    assert ("dpo: starts from the beginning and drops an unfinished run (--resume would continue "
            "it)\n") in printed
    check_finished(folder, chain / "cpu/dpo")


def test_the_flag_goes_down_the_chain(chain, tmp_path, monkeypatch, capsys):
    """ppo.py trains what is missing; interrupted in the middle of that, ppo.py --resume would begin
    SFT again."""
    out, _, _ = interrupted("sft", chain, tmp_path, n=25)
    data = chain / "demonstrations.jsonl"
    for stage in ("sft", "reward_model"):
        flags = FLAGS[stage].format(data=data).split()
        main = MODULES[stage].main
        monkeypatch.setattr(MODULES[stage], "main",
                            lambda argv, main=main, flags=flags: main(argv + flags))
    ppo.main([*arguments("ppo", out, data), "--resume"])
    printed = capsys.readouterr().out
    assert printed.startswith("plan    sft → reward_model → ppo, about 5 minutes on two cores\n")
    assert "sft: continues after step 20\n" in printed
    assert "reward_model: nothing to resume" in printed
    for stage in ("sft", "reward_model", "ppo"):
        check_finished(out / "cpu" / stage, chain / "cpu" / stage)


# --------------------------------------------------------------------------------------------------
# Damaged files


class Evil:
    """A pickle that runs code: it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def small_stage(folder, last, resume=False):
    """A stage as small as can be, 6 steps on 4 tensors; it stops after step `last`. Returns what it
    began with: the state, and in it what was loaded from it."""
    model = gpt.GPT(gpt.GPTConfig(5, 4, 0, 1, 4), torch.Generator().manual_seed(1))
    optimizer = gpt.make_optimizer(model, 0.1)
    adaptive = {"beta": 0.5}
    found = None
    with Run("gpt", folder, gpt.Config(size="cpu", resume=resume), 3, save=2) as one:
        for step in one.steps(6, model=model, optimizer=optimizer, adaptive=adaptive):
            if found is None:
                loaded = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                          "adaptive": adaptive}
                found = copy.deepcopy({**one.saved, "rows": one.rows, "pending": one.pending,
                                       "step": step, "state": loaded})
            if step == last:
                break
            tokens = torch.tensor([[step % 5, 1, 2]])
            loss = -gpt.token_logprobs(model(tokens), tokens).mean()
            loss.backward()
            gpt.optimizer_step(optimizer, model, 0.01)
            adaptive["beta"] *= 1.1
            one.log(step, loss=loss)
    return found


def small_checkpoint(path, stage="sft", text="the fox and the kite and the fox"):
    tokenizer = Tokenizer(train_vocabulary(text, 262))
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 4, 1, 1, 4))
    gpt.save_checkpoint(path, stage, "cpu", model, tokenizer)


def flipped(whole, position, bit):
    return whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1:]


def damaged(whole, rng):
    """(what was done, content) of some 700 damaged files."""
    directory = whole.index(b"PK\x01\x02")
    size = len(whole)
    for where in (range(size), range(directory, size), range(size - 98, size)):
        for position in rng.sample(where, min(len(where), 130)):
            bit = rng.randrange(8)
            yield f"bit {bit} of byte {position} flipped", flipped(whole, position, bit)

    # The table of contents says how each of the first records is packed, and where.
    start = directory
    for entry in range(12):
        flips = [(10, 3)]
        for offset in (8, 10, 20, 24, 28, 30, 42):
            flips.append((offset, rng.randrange(8)))
        for offset, bit in flips:
            content = flipped(whole, start + offset, bit)
            yield f"bit {bit} of byte {offset} of entry {entry} flipped", content
        start = whole.index(b"PK\x01\x02", start + 4)

    for length in [0, 1, size - 1] + rng.sample(range(size), 70):
        yield f"cut to {length} bytes", whole[:length]
    for _ in range(70):
        start = rng.randrange(size)
        length = rng.choice([1, 2, 4, 16, 256, 4096])
        rest = whole[start + length:]
        yield f"{length} random bytes at {start}", whole[:start] + rng.randbytes(length) + rest
        yield f"{length} zeros at {start}", whole[:start] + bytes(length) + rest
    middle = directory // 2
    for length in (1, 22, 100, 5000, 50000):
        yield f"{length} random bytes", rng.randbytes(length)
        yield f"{length} bytes added", whole + rng.randbytes(length)
        yield f"{length} bytes before", rng.randbytes(length) + whole
        yield f"{length} bytes lost", whole[:middle] + whole[middle + length:]
    yield "twice", whole + whole
    yield "text", "Es war einmal ein Füchslein.\n".encode() * 9


def torch_bytes(values, **options):
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


def evil_files(whole, values, marker):
    """(what was done, content) of files that run code where a pickle is loaded without care."""
    evil = Evil(marker)
    yield "a pickle", pickle.dumps(evil)
    yield "a torch file", torch_bytes(evil)
    yield "an old torch file", torch_bytes(evil, _use_new_zipfile_serialization=False)
    for name in values:
        yield f"a torch file's {name}", torch_bytes({**values, name: evil})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl"):
                content = pickle.dumps(evil, 2)
            new.writestr(record, content)
    yield "another pickle in the archive", buffer.getvalue()


JUNK = [None, 3, -1, 2.5, math.nan, "3", b"x", [], [1], ["x"], {}, {"x": 1}, [{}], [[1, 2]],
        torch.zeros(2)]
HOLDS_MORE = ("settings", "config", "model", "optimizer", "vocabulary")


def wrong_types(values):
    """(what was done, values with something else in one place)."""
    for name in values:
        yield f"without {name}", {key: x for key, x in values.items() if key != name}
        for junk in JUNK:
            numbers = isinstance(junk, (int, float)) and isinstance(values[name], float)
            if not numbers and (type(junk) is not type(values[name]) or name in HOLDS_MORE):
                yield f"{name} = {junk!r:.30}", {**values, name: junk}
    for junk in JUNK:
        yield f"just {junk!r:.30}", junk


def outcomes(path, cases, load, expected):
    """What goes wrong: damaged files neither refused in one line that names them nor loaded (None:
    must not be). Returns ({what was done: what went wrong}, number of cases)."""
    wrong = {}
    count = 0
    for damage, content in cases:
        count += 1
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
    """(path of a state.pt after step 4 of 6, its bytes, what it holds). Waiting for the disk is
    left out."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    small_stage(tmp_path, 4)
    path = tmp_path / "unfinished/state.pt"
    values = read_torch(path)
    assert values["step"] == 4 and len(values["rows"]) == 1 and len(values["pending"]["loss"]) == 1
    return path, path.read_bytes(), values


def test_a_damaged_state_is_refused(small_state, tmp_path):
    """A bad disk, a copy that broke off, a stranger's file: a traceback, other weights than those
    saved, code run."""
    path, whole, values = small_state
    assert same(small_stage(tmp_path, 4, resume=True), values)
    cases = [*damaged(whole, random.Random("damaged states")),
             *evil_files(whole, values, tmp_path / "marker")]
    wrong, count = outcomes(path, cases, lambda: small_stage(tmp_path, 4, resume=True), values)
    assert wrong == {} and count > 600 and not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))  # it does run, where it is let
    assert (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_a_state_with_other_things_in_it_is_refused(small_state, tmp_path):
    """A state of an older version of this project, or one that somebody wrote by hand: a traceback
    out of the loop, or a beta that is not a number."""
    path, _, values = small_state
    changes = list(wrong_types(values))
    for name, part in values["state"].items():
        for label, content in [*wrong_types(part), ("beta = nan", {"beta": math.nan})]:
            changed = {**values["state"], name: content}
            changes.append((f"{name}: {label}", {**values, "state": changed}))
    for name, junk in (("step", -1), ("step", 7), ("state", {}), ("state", {"x": 1}), ("rows", [1]),
                       ("rows", [{"loss": "3"}]), ("pending", {"loss": 1}),
                       ("pending", {"loss": [1]}), ("pending", {"loss": [(1.0, None)]})):
        changes.append((f"{name} = {junk}", {**values, name: junk}))
    cases = [(label, torch_bytes(content)) for label, content in changes]
    wrong, count = outcomes(path, cases, lambda: small_stage(tmp_path, None, resume=True), values)
    assert wrong == {} and count > 250


@pytest.mark.parametrize("stage, name, n", [
    ("sft", "model", 12), ("reward_model", "optimizer", 5), ("dpo", "policy", 5),
    ("ppo", "value_optimizer", 20), ("ppo", "adaptive", 20)])
def test_a_stages_own_values_are_checked_too(stage, name, n, chain, tmp_path):
    """A traceback for what only this stage keeps; or a state from beyond the last step: over at
    once, untrained."""
    _, argv, folder = interrupted(stage, chain, tmp_path, n)
    path = folder / "unfinished/state.pt"
    values = read_torch(path)
    assert values["step"] > 0
    state = values["state"]
    changes = []
    for junk in (None, "3", ["x"], {"x": 1}):
        changes.append((f"{name} = {junk!r}", {**values, "state": {**state, name: junk}}))
    without = {key: x for key, x in state.items() if key != name}
    changes.append((f"without {name}", {**values, "state": without}))
    for step in (100, 10 ** 6):
        changes.append((f"step = {step}", {**values, "step": step}))
    cases = [(label, torch_bytes(content)) for label, content in changes]
    wrong, _ = outcomes(path, cases, lambda: MODULES[stage].main([*argv, "--resume"]), None)
    assert wrong == {} and not (folder / "checkpoint.pt").exists()


def test_a_figure_that_is_infinite_is_no_damage(tmp_path):
    """A run whose loss was once infinite, and which can't be resumed for it."""
    for resume, stop in ((False, 4), (True, None)):
        with Run("gpt", tmp_path, gpt.Config(resume=resume), 2) as one:
            for step in one.steps(6):
                if step == stop:
                    break
                one.log(step, loss=math.inf if step < 2 else 1.0)
    assert [row["loss"] for row in one.rows] == [math.inf, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_a_damaged_checkpoint_is_refused(tmp_path):
    """The same of a checkpoint: the next stage trains for hours on weights that were never
    saved."""
    path = tmp_path / "checkpoint.pt"
    small_checkpoint(path)
    whole = path.read_bytes()
    values = read_torch(path)
    cases = [*damaged(whole, random.Random("damaged checkpoints")),
             *evil_files(whole, values, tmp_path / "marker")]
    changes = [*wrong_types(values), ("another size", {**values, "size": "gpu"})]
    for label, content in wrong_types(values["config"]):
        changes.append((f"config: {label}", {**values, "config": content}))
    for stage, text in (("gpt", "the fox"), ("ppo", "the fox"), ("sft", "a hen, a drum, a hen")):
        small_checkpoint(tmp_path / "other.pt", stage, text)
        other = read_torch(tmp_path / "other.pt")
        if stage != "sft":
            changes.append((f"of {stage}", other))
        vocabulary = {**values, "vocabulary": other["vocabulary"][:-1]}
        changes.append(("another vocabulary", vocabulary))
    cases += [(label, torch_bytes(content)) for label, content in changes]
    wrong, count = outcomes(path, cases, lambda: gpt.load_checkpoint(path, "sft", "cpu")[2], values)
    assert wrong == {} and count > 800 and not (tmp_path / "marker").exists()
