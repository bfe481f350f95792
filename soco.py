"""SoCo: Aligning Pretraining for Detection via Object-Level Contrastive Learning (Wei et al.,
NeurIPS 2021, arXiv 2106.02637).  "The talk" are slides on this paper; tables are the paper's.

Boxes that may hold objects are found without labels, by selective search.  A detector's ResNet,
feature pyramid and box head learn to say the same of a box in all views of its image, whatever its
scale, place and colours there.  There are no negatives: an online network predicts what a slow copy
of itself, the target network, says of another view.

Read first: moco_v2.py, for the momentum update and the loop.  New here: boxes instead of images,
the detector's own parts in pre-training, a predictor in place of negatives, LARS.

Symbols
    talk            code              shape
    V1, V2, V3      views             3 x (B, 3, H, H)   the image; a crop of it; that made smaller
    b               boxes             3 x (B, P, 4)      the same places, in each view's pixels
    f^I, f^H        backbone, head                       ResNet and FPN; 4 convolutions, 1 linear
    h               h                 (BP, 1024)         a box, as the box head sees it
    g, q            projector, predictor                 1024 -> 4096 -> 256; 256 -> 4096 -> 256
    v; v', v''      v, target         (BP, D)            predicted of a box; said by the target
    theta, xi       online, target                       the two networks
    K               boxes_per_image                      P here
    tau             m                                    momentum of the target network

Equations
    1/3 <= w/h <= 3, 0.3 <= sqrt(wh) / sqrt(WH) <= 0.8     selective_search.keep_object_like
    view construction                                      common.random_resized_crop, make_views
    box jitter                                             jitter_boxes
    h = f^H(RoIAlign(f^I(V), b)), scale-aware assignment   Network.forward
    L_i = -2 cos(v_i, v'_i) - 2 cos(v_i, v''_i)            similarity_loss
    L_SoCo = L + L~                                        SoCo.forward
    xi <- m xi + (1 - m) theta                             common.momentum_update

Commands
    python soco.py                                         built-in scenes, minutes on a CPU
    torchrun soco.py --data DIR --batch-size 256           one GPU
    torchrun --nproc_per_node=16 soco.py --data DIR        sixteen, the recipe
    torchrun --nproc_per_node=16 soco.py --data DIR --view4 --epochs 400     SoCo*
    torchrun --nproc_per_node=16 soco.py --data DIR --boxes-per-image 1 --proposals random   5 (c)
    torchrun --nproc_per_node=16 soco.py --data DIR --momentum 0.98                    Table 5 (d)
    python finetune_fasterrcnn.py --weights runs/soco/detector.pt            all that was learned

Where this differs from the talk, or it is silent (then: the authors' public configuration)
    - Recipe (LARS, decay, warm-up, colours) and layer widths are the configuration's.
    - V2's rectangle is drawn in V1, but cut from the image at its own resolution.  V3 is V2, made
      smaller, as in the talk, and so is V4, of which it gives the size alone.  The authors' code
      crops V3 anew; for SoCo* its view of 192, while its 112 is V2 made smaller.
    - No cutout: for 100 epochs (not for 400) the authors' code blanks, with p 0.5, a square of 10
      to 30% of a box in V2 and V3.
    - A box is cut to V2, in V1 too (whole there in the authors' code), so that every view shows the
      same of it; under 8 pixels of V2 a side it is dropped.  Of the others P are drawn;
      where there are fewer, they are repeated; where there is none, all of V2 is the box
      (whole_view in the log is the share of such images).
    - Jitter moves the boxes of V1 only; r is drawn anew for each of a box's x, y, w and h.
    - A box is pooled from the one level of its size; the authors' code runs all four and keeps one.
      The bounds are 48, 96 and 192 pixels of a view of any size: in the built-in scenes' views of
      64, no box is of P4 or P5, whose last convolutions stay as initialised.
    - RoI Align is not shifted by half a pixel, as in torchvision's Faster R-CNN; the authors' is.
    - m rises to 1 by a cosine over the steps, as in the authors' code; the talk gives its start.
    - --proposals auto is the single strategy of selective_search.py at 224 pixels; the authors' was
      one segmentation too, k = 300, sigma 0.9, regions of 100 pixels, at full size.
    - Batch norm is synchronised over processes on GPUs; on CPUs each process has its own.
    - On CUDA RoI Align adds up its gradients in no fixed order: a resumed run need not end where an
      uninterrupted one does, bit for bit.  bfloat16 there.
"""
import argparse
import copy
import math
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2.functional import resize

from common import (LARS, InputError, Run, View, add_run_arguments, check, export_backbone, launch,
                    load_batches, mixed_precision, momentum_update, photometric,
                    random_resized_crop, rank, resnet_stages, save_checkpoint, seed_for,
                    steps_per_epoch, unlabelled, world_size)
from selective_search import read_proposals, search


def parse_args(argv=None):
    """The recipe by default; without --data, a small one for the built-in scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a detector's ResNet, FPN and box head.")
    add = parser.add_argument_group("recipe (table of the paper)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--proposals", default="auto", metavar="FILE", help="selective_search.py's, or random, or "
        "auto (default): search, and keep the boxes in the folder of the run (Table 5 c)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=int, default=100, help="passes over the images (Table 1)")
    add("--batch-size", type=int, default=2048, help="of all processes together (Table 5 b)")
    add("--lr", type=float, default=1.0, help="for each 256 images of the batch")
    add("--weight-decay", type=float, default=1e-5, help="none on biases and batch norm")
    add("--warmup", type=int, default=10, help="epochs of linear growth of the lr")
    add("--image-size", type=int, default=224, help="side of V1 and V2 in pixels")
    add("--small-size", type=int, default=112, help="side of V3 (Table 5 a)")
    add("--view4", type=int, nargs="?", const=192, metavar="SIDE", help="V4 of SoCo* (192)")
    add("--crop-scale", type=float, default=0.5, help="least share of the image in V2")
    add("--boxes-per-image", type=int, default=4, help="P (Table 5 c)")
    add("--jitter", type=float, default=0.1, help="greatest r; half of V1's boxes are moved")
    add("--p-blur", type=float, nargs=2, default=[1.0, 0.1], metavar="P", help="V1's, the others'")
    add("--fpn-channels", type=int, default=256)
    add("--hidden", type=int, default=4096, help="width of projector and predictor")
    add("--dim", type=int, default=256, help="D")
    add("--momentum", type=float, default=0.99, help="m at the start; 1 at the end (Table 5 d)")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add_run_arguments(parser, out="runs/soco")
    if parser.parse_known_args(argv)[0].data is None:
        parser.set_defaults(arch="resnet18", image_size=64, small_size=32, epochs=3, batch_size=64,
                            warmup=1, p_blur=[0.0, 0.0], fpn_channels=64, hidden=512, dim=128)
    return parser.parse_args(argv)


# ----------------------------------------------------------------------- proposals (in the workers)


class Proposed(Dataset):
    """Item i: an image (3, H, W) uint8 and its proposals (n, 4) float, x1 y1 x2 y2 in its pixels.

    proposals: read_proposals of these images, or None: boxes drawn anew every time.
    """

    def __init__(self, images, proposals):
        self.images, self.boxes = images, None
        if proposals is not None:
            row = {name: i for i, name in enumerate(proposals["names"].tolist())}
            missing = [name for name in images.names if name not in row]
            if missing:
                raise InputError(f"no proposals for {len(missing)} of {len(images)} images, such "
                                 f"as {missing[0]}")
            rows = [row[name] for name in images.names]
            self.start, self.end = (proposals["offsets"][side:][rows] for side in (0, 1))
            self.boxes = proposals["boxes"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        i, image = self.images.numbered(index)
        if self.boxes is None:
            return image, random_boxes(*image.shape[:0:-1])
        return image, torch.from_numpy(self.boxes[self.start[i]:self.end[i]]).float()


def random_boxes(width, height, number=32):
    """Boxes (n, 4) anywhere in the image, sqrt(w h) and log(w / h) uniform between the bounds of
    ``keep_object_like``; those of ``number`` that fit into it."""
    side = (0.3 + 0.5 * torch.rand(number)) * math.sqrt(width * height)
    root = 3 ** (torch.rand(number) - 0.5)  # sqrt(w / h)
    w, h = side * root, side / root
    left, top = torch.rand(2, number) * torch.stack([width - w, height - h])
    fits = (w <= width) & (h <= height)
    return torch.stack([left, top, left + w, top + h], dim=1)[fits]


def find_proposals(args, images):
    """What --proposals names, searched for by the first process if need be; None for random."""
    if args.proposals == "random":
        return None
    if args.proposals != "auto":
        return read_proposals(args.proposals)
    path, here = Path(args.out) / "proposals.npz", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank() == 0:
        search(images, path, "single", 224, args.workers * here, args.fresh)
    if world_size() > 1:  # the others wait for hours, if need be
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=30)))
    return read_proposals(path)


# --------------------------------------------------------------------------- views (in the workers)


def choose(boxes, crop, size, number):
    """``number`` of the boxes (n, 4), drawn, as far as they lie in ``crop`` (4,), all in the source
    image's pixels; a side under 8 pixels of a view of ``size`` that shows the crop is too little.
    Returns (number, 4), and whether there was none and the crop itself stands in."""
    corners = boxes.unflatten(1, (2, 2)).clamp(crop[:2], crop[2:])  # (n, 2, 2)
    sides = (corners[:, 1] - corners[:, 0]) / (crop[2:] - crop[:2]) * size  # (n, 2)
    usable = corners[(sides >= 8).all(1)].flatten(1)
    none = len(usable) == 0
    usable = crop[None] if none else usable[torch.randperm(len(usable))]
    return usable[torch.arange(number) % len(usable)], none


def resized(view, size):
    """The view at size x size pixels, flipped once more with p 0.5."""
    turned = bool(torch.rand(()) < 0.5)
    pixels = resize(view.pixels, [size, size], antialias=True)
    return View(pixels.flip(-1) if turned else pixels, view.box, view.flipped != turned)


def make_views(item, args):
    """V1, V2, V3, with --view4 also V4, of an image and its boxes -> the Views, P boxes (P, 4) in
    the source image's pixels, and whether the crop stands in for them."""
    image, boxes = item
    height, width = image.shape[1:]
    whole = View(image, torch.tensor([0.0, 0.0, width, height]), False)
    ratio = 3 / 4 * width / height, 4 / 3 * width / height  # 3/4 to 4/3 in V1, which is square
    crop = random_resized_crop(image, args.image_size, (args.crop_scale, 1.0), ratio)
    views = [resized(whole, args.image_size), crop, resized(crop, args.small_size)]
    if args.view4:
        views.append(resized(crop, args.view4))
    return views, *choose(boxes, crop.box, args.image_size, args.boxes_per_image)


def into_view(box, view_box, flipped, size):
    """Boxes of the source image in the pixels of the view that shows view_box.

    box: (B, P, 4), view_box: (B, 4), x1 y1 x2 y2 in the source image's pixels; flipped: (B,) bool;
    size: side of the view, in pixels.  Returns (B, P, 4), x1 < x2.
    """
    low, high = view_box[:, None, None].chunk(2, dim=3)  # (B, 1, 1, 2) each
    placed = (box.unflatten(2, (2, 2)) - low) / (high - low) * size  # (B, P, 2, 2)
    (x1, y1, x2, y2), turned = placed.flatten(2).unbind(2), flipped.unsqueeze(1)  # (B, P) each
    return torch.stack([torch.where(turned, size - x2, x1), y1,
                        torch.where(turned, size - x1, x2), y2], dim=2)


def jitter_boxes(boxes, size, strength=0.1, p=0.5):
    """Box jitter: x + r w, y + r h, w + r w, h + r h with probability p, each r drawn for itself
    from [-strength, strength]; what leaves the view is cut off.

    boxes: (..., 4), x1 y1 x2 y2 in the pixels of a view of ``size``; so the result.
    """
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    r = (2 * torch.rand_like(boxes) - 1) * strength
    r = r * (torch.rand_like(boxes[..., :1]) < p)
    moved, grown = corner + r[..., :2] * extent, extent + r[..., 2:] * extent
    return torch.cat([moved, moved + grown], dim=-1).clamp(0, size)


# ------------------------------------------------------------------------------------------ network


def mlp(c_in, hidden, c_out):
    """Projector and predictor: linear, batch norm, ReLU, linear; (N, c_in) -> (N, c_out)."""
    return nn.Sequential(nn.Linear(c_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, c_out))


class Network(nn.Module):
    """A Faster R-CNN up to its box head, and a projector: (B, 3, H, H), (B, P, 4) -> (BP, D).

    A box goes to the level of its size in the view, sqrt(w h): up to 48 pixels to P2, up to 96 to
    P3, up to 192 to P4, above to P5.
    """

    def __init__(self, arch, fpn_channels, hidden, dim):
        super().__init__()
        stages = resnet_stages(arch, nn.BatchNorm2d)
        self.backbone = BackboneWithFPN(stages, {f"layer{i + 1}": str(i) for i in range(4)},
                                        stages.channels, fpn_channels, norm_layer=nn.BatchNorm2d)
        self.pool = MultiScaleRoIAlign([*"0123"], 7, sampling_ratio=0, canonical_level=4,
                                       canonical_scale=96.001)  # P4 from just above 96
        self.pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]  # it would guess them from the views
        self.pool.map_levels = initLevelMapper(2, 5, self.pool.canonical_scale,
                                               self.pool.canonical_level)
        self.head = FastRCNNConvFCHead((fpn_channels, 7, 7), [fpn_channels] * 4, [1024],
                                       norm_layer=nn.BatchNorm2d)
        self.projector = mlp(1024, hidden, dim)

    def forward(self, images, boxes):
        pyramid = self.backbone(images)  # P2..P5, (B, C, H/s, W/s), s = 4, 8, 16, 32
        regions = self.pool(pyramid, list(boxes), [images.shape[2:]] * len(images))
        h = self.head(regions)  # (BP, C, 7, 7) -> (BP, 1024)
        return self.projector(h)


def similarity_loss(v, target):
    """-2 cos(v, v'), mean over the boxes: v and target (N, D), no gradient to the target.  Returns
    a float32 scalar, -2 at least."""
    return -2 * F.cosine_similarity(v.float(), target.detach().float(), dim=1).mean()


def spread(v):
    """What to watch for collapse, of v (N, D), as unit rows: the mean deviation of a coordinate, 0
    when all boxes are one and 1/sqrt(D) when they fill the sphere, and in how many directions they
    deviate, the participation ratio (sum of eigenvalues)^2 / sum of eigenvalues^2 of their
    covariance, 1 to D."""
    v = F.normalize(v, dim=1)
    centred = v - v.mean(0)
    with torch.autocast(v.device.type, enabled=False):
        covariance = centred.T @ centred / len(v)  # (D, D)
    directions = covariance.trace() ** 2 / (covariance ** 2).sum().clamp(min=1e-20)
    return dict(deviation=centred.pow(2).mean(0).sqrt().mean(), directions=directions)


class SoCo(nn.Module):
    """The two networks, and the loss between them."""

    def __init__(self, arch="resnet50", fpn_channels=256, hidden=4096, dim=256):
        super().__init__()
        self.online = Network(arch, fpn_channels, hidden, dim)
        self.predictor = mlp(dim, hidden, dim)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, views, boxes):
        """Views, each (B, 3, H, H), normalised, and the boxes in each, (B, P, 4) -> loss, and what
        to log.  The first view is set against each of the others, both ways."""
        v = [self.predictor(self.online(*seen)) for seen in zip(views, boxes)]  # (BP, D) each
        with torch.no_grad():
            target = [self.target(*seen) for seen in zip(views, boxes)]
        loss, parts = 0, {}
        for i in range(1, len(views)):
            there = similarity_loss(v[0], target[i])  # L
            back = similarity_loss(v[i], target[0])  # L~
            loss = loss + there + back
            parts[f"similarity_v{i + 1}"] = -(there + back).detach() / 4
        return loss, dict(parts, **spread(v[0].detach().float()))


def schedule(step, steps, warmup, m):
    """Factor of the lr (linear for ``warmup`` steps, then a cosine to 0) and momentum of the target
    (a cosine from m to 1) at a step of so many."""
    rest = (step - warmup) / max(1, steps - warmup)
    factor = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * rest)) / 2
    return factor, 1 - (1 - m) * (1 + math.cos(math.pi * step / steps)) / 2


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf), weight_decay=(0, inf),
          warmup=(0, inf), image_size=(32, inf), small_size=(32, inf), view4=(32, inf),
          crop_scale=(1e-3, 1), boxes_per_image=(1, inf), jitter=(0, 0.49), p_blur=(0, 1),
          fpn_channels=(1, inf), hidden=(1, inf), dim=(1, inf), momentum=(0, 1), scenes=(1, inf),
          workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    images = unlabelled(args.data, args.scenes)
    per_epoch = steps_per_epoch(images, args.batch_size)
    if args.batch_size < 2 * (world_size() if device.type == "cpu" else 1):
        raise InputError(f"batch size {args.batch_size}: batch norm needs two images a process")

    torch.manual_seed(args.seed)
    model = SoCo(args.arch, args.fpn_channels, args.hidden, args.dim)
    model = model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    base_lr, steps = args.lr * args.batch_size / 256, args.epochs * per_epoch
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], base_lr,
                     weight_decay=args.weight_decay)
    run = Run(args, "soco", images, steps, per_epoch, dict(model=model, optimizer=optimizer))

    data = Proposed(images, find_proposals(args, images))
    run.start_clock()
    loader = load_batches(data, partial(make_views, args=args), args.batch_size,
                          range(run.step, steps), args.seed, args.workers)
    mixed = mixed_precision(args, device)
    for step, (views, places, none) in zip(range(run.step, steps), loader):
        torch.manual_seed(seed_for(args.seed, step, rank()))
        pixels, boxes = [], []
        for i, view in enumerate(views):
            size = view.pixels.shape[-1]
            box = into_view(places, view.box, view.flipped, size)  # (B, P, 4)
            box = box if i else jitter_boxes(box, size, args.jitter)
            boxes.append(box.to(device, non_blocking=True))
            pixels.append(photometric(view.pixels.to(device, non_blocking=True),
                                      (0.4, 0.4, 0.2, 0.1), p_blur=args.p_blur[i > 0],
                                      p_solarize=0.2 * (i > 0)))
        factor, m = schedule(step, steps, args.warmup * per_epoch, args.momentum)
        optimizer.param_groups[0]["lr"] = base_lr * factor
        with mixed:
            loss, parts = ddp(pixels, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.online, model.target, m)
        run.end_step(loss, base_lr * factor, **parts, momentum=loss.new_full((), m),
                     whole_view=loss.new_full((), none.float().mean().item()))
    if rank() == 0:
        export_backbone(model.online.backbone.body, run.out / "backbone.pt")
        parts = {"backbone": model.online.backbone, "roi_heads.box_head": model.online.head}
        save_checkpoint(run.out / "detector.pt", **{
            f"{name}.{key}": value.detach().cpu().contiguous().clone()
            for name, part in parts.items() for key, value in part.state_dict().items()})
    run.say(f"{run.out / 'backbone.pt'} is the pre-trained ResNet, detector.pt beside it holds the "
            "FPN and the box head too")


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
