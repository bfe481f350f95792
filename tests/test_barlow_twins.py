"""Barlow Twins' loss and recipe, and what VICReg shares of it.  What is true of every method is in
test_methods.py."""
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image

import barlow_twins
import common
import vicreg
from plumbing.run import Run


def started(model):
    """As after its first steps: the last batch norm of a residual block is no longer 0."""
    for name, p in model.stages.named_parameters():
        if name.endswith("bn2.weight"):
            torch.nn.init.ones_(p)
    return model


def small():
    return started(barlow_twins.BarlowTwins("resnet18", 24, 0.02))


def batch(number):
    """view1, view2."""
    return [*torch.randn(2, number, 3, 64, 64)]


def settled(model):
    """In eval mode, with statistics of its own."""
    model(*batch(8))
    return model.eval()


def orthogonal(number):
    """(number, number - 1): columns of mean 0, variance 1 and no covariance."""
    columns = torch.ones(1, 1)
    while len(columns) < number:  # Hadamard's
        columns = torch.cat([torch.cat([columns, columns], 1), torch.cat([columns, -columns], 1)])
    return columns[:, 1:]


def literal(z1, z2, lambd):
    """Eq. (1) and (2), number by number."""
    number, dim = z1.shape
    norm1, norm2 = [], []
    for z, out in ((z1, norm1), (z2, norm2)):
        for j in range(dim):
            mean = sum(z[b, j] for b in range(number)) / number
            variance = sum((z[b, j] - mean) ** 2 for b in range(number)) / number
            out.append([(z[b, j] - mean) / (variance + 1e-5) ** 0.5 for b in range(number)])
    on = off = 0 * z1.sum()
    c = [[sum(norm1[i][b] * norm2[j][b] for b in range(number)) / number for j in range(dim)]
         for i in range(dim)]
    for i in range(dim):
        for j in range(dim):
            if i == j:
                on = on + (1 - c[i][j]) ** 2
            else:
                off = off + c[i][j] ** 2
    return on + lambd * off, on, off, c


# --------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("number, dim, lambd", [(5, 4, 0.0051), (8, 3, 0.5), (4, 1, 0.1)])
def test_loss_and_gradients_equal_a_literal_loop(number, dim, lambd):
    torch.manual_seed(number)
    z1 = (torch.randn(number, dim) * torch.arange(1, dim + 1) + 3).double().requires_grad_()
    z2 = (0.5 * z1.detach() + torch.randn(number, dim)).double().requires_grad_()
    loss, parts = barlow_twins.barlow_twins_loss(z1, z2, lambd)
    expected, on, off, c = literal(z1, z2, lambd)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(barlow_twins.cross_correlation(z1, z2),
                               torch.stack([torch.stack(row) for row in c]))
    assert parts["invariance"].item() == pytest.approx(on.item())
    assert parts["redundancy"].item() == pytest.approx(off.item())
    assert not any(v.requires_grad for v in parts.values())
    for a, b in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(a, b)
    in_float32, _ = barlow_twins.barlow_twins_loss(z1.float(), z2.float(), lambd)
    assert in_float32.item() == pytest.approx(expected.item(), rel=1e-5)


def test_values_by_hand():
    z = orthogonal(8)  # (8, 7)
    loss = barlow_twins.barlow_twins_loss
    assert loss(z, z)[0] < 1e-8 and loss(5 * z + 3, 2 * z - 1)[0] < 1e-8  # C is the identity
    assert loss(z, -z)[0].item() == pytest.approx(7 * 4, rel=1e-4)  # C is minus the identity
    assert loss(z[:, :3], z[:, 3:6])[0].item() == pytest.approx(3)  # C is 0
    for collapsed in (torch.zeros(8, 7), torch.full((8, 7), 0.7)):
        total, parts = loss(collapsed, collapsed)
        assert total.item() == pytest.approx(7) and parts["redundancy"] < 1e-8
    one = z[:, :1].expand(8, 7)  # every dimension the same: C is full of ones
    total, parts = loss(one, one, 0.01)
    assert parts["invariance"] < 1e-8 and parts["redundancy"].item() == pytest.approx(42, rel=1e-4)
    assert total.item() == pytest.approx(0.42, rel=1e-4)
    turned = loss(z[:, [0, 1, 2]], z[:, [1, 0, 2]], 0.01)  # two dimensions exchanged
    assert turned[0].item() == pytest.approx(2 + 0.01 * 2, rel=1e-4)


def test_constant_dimensions_have_finite_gradients():
    z = torch.cat([orthogonal(8), torch.ones(8, 1)], dim=1).requires_grad_()
    barlow_twins.barlow_twins_loss(z, z + 0)[0].backward()
    assert z.grad.isfinite().all()


# ----------------------------------------------------- what VICReg has as well: network and recipe


class Twin(NamedTuple):
    module: object
    network: type
    loss: object
    weights: tuple  # other ones than by default


BARLOW = Twin(barlow_twins, barlow_twins.BarlowTwins, barlow_twins.barlow_twins_loss, (0.02,))
VICREG = Twin(vicreg, vicreg.VICReg, vicreg.vicreg_loss, (2.0, 3.0, 4.0))
both = pytest.mark.parametrize("twin", [BARLOW, VICREG], ids=lambda twin: twin.module.__name__)


@both
def test_loss_is_float32_for_bfloat16_and_under_autocast(twin):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 64, 16)
    expected, _ = twin.loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        found, parts = twin.loss(z1, z2)
    assert found == expected and {v.dtype for v in (found, *parts.values())} == {torch.float32}
    rounded, _ = twin.loss(z1.bfloat16(), z2.bfloat16())
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(expected.item(), 0.02)


@both
def test_what_is_logged(twin):
    torch.manual_seed(0)
    weights = twin.weights if twin is VICREG else twin.weights[0]
    model, views = twin.network("resnet18", 24, weights), batch(8)
    loss, parts = model(*views)
    z1, z2 = (model.projector(model.stages(view)[-1].flatten(2).mean(2)).detach()
              for view in views)
    expected, terms = twin.loss(z1, z2, *twin.weights)
    spread = torch.stack([z1.std(0, correction=0), z2.std(0, correction=0)])
    deviations = dict(deviation_1=spread[0].mean(), deviation_2=spread[1].mean(),
                      deviation_least=spread.min())
    torch.testing.assert_close(loss.detach(), expected, atol=0, rtol=1e-4)
    torch.testing.assert_close(parts, {**terms, **deviations}, atol=0, rtol=1e-4)


@both
def test_projector_of_the_report(twin):
    with torch.device("meta"):
        projector, of_swin = twin.network().projector, twin.network("swin_t").projector
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(2048, 2048), (2048,), (2048,)] * 2 + [(2048, 2048)]
    kinds = [type(m).__name__ for m in projector if not isinstance(m, torch.nn.Dropout)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert of_swin[0].weight.shape == (2048, 768)


@pytest.mark.parametrize("twin, batch_size, lr", [
    *((BARLOW, *row) for row in (
        (128, 0.7), (256, 0.4), (512, 0.3), (1024, 0.25), (2048, 0.2), (4096, 0.2), (64, 0.7),
        (724, 0.3 - 0.05 * math.log2(724 / 512)))),
    *((VICREG, *row) for row in (
        (128, 0.8), (256, 0.5), (512, 0.4), (1024, 0.3), (2048, 0.3), (8192, 0.3)))])
def test_learning_rates_by_batch_size(tmp_path, capsys, monkeypatch, twin, batch_size, lr):
    class Stop(Exception):
        pass

    def first_step(run, *_args, **_kwargs):
        raise Stop([group["lr"] for group in run.parts["optimizer"].param_groups])

    views = (common.View(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, None),) * 2
    monkeypatch.setattr(Run, "end_step", first_step)
    monkeypatch.setattr(Run, "batches", lambda *_args: iter([(0, views)]))
    monkeypatch.setattr(twin.module, "open_images", lambda *_args: range(batch_size))
    monkeypatch.setattr(twin.network, "forward", lambda model, *_views: (
        sum(p.sum() for p in model.parameters()), {}))
    words = ["--arch", "resnet18", "--dim", "8", "--warmup", "0", "--batch-size", str(batch_size)]
    with pytest.raises(Stop) as started:
        twin.module.main(["--data", "x", *words, "--out", str(tmp_path)])
    rates = [lr * batch_size / 256, 0.0048 * batch_size / 256]
    assert started.value.args[0] == pytest.approx(rates if twin is BARLOW else rates[:1])
    assert f"lr {lr:.3g} per 256 images: " in capsys.readouterr().out


@both
def test_measured_normalisation_is_printed_and_nothing_else_happens(tmp_path, capsys, twin):
    make_photos(tmp_path / "data", 3)
    twin.module.main(["--data", str(tmp_path / "data"), "--measure-normalisation", "--out",
                      str(tmp_path / "run"), "--workers", "1"])
    pixels = np.stack([np.array(Image.open(p)) for p in (tmp_path / "data").iterdir()]) / 255
    numbers = [*pixels.mean((0, 1, 2)), *pixels.std((0, 1, 2))]
    mean, std = (" ".join(f"{v:.4f}" for v in part) for part in (numbers[:3], numbers[3:]))
    assert capsys.readouterr().out == f"3 images:  --mean {mean} --std {std}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [barlow_twins.BarlowTwins, vicreg.VICReg])
def test_a_residual_block_starts_as_the_identity(method):
    torch.manual_seed(0)
    for arch, last, number in (("resnet18", "bn2", 8), ("resnet50", "bn3", 16)):
        stages = method(arch, 8).stages
        blocks = [block for i in range(1, 5) for block in getattr(stages, f"layer{i}")]
        assert len(blocks) == number
        assert not any(block.get_submodule(last).weight.any() for block in blocks)
        x = torch.rand(2, blocks[1].conv1.in_channels, 8, 8)
        assert torch.equal(blocks[1](x), x)
        stages = method(arch, 8, zero_init_residual=False).stages
        assert stages.get_submodule(f"layer1.1.{last}").weight.eq(1).all()
