"""RetinaNet (Lin et al., ICCV 2017, arXiv 1708.02002) as DetCo (Tables 5 and 12) and DUPR (Table
III) fine-tune it: detectron2's, with batch norm in backbone and pyramid (DUPR, 4.2.1; DetCo,
appendix, "Downstream tasks").

Numbers are of detectron2's configs/Base-RetinaNet.yaml, or else of its config/defaults.py.  The
parts are torchvision's; what is here is where its arithmetic differs from detectron2's.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import retinanet
from torchvision.ops import (FeaturePyramidNetwork, batched_nms, box_iou, clip_boxes_to_image,
                             sigmoid_focal_loss)
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common import all_reduce_sum, world_size
from detection.anchors import Anchors

STRIDES = 8, 16, 32, 64, 128  # of P3 to P7
OCTAVES = 2 ** 0.0, 2 ** (1 / 3), 2 ** (2 / 3)  # sides of a level's anchors over the smallest


class PyramidFromP3(nn.Module):
    """models.Pyramid without P2: (B, 3, H, W) -> P3..P7, (B, C, H/s, W/s), s = STRIDES."""

    def __init__(self, stages, channels):
        super().__init__()
        self.body, self.out_channels = stages, channels
        top = LastLevelP6P7(stages.channels[-1], channels)
        top.use_P5 = False  # P6 is of Res5, also where that is as wide as P5
        # Paper silent: P6 and P7 have no batch norm, as nothing in detectron2 would give it to them
        self.fpn = FeaturePyramidNetwork(stages.channels[1:], channels, top, nn.BatchNorm2d)

    def forward(self, images):
        return self.fpn(OrderedDict(zip("123", self.body(images)[1:])))


class RetinaNet(retinanet.RetinaNet):
    """torchvision's network with detectron2's loss and detections; labels count from 1, as those of
    Faster R-CNN.  Images and targets as in models.build_detector.

    backbone: a PyramidFromP3; anchor_size: side of the smallest anchors; options: torchvision's.
    The head has no batch norm (MODEL.RETINANET.NORM), weights of standard deviation 0.01, and
    biases of 0 but for the classes', which start at a probability of 0.01: torchvision's are the
    same.  So are the thresholds: an anchor is positive from an IoU of 0.5 on, background below 0.4,
    and positive too if it overlaps an object most.
    """

    def __init__(self, backbone, num_classes, anchor_size, **options):
        sizes = [[anchor_size * 2 ** level * octave for octave in OCTAVES] for level in range(5)]
        super().__init__(backbone, num_classes, anchor_generator=Anchors(sizes, STRIDES),
                         score_thresh=0.05, topk_candidates=1000, nms_thresh=0.5,
                         detections_per_img=100, **options)
        self.num_classes = num_classes
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                # Paper silent: of fewer than 256 channels, a standard deviation of 0.01 lets
                # nothing through five layers; so it grows, to the gain of a layer of 256 channels
                module.weight.data *= (256 / backbone.out_channels) ** 0.5
        # positive anchors of an image, a running mean: detectron2's start, 100 for a GPU's images,
        # of which the papers have two
        self.register_buffer("positives", torch.tensor(50.0))

    def match(self, target, anchors):
        """A target's labels for anchors (A, 4) -> (A,), 0 background, -1 left out; and the
        objects' boxes, (A, 4), of use where the label is positive."""
        if not len(target["boxes"]):
            return anchors.new_zeros(len(anchors), dtype=torch.long), anchors
        matched = self.proposal_matcher(box_iou(target["boxes"], anchors))  # (A,)
        labels = target["labels"][matched.clamp(min=0)]
        labels[matched == self.proposal_matcher.BELOW_LOW_THRESHOLD] = 0
        labels[matched == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1
        return labels, target["boxes"][matched.clamp(min=0)]

    def compute_loss(self, targets, head_outputs, anchors):
        """The focal loss (alpha 0.25, gamma 2) of the anchors' classes and the L1 loss of the
        positive ones' boxes, both divided by the running mean of an image's positive anchors and
        by the number of images."""
        labels, boxes = map(torch.stack, zip(*map(self.match, targets, anchors)))  # (B, A), (.., 4)
        positive, anchors = labels > 0, torch.stack(anchors)
        # Differs: detectron2 has a mean for each GPU, of its own images; this one is of the whole
        # batch, so that the loss is the same on any number of processes
        images = len(targets) * world_size()
        count = all_reduce_sum(positive.sum().float()).clamp(min=1) / images
        self.positives.mul_(0.9).add_(0.1 * count)
        classes = torch.arange(1, self.num_classes + 1, device=labels.device)
        wanted = (labels.unsqueeze(-1) == classes).float()  # (B, A, K)
        focal = sigmoid_focal_loss(head_outputs["cls_logits"], wanted, alpha=0.25, gamma=2)
        # L1: smooth L1's beta is 0 in Base-RetinaNet.yaml (since May 2020), 0.1 in defaults.py
        offsets = self.box_coder.encode_single(boxes[positive], anchors[positive])
        l1 = F.l1_loss(head_outputs["bbox_regression"][positive], offsets, reduction="sum")
        scale = len(targets) * self.positives
        return dict(classification=focal[labels >= 0].sum() / scale, bbox_regression=l1 / scale)

    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        """Levels' logits (B, A_l, K) and offsets (B, A_l, 4), images' anchors (A_l, 4) by level ->
        detections.  Boxes are cut off at the image's border after the suppression, as in detectron2
        (torchvision: before)."""
        return [self.select([level[i] for level in head_outputs["cls_logits"]],
                            [level[i] for level in head_outputs["bbox_regression"]],
                            anchors[i], shape) for i, shape in enumerate(image_shapes)]

    def select(self, logits, offsets, anchors, image_shape):
        """One image's detections: a dict of boxes (n, 4), scores (n,), best first, labels (n,)."""
        boxes, scores, labels = [], [], []
        for level_logits, level_offsets, level_anchors in zip(logits, offsets, anchors):
            level_scores = level_logits.sigmoid().flatten()  # (A_l K,)
            kept = torch.where(level_scores > self.score_thresh)[0]
            best = level_scores[kept].topk(min(self.topk_candidates, len(kept))).indices
            at, label = kept[best] // self.num_classes, kept[best] % self.num_classes
            boxes.append(self.box_coder.decode_single(level_offsets[at], level_anchors[at]))
            scores.append(level_scores[kept[best]])
            labels.append(label + 1)
        boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[:self.detections_per_img]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        boxes = clip_boxes_to_image(boxes, image_shape)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return dict(boxes=boxes[inside], scores=scores[inside], labels=labels[inside])


def pyramid_parts(fpn, names):
    """The parts of a PyramidFromP3's fpn to load from a file of tensors ``names``, by their names
    there: all of it, or P3 to P5 of a pyramid that begins at P2, as SoCo's."""
    if any("backbone.fpn.extra_blocks." in name for name in names):
        return {"backbone.fpn.": fpn}
    return {f"backbone.fpn.{kind}.{level + 1}.": blocks[level] for level in range(3)
            for kind, blocks in (("inner_blocks", fpn.inner_blocks),
                                 ("layer_blocks", fpn.layer_blocks))}
