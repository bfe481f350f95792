"""Average precision of object detections, by COCO's rule and by VOC2007's, in NumPy alone.

This file imports nothing of the project, so that it can be copied by itself:

    ground_truth = [dict(boxes=[[0, 0, 10, 10]], labels=[1])]  # one dict for each image
    detections = [dict(boxes=[[0, 0, 9, 10]], labels=[1], scores=[0.8])]
    coco_ap(ground_truth, detections)["AP50"]  # 1.0

Letters: n ground-truth boxes and m detections, of one image or of one class; A = 4 area ranges;
T = 10 IoU thresholds.  TP and FP: true and false positives.
"""
import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # 0.50:0.05:0.95
COCO_RECALLS = np.linspace(0, 1, 101)
# Differs: detectron2's VOC07 rule has np.arange(0, 1.1, 0.1), whose 0.3 is 0.30000000000000004
VOC07_RECALLS = np.arange(11) / 10
AREA_RANGES = np.array([[0, 1e10], [0, 32 ** 2], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])
MAX_DETECTIONS = 100  # of each image and class


def coco_ap(ground_truth, detections):
    """COCO's box average precision, as pycocotools' COCOeval("bbox") computes it.

    ground_truth: a list over images of dicts: boxes (n, 4), x1 y1 x2 y2 in pixels; labels (n,), any
    integers; optionally ignore (n,) bool, COCO's iscrowd: a detection matched to such a box is
    neither a true nor a false positive, any number of detections may match it, and their IoU with
    it is the intersection over the detection's own area; optionally area (n,) in pixels^2, which
    decides whether an object is small, medium or large (COCO's are of the segments; default: the
    boxes').  detections: a list over the same images of dicts: boxes (m, 4), labels (m,), scores
    (m,); the 100 best of each image and class count.  Values are arrays, CPU tensors or lists.

    Returns a dict of floats in 0..1: AP (mean over IoU 0.50:0.05:0.95 and classes), AP50, AP75,
    APs (area <= 32^2), APm (32^2 to 96^2), APl (>= 96^2), and per_class: label -> AP, for every
    label that occurs.  -1 where there is no ground truth; such classes are left out of the means.
    Raises ValueError if the lists, or the boxes, labels and scores of an image, differ in length.
    Source: Lin et al. 2014 (arXiv 1405.0312), cocodataset.org/#detection-eval; cocoeval.py.
    """
    matches = {}  # label -> a list over the images in which it occurs
    for truth, found in _to_arrays(ground_truth, detections):
        for label in np.union1d(truth["labels"], found["labels"]).tolist():
            own = truth["labels"] == label
            best = np.flatnonzero(found["labels"] == label)
            order = np.argsort(-found["scores"][best], kind="stable")
            best = best[order[:MAX_DETECTIONS]]
            match = _match(truth["boxes"][own], truth["ignore"][own], truth["area"][own],
                           found["boxes"][best])
            matches.setdefault(label, []).append((found["scores"][best], *match))

    ap = {label: _class_ap(matches[label]) for label in sorted(matches)}
    table = np.array([*ap.values()]).reshape(-1, len(AREA_RANGES), len(IOU_THRESHOLDS))

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    return {"AP": mean(table[:, 0]), "AP50": mean(table[:, 0, 0]), "AP75": mean(table[:, 0, 5]),
            "APs": mean(table[:, 1]), "APm": mean(table[:, 2]), "APl": mean(table[:, 3]),
            "per_class": {label: mean(of_class[0]) for label, of_class in ap.items()}}


def _match(truth, ignore, area, found):
    """Match one image's detections of one class, best score first, to its ground truth.

    truth: (n, 4); ignore: (n,) bool; area: (n,); found: (m, 4).
    Returns TP and FP, bool (A, T, m), and the number of ground-truth boxes that count (A,).  A
    detection that is neither TP nor FP does not count.
    """
    truth, ignore, area = truth[::-1], ignore[::-1], area[::-1]  # of equal IoUs the last one wins
    iou = box_iou(found, truth, ignore)  # (m, n)
    low, high = AREA_RANGES[:, :1], AREA_RANGES[:, 1:]
    ignored = ignore | (area < low) | (area > high)  # (A, n)
    found_area = box_area(found)
    outside = (found_area < low) | (found_area > high)  # (A, m)

    shape = len(AREA_RANGES), len(IOU_THRESHOLDS)
    matched = np.zeros((*shape, len(found)), dtype=bool)
    uncounted = np.repeat(outside[:, None], len(IOU_THRESHOLDS), axis=1)  # unless it is matched
    free = np.ones((*shape, len(truth)), dtype=bool)
    for d in np.flatnonzero((iou >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = free & (iou[d] >= IOU_THRESHOLDS[:, None])  # (A, T, n)
        counted = fits & ~ignored[:, None]  # a box that counts goes before any ignored one
        fits = np.where(counted.any(axis=2, keepdims=True), counted, fits)
        best = np.where(fits, iou[d], -1).argmax(axis=2)  # (A, T)
        a, t = np.nonzero(fits.any(axis=2))
        g = best[a, t]
        matched[a, t, d] = True
        uncounted[a, t, d] = ignored[a, g]
        free[a, t, g] = ignore[g]  # a crowd may be matched again
    return matched & ~uncounted, ~matched & ~uncounted, (~ignored).sum(axis=1)


def _class_ap(matches):
    """AP (A, T) of one class from each image's scores and match; nan without ground truth."""
    scores, tp, fp, counts = zip(*matches)
    order = np.argsort(-np.concatenate(scores), kind="stable")  # ties keep the images' order
    tp = np.concatenate(tp, axis=2)[:, :, order].cumsum(axis=2)  # (A, T, m)
    fp = np.concatenate(fp, axis=2)[:, :, order].cumsum(axis=2)
    precision = tp / (tp + fp + np.spacing(1))
    # The precision at a recall is the best at that recall or above, and 0 past the last one.
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 0), (0, 1)))
    ap = np.full(tp.shape[:2], np.nan)
    for a, count in enumerate(sum(counts)):
        for t in range(len(IOU_THRESHOLDS) if count else 0):
            at = np.searchsorted(tp[a, t] / count, COCO_RECALLS, side="left")
            ap[a, t] = precision[a, t, at].mean()
    return ap


def voc07_ap(ground_truth, detections):
    """VOC2007's average precision: the mean precision at 11 recalls.  Lists as coco_ap takes them.

    A detection belongs to the ground truth of its class that it overlaps most.  Of those that reach
    the IoU threshold there, the one of the best score is a true positive, and the others are false
    positives; none counts if that box is to be ignored.
    Returns a dict of floats in 0..1, means over the classes with ground truth: AP50, AP75, and AP
    over IoU 0.50:0.05:0.95, which is detectron2's extension and what the papers publish; -1 without
    ground truth.  Raises ValueError as coco_ap does.
    Source: Everingham et al. 2010, Sec. 4.2; VOCevaldet.m of the development kit.
    """
    images = _to_arrays(ground_truth, detections)
    counted = [truth["labels"][~truth["ignore"]].tolist() for truth, _ in images]
    classes = sorted({label for labels in counted for label in labels})
    if not classes:
        return {"AP": -1.0, "AP50": -1.0, "AP75": -1.0}
    precision = np.array([_voc07_precision(images, label) for label in classes])  # (classes, T, 11)
    ap = precision.mean(axis=(0, 2))
    return {"AP": float(ap.mean()), "AP50": float(ap[0]), "AP75": float(ap[5])}


def _voc07_precision(images, label):
    """One class's precision (T, 11): the best one at each of VOC07_RECALLS or above."""
    rows, boxes, positives = [], 0, 0
    for truth, found in images:
        own, mine = truth["labels"] == label, found["labels"] == label
        ignore = truth["ignore"][own]
        positives += (~ignore).sum()
        iou = box_iou(found["boxes"][mine], truth["boxes"][own])
        iou = np.pad(iou, ((0, 0), (0, 1)))  # (m, n + 1): IoU 0 where an image has no such box
        best = iou.argmax(axis=1)
        rows.append(np.stack([-found["scores"][mine], iou.max(axis=1), boxes + best,
                              np.append(ignore, False)[best]], axis=1))  # (m, 4)
        boxes += len(ignore) + 1
    rows = np.concatenate(rows)
    _, iou, box, ignored = rows[rows[:, 0].argsort(kind="stable")].T  # (m,) each, best score first

    precisions = []
    for threshold in IOU_THRESHOLDS:
        hit = iou >= threshold
        counted = np.flatnonzero(hit & (ignored == 0))
        _, first = np.unique(box[counted], return_index=True)  # the first detection of each box
        tp = np.zeros(len(rows), dtype=bool)
        tp[counted[first]] = True
        fp = ~tp & ~(hit & (ignored == 1))
        tp, fp = tp.cumsum(), fp.cumsum()
        precision, recall = tp / np.maximum(tp + fp, 1), tp / positives
        precisions.append([precision[recall >= r].max(initial=0) for r in VOC07_RECALLS])
    return precisions


def box_area(boxes):
    """Areas (n,) of boxes (n, 4), x1 y1 x2 y2."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def box_iou(found, truth, crowd=False):
    """Intersection over union of boxes (m, 4) with boxes (n, 4), x1 y1 x2 y2 -> (m, n).

    crowd: (n,) bool: with such a box it is the intersection over the area of the found one.
    """
    low = np.maximum(found[:, None, :2], truth[:, :2])  # (m, n, 2)
    high = np.minimum(found[:, None, 2:], truth[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=2)  # (m, n)
    found_area = box_area(found)[:, None]
    union = np.where(crowd, found_area, found_area + box_area(truth) - intersection)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def _to_arrays(ground_truth, detections):
    """The arguments of coco_ap as a list over images of (ground truth, detections), dicts of
    arrays.  Raises ValueError."""
    if len(ground_truth) != len(detections):
        raise ValueError(f"{len(ground_truth)} images of ground truth, {len(detections)} of "
                         "detections")
    return [(_image_arrays(truth, "ignore", f"ground_truth[{i}]"),
             _image_arrays(found, "scores", f"detections[{i}]"))
            for i, (truth, found) in enumerate(zip(ground_truth, detections))]


def _image_arrays(image, extra, name):
    """One image's dict as arrays: boxes (n, 4), labels, area, and its ignore or scores, (n,)."""
    boxes = np.asarray(image["boxes"], dtype=np.float64)
    boxes = boxes if boxes.size else np.zeros((0, 4))
    labels = np.asarray(image["labels"], dtype=np.int64)
    if extra == "ignore":
        values = np.asarray(image.get("ignore", np.zeros(len(labels))), dtype=bool)
    else:
        values = np.asarray(image["scores"], dtype=np.float64)
    if labels.ndim != 1 or boxes.shape != (len(labels), 4) or values.shape != labels.shape:
        raise ValueError(f"{name}: expected boxes (n, 4), labels (n,) and {extra} (n,) of one n, "
                         f"got {boxes.shape}, {labels.shape}, {values.shape}")
    area = np.asarray(image.get("area", box_area(boxes)), dtype=np.float64)
    if area.shape != labels.shape:
        raise ValueError(f"{name}: expected area (n,), got {area.shape} for {len(labels)} boxes")
    return {"boxes": boxes, "labels": labels, "area": area, extra: values}
