"""How fast it is, each figure as a ratio within one run, and what selective search finds:

    python tools/benchmark.py load [--data DIR]      one core's way from a file to two views
    python tools/benchmark.py step [--arch resnet18 --batch-size 16]      each method's training
    python tools/benchmark.py loss [--queries 50176]                      InfoNCE in chunks
    python tools/benchmark.py levels [--arch resnet18 --batch-size 16]    SoCo's one level per box
    python tools/benchmark.py growth [--arch resnet18 --batch-size 16]    with K, S, P, processes
    python tools/benchmark.py precision [--arch resnet18 --batch-size 16]   bfloat16 beside float32
    python tools/benchmark.py bare                       a step of MoCo v2 against a bare loop
    python tools/benchmark.py detectors --batch-size 2   a step of the papers' C4 and FPN
    python tools/benchmark.py recall --data VOC2007      selective search against annotated boxes

load compares, on the same JPEGs of 500 x 375 and of 4000 x 3000 pixels and in turn, two ways to two
224-pixel views of a photo: the usual chain, all of it in the loader worker (PIL crop, jitter, grey,
blur, flip, tensor), and this project's part of a worker (decode, two crops; colour is the device's
work).  step runs each
method's own training loop, with the paper's recipe, in processes of its own, in turn, on a GPU if
there is one: with a batch that is on the device from the start, and end to end, from 500 x 375
JPEGs, where `waiting` is the share of time in which the loop has no batch yet.  The arithmetic is
what torch counts of a step's convolutions and matrix products, and its share is that of this
machine's matrix product.  loss is DUPR's patch loss at full size.  levels is SoCo's step, each box
through the head from the one level of its size, against one in which the head runs on all four
levels for every box and three results are masked away.  detectors is fine-tuning at the papers'
size: images of VOC's usual shape for C4, of COCO's for FPN, short sides in the middle of the
recipe's, random pixels, 512 RoIs.  recall is the overlap of the best proposal with each annotated
object of a folder in VOC's layout that passes SoCo's filter.
"""
import argparse
import contextlib
import csv
import io
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.ops import box_iou, roi_align

sys.path.insert(0, str(Path(__file__).parent.parent))
import barlow_twins  # noqa: E402
import detco  # noqa: E402
import dupr  # noqa: E402
import finetune_fasterrcnn  # noqa: E402
import moco_v2  # noqa: E402
import plumbing.run  # noqa: E402
import soco  # noqa: E402
import vicreg  # noqa: E402
from common import InputError, info_nce  # noqa: E402
from detection.formats import read_voc  # noqa: E402
from detection.models import build_detector  # noqa: E402
from plumbing.files import ImageFiles, ImageFolder, read_image  # noqa: E402
from plumbing.images import Photos, two_views  # noqa: E402
from selective_search import STRATEGIES, keep_object_like, propose  # noqa: E402

SIZE, LARGE = (500, 375), (4000, 3000)


def make_images(folder, number, data, size=SIZE):
    """JPEGs of a size: photos found below ``data``, resized, or smooth noise without it."""
    rng = np.random.default_rng(0)
    photos = ImageFolder(data) if data else None
    for i in range(number):
        if photos:
            image = Image.fromarray(photos[i % len(photos)].permute(1, 2, 0).numpy())
        else:
            image = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        image.resize(size, Image.BICUBIC).save(folder / f"{i:03}.jpg", quality=90)
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


def load(args):
    torch.set_num_threads(1)
    for size, number in ((SIZE, args.images), (LARGE, math.ceil(args.images / 25))):
        with tempfile.TemporaryDirectory() as folder:
            compare_ways(make_images(Path(folder), number, args.data, size), size, args.rounds)


def compare_ways(paths, size, rounds):
    photos = Photos(ImageFiles([str(path) for path in paths]), (224, 0.2))
    ways = dict(usual=lambda i: load_usual(paths[i]),
                ours=lambda i: two_views(photos[i], 224, (0.2, 1.0)))
    speeds = {name: [] for name in ways}
    for name in [*ways] * (rounds + 1):  # in turn: a noisy machine slows both
        start = time.perf_counter()
        for i in range(len(paths)):
            ways[name](i)
        speeds[name].append(len(paths) / (time.perf_counter() - start))
    chains, ours = (np.array(found[1:]) for found in speeds.values())  # the first one warms up
    ratios = ours / chains
    print(f"{size[0]} x {size[1]} pixels, images/s on one core: usual chain "
          f"{np.median(chains):.4g}, ours {np.median(ours):.4g}; ratio {np.median(ratios):.1f} "
          f"(of {rounds} rounds: {ratios.min():.1f} to {ratios.max():.1f})", flush=True)


METHODS = dict(moco_v2=moco_v2, detco=detco, dupr=dupr, soco=soco, barlow_twins=barlow_twins,
               vicreg=vicreg)


class FourLevels(soco.Network):
    """The head on all levels for every box, and a mask that keeps the one of its size."""

    def forward(self, images, boxes):
        pyramid, boxes = self.backbone(images), list(boxes)
        levels, total = self.pool.map_levels(torch.cat(boxes)), 0
        for i, stride in enumerate(self.pool.strides):
            regions = roi_align(pyramid[str(i)], boxes, 7, 1 / stride, aligned=True)
            total = total + (levels == i).unsqueeze(1) * self.head(regions)
        return self.projector(total)


def peak():
    """GiB that this process has had at its most: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def alone(function, *args):
    """What function(*args) returns in a fresh process, which nothing before has filled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Steps:
    """Takes the place of load_batches: gives ``number`` batches of it and times the loop.

    resident: the first batch again and again, on the device from the start.  Counts a step from
    where the loop asks for its batch to where it asks for the next; ``marks`` are these moments,
    ``waits`` how long each batch was waited for.
    """

    def __init__(self, load_batches, number, device, resident):
        self.load_batches, self.number, self.device = load_batches, number, device
        self.resident, self.marks, self.waits = resident, [], []

    def __call__(self, data, draw, batch_size, steps, *more, **kwargs):
        loader = iter(self.load_batches(data, draw, batch_size, steps, *more, **kwargs))
        batch = next(loader) if self.resident else None
        if self.resident:
            batch = tree_map(lambda x: x.to(self.device) if torch.is_tensor(x) else x, batch)
        for _ in steps:
            self.marks.append(self.now())
            batch = batch if self.resident else next(loader)
            self.waits.append(time.perf_counter() - self.marks[-1])
            yield batch

    def now(self):
        """The time, when the device has done what it was given; asked for only at the ends."""
        if self.device.type == "cuda" and (self.resident or len(self.marks) in (WARM, self.number)):
            torch.cuda.synchronize()
        return time.perf_counter()


WARM = 2  # steps that do not count


def train(method, words, steps, resident):
    """A training of so many steps, in a process of its own -> seconds a step, the share of them
    spent waiting for batches, peak GiB, TFLOP a step (resident only: counting slows the rest)."""
    if method == "four_levels":
        method, soco.Network = "soco", FourLevels
    module = METHODS[method]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = WARM + steps
    clock = Steps(plumbing.run.load_batches, number, device, resident)
    plumbing.run.load_batches = clock
    Run = plumbing.run.Run
    counter, flops, end_step = FlopCounterMode(display=False), [], Run.end_step

    def end(run, *args, **kwargs):
        if run.step == 0 and resident:
            flops.append(counter.get_total_flops() / 1e12)
            counter.__exit__(None, None, None)
        if run.step == number - 1:
            clock.marks.append(clock.now())
            raise KeyboardInterrupt  # the end: nothing is saved
        end_step(run, *args, **kwargs)

    Run.end_step = end
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = module.parse_args([*words, "--epochs", "1", "--out", folder, "--log-every", "9999"])
        if resident:
            counter.__enter__()
        with contextlib.suppress(KeyboardInterrupt):
            module.train(args, device)
    marks = np.array(clock.marks)
    total = marks[-1] - marks[WARM]
    waited = sum(clock.waits[WARM:])
    return total / steps, waited / total, peak(), flops[0] if flops else 0.0


def matrix_rate():
    """TFLOP/s of this machine's matrix product, as the methods use it: bfloat16 on a GPU."""
    cuda = torch.cuda.is_available()
    size, kind = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a = torch.randn(size, size, dtype=kind, device="cuda" if cuda else "cpu")
    best = np.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best / 1e12


def words_of(method, args, folder):
    """The flags of a method: the paper's recipe, but for the benchmark's arguments."""
    words = ["--data", str(folder), "--arch", args.arch, "--batch-size", str(args.batch_size),
             "--workers", str(args.workers)]
    if method in ("moco_v2", "detco", "dupr"):
        words += ["--random-queue", "--queue-size", str(args.queue_size)]
    return words + (
        ["--proposals", "random"] if method in ("soco", "four_levels") else [])


def compare(args, variants, both=True):
    """Print a line for each variant, label -> (method, flags), in turn, --rounds times; ratios are
    to the first one."""
    rows, number = [], args.batch_size * (WARM + args.steps)
    with tempfile.TemporaryDirectory() as folder:
        sources = make_images(Path(folder), min(number, 512), args.data)
        # as many images as keys, which check_queue asks for
        for i in range(len(sources), max(number, args.queue_size)):
            (Path(folder) / f"{i:06}.jpg").symlink_to(sources[i % len(sources)])
        measured = []
        for _ in range(args.rounds):
            measured.append([])
            for method, flags in variants.values():
                words = words_of(method, args, folder) + flags + args.flags
                alive = alone(train, method, words, args.steps, True)
                loaded = alone(train, method, words, args.steps, False) if both else alive
                measured[-1].append((*alive, *loaded))
    measured, rate = np.array(measured), matrix_rate()  # (rounds, variants, 8)
    for i, label in enumerate(variants):
        seconds, _, memory, flops, end_to_end, waited, _, _ = np.median(measured[:, i], axis=0)
        ratio = measured[:, i, 0] / measured[:, 0, 0]
        row = dict(variant=label, images_per_s=args.batch_size / seconds, time=np.median(ratio),
                   time_least=ratio.min(), time_most=ratio.max(), tflop=flops,
                   arithmetic=flops / measured[0, 0, 3], of_matrix_rate=flops / seconds / rate,
                   peak_gib=memory)
        if both:
            row.update(end_to_end=args.batch_size / end_to_end, of_resident=seconds / end_to_end,
                       waiting=waited)
        rows.append(row)
    print(f"{args.arch}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps; "
          f"matrix product {rate:.3f} TFLOP/s; time and arithmetic: times the first one's")
    names = [*rows[0]]
    for line in (dict(zip(names, names)), *rows):
        print("  ".join((v if isinstance(v, str) else f"{v:.3g}").rjust(max(len(name), 12))
                        for name, v in line.items()))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def step(args):
    compare(args, {method: (method, []) for method in args.methods})


def precision(args):
    for method in args.methods:
        compare(args, {f"{method}, {kind}": (method, ["--precision", kind])
                       for kind in ("float32", "bfloat16")}, both=False)


def levels(args):
    compare(args, {"one": ("soco", []), "four": ("four_levels", [])}, both=False)


def growth(args):
    compare(args, {f"K {k}": ("moco_v2", ["--queue-size", str(k)])
                   for k in (args.queue_size // 16, args.queue_size // 4, args.queue_size)},
            both=False)
    compare(args, {f"S {s}": ("dupr", ["--roi-size", *map(str, (s, s, s, s // 2))])
                   for s in (4, 8, 14)}, both=False)
    compare(args, {f"P {p}": ("soco", ["--boxes-per-image", str(p)]) for p in (1, 4, 8, 16)},
            both=False)
    root = Path(__file__).parent.parent
    for number in (1, 2):  # end to end, on the built-in scenes, in as many processes
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                            f"--nproc_per_node={number}", str(root / "moco_v2.py"), "--epochs", "1",
                            "--scenes", "1280", "--workers", "0", "--out", folder],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with open(Path(folder) / "log.csv", newline="") as file:
                speed = [*csv.DictReader(file)][-1]["images_per_s"]
            print(f"moco_v2, scenes, {number} processes: {speed} images/s")


def bare_loop(batch_size, size, steps):
    """In a process of its own -> seconds of a step of the same networks on noise: two forward
    passes, of which one keeps what a backward pass needs, that pass, and SGD."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = (torchvision.models.resnet18(num_classes=512).to(device) for _ in range(2))
    optimizer, seconds = torch.optim.SGD(q.parameters(), 0.01, momentum=0.9), []
    images = torch.randn(2, batch_size, 3, size, size, device=device)
    for _ in range(WARM + steps):
        start = time.perf_counter()
        loss = q(images[0]).square().mean()
        with torch.no_grad():
            k(images[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return np.mean(seconds[WARM:])


def bare(args):
    words = ("--image-size 64 --batch-size 128 --queue-size 4096 --arch resnet18 --random-queue "
             f"--optimizer sgd --scenes {max(2000, 128 * (WARM + args.steps))}").split()
    ratios = []
    for _ in range(args.rounds):
        ours = alone(train, "moco_v2", words, args.steps, True)[0]
        ratios.append(ours / alone(bare_loop, 128, 64, args.steps))
    print(f"moco_v2, resnet18, 64 pixels, batch 128: {np.median(ratios):.3f} times a bare loop "
          f"({args.rounds} rounds: {min(ratios):.3f} to {max(ratios):.3f})")


def detector_step(dataset, classes, image_size, args):
    """In a process of its own: training steps of a recipe's detector -> TFLOP and seconds of the
    last, peak GiB."""
    recipe = finetune_fasterrcnn.RECIPES[dataset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_detector(
        args.arch, classes, recipe["detector"],
        min_size=(int(np.median(recipe["min_size"])),)).to(device).train()
    images = [torch.rand(3, *image_size, device=device) for _ in range(args.batch_size)]
    targets = [dict(boxes=torch.tensor([[50.0, 60.0, 200.0, 300.0], [220.0, 80.0, 460.0, 250.0]]),
                    labels=torch.tensor([1, 2])) for _ in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
    for _ in range(1 + args.steps):
        model.zero_grad()
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            with torch.autocast(device.type, torch.bfloat16):
                losses = model(images, targets)
            loss = sum(losses.values())
            loss.backward()
            loss.item()
        seconds = time.perf_counter() - start
    return counter.get_total_flops() / 1e12, seconds, peak()


def detectors(args):
    for name, *what in (("C4, VOC", "voc", 20, (375, 500)), ("FPN, COCO", "coco", 80, (480, 640))):
        flops, seconds, memory = alone(detector_step, *what, args)
        print(f"{name}: {args.arch}, {args.batch_size} images of {what[2][0]} x {what[2][1]}: "
              f"{flops:.2f} TFLOP, {seconds:.1f} s, peak {memory:.1f} GiB")


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


def recall(args):
    """On images evenly spread over the split, in one process, nothing kept."""
    files = read_voc(args.data, args.split)[1]
    best, seconds, boxes = [], [], []
    for file in files[::max(1, len(files) // args.images)][:args.images]:
        image = read_image(file.path)
        truths = np.array([thing.box for thing in file.objects if not thing.ignore])
        truths = truths.reshape(-1, 4)
        start = time.process_time()
        found = propose(image, args.strategy, 224)
        seconds.append(time.process_time() - start)
        boxes.append(len(found))
        truths = keep_object_like(truths, image.shape[2], image.shape[1])
        iou = box_iou(torch.from_numpy(truths), torch.from_numpy(found.astype(np.float64)))
        best += [max([0.0, *row]) for row in iou.tolist()]
    print(f"{args.strategy}: {len(boxes)} images, {len(best)} objects that pass SoCo's filter: "
          f"mean best overlap {np.mean(best):.3f}, recall at IoU 0.5 "
          f"{np.mean(np.array(best) >= 0.5):.3f}; {np.mean(boxes):.1f} boxes, "
          f"{np.mean(seconds):.3f} s of a core per image")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = {f.__name__: f for f in (load, step, loss, levels, growth, precision, bare,
                                         detectors, recall)}
    parser.add_argument("what", choices=commands)
    parser.add_argument("--data", help="load, step: folder of photos to use instead "
                        "of smooth noise; recall: folder in VOC's layout")
    parser.add_argument("--images", type=int, default=64, help="load: JPEGs; recall: images")
    parser.add_argument("--rounds", type=int, default=5,
                        help="how often each variant is timed, in turn")
    parser.add_argument("--arch", default="resnet50", help="the backbone")
    parser.add_argument("--batch-size", type=int, default=256, help="images of a step")
    parser.add_argument("--steps", type=int, default=5,
                        help="how many a round, after two (detectors: after one)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                        help="loader workers")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS],
                        help="of step and precision")
    parser.add_argument("--queue-size", type=int, default=65536,
                        help="step: K; growth: the largest")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="step: any of the "
                        "method's own, last on the line")
    parser.add_argument("--csv", metavar="FILE", help="step, levels: keep the table")
    parser.add_argument("--queries", type=int, default=256 * 14 * 14, help="loss: N")
    parser.add_argument("--split", default="test", help="recall: of the folder")
    parser.add_argument("--strategy", choices=[*STRATEGIES], default="fast", help="recall")
    args = parser.parse_args()
    try:
        commands[args.what](args)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
