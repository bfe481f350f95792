"""Images with annotated boxes: the built-in scenes, and those of the files that formats.py reads.

An item of a data set is an image (3, H, W) uint8 and a dict: boxes (n, 4), x1 y1 x2 y2 in the
image's pixels; labels (n,), from 0; ignore (n,) bool; but for the scenes, area (n,) in pixels^2;
and where they are asked for, masks (n, H, W) bool, and keypoints (n, 17, 3), x y of the pixel and
visibility, 0 if it is not labelled, as COCO's.  Whatever is wrong with a folder is an
InputError that names the file, before training wherever it can be known before.
"""
import json
import math
import os
from collections import Counter, defaultdict

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import horizontal_flip_bounding_boxes
from torchvision.tv_tensors import BoundingBoxFormat

from common import InputError, rank, world_size
from detection.formats import MIRRORED, read_splits
from detection.masks import to_mask
from plumbing.files import ImageFiles, read_size
from plumbing.images import map_numbers


class LabelledScenes(Dataset):
    """``n`` of the built-in scenes with their boxes, and if asked for masks, and keypoints: the
    corners of stars and triangles in the place of nose, shoulders and hips.

    The seeds of training (1), test (2) and validation (3) scenes differ from each other and from
    pre-training's (0).
    """

    def __init__(self, n, seed, masks=False, keypoints=False):
        from scenes import CLASSES, Scenes
        self.scenes, self.classes = Scenes(n, size=96, seed=seed, cache=True), [*CLASSES]
        self.masks, self.keypoints = masks, keypoints

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        image, boxes, labels, masks, corners = self.scenes.labelled(index)
        truth = dict(boxes=boxes, labels=labels, ignore=torch.zeros_like(labels).bool())
        if self.masks:
            truth["masks"] = masks
        if self.keypoints:
            truth["keypoints"] = torch.zeros(len(labels), 17, 3)
            truth["keypoints"][:, [0, 5, 6, 11, 12]] = corners - torch.tensor([0.5, 0.5, 0])
        return image, truth


def check_size(file, size, orientation, exact):
    """Whether an annotation declares another size than its image has, while its boxes may still be
    right.

    size: width and height of the image, turned upright as its EXIF orientation says; exact: whether
    the declared size must be right.
    Raises InputError if the boxes are not of the upright image as it is.
    """
    def holds(size):
        return all(x2 <= size[0] + 1 and y2 <= size[1] + 1
                   for _, (_, _, x2, y2), *_ in file.objects)

    def aspect(size):
        return math.log(size[0] / size[1])

    if math.inf in size:
        return False  # it cannot be decoded
    stored = size[::-1] if orientation >= 5 else size
    before = (not holds(size) and holds(stored) if file.size is None else
              abs(aspect(file.size) - aspect(stored)) < abs(aspect(file.size) - aspect(size)))
    if stored != size and before:
        raise InputError(f"{file.source}: its size or its boxes are of the image as it is stored, "
                         f"{stored[0]} x {stored[1]} pixels, but its EXIF orientation tag turns it "
                         f"to {size[0]} x {size[1]}: remove the tag, or correct the annotation")
    if file.size in (None, size):
        return False
    differ = [abs(a - b) for a, b in zip(file.size, size)]
    if not exact and max(differ) <= 2:
        return False  # rounded
    # turned, or resized, after it was annotated
    if exact or file.size == size[::-1] or not holds(size) or \
            abs(aspect(file.size) - aspect(size)) < 0.005:
        raise InputError(f"{file.source}: declared as {file.size[0]} x {file.size[1]} pixels, but "
                         f"{file.path} has {size[0]} x {size[1]}"
                         + ("" if exact else "; if the boxes are right, delete its <size>"))
    return True


def clip_box(box, size, source):
    """A box x1 y1 x2 y2 cut to its image of ``size`` (width, height), or None if no area is left.

    Raises InputError if it is not finite, or lies outside the image by more than a pixel.
    """
    x1, y1, x2, y2 = box
    clipped = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    shorter, left = (min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (box, clipped))
    outside = shorter >= 0.01 and left < -1
    if outside or not math.isfinite(sum(box)):
        raise InputError(f"{source}: the box {' '.join(f'{side:g}' for side in box)} " + (
            f"lies outside the image of {size[0]} x {size[1]} pixels" if outside else
            "is not finite"))
    # Paper silent: a side of less than 0.01 pixels is no area
    return clipped if min(shorter, left) >= 0.01 else None


class Annotated(ImageFiles):
    """Splits of a folder in VOC's or COCO's layout, as read_splits takes them.

    fraction: the share of the images to draw by ``seed``; a smaller share is part of a larger one.
    training: `difficult` objects count as any other, boxes end at their image's border, images
    without a box to train on are left out unless keep_empty, and the next image takes the place of
    one that cannot be decoded; in a test that is an error.
    masks, keypoints: of COCO: items also have these.  Objects without a segmentation are left out,
    and in training images without a labelled keypoint, with those without a box.
    ``sizes``: width and height of each image.  Prints what there is, and what was left out.
    Raises InputError: as read_splits; a box that is not of its image as it is; no box to train on,
    or none to find in the test.
    """

    def __init__(self, dataset, root, splits, classes=None, training=False, fraction=1, seed=0,
                 keep_empty=False, masks=False, keypoints=False):
        self.classes, files = read_splits(dataset, root, splits, classes, masks, keypoints)
        order = np.random.default_rng(seed).permutation(len(files))
        files = [files[i] for i in sorted(order[:round(fraction * len(files))])]
        if not files:
            raise InputError(f"no images in {' '.join(splits)} (--fraction {fraction} of "
                             f"{len(order)} images)")
        super().__init__([file.path for file in files])
        self.training, self.sizes = training, []
        self.ignored = {"voc": "difficult", "coco": "crowds"}[dataset]

        rows, segments, points, self.ends, odd = [], [], [], [0], defaultdict(list)
        for file in files:
            size, orientation = self._size(file)
            self.sizes.append(size)
            if orientation > 1:
                odd["turned"].append(file.source)
            if check_size(file, size, orientation, exact=dataset == "coco"):
                odd["resized"].append(file.source)
            if len({(thing.name, thing.box) for thing in file.objects}) < len(file.objects):
                odd["repeated"].append(file.source)
            for name, box, ignore, area, segment, keypoint in file.objects:
                if masks and segment is None:
                    odd["unsegmented"].append(file.source)
                    continue
                clipped = clip_box(box, size, file.source)
                if clipped is None:
                    odd["flat"].append(file.source)
                    if box[2] < box[0] or box[3] < box[1]:
                        odd["reversed"].append(file.source)
                    continue
                if max(abs(a - b) for a, b in zip(box, clipped)) > 1:  # less is rounding
                    odd["outside"].append(file.source)
                if clipped[2] < size[0] / 2 and clipped[3] < size[1] / 2:
                    odd["corner"].append(file.source)
                # x y x2 y2 read as x y w h would make all boxes end at x + x2 > 2 x, y + y2 > 2 y
                if dataset == "coco" and box[2] > 2 * box[0] and box[3] > 2 * box[1]:
                    odd["far"].append(file.source)
                # Paper silent: VOC's `difficult` objects train, as in detectron2; COCO's crowds do
                # not.  In the test COCO's rule takes `difficult` objects for crowds, within which
                # no detection is wrong; VOC07's rule is stricter.
                ignore = ignore and not (training and dataset == "voc")
                # Paper silent: in training, boxes that reach outside their image are cut to it
                rows.append((*(clipped if training else box), area, self.classes.index(name),
                             ignore, len(rows)))
                segments.append(segment or b"")
                points.append(keypoint)
            self.ends.append(len(rows))  # image i has the rows from ends[i] to ends[i + 1]
        self.rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8)
        # one block of bytes: workers that read parts of it do not copy it, as they would a list
        self.segments = b"".join(segments) if masks else None
        self.segment_ends = np.cumsum([0, *map(len, segments)])
        self.keypoints = torch.tensor(points).view(-1, 17, 3) if keypoints else None
        self._describe(" ".join(splits), odd)
        if training and not keep_empty:
            self._leave_out_empty(" ".join(splits))
        self.reported.add("turned")

    def _leave_out_empty(self, splits):
        """Leave out the images without a box, or with crowds alone, as detectron2 does
        (DATALOADER.FILTER_EMPTY_ANNOTATIONS, and of keypoints MIN_KEYPOINTS_PER_IMAGE 1), and print
        how many these are."""
        parts = [self.rows[start:end] for start, end in zip(self.ends, self.ends[1:])]
        kept = [i for i, part in enumerate(parts) if (part[:, 6] == 0).any() and (
            self.keypoints is None or (self.keypoints[part[:, 7].long(), :, 2] > 0).any())]
        empty, what = len(parts) - len(kept), "box" if self.keypoints is None else "keypoint"
        if empty and rank() == 0:
            print(f"{splits}: {empty} images without a {what} to train on left out; --keep-empty "
                  "trains on them", flush=True)
        super().__init__([self.paths[i] for i in kept])
        self.sizes = [self.sizes[i] for i in kept]
        self.rows = torch.cat([parts[i] for i in kept])
        self.ends = [0, *np.cumsum([len(parts[i]) for i in kept]).tolist()]

    def _describe(self, splits, odd):
        """Print how many images and boxes there are, and what is odd about them.

        odd: the sources of the annotations in which something was odd, by what it was.  Raises
        InputError if no box is left, or if the boxes seem to be of another format.
        """
        number = Counter({what: len(sources) for what, sources in odd.items()})
        crowds = int(self.rows[:, 6].sum())
        boxes = len(self.rows) + number["flat"] + number["unsegmented"]
        counts = ", ".join(f"{n} {what}" for n, what in (
            (crowds, self.ignored), (number["flat"], "without area"),
            (number["unsegmented"], "without a mask")) if n)
        counts = f"{boxes} boxes" + (f": {counts}" if counts else "")
        wrong = None
        if number["reversed"] > max(2, boxes / 20):
            wrong = f"such as in {odd['reversed'][0]}: do xmax and ymax hold width and height?"
        elif number["flat"] > max(10, boxes / 2):
            wrong = f"such as in {odd['flat'][0]}"
        elif number["far"] == len(self.rows) >= 10 and number["outside"] > boxes / 10:
            wrong = (f"{number['outside']} reach outside their image, such as in "
                     f"{odd['outside'][0]}: do width and height hold the far corner?")
        elif number["resized"] > max(10, len(self) / 2):
            wrong = (f"{number['resized']} files declare another size than their image has, such "
                     f"as {odd['resized'][0]}: if the boxes are right, delete their <size>")
        elif crowds == len(self.rows):
            wrong = "no box is left to " + ("train on" if self.training else "be found")
        if wrong:
            raise InputError(f"{splits}: {len(self)} images, {counts}; {wrong}")

        empty = sum(start == end for start, end in zip(self.ends, self.ends[1:]))
        kept = self.rows[self.rows[:, 6] == 0, 5].long().bincount(minlength=len(self.classes))
        lines = [f"{len(self)} images" + (f", {empty} of them without a box" if empty else "")
                 + f"; {counts}",
                 "boxes " + ", ".join(f"{n} {c}" for n, c in zip(kept.tolist(), self.classes))]
        lines += [f"{number[what]} {text}, such as in {os.path.basename(odd[what][0])}"
                  for what, text in (
                      ("turned", "images turned upright, as their EXIF orientation says"),
                      ("flat", "boxes without area left out"),
                      ("unsegmented", "boxes without a mask left out"),
                      ("outside", "boxes reach outside the image"),
                      ("repeated", "images have a box twice"),
                      ("resized", "files declare another size than their image has (was it "
                       "resized after it was annotated?)")) if number[what]]
        if not kept.all() and self.training:
            missing = [c for n, c in zip(kept.tolist(), self.classes) if not n]
            lines.append(f"warning: no box of {', '.join(missing)} to train on")
        if number["corner"] > 0.95 * len(self.rows) and len(self.rows) >= 10:
            lines.append(f"warning: {number['corner']} boxes lie in the upper left quarter of "
                         "their images: are they in percent, or of smaller images?")
        for line in lines if rank() == 0 else ():
            print(f"{splits}: {line}", flush=True)

    def _size(self, file):
        """Width, height and EXIF orientation, from the header of the image file: a wrong one shows
        before training.  Infinite if a training image cannot be decoded: it is replaced when its
        turn comes."""
        try:
            return read_size(file.path)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
            if self.training and not isinstance(error, FileNotFoundError):
                return (math.inf, math.inf), 1
            raise InputError(f"{file.source}: cannot decode {file.path}: {error}") from None

    def __getitem__(self, index):
        i, image = self.numbered(index)
        if i != index and not self.training:
            raise InputError(f"cannot decode {self.paths[index]}: {self.reason(index)}")
        if self.sizes[i] not in (image.shape[:0:-1], (math.inf, math.inf)):
            raise InputError(f"{self.paths[i]} has no longer the {self.sizes[i][0]} x "
                             f"{self.sizes[i][1]} pixels that it had at the start")
        return image, self._truth(i, *image.shape[1:])

    def _truth(self, i, height, width):
        """The dict of image i, of height x width pixels.  Raises InputError for a wrong mask."""
        rows = self.rows[self.ends[i]:self.ends[i + 1]]  # (n, 8)
        truth = dict(boxes=rows[:, :4], area=rows[:, 4], labels=rows[:, 5].long(),
                     ignore=rows[:, 6].bool())
        if self.segments is not None:
            masks = [self._mask(number, self.paths[i], height, width)
                     for number in rows[:, 7].long().tolist()]
            truth["masks"] = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        if self.keypoints is not None:
            truth["keypoints"] = self.keypoints[rows[:, 7].long()]
        return truth

    def _mask(self, number, path, height, width):
        """The mask (H, W) bool of the annotation with that number, of the image at the path.
        Raises InputError."""
        start, end = self.segment_ends[number:number + 2]
        name, segmentation = json.loads(self.segments[start:end])
        try:
            return to_mask(segmentation, height, width)
        except InputError as error:
            raise InputError(f"{path}, annotation {name}: {error}") from None

    def decode(self, workers, say):
        """Decode each image and its masks once, and drop them.  The processes share the work.
        Raises InputError if one cannot be decoded: in a test, that shows before the training
        instead of after it."""
        for _ in map_numbers(self._decode, range(rank(), len(self), world_size()), workers):
            pass
        self.report(say, "the test needs it", tolerated=0)

    def _decode(self, index):
        if not self.broken[index]:
            i, image = self.numbered(index)
            self._truth(i, *image.shape[1:])
        return 0


def training_item(item):
    """Flip an item with p 0.5 and leave out what is to be ignored -> the image (3, H, W) uint8, and
    torchvision's dict of targets: boxes (n, 4) float32, labels (n,) from 1, as 0 is background;
    and, if the item has these, bitmasks (n, H, W) bool, and keypoints (n, 17, 3), x y now in the
    pixel's middle (detectron2, data/datasets/coco.py), left and right exchanged by a flip."""
    image, truth = item
    boxes, kept, flipped = truth["boxes"].float(), ~truth["ignore"], torch.rand(()) < 0.5
    if flipped:
        boxes = horizontal_flip_bounding_boxes(boxes, BoundingBoxFormat.XYXY, image.shape[-2:])
        image = image.flip(-1)
    target = dict(boxes=boxes[kept], labels=truth["labels"][kept] + 1)
    if "masks" in truth:
        masks = truth["masks"][kept]
        target["bitmasks"] = masks.flip(-1) if flipped else masks
    if "keypoints" in truth:
        x, y, visible = truth["keypoints"][kept].float().unbind(-1)  # (n, 17) each
        x = image.shape[-1] - (x + 0.5) if flipped else x + 0.5
        keypoints = torch.stack([x, y + 0.5, visible], dim=-1)
        target["keypoints"] = keypoints[:, MIRRORED] if flipped else keypoints
    return image, target
