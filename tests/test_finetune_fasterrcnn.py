import copy
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DETECTOR, column, refusal, start_processes
from layouts import OBJECT, XML, add_keypoints, add_masks, make_coco, make_voc
from PIL import Image
from test_average_precision import NAMES

import finetune_fasterrcnn as ft
import linear_probe
from common import InputError, rank, world_size
from detection.data import Annotated, LabelledScenes, training_item
from detection.instance_heads import crop_masks
from detection.masks import Unpacked
from detection.models import build_detector, detect
from plumbing.drawing import read_log
from plumbing.images import seed_for
from plumbing.run import distribute
from plumbing.weights import save_checkpoint


def test_step_schedule():
    assert ft.step_schedule(0, 100, [10, 20]) == pytest.approx(1 / 1000)
    factors = [ft.step_schedule(step, 10, [20, 30]) for step in (5, 10, 19, 20, 29, 30, 99)]
    assert factors == pytest.approx([0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert ft.step_schedule(0, 0, []) == 1
    assert ft.step_schedule(5, 0, [5], 0.5) == 0.5


VOC_SIZES, COCO_SIZES = [*range(480, 801, 32)], [*range(640, 801, 32)]


@pytest.mark.parametrize("words, detector, iterations, drops, warmup, sizes", [
    ("voc", "c4", 24000, [18000, 22000], 100, VOC_SIZES),
    ("voc --detector fpn", "fpn", 24000, [18000, 22000], 100, VOC_SIZES),
    ("coco", "fpn", 90000, [60000, 80000], 1000, COCO_SIZES),
    ("coco --detector c4 --schedule 2x", "c4", 180000, [120000, 160000], 1000, COCO_SIZES),
    ("coco --fraction 0.01", "fpn", 12000, [8000, 10667], 1000, COCO_SIZES),
    ("coco --fraction 0.1 --schedule 2x", "fpn", 12000, [8000, 10667], 1000, COCO_SIZES),
    ("coco --iterations 900", "fpn", 900, [600, 800], 1000, COCO_SIZES),
])
def test_the_papers_recipes(words, detector, iterations, drops, warmup, sizes):
    args = ft.parse_args(["--data", "x", "--dataset", *words.split()])
    assert ft.iterations_and_drops(args, per_epoch=1000) == (iterations, drops, 0.1)
    assert (args.detector, args.warmup) == (detector, warmup)
    assert (args.min_size, args.max_size) == (sizes, 1333)
    assert (args.lr, args.batch_size, args.weight_decay) == (0.02, 16, 1e-4)
    assert (args.optimizer, args.arch, args.rois) == ("sgd", "resnet50", 512)
    assert args.precise_bn == 200 and not args.keep_empty


def test_retinanets_recipe_is_detectron2s():
    """DUPR, Sec. 4.2.1, of its parameters other than the rate and batch norm."""
    args = ft.parse_args("--dataset coco --data x --detector retinanet".split())
    assert (args.lr, args.precise_bn, args.iterations) == (0.01, 0, 90000)


def test_the_reports_recipe():
    args = ft.parse_args("--dataset coco --data x --optimizer adam".split())
    assert ft.iterations_and_drops(args, per_epoch=50) == (2000, [1000], 0.5)
    assert (args.lr, args.warmup, args.weight_decay) == (1e-4, 0, 0)
    factors = [ft.step_schedule(step, 0, [1000], 0.5) for step in (0, 999, 1000, 1999)]
    assert factors == [1, 1, 0.5, 0.5]
    args = ft.parse_args(
        "--dataset coco --data x --optimizer adam --schedule 1x --lr 1e-3".split())
    assert ft.iterations_and_drops(args, per_epoch=50) == (90000, [60000, 80000], 0.1)
    assert args.lr == 1e-3
    args = ft.parse_args("--dataset coco --data x --schedule report --iterations 9".split())
    assert ft.iterations_and_drops(args, per_epoch=50) == (9, [4], 0.5)


def test_the_recipes_for_scenes():
    for words, expected in (("", ("adam", 1e-3, 100, 0)),
                            ("--detector retinanet", ("adam", 1e-3, 100, 0)),
                            ("--optimizer sgd", ("sgd", 0.04, 40, 1e-4))):
        args = ft.parse_args(words.split())
        assert (args.optimizer, args.lr, args.warmup, args.weight_decay) == expected
        assert ft.iterations_and_drops(args, per_epoch=50) == (400, [300, 360], 0.1)


def test_a_fraction_of_the_training_images_is_drawn_by_the_seed(tmp_path):
    make_voc(tmp_path, [[("dog", 0, 1, 1, 30, 9)]] * 40)
    words = f"--dataset voc --data {tmp_path} --train-split trainval --test-split trainval".split()
    sets = [ft.data_sets(ft.parse_args([*words, "--fraction", "0.1", "--seed", seed]))
            for seed in "01"]
    few = [Annotated("voc", str(tmp_path), ["trainval"], None, True, 0.1, seed).paths
           for seed in (0, 1)]
    assert [train_set.paths for train_set, _ in sets] == few and few[0] != few[1]
    assert len(sets[0][1]) == 40
    train_set, test_set = ft.data_sets(ft.parse_args(["--fraction", "0.1", "--test-scenes", "7"]))
    assert (len(train_set), len(test_set)) == (40, 7)
    train_again, validation_set = ft.data_sets(ft.parse_args(
        ["--fraction", "0.1", "--test-scenes", "7", "--test-split", "validation"]))
    assert torch.equal(train_again[0][0], train_set[0][0])
    sets = [LabelledScenes(7, 0), train_set, test_set, validation_set]  # the first: pre-training's
    assert len({data[i][0].numpy().tobytes() for data in sets for i in range(7)}) == 28


def test_classes_are_those_of_the_training_images(tmp_path):
    """Also where the test has fewer of them; of the linear probe likewise."""
    make_voc(tmp_path, [[("cat", 0, 1, 1, 9, 9), ("dog", 0, 1, 1, 9, 9)],
                        [("dog", 0, 1, 1, 9, 9)]])
    for name, line in (("train", "0000\n"), ("val", "0001\n")):
        (tmp_path / "ImageSets" / "Main" / f"{name}.txt").write_text(line)
    words = f"--dataset voc --data {tmp_path} --train-split train --test-split val".split()
    train_set, test_set = ft.data_sets(ft.parse_args(words))
    assert test_set.classes == train_set.classes == ["cat", "dog"]
    assert test_set[0][1]["labels"].tolist() == [1]
    args = linear_probe.parse_args(words)
    train = linear_probe.read_data(args, "train")
    assert linear_probe.read_data(args, "test", train.classes).targets.tolist() == [[-1, 1]]


def test_detectors_of_scenes():
    names = "arch fpn_channels anchor_size rois min_size max_size batch_size precise_bn".split()
    for words, expected in (("", ["resnet18", 64, 8, 64, [96], 96, 8, 0]),
                            ("--detector retinanet", ["resnet18", 64, 16, 64, [96], 96, 8, 0]),
                            ("--detector c4", ["resnet18", 64, 8, 16, [192], 192, 8, 0])):
        args = vars(ft.parse_args(words.split()))
        assert [args[name] for name in names] == expected


def test_no_weight_decay_of_normalisation():
    nn, args = torch.nn, ft.parse_args([])
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.LayerNorm(2))
    for args.optimizer, args.weight_decay in (("sgd", 0.1), ("adam", 0.1)):
        others, norms = ft.make_optimizer(model, args).param_groups
        assert (others["weight_decay"], norms["weight_decay"]) == (0.1, 0)
        assert {*map(id, norms["params"])} == {*map(id, model[1:].parameters())}


def test_processes_share_batch_norm(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(_model, _device, **options):
        raise Stop(options)

    monkeypatch.setattr(ft, "distribute", stop)
    with pytest.raises(Stop) as started:
        ft.main([*DETECTOR[1:], "--workers", "0", "--out", str(tmp_path)])
    assert started.value.args[0] == dict(sync_batch_norm=True)


def test_bytes_of_a_gpus_share(monkeypatch):
    """Of this process's images, half as many in bfloat16; on a CPU of all of them."""
    monkeypatch.setattr(ft, "training_bytes", lambda _model, images, *_sizes: 100 * images)
    monkeypatch.setattr(ft, "world_size", lambda: 2)
    args = SimpleNamespace(batch_size=7, min_size=[1], max_size=1, rois=1)
    for args.precision, kind, wanted in ((None, "cuda", 200), ("float32", "cuda", 400),
                                         (None, "cpu", 700)):
        assert ft.bytes_of_a_step(None, args, torch.device(kind)) == wanted


class Oracle(torch.nn.Module):
    """A detector that knows the answers by the image's mean, and is wrong about some of them."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("shift", torch.rand(1))
        self.known = {round(float(data[i][0].float().mean()), 3): data[i] for i in range(len(data))}

    def forward(self, images):
        found = []
        for image in images:
            _, truth = self.known[round(float((image * 255).mean()), 3)]
            boxes, labels = truth["boxes"].float(), truth["labels"]
            scores = torch.linspace(0.9, 0.4, len(boxes)) + 0.001 * len(boxes)
            boxes = boxes + 4 * self.shift * (boxes[:, :1] % 3)
            found.append(dict(boxes=boxes, labels=labels + 1, scores=scores))
            found[-1]["mask_probabilities"] = crop_masks(truth["masks"], boxes,
                                                         torch.arange(len(boxes)), 28).float()
            if "keypoints" in truth:  # every other one is further to the right
                found[-1]["keypoints"] = truth["keypoints"] + torch.tensor([0.5, 0.5, 0])
                found[-1]["keypoints"][:, ::2, 0] += 9 * self.shift * scores[:, None]
        return found


class Silent:
    def say(self, text, rewrite=False):
        pass


def evaluate_everywhere(number, world, path):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store{world}", rank=number, world_size=world)
    data = LabelledScenes(23, seed=3, masks=True, keypoints=True)
    args = SimpleNamespace(batch_size=6, workers=0, dataset="voc", masks=True, keypoints=True)
    torch.manual_seed(number)  # buffers that differ between processes
    oracle = Oracle(data)
    ap = ft.evaluate(oracle, data, args, torch.device("cpu"), Silent(), lambda: None)
    (path / f"{world}-{number}.json").write_text(json.dumps(ap))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_evaluation_is_the_same_for_one_two_and_three_processes(tmp_path):
    evaluate_everywhere(0, 1, tmp_path)
    for world in (2, 3):
        start_processes(evaluate_everywhere, (world, tmp_path), world)
    results = {p.name: p.read_text() for p in tmp_path.glob("*.json")}
    assert len(results) == 6 and len(set(results.values())) == 1
    ap = json.loads(results["1-0.json"])
    assert 0.1 < ap["AP"] < 0.99 and 0.1 < ap["VOC07"]["AP"] < 0.99
    assert 0.1 < ap["masks"]["AP"] < 0.99 and ap["masks"]["AP"] != ap["AP"]
    assert 0.1 < ap["keypoints"]["AP"] < 0.99


def test_annotations_are_kept_as_copies():
    """Tensors of a loader worker hold a file each, of which a process may have 1,024; a view of
    all annotations would be sent to the other processes as all of them."""
    rows = torch.arange(60.0).view(10, 6).share_memory_()
    truth = dict(boxes=rows[2:4, :4], area=rows[2:4, 5], masks=torch.ones(2, 3, 4).bool())
    kept = ft.pack(truth)
    assert kept["boxes"].tolist() == [[12, 13, 14, 15], [18, 19, 20, 21]]
    assert kept["area"].tolist() == [17, 23] and kept["size"] == (3, 4) and len(kept["runs"]) == 2
    for value in (kept["boxes"], kept["area"]):
        assert not value.is_shared() and value.untyped_storage().nbytes() == value.nbytes


def test_what_is_found_has_the_ap_of_pycocotools(tmp_path):
    """Of masks and keypoints, of all kinds of segmentations, a crowd, persons without keypoints;
    from what the detector finds, pasted, packed, gathered and unpacked."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    mask_tools = pytest.importorskip("pycocotools.mask")
    folder, content = make_coco(tmp_path)
    add_masks(folder, content)
    add_keypoints(folder, content)
    data = Annotated("coco", str(folder), ["some.json:photos"], masks=True, keypoints=True)
    content["annotations"] = [entry for entry in content["annotations"]
                              if entry["id"] not in (4, 5)]  # these have no mask
    for entry in content["annotations"]:
        entry.setdefault("num_keypoints", 0)
    (folder / "some.json").write_text(json.dumps(content))
    truth, seen = coco.COCO(folder / "some.json"), set()
    for n in range(8):  # by its random shift the oracle is more or less wrong
        torch.manual_seed(n)
        oracle, results = Oracle(data).eval(), []
        args = SimpleNamespace(batch_size=2, workers=0, dataset="coco", masks=True, keypoints=True)
        ap = ft.evaluate(oracle, data, args, torch.device("cpu"), Silent(), lambda: None)
        for i, image in enumerate(content["images"]):
            found = Unpacked(detect(oracle, [data[i][0]], "cpu"))[0]
            for (x1, y1, x2, y2), score, mask, keypoints in zip(
                    found["boxes"].tolist(), found["scores"].tolist(), found["masks"],
                    found["keypoints"]):
                results.append(dict(image_id=image["id"], category_id=1, score=score,
                                    bbox=[x1, y1, x2 - x1, y2 - y1],
                                    keypoints=keypoints.flatten().tolist(),
                                    segmentation=mask_tools.encode(np.asfortranarray(mask))))
        for kind, task, names in (("masks", "segm", "AP AP50 AP75 APs APm APl"),
                                  ("keypoints", "keypoints", "AP AP50 AP75 APm APl")):
            rows = [{k: v for k, v in row.items() if k != "bbox" or task != "segm"}
                    for row in results]  # the area is then the mask's
            e = cocoeval.COCOeval(truth, truth.loadRes(rows), task)
            e.evaluate()
            e.accumulate()
            e.summarize()
            want = dict(zip(names.split(), e.stats.tolist()))
            assert {name: ap[kind][name] for name in want} == pytest.approx(want, abs=1e-6)
            seen.add((kind, want["AP"]))
    assert len({ap for kind, ap in seen if kind == "masks"}) > 3 < len(
        {ap for kind, ap in seen if kind == "keypoints"})


def test_masks_and_keypoints_on_scenes(tmp_path, capsys):
    """The AP of each in ap.json and in print, with --eval-only too; none on VOC, none that a Faster
    R-CNN can resume."""
    words = [*DETECTOR[1:], "--masks", "--keypoints", "--workers", "0", "--out",
             str(tmp_path / "run")]
    ft.main(words)
    out = capsys.readouterr().out
    for text in ("boxes by COCO's rules:  AP ", "masks by COCO's rules:  AP ", "  loss mask 0.",
                 "masks, AP by class:  disc ", "keypoints by COCO's rules:  AP ",
                 "  loss keypoint "):
        assert text in out
    path = tmp_path / "run" / "ap.json"
    ap = json.loads(path.read_text())
    assert set(ap) == {*NAMES, "per_class", "masks", "keypoints"}
    assert set(ap["masks"]) == {*NAMES, "per_class"} == {*ap["keypoints"], "APs"}
    assert set(ap["masks"]["per_class"]) == set(LabelledScenes(1, seed=1).classes)
    ft.main(["--eval-only", str(tmp_path / "run" / "checkpoint.pt"), "--workers", "0"])
    assert json.loads((tmp_path / "run" / "eval" / "ap.json").read_text()) == ap
    assert "masks True (now None)" in refusal(ft.main, [w for w in words if w != "--masks"])
    for flag in ("--masks", "--keypoints"):
        assert "boxes alone" in refusal(ft.main, ["--dataset", "voc", "--data", "x", flag])
    for detector in ("c4", "retinanet"):
        words = ["--keypoints", "--detector", detector]
        assert "--keypoints needs --detector fpn" in refusal(ft.main, words)


class Batches(Silent):
    """In place of a Run: two batches of labelled scenes after the last step, shared by processes;
    it is to stop after ``stop`` of them."""

    def __init__(self, stop=9):
        self.steps, self.left, self.saved = 5, stop, 0

    def batches(self, data, draw, steps, collate_fn):
        assert steps == range(5, 7) and collate_fn is list
        share = 4 // world_size()
        for step in steps:
            first = 4 * (step - 5) + rank() * share
            torch.manual_seed(seed_for(step, rank()))
            yield step, [draw(data[i]) for i in range(first, first + share)]

    def stop_if_asked(self):
        self.left -= 1
        if not self.left:
            raise SystemExit

    def save(self):
        self.saved += 1


def precise_everywhere(number, world, path):
    """What precise_batch_norm makes of a detector; and, beside it, each batch norm layer's input in
    each batch of this process."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{path}/store{world}", rank=number, world_size=world)
    data, args = LabelledScenes(8, seed=3), SimpleNamespace(precise_bn=2, precision=None)
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, "fpn", 16, [64], 64, 8, 8, box_head="4conv1fc").train()
    for buffer in model.buffers():
        buffer += 1 + number  # as from training
    model, _ = distribute(model, torch.device("cpu"), sync_batch_norm=True)
    before, run = copy.deepcopy(model), Batches()
    model = ft.precise_batch_norm(model, data, args, torch.device("cpu"), run, run.stop_if_asked)
    assert not run.saved and model.training
    seen = {}
    for name, module in before.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.setdefault(
                name, []).append(inputs[0].detach()))
    for _, batch in Batches().batches(data, training_item, range(5, 7), list):
        before([image / 255 for image, _ in batch], [target for _, target in batch])
    torch.save((model.state_dict(), seen), path / f"{world}-{number}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_precise_statistics_are_the_means_of_those_of_the_batches(tmp_path):
    """By fvcore's update_bn_stats, written out: the mean over batches of each batch's mean and
    unbiased variance, with fixed weights; over processes too."""
    precise_everywhere(0, 1, tmp_path)
    start_processes(precise_everywhere, (2, tmp_path), 2)
    for world in (1, 2):
        states, seen = zip(*(torch.load(tmp_path / f"{world}-{n}.pt", weights_only=True)
                             for n in range(world)))
        assert len(seen[0]) == 20 + 8 + 4  # of ResNet-18, the FPN, the box head
        for name in seen[0]:
            batches = [torch.cat(shares) for shares in zip(*(share[name] for share in seen))]
            assert len(batches) == 2
            for k, values in (("running_mean", [x.mean((0, 2, 3)) for x in batches]),
                              ("running_var", [x.var((0, 2, 3)) for x in batches])):
                torch.testing.assert_close(states[0][f"{name}.{k}"], sum(values) / 2)
                assert all(torch.equal(states[0][f"{name}.{k}"], s[f"{name}.{k}"]) for s in states)
    one, two = (torch.load(tmp_path / f"{n}-0.pt", weights_only=True)[0] for n in (1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one if "running" not in k)


def test_a_stop_amid_the_precise_statistics_leaves_the_detector(tmp_path):
    torch.manual_seed(0)
    model = build_detector("resnet18", 6, "fpn", 16, [64], 64, 8, 8).train()
    before, run = copy.deepcopy(model.state_dict()), Batches(stop=2)
    with pytest.raises(SystemExit):
        ft.precise_batch_norm(model, LabelledScenes(8, seed=3),
                              SimpleNamespace(precise_bn=2, precision=None), torch.device("cpu"),
                              run, run.stop_if_asked)
    assert not run.saved
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


TINY = ("--arch resnet18 --batch-size 4 --fpn-channels 16 --rois 8 --min-size 48 64 --max-size 80 "
        "--anchor-size 8 --iterations 4 --log-every 2 --workers 0 --precise-bn 2").split()


def test_the_small_recipe(tmp_path):
    by_hand = ("--dataset voc --data D --detector fpn --arch resnet18 --fpn-channels 64 --min-size "
               "128 --max-size 192 --anchor-size 16 --rois 64 --batch-size 8 --lr 0.04 --warmup 40 "
               "--iterations 1000 --precise-bn 0")
    args = ft.parse_args("--dataset voc --data D --small --classes cat dog".split())
    ft.fit_small(args, 1000)
    by_hand = ft.parse_args([*by_hand.split(), "--classes", "cat", "dog"])
    assert {**vars(by_hand), "small": True} == vars(args)
    for images, classes, iterations in ((100, 3, 300), (363, 6, 363), (363, 20, 1000),
                                        (3500, 20, 3000), (20000, 80, 3000), (100, 80, 3000)):
        args = ft.parse_args("--dataset coco --data D --small".split())
        args.classes = [f"class {i}" for i in range(classes)]
        ft.fit_small(args, images)
        assert (args.iterations, args.batch_size) == (iterations, 8)
    for images, batch_size in ((1, 1), (3, 2), (7, 4), (8, 8)):
        args = ft.parse_args("--dataset voc --data D --small --classes cat".split())
        ft.fit_small(args, images)
        assert args.batch_size == batch_size
    assert vars(ft.parse_args(["--small"])) == {**vars(ft.parse_args([])), "small": True}
    adam = ft.parse_args("--dataset coco --data D --small --optimizer adam".split())
    assert (adam.lr, adam.warmup, adam.schedule) == (1e-4, 0, "1x")
    with pytest.raises(InputError, match="no --schedule applies"):
        ft.parse_args("--dataset coco --data D --small --schedule 2x".split())


def test_voc_from_end_to_end(tmp_path, capsys, curves, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    things = [[("dog", 0, 1 + i, 5, 40 + i, 50), ("cat", i % 2, 50, 5, 75, 40)] for i in range(8)]
    make_voc(tmp_path / "voc", things)
    make_voc(tmp_path / "voc", things[:5], split="test")
    words = ["--dataset", "voc", "--data", str(tmp_path / "voc"), *TINY, "--warmup", "2",
             "--train-split", "trainval", "--test-split", "test", "--out", str(tmp_path / "run")]
    ft.main([*words, "--workers", "2"])
    assert not torch.backends.cudnn.deterministic  # RoI Align's gradients are not either
    out = capsys.readouterr().out
    for text in ("resnet18 c4 from random weights: 8 images, 2 classes", "COCO's rules:  AP ",
                 "VOC07's 11-point rule:  AP ", "21 of 21 batch norm layers train"):
        assert text in out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "ap.json", "args.json", "checkpoint.pt", "curves.png", "detections.png", "lock",
        "log.csv"}
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert 900 < image.width < 1000  # of two panels beside each other
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap) == {*NAMES, "per_class", "VOC07"} and set(ap["per_class"]) == {"cat", "dog"}
    # the recipe: lr 0.02 for 16 images, 4 here; the last of 4 steps is after the drop at 3
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    others, norms = torch.load(checkpoint, weights_only=False)["optimizer"]["param_groups"]
    assert others["lr"] == norms["lr"] == pytest.approx(0.02 * 4 / 16 * 0.1)
    state = torch.load(checkpoint, weights_only=False)["model"]
    assert state["backbone.bn1.num_batches_tracked"] == 2  # --eval-only needs the precise ones
    assert others["momentum"] == norms["momentum"] == 0.9
    assert (others["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert len(norms["params"]) == 2 * 21
    rates = [*map(float, column(tmp_path / "run", "lr"))]  # steps 2 (warm-up's last), 4
    assert rates == pytest.approx([0.005 * (0.001 + 0.999 / 2), 0.005 / 10])
    # the checkpoint's AP again, from its file alone
    ft.main(["--eval-only", str(checkpoint)])
    assert json.loads((tmp_path / "run" / "eval" / "ap.json").read_text()) == ap
    ft.main(["--eval-only", str(checkpoint), "--test-split", "trainval", "--out",
             str(tmp_path / "other")])
    assert json.loads((tmp_path / "other" / "ap.json").read_text()) != ap
    assert (tmp_path / "run" / "ap.json").read_text() == json.dumps(ap, indent=2) + "\n"
    for words, message in ((["--out", str(tmp_path / "run"), "--fresh"], "needs another --out"),
                           (["--detector", "fpn"], "holds another detector")):
        with pytest.raises(SystemExit, match=message):
            ft.main(["--eval-only", str(checkpoint), *words])
    assert checkpoint.exists()


def test_ap_is_measured_on_the_way_and_leaves_the_training_as_it_is(tmp_path, monkeypatch, capsys):
    """Also after a second Ctrl-C amid the measuring: the run resumes before that step."""
    words = ("--train-scenes 8 --test-scenes 4 --batch-size 4 --fpn-channels 16 --rois 8 "
             "--iterations 6 --log-every 4 --workers 0 --precise-bn 2 --out").split()
    ft.main([*words, str(tmp_path / "without")])
    ft.main([*words, str(tmp_path / "whole"), "--eval-every", "3"])
    rows = read_log(tmp_path / "whole" / "log.csv")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]  # epochs' ends, --log-every, --eval-every
    assert [math.isnan(row["AP"]) for row in rows] == [True, False, True, False]
    ap = json.loads((tmp_path / "whole" / "ap.json").read_text())
    assert ap == json.loads((tmp_path / "without" / "ap.json").read_text())
    for name in ("AP", "AP50", "AP75"):
        assert rows[-1][name] == pytest.approx(100 * ap[name])
    assert "  AP nan" not in capsys.readouterr().out

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(ft, "coco_ap", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ft.main([*words, str(tmp_path / "cut"), "--eval-every", "3"])
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=False)["step"] == 2
    ft.main([*words, str(tmp_path / "cut"), "--eval-every", "3"])
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=False)["model"]
              for name in ("without", "whole", "cut")]
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    for name in ("step", "loss", "AP", "AP50"):
        assert column(tmp_path / "cut", name) == column(tmp_path / "whole", name)


def test_coco_from_end_to_end(tmp_path, capsys):
    folder, _ = make_coco(tmp_path / "coco")
    model = build_detector("resnet18", 1, fpn_channels=16, box_head="4conv1fc")  # SoCo's
    save_checkpoint(tmp_path / "detector.pt", model.state_dict())
    words = ["--dataset", "coco", "--data", str(folder), *TINY, "--train-split", "some.json:photos",
             "--test-split", "some.json:photos", "--optimizer", "adam", "--keep-empty",
             "--weights", str(tmp_path / "detector.pt"), "--out", str(tmp_path / "run")]
    ft.main(words)
    out = capsys.readouterr().out
    assert f"resnet18 fpn from {tmp_path}" in out and "4 images, 3 classes" in out
    assert "tensors loaded from 'roi_heads.box_head.*'" in out and "VOC07" not in out
    assert "lr 0.0001\n" in out and "lr 5e-05\n" in out
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap) == {*NAMES, "per_class"} and set(ap["per_class"]) == {"car", "bottle", "brush"}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)["optimizer"]["state"]
    assert {*state[0]} == {"step", "exp_avg", "exp_avg_sq"}  # Adam's
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "run" / "ap.json").unlink()
    ft.main(words)  # finished: it evaluates again
    assert json.loads((tmp_path / "run" / "ap.json").read_text()) == ap
    (tmp_path / "detector.pt").unlink()
    ft.main(["--eval-only", checkpoint, "--batch-size", "8"])  # more than the 4 images
    assert json.loads((tmp_path / "run" / "eval" / "ap.json").read_text()) == ap


def test_eval_only_refuses_another_file(tmp_path):
    for content in ({"conv1.weight": torch.zeros(1)}, dict(method="moco_v2", args={}, model={}), 3):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(SystemExit, match="is no checkpoint of finetune_fasterrcnn"):
            ft.main(["--eval-only", str(tmp_path / "file.pt")])


# ------------------------------------------------------------------- what ends before the training


def make_run(tmp_path, *more):
    make_voc(tmp_path / "voc", [[("dog", 0, 1 + i, 5, 40 + i, 50)] for i in range(6)])
    folder = tmp_path / "voc"
    (folder / "ImageSets/Main/train.txt").write_text("0000\n0001\n0002\n0003\n")
    (folder / "ImageSets/Main/test.txt").write_text("0003\n0004\n0005\n")
    return folder, ["--dataset", "voc", "--data", folder, *TINY, "--train-split", "train",
                    "--test-split", "test", "--detector", "fpn", "--out", tmp_path / "run"]


def test_images_too_thin_for_the_detector_are_named(tmp_path):
    folder, words = make_run(tmp_path)
    words.append("--keep-empty")
    for name in ("0001", "0005"):  # of training, of the test
        for size, thin in (((1000, 5), True), ((1, 100), True), ((161, 2), True),
                           ((150, 2), False)):
            path = folder / "JPEGImages" / f"{name}.jpg"
            Image.new("RGB", size).save(path)
            (folder / "Annotations" / f"{name}.xml").write_text(
                XML.format(OBJECT.format("dog", 0, 1, 1, *size)).replace(
                    "<width>80", f"<width>{size[0]}").replace("<height>60", f"<height>{size[1]}"))
            if thin:  # 80 pixels long, it would be less than one across
                assert refusal(ft.main, words) == (
                    f"error: {path} has {size[0]} x {size[1]} pixels: of 80 in length, less than "
                    "one pixel would be left across")
    ft.main([str(word) for word in words])  # 150 x 2 pixels train, and are tested


def test_a_cut_off_test_image_ends_the_run_before_the_training(tmp_path, capsys, monkeypatch):
    folder, words = make_run(tmp_path)
    path = folder / "JPEGImages" / "0004.jpg"
    photo = path.read_bytes()
    path.write_bytes(photo[:-20])
    assert refusal(ft.main, words) == f"error: 1 of 3 images cannot be decoded: {path}"
    said = capsys.readouterr().out
    assert f"cannot decode '{path}' (image file is truncated" in said and "step" not in said
    path.write_bytes(photo)
    ft.main([str(word) for word in words])  # the same command again
    said = capsys.readouterr().out
    assert "step 4/4" in said and "AP by class:  dog" in said
    assert "warning: an AP below 0.5 tells nothing apart" in said and "for GPUs" not in said
    assert "GiB of memory" not in said
    monkeypatch.setattr(ft, "free_memory", lambda device: 2 ** 28)
    ft.main([*map(str, words), "--fresh", "--min-size", "400", "--max-size", "600", "--iterations",
             "1", "--batch-size", "2"])
    warned = capsys.readouterr().out
    assert "1 iterations of 2 images of 400 pixels are for GPUs: on a CPU use --small" in warned
    assert re.search("needs about [0-9.]+ GiB of memory, and 0.2 are free: use a smaller", warned)
    assert "warning: 1 of 3 test images are training images too, such as" in said
    for line in ("train: 4 images; 4 boxes\n", "train: boxes 4 dog\n",
                 "test: 3 images; 3 boxes\n"):
        assert said.count(line) == 1
