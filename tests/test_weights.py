import argparse
import fractions
import io
import itertools
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import (InputError, ResNetStages, SplitBatchNorm, SwinStages, backbone_stages,
                    resnet_stages)
from plumbing import weights
from plumbing.weights import (find_architecture, load_backbone, load_backbones, load_checkpoint,
                              save_checkpoint, save_tensors)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------- backbones of any spelling


@pytest.fixture(scope="module")
def resnets():
    """The random states of a ResNet-50, its average, and a ResNet-18; no two tensors are alike.

    All are windows of one noise, which torch.save writes once: small files.
    """
    noise, window = torch.randn(3_000_000), itertools.count()

    def state(arch):
        with torch.device("meta"):
            net = torchvision.models.get_model(arch)
        return {k: noise[next(window):][:v.numel()].view(v.shape) if v.is_floating_point()
                else torch.tensor(next(window)) for k, v in net.state_dict().items()}

    return state("resnet50"), state("resnet50"), state("resnet18")


def blank(arch):
    """Stages that are zero everywhere, batch norm too."""
    with torch.device("meta"):
        stages = resnet_stages(arch, SplitBatchNorm)
    for v in stages.to_empty(device="cpu").state_dict().values():
        v.zero_()
    return stages


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def without_fc(state):
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def as_detectron2(state):
    """Renamed as MoCo's conversion script does, from torchvision's names."""
    renamed = {}
    for k, v in without_fc(state).items():
        if k.endswith("num_batches_tracked"):
            continue
        k = k if "layer" in k else "stem." + k
        for i in (1, 2, 3, 4):
            k = k.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        k = k.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[k] = v
    assert {"stem.conv1.norm.weight", "res3.0.shortcut.norm.bias", "res5.1.conv2.norm.running_var",
            "res2.0.conv1.weight"} <= renamed.keys()
    return renamed


def as_children(state):
    """Renamed as torch.nn.Sequential(*resnet.children()) names them, without the last one, fc."""
    with torch.device("meta"):
        names = [name for name, _ in torchvision.models.resnet50().named_children()]
    return {".".join([str(names.index(k.partition(".")[0])), k.partition(".")[2]]): v
            for k, v in without_fc(state).items()}


def in_order(*states):
    return dict(sorted(itertools.chain(*(state.items() for state in states))))


# name -> the trained backbone's prefix, (its state, that of its average) -> what torch.save gets
FILES = {
    "ours": ("", lambda q, k: without_fc(q)),
    "torchvision": ("", lambda q, k: q),
    "moco": ("module.encoder_q.", lambda q, k: dict(
        epoch=200, arch="resnet50", optimizer={"state": {}}, state_dict={
            **under("module.encoder_q.", q), **under("module.encoder_k.", k),
            "module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1).long()})),
    "moco, sorted": ("module.encoder_q.", lambda q, k: dict(state_dict=in_order(
        under("module.encoder_q.", q), under("module.encoder_k.", k)))),
    "barlow twins": ("module.backbone.", lambda q, k: dict(epoch=3, optimizer={}, model={
        **under("module.backbone.", without_fc(q)), "module.projector.0.weight": torch.zeros(8)})),
    "vicreg": ("module.backbone.", lambda q, k: dict(epoch=3, optimizer={}, model={
        "module.projector.0.weight": torch.zeros(8), **under("module.backbone.", without_fc(q))})),
    "soco": ("module.encoder.", lambda q, k: dict(opt=argparse.Namespace(lr=1), epoch=1, model={
        **under("module.encoder_k.", without_fc(k)), **under("module.encoder.", without_fc(q)),
        "module.encoder.neck.weight": torch.zeros(8)})),
    "byol": ("online_network.", lambda q, k: {
        **under("target_network.", k), **under("online_network.", q)}),
    "ema, sorted": ("model.", lambda q, k: in_order(under("model.", q), under("ema_model.", k))),
    "swa": ("net.", lambda q, k: dict(model=dict(state_dict={
        **under("avg_model.module.", k), **under("net.", q)}))),
    "openselfsup": ("encoder_q.0.", lambda q, k: dict(meta=dict(epoch=1), state_dict={
        **under("encoder_q.0.", without_fc(q)), **under("encoder_k.0.", without_fc(k)),
        **under("backbone.", without_fc(q)), "queue": torch.zeros(8)})),
    "openselfsup, extracted": ("backbone.", lambda q, k: dict(
        meta={}, state_dict=under("backbone.", without_fc(q)), author="OpenSelfSup")),
    "detectron2": ("", lambda q, k: dict(model=as_detectron2(q), matching_heuristics=True)),
    "detectron2, flat": ("backbone.", lambda q, k: dict(
        under("backbone.", as_detectron2(q)), __author__="MOCO")),
    "detectron2, detector": ("backbone.bottom_up.", lambda q, k: dict(iteration=9, model={
        "backbone.fpn_lateral2.norm.weight": torch.zeros(8),
        **under("backbone.bottom_up.", as_detectron2(q)),
        "roi_heads.mask_head.deconv.conv1.weight": torch.zeros(8)})),
    "detectron2, C4 detector": ("backbone.", lambda q, k: dict(model={
        name.replace("backbone.res5.", "roi_heads.res5."): tensor
        for name, tensor in under("backbone.", as_detectron2(q)).items()})),
    "our C4 detector": ("backbone.", lambda q, k: dict(method="finetune_fasterrcnn", model={
        name.replace("backbone.layer4.", "roi_heads.box_head.layer4."): tensor
        for name, tensor in under("backbone.", without_fc(q)).items()})),
    "lightly": ("backbone.", lambda q, k: dict(epoch=1, state_dict={
        **under("backbone.", as_children(q)), **under("backbone_momentum.", as_children(k)),
        "projection_head.layers.0.weight": torch.zeros(8)})),
    "lightly, backbone alone": ("", lambda q, k: as_children(q)),
    "model_state_dict": ("module.", lambda q, k: dict(epoch=3, model_state_dict=under(
        "module.", q), optimizer_state_dict={"state": {0: {"exp_avg": torch.zeros(8)}}})),
    "vissl": ("_feature_blocks.", lambda q, k: dict(iteration=1, classy_state_dict={
        "base_model": {"model": {"heads": {"0.clf.weight": torch.zeros(8)},
                                 "trunk": under("_feature_blocks.", without_fc(q))}}})),
    "dino": ("student.module.backbone.", lambda q, k: dict(
        teacher=under("module.backbone.", without_fc(k)),
        student=under("module.backbone.", without_fc(q)), epoch=1)),
    "compiled": ("_orig_mod.net.", lambda q, k: under("_orig_mod.net.", q)),
    "our detector": ("backbone.body.", lambda q, k: dict(method="finetune_fasterrcnn", model={
        **under("backbone.body.", without_fc(q)), "roi_heads.box_head.fc6.weight": torch.zeros(8),
        "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(8)}, args={}, step=3, optimizer={})),
}


@pytest.mark.parametrize("name", FILES)
def test_load_backbone_reads_every_naming(tmp_path, capsys, resnets, name):
    prefix, build = FILES[name]
    file, stages, wanted = build(*resnets[:2]), blank("resnet50"), without_fc(resnets[0])
    torch.save(file, tmp_path / "file.pt")
    rest = load_backbone(stages, tmp_path / "file.pt")
    said, missing = capsys.readouterr().out, "0 missing,"
    if "detectron2" in name:  # it counts no batches: these stay
        missing = "53 missing (batch norm counters, not needed),"
        wanted = {k: v if v.dim() else torch.tensor(0) for k, v in wanted.items()}
    assert equal(stages.state_dict(), wanted)
    assert said.count("\n") == 1 and f" {missing} {len(rest)} unexpected" in said
    loaded = 265 if "detectron2" in name else 318  # 53 of each of batch norm's 5, and 53 weights
    assert f": {loaded} tensors loaded from '{prefix}*'," in said
    assert ("; not from '" in said) == (name in {"moco", "moco, sorted", "soco", "byol", "swa",
                                                 "ema, sorted", "openselfsup", "lightly", "dino"})
    flat = file
    for key in ("state_dict", "model", "state_dict", "model_state_dict", "classy_state_dict",
                "base_model", "model", "trunk", "student"):
        flat = flat.get(key, flat)
    assert loaded + len(rest) == sum(map(torch.is_tensor, flat.values()))
    assert equal(rest, {k: flat[k] for k in rest})
    if name == "our detector":
        assert said.endswith("2 unexpected (roi_heads.box_head.fc6.weight, "
                             "backbone.fpn.inner_blocks.0.0.weight)\n")
    if name == "moco":
        assert "(module.encoder_q.fc.weight, module.encoder_q.fc.bias, module.encoder_k.c" in said


def test_load_backbone_of_basic_blocks_speaks_once(tmp_path, capsys, monkeypatch, resnets):
    torch.save(as_detectron2(resnets[2]), tmp_path / "file.pt")
    stages = blank("resnet18")
    monkeypatch.setattr(weights, "rank", lambda: 1)
    assert load_backbone(stages, tmp_path / "file.pt") == {}
    assert all(torch.equal(v, stages.state_dict()[k]) for k, v in without_fc(resnets[2]).items()
               if "num_batches" not in k)
    assert capsys.readouterr().out == ""


def test_load_backbone_refuses_what_does_not_fit(tmp_path, resnets):
    stages, path, state = blank("resnet18"), tmp_path / "file.pt", resnets[2]
    other = under("backbone.bottom_up.", as_detectron2(state))
    blocks = {k: v for k, v in state.items() if k.startswith("layer")}
    for file, message in [
            ({"fc.weight": torch.zeros(2)}, "holds no ResNet"),
            ([1, 2], "holds no ResNet"), (torch.zeros(3), "holds no ResNet"),
            (dict(model={}), "holds no ResNet"), (dict(state_dict=[1]), "holds no ResNet"),
            (blocks, "holds no ResNet: no conv1.weight and layer1.0.conv1.weight, nor the same "
             "under other names that are known here, but layer1.0.conv1.weight, .*, [.]{3}$"),
            (dict(state_dict={"embedder.convolution.weight": torch.zeros(2)}, epoch=3),
             "but state_dict.embedder.convolution.weight$"),
            ({k: v for k, v in other.items() if "stem" not in k}, "holds no ResNet"),
            (under("module.", resnets[0]),
             r"module.layer1.0.conv1.weight is \(64, 64, 1, 1\), not \(64, 64, 3, 3\)"),
            ({k: v for k, v in state.items() if k != "layer4.1.bn2.weight"},
             "layer4.1.bn2.weight is missing"),
            ({k: v for k, v in state.items() if "running_var" not in k}, "running_var is missing"),
            ({k: v for k, v in other.items() if "res3.0.shortcut.norm.bias" not in k},
             "backbone.bottom_up.res3.0.shortcut.norm.bias is missing"),
            ({**state, "layer1.2.conv1.weight": torch.zeros(2)},  # a deeper ResNet
             "layer1.2.conv1.weight has no place"),
            ({**other, "backbone.bottom_up.res2.2.conv1.weight": torch.zeros(2)},
             "bottom_up.res2.2.conv1.weight has no place"),
            ({**other, "backbone.bottom_up.res5.0.conv2.weight": torch.zeros(2)},
             r"bottom_up.res5.0.conv2.weight is \(2,\), not \(512, 512, 3, 3\)"),
            ({**state, "bn1.weight": torch.full((64,), torch.nan)}, "bn1.weight holds NaN"),
            ({**state, "bn1.bias": -torch.arange(64) / 0}, "bn1.bias holds NaN or infinity"),
            ({**state, "fpn.bias": torch.tensor([torch.inf])}, "fpn.bias holds NaN or infinity"),
            ({**state, "bn1.weight": [1.0]}, "bn1.weight is no tensor"),
            ({**state, "bn1.weight": None}, "bn1.weight is no tensor"),
            ({**state, "conv1.weight": state["conv1.weight"].to(torch.int8)},
             "conv1.weight holds torch.int8, not floats")]:
        torch.save(file, path)
        with pytest.raises(InputError, match=message) as caught:
            load_backbone(stages, path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        load_backbone(stages, tmp_path / "none.pt")
    assert not any(v.any() for v in stages.state_dict().values())  # nothing was loaded


def test_load_backbone_of_a_swin(tmp_path, capsys, resnets):
    def small(blocks):
        return torchvision.models.SwinTransformer([4, 4], 8, [1, 1, blocks, 1], [1] * 4, [7, 7])

    path, state, stages = tmp_path / "file.pt", small(2).state_dict(), SwinStages(small(2))
    for file, prefix, more in (
            (state, "", 2), (dict(model=under("module.stages.", state)), "module.stages.", 2),
            ({k: v for k, v in state.items() if "head" not in k}, "", 0)):
        for p in stages.parameters():
            nn.init.zeros_(p)
        torch.save(file, path)
        assert len(load_backbone(stages, path)) == more
        assert equal(stages.state_dict(), {k: v for k, v in state.items() if "head" not in k})
        assert f"tensors loaded from '{prefix}*', 0 missing, {more} unex" in capsys.readouterr().out
    save_tensors(stages.state_dict(), path)
    found = small(2).load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert found.missing_keys == ["head.weight", "head.bias"] and not found.unexpected_keys
    for file, message in (
            (small(3).state_dict(), "features.5.2.norm1.weight has no place"),
            ({k: v for k, v in state.items() if k != "norm.bias"}, "norm.bias is missing"),
            (resnets[2], "holds no Swin Transformer: no features.0.0.weight")):
        torch.save(file, path)
        with pytest.raises(InputError, match=message):
            load_backbone(stages, path)
    torch.save(state, path)
    with pytest.raises(InputError, match="holds no ResNet"):
        load_backbone(blank("resnet18"), path)


def test_saved_tensors_are_a_file_that_torchvision_loads(tmp_path):
    stages = resnet_stages("resnet18", lambda c: SplitBatchNorm(c, groups=2))
    stages.train()(torch.randn(4, 3, 32, 32))  # statistics move
    stages.to(memory_format=torch.channels_last)
    save_tensors(stages.state_dict(), tmp_path / "backbone.pt")
    resnet = torchvision.models.resnet18()
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert all(v.is_contiguous() for v in state.values())
    found = resnet.load_state_dict(state, strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys
    x = torch.randn(2, 3, 32, 32)
    resnet.fc = nn.Identity()
    torch.testing.assert_close(resnet.eval()(x), stages.eval()(x)[-1].mean((2, 3)))


def test_backbones_side_by_side(tmp_path, capsys):
    state = resnet_stages("resnet18").state_dict()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_tensors({**state, "fc.bias": torch.ones(3)}, tmp_path / folder / "backbone.pt")
    paths = [str(tmp_path / folder / "backbone.pt") for folder in ("one", "two")]
    torch.manual_seed(0)
    images = 3 + torch.randn(4, 3, 128, 128)

    def load(**given):
        args = SimpleNamespace(**{**dict(labels=None, arch=["resnet18"], seed=5), **given})
        return load_backbones(args, torch.device("cpu"), lambda: images), args.labels

    networks, labels = load(weights=["none", *paths], arch=["resnet34", "resnet18", "resnet18"])
    assert labels == [label for label, _, _ in networks] == ["random", "one", "two"]
    assert not any(stages.training for _, stages, _ in networks)
    torch.manual_seed(5)
    random, start = networks[0][1], resnet_stages("resnet34")
    assert equal(dict(random.named_parameters()), dict(start.named_parameters()))
    with torch.no_grad():
        first = start.conv1(images).transpose(0, 1).flatten(1)  # (64, B H W)
        torch.testing.assert_close(random.bn1.running_mean, first.mean(1))
        torch.testing.assert_close(random.bn1.running_var, first.var(1))
        for one, two in zip(random(images), start.train()(images)):  # nearly the batch's own
            torch.testing.assert_close(one.std(), two.std(), atol=0, rtol=0.05)
        assert start.eval()(images)[3].std() > 2 * one.std()  # not so with 0 and 1
    assert networks[0][2] == {}
    for _, stages, rest in networks[1:]:
        assert isinstance(stages, ResNetStages) and equal(stages.state_dict(), state)
        assert equal(rest, {"fc.bias": torch.ones(3)})
    assert capsys.readouterr().out.count("120 tensors loaded") == 2
    assert load(weights=[paths[0]] * 2, labels=["a", "b"])[1] == ["a", "b"]
    for given, message in (
            (dict(weights=[paths[0]] * 2), "two of the names are alike, use --labels: one one"),
            (dict(weights=paths, labels=["a"]), "1 --labels for 2 --weights"),
            (dict(weights=paths[:1], arch=["resnet18"] * 2), "2 --arch for 1 --weights"),
            (dict(weights=["nowhere.pt"], labels=["a"]), "no such file: nowhere.pt")):
        with pytest.raises(InputError, match=message):
            load(**given)


# ------------------------------------------------------------------------------ files of tensors


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "swin_t"])
def test_the_architecture_is_found_in_the_file(tmp_path, arch, capsys):
    torch.manual_seed(0)
    stages, path = backbone_stages(arch), tmp_path / "run" / "backbone.pt"
    path.parent.mkdir()
    save_tensors({f"module.encoder_q.{k}": v for k, v in stages.state_dict().items()}, path)
    assert find_architecture(path) == arch
    args = SimpleNamespace(weights=["none", str(path)], labels=None, arch=None, data=None, seed=0)
    images = torch.rand(2, 3, 64, 64)
    (_, random, _), (_, found, _) = load_backbones(args, torch.device("cpu"), lambda: images)
    assert equal(found.state_dict(), stages.state_dict())
    assert random.state_dict().keys() == found.state_dict().keys()  # as the other


def test_without_an_architecture_random_weights_are_a_resnet50_and_files_are_refused(tmp_path):
    args = SimpleNamespace(weights=["none"], labels=None, arch=None, data="photos", seed=0)
    images = torch.rand(2, 3, 64, 64)
    (_, random, _), = load_backbones(args, torch.device("cpu"), lambda: images)
    assert random.channels[-1] == 2048
    path = tmp_path / "fc.pt"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    assert find_architecture(path) is None
    args.weights = [str(path)]
    with pytest.raises(InputError, match="holds no ResNet"):
        load_backbones(args, torch.device("cpu"), None)


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]

    class Fails:
        def __reduce__(self):
            raise RuntimeError("no pickle")

    with pytest.raises(RuntimeError, match="no pickle"):
        save_checkpoint(tmp_path / "c.pt", {"step": 2, "bad": Fails()})
    assert load_checkpoint(tmp_path / "c.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError(
    "DataLoader worker (pid 7) is killed by signal: Killed.")], ids=["full disk", "killed worker"])
def test_what_ends_a_save_is_not_hidden_by_torchs_own_error(tmp_path, monkeypatch, error):
    class Interrupted(io.FileIO):
        def write(self, data):
            if self.tell() > 10000:
                raise error
            return super().write(data)

    monkeypatch.setattr(weights, "open", Interrupted, raising=False)
    with pytest.raises(type(error)) as caught:
        save_checkpoint(tmp_path / "c.pt", {name: torch.zeros(10000) for name in "ab"})
    assert caught.value is error and not [*tmp_path.iterdir()]


def refused(path):
    """The one line with which a file is refused, from where nothing else is said."""
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(f"{path} holds ") and "\n" not in line and len(line) < 300
    return line.removeprefix(f"{path} ")


def test_what_is_no_file_of_tensors_comes_without_advice(tmp_path, recwarn):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    zipped = path.read_bytes()
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()  # as before PyTorch 1.6
    for content in (b"", b"not a checkpoint", b"<html>", zipped[:20], zipped[:99], zipped[:-99],
                    zipped[:-1], zipped[1:], old[:20], old[:-99]):
        path.write_bytes(content)
        assert refused(path) == (
            "holds no tensors that can be read: it is empty, cut off or of another kind")
    with pytest.raises(InputError, match=f"^no such file: {tmp_path} .a folder"):
        load_checkpoint(tmp_path)
    assert not recwarn.list


class Malicious:
    """Its pickle opens a file, for writing, when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_other_pickles_are_refused_and_do_not_run(tmp_path, recwarn):
    path, written = tmp_path / "file.pkl", tmp_path / "written"
    bad = Malicious(written)
    pickle.loads(pickle.dumps(bad)).close()  # the trap works
    written.unlink()
    numpys = dict(model={"stem.conv1.weight": np.zeros(3)}, __author__="MOCO")
    for content, reason in (({"conv1.weight": bad}, "io.open"),
                            ({"a": fractions.Fraction(1)}, "fractions.Fraction"),
                            (numpys, r"numpy\S+_reconstruct"),
                            (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU")):
        advice = f"more than tensors .{reason}., and unpickling it can run code; README shows"
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            assert re.search(advice, refused(path))
    for content in (bad, {"model": bad}, numpys, {"a": torch.zeros(1)}):
        for protocol in (2, 3, 4, 5):
            path.write_bytes(pickle.dumps(content, protocol))
            assert re.search("more than tensors .a bare pickle., .*README shows", refused(path))
    assert not written.exists() and not recwarn.list


@pytest.mark.parametrize("kind", ["torch", "numpy", "bare"])
def test_the_readmes_lines_keep_the_tensors_of_a_pickle(tmp_path, resnets, kind):
    theirs, ours, stages = tmp_path / "theirs.pth", tmp_path / "tensors.pth", blank("resnet18")
    content = dict(model=as_detectron2(resnets[2]), matching_heuristics=True)
    if kind == "torch":
        content = dict(state_dict=under("module.encoder_q.", resnets[2]), lr=fractions.Fraction(1))
    else:
        content["model"] = {name: value.numpy() for name, value in content["model"].items()}
    if kind == "bare":
        content = {**content["model"], "__author__": "detectron2"}
        theirs.write_bytes(pickle.dumps(content))
        state = pickle.load(open(theirs, "rb"))
    else:
        torch.save(content, theirs)
        state = torch.load(theirs, map_location="cpu", weights_only=False)
    with pytest.raises(InputError, match="holds more than tensors"):
        load_backbone(stages, theirs)
    torch.save({k: torch.as_tensor(v) for k, v in state.get(
        "state_dict", state.get("model", state)).items() if hasattr(v, "shape")}, ours)
    load_backbone(stages, ours)
    assert all(torch.equal(v, stages.state_dict()[k]) for k, v in without_fc(resnets[2]).items()
               if "num_batches" not in k)


def test_the_readmes_lines_use_the_weights_in_torchvision(tmp_path, monkeypatch):
    (tmp_path / "runs" / "detco").mkdir(parents=True)
    stages = backbone_stages("resnet18")
    save_tensors(stages.state_dict(), tmp_path / "runs" / "detco" / "backbone.pt")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = next(part for part in readme.split("```python\n")[1:] if "FasterRCNN(" in part)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.split("```")[0], names)
    detector, image = names["detector"].eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        levels = [*detector.backbone.body(image).values()]
        assert all(torch.equal(*pair) for pair in zip(levels, stages.eval()(image), strict=True))
    assert all(p.requires_grad for p in detector.parameters())
    assert detector.roi_heads.box_predictor.cls_score.out_features == 21
    assert {*detector(image)[0]} == {"boxes", "labels", "scores"}
