"""How fast it is, each figure as a ratio within one run (not part of the test suite):

    python tests/benchmark.py load [--data DIR]      one core's way from a file to two views
    python tests/benchmark.py step [--arch resnet18 --batch-size 16]      a training step
    python tests/benchmark.py loss [--queries 50176]                      InfoNCE in chunks
    python tests/benchmark.py levels [--arch resnet18 --batch-size 16]    SoCo's one level a box

load compares, on the same 500 x 375 JPEGs and in turn, the two ways to two 224-pixel views of an
image: the usual chain, all of it in the loading process (PIL crop, jitter, gray, blur, flip,
tensor), and this project's share of a loading process (decode, two crops; colour is the device's
work).  step takes the papers' recipes, each method in processes of its own, in turn, on a GPU where
there is one: colours, forward, backward, updates, without the loading.  Its arithmetic is what
torch counts of one step: convolutions and matrix products.  loss is DUPR's patch loss at its size.
levels is SoCo's step, each box through the head from the one level of its size, against one in
which the head runs on all four levels for every box and three results are masked away.
"""
import argparse
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.ops import roi_align

sys.path.insert(0, str(Path(__file__).parent.parent))
import detco  # noqa: E402
import dupr  # noqa: E402
import moco_v2  # noqa: E402
import soco  # noqa: E402
from common import (LARS, ImageFiles, info_nce, momentum_update, photometric,  # noqa: E402
                    random_resized_crop, read_image)

SIZE = (500, 375)


def make_images(folder, number, data):
    """JPEGs of 500 x 375: photos found below ``data``, resized, or smooth noise without it."""
    rng = np.random.default_rng(0)
    photos = ImageFiles(data) if data else None
    for i in range(number):
        if photos:
            image = Image.fromarray(photos[i % len(photos)].permute(1, 2, 0).numpy())
        else:
            image = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        image.resize(SIZE, Image.BICUBIC).save(folder / f"{i:03}.jpg", quality=90)
    return sorted(folder.iterdir())


class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2))))


usual = transforms.Compose([
    transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.RandomApply([PILBlur()], p=0.5),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def load_usual(path):
    with Image.open(path) as image:
        image = image.convert("RGB")
        return usual(image), usual(image)


def load_ours(path):
    image = read_image(path)
    return random_resized_crop(image, 224), random_resized_crop(image, 224)


def load(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder), args.images, args.data)
        speeds = {load_usual: [], load_ours: []}
        for way in [*speeds] * (args.rounds + 1):  # in turn: a noisy machine slows both
            start = time.perf_counter()
            for path in paths:
                way(path)
            speeds[way].append(len(paths) / (time.perf_counter() - start))
    (chain, *chains), (ours, *all_ours) = speeds.values()  # the first round warms up
    ratios = np.array(all_ours) / np.array(chains)
    print(f"usual chain {np.median(chains):6.0f} images/s on one core")
    print(f"ours        {np.median(all_ours):6.0f} images/s on one core")
    print(f"ratio       {np.median(ratios):6.1f} (of {args.rounds} rounds: {ratios.min():.1f} to "
          f"{ratios.max():.1f})")


def make_step(method, args, device):
    """A step of moco_v2, detco or dupr on random images, with the paper's recipe but for args."""
    if method.startswith("soco"):
        return make_soco_step(method, args, device)
    module = dict(moco_v2=moco_v2, detco=detco, dupr=dupr)[method]
    recipe = module.parse_args(["--data", "none", "--arch", args.arch])
    image = torch.randint(256, (3, SIZE[1], SIZE[0]), dtype=torch.uint8)
    common = recipe.arch, recipe.dim, recipe.queue_size, recipe.momentum, recipe.tau
    if method == "moco_v2":
        model = moco_v2.MoCo(*common)
        drawn = [moco_v2.two_views(image, 224, (0.2, 1)) for _ in range(args.batch_size)]
    elif method == "detco":
        model = detco.DetCo(*common)
        drawn = [detco.views(image, recipe) for _ in range(args.batch_size)]
    else:
        model = dupr.DUPR(*common)
        drawn = [dupr.two_views(image, recipe) for _ in range(args.batch_size)]
    views, model = default_collate(drawn), model.to(device)
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), recipe.lr, momentum=0.9,
                                weight_decay=recipe.weight_decay)
    queues = [model.queue] if method == "moco_v2" else model.queues

    def coloured(view):
        return photometric(view.pixels.to(device))

    def step():
        if method == "moco_v2":
            batch = [coloured(view) for view in views]
        elif method == "detco":
            batch = [coloured(view) for view in views[:2]]
            batch += [detco.cut_patches(coloured(view), corners.to(device), recipe.patch_size)
                      for view, corners in views[2:]]
        else:
            batch = [view._replace(pixels=coloured(view)) for view in views]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, keys, _ = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.encoder_q, model.encoder_k, model.m)
        for queue, k in zip(queues, [keys] if method == "moco_v2" else keys):
            queue.push(k)
        return loss.item()  # waits for the device
    return step


class FourLevels(soco.Network):
    """The head on all levels for every box, and a mask that keeps the one of its size."""

    def forward(self, images, boxes):
        pyramid, boxes = self.backbone(images), list(boxes)
        levels, total = self.pool.map_levels(boxes), 0
        for i, scale in enumerate(self.pool.scales):
            regions = roi_align(pyramid[str(i)], boxes, 7, scale, sampling_ratio=0)
            total = total + (levels == i).unsqueeze(1) * self.head(regions)
        return self.projector(total)


def make_soco_step(method, args, device):
    """A step of soco, or, as soco_four_levels, of the same with the head on every level."""
    recipe = soco.parse_args(["--data", "none", "--arch", args.arch])
    if method == "soco_four_levels":
        soco.Network = FourLevels
    model = soco.SoCo(recipe.arch).to(device)
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    image = torch.randint(256, (3, SIZE[1], SIZE[0]), dtype=torch.uint8)
    views, places, _ = default_collate([
        soco.make_views((image, soco.random_boxes(*SIZE)), recipe) for _ in range(args.batch_size)])
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], 0.1)

    def step():
        boxes = [soco.into_view(places, view.box, view.flipped, view.pixels.shape[-1]).to(device)
                 for view in views]
        pixels = [photometric(view.pixels.to(device), p_blur=recipe.p_blur[i > 0],
                              p_solarize=0.2 * (i > 0)) for i, view in enumerate(views)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, _ = model(pixels, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.online, model.target, 0.99)
        return loss.item()
    return step


def peak():
    """GiB that this process has had at its most: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def time_step(method, args):
    """In a process of its own -> seconds a step, peak GiB, and TFLOP where they are counted."""
    torch.manual_seed(0)
    step, seconds = make_step(method, args, "cuda" if torch.cuda.is_available() else "cpu"), []
    with FlopCounterMode(display=False) as counter:
        step()
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return np.median(seconds[1:]), peak(), counter.get_total_flops() / 1e12


def alone(function, *args):
    """What function(*args) returns in a fresh process, which nothing before has filled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def step(args, methods=("moco_v2", "detco", "dupr", "soco")):
    rounds = np.array([[alone(time_step, method, args) for method in methods]
                       for _ in range(args.rounds)])  # (rounds, methods, 3)
    times, memory, arithmetic = rounds[:, :, 0], rounds[:, :, 1].max(0), rounds[0, :, 2]
    print(f"{args.arch}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps")
    for i, method in enumerate(methods):
        ratios = times[:, i] / times[:, 0]
        print(f"{method:16} {args.batch_size / np.median(times[:, i]):7.1f} images/s  "
              f"time x {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})  "
              f"arithmetic {arithmetic[i]:.3f} TFLOP, x {arithmetic[i] / arithmetic[0]:.2f}  "
              f"peak {memory[i]:.1f} GiB")


def time_loss(queries, chunk):
    """In a process of its own -> seconds forward and backward, peak GiB beyond what came in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, negatives = (F.normalize(torch.randn(n, 128, device=device), dim=1)
                       for n in (queries, queries, 65536))
    q.requires_grad_()
    before = peak()
    start = time.perf_counter()
    info_nce(q, k, negatives, 0.2, chunk).backward()
    q.grad.sum().item()  # waits for the device
    return time.perf_counter() - start, peak() - before


def loss(args):
    for name, queries, chunk in (("all at once", args.queries // 8, args.queries // 8),
                                 ("in chunks", args.queries // 8, None),
                                 ("in chunks", args.queries, None)):
        seconds, memory = np.median([alone(time_loss, queries, chunk)
                                     for _ in range(args.rounds)], axis=0)
        print(f"{queries:6} queries against 65536 keys, {name:11}: {seconds:6.2f} s, "
              f"{memory:.2f} GiB")


def levels(args):
    step(args, ("soco", "soco_four_levels"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("load", "step", "loss", "levels"))
    parser.add_argument("--data", help="load: folder of photos to use instead of smooth noise")
    parser.add_argument("--images", type=int, default=64, help="load: JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arch", default="resnet50", help="step: the backbone")
    parser.add_argument("--batch-size", type=int, default=256, help="step: images")
    parser.add_argument("--steps", type=int, default=5, help="step: how many a round, after two")
    parser.add_argument("--queries", type=int, default=256 * 14 * 14, help="loss: N")
    args = parser.parse_args()
    dict(load=load, step=step, loss=loss, levels=levels)[args.what](args)


if __name__ == "__main__":
    main()
