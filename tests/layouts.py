"""Folders in VOC's and COCO's layout for tests to read, and what Annotated makes of them."""
import json

import numpy as np
import pytest
from conftest import make_photos
from PIL import Image

from common import InputError
from detection.data import Annotated
from detection.formats import KEYPOINTS

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


def compressed(runs):
    """At most 3 runs as COCO's string: five bits a character, the lowest first."""
    text = ""
    for run in runs:
        while run >= 16:  # the next bit would be a sign
            text, run = text + chr(48 + 32 + run % 32), run // 32
        text += chr(48 + run)
    return text


def add_masks(folder, content):
    """Add segmentations of all kinds to make_coco's: of its six objects a triangle, two squares
    that touch, a crowd's runs, none, a line, and compressed runs."""
    squares = [[40, 5, 60, 5, 60, 25, 40, 25], [40, 25, 60, 25, 60, 45, 40, 45]]
    for entry, segmentation in zip(content["annotations"], [
            [[10, 10, 30, 10, 10, 40], [1, 1, 5, 5]], squares,
            dict(size=[60, 80], counts=[10, 20, 4770]), None, [[3, 4, 3, 17]],
            dict(size=[60, 80], counts=compressed([1820, 40, 2940]))]):
        entry["segmentation"] = segmentation
    (folder / "some.json").write_text(json.dumps(content))


def add_keypoints(folder, content):
    """Make persons of make_coco's objects: the first with 17 keypoints, the second with 3, a crowd,
    and others without any."""
    content["categories"] = [dict(id=1, name="person", keypoints=KEYPOINTS)]
    rng = np.random.default_rng(0)
    for entry, number in zip(content["annotations"], (17, 3, 0, None, 0, 0)):
        entry["category_id"] = 1
        if number is not None:
            x, y, w, h = entry["bbox"]
            points = np.zeros((17, 3), dtype=int)
            points[:number] = np.stack([x + rng.random(number) * w, y + rng.random(number) * h,
                                        rng.integers(1, 3, number)], axis=1)
            entry.update(keypoints=points.ravel().tolist(), num_keypoints=number)
    (folder / "some.json").write_text(json.dumps(content))


UPRIGHT = {1: 0, 3: 2, 6: 1, 8: 3}  # EXIF orientation -> quarter turns that make the stored pixels


def draw(folder, layout, number=3, orientation=1, extension="jpg", declared="upright", shrink=1):
    """Noise of 90 x 120 with a red rectangle for each object, in files of a layout: the boxes are
    right if what is read is upright.  declared: the size in the annotations, "stored", "none" or
    "upright"; shrink: of the image after it was annotated."""
    rng, boxes = np.random.default_rng(0), []
    (folder / "JPEGImages").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(number):
        pixels = rng.integers(0, 128, (120, 90, 3), dtype=np.uint8)
        x, y = rng.integers(0, 50, 2).tolist()
        pixels[y:y + 40, x:x + 30] = 255, 0, 0
        image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, UPRIGHT[orientation])))
        image = image.resize([side // shrink for side in image.size])
        image.save(folder / "JPEGImages" / f"{i:04}.{extension}", exif=exif, quality=95)
        boxes.append((x, y, x + 30, y + 40))
    size = {"upright": (90, 120), "stored": (120, 90), "none": (-1, -1)}[declared]
    if layout == "coco":
        content = dict(categories=[dict(id=1, name="red")], annotations=[
            dict(id=i, image_id=i, category_id=1, bbox=[x1, y1, x2 - x1, y2 - y1])
            for i, (x1, y1, x2, y2) in enumerate(boxes)],
            images=[dict(id=i, file_name=f"{i:04}.{extension}", width=size[0], height=size[1])
                    for i in range(number)])
        (folder / "a.json").write_text(json.dumps(content))
        return "coco", str(folder), ["a.json:JPEGImages"]
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        xml = XML.format(OBJECT.format("red", 0, x1 + 1, y1 + 1, x2, y2))
        xml = xml.replace("<width>80<", f"<width>{size[0]}<")
        xml = xml.replace("<height>60<", f"<height>{size[1]}<")
        (folder / "Annotations" / f"{i:04}.xml").write_text(xml)
    (folder / "ImageSets" / "Main" / "all.txt").write_text(
        "".join(f"{i:04}\n" for i in range(number)))
    return "voc", str(folder), ["all"]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def error(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        Annotated(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shares(data):
    """The share of each annotated box that is red, in the pixels read."""
    found = []
    for i in range(len(data)):
        image, truth = data[i]
        for x1, y1, x2, y2 in truth["boxes"].int().tolist():
            red, green, _ = image[:, y1:y2, x1:x2].int()
            found.append((red - green > 100).float().mean().item())
    return found
