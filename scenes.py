"""A synthetic toy data set with boxes, drawn from (seed, index) alone: nothing to download.

1 to 5 textured, rotated shapes a scene; only its outline tells a shape's class.

    python scenes.py --out scenes.png    # a contact sheet, and the speed of drawing
"""
import argparse
import math
import mmap
import time

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, save_image

SHAPES = {  # radius in sides, area in side**2, wedges, their bounds: a u + b v < c is inside
    "disc": (0.5, 0.785, 99, [(1, 0, 1)]),
    "square": (0.63, 0.794, 4, [(1, 0, 0.707)]),
    "triangle": (0.64, 0.532, 3, [(1, 0, 0.5)]),
    "star": (0.6, 0.476, 5, [(0.384, 0.923, 0.384)]),
    "cross": (0.55, 0.556, 4, [(1, 0, 0.96), (0, 1, 0.28)]),
    "ring": (0.53, 0.662, 99, [(1, 0, 1), (-1, 0, -0.5)]),
}
CLASSES = tuple(SHAPES)


def signed_distance(label, x, y, side, turn):
    """Pixels from the points (x, y) to the outline of a shape around (0, 0); negative inside."""
    radius, _, wedges, bounds = SHAPES[CLASSES[label]]
    r, wedge = np.hypot(x, y) / (radius * side), 2 * math.pi / wedges
    angle = np.abs((np.arctan2(y, x) + turn) % wedge - wedge / 2)  # all folded onto half a wedge
    u, v = r * np.cos(angle), r * np.sin(angle)
    return radius * side * np.max([a * u + b * v - c for a, b, c in bounds], axis=0)


def tips(label, x, y, side, turn):
    """The corners of a triangle or a star around (x, y), (5, 2), nan where there are none: first
    the uppermost, then by turns the next one clockwise and the next one counter-clockwise.

    In a mirrored scene 1 and 2, 3 and 4 are exchanged, as left and right are of COCO's keypoints.
    """
    points, number = np.full((5, 2), np.nan), {"triangle": 3, "star": 5}.get(CLASSES[label], 0)
    if number:
        angle = (np.arange(number) + (number == 5) / 2) * 2 * math.pi / number - turn
        at = SHAPES[CLASSES[label]][0] * side * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        order = at[:, 1].argmin() + np.array([0, 1, -1, 2, -2])[:number]
        points[:number] = at[order % number] + [x, y]
    return points


def texture(rng, x, y, size, behind):
    """Stripes, checks or dots (3, h, w) at columns x (w,), rows y (h, 1), unlike `behind`, (3,)."""
    kind, (angle, phase) = rng.integers(3), rng.uniform(0, 2 * math.pi, 2).tolist()
    period = max(4, size * 10 ** rng.uniform(-1.4, (-0.2, -1, -1)[kind]))  # pixels
    c, s = math.cos(angle) * 2 * math.pi / period, math.sin(angle) * 2 * math.pi / period
    u, v = np.sin(c * x + s * y + phase), np.sin(c * y - s * x)
    pattern = rng.uniform(0.5, max(1, period / 6)) * (u, u * v, u + v - 0.7)[kind]  # soft or sharp
    # the first pair of colours of which neither, nor their mean, is like what is behind
    pairs = rng.random((50, 2, 3), dtype=np.float32)
    colours = np.concatenate([pairs, pairs.mean(axis=1, keepdims=True)], axis=1)
    contrast = np.linalg.norm(colours - behind, axis=2).min(axis=1)
    one, two = pairs[np.argmax(contrast > 0.45), :, :, None, None]
    return one + (two - one) * np.clip(0.5 + pattern, 0, 1)


def draw(size, seed, index):
    """A scene: image (3, size, size) uint8, boxes (n, 4) float, labels (n,) int64, masks (n, size,
    size) bool, corners (n, 5, 3), 1 <= n <= 5.

    A mask is what is seen: the pixels that the shape covers at least half and no later shape does.
    Boxes are x1 y1 x2 y2 in pixels, x2 y2 exclusive, tight to it. At least half of each shape is
    seen. Corners are x y of what `tips` gives, and 1; zeros if there is none in the image.
    """
    rng, at = np.random.default_rng([seed, index]), np.arange(size, dtype=np.float32)
    cells = int(2 * 8 ** rng.random())  # 2 to 15
    grid = torch.from_numpy(rng.random((1, 3, cells, cells), dtype=np.float32))
    image = F.interpolate(grid, (size, size), mode="bicubic")[0].numpy()  # blurred colours
    pattern = texture(rng, at, at[:, None], size, image.mean(axis=(1, 2)))
    image += rng.uniform(0.2, 0.6) * (pattern - image)
    top, labels, areas = np.zeros((size, size), dtype=np.int64), [], []  # top: 1 + shape, or 0
    corners = []
    for label in rng.integers(len(CLASSES), size=rng.integers(1, 6)).tolist():
        side = max(8, size * rng.uniform(0.15**0.5, 0.5**0.5) ** 2)  # small ones more often
        reach, area = SHAPES[CLASSES[label]][0] * side + 2, SHAPES[CLASSES[label]][1] * side**2
        for _ in range(20):  # places to try; the first shape keeps its first, 2/3 or more inside
            cx, cy = rng.uniform(0.33 * side, size - 0.33 * side, 2).tolist()
            near = tuple(slice(max(0, int(c - reach)), int(c + reach)) for c in (cy, cx))
            y, x, turn = at[near[0], None], at[near[1]], rng.uniform(0, 2 * math.pi)
            distance = signed_distance(label, x + (0.5 - cx), y + (0.5 - cy), side, turn)
            trial = top.copy()
            trial[near][distance <= 0] = len(labels) + 1
            seen = np.bincount(trial.ravel(), minlength=len(labels) + 2)[1:]
            if all(2 * seen >= [*areas, area]):
                canvas = image[(..., *near)]
                colour = texture(rng, x, y, size, canvas[:, distance <= 0].mean(axis=1))
                canvas += np.clip(0.5 - distance, 0, 1) * (colour - canvas)  # anti-aliased
                top, labels, areas = trial, [*labels, label], [*areas, area]
                corners.append(tips(label, cx, cy, side, turn))
                break
    noise = rng.uniform(0, 0.04) * rng.standard_normal(image.shape, dtype=np.float32)
    image = np.uint8(255 * np.clip(rng.uniform(0.8, 1.15) * image + noise, 0, 1) + 0.5)
    masks = top == np.arange(1, len(labels) + 1)[:, None, None]
    seen = [np.nonzero(mask) for mask in masks]  # (rows, columns) of each shape
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in seen]
    corners = torch.from_numpy(np.array(corners)).float()
    inside = ((corners >= 0) & (corners < size)).all(dim=2, keepdim=True)
    corners = torch.cat([torch.where(inside, corners, 0), inside], dim=2)
    return (torch.from_numpy(image), torch.tensor(boxes).float(), torch.tensor(labels),
            torch.from_numpy(masks), corners)


class Scenes(torch.utils.data.Dataset):
    """n scenes of size x size pixels, drawn by seed: `scenes[i]` is an image (3, size, size) uint8.
    cache=True draws each once, into shared memory."""

    def __init__(self, n, size, seed, cache=False):
        self.n, self.size, self.seed, self.cache = n, size, seed, cache
        self.names = [f"{size} {seed} {i}" for i in range(n)]
        if cache:
            memory = mmap.mmap(-1, n * 4 * size**2)  # shared by forked workers
            pixels = torch.frombuffer(memory, dtype=torch.uint8).view(n, 4, size, size)
            self.images, self.tops = pixels[:, :3], pixels[:, 3]  # tops: 1 + shape, or 0
            self.objects = torch.zeros(n, 5, 5).share_memory_()  # x1 y1 x2 y2 label, then zeros
            self.corners = torch.zeros(n, 5, 5, 3).share_memory_()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.labelled(i)[0]

    def numbered(self, i):
        """As ``plumbing.files.ImageFiles.numbered``, but no other image takes a scene's place."""
        return i, self[i]

    def labelled(self, i):
        """What `draw` gives: image, boxes, labels, masks and corners of n shapes."""
        if not 0 <= i < self.n:
            raise IndexError(f"scene {i} of {self.n}")
        if not self.cache:
            return draw(self.size, self.seed, i)
        if not self.objects[i].any():
            self.images[i], boxes, labels, masks, corners = draw(self.size, self.seed, i)
            self.corners[i, :len(labels)] = corners
            self.tops[i] = (masks * torch.arange(1, len(labels) + 1)[:, None, None]).sum(0)
            self.objects[i, :len(labels)] = torch.column_stack([boxes, labels])  # last: it is drawn
        objects = self.objects[i][self.objects[i, :, 2] > 0]
        masks = self.tops[i] == torch.arange(1, len(objects) + 1)[:, None, None]
        return (self.images[i].clone(), objects[:, :4], objects[:, 4].long(), masks,
                self.corners[i, :len(objects)].clone())


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the built-in scenes.")
    parser.add_argument("--out", default="scenes.png", help="picture to write")
    parser.add_argument("--size", type=int, default=96, help="side of a scene in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    args = parser.parse_args(argv)
    start, tiles, zoom = time.perf_counter(), [], max(1, 200 // args.size)
    scenes = [draw(args.size, args.seed, i) for i in range(96)]
    print(f"{96 / (time.perf_counter() - start):.0f} images/s of {args.size} x {args.size} pixels")
    for image, boxes, labels, *_ in scenes[:24]:
        image = F.interpolate(image[None], scale_factor=zoom)[0]
        names = [CLASSES[label] for label in labels]
        tiles.append(draw_bounding_boxes(image, zoom * boxes, names, colors="white") / 255)
    save_image(tiles, args.out, nrow=6)


if __name__ == "__main__":
    main()
