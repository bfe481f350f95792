import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import process_group, start_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import MLP

import common
from common import InputError


# ---------------------------------------------------------------------------------------- a view


def test_boxes_into_views_by_hand():
    view = torch.tensor([[10., 0, 90, 40]] * 2)  # 80 x 40 pixels, shown as 224 x 224
    flipped = torch.tensor([False, True])
    box = torch.tensor([[20., 10, 60, 40]] * 2)  # (B, 4)
    found = common.box_into_view(box, view, flipped, 224)
    assert found.tolist() == [[28, 56, 140, 224], [84, 56, 196, 224]]
    whole = common.box_into_view(view, view, ~flipped, 10)
    assert whole.tolist() == [[0, 0, 10, 10]] * 2
    boxes = torch.stack([box, view], dim=1)  # (B, P, 4)
    found = common.box_into_view(boxes, view, flipped, 224)
    assert found.tolist() == [[[28, 56, 140, 224], [0, 0, 224, 224]],
                              [[84, 56, 196, 224], [0, 0, 224, 224]]]
    odd = common.box_into_view(box[:1, None], torch.tensor([[4.5, 2.25, 68.5, 42.25]]),
                               torch.tensor([True]), 32)
    torch.testing.assert_close(odd, torch.tensor([[[4.25, 6.2, 24.25, 30.2]]]))


# ---------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize("arch, channels", [("resnet18", [64, 128, 256, 512]),
                                            ("resnet50", [256, 512, 1024, 2048])])
def test_stages_equal_torchvisions_resnet(arch, channels):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, weights=None).eval()
    ours = common.resnet_stages(arch).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)  # strict: the very names
    x = torch.randn(2, 3, 64, 96)
    stages = ours(x)
    assert [s.shape for s in stages] == [(2, c, 64 // s, 96 // s)
                                         for c, s in zip(channels, (4, 8, 16, 32))]
    assert ours.channels == channels
    torch.testing.assert_close(theirs.fc(stages[-1].mean((2, 3))), theirs(x))
    with pytest.raises(InputError, match="unknown architecture"):
        common.resnet_stages("resnet19")


def test_only_the_first_stages_of_a_shallow_backbone():
    shallow, deep = (common.resnet_stages("resnet18", depth=depth).eval() for depth in (2, 4))
    shallow.load_state_dict(deep.state_dict())
    x = torch.randn(1, 3, 64, 64)
    stages = shallow(x)
    assert len(stages) == 2 and all(torch.equal(a, b) for a, b in zip(stages, deep(x)))
    untrained = {n.split(".")[0] for n, p in shallow.named_parameters() if not p.requires_grad}
    assert untrained == {"layer3", "layer4"}


@pytest.mark.parametrize("arch", ["swin_t", "swin_v2_t"])
def test_stages_equal_torchvisions_swin(arch):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, weights=None).eval()
    ours = common.backbone_stages(arch).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    ours.load_state_dict(state)  # strict: the very names
    x = torch.randn(1, 3, 64, 96)
    stages = ours(x)
    assert [s.shape for s in stages] == [(1, 96 * s // 4, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    assert ours.channels == [96, 192, 384, 768]
    torch.testing.assert_close(theirs.head(stages[-1].mean((2, 3))), theirs(x))
    torch.testing.assert_close(stages[1].permute(0, 2, 3, 1), theirs.features[:4](x))


def test_architectures_by_name():
    for name in ("swin_x", "swin3d_t", "resnet19"):
        with pytest.raises(InputError, match="unknown architecture"):
            common.backbone_stages(name)
    with pytest.raises(InputError, match=r"known: .*swin_b.*; ResNets"):
        common.backbone_stages("swin_x")
    with pytest.raises(InputError, match=r"known: .*resnet18.*wide_resnet50_2"):
        common.backbone_stages("resnet19")
    assert isinstance(common.backbone_stages("resnet18"), common.ResNetStages)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_batch_norm_equals_one_module_a_group(layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4).add(2).to(dtype, memory_format=layout).requires_grad_()
    weights = torch.randn(12, 5, 4, 4, dtype=dtype)
    split = common.SplitBatchNorm(5, groups=3)
    nn.init.normal_(split.weight), nn.init.normal_(split.bias)
    parts = [nn.BatchNorm2d(5) for _ in range(3)]
    for part in parts:
        part.load_state_dict(split.state_dict())
    y = split(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    got = torch.autograd.grad((y * weights).sum(), [x, split.weight, split.bias])
    expected = torch.cat([part(x[4 * i:4 * i + 4]) for i, part in enumerate(parts)])
    torch.testing.assert_close(y, expected)
    own = torch.autograd.grad((expected * weights).sum(),
                              [x, *(p.weight for p in parts), *(p.bias for p in parts)])
    for a, b in zip(got, (own[0], sum(own[1:4]), sum(own[4:]))):
        torch.testing.assert_close(a, b)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    assert split.num_batches_tracked == 1
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))
    with pytest.raises(InputError, match="3 .* 10"):
        split.train()(x[:10])


def test_running_statistics_are_the_mean_over_groups():
    split = common.SplitBatchNorm(1, groups=4, momentum=0.3)
    split(torch.tensor([[0.0, 2], [1, 5], [3, 3], [6, 8]]).view(4, 1, 1, 2))
    # means 1, 3, 3, 7; variances 2, 8, 0, 2 (n - 1); from 0 and 1
    assert split.running_mean.item() == pytest.approx(0.3 * 3.5)
    assert split.running_var.item() == pytest.approx(0.7 + 0.3 * 3)


def test_split_batch_norm_keeps_its_input_alone():
    split, x = common.SplitBatchNorm(2, groups=4), torch.randn(16, 2, 32, 32, requires_grad=True)
    peak, kept, y = memory(lambda: split(x))
    assert max(peak, kept) < 1.1 * y.nbytes
    peak, kept, _ = memory(lambda: torch.autograd.grad(y.sum(), x))
    assert peak < 2.2 * y.nbytes  # of each group, then of all


def test_a_group_of_one_value_is_refused():
    norm = common.SplitBatchNorm(3, groups=2)
    norm(torch.randn(4, 3, 1, 1))
    norm(torch.randn(2, 3, 1, 2))
    with pytest.raises(InputError, match="one value of each channel .2 images in 2 groups, 1 x 1"):
        norm(torch.randn(2, 3, 1, 1))
    with pytest.raises(InputError, match="1 images in 1 groups"):
        common.SplitBatchNorm(3)(torch.randn(1, 3, 1, 1))
    assert norm.eval()(torch.randn(2, 3, 1, 1)).shape == (2, 3, 1, 1)


def test_batch_norm_groups_name_both_numbers():
    assert common.batch_norm_groups(8, 256) == 8
    with pytest.raises(InputError, match="100 .* 8"):
        common.batch_norm_groups(8, 100)


# ----------------------------------------------------------------------------------------- InfoNCE


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def literal_info_nce(q, k, negatives, tau):
    """Eq. (1) of MoCo, one number at a time in float64, and its derivative by hand: that of
    -log p_0 to logit j is p_j, less 1 for the positive -> the loss, its gradient to q."""
    q, k, negatives = (x.double().numpy() for x in (q, k, negatives))
    total, gradient = 0.0, np.zeros(q.shape)
    for i in range(len(q)):
        keys = [k[i], *negatives]
        scores = [math.exp(sum(a * b for a, b in zip(q[i], key)) / tau) for key in keys]
        total += -math.log(scores[0] / sum(scores))
        for j, (key, score) in enumerate(zip(keys, scores)):
            gradient[i] += (score / sum(scores) - (j == 0)) * key / tau
    return total / len(q), gradient / len(q)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_info_nce_equals_a_literal_loop(chunk, tau):
    q, k, negatives = unit(7, 5), unit(7, 5, seed=1), unit(11, 5, seed=2)
    q.requires_grad_()
    loss = common.info_nce(q, k, negatives, tau, chunk=chunk)
    assert loss.shape == () and loss.dtype == torch.float32
    expected, gradient = literal_info_nce(q.detach(), k, negatives, tau)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    found, = torch.autograd.grad(3 * loss, q)
    np.testing.assert_allclose(found.numpy(), 3 * gradient, atol=1e-5)


def test_info_nce_by_hand():
    q = torch.tensor([[1.0, 0.0]])
    # exp(1) against exp(1) + exp(0) + exp(-1)
    loss = common.info_nce(q, q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), tau=1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + 1 / math.e)), abs=1e-6)
    assert common.info_nce(q[:0], q[:0], q, tau=1.0).item() == 0


def test_info_nce_is_float32_under_autocast_and_for_bfloat16():
    q, k, negatives = unit(6, 8).requires_grad_(), unit(6, 8, seed=1), unit(9, 8, seed=2)
    plain = common.info_nce(q, k, negatives, 0.2)
    gradient, = torch.autograd.grad(plain, q)
    for chunk in (None, 2):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = common.info_nce(q, k, negatives, 0.2, chunk=chunk)
        torch.testing.assert_close(mixed, plain)
        torch.testing.assert_close(torch.autograd.grad(mixed, q)[0], gradient)
    assert common.info_nce(q.bfloat16(), k.bfloat16(), negatives, 0.2).dtype == torch.float32


def memory(function):
    """Call it -> bytes that its tensors took at most, bytes that they take after it, its result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = sorted((event.start_ns(), event.nbytes())
                    for event in profile.profiler.kineto_results.events()
                    if event.name() == "[memory]")  # an allocation, or less than 0: its end
    taken = np.cumsum([size for _, size in events])
    return taken.max(), taken[-1], result


def test_info_nce_memory_does_not_grow_with_rows():
    q, k = unit(512, 4).requires_grad_(), unit(512, 4, seed=1)
    negatives, logits = unit(3000, 4, seed=2), 4 * 3000  # bytes of a row
    for chunk in (16, 512):
        peak, kept, loss = memory(lambda: common.info_nce(q, k, negatives, 0.2, chunk=chunk))
        # logits and their softmax, and 20 numbers of each row; none of the logits is kept
        assert 2 * chunk * logits < peak < 2 * chunk * logits + 512 * 80 and kept < 512 * 80
        assert memory(loss.backward)[0] < 512 * 80


@pytest.mark.parametrize("tau", [1e-3, 100.0])
def test_info_nce_at_extreme_temperatures(tau):
    q, k, negatives = unit(9, 16).requires_grad_(), unit(9, 16, seed=1), unit(50, 16, seed=2)
    q.data[:3] = k[:3]  # loss 0, or of any size
    exact = q.detach().double().requires_grad_()
    logits = torch.cat([(exact * k).sum(1, keepdim=True), exact @ negatives.double().T], 1) / tau
    expected = F.cross_entropy(logits, torch.zeros(9, dtype=torch.long))
    loss = common.info_nce(q, k, negatives, tau, chunk=4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got, gradient = (torch.autograd.grad(x, y)[0] for x, y in ((loss, q), (expected, exact)))
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-4 / tau)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.numel())
        return out


def test_at_most_33_million_logits_at_a_time():
    q, negatives = unit(520, 2), unit(65536, 2, seed=1)
    for rows, logits in ((100, 100 * 65536), (520, 2 ** 25)):  # 512 rows, and 8
        with Largest() as seen:
            common.info_nce(q[:rows].requires_grad_(), q[:rows], negatives, 0.2)
        assert seen.numel == logits


# --------------------------------------------------------------- queue, momentum encoder, shuffling


def test_queue_is_first_in_first_out_and_wraps():
    torch.manual_seed(0)
    queue = common.Queue(7, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(7))
    rows, start = list(queue.keys.clone()), 0
    for n in (3, 3, 3, 7, 1, 5, 0, 7, 2):
        keys = unit(n, 3, seed=n)
        queue.push(keys)
        for key in keys:
            rows[start % 7] = key
            start += 1
        assert torch.equal(queue.keys, torch.stack(rows))
        assert queue.oldest == start % 7
    with pytest.raises(InputError, match="8 .* 7"):
        queue.push(unit(8, 3))
    assert [name for name, _ in queue.named_buffers()] == ["keys", "oldest"]
    assert not list(queue.parameters())


def test_momentum_update_by_hand_and_through_the_output():
    torch.manual_seed(0)
    online, x = MLP(4, [6, 3]), torch.randn(5, 4)
    target = copy.deepcopy(online).requires_grad_(False)
    before = target(x)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
    expected = [0.9 * t + (1 - 0.9) * o for t, o in zip(target.parameters(), online.parameters())]
    kept = [p.clone() for p in online.parameters()]
    common.momentum_update(online, target, 0.9)
    for p, e in zip(target.parameters(), expected):
        torch.testing.assert_close(p, e)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), kept))
    assert (target(x) - before).abs().max() > 1e-3


def test_shuffling_gives_each_image_its_own_key_from_another_group():
    torch.manual_seed(0)
    images = torch.arange(16.0).view(16, 1, 1, 1)
    seen = []

    def encoder(x):
        seen.append(x.flatten().tolist())
        return x * 2

    assert torch.equal(common.encode_shuffled(encoder, images), images * 2)
    assert sorted(seen[0]) == list(range(16)) and seen[0] != list(range(16))
    first, second = common.encode_shuffled(lambda x: [x + 1, x[:, 0]], images)
    assert torch.equal(first, images + 1) and torch.equal(second, images[:, 0])
    weight = nn.Parameter(torch.ones(()))
    both = common.encode_shuffled(lambda x, y: (x + y) * weight, images, -2 * images)
    assert torch.equal(both, -images) and not both.requires_grad


def test_contrast_statistics_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    found = common.contrast_statistics(q, k, torch.tensor([[0.8, 0.6], [-1.0, 0.0]]))
    # similarities to keys 0.6 and 1; to negatives (0.8, -1) and (0.6, 0)
    assert found["accuracy"] == 0.5
    assert found["similarity_positive"].item() == pytest.approx(0.8)
    assert found["similarity_negative"].item() == pytest.approx(0.1)
    assert found["deviation"].item() == pytest.approx(0.5)
    assert not any(common.contrast_statistics(q[:0], k[:0], k).values())


# ------------------------------------------------------------------------- RoI Align on a pyramid


def read_between(x, h, w):
    """x (C, H, W) at the place (h, w), where cell i has its centre at i: bilinear; 0 from a whole
    cell outside on, and the border's value nearer than that."""
    if h < -1 or w < -1 or h > x.shape[1] or w > x.shape[2]:
        return x[:, 0, 0] * 0
    value = 0
    h, w = max(h, 0), max(w, 0)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            last_row, last_column = row == x.shape[1] - 1, column == x.shape[2] - 1
            a = 1.0 if last_row and h >= row else max(0, 1 - abs(h - row))
            b = 1.0 if last_column and w >= column else max(0, 1 - abs(w - column))
            value = value + a * b * x[:, row, column]
    return value


def test_roi_align_is_a_loop_over_bilinear_samples():
    """Values and gradients.  Each of S x S cells is the mean of ceil(side / S) samples an axis,
    spread evenly; a pixel's centre is half a pixel from its border, on every level."""
    torch.manual_seed(0)
    size, strides = 2, (4, 8)
    features = {str(i): torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True)
                for i, n in enumerate((8, 4, 2))}  # of images of 32 pixels; the last is not used
    boxes = [torch.tensor([[3.0, 5.0, 9.5, 21.0], [1.0, 1.0, 30.0, 31.5], [-3.0, 20.0, 8.0, 36.0]],
                          dtype=torch.float64),
             torch.tensor([[0.0, 0.0, 32.0, 32.0], [17.0, 2.0, 18.5, 3.0]], dtype=torch.float64)]
    pool = common.PyramidRoIAlign(size, strides, canonical=64)  # P3 from 32 pixels on
    expected = []
    for i, image in enumerate(boxes):
        for x1, y1, x2, y2 in image.tolist():
            level = int((x2 - x1) * (y2 - y1) >= 32 ** 2)
            stride = strides[level]
            x = features[str(level)][i]
            w, h = (x2 - x1) / stride / size, (y2 - y1) / stride / size  # of a cell
            down, across = math.ceil(h), math.ceil(w)
            expected.append(torch.stack([torch.stack([sum(
                read_between(x, y1 / stride - 0.5 + (row + (j + 0.5) / down) * h,
                             x1 / stride - 0.5 + (column + (k + 0.5) / across) * w)
                for j in range(down) for k in range(across)) / (down * across)
                for column in range(size)], dim=1) for row in range(size)], dim=1))
    expected = torch.stack(expected)  # (5, 3, 2, 2)
    levels, maps = pool.map_levels(torch.cat(boxes)), [features["0"], features["1"]]
    assert levels.tolist() == [0, 0, 0, 1, 0]
    rois = torch.cat([torch.tensor([[0.0], [0], [0], [1], [1]]), torch.cat(boxes)], dim=1)
    weights = torch.randn_like(expected)
    literal = torch.autograd.grad((weights * expected).sum(), maps)
    assert all(gradient.abs().sum() > 0 for gradient in literal)
    on_gpus = pool.pool_all(maps, rois, levels)
    assert torch.equal(on_gpus, pool.pool_each(maps, rois, levels))
    for found in (pool(features, boxes), on_gpus):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), maps), literal)
    one = common.PyramidRoIAlign(size, (8,))({"0": features["1"]}, boxes)  # C4: a single level
    torch.testing.assert_close(one[3], expected[3])
    assert pool(features, [boxes[0][:0]] * 2).shape == (0, 3, 2, 2)


def test_levels_at_their_borders():
    """Eq. (1) of the FPN's paper, k = floor(4 + log2(sqrt(w h) / 224)), from P2 to P5: detectron2
    adds 1e-8 to the fraction, which moves no border of float32."""
    below = [side * (1 - 5e-7) for side in (112, 224, 448)]
    sides = [0, 1, 111.99, below[0], 112, below[1], 224, 447.9, below[2], 448, 5000]
    boxes = torch.tensor([[0, 0, side, side] for side in sides])
    pool = common.PyramidRoIAlign(7, (4, 8, 16, 32))
    assert pool.map_levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    # torchvision adds 1e-6 to the logarithm: its borders are lower by 1e-6 ln 2
    theirs = torchvision.ops.poolers.initLevelMapper(2, 5)([boxes]).tolist()
    assert theirs == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


# ------------------------------------------------------------------------------------ optimization


def test_cosine_schedule_by_hand():
    schedule = common.cosine_schedule
    assert schedule(0, 8) == 1 and schedule(4, 8) == 0.5
    assert schedule(2, 8) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule(7, 8) == pytest.approx((1 - math.cos(math.pi / 8)) / 2)
    # the warm-up of Barlow Twins' and VICReg's code: lr = base step / warmup
    assert [schedule(step, 20, 4) for step in range(6)][:5] == [0, 0.25, 0.5, 0.75, 1]
    # of SoCo's (lr_scheduler.py): base / 100 ((100 - 1) step / warmup + 1)
    assert [schedule(step, 20, 4, start=0.01) for step in range(5)] == pytest.approx(
        [1 / 100 * (99 * step / 4 + 1) for step in range(5)])
    assert schedule(12, 20, 4) == 0.5 and schedule(20, 20, 4) == 0
    assert schedule(12, 20, 4, end=0.001) == pytest.approx(0.5005)
    last = 0.001 + 0.999 * (1 - math.cos(math.pi / 16)) / 2
    assert schedule(19, 20, 4, end=0.001) == pytest.approx(last)
    assert schedule(20, 20, 4, end=0.001) == pytest.approx(0.001)
    assert schedule(3, 4, 4) == 0.75 and schedule(4, 4, 4) == 1  # nothing but warm-up


def test_lars_by_hand():
    w, b = torch.nn.Parameter(torch.tensor([[3., 4]])), torch.nn.Parameter(torch.tensor([2.]))
    zero = torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = common.LARS([w, b, zero], lr=10.0, momentum=0.9, weight_decay=0.1, trust=0.001)
    for p, gradient in ((w, [[0., 2]]), (b, [0.5]), (zero, [[1., 0]])):
        p.grad = torch.tensor(gradient)
    optimizer.step()
    # u = g + 0.1 w = (0.3, 2.4); |w| 5: u is multiplied by 0.001 * 5 / |u|
    step = 0.005 * np.array([0.3, 2.4]) / math.hypot(0.3, 2.4)
    w_by_hand = np.array([3, 4]) - 10 * step
    torch.testing.assert_close(w.data[0], torch.tensor(w_by_hand).float())
    assert b.item() == pytest.approx(2 - 10 * 0.5) and zero.tolist() == [[-10, 0]]
    w.grad, b.grad, zero.grad = torch.zeros(1, 2), torch.tensor([1.0]), None
    optimizer.step()  # without a gradient u is the decay alone: 0.001 w; and 0.9 of the last step
    w_by_hand = w_by_hand - 10 * (0.9 * step + 0.001 * w_by_hand)
    torch.testing.assert_close(w.data[0], torch.tensor(w_by_hand).float())
    assert b.item() == pytest.approx(-3 - 10 * (0.9 * 0.5 + 1))
    b.grad = torch.ones(1)
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7  # of a loop that evaluates the loss so
    assert b.item() == pytest.approx(-3 - 10 * (0.9 * 0.5 + 1) - 10 * (0.9 * 1.45 + 1))
    again = common.LARS([w, b, zero], lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(again.state[b]["momentum_buffer"], torch.tensor([2.305]))


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1])
def test_lars_is_the_authors_step(decay):
    """The steps of Barlow Twins', VICReg's and SoCo's code, number by number: u = g + decay w,
    u <- eta |w| / |u| u, mu <- 0.9 mu + u, w <- w - lr mu, with another lr at each step."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = common.LARS([ours], lr=0.0, momentum=0.9, weight_decay=decay, trust=0.001)
    w, mu = ours.detach().numpy().copy(), np.zeros((3, 4))
    for lr in (0.0, 1.6, 3.2, 0.5):
        g = np.random.default_rng(int(10 * lr)).normal(size=(3, 4))
        u = g + decay * w
        u = u * 0.001 * math.sqrt((w ** 2).sum()) / math.sqrt((u ** 2).sum())
        mu = 0.9 * mu + u
        w = w - lr * mu
        ours.grad = torch.tensor(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        np.testing.assert_allclose(ours.detach().numpy(), w, rtol=1e-14, atol=1e-15)


# ---------------------------------------------------------------------------------- two processes


def one_of_two(number, folder):
    with process_group(number, 2, folder):
        assert (common.rank(), common.world_size()) == (number, 2)
        x = torch.tensor([[1.0, 2.0]]) * (number + 1)
        assert common.all_gather(x).tolist() == [[1, 2], [2, 4]]
        total = common.all_reduce_sum(x.requires_grad_())
        assert total.tolist() == [[3, 6]]
        (total ** 2).sum().backward()  # of each process: 2 * total, and the sum of both
        assert x.grad.tolist() == [[12, 24]] and x.tolist() == [[number + 1, 2 * number + 2]]

        queue = common.Queue(5, 2)
        queue.push(torch.full((2, 2), float(number)))
        assert queue.keys[:4, 0].tolist() == [0, 0, 1, 1] and queue.oldest == 4
        queue.push(torch.full((1, 2), 2.0 + number))
        assert queue.keys[:, 0].tolist() == [3, 0, 1, 1, 2]
        with pytest.raises(InputError, match="6 .* 5"):
            queue.push(torch.zeros(3, 2))

        torch.manual_seed(number)  # the order is the first process's
        images, seen = torch.arange(8.0).view(8, 1) + 10 * number, []
        keys = common.encode_shuffled(lambda x: [x * 2, seen.append(x.clone()) or -x], images)
        assert torch.equal(keys[0], images * 2) and torch.equal(keys[1], -images)
        assert 0 < ((seen[0] < 10) == (number == 0)).sum() < 8  # some are the other process's
        assert common.all_gather(seen[0]).unique().numel() == 16

        assert common.batch_norm_groups(4, 16) == 2
        with pytest.raises(InputError, match="3 .* 2"):
            common.batch_norm_groups(3, 12)
        with pytest.raises(InputError, match="15 .* 2"):
            common.batch_norm_groups(2, 15)


def test_two_processes(tmp_path):
    start_processes(one_of_two, (tmp_path,), 2)
