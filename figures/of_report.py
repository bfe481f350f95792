"""The report's figures (Rajamohan et al.): what detectors find (Fig. 1), and the mean of each level
over channels (Fig. 2a)."""
import argparse
from itertools import islice

from torchvision.ops import box_iou

from common import InputError
from detection.masks import Unpacked
from detection.models import (Pyramid, detect, detector_from_args, load_fine_tuned, load_part,
                              restore)
from figures.backbones import load_all, pictures, squares
from plumbing.drawing import draw_detections, image_grid, show
from plumbing.weights import name_weights


def features(args, device):
    """The mean over channels of each level (the report, Fig. 2a): Res2..Res5, or P2..P5 where the
    file has an FPN of four levels with batch norm (RetinaNet's has three levels)."""
    networks, items = load_all(args, device)
    items, rows = [*islice(items, args.rows)], []
    x = squares(items, args, device)
    heights = [image.shape[1] / image.shape[2] for image, _ in items for _ in networks]
    figure, axes = image_grid(heights, [1] * 5, "mean of each level over channels: from the least "
                              "(dark) to the most (light)")
    for n, (label, network, rest) in enumerate(networks):
        lateral = [v for k, v in rest.items() if k.endswith("fpn.inner_blocks.3.1.weight")]
        if lateral:
            network = Pyramid(network, len(lateral[0])).eval().to(device)
            load_part(network.fpn, "backbone.fpn.", rest, args.weights[n])
        levels = [*network(x).values()][:4] if lateral else network(x)
        for i, (image, _) in enumerate(items):
            line = axes[i * len(networks) + n]
            show(line[0], image, left=label)
            for number, ax, level in zip(range(2, 6), line[1:], levels):
                # Paper silent: how the channels become one map; here by their mean
                name, mean = f"{'P' if lateral else 'Res'}{number}", level[i].float().mean(0).cpu()
                show(ax, image, name, mean, f"{mean.min():.2g} to {mean.max():.2g}")
                rows.append(dict(weights=label, image=i, level=name, least=mean.min(),
                                 mean=mean.mean(), most=mean.max()))
    return figure, rows


def detections(args, device):
    """Annotations above what fine-tuned detectors find (the report, Fig. 1); ``none`` is the first
    of these detectors with random weights, of its backbone too."""
    name_weights(args)
    tuned = {path: load_fine_tuned(path) for path in args.weights if path != "none"}
    if not tuned:
        raise InputError("detections needs --weights with a checkpoint of finetune_fasterrcnn")
    first = [*tuned.values()][0]["args"]
    args.classes = first["classes"]
    if args.dataset is None:
        args.dataset, args.split = first["dataset"], args.split or first["test_split"]
        args.data = args.data or first["data"]
    if args.data and args.dataset == "scenes":
        raise InputError("detections of --data need --dataset voc or coco")
    more = [first[name] and args.dataset != "voc" for name in ("masks", "keypoints")]
    items, found, rows = [*islice(pictures(args, *more), args.rows)], {}, []
    for label, path in zip(args.labels, args.weights):
        own = dict(tuned[path]["args"] if path in tuned else first, weights="none", seed=args.seed)
        if own["classes"] != args.classes:
            raise InputError(f"{path} knows other classes: {' '.join(own['classes'])}")
        model = detector_from_args(argparse.Namespace(**own))
        if path in tuned:
            restore(model, tuned[path], path)
        found[label] = Unpacked(detect(model.eval().to(device), [image for image, _ in items],
                                       device))
        for i, (seen, (_, truth)) in enumerate(zip(found[label], items)):
            drawn = seen["scores"] >= args.score
            judged = ~truth["ignore"]
            hit = box_iou(truth["boxes"][judged].float(), seen["boxes"][drawn]) >= 0.5
            hit &= truth["labels"][judged][:, None] == seen["labels"][drawn]
            rows.append(dict(weights=label, image=i, annotated=judged.sum(),
                             found=hit.any(1).sum(), detections=len(seen["boxes"]),
                             drawn=drawn.sum(), best_score=max([0.0, *seen["scores"].tolist()])))
    return draw_detections(items, found, args.classes, args.score), rows
