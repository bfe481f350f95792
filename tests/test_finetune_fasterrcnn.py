import contextlib
import csv
import io
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photos, start_processes
from PIL import Image
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

import common
import finetune_fasterrcnn as ft
from common import InputError
from finetune_fasterrcnn import coco_ap

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
    """Images with boxes of every size; detections are moved truths, strays and, in some images,
    more than 100 of one class. Even seeds have integer corners, so that IoUs meet thresholds
    and areas meet 32^2 and 96^2. Label 7 is never detected, 8 is only crowd, -3 has no truth."""
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


def test_equals_pycocotools_at_thresholds_and_areas():
    # Width w of 20 and of 40 gives IoU w/20 or w/40: every threshold is met exactly; 32 x 32
    # and 96 x 96 are small and medium, medium and large.
    truths, detections = [], []
    for side in (20, 32, 40, 96):
        for w in range(side // 2 - 1, side + 1):
            truths.append(truth([[5, 5, 5 + side, 5 + side]], ignore=[False]))
            detections.append(found([[5, 5, 5 + w, 5 + side]], [w / side]))
    same(coco_ap(truths, detections), reference(truths, detections))


def test_equals_pycocotools_at_equal_ious():
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
    # Ranks: wrong, right. Recall 0, 1/2; precision 0, 1/2; the best at any recall >= r is 1/2
    # for the 51 points r = 0.00 ... 0.50, and 0 for the other 50: 51 / 2 / 101.
    got = coco_ap([truth([A, B])], [found([AWAY, A], [0.9, 0.8])])
    for name in ("AP", "AP50", "AP75", "APs"):
        assert got[name] == pytest.approx(25.5 / 101)
    assert got["APm"] == got["APl"] == -1


def test_curve_of_three_ranks():
    # Ranks: right, wrong, right. Recall 1/2, 1/2, 1; precision 1, 1/2, 2/3; 51 points at 1 and
    # 50 points at 2/3.
    got = coco_ap([truth([A]), truth([B])], [found([A, AWAY], [0.9, 0.8]), found([B], [0.7])])
    assert got["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_second_detection_of_a_truth_is_wrong():
    # Ranks: right, wrong (A is taken), right; as above.
    got = coco_ap([truth([A, B])], [found([A, A, B], [0.9, 0.8, 0.7])])
    assert got["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_equal_scores_keep_their_order():
    # Wrong, right: recall 0, 1, precision 0, 1/2. Right, wrong: precision 1 at recall 1.
    assert coco_ap([truth([A])], [found([AWAY, A], [0.5, 0.5])])["AP"] == pytest.approx(0.5)
    assert coco_ap([truth([A])], [found([A, AWAY], [0.5, 0.5])])["AP"] == pytest.approx(1)


def test_equal_ious_take_the_last_truth():
    # The first detection has IoU 16 / 24 with both: at 0.50 ... 0.65 (4 thresholds) it takes the
    # last truth, and the second, exactly there, is wrong (IoU 12 / 28 with the other): right,
    # wrong: 51 points at 1. At the other 6: wrong, right: 51 points at 1/2.
    got = coco_ap([truth(TWINS)], [found([BETWEEN, TWINS[1]], [0.9, 0.8])])
    assert got["AP"] == pytest.approx((4 * 51 + 6 * 51 / 2) / 10 / 101)


def test_iou_and_area_ranges():
    # IoU 62 * 100 / 100^2 = 0.62: right at 0.50, 0.55 and 0.60, 3 of 10 thresholds. The truth is
    # large (10000 > 96^2), so medium has no truth, though the detection is medium.
    got = coco_ap([truth([[0, 0, 100, 100]])], [found([[0, 0, 62, 100]], [0.5])])
    assert [got[k] for k in ("AP", "AP50", "AP75", "APl")] == pytest.approx([0.3, 1, 0, 0.3])
    assert got["APs"] == got["APm"] == -1


def test_stray_detection_counts_in_its_own_area_range():
    # The large stray ranks first: precision 1/2 over all areas, but small does not see it.
    got = coco_ap([truth([A])], [found([[100, 0, 300, 200], A], [0.9, 0.8])])
    assert got["AP"] == pytest.approx(0.5) and got["APs"] == pytest.approx(1)


def test_ignored_box():
    # Two detections inside the crowd: intersection over their own area is 1, so neither counts
    # and A is found with precision 1. As a plain truth their IoU is 100 / 10000: wrong, wrong,
    # right: recall 1/2 with precision 1/3, 51 points.
    crowd = [100, 100, 200, 200]
    inside = [[110, 110, 120, 120], [150, 150, 160, 160]]
    detections = [found([*inside, A], [0.9, 0.8, 0.7])]
    got = coco_ap([truth([A, crowd], ignore=[False, True])], detections)
    assert got["AP"] == pytest.approx(1)
    assert coco_ap([truth([A, crowd])], detections)["AP"] == pytest.approx(51 / 3 / 101)


def test_truth_that_counts_goes_before_an_ignored_one():
    # The detection is half of A, all inside the crowd: at 0.50 it is A's (IoU 1/2 < 1), right;
    # above it is the crowd's, so nothing is found: 1 of 10 thresholds.
    got = coco_ap([truth([[0, 0, 20, 20], A], ignore=[True, False])],
                  [found([[0, 0, 10, 5]], [0.5])])
    assert got["AP50"] == pytest.approx(1) and got["AP"] == pytest.approx(0.1)


def test_a_hundred_detections_per_image_and_class():
    # 100 strays fill the class's places; of 99, the right one is the hundredth: precision 1/100.
    # Strays of another class take no place.
    def ap(n, label):
        image = found([AWAY] * n + [A], [0.9] * n + [0.1], [label] * n + [1])
        return coco_ap([truth([A])], [image])["AP"]

    assert [ap(100, 1), ap(99, 1), ap(100, 2)] == pytest.approx([0, 0.01, 1])


def test_classes_without_truth_are_left_out():
    got = coco_ap([truth([A, B, AWAY], [4, 6, 9], [False, True, False])],
                  [found([A, B], [0.5, 0.5], [4, -2])])
    assert got["AP"] == pytest.approx(0.5)  # of 4 (found) and 9 (not)
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
        same(coco_ap(*tensors), want, 0)
        same(coco_ap(*lists), want, 0)


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
    ([truth([A])], [], "1 images of truths, 0 of detections"),
    ([truth([A], [1, 2])], [found([A], [0.5])], r"truths\[0\]"),
    ([truth([A], ignore=[True, False])], [found([A], [0.5])], r"truths\[0\].*ignore"),
    ([truth([A])], [found([A], [0.5, 0.6])], r"detections\[0\].*scores"),
    ([truth([A])] * 2, [found([A], [0.5]), found([A], [0.5], [])], r"detections\[1\]"),
    ([truth([[0, 0, 5]])], [found([A], [0.5])], r"truths\[0\].*boxes \(n, 4\)"),
    ([{"boxes": A, "labels": [1]}], [found([A], [0.5])], r"truths\[0\].*boxes \(n, 4\)"),
    ([{**truth([A]), "area": [1, 2]}], [found([A], [0.5])], r"truths\[0\].*area"),
])
def test_errors(truths, detections, message):
    with pytest.raises(ValueError, match=message):
        coco_ap(truths, detections)


# ---- VOC2007's rule ----


def devkit_ap(truths, detections, label, threshold):
    """One class's AP as the development kit computes it: a loop over detections, 11 recalls."""
    everything = [(score, i, box) for i, d in enumerate(detections)
                  for box, l, score in zip(d["boxes"], d["labels"], d["scores"]) if l == label]
    positives = sum((t["labels"] == label).sum() - (t["ignore"] & (t["labels"] == label)).sum()
                    for t in truths)
    assigned, right, wrong, curve = set(), 0, 0, []
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
                right += (i, which) not in assigned
                wrong += (i, which) in assigned
                assigned.add((i, which))
        else:
            wrong += 1
        curve.append((right / positives, right / (right + wrong) if right + wrong else 0))
    return sum(max([p for r, p in curve if r >= t / 10], default=0) for t in range(11)) / 11


def test_voc07_equals_the_devkits_loop():
    for seed in range(1, 60, 2):  # odd: no two IoUs and thresholds are equal
        truths, detections = random_case(seed)
        rng = np.random.default_rng(seed)
        for image in detections:
            image["scores"] = rng.random(len(image["scores"]))
        labels = {int(l) for t in truths for l, ig in zip(t["labels"], t["ignore"]) if not ig}
        got = ft.voc07_ap(truths, detections)
        for name, thresholds in (("AP50", [0.5]), ("AP75", [0.75]), ("AP", ft.AP_IOUS)):
            want = [devkit_ap(truths, detections, l, t) for l in labels for t in thresholds]
            assert got[name] == pytest.approx(np.mean(want) if want else -1, abs=1e-9), (seed, name)


def test_voc07_by_hand():
    # Ranks: right, wrong, right of 2 truths: recall 1/2, 1/2, 1, precision 1, 1/2, 2/3. Of the 11
    # recalls 0 ... 0.5 see 1 and 0.6 ... 1.0 see 2/3.
    got = ft.voc07_ap([truth([A]), truth([B])], [found([A, AWAY], [0.9, 0.8]), found([B], [0.7])])
    assert got["AP50"] == got["AP"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    # A difficult truth is not missed when nothing finds it, and its detection is not wrong.
    got = ft.voc07_ap([truth([A, B], ignore=[True, False])], [found([A, B], [0.9, 0.8])])
    assert got == {"AP": 1, "AP50": 1, "AP75": 1}
    # The best truth is taken: wrong here, where COCO gives the second detection the other truth.
    case = [truth([[0, 0, 20, 10], [2, 0, 22, 10]])], [
        found([[0, 0, 20, 10], [0.5, 0, 20.5, 10]], [0.9, 0.8])]
    assert ft.voc07_ap(*case)["AP50"] == pytest.approx(6 / 11)
    assert coco_ap(*case)["AP50"] == pytest.approx(1)


# -------------------------------------------------------------------------------------------- data

XML = """<annotation><size><width>80</width><height>60</height></size>{}</annotation>"""
OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
          "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")


def make_voc(folder, objects, split="trainval"):
    """A folder in VOC layout: one 80 x 60 photo for each list of (name, difficult, x1 y1 x2 y2)."""
    make_photos(folder / "JPEGImages", len(objects))
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations").mkdir(exist_ok=True)
    for i, things in enumerate(objects):
        xml = XML.format("".join(OBJECT.format(*thing) for thing in things))
        (folder / "Annotations" / f"{i:04}.xml").write_text(xml)
    names = "".join(f"{i:04}\n" for i in range(len(objects)))
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return folder


def error(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        ft.Annotated(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("inner, split", [("", "trainval"), ("VOCdevkit/VOC2007", "2007/trainval"),
                                          ("VOCdevkit/VOC2012", "2012/trainval"),
                                          ("VOCdevkit/VOC2011", "2011/mine")])
def test_voc_boxes_are_one_based_and_inclusive(tmp_path, inner, split, capsys):
    make_voc(tmp_path / inner, [[("dog", 0, 1, 1, 80, 60), ("cat", 1, 11, 21, 30, 40)],
                                [], [("cat", 0, 7, 7, 7, 20)]], split.rpartition("/")[2])
    data = ft.Annotated("voc", str(tmp_path), [split])
    image, truth = data[0]
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8
    assert truth["boxes"].tolist() == [[0, 0, 80, 60], [10, 20, 30, 40]]
    assert truth["area"].tolist() == [4800, 400]
    assert [data.classes[i] for i in truth["labels"]] == ["dog", "cat"]
    assert truth["ignore"].tolist() == [False, True]
    for i in (1, 2):  # an image without objects, and one whose only box has no area
        _, truth = data[i]
        assert truth["boxes"].shape == (0, 4) and truth["labels"].shape == (0,)
        assert ft.training_item(data[i])[1]["boxes"].shape == (0, 4)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 boxes without area left out (0002.xml)" in said
    data = ft.Annotated("voc", str(tmp_path), [split], training=True)
    assert data[0][1]["ignore"].tolist() == [False, False]  # difficult ones train
    assert data.classes == (["cat", "dog"] if not inner else ft.VOC_CLASSES)


def test_splits_of_several_years_are_joined(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2007", [[("dog", 0, 1, 1, 9, 9)]] * 3)
    make_voc(tmp_path / "VOCdevkit/VOC2012", [[("cat", 0, 1, 1, 9, 9)]] * 2)
    args = ft.parse_args(["--dataset", "voc"])
    data = ft.Annotated("voc", str(tmp_path), args.train_split, training=True)
    assert [data.classes[data[i][1]["labels"]] for i in range(5)] == [*["dog"] * 3, *["cat"] * 2]


def test_own_files_of_any_kind(tmp_path):
    make_voc(tmp_path, [[("dog", 0, 1, 1, 9, 9)]] * 2)
    images = tmp_path / "JPEGImages"
    with Image.open(images / "0001.jpg") as image:
        image.save(images / "0001.PNG")
    (images / "0001.jpg").unlink()
    (images / "0000.txt").write_text("another tool's annotation")
    (images / "deep").mkdir()
    (images / "0000.jpg").rename(images / "deep" / "my photo.jpg")
    (tmp_path / "Annotations" / "deep").mkdir()
    (tmp_path / "Annotations" / "deep" / "my photo.xml").write_text("<annotation/>")  # no objects
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("0001\r\ndeep/my photo\n\n")
    data = ft.Annotated("voc", str(tmp_path), ["trainval"])
    assert [len(data[i][1]["boxes"]) for i in range(2)] == [1, 0]


def test_voc_names_the_file_that_is_wrong(tmp_path, capsys):
    make_voc(tmp_path, [[("dog", 0, 1, 1, 9, 9)], [("wolf", 0, 1, 1, 9, 9)]])
    args = "voc", str(tmp_path), ["trainval"]
    path = tmp_path / "Annotations" / "0001.xml"
    assert "0001.xml: unknown class 'wolf'" in error(*args, classes=["dog"])
    for text in ("<annotation><object>", "", "<other/>",
                 XML.format("<object><name>a</name></object>"),
                 XML.format(OBJECT.format("dog", 0, "one", 1, 9, 9)), "<annotation><a>",
                 XML.format("<object><name>a</name><bndbox/></object>")):
        path.write_text(text)
        assert "0001.xml is not a VOC annotation" in error(*args), text
    path.write_text(XML.format(OBJECT.format("dog", 0, "nan", 1, 9, 9)))
    assert "0001.xml" in error(*args)
    path.write_text(XML.format(OBJECT.format("dog", 0, 90, 1, 99, 9)))
    assert "0001.xml: the box 89 0 99 9 lies outside the image of 80 x 60 pixels" in error(*args)
    path.write_text(XML.format(OBJECT.format("dog", 0, 60, 1, 99, 9)))
    capsys.readouterr()
    assert ft.Annotated(*args)[1][1]["boxes"].tolist() == [[59, 0, 99, 9]]
    assert "1 boxes reach outside the image (0001.xml)" in capsys.readouterr().out
    assert ft.Annotated(*args, training=True)[1][1]["boxes"].tolist() == [[59, 0, 80, 9]]
    path.unlink()
    assert "no such file" in error(*args) and "0001.xml" in error(*args)
    assert "no split val: no ImageSets/Main/val.txt" in error("voc", str(tmp_path), ["val"])
    path.write_text(XML.format(OBJECT.format("dog", 0, 500, 400, 500, 400)))
    assert ft.Annotated(*args)[1][1]["boxes"].shape == (0, 4)  # no area comes first
    for split in ("2007/trainval", "1999/trainval", "2007/other", "2012/test"):
        assert f"no split {split}" in error("voc", str(tmp_path), [split])
    path.write_text(XML.format(""))
    image = (tmp_path / "JPEGImages" / "0000.jpg").read_bytes()
    (tmp_path / "JPEGImages" / "0000.jpg").write_bytes(image[:1000])  # ends early
    with pytest.raises(InputError, match="cannot decode .*0000.jpg"):
        ft.Annotated(*args)[0]
    (tmp_path / "JPEGImages" / "0000.jpg").write_bytes(b"no image")
    assert "cannot decode" in error(*args) and "0000.jpg" in error(*args)  # before any training
    data = ft.Annotated(*args, training=True)
    assert torch.equal(data[0][0], data[1][0]) and data[0][1]["boxes"].shape == (0, 4)  # the next
    assert data.broken.tolist() == [True, False]
    (tmp_path / "JPEGImages" / "0000.jpg").unlink()
    assert "no such file" in error(*args) and "0000.jpg" in error(*args)
    (tmp_path / "ImageSets" / "Main" / "none.txt").write_text("\n")
    assert "no images in none" in error("voc", str(tmp_path), ["none"])


def make_coco(folder):
    """Three 80 x 60 photos and a JSON: a crowd, an empty image, gaps in the ids, flat boxes."""
    make_photos(folder / "photos", 4)

    def thing(image, category, box, **more):
        return dict(id=len(things) + 1, image_id=image, category_id=category, bbox=box, **more)

    things = []
    things.append(thing(70, 44, [10, 10, 20, 30], iscrowd=0, area=432.5))
    things.append(thing(70, 3, [40.5, 5.25, 35, 50], iscrowd=0, area=1700))
    things.append(thing(9, 44, [0, 0, 60, 50], iscrowd=1, area=2900))
    things.append(thing(9, 90, [3, 4, 12, 13], iscrowd=0, area=100))
    things.append(thing(9, 90, [3, 4, 0, 13], iscrowd=0, area=0))
    things.append(thing(12, 3, [30, 20, 50.4, 40], iscrowd=0, area=2000))  # 0.4 past the border
    content = dict(
        images=[dict(id=i, file_name=f"{n:04}.jpg", width=80, height=60)
                for n, i in enumerate((70, 9, 500, 12))],
        categories=[dict(id=i, name=n) for i, n in ((44, "bottle"), (3, "car"), (90, "brush"))],
        annotations=things)
    (folder / "some.json").write_text(json.dumps(content))
    return folder, content


def test_coco_items(tmp_path, capsys):
    folder, content = make_coco(tmp_path)
    data = ft.Annotated("coco", str(folder), ["some.json:photos"])
    assert "1 boxes without area left out (some.json, 0001.jpg)" in capsys.readouterr().out
    assert data.classes == ["car", "bottle", "brush"] and len(data) == 4  # by category id
    truths = [data[i][1] for i in range(4)]
    assert truths[0]["boxes"].tolist() == [[10, 10, 30, 40], [40.5, 5.25, 75.5, 55.25]]
    assert truths[0]["labels"].tolist() == [1, 0] and truths[0]["area"].tolist() == [432.5, 1700]
    assert truths[1]["labels"].tolist() == [1, 2] and truths[1]["ignore"].tolist() == [True, False]
    assert truths[2]["boxes"].shape == (0, 4) and truths[2]["labels"].shape == (0,)
    assert truths[3]["boxes"].tolist() == [[30, 20, 80.4, 60]]
    data = ft.Annotated("coco", str(folder), ["some.json:photos"], training=True)
    _, target = ft.training_item(data[1])
    assert target["labels"].tolist() == [3] and target["boxes"].shape == (1, 4)  # no crowd
    assert data[3][1]["boxes"].tolist() == [[30, 20, 80, 60]]
    # COCO's own names; the file's classes, also where another split lists them under other ids
    (folder / "annotations").mkdir()
    for category, i in zip(content["categories"], (1, 2, 3)):
        category["id"] = i
    for thing, i in zip(content["annotations"], (1, 2, 1, 3, 3, 2)):
        thing["category_id"] = i
    (folder / "annotations" / "instances_photos.json").write_text(json.dumps(content))
    other = ft.Annotated("coco", str(folder), ["photos"], classes=data.classes)
    assert [other[i][1]["labels"].tolist() for i in range(4)] == [
        t["labels"].tolist() for t in truths]
    assert len(ft.Annotated("coco", str(folder), ["photos", "some.json:photos"])) == 8


def test_coco_ap_equals_pycocotools_on_the_file(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    folder, content = make_coco(tmp_path)
    data = ft.Annotated("coco", str(folder), ["some.json:photos"])
    content["annotations"] = [a for a in content["annotations"] if min(a["bbox"][2:]) > 0]
    (folder / "some.json").write_text(json.dumps(content))
    ids = [image["id"] for image in content["images"]]
    category = {c["name"]: c["id"] for c in content["categories"]}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        detections, results = [], []
        for i in range(len(data)):
            boxes = data[i][1]["boxes"].numpy()
            boxes = np.repeat(boxes, 3, axis=0) + rng.normal(0, 2, (3 * len(boxes), 4))
            boxes = np.concatenate([boxes, [[5, 5, 20, 20], [30, 30, 60, 50]]])  # some in the crowd
            labels = np.r_[np.repeat(data[i][1]["labels"].numpy(), 3), rng.integers(0, 3, 2)]
            scores = rng.random(len(boxes))
            detections.append(dict(boxes=boxes, labels=labels, scores=scores))
            results += [dict(image_id=ids[i], category_id=category[data.classes[l]], score=float(s),
                             bbox=[*map(float, (*b[:2], *(b[2:] - b[:2])))])
                        for b, l, s in zip(boxes, labels, scores)]
        got = coco_ap([data[i][1] for i in range(len(data))], detections)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO(str(folder / "some.json"))
            e = cocoeval.COCOeval(truth, truth.loadRes(results), "bbox")
            e.evaluate()
            e.accumulate()
            e.summarize()
        assert 0.1 < got["AP"] < 0.99
        for name, want in zip(NAMES, e.stats):
            assert got[name] == pytest.approx(want, abs=1e-9), (seed, name)


def test_coco_names_the_file_that_is_wrong(tmp_path):
    folder, content = make_coco(tmp_path)
    args = "coco", str(folder), ["some.json:photos"]

    def broken(change):
        other = json.loads(json.dumps(content))
        change(other)
        (folder / "some.json").write_text(json.dumps(other))
        return error(*args)

    for change in (lambda c: c["annotations"][1].update(category_id=4),
                   lambda c: c["annotations"][1].update(image_id=4),
                   lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
                   lambda c: c["annotations"][1].update(bbox=[1, 2, 3, "x"]),
                   lambda c: c["annotations"][1].update(area=None),
                   lambda c: c["annotations"][1].pop("bbox")):
        message = broken(change)
        assert "some.json is not a COCO instances file" in message and '"id": 2' in message
    assert "not finite" in broken(lambda c: c["annotations"][1].update(bbox=[1, 2, 3, math.nan]))
    assert "is not a COCO instances" in broken(lambda c: c.update(annotations=None))
    assert "is not a COCO instances" in broken(lambda c: c["categories"][1].update(id="x"))
    assert "two images have the id 70" in broken(lambda c: c["images"][1].update(id=70))
    assert "no such file" in broken(lambda c: c["images"][1].update(file_name="none.jpg"))
    assert "some.json, 0000.jpg: the box 100 5" in broken(
        lambda c: c["annotations"][0].update(bbox=[100, 5, 9, 9]))

    def no_sizes(content):
        content["annotations"][0].update(bbox=[100, 5, 9, 9])
        content["images"] = [dict(id=i["id"], file_name=i["file_name"]) for i in content["images"]]

    assert "0000.jpg: the box 100 5" in broken(no_sizes)
    assert "is not a COCO instances file" in broken(lambda c: c.pop("images"))
    assert "is not a COCO instances file" in broken(lambda c: c.update(categories=3))
    assert "is not a COCO instances file" in broken(lambda c: c["images"][1].pop("file_name"))
    assert "no images in" in broken(lambda c: c.update(images=[], annotations=[]))
    for text in ("{", "[]", "\xff"):
        (folder / "some.json").write_text(text)
        assert "is not a COCO instances file" in error(*args)
    assert "no such file" in error("coco", str(folder), ["train2017"])
    assert "instances_train2017.json" in error("coco", str(folder), ["train2017"])
    content["images"][0].update(width=60, height=80)  # annotated the other way round
    content["annotations"][1].update(bbox=[1, 2, 30, 40])
    (folder / "some.json").write_text(json.dumps(content))
    assert "declared as 60 x 80 pixels, but " in error(*args) and "0000.jpg" in error(*args)


def test_a_fraction_is_drawn_by_the_seed(tmp_path):
    make_voc(tmp_path, [[("dog", 0, 1 + i, 1, 30 + i, 9)] for i in range(40)])

    def paths(fraction, seed):
        data = ft.Annotated("voc", str(tmp_path), ["trainval"], None, True, fraction, seed)
        for i in range(len(data)):  # still with its own boxes
            assert data[i][1]["boxes"][0, 0] == int(data.paths[i][-8:-4])
        return set(data.paths)

    few, more = paths(0.1, 0), paths(0.5, 0)
    assert len(few) == 4 and len(more) == 20 and few < more
    assert few == paths(0.1, 0) != paths(0.1, 1)
    assert "no images" in error("voc", str(tmp_path), ["trainval"], fraction=0.01)
    words = f"--dataset voc --data {tmp_path} --train-split trainval --test-split trainval".split()
    sets = [ft.data_sets(ft.parse_args([*words, "--fraction", "0.1", "--seed", seed]))
            for seed in "01"]
    assert {*sets[0][0].paths} == few != {*sets[1][0].paths} and len(sets[0][1]) == 40


def test_flips_move_the_boxes_with_the_pixels():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[:, 4:9, 2:12] = 255
    item = image, dict(boxes=torch.tensor([[2.0, 4, 12, 9], [0, 0, 1, 1]]).double(),
                       labels=torch.tensor([3, 5]), ignore=torch.tensor([False, True]))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        flipped, target = ft.training_item(item)
        (x1, y1, x2, y2), = target["boxes"].int().tolist()
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].tolist() == [4]  # from 1; the one to ignore is left out
        assert (flipped[:, y1:y2, x1:x2] == 255).all()
        assert flipped.float().sum() == 255 * 3 * 50
        seen.add(x1)
    assert seen == {2, 18}


# ---------------------------------------------------------------------------------------- detector

SMALL = dict(fpn_channels=16, min_size=[64], max_size=64, anchor_size=8, rois=16)


@pytest.mark.parametrize("detector, norms", [("fpn", 20 + 8), ("c4", 20 + 1)])
def test_every_layer_of_the_detector_trains(detector, norms):
    """Batch norms: of ResNet-18, of the FPN's four inner and four layer blocks, C4's extra one."""
    torch.manual_seed(0)
    model = ft.build_detector("resnet18", 6, detector, **SMALL).train()
    found = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert len(found) == norms
    assert all(type(m) is torch.nn.BatchNorm2d and m.training for m in found)
    assert all(p.requires_grad for p in model.parameters())
    before = [m.running_mean.clone() for m in found]
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1])),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    sum(model([torch.rand(3, 64, 64), torch.rand(3, 48, 64)], targets).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(not torch.equal(a, m.running_mean) for a, m in zip(before, found))


def test_a_detector_on_a_swin(tmp_path):
    torch.manual_seed(0)
    common.export_backbone(common.backbone_stages("swin_t"), tmp_path / "backbone.pt")
    model = ft.build_detector("swin_t", 6, "fpn", **SMALL, weights=tmp_path / "backbone.pt",
                              mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).train()
    body = {k: v for k, v in model.backbone.body.state_dict().items()}
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert body.keys() == saved.keys() and all(torch.equal(body[k], saved[k]) for k in body)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1, 0.2, 0.3],
                                                                       [0.4, 0.5, 0.6])
    pyramid = model.backbone(torch.randn(1, 3, 64, 96))
    assert [(k, tuple(v.shape)) for k, v in pyramid.items()] == [
        (k, (1, 16, 64 // s, 96 // s)) for k, s in zip("0123", (4, 8, 16, 32))] + [
        ("pool", (1, 16, 1, 2))]
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # it would leave out what this counts
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))]
    sum(model([torch.rand(3, 64, 64)], targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.backbone.parameters())
    with pytest.raises(InputError, match="--detector c4 is of ResNets, swin_t needs"):
        ft.build_detector("swin_t", 6, "c4", **SMALL)


RESNET50 = {"conv1.weight": (64, 3, 7, 7), "bn1.running_var": (64,),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer2.3.conv2.weight": (128, 128, 3, 3),
            "layer3.0.conv1.weight": (256, 512, 1, 1), "layer3.5.conv3.weight": (1024, 256, 1, 1)}
RES5 = {"layer4.0.conv1.weight": (512, 1024, 1, 1),
        "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
        "layer4.2.conv3.weight": (2048, 512, 1, 1), "layer4.2.bn3.bias": (2048,)}
C4 = {**{f"backbone.{k}": v for k, v in RESNET50.items()},
      **{f"roi_heads.box_head.{k}": v for k, v in RES5.items()},
      **{f"roi_heads.box_head.norm.{k}": (2048,) for k in ("weight", "bias", "running_mean",
                                                           "running_var")},
      "rpn.head.conv.0.0.weight": (1024, 1024, 3, 3),  # 15 anchors a position
      "rpn.head.cls_logits.weight": (15, 1024, 1, 1), "rpn.head.bbox_pred.weight": (60, 1024, 1, 1),
      "roi_heads.box_predictor.cls_score.weight": (21, 2048),
      "roi_heads.box_predictor.bbox_pred.weight": (84, 2048)}
FPN = {**{f"backbone.body.{k}": v for k, v in {**RESNET50, **RES5}.items()},
       **{f"backbone.fpn.inner_blocks.{i}.0.weight": (256, 256 << i, 1, 1) for i in range(4)},
       **{f"backbone.fpn.layer_blocks.{i}.0.weight": (256, 256, 3, 3) for i in range(4)},
       **{f"backbone.fpn.{b}_blocks.{i}.1.{k}": (256,) for b in ("inner", "layer") for i in range(4)
          for k in ("weight", "bias", "running_mean", "running_var")},
       "rpn.head.conv.0.0.weight": (256, 256, 3, 3),  # 3 anchors a position
       "rpn.head.cls_logits.weight": (3, 256, 1, 1), "rpn.head.bbox_pred.weight": (12, 256, 1, 1),
       "roi_heads.box_head.fc6.weight": (1024, 256 * 7 * 7),
       "roi_heads.box_head.fc7.weight": (1024, 1024),
       "roi_heads.box_predictor.cls_score.weight": (21, 1024),
       "roi_heads.box_predictor.bbox_pred.weight": (84, 1024)}


@pytest.mark.parametrize("detector, shapes, backbone_tensors", [("c4", C4, 258), ("fpn", FPN, 366)])
def test_the_papers_detectors(detector, shapes, backbone_tensors):
    model = ft.build_detector("resnet50", 20, detector)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: state.get(k) for k in shapes} == shapes
    if detector == "c4":
        assert not [k for k in state if "fpn" in k or "fc6" in k or "backbone.layer4" in k]
        assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    else:
        assert [*model.rpn.anchor_generator.sizes] == [(32,), (64,), (128,), (256,), (512,)]
        assert not [k for k in state if k.startswith("backbone.fpn") and k.endswith(".0.bias")]
    assert sum(k.startswith("backbone.") for k in state) == backbone_tensors
    assert model.roi_heads.detections_per_img == 100 and model.roi_heads.score_thresh == 0.05
    assert model.rpn._pre_nms_top_n == dict(c4=dict(training=12000, testing=6000),
                                            fpn=dict(training=2000, testing=1000))[detector]
    assert model.rpn._post_nms_top_n == dict(c4=dict(training=2000, testing=1000),
                                             fpn=dict(training=1000, testing=1000))[detector]
    assert model.roi_heads.box_roi_pool.sampling_ratio == 0
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512


def test_c4_from_image_to_classes():
    """Res4 at stride 16, RoIs of 14 x 14 that Res5 halves, one more batch norm, then the mean."""
    torch.manual_seed(0)
    model = ft.build_detector("resnet50", 20, "c4", min_size=[96], max_size=128, rois=8).eval()
    seen = {}
    for name in ("backbone", "rpn.head", "roi_heads.box_roi_pool", "roi_heads.box_head.layer4",
                 "roi_heads.box_head.norm", "roi_heads.box_head"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, inputs, out, name=name: seen.update({name: (inputs, out)}))
    model.roi_heads.box_head.norm.running_mean += 3
    model([torch.rand(3, 96, 128)])
    assert seen["backbone"][1].shape == (1, 1024, 6, 8)
    assert seen["rpn.head"][0][0][0].shape == (1, 1024, 6, 8)
    rois = len(seen["roi_heads.box_roi_pool"][1])
    assert seen["roi_heads.box_roi_pool"][1].shape == (rois, 1024, 14, 14) and rois == 16
    res5 = seen["roi_heads.box_head.layer4"][1]
    assert res5.shape == (rois, 2048, 7, 7)
    by_hand = (res5 - 3) / (1 + 1e-5) ** 0.5
    assert torch.allclose(seen["roi_heads.box_head"][1], by_hand.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_weights_reach_the_detector_bit_for_bit(tmp_path, detector):
    torch.manual_seed(1)
    stages = common.resnet_stages("resnet18")
    common.export_backbone(stages, tmp_path / "backbone.pt")
    wanted = stages.state_dict()
    for weights in (str(tmp_path / "backbone.pt"), "none"):
        model = ft.build_detector("resnet18", 3, detector, **SMALL, weights=weights)
        state = {k.replace("backbone.body.", "").replace("backbone.", "")
                 .replace("roi_heads.box_head.layer4", "layer4"): v
                 for k, v in model.state_dict().items()}
        assert wanted.keys() <= state.keys()
        same = [torch.equal(v, state[k]) for k, v in wanted.items() if v.dim() == 4]
        assert all(same) if weights != "none" else not any(same)


def test_fpn_and_box_head_are_loaded_too(tmp_path, capsys):
    torch.manual_seed(1)
    path = str(tmp_path / "detector.pt")
    donor = ft.build_detector("resnet18", 5, **SMALL)
    common.save_checkpoint(path, model=donor.state_dict())  # as a fine-tune's own checkpoint
    model = ft.build_detector("resnet18", 3, **SMALL, weights=path)  # of other classes
    said = capsys.readouterr().out
    assert "loaded from 'backbone.fpn.*'" in said and "loaded from 'roi_heads.box_head.*'" in said
    wanted = {k: v for k, v in donor.state_dict().items()
              if k.startswith(("backbone.", "roi_heads.box_head."))}
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in wanted.items())
    assert state["roi_heads.box_predictor.cls_score.weight"].shape == (4, 1024)

    head = FastRCNNConvFCHead((16, 7, 7), [16] * 4, [1024], norm_layer=torch.nn.BatchNorm2d)
    parts = {k: v for k, v in wanted.items() if "box_head" not in k}
    parts.update({f"roi_heads.box_head.{k}": v for k, v in head.state_dict().items()})
    common.save_checkpoint(path, **{f"module.{k}": v for k, v in parts.items()})  # any prefix
    model = ft.build_detector("resnet18", 3, **SMALL, weights=path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    common.save_checkpoint(path, **parts)  # as SoCo's: four convolutions and one linear layer
    model = ft.build_detector("resnet18", 3, **SMALL, weights=path)
    assert type(model.roi_heads.box_head) is FastRCNNConvFCHead
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    assert model.eval()([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4

    both = {f"{copy}.{k}": v + torch.tensor(copy == "ema_model", dtype=v.dtype)  # the average first
            for copy in ("ema_model", "model") for k, v in parts.items()}
    common.save_checkpoint(path, **both)
    model = ft.build_detector("resnet18", 3, **SMALL, weights=path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts.items())
    common.save_checkpoint(path, **parts)

    assert "fpn" not in "".join(ft.build_detector("resnet18", 3, "c4", **SMALL,
                                                  weights=path).state_dict())  # the ResNet alone
    with pytest.raises(InputError, match=r"backbone.fpn.\*: .*size mismatch") as caught:
        ft.build_detector("resnet18", 3, fpn_channels=32, weights=path)
    assert "\n" not in str(caught.value)
    del parts["backbone.fpn.inner_blocks.0.0.weight"]
    common.save_checkpoint(path, **parts)
    with pytest.raises(InputError, match="Missing key.*inner_blocks.0.0.weight"):
        ft.build_detector("resnet18", 3, **SMALL, weights=path)


def test_learning_rate():
    assert ft.learning_rate(0, 0.02, 100, [10, 20]) == pytest.approx(0.02 / 1000)
    rates = [ft.learning_rate(step, 1.0, 10, [20, 30]) for step in (5, 10, 19, 20, 29, 30, 99)]
    assert rates == pytest.approx([0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert ft.learning_rate(0, 1.0, 0, []) == 1
    assert ft.learning_rate(5, 1e-4, 0, [5], 0.5) == pytest.approx(5e-5)


VOC_SIZES, COCO_SIZES = [*range(480, 801, 32)], [*range(640, 801, 32)]


@pytest.mark.parametrize("words, detector, iterations, drops, warmup, sizes", [
    ("voc", "c4", 24000, [18000, 22000], 100, VOC_SIZES),
    ("voc --detector fpn", "fpn", 24000, [18000, 22000], 100, VOC_SIZES),
    ("coco", "fpn", 90000, [60000, 80000], 1000, COCO_SIZES),
    ("coco --detector c4 --schedule 2x", "c4", 180000, [120000, 160000], 1000, COCO_SIZES),
    ("coco --fraction 0.01", "fpn", 12000, [8000, 10667], 1000, COCO_SIZES),
    ("coco --fraction 0.1 --schedule 2x", "fpn", 12000, [8000, 10667], 1000, COCO_SIZES),
    ("coco --iterations 900", "fpn", 900, [600, 800], 1000, COCO_SIZES),
])
def test_the_papers_recipes(words, detector, iterations, drops, warmup, sizes):
    args = ft.parse_args(["--dataset", *words.split()])
    assert ft.schedule(args, per_epoch=1000) == 0.1
    assert (args.detector, args.iterations, args.drops) == (detector, iterations, drops)
    assert (args.warmup, args.min_size, args.max_size) == (warmup, sizes, 1333)
    assert (args.lr, args.batch_size, args.weight_decay) == (0.02, 16, 1e-4)
    assert (args.optimizer, args.arch, args.rois) == ("sgd", "resnet50", 512)


def test_the_reports_recipe():
    args = ft.parse_args("--dataset coco --optimizer adam".split())
    assert ft.schedule(args, per_epoch=50) == 0.5
    assert (args.iterations, args.drops, args.lr, args.warmup) == (2000, [1000], 1e-4, 0)
    rates = [ft.learning_rate(step, args.lr, 0, args.drops, 0.5) for step in (0, 999, 1000, 1999)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5])
    args = ft.parse_args("--dataset coco --optimizer adam --schedule 1x --lr 1e-3".split())
    assert ft.schedule(args, per_epoch=50) == 0.1
    assert (args.iterations, args.drops, args.lr) == (90000, [60000, 80000], 1e-3)


# ---------------------------------------------------------------------- processes, and whole runs


def gradients(number, world, path):
    """Every parameter's gradient from a batch of four scenes; this process has its share of it."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store", rank=number, world_size=world)
    data, share, found = ft.LabelledScenes(4, seed=3), 4 // world, {}
    for detector in ("fpn", "c4"):
        torch.manual_seed(0)
        model = ft.build_detector("resnet18", 6, detector, 16, [128], 128, 8, 16).train()
        for module in model.modules():  # whose statistics are of a process's own images
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        ddp = model if world == 1 else torch.nn.parallel.DistributedDataParallel(model)
        mine = [ft.training_item(data[i]) for i in range(4)][number * share:(number + 1) * share]
        randperm = torch.randperm  # by which RPN and box head sample
        torch.randperm = lambda n, device: torch.from_numpy(np.random.default_rng(n).permutation(n))
        sum(ddp([image / 255 for image, _ in mine], [t for _, t in mine]).values()).backward()
        torch.randperm = randperm
        found.update({f"{detector} {n}": p.grad for n, p in model.named_parameters()})
    if number == 0:
        torch.save(found, path / f"{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    gradients(0, 1, tmp_path)
    start_processes(gradients, (2, tmp_path), 2)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - two[name]).norm() <= 1e-5 * gradient.norm(), name


class Oracle(torch.nn.Module):
    """A detector that knows the answers by the image's mean, and is wrong about some of them."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("shift", torch.rand(1))
        self.known = {round(float(data[i][0].float().mean()), 3): data[i] for i in range(len(data))}

    def forward(self, images):
        found = []
        for image in images:
            _, truth = self.known[round(float((image * 255).mean()), 3)]
            boxes, labels = truth["boxes"], truth["labels"]
            scores = torch.linspace(0.9, 0.4, len(boxes)) + 0.001 * len(boxes)
            boxes = boxes + 4 * self.shift * (boxes[:, :1] % 3)
            found.append(dict(boxes=boxes, labels=labels + 1, scores=scores))
        return found


class Silent:
    def stop_if_asked(self):
        pass

    def say(self, text, rewrite=False):
        pass


def evaluate_everywhere(number, world, path):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store{world}", rank=number, world_size=world)
    data = ft.LabelledScenes(23, seed=3)
    args = SimpleNamespace(batch_size=6, workers=0, dataset="voc")
    torch.manual_seed(number)  # statistics that differ between processes, as on CPUs
    oracle = Oracle(data)
    ap = ft.evaluate(oracle, data, args, torch.device("cpu"), Silent())
    (path / f"{world}-{number}.json").write_text(json.dumps(ap))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_evaluation_is_the_same_for_one_two_and_three_processes(tmp_path):
    evaluate_everywhere(0, 1, tmp_path)
    for world in (2, 3):
        start_processes(evaluate_everywhere, (world, tmp_path), world)
    results = {p.name: p.read_text() for p in tmp_path.glob("*.json")}
    assert len(results) == 6 and len(set(results.values())) == 1
    ap = json.loads(results["1-0.json"])
    assert 0.1 < ap["AP"] < 0.99 and 0.1 < ap["VOC07"]["AP"] < 0.99


def test_detections_do_not_depend_on_who_shares_the_batch():
    torch.manual_seed(0)
    model = ft.build_detector("resnet18", 6, **{**SMALL, "max_size": 128}).eval()
    model.roi_heads.score_thresh = 0.0
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8)
              for size in ((64, 64), (64, 128), (90, 50))]
    together = ft.detect(model, images, "cpu")
    for image, found in zip(images, together):
        (alone,) = ft.detect(model, [image], "cpu")
        assert len(found["boxes"]) > 5 and all(torch.equal(alone[k], v) for k, v in found.items())


def test_a_detector_that_is_right_gets_one():
    data = ft.LabelledScenes(5, seed=3)
    truths = [data[i][1] for i in range(5)]
    exact = [dict(boxes=t["boxes"], labels=t["labels"], scores=torch.ones(len(t["labels"])))
             for t in truths]
    assert coco_ap(truths, exact)["AP"] == pytest.approx(1)


TINY = ("--arch resnet18 --batch-size 4 --fpn-channels 16 --rois 8 --min-size 48 64 --max-size 80 "
        "--anchor-size 8 --iterations 4 --log-every 2 --workers 0").split()


def test_voc_from_end_to_end(tmp_path, capsys):
    things = [[("dog", 0, 1 + i, 5, 40 + i, 50), ("cat", i % 2, 50, 5, 75, 40)] for i in range(8)]
    make_voc(tmp_path / "voc", things)
    make_voc(tmp_path / "voc", things[:5], split="test")
    words = ["--dataset", "voc", "--data", str(tmp_path / "voc"), *TINY, "--warmup", "2",
             "--train-split", "trainval", "--test-split", "test", "--out", str(tmp_path / "run")]
    ft.main([*words, "--workers", "2"])
    out = capsys.readouterr().out
    for text in ("resnet18 c4 from random weights: 8 images, 2 classes", "COCO's rules:  AP ",
                 "VOC07's 11-point rule:  AP ", "21 of 21 batch norm layers train"):
        assert text in out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "ap.json", "args.json", "checkpoint.pt", "curves.png", "detections.png", "lock",
        "log.csv"}
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap) == {*NAMES, "per_class", "VOC07"} and set(ap["per_class"]) == {"cat", "dog"}
    # the recipe: lr 0.02 for 16 images, 4 here; the last of 4 steps is after the drop at 3
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    others, norms = torch.load(checkpoint, weights_only=False)["optimizer"]["param_groups"]
    assert others["lr"] == norms["lr"] == pytest.approx(0.02 * 4 / 16 * 0.1)
    assert others["momentum"] == norms["momentum"] == 0.9
    assert (others["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert len(norms["params"]) == 2 * 21
    with open(tmp_path / "run" / "log.csv") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]  # steps 2 (warm-up's last), 4
    assert rates == pytest.approx([0.005 * (0.001 + 0.999 / 2), 0.005 / 10])
    # the checkpoint's AP again, from its file alone
    ft.main(["--eval-only", str(checkpoint)])
    assert json.loads((tmp_path / "run" / "eval" / "ap.json").read_text()) == ap
    ft.main(["--eval-only", str(checkpoint), "--test-split", "trainval", "--out",
             str(tmp_path / "other")])
    assert json.loads((tmp_path / "other" / "ap.json").read_text()) != ap
    assert (tmp_path / "run" / "ap.json").read_text() == json.dumps(ap, indent=2) + "\n"
    for words, message in ((["--out", str(tmp_path / "run"), "--fresh"], "wants another --out"),
                           (["--detector", "fpn"], "holds another detector")):
        with pytest.raises(SystemExit, match=message):
            ft.main(["--eval-only", str(checkpoint), *words])
    assert checkpoint.exists()


def test_coco_from_end_to_end(tmp_path, capsys):
    folder, _ = make_coco(tmp_path / "coco")
    model = ft.build_detector("resnet18", 1, fpn_channels=16, box_head="4conv1fc")  # SoCo's
    common.save_checkpoint(tmp_path / "detector.pt", **model.state_dict())
    ft.main(["--dataset", "coco", "--data", str(folder), *TINY, "--train-split", "some.json:photos",
             "--test-split", "some.json:photos", "--optimizer", "adam",
             "--weights", str(tmp_path / "detector.pt"), "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert f"resnet18 fpn from {tmp_path}" in out and "4 images, 3 classes" in out
    assert "tensors loaded from 'roi_heads.box_head.*'" in out and "VOC07" not in out
    assert "lr 0.0001\n" in out and "lr 5e-05\n" in out
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap) == {*NAMES, "per_class"} and set(ap["per_class"]) == {"car", "bottle", "brush"}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)["optimizer"]["state"]
    assert {*state[0]} == {"step", "exp_avg", "exp_avg_sq"}  # Adam's
    ft.main(["--eval-only", str(tmp_path / "run" / "checkpoint.pt")])  # without --weights
    assert json.loads((tmp_path / "run" / "eval" / "ap.json").read_text()) == ap


def test_eval_only_refuses_another_file(tmp_path):
    for content in ({"conv1.weight": torch.zeros(1)}, dict(method="moco_v2", args={}, model={}), 3):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(SystemExit, match="is no checkpoint of finetune_fasterrcnn"):
            ft.main(["--eval-only", str(tmp_path / "file.pt")])


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_mixed_precision_leaves_boxes_in_float32(detector):
    torch.manual_seed(0)
    model = ft.build_detector("resnet18", 3, detector, 16, min_size=[640], max_size=640,
                              rois=8).train()
    truth = torch.tensor([[321.3, 130.7, 611.9, 399.1]])
    seen = []

    def encode(truths, proposals):
        seen.append((truths, proposals))
        return [torch.zeros_like(p) for p in proposals]

    model.roi_heads.box_coder.encode = encode
    with torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 640, 640)], [dict(boxes=truth, labels=torch.tensor([1]))])
    (truths, proposals), = seen
    assert truths[0].dtype == proposals[0].dtype == torch.float32
    assert (truths[0] - truth).abs().min() < 1e-3 and (proposals[0][-1] - truth).abs().max() < 1e-3
