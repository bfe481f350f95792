"""torchvision's Faster R-CNN (Ren et al., arXiv 1506.01497) as MoCo, DetCo and DUPR fine-tune it.

`c4`: the RPN on Res4, Res5 as the box head with one more batch norm after it (MoCo, appendix).
`fpn`: on a feature pyramid (Lin et al., arXiv 1612.03144) with batch norm in it.  All layers train,
and batch norm trains with them: self-supervised features are of another scale than supervised ones,
and frozen statistics would not fit them.
"""
import copy
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common import InputError, ResNetStages, backbone_stages, rank
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD
from plumbing.weights import AVERAGED, load_backbone, load_checkpoint

RATIOS = 0.5, 1.0, 2.0  # heights of the anchors over their widths
# Differs: detectron2 shifts RoIAlign by half a pixel, which is no option of torchvision's
roi_align = partial(MultiScaleRoIAlign, sampling_ratio=0)


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


def _c4_parts(stages, sizes, rois):
    """The C4 detector's backbone, the width of its box head, and FasterRCNN's other parts."""
    *shallow, res5 = stages.named_children()
    backbone = nn.Sequential(OrderedDict(shallow))  # (B, C, H/16, W/16); ResNet-50: C = 1024
    backbone.out_channels, width = stages.channels[2:]
    box_head = nn.Sequential(OrderedDict([
        res5,  # RoIs (N, 1024, 14, 14) -> (N, 2048, 7, 7)
        ("norm", nn.BatchNorm2d(width)),
        ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]))  # (N, 2048)
    return backbone, width, dict(
        rpn_anchor_generator=AnchorGenerator((sizes,), (RATIOS,)), box_head=box_head,
        box_roi_pool=roi_align(["0"], output_size=14),
        rpn_pre_nms_top_n_train=12000, rpn_pre_nms_top_n_test=6000,  # as detectron2's C4
        rpn_post_nms_top_n_train=min(2000, 4 * rois))


def _fpn_parts(stages, channels, sizes, rois, box_head):
    """The same parts of the FPN detector."""
    parts = dict(
        rpn_anchor_generator=AnchorGenerator([(size,) for size in sizes], [RATIOS] * 5),
        box_roi_pool=roi_align(["0", "1", "2", "3"], output_size=7),
        rpn_post_nms_top_n_train=min(1000, 4 * rois))
    backbone = Pyramid(stages, channels)
    if box_head == "4conv1fc":
        parts["box_head"] = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024],
                                               norm_layer=nn.BatchNorm2d)
    return backbone, 1024, parts


def build_detector(arch, num_classes, detector="fpn", fpn_channels=256, min_size=(800,),
                   max_size=1333, anchor_size=32, rois=512, weights="none", box_head=None,
                   mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone_only=False):
    """torchvision's Faster R-CNN, "fpn" or "c4", with batch norm, all trainable.

    num_classes: without the background.  weights: a file for load_backbone, or "none"; unless
    backbone_only, an FPN and a box head that it holds under this detector's names are loaded too.
    box_head, of the FPN: "4conv1fc" (SoCo's: 4 convolutions with batch norm, 1 linear layer), or
    None: as in weights, or else torchvision's two linear layers.  mean, std: of red, green and blue
    in 0..1.
    In training it takes lists of images (3, H, W) float 0..1 and of targets, and returns a dict of
    losses; in eval mode a list of dicts boxes, labels (from 1), scores, at most 100 of an image.
    Raises InputError: C4 of another backbone than a ResNet, weights that do not fit.
    """
    stages = backbone_stages(arch)
    if detector == "c4" and not isinstance(stages, ResNetStages):
        raise InputError(f"--detector c4 is of ResNets, {arch} needs --detector fpn")
    rest = load_backbone(stages, weights) if weights != "none" else {}
    rest = {} if backbone_only else rest
    # Differs: torchvision rounds the anchors' sides to whole pixels, detectron2 does not
    sizes = tuple(anchor_size * 2 ** i for i in range(5))
    if detector == "c4":
        backbone, width, parts = _c4_parts(stages, sizes, rois)
    else:
        if any(name.endswith("roi_heads.box_head.0.0.weight") for name in rest):
            box_head = "4conv1fc"
        backbone, width, parts = _fpn_parts(stages, fpn_channels, sizes, rois, box_head)
    # Differs: box losses are smooth L1 (detectron2: L1), and the predictors' weights start at
    # torch's default scale (detectron2: standard deviations of 0.01 and 0.001)
    model = FasterRCNN(backbone, box_predictor=FastRCNNPredictor(width, num_classes + 1),
                       min_size=tuple(min_size), max_size=max_size, box_batch_size_per_image=rois,
                       rpn_post_nms_top_n_test=min(1000, 2 * rois), image_mean=list(mean),
                       image_std=list(std), **parts)
    if detector == "fpn":
        load_part(model.backbone.fpn, "backbone.fpn.", rest, weights)
        load_part(model.roi_heads.box_head, "roi_heads.box_head.", rest, weights)
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(as_float32)  # bfloat16 would round boxes by whole pixels
    return model


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
                         "--backbone-only leaves it out") from None
    if rank() == 0:
        print(f"{path}: {len(found)} tensors loaded from '{prefix}*'", flush=True)


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
    return saved


def detector_from_args(args):
    """The detector that the arguments of finetune_fasterrcnn describe, initialised from --seed."""
    torch.manual_seed(args.seed)
    return build_detector(args.arch, len(args.classes), args.detector, args.fpn_channels,
                          args.min_size, args.max_size, args.anchor_size, args.rois, args.weights,
                          args.box_head, args.mean, args.std, args.backbone_only)


def restore(model, saved, path):
    """Load what load_fine_tuned read from ``path``.  Raises InputError if it does not fit."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(f"{path} holds another detector: "
                         f"{' '.join(str(error).split())[:200]}") from None


@torch.no_grad()
def detect(model, images, device):
    """Images (3, H, W) uint8 -> a list of dicts boxes (n, 4), labels (n,) from 0, scores (n,), on
    the CPU; best first.  One by one: a batch's padding would depend on who shares it."""
    found = [model([image.to(device, non_blocking=True).float() / 255])[0] for image in images]
    return [dict(boxes=f["boxes"].cpu(), labels=f["labels"].cpu() - 1, scores=f["scores"].cpu())
            for f in found]


def training_bytes(model, images, height, width, rois):
    """About how much memory a training step takes in float32: what the layers put out for the
    backward pass, of that many images of this size, and weights, gradients and momentum."""
    model, total = copy.deepcopy(model).to("meta"), [0]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            module.register_forward_hook(
                lambda _module, _inputs, output: total.append(4 * output.numel()))
    maps = model.backbone(torch.empty(images, 3, height, width, device="meta"))
    maps = [*maps.values()] if isinstance(maps, dict) else [maps]
    model.rpn.head(maps)
    size = model.roi_heads.box_roi_pool.output_size
    model.roi_heads.box_head(torch.empty(images * rois, maps[0].shape[1], *size, device="meta"))
    return sum(total) + 12 * sum(p.numel() for p in model.parameters())
