"""COCO's `segmentation` -> a mask, the very pixels that pycocotools gives, in NumPy.

A segmentation is a list of polygons, [[x1, y1, x2, y2, ...], ...] in pixels, whose union is the
mask, or a run-length encoding, {"size": [H, W], "counts": runs}: the lengths of the runs of 0, 1,
0, ... down the first column, the second one, and so on, as a list or, compressed, a string.
"""
import numpy as np

from common import InputError


def to_mask(segmentation, height, width):
    """COCO's ``segmentation`` in an image of height x width pixels -> its mask (H, W) bool.

    Raises InputError: neither polygons nor runs; a polygon of an odd number of coordinates, of
    fewer than 3 points, or with what is no number of pixels; runs of another size than the image's,
    that do not sum to its pixels, or with characters or an end that no compressed ones have.
    """
    if isinstance(segmentation, dict):
        size, runs = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise InputError(f"runs of size {size}, expected [height, width] [{height}, {width}]")
        runs = _decompress(runs) if isinstance(runs, str) else runs
        if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
            raise InputError(f"runs that are no lengths: {runs!r:.80}")
        if sum(runs) != height * width:
            raise InputError(f"runs that sum to {sum(runs)} pixels, not to {height} x {width}")
        return _mask_from_runs(runs, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError(f"neither polygons nor runs: {segmentation!r:.80}")
    return np.logical_or.reduce([
        _mask_from_runs(_polygon_runs(polygon, height, width), height, width)
        for polygon in segmentation])


def to_runs(mask):
    """A mask (H, W) bool -> the lengths of its runs of 0, 1, 0, ... down the columns, int32: some
    thousandth of the memory."""
    pixels = np.asarray(mask).T.ravel()
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(changes, prepend=0, append=pixels.size).astype(np.int32)


class Unpacked:
    """A sequence of dicts, images or detections, whose masks (n, H, W) bool are made of their
    ``runs`` and ``size`` (H, W) when an item is asked for; without runs, of the dicts as they are.
    """

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if "runs" not in image:
            return image
        height, width = image["size"]
        masks = np.zeros((len(image["runs"]), width * height), dtype=bool)
        for pixels, runs in zip(masks, image["runs"]):
            ends = np.cumsum(runs).tolist()
            for start, end in zip(ends[::2], ends[1::2]):  # of the runs of 1
                pixels[start:end] = True
        return {**image, "masks": masks.reshape(-1, width, height).swapaxes(1, 2)}


def _mask_from_runs(runs, height, width):
    """The lengths of the runs of 0, 1, 0, ... down the columns -> the mask (H, W) bool."""
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # (W H,)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def _decompress(text):
    """The list of runs that pycocotools writes as a string.

    Five bits a character, from 48 = "0" on, the lowest first; 32 says that more follow, and 16 in
    the last one that the number is negative.  From the fourth run on it is the difference to the
    run before the last.  Source: cocoapi, maskApi.c, rleFrString.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise InputError(f"compressed runs with the character {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << shift - 4  # 2^shift if the sign is set
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise InputError("compressed runs that end within a number")
    return runs


def _polygon_runs(polygon, height, width):
    """A polygon [x1, y1, x2, y2, ...] -> its runs, as pycocotools draws it.

    Its outline is walked on a grid five times as fine as the pixels.  Where it crosses the middle
    of a column of pixels, inside and outside change places from there on down: a pixel that it goes
    around twice is outside.  Source: cocoapi, maskApi.c, rleFrPoly.
    """
    try:
        xy = np.array(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        xy = np.array(np.nan)
    if xy.ndim != 1 or not (abs(xy) < 1e5).all():
        raise InputError(f"a polygon that is no list of numbers of pixels: {polygon!r:.80}")
    if len(xy) % 2:
        raise InputError(f"a polygon with an odd number of coordinates, {len(xy)}")
    if len(xy) < 6:
        raise InputError(f"a polygon of {len(xy) // 2} points, fewer than 3")
    start = np.trunc(5 * xy + 0.5).reshape(-1, 2)
    edge = np.roll(start, -1, axis=0) - start  # (points, 2)
    longer = abs(edge).argmax(axis=1)[:, None]  # the axis of an edge's steps; x if both are equal
    length = np.take_along_axis(edge, longer, axis=1)  # (points, 1)
    # An edge is walked from its start to its end, but rounded as seen from its left or upper one
    backwards, length = length < 0, abs(length)
    origin = np.where(backwards, start + edge, start)
    slope = np.where(backwards, -edge, edge) / np.maximum(length, 1)
    steps = length[:, 0].astype(int) + 1
    i = np.repeat(np.arange(len(edge)), steps)  # the edge of each step
    t = np.concatenate([np.arange(n) for n in steps])[:, None]
    t = np.where(backwards[i], length[i] - t, t)
    walk = (origin[i] + slope[i] * t + 0.5).astype(int)  # (all steps, 2)

    x, y = np.minimum(walk[1:], walk[:-1])[walk[1:, 0] != walk[:-1, 0]].T
    x, y = x[x % 5 == 2] // 5, y[x % 5 == 2]  # columns whose middle, 5 x + 2.5, is crossed
    y = np.clip((y + 2) // 5, 0, height)  # the first row whose middle is below
    changes = np.sort((x * height + y)[(x >= 0) & (x < width)])
    return np.diff(changes, prepend=0, append=height * width)
