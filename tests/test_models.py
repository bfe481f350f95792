import math
import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import start_processes
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList

from common import InputError, backbone_stages, resnet_stages
from detection.data import LabelledScenes, training_item
from detection.models import (RoIHeads, box_head_losses, build_detector, detect,
                              training_bytes)
from plumbing.run import distribute
from plumbing.weights import detectron2_name, save_checkpoint, save_tensors

SMALL = dict(fpn_channels=16, min_size=[64], max_size=64, anchor_size=8, rois=16)


@pytest.mark.parametrize("detector, norms, box_head", [
    ("fpn", 20 + 8, None), ("c4", 20 + 1, None), ("fpn", 20 + 8 + 4 + 4, "4conv1fc")])
def test_every_layer_of_the_detector_trains(detector, norms, box_head):
    """Batch norms: of ResNet-18, of the FPN's four inner and four layer blocks, C4's extra one, of
    SoCo's box head and the mask head beside it."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, detector, **SMALL, masks=True, box_head=box_head).train()
    found = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert len(found) == norms
    assert all(type(m) is torch.nn.BatchNorm2d and m.training for m in found)
    assert all(p.requires_grad for p in model.parameters())
    before = [m.running_mean.clone() for m in found]
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]),
                    bitmasks=torch.ones(1, 64, 64).bool()),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                    bitmasks=torch.zeros(0, 48, 64).bool())]
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


NORM = "weight", "bias", "running_mean", "running_var"
TENSORS = {}  # detectron2's names and shapes, of ResNet-50 and 20 classes, as its own models have


def add(kind, name, shape, norm):
    """A layer: its weight and its bias, or, with ``norm``, the batch norm after it."""
    TENSORS.setdefault(kind, {})[f"{name}.weight"] = shape
    TENSORS[kind].update({f"{name}.norm.{k}": shape[:1] for k in NORM} if norm else
                         {f"{name}.bias": shape[:1]})


for kind, body in (("c4", "backbone"), ("fpn", "backbone.bottom_up")):
    add(kind, f"{body}.stem.conv1", (64, 3, 7, 7), True)
    into = 64
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        at = "roi_heads.res5" if (kind, stage) == ("c4", 5) else f"{body}.res{stage}"
        add(kind, f"{at}.0.shortcut", (4 * width, into, 1, 1), True)
        for block in range(blocks):
            add(kind, f"{at}.{block}.conv1", (width, into, 1, 1), True)
            add(kind, f"{at}.{block}.conv2", (width, width, 3, 3), True)
            add(kind, f"{at}.{block}.conv3", (4 * width, width, 1, 1), True)
            into = 4 * width
    width, anchors, out = (1024, 15, 2048) if kind == "c4" else (256, 3, 1024)
    add(kind, "proposal_generator.rpn_head.conv", (width, width, 3, 3), False)
    add(kind, "proposal_generator.rpn_head.objectness_logits", (anchors, width, 1, 1), False)
    add(kind, "proposal_generator.rpn_head.anchor_deltas", (4 * anchors, width, 1, 1), False)
    add(kind, "roi_heads.box_predictor.cls_score", (21, out), False)
    add(kind, "roi_heads.box_predictor.bbox_pred", (80, out), False)
TENSORS["c4"].update({f"roi_heads.res5.norm.{k}": (2048,) for k in NORM})  # MoCo's extra one
for level in (2, 3, 4, 5):
    add("fpn", f"backbone.fpn_lateral{level}", (256, 64 << level, 1, 1), True)
    add("fpn", f"backbone.fpn_output{level}", (256, 256, 3, 3), True)
add("fpn", "roi_heads.box_head.fc1", (1024, 256 * 7 * 7), False)
add("fpn", "roi_heads.box_head.fc2", (1024, 1024), False)

MASKS = {"roi_heads.mask_head.predictor.weight": (20, 256, 1, 1),  # of Mask R-CNN
         "roi_heads.mask_head.predictor.bias": (20,), "roi_heads.mask_head.deconv.bias": (256,)}
TENSORS["c4 masks"] = {**TENSORS["c4"], **MASKS,
                       "roi_heads.mask_head.deconv.weight": (2048, 256, 2, 2)}
TENSORS["fpn masks"] = {**TENSORS["fpn"], **MASKS,
                        "roi_heads.mask_head.deconv.weight": (256, 256, 2, 2)}
for layer in (1, 2, 3, 4):
    add("fpn masks", f"roi_heads.mask_head.mask_fcn{layer}", (256, 256, 3, 3), False)
TENSORS["fpn keypoints"] = {**TENSORS["fpn"],
                            "roi_heads.keypoint_head.score_lowres.weight": (512, 17, 4, 4),
                            "roi_heads.keypoint_head.score_lowres.bias": (17,)}
for layer in range(1, 9):
    add("fpn keypoints", f"roi_heads.keypoint_head.conv_fcn{layer}",
        (512, 256 if layer == 1 else 512, 3, 3), False)

LAYERS = {"rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
          "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
          "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
          "roi_heads.box_head.layer4": "roi_heads.layer4",
          "roi_heads.box_head.norm": "roi_heads.res5.norm",
          "keypoint_predictor.kps_score_lowres": "keypoint_head.score_lowres",
          "mask_predictor.conv5_mask": "mask_head.deconv",
          "mask_predictor.mask_fcn_logits": "mask_head.predictor",
          "box_head.fc6": "box_head.fc1", "box_head.fc7": "box_head.fc2",
          "backbone.body": "backbone.bottom_up"}


def name_in_detectron2(name):
    """detectron2's name of the tensor that our detector calls ``name``."""
    for ours, theirs in LAYERS.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"mask_head\.(\d)\.0",
                  lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}", name)
    name = re.sub(r"keypoint_head\.(\d+)",
                  lambda found: f"keypoint_head.conv_fcn{int(found[1]) // 2 + 1}", name)
    name = re.sub(r"fpn\.(inner|layer)_blocks\.(\d)\.(0|1)", lambda found: "fpn_" + (
        "lateral" if found[1] == "inner" else "output") + str(int(found[2]) + 2) +
        ".norm" * (found[3] == "1"), name)
    prefix, rest = re.match(r"(backbone\.bottom_up\.|backbone\.|roi_heads\.)?(.*)", name).groups()
    return (prefix or "") + detectron2_name(rest)


@pytest.mark.parametrize("detector, tensors, parameters", [
    ("c4", 279, 33_234_160), ("fpn", 319, 41_447_604),
    ("c4 masks", 283, 35_336_708), ("fpn masks", 331, 44_075_464),
    ("fpn keypoints", 337, 59_285_701)])
def test_names_shapes_and_counts_are_detectron2s(detector, tensors, parameters):
    """Batch norm counts its batches here as there, which is left out.  The only other shapes: the
    background, here the first class, has deltas and masks too."""
    kind, masks = detector.split()[0], detector.endswith("masks")
    model = build_detector("resnet50", 20, kind, masks=masks,
                           keypoints=detector.endswith("keypoints"))
    state = {name_in_detectron2(k): tuple(v.shape) for k, v in model.state_dict().items()
             if not k.endswith("num_batches_tracked")}
    for k, rows in (("weight", (84, state["roi_heads.box_predictor.cls_score.weight"][1])),
                    ("bias", (84,))):
        assert state[f"roi_heads.box_predictor.bbox_pred.{k}"] == rows
        state[f"roi_heads.box_predictor.bbox_pred.{k}"] = (80, *rows[1:])
        if masks:
            one, *others = state[f"roi_heads.mask_head.predictor.{k}"]
            state[f"roi_heads.mask_head.predictor.{k}"] = (one - 1, *others)
    assert state == TENSORS[detector] and len(state) == tensors
    number = sum(math.prod(shape) for k, shape in state.items() if "running" not in k)
    background = 4 * model.roi_heads.box_predictor.bbox_pred.in_features + 4
    background += 256 + 1 if masks else 0
    assert number == sum(p.numel() for p in model.parameters()) - background == parameters


@pytest.mark.parametrize("detector", ["c4", "fpn"])
def test_the_numbers_are_detectron2s(detector):
    """config/defaults.py, Base-RCNN-C4.yaml and Base-RCNN-FPN.yaml."""
    model = build_detector("resnet50", 20, detector)
    rpn, heads = model.rpn, model.roi_heads
    assert heads.detections_per_img == 100 and heads.score_thresh == 0.05
    assert rpn._pre_nms_top_n == dict(c4=dict(training=12000, testing=6000),
                                      fpn=dict(training=2000, testing=1000))[detector]
    assert rpn._post_nms_top_n == dict(c4=dict(training=2000, testing=1000),
                                       fpn=dict(training=1000, testing=1000))[detector]
    for part, number, share, low, high, weak in (
            (rpn, 256, 0.5, 0.3, 0.7, True), (heads, 512, 0.25, 0.5, 0.5, False)):
        assert part.fg_bg_sampler.batch_size_per_image == number
        assert part.fg_bg_sampler.positive_fraction == share
        matcher = part.proposal_matcher
        assert (matcher.low_threshold, matcher.high_threshold) == (low, high)
        assert matcher.allow_low_quality_matches == weak
        assert part.box_coder.bbox_xform_clip == math.log(1000 / 16)
    assert (rpn.nms_thresh, heads.nms_thresh) == (0.7, 0.5)
    assert (rpn.box_coder.weights, heads.box_coder.weights) == ((1, 1, 1, 1), (10, 10, 5, 5))
    pool = heads.box_roi_pool
    assert (pool.size, pool.strides, pool.canonical) == dict(
        c4=(14, (16,), 224), fpn=(7, (4, 8, 16, 32), 224))[detector]


def test_keypoint_rcnns_numbers_are_detectron2s():
    """Base-Keypoint-RCNN-FPN.yaml: 1500 proposals in training, smooth L1 below 0.5 in the box head
    alone; and c2_msra_fill of all its head's layers."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 1, keypoints=True)
    assert model.rpn._post_nms_top_n == dict(training=1500, testing=1000)
    assert model.roi_heads.beta == 0.5 and build_detector("resnet18", 1).roi_heads.beta == 0
    for layer, fan_out in (*((layer, 512 * 9) for layer in [*model.roi_heads.keypoint_head][::2]),
                           (model.roi_heads.keypoint_predictor.kps_score_lowres, 512 * 16)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    for wrong in (dict(detector="c4", keypoints=True), dict(detector="retinanet", keypoints=True),
                  dict(detector="retinanet", masks=True)):
        with pytest.raises(InputError, match="--keypoints needs --detector fpn, --masks needs"):
            build_detector("resnet18", 1, **wrong)


def test_the_box_heads_loss_is_a_square_below_beta():
    deltas = torch.tensor([[0.0] * 4 + [0.1, -0.5, 2.0, 0.0]], requires_grad=True)
    loss = box_head_losses(torch.zeros(1, 2), deltas, torch.tensor([1]), torch.zeros(1, 4), 0.5)[1]
    assert loss.item() == pytest.approx(0.1 ** 2 / 2 / 0.5 + 0.5 ** 2 / 2 / 0.5 + 2 - 0.5 / 2)
    gradient, = torch.autograd.grad(loss, deltas)
    assert gradient[0, 4:].tolist() == pytest.approx([0.1 / 0.5, -1, 1, 0])


@pytest.mark.parametrize("detector", ["c4", "fpn"])
def test_predictors_start_as_detectron2s(detector):
    torch.manual_seed(0)
    model = build_detector("resnet50", 20, detector, masks=True)
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    layers = [(head.conv[0][0], 0.01), (head.cls_logits, 0.01), (head.bbox_pred, 0.01),
              (predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)]
    # c2_msra_fill: normal, deviation sqrt(2 / fan out), that of a deconvolution by its inputs
    inputs = 256 if detector == "fpn" else 2048
    layers += [(model.roi_heads.mask_predictor.conv5_mask, (2 / (inputs * 4)) ** 0.5),
               (model.roi_heads.mask_predictor.mask_fcn_logits, 0.001),
               *((part[0], (2 / (256 * 9)) ** 0.5) for part in model.roi_heads.mask_head or ())]
    if detector == "fpn":  # c2_xavier_fill: uniform up to sqrt(3 / inputs), deviation sqrt(1 / ..)
        layers += [(model.roi_heads.box_head.fc6, (256 * 49) ** -0.5),
                   (model.roi_heads.box_head.fc7, 1024 ** -0.5)]
        assert model.roi_heads.box_head.fc7.weight.abs().max() <= (3 / 1024) ** 0.5
    for layer, deviation in layers:
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(layer.weight.mean().item()) < 0.1 * deviation and not layer.bias.any()


def test_anchors_by_hand():
    """detectron2's: w = sqrt(size^2 / ratio), h = ratio w, around (0, 0), then at every stride."""
    narrow = 32 * math.sqrt(0.5)  # 22.627, which torchvision rounds to 23 or 22
    cell = [[-narrow, -narrow / 2, narrow, narrow / 2], [-16, -16, 16, 16],
            [-narrow / 2, -narrow, narrow / 2, narrow]]
    model = build_detector("resnet18", 2, "c4", min_size=[90], max_size=100)
    anchors, = model.rpn.anchor_generator(  # 90 x 100 pixels, and no multiple of 32 around them
        ImageList(torch.zeros(1, 3, 90, 100), [(90, 100)]), [torch.zeros(1, 256, 6, 7)])
    anchors = anchors.view(6, 7, 5, 3, 4)  # rows, columns, sizes, ratios
    for size in range(5):
        expected = torch.tensor(cell) * 2 ** size
        torch.testing.assert_close(anchors[0, 0, size], expected)
        torch.testing.assert_close(anchors[5, 3, size],
                                   expected + torch.tensor([48., 80, 48, 80]))
    model = build_detector("resnet18", 2, "fpn", **SMALL)  # 8 to 128 pixels
    sides = (24, 24), (12, 12), (6, 6), (3, 3), (2, 2)  # of an image of 96 x 96
    levels = [torch.zeros(2, 16, *side, dtype=torch.bfloat16) for side in sides]
    images = ImageList(torch.zeros(2, 3, 96, 96), [(96, 96), (96, 80)])
    one, two = model.rpn.anchor_generator(images, levels)
    assert torch.equal(one, two) and one.dtype == torch.float32
    for i, (level, stride) in enumerate(zip(one.split([3 * h * w for h, w in sides]),
                                            (4, 8, 16, 32, 64))):
        h, w = sides[i]
        last = torch.tensor([(w - 1) * stride, (h - 1) * stride] * 2)
        expected = torch.tensor(cell) / 4 * 2 ** i
        torch.testing.assert_close(level.view(h, w, 3, 4)[0, 0], expected)
        torch.testing.assert_close(level.view(h, w, 3, 4)[-1, -1], expected + last)


def test_proposals_are_sorted_by_their_logits():
    """Of three boxes on one another the best stays, also where float32's sigmoid is 1 for all."""
    rpn = build_detector("resnet18", 2, **SMALL).eval().rpn
    boxes = torch.tensor([[[0.0, 0, 20, 20], [0, 0, 20, 21], [0, 0, 20, 22], [40, 40, 60, 60]]])
    thin = torch.tensor([[[5.0, 5, 5.0001, 30], [5, 5, 5, 30]]])  # detectron2 wants an area alone
    found, _ = rpn.filter_proposals(thin, torch.zeros(1, 2), [(64, 64)], [2])
    assert torch.equal(found[0], thin[0, :1])
    for logits in ([20.0, 30, 25, 19], [-30.0, -20, -25, -31], [200.0, 200.1, 199, 0]):
        found, _ = rpn.filter_proposals(boxes, torch.tensor([logits]), [(64, 64)], [4])
        assert torch.equal(found[0], boxes[0, [1, 3]])


def literal_rpn_losses(logits, deltas, labels, targets, images):
    """detectron2's rpn.py, anchor by anchor: sums over 256 anchors of each image."""
    cross_entropy = distance = 0
    for logit, delta, label, target in zip(logits.flatten(), deltas, labels, targets):
        if label == 1:
            cross_entropy = cross_entropy + torch.log(1 + torch.exp(-logit))
            distance = distance + sum(abs(d - t) for d, t in zip(delta, target))
        elif label == 0:
            cross_entropy = cross_entropy + torch.log(1 + torch.exp(logit))
    return cross_entropy / (256 * images), distance / (256 * images)


def test_the_rpns_losses_are_detectron2s():
    """Of two images whose anchors are all sampled; -1 is between positive and negative."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 2, **SMALL)
    labels = torch.tensor([1.0] * 20 + [0.0] * 60 + [-1.0] * 20)[torch.randperm(100)]
    logits = torch.randn(100, 1, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(100, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(100, 4, dtype=torch.float64)
    found = model.rpn.compute_loss(logits, deltas, [*labels.double().split(50)],
                                   [*targets.split(50)])
    expected = literal_rpn_losses(logits, deltas, labels, targets, images=2)
    for ours, literal, to in zip(found, expected, (logits, deltas)):
        torch.testing.assert_close(ours, literal)
        torch.testing.assert_close(*(torch.autograd.grad(loss, to)[0] for loss in (ours, literal)))
    # of 600 negative anchors and 200 positive ones, 128 of each are drawn for a loss of ln 2
    labels = [torch.cat([torch.zeros(600), torch.ones(200)])]
    entropy, distance = model.rpn.compute_loss(torch.zeros(800, 1), torch.zeros(800, 4), labels,
                                               [torch.full((800, 4), 0.01)])
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-5)
    assert distance.item() == pytest.approx(128 * 4 * 0.01 / 256, rel=1e-5)


def test_the_box_heads_losses_are_detectron2s():
    """fast_rcnn.py, RoI by RoI: means over all RoIs, the distance of objects' own class alone."""
    torch.manual_seed(0)
    logits = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    labels, targets = torch.arange(30) % 4, torch.randn(30, 4, dtype=torch.float64)
    cross_entropy = distance = 0
    for i in range(30):
        k = int(labels[i])
        cross_entropy = cross_entropy - logits[i, k] + torch.log(torch.exp(logits[i]).sum())
        if k > 0:
            distance = distance + sum(abs(deltas[i, 4 * k + j] - targets[i, j]) for j in range(4))
    found = box_head_losses(logits, deltas, labels, targets)
    for ours, literal, to in zip(found, (cross_entropy / 30, distance / 30), (logits, deltas)):
        torch.testing.assert_close(ours, literal)
        torch.testing.assert_close(*(torch.autograd.grad(loss, to)[0] for loss in (ours, literal)))
    nothing = box_head_losses(logits, deltas, 0 * labels, targets)[1]
    assert nothing == 0 and not torch.autograd.grad(nothing, deltas)[0].any()


def test_the_box_head_trains_on_what_torchvisions_does():
    """The same RoIs, features and scores, so that only the distance of boxes is another one."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, **SMALL).train()
    images = [training_item(LabelledScenes(2, seed=3)[i]) for i in range(2)]
    pixels, targets = model.transform([image / 255 for image, _ in images], [t for _, t in images])
    features = model.backbone(pixels.tensors)
    proposals = [t["boxes"] + torch.tensor([1.0, -2, 1, 2]) for t in targets]
    losses = []
    for forward in (RoIHeads.forward, torchvision.models.detection.roi_heads.RoIHeads.forward):
        torch.manual_seed(0)
        losses.append(forward(model.roi_heads, features, proposals, pixels.image_sizes, targets)[1])
    ours, theirs = losses
    assert ours.keys() == theirs.keys() and ours["loss_classifier"] == theirs["loss_classifier"]
    assert ours["loss_box_reg"] > theirs["loss_box_reg"] > 0


def test_c4_from_image_to_classes():
    """Res4 at stride 16, also of an image whose sides are no multiples of it, RoIs of 14 x 14 that
    Res5 halves, one more batch norm, then the mean."""
    torch.manual_seed(0)
    model = build_detector("resnet50", 20, "c4", min_size=[90], max_size=128, rois=8).eval()
    seen = {}
    for name in ("backbone", "rpn.head", "roi_heads.box_roi_pool", "roi_heads.box_head.layer4",
                 "roi_heads.box_head.norm", "roi_heads.box_head"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, inputs, out, name=name: seen.update({name: (inputs, out)}))
    model.roi_heads.box_head.norm.running_mean += 3
    model([torch.rand(3, 90, 125)])
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

    soco = {f"online.{k.replace('roi_heads.box_head.', 'head.')}": v for k, v in parts.items()}
    other = {k.replace("online.", "target."): v + 1 for k, v in soco.items()}
    save_checkpoint(path, dict(model={**other, **soco}, method="soco"))  # of a stopped run
    model = build_detector("resnet18", 3, **SMALL, weights=path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())

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
        for module in model.modules():  # all in float64: batch norm makes rounding errors larger
            module._forward_hooks.clear()
        model, ddp = distribute(model.double(), torch.device("cpu"), sync_batch_norm=True)
        mine = [training_item(data[i]) for i in range(4)][number * share:(number + 1) * share]
        randperm = torch.randperm  # by which RPN and box head sample
        torch.randperm = lambda n, device: torch.from_numpy(np.random.default_rng(n).permutation(n))
        sum(ddp([image.double() / 255 for image, _ in mine],
                [dict(t, boxes=t["boxes"].double()) for _, t in mine]).values()).backward()
        torch.randperm = randperm
        found.update({f"{detector} {n}": p.grad for n, p in model.named_parameters()})
    if number == 0:
        torch.save(found, path / f"{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    gradients(0, 1, tmp_path)
    start_processes(gradients, (2, tmp_path), 2)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
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
    model = build_detector("resnet18", 3, detector, 16, min_size=[160], max_size=160,
                           rois=8, masks=True).train()
    truth = torch.tensor([[80.3, 32.7, 152.9, 99.1]])  # bfloat16 would round each by 0.05 or more
    seen, logits = [], []

    def encode(truths, proposals):
        seen.append((truths, proposals))
        return [torch.zeros_like(p) for p in proposals]

    model.roi_heads.box_coder.encode = encode
    model.roi_heads.mask_predictor.register_forward_hook(
        lambda _module, inputs, output: logits.extend([*inputs, output]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 160, 160)], [dict(
            boxes=truth, labels=torch.tensor([1]), bitmasks=torch.ones(1, 160, 160).bool())])
    assert [x.dtype for x in (*logits, losses["loss_mask"])] == [
        torch.bfloat16, torch.float32, torch.float32]
    (truths, proposals), = seen
    assert truths[0].dtype == proposals[0].dtype == torch.float32
    assert (truths[0] - truth).abs().max() < 1e-3 and (proposals[0][-1] - truth).abs().max() < 1e-3


@pytest.mark.parametrize("detector, masks, keypoints", [
    ("fpn", False, False), ("c4", False, False), ("fpn", True, True), ("c4", True, False)])
def test_the_bytes_of_a_step_are_those_that_autograd_keeps(detector, masks, keypoints):
    """But for what is left out, to a fifth: ReLUs in place, pooling, losses.  Of masks, as many as
    there may be: a quarter of the RoIs."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 2, detector, fpn_channels=32, min_size=(160,), max_size=160,
                           anchor_size=16, rois=16, masks=masks, keypoints=keypoints).train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    target = dict(boxes=torch.tensor([[20.0, 20, 120, 120]] * 4), labels=torch.ones(4).long(),
                  bitmasks=torch.ones(4, 160, 160).bool(), keypoints=60 * torch.ones(4, 17, 3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model([torch.rand(3, 160, 160)] * 2, [target] * 2)
    assert len(losses) == 4 + masks + keypoints
    saved = sum(size for pointer, (_, size) in kept.items() if pointer not in own)
    weights = 12 * sum(p.numel() for p in model.parameters())
    assert training_bytes(model, 2, 160, 160, 16) - weights == pytest.approx(saved, rel=0.2)
    assert all(p.device.type == "cpu" for p in model.parameters())
