import ast
import contextlib
import io
import warnings

import numpy as np
import pytest
import torch

from detection import average_precision
from detection.average_precision import IOU_THRESHOLDS, coco_ap, voc07_ap

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
    assert got["per_class"].keys() == want["per_class"].keys()
    for name in NAMES:
        assert got[name] == pytest.approx(want[name], abs=tolerance), name
    for label, ap in want["per_class"].items():
        assert got["per_class"][label] == pytest.approx(ap, abs=tolerance), label


# ---- against pycocotools ----

def reference(truths, detections):
    """The same dict from pycocotools (x y w h boxes; ids from 1, its 0 means unmatched)."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def xywh(box):
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    annotations, results = [], []
    for i, (t, d) in enumerate(zip(truths, detections)):
        for j, (box, label, crowd) in enumerate(zip(t["boxes"], t["labels"], t["ignore"])):
            x, y, w, h = xywh(box)
            area = float(t["area"][j]) if "area" in t else w * h
            annotations.append({"id": len(annotations) + 1, "image_id": i, "bbox": [x, y, w, h],
                                "category_id": int(label), "area": area, "iscrowd": int(crowd)})
        for box, label, score in zip(d["boxes"], d["labels"], d["scores"]):
            results.append({"image_id": i, "bbox": xywh(box), "category_id": int(label),
                            "score": float(score)})
    labels = sorted({a["category_id"] for a in annotations + results})
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = {"images": [{"id": i} for i in range(len(truths))], "info": {},
                      "annotations": annotations, "categories": [{"id": c} for c in labels]}
        gt.createIndex()
        dt = gt.loadRes(results) if results else coco.COCO()
        e = cocoeval.COCOeval(gt, dt, "bbox")
        e.params.imgIds, e.params.catIds = list(range(len(truths))), labels
        e.evaluate()
        e.accumulate()
        e.summarize()
    ap = e.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))  # over IoUs, recalls; all areas
    return {**dict(zip(NAMES, e.stats)), "per_class": dict(zip(labels, ap.tolist()))}


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
