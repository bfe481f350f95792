import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from plumbing.figures import draw_correlation, draw_curves, read_log


def test_a_log_is_read_as_numbers(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,lr\n2,0.5,0.1\n4,0.25\n6,,0.1\n8,nan,1e-3\n")
    rows = read_log(tmp_path / "log.csv")
    assert rows[0] == dict(step=2, loss=0.5, lr=0.1) and len(rows) == 2
    assert rows[1]["step"] == 8 and math.isnan(rows[1]["loss"])


def test_curves_of_a_run_and_of_several(tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig

    def kept(figure, path, **options):
        drawn.append({axes.get_title(): {line.get_label(): line for line in axes.lines}
                      for axes in figure.axes})
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    rows = [dict(step=i, epoch=i / 2, loss=3.0 - i, loss_chance=4.0, deviation_1=1.0 * i, lr=0.1,
                 images_per_s=9.0) for i in range(3)]
    draw_curves({"": rows}, tmp_path / "one.png")
    panels, = drawn
    assert {title: [*lines] for title, lines in panels.items()} == {
        "loss": ["loss", "loss chance"], "standard deviation of a coordinate": ["deviation 1"],
        "learning rate": ["learning rate"]}
    assert panels["loss"]["loss"].get_xydata().tolist() == [[0, 3], [0.5, 2], [1, 1]]
    assert panels["loss"]["loss"].get_linestyle() == "-"
    assert panels["loss"]["loss chance"].get_linestyle() == "--"
    shorter = [{key: row[key] for key in ("step", "epoch", "loss", "lr")} for row in rows[:2]]
    draw_curves({"a": rows, "b": shorter}, tmp_path / "two.png")
    assert {title: [*lines] for title, lines in drawn[1].items()} == {
        "loss": ["a", "b"], "learning rate": ["a", "b"]}  # the columns that both have
    assert drawn[1]["loss"]["b"].get_xydata().tolist() == [[0, 3], [0.5, 2]]
    with Image.open(tmp_path / "two.png") as image:
        assert image.size == (1080, 420)
    colours = [line.get_color() for line in drawn[1]["loss"].values()]
    assert len({*colours}) == 2 and colours == [
        line.get_color() for line in drawn[1]["learning rate"].values()]  # a colour for each run


def test_panels_of_a_run_with_levels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: figures.append(figure))
    columns = ["loss", "loss_chance", "gg_res2", "ll_res2", "gl_res5", "gg_chance", "accuracy",
               "similarity_positive", "similarity_negative", "deviation", "lr", "whole_view",
               "ll_res3"]
    draw_curves({"": [dict(step=i, epoch=i, images_per_s=1.0, **dict.fromkeys(columns, float(i)))
                      for i in range(1, 4)]}, "x.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert [*panels] == ["loss", "parts of the loss", "accuracy against the queue",
                         "cosine similarity", "standard deviation of a coordinate",
                         "learning rate", "whole view"]
    parts = {line.get_label(): line for line in panels["parts of the loss"].lines}
    assert [*parts] == ["global-global Res2", "local-local Res2", "global-local Res5",
                        "global-global chance", "local-local Res3"]
    style = {name: (line.get_color(), line.get_linestyle()) for name, line in parts.items()}
    assert style["global-global Res2"][0] == style["local-local Res2"][0]  # levels by colour
    assert style["local-local Res2"][1] == style["local-local Res3"][1] == ":"  # kinds by line
    assert style["global-global chance"][1] == "--" and len({*style.values()}) == 5
    assert all(tick == int(tick) for axes in panels.values() for tick in axes.get_xticks())


@pytest.mark.parametrize("number, dim", [(5, 3), (4, 1)])
def test_drawn_correlation_equals_a_loop(tmp_path, number, dim):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, number, dim)
    z2[:, 0] = 0.3  # a constant dimension correlates with nothing
    matrix = draw_correlation(z1, z2, tmp_path / "correlation.png")
    for i, j in itertools.product(range(dim), repeat=2):
        a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
        expected = 0 if j == 0 else (a @ b / (a.norm() * b.norm())).item()
        assert matrix[i, j] == pytest.approx(expected, abs=1e-6)


def test_a_drawn_diagonal_is_seen(tmp_path):
    """Also where there are more dimensions than the picture has pixels."""
    z = torch.randn(1024, 600)
    draw_correlation(z, z + 0.1 * torch.randn(1024, 600), tmp_path / "correlation.png")
    with Image.open(tmp_path / "correlation.png") as image:
        pixels = np.array(image.convert("RGB"))[:, :330].astype(int)  # without the colour bar
    dark_red = (pixels[..., 0] < 150) & (pixels[..., 0] > 80) & (pixels[..., 1:] < 60).all(-1)
    assert dark_red.sum() > 250 and dark_red.any(0).sum() > 250
