"""What the figures have in common: the images that they show, and the backbones to compare."""
from itertools import chain, islice

import numpy as np
import torch
from torchvision.transforms.v2.functional import normalize, resize

from detection.data import Annotated, LabelledScenes
from detection.formats import TEST_SPLITS
from plumbing.files import ImageFolder
from plumbing.weights import load_backbones


def pictures(args, masks=False, keypoints=False):
    """Generate --images of the data set, drawn by --seed: each image (3, H, W) uint8, and its
    annotations, a dict as detection/data.py describes it; None for a folder without any."""
    if args.data is None:  # scenes that pre-training has not seen
        data = LabelledScenes(max(1000, args.images), seed=2, masks=masks, keypoints=keypoints)
    elif args.dataset is None:
        data = ImageFolder(args.data)
    else:
        splits = args.split or TEST_SPLITS[args.dataset]
        data = Annotated(args.dataset, args.data, splits, args.classes, masks=masks,
                         keypoints=keypoints)
    left = args.images
    for i in np.random.default_rng(args.seed).permutation(len(data)).tolist():
        if args.data is None or args.dataset:
            yield data[i]
        else:
            number, image = data.numbered(i)
            if number != i:
                data.report(print, "left out")
                continue
            yield image, None
        left -= 1
        if not left:
            return


def squares(items, args, device):
    """(image, annotations) each -> (B, 3, size, size) float, normalised, on the device."""
    # Paper silent: resized to squares, not cropped, so that objects at the border count too
    pixels = torch.stack([resize(image, [args.size] * 2, antialias=True) for image, _ in items])
    return normalize(pixels.to(device).float() / 255, args.mean, args.std)


def load_all(args, device):
    """What load_backbones gives, random weights with batch norm's statistics of the first 32
    pictures, and an iterator over the pictures."""
    items = pictures(args)
    first = [*islice(items, 32)]
    return (load_backbones(args, device, lambda: squares(first, args, device)),
            chain(first, items))
