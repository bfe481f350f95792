"""Images and boxes as detectors get them: upright, whole, inside, or refused with the reason."""
import json
import re
from pathlib import Path

import pytest
import torch
from layouts import UPRIGHT, draw, edit, error, make_voc, shares

from common import InputError
from detection.average_precision import coco_ap
from detection.data import Annotated, LabelledScenes, clip_box, training_item
from detection.formats import KEYPOINTS, TRAIN_SPLITS


def test_splits_of_several_years_are_joined(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2007", [[("dog", 0, 1, 1, 9, 9)]] * 3)
    make_voc(tmp_path / "VOCdevkit/VOC2012", [[("cat", 0, 1, 1, 9, 9)]] * 2)
    data = Annotated("voc", str(tmp_path), TRAIN_SPLITS["voc"], training=True)
    assert [data.classes[data[i][1]["labels"]] for i in range(5)] == [*["dog"] * 3, *["cat"] * 2]


def test_flips_exchange_left_and_right_keypoints():
    """A pixel of its own for each keypoint: in the mirrored image the left eye is on the pixel that
    was the right one's."""
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    points = torch.tensor([[k + 3, 19 - k, 1 + k % 2] for k in range(17)])
    for k, (x, y, _) in enumerate(points.tolist()):
        image[:, y, x] = 100 + k
    item = image, dict(boxes=torch.tensor([[3.0, 2, 20, 20]] * 2), labels=torch.tensor([0, 0]),
                       ignore=torch.tensor([True, False]),
                       keypoints=torch.stack([0 * points, points]))
    seen = set()
    for seed in range(9):
        torch.manual_seed(seed)
        flipped, target = training_item(item)
        mirrored = not torch.equal(flipped, image)
        seen.add(mirrored)
        assert target["keypoints"].shape == (1, 17, 3)
        for name, (x, y, visible) in zip(KEYPOINTS, target["keypoints"][0].tolist()):
            if mirrored and name != "nose":
                side, part = name.split("_")
                name = dict(left="right", right="left")[side] + "_" + part
            k = KEYPOINTS.index(name)
            assert x % 1 == y % 1 == 0.5  # the pixel's middle
            assert flipped[0, int(y), int(x)] == 100 + k and visible == 1 + k % 2
    assert seen == {False, True}


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
                       labels=torch.tensor([3, 5]), ignore=torch.tensor([False, True]),
                       masks=torch.stack([image[0] == 255, image[0] == 0]))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        flipped, target = training_item(item)
        (x1, y1, x2, y2), = target["boxes"].int().tolist()
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].tolist() == [4]  # from 1; the one to ignore is left out
        assert (flipped[:, y1:y2, x1:x2] == 255).all()
        assert flipped.float().sum() == 255 * 3 * 50
        assert torch.equal(target["bitmasks"], flipped[:1] == 255)
        seen.add(x1)
    assert seen == {2, 18}


def test_keypoints_of_scenes():
    """Their corners, counted from the middle of pixel 0, as nose, shoulders and hips."""
    data, seen = LabelledScenes(9, seed=3, keypoints=True), 0
    for i in range(9):
        _, _, labels, _, corners = data.scenes.labelled(i)
        keypoints = data[i][1]["keypoints"]
        assert keypoints.shape == (len(labels), 17, 3)
        for k, name in enumerate("nose left_shoulder right_shoulder left_hip right_hip".split()):
            found = keypoints[:, KEYPOINTS.index(name)]
            assert torch.equal(found, corners[:, k] - torch.tensor([0.5, 0.5, 0]))
            seen += int(found[:, 2].sum())
        assert (keypoints[:, :, 2] > 0).sum() == corners[:, :, 2].sum()
    assert seen > 9


def test_a_detector_that_is_right_about_every_scene_gets_one():
    data = LabelledScenes(5, seed=3)
    truths = [data[i][1] for i in range(5)]
    exact = [dict(boxes=t["boxes"], labels=t["labels"], scores=torch.ones(len(t["labels"])))
             for t in truths]
    assert coco_ap(truths, exact)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("layout", ["voc", "coco"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("extension, declared", [("jpg", "upright"), ("jpg", "none"),
                                                 ("png", "upright"), ("tif", "none")])
def test_boxes_lie_on_their_objects_whatever_way_the_file_is_stored(
        tmp_path, capsys, layout, orientation, extension, declared):
    args = draw(tmp_path, layout, 3, orientation, extension, declared)
    data = Annotated(*args)
    assert min(shares(data)) > 0.9 and data.sizes == [(90, 120)] * 3
    turned = "3 images turned upright, as their EXIF orientation says, such as in "
    assert (turned in capsys.readouterr().out) == (orientation > 1)


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_boxes_of_other_pixels_than_the_upright_ones_are_refused(tmp_path, layout):
    stored = ("are of the image as it is stored, 120 x 90 pixels, but its EXIF orientation tag "
              "turns it to 90 x 120")
    for orientation in (6, 8):
        folder = tmp_path / str(orientation)
        assert stored in error(*draw(folder, layout, 3, orientation, declared="stored"))
    # without a size, a box tells that fits into the stored image alone
    args = draw(tmp_path / "none", layout, 3, 6, declared="none")
    for path in ((tmp_path / "none" / "Annotations").glob("*") if layout == "voc" else
                 [tmp_path / "none" / "a.json"]):
        text = path.read_text()
        path.write_text(re.sub(r"<xmax>\d+", "<xmax>115", text) if layout == "voc" else
                        re.sub(r'"bbox": \[\d+, \d+, 30', '"bbox": [20, 4, 90', text))
    assert stored in error(*args)
    # turned, or made smaller, after it was annotated
    declared = r"declared as 120 x 90 pixels, but .*\.jpg has 90 x 120"
    assert re.search(declared, error(*draw(tmp_path / "turned", layout, declared="stored")))
    smaller = draw(tmp_path / "smaller", layout, shrink=2)
    assert re.search(r"declared as 90 x 120 pixels, but .*\.jpg has 45 x 60", error(*smaller))


def test_a_size_that_is_nearly_the_stored_one_is_refused(tmp_path):
    """As tools write that round, or that make photos smaller; VOC's layout leaves room for both."""
    for i, (width, height) in enumerate(((60, 45), (121, 90), (119, 91), (800, 600))):
        args = draw(tmp_path / str(i), "voc", 3, 6)
        path = tmp_path / str(i) / "Annotations" / "0001.xml"
        edit(path, "<width>90</width><height>120<", f"<width>{width}</width><height>{height}<")
        assert "0001.xml: its size or its boxes are of the image as it is stored" in error(*args)
        edit(path, f"<width>{width}</width><height>{height}<", "<width>91</width><height>119<")
        assert min(shares(Annotated(*args))) > 0.9


def test_a_wrong_size_of_voc_is_pointed_out_where_the_boxes_fit(tmp_path, capsys):
    args = draw(tmp_path, "voc")
    path = tmp_path / "Annotations" / "0001.xml"
    text = path.read_text()
    for width, said in ((92, False), (500, True), (0, False), ("", False)):
        path.write_text(text.replace("<width>90", f"<width>{width}"))
        assert min(shares(Annotated(*args))) > 0.9
        assert ("1 files declare another size than their image has (was it resized after it was "
                "annotated?), such as in 0001.xml" in capsys.readouterr().out) == said
    path.write_text(text.replace("<width>90", "<width>500").replace("<xmax>", "<xmax>1"))
    assert "declared as 500 x 120 pixels, but " in error(*args)  # where the boxes do not fit
    args = draw(tmp_path / "many", "voc", 20)
    for i in range(11):
        edit(tmp_path / "many" / "Annotations" / f"{i:04}.xml", "<width>90", "<width>416")
    assert "11 files declare another size" in error(*args) and "delete their <size>" in error(*args)


@pytest.mark.parametrize("training", [True, False])
def test_a_set_without_a_target_is_refused_with_the_counts(tmp_path, training, capsys):
    args = draw(tmp_path / "coco", "coco")
    path = tmp_path / "coco" / "a.json"
    text, end = path.read_text(), "train on" if training else "be found"
    for flag in ("1", "true", '"1"', '"True"', "1.0", '"yes"'):
        path.write_text(text.replace('"category_id"', f'"iscrowd": {flag}, "category_id"'))
        assert error(*args, training=training) == (
            f"a.json:JPEGImages: 3 images, 3 boxes: 3 crowds; no box is left to {end}")
    for flag in ("0", "false", '"0"', '"False"', "0.0", '"no"', "null", '""'):
        path.write_text(text.replace('"category_id"', f'"iscrowd": {flag}, "category_id"'))
        assert not any(ignored for _, truth in map(Annotated(*args, training=training).__getitem__,
                                                   range(3)) for ignored in truth["ignore"])
    for flag in ("2", '"maybe"', "-1", "[]"):
        path.write_text(text.replace('"category_id"', f'"iscrowd": {flag}, "category_id"'))
        assert "is no flag, such as 0 or 1" in error(*args, training=training)
    content = json.loads(text)
    path.write_text(json.dumps(dict(content, annotations=[])))
    assert f"3 images, 0 boxes; no box is left to {end}" in error(*args, training=training)
    path.write_text(re.sub(r", 30, 40]", ", 0, 40]", text))
    assert f"3 boxes: 3 without area; no box is left to {end}" in error(*args, training=training)

    args, flat = draw(tmp_path / "voc", "voc", 30), 0
    files = [*(tmp_path / "voc" / "Annotations").glob("*.xml")]
    for path in files:
        edit(path, "<difficult>0", "<difficult>1")
    if training:  # they train
        Annotated(*args, training=True)
    else:
        assert "30 images, 30 boxes: 30 difficult; no box is left to be found" in error(*args)
    for path in files:  # width and height in place of the far corner
        x, y = map(int, re.search(r"<xmin>(\d+)</xmin><ymin>(\d+)", path.read_text()).groups())
        flat += x >= 30 or y >= 40
        edit(path, f"<xmax>{x + 29}</xmax><ymax>{y + 39}", "<xmax>30</xmax><ymax>40")
    assert 15 < flat < 30  # the others would be wrong in silence
    message = error(*args, training=training)
    assert f"{flat} without area; such as in " in message
    assert "do xmax and ymax hold width and height?" in message


def test_what_a_set_holds_is_printed(tmp_path, capsys):
    args = draw(tmp_path, "coco", 4)
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    content["categories"] += [dict(id=7, name="blue"), dict(id=3, name="green")]
    one, two, three, four = content["annotations"]
    two["category_id"], three["iscrowd"], four["bbox"] = 7, 1, []
    path.write_text(json.dumps(content))
    Annotated(*args, training=True)
    name = "a.json:JPEGImages"
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: 4 images, 1 of them without a box; 4 boxes: 1 crowds, 1 without area",
        f"{name}: boxes 1 red, 0 green, 1 blue",
        f"{name}: 1 boxes without area left out, such as in a.json, 0003.jpg",
        f"{name}: warning: no box of green to train on",
        f"{name}: 2 images without a box to train on left out; --keep-empty trains on them"]
    Annotated(*args)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_boxes_on_another_scale(tmp_path, layout, capsys):
    def rescaled(folder, width, height):
        args = draw(folder, layout, 25)
        if layout == "coco":
            path = folder / "a.json"
            content = json.loads(path.read_text())
            for thing in content["annotations"]:
                thing["bbox"] = [side * by for side, by in zip(thing["bbox"], (width, height) * 2)]
            path.write_text(json.dumps(content))
        else:
            for path in (folder / "Annotations").glob("*.xml"):
                for side, by in (("x", width), ("y", height)):
                    path.write_text(re.sub(
                        rf"<({side}m..)>(\d+)", lambda m: f"<{m[1]}>{int(m[2]) * by}",
                        path.read_text()))
        return args

    args = rescaled(tmp_path / "fractions", 1 / 90, 1 / 120)
    assert "25 of 25 boxes lie within 0..1: they are fractions" in error(*args)
    args = rescaled(tmp_path / "smaller", 0.4, 0.4)
    Annotated(*args)
    assert "warning: 25 boxes lie in the upper left quarter" in capsys.readouterr().out
    args = rescaled(tmp_path / "right", 1, 1)
    Annotated(*args)
    assert "warning" not in capsys.readouterr().out


def test_coco_boxes_that_hold_the_far_corner_are_refused(tmp_path):
    args = draw(tmp_path, "coco", 40)
    content = json.loads((tmp_path / "a.json").read_text())
    outside = 0
    for thing in content["annotations"]:
        x, y, w, h = thing["bbox"]
        thing["bbox"] = [x, y, x + w, y + h]
        outside += 2 * x + w > 91 or 2 * y + h > 121
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert 5 < outside < 35
    assert (f"40 boxes; {outside} reach outside their image, such as in {tmp_path}/a.json, " in
            error(*args)) and "do width and height hold the far corner?" in error(*args)


def test_a_cut_off_test_image_is_named_with_the_reason_before_the_training(tmp_path, capsys):
    data = Annotated(*draw(tmp_path, "voc"))
    data.decode(0, print)
    (tmp_path / "JPEGImages" / "0001.jpg").write_bytes(
        (tmp_path / "JPEGImages" / "0001.jpg").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"^1 of 3 images cannot be decoded: .*0001.jpg$"):
        data.decode(2, print)
    assert "0001.jpg' (image file is truncated" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"cannot decode .*0001.jpg: image file is truncated"):
        data[1]


def test_boxes_up_to_a_pixel_outside_are_cut_off():
    assert clip_box((80.9, 1, 90, 9), (80, 60), "x") is None  # rounded
    assert clip_box((-0.4, 1, 80.4, 61), (80, 60), "x") == (0, 1, 80, 60)
    assert clip_box((1, 1, 1.02, 9), (80, 60), "x") == (1, 1, 1.02, 9)
    for box in ((81.1, 1, 90, 9), (1, -9, 5, -1.1)):
        with pytest.raises(InputError, match="lies outside the image of 80 x 60 pixels"):
            clip_box(box, (80, 60), "x")
