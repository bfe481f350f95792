"""Average precision of boxes, masks and keypoints by COCO's rule, of boxes by VOC2007's, in NumPy.

This file imports nothing of the project, so that it can be copied by itself:

    ground_truth = [dict(boxes=[[0, 0, 10, 10]], labels=[1])]  # one dict for each image
    detections = [dict(boxes=[[0, 0, 9, 10]], labels=[1], scores=[0.8])]
    coco_ap(ground_truth, detections)["AP50"]  # 1.0

mask_ap and keypoint_ap take the same lists, with masks or keypoints in the dicts: they differ in
the overlap alone.
Letters: n ground-truth objects and m detections, of one image or of one class; A = 4 area ranges;
T = 10 thresholds of the overlap.  TP and FP: true and false positives.
"""
import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # 0.50:0.05:0.95
COCO_RECALLS = np.linspace(0, 1, 101)
# Differs: detectron2's VOC07 rule has np.arange(0, 1.1, 0.1), whose 0.3 is 0.30000000000000004; it
# also rounds scores to 0.001 and boxes to 0.1 pixels, and takes IoU > threshold, not >=
VOC07_RECALLS = np.arange(11) / 10
AREA_RANGES = np.array([[0, 1e10], [0, 32 ** 2], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])
MAX_DETECTIONS, MAX_WITH_KEYPOINTS = 100, 20  # of each image and class
# How far annotators are apart, over the square root of the object's area: at the nose, and at two
# each of eyes, ears, shoulders, elbows, wrists, hips, knees, ankles
SIGMAS = np.array([26, *np.repeat([25, 35, 79, 72, 62, 107, 87, 89], 2)]) / 1000


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
    return _coco_ap(_to_arrays(ground_truth, detections), lambda found, truth: box_iou(
        found["boxes"], truth["boxes"], truth["crowd"]))


def mask_ap(ground_truth, detections):
    """COCO's mask average precision, as pycocotools' COCOeval("segm") computes it.

    Lists as coco_ap takes them, whose dicts also have masks (n, H, W) bool, of one size in an
    image.  Overlaps count pixels, and so do the areas of detections, and those of ground truth that
    has no `area`.  Each image is asked for once, by its index: a sequence that makes an image's
    masks only then needs little memory.
    Returns what coco_ap does.  Raises ValueError as coco_ap does, or if masks are no such arrays.
    """
    return _coco_ap(_to_arrays(ground_truth, detections, "masks"), _mask_iou)


def keypoint_ap(ground_truth, detections):
    """COCO's keypoint average precision, as pycocotools' COCOeval("keypoints") computes it.

    Lists as coco_ap takes them, whose dicts also have keypoints (n, 17, 3): x, y, and, read in the
    ground truth alone, visibility, 0 if not labelled.  Ground truth without any is ignored; its
    `area` (COCO's: of the segments) scales the distances.  The area of a detection is its box's, as
    in detectron2.  The 20 best detections of each image and class count.
    Returns what coco_ap does but APs, as COCO has no small persons.  Raises ValueError likewise.
    """
    ap = _coco_ap(_to_arrays(ground_truth, detections, "keypoints"), _oks, MAX_WITH_KEYPOINTS)
    return {name: value for name, value in ap.items() if name != "APs"}


def _coco_ap(images, overlaps, most=MAX_DETECTIONS):
    """COCO's rule.  images: as _to_arrays yields them; overlaps: found and truth of one -> (m, n),
    read where the labels agree; most: detections of each image and class that count."""
    matches = {}  # label -> a list over the images in which it occurs
    for truth, found in images:
        overlap = overlaps(found, truth)
        for label in np.union1d(truth["labels"], found["labels"]).tolist():
            own = np.flatnonzero(truth["labels"] == label)[::-1]  # of equal overlaps the last wins
            best = np.flatnonzero(found["labels"] == label)
            order = np.argsort(-found["scores"][best], kind="stable")
            best = best[order[:most]]
            match = _match(overlap[best[:, None], own], found["size"][best], truth["area"][own],
                           truth["ignore"][own], truth["crowd"][own])
            matches.setdefault(label, []).append((found["scores"][best], *match))

    ap = {label: _class_ap(matches[label]) for label in sorted(matches)}
    table = np.array([*ap.values()]).reshape(-1, len(AREA_RANGES), len(IOU_THRESHOLDS))

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    return {"AP": mean(table[:, 0]), "AP50": mean(table[:, 0, 0]), "AP75": mean(table[:, 0, 5]),
            "APs": mean(table[:, 1]), "APm": mean(table[:, 2]), "APl": mean(table[:, 3]),
            "per_class": {label: mean(of_class[0]) for label, of_class in ap.items()}}


def _match(overlap, size, area, ignore, crowd):
    """Match one image's detections of one class, best score first, to its ground truth.

    overlap: (m, n), of equal ones the first wins; size: the detections' areas (m,); area: (n,);
    ignore and crowd: (n,) bool.
    Returns TP and FP, bool (A, T, m), and the number of ground-truth objects that count (A,).  A
    detection that is neither TP nor FP does not count.
    """
    low, high = AREA_RANGES[:, :1], AREA_RANGES[:, 1:]
    ignored = ignore | (area < low) | (area > high)  # (A, n)
    outside = (size < low) | (size > high)  # (A, m)

    shape = len(AREA_RANGES), len(IOU_THRESHOLDS)
    matched = np.zeros((*shape, len(size)), dtype=bool)
    uncounted = np.repeat(outside[:, None], len(IOU_THRESHOLDS), axis=1)  # unless it is matched
    free = np.ones((*shape, len(area)), dtype=bool)
    for d in np.flatnonzero((overlap >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = free & (overlap[d] >= IOU_THRESHOLDS[:, None])  # (A, T, n)
        counted = fits & ~ignored[:, None]  # an object that counts goes before any ignored one
        fits = np.where(counted.any(axis=2, keepdims=True), counted, fits)
        best = np.where(fits, overlap[d], -1).argmax(axis=2)  # (A, T)
        a, t = np.nonzero(fits.any(axis=2))
        g = best[a, t]
        matched[a, t, d] = True
        uncounted[a, t, d] = ignored[a, g]
        free[a, t, g] = crowd[g]  # a crowd may be matched again
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
    images = [*_to_arrays(ground_truth, detections)]
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
    return _over_union(intersection, box_area(found), box_area(truth), crowd)


def _over_union(intersection, found, truth, crowd):
    """IoU (m, n) from the intersections (m, n), the areas (m,) and (n,), and box_iou's crowd."""
    found = found[:, None]
    union = np.where(crowd, found, found + truth - intersection)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def _mask_iou(found, truth):
    """IoU (m, n) of one image's masks; 0 where the labels differ."""
    low = np.maximum(found["boxes"][:, None, :2], truth["boxes"][:, :2])  # (m, n, 2)
    high = np.minimum(found["boxes"][:, None, 2:], truth["boxes"][:, 2:])
    near = (low < high).all(axis=2) & (found["labels"][:, None] == truth["labels"])
    intersection = np.zeros(near.shape)
    for d, g in np.argwhere(near):  # only the pixels within both boxes
        (x1, y1), (x2, y2) = low[d, g], high[d, g]
        intersection[d, g] = np.count_nonzero(found["masks"][d, y1:y2, x1:x2]
                                              & truth["masks"][g, y1:y2, x1:x2])
    return _over_union(intersection, found["size"], truth["size"], truth["crowd"])


def _oks(found, truth):
    """Object keypoint similarity (m, n) of one image's objects: the mean of exp(-d^2 / (2 area
    (2 sigma)^2)) over the labelled keypoints, which are d pixels apart.

    Without any, d leads from each keypoint to the object's box, enlarged by its own size on every
    side.  Source: cocodataset.org/#keypoints-eval; cocoeval.py, computeOks.
    """
    labelled = truth["keypoints"][:, :, 2] > 0  # (n, 17)
    by_box = ~labelled.any(axis=1)[:, None]  # (n, 1)
    corner, side = truth["boxes"][:, None, :2], np.diff(truth["boxes"].reshape(-1, 2, 2), axis=1)
    low = np.where(by_box[:, None], corner - side, truth["keypoints"][:, :, :2])  # (n, 17, 2)
    high = np.where(by_box[:, None], corner + 2 * side, truth["keypoints"][:, :, :2])
    at = found["keypoints"][:, None, :, :2]  # (m, 1, 17, 2)
    d = (low - at).clip(min=0) + (at - high).clip(min=0)  # (m, n, 17, 2)
    area = truth["area"][:, None] + np.spacing(1)
    similarity = np.exp(-(d ** 2).sum(axis=3) / (2 * SIGMAS) ** 2 / area / 2)  # (m, n, 17)
    counts = labelled | by_box  # (n, 17)
    return (similarity * counts).sum(axis=2) / counts.sum(axis=1)


def _to_arrays(ground_truth, detections, task="boxes"):
    """Yield each image's ground truth and detections as dicts of arrays.  task: what to read, boxes
    or also masks or keypoints.  Raises ValueError."""
    if len(ground_truth) != len(detections):
        raise ValueError(f"{len(ground_truth)} images of ground truth, {len(detections)} of "
                         "detections")
    for i in range(len(ground_truth)):
        truth = _image_arrays(ground_truth[i], "ignore", f"ground_truth[{i}]", task)
        found = _image_arrays(detections[i], "scores", f"detections[{i}]", task)
        sizes = [image["masks"].shape[1:] for image in (truth, found)] if task == "masks" else []
        if len(truth["labels"]) and len(found["labels"]) and len({*sizes}) > 1:
            raise ValueError(f"image {i} has masks of {sizes[0]} and of {sizes[1]} pixels")
        yield truth, found


def _image_arrays(image, extra, name, task):
    """One image's dict as arrays: labels; size, the boxes' or masks' own area; scores, or area,
    ignore and crowd: (n,) each; boxes (n, 4), with masks those around them; masks, keypoints."""
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
    arrays = {"boxes": boxes, "labels": labels, "size": box_area(boxes), extra: values}
    if task == "masks":
        masks = np.asarray(image["masks"])
        masks = masks if len(masks) else np.zeros((0, 1, 1), dtype=bool)
        if masks.ndim != 3 or len(masks) != len(labels) or masks.dtype != bool:
            raise ValueError(f"{name}: expected masks (n, H, W) bool, got {masks.shape} "
                             f"{masks.dtype} for {len(labels)} boxes")
        size = np.array([np.count_nonzero(mask) for mask in masks], dtype=np.float64)
        arrays |= {"masks": masks, "boxes": _boxes_around(masks), "size": size}
    if task == "keypoints":
        keypoints = np.asarray(image["keypoints"], dtype=np.float64)
        keypoints = keypoints if keypoints.size else np.zeros((0, 17, 3))
        if keypoints.shape != (len(labels), 17, 3):
            raise ValueError(f"{name}: expected keypoints (n, 17, 3), got {keypoints.shape} for "
                             f"{len(labels)} boxes")
        arrays["keypoints"] = keypoints
    if extra == "ignore":
        area = np.asarray(image.get("area", arrays["size"]), dtype=np.float64)
        if area.shape != labels.shape:
            raise ValueError(f"{name}: expected area (n,), got {area.shape} for "
                             f"{len(labels)} boxes")
        arrays |= {"area": area, "crowd": values}
        if task == "keypoints":
            arrays["ignore"] = values | ~(keypoints[:, :, 2] > 0).any(axis=1)
    return arrays


def _boxes_around(masks):
    """Masks (n, H, W) -> the boxes around their pixels (n, 4), x1 y1 x2 y2, whole numbers."""
    height, width = masks.shape[1:]
    rows, columns = masks.any(axis=2), masks.any(axis=1)  # (n, H), (n, W)
    return np.stack([columns.argmax(axis=1), rows.argmax(axis=1),
                     width - columns[:, ::-1].argmax(axis=1),
                     height - rows[:, ::-1].argmax(axis=1)], axis=1)
