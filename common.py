"""What the methods share and no paper claims: images and views, backbone stages, processes, runs;
and what three of them use to the letter: queue, InfoNCE, momentum update, shuffling BN, LARS.

Letters: B images, C channels, H W pixels, D embedding size, K queue length, N rows fed to a loss.
The way of an image: file -> worker: decode, cut the views with their exact rectangles (uint8) ->
batch -> device: colour, blur, normalise, for the whole batch at once -> encoders.
"""
import argparse
import csv
import fcntl
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InputError(ValueError):
    """Something the user can put right: ``launch`` prints it as one line, without a traceback."""


def seed_for(*numbers):
    """One 64-bit seed from several non-negative integers, such as (seed, epoch, image)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------- images and views (in the workers)


class View(NamedTuple):
    """A crop of an image, and where it was cut; a batch of them is a View of stacked tensors."""

    pixels: torch.Tensor  # (3, H, W) uint8
    box: torch.Tensor  # (4,) float, x1 y1 x2 y2 in the source image's pixels
    flipped: bool  # left and right exchanged after the cut


def read_image(path):
    """Decode an image file of any kind that PIL reads -> (3, H, W) uint8, RGB."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):  # PIL's own conversion would clip 16 bits at 255
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _left_out(error):  # a folder below --data that os.walk cannot list
    if rank() == 0:
        print(f"cannot list {error.filename!r}: left out ({error.strerror})", flush=True)


class ImageFiles(Dataset):
    """Every image below a folder, in any layout, sorted by path: item i is (3, H, W) uint8.

    A file that cannot be decoded is marked in ``broken`` (n,), a bool tensor that all workers
    share, and the next one that can stands in for it.
    Raises InputError: no such folder, no images in it, none of them decodable.
    """

    def __init__(self, root):
        if not os.path.isdir(root):
            raise InputError(f"no such folder: {root}")
        self.root, self.paths, seen = os.fspath(root), [], set()
        for folder, below, files in os.walk(root, onerror=_left_out, followlinks=True):
            if os.path.realpath(folder) in seen:  # by another link
                below.clear()
                continue
            seen.add(os.path.realpath(folder))
            below.sort()
            self.paths += [os.path.join(folder, f) for f in files
                           if f.lower().endswith(IMG_EXTENSIONS)]
        if not self.paths:
            raise InputError(f"no images below {root} (looked for {' '.join(IMG_EXTENSIONS)})")
        self.paths.sort()
        self.broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.numbered(index)[1]

    def numbered(self, index):
        """Image ``index``, or the one that stands in for it -> its index, (3, H, W) uint8."""
        return read_or_next(self.paths, self.broken, index)

    @property
    def names(self):
        """The images' paths below the folder."""
        return [path[len(self.root):].lstrip("/") for path in self.paths]


def unlabelled(data, scenes):
    """The images below the folder ``data``, or, where it is None, so many built-in scenes."""
    if data is not None:
        return ImageFiles(data)
    from scenes import Scenes
    return Scenes(scenes, size=96, seed=0, cache=True)


def read_or_next(paths, broken, index):
    """Decode image ``index``, or the next one that can be -> its index and (3, H, W) uint8.

    broken (n,) bool: which ones cannot, as far as is known; what is found out is marked there.
    """
    if not 0 <= index < len(paths):
        raise IndexError(index)
    reason = ""
    for i in chain(range(index, len(paths)), range(index)):
        if not broken[i]:
            try:
                return i, read_image(paths[i])
            except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
                broken[i], reason = True, f": {error}"
    raise InputError(f"none of the {len(paths)} images can be decoded{reason}")


def random_resized_crop(image, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random rectangle of the image (3, H, W) uint8, resized to size x size, flipped with p 0.5.

    scale: its share of the image's area; ratio: its width / height.  Returns a View.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
    pixels = resized_crop(image, top, left, height, width, [size, size], antialias=True)
    flipped = bool(torch.rand(()) < 0.5)
    box = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
    return View(pixels.flip(-1) if flipped else pixels, box, flipped)


class _Drawn(Dataset):
    """Item (epoch, index): ``draw(data[index])``, seeded by (seed, epoch, index) alone."""

    def __init__(self, data, draw, seed):
        self.data, self.draw, self.seed = data, draw, seed

    def __getitem__(self, key):
        epoch, index = key
        torch.manual_seed(seed_for(self.seed, epoch, index))
        return self.draw(self.data[index])


def obey_parent(_worker=None):
    """For a loading process: Ctrl-C and SIGTERM, which a scheduler sends to all processes of a job,
    are the training process's to answer; SIGTERM from that one ends this one."""
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


def steps_per_epoch(data, batch_size):
    """The number of whole batches in ``data``.  InputError: none, or no equal shares of one."""
    if batch_size % world_size():
        raise InputError(f"batch size {batch_size} does not divide over {world_size()} processes")
    if len(data) < batch_size:
        raise InputError(f"batch size {batch_size} is more than all {len(data)} images")
    return len(data) // batch_size


def load_batches(data, draw, batch_size, steps, seed, workers, collate_fn=None):
    """This process's share of the batches of ``steps`` (a range), as a DataLoader.

    draw: an item of ``data`` -> what goes into a batch, such as an image's views; batch_size is
    global.  A step's batch depends on (seed, step) alone, whatever step comes first and however
    many workers there are.  An epoch leaves out the images that do not fill a batch.
    """
    per_epoch, mine = steps_per_epoch(data, batch_size), batch_size // world_size()

    def batches():
        for step in steps:
            epoch, part = divmod(step, per_epoch)
            if part == 0 or step == steps[0]:
                order = np.random.default_rng([seed, epoch]).permutation(len(data))
            start = part * batch_size + rank() * mine
            yield [(epoch, int(i)) for i in order[start:start + mine]]

    return DataLoader(_Drawn(data, draw, seed), batch_sampler=batches(), num_workers=workers,
                      collate_fn=collate_fn, worker_init_fn=obey_parent,
                      pin_memory=torch.cuda.is_available())


# ------------------------------------------------- colour and blur (on the device, a batch at once)
# x (B, 3, H, W) float in 0..1; factor (B,): as torchvision.transforms.functional's adjust_*, but
# with a strength for each image.


def _gray(x):
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # (B, 1, H, W)


def _blend(x, other, factor):
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_brightness(x, factor):
    """factor 0: black; 1: as it is."""
    return _blend(x, torch.zeros_like(x), factor)


def adjust_contrast(x, factor):
    """factor 0: the mean gray of each image; 1: as it is."""
    return _blend(x, _gray(x).mean((1, 2, 3), keepdim=True).expand_as(x), factor)


def adjust_saturation(x, factor):
    """factor 0: gray; 1: as it is."""
    return _blend(x, _gray(x).expand_as(x), factor)


def adjust_hue(x, shift):
    """Turn the hue by ``shift`` (B,) of a full circle, -0.5..0.5, at the same value and chroma."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    by = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == red, (green - blue) / by,
                      torch.where(value == green, 2 + (blue - red) / by, 4 + (red - green) / by))
    corner = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # of red, green, blue
    k = (corner + (hue + 6 * shift.view(-1, 1, 1)).unsqueeze(1)) % 6  # (B, 3, H, W)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma):
    """A Gaussian of ``sigma`` (B,) pixels, at most 2; 13 taps (3 sigma), one axis at a time."""
    taps = torch.arange(-6, 7, device=x.device)
    kernel = torch.softmax(-(taps / sigma.unsqueeze(1)) ** 2 / 2, dim=1)  # (B, 13), rows sum to 1
    kernel = kernel.repeat_interleave(3, dim=0)  # (3B, 13)
    y = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1).unsqueeze(0)  # (1, 3B, H+12, W+12)
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    y = F.conv2d(y, kernel[:, None, None, :], groups=len(kernel))
    return y.view_as(x)


def photometric(pixels, jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5,
                p_solarize=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Colour jitter, gray, blur, solarize and normalisation of a batch of views.

    pixels: (B, 3, H, W) uint8; jitter: strengths of brightness, contrast, saturation and hue; the
    p_* are each image's own chances, and its strengths are its own too.  The order of the jitter's
    four is drawn once a batch.  mean, std: of red, green and blue in 0..1, ImageNet's by default.
    Returns (B, 3, H, W) float32.
    """
    x = pixels.float() / 255
    number, device = len(x), x.device

    def chosen(p):  # drawn on the CPU, so that the number of rows is known there
        return torch.rand(number) < p

    jittered = chosen(p_jitter)
    operations = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    for i in torch.randperm(4).tolist():
        drawn = (2 * torch.rand(number) - 1) * jitter[i]  # (B,) in -strength..strength
        drawn = torch.where(jittered, drawn, 0).to(device, non_blocking=True)
        x = operations[i](x, drawn if i == 3 else (1 + drawn).clamp(min=0))
    x = adjust_saturation(x, (~chosen(p_gray)).to(device, x.dtype, non_blocking=True))

    rows, sigma = chosen(p_blur).nonzero().flatten(), 0.1 + 1.9 * torch.rand(number)
    if len(rows):
        sigma = sigma[rows].to(device, non_blocking=True)
        rows = rows.to(device, non_blocking=True)
        x = x.index_copy(0, rows, gaussian_blur(x[rows], sigma))
    if p_solarize:
        solarized = chosen(p_solarize).to(device, non_blocking=True).view(-1, 1, 1, 1)
        x = torch.where(solarized & (x >= 0.5), 1 - x, x)
    mean, std = (torch.tensor(v).to(device, non_blocking=True).view(3, 1, 1)
                 for v in (mean, std))
    return (x - mean) / std


def _histogram(images, index):
    """How often each value 0..255 occurs in each channel of image ``index``, (3, 256)."""
    i, image = images.numbered(index)
    counts = torch.stack([channel.bincount(minlength=256) for channel in image.flatten(1)])
    return counts * (i == index)  # an image that cannot be decoded has none


def measure_normalisation(images, workers=0):
    """Mean and standard deviation of red, green and blue, over all pixels of all images.

    images: ImageFiles or Scenes; those that cannot be decoded are left out and named.  Prints them
    as the commands take them.  Returns two lists of 3, in 0..1; only the first process works.
    InputError: over 1% of the images cannot be decoded.
    """
    if rank():
        return None
    loader = DataLoader(range(len(images)), batch_size=None, num_workers=workers,
                        collate_fn=partial(_histogram, images), worker_init_fn=obey_parent)
    counts, value = torch.zeros(3, 256, dtype=torch.long), torch.arange(256).double() / 255
    for done, histogram in enumerate(loader, 1):
        counts += histogram
        if done % 10000 == 0:
            print(f"{done} of {len(images)} images", flush=True)
    broken = [p for p, b in zip(getattr(images, "paths", ()), getattr(images, "broken", ())) if b]
    if len(broken) > 0.01 * len(images):
        raise InputError(f"{len(broken)} of {len(images)} images cannot be decoded: over 1% "
                         f"({broken[0]!r} is one)")
    for path in broken:
        print(f"cannot decode {path!r}: left out")
    share = counts / counts.sum(1, keepdim=True).double()  # (3, 256)
    mean = (share * value).sum(1)  # (3,)
    std = (share * (value - mean.unsqueeze(1)) ** 2).sum(1).sqrt()  # (3,)
    print(f"{len(images) - len(broken)} images:  --mean {' '.join(f'{v:.4f}' for v in mean)}"
          f" --std {' '.join(f'{v:.4f}' for v in std)}", flush=True)
    return mean.tolist(), std.tolist()


# ------------------------------------------------------------------------------- backbone and heads


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over ``groups`` equal, consecutive parts of the batch, as that many GPUs would.

    One process then trains as several do: without it, shuffling BN would have nothing to shuffle
    between.  Running statistics are the mean over the groups.  In eval mode, and in its state
    dict, it is BatchNorm2d.  Raises InputError when the groups do not divide the batch, or
    hold a single value of each channel.
    """

    def __init__(self, num_features, groups=1, **kwargs):
        super().__init__(num_features, **kwargs)
        self.groups = groups

    def forward(self, x):
        if self.training and x.numel() == self.groups * x.shape[1]:
            raise InputError(f"a batch norm group would hold one value of each channel ({len(x)} "
                             f"images in {self.groups} groups, {x.shape[2]} x {x.shape[3]} left)")
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise InputError(f"{self.groups} batch norm groups do not divide a batch of {len(x)}")
        self.num_batches_tracked += 1
        means = self.running_mean.repeat(self.groups, 1)  # (groups, C), one for each part
        variances = self.running_var.repeat(self.groups, 1)
        y = torch.cat([
            F.batch_norm(part, means[i], variances[i], self.weight, self.bias, True,
                         self.momentum, self.eps)
            for i, part in enumerate(x.chunk(self.groups))])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return y


def batch_norm_groups(bn_groups, batch_size):
    """This process's share of ``bn_groups`` over the global batch.  InputError: no equal groups."""
    if bn_groups % world_size():
        raise InputError(f"{bn_groups} batch norm groups do not divide over {world_size()} "
                         "processes")
    if batch_size % bn_groups:
        raise InputError(f"batch size {batch_size} does not divide into {bn_groups} "
                         "batch norm groups")
    return bn_groups // world_size()


class ResNetStages(nn.Module):
    """torchvision's ResNet without its classifier, under the same parameter names.

    (B, 3, H, W) -> [Res2, Res3, Res4, Res5], (B, C_i, H/s, W/s) with s = 4, 8, 16, 32; C_i is
    ``channels[i]``.  ``depth``: how many of the four are computed; the others do not train.
    """

    def __init__(self, resnet, depth=4):
        super().__init__()
        for name, module in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        self.channels = [resnet.fc.in_features // by for by in (8, 4, 2, 1)]
        self.depth = depth
        for i in range(depth, 4):
            getattr(self, f"layer{i + 1}").requires_grad_(False)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = []
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
            stages.append(x)
        return stages


def resnet_stages(arch, norm_layer=nn.BatchNorm2d, depth=4):
    """A randomly initialised torchvision ResNet, by name, as ResNetStages."""
    known = [n for n in torchvision.models.list_models(torchvision.models) if "resne" in n]
    if arch not in known:
        raise InputError(f"unknown architecture {arch} (known: {', '.join(known)})")
    return ResNetStages(torchvision.models.get_model(arch, weights=None, norm_layer=norm_layer),
                        depth)


class SwinStages(nn.Module):
    """torchvision's Swin Transformer without its classifier, under the same parameter names.

    (B, 3, H, W) -> four stages (B, C_i, H/s, W/s), s = 4, 8, 16, 32, as ResNetStages gives; the
    last one after the layer norm that ends the network.
    """

    def __init__(self, swin):
        super().__init__()
        self.features, self.norm = swin.features, swin.norm
        self.channels = [swin.head.in_features // by for by in (8, 4, 2, 1)]

    def forward(self, x):
        stages = []
        for i, part in enumerate(self.features):  # patches, stage, merging, stage, ..., stage
            x = part(x)  # (B, H/s, W/s, C)
            if i % 2:
                stages.append(x)
        stages[-1] = self.norm(x)
        return [stage.permute(0, 3, 1, 2) for stage in stages]


def backbone_stages(arch):
    """A randomly initialised torchvision Swin Transformer or ResNet, by name, as its stages."""
    if arch.startswith("swin_") and arch in torchvision.models.list_models(torchvision.models):
        return SwinStages(torchvision.models.get_model(arch, weights=None))
    return resnet_stages(arch)


def mlp(c_in, hidden, c_out):
    """The 2-layer projection head of MoCo v2: (N, c_in) -> (N, c_out)."""
    return nn.Sequential(nn.Linear(c_in, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, c_out))


# --------------------------------------------------------- contrast: InfoNCE, queue, momentum; LARS


class _InfoNCE(torch.autograd.Function):  # the sum over the rows, all float32
    @staticmethod
    def forward(ctx, q, k, negatives, tau, chunk):
        loss, gradient = q.new_zeros(()), torch.zeros_like(q)
        for q_i, k_i, to_q in zip(*(x.split(chunk) for x in (q, k, gradient))):
            positive = (q_i * k_i).sum(1) / tau  # (n,)
            logits = q_i / tau @ negatives.T  # (n, K)
            share = logits.log_softmax(1)  # (n, K), of each among the negatives
            rest = logits[:, 0] - share[:, 0]  # (n,), the logits' logsumexp
            whole = torch.logaddexp(positive, rest)  # (n,)
            loss += (whole - positive).sum()
            if ctx.needs_input_grad[0]:  # d loss / d logit is the softmax, less 1 for the positive
                to_n = (rest - whole).exp().unsqueeze(1) * (share.exp_() @ negatives)  # (n, D)
                to_k = torch.expm1(positive - whole).unsqueeze(1)  # (n, 1)
                to_q.copy_((to_n + to_k * k_i) / tau)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, outer):
        return outer * ctx.saved_tensors[0], None, None, None, None


def info_nce(q, k, negatives, tau, chunk=None):
    """-log exp(q.k/tau) / (exp(q.k/tau) + sum_j exp(q.n_j/tau)), mean over N rows (MoCo, Eq. 1).

    q, k: (N, D); negatives: (K, D); unit rows.  Returns a float32 scalar (0 for N = 0), with a
    gradient to q alone.  ``chunk`` rows of logits at a time exist in memory (about 2**25 logits by
    default): the gradient is computed beside the loss, and the logits are not kept for it.
    """
    chunk = chunk or max(1, 2 ** 25 // max(1, len(negatives)))
    with torch.autocast(q.device.type, enabled=False):
        total = _InfoNCE.apply(q.float(), k.float(), negatives.float(), tau, chunk)
    return total / max(1, len(q))


@torch.no_grad()
def contrast_statistics(q, k, negatives):
    """What to watch beside the loss, as 0-dim tensors: the share of queries whose key beats all
    negatives, the mean similarities, and the mean deviation of a query's coordinate, which falls to
    0 when all queries become one and is 1/sqrt(D) when they fill the sphere; all 0 for N = 0.
    Makes (N, K) similarities at once: for many rows, give it some of them."""
    if len(q) == 0:
        q = k = negatives.new_zeros(1, negatives.shape[1])
    q, k, negatives = q.detach().float(), k.float(), negatives.float()
    with torch.autocast(q.device.type, enabled=False):
        positive, others = (q * k).sum(1), q @ negatives.T  # (N,), (N, K)
    return dict(accuracy=(positive > others.amax(1)).float().mean(),
                similarity_positive=positive.mean(), similarity_negative=others.mean(),
                deviation=q.std(0, correction=0).mean())


class Queue(nn.Module):
    """The last K keys, as negatives: ``keys`` (K, D), unit rows, the same in every process."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # row that goes next

    @torch.no_grad()
    def push(self, keys):
        """Put the unit rows (n, D) of all processes, in rank order, in place of the oldest ones."""
        keys = all_gather(keys)
        if len(keys) > len(self.keys):
            raise InputError(f"{len(keys)} keys do not fit into a queue of {len(self.keys)}")
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[rows] = keys.to(self.keys.dtype)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.keys))


def check_queue(size, pushed, momentum, images):
    """Is a queue of ``size`` keys, ``pushed`` a step, sound for so many images?  InputError: it
    does not hold one step's.  Warns of keys that queries may be told from for the wrong reason."""
    if size < pushed:
        raise InputError(f"queue size {size} is less than the {pushed} keys of a step")
    age = size / pushed * (1 - momentum)
    if rank() == 0 and size > images / 4:
        print(f"warning: a queue of {size} is more than a quarter of {images} images: an image "
              "meets its own earlier keys as negatives")
    if rank() == 0 and age > 0.3:
        print(f"warning: (K/B)(1-m) is {age:.2f} (MoCo's: 0.26): old keys come from another "
              "encoder, and queries can be told from them by that alone")


def momentum_update(online, target, m):
    """theta_target <- m theta_target + (1 - m) theta_online, each parameter (MoCo, Eq. 2)."""
    get_ema_multi_avg_fn(m)(list(target.parameters()), list(online.parameters()), None)


class LARS(torch.optim.SGD):
    """SGD in which every weight moves in proportion to its own length (You et al. 2017, arXiv
    1708.03888, Algorithm 1): its gradient g becomes (g + decay w) trust |w| / (|g| + decay |w|),
    but where w or g is 0.  Parameters of one dimension (biases, normalisation) take the plain step,
    without decay.  The lr stands outside the momentum, as in torch's SGD.  Changes the gradients.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, lr, momentum)
        self.decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self):
        """One step, as SGD's."""
        for w in (p for group in self.param_groups for p in group["params"]):
            if w.ndim > 1 and w.grad is not None:
                length, slope = w.norm(), w.grad.norm()
                rate = self.trust * length / (slope + self.decay * length)
                rate = torch.where((length > 0) & (slope > 0), rate, 1)
                w.grad.add_(w, alpha=self.decay).mul_(rate)
        super().step()


@torch.no_grad()
def shuffled(encoder, images, *more):
    """Shuffling BN (MoCo, 3.3): ``encoder`` sees the images of all processes in a random order, so
    that a key shares its batch norm group with other images than its query does.

    images: (B, ...) of this process, and whatever else of each image (B, ...) goes with them;
    encoder: images, *more -> (B, ...) or a list of such.
    Returns what it gives for this process's images, in their order.
    """
    order = torch.randperm(world_size() * len(images), device=images.device)
    if world_size() > 1:
        dist.broadcast(order, src=0)
    here = slice(rank() * len(images), (rank() + 1) * len(images))
    out = encoder(*(all_gather(each)[order[here]] for each in (images, *more)))
    back = order.argsort()[here]
    return [all_gather(o)[back] for o in out] if isinstance(out, list) else all_gather(out)[back]


# --------------------------------------------------------------------------------------- processes


def rank():
    """This process's number, 0 when it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def setup():
    """Join the processes that torchrun started (nccl on CUDA, gloo otherwise), or be a single one.

    Returns this process's device.
    """
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    if "RANK" in os.environ and not dist.is_initialized():
        get, store = os.environ.get, None
        if get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it holds addresses of before a restart
            store = dist.TCPStore(get("MASTER_ADDR"), int(get("MASTER_PORT")), is_master=False)
            store = dist.PrefixStore(f"restart {get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                rank=int(get("RANK")), world_size=int(get("WORLD_SIZE")))
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"{local + 1} processes, but {torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local)
        torch.backends.cudnn.deterministic = True  # a resumed run equals an uninterrupted one
        torch.set_float32_matmul_precision("high")  # TF32: finer than the bfloat16 that comes in
    return torch.device("cuda" if cuda else "cpu")


def mixed_precision(args, device, side=math.inf):
    """The context of a forward pass: bfloat16 where --precision, or without it a GPU, asks for it;
    weights, their gradients and the losses stay float32.  side: of the smallest image in pixels.

    Raises InputError: bfloat16 on CPUs with images so small that Res4 is one position.  There
    PyTorch (2.11, 2.15) leaves most of the gradient of Res5's first 3x3 weights uninitialised.
    """
    precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    if precision == "bfloat16" and device.type == "cpu" and side <= 16:
        raise InputError(f"bfloat16 on CPUs wants more than 16 pixels, not {side}: PyTorch's "
                         "gradients are wrong there")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def gathered(mine):
    """What each process has, of any kind -> a list, in rank order."""
    if world_size() == 1:
        return [mine]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def all_gather(x):
    """(n, ...) of each process -> (world n, ...) in rank order; no gradient."""
    if world_size() == 1:
        return x
    everyone = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


class _Summed(torch.autograd.Function):  # torch.distributed.nn's all_reduce, which is deprecated
    @staticmethod
    def forward(_ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_ctx, gradient):
        return _Summed.apply(gradient)


def summed(x):
    """The sum of all processes' x, with its gradient.

    Every process's loss depends on every process's x, so that the gradients are summed too.  A loss
    of such sums is the same in all processes, and their parameters' gradients, of which
    DistributedDataParallel takes the mean, are those of one process with the whole batch.
    (dist.all_reduce alone would keep each process's own, and the mean be too small.)
    """
    return x if world_size() == 1 else _Summed.apply(x)


def launch(train, args):
    """Run ``train(args, device)`` as a command: join the processes, leave them at the end, and
    answer bad input with one line and exit status 1."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    numbers = signal.SIGCHLD, signal.SIGINT, signal.SIGTERM  # the first: torch's handler raises too
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        try:
            train(args, setup())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except (RuntimeError, ConnectionError, EOFError) as error:  # EOFError: of a loading process
        gone = re.search("DataLoader worker.* (exited|killed).*|by peer|remote process", str(error))
        if isinstance(error, RuntimeError) and not gone:
            raise
        named = gone and gone[1]
        why = gone[0] if named else "another process has ended"
        sys.exit(1 if local and not named else f"error: {why}; give the same command again")
    except (InputError, OSError) as error:
        if local:  # what all know the first one says; torchrun then ends the others, and one that
            time.sleep(3)  # lives on has something of its own to say
        where = f"{args.out}: " if getattr(error, "filename", "") is None else ""  # of a full disk
        sys.exit(f"error: {where}" + str(error).rsplit("InputError: ", 1)[-1].strip())
    except KeyboardInterrupt as stopped:  # outside of a Run's steps
        print("stopped; give the same command again", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check(args, **bounds):
    """InputError where a number of the command's arguments is not within its (least, most)."""
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(least <= v <= most for v in values):
            raise InputError(f"--{name.replace('_', '-')} {value} is not from {least} to {most}")


# ------------------------------------------------------------------------ checkpoints and backbones


def save_checkpoint(path, **state):
    """Write ``state`` whole or not at all: to a temporary name first, then renamed."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk, which torch's own error can hide
        Path(temporary).unlink(missing_ok=True)
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path):
    """What save_checkpoint wrote, or any file of tensors, on the CPU.  Raises InputError.

    Only tensors and plain containers are read (weights_only=True): no code in a file is run.  The
    error for a file that pickles more than these has a command that converts it.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    torchs = b"PK\x03\x04", b"\x80\x02\x8a\n"  # how torch.save's files start: since 1.6, before it
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start in torchs or not start.startswith(b"\x80"):
            with torch.serialization.safe_globals([argparse.Namespace]):  # SoCo's has its arguments
                return torch.load(path, map_location="cpu", weights_only=True)
        if not Path(path).read_bytes().endswith(b"."):
            raise EOFError("a pickle that is cut off")
        reason, load = "a bare pickle", 'pickle.load(open(f, "rb"))'
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)  # what torch says then would mislead
        if not refused or start not in torchs:
            reason = "" if refused else " ".join(str(error).split())[:100]
            raise InputError(f"{path} holds no tensors that can be read: "
                             f"{reason or 'empty, cut off or of another kind'}") from None
        reason = re.search(r"GLOBAL (\S+)|$", str(error))[1] or "other objects"
        load = 'torch.load(f, "cpu", weights_only=False)'
    code = (f"import pickle, sys, torch; f = sys.argv[1]; d = {load}; "
            'd = d.get("state_dict", d.get("model", d)) if isinstance(d, dict) else d; '
            'd = d.state_dict() if hasattr(d, "state_dict") else d; torch.save({k: '
            'torch.as_tensor(v) for k, v in d.items() if hasattr(v, "shape")}, f + ".tensors.pt")')
    raise InputError(f"{path} holds more than tensors ({reason}), and unpickling it can run code; "
                     f"if you trust it, python -c {shlex.quote(code)} {shlex.quote(str(path))} "
                     f"keeps its tensors in {path}.tensors.pt")


def export_backbone(stages, path):
    """Write a ResNetStages or SwinStages under torchvision's own parameter names."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in stages.state_dict().items()}
    save_checkpoint(path, **state)


def detectron2_name(name):
    """What detectron2 calls torchvision's ``name``, that of a ResNet's tensor."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


# of a prefix: a momentum encoder's, or another average of the weights
AVERAGED = re.compile(r"(?i)(^|[._])(k|m|t|key|ema|swa|slow|avg)[._]|"
                      "averaged?|momentum|target|teacher")


def load_backbone(stages, path):
    """Copy a pre-trained backbone into ``stages``, from the names of the file's tensors alone.

    Reads torchvision's names (ours; also Barlow Twins', VICReg's, OpenSelfSup's backbones) and, of
    a ResNet, detectron2's, under any prefix (MoCo: module.encoder_q., SoCo: module.encoder.).  Of
    several backbones it takes the trained one, not its average.  Says what was loaded.
    Returns the file's other tensors by name.  Raises InputError, and loads nothing, where a
    tensor is missing, not finite or of another shape: half of a backbone looks like a bad method.
    """
    state = load_checkpoint(path)
    for nested in ("state_dict", "model", "state_dict"):
        state = state[nested] if isinstance(state, dict) and nested in state else state
    items = state.items() if isinstance(state, dict) else ()
    state = {name: value for name, value in items if isinstance(name, str)}
    kind, spellings = "ResNet", (str, detectron2_name)
    first = "conv1.weight", "layer1.0.conv1.weight"  # both: blocks have a conv1 too
    if isinstance(stages, SwinStages):
        kind, spellings = "Swin Transformer", (str,)
        first = "features.0.0.weight", "features.1.0.norm1.weight"
    backbones = [(name.removesuffix(spell(first[0])), spell)
                 for spell in spellings for name in state]
    backbones = [(p, spell) for p, spell in backbones if all(p + spell(f) in state for f in first)]
    if not backbones:
        raise InputError(f"{path} holds no {kind}: no {' and '.join(first)}"
                         + ", nor detectron2's" * len(spellings[1:]))
    backbones.sort(key=lambda b: bool(AVERAGED.search(b[0])))  # of equals the first stays first
    (prefix, spell), *others = backbones
    found, rest = {}, dict(state)
    for name, tensor in stages.state_dict().items():
        old = prefix + spell(name)
        if old in state:
            found[name] = value = rest.pop(old)
            if not torch.is_tensor(value):
                raise InputError(f"{path}: {old} is no tensor")
            if value.shape != tensor.shape:
                raise InputError(f"{path}: {old} is {tuple(value.shape)}, not "
                                 f"{tuple(tensor.shape)}: another architecture?")
        elif not name.endswith("num_batches_tracked"):
            raise InputError(f"{path}: {old} is missing: another architecture?")
    for name in rest:  # ResNet-101's would all be there for a ResNet-50
        if name.startswith(tuple(prefix + spell(f"{n}.") for n, _ in stages.named_children())):
            raise InputError(f"{path}: {name} has no place: another architecture?")
    for name, value in state.items():
        if torch.is_tensor(value) and not value.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
    stages.load_state_dict(found, strict=False)
    missing = len(stages.state_dict()) - len(found)
    rest = {name: value for name, value in rest.items() if torch.is_tensor(value)}
    if rank() == 0:
        some = ", ".join([*rest][:3] + ["..."] * (len(rest) > 3))
        print(f"{path}: {len(found)} tensors loaded from '{prefix}*', {missing} missing"
              f"{' (batch norm counters, not needed)' if missing else ''}, {len(rest)} unexpected"
              f"{f' ({some})' if some else ''}"
              + "".join(f"; not from '{other}*'" for other, _ in others), flush=True)
    return rest


# --------------------------------------------------------------------------------------------- runs


def add_run_arguments(parser, out):
    """The flags of every command that say where and how to run, not what to compute."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=out, help="folder of the run (default %(default)s)")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1),
                       help="loading processes for each training process (default %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of weights, views and batches")
    group.add_argument("--precision", choices=("bfloat16", "float32"),
                       help="of the networks (default bfloat16 on GPUs, float32 on CPUs)")
    group.add_argument("--log-every", type=int, default=20, help="steps between lines of log.csv")
    group.add_argument("--fresh", action="store_true", help="start over in the folder of a run")


class Run:
    """The folder of a run, and what happens there after every step.

    args: the command's; method: its name, kept in the checkpoint; images: the data set, whose
    broken files are counted; parts: name -> module or optimizer, all that a checkpoint must hold.
    Goes on at once where the folder's checkpoint ends: ``step`` is the number of steps done.
    Raises InputError: a checkpoint of another method, or of other arguments.
    """

    FREE = ("out", "workers", "log_every", "fresh")  # arguments that may change when a run goes on

    def __init__(self, args, method, images, steps, steps_per_epoch, parts):
        self.method, self.images, self.parts = method, images, parts
        self.steps, self.steps_per_epoch, self.log_every = steps, steps_per_epoch, args.log_every
        self.args = {k: v for k, v in vars(args).items() if k not in self.FREE}
        self.out, self.batch_size, self.step = Path(args.out), args.batch_size, 0
        self.checkpoint, self.table = self.out / "checkpoint.pt", self.out / "log.csv"
        self.window, self.broken, self.signal = [], set(), 0
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.out.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            self._lock()
        if args.fresh and rank() == 0:
            for old in ("checkpoint.pt", "backbone.pt", "detector.pt", "curves.png",
                        "correlation.png", "ap.json", "detections.png"):
                (self.out / old).unlink(missing_ok=True)
        if world_size() > 1:
            dist.barrier()
        if self.checkpoint.exists():
            self._resume()
        if all_gather(torch.tensor([self.step])).unique().numel() > 1:
            raise InputError(f"{self.out} is not one folder that all processes see")
        if rank() == 0:
            self._keep_rows()
            (self.out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: setattr(self, "signal", number))
        self.start_clock()

    def start_clock(self):
        """Measure speed from now on: what comes before the first step does not count."""
        self.drawn = time.monotonic()
        self.began = self.logged = (self.drawn, self.step)

    def _lock(self):
        """Keep other runs out of the folder as long as this process lives, however it ends."""
        self.lock = open(self.out / "lock", "a")
        for wait in [0.1] * 50 + [0]:  # what is left of a killed run ends with its step
            try:
                return fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(wait)
            except OSError:  # a file system without locks
                return None
        raise InputError(f"another run is at work in {self.out}: wait, or give another --out")

    def _resume(self):
        state = load_checkpoint(self.checkpoint)
        method = state.get("method") if isinstance(state, dict) else None
        if method != self.method:
            raise InputError(f"{self.checkpoint} is a checkpoint of {method}, not of {self.method}")
        try:
            old, new = state["args"], json.loads(json.dumps(self.args))
            other = [f"{k} {old.get(k)} (now {new.get(k)})" for k in sorted({*old, *new})
                     if old.get(k) != new.get(k)]
            if other:
                raise InputError(f"{self.out} holds a run with other arguments: {', '.join(other)}"
                                 "; give the same ones, another --out, or --fresh to start over")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
        except InputError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.checkpoint} does not fit: "
                             f"{' '.join(str(error).split())[:200]}") from None
        self.say(f"{self.out}: going on after step {self.step}" if self.step < self.steps else
                 f"{self.out}: finished, all {self.steps} steps are done; --fresh starts over")

    def _keep_rows(self):
        """Leave in log.csv what the checkpoint has seen: a killed run may have logged more."""
        if self.table.exists():
            header, *rows = self.table.read_text(errors="replace").split("\n")
            rows = [r for r in rows if r.count(",") == header.count(",")
                    and r.split(",")[0].isdigit() and int(r.split(",")[0]) <= self.step]
            kept = self.table.with_suffix(".tmp")
            kept.write_text("".join(f"{r}\n" for r in [header, *rows]) if rows else "")
            os.replace(kept, self.table)

    def say(self, text, rewrite=False):
        """Print a line, once for all processes; on a terminal the next one may take its place."""
        if rank() == 0 and not sys.stdout.isatty():
            print(text, flush=True)
        elif rank() == 0:
            text = text[:shutil.get_terminal_size().columns - 1] if rewrite else text
            print("\r\033[K" + text, end="" if rewrite else "\n", flush=True)

    def stop_if_asked(self):
        """After SIGTERM or Ctrl-C in any process: save, and leave in all with 128 + its number."""
        if self.parent not in (None, os.getppid()):
            os._exit(1)  # torchrun was killed: nothing else would end this process
        number = torch.tensor(self.signal)
        if world_size() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            if self.step:
                self._log()
                self._save(last=True)
            self.say(f"stopped by {signal.Signals(int(number)).name}; the same command goes on "
                     f"after step {self.step}")
            sys.exit(128 + int(number))

    def end_step(self, loss, lr, **parts):
        """Count a step, then log it, save it or stop after it, if one of these is due.

        loss and parts: 0-dim tensors, read only when a line is logged; lr: a number.
        """
        self.step += 1
        self.window.append(torch.stack([v.detach().float() for v in (loss, *parts.values())]))
        self.names, self.lr, done = ("loss", *parts), lr, self.step == self.steps
        epoch_ends = done or self.step % self.steps_per_epoch == 0
        if epoch_ends or self.step % self.log_every == 0:
            self._log()
        if epoch_ends:
            self._save(last=done)
        if not done:
            self.stop_if_asked()

    def _log(self):
        if not self.window:
            return
        values = summed(torch.stack(self.window)) / world_size()  # (steps since then, columns)
        values, self.window = values.cpu(), []  # the only place where the loop waits for the device
        wrong = (~values[:, 0].isfinite()).nonzero()
        if len(wrong):
            kept = f"{self.checkpoint} is the last good one" if self.checkpoint.exists() else "none"
            step = self.step - len(values) + 1 + int(wrong[0])
            raise InputError(f"the loss is not finite at step {step}; checkpoint: {kept}")
        self._count_broken()
        now, (then, step_then), (start, step_start) = time.monotonic(), self.logged, self.began
        self.logged = (now, self.step)
        speed = (self.step - step_then) * self.batch_size / (now - then)
        left = (self.steps - self.step) * (now - start) / (self.step - step_start) / 60
        row = dict(zip(self.names, values.mean(0).tolist()), lr=self.lr)
        if rank() == 0:
            epoch = round(self.step / self.steps_per_epoch, 4)
            line = dict(step=self.step, epoch=epoch, **row, images_per_s=round(speed, 1))
            with open(self.table, "a", newline="") as file:
                writer = csv.DictWriter(file, line, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(line)
        numbers = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items())
        self.say(f"epoch {math.ceil(self.step / self.steps_per_epoch)}/"
                 f"{math.ceil(self.steps / self.steps_per_epoch)}  step {self.step}/{self.steps}  "
                 f"{left:.1f} min left  {speed:.0f} images/s  {numbers}", self.step < self.steps)

    def _count_broken(self):
        flags = getattr(self.images, "broken", torch.zeros(1)).to(torch.uint8)
        if world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        broken = set(flags.nonzero().flatten().tolist())
        for i in sorted(broken - self.broken):
            self.say(f"cannot decode {self.images.paths[i]!r}: another image stands in for it "
                     f"({len(broken)} of {len(flags)} so far)")
        self.broken = broken
        if len(broken) > 0.01 * len(flags):
            raise InputError(f"{len(broken)} of {len(flags)} images cannot be decoded: over 1%")

    def _save(self, last=False):
        weights = [p for part in self.parts.values() if isinstance(part, nn.Module)
                   for p in part.parameters()]
        if not all(p.isfinite().all() for p in weights):
            raise InputError(f"the weights are not finite after step {self.step}: not saved")
        if rank() == 0:
            save_checkpoint(self.checkpoint, method=self.method, args=self.args, step=self.step,
                            **{name: part.state_dict() for name, part in self.parts.items()})
            if last or time.monotonic() - self.drawn > 60:
                draw_curves(self.table, self.out / "curves.png")
                self.drawn = time.monotonic()


def draw_curves(table, path):
    """Draw a log.csv's columns over the epochs; those of one first word share a panel."""
    from matplotlib.figure import Figure  # half a second that most processes never need
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    panels = {}
    for name in rows[0]:
        if name not in ("step", "epoch", "images_per_s"):
            panels.setdefault(name.split("_")[0], []).append(name)
    across = min(3, len(panels))
    figure = Figure((4 * across, 3 * math.ceil(len(panels) / across)), layout="constrained")
    for i, (word, names) in enumerate(panels.items()):
        axes = figure.add_subplot(math.ceil(len(panels) / across), across, i + 1)
        for name in names:
            axes.plot([float(r["epoch"]) for r in rows], [float(r[name]) for r in rows],
                      "--" if name.endswith("chance") else "-", label=name.replace("_", " "))
        axes.set(title=word, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=100)


def draw_correlation(z1, z2, path):
    """Draw how each dimension of z1 correlates with each of z2, both (N, D), over their N rows: the
    matrix of the first 128 dimensions, and how the correlations of all are distributed.

    Returns the matrix (D, D), 0 where a dimension is constant.
    """
    from matplotlib.figure import Figure
    number, dim = z1.shape
    one, two = (F.normalize(z.double() - z.double().mean(0), dim=0) for z in (z1, z2))
    matrix = (one.T @ two).cpu().numpy()
    figure = Figure((11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = left.imshow(matrix[:128, :128], "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(title=f"correlation over {number} pairs, dimensions 1 to {min(dim, 128)} of {dim}",
             xlabel="dimension, second view", ylabel="dimension, first view")
    figure.colorbar(shown, ax=left)
    for name, values in (("same", matrix.diagonal()),
                         ("different", matrix[~np.eye(dim, dtype=bool)])):
        if not values.size:
            continue
        right.hist(values, np.linspace(-1, 1, 81), density=True, alpha=0.6,
                   label=f"{name} dimension: mean {values.mean():.2f}, "
                         f"rms {np.sqrt((values ** 2).mean()):.2f}")
    right.set(title=f"all {dim} dimensions; by chance: rms {(number - 1) ** -0.5:.2f}",
              xlabel="correlation", ylabel="density")
    right.legend()
    figure.savefig(path, dpi=80)
    return matrix
