"""DetCo: Unsupervised Contrastive Learning for Object Detection (Xie et al., ICCV 2021,
arXiv 2102.04803).

MoCo v2 at every stage of the backbone, so that shallow features tell images apart too; and beside
each whole view a set of nine patches of the image, so that parts do as well: what the nine say
together must match the key of another such set of the same image, and that of a whole view of it.

Read first: moco_v2.py.  New here: four levels instead of one, the nine patches and their heads, and
so eight queues and three losses a level.

Symbols
    paper      code                     shape
    I_q, I_k   view_q, view_k           (B, 3, H, W)        two global views of the same images
    P_q, P_k   patches_q, patches_k     (B, 9, 3, h, w)     two local views, as nine patches each
    q^g, k^g   q_g, k_g                 4 x (B, D)          global embeddings, one a level
    q^l, k^l   q_l, k_l                 4 x (B, D)          local ones, each of nine patches
    queue_i    queues                   8 x (K, D)          global levels first, then local ones
    w          weights                  4                   of Res2, Res3, Res4, Res5
    m, tau     m, tau                                       momentum of encoder_k; temperature

Equations
    (1)  sum over levels of w_i (L_gg + L_ll + L_gl)              DetCo.forward
    (2)  L_gg: global query, global key, global queue             common.info_nce
    (3)  sum over levels of w_i L_gg                              DetCo.forward without patches
    (4)  L_gl: local query, global key, global queue              common.info_nce
    (5)  L_ll: local query, local key, local queue                common.info_nce
    Section 3.3, the local view                                   local_view, cut_patches
    Algorithm 1 (Eq. 3 alone)                                     DetCo.forward, the loop of train

Commands
    python detco.py                                      built-in scenes, minutes on a CPU
    torchrun detco.py --data DIR                         one GPU, the paper's recipe
    torchrun --nproc_per_node=8 detco.py --data DIR      eight GPUs, the same run
    torchrun detco.py --data DIR --rand-augment                            DetCo+AA
    torchrun detco.py --data DIR --no-local --weights 0 0 0 1              Table 15 (a)
    torchrun detco.py --data DIR --no-local --weights 1 1 1 1 --normalise-weights          (b)
    torchrun detco.py --data DIR --no-local --weights 1 1 1 1              Table 15 (c)
    torchrun detco.py --data DIR --no-local --normalise-weights            Table 15 (d)
    torchrun detco.py --data DIR --no-local                                Table 15 (e)
    torchrun detco.py --data DIR --no-local --share-queue                  Table 16 (a)
    (the tables' runs have 100 epochs: --epochs 100; 15 (a) is moco_v2.py with --lr 0.06)

Weights of one encoder with ResNet-50, of which only the ResNet's are exported
    ResNet              23,508,032
    global heads         8,921,600      C_i -> 2048 -> 128 with C_i = 256, 512, 1024, 2048
    local heads         71,836,160      9 C_i -> 2048 -> 128; the largest of them has 38,013,056

Where this differs from the paper, or the paper is silent
    - A head's hidden layer is as wide as Res5 (2048), at all levels, global and local: the paper's
      heads are MoCo v2's "except for the input channel".
    - Colour and blur of a local view are drawn once, for the whole of it, before it is cut.
    - The nine patches stand in the order of the grid: the text says jigsaw and cites PIRL, but not
      that it permutes them, and a head that takes them in a fixed order can tell places apart.
    - --share-queue shares one queue among the global levels and one among the local ones.
    - --rand-augment is torchvision's RandAugment (2 operations at 0.3 of their range, 9 of 30),
      before the colours above: the paper cites it, without its numbers.
    - A level of weight 0 has no head and no queue, and a stage that only it would need is not
      computed: backbone.pt then has it as it was initialised.
    - As in moco_v2.py: batch norm sees groups of batch / 8 images (nine patches each) on one
      process as on eight; queues start full of real keys; the cosine falls by step; bfloat16.
"""
import argparse
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import RandAugment

from common import (InputError, Queue, Run, SplitBatchNorm, View, add_run_arguments,
                    batch_norm_groups, check, check_queue, contrast_statistics, export_backbone,
                    info_nce, launch, load_batches, mixed_precision, mlp, momentum_update,
                    photometric, random_resized_crop, rank, resnet_stages, seed_for, shuffled,
                    steps_per_epoch, unlabelled, world_size)


def parse_args(argv=None):
    """The paper's recipe by default; without --data, a small one for the built-in scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a ResNet with DetCo.")
    add = parser.add_argument_group("recipe (section or table of DetCo)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=int, default=200, help="passes over the images (3.3)")
    add("--batch-size", type=int, default=256, help="of all processes together (3.3)")
    add("--lr", type=float, default=0.06, help="for each 256 images of the batch (6.5)")
    add("--weight-decay", type=float, default=1e-4, help="of all parameters (MoCo 4)")
    add("--weights", type=float, nargs=4, default=[0.1, 0.4, 0.7, 1.0], metavar="W",
        help="of Res2..Res5 (6.5, Table 15)")
    add("--normalise-weights", action="store_true", help="divide them by their sum (Table 15)")
    add("--no-local", action="store_true", help="no patches: the intermediate loss alone (Eq. 3)")
    add("--share-queue", action="store_true", help="one queue for all levels (Table 16)")
    add("--rand-augment", action="store_true", help="RandAugment before the colours (3.3, +AA)")
    add("--image-size", type=int, default=224, help="side of a global view in pixels (3.3)")
    add("--crop-scale", type=float, default=0.2, help="least share of the image in it (3.3)")
    add("--local-size", type=int, default=255, help="side of a local view, in 3 x 3 cells (3.3)")
    add("--local-scale", type=float, default=0.6, help="least share of the image in it (3.3)")
    add("--patch-size", type=int, default=64, help="side of a patch of a cell (3.3)")
    add("--p-blur", type=float, default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=int, default=128, help="D (6.5)")
    add("--queue-size", type=int, default=65536, help="K, the number of negatives (MoCo v2)")
    add("--momentum", type=float, default=0.999, help="m, of the key encoder (MoCo 3.2)")
    add("--tau", type=float, default=0.2, help="temperature (MoCo v2, 3)")
    add("--bn-groups", type=int, default=8, help="parts of the batch that batch norm sees apart")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add_run_arguments(parser, out="runs/detco")
    if parser.parse_known_args(argv)[0].data is None:  # 5 minutes on two CPU cores
        parser.set_defaults(arch="resnet18", image_size=48, local_size=60, patch_size=16, epochs=5,
                            batch_size=64, queue_size=256, momentum=0.99, bn_groups=4,
                            crop_scale=0.4, p_blur=0.0)
    return parser.parse_args(argv)


class LocalView(NamedTuple):
    """A local view, and where its patches are cut from it, on the device."""

    view: View  # its pixels (3, L, L)
    corners: torch.Tensor  # (9, 2) x y of each patch's top left pixel, row by row


def local_view(image, size, scale, patch_size):
    """A crop (section 3.3) in 3 x 3 cells, a patch at a random place in each -> LocalView."""
    view, cell = random_resized_crop(image, size, (scale, 1.0)), size // 3
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flip(1)  # (9, 2) x y
    return LocalView(view, cells * cell + torch.randint(cell - patch_size + 1, (9, 2)))


def cut_patches(pixels, corners, size):
    """pixels (B, 3, L, L), corners (B, 9, 2) x y -> the patches (B, 9, 3, size, size)."""
    along = torch.arange(size, device=pixels.device)
    x, y = (corners.unsqueeze(-1) + along).unbind(2)  # (B, 9, size) each
    image = torch.arange(len(pixels), device=pixels.device).view(-1, 1, 1, 1)
    patches = pixels[image, :, y.unsqueeze(3), x.unsqueeze(2)]  # (B, 9, size, size, 3)
    return patches.permute(0, 1, 4, 2, 3)


def views(image, args):
    """Two global views of one image and, unless --no-local, two local ones; all independent."""
    augment = RandAugment() if args.rand_augment else nn.Identity()
    drawn = [random_resized_crop(image, args.image_size, (args.crop_scale, 1.0)) for _ in "qk"]
    drawn = [view._replace(pixels=augment(view.pixels)) for view in drawn]
    for _ in "" if args.no_local else "qk":
        view, corners = local_view(image, args.local_size, args.local_scale, args.patch_size)
        drawn.append(LocalView(view._replace(pixels=augment(view.pixels)), corners))
    return drawn


class Encoder(nn.Module):
    """A ResNet with a global and a local head at each of ``levels`` (0..3 for Res2..Res5)."""

    def __init__(self, arch, dim, bn_groups, levels, local):
        super().__init__()
        self.levels = levels
        norm = partial(SplitBatchNorm, groups=bn_groups)
        self.stages = resnet_stages(arch, norm, depth=max(levels) + 1)
        channels, hidden = self.stages.channels, self.stages.channels[-1]
        self.global_heads = nn.ModuleList(mlp(channels[i], hidden, dim) for i in levels)
        self.local_heads = nn.ModuleList(mlp(9 * channels[i], hidden, dim)
                                         for i in levels if local)

    def forward(self, x):
        """Images (B, 3, H, W), or nine patches of each (B, 9, 3, h, w) -> unit embeddings (B, D),
        a list with one for each level."""
        heads = self.global_heads if x.dim() == 4 else self.local_heads
        stages = self.stages(x.flatten(0, -4))  # (B, C_i, ...), or (9B, C_i, ...)
        pooled = [stages[i].mean((2, 3)).view(len(x), -1) for i in self.levels]  # or (B, 9 C_i)
        return [F.normalize(head(p).float(), dim=1) for head, p in zip(heads, pooled)]


class DetCo(nn.Module):
    """Eq. (1); without patches Eq. (3), Algorithm 1 up to the loss.  ``bn_groups`` are those of one
    process."""

    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8,
                 weights=(0.1, 0.4, 0.7, 1.0), local=True, share_queue=False):
        super().__init__()
        self.m, self.tau, self.weights = m, tau, weights
        self.levels = [i for i, w in enumerate(weights) if w > 0]
        self.encoder_q = Encoder(arch, dim, bn_groups, self.levels, local)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queues = nn.ModuleList()
        for _ in ("global", "local") if local else ("global",):
            number = 1 if share_queue else len(self.levels)
            queues = [Queue(queue_size, dim) for _ in range(number)]
            self.queues.extend(queues * (len(self.levels) // number))

    def keys(self, view_k, patches_k=None):
        """The keys of a batch, in the order of ``queues``, each of which takes one: (B, D) each."""
        k = shuffled(self.encoder_k, view_k)
        return k if patches_k is None else k + shuffled(self.encoder_k, patches_k)

    def forward(self, view_q, view_k, patches_q=None, patches_k=None):
        """Global views (B, 3, H, W) and patches (B, 9, 3, h, w) -> loss, the keys to push after the
        update, what to log.  Without patches: Eq. (3)."""
        local, number = patches_q is not None, len(self.levels)
        q_g = self.encoder_q(view_q)  # a list of (B, D), one for each level, as all below
        q_l = self.encoder_q(patches_q) if local else []
        k, n = self.keys(view_k, patches_k), [queue.keys for queue in self.queues]
        (k_g, k_l), (n_g, n_l) = ((each[:number], each[number:]) for each in (k, n))
        loss, parts = 0, {}
        for i, level in enumerate(self.levels):
            terms = dict(gg=info_nce(q_g[i], k_g[i], n_g[i], self.tau))  # Eq. (2)
            if local:
                terms["ll"] = info_nce(q_l[i], k_l[i], n_l[i], self.tau)  # Eq. (5)
                terms["gl"] = info_nce(q_l[i], k_g[i], n_g[i], self.tau)  # Eq. (4)
            loss = loss + self.weights[level] * sum(terms.values())  # Eq. (1)
            parts.update({f"{name}_res{level + 2}": term.detach() for name, term in terms.items()})
        chance = loss.new_full((), math.log(len(n_g[0]) + 1))
        whole = chance * len(terms) * sum(self.weights)
        parts.update({f"{name}_chance": chance for name in terms})
        return loss, k, dict(loss_chance=whole, **parts,
                             **contrast_statistics(q_g[-1], k_g[-1], n_g[-1]))


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf), weight_decay=(0, inf),
          weights=(0, inf), image_size=(8, inf), crop_scale=(1e-3, 1), local_scale=(1e-3, 1),
          local_size=(24, inf), patch_size=(8, inf if args.no_local else args.local_size // 3),
          p_blur=(0, 1), dim=(1, inf), tau=(1e-3, inf), queue_size=(1, inf), momentum=(0, 1),
          bn_groups=(1, inf), scenes=(1, inf), workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    if not any(args.weights):
        raise InputError("--weights: one must be more than 0")
    images = unlabelled(args.data, args.scenes)
    groups = batch_norm_groups(args.bn_groups, args.batch_size)
    per_epoch = steps_per_epoch(images, args.batch_size)
    pushed = args.batch_size * (sum(map(bool, args.weights)) if args.share_queue else 1)
    check_queue(args.queue_size, pushed, args.momentum, len(images))
    by = sum(args.weights) if args.normalise_weights else 1

    torch.manual_seed(args.seed)
    model = DetCo(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups,
                  [w / by for w in args.weights], not args.no_local, args.share_queue)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    base_lr, steps = args.lr * args.batch_size / 256, args.epochs * per_epoch
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), base_lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    run = Run(args, "detco", images, steps, per_epoch, dict(model=model, optimizer=optimizer))

    def coloured(view):
        return photometric(view.pixels.to(device, non_blocking=True), p_blur=args.p_blur)

    def batches(steps):
        """(step, view_q, view_k, patches_q, patches_k), without the last two if --no-local, on the
        device, their colours drawn from (seed, step, rank)."""
        loader = load_batches(images, partial(views, args=args), args.batch_size, steps, args.seed,
                              args.workers)
        for step, (view_q, view_k, *local) in zip(steps, loader):
            torch.manual_seed(seed_for(args.seed, step, rank()))
            yield (step, coloured(view_q), coloured(view_k),
                   *(cut_patches(coloured(view), corners.to(device, non_blocking=True),
                                 args.patch_size) for view, corners in local))

    mixed = mixed_precision(args, device, args.image_size if args.no_local else args.patch_size)
    if run.step == 0 and not args.random_queue:  # with views of epochs that are never trained on
        run.say(f"filling the queues with {args.queue_size} keys each")
        fill = range(steps, steps - (-args.queue_size // args.batch_size))
        for _, _, view_k, *patches in batches(fill):
            with mixed:
                keys = model.keys(view_k, *patches[1:])
            for queue, k in zip(model.queues, keys):
                queue.push(k)
            run.stop_if_asked()
        run.start_clock()

    for step, *batch in batches(range(run.step, steps)):
        lr = base_lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr
        with mixed:
            loss, keys, parts = ddp(*batch)
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
