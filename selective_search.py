"""Selective Search for Object Recognition (Uijlings et al., IJCV 2013), on Efficient Graph-Based
Image Segmentation (FH; Felzenszwalb and Huttenlocher, IJCV 2004): where objects may be, found
without labels.

An image is segmented into small, homogeneous regions; the two most similar neighbours are joined,
again and again, until one is left.  The bounding box of every region on the way is a proposal.  All
this is repeated with other colours and measures, as no measure of similarity suits all objects.
Read first: nothing.  soco.py learns from these boxes.

Symbols
    paper      code                 shape
    I          image                (H, W, 3)       uint8
    r_i, r_j   i, others                            numbers of regions
    C_i        colour               (n, 75)         histogram, 25 bins per channel, sum 1
    T_i        texture              (n, 240)        10 bins, 8 directions, 3 channels, sum 1
    size       size                 (n,)            pixels
    BB         box                  (n, 4)          x1 y1 x2 y2, the ends exclusive
    Int + tau  limit                                FH: Int(C) + k / |C|, of each component C

Equations
    (1), (3), (4), (5), (6)   similarity of two regions    similarity
    (2)        histograms of a joined region               join
    Algorithm 1                                            group
    3.2        diversification: colours, measures, k       selective_search
    FH: (4), (5), Algorithm 1                              union, segment

Command
    python selective_search.py --data DIR --out proposals.npz          all images below a folder

The file, for np.load: names (n,), paths below the folder; sizes (n, 2), width and height; boxes
(m, 4) int16, x1 y1 x2 y2 in the image's own pixels, of which image i has those from offsets[i] to
offsets[i + 1]; settings.
"""
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms
from torchvision.transforms.v2.functional import resize

from common import InputError
from plumbing.files import ImageFolder
from plumbing.flags import Parser, whole
from plumbing.images import map_numbers
from plumbing.run import launch

# Differs: two of the paper's strategies
STRATEGIES = {  # colours, terms of the similarity, k
    "single": (["hsv"], ["colour texture size fill"], [100]),
    "fast": (["hsv", "lab"], ["colour texture size fill", "texture size fill"], [50, 100])}


def colour_space(image, name):
    """(H, W, 3) uint8 RGB -> (H, W, 3) float32, 0..255, in "hsv" or "lab"."""
    picture = Image.fromarray(image)
    # Differs: the colours have 8 bits, PIL's
    if name == "hsv":
        return np.asarray(picture.convert("HSV"), np.float32)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = np.asarray(ImageCms.profileToProfile(picture, *profiles, outputMode="LAB"))
    return (lab ^ np.uint8([0, 128, 128])).astype(np.float32)  # a and b are signed there


def smooth(x, sigma):
    """Gaussian of ``sigma`` pixels over (H, W, C), the border repeated."""
    reach = math.ceil(4 * sigma)
    taps = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * sigma**2))
    for _ in range(2):  # rows, then columns
        padded = np.pad(x, ((reach, reach), (0, 0), (0, 0)), mode="edge")
        x = sum(np.float32(tap) * padded[i:i + len(x)] for i, tap in enumerate(taps / taps.sum()))
        x = x.swapaxes(0, 1)
    return x


def grid_edges(x):
    """The edges of the 8-connected grid over (H, W, C) float32: ends a, b (E,), numbers of pixels,
    and weight (E,), the distance of their values; the lightest first, equal ones in the order in
    which they are made here: by direction, then by row and column."""
    height, width, _ = x.shape
    number, ends, weights = np.arange(height * width).reshape(height, width), [], []
    for dy, dx in (0, 1), (1, 0), (1, 1), (1, -1):
        here = np.s_[:height - dy, max(0, -dx):width - max(0, dx)]
        there = np.s_[dy:, max(0, dx):width + min(0, dx)]
        ends.append([number[here].ravel(), number[there].ravel()])
        weights.append(np.linalg.norm(x[here] - x[there], axis=2).ravel())
    (a, b), weight = np.concatenate(ends, axis=1), np.concatenate(weights)
    order = np.argsort(weight, kind="stable")
    return a[order], b[order], weight[order]


def union(a, b, weight, size, limit, k, min_size):
    """Take the edges in their order, and join the components at the ends of an edge if the limits
    (FH (4), (5)) of both are at least its weight, or if one is under ``min_size``.

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
    while len(a):  # in parts: between them, edges that can join nothing any more are dropped
        new, size, limit = union(a[:pixels], b[:pixels], weight[:pixels], size, limit, k, 0)
        label, a, b, weight = new[label], new[a[pixels:]], new[b[pixels:]], weight[pixels:]
        final = limit < weight.min(initial=np.inf)  # only heavier edges are to come
        left = np.flatnonzero((a != b) & ~final[a] & ~final[b])
        a, b, weight = a[left], b[left], weight[left]
    a, b = label[ends[0]], label[ends[1]]
    left = np.flatnonzero((a != b) & (np.minimum(size[a], size[b]) < min_size))
    no_limit = np.full(len(size), -1.0)  # below every weight: nothing joins but by its size
    return union(a[left], b[left], np.zeros(len(left)), size, no_limit, -1.0, min_size)[0][label]


class Regions(NamedTuple):
    """What the similarity needs of n regions; a region that was joined to another keeps its row."""
    colour: np.ndarray  # (n, 75), rows sum to 1
    texture: np.ndarray  # (n, 240), rows sum to 1
    size: np.ndarray  # (n,), pixels
    box: np.ndarray  # (n, 4), x1 y1 x2 y2


def pixel_bins(x):
    """(H, W, 3) in 0..255 -> (H * W, 27): each pixel's bins in the histograms, of its 3 colours
    (0..74), then of the derivatives in 8 directions of each (75..314), after a Gaussian of sigma 1.
    """
    colour = (x * (25 / 256)).astype(np.int64) + 25 * np.arange(3)
    smoothed = np.pad(smooth(x, 1.0), ((1, 1), (1, 1), (0, 0)), mode="edge")
    dy = smoothed[2:, 1:-1] - smoothed[:-2, 1:-1]
    dx = smoothed[1:-1, 2:] - smoothed[1:-1, :-2]
    slopes = np.stack([dx, (dx + dy) / 2**0.5, dy, (dy - dx) / 2**0.5], axis=2)  # (H, W, 4, 3)
    # Paper silent: directions are signed (the opposite of a derivative is its negative part), and a
    # bin is a tenth of the image's greatest derivative
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
        present = np.zeros((n, length), bool)
        present[label, at] = True
        ends.append((present.argmax(1), length - present[:, ::-1].argmax(1)))
    return Regions(share[:, :75] / 3, share[:, 75:] / 24, size.astype(np.float32),
                   np.transpose(ends, (2, 1, 0)).reshape(n, 4).astype(np.float32))


def similarity(regions, i, others, area, terms):
    """Eq. (6): the similarity of region i and each of ``others`` (m,) -> (m,), a sum of ``terms``:
    "colour texture size fill" or some of them, each at most 1.  area: pixels of the image."""
    total, both = 0, regions.size[i] + regions.size[others]
    if "colour" in terms:
        total = total + np.minimum(regions.colour[i], regions.colour[others]).sum(1)  # (1)
    if "texture" in terms:
        total = total + np.minimum(regions.texture[i], regions.texture[others]).sum(1)  # (3)
    if "size" in terms:
        total = total + (1 - both / area)  # (4)
    if "fill" in terms:
        low = np.minimum(regions.box[i, :2], regions.box[others, :2])
        high = np.maximum(regions.box[i, 2:], regions.box[others, 2:])
        total = total + (1 - ((high - low).prod(1) - both) / area)  # (5)
    return total


def join(regions, i, j):
    """Add region j to region i, in place: Eq. (2) for both histograms, sum of sizes, hull."""
    size = regions.size
    for values in regions.colour, regions.texture:
        values[i] = (size[i] * values[i] + size[j] * values[j]) / (size[i] + size[j])
    size[i] += size[j]
    regions.box[i, :2] = np.minimum(regions.box[i, :2], regions.box[j, :2])
    regions.box[i, 2:] = np.maximum(regions.box[i, 2:], regions.box[j, 2:])


def group(regions, near, area, terms):
    """Algorithm 1: join the two most similar neighbours until one region is left -> the boxes of
    all regions on the way, (2 n - 1, 4).  near: (n, n) bool, symmetric: which regions touch."""
    regions, n = Regions(*(v.copy() for v in regions)), len(near)
    met, similar = [regions.box.copy()], np.full((n, n), -np.inf, np.float32)
    for i in range(n):
        touching = near[i].nonzero()[0]
        similar[i, touching] = similarity(regions, i, touching, area, terms)
    best = similar.max(1)  # of each row, so that a merge looks at few of them
    for _ in range(n - 1):
        i = best.argmax()
        j = similar[i].argmax()
        join(regions, i, j)
        similar[i] = np.maximum(similar[i], similar[j])  # finite: touches one of them
        similar[i, [i, j]] = similar[j] = similar[:, j] = best[j] = -np.inf
        touching = np.isfinite(similar[i]).nonzero()[0]
        similar[i, touching] = similar[touching, i] = similarity(regions, i, touching, area, terms)
        best[i], best[touching] = similar[i].max(), similar[touching].max(1)
        met.append(regions.box[i:i + 1].copy())
    return np.concatenate(met)


def selective_search(image, strategy="fast"):
    """Proposals of an image (H, W, 3) uint8 RGB -> boxes (n, 4) float32, x1 y1 x2 y2 in pixels, the
    ends exclusive; each once, the largest first.  strategy: "single" or "fast".  Raises ValueError
    for another shape or type."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"want (H, W, 3) uint8, got {image.shape} {image.dtype}")
    (height, width, _), found = image.shape, []
    colours, rules, scales = STRATEGIES[strategy]
    for colour in colours:
        x = colour_space(image, colour)
        # Paper silent: as in the authors' code, a Gaussian of 0.8 pixels comes first (as in FH),
        # and segments under k pixels then join a neighbour
        bins, edges = pixel_bins(x), grid_edges(smooth(x, 0.8))
        for k in scales:
            label = segment(*edges, height * width, k, min_size=k)
            near = np.zeros((label.max() + 1,) * 2, bool)
            near[label[edges[0]], label[edges[1]]] = True
            near = (near | near.T) & ~np.eye(len(near), dtype=bool)
            regions = describe(bins, label.reshape(height, width))
            found += [group(regions, near, height * width, terms) for terms in rules]
    # Differs: large boxes come first; the paper orders them by rank times a random number
    boxes = np.unique(np.concatenate(found), axis=0)
    return boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")]


def keep_object_like(boxes, width, height):
    """SoCo's filter: the boxes (n, 4) of an image with 1/3 <= w/h <= 3 and 0.3 <= sqrt(w h / (W H))
    <= 0.8, in their order."""
    w, h = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    side = np.sqrt(w * h / (width * height))
    return boxes[(w <= 3 * h) & (h <= 3 * w) & (side >= 0.3) & (side <= 0.8)]


def propose(image, strategy, size):
    """SoCo's proposals of an image (3, H, W) uint8, searched at a long side of at most ``size``
    pixels -> (n, 4) int16, in the image's own pixels.  No box if a side is beyond int16."""
    (height, width), scale = image.shape[1:], min(1, size / max(image.shape[1:]))
    if max(height, width) > np.iinfo(np.int16).max:
        return np.zeros((0, 4), np.int16)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    small = image if scale == 1 else resize(image, [h, w], antialias=True)
    boxes = selective_search(small.permute(1, 2, 0).contiguous().numpy(), strategy)
    boxes = (boxes * [width / w, height / h, width / w, height / h]).round()
    return keep_object_like(boxes, width, height).astype(np.int16)


def _propose_numbered(images, strategy, size, i):
    """(width, height) of image i, (0, 0) if it cannot be decoded, and its proposals."""
    read, image = images.numbered(i)
    if read != i:
        return (0, 0), np.zeros((0, 4), np.int16)
    return image.shape[:0:-1], propose(image, strategy, size)


def search(images, out, strategy, size, workers, fresh=False):
    """Search all ``images`` into the file ``out``, or resume a search of the same images there.
    The file is written every minute or so, and when an exception such as Ctrl-C ends the search.
    size: long side in pixels, at most; workers: processes.
    Raises InputError: ``out`` is of other images or settings, unless ``fresh`` starts over."""
    names, settings, sizes, found = images.names, f"{strategy} {size}", [], []
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if os.path.exists(out):
        old = read_proposals(out, finished=False)
        if [str(old["settings"]), *old["names"]] == [settings, *names]:
            sizes, found = [*old["sizes"]], np.split(old["boxes"], old["offsets"][1:])[:-1]
        elif not fresh:
            raise InputError(f"{out} is of other images or settings ({old['settings']}): delete it")

    def save():
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, names=names, settings=settings, offsets=np.cumsum([0, *map(len, found)]),
                     sizes=np.reshape(sizes, (-1, 2)).astype(np.int32),
                     boxes=np.concatenate([np.zeros((0, 4), np.int16), *found]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{out}.tmp", out)

    first, terminal, began = len(found), sys.stdout.isatty(), time.monotonic()
    said, next_save = began, began + 60
    proposals = map_numbers(partial(_propose_numbered, images, strategy, size),
                            range(first, len(names)), workers)
    try:
        for image_size, boxes in proposals:
            sizes.append(image_size)
            found.append(boxes)
            now, done = time.monotonic(), len(found)
            if now - said > (1 if terminal else 20) or done == len(names):
                said, left = now, (len(names) - done) * (now - began) / (done - first) / 60
                text = f"selective search: {done}/{len(names)} images  {left:.1f} min left"
                print(f"\r\033[K{text}" if terminal else text, flush=True,
                      end="" if terminal and done < len(names) else "\n")
            if now > next_save:
                save()
                next_save = time.monotonic() + max(60, 30 * (time.monotonic() - now))
    finally:
        if len(found) > first:
            save()
    broken = sum(width == 0 for width, _ in sizes)
    print(f"{out}: {len(names)} images, {sum(map(len, found)) / len(names):.1f} boxes each; "
          f"{broken} cannot be decoded", flush=True)


def read_proposals(path, finished=True):
    """What search wrote: a dict of names (n,), settings, offsets, sizes (n, 2), of (width, height),
    and boxes.  Raises InputError if it cannot be read or, where it must be ``finished``, is of a
    search that is not."""
    try:
        with np.load(path) as file:
            read = {key: file[key] for key in ("names", "settings", "offsets", "sizes", "boxes")}
        offsets, number, done = read["offsets"], len(read["names"]), len(read["offsets"]) - 1
        if read["boxes"].shape != (offsets[-1], 4) or offsets[0] != 0 or done > number or \
                (np.diff(offsets) < 0).any() or read["sizes"].shape != (done, 2):
            raise ValueError("names, offsets, sizes and boxes do not fit each other")
        if len({*read["names"].tolist()}) < number:
            raise ValueError("a name occurs twice")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as error:  # a zip file's, numpy's, KeyError, ...
        raise InputError(f"{path} holds no proposals: {error}") from None
    if finished and done < number:
        raise InputError(f"{path} holds {done} of {number} images: run its search to the end")
    return read


def parse_args(argv=None):
    """What to search, and how."""
    parser = Parser(description="Selective search of a folder's images.")
    parser.add_argument("--data", required=True, help="folder of images, any layout")
    parser.add_argument("--out", default="proposals.npz", help="file to write")
    parser.add_argument("--strategy", choices=[*STRATEGIES], default="fast")
    parser.add_argument("--size", type=whole(16), default=224, help="long side in pixels, at most")
    parser.add_argument("--workers", type=whole(0), default=os.cpu_count(), help="processes")
    return parser.parse_args(argv)


def main(argv=None):
    """The command."""
    def work(args, _device):
        images = ImageFolder(args.data)
        search(images, args.out, args.strategy, args.size, args.workers)
        images.report(print, "it has no boxes", tolerated=1, complete=True)

    launch(work, parse_args, argv)


if __name__ == "__main__":
    main()
