"""What the papers share and a reader must understand: the four stages of a backbone, batch norm as
on several GPUs, RoI Align on a pyramid, InfoNCE, the queue of negatives, the momentum encoder,
shuffling BN, mapping boxes into a view, LARS and the learning rate's schedule; and the
collectives that these need.

Letters: B images, C channels, H W pixels, D embedding size, K queue length, N rows fed to a loss or
boxes of a batch, P boxes per image, S cells along a side of a RoI.
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# torchvision is imported within functions: it takes as long to load as torch, and delays --help


class InputError(ValueError):
    """Something the user can put right; the commands print it as one line, without a traceback."""


# ------------------------------------------------------------------------------------- collectives


def rank():
    """The number of this process among those that train together: 0, 1, ..."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x):
    """x (n, ...) of each process -> (world_size n, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x
    gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
    # torch 2.14 renamed all_gather_into_tensor
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, x.contiguous())
    return gathered


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_ctx, gradient):
        return _AllReduceSum.apply(gradient)


def all_reduce_sum(x):
    """The sum of x over all processes, with its gradient.

    The loss of every process depends on the x of every process, so its gradient is a sum over
    processes as well; dist.all_reduce would keep only each process's own part of it.  A loss made
    of such sums is the same in all processes, and the parameters' gradients, averaged by
    DistributedDataParallel, are those of one process with the whole batch.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


# ------------------------------------------------------------------------------- views of an image


class View(NamedTuple):
    """A crop of an image, and where it was cut; for a batch, a View of stacked tensors."""

    pixels: torch.Tensor  # (3, H, W)
    box: torch.Tensor  # (4,) float, x1 y1 x2 y2 in the source image's pixels
    flipped: bool  # mirrored left to right after it was cut


def box_into_view(box, view_box, flipped, size):
    """Boxes of the source image -> the same places in the pixels of a view (T of DUPR, Sec. 3.2.1).

    box: (B, ..., 4); view_box: (B, 4), where the view was cut; both x1 y1 x2 y2 in the source
    image's pixels.  flipped: (B,) bool; size: side of the view in pixels.
    Returns (B, ..., 4), x1 < x2.
    """
    ones = (1,) * (box.dim() - 2)
    low, high = view_box.view(-1, *ones, 4).chunk(2, dim=-1)  # (B, ..., 2) each
    x1, y1 = ((box[..., :2] - low) / (high - low) * size).unbind(-1)  # (B, ...) each
    x2, y2 = ((box[..., 2:] - low) / (high - low) * size).unbind(-1)
    flipped = flipped.view(-1, *ones)
    return torch.stack([torch.where(flipped, size - x2, x1), y1,
                        torch.where(flipped, size - x1, x2), y2], dim=-1)


# ---------------------------------------------------------------------------------------- backbone


class _SplitBatchNorm(torch.autograd.Function):
    """torch's batch norm of each group, written straight into the group's part of the output: a
    torch.cat of the groups would read and write every activation once more."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, groups, momentum, eps):
        y = torch.empty_like(x)
        means, invstds = weight.new_empty(2, groups, len(weight))  # 1 / sqrt(variance + eps)
        for i, (part, out) in enumerate(zip(x.chunk(groups), y.chunk(groups))):
            # such that each group's share in the running statistics is momentum / groups in the end
            share = momentum / (groups - momentum * (groups - 1 - i))
            torch.native_batch_norm(part, weight, bias, running_mean, running_var, True, share, eps,
                                    out=(out, means[i], invstds[i]))
        ctx.save_for_backward(x, weight, means, invstds)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, means, invstds = ctx.saved_tensors
        backward, groups = torch.ops.aten.native_batch_norm_backward, len(means)
        of_x, *of_weight_and_bias = zip(*(
            backward(g, part, weight, None, None, mean, invstd, True, ctx.eps, [True] * 3)
            for g, part, mean, invstd in zip(gradient.chunk(groups), x.chunk(groups), means,
                                             invstds)))
        of_weight, of_bias = torch.stack(sum(of_weight_and_bias, ())).unflatten(
            0, (2, groups)).sum(1)
        return torch.cat(of_x), of_weight, of_bias, *[None] * 5


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over ``groups`` equal, consecutive parts of the batch, as on that many GPUs.

    It lets one process train as several do, and gives shuffling BN something to shuffle between.
    Running statistics are the mean over the groups.  In eval mode, and in its state dict, it is
    BatchNorm2d.  Raises InputError if the groups do not divide the batch, or hold one value of each
    channel.
    """

    def __init__(self, num_features, groups=1, **kwargs):
        super().__init__(num_features, **kwargs)
        self.groups = groups

    def forward(self, x):
        if self.training and x.numel() == self.groups * x.shape[1]:
            raise InputError(f"a batch norm group would hold one value of each channel ({len(x)} "
                             f"images in {self.groups} groups, {x.shape[2]} x {x.shape[3]} left)")
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise InputError(f"{self.groups} batch norm groups do not divide a batch of {len(x)}")
        self.num_batches_tracked += 1
        return _SplitBatchNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var,
                                     self.groups, self.momentum, self.eps)


def batch_norm_groups(groups, batch_size):
    """One process's share of ``groups`` parts of the global batch.  Raises InputError if processes
    or images cannot be shared out equally."""
    if groups % world_size():
        raise InputError(f"{groups} batch norm groups cannot be split evenly over "
                         f"{world_size()} processes: give --bn-groups a multiple of that")
    if batch_size % groups:
        raise InputError(f"batch size {batch_size} does not divide into {groups} batch norm groups")
    return groups // world_size()


class ResNetStages(nn.Module):
    """torchvision's ResNet without its classifier, under the same parameter names.

    (B, 3, H, W) -> [Res2, Res3, Res4, Res5], (B, C_i, H/s, W/s) with s = 4, 8, 16, 32; C_i is
    ``channels[i]``.  Only the first ``depth`` stages are computed; the others do not train.
    """

    def __init__(self, resnet, depth=4):
        super().__init__()
        for name, module in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        self.channels = [resnet.fc.in_features // divisor for divisor in (8, 4, 2, 1)]
        self.depth = depth
        for i in range(depth, 4):
            getattr(self, f"layer{i + 1}").requires_grad_(False)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = []
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
            stages.append(x)
        return stages


def resnet_stages(arch, norm_layer=nn.BatchNorm2d, depth=4, zero_init_residual=False):
    """The torchvision ResNet called ``arch``, randomly initialised, as ResNetStages.

    zero_init_residual: the last batch norm of each residual block starts at 0, so that the block
    passes on its input (Goyal et al. 2017, arXiv 1706.02677, Sec. 5.1).
    """
    import torchvision
    known = torchvision.models.list_models(torchvision.models, include="*resne*")
    if arch not in known:
        raise InputError(f"unknown architecture {arch} (known: {', '.join(known)})")
    resnet = torchvision.models.get_model(arch, weights=None, norm_layer=norm_layer,
                                          zero_init_residual=zero_init_residual)
    return ResNetStages(resnet, depth)


class SwinStages(nn.Module):
    """torchvision's Swin Transformer without its classifier, under the same parameter names.

    (B, 3, H, W) -> four stages (B, C_i, H/s, W/s), s = 4, 8, 16, 32, as ResNetStages returns them;
    the last one after the network's final layer norm.
    """

    def __init__(self, swin):
        super().__init__()
        self.features, self.norm = swin.features, swin.norm
        self.channels = [swin.head.in_features // divisor for divisor in (8, 4, 2, 1)]

    def forward(self, x):
        stages = []
        for i, module in enumerate(self.features):  # patches, stage, merging, stage, ..., stage
            x = module(x)  # (B, H/s, W/s, C)
            if i % 2:
                stages.append(x)
        stages[-1] = self.norm(x)
        return [stage.permute(0, 3, 1, 2) for stage in stages]


def backbone_stages(arch, zero_init_residual=False):
    """The torchvision Swin Transformer or ResNet called ``arch``, randomly initialised;
    zero_init_residual: of ResNets, as resnet_stages takes it."""
    import torchvision
    if arch.startswith("swin_"):
        known = torchvision.models.list_models(torchvision.models, include="swin_*")
        if arch not in known:
            raise InputError(f"unknown architecture {arch} (known: {', '.join(known)}; ResNets)")
        return SwinStages(torchvision.models.get_model(arch, weights=None))
    return resnet_stages(arch, zero_init_residual=zero_init_residual)


def mlp(channels, widths, **options):
    """Linear layers of these widths with ReLU between them: torchvision's MLP, with its options."""
    from torchvision.ops import MLP
    return MLP(channels, widths, **options)


class PyramidRoIAlign(nn.Module):
    """RoI Align (He et al. 2017, arXiv 1703.06870) shifted by half a pixel, as detectron2's
    ROIAlignV2, of each box on the one level of a pyramid that fits its size.

    size: S, cells a side; strides: of the levels, each twice the one before; canonical: the side in
    pixels of the smallest square box of stride 16.
    """

    def __init__(self, size, strides, canonical=224):
        super().__init__()
        self.size, self.strides, self.canonical = size, strides, canonical

    def map_levels(self, boxes):
        """Boxes (N, 4) in their image's pixels -> the index of each one's level, (N,).

        Lin et al. 2017, arXiv 1612.03144, Eq. (1), with detectron2's 1e-8 (modeling/poolers.py);
        torchvision's adds 1e-6 to k, which puts the borders lower by 7e-7 of their value.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        k = (4 + torch.log2(sides / self.canonical + 1e-8)).floor()
        lowest, highest = math.log2(self.strides[0]), math.log2(self.strides[-1])
        return (k.clamp(lowest, highest) - lowest).long()

    def pool(self, x, rois, stride):
        """A level (B, C, H/s, W/s) and RoIs (N, 5) -> (N, C, S, S)."""
        from torchvision.ops import roi_align
        return roi_align(x, rois, self.size, 1 / stride, aligned=True)

    def pool_all(self, features, rois, levels):
        """RoIs (N, 5) -> (N, C, S, S), all pooled on every level: where a RoI is of another level
        it is an empty box, which gives 0.  So nothing waits for the GPU to count a level's RoIs."""
        return sum(self.pool(x, rois.masked_fill((levels != i).unsqueeze(1), 0), stride)
                   for i, (x, stride) in enumerate(zip(features, self.strides)))

    def pool_each(self, features, rois, levels):
        """The same, each level pooling its own RoIs alone: on CPUs up to 1.4 times as fast."""
        regions = features[0].new_zeros(len(rois), features[0].shape[1], self.size, self.size)
        for i, (x, stride) in enumerate(zip(features, self.strides)):
            here = (levels == i).nonzero().squeeze(1)
            regions[here] = self.pool(x, rois[here], stride)
        return regions

    def forward(self, features, boxes, _image_sizes=None):
        """Levels (B, C, H/s, W/s) by name, in the order of the strides (more are left out), and the
        boxes (n, 4) of each image, x1 y1 x2 y2 in its pixels -> (N, C, S, S)."""
        image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes]))  # (N,), on the CPU
        boxes = torch.cat([*boxes])  # (N, 4)
        image = image.to(boxes.device, boxes.dtype, non_blocking=True)
        rois = torch.cat([image.unsqueeze(1), boxes], dim=1)  # (N, 5)
        features = [*features.values()][:len(self.strides)]
        if len(features) == 1:
            return self.pool(features[0], rois, self.strides[0])
        pool = self.pool_each if boxes.device.type == "cpu" else self.pool_all
        return pool(features, rois, self.map_levels(boxes))


# ------------------------------------------------------ contrast: InfoNCE, queue, momentum encoder


def _logsumexp(q, negatives):
    """log sum_j exp(q.n_j), (N,), and its gradient to q, (N, D), the mean of the negatives weighted
    by the softmax of q.n_j.  One softmax gives both, in four passes over the logits."""
    logits = q @ negatives.T  # (N, K)
    weights = logits.softmax(1)
    largest, j = weights.max(1, keepdim=True)  # log of a weight = its logit - logsumexp
    return (logits.gather(1, j) - largest.log()).squeeze(1), weights @ negatives


class _LogSumExp(torch.autograd.Function):
    """_logsumexp by chunks of rows.  Each chunk's gradient is computed beside its value, so that no
    logits are kept for the backward pass, and none computed twice as torch.utils.checkpoint does.
    """

    @staticmethod
    def forward(ctx, q, negatives, chunk):
        values, gradients = zip(*(_logsumexp(rows, negatives) for rows in q.split(chunk)))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unsqueeze(1) * ctx.saved_tensors[0], None, None


def info_nce(q, k, negatives, tau, chunk=None):
    """-log exp(q.k/tau) / (exp(q.k/tau) + sum_j exp(q.n_j/tau)), mean over N rows (MoCo, Eq. 1).

    q, k: (N, D); negatives: (K, D); rows of unit length.  Returns a float32 scalar, 0 for N = 0,
    with a gradient to q.  The logits of at most ``chunk`` rows exist at a time (by default 2**25
    logits).
    """
    chunk = chunk or max(1, 2 ** 25 // max(1, len(negatives)))
    with torch.autocast(q.device.type, enabled=False):
        q, k, negatives = q.float(), k.float(), negatives.float()
        positive = (q * k).sum(1) / tau  # (N,)
        negative = _LogSumExp.apply(q / tau, negatives, chunk)  # (N,), of all negatives
        loss = torch.logaddexp(positive, negative) - positive  # (N,)
    return loss.sum() / max(1, len(q))


@torch.no_grad()
def contrast_statistics(q, k, negatives):
    """What to watch beside the loss, as 0-dim tensors, all 0 for N = 0: accuracy, the share of
    queries more similar to their key than to any negative; the mean similarities; deviation, the
    mean standard deviation of a coordinate of q, 1/sqrt(D) when queries fill the sphere and 0 when
    all are equal.  Computes all (N, K) similarities at once."""
    if len(q) == 0:
        q = k = negatives.new_zeros(1, negatives.shape[1])
    q, k, negatives = q.detach().float(), k.float(), negatives.float()
    with torch.autocast(q.device.type, enabled=False):
        positive, negative = (q * k).sum(1), q @ negatives.T  # (N,), (N, K)
    return dict(accuracy=(positive > negative.amax(1)).float().mean(),
                similarity_positive=positive.mean(), similarity_negative=negative.mean(),
                deviation=q.std(0, correction=0).mean())


class Queue(nn.Module):
    """The last K keys, used as negatives: ``keys`` (K, D), unit rows, the same in every process."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the next row replaced

    @torch.no_grad()
    def push(self, keys):
        """Replace the oldest rows by the keys (n, D) of all processes, in rank order.

        Raises InputError if there are more than K of them.
        """
        keys = all_gather(keys)
        if len(keys) > len(self.keys):
            raise InputError(f"{len(keys)} keys do not fit into a queue of {len(self.keys)}")
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[rows] = keys.to(self.keys.dtype)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.keys))


@torch.no_grad()
def momentum_update(online, target, m):
    """theta_target <- m theta_target + (1 - m) theta_online, for every parameter (MoCo, Eq. 2)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - m)


@torch.no_grad()
def encode_shuffled(encoder, images, *others):
    """Shuffling BN (MoCo, Sec. 3.3): encode the images of all processes in a random order.

    A key then shares its batch norm group with other images than its query does.
    images: (B, ...) of this process; others: what else the encoder takes of each image, (B, ...).
    encoder: images, *others -> (B, ...) or a list of such tensors.
    Returns its output for this process's images, in their original order.
    """
    order = torch.randperm(world_size() * len(images), device=images.device)
    if world_size() > 1:
        dist.broadcast(order, src=0)
    mine = slice(rank() * len(images), (rank() + 1) * len(images))
    out = encoder(*(all_gather(x)[order[mine]] for x in (images, *others)))
    back = order.argsort()[mine]
    return [all_gather(o)[back] for o in out] if isinstance(out, list) else all_gather(out)[back]


# ------------------------------------------------------------------------------------ optimization


def cosine_schedule(step, steps, warmup=0, start=0.0, end=0.0):
    """The factor of the learning rate at a step: linear from ``start`` for ``warmup`` steps, then a
    cosine from 1 to ``end``."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


class LARS(torch.optim.SGD):
    """SGD whose step of each weight tensor w is in proportion to its norm (You et al. 2017, arXiv
    1708.03888): a gradient g becomes u trust |w| / |u|, where u = g + decay w and trust is the
    trust coefficient.

    Where w or u is 0 the factor is 1.  Parameters of one dimension (biases, normalisation) take
    SGD's step, without decay.  weight_decay holds for all groups; a group's own would be SGD's,
    outside the factor.  Overwrites the gradients.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, lr, momentum)
        self.decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self, closure=None):
        """One step, as of torch's SGD: the learning rate stands outside the momentum."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        weights = [p for group in self.param_groups for p in group["params"]
                   if p.ndim > 1 and p.grad is not None]
        # Differs: |u| as in Barlow Twins', VICReg's and SoCo's code; Algorithm 1 of You et al. has
        # |g| + decay |w|.  Here a weight whose gradient stays 0 shrinks, at any decay but 0, by
        # about lr trust / (1 - momentum) of itself a step.
        us = [w.grad for w in weights]
        torch._foreach_add_(us, weights, alpha=self.decay)
        norms = torch.stack(torch._foreach_norm(weights + us)).view(2, -1)  # of w, u: (2, weights)
        factors = torch.where((norms > 0).all(0), self.trust * norms[0] / norms[1], 1)
        torch._foreach_mul_(us, factors.unbind())
        super().step()
        return loss


OPTIMIZERS = {"sgd": torch.optim.SGD, "lars": LARS}  # of --optimizer
