import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import column, coordinates, start_processes
from torch.nn.parallel import DistributedDataParallel

import common
import detco
import moco_v2
from scenes import Scenes

SMALL = dict(arch="resnet18", dim=16, queue_size=24, m=0.9, tau=0.2, bn_groups=2)
WEIGHTS = (0.1, 0.4, 0.7, 1.0)


def batch(number=4):
    """view_q, view_k, patches_q, patches_k."""
    return (*torch.randn(2, number, 3, 32, 32), *torch.randn(2, number, 9, 3, 16, 16))


class Plain:
    """An Encoder's weights in torchvision's own ResNet-18 with ordinary batch norm; the heads are
    applied by hand, for the images of each of ``groups`` GPUs apart."""

    def __init__(self, encoder, groups):
        self.resnet = torchvision.models.resnet18()
        self.resnet.load_state_dict(encoder.stages.state_dict(), strict=False)
        self.heads = {"g": copy.deepcopy(encoder.global_heads),
                      "l": copy.deepcopy(encoder.local_heads)}
        self.groups = groups

    def named_parameters(self):
        """Under the names that the Encoder has for them."""
        yield from ((f"stages.{n}", p) for n, p in self.resnet.named_parameters() if "fc" not in n)
        yield from ((f"global_heads.{n}", p) for n, p in self.heads["g"].named_parameters())
        yield from ((f"local_heads.{n}", p) for n, p in self.heads["l"].named_parameters())

    def stages(self, x):
        r = self.resnet
        f2 = r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x)))))
        f3 = r.layer2(f2)
        f4 = r.layer3(f3)
        return [f2, f3, f4, r.layer4(f4)]

    def embed(self, heads, pooled):
        """pooled: for each image, four vectors -> for each level, the images' embeddings."""
        out = []
        for level in range(4):
            first, _, second = self.heads[heads][level]
            rows = []
            for vectors in pooled:
                h = (first.weight @ vectors[level] + first.bias).clamp(min=0)
                z = second.weight @ h + second.bias
                rows.append(z / z.square().sum().sqrt())
            out.append(rows)
        return out

    def images(self, x):
        pooled = []
        for part in x.chunk(self.groups):
            features = self.stages(part)
            pooled += [[f[b].mean((1, 2)) for f in features] for b in range(len(part))]
        return self.embed("g", pooled)

    def patches(self, x):
        pooled = []
        for part in x.chunk(self.groups):
            features = self.stages(torch.stack([p for image in part for p in image]))
            for b in range(len(part)):
                pooled.append([torch.cat([f[9 * b + p].mean((1, 2)) for p in range(9)])
                               for f in features])
        return self.embed("l", pooled)


def literal(queries, keys, negatives, tau):
    """Eq. (2), (4) and (5): -log of the share of the positive among K + 1, mean over the images."""
    losses = []
    for q, k in zip(queries, keys):
        positive = torch.exp(torch.dot(q, k) / tau)
        everyone = positive
        for n in negatives:
            everyone = everyone + torch.exp(torch.dot(q, n) / tau)
        losses.append(-torch.log(positive / everyone))
    return sum(losses) / len(losses)


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


def gradients(loss, named):
    names, parameters = zip(*named)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g
            for n, p, g in zip(names, parameters, found)}


def test_every_term_of_every_level_equals_the_equations(monkeypatch):
    torch.manual_seed(0)
    model, x = detco.DetCo(**SMALL, weights=WEIGHTS), batch()
    with torch.no_grad():  # another encoder than the query's
        for p in model.encoder_k.parameters():
            p.add_(0.02 * torch.randn_like(p))
    encoder_q, encoder_k = Plain(model.encoder_q, 2), Plain(model.encoder_k, 2)
    torch.manual_seed(5)
    orders = torch.randperm(4), torch.randperm(4)  # those that shuffled() draws
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
    assert_gradients(gradients(total, encoder_q.named_parameters()), model, loss)

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
            alone = gradients(WEIGHTS[level] * expected[level][which],
                              encoder_q.named_parameters())
            assert_gradients(alone, model, term)


def assert_gradients(expected, model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    assert all(p.grad is None for p in model.encoder_k.parameters())
    for name, p in model.encoder_q.named_parameters():
        found = p.grad if p.grad is not None else torch.zeros_like(p)
        difference = (found - expected[name]).norm()
        assert difference <= 1e-3 * expected[name].norm() + 1e-7, name


def test_keys_come_unshuffled_from_the_momentum_encoder():
    torch.manual_seed(0)
    model, (_, view_k, _, patches_k) = detco.DetCo(**{**SMALL, "bn_groups": 1}), batch(6)
    keys = model.keys(view_k, patches_k)
    direct = model.encoder_k(view_k) + model.encoder_k(patches_k)  # in one group the order is free
    assert len(keys) == len(direct) == len(model.queues) == 8
    for a, b in zip(keys, direct):
        assert a.shape == (6, 16) and not a.requires_grad
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.norm(dim=1), torch.ones(6))
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for a, b in zip(keys, model.keys(view_k, patches_k)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # the query's encoder has no part
    common.momentum_update(model.encoder_q, model.encoder_k, 0.5)
    for a, b in zip(keys, model.keys(view_k, patches_k)):
        assert (a - b).abs().max() > 1e-3


def test_gradients_reach_all_of_the_query_encoder_and_nothing_else():
    torch.manual_seed(0)
    model = detco.DetCo(**SMALL)
    loss, keys, parts = model(*batch())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert not any(t.requires_grad for t in [*keys, *parts.values(), *model.buffers()])


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
        return detco.views(image, detco.parse_args(["--data", "x", *flags]))

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
    for view, moco in zip((q, k), moco_v2.two_views(image, 224, (0.2, 1.0))):
        assert torch.equal(view.pixels, moco.pixels)


def test_rand_augment_changes_the_pixels_of_all_four_views(monkeypatch):
    image = torch.randint(256, (3, 80, 100), dtype=torch.uint8)
    flags = ["--data", "x", "--image-size", "32", "--local-size", "48", "--patch-size", "12"]

    def draw(*more):
        torch.manual_seed(0)
        q, k, local_q, local_k = detco.views(image, detco.parse_args([*flags, *more]))
        return [q, k, local_q.view, local_k.view], [local_q.corners, local_k.corners]

    assert all(v.pixels.dtype == torch.uint8 for v in draw("--rand-augment")[0])
    views, corners = draw()
    monkeypatch.setattr(detco, "RandAugment", lambda: lambda pixels: 255 - pixels)
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
    for number in (largest, 23_508_032, 8_921_600, 71_836_160):
        assert f"{number:,}" in detco.__doc__
    assert [h[0].in_features for h in encoder.global_heads] == [256, 512, 1024, 2048]
    assert [h[0].in_features for h in encoder.local_heads] == [2304, 4608, 9216, 18432]


def test_defaults_are_the_papers_unless_scenes_are_used():
    args = vars(detco.parse_args(["--data", "somewhere"]))
    paper = dict(arch="resnet50", epochs=200, batch_size=256, lr=0.06, weight_decay=1e-4, dim=128,
                 image_size=224, crop_scale=0.2, local_size=255, local_scale=0.6, patch_size=64,
                 queue_size=65536, momentum=0.999, tau=0.2, bn_groups=8, p_blur=0.5,
                 weights=[*WEIGHTS], no_local=False, share_queue=False, normalise_weights=False,
                 rand_augment=False)
    assert {k: args[k] for k in paper} == paper
    small = detco.parse_args([])
    assert small.arch == "resnet18" and small.queue_size < 4000 and small.lr == 0.06
    assert small.weights == [*WEIGHTS]


def test_a_level_of_weight_0_costs_nothing():
    torch.manual_seed(0)
    model = detco.DetCo(**SMALL, weights=(0, 0.5, 0, 0))
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
    alone = detco.DetCo(**SMALL, weights=(0, 0, 0, 1), local=False)
    assert len(alone.queues) == 1 and len(alone.encoder_q.local_heads) == 0


def test_a_shared_queue_takes_the_keys_of_all_levels():
    torch.manual_seed(0)
    model = detco.DetCo(**SMALL, share_queue=True)
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
    fresh = detco.DetCo(**SMALL, share_queue=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.queues[6].keys, model.queues[4].keys)


# ---------------------------------------------------------------------- two processes, one process


def one_step(model, x):
    torch.manual_seed(3 + common.rank())  # what rank 0 draws is what counts
    loss, keys, _ = model(*x)
    loss.backward()
    plain = getattr(model, "module", model)
    for queue, k in zip(plain.queues, keys):
        queue.push(k)
    return loss.detach(), plain


def half(number, path):
    """Process ``number`` of two: half of the batch, half of the groups."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=number, world_size=2)
    results = []
    for options, state, x in torch.load(path / "in.pt", weights_only=True):
        model = detco.DetCo(**{**SMALL, "bn_groups": 1}, **options)
        model.load_state_dict(state)
        loss, plain = one_step(DistributedDataParallel(model, broadcast_buffers=False),
                               [each[4 * number:4 * number + 4] for each in x])
        for queue in plain.queues:
            queues = common.all_gather(queue.keys[None])
            assert torch.equal(queues[0], queues[1])
        results.append([common.all_gather(loss[None]).mean(),
                        {n: p.grad for n, p in plain.encoder_q.named_parameters()},
                        plain.queues.state_dict()])
    if number == 0:
        torch.save(results, path / "out.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_same_groups(tmp_path):
    torch.manual_seed(0)
    everything = []
    for options in ({}, dict(share_queue=True, weights=(0, 1, 1, 0))):
        everything.append([options, detco.DetCo(**SMALL, **options).state_dict(), batch(8)])
    torch.save(everything, tmp_path / "in.pt")
    start_processes(half, (tmp_path,), 2)
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for (options, state, x), (loss, found, queues) in zip(everything, results):
        model = detco.DetCo(**SMALL, **options)
        model.load_state_dict(state)
        expected, _ = one_step(model, x)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for name, p in model.encoder_q.named_parameters():
            assert (found[name] is None) == (p.grad is None)
            if p.grad is not None:
                assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7, name
        for name, value in model.queues.state_dict().items():
            torch.testing.assert_close(queues[name], value, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- whole runs


TINY = ("--scenes 40 --epochs 2 --batch-size 16 --image-size 32 --queue-size 40 --bn-groups 2 "
        "--workers 0 --lr 0.05 --log-every 1 --dim 16").split()


def test_with_the_last_level_alone_it_is_moco(tmp_path):
    torch.set_num_threads(1)
    moco_v2.main([*TINY, "--out", str(tmp_path / "moco")])
    detco.main([*TINY, "--weights", *"0001", "--no-local", "--out", str(tmp_path / "detco")])
    losses = column(tmp_path / "moco", "loss")
    assert len(losses) == 4 and losses == column(tmp_path / "detco", "loss")  # to the last digit
    assert column(tmp_path / "moco", "deviation") == column(tmp_path / "detco", "deviation")
    a, b = (common.load_checkpoint(tmp_path / n / "backbone.pt") for n in ("moco", "detco"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_is_algorithm_1(tmp_path):
    """The queues' filling, the views' colours and patches, updates and pushes, written out."""
    torch.set_num_threads(1)
    words = [*TINY, "--local-size", "54", "--patch-size", "16", "--p-blur", "0.5", "--epochs", "1"]
    detco.main([*words, "--out", str(tmp_path)])
    args = detco.parse_args(words)
    torch.manual_seed(0)
    model = detco.DetCo("resnet18", 16, 40, args.momentum, args.tau, 2)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.0, 0.9, weight_decay=1e-4)

    def batches(steps):
        loader = common.load_batches(Scenes(40, size=96, seed=0), partial(detco.views, args=args),
                                     16, steps, 0, 0)
        for step, (q, k, *local) in zip(steps, loader):
            torch.manual_seed(common.seed_for(0, step, 0))
            coloured = [common.photometric(view.pixels, p_blur=0.5) for view in (q, k)]
            for view, corners in local:  # the colours first, of the whole of it
                pixels = common.photometric(view.pixels, p_blur=0.5)
                pixels = pixels.permute(0, 2, 3, 1)  # as they lie in memory, as cut_patches' do
                coloured.append(torch.stack([
                    torch.stack([image[y:y + 16, x:x + 16] for x, y in of_image])
                    for image, of_image in zip(pixels, corners.tolist())]).permute(0, 1, 4, 2, 3))
            yield step, coloured

    @torch.no_grad()
    def push(keys):
        assert len(keys) == len(model.queues) == 8
        for queue, of_level in zip(model.queues, keys):
            for key in of_level:
                queue.keys[queue.oldest] = key
                queue.oldest.copy_((queue.oldest + 1) % 40)

    for _, (_, view_k, _, patches_k) in batches(range(2, 5)):  # 40 keys, of three batches
        push(model.keys(view_k, patches_k))
    losses = []
    for step, (view_q, view_k, patches_q, patches_k) in batches(range(2)):
        optimizer.param_groups[0]["lr"] = 0.05 * 16 / 256 * (1 + math.cos(math.pi * step / 2)) / 2
        loss, keys, _ = model(view_q, view_k, patches_q, patches_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters()):
            k.data = args.momentum * k + (1 - args.momentum) * q.detach()
        push(keys)
        losses.append(loss.item())
    assert [float(x) for x in column(tmp_path, "loss")] == pytest.approx(losses, rel=1e-5)
    found = common.load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    for name, value in model.state_dict().items():  # the steps amplify what sums of floats differ
        torch.testing.assert_close(found[name], value, atol=3e-3, rtol=1e-3)


def test_a_run_with_the_paper_s_ablations(tmp_path):
    words = [*TINY, "--local-size", "51", "--patch-size", "16", "--share-queue", "--weights",
             *"0202", "--normalise-weights", "--rand-augment", "--out", str(tmp_path)]
    words[words.index("--queue-size") + 1] = "80"
    detco.main(words)
    total = [0.5 * sum(float(column(tmp_path, f"{t}_res{i}")[0]) for t in ("gg", "ll", "gl"))
             for i in (3, 5)]
    assert float(column(tmp_path, "loss")[0]) == pytest.approx(sum(total), rel=1e-5)
    assert float(column(tmp_path, "loss_chance")[0]) == pytest.approx(3 * math.log(81), rel=1e-6)
    state = common.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"] == "detco"
    for i in range(4):  # filled in 5 steps, trained in 4, with the keys of two levels in each
        assert state["model"][f"queues.{i}.oldest"] == (5 + 4) * 2 * 16 % 80 == 48
    common.load_backbone(common.resnet_stages("resnet18"), tmp_path / "backbone.pt")


def test_arguments_that_cannot_be(tmp_path):
    for flags, message in (("--weights 0 0 0 0", "--weights: one must be more than 0"),
                           ("--weights 0 0 -1 1", "--weights [0.0, 0.0, -1.0, 1.0] is not"),
                           ("--patch-size 21", "--patch-size 21 is not from 8 to 20"),
                           ("--local-size 23", "--local-size 23 is not from 24"),
                           ("--no-local --patch-size 21 --queue-size 9", "less than the 64 keys"),
                           ("--share-queue --queue-size 255", "less than the 256 keys"),
                           ("--queue-size 63", "less than the 64 keys")):
        with pytest.raises(SystemExit, match="error: ") as error:
            detco.main([*flags.split(), "--scenes", "64", "--out", str(tmp_path)])
        assert message in str(error.value)
