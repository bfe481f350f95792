import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from plumbing.drawing import (draw_correlation, draw_curves, draw_detections, image_grid, outline,
                              read_log, show)


def test_a_log_is_read_as_numbers(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,lr\n2,0.5,0.1\n4,0.25\n6,,0.1\n8,nan,1e-3\n")
    rows = read_log(tmp_path / "log.csv")
    assert rows[0] == dict(step=2, loss=0.5, lr=0.1) and len(rows) == 2
    assert rows[1]["step"] == 8 and math.isnan(rows[1]["loss"])


def test_curves_of_a_run_and_of_several(tmp_path, monkeypatch):
    drawn, figures = [], []
    savefig = Figure.savefig

    def kept(figure, path, **options):
        drawn.append({axes.get_title(): {line.get_label(): line for line in axes.lines}
                      for axes in figure.axes})
        figures.append(figure)
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    rows = [dict(step=i, epoch=i / 2, loss=3.0 - i, loss_chance=4.0, deviation_1=1.0 * i, lr=0.1,
                 images_per_s=9.0) for i in range(3)]
    draw_curves({"": rows}, tmp_path / "one.png")
    panels, = drawn
    assert {title: [*lines] for title, lines in panels.items()} == {
        "loss": ["loss", "chance"], "standard deviation of a coordinate": ["deviation 1"],
        "learning rate": ["learning rate"]}
    assert panels["loss"]["loss"].get_xydata().tolist() == [[0, 3], [0.5, 2], [1, 1]]
    assert panels["loss"]["loss"].get_linestyle() == "-"
    assert panels["loss"]["chance"].get_linestyle() == "--"
    shorter = [{key: row[key] for key in ("step", "epoch", "loss", "lr")} for row in rows[:2]]
    draw_curves({"a": rows, "b": shorter}, tmp_path / "two.png")
    panels = {axes.get_title(): axes.lines for axes in figures[1].axes}
    assert [*panels] == ["loss", "learning rate"]  # the columns that both have
    assert panels["loss"][1].get_xydata().tolist() == [[0, 3], [0.5, 2]]
    colours = [line.get_color() for line in panels["loss"]]
    assert len({*colours}) == 2 == len(colours)  # a colour for each run
    assert colours == [line.get_color() for line in panels["learning rate"]]
    legend, = figures[1].legends
    assert [text.get_text() for text in legend.texts] == ["a", "b"]
    assert [line.get_color() for line in legend.get_lines()] == colours
    with Image.open(tmp_path / "two.png") as image:
        assert image.width == pytest.approx(6.5 * 150, rel=0.1) and image.height < image.width


def test_panels_of_a_run_with_levels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: figures.append(figure))
    columns = ["loss", "loss_chance", "gg_res2", "ll_res2", "gl_res5", "gg_chance", "accuracy",
               "similarity_positive", "similarity_negative", "deviation", "lr", "no_box",
               "ll_res3"]
    draw_curves({"": [dict(step=i, epoch=i, images_per_s=1.0, **dict.fromkeys(columns, float(i)))
                      for i in range(1, 4)]}, "x.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert [*panels] == ["loss", "accuracy against the queue", "cosine similarity",
                         "standard deviation of a coordinate", "learning rate",
                         "share of images without a box", "parts of the loss"]
    parts = {line.get_label(): line for line in panels["parts of the loss"].lines}
    assert [*parts] == ["global-global Res2", "local-local Res2", "global-local Res5",
                        "global-global chance", "local-local Res3"]
    style = {name: (line.get_color(), line.get_linestyle()) for name, line in parts.items()}
    assert style["global-global Res2"][0] == style["local-local Res2"][0]  # levels by colour
    assert style["local-local Res2"][1] == style["local-local Res3"][1] == ":"  # kinds by line
    assert style["global-global chance"][1] == "--" and len({*style.values()}) == 5
    assert all(tick == int(tick) for axes in panels.values() for tick in axes.get_xticks())


def test_what_is_measured_now_and_then_is_drawn_where_it_is_known(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: figures.append(figure))
    (tmp_path / "log.csv").write_text("step,epoch,loss,AP,AP50\n1,1,9,nan,nan\n2,2,8,1.5,4\n"
                                      "3,3,7,nan,nan\n4,4,6,2.5,5\n")
    draw_curves({"": read_log(tmp_path / "log.csv")}, "x.png")
    loss, ap = figures[0].axes
    assert ap.get_title() == "average precision (%)"
    assert {line.get_label(): line.get_xydata().tolist() for line in ap.lines} == {
        "AP": [[2, 1.5], [4, 2.5]], "AP50": [[2, 4], [4, 5]]}
    assert len(loss.lines[0].get_xydata()) == 4


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
        pixels = np.array(image.convert("RGB"))[:, :460].astype(int)  # without the colour bar
    dark_red = (pixels[..., 0] < 150) & (pixels[..., 0] > 80) & (pixels[..., 1:] < 60).all(-1)
    assert dark_red.sum() > 250 and dark_red.any(0).sum() > 250


def test_a_grid_of_narrow_images_is_not_endless():
    for heights, widths in (([1, 1], [0.01]), ([20] * 4, [1, 1])):
        figure, axes = image_grid(heights, widths)
        assert axes.shape == (len(heights), len(widths))
        assert figure.get_size_inches().tolist() == pytest.approx([6.5, 19.5])
    assert image_grid([1, 1], [1, 1])[0].get_size_inches()[1] == pytest.approx(6.5 + 0.6)


def test_names_hide_no_other_and_stay_inside():
    """All boxes are drawn; each name that is drawn, as laid out in the end, is inside the image and
    clear of the others, and only those without a free corner are left out."""
    _, (line,) = image_grid([1], [1, 1])
    torch.manual_seed(0)
    corner, side = torch.rand(40, 2) * 80, 5 + torch.rand(40, 2) * 40
    boxes = torch.cat([corner, (corner + side).clamp(max=100)], dim=1).tolist()
    show(line[0], torch.zeros(3, 100, 100))
    outline(line[0], boxes, ["C1"] * 40, [f"name {i}" for i in range(40)])
    show(line[1], torch.zeros(3, 100, 100))
    outline(line[1], [[60, 2, 98, 40], [10, 60, 50, 99]], ["C0", "C1"], ["alone", "also alone"])
    assert len(line[0].patches) == 40 and 8 < len(line[0].texts) < 40
    assert [text.get_text() for text in line[1].texts] == ["alone", "also alone"]
    line[0].figure.draw_without_rendering()
    for ax in line:
        extents = [text.get_window_extent() for text in ax.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
        assert all(ax.bbox.x0 <= e.x0 and e.x1 <= ax.bbox.x1 for e in extents)
        assert all(ax.bbox.y0 <= e.y0 and e.y1 <= ax.bbox.y1 for e in extents)


def test_the_picture_of_detections():
    """Every annotation, and the detections of enough score, whatever an image's size."""
    items = [(torch.zeros(3, 400, 600).byte(),
              dict(boxes=torch.tensor([[10.0, 20, 300, 220]] * 7), labels=torch.ones(7).long())),
             (torch.zeros(3, 300, 200).byte(),
              dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0)))]
    seen = [dict(boxes=torch.tensor([[10.0, 10, 200, 100], [200, 0, 500, 300], [0, 0, 40, 40]]),
                 labels=torch.tensor([0, 1, 1]), scores=torch.tensor([0.9, 0.25, 0.1]))] * 2
    figure = draw_detections(items, {"first": seen, "second": seen}, ["cat", "dog"], score=0.2)
    assert [len(axes.patches) for axes in figure.axes] == [7, 0, 2, 2, 2, 2]
    assert {text.get_text() for text in figure.axes[0].texts} == {"dog"}
    assert [text.get_text() for text in figure.axes[2].texts] == ["cat 0.90", "dog 0.25"]
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == [
        "annotated", "first, score 0.2 or more", "second, score 0.2 or more"]
    cat, dog = figure.axes[2].patches
    assert cat.get_bbox().extents.tolist() == [10, 10, 200, 100]
    assert cat.get_edgecolor() != dog.get_edgecolor()
    left = torch.zeros(3, 400, 600).bool()
    left[:, :, :300] = True
    masked = draw_detections(items[:1], {"found": [dict(seen[0], masks=left.numpy())]},
                             ["cat", "dog"], score=0.2)
    image, cat, dog = masked.axes[1].images
    assert len(masked.axes[0].images) == 1  # its annotations have no masks
    for layer, box in ((cat, masked.axes[1].patches[0]), (dog, masked.axes[1].patches[1])):
        colour = layer.get_array()
        assert colour.shape == (400, 600, 4) and (colour[:, 300:] == 0).all()
        assert colour[0, 0].tolist() == pytest.approx([*box.get_edgecolor()[:3], 0.5])
        assert [*layer.get_extent()] == [*image.get_extent()] == [0, 600, 400, 0]
    points = torch.zeros(3, 17, 3)
    points[:2, 0], points[0, 1] = torch.tensor([4.0, 5, 0.9]), torch.tensor([6.0, 7, 0.04])
    dotted = draw_detections(items[:1], {"found": [dict(seen[0], keypoints=points)]},
                             ["cat", "dog"], score=0.2)
    assert not dotted.axes[0].collections
    drawn = [dots.get_offsets().tolist() for dots in dotted.axes[1].collections]
    assert drawn == [[[4.5, 5.5]]] * 2  # those that are sure, in the pixel's middle
    default = draw_detections(items, {"first": seen}, ["cat", "dog"])
    assert [len(axes.patches) for axes in default.axes] == [7, 0, 1, 1]  # 0.3 or more


def test_names_are_measured_in_the_figure_as_it_is_drawn():
    """Names that fit their images, which grow as the figure is laid out, are there."""
    boxes, labels = torch.tensor([[2.0, 2, 94, 94]]), torch.zeros(1).long()
    items = [(torch.zeros(3, 96, 96).byte(), dict(boxes=boxes, labels=labels))] * 4
    seen = [dict(boxes=boxes, labels=labels, scores=torch.tensor([0.95]))] * 4
    figure = draw_detections(items, dict.fromkeys("abc", seen), ["a longer name yet"])
    assert [len(axes.texts) for axes in figure.axes] == [1] * 16
