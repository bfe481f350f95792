"""Selective Search for Object Recognition (Uijlings et al., IJCV 2013), on Efficient Graph-Based
Image Segmentation (FH; Felzenszwalb and Huttenlocher, IJCV 2004): where the objects may be, found
without labels.

An image is cut into small even regions; the two most similar neighbours are joined, again and
again, until one is left.  The bounding box of every region met on the way is a proposal.  As no
rule of likeness suits all objects, it is done several times, in other colours, by other rules.

Read first: nothing.  soco.py learns from these boxes.

Symbols
    paper      code                 shape
    I          image                (H, W, 3)       uint8
    r_i, r_j   i, others                            numbers of regions
    C_i        colour               (n, 75)         histogram, 25 bins a channel, sum 1
    T_i        texture              (n, 240)        10 bins, 8 directions, 3 channels, sum 1
    size       size                 (n,)            pixels
    BB         box                  (n, 4)          x1 y1 x2 y2, the ends exclusive
    FH: Int    limit                                Int(C) + k / |C|, of each component C

Equations
    (1), (3), (4), (5), (6)   likeness of two regions      similarity
    (2)        histograms of a joined region               join
    Algorithm 1                                            group
    3.2        diversification: colours, rules, k          selective_search
    FH: (4), (5), Algorithm 1                              union, segment

Commands
    python selective_search.py --data DIR --out proposals.npz          all images below a folder
    python selective_search.py --data DIR --out proposals.npz --show 6       and a picture of six
    python selective_search.py --data VOC2007 --recall 40              against a VOC folder's boxes

The file, for np.load: names (n,), paths below the folder; boxes (m, 4) int16, x1 y1 x2 y2 in the
image's own pixels, of which image i has those from offsets[i] to offsets[i + 1]; settings.

Where this differs from the paper, or the paper is silent
    - Two of the paper's strategies: single is HSV with all four terms and k = 100, fast is HSV and
      Lab, with and without colour's term, k = 50 and 100.  Before, a Gaussian of 0.8 pixels; after,
      regions under k pixels are joined to a neighbour.  The colours have 8 bits, PIL's.
    - Directions are signed (a derivative's negative part is that of the opposite one); a bin is a
      tenth of the image's greatest derivative.
    - Large boxes come first, not by rank times a random number; a box is given once.
    - The command shrinks an image to --size pixels and keeps the boxes that SoCo uses; an image
      with a side over 32,767 pixels has none, and one that cannot be decoded neither.
"""
import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageCms
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import resize

from common import ImageFiles, InputError, check, launch, obey_parent

STRATEGIES = {  # colours, terms of the similarity, k
    "single": (["hsv"], ["colour texture size fill"], [100]),
    "fast": (["hsv", "lab"], ["colour texture size fill", "texture size fill"], [50, 100])}


def parse_args(argv=None):
    """What and how to search, and what to do with it."""
    parser = argparse.ArgumentParser(description="Selective search of a folder's images.")
    parser.add_argument("--data", required=True, help="folder of images, any layout")
    parser.add_argument("--out", default="proposals.npz", help="file to write")
    parser.add_argument("--strategy", choices=[*STRATEGIES], default="fast")
    parser.add_argument("--size", type=int, default=224, help="pixels of the long side, at most")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="draw N images' boxes")
    parser.add_argument("--recall", type=int, default=0, metavar="N", help="measure on N images of "
                        "a VOC folder, one process, nothing kept")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------ segmentation


def colour_space(image, name):
    """(H, W, 3) uint8 RGB -> (H, W, 3) float32, 0..255, in "hsv" or "lab"."""
    picture = Image.fromarray(image)
    if name == "hsv":
        return np.asarray(picture.convert("HSV"), np.float32)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = np.asarray(ImageCms.profileToProfile(picture, *profiles, outputMode="LAB"))
    return (lab ^ np.uint8([0, 128, 128])).astype(np.float32)  # a and b are signed there


def smooth(x, sigma):
    """Gaussian of ``sigma`` pixels over (H, W, C), the border repeated."""
    reach = math.ceil(4 * sigma)
    taps = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * sigma**2))
    for _ in "yx":
        padded = np.pad(x, ((reach, reach), (0, 0), (0, 0)), mode="edge")
        x = sum(np.float32(tap) * padded[i:i + len(x)] for i, tap in enumerate(taps / taps.sum()))
        x = x.swapaxes(0, 1)
    return x


def grid_edges(x):
    """The edges of the 8-connected grid over (H, W, C) float32: ends a, b (E,), numbers of pixels,
    and weight (E,), the distance of their values; the smallest first, equal ones as they stand
    here: by direction, then by row and column."""
    height, width, _ = x.shape
    number, ends, weights = np.arange(height * width).reshape(height, width), [], []
    for dy, dx in (0, 1), (1, 0), (1, 1), (1, -1):
        here = np.s_[:height - dy, max(0, -dx):width - max(0, dx)]
        there = np.s_[dy:, max(0, dx):width + min(0, dx)]
        ends.append([number[here].ravel(), number[there].ravel()])
        weights.append(np.linalg.norm(x[here] - x[there], axis=2).ravel())
    (a, b), weight = np.concatenate(ends, axis=1), np.concatenate(weights)
    # the bits of floats >= 0 sort as they do; below them the edge's number, for equal ones
    order = np.sort(weight.view(np.int32).astype(np.int64) << 32 | np.arange(len(a))) & 0xFFFFFFFF
    return a[order], b[order], weight[order]


def union(a, b, weight, size, limit, k, min_size):
    """Take the edges in their order, and join the components at their ends where both have a limit
    (FH (4), (5)) of its weight at least, or where one is under ``min_size``.

    size, limit: (n,), of components 0..n-1.  Returns the new component (n,) of each old one,
    numbered from 0, and the sizes and limits of the new ones.
    """
    parent, size, limit = list(range(len(size))), size.tolist(), limit.tolist()
    for i, j, w in zip(a.tolist(), b.tolist(), weight.tolist()):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        while parent[j] != j:
            parent[j] = j = parent[parent[j]]
        if i != j and (w <= limit[i] and w <= limit[j] or size[i] < min_size or size[j] < min_size):
            parent[j] = i
            size[i] += size[j]
            limit[i] = w + k / size[i]
    root = np.array(parent)
    while (root != root[root]).any():
        root = root[root]
    alive = root == np.arange(len(root))
    return (alive.cumsum() - 1)[root], np.array(size)[alive], np.array(limit)[alive]


def segment(a, b, weight, pixels, k, min_size):
    """FH, Algorithm 1, over sorted edges: the component (pixels,) of each pixel, from 0.

    Nothing more can join once every edge left is heavier than the limit of a component at one of
    its ends; then components under ``min_size`` pixels are joined by their lightest edges.
    """
    label, size, limit = np.arange(pixels), np.ones(pixels, int), np.full(pixels, float(k))
    ends = a, b
    while len(a):  # in parts: between them, what can join nothing any more is sorted out at once
        new, size, limit = union(a[:pixels], b[:pixels], weight[:pixels], size, limit, k, 0)
        label, a, b, weight = new[label], new[a[pixels:]], new[b[pixels:]], weight[pixels:]
        final = limit < weight.min(initial=np.inf)  # heavier edges alone are to come
        left = np.flatnonzero((a != b) & ~final[a] & ~final[b])
        a, b, weight = a[left], b[left], weight[left]
    a, b = label[ends[0]], label[ends[1]]
    left = np.flatnonzero((a != b) & (np.minimum(size[a], size[b]) < min_size))
    none = np.full(len(size), -1.0)  # no weight is under this limit
    return union(a[left], b[left], np.zeros(len(left)), size, none, -1.0, min_size)[0][label]


# ---------------------------------------------------------------------------------------- grouping


class Regions(NamedTuple):
    """What the similarities need of n regions; one that was joined to another keeps its row."""

    colour: np.ndarray  # (n, 75), rows sum to 1
    texture: np.ndarray  # (n, 240), rows sum to 1
    size: np.ndarray  # (n,), pixels
    box: np.ndarray  # (n, 4), x1 y1 x2 y2


def pixel_bins(x):
    """(H, W, 3) in 0..255 -> (H * W, 27): each pixel's bins of the histograms: of its 3 colours
    (0..74), then of the derivatives in 8 directions of each (75..314), by a Gaussian of 1."""
    colour = (x * (25 / 256)).astype(np.int64) + 25 * np.arange(3)
    smoothed = np.pad(smooth(x, 1.0), ((1, 1), (1, 1), (0, 0)), mode="edge")
    dy = smoothed[2:, 1:-1] - smoothed[:-2, 1:-1]
    dx = smoothed[1:-1, 2:] - smoothed[1:-1, :-2]
    slopes = np.stack([dx, (dx + dy) / 2**0.5, dy, (dy - dx) / 2**0.5], axis=2)  # (H, W, 4, 3)
    slopes = np.concatenate([slopes, -slopes], axis=2).reshape(*x.shape[:2], 24).clip(min=0)
    bins = np.minimum(slopes * (10 / max(slopes.max(), 1e-9)), 9).astype(np.int64)
    return np.concatenate([colour, 75 + bins + 10 * np.arange(24)], axis=2).reshape(-1, 27)


def describe(bins, label):
    """Regions of a labelled image (H, W), numbered from 0, with pixel_bins ``bins``."""
    n, size = label.max() + 1, np.bincount(label.ravel())
    counts = np.bincount((label.reshape(-1, 1) * 315 + bins).ravel(), minlength=n * 315)
    share = counts.reshape(n, 315).astype(np.float32) / size[:, None]
    ends = []
    for at, length in zip(np.indices(label.shape)[::-1], label.shape[::-1]):  # x, then y
        met = np.zeros((n, length), bool)
        met[label, at] = True
        ends.append((met.argmax(1), length - met[:, ::-1].argmax(1)))
    return Regions(share[:, :75] / 3, share[:, 75:] / 24, size.astype(np.float32),
                   np.transpose(ends, (2, 1, 0)).reshape(n, 4).astype(np.float32))


def similarity(regions, i, others, area, terms):
    """Eq. (6): how alike region i and each of ``others`` (m,) are -> (m,), a sum of the ``terms``:
    "colour texture size fill" or some of them, each 1 at most.  area: pixels of the image."""
    alike, both = 0, regions.size[i] + regions.size[others]
    if "colour" in terms:
        alike = alike + np.minimum(regions.colour[i], regions.colour[others]).sum(1)  # (1)
    if "texture" in terms:
        alike = alike + np.minimum(regions.texture[i], regions.texture[others]).sum(1)  # (3)
    if "size" in terms:
        alike = alike + (1 - both / area)  # (4)
    if "fill" in terms:
        low = np.minimum(regions.box[i, :2], regions.box[others, :2])
        high = np.maximum(regions.box[i, 2:], regions.box[others, 2:])
        alike = alike + (1 - ((high - low).prod(1) - both) / area)  # (5)
    return alike


def join(regions, i, j):
    """Add region j to region i, in place: Eq. (2) for both histograms, sum of sizes, hull."""
    size = regions.size
    for values in regions.colour, regions.texture:
        values[i] = (size[i] * values[i] + size[j] * values[j]) / (size[i] + size[j])
    size[i] += size[j]
    regions.box[i, :2] = np.minimum(regions.box[i, :2], regions.box[j, :2])
    regions.box[i, 2:] = np.maximum(regions.box[i, 2:], regions.box[j, 2:])


def group(regions, near, area, terms):
    """Algorithm 1: join the two most alike neighbours until one region is left -> the boxes of all
    regions met, (2 n - 1, 4).  near: (n, n) bool, symmetric: which regions touch."""
    regions, near, n = Regions(*(v.copy() for v in regions)), near.copy(), len(near)
    met, alike = [regions.box.copy()], np.full((n, n), -np.inf, np.float32)
    for i in range(n):
        touching = near[i].nonzero()[0]
        alike[i, touching] = similarity(regions, i, touching, area, terms)
    best = alike.max(1)  # of each row, so that a merge looks at few of them
    for _ in range(n - 1):
        i = best.argmax()
        j = alike[i].argmax()
        join(regions, i, j)
        near[i] |= near[j]
        near[i, i] = near[i, j] = False
        near[j] = near[:, j] = False
        alike[j] = alike[:, j] = best[j] = -np.inf
        touching = near[i].nonzero()[0]
        near[touching, i] = True
        alike[i, touching] = alike[touching, i] = similarity(regions, i, touching, area, terms)
        best[i], best[touching] = alike[i].max(), alike[touching].max(1)
        met.append(regions.box[i:i + 1].copy())
    return np.concatenate(met)


def selective_search(image, strategy="fast"):
    """Proposals of an image (H, W, 3) uint8 RGB -> boxes (n, 4) float32, x1 y1 x2 y2 in pixels, the
    ends exclusive; no two alike, the largest first.  strategy: "single" or "fast"."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"want (H, W, 3) uint8, got {image.shape} {image.dtype}")
    (height, width, _), found = image.shape, []
    colours, rules, scales = STRATEGIES[strategy]
    for colour in colours:
        x = colour_space(image, colour)
        bins, edges = pixel_bins(x), grid_edges(smooth(x, 0.8))
        for k in scales:
            label = segment(*edges, height * width, k, min_size=k)
            near = np.zeros((label.max() + 1,) * 2, bool)
            near[label[edges[0]], label[edges[1]]] = True
            near = (near | near.T) & ~np.eye(len(near), dtype=bool)
            regions = describe(bins, label.reshape(height, width))
            found += [group(regions, near, height * width, terms) for terms in rules]
    boxes = np.unique(np.concatenate(found), axis=0)
    return boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")]


def keep_object_like(boxes, width, height):
    """SoCo's filter: the boxes (n, 4) of an image with 1/3 <= w/h <= 3 and 0.3 <= sqrt(w h / (W H))
    <= 0.8, in their order."""
    w, h = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    side = np.sqrt(w * h / (width * height))
    return boxes[(w <= 3 * h) & (h <= 3 * w) & (side >= 0.3) & (side <= 0.8)]



# ----------------------------------------------------------------------------------------- command


def propose(image, strategy, size):
    """The boxes (n, 4) int16 of an image (3, H, W) uint8, in its pixels, that keep_object_like
    keeps, found at ``size`` pixels of its long side at most; none of images beyond int16."""
    (height, width), scale = image.shape[1:], min(1, size / max(image.shape[1:]))
    if max(height, width) > np.iinfo(np.int16).max:
        return np.zeros((0, 4), np.int16)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    small = image if scale == 1 else resize(image, [h, w], antialias=True)
    boxes = selective_search(small.permute(1, 2, 0).contiguous().numpy(), strategy)
    boxes = (boxes * [width / w, height / h, width / w, height / h]).round()
    return keep_object_like(boxes, width, height).astype(np.int16)


class Search(Dataset):
    """Item i: the boxes of image i; none where it cannot be decoded (marked in images.broken)."""

    def __init__(self, images, strategy, size):
        self.images, self.settings = images, (strategy, size)

    def __getitem__(self, i):
        read, image = self.images.numbered(i)
        return propose(image, *self.settings) if read == i else np.zeros((0, 4), np.int16)


def interrupt(number, _frame):
    """Signal handler: leave at once, but through every finally."""
    raise KeyboardInterrupt(number)


def search(images, out, strategy, size, workers, fresh=False):
    """Search all ``images`` into the file ``out`` (see above), or go on where a search of the same
    ended: it is written every minute or so, with ``offsets`` as far as the search has come.

    Raises InputError: ``out`` is of other images or settings, which ``fresh`` starts over.
    """
    names, settings, found = images.names, f"{strategy} {size}", []
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if os.path.exists(out):
        old = read_proposals(out, whole=False)
        if [str(old["settings"]), *old["names"]] == [settings, *names]:
            found = np.split(old["boxes"], old["offsets"][1:])[:-1]
        elif not fresh:
            raise InputError(f"{out} is of other images or settings ({old['settings']}): delete "
                             "it, or give another name")

    def save():
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, names=names, settings=settings, offsets=np.cumsum([0, *map(len, found)]),
                     boxes=np.concatenate([np.zeros((0, 4), np.int16), *found]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{out}.tmp", out)

    first, began, terminal = len(found), time.monotonic(), sys.stdout.isatty()
    said, next_save = began, began + 60
    before = [(n, signal.signal(n, interrupt)) for n in (signal.SIGINT, signal.SIGTERM)]
    loader = DataLoader(Search(images, strategy, size), batch_size=None, num_workers=workers,
                        sampler=range(first, len(names)), collate_fn=np.asarray,
                        worker_init_fn=obey_parent)
    try:
        for boxes in loader if first < len(names) else ():
            found.append(boxes)
            now, done = time.monotonic(), len(found)
            if now - said > (1 if terminal else 20) or done == len(names):
                said, speed = now, (done - first) / (now - began)
                print("\r\033[K" * terminal + f"selective search: {done}/{len(names)} images  "
                      f"{speed:.1f} images/s  {(len(names) - done) / speed / 60:.1f} min left",
                      end="" if terminal and done < len(names) else "\n", flush=True)
            if now > next_save:
                save()
                next_save = time.monotonic() + max(60, 30 * (time.monotonic() - now))
    finally:  # also after a signal
        if len(found) > first:
            save()
        for number, handler in before:
            signal.signal(number, handler)
    broken = int(getattr(images, "broken", torch.zeros(1)).sum())
    print(f"{out}: {len(names)} images, {sum(map(len, found)) / len(names):.1f} boxes each"
          + f"; {broken} cannot be decoded" * (broken > 0), flush=True)


def read_proposals(path, whole=True):
    """What search wrote: a dict of names (n,), settings, offsets, boxes.  InputError: it cannot be
    read, or, if it is to be ``whole``, the search has not come to its end."""
    try:
        with np.load(path) as file:
            read = {key: file[key] for key in ("names", "settings", "offsets", "boxes")}
        at, (number, sides) = read["offsets"], read["boxes"].shape
        if sides != 4 or (np.diff(at, prepend=0, append=number) < 0).any() or at[0] or \
                at[-1] != number or len(at) > len(read["names"]) + 1:
            raise ValueError("names, offsets and boxes do not fit each other")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as error:  # a zip file's, numpy's, KeyError, ...
        raise InputError(f"{path} holds no proposals: {error}") from None
    if whole and len(read["offsets"]) <= len(read["names"]):
        raise InputError(f"{path} holds {len(read['offsets']) - 1} of {len(read['names'])} images: "
                         "run its selective_search.py to the end")
    return read


def recall(images, number, strategy, size):
    """Measure on ``number`` images that have a VOC annotation, one after the other."""
    paths = [Path(path).absolute() for path in images.paths]
    notes = [path.parent.with_name("Annotations") / f"{path.stem}.xml" for path in paths]
    annotated = [i for i, path in enumerate(paths)
                 if path.parent.name == "JPEGImages" and notes[i].exists()]  # no mask of VOC's
    if not annotated:
        raise InputError("no JPEGImages with Annotations beside it")
    best, seconds, boxes = [], [], []
    for i in annotated[::max(1, len(annotated) // number)][:number]:
        image, truths = images[i], []
        for thing in ElementTree.parse(notes[i]).iterfind("object"):
            if thing.findtext("difficult", "0") == "0":
                x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}"))
                                  for side in ("xmin", "ymin", "xmax", "ymax"))
                truths.append([x1 - 1, y1 - 1, x2, y2])
        start = time.process_time()
        found = propose(image, strategy, size)
        seconds.append(time.process_time() - start)
        boxes.append(len(found))
        truths = keep_object_like(np.reshape(truths, (-1, 4)), *image.shape[:0:-1])
        iou = box_iou(torch.from_numpy(truths), torch.from_numpy(found.astype(np.float64)))
        best += [max([0.0, *row]) for row in iou.tolist()]
    print(f"{strategy}: {len(boxes)} images, long side {size} at most, {len(best)} objects that "
          f"pass SoCo's filter: mean best overlap {np.mean(best):.3f}, recall at IoU 0.5 "
          f"{np.mean(np.array(best) >= 0.5):.3f}; {np.mean(boxes):.1f} boxes, "
          f"{np.mean(seconds):.3f} s of a core an image", flush=True)


def draw(images, proposals, number, path):
    """A picture of ``number`` images with up to 30 of their boxes, chosen evenly by size."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    figure = Figure((3.2 * number, 3), layout="constrained")
    shown = np.linspace(0, len(images) - 1, number).astype(int)
    for axes, i in zip(figure.subplots(1, number, squeeze=False)[0], shown):
        boxes = proposals["boxes"][slice(*proposals["offsets"][i:i + 2])].astype(int)
        axes.imshow(images[i].permute(1, 2, 0).numpy())
        for j in np.unique(np.linspace(0, len(boxes) - 1, min(30, len(boxes))).astype(int)):
            x1, y1, x2, y2 = boxes[j]
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=f"C{j % 10}"))
        axes.set(title=f"{len(boxes)} boxes", xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


def run(args, _device=None):
    """Search, measure and draw as ``args`` say."""
    check(args, size=(16, math.inf), workers=(0, math.inf), show=(0, 20), recall=(0, math.inf))
    images = ImageFiles(args.data)
    if args.recall:
        return recall(images, args.recall, args.strategy, args.size)
    search(images, args.out, args.strategy, args.size, args.workers)
    if args.show:
        draw(images, read_proposals(args.out), args.show, f"{args.out}.png")
        print(f"{args.out}.png shows {args.show} of them")


def main(argv=None):
    """The command."""
    launch(run, parse_args(argv))


if __name__ == "__main__":
    main()
