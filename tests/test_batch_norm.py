import copy
import math
from functools import partial

import pytest
import torch
from conftest import process_group, start_processes
from torch import nn

from plumbing.batch_norm import SyncBatchNorm, synchronise_batch_norm


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 3)])
def test_of_one_process(shape, kind):
    """BatchNorm1d's and BatchNorm2d's values, gradients, statistics and state."""
    torch.manual_seed(0)
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    model = nn.Sequential(copy.deepcopy(plain))
    synchronise_batch_norm(model)
    sync, weights = model[0], torch.randn(shape)
    assert type(sync) is SyncBatchNorm and type(plain) is not SyncBatchNorm
    for momentum in (0.1, 0.1, None, None, 0.0):
        plain.momentum = sync.momentum = momentum
        x, results = (3 + 2 * torch.randn(shape)).to(kind).requires_grad_(), []
        for norm in (plain, sync):
            y = norm(x)
            results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *norm.parameters()]),
                            norm.running_mean, norm.running_var, norm.num_batches_tracked])
        for a, b in zip(*results):
            tolerance = dict(atol=2 ** -7, rtol=2 ** -7) if a.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(a, b, **tolerance)
    assert sync.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(sync.state_dict()), sync.load_state_dict(plain.state_dict())
    assert torch.equal(sync.eval()(x), plain.eval()(x)) and sync.num_batches_tracked == 5


def normalise(xs, norm):
    """Batch norm of the batches of several processes, each of which weighs the same; without values
    it has the running statistics: from the definition."""
    dims = [0, *range(2, xs[0].dim())]
    shape = [-1, *[1] * (len(dims) - 1)]
    means = [x.mean(dims) if len(x) else norm.running_mean.double() for x in xs]
    mean = sum(means) / len(xs)
    spread = [(x - mean.view(shape)).square().mean(dims) if len(x) else
              norm.running_var.double() + (m - mean) ** 2 for x, m in zip(xs, means)]
    var = sum(spread) / len(xs)
    scale = (norm.weight / (var + norm.eps).sqrt()).view(shape)
    return [(x - mean.view(shape)) * scale + norm.bias.view(shape) for x in xs], mean, var


def check_one_of_two(number):
    """Values, gradients and statistics, of large means too; of batches of the same size those of
    BatchNorm1d and BatchNorm2d with both."""
    for rows, rest, shift in (((4, 4), (3, 2), 1000.0), ((1, 1), (), 0.0), ((4, 2), (3, 2), 0.0),
                              ((5, 0), (3, 2), 0.0), ((0, 5), (3, 2), 0.0)):
        torch.manual_seed(0)
        sync, plain = SyncBatchNorm(5), (nn.BatchNorm2d if rest else nn.BatchNorm1d)(5)
        nn.init.normal_(sync.weight), nn.init.normal_(sync.bias)
        plain.load_state_dict(sync.state_dict())
        xs = [(shift + torch.randn(n, 5, *rest)).requires_grad_() for n in rows]
        weights = [torch.randn(n, 5, *rest) for n in rows]
        exact = [x.detach().double().requires_grad_() for x in xs]
        ys, mean, var = normalise(exact, sync)
        losses = [(w * y).sum() for w, y in zip(weights, ys)]  # of each process
        dx = torch.autograd.grad(sum(losses), exact, retain_graph=True)
        own = torch.autograd.grad(losses[number], [sync.weight, sync.bias])
        y = sync(xs[number])
        close = partial(torch.testing.assert_close, check_dtype=False, rtol=1e-5,
                        atol=1e-5 + 1e-6 * shift)
        close(y, ys[number])
        found = torch.autograd.grad((weights[number] * y).sum(),
                                    [xs[number], sync.weight, sync.bias])
        close(found, (dx[number], *own))
        close(sync.running_mean, 0.1 * mean)
        values = sum(rows) * math.prod(rest)
        if rows[0] == rows[1]:
            close(plain(torch.cat(xs)), torch.cat(ys))
            close(sync.running_mean, plain.running_mean)
            close(sync.running_var, plain.running_var)
            close(sync.running_var, 0.9 + 0.1 * var * values / (values - 1))
        else:  # unbiased as if both were of this one's size
            close(sync.running_var, 0.9 + 0.1 * var, rtol=0.01)


def one_of_two(number, folder):
    with process_group(number, 2, folder):
        check_one_of_two(number)


def test_of_two_processes(tmp_path):
    start_processes(one_of_two, (tmp_path,), 2)
