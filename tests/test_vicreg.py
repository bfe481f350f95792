"""VICReg's loss.  What it shares with Barlow Twins is tested there, what is true of every method in
test_methods.py."""
import pytest
import torch
from test_barlow_twins import batch, started

import vicreg


def small():
    return started(vicreg.VICReg("resnet18", 24, (2.0, 3.0, 4.0)))


def settled(model):
    """In eval mode, with statistics of its own, and deviations near 1, or the terms would be
    nearly 0."""
    model(*batch(8))
    with torch.no_grad():
        model.projector[-2].weight *= 100
    return model.eval()


def literal(z1, z2, weights):
    """Eq. (1) to (6), number by number, s and v as in the authors' code."""
    (number, dim), v, c = z1.shape, 0, 0
    for z in (z1, z2):
        mean = [sum(z[i, j] for i in range(number)) / number for j in range(dim)]
        for j in range(dim):
            for k in range(dim):
                covariance = sum((z[i, j] - mean[j]) * (z[i, k] - mean[k])
                                 for i in range(number)) / (number - 1)
                if j == k:
                    v = v + max(1 - (covariance + 0.0001) ** 0.5, 0 * covariance) / dim / 2
                else:
                    c = c + covariance ** 2 / dim
    s = sum((z1[i, j] - z2[i, j]) ** 2 for i in range(number) for j in range(dim)) / number / dim
    terms = torch.stack([torch.as_tensor(t, dtype=z1.dtype) for t in (s, v, c)])
    return (terms * torch.tensor(weights)).sum(), terms.detach()


@pytest.mark.parametrize("number, dim, weights", [(5, 4, (25., 25., 1.)), (8, 3, (3., 2., 7.)),
                                                  (2, 2, (1., 1., 1.)), (4, 1, (25., 25., 1.))])
def test_loss_and_gradients_equal_a_literal_loop(number, dim, weights):
    torch.manual_seed(number)
    z1 = (torch.randn(number, dim) * torch.arange(1, dim + 1) / 2 + 3).double().requires_grad_()
    z2 = (0.5 * z1.detach() + torch.randn(number, dim)).double().requires_grad_()
    loss, parts = vicreg.vicreg_loss(z1, z2, *weights)
    expected, terms = literal(z1, z2, weights)
    torch.testing.assert_close(loss, expected)
    assert [*parts] == ["invariance", "variance", "covariance"]
    torch.testing.assert_close(torch.stack([*parts.values()]), terms)
    assert not any(v.requires_grad for v in parts.values())
    z = torch.stack([z1, z2])
    c = vicreg.covariances(z)
    torch.testing.assert_close(torch.stack([
        vicreg.invariance_term(z), vicreg.variance_term(c), vicreg.covariance_term(c)]), terms)
    for a, b in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(a, b)
    in_float32, _ = vicreg.vicreg_loss(z1.float(), z2.float(), *weights)
    assert in_float32.item() == pytest.approx(expected.item(), rel=1e-5)


def test_values_by_hand():
    loss = vicreg.vicreg_loss
    z = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]])  # variances 4/3, covariance 0
    total, parts = loss(z, z)
    assert total == 0 and not any(parts.values())
    total, parts = loss(z, z + 0.5)  # each batch as before, 0.5 apart
    assert total.item() == pytest.approx(25 * 0.25) and parts["invariance"].item() == 0.25
    small = 0.5 * z * (3 / 4) ** 0.5  # deviations 1/2, of one batch
    assert loss(small, small)[1]["variance"].item() == pytest.approx(0.5, rel=1e-3)
    assert loss(small, z)[1]["variance"].item() == pytest.approx(0.25, rel=1e-3)
    for collapsed in (torch.zeros(4, 2), torch.full((4, 2), 0.7)):
        total, parts = loss(collapsed, collapsed)
        assert parts["variance"].item() == pytest.approx(0.99)  # 1 - sqrt(0.0001)
        assert total.item() == pytest.approx(24.75) and parts["covariance"] == 0
    one = z[:, :1].expand(4, 2)  # both dimensions the same: C is full of 4/3
    total, parts = loss(one, one)
    assert parts["variance"] == 0  # what variance alone does not see
    assert parts["covariance"].item() == pytest.approx(2 * 2 * (4 / 3) ** 2 / 2)  # of both batches
    assert total.item() == pytest.approx(2 * (4 / 3) ** 2)
