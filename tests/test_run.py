"""The plumbing of every run, with a network of one linear layer where that is enough; then runs of
the commands as users start, stop and repeat them: real processes, real signals, real files."""
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (DETCO, DETECTOR, MOCO, ROOT, SOCO, assert_identical, column, command,
                      ended, fork, make_photos, process_group, refusal, start_processes)
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import finetune_fasterrcnn
import moco_v2
from common import InputError, Queue, cosine_schedule
from plumbing import run as plumbing
from plumbing.batch_norm import SyncBatchNorm
from plumbing.drawing import read_log
from plumbing.flags import Parser, add_run_arguments, fit_recipe, real, whole
from plumbing.images import open_images, seed_for
from plumbing.run import Run, check_queue, distribute, gather_objects, launch, mixed_precision
from plumbing.weights import load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def signals():
    """A Run that a test makes by itself leaves its signal handlers: put back what was there."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


# --------------------------------------------------------------------- a method of one linear layer


def mean_colour(image):
    return image.float().mean((1, 2)) / 255


def train(args, device):
    images = open_images(args.data, args.scenes)
    torch.manual_seed(args.seed)
    model, ddp = distribute(nn.Linear(3, 2), device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    run = Run(args, "toy", images, model=model, optimizer=optimizer)
    for step, batch in run.batches(images, mean_colour):
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps))
        noise = torch.rand_like(batch)
        loss = (ddp(batch + noise) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, loss_chance=loss.new_full((), 1.5), noise=noise.mean())
    run.finish(model, "one layer")


def parse_args(argv=None):
    parser = Parser()
    parser.add_argument("--data")
    parser.add_argument("--scenes", type=whole(1), default=20)
    parser.add_argument("--epochs", type=whole(1), default=2)
    parser.add_argument("--batch-size", type=whole(1), default=4)
    parser.add_argument("--lr", type=real(0), default=0.1)
    add_run_arguments(parser, out="runs/toy")
    parser.set_defaults(workers=0, log_every=2)
    return parser.parse_args(argv)


def main(argv):
    launch(train, parse_args, [str(word) for word in argv])


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("type_, good, wrong", [
    (whole(1), {"1": 1, "7": 7}, {"0": "0 is not at least 1", "-3": "-3 is not at least 1",
                                  "1.5": "invalid int value: '1.5'", "x": "invalid int value"}),
    (real(0), {"0": 0.0, "1e-9": 1e-9, "3": 3.0}, {"-0.5": "-0.5 is not at least 0",
                                                   "nan": "nan is not at least 0",
                                                   "ten": "invalid float value: 'ten'"}),
    (real(1e-3, 1), {"0.001": 1e-3, "1": 1.0}, {"0": "0 is not from 0.001 to 1",
                                                "1.1": "1.1 is not from 0.001 to 1",
                                                "inf": "inf is not from 0.001 to 1"})])
def test_numbers_of_flags(type_, good, wrong):
    parser = Parser()
    parser.add_argument("--some-number", type=type_)
    parser.add_argument("--pair", type=type_, nargs=2)
    for text, value in good.items():
        found = parser.parse_args(["--some-number", text, "--pair", text, text])
        assert found.some_number == value and found.pair == [value] * 2
        assert type(found.some_number) is type(value)
    for text, message in wrong.items():
        for words in ([f"--some-number={text}"], ["--pair", next(iter(good)), text]):
            with pytest.raises(InputError) as caught:
                parser.parse_args(words)
            flag = words[0].split("=")[0]
            assert str(caught.value).startswith(f"argument {flag}: {message}")
            assert str(caught.value).endswith(" (--help lists the flags)")


def test_what_is_no_flag():
    with pytest.raises(InputError, match=r"^unrecognized arguments: --epoch3 1 \(--help lists"):
        parse_args(["--epoch3", "1"])
    with pytest.raises(InputError, match="^argument --precision: invalid choice: 'float16' "):
        parse_args(["--precision", "float16"])


@pytest.mark.parametrize("flags, message", [
    ("--epochs 0", "argument --epochs: 0 is not at least 1"),
    ("--workers -1", "argument --workers: -1 is not at least 0"),
    ("--crop-scale 2", "argument --crop-scale: 2 is not from 0.001 to 1"),
    ("--momentum nan", "argument --momentum: nan is not from 0 to 1"),
    ("--image-size 4", "argument --image-size: 4 is not at least 8"),
    ("--seed -1", "argument --seed: -1 is not at least 0"),
    ("--log-every 0", "argument --log-every: 0 is not at least 1"),
    ("--queue-size many", "argument --queue-size: invalid int value: 'many'")])
def test_a_wrong_number_is_one_line(tmp_path, flags, message):
    line = refusal(moco_v2.main, [*MOCO[1:], "--out", tmp_path / "run", *flags.split()])
    assert line == f"error: {message} (--help lists the flags)"
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--log-every" in out and "(default runs/toy)" in out


def test_finetune_refuses(tmp_path):
    for flags, message in (("--data x", "--data and its splits need --dataset voc"),
                           ("--test-split x", "--data and its splits need --dataset voc"),
                           ("--dataset voc", "needs --data"),
                           ("--dataset voc --data x", "no split 2007/trainval: "),
                           ("--dataset coco --data x", "no such file: x/annotations/instances_"),
                           ("--fraction 0", "--fraction: 0 is not"),
                           ("--fraction 1.5", "--fraction: 1.5 is not"),
                           ("--eval-only x.pt", "no such file: x.pt"),
                           ("--dataset voc --data x --eval-only x.pt", "no such file: x.pt"),
                           ("--weights x.pt", "no such file: x.pt"),
                           ("--rois 0", "--rois: 0 is not"),
                           ("--detector c4 --box-head 4conv1fc", "--box-head is of the fpn"),
                           ("--classes disc", "--classes needs --dataset voc or coco"),
                           ("--batch-size 401", "batch size 401 is more than all 400"),
                           ("--min-size 0 96", "--min-size: 0 is not"),
                           (f"--weights {tmp_path}", "no such file")):
        assert message in refusal(finetune_fasterrcnn.main, [*flags.split(), "--out", tmp_path])


# -------------------------------------------------------------------------------------- the command


def launched(error, monkeypatch, local_rank=0):
    """The exit status, or the line, of a command whose work raises an error."""
    def work(_args, _device):
        raise error

    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as stopped:
        launch(work, parse_args, ["--out", "somewhere"])
    return stopped.value.code


def test_errors_that_a_user_can_put_right_are_one_line(monkeypatch):
    waited = []
    monkeypatch.setattr(plumbing.time, "sleep", waited.append)
    from_worker = InputError("Caught InputError in DataLoader worker process 0.\nOriginal "
                             "Traceback (most recent call last):\n  ...\n"
                             "common.InputError: none of the 3 images can be decoded\n")
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    again = "; run the same command again to resume"
    for error, line in (
            (InputError("no such folder: x"), "error: no such folder: x"),
            (from_worker, "error: none of the 3 images can be decoded"),
            (OSError(28, "No space left on device"),
             "error: somewhere: [Errno 28] No space left on device"),
            (PermissionError(13, "Permission denied", "file"),
             "error: [Errno 13] Permission denied: 'file'"),
            (killed, f"error: {str(killed)}{again}")):
        assert launched(error, monkeypatch) == line and not waited
        assert launched(error, monkeypatch, local_rank=1) == line  # after the first process's
        assert waited == ([] if error is killed else [5])
        waited.clear()
    for error in (ConnectionResetError("Connection reset by peer"), EOFError(),
                  RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")):
        assert launched(error, monkeypatch) == f"error: another process has ended{again}"
        assert launched(error, monkeypatch, local_rank=1) == 1


def test_an_error_of_the_program_has_its_traceback(monkeypatch):
    for error in (RuntimeError("shapes do not match"), KeyError("k")):
        with pytest.raises(type(error), match=str(error)):
            launched(error, monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_is_one_line(capfd, number):
    def unanswered(_number, _frame):
        raise AssertionError("not answered by launch")

    signal.signal(signal.SIGTERM, unanswered)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]

    def work(_args, _device):
        signal.raise_signal(number)
        raise AssertionError("went on")

    with pytest.raises(SystemExit) as stopped:
        launch(work, parse_args, [])
    assert stopped.value.code == 128 + number
    assert capfd.readouterr() == ("", "stopped; run the same command again to resume\n")
    assert before == [signal.getsignal(each)
                      for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]


def test_sigterm_ends_a_process_that_waits_for_the_others():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    process = subprocess.Popen([sys.executable, ROOT / "moco_v2.py", "--scenes", "16"],
                               env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    deadline, meets = time.monotonic() + 60, False
    while not meets:  # until it waits where the processes meet
        with socket.socket() as there:
            meets = there.connect_ex(("127.0.0.1", port)) == 0
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM


def test_bfloat16_where_it_is_asked_for():
    for precision, dtype in ((None, torch.float32), ("float32", torch.float32),
                             ("bfloat16", torch.bfloat16)):
        with mixed_precision(SimpleNamespace(precision=precision), CPU, side=17):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with pytest.raises(InputError, match="^bfloat16 on CPUs needs images of more than 16 pixels, "
                                         "not 16: PyTorch's gradients are wrong there$"):
        mixed_precision(SimpleNamespace(precision="bfloat16"), CPU, side=16)


def test_bfloat16_is_the_default_on_gpus(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: seen.append((*args, more)))
    for precision in (None, "float32"):
        mixed_precision(SimpleNamespace(precision=precision), torch.device("cuda"), side=8)
    assert seen == [("cuda", torch.bfloat16, dict(enabled=on)) for on in (True, False)]


def test_what_a_gpu_is_set_to(monkeypatch):
    seen = []
    for owner, name, value in ((torch.cuda, "is_available", lambda: True),
                               (torch.cuda, "device_count", lambda: 2),
                               (torch.cuda, "set_device", seen.append),
                               (torch, "set_float32_matmul_precision", seen.append),
                               (torch.backends.cudnn, "deterministic", False)):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert plumbing.setup().type == "cuda" and seen == [1, "high"]
    assert torch.backends.cudnn.deterministic
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="3 processes, but 2 GPUs"):
        plumbing.setup()


@pytest.mark.parametrize("files, expected", [
    ({"/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:  2048 kB\n",
      "/sys/fs/cgroup/memory.max": "max\n"}, 2 ** 21),
    ({"/proc/meminfo": "MemAvailable: 2048 kB\n", "/sys/fs/cgroup/memory.max": "1000000\n",
      "/sys/fs/cgroup/memory.current": "400000\n"}, 600_000),
    ({}, math.inf), ({"/proc/meminfo": "?"}, math.inf)])
def test_memory_that_is_free(monkeypatch, files, expected):
    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(plumbing.Path, "read_text", read)
    assert plumbing.free_memory(CPU) == expected


def test_warnings_of_queues_that_do_not_fit(capsys):
    check_queue(32, 16, 0.999, 128)
    assert capsys.readouterr().out == ""
    check_queue(32, 16, 0.999, 64)
    out = capsys.readouterr().out
    assert "a queue of 32 is more than a quarter of 64 images" in out and "(K/B)(1-m)" not in out
    check_queue(32, 16, 0.5, 128)
    out = capsys.readouterr().out
    assert "quarter" not in out and "(K/B)(1-m) is 1.00 (MoCo's: 0.26)" in out
    check_queue(16, 16, 0.9, 64)
    with pytest.raises(InputError, match="^queue size 15 is less than the 16 keys of a step$"):
        check_queue(15, 16, 0.9, 64)


# ----------------------------------------------------------------------------------- a run's folder


def test_what_a_run_leaves(tmp_path, capsys, curves):
    main(["--out", tmp_path, "--epochs", 2, "--log-every", 3])
    rows = read_log(tmp_path / "log.csv")
    assert [*rows[0]] == ["step", "epoch", "loss", "loss_chance", "noise", "lr", "images_per_s"]
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 10]  # every third, and the epochs' ends
    assert [row["epoch"] for row in rows] == [0.6, 1, 1.2, 1.8, 2]
    factors = [(1 + math.cos(math.pi * step / 10)) / 2 for step in (2, 4, 5, 8, 9)]
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * factor for factor in factors])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "toy: scenes 20, epochs 2, batch_size 4, lr 0.1, seed 0"
    assert re.fullmatch(r"step 2/10  \S+ s each  0.0 min left  \(--epochs sets how many\)", out[1])
    assert out[2].startswith("epoch 1/2  step 3/10  ") and " images/s  loss " in out[2]
    assert out[7:] == [f"{tmp_path}/backbone.pt is one layer"]
    assert {p.name for p in tmp_path.iterdir()} == {"args.json", "backbone.pt", "checkpoint.pt",
                                                    "curves.png", "lock", "log.csv"}
    args = json.loads((tmp_path / "args.json").read_text())
    assert args == vars(parse_args(["--out", str(tmp_path), "--epochs", "2", "--log-every", "3"]))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"] == "toy" and state["step"] == 10 and state["args"]["epochs"] == 2
    assert not {*state["args"]} & {"out", "workers", "log_every", "fresh"}
    assert_identical(load_checkpoint(tmp_path / "backbone.pt"), dict(state["model"]))
    with Image.open(tmp_path / "curves.png") as image:
        assert 900 < image.width < 1000 and 700 < image.height < 900  # loss, noise, lr

    main(["--out", tmp_path / "each", "--log-every", 1, "--workers", 1])  # means over the steps
    each = read_log(tmp_path / "each" / "log.csv")
    for name in ("loss", "noise"):
        values = [row[name] for row in each]
        means = [np.mean(values[a:b]) for a, b in itertools.pairwise((0, 3, 5, 6, 9, 10))]
        assert [row[name] for row in rows] == pytest.approx(means)


def test_the_same_command_again_and_another_one(tmp_path, capsys):
    main(["--out", tmp_path])
    state = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "backbone.pt").unlink()
    capsys.readouterr()
    main(["--out", tmp_path, "--log-every", 7, "--workers", 1])  # these may differ
    assert f"{tmp_path}: finished, all 10 steps are done; --fresh" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == state
    assert (tmp_path / "backbone.pt").exists()
    error = refusal(main, ["--out", tmp_path, "--lr", 0.3, "--seed", 1])
    assert "lr 0.1 (now 0.3), seed 0 (now 1); give" in error and "workers" not in error
    assert "of toy, not of moco_v2" in refusal(moco_v2.main, [*MOCO[1:], "--out", tmp_path])
    assert (tmp_path / "checkpoint.pt").read_bytes() == state
    main(["--out", tmp_path, "--lr", 0.3, "--fresh"])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["args"]["lr"] == 0.3
    log = (tmp_path / "log.csv").read_text()
    assert len(log.splitlines()) == 7  # a header, every second step and the end of two epochs
    with open(tmp_path / "log.csv", "a") as file:  # of steps after the checkpoint; damaged; cut off
        file.write("12,2.4,1,1,1,1,1\n" + "1" + 99 * "," + "\n7,0.5,\0")
    main(["--out", tmp_path, "--lr", 0.3])
    assert (tmp_path / "log.csv").read_text() == log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_between_two_steps_and_resumed(tmp_path, capsys, monkeypatch, number):
    main(["--out", tmp_path / "whole"])
    end_step = Run.end_step

    def stop(run, *args, **parts):
        if run.step == 2:
            signal.raise_signal(number)
        end_step(run, *args, **parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Run, "end_step", stop)
        main(["--out", tmp_path / "stopped"])
    assert stopped.value.code == 128 + number
    said = f"stopped by {number.name}; run the same command again to resume after step 3\n"
    assert said in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 3
    main(["--out", tmp_path / "stopped"])
    assert f"{tmp_path}/stopped: resuming after step 3\n" in capsys.readouterr().out
    assert_identical(*(load_checkpoint(tmp_path / name / "checkpoint.pt")
                       for name in ("whole", "stopped")))
    assert column(tmp_path / "stopped", "step") == ["2", "3", "4", "5", "6", "8", "10"]


def test_every_group_follows_the_schedule_also_after_resuming(tmp_path):
    def start():
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD([dict(params=[layer.weight]),
                                     dict(params=[layer.bias], lr=0.5)], lr=2.0)
        return Run(parse_args(["--out", str(tmp_path)]), "toy", torch.arange(20), model=layer,
                   optimizer=optimizer)

    run, factors = start(), [0.25, 1.0, 0.5, 0.1, 0.02, 0.7]
    for step, factor in enumerate(factors):
        if step == 5:  # the end of an epoch, at which the other one has saved
            run = start()
            assert run.step == 5
        assert run.scale_learning_rates(factor) == 2 * factor
        rates = [group["lr"] for group in run.parts["optimizer"].param_groups]
        assert rates == [2 * factor, 0.5 * factor]
        run.end_step(torch.zeros(()), 2 * factor)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    main(["--out", folder])
    return (folder / "checkpoint.pt").read_bytes()


def changed(state, name, value):
    """A checkpoint in which one entry is another, or is gone."""
    state = {**state, "model": {**state["model"]}, "args": {**state["args"]}}
    place = next(each for each in (state, state["args"], state["model"]) if name in each)
    place[name] = value
    if value is None:
        del place[name]
    return state


@pytest.mark.parametrize("name, value, message", [
    ("method", "detco", "is a checkpoint of detco, not of toy"),
    ("epochs", 32, "epochs 32 (now 2)"), ("lr", None, "lr None (now 0.1)"),
    ("args", None, "does not fit: 'args'"), ("step", "two", "does not fit: invalid literal"),
    ("optimizer", None, "does not fit: 'optimizer'"), ("optimizer", [1], "does not fit: "),
    ("weight", torch.zeros(32, 16), "does not fit: Error(s) in loading state_dict"),
    ("weight", None, "does not fit: Error(s) in loading state_dict")])
def test_a_checkpoint_of_something_else(tmp_path, finished, name, value, message):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(finished)
    torch.save(changed(load_checkpoint(path), name, value), path)
    before = path.read_bytes()
    assert message in refusal(main, ["--out", tmp_path])
    assert path.read_bytes() == before


def test_a_damaged_checkpoint(tmp_path, finished):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", finished[:len(finished) // 2], finished[:-1], finished[1:],
                    b"no checkpoint"):
        path.write_bytes(content)
        assert refusal(main, ["--out", tmp_path]).startswith(
            f"error: {path} holds no tensors that can be read: ")
        assert path.read_bytes() == content


def test_folders_that_do_not_serve(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder, message in (("none", "no such folder"), ("empty", "no images below"),
                            ("file", "no such folder")):
        assert message in refusal(main, ["--data", tmp_path / folder, "--out", tmp_path / "o"])
    assert "File exists: " in refusal(main, ["--out", tmp_path / "file"])
    assert "batch size 21 is more than all 20" in refusal(
        main, ["--batch-size", 21, "--out", tmp_path / "o"])


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """Its steps, and the images in each, follow from their number and order."""
    make_photos(tmp_path / "data", 9, size=(8, 6))
    words = ["--data", tmp_path / "data", "--out", tmp_path / "run"]
    main(words)
    (tmp_path / "data" / "0003.jpg").rename(tmp_path / "data" / "x.jpg")
    assert "other arguments or images: 9 images (now others); give" in refusal(main, words)
    (tmp_path / "data" / "x.jpg").unlink()
    assert "images: 9 images (now 8); give" in refusal(main, words)
    make_photos(tmp_path / "data", 9, size=(8, 6))
    main(words)
    (tmp_path / "data" / "0003.jpg").unlink()
    main([*words, "--fresh"])
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["fingerprint"][0] == 8


def test_a_run_within_the_folder_of_its_images(tmp_path, capsys):
    make_photos(tmp_path, 9, size=(8, 6))
    words = ["--data", tmp_path, "--out", tmp_path / "runs" / "toy"]
    main(words)
    assert (tmp_path / "runs" / "toy" / "curves.png").exists()
    capsys.readouterr()
    main(words)  # curves.png is no image to train on
    said = capsys.readouterr().out
    assert "9 images; left out: 1 of a run\n" in said
    assert "finished, all 4 steps are done" in said


def test_broken_images_are_named_once_and_counted(tmp_path, capsys):
    make_photos(tmp_path / "data", 120, size=(8, 6))
    (tmp_path / "data" / "0007.jpg").write_bytes(b"\xff\xd8 no more")
    words = ["--data", tmp_path / "data", "--batch-size", 24, "--log-every", 1]
    main([*words, "--out", tmp_path / "a"])
    out = capsys.readouterr().out
    assert out.count("cannot decode") == 1 and "(1 of 120 so far)" in out
    assert "0007.jpg', which starts with b'" in out
    assert "no more'): another image takes its place (1 of 120" in out
    for i in (80, 90):
        (tmp_path / "data" / f"00{i}.jpg").write_bytes(b"")
    error = refusal(main, [*words, "--out", tmp_path / "b", "--workers", 1])
    assert error == "error: 3 of 120 images cannot be decoded: over 1%"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    for words, message in (
            (["--epochs", 1], "error: the loss is not finite at step 2; checkpoint: none"),
            (["--batch-size", 20], "the loss is not finite at step 2; checkpoint: "
             f"{tmp_path}/b/checkpoint.pt is the last good one")):
        out = tmp_path / ("a" if "none" in message else "b")
        assert message in refusal(main, [*words, "--lr", "1e30", "--out", out, "--log-every", 100])
        assert (out / "checkpoint.pt").exists() == ("none" not in message)
    error = refusal(finetune_fasterrcnn.main, [*DETECTOR[1:], "--lr", "1e30", "--warmup", 2,
                                               "--workers", 0, "--out", tmp_path / "c"])
    assert "the loss is not finite at step" in error


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    error = refusal(main, ["--batch-size", 20, "--lr", "3e38", "--out", tmp_path])
    assert error == "error: the weights are not finite after step 1: not saved"
    assert not (tmp_path / "checkpoint.pt").exists()


def filled(out, queues):
    """Fill queues with the numbers of the images of batches -> these batches, as they came."""
    args, seen = parse_args(["--out", str(out)]), []
    images = torch.arange(20)
    run = Run(args, "toy", images)

    def batches(steps):
        for step, batch in run.batches(images, lambda x: x, steps):
            assert not torch.is_autocast_enabled("cpu")  # colours are made in float32
            seen.append((step, batch.tolist()))
            yield step, batch

    def encode(batch):
        assert torch.is_autocast_enabled("cpu")
        return [batch.float().unsqueeze(1) + 100 * i for i in range(len(queues))]

    run.fill_queues(queues, batches, encode, torch.autocast("cpu", torch.bfloat16))
    return seen, run


def test_queues_are_filled_before_the_first_step(tmp_path, capsys):
    queues = [Queue(10, 1), Queue(10, 1)]
    seen, run = filled(tmp_path, queues)
    assert [step for step, _ in seen] == [10, 11, 12]  # of steps after the last: three batches of 4
    keys = sum((batch for _, batch in seen), [])
    for i, queue in enumerate(queues):
        ordered = queue.keys.roll(-int(queue.oldest), dims=0).flatten() - 100 * i
        assert ordered.tolist() == keys[-10:]
    assert capsys.readouterr().out.endswith("\nfilling 2 queues of 10 keys\n")
    filled(tmp_path, queues[:1])
    assert capsys.readouterr().out.endswith("\nfilling 1 queue of 10 keys\n")
    run.step = 1
    run.fill_queues(None, None, None)  # a resumed run's are full


def test_stopped_while_a_queue_is_filled(tmp_path, capsys):
    class Stops(Queue):
        def push(self, keys):
            super().push(keys)
            signal.raise_signal(signal.SIGTERM)

    queue = Stops(10, 1)
    with pytest.raises(SystemExit) as stopped:
        filled(tmp_path, [queue])
    assert stopped.value.code == 128 + signal.SIGTERM and queue.oldest == 4
    assert capsys.readouterr().out.endswith(
        "stopped by SIGTERM; run the same command again to resume after step 0\n")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, capfd, monkeypatch):
    """But one within two seconds is torchrun's, which passes on the first."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    args = parse_args(["--out", str(tmp_path)])
    model = nn.Linear(3, 2)
    run = Run(args, "toy", open_images(None, 20), model=model,
              optimizer=torch.optim.SGD(model.parameters(), 0.1))
    for _ in run.batches(run.images, mean_colour):
        signal.raise_signal(signal.SIGINT)
        now[0] += 1
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().out.count("stopping after this step; once more to stop now") == 1
        now[0] += 2
        with pytest.raises(KeyboardInterrupt) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.args == (signal.SIGTERM,)
        with pytest.raises(SystemExit) as stopped:
            run.stop_if_asked()
        assert stopped.value.code == 128 + signal.SIGINT
        break


def test_a_slow_step_is_saved_and_time_is_told(tmp_path, capsys, monkeypatch):
    """torchrun kills a process that has not ended 30 seconds after a signal."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    args = parse_args(["--out", str(tmp_path), "--log-every", "100", "--epochs", "3"])
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = Run(args, "toy", open_images(None, 40), model=model, optimizer=optimizer)
    capsys.readouterr()
    saved = []
    for _, _ in run.batches(run.images, mean_colour):
        now[0] += 25 if run.step == 3 else 9
        run.end_step(torch.zeros(()), 0.1)
        if run.checkpoint.exists():
            saved.append((run.step, load_checkpoint(run.checkpoint)["step"]))
        if run.step == 8:
            break
    assert saved == [(step, 4) for step in range(4, 9)]  # only after the slow one, before the end
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step 2/30  9 s each  4.2 min left  (--epochs sets how many)"
    assert [line.split("  ")[0] for line in said[1:]] == ["step 4/30", "epoch 1/3", "step 7/30"]
    assert said[1].endswith("step 4/30  13 s each  5.6 min left")


def test_what_looks_wrong_at_the_end_is_said(tmp_path, capsys):
    args = parse_args(["--out", str(tmp_path)])
    run = Run(args, "toy", open_images(None, 20), steps=0)
    for last, said in ((dict(loss=5.5, loss_chance=5.55), "the loss ends at chance (5.5 of 5.55)"),
                       (dict(loss=5.0, loss_chance=5.55), None), (dict(loss=-3.0), None),
                       ({}, None),
                       (dict(loss=-7.9, directions=1.3), "fill 1.3 directions only"),
                       (dict(loss=-7.0, directions=30.0), None)):
        capsys.readouterr()
        run.last = last
        run.finish(nn.Linear(1, 1), "a layer")
        *warnings, end = capsys.readouterr().out.splitlines()
        assert end.endswith("backbone.pt is a layer") and len(warnings) == (said is not None)
        assert said is None or said in warnings[0]


def test_a_processor_without_bfloat16_is_pointed_out(monkeypatch, capsys):
    args, cpu = SimpleNamespace(precision="bfloat16"), torch.device("cpu")
    for text, warned in (("flags: sse avx2", True), ("flags: avx512_bf16", False)):
        monkeypatch.setattr(plumbing.Path, "read_text", lambda *_, text=text: text)
        mixed_precision(args, cpu)
        assert ("has no bfloat16 arithmetic" in capsys.readouterr().out) == warned
        mixed_precision(SimpleNamespace(precision=None), cpu)
        assert capsys.readouterr().out == ""


def test_help_shows_the_papers_defaults(capsys):
    parser = Parser()
    parser.add_argument("--x", default=[1.0, 0.1], help="a pair")
    parser.add_argument("--y", default=3, help="a number (default: by the data)")
    parser.add_argument("--z", help="a name")
    parser.add_argument("--flag", action="store_true", help="a switch")
    text = " ".join(parser.format_help().split())
    assert "a pair (default 1.0 0.1)" in text and "a number (default: by the data) --z" in text
    assert "a name --flag" in text and text.endswith("a switch")


def test_a_method_without_scenes_asks_for_data(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scenes", None)
    assert refusal(main, ["--out", tmp_path]) == (
        "error: there is no scenes.py here to draw images: give --data")


def test_few_images_are_pointed_to_the_small_recipe(tmp_path):
    with pytest.raises(InputError, match="363 images are too few for a queue of 65536 keys: --sm"):
        check_queue(65536, 256, 0.999, 363)
    check_queue(4096, 256, 0.999, 363)  # with a warning
    assert "batch size 21 is more than all 20 images: --small sets a recipe" in refusal(
        main, ["--batch-size", 21, "--out", tmp_path])


@pytest.mark.parametrize("images, expected", [
    (20, (2, 2, 4, 1500, 150)), (100, (16, 2, 16, 300, 30)), (363, (32, 2, 64, 83, 8)),
    (1000, (64, 4, 192, 30, 3)), (3500, (64, 4, 256, 9, 1)), (20000, (64, 4, 256, 3, 1))])
def test_the_small_recipe_by_the_number_of_images(images, expected):
    names = "batch_size", "bn_groups", "queue_size", "epochs", "warmup"
    args = SimpleNamespace(**dict.fromkeys((*names, "momentum")))
    fit_recipe(args, images)
    assert tuple(getattr(args, name) for name in names) == expected and args.momentum == 0.99
    assert args.queue_size >= args.batch_size and args.queue_size <= images / 4
    given = SimpleNamespace(batch_size=8, queue_size=None, epochs=5)  # a method without groups
    fit_recipe(given, images)
    assert given.batch_size == 8 and given.epochs == 5 and not hasattr(given, "warmup")
    assert given.queue_size % 8 == 0


def test_lines_on_a_terminal_are_rewritten(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["--out", tmp_path, "--epochs", 1])
    lines = sys.stdout.getvalue().split("\r\033[K")
    assert lines.pop(1).startswith("toy: scenes 20, ")
    assert lines[0] == "" and [len(line) for line in lines[1:3]] == [39, 39]
    assert lines[1].startswith("epoch 1/1  step 2/5  ") and lines[3].startswith("epoch 1/1  step 5")
    assert lines[3].endswith("\n") and lines[4].endswith("is one layer\n")


# ------------------------------------------------------------------------------------ two processes


def one_of_two(number, folder):
    with process_group(number, 2, folder), open(folder / f"{number}.txt", "w") as out, \
            redirect_stdout(out):
        assert gather_objects({"rank": number}) == [{"rank": 0}, {"rank": 1}]
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        model, ddp = distribute(net, CPU, sync_batch_norm=True)
        assert model is net and type(net[1]) is SyncBatchNorm
        assert isinstance(ddp, DistributedDataParallel) and ddp.module is model
        assert ddp.gradient_as_bucket_view and not ddp.broadcast_buffers
        x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        ddp(x[number]).square().sum().backward()
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        plain[0].load_state_dict(model[0].state_dict())
        plain(x.flatten(0, 1))
        torch.testing.assert_close(model[1].state_dict(), plain[1].state_dict())
        apart, _ = distribute(plain, CPU)
        assert type(apart[1]) is nn.BatchNorm2d
        assert model[0].weight.grad.untyped_storage().nbytes() > 4 * 216  # of all: the bucket

        train(parse_args(["--out", str(folder / "two")]), CPU)
        with pytest.raises(InputError, match=f"{folder}/[01] is not one folder that all process"):
            other = folder / str(number)
            if number == 1:
                other.mkdir()
                (other / "checkpoint.pt").write_bytes((folder / "two/checkpoint.pt").read_bytes())
            train(parse_args(["--out", str(other)]), CPU)
        with pytest.raises(InputError, match="batch size 5 does not divide over 2 processes"):
            train(parse_args(["--out", str(folder / "odd"), "--batch-size", "5"]), CPU)


def test_two_processes(tmp_path):
    start_processes(one_of_two, (tmp_path,), 2)
    out = (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""
    assert out.count(" step 10/10 ") == out.count("backbone.pt is one layer") == 1
    noise = []
    for step, number in itertools.product(range(10), range(2)):
        torch.manual_seed(seed_for(0, step, number))
        noise.append(torch.rand(2, 3).mean().item())  # for two images of each process
    found = [float(value) for value in column(tmp_path / "two", "noise")]
    means = [np.mean(noise[2 * a:2 * b]) for a, b in itertools.pairwise((0, 2, 4, 5, 6, 8, 10))]
    assert found == pytest.approx(means)


def test_one_process_is_not_wrapped():
    net = nn.Conv2d(3, 8, 3)
    model, ddp = distribute(net, CPU, sync_batch_norm=True)
    assert model is ddp is net and net.weight.is_contiguous(memory_format=torch.channels_last)
    net = nn.BatchNorm2d(8)
    assert distribute(net, CPU, sync_batch_norm=True)[0] is net and type(net) is nn.BatchNorm2d


# ----------------------------------------------------------------------- the commands, in processes


def test_bad_input_is_said_once_by_two_processes(tmp_path):
    started = {words: command("moco_v2.py", *words.split(), "--out", tmp_path / "run", processes=2)
               for words in ("--data nowhere", "--epochs 0")}
    for words, message in (("--data nowhere", "error: no such folder: nowhere"),
                           ("--epochs 0", "error: argument --epochs: 0 is not at least 1 (--help")):
        out, err = started[words].communicate(timeout=120)
        assert started[words].returncode == 1 and not out
        assert err.count("error: ") == err.count(message) == 1
        assert "Traceback" not in err.split("torch/distributed")[0]  # torchrun's own comes after


def saved(folder, name):
    return load_checkpoint(folder / name / "checkpoint.pt")


def as_soon_as_saved(folders, send):
    """Call send(name) when the folder of that name has a checkpoint, for each."""
    waiting, deadline = {*folders}, time.monotonic() + 120
    while waiting:
        for name in [*waiting]:
            if (folders[name] / "checkpoint.pt").exists():
                send(name)
                waiting.remove(name)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_stopped_and_started_again_in_one_process(tmp_path):
    """Two methods at once, each stopped after its first checkpoint; with loader workers."""
    signals = {"detco": (DETCO, 2, signal.SIGTERM), "soco": (SOCO, 1, signal.SIGINT)}

    def start(name, folder):
        script, workers, _ = signals[name]
        process, = fork(*script, "--workers", workers, "--out", tmp_path / folder / name,
                        log=tmp_path / f"{name}.txt")
        return process

    stopped = {name: start(name, "stopped") for name in signals}
    as_soon_as_saved({name: tmp_path / "stopped" / name for name in signals},
                     lambda name: os.kill(stopped[name].pid, signals[name][2]))
    for name, process in stopped.items():
        assert ended([process]) == [128 + signals[name][2]]
    steps = {name: saved(tmp_path / "stopped", name)["step"] for name in signals}
    again = [start(name, folder) for name in signals for folder in ("whole", "stopped")]
    assert ended(again) == [0] * 4
    for name, step in steps.items():
        assert 0 < step < 6
        assert f"resuming after step {step}\n" in (tmp_path / f"{name}.txt").read_text()
        whole, resumed = (saved(tmp_path / folder, name) for folder in ("whole", "stopped"))
        assert whole["step"] == 6
        assert_identical(whole, resumed)
    momenta = [float(value) for value in column(tmp_path / "stopped" / "soco", "momentum")]
    means = [1 - 0.01 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(6)]
    rows = [0, *map(int, column(tmp_path / "stopped" / "soco", "step"))]  # 0.99 to 1, over the run
    assert momenta == pytest.approx([np.mean(means[a:b]) for a, b in itertools.pairwise(rows)])


def test_stopped_under_torchrun_and_started_again(tmp_path):
    """SIGTERM to torchrun alone, which the others must follow, and Ctrl-C to the whole group."""
    scripts = {"moco": [*MOCO, "--workers", 1],
               "adam": [*DETECTOR, "--masks", "--keypoints", "--optimizer", "adam", "--workers", 0]}
    out = {name: tmp_path / "stopped" / name for name in scripts}
    stopped = {name: command(*words, "--out", out[name], processes=2)
               for name, words in scripts.items()}

    def send(name):
        if name == "moco":
            stopped[name].send_signal(signal.SIGTERM)
        else:
            os.killpg(stopped[name].pid, signal.SIGINT)

    as_soon_as_saved(out, send)
    for process in stopped.values():
        process.communicate(timeout=60)
        assert process.returncode != 0
    steps = {name: saved(tmp_path / "stopped", name)["step"] for name in scripts}
    processes = []
    for name, words in scripts.items():
        for folder in ("whole", "stopped"):
            processes += fork(*words, "--out", tmp_path / folder / name, processes=2,
                              log=tmp_path / f"{folder}-{name}.txt")
    assert ended(processes) == [0] * 8
    for name, step in steps.items():
        last, files = (6, {"backbone.pt"}) if name == "moco" else (9, {"ap.json", "detections.png"})
        assert 0 < step < last
        text = (tmp_path / f"stopped-{name}.txt").read_text()
        assert f"resuming after step {step}\n" in text
        assert text.count(f"step {last}/") == 1  # said once for all processes
        assert ("the statistics of 4 images in 2 processes" in text) == (name == "adam")
        whole, resumed = (saved(tmp_path / folder, name) for folder in ("whole", "stopped"))
        assert whole["step"] == last
        assert_identical(whole, resumed)
        whole, resumed = (read_log(tmp_path / folder / name / "log.csv")
                          for folder in ("whole", "stopped"))
        numbers = [int(row["step"]) for row in resumed]  # a stop writes a line of its own
        assert numbers == sorted({*numbers, step})
        assert {**whole[-1], "images_per_s": 0} == {**resumed[-1], "images_per_s": 0}
        assert {p.name for p in out[name].iterdir()} == {
            "args.json", "checkpoint.pt", "curves.png", "lock", "log.csv", *files}
    ap = [(tmp_path / folder / "adam" / "ap.json").read_text() for folder in ("whole", "stopped")]
    assert ap[0] == ap[1]


def test_one_step_of_a_detector_in_bfloat16_is_near_one_in_float32(tmp_path):
    losses, gradients = {}, {}
    for kind in ("bfloat16", "float32"):
        finetune_fasterrcnn.main([*DETECTOR[1:], "--optimizer", "sgd", "--iterations", "1",
                                  "--workers", "0", "--rois", "64", "--precision", kind,
                                  "--out", str(tmp_path / kind)])
        # not the box head's distance: which RoIs are objects depends on the order of their scores
        losses[kind] = [float(column(tmp_path / kind, name)[0]) for name in (
            "loss_classifier", "loss_objectness", "loss_rpn_box_reg")]
        state = saved(tmp_path, kind)
        momenta = [v["momentum_buffer"] for v in state["optimizer"]["state"].values()]
        gradients[kind] = torch.cat([v.flatten() for v in momenta])
        tensors = [*momenta, *state["model"].values()]
        assert {v.dtype for v in tensors if v.is_floating_point()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    cosine = torch.cosine_similarity(gradients["bfloat16"], gradients["float32"], dim=0)
    assert cosine > 0.9


def test_a_random_queue_starts_random(tmp_path, capsys):
    moco_v2.main([*MOCO[1:], "--random-queue", "--epochs", "1", "--batch-size", "16", "--lr", "0",
                  "--queue-size", "64", "--workers", "0", "--out", str(tmp_path)])
    assert "filling" not in capsys.readouterr().out
    keys = load_checkpoint(tmp_path / "checkpoint.pt")["model"]["queue.keys"]
    # 16 keys of the untrained encoder went in, which are alike; the others are as at the start
    assert keys[16:].std(0).mean() > 0.2 > keys[:16].std(0).mean()
