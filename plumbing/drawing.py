"""How the commands draw: the curves of runs, the correlation of embeddings, detections, and
images in a grid, with what lies over them.

Figures are as wide as a page's text, with letters that can still be read at half that width, in a
column.  Importing this file takes half a second, for matplotlib.
"""
import csv
import math
import re

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"]
PAGE = 6.5  # inches
matplotlib.rcParams.update({
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),  # C0, C1, ...
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 10, "legend.fontsize": 9,
    "grid.alpha": 0.3, "pdf.fonttype": 42,
    "figure.constrained_layout.use": True, "savefig.dpi": 150, "savefig.bbox": "tight"})


def read_log(path):
    """The rows of a log.csv, as dicts of floats."""
    with open(path, newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    return [{name: float(value) for name, value in row.items()} for row in rows]


WORDS = {"gg": "global-global", "ll": "local-local", "gl": "global-local", "lr": "learning rate",
         "res2": "Res2", "res3": "Res3", "res4": "Res4", "res5": "Res5"}
TITLES = {"loss": "loss", "parts": "parts of the loss", "accuracy": "accuracy against the queue",
          "similarity": "cosine similarity", "deviation": "standard deviation of a coordinate",
          "no_box": "share of images without a box", "lr": "learning rate",
          "AP": "average precision (%)"}
LEVEL = re.compile("res[2-5]")


def panel_of(column):
    """The panel of draw_curves in which a column of log.csv is drawn."""
    first = "AP" if column.startswith("AP") else column.split("_")[0]
    if column in ("loss", "loss_chance"):
        return "loss"
    if first in ("loss", "invariance", "variance", "covariance", "redundancy") or \
            LEVEL.search(column) or column.endswith("_chance"):
        return "parts"
    return first if first in TITLES else column


def drawn_columns(logs):
    """The columns that draw_curves draws, all but step, epoch and speed: of one log each; of
    several those that two have, without the parts of the loss."""
    names = [name for rows in logs.values() for name in rows[0]
             if name not in ("step", "epoch", "images_per_s")]
    return [name for name in dict.fromkeys(names) if len(logs) == 1
            or names.count(name) >= 2 and panel_of(name) != "parts"]


def draw_curves(logs, path):
    """Draw drawn_columns of log.csv over the epochs.  logs: label of a run -> its rows
    (read_log).

    Loss, accuracy, similarity, deviation and learning rate have a panel each.  Of one run, the
    parts of the loss have one too, levels by colour; of several, each run has its colour, and the
    columns of a panel their own kinds of lines.
    """
    panels, single = {}, len(logs) == 1
    for column in drawn_columns(logs):
        panels.setdefault(panel_of(column), []).append(column)
    if "parts" in panels:  # last, since its legend is below it
        panels["parts"] = panels.pop("parts")
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure((PAGE * across / 2, 2.6 * down))
    for i, (panel, columns) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        of_all_levels = list(dict.fromkeys(LEVEL.sub("", column) for column in columns))
        for run, rows in enumerate(logs.values()):
            for number, column in enumerate(columns):
                if column not in rows[0]:
                    continue
                level = LEVEL.search(column)
                number_of_kind = of_all_levels.index(LEVEL.sub("", column))
                chance = column.endswith("chance")
                colour = run if not single else int(level[0][-1]) - 2 if level else number
                words = column.split("_")
                if len(words) > 1 and words[0] == panel and panel != "deviation":
                    words = words[1:]
                style = ("-", ":", "-.")[number_of_kind % 3 if level or not single else 0]
                known = [row for row in rows if math.isfinite(row[column])]
                axes.plot([row["epoch"] for row in known], [row[column] for row in known],
                          "--" if chance else style, marker="." if panel == "AP" else "", lw=1.2,
                          label=" ".join(WORDS.get(word, word) for word in words),
                          color="0.4" if chance and single else PALETTE[colour % len(PALETTE)])
        axes.set(title=TITLES.get(panel, panel.replace("_", " ")), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        kinds, levels = {}, {}  # with levels by colour or runs by colour: kinds by line
        for line in axes.lines:
            level, name = re.search("Res[2-5]", line.get_label()), line.get_label()
            kind = "chance" if name.endswith("chance") else re.sub(" ?Res[2-5]", "", name)
            kinds[kind] = Line2D([], [], color="0.3", ls=line.get_linestyle(), label=kind)
            if level:
                levels[level[0]] = Line2D([], [], color=line.get_color(), label=level[0], lw=3)
        if single and levels:
            axes.legend(handles=[*kinds.values(), *levels.values()], ncols=2, loc="upper center",
                        bbox_to_anchor=(0.5, -0.22))
        elif len(kinds) > 1:
            axes.legend(handles=None if single else [*kinds.values()])
    if not single:
        figure.legend(handles=[Line2D([], [], color=PALETTE[run % len(PALETTE)], label=label)
                               for run, label in enumerate(logs)],
                      loc="outside upper center", ncols=min(4, len(logs)))
    figure.savefig(path)


def draw_correlation(z1, z2, path):
    """Draw how each dimension of z1 correlates with each of z2, both (N, D), over their N rows (the
    report, Fig. 2b): the matrix of the first 128 dimensions, and a histogram of all correlations.

    Returns the matrix (D, D), 0 where a dimension is constant.
    """
    number, dim = z1.shape
    z1, z2 = (F.normalize(z.double() - z.double().mean(0), dim=0) for z in (z1, z2))
    matrix = (z1.T @ z2).cpu().numpy()
    figure = Figure((PAGE, 0.5 * PAGE))
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    image = left.imshow(matrix[:128, :128], "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(title=f"correlation over {number} pairs,\ndimensions 1 to {min(dim, 128)} of {dim}",
             xlabel="dimension, second view", ylabel="dimension, first view")
    figure.colorbar(image, ax=left)
    for name, values in (("same", matrix.diagonal()),
                         ("different", matrix[~np.eye(dim, dtype=bool)])):
        if values.size:
            right.hist(values, np.linspace(-1, 1, 81), density=True, alpha=0.6,
                       label=f"{name} dimension:\nmean {values.mean():.2f}, "
                             f"rms {np.sqrt((values ** 2).mean()):.2f}")
    right.set(title=f"all {dim} dimensions;\nby chance: rms {(number - 1) ** -0.5:.2f}",
              xlabel="correlation", ylabel="density", xlim=(-1, 1))
    right.margins(y=0.6)
    right.legend(loc="upper left")
    figure.savefig(path)
    return matrix


# --------------------------------------------------------------------------------- images in a grid


def image_grid(heights, widths, title=""):
    """A figure as wide as a page, and its axes (rows, columns), invisible until something is shown.

    heights, widths: of the rows and columns, in one unit.  The figure is at
    most three times as high as wide; beyond that its images shrink.
    """
    height = PAGE * sum(heights) / sum(widths) + 0.3 * len(heights)
    figure = Figure((PAGE, min(height, 3 * PAGE)), layout="compressed")
    figure.suptitle(title)
    return figure, figure.subplots(
        len(heights), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths,
        subplot_kw=dict(xticks=[], yticks=[], visible=False))


def show(ax, image, title="", values=None, below="", left="", **colours):
    """Draw an image (3, H, W), uint8 or float 0..1, or in its place a map of it (h, w), in colours;
    with text around it."""
    height, width = image.shape[1:]
    shown = image.permute(1, 2, 0) if values is None else values
    ax.set_visible(True)
    ax.imshow(shown.numpy(), extent=(0, width, height, 0), **colours)
    ax.autoscale(False)  # what is drawn over it leaves the limits as they are
    ax.set_title(title)
    ax.set_xlabel(below, fontsize=8, labelpad=2)
    ax.set_ylabel(left, rotation=0, ha="right", va="center")


def outline(ax, boxes, colours, names):
    """Draw boxes x1 y1 x2 y2, and the name of each at a corner, inside the image and where it hides
    no earlier name; a name that finds no such place is left out.  Measures the axes
    as they are, so lay them out first (draw_without_rendering)."""
    taken = []
    for (x1, y1, x2, y2), colour in zip(boxes, colours):
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.5,
                               path_effects=[withStroke(linewidth=2.5, foreground="white")]))
    for (x1, y1, x2, y2), colour, name in zip(boxes, colours, names):
        for x, y, ha, va in ((x1, y1, "left", "top"), (x2, y1, "right", "top"),
                             (x1, y2, "left", "bottom"), (x2, y2, "right", "bottom"),
                             (x1, y1, "left", "bottom"), (x1, y2, "left", "top")):  # outside
            label = ax.annotate(
                name, (x, y), (2 if ha == "left" else -2, -2 if va == "top" else 2),
                textcoords="offset points", ha=ha, va=va, fontsize=7, color="white",
                bbox=dict(facecolor=colour, edgecolor="none", pad=1), in_layout=False)
            extent = label.get_window_extent().padded(2)
            inside = ax.bbox.contains(*extent.min) and ax.bbox.contains(*extent.max)
            if inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
            label.remove()


def fill(ax, masks, colours):
    """Lay masks (n, H, W) bool over an image of H x W pixels, each in its colour."""
    for mask, colour in zip(masks, colours):
        layer = mask[..., None] * torch.tensor(to_rgba(colour, 0.5))  # (H, W, 4), clear outside
        height, width = mask.shape
        ax.imshow(layer.numpy(), extent=(0, width, height, 0), interpolation="nearest")


def dots(ax, keypoints, colours):
    """Draw keypoints (n, K, 3), x y of pixels and how sure they are, each object's in its colour;
    those of 0.05 or less are left out (detectron2, utils/visualizer.py)."""
    for points, colour in zip(keypoints, colours):
        x, y, _ = points[points[:, 2] > 0.05].T + 0.5
        ax.scatter(x, y, 12, colour, edgecolors="white", linewidths=0.5)


def mark_places(ax, box, flipped, side):
    """Divide a box x1 y1 x2 y2 into side x side places, mirrored if it is flipped, and colour one
    in side + 2: the same places in every box."""
    x1, y1, x2, y2 = box
    width, height = (x2 - x1) / side, (y2 - y1) / side
    for i in range(side * side):
        row, column = divmod(i, side)
        corner = x1 + (side - 1 - column if flipped else column) * width, y1 + row * height
        colour = to_rgba(f"C{i // (side + 2)}", 0.8) if i % (side + 2) == 0 else "none"
        ax.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="white",
                               linewidth=0.5))


def draw_detections(items, found, classes, score=0.3):
    """A figure of some items of a data set: their annotations, and below them what each detector
    found with at least that score.  found: the detector's name -> what detect returns for the
    items, with masks unpacked."""
    shown = {"annotated": [truth for _, truth in items],
             **{f"{name}, score {score:g} or more": seen for name, seen in found.items()}}
    shapes = [image.shape[1:] for image, _ in items]
    figure, rows = image_grid([1] * len(shown), [width / height for height, width in shapes])
    for row, title in zip(rows, shown):
        for ax, (image, _) in zip(row, items):
            show(ax, image)
        row[0].set_title(title, loc="left")
    figure.draw_without_rendering()  # lays out the axes, which outline measures
    for row, seen in zip(rows, shown.values()):
        for ax, objects in zip(row, seen):
            scores = objects.get("scores", torch.ones(len(objects["boxes"])))
            best = scores >= score
            labels = objects["labels"][best].tolist()
            names = [classes[label] for label in labels] if "scores" not in objects else [
                f"{classes[label]} {value:.2f}" for label, value in zip(labels, scores[best])]
            colours = [f"C{n % len(PALETTE)}" for n in labels]
            if "masks" in objects:
                fill(ax, torch.as_tensor(objects["masks"])[best], colours)
            outline(ax, objects["boxes"][best].tolist(), colours, names)
            if "keypoints" in objects:
                dots(ax, objects["keypoints"][best], colours)
    return figure
