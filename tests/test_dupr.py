"""DUPR's overlap, equations and heads.  What is true of every method is in test_methods.py."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import column, coordinates
from test_detco import Plain, assert_gradients, literal
from torchvision.ops import roi_align

import common
import dupr
from common import View
from plumbing.weights import load_backbone, load_checkpoint

ALPHA = (0.1, 0.4, 0.7, 1.0)
BOXES_Q = [[0, 0, 60, 40], [10, 5, 50, 45], [0, 0, 20, 20], [30, 30, 90, 80]]
BOXES_K = [[20, 10, 80, 50], [10, 5, 50, 45], [20, 0, 40, 20], [0, 10, 50, 60]]  # the third: apart


def small(**options):
    return dupr.DUPR(**{**dict(arch="resnet18", dim=16, queue_size=24, m=0.9, tau=0.2, bn_groups=2,
                               roi_size=(3, 2, 3, 2), patch_keys=6), **options})


def batch(number=4, apart=()):
    """Two views of 64 pixels.  The third of every four pairs does not overlap, nor do those of the
    images ``apart``."""
    views = []
    for boxes, flips in ((BOXES_Q, [0, 1, 0, 1]), (BOXES_K, [1, 1, 1, 0])):
        by = number // 4
        views.append(View(torch.randn(number, 3, 64, 64), torch.tensor(boxes * by).float(),
                          torch.tensor(flips * by).bool()))
    views[1].box[[*apart]] += 1000
    return views


# ------------------------------------------------------------------------------ boxes, by hand


def test_intersection_by_hand():
    box, valid = dupr.intersect(torch.tensor(BOXES_Q).float(), torch.tensor(BOXES_K).float())
    assert valid.tolist() == [True, True, False, True]  # the third share an edge, but no area
    assert box[valid].tolist() == [[20, 10, 60, 40], [10, 5, 50, 45], [30, 30, 50, 60]]
    far = torch.tensor([[0., 0, 5, 5]]), torch.tensor([[9., 0, 12, 5]])
    assert not dupr.intersect(*far)[1].any() and not dupr.intersect(*far[::-1])[1].any()
    corner = torch.tensor([[5., 5, 8, 8]])
    assert not dupr.intersect(far[0], corner)[1].any()


def test_region_similarity_is_the_mean_over_positions():
    q, k = torch.randn(2, 3, 5, 4, 4)
    expected = []
    for a, b in zip(q, k):
        cosines = [torch.dot(a[:, i, j], b[:, i, j]) / (a[:, i, j].norm() * b[:, i, j].norm())
                   for i in range(4) for j in range(4)]
        expected.append(sum(cosines) / 16)
    torch.testing.assert_close(dupr.region_similarity(q, k), torch.stack(expected))
    torch.testing.assert_close(dupr.region_similarity(q, 3 * q), torch.ones(3))


# -------------------------------------------------- a position is the same place in both views


@pytest.mark.parametrize("width, height, size, roi_size", [
    (250, 200, 224, 7), (250, 200, 224, 14), (120, 240, 96, 4), (200, 90, 160, 1), (64, 64, 64, 3)])
def test_a_position_reads_the_same_place_in_both_views(width, height, size, roi_size):
    torch.manual_seed(0)
    args = dupr.parse_args(f"--data x --image-size {size}".split())
    drawn = [dupr.cut_views(coordinates(width, height), args) for _ in range(200)]
    view_q, view_k = torch.utils.data.default_collate(drawn)
    where_q, where_k, valid = dupr.overlap(view_q, view_k)
    assert 150 < valid.sum() and len({*view_q.flipped.tolist()}) == 2
    assert any(a != b for a, b in zip(view_q.flipped.tolist(), view_k.flipped.tolist()))
    read_q, read_k = (dupr.align(v.pixels.float(), *where, roi_size, size)
                      for v, where in ((view_q, where_q), (view_k, where_k)))
    box, _ = dupr.intersect(view_q.box, view_k.box)
    for b in valid.nonzero().flatten().tolist():
        x1, y1, x2, y2 = box[b].tolist()
        centres = (torch.arange(roi_size) + 0.5) / roi_size
        x, y = x1 + centres * (x2 - x1) - 0.5, y1 + centres * (y2 - y1) - 0.5
        for read, view in ((read_q, view_q), (read_k, view_k)):
            # what a resized crop repeats at its border, and the rounding to whole pixels, is lost
            shown = (view.box[b, 2:] - view.box[b, :2]).max() / size
            slack = 1.0 + shown + 0.04 * max(x2 - x1, y2 - y1) / roi_size
            assert (read[b, 0] - x).abs().max() < slack
            assert (read[b, 1] - y[:, None]).abs().max() < slack
        if roi_size > 1 and x2 - x1 > 4 * slack * roi_size:
            assert (read_q[b, 0].diff(dim=1) > 0).all() and (read_k[b, 0].diff(dim=1) > 0).all()
    assert (read_q - read_k)[valid][:, :2].abs().mean() < 0.4


def test_align_reads_a_stage_as_the_view_that_it_is_of():
    """A quarter of a 4 x 4 map, flipped or not: the cells under it."""
    features = torch.arange(16.).view(1, 1, 4, 4).repeat(2, 1, 1, 1)
    roi = torch.tensor([[0., 32, 32, 64]] * 2)  # of views of 64 pixels
    regions = dupr.align(features, roi, torch.tensor([False, True]), 2, 64)
    assert regions[0, 0].tolist() == [[8, 9], [12, 13]]
    assert regions[1, 0].tolist() == [[9, 8], [13, 12]]


def test_rand_augment_moves_nothing():
    torch.manual_seed(0)
    augment, image = dupr.ColourAugment(num_ops=1, magnitude=30), torch.zeros(3, 32, 32)
    image[:, 8:12, 8:20] = torch.tensor([0.3, 0.6, 0.9])[:, None, None]
    image, seen = (255 * image).to(torch.uint8), set()
    smooth = torch.nn.functional.max_pool2d(image[None].float(), 3, 1, 1)[0] > 0
    for _ in range(200):
        out = augment(image)
        assert out.dtype == torch.uint8
        inside, outside = out[:, 9:11, 9:19], out[:, ~smooth.any(0)]  # sharpening sees neighbours
        assert (inside == inside[:, :1, :1]).all() and (outside == outside[:, :1]).all()
        seen.add(tuple(out.flatten().tolist()))
    assert len(seen) > 6
    plain, changed = [], []
    for views, more in ((plain, []), (changed, ["--rand-augment"])):
        args = dupr.parse_args(["--data", "x", "--image-size", "32", *more])
        torch.manual_seed(0)
        views.extend(dupr.cut_views(torch.randint(256, (3, 60, 60), dtype=torch.uint8), args))
    assert all(torch.equal(a.box, b.box) and a.flipped == b.flipped
               for a, b in zip(plain, changed))
    assert not any(torch.equal(a.pixels, b.pixels) for a, b in zip(plain, changed))
    names = dupr.ColourAugment()._augmentation_space(31, (32, 32))
    assert {*names} == {"Identity", "Brightness", "Color", "Contrast", "Sharpness", "Posterize",
                        "Solarize", "AutoContrast", "Equalize"}


# ------------------------------------------------------------------ the losses, from the equations


class PlainWithBoxes(Plain):
    """With RoI Align of each image apart."""

    def embed(self, view, boxes):
        """boxes: for each image its overlap in the source's pixels, or None.
        -> for each level the (B,) image embeddings; for Res4, Res5 those of positions, by image."""
        images, patches = [[] for _ in range(4)], [[], []]
        for number, part in enumerate(view.pixels.chunk(self.groups)):
            stages = self.stages(part)
            for b in range(len(part)):
                i = number * len(part) + b
                for level, head in enumerate(self.encoder.image_heads):
                    images[level].append(self.head(head, stages[level][b].mean((1, 2))))
                for j, (level, head) in enumerate(zip((2, 3), self.encoder.patch_heads)):
                    patches[j].append(self.positions(stages[level][b:b + 1], view, i, boxes[i],
                                                     self.encoder.roi_size[level], head))
        return images, patches

    def positions(self, features, view, i, box, size, head):
        if box is None:
            return None
        x1, y1, x2, y2 = view.box[i].tolist()
        left, right = ((x - x1) / (x2 - x1) * 64 for x in (box[0], box[2]))
        top, bottom = ((y - y1) / (y2 - y1) * 64 for y in (box[1], box[3]))
        if view.flipped[i]:
            left, right = 64 - right, 64 - left
        region = roi_align(features, torch.tensor([[0, left, top, right, bottom]]), (size, size),
                           features.shape[-1] / 64, aligned=True)[0]
        rows = []
        for p in range(size * size):
            row, place = divmod(p, size)
            place = size - 1 - place if view.flipped[i] else place
            rows.append(self.head(head, region[:, row, place]))
        return rows


def test_patch_loss_is_a_scaled_mean_over_positions():
    torch.manual_seed(0)
    q, k, negatives = F.normalize(torch.randn(3, 6, 8), dim=2)
    expected = 0.5 * literal(q, k, negatives, 0.2)
    torch.testing.assert_close(dupr.patch_loss(q, k, negatives, 0.2, 0.5), expected)
    assert dupr.patch_loss(q[:0], k[:0], negatives, 0.2, 0.0) == 0


def literal_losses(model, encoder_q, encoder_k, view_q, view_k, order):
    boxes = []
    for q, k in zip(view_q.box.tolist(), view_k.box.tolist()):  # Eq. (4)
        x1, y1, x2, y2 = max(q[0], k[0]), max(q[1], k[1]), min(q[2], k[2]), min(q[3], k[3])
        boxes.append((x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None)
    v_1, r_1 = encoder_q.embed(view_q, boxes)
    with torch.no_grad():
        moved = View(*(each[order] for each in view_k))
        v_2, r_2 = encoder_k.embed(moved, [boxes[i] for i in order.tolist()])
    back = [order.tolist().index(b) for b in range(len(order))]
    v_2, r_2 = ([[level[i] for i in back] for level in levels] for levels in (v_2, r_2))
    image = [literal(v_1[level], v_2[level], model.queues[level].keys, model.tau)
             for level in range(4)]
    r_q, r_k = ([[position for positions in level if positions is not None
                  for position in positions] for level in levels] for levels in (r_1, r_2))
    patch = [literal(r_q[level], r_k[level], model.queues[4 + level].keys, model.tau)
             for level in range(2)]
    return image, patch, v_2, r_2


def test_every_loss_equals_the_equations():
    torch.manual_seed(0)
    model, (view_q, view_k) = small(), batch()
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.add_(0.02 * torch.randn_like(p))
    encoder_q, encoder_k = (PlainWithBoxes(encoder, 2)
                            for encoder in (model.encoder_q, model.encoder_k))
    torch.manual_seed(5)
    order = torch.randperm(4)
    image, patch, v_2, r_2 = literal_losses(model, encoder_q, encoder_k, view_q, view_k, order)
    total = sum(w * t for w, t in zip([*ALPHA, 1, 1], [*image, *patch]))
    torch.manual_seed(5)
    loss, keys, parts = model(view_q, view_k)
    for name, term in zip(("image_res2", "image_res3", "image_res4", "image_res5", "patch_res4",
                           "patch_res5"), [*image, *patch]):
        assert parts[name].item() == pytest.approx(term.item(), abs=1e-4), name
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)
    assert parts["loss_chance"].item() == pytest.approx(4.2 * math.log(25))
    assert parts["patch_chance"].item() == parts["image_chance"].item() == pytest.approx(
        math.log(25))
    assert_gradients(total, encoder_q, loss, model)
    for found, rows in zip(keys, v_2):
        torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=1e-4)
    for found, of_images in zip(keys[4:], r_2):  # six different keys of valid pairs
        everyone = torch.stack([k for rows in of_images if rows is not None for k in rows])
        distances = (found[:, None] - everyone).norm(dim=2)
        assert found.shape == (6, 16) and distances.amin(1).max() < 1e-4
        assert len(distances.argmin(1).unique()) == 6
    for i, term in enumerate([*image, *patch]):  # and each term alone
        weights = [[float(i == j) for j in range(4)], [0.0, 0.0, float(i == 4), float(i == 5)]]
        model.losses = [("image", j, w) for j, w in enumerate(weights[0])]
        model.losses += [("patch", j, weights[1][j]) for j in (2, 3)]
        torch.manual_seed(5)
        assert_gradients(term, encoder_q, model(view_q, view_k)[0], model)


def test_pairs_without_overlap_have_no_patch_loss():
    torch.manual_seed(0)
    model, (view_q, view_k) = small(bn_groups=1), batch()
    torch.manual_seed(1)
    _, _, before = model(view_q, view_k)
    box = view_k.box.clone()
    box[2] = torch.tensor([1000., 1000, 1010, 1010])  # still apart, elsewhere
    torch.manual_seed(1)
    _, _, after = model(view_q, view_k._replace(box=box))
    assert before["patch_res5"] == after["patch_res5"] > 0
    apart = view_k._replace(box=view_k.box + 1000)
    loss, keys, parts = model(view_q, apart)
    loss.backward()
    assert parts["patch_res4"] == parts["patch_res5"] == 0 < parts["image_res5"]
    assert all(p.grad is not None and not p.grad.any()
               for p in model.encoder_q.patch_heads.parameters())  # DDP wants all of them
    assert [len(k) for k in keys] == [4, 4, 4, 4, 0, 0]
    assert all(torch.isfinite(value) for value in parts.values())
    old = model.queues[4].keys.clone()
    for queue, k in zip(model.queues, keys):
        queue.push(k)
    assert torch.equal(old, model.queues[4].keys) and model.queues[0].oldest == 4


def test_pushed_patch_keys_come_from_anywhere_in_pairs_that_overlap():
    torch.manual_seed(0)
    seen = set()
    k = [torch.arange(5 * 4.0).view(5, 4, 1)]  # each position its own key
    for _ in range(200):
        (drawn,) = dupr.choose_keys(k, torch.tensor([True, False, True, True, False]), 6)
        assert len({*drawn.flatten().tolist()}) == 6
        seen |= {*drawn.flatten().tolist()}
    assert seen == {*range(0, 4), *range(8, 16)}


def test_chunks_do_not_change_the_patch_loss(monkeypatch):
    torch.manual_seed(0)
    model, views = small(), batch()
    found = []
    for chunk in (None, 5):
        monkeypatch.setattr(dupr, "info_nce", partial(common.info_nce, chunk=chunk))
        torch.manual_seed(1)
        loss, _, _ = model(*views)
        model.zero_grad()
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.encoder_q.parameters())])
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-4 * a.norm()


# -------------------------------------------------------------------------------- sizes, ablations


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = dupr.DUPR()
    assert [q.keys.shape for q in model.queues] == [(65536, 128)] * 6

    def count(module):
        return sum(p.numel() for p in module.parameters())

    encoder = model.encoder_q
    numbers = [count(m) for m in (encoder.stages, encoder.image_heads, encoder.patch_heads)]
    assert numbers == [23_508_032, 8_921_600, (1024 + 2048) * 2048 + 2 * (2048 + 2048 * 128 + 128)]
    assert [h[0].weight.shape for h in encoder.patch_heads] == [(2048, 1024, 1, 1),
                                                                (2048, 2048, 1, 1)]
    assert encoder.roi_size[2:] == (14, 7)
    assert model.losses[4:] == [("patch", 2, 1), ("patch", 3, 1)]
    assert tuple(weight for _, _, weight in model.losses[:4]) == ALPHA


def test_a_level_of_weight_0_costs_nothing():
    torch.manual_seed(0)
    model = small(alpha=(0, 0.5, 0, 0), beta=(1, 0, 0, 0))
    assert len(model.queues) == 2
    assert len(model.encoder_q.image_heads) == len(model.encoder_q.patch_heads) == 1
    for encoder in (model.encoder_q, model.encoder_k):
        for layer in (encoder.stages.layer3, encoder.stages.layer4):
            layer.forward = None  # calling it would fail
    loss, keys, parts = model(*batch())
    loss.backward()
    assert {n for n in parts if "res" in n} == {"image_res3", "patch_res2"}
    assert [len(k) for k in keys] == [4, 6]
    assert {n for n, p in model.encoder_q.named_parameters() if p.grad is not None} == \
        {n for n, p in model.encoder_q.named_parameters() if p.requires_grad}
    patches = small(alpha=(0, 0, 0, 0), beta=(0, 0, 0, 1))  # Table VII (c)
    loss, _, parts = patches(*batch())
    assert loss == parts["patch_res5"] and "image_chance" not in parts


def test_tau_of_the_main_experiments():
    assert dupr.parse_args(["--data", "x", "--rand-augment"]).tau == 0.15
    assert dupr.parse_args(["--data", "x", "--rand-augment", "--tau", "0.3"]).tau == 0.3


def test_a_run_with_other_flags(tmp_path):
    flags = ("--scenes 40 --epochs 2 --batch-size 16 --image-size 32 --queue-size 40 --bn-groups 2 "
             "--workers 0 --lr 0.05 --log-every 1 --dim 16 --roi-size 2 2 3 1 --alpha 0 0 0 2 "
             "--beta 0 1 1 0 --rand-augment --patch-keys 5")
    dupr.main([*flags.split(), "--out", str(tmp_path)])
    total = [w * float(column(tmp_path, n)[0])
             for n, w in (("image_res5", 2), ("patch_res3", 1), ("patch_res4", 1))]
    assert float(column(tmp_path, "loss")[0]) == pytest.approx(sum(total), rel=1e-5)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"] == "dupr" and state["args"]["tau"] == 0.15
    assert state["model"]["queues.0.oldest"] == (3 * 16 + 4 * 16) % 40
    assert state["model"]["queues.1.oldest"] == (3 * 16 + 4 * 5) % 40
    load_backbone(common.resnet_stages("resnet18"), tmp_path / "backbone.pt")
