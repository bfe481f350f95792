"""DetCo's equations, views and heads.  What is true of every method is in test_methods.py."""
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import column, coordinates

import common
import detco
from plumbing.images import two_views
from plumbing.weights import load_backbone, load_checkpoint

WEIGHTS = (0.1, 0.4, 0.7, 1.0)


def small(**options):
    return detco.DetCo(**{**dict(arch="resnet18", dim=16, queue_size=24, m=0.9, tau=0.2,
                                 bn_groups=2), **options})


def batch(number=4):
    """view_q, view_k, patches_q, patches_k."""
    return [*torch.randn(2, number, 3, 32, 32), *torch.randn(2, number, 9, 3, 16, 16)]


class Plain:
    """An Encoder's weights in torchvision's own ResNet-18 with ordinary batch norm, which sees the
    images of each of ``groups`` GPUs apart; the heads are applied by hand."""

    def __init__(self, encoder, groups):
        self.encoder, self.groups = copy.deepcopy(encoder), groups
        self.resnet = torchvision.models.resnet18()
        self.resnet.load_state_dict(encoder.stages.state_dict(), strict=False)

    def named_parameters(self):
        """Under the names that the Encoder has for them."""
        yield from ((f"stages.{n}", p) for n, p in self.resnet.named_parameters() if "fc" not in n)
        yield from ((n, p) for n, p in self.encoder.named_parameters() if "stages." not in n)

    def stages(self, x):
        r = self.resnet
        f2 = r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x)))))
        f3 = r.layer2(f2)
        f4 = r.layer3(f3)
        return [f2, f3, f4, r.layer4(f4)]

    @staticmethod
    def head(head, vector):
        first, second = (module for module in head if hasattr(module, "weight"))
        h = (first.weight.flatten(1) @ vector + first.bias).clamp(min=0)
        z = second.weight.flatten(1) @ h + second.bias
        return z / z.square().sum().sqrt()

    def images(self, x):
        """-> for each level, the images' embeddings."""
        rows = []
        for part in x.chunk(self.groups):
            features = self.stages(part)
            rows += [[self.head(head, f[b].mean((1, 2)))
                      for head, f in zip(self.encoder.global_heads, features)]
                     for b in range(len(part))]
        return [*zip(*rows)]

    def patches(self, x):
        """-> for each level, the embeddings of the images' nine patches."""
        rows = []
        for part in x.chunk(self.groups):
            features = self.stages(torch.stack([p for image in part for p in image]))
            rows += [[self.head(head, torch.cat([f[9 * b + p].mean((1, 2)) for p in range(9)]))
                      for head, f in zip(self.encoder.local_heads, features)]
                     for b in range(len(part))]
        return [*zip(*rows)]


def literal(queries, keys, negatives, tau):
    """-log of the share of the positive among K + 1, mean over the queries: Eq. (2), (4), (5); also
    DUPR's Eq. (7), (8)."""
    losses = []
    for q, k in zip(queries, keys):
        positive = torch.exp(torch.dot(q, k) / tau)
        everyone = positive
        for n in negatives:
            everyone = everyone + torch.exp(torch.dot(q, n) / tau)
        losses.append(-torch.log(positive / everyone))
    return sum(losses) / len(losses)


def assert_gradients(expected, plain, loss, model):
    """The query encoder has the gradients of a plain one's loss, the key encoder none."""
    names, parameters = zip(*plain.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(expected, parameters, retain_graph=True,
                                                    allow_unused=True)))
    for p in model.parameters():
        p.grad = None
    loss.backward()
    assert all(p.grad is None for p in model.encoder_k.parameters())
    for name, p in model.encoder_q.named_parameters():
        found, wanted = (torch.zeros_like(p) if g is None else g for g in (p.grad, gradients[name]))
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7, name


def literal_terms(model, encoder_q, encoder_k, x, order_g, order_l):
    """For each level: gg, ll, gl, with the keys shuffled in these orders."""
    def keys(embed, x, order):
        with torch.no_grad():
            rows = embed(x[order])
        return [[level[order.tolist().index(b)] for b in range(len(x))] for level in rows]

    view_q, view_k, patches_q, patches_k = x
    q_g, q_l = encoder_q.images(view_q), encoder_q.patches(patches_q)
    k_g = keys(encoder_k.images, view_k, order_g)
    k_l = keys(encoder_k.patches, patches_k, order_l)
    queue_g = [model.queues[i].keys for i in range(4)]
    queue_l = [model.queues[4 + i].keys for i in range(4)]
    return k_g, k_l, [dict(gg=literal(q_g[i], k_g[i], queue_g[i], model.tau),
                           ll=literal(q_l[i], k_l[i], queue_l[i], model.tau),
                           gl=literal(q_l[i], k_g[i], queue_g[i], model.tau)) for i in range(4)]


def test_the_losses_of_one_level():
    torch.manual_seed(0)
    q_g, k_g, q_l, k_l = F.normalize(torch.randn(4, 5, 8), dim=2)
    negatives_g, negatives_l = F.normalize(torch.randn(2, 7, 8), dim=2)
    found = detco.level_losses(q_g, k_g, negatives_g, 0.2, q_l, k_l, negatives_l)
    expected = dict(gg=literal(q_g, k_g, negatives_g, 0.2), ll=literal(q_l, k_l, negatives_l, 0.2),
                    gl=literal(q_l, k_g, negatives_g, 0.2))
    torch.testing.assert_close(found, expected)
    alone = detco.level_losses(q_g, k_g, negatives_g, 0.2)
    assert alone == dict(gg=found["gg"])


def test_every_term_of_every_level_equals_the_equations(monkeypatch):
    torch.manual_seed(0)
    model, x = small(weights=WEIGHTS), batch()
    with torch.no_grad():  # another encoder than the query's
        for p in model.encoder_k.parameters():
            p.add_(0.02 * torch.randn_like(p))
    encoder_q, encoder_k = Plain(model.encoder_q, 2), Plain(model.encoder_k, 2)
    torch.manual_seed(5)
    orders = torch.randperm(4), torch.randperm(4)  # those that encode_shuffled draws
    k_g, k_l, expected = literal_terms(model, encoder_q, encoder_k, x, *orders)
    assert not torch.equal(*orders) and orders[0].tolist() != [0, 1, 2, 3]

    torch.manual_seed(5)
    loss, keys, parts = model(*x)
    total = 0
    for i, terms in enumerate(expected):
        for name, term in terms.items():
            assert parts[f"{name}_res{i + 2}"].item() == pytest.approx(term.item(), abs=1e-4)
            total = total + WEIGHTS[i] * term
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)
    for found, rows in zip(keys, [*k_g, *k_l]):
        torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=1e-4)
    assert parts["loss_chance"].item() == pytest.approx(2.2 * 3 * math.log(25), rel=1e-6)
    assert parts["gl_chance"].item() == pytest.approx(math.log(25))
    assert_gradients(total, encoder_q, loss, model)

    calls = []

    def one_term(*qkn, which, level):
        calls.append(qkn)
        here = len(calls) - 1 == 3 * level + ("gg", "ll", "gl").index(which)
        return common.info_nce(*qkn) * here

    for level in range(4):  # and each term alone
        for which in ("gg", "ll", "gl"):
            calls.clear()
            monkeypatch.setattr(detco, "info_nce", partial(one_term, which=which, level=level))
            torch.manual_seed(5)
            term, _, _ = model(*x)
            assert len(calls) == 12 and not any(k.requires_grad for _, k, _, _ in calls)
            alone = WEIGHTS[level] * expected[level][which]
            assert_gradients(alone, encoder_q, term, model)


# -------------------------------------------------------------------------------- views and patches


@pytest.mark.parametrize("size, patch", [(255, 64), (60, 16), (47, 15)])
def test_patches_come_in_order_from_the_cells_of_one_flipped_crop(size, patch):
    torch.manual_seed(0)
    drawn = [detco.local_view(coordinates(250, 200), size, 0.6, patch) for _ in range(150)]
    view, corners = torch.utils.data.default_collate(drawn)
    patches = detco.cut_patches(view.pixels.float(), corners, patch)
    assert patches.shape == (150, 9, 3, patch, patch) and {0, 1} == {*view.flipped.int().tolist()}
    cell, offsets = size // 3, []
    for b, (box, flipped) in enumerate(zip(view.box.tolist(), view.flipped.tolist())):
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 250 and 0 <= y1 < y2 <= 200
        for p in range(9):
            row, column = divmod(p, 3)
            left, top = corners[b, p].tolist()
            offsets.append((left - column * cell, top - row * cell))
            # where the patch's pixels are in the source image, by hand
            at = (torch.arange(patch) + 0.5) / size
            across, down = left / size + at, top / size + at
            x = x2 - across * (x2 - x1) if flipped else x1 + across * (x2 - x1)
            y = y1 + down * (y2 - y1)
            inner = slice(2, -2)  # a resized crop's border repeats its last pixel
            found_x, found_y, _ = patches[b, p]
            assert (found_x - (x - 0.5)).abs()[:, inner].max() < 1.6
            assert (found_y - (y - 0.5)[:, None]).abs()[inner].max() < 1.6
    offsets = torch.tensor(offsets)
    apart = offsets.view(150, 9, 1, 2) != offsets.view(150, 1, 9, 2)  # each patch has its own
    assert (apart.any(3).sum(0) + torch.eye(9) > 0).all() or cell == patch
    assert offsets.min() == 0 and offsets.max() == cell - patch  # all of the cell, never beyond it
    assert len(offsets.unique(dim=0)) == (cell - patch + 1) ** 2 or cell - patch > 10


def test_the_views_are_independent_and_repeat_with_their_seed():
    args = detco.parse_args(["--data", "x"])
    image = torch.randint(256, (3, 300, 400), dtype=torch.uint8)

    def draw(seed, *flags):
        torch.manual_seed(seed)
        return detco.cut_views(image, detco.parse_args(["--data", "x", *flags]))

    q, k, local_q, local_k = draw(0)
    assert q.pixels.shape == k.pixels.shape == (3, args.image_size, args.image_size)
    assert local_q.view.pixels.shape == (3, 255, 255) and local_q.corners.shape == (9, 2)
    boxes = torch.stack([v.box for v in (q, k, local_q.view, local_k.view)])
    assert len(boxes.unique(dim=0)) == 4 and not torch.equal(local_q.corners, local_k.corners)
    shares = [(lambda b: (b[2] - b[0]) * (b[3] - b[1]) / 120_000)(draw(s)[2].view.box)
              for s in range(60)]
    assert 0.59 < min(shares) < 0.7 and max(shares) > 0.9
    again = draw(0)
    assert torch.equal(again[3].view.pixels, local_k.view.pixels)
    assert len(draw(0, "--no-local")) == 2
    torch.manual_seed(0)
    for view, moco in zip((q, k), two_views(image, 224, (0.2, 1.0))):
        assert torch.equal(view.pixels, moco.pixels)


def test_rand_augment_changes_the_pixels_of_all_four_views(monkeypatch):
    image = torch.randint(256, (3, 80, 100), dtype=torch.uint8)
    flags = ["--data", "x", "--image-size", "32", "--local-size", "48", "--patch-size", "12"]

    def draw(*more):
        torch.manual_seed(0)
        q, k, local_q, local_k = detco.cut_views(image, detco.parse_args([*flags, *more]))
        return [q, k, local_q.view, local_k.view], [local_q.corners, local_k.corners]

    assert all(v.pixels.dtype == torch.uint8 for v in draw("--rand-augment")[0])
    views, corners = draw()
    monkeypatch.setattr(torchvision.transforms, "RandAugment",
                        lambda: lambda pixels: 255 - pixels)
    changed, same_corners = draw("--rand-augment")
    for a, b in zip(views, changed):
        assert torch.equal(a.box, b.box) and a.flipped == b.flipped
        assert torch.equal(255 - a.pixels, b.pixels)
    assert all(torch.equal(a, b) for a, b in zip(corners, same_corners))


# -------------------------------------------------------------------------------- sizes, ablations


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = detco.DetCo()
    assert [q.keys.shape for q in model.queues] == [(65536, 128)] * 8
    assert len({id(q) for q in model.queues}) == 8
    assert model.weights == WEIGHTS

    def count(module):
        return sum(p.numel() for p in module.parameters())

    encoder = model.encoder_q
    largest = 18432 * 2048 + 2048 + 2048 * 128 + 128
    assert count(encoder.local_heads[3]) == largest == 38_013_056
    assert count(encoder.stages) == 23_508_032
    assert count(encoder.global_heads) == 8_921_600
    assert count(encoder.local_heads) == 71_836_160
    assert [h[0].in_features for h in encoder.global_heads] == [256, 512, 1024, 2048]
    assert [h[0].in_features for h in encoder.local_heads] == [2304, 4608, 9216, 18432]


def test_a_level_of_weight_0_costs_nothing():
    torch.manual_seed(0)
    model = small(weights=(0, 0.5, 0, 0))
    assert len(model.queues) == 2 and len(model.encoder_q.global_heads) == 1
    for encoder in (model.encoder_q, model.encoder_k):
        for layer in (encoder.stages.layer3, encoder.stages.layer4):
            layer.forward = None  # calling it would fail
    loss, keys, parts = model(*batch())
    loss.backward()
    assert len(keys) == 2 and {n for n in parts if "res" in n} == {"gg_res3", "ll_res3", "gl_res3"}
    trained = {n for n, p in model.encoder_q.named_parameters() if p.grad is not None}
    assert not any("layer3" in n or "layer4" in n for n in trained)
    assert trained == {n for n, p in model.encoder_q.named_parameters() if p.requires_grad}
    alone = small(weights=(0, 0, 0, 1), local=False)
    assert len(alone.queues) == 1 and len(alone.encoder_q.local_heads) == 0


def test_a_shared_queue_takes_the_keys_of_all_levels():
    torch.manual_seed(0)
    model = small(share_queue=True)
    assert len({id(q) for q in model.queues}) == 2 and len(model.queues) == 8
    _, keys, _ = model(*batch())
    for queue, k in zip(model.queues, keys):
        queue.push(k)
    assert torch.equal(model.queues[0].keys[:16], torch.cat(keys[:4]))
    assert torch.equal(model.queues[7].keys[:16], torch.cat(keys[4:]))
    assert model.queues[2].oldest == model.queues[5].oldest == 16
    for queue, k in zip(model.queues, keys):
        queue.push(k)
    assert torch.equal(model.queues[1].keys[:8], torch.cat(keys[2:4]))  # 32 keys wrapped round 24
    assert model.queues[0].oldest == 8
    fresh = small(share_queue=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.queues[6].keys, model.queues[4].keys)


def test_a_run_with_the_paper_s_ablations(tmp_path):
    flags = ("--scenes 40 --epochs 2 --batch-size 16 --image-size 32 --queue-size 80 --bn-groups 2 "
             "--workers 0 --lr 0.05 --log-every 1 --dim 16 --local-size 51 --patch-size 16 "
             "--share-queue --weights 0 2 0 2 --normalise-weights --rand-augment")
    detco.main([*flags.split(), "--out", str(tmp_path)])
    total = [0.5 * sum(float(column(tmp_path, f"{t}_res{i}")[0]) for t in ("gg", "ll", "gl"))
             for i in (3, 5)]
    assert float(column(tmp_path, "loss")[0]) == pytest.approx(sum(total), rel=1e-5)
    assert float(column(tmp_path, "loss_chance")[0]) == pytest.approx(3 * math.log(81), rel=1e-6)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"] == "detco"
    for i in range(4):  # filled in 5 steps, trained in 4, with the keys of two levels in each
        assert state["model"][f"queues.{i}.oldest"] == (5 + 4) * 2 * 16 % 80 == 48
    load_backbone(common.resnet_stages("resnet18"), tmp_path / "backbone.pt")
