"""Look inside: the papers' figures, of one or more pre-trained backbones side by side.

Read first: the method whose figure it is.

Figures
    attention       DetCo Fig. 5, 6    where Res5 is active                        attention_map
    retrieval       DetCo Fig. 7       nearest neighbours by pooled Res5           neighbours
    similarity      DetCo Fig. 9       exp(cosine) of positive and negative pairs  pair_similarity
    iou-similarity  DUPR Fig. 6        does a box look different as it moves?      boxes_of_iou
    correspondence  DUPR Fig. 7        where is this place in the other view?      correspond
    features        the report's 2a    mean activation of each level
    detections      the report's 1     annotations beside detections
    views                              what each method feeds its network
    curves                             log.csv of several runs

Commands
    python visualize.py attention --weights none runs/moco_v2/backbone.pt runs/detco/backbone.pt
    python visualize.py similarity --weights none runs/detco/checkpoint.pt
    python visualize.py features --weights runs/moco_v2/backbone.pt runs/soco/detector.pt
    python visualize.py detections --weights none runs/finetune/checkpoint.pt
    python visualize.py curves --weights runs/moco_v2 runs/detco
    python visualize.py views
    python visualize.py retrieval --data DIR --weights runs/detco/backbone.pt --images 5000
    python visualize.py iou-similarity --dataset voc --data DIR --weights FILE --csv iou.csv

Without --data it draws built-in scenes, others than pre-training sees.  `none` among the weights is
a backbone as it is initialised; what each figure shows of it is what the architecture alone does.

Where this differs from the papers, or they are silent
    - Images are resized to squares, not cropped: an object at the border counts too.  Of a Swin
      Transformer, whose Res5 ends in a layer norm, its channels' mean shows that norm's weights.
    - Batch norm uses its running statistics; those of random weights are 0 and 1.
    - Fig. 9 names exp(q k / tau), but its values lie in 1..e: tau is 1 here.  Of DetCo's
      checkpoint.pt the embeddings of its heads at Res5 are compared, of any other file the pooled
      features, a local view's being the mean of its nine patches'.  All see views of one recipe,
      that of the first DetCo checkpoint.
    - Fig. 6: a box's path from the annotated one to a random one leads to each IoU; positions 14 x
      14, as in pre-training.  A band is one standard deviation over boxes.
    - Fig. 7 counts here: of the positions that the other view shows, the share whose best match is
      at most one cell off, across and down.
"""
import argparse
import csv
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch.utils.data import default_collate
from torchvision.ops import box_iou, roi_align
from torchvision.transforms.v2.functional import normalize, resize
from torchvision.utils import make_grid

import barlow_twins
import detco
import dupr
import moco_v2
import selective_search
import soco
import vicreg
from common import (IMAGENET_MEAN, IMAGENET_STD, ImageFiles, InputError, backbone_stages, check,
                    launch, load_backbone, load_checkpoint, photometric, random_resized_crop)
from finetune_fasterrcnn import (RECIPES, Annotated, LabelledScenes, Pyramid, detect, detector,
                                 draw_detections, fine_tuned, load_part, restore)
from finetune_fasterrcnn import parse_args as parse_fine_tune

METHODS = dict(moco_v2=moco_v2, detco=detco, dupr=dupr, soco=soco, barlow_twins=barlow_twins,
               vicreg=vicreg)
PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"]
LEVELS = ["res2", "res3", "res4", "res5"]
DEFAULTS = {  # level, size in pixels, of scenes, images that are measured, how many are drawn
    "attention": ("res5", 448, 192, 1000, 4), "retrieval": ("res5", 224, 96, 1000, 3),
    "similarity": ("res5", 224, 96, 3200, 1), "iou-similarity": ("res4", 448, 192, 200, 1),
    "correspondence": ("res4", 448, 192, 50, 2), "features": ("res5", 448, 192, 1000, 1),
    "detections": ("res5", 448, 192, 1000, 6), "views": ("res5", 224, 96, 1000, 1),
    "curves": ("res5", 224, 96, 1, 1)}


def parse_args(argv=None):
    """The paper's settings of the figure by default; smaller images without --data."""
    parser = argparse.ArgumentParser(description="Draw what pre-trained backbones have learnt.")
    add = parser.add_argument
    add("figure", choices=[*DEFAULTS], help="which one")
    add("--weights", nargs="+", default=["none"], metavar="FILE", help="backbones, or none; for "
        "detections fine-tuned checkpoints, for curves folders of runs")
    add("--labels", nargs="+", help="their names in the figure (default: their folders')")
    add("--arch", nargs="+", help="torchvision's name of a ResNet or Swin Transformer, of each or "
        "of all (default: resnet50; without --data resnet18)")
    add("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--dataset", choices=["voc", "coco"], help="layout of a --data that has annotations")
    add("--split", nargs="+", help="of it, as finetune_fasterrcnn.py names them (default: its "
        "test split)")
    add("--images", type=int, help="how many are measured, drawn by --seed")
    add("--rows", type=int, help="how many of them are drawn")
    add("--size", type=int, help="side in pixels that images are resized to (similarity and "
        "views: the methods' own)")
    add("--level", choices=LEVELS, help="of the backbone (default: the paper's)")
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="of the figure views")
    add("--mean", type=float, nargs=3, default=[*IMAGENET_MEAN], metavar="M", help="of red, green "
        "and blue, in 0..1, as in the pre-training (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[*IMAGENET_STD], metavar="S", help="their deviations")
    add("--seed", type=int, default=0, help="of random weights, images and views")
    add("--out", help="picture to write (default: runs/FIGURE.png)")
    add("--csv", metavar="FILE", help="keep the numbers too")
    known = parser.parse_known_args(argv)[0]
    level, size, scene_size, images, rows = DEFAULTS[known.figure]
    parser.set_defaults(level=level, images=images, rows=rows, out=f"runs/{known.figure}.png",
                        size=size if known.data else scene_size,
                        arch=["resnet50" if known.data else "resnet18"])
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------- images, backbones


def pictures(args):
    """Generate --images of the data set, drawn by --seed: (image (3, H, W) uint8, annotations), a
    dict with boxes (n, 4), x1 y1 x2 y2 in pixels, and labels (n,); None for a folder without."""
    if args.split and not args.dataset:
        raise InputError("--split needs --dataset voc or coco")
    if args.data is None and args.dataset:
        raise InputError(f"--dataset {args.dataset} needs --data, a folder")
    if args.data is None:
        data = LabelledScenes(max(1000, args.images), seed=2)
    elif args.dataset:
        split = args.split or RECIPES[args.dataset]["test_split"]
        data = Annotated(args.dataset, args.data, split)
    else:
        data = ImageFiles(args.data)
    for i in np.random.default_rng(args.seed).permutation(len(data))[:args.images].tolist():
        if not isinstance(data, ImageFiles):
            yield data[i]
            continue
        found, image = data.numbered(i)
        if found == i:  # else another image would stand in for it, and be there twice
            yield image, None
        elif data.broken.sum() > 0.01 * len(data):
            raise InputError(f"over 1% of {len(data)} images cannot be decoded ({data.paths[i]})")
        else:
            print(f"cannot decode {data.paths[i]}: left out", flush=True)


def squares(items, args, device):
    """(image, annotations) each -> (B, 3, size, size) float, normalised, on the device."""
    pixels = torch.stack([resize(image, [args.size] * 2, antialias=True) for image, _ in items])
    return normalize(pixels.to(device).float() / 255, args.mean, args.std)


def name_weights(args):
    """Fill in --labels: the folder of each of --weights."""
    if args.labels and len(args.labels) != len(args.weights):
        raise InputError(f"{len(args.labels)} --labels for {len(args.weights)} --weights")
    folders = (Path(path) if Path(path).is_dir() else Path(path).parent for path in args.weights)
    args.labels = args.labels or ["random" if path == "none" else folder.absolute().name
                                  for path, folder in zip(args.weights, folders)]
    if len({*args.labels}) < len(args.labels):
        raise InputError(f"two of the names are alike, use --labels: {' '.join(args.labels)}")


def backbones(args, device):
    """Of each of --weights: its label, its stages, and the other tensors of the file."""
    archs = args.arch * len(args.weights) if len(args.arch) == 1 else args.arch
    if len(archs) != len(args.weights):
        raise InputError(f"{len(archs)} --arch for {len(args.weights)} --weights")
    found = []
    for label, path, arch in zip(args.labels, args.weights, archs):
        torch.manual_seed(args.seed)
        stages = backbone_stages(arch)
        rest = load_backbone(stages, path) if path != "none" else {}
        found.append((label, stages.eval().to(device), rest))
    return found


def pooled(stages, x, level):
    """Images (B, 3, H, W), or patches (B, 9, 3, h, w) of each -> (B, C) unit: the level's mean."""
    features = stages(x.flatten(0, -4))[LEVELS.index(level)].mean((2, 3))
    return F.normalize(features.view(len(x), -1, features.shape[1]).mean(1), dim=1)


# -------------------------------------------------------------------------- the papers' quantities


def attention_map(features, size):
    """(B, C, h, w) -> (B, size, size): mean over channels, scaled to 0..1 in each image, bilinear
    (DetCo 6.3.1).  All 0 where the mean is the same everywhere."""
    mean = features.mean(1, keepdim=True)  # (B, 1, h, w)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    level = features.abs().mean((1, 2, 3), keepdim=True)
    scaled = torch.where(high - low > 1e-5 * level, (mean - low) / (high - low), 0)
    return F.interpolate(scaled, (size, size), mode="bilinear")[:, 0]


def neighbours(features, number=9):
    """features (n, D), unit -> of each row the rows most like it, itself left out: their indices
    (n, number), best first, and cosines (DetCo 6.3.2)."""
    similarity = features @ features.T
    best = similarity.fill_diagonal_(-np.inf).topk(min(number, len(features) - 1))
    return best.indices, best.values


def pair_similarity(q, k):
    """q, k (B, D), unit: row i of q and of k are a positive pair, any two others a negative one.
    Returns exp(cosine), its mean over the positive and over the negative pairs (DetCo 6.4)."""
    similarity = (q @ k.T).exp()  # (B, B)
    positive = similarity.diagonal()
    return positive.mean(), (similarity.sum() - positive.sum()) / (len(q) * (len(q) - 1))


def boxes_of_iou(box, ious, width, height, tries=64):
    """Boxes inside the image whose IoU with ``box`` is given (DUPR 4.6.1).

    box: (4,) x1 y1 x2 y2 in pixels, inside too; ious: (n,) in 0..1.  From ``box`` straight to a
    random box of 2 pixels a side or more the IoU falls from 1 to theirs: bisection finds the place.
    Returns (n, 4) float64; where all of the tries overlap ``box`` more than asked, the least of it.
    """
    box, ious = box.double(), torch.as_tensor(ious).double()
    extent = torch.tensor([width, height]).double()
    sides = torch.minimum(2 + torch.rand(len(ious), tries, 2).double() * (extent - 2), extent)
    corner = torch.rand(len(ious), tries, 2).double() * (extent - sides)
    ends = torch.cat([corner, corner + sides], dim=2)  # (n, tries, 4)
    overlap = box_iou(ends.flatten(0, 1), box[None]).view(len(ious), tries)
    low_enough = overlap <= ious[:, None]
    chosen = torch.where(low_enough.any(1), low_enough.int().argmax(1), overlap.argmin(1))
    end = ends[torch.arange(len(ious)), chosen]  # (n, 4)
    near, far = torch.zeros(len(ious)).double(), torch.ones(len(ious)).double()
    for _ in range(40):
        middle = (near + far) / 2
        above = box_iou(box + middle[:, None] * (end - box), box[None])[:, 0] > ious
        near, far = torch.where(above, middle, near), torch.where(above, far, middle)
    return box + far[:, None] * (end - box)


def matches(q, k):
    """q, k (C, h, w): of each position of q the most similar one of k, by cosine -> (h w,)."""
    q, k = (F.normalize(x.flatten(1), dim=0) for x in (q, k))  # (C, h w)
    return (q.T @ k).argmax(1)


def counterpart(points, view_q, view_k):
    """Where points (n, 2) of view_q, x y in its pixels, are in view_k: (n, 2), in its pixels."""
    size = view_q.pixels.shape[-1]
    x = size - points[:, :1] if view_q.flipped else points[:, :1]
    low, high = view_q.box.chunk(2)
    source = low + torch.cat([x, points[:, 1:]], dim=1) / size * (high - low)  # (n, 2)
    flipped = torch.tensor([view_k.flipped])
    boxes = soco.into_view(source.repeat(1, 2)[None], view_k.box[None], flipped, size)
    return boxes[0, :, :2]


def correspond(q, k, view_q, view_k):
    """Match each position of q with one of k, features (C, h, w) of two views (DUPR 4.6.2).

    Returns the positions and their matches, x y in the views' pixels, (h w, 2) each; which
    positions the other view shows (h w,) bool; whether the match is at most one cell off, (h w,)
    bool, and the chance of that, the share of such cells in the other view, (h w,); 0 if not shown.
    """
    size = view_q.pixels.shape[-1]
    cell = size / torch.tensor([q.shape[2], q.shape[1]])  # x y
    points = (torch.cartesian_prod(*map(torch.arange, q.shape[1:])).flip(1) + 0.5) * cell
    found = matches(q, k)
    true = counterpart(points, view_q, view_k)
    seen = ((true >= 0) & (true <= size)).all(1)
    close = ((points - true[:, None]).abs() <= 1.001 * cell).all(2) & seen[:, None]  # (h w, h w)
    right = close[torch.arange(len(points)), found]
    return points, points[found], seen, right, close.float().mean(1)


# ---------------------------------------------------------------------------------------- pictures


def panels(rows, columns, titles=(), height=None):
    """A figure as wide as a README, and its axes (rows, columns) without ticks."""
    figure = Figure((9, rows * (height or 9 / columns) + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=10)
    return figure, axes


def show(ax, image, title="", **boxes):
    """Draw an image (3, H, W), uint8 or float 0..1, and boxes: a colour's are name -> (4,)."""
    ax.imshow(image.permute(1, 2, 0).numpy())
    if title:
        ax.set_title(title, fontsize=8)
    for colour, named in boxes.items():
        for name, (x1, y1, x2, y2) in named.items():
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=1.5))
            ax.text(x1 + 1, y1 + 1, name, fontsize=7, color="white", va="top",
                    bbox=dict(facecolor=colour, edgecolor="none", pad=1))


def attention(args, device):
    """Where the level is active, over the image."""
    items = [*islice(pictures(args), args.rows)]
    pixels, rows = squares(items, args, device), []
    networks = backbones(args, device)
    figure, axes = panels(len(items), 1 + len(networks), ["image", *args.labels])
    for column, (label, stages, _) in enumerate(networks, 1):
        level = stages(pixels)[LEVELS.index(args.level)].float().cpu()
        for i, (mapped, (image, truth)) in enumerate(zip(attention_map(level, args.size), items)):
            height, width = image.shape[1:]
            show(axes[i, 0], image)
            show(axes[i, column], image)
            axes[i, column].imshow(mapped.numpy(), "inferno", alpha=0.65,
                                   extent=(0, width, height, 0))
            row = dict(weights=label, image=i, share_above_half=(mapped > 0.5).float().mean())
            if truth is not None:
                inside = torch.zeros(args.size, args.size, dtype=torch.bool)
                by = torch.tensor([width, height] * 2) / args.size
                for x1, y1, x2, y2 in (truth["boxes"] / by).round().int().clamp(min=0).tolist():
                    inside[y1:y2, x1:x2] = True
                row.update(mean_in_boxes=mapped[inside].mean(), elsewhere=mapped[~inside].mean())
            rows.append(row)
    figure.suptitle(f"mean of {args.level} over channels, 0 to 1 in each image", fontsize=10)
    return figure, rows


def retrieval(args, device):
    """The nearest neighbours of the first images, and how many of all images' share a class."""
    small, truths, features, rows = [], [], {}, []
    networks, items = backbones(args, device), pictures(args)
    while batch := [*islice(items, 32)]:
        x = squares(batch, args, device)
        for label, stages, _ in networks:
            features.setdefault(label, []).append(pooled(stages, x, args.level).float().cpu())
        small += [resize(image, [96, 96], antialias=True) for image, _ in batch]
        truths += [truth for _, truth in batch]
    if len(small) < 2:
        raise InputError("retrieval needs two images or more")
    known = truths[0] is not None  # then colours tell who shares a class
    if known:
        number = 1 + max([0, *torch.cat([truth["labels"] for truth in truths]).tolist()])
        present = torch.stack([t["labels"].bincount(minlength=number) for t in truths]) > 0
        share = (present.float() @ present.float().T > 0).fill_diagonal_(False)  # (n, n)
    drawn = min(args.rows, len(small))
    figure, axes = panels(drawn * len(networks), 10, ["query", *map(str, range(1, 10))])
    for n, (label, parts) in enumerate(features.items()):
        nearest, cosine = neighbours(torch.cat(parts))  # (n, 9) each
        for i in range(drawn):
            line = axes[i * len(networks) + n]
            show(line[0], small[i])
            line[0].set_ylabel(label, fontsize=8)
            for ax, j, value in zip(line[1:], nearest[i].tolist(), cosine[i]):
                show(ax, small[j])
                ax.set_xlabel(f"{value:.3f}", fontsize=7, labelpad=1)
                for side in ax.spines.values() if known else ():
                    side.set(color="C0" if share[i, j] else "C1", linewidth=2)
        rows.append(dict(weights=label, images=len(small), first_cosine=cosine[:, 0].mean(),
                         last_cosine=cosine[:, -1].mean()))
        if known:
            rows[-1].update(share_a_class=share.gather(1, nearest).float().mean(),
                            of_any_pair=share.sum() / (len(small) * (len(small) - 1)))
    figure.suptitle(f"nearest by the mean of {args.level}, and their cosine" + (
        "; blue: a class in common, orange: none" if known else ""), fontsize=10)
    return figure, rows


def similarity(args, device):
    """exp(cosine) of two global views, and of a local and a global one, the mean of each batch."""
    figure = Figure((9, 1.8 * len(args.weights) + 0.4), layout="constrained")
    axes = figure.subplots(len(args.weights), 2, squeeze=False, sharex=True)
    rows, networks = [], None
    files = [load_checkpoint(path) if path != "none" else {} for path in args.weights]
    heads = [isinstance(saved, dict) and saved.get("method") == "detco" for saved in files]
    for path, saved in ((p, f) for p, f, head in zip(args.weights, files, heads) if head):
        if saved["args"]["no_local"] or not saved["args"]["weights"][3]:
            raise InputError(f"{path} has no local head at Res5 (--no-local, --weights)")
    recipe = (argparse.Namespace(**files[heads.index(True)]["args"]) if any(heads) else
              detco.parse_args([] if args.data is None else ["--data", args.data]))
    for i, (label, path, saved) in enumerate(zip(args.labels, args.weights, files)):
        if heads[i]:
            own = argparse.Namespace(**saved["args"])
            model = detco.DetCo(own.arch, own.dim, own.queue_size, weights=own.weights,
                                bn_groups=1, share_queue=own.share_queue)
            model.load_state_dict(saved["model"])
            model.eval().to(device)  # Res5 comes last
            embed_q, embed_k = (lambda x, e=e: e(x)[-1] for e in (model.encoder_q, model.encoder_k))
        else:
            networks = networks or backbones(args, device)
            embed_q = embed_k = lambda x, stages=networks[i][1]: pooled(stages, x, args.level)
        torch.manual_seed(args.seed)
        items, means = pictures(args), []
        while len(batch := [detco.views(image, recipe) for image, _ in islice(items, 32)]) > 1:
            view_q, view_k, (local, corners), _ = default_collate(batch)
            q, k, patches = (photometric(view.pixels.to(device), p_blur=recipe.p_blur,
                                         mean=args.mean, std=args.std)
                             for view in (view_q, view_k, local))
            patches = detco.cut_patches(patches, corners.to(device), recipe.patch_size)
            k = embed_k(k)
            means.append([*pair_similarity(embed_q(q), k), *pair_similarity(embed_q(patches), k)])
        means = torch.tensor(means).view(-1, 2, 2)  # batches; global, local; positive, negative
        if not len(means):
            raise InputError("similarity needs two images or more")
        row = dict(weights=label, batches=len(means))
        for j, kind in enumerate(("positive", "negative")):
            for name, values in (("global", means[:, 0, j]), ("local", means[:, 1, j])):
                row[f"{kind}_{name}"] = values.mean()
                axes[i, j].hist(values.numpy(), np.linspace(1 / np.e, np.e, 200),
                                label=f"{name}-global: {values.mean():.3f}")
            row[f"{kind}_difference"] = (means[:, 0, j] - means[:, 1, j]).mean()
            axes[i, j].set_title(f"{label}, {kind} pairs", fontsize=9)
            axes[i, j].legend(fontsize=8, loc="upper left")
            axes[-1, j].set_xlabel("exp(cosine), mean of a batch of 32 images", fontsize=8)
        axes[i, 0].set_ylabel("batches", fontsize=8)
        rows.append(row)
    return figure, rows


def iou_similarity(args, device):
    """Eq. (9) of DUPR against IoU: 20 boxes around each annotated one, positions 14 x 14."""
    networks, values, example = backbones(args, device), {label: [] for label in args.labels}, None
    ious = []
    torch.manual_seed(args.seed)
    for item in pictures(args):
        image, truth = item
        if truth is None:
            raise InputError("iou-similarity needs boxes: --dataset voc or coco, or no --data")
        height, width = image.shape[1:]
        by = torch.tensor([args.size / width, args.size / height] * 2)
        truths = truth["boxes"][~truth["ignore"]].double().clamp(min=0)
        truths, near = truths.minimum(torch.tensor([width, height] * 2)), []
        for box in truths:
            wanted = (torch.arange(20) + torch.rand(20)) / 20
            near.append(boxes_of_iou(box, wanted, width, height))  # (20, 4)
            ious.append(box_iou(near[-1], box[None])[:, 0])
        if not near:
            continue
        example = example or (image, truths[0], near[0], ious[-len(near)])
        boxes = torch.cat([truths, *near]) * by
        x = squares([item], args, device)
        for label, stages, _ in networks:
            features = stages(x)[LEVELS.index(args.level)].float()
            regions = roi_align(features, [boxes.float().to(device)], 14, aligned=True,
                                spatial_scale=features.shape[-1] / args.size)
            q, k = regions.split([len(near), 20 * len(near)])  # (n, C, S, S), (20 n, C, S, S)
            q = q.repeat_interleave(20, dim=0)
            values[label].append(dupr.region_similarity(q, k).cpu())
    if not ious:
        raise InputError("no boxes in these images")
    ious = torch.cat(ious)
    bins = (ious * 10).long().clamp(max=9)
    rows = [dict(iou=ious[bins == b].mean(), boxes=(bins == b).sum()) for b in bins.unique()]
    figure, ((left, right),) = panels(1, 2, height=3.6)
    image, box, near, found = example
    show(left, image, "a box (blue) and others of IoU 0 to 1 with it", C1={
        f"{found[i]:.2f}": near[i] for i in range(1, 20, 4)}, C0={"": box})
    for label in args.labels:
        similarity = torch.cat(values[label])
        for row, b in zip(rows, bins.unique()):
            row[f"{label} mean"] = similarity[bins == b].mean()
            row[f"{label} deviation"] = similarity[bins == b].std(correction=0)
        x, mean, spread = (torch.stack([r[name] for r in rows]).numpy()
                           for name in ("iou", f"{label} mean", f"{label} deviation"))
        line, = right.plot(x, mean, label=label)
        right.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    right.set(xlabel="IoU with the annotated box", ylabel=f"similarity of {args.level} (Eq. 9)",
              xticks=np.linspace(0, 1, 6))
    right.yaxis.set_major_locator(MaxNLocator(6))
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure, rows


def correspondence(args, device):
    """Two views of an image: where each position of the one finds its like in the other."""
    networks, rows = backbones(args, device), []
    torch.manual_seed(args.seed)
    drawn = [[random_resized_crop(image, args.size) for _ in "qk"] for image, _ in pictures(args)]
    pixels = [photometric(torch.stack([v.pixels for v in pair]), mean=(0, 0, 0), std=(1, 1, 1))
              for pair in drawn]  # 0..1
    shown = min(args.rows, len(drawn))
    figure, axes = panels(len(networks), shown, height=9 / 2 / shown)
    for line, (label, stages, _) in zip(axes, networks):
        counts = torch.zeros(3)
        for i, (pair, x) in enumerate(zip(drawn, pixels)):
            x_in = normalize(x, args.mean, args.std).to(device)
            features = stages(x_in)[LEVELS.index(args.level)].float().cpu()
            points, found, seen, right, chance = correspond(*features, *pair)
            counts += torch.stack([right.sum(), seen.sum(), chance.sum()])
            if i >= shown:
                continue
            ax, gap = line[i], args.size // 16
            colour = np.where(right, "C0", "C1")
            one, two = x.clamp(0, 1)
            show(ax, torch.cat([F.pad(one, (0, gap), value=1), two], dim=2))
            start, end = points[seen], found[seen] + torch.tensor([args.size + gap, 0])
            ax.add_collection(LineCollection(torch.stack([start, end], dim=1).numpy(), alpha=0.3,
                                             colors=colour[seen], linewidths=0.6))
            for dots in (start, end):
                ax.scatter(*dots.T.numpy(), s=6, c=colour[seen], linewidths=0)
            ax.set_title(f"{label}: {right.sum()} of {seen.sum()} right", fontsize=8)
        right, seen, chance = counts.tolist()
        rows.append(dict(weights=label, pairs=len(drawn), positions=int(seen), right=int(right),
                         share=right / max(1, seen), chance=chance / max(1, seen)))
    figure.suptitle(f"most similar positions of {args.level}; blue: at most one cell off, orange: "
                    "wrong", fontsize=10)
    return figure, rows


def features(args, device):
    """The mean over channels of each level: Res2..Res5, or P2..P5 where the file has an FPN."""
    items, rows = [*islice(pictures(args), args.rows)], []
    x = squares(items, args, device)
    networks = backbones(args, device)
    figure, axes = panels(len(items) * len(networks), 5, ["image"])
    for n, (label, network, rest) in enumerate(networks):
        names = [f"Res{i}" for i in range(2, 6)]
        lateral = [v for k, v in rest.items() if k.endswith("fpn.inner_blocks.0.0.weight")]
        if lateral:  # the file has an FPN
            names = [f"P{i}" for i in range(2, 6)]
            network = Pyramid(network, len(lateral[0])).eval()
            load_part(network.fpn, "backbone.fpn.", rest, args.weights[n])
        levels = network.to(device)(x)
        levels = [*levels.values()] if lateral else levels
        for i, (image, _) in enumerate(items):
            line = axes[i * len(networks) + n]
            show(line[0], image)
            line[0].set_ylabel(label, fontsize=9)
            for ax, name, level in zip(line[1:], names, levels):
                mean = level[i].float().mean(0).cpu().numpy()
                ax.imshow(mean, "viridis", extent=(0, image.shape[2], image.shape[1], 0))
                ax.set_title(f"{name}, {mean.shape[0]} x {mean.shape[1]}", fontsize=8)
                ax.set_xlabel(f"{mean.min():.2g} to {mean.max():.2g}", fontsize=7, labelpad=1)
                rows.append(dict(weights=label, image=i, level=name, least=mean.min(),
                                 mean=mean.mean(), most=mean.max()))
    figure.suptitle("mean activation over channels, dark to bright: least to most of the level",
                    fontsize=10)
    return figure, rows


def detections(args, device):
    """Annotations above what fine-tuned detectors find; none: such a detector before training."""
    recipes = [argparse.Namespace(**fine_tuned(path)["args"]) for path in args.weights
               if path != "none"]
    if recipes:
        recipe = recipes[0]
    else:
        recipe = parse_fine_tune(["--dataset", args.dataset or "scenes"])
        recipe.arch, recipe.mean, recipe.std = args.arch[0], args.mean, args.std
    if args.data is not None:
        recipe.data, recipe.dataset = args.data, args.dataset or recipe.dataset
        if args.dataset:  # else of the checkpoint's layout, and its split
            recipe.test_split = RECIPES[args.dataset].get("test_split")
    if args.split:
        recipe.test_split = args.split
    if (recipe.dataset == "scenes") != (recipe.data is None):
        raise InputError("detections of --data need --dataset voc or coco, and these need --data")
    data = (LabelledScenes(1000, seed=2) if recipe.dataset == "scenes" else
            Annotated(recipe.dataset, recipe.data, recipe.test_split, recipe.classes))
    order = np.random.default_rng(args.seed).permutation(len(data))[:args.rows].tolist()
    items, found, rows = [data[i] for i in order], {}, []
    for label, path in zip(args.labels, args.weights):
        own = fine_tuned(path) if path != "none" else {}
        settings = argparse.Namespace(**{**vars(recipe), **own.get("args", {}), "weights": "none"})
        settings.classes = settings.classes or data.classes
        if settings.classes != data.classes:
            raise InputError(f"{path} knows other classes: {' '.join(settings.classes)}")
        settings.seed = args.seed
        model = detector(settings).to(device).eval()
        if own:
            restore(model, own, path)
        found[label] = detect(model, [image for image, _ in items], device)
        for i, (seen, (_, truth)) in enumerate(zip(found[label], items)):
            best = {key: values[:5] for key, values in seen.items()}  # those that are drawn
            hit = box_iou(truth["boxes"].float(), best["boxes"]) >= 0.5
            hit &= truth["labels"][:, None] == best["labels"]
            rows.append(dict(weights=label, image=i, annotated=len(truth["boxes"]),
                             found=hit.any(1).sum(), detections=len(seen["boxes"]),
                             best_score=max([0.0, *seen["scores"].tolist()])))
    return draw_detections(items, found, data.classes), rows


def views_of(name, image, recipe):
    """The views that a method cuts of an image (3, H, W) uint8, as its network gets them -> a list
    of (View, its pixels (3, h, w) float 0..1, boxes in these: colour -> name -> (4,))."""
    symmetric, boxes = name in ("moco_v2", "detco", "dupr"), [{}] * 4
    if name == "detco":
        drawn = detco.views(image, recipe)
        cut = [view if i < 2 else view.view for i, view in enumerate(drawn)]
    elif name == "dupr":
        cut = dupr.two_views(image, recipe)
        *where, valid = dupr.overlap(*(default_collate([view]) for view in cut))
        side = max(s for s in recipe.roi_size if s <= 7 or s == min(recipe.roi_size))
        for i, (roi, flipped) in enumerate(where if valid else ()):
            step = (roi[0, 2:] - roi[0, :2]) / side
            cells = torch.cartesian_prod(*2 * [torch.arange(side)]).flip(1)  # x y, row by row
            cells[:, 0] = side - 1 - cells[:, 0] if flipped else cells[:, 0]
            corner = roi[0, :2] + cells * step  # (S S, 2)
            cells = torch.cat([corner, corner + step], dim=1)
            boxes[i] = {"C0": {str(n): cell for n, cell in enumerate(cells.tolist(), 1)}}
    elif name == "soco":
        recipe.view4 = recipe.view4 or recipe.image_size * 6 // 7  # 192 beside 224
        found = torch.from_numpy(selective_search.propose(image, "single", 224)).float()
        cut, places, _ = soco.make_views((image, found), recipe)
        levels = soco.Network("resnet18", 8, 8, 8).pool.map_levels
        for i, view in enumerate(cut):
            size, turned = view.pixels.shape[-1], torch.tensor([view.flipped])
            placed = soco.into_view(places[None], view.box[None], turned, size)[0]  # (P, 4)
            placed = placed if i else soco.jitter_boxes(placed, size, recipe.jitter)
            boxes[i] = {f"C{j}": {f"P{level + 2}": box} for j, (level, box) in
                        enumerate(zip(levels([placed]).tolist(), placed.tolist()))}
    else:
        cut = METHODS[name].two_views(image, recipe.image_size, (recipe.crop_scale, 1.0))
    seen = []
    for i, view in enumerate(cut):
        colours = dict(p_blur=recipe.p_blur) if symmetric else dict(
            jitter=(0.4, 0.4, 0.2, 0.1), p_blur=recipe.p_blur[i > 0], p_solarize=0.2 * (i > 0))
        pixels = photometric(view.pixels[None], mean=(0, 0, 0), std=(1, 1, 1), **colours)
        if name == "detco" and i >= 2:
            patches = detco.cut_patches(pixels, drawn[i].corners[None], recipe.patch_size)
            pixels = make_grid(patches[0], 3, padding=2, pad_value=1)[None]
        seen.append((view, pixels[0].clamp(0, 1), boxes[i]))
    return seen


def views(args, _device):
    """An image, and what each method's network gets of it (SoCo's fourth view: SoCo* only)."""
    (image, _), rows = next(pictures(args)), []
    figure, axes = panels(len(args.methods), 5)
    for name, line in zip(args.methods, axes):
        torch.manual_seed(args.seed)
        recipe = METHODS[name].parse_args([] if args.data is None else ["--data", args.data])
        seen = views_of(name, image, recipe)
        show(line[0], image, "image and crops", **{f"C{i}": {str(i): view.box.tolist()}
                                                   for i, (view, *_) in enumerate(seen, 1)})
        line[0].set_ylabel(name, fontsize=9)
        for ax in line[1 + len(seen):]:
            ax.set_axis_off()
        for i, (ax, (view, pixels, boxes)) in enumerate(zip(line[1:], seen), 1):
            side, flip = view.pixels.shape[-1], ", flipped" if view.flipped else ""
            show(ax, pixels, f"{i}: {side} px{flip}", **boxes)
            rows.append(dict(method=name, view=i, pixels=side, flipped=int(view.flipped),
                             **dict(zip(("x1", "y1", "x2", "y2"), view.box.tolist())),
                             boxes=" ".join(n for b in boxes.values() for n in b)))
    return figure, rows


def curves(args, _device):
    """What several runs have logged, over the epochs: a panel for each column that two of them
    have, or, of a single run, for each."""
    logs, rows = {}, []
    for label, path in zip(args.labels, args.weights):
        path = Path(path, "log.csv") if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise InputError(f"no {path}: curves takes folders of runs")
        with open(path, newline="", errors="replace") as file:
            logs[label] = [row for row in csv.DictReader(file) if all(row.values())]
        if not logs[label] or "epoch" not in logs[label][0]:
            raise InputError(f"{path} is no log of a run, or an empty one")
    names = [name for log in logs.values() for name in log[0] if name not in ("step", "epoch")]
    names = [name for name in dict.fromkeys(names) if names.count(name) >= min(2, len(logs))]
    if not names:
        raise InputError(f"no column is in two of the logs: {' '.join(args.weights)}")
    figure, axes = panels(-(-len(names) // 3), 3, height=2.4)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    for name, ax in zip(names, axes.flat):
        for n, (label, log) in enumerate(logs.items()):
            if name not in log[0]:
                continue
            values = [float(row[name]) for row in log]
            ax.plot([float(row["epoch"]) for row in log], values, f"C{n}", label=label)
            rows.append(dict(run=label, column=name, first=values[0], last=values[-1],
                             least=min(values), most=max(values)))
        ax.set_title(name.replace("_", " "), fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure, rows


# ----------------------------------------------------------------------------------------- command

FIGURES = {"attention": attention, "retrieval": retrieval, "similarity": similarity,
           "iou-similarity": iou_similarity, "correspondence": correspondence,
           "features": features, "detections": detections, "views": views, "curves": curves}


def table(rows):
    """Dicts -> lines of aligned columns, numbers with four digits."""
    names = [*dict.fromkeys(name for row in rows for name in row)]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in (r.get(n, "") for n in names)]
             for r in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths))
                     for line in (names, *cells))


@torch.no_grad()
def run(args, device):
    """Draw the figure, print the numbers behind it."""
    check(args, images=(1, np.inf), rows=(1, np.inf), size=(32, np.inf), seed=(0, np.inf),
          mean=(0, 1), std=(1e-3, 1))
    known = Figure().canvas.get_supported_filetypes()
    if Path(args.out).suffix[1:].lower() not in known:
        raise InputError(f"--out {args.out}: no picture's ending ({', '.join(known)})")
    name_weights(args)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE)
    figure, rows = FIGURES[args.figure](args, device)
    rows = [{k: v.item() if hasattr(v, "item") else v for k, v in row.items()} for row in rows]
    for path in filter(None, (args.out, args.csv)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(table(rows))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*dict.fromkeys(k for row in rows for k in row)])
            writer.writeheader()
            writer.writerows(rows)
    print(f"{args.out} is the figure")


def main(argv=None):
    """The command."""
    launch(run, parse_args(argv))


if __name__ == "__main__":
    main()
