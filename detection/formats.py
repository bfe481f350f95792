"""The annotation files of folders in PASCAL VOC's or COCO's layout: classes, images, objects.

Boxes are x1 y1 x2 y2 in pixels of the upright image, from 0.  Whatever is wrong with a file is an
InputError that names it; what an annotation says that its image does not, detection/data.py finds.
"""
import codecs
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from common import InputError, rank
from plumbing.files import EXTENSIONS, list_images

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()
# What the papers train and test on (DUPR, 4.1.1 and 4.2.1)
TRAIN_SPLITS = {"voc": ["2007/trainval", "2012/trainval"], "coco": ["train2017"]}
TEST_SPLITS = {"voc": ["2007/test"], "coco": ["val2017"]}
# COCO's, of a person; in a mirrored image left and right are exchanged
KEYPOINTS = ["nose", *(f"{side}_{part}" for part in "eye ear shoulder elbow wrist hip knee "
                       "ankle".split() for side in ("left", "right"))]
MIRRORED = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]


class Object(NamedTuple):
    """An annotated object."""
    name: str  # of its class
    box: tuple  # x1 y1 x2 y2 in pixels
    ignore: bool  # VOC's `difficult`, COCO's `iscrowd`
    area: float  # in pixels^2; COCO's is of the segment
    segment: bytes | None = None  # COCO's id and segmentation as JSON, if masks are read: a list
    #                               of numbers takes several times the memory
    keypoints: list | None = None  # x y visibility of each of the 17 in turn, if these are read


class AnnotatedFile(NamedTuple):
    """An image file and its annotation."""
    path: str
    size: tuple | None  # width and height as annotated, None if unknown
    source: str  # where the annotation stands, for messages
    objects: list  # of Object


def _only_once(values, what):
    """Raises InputError, ``what`` and the value, if one of the values occurs twice."""
    for value, number in Counter(values).most_common(1):
        if number > 1:
            raise InputError(f"{what} {value!r}")


def _flag(value):
    """VOC's `difficult` or COCO's `iscrowd`, in its usual spellings -> bool."""
    text = str(value).strip().lower().removesuffix(".0")
    if text not in ("0", "1", "false", "true", "no", "yes", "", "none", "unspecified"):
        raise ValueError(f"{value!r} is no flag, such as 0 or 1")
    return text in ("1", "true", "yes")


def _declared(width, height):
    """An image's declared width and height, None if unknown: some tools write nothing, 0 or -1."""
    try:
        size = int(float(width)), int(float(height))
    except (OverflowError, TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def read_voc(root, split):
    """A split in PASCAL VOC's layout -> its classes, and a list of AnnotatedFile.

    split: YEAR/NAME, the list NAME of root/VOCdevkit/VOCYEAR, of VOC's 20 classes; or NAME, the
    list of that name of root itself, of the classes that occur in it.
    Raises InputError: no such split, a file that is missing or holds no annotation, or more than
    one image that an annotation may be of.
    """
    year, _, name = split.rpartition("/")
    folder = os.path.join(root, "VOCdevkit", f"VOC{year}") if year else root
    path, pictures = os.path.join(folder, f"ImageSets/Main/{name}.txt"), f"{folder}/JPEGImages"
    try:
        names = _lines(Path(path).read_bytes())
    except OSError:
        raise InputError(f"no split {split}: no ImageSets/Main/{name}.txt in {folder} (VOC's own "
                         "are YEAR/NAME, 2007/trainval; those of your folder NAME)") from None
    _only_once(names, f"{path}: two lines are")
    images, files, others = {}, [], []
    for image in list_images(pictures)[0]:
        images.setdefault(os.path.splitext(image[len(pictures) + 1:])[0], []).append(image)
    for name in names:
        source = os.path.join(folder, "Annotations", f"{name}.xml")
        if not os.path.isfile(source):
            stem, extension = os.path.splitext(name)
            if extension.lower() in (*EXTENSIONS, ".xml"):  # a list of files
                name, source = stem, os.path.join(folder, "Annotations", f"{stem}.xml")
            elif len(name.split()) > 1:
                raise InputError(f"{path}: no image has the name {name!r}; a split is a list of "
                                 "names alone, while VOC's lists of one class have two columns")
        written, size, objects = _read_xml(source)
        written = os.path.join(pictures, os.path.dirname(name), written)
        found = images.get(name) or [written if os.path.isfile(written) else
                                     os.path.join(pictures, f"{name}.jpg")]
        if len(found) > 1 and written not in found:
            raise InputError(f"{source}: is it of {' or of '.join(found)}? Its <filename> must say")
        if written not in found and os.path.isfile(written):
            others.append(source)
        image = written if written in found else found[0]
        files.append(AnnotatedFile(os.path.normpath(image), size, source, objects))
    if others and rank() == 0:
        print(f"warning: {len(others)} annotations have another image's <filename>, such as "
              f"{others[0]}; the image that is called as the annotation is taken", flush=True)
    classes = sorted({thing.name for file in files for thing in file.objects})
    return VOC_CLASSES if year else classes, files


def _lines(content):
    """The lines of a text file (bytes) but the empty ones, without blanks around them."""
    utf_16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell writes
    try:
        text = content.decode("utf-16" if utf_16 else "utf-16-le" if b"\0" in content else
                              "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return [line.strip() for line in re.split("[\r\n]", text) if line.strip()]


def _text(element, path, default=None):
    """The text of the one element at a path such as bndbox/xmin.  Raises ValueError if there are
    more, or, without a default, none."""
    found = element.findall(path)
    if len(found) > 1 or not found and default is None:
        raise ValueError(f"{len(found) or 'no'} <{path}> in an <{element.tag}>")
    return (found[0].text or "").strip() if found else default


def _read_xml(path):
    """A VOC annotation -> the name of its image file, its declared size, a list of Object."""
    objects = []
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it holds <{root.tag}>")
        written = _text(root, "filename", "").replace("\\", "/").rpartition("/")[2]
        size = _declared(_text(root, "size/width", ""), _text(root, "size/height", ""))
        elements = root.findall("object")
        if len(elements) < sum(element.tag.lower() == "object" for element in root.iter()):
            raise ValueError("an <object> is not directly in the <annotation>")
        for element in elements:
            x1, y1, x2, y2 = (float(_text(element, f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax"))
            # Paper silent: a box has no area if xmax is not above xmin, or ymax not above ymin
            x2, y2 = x2 if x2 > x1 else x2 - 1, y2 if y2 > y1 else y2 - 1
            box = x1 - 1, y1 - 1, x2, y2  # VOC counts pixels from 1, and includes both ends
            objects.append(Object(_text(element, "name"), box,
                                  _flag(_text(element, "difficult", "0")),
                                  (x2 - x1 + 1) * (y2 - y1 + 1)))
            _refuse_rotated(_text(element, "attributes/attribute[name='rotation']/value", "0"))
            if not objects[-1].name:
                raise ValueError("the <name> of an <object> is empty")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ElementTree.ParseError, LookupError, OverflowError, ValueError) as error:
        raise InputError(f"{path} is not a VOC annotation: {error}") from None
    return written, size, objects


def read_coco(root, split, masks=False, keypoints=False):
    """A split in COCO's layout -> its classes, by category id, and a list of AnnotatedFile.

    split: NAME, images in root/NAME, annotations in root/annotations/instances_NAME.json, or with
    keypoints person_keypoints_NAME.json; or FILE.json:FOLDER, both in root.  masks, keypoints:
    whether these are read.
    Raises InputError: no such file, one that does not parse, an annotation of no known image or
    category or without a box, ids or names that occur twice; what cannot be a segmentation; other
    keypoints than a person's.
    """
    name, _, folder = split.partition(":")
    if not folder:
        kind = "person_keypoints" if keypoints else "instances"
        name, folder = f"annotations/{kind}_{split}.json", split
    path, files, names, entry = os.path.join(root, name), {}, {}, None
    try:
        with open(path, "rb") as file:  # json finds out which encoding it is
            content = json.load(file, object_pairs_hook=_json_object)
        images, categories = content["images"], content["categories"]
        annotations = content["annotations"]
        for entries, what in ((images, "images"), (categories, "categories"),
                              (annotations, "annotations")):
            _only_once([e["id"] for e in entries if "id" in e], f"two {what} have the id")
        for entry in images:
            name = entry["file_name"].replace("\\", "/")
            files[entry["id"]] = AnnotatedFile(
                os.path.normpath(os.path.join(root, folder, name)),
                _declared(entry.get("width"), entry.get("height")), f"{path}, {name}", [])
        for entry in categories:
            names[entry["id"]] = _category(entry, keypoints)
        for entry in annotations:
            image, category = entry["image_id"], entry["category_id"]
            if image not in files or category not in names:
                raise ValueError(f"no image has the id {image!r}" if image not in files else
                                 f"no category has the id {category!r}")
            files[image].objects.append(_coco_object(entry, names[category], files[image].size,
                                                     masks, keypoints))
        entry = None
        used = {e["category_id"] for e in annotations}
        # Roboflow's file may hold a category that only groups others, with the name of one of them
        groups = {e.get("supercategory") for e in categories} & {names[i] for i in used}
        classes = [names[i] for i in sorted(names) if i in used or names[i] not in groups]
    except FileNotFoundError:
        raise InputError(f"no such file: {path} (a split: NAME or FILE.json:FOLDER)") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is not a COCO instances file: {why}" + (
            f" in {json.dumps(entry)[:200]}" if entry else "")) from None
    _only_once([file.path for file in files.values()], f"{path}: two images are")
    _only_once(classes, f"{path}: two categories have the name")
    return classes, [*files.values()]


def _category(entry, keypoints):
    """A category's name.  Raises ValueError: none, or, if keypoints are read, others than COCO's.
    """
    name = "" if entry["name"] is None else str(entry["name"]).strip()
    if not name:
        raise ValueError("a category without a name")
    if keypoints and entry.get("keypoints") != KEYPOINTS:
        raise ValueError(f"{name} has not COCO's 17 keypoints, nose to right_ankle")
    return name


def _coco_object(entry, name, size, masks, keypoints):
    """An annotation of an object of the class ``name``, in an image of that declared size, or None
    -> Object.  Raises ValueError and others for what can be no annotation."""
    box = [0] * 4 if entry["bbox"] in (None, []) else entry["bbox"]  # of an empty mask
    if not isinstance(box, list):
        raise ValueError("its bbox is no list")
    x, y, w, h = map(float, box)
    if isinstance(entry.get("attributes"), dict):
        _refuse_rotated(entry["attributes"].get("rotation", 0))  # CVAT's
    return Object(name, (x, y, x + w, y + h), _flag(entry.get("iscrowd")),
                  _area(entry.get("area"), w * h),
                  _segment(entry, (x, y, w, h), size) if masks else None,
                  _keypoints(entry) if keypoints else None)


def _segment(entry, box, size):
    """The id and the segmentation of an annotation as JSON, without polygons of fewer than 3
    points; None if it has no other, as detectron2 (data/datasets/coco.py).  box: x y w h; size:
    declared width and height of the image, or None.  Raises ValueError for what can be no
    segmentation of the box; the rest shows when it is drawn."""
    segmentation, name = entry.get("segmentation"), entry.get("id")
    if isinstance(segmentation, list):
        if any(not isinstance(polygon, list) or len(polygon) % 2 or
               any(not isinstance(v, (int, float)) for v in polygon) for polygon in segmentation):
            raise ValueError(f"annotation {name}: a polygon is no list of x1 y1 x2 y2 ...")
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
        for axis in range(2) if segmentation else ():
            start, extent = box[axis::2]
            along = [v for polygon in segmentation for v in polygon[axis::2]]
            if extent > 0 and (max(along) < start - 1 or min(along) > start + extent + 1):
                raise ValueError(f"annotation {name}: its polygons lie outside its bbox")
    elif segmentation:
        if not (isinstance(segmentation, dict) and {"size", "counts"} <= {*segmentation}):
            raise ValueError(f"annotation {name}: its segmentation is neither polygons nor runs")
        if size and segmentation["size"] != [*size[::-1]]:
            raise ValueError(f"annotation {name}: runs of size {segmentation['size']}, expected "
                             f"[height, width] {[*size[::-1]]}")
    return json.dumps([name, segmentation]).encode() if segmentation else None


def _keypoints(entry):
    """The 51 numbers of an annotation's keypoints, 0 if it has none.  Raises ValueError for others.
    """
    values = [*map(float, entry.get("keypoints") or [0] * 51)]
    if len(values) != 51 or not all(map(math.isfinite, values)):
        raise ValueError(f"annotation {entry.get('id')}: its keypoints are not 17 x y visibility")
    return values


def _json_object(pairs):
    """A dict of JSON's key-value pairs.  Raises ValueError if a key occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"one of the keys {' '.join(found)} occurs twice in one object")
    return found


def _refuse_rotated(degrees):
    """Raises ValueError if a box is turned: it is then not the one around its object."""
    try:
        degrees = float(degrees)
    except (TypeError, ValueError):  # an attribute of that name, but not CVAT's own
        return
    if degrees % 360:
        raise ValueError(f"a box is rotated, by {degrees:g} degrees")


def _area(value, default):
    """An annotation's `area` in pixels^2, or the default if it has none that is a number."""
    try:
        return float(value) if 0 <= float(value) < math.inf else default
    except (TypeError, ValueError):
        return default


def read_splits(dataset, root, splits, classes=None, masks=False, keypoints=False):
    """Splits in VOC's or COCO's layout (``dataset``: voc or coco), one after the other -> the
    classes that may occur (by default the splits' own), and a list of AnnotatedFile.

    masks, keypoints: whether COCO's are read; VOC's files have none.
    Raises InputError: whatever is wrong with a file, with its name; no image, or one that occurs
    twice; boxes that are fractions of their image.
    """
    parts = [read_voc(root, split) if dataset == "voc" else
             read_coco(root, split, masks, keypoints) for split in splits]
    files = [file for part in parts for file in part[1]]
    classes = classes or list(dict.fromkeys(name for part in parts for name in part[0]))
    if not files or not classes:
        raise InputError(f"no {'classes' if files else 'images'} in {' '.join(splits)} of {root}"
                         + (f": {len(files)} images, 0 boxes" if files else ""))
    _only_once([file.path for file in files], f"{' '.join(splits)}: two annotations are of")
    for split, (_, part) in zip(splits, parts):
        ends = [max(x2, y2) for file in part for _, (x1, y1, x2, y2), *_ in file.objects
                if x2 > x1 and y2 > y1]
        fractions = sum(end <= 1.1 for end in ends)
        if fractions > len(ends) / 2:
            raise InputError(f"{split}: {fractions} of {len(ends)} boxes lie within 0..1: they are "
                             "fractions of their image, but should be in pixels")
    for file in files:
        for thing in file.objects:
            if thing.name not in classes:
                raise InputError(f"{file.source}: unknown class {thing.name!r}, not one of "
                                 f"--classes {' '.join(classes)}")
    return classes, files
