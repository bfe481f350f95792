"""The numbers behind the pictures, against loops and values computed by hand; every figure runs."""
import csv
import importlib
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import coordinates, make_photos, run
from matplotlib.figure import Figure
from PIL import Image
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import roi_align

import detco
import dupr
from common import View, resnet_stages
from detection.models import build_detector
from figures import backbones, of_detco, of_dupr
from figures.of_detco import attention_map, neighbours, pair_similarity, pooled
from figures.of_dupr import boxes_of_iou, correspond, counterpart
from figures.of_methods import METHODS, views_of
from finetune_fasterrcnn import main as fine_tune
from plumbing.drawing import mark_places
from plumbing.images import two_views
from plumbing.weights import save_checkpoint, save_tensors
from visualize import main


def iou(a, b):
    """Of two boxes, in floats."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_attention_map_is_the_scaled_mean():
    features = torch.rand(2, 5, 3, 3) + torch.tensor([0.0, 7.0]).view(2, 1, 1, 1)
    mapped = attention_map(features, 45)
    assert mapped.shape == (2, 45, 45)
    for one, image in zip(features.double(), mapped):
        mean = [[sum(one[:, y, x].tolist()) / 5 for x in range(3)] for y in range(3)]
        low, high = min(map(min, mean)), max(map(max, mean))
        for y in range(3):  # the middle pixel of a cell of 15 x 15 keeps its value
            for x in range(3):
                middle = image[15 * y + 7, 15 * x + 7].item()
                assert middle == pytest.approx((mean[y][x] - low) / (high - low), abs=1e-5)
        between = (image[7, 7] + image[7, 22]).item() / 2  # half-way between two such pixels
        assert image[7, 14:16].mean().item() == pytest.approx(between, abs=1e-5)
    assert attention_map(torch.ones(1, 4, 2, 2), 8).abs().max() == 0  # nothing stands out


def test_neighbours_find_a_planted_duplicate():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(40, 16), dim=1)
    features[31] = features[4]
    nearest, cosine = neighbours(features)
    assert nearest.shape == cosine.shape == (40, 9)
    assert nearest[4, 0] == 31 and nearest[31, 0] == 4
    assert cosine[4, 0].item() == pytest.approx(1, abs=1e-6)
    for i in range(40):
        others = [sum((features[i] * features[j]).tolist()) for j in range(40) if j != i]
        assert cosine[i].tolist() == pytest.approx(sorted(others, reverse=True)[:9], abs=1e-6)
        assert i not in nearest[i]
    assert neighbours(features[:3])[0].shape == (3, 2)  # fewer images than neighbours


def test_pair_similarity_by_hand():
    q, k = torch.eye(3), torch.eye(3)[[0, 2, 1]]  # pair 0 is alike, the others are at right angles
    positive, negative = pair_similarity(q, k)
    assert positive.item() == pytest.approx((math.e + 1 + 1) / 3)
    assert negative.item() == pytest.approx((2 * math.e + 4) / 6)


def test_boxes_have_the_iou_asked_for():
    torch.manual_seed(0)
    for _ in range(50):
        width, height = torch.randint(20, 500, (2,)).tolist()
        x, y = torch.rand(2, 2).sort(1).values * torch.tensor([[width - 4], [height - 4]])
        box = torch.stack([x[0], y[0], x[1] + 4, y[1] + 4])
        wanted = torch.linspace(0, 1, 20).double()
        found = boxes_of_iou(box, wanted, width, height)
        assert found.shape == (20, 4)
        assert found.min() >= -1e-9 and (found[:, 2:] <= torch.tensor([width, height]) + 1e-9).all()
        got = [iou(box.double().tolist(), b) for b in found.tolist()]
        large = (box[2] - box[0]) * (box[3] - box[1]) > 0.2 * width * height
        for value, goal in zip(got, wanted.tolist()):  # a large box leaves no room for IoU 0
            assert value == pytest.approx(goal, abs=1e-6) or large and goal < 0.1 and value < 0.35
    whole = boxes_of_iou(torch.tensor([0.0, 0, 100, 80]), torch.tensor([0.5]), 100, 80)
    assert iou([0, 0, 100, 80], whole[0].tolist()) == pytest.approx(0.5)


def test_boxes_go_in_all_directions():
    torch.manual_seed(0)
    box = torch.tensor([40.0, 40, 60, 60])
    found = boxes_of_iou(box, torch.full((300,), 0.3), 100, 100)
    moved = (found[:, :2] + found[:, 2:]) / 2 - 50
    assert (moved > 1).any(0).all() and (moved < -1).any(0).all()
    area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    assert (area > 440).any() and (area < 360).any()


def test_equation_9_by_hand():
    q = torch.tensor([[1.0, 0, 3], [0, 2, 4]]).view(1, 2, 1, 3)  # (B, C, S, S'): three positions
    k = torch.tensor([[2.0, 5, 4], [0, 0, -3]]).view(1, 2, 1, 3)
    assert dupr.region_similarity(q, k).item() == pytest.approx((1 + 0 + 0) / 3, abs=1e-6)
    k = torch.tensor([[1.0, 1, 6], [1, 1, 8]]).view(1, 2, 1, 3)
    assert dupr.region_similarity(q, k).item() == pytest.approx((2 * 0.5 ** 0.5 + 1) / 3, abs=1e-6)


def test_matches_are_the_best_cosines():
    torch.manual_seed(0)
    q, k = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    view = View(torch.zeros(3, 12, 12), torch.tensor([0.0, 0, 12, 12]), False)
    _, found, *_ = correspond(q, k, view, view)
    for p in range(12):
        one = q[:, p // 4, p % 4].tolist()
        cosines = []
        for r in range(12):
            other = k[:, r // 4, r % 4].tolist()
            lengths = math.hypot(*one) * math.hypot(*other)
            cosines.append(sum(a * b for a, b in zip(one, other)) / lengths)
        row, column = divmod(int(np.argmax(cosines)), 4)
        assert found[p].tolist() == [(column + 0.5) * 3, (row + 0.5) * 4]  # x y in pixels


def test_counterpart_shows_the_same_place():
    """In views whose pixels hold their source's x and y, a point and its counterpart read alike."""
    torch.manual_seed(0)
    image, seen = coordinates(200, 160), 0
    for _ in range(200):
        q, k = two_views(image, 64, (0.2, 1.0))
        points = 2 + 60 * torch.rand(20, 2)
        there = counterpart(points, q, k)
        inside = ((there > 2) & (there < 62)).all(1)
        seen += inside.sum().item()

        def read(view, at):  # bilinear, at x y
            grid = (at / 32 - 1).view(1, 1, -1, 2)
            return F.grid_sample(view.pixels[None, :2].float(), grid, align_corners=False)[0, :, 0]

        assert ((read(q, points) - read(k, there))[:, inside].abs() < 2).all()
    assert seen > 500


@pytest.mark.parametrize("flipped", [False, True])
def test_identical_views_correspond_everywhere(flipped):
    torch.manual_seed(0)
    view = View(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([10.0, 5, 90, 70]), flipped)
    features = torch.randn(8, 6, 6)
    points, found, seen, right, _ = correspond(features, features, view, view)
    assert right.all() and seen.all() and torch.equal(points, found)
    other = view._replace(flipped=not flipped)  # its features, mirrored, correspond as well
    points, found, seen, right, _ = correspond(features, features.flip(2), view, other)
    assert right.all() and torch.allclose(found[:, 0], 64 - points[:, 0])
    # and not mirrored they match themselves: right only where that is at most a cell off
    *_, right, _ = correspond(features, features, view, other)
    assert right.view(6, 6).any(0).tolist() == [False, False, True, True, False, False]


def test_correspond_counts_what_the_other_view_shows():
    torch.manual_seed(0)
    pixels = torch.zeros(3, 80, 80, dtype=torch.uint8)
    left = View(pixels, torch.tensor([0.0, 0, 80, 80]), False)
    right = View(pixels, torch.tensor([40.0, 0, 120, 80]), False)
    whole = torch.randn(4, 8, 12)  # one cell for 10 pixels of the source
    *_, seen, good, chance = correspond(whole[:, :, :8], whole[:, :, 4:], left, right)
    assert seen.view(8, 8).all(0).tolist() == [False] * 4 + [True] * 4  # the right half
    assert torch.equal(good, seen)
    # a corner cell has 2 x 2 cells around it, one at a side 2 x 3, any other 3 x 3; of 64
    assert (64 * chance.view(8, 8)[[0, 0, 1, 3], [4, 5, 4, 6]]).tolist() == [4, 6, 6, 9]
    assert not chance.view(8, 8)[:, :4].any()


def test_noise_corresponds_by_chance():
    torch.manual_seed(0)
    image, totals = torch.zeros(3, 200, 200, dtype=torch.uint8), torch.zeros(3)
    for _ in range(150):
        pair = two_views(image, 64, (0.2, 1.0))
        *_, seen, right, chance = correspond(torch.randn(8, 12, 12), torch.randn(8, 12, 12), *pair)
        totals += torch.stack([seen.sum(), right.sum(), chance.sum()])
    assert totals[0] > 5000
    assert totals[1].item() == pytest.approx(totals[2].item(), rel=0.1)


def test_pooled_patches_are_the_mean_of_nine():
    stages = resnet_stages("resnet18").eval()
    patches = torch.rand(2, 9, 3, 32, 32)
    with torch.no_grad():
        for image, unit in zip(patches, pooled(stages, patches)[2]):
            each = [stages(patch[None])[2].mean((2, 3))[0] for patch in image]
            assert torch.allclose(unit, F.normalize(sum(each) / 9, dim=0), atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_views_are_the_methods(name):
    image = (torch.rand(3, 12, 16) * 255).byte().repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.manual_seed(1)
    method = importlib.import_module(name)
    recipe = method.parse_args([])
    seen = views_of(method, image, recipe)
    assert len(seen) == {"detco": 4, "soco": 4}.get(name, 2)
    for view, pixels, _ in seen:
        assert 0 <= pixels.min() and pixels.max() <= 1 and view.pixels.dtype == torch.uint8
    if name == "soco":
        assert [v.pixels.shape[-1] for v, *_ in seen] == [64, 64, 32, 54]
        (_, _, one), *others = seen
        assert len(one) == recipe.boxes_per_image
        places = []
        for view, _, boxes in others:  # the same places of the image, in each view's pixels
            side, known = view.pixels.shape[-1], {48: "P2", 96: "P3"}
            whole = View(torch.zeros(3, side, side), torch.tensor([0.0, 0, 96, 96]), False)
            corners = []
            for name, (x1, y1, x2, y2) in boxes:
                level = next(known[s] for s in known if ((x2 - x1) * (y2 - y1)) ** 0.5 <= s)
                assert name == level
                ends = counterpart(torch.tensor([[x1, y1], [x2, y2]]), view, whole) / side
                corners.append(ends.sort(0).values)
            places.append(torch.stack(corners))
        assert torch.allclose(places[0], places[1], atol=1e-3)
        assert torch.allclose(places[0], places[2], atol=1e-3)
    if name == "detco":  # nine patches of 16 pixels, 2 between them
        assert [p.shape[-1] for _, p, _ in seen] == [48, 48, 56, 56]
    if name in ("moco_v2", "barlow_twins", "vicreg"):  # what the view shows, but for the colours
        assert [view.box.tolist() for view, *_ in seen] != [[0, 0, 128, 96]] * 2
        assert all(view.pixels.shape == pixels.shape for view, pixels, _ in seen)


def test_equal_colours_are_equal_places():
    """DUPR's places of the same colour, in both views and in the image."""
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    whole, turned = View(torch.zeros(3, 64, 64), torch.tensor([0.0, 0, 64, 64]), False), set()
    for seed in range(8):
        torch.manual_seed(seed)
        seen, places = views_of(dupr, image, dupr.parse_args([])), []
        for view, _, (box, flipped) in seen:
            axes = Figure().add_subplot()
            mark_places(axes, box, flipped, 4)
            assert flipped == view.flipped and len(axes.patches) == 16
            shown = {}  # colour -> the middle of its place, in the image's pixels
            for patch in axes.patches:
                if patch.get_facecolor()[3]:
                    (x, y), size = patch.get_xy(), (patch.get_width(), patch.get_height())
                    middle = torch.tensor([[x + size[0] / 2, y + size[1] / 2]])
                    shown[patch.get_facecolor()] = counterpart(middle, view, whole)[0].tolist()
            places.append(shown)
        one, two = places
        assert one.keys() == two.keys() and len(one) == 3
        assert all(one[colour] == pytest.approx(two[colour], abs=1e-3) for colour in one)
        turned.add(tuple(view.flipped for view, *_ in seen))
    assert len(turned) > 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone, one of another depth, photos, photos with VOC's annotations, a short log."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(3)
    save_tensors(resnet_stages("resnet18").state_dict(), root / "backbone.pt")
    make_photos(root / "photos", 6)
    shutil.copy(root / "photos" / "0002.jpg", root / "photos" / "twin.jpg")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / "voc" / folder).mkdir(parents=True)
    make_photos(root / "voc" / "JPEGImages", 4)
    (root / "voc" / "ImageSets/Main/test.txt").write_text("0000\n0001\n0002\n0003\n")
    for i in range(4):
        (root / "voc" / "Annotations" / f"000{i}.xml").write_text(
            f"<annotation><object><name>{'ab'[i % 2]}</name><bndbox><xmin>11</xmin><ymin>6</ymin>"
            "<xmax>50</xmax><ymax>45</ymax></bndbox></object></annotation>")
    return root


def figure(files, tmp_path, name, *words):
    """Draw it small -> its numbers; the picture is there and not of one colour."""
    out = tmp_path / "figure.png"
    main([name, "--size", "64", "--out", str(out), "--csv", str(tmp_path / "numbers.csv"),
          *map(str, words)])
    with Image.open(out) as picture:
        assert picture.width >= 400 and len(picture.convert("RGB").getcolors(2 ** 24)) > 50
    return rows_of(tmp_path / "numbers.csv")


SMALL = {"attention": 2, "retrieval": 8, "similarity": 33, "iou-similarity": 2, "correspondence": 2,
         "features": 1}


@pytest.mark.parametrize("name", SMALL)
def test_figures_of_scenes_and_random_weights(files, tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(of_detco, "FEWEST_BATCHES", 1)
    rows = figure(files, tmp_path, name, "--images", SMALL[name], "--rows", 2,
                  "--weights", "none", files / "backbone.pt", "--labels", "one", "other")
    text = capsys.readouterr().out
    assert "other" in text and "figure.png is the figure" in text
    if name == "iou-similarity":
        assert [float(r["iou"]) for r in rows] == sorted(float(r["iou"]) for r in rows)
        assert sum(int(r["boxes"]) for r in rows) % 20 == 0
        assert all(-1 <= float(r["one mean"]) <= 1 for r in rows)
        assert float(rows[-1]["other mean"]) > float(rows[0]["other mean"])
    else:
        half = len(rows) // 2
        assert [row["weights"] for row in rows] == ["one"] * half + ["other"] * half
    if name == "similarity":
        assert rows[0]["batches"] == "1"  # the last image alone is no batch
        assert all(math.exp(-1) <= float(rows[0][f"{sign}_{kind}"]) <= math.e
                   for sign in ("positive", "negative") for kind in ("global", "local"))


def test_the_same_command_draws_the_same(files, tmp_path):
    words = "correspondence", "--images", 2, "--rows", 1, "--seed", 4
    assert figure(files, tmp_path, *words) == figure(files, tmp_path, *words)


def test_retrieval_of_a_folder(files, tmp_path):
    (row,) = figure(files, tmp_path, "retrieval", "--data", files / "photos", "--arch", "resnet18")
    assert row["images"] == "7" and "share_a_class" not in row
    others = figure(files, tmp_path, "retrieval", "--dataset", "voc", "--data", files / "voc",
                    "--split", "test", "--arch", "resnet18")
    assert float(others[0]["of_any_pair"]) == pytest.approx(2 * 2 / 12)  # a b a b
    assert float(others[0]["share_a_class"]) == pytest.approx(1 / 3)  # all others are neighbours


def test_a_broken_image_is_left_out_and_named(files, tmp_path, capsys):
    """Another image in its place would be there twice, and be its own neighbour."""
    make_photos(tmp_path / "photos", 101, size=(20, 16))
    (tmp_path / "photos" / "0003.jpg").write_bytes(b"no jpeg")
    words = "--arch", "resnet18", "--data", tmp_path / "photos"
    (row,) = figure(files, tmp_path, "retrieval", *words)
    assert row["images"] == "100" and float(row["first_cosine"]) < 0.99999
    out = capsys.readouterr().out
    assert "0003.jpg' (" in out and "): left out (1 of 101 so far)" in out
    for i in (4, 5):
        (tmp_path / "photos" / f"000{i}.jpg").write_bytes(b"no jpeg")
    with pytest.raises(SystemExit, match="3 of 101 images cannot be decoded: over 1%"):
        figure(files, tmp_path, "retrieval", *words)


def test_another_image_stands_in_for_a_broken_one(files, tmp_path):
    make_photos(tmp_path / "photos", 4)
    (tmp_path / "photos" / "0001.jpg").write_bytes(b"no jpeg")
    for seed in range(4):
        (row,) = figure(files, tmp_path, "attention", "--arch", "resnet18", "--images", 1,
                        "--data", tmp_path / "photos", "--seed", seed)
        assert row["image"] == "0"


def test_an_image_of_one_line(files, tmp_path):
    make_photos(tmp_path / "photos", 2)
    make_photos(tmp_path / "photos" / "wide", 1, size=(300, 2))
    (row,) = figure(files, tmp_path, "retrieval", "--arch", "resnet18", "--data",
                    tmp_path / "photos")
    assert row["images"] == "3"


def test_a_swin_shows_no_attention(files, tmp_path):
    rows = figure(files, tmp_path, "attention", "--arch", "swin_t", "--rows", 1)
    assert float(rows[0]["share_above_half"]) == 0  # its layer norm leaves a mean of 0 everywhere


def test_iou_similarity_of_voc(files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(of_dupr, "roi_align", lambda level, rois, *args, **more: seen.append(
        rois[0][0].tolist()) or roi_align(level, rois, *args, **more))
    rows = figure(files, tmp_path, "iou-similarity", "--dataset", "voc", "--data", files / "voc",
                  "--split", "test", "--arch", "resnet18", "--level", "res3")
    assert sum(int(row["boxes"]) for row in rows) == 80
    assert seen[0] == pytest.approx([10 * 64 / 80, 5 * 64 / 60, 50 * 64 / 80, 45 * 64 / 60])


def test_attention_in_and_outside_of_boxes(files, tmp_path, monkeypatch):
    """A network that is active where the image is bright, on images bright in their box alone."""
    class Bright(torch.nn.Module):
        def forward(self, x):
            return [F.avg_pool2d(x, 2)] * 4

    box = torch.tensor([[32.0, 32.0, 96.0, 56.0]])
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[:, 32:56, 32:96] = 255
    monkeypatch.setattr(backbones, "pictures", lambda args: iter([(image, dict(boxes=box))]))
    monkeypatch.setattr(backbones, "load_backbones", lambda *_: [("random", Bright(), {})])
    (row,) = figure(files, tmp_path, "attention")
    assert float(row["mean_in_boxes"]) > 0.95 and float(row["elsewhere"]) < 0.03
    assert float(row["share_above_half"]) == pytest.approx(32 * 24 / 64 ** 2, abs=0.02)


def test_similarity_of_detcos_heads(files, tmp_path, monkeypatch):
    monkeypatch.setattr(of_detco, "FEWEST_BATCHES", 1)
    recipe = detco.parse_args(["--dim", "8", "--queue-size", "16"])
    torch.manual_seed(0)
    model = detco.DetCo("resnet18", 8, 16, weights=recipe.weights)
    saved = dict(method="detco", args=vars(recipe), model=model.state_dict())
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    words = "similarity", "--images", 32, "--weights", tmp_path / "checkpoint.pt"
    (heads,) = figure(files, tmp_path, *words)
    assert heads["embeddings_of"] == "heads"
    for parameter in model.encoder_q.local_heads[3].parameters():
        parameter.data.zero_()  # then local queries are all 0, and exp(0) = 1
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    (changed,) = figure(files, tmp_path, *words)
    assert changed["positive_global"] == heads["positive_global"]
    assert float(changed["positive_local"]) == float(changed["negative_local"]) == 1
    assert float(heads["positive_local"]) != 1
    for parameter in model.encoder_k.global_heads[3].parameters():
        parameter.data.zero_()  # then keys are
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    assert float(figure(files, tmp_path, *words)[0]["positive_global"]) == 1
    saved["args"]["no_local"] = True
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    with pytest.raises(SystemExit, match="has no local head at res5"):
        figure(files, tmp_path, *words[:-1], "none", words[-1])


def test_features_of_an_fpn(files, tmp_path):
    model = build_detector("resnet18", 2, fpn_channels=8)
    save_tensors(model.state_dict(), tmp_path / "detector.pt")
    rows = figure(files, tmp_path, "features", "--weights", tmp_path / "detector.pt", "none")
    assert [row["level"] for row in rows] == [f"{n}{i}" for n in ("P", "Res") for i in range(2, 6)]
    model = build_detector("resnet18", 2, "retinanet", fpn_channels=8)
    save_tensors(model.state_dict(), tmp_path / "retinanet.pt")  # its pyramid has no P2
    rows = figure(files, tmp_path, "features", "--weights", tmp_path / "retinanet.pt")
    assert [row["level"] for row in rows] == [f"Res{i}" for i in range(2, 6)]
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)  # its FPN has no norm
    save_tensors(model.state_dict(), tmp_path / "torchvision.pt")
    rows = figure(files, tmp_path, "features", "--weights", tmp_path / "torchvision.pt")
    assert [row["level"] for row in rows] == [f"Res{i}" for i in range(2, 6)]


def test_detections_of_a_fine_tuned_detector(files, tmp_path):
    fine_tune(["--masks", "--keypoints", "--iterations", "1", "--train-scenes", "8",
               "--test-scenes", "4", "--workers", "0", "--rois", "8", "--fpn-channels", "8",
               "--out", str(tmp_path / "ft")])
    rows = figure(files, tmp_path, "detections", "--rows", 2, "--weights",
                  tmp_path / "ft" / "checkpoint.pt", "none")
    assert [row["weights"] for row in rows] == ["ft"] * 2 + ["random"] * 2
    assert rows[0]["annotated"] == rows[2]["annotated"] != "0"
    assert rows[0]["drawn"] == "0" != rows[0]["detections"]  # none has a score of 0.3
    rows = figure(files, tmp_path, "detections", "--rows", 1, "--score", 0, "--weights",
                  tmp_path / "ft" / "checkpoint.pt")
    assert rows[0]["drawn"] == rows[0]["detections"] != "0"
    fine_tune(["--dataset", "voc", "--data", str(files / "voc"), "--train-split", "test",
               "--test-split", "test", "--detector", "fpn", "--arch", "resnet18", "--min-size",
               "64", "--max-size", "64", "--rois", "8", "--fpn-channels", "8", "--iterations", "1",
               "--batch-size", "1", "--precise-bn", "1", "--workers", "0", "--out",
               str(tmp_path / "voc")])
    tuned = ["detections", "--rows", 2, "--weights", tmp_path / "voc" / "checkpoint.pt"]
    rows = figure(files, tmp_path, *tuned, "--data", files / "voc")  # its own split
    assert [row["annotated"] for row in rows] == ["1", "1"]
    rows = figure(files, tmp_path, "detections", "--rows", 2, "--dataset", "voc", "--split", "test",
                  "--data", files / "voc", *tuned[3:], "none", "--labels", "tuned", "untrained")
    assert [row["annotated"] for row in rows] == ["1"] * 4
    scenes = tmp_path / "ft" / "checkpoint.pt"
    with pytest.raises(SystemExit, match="knows other classes"):
        figure(files, tmp_path, *tuned, scenes)
    with pytest.raises(SystemExit, match="of --data need --dataset voc or coco"):
        figure(files, tmp_path, *tuned[:-1], scenes, "--data", files / "photos")
    with pytest.raises(SystemExit, match="other.txt"):
        figure(files, tmp_path, *tuned, "--split", "other")


def test_curves_of_runs(files, tmp_path):
    for name, text in (("a", "step,epoch,loss,lr\n1,0.5,3,1\n2,1.0,2,0.5\n"),
                       ("b", "step,epoch,loss,extra\n1,0.5,5,7\n2,1.0,1,8\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(text)
    rows = figure(files, tmp_path, "curves", "--weights", tmp_path / "a", tmp_path / "b")
    assert [(r["run"], r["column"]) for r in rows] == [("a", "loss"), ("b", "loss")]
    assert [float(rows[1][k]) for k in ("first", "last", "least", "most")] == [5, 1, 1, 5]
    rows = figure(files, tmp_path, "curves", "--weights", tmp_path / "a" / "log.csv")
    assert {r["column"] for r in rows} == {"loss", "lr"}
    for name in ("a", "b"):  # the parts of a loss are drawn of one run alone
        (tmp_path / name / "log.csv").write_text("step,epoch,gg_res5\n1,0.5,3\n")
    with pytest.raises(SystemExit, match="no column is in two of the logs"):
        figure(files, tmp_path, "curves", "--weights", tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "log.csv").write_text("step,epoch,extra\n1,0.5,5\n")
    (tmp_path / "a" / "log.csv").write_text("step,epoch,gg\n1,0.5,3\n2,1.0")  # cut off
    assert len(figure(files, tmp_path, "curves", "--weights", tmp_path / "a")) == 1
    with pytest.raises(SystemExit, match="no column is in two of the logs"):
        figure(files, tmp_path, "curves", "--weights", tmp_path / "a", tmp_path / "b")
    with pytest.raises(SystemExit, match="is no log of a run"):
        figure(files, tmp_path, "curves", "--weights", files / "backbone.pt")


def test_bad_input_is_one_line(files, tmp_path):
    photos, weights = str(files / "photos"), str(files / "backbone.pt")
    for words, message in (
            (["iou-similarity", "--data", photos, "--arch", "resnet18"], "needs boxes"),
            (["attention", "--weights", "missing.pt"], "no such file: missing.pt"),
            (["attention", "--weights", weights, "--arch", "resnet50"], "another architecture"),
            (["attention", "--weights", "none", "none"], "two of the names are alike"),
            (["attention", "--weights", "none", "--labels", "a", "b"], "2 --labels for 1"),
            (["attention", "--arch", "resnet18", "resnet34"], "2 --arch for 1 --weights"),
            (["attention", "--data", "nowhere"], "no such folder: nowhere"),
            (["attention", "--split", "test"], "--split needs --dataset"),
            (["similarity", "--images", "40"], "needs 320 images or more"),
            (["attention", "--size", "8"], "argument --size: 8 is not at least 32"),
            (["attention", "--rows", "0"], "argument --rows: 0 is not at least 1"),
            (["attention", "--out", "x.docx"], "--out x.docx: no .png, .jpg"),
            (["curves"], "curves takes folders of runs"),
            (["detections", "--weights", weights], "is no checkpoint of finetune_fasterrcnn"),
            (["detections", "--data", photos], "needs --weights with a checkpoint"),
            (["detections", "--dataset", "voc"], "--dataset needs --data"),
            (["features", "--dataset", "voc"], "--dataset needs --data")):
        with pytest.raises(SystemExit, match=message):
            main([words[0], "--out", str(tmp_path / "x.png"), *words[1:]])
    assert not (tmp_path / "x.png").exists()


def test_as_a_user(files, tmp_path):
    code, out, err = run("visualize.py", "views", "--methods", "detco", "dupr", "--out",
                         tmp_path / "v.png", "--data", files / "photos")
    assert (code, err) == (0, "") and "is the figure" in out
    assert (tmp_path / "v.png").stat().st_size > 10000
