"""Does pre-training help?  AP after it, with its spread over seeds:

    python tools/table.py                              random weights and the six methods, on scenes
    python tools/table.py --rows "lr 1=moco_v2.py --lr 1" "lr 2=moco_v2.py --lr 2" \\
        --finetune "--test-split validation" --vary "" --out runs/rates     what a rate is chosen by
    python tools/table.py --rows random=none SoCo=soco.py --file detector.pt \\
        --vary "--box-head 4conv1fc"          with what else SoCo pre-trains: from the same folder
    python tools/table.py --vary " --masks"   a single flag needs a space before it
    python tools/table.py --pretrain "--small --data DIR/JPEGImages" --vary "" --out runs/photos \\
        --finetune "--small --dataset voc --data DIR --train-split train --test-split test"

A row is NAME=SCRIPT FLAGS, or NAME=FILE for weights that are there, or none, with {seed} in the
file's name if each seed has its own.  Each seed of a script is a pre-training of its own, and its
ResNet alone, or another --file, is fine-tuned once with each of --vary, with the same seed.  What
is finished is skipped and what was stopped goes on, so that the same command adds what is missing.
It prints tables in Markdown: for each of --vary mean and standard deviation (of a sample) over the
seeds, each seed, and the differences from other rows, paired by seed; and the cosines between the
weights of a pre-trained ResNet and those it started from.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))
from common import resnet_stages  # noqa: E402
from plumbing.weights import find_architecture, load_checkpoint  # noqa: E402

ROWS = ["random=none", "MoCo v2=moco_v2.py", "DetCo=detco.py", "DUPR=dupr.py", "SoCo=soco.py",
        "Barlow Twins=barlow_twins.py", "VICReg=vicreg.py"]


def run_script(words, out, threads):
    """Run a script with --out, its output at the end of a file in that folder.  Raises
    CalledProcessError if it fails."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as file:
        subprocess.run([sys.executable, PROJECT / words[0], *words[1:], "--out", out], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=file,
                       stderr=subprocess.STDOUT)


def find_folder(row, seed, args):
    """Where a row's runs with one seed are, and whether it has a script, which pre-trains."""
    name, words = row.split("=", 1)
    return args.out / name.replace(" ", "_") / f"seed{seed}", words.split()[0].endswith(".py")


def measure(row, seed, args):
    """Pre-train and fine-tune a row with one seed -> the AP, AP50 and AP75 in % with each of
    --vary."""
    name, words = row.split("=", 1)
    (folder, script), found = find_folder(row, seed, args), []
    weights = folder / args.file if script else words.format(seed=seed)
    if script and not weights.exists():
        run_script([*shlex.split(words), *shlex.split(args.pretrain), "--seed", str(seed)], folder,
                   args.threads)
    for flags in args.vary:
        out = folder / "_".join(["finetune", *flags.replace("-", " ").split()])
        if not (out / "ap.json").exists():
            run_script(["finetune_fasterrcnn.py", *shlex.split(args.finetune), *shlex.split(flags),
                        "--weights", weights, "--seed", str(seed)], out, args.threads)
        ap = json.loads((out / "ap.json").read_text())
        found.append([100 * ap[kind] for kind in ("AP", "AP50", "AP75")])
        print(f"{name}, seed {seed} {flags}: AP {found[-1][0]:.2f}", flush=True)
    return found


def cosines(weights, seed):
    """The cosine between the convolutions of a pre-trained ResNet and those it started from, of
    conv1 and of Res2..Res5: (5,).  Of a layer that only grew or shrank it is 1."""
    torch.manual_seed(seed)
    states = resnet_stages(find_architecture(weights)).state_dict(), load_checkpoint(weights)
    parts = "conv1", "layer1", "layer2", "layer3", "layer4"
    return [torch.cosine_similarity(*(torch.cat([
        w.double().flatten() for name, w in state.items() if name.startswith(part) and w.dim() == 4
    ]) for state in states), dim=0).item() for part in parts]


def spread(values):
    """Mean ± standard deviation of a sample."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else \
        f"{values[0]:.1f}"


def print_table(names, found, flags, against):
    """A table in Markdown.  found: (rows, seeds, 3); against: rows to subtract, by name."""
    rows = [[flags, "AP", "of each seed", "AP50", "AP75", *(f"minus {name}" for name in against)]]
    rows.append(["---"] * len(rows[0]))
    for name, values in zip(names, found):
        each, ap50, ap75 = values.T
        rows.append([name, spread(each), ", ".join(f"{v:.2f}" for v in each), f"{ap50.mean():.1f}",
                     f"{ap75.mean():.1f}",
                     *("" if other == name else spread(each - found[names.index(other)][:, 0])
                       for other in against)])
    print()
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def parse_args(argv=None):
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=ROWS, metavar="NAME=WORDS", help="of each table")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pre-training and fine-tuning")
    add("--pretrain", default="", metavar="FLAGS", help="of every pre-training")
    add("--finetune", default="", metavar="FLAGS", help="of every fine-tuning")
    add("--vary", nargs="+", default=["", "--iterations 1200", "--fraction 0.1"], metavar="FLAGS",
        help="of one fine-tuning each, and so one table")
    add("--file", default="backbone.pt", help="of a pre-training, to fine-tune from")
    add("--against", nargs="+", default=["random", "MoCo v2"], help="rows to subtract")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--threads", type=int, default=1, help="of each of them")
    add("--out", type=Path, default=Path("runs/table"), help="folder of all runs")
    args = parser.parse_args(argv)
    for row in args.rows:
        if not row.partition("=")[2].strip():
            parser.error(f"{row}: a row is NAME=SCRIPT FLAGS, NAME=FILE or NAME=none")
    return args


def main():
    """The command."""
    args = parse_args()
    names = [row.split("=", 1)[0] for row in args.rows]
    tasks = [(row, seed) for seed in args.seeds for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = [*pool.map(lambda task: measure(*task, args), tasks)]
    found = np.array(found).reshape(len(args.seeds), len(names), len(args.vary), 3)
    for i, flags in enumerate(args.vary):
        print_table(names, found[:, :, i].transpose(1, 0, 2), flags,
                    [name for name in args.against if name in names])
    print("\n| cosine to the initial weights | conv1 | Res2 | Res3 | Res4 | Res5 |")
    print("|" + " --- |" * 6)
    for name, row in zip(names, args.rows):
        runs = [(*find_folder(row, seed, args), seed) for seed in args.seeds]
        if all(script and "resne" in find_architecture(run / "backbone.pt")
               for run, script, _ in runs):
            mean = np.mean([cosines(run / "backbone.pt", seed) for run, _, seed in runs], axis=0)
            print(f"| {name} | " + " | ".join(f"{c:.3f}" for c in mean) + " |")


if __name__ == "__main__":
    main()
