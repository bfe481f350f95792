import numpy as np
import pytest
import torch
import torchvision
from conftest import start_processes
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from common import InputError, backbone_stages, resnet_stages
from detection.data import LabelledScenes, training_item
from detection.models import build_detector, detect, training_bytes
from plumbing.weights import save_checkpoint, save_tensors

SMALL = dict(fpn_channels=16, min_size=[64], max_size=64, anchor_size=8, rois=16)


@pytest.mark.parametrize("detector, norms", [("fpn", 20 + 8), ("c4", 20 + 1)])
def test_every_layer_of_the_detector_trains(detector, norms):
    """Batch norms: of ResNet-18, of the FPN's four inner and four layer blocks, C4's extra one."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, detector, **SMALL).train()
    found = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert len(found) == norms
    assert all(type(m) is torch.nn.BatchNorm2d and m.training for m in found)
    assert all(p.requires_grad for p in model.parameters())
    before = [m.running_mean.clone() for m in found]
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1])),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    sum(model([torch.rand(3, 64, 64), torch.rand(3, 48, 64)], targets).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(not torch.equal(a, m.running_mean) for a, m in zip(before, found))


def test_a_detector_on_a_swin(tmp_path):
    torch.manual_seed(0)
    save_tensors(backbone_stages("swin_t").state_dict(), tmp_path / "backbone.pt")
    model = build_detector("swin_t", 6, "fpn", **SMALL, weights=tmp_path / "backbone.pt",
                              mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).train()
    body = {k: v for k, v in model.backbone.body.state_dict().items()}
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert body.keys() == saved.keys() and all(torch.equal(body[k], saved[k]) for k in body)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3],
                                                                       [0.4, 0.5, 0.6])
    pyramid = model.backbone(torch.randn(1, 3, 64, 96))
    assert [(k, tuple(v.shape)) for k, v in pyramid.items()] == [
        (k, (1, 16, 64 // s, 96 // s)) for k, s in zip("0123", (4, 8, 16, 32))] + [
        ("pool", (1, 16, 1, 2))]
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # it would leave out what this counts
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))]
    sum(model([torch.rand(3, 64, 64)], targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.backbone.parameters())
    with pytest.raises(InputError, match="--detector c4 is of ResNets, swin_t needs"):
        build_detector("swin_t", 6, "c4", **SMALL)


RESNET50 = {"conv1.weight": (64, 3, 7, 7), "bn1.running_var": (64,),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer2.3.conv2.weight": (128, 128, 3, 3),
            "layer3.0.conv1.weight": (256, 512, 1, 1), "layer3.5.conv3.weight": (1024, 256, 1, 1)}
RES5 = {"layer4.0.conv1.weight": (512, 1024, 1, 1),
        "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
        "layer4.2.conv3.weight": (2048, 512, 1, 1), "layer4.2.bn3.bias": (2048,)}
C4 = {**{f"backbone.{k}": v for k, v in RESNET50.items()},
      **{f"roi_heads.box_head.{k}": v for k, v in RES5.items()},
      **{f"roi_heads.box_head.norm.{k}": (2048,) for k in ("weight", "bias", "running_mean",
                                                           "running_var")},
      "rpn.head.conv.0.0.weight": (1024, 1024, 3, 3),  # 15 anchors a position
      "rpn.head.cls_logits.weight": (15, 1024, 1, 1), "rpn.head.bbox_pred.weight": (60, 1024, 1, 1),
      "roi_heads.box_predictor.cls_score.weight": (21, 2048),
      "roi_heads.box_predictor.bbox_pred.weight": (84, 2048)}
FPN = {**{f"backbone.body.{k}": v for k, v in {**RESNET50, **RES5}.items()},
       **{f"backbone.fpn.inner_blocks.{i}.0.weight": (256, 256 << i, 1, 1) for i in range(4)},
       **{f"backbone.fpn.layer_blocks.{i}.0.weight": (256, 256, 3, 3) for i in range(4)},
       **{f"backbone.fpn.{b}_blocks.{i}.1.{k}": (256,) for b in ("inner", "layer") for i in range(4)
          for k in ("weight", "bias", "running_mean", "running_var")},
       "rpn.head.conv.0.0.weight": (256, 256, 3, 3),  # 3 anchors a position
       "rpn.head.cls_logits.weight": (3, 256, 1, 1), "rpn.head.bbox_pred.weight": (12, 256, 1, 1),
       "roi_heads.box_head.fc6.weight": (1024, 256 * 7 * 7),
       "roi_heads.box_head.fc7.weight": (1024, 1024),
       "roi_heads.box_predictor.cls_score.weight": (21, 1024),
       "roi_heads.box_predictor.bbox_pred.weight": (84, 1024)}


@pytest.mark.parametrize("detector, shapes, backbone_tensors", [("c4", C4, 258), ("fpn", FPN, 366)])
def test_the_papers_detectors(detector, shapes, backbone_tensors):
    model = build_detector("resnet50", 20, detector)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: state.get(k) for k in shapes} == shapes
    if detector == "c4":
        assert not [k for k in state if "fpn" in k or "fc6" in k or "backbone.layer4" in k]
        assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    else:
        assert [*model.rpn.anchor_generator.sizes] == [(32,), (64,), (128,), (256,), (512,)]
        assert not [k for k in state if k.startswith("backbone.fpn") and k.endswith(".0.bias")]
    assert sum(k.startswith("backbone.") for k in state) == backbone_tensors
    assert model.roi_heads.detections_per_img == 100 and model.roi_heads.score_thresh == 0.05
    assert model.rpn._pre_nms_top_n == dict(c4=dict(training=12000, testing=6000),
                                            fpn=dict(training=2000, testing=1000))[detector]
    assert model.rpn._post_nms_top_n == dict(c4=dict(training=2000, testing=1000),
                                             fpn=dict(training=1000, testing=1000))[detector]
    assert model.roi_heads.box_roi_pool.sampling_ratio == 0
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512


def test_c4_from_image_to_classes():
    """Res4 at stride 16, RoIs of 14 x 14 that Res5 halves, one more batch norm, then the mean."""
    torch.manual_seed(0)
    model = build_detector("resnet50", 20, "c4", min_size=[96], max_size=128, rois=8).eval()
    seen = {}
    for name in ("backbone", "rpn.head", "roi_heads.box_roi_pool", "roi_heads.box_head.layer4",
                 "roi_heads.box_head.norm", "roi_heads.box_head"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, inputs, out, name=name: seen.update({name: (inputs, out)}))
    model.roi_heads.box_head.norm.running_mean += 3
    model([torch.rand(3, 96, 128)])
    assert seen["backbone"][1].shape == (1, 1024, 6, 8)
    assert seen["rpn.head"][0][0][0].shape == (1, 1024, 6, 8)
    rois = len(seen["roi_heads.box_roi_pool"][1])
    assert seen["roi_heads.box_roi_pool"][1].shape == (rois, 1024, 14, 14) and rois == 16
    res5 = seen["roi_heads.box_head.layer4"][1]
    assert res5.shape == (rois, 2048, 7, 7)
    by_hand = (res5 - 3) / (1 + 1e-5) ** 0.5
    assert torch.allclose(seen["roi_heads.box_head"][1], by_hand.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_weights_reach_the_detector_bit_for_bit(tmp_path, detector):
    torch.manual_seed(1)
    stages = resnet_stages("resnet18")
    save_tensors(stages.state_dict(), tmp_path / "backbone.pt")
    wanted = stages.state_dict()
    for weights in (str(tmp_path / "backbone.pt"), "none"):
        model = build_detector("resnet18", 3, detector, **SMALL, weights=weights)
        state = {k.replace("backbone.body.", "").replace("backbone.", "")
                 .replace("roi_heads.box_head.layer4", "layer4"): v
                 for k, v in model.state_dict().items()}
        assert wanted.keys() <= state.keys()
        same = [torch.equal(v, state[k]) for k, v in wanted.items() if v.dim() == 4]
        assert all(same) if weights != "none" else not any(same)


def test_fpn_and_box_head_are_loaded_too(tmp_path, capsys):
    torch.manual_seed(1)
    path = str(tmp_path / "detector.pt")
    donor = build_detector("resnet18", 5, **SMALL)
    save_checkpoint(path, dict(model=donor.state_dict()))  # as a fine-tune's own checkpoint
    model = build_detector("resnet18", 3, **SMALL, weights=path)  # of other classes
    said = capsys.readouterr().out
    assert "loaded from 'backbone.fpn.*'" in said and "loaded from 'roi_heads.box_head.*'" in said
    wanted = {k: v for k, v in donor.state_dict().items()
              if k.startswith(("backbone.", "roi_heads.box_head."))}
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in wanted.items())
    assert state["roi_heads.box_predictor.cls_score.weight"].shape == (4, 1024)

    head = FastRCNNConvFCHead((16, 7, 7), [16] * 4, [1024], norm_layer=torch.nn.BatchNorm2d)
    parts = {k: v for k, v in wanted.items() if "box_head" not in k}
    parts.update({f"roi_heads.box_head.{k}": v for k, v in head.state_dict().items()})
    save_checkpoint(path, {f"module.{k}": v for k, v in parts.items()})  # any prefix
    model = build_detector("resnet18", 3, **SMALL, weights=path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    save_checkpoint(path, parts)  # as SoCo's: four convolutions and one linear layer
    model = build_detector("resnet18", 3, **SMALL, weights=path)
    assert type(model.roi_heads.box_head) is FastRCNNConvFCHead
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    assert model.eval()([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4

    both = {f"{copy}.{k}": v + torch.tensor(copy == "ema_model", dtype=v.dtype)  # the average first
            for copy in ("ema_model", "model") for k, v in parts.items()}
    save_checkpoint(path, both)
    model = build_detector("resnet18", 3, **SMALL, weights=path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    save_checkpoint(path, parts)

    assert "fpn" not in "".join(build_detector("resnet18", 3, "c4", **SMALL,
                                                  weights=path).state_dict())  # the ResNet alone
    with pytest.raises(InputError, match=r"backbone.fpn.\*: .*size mismatch") as caught:
        build_detector("resnet18", 3, fpn_channels=32, weights=path)
    assert "\n" not in str(caught.value)
    del parts["backbone.fpn.inner_blocks.0.0.weight"]
    save_checkpoint(path, parts)
    with pytest.raises(InputError, match="Missing key.*inner_blocks.0.0.weight"):
        build_detector("resnet18", 3, **SMALL, weights=path)


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_the_backbone_alone_of_torchvisions_own_detector(tmp_path, capsys, detector):
    """Its FPN has no batch norm, so it is not that of this detector."""
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None).state_dict()
    path = tmp_path / "fasterrcnn.pth"
    torch.save(theirs, path)
    small = dict(SMALL, fpn_channels=256)
    if detector == "fpn":
        with pytest.raises(InputError, match="--backbone-only leaves it out") as caught:
            build_detector("resnet50", 3, detector, **small, weights=path)
        assert len(str(caught.value)) < 400 and "backbone.fpn.*: " in str(caught.value)
    model = build_detector("resnet50", 3, detector, **small, weights=path, backbone_only=True)
    state = model.state_dict()
    pairs = [(v, state[k.replace(".body", "") if detector == "c4" else k])
             for k, v in theirs.items() if k.startswith("backbone.body.") and
             (detector == "fpn" or "layer4" not in k)]
    assert len(pairs) > 150 and all(torch.equal(a, b) for a, b in pairs)
    assert "from 'backbone.body.*'" in capsys.readouterr().out


def gradients(number, world, path):
    """Every parameter's gradient from a batch of four scenes; this process has its share of it."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store", rank=number, world_size=world)
    data, share, found = LabelledScenes(4, seed=3), 4 // world, {}
    for detector in ("fpn", "c4"):
        torch.manual_seed(0)
        model = build_detector("resnet18", 6, detector, 16, [128], 128, 8, 16).train()
        for module in model.modules():  # whose statistics are of a process's own images
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        ddp = model if world == 1 else torch.nn.parallel.DistributedDataParallel(model)
        mine = [training_item(data[i]) for i in range(4)][number * share:(number + 1) * share]
        randperm = torch.randperm  # by which RPN and box head sample
        torch.randperm = lambda n, device: torch.from_numpy(np.random.default_rng(n).permutation(n))
        sum(ddp([image / 255 for image, _ in mine], [t for _, t in mine]).values()).backward()
        torch.randperm = randperm
        found.update({f"{detector} {n}": p.grad for n, p in model.named_parameters()})
    if number == 0:
        torch.save(found, path / f"{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    gradients(0, 1, tmp_path)
    start_processes(gradients, (2, tmp_path), 2)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - two[name]).norm() <= 1e-5 * gradient.norm(), name


def test_detections_do_not_depend_on_who_shares_the_batch():
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, **{**SMALL, "max_size": 128}).eval()
    model.roi_heads.score_thresh = 0.0
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8)
              for size in ((64, 64), (64, 128), (90, 50))]
    together = detect(model, images, "cpu")
    for image, found in zip(images, together):
        (alone,) = detect(model, [image], "cpu")
        assert len(found["boxes"]) > 5 and all(torch.equal(alone[k], v) for k, v in found.items())


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_mixed_precision_leaves_boxes_in_float32(detector):
    torch.manual_seed(0)
    model = build_detector("resnet18", 3, detector, 16, min_size=[640], max_size=640,
                              rois=8).train()
    truth = torch.tensor([[321.3, 130.7, 611.9, 399.1]])
    seen = []

    def encode(truths, proposals):
        seen.append((truths, proposals))
        return [torch.zeros_like(p) for p in proposals]

    model.roi_heads.box_coder.encode = encode
    with torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 640, 640)], [dict(boxes=truth, labels=torch.tensor([1]))])
    (truths, proposals), = seen
    assert truths[0].dtype == proposals[0].dtype == torch.float32
    assert (truths[0] - truth).abs().min() < 1e-3 and (proposals[0][-1] - truth).abs().max() < 1e-3


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_the_bytes_of_a_step_are_those_that_autograd_keeps(detector):
    """But for what is left out, to a fifth: ReLUs in place, pooling, losses."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 2, detector, fpn_channels=32, min_size=(160,), max_size=160,
                           anchor_size=16, rois=16).train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    target = dict(boxes=torch.tensor([[20.0, 20, 120, 120]]), labels=torch.tensor([1]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model([torch.rand(3, 160, 160)] * 2, [target] * 2)
    assert len(losses) == 4
    saved = sum(size for pointer, (_, size) in kept.items() if pointer not in own)
    weights = 12 * sum(p.numel() for p in model.parameters())
    assert training_bytes(model, 2, 160, 160, 16) - weights == pytest.approx(saved, rel=0.2)
    assert all(p.device.type == "cpu" for p in model.parameters())
