"""The SVMs against Newton's method, AP against a loop; separable data; one process as two."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_photos, process_group, refusal, start_processes
from layouts import make_voc
from PIL import Image

import linear_probe
from common import InputError, resnet_stages
from linear_probe import (Labelled, average_precision, extract, fit_svm, main, parse_args, presence,
                          read_data, softmax_scores, svm_objective, svm_scores)
from plumbing.files import ImageFiles
from plumbing.images import seed_for
from plumbing.weights import LEVELS, save_tensors


def newton(x, y, cost):
    """The minimum for one class by Newton's method on the points inside the margin, in numpy.

    The objective is piecewise quadratic: with the right set of points one step is exact.
    """
    x = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.diag([1.0] * (x.shape[1] - 1) + [1e-12])  # the bias is free
    v = np.zeros(x.shape[1])
    for _ in range(100):
        inside = (1 - y * (x @ v) > 0) & (y != 0)
        a, b = x[inside], y[inside]
        step = np.linalg.solve(ridge + 2 * cost * a.T @ a, 2 * cost * a.T @ b)
        if np.allclose(step, v, atol=1e-12):
            break
        v = step
    return v[:-1], v[-1]


def test_objective_by_hand():
    w, b = torch.tensor([[1.0, -2], [0.5, 0]]), torch.tensor([0.5, -1.0])
    x, y = torch.tensor([[1.0, 1], [0, 3]]), torch.tensor([[1.0, -1], [-1, 0]])
    # class 0: w x + b = -0.5, -5.5; slack 1.5, 0.  class 1: -0.5, -1; slack 0.5, left out
    found = svm_objective(w, b, x, y, torch.tensor([2.0, 4.0]))
    assert found.tolist() == pytest.approx([2.5 + 2 * 2.25, 0.125 + 4 * 0.25])


@pytest.mark.parametrize("cost", [1.0, 100.0, 1000.0])
def test_svm_of_features_that_point_one_way(cost):
    """Unit rows with a cosine of 0.99 to their mean, as pooled features have; a rare class."""
    rng = np.random.default_rng(0)
    x = 10 + rng.normal(size=(300, 100)) * rng.uniform(0.2, 2, size=100)
    y = np.where(x[:, :3] @ rng.normal(size=(3, 1)) > np.quantile(x[:, 0], 0.9), 1.0, -1.0)
    y = np.where(rng.random((300, 1)) < 0.1, -y, y)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    best_w, best_b = newton(x, y[:, 0], cost)
    one = [torch.as_tensor(v).double() for v in (x, y, [cost])]
    least = svm_objective(torch.tensor(best_w)[None], torch.tensor([best_b]), *one).item()
    assert svm_objective(*fit_svm(*one), *one).item() == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("cost", [0.01, 1.0, 100.0, 10000.0])
def test_svm_is_at_the_minimum(cost):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), np.sign(rng.normal(size=(80, 3)))
    x[:, 0] += 1.5 * y[:, 0]  # one class that can be told, two that cannot
    y[:10, 1] = 0
    w, b = fit_svm(torch.from_numpy(x), torch.from_numpy(y), torch.full((3,), cost))
    for k in range(3):
        best_w, best_b = newton(x, y[:, k], cost)
        one = [torch.as_tensor(v).double() for v in (x, y[:, k:k + 1], [cost])]
        least = svm_objective(torch.tensor(best_w)[None], torch.tensor([best_b]), *one).item()
        found = svm_objective(w[k:k + 1], b[k:k + 1], *one).item()
        assert found == pytest.approx(least, rel=1e-6) and found >= least * (1 - 1e-9)
        assert w[k].numpy() == pytest.approx(best_w, rel=1e-2, abs=1e-3)


def test_svm_of_several_costs_at_once():
    rng = np.random.default_rng(1)
    x, y = map(torch.from_numpy, (rng.normal(size=(60, 4)), np.sign(rng.normal(size=60))))
    costs = torch.tensor([0.01, 1000.0])
    w, b = fit_svm(x, torch.stack([y, y], dim=1), costs)
    for k, cost in enumerate(costs.tolist()):
        best, bias = newton(x.numpy(), y.numpy(), cost)
        assert w[k].numpy() == pytest.approx(best, rel=1e-2, abs=1e-4)
        assert b[k].item() == pytest.approx(bias, rel=1e-2, abs=1e-3)


def test_average_precision_by_hand_and_by_a_loop():
    assert average_precision([3, 2, 1], [1, 1, -1]) == 1
    assert average_precision([3, 2, 1], [1, -1, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([3, 2, 1, 0], [-1, 1, 1, -1]) == pytest.approx(2 / 3)  # 1/2 -> 2/3
    assert average_precision([9, 2, 1], [0, 1, -1]) == 1  # the first is not judged
    assert average_precision([1, 1], [1, -1]) == 0.5  # equal scores: at worst
    assert math.isnan(average_precision([1, 2], [-1, 0]))
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, y = rng.normal(size=40), rng.choice([-1, 0, 1], size=40)
        order = [i for i in np.argsort(-scores) if y[i]]
        points = [(sum(y[i] > 0 for i in order[:n]), n) for n in range(1, len(order) + 1)]
        positives, area = max(hits for hits, _ in points), 0.0
        for hit in range(1, positives + 1):
            area += max(hits / n for hits, n in points if hits >= hit) / positives
        assert average_precision(scores, y) == pytest.approx(area)


def test_presence_of_classes():
    found = presence([[(0, False), (0, True), (2, True)], []], 3)
    assert found.tolist() == [[1, -1, 0], [-1, -1, -1]]  # difficult alone is not judged


def test_separable_sets_give_one():
    torch.manual_seed(0)
    args = parse_args(["--batch-size", "32", "--epochs", "20"])
    y = torch.sign(torch.randn(200, 3))
    x = y @ torch.randn(3, 16) + 0.05 * torch.randn(200, 16)
    found = svm_scores((x[:120], y[:120]), (x[120:], y[120:]), ["a", "b", "c"], args)
    assert found == {"mAP": 1, "a": 1, "b": 1, "c": 1}
    labels = torch.randint(6, (200,))
    good = torch.randn(6, 8)[labels] + 0.05 * torch.randn(200, 8)
    good, noise = (
        softmax_scores((x[:120], labels[:120]), (x[120:], labels[120:]), [*"abcdef"], args)
        for x in (good, torch.randn(200, 8)))
    assert good == {"top-1": 1, "top-5": 1}
    assert noise["top-1"] < 0.5 < noise["top-5"]  # five of six classes


def test_costs_are_chosen_on_the_held_out_fold():
    """Labels that noise features can only learn by heart: the least cost must win."""
    torch.manual_seed(0)
    x, y = torch.randn(150, 100), torch.sign(torch.randn(150, 1))
    x[:, 0] += 0.8 * y[:, 0]
    test = torch.randn(400, 100), torch.sign(torch.randn(400, 1))
    test[0][:, 0] += 0.8 * test[1][:, 0]
    small, large, chosen = (
        svm_scores((x, y), test, ["a"], parse_args(["--costs", *costs]))["a"]
        for costs in (["0.1"], ["10000"], ["10000", "0.1"]))
    assert small > large + 0.02 and chosen == small


def test_features_are_the_means_of_the_stages(tmp_path):
    torch.manual_seed(0)
    photos = make_photos(tmp_path / "photos", 5, size=(90, 60))
    args = parse_args(["--image-size", "56", "--crop", "0.875", "--workers", "0",
                       "--batch-size", "2", "--levels", "res5", "res2"])
    paths = [str(p) for p in sorted(photos.iterdir())]
    stages = resnet_stages("resnet18").eval()
    data = Labelled(ImageFiles(paths), torch.arange(5), ["a"], args)
    found = extract(stages, data, args, torch.device("cpu"), "x")
    assert all(targets.tolist() == [0, 1, 2, 3, 4] for _, targets in found)
    assert [f.shape for f, _ in found] == [(5, 512), (5, 64)]
    with Image.open(paths[3]) as image:  # short side to 64, the middle 56 x 56
        image = np.asarray(image.resize((96, 64), Image.BILINEAR).crop((20, 4, 76, 60)))
    x = (torch.tensor(image / 255) - torch.tensor(args.mean)) / torch.tensor(args.std)
    with torch.no_grad():
        levels = stages(x.permute(2, 0, 1)[None].float())
    for level, (one, _) in zip((levels[3], levels[0]), found):
        assert torch.allclose(one[3], level.mean((2, 3))[0], rtol=0.02, atol=0.02)


def test_broken_images_are_left_out_and_named(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 101, size=(20, 16))
    (photos / "0007.jpg").write_bytes(b"no jpeg")
    args = parse_args(["--image-size", "32", "--crop", "1", "--workers", "0", "--levels", "res2"])
    images = ImageFiles([str(p) for p in sorted(photos.iterdir())])
    data = Labelled(images, torch.arange(101), ["a"], args)
    stages = resnet_stages("resnet18", depth=1).eval()
    (found, targets), = extract(stages, data, args, torch.device("cpu"), "test")
    assert targets.tolist() == [i for i in range(101) if i != 7] and len(found) == 100
    out = capsys.readouterr().out
    assert "0007.jpg' (" in out and "): left out (1 of 101 so far)" in out
    for i in (8, 9):
        (photos / f"000{i}.jpg").write_bytes(b"no jpeg")
    with pytest.raises(InputError, match="3 of 101 images cannot be decoded: over 1%"):
        extract(stages, data, args, torch.device("cpu"), "test")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Photos of three colours, an ImageFolder; the same in VOC's layout; a backbone."""
    root = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    save_tensors(resnet_stages("resnet18").state_dict(), root / "backbone.pt")
    rng, names = np.random.default_rng(0), []
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    for part, number in (("train", 20), ("val", 8)):
        listed = []
        for label, colour in enumerate(("red", "green", "blue")):
            (root / part / colour).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                pixels[..., label] += 150
                name = f"{part}_{colour}_{i}"
                Image.fromarray(pixels).save(root / part / colour / f"{i}.jpg")
                Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
                (root / "Annotations" / f"{name}.xml").write_text(
                    f"<annotation><object><name>{colour}</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
                    "<xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>")
                listed.append(name)
        (root / f"ImageSets/Main/{part}.txt").write_text("\n".join(listed) + "\n")
        names += listed
    return root


SMALL = "--image-size", 32, "--workers", 0, "--arch", "resnet18", "--batch-size", 16


def test_voc_from_end_to_end(classes, tmp_path, capsys):
    main([*map(str, ("--dataset", "voc", "--data", classes, *SMALL, "--train-split", "train",
                     "--test-split", "val", "--weights", "none", classes / "backbone.pt",
                     "--labels", "random", "file", "--levels", "res2", "res5",
                     "--out", tmp_path))])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "probe.json").read_text())
    assert {*found["file"]["res2"]} == {"mAP", "red", "green", "blue"}
    assert found["file"]["res2"]["mAP"] == found["random"]["res5"]["mAP"] == 1  # colours are easy
    assert "mAP (%)  random    file" in out and "res2     100.00  100.00" in out
    with Image.open(tmp_path / "probe.png") as picture:
        assert 600 < picture.width < 800


def one_of_two(number, folder, *commands):
    for i, words in enumerate(commands):  # launch leaves the processes' group at its end
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{i}", rank=number,
                                world_size=2)
        main([*words, str(folder / f"two{i}")])


def test_one_process_and_two(classes, tmp_path, capsys):
    words = "--train-scenes 41 --test-scenes 31 --image-size 32 --workers 0 --levels res3 --out"
    main([*words.split(), str(tmp_path / "one")])
    folder = ["--dataset", "folder", "--data", classes, *SMALL, "--epochs", 10, "--out"]
    start_processes(one_of_two, (tmp_path, words.split(), [*map(str, folder)]), 2)
    one, two, softmax = (json.loads((tmp_path / name / "probe.json").read_text())["random"]
                         for name in ("one", "two0", "two1"))
    assert [*softmax] == LEVELS
    assert all(softmax[level] == {"top-1": 1.0, "top-5": 1.0} for level in LEVELS)
    one, two = one["res3"], two["res3"]
    assert len(one) == 7 and 0.3 < one["mAP"] < 0.9
    assert one == pytest.approx(two, abs=1e-3)
    said = capsys.readouterr().out
    assert f"res3     {100 * one['mAP']:6.2f}" in said  # in the table
    assert f"random, res3: mAP {100 * one['mAP']:.2f}\n" in said  # as soon as it is known


def test_bad_input_is_one_line(classes, tmp_path):
    for words, message in (
            (["--dataset", "voc"], "these need --data"),
            (["--data", str(classes)], "--data needs --dataset"),
            (["--test-scenes", "1"], "10 and 1 images are too few"),
            (["--std", "0", "1", "1"], "argument --std: 0 is not from 0.001 to 1"),
            (["--dataset", "folder", "--data", str(tmp_path)], "no such folder: .*train"),
            (["--dataset", "voc", "--data", str(classes), "--train-split", "x"], "no split x"),
            (["--weights", "missing.pt"], "no such file: missing.pt"),
            (["--weights", "none", "none"], "two of the names are alike"),
            (["--costs", "0"], "argument --costs: 0 is not at least"),
            (["--batch-size", "0"], "argument --batch-size: 0 is not at least 1")):
        with pytest.raises(SystemExit, match=message):
            main(["--train-scenes", "10", "--test-scenes", "2", "--out", str(tmp_path), *words])


def test_one_class_in_each_image_is_nothing_to_tell_apart(tmp_path):
    make_voc(tmp_path, [[("dog", 0, 1, 1, 80, 60)]] * 4, "train")
    shutil.copy(tmp_path / "ImageSets/Main/train.txt", tmp_path / "ImageSets/Main/val.txt")
    assert "each test image has each class: nothing to tell apart" in refusal(main, [
        "--dataset", "voc", "--data", tmp_path, "--train-split", "train", "--test-split", "val",
        "--out", tmp_path / "out"])


def test_folders_of_classes_and_what_is_wrong_with_them(classes, tmp_path, capsys):
    shutil.copytree(classes, tmp_path / "data")
    train = tmp_path / "data" / "train"
    names = sorted(folder.name for folder in train.iterdir())
    make_photos(train / ".ipynb_checkpoints", 3)  # no class
    make_photos(train / names[0] / "deep" / "@eaDir", 2)
    (train / names[1] / "notes.txt").write_text("")
    args = parse_args(["--dataset", "folder", "--data", str(tmp_path / "data")])
    data = read_data(args, "train")
    assert data.classes == names and "left out: 5 hidden, 1 .txt" in capsys.readouterr().out
    assert [names[i] for i in data.targets] == [Path(p).parent.name for p in data.images.paths]

    def refused():
        return refusal(main, ["--dataset", "folder", "--data", tmp_path / "data", "--out",
                              tmp_path])

    make_photos(train, 1)
    assert f"train of {tmp_path / 'data'}: 0000.jpg is in no class's folder" in refused()
    (train / "0000.jpg").unlink()
    (tmp_path / "data" / "val" / names[0]).rename(tmp_path / "data" / "val" / "other")
    assert f"other classes than in training: {names[0]} other" in refused()
    for image in train.rglob("*.jpg"):
        image.unlink()
    assert "no images below" in refused() and "1 .txt" in refused()


def test_annotations_without_a_class_to_learn(classes, tmp_path, capsys):
    words = ["--dataset", "voc", "--data", tmp_path, "--train-split", "train", "--test-split",
             "val", *SMALL, "--out", tmp_path / "out"]
    shutil.copytree(classes, tmp_path, dirs_exist_ok=True)
    files = [*(tmp_path / "Annotations").glob("*.xml")]
    for path in files:
        if "blue" in path.name:  # `difficult` alone: it is judged in neither set
            difficult = "<difficult>1</difficult><bndbox>"
            path.write_text(path.read_text().replace("<bndbox>", difficult))
    main([str(word) for word in words])
    said = capsys.readouterr().out
    assert "training: 60 images; 0 blue, 20 green, 20 red" in said
    assert "test: 24 images; 0 blue, 8 green, 8 red" in said
    assert said.count("warning: no training image of blue\n") == 1
    for path in files:
        path.write_text("<annotation/>")
    assert "no classes in train" in refusal(main, words)


def softmax_of_two(number, folder):
    """Each trains on a class of its own; the first is then right about both, the second, whose
    label is wrong, about none."""
    with process_group(number, 2, folder):
        args, x = parse_args("--epochs 20 --batch-size 32".split()), 5 * torch.eye(2)
        train = x[number].expand(32, 2), torch.full((32,), number)
        test = (x, torch.tensor([0, 1])) if number == 0 else (x[1:], torch.tensor([0]))
        found = softmax_scores(train, test, ["a", "b"], args)
        assert found["top-1"] == pytest.approx(2 / 3)


def test_softmax_of_two_processes(tmp_path):
    start_processes(softmax_of_two, (tmp_path,), 2)


def test_softmax_is_sgd_by_hand(monkeypatch):
    """main_lincls.py: momentum 0.9, a tenth of the rate from epochs 60 and 80 of 100 on."""
    kept, args = [], parse_args("--epochs 5 --batch-size 4 --lr 320".split())
    monkeypatch.setattr(linear_probe, "distribute",
                        lambda layer, _device: kept.append(layer) or (layer, layer))
    torch.manual_seed(1)
    x, y = torch.randn(10, 3), torch.arange(10) % 3
    softmax_scores((7 * x, y), (x, y), [*"abc"], args)
    x, classes = x / x.norm(dim=1).mean(), torch.eye(3)
    torch.manual_seed(args.seed)
    w, b = torch.nn.init.normal_(torch.nn.Linear(3, 3).weight.data, std=0.01), torch.zeros(3)
    velocity = [torch.zeros(3, 3), torch.zeros(3)]
    for epoch, lr in enumerate((5.0, 5.0, 5.0, 0.5, 0.05)):  # 320 for 256 images
        order = np.random.default_rng(seed_for(args.seed, epoch, 0)).permutation(10)
        for rows in (order[:4], order[4:8]):
            error = ((x[rows] @ w.T + b).softmax(1) - classes[y[rows]]) / 4  # (4, 3)
            for p, v, gradient in zip((w, b), velocity, (error.T @ x[rows], error.sum(0))):
                v.mul_(0.9).add_(gradient)
                p.sub_(lr * v)
    torch.testing.assert_close(kept[0].weight.data, w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept[0].bias.data, b, atol=1e-4, rtol=1e-4)


def test_a_class_of_which_none_is_held_out_takes_the_others_cost():
    """A faint feature that tells all, which only a high cost finds."""
    torch.manual_seed(0)
    x, y = torch.randn(150, 20), torch.sign(torch.randn(150, 1)).repeat(1, 2)
    x[:, 0] = 0.05 * y[:, 0]
    y[np.random.default_rng(0).permutation(150)[:30], 1] = 0  # not judged
    found, low = (svm_scores((x, y), (x, y), ["a", "b"], parse_args(["--costs", *costs]))["b"]
                  for costs in (["0.01", "100000"], ["0.01"]))
    assert found > 0.99 > 0.9 > low


def test_the_papers_settings():
    """MoCo, Sec. 4.1; VOC07 (DUPR, 4.5.1); for scenes small ones."""
    args = parse_args(["--dataset", "voc", "--data", "x"])
    assert (args.train_split, args.test_split) == (["2007/trainval"], ["2007/test"])
    assert (args.image_size, args.crop) == (224, 0.875)
    assert args.costs == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert (args.lr, args.epochs, args.batch_size) == (30, 100, 256)
    args = parse_args([])
    assert (args.image_size, args.crop) == (96, 1)
