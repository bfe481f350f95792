import argparse
import copy
import fractions
import itertools
import math
import pickle
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import make_photos
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as TF

import common
from common import InputError


# ------------------------------------------------------------------------------------------ images


def test_image_files_finds_every_layout_sorted(tmp_path):
    make_photos(tmp_path / "b" / "deep", 2)
    make_photos(tmp_path / "a with space", 1)
    Image.new("RGB", (5, 4)).save(tmp_path / "ünï.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    images = common.ImageFiles(str(tmp_path))
    assert images.paths == sorted(images.paths) and len(images) == 4
    assert images[0].shape == (3, 60, 80) and images[0].dtype == torch.uint8
    assert len(list(images)) == 4  # iteration ends


def test_image_files_follow_links_to_folders_elsewhere(tmp_path):
    make_photos(tmp_path / "far", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far", target_is_directory=True)
    assert len(common.ImageFiles(str(tmp_path / "data"))) == 2
    make_photos(tmp_path / "data" / "real" / "deep", 2)
    make_photos(tmp_path / "data" / "real", 1)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "real", target_is_directory=True)
    names = common.ImageFiles(str(tmp_path / "data")).names  # each image once
    assert names == ["again/0000.jpg", "again/deep/0000.jpg", "again/deep/0001.jpg",
                     "link/0000.jpg", "link/0001.jpg"]


def test_every_kind_of_image_becomes_rgb_uint8(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    read = {p.name: common.read_image(p) for p in tmp_path.iterdir()}
    assert all(x.shape == (3, 4, 6) and x.dtype == torch.uint8 for x in read.values())
    expected = torch.from_numpy(rgb).permute(2, 0, 1)
    assert torch.equal(read["rgb.png"], expected) and torch.equal(read["alpha.png"], expected)
    assert torch.equal(read["gray.png"], expected[:1].expand(3, -1, -1))
    assert torch.equal(read["deep.png"], expected[:1].expand(3, -1, -1))


def test_a_broken_image_is_marked_and_replaced(tmp_path):
    make_photos(tmp_path, 4)
    whole = (tmp_path / "0001.jpg").read_bytes()
    (tmp_path / "0001.jpg").write_bytes(whole[:len(whole) // 2])  # truncated
    (tmp_path / "0002.jpg").write_text("a text")
    images = common.ImageFiles(str(tmp_path))
    assert torch.equal(images[1], images[3]) and torch.equal(images[2], images[3])
    assert images.broken.tolist() == [False, True, True, False]
    for i in (0, 3):
        (tmp_path / f"000{i}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 4 images"):
        common.ImageFiles(str(tmp_path))[0]


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        common.ImageFiles(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no images below"):
        common.ImageFiles(str(tmp_path))


# ------------------------------------------------------------------------------------------- views


def coordinate_image(height, width):
    """Channel 0 holds x, channel 1 holds y, of the pixel's centre."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


@pytest.mark.parametrize("height, width, size", [(200, 250, 32), (101, 64, 48), (40, 240, 16)])
def test_crop_boxes_say_where_the_pixels_come_from(height, width, size):
    image = coordinate_image(height, width)
    torch.manual_seed(0)
    flips, shares = 0, []
    for _ in range(200):
        view = common.random_resized_crop(image, size, scale=(0.2, 1.0))
        assert view.pixels.shape == (3, size, size) and view.pixels.dtype == torch.uint8
        x1, y1, x2, y2 = view.box.tolist()
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        flips += view.flipped
        shares.append((x2 - x1) * (y2 - y1) / (width * height))
        x, y = view.pixels[0].float().mean(0), view.pixels[1].float().mean(1)  # (size,) each
        x = x.flip(0) if view.flipped else x
        inside = slice(2, -2)  # the resampling filter is cut off at the border
        centres = (torch.arange(size) + 0.5) / size
        assert (x - (x1 + centres * (x2 - x1) - 0.5)).abs()[inside].max() < 1.1
        assert (y - (y1 + centres * (y2 - y1) - 0.5)).abs()[inside].max() < 1.1
    assert 70 < flips < 130
    if height * 2 > width:  # a long strip cannot give large crops of these ratios
        assert min(shares) > 0.17 and max(shares) > 0.8


def draw(image):
    return common.random_resized_crop(image, 16), common.random_resized_crop(image, 24)


def views_of(data, workers, steps=range(3, 9), seed=5):
    return list(common.load_batches(data, draw, 8, steps, seed, workers))


def test_views_depend_on_seed_epoch_and_image_alone(photos):
    data = common.ImageFiles(str(photos))
    data.paths = data.paths[:20]  # 2 batches of 8 an epoch: steps 3..8 cross epochs
    zero = views_of(data, 0)
    assert isinstance(zero[0][0], common.View) and zero[0][0].flipped.dtype == torch.bool
    assert zero[0][1].pixels.shape == (8, 3, 24, 24) and zero[0][0].box.shape == (8, 4)
    for workers in (1, 4):
        for ours, theirs in zip(zero, views_of(data, workers)):
            for a, b in zip(ours, theirs):
                assert all(torch.equal(x, y) for x, y in zip(a, b))
    later = views_of(data, 0, range(6, 9))  # resumed: the same steps
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(zero[3:], later))
    assert not torch.equal(zero[1][0].pixels, zero[3][0].pixels)  # another epoch
    assert not torch.equal(zero[0][0].pixels, views_of(data, 0, seed=6)[0][0].pixels)


def test_an_epoch_visits_images_once():
    data = torch.arange(23)
    steps = list(common.load_batches(data, lambda x: x, 5, range(8), 0, 0))
    for epoch in (torch.cat(steps[:4]), torch.cat(steps[4:])):
        assert len(epoch.unique()) == 20
    assert not torch.equal(torch.cat(steps[:4]), torch.cat(steps[4:]))


# ------------------------------------------------------------------------------------------ colour


@pytest.mark.parametrize("ours, theirs, factors", [
    (common.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (common.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (common.adjust_saturation, TF.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (common.adjust_hue, TF.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.5])])
def test_colour_operations_equal_torchvisions(ours, theirs, factors):
    x = torch.rand(5, 3, 33, 20, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]  # grays, black, white and ties between channels
    x[:, :, 1], x[:, :, 2] = 0, 1
    x[:, 0, 3], x[:, 1, 4] = x[:, 1, 3], x[:, 2, 4]
    got = ours(x, torch.tensor(factors))
    for image, factor, result in zip(x, factors, got):
        torch.testing.assert_close(result, theirs(image, factor), atol=2e-6, rtol=0)


def test_blur_equals_torchvisions():
    x = torch.rand(4, 3, 30, 21, generator=torch.Generator().manual_seed(0))
    sigmas = [0.1, 0.5, 1.3, 2.0]
    got = common.gaussian_blur(x, torch.tensor(sigmas))
    for image, sigma, result in zip(x, sigmas, got):
        expected = TF.gaussian_blur(image, [13, 13], [sigma, sigma])
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def denormalised(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return x * std + mean


def test_photometric_without_chances_only_normalises():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    x = common.photometric(pixels, p_jitter=0, p_gray=0, p_blur=0)
    assert x.dtype == torch.float32
    expected = TF.normalize(pixels / 255, common.IMAGENET_MEAN, common.IMAGENET_STD)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
    mean, std = [0.1, 0.2, 0.3], (0.5, 0.6, 0.7)
    x = common.photometric(pixels, p_jitter=0, p_gray=0, p_blur=0, mean=mean, std=std)
    torch.testing.assert_close(x, TF.normalize(pixels / 255, mean, std), atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_normalisation_is_that_of_all_pixels(tmp_path, capsys, workers):
    make_photos(tmp_path / "data", 4)
    make_photos(tmp_path / "data" / "large", 3, size=(300, 200), seed=1)
    images = common.ImageFiles(tmp_path / "data")
    pixels = torch.cat([image.flatten(1) for image in images], dim=1).double() / 255  # (3, all)
    (tmp_path / "data" / "large" / "9.jpg").write_bytes(b"no image")
    images = common.ImageFiles(tmp_path / "data")
    with pytest.raises(InputError, match=r"1 of 8 images cannot be decoded: over 1% \(.*9.jpg' is"):
        common.measure_normalisation(images, workers)
    images.paths = [*images.paths[:-1] * 15, images.paths[-1]]  # 1 of 106
    images.broken = images.broken.new_zeros(106).share_memory_()
    mean, std = common.measure_normalisation(images, workers)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-9)
    assert capsys.readouterr().out == (
        f"cannot decode {images.paths[-1]!r}: left out\n105 images:  "
        f"--mean {' '.join(f'{v:.4f}' for v in mean)} --std {' '.join(f'{v:.4f}' for v in std)}\n")


def test_photometric_chances_and_strengths_are_each_images_own():
    torch.manual_seed(0)
    one = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(400, -1, -1, -1)
    plain = one[0] / 255

    def changed(**chances):
        none = dict(p_jitter=0, p_gray=0, p_blur=0)
        x = denormalised(common.photometric(one, **{**none, **chances}))
        return x, (x - plain).abs().amax((1, 2, 3)) > 1e-3

    x, hit = changed(p_jitter=0.8)
    assert 280 < hit.sum() < 360
    assert len({round(v, 5) for v in x[hit].mean((1, 2, 3)).tolist()}) > 0.9 * int(hit.sum())
    x, hit = changed(p_gray=0.2)
    assert 50 < hit.sum() < 115
    assert (x[hit] - x[hit][:, :1]).abs().max() < 1e-5
    torch.testing.assert_close(x[hit][0, 0], TF.rgb_to_grayscale(plain)[0], atol=1e-5, rtol=0)
    x, hit = changed(p_blur=0.5)
    spread = x.flatten(1).std(1)
    assert 150 < hit.sum() < 240 and spread[hit].std() > 0.01  # sigmas differ
    x, hit = changed(p_solarize=0.2)
    assert 50 < hit.sum() < 115
    torch.testing.assert_close(x[hit][0], TF.solarize(plain, 0.5), atol=1e-5, rtol=0)


def test_photometric_strengths_stay_in_their_ranges():
    torch.manual_seed(0)
    flat = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8)
    off = dict(p_gray=0, p_blur=0, p_jitter=1)
    bright = denormalised(common.photometric(flat, jitter=(0.4, 0, 0, 0), **off))
    bright = bright.mean((1, 2, 3)) * 2.55  # (500,)
    assert 0.59 < bright.min() < 0.63 and 1.37 < bright.max() < 1.41
    assert abs(bright.mean() - 1) < 0.03
    red = flat * torch.tensor([1, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    hue = denormalised(common.photometric(red, jitter=(0, 0, 0, 0.1), **off))
    hue = hue[:, :, 0, 0]  # (500, 3)
    shift = (hue[:, 1] - hue[:, 2]) * 2.55 / 6  # 100 to 1 of a sixth of the circle
    assert -0.101 < shift.min() < -0.09 and 0.09 < shift.max() < 0.101


def test_photometric_order_varies_with_the_batch():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    calls = []
    names = "adjust_brightness", "adjust_contrast", "adjust_hue"
    originals = {name: getattr(common, name) for name in names}
    try:
        for name, function in originals.items():
            setattr(common, name, lambda *a, n=name, f=function: (calls.append(n), f(*a))[1])
        for seed in range(20):
            torch.manual_seed(seed)
            common.photometric(pixels)
    finally:
        for name, function in originals.items():
            setattr(common, name, function)
    assert len({tuple(calls[i:i + 3]) for i in range(0, 60, 3)}) == 6


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
    for name in ("swin_x", "swin3d_t", "resnet19"):
        with pytest.raises(InputError, match="unknown architecture"):
            common.backbone_stages(name)
    assert isinstance(common.backbone_stages("resnet18"), common.ResNetStages)


def test_split_batch_norm_equals_one_module_a_group():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, requires_grad=True)
    weights = torch.randn(12, 5, 4, 4)
    split = common.SplitBatchNorm(5, groups=3)
    nn.init.normal_(split.weight), nn.init.normal_(split.bias)
    parts = [nn.BatchNorm2d(5) for _ in range(3)]
    for part in parts:
        part.load_state_dict(split.state_dict())
    y = split(x)
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


# ---------------------------------------------------------------------------------------- contrast


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=1)


def literal_info_nce(q, k, negatives, tau):
    """Loss and its gradient to q, from the equation, one float at a time."""
    total, gradient = 0.0, np.zeros(q.shape)
    q, k, negatives = (x.double().numpy() for x in (q, k, negatives))
    for i in range(len(q)):
        scores = [math.exp(sum(a * b for a, b in zip(q[i], k[i])) / tau)]
        for n in negatives:
            scores.append(math.exp(sum(a * b for a, b in zip(q[i], n)) / tau))
        total += -math.log(scores[0] / sum(scores))
        for vector, score in zip([k[i], *negatives], scores):
            gradient[i] += score / sum(scores) * vector / tau / len(q)
        gradient[i] -= k[i] / tau / len(q)
    return total / len(q), gradient


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_info_nce_equals_a_literal_loop(chunk, tau):
    q, k, negatives = unit(7, 5), unit(7, 5, seed=1), unit(11, 5, seed=2)
    q.requires_grad_()
    loss = common.info_nce(q, k, negatives, tau, chunk=chunk)
    assert loss.shape == () and loss.dtype == torch.float32
    expected, gradient = literal_info_nce(q.detach(), k, negatives, tau)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    got, = torch.autograd.grad(3 * loss, q)
    np.testing.assert_allclose(got.numpy(), 3 * gradient, atol=1e-5)


def test_info_nce_by_hand():
    q = torch.tensor([[1.0, 0.0]])
    # exp(1) against exp(1) + exp(0) + exp(-1)
    loss = common.info_nce(q, q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), tau=1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + 1 / math.e)), abs=1e-6)
    assert common.info_nce(q[:0], q[:0], q, tau=1.0).item() == 0


def test_info_nce_is_float32_under_autocast_and_for_bfloat16():
    q, k, negatives = unit(6, 8), unit(6, 8, seed=1), unit(9, 8, seed=2)
    plain = common.info_nce(q, k, negatives, 0.2)
    for chunk in (None, 2):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = common.info_nce(q, k, negatives, 0.2, chunk=chunk)
        torch.testing.assert_close(mixed, plain)
    assert common.info_nce(q.bfloat16(), k.bfloat16(), negatives, 0.2).dtype == torch.float32


def test_info_nce_memory_does_not_grow_with_rows():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (list, tuple)) else [out]:
                if torch.is_tensor(t):
                    self.numel = max(self.numel, t.numel())
            return out

    q, k, negatives = unit(512, 4).requires_grad_(), unit(512, 4, seed=1), unit(300, 4, seed=2)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        common.info_nce(q, k, negatives, 0.2, chunk=16).backward()
    assert seen.numel == 16 * 300  # never 512 * 300
    assert max(kept) < 16 * 300


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
    online, x = common.mlp(4, 6, 3), torch.randn(5, 4)
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


def test_shuffled_gives_each_image_its_own_key_from_another_group():
    torch.manual_seed(0)
    images = torch.arange(16.0).view(16, 1, 1, 1)
    seen = []

    def encoder(x):
        seen.append(x.flatten().tolist())
        return x * 2

    assert torch.equal(common.shuffled(encoder, images), images * 2)
    assert sorted(seen[0]) == list(range(16)) and seen[0] != list(range(16))
    first, second = common.shuffled(lambda x: [x + 1, x[:, 0]], images)
    assert torch.equal(first, images + 1) and torch.equal(second, images[:, 0])


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


def test_lars_by_hand():
    w, b = torch.nn.Parameter(torch.tensor([[3., 4]])), torch.nn.Parameter(torch.tensor([2.]))
    zero = torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = common.LARS([w, b, zero], lr=10.0, momentum=0.9, weight_decay=0.1, trust=0.001)
    for p, gradient in ((w, [[0., 2]]), (b, [0.5]), (zero, [[1., 0]])):
        p.grad = torch.tensor(gradient)
    optimizer.step()
    # |w| 5, |g| 2: rate 0.001 * 5 / (2 + 0.5) = 0.002; (g + 0.1 w) rate = (0.0006, 0.0048)
    torch.testing.assert_close(w.data, torch.tensor([[3 - 0.006, 4 - 0.048]]))
    assert b.item() == pytest.approx(2 - 10 * 0.5) and zero.tolist() == [[-10, 0]]
    w.grad, b.grad, zero.grad = torch.zeros(1, 2), torch.tensor([1.0]), None
    optimizer.step()  # without a gradient the plain step, of the decay; and 0.9 of the last one
    expected = torch.tensor([[3 - 0.006, 4 - 0.048]])
    expected = expected - 10 * (0.9 * torch.tensor([[0.0006, 0.0048]]) + 0.1 * expected)
    torch.testing.assert_close(w.data, expected)
    assert b.item() == pytest.approx(-3 - 10 * (0.9 * 0.5 + 1))
    again = common.LARS([w, b, zero], lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(again.state[b]["momentum_buffer"], torch.tensor([1.45]))


@pytest.mark.parametrize("number, dim", [(5, 3), (4, 1)])
def test_drawn_correlation_equals_a_loop(tmp_path, number, dim):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, number, dim)
    z2[:, 0] = 0.3  # a constant dimension correlates with nothing
    matrix = common.draw_correlation(z1, z2, tmp_path / "correlation.png")
    for i, j in itertools.product(range(dim), repeat=2):
        a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
        expected = 0 if j == 0 else (a @ b / (a.norm() * b.norm())).item()
        assert matrix[i, j] == pytest.approx(expected, abs=1e-6)


def test_a_drawn_diagonal_is_seen(tmp_path):
    """Also where there are more dimensions than the picture has pixels."""
    z = torch.randn(1024, 600)
    common.draw_correlation(z, z + 0.1 * torch.randn(1024, 600), tmp_path / "correlation.png")
    with Image.open(tmp_path / "correlation.png") as image:
        pixels = np.array(image.convert("RGB"))[:, :330].astype(int)  # without the colour bar
    dark_red = (pixels[..., 0] < 150) & (pixels[..., 0] > 80) & (pixels[..., 1:] < 60).all(-1)
    assert dark_red.sum() > 250 and dark_red.any(0).sum() > 250


# ------------------------------------------------------------------------ checkpoints and backbones


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
        stages = common.resnet_stages(arch, common.SplitBatchNorm)
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
    "our detector": ("backbone.body.", lambda q, k: dict(method="finetune_fasterrcnn", model={
        **under("backbone.body.", without_fc(q)), "roi_heads.box_head.fc6.weight": torch.zeros(8),
        "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(8)}, args={}, step=3, optimizer={})),
}


@pytest.mark.parametrize("name", FILES)
def test_load_backbone_reads_every_naming(tmp_path, capsys, resnets, name):
    prefix, build = FILES[name]
    file, stages, wanted = build(*resnets[:2]), blank("resnet50"), without_fc(resnets[0])
    torch.save(file, tmp_path / "file.pt")
    rest = common.load_backbone(stages, tmp_path / "file.pt")
    said, missing = capsys.readouterr().out, "0 missing,"
    if "detectron2" in name:  # it counts no batches: these stay
        missing = "53 missing (batch norm counters, not needed),"
        wanted = {k: v if v.dim() else torch.tensor(0) for k, v in wanted.items()}
    assert equal(stages.state_dict(), wanted)
    assert said.count("\n") == 1 and f" {missing} {len(rest)} unexpected" in said
    loaded = 265 if "detectron2" in name else 318  # 53 of each of batch norm's 5, and 53 weights
    assert f": {loaded} tensors loaded from '{prefix}*'," in said
    assert ("; not from '" in said) == (name in {"moco", "moco, sorted", "soco", "byol", "swa",
                                                 "ema, sorted", "openselfsup"})
    flat = file.get("state_dict", file.get("model", file))
    flat = flat.get("state_dict", flat)
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
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert common.load_backbone(stages, tmp_path / "file.pt") == {}
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
            (blocks, "holds no ResNet: no conv1.weight and layer1.0.conv1.weight"),
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
            ({**state, "bn1.weight": None}, "bn1.weight is no tensor")]:
        torch.save(file, path)
        with pytest.raises(InputError, match=message) as caught:
            common.load_backbone(stages, path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        common.load_backbone(stages, tmp_path / "none.pt")
    assert not any(v.any() for v in stages.state_dict().values())  # nothing was loaded


def test_load_backbone_of_a_swin(tmp_path, capsys, resnets):
    def small(blocks):
        return torchvision.models.SwinTransformer([4, 4], 8, [1, 1, blocks, 1], [1] * 4, [7, 7])

    path, state, stages = tmp_path / "file.pt", small(2).state_dict(), common.SwinStages(small(2))
    for file, prefix, more in (
            (state, "", 2), (dict(model=under("module.stages.", state)), "module.stages.", 2),
            ({k: v for k, v in state.items() if "head" not in k}, "", 0)):
        for p in stages.parameters():
            nn.init.zeros_(p)
        torch.save(file, path)
        assert len(common.load_backbone(stages, path)) == more
        assert equal(stages.state_dict(), {k: v for k, v in state.items() if "head" not in k})
        assert f"tensors loaded from '{prefix}*', 0 missing, {more} unex" in capsys.readouterr().out
    common.export_backbone(stages, path)
    found = small(2).load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert found.missing_keys == ["head.weight", "head.bias"] and not found.unexpected_keys
    for file, message in (
            (small(3).state_dict(), "features.5.2.norm1.weight has no place"),
            ({k: v for k, v in state.items() if k != "norm.bias"}, "norm.bias is missing"),
            (resnets[2], "holds no Swin Transformer: no features.0.0.weight")):
        torch.save(file, path)
        with pytest.raises(InputError, match=message):
            common.load_backbone(stages, path)
    torch.save(state, path)
    with pytest.raises(InputError, match="holds no ResNet"):
        common.load_backbone(blank("resnet18"), path)


def test_what_is_no_file_of_tensors_comes_without_advice(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    zipped = path.read_bytes()
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    for content in (b"", b"not a checkpoint", b"<html>", b"collections\nOrderedDict\n", zipped[:99],
                    zipped[:-99], path.read_bytes()[:20], path.read_bytes()[:-99],
                    pickle.dumps({"a": np.zeros(9)})[:-9]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="holds no tensors that can be read: .") as caught:
            common.load_checkpoint(path)
        assert "python" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["detectron2's pickle", "torch's", "a module"])
def test_a_refused_pickle_comes_with_the_command_that_converts_it(tmp_path, recwarn, resnets, kind,
                                                                  monkeypatch):
    path = tmp_path / "it's \"my\" $file \U0001f600.pkl"
    if kind == "detectron2's pickle":
        content = {k: v.numpy() for k, v in as_detectron2(resnets[2]).items()}
        path.write_bytes(pickle.dumps(dict(model=content, __author__="MOCO")))
        reason = "a bare pickle"
    elif kind == "a module":
        module = torchvision.models.resnet18()
        module.load_state_dict(resnets[2])
        torch.save(module, path)
        reason = "torchvision.models.resnet.ResNet"
    else:
        content = dict(state_dict=dict(under("module.encoder_q.", resnets[2]), author="MoCo"))
        torch.save(dict(content, arguments=fractions.Fraction(1)), path)
        reason = "fractions.Fraction"
    stages = blank("resnet18")
    with pytest.raises(InputError, match=f"more than tensors .{reason}.*if you trust it") as caught:
        common.load_backbone(stages, path)
    line = str(caught.value)
    assert "\n" not in line and not recwarn.list and line.endswith(f" in {path}.tensors.pt")
    command = line[line.index("python -c"):line.index(" keeps its tensors")]
    if kind == "a module":  # as a shell runs it
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    else:
        _, c, code, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [c, *words])
        exec(code, {})
    common.load_backbone(stages, f"{path}.tensors.pt")
    assert all(torch.equal(v, stages.state_dict()[k]) for k, v in without_fc(resnets[2]).items()
               if "num_batches" not in k)


def test_export_gives_torchvision_a_file_it_loads(tmp_path):
    stages = common.resnet_stages("resnet18", lambda c: common.SplitBatchNorm(c, groups=2))
    stages.train()(torch.randn(4, 3, 32, 32))  # statistics move
    stages.to(memory_format=torch.channels_last)
    common.export_backbone(stages, tmp_path / "backbone.pt")
    resnet = torchvision.models.resnet18()
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    found = resnet.load_state_dict(state, strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys
    x = torch.randn(2, 3, 32, 32)
    resnet.fc = nn.Identity()
    torch.testing.assert_close(resnet.eval()(x), stages.eval()(x)[-1].mean((2, 3)))


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    path = tmp_path / "evil.pt"
    for advice, write in [
            ("torch.load", lambda: torch.save({"conv1.weight": Evil()}, path)),
            ("torch.load", lambda: torch.save(  # as before PyTorch 1.6
                {"conv1.weight": Evil()}, path, _use_new_zipfile_serialization=False)),
            ("pickle.load", lambda: path.write_bytes(pickle.dumps(Evil())))]:
        write()
        with pytest.raises(InputError, match=f"unpickling it can run code.* d = {advice}"):
            common.load_checkpoint(path)
        assert not (tmp_path / "written").exists()


def test_save_checkpoint_is_whole_or_not_at_all(tmp_path):
    common.save_checkpoint(tmp_path / "c.pt", step=1)

    class Fails:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        common.save_checkpoint(tmp_path / "c.pt", step=2, bad=Fails())
    assert common.load_checkpoint(tmp_path / "c.pt") == {"step": 1}
