import contextlib
import io
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photos

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
        for box, label, crowd in zip(t["boxes"], t["labels"], t["ignore"]):
            x, y, w, h = xywh(box)
            annotations.append({"id": len(annotations) + 1, "image_id": i, "bbox": [x, y, w, h],
                                "category_id": int(label), "area": w * h, "iscrowd": int(crowd)})
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
])
def test_errors(truths, detections, message):
    with pytest.raises(ValueError, match=message):
        coco_ap(truths, detections)


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


@pytest.mark.parametrize("inner", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_voc_boxes_are_one_based_and_inclusive(tmp_path, inner, capsys):
    make_voc(tmp_path / inner, [[("dog", 0, 1, 1, 80, 60), ("cat", 1, 11, 21, 30, 40)],
                                [], [("cat", 0, 7, 7, 7, 20)]])
    data = ft.VOC(str(tmp_path), "trainval", ft.VOC_CLASSES)
    image, boxes, labels, ignore = data[0]
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8
    assert boxes.tolist() == [[0, 0, 80, 60], [10, 20, 30, 40]]
    assert [ft.VOC_CLASSES[i] for i in labels] == ["dog", "cat"]
    assert ignore.tolist() == [False, True]
    for i in (1, 2):  # an image without objects, and one whose only box has no area
        _, boxes, labels, ignore = data[i]
        assert boxes.shape == (0, 4) and labels.shape == ignore.shape == (0,)
    assert "1 boxes without area" in capsys.readouterr().out


def test_voc_names_the_file_that_is_wrong(tmp_path):
    make_voc(tmp_path, [[("dog", 0, 1, 1, 9, 9)], [("wolf", 0, 1, 1, 9, 9)]])

    def error(split="trainval"):
        with pytest.raises(InputError) as caught:
            ft.VOC(str(tmp_path), split, ft.VOC_CLASSES)
        return str(caught.value)

    path = tmp_path / "Annotations" / "0001.xml"
    assert "0001.xml: unknown class 'wolf'" in error()
    path.write_text("<annotation><object>")
    assert "0001.xml is not a VOC annotation" in error()
    path.write_text(XML.format("<object><name>dog</name></object>"))
    assert "0001.xml is not a VOC annotation" in error()
    path.write_text(XML.format(OBJECT.format("dog", 0, "one", 1, 9, 9)))
    assert "0001.xml" in error()
    path.unlink()
    assert "no such file" in error() and "0001.xml" in error()
    assert "no such split" in error("val")
    with pytest.raises(InputError, match="not in VOC layout"):
        ft.VOC(str(tmp_path / "Annotations"), "trainval", ft.VOC_CLASSES)
    path.write_text(XML.format(""))
    (tmp_path / "JPEGImages" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot decode .*0000.jpg"):
        ft.VOC(str(tmp_path), "trainval", ft.VOC_CLASSES)[0]
    data = ft.VOC(str(tmp_path), "trainval", ft.VOC_CLASSES, training=True)
    assert torch.equal(data[0][0], data[1][0]) and data[0][1].shape == (0, 4)  # the next, whole
    assert data.broken.tolist() == [True, False]
    (tmp_path / "JPEGImages" / "0000.jpg").unlink()
    assert "no such file" in error() and "0000.jpg" in error()
    (tmp_path / "ImageSets" / "Main" / "none.txt").write_text("\n")
    assert "no images in none.txt" in error("none")


def test_flips_move_the_boxes_with_the_pixels():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[:, 4:9, 2:12] = 255
    item = (image, torch.tensor([[2.0, 4, 12, 9], [0, 0, 1, 1]]), torch.tensor([3, 5]),
            torch.tensor([False, True]))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        flipped, target = ft.training_item(item)
        (x1, y1, x2, y2), = target["boxes"].int().tolist()
        assert target["labels"].tolist() == [4]  # from 1; the one to ignore is left out
        assert (flipped[:, y1:y2, x1:x2] == 255).all()
        assert flipped.float().sum() == 255 * 3 * 50
        seen.add(x1)
    assert seen == {2, 18}


# ---------------------------------------------------------------------------------------- detector


def test_every_layer_of_the_detector_trains():
    torch.manual_seed(0)
    model = ft.build_detector("resnet18", 6, fpn_channels=16, min_size=[64], max_size=64,
                              anchor_size=8, rois=16).train()
    norms = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == 20 + 8  # of ResNet-18, and of the FPN's four inner and four layer blocks
    assert all(type(m) is torch.nn.BatchNorm2d and m.training for m in norms)
    assert all(p.requires_grad for p in model.parameters())
    before = [m.running_mean.clone() for m in norms]
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1])),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    sum(model([torch.rand(3, 64, 64), torch.rand(3, 48, 64)], targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(not torch.equal(a, m.running_mean) for a, m in zip(before, norms))


def test_the_papers_sizes():
    model = ft.build_detector("resnet50", 20)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["backbone.body.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["backbone.fpn.inner_blocks.3.0.weight"] == (256, 2048, 1, 1)
    assert shapes["backbone.fpn.layer_blocks.0.1.running_mean"] == (256,)
    assert shapes["roi_heads.box_predictor.cls_score.weight"] == (21, 1024)
    assert [*model.rpn.anchor_generator.sizes] == [(32,), (64,), (128,), (256,), (512,)]
    assert model.roi_heads.detections_per_img == 100


def test_weights_reach_the_detector_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    stages = common.resnet_stages("resnet18")
    common.export_backbone(stages, tmp_path / "backbone.pt")
    model = ft.build_detector("resnet18", 3, 16, weights=str(tmp_path / "backbone.pt"))
    body = model.backbone.body.state_dict()
    assert body.keys() == stages.state_dict().keys()
    assert all(torch.equal(v, body[k]) for k, v in stages.state_dict().items())
    other = ft.build_detector("resnet18", 3, 16)
    assert not torch.equal(other.backbone.body.conv1.weight, stages.conv1.weight)


def test_learning_rate():
    assert ft.learning_rate(0, 0.02, 100, [10, 20]) == pytest.approx(0.02 / 1000)
    rates = [ft.learning_rate(step, 1.0, 10, [20, 30]) for step in (5, 10, 19, 20, 29, 30, 99)]
    assert rates == pytest.approx([0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert ft.learning_rate(0, 1.0, 0, []) == 1


class Oracle(torch.nn.Module):
    """A detector that knows the answers by the image's mean, and is wrong about some of them."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("shift", torch.rand(1))
        self.known = {round(float(data[i][0].float().mean()), 3): data[i] for i in range(len(data))}

    def forward(self, images):
        found = []
        for image in images:
            _, boxes, labels, _ = self.known[round(float((image * 255).mean()), 3)]
            scores = torch.linspace(0.9, 0.4, len(boxes)) + 0.001 * len(boxes)
            boxes = boxes + 4 * self.shift * (boxes[:, :1] % 3)
            found.append(dict(boxes=boxes, labels=labels + 1, scores=scores))
        return found


class Silent:
    def stop_if_asked(self):
        pass


def evaluate_everywhere(number, world, path):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store{world}", rank=number, world_size=world)
    data = ft.LabelledScenes(23, seed=3)
    args = SimpleNamespace(batch_size=6, workers=0)
    torch.manual_seed(number)  # statistics that differ between processes, as on CPUs
    oracle = Oracle(data)
    ap = ft.evaluate(oracle, data, args, torch.device("cpu"), Silent())
    (path / f"{world}-{number}.json").write_text(json.dumps(ap))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_evaluation_is_the_same_for_one_two_and_three_processes(tmp_path):
    evaluate_everywhere(0, 1, tmp_path)
    for world in (2, 3):
        torch.multiprocessing.start_processes(evaluate_everywhere, (world, tmp_path), world,
                                              start_method="spawn")
    results = {p.name: p.read_text() for p in tmp_path.glob("*.json")}
    assert len(results) == 6 and len(set(results.values())) == 1
    assert 0.1 < json.loads(results["1-0.json"])["AP"] < 0.99


def test_a_detector_that_is_right_gets_one(tmp_path):
    data = ft.LabelledScenes(5, seed=3)
    items = [data[i] for i in range(5)]
    truths = [dict(boxes=b, labels=c, ignore=i) for _, b, c, i in items]
    exact = [dict(boxes=b, labels=c, scores=torch.ones(len(c))) for _, b, c, _ in items]
    assert coco_ap(truths, exact)["AP"] == pytest.approx(1)


def test_voc_from_end_to_end(tmp_path, capsys):
    things = [[("dog", 0, 1 + i, 5, 40 + i, 50), ("cat", i % 2, 50, 5, 75, 40)] for i in range(8)]
    make_voc(tmp_path / "voc", things)
    make_voc(tmp_path / "voc", things[:5], split="test")
    words = (f"--dataset voc --data {tmp_path / 'voc'} --classes cat dog --arch resnet18 "
             f"--batch-size 4 --fpn-channels 16 --rois 8 --min-size 48 64 --max-size 80 "
             f"--iterations 4 --drops 3 "
             f"--warmup 2 --log-every 2 --out {tmp_path / 'run'}").split()
    for workers in ("0", "2"):
        ft.main([*words, "--workers", workers, "--fresh"])
        out = capsys.readouterr().out
        assert "AP " in out and "AP50 " in out and "cat " in out and "dog " in out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "ap.json", "args.json", "checkpoint.pt", "curves.png", "detections.png", "log.csv"}
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap) == {*NAMES, "per_class"} and set(ap["per_class"]) <= {"cat", "dog"}


def test_mixed_precision_leaves_boxes_in_float32():
    torch.manual_seed(0)
    model = ft.build_detector("resnet18", 3, 16, min_size=[640], max_size=640, rois=8).train()
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
