"""SoCo: Aligning Pretraining for Detection via Object-Level Contrastive Learning (Wei et al.,
NeurIPS 2021, arXiv 2106.02637).  "The talk": slides about the paper, the source used here; the
numbers of tables are the paper's.

Selective search finds boxes that may hold objects, without labels.  A detector's ResNet, feature
pyramid and box head learn the same embedding for a box in every view of its image, whatever its
scale, place and colours there.  There are no negatives: an online network predicts the embedding
that a slow copy of itself, the target network, has of the box in another view.

Read first: moco_v2.py, for the momentum update and the loop.  New here: boxes instead of images,
the detector's own parts in pre-training, a predictor in place of negatives, LARS.

Symbols
    talk            code              shape
    V1, V2, V3      views             3 x (B, 3, H, H)   the image; a crop of it; that made smaller
    b               boxes             3 x (B, P, 4)      the same places, in each view's pixels
    f^I, f^H        backbone, head                       ResNet and FPN; 4 convolutions, 1 linear
    h               h                 (BP, 1024)         a box, as the box head sees it
    g, q            projector, predictor                 1024 -> 4096 -> 256; 256 -> 4096 -> 256
    v; v', v''      v, v_target       (BP, D)            predicted; of the target network
    theta, xi       online, target                       the two networks
    K               boxes_per_image                      P here
    tau             m                                    momentum of the target network

Equations
    1/3 <= w/h <= 3, 0.3 <= sqrt(wh) / sqrt(WH) <= 0.8     selective_search.keep_object_like
    view construction; box jitter                          make_views, jitter_boxes
    h = f^H(RoIAlign(f^I(V), b)), scale-aware assignment   Network.forward
    L_i = -2 cos(v_i, v'_i) - 2 cos(v_i, v''_i)            similarity_loss, each of the two
    L_SoCo = L + L~                                        SoCo.forward
    xi <- m xi + (1 - m) theta                             common.momentum_update

Commands (Table 5 (c) and (d): --boxes-per-image 1 --proposals random; --momentum 0.98)
    python soco.py                                         built-in scenes, minutes on a CPU
    torchrun soco.py --data DIR --batch-size 256           one GPU
    torchrun --nproc_per_node=8 soco.py --data DIR --batch-size 1024         eight
    torchrun NODES soco.py --data DIR                      sixteen, the recipe (NODES: see README)
    torchrun NODES soco.py --data DIR --view4 --epochs 400                   SoCo*
    python finetune_fasterrcnn.py --weights runs/soco/detector.pt            all that was learned
"""
import copy
import math
import os
from argparse import BooleanOptionalAction
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.transforms.v2.functional import resize

from common import (LARS, InputError, PyramidRoIAlign, View, box_into_view, cosine_schedule,
                    mlp, momentum_update, rank, resnet_stages, world_size)
from plumbing.flags import (Parser, add_data_arguments, add_run_arguments, fit_recipe, parse_recipe,
                            real, whole)
from plumbing.images import Photos, as_view, augment_colour, open_images, random_resized_crop
from plumbing.run import Run, distribute, launch, mixed_precision
from plumbing.weights import save_tensors
from selective_search import read_proposals, search


def random_boxes(width, height, number=32):
    """Boxes (n, 4) anywhere in the image, sqrt(w h) and log(w / h) uniform between the bounds of
    ``keep_object_like``; those of ``number`` that fit into it."""
    # Paper silent: in the authors' code (random_generate_props) w / h is uniform, not its logarithm
    side = (0.3 + 0.5 * torch.rand(number)) * math.sqrt(width * height)
    root = 3 ** (torch.rand(number) - 0.5)  # sqrt(w / h)
    w, h = side * root, side / root
    left, top = torch.rand(2, number) * torch.stack([width - w, height - h])
    fits = (w <= width) & (h <= height)
    return torch.stack([left, top, left + w, top + h], dim=1)[fits]


class Proposed(Dataset):
    """Item i: all of an image as a View, as Photos(images, *crops) decodes it, and its proposals
    (n, 4) float, x1 y1 x2 y2 in the file's pixels.

    proposals: read_proposals of these images, or None: random_boxes, drawn anew every time.
    """

    def __init__(self, images, proposals, *crops):
        self.images, self.photos, self.boxes = images, Photos(images, *crops), None
        if proposals is not None:
            row = {name: i for i, name in enumerate(proposals["names"].tolist())}
            missing = [name for name in images.names if name not in row]
            if missing:
                raise InputError(f"no proposals for {len(missing)} of {len(images)} images, such "
                                 f"as {missing[0]}")
            rows = [row[name] for name in images.names]
            offsets = proposals["offsets"]
            self.start, self.end = offsets[rows], offsets[1:][rows]
            self.boxes, self.sizes = proposals["boxes"], proposals["sizes"][rows]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        i, photo = self.photos.numbered(index)
        size = photo.box[2:].int().tolist()
        if self.boxes is None:
            return photo, random_boxes(*size)
        boxes, reduction = self.boxes[self.start[i]:self.end[i]], size[0] // photo.pixels.shape[2]
        if (abs(self.sizes[i] - size) >= reduction).any():  # decoded smaller, it is rounded down
            raise InputError(f"the proposals of {self.images.names[i]} are of an image of another "
                             "size or orientation: delete their file, and search anew")
        return photo, torch.from_numpy(boxes).float()


def find_proposals(args, images):
    """What soco.py's --proposals names, searched for by the first process if need be; None for
    random boxes."""
    if args.proposals == "random":
        return None
    if args.proposals != "auto":
        return read_proposals(args.proposals)
    path, processes = Path(args.out) / "proposals.npz", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank() == 0:
        search(images, path, "single", 224, args.workers * processes, args.fresh)
    if world_size() > 1:  # the other processes wait for hours, if need be
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=30)))
    return read_proposals(path)


def choose_boxes(boxes, crop, size, number):
    """``number`` of the boxes (n, 4), drawn at random, cut to ``crop`` (4,); all x1 y1 x2 y2 in the
    source image's pixels.  size: side in pixels of the view that shows the crop.

    Returns (number, 4), and whether no box was left, so that the whole crop takes their place.
    """
    # Differs: a box is cut to V2, in V1 too (in the authors' code it is whole there), so that every
    # view shows the same of it.
    # Paper silent: below 8 pixels of V2 a side, a box is dropped.  Where fewer than P are left they
    # repeat; where none is left, all of V2 is the box.
    corners = boxes.unflatten(1, (2, 2)).clamp(crop[:2], crop[2:])  # (n, 2, 2)
    sides = (corners[:, 1] - corners[:, 0]) / (crop[2:] - crop[:2]) * size  # (n, 2)
    usable = corners[(sides >= 8).all(1)].flatten(1)
    no_box = len(usable) == 0
    usable = crop[None] if no_box else usable[torch.randperm(len(usable))]
    return usable[torch.arange(number) % len(usable)], no_box


def resize_view(view, size):
    """The view at size x size pixels, flipped once more with p 0.5."""
    flip = bool(torch.rand(()) < 0.5)
    pixels = resize(view.pixels, [size, size], antialias=True)
    return View(pixels.flip(-1) if flip else pixels, view.box, view.flipped != flip)


def make_views(item, args):
    """V1, V2, V3, with --view4 also V4, of an image and its boxes -> the Views, P boxes (P, 4) in
    the source image's pixels, and whether the crop takes their place."""
    image, boxes = item
    whole_image = as_view(image)
    # Differs: V2 is cut from the image, with 3/4 <= w/h <= 4/3 in its pixels, as by the authors'
    # code (transform_ops.RandomResizedCropParams); the talk crops V1, the image made square.
    # Differs: no cutout.  For 100 epochs (not for 400) the authors' code blanks, with p 0.5, a
    # square of 10 to 30% of each box's area in V2 and V3.
    crop = random_resized_crop(whole_image, args.image_size, (args.crop_scale, 1.0))
    # Differs: V3 is V2 made smaller, as the talk says, and so is V4, of which it only gives the
    # size; the authors' code crops V3 anew, and in SoCo* the view of 192, while that of 112 is V2
    # made smaller
    views = [resize_view(whole_image, args.image_size), crop, resize_view(crop, args.small_size)]
    if args.view4:
        views.append(resize_view(crop, args.view4))
    return views, *choose_boxes(boxes, crop.box, args.image_size, args.boxes_per_image)


def jitter_boxes(boxes, size, strength=0.1, p=0.5):
    """Box jitter: x + r w, y + r h, w + r w, h + r h with probability p; r is drawn for each of the
    four from [-strength, strength].  What leaves the view is cut off.

    boxes: (..., 4), x1 y1 x2 y2 in the pixels of a view of ``size``; so the result.
    """
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    r = (2 * torch.rand_like(boxes) - 1) * strength
    r = r * (torch.rand_like(boxes[..., :1]) < p)
    moved, grown = corner + r[..., :2] * extent, extent + r[..., 2:] * extent
    return torch.cat([moved, moved + grown], dim=-1).clamp(0, size)


class Network(nn.Module):
    """A Faster R-CNN up to its box head, and a projector: (B, 3, H, H), (B, P, 4) -> (BP, D).

    A box goes to the level of its size in the view, sqrt(w h): up to 48 pixels to P2, up to 96 to
    P3, up to 192 to P4, above to P5.
    """

    # Differs: the authors' code pools each box from all four levels, runs head, projector and
    # predictor on all of these, and keeps one (SoCo_FPN.py).  Their batch norm then sees four times
    # the rows, three quarters of them of boxes too large or too small for their level.  On scenes
    # the embeddings fall to few directions at first in either way (RESULTS.md).
    # In the small recipe's views of 64 pixels no box is of P4 or P5, whose last convolutions get no
    # gradient: LARS shrinks their weights step by step (see there), which has no effect, as a batch
    # norm follows.
    def __init__(self, arch, fpn_channels, hidden, dim, zero_init_residual=True):
        super().__init__()
        stages = resnet_stages(arch, zero_init_residual=zero_init_residual)
        self.backbone = BackboneWithFPN(stages, {f"layer{i + 1}": str(i) for i in range(4)},
                                        stages.channels, fpn_channels, norm_layer=nn.BatchNorm2d)
        self.pool = PyramidRoIAlign(7, (4, 8, 16, 32), 96.001)  # P4 from just above 96 pixels
        self.head = FastRCNNConvFCHead((fpn_channels, 7, 7), [fpn_channels] * 4, [1024],
                                       norm_layer=nn.BatchNorm2d)
        self.projector = mlp(1024, [hidden, dim], norm_layer=nn.BatchNorm1d)

    def forward(self, images, boxes):
        pyramid = self.backbone(images)  # P2..P5, (B, C, H/s, W/s), s = 4, 8, 16, 32
        # Paper silent: on CUDA RoI Align adds up its gradients in no fixed order, so a resumed run
        # need not end bit for bit where an uninterrupted one does
        regions = self.pool(pyramid, boxes)  # (BP, C, 7, 7)
        h = self.head(regions)  # (BP, 1024)
        return self.projector(h)


def similarity_loss(v, v_target):
    """-2 cos(v, v'), mean over the boxes: v and v_target (N, D), the latter without gradient.
    Returns a float32 scalar from -2 to 2."""
    return -2 * F.cosine_similarity(v.float(), v_target.detach().float(), dim=1).mean()


def collapse_statistics(v):
    """What to watch for collapse, of embeddings v (N, D), taken as unit rows.

    deviation: the mean standard deviation of a coordinate, 0 when all rows are equal and 1/sqrt(D)
    when they fill the sphere; directions: in how many the rows deviate, 1 to D (0 when they are
    equal), as the participation ratio (sum of eigenvalues)^2 / sum of eigenvalues^2 of their
    covariance.
    """
    v = F.normalize(v, dim=1)
    centred = v - v.mean(0)
    with torch.autocast(v.device.type, enabled=False):
        covariance = centred.T @ centred / len(v)  # (D, D)
    directions = covariance.trace() ** 2 / (covariance ** 2).sum().clamp(min=1e-20)
    return dict(deviation=centred.pow(2).mean(0).sqrt().mean(), directions=directions)


class SoCo(nn.Module):
    """The two networks, and the loss between them."""

    def __init__(self, arch="resnet50", fpn_channels=256, hidden=4096, dim=256,
                 zero_init_residual=True):
        super().__init__()
        self.online = Network(arch, fpn_channels, hidden, dim, zero_init_residual)
        self.predictor = mlp(dim, [hidden, dim], norm_layer=nn.BatchNorm1d)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, views, boxes):
        """Views, each (B, 3, H, H), normalised, and the boxes in each, (B, P, 4) -> loss, and what
        to log.  The first view is set against each of the others, both ways."""
        v = [self.predictor(self.online(*seen)) for seen in zip(views, boxes)]  # (BP, D) each
        with torch.no_grad():
            v_target = [self.target(*seen) for seen in zip(views, boxes)]
        loss, parts = 0, {}
        for i in range(1, len(views)):
            forth = similarity_loss(v[0], v_target[i])  # L
            back = similarity_loss(v[i], v_target[0])  # L~
            loss = loss + forth + back
            parts[f"similarity_v{i + 1}"] = -(forth + back).detach() / 4  # mean cosine
        return loss, dict(parts, **collapse_statistics(v[0].detach().float()))


def train(args, device):
    """Pre-train as ``args`` say; all results go into the folder of the run."""
    images = open_images(args.data, args.scenes)
    fit_recipe(args, len(images))
    torch.manual_seed(args.seed)
    model = SoCo(args.arch, args.fpn_channels, args.hidden, args.dim, args.zero_init_residual)
    model, ddp = distribute(model, device, sync_batch_norm=True)
    optimizer = LARS([p for p in model.parameters() if p.requires_grad],
                     args.lr * args.batch_size / 256, weight_decay=args.weight_decay)
    run = Run(args, "soco", images, model=model, optimizer=optimizer)
    data = Proposed(images, find_proposals(args, images), (args.image_size, args.crop_scale))
    run.start_clock()
    # Differs: bfloat16 on GPUs, float16 in the authors' code; the loss is float32
    mixed = mixed_precision(args, device)
    # Deterministic convolutions are slower, and of no use where RoI Align is not (see Network)
    torch.backends.cudnn.deterministic = False

    def batches():
        """(step, pixels, boxes, no_box): lists of (B, 3, H, H) and (B, P, 4), one of each view, on
        the device; and which images have no usable box, (B,) bool."""
        for step, (views, places, no_box) in run.batches(data, partial(make_views, args=args)):
            pixels, boxes = [], []
            for i, view in enumerate(views):
                size = view.pixels.shape[-1]
                box = box_into_view(places, view.box, view.flipped, size)  # (B, P, 4)
                # Paper silent: jitter moves the boxes of V1 only, as in the authors' code
                box = jitter_boxes(box, size, args.jitter) if i == 0 else box
                boxes.append(box.to(device, non_blocking=True))
                p_blur, p_solarize = (args.p_blur[0], 0.0) if i == 0 else (args.p_blur[1], 0.2)
                pixels.append(augment_colour(view.pixels.to(device, non_blocking=True),
                                             (0.4, 0.4, 0.2, 0.1), p_blur=p_blur,
                                             p_solarize=p_solarize))
            yield step, pixels, boxes, no_box

    warmup = args.warmup * run.steps_per_epoch
    for step, pixels, boxes, no_box in batches():
        # Paper silent: the warm-up starts at a hundredth of the rate, as in the authors' code
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps, warmup, start=0.01))
        # Paper silent: m rises to 1 by a cosine, as in the authors' code; the talk gives its start
        m = 1 - (1 - args.momentum) * cosine_schedule(step, run.steps)
        with mixed:
            loss, parts = ddp(pixels, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.online, model.target, m)
        run.end_step(loss, lr, **parts, momentum=loss.new_full((), m),
                     no_box=loss.new_full((), no_box.float().mean().item()))
    if rank() == 0:
        modules = {"backbone": model.online.backbone, "roi_heads.box_head": model.online.head}
        save_tensors({f"{name}.{key}": value for name, module in modules.items()
                      for key, value in module.state_dict().items()}, run.out / "detector.pt")
    run.finish(model.online.backbone.body, "the pre-trained ResNet, detector.pt beside it holds "
               "the FPN and the box head too")


def parse_args(argv=None):
    """The recipe of the authors' public configuration by default; without --data, a small one for
    the built-in scenes."""
    parser = Parser(description="Pre-train a detector's ResNet, FPN and box head with SoCo.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (table of the paper)").add_argument
    # Differs: auto is selective_search.py's single strategy at 224 pixels; the authors' was one
    # segmentation too, k = 300, sigma 0.9, regions of at least 100 pixels, at full size
    add("--proposals", default="auto", metavar="FILE", help="selective_search.py's, or random, or "
        "auto (default): search, and keep the boxes in the folder of the run (Table 5 c)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    # Differs: not in the small recipe, where all methods start alike (RESULTS.md)
    add("--zero-init-residual", action=BooleanOptionalAction, default=True, help="residual blocks "
        "start as the identity (the authors' code); not in the small recipe")
    add("--epochs", type=whole(1), default=100, help="passes over the images (Table 1)")
    add("--batch-size", type=whole(2), default=2048, help="total over all processes (Table 5 b)")
    add("--lr", type=real(0), default=1.0, help="per 256 images of the batch")
    add("--weight-decay", type=real(0), default=1e-5, help="none on biases and batch norm")
    add("--warmup", type=whole(0), default=10, help="epochs of linear growth of the lr")
    add("--image-size", type=whole(32), default=224, help="side of V1 and V2 in pixels")
    add("--small-size", type=whole(32), default=112, help="side of V3 (Table 5 a)")
    add("--view4", type=whole(32), nargs="?", const=192, metavar="SIDE", help="V4 of SoCo* (192)")
    add("--crop-scale", type=real(1e-3, 1), default=0.5, help="smallest V2's share of the area")
    add("--boxes-per-image", type=whole(1), default=4, help="P (Table 5 c)")
    add("--jitter", type=real(0, 0.49), default=0.1, help="greatest r; half of V1's boxes move")
    add("--p-blur", type=real(0, 1), nargs=2, default=[1.0, 0.1], metavar="P",
        help="chance of a blur, of V1 and of the others")
    add("--fpn-channels", type=whole(1), default=256, help="C of the feature pyramid")
    add("--hidden", type=whole(1), default=4096, help="width of projector and predictor")
    add("--dim", type=whole(1), default=256, help="D")
    add("--momentum", type=real(0, 1), default=0.99,
        help="m at the start, 1 at the end (Table 5 d)")
    add_run_arguments(parser, out="runs/soco")
    return parse_recipe(
        parser, argv, small=dict(zero_init_residual=False, image_size=64, small_size=32, lr=4.0,
                                 p_blur=[0.0, 0.0], fpn_channels=64, hidden=512, dim=128),
        scenes=dict(epochs=3))


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
