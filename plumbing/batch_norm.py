"""Batch norm over all processes, on GPUs and CPUs."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import all_gather, all_reduce_sum, world_size


class _NormaliseByAll(torch.autograd.Function):
    """Normalise x (B, C, ...) by the mean and variance (C,) of all processes' values, ``number`` of
    each channel; the gradient is that of the statistics too."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, number):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.number = eps, number
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, var = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        # this process's sums of g x^ and of g, where x^ is x normalised
        if not x.numel():
            sums = torch.zeros_like(mean), torch.zeros_like(mean)
        elif x.is_cuda:  # as torch's SyncBatchNorm, by a kernel that is quick with channels_last
            layout = torch.channels_last if x.dim() == 4 and x.is_contiguous(
                memory_format=torch.channels_last) else torch.contiguous_format
            sums = torch.batch_norm_backward_reduce(
                g.contiguous(memory_format=layout), x.contiguous(memory_format=layout), mean,
                inverse, weight, False, True, True)[2:]
        else:
            sums = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, var, mean, inverse, False, ctx.eps, [False, True, True])[1:]
        sums = torch.stack(sums)
        # dL/dx = weight / std (g - mean(g) - x^ mean(g x^)), the means over all processes
        scale = weight * inverse
        dx = F.batch_norm(x, mean, var, *all_reduce_sum(sums) * (scale / -ctx.number), eps=ctx.eps)
        dx.addcmul_(g, scale.view(-1, *[1] * (x.dim() - 2)))
        return dx, *sums, None, None, None, None


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C) or (B, C, H, W) with the statistics of all processes' batches, on GPUs
    and on CPUs; unlike torch's it does not wait for the GPU.  In eval mode, and in its state dict,
    it is BatchNorm2d.
    """

    @torch.no_grad()
    def statistics(self, x):
        """The mean and the variance (C,) over all processes, in float32 at least."""
        own = self.running_mean, self.running_var  # if x is empty: a head that got no boxes
        if x.numel():
            unused = torch.empty_like(self.running_mean)
            own = torch.batch_norm_update_stats(x, unused, unused, 0.0)
        means, variances = all_gather(torch.stack(own)[None]).unbind(1)  # (processes, C) each
        # As naiveSyncBN, which MoCo's configuration names: each process weighs the same.  torch's
        # weighs by the number of values, which differs where a detector's images differ in size.
        # From squares of differences, so that a large mean costs no digits (Chan et al. 1979)
        between, mean = torch.var_mean(means, dim=0, correction=0)
        return mean, variances.mean(0) + between

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        mean, var = self.statistics(x)
        number = world_size() * x.numel() // len(mean) or math.inf
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the mean of all batches
            momentum = (1 / self.num_batches_tracked).to(mean)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (1 + 1 / (number - 1)), momentum)  # unbiased
        return _NormaliseByAll.apply(x, self.weight, self.bias, mean, var, self.eps, number)


def synchronise_batch_norm(model):
    """Turn a model's BatchNorm1d and BatchNorm2d layers into SyncBatchNorm, in place."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm  # of the same parameters, buffers and options
