r"""Fine-tune Faster, Mask or Keypoint R-CNN or RetinaNet from a pre-trained backbone, and measure
its AP.

MoCo, DetCo and DUPR measure a pre-trained backbone by what a detector makes of it: Faster R-CNN
(Ren et al., NIPS 2015, arXiv 1506.01497), as C4 or with a feature pyramid (Lin et al., CVPR 2017,
arXiv 1612.03144), or RetinaNet (Lin et al., ICCV 2017, arXiv 1708.02002) is fine-tuned with a fixed
recipe, and all its layers train.  On COCO it is Mask R-CNN (He et al., ICCV 2017, arXiv
1703.06870), --masks, and Keypoint R-CNN (Sec. 5), --keypoints.

Read first: one of the methods, for where --weights comes from.  Then detection/models.py, the
detectors; detection/average_precision.py, the measure; detection/formats.py and data.py, the data.
"The report" is Rajamohan, Liu and Wang, who pre-trained for detection on half a million images.

Commands
    python finetune_fasterrcnn.py --weights runs/moco_v2/backbone.pt      built-in scenes
    python finetune_fasterrcnn.py --weights none --out runs/random        what to compare it with
    torchrun --nproc_per_node=8 finetune_fasterrcnn.py --dataset voc --data DIR --weights FILE
    torchrun --nproc_per_node=8 finetune_fasterrcnn.py --dataset coco --data DIR --weights FILE \
        --masks
    (DetCo's Table 5: --detector retinanet, or --keypoints --schedule 2x, in place of --masks;
    Table 12: --detector retinanet --fraction 0.01)
    python finetune_fasterrcnn.py --keypoints --iterations 1500           of scenes, an hour
    python finetune_fasterrcnn.py --eval-only runs/finetune/checkpoint.pt

Splits, for --train-split and --test-split; several are joined
    voc   2007/trainval   the list of that name of DIR/VOCdevkit/VOC2007
          trainval        likewise of DIR, a folder of your own in VOC's layout
    coco  train2017       DIR/annotations/instances_train2017.json, images in DIR/train2017
          my.json:photos  DIR/my.json, images in DIR/photos
    scenes validation     other scenes than the test's, to choose a recipe by
"""
import copy
import json
import math
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from common import InputError, rank, world_size
from detection.average_precision import coco_ap, keypoint_ap, mask_ap, voc07_ap
from detection.data import Annotated, LabelledScenes, training_item
from detection.formats import TEST_SPLITS, TRAIN_SPLITS
from detection.masks import Unpacked, to_runs
from detection.models import (detect, detector_from_args, load_fine_tuned, restore,
                              training_bytes)
from plumbing.flags import Parser, add_normalisation_arguments, add_run_arguments, real, whole
from plumbing.images import leave_signals_to_trainer, steps_per_epoch
from plumbing.run import (Run, distribute, free_memory, gather_objects, launch,
                          mixed_precision)

# What --dataset sets.  From MoCo's public detection configurations: batch 16, lr 0.02, VOC's drops
# and warm-up; detectron2's: COCO's drops and warm-up, weight decay 1e-4, long side 1333.  Precise
# batch norm statistics as in MoCo's (Base-RCNN-C4-BN.yaml) and, of the FPN, SoCo's configurations
# (R_50_FPN_1x.yaml), whose weight decay is 2.5e-5.
RECIPES = {
    "voc": dict(detector="c4", train_split=TRAIN_SPLITS["voc"], test_split=TEST_SPLITS["voc"],
                min_size=[*range(480, 801, 32)], iterations=24000,  # DUPR, 4.1.1
                drops=[18000, 22000], warmup=100, precise_bn=200),
    # The papers' is with --masks; without them this is its box half
    "coco": dict(detector="fpn", train_split=TRAIN_SPLITS["coco"], test_split=TEST_SPLITS["coco"],
                 min_size=[*range(640, 801, 32)],  # DUPR, 4.2.1
                 iterations=90000,  # DetCo, 4.2
                 drops=[60000, 80000], warmup=1000, precise_bn=200),
    "scenes": dict(detector="fpn", arch="resnet18", batch_size=8, lr=0.04, min_size=[96],
                   max_size=96, fpn_channels=64, anchor_size=8, rois=64,
                   iterations=400, drops=[300, 360], warmup=40,  # small enough for two CPU cores
                   precise_bn=0),
}
MEASURED = "AP", "AP50", "AP75"  # by --eval-every
# What --small sets, on photos; batch size and iterations by their number, in fit_small
SMALL = dict(detector="fpn", arch="resnet18", batch_size=None, lr=0.04, min_size=[128],
             max_size=192, fpn_channels=64, anchor_size=16, rois=64, iterations=None, warmup=40,
             precise_bn=0)


def fit_small(args, images):
    """With --small: batches of 8 images, 4, 2 or 1 where there are fewer; and so many iterations
    that each image is seen eight times, but at least 300, 50 for each class, and at most 3,000;
    unless --batch-size and --iterations say it."""
    if args.batch_size is None:
        args.batch_size = 2 ** int(math.log2(min(8, images)))
    if args.small and args.iterations is None:
        args.iterations = min(3000, max(300, 50 * len(args.classes),
                                        round(8 * images / args.batch_size)))


def to_device(batch, device):
    """A batch of training items -> what the detector takes: images in 0..1, and targets."""
    images = [image.to(device, non_blocking=True).float() / 255 for image, _ in batch]
    return images, [{k: v.to(device, non_blocking=True) for k, v in t.items()} for _, t in batch]


@torch.no_grad()
def precise_batch_norm(model, train_set, args, device, run, stop):
    """A copy of the detector with precise batch norm statistics, of --precise-bn batches of steps
    after the last (detectron2's TEST.PRECISE_BN).  The processes share them.  stop: called after
    each."""
    # Differs: the variance is the mean of the batches', as in fvcore's update_bn_stats until May
    # 2021; since then it is the variance over all batches together
    precise = copy.deepcopy(model).train()
    norms = [m for m in precise.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    steps, mixed = range(run.steps, run.steps + args.precise_bn), mixed_precision(args, device)
    run.say(f"batch norm statistics of {args.precise_bn} batches")
    for step, batch in run.batches(train_set, training_item, steps, collate_fn=list):
        with mixed:
            precise(*to_device(batch, device))
        stop()
        done = step - run.steps + 1
        if done % max(1, args.precise_bn // 10) == 0:
            run.say(f"batch norm statistics: {done}/{args.precise_bn} batches", rewrite=True)
    return precise


def ap_so_far(model, train_set, test_set, args, device, run):
    """AP, AP50 and AP75 in %, after a step but before the run counts it: nothing is saved, so that
    a run that is stopped here resumes before the step, and measures again."""
    tested = model
    if args.precise_bn:
        tested = precise_batch_norm(model, train_set, args, device, run, stop=lambda: None)
    ap = evaluate(tested, test_set, args, device, run, stop=lambda: None)
    model.train()
    return {name: 100 * ap[name] for name in MEASURED}


def evaluate(model, dataset, args, device, run, stop):
    """coco_ap of the whole data set, each process detecting in its share of the images; on VOC also
    voc07_ap, as VOC07; with --masks also mask_ap, as masks, with --keypoints keypoint_ap.  stop:
    called before each batch."""
    if world_size() > 1:
        for buffer in model.buffers():  # a variance's last digits depend on the images' sizes
            dist.broadcast(buffer, src=0)
    model.eval()
    batches = [list(range(start + rank(), min(start + args.batch_size, len(dataset)), world_size()))
               for start in range(0, len(dataset), args.batch_size)]  # some may be empty
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=args.workers,
                        worker_init_fn=leave_signals_to_trainer, pin_memory=device.type == "cuda")
    mine, began = [], time.monotonic()
    for done, (indices, items) in enumerate(zip(batches, loader), 1):
        stop()
        found = detect(model, [image for image, _ in items], device)
        mine += zip(indices, [pack(truth) for _, truth in items], found)
        if done * 10 // len(batches) > (done - 1) * 10 // len(batches):  # at most ten lines
            left = (len(batches) - done) * (time.monotonic() - began) / done / 60
            run.say(f"evaluating: {done}/{len(batches)} batches  {left:.1f} min left", rewrite=True)
    rows = [row for share in gather_objects(mine) for row in share]
    _, truths, detections = zip(*sorted(rows, key=lambda row: row[0]))
    ap = coco_ap(truths, detections)
    if args.dataset == "voc":
        ap["VOC07"] = voc07_ap(truths, detections)
    if args.masks:
        ap["masks"] = mask_ap(Unpacked(truths), Unpacked(detections))
    if args.keypoints:
        ap["keypoints"] = keypoint_ap(truths, detections)
    return ap


def pack(truth):
    """A copy of an image's annotations, with runs in place of masks, as detect returns them: what
    comes from a loader worker keeps a file open, and a view keeps all the data it is a view of."""
    kept = {name: value.clone() for name, value in truth.items() if name != "masks"}
    if "masks" not in truth:
        return kept
    masks = truth["masks"]  # (n, H, W)
    return dict(kept, size=tuple(masks.shape[1:]), runs=[to_runs(mask) for mask in masks])


def measure(model, dataset, args, device, run):
    """Evaluate, print the AP, and write it and a picture into the folder of the run."""
    ap = evaluate(model, dataset, args, device, run, run.stop_if_asked)
    kinds = {"boxes": ap, **{name: ap[name] for name in ("masks", "keypoints") if name in ap}}
    for values in kinds.values():
        values["per_class"] = {dataset.classes[k]: v for k, v in values["per_class"].items()}
    if rank() == 0:
        (run.out / "ap.json").write_text(json.dumps(ap, indent=2) + "\n")
    tables = {}
    for kind, values in kinds.items():
        tables[f"{kind} by COCO's rules"] = {k: v for k, v in values.items() if k.startswith("AP")}
        tables[f"{kind} by VOC07's 11-point rule"] = values.get("VOC07", {})
        tables[f"{kind}, AP by class"] = values["per_class"]
    for name, values in tables.items():
        columns = [f"{k} {100 * v:.2f}" if v >= 0 else f"{k} n/a" for k, v in values.items()]
        if columns:
            run.say(f"{name}:  " + "  ".join(columns))
    if 0 <= ap["AP"] < 0.005:
        run.say("warning: an AP below 0.5 tells nothing apart: more --iterations, or a larger "
                "--min-size and --max-size, usually help")
    if rank() == 0:
        from plumbing.drawing import draw_detections
        items = [dataset[i] for i in range(min(4, len(dataset)))]
        found = Unpacked(detect(model, [image for image, _ in items], device))
        figure = draw_detections(items, {"found": found}, dataset.classes)
        figure.savefig(run.out / "detections.png")


def iterations_and_drops(args, per_epoch):
    """The number of iterations, after which of them the rate drops, and the factor of a drop.

    per_epoch: iterations that pass over the training images once.
    """
    if args.schedule == "report":
        iterations = args.iterations or 40 * per_epoch
        return iterations, [round(0.5 * iterations)], 0.5
    # Paper silent: other --iterations than the recipe's, also --fraction's 12,000, move the drops
    # in proportion
    recipe = RECIPES[args.dataset]
    drops = [round(drop / recipe["iterations"] * args.iterations) for drop in recipe["drops"]]
    return args.iterations, drops, 0.1


def step_schedule(step, warmup, drops, factor=0.1):
    """The factor of the learning rate at a step: linear from 1/1000 during ``warmup`` steps, then
    times ``factor`` from each drop on."""
    grown = 1 if step >= warmup else 0.001 + 0.999 * step / warmup
    return grown * factor ** sum(step >= drop for drop in drops)


def make_optimizer(model, args):
    """SGD or Adam, without weight decay of normalisation layers' parameters, as in detectron2."""
    norms = [p for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))
             for p in m.parameters()]
    of_norms = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in of_norms]
    groups = [dict(params=others, weight_decay=args.weight_decay),
              dict(params=norms, weight_decay=0.0)]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.lr, fused=True)  # a third of the time on CPUs
    return torch.optim.SGD(groups, args.lr * args.batch_size / 16, momentum=0.9)


def describe(model, number, args):
    """One line about what is going to train, on ``number`` images."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    trained = sum(m.training and m.weight.requires_grad for m in layers)
    shared = f"with the statistics of {args.batch_size} images"
    if world_size() > 1:
        shared += f" in {world_size()} processes"
    weights = "random weights" if args.weights == "none" else args.weights
    return (f"{args.arch} {args.detector} from {weights}: {number} images, {len(args.classes)} "
            f"classes; {trained} of {len(layers)} batch norm layers train, {shared}")


def data_sets(args):
    """The training and the test set that the arguments name; no training set for --eval-only."""
    if args.dataset == "scenes":
        n = max(1, round(args.fraction * args.train_scenes))
        seed = 3 if args.test_split else 2  # validation or test
        return (LabelledScenes(n, 1, args.masks, args.keypoints),
                LabelledScenes(args.test_scenes, seed, args.masks, args.keypoints))
    train_set = None if args.eval_only else Annotated(
        args.dataset, args.data, args.train_split, args.classes, True, args.fraction, args.seed,
        args.keep_empty, args.masks, args.keypoints)
    classes = args.classes or train_set.classes
    test_set = Annotated(args.dataset, args.data, args.test_split, classes, masks=args.masks,
                         keypoints=args.keypoints)
    for data in (train_set, test_set):
        for path, size in zip(data.paths, data.sizes) if data else ():
            if args.max_size * min(size) < 1.001 * max(size):
                raise InputError(f"{path} has {size[0]} x {size[1]} pixels: of {args.max_size} in "
                                 "length, less than one pixel would be left across")
    both = {*train_set.paths} & {*test_set.paths} if train_set else ()
    if both and rank() == 0:
        print(f"warning: {len(both)} of {len(test_set)} test images are training images too, such "
              f"as {min(both)}")
    return train_set, test_set


def bytes_of_a_step(model, args, device):
    """About the bytes of an iteration: in this process on a GPU, in all processes on a CPU."""
    on_gpu = device.type == "cuda"
    images = math.ceil(args.batch_size / world_size()) if on_gpu else args.batch_size
    needed = training_bytes(model, images, args.min_size[-1], args.max_size, args.rois)
    return needed / 2 if on_gpu and args.precision != "float32" else needed


def warn_of_size(needed, args, device, run):
    """Warn of images too large for a CPU, or of ``needed`` bytes that exceed the free memory."""
    if device.type == "cpu" and max(args.min_size) >= 400:
        run.say(f"warning: {args.iterations} iterations of {args.batch_size} images of "
                f"{max(args.min_size)} pixels are for GPUs: on a CPU use --small")
    if needed > free_memory(device):
        run.say(f"warning: an iteration needs about {needed / 2 ** 30:.1f} GiB of memory, and "
                f"{free_memory(device) / 2 ** 30:.1f} are free: use a smaller --batch-size or "
                "--max-size, or --small")


def train(args, device):
    """Fine-tune and evaluate as ``args`` say, into the folder of the run."""
    train_set, test_set = data_sets(args)
    args.classes = test_set.classes
    if args.eval_only:
        model = detector_from_args(args).to(device, memory_format=torch.channels_last)
        restore(model, load_fine_tuned(args.eval_only), args.eval_only)
        run = Run(args, "finetune_fasterrcnn", test_set, steps=0)
        return measure(model, test_set, args, device, run)
    fit_small(args, len(train_set))
    model = detector_from_args(args)
    needed = bytes_of_a_step(model, args, device)
    model, ddp = distribute(model, device, sync_batch_norm=True)
    if args.detector == "fpn" and isinstance(model.roi_heads.box_head, FastRCNNConvFCHead):
        args.box_head = "4conv1fc"  # for --eval-only, which has no --weights
    per_epoch = steps_per_epoch(train_set, args.batch_size)
    args.iterations, args.drops, factor = iterations_and_drops(args, per_epoch)
    optimizer = make_optimizer(model, args)
    run = Run(args, "finetune_fasterrcnn", train_set, steps=args.iterations, model=model,
              optimizer=optimizer)
    run.measured = dict.fromkeys(MEASURED if args.eval_every else (), math.nan)
    if isinstance(test_set, Annotated):
        test_set.decode(args.workers, run.say)
    model.train()
    run.say(describe(model, len(train_set), args))
    warn_of_size(needed, args, device, run)
    # Differs: bfloat16 on GPUs, but for boxes and losses.  RoIAlign's backward pass adds in no
    # fixed order there, so that a resumed run equals an uninterrupted one only nearly.
    mixed = mixed_precision(args, device)
    torch.backends.cudnn.deterministic = args.detector == "retinanet"  # which has no RoIAlign

    # Differs: a batch mixes wide and tall images; detectron2 batches them apart
    for step, batch in run.batches(train_set, training_item, collate_fn=list):
        images, targets = to_device(batch, device)
        lr = run.scale_learning_rates(step_schedule(step, args.warmup, args.drops, factor))
        with mixed:
            losses = ddp(images, targets)  # RPN and box head sample at random; RetinaNet does not
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.eval_every and (step + 1) % args.eval_every == 0:
            run.measured = ap_so_far(model, train_set, test_set, args, device, run)
        run.end_step(loss, lr, **losses)
    if args.precise_bn:
        precise = precise_batch_norm(model, train_set, args, device, run, run.stop_if_asked)
        model.load_state_dict(precise.state_dict())
        run.save()
    measure(model, test_set, args, device, run)


def add_arguments(parser):
    """Add the flags.  A default that the data set decides is set by parse_args."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=[*RECIPES], default="scenes", help="or the layout of your own")
    add("--data", help="folder, for voc and coco")
    add("--train-split", nargs="+", help="default: 2007/trainval 2012/trainval, or train2017")
    add("--test-split", nargs="+", help="default: 2007/test, or val2017; of scenes there is "
        "validation")
    add("--classes", nargs="+", help="default: VOC's 20; of your own data, those it is trained on")
    add("--fraction", type=real(1e-9, 1), default=1, help="share of the training images: drawn by "
        "--seed, with 12,000 iterations (DetCo, 6.1); of scenes the first ones")
    add("--keep-empty", action="store_true", help="train on images without a box too")
    add("--train-scenes", type=whole(1), default=400, help="number of labelled built-in scenes")
    add("--test-scenes", type=whole(1), default=300, help="number of scenes to measure AP on")
    add = parser.add_argument_group("detector").add_argument
    add("--detector", choices=["c4", "fpn", "retinanet"], help="default: c4 on voc, else fpn; "
        "retinanet: in one stage, with half the lr of the others by sgd on voc and coco")
    add("--masks", action="store_true", help="Mask R-CNN: each object's mask too")
    add("--keypoints", action="store_true", help="Keypoint R-CNN: each person's 17 keypoints too; "
        "of scenes the corners of stars and triangles")
    add("--weights", default="none", help="file that holds the backbone, or none (default)")
    add("--backbone-only", action="store_true", help="load no FPN and box head, if --weights holds "
        "them")
    add("--arch", default="resnet50", help="torchvision's name of a ResNet or, but for c4, a Swin "
        "Transformer")
    add("--min-size", type=whole(32), nargs="+", help="short side in pixels, drawn from these; the "
        "last one for testing")
    add("--max-size", type=whole(32), default=1333, help="long side at most")
    add_normalisation_arguments(add)
    add("--fpn-channels", type=whole(1), default=256, help="C of the feature pyramid")
    add("--anchor-size", type=whole(1), default=32, help="side of the smallest anchors; four more "
        "sizes double it")
    add("--rois", type=whole(1), default=512, help="RoIs of an image that the box head trains on; "
        "it tests on twice as many, at most 1000; retinanet has none")
    add("--box-head", choices=["4conv1fc"], help="SoCo's, of the FPN (default: as in --weights, "
        "or else two linear layers)")
    add = parser.add_argument_group("recipe").add_argument
    add("--small", action="store_true", help="a recipe for few photos, on a CPU or a small GPU, in "
        "place of the papers'")
    add("--optimizer", choices=["sgd", "adam"], help="default: sgd, on scenes adam; adam's lr is "
        "1e-4 (the report), on scenes 1e-3")
    add("--schedule", choices=["1x", "2x", "report"], help="2x: twice the iterations; report: 40 "
        "epochs, half the lr after 20 (default with adam, but for scenes)")
    add("--iterations", type=whole(1), help="default: 24,000 on voc, 90,000 on coco, 12,000 with "
        "--fraction, whatever the schedule; 400 on scenes; with --small by the images")
    add("--batch-size", type=whole(1), default=16, help="total over all processes")
    add("--lr", type=real(0), default=0.02, help="per 16 images of the batch; adam's: as it is")
    add("--warmup", type=whole(0), help="iterations of linear growth of the lr")
    add("--weight-decay", type=real(0), default=1e-4, help="of all parameters but batch norm's")
    add("--eval-every", type=whole(1), metavar="N", help="measure AP after every N iterations too, "
        "for log.csv and curves.png")
    add("--precise-bn", type=whole(0), metavar="N", help="measure batch norm's statistics on "
        "N batches before the test (default: 200 on voc and coco, but for retinanet), or keep the "
        "running ones (0)")
    add_run_arguments(parser, out="runs/finetune")
    add("--eval-only", metavar="CHECKPOINT", help="measure the AP of this one alone, with the "
        "arguments that it holds where none are given; --out is eval/ beside it; batch norm's "
        "statistics are the running ones if the run has not ended")


def parse_args(argv=None):
    """The papers' recipe for the data set by default; without --dataset, a small one."""
    parser = Parser(description="Fine-tune Faster, Mask or Keypoint R-CNN or RetinaNet, and "
                    "measure its AP.  Defaults are those of voc and coco; RECIPES and SMALL have "
                    "the others.")
    add_arguments(parser)
    known = parser.parse_known_args(argv)[0]
    scenes = known.dataset == "scenes"
    small = known.small and not scenes  # whose recipe is small
    recipe = {**RECIPES[known.dataset], **(SMALL if small else {})}
    # Differs: on scenes Adam, which in 400 iterations gets twice as far as SGD, each with its best
    # rate, from random weights as well (RESULTS.md)
    recipe["optimizer"] = known.optimizer or ("adam" if scenes else "sgd")
    adam = recipe["optimizer"] == "adam"
    recipe["schedule"] = known.schedule or ("report" if adam and not (small or scenes) else "1x")
    if scenes and known.detector == "c4":  # Res5 runs on every RoI
        recipe.update(rois=16, min_size=[192], max_size=192)
    if known.detector == "retinanet":
        recipe.setdefault("lr", 0.01)  # detectron2's Base-RetinaNet.yaml; not the small recipes'
        recipe["precise_bn"] = 0  # as all else, detectron2's default (DUPR, 4.2.1)
        if scenes:
            recipe.update(anchor_size=16)  # its finest level has twice the stride of the FPN's
    if adam:
        # Paper silent: the report gives Adam's rates and epochs alone; so there is no weight decay,
        # no warm-up, and no scaling of the rate with the batch.  At the scenes' higher rate the
        # first steps would undo what was pre-trained (RESULTS.md).
        recipe.update(weight_decay=0.0, **(dict(lr=1e-3, warmup=100) if scenes else
                                           dict(lr=1e-4, warmup=0)))
    if recipe["schedule"] == "report":
        recipe["iterations"] = None  # 40 epochs, when the number of images is known
    elif recipe["schedule"] == "2x" and not small:
        recipe["iterations"] *= 2
    if known.fraction < 1 and not (small or scenes):
        recipe["iterations"] = 12000
    parser.set_defaults(**recipe)
    if known.eval_only:
        parser.set_defaults(**{**load_fine_tuned(known.eval_only)["args"], "weights": "none",
                               "out": os.path.join(os.path.dirname(known.eval_only), "eval")})
    args = parser.parse_args(argv)
    check_flags(parser, args, known)
    return args


def check_flags(parser, args, known):
    """Refuse flags that do not go together.  known: what was given, without the recipe."""
    scenes = args.dataset == "scenes"
    for wrong, message in (
            (args.small and not scenes and args.schedule != "1x",
             "--small sets the number of --iterations, so that no --schedule applies"),
            (args.detector != "fpn" and args.box_head,
             "--box-head is of the fpn detector; c4's is Res5, retinanet has none"),
            (args.dataset == "voc" and (args.masks or args.keypoints),
             "--masks and --keypoints need --dataset coco or scenes: VOC's annotations hold boxes "
             "alone"),
            (args.detector == "retinanet" and args.masks, "--masks is of the c4 and fpn detectors"),
            (args.detector != "fpn" and args.keypoints, "--keypoints needs --detector fpn"),
            (not scenes and args.data is None, f"--dataset {args.dataset} needs --data, a folder"),
            (scenes and (args.data or args.train_split
                         or args.test_split not in (None, ["validation"])),
             "--data and its splits need --dataset voc or coco; of scenes there is --test-split "
             "validation"),
            (scenes and known.classes, "--classes needs --dataset voc or coco"),
            (args.eval_only and os.path.exists(os.path.join(args.out, "checkpoint.pt")),
             f"{args.out} holds a run: --eval-only needs another --out")):
        if wrong:
            parser.error(message)


def main(argv=None):
    """The command."""
    launch(train, parse_args, argv)


if __name__ == "__main__":
    main()
