"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., ICML 2021,
arXiv 2103.03230).

Two crops of one image go through one network.  Over a batch, each dimension of the one embedding
shall be correlated with the same dimension of the other, and with no other dimension: so the two
embeddings agree, and still hold D different things.

Read first: moco_v2.py.  What falls away: the queue, the momentum encoder, the temperature.

Symbols
    paper      code            shape
    Y^A, Y^B   view1, view2    (B, 3, H, W)    two views of the same images
    f          embed                           ResNet (or Swin), average pool, three linear layers
    Z^A, Z^B   z1, z2          (N, D)          embeddings, N = B a process
    C          c               (D, D)          cross-correlation over the batch of all processes
    lambda     lambd                           weight of the redundancy

Equations
    (1)  L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j!=i} C_ij^2                barlow_twins_loss
    (2)  C_ij = sum_b z^A_bi z^B_bj / (|z^A_.i| |z^B_.j|), each centred         cross_correlation
    Algorithm 1                                                                 BarlowTwins.forward
    warm-up and cosine of the learning rates (section 2.2)                      schedule

Commands
    python barlow_twins.py                                       built-in scenes, minutes on a CPU
    python barlow_twins.py --data DIR --measure-normalisation    what --mean and --std should be
    torchrun barlow_twins.py --data DIR --batch-size 256         one GPU
    torchrun --nproc_per_node=8 barlow_twins.py --data DIR       eight
    torchrun --nproc_per_node=8 barlow_twins.py --data DIR --arch swin_t --out runs/barlow_swin
    python finetune_fasterrcnn.py --weights runs/barlow_twins/backbone.pt --optimizer adam

Where this differs from the paper, or it is silent
    - A projector 2048 wide (the paper's: 8192), crops of at least 40% of the image (8%) and 150
      epochs (1000) are those of a report by Rajamohan, Liu and Wang, who pre-trained for detection
      with half a million images.
    - The learning rate of weights follows the batch size: LEARNING_RATES, which the authors gave
      for 300 epochs (github.com/facebookresearch/barlowtwins/issues/7), interpolated on
      the logarithm of the batch size, below 128 as for 128 (the authors guess 1.0 for 64).
      That of biases stays 0.0048; in those runs it was 0.024 of the weights' (0.0096 for 256).
    - lambda (the paper's: 0.005), weight decay (1.5e-6), blur and solarize, and the 1e-5 in each
      deviation, sqrt(variance + 1e-5), are the authors' code's.
    - Gradients are those of one process with the whole batch.  The authors' are smaller by the
      number of processes, which LARS undoes, but not for biases and batch norm.
    - The last batch norm of a residual block starts at one, the authors' at zero.
    - Batch norm is synchronised over processes on GPUs; on CPUs each process has its own.  bfloat16
      on GPUs; the loss is float32 (its matrix product TF32).
"""
import argparse
import math
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import MLP

from common import (IMAGENET_MEAN, IMAGENET_STD, LARS, InputError, Run, add_run_arguments,
                    all_gather, backbone_stages, check, draw_correlation, export_backbone, launch,
                    load_batches, measure_normalisation, mixed_precision, photometric,
                    random_resized_crop, rank, seed_for, steps_per_epoch, summed, unlabelled,
                    world_size)

LEARNING_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}  # of a batch size


def parse_args(argv=None):
    """The report's recipe by default; without --data, a small one for the built-in scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a backbone with Barlow Twins.")
    add = parser.add_argument_group("recipe (section of the paper)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet or Swin Transformer")
    add("--epochs", type=int, default=150, help="passes over the images (the report, 2)")
    add("--batch-size", type=int, default=2048, help="of all processes together (2.2)")
    add("--lr", type=float, help="of weights, for each 256 images (2.2; default: by batch size, 0.2"
        " for 2048 to 0.7 for 128)")
    add("--lr-biases", type=float, default=0.0048, help="of biases and batch norm, likewise (2.2)")
    add("--weight-decay", type=float, default=1e-6, help="of weights (the authors' code)")
    add("--warmup", type=int, default=10, help="epochs of linear growth of the lr (2.2)")
    add("--image-size", type=int, default=224, help="side of a view in pixels (2.2)")
    add("--crop-scale", type=float, default=0.4, help="least share of the image in a view (the "
        "report, 2)")
    add("--p-blur", type=float, nargs=2, default=[1.0, 0.1], metavar="P", help="each view's")
    add("--mean", type=float, nargs=3, default=[*IMAGENET_MEAN], metavar="M", help="of red, green "
        "and blue, in 0..1 (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[*IMAGENET_STD], metavar="S", help="their deviations")
    add("--dim", type=int, default=2048, help="D, and the hidden layers' width (the report, 2)")
    add("--lambd", type=float, default=0.0051, help="lambda (the authors' code)")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add("--measure-normalisation", action="store_true", help="print --mean and --std of the images")
    add_run_arguments(parser, out="runs/barlow_twins")
    if parser.parse_known_args(argv)[0].data is None:
        parser.set_defaults(arch="resnet18", image_size=64, epochs=5, batch_size=128, lr=4.0,
                            warmup=1, p_blur=[0.0, 0.0], dim=128, lambd=0.1)
    return parser.parse_args(argv)


def two_views(image, size, scale):
    """Two independent crops of one image (3, H, W)."""
    return random_resized_crop(image, size, scale), random_resized_crop(image, size, scale)


def cross_correlation(z1, z2):
    """Eq. (2), over the rows of all processes: z1, z2 (N, D) of this one -> (D, D) float32."""
    number = len(z1) * world_size()
    z = torch.stack([z1, z2])  # (2, N, D)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(z.device.type, enabled=False):
        z = z - summed(z.sum(1, keepdim=True)) / number
        z = z / (summed((z ** 2).sum(1, keepdim=True)) / number + 1e-5).sqrt()
        return summed(z[0].T @ z[1]) / number


def barlow_twins_loss(z1, z2, lambd=0.0051):
    """Eq. (1) of embeddings (N, D) -> a float32 scalar, and its two sums, not weighted.

    The same in all processes; 0 where z1 = z2 have D unrelated dimensions (more rows than D at
    least), D where they are constant.
    """
    c = cross_correlation(z1, z2)
    diagonal = c.diagonal()
    invariance = ((1 - diagonal) ** 2).sum()
    redundancy = ((c - diagonal.diag()) ** 2).sum()
    return invariance + lambd * redundancy, dict(invariance=invariance.detach(),
                                                 redundancy=redundancy.detach())


class BarlowTwins(nn.Module):
    """Algorithm 1, up to the loss."""

    def __init__(self, arch="resnet50", dim=2048, lambd=0.0051):
        super().__init__()
        self.stages, self.lambd = backbone_stages(arch), lambd
        self.projector = MLP(self.stages.channels[-1], [dim] * 3, norm_layer=nn.BatchNorm1d,
                             bias=False)  # batch norm and ReLU between

    def embed(self, images):
        """(B, 3, H, W) -> (B, D)."""
        last = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return self.projector(last.mean((2, 3)))

    def forward(self, view1, view2):
        """Two views (B, 3, H, W) -> loss, what to log: besides its sums the deviations of this
        process's embeddings, their mean over the dimensions of each view, and the least one."""
        z1, z2 = self.embed(view1), self.embed(view2)  # (B, D) each
        loss, parts = barlow_twins_loss(z1, z2, self.lambd)
        spread = torch.stack([z1, z2]).detach().float().std(1, correction=0)  # (2, D)
        return loss, dict(parts, deviation_1=spread[0].mean(), deviation_2=spread[1].mean(),
                          deviation_least=spread.min())


def schedule(step, steps, warmup):
    """Factor of the learning rates: linear for ``warmup`` steps, then a cosine from 1 to 0.001."""
    if step < warmup:
        return (step + 1) / warmup
    rest = (step - warmup) / max(1, steps - warmup)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * rest)) / 2


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf), lr_biases=(0, inf),
          weight_decay=(0, inf), warmup=(0, inf), image_size=(8, inf), crop_scale=(1e-3, 1),
          p_blur=(0, 1), mean=(0, 1), std=(1e-3, 1), dim=(1, inf), lambd=(0, inf),
          scenes=(1, inf), workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    images = unlabelled(args.data, args.scenes)
    if args.measure_normalisation:
        return measure_normalisation(images, args.workers)
    per_epoch = steps_per_epoch(images, args.batch_size)
    if args.batch_size < 2 * (world_size() if device.type == "cpu" else 1):
        raise InputError(f"batch size {args.batch_size}: batch norm needs two images a process")

    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.dim, args.lambd)
    model = model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    lr = args.lr
    if lr is None:
        lr = float(np.interp(np.log2(args.batch_size), np.log2([*LEARNING_RATES]),
                             [*LEARNING_RATES.values()]))
    rates = [rate * args.batch_size / 256 for rate in (lr, args.lr_biases)]
    steps, parameters = args.epochs * per_epoch, [*model.parameters()]
    groups = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    optimizer = LARS([dict(params=group) for group in groups], rates[0],
                     weight_decay=args.weight_decay)
    run = Run(args, "barlow_twins", images, steps, per_epoch,
              dict(model=model, optimizer=optimizer))
    why = "for this batch size" if args.lr is None else "as asked"
    run.say(f"lr {lr:.3g} for each 256 images, {why}: {rates[0]:.3g} with {args.batch_size}")

    def batches(steps):
        """(step, [view1, view2]) on the device, their colours drawn from (seed, step, rank)."""
        cut = partial(two_views, size=args.image_size, scale=(args.crop_scale, 1.0))
        loader = load_batches(images, cut, args.batch_size, steps, args.seed, args.workers)
        for step, views in zip(steps, loader):
            torch.manual_seed(seed_for(args.seed, step, rank()))
            yield step, [
                photometric(view.pixels.to(device, non_blocking=True), (0.4, 0.4, 0.2, 0.1),
                            p_blur=p_blur, p_solarize=p_solarize, mean=args.mean, std=args.std)
                for view, p_blur, p_solarize in zip(views, args.p_blur, (0.0, 0.2))]

    mixed = mixed_precision(args, device, args.image_size)
    for step, views in batches(range(run.step, steps)):
        factor = schedule(step, steps, args.warmup * per_epoch)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = factor * rate
        with mixed:
            loss, parts = ddp(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, factor * rates[0], **parts)

    _, views = next(batches(range(steps, steps + 1)))  # of an epoch that is never trained on
    with torch.no_grad(), mixed:
        z1, z2 = (all_gather(model.eval().embed(view).float()) for view in views)
    if rank() == 0:
        draw_correlation(z1, z2, run.out / "correlation.png")
        export_backbone(model.stages, run.out / "backbone.pt")
    run.say(f"{run.out / 'backbone.pt'} is the pre-trained backbone, correlation.png shows C")


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
