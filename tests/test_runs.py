"""Runs as users start, stop, kill and repeat them: real processes, real signals, real files."""
import csv
import importlib
import json
import math
import os
import signal
import time

import pytest
import torch
from conftest import column, command, fork, make_photos, run

import common
import detco
import finetune_fasterrcnn
import moco_v2

MOCO = ("moco_v2.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --queue-size 16 "
        "--dim 16 --bn-groups 2 --log-every 2").split()
DETCO = ["detco.py", *MOCO[1:], "--local-size", "54"]
DUPR = ["dupr.py", *MOCO[1:], "--roi-size", *"2222", "--patch-keys", "6", "--rand-augment"]
SOCO = ("soco.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --small-size 32 "
        "--fpn-channels 8 --hidden 24 --dim 16 --log-every 2").split()
BARLOW = ("barlow_twins.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --dim 16 "
          "--log-every 2").split()
DETECTOR = ("finetune_fasterrcnn.py --train-scenes 12 --test-scenes 4 --iterations 9 "
            "--batch-size 4 --fpn-channels 16 --rois 8 --min-size 64 "
            "--log-every 2").split()
ADAM = [*DETECTOR, "--optimizer", "adam"]
STEPS = {"moco_v2.py": 6, "detco.py": 6, "dupr.py": 6, "soco.py": 6, "finetune_fasterrcnn.py": 9}


def assert_identical(a, b, path="checkpoint"):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{path}[{i}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def interrupt(words, out, processes, number, whole_group):
    """Start, send the signal after the first checkpoint; exit status, step saved, stderr."""
    process = command(*words, processes=processes)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    state = common.load_checkpoint(out / "checkpoint.pt")
    assert 0 < state["step"] < STEPS[words[0]]
    return process.returncode, state["step"], err


@pytest.mark.beside
def test_stopped_and_started_again_in_one_process(tmp_path):
    """Three methods at once, each stopped after its first checkpoint."""
    signals = {"detco": (DETCO, 2, signal.SIGTERM), "dupr": (DUPR, 1, signal.SIGINT),
               "soco": (SOCO, 1, signal.SIGTERM)}

    def start(name, folder):
        script, workers, _ = signals[name]
        process, = fork(*script, "--workers", workers, "--out", tmp_path / folder / name,
                        log=tmp_path / f"{name}.txt")
        return process

    stopped, waiting = {name: start(name, "killed") for name in signals}, {*signals}
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        for name in [*waiting]:
            if (tmp_path / "killed" / name / "checkpoint.pt").exists():
                os.kill(stopped[name].pid, signals[name][2])
                waiting.remove(name)
        time.sleep(0.01)
    for name, process in stopped.items():
        process.join(60)
        assert process.exitcode == 128 + signals[name][2]
    steps = {name: common.load_checkpoint(tmp_path / "killed" / name / "checkpoint.pt")["step"]
             for name in signals}
    processes = [start(name, folder) for name in signals for folder in ("whole", "killed")]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 6
    for name, step in steps.items():
        assert 0 < step < STEPS[f"{name}.py"]
        assert f"going on after step {step}" in (tmp_path / f"{name}.txt").read_text()
        whole, killed = (common.load_checkpoint(tmp_path / folder / name / "checkpoint.pt")
                         for folder in ("whole", "killed"))
        assert whole["step"] == STEPS[f"{name}.py"]
        assert_identical(whole, killed)
    names = {p.name for p in (tmp_path / "killed" / "soco").iterdir()}
    assert names == {"args.json", "checkpoint.pt", "curves.png", "log.csv", "lock", "backbone.pt",
                     "detector.pt", "proposals.npz"}
    momenta = [float(value) for value in column(tmp_path / "killed" / "soco", "momentum")]
    means = [1 - 0.01 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(6)]
    rows = [0, *map(int, column(tmp_path / "killed" / "soco", "step"))]  # 0.99 to 1, over the run
    assert momenta == pytest.approx([sum(means[a:b]) / (b - a) for a, b in zip(rows, rows[1:])])


@pytest.mark.beside
@pytest.mark.parametrize("script, workers, number, whole_group", [
    (MOCO, 1, signal.SIGTERM, False),  # to torchrun alone: the others must follow it
    (ADAM, 0, signal.SIGINT, True)])
def test_stopped_under_torchrun_and_started_again(tmp_path, script, workers, number, whole_group):
    words, log = [*script, "--workers", workers], tmp_path / "log"
    whole = fork(*words, "--out", tmp_path / "whole", processes=2, log=tmp_path / "other")
    again = [*words, "--out", tmp_path / "killed"]
    code, step, err = interrupt(again, tmp_path / "killed", 2, number, whole_group)
    assert code != 0
    processes = whole + fork(*again, processes=2, log=log)
    for process in processes:
        process.join(120)
    out = log.read_text()
    assert [p.exitcode for p in processes] == [0] * 4 and f"going on after step {step}" in out, out
    whole, killed = (common.load_checkpoint(tmp_path / name / "checkpoint.pt")
                     for name in ("whole", "killed"))
    assert whole["step"] == STEPS[script[0]]
    assert_identical(whole, killed)
    logs = []
    for name in ("whole", "killed"):
        with open(tmp_path / name / "log.csv", newline="") as file:
            logs.append([{**row, "images_per_s": ""} for row in csv.DictReader(file)])
    steps = [int(row["step"]) for row in logs[1]]  # a stop writes a line of its own
    assert steps == sorted({*steps, step}) and logs[0][-1] == logs[1][-1]
    names = {"args.json", "checkpoint.pt", "curves.png", "lock", "log.csv"}
    fine_tuned = script[0] == "finetune_fasterrcnn.py"
    names |= {"ap.json", "detections.png"} if fine_tuned else {"backbone.pt"}
    assert {p.name for p in (tmp_path / "killed").iterdir()} == names
    assert out.count(f"step {whole['step']}/") == 1  # said once for all processes
    assert ("in each of 2 processes by itself" in out) == (script is ADAM)
    if fine_tuned:
        ap = [json.loads((tmp_path / name / "ap.json").read_text()) for name in ("whole", "killed")]
        assert ap[0] == ap[1]


@pytest.mark.beside
def test_bad_input_is_one_line_in_every_process(tmp_path):
    code, out, err = run("moco_v2.py", "--data", tmp_path / "nowhere", "--out", tmp_path,
                         processes=2)
    assert code != 0 and not out
    assert err.count("error: no such folder") == 1


# -------------------------------------------------------------- in this process: one line, and why


def refusal(main, words):
    with pytest.raises(SystemExit) as caught:
        main([str(w) for w in words])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: ")
    assert "\n" not in caught.value.code and len(caught.value.code) < 400
    return caught.value.code


TINY = ("--epochs 2 --batch-size 16 --image-size 32 --queue-size 32 --dim 16 --bn-groups 2 "
        "--workers 0").split()


@pytest.mark.parametrize("flags, message", [
    ("--batch-size 30 --bn-groups 8", "batch size 30 does not divide into 8"),
    ("--queue-size 8", "queue size 8 is less than the 16 keys of a step"),
    ("--batch-size 160 --queue-size 320", "batch size 160 is more than all 120"),
    ("--arch resnet1", "unknown architecture resnet1"),
    ("--epochs 0", "--epochs 0 is not"), ("--workers -1", "--workers -1 is not"),
    ("--bn-groups 0", "--bn-groups 0 is not"), ("--crop-scale 2", "--crop-scale 2.0 is not"),
    ("--log-every 0", "--log-every 0 is not"), ("--seed -1", "--seed -1 is not"),
    ("--momentum nan", "--momentum nan is not"), ("--image-size 4", "--image-size 4 is not"),
])
def test_moco_refuses(tmp_path, photos, flags, message):
    words = ["--data", photos, "--arch", "resnet18", *TINY, "--out", tmp_path, *flags.split()]
    assert message in refusal(moco_v2.main, words)


def test_finetune_refuses(tmp_path):
    for flags, message in (("--data x", "--data and its splits need --dataset voc"),
                           ("--test-split x", "--data and its splits need --dataset voc"),
                           ("--dataset voc", "needs --data"),
                           ("--dataset voc --data x", "no split 2007/trainval: "),
                           ("--dataset coco --data x", "no such file: x/annotations/instances_"),
                           ("--fraction 0", "--fraction 0.0 is not"),
                           ("--fraction 1.5", "--fraction 1.5 is not"),
                           ("--eval-only x.pt", "no such file: x.pt"),
                           ("--dataset voc --data x --eval-only x.pt", "no such file: x.pt"),
                           ("--weights x.pt", "no such file: x.pt"),
                           ("--rois 0", "--rois 0 is not"),
                           ("--detector c4 --box-head 4conv1fc", "--box-head is of the fpn"),
                           ("--batch-size 401", "batch size 401 is more than all 400"),
                           ("--min-size 0 96", "--min-size [0, 96] is not"),
                           (f"--weights {tmp_path}", "no such file")):
        assert message in refusal(finetune_fasterrcnn.main, [*flags.split(), "--out", tmp_path])


def test_folders_that_do_not_serve(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder, message in (("none", "no such folder"), ("empty", "no images below"),
                            ("file", "no such folder")):
        words = ["--data", tmp_path / folder, "--out", tmp_path / "o"]
        assert message in refusal(moco_v2.main, words)
    assert refusal(moco_v2.main, [*TINY, "--scenes", 32, "--out", tmp_path / "file"])


def test_the_same_command_again_and_another_one(tmp_path, capsys):
    words = [*TINY, "--scenes", 32, "--out", tmp_path]
    moco_v2.main([str(w) for w in words])
    state = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "backbone.pt").unlink()
    capsys.readouterr()
    moco_v2.main([str(w) for w in [*words, "--log-every", 7]])  # may differ
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == state
    assert (tmp_path / "backbone.pt").exists()
    error = refusal(moco_v2.main, [*words, "--tau", 0.3, "--seed", 1])
    assert "seed 0 (now 1), tau 0.2 (now 0.3)" in error and "workers" not in error
    assert "of moco_v2, not of finetune" in refusal(
        finetune_fasterrcnn.main, [*DETECTOR[1:], "--out", tmp_path])
    assert (tmp_path / "checkpoint.pt").read_bytes() == state
    moco_v2.main([str(w) for w in [*words, "--tau", 0.3, "--fresh"]])
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["args"]["tau"] == 0.3
    with open(tmp_path / "log.csv") as file:
        assert len(file.readlines()) == 3  # a header, and the end of two epochs
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1" + 99 * "," + "\n7,0.5,\0")  # a damaged line, and a power cut
    moco_v2.main([str(w) for w in [*words, "--tau", 0.3]])
    with open(tmp_path / "log.csv") as file:
        assert len(file.readlines()) == 3

    (tmp_path / "checkpoint.pt").write_bytes(state[:1000])
    assert "holds no tensors that can be read" in refusal(moco_v2.main, words)


def test_broken_images_are_named_once_and_counted(tmp_path, capsys):
    make_photos(tmp_path / "data", 120)
    (tmp_path / "data" / "0007.jpg").write_bytes(b"\xff\xd8 no more")
    words = ["--data", tmp_path / "data", "--arch", "resnet18", *TINY, "--log-every", 1]
    moco_v2.main([str(w) for w in [*words, "--out", tmp_path / "a"]])
    out = capsys.readouterr().out
    assert out.count("0007.jpg") == 1 and "(1 of 120 so far)" in out
    (tmp_path / "data" / "0090.jpg").write_bytes(b"")
    error = refusal(moco_v2.main, [*words, "--out", tmp_path / "b", "--epochs", 3, "--workers", 2])
    assert error == "error: 2 of 120 images cannot be decoded: over 1%"
    for file in (tmp_path / "data").iterdir():
        file.write_bytes(b"")
    error = refusal(moco_v2.main, [*words, "--out", tmp_path / "c", "--workers", 2])
    assert "none of the 120 images can be decoded: cannot identify image file '/" in error


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    words = [*TINY, "--scenes", 32, "--out", tmp_path, "--log-every", 100]
    assert "the loss is not finite at step 2; checkpoint: none" in refusal(
        moco_v2.main, [*words, "--lr", "1e30"])
    assert not (tmp_path / "checkpoint.pt").exists()
    error = refusal(finetune_fasterrcnn.main, [*DETECTOR[1:], "--lr", "1e30", "--warmup", 2,
                                               "--workers", 0, "--out", tmp_path])
    assert "the loss is not finite at step" in error


@pytest.mark.parametrize("words", [MOCO, [*DETCO, "--patch-size", "18"], DUPR, SOCO, BARLOW,
                                   ["vicreg.py", *BARLOW[1:]], DETECTOR], ids=lambda w: w[0])
def test_one_step_in_bfloat16_is_near_one_in_float32(tmp_path, words):
    module, losses, gradients = importlib.import_module(words[0].removesuffix(".py")), {}, {}
    for kind in ("bfloat16", "float32"):
        once = ["--iterations", "1"] if words is DETECTOR else ["--epochs", "1", "--batch-size", 16]
        flags = [*once, "--out", tmp_path / kind, "--precision", kind, "--workers", 0]
        module.main([str(w) for w in [*words[1:], *flags]])
        losses[kind], = map(float, column(tmp_path / kind, "loss"))
        state = common.load_checkpoint(tmp_path / kind / "checkpoint.pt")
        of_weights = [v["momentum_buffer"] for v in state["optimizer"]["state"].values()]
        gradients[kind] = torch.cat([v.flatten() for v in of_weights])
        tensors = [*of_weights, *state["model"].values()]
        assert {v.dtype for v in tensors if v.is_floating_point()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    cosine = torch.cosine_similarity(gradients["bfloat16"], gradients["float32"], dim=0)
    assert cosine > 0.75


def test_bfloat16_on_cpus_refuses_images_that_it_gets_wrong(tmp_path):
    for module, words in ((moco_v2, [*MOCO, "--image-size", "16"]), (detco, DETCO)):
        words = [*words[1:], "--precision", "bfloat16", "--workers", "0", "--out", tmp_path]
        assert "bfloat16 on CPUs wants more than 16 pixels" in refusal(module.main, words)


def test_warnings_of_queues_that_do_not_fit(tmp_path, capsys):
    moco_v2.main([str(w) for w in [*TINY, "--epochs", 1, "--scenes", 64, "--out", tmp_path / "a"]])
    out = capsys.readouterr().out
    assert "more than a quarter of 64 images" in out and "(K/B)(1-m)" not in out
    moco_v2.main([str(w) for w in [*TINY, "--epochs", 1, "--scenes", 128, "--momentum", 0.5,
                                   "--out", tmp_path / "b"]])
    out = capsys.readouterr().out
    assert "quarter" not in out and "(K/B)(1-m) is 1.00" in out


def test_random_queue_starts_random(tmp_path):
    for flags, name in ((["--random-queue"], "random"), ([], "filled")):
        moco_v2.main([str(w) for w in [*TINY, "--scenes", 64, "--epochs", 1, "--queue-size", 128,
                                       "--lr", 0, "--out", tmp_path / name, *flags]])
    spread = {name: common.load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]["queue.keys"]
              for name in ("random", "filled")}
    # 64 keys of the untrained encoder went in; the other 64 rows are what the queue started with
    assert spread["random"][64:].std(0).mean() > 0.2 > spread["filled"][64:].std(0).mean()
