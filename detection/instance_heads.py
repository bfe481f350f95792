"""What Mask R-CNN (He et al., arXiv 1703.06870) adds to Faster R-CNN for each object: a mask, or a
person's keypoints (Sec. 5 there).

The layers are torchvision's, initialised as in detectron2; targets, losses and what becomes of the
outputs are detectron2's (modeling/roi_heads/mask_head.py and keypoint_head.py).
Letters: N RoIs, S side of an output in cells, K classes.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference
from torchvision.ops import roi_align


def mask_layers(channels, width, num_classes, convolutions, norm):
    """The mask head, ``convolutions`` of ``width`` channels, or None without any, and the predictor
    after it: RoIs (N, channels, S / 2, S / 2) -> logits of each class's mask (N, K + 1, S, S).

    norm: of the convolutions, or None.  Source: detectron2's MaskRCNNConvUpsampleHead.  No loss
    uses the background's masks, which detectron2 does not predict.
    """
    head = MaskRCNNHeads(channels, [width] * convolutions, 1, norm) if convolutions else None
    predictor = MaskRCNNPredictor(width if convolutions else channels, width, num_classes + 1)
    nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
    nn.init.zeros_(predictor.mask_fcn_logits.bias)
    nn.init.zeros_(predictor.conv5_mask.bias)
    return head, predictor


def crop_masks(masks, boxes, objects, side):
    """Crop each box's mask by RoI Align, on a grid of ``side`` x ``side`` cells: True where half of
    a cell or more is inside the object.

    masks: (n, H, W) bool; boxes: (N, 4), x1 y1 x2 y2 in the masks' pixels; objects: (N,), the mask
    of each.  Returns (N, side, side) bool.
    """
    # Differs: detectron2 draws polygons anew on each box's grid; this is its `bitmask` format, with
    # which it finds no other accuracy (structures/masks.py, crop_and_resize)
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)  # (N, 5)
    return roi_align(masks[:, None].float(), rois, side, aligned=True)[:, 0] >= 0.5


def mask_loss(logits, labels, targets):
    """Binary cross entropy of each object's mask, of its own class alone: the mean over all cells
    of all (He et al., Sec. 3).

    logits: (N, K + 1, S, S); labels: (N,), from 1; targets: (N, S, S) bool.  Returns a scalar, 0
    for N = 0.
    """
    own = logits[torch.arange(len(labels), device=labels.device), labels]  # (N, S, S)
    total = F.binary_cross_entropy_with_logits(own, targets.float(), reduction="sum")
    return total / max(1, targets.numel())


def paste_masks(probabilities, boxes, height, width):
    """Yield each object's mask in its image, (H, W) bool: the pixels at whose middle its
    probability, bilinear within the box and 0 outside, is 0.5 or more.

    probabilities: (n, S, S); boxes: (n, 4), x1 y1 x2 y2 in the image's pixels, not outside it.
    Source: detectron2, layers/mask_ops.py.
    """
    for values, box in zip(probabilities, boxes):
        mask = torch.zeros(height, width, dtype=torch.bool)
        x1, y1, x2, y2 = box.tolist()
        x = torch.arange(max(0, math.floor(x1) - 1), min(width, math.ceil(x2) + 1))
        y = torch.arange(max(0, math.floor(y1) - 1), min(height, math.ceil(y2) + 1))
        across = (x + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1  # -1..1 from side to side
        down = (y + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (h, w, 2)
        found = F.grid_sample(values[None, None], grid[None], align_corners=False)[0, 0]
        mask[y[0]:y[-1] + 1, x[0]:x[-1] + 1] = found >= 0.5
        yield mask


def keypoint_layers(channels, width):
    """The keypoint head, eight convolutions of ``width`` channels, and the predictor: RoIs (N,
    channels, 14, 14) -> a heat map of each keypoint's place (N, 17, 56, 56), logits.

    Initialised by torchvision as in detectron2's KRCNNConvDeconvUpsampleHead.  The loss is its
    keypointrcnn_loss: cross entropy over a map's cells, the mean over the labelled keypoints within
    their RoIs (NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS).
    """
    return KeypointRCNNHeads(channels, [width] * 8), KeypointRCNNPredictor(width, 17)


def find_keypoints(maps, boxes):
    """Heat maps (N, 17, 56, 56) of the boxes (n, 4) of each image -> a list of (n, 17, 3): x, y in
    the boxes' pixels, and the share of the map's softmax in its best place, as in detectron2."""
    points, best = (torch.cat(parts) for parts in keypointrcnn_inference(maps, boxes))
    share = (best - maps.flatten(2).logsumexp(dim=2)).exp()  # (N, 17)
    points = torch.cat([points[:, :, :2], share[:, :, None]], dim=2)
    return points.split([len(b) for b in boxes])
