"""How good frozen features are, level by level: a linear classifier on each of Res2..Res5.

DetCo's Tables 2 and 8 and DUPR's Table VI (b): the backbone stays as it is, every image becomes the
mean of a level's positions, once, and what a linear classifier makes of that is the level's worth.
Detectors read all four levels, while pre-training at Res5 alone teaches the shallow ones little.

Read first: one of the methods, for where --weights comes from.

Data
    scenes            which of six shapes are there?       linear SVMs, mean average precision
    voc, coco         which classes are there?             likewise
    folder            DIR/train/CLASS/*, DIR/val/CLASS/*   softmax, top-1 and top-5 accuracy

Formulae
    |w|^2 / 2 + C sum_i max(0, 1 - y_i (w x_i + b))^2      svm_objective, fit_svm
    area under the precision-recall curve                  average_precision
    softmax classifier of the ImageNet recipe              fit_softmax

Commands
    python linear_probe.py --weights none runs/moco_v2/backbone.pt runs/detco/backbone.pt
    torchrun --nproc_per_node=8 linear_probe.py --dataset voc --data DIR --weights FILE
    torchrun --nproc_per_node=8 linear_probe.py --dataset folder --data DIR --weights FILE

Where this differs from the papers, or they are silent
    - SVMs see features of unit length; each class takes the cost that does best on a fifth of the
      training images, held out, and is fitted again on all of them.  An image in which all objects
      of a class are `difficult` (or crowds) neither trains nor tests that class.
    - AP is the area under the curve whose precision never rises with recall (VOC2010), not VOC07's
      11 points.
    - The ImageNet recipe (MoCo: batch 256, lr 30, 100 epochs, a tenth from 60 and 80) crops at
      random in every epoch; here features are computed once, of the middle of the image.
      A level's features are divided by their mean length: its scale is no merit, and the lr then
      means the same for all.
    - Scenes are resized whole, without the usual crop: a shape at the border counts.
    - On GPUs the backbone runs in bfloat16.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import center_crop, normalize, resize

from common import (IMAGENET_MEAN, IMAGENET_STD, InputError, check, gathered, launch,
                    obey_parent, rank, read_image, seed_for, summed, world_size)
from finetune_fasterrcnn import RECIPES, LabelledScenes, read_coco, read_voc
from visualize import LEVELS, PALETTE, backbones, name_weights


def parse_args(argv=None):
    """The papers' settings for the data set by default; without --dataset, small ones."""
    parser = argparse.ArgumentParser(description="Linear classifiers on frozen features.")
    add = parser.add_argument
    add("--weights", nargs="+", default=["none"], metavar="FILE", help="backbones, or none")
    add("--labels", nargs="+", help="their names in the table (default: their folders')")
    add("--arch", nargs="+", help="torchvision's name of a ResNet or Swin Transformer, of each or "
        "of all (default: resnet50; of scenes resnet18)")
    add("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    add("--dataset", choices=["scenes", "voc", "coco", "folder"], default="scenes")
    add("--data", help="folder, for voc, coco and folder")
    add("--train-split", nargs="+", help="default: 2007/trainval, train2017 or train")
    add("--test-split", nargs="+", help="default: 2007/test, val2017 or val")
    add("--image-size", type=int, help="side in pixels (default: 224; of scenes 96)")
    add("--crop", type=float, help="share of the short side in it (default: 0.875; of scenes 1)")
    add("--costs", type=float, nargs="+", default=[10.0 ** k for k in range(-2, 4)], metavar="C",
        help="of the SVMs, to choose from")
    add("--batch-size", type=int, default=256, help="of all processes together")
    add("--lr", type=float, default=30.0, help="of softmax, for each 256 images (MoCo 4.1)")
    add("--epochs", type=int, default=100, help="of softmax (MoCo 4.1)")
    add("--train-scenes", type=int, default=1000, help="number of labelled built-in scenes")
    add("--test-scenes", type=int, default=1000, help="number of built-in scenes to measure on")
    add("--mean", type=float, nargs=3, default=[*IMAGENET_MEAN], metavar="M", help="of red, green "
        "and blue, in 0..1, as in the pre-training (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[*IMAGENET_STD], metavar="S", help="their deviations")
    add("--workers", type=int, default=2, help="loading processes for each process")
    add("--seed", type=int, default=0, help="of random weights, folds and batches")
    add("--out", default="runs/probe", help="folder for probe.json and probe.png")
    dataset = parser.parse_known_args(argv)[0].dataset
    scenes, splits = dataset == "scenes", RECIPES.get(dataset, {})
    parser.set_defaults(arch=["resnet18" if scenes else "resnet50"], crop=1 if scenes else 0.875,
                        image_size=96 if scenes else 224,
                        train_split=splits.get("train_split", ["train"])[:1],
                        test_split=splits.get("test_split", ["val"]))
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------- data, features


class Labelled(Dataset):
    """Item i: the middle of image i (3, size, size) uint8, i, and whether it could be decoded.

    images: paths, or LabelledScenes.  targets: (n, K) in 1 (there), -1 (not there) and 0 (not to
    be judged), or (n,) class numbers.
    """

    def __init__(self, images, targets, classes, args):
        self.images, self.targets, self.classes = images, targets, classes
        self.size, self.crop = args.image_size, args.crop

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        try:
            image = self.images[i]
            image = read_image(image) if isinstance(image, str) else image[0]
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, ...
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), i, False
        image = resize(image, [round(self.size / self.crop)], antialias=True)
        return center_crop(image, [self.size, self.size]), i, True


def data_set(args, part, classes=None):
    """The training or the test images (``part``: train or test) with their targets -> Labelled.

    classes: those of the targets; by default what the split knows.  InputError: it has others.
    """
    split = getattr(args, f"{part}_split")
    if args.dataset == "folder":
        folders = [ImageFolder(Path(args.data, name)) for name in split]
        classes = classes or folders[0].classes
        if any(folder.classes != classes for folder in folders):
            raise InputError(f"other classes in some of {' '.join(split)}, not {' '.join(classes)}")
        paths, targets = zip(*(sample for folder in folders for sample in folder.samples))
        return Labelled(paths, torch.tensor(targets), classes, args)
    if args.dataset == "scenes":
        scenes = LabelledScenes(getattr(args, f"{part}_scenes"), seed=1 + (part == "test"))
        objects = [[(label, False) for label in scenes[i][1]["labels"].tolist()]
                   for i in range(len(scenes))]
        return Labelled(scenes, presence(objects, len(scenes.classes)), scenes.classes, args)
    read = {"voc": read_voc, "coco": read_coco}[args.dataset]
    parts = [read(args.data, name) for name in split]
    classes = classes or [*dict.fromkeys(name for known, _ in parts for name in known)]
    images = [image for _, listed in parts for image in listed]
    try:
        objects = [[(classes.index(name), ignored) for name, _, ignored, _ in image[3]]
                   for image in images]
    except ValueError as error:
        raise InputError(f"unknown class: {error}") from None
    return Labelled([path for path, *_ in images], presence(objects, len(classes)), classes, args)


def presence(objects, number):
    """objects: of each image (class, to be ignored) -> (n, number): 1 where a class is there, 0
    where all its objects are to be ignored, -1 elsewhere."""
    targets = torch.full((len(objects), number), -1.0)
    for row, found in zip(targets, objects):
        for label, ignored in found:
            row[label] = max(row[label].item(), 0.0 if ignored else 1.0)
    return targets


@torch.no_grad()
def extract(stages, data, args, device, what):
    """This process's share of the images -> of each of --levels their mean over positions (n, C),
    float32, and their numbers (n,).  InputError: over 1% cannot be decoded."""
    mine = range(rank(), len(data), world_size())
    loader = DataLoader(data, max(1, args.batch_size // world_size()), sampler=mine,
                        num_workers=args.workers, worker_init_fn=obey_parent,
                        pin_memory=device.type == "cuda")
    means, kept, broken, began, last = [], [], [], time.monotonic(), 0
    for pixels, index, fine in loader:
        x = normalize(pixels.to(device, non_blocking=True).float() / 255, args.mean, args.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = stages(x)
        means.append([found[LEVELS.index(level)].float().mean((2, 3))[fine.to(device)]
                      for level in args.levels])
        kept, broken = kept + index[fine].tolist(), broken + index[~fine].tolist()
        done, seconds = len(kept) + len(broken), time.monotonic() - began
        if rank() == 0 and (seconds - last > 10 or done == len(mine)):
            last = seconds
            print(f"{what}: {done}/{len(mine)} images  {done * world_size() / seconds:.0f} "
                  f"images/s  {(len(mine) - done) * seconds / done / 60:.1f} min left", flush=True)
    broken = sum(gathered(broken), [])
    if broken and rank() == 0:
        print(f"{what}: {len(broken)} images cannot be decoded and are left out, such as "
              f"{data.images[broken[0]]}", flush=True)
    if len(broken) > 0.01 * len(data):
        raise InputError(f"{len(broken)} of {len(data)} images cannot be decoded: over 1%")
    return [torch.cat(level) for level in zip(*means)], torch.tensor(kept)


def whole(x, rows, data, device):
    """Every process's features of extract, in the images' order, and their targets."""
    everyone = gathered(([level.cpu() for level in x], rows))
    rows, order = torch.cat([rows for _, rows in everyone]).sort()
    x = [torch.cat(level)[order].to(device) for level in zip(*(x for x, _ in everyone))]
    return x, data.targets[rows].to(device)


# ------------------------------------------------------------------------------------ classifiers


def svm_objective(w, b, x, y, cost):
    """|w|^2 / 2 + C sum_i max(0, 1 - y_i (w x_i + b))^2 of each class, (K,).

    w (K, D), b (K,), x (n, D), y (n, K) in 1, -1, and 0 for what is left out, cost (K,).
    """
    slack = F.relu(1 - y * (x @ w.T + b)) * (y != 0)  # (n, K)
    return (w ** 2).sum(1) / 2 + cost * (slack ** 2).sum(0)


def fit_svm(x, y, cost, start=None, steps=1500):
    """The minimum of svm_objective by L-BFGS, from ``start`` (w, b) or 0 -> w (K, D), b (K,).

    The bias is not penalised.  In float64, whatever x is.
    """
    mean = x.double().mean(0)
    x, y, cost = x.double() - mean, y.double(), cost.double()  # the bias takes the mean: the same
    w, b = start or (x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1]))
    w, b = (p.detach().clone().requires_grad_() for p in (w, b + w @ mean))
    solver = torch.optim.LBFGS([w, b], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-12,
                               history_size=20, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = (svm_objective(w, b, x, y, cost) / (cost * len(x))).sum()  # all of one scale
        value.backward()
        return value

    solver.step(objective)
    return w.detach(), b.detach() - w.detach() @ mean


def average_precision(scores, y):
    """Area under the precision-recall curve, its precision made to fall with recall, of one class.

    scores (n,); y (n,) in 1, -1, and 0 for what is left out.  nan without a positive.  Of equal
    scores the negatives come first.
    """
    scores, y = np.asarray(scores)[np.asarray(y) != 0], np.asarray(y)[np.asarray(y) != 0]
    right = y[np.lexsort((y, -scores))] > 0  # (n,), best first
    if not right.any():
        return math.nan
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(precision[right].mean())


def svm_scores(train, test, args):
    """Fit, choose costs, fit again: train and test (features, targets) -> AP of each class (K,)."""
    (x, y), (x_test, y_test) = ((F.normalize(x.double(), dim=1), y) for x, y in (train, test))
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(x))).to(x.device)
    held, rest = order[:len(x) // 5], order[len(x) // 5:]
    tried, start = [], None
    for cost in sorted(args.costs):
        start = fit_svm(x[rest], y[rest], torch.full_like(y[0], cost), start)
        scores = (x[held] @ start[0].T + start[1]).cpu()
        tried.append([average_precision(s, t) for s, t in zip(scores.T, y[held].cpu().T)])
    tried = np.array(tried)  # (costs, K)
    usual = np.nan_to_num(tried).mean(1, keepdims=True)  # for a class that the fold does not have
    best = np.where(np.isnan(tried), usual, tried).argmax(0)  # (K,)
    cost = torch.tensor(sorted(args.costs))[best].to(x.device)
    w, b = fit_svm(x, y, cost, start)
    scores = (x_test @ w.T + b).cpu()
    return [average_precision(s, t) for s, t in zip(scores.T, y_test.cpu().T)]


def fit_softmax(train, test, number, args, device):
    """A linear layer on each level, all in one loop -> top-1 and top-5 accuracy of each level.

    train, test: this process's features, (n, C) a level, and class numbers (n,).
    """
    (x, y), (x_test, y_test) = train, test
    totals = summed(torch.tensor([len(y), *(level.norm(dim=1).sum() for level in x)],
                                 device=device))
    x, x_test = ([level / length for level, length in zip(each, totals[1:] / totals[0])]
                 for each in (x, x_test))
    torch.manual_seed(args.seed)
    layers = nn.ModuleList(nn.Linear(level.shape[1], number) for level in x).to(device)
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    ddp = layers if world_size() == 1 else [DistributedDataParallel(layer) for layer in layers]
    base_lr, batch = args.lr * args.batch_size / 256, args.batch_size // world_size()
    optimizer = torch.optim.SGD(layers.parameters(), base_lr, momentum=0.9)
    steps = max(1, int(totals[0]) // args.batch_size)
    for epoch in range(args.epochs):
        generator = np.random.default_rng(seed_for(args.seed, epoch, rank()))
        drop = (epoch >= 0.6 * args.epochs) + (epoch >= 0.8 * args.epochs)
        optimizer.param_groups[0]["lr"] = base_lr * 0.1 ** drop
        order = generator.permutation(len(y))
        for step in range(steps):
            rows = torch.from_numpy(order[np.arange(step * batch, (step + 1) * batch) % len(y)])
            rows = rows.to(device)
            loss = sum(F.cross_entropy(layer(level[rows]), y[rows])
                       for layer, level in zip(ddp, x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank() == 0 and (epoch + 1) % max(1, args.epochs // 10) == 0:
            print(f"softmax: epoch {epoch + 1}/{args.epochs}  loss {loss / len(x):.3f}", flush=True)
    with torch.no_grad():
        right = [(layer(level).topk(min(k, number)).indices == y_test[:, None]).sum()
                 for layer, level in zip(layers, x_test) for k in (1, 5)]
    right = summed(torch.stack([*right, torch.tensor(len(y_test), device=device)]).double())
    return (right[:-1] / right[-1]).view(-1, 2).tolist()


# ---------------------------------------------------------------------------------------- command


def draw(results, levels, metric, path):
    """A picture of results, label -> a value in percent for each level."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=PALETTE)
    for label, values in results.items():
        axes.plot(levels, values, "o-", label=label)
    axes.set(title="linear classifiers on frozen features", xlabel="level", ylabel=f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def run(args, device):
    """Probe each backbone at each level; print the table, write it and its picture into --out."""
    check(args, image_size=(32, math.inf), crop=(0.1, 1), costs=(1e-9, math.inf), lr=(0, math.inf),
          batch_size=(world_size(), math.inf), epochs=(1, math.inf), train_scenes=(10, math.inf),
          test_scenes=(1, math.inf), workers=(0, math.inf), seed=(0, math.inf), mean=(0, 1),
          std=(1e-3, 1))
    if (args.dataset == "scenes") != (args.data is None):
        raise InputError("--data needs --dataset voc, coco or folder, and these need --data")
    name_weights(args)
    train = data_set(args, "train")
    test = data_set(args, "test", train.classes)
    if min(len(train), len(test)) < max(2, world_size()):
        raise InputError(f"{len(train)} and {len(test)} images are too few")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    metric, results, details = "top-1" if args.dataset == "folder" else "mAP", {}, {}
    for label, stages, _ in backbones(args, device):
        features = [extract(stages, data, args, device, f"{label}, {what}")
                    for data, what in ((train, "training"), (test, "test"))]
        if args.dataset == "folder":
            own = [(x, data.targets[rows].to(device))
                   for (x, rows), data in zip(features, (train, test))]
            details[label] = [dict(zip(("top-1", "top-5"), both))
                              for both in fit_softmax(*own, len(train.classes), args, device)]
        else:
            (x, y), (x_test, y_test) = (whole(*part, data, device)
                                        for part, data in zip(features, (train, test)))
            ap = [svm_scores((x[i], y), (x_test[i], y_test), args) for i in range(len(x))]
            details[label] = [dict(mAP=np.nanmean(values), **dict(zip(train.classes, values)))
                              for values in ap]
        results[label] = [100 * values[metric] for values in details[label]]
    if args.dataset == "folder":
        chance = 1 / len(train.classes)
    else:  # of a class: the share of images that have it; one that none has is left out, as in mAP
        shares = (test.targets == 1).sum(0) / (test.targets != 0).sum(0)
        chance = shares[shares > 0].mean().item()
    if rank() == 0:
        width = max(map(len, [*results, "100.00"]))
        print(f"by chance {100 * chance:.2f}")
        print(f"{metric} (%)  " + "  ".join(label.rjust(width) for label in results))
        for i, level in enumerate(args.levels):
            print(level.ljust(len(metric) + 4), *(f"{values[i]:{width}.2f}" for values in
                                                  results.values()), sep="  ")
        content = {label: {level: {k: None if v != v else v for k, v in found.items()}
                           for level, found in zip(args.levels, values)}
                   for label, values in details.items()}  # no NaN in JSON
        Path(args.out, "probe.json").write_text(json.dumps(content, indent=2) + "\n")
        draw(results, args.levels, metric, Path(args.out, "probe.png"))
        print(f"{args.out}/probe.json and probe.png hold it", flush=True)


def main(argv=None):
    """The command."""
    launch(run, parse_args(argv))


if __name__ == "__main__":
    main()
