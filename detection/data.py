"""Images with annotated boxes: the built-in scenes, and folders in PASCAL VOC's or COCO's layout.

An item of a data set is an image (3, H, W) uint8 and a dict: boxes (n, 4), x1 y1 x2 y2 in the
image's pixels; labels (n,), from 0; ignore (n,) bool; and, but for the scenes, area (n,) in
pixels^2.  Whatever is wrong with a folder is an InputError that names the file, before training
wherever it can be known before.
"""
import json
import math
import os
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import horizontal_flip_bounding_boxes
from torchvision.tv_tensors import BoundingBoxFormat

from common import InputError, rank
from plumbing.images import ImageFiles

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()
# What the papers train and test on (DUPR, 4.1.1 and 4.2.1)
TRAIN_SPLITS = {"voc": ["2007/trainval", "2012/trainval"], "coco": ["train2017"]}
TEST_SPLITS = {"voc": ["2007/test"], "coco": ["val2017"]}


class LabelledScenes(Dataset):
    """``n`` of the built-in scenes with their boxes.

    The seeds of training (1) and test (2) scenes differ from each other and from pre-training's.
    """

    def __init__(self, n, seed):
        from scenes import CLASSES, Scenes
        self.scenes, self.classes = Scenes(n, size=96, seed=seed, cache=True), [*CLASSES]

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        image, boxes, labels = self.scenes.labelled(index)
        return image, dict(boxes=boxes, labels=labels, ignore=torch.zeros_like(labels).bool())


class Object(NamedTuple):
    """An annotated object."""
    name: str  # of its class
    box: tuple  # x1 y1 x2 y2 in pixels
    ignore: bool  # VOC's `difficult`, COCO's `iscrowd`
    area: float  # in pixels^2; COCO's is of the segment


class AnnotatedFile(NamedTuple):
    """An image file and its annotation."""
    path: str
    size: tuple | None  # width and height as annotated, None if unknown
    source: str  # where the annotation stands, for messages
    objects: list  # of Object


def read_voc(root, split):
    """A split in PASCAL VOC's layout -> its classes, and a list of AnnotatedFile.

    split: YEAR/NAME, the list NAME of root/VOCdevkit/VOCYEAR, of VOC's 20 classes; or NAME, the
    list of that name of root itself, of the classes that occur in it.
    Raises InputError: no such split, a file that is missing or holds no annotation.
    """
    year, _, name = split.rpartition("/")
    folder = os.path.join(root, "VOCdevkit", f"VOC{year}") if year else root
    try:
        with open(os.path.join(folder, "ImageSets", "Main", f"{name}.txt")) as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError:
        raise InputError(f"no split {split}: no ImageSets/Main/{name}.txt in {folder} (VOC's own "
                         "are YEAR/NAME, 2007/trainval; those of your folder NAME)") from None
    endings = [ending for lower in IMG_EXTENSIONS for ending in (lower, lower.upper())]
    files = []
    for name in names:
        stem = os.path.join(folder, "JPEGImages", name)
        path = next((stem + end for end in endings if os.path.isfile(stem + end)), stem + ".jpg")
        source = os.path.join(folder, "Annotations", f"{name}.xml")
        # no size: the one that VOC's files declare is wrong now and then
        files.append(AnnotatedFile(path, None, source, _voc_objects(source)))
    found = sorted({thing.name for file in files for thing in file.objects})
    return VOC_CLASSES if year else found, files


def _voc_objects(path):
    objects = []
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it holds <{root.tag}>")
        for element in root.iterfind("object"):
            x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax"))
            # Paper silent: a box has no area if xmax is not above xmin, or ymax not above ymin
            if x2 <= x1 or y2 <= y1:
                x2, y2 = x1 - 1, y1 - 1
            box = x1 - 1, y1 - 1, x2, y2  # VOC counts pixels from 1, and includes both ends
            ignore = element.findtext("difficult", "0").strip() == "1"
            objects.append(Object(element.findtext("name").strip(), box, ignore,
                                  (x2 - x1 + 1) * (y2 - y1 + 1)))
    except OSError:
        raise InputError(f"no such file: {path}") from None
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a VOC annotation: {error}") from None
    return objects


def read_coco(root, split):
    """A split in COCO's layout -> its classes, by category id, and a list of AnnotatedFile.

    split: NAME, images in root/NAME, annotations in root/annotations/instances_NAME.json; or
    FILE.json:FOLDER, both in root.
    Raises InputError: no such file, one that does not parse, an annotation of no known image or
    category or without a box.
    """
    name, _, folder = split.partition(":")
    if not folder:
        name, folder = f"annotations/instances_{split}.json", split
    path, files, annotation = os.path.join(root, name), {}, None
    try:
        with open(path) as file:
            content = json.load(file)
        for image in content["images"]:
            size = (int(image["width"]), int(image["height"])) if image.get("width") else None
            if image["id"] in files:
                raise ValueError(f"two images have the id {image['id']}")
            files[image["id"]] = AnnotatedFile(os.path.join(root, folder, image["file_name"]), size,
                                               f"{path}, {image['file_name']}", [])
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        classes = [categories[i] for i in sorted(categories)]
        for annotation in content["annotations"]:
            x, y, w, h = map(float, annotation["bbox"])
            files[annotation["image_id"]].objects.append(Object(
                categories[annotation["category_id"]], (x, y, x + w, y + h),
                bool(annotation.get("iscrowd")), float(annotation.get("area", w * h))))
    except OSError:
        raise InputError(f"no such file: {path} (a split: NAME or FILE.json:FOLDER)") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a COCO instances file: {error!r}" + (
            f" in the annotation {json.dumps(annotation)[:200]}" if annotation else "")) from None
    return classes, [*files.values()]


def clip_box(box, size, source):
    """A box x1 y1 x2 y2 cut to its image of ``size`` (width, height), or None if no area is left.

    Raises InputError if it is not finite, or lies outside the image by more than a pixel.
    """
    x1, y1, x2, y2 = box
    text = " ".join(f"{side:g}" for side in box)
    if not math.isfinite(sum(box)):
        raise InputError(f"{source}: the box {text} is not finite")
    clipped = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    shorter, left = (min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (box, clipped))
    if shorter >= 0.01 and left < -1:
        raise InputError(f"{source}: the box {text} lies outside the image of {size[0]} x {size[1]}"
                         " pixels")
    # Paper silent: a side of less than 0.01 pixels is no area
    return clipped if min(shorter, left) >= 0.01 else None


class Annotated(ImageFiles):
    """Splits of a folder in VOC's or COCO's layout (``dataset``: voc or coco), one after the other.

    classes: those that may occur; by default the splits' own.  fraction: the share of the images
    to draw by ``seed``; a smaller share is part of a larger one.  training: `difficult` objects
    count as any other, boxes end at their image's border, and the next image takes the place of one
    that cannot be decoded; in a test that is an error.  Prints once which boxes were left out.
    Raises InputError: whatever is wrong with a file, with its name.
    """

    def __init__(self, dataset, root, splits, classes=None, training=False, fraction=1, seed=0):
        read = {"voc": read_voc, "coco": read_coco}[dataset]
        parts = [read(root, split) for split in splits]
        self.classes = classes or list(dict.fromkeys(name for part in parts for name in part[0]))
        self.training = training
        files = [file for part in parts for file in part[1]]
        order = np.random.default_rng(seed).permutation(len(files))
        files = [files[i] for i in sorted(order[:round(fraction * len(files))])]
        if not files or not self.classes:
            raise InputError(f"no {'classes' if files else 'images'} in {' '.join(splits)} of "
                             f"{root} (--fraction {fraction} of {len(order)} images)")
        super().__init__([file.path for file in files])

        # Differs: detectron2 leaves out images without boxes; here they train too
        rows, self.ends, flat, outside = [], [0], [], []
        for file in files:
            size = self._size(file)
            for name, box, ignore, area in file.objects:
                if name not in self.classes:
                    raise InputError(f"{file.source}: unknown class {name!r}, not one of --classes "
                                     f"{' '.join(self.classes)}")
                clipped = clip_box(box, size, file.source)
                if clipped is None:
                    flat.append(file.source)
                    continue
                if max(abs(a - b) for a, b in zip(box, clipped)) > 1:  # less is rounding
                    outside.append(file.source)
                # Paper silent: VOC's `difficult` objects train, as in detectron2; COCO's crowds do
                # not.  In the test COCO's rule takes `difficult` objects for crowds, within which
                # no detection is wrong; VOC07's rule is stricter.
                ignore = ignore and not (training and dataset == "voc")
                # Paper silent: in training, boxes that reach outside their image are cut to it
                rows.append((*(clipped if training else box), area, self.classes.index(name),
                             ignore))
            self.ends.append(len(rows))  # image i has the rows from ends[i] to ends[i + 1]
        self.rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)
        for sources, what in ((flat, "without area left out"),
                              (outside, "reach outside the image")):
            if sources and rank() == 0:
                print(f"{' '.join(splits)}: {len(sources)} boxes {what}, such as in "
                      f"{os.path.basename(sources[0])}", flush=True)

    def _size(self, file):
        """Width and height, from the header of the image file: a wrong one shows before training.
        Infinite if a training image cannot be decoded: it is replaced when its turn comes."""
        try:
            with Image.open(file.path) as image:
                size = image.size
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
            if self.training and not isinstance(error, FileNotFoundError):
                return math.inf, math.inf
            raise InputError(f"{file.source}: cannot decode {file.path}: {error}") from None
        if file.size not in (None, size):
            raise InputError(f"{file.source}: declared as {file.size[0]} x {file.size[1]} pixels, "
                             f"but {file.path} has {size[0]} x {size[1]}")
        return size

    def __getitem__(self, index):
        i, image = self.numbered(index)
        if i != index and not self.training:
            raise InputError(f"cannot decode {self.paths[index]}")
        rows = self.rows[self.ends[i]:self.ends[i + 1]]  # (n, 7)
        return image, dict(boxes=rows[:, :4], area=rows[:, 4], labels=rows[:, 5].long(),
                           ignore=rows[:, 6].bool())


def training_item(item):
    """Flip an item with p 0.5 and leave out what is to be ignored -> the image (3, H, W) uint8, and
    torchvision's dict of targets: boxes (n, 4) float32, labels (n,) from 1, as 0 is background."""
    image, truth = item
    boxes, kept = truth["boxes"].float(), ~truth["ignore"]
    if torch.rand(()) < 0.5:
        boxes = horizontal_flip_bounding_boxes(boxes, BoundingBoxFormat.XYXY, image.shape[-2:])
        image = image.flip(-1)
    return image, dict(boxes=boxes[kept], labels=truth["labels"][kept] + 1)
