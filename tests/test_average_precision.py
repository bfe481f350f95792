import ast
import contextlib
import io
import warnings

import numpy as np
import pytest
import torch

from detection import average_precision
from detection.average_precision import (IOU_THRESHOLDS, coco_ap, keypoint_ap, mask_ap,
                                         voc07_ap)

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
TWINS, BETWEEN = [[0, 0, 20, 10], [8, 0, 28, 10]], [4, 0, 24, 10]  # of one IoU with both, 16 / 24


def truth(boxes, labels=None, ignore=None):
    image = {"boxes": boxes, "labels": [1] * len(boxes) if labels is None else labels}
    return image if ignore is None else {**image, "ignore": ignore}


def found(boxes, scores, labels=None):
    return {"boxes": boxes, "scores": scores,
            "labels": [1] * len(boxes) if labels is None else labels}


def same(got, want, tolerance=1e-9):
    """Equal results: numbers within tolerance and the same classes."""
    assert got.keys() == want.keys() and got["per_class"].keys() == want["per_class"].keys()
    for name in want.keys() - {"per_class"}:
        assert got[name] == pytest.approx(want[name], abs=tolerance), name
    for label, ap in want["per_class"].items():
        assert got["per_class"][label] == pytest.approx(ap, abs=tolerance), label


# ---- against pycocotools ----

def reference(truths, detections, task="bbox"):
    """The same dict from pycocotools (x y w h boxes; ids from 1, its 0 means unmatched)."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    mask = pytest.importorskip("pycocotools.mask")

    def entry(image, j):
        x1, y1, x2, y2 = map(float, image["boxes"][j])
        thing = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": int(image["labels"][j]),
                 "area": (x2 - x1) * (y2 - y1)}
        if task == "segm":
            pixels = np.asfortranarray(image["masks"][j], dtype=np.uint8)
            thing.update(segmentation=mask.encode(pixels), area=int(pixels.sum()))
        if task == "keypoints":
            thing.update(keypoints=image["keypoints"][j].ravel().tolist(),
                         num_keypoints=int((image["keypoints"][j][:, 2] > 0).sum()))
        if "area" in image:
            thing["area"] = float(image["area"][j])
        return thing

    annotations, results = [], []
    for i, (t, d) in enumerate(zip(truths, detections)):
        annotations += [{**entry(t, j), "image_id": i, "iscrowd": int(crowd),
                         "id": len(annotations) + 1 + j} for j, crowd in enumerate(t["ignore"])]
        results += [{**entry(d, j), "image_id": i, "score": float(score)}
                    for j, score in enumerate(d["scores"])]
    for result in results if task == "segm" else ():
        del result["bbox"]  # or pycocotools takes its area for the mask's
    labels = sorted({a["category_id"] for a in annotations + results})
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = {"images": [{"id": i, "height": 0, "width": 0} for i in range(len(truths))],
                      "annotations": annotations, "categories": [{"id": c} for c in labels],
                      "info": {}}
        gt.createIndex()
        dt = gt.loadRes(results) if results else coco.COCO()
        e = cocoeval.COCOeval(gt, dt, task)
        e.params.imgIds, e.params.catIds = list(range(len(truths))), labels
        e.evaluate()
        e.accumulate()
        e.summarize()
    names = [name for name in NAMES if task != "keypoints" or name != "APs"]  # then mean recalls
    ap = e.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))  # over IoUs, recalls; all areas
    return {**dict(zip(names, e.stats)), "per_class": dict(zip(labels, ap.tolist()))}


def random_case(seed):
    """Images with boxes of every size; detections are moved copies of them, strays and, in some
    images, more than 100 of one class.  Even seeds have integer corners, so that IoUs meet
    thresholds and areas meet 32^2 and 96^2.  Label 7 is never detected, 8 is only crowd, -3 has no
    ground truth."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        side = rng.choice([4, 10, 20, 32, 40, 64, 96, 100, 200], (n, 1))
        wh = np.where(rng.random((n, 1)) < 0.5, side, side * rng.choice([0.5, 1, 1.5], (n, 2)))
        xy = rng.integers(0, 60, (n, 2))
        return np.concatenate([xy, xy + wh], axis=1).astype(float)

    truths, detections = [], []
    for _ in range(rng.integers(1, 9)):
        n = rng.choice([0, 1, 3, 12])
        t = boxes(n)
        label = rng.choice([0, 1, 1, 1, 5, 7, 8], n)
        ignore = (rng.random(n) < 0.2) | (label == 8)
        strays = boxes(rng.choice([0, 2, 8, 120], p=[0.3, 0.3, 0.3, 0.1]))
        copies = rng.integers(0, n, 3 * n if rng.random() < 0.8 else 0) if n else []
        near = t[copies].reshape(-1, 4)
        wh = np.tile(near[:, 2:] - near[:, :2], 2)
        step = rng.choice([-0.25, -0.1, 0, 0, 0, 0, 0.1, 0.2], near.shape)
        d = np.concatenate([near + step * wh, strays])
        d[:, 2:] = np.maximum(d[:, 2:], d[:, :2] + 1)
        d = d.round() if seed % 2 == 0 else d + rng.normal(0, 0.3, d.shape).cumsum(axis=1) * 0.1
        m = len(d)
        dl = np.concatenate([label[copies] if n else [], rng.choice([1, 1, 1, 0, -3], len(strays))])
        dl = np.where((dl == 7) | (rng.random(m) < 0.1), 1, dl).astype(int)
        scores = rng.choice([0.1, 0.3, 0.5, 0.9], m) if seed % 3 else rng.random(m)
        truths.append({"boxes": t, "labels": label, "ignore": ignore})
        if seed % 5 == 0:  # of a segment, smaller than its box
            truths[-1]["area"] = (t[:, 2:] - t[:, :2]).prod(1) * rng.uniform(0.4, 1, n)
        order = rng.permutation(m)
        detections.append({"boxes": d[order], "labels": dl[order], "scores": scores[order]})
    return truths, detections


@pytest.mark.parametrize("part", range(5))
def test_equals_pycocotools(part):
    for seed in range(part * 30, part * 30 + 30):
        truths, detections = random_case(seed)
        same(coco_ap(truths, detections), reference(truths, detections))


def test_equals_pycocotools_at_thresholds_areas_and_equal_ious():
    # Width w of 20 and of 40 gives IoU w/20 or w/40: every threshold is met exactly; 32 x 32
    # and 96 x 96 are small and medium, medium and large.
    truths, detections = [], []
    for side in (20, 32, 40, 96):
        for w in range(side // 2 - 1, side + 1):
            truths.append(truth([[5, 5, 5 + side, 5 + side]], ignore=[False]))
            detections.append(found([[5, 5, 5 + w, 5 + side]], [w / side]))
    same(coco_ap(truths, detections), reference(truths, detections))
    truths = [truth(TWINS, ignore=[False, False]), truth(TWINS[::-1], ignore=[False, False])]
    detections = [found([BETWEEN, TWINS[1]], [0.9, 0.8]), found([BETWEEN, TWINS[1]], [0.7, 0.6])]
    same(coco_ap(truths, detections), reference(truths, detections))


# ---- by hand ----

A, B = [0, 0, 10, 10], [50, 50, 60, 60]  # two small boxes, 100 pixels^2
AWAY = [200, 0, 210, 10]


def test_perfect_detections():
    got = coco_ap([truth([A, [0, 0, 50, 50], [0, 0, 100, 100]], [1, 2, 3]), truth([B])],
                  [found([A, [0, 0, 50, 50], [0, 0, 100, 100]], [0.9, 0.1, 0.4], [1, 2, 3]),
                   found([B], [0.2])])
    assert all(got[name] == pytest.approx(1) for name in NAMES)
    assert got["per_class"] == pytest.approx({1: 1, 2: 1, 3: 1})
    assert all(type(got[name]) is float for name in NAMES)


def test_false_positive_ranked_first():
    # Ranks: FP, TP. Recall 0, 1/2; precision 0, 1/2; the best at any recall >= r is 1/2
    # for the 51 points r = 0.00 ... 0.50, and 0 for the other 50: 51 / 2 / 101.
    got = coco_ap([truth([A, B])], [found([AWAY, A], [0.9, 0.8])])
    for name in ("AP", "AP50", "AP75", "APs"):
        assert got[name] == pytest.approx(25.5 / 101)
    assert got["APm"] == got["APl"] == -1


def test_curve_of_three_ranks():
    # Ranks: TP, FP, TP. Recall 1/2, 1/2, 1; precision 1, 1/2, 2/3; 51 points at 1 and 50 at 2/3.
    got = coco_ap([truth([A]), truth([B])], [found([A, AWAY], [0.9, 0.8]), found([B], [0.7])])
    assert got["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Likewise where the second one is another detection of a box that is taken
    got = coco_ap([truth([A, B])], [found([A, A, B], [0.9, 0.8, 0.7])])
    assert got["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_equal_scores_keep_their_order():
    # FP, TP: recall 0, 1, precision 0, 1/2. TP, FP: precision 1 at recall 1.
    assert coco_ap([truth([A])], [found([AWAY, A], [0.5, 0.5])])["AP"] == pytest.approx(0.5)
    assert coco_ap([truth([A])], [found([A, AWAY], [0.5, 0.5])])["AP"] == pytest.approx(1)


def test_equal_ious_take_the_last_box():
    # The first detection has IoU 16 / 24 with both: at 0.50 ... 0.65 (4 thresholds) it takes the
    # last box, and the second, exactly there, is an FP (IoU 12 / 28 with the other): TP, FP: 51
    # points at 1. At the other 6: FP, TP: 51 points at 1/2.
    got = coco_ap([truth(TWINS)], [found([BETWEEN, TWINS[1]], [0.9, 0.8])])
    assert got["AP"] == pytest.approx((4 * 51 + 6 * 51 / 2) / 10 / 101)


def test_iou_and_area_ranges():
    # IoU 62 * 100 / 100^2 = 0.62: a TP at 0.50, 0.55 and 0.60, 3 of 10 thresholds. The box is
    # large (10000 > 96^2), so medium has no ground truth, though the detection is medium.
    got = coco_ap([truth([[0, 0, 100, 100]])], [found([[0, 0, 62, 100]], [0.5])])
    assert [got[k] for k in ("AP", "AP50", "AP75", "APl")] == pytest.approx([0.3, 1, 0, 0.3])
    assert got["APs"] == got["APm"] == -1


def test_stray_detection_counts_in_its_own_area_range():
    # The large stray ranks first: precision 1/2 over all areas, but small does not see it.
    got = coco_ap([truth([A])], [found([[100, 0, 300, 200], A], [0.9, 0.8])])
    assert got["AP"] == pytest.approx(0.5) and got["APs"] == pytest.approx(1)


def test_ignored_box():
    # Two detections inside the crowd: intersection over their own area is 1, so neither counts
    # and A is found with precision 1. With a plain box their IoU is 100 / 10000: FP, FP, TP:
    # recall 1/2 with precision 1/3, 51 points.
    crowd = [100, 100, 200, 200]
    inside = [[110, 110, 120, 120], [150, 150, 160, 160]]
    detections = [found([*inside, A], [0.9, 0.8, 0.7])]
    got = coco_ap([truth([A, crowd], ignore=[False, True])], detections)
    assert got["AP"] == pytest.approx(1)
    assert coco_ap([truth([A, crowd])], detections)["AP"] == pytest.approx(51 / 3 / 101)


def test_a_box_that_counts_goes_before_an_ignored_one():
    # The detection is half of A, all inside the crowd: at 0.50 it is A's (IoU 1/2 < 1), a TP;
    # above it is the crowd's, so nothing is found: 1 of 10 thresholds.
    got = coco_ap([truth([[0, 0, 20, 20], A], ignore=[True, False])],
                  [found([[0, 0, 10, 5]], [0.5])])
    assert got["AP50"] == pytest.approx(1) and got["AP"] == pytest.approx(0.1)


def test_a_hundred_detections_per_image_and_class():
    # 100 strays fill the class's places; of 99, the TP is the hundredth: precision 1/100.
    # Strays of another class take no place.
    def ap(n, label):
        image = found([AWAY] * n + [A], [0.9] * n + [0.1], [label] * n + [1])
        return coco_ap([truth([A])], [image])["AP"]

    assert [ap(100, 1), ap(99, 1), ap(100, 2)] == pytest.approx([0, 0.01, 1])


def test_classes_without_ground_truth_are_left_out():
    got = coco_ap([truth([A, B, AWAY], [4, 6, 9], [False, True, False])],
                  [found([A, B], [0.5, 0.5], [4, -2])])
    assert got["AP"] == pytest.approx(0.5)  # of 4 (found) and 9 (not found)
    assert list(got["per_class"]) == [-2, 4, 6, 9]
    assert got["per_class"] == pytest.approx({-2: -1, 4: 1, 6: -1, 9: 0})


@pytest.mark.parametrize("truths, detections, labels", [
    ([], [], []),
    ([truth([])], [found([], [])], []),
    ([truth(np.zeros((0, 4)))], [found(np.zeros((0, 4)), np.zeros(0))], []),
    ([truth([])], [found([A], [0.5])], [1]),
    ([truth([A], ignore=[True])], [found([A], [0.5])], [1]),
    ([truth([A], ignore=[True])], [found([], [])], [1]),
])
def test_nothing_counts(truths, detections, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = coco_ap(truths, detections)
    assert all(got[name] == -1 for name in NAMES)
    assert list(got["per_class"]) == labels
    assert all(ap == -1 for ap in got["per_class"].values())


# ---- masks ----

def random_masks(seed):
    """Images with masks of every kind: rectangles, disks and rings, also across the border, noise,
    nothing, everything; the detections are copies of them, moved or with pixels changed, strays,
    and, in some images, more than 100 of one class.  Labels as in random_case."""
    rng = np.random.default_rng(seed)

    def masks(n, height, width):
        y, x = np.ogrid[:height, :width]
        drawn = np.zeros((n, height, width), dtype=bool)
        for mask in drawn:
            kind = rng.choice(["box", "disk", "ring", "noise", "none", "all"],
                              p=[0.3, 0.25, 0.25, 0.1, 0.05, 0.05])
            (cy, cx), r = rng.integers(0, [height, width]), rng.choice([2, 8, 16, 18, 48, 60])
            far = np.hypot(y - cy, x - cx)
            mask[:] = {"box": (abs(2 * y - 2 * cy + 1) < 2 * r) & (abs(2 * x - 2 * cx + 1) < 2 * r),
                       "disk": far < r, "ring": (far < r) & (far >= r * rng.choice([0.3, 0.7])),
                       "noise": rng.random(mask.shape) < 0.3, "none": False, "all": True}[str(kind)]
        return drawn

    truths, detections = [], []
    for _ in range(rng.integers(1, 6)):
        height, width = rng.integers(20, 130, 2)
        n = rng.choice([0, 1, 3, 8])
        t, label = masks(n, height, width), rng.choice([0, 1, 1, 1, 5, 7, 8], n)
        copies = rng.integers(0, n, 3 * n if rng.random() < 0.8 else 0) if n else np.array([], int)
        near = np.array([np.roll(t[g], rng.choice([-3, -1, 0, 0, 1], 2), axis=(0, 1))
                         ^ (rng.random(t[g].shape) < rng.choice([0, 0, 0.02])) for g in copies])
        strays = masks(rng.choice([0, 2, 8, 110], p=[0.3, 0.3, 0.3, 0.1]), height, width)
        d = np.concatenate([near.reshape(-1, height, width), strays]).astype(bool)
        dl = np.concatenate([label[copies], rng.choice([1, 1, 1, 0, -3], len(strays))])
        dl = np.where((dl == 7) | (rng.random(len(d)) < 0.1), 1, dl)
        scores = rng.choice([0.1, 0.3, 0.5, 0.9], len(d)) if seed % 3 else rng.random(len(d))
        truths.append({"boxes": np.zeros((n, 4)), "labels": label, "masks": t,
                       "ignore": (rng.random(n) < 0.2) | (label == 8)})
        if seed % 2:  # annotated: about, but not quite, the pixels
            truths[-1]["area"] = t.sum(axis=(1, 2)) * rng.uniform(0.7, 1.4, n)
        detections.append({"boxes": np.zeros((len(d), 4)), "labels": dl, "masks": d,
                           "scores": scores})
    return truths, detections


@pytest.mark.parametrize("part", range(4))
def test_mask_ap_equals_pycocotools(part):
    for seed in range(part * 30, part * 30 + 30):
        truths, detections = random_masks(seed)
        same(mask_ap(truths, detections), reference(truths, detections, "segm"))


def masked(*masks, **other):
    """An image's dict of masks, whose boxes say nothing."""
    return {"boxes": [[0, 0, 1, 1]] * len(masks), "labels": [1] * len(masks),
            "masks": np.array(masks), **other}


def block(y1, y2, x1, x2):
    """A mask of 60 x 80 pixels with those of a rectangle set."""
    mask = np.zeros((60, 80), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_masks_by_hand():
    # A 10 x 10 square at the border and the same with a hole of 4 x 4: IoU 84 / 100, a TP at 0.50
    # ... 0.80, 7 of 10 thresholds.
    square = block(50, 60, 70, 80)
    ring = square & ~block(53, 57, 73, 77)
    for pair in ((square, ring), (ring, square)):
        got = mask_ap([masked(pair[0])], [masked(pair[1], scores=[0.5])])
        assert got["AP"] == got["APs"] == got["per_class"][1] == pytest.approx(0.7)
        assert got["AP50"] == got["AP75"] == pytest.approx(1) and got["APm"] == got["APl"] == -1
    # The hole and the ring have overlapping boxes, but no common pixel
    assert mask_ap([masked(ring)], [masked(square & ~ring, scores=[0.5])])["AP"] == 0
    # Nothing overlaps an empty mask; as the best detection it is a FP: precision 1/2
    nothing = block(0, 0, 0, 0)
    assert mask_ap([masked(nothing)], [masked(nothing, scores=[0.5])])["AP"] == 0
    assert mask_ap([masked(square)], [masked(nothing, square, scores=[0.9, 0.5])])[
        "AP"] == pytest.approx(0.5)


def test_crowd_of_masks():
    # Both blocks lie within the crowd's pixels, 100 of 100 and 60 of 100, though its IoU with them
    # is small: at 0.50, 0.55 and 0.60 neither counts, above the second is a FP before the TP.
    crowd, alone = block(0, 40, 0, 40), block(50, 60, 70, 80)
    found = masked(block(0, 10, 0, 10), block(34, 44, 0, 10), alone, scores=[0.9, 0.8, 0.7])
    got = mask_ap([masked(crowd, alone, ignore=[True, False])], [found])
    assert got["AP"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)


def test_areas_of_masks():
    # The annotation says that the object is medium.  The stray of 200 pixels, found first, is small
    # whatever its box: only over all areas does it halve the precision.
    truth, stray = block(0, 40, 0, 20), block(50, 60, 0, 20)
    found = masked(stray, truth, scores=[0.9, 0.8], boxes=[[0, 0, 80, 60], [0, 0, 20, 40]])
    got = mask_ap([masked(truth, area=[1500])], [found])
    assert got["AP"] == pytest.approx(0.5) and got["APm"] == pytest.approx(1)
    assert got["APs"] == -1
    got = mask_ap([masked(truth, boxes=[[0, 0, 80, 60]])], [found])  # its own 800 pixels
    assert got["APs"] == pytest.approx(0.5) and got["APm"] == -1


def test_masks_are_asked_for_once():
    truths, detections = random_masks(7)
    asked = []

    class Made:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            asked.append(i)
            return self.images[i]

    same(mask_ap(Made(truths), Made(detections)), mask_ap(truths, detections), 0)
    assert asked == [i for i in range(len(truths)) for _ in range(2)]


# ---- keypoints ----

def random_keypoints(seed):
    """Persons of every size, some without any labelled keypoint, some of them crowds; the
    detections are copies with errors, strays, and, in some images, more than 20 of one class."""
    rng = np.random.default_rng(seed)

    def persons(n):
        side = rng.choice([20, 32, 64, 96, 100, 200], (n, 2))
        xy = rng.integers(0, 200, (n, 2))
        keypoints = xy[:, None] + rng.random((n, 17, 2)) * side[:, None]
        labelled = rng.choice([0, 1, 2], (n, 17)) * (rng.random((n, 1)) < 0.7)
        labelled[rng.random(n) < 0.2, 1:] = 0  # at most the nose
        if seed % 2 == 0:
            keypoints = keypoints.round()
        keypoints[labelled == 0] *= rng.choice([0, 1])  # COCO's are (0, 0)
        return (np.concatenate([xy, xy + side], axis=1).astype(float),
                np.concatenate([keypoints, labelled[..., None]], axis=2))

    truths, detections = [], []
    for _ in range(rng.integers(1, 8)):
        n = rng.choice([0, 1, 3, 8])
        boxes, keypoints = persons(n)
        copies = rng.integers(0, n, 3 * n if rng.random() < 0.8 else 0) if n else np.array([], int)
        size = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))[copies, None, None]
        near = keypoints[copies] + rng.normal(0, 1, (len(copies), 17, 3)) * size * rng.choice(
            [0, 0, 0.03, 0.1], (len(copies), 1, 1))
        strays = persons(rng.choice([0, 2, 30]))
        label = rng.choice([1, 1, 1, 5, 7], n)
        d = np.concatenate([boxes[copies] + rng.normal(0, 2, (len(copies), 4)), strays[0]])
        m = len(d)
        dl = np.concatenate([label[copies], rng.choice([1, 1, -3], m - len(copies))])
        truths.append({"boxes": boxes, "labels": label, "keypoints": keypoints,
                       "ignore": rng.random(n) < 0.2,
                       "area": np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * rng.choice(
                           [0.4, 0.7, 1], n)})
        detections.append({"boxes": d, "labels": np.where(dl == 7, 1, dl),
                           "keypoints": np.concatenate([near, strays[1]]),
                           "scores": rng.choice([0.1, 0.5, 0.9], m) if seed % 3 else rng.random(m)})
    return truths, detections


@pytest.mark.parametrize("part", range(4))
def test_keypoint_ap_equals_pycocotools(part):
    for seed in range(part * 30, part * 30 + 30):
        truths, detections = random_keypoints(seed)
        same(keypoint_ap(truths, detections), reference(truths, detections, "keypoints"))


def posed(*keypoints, **other):
    """An image's dict of persons in boxes of 100 x 100 pixels."""
    return {"boxes": [[100, 100, 200, 200]] * len(keypoints), "labels": [1] * len(keypoints),
            "keypoints": np.array(keypoints), **other}


def pose(at=(150, 150), labelled=(0,)):
    """Keypoints (17, 3) all at one point, of which some are labelled: occluded or visible."""
    return [[*at, 1 + k % 2 if k in labelled else 0] for k in range(17)]


def test_keypoints_by_hand():
    # Two labelled keypoints, one found d pixels away, the other exactly: OKS (e + 1) / 2, which is
    # just above and just below 0.60, a TP at 3 or 2 of 10 thresholds.  The others are not labelled,
    # so that it does not matter where they are found.  COCO's 17 sigmas, in thousandths:
    sigmas = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    for k, sigma in enumerate(sigmas):
        for e, ap in ((0.201, 0.3), (0.199, 0.2)):
            d = np.sqrt(-np.log(e) * 2 * 5000 * (2 * sigma / 1000) ** 2)  # area 5000
            other = (k + 1) % 17
            found = np.full((17, 3), 1000.0)
            found[[k, other]] = [[150 - 0.6 * d, 150 + 0.8 * d, 0], [150, 150, 0]]
            got = keypoint_ap([posed(pose(labelled=(k, other)), area=[5000])],
                              [posed(found, scores=[0.5])])
            assert [got[name] for name in ("AP", "AP50", "AP75", "APm", "APl")] == pytest.approx(
                [ap, 1, 0, ap, -1])
            assert "APs" not in got and got["per_class"] == pytest.approx({1: ap})


def test_persons_without_labelled_keypoints():
    # Every keypoint found lies within the box of the person without labels, which is enlarged from
    # 100..200 to 0..300: OKS 1, and the first detection does not count.  The second one is a FP, as
    # that person is taken, unless it is a crowd.
    truths = [posed(pose(), pose(labelled=()))]
    inside, outside = pose((299, 299)), pose((1000, 0))

    def ap(*poses, **other):
        scores = [0.9, 0.8, 0.7][:len(poses)]
        return keypoint_ap([{**truths[0], **other}], [posed(*poses, scores=scores)])["AP"]

    assert ap(inside, pose()) == pytest.approx(1)
    assert ap(inside, inside, pose(), ignore=[False, True]) == pytest.approx(1)
    assert ap(inside, inside, pose()) == ap(outside, pose()) == pytest.approx(0.5)
    # 300 + d: OKS 0.62 by the mean of 17 Gaussians of d
    sigmas = average_precision.SIGMAS
    step = np.linspace(0, 100, 100001)
    oks = np.exp(-step[:, None] ** 2 / (2 * 1e4 * (2 * sigmas) ** 2)).mean(axis=1)
    d = step[np.abs(oks - 0.62).argmin() - 1]
    assert ap(pose((150, 300 + d)), pose()) == ap(pose((0 - d, 20)), pose()) == pytest.approx(
        (3 * 1 + 7 * 0.5) / 10)


def test_twenty_persons_per_image():
    # 20 strays fill the places; of 19, the TP is the twentieth: precision 1/20
    def ap(n):
        found = posed(*[pose((0, 900))] * n, pose(), scores=[0.9] * n + [0.1])
        return keypoint_ap([posed(pose())], [found])["AP"]

    assert [ap(20), ap(19)] == pytest.approx([0, 1 / 20])


def test_area_of_detected_persons():
    # The stray is large by its box: it does not count among the medium ones
    found = posed(pose((0, 900)), pose(), scores=[0.9, 0.8])
    got = keypoint_ap([posed(pose(), area=[5000])], [found])
    assert got["AP"] == pytest.approx(0.5) and got["APm"] == pytest.approx(1)
    found["boxes"] = [[0, 0, 50, 50]] * 2
    assert keypoint_ap([posed(pose(), area=[5000])], [found])["APm"] == pytest.approx(0.5)


@pytest.mark.parametrize("rule, what, empty", [
    (mask_ap, "masks", []), (mask_ap, "masks", np.zeros((0, 5, 7), bool)),
    (keypoint_ap, "keypoints", []), (keypoint_ap, "keypoints", np.zeros((0, 17, 3)))])
def test_nothing_counts_of_masks_and_keypoints(rule, what, empty):
    nothing = {"boxes": [], "labels": [], "scores": [], what: empty}
    one = {"boxes": [A], "labels": [1], "scores": [1],
           what: np.ones((1, 4, 4), bool) if what == "masks" else np.ones((1, 17, 3))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule([], [])["AP"] == rule([nothing], [nothing])["AP"] == -1
        assert rule([nothing], [one])["per_class"] == {1: -1}
        assert rule([one], [nothing])["AP"] == 0 and rule([one], [one])["AP"] == pytest.approx(1)


# ---- inputs ----

def test_torch_tensors_and_lists():
    for seed in range(6):
        truths, detections = random_case(seed)
        want = coco_ap(truths, detections)
        tensors, lists = ([[{k: f(v) for k, v in image.items()} for image in images]
                           for images in (truths, detections)]
                          for f in (torch.from_numpy, np.ndarray.tolist))
        for case in (tensors, lists):
            same(coco_ap(*case), want, 0)
            assert voc07_ap(*case) == voc07_ap(truths, detections)


def test_order_of_images():
    for seed in range(20):
        truths, detections = random_case(seed)
        rng = np.random.default_rng(seed)
        for image in detections:
            image["scores"] = rng.random(len(image["scores"]))
        order = rng.permutation(len(truths))
        got = coco_ap([truths[i] for i in order], [detections[i] for i in order])
        same(got, coco_ap(truths, detections), 1e-12)


@pytest.mark.parametrize("truths, detections, message", [
    ([truth([A])], [], "1 images of ground truth, 0 of detections"),
    ([truth([A], [1, 2])], [found([A], [0.5])], r"ground_truth\[0\]"),
    ([truth([A], ignore=[True, False])], [found([A], [0.5])], r"ground_truth\[0\].*ignore"),
    ([truth([A])], [found([A], [0.5, 0.6])], r"detections\[0\].*scores"),
    ([truth([A])] * 2, [found([A], [0.5]), found([A], [0.5], [])], r"detections\[1\]"),
    ([truth([[0, 0, 5]])], [found([A], [0.5])], r"ground_truth\[0\].*boxes \(n, 4\)"),
    ([{"boxes": A, "labels": [1]}], [found([A], [0.5])], r"ground_truth\[0\].*boxes \(n, 4\)"),
    ([{**truth([A]), "area": [1, 2]}], [found([A], [0.5])], r"ground_truth\[0\].*area"),
])
@pytest.mark.parametrize("rule", [coco_ap, voc07_ap])
def test_errors(truths, detections, message, rule):
    with pytest.raises(ValueError, match=message):
        rule(truths, detections)


@pytest.mark.parametrize("rule, what, wrong", [
    (mask_ap, "masks", np.ones((1, 4, 4))), (mask_ap, "masks", np.ones((2, 4, 4), bool)),
    (mask_ap, "masks", np.ones((4, 4), bool)), (mask_ap, "masks", []),
    (keypoint_ap, "keypoints", np.ones((1, 17, 2))), (keypoint_ap, "keypoints", np.ones((17, 3))),
    (keypoint_ap, "keypoints", np.ones((2, 17, 3)))])
def test_errors_of_masks_and_keypoints(rule, what, wrong):
    one = {"boxes": [A], "labels": [1], "scores": [1],
           what: np.ones((1, 4, 4), bool) if what == "masks" else np.ones((1, 17, 3))}
    with pytest.raises(ValueError, match=rf"ground_truth\[1\].*expected {what} \(n, "):
        rule([one, {**one, what: wrong}], [one, one])
    with pytest.raises(ValueError, match=rf"detections\[0\].*expected {what} \(n, "):
        rule([one, one], [{**one, what: wrong}, one])
    with pytest.raises(ValueError, match="1 images of ground truth, 0 of detections"):
        rule([one], [])
    if what == "masks":
        with pytest.raises(ValueError, match=r"image 0 .*\(4, 4\).*\(4, 5\)"):
            rule([one], [{**one, what: np.ones((1, 4, 5), bool)}])


def test_the_file_can_be_copied_alone():
    with open(average_precision.__file__) as file:
        nodes = [*ast.walk(ast.parse(file.read()))]
    assert not any(isinstance(node, ast.ImportFrom) for node in nodes)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert names == ["numpy"]


# ---- VOC2007's rule ----


def devkit_ap(truths, detections, label, threshold):
    """One class's AP as the development kit computes it: a loop over detections, 11 recalls."""
    everything = [(score, i, box) for i, d in enumerate(detections)
                  for box, l, score in zip(d["boxes"], d["labels"], d["scores"]) if l == label]
    positives = sum((t["labels"] == label).sum() - (t["ignore"] & (t["labels"] == label)).sum()
                    for t in truths)
    assigned, tp, fp, curve = set(), 0, 0, []
    for _, i, d in sorted(everything, key=lambda row: -row[0]):
        best, which = -1.0, None
        for j, (g, l) in enumerate(zip(truths[i]["boxes"], truths[i]["labels"])):
            w = min(d[2], g[2]) - max(d[0], g[0])
            h = min(d[3], g[3]) - max(d[1], g[1])
            if l == label and w > 0 and h > 0:
                overlap = w * h / ((d[2] - d[0]) * (d[3] - d[1]) + (g[2] - g[0]) * (g[3] - g[1])
                                   - w * h)
                if overlap > best:
                    best, which = overlap, j
        if best >= threshold:
            if not truths[i]["ignore"][which]:
                tp += (i, which) not in assigned
                fp += (i, which) in assigned
                assigned.add((i, which))
        else:
            fp += 1
        curve.append((tp / positives, tp / (tp + fp) if tp + fp else 0))
    return sum(max([p for r, p in curve if r >= t / 10], default=0) for t in range(11)) / 11


def test_voc07_equals_the_devkits_loop():
    for seed in range(1, 60, 2):  # odd: no two IoUs and thresholds are equal
        truths, detections = random_case(seed)
        rng = np.random.default_rng(seed)
        for image in detections:
            image["scores"] = rng.random(len(image["scores"]))
        labels = {int(l) for t in truths for l, ig in zip(t["labels"], t["ignore"]) if not ig}
        got = voc07_ap(truths, detections)
        for name, thresholds in (("AP50", [0.5]), ("AP75", [0.75]), ("AP", IOU_THRESHOLDS)):
            want = [devkit_ap(truths, detections, l, t) for l in labels for t in thresholds]
            assert got[name] == pytest.approx(np.mean(want) if want else -1, abs=1e-9), (seed, name)


def test_voc07_by_hand():
    # Ranks: TP, FP, TP of 2 boxes: recall 1/2, 1/2, 1, precision 1, 1/2, 2/3. Of the 11
    # recalls 0 ... 0.5 see 1 and 0.6 ... 1.0 see 2/3.
    got = voc07_ap([truth([A]), truth([B])], [found([A, AWAY], [0.9, 0.8]), found([B], [0.7])])
    assert got["AP50"] == got["AP"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    # A difficult box is not missed when nothing finds it, and its detection is no FP.
    got = voc07_ap([truth([A, B], ignore=[True, False])], [found([A, B], [0.9, 0.8])])
    assert got == {"AP": 1, "AP50": 1, "AP75": 1}
    # The best box is taken: an FP here, where COCO gives the second detection the other box.
    case = [truth([[0, 0, 20, 10], [2, 0, 22, 10]])], [
        found([[0, 0, 20, 10], [0.5, 0, 20.5, 10]], [0.9, 0.8])]
    assert voc07_ap(*case)["AP50"] == pytest.approx(6 / 11)
    assert coco_ap(*case)["AP50"] == pytest.approx(1)
