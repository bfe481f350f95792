"""The layouts of VOC and COCO: what a file says is read as it is meant, or refused by its name."""
import codecs
import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_identical
from layouts import (OBJECT, XML, add_keypoints, add_masks, draw, edit, error, make_coco, make_voc,
                     shares)
from PIL import Image

from common import InputError
from detection.average_precision import coco_ap
from detection.data import Annotated, training_item
from detection.formats import KEYPOINTS, VOC_CLASSES, read_coco, read_voc


@pytest.mark.parametrize("inner, split", [("", "trainval"), ("VOCdevkit/VOC2007", "2007/trainval"),
                                          ("VOCdevkit/VOC2012", "2012/trainval"),
                                          ("VOCdevkit/VOC2011", "2011/mine")])
def test_voc_boxes_are_one_based_and_inclusive(tmp_path, inner, split, capsys):
    make_voc(tmp_path / inner, [[("dog", 0, 1, 1, 80, 60), ("cat", 1, 11, 21, 30, 40)],
                                [], [("cat", 0, 7, 7, 7, 20)]], split.rpartition("/")[2])
    file = read_voc(str(tmp_path), split)[1][0]
    assert file.size == (80, 60) and Path(file.source).name == "0000.xml"
    assert file.objects == [("dog", (0, 0, 80, 60), False, 4800, None, None),
                            ("cat", (10, 20, 30, 40), True, 400, None,
                             None)]
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
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (f"{split}: 3 images, 2 of them without a box; 3 boxes: 1 difficult, "
                       "1 without area")
    assert said[1] == f"{split}: boxes " + ", ".join(
        f"{int(name == 'dog')} {name}" for name in data.classes)
    assert said[2:] == [f"{split}: 1 boxes without area left out, such as in 0002.xml"]
    data = Annotated("voc", str(tmp_path), [split], training=True)
    assert data[0][1]["ignore"].tolist() == [False, False]  # difficult ones train
    assert data.classes == (["cat", "dog"] if not inner else VOC_CLASSES)


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
                 XML.format("<object><name>a</name><bndbox/></object>"),
                 XML.format("<Object/>"), "<?xml version='1.0' encoding='utf8mb4'?><annotation/>"):
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
    path.mkdir()
    assert "cannot read" in error(*args) and "0001.xml: Is a directory" in error(*args)
    path.rmdir()
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
    data = Annotated(*args, training=True, keep_empty=True)
    assert torch.equal(data[0][0], data[1][0]) and data[0][1]["boxes"].shape == (0, 4)  # the next
    assert data.broken.tolist() == [True, False]
    assert data.report(print, "another image takes its place") == 1  # fewer than three
    assert "0000.jpg" in capsys.readouterr().out
    (tmp_path / "JPEGImages" / "0000.jpg").unlink()
    assert "No such file" in error(*args) and "0000.jpg" in error(*args)
    (tmp_path / "ImageSets" / "Main" / "none.txt").write_text("\n")
    assert "no images in none" in error("voc", str(tmp_path), ["none"])


def test_coco_items(tmp_path, capsys):
    folder, content = make_coco(tmp_path)
    file = read_coco(str(folder), "some.json:photos")[1][0]
    assert file.size == (80, 60) and Path(file.path) == folder / "photos" / "0000.jpg"
    assert file.objects[0] == ("bottle", (10, 10, 30, 40), False, 432.5, None, None)
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
    # without the empty image, as detectron2's FILTER_EMPTY_ANNOTATIONS; in the test it stays
    assert len(data) == len(data.paths) == len(data.sizes) == 3
    assert [Path(path).name for path in data.paths] == ["0000.jpg", "0001.jpg", "0003.jpg"]
    assert data[2][1]["boxes"].tolist() == [[30, 20, 80, 60]]
    kept = Annotated("coco", str(folder), ["some.json:photos"], training=True, keep_empty=True)
    assert len(kept) == 4
    for i, j in ((0, 0), (1, 1), (2, 3)):
        assert torch.equal(data[i][0], kept[j][0])
        assert_identical(data[i][1], kept[j][1])
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
    assert "two annotations are of" in error("coco", str(folder), ["photos", "some.json:photos"])
    (folder / "again").symlink_to(folder / "photos")
    assert len(Annotated("coco", str(folder), ["photos", "some.json:again"])) == 8


def test_coco_masks(tmp_path, capsys):
    """The pixels of each kind of segmentation, the line without area and what is a line alone left
    out; in training without the crowd."""
    folder, content = make_coco(tmp_path)
    add_masks(folder, content)
    data = Annotated("coco", str(folder), ["some.json:photos"], masks=True)
    said = capsys.readouterr().out
    assert "6 boxes: 1 crowds, 2 without a mask" in said
    assert "2 boxes without a mask left out, such as in some.json, 0001.jpg" in said
    truths = [data[i][1] for i in range(4)]
    assert [truth["masks"].shape for truth in truths] == [(n, 60, 80) for n in (2, 1, 0, 1)]
    assert all(truth["masks"].dtype == torch.bool for truth in truths)
    for y in range(60):
        for x in range(80):
            # x / 20 + y / 30 < 1 from the corner (10, 10), at the pixel's middle
            share = (x - 9.5) / 20 + (y - 9.5) / 30
            if abs(share - 1) > 0.02:
                assert truths[0]["masks"][0, y, x] == (x >= 10 and y >= 10 and share < 1), (x, y)
            assert truths[0]["masks"][1, y, x] == (40 <= x < 60 and 5 <= y < 45)
            assert truths[1]["masks"][0, y, x] == (x == 0 and 10 <= y < 30)
            assert truths[3]["masks"][0, y, x] == (x == 30 and y >= 20)
    assert truths[1]["ignore"].tolist() == [True]  # the crowd
    train = Annotated("coco", str(folder), ["some.json:photos"], training=True, masks=True)
    assert [Path(path).name for path in train.paths] == ["0000.jpg", "0003.jpg"]
    for i, image in enumerate((0, 3)):
        assert torch.equal(train[i][1]["masks"], truths[image]["masks"])
    kept = Annotated("coco", str(folder), ["some.json:photos"], None, True, keep_empty=True,
                     masks=True)
    assert training_item(kept[1])[1]["bitmasks"].shape == (0, 60, 80)
    assert "masks" not in Annotated("coco", str(folder), ["some.json:photos"])[0][1]


def test_a_segmentation_that_is_wrong_is_named(tmp_path):
    """What can be told without drawing it before the training, the rest when it is drawn."""
    folder, content = make_coco(tmp_path)
    args = "coco", str(folder), ["some.json:photos"]
    for segmentation, message in (
            ([[1, 2, 3, 4, 5]], "annotation 2: a polygon is no list of x1 y1 x2 y2"),
            ([1, 2, 3, 4, 5, 6], "annotation 2: a polygon is no list of x1 y1"),
            ([[1, 2, 3, 4, 5, "x"]], "annotation 2: a polygon is no list of x1 y1"),
            ([[[1, 2], [3, 4], [5, 6]] * 2], "annotation 2: a polygon is no list of x1 y1"),
            ([[.1, .2, .1, .4, .3, .4]], "annotation 2: its polygons lie outside its bbox"),
            (dict(size=[80, 60], counts=[4800]), "runs of size [80, 60], expected [height, width]"),
            ("polygon", "annotation 2: its segmentation is neither polygons nor runs"),
            (dict(size=[60, 80]), "annotation 2: its segmentation is neither")):
        add_masks(folder, content)
        content["annotations"][1]["segmentation"] = segmentation
        (folder / "some.json").write_text(json.dumps(content))
        assert message in error(*args, masks=True)
        Annotated(*args)  # who trains on boxes has nothing to do with it
    for segmentation, message in (
            ([[math.nan, 2, 3, 4, 5, 6]], "a polygon that is no list of numbers"),
            (dict(size=[60, 80], counts=[4801]), "runs that sum to 4801")):
        content["annotations"][1]["segmentation"] = segmentation
        (folder / "some.json").write_text(json.dumps(content))
        for use in (lambda data: data[0], lambda data: data.decode(0, print)):  # before a training
            with pytest.raises(InputError, match=f"photos/0000.jpg, annotation 2: {message}"):
                use(Annotated(*args, masks=True))


def test_coco_keypoints(tmp_path, capsys):
    """As COCO has them, also of the file that has COCO's name; in training without the images in
    which none is labelled, but with persons without any beside others."""
    folder, content = make_coco(tmp_path)
    args = "coco", str(folder), ["some.json:photos"]
    assert "bottle has not COCO's 17 keypoints" in error(*args, keypoints=True)
    add_keypoints(folder, content)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "person_keypoints_photos.json").write_text(json.dumps(content))
    for split in ("some.json:photos", "photos"):
        data = Annotated("coco", str(folder), [split], keypoints=True)
        truths = [data[i][1]["keypoints"] for i in range(4)]
        assert [truth.shape for truth in truths] == [(n, 17, 3) for n in (2, 2, 0, 1)]
        for truth, entry in zip(truths[0], content["annotations"]):
            assert truth.flatten().tolist() == entry["keypoints"]
        assert not torch.cat(truths[1:]).any()
    assert data.classes == ["person"]
    capsys.readouterr()
    train = Annotated(*args, training=True, keypoints=True)
    assert [Path(path).name for path in train.paths] == ["0000.jpg"]
    assert "3 images without a keypoint to train on left out" in capsys.readouterr().out
    assert torch.equal(train[0][1]["keypoints"], truths[0])
    assert len(Annotated(*args, training=True, keypoints=True, keep_empty=True)) == 4
    for wrong in ([1, 2, 1], [0] * 50 + [math.nan], [0] * 54):
        content["annotations"][1]["keypoints"] = wrong
        (folder / "some.json").write_text(json.dumps(content))
        assert "annotation 2: its keypoints are not 17 x y visibility" in error(
            *args, keypoints=True)
        Annotated(*args)
    content["categories"][0]["keypoints"] = KEYPOINTS[:4]
    (folder / "some.json").write_text(json.dumps(content))
    assert "person has not COCO's 17 keypoints, nose to" in error(*args, keypoints=True)


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
                   lambda c: c["annotations"][1].update(iscrowd="maybe"),
                   lambda c: c["annotations"][1].update(iscrowd=2),
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
    assert "its bbox is no list" in broken(lambda c: c["annotations"][1].update(bbox="1234"))
    for name in (None, "", " "):
        assert "a category without a name in {" in broken(
            lambda c: c["categories"][1].update(name=name))
    assert "two categories have the name 'car'" in broken(
        lambda c: c["categories"][0].update(name="car "))
    assert "not finite" in broken(lambda c: c["annotations"][1].update(bbox=[1, 2, 3, 1e999]))
    assert "too large to convert to float" in broken(
        lambda c: c["annotations"][1].update(bbox=[1, 2, 3, 10 ** 400]))
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


def test_rotated_and_repeated_boxes(tmp_path, capsys):
    """CVAT's: the box that it writes is not yet turned."""
    args = draw(tmp_path / "coco", "coco")
    path = tmp_path / "coco" / "a.json"
    content = json.loads(path.read_text())
    for degrees, refused in ((0.0, False), (360, False), (45.5, True), (-90, True)):
        content["annotations"][1]["attributes"] = dict(occluded=False, rotation=degrees)
        path.write_text(json.dumps(content))
        if refused:
            assert f"a box is rotated, by {degrees:g} degrees in {{" in error(*args)
        else:
            Annotated(*args)
    content["annotations"][1].pop("attributes")
    content["annotations"].append(dict(content["annotations"][1], id=9))
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert len(Annotated(*args)[1][1]["boxes"]) == 2  # as they are, but it is said
    assert "1 images have a box twice, such as in a.json, 0001.jpg" in capsys.readouterr().out

    args = draw(tmp_path / "voc", "voc")
    path = tmp_path / "voc" / "Annotations" / "0001.xml"
    edit(path, "<bndbox>", "<attributes><attribute><name>occluded</name><value>0</value>"
         "</attribute><attribute><name>rotation</name><value>45.0</value></attribute></attributes>"
         "<bndbox>")
    assert "0001.xml is not a VOC annotation: a box is rotated, by 45 degrees" in error(*args)


@pytest.mark.parametrize("rotation", ["left", None, [], {}])
def test_an_attribute_called_rotation_need_not_be_cvats(tmp_path, rotation):
    args = draw(tmp_path, "coco")
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"][0]["attributes"] = dict(rotation=rotation)
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert min(shares(Annotated(*args))) > 0.9


def test_of_two_images_of_one_name_filename_decides(tmp_path, capsys):
    args = draw(tmp_path, "voc", extension="png")
    images, path = tmp_path / "JPEGImages", tmp_path / "Annotations" / "0000.xml"
    Image.new("RGB", (90, 120)).save(images / "0000.jpg")  # black
    message = error(*args)
    assert "0000.xml: is it of " in message and "<filename> must say" in message
    assert "0000.jpg or of " in message and "0000.png" in message
    text = path.read_text()
    for filename in ("0000.png", "C:\\photos\\0000.png", "/home/me/0000.png"):
        path.write_text(text.replace("<size>", f"<filename>{filename}</filename><size>"))
        assert min(shares(Annotated(*args))) > 0.9
    path.write_text(text.replace("<size>", "<filename>0000.bmp</filename><size>"))
    assert "is it of " in error(*args)
    (images / "0000.jpg").unlink()
    assert min(shares(Annotated(*args))) > 0.9  # only one is left
    (images / "0000.png").rename(images / "photo 7.png")
    assert "No such file" in error(*args) and "0000.jpg" in error(*args)
    path.write_text(text.replace("<size>", "<filename>photo 7.png</filename><size>"))
    assert min(shares(Annotated(*args))) > 0.9
    capsys.readouterr()
    edit(tmp_path / "Annotations" / "0001.xml", "<size>", "<filename>0002.png</filename><size>")
    assert min(shares(Annotated(*args))) > 0.9
    said = capsys.readouterr().out
    assert "warning: 1 annotations have another image's <filename>" in said and "0001.xml" in said


def test_what_occurs_twice_is_refused(tmp_path):
    args = draw(tmp_path / "voc", "voc")
    path = tmp_path / "voc" / "Annotations" / "0001.xml"
    text = path.read_text()
    for old, tag in (("<xmin>", "bndbox/xmin"), ("<ymax>", "bndbox/ymax"), ("<name>", "name"),
                     ("<difficult>", "difficult"), ("<width>", "size/width")):
        closing = old.replace("<", "</")
        value = text[text.index(old):text.index(closing) + len(closing)]
        path.write_text(text.replace(value, 2 * value))
        assert f"0001.xml is not a VOC annotation: 2 <{tag}> in an <" in error(*args)
    box = text[text.index("<bndbox>"):text.index("</bndbox>") + 9]
    path.write_text(text.replace(box, 2 * box))
    assert "2 <bndbox/xmin> in an <object>" in error(*args)
    path.write_text(text.replace(box, ""))
    assert "no <bndbox/xmin> in an <object>" in error(*args)
    path.write_text(text.replace("<object>", "<objects><object>").replace("</object>",
                                                                         "</object></objects>"))
    assert "an <object> is not directly in the <annotation>" in error(*args)
    path.write_text(text.replace("<name>red", "<name> "))
    assert "the <name> of an <object> is empty" in error(*args)
    path.write_text(text)
    edit(tmp_path / "voc" / "ImageSets" / "Main" / "all.txt", "0002", "0001")
    assert "all.txt: two lines are '0001'" in error(*args)

    args = draw(tmp_path / "coco", "coco")
    path = tmp_path / "coco" / "a.json"
    content = json.loads(path.read_text())
    content["categories"].append(dict(id=2, name="blue"))
    for where, change, message in (
            ("images", dict(id=0), "two images have the id 0"),
            ("images", dict(file_name="0000.jpg"), "two images are '"),
            ("annotations", dict(id=0), "two annotations have the id 0"),
            ("categories", dict(id=1), "two categories have the id 1"),
            ("categories", dict(name="red"), "two categories have the name 'red'")):
        other = json.loads(json.dumps(content))
        other[where][1].update(change)
        path.write_text(json.dumps(other))
        assert message in error(*args), message
    path.write_text(json.dumps(content)[:-1] + ', "images": []}')
    assert "occurs twice in one object" in error(*args)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_files_of_any_encoding(tmp_path, encoding):
    args = draw(tmp_path / "voc", "voc")
    for folder, extension in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (tmp_path / "voc" / folder / f"0000.{extension}").rename(
            tmp_path / "voc" / folder / f"Käfer.{extension}")
    text = "Käfer\r\n0001.jpg\r\n\r\n0002.xml\r\n"  # of files, too
    path = tmp_path / "voc" / "ImageSets" / "Main" / "all.txt"
    mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
    for start in (b"", mark):
        path.write_bytes(start + text.encode(encoding))
        data = Annotated(*args)
        assert [Path(file).stem for file in data.paths] == ["Käfer", "0001", "0002"]
        assert min(shares(data)) > 0.9
    if encoding != "latin-1":
        args = draw(tmp_path / "coco", "coco")
        path = tmp_path / "coco" / "a.json"
        path.write_bytes(mark + path.read_text().encode(encoding))
        assert min(shares(Annotated(*args))) > 0.9


def test_a_category_that_groups_others_may_have_the_name_of_one(tmp_path):
    args = draw(tmp_path, "coco")
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["categories"]]
    for entry in content["categories"]:
        entry["supercategory"] = names[0]
    content["categories"].append(dict(id=99, name=names[0], supercategory="none"))
    path.write_text(json.dumps(content))
    assert Annotated(*args).classes == names
    content["annotations"][0]["category_id"] = 99
    path.write_text(json.dumps(content))
    assert "two categories have the name" in error(*args)


def test_a_list_of_one_class_is_refused(tmp_path):
    args = draw(tmp_path, "voc")
    path = tmp_path / "ImageSets" / "Main" / "all.txt"
    path.write_text("0000 -1\n0001  1\n0002  0\n")
    assert "all.txt: no image has the name '0000 -1'" in error(*args)
    assert "VOC's lists of one class have two columns" in error(*args)


def test_coco_fields_as_other_tools_write_them(tmp_path, capsys):
    args = draw(tmp_path, "coco", 6)
    (tmp_path / "JPEGImages" / "deep").mkdir()
    (tmp_path / "JPEGImages" / "0000.jpg").rename(tmp_path / "JPEGImages" / "deep" / "0000.jpg")
    content = json.loads((tmp_path / "a.json").read_text())
    content["images"][0]["file_name"] = "deep\\0000.jpg"
    for image, width in zip(content["images"], (-1, math.inf, None, "90", 90.0)):
        image["width"] = width
    del content["images"][5]["width"]
    for thing, area in zip(content["annotations"], (None, [], "x", -1, 700.5, "700.5")):
        thing["area"] = area
    content["annotations"] += [dict(id=9, image_id=0, category_id=1, bbox=bbox) for bbox in
                               ([], None)]
    del content["annotations"][-1]["id"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = Annotated(*args)
    assert min(shares(data)) > 0.9 and data.rows[:, 4].tolist() == [1200] * 4 + [700.5] * 2
    assert "8 boxes: 2 without area" in capsys.readouterr().out


def test_the_readmes_lines_turn_yolos_boxes_into_cocos(tmp_path, monkeypatch):
    """On photos of which some are turned by their EXIF orientation: YOLO's boxes are upright."""
    for orientation, folder in ((1, "upright"), (6, "turned")):
        args = draw(tmp_path / folder, "coco", 3, orientation)
        content = json.loads((tmp_path / folder / "a.json").read_text())
        (tmp_path / folder / "JPEGImages").rename(tmp_path / folder / "photos")
        (tmp_path / folder / "labels").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / folder / "photos" / "empty.jpg")  # without a file
        for thing in content["annotations"]:
            x, y, w, h = thing["bbox"]
            (tmp_path / folder / "labels" / f"{thing['image_id']:04}.txt").write_text(
                f"1 {(x + w / 2) / 90} {(y + h / 2) / 120} {w / 90} {h / 120}\n")
        readme = (ROOT / "README.md").read_text()
        code = next(part for part in readme.split("```python\n")[1:] if "ImageOps" in part)
        monkeypatch.chdir(tmp_path / folder)
        exec(code.split("```")[0], {})
        data = Annotated("coco", args[1], ["train.json:photos"])
        assert data.classes == ["cat", "dog"] and min(shares(data)) > 0.9
        assert [data[i][1]["labels"].tolist() for i in range(4)] == [[1], [1], [1], []]
