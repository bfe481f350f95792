"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes, Ponce
and LeCun, ICLR 2022, arXiv 2105.04906).

Two crops of one image go through one network, and their embeddings are to be near each other.  Two
more terms of the loss prevent collapse to one embedding: every dimension has to vary over the
batch, and no two dimensions may vary together.

Read first: barlow_twins.py.  What changes: the loss, whose variance and covariance terms keep each
branch from collapsing on its own, without the other.

Symbols
    paper      code            shape
    X, X'      view1, view2    (B, 3, H, W)    two views of the same images
    h o f      embed                           ResNet (or Swin), average pool, three linear layers
    Z, Z'      z1, z2          (N, D)          embeddings (paper: n x d), N = B per process
    C          c               (2, D, D)       covariances of Z and of Z', over all processes
    lambda, mu, nu   lambda_, mu, nu           weights of invariance, variance and covariance

Equations
    (1), (2)  v(Z) = sum_j max(0, 1 - sqrt(Var(z_j) + 0.0001)) / d     variance_term
    (3)  C(Z) = sum_i (z_i - mean) (z_i - mean)^T / (n - 1)            covariances
    (4)  c(Z) = sum_{i!=j} C(Z)_ij^2 / d                               covariance_term
    (5)  s(Z, Z') = sum_i |z_i - z'_i|^2 / n                           invariance_term
    (6)  lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]       vicreg_loss
    Algorithm 1                                                        VICReg.forward

Commands
    python vicreg.py                                       built-in scenes, minutes on a CPU
    python vicreg.py --data DIR --measure-normalisation    what --mean and --std should be
    torchrun vicreg.py --data DIR --batch-size 256         one GPU
    torchrun --nproc_per_node=8 vicreg.py --data DIR       eight
    python finetune_fasterrcnn.py --weights runs/vicreg/backbone.pt --optimizer adam

"The report" is Rajamohan, Liu and Wang, who pre-trained for detection on half a million images.
"""
from argparse import BooleanOptionalAction
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import LARS, all_reduce_sum, backbone_stages, cosine_schedule, mlp, world_size
from plumbing.flags import (Parser, add_data_arguments, add_normalisation_arguments,
                            add_run_arguments, fit_recipe, interpolate_rate, parse_recipe, real,
                            whole)
from plumbing.images import (Photos, augment_colour, measure_normalisation, open_images,
                             two_views)
from plumbing.run import Run, distribute, launch, mixed_precision

# Differs: the learning rate is that of 100 epochs (appendix C.4) and follows the batch size; the
# paper's 0.2 is for 1000 epochs.  For 512 the README of the authors' code has 0.3; which one is
# right they have not said (github.com/facebookresearch/vicreg/issues/23).
# batch size -> rate per 256 images
LEARNING_RATES = {128: 0.8, 256: 0.5, 512: 0.4, 1024: 0.3, 2048: 0.3}


def covariances(z):
    """Eq. (3), over the rows of all processes: Z and Z' (2, N, D) of this one -> (2, D, D).

    Needs at least two rows in all.  n rows give a rank of n - 1 at most: if that is less than D and
    all dimensions vary, some of them covary.
    """
    rows = z.shape[1] * world_size()
    z = z - all_reduce_sum(z.sum(1, keepdim=True)) / rows
    return all_reduce_sum(z.mT @ z) / (rows - 1)


def variance_term(c):
    """[v(Z) + v(Z')] / 2, Eq. (1) and (2), of their covariances (2, D, D) -> a scalar."""
    deviation = (c.diagonal(dim1=1, dim2=2) + 0.0001).sqrt()  # (2, D)
    return F.relu(1 - deviation).mean()


def covariance_term(c):
    """c(Z) + c(Z'), Eq. (4), of their covariances (2, D, D) -> a scalar."""
    off_diagonal = c - torch.diag_embed(c.diagonal(dim1=1, dim2=2))
    return (off_diagonal ** 2).sum() / c.shape[2]


def invariance_term(z):
    """s(Z, Z'), Eq. (5), over the rows of all processes: (2, N, D) of this one -> a scalar."""
    # Differs: the mean over the d dimensions too, as in Algorithm 1 and the authors' code
    return all_reduce_sum(((z[0] - z[1]) ** 2).mean()) / world_size()


def vicreg_loss(z1, z2, lambda_=25.0, mu=25.0, nu=1.0):
    """Eq. (6) of embeddings (N, D), with the weights of its terms -> a float32 scalar, and the
    three terms, not weighted.  The same in all processes."""
    z = torch.stack([z1, z2])  # (2, N, D)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(z.device.type, enabled=False):
        c = covariances(z)  # (2, D, D)
        # Differs: half of [v(Z) + v(Z')], as in the authors' code; Algorithm 1 has all of it
        invariance, variance, covariance = invariance_term(z), variance_term(c), covariance_term(c)
        loss = lambda_ * invariance + mu * variance + nu * covariance
    return loss, dict(invariance=invariance.detach(), variance=variance.detach(),
                      covariance=covariance.detach())


class VICReg(nn.Module):
    """Algorithm 1, up to the loss.  ``weights``: of invariance, variance and covariance."""

    def __init__(self, arch="resnet50", dim=2048, weights=(25.0, 25.0, 1.0),
                 zero_init_residual=True):
        super().__init__()
        self.weights = weights
        self.stages = backbone_stages(arch, zero_init_residual)
        # Differs: 2048 wide, as in the report; the paper's is 8192 wide
        self.projector = mlp(self.stages.channels[-1], [dim] * 3, norm_layer=nn.BatchNorm1d,
                             bias=False)  # batch norm and ReLU between

    def embed(self, images):
        """(B, 3, H, W) -> (B, D)."""
        res5 = self.stages(images)[-1]  # (B, C, H/32, W/32)
        return self.projector(res5.mean((2, 3)))

    def forward(self, view1, view2):
        """Two views (B, 3, H, W) -> loss, what to log: besides its terms, the dimensions' standard
        deviations over this process's embeddings: each view's mean, and the least of all."""
        z1, z2 = self.embed(view1), self.embed(view2)  # (B, D) each
        loss, parts = vicreg_loss(z1, z2, *self.weights)
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
    weights = args.invariance, args.variance, args.covariance
    model = VICReg(args.arch, args.dim, weights, args.zero_init_residual)
    model, ddp = distribute(model, device, sync_batch_norm=True)
    rate = interpolate_rate(LEARNING_RATES, args.batch_size) if args.lr is None else args.lr
    optimizer = LARS(model.parameters(), rate * args.batch_size / 256,
                     weight_decay=args.weight_decay)
    run = Run(args, "vicreg", images, model=model, optimizer=optimizer)
    run.say(f"lr {rate:.3g} per 256 images: {rate * args.batch_size / 256:.3g} for "
            f"{args.batch_size}")
    # Differs: bfloat16 on GPUs, float16 in the authors' code; the loss is float32
    mixed = mixed_precision(args, device, args.image_size)

    def batches(steps=None):
        """(step, view1, view2) on the device, of all steps still to do or of ``steps``."""
        # Differs: bicubic, as in the authors' code; C.1 has RandomResizedCrop(224), bilinear
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
        # Differs: the cosine ends at 0.001 of the rate, as in the authors' code: 0.0016 for the
        # paper's 1.6, of which it prints a final value of 0.002
        lr = run.scale_learning_rates(cosine_schedule(step, run.steps, warmup, end=0.001))
        with mixed:
            loss, parts = ddp(view1, view2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, **parts)

    run.draw_correlation(model, batches, mixed)
    run.finish(model.stages, "the pre-trained backbone, correlation.png shows how the "
               "dimensions of two views correlate")


def parse_args(argv=None):
    """The report's recipe by default; without --data, a small one for the built-in scenes."""
    parser = Parser(description="Pre-train a backbone with VICReg.")
    add_data_arguments(parser)
    add = parser.add_argument_group("recipe (section of the paper)").add_argument
    add("--arch", default="resnet50", help="torchvision's name of a ResNet or Swin Transformer")
    # Differs: not in the small recipe, where all methods start alike (RESULTS.md)
    add("--zero-init-residual", action=BooleanOptionalAction, default=True, help="residual blocks "
        "start as the identity (the authors' code); not in the small recipe")
    # Differs: 100 epochs and crops of at least 40%, as in the report; the paper's are 1000 and 8%
    add("--epochs", type=whole(1), default=100, help="passes over the images (the report)")
    add("--batch-size", type=whole(2), default=2048, help="total over all processes (Sec. 4.2)")
    add("--lr", type=real(0), help="per 256 images (appendix C.4; default: by batch size, 0.3 for "
        "2048 to 0.8 for 128)")
    add("--weight-decay", type=real(0), default=1e-6, help="none on biases and norms (Sec. 4.2)")
    add("--warmup", type=whole(0), default=10, help="epochs of linear growth of the lr (Sec. 4.2)")
    add("--image-size", type=whole(8), default=224, help="side of a view in pixels")
    add("--crop-scale", type=real(1e-3, 1), default=0.4, help="smallest crop's share of the area")
    # Differs: chances of blur and solarize per view, as in the authors' code; the paper's are 0.5
    # and 0.1 in both
    add("--p-blur", type=real(0, 1), nargs=2, default=[1.0, 0.1], metavar="P",
        help="chance of a blur in each view")
    add_normalisation_arguments(add)
    add("--dim", type=whole(1), default=2048, help="D, and the hidden layers' width (the report)")
    add("--invariance", type=real(0), default=25.0, help="lambda, weight of s (Sec. 4.2)")
    add("--variance", type=real(0), default=25.0, help="mu, weight of v (Sec. 4.2)")
    add("--covariance", type=real(0), default=1.0, help="nu, weight of c (Sec. 4.2)")
    add("--measure-normalisation", action="store_true", help="print --mean and --std of the images")
    add_run_arguments(parser, out="runs/vicreg")
    return parse_recipe(
        parser, argv, small=dict(zero_init_residual=False, image_size=64, lr=4.0,
                                 p_blur=[0.0, 0.0], dim=128),
        scenes=dict(epochs=5, batch_size=128))


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
