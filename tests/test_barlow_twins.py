import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import column, make_photos, start_processes
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import barlow_twins
import common
import vicreg
from scenes import Scenes

SMALL = dict(arch="resnet18", dim=24, lambd=0.02)


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
    on = off = 0
    for i in range(dim):
        for j in range(dim):
            c = sum(norm1[i][b] * norm2[j][b] for b in range(number)) / number
            if i == j:
                on = on + (1 - c) ** 2
            else:
                off = off + c ** 2
    return on + lambd * off, on, off


# --------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("number, dim, lambd", [(5, 4, 0.0051), (8, 3, 0.5), (4, 1, 0.1)])
def test_loss_and_gradients_equal_a_literal_loop(number, dim, lambd):
    torch.manual_seed(number)
    z1 = (torch.randn(number, dim) * torch.arange(1, dim + 1) + 3).double().requires_grad_()
    z2 = (0.5 * z1.detach() + torch.randn(number, dim)).double().requires_grad_()
    loss, parts = barlow_twins.barlow_twins_loss(z1, z2, lambd)
    expected, on, off = literal(z1, z2, lambd)
    torch.testing.assert_close(loss, expected)
    assert parts["invariance"].item() == pytest.approx(on.item())
    assert parts["redundancy"].item() == pytest.approx(float(torch.as_tensor(off).detach()))
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


def test_loss_is_float32_for_bfloat16_and_under_autocast():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 64, 16)
    expected, _ = barlow_twins.barlow_twins_loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        found, parts = barlow_twins.barlow_twins_loss(z1, z2)
    assert found == expected and found.dtype == parts["redundancy"].dtype == torch.float32
    rounded, _ = barlow_twins.barlow_twins_loss(z1.bfloat16(), z2.bfloat16())
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(expected.item(), 0.02)


# -------------------------------------------------------------------------------------- the network


def test_gradients_reach_every_parameter_and_both_views_count():
    torch.manual_seed(0)
    model, views = barlow_twins.BarlowTwins(**SMALL), torch.randn(2, 8, 3, 64, 64)
    views.requires_grad_()
    loss, parts = model(*views)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert views.grad.flatten(2).any(2).all()
    z1, z2 = (model.embed(view) for view in views)
    expected, on, off = literal(z1.detach(), z2.detach(), 0.02)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    spread = torch.stack([z1.std(0, correction=0), z2.std(0, correction=0)])
    for name, value in (("1", spread[0].mean()), ("2", spread[1].mean()), ("least", spread.min())):
        assert parts[f"deviation_{name}"].item() == pytest.approx(value.item(), rel=1e-4)


def test_projector_of_the_report():
    with torch.device("meta"):
        model = barlow_twins.BarlowTwins()
        swin = barlow_twins.BarlowTwins("swin_t")
    shapes = [tuple(p.shape) for p in model.projector.parameters()]
    assert shapes == [(2048, 2048), (2048,), (2048,)] * 2 + [(2048, 2048)]
    kinds = [type(m).__name__ for m in model.projector if not isinstance(m, torch.nn.Dropout)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert swin.projector[0].weight.shape == (2048, 768)


# ---------------------------------------------------------------------- two processes, one process


def half(number, path):
    """Process ``number`` of two: half of the batch, in eval mode."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=number, world_size=2)
    state, views = torch.load(path / "in.pt", weights_only=True)
    model = barlow_twins.BarlowTwins(**SMALL)
    model.load_state_dict(state)
    ddp = DistributedDataParallel(model.eval(), broadcast_buffers=False)
    loss, parts = ddp(*views[:, 4 * number:4 * number + 4])
    loss.backward()
    everyone = common.all_gather(torch.stack([loss.detach(), parts["redundancy"]])[None])
    if number == 0:
        torch.save([everyone, {n: p.grad for n, p in model.named_parameters()}], path / "out.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(0)
    model, views = barlow_twins.BarlowTwins(**SMALL), torch.randn(2, 8, 3, 32, 32)
    model(*views)  # statistics of its own
    torch.save([model.state_dict(), views], tmp_path / "in.pt")
    start_processes(half, (tmp_path,), 2)
    everyone, gradients = torch.load(tmp_path / "out.pt", weights_only=True)
    loss, parts = model.eval()(*views)
    loss.backward()
    for found in everyone:  # the same in both
        torch.testing.assert_close(found, torch.stack([loss.detach(), parts["redundancy"]]),
                                   rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-6, name


# -------------------------------------------------------------------------------------- whole runs

TINY = ("--scenes 32 --epochs 2 --batch-size 16 --image-size 32 --dim 16 --workers 0 "
        "--log-every 1").split()


def test_defaults_are_the_recipe_unless_scenes_are_used():
    args = vars(barlow_twins.parse_args(["--data", "somewhere"]))
    recipe = dict(arch="resnet50", epochs=150, batch_size=2048, lr=None, lr_biases=0.0048,
                  weight_decay=1e-6, warmup=10, image_size=224, crop_scale=0.4, p_blur=[1.0, 0.1],
                  dim=2048, lambd=0.0051, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert {k: args[k] for k in recipe} == recipe
    assert barlow_twins.parse_args([]).arch == "resnet18"


@pytest.mark.parametrize("method", [barlow_twins, vicreg])
def test_schedule(method):
    factors = [method.schedule(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5005)
    assert factors[99] == pytest.approx(0.0013, rel=0.01) and factors[100] == pytest.approx(0.001)
    assert method.schedule(0, 1, 0) == 1


@pytest.mark.parametrize("method, model, batch_size, lr", [
    *((barlow_twins, barlow_twins.BarlowTwins, *row) for row in (
        (128, 0.7), (256, 0.4), (512, 0.3), (1024, 0.25), (2048, 0.2), (4096, 0.2), (64, 0.7),
        (724, 0.3 - 0.05 * math.log2(724 / 512)))),
    *((vicreg, vicreg.VICReg, *row) for row in (
        (128, 0.8), (256, 0.5), (512, 0.4), (1024, 0.3), (2048, 0.3), (8192, 0.3)))])
def test_learning_rates_by_batch_size(tmp_path, capsys, monkeypatch, method, model, batch_size, lr):
    started = []

    class Stop(Exception):
        pass

    def first_step(run, *_args, **_kwargs):
        started.append([group["lr"] for group in run.parts["optimizer"].param_groups])
        raise Stop

    monkeypatch.setattr(common.Run, "end_step", first_step)
    monkeypatch.setattr(model, "forward", lambda model, a, b: (
        sum(p.sum() for p in model.parameters()), {}))
    monkeypatch.setattr(method, "load_batches", lambda *_args: iter([(
        common.View(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, None),) * 2]))
    monkeypatch.setattr(method, "unlabelled", lambda *_args: range(batch_size))
    words = ["--arch", "resnet18", "--dim", "8", "--warmup", "0", "--batch-size", str(batch_size)]
    with pytest.raises(Stop):
        method.main(["--data", "x", *words, "--out", str(tmp_path)])
    rates = [lr * batch_size / 256, 0.0048 * batch_size / 256]
    assert started[0] == pytest.approx(rates if method is barlow_twins else rates[:1])
    assert f"lr {lr:.3g} for each 256 images, for this batch size" in capsys.readouterr().out


@pytest.mark.parametrize("method", [barlow_twins, vicreg])
def test_a_run_written_out(tmp_path, monkeypatch, method):
    """Views, colours, learning rates, LARS: two steps of a run, its log, and the drawn matrix."""
    drawn_from = []
    monkeypatch.setattr(method, "draw_correlation", lambda *args: drawn_from.append(args) or
                        common.draw_correlation(*args))
    torch.set_num_threads(1)
    words = [*TINY, "--epochs", "1", "--warmup", "1", "--lr", "2", "--p-blur", "0.9", "0.1",
             "--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.3", "0.4"]
    method.main([*words, "--out", str(tmp_path)])
    scenes = Scenes(32, size=96, seed=0)
    torch.manual_seed(0)
    model = (barlow_twins.BarlowTwins("resnet18", 16, 0.1) if method is barlow_twins else
             vicreg.VICReg("resnet18", 16)).to(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = common.LARS([dict(params=weights), dict(params=others)], 1, weight_decay=1e-6)
    losses = []
    for step in range(3):
        epoch, part = divmod(step, 2)
        order = np.random.default_rng([0, epoch]).permutation(32)[16 * part:16 * part + 16]
        drawn = []
        for i in order.tolist():
            torch.manual_seed(common.seed_for(0, epoch, i))
            drawn.append([common.random_resized_crop(scenes[i], 32, (0.4, 1)) for _ in range(2)])
        torch.manual_seed(common.seed_for(0, step, 0))
        views = [common.photometric(torch.stack([d[v].pixels for d in drawn]), (0.4, 0.4, 0.2, 0.1),
                                    p_blur=(0.9, 0.1)[v], p_solarize=(0, 0.2)[v],
                                    mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)) for v in (0, 1)]
        if step == 2:
            break
        loss, _ = model(*views)
        optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(optimizer.param_groups,
                               (2, 0.0048 if method is barlow_twins else 2)):
            group["lr"] = rate * 16 / 256 * (step + 1) / 2
        optimizer.step()
        losses.append(loss.item())
    assert [float(v) for v in column(tmp_path, "loss")] == pytest.approx(losses, rel=1e-4)
    saved = common.load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=1e-4)
    backbone = common.load_checkpoint(tmp_path / "backbone.pt")
    assert all(torch.equal(v, saved[f"stages.{k}"]) for k, v in backbone.items())
    with torch.no_grad():
        for found, view in zip(drawn_from[0], views):
            torch.testing.assert_close(found, model.eval().embed(view), atol=1e-4, rtol=1e-3)
    with Image.open(tmp_path / "correlation.png") as image:
        assert image.size == (880, 400)


def test_measured_normalisation_is_printed_and_nothing_else_happens(tmp_path, capsys):
    make_photos(tmp_path / "data", 3)
    barlow_twins.main(["--data", str(tmp_path / "data"), "--measure-normalisation", "--out",
                       str(tmp_path / "run"), "--workers", "1"])
    pixels = np.stack([np.array(Image.open(p)) for p in (tmp_path / "data").iterdir()]) / 255
    numbers = [*pixels.mean((0, 1, 2)), *pixels.std((0, 1, 2))]
    mean, std = (" ".join(f"{v:.4f}" for v in part) for part in (numbers[:3], numbers[3:]))
    assert capsys.readouterr().out == f"3 images:  --mean {mean} --std {std}\n"
    assert not (tmp_path / "run").exists()
