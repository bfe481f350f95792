"""DUPR: Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors (Ding et al.,
TPAMI 2022, arXiv 2103.04814).

Beside the contrast of whole images, at every stage of the backbone, one of places, at the last two:
where two crops of an image overlap, a position of the feature map must be recognised as the same in
the other crop's, among positions of other images.  Features so come to tell where things are.

Read first: moco_v2.py.  New here: four levels instead of one, the overlap of the two crops and its
way through crop, flip and RoI Align, and the queues of patches.

Symbols
    paper      code                     shape
    I_1, I_2   view_q, view_k           (B, 3, H, W)    two views of the same images
    R_1, R_2   box_q, box_k             (B, 4)          their rectangles in the image's pixels
    B          box                      (B, 4)          what the two have in common
    B_1, B_2   roi                      (B, 4)          the same in each view's pixels
    S          roi_size                 4               side of a level's grid of positions
    v, r       q_i, k_i                 (B, D), (B, S*S, D)   a level's images; its positions
    K          queues                   6 x (K, D)      image levels first, then patch levels
    alpha, beta  alpha, beta            4               weights of Res2, Res3, Res4, Res5
    m, tau     m, tau                                   momentum of encoder_k; temperature

Equations
    (1)  InfoNCE                                                  common.info_nce
    (2)  sum of alpha_m L_image + beta_m L_patch over levels      DUPR.forward
    (3), (4)  the rectangles and their intersection               intersect
    T_1, T_2 (3.2.1)  from the image into a view                  into_view
    (5), (6)  RoI Align, 1 x 1 convolutions, unit length          align, Encoder.forward
    (7), (8)  L_patch, over all positions that overlap; L_image   DUPR.forward
    (9)  mean similarity of two regions, position by position     region_similarity

Commands
    python dupr.py                                       built-in scenes, minutes on a CPU
    torchrun dupr.py --data DIR                          one GPU, the recipe of the ablations
    torchrun --nproc_per_node=8 dupr.py --data DIR --rand-augment      eight, the main experiments'
    torchrun dupr.py --data DIR --beta 0 0 0 0                         Table VII (b), first row
    torchrun dupr.py --data DIR --alpha 0 0 0 0 --beta 0 0 0 1         Table VII (c), second row

Weights of one encoder with ResNet-50, of which only the ResNet's are exported
    ResNet              23,508,032
    image heads          8,921,600      C_m -> 2048 -> 128 with C_m = 256, 512, 1024, 2048
    patch heads          6,820,096      C_m -> 2048 -> 128 with C_m = 1024, 2048

Where this differs from the paper, or the paper is silent
    - S is 14 on conv4_x (Res4) and 7 on conv5_x (Res5): 3.2.3 says so once, once the reverse, and
      4.5.3 why.  For Res2 and Res3, which have a loss in Table VII (b), none is printed: 14 here.
    - Eq. (7) is printed as a sum over positions.  It is the mean here, over all positions of all
      overlapping pairs of all processes, so that alpha and beta weigh losses of like size.
    - Of a step's patch keys, 32 drawn from all valid positions of the global batch are pushed, so
      that a patch queue is renewed in eight times as many steps as the images'.
    - Settings are those of the ablations, with MoCo v2's views and tau 0.2.  --rand-augment adds
      torchvision's RandAugment and sets tau to 0.15, but draws operations on colour alone: a
      geometric one would move what R_1 and R_2 record.  It takes two at 0.3 of their range (9 of
      30); in the public code of InfoMin, which 3.2.3 follows, both have the full range and p 0.5.
    - RoI Align has the half-pixel shift (aligned=True).  On CUDA its gradients are summed in no
      fixed order, so that a resumed run need not end where an uninterrupted one does, bit for bit.
    - A head's hidden layer is as wide as Res5 (2048), at all levels.
    - A level of weight 0 has no head and no queue, and a stage that only it would need is not
      computed: backbone.pt then has it as it was initialised.
    - As in moco_v2.py: batch norm sees groups of batch / 8 images on one process as on eight;
      queues start full of real keys (at S = 1 not quite); cosine by step; bfloat16.
"""
import argparse
import copy
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import roi_align
from torchvision.transforms import RandAugment

from common import (InputError, Queue, Run, SplitBatchNorm, add_run_arguments, all_gather,
                    batch_norm_groups, check, check_queue, contrast_statistics, export_backbone,
                    info_nce, launch, load_batches, mixed_precision, mlp, momentum_update,
                    photometric, random_resized_crop, rank, resnet_stages, seed_for, shuffled,
                    steps_per_epoch, unlabelled, world_size)


def parse_args(argv=None):
    """The recipe of the paper's ablations by default; without --data, a small one for scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a ResNet with DUPR.")
    add = parser.add_argument_group("recipe (section or table of DUPR)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=int, default=200, help="passes over the images (3.2.3)")
    add("--batch-size", type=int, default=256, help="of all processes together (3.2.3)")
    add("--lr", type=float, default=0.06, help="for each 256 images of the batch (3.2.3)")
    add("--weight-decay", type=float, default=1e-4, help="of all parameters (MoCo 4)")
    add("--alpha", type=float, nargs=4, default=[0.1, 0.4, 0.7, 1.0], metavar="W",
        help="weights of the image losses of Res2..Res5 (3.2.3)")
    add("--beta", type=float, nargs=4, default=[0.0, 0.0, 1.0, 1.0], metavar="W",
        help="weights of the patch losses of Res2..Res5 (3.2.3)")
    add("--roi-size", type=int, nargs=4, default=[14, 14, 14, 7], metavar="S",
        help="positions along a side of the overlap, at Res2..Res5 (4.5.3)")
    add("--patch-keys", type=int, default=32, help="pushed of a step, each level (3.2.3)")
    add("--rand-augment", action="store_true", help="the main experiments' views and tau (3.2.3)")
    add("--image-size", type=int, default=224, help="side of a view in pixels")
    add("--crop-scale", type=float, default=0.2, help="least share of the image in a view")
    add("--p-blur", type=float, default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=int, default=128, help="D")
    add("--queue-size", type=int, default=65536, help="K, the number of negatives (3.2.3)")
    add("--momentum", type=float, default=0.999, help="m, of the key encoder (MoCo 3.2)")
    add("--tau", type=float, default=0.2, help="temperature (3.2.3)")
    add("--bn-groups", type=int, default=8, help="parts of the batch that batch norm sees apart")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add_run_arguments(parser, out="runs/dupr")
    given = parser.parse_known_args(argv)[0]
    if given.rand_augment:
        parser.set_defaults(tau=0.15)
    if given.data is None:  # 4 minutes on two CPU cores
        parser.set_defaults(arch="resnet18", image_size=64, roi_size=[4, 4, 4, 2], epochs=5,
                            batch_size=64, queue_size=256, momentum=0.99, bn_groups=4,
                            crop_scale=0.4, p_blur=0.0)
    return parser.parse_args(argv)


class ColourAugment(RandAugment):
    """RandAugment with those of its operations that leave every pixel in its place."""

    def _augmentation_space(self, *args):
        space = super()._augmentation_space(*args)
        return {name: range_ for name, range_ in space.items()
                if not name.startswith(("Shear", "Translate", "Rotate"))}


def two_views(image, args):
    """The query's and the key's view: two independent crops of one image (3, H, W)."""
    drawn = [random_resized_crop(image, args.image_size, (args.crop_scale, 1.0)) for _ in "qk"]
    augment = ColourAugment() if args.rand_augment else nn.Identity()
    return [view._replace(pixels=augment(view.pixels)) for view in drawn]


def intersect(box_q, box_k):
    """Eq. (4): the rectangle (B, 4) that two crops of one image share, and whether it has any area
    (B,) bool.  box_q, box_k: (B, 4), x1 y1 x2 y2 in the source image's pixels."""
    top_left = torch.maximum(box_q[:, :2], box_k[:, :2])  # (B, 2)
    bottom_right = torch.minimum(box_q[:, 2:], box_k[:, 2:])  # (B, 2)
    return torch.cat([top_left, bottom_right], dim=1), (bottom_right > top_left).all(dim=1)


def into_view(box, view_box, flipped, size):
    """T of 3.2.1: rectangles of the source image in the pixels of the view that shows view_box.

    box, view_box: (B, 4), x1 y1 x2 y2 in the source image's pixels; flipped: (B,) bool, left and
    right of the view exchanged; size: side of the view, in pixels.  Returns (B, 4), x1 < x2.
    """
    corner, extent = view_box[:, :2], view_box[:, 2:] - view_box[:, :2]  # (B, 2) each
    placed = (box.unflatten(1, (2, 2)) - corner[:, None]) / extent[:, None] * size  # (B, 2, 2)
    x1, y1, x2, y2 = placed.flatten(1).unbind(1)
    return torch.stack([torch.where(flipped, size - x2, x1), y1,
                        torch.where(flipped, size - x1, x2), y2], dim=1)


def overlap(view_q, view_k):
    """What two batches of views share of their images: for each view the rectangle in its pixels
    (B, 4) and its flip (B,), on its device; and which pairs share any, (B,) bool on the CPU.  Where
    they share none, the whole view stands in for the rectangle."""
    box, valid = intersect(view_q.box, view_k.box)
    where = []
    for view in (view_q, view_k):
        shared = torch.where(valid.unsqueeze(1), box, view.box)
        roi = into_view(shared, view.box, view.flipped, view.pixels.shape[-1])
        where.append((roi.to(view.pixels.device), view.flipped.to(view.pixels.device)))
    return *where, valid


def align(features, roi, flipped, roi_size, size):
    """RoI Align of one rectangle an image, left and right exchanged back where the view's are.
    features: (B, C, h, w) of views of ``size`` pixels; roi: (B, 4) in these pixels.
    Returns (B, C, S, S): a position is the same place of the source image in both views."""
    number = torch.arange(len(roi), device=roi.device).unsqueeze(1)
    regions = roi_align(features, torch.cat([number, roi], dim=1), roi_size,
                        spatial_scale=features.shape[-1] / size, aligned=True)  # (B, C, S, S)
    return torch.where(flipped.view(-1, 1, 1, 1), regions.flip(3), regions)


def region_similarity(q, k):
    """Eq. (9): q, k (B, C, S, S) -> mean cosine similarity over the positions, (B,)."""
    return F.cosine_similarity(q, k, dim=1).mean((1, 2))


def patch_mlp(c_in, hidden, c_out):
    """The pixel-wise head of 3.2.1: (B, c_in, S, S) -> (B, c_out, S, S)."""
    return nn.Sequential(nn.Conv2d(c_in, hidden, 1), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden, c_out, 1))


class Encoder(nn.Module):
    """A ResNet with image heads and patch heads, each at some of its levels (0..3, Res2..Res5)."""

    def __init__(self, arch, dim, bn_groups, image_levels, patch_levels, roi_size):
        super().__init__()
        self.image_levels, self.patch_levels, self.roi_size = image_levels, patch_levels, roi_size
        norm = partial(SplitBatchNorm, groups=bn_groups)
        self.stages = resnet_stages(arch, norm, depth=max(image_levels + patch_levels) + 1)
        channels, hidden = self.stages.channels, self.stages.channels[-1]
        self.image_heads = nn.ModuleList(mlp(channels[i], hidden, dim) for i in image_levels)
        self.patch_heads = nn.ModuleList(patch_mlp(channels[i], hidden, dim) for i in patch_levels)

    def forward(self, images, roi, flipped):
        """Views (B, 3, H, H), the overlap in their pixels (B, 4), their flips (B,) -> a list: for
        each image level (B, D), then for each patch level (B, S*S, D); unit length."""
        stages, embedded = self.stages(images), []
        for i, head in zip(self.image_levels, self.image_heads):
            v = head(stages[i].mean((2, 3)))
            embedded.append(F.normalize(v.float(), dim=1))  # (B, D)
        for i, head in zip(self.patch_levels, self.patch_heads):
            r = head(align(stages[i], roi, flipped, self.roi_size[i], images.shape[-1]))
            embedded.append(F.normalize(r.float(), dim=1).flatten(2).mT)  # (B, S*S, D)
        return embedded


class DUPR(nn.Module):
    """Eq. (2).  ``bn_groups`` are those of one process, ``patch_keys`` of all together."""

    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8,
                 alpha=(0.1, 0.4, 0.7, 1.0), beta=(0.0, 0.0, 1.0, 1.0), roi_size=(14, 14, 14, 7),
                 patch_keys=32):
        super().__init__()
        self.m, self.tau, self.patch_keys = m, tau, patch_keys
        levels = [[i for i, w in enumerate(weights) if w > 0] for weights in (alpha, beta)]
        self.losses = [("image", i, alpha[i]) for i in levels[0]]
        self.losses += [("patch", i, beta[i]) for i in levels[1]]
        self.encoder_q = Encoder(arch, dim, bn_groups, *levels, roi_size)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queues = nn.ModuleList(Queue(queue_size, dim) for _ in self.losses)

    def chosen(self, k, valid, number):
        """Of the keys k, (B, D) or (B, S*S, D) for each queue, those to push: all image keys, and
        this process's share of ``number`` patch keys of all processes' pairs that are ``valid``."""
        pairs, keys = valid.nonzero(), []
        for each in k:
            if each.dim() == 3:
                positions = (pairs * each.shape[1] + torch.arange(each.shape[1])).flatten()
                drawn = positions[torch.randperm(len(positions))[:number]]
                if world_size() > 1:
                    dist.broadcast(drawn, src=0)
                share = len(drawn) // world_size()
                mine = drawn[rank() * share:(rank() + 1) * share]
                each = all_gather(each).flatten(0, 1)[mine.to(each.device)]
            keys.append(each)
        return keys

    def forward(self, view_q, view_k):
        """Views, of which the pixels (B, 3, H, H) are normalised -> loss, the keys to push after
        the update, what to log."""
        where_q, where_k, valid = overlap(view_q, view_k)
        q = self.encoder_q(view_q.pixels, *where_q)
        k = shuffled(self.encoder_k, view_k.pixels, *where_k)  # without gradient
        valid_of_all = all_gather(valid)
        keys = self.chosen(k, valid_of_all, self.patch_keys)
        # own means, so scaled, average over processes (as DDP does) to the mean over all pairs
        share = float(valid.float().mean() / valid_of_all.float().mean().clamp(min=1e-9))
        rows = valid.nonzero().flatten().to(view_q.pixels.device)
        loss, parts, watched = 0, {}, {}
        for (kind, i, weight), q_i, k_i, queue in zip(self.losses, q, k, self.queues):
            scale, stride = 1, 1
            if kind == "patch":
                q_i, k_i = q_i[rows].flatten(0, 1), k_i[rows].flatten(0, 1)  # (N, D)
                scale, stride = share, self.encoder_q.roi_size[i] ** 2 + 1  # one of most images
            term = info_nce(q_i, k_i, queue.keys, self.tau) * scale  # Eq. (8), Eq. (7)
            loss = loss + weight * term  # Eq. (2)
            parts[f"{kind}_res{i + 2}"] = term.detach()
            watched[kind] = q_i[::stride], k_i[::stride], queue.keys
        chance = loss.new_full((), math.log(len(queue.keys) + 1))
        for kind, last in watched.items():
            parts[f"{kind}_chance"] = chance
            parts.update({f"{n}_{kind}": v for n, v in contrast_statistics(*last).items()})
        whole = chance * sum(weight for _, _, weight in self.losses)
        return loss, keys, dict(loss_chance=whole, **parts)


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf), weight_decay=(0, inf),
          alpha=(0, inf), beta=(0, inf), roi_size=(1, inf), patch_keys=(1, inf),
          image_size=(8, inf), crop_scale=(1e-3, 1), p_blur=(0, 1), dim=(1, inf), tau=(1e-3, inf),
          queue_size=(1, inf), momentum=(0, 1), bn_groups=(1, inf), scenes=(1, inf),
          workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    if not any(args.alpha + args.beta):
        raise InputError("--alpha, --beta: one weight must be more than 0")
    if args.patch_keys % world_size():
        raise InputError(f"{args.patch_keys} patch keys for {world_size()} processes")
    images = unlabelled(args.data, args.scenes)
    groups = batch_norm_groups(args.bn_groups, args.batch_size)
    per_epoch = steps_per_epoch(images, args.batch_size)
    check_queue(args.queue_size, max(args.batch_size, args.patch_keys if any(args.beta) else 0),
                args.momentum, len(images))

    torch.manual_seed(args.seed)
    model = DUPR(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups, args.alpha,
                 args.beta, args.roi_size, args.patch_keys)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    base_lr, steps = args.lr * args.batch_size / 256, args.epochs * per_epoch
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), base_lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    run = Run(args, "dupr", images, steps, per_epoch, dict(model=model, optimizer=optimizer))

    def batches(steps):
        """(step, view_q, view_k), the pixels on the device, coloured from (seed, step, rank)."""
        loader = load_batches(images, partial(two_views, args=args), args.batch_size, steps,
                              args.seed, args.workers)
        for step, views in zip(steps, loader):
            torch.manual_seed(seed_for(args.seed, step, rank()))
            yield step, *(view._replace(pixels=photometric(
                view.pixels.to(device, non_blocking=True), p_blur=args.p_blur)) for view in views)

    mixed = mixed_precision(args, device, args.image_size)
    if run.step == 0 and not args.random_queue:  # with views of epochs that are never trained on
        run.say(f"filling the queues with {args.queue_size} keys each")
        fill = range(steps, steps - (-args.queue_size // args.batch_size))
        for _, view_q, view_k in batches(fill):
            _, where_k, valid = overlap(view_q, view_k)
            with mixed:
                k = shuffled(model.encoder_k, view_k.pixels, *where_k)
            keys = model.chosen(k, all_gather(valid), args.batch_size)
            for queue, k in zip(model.queues, keys):
                queue.push(k)
            run.stop_if_asked()
        run.start_clock()

    for step, view_q, view_k in batches(range(run.step, steps)):
        lr = base_lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr
        with mixed:
            loss, keys, parts = ddp(view_q, view_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.encoder_q, model.encoder_k, model.m)
        for queue, k in zip(model.queues, keys):
            queue.push(k)
        run.end_step(loss, lr, **parts)
    if rank() == 0:
        export_backbone(model.encoder_q.stages, run.out / "backbone.pt")
    run.say(f"{run.out / 'backbone.pt'} is the pre-trained ResNet")


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
