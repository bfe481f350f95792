"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., ICML 2021,
arXiv 2103.03230).

Two crops of one image go through one network.  Over a batch, each dimension of the one embedding is
to be correlated with the same dimension of the other, and with no other dimension: so the two
embeddings agree, and still hold D different features.

Read first: moco_v2.py.  What falls away: the queue, the momentum encoder, the temperature.

Symbols
    paper      code            shape
    Y^A, Y^B   view1, view2    (B, 3, H, W)    two views of the same images
    f          embed                           ResNet (or Swin), average pool, three linear layers
    Z^A, Z^B   z1, z2          (N, D)          embeddings, N = B per process
    C          c               (D, D)          cross-correlation over the batch of all processes
    lambda     lambd                           weight of the redundancy

Equations
    (1)  L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j!=i} C_ij^2                barlow_twins_loss
    (2)  C_ij = sum_b z^A_bi z^B_bj / (|z^A_.i| |z^B_.j|), each centred         cross_correlation
    Algorithm 1                                                                 BarlowTwins.forward
    warm-up and cosine of the learning rates (Section 2.2)                 common.cosine_schedule

Commands
    python barlow_twins.py                                       built-in scenes, minutes on a CPU
    python barlow_twins.py --data DIR --measure-normalisation    what --mean and --std should be
    torchrun barlow_twins.py --data DIR --batch-size 256         one GPU
    torchrun --nproc_per_node=8 barlow_twins.py --data DIR       eight
    torchrun --nproc_per_node=8 barlow_twins.py --data DIR --arch swin_t --out runs/barlow_swin
    python finetune_fasterrcnn.py --weights runs/barlow_twins/backbone.pt --optimizer adam

"The report" is Rajamohan, Liu and Wang, who pre-trained for detection on half a million images.
"""
from argparse import BooleanOptionalAction
from functools import partial

import torch
from torch import nn

from common import LARS, all_reduce_sum, backbone_stages, cosine_schedule, mlp, world_size
from plumbing.flags import (Parser, add_data_arguments, add_normalisation_arguments,
                            add_run_arguments, fit_recipe, interpolate_rate, parse_recipe, real,
                            whole)
from plumbing.images import (Photos, augment_colour, measure_normalisation, open_images,
                             two_views)
from plumbing.run import Run, distribute, launch, mixed_precision

# Differs: the learning rate of weights follows the batch size, as the authors advise for 300 epochs
# (github.com/facebookresearch/barlowtwins/issues/7); batch size -> rate per 256 images
LEARNING_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}


def cross_correlation(z1, z2):
    """Eq. (2), over the rows of all processes: z1, z2 (N, D) of this one -> (D, D) float32."""
    rows = len(z1) * world_size()
    z = torch.stack([z1, z2])  # (2, N, D)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(z.device.type, enabled=False):
        z = z - all_reduce_sum(z.sum(1, keepdim=True)) / rows
        # Paper silent: 1e-5 is added to the variance, as by the batch norm of the authors' code
        z = z / (all_reduce_sum((z ** 2).sum(1, keepdim=True)) / rows + 1e-5).sqrt()
        return all_reduce_sum(z[0].T @ z[1]) / rows


def barlow_twins_loss(z1, z2, lambd=0.0051):
    """Eq. (1) of embeddings (N, D) -> a float32 scalar, and its two sums, not weighted.

    The same in all processes; 0 where z1 = z2 and their D dimensions are unrelated (which takes
    more than D rows), D where they are constant.
    """
    c = cross_correlation(z1, z2)
    diagonal = c.diagonal()
    invariance = ((1 - diagonal) ** 2).sum()
    redundancy = ((c - diagonal.diag()) ** 2).sum()
    return invariance + lambd * redundancy, dict(invariance=invariance.detach(),
                                                 redundancy=redundancy.detach())


class BarlowTwins(nn.Module):
    """Algorithm 1, up to the loss."""

    def __init__(self, arch="resnet50", dim=2048, lambd=0.0051, zero_init_residual=True):
        super().__init__()
        self.lambd = lambd
        self.stages = backbone_stages(arch, zero_init_residual)
        # Differs: 2048 wide, as in the report; the paper's is 8192 wide
        self.projector = mlp(self.stages.channels[-1], [dim] * 3, norm_layer=nn.BatchNorm1d,
                             bias=False)  # batch norm and ReLU between

    def embed(self, images):
        """(B, 3, H, W) -> (B, D)."""
        res5 = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return self.projector(res5.mean((2, 3)))

    def forward(self, view1, view2):
        """Two views (B, 3, H, W) -> loss, what to log: besides its sums, the dimensions' standard
        deviations over this process's embeddings: each view's mean, and the least of all."""
        z1, z2 = self.embed(view1), self.embed(view2)  # (B, D) each
        loss, parts = barlow_twins_loss(z1, z2, self.lambd)
        deviation = torch.stack([z1, z2]).detach().float().std(1, correction=0)  # (2, D)
        return loss, dict(parts, deviation_1=deviation[0].mean(), deviation_2=deviation[1].mean(),
                          deviation_least=deviation.min())


def train(args, device):
    """Pre-train as ``args`` say; all results go into the folder of the run."""
    images = open_images(args.data, args.scenes)
    fit_recipe(args, len(images))
    if args.measure_normalisation:
        return measure_normalisation(images, args.workers)
    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.dim, args.lambd, args.zero_init_residual)
    model, ddp = distribute(model, device, sync_batch_norm=True)
    rate = interpolate_rate(LEARNING_RATES, args.batch_size) if args.lr is None else args.lr
    weights = [p for p in model.parameters() if p.ndim > 1]
    # Differs: biases keep 0.0048 at every batch size; where the authors advise another rate for the
    # weights, that of biases is 0.024 of it (0.0096 at batch size 256)
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = LARS([dict(params=weights, lr=rate * args.batch_size / 256),
                      dict(params=biases, lr=args.lr_biases * args.batch_size / 256)],
                     lr=0.0, weight_decay=args.weight_decay)
    run = Run(args, "barlow_twins", images, model=model, optimizer=optimizer)
    run.say(f"lr {rate:.3g} per 256 images: {rate * args.batch_size / 256:.3g} for "
            f"{args.batch_size}")
    # Differs: bfloat16 on GPUs, float16 in the authors' code; the loss is float32
    mixed = mixed_precision(args, device, args.image_size)

    def batches(steps=None):
        """(step, view1, view2) on the device, of all steps still to do or of ``steps``."""
        # Crops are resized bicubically, as BYOL's, whose augmentation Sec. 2.2 takes
        cut = partial(two_views, size=args.image_size, scale=(args.crop_scale, 1.0),
                      interpolation="bicubic")
        colours = dict(jitter=(0.4, 0.4, 0.2, 0.1), mean=args.mean, std=args.std)
        photos = Photos(images, (args.image_size, args.crop_scale))
        for step, views in run.batches(photos, cut, steps):
            pixels1, pixels2 = (view.pixels.to(device, non_blocking=True) for view in views)
            yield (step, augment_colour(pixels1, p_blur=args.p_blur[0], **colours),
                   augment_colour(pixels2, p_blur=args.p_blur[1], p_solarize=0.2, **colours))

    warmup = args.warmup * run.steps_per_epoch
    for step, view1, view2 in batches():
        # The cosine ends at 0.001 of the rate: "by a factor of 1000" (Sec. 2.2)
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps, warmup, end=0.001))
        with mixed:
            loss, parts = ddp(view1, view2)
        # Differs: on several processes the gradients are those of one process with the whole batch;
        # the authors' are divided by the number of processes, which matters to biases alone (LARS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, **parts)

    run.draw_correlation(model, batches, mixed)
    run.finish(model.stages, "the pre-trained backbone, correlation.png shows C")


def parse_args(argv=None):
    """The report's recipe by default; without --data, a small one for the built-in scenes."""
    parser = Parser(description="Pre-train a backbone with Barlow Twins.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (section of the paper)").add_argument
    add("--arch", default="resnet50", help="torchvision's name of a ResNet or Swin Transformer")
    # Differs: not in the small recipe, in whose few steps the blocks hardly leave the identity, and
    # all methods start alike (RESULTS.md)
    add("--zero-init-residual", action=BooleanOptionalAction, default=True, help="residual blocks "
        "start as the identity (the authors' code); not in the small recipe")
    # Differs: 150 epochs and crops of at least 40%, as in the report; the paper's are 1000 and 8%
    add("--epochs", type=whole(1), default=150, help="passes over the images (the report, Sec. 2)")
    add("--batch-size", type=whole(2), default=2048, help="total over all processes (Sec. 2.2)")
    add("--lr", type=real(0), help="of weights, per 256 images (Sec. 2.2; default: by batch size, "
        "0.2 for 2048 to 0.7 for 128)")
    add("--lr-biases", type=real(0), default=0.0048, help="of biases and batch norm, per "
        "256 images (Sec. 2.2)")
    # Differs: decay (paper: 1.5e-6) and lambda (0.005) are as in the authors' code
    add("--weight-decay", type=real(0), default=1e-6, help="of weights (the authors' code)")
    add("--warmup", type=whole(0), default=10, help="epochs of linear growth of the lr (Sec. 2.2)")
    add("--image-size", type=whole(8), default=224, help="side of a view in pixels (Sec. 2.2)")
    add("--crop-scale", type=real(1e-3, 1), default=0.4, help="smallest crop's share of the area")
    add("--p-blur", type=real(0, 1), nargs=2, default=[1.0, 0.1], metavar="P",
        help="chance of a blur in each view")
    add_normalisation_arguments(add)
    add("--dim", type=whole(1), default=2048, help="D, and the hidden layers' width (the report)")
    add("--lambd", type=real(0), default=0.0051, help="lambda (the authors' code)")
    add("--measure-normalisation", action="store_true", help="print --mean and --std of the images")
    add_run_arguments(parser, out="runs/barlow_twins")
    return parse_recipe(
        parser, argv, small=dict(zero_init_residual=False, image_size=64, lr=4.0,
                                 p_blur=[0.0, 0.0], dim=128, lambd=0.1),
        scenes=dict(epochs=5, batch_size=128))


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
