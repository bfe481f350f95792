"""Look inside: the papers' figures, of one or more pre-trained backbones side by side.

    attention, retrieval, similarity    DetCo, Fig. 5 to 7 and 9
    iou-similarity, correspondence      DUPR, Fig. 6 and 7
    features, detections                the report, Fig. 2a and 1
    views, curves                       what each method feeds its network; log.csv of several runs

    python visualize.py attention --weights none runs/moco_v2/backbone.pt runs/detco/backbone.pt
    python visualize.py similarity --weights none runs/detco/checkpoint.pt

`none` is a backbone with random weights: what a figure shows of it comes from the architecture
alone.  Batch norm uses its running statistics, with random weights those of up to 32 of the images.
"""
import argparse
import csv
import importlib
import math
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch.utils.data import default_collate
from torchvision.ops import box_iou, roi_align
from torchvision.transforms.v2.functional import normalize, resize
from torchvision.utils import make_grid

from common import InputError, box_into_view
from detection.data import Annotated, LabelledScenes
from detection.formats import TEST_SPLITS
from detection.masks import Unpacked
from detection.models import (Pyramid, detect, detector_from_args, load_fine_tuned, load_part,
                              restore)
from plumbing.figures import (PAGE, PALETTE, draw_curves, draw_detections, image_grid, mark_places,
                              outline, read_log, shared_columns, show)
from plumbing.files import ImageFolder
from plumbing.flags import Parser, add_backbone_arguments, real, whole
from plumbing.images import augment_colour, two_views
from plumbing.run import launch
from plumbing.weights import LEVELS, load_backbones, load_checkpoint, name_weights
from selective_search import propose

METHODS = {  # module: the method's name in its paper, and what its network has to do
    "moco_v2": ("MoCo v2", "1 must match 2 among other images"),
    "detco": ("DetCo", "as MoCo v2 at four stages; nine patches: 3 must match 4 and 2"),
    "dupr": ("DUPR", "as MoCo v2 at four stages; a place (colour) in 1 must match 2's"),
    "soco": ("SoCo", "a box (colour) must have one embedding in all views"),
    "barlow_twins": ("Barlow Twins", "dimensions must agree in 1 and 2, but not with each other"),
    "vicreg": ("VICReg", "1 and 2 must have one embedding, of varied, unrelated dimensions")}
FEWEST_BATCHES = 10  # in a histogram of the figure similarity


def pictures(args, masks=False, keypoints=False):
    """Generate --images of the data set, drawn by --seed: image (3, H, W) uint8, annotations: a
    dict with boxes (n, 4), x1 y1 x2 y2 in pixels, and labels (n,), and masks and keypoints if asked
    for; None for a folder without."""
    if args.data is None:  # scenes that pre-training has not seen
        data = LabelledScenes(max(1000, args.images), seed=2, masks=masks, keypoints=keypoints)
    elif args.dataset is None:
        data = ImageFolder(args.data)
    else:
        splits = args.split or TEST_SPLITS[args.dataset]
        data = Annotated(args.dataset, args.data, splits, args.classes, masks=masks,
                         keypoints=keypoints)
    left = args.images
    for i in np.random.default_rng(args.seed).permutation(len(data)).tolist():
        if args.data is None or args.dataset:
            yield data[i]
        else:
            number, image = data.numbered(i)
            if number != i:
                data.report(print, "left out")
                continue
            yield image, None
        left -= 1
        if not left:
            return


def squares(items, args, device):
    """(image, annotations) each -> (B, 3, size, size) float, normalised, on the device."""
    # Paper silent: resized to squares, not cropped, so that objects at the border count too
    pixels = torch.stack([resize(image, [args.size] * 2, antialias=True) for image, _ in items])
    return normalize(pixels.to(device).float() / 255, args.mean, args.std)


def load_all(args, device):
    """What load_backbones gives, random weights with batch norm's statistics of the first 32
    pictures, and an iterator over the pictures."""
    items = pictures(args)
    first = [*islice(items, 32)]
    return (load_backbones(args, device, lambda: squares(first, args, device)),
            chain(first, items))


def pooled(stages, x):
    """Images (B, 3, H, W), or patches (B, 9, 3, h, w) of each -> the means of the levels over all
    positions and patches, a list of (B, C_i), unit length."""
    means = [level.mean((2, 3)) for level in stages(x.flatten(0, -4))]  # (B, C_i), or (9B, C_i)
    return [F.normalize(m.view(len(x), -1, m.shape[1]).mean(1), dim=1) for m in means]


# -------------------------------------------------------------------------- the papers' quantities


def attention_map(features, size):
    """(B, C, h, w) -> (B, size, size): mean over channels, scaled to 0..1 in each image, bilinear
    (DetCo, Sec. 6.3.1); 0 where it is the same everywhere, as the layer norm of a Swin leaves it.
    """
    mean = features.mean(1, keepdim=True)  # (B, 1, h, w)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    level = features.abs().mean((1, 2, 3), keepdim=True)
    scaled = torch.where(high - low > 1e-5 * level, (mean - low) / (high - low), 0)
    return F.interpolate(scaled, (size, size), mode="bilinear")[:, 0]


def neighbours(features, number=9):
    """features (n, D), unit -> of each row the rows most like it, itself left out: their indices
    (n, number), best first, and cosines (DetCo, Sec. 6.3.2)."""
    best = (features @ features.T).fill_diagonal_(-np.inf).topk(min(number, len(features) - 1))
    return best.indices, best.values


def pair_similarity(q, k):
    """q, k (B, D), unit: row i of q and of k are a positive pair, any two others a negative one.
    Returns exp(cosine), its mean over positive and over negative pairs (DetCo, Sec. 6.4)."""
    # Differs: the paper names exp(q k / tau), but its values lie in 1..e: tau is 1 here
    pairs = (q @ k.T).exp()  # (B, B)
    positive = pairs.diagonal()
    return positive.mean(), (pairs.sum() - positive.sum()) / (len(q) * (len(q) - 1))


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


# -------------------------------------------------------- the figures: args, device -> figure, rows


def attention(args, device):
    """Where the level is active, over the image (DetCo, Fig. 5 and 6)."""
    networks, items = load_all(args, device)
    items, rows = [*islice(items, args.rows)], []
    pixels = squares(items, args, device)
    figure, axes = image_grid([image.shape[1] / image.shape[2] for image, _ in items],
                              [1] * (1 + len(networks)),
                              f"mean of {args.level.capitalize()} over channels, "
                              "from the least (dark) to the most (light) of an image")
    for column, (label, stages, _) in enumerate(networks, 1):
        level = stages(pixels)[LEVELS.index(args.level)].float().cpu()
        for i, (mapped, (image, truth)) in enumerate(zip(attention_map(level, args.size), items)):
            show(axes[i, 0], image)
            show(axes[i, column], image)
            show(axes[i, column], image, "" if i else label, mapped, cmap="inferno", alpha=0.65)
            row = dict(weights=label, image=i, share_above_half=(mapped > 0.5).float().mean())
            if truth is not None:
                inside = torch.zeros(args.size, args.size, dtype=torch.bool)
                scale = torch.tensor([image.shape[2], image.shape[1]] * 2) / args.size
                for x1, y1, x2, y2 in (truth["boxes"] / scale).round().int().clamp(min=0).tolist():
                    inside[y1:y2, x1:x2] = True
                row.update(mean_in_boxes=mapped[inside].mean(), elsewhere=mapped[~inside].mean())
            rows.append(row)
    return figure, rows


def retrieval(args, device):
    """The nearest neighbours of the first images (DetCo, Fig. 7), and how many of all images' share
    a class."""
    (networks, items), small, classes, rows = load_all(args, device), [], [], []
    found = {label: [] for label in args.labels}
    for image, truth in items:
        x = squares([(image, truth)], args, device)
        for label, stages, _ in networks:
            found[label].append(pooled(stages, x)[LEVELS.index(args.level)].float().cpu())
        shape = [max(1, round(96 * side / max(image.shape[1:]))) for side in image.shape[1:]]
        small.append(resize(image, shape, antialias=True))
        classes.append({*truth["labels"].tolist()} if truth else set())
    if len(small) < 2:
        raise InputError("retrieval needs two images or more")
    share = torch.tensor([[not own.isdisjoint(other) for other in classes] for own in classes])
    share.fill_diagonal_(False)  # (n, n): a class in common
    annotated = truth is not None
    title = f"images most like the first, by the mean of {args.level.capitalize()}: cosine" + (
        "; framed: a class in common" if annotated else "")
    figure, axes = image_grid([1] * (min(args.rows, len(small)) * len(networks)), [1] * 10, title)
    for n, (label, parts) in enumerate(found.items()):
        nearest, cosine = neighbours(torch.cat(parts))  # (n, 9) each
        for i, line in enumerate(axes[n::len(networks)]):
            show(line[0], small[i], left=label)
            for ax, j, value in zip(line[1:], nearest[i].tolist(), cosine[i]):
                show(ax, small[j], below=f"{value:.3f}")
                if share[i, j]:
                    ax.spines[:].set(color="C5", linewidth=2.5)
        row = dict(weights=label, images=len(small), first_cosine=cosine[:, 0].mean(),
                   last_cosine=cosine[:, -1].mean())
        if annotated:
            row.update(share_a_class=share.gather(1, nearest).float().mean(),
                       of_any_pair=share.sum() / (len(small) * (len(small) - 1)))
        rows.append(row)
    return figure, rows


def load_encoders(path, stages, args, device):
    """The encoders of queries and of keys, each x -> a list of (B, D) of unit length; the index of
    --level in that list; and the recipe.  Of a checkpoint of DetCo they have its heads; otherwise
    both are ``pooled``, and the recipe is None.  Raises InputError: no local head at the level."""
    import detco
    saved, level = load_checkpoint(path) if path != "none" else {}, LEVELS.index(args.level)
    if saved.get("method") != "detco":
        return partial(pooled, stages), partial(pooled, stages), level, None
    own = argparse.Namespace(**saved["args"])
    if own.no_local or not own.weights[level]:
        raise InputError(f"{path} has no local head at {args.level} (--no-local, --weights)")
    model = detco.DetCo(own.arch, own.dim, own.queue_size, weights=own.weights, bn_groups=1,
                        share_queue=own.share_queue).eval().to(device)
    model.load_state_dict(saved["model"])
    return model.encoder_q, model.encoder_k, model.levels.index(level), own


def similarity(args, device):
    """exp(cosine) of two global views, and of a local and a global one: the means of batches of 32
    images (DetCo, Fig. 9).  The first checkpoint of DetCo gives the recipe of the views."""
    import detco
    rows, encoders = [], [load_encoders(path, stages, args, device) for path, (_, stages, _)
                          in zip(args.weights, load_all(args, device)[0])]
    recipes = [own for *_, own in encoders if own]
    recipe = recipes[0] if recipes else detco.parse_args(["--data", args.data] if args.data else [])
    measured = {}
    for label, (encode_q, encode_k, i, _) in zip(args.labels, encoders):
        torch.manual_seed(args.seed)
        images, means = pictures(args), []
        for _ in range(args.images // 32):
            batch = [detco.cut_views(image, recipe) for image, _ in islice(images, 32)]
            if len(batch) < 32:
                break
            view_q, view_k, (local, corners), _ = default_collate(batch)
            q, k, patches = (augment_colour(view.pixels.to(device), p_blur=recipe.p_blur,
                                            mean=args.mean, std=args.std)
                             for view in (view_q, view_k, local))
            patches = detco.cut_patches(patches, corners.to(device), recipe.patch_size)
            k = encode_k(k)[i]
            means.append([pair_similarity(encode_q(x)[i], k) for x in (q, patches)])
        if len(means) < FEWEST_BATCHES:
            raise InputError("similarity is a histogram of means over 32 images each, and needs "
                             f"{32 * FEWEST_BATCHES} images or more")
        measured[label] = torch.tensor(means)  # (batches, global and local, positive and negative)
    figure = Figure((PAGE, 1.3 * len(measured) + 0.6))
    axes = figure.subplots(len(measured), 2, squeeze=False, sharex=True)
    everything = torch.stack([*measured.values()])
    bins = np.linspace(everything.min().item(), everything.max().item(), 41)
    for line, (label, values) in zip(axes, measured.items()):
        row = dict(weights=label, batches=len(values))
        line[0].set_ylabel(f"{label}\nbatches")
        for ax, kind, part in zip(line, ("positive", "negative"), values.unbind(2)):
            for query, means in zip(("global", "local"), part.unbind(1)):  # (batches,) each
                row[f"{kind}_{query}"] = mean = means.mean()
                ax.hist(means.numpy(), bins, label=f"{query}-global {mean:.3f}")
            row[f"{kind}_difference"] = (part[:, 0] - part[:, 1]).mean()
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2, frameon=False,
                      handlelength=0.8, columnspacing=1)
            ax.yaxis.get_major_locator().set_params(integer=True)
        rows.append(row)
    for ax, kind in zip(axes[0], ("positive", "negative")):
        ax.set_title(f"{kind} pairs", pad=22)
    figure.supxlabel("exp(cosine), mean over 32 images", fontsize=10)
    return figure, rows


def iou_similarity(args, device):
    """How the features of a box change as it moves: DUPR's Eq. (9) against IoU, of 20 boxes around
    each annotated one (Fig. 6); the band is one standard deviation over boxes."""
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
                regions = roi_align(level, [rois], 14, level.shape[-1] / args.size, aligned=True)
                same = F.cosine_similarity(regions[:1], regions[1:], dim=1)  # (20, 14, 14)
                found.append(same.mean((1, 2)).cpu())  # Eq. (9)
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
    """Where each position of a view finds its like in another of the image (DUPR, Fig. 7)."""
    (networks, items), rows = load_all(args, device), []
    torch.manual_seed(args.seed)
    pairs = [two_views(image, args.size, (0.2, 1.0)) for image, _ in items]
    # Differs: MoCo v2's colours; Sec. 4.6.2 takes MoCo's, without blur
    pixels = [augment_colour(torch.stack([view.pixels for view in pair]), mean=(0, 0, 0),
                             std=(1, 1, 1)) for pair in pairs]  # 0..1
    shown = min(args.rows, len(pairs))
    # the first pairs, and of the positions of each about 40, evenly
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


def features(args, device):
    """The mean over channels of each level (the report, Fig. 2a): Res2..Res5, or P2..P5 where the
    file has an FPN of four levels (RetinaNet's has three)."""
    networks, items = load_all(args, device)
    items, rows = [*islice(items, args.rows)], []
    x = squares(items, args, device)
    heights = [image.shape[1] / image.shape[2] for image, _ in items for _ in networks]
    figure, axes = image_grid(heights, [1] * 5, "mean of each level over channels: from the least "
                              "(dark) to the most (light)")
    for n, (label, network, rest) in enumerate(networks):
        lateral = [v for k, v in rest.items() if k.endswith("fpn.inner_blocks.3.0.weight")]
        if lateral:
            network = Pyramid(network, len(lateral[0])).eval().to(device)
            load_part(network.fpn, "backbone.fpn.", rest, args.weights[n])
        levels = [*network(x).values()][:4] if lateral else network(x)
        for i, (image, _) in enumerate(items):
            line = axes[i * len(networks) + n]
            show(line[0], image, left=label)
            for number, ax, level in zip(range(2, 6), line[1:], levels):
                name, mean = f"{'P' if lateral else 'Res'}{number}", level[i].float().mean(0).cpu()
                show(ax, image, name, mean, f"{mean.min():.2g} to {mean.max():.2g}")
                rows.append(dict(weights=label, image=i, level=name, least=mean.min(),
                                 mean=mean.mean(), most=mean.max()))
    return figure, rows


def detections(args, device):
    """Annotations above what fine-tuned detectors find (the report, Fig. 1); ``none`` is the first
    of these detectors before training."""
    name_weights(args)
    tuned = {path: load_fine_tuned(path) for path in args.weights if path != "none"}
    if not tuned:
        raise InputError("detections needs --weights with a checkpoint of finetune_fasterrcnn")
    first = [*tuned.values()][0]["args"]
    args.classes = first["classes"]
    if args.dataset is None:
        args.dataset, args.split = first["dataset"], args.split or first["test_split"]
        args.data = args.data or first["data"]
    if args.data and args.dataset == "scenes":
        raise InputError("detections of --data need --dataset voc or coco")
    more = [first[name] and args.dataset != "voc" for name in ("masks", "keypoints")]
    items, found, rows = [*islice(pictures(args, *more), args.rows)], {}, []
    for label, path in zip(args.labels, args.weights):
        own = dict(tuned[path]["args"] if path in tuned else first, weights="none", seed=args.seed)
        if own["classes"] != args.classes:
            raise InputError(f"{path} knows other classes: {' '.join(own['classes'])}")
        model = detector_from_args(argparse.Namespace(**own))
        if path in tuned:
            restore(model, tuned[path], path)
        found[label] = Unpacked(detect(model.eval().to(device), [image for image, _ in items],
                                       device))
        for i, (seen, (_, truth)) in enumerate(zip(found[label], items)):
            drawn = seen["scores"] >= args.score
            hit = box_iou(truth["boxes"].float(), seen["boxes"][drawn]) >= 0.5
            hit &= truth["labels"][:, None] == seen["labels"][drawn]
            rows.append(dict(weights=label, image=i, annotated=len(truth["boxes"]),
                             found=hit.any(1).sum(), detections=len(seen["boxes"]),
                             drawn=drawn.sum(), best_score=max([0.0, *seen["scores"].tolist()])))
    return draw_detections(items, found, args.classes, args.score), rows


def views_of(method, image, args):
    """The views that a method (its module) cuts of an image (3, H, W) uint8: a list of (View, its
    pixels (3, h, w) float 0..1 as the network gets them, what all views share, in these pixels:
    SoCo's boxes, [(level of the pyramid, (4,)), ...], DUPR's a rectangle (4,) and its flip)."""
    name, shared = method.__name__, [()] * 4
    if name == "soco":
        args.view4 = args.view4 or args.image_size * 6 // 7  # 192 beside 224
        proposals = torch.from_numpy(propose(image, "single", 224)).float()
        cut, places, _ = method.make_views((image, proposals), args)
        levels = method.Network("resnet18", 8, 8, 8).pool.map_levels
        for i, view in enumerate(default_collate([cut])):  # batches of one
            size = view.pixels.shape[-1]
            boxes = box_into_view(places[None], view.box, view.flipped, size)[0]  # (P, 4)
            boxes = boxes if i else method.jitter_boxes(boxes, size, args.jitter)
            shared[i] = [(f"P{n + 2}", box) for n, box in zip(levels(boxes), boxes.tolist())]
    elif name in ("detco", "dupr"):
        cut = method.cut_views(image, args)
    else:
        interpolation = "bilinear" if name == "moco_v2" else "bicubic"
        cut = two_views(image, args.image_size, (args.crop_scale, 1.0), interpolation)
    if name == "dupr":
        *places, valid = method.overlap(*default_collate([cut]))
        shared = [(roi[0].tolist(), bool(flipped)) if valid else () for roi, flipped in places]
    seen = []
    for i, view in enumerate(cut):
        view, *corners = view if len(view) == 2 else [view]  # detco.LocalView
        colours = dict(p_blur=args.p_blur)
        if name in ("soco", "barlow_twins", "vicreg"):
            colours = dict(jitter=(0.4, 0.4, 0.2, 0.1), p_blur=args.p_blur[min(i, 1)],
                           p_solarize=0.2 if i else 0.0)
        pixels = augment_colour(view.pixels[None], mean=(0, 0, 0), std=(1, 1, 1), **colours)
        if corners:
            patches = method.cut_patches(pixels, corners[0][None], args.patch_size)
            pixels = make_grid(patches[0], 3, padding=2, pad_value=1)[None]
        seen.append((view, pixels[0].clamp(0, 1), shared[i]))
    return seen


def views(args, _device):
    """An image, and what each method's network gets of it (SoCo's fourth view: SoCo* only)."""
    (image, _), rows = next(pictures(args)), []
    widths = [image.shape[2] / image.shape[1], 1, 1, 1, 1]
    figure, axes = image_grid([1] * len(args.methods), widths)
    for name, line in zip(args.methods, axes):
        torch.manual_seed(args.seed)
        method, (title, text) = importlib.import_module(name), METHODS[name]
        recipe = method.parse_args(["--data", args.data] if args.data else [])
        show(line[0], image)
        name_drawn = line[0].set_title(title, loc="left", weight="bold")
        line[0].annotate(text, (1, 0), (10, 0), xycoords=name_drawn, fontsize=9, in_layout=False,
                         textcoords="offset points", annotation_clip=False)
        seen, side = views_of(method, image, recipe), 7 if args.data else 4  # of DUPR's places
        for i, (view, pixels, shared) in enumerate(seen, 1):
            size, flipped = view.pixels.shape[-1], ", flipped" if view.flipped else ""
            show(line[i], pixels, below=f"{i}: {size} px{flipped}")
            rows.append(dict(method=name, view=i, pixels=size, flipped=int(view.flipped),
                             **dict(zip(("x1", "y1", "x2", "y2"), view.box.tolist()))))
            if name == "dupr" and shared:
                mark_places(line[i], *shared, side)
            elif name == "soco":
                levels, boxes = zip(*shared)
                outline(line[i], boxes, PALETTE, levels)
                rows[-1]["levels"] = " ".join(levels)
        outline(line[0], [view.box.tolist() for view, *_ in seen], ["black"] * 4, "1234")
        if name == "dupr" and shared:
            (box,), _ = method.intersect(*(view.box[None] for view, *_ in seen))
            mark_places(line[0], box.tolist(), False, side)
    return figure, rows


def curves(args, _device):
    """What the runs of --weights have logged, in the columns that draw_curves draws into --out ->
    None, rows of numbers."""
    name_weights(args)
    logs, rows = {}, []
    for label, path in zip(args.labels, args.weights):
        try:
            logs[label] = log = read_log(Path(path, "log.csv") if Path(path).is_dir() else path)
        except (OSError, TypeError, ValueError, csv.Error):
            log = []
        if not log or "epoch" not in log[0]:
            raise InputError(f"{path} is no log of a run: curves takes folders of runs")
    for column in shared_columns(logs):
        for label, log in logs.items():
            if column in log[0] and any(math.isfinite(row[column]) for row in log):
                values = [row[column] for row in log if math.isfinite(row[column])]
                rows.append(dict(run=label, column=column, first=values[0], last=values[-1],
                                 least=min(values), most=max(values)))
    if not rows:
        raise InputError(f"no column is in two of the logs: {' '.join(args.weights)}")
    draw_curves(logs, args.out)
    return None, rows


# ----------------------------------------------------------------------------------------- command

FIGURES = {  # name: function; level, images measured, drawn
    "attention": (attention, "res5", 1000, 4), "retrieval": (retrieval, "res5", 1000, 3),
    "similarity": (similarity, "res5", 3200, 1), "features": (features, "res5", 1000, 1),
    "iou-similarity": (iou_similarity, "res4", 200, 1), "views": (views, "res5", 1000, 1),
    "correspondence": (correspondence, "res4", 50, 2), "curves": (curves, "res5", 1000, 1),
    "detections": (detections, "res5", 1000, 4)}


def print_table(rows, path=None):
    """Print dicts as aligned columns, numbers with four digits; all digits go to a CSV file."""
    rows = [{k: v.item() if torch.is_tensor(v) else v for k, v in row.items()} for row in rows]
    names = [*dict.fromkeys(name for row in rows for name in row)]
    values = [[row.get(name, "") for name in names] for row in rows]
    table = [names] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in line]
                       for line in values]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    if path:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, *values])


@torch.no_grad()
def visualize(args, device):
    """Draw the figure, print the numbers behind it."""
    for path in filter(None, (args.out, args.csv)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure, rows = FIGURES[args.figure][0](args, device)
    if figure:
        figure.savefig(args.out)
    print_table(rows, args.csv)
    print(f"{args.out} is the figure")


def parse_args(argv=None):
    """The papers' sizes and levels by default, but fewer images; smaller ones without --data."""
    parser = Parser(description="Draw what pre-trained backbones have learnt; with the figure "
                    "detections --weights are fine-tuned checkpoints, with curves folders of runs.")
    parser.add_argument("figure", choices=[*FIGURES])
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--dataset", choices=["voc", "coco"], help="layout of a --data that has annotations")
    add("--split", nargs="+", help="of --dataset, as finetune_fasterrcnn.py names them")
    add("--images", type=whole(1), help="how many are measured, drawn by --seed (default: by "
        "figure)")
    add("--rows", type=whole(1), help="how many of them are drawn (default: by figure)")
    add("--size", type=whole(32), help="side of an image in pixels; not in the figures similarity, "
        "views, detections and curves")
    add("--score", type=real(0, 1), default=0.3, help="least score of a detection that is drawn")
    add("--level", choices=LEVELS, help="of the backbone, in DetCo's and DUPR's figures "
        "(default: the paper's)")
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="of the figure views")
    add("--out", help="picture to write, .png, .jpg, .pdf or .svg (default: runs/FIGURE.png)")
    add("--csv", metavar="FILE", help="keep the numbers too")
    known = parser.parse_known_args(argv)[0]
    _, level, images, rows = FIGURES[known.figure]
    side, scene_side = (224, 96) if known.figure == "retrieval" else (448, 192)
    parser.set_defaults(level=level, images=images, rows=rows, out=f"runs/{known.figure}.png",
                        size=side if known.data else scene_side, classes=None)
    args = parser.parse_args(argv)
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        parser.error(f"--out {args.out}: no .png, .jpg, .pdf or .svg")
    no_dataset = args.split and not args.dataset and args.figure != "detections"  # has its own
    if no_dataset or (args.dataset and not args.data):
        parser.error("--split needs --dataset, and --dataset needs --data, a folder")
    return args


def main(argv=None):
    """The command."""
    launch(visualize, parse_args, argv)


if __name__ == "__main__":
    main()
