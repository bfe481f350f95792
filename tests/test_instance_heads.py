"""Mask and Keypoint R-CNN's targets, losses and outputs against loops, and in the detectors."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detection.data import LabelledScenes, training_item
from detection.instance_heads import crop_masks, find_keypoints, mask_loss, paste_masks
from detection.masks import Unpacked, to_mask
from detection.models import build_detector, detect

SMALL = dict(fpn_channels=16, min_size=[96], max_size=96, anchor_size=8, rois=16)


def bilinear(values, x, y):
    """An array (H, W) at (x, y), where its cell [i, j] is in the middle of a unit square from (j,
    i), and outside of which there is 0."""
    total, left, top = 0.0, math.floor(x - 0.5), math.floor(y - 0.5)
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < values.shape[0] and 0 <= j < values.shape[1]:
                total += (1 - abs(x - 0.5 - j)) * (1 - abs(y - 0.5 - i)) * float(values[i, j])
    return total


def test_crops_of_masks_are_means_of_bilinear_samples():
    """RoI Align: in each cell a regular grid of samples, about one to a pixel."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((3, 5, 6)) < 0.5).repeat_interleave(4, 1).repeat_interleave(
        4, 2)  # (3, 20, 24)
    corner = torch.from_numpy(rng.uniform(1, 8, (20, 2))).float()
    boxes = torch.cat([corner, corner + torch.from_numpy(rng.uniform(1, 11, (20, 2))).float()], 1)
    objects = torch.arange(20) % 3
    found = crop_masks(masks, boxes, objects, 7)
    assert found.shape == (20, 7, 7) and found.dtype == torch.bool and found.any()
    compared = 0
    for n, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        w, h = (x2 - x1) / 7, (y2 - y1) / 7
        across, down = math.ceil(w), math.ceil(h)
        for i in range(7):
            for j in range(7):
                share = np.mean([bilinear(masks[objects[n]], x1 + w * (j + (b + 0.5) / across),
                                          y1 + h * (i + (a + 0.5) / down))
                                 for a in range(down) for b in range(across)])
                if abs(share - 0.5) > 1e-4:
                    assert found[n, i, j] == (share > 0.5), (n, i, j)
                    compared += 1
    assert compared > 900
    # by hand: two cells of two pixels each; half a cell is inside
    mask = torch.tensor([[[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]]]).bool()
    whole, none = torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)
    assert crop_masks(mask, whole, torch.tensor([0]), 2).tolist() == [[[False, True]] * 2]
    assert crop_masks(mask[:0], none, torch.zeros(0).long(), 2).shape == (0, 2, 2)


def test_the_mask_loss_by_hand():
    """The mean over cells of -t log s(x) - (1 - t) log(1 - s(x)) of the own class's logits x, whose
    gradient is (s(x) - t) over the number of cells; that of others is 0."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    labels, targets = torch.tensor([2, 1, 1, 2]), torch.rand(4, 5, 5) < 0.4
    loss, gradient = 0.0, torch.zeros_like(logits)
    for n in range(4):
        for i in range(5):
            for j in range(5):
                s = 1 / (1 + math.exp(-logits[n, labels[n], i, j].item()))
                t = int(targets[n, i, j])
                loss -= (t * math.log(s) + (1 - t) * math.log(1 - s)) / 100
                gradient[n, labels[n], i, j] = (s - t) / 100
    found = mask_loss(logits, labels, targets)
    assert found.item() == pytest.approx(loss)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], gradient)
    nothing = mask_loss(logits[:0], labels[:0], targets[:0])
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_masks_are_pasted_as_detectron2_pastes_them():
    """A pixel belongs to a mask if at its middle, in the box's cells, its probability is a half."""
    torch.manual_seed(0)
    rough = torch.rand(6, 1, 4, 4)
    p = nn.functional.interpolate(rough, (14, 14), mode="bilinear")[:, 0]
    boxes = torch.tensor([[3.2, 4.7, 20.1, 17.9], [0, 0, 30, 24], [25.5, 20.5, 30, 24],
                          [10, 10, 11.2, 10.9], [0, 5.5, 4, 24], [-3, -2, 12, 9]])
    compared = 0
    for values, box, mask in zip(p, boxes, paste_masks(p, boxes, 24, 30), strict=True):
        x1, y1, x2, y2 = box.tolist()
        assert mask.shape == (24, 30) and mask.dtype == torch.bool
        for i in range(24):
            for j in range(30):
                x, y = (j + 0.5 - x1) / (x2 - x1) * 14, (i + 0.5 - y1) / (y2 - y1) * 14
                probability = bilinear(values, x, y)
                if abs(probability - 0.5) > 1e-5:
                    assert mask[i, j] == (probability > 0.5), (box, i, j)
                    compared += 1
    assert compared > 6 * 700
    # torchvision's moves boxes to whole pixels: its masks are others, by some pixels at the border
    theirs = paste_masks_in_image(p[:, None], boxes, (24, 30))[:, 0] >= 0.5
    ours = torch.stack([*paste_masks(p, boxes, 24, 30)])
    both, either = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
    assert (both[:2] / either[:2] > 0.7).all() and (ours != theirs).any()
    assert not [*paste_masks(p[:0], boxes[:0], 24, 30)]


@pytest.mark.parametrize("detector, side", [("fpn", 28), ("c4", 14)])
def test_masks_from_the_features_to_the_loss(detector, side, monkeypatch):
    """The mask head sees the sampled RoIs that are objects: of the FPN by a RoI Align of its own,
    of C4 what the box head sees after Res5 and the norm behind it.  Targets are cropped from masks
    that are not resized with their image, at boxes in their pixels."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, detector, **{**SMALL, "min_size": [64]}, masks=True)
    heads, seen = model.train().roi_heads, {}
    data = LabelledScenes(2, seed=3, masks=True)
    items = [training_item(data[i]) for i in range(2)]

    def keep(name):
        def hook(_module, inputs, output):
            seen.setdefault(name, []).append((inputs, output))
        return hook

    for name, part in dict(pool=heads.object_pool or heads.box_head.norm,
                           predictor=heads.mask_predictor, box=heads.box_predictor).items():
        part.register_forward_hook(keep(name))
    select = heads.select_training_samples
    heads.select_training_samples = lambda *inputs: seen.setdefault("samples", select(*inputs))
    cropped = []

    def crop(masks, boxes, objects, side):
        cropped.append((masks, boxes, objects, side))
        return crop_masks(masks, boxes, objects, side)

    monkeypatch.setattr("detection.models.crop_masks", crop)
    losses = model([image / 255 for image, _ in items], [target for _, target in items])
    proposals, objects, labels, _ = seen["samples"]
    positive = [label > 0 for label in labels]
    (regions,), logits = seen["predictor"][0]
    pooled = seen["pool"][0][1]
    if detector == "c4":
        torch.testing.assert_close(regions, pooled[torch.cat(positive)])
        torch.testing.assert_close(seen["box"][0][0][0], pooled.mean((2, 3)))
        assert len(seen["pool"]) == 1
    else:
        assert [len(boxes) for boxes in seen["pool"][0][0][1]] == [int(p.sum()) for p in positive]
        assert pooled.shape[1:] == (16, 14, 14)
        torch.testing.assert_close(regions, heads.mask_head(pooled))
    assert logits.shape == (int(torch.cat(positive).sum()), 7, side, side)
    for i, (masks, boxes, numbers, cells) in enumerate(cropped):
        assert masks.shape == items[i][1]["bitmasks"].shape == (len(masks), 96, 96)
        torch.testing.assert_close(boxes, proposals[i][positive[i]] * 1.5)  # 64 pixels -> 96
        assert torch.equal(numbers, objects[i][positive[i]]) and cells == side
    targets = torch.cat([crop_masks(*crop) for crop in cropped])
    expected = mask_loss(logits, torch.cat(labels)[torch.cat(positive)], targets)
    torch.testing.assert_close(losses["loss_mask"], expected)
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), rel=0.05)  # of logits near 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for part in (heads.mask_head, heads.mask_predictor) if part
               for p in part.parameters())


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_detections_have_masks_of_their_class(detector):
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, detector, **SMALL, masks=True).eval()
    heads = model.roi_heads
    heads.score_thresh = 0.0
    with torch.no_grad():  # class k is everywhere in its box if k is even, else nowhere
        heads.mask_predictor.mask_fcn_logits.bias[1::2] -= 9
        heads.mask_predictor.mask_fcn_logits.bias[0::2] += 9
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((60, 80), (90, 70))]
    pool, seen = heads.object_pool or heads.box_head.norm, []
    if detector == "c4":
        pool.running_mean += 1  # Res5's output is another one
    for part in (pool, heads.mask_predictor):
        part.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    packed = detect(model, images, "cpu")
    (_, pooled), ((regions,), _) = seen[-2:]
    expected = heads.mask_head(pooled) if detector == "fpn" else pooled
    torch.testing.assert_close(regions, expected)
    assert all(len(found["runs"]) == len(found["boxes"]) > 5 for found in packed)
    for found, image in zip(Unpacked(packed), images):
        masks = found["masks"]
        assert masks.shape == (len(found["boxes"]), *image.shape[1:]) and masks.dtype == bool
        for mask, runs, label, (x1, y1, x2, y2) in zip(masks, found["runs"], found["labels"],
                                                       found["boxes"].tolist()):
            within = np.zeros_like(mask)
            within[round(y1):round(y2), round(x1):round(x2)] = True
            if label % 2:  # found labels count from 0
                assert not (mask & ~within).any() and (within & ~mask).sum() <= 24  # at the corners
            else:
                assert not mask.any()
            same = to_mask(dict(size=[*mask.shape], counts=runs.tolist()), *mask.shape)
            assert (same == mask).all()
    heads.score_thresh = 1.0
    found = Unpacked(detect(model, images, "cpu"))[0]
    assert found["masks"].shape == (0, 60, 80)


def test_the_keypoint_loss_against_a_loop():
    """Cross entropy of the cell that holds a keypoint among the 56 x 56 of its RoI: the mean over
    those that are labelled and in their RoI; keypoints are resized with their image."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, **{**SMALL, "min_size": [64]}, keypoints=True).train()
    heads, seen = model.roi_heads, {}
    data, items = LabelledScenes(4, seed=3), []
    for i in range(4):  # with keypoints in and near the box, a third of them not labelled
        image, target = training_item(data[i])
        low, high = target["boxes"][:, None].split(2, dim=2)
        places = low + (high - low) * (1.4 * torch.rand(len(low), 17, 2) - 0.2)
        visible = torch.randint(0, 3, (len(low), 17, 1))
        items.append((image, dict(target, keypoints=torch.cat([places, visible], dim=2))))
    select = heads.select_training_samples
    heads.select_training_samples = lambda *inputs: seen.setdefault("samples", select(*inputs))
    heads.keypoint_predictor.register_forward_hook(
        lambda _module, _inputs, output: seen.update(maps=output))
    losses = model([image / 255 for image, _ in items], [target for _, target in items])
    proposals, objects, labels, _ = seen["samples"]
    maps, n, total, counted, outside = seen["maps"].detach().double(), 0, 0.0, 0, 0
    assert maps.shape[1:] == (17, 56, 56)
    for i, (_, target) in enumerate(items):
        for roi in range(len(labels[i])):
            if labels[i][roi] == 0:
                continue
            x1, y1, x2, y2 = proposals[i][roi].tolist()
            for k, (x, y, visible) in enumerate(target["keypoints"][objects[i][roi]].tolist()):
                column = math.floor((x * 64 / 96 - x1) / (x2 - x1) * 56)
                row = math.floor((y * 64 / 96 - y1) / (y2 - y1) * 56)
                if visible and 0 <= row < 56 and 0 <= column < 56:
                    total += (maps[n, k].exp().sum().log() - maps[n, k, row, column]).item()
                    counted += 1
                outside += visible and not (0 <= row < 56 and 0 <= column < 56)
            n += 1
    assert n == len(maps) and counted > 40 and outside > 5
    assert losses["loss_keypoint"].item() == pytest.approx(total / counted, rel=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad.any() for part in (heads.keypoint_head, heads.keypoint_predictor)
               for p in part.parameters())


def test_keypoints_are_where_their_maps_are_highest():
    """In a box of 56 x 56 pixels a cell is a pixel, and its middle is told; in any other the best
    place is looked for in its pixels."""
    torch.manual_seed(0)
    maps = torch.randn(3, 17, 56, 56)
    boxes = [torch.tensor([[10.0, 20, 66, 76]]), torch.tensor([[0.5, 0.5, 112.5, 28.5]] * 2)]
    one, two = find_keypoints(maps, boxes)
    assert one.shape == (1, 17, 3) and two.shape == (2, 17, 3)
    for k in range(17):
        cell = int(maps[0, k].argmax())
        share = math.exp(maps[0, k].max()) / maps[0, k].double().exp().sum().item()
        assert one[0, k].tolist() == pytest.approx([10.5 + cell % 56, 20.5 + cell // 56, share])
    peaks = torch.full((2, 17, 56, 56), -9.0)
    rows, columns = torch.randint(2, 54, (2, 17)), torch.randint(2, 54, (2, 17))
    for n in range(2):
        for k in range(17):
            peaks[n, k, rows[n, k], columns[n, k]] = 9
    _, found = find_keypoints(torch.cat([maps[:1], peaks]), boxes)
    assert ((found[..., 0] - 0.5 - 2 * (columns + 0.5)).abs() <= 1).all()
    assert ((found[..., 1] - 0.5 - (rows + 0.5) / 2).abs() <= 0.5).all()


def test_detections_have_keypoints_that_count_pixels_from_0():
    """They are as COCO's annotations, of the image as it is: 0.5 less than the network's."""
    torch.manual_seed(0)
    model = build_detector("resnet18", 1, **{**SMALL, "min_size": [48]}, keypoints=True).eval()
    model.roi_heads.score_thresh, image = 0.0, torch.randint(0, 256, (3, 96, 96)).byte()
    found, = detect(model, [image], "cpu")
    inner = model([image / 255])[0]["keypoints"]  # resized to 96 pixels, by torchvision
    assert found["keypoints"].shape == (len(found["boxes"]), 17, 3) and len(found["boxes"]) > 5
    torch.testing.assert_close(found["keypoints"][..., :2] + 0.5, inner[..., :2])
    low, high = found["boxes"][:, None].split(2, dim=2)
    at = found["keypoints"][..., :2] + 0.5
    assert ((low - 1 < at) & (at < high + 1)).all()


def test_masks_and_keypoints_of_no_object():
    """Of an image without boxes, with --keep-empty: 0, and no parameter without a gradient."""
    torch.manual_seed(0)
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                 bitmasks=torch.zeros(0, 96, 96).bool(), keypoints=torch.zeros(0, 17, 3))
    for detector in ("fpn", "c4"):
        model = build_detector("resnet18", 6, detector, **SMALL, masks=True,
                               keypoints=detector == "fpn").train()
        losses = model([torch.rand(3, 96, 96)] * 2, [empty] * 2)
        assert losses["loss_mask"] == 0 == losses.get("loss_keypoint", 0)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters())
