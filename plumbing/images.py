"""Views of images and their colours, and batches that depend on (seed, step) alone.

The way of an image: file -> loader worker: decode, cut the views with their exact rectangles
(uint8) -> batch -> device: colour, blur, normalise, for the whole batch at once.
"""
import math
import os
import signal
import threading
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common import InputError, View, all_reduce_sum, rank, world_size
from plumbing.files import ImageFiles, ImageFolder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seed_for(*numbers):
    """One 64-bit seed from several non-negative integers, such as (seed, epoch, image)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def open_images(data, scenes):
    """The images below the folder ``data``, or, if it is None, that many built-in scenes: a Dataset
    of (3, H, W) uint8 with ``names`` and ``numbered`` as ImageFolder has them."""
    if data is not None:
        return ImageFolder(data)
    try:
        from scenes import Scenes
    except ModuleNotFoundError:
        raise InputError("there is no scenes.py here to draw images: give --data") from None
    return Scenes(scenes, size=96, seed=0, cache=True)


# ------------------------------------------------------------------- views and batches (in workers)


def as_view(image, reduction=1):
    """All of an image (3, h, w), decoded at 1 / reduction of its size, as a View; a View itself."""
    if isinstance(image, View):
        return image
    corner = reduction * image.shape[2], reduction * image.shape[1]
    return View(image, torch.tensor([0, 0, *corner], dtype=torch.float32), False)


class Photos(Dataset):
    """Item i: a View of all of image i, of which a method cuts its views.

    images: as open_images gives them; crops: (side in pixels, least share of the image) of each
    kind of view.  Large JPEGs are decoded at a part of their size, of which every crop still has as
    many pixels as its view; the boxes of the Views are in the pixels of the files.
    """

    def __init__(self, images, *crops):
        self.images, self.crops = images, crops

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.numbered(index)[1]

    def numbered(self, index):
        """Image ``index``, or the one that takes its place -> its index, the View."""
        if not isinstance(self.images, ImageFiles):
            i, image = self.images.numbered(index)
            return i, as_view(image)
        i, *image = self.images.reduced(index, self.crops)
        return i, as_view(*image)


def random_rectangle(width, height, scale):
    """A random rectangle of an image, (x1, y1, x2, y2) in whole pixels, and whether to mirror it.

    Its share of the area is uniform in ``scale``, log(width / height) between those of 3/4 and 4/3;
    of ten such the first that fits into the image, or else the largest in its middle: the
    distribution of torchvision's RandomResizedCrop, with one call for all random numbers.
    """
    *shapes, x, y, mirror = torch.rand(23).tolist()
    for share, ratio in zip(shapes[::2], shapes[1::2]):
        side = math.sqrt((scale[0] + share * (scale[1] - scale[0])) * width * height)
        root = (4 / 3) ** (ratio - 0.5)  # sqrt(w / h)
        w, h = round(side * root), round(side / root)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h), mirror < 0.5


def random_resized_crop(image, size, scale=(0.2, 1.0), interpolation="bilinear"):
    """A random rectangle of the image (3, H, W) uint8, resized to size x size, flipped with p 0.5.

    image: or a View of all of it; scale: the rectangle's share of its area; width / height is 3/4
    to 4/3; interpolation: as F.interpolate takes it.  Returns a View.
    """
    whole = as_view(image)
    height, width = whole.pixels.shape[1:]
    (x1, y1, x2, y2), flipped = random_rectangle(width, height, scale)
    # as PIL's memory holds the pixels: torch is quick with these alone
    crop = whole.pixels[None, :, y1:y2, x1:x2].contiguous(memory_format=torch.channels_last)
    pixels = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]
    reduction = whole.box[2] / width
    box = reduction * torch.tensor([x1, y1, x2, y2], dtype=torch.float32)
    return View(pixels.flip(-1) if flipped else pixels, box, flipped)


def two_views(image, size, scale, interpolation="bilinear"):
    """Two independent crops of one image, as random_resized_crop cuts them."""
    return [random_resized_crop(image, size, scale, interpolation) for _ in range(2)]


class _Seeded(Dataset):
    """Item (epoch, index): ``draw(data[index])``, drawn from (seed, epoch, index) alone."""

    def __init__(self, data, draw, seed):
        self.data, self.draw, self.seed = data, draw, seed

    def __getitem__(self, key):
        epoch, index = key
        # torch.manual_seed takes a tenth of a photo's time, for the devices' generators
        torch.default_generator.manual_seed(seed_for(self.seed, epoch, index))
        return self.draw(self.data[index])


def leave_signals_to_trainer(_worker=None):
    """Start a loader worker: it leaves Ctrl-C and SIGTERM, which a scheduler sends to every process
    of a job, to the training process, and ends when SIGTERM comes from there."""
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


def steps_per_epoch(data, batch_size):
    """The number of whole batches in ``data``.

    Raises InputError if there is none, or if a batch cannot be shared out equally.
    """
    if batch_size % world_size():
        raise InputError(f"batch size {batch_size} does not divide over {world_size()} processes")
    if len(data) < batch_size:
        raise InputError(f"batch size {batch_size} is more than all {len(data)} images: --small "
                         "sets a recipe for few images, --batch-size for fewer")
    return len(data) // batch_size


def load_batches(data, draw, batch_size, steps, seed, workers, collate_fn=None):
    """This process's share of the batches of ``steps`` (a range), as a DataLoader.

    draw: an item of ``data`` -> what goes into a batch, such as an image's views; batch_size is
    global.  A step's batch depends on (seed, step) alone, whatever step comes first and however
    many workers there are.  An epoch leaves out the images that do not fill a batch.
    """
    per_epoch, share = steps_per_epoch(data, batch_size), batch_size // world_size()

    def batches():
        for step in steps:
            epoch, part = divmod(step, per_epoch)
            if part == 0 or step == steps[0]:
                order = np.random.default_rng([seed, epoch]).permutation(len(data))
            start = part * batch_size + rank() * share
            yield [(epoch, int(i)) for i in order[start:start + share]]

    return DataLoader(_Seeded(data, draw, seed), batch_sampler=batches(), num_workers=workers,
                      collate_fn=collate_fn, worker_init_fn=leave_signals_to_trainer,
                      pin_memory=torch.cuda.is_available())


def map_numbers(function, numbers, workers):
    """Iterate over function(number) of each number, computed by so many loader workers."""
    return DataLoader(numbers, batch_size=None, num_workers=workers, collate_fn=function,
                      worker_init_fn=leave_signals_to_trainer)


# ------------------------------------------------- colour and blur (on the device, a batch at once)
# x (B, 3, H, W) float in 0..1; factor (B,): as torchvision.transforms.functional's adjust_*, but
# with a strength for each image.


def _grey(x):
    red, green, blue = x.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)  # (B, 1, H, W)


def _blend(x, other, factor):
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(x, factor):
    """factor 0: black; 1: unchanged."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(max=1)


def adjust_contrast(x, factor):
    """factor 0: the mean grey of each image; 1: unchanged."""
    return _blend(x, _grey(x.mean((2, 3), keepdim=True)), factor)


def adjust_saturation(x, factor):
    """factor 0: grey; 1: unchanged."""
    return _blend(x, _grey(x), factor)


def adjust_hue(x, shift):
    """Turn the hue by ``shift`` (B,) of a full circle, -0.5..0.5; value and chroma stay."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    # the hue in sixths of the circle, -1..5, times the chroma; of greys it does not matter
    hue = torch.where(value == red, green - blue, torch.where(
        value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)))
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * shift.view(-1, 1, 1))
    # how far it is from red, green and blue, 0..3: up to 1 they have the value, from 2 the least
    opposite = torch.arange(3, -2, -2, device=x.device).view(3, 1, 1)
    away = (hue.unsqueeze(1) + opposite).remainder_(6).sub_(3).abs_()  # (B, 3, H, W)
    return torch.addcmul((value + chroma).unsqueeze(1), chroma.unsqueeze(1), away.clamp_(1, 2),
                         value=-1)


def gaussian_blur(x, sigma):
    """A Gaussian of ``sigma`` (B,) pixels, at most 2; 13 taps (3 sigma), one axis at a time."""
    taps = torch.arange(-6, 7, device=x.device)
    kernel = torch.softmax(-(taps / sigma.unsqueeze(1)) ** 2 / 2, dim=1)  # (B, 13), rows sum to 1
    kernel = kernel.repeat_interleave(3, dim=0)  # (3B, 13)
    y = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1).unsqueeze(0)  # (1, 3B, H+12, W+12)
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    y = F.conv2d(y, kernel[:, None, None, :], groups=len(kernel))
    return y.view_as(x)


def augment_colour(pixels, jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_grey=0.2, p_blur=0.5,
                   p_solarize=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Colour jitter, grey, blur, solarize and normalisation of a batch of views, on its device.

    pixels: (B, 3, H, W) uint8; jitter: strengths of brightness, contrast, saturation and hue; the
    p_* are each image's chances, and each image draws its own strengths.  mean, std: of red, green
    and blue in 0..1.  Returns (B, 3, H, W) float32.
    """
    x = pixels / 255
    number, device = len(x), x.device

    def chosen(p):  # drawn on the CPU, where the number of chosen images is then known
        return torch.rand(number) < p

    jittered = chosen(p_jitter)
    operations = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    # Differs: one order for the batch; torchvision's ColorJitter draws one for each image
    for i in torch.randperm(4).tolist():
        change = (2 * torch.rand(number) - 1) * jitter[i]  # (B,) in -strength..strength
        change = torch.where(jittered, change, 0).to(device, non_blocking=True)
        x = operations[i](x, change if i == 3 else (1 + change).clamp(min=0))
    greyed = chosen(p_grey).nonzero().flatten().to(device, non_blocking=True)
    x.index_copy_(0, greyed, _grey(x[greyed]).expand(-1, 3, -1, -1))

    blurred, sigma = chosen(p_blur).nonzero().flatten(), 0.1 + 1.9 * torch.rand(number)
    if len(blurred):
        sigma = sigma[blurred].to(device, non_blocking=True)
        blurred = blurred.to(device, non_blocking=True)
        x.index_copy_(0, blurred, gaussian_blur(x[blurred], sigma))
    if p_solarize:
        solarized = chosen(p_solarize).to(device, non_blocking=True).view(-1, 1, 1, 1)
        x = torch.where(solarized & (x >= 0.5), 1 - x, x)
    scale = torch.tensor([1 / s for s in std])
    offset = torch.tensor([-m / s for m, s in zip(mean, std)])
    scale, offset = (v.to(device, non_blocking=True).view(3, 1, 1) for v in (scale, offset))
    return torch.addcmul(offset, x, scale)


def _channel_sums(images, index):
    """Number of pixels, sums and sums of squares of red, green and blue (3, 3), exact."""
    i, image = images.numbered(index)
    x = image.flatten(1).long()  # (3, HW)
    sums = torch.stack([torch.full((3,), x.shape[1]), x.sum(1), (x * x).sum(1)])
    return sums * (i == index)  # 0 where another image takes its place


def measure_normalisation(images, workers=0):
    """Mean and standard deviation of red, green and blue, over all pixels of all images.

    images: as open_images gives them; the processes share the work.  Prints them as the commands'
    flags take them, and returns two lists of 3, in 0..1.  Raises InputError as report does.
    """
    share = range(rank(), len(images), world_size())
    sums = torch.zeros(3, 3, dtype=torch.long)
    channel_sums = map_numbers(partial(_channel_sums, images), share, workers)
    for done, image_sums in enumerate(channel_sums, 1):
        sums += image_sums
        if done % 1000 == 0 and rank() == 0:
            print(f"{done} of {len(share)} images", flush=True)
    count, total, squares = all_reduce_sum(sums).double()  # (3,) each
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp(min=0).sqrt()
    number = len(images)
    if isinstance(images, ImageFiles):
        number -= images.report(print, "left out", complete=True)
    if rank() == 0:
        print(f"{number} images:  --mean {' '.join(f'{v:.4f}' for v in mean)}"
              f" --std {' '.join(f'{v:.4f}' for v in std)}", flush=True)
    return mean.tolist(), std.tolist()
