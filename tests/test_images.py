import itertools
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import coordinates, make_photos, process_group, start_processes
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF
from torchvision.transforms.v2.functional import resized_crop

import detco
import dupr
import soco
from common import InputError, View
from plumbing import images as im
from plumbing.files import ImageFiles, ImageFolder
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD, augment_colour


def test_images_of_a_folder_or_built_in_scenes(photos):
    folder, scenes = im.open_images(str(photos), 5), im.open_images(None, 5)
    assert len(folder) == 120 and len(scenes) == len(scenes.names) == 5
    for images, shape in ((folder, (3, 60, 80)), (scenes, (3, 96, 96))):
        index, image = images.numbered(4)
        assert index == 4 and torch.equal(image, images[4]) and image.shape == shape


# ------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("height, width, size", [(200, 250, 32), (101, 64, 48), (40, 240, 16)])
def test_crop_boxes_say_where_the_pixels_come_from(height, width, size):
    image = coordinates(width, height)
    torch.manual_seed(0)
    flips, shares = 0, []
    for _ in range(200):
        view = im.random_resized_crop(image, size, scale=(0.2, 1.0))
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


def test_two_views_are_two_independent_crops():
    image = coordinates(80, 60)
    torch.manual_seed(0)
    views = im.two_views(image, 16, (0.3, 0.9))
    torch.manual_seed(0)
    for view in views:
        expected = im.random_resized_crop(image, 16, (0.3, 0.9))
        assert torch.equal(view.pixels, expected.pixels) and torch.equal(view.box, expected.box)
    assert not torch.equal(views[0].box, views[1].box) and len(views) == 2


def test_bicubic_crops_are_pils():
    """As Barlow Twins' and VICReg's code cuts and resizes them: PIL's crop, then its BICUBIC."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    photo = noise.resize((300, 200), Image.BICUBIC)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    for size in (32, 224):  # smaller, and larger
        torch.manual_seed(0)
        views = im.two_views(image, size, (0.2, 0.5), "bicubic")
        torch.manual_seed(0)
        plain = im.two_views(image, size, (0.2, 0.5))
        for view, bilinear in zip(views, plain):
            box = [round(side) for side in view.box.tolist()]
            theirs = photo.crop(box).resize((size, size), Image.BICUBIC)
            theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
            ours = view.pixels.flip(-1) if view.flipped else view.pixels
            apart = (ours.int() - theirs.int()).abs()  # PIL rounds once more, between the axes
            assert apart.max() <= 2 and apart.float().mean() < 0.5
            top, left, height, width = box[1], box[0], box[3] - box[1], box[2] - box[0]
            again = resized_crop(image, top, left, height, width, [size, size],
                                 InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(ours, again) and torch.equal(view.box, bilinear.box)
            assert (view.pixels.int() - bilinear.pixels.int()).abs().float().mean() > 0.2


@pytest.mark.parametrize("width, height, scale", [
    (300, 200, (0.2, 1.0)), (57, 64, (0.08, 0.5)), (240, 40, (0.3, 1.0)), (100, 800, (0.2, 1.0))])
def test_rectangles_are_distributed_as_torchvisions(width, height, scale):
    torch.manual_seed(0)
    image, number = torch.empty(3, height, width), 3000
    theirs, ours, coins = [], [], 0
    for _ in range(number):
        y, x, h, w = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        theirs.append([x, y, w, h, x + w, w * h, w / h])
        (x1, y1, x2, y2), coin = im.random_rectangle(width, height, scale)
        ours.append([x1, y1, x2 - x1, y2 - y1, x2, (x2 - x1) * (y2 - y1), (x2 - x1) / (y2 - y1)])
        coins += coin
    for a, b in zip(np.array(theirs).T, np.array(ours).T):
        values = np.union1d(a, b)  # the greatest distance of the two distribution functions
        below = [np.searchsorted(np.sort(x), values, side="right") / number for x in (a, b)]
        assert np.abs(below[0] - below[1]).max() < 1.95 * np.sqrt(2 / number)  # p 0.001
    assert abs(coins / number - 0.5) < 0.03


def draw(image):
    return im.random_resized_crop(image, 16), im.random_resized_crop(image, 24)


def views_of(data, workers, steps=range(3, 9), seed=5):
    return list(im.load_batches(data, draw, 8, steps, seed, workers))


def test_views_depend_on_seed_epoch_and_image_alone(photos):
    data = ImageFolder(photos)
    data.paths = data.paths[:20]  # 2 batches of 8 an epoch: steps 3..8 cross epochs
    zero = views_of(data, 0)
    assert isinstance(zero[0][0], View) and zero[0][0].flipped.dtype == torch.bool
    assert zero[0][1].pixels.shape == (8, 3, 24, 24) and zero[0][0].box.shape == (8, 4)
    for workers in (1, 2):
        for ours, theirs in zip(zero, views_of(data, workers), strict=True):
            for a, b in zip(ours, theirs):
                assert all(torch.equal(x, y) for x, y in zip(a, b))
    later = views_of(data, 0, range(6, 9))  # resumed: the same steps
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(zero[3:], later, strict=True))
    assert not torch.equal(zero[1][0].pixels, zero[3][0].pixels)  # another epoch
    assert not torch.equal(zero[0][0].pixels, views_of(data, 0, seed=6)[0][0].pixels)


def gradient(path, width, height, **options):
    """A JPEG whose red grows from 0 to 240 with x, and its green with y."""
    x = np.broadcast_to(np.arange(width) * 240 / width, (height, width))
    y = np.broadcast_to(np.arange(height)[:, None] * 240 / height, (height, width))
    pixels = np.stack([x, y, np.full_like(x, 128)], axis=2)
    Image.fromarray(pixels.round().astype(np.uint8)).save(path, quality=95, **options)


@pytest.mark.parametrize("width, height, turned", [
    (1600, 1200, False), (1211, 1605, False), (1200, 1600, True), (2400, 300, False)])
def test_views_of_large_photos_keep_their_resolution_and_their_boxes(
        tmp_path, width, height, turned):
    exif = Image.Exif()
    exif[0x0112] = 3 if turned else 1  # 3: upside down
    gradient(tmp_path / "0.jpg", width, height, exif=exif)
    images, crops = ImageFolder(tmp_path), ((96, 0.2), (40, 0.5))
    args = [module.parse_args(f"--data x --image-size 96 --crop-scale 0.2 {flags}".split())
            for module, flags in ((detco, "--local-size 40 --local-scale 0.5 --patch-size 8"),
                                  (dupr, ""), (soco, "--small-size 40"))]
    cuts = [lambda photo: im.two_views(photo, 96, (0.2, 1.0)),
            lambda photo: im.two_views(photo, 96, (0.2, 1.0), "bicubic"),
            lambda photo: [v.view if isinstance(v, detco.LocalView) else v
                           for v in detco.cut_views(photo, args[0])],
            lambda photo: dupr.cut_views(photo, args[1]),
            lambda photo: soco.make_views((photo, torch.zeros(0, 4)), args[2])[0]]
    photo = im.Photos(images, *crops)[0]
    reduction = width // photo.pixels.shape[2]
    assert reduction == (4 if height > 300 else 2)
    assert photo.box.tolist() == [0, 0, width // reduction * reduction,
                                  height // reduction * reduction]
    for cut in cuts * 5:
        for view in cut(photo):
            x1, y1, x2, y2 = view.box.tolist()
            size = view.pixels.shape[-1]
            assert min(x2 - x1, y2 - y1) >= reduction * size
            assert 0 <= x1 and x2 <= width and 0 <= y1 and y2 <= height
            red, green = view.pixels[0].float().mean(0), view.pixels[1].float().mean(1)  # (size,)
            red = red.flip(0) if view.flipped else red
            centres = (torch.arange(size) + 0.5) / size
            x, y = x1 + centres * (x2 - x1) - 0.5, y1 + centres * (y2 - y1) - 0.5
            if turned:
                x, y = width - 1 - x, height - 1 - y
            inside = slice(2, -2)  # the resampling filter is cut off at the border
            assert (red - x * 240 / width).abs()[inside].max() < 1
            assert (green - y * 240 / height).abs()[inside].max() < 1
    batches = [[*im.load_batches(im.Photos(images, *crops), cuts[0], 1, range(3), 0, workers)]
               for workers in (0, 1)]
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for u, v in zip(a, b) for x, y in zip(u, v))


def test_views_of_reduced_photos_are_nearly_those_of_all_pixels(tmp_path):
    make_photos(tmp_path, 3, size=(1600, 1200))
    files = ImageFolder(tmp_path)
    for i, photo in enumerate(im.Photos(files, (96, 0.2))):
        for _ in range(5):
            view = im.random_resized_crop(photo, 96)
            x1, y1, x2, y2 = view.box.int().tolist()
            whole = resized_crop(files[i], y1, x1, y2 - y1, x2 - x1, [96, 96], antialias=True)
            whole = whole.flip(-1) if view.flipped else whole
            assert photo.pixels.shape == (3, 300, 400)
            assert (whole.int() - view.pixels.int()).abs().float().mean() < 0.5


def test_an_epoch_visits_images_once():
    data = torch.arange(23)
    steps = list(im.load_batches(data, lambda x: x, 5, range(8), 0, 0))
    for epoch in (torch.cat(steps[:4]), torch.cat(steps[4:])):
        assert len(epoch.unique()) == 20
    assert not torch.equal(torch.cat(steps[:4]), torch.cat(steps[4:]))


def test_seeds_of_several_numbers():
    seeds = {im.seed_for(*numbers) for numbers in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27 and all(0 <= seed < 2 ** 64 for seed in seeds)
    assert im.seed_for(3, 2 ** 40) == im.seed_for(3, 2 ** 40)


# ------------------------------------------------------------------------------------------ colour


@pytest.mark.parametrize("ours, theirs, factors", [
    (im.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_saturation, TF.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_hue, TF.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.5])])
def test_colour_operations_equal_torchvisions(ours, theirs, factors):
    x = torch.rand(5, 3, 33, 20, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]  # greys, black, white and ties between channels
    x[:, :, 1], x[:, :, 2] = 0, 1
    x[:, 0, 3], x[:, 1, 4] = x[:, 1, 3], x[:, 2, 4]
    got = ours(x, torch.tensor(factors))
    for image, factor, result in zip(x, factors, got):
        torch.testing.assert_close(result, theirs(image, factor), atol=2e-6, rtol=0)


def test_blur_equals_torchvisions():
    x = torch.rand(4, 3, 30, 21, generator=torch.Generator().manual_seed(0))
    sigmas = [0.1, 0.5, 1.3, 2.0]
    got = im.gaussian_blur(x, torch.tensor(sigmas))
    for image, sigma, result in zip(x, sigmas, got):
        expected = TF.gaussian_blur(image, [13, 13], [sigma, sigma])
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


PLAIN = dict(p_jitter=0, p_grey=0, p_blur=0)


def denormalised(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return x * std + mean


def test_without_chances_colours_are_only_normalised():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    x = augment_colour(pixels, **PLAIN)
    assert x.dtype == torch.float32
    expected = TF.normalize(pixels / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
    mean, std = [0.1, 0.2, 0.3], (0.5, 0.6, 0.7)
    x = augment_colour(pixels, **PLAIN, mean=mean, std=std)
    torch.testing.assert_close(x, TF.normalize(pixels / 255, mean, std), atol=1e-5, rtol=0)


def test_chances_and_strengths_are_each_images_own():
    torch.manual_seed(0)
    one = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(400, -1, -1, -1)
    plain = one[0] / 255

    def changed(**chances):
        x = denormalised(augment_colour(one, **{**PLAIN, **chances}))
        return x, (x - plain).abs().amax((1, 2, 3)) > 1e-3

    x, hit = changed(p_jitter=0.8)
    assert 280 < hit.sum() < 360
    assert len({round(v, 5) for v in x[hit].mean((1, 2, 3)).tolist()}) > 0.9 * int(hit.sum())
    x, hit = changed(p_grey=0.2)
    assert 50 < hit.sum() < 115
    assert (x[hit] - x[hit][:, :1]).abs().max() < 1e-5
    torch.testing.assert_close(x[hit][0, 0], TF.rgb_to_grayscale(plain)[0], atol=1e-5, rtol=0)
    x, hit = changed(p_blur=0.5)
    spread = x.flatten(1).std(1)
    assert 150 < hit.sum() < 240 and spread[hit].std() > 0.01  # sigmas differ
    x, hit = changed(p_solarize=0.2)
    assert 50 < hit.sum() < 115
    torch.testing.assert_close(x[hit][0], TF.solarize(plain, 0.5), atol=1e-5, rtol=0)


def test_strengths_stay_in_their_ranges():
    torch.manual_seed(0)
    flat = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8)
    off = dict(PLAIN, p_jitter=1)
    bright = denormalised(augment_colour(flat, jitter=(0.4, 0, 0, 0), **off))
    bright = bright.mean((1, 2, 3)) * 2.55  # (500,)
    assert 0.59 < bright.min() < 0.63 and 1.37 < bright.max() < 1.41
    assert abs(bright.mean() - 1) < 0.03
    red = flat * torch.tensor([1, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    hue = denormalised(augment_colour(red, jitter=(0, 0, 0, 0.1), **off))
    hue = hue[:, :, 0, 0]  # (500, 3)
    shift = (hue[:, 1] - hue[:, 2]) * 2.55 / 6  # 100 to 1 of a sixth of the circle
    assert -0.101 < shift.min() < -0.09 and 0.09 < shift.max() < 0.101
    grey = flat.clone()
    grey[..., :4] = 60
    contrast = denormalised(augment_colour(grey, jitter=(0, 0.4, 0, 0), **off))
    gap = (contrast[:, 0, 0, 7] - contrast[:, 0, 0, 0]) * 255 / 40  # (500,)
    assert 0.59 < gap.min() < 0.63 and 1.37 < gap.max() < 1.41
    same = denormalised(augment_colour(grey, jitter=(0, 0, 0.4, 0), **off))  # nothing to change
    torch.testing.assert_close(same, grey / 255, atol=1e-4, rtol=0)


def test_sigmas_of_the_blur(monkeypatch):
    torch.manual_seed(0)
    flat, seen = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8), []
    monkeypatch.setattr(im, "gaussian_blur", lambda x, sigma: seen.append(sigma) or x)
    augment_colour(flat, **dict(PLAIN, p_blur=1))
    sigma, = seen
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.1)


def test_the_order_of_the_jitter_varies_with_the_batch(monkeypatch):
    pixels, calls = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), []

    def recorded(name, function):
        def operation(x, change):
            calls.append(name)
            return function(x, change)

        return operation

    for name in ("adjust_brightness", "adjust_contrast", "adjust_hue"):
        monkeypatch.setattr(im, name, recorded(name, getattr(im, name)))
    for seed in range(20):
        torch.manual_seed(seed)
        augment_colour(pixels)
    assert len({tuple(calls[i:i + 3]) for i in range(0, 60, 3)}) == 6


# ---------------------------------------------------------------------------------- normalisation


def some_broken(folder):
    """Small and large photos, 1 of 106 broken -> the images, the mean and the deviation of all
    pixels that can be decoded, (3,) each."""
    make_photos(folder, 4)
    make_photos(folder / "large", 3, size=(300, 200), seed=1)
    whole = ImageFolder(folder)
    pixels = torch.cat([image.flatten(1) for image in whole], dim=1).double() / 255  # (3, all)
    broken = folder / "large" / "9.jpg"
    broken.write_bytes(b"no image")
    images = ImageFiles([*whole.paths * 15, str(broken)])
    return images, pixels.mean(1).tolist(), pixels.std(1, correction=0).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_normalisation_is_that_of_all_pixels(tmp_path, capsys, workers):
    images, mean, std = some_broken(tmp_path)
    found = im.measure_normalisation(images, workers)
    assert found[0] == pytest.approx(mean, rel=1e-12) and found[1] == pytest.approx(std, rel=1e-9)
    *_, broken, result = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"cannot decode {images.paths[-1]!r} (cannot identify image file ")
    assert broken.endswith("): left out (1 of 106 so far)")
    assert result == (f"105 images:  --mean {' '.join(f'{v:.4f}' for v in mean)} "
                      f"--std {' '.join(f'{v:.4f}' for v in std)}")
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="^3 of 10 images cannot be decoded: over 1%$"):
        im.measure_normalisation(ImageFolder(tmp_path), workers)


def test_normalisation_of_scenes(capsys):
    scenes = im.open_images(None, 3)
    pixels = torch.cat([image.flatten(1) for image in scenes], dim=1).double() / 255
    mean, std = im.measure_normalisation(scenes)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-9)
    assert capsys.readouterr().out.startswith("3 images:  --mean 0.")


# ---------------------------------------------------------------------------------- two processes


def one_of_two(number, folder, images, mean, std):
    with process_group(number, 2, folder), open(folder / f"{number}.txt", "w") as out, \
            redirect_stdout(out):
        found = im.measure_normalisation(images)  # half of them each
        assert found[0] == pytest.approx(mean, rel=1e-12)
        assert found[1] == pytest.approx(std, rel=1e-9)
        one = ImageFiles(images.paths[:1])  # none for the second process
        expected = one[0].flatten(1).double().mean(1) / 255
        assert im.measure_normalisation(one)[0] == pytest.approx(expected.tolist(), rel=1e-12)

        files, said = ImageFiles(images.paths[:-1] * 2), []
        for i in (5, 70, 150, 200):
            files.paths[i] = images.paths[-1]
        files[(70, 150)[number]]
        files.report(said.append, "left out")
        files.report(said.append, "left out")
        assert len(said) == (2 if number == 0 else 0)
        assert all("9.jpg' (cannot identify" in line and "(2 of 210 so far)" in line
                   for line in said)
        files[(5, 200)[number]]
        with pytest.raises(InputError, match="4 of 210 images cannot be decoded: over 1%"):
            files.report(said.append, "left out")

        numbers = torch.arange(23)
        shares = torch.stack([*im.load_batches(numbers, lambda x: x, 6, range(8), 0, 0)])  # (8, 3)
        torch.save(shares, folder / f"{number}.pt")
        with pytest.raises(InputError, match="batch size 5 does not divide over 2 processes"):
            im.steps_per_epoch(numbers, 5)


def test_two_processes_share_the_images_and_say_what_is_broken_once(tmp_path):
    images, mean, std = some_broken(tmp_path / "data")
    start_processes(one_of_two, (tmp_path, images, mean, std), 2)
    out = (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""
    assert out.count("cannot decode") == 1  # whichever of them found it
    assert out.count("105 images:  --mean ") == out.count("1 images:  --mean ") == 1
    shares = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    whole = torch.stack([*im.load_batches(torch.arange(23), lambda x: x, 6, range(8), 0, 0)])
    assert torch.equal(torch.cat(shares, dim=1), whole)  # in rank order
    with pytest.raises(InputError, match="batch size 24 is more than all 23 images"):
        im.steps_per_epoch(torch.arange(23), 24)
