import pytest
import torch
import torch.distributed as dist
from conftest import start_processes
from torch.nn.parallel import DistributedDataParallel

import common
import vicreg

SMALL = dict(arch="resnet18", dim=24)


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


# --------------------------------------------------------------------------------------- the loss


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


def test_loss_is_float32_for_bfloat16_and_under_autocast():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 64, 16)
    expected, _ = vicreg.vicreg_loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        found, parts = vicreg.vicreg_loss(z1, z2)
    assert found == expected and found.dtype == parts["covariance"].dtype == torch.float32
    rounded, _ = vicreg.vicreg_loss(z1.bfloat16(), z2.bfloat16())
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(expected.item(), 0.02)


# -------------------------------------------------------------------------------------- the network


def test_gradients_reach_every_parameter_and_both_views_count():
    torch.manual_seed(0)
    model, views = vicreg.VICReg(**SMALL, weights=(2., 3., 4.)), torch.randn(2, 8, 3, 64, 64)
    views.requires_grad_()
    loss, parts = model(*views)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert views.grad.flatten(2).any(2).all()
    z1, z2 = (model.embed(view).detach() for view in views)
    assert loss.item() == pytest.approx(literal(z1, z2, (2., 3., 4.))[0].item(), rel=1e-4)
    spread = torch.stack([z1.std(0, correction=0), z2.std(0, correction=0)])
    for name, value in (("1", spread[0].mean()), ("2", spread[1].mean()), ("least", spread.min())):
        assert parts[f"deviation_{name}"].item() == pytest.approx(value.item(), rel=1e-4)


def test_projector_of_the_report():
    with torch.device("meta"):
        model = vicreg.VICReg()
    shapes = [tuple(p.shape) for p in model.projector.parameters()]
    assert shapes == [(2048, 2048), (2048,), (2048,)] * 2 + [(2048, 2048)]


# ---------------------------------------------------------------------- two processes, one process


def half(number, path):
    """Process ``number`` of two: half of the batch, in eval mode."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=number, world_size=2)
    state, views = torch.load(path / "in.pt", weights_only=True)
    model = vicreg.VICReg(**SMALL)
    model.load_state_dict(state)
    ddp = DistributedDataParallel(model.eval(), broadcast_buffers=False)
    loss, parts = ddp(*views[:, 4 * number:4 * number + 4])
    loss.backward()
    terms = [parts[name] for name in ("invariance", "variance", "covariance")]
    everyone = common.all_gather(torch.stack([loss.detach(), *terms])[None])
    if number == 0:
        torch.save([everyone, {n: p.grad for n, p in model.named_parameters()}], path / "out.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(0)
    model, views = vicreg.VICReg(**SMALL), torch.randn(2, 8, 3, 32, 32)
    model(*views)  # statistics of its own
    with torch.no_grad():
        model.projector[-2].weight *= 100  # deviations near 1, or the terms would be nearly 0
    torch.save([model.state_dict(), views], tmp_path / "in.pt")
    start_processes(half, (tmp_path,), 2)
    everyone, gradients = torch.load(tmp_path / "out.pt", weights_only=True)
    loss, parts = model.eval()(*views)
    loss.backward()
    terms = [parts[name] for name in ("invariance", "variance", "covariance")]
    assert min(terms) > 0.01
    for found in everyone:  # the same in both
        torch.testing.assert_close(found, torch.stack([loss.detach(), *terms]), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-6, name


# -------------------------------------------------------------------------------------- whole runs


def test_defaults_are_the_recipe_unless_scenes_are_used():
    args = vars(vicreg.parse_args(["--data", "somewhere"]))
    recipe = dict(arch="resnet50", epochs=100, batch_size=2048, lr=None, weight_decay=1e-6,
                  warmup=10, image_size=224, crop_scale=0.4, p_blur=[1.0, 0.1], dim=2048,
                  invariance=25, variance=25, covariance=1)
    assert {k: args[k] for k in recipe} == recipe
    assert vicreg.parse_args([]).arch == "resnet18"
