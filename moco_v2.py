"""MoCo v2: Improved Baselines with Momentum Contrastive Learning (Chen et al., arXiv 2003.04297),
on Momentum Contrast (MoCo; He et al., CVPR 2020, arXiv 1911.05722).

Two crops of one image must be recognised as the same among many other images.  One encoder makes
the queries; a slow copy of it makes the keys, of which a queue keeps the last K as negatives, so
that there can be many more of them than a batch holds.

Read first: nothing.  DetCo and DUPR start from this file.

Symbols
    paper      code                   shape
    x_q, x_k   view_q, view_k         (B, 3, H, W)    two views of the same images
    f_q, f_k   encoder_q, encoder_k                   ResNet, average pool, 2-layer MLP, unit length
    q, k       q, k                   (B, D)          embeddings: query and key
    queue      queue.keys             (K, D)          keys of earlier batches: the negatives
    m, tau     m, tau                                 momentum of encoder_k; temperature

Equations (of MoCo)
    (1)  L = -log exp(q.k/tau) / sum_{i=0..K} exp(q.k_i/tau)      common.info_nce
    (2)  theta_k <- m theta_k + (1 - m) theta_q                   common.momentum_update
    Algorithm 1                                                   MoCo.forward and the loop of train
    Section 3.3, shuffling BN                                     common.shuffled

Commands
    python moco_v2.py                                    built-in scenes, minutes on a CPU
    torchrun moco_v2.py --data DIR                       one GPU, the paper's recipe
    torchrun --nproc_per_node=8 moco_v2.py --data DIR    eight GPUs, the same run

Where this differs from the paper, or the paper is silent
    - Batch norm sees groups of batch / 8 images on one process as on eight (--bn-groups 8), so that
      one GPU trains as the paper's eight did.  A single process with ordinary batch norm would have
      nothing to shuffle between, and could match views by the statistics they share.
    - The queue starts full of real keys: one pass of the key encoder over as many images.  Random
      vectors are so easily told from keys that they teach a small run one constant answer in its
      first steps; --random-queue gives the original start.
    - The cosine falls with every step, not with every epoch.
    - bfloat16 on GPUs, where the paper trained in float32; embeddings and loss are float32
      (matrix products TF32).
"""
import argparse
import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import (Queue, Run, SplitBatchNorm, add_run_arguments, batch_norm_groups, check,
                    check_queue, contrast_statistics, export_backbone, info_nce, launch,
                    load_batches, mixed_precision, mlp, momentum_update, photometric,
                    random_resized_crop, rank, resnet_stages, seed_for, shuffled, steps_per_epoch,
                    unlabelled, world_size)


def parse_args(argv=None):
    """The paper's recipe by default; without --data, a small one for the built-in scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a ResNet with MoCo v2.")
    add = parser.add_argument_group("recipe (section of MoCo v2, or of MoCo)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=int, default=200, help="passes over the images (MoCo v2, Table 1)")
    add("--batch-size", type=int, default=256, help="of all processes together (MoCo 4)")
    add("--lr", type=float, default=0.03, help="for each 256 images of the batch (MoCo 4)")
    add("--weight-decay", type=float, default=1e-4, help="of all parameters (MoCo 4)")
    add("--image-size", type=int, default=224, help="side of a view in pixels")
    add("--crop-scale", type=float, default=0.2, help="least share of the image in a view")
    add("--p-blur", type=float, default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=int, default=128, help="D")
    add("--queue-size", type=int, default=65536, help="K, the number of negatives")
    add("--momentum", type=float, default=0.999, help="m, of the key encoder (MoCo 3.2)")
    add("--tau", type=float, default=0.2, help="temperature (MoCo v2, 3)")
    add("--bn-groups", type=int, default=8, help="parts of the batch that batch norm sees apart")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add_run_arguments(parser, out="runs/moco_v2")
    if parser.parse_known_args(argv)[0].data is None:  # 3 minutes on two CPU cores
        parser.set_defaults(arch="resnet18", image_size=48, epochs=7, batch_size=64, lr=0.06,
                            queue_size=256, momentum=0.99, bn_groups=4, crop_scale=0.4,
                            p_blur=0.0)
    return parser.parse_args(argv)


def two_views(image, size, scale):
    """The query's and the key's view: two independent crops of one image (3, H, W)."""
    return random_resized_crop(image, size, scale), random_resized_crop(image, size, scale)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> unit embeddings (B, D): ResNet, average pool, MLP (MoCo v2, 3).

    The head's hidden layer is as wide as Res5: 2048 for ResNet-50.
    """

    def __init__(self, arch, dim, bn_groups):
        super().__init__()
        self.stages = resnet_stages(arch, partial(SplitBatchNorm, groups=bn_groups))
        width = self.stages.channels[-1]
        self.head = mlp(width, width, dim)

    def forward(self, images):
        res5 = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return F.normalize(self.head(res5.mean((2, 3))).float(), dim=1)  # (B, D)


class MoCo(nn.Module):
    """Algorithm 1, up to the loss.  ``bn_groups`` are those of one process."""

    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8):
        super().__init__()
        self.m, self.tau = m, tau
        self.encoder_q = Encoder(arch, dim, bn_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = Queue(queue_size, dim)

    def forward(self, view_q, view_k):
        """Two views (B, 3, H, W) -> loss, the keys (B, D) to push after the update, what to log."""
        q = self.encoder_q(view_q)  # (B, D)
        k = shuffled(self.encoder_k, view_k)  # (B, D), without gradient
        loss = info_nce(q, k, self.queue.keys, self.tau)  # Eq. (1)
        chance = loss.new_full((), math.log(len(self.queue.keys) + 1))
        return loss, k, dict(loss_chance=chance, **contrast_statistics(q, k, self.queue.keys))


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf), weight_decay=(0, inf),
          image_size=(8, inf), crop_scale=(1e-3, 1), p_blur=(0, 1), dim=(1, inf), tau=(1e-3, inf),
          queue_size=(1, inf), momentum=(0, 1), bn_groups=(1, inf), scenes=(1, inf),
          workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    images = unlabelled(args.data, args.scenes)
    groups = batch_norm_groups(args.bn_groups, args.batch_size)
    per_epoch = steps_per_epoch(images, args.batch_size)
    check_queue(args.queue_size, args.batch_size, args.momentum, len(images))

    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    base_lr, steps = args.lr * args.batch_size / 256, args.epochs * per_epoch
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), base_lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    run = Run(args, "moco_v2", images, steps, per_epoch,
              dict(model=model, optimizer=optimizer))

    def batches(steps):
        """(step, view_q, view_k) on the device, their colours drawn from (seed, step, rank)."""
        cut = partial(two_views, size=args.image_size, scale=(args.crop_scale, 1.0))
        loader = load_batches(images, cut, args.batch_size, steps, args.seed, args.workers)
        for step, views in zip(steps, loader):
            torch.manual_seed(seed_for(args.seed, step, rank()))
            yield step, *(photometric(v.pixels.to(device, non_blocking=True), p_blur=args.p_blur)
                          for v in views)

    mixed = mixed_precision(args, device, args.image_size)
    if run.step == 0 and not args.random_queue:  # with views of epochs that are never trained on
        run.say(f"filling the queue with {args.queue_size} keys")
        for _, _, view_k in batches(range(steps, steps + -(-args.queue_size // args.batch_size))):
            with mixed:
                model.queue.push(shuffled(model.encoder_k, view_k))
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
        momentum_update(model.encoder_q, model.encoder_k, model.m)  # Eq. (2)
        model.queue.push(keys)
        run.end_step(loss, lr, **parts)
    if rank() == 0:
        export_backbone(model.encoder_q.stages, run.out / "backbone.pt")
    run.say(f"{run.out / 'backbone.pt'} is the pre-trained ResNet")


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
