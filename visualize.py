"""Look inside: the papers' figures, of one or more pre-trained backbones side by side.

    attention, retrieval, similarity    DetCo, Fig. 5 to 7 and 9
    iou-similarity, correspondence      DUPR, Fig. 6 and 7
    features, detections                the report, Fig. 2a and 1
    views, curves                       what each method feeds its network; log.csv of several runs

The report's Fig. 2b is correlation.png, which barlow_twins.py and vicreg.py draw at the end.

    python visualize.py attention --weights none runs/moco_v2/backbone.pt runs/detco/backbone.pt
    python visualize.py similarity --weights none runs/detco/checkpoint.pt

`none` is a backbone with random weights: what a figure shows of it comes from the architecture
alone.  Batch norm uses its running statistics, with random weights those of up to 32 of the images.
"""
import csv
import math
from pathlib import Path

import torch

from common import InputError
from figures.of_detco import attention, retrieval, similarity
from figures.of_dupr import correspondence, iou_similarity
from figures.of_methods import METHODS, views
from figures.of_report import detections, features
from plumbing.drawing import draw_curves, drawn_columns, read_log
from plumbing.flags import Parser, add_backbone_arguments, real, whole
from plumbing.run import launch
from plumbing.weights import LEVELS, name_weights


def curves(args, _device):
    """Draw the logs of the runs in --weights into --out -> None, and for each column and run the
    first, last, least and greatest value."""
    name_weights(args)
    logs, rows = {}, []
    for label, path in zip(args.labels, args.weights):
        try:
            logs[label] = log = read_log(Path(path, "log.csv") if Path(path).is_dir() else path)
        except (OSError, TypeError, ValueError, csv.Error):
            log = []
        if not log or "epoch" not in log[0]:
            raise InputError(f"{path} is no log of a run: curves takes folders of runs")
    for column in drawn_columns(logs):
        for label, log in logs.items():
            if column in log[0] and any(math.isfinite(row[column]) for row in log):
                values = [row[column] for row in log if math.isfinite(row[column])]
                rows.append(dict(run=label, column=column, first=values[0], last=values[-1],
                                 least=min(values), most=max(values)))
    if not rows:
        raise InputError(f"no column is in two of the logs: {' '.join(args.weights)}")
    draw_curves(logs, args.out)
    return None, rows


FIGURES = {  # name: function; level, images measured, drawn
    "attention": (attention, "res5", 1000, 4), "retrieval": (retrieval, "res5", 1000, 3),
    "similarity": (similarity, "res5", 3200, 1), "features": (features, "res5", 1000, 1),
    "iou-similarity": (iou_similarity, "res4", 200, 1), "views": (views, "res5", 1000, 1),
    "correspondence": (correspondence, "res4", 50, 2), "curves": (curves, "res5", 1000, 1),
    "detections": (detections, "res5", 1000, 4)}


def print_table(rows, path=None):
    """Print dicts as aligned columns, numbers with four digits; all digits go to a CSV file."""
    rows = [{k: v.item() if torch.is_tensor(v) else v for k, v in row.items()} for row in rows]
    names = [*dict.fromkeys(name for row in rows for name in row)]
    values = [[row.get(name, "") for name in names] for row in rows]
    table = [names] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in line]
                       for line in values]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    if path:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, *values])


@torch.no_grad()
def visualize(args, device):
    """Draw the figure, print the numbers behind it."""
    for path in filter(None, (args.out, args.csv)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure, rows = FIGURES[args.figure][0](args, device)
    if figure:
        figure.savefig(args.out)
    print_table(rows, args.csv)
    print(f"{args.out} is the figure")


def parse_args(argv=None):
    """The papers' sizes and levels by default, of fewer images; without --data, smaller images."""
    parser = Parser(description="Draw what pre-trained backbones have learnt; with the figure "
                    "detections --weights are fine-tuned checkpoints, with curves folders of runs.")
    parser.add_argument("figure", choices=[*FIGURES])
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--dataset", choices=["voc", "coco"], help="layout of a --data that has annotations")
    add("--split", nargs="+", help="of --dataset, as finetune_fasterrcnn.py names them")
    add("--images", type=whole(1), help="how many are measured, drawn by --seed (default: by "
        "figure; attention, features, detections and views measure what they draw)")
    add("--rows", type=whole(1), help="how many of them are drawn (default: by figure)")
    add("--size", type=whole(32), help="side of an image in pixels; not in views, detections and "
        "curves, in similarity only of those for the batch norm of random weights")
    add("--score", type=real(0, 1), default=0.3, help="least score of a detection that is drawn")
    add("--level", choices=LEVELS, help="of the backbone, in DetCo's and DUPR's figures "
        "(default: the paper's; res5 in similarity)")
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="of the figure views")
    add("--out", help="picture to write, .png, .jpg, .pdf or .svg (default: runs/FIGURE.png)")
    add("--csv", metavar="FILE", help="keep the numbers too")
    known = parser.parse_known_args(argv)[0]
    _, level, images, rows = FIGURES[known.figure]
    side, scene_side = (224, 96) if known.figure == "retrieval" else (448, 192)
    parser.set_defaults(level=level, images=images, rows=rows, out=f"runs/{known.figure}.png",
                        size=side if known.data else scene_side, classes=None)
    args = parser.parse_args(argv)
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        parser.error(f"--out {args.out}: no .png, .jpg, .pdf or .svg")
    no_dataset = args.split and not args.dataset and args.figure != "detections"  # has its own
    if no_dataset or (args.dataset and not args.data):
        parser.error("--split needs --dataset, and --dataset needs --data, a folder")
    return args


def main(argv=None):
    """The command."""
    launch(visualize, parse_args, argv)


if __name__ == "__main__":
    main()
