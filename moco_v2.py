"""MoCo v2: Improved Baselines with Momentum Contrastive Learning (Chen et al., arXiv 2003.04297),
on Momentum Contrast (MoCo; He et al., CVPR 2020, arXiv 1911.05722).

A network learns to match two crops of an image against crops of many other images.  One encoder
makes the queries; a slowly moving copy of it makes the keys, of which a queue keeps the last K as
negatives, so that there are many more of them than a batch holds.

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
    Section 3.3, shuffling BN                                     common.encode_shuffled
    MoCo v2, Sec. 3, augmentation                                 plumbing.images.augment_colour

Commands
    python moco_v2.py                                    built-in scenes, minutes on a CPU
    torchrun moco_v2.py --data DIR                       one GPU, the paper's recipe
    torchrun --nproc_per_node=8 moco_v2.py --data DIR    eight GPUs, the same run
"""
import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import (OPTIMIZERS, Queue, SplitBatchNorm, batch_norm_groups, contrast_statistics,
                    cosine_schedule, encode_shuffled, info_nce, mlp, momentum_update, resnet_stages)
from plumbing.flags import (Parser, add_data_arguments, add_run_arguments, fit_recipe, parse_recipe,
                            real, whole)
from plumbing.images import Photos, augment_colour, open_images, two_views
from plumbing.run import Run, check_queue, distribute, launch, mixed_precision


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> unit embeddings (B, D): ResNet, average pool, MLP (MoCo v2, Sec. 3).

    The hidden layer of the head is as wide as Res5: 2048 for ResNet-50.
    """

    def __init__(self, arch, dim, bn_groups):
        super().__init__()
        self.stages = resnet_stages(arch, partial(SplitBatchNorm, groups=bn_groups))
        width = self.stages.channels[-1]
        self.head = mlp(width, [width, dim])

    def forward(self, images):
        res5 = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return F.normalize(self.head(res5.mean((2, 3))).float(), dim=1)  # (B, D)


class MoCo(nn.Module):
    """Algorithm 1, up to the loss.  ``bn_groups``: batch norm groups in one process's batch."""

    def __init__(self, arch="resnet50", dim=128, queue_size=65536, m=0.999, tau=0.2, bn_groups=8):
        super().__init__()
        self.m, self.tau = m, tau
        self.encoder_q = Encoder(arch, dim, bn_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = Queue(queue_size, dim)

    def forward(self, view_q, view_k):
        """Two views (B, 3, H, W) -> loss, the keys (B, D) to push after the update, what to log."""
        q = self.encoder_q(view_q)  # (B, D)
        k = encode_shuffled(self.encoder_k, view_k)  # (B, D), without gradient
        loss = info_nce(q, k, self.queue.keys, self.tau)  # Eq. (1)
        chance = loss.new_full((), math.log(len(self.queue.keys) + 1))
        return loss, k, dict(loss_chance=chance, **contrast_statistics(q, k, self.queue.keys))


def train(args, device):
    """Pre-train as ``args`` say; all results go into the folder of the run."""
    images = open_images(args.data, args.scenes)
    fit_recipe(args, len(images))
    check_queue(args.queue_size, args.batch_size, args.momentum, len(images))
    # Paper silent: on fewer than 8 GPUs batch norm still sees groups of batch / 8 images.  With one
    # group a single process would have nothing to shuffle between, and could match two views by the
    # batch statistics they share.
    groups = batch_norm_groups(args.bn_groups, args.batch_size)
    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.dim, args.queue_size, args.momentum, args.tau, groups)
    model, ddp = distribute(model, device)
    # Differs: the small recipe takes LARS.  In a few hundred steps SGD changes the direction of
    # hardly any weights but conv1's (RESULTS.md): before a batch norm, large weights turn slowly.
    optimizer = OPTIMIZERS[args.optimizer](
        model.encoder_q.parameters(), args.lr * args.batch_size / 256, momentum=0.9,
        weight_decay=args.weight_decay)
    run = Run(args, "moco_v2", images, model=model, optimizer=optimizer)
    # Differs: bfloat16 on GPUs, float32 in the authors' code; embeddings and loss are float32
    mixed = mixed_precision(args, device, args.image_size)

    def batches(steps=None):
        """(step, view_q, view_k) on the device, of all steps still to do or of ``steps``."""
        cut = partial(two_views, size=args.image_size, scale=(args.crop_scale, 1.0))
        photos = Photos(images, (args.image_size, args.crop_scale))
        for step, views in run.batches(photos, cut, steps):
            yield step, *(augment_colour(v.pixels.to(device, non_blocking=True),
                                         p_blur=args.p_blur) for v in views)

    # Paper silent: the queue starts full of real keys.  The random vectors of the authors' code
    # (--random-queue) are so unlike keys that they teach a small run one constant answer at first.
    if not args.random_queue:
        run.fill_queues([model.queue], batches,
                        lambda _, view_k: [encode_shuffled(model.encoder_k, view_k)], mixed)

    for step, view_q, view_k in batches():
        # Paper silent: the cosine falls with every step; in the authors' code with every epoch
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps))
        with mixed:
            loss, keys, parts = ddp(view_q, view_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum_update(model.encoder_q, model.encoder_k, model.m)  # Eq. (2)
        model.queue.push(keys)
        run.end_step(loss, lr, **parts)
    run.finish(model.encoder_q.stages)


def parse_args(argv=None):
    """The paper's recipe by default; without --data, a small one for the built-in scenes."""
    parser = Parser(description="Pre-train a ResNet with MoCo v2.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (section of MoCo v2, or of MoCo)").add_argument
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--epochs", type=whole(1), default=200, help="passes over the images (MoCo v2, Table 1)")
    add("--batch-size", type=whole(1), default=256, help="total over all processes (MoCo, Sec. 4)")
    add("--lr", type=real(0), default=0.03, help="per 256 images of the batch (MoCo, Sec. 4)")
    add("--optimizer", choices=[*OPTIMIZERS], default="sgd", help="default: sgd (MoCo, Sec. 4), "
        "in the small recipe lars, with --lr 2 and --weight-decay 1e-6")
    add("--weight-decay", type=real(0), default=1e-4, help="of all parameters (MoCo, Sec. 4)")
    add("--image-size", type=whole(8), default=224, help="side of a view in pixels")
    add("--crop-scale", type=real(1e-3, 1), default=0.2, help="smallest crop's share of the area")
    add("--p-blur", type=real(0, 1), default=0.5, help="chance of a blur, sigma 0.1-2 pixels")
    add("--dim", type=whole(1), default=128, help="D")
    add("--queue-size", type=whole(1), default=65536, help="K, the number of negatives")
    add("--momentum", type=real(0, 1), default=0.999, help="m of encoder_k (MoCo, Sec. 3.2)")
    add("--tau", type=real(1e-3), default=0.2, help="temperature (MoCo v2, Sec. 3)")
    add("--bn-groups", type=whole(1), default=8, help="batch norm groups in the total batch")
    add("--random-queue", action="store_true", help="start with random vectors instead of keys")
    add_run_arguments(parser, out="runs/moco_v2")
    return parse_recipe(
        parser, argv, small=dict(image_size=64, optimizer="lars", lr=2.0, weight_decay=1e-6,
                                 crop_scale=0.4, p_blur=0.0),
        scenes=dict(image_size=48, epochs=7))  # 3 minutes on two CPU cores


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
