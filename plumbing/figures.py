"""How the commands draw: the curves of runs, the correlation of embeddings, and visualize.py's
images in a grid, with what lies over them.  Importing it takes half a second, for matplotlib."""
import csv
import math
import re

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"]
matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE)  # C0, C1, ...


def read_log(path):
    """The rows of a log.csv, as dicts of floats."""
    with open(path, newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    return [{name: float(value) for name, value in row.items()} for row in rows]


WORDS = {"gg": "global-global", "ll": "local-local", "gl": "global-local", "lr": "learning rate",
         "res2": "Res2", "res3": "Res3", "res4": "Res4", "res5": "Res5"}
TITLES = {"loss": "loss", "parts": "parts of the loss", "accuracy": "accuracy against the queue",
          "similarity": "cosine similarity", "deviation": "standard deviation of a coordinate",
          "lr": "learning rate"}
LEVEL = re.compile("res[2-5]")


def panel_of(column):
    """The panel of draw_curves in which a column of log.csv is drawn."""
    first = column.split("_")[0]
    if column in ("loss", "loss_chance"):
        return "loss"
    if first in ("loss", "invariance", "variance", "covariance", "redundancy") or \
            LEVEL.search(column) or column.endswith("_chance"):
        return "parts"
    return first if first in TITLES else column


def shared_columns(logs):
    """The columns, but for step, epoch and speed, that two of the logs have, or all of one."""
    names = [name for rows in logs.values() for name in rows[0]
             if name not in ("step", "epoch", "images_per_s")]
    return [name for name in dict.fromkeys(names) if names.count(name) >= min(2, len(logs))]


def draw_curves(logs, path):
    """Draw the shared columns of log.csv over the epochs.  logs: label of a run -> its rows
    (read_log).

    Loss, accuracy, similarity, deviation and learning rate have a panel each.  Of one run, the
    parts of the loss have one too, levels by colour; of several, each run has its colour, and the
    columns of a panel their own kinds of lines.
    """
    panels, single = {}, len(logs) == 1
    for column in shared_columns(logs):
        if single or panel_of(column) != "parts":
            panels.setdefault(panel_of(column), []).append(column)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure((3.6 * across, 2.8 * down), layout="constrained")
    for i, (panel, columns) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        kinds = list(dict.fromkeys(LEVEL.sub("", column) for column in columns))
        for run, (label, rows) in enumerate(logs.items()):
            for number, column in enumerate(columns):
                if column not in rows[0]:
                    continue
                level, kind = LEVEL.search(column), kinds.index(LEVEL.sub("", column))
                chance = column.endswith("chance")
                colour = run if not single else int(level[0][-1]) - 2 if level else number
                name = " ".join(WORDS.get(word, word) for word in column.split("_"))
                text = name if single else label if number == 0 else f"{label}, {name}"
                style = ("-", ":", "-.")[kind % 3 if level or not single else 0]
                axes.plot([row["epoch"] for row in rows], [row[column] for row in rows],
                          "--" if chance else style, label=text, lw=1.2,
                          color="0.4" if chance and single else PALETTE[colour % len(PALETTE)])
        axes.set_title(TITLES.get(panel, panel.replace("_", " ")), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if single and len(axes.lines) > 6:  # too many to name each: levels by colour, kinds by line
            keys = {}
            for line in axes.lines:
                level, name = re.search("Res[2-5]", line.get_label()), line.get_label()
                kind = "chance" if name.endswith("chance") else re.sub(" ?Res[2-5]", "", name)
                keys[kind] = Line2D([], [], color="0.3", ls=line.get_linestyle(), label=kind)
                if level:
                    keys[level[0]] = Line2D([], [], color=line.get_color(), label=level[0], lw=3)
            axes.legend(handles=list(keys.values()), fontsize=7, ncols=4, loc="upper center",
                        bbox_to_anchor=(0.5, -0.2))
        elif len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def draw_correlation(z1, z2, path):
    """Draw how each dimension of z1 correlates with each of z2, both (N, D), over their N rows: the
    matrix of the first 128 dimensions, and a histogram of the correlations of all.

    Returns the matrix (D, D), 0 where a dimension is constant.
    """
    number, dim = z1.shape
    z1, z2 = (F.normalize(z.double() - z.double().mean(0), dim=0) for z in (z1, z2))
    matrix = (z1.T @ z2).cpu().numpy()
    figure = Figure((11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(matrix[:128, :128], "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(title=f"correlation over {number} pairs, dimensions 1 to {min(dim, 128)} of {dim}",
             xlabel="dimension, second view", ylabel="dimension, first view")
    figure.colorbar(image, ax=left)
    for name, values in (("same", matrix.diagonal()),
                         ("different", matrix[~np.eye(dim, dtype=bool)])):
        if values.size:
            right.hist(values, np.linspace(-1, 1, 81), density=True, alpha=0.6,
                       label=f"{name} dimension: mean {values.mean():.2f}, "
                             f"rms {np.sqrt((values ** 2).mean()):.2f}")
    right.set(title=f"all {dim} dimensions; by chance: rms {(number - 1) ** -0.5:.2f}",
              xlabel="correlation", ylabel="density")
    right.legend()
    figure.savefig(path, dpi=80)
    return matrix


# ------------------------------------------------------------------------- pieces of visualize.py


def image_grid(rows, widths, title=""):
    """A figure 900 pixels wide, and its axes (rows, columns), invisible until something is shown.

    widths: of the columns, relative to the height of a row.
    """
    figure = Figure((9, rows * 9 / sum(widths) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths,
                                   subplot_kw=dict(xticks=[], yticks=[], visible=False))


def show(ax, image, title="", values=None, below="", left="", **colours):
    """Draw an image (3, H, W), uint8 or float 0..1, or in its place a map of it (h, w), in colours;
    with text around it."""
    height, width = image.shape[1:]
    shown = image.permute(1, 2, 0) if values is None else values
    ax.set_visible(True)
    ax.imshow(shown.numpy(), extent=(0, width, height, 0), **colours)
    ax.autoscale(False)  # what is drawn over it leaves the limits as they are
    ax.set_title(title, fontsize=8)
    ax.set_xlabel(below, fontsize=8, labelpad=2)
    ax.set_ylabel(left, fontsize=9)


def outline(ax, box, colour, name, corner=0):
    """Draw a box x1 y1 x2 y2 with its name in a corner: 0 top left, 1 top right, 2 and 3 bottom."""
    x1, y1, x2, y2 = box
    x, horizontal, right = (x2, "right", -2) if corner % 2 else (x1, "left", 2)
    y, vertical, up = (y2, "bottom", 2) if corner % 4 >= 2 else (y1, "top", -2)
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.5,
                           path_effects=[withStroke(linewidth=2.5, foreground="white")]))
    ax.annotate(name, (x, y), (right, up), textcoords="offset points", ha=horizontal, va=vertical,
                fontsize=7, color="white", bbox=dict(facecolor=colour, edgecolor="none", pad=1))


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
