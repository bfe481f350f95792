"""What each method feeds its network: the views that it cuts of one image."""
import importlib

import torch
from torch.utils.data import default_collate
from torchvision.utils import make_grid

from common import box_into_view
from figures.backbones import pictures
from plumbing.drawing import PALETTE, image_grid, mark_places, outline, show
from plumbing.images import augment_colour, two_views
from selective_search import propose

METHODS = {  # module: the method's name in its paper, and what its network has to do
    "moco_v2": ("MoCo v2", "1 must match 2 among other images"),
    "detco": ("DetCo", "as MoCo v2 at four stages; nine patches: 3 must match 4 and 2"),
    "dupr": ("DUPR", "as MoCo v2 at four stages; a place (colour) in 1 must match 2's"),
    "soco": ("SoCo", "a box (colour) must have one embedding in all views"),
    "barlow_twins": ("Barlow Twins", "dimensions must agree in 1 and 2, but not with each other"),
    "vicreg": ("VICReg", "1 and 2 must have one embedding, of varied, unrelated dimensions")}


def views_of(method, image, args):
    """The views that a method (its module) cuts of an image (3, H, W) uint8: a list of (View, its
    pixels (3, h, w) float 0..1 as the network gets them, what all views share, in these pixels:
    SoCo's boxes, [(level of the pyramid, (4,)), ...], DUPR's a rectangle (4,) and its flip)."""
    name, shared = method.__name__, [()] * 4
    if name == "soco":
        args.view4 = args.view4 or args.image_size * 6 // 7  # 192 beside 224
        proposals = torch.from_numpy(propose(image, "single", 224)).float()
        cut, places, _ = method.make_views((image, proposals), args)
        levels = method.Network("resnet18", 8, 8, 8).pool.map_levels
        for i, view in enumerate(default_collate([cut])):  # batches of one
            size = view.pixels.shape[-1]
            boxes = box_into_view(places[None], view.box, view.flipped, size)[0]  # (P, 4)
            boxes = boxes if i else method.jitter_boxes(boxes, size, args.jitter)
            shared[i] = [(f"P{n + 2}", box) for n, box in zip(levels(boxes), boxes.tolist())]
    elif name in ("detco", "dupr"):
        cut = method.cut_views(image, args)
    else:
        interpolation = "bilinear" if name == "moco_v2" else "bicubic"
        cut = two_views(image, args.image_size, (args.crop_scale, 1.0), interpolation)
    if name == "dupr":
        *places, valid = method.overlap(*default_collate([cut]))
        shared = [(roi[0].tolist(), bool(flipped)) if valid else () for roi, flipped in places]
    seen = []
    for i, view in enumerate(cut):
        view, *corners = view if len(view) == 2 else [view]  # detco.LocalView
        colours = dict(p_blur=args.p_blur)
        if name in ("soco", "barlow_twins", "vicreg"):
            colours = dict(jitter=(0.4, 0.4, 0.2, 0.1), p_blur=args.p_blur[min(i, 1)],
                           p_solarize=0.2 if i else 0.0)
        pixels = augment_colour(view.pixels[None], mean=(0, 0, 0), std=(1, 1, 1), **colours)
        if corners:
            patches = method.cut_patches(pixels, corners[0][None], args.patch_size)
            pixels = make_grid(patches[0], 3, padding=2, pad_value=1)[None]
        seen.append((view, pixels[0].clamp(0, 1), shared[i]))
    return seen


def views(args, _device):
    """An image, and what each method's network gets of it (SoCo's fourth view: SoCo* only)."""
    (image, _), rows = next(pictures(args)), []
    widths = [image.shape[2] / image.shape[1], 1, 1, 1, 1]
    figure, axes = image_grid([1] * len(args.methods), widths)
    for name, line in zip(args.methods, axes):
        torch.manual_seed(args.seed)
        method, (title, text) = importlib.import_module(name), METHODS[name]
        recipe = method.parse_args(["--data", args.data] if args.data else [])
        show(line[0], image)
        name_drawn = line[0].set_title(title, loc="left", weight="bold")
        line[0].annotate(text, (1, 0), (10, 0), xycoords=name_drawn, fontsize=9, in_layout=False,
                         textcoords="offset points", annotation_clip=False)
        seen, side = views_of(method, image, recipe), 7 if args.data else 4  # of DUPR's places
        for i, (view, pixels, shared) in enumerate(seen, 1):
            size, flipped = view.pixels.shape[-1], ", flipped" if view.flipped else ""
            show(line[i], pixels, below=f"{i}: {size} px{flipped}")
            rows.append(dict(method=name, view=i, pixels=size, flipped=int(view.flipped),
                             **dict(zip(("x1", "y1", "x2", "y2"), view.box.tolist()))))
            if name == "dupr" and shared:
                mark_places(line[i], *shared, side)
            elif name == "soco":
                levels, boxes = zip(*shared)
                outline(line[i], boxes, PALETTE, levels)
                rows[-1]["levels"] = " ".join(levels)
        outline(line[0], [view.box.tolist() for view, *_ in seen], ["black"] * 4, "1234")
        if name == "dupr" and shared:
            (box,), _ = method.intersect(*(view.box[None] for view, *_ in seen))
            mark_places(line[0], box.tolist(), False, side)
    return figure, rows
