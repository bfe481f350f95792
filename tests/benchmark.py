"""How fast one core loads: python tests/benchmark.py [--data DIR]   (not part of the test suite)

Compares, on the same 500 x 375 JPEGs and in turn, the two ways to two 224-pixel views of an image:
the usual chain, all of it in the loading process (PIL crop, jitter, gray, blur, flip, tensor),
and this project's share of a loading process (decode, two crops; colour is the device's work).
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import ImageFiles, random_resized_crop, read_image  # noqa: E402

SIZE = (500, 375)


def make_images(folder, number, data):
    """JPEGs of 500 x 375: photos found below ``data``, resized, or smooth noise without it."""
    rng = np.random.default_rng(0)
    photos = ImageFiles(data) if data else None
    for i in range(number):
        if photos:
            image = Image.fromarray(photos[i % len(photos)].permute(1, 2, 0).numpy())
        else:
            image = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        image.resize(SIZE, Image.BICUBIC).save(folder / f"{i:03}.jpg", quality=90)
    return sorted(folder.iterdir())


class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2))))


usual = transforms.Compose([
    transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.RandomApply([PILBlur()], p=0.5),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def load_usual(path):
    with Image.open(path) as image:
        image = image.convert("RGB")
        return usual(image), usual(image)


def load_ours(path):
    image = read_image(path)
    return random_resized_crop(image, 224), random_resized_crop(image, 224)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of photos to use instead of smooth noise")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder), args.images, args.data)
        speeds = {load_usual: [], load_ours: []}
        for load in [*speeds] * (args.rounds + 1):  # in turn: a noisy machine slows both
            start = time.perf_counter()
            for path in paths:
                load(path)
            speeds[load].append(len(paths) / (time.perf_counter() - start))
    (chain, *chains), (ours, *all_ours) = speeds.values()  # the first round warms up
    ratios = np.array(all_ours) / np.array(chains)
    print(f"usual chain {np.median(chains):6.0f} images/s on one core")
    print(f"ours        {np.median(all_ours):6.0f} images/s on one core")
    print(f"ratio       {np.median(ratios):6.1f} (of {args.rounds} rounds: {ratios.min():.1f} to "
          f"{ratios.max():.1f})")


if __name__ == "__main__":
    main()
