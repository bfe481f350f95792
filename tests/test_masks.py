"""COCO's polygons and runs as masks, by hand, by geometry, and as pycocotools draws them."""
import numpy as np
import pytest

from common import InputError
from detection.masks import to_mask


def drawn(text):
    """A mask from rows of . and #."""
    return np.array([[c == "#" for c in row] for row in text.split()])


def same(got, want):
    assert got.dtype == bool and got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)


# ---- by hand ----

def test_polygons_by_hand():
    # Corners between pixels: the pixels within.  The corner (x, y) is the upper left one of [y, x]
    rectangle = [1, 1, 4, 1, 4, 3, 1, 3]
    same(to_mask([rectangle], 4, 6), drawn("...... .###.. .###.. ......"))
    backwards = np.reshape(rectangle, (4, 2))[::-1].ravel().tolist()
    same(to_mask([backwards], 4, 6), to_mask([rectangle], 4, 6))
    # Whose middles are within: 4.4 ends before that of column 4, 4.55, by rounding 4.6, behind it
    same(to_mask([[1, 0, 4.4, 0, 4.4, 2, 1, 2]], 2, 6), drawn(".###.. .###.."))
    same(to_mask([[1, 0, 4.55, 0, 4.55, 2, 1, 2]], 2, 6), drawn(".####. .####."))
    same(to_mask([[0, 0.4, 2, 0.4, 2, 2.4, 0, 2.4]], 4, 3), drawn("##. ##. ... ..."))
    same(to_mask([[0, 0.6, 2, 0.6, 2, 2.6, 0, 2.6]], 4, 3), drawn("... ##. ##. ..."))
    # The upper edge, y = 1 + x / 10, passes the middles of row 1, 1.5, at x = 5
    same(to_mask([[0, 1, 10, 2, 10, 3, 0, 3]], 3, 10), drawn(".......... #####..... ##########"))
    # Edges are the same in both senses, also where rounding hangs on the last digit, as here
    triangle = to_mask([[62.2, 62, 0.2, 27, 62.2, 27]], 64, 65)
    same(to_mask([[62.2, 27, 0.2, 27, 62.2, 62]], 64, 65), triangle)
    # Polygons are united; of one that crosses itself, what it goes around twice is outside
    same(to_mask([[0, 0, 3, 0, 3, 2, 0, 2], [2, 1, 5, 1, 5, 3, 2, 3]], 3, 6),
         drawn("###... #####. ..###."))
    same(to_mask([[0, 0, 4, 0, 4, 3, 0, 3, 0, 0, 1, 1, 3, 1, 3, 2, 1, 2, 1, 1]], 3, 4),
         drawn("#### #..# ####"))
    # It may leave the image, or have nothing of it
    same(to_mask([[-5, -5, 2, -5, 2, 99, -5, 99]], 3, 4), drawn("##.. ##.. ##.."))
    same(to_mask([[50, 0, 60, 0, 60, 9]], 3, 4), drawn(".... .... ...."))
    same(to_mask([[1, 1, 1, 1, 1, 1]], 3, 4), drawn(".... .... ...."))


def test_runs_by_hand():
    # Down the columns: .## ##. ##. ..#
    mask = drawn(".##. ###. #..#")
    same(to_mask({"size": [3, 4], "counts": [1, 4, 1, 2, 3, 1]}, 3, 4), mask)
    same(to_mask({"size": [3, 4], "counts": [1, 2, 0, 2, 1, 2, 3, 1, 0]}, 3, 4), mask)
    same(to_mask({"size": [2, 3], "counts": [0, 4, 2]}, 2, 3), drawn("##. ##."))
    # Compressed: 3, 4 are written as they are; 20 = 10100b in two characters, d = 48 + 32 + 20 and
    # 0, as a single one would say -12; then 18 - 20 = -2, N = 48 + 32 - 2, and 15 - 4 = 11, ;
    runs = {"size": [6, 10], "counts": [3, 20, 4, 18, 15]}
    same(to_mask({"size": [6, 10], "counts": "3d04N;"}, 6, 10), to_mask(runs, 6, 10))


# ---- by geometry ----

def around(polygon, x, y):
    """Whether an odd number of edges crosses the ray from (x, y) to the right; and how far the
    nearest edge is."""
    points, odd, nearest = np.reshape(polygon, (-1, 2)), False, np.inf
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            odd = not odd
        dx, dy = x2 - x1, y2 - y1
        t = np.clip(((x - x1) * dx + (y - y1) * dy) / max(dx ** 2 + dy ** 2, 1e-12), 0, 1)
        nearest = min(nearest, np.hypot(x1 + t * dx - x, y1 + t * dy - y))
    return odd, nearest


def test_pixels_are_those_whose_middle_is_inside():
    # But where the outline passes within 0.3 pixels: it is rounded to fifths of a pixel
    rng, near = np.random.default_rng(0), 0
    for _ in range(30):
        height, width = rng.integers(5, 20, 2).tolist()
        polygons = [(rng.uniform(-0.2, 1.2, (n, 2)) * [width, height]).ravel().tolist()
                    for n in rng.integers(3, 8, 2)]
        masks = [to_mask([polygon], height, width) for polygon in polygons]
        for polygon, mask in zip(polygons, masks):
            for y, x in np.ndindex(height, width):
                inside, far = around(polygon, x + 0.5, y + 0.5)
                assert far < 0.3 or mask[y, x] == inside
                near += far < 0.3
        same(to_mask(polygons, height, width), masks[0] | masks[1])
    assert near < 2500  # of some 8,000

# ---- against pycocotools ----


def random_polygons(rng, height, width):
    """Up to three polygons of one kind: whole and half coordinates, any, also outside the image,
    stars, and what meets the rounding: equal points, borders, fifths and tenths of a pixel."""
    polygons, kind = [], rng.integers(5)
    for n in rng.choice([3, 4, 5, 12, 40], rng.integers(1, 4)):
        if kind == 0:
            xy = rng.integers(0, 2 * max(height, width), (n, 2)) / rng.choice([1, 2])
        elif kind == 1:
            xy = rng.uniform(-0.3, 1.3, (n, 2)) * [width, height]
        elif kind == 2:
            angle, r = np.sort(rng.uniform(0, 7, n)), rng.uniform(0.5, 1, n) * rng.uniform(1, width)
            xy = rng.random(2) * [width, height] + (r * [np.cos(angle), np.sin(angle)]).T
            xy = xy.round(2)
        elif kind == 3:
            xy = rng.integers(-5, 10 * max(height, width), (n, 2)) / 10
        else:
            xy = rng.choice([0, 0.1, 0.5, 0.6, 1, 2.5, width - 0.5, width, height - 1, height],
                            (n, 2))
            xy[1] = xy[0]
        polygons.append(xy.ravel().tolist())
    return polygons


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools' own
def test_polygons_and_runs_equal_pycocotools():
    peer = pytest.importorskip("pycocotools.mask")
    for seed in range(600):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 90, 2).tolist()
        polygons = random_polygons(rng, height, width)
        coded = peer.merge(peer.frPyObjects(polygons, height, width))
        want = peer.decode(coded).astype(bool)
        same(to_mask(polygons, height, width), want)
        if seed % 3 == 0:  # masks of many runs, and of none
            want = rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 1])
            coded = peer.encode(np.asfortranarray(want, dtype=np.uint8))
        same(to_mask({**coded, "counts": coded["counts"].decode()}, height, width), want)
        flat = want.T.ravel()
        ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
        runs = {"size": [height, width], "counts": np.diff(ends, prepend=0).tolist()}
        assert peer.frPyObjects(runs, height, width)["counts"] == coded["counts"]
        same(to_mask(runs, height, width), want)


# ---- faults ----

SIZE = {"size": [2, 3]}
TRIANGLE = [0, 0, 3, 0, 3, 2]


@pytest.mark.parametrize("segmentation, message", [
    ([], r"neither polygons nor runs: \[\]"),
    (None, "neither polygons nor runs: None"),
    ("6", "neither polygons nor runs: '6'"),
    (TRIANGLE, "no list of numbers of pixels: 0"),
    ([TRIANGLE, [1, 2, 3, 4, 5, 6, 7]], "odd number of coordinates, 7"),
    ([[1, 2, 3, 4]], "2 points, fewer than 3"),
    ([TRIANGLE, []], "0 points, fewer than 3"),
    ([["a", 0, 3, 0, 3, 2]], "no list of numbers of pixels"),
    ([[None, 0, 3, 0, 3, 2]], "no list of numbers of pixels"),
    ([[[0, 0], [3, 0], [3, 2]]], "no list of numbers of pixels"),
    ([[[0, 0], [3]]], "no list of numbers of pixels"),
    ([[float("nan"), 0, 3, 0, 3, 2]], "no list of numbers of pixels"),
    ([[1e9, 0, 3, 0, 3, 2]], "no list of numbers of pixels"),
    ({**SIZE, "counts": [1, 4]}, "sum to 5 pixels, not to 2 x 3"),
    ({**SIZE, "counts": []}, "sum to 0 pixels, not to 2 x 3"),
    ({**SIZE, "counts": [7, -1]}, r"no lengths: \[7, -1\]"),
    ({**SIZE, "counts": [1.5, 4.5]}, "no lengths"),
    ({**SIZE, "counts": "o"}, "end within a number"),
    ({**SIZE, "counts": "6p"}, "the character 'p'"),
    ({**SIZE, "counts": "6 "}, "the character ' '"),
    ({**SIZE, "counts": "O"}, r"no lengths: \[-1\]"),
    ({**SIZE, "counts": "5"}, "sum to 5 pixels"),
    ({**SIZE, "counts": None}, "no lengths: None"),
    (SIZE, "no lengths: None"),
    ({"size": [3, 2], "counts": [6]}, r"runs of size \[3, 2\], expected .* \[2, 3\]"),
    ({"counts": [6]}, "runs of size None"),
])
def test_faults(segmentation, message):
    with pytest.raises(InputError, match=message) as error:
        to_mask(segmentation, 2, 3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
