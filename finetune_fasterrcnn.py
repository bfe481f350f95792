"""Fine-tune torchvision's Faster R-CNN from a pre-trained backbone, and measure AP by COCO's rules.

Faster R-CNN (Ren et al., NIPS 2015, arXiv 1506.01497) with a feature pyramid (FPN; Lin et al.,
CVPR 2017, arXiv 1612.03144).  All layers train, and batch norm trains with them: self-supervised
features are of another scale than supervised ones, and frozen statistics would not fit them.

Read first: one of the methods, for where --weights comes from.

Commands
    python finetune_fasterrcnn.py --weights runs/moco_v2/backbone.pt      built-in scenes
    python finetune_fasterrcnn.py --weights none --out runs/random        what to compare it with
    torchrun --nproc_per_node=8 finetune_fasterrcnn.py --dataset voc --data DIR --weights FILE

DIR holds VOCdevkit/VOC2007, or is itself in VOC's layout (Annotations, ImageSets, JPEGImages).

Where this differs from the papers, or they are silent
    - The defaults put the papers' VOC schedule, sizes and batch on an FPN; theirs was a C4 head.
    - The RPN keeps 4 times --rois proposals in training and 2 times in testing.
    - `difficult` objects of VOC are left out of training and ignored in the evaluation; a box whose
      xmax is not above its xmin, or ymax above its ymin, counts as one without area.
    - Batch norm is synchronised over processes on GPUs; on CPUs each process has its own, and the
      evaluation uses the first one's statistics.
    - On GPUs: bfloat16, with boxes and losses in float32; RoIAlign's backward pass adds in no fixed
      order there, so that a resumed run equals an uninterrupted one only nearly.
"""
import argparse
import json
import math
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from common import (InputError, Run, add_run_arguments, check, launch, leave_group, load_backbone,
                    load_batches, rank, read_or_next, resnet_stages, seed_for, steps_per_epoch,
                    world_size)

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()


def parse_args(argv=None):
    """VOC's recipe for an FPN detector by default; without --data, a small one for the scenes."""
    parser = argparse.ArgumentParser(description="Fine-tune Faster R-CNN and measure its AP.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["scenes", "voc"], default="scenes")
    add("--data", help="folder in VOC layout, for --dataset voc")
    add("--train-split", default="trainval", help="a list in ImageSets/Main (default %(default)s)")
    add("--test-split", default="test", help="likewise (default %(default)s)")
    add("--classes", nargs="+", default=VOC_CLASSES, help="names (default: VOC's 20)")
    add("--train-scenes", type=int, default=400, help="number of labelled built-in scenes")
    add("--test-scenes", type=int, default=300, help="number of built-in scenes to measure AP on")
    add = parser.add_argument_group("recipe").add_argument
    add("--weights", default="none", help="file that holds a ResNet, or none (default)")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet")
    add("--iterations", type=int, default=24000)
    add("--batch-size", type=int, default=16, help="of all processes together")
    add("--lr", type=float, default=0.02, help="for each 16 images of the batch")
    add("--warmup", type=int, default=100, help="iterations of linear growth of the lr")
    add("--drops", type=int, nargs="*", default=[18000, 22000], 
        help="iterations from which lr is a tenth")
    add("--weight-decay", type=float, default=1e-4)
    add("--min-size", type=int, nargs="+", default=list(range(480, 801, 32)),
        help="short side in pixels, drawn from these; the last one for testing")
    add("--max-size", type=int, default=1333, help="long side at most")
    add("--fpn-channels", type=int, default=256)
    add("--anchor-size", type=int, default=32, help="side of P2's anchors; doubles with each level")
    add("--rois", type=int, default=512, help="RoIs of an image that the box head trains on")
    add_run_arguments(parser, out="runs/finetune")
    if parser.parse_known_args(argv)[0].dataset == "scenes":  # small enough for two CPU cores
        parser.set_defaults(arch="resnet18", iterations=400, batch_size=8, lr=0.04, warmup=40,
                            drops=[300, 360], min_size=[96], max_size=96, fpn_channels=64,
                            anchor_size=8, rois=64)
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------- data
# An item: image (3, H, W) uint8, boxes (n, 4) float x1 y1 x2 y2 in its pixels, labels (n,) from 0,
# ignore (n,) bool.


class LabelledScenes(Dataset):
    """The built-in scenes with their boxes; the seeds of training, test and pre-training differ."""

    def __init__(self, n, seed):
        from scenes import CLASSES, Scenes
        self.scenes, self.classes = Scenes(n, size=96, seed=seed, cache=True), CLASSES

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        image, boxes, labels = self.scenes.labelled(index)
        return image, boxes, labels, torch.zeros(len(labels), dtype=torch.bool)


class VOC(Dataset):
    """One split of a folder in PASCAL VOC's layout; `difficult` boxes are the ones to ignore.

    VOC counts pixels from 1 and includes both ends: x1 and y1 are lowered by 1 here, so that
    x2 - x1 is a width.  Raises InputError: another layout, no such split, a file that is missing or
    does not parse, an unknown class.  In training, an image that cannot be decoded is replaced by
    the next one, as ImageFiles does; in the test it is an error.
    """

    def __init__(self, root, split, classes, training=False):
        self.classes, self.training = classes, training
        folders = [os.path.join(root, below) for below in ("", "VOC2007", "VOCdevkit/VOC2007")]
        self.root = next((f for f in folders if os.path.isdir(f"{f}/ImageSets/Main")), None)
        if self.root is None:
            raise InputError(f"{root} is not in VOC layout: no ImageSets/Main or VOCdevkit/VOC2007")
        try:
            with open(f"{self.root}/ImageSets/Main/{split}.txt") as file:
                names = [line.split()[0] for line in file if line.strip()]
        except (FileNotFoundError, UnicodeDecodeError):
            raise InputError(f"no such split: {self.root}/ImageSets/Main/{split}.txt") from None
        self.paths = [f"{self.root}/JPEGImages/{name}.jpg" for name in names]
        missing = next((p for p in self.paths if not os.path.isfile(p)), None)
        if missing or not names:
            raise InputError(f"no such file: {missing}" if missing else f"no images in {split}.txt")
        self.broken = torch.zeros(len(names), dtype=torch.bool).share_memory_()
        self.without_area = 0
        self.objects = [self._read(f"{self.root}/Annotations/{name}.xml") for name in names]
        if self.without_area and rank() == 0:
            print(f"{split}: {self.without_area} boxes without area left out")

    def _read(self, path):
        boxes, labels, ignore = [], [], []
        try:
            for thing in ElementTree.parse(path).iterfind("object"):
                x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}"))
                                  for side in ("xmin", "ymin", "xmax", "ymax"))
                if x2 <= x1 or y2 <= y1:
                    self.without_area += 1
                    continue
                boxes.append([x1 - 1, y1 - 1, x2, y2])
                labels.append(self.classes.index(thing.findtext("name").strip()))
                ignore.append(thing.findtext("difficult", "0").strip() == "1")
        except FileNotFoundError:
            raise InputError(f"no such file: {path}") from None
        except (ElementTree.ParseError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a VOC annotation: {error}") from None
        except ValueError:
            raise InputError(f"{path}: unknown class {thing.findtext('name')!r}, or no number "
                             f"in a box (--classes are {' '.join(self.classes)})") from None
        return (torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.long),
                torch.tensor(ignore, dtype=torch.bool))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        i, image = read_or_next(self.paths, self.broken, index)
        if i != index and not self.training:
            raise InputError(f"cannot decode {self.paths[index]}")
        return image, *self.objects[i]


def training_item(item):
    """Flip with p 0.5, leave out what is to be ignored -> image, torchvision's dict of targets."""
    image, boxes, labels, ignore = item
    if torch.rand(()) < 0.5:
        image, width = image.flip(-1), image.shape[-1]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return image, dict(boxes=boxes[~ignore], labels=labels[~ignore] + 1)  # 0 is the background


# ---------------------------------------------------------------------------------------- detector


def build_detector(arch, num_classes, fpn_channels=256, min_size=(800,), max_size=1333,
                   anchor_size=32, rois=512, weights="none"):
    """torchvision's Faster R-CNN on an FPN over Res2..Res5; both with batch norm, all trainable.

    num_classes: without the background.  weights: a file for load_backbone, or "none".
    In training it takes lists of images (3, H, W) float 0..1 and of targets and gives a dict of
    losses; in eval mode a list of dicts boxes, labels (from 1), scores, 100 at most for an image.
    """
    stages = resnet_stages(arch, nn.BatchNorm2d)
    if weights != "none":
        load_backbone(stages, weights)
    backbone = BackboneWithFPN(stages, {f"layer{i + 1}": str(i) for i in range(4)}, stages.channels,
                               fpn_channels, norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator([(anchor_size * 2 ** i,) for i in range(5)], [(0.5, 1.0, 2.0)] * 5)
    model = FasterRCNN(backbone, num_classes + 1, min_size=tuple(min_size), max_size=max_size,
                       rpn_anchor_generator=anchors, box_batch_size_per_image=rois,
                       rpn_post_nms_top_n_train=4 * rois, rpn_post_nms_top_n_test=2 * rois)
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(as_float32)  # bfloat16 would round boxes by whole pixels
    return model


def as_float32(_module, _inputs, output):
    """Forward hook: the output, however nested, in float32."""
    if torch.is_tensor(output):
        return output.float()
    return type(output)(as_float32(None, None, part) for part in output)


def learning_rate(step, base, warmup, drops):
    """Linear from base / 1000 during ``warmup`` steps, then a tenth from each of ``drops`` on."""
    grown = 1 if step >= warmup else 0.001 + 0.999 * step / warmup
    return base * grown * 0.1 ** sum(step >= drop for drop in drops)


# -------------------------------------------------------------------------------------- evaluation

AP_IOUS = np.linspace(0.5, 0.95, 10)  # 0.50:0.05:0.95
AP_RECALLS = np.linspace(0.0, 1.0, 101)
AP_AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, s, m, l
AP_MAX_DETECTIONS = 100  # per image and class


def _ap_arrays(image, extra, name):
    """One image's dict as arrays: boxes (n, 4), labels (n,), and its ignore or scores (n,)."""
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
    return boxes, labels, values


def _ap_match(truth, crowd, found):
    """Match one image's detections of one class, best score first, to its truths of that class.

    truth (n, 4), crowd (n,) bool, found (m, 4). Returns right and wrong, bool (4, 10, m), over
    the 4 area ranges and 10 IoU thresholds (a detection that is neither does not count), and
    the number of truths that count in each area range, (4,).
    """
    truth, crowd = truth[::-1], crowd[::-1]  # of equal IoUs COCO takes the last, argmax the first
    size = np.minimum(found[:, None, 2:], truth[:, 2:]) - np.maximum(found[:, None, :2],
                                                                     truth[:, :2])
    inter = size.clip(min=0).prod(axis=2)  # (m, n)
    truth_area = (truth[:, 2:] - truth[:, :2]).prod(axis=1)
    found_area = (found[:, 2:] - found[:, :2]).prod(axis=1)
    union = np.where(crowd, found_area[:, None], found_area[:, None] + truth_area - inter)
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)

    low, high = AP_AREAS[:, :1], AP_AREAS[:, 1:]
    ignored = crowd | (truth_area < low) | (truth_area > high)  # (4, n)
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
    over the detection's own area. detections: a list over the same images of dicts: boxes
    (m, 4), labels (m,), scores (m,); the 100 best of each image and class count. Values are
    arrays, CPU tensors or lists. Areas are the boxes', in pixels^2.

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
        truth_boxes, truth_labels, crowd = _ap_arrays(truth, "ignore", f"truths[{i}]")
        boxes, labels, scores = _ap_arrays(found, "scores", f"detections[{i}]")
        for label in np.union1d(truth_labels, labels).tolist():
            own = truth_labels == label
            top = np.flatnonzero(labels == label)
            top = top[np.argsort(-scores[top], kind="mergesort")[:AP_MAX_DETECTIONS]]
            match = _ap_match(truth_boxes[own], crowd[own], boxes[top])
            parts.setdefault(label, []).append((scores[top], *match))

    aps = {label: _ap_of_class(parts[label]) for label in sorted(parts)}
    table = np.array(list(aps.values())).reshape(-1, len(AP_AREAS), len(AP_IOUS))

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    return {"AP": mean(table[:, 0]), "AP50": mean(table[:, 0, 0]), "AP75": mean(table[:, 0, 5]),
            "APs": mean(table[:, 1]), "APm": mean(table[:, 2]), "APl": mean(table[:, 3]),
            "per_class": {label: mean(ap[0]) for label, ap in aps.items()}}


@torch.no_grad()
def detect(model, images, device):
    """Images (3, H, W) uint8 -> a list of dicts boxes (n, 4), labels (n,) from 0, scores (n,), on
    the CPU; best first."""
    found = model([image.to(device, non_blocking=True).float() / 255 for image in images])
    return [dict(boxes=f["boxes"].cpu(), labels=f["labels"].cpu() - 1, scores=f["scores"].cpu())
            for f in found]


def evaluate(model, dataset, args, device, run):
    """coco_ap of the whole data set, each process detecting in its share of the images."""
    batches = [list(range(start + rank(), min(start + args.batch_size, len(dataset)), world_size()))
               for start in range(0, len(dataset), args.batch_size)]  # as many in every process
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=args.workers,
                        worker_init_fn=leave_group, pin_memory=device.type == "cuda")
    mine = []
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)  # the batch statistics that the checkpoint holds
    model.eval()
    for indices, items in zip(batches, loader):
        run.stop_if_asked()
        images = [image for image, *_ in items]
        truths = [dict(boxes=b, labels=l, ignore=i) for _, b, l, i in items]
        mine += zip(indices, truths, detect(model, images, device) if images else [])
    everyone = [mine]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, mine)
    together = sorted((row for rows in everyone for row in rows), key=lambda row: row[0])
    return coco_ap([t for _, t, _ in together], [d for _, _, d in together])


def draw_detections(model, dataset, device, path, number=6, best=5):
    """A picture of the first images: above their annotations, below their best detections."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    items = [dataset[i] for i in range(min(number, len(dataset)))]
    found = detect(model.eval(), [image for image, *_ in items], device)
    figure = Figure((2.6 * len(items), 5.6), layout="constrained")
    axes = figure.subplots(2, len(items), squeeze=False)
    for (image, boxes, labels, _), seen, (above, below) in zip(items, found, axes.T):
        top = [seen[key][:best] for key in ("boxes", "labels", "scores")]
        for ax, boxes, labels, scores in ((above, boxes, labels, [None] * len(boxes)),
                                          (below, *top)):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set_axis_off()
            for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels.tolist(), scores):
                colour = f"C{label % 10}"
                ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=2))
                name = dataset.classes[label] + ("" if score is None else f" {score:.2f}")
                ax.text(x1, y1, name, fontsize=8, color="white", va="bottom",
                        bbox=dict(facecolor=colour, edgecolor="none", pad=1))
    figure.suptitle(f"above: annotations; below: the {best} best detections, with their scores")
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------- training


def train(args, device):
    """Fine-tune and evaluate as ``args`` say, into the folder of the run."""
    inf = math.inf
    check(args, train_scenes=(1, inf), test_scenes=(1, inf), iterations=(1, inf),
          batch_size=(1, inf), lr=(0, inf), warmup=(0, inf), drops=(0, inf), weight_decay=(0, inf),
          min_size=(32, inf), max_size=(32, inf), fpn_channels=(1, inf), anchor_size=(1, inf),
          rois=(1, inf), workers=(0, inf), seed=(0, inf), log_every=(1, inf))
    if args.dataset == "scenes" and args.data is not None:
        raise InputError("--data needs --dataset voc")
    if args.dataset == "scenes":
        train_set = LabelledScenes(args.train_scenes, seed=1)
        test_set = LabelledScenes(args.test_scenes, seed=2)
    elif args.data is None:
        raise InputError("--dataset voc needs --data, a folder in VOC layout")
    else:
        train_set = VOC(args.data, args.train_split, args.classes, training=True)
        test_set = VOC(args.data, args.test_split, args.classes)
    per_epoch = steps_per_epoch(train_set, args.batch_size)

    torch.manual_seed(args.seed)
    model = build_detector(args.arch, len(train_set.classes), args.fpn_channels, args.min_size,
                           args.max_size, args.anchor_size, args.rois, args.weights).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    if world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = model if world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    base_lr = args.lr * args.batch_size / 16
    optimizer = torch.optim.SGD(model.parameters(), base_lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    run = Run(args, "finetune_fasterrcnn", train_set, args.iterations,
              per_epoch, dict(model=model, optimizer=optimizer))

    loader = load_batches(train_set, training_item, args.batch_size, range(run.step, run.steps),
                          args.seed, args.workers, collate_fn=list)
    model.train()
    for step, batch in zip(range(run.step, run.steps), loader):
        torch.manual_seed(seed_for(args.seed, step, rank()))  # RPN and box head sample at random
        images = [image.to(device, non_blocking=True).float() / 255 for image, _ in batch]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for _, t in batch]
        lr = learning_rate(step, base_lr, args.warmup, args.drops)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = ddp(images, targets)  # of the RPN and of the box head
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end_step(loss, lr, **losses)

    ap = evaluate(model, test_set, args, device, run)
    if rank() == 0:
        ap["per_class"] = {test_set.classes[label]: v for label, v in ap["per_class"].items()}
        (run.out / "ap.json").write_text(json.dumps(ap, indent=2) + "\n")
        draw_detections(model, test_set, device, run.out / "detections.png")
    for values in ({k: v for k, v in ap.items() if k != "per_class"}, ap["per_class"]):
        run.say("  ".join(f"{k} {'n/a' if v < 0 else f'{100 * v:.2f}'}" for k, v in values.items()))


def main(argv=None):
    """The command."""
    launch(train, parse_args(argv))


if __name__ == "__main__":
    main()
