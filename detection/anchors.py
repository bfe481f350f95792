"""The anchors of all detectors, as detectron2's (modeling/anchor_generator.py)."""
import math

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator


class Anchors(AnchorGenerator):
    """torchvision's, but in float32, with sides that are not rounded and strides that are fixed.

    torchvision's sides are whole pixels; its stride is the padded image's side over the map's, 61
    for P6 of 800 pixels in place of 64; and it computes in the maps' precision, where bfloat16
    moves anchors by pixels.

    sizes: of each level, the square roots of its anchors' areas; strides: of each level, in pixels.
    """

    def __init__(self, sizes, strides):
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))  # heights over widths
        self.strides = [(stride, stride) for stride in strides]

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        """One level's anchors around 0, (A, 4): ratio by ratio of one size after the other."""
        boxes = []
        for size in scales:
            for ratio in aspect_ratios:
                w = math.sqrt(size ** 2 / ratio)
                h = ratio * w
                boxes.append([-w / 2, -h / 2, w / 2, h / 2])
        return torch.tensor(boxes, dtype=dtype, device=device)

    def forward(self, images, maps):
        """The anchors of all levels, (A, 4), x1 y1 x2 y2, once for each of the images."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        levels = self.grid_anchors([m.shape[-2:] for m in maps], self.strides)
        return [torch.cat(levels)] * len(images.image_sizes)
