"""DUPR: Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors (Ding et al.,
TPAMI 2022, arXiv 2103.04814).

It contrasts whole images as MoCo v2 does, but at every stage of the backbone, and at the last two
it contrasts places as well: where two crops of an image overlap, each position of a feature map
must match the same place in the other crop, against positions of other images.  So the features
learn where things are.

Read first: moco_v2.py.  New here: four levels instead of one, the overlap of the two crops and its
way through crop, flip and RoI Align, and the queues of patches.

Symbols
    paper      code                     shape
    I_1, I_2   view_q, view_k           (B, 3, H, W)    two views of the same images
    R_1, R_2   box_q, box_k             (B, 4)          their rectangles in the image's pixels
    B          box                      (B, 4)          the intersection of the two
    B_1, B_2   roi                      (B, 4)          the same in each view's pixels
    S          roi_size                 4               side of a level's grid of positions
    v, r       q_i, k_i                 (B, D), (B, S*S, D)   a level's images; its positions
    K          queues                   6 x (K, D)      image levels first, then patch levels
    alpha, beta  alpha, beta            4               weights of Res2, Res3, Res4, Res5
    m, tau     i, tau                                   level (m in the code is MoCo's); temperature

Equations
    (1)  InfoNCE                                                  common.info_nce
    (2)  sum of alpha_m L_image + beta_m L_patch over levels      DUPR.forward
    (3), (4)  the rectangles and their intersection               intersect
    T_1, T_2 (3.2.1)  from the image into a view                  common.box_into_view
    (5), (6)  RoI Align, 1 x 1 convolutions, unit length          align, Encoder.forward
    (7)  L_patch, over all positions that overlap                 patch_loss
    (8)  L_image                                                  common.info_nce
    (9)  mean similarity of two regions, position by position     region_similarity

Commands (for a table add an --out)
    python dupr.py                                       built-in scenes, minutes on a CPU
    torchrun --nproc_per_node=8 dupr.py --data DIR                     recipe of the ablations
    torchrun --nproc_per_node=8 dupr.py --data DIR --rand-augment      of the main experiments
    torchrun dupr.py --data DIR --beta 0 0 0 0                         Table VII (b), first row
    torchrun dupr.py --data DIR --alpha 0 0 0 0 --beta 0 0 0 1         Table VII (c), second row
"""
import copy
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align
from torchvision.transforms import RandAugment

from common import (OPTIMIZERS, InputError, Queue, SplitBatchNorm, all_gather, batch_norm_groups,
                    box_into_view, contrast_statistics, cosine_schedule, encode_shuffled, info_nce,
                    mlp, momentum_update, rank, resnet_stages, world_size)
from plumbing.flags import (Parser, add_data_arguments, add_run_arguments, fit_recipe, parse_recipe,
                            real, whole)
from plumbing.images import Photos, augment_colour, open_images, two_views
from plumbing.run import Run, check_queue, distribute, launch, mixed_precision


class ColourAugment(RandAugment):
    """RandAugment with only those of its operations that leave every pixel in its place."""

    # Differs: no geometric operations, which would move what R_1 and R_2 record.
    # Paper silent: its strength and place.  These are torchvision's 2 operations at 9 of 30, before
    # the colours of MoCo v2; InfoMin's code, which Sec. 3.2.3 follows, has 2 at 10 of 10, each with
    # p 0.5, after jitter and blur and before grey.
    def _augmentation_space(self, *args):
        space = super()._augmentation_space(*args)
        return {name: range_ for name, range_ in space.items()
                if not name.startswith(("Shear", "Translate", "Rotate"))}


def cut_views(image, args):
    """The query's and the key's view: two independent crops of one image (3, H, W)."""
    augment = ColourAugment() if args.rand_augment else nn.Identity()
    views = two_views(image, args.image_size, (args.crop_scale, 1.0))
    return [view._replace(pixels=augment(view.pixels)) for view in views]


def intersect(box_q, box_k):
    """Eq. (4): the rectangle (B, 4) that two crops of one image share, and whether it has any area
    (B,) bool.  box_q, box_k: (B, 4), x1 y1 x2 y2 in the source image's pixels (Eq. 3)."""
    top_left = torch.maximum(box_q[:, :2], box_k[:, :2])  # (B, 2)
    bottom_right = torch.minimum(box_q[:, 2:], box_k[:, 2:])  # (B, 2)
    return torch.cat([top_left, bottom_right], dim=1), (bottom_right > top_left).all(dim=1)


def overlap(view_q, view_k):
    """Two batches of views -> for each view the shared rectangle in its pixels (B, 4) and its flip
    (B,), on its device; and which pairs share any area, (B,) bool on the CPU.

    Where they share none, the whole view takes the rectangle's place.
    """
    box, valid = intersect(view_q.box, view_k.box)
    places = []
    for view in (view_q, view_k):
        shared = torch.where(valid.unsqueeze(1), box, view.box)
        roi = box_into_view(shared, view.box, view.flipped, view.pixels.shape[-1])
        places.append([x.to(view.pixels.device, non_blocking=True) for x in (roi, view.flipped)])
    return *places, valid


def align(features, roi, flipped, roi_size, size):
    """RoI Align of one rectangle per image, mirrored back where the view is flipped.

    features: (B, C, h, w) of views of ``size`` pixels; roi: (B, 4) in these pixels.
    Returns (B, C, S, S), in which a position is the same place of the source image in both views.
    """
    # Paper silent: aligned=True shifts by half a pixel.  On CUDA its gradients are summed in no
    # fixed order, so a resumed run need not end bit for bit where an uninterrupted one does.
    index = torch.arange(len(roi), device=roi.device).unsqueeze(1)
    regions = roi_align(features, torch.cat([index, roi], dim=1), roi_size,
                        spatial_scale=features.shape[-1] / size, aligned=True)  # (B, C, S, S)
    return torch.where(flipped.view(-1, 1, 1, 1), regions.flip(3), regions)


def patch_head(c_in, hidden, dim):
    """The pixel-wise head of Sec. 3.2.1: (B, c_in, S, S) -> (B, dim, S, S)."""
    # Paper silent: two layers, as in MoCo v2's head; Sec. 3.2.1 has an MLP of "1x1 convolution"
    return nn.Sequential(nn.Conv2d(c_in, hidden, 1), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden, dim, 1))


class Encoder(nn.Module):
    """A ResNet with image heads and patch heads, each at some of its levels (0..3, Res2..Res5)."""

    def __init__(self, arch, dim, bn_groups, image_levels, patch_levels, roi_size):
        super().__init__()
        self.image_levels, self.patch_levels, self.roi_size = image_levels, patch_levels, roi_size
        norm = partial(SplitBatchNorm, groups=bn_groups)
        self.stages = resnet_stages(arch, norm, depth=max(image_levels + patch_levels) + 1)
        # Paper silent: the hidden layers of all heads are as wide as Res5 (2048 for ResNet-50)
        channels, hidden = self.stages.channels, self.stages.channels[-1]
        self.image_heads = nn.ModuleList(mlp(channels[i], [hidden, dim]) for i in image_levels)
        self.patch_heads = nn.ModuleList(patch_head(channels[i], hidden, dim)
                                         for i in patch_levels)

    def forward(self, images, roi, flipped):
        """Views (B, 3, H, H), the overlap in their pixels (B, 4), their flips (B,) -> a list: for
        each image level (B, D), then for each patch level (B, S*S, D); unit length."""
        stages, embeddings = self.stages(images), []
        for i, head in zip(self.image_levels, self.image_heads):
            v = head(stages[i].mean((2, 3)))
            embeddings.append(F.normalize(v.float(), dim=1))  # (B, D)
        for i, head in zip(self.patch_levels, self.patch_heads):
            r = head(align(stages[i], roi, flipped, self.roi_size[i], images.shape[-1]))
            embeddings.append(F.normalize(r.float(), dim=1).flatten(2).mT)  # (B, S*S, D)
        return embeddings


def patch_loss(q, k, negatives, tau, scale):
    """Eq. (7) of one level: InfoNCE of the positions q, k (N, D) of this process's valid pairs.

    scale: this process's number of valid pairs, divided by the mean number over processes; DDP's
    average of the losses is then the mean over the positions of all processes.
    """
    # Differs: a mean over positions, where Eq. (7) prints a sum, so that alpha and beta weigh
    # losses of like size
    return info_nce(q, k, negatives, tau) * scale


def region_similarity(q, k):
    """Eq. (9): q, k (B, C, S, S) -> mean cosine similarity over the positions, (B,)."""
    return F.cosine_similarity(q, k, dim=1).mean((1, 2))


def choose_keys(k, valid, patch_keys):
    """The keys to push: of k, (B, D) or (B, S*S, D) for each queue, all image keys, and this
    process's share of ``patch_keys`` drawn from the positions of all processes' valid pairs."""
    # Paper silent: which patch keys are sampled.  Here any, out of the global batch
    pairs, chosen = valid.nonzero(), []
    for keys in k:
        if keys.dim() == 3:
            positions = (pairs * keys.shape[1] + torch.arange(keys.shape[1])).flatten()
            drawn = positions[torch.randperm(len(positions))[:patch_keys]]
            if world_size() > 1:
                dist.broadcast(drawn, src=0)
            share = len(drawn) // world_size()
            mine = drawn[rank() * share:(rank() + 1) * share]
            keys = all_gather(keys).flatten(0, 1)[mine.to(keys.device, non_blocking=True)]
        chosen.append(keys)
    return chosen


class DUPR(nn.Module):
    """Eq. (2).  ``bn_groups``: batch norm groups in one process's batch; ``patch_keys``: how many
    all processes push per step.

    A level of weight 0 has no head and no queue; a stage that only it would need is not computed
    and stays as it was initialised.
    """

    # Differs: S is 14 on Res4 (conv4_x) and 7 on Res5 (conv5_x), as Sec. 4.5.3 explains; Sec. 3.2.3
    # says so once, and once the reverse.  Paper silent: S on Res2 and Res3; 14 here.
    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8,
                 alpha=(0.1, 0.4, 0.7, 1.0), beta=(0.0, 0.0, 1.0, 1.0), roi_size=(14, 14, 14, 7),
                 patch_keys=32):
        super().__init__()
        self.m, self.tau, self.patch_keys = m, tau, patch_keys
        image_levels = [i for i, weight in enumerate(alpha) if weight > 0]
        patch_levels = [i for i, weight in enumerate(beta) if weight > 0]
        self.losses = [("image", i, alpha[i]) for i in image_levels]
        self.losses += [("patch", i, beta[i]) for i in patch_levels]
        self.encoder_q = Encoder(arch, dim, bn_groups, image_levels, patch_levels, roi_size)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queues = nn.ModuleList(Queue(queue_size, dim) for _ in self.losses)

    def encode_keys(self, view_k, place_k, valid, patch_keys):
        """A list with the keys to push into each of ``queues``, and one with all of the batch's."""
        k = encode_shuffled(self.encoder_k, view_k.pixels, *place_k)  # without gradient
        return choose_keys(k, all_gather(valid), patch_keys), k

    def forward(self, view_q, view_k):
        """Two batches of Views: pixels (B, 3, H, H), normalised, on the device; box (B, 4) and
        flipped (B,) on the CPU -> loss, the keys to push after the update, what to log (accuracy,
        similarities and deviation of the deepest level of each kind, of patches about one position
        of each image)."""
        place_q, place_k, valid = overlap(view_q, view_k)
        q = self.encoder_q(view_q.pixels, *place_q)
        keys, k = self.encode_keys(view_k, place_k, valid, self.patch_keys)
        # valid is on the CPU, so that reading it does not wait for the device; it may be all False
        scale = float(valid.float().mean() / all_gather(valid).float().mean().clamp(min=1e-9))
        rows = valid.nonzero().flatten().to(view_q.pixels.device, non_blocking=True)
        loss, parts, watched = 0, {}, {}  # watched: the deepest level of each kind
        for (kind, i, weight), q_i, k_i, queue in zip(self.losses, q, k, self.queues):
            if kind == "image":
                term = info_nce(q_i, k_i, queue.keys, self.tau)  # Eq. (8)
                watched[kind] = q_i, k_i, queue.keys
            else:
                q_i, k_i = q_i[rows].flatten(0, 1), k_i[rows].flatten(0, 1)  # (N, D)
                term = patch_loss(q_i, k_i, queue.keys, self.tau, scale)  # Eq. (7)
                stride = self.encoder_q.roi_size[i] ** 2 + 1  # about one position of each image
                watched[kind] = q_i[::stride], k_i[::stride], queue.keys
            loss = loss + weight * term  # Eq. (2)
            parts[f"{kind}_res{i + 2}"] = term.detach()
        chance = loss.new_full((), math.log(len(queue.keys) + 1))
        for kind, deepest in watched.items():
            parts[f"{kind}_chance"] = chance
            parts.update({f"{n}_{kind}": v for n, v in contrast_statistics(*deepest).items()})
        weights = sum(weight for _, _, weight in self.losses)
        return loss, keys, dict(loss_chance=chance * weights, **parts)


def train(args, device):
    """Pre-train as ``args`` say; all results go into the folder of the run."""
    images = open_images(args.data, args.scenes)
    fit_recipe(args, len(images))
    if args.patch_keys % world_size():
        raise InputError(f"{args.patch_keys} patch keys cannot be split evenly over "
                         f"{world_size()} processes")
    check_queue(args.queue_size, max(args.batch_size, args.patch_keys if any(args.beta) else 0),
                args.momentum, len(images))
    groups = batch_norm_groups(args.bn_groups, args.batch_size)  # as in moco_v2.py
    torch.manual_seed(args.seed)
    model = DUPR(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups, args.alpha,
                 args.beta, args.roi_size, args.patch_keys)
    model, ddp = distribute(model, device)
    # Differs: LARS in the small recipe, as in moco_v2.py
    optimizer = OPTIMIZERS[args.optimizer](
        model.encoder_q.parameters(), args.lr * args.batch_size / 256, momentum=0.9,
        weight_decay=args.weight_decay)
    run = Run(args, "dupr", images, model=model, optimizer=optimizer)
    mixed = mixed_precision(args, device, args.image_size)  # Differs: as in moco_v2.py
    # Deterministic convolutions are slower, and of no use where RoI Align is not (see align)
    torch.backends.cudnn.deterministic = False

    def batches(steps=None):
        """(step, view_q, view_k), their pixels on the device, of all steps still to do or of
        ``steps``."""
        cut = partial(cut_views, args=args)
        photos = Photos(images, (args.image_size, args.crop_scale))
        for step, views in run.batches(photos, cut, steps):
            yield step, *(view._replace(pixels=augment_colour(
                view.pixels.to(device, non_blocking=True), p_blur=args.p_blur)) for view in views)

    def encode(view_q, view_k):
        _, place_k, valid = overlap(view_q, view_k)
        return model.encode_keys(view_k, place_k, valid, args.batch_size)[0]

    if not args.random_queue:  # Paper silent: as in moco_v2.py
        run.fill_queues(model.queues, batches, encode, mixed)

    for step, view_q, view_k in batches():
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps))
        with mixed:
            loss, keys, parts = ddp(view_q, view_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.encoder_q, model.encoder_k, model.m)
        for queue, k in zip(model.queues, keys):
            queue.push(k)
        run.end_step(loss, lr, **parts)
    run.finish(model.encoder_q.stages)


def parse_args(argv=None):
    """The recipe of the paper's ablations by default; without --data, a small one for scenes."""
    parser = Parser(description="Pre-train a ResNet with DUPR.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (section or table of DUPR)").add_argument
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=whole(1), default=200, help="passes over the images (Sec. 3.2.3)")
    add("--batch-size", type=whole(1), default=256, help="total over all processes (Sec. 3.2.3)")
    add("--lr", type=real(0), default=0.06, help="per 256 images of the batch (Sec. 3.2.3)")
    add("--optimizer", choices=[*OPTIMIZERS], default="sgd", help="default: sgd (MoCo, Sec. 4), "
        "in the small recipe lars, with --lr 2 and --weight-decay 1e-6")
    add("--weight-decay", type=real(0), default=1e-4, help="of all parameters (MoCo, Sec. 4)")
    add("--alpha", type=real(0), nargs=4, default=[0.1, 0.4, 0.7, 1.0], metavar="W",
        help="weights of the image losses of Res2..Res5 (Sec. 3.2.3)")
    add("--beta", type=real(0), nargs=4, default=[0.0, 0.0, 1.0, 1.0], metavar="W",
        help="weights of the patch losses of Res2..Res5 (Sec. 3.2.3)")
    add("--roi-size", type=whole(1), nargs=4, default=[14, 14, 14, 7], metavar="S",
        help="positions along a side of the overlap, at Res2..Res5 (Sec. 4.5.3)")
    add("--patch-keys", type=whole(1), default=32, help="pushed per step and level (Sec. 3.2.3)")
    add("--rand-augment", action="store_true", help="views and tau of the main experiments")
    add("--image-size", type=whole(8), default=224, help="side of a view in pixels")
    add("--crop-scale", type=real(1e-3, 1), default=0.2, help="smallest crop's share of the area")
    add("--p-blur", type=real(0, 1), default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=whole(1), default=128, help="D")
    add("--queue-size", type=whole(1), default=65536, help="K, number of negatives (Sec. 3.2.3)")
    add("--momentum", type=real(0, 1), default=0.999, help="m of encoder_k (MoCo, Sec. 3.2)")
    add("--tau", type=real(1e-3), default=0.2,
        help="temperature (default 0.2; with --rand-augment 0.15; Sec. 3.2.3)")
    add("--bn-groups", type=whole(1), default=8, help="batch norm groups in the total batch")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add_run_arguments(parser, out="runs/dupr")
    # Differs: views and tau are those of the ablations, unless --rand-augment asks for the main
    # experiments'
    if parser.parse_known_args(argv)[0].rand_augment:
        parser.set_defaults(tau=0.15)
    args = parse_recipe(
        parser, argv, small=dict(image_size=96, roi_size=[6, 6, 6, 3], optimizer="lars", lr=2.0,
                                 weight_decay=1e-6, crop_scale=0.4, p_blur=0.0),
        scenes=dict(image_size=64, roi_size=[4, 4, 4, 2], epochs=5))  # 4 minutes on two CPU cores
    if not any(args.alpha + args.beta):
        parser.error("--alpha, --beta: one weight must be more than 0")
    return args


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
