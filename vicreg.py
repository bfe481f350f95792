"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes, Ponce
and LeCun, ICLR 2022, arXiv 2105.04906).

Two crops of one image go through one network, and their embeddings shall be near to each other.
Two more terms of the loss forbid that all images become one: every dimension must vary over the
batch, and no two dimensions may vary together.

Read first: barlow_twins.py.  What changes: the loss; each batch of embeddings is kept from collapse
by itself, not through the other.

Symbols
    paper      code            shape
    X, X'      view1, view2    (B, 3, H, W)    two views of the same images
    h o f      embed                           ResNet (or Swin), average pool, three linear layers
    Z, Z'      z1, z2          (N, D)          embeddings, N = B a process; the paper's n and d
    C          matrices        (2, D, D)       covariances of Z and of Z' over all processes

Equations
    (1)  v(Z) = sum_j max(0, 1 - S(z_j)) / d                      vicreg_loss
    (2)  S(x) = sqrt(Var(x) + 0.0001)                             vicreg_loss
    (3)  C(Z) = sum_i (z_i - mean) (z_i - mean)^T / (n - 1)       covariances
    (4)  c(Z) = sum_{i!=j} C(Z)_ij^2 / d                          vicreg_loss
    (5)  s(Z, Z') = sum_i |z_i - z'_i|^2 / n                      vicreg_loss
    (6)  l = 25 s(Z, Z') + 25 [v(Z) + v(Z')] + [c(Z) + c(Z')]     vicreg_loss
    Algorithm 1                                                   VICReg.forward

Commands
    python vicreg.py                                       built-in scenes, minutes on a CPU
    python vicreg.py --data DIR --measure-normalisation    what --mean and --std should be
    torchrun vicreg.py --data DIR --batch-size 256         one GPU
    torchrun --nproc_per_node=8 vicreg.py --data DIR       eight
    python finetune_fasterrcnn.py --weights runs/vicreg/backbone.pt --optimizer adam

Where this differs from the paper, or it is silent
    - s is the mean over the d dimensions too, as in Algorithm 1 and the authors' code, not as in
      Eq. (5).  Of [v(Z) + v(Z')] half is taken, as in that code alone.
    - A projector 2048 wide (the paper's: 8192), crops of at least 40% of the image (8%) and 100
      epochs (1000) are those of a report by Rajamohan, Liu and Wang, who pre-trained for detection
      with half a million images.
    - The learning rate is that of 100 epochs and follows the batch size: LEARNING_RATES (appendix
      C.4), interpolated on the logarithm of the batch size, below 128 as for 128; the paper's 0.2
      is for 1000 epochs.
    - Each view has its own chances of blur and solarize, as in the authors' code; the paper's are
      0.5 and 0.1 in both.  The cosine ends at 0.001 of the learning rate, as there: 0.0016 for the
      paper's 1.6, of which it prints a final value of 0.002.
    - The last batch norm of a residual block starts at one, the authors' at zero.
    - Batch norm is synchronised over processes on GPUs; on CPUs each process has its own.  bfloat16
      on GPUs; the loss is float32 (its matrix product TF32).
"""
import argparse
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import MLP

from common import (IMAGENET_MEAN, IMAGENET_STD, LARS, InputError, Run, add_run_arguments,
                    all_gather, backbone_stages, check, draw_correlation, export_backbone, launch,
                    load_batches, measure_normalisation, mixed_precision, photometric,
                    random_resized_crop, rank, seed_for, steps_per_epoch, summed, unlabelled,
                    world_size)

LEARNING_RATES = {128: 0.8, 256: 0.5, 512: 0.4, 1024: 0.3, 2048: 0.3}  # of a batch size


def parse_args(argv=None):
    """The report's recipe by default; without --data, a small one for the built-in scenes."""
    parser = argparse.ArgumentParser(description="Pre-train a backbone with VICReg.")
    add = parser.add_argument_group("recipe (section of the paper)").add_argument
    parser.add_argument("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet or Swin Transformer")
    add("--epochs", type=int, default=100, help="passes over the images (the report)")
    add("--batch-size", type=int, default=2048, help="of all processes together (4.2)")
    add("--lr", type=float, help="for each 256 images (C.4; default: by batch size, 0.3 for 2048 "
        "to 0.8 for 128)")
    add("--weight-decay", type=float, default=1e-6, help="none on biases and batch norm (4.2)")
    add("--warmup", type=int, default=10, help="epochs of linear growth of the lr (4.2)")
    add("--image-size", type=int, default=224, help="side of a view in pixels")
    add("--crop-scale", type=float, default=0.4, help="least share of the image in a view (the "
        "report)")
    add("--p-blur", type=float, nargs=2, default=[1.0, 0.1], metavar="P", help="each view's")
    add("--mean", type=float, nargs=3, default=[*IMAGENET_MEAN], metavar="M", help="of red, green "
        "and blue, in 0..1 (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[*IMAGENET_STD], metavar="S", help="their deviations")
    add("--dim", type=int, default=2048, help="D, and the hidden layers' width (the report)")
    add("--invariance", type=float, default=25.0, help="lambda, weight of s (4.2)")
    add("--variance", type=float, default=25.0, help="mu, weight of v (4.2)")
    add("--covariance", type=float, default=1.0, help="nu, weight of c (4.2)")
    add("--scenes", type=int, default=4000, help="number of built-in scenes without --data")
    add("--measure-normalisation", action="store_true", help="print --mean and --std of the images")
    add_run_arguments(parser, out="runs/vicreg")
    if parser.parse_known_args(argv)[0].data is None:
        parser.set_defaults(arch="resnet18", image_size=64, epochs=5, batch_size=128, lr=2.0,
                            warmup=1, p_blur=[0.0, 0.0], dim=128)
    return parser.parse_args(argv)


def two_views(image, size, scale):
    """Two independent crops of one image (3, H, W)."""
    return random_resized_crop(image, size, scale), random_resized_crop(image, size, scale)


def covariances(z):
    """Eq. (3), over the rows of all processes: z (2, N, D), two batches here -> (2, D, D).  There
    must be two rows.  N rows in all give a rank of N - 1 at most: where that is less than D and all
    dimensions vary, some of them covary."""
    number = z.shape[1] * world_size()
    z = z - summed(z.sum(1, keepdim=True)) / number
    return summed(z.mT @ z) / (number - 1)


def vicreg_loss(z1, z2, invariance=25.0, variance=25.0, covariance=1.0):
    """Eq. (6) of embeddings (N, D), with the weights of its terms -> a float32 scalar, and the
    three terms, not weighted.  The same in all processes."""
    z = torch.stack([z1, z2])  # (2, N, D)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(z.device.type, enabled=False):
        matrices = covariances(z)  # (2, D, D), Eq. (3)
        s = summed(((z[0] - z[1]) ** 2).mean()) / world_size()  # Eq. (5)
    variances = matrices.diagonal(dim1=1, dim2=2)  # (2, D)
    deviation = (variances + 0.0001).sqrt()  # Eq. (2)
    v = F.relu(1 - deviation).mean()  # Eq. (1), half of each
    others = matrices - torch.diag_embed(variances)
    c = (others ** 2).sum() / z.shape[2]  # Eq. (4), of both
    loss = invariance * s + variance * v + covariance * c  # Eq. (6)
    return loss, {name: term.detach()
                  for name, term in (("invariance", s), ("variance", v), ("covariance", c))}


class VICReg(nn.Module):
    """Algorithm 1, up to the loss.  ``weights``: of invariance, variance and covariance."""

    def __init__(self, arch="resnet50", dim=2048, weights=(25.0, 25.0, 1.0)):
        super().__init__()
        self.stages, self.weights = backbone_stages(arch), weights
        self.projector = MLP(self.stages.channels[-1], [dim] * 3, norm_layer=nn.BatchNorm1d,
                             bias=False)  # batch norm and ReLU between

    def embed(self, images):
        """(B, 3, H, W) -> (B, D)."""
        last = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return self.projector(last.mean((2, 3)))

    def forward(self, view1, view2):
        """Two views (B, 3, H, W) -> loss, what to log: besides its terms the deviations of this
        process's embeddings, their mean over the dimensions of each view, and the least one."""
        z1, z2 = self.embed(view1), self.embed(view2)  # (B, D) each
        loss, parts = vicreg_loss(z1, z2, *self.weights)
        spread = torch.stack([z1, z2]).detach().float().std(1, correction=0)  # (2, D)
        return loss, dict(parts, deviation_1=spread[0].mean(), deviation_2=spread[1].mean(),
                          deviation_least=spread.min())


def schedule(step, steps, warmup):
    """Factor of the learning rate: linear for ``warmup`` steps, then a cosine from 1 to 0.001."""
    if step < warmup:
        return (step + 1) / warmup
    rest = (step - warmup) / max(1, steps - warmup)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * rest)) / 2


def train(args, device):
    """Pre-train as ``args`` say; the run's folder holds everything that comes of it."""
    inf = math.inf
    check(args, epochs=(1, inf), batch_size=(1, inf), lr=(0, inf),
          weight_decay=(0, inf), warmup=(0, inf), image_size=(8, inf), crop_scale=(1e-3, 1),
          p_blur=(0, 1), mean=(0, 1), std=(1e-3, 1), dim=(1, inf), invariance=(0, inf),
          variance=(0, inf), covariance=(0, inf), scenes=(1, inf), workers=(0, inf),
          seed=(0, inf), log_every=(1, inf))
    images = unlabelled(args.data, args.scenes)
    if args.measure_normalisation:
        return measure_normalisation(images, args.workers)
    per_epoch = steps_per_epoch(images, args.batch_size)
    if args.batch_size < 2 * (world_size() if device.type == "cpu" else 1):
        raise InputError(f"batch size {args.batch_size}: batch norm needs two images a process")

    torch.manual_seed(args.seed)
    weights = args.invariance, args.variance, args.covariance
    model = VICReg(args.arch, args.dim, weights)
    model = model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    lr = args.lr
    if lr is None:
        lr = float(np.interp(np.log2(args.batch_size), np.log2([*LEARNING_RATES]),
                             [*LEARNING_RATES.values()]))
    base_lr, steps = lr * args.batch_size / 256, args.epochs * per_epoch
    optimizer = LARS(model.parameters(), base_lr, weight_decay=args.weight_decay)
    run = Run(args, "vicreg", images, steps, per_epoch,
              dict(model=model, optimizer=optimizer))
    why = "for this batch size" if args.lr is None else "as asked"
    run.say(f"lr {lr:.3g} for each 256 images, {why}: {base_lr:.3g} with {args.batch_size}")

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
        lr = base_lr * schedule(step, steps, args.warmup * per_epoch)
        optimizer.param_groups[0]["lr"] = lr
        with mixed:
            loss, parts = ddp(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, **parts)

    _, views = next(batches(range(steps, steps + 1)))  # of an epoch that is never trained on
    with torch.no_grad(), mixed:
        z1, z2 = (all_gather(model.eval().embed(view).float()) for view in views)
    if rank() == 0:
        draw_correlation(z1, z2, run.out / "correlation.png")
        export_backbone(model.stages, run.out / "backbone.pt")
    run.say(f"{run.out / 'backbone.pt'} is the pre-trained backbone, correlation.png shows how "
            "the dimensions of two views correlate")


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
