import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image

from common import InputError
from detection.average_precision import coco_ap
from detection.data import (TRAIN_SPLITS, VOC_CLASSES, Annotated, LabelledScenes, read_coco,
                            read_voc, training_item)

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
        Annotated(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("inner, split", [("", "trainval"), ("VOCdevkit/VOC2007", "2007/trainval"),
                                          ("VOCdevkit/VOC2012", "2012/trainval"),
                                          ("VOCdevkit/VOC2011", "2011/mine")])
def test_voc_boxes_are_one_based_and_inclusive(tmp_path, inner, split, capsys):
    make_voc(tmp_path / inner, [[("dog", 0, 1, 1, 80, 60), ("cat", 1, 11, 21, 30, 40)],
                                [], [("cat", 0, 7, 7, 7, 20)]], split.rpartition("/")[2])
    file = read_voc(str(tmp_path), split)[1][0]
    assert file.size is None and Path(file.source).name == "0000.xml"
    assert file.objects == [("dog", (0, 0, 80, 60), False, 4800), ("cat", (10, 20, 30, 40), True,
                                                                   400)]
    data = Annotated("voc", str(tmp_path), [split])
    image, truth = data[0]
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8
    assert truth["boxes"].tolist() == [[0, 0, 80, 60], [10, 20, 30, 40]]
    assert truth["area"].tolist() == [4800, 400]
    assert [data.classes[i] for i in truth["labels"]] == ["dog", "cat"]
    assert truth["ignore"].tolist() == [False, True]
    for i in (1, 2):  # an image without objects, and one whose only box has no area
        _, truth = data[i]
        assert truth["boxes"].shape == (0, 4) and truth["labels"].shape == (0,)
        assert training_item(data[i])[1]["boxes"].shape == (0, 4)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 boxes without area left out, such as in 0002.xml" in said
    data = Annotated("voc", str(tmp_path), [split], training=True)
    assert data[0][1]["ignore"].tolist() == [False, False]  # difficult ones train
    assert data.classes == (["cat", "dog"] if not inner else VOC_CLASSES)


def test_splits_of_several_years_are_joined(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2007", [[("dog", 0, 1, 1, 9, 9)]] * 3)
    make_voc(tmp_path / "VOCdevkit/VOC2012", [[("cat", 0, 1, 1, 9, 9)]] * 2)
    data = Annotated("voc", str(tmp_path), TRAIN_SPLITS["voc"], training=True)
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
    data = Annotated("voc", str(tmp_path), ["trainval"])
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
    for sides in (("nan", 1, 9, 9), (1, 1, "nan", 9), (1, 1, 9, "inf")):
        path.write_text(XML.format(OBJECT.format("dog", 0, *sides)))
        message = error(*args)
        assert "0001.xml: the box " in message and "is not finite" in message
    path.write_text(XML.format(OBJECT.format("dog", 0, 90, 1, 99, 9)))
    assert "0001.xml: the box 89 0 99 9 lies outside the image of 80 x 60 pixels" in error(*args)
    path.write_text(XML.format(OBJECT.format("dog", 0, 60, 1, 99, 9)))
    capsys.readouterr()
    assert Annotated(*args)[1][1]["boxes"].tolist() == [[59, 0, 99, 9]]
    assert "1 boxes reach outside the image, such as in 0001.xml" in capsys.readouterr().out
    assert Annotated(*args, training=True)[1][1]["boxes"].tolist() == [[59, 0, 80, 9]]
    path.unlink()
    assert "no such file" in error(*args) and "0001.xml" in error(*args)
    assert "no split val: no ImageSets/Main/val.txt" in error("voc", str(tmp_path), ["val"])
    path.write_text(XML.format(OBJECT.format("dog", 0, 500, 400, 500, 400)))
    assert Annotated(*args)[1][1]["boxes"].shape == (0, 4)  # no area comes first
    for split in ("2007/trainval", "1999/trainval", "2007/other", "2012/test"):
        assert f"no split {split}" in error("voc", str(tmp_path), [split])
    path.write_text(XML.format(""))
    image = (tmp_path / "JPEGImages" / "0000.jpg").read_bytes()
    (tmp_path / "JPEGImages" / "0000.jpg").write_bytes(image[:1000])  # ends early
    with pytest.raises(InputError, match="cannot decode .*0000.jpg"):
        Annotated(*args)[0]
    (tmp_path / "JPEGImages" / "0000.jpg").write_bytes(b"no image")
    assert "cannot decode" in error(*args) and "0000.jpg" in error(*args)  # before any training
    data = Annotated(*args, training=True)
    assert torch.equal(data[0][0], data[1][0]) and data[0][1]["boxes"].shape == (0, 4)  # the next
    assert data.broken.tolist() == [True, False]
    with pytest.raises(InputError, match="1 of 2 images cannot be decoded: over 1%"):
        data.report_broken(print, "another image takes its place")
    assert "0000.jpg" in capsys.readouterr().out
    (tmp_path / "JPEGImages" / "0000.jpg").unlink()
    assert "No such file" in error(*args) and "0000.jpg" in error(*args)
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
    file = read_coco(str(folder), "some.json:photos")[1][0]
    assert file.size == (80, 60) and Path(file.path) == folder / "photos" / "0000.jpg"
    assert file.objects[0] == ("bottle", (10, 10, 30, 40), False, 432.5)
    data = Annotated("coco", str(folder), ["some.json:photos"])
    said = capsys.readouterr().out
    assert "1 boxes without area left out, such as in some.json, 0001.jpg" in said
    assert data.classes == ["car", "bottle", "brush"] and len(data) == 4  # by category id
    truths = [data[i][1] for i in range(4)]
    assert truths[0]["boxes"].tolist() == [[10, 10, 30, 40], [40.5, 5.25, 75.5, 55.25]]
    assert truths[0]["labels"].tolist() == [1, 0] and truths[0]["area"].tolist() == [432.5, 1700]
    assert truths[1]["labels"].tolist() == [1, 2] and truths[1]["ignore"].tolist() == [True, False]
    assert truths[2]["boxes"].shape == (0, 4) and truths[2]["labels"].shape == (0,)
    assert truths[3]["boxes"].tolist() == [[30, 20, 80.4, 60]]
    data = Annotated("coco", str(folder), ["some.json:photos"], training=True)
    _, target = training_item(data[1])
    assert target["labels"].tolist() == [3] and target["boxes"].shape == (1, 4)  # no crowd
    assert data[3][1]["boxes"].tolist() == [[30, 20, 80, 60]]
    # COCO's own names; the file's classes, also where another split lists them under other ids
    (folder / "annotations").mkdir()
    for category, i in zip(content["categories"], (1, 2, 3)):
        category["id"] = i
    for thing, i in zip(content["annotations"], (1, 2, 1, 3, 3, 2)):
        thing["category_id"] = i
    (folder / "annotations" / "instances_photos.json").write_text(json.dumps(content))
    other = Annotated("coco", str(folder), ["photos"], classes=data.classes)
    assert [other[i][1]["labels"].tolist() for i in range(4)] == [
        t["labels"].tolist() for t in truths]
    assert len(Annotated("coco", str(folder), ["photos", "some.json:photos"])) == 8


def test_coco_ap_equals_pycocotools_on_the_file(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    folder, content = make_coco(tmp_path)
    data = Annotated("coco", str(folder), ["some.json:photos"])
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
        for name, want in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), e.stats):
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
    assert "No such file" in broken(lambda c: c["images"][1].update(file_name="none.jpg"))
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
        data = Annotated("voc", str(tmp_path), ["trainval"], None, True, fraction, seed)
        for i in range(len(data)):  # still with its own boxes
            assert data[i][1]["boxes"][0, 0] == int(Path(data.paths[i]).stem)
        return set(data.paths)

    few, more = paths(0.1, 0), paths(0.5, 0)
    assert len(few) == 4 and len(more) == 20 and few < more
    assert few == paths(0.1, 0) != paths(0.1, 1)
    assert "no images" in error("voc", str(tmp_path), ["trainval"], fraction=0.01)


def test_flips_move_the_boxes_with_the_pixels():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[:, 4:9, 2:12] = 255
    item = image, dict(boxes=torch.tensor([[2.0, 4, 12, 9], [0, 0, 1, 1]]).double(),
                       labels=torch.tensor([3, 5]), ignore=torch.tensor([False, True]))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        flipped, target = training_item(item)
        (x1, y1, x2, y2), = target["boxes"].int().tolist()
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].tolist() == [4]  # from 1; the one to ignore is left out
        assert (flipped[:, y1:y2, x1:x2] == 255).all()
        assert flipped.float().sum() == 255 * 3 * 50
        seen.add(x1)
    assert seen == {2, 18}


def test_a_detector_that_is_right_about_every_scene_gets_one():
    data = LabelledScenes(5, seed=3)
    truths = [data[i][1] for i in range(5)]
    exact = [dict(boxes=t["boxes"], labels=t["labels"], scores=torch.ones(len(t["labels"])))
             for t in truths]
    assert coco_ap(truths, exact)["AP"] == pytest.approx(1)
