"""RetinaNet against detectron2's configuration, and its loss and detections against loops."""
import json
import math
import os
import re
import signal

import pytest
import torch
from conftest import assert_identical, start_processes
from torch.nn.functional import mse_loss

import finetune_fasterrcnn as ft
import visualize
from common import resnet_stages
from detection.data import LabelledScenes, training_item
from detection.models import build_detector, detect, training_bytes
from detection.anchors import Anchors
from detection.retinanet import STRIDES
from plumbing.run import distribute
from plumbing.weights import detectron2_name, save_checkpoint

SMALL = dict(fpn_channels=16, min_size=[64], max_size=64, anchor_size=16)


def small(classes=3, **options):
    torch.manual_seed(0)
    return build_detector("resnet18", classes, "retinanet", **{**SMALL, **options})


# ------------------------------------------------------------------------- names, shapes, settings


def detectron2_parameters():
    """retinanet_R_50_FPN_1x.yaml's parameters but for the ResNet, with FPN.NORM BN, as name ->
    shape: build_retinanet_resnet_fpn_backbone's pyramid and RetinaNetHead's, of 80 classes."""
    shapes = {}
    for level, channels in ((3, 512), (4, 1024), (5, 2048)):
        for name, shape in ((f"backbone.fpn_lateral{level}", (256, channels, 1, 1)),
                            (f"backbone.fpn_output{level}", (256, 256, 3, 3))):
            shapes.update({f"{name}.weight": shape, f"{name}.norm.weight": (256,),
                           f"{name}.norm.bias": (256,)})
    convolutions = {"backbone.top_block.p6": (256, 2048), "backbone.top_block.p7": (256, 256),
                    "head.cls_score": (9 * 80, 256), "head.bbox_pred": (9 * 4, 256)}
    for number in (0, 2, 4, 6):  # a ReLU after each
        convolutions[f"head.cls_subnet.{number}"] = (256, 256)
        convolutions[f"head.bbox_subnet.{number}"] = (256, 256)
    for name, (out, channels) in convolutions.items():
        shapes.update({f"{name}.weight": (out, channels, 3, 3), f"{name}.bias": (out,)})
    return shapes


def their_name(name):
    """detectron2's name of one of our parameters."""
    if name.startswith("backbone.body."):
        return "backbone.bottom_up." + detectron2_name(name.removeprefix("backbone.body."))
    for pattern, to in ((r"fpn\.extra_blocks", "top_block"), (r"cls_logits", "cls_score"),
                        (r"bbox_reg\b", "bbox_pred"),
                        (r"fpn\.inner_blocks\.(\d)", lambda m: f"fpn_lateral{int(m[1]) + 3}"),
                        (r"fpn\.layer_blocks\.(\d)", lambda m: f"fpn_output{int(m[1]) + 3}"),
                        (r"(fpn_\w+)\.0\.", r"\1."), (r"(fpn_\w+)\.1\.", r"\1.norm."),
                        (r"conv\.(\d)\.0", lambda m: f"subnet.{2 * int(m[1])}"),
                        (r"classification_head\.subnet", "cls_subnet"),
                        (r"regression_head\.subnet", "bbox_subnet"), (r"\w+_head\.", "")):
        name = re.sub(pattern, to, name)
    return name


def test_the_parameters_are_detectron2s():
    model = build_detector("resnet50", 80, "retinanet")
    ours = {their_name(k): tuple(p.shape) for k, p in model.named_parameters()}
    resnet = {k: v for k, v in ours.items() if k.startswith("backbone.bottom_up.")}
    wanted = {f"backbone.bottom_up.{detectron2_name(k)}": tuple(p.shape)
              for k, p in resnet_stages("resnet50").named_parameters()}
    assert resnet == wanted and "backbone.bottom_up.res2.0.conv1.norm.weight" in wanted
    assert {k: v for k, v in ours.items() if k not in resnet} == detectron2_parameters()
    count = 23508032 + 256 * (512 + 1024 + 2048) + 3 * 256 * 256 * 9 + 6 * 512  # ResNet, pyramid
    count += 256 * 2048 * 9 + 256 + 9 * (256 * 256 * 9 + 256)  # P6; P7 and the head's eight
    count += 256 * 9 * 9 * 84 + 9 * 84  # 80 classes and 4 offsets of nine anchors
    assert sum(p.numel() for p in model.parameters()) == count == 37970228
    assert all(p.requires_grad for p in model.parameters())
    assert len([m for m in model.modules() if type(m) is torch.nn.BatchNorm2d]) == 53 + 6
    assert (model.score_thresh, model.nms_thresh, model.topk_candidates) == (0.05, 0.5, 1000)
    assert model.detections_per_img == 100 and model.proposal_matcher.allow_low_quality_matches
    head = {k: p for k, p in model.named_parameters() if k.startswith("head.")}
    for name, p in head.items():
        if name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.01, rel=0.02) and abs(p.mean()) < 2e-4
        else:
            wanted = -math.log(99) if "cls_logits" in name else 0  # a probability of 0.01
            assert torch.allclose(p, torch.full_like(p, wanted))


def test_a_narrow_head_lets_as_much_through():
    """Of 64 channels: the square root of channels times deviation is that of 256 and 0.01."""
    head = small(fpn_channels=64).head
    for name, p in head.named_parameters():
        if name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name


def test_the_pyramid_has_p6_from_res5_and_p7_from_p6():
    model = small(fpn_channels=512).eval()  # as wide as Res5, where torchvision would take P5
    images = torch.rand(1, 3, 128, 192)
    maps = [*model.backbone(images).values()]
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    top = model.backbone.fpn.extra_blocks
    assert torch.equal(maps[3], top.p6(model.backbone.body(images)[-1]))
    assert torch.equal(maps[4], top.p7(maps[3].clamp(min=0)))


def test_anchors_by_hand():
    model = build_detector("resnet18", 3, "retinanet", fpn_channels=16)
    maps = [torch.zeros(1, 1, math.ceil(800 / s), math.ceil(1088 / s), dtype=torch.bfloat16)
            for s in STRIDES]
    images = type("Images", (), {"tensors": torch.zeros(1, 3, 800, 1088), "image_sizes": [0, 0]})()
    first, second = model.anchor_generator(images, maps)
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert len(first) == 9 * (100 * 136 + 50 * 68 + 25 * 34 + 13 * 17 + 7 * 9)
    root = math.sqrt(2)
    by_hand = [[-16 * root, -8 * root, 16 * root, 8 * root], [-16, -16, 16, 16],  # size 32
               [-8 * root, -16 * root, 8 * root, 16 * root]]  # twice as high as wide
    octave = 2 ** (1 / 3)
    by_hand += [[x * octave ** k for x in row] for k in (1, 2) for row in by_hand]
    assert torch.allclose(first[:9], torch.tensor(by_hand), rtol=1e-6)
    assert first[0, 2].item() == pytest.approx(22.627417)  # torchvision: 23
    assert torch.allclose(first[9:18], torch.tensor(by_hand) + torch.tensor([8.0, 0, 8, 0]))
    p6 = first[9 * (100 * 136 + 50 * 68 + 25 * 34):][:9 * 13 * 17].view(13, 17, 9, 4)
    assert torch.allclose(p6[12, 16], 8 * torch.tensor(by_hand)  # torchvision: 12 * 61, 16 * 64
                          + torch.tensor([1024.0, 768, 1024, 768]))
    last = first[-9:]
    assert torch.allclose(last, 16 * torch.tensor(by_hand) + torch.tensor([1024.0, 768] * 2))
    smaller = Anchors([[8.0]], [8]).cell_anchors[0]
    assert smaller[1].tolist() == [-4, -4, 4, 4]


# -------------------------------------------------------------------------------- matching, losses


def square(width, height=100.0, x=0.0):
    return [x, 0.0, x + width, height]


def test_matching_at_the_thresholds():
    """Overlaps with an object of 100 x 100; the second object's best is 0.3, twice."""
    model = small()
    target = dict(boxes=torch.tensor([square(100), square(100, x=1000)]),
                  labels=torch.tensor([3, 1]))
    anchors = torch.tensor([square(100), square(50), square(49.99), square(40), square(39.99),
                            square(100, x=500), square(30, x=1000), square(30, x=1070),
                            square(29, x=1000)])
    labels, boxes = model.match(target, anchors)
    assert labels.tolist() == [3, 3, -1, -1, 0, 0, 1, 1, 0]
    assert torch.equal(boxes[labels > 0], target["boxes"][[0, 0, 1, 1]])
    labels, _ = model.match(dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long()), anchors)
    assert labels.tolist() == [0] * 9


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def loss_by_loops(targets, logits, offsets, anchors):
    """Sums of the focal loss (arXiv 1708.02002, Eq. 5) and of |offset - wanted|; positives."""
    focal, l1, positives, left_out = 0, 0, 0, 0
    for target, image_logits, image_offsets in zip(targets, logits, offsets):
        objects = [*zip(target["boxes"].tolist(), target["labels"].tolist())]
        overlaps = [[overlap(box, a) for box, _ in objects] for a in anchors.tolist()]
        for n, anchor in enumerate(anchors.tolist()):
            label, best = 0, max(overlaps[n], default=0)
            if best >= 0.5 or any(overlaps[n][j] == max(row[j] for row in overlaps)
                                  for j in range(len(objects))):
                box, label = objects[overlaps[n].index(best)]
                positives += 1
                (cx, w), (cy, h) = ((anchor[i] / 2 + anchor[i + 2] / 2, anchor[i + 2] - anchor[i])
                                    for i in (0, 1))
                wanted = ((box[0] + box[2]) / 2 - cx) / w, ((box[1] + box[3]) / 2 - cy) / h, \
                    math.log((box[2] - box[0]) / w), math.log((box[3] - box[1]) / h)
                l1 = l1 + sum((image_offsets[n, i] - wanted[i]).abs() for i in range(4))
            elif best >= 0.4:
                left_out += 1
                continue
            for k in range(logits.shape[2]):
                p = 1 / (1 + torch.exp(-image_logits[n, k]))
                p, alpha = (p, 0.25) if label == k + 1 else (1 - p, 0.75)
                focal = focal - alpha * (1 - p) ** 2 * torch.log(p)
    return focal, l1, positives, left_out


def random_case(seed=0):
    torch.manual_seed(seed)
    low = torch.rand(40, 2) * 60
    anchors = torch.cat([low, low + 10 + 30 * torch.rand(40, 2)], 1)
    boxes = [anchors[:5] + torch.rand(5, 4), anchors[20:22] + 4, torch.zeros(0, 4)]
    targets = [dict(boxes=b, labels=torch.randint(1, 4, (len(b),))) for b in boxes]
    output = dict(cls_logits=torch.randn(3, 40, 3).requires_grad_(),
                  bbox_regression=torch.randn(3, 40, 4).requires_grad_())
    return targets, output, anchors


def test_losses_and_gradients_are_those_of_loops():
    model, (targets, output, anchors) = small(), random_case()
    losses = model.compute_loss(targets, output, [anchors] * 3)
    focal, l1, positives, left_out = loss_by_loops(targets, *output.values(), anchors)
    assert positives > 7 and left_out > 2
    scale = 3 * (0.9 * 50 + 0.1 * positives / 3)
    assert losses["classification"].item() == pytest.approx(focal.item() / scale, rel=1e-5)
    assert losses["bbox_regression"].item() == pytest.approx(l1.item() / scale, rel=1e-5)
    ours = torch.autograd.grad(sum(losses.values()), [*output.values()])
    wanted = torch.autograd.grad((focal + l1) / scale, [*output.values()])
    for a, b in zip(ours, wanted):
        assert b.abs().max() > 1e-3 and torch.allclose(a, b, atol=1e-7, rtol=1e-4)


def test_the_normaliser_over_three_steps_by_hand():
    """Of 2 images: 3 and 3 positive anchors; none, which counts as one; 17 and 3."""
    model, anchors = small(), torch.tensor([square(100), square(90), square(80), square(9, 9, 200)])
    anchors = torch.cat([anchors, anchors[3:].expand(16, 4)])
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())

    def one(box):
        return dict(boxes=torch.tensor([box]), labels=torch.tensor([1]))

    output = dict(cls_logits=torch.zeros(2, 20, 3), bbox_regression=torch.zeros(2, 20, 4))
    steps = [([one(square(100)), one(square(95, x=5))], anchors),
             ([nothing, nothing], anchors),
             ([one(square(9, 9, 200)), one(square(100))], anchors)]
    means = [0.9 * 50 + 0.1 * (3 + 3) / 2]  # 45.3
    means += [0.9 * means[0] + 0.1 * 1 / 2]  # 40.82
    means += [0.9 * means[1] + 0.1 * (17 + 3) / 2]  # 37.738
    assert means == pytest.approx([45.3, 40.82, 37.738])
    for (targets, places), mean in zip(steps, means):
        losses = model.compute_loss(targets, output, [places] * 2)
        assert model.positives.item() == pytest.approx(mean)
        focal, *_ = loss_by_loops(targets, *output.values(), places)
        assert losses["classification"].item() == pytest.approx(focal.item() / (2 * mean))
    assert losses["bbox_regression"] > 0 and "positives" in model.state_dict()


def gradients(number, world, path):
    """Of two batches of two scenes: this process has its share of them."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store", rank=number, world_size=world)
    model, share = small(6).train(), 2 // world
    scenes = LabelledScenes(4, seed=3)
    data = [training_item(scenes[i]) for i in range(4)]
    for module in model.modules():  # all in float64: batch norm makes rounding errors larger
        module._forward_hooks.clear()
    model, ddp = distribute(model.double(), torch.device("cpu"), sync_batch_norm=True)
    for batch in (data[:2], data[2:]):
        mine = batch[number * share:(number + 1) * share]
        sum(ddp([image.double() / 255 for image, _ in mine],
                [dict(t, boxes=t["boxes"].double()) for _, t in mine]).values()).backward()
    if number == 0:
        torch.save([model.positives, *(p.grad for p in model.parameters())], path / f"{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    gradients(0, 1, tmp_path)
    start_processes(gradients, (2, tmp_path), 2)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert len(one) == len(two) and one[0] == two[0] != 50
    for a, b in zip(one, two):
        assert a.abs().max() > 0 and (a - b).norm() <= 1e-5 * a.norm()


# ------------------------------------------------------------------------------------- detections


def test_detections_are_those_of_loops():
    """Thresholds, the best of each level, suppression by class, and only then the border."""
    model = small()
    model.topk_candidates, model.detections_per_img = 12, 9
    torch.manual_seed(1)
    anchors = [torch.cat([low, low + 30], 1) for low in (torch.rand(20, 2) * 40, torch.rand(8, 2))]
    logits = [torch.randn(1, len(a), 3) - 2 for a in anchors]
    offsets = [torch.randn(1, len(a), 4) / 8 for a in anchors]
    found, = model.postprocess_detections(dict(cls_logits=logits, bbox_regression=offsets),
                                          [anchors], [(50, 60)])
    candidates = []
    for level in range(2):
        scored = [(1 / (1 + math.exp(-logits[level][0, n, k])), n, k)
                  for n in range(len(anchors[level])) for k in range(3)]
        for score, n, k in sorted((s for s in scored if s[0] > 0.05), reverse=True)[:12]:
            (x1, y1, x2, y2), (dx, dy, dw, dh) = (t.tolist() for t in (anchors[level][n],
                                                                       offsets[level][0, n]))
            cx, cy = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            candidates.append((score, k + 1, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]))
    kept = []
    for score, label, box in sorted(candidates, reverse=True):
        if all(label != other or overlap(box, b) <= 0.5 for _, other, b in kept):
            kept.append((score, label, box))
    assert len(candidates) == 24 > len(kept) > 9
    kept = kept[:9]
    assert found["labels"].tolist() == [label for _, label, _ in kept]
    assert found["scores"].tolist() == pytest.approx([score for score, *_ in kept], rel=1e-5)
    inside = torch.tensor([box for *_, box in kept])
    assert (inside < 0).any()
    inside[:, 0::2], inside[:, 1::2] = inside[:, 0::2].clamp(0, 60), inside[:, 1::2].clamp(0, 50)
    assert torch.allclose(found["boxes"], inside, atol=1e-4)


def test_boxes_are_suppressed_as_they_are_beyond_the_border():
    """Two overlap by half a box outside, and are the same inside; a third is outside altogether."""
    model, logits = small(1), torch.tensor([[[2.0], [1.0], [0.0]]])
    anchors = torch.tensor([[-100.0, 0, 40, 40], [-10, 0, 40, 40], [-100, 0, -60, 40]])
    output = dict(cls_logits=[logits], bbox_regression=[torch.zeros(1, 3, 4)])
    found, = model.postprocess_detections(output, [[anchors]], [(50, 50)])
    assert found["boxes"].tolist() == [[0, 0, 40, 40]] * 2 and found["labels"].tolist() == [1, 1]


def test_detections_in_the_images_pixels_with_labels_from_0():
    model = small(max_size=128).eval()
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, 0.0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 64), (90, 50))]
    for image, found in zip(images, detect(model, images, "cpu")):
        assert len(found["boxes"]) == 100 and {*found["labels"].tolist()} == {0, 1, 2}
        height, width = image.shape[1:]
        assert found["boxes"].min() >= 0 and found["boxes"][:, 2].max() <= width + 1e-3
        assert found["boxes"][:, 3].max() <= height + 1e-3
        assert found["scores"].diff().max() <= 0


# ---------------------------------------------------------------------------- weights, runs, memory


def test_pyramids_are_loaded_where_they_fit(tmp_path, capsys):
    path = str(tmp_path / "detector.pt")
    torch.manual_seed(7)
    donor = build_detector("resnet18", 5, "retinanet", **SMALL).state_dict()
    save_checkpoint(path, dict(model=donor))
    state = small(weights=path).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in donor.items() if k.startswith("backbone."))
    assert f"{len([k for k in donor if '.fpn.' in k])} tensors loaded from 'backbone.fpn.*'" in (
        capsys.readouterr().out)
    state = small(weights=path, backbone_only=True).state_dict()
    assert torch.equal(state["backbone.body.conv1.weight"], donor["backbone.body.conv1.weight"])
    name = "backbone.fpn.inner_blocks.0.0.weight"
    assert not torch.equal(state[name], donor[name])

    donor = build_detector("resnet18", 5, "fpn", **SMALL).state_dict()  # from P2 on
    save_checkpoint(path, donor)
    state = small(weights=path).state_dict()
    for level in range(3):
        for block in ("inner_blocks", "layer_blocks"):
            for part in ("0.weight", "1.weight", "1.running_var"):
                assert torch.equal(state[f"backbone.fpn.{block}.{level}.{part}"],
                                   donor[f"backbone.fpn.{block}.{level + 1}.{part}"])
    with pytest.raises(ft.InputError, match="size mismatch.*--backbone-only leaves it out"):
        small(weights=path, fpn_channels=32)


def test_recipes():
    for words, lr, iterations in (
            ("--dataset coco --data x", 0.01, 90000),
            ("--dataset coco --data x --schedule 2x", 0.01, 180000),
            ("--dataset coco --data x --fraction 0.01", 0.01, 12000),  # DetCo, Table 12
            ("--dataset coco --data x --lr 0.3", 0.3, 90000),
            ("--dataset coco --data x --optimizer adam --schedule 1x", 1e-4, 90000),
            ("--dataset coco --data x --small", 0.04, None), ("", 1e-3, 400)):
        args = ft.parse_args(["--detector", "retinanet", *words.split()])
        assert (args.lr, args.iterations, args.detector) == (lr, iterations, "retinanet")
    with pytest.raises(ft.InputError, match="--box-head is of the fpn detector"):
        ft.parse_args(["--detector", "retinanet", "--box-head", "4conv1fc"])


def test_some_steps_reduce_the_loss():
    model = small(6).train()
    scenes = LabelledScenes(4, seed=3)
    data = [training_item(scenes[i]) for i in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    model.positives.fill_(10)
    for _ in range(20):
        parts = model([image / 255 for image, _ in data], [t for _, t in data])
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        losses.append(torch.stack([*parts.values()]).detach())
    assert torch.stack(losses).isfinite().all()
    assert (torch.stack(losses[-5:]).mean(0) < 0.8 * torch.stack(losses[:5]).mean(0)).all()


def test_bfloat16_leaves_losses_and_boxes_in_float32():
    model = small(min_size=[320], max_size=320).train()  # bfloat16 rounds 257 to 256
    targets = [dict(boxes=torch.tensor([[161.3, 130.7, 311.9, 299.1]]), labels=torch.tensor([1]))]
    images, seen, losses = [torch.rand(3, 320, 320)], [], []
    compute_loss = model.compute_loss
    model.compute_loss = lambda *inputs: seen.append(inputs) or compute_loss(*inputs)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            losses.append(torch.stack([*model(images, targets).values()]))
    for (_, output, anchors), loss in zip(seen, losses):
        assert {t.dtype for t in (*output.values(), anchors[0], loss)} == {torch.float32}
    assert torch.equal(seen[0][2][0], seen[1][2][0])
    assert 0 < mse_loss(*losses) < 1e-3


def test_the_bytes_of_a_step_are_those_that_autograd_keeps():
    for classes in (2, 80):
        model = small(classes, fpn_channels=32, min_size=(160,), max_size=160).train()
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
            return x

        target = dict(boxes=torch.tensor([[20.0, 20, 120, 120]]), labels=torch.tensor([1]))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model([torch.rand(3, 160, 160)] * 2, [target] * 2)
        saved = sum(size for pointer, (_, size) in kept.items() if pointer not in own)
        weights = 12 * sum(p.numel() for p in model.parameters())
        assert training_bytes(model, 2, 160, 160, 16) - weights == pytest.approx(saved, rel=0.2)


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, capsys, monkeypatch):
    words = ("--detector retinanet --train-scenes 8 --test-scenes 4 --iterations 5 --batch-size 4 "
             "--fpn-channels 16 --min-size 64 --max-size 64 --workers 0 --log-every 1").split()
    ft.main([*words, "--out", str(tmp_path / "whole")])
    schedule = ft.step_schedule

    def stop(step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *rest)

    monkeypatch.setattr(ft, "step_schedule", stop)
    with pytest.raises(SystemExit) as stopped:
        ft.main([*words, "--out", str(tmp_path / "stopped")])
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    half = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=False)
    assert half["step"] == 3 and half["model"]["positives"] < 45
    ft.main([*words, "--out", str(tmp_path / "stopped")])
    said = capsys.readouterr().out
    assert "resuming after step 3" in said and "resnet18 retinanet from random weights" in said
    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=False)
                      for name in ("whole", "stopped"))
    for saved in (whole, resumed):
        saved["args"].pop("out", None)
    assert_identical(whole, resumed)
    assert whole["model"]["positives"] < half["model"]["positives"]
    checkpoint = str(tmp_path / "whole" / "checkpoint.pt")
    ft.main(["--eval-only", checkpoint])
    ap = [json.loads((tmp_path / name / "ap.json").read_text())
          for name in ("whole", "stopped", "whole/eval")]
    assert ap[0] == ap[1] == ap[2]
    visualize.main(["detections", "--rows", "2", "--score", "0", "--weights", checkpoint,
                    "--out", str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").exists()


def test_mean_and_deviation_of_the_images():
    transform = small(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).transform
    assert transform.image_mean == [0.1, 0.2, 0.3] and transform.image_std == [0.4, 0.5, 0.6]
