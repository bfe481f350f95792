"""The detectors that MoCo, DetCo and DUPR fine-tune, as detectron2 computes them.

Faster R-CNN (Ren et al., arXiv 1506.01497) and Mask R-CNN, in two kinds each, Keypoint R-CNN and
RetinaNet.

`c4`: the RPN on Res4, Res5 as the box head with one more batch norm after it (MoCo, appendix).
`fpn`: on a feature pyramid (Lin et al., arXiv 1612.03144) with batch norm in it.
`retinanet`: in one stage, on a pyramid from P3 to P7 (Lin et al., arXiv 1708.02002).
All layers train, and batch norm trains with them: self-supervised features are of another scale
than supervised ones, and frozen statistics would not fit them.

The parts are torchvision's.  Where detectron2 (config/defaults.py, configs/Base-RCNN-C4.yaml and
Base-RCNN-FPN.yaml) computes otherwise, so does this file: RoI Align, anchors, losses, the padding
of images, the weights at the start.
"""
import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.faster_rcnn import (FastRCNNConvFCHead, FastRCNNPredictor,
                                                      TwoMLPHead)
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common import InputError, PyramidRoIAlign, ResNetStages, backbone_stages, rank
from detection.anchors import Anchors
from detection.instance_heads import (crop_masks, find_keypoints, keypoint_layers, mask_layers,
                                      mask_loss, paste_masks)
from detection.masks import to_runs
from detection.retinanet import PyramidFromP3, RetinaNet, pyramid_parts
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD
from plumbing.weights import AVERAGED, load_backbone, load_checkpoint


class RPN(rpn.RegionProposalNetwork):
    """torchvision's RPN with detectron2's order and loss (modeling/proposal_generator/rpn.py)."""

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """torchvision's, which sorts by the sigmoid: in float32 that is 1 for all logits above 17.
        detectron2 sorts by the logits, and the sigmoid of a sixteenth keeps their order."""
        return super().filter_proposals(proposals, objectness / 16, image_shapes,
                                        num_anchors_per_level)

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Cross entropy of the sampled anchors, L1 distance of the positive ones' deltas: sums,
        divided by the number that should be sampled, 256 of an image."""
        positive, negative = (torch.cat(chosen) > 0 for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        number = self.fg_bg_sampler.batch_size_per_image * len(labels)
        cross_entropy = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum")
        distance = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive],
                             reduction="sum")
        return cross_entropy / number, distance / number


def box_head_losses(logits, deltas, labels, targets, beta=0.0):
    """Cross entropy of all sampled RoIs, L1 distance of the deltas of those that are objects: means
    over all (detectron2's modeling/roi_heads/fast_rcnn.py).

    logits: (N, K + 1); deltas: (N, 4 (K + 1)), of each class; labels: (N,), 0 is background;
    targets: (N, 4).  beta: the distance below which it is a square, d^2 / (2 beta), and above it
    less by beta / 2.  Returns two scalars.
    """
    objects = (labels > 0).nonzero().squeeze(1)
    deltas = deltas.unflatten(1, (-1, 4))[objects, labels[objects]]  # (objects, 4)
    distance = F.smooth_l1_loss(deltas, targets[objects], reduction="sum", beta=beta)
    distance = distance / max(1, len(labels))
    return F.cross_entropy(logits, labels), distance


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's box head and what samples for it, with detectron2's loss; and, with a
    mask_predictor or a keypoint_predictor, the masks or keypoints of objects.

    object_pool: RoI Align for these; None: masks are made of the box head's RoIs after its first
    two layers, C4's Res5 and its norm, as in detectron2's Res5ROIHeads.  beta: of box_head_losses.
    """

    def __init__(self, *args, beta=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.object_pool, self.beta = None, beta

    def forward(self, features, proposals, image_shapes, targets=None):
        """torchvision's forward, with this file's losses in training.  In eval mode the dicts also
        have mask_probabilities (n, S, S), and keypoints as find_keypoints gives them."""
        if not self.training:
            found, losses = super().forward(features, proposals, image_shapes)
            self._add_objects(features, found)
            return found, losses
        proposals, objects, labels, deltas = self.select_training_samples(proposals, targets)
        regions = self.box_roi_pool(features, proposals)
        if self._shares_regions():
            regions = self.box_head[:2](regions)
            h = self.box_head[2:](regions)
        else:
            h = self.box_head(regions)
        classifier, box = box_head_losses(*self.box_predictor(h), torch.cat(labels),
                                          torch.cat(deltas), self.beta)
        losses = dict(loss_classifier=classifier, loss_box_reg=box)
        positive = [label > 0 for label in labels]  # the RoIs that are objects
        boxes, objects, labels = ([part[chosen] for part, chosen in zip(parts, positive)]
                                  for parts in (proposals, objects, labels))
        if self._shares_regions():
            regions = regions[torch.cat(positive)]
        elif self.object_pool is not None:
            regions = self.object_pool(features, boxes)
        if self.mask_predictor is not None:
            logits = self.mask_logits(regions)
            # cropped from the masks as annotated: torchvision would resize them with the image, by
            # the nearest pixel
            crops = [crop_masks(target["bitmasks"],
                                resize_boxes(box, shape, target["bitmasks"].shape[1:]), number,
                                logits.shape[-1])
                     for target, box, shape, number in zip(targets, boxes, image_shapes, objects)]
            losses["loss_mask"] = mask_loss(logits, torch.cat(labels), torch.cat(crops))
        if self.keypoint_predictor is not None:
            maps = self.keypoint_predictor(self.keypoint_head(regions))
            losses["loss_keypoint"] = roi_heads.keypointrcnn_loss(  # it takes a view of maps
                maps.contiguous(), boxes, [target["keypoints"] for target in targets], objects)
        return [], losses

    def _shares_regions(self):
        return self.mask_predictor is not None and self.object_pool is None

    def mask_logits(self, regions):
        """RoIs (N, C, S / 2, S / 2) -> (N, K + 1, S, S)."""
        return self.mask_predictor(self.mask_head(regions) if self.mask_head else regions)

    def _add_objects(self, features, found):
        """Add to the dicts of each image's detections what there is of each object."""
        boxes, labels = ([f[name] for f in found] for name in ("boxes", "labels"))
        if self._shares_regions():
            regions = self.box_head[:2](self.box_roi_pool(features, boxes))
        elif self.object_pool is not None:
            regions = self.object_pool(features, boxes)
        if self.mask_predictor is not None:
            logits, labels = self.mask_logits(regions), torch.cat(labels)
            own = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
            for f, probabilities in zip(found, own.split([len(box) for box in boxes])):
                f["mask_probabilities"] = probabilities
        if self.keypoint_predictor is not None:
            maps = self.keypoint_predictor(self.keypoint_head(regions))
            for f, keypoints in zip(found, find_keypoints(maps, boxes)):
                f["keypoints"] = keypoints


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


def _c4_parts(stages, sizes):
    """The C4 detector's backbone, anchors, RoI Align, box head and its width."""
    *shallow, res5 = stages.named_children()
    backbone = nn.Sequential(OrderedDict(shallow))  # (B, C, H/16, W/16); ResNet-50: C = 1024
    backbone.out_channels, width = stages.channels[2:]
    box_head = nn.Sequential(OrderedDict([
        res5,  # RoIs (N, 1024, 14, 14) -> (N, 2048, 7, 7)
        ("norm", nn.BatchNorm2d(width)),
        ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]))  # (N, 2048)
    return backbone, Anchors((sizes,), (16,)), PyramidRoIAlign(14, (16,)), box_head, width


def _fpn_parts(stages, channels, sizes, box_head):
    """The same parts of the FPN detector."""
    strides = 4, 8, 16, 32, 64
    if box_head == "4conv1fc":
        box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024],
                                      norm_layer=nn.BatchNorm2d)
    else:
        box_head = TwoMLPHead(channels * 7 * 7, 1024)
    for layer in box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return (Pyramid(stages, channels), Anchors([(size,) for size in sizes], strides),
            PyramidRoIAlign(7, strides[:4]), box_head, 1024)


def _add_object_heads(heads, detector, channels, num_classes, masks, keypoints, box_head):
    """Add the heads of masks or keypoints to RoIHeads.  channels: of the FPN, or of C4's Res5."""
    if detector == "fpn" and (masks or keypoints):
        heads.object_pool = PyramidRoIAlign(14, heads.box_roi_pool.strides)
    if masks and detector == "c4":
        heads.mask_head, heads.mask_predictor = mask_layers(channels, 256, num_classes, 0, None)
    elif masks:
        # Paper silent: batch norm where SoCo's box head has it, as in its R_50_FPN_1x.yaml, and
        # none otherwise, as in detectron2's configurations: MoCo (Sec. 4.2) has it "in the newly
        # initialized layers (e.g., FPN)", but no published configuration for it
        norm = nn.BatchNorm2d if box_head == "4conv1fc" else None
        heads.mask_head, heads.mask_predictor = mask_layers(channels, channels, num_classes, 4,
                                                            norm)
    if keypoints:  # detectron2's have 512 channels on an FPN of 256
        heads.keypoint_head, heads.keypoint_predictor = keypoint_layers(channels, 2 * channels)


def _retinanet(backbone, num_classes, anchor_size, rest, weights, min_size, max_size, mean, std):
    """RetinaNet on a pyramid, the parts of which are loaded from ``rest``, tensors of the file
    ``weights``, where it has them."""
    model = RetinaNet(backbone, num_classes, anchor_size, min_size=tuple(min_size),
                      max_size=max_size, image_mean=list(mean), image_std=list(std))
    for name, part in pyramid_parts(model.backbone.fpn, rest).items():
        load_part(part, name, rest, weights)
    return in_float32(model, model.head.classification_head, model.head.regression_head)


def build_detector(arch, num_classes, detector="fpn", fpn_channels=256, min_size=(800,),
                   max_size=1333, anchor_size=32, rois=512, weights="none", box_head=None,
                   mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone_only=False, masks=False,
                   keypoints=False):
    """Faster R-CNN or, with ``masks``, Mask R-CNN, "fpn" or "c4", or with ``keypoints`` Keypoint
    R-CNN, "fpn"; or "retinanet"; all trainable.

    num_classes: without the background.  weights: a file for load_backbone, or "none"; unless
    backbone_only, an FPN and a box head under this detector's names are loaded from it too.
    box_head, of the FPN: "4conv1fc" (SoCo's: 4 convolutions with batch norm, 1 linear layer), or
    None: as in weights, or else two linear layers.  mean, std: of red, green and blue in 0..1.
    In training it takes lists of images (3, H, W) float 0..1 and of targets, and returns a dict of
    losses; in eval mode a list of dicts boxes, labels (from 1), scores, at most 100 of an image.
    With masks, targets also have bitmasks (n, H, W) bool, and the dicts mask_probabilities
    (n, S, S), S = 28 of the FPN, 14 of C4; with keypoints both have keypoints (n, 17, 3).
    Raises InputError: a detector without such a backbone or heads; weights that do not fit.
    """
    stages = backbone_stages(arch)
    if detector == "c4" and not isinstance(stages, ResNetStages):
        raise InputError(f"--detector c4 is of ResNets, {arch} needs --detector fpn")
    if keypoints and detector != "fpn" or masks and detector == "retinanet":
        raise InputError("--keypoints needs --detector fpn, --masks needs fpn or c4")
    rest = load_backbone(stages, weights) if weights != "none" else {}
    # SoCo's checkpoint.pt calls the box head online.head
    rest = {} if backbone_only else {
        name.replace("online.head.", "online.roi_heads.box_head."): v for name, v in rest.items()}
    if detector == "retinanet":
        return _retinanet(PyramidFromP3(stages, fpn_channels), num_classes, anchor_size, rest,
                          weights, min_size, max_size, mean, std)
    sizes = tuple(anchor_size * 2 ** i for i in range(5))
    if detector == "c4":
        backbone, anchors, pool, head, width = _c4_parts(stages, sizes)
    else:
        if any(name.endswith("roi_heads.box_head.0.0.weight") for name in rest):
            box_head = "4conv1fc"
        backbone, anchors, pool, head, width = _fpn_parts(stages, fpn_channels, sizes, box_head)
    proposals = _proposals(backbone.out_channels, anchors, detector, rois, keypoints)
    # Differs: boxes with a side below 0.01 pixels are no detections; detectron2 keeps them
    heads = RoIHeads(pool, head, box_predictor(width, num_classes), fg_iou_thresh=0.5,
                     bg_iou_thresh=0.5, batch_size_per_image=rois, positive_fraction=0.25,
                     bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), score_thresh=0.05, nms_thresh=0.5,
                     detections_per_img=100, beta=0.5 if keypoints else 0.0)
    _add_object_heads(heads, detector, fpn_channels if detector == "fpn" else width, num_classes,
                      masks, keypoints, box_head)
    # Differs: an image's sides are rounded down when it is resized, and it is not smoothed before
    # it is made smaller; detectron2 rounds to the next pixel, and PIL smooths
    transform = GeneralizedRCNNTransform(tuple(min_size), max_size, list(mean), list(std),
                                         size_divisible=1 if detector == "c4" else 32)
    model = GeneralizedRCNN(backbone, proposals, heads, transform)
    if detector == "fpn":
        load_part(model.backbone.fpn, "backbone.fpn.", rest, weights)
        load_part(model.roi_heads.box_head, "roi_heads.box_head.", rest, weights)
    predictors = heads.box_predictor, heads.mask_predictor, heads.keypoint_predictor
    return in_float32(model, model.rpn.head, *filter(None, predictors))


def _proposals(channels, anchors, detector, rois, keypoints):
    """The region proposal network of the C4 or the FPN detector."""
    # Differs: few RoIs need few proposals, also before NMS, which took a sixth of the time of a
    # small recipe on CPUs.  With the default of 512 RoIs all are detectron2's numbers.
    if detector == "c4":
        before_nms, after_nms = dict(training=min(12000, 24 * rois), testing=6000), 2000
    else:
        before_nms = dict(training=min(2000, 8 * rois), testing=1000)  # of a level
        after_nms = 1500 if keypoints else 1000  # Base-Keypoint-RCNN-FPN.yaml, also of beta
    after_nms = dict(training=min(after_nms, 4 * rois), testing=min(1000, 2 * rois))
    proposals = RPN(anchors, rpn.RPNHead(channels, len(anchors.cell_anchors[0])),
                    fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256,
                    positive_fraction=0.5, pre_nms_top_n=before_nms, post_nms_top_n=after_nms,
                    nms_thresh=0.7)
    proposals.min_size = torch.finfo(torch.float32).tiny  # whatever has an area; torchvision: 0.001
    return proposals


def box_predictor(width, num_classes):
    """(N, width) -> class scores (N, K + 1), background first, and deltas (N, 4 (K + 1)),
    initialised as in detectron2.  No loss uses the background's deltas, which detectron2 does not
    predict."""
    predictor = FastRCNNPredictor(width, num_classes + 1)
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(predictor.cls_score.bias)
    nn.init.zeros_(predictor.bbox_pred.bias)
    return predictor


def load_part(module, name, rest, path):
    """Load a detector's part ``name`` from a file that may hold it, under any prefix.

    rest: tensors by name, what load_backbone left of the file ``path``.  Raises InputError if the
    file's part is another one."""
    prefixes = dict.fromkeys(key[:key.index(name)] + name for key in rest if name in key)
    if not prefixes:
        return
    # of several, the trained one and not an average of it, as load_backbone
    prefix = min(prefixes, key=lambda p: bool(AVERAGED.search(p)))
    found = {key.removeprefix(prefix): tensor for key, tensor in rest.items()
             if key.startswith(prefix)}
    try:
        module.load_state_dict(found)
    except RuntimeError as error:
        raise InputError(f"{path}: {prefix}*: {' '.join(str(error).split())[:200]} ...; "
                         "finetune_fasterrcnn.py --backbone-only leaves it out") from None
    if rank() == 0:
        print(f"{path}: {len(found)} tensors loaded from '{prefix}*'", flush=True)


def in_float32(model, *parts):
    """Make the outputs of these parts float32 under autocast too, as bfloat16 would move boxes by
    whole pixels -> the model."""
    for part in parts:
        part.register_forward_hook(as_float32)
    return model


def as_float32(_module, _inputs, output):
    """Forward hook: the output, however nested, in float32."""
    if torch.is_tensor(output):
        return output.float()
    return type(output)(as_float32(None, None, part) for part in output)


def load_fine_tuned(path):
    """The content of a checkpoint of finetune_fasterrcnn, a dict with its args and its model.
    Raises InputError if the file is none."""
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or saved.get("method") != "finetune_fasterrcnn":
        raise InputError(f"{path} is no checkpoint of finetune_fasterrcnn")
    saved["args"] = {"masks": False, "keypoints": False, **saved["args"]}  # new flags
    return saved


def detector_from_args(args):
    """The detector that the arguments of finetune_fasterrcnn describe, initialised from --seed."""
    torch.manual_seed(args.seed)
    return build_detector(args.arch, len(args.classes), args.detector, args.fpn_channels,
                          args.min_size, args.max_size, args.anchor_size, args.rois, args.weights,
                          args.box_head, args.mean, args.std, args.backbone_only, args.masks,
                          args.keypoints)


def restore(model, saved, path):
    """Load what load_fine_tuned read from ``path``.  Raises InputError if it does not fit."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(f"{path} holds another detector: "
                         f"{' '.join(str(error).split())[:200]}") from None


@torch.no_grad()
def detect(model, images, device):
    """Images (3, H, W) uint8 -> a list of dicts boxes (n, 4), labels (n,) from 0, scores (n,), and
    with masks size (H, W) and runs, a list of n, as masks.to_runs gives them; with keypoints
    (n, 17, 3), x y as COCO's pixel indices; on the CPU; best first.  One by one: a batch's padding
    would depend on who shares it."""
    found = []
    for image in images:
        f = model([image.to(device, non_blocking=True).float() / 255])[0]
        f = {name: tensor.cpu() for name, tensor in f.items()}
        found.append(dict(boxes=f["boxes"], labels=f["labels"] - 1, scores=f["scores"]))
        if "mask_probabilities" in f:
            size = tuple(image.shape[1:])
            found[-1].update(size=size, runs=[*map(to_runs, paste_masks(
                f["mask_probabilities"], f["boxes"], *size))])
        if "keypoints" in f:  # pixel middles -> COCO's pixel indices
            found[-1]["keypoints"] = f["keypoints"] - torch.tensor([0.5, 0.5, 0])
    return found


def training_bytes(model, images, height, width, rois):
    """About how many bytes a training step by SGD takes in float32: the layers' outputs, kept for
    the backward pass, of that many images of this size in pixels and RoIs of each, and weights,
    gradients and momentum."""
    model, total = copy.deepcopy(model).to("meta"), [0]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Linear)):
            module.register_forward_hook(
                lambda _module, _inputs, output: total.append(4 * output.numel()))
    maps = model.backbone(torch.empty(images, 3, height, width, device="meta"))
    maps = [*maps.values()] if isinstance(maps, dict) else [maps]
    if isinstance(model, RetinaNet):
        logits = model.head(maps)["cls_logits"]  # the focal loss keeps eight tensors of this size
        return sum(total) + 28 * logits.numel() + 12 * sum(p.numel() for p in model.parameters())
    model.rpn.head(maps)
    heads, channels = model.roi_heads, maps[0].shape[1]
    size = heads.box_roi_pool.size
    heads.box_head(torch.empty(images * rois, channels, size, size, device="meta"))
    if heads.object_pool is not None:
        size = heads.object_pool.size
    elif heads.mask_predictor is not None:  # Res5's output
        channels, size = heads.mask_predictor.conv5_mask.in_channels, size // 2
    # a quarter of the RoIs may be objects
    regions = torch.empty(images * rois // 4, channels, size, size, device="meta")
    if heads.mask_predictor is not None:
        heads.mask_logits(regions)
    if heads.keypoint_predictor is not None:
        heads.keypoint_predictor(heads.keypoint_head(regions))
    return sum(total) + 12 * sum(p.numel() for p in model.parameters())
