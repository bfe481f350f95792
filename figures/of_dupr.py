"""DUPR's figures (2103.04814): how the features of a box change as it moves (Fig. 6), and which
places of two views match (Fig. 7)."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torchvision.ops import box_iou, roi_align
from torchvision.transforms.v2.functional import normalize

from common import InputError, box_into_view
from figures.backbones import load_all, squares
from plumbing.drawing import PAGE, image_grid, show
from plumbing.images import augment_colour, two_views
from plumbing.weights import LEVELS


def boxes_of_iou(box, ious, width, height, tries=64):
    """Boxes (n, 4) float64 inside the image, of given IoUs (n,) with ``box`` (4,) (DUPR, Sec.
    4.6.1), x1 y1 x2 y2 in pixels; if all tries overlap it more than asked, the one that does least.
    """
    # Paper silent: from ``box`` straight to a random box of at least 2 pixels a side the IoU falls
    # from 1, and bisection finds where it is as asked
    box, ious, extent = box.double(), ious.double(), torch.tensor([width, height]).double()
    sides = torch.minimum(2 + torch.rand(len(ious), tries, 2).double() * (extent - 2), extent)
    corner = torch.rand(len(ious), tries, 2).double() * (extent - sides)
    ends = torch.cat([corner, corner + sides], dim=2)  # (n, tries, 4)
    overlap = box_iou(ends.flatten(0, 1), box[None]).view(len(ious), tries)
    low_enough = overlap <= ious[:, None]
    chosen = torch.where(low_enough.any(1), low_enough.int().argmax(1), overlap.argmin(1))
    end = ends[torch.arange(len(ious)), chosen]  # (n, 4)
    near, far = torch.zeros_like(ious), torch.ones_like(ious)
    for _ in range(40):
        middle = (near + far) / 2
        above = box_iou(box + middle[:, None] * (end - box), box[None])[:, 0] > ious
        near, far = torch.where(above, middle, near), torch.where(above, far, middle)
    return box + far[:, None] * (end - box)


def counterpart(points, view_q, view_k):
    """Where points (n, 2) of view_q, x y in its pixels, are in view_k: (n, 2), in its pixels."""
    size = view_q.pixels.shape[-1]
    x = size - points[:, :1] if view_q.flipped else points[:, :1]
    low, high = view_q.box.chunk(2)
    source = low + torch.cat([x, points[:, 1:]], dim=1) / size * (high - low)  # (n, 2)
    flipped = torch.tensor([view_k.flipped])
    return box_into_view(source.repeat(1, 2)[None], view_k.box[None], flipped, size)[0, :, :2]


def correspond(q, k, view_q, view_k):
    """Match positions of q with those of k, features (C, h, w) of two views, by cosine (DUPR, Sec.
    4.6.2) -> both, x y in the views' pixels, (h w, 2) each; and, (h w,) each, whether view_k shows
    a position, whether its match is at most one cell off, and the chance of that, 0 if not shown.
    """
    size = view_q.pixels.shape[-1]
    cell = size / torch.tensor([q.shape[2], q.shape[1]])  # x y
    points = (torch.cartesian_prod(*map(torch.arange, q.shape[1:])).flip(1) + 0.5) * cell
    q, k = (F.normalize(x.flatten(1), dim=0) for x in (q, k))  # (C, h w)
    found = (q.T @ k).argmax(1)
    true = counterpart(points, view_q, view_k)
    seen = ((true >= 0) & (true <= size)).all(1)
    # Paper silent: right is a match at most one cell off, across and down
    close = ((points - true[:, None]).abs() <= 1.001 * cell).all(2) & seen[:, None]  # (h w, h w)
    right = close[torch.arange(len(points)), found]
    return points, points[found], seen, right, close.float().mean(1)


def iou_similarity(args, device):
    """How the features of a box change as it moves: DUPR's Eq. (9) against IoU, of 20 boxes around
    each annotated one (Fig. 6); the band is one standard deviation over boxes."""
    from dupr import region_similarity
    (networks, items), ious = load_all(args, device), []
    values = {label: [] for label in args.labels}
    torch.manual_seed(args.seed)
    for image, truth in items:
        if truth is None:
            raise InputError("iou-similarity needs boxes: --dataset voc or coco, or no --data")
        height, width = image.shape[1:]
        extent, x = torch.tensor([width, height] * 2), squares([(image, truth)], args, device)
        levels = [stages(x)[LEVELS.index(args.level)].float() for _, stages, _ in networks]
        for box in truth["boxes"][~truth["ignore"]].double().clamp(min=0).minimum(extent):
            near = boxes_of_iou(box, (torch.arange(20) + torch.rand(20)) / 20, width, height)
            ious.append(box_iou(near, box[None])[:, 0])
            rois = (torch.cat([box[None], near]) * (args.size / extent)).float().to(device)
            for found, level in zip(values.values(), levels):
                # Paper silent: S; 14, as on Res4 in pre-training
                regions = roi_align(level, [rois], 14, level.shape[-1] / args.size, aligned=True)
                found.append(region_similarity(regions[:1], regions[1:]).cpu())  # Eq. (9), (20,)
    if not ious:
        raise InputError("no boxes in these images")
    ious = torch.cat(ious)
    bins = (10 * ious).long().clamp(max=9)
    bins = [bins == b for b in bins.unique()]
    rows = [dict(iou=ious[inside].mean(), boxes=inside.sum()) for inside in bins]
    figure = Figure((0.7 * PAGE, 0.5 * PAGE))
    axes = figure.add_subplot(xlabel="IoU with the annotated box",
                              ylabel=f"cosine similarity of {args.level.capitalize()}")
    for label, found in values.items():
        for row, inside in zip(rows, bins):
            part = torch.cat(found)[inside]
            row.update({f"{label} mean": part.mean(), f"{label} deviation": part.std(correction=0)})
        x, mean, deviation = (np.array([row[name].item() for row in rows])
                              for name in ("iou", f"{label} mean", f"{label} deviation"))
        axes.plot(x, mean, label=label)
        axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.15)
    axes.grid()
    axes.legend(title="mean ± deviation over boxes", loc="lower right", title_fontsize=9)
    return figure, rows


def correspondence(args, device):
    """Match each position of a view with the most similar one of another view (DUPR, Fig. 7)."""
    (networks, items), rows = load_all(args, device), []
    torch.manual_seed(args.seed)
    pairs = [two_views(image, args.size, (0.2, 1.0)) for image, _ in items]
    # Differs: MoCo v2's colours; Sec. 4.6.2 takes MoCo's: jitter always, hue to 0.4, no blur
    pixels = [augment_colour(torch.stack([view.pixels for view in pair]), mean=(0, 0, 0),
                             std=(1, 1, 1)) for pair in pairs]  # 0..1
    shown = min(args.rows, len(pairs))
    # drawn: of each of the first pairs about 40 positions, evenly spaced
    figure, axes = image_grid([0.5] * len(networks), [1] * shown)
    for line, (label, stages, _) in zip(axes, networks):
        counts = torch.zeros(3)
        for i, (pair, x) in enumerate(zip(pairs, pixels)):
            level = stages(normalize(x, args.mean, args.std).to(device))[LEVELS.index(args.level)]
            points, found, seen, right, chance = correspond(*level.float().cpu(), *pair)
            counts += torch.stack([right.sum(), seen.sum(), chance.sum()])
            if i < shown:
                (one, other), gap = x.clamp(0, 1), args.size // 16
                show(line[i], torch.cat([F.pad(one, (0, gap), value=1), other], dim=2),
                     f"{right.sum()} of {seen.sum()} right")
                ends = torch.stack([points, found + torch.tensor([args.size + gap, 0])])
                drawn = seen & (seen.cumsum(0) % math.ceil(max(1, seen.sum() / 40)) == 0)
                for colour, chosen in (("C1", drawn & ~right), ("C0", drawn & right)):
                    line[i].plot(*ends[:, chosen].permute(2, 0, 1).numpy(), ".-", color=colour,
                                 linewidth=1.2, markersize=5, path_effects=[
                                     withStroke(linewidth=2.2, foreground="white")])
        right, seen, chance = counts.tolist()
        line[0].set_ylabel(f"{label}\n{right / max(1, seen):.0%} right", rotation=90, ha="center",
                           va="bottom")
        rows.append(dict(weights=label, pairs=len(pairs), positions=int(seen), right=int(right),
                         share=right / max(1, seen), chance=chance / max(1, seen)))
    figure.suptitle(f"most similar places of {args.level.capitalize()}: blue right (at most one "
                    f"cell off), orange wrong\nleft: of all places of {len(pairs)} pairs; by "
                    f"chance {rows[0]['chance']:.0%}")
    return figure, rows
