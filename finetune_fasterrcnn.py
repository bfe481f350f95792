"""Fine-tune torchvision's Faster R-CNN from a pre-trained backbone, and measure AP by COCO's rules.

Faster R-CNN (Ren et al., NIPS 2015, arXiv 1506.01497) as MoCo, DetCo and DUPR fine-tune it: `c4`,
with the RPN on Res4 and Res5 as the box head, and one more batch norm after it (MoCo, appendix), or
`fpn`, on a feature pyramid (Lin et al., CVPR 2017, arXiv 1612.03144) with batch norm in it.  All
layers train, and batch norm trains with them: self-supervised features are of another scale than
supervised ones, and frozen statistics would not fit them.  There is no flag to freeze anything.

Read first: one of the methods, for where --weights comes from.

Commands
    python finetune_fasterrcnn.py --weights runs/moco_v2/backbone.pt      built-in scenes
    python finetune_fasterrcnn.py --weights none --out runs/random        what to compare it with
    torchrun --nproc_per_node=8 finetune_fasterrcnn.py --dataset voc --data DIR --weights FILE
    torchrun --nproc_per_node=8 finetune_fasterrcnn.py --dataset coco --data DIR --weights FILE
    python finetune_fasterrcnn.py --eval-only runs/finetune/checkpoint.pt

Splits, for --train-split and --test-split; several are joined
    voc   2007/trainval   the list of that name of DIR/VOCdevkit/VOC2007
          trainval        likewise of DIR, a folder of your own in VOC's layout
    coco  train2017       DIR/annotations/instances_train2017.json, images in DIR/train2017
          my.json:photos  DIR/my.json, images in DIR/photos

Where this differs from the papers, or they are silent
    - On COCO they train Mask R-CNN; this is its box half.
    - Their code is detectron2's.  Unlike there, RoIAlign is not shifted by half a pixel (it is no
      option of torchvision's MultiScaleRoIAlign), box losses are smooth L1, the predictors start at
      torch's default scale, images without boxes train too, a batch mixes wide and tall images, and
      no precise batch norm statistics are computed.
    - --iterations other than the recipe's move the drops in proportion, also --fraction's 12,000.
    - `difficult` objects of VOC train, as in detectron2.  COCO's rules take them for crowds, within
      which no detection is wrong, VOC07's rule is stricter.  COCO's own crowds do not train.
    - A box has no area where VOC's xmax is not above its xmin (or ymax, ymin), or where a side is
      under 0.01 pixels.  One that reaches outside its image is cut to it in training.
    - The report gives Adam's rates and epochs; without decay, warm-up or scaling by default.
    - Batch norm is synchronised over processes on GPUs; on CPUs each process has its own, and the
      evaluation uses the first one's statistics.
    - On GPUs training is in bfloat16, but for boxes and losses; RoIAlign's backward pass adds in no
      fixed order there, so that a resumed run equals an uninterrupted one only nearly.
"""
import argparse
import json
import math
import os
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops._utils import split_normalization_params
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common import (AVERAGED, IMAGENET_MEAN, IMAGENET_STD, InputError, ResNetStages, Run,
                    add_run_arguments, backbone_stages, check, gathered, launch, load_backbone,
                    load_batches, load_checkpoint, mixed_precision, obey_parent, rank, read_or_next,
                    seed_for, steps_per_epoch, world_size)

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()

RECIPES = {  # what --dataset sets.  From MoCo's public detection configurations: batch 16, lr 0.02,
    # drops, VOC's warm-up; detectron2's defaults: COCO's warm-up, decay 1e-4, long side 1333.
    "voc": dict(detector="c4", train_split=["2007/trainval", "2012/trainval"],  # DUPR, 4.1.1
                test_split=["2007/test"], min_size=[*range(480, 801, 32)],  # DUPR, 4.1.1
                iterations=24000, drops=[18000, 22000], warmup=100),  # DUPR, 4.1.1
    "coco": dict(detector="fpn", train_split=["train2017"], test_split=["val2017"],  # DUPR, 4.2.1
                 min_size=[*range(640, 801, 32)],  # DUPR, 4.2.1
                 iterations=90000, drops=[60000, 80000], warmup=1000),  # DetCo, 4.2
    "scenes": dict(detector="fpn", arch="resnet18", batch_size=8, lr=0.04, min_size=[96],
                   max_size=96, fpn_channels=64, anchor_size=8, rois=64,
                   iterations=400, drops=[300, 360], warmup=40),  # small enough for two CPU cores
}


def parse_args(argv=None):
    """The papers' recipe for the data set by default; without --dataset, a small one."""
    parser = argparse.ArgumentParser(description="Fine-tune Faster R-CNN and measure its AP.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=[*RECIPES], default="scenes", help="or the layout of your own")
    add("--data", help="folder, for voc and coco")
    add("--train-split", nargs="+", help="default: 2007/trainval 2012/trainval, or train2017")
    add("--test-split", nargs="+", help="default: 2007/test, or val2017")
    add("--classes", nargs="+", help="default: VOC's 20; of your own data, what the training "
        "annotations name")
    add("--fraction", type=float, default=1, help="share of the training images: drawn by --seed, "
        "with 12,000 iterations (DetCo, 6.1); of scenes the first ones")
    add("--train-scenes", type=int, default=400, help="number of labelled built-in scenes")
    add("--test-scenes", type=int, default=300, help="number of built-in scenes to measure AP on")
    add = parser.add_argument_group("detector").add_argument
    add("--detector", choices=["c4", "fpn"], help="default: c4 on voc, else fpn")
    add("--weights", default="none", help="file that holds the backbone, or none (default)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet; of a Swin for the FPN")
    add("--min-size", type=int, nargs="+", help="short side in pixels, drawn from these; the last "
        "one for testing")
    add("--max-size", type=int, default=1333, help="long side at most")
    add("--mean", type=float, nargs=3, default=[*IMAGENET_MEAN], metavar="M", help="of red, green "
        "and blue, in 0..1, as in the pre-training (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=[*IMAGENET_STD], metavar="S", help="their deviations")
    add("--fpn-channels", type=int, default=256)
    add("--anchor-size", type=int, default=32, help="side of the smallest anchors; four more sizes "
        "double it")
    add("--rois", type=int, default=512, help="RoIs of an image that the box head trains on; it "
        "tests on twice as many, 1000 at most")
    add("--box-head", choices=["4conv1fc"], help="SoCo's, of the FPN (default: as in --weights, "
        "else two linear layers)")
    add = parser.add_argument_group("recipe").add_argument
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="adam: lr 1e-4 (the report)")
    add("--schedule", choices=["1x", "2x", "report"], help="2x: twice the iterations; report: 40 "
        "epochs, half the lr after 20 (default with adam)")
    add("--iterations", type=int, help="default: 24,000 on voc, 90,000 on coco")
    add("--batch-size", type=int, default=16, help="of all processes together")
    add("--lr", type=float, default=0.02, help="for each 16 images of the batch; adam's: as it is")
    add("--warmup", type=int, help="iterations of linear growth of the lr")
    add("--weight-decay", type=float, default=1e-4)
    add_run_arguments(parser, out="runs/finetune")
    add("--eval-only", metavar="CHECKPOINT", help="measure the AP of this one, with the arguments "
        "that it holds where none are given; --out is eval/ beside it")

    known = parser.parse_known_args(argv)[0]
    recipe = dict(RECIPES[known.dataset])
    recipe["schedule"] = known.schedule or ("report" if known.optimizer == "adam" else "1x")
    if (known.dataset, known.detector) == ("scenes", "c4"):  # Res5 runs on every RoI
        recipe.update(rois=16, min_size=[192], max_size=192)
    if known.optimizer == "adam":
        recipe.update(lr=1e-4, warmup=0, weight_decay=0.0)
    if recipe["schedule"] == "report":
        recipe["iterations"] = None  # 40 epochs, when the number of images is known
    elif recipe["schedule"] == "2x":
        recipe["iterations"] *= 2
    if known.fraction < 1 and known.dataset != "scenes":
        recipe["iterations"] = 12000
    parser.set_defaults(**recipe)
    if known.eval_only:
        with suppress(InputError):  # train says it
            parser.set_defaults(**{**fine_tuned(known.eval_only)["args"], "weights": "none",
                                   "out": os.path.join(os.path.dirname(known.eval_only), "eval")})
    return parser.parse_args(argv)


def fine_tuned(path):
    """The content of a checkpoint of this command.  InputError: it is none."""
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or saved.get("method") != "finetune_fasterrcnn":
        raise InputError(f"{path} is no checkpoint of finetune_fasterrcnn")
    return saved


# -------------------------------------------------------------------------------------------- data
# An item: image (3, H, W) uint8, and a dict: boxes (n, 4) x1 y1 x2 y2 in its pixels, labels (n,)
# from 0, ignore (n,) bool, and, where the data set has its own, area (n,) in pixels^2.


class LabelledScenes(Dataset):
    """The built-in scenes with their boxes; the seeds of training, test and pre-training differ."""

    def __init__(self, n, seed):
        from scenes import CLASSES, Scenes
        self.scenes, self.classes = Scenes(n, size=96, seed=seed, cache=True), [*CLASSES]

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        image, boxes, labels = self.scenes.labelled(index)
        return image, dict(boxes=boxes, labels=labels, ignore=torch.zeros_like(labels).bool())


def read_voc(root, split):
    """A split in PASCAL VOC's layout -> its classes, and a list over images of (path, its width and
    height if they are known, where it is annotated, [(class, (x1, y1, w, h), difficult, area)]).

    VOC counts pixels from 1 and includes both ends: x1 and y1 are lowered by 1 here.
    Raises InputError: no such split, a file that is missing or does not parse.
    """
    year, _, name = split.rpartition("/")
    folder = os.path.join(root, f"VOCdevkit/VOC{year}" if year else "")
    try:
        with open(os.path.join(folder, f"ImageSets/Main/{name}.txt")) as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError:
        raise InputError(f"no split {split}: no ImageSets/Main/{name}.txt in {folder} (VOC's own "
                         "are YEAR/NAME, 2007/trainval; those of your folder NAME)") from None
    ends = [end for lower in IMG_EXTENSIONS for end in (lower, lower.upper())]
    images = []
    for number in names:
        image, path = (os.path.join(folder, *p) for p in (("JPEGImages", number),
                                                          ("Annotations", f"{number}.xml")))
        image = next((image + end for end in ends if os.path.isfile(image + end)), image + ".jpg")
        objects = []
        try:
            annotation = ElementTree.parse(path).getroot()
            if annotation.tag != "annotation":
                raise ValueError(f"it holds <{annotation.tag}>")
            for thing in annotation.iterfind("object"):
                x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}"))
                                  for side in ("xmin", "ymin", "xmax", "ymax"))
                w, h = (x2 - x1 + 1, y2 - y1 + 1) if x2 > x1 and y2 > y1 else (0, 0)
                objects.append((thing.findtext("name").strip(), (x1 - 1, y1 - 1, w, h),
                                thing.findtext("difficult", "0").strip() == "1", w * h))
        except OSError:
            raise InputError(f"no such file: {path}") from None
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a VOC annotation: {error}") from None
        images.append((image, None, path, objects))  # the size in it is wrong now and then
    found = sorted({name for *_, objects in images for name, *_ in objects})
    return VOC_CLASSES if year else found, images


def read_coco(root, split):
    """A split in COCO's layout, as read_voc gives it, with `iscrowd` in place of difficult.

    Raises InputError: no such file, one that does not parse, an annotation of no known image or
    category or without a box.
    """
    name, _, folder = split.partition(":")
    if not folder:
        name, folder = f"annotations/instances_{split}.json", split
    path, images, thing = os.path.join(root, name), {}, None
    try:
        with open(path) as file:
            content = json.load(file)
        for image in content["images"]:
            size = (int(image["width"]), int(image["height"])) if image.get("width") else None
            where = f"{path}, {image['file_name']}"
            if image["id"] in images:
                raise ValueError(f"two images have the id {image['id']}")
            images[image["id"]] = os.path.join(root, folder, image["file_name"]), size, where, []
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        classes = [categories[i] for i in sorted(categories)]
        for thing in content["annotations"]:
            x, y, w, h = map(float, thing["bbox"])
            images[thing["image_id"]][3].append((
                categories[thing["category_id"]], (x, y, w, h), bool(thing.get("iscrowd")),
                float(thing.get("area", w * h))))
    except OSError:
        raise InputError(f"no such file: {path} (a split is train2017 or FILE.json:FOLDER)"
                         ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a COCO instances file: {error!r}" + (
            f" in the annotation {json.dumps(thing)[:200]}" if thing else "")) from None
    return classes, [*images.values()]


def within(box, size, source):
    """A box (x, y, w, h) cut to its image of ``size`` (width, height) -> x1 y1 x2 y2, or None where
    no area is left.  Raises InputError: it is not finite, or lies off the image by over a pixel."""
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        raise InputError(f"{source}: the box {x} {y} {w} {h} is not finite")
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
    if min(w, h) >= 0.01 and min(x2 - x1, y2 - y1) < -1:
        raise InputError(f"{source}: the box {x:g} {y:g} {x + w:g} {y + h:g} lies outside the "
                         f"image of {size[0]} x {size[1]} pixels")
    return (x1, y1, x2, y2) if min(w, h, x2 - x1, y2 - y1) >= 0.01 else None


class Annotated(Dataset):
    """Splits of a folder in VOC's or COCO's layout (``dataset``: voc or coco), one after the other.

    classes: those that may occur; by default the splits' own.  training: `difficult` objects count
    as any other, boxes end at their image's border, and an image that cannot be decoded is
    replaced by the next one, as ImageFiles does; in the test that is an error.  fraction: the share
    of images to draw, of which a smaller one takes a part.  Says, once, which boxes were left out.
    Raises InputError: whatever is wrong with a file, with its name.
    """

    def __init__(self, dataset, root, splits, classes=None, training=False, fraction=1, seed=0):
        read = {"voc": read_voc, "coco": read_coco}[dataset]
        parts = [read(root, split) for split in splits]
        self.classes = classes or list(dict.fromkeys(name for part in parts for name in part[0]))
        images = [image for part in parts for image in part[1]]
        drawn = np.random.default_rng(seed).permutation(len(images))
        images = [images[i] for i in sorted(drawn[:round(fraction * len(images))])]
        if not images or not self.classes:
            raise InputError(f"no {'classes' if images else 'images'} in {' '.join(splits)} of "
                             f"{root} (--fraction {fraction} of {len(drawn)} images)")
        self.training, self.paths = training, [path for path, *_ in images]
        self.broken = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        rows, self.ends, flat, outside = [], [0], [], []
        for path, declared, source, objects in images:
            size = self._size(path, declared, source)
            for name, (x, y, w, h), ignore, area in objects:
                if name not in self.classes:
                    raise InputError(f"{source}: unknown class {name!r}, not one of --classes "
                                     f"{' '.join(self.classes)}")
                box, cut = (x, y, x + w, y + h), within((x, y, w, h), size, source)
                if cut is None:
                    flat.append(source)
                    continue
                if max(abs(a - b) for a, b in zip(box, cut)) > 1:  # less is rounding
                    outside.append(source)
                rows.append((*(cut if training else box), area, self.classes.index(name),
                             ignore and not (training and dataset == "voc")))
            self.ends.append(len(rows))
        self.rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)
        for wrong, what in ((flat, "without area left out"), (outside, "reach outside the image")):
            if wrong and rank() == 0:
                names = [os.path.basename(source) for source in dict.fromkeys(wrong)]
                print(f"{' '.join(splits)}: {len(wrong)} boxes {what} ({', '.join(names[:3])}"
                      f"{', ...' if len(names) > 3 else ''})", flush=True)

    def _size(self, path, declared, source):
        """Width and height, from the file's header: a fault shows before the training starts."""
        try:
            with Image.open(path) as image:
                size = image.size
        except FileNotFoundError:
            raise InputError(f"no such file: {path} (of {source})") from None
        except Exception:
            if not self.training:
                raise InputError(f"cannot decode {path}") from None
            return math.inf, math.inf
        if declared not in (None, size):
            raise InputError(f"{source}: declared as {declared[0]} x {declared[1]} pixels, but "
                             f"{path} has {size[0]} x {size[1]}")
        return size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        i, image = read_or_next(self.paths, self.broken, index)
        if i != index and not self.training:
            raise InputError(f"cannot decode {self.paths[index]}")
        rows = self.rows[self.ends[i]:self.ends[i + 1]]  # (n, 7)
        return image, dict(boxes=rows[:, :4], area=rows[:, 4], labels=rows[:, 5].long(),
                           ignore=rows[:, 6].bool())


def data_sets(args):
    """The training and the test set that the arguments name; no training set for --eval-only."""
    if args.dataset != "scenes" and args.data is None:
        raise InputError(f"--dataset {args.dataset} needs --data, a folder")
    if args.dataset == "scenes" and (args.data or args.train_split or args.test_split):
        raise InputError("--data and its splits need --dataset voc or coco")
    if args.dataset == "scenes":
        n = max(1, round(args.fraction * args.train_scenes))
        return LabelledScenes(n, seed=1), LabelledScenes(args.test_scenes, seed=2)
    train_set = None if args.eval_only else Annotated(
        args.dataset, args.data, args.train_split, args.classes, True, args.fraction, args.seed)
    classes = args.classes or train_set.classes
    return train_set, Annotated(args.dataset, args.data, args.test_split, classes)


def training_item(item):
    """Flip with p 0.5, leave out what is to be ignored -> image, torchvision's dict of targets."""
    (image, truth), boxes = item, item[1]["boxes"].float()
    if torch.rand(()) < 0.5:
        image, width = image.flip(-1), image.shape[-1]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    kept = ~truth["ignore"]
    return image, dict(boxes=boxes[kept], labels=truth["labels"][kept] + 1)  # 0 is the background


# ---------------------------------------------------------------------------------------- detector


class Pyramid(nn.Module):
    """torchvision's BackboneWithFPN, under its names, of stages that come as a list: (B, 3, H, W)
    -> P2..P5 and P6 for the RPN, (B, C, H/s, W/s), s = 4, 8, 16, 32, 64."""

    def __init__(self, stages, channels):
        super().__init__()
        self.body, self.out_channels = stages, channels
        self.fpn = FeaturePyramidNetwork(stages.channels, channels, LastLevelMaxPool(),
                                         nn.BatchNorm2d)

    def forward(self, images):
        return self.fpn(OrderedDict(zip("0123", self.body(images))))


def build_detector(arch, num_classes, detector="fpn", fpn_channels=256, min_size=(800,),
                   max_size=1333, anchor_size=32, rois=512, weights="none", box_head=None,
                   mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """torchvision's Faster R-CNN, "fpn" or "c4", with batch norm, all trainable.

    num_classes: without the background.  weights: a file for load_backbone, or "none"; an FPN and
    a box head that it holds under this detector's names are loaded too.  box_head, of the FPN:
    "4conv1fc" (SoCo's: 4 convolutions with BN, 1 linear layer), or None, as in weights, else 2fc.
    mean, std: of red, green and blue in 0..1.  InputError: c4 of another backbone than a ResNet.
    In training it takes lists of images (3, H, W) float 0..1 and of targets and gives a dict of
    losses; in eval mode a list of dicts boxes, labels (from 1), scores, 100 at most for an image.
    """
    stages = backbone_stages(arch)
    if detector == "c4" and not isinstance(stages, ResNetStages):
        raise InputError(f"--detector c4 is of ResNets, {arch} needs --detector fpn")
    rest = load_backbone(stages, weights) if weights != "none" else {}
    sizes, ratios = tuple(anchor_size * 2 ** i for i in range(5)), (0.5, 1.0, 2.0)
    if detector == "c4":
        *shallow, res5 = stages.named_children()
        backbone = nn.Sequential(OrderedDict(shallow))  # (B, 1024, H / 16, W / 16) in ResNet-50
        backbone.out_channels, width = stages.channels[2:]
        head = nn.Sequential(OrderedDict([  # RoIs (N, 1024, 14, 14) -> (N, 2048, 7, 7) -> mean
            res5, ("norm", nn.BatchNorm2d(width)), ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten())]))
        parts = dict(rpn_anchor_generator=AnchorGenerator((sizes,), (ratios,)), box_head=head,
                     rpn_pre_nms_top_n_train=12000, rpn_pre_nms_top_n_test=6000,  # detectron2's
                     rpn_post_nms_top_n_train=min(2000, 4 * rois),
                     box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0))
    else:
        backbone = Pyramid(stages, fpn_channels)
        width, inputs = 1024, (fpn_channels, 7, 7)
        convolutions = any(name.endswith("roi_heads.box_head.0.0.weight") for name in rest)
        parts = dict(rpn_anchor_generator=AnchorGenerator([(s,) for s in sizes], [ratios] * 5),
                     rpn_post_nms_top_n_train=min(1000, 4 * rois),
                     box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=0))
        if box_head or convolutions:
            parts["box_head"] = FastRCNNConvFCHead(inputs, [fpn_channels] * 4, [width],
                                                   norm_layer=nn.BatchNorm2d)
    model = FasterRCNN(backbone, box_predictor=FastRCNNPredictor(width, num_classes + 1),
                       min_size=tuple(min_size), max_size=max_size, box_batch_size_per_image=rois,
                       rpn_post_nms_top_n_test=min(1000, 2 * rois), image_mean=list(mean),
                       image_std=list(std), **parts)
    for name in ("backbone.fpn.", "roi_heads.box_head.") if detector == "fpn" else ():
        load_part(model.get_submodule(name[:-1]), name, rest, weights)
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(as_float32)  # bfloat16 would round boxes by whole pixels
    return model


def load_part(module, name, rest, path):
    """Load the tensors of ``rest``, by name, that are the detector's part ``name`` under any
    prefix, if there are any.  rest: what load_backbone left of the file ``path``.  InputError: the
    part is another one."""
    prefixes = dict.fromkeys(k[:k.index(name)] + name for k in rest if name in k)
    prefix = min(prefixes, key=lambda p: bool(AVERAGED.search(p)), default=None)  # as the ResNet
    found = {k[len(prefix):]: v for k, v in rest.items() if k.startswith(prefix or name)}
    if found:
        try:
            module.load_state_dict(found)
        except RuntimeError as error:
            raise InputError(f"{path}: {prefix}*: {' '.join(str(error).split())}") from None
        if rank() == 0:
            print(f"{path}: {len(found)} tensors loaded from '{prefix}*'", flush=True)


def as_float32(_module, _inputs, output):
    """Forward hook: the output, however nested, in float32."""
    if torch.is_tensor(output):
        return output.float()
    return type(output)(as_float32(None, None, part) for part in output)


def learning_rate(step, base, warmup, drops, factor=0.1):
    """Linear from base / 1000 during ``warmup`` steps, then times ``factor`` from each drop on."""
    grown = 1 if step >= warmup else 0.001 + 0.999 * step / warmup
    return base * grown * factor ** sum(step >= drop for drop in drops)


# -------------------------------------------------------------------------------------- evaluation

AP_IOUS = np.linspace(0.5, 0.95, 10)  # 0.50:0.05:0.95
AP_RECALLS = np.linspace(0.0, 1.0, 101)
AP_AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, s, m, l
AP_MAX_DETECTIONS = 100  # per image and class


def _ap_arrays(image, extra, name):
    """One image's dict as arrays: boxes (n, 4), labels, its ignore or scores, areas (n,) each."""
    boxes = np.asarray(image["boxes"], dtype=np.float64)
    boxes = boxes if boxes.size else np.zeros((0, 4))
    labels = np.asarray(image["labels"], dtype=np.int64)
    if extra == "ignore":
        values = np.asarray(image.get("ignore", np.zeros(len(labels))), dtype=bool)
    else:
        values = np.asarray(image[extra], dtype=np.float64)
    if labels.ndim != 1 or boxes.shape != (len(labels), 4) or values.shape != labels.shape:
        raise ValueError(f"{name}: want boxes (n, 4), labels (n,), {extra} (n,) of one n, got "
                         f"{boxes.shape}, {labels.shape}, {values.shape}")
    areas = np.asarray(image.get("area", (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)), np.float64)
    if areas.shape != labels.shape:
        raise ValueError(f"{name}: want area (n,), got {areas.shape} for {len(labels)} boxes")
    return boxes, labels, values, areas


def _ap_match(truth, crowd, area, found):
    """Match one image's detections of one class, best score first, to its truths of that class.

    truth (n, 4), crowd (n,) bool, area (n,), found (m, 4). Returns right and wrong, bool
    (4, 10, m), over the 4 area ranges and 10 IoU thresholds (a detection that is neither does not
    count), and the number of truths that count in each area range, (4,).
    """
    truth, crowd, area = truth[::-1], crowd[::-1], area[::-1]  # of equals COCO takes the last
    size = np.minimum(found[:, None, 2:], truth[:, 2:]) - np.maximum(found[:, None, :2],
                                                                     truth[:, :2])
    inter = size.clip(min=0).prod(axis=2)  # (m, n)
    truth_area = (truth[:, 2:] - truth[:, :2]).prod(axis=1)
    found_area = (found[:, 2:] - found[:, :2]).prod(axis=1)
    union = np.where(crowd, found_area[:, None], found_area[:, None] + truth_area - inter)
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)

    low, high = AP_AREAS[:, :1], AP_AREAS[:, 1:]
    ignored = crowd | (area < low) | (area > high)  # (4, n)
    outside = (found_area < low) | (found_area > high)  # (4, m)
    matched = np.zeros((len(AP_AREAS), len(AP_IOUS), len(found)), dtype=bool)
    skipped = np.repeat(outside[:, None], len(AP_IOUS), axis=1)  # right for the unmatched
    free = np.ones((len(AP_AREAS), len(AP_IOUS), len(truth)), dtype=bool)
    for d in np.flatnonzero((iou >= AP_IOUS[0]).any(axis=1)):
        fits = free & (iou[d] >= AP_IOUS[:, None])  # (4, 10, n)
        counted = fits & ~ignored[:, None]  # a truth that counts goes before any ignored one
        fits = np.where(counted.any(axis=2, keepdims=True), counted, fits)
        best = np.where(fits, iou[d], -1).argmax(axis=2)
        a, t = np.nonzero(fits.any(axis=2))
        g = best[a, t]
        matched[a, t, d] = True
        skipped[a, t, d] = ignored[a, g]
        free[a, t, g] = crowd[g]  # a crowd may be matched again
    return matched & ~skipped, ~matched & ~skipped, (~ignored).sum(axis=1)


def _ap_of_class(parts):
    """AP (4, 10) of one class from (scores, right, wrong, count) of each image; nan: no truth."""
    scores, right, wrong, counts = zip(*parts)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")  # ties keep the images' order
    tp = np.concatenate(right, axis=2)[:, :, order].cumsum(axis=2)
    fp = np.concatenate(wrong, axis=2)[:, :, order].cumsum(axis=2)
    precision = tp / (tp + fp + np.spacing(1))
    # Precision at recall r is the best precision at any recall >= r, and 0 past the last one.
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 0), (0, 1)))
    ap = np.full(tp.shape[:2], np.nan)
    for a, count in enumerate(sum(counts)):
        for t in range(len(AP_IOUS) if count else 0):
            at = np.searchsorted(tp[a, t] / count, AP_RECALLS, side="left")
            ap[a, t] = precision[a, t, at].mean()
    return ap


def coco_ap(truths, detections):
    """COCO's box average precision, as pycocotools' COCOeval("bbox") computes it.

    truths: a list over images of dicts: boxes (n, 4), x1 y1 x2 y2 in pixels; labels (n,), any
    integers; and, optional, ignore (n,) bool, COCO's iscrowd: a detection matched to such a box
    is neither right nor wrong, many may match one box, and their IoU with it is intersection
    over the detection's own area; and, optional, area (n,) in pixels^2, by which a truth is small,
    medium or large (COCO's are of the segments; default: the boxes'). detections: a list over the
    same images of dicts: boxes (m, 4), labels (m,), scores (m,); the 100 best of each image and
    class count. Values are arrays, CPU tensors or lists.

    Returns a dict of floats in [0, 1]: AP (mean over IoU 0.50:0.05:0.95 and classes), AP50,
    AP75, APs (area <= 32^2), APm (32^2 to 96^2), APl (>= 96^2), and per_class, label -> AP, for
    every label seen. -1 where no truth counts; such classes are left out of the means.
    Raises ValueError where the lists, or one image's boxes, labels and scores, differ in length.
    Source: Lin et al. 2014 (arXiv:1405.0312), cocodataset.org/#detection-eval; cocoeval.py.
    """
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images of truths, {len(detections)} of detections")
    parts = {}  # label -> a list over images
    for i, (truth, found) in enumerate(zip(truths, detections)):
        truth_boxes, truth_labels, crowd, area = _ap_arrays(truth, "ignore", f"truths[{i}]")
        boxes, labels, scores, _ = _ap_arrays(found, "scores", f"detections[{i}]")
        for label in np.union1d(truth_labels, labels).tolist():
            own = truth_labels == label
            top = np.flatnonzero(labels == label)
            top = top[np.argsort(-scores[top], kind="mergesort")[:AP_MAX_DETECTIONS]]
            match = _ap_match(truth_boxes[own], crowd[own], area[own], boxes[top])
            parts.setdefault(label, []).append((scores[top], *match))

    aps = {label: _ap_of_class(parts[label]) for label in sorted(parts)}
    table = np.array(list(aps.values())).reshape(-1, len(AP_AREAS), len(AP_IOUS))

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    return {"AP": mean(table[:, 0]), "AP50": mean(table[:, 0, 0]), "AP75": mean(table[:, 0, 5]),
            "APs": mean(table[:, 1]), "APm": mean(table[:, 2]), "APl": mean(table[:, 3]),
            "per_class": {label: mean(ap[0]) for label, ap in aps.items()}}


def voc07_ap(truths, detections):
    """VOC2007's average precision, of the same lists as coco_ap's: precision at 11 recalls.

    A detection, best score first, belongs to the truth of its class that it overlaps most, and is
    right if it is the first that reaches the IoU there; one of a truth to ignore does not count.
    Returns a dict of floats in [0, 1], means over the classes with truths: AP50, AP75, and AP over
    IoU 0.50:0.05:0.95, which is detectron2's extension and what the papers publish; -1: no truth.
    Source: Everingham et al. 2010, 4.2; VOCevaldet.m of the development kit.
    """
    truths = [_ap_arrays(t, "ignore", "truth") for t in truths]
    detections = [_ap_arrays(d, "scores", "detection") for d in detections]
    classes = {label for _, labels, ignore, _ in truths for label in labels[~ignore].tolist()}
    table = []  # (classes, 10)
    for label in classes:
        count, ranked = 0, []
        for i, (truth, detected) in enumerate(zip(truths, detections)):
            boxes, ignore = (truth[j][truth[1] == label] for j in (0, 2))
            mine = detected[1] == label
            count += int((~ignore).sum())
            iou = np.zeros((mine.sum(), 1)) if not len(boxes) else box_iou(
                torch.from_numpy(detected[0][mine]), torch.from_numpy(boxes)).numpy()
            for score, row in zip(detected[2][mine], iou):
                best = int(row.argmax())
                ranked.append((score, row[best], (i, best), len(boxes) > 0 and ignore[best]))
        ranked.sort(key=lambda row: -row[0])
        for threshold in AP_IOUS:
            taken, right, wrong = set(), [], []
            for _, iou, truth, ignored in ranked:
                hit = iou >= threshold
                right.append(hit and not ignored and truth not in taken)
                wrong.append(not right[-1] and not (hit and ignored))
                taken |= {truth} if hit else set()
            tp, fp = np.cumsum(right), np.cumsum(wrong)
            precision, recall = tp / np.maximum(tp + fp, 1), tp / count
            table.append([precision[recall >= r].max(initial=0) for r in np.arange(11) / 10])
    if not table:
        return {"AP": -1.0, "AP50": -1.0, "AP75": -1.0}
    ap = np.reshape(table, (len(classes), len(AP_IOUS), 11)).mean(axis=(0, 2))
    return {"AP": float(ap.mean()), "AP50": float(ap[0]), "AP75": float(ap[5])}


@torch.no_grad()
def detect(model, images, device):
    """Images (3, H, W) uint8 -> a list of dicts boxes (n, 4), labels (n,) from 0, scores (n,), on
    the CPU; best first.  One by one: a batch's padding would depend on who shares it."""
    found = [model([image.to(device, non_blocking=True).float() / 255])[0] for image in images]
    return [dict(boxes=f["boxes"].cpu(), labels=f["labels"].cpu() - 1, scores=f["scores"].cpu())
            for f in found]


def evaluate(model, dataset, args, device, run):
    """coco_ap of the whole data set, each process detecting in its share of the images; on VOC also
    voc07_ap, as VOC07."""
    batches = [list(range(start + rank(), min(start + args.batch_size, len(dataset)), world_size()))
               for start in range(0, len(dataset), args.batch_size)]  # as many in every process
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=args.workers,
                        worker_init_fn=obey_parent, pin_memory=device.type == "cuda")
    mine, began = [], time.monotonic()
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)  # the batch statistics that the checkpoint holds
    model.eval()
    for done, (indices, items) in enumerate(zip(batches, loader), 1):
        run.stop_if_asked()
        found = detect(model, [image for image, _ in items], device)
        mine += zip(indices, [truth for _, truth in items], found)
        if done * 10 // len(batches) > (done - 1) * 10 // len(batches):
            left = (len(batches) - done) * (time.monotonic() - began) / done / 60
            run.say(f"evaluating: {done}/{len(batches)} batches  {left:.1f} min left", rewrite=True)
    together = sorted(sum(gathered(mine), []), key=lambda row: row[0])
    truths, detections = [t for _, t, _ in together], [d for _, _, d in together]
    ap = coco_ap(truths, detections)
    return {**ap, "VOC07": voc07_ap(truths, detections)} if args.dataset == "voc" else ap


def draw_detections(items, found, classes, best=5):
    """A figure of some of the data set's items: above their annotations, below the best detections
    of each detector.  found: its name -> what detect gives for the items."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    figure = Figure((2.6 * len(items), 2.8 * (1 + len(found))), layout="constrained")
    truths = [{**truth, "scores": [None] * len(truth["boxes"])} for _, truth in items]
    rows = {"annotations": truths, **{f"{name}: {best} best": seen for name, seen in found.items()}}
    axes = figure.subplots(len(rows), len(items), squeeze=False)
    for row, (name, seen) in zip(axes, rows.items()):
        row[0].set_title(name, loc="left")
        for ax, (image, _), one in zip(row, items, seen):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set_axis_off()
            shown = len(one["boxes"]) if seen is truths else best
            for box, label, score in [*zip(one["boxes"].tolist(), one["labels"].tolist(),
                                           one["scores"])][:shown]:
                (x1, y1, x2, y2), colour = box, f"C{label % 10}"
                ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=2))
                ax.text(x1, y1, classes[label] + ("" if score is None else f" {score:.2f}"),
                        fontsize=8, color="white", va="bottom",
                        bbox=dict(facecolor=colour, edgecolor="none", pad=1))
    return figure


# ---------------------------------------------------------------------------------------- training


def schedule(args, per_epoch):
    """Put the numbers of iterations that follow from the data and from each other into ``args``.

    Returns the factor of the lr at each drop.
    """
    if args.iterations is None:
        args.iterations = 40 * per_epoch
    recipe = RECIPES[args.dataset]
    shares = [drop / recipe["iterations"] for drop in recipe["drops"]]
    if args.schedule == "report":
        shares = [0.5]
    args.drops = [round(share * args.iterations) for share in shares]
    return 0.5 if args.schedule == "report" else 0.1


def detector(args):
    """The detector that the command's arguments describe, from their seed."""
    torch.manual_seed(args.seed)
    return build_detector(args.arch, len(args.classes), args.detector, args.fpn_channels,
                          args.min_size, args.max_size, args.anchor_size, args.rois, args.weights,
                          args.box_head, args.mean, args.std)


def restore(model, saved, path):
    """Load what fine_tuned read from ``path``.  InputError: it is of another detector."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(f"{path} holds another detector: "
                         f"{' '.join(str(error).split())[:200]}") from None


def train(args, device):
    """Fine-tune and evaluate as ``args`` say, into the folder of the run."""
    inf = math.inf
    check(args, fraction=(1e-9, 1), train_scenes=(1, inf), test_scenes=(1, inf),
          iterations=(1, inf), batch_size=(1, inf), lr=(0, inf), warmup=(0, inf),
          weight_decay=(0, inf), min_size=(32, inf), max_size=(32, inf), fpn_channels=(1, inf),
          mean=(0, 1), std=(1e-3, 1), anchor_size=(1, inf), rois=(1, inf), workers=(0, inf),
          seed=(0, inf), log_every=(1, inf))
    if args.detector == "c4" and args.box_head:
        raise InputError("--box-head is of the fpn detector; c4's is Res5")
    if args.eval_only:
        saved = fine_tuned(args.eval_only)
        if Path(args.out, "checkpoint.pt").exists():
            raise InputError(f"{args.out} holds a run: --eval-only wants another --out")
    train_set, test_set = data_sets(args)
    args.classes = test_set.classes
    model = detector(args).to(device, memory_format=torch.channels_last)
    if isinstance(model.roi_heads.box_head, FastRCNNConvFCHead):
        args.box_head = "4conv1fc"  # for --eval-only, which has no --weights
    if world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.eval_only:
        restore(model, saved, args.eval_only)
        run = Run(args, "finetune_fasterrcnn", test_set, 0, 1, {})
    else:
        run = fit(model, train_set, args, device)
    show(evaluate(model, test_set, args, device, run), model, test_set, device, run)


def fit(model, train_set, args, device):
    """The training loop, from where the folder's checkpoint ends -> the Run."""
    per_epoch = steps_per_epoch(train_set, args.batch_size)
    factor = schedule(args, per_epoch)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    norms, others = split_normalization_params(model)
    groups = [dict(params=others, weight_decay=args.weight_decay),
              dict(params=norms, weight_decay=0.0)]  # as detectron2
    if args.optimizer == "adam":
        base_lr, optimizer = args.lr, torch.optim.Adam(groups)
    else:
        base_lr, optimizer = args.lr * args.batch_size / 16, torch.optim.SGD(groups, momentum=0.9)
    run = Run(args, "finetune_fasterrcnn", train_set, args.iterations, per_epoch,
              dict(model=model, optimizer=optimizer))
    model.train()
    layers = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    trained = sum(m.training and m.weight.requires_grad for m in layers)
    shared = (f"with the statistics of {args.batch_size} images" if world_size() == 1 else
              f"synchronised over {world_size()} GPUs" if device.type == "cuda" else
              f"in each of {world_size()} processes by itself (they are synchronised on GPUs only)")
    weights = "random weights" if args.weights == "none" else args.weights
    run.say(f"{args.arch} {args.detector} from {weights}: {len(train_set)} images, "
            f"{len(args.classes)} classes; {trained} of {len(layers)} batch norm layers train, "
            f"{shared}")

    loader = load_batches(train_set, training_item, args.batch_size, range(run.step, run.steps),
                          args.seed, args.workers, collate_fn=list)
    for step, batch in zip(range(run.step, run.steps), loader):
        torch.manual_seed(seed_for(args.seed, step, rank()))  # RPN and box head sample at random
        images = [image.to(device, non_blocking=True).float() / 255 for image, _ in batch]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for _, t in batch]
        lr = learning_rate(step, base_lr, args.warmup, args.drops, factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with mixed_precision(args, device):
            losses = ddp(images, targets)  # of the RPN and of the box head
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, **losses)
    return run


def show(ap, model, test_set, device, run):
    """Print the average precisions, and keep them and a picture in the folder of the run."""
    ap["per_class"] = {test_set.classes[label]: v for label, v in ap["per_class"].items()}
    if rank() == 0:
        (run.out / "ap.json").write_text(json.dumps(ap, indent=2) + "\n")
        items = [test_set[i] for i in range(min(6, len(test_set)))]
        found = detect(model.eval(), [image for image, _ in items], device)
        figure = draw_detections(items, {"detections": found}, test_set.classes)
        figure.savefig(run.out / "detections.png", dpi=80)
    for name, values in (("by COCO's rules", {k: v for k, v in ap.items() if k.startswith("AP")}),
                         ("by VOC07's 11-point rule", ap.get("VOC07", {})),
                         ("AP by class", ap["per_class"])):
        if values:
            run.say(f"{name}:  " + "  ".join(f"{k} {'n/a' if v < 0 else f'{100 * v:.2f}'}"
                                             for k, v in values.items()))


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
