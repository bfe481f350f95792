"""The flags that commands share, and the recipe that --small sets by the number of images."""
import argparse
import math
import os

import numpy as np

from common import InputError
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD


class _Defaults(argparse.HelpFormatter):
    """Help that ends with each flag's default, if it has one and its text names none."""

    def _get_help_string(self, action):
        default = action.default
        shown = [default] if not isinstance(default, list) else default
        if default is None or default is False or "default" in action.help or \
                default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default {' '.join(map(str, shown))})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, and raises InputError for what it cannot parse."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Defaults, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def real(low, high=math.inf, kind=float):
    """An argparse type: a number from ``low`` to ``high``, both included."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def whole(low):
    """An argparse type: a whole number, at least ``low``."""
    return real(low, kind=int)


def add_run_arguments(parser, out):
    """Add the flags of every training command that say where and how it runs, not what it does."""
    add = parser.add_argument_group("run").add_argument
    add("--out", default=out, help="folder of the run (default %(default)s)")
    add("--workers", type=whole(0), default=min(8, os.cpu_count() or 1),
        help="loader workers per process (default %(default)s)")
    add("--seed", type=whole(0), default=0, help="of weights, views and batches")
    add("--precision", choices=("bfloat16", "float32"),
        help="of the networks (default bfloat16 on GPUs, float32 on CPUs)")
    add("--log-every", type=whole(1), default=20, help="steps between lines of log.csv")
    add("--fresh", action="store_true", help="start over in the folder of a run")


def add_data_arguments(parser):
    """Add the flags of every method that say what it trains on, and by which kind of recipe."""
    add = parser.add_argument
    add("--data", help="folder of images, any layout (default: built-in scenes)")
    add("--scenes", type=whole(1), default=4000, help="number of built-in scenes without --data")
    add("--small", action="store_true", help="a recipe for few images, on a CPU or a small GPU, in "
        "place of the paper's (see fit_recipe in plumbing/flags.py); without --data always")


def parse_recipe(parser, argv, small, scenes):
    """Parse a method's flags: by default the paper's recipe, or with --small a small one, of which
    fit_recipe sets what depends on the number of images.

    small, scenes: the small recipe's other values, and those that differ for the built-in scenes.
    """
    parser.description += ("  Defaults are the paper's; without --data, or with --small, a small "
                           "recipe sets others.")
    known = parser.parse_known_args(argv)[0]
    if known.small or known.data is None:
        fitted = {name: None for name in FITTED if name in known}
        of_paper = {name: parser.get_default(name) for name in ("lr", "weight_decay")}
        parser.set_defaults(**{**fitted, "arch": "resnet18", **small})
        known = parser.parse_known_args(argv)[0]
        if getattr(known, "optimizer", None) != small.get("optimizer"):
            parser.set_defaults(**of_paper)  # a rate and a decay are of one optimizer
    if known.data is None:
        parser.set_defaults(**scenes)
    args = parser.parse_args(argv)
    if args.data is None:
        fit_recipe(args, args.scenes)
    return args


FITTED = "batch_size bn_groups queue_size patch_keys momentum epochs warmup".split()


def fit_recipe(args, images):
    """Set what --small leaves open, each unless its flag is given, by the number of images.

    The batch is the largest power of 2 up to 64 and a sixth of the images, if the method has none
    of its own for scenes; batch norm sees groups of 16, or two of fewer.  The queue holds whole
    batches, of at most 256 keys and a quarter of the images; at so few keys m = 0.99 is slow enough
    ((K/B)(1-m) is 0.04 or less).  Training sees 30,000 images, or lasts three epochs; a tenth of
    the epochs is warm-up.
    """
    def fit(name, value):
        if getattr(args, name, 0) is None:
            setattr(args, name, value)

    fit("batch_size", 2 ** max(1, int(math.log2(max(2, min(64, images / 6))))))
    fit("bn_groups", max(2, args.batch_size // 16))
    fit("queue_size", max(1, min(256, images // 4) // args.batch_size) * args.batch_size)
    fit("patch_keys", min(32, args.batch_size))  # DUPR's, which a queue of one batch must hold
    fit("momentum", 0.99)
    fit("epochs", max(3, round(30_000 / images)))
    fit("warmup", max(1, args.epochs // 10))


def interpolate_rate(rates, batch_size):
    """The learning rate that ``rates``, batch size -> rate, gives a batch size: linear in between
    in log2 of the size, constant beyond both ends."""
    return float(np.interp(np.log2(batch_size), np.log2([*rates]), [*rates.values()]))


def add_normalisation_arguments(add):
    """Add --mean and --std by a parser's (or a group's) add_argument."""
    add("--mean", type=real(0, 1), nargs=3, default=[*IMAGENET_MEAN], metavar="M",
        help="of red, green and blue, in 0..1, as in pre-training (default: ImageNet's)")
    add("--std", type=real(1e-3, 1), nargs=3, default=[*IMAGENET_STD], metavar="S",
        help="their standard deviations")


def add_backbone_arguments(parser):
    """Add the flags of the commands that compare backbones, as load_backbones takes them."""
    add = parser.add_argument_group("backbones").add_argument
    add("--weights", nargs="+", default=["none"], metavar="FILE", help="files, or none (default)")
    add("--labels", nargs="+", help="their names in tables and figures (default: their folders')")
    add("--arch", nargs="+", help="torchvision's name of a ResNet or Swin Transformer, of each or "
        "of all (default: as in the files; without any resnet50, for built-in scenes resnet18)")
    add_normalisation_arguments(add)
    add("--seed", type=whole(0), default=0, help="of random weights and of all that is drawn")
