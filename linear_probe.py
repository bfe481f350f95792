"""How good frozen features are, stage by stage: a linear classifier on each of Res2..Res5.

DetCo's Tables 2 and 8 and DUPR's Table VI (b).  The backbone does not train: an image's features
are the mean of a stage over its positions, computed once.  A detector with an FPN reads all four
stages, while a loss at Res5 alone teaches the shallow ones little.  Random weights (none) have the
batch norm statistics of 32 training images.  Read first: a method, for the --weights.

Data sets
    scenes, voc, coco   which classes are in an image?  One linear SVM per class (fit_svm,
                        svm_scores), mean average precision over classes (average_precision)
    folder              DIR/train/CLASS/* and DIR/val/CLASS/*: one class per image.  A softmax
                        classifier (softmax_scores), top-1 and top-5 accuracy

Commands
    python linear_probe.py --weights none runs/moco_v2/backbone.pt runs/detco/backbone.pt
    torchrun --nproc_per_node=8 linear_probe.py --dataset voc --data DIR --weights FILE
    torchrun --nproc_per_node=8 linear_probe.py --dataset folder --data DIR --weights FILE
"""
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop, normalize, resize

from common import InputError, all_reduce_sum, rank, world_size
from detection.data import LabelledScenes
from detection.formats import TEST_SPLITS, TRAIN_SPLITS, read_splits
from plumbing.drawing import PAGE
from plumbing.files import COPIES, ImageFiles, ImageFolder
from plumbing.flags import Parser, add_backbone_arguments, real, whole
from plumbing.images import leave_signals_to_trainer, seed_for
from plumbing.run import distribute, gather_objects, launch
from plumbing.weights import LEVELS, load_backbones


class Labelled(Dataset):
    """Item i: the centre of image i, (3, size, size) uint8; i; whether image i could be decoded.

    images: ImageFiles or Scenes.  targets: (n, classes) in 1 (class present), -1 (absent) and 0
    (not judged), or (n,) class numbers.
    """

    def __init__(self, images, targets, classes, args):
        self.images, self.targets, self.classes, self.args = images, targets, classes, args

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        number, image = self.images.numbered(i)
        size = self.args.image_size
        image = resize(image, [round(size / self.args.crop)], antialias=True)
        return center_crop(image, [size, size]), i, number == i


def presence(objects, num_classes):
    """Targets (n, num_classes) of n images: 1 where a class is present, 0 where all its objects are
    ignored (VOC's `difficult`, COCO's crowds), else -1.  objects: lists of (class, ignored)."""
    targets = torch.full((len(objects), num_classes), -1.0)
    for row, found in zip(targets, objects):
        for label, ignored in found:
            row[label] = max(row[label].item(), 0.0 if ignored else 1.0)
    return targets


def read_data(args, part, classes=None):
    """The images of ``part`` (train or test) and their targets -> Labelled.  classes: by default
    those of the split; raises InputError if it has others."""
    split = getattr(args, f"{part}_split")
    if args.dataset == "folder":
        paths, names = [], []
        for folder in split:
            images = ImageFolder(Path(args.data, folder))
            paths += images.paths
            names += [name.partition("/") for name in images.names]
            used = {name.partition("/")[0] for name in images.names}
            for entry in os.scandir(images.root):
                copies = entry.name.startswith(".") or entry.name.lower() in COPIES
                if entry.is_dir() and not copies and entry.name not in used:
                    raise InputError(f"{entry.path}: no image of this class")
        found = sorted({name for name, slash, _ in names if slash})
        loose = [name for name, slash, _ in names if not slash]
        if loose or len(found) < 2 or found != (classes or found):
            raise InputError(f"{' '.join(split)} of {args.data}: " + (
                f"{loose[0]} is in no class's folder" if loose else
                f"one class, {found[0]}: nothing to tell apart" if len(found) < 2 else
                f"other classes than in training: {' '.join(sorted({*found} ^ {*classes})[:9])}"))
        targets = torch.tensor([found.index(name) for name, *_ in names])
        return Labelled(ImageFiles(paths), targets, found, args)
    if args.dataset == "scenes":
        scenes = LabelledScenes(getattr(args, f"{part}_scenes"), seed=1 if part == "train" else 2)
        objects = [[(label, False) for label in scenes[i][1]["labels"].tolist()]
                   for i in range(len(scenes))]
        return Labelled(scenes.scenes, presence(objects, len(scenes.classes)), scenes.classes, args)
    classes, files = read_splits(args.dataset, args.data, split, classes)
    objects = [[(classes.index(thing.name), thing.ignore) for thing in file.objects]
               for file in files]
    images = ImageFiles([file.path for file in files])
    return Labelled(images, presence(objects, len(classes)), classes, args)


@torch.no_grad()
def extract(stages, data, args, device, what):
    """For each of --levels features (n, C), float32, and their targets.  With --dataset folder each
    process gets its own share of the images, else all get all.  Images that cannot be decoded are
    left out; raises InputError if over 1% cannot.  what: names the images in progress lines."""
    mine = range(rank(), len(data), world_size())
    loader = DataLoader(data, args.batch_size // world_size(), sampler=mine,
                        num_workers=args.workers, worker_init_fn=leave_signals_to_trainer,
                        pin_memory=device.type == "cuda")
    parts, began = [], time.monotonic()
    said = began
    for done, (pixels, rows, decoded) in enumerate(loader, 1):
        x = normalize(pixels.to(device, non_blocking=True).float() / 255, args.mean, args.std)
        # Paper silent: bfloat16 on GPUs
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = stages(x)
        means = [found[LEVELS.index(level)].float().mean((2, 3)) for level in args.levels]
        parts.append([x[decoded.to(x.device)] for x in (*means, rows)])
        now = time.monotonic()
        if rank() == 0 and (now - said > 10 or done == len(loader)):
            said, left = now, (len(loader) - done) * (now - began) / done / 60
            print(f"{what}: {done}/{len(loader)} batches  {left:.1f} min left", flush=True)
    if isinstance(data.images, ImageFiles):
        data.images.report(print, "left out", complete=True)
    if args.dataset != "folder":
        everyone = gather_objects([[x.cpu() for x in part] for part in parts])
        parts = [part for share in everyone for part in share]
    *levels, rows = (torch.cat(column) for column in zip(*parts))
    order = rows.argsort()
    return [(x[order].to(device), data.targets[rows[order]].to(device)) for x in levels]


def svm_objective(w, b, x, y, cost):
    """|w|^2 / 2 + cost sum_i max(0, 1 - y_i (w x_i + b))^2 of each class, (classes,).

    w (classes, C), b (classes,), x (n, C), y (n, classes) in 1, -1, and 0 for what is not judged,
    cost (classes,).
    """
    slack = F.relu(1 - y * (x @ w.T + b)) * (y != 0)  # (n, classes)
    return (w ** 2).sum(1) / 2 + cost * (slack ** 2).sum(0)


def fit_svm(x, y, cost, start=None, steps=1500):
    """The minimum of svm_objective by L-BFGS in float64, from ``start`` (w, b) or 0 -> w
    (classes, C), b (classes,).  The bias is not penalised."""
    mean = x.double().mean(0)
    x, y, cost = x.double() - mean, y.double(), cost.double()  # the bias takes up the mean
    w, b = start or (x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1]))
    w, b = (p.detach().clone().requires_grad_() for p in (w, b + w @ mean))
    solver = torch.optim.LBFGS([w, b], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-12,
                               history_size=20, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = (svm_objective(w, b, x, y, cost) / (cost * len(x))).sum()  # classes on one scale
        value.backward()
        return value

    solver.step(objective)
    return w.detach(), b.detach() - w.detach() @ mean


def average_precision(scores, y):
    """Area under the precision-recall curve of one class, with the precision made
    non-increasing in recall.

    scores (n,); y (n,) in 1, -1, and 0 for what is not judged.  NaN without a positive.  Of equal
    scores the negatives come first.
    """
    # The area under the curve, as in Goyal et al.'s code, whose settings DUPR takes (4.5.1); not
    # VOC07's mean of the precision at 11 recalls
    scores, y = np.asarray(scores)[np.asarray(y) != 0], np.asarray(y)[np.asarray(y) != 0]
    positive = y[np.lexsort((y, -scores))] > 0  # (n,), best first
    if not positive.any():
        return math.nan
    precision = positive.cumsum() / np.arange(1, len(positive) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(precision[positive].mean())


def svm_scores(train, test, classes, args):
    """mAP and the AP of each of the classes, from features (n, C) and targets (n, classes): a
    dict."""
    def precisions(w, b, x, y):
        return [average_precision(s, t) for s, t in zip((x @ w.T + b).T.cpu(), y.T.cpu())]

    # Features of unit length, as in Goyal et al.'s code, whose settings DUPR takes (4.5.1).
    # Differs: there three folds choose each class's cost, of at most 0.1, positives weigh twice,
    # the bias is penalised, and an image of `difficult` objects alone is a negative.  Here each
    # class takes the cost that does best on a fifth of the training images, held out, and is fitted
    # again on all of them.
    (x, y), (x_test, y_test) = ((F.normalize(x.double(), dim=1), y) for x, y in (train, test))
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(x))).to(x.device)
    held_out, rest = order[:len(x) // 5], order[len(x) // 5:]
    tried, start, costs = [], None, sorted(args.costs)
    for cost in costs:
        start = fit_svm(x[rest], y[rest], torch.full_like(y[0], cost), start)
        tried.append(precisions(*start, x[held_out], y[held_out]))
    tried = np.array(tried)  # (costs, classes)
    mean = np.nan_to_num(tried).mean(1, keepdims=True)  # for a class without a positive held out
    best = np.where(np.isnan(tried), mean, tried).argmax(0)  # (classes,)
    w, b = fit_svm(x, y, torch.tensor(costs)[best].to(x.device), start)
    found = precisions(w, b, x_test, y_test)
    return {"mAP": np.nanmean(found), **dict(zip(classes, found))}


def softmax_scores(train, test, classes, args):
    """Top-1 and top-5 accuracy of a linear layer, trained and tested on all processes' features.

    train, test: this process's features (n, D) and numbers (n,) of their classes.
    """
    # Differs: MoCo's code (main_lincls.py) crops and flips at random in every epoch; here features
    # are computed once, of the centre of the image, and divided by their mean length, so that the
    # learning rate means the same at every level
    (x, y), (x_test, y_test) = train, test
    total, length = all_reduce_sum(torch.stack([x.new_tensor(len(x)), x.norm(dim=1).sum()]))
    x, x_test = x / (length / total), x_test / (length / total)
    torch.manual_seed(args.seed)
    layer = nn.Linear(x.shape[1], len(classes))
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    layer, ddp = distribute(layer, x.device)
    optimizer = torch.optim.SGD(layer.parameters(), args.lr * args.batch_size / 256, momentum=0.9)
    # as main_lincls.py, where the rate falls to a tenth at epochs 60 and 80 of 100
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [math.ceil(0.6 * args.epochs), math.ceil(0.8 * args.epochs)], gamma=0.1)
    steps, batch = max(1, int(total) // args.batch_size), args.batch_size // world_size()
    for epoch in range(args.epochs):
        order = np.random.default_rng(seed_for(args.seed, epoch, rank())).permutation(len(y))
        batches = np.resize(order, (steps, batch))  # starts over where this process has too few
        for rows in torch.from_numpy(batches).to(x.device):
            loss = F.cross_entropy(ddp(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if rank() == 0 and (epoch + 1) % max(1, args.epochs // 5) == 0:
            print(f"softmax: epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}", flush=True)
    with torch.no_grad():
        hits = layer(x_test).topk(min(5, len(classes))).indices == y_test[:, None]  # (n, 5)
    counts = hits.new_tensor([len(hits), hits[:, 0].sum(), hits.sum()], dtype=torch.float64)
    total, top1, top5 = all_reduce_sum(counts).tolist()
    return {"top-1": top1 / total, "top-5": top5 / total}


def report(measured, metric, chance, args):
    """Print the table of ``metric`` (``chance``: what guessing reaches); write all into --out.

    measured: label -> for each of --levels a dict, measure -> value.
    """
    table = np.array([[100 * level[metric] for level in levels] for levels in measured.values()]).T
    width = max(map(len, [*measured, "100.00"]))
    print(f"by chance {100 * chance:.2f}")
    print(f"{metric} (%)", *(label.rjust(width) for label in measured), sep="  ")
    for level, row in zip(args.levels, table):
        print(level.ljust(len(metric) + 4), *(f"{value:{width}.2f}" for value in row), sep="  ")
    content = {label: {level: {k: None if math.isnan(v) else v for k, v in values.items()}
                       for level, values in zip(args.levels, levels)}
               for label, levels in measured.items()}  # JSON knows no NaN
    out = Path(args.out)
    (out / "probe.json").write_text(json.dumps(content, indent=2) + "\n")
    figure = Figure((0.7 * PAGE, 0.45 * PAGE))
    axes = figure.add_subplot(xlabel="level", ylabel=f"{metric} (%)")
    for label, column in zip(measured, table.T):
        axes.plot([level.capitalize() for level in args.levels], column, "o-", label=label)
    axes.axhline(100 * chance, color="0.4", ls="--", label="chance")
    axes.grid()
    axes.legend()
    figure.savefig(out / "probe.png")
    print(f"wrote {out}/probe.json and {out}/probe.png", flush=True)


def probe(args, device):
    """Probe each of --weights at each of --levels."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.batch_size < world_size():
        raise InputError(f"--batch-size {args.batch_size} is less than {world_size()} processes")
    train = read_data(args, "train")
    test = read_data(args, "test", train.classes)
    if min(len(train), len(test)) < max(2, world_size()):
        raise InputError(f"{len(train)} and {len(test)} images are too few")
    if args.dataset == "folder":
        scores, metric, chance = softmax_scores, "top-1", 1 / len(train.classes)
    else:  # of a class: the share of images that have it; without any it is left out, as in mAP
        shares = (test.targets == 1).sum(0) / (test.targets != 0).sum(0)
        scores, metric, chance = svm_scores, "mAP", shares[shares > 0].mean().item()
        if chance == 1:
            raise InputError("each test image has each class: nothing to tell apart")
    for name, data in (("training", train), ("test", test)):
        images = data.targets.bincount() if args.dataset == "folder" else (data.targets == 1).sum(0)
        counts = ", ".join(f"{n} {c}" for n, c in zip(images.tolist(), data.classes))
        if not images.any():
            raise InputError(f"{name}: {len(data)} images, none of which has a class: {counts}")
        if rank() == 0:
            print(f"{name}: {len(data)} images; {counts}", flush=True)
        if rank() == 0 and name == "training" and not images.all():
            missing = [c for n, c in zip(images.tolist(), data.classes) if not n]
            print(f"warning: no training image of {', '.join(missing)}", flush=True)

    def batch():  # at most 32 training images of all classes
        some = [train[i][0] for i in range(0, len(train), math.ceil(len(train) / 32))]
        return normalize(torch.stack(some).to(device).float() / 255, args.mean, args.std)

    measured = {}
    for label, stages, _ in load_backbones(args, device, batch):
        features = zip(extract(stages, train, args, device, f"{label}, training"),
                       extract(stages, test, args, device, f"{label}, test"))
        measured[label] = []
        for level, both in zip(args.levels, features):
            found = scores(*both, train.classes, args)
            measured[label].append(found)
            if rank() == 0:
                print(f"{label}, {level}: {metric} {100 * found[metric]:.2f}", flush=True)
    if rank() == 0:
        report(measured, metric, chance, args)


def parse_args(argv=None):
    """The papers' settings for the data set by default; for scenes, small ones."""
    parser = Parser(description="Linear classifiers on frozen features.")
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="stages to probe")
    add("--dataset", choices=["scenes", "voc", "coco", "folder"], default="scenes",
        help="what to probe on")
    add("--data", help="folder of the data set; scenes need none")
    add("--train-split", nargs="+", help="default: 2007/trainval, train2017 or train")
    add("--test-split", nargs="+", help="default: 2007/test, val2017 or val")
    add("--image-size", type=whole(32), default=224, help="side in pixels; for scenes 96")
    add("--crop", type=real(0.1, 1), default=0.875, help="side of the centre crop, as a "
        "share of the short side; for scenes 1")
    add("--costs", type=real(1e-9), nargs="+", default=[10.0 ** k for k in range(-2, 4)],
        metavar="C", help="of the SVMs, to choose from")
    add("--batch-size", type=whole(1), default=256, help="total over all processes")
    add("--lr", type=real(0), default=30.0, help="of softmax, per 256 images (MoCo, Sec. 4.1)")
    add("--epochs", type=whole(1), default=100, help="of softmax (MoCo, Sec. 4.1)")
    add("--train-scenes", type=whole(10), default=1000, help="number of built-in scenes to fit")
    add("--test-scenes", type=whole(1), default=1000, help="number of built-in scenes to test on")
    add("--workers", type=whole(0), default=2, help="loader workers per process")
    add("--out", default="runs/probe", help="folder for probe.json and probe.png")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(train_split=TRAIN_SPLITS.get(dataset, ["train"])[:1],
                        test_split=TEST_SPLITS.get(dataset, ["val"]))
    if dataset == "scenes":
        parser.set_defaults(image_size=96, crop=1.0)  # shapes reach the border
    args = parser.parse_args(argv)
    if (dataset == "scenes") != (args.data is None):
        parser.error("--data needs --dataset voc, coco or folder, and these need --data")
    return args


def main(argv=None):
    """The command."""
    launch(probe, parse_args, argv)


if __name__ == "__main__":
    main()
