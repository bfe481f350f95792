"""What is true of every method.  What is particular to one, its equations first of all, is in its
own file, which also has small(**options), a network, and batch(number), what its forward takes."""
import ast
import functools
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import test_barlow_twins
import test_detco
import test_dupr
import test_moco_v2
import test_soco
import test_vicreg
import torch
import torchvision
from conftest import (ROOT, assert_identical, column, make_photos, process_group, refusal,
                      start_processes)
from PIL import Image
from torch.utils._pytree import tree_map

import barlow_twins
import common
import detco
import dupr
import moco_v2
import soco
import vicreg
from common import InputError, View
from plumbing import drawing
from plumbing.flags import fit_recipe
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD, two_views
from plumbing.run import Run, distribute
from plumbing.weights import load_checkpoint
from scenes import Scenes


class Method(NamedTuple):
    module: object
    network: type
    tests: object
    flags: str  # of a short run
    trained: tuple  # prefixes of the names of the parameters that the optimizer changes
    stages: str  # prefix of the backbone that is exported
    averaged: tuple = ()  # names of the network that has a momentum copy, and of the copy
    files: tuple = ()  # that a run writes beside those of every run


RUN = "--scenes 16 --epochs 2 --batch-size 8 --image-size 32 --dim 16 --workers 0 --log-every 1"
QUEUE = f"{RUN} --queue-size 20 --bn-groups 2 --p-blur 0.5 --optimizer sgd --lr 0.05 " \
        "--weight-decay 1e-4"
LARS = f"{RUN} --p-blur 0.9 0.1 --warmup 1 --lr 2"
COLOURS = f"{LARS} --mean 0.4 0.5 0.6 --std 0.2 0.3 0.4"
ENCODERS = dict(trained=("encoder_q.",), stages="encoder_q.stages.",
                averaged=("encoder_q", "encoder_k"))
TWINS = dict(trained=("stages.", "projector."), stages="stages.", files=("correlation.png",))
METHODS = {
    "moco_v2": Method(moco_v2, moco_v2.MoCo, test_moco_v2, QUEUE, **ENCODERS),
    "detco": Method(detco, detco.DetCo, test_detco,
                    f"{QUEUE} --local-size 54 --patch-size 18", **ENCODERS),
    "dupr": Method(dupr, dupr.DUPR, test_dupr,
                   f"{QUEUE} --roi-size 2 2 2 2 --patch-keys 6", **ENCODERS),
    "soco": Method(soco, soco.SoCo, test_soco,
                   f"{LARS} --small-size 32 --view4 32 --fpn-channels 8 --hidden 24",
                   ("online.", "predictor."), "online.backbone.body.", ("online", "target"),
                   ("detector.pt", "proposals.npz")),
    "barlow_twins": Method(barlow_twins, barlow_twins.BarlowTwins, test_barlow_twins, COLOURS,
                           **TWINS),
    "vicreg": Method(vicreg, vicreg.VICReg, test_vicreg, COLOURS, **TWINS)}
CONTRASTIVE = ["moco_v2", "detco", "dupr"]
every_method = pytest.mark.parametrize("name", METHODS)


def run(name, out, *more):
    """A short run of a method, in this process."""
    METHODS[name].module.main([*METHODS[name].flags.split(), *more, "--out", str(out)])


def keys_of(result):
    """The keys that a forward pass returns, those of each queue."""
    _, *keys, _ = result
    return keys if not keys or torch.is_tensor(keys[0]) else keys[0]


def queues_of(model):
    return [model.queue] if hasattr(model, "queue") else [*getattr(model, "queues", ())]


def assert_same(found, wanted):
    """The very same objects, not equal ones."""
    assert [id(each) for each in found] == [id(each) for each in wanted]


# -------------------------------------------------------------------- what a training loop calls


class Call(NamedTuple):
    name: str
    args: tuple  # all of them, with the defaults
    result: object  # of a step of the optimizer: the learning rates in force


def watch(monkeypatch, calls, name, owner, attribute):
    """Write down every call of owner.attribute, at its end."""
    function = getattr(owner, attribute)
    signature = inspect.signature(function)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if name == "step":
            result = [group["lr"] for group in args[0].param_groups]
        calls.append(Call(name, bound.args, result))
        return result

    monkeypatch.setattr(owner, attribute, watched)


@pytest.fixture(scope="module")
def recorded():
    """A function: name of a method -> folder of a short run, and the calls in it; made once."""
    def record(name):
        module, calls = METHODS[name].module, []
        with pytest.MonkeyPatch.context() as monkeypatch:
            for what, owner, attribute in (
                    ("batches", Run, "batches"), ("colour", module, "augment_colour"),
                    ("cut", module, "cut_patches"), ("place", module, "box_into_view"),
                    ("jitter", module, "jitter_boxes"), ("encode", module, "encode_shuffled"),
                    ("forward", METHODS[name].network, "forward"),
                    ("zero", torch.optim.Optimizer, "zero_grad"),
                    ("backward", torch.Tensor, "backward"), ("step", torch.optim.SGD, "step"),
                    ("momentum", module, "momentum_update"), ("push", common.Queue, "push"),
                    ("draw", drawing, "draw_correlation")):
                if hasattr(owner, attribute):
                    watch(monkeypatch, calls, what, owner, attribute)
            run(name, Path(folder) / name)
        return Path(folder) / name, calls

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield functools.cache(record)


VIEWS = {"moco_v2": "colour colour", "detco": "colour colour colour cut colour cut",
         "dupr": "colour colour",
         "soco": "place jitter colour place colour place colour place colour",
         "barlow_twins": "colour colour", "vicreg": "colour colour"}
KEYS = {"moco_v2": "encode", "detco": "encode encode", "dupr": "place place encode"}
PUSHES = {"moco_v2": "push", "detco": 8 * "push ", "dupr": 6 * "push "}


def divide(name, calls):
    """The calls, if they are in their order -> of each batch that fills the queues, of each step,
    and after the last one: a dict of the calls of each name."""
    views, keys, pushes = (table.get(name, "").split() for table in (VIEWS, KEYS, PUSHES))
    momentum = ["momentum"] if METHODS[name].averaged else []
    step = [*views, *keys, "forward", "zero", "backward", "step", *momentum, *pushes]
    after = ["batches", *views, "draw"] if "correlation.png" in METHODS[name].files else []
    filling = [["batches"], *3 * [[*views, *keys, *pushes]]] if pushes else []  # 20 keys, 8 each
    expected = [*filling, ["batches"], *4 * [step], after]
    assert [call.name for call in calls] == sum(expected, [])
    parts, calls = [], iter(calls)
    for names in expected:
        part = [next(calls) for _ in names]
        parts.append({what: [call for call in part if call.name == what] for what in names})
    return parts[:len(filling)], parts[len(filling):-1], parts[-1]


@every_method
def test_a_step_in_its_order(recorded, name):
    """forward, backward, SGD, momentum update, push: each once, and each with what is its own."""
    out, calls = recorded(name)
    _, (batches, *steps), _ = divide(name, calls)
    assert batches["batches"][0].args[3] is None  # of all steps still to do
    losses, momenta = [], []
    for step in steps:
        (forward,), (backward,), (sgd,) = step["forward"], step["backward"], step["step"]
        model, loss = forward.args[0], forward.result[0]
        losses.append(loss.item())
        assert_same([backward.args[0], step["zero"][0].args[0]], [loss, sgd.args[0]])
        if METHODS[name].averaged:
            *networks, m = step["momentum"][0].args
            assert_same(networks, [getattr(model, part) for part in METHODS[name].averaged])
            momenta.append(m)
        pushed = [call.args for call in step.get("push", ())]
        assert_same([queue for queue, _ in pushed], queues_of(model))
        assert_same([k for _, k in pushed], keys_of(forward.result))
    assert [float(value) for value in column(out, "loss")] == losses
    if name == "soco":
        assert momenta == pytest.approx([
            1 - 0.01 * (math.cos(math.pi * step / 4) + 1) / 2 for step in range(4)])
        assert [float(m) for m in column(out, "momentum")] == pytest.approx(momenta)
    else:
        assert momenta == ([0.99] * 4 if name in CONTRASTIVE else [])


@every_method
def test_the_optimizer_and_its_learning_rates(recorded, name):
    out, calls = recorded(name)
    _, (_, *steps), _ = divide(name, calls)
    model, optimizer = steps[0]["forward"][0].args[0], steps[0]["step"][0].args[0]
    trained = [p for n, p in model.named_parameters() if n.startswith(METHODS[name].trained)]
    groups, rates = [trained], [(0.05 if name in CONTRASTIVE else 2) * 8 / 256]
    if name == "barlow_twins":  # weights; biases and batch norm
        groups = [[p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]]
        rates = [2 * 8 / 256, 0.0048 * 8 / 256]
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        assert_same(group["params"], parameters)
        assert group["momentum"] == 0.9 and not group["nesterov"] and group["dampening"] == 0
    if name in CONTRASTIVE:
        assert type(optimizer) is torch.optim.SGD and optimizer.defaults["weight_decay"] == 1e-4
        factors = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    else:  # two steps of warm-up
        assert type(optimizer) is common.LARS and optimizer.defaults["weight_decay"] == 0
        assert optimizer.decay == (1e-5 if name == "soco" else 1e-6)
        factors = [0.01, 0.505, 1, 0.5] if name == "soco" else [0, 0.5, 1, 0.5005]
    for step, factor in zip(steps, factors, strict=True):
        assert step["step"][0].result == pytest.approx([rate * factor for rate in rates])
    assert [float(lr) for lr in column(out, "lr")] == [step["step"][0].result[0] for step in steps]


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_lars_in_place_of_sgd(name, tmp_path, monkeypatch):
    calls = []
    watch(monkeypatch, calls, "step", common.LARS, "step")
    run(name, tmp_path, *"--optimizer lars --lr 3 --weight-decay 1e-6 --epochs 1".split())
    optimizer, = {call.args[0] for call in calls}
    assert len(calls) == 2 and optimizer.decay == 1e-6 and calls[0].result == [3 * 8 / 256]


@every_method
def test_colours_of_the_views_and_what_becomes_of_them(recorded, name):
    """In every batch, also in those that fill queues and in the one that is drawn."""
    _, calls = recorded(name)
    filling, steps, after = divide(name, calls)
    hue = (0.4, 0.4, 0.4, 0.1) if name in CONTRASTIVE else (0.4, 0.4, 0.2, 0.1)
    first, others = ((0.5, 0), (0.5, 0)) if name in CONTRASTIVE else ((0.9, 0), (0.1, 0.2))
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if "--mean" in METHODS[name].flags:
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    for batch in [part for part in (*filling, *steps, after) if "colour" in part]:
        for i, call in enumerate(batch["colour"]):
            assert call.args[1:] == (hue, 0.8, 0.2, *(others if i else first), mean, std)
        views = [call.result for call in batch["colour"]]
        if name == "detco":  # a local view has its colours before its patches are cut
            assert_same([cut.args[0] for cut in batch["cut"]], views[2:])
            views[2:] = [cut.result for cut in batch["cut"]]
        encoded = [call.args[1] for call in batch.get("encode", ())]
        assert_same(encoded, views[1::2] if name in CONTRASTIVE else [])  # the keys'
        if "forward" not in batch:
            continue
        _, *seen = batch["forward"][0].args
        if name == "dupr":
            seen = [view.pixels for view in seen]
        if name == "soco":  # the boxes of V1 are jittered
            seen, boxes = seen
            jitter, = batch["jitter"]
            places = batch["place"]
            assert [place.args[3] for place in places] == [view.shape[-1] for view in views]
            assert_same([jitter.args[0], *boxes],
                        [places[0].result, jitter.result, *(p.result for p in places[1:])])
            assert jitter.args[1:3] == (32, 0.1)
        assert_same(seen, views)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_queues_are_filled_with_keys_of_steps_after_the_last(recorded, name):
    _, calls = recorded(name)
    (batches, *filling), (_, *steps), _ = divide(name, calls)
    model = steps[0]["forward"][0].args[0]
    assert batches["batches"][0].args[3] == range(4, 7)
    for batch in [*filling, *steps]:
        assert all(call.args[0] is model.encoder_k for call in batch["encode"])
    for batch in filling:
        keys = [call.result for call in batch["encode"]]
        keys = keys if name == "moco_v2" else sum(keys, [])
        queues, pushed = zip(*(call.args for call in batch["push"]))
        assert_same(queues, queues_of(model))
        images = 4 if name == "dupr" else len(keys)
        assert_same(pushed[:images], keys[:images])
        assert all(k.shape == (8, 16) for k in pushed)  # as many of DUPR's positions as of images


@every_method
def test_what_is_decoded_and_cut_of_an_image(recorded, name):
    """A photo with enough pixels for each kind of view; the views as the recipe says."""
    crops = {"detco": ((32, 0.4), (54, 0.6)), "soco": ((32, 0.5),)}.get(name, ((32, 0.4),))
    more = dict(interpolation="bicubic") if name in ("barlow_twins", "vicreg") else {}
    for call in [call for call in recorded(name)[1] if call.name == "batches"]:
        _, data, cut, *_ = call.args
        assert (data.photos if name == "soco" else data).crops == crops
        if name not in ("detco", "dupr", "soco"):  # these have functions of their own
            assert cut.func is two_views
            assert cut.keywords == dict(size=32, scale=(0.4, 1.0), **more)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_the_correlation_that_is_drawn(recorded, name):
    """Of a batch that is never trained on, in eval mode."""
    out, calls = recorded(name)
    _, (_, *steps), after = divide(name, calls)
    model, (*drawn, _path) = steps[0]["forward"][0].args[0], after["draw"][0].args
    assert after["batches"][0].args[3] == range(4, 5) and not model.training
    with torch.no_grad():
        for z, view in zip(drawn, after["colour"]):
            torch.testing.assert_close(z, model.embed(view.result))
    with Image.open(out / "correlation.png") as image:
        assert image.width > image.height > 400


# ---------------------------------------------------------------------------- runs and what is left


@every_method
def test_backbone_and_other_files(recorded, name):
    """backbone.pt is what was trained, under torchvision's names."""
    out, _ = recorded(name)
    assert {file.name for file in out.iterdir()} == {
        "args.json", "backbone.pt", "checkpoint.pt", "curves.png", "lock", "log.csv",
        *METHODS[name].files}
    state, backbone = (load_checkpoint(out / f"{file}.pt") for file in ("checkpoint", "backbone"))
    assert state["method"] == name and state["step"] == 4
    stages = METHODS[name].stages
    assert_identical(backbone, {key.removeprefix(stages): value
                                for key, value in state["model"].items() if key.startswith(stages)})
    resnet = torchvision.models.resnet18()
    classifier = {f"fc.{key}": value for key, value in resnet.fc.state_dict().items()}
    resnet.load_state_dict({**backbone, **classifier}, strict=True)


@every_method
def test_a_resumed_run_equals_an_uninterrupted_one(recorded, tmp_path, monkeypatch, capsys, name):
    """Bit for bit, after a stop in the middle of the second epoch."""
    whole, _ = recorded(name)
    end_step = Run.end_step

    def stop(this, *args, **parts):
        this.signal = signal.SIGTERM if this.step == 2 else 0
        end_step(this, *args, **parts)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Run, "end_step", stop)
        run(name, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    run(name, tmp_path)
    assert "resuming after step 3" in capsys.readouterr().out
    for file in ("checkpoint.pt", "backbone.pt"):
        assert_identical(*(load_checkpoint(out / file) for out in (whole, tmp_path)))
    for other in ("step", "epoch", "loss", "lr"):
        assert column(tmp_path, other) == column(whole, other)


@pytest.mark.parametrize("name, flags", [
    ("detco", "--weights 0 0 0 1 --no-local"), ("dupr", "--alpha 0 0 0 1 --beta 0 0 0 0")])
def test_the_image_loss_of_the_last_level_alone_is_moco(recorded, tmp_path, name, flags):
    moco, _ = recorded("moco_v2")
    run(name, tmp_path, *flags.split())
    for what in ("loss", "deviation") if name == "detco" else ("loss",):
        assert column(tmp_path, what) == column(moco, what)  # to the last digit
    assert_identical(*(load_checkpoint(out / "backbone.pt") for out in (moco, tmp_path)))


def test_the_image_losses_of_all_levels_are_detco_s_and_dupr_s_alike(tmp_path):
    run("detco", tmp_path / "detco", "--no-local")
    run("dupr", tmp_path / "dupr", *"--beta 0 0 0 0".split())
    assert column(tmp_path / "detco", "loss") == column(tmp_path / "dupr", "loss")
    assert_identical(*(load_checkpoint(tmp_path / name / "backbone.pt")
                       for name in ("detco", "dupr")))


@every_method
def test_one_step_in_bfloat16_is_near_one_in_float32(tmp_path, monkeypatch, name):
    losses, gradients, mixed, coloured = {}, {}, [], []
    cudnn = torch.backends.cudnn  # as on a GPU
    monkeypatch.setattr(cudnn, "deterministic", True)

    def note(states, owner, attribute):
        function = getattr(owner, attribute)

        def noted(*args, **kwargs):
            states.append(torch.is_autocast_enabled("cpu"))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, noted)

    note(mixed, METHODS[name].network, "forward")
    note(coloured, METHODS[name].module, "augment_colour")
    if name in CONTRASTIVE:  # also where it fills the queues
        note(mixed, METHODS[name].module, "encode_shuffled")
    for kind in ("bfloat16", "float32"):
        out = tmp_path / kind
        run(name, out, "--epochs", "1", "--batch-size", "16", "--precision", kind,
            *(["--zero-init-residual"] if name == "soco" else []))  # the paper's start
        assert {*mixed} == {kind == "bfloat16"}
        mixed.clear()
        losses[kind], = map(float, column(out, "loss"))
        state = load_checkpoint(out / "checkpoint.pt")
        momenta = [v["momentum_buffer"] for v in state["optimizer"]["state"].values()]
        gradients[kind] = torch.cat([v.flatten() for v in momenta])
        tensors = [*momenta, *state["model"].values()]
        assert {v.dtype for v in tensors if v.is_floating_point()} == {torch.float32}
    assert coloured and not any(coloured)  # the views are float32 in both
    assert cudnn.deterministic == (name not in ("dupr", "soco"))  # whose RoI Align is not
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    cosine = torch.cosine_similarity(gradients["bfloat16"], gradients["float32"], dim=0)
    assert cosine > 0.75


# --------------------------------------------------------------------------------------- gradients


@every_method
def test_processes_share_gradients_and_batch_norm(name, tmp_path, monkeypatch):
    """The loop goes through the wrapper that distribute returns, and asks for the right one."""
    seen = []

    def wrapped(model, device, **options):
        seen.append(options)
        model, _ = distribute(model, device)
        return model, lambda *batch: seen.append("ddp") or model(*batch)

    monkeypatch.setattr(METHODS[name].module, "distribute", wrapped)
    run(name, tmp_path, "--epochs", "1")
    assert seen == [{} if name in CONTRASTIVE else dict(sync_batch_norm=True), "ddp", "ddp"]


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_keys_are_of_unit_length_in_bfloat16_too(name):
    torch.manual_seed(0)
    model, batch = METHODS[name].tests.small(), METHODS[name].tests.batch(8)
    with torch.autocast("cpu", torch.bfloat16):
        keys = keys_of(model(*batch))
    for k in keys:
        torch.testing.assert_close(k.norm(dim=1), torch.ones(len(k)), atol=1e-6, rtol=0)


def pixels(batch):
    """The images, or patches, of each view in a batch."""
    if torch.is_tensor(batch):
        return [batch] if batch.dim() > 3 else []
    return [tensor for each in batch for tensor in pixels(each)]


@every_method
def test_gradients_reach_what_is_trained_and_nothing_else(name):
    torch.manual_seed(0)
    model, batch = METHODS[name].tests.small(), METHODS[name].tests.batch(8)
    views = [view.requires_grad_() for view in pixels(batch)]
    result = model(*batch)
    assert not any(t.requires_grad for t in [*keys_of(result), *result[-1].values()])
    result[0].backward()
    for parameter, p in model.named_parameters():
        assert (p.grad is not None) == parameter.startswith(METHODS[name].trained), parameter
    unused = {parameter.rsplit(".", 2)[0] for parameter, p in model.named_parameters()
              if p.grad is not None and not p.grad.any()}
    assert unused == ({f"online.backbone.fpn.layer_blocks.{level}" for level in "23"}
                      if name == "soco" else set())  # no box goes to P4 or P5
    assert not any(buffer.requires_grad for buffer in model.buffers())
    for i, view in enumerate(views):
        if name in CONTRASTIVE and i % 2:  # the key's
            assert view.grad is None
        else:
            assert view.grad.flatten(-3).any(-1).all()


# ---------------------------------------------------------------------- two processes, one process

CASES = {  # a network's options, and its batch
    "moco_v2": (dict(bn_groups=2), 16), "moco_v2, 4 groups": (dict(bn_groups=4), 16),
    "detco": (dict(bn_groups=2), 8),
    "detco, shared queue": (dict(bn_groups=2, share_queue=True, weights=(0, 1, 1, 0)), 8),
    "dupr": (dict(bn_groups=2), 8),  # the processes with other numbers of pairs that overlap:
    "dupr, fewer": (dict(bn_groups=2), 8, [1, 3, 4]),
    "dupr, one none": (dict(bn_groups=2), 8, [0, 1, 2, 3]),
    "dupr, both none": (dict(bn_groups=2), 8, [*range(8)]),
    "soco": ({}, 8), "barlow_twins": ({}, 8), "vicreg": ({}, 8)}
LOSS = dict.fromkeys(METHODS, dict(atol=1e-5, rtol=1e-5))
LOSS.update(moco_v2=dict(atol=1e-5, rtol=0), barlow_twins=dict(atol=1e-6, rtol=1e-6),
            vicreg=dict(atol=0, rtol=1e-6))
GRADIENT = dict.fromkeys(CONTRASTIVE, (1e-4, 1e-7))  # a share of its norm, and a number
GRADIENT.update(soco=(1e-5, 1e-7), barlow_twins=(1e-6, 1e-6), vicreg=(1e-6, 1e-6))


def take(batch, rows):
    """Some images of a batch, whatever it is made of."""
    if torch.is_tensor(batch):
        return batch[rows]
    parts = [take(each, rows) for each in batch]
    return View(*parts) if isinstance(batch, View) else parts


def one_step(case):
    """With the whole batch, or in one of two processes with its half -> the loss, and the sums that
    it is made of, of each process; gradients; what every process has the same buffers of."""
    name, (options, *batch) = case.split(",")[0], CASES[case]
    if "bn_groups" in options:
        options = {**options, "bn_groups": options["bn_groups"] // common.world_size()}
    torch.manual_seed(0)
    model, batch = METHODS[name].tests.small(**options), METHODS[name].tests.batch(*batch)
    if name == "soco":
        test_soco.settled(model).train()
    if name not in CONTRASTIVE:  # exact sums over the processes
        model, batch = model.double(), tree_map(torch.Tensor.double, batch)
    model, ddp = distribute(model, torch.device("cpu"), sync_batch_norm=name not in CONTRASTIVE)
    share = CASES[case][1] // common.world_size()
    torch.manual_seed(3 + common.rank())  # what the first process draws is what counts
    result = ddp(*take(batch, slice(common.rank() * share, (common.rank() + 1) * share)))
    result[0].backward()
    for queue, k in zip(queues_of(model), keys_of(result)):
        queue.push(k)
    sums = [value for term, value in result[-1].items()
            if term in ("invariance", "redundancy", "variance", "covariance")]
    return (common.all_gather(torch.stack([result[0].detach(), *sums])[None]),
            {n: p.grad if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            {n: buffer for n, buffer in model.named_buffers()
             if "queue" in n or name not in CONTRASTIVE})  # batch norm's statistics of all


def one_of_two(number, folder):
    """Process ``number`` of two: every case, and SoCo's search."""
    with process_group(number, 2, folder):
        found = {case: one_step(case) for case in CASES}
        for _, _, queues in found.values():
            for buffer in queues.values():
                first, second = common.all_gather(buffer[None])
                assert torch.equal(first, second)
        if number == 0:
            torch.save(found, folder / "found.pt")
        args = soco.parse_args(["--workers", "0", "--out", str(folder)])
        boxes = soco.find_proposals(args, Scenes(2, size=96, seed=0))["boxes"]
        first, second = common.all_gather(torch.tensor([len(boxes)]))  # the first searched for both
        assert first == second > 0


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    start_processes(one_of_two, (folder,), 2)
    found = torch.load(folder / "found.pt", weights_only=True)
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(in_two_processes, case):
    """Each with half of the batch, and half of its batch norm groups."""
    name = case.split(",")[0]
    values, gradients, queues = in_two_processes[case]
    expected, single, queue = one_step(case)
    if expected.shape[1] == 1:  # the mean over the processes; else each has the loss of all
        values = values.mean(0, keepdim=True)
    for found in values:
        torch.testing.assert_close(found, expected[0], **LOSS[name])
    assert name != "vicreg" or expected.min() > 0.01
    share, floor = GRADIENT[name]
    for parameter, gradient in single.items():
        found = gradients[parameter]
        assert (found is None) == (gradient is None), parameter
        if gradient is not None:
            assert (found - gradient).norm() <= share * gradient.norm() + floor, parameter
    assert queues.keys() == queue.keys()
    for key, value in queue.items():
        torch.testing.assert_close(queues[key], value, atol=1e-5, rtol=0)
    if name == "dupr":
        assert queues["queues.4.oldest"] == (0 if case == "dupr, both none" else 6)


# ------------------------------------------------------------------------------------------- flags

# With --data the paper's recipe, or the report's
WITH_QUEUE = dict(arch="resnet50", epochs=200, batch_size=256, optimizer="sgd", weight_decay=1e-4,
                  image_size=224, crop_scale=0.2, p_blur=0.5, dim=128, queue_size=65536,
                  momentum=0.999, tau=0.2, bn_groups=8)
REPORT = dict(arch="resnet50", zero_init_residual=True, batch_size=2048, lr=None,
              weight_decay=1e-6, warmup=10, image_size=224, crop_scale=0.4, p_blur=[1.0, 0.1],
              dim=2048, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
RECIPES = {
    "moco_v2": dict(WITH_QUEUE, lr=0.03),
    "detco": dict(WITH_QUEUE, lr=0.06, local_size=255, local_scale=0.6, patch_size=64,
                  weights=[0.1, 0.4, 0.7, 1.0], no_local=False, share_queue=False,
                  normalise_weights=False, rand_augment=False),
    "dupr": dict(WITH_QUEUE, lr=0.06, alpha=[0.1, 0.4, 0.7, 1.0], beta=[0.0, 0.0, 1.0, 1.0],
                 patch_keys=32, roi_size=[14, 14, 14, 7], rand_augment=False),
    "soco": dict(arch="resnet50", zero_init_residual=True, epochs=100, batch_size=2048, lr=1.0,
                 weight_decay=1e-5, warmup=10, image_size=224, small_size=112, view4=None,
                 crop_scale=0.5, boxes_per_image=4, jitter=0.1, p_blur=[1.0, 0.1], fpn_channels=256,
                 hidden=4096, dim=256, momentum=0.99, proposals="auto"),
    "barlow_twins": dict(REPORT, epochs=150, lr_biases=0.0048, lambd=0.0051),
    "vicreg": dict(REPORT, epochs=100, invariance=25, variance=25, covariance=1)}


@every_method
def test_defaults_are_the_recipe_unless_scenes_are_used(name):
    parse_args, recipe = METHODS[name].module.parse_args, RECIPES[name]
    args = vars(parse_args(["--data", "somewhere"]))
    assert {key: args[key] for key in recipe} == recipe
    small = vars(parse_args([]))
    assert small["arch"] == "resnet18" and small["image_size"] < 100 and small["batch_size"] < 256
    assert small.get("queue_size", 0) < 4000
    assert small.get("optimizer", "lars") == "lars" and not small.get("zero_init_residual")
    kept = {"detco": ["weights"], "dupr": ["alpha", "beta"], "soco": ["weight_decay"]}
    for key in kept.get(name, ()):
        assert small[key] == recipe[key]
    assert parse_args(["--arch", "resnet34"]).arch == "resnet34"  # a flag is above both


@every_method
def test_a_number_out_of_range_is_named(name):
    parse_args = METHODS[name].module.parse_args
    numbers = {key: value for key, value in vars(parse_args(["--data", "x"])).items()
               if type(value) in (int, float, list) or key in ("lr", "view4")}
    assert len(numbers) >= 15
    for key, value in numbers.items():
        flag = f"--{key.replace('_', '-')}"
        others = [str(number) for number in value[1:]] if isinstance(value, list) else []
        for wrong in ("-1", "nan", "ten"):
            with pytest.raises(InputError, match=f"argument {flag}: .*{wrong}.* .--help"):
                parse_args([flag, wrong, *others])
    for flag in ("--epochs 0", "--batch-size 0", "--log-every 0", "--scenes 0", "--dim 0",
                 "--image-size 4", "--crop-scale 0", "--crop-scale 1.1", "--workers 0.5"):
        with pytest.raises(InputError, match=f"argument {flag.split()[0]}: "):
            parse_args(flag.split())


REFUSED = {
    "moco_v2": {}, "barlow_twins": {},
    "vicreg": {"--std 0 1 1": "argument --std: 0 is not from 0.001 to 1"},
    "detco": {
        "--weights 0 0 0 0": "--weights: one must be more than 0",
        "--weights 0 0 -1 1": "argument --weights: -1 is not at least 0",
        "--patch-size 19": "--patch-size 19 is more than a third of --local-size 54",
        "--patch-size 7": "argument --patch-size: 7 is not at least 8",
        "--local-size 23": "argument --local-size: 23 is not at least 24",
        "--patch-size 16 --precision bfloat16": "images of more than 16 pixels, not 16",
        "--no-local --patch-size 19 --queue-size 7": "is less than the 8 keys",  # no patches
        "--share-queue --queue-size 31": "queue size 31 is less than the 32 keys of a step"},
    "dupr": {
        "--alpha 0 0 0 0 --beta 0 0 0 0": "one weight must be more than 0",
        "--roi-size 0 1 1 1": "argument --roi-size: 0 is not at least 1",
        "--patch-keys 0": "argument --patch-keys: 0 is not at least 1",
        "--patch-keys 21": "queue size 20 is less than the 21 keys of a step"},
    "soco": {
        "--boxes-per-image 0": "argument --boxes-per-image: 0 is not at least 1",
        "--jitter 0.5": "argument --jitter: 0.5 is not from 0 to 0.49",
        "--proposals nowhere.npz": "no such file: nowhere.npz",
        "--image-size 31": "argument --image-size: 31 is not at least 32",
        "--view4 8": "argument --view4: 8 is not at least 32"}}


@pytest.mark.parametrize("name, flags", [
    ("moco_v2", "--lr 2"), ("detco", "--lr 4 --local-size 96 --patch-size 24"),
    ("dupr", "--lr 2 --image-size 96 --roi-size 6 6 6 3")])
def test_the_small_recipe_of_a_thousand_photos(name, flags):
    by_hand = ("--data DIR --arch resnet18 --image-size 64 --crop-scale 0.4 --p-blur 0 "
               "--batch-size 64 --bn-groups 4 --queue-size 192 --momentum 0.99 --optimizer lars "
               f"--weight-decay 1e-6 --epochs 30 {flags}")
    module = METHODS[name].module
    args = module.parse_args(["--data", "DIR", "--small"])
    assert args.batch_size is None is args.queue_size
    fit_recipe(args, 1000)
    assert {**vars(module.parse_args(by_hand.split())), "small": True} == vars(args)
    args = module.parse_args("--data DIR --small --batch-size 8 --arch resnet34".split())
    fit_recipe(args, 1000)
    assert (args.batch_size, args.arch, args.queue_size) == (8, "resnet34", 248)
    args = vars(module.parse_args("--small --optimizer sgd".split()))  # at the paper's rate
    assert {key: args[key] for key in ("lr", "weight_decay")} == {
        key: RECIPES[name][key] for key in ("lr", "weight_decay")}


def last_norm(folder):
    """The mean weight of the last batch norm of Res5's second block, at the end of a run."""
    return torch.load(folder / "backbone.pt", weights_only=True)["layer4.1.bn2.weight"].mean()


@every_method
def test_the_small_recipe_on_photos(tmp_path, capsys, name):
    make_photos(tmp_path / "data", 60)
    METHODS[name].module.main([
        "--data", str(tmp_path / "data"), "--small", "--epochs", "1", "--workers", "0", "--out",
        str(tmp_path / "run"), *(["--proposals", "random"] if name == "soco" else [])])
    said = capsys.readouterr().out
    assert f"{name}: data {tmp_path}/data, small True, " in said and ", arch resnet18, " in said
    assert ", batch_size 8, " in said and "step 7/7" in said
    assert last_norm(tmp_path / "run") == pytest.approx(1, abs=0.1)


@every_method
def test_arguments_that_cannot_be_are_one_line(tmp_path, name):
    refused = {**REFUSED[name], "--arch resnet5O": "unknown architecture resnet5O",
               "--batch-size 18": "batch size 18 is more than all 16 images",
               "--data nowhere": "no such folder: nowhere"}
    if name in CONTRASTIVE:
        refused["--queue-size 7"] = "queue size 7 is less than the 8 keys of a step"
        refused["--batch-size 14 --bn-groups 8"] = "batch size 14 does not divide into 8"
    else:
        refused["--batch-size 1"] = "argument --batch-size: 1 is not at least 2"
    if name != "soco":
        refused["--image-size 16 --precision bfloat16"] = "images of more than 16 pixels, not 16"
    for flags, message in refused.items():
        words = [*METHODS[name].flags.split(), *flags.split(), "--out", tmp_path / "run"]
        assert message in refusal(METHODS[name].module.main, words), flags
    left = {file.name for file in tmp_path.rglob("*")}  # nothing was trained, or searched, before
    assert not left & {"checkpoint.pt", "log.csv", "proposals.npz"}


# ----------------------------------------------------------------------- copies, and who needs whom

COPIED = {  # a run's flags with another's photos, whose defaults are the paper's
    "moco_v2": "--queue-size 16 --bn-groups 2", "dupr": "--queue-size 32 --bn-groups 2",
    "detco": "--queue-size 16 --bn-groups 2 --local-size 54 --patch-size 16",
    "soco": "--small-size 32 --fpn-channels 8 --hidden 24", "barlow_twins": "", "vicreg": ""}


def python(code, folder):
    """What code prints, as a script in a folder: all that it finds beside the installed packages.
    Fails if it does."""
    (folder / "script.py").write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert process.returncode == 0, process.stdout
    return process.stdout


RUN_EACH = """
import json
import os
import runpy
import sys
for name, words in json.load(open("commands.json")).items():  # each finds its own folder alone
    sys.path[0] = os.path.abspath(name)
    os.chdir(name)
    known, sys.argv = {*sys.modules}, words
    runpy.run_path(words[0], run_name="__main__")
    for module in {*sys.modules} - known:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(os.getcwd()):
            del sys.modules[module]
    os.chdir("..")
"""


def test_a_copied_file_trains(tmp_path):
    """A method's file, common.py and plumbing/ (SoCo: and selective_search.py), nothing else."""
    photos, commands = make_photos(tmp_path / "photos", 16), {}
    for name, flags in COPIED.items():
        shutil.copytree(ROOT / "plumbing", tmp_path / name / "plumbing",
                        ignore=shutil.ignore_patterns("__pycache__"))
        files = [f"{name}.py", "common.py"] + ["selective_search.py"] * (name == "soco")
        for file in files:
            shutil.copy(ROOT / file, tmp_path / name)
        words = ("--arch resnet18 --epochs 1 --batch-size 8 --image-size 32 --dim 16 --workers 0 "
                 f"--log-every 1 --out run {flags}")
        commands[name] = [f"{name}.py", "--data", str(photos), *words.split()]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    out = python(RUN_EACH, tmp_path)
    assert out.count("run/backbone.pt is the pre-trained") == len(COPIED), out
    for name in COPIED:
        start = 1 if name in CONTRASTIVE else 0  # of the paper's recipe; two steps lead little away
        assert last_norm(tmp_path / name / "run") == pytest.approx(start, abs=0.1)
        assert column(tmp_path / name / "run", "step") == ["1", "2"]


SOMEBODYS_LOOP = """
import sys
import torch
from barlow_twins import BarlowTwins
from common import View, momentum_update
from detco import DetCo
from dupr import DUPR
from moco_v2 import MoCo
from soco import SoCo
from vicreg import VICReg

def images(views, *shape):
    return [*torch.randn(views, 8, *shape)]

def view():
    boxes = torch.tensor([[0.0, 0, 60, 40]]) + 20 * torch.rand(8, 1)
    return View(torch.randn(8, 3, 32, 32), boxes, torch.rand(8) < 0.5)

torch.manual_seed(0)
boxes = torch.tensor([[[4.0, 4, 40, 30], [20, 10, 60, 60]]]).repeat(8, 1, 1)
size = dict(arch="resnet18", dim=16)
queue = dict(size, queue_size=24, bn_groups=2)
for model, batch in (
        (MoCo(**queue), lambda: images(2, 3, 32, 32)),
        (DetCo(**queue), lambda: images(2, 3, 32, 32) + images(2, 9, 3, 16, 16)),
        (DUPR(**queue, roi_size=(2, 2, 2, 2), patch_keys=6), lambda: [view(), view()]),
        (SoCo(**size, fpn_channels=8, hidden=24), lambda: [images(3, 3, 64, 64), [boxes] * 3]),
        (BarlowTwins(**size), lambda: images(2, 3, 32, 32)),
        (VICReg(**size), lambda: images(2, 3, 32, 32))):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    weights = [p for p in model.parameters() if p.dim() > 1]  # a bias before batch norm stays
    before = [w.clone() for w in weights]
    for _ in range(3):
        loss, *keys, _ = model(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model, SoCo):
            momentum_update(model.online, model.target, 0.9)
        if keys:
            momentum_update(model.encoder_q, model.encoder_k, model.m)
        if isinstance(model, MoCo):
            model.queue.push(*keys)
        if isinstance(model, (DetCo, DUPR)):
            for queue, k in zip(model.queues, *keys):
                queue.push(k)
    stayed = sum(torch.equal(a, b) for a, b in zip(before, weights))
    print(type(model).__name__, bool(loss.isfinite()), stayed)
assert not {"plumbing", "selective_search"} & {*sys.modules}
"""


def test_a_copied_class_trains_in_somebody_s_loop(tmp_path):
    """A method's classes and functions, with common.py alone."""
    for name in METHODS:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        tree.body = [
            node for node in tree.body
            if isinstance(node, (ast.Import, ast.Assign, ast.FunctionDef, ast.ClassDef)) or
            isinstance(node, ast.ImportFrom) and not node.module.startswith(
                ("plumbing", "selective_search"))]
        (tmp_path / f"{name}.py").write_text(ast.unparse(tree))
    shutil.copy(ROOT / "common.py", tmp_path)
    assert python(SOMEBODYS_LOOP, tmp_path).splitlines() == [
        # no box of SoCo's lies on P3 to P5, which have a weight each
        f"{method.network.__name__} True {2 * 3 if name == 'soco' else 0}"
        for name, method in METHODS.items()]


def imports(path):
    """The top-level names of the modules that a file imports, and whether a function does."""
    def of(node, within):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, within) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module, within
            yield from of(child, within or isinstance(child, ast.FunctionDef))

    return [(name.split(".")[0], within) for name, within in of(ast.parse(path.read_text()), False)]


FILES = [str(path.relative_to(ROOT)) for folder in (".", "plumbing", "detection", "figures")
         for path in sorted((ROOT / folder).glob("*.py"))]
METHOD, FOLDERS = {"common", "plumbing"}, {"common", "plumbing", "detection"}
MAY_IMPORT = {  # at the top of the file; in functions
    "common.py": (set(), set()), "scenes.py": (set(), set()),
    "plumbing": (METHOD, {"scenes"}), "detection": (FOLDERS, {"scenes"}),
    "selective_search.py": (METHOD, set()),
    **{f"{name}.py": (METHOD, set()) for name in METHODS},
    "soco.py": ({*METHOD, "selective_search"}, set()),
    "finetune_fasterrcnn.py": (FOLDERS, {"scenes"}), "linear_probe.py": (FOLDERS, {"scenes"}),
    "figures": ({*FOLDERS, "figures", "selective_search"}, {*METHODS}),
    "visualize.py": ({*FOLDERS, "figures"}, set())}


@pytest.mark.parametrize("file", FILES)
def test_arrows(file):
    """Nothing imports upwards, and no method another one; --help does not wait for torchvision."""
    late = file.startswith(("common", "plumbing", "moco", "detco", "barlow", "vicreg"))
    ours = {other.split("/")[0].removesuffix(".py") for other in FILES}
    anywhere, in_functions = MAY_IMPORT[file if "/" not in file else file.split("/")[0]]
    for name, within in imports(ROOT / file):
        assert name not in ours or name in anywhere or within and name in in_functions, name
        assert file != "detection/average_precision.py" or name == "numpy"
        assert not late or within or name != "torchvision"
