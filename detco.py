"""DetCo: Unsupervised Contrastive Learning for Object Detection (Xie et al., ICCV 2021,
arXiv 2102.04803).

MoCo v2 at every stage of the backbone, so that shallow features learn to tell images apart as well;
and, beside each global view, a local view cut into nine patches, whose joint embedding must match
the key of another such set of patches and the key of a global view of the same image.

Read first: moco_v2.py.  New here: four levels instead of one, the nine patches and their heads, and
so eight queues and three losses per level.

Symbols
    paper      code                     shape
    I_q, I_k   view_q, view_k           (B, 3, H, W)        two global views of the same images
    P_q, P_k   patches_q, patches_k     (B, 9, 3, h, w)     two local views, each as nine patches
    q^g, k^g   q_g, k_g                 4 x (B, D)          global embeddings, one per level
    q^l, k^l   q_l, k_l                 4 x (B, D)          local embeddings, each of nine patches
    queue_i    queues                   8 x (K, D)          global levels first, then local ones
    w          weights                  4                   of Res2, Res3, Res4, Res5
    m, tau     m, tau                                       momentum of encoder_k; temperature

Equations
    (1)  sum over levels of w_i (L_gg + L_ll + L_gl)              DetCo.forward
    (2)  L_gg: global query, global key, global queue             level_losses
    (3)  sum over levels of w_i L_gg                              DetCo.forward without patches
    (4)  L_gl: local query, global key, global queue              level_losses
    (5)  L_ll: local query, local key, local queue                level_losses
    Section 3.3, the local view                                   local_view, cut_patches
    Algorithm 1 (Eq. 3 alone)                                     DetCo.forward, the loop of train

Commands (for Tables 15 and 16 add --epochs 100, and an --out; 15 (a) is moco_v2.py --lr 0.06)
    python detco.py                                      built-in scenes, minutes on a CPU
    torchrun --nproc_per_node=8 detco.py --data DIR      eight GPUs, the paper's recipe
    torchrun detco.py --data DIR --rand-augment                            DetCo+AA
    torchrun detco.py --data DIR --no-local --weights 0 0 0 1              Table 15 (a)
    torchrun detco.py --data DIR --no-local --weights 1 1 1 1 --normalise-weights          (b)
    torchrun detco.py --data DIR --no-local --weights 1 1 1 1              Table 15 (c)
    torchrun detco.py --data DIR --no-local --normalise-weights            Table 15 (d)
    torchrun detco.py --data DIR --no-local                                Table 15 (e)
    torchrun detco.py --data DIR --no-local --share-queue                  Table 16 (a)
"""
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import (OPTIMIZERS, Queue, SplitBatchNorm, View, batch_norm_groups, contrast_statistics,
                    cosine_schedule, encode_shuffled, info_nce, mlp, momentum_update, resnet_stages)
from plumbing.flags import (Parser, add_data_arguments, add_run_arguments, fit_recipe, parse_recipe,
                            real, whole)
from plumbing.images import (Photos, augment_colour, open_images, random_resized_crop,
                             two_views)
from plumbing.run import Run, check_queue, distribute, launch, mixed_precision


class LocalView(NamedTuple):
    """A local view, and where its patches are to be cut from it, on the device."""

    view: View  # its pixels (3, L, L)
    corners: torch.Tensor  # (9, 2) x y of each patch's top left pixel, row by row


def local_view(image, size, scale, patch_size):
    """A crop in 3 x 3 cells, and a patch at a random place in each (Sec. 3.3) -> LocalView."""
    view, cell = random_resized_crop(image, size, (scale, 1.0)), size // 3
    # Paper silent: the patches keep the order of the grid.  The text says jigsaw, but not that
    # patches are permuted, and a head that takes them in a fixed order can tell places apart.
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flip(1)  # (9, 2) x y
    return LocalView(view, cells * cell + torch.randint(cell - patch_size + 1, (9, 2)))


def cut_patches(pixels, corners, size):
    """pixels (B, 3, L, L), corners (B, 9, 2) x y -> the patches (B, 9, 3, size, size)."""
    offsets = torch.arange(size, device=pixels.device)
    x, y = (corners.unsqueeze(-1) + offsets).unbind(2)  # (B, 9, size) each
    index = torch.arange(len(pixels), device=pixels.device).view(-1, 1, 1, 1)
    patches = pixels[index, :, y.unsqueeze(3), x.unsqueeze(2)]  # (B, 9, size, size, 3)
    return patches.permute(0, 1, 4, 2, 3)


def cut_views(image, args):
    """Two global views of one image and, unless --no-local, two local ones; all independent."""
    from torchvision.transforms import RandAugment
    # Paper silent: RandAugment's numbers; these are torchvision's, 2 operations at 9 of 30.  It
    # comes before the colours of MoCo v2.
    augment = RandAugment() if args.rand_augment else nn.Identity()
    views = [view._replace(pixels=augment(view.pixels))
             for view in two_views(image, args.image_size, (args.crop_scale, 1.0))]
    for _ in range(0 if args.no_local else 2):
        view, corners = local_view(image, args.local_size, args.local_scale, args.patch_size)
        views.append(LocalView(view._replace(pixels=augment(view.pixels)), corners))
    return views


class Encoder(nn.Module):
    """A ResNet with a global and a local head at each of ``levels`` (0..3 for Res2..Res5)."""

    def __init__(self, arch, dim, bn_groups, levels, local):
        super().__init__()
        self.levels = levels
        norm = partial(SplitBatchNorm, groups=bn_groups)
        self.stages = resnet_stages(arch, norm, depth=max(levels) + 1)
        # Paper silent: every hidden layer is as wide as Res5 (2048), as the heads are MoCo v2's
        # "except for the input channel".  With ResNet-50 the global heads have 9 million weights,
        # the local ones 72 million; the ResNet has 24 million.
        channels, hidden = self.stages.channels, self.stages.channels[-1]
        self.global_heads = nn.ModuleList(mlp(channels[i], [hidden, dim]) for i in levels)
        self.local_heads = nn.ModuleList(mlp(9 * channels[i], [hidden, dim])
                                         for i in levels if local)

    def forward(self, x):
        """Images (B, 3, H, W), or nine patches of each (B, 9, 3, h, w) -> unit embeddings (B, D),
        a list with one for each level."""
        heads = self.global_heads if x.dim() == 4 else self.local_heads
        stages = self.stages(x.flatten(0, -4))  # (B, C_i, ...), or (9B, C_i, ...)
        pooled = [stages[i].mean((2, 3)).view(len(x), -1) for i in self.levels]  # or (B, 9 C_i)
        return [F.normalize(head(p).float(), dim=1) for head, p in zip(heads, pooled)]


def level_losses(q_g, k_g, negatives_g, tau, q_l=None, k_l=None, negatives_l=None):
    """The losses of one level by name: L_gg and, with local embeddings, L_ll and L_gl.

    q_g, k_g, q_l, k_l: (B, D); negatives_g, negatives_l: (K, D); unit rows.
    """
    losses = dict(gg=info_nce(q_g, k_g, negatives_g, tau))  # Eq. (2)
    if q_l is not None:
        losses["ll"] = info_nce(q_l, k_l, negatives_l, tau)  # Eq. (5)
        losses["gl"] = info_nce(q_l, k_g, negatives_g, tau)  # Eq. (4)
    return losses


class DetCo(nn.Module):
    """Eq. (1); without patches Eq. (3), which is Algorithm 1 up to the loss.

    ``bn_groups``: batch norm groups in one process's batch.  A level of weight 0 has no head and
    no queue; a stage that only it would need is not computed and stays as it was initialised.
    """

    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8,
                 weights=(0.1, 0.4, 0.7, 1.0), local=True, share_queue=False):
        super().__init__()
        self.m, self.tau, self.weights = m, tau, weights
        self.levels = [i for i, w in enumerate(weights) if w > 0]
        self.encoder_q = Encoder(arch, dim, bn_groups, self.levels, local)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queues = nn.ModuleList()
        for _ in range(2 if local else 1):
            # Paper silent: Table 16's shared queue is one for global and one for local levels here
            if share_queue:
                self.queues.extend([Queue(queue_size, dim)] * len(self.levels))
            else:
                self.queues.extend(Queue(queue_size, dim) for _ in self.levels)

    def encode_keys(self, view_k, patches_k=None):
        """The keys of a batch, (B, D) for each of ``queues``."""
        k = encode_shuffled(self.encoder_k, view_k)
        return k if patches_k is None else k + encode_shuffled(self.encoder_k, patches_k)

    def forward(self, view_q, view_k, patches_q=None, patches_k=None):
        """Global views (B, 3, H, W) and patches (B, 9, 3, h, w) -> loss, the keys to push after the
        update, what to log (accuracy, similarities and deviation of the deepest level's global
        queries).  Without patches: Eq. (3)."""
        count = len(self.levels)
        q_g = self.encoder_q(view_q)  # a list of (B, D), one for each level
        q_l = self.encoder_q(patches_q) if patches_q is not None else []
        k = self.encode_keys(view_k, patches_k)  # k_g of each level, then k_l
        negatives = [queue.keys for queue in self.queues]
        loss, parts = 0, {}
        for i, level in enumerate(self.levels):
            local = (q_l[i], k[count + i], negatives[count + i]) if q_l else ()
            losses = level_losses(q_g[i], k[i], negatives[i], self.tau, *local)
            loss = loss + self.weights[level] * sum(losses.values())  # Eq. (1)
            parts.update({f"{name}_res{level + 2}": l.detach() for name, l in losses.items()})
        kinds = ("gg", "ll", "gl") if q_l else ("gg",)
        chance = loss.new_full((), math.log(len(negatives[0]) + 1))
        parts.update({f"{kind}_chance": chance for kind in kinds})
        statistics = contrast_statistics(q_g[-1], k[count - 1], negatives[count - 1])
        return loss, k, dict(loss_chance=chance * len(kinds) * sum(self.weights), **parts,
                             **statistics)


def train(args, device):
    """Pre-train as ``args`` say; all results go into the folder of the run."""
    images = open_images(args.data, args.scenes)
    fit_recipe(args, len(images))
    levels = sum(weight > 0 for weight in args.weights)
    check_queue(args.queue_size, args.batch_size * (levels if args.share_queue else 1),
                args.momentum, len(images))
    groups = batch_norm_groups(args.bn_groups, args.batch_size)  # as in moco_v2.py
    divisor = sum(args.weights) if args.normalise_weights else 1
    torch.manual_seed(args.seed)
    model = DetCo(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups,
                  [w / divisor for w in args.weights], not args.no_local, args.share_queue)
    model, ddp = distribute(model, device)
    # Differs: LARS in the small recipe, as in moco_v2.py
    optimizer = OPTIMIZERS[args.optimizer](
        model.encoder_q.parameters(), args.lr * args.batch_size / 256, momentum=0.9,
        weight_decay=args.weight_decay)
    run = Run(args, "detco", images, model=model, optimizer=optimizer)
    # Differs: bfloat16 on GPUs; the paper's mixed precision is Apex's (Sec. 6.5)
    side = args.image_size if args.no_local else min(args.image_size, args.patch_size)
    mixed = mixed_precision(args, device, side)

    def coloured(view):
        # As in Sec. 3.3, the colours of a local view come before its patches are cut
        return augment_colour(view.pixels.to(device, non_blocking=True), p_blur=args.p_blur)

    def batches(steps=None):
        """(step, view_q, view_k, patches_q, patches_k), the last two unless --no-local, on the
        device, of all steps still to do or of ``steps``."""
        cut = partial(cut_views, args=args)
        photos = Photos(images, (args.image_size, args.crop_scale),
                        (0 if args.no_local else args.local_size, args.local_scale))
        for step, (view_q, view_k, *local_views) in run.batches(photos, cut, steps):
            yield (step, coloured(view_q), coloured(view_k),
                   *(cut_patches(coloured(view), corners.to(device, non_blocking=True),
                                 args.patch_size) for view, corners in local_views))

    def encode(_view_q, view_k, _patches_q=None, patches_k=None):
        return model.encode_keys(view_k, patches_k)

    if not args.random_queue:  # Paper silent: as in moco_v2.py
        run.fill_queues(model.queues, batches, encode, mixed)

    for step, *views in batches():
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps))
        with mixed:
            loss, keys, parts = ddp(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.encoder_q, model.encoder_k, model.m)
        for queue, k in zip(model.queues, keys):
            queue.push(k)
        run.end_step(loss, lr, **parts)
    run.finish(model.encoder_q.stages)


def parse_args(argv=None):
    """The paper's recipe by default; without --data, a small one for the built-in scenes."""
    parser = Parser(description="Pre-train a ResNet with DetCo.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (section or table of DetCo)").add_argument
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=whole(1), default=200, help="passes over the images (Sec. 3.3)")
    add("--batch-size", type=whole(1), default=256, help="total over all processes (Sec. 3.3)")
    add("--lr", type=real(0), default=0.06, help="per 256 images of the batch (Sec. 6.5)")
    add("--optimizer", choices=[*OPTIMIZERS], default="sgd", help="default: sgd (MoCo, Sec. 4), "
        "in the small recipe lars, with --lr 4 and --weight-decay 1e-6")
    add("--weight-decay", type=real(0), default=1e-4, help="of all parameters (MoCo, Sec. 4)")
    add("--weights", type=real(0), nargs=4, default=[0.1, 0.4, 0.7, 1.0], metavar="W",
        help="of Res2..Res5 (Sec. 6.5, Table 15)")
    add("--normalise-weights", action="store_true", help="divide them by their sum (Table 15)")
    add("--no-local", action="store_true", help="no patches: the intermediate loss alone (Eq. 3)")
    add("--share-queue", action="store_true", help="one queue for all levels (Table 16)")
    add("--rand-augment", action="store_true", help="RandAugment before the colours "
        "(DetCo+AA, Sec. 3.3)")
    add("--image-size", type=whole(8), default=224, help="side of a global view in pixels")
    add("--crop-scale", type=real(1e-3, 1), default=0.2, help="smallest crop's share of the area")
    add("--local-size", type=whole(24), default=255, help="side of a local view, 3 x 3 cells")
    add("--local-scale", type=real(1e-3, 1), default=0.6, help="smallest crop's share of the area")
    add("--patch-size", type=whole(8), default=64, help="side of a patch, cut from a cell")
    add("--p-blur", type=real(0, 1), default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=whole(1), default=128, help="D (Sec. 6.5)")
    add("--queue-size", type=whole(1), default=65536, help="K, the number of negatives (MoCo v2)")
    add("--momentum", type=real(0, 1), default=0.999, help="m of encoder_k (MoCo, Sec. 3.2)")
    add("--tau", type=real(1e-3), default=0.2, help="temperature (MoCo v2, Sec. 3)")
    add("--bn-groups", type=whole(1), default=8, help="batch norm groups in the total batch")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add_run_arguments(parser, out="runs/detco")
    args = parse_recipe(
        parser, argv,
        small=dict(image_size=64, local_size=96, patch_size=24, optimizer="lars", lr=4.0,
                   weight_decay=1e-6, crop_scale=0.4, p_blur=0.0),
        scenes=dict(image_size=48, local_size=60, patch_size=16, epochs=5))  # 5 minutes, two cores
    if not any(args.weights):
        parser.error("--weights: one must be more than 0")
    if not args.no_local and args.patch_size > args.local_size // 3:
        parser.error(f"--patch-size {args.patch_size} is more than a third of --local-size "
                     f"{args.local_size}")
    return args


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
