"""SoCo's boxes, views, networks and loss.  What is true of every method is in test_methods.py."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import column, coordinates, make_photos
from PIL import Image
from torchvision.ops import roi_align

import common
import selective_search
import soco
from common import InputError, box_into_view
from detection.models import build_detector
from plumbing.files import ImageFolder
from plumbing.images import load_batches
from plumbing.weights import load_checkpoint
from scenes import Scenes

SIZES = dict(arch="resnet18", fpn_channels=8, hidden=24, dim=16)
BOXES = torch.tensor([[[4., 4, 40, 30], [20, 10, 60, 60]], [[0, 0, 64, 64], [30, 8, 44, 60]],
                      [[10, 10, 30, 30], [10, 10, 30, 30]], [[2, 20, 50, 44], [33, 3, 63, 63]]])


def batch(number=4, sizes=(64, 64, 32), seed=0):
    """Random views of ``number`` images, a multiple of 4, and two boxes in each."""
    torch.manual_seed(seed)
    views = [torch.randn(number, 3, size, size) for size in sizes]
    return views, [BOXES.repeat(number // 4, 1, 1) * size / 64 for size in sizes]


def small():
    """A small SoCo, as after its first steps: the last batch norm of a block is no longer 0."""
    model = soco.SoCo(**SIZES)
    for network in (model.online, model.target):
        for name, p in network.backbone.body.named_parameters():
            if name.endswith("bn2.weight"):
                torch.nn.init.ones_(p)
    return model


def settled(model):
    """In eval mode, with batch statistics and weights of the target of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "target" in name:
                p.add_(0.05 * torch.randn_like(p))
    model.train()
    for _ in range(3):
        model(*batch(8))
    return model.eval()


# --------------------------------------------------------------------------------------- the loss


def test_similarity_loss_is_minus_two_cosines():
    torch.manual_seed(0)
    v, target = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    found = soco.similarity_loss(v, target)
    cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(v, target)]
    expected = sum(-2 * c for c in cosines) / 5
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, v)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, v)[0])
    assert not torch.autograd.grad(soco.similarity_loss(v, target), target, allow_unused=True)[0]
    assert soco.similarity_loss(v, 3 * v).item() == pytest.approx(-2)
    assert soco.similarity_loss(v.bfloat16(), v.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sizes, least", [((64, 64, 32), -8), ((64, 64, 32, 48), -12)])
def test_loss_and_gradients_equal_a_loop_over_boxes(sizes, least):
    """Each box of each image alone through the networks, in eval mode, and L_i + L~_i of it."""
    torch.manual_seed(0)
    model = settled(small())
    views, boxes = ([each[:2] for each in batches] for batches in batch(4, sizes))
    loss, parts = model(views, boxes)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert least < loss < -least
    model.zero_grad()
    total = 0

    def cosine(a, b):
        return (a * b).sum() / (a.norm() * b.norm())

    for image in range(2):
        for i in range(2):
            one = [(view[image:image + 1], box[image:image + 1, i:i + 1])
                   for view, box in zip(views, boxes)]
            online = [model.predictor(model.online(*seen)) for seen in one]
            target = [model.target(*seen).detach() for seen in one]
            for other in range(1, len(sizes)):
                total = total - 2 * cosine(online[0], target[other]) / 4  # L_i
                total = total - 2 * cosine(online[other], target[0]) / 4  # L~_i
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert found[name] is None and name.startswith("target")
        else:
            assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name
    pairs = -2 * sum(2 * value for name, value in parts.items() if "similarity" in name)
    torch.testing.assert_close(loss.detach(), pairs)
    assert {n for n in parts if "similarity" in n} == {f"similarity_v{i + 2}"
                                                      for i in range(len(sizes) - 1)}


class Constant(torch.nn.Module):
    def forward(self, _view, _boxes):
        return torch.ones(4, 16)


def test_the_least_loss():
    """Where the predictor says what the target does."""
    for number, least in ((3, -8), (4, -12)):
        model = small()
        model.online = model.target = Constant()
        model.predictor = torch.nn.Identity()
        loss, parts = model([None] * number, [None] * number)
        assert loss.item() == pytest.approx(least) and parts["deviation"] == 0


def test_collapse_statistics_by_hand():
    torch.manual_seed(0)
    corners = 7 * torch.eye(8)[:4].repeat(9, 1)  # four, in three directions
    found = soco.collapse_statistics(corners)
    assert found["directions"] == pytest.approx(3) and found["deviation"] == pytest.approx(
        (0.25 * 0.75) ** 0.5 / 2)
    line = soco.collapse_statistics(torch.tensor([[1., 0.1], [1., -0.1], [5, 0.5]]))
    assert line["directions"] == pytest.approx(1, abs=1e-3)
    sphere = soco.collapse_statistics(torch.randn(4000, 6))
    assert sphere["directions"] > 5.9 and sphere["deviation"] == pytest.approx(6 ** -0.5, rel=0.02)
    assert soco.collapse_statistics(torch.ones(5, 3)) == dict(deviation=0, directions=0)


def test_the_target_starts_as_a_copy_and_follows():
    torch.manual_seed(0)
    model, (views, boxes) = small(), batch()
    before = model.target(views[0], boxes[0])
    torch.testing.assert_close(before, model.online(views[0], boxes[0]))
    with torch.no_grad():
        for p in model.online.parameters():
            p.mul_(0.8).add_(0.01)
    assert torch.equal(before, model.target(views[0], boxes[0]))
    expected = [0.9 * t + 0.1 * o for t, o in zip(model.target.parameters(),
                                                  model.online.parameters())]
    common.momentum_update(model.online, model.target, 0.9)
    for p, e in zip(model.target.parameters(), expected):
        torch.testing.assert_close(p.data, e.data)
    assert (model.target(views[0], boxes[0]) - before).abs().max() > 1e-3


# ----------------------------------------------------------------------------- scale and RoI Align


def test_a_box_goes_to_the_level_of_its_size():
    network = soco.Network(**SIZES)
    levels = {8: 0, 47: 0, 48: 0, 48.1: 1, 49: 1, 95: 1, 96: 1, 96.1: 2, 97: 2, 192: 2, 192.1: 3,
              193: 3, 224: 3, 1000: 3}
    for side, level in levels.items():
        for ratio in (1, 4, 1 / 4):
            w, h = side * ratio ** 0.5, side / ratio ** 0.5
            box = torch.tensor([[0., 0., w, h]])
            assert network.pool.map_levels(box).item() == level, (side, ratio)
            flat = {str(i): torch.full((1, 8, 64, 64), float(i)) for i in range(4)}
            pooled = network.pool(flat, [box.clamp(max=256)])
            if side < 200 and ratio == 1:
                torch.testing.assert_close(pooled, torch.full_like(pooled, level))


def test_a_residual_block_starts_as_the_identity():
    """Its last batch norm is 0 at the start, of ResNet-18 as of ResNet-50."""
    torch.manual_seed(0)
    for arch, last, number in (("resnet18", "bn2", 8), ("resnet50", "bn3", 16)):
        body = soco.Network(**{**SIZES, "arch": arch}).backbone.body
        blocks = [block for i in range(1, 5) for block in getattr(body, f"layer{i}")]
        assert len(blocks) == number
        assert not any(block.get_submodule(last).weight.any() for block in blocks)
        assert all(block.bn1.weight.eq(1).all() for block in blocks)
        x = torch.rand(2, blocks[1].conv1.in_channels, 8, 8)
        assert torch.equal(blocks[1](x), x)
        body = soco.Network(**{**SIZES, "arch": arch}, zero_init_residual=False).backbone.body
        assert body.get_submodule(f"layer1.1.{last}").weight.eq(1).all()


@pytest.mark.parametrize("size", [224, 112, 40, 36])
def test_pooling_reads_where_the_box_is(size):
    """Each level a map of its own coordinates, in the view's pixels; whatever was pooled before."""
    network = soco.Network(**SIZES)
    pyramid = {}
    for i, stride in enumerate((4, 8, 16, 32)):
        cells = (torch.arange(math.ceil(size / stride)) + 0.5) * stride
        pyramid[str(i)] = torch.stack([cells.expand(len(cells), -1), cells[:, None].expand(
            -1, len(cells))])[None].repeat(2, 1, 1, 1)
    side = size * torch.tensor([0.15, 0.25, 0.5])  # a cell of P2 at least
    boxes = torch.stack([torch.stack([0.2 * size + 0 * s, 0.15 * size + 0 * s, 0.2 * size + s,
                                      0.15 * size + s]) for s in side])
    pooled = network.pool(pyramid, [boxes, boxes + 0.1 * size])
    for regions, where in ((pooled[:3], boxes), (pooled[3:], boxes + 0.1 * size)):
        for region, (x1, y1, x2, y2) in zip(regions, where):
            centres = (torch.arange(7) + 0.5) / 7
            torch.testing.assert_close(region[0, 3], x1 + centres * (x2 - x1), atol=1e-2, rtol=0)
            torch.testing.assert_close(region[1, :, 3], y1 + centres * (y2 - y1), atol=1e-2, rtol=0)


def test_one_level_a_box_equals_all_four_with_three_masked():
    torch.manual_seed(0)
    network = soco.Network(**SIZES).eval()
    image, sides = torch.randn(1, 3, 224, 224), torch.tensor([20., 48, 60, 96, 130, 192, 210])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    found = network(image, boxes[None])
    pyramid, expected = network.backbone(image), 0
    for name, low, high in (("0", 0, 48), ("1", 48, 96), ("2", 96, 192), ("3", 192, 1000)):
        level = pyramid[name]
        regions = roi_align(level, [boxes], 7, level.shape[-1] / 224, aligned=True)
        mask = ((sides > low) & (sides <= high)).float()[:, None]
        expected = expected + mask * network.projector(network.head(regions))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------- boxes and views


def read(pixels, box):
    """The means of four quarters of a box (P, 4) of one image (3, H, W): (P, 3, 2, 2)."""
    return roi_align(pixels[None].float(), [box], 2, aligned=True)


@pytest.mark.parametrize("width, height, size, small, view4", [
    (250, 200, 224, 112, 192), (120, 240, 96, 48, 80), (200, 90, 128, 64, 100)])
def test_a_box_shows_the_same_place_in_all_views(width, height, size, small, view4):
    args = soco.parse_args(f"--data x --image-size {size} --small-size {small} --view4 {view4} "
                           "--boxes-per-image 3".split())
    image, flips, shares, ratios = coordinates(width, height), set(), [], []
    for seed in range(150):
        torch.manual_seed(seed)
        boxes = soco.random_boxes(width, height, 6)
        views, places, no_box = soco.make_views((image, boxes), args)
        assert [v.pixels.shape for v in views] == [(3, s, s) for s in (size, size, small, view4)]
        assert views[0].box.tolist() == [0, 0, width, height]
        assert all(torch.equal(v.box, views[1].box) for v in views[1:])
        flips.add(tuple(bool(v.flipped) for v in views))
        crop = views[1].box
        share = (crop[2:] - crop[:2]).prod() / (width * height)
        assert 0.47 < share <= 1
        shares.append(share.item())
        w, h = (crop[2:] - crop[:2]).tolist()
        assert (w - 1) / (h + 1) <= 4 / 3 and (w + 1) / (h - 1) >= 3 / 4  # in the image's pixels
        ratios.append(math.log(w / h))
        assert (places[:, :2] >= crop[:2]).all() and (places[:, 2:] <= crop[2:]).all()
        quarter = torch.tensor([0.25, 0.75])
        for view in views:
            side = view.pixels.shape[-1]
            flipped = torch.tensor([view.flipped])
            box = box_into_view(places[None], view.box[None], flipped, side)[0]
            assert (box >= -1e-3).all() and (box <= side + 1e-3).all()
            seen = read(view.pixels, box)
            seen = seen.flip(3) if view.flipped else seen
            scale = (view.box[2:] - view.box[:2]).max() / side
            for p, (x1, y1, x2, y2) in enumerate(places.tolist()):
                slack = 1 + scale + 0.03 * max(x2 - x1, y2 - y1)
                x, y = x1 + quarter * (x2 - x1) - 0.5, y1 + quarter * (y2 - y1) - 0.5
                assert (seen[p, 0] - x).abs().max() < slack
                assert (seen[p, 1] - y[:, None]).abs().max() < slack
    assert len(flips) == 16 and min(shares) < 0.55
    if (width, height) == (250, 200):  # the others are too long for large crops of these ratios
        assert max(shares) > 0.9
        assert min(ratios) < math.log(0.8) and max(ratios) > math.log(1.28)
        assert 1 < math.exp(np.mean(ratios)) < 1.12  # in V1's square it would be 1.25


def test_chosen_boxes_by_hand():
    crop = torch.tensor([10., 20, 110, 70])  # shown as 200 x 200: 2 and 4 times as large
    boxes = torch.tensor([[0., 0, 50, 50], [20, 30, 60, 60], [108, 30, 200, 60], [20, 66, 60, 90],
                          [20, 68.1, 60, 90], [106, 20, 110, 22], [0, 0, 10, 70]])
    usable = {(10, 20, 50, 50), (20, 30, 60, 60), (20, 66, 60, 70), (106, 20, 110, 22)}
    torch.manual_seed(0)
    seen = []
    for _ in range(60):
        places, no_box = soco.choose_boxes(boxes, crop, 200, 3)
        assert places.shape == (3, 4) and not no_box and len({*map(tuple, places.tolist())}) == 3
        seen += map(tuple, places.tolist())
    assert {*seen} == usable and min(seen.count(box) for box in usable) > 30
    places, no_box = soco.choose_boxes(boxes, crop, 200, 6)
    assert {*map(tuple, places.tolist())} == usable and places.shape == (6, 4) and not no_box
    for nothing in (boxes[2:3], torch.zeros(0, 4)):
        places, no_box = soco.choose_boxes(nothing, crop, 200, 2)
        assert places.tolist() == [crop.tolist()] * 2 and no_box


def test_random_boxes_pass_the_filter_and_fill_it():
    torch.manual_seed(0)
    for width, height in ((200, 150), (60, 240)):
        boxes = soco.random_boxes(width, height, 2000)
        kept = selective_search.keep_object_like(boxes.double().numpy(), width, height)
        assert len(kept) >= 0.999 * len(boxes) > 400  # float32 at the filter's border
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
        w, h = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        assert (w / h).min() < 0.36 and (w * h).sqrt().max() > 0.75 * (width * height) ** 0.5
        assert boxes[:, 0].min() < 2 and boxes[:, 2].max() > width - 2


def test_jitter_moves_half_of_the_boxes_by_a_tenth_of_their_sides():
    torch.manual_seed(0)
    boxes = torch.tensor([60., 80, 100, 160]).expand(500, 4, 4)  # 40 x 80
    found = soco.jitter_boxes(boxes, 224)
    moved = (found != boxes).any(-1)
    assert abs(moved.float().mean() - 0.5) < 0.04
    shift = (found[moved] - torch.tensor([60., 80, 100, 160]))  # (n, 4)
    r = torch.stack([shift[:, 0] / 40, shift[:, 1] / 80, (shift[:, 2] - shift[:, 0]) / 40,
                     (shift[:, 3] - shift[:, 1]) / 80], dim=1)
    assert r.abs().max() < 0.1001 and (r.amax(0) > 0.095).all() and (r.amin(0) < -0.095).all()
    assert (torch.corrcoef(r.T) - torch.eye(4)).abs().max() < 0.12  # each is drawn for itself
    assert soco.jitter_boxes(torch.tensor([[0., 0, 224, 224]]).expand(99, 4), 224).max() == 224
    assert torch.equal(soco.jitter_boxes(boxes, 224, strength=0), boxes)
    everywhere = soco.jitter_boxes(boxes, 224, 0.3, p=1)
    assert (everywhere != boxes).any(-1).all()


def test_sizes_of_the_recipe():
    with torch.device("meta"):
        model = soco.SoCo()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    online = model.online
    assert count(online.backbone.body) == 23_508_032
    assert count(online.head) == 4 * (256 * 256 * 9 + 2 * 256) + (256 * 49 + 1) * 1024
    assert count(online.projector) == 1025 * 4096 + 2 * 4096 + 4097 * 256
    assert count(model.predictor) == 257 * 4096 + 2 * 4096 + 4097 * 256
    assert count(model.target) == count(online)
    assert soco.parse_args(["--view4"]).view4 == 192  # SoCo*


def test_found_proposals_are_kept(tmp_path, monkeypatch):
    def find(number, *flags):
        args = soco.parse_args(["--workers", "0", "--out", str(tmp_path), *flags])
        return soco.find_proposals(args, Scenes(number, size=96, seed=0))

    first = find(3)
    for i in range(3):
        boxes = selective_search.propose(Scenes(3, size=96, seed=0)[i], "single", 224)
        assert np.array_equal(boxes, first["boxes"][slice(*first["offsets"][i:i + 2])])
    monkeypatch.setattr(selective_search, "propose", None)
    again = find(3)
    assert len(first["boxes"]) > 3 and all(np.array_equal(first[key], again[key]) for key in first)
    with pytest.raises(InputError, match="other images or settings"):
        find(4)
    monkeypatch.undo()
    assert len(find(4, "--fresh")["names"]) == 4


# ------------------------------------------------------------------------------------- whole runs

TINY = ("--scenes 40 --epochs 2 --batch-size 16 --image-size 32 --small-size 32 --workers 0 "
        "--log-every 1 --fpn-channels 8 --hidden 24 --dim 16").split()


def test_what_is_pre_trained_is_what_is_fine_tuned(tmp_path, capsys):
    """detector.pt under the names of torchvision's Faster R-CNN: the same box, the same h."""
    soco.main([*TINY, "--epochs", "1", "--proposals", "random", "--out", str(tmp_path)])
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"] == "soco"
    model = small()
    model.load_state_dict(state["model"])
    capsys.readouterr()
    detector = build_detector("resnet18", 3, "fpn", fpn_channels=8,
                              weights=tmp_path / "detector.pt")
    assert capsys.readouterr().out.count("tensors loaded from") == 3
    torch.manual_seed(0)
    image, box = torch.randn(1, 3, 64, 64), torch.tensor([[4., 6, 40, 38]])  # in P2 for both
    online = model.online.eval()
    h = []
    for backbone, pool, head in ((online.backbone, online.pool, online.head),
                                 (detector.eval().backbone, detector.roi_heads.box_roi_pool,
                                  detector.roi_heads.box_head)):
        h.append(head(pool(backbone(image), [box], [(64, 64)])))
    torch.testing.assert_close(*h)
    assert h[0].std() > 1e-3
    backbone = load_checkpoint(tmp_path / "backbone.pt")
    body = detector.backbone.body.state_dict()
    assert {*backbone} == {*body} and all(torch.equal(backbone[k], body[k]) for k in body)


def test_boxes_of_reduced_photos_are_in_the_files_pixels(tmp_path):
    images = ImageFolder(make_photos(tmp_path / "data", 1, size=(645, 485)))
    np.savez(tmp_path / "p.npz", names=images.names, settings="by hand", sizes=[[645, 485]],
             boxes=np.int16([[10, 20, 600, 400]]), offsets=[0, 1])
    for proposals in (selective_search.read_proposals(tmp_path / "p.npz"), None):
        photo, boxes = soco.Proposed(images, proposals, (32, 0.5))[0]
        assert photo.pixels.shape == (3, 60, 80) and photo.box.tolist() == [0, 0, 640, 480]
        assert 320 < boxes[:, 2].max() <= 640
        assert proposals is None or boxes.tolist() == [[10, 20, 600, 400]]


def test_images_without_proposals_use_the_whole_view(tmp_path):
    """A file of proposals for a larger folder, in which half of the images have none."""
    make_photos(tmp_path / "data", 16)
    images = ImageFolder(tmp_path / "data")
    names = [n for name in images.names for n in (name, f"x/{name}")]
    counts = [3 * (i % 4 == 0) for i in range(32)]  # of every second image of the folder
    boxes = np.int16([[10, 10, 50, 40]] * sum(counts))
    np.savez(tmp_path / "p.npz", names=names, settings="by hand", boxes=boxes,
             sizes=[[80, 60]] * 32, offsets=np.cumsum([0, *counts]))
    words = [*TINY, "--data", str(tmp_path / "data"), "--arch", "resnet18", "--warmup", "0",
             "--epochs", "1", "--proposals", str(tmp_path / "p.npz")]
    soco.main([*words, "--out", str(tmp_path / "run")])
    assert column(tmp_path / "run", "no_box") == ["0.5"]
    data = soco.Proposed(images, selective_search.read_proposals(tmp_path / "p.npz"))
    assert [len(data[i][1]) for i in range(16)] == [3, 0] * 8 and len(data) == 16
    assert data[0][1].tolist() == [[10, 10, 50, 40]] * 3
    (tmp_path / "data" / "0001.jpg").write_bytes(b"")
    assert len(data[1][1]) == 3  # 0002.jpg stands in, with its own boxes
    (tmp_path / "data" / "new.jpg").write_bytes((tmp_path / "data" / "0000.jpg").read_bytes())
    with pytest.raises(SystemExit, match="error: no proposals for 1 of 17 images, such as new.jpg"):
        soco.main([*words, "--out", str(tmp_path / "other")])


def test_proposals_of_an_image_that_was_turned_or_changed_since_are_refused(tmp_path, capsys):
    def photo(name, size, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        make_photos(tmp_path / "data", 1, size)
        path = tmp_path / "data" / "0000.jpg"
        with Image.open(path) as image:
            image.load()
        path.unlink()
        image.save(tmp_path / "data" / name, exif=exif)

    for i, orientation in enumerate((6, 1, 3)):
        photo(f"{i}.jpg", (120, 90), orientation)
    selective_search.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "new.npz"),
                           "--workers", "0", "--strategy", "single", "--size", "96"])
    assert "2 images turned upright, as their EXIF orientation says" in capsys.readouterr().out
    new = dict(np.load(tmp_path / "new.npz"))
    assert new["sizes"].tolist() == [[90, 120], [120, 90], [120, 90]]
    assert (new["boxes"][:new["offsets"][1]] <= [90, 120, 90, 120]).all()

    def read(name):
        proposed = soco.Proposed(ImageFolder(tmp_path / "data"),
                                 selective_search.read_proposals(tmp_path / name))
        found = []
        for i in range(3):
            try:
                found.append(len(proposed[i][1]))
            except InputError as error:
                assert f"the proposals of {i}.jpg are of an image of another" in str(error)
                found.append("refused")
        return found

    numbers = np.diff(new["offsets"]).tolist()
    assert min(numbers) > 0 and read("new.npz") == numbers
    photo("1.jpg", (60, 45), 1)  # another image, of the same name
    assert read("new.npz") == [numbers[0], "refused", numbers[2]]
    np.savez(tmp_path / "none.npz", **{k: v for k, v in new.items() if k != "sizes"})
    with pytest.raises(InputError, match="holds no proposals: .*sizes"):
        read("none.npz")
    np.savez(tmp_path / "twice.npz", **{**new, "names": ["0.jpg", "1.jpg", "1.jpg"]})
    with pytest.raises(InputError, match="holds no proposals: a name occurs twice"):
        read("twice.npz")


def test_loading_does_not_depend_on_workers():
    data = soco.Proposed(Scenes(16, size=48, seed=0), None)
    args = soco.parse_args("--image-size 32 --small-size 32".split())
    found = [[*load_batches(data, partial(soco.make_views, args=args), 8, range(1, 2), 0,
                            workers)][0] for workers in (0, 2)]
    for a, b in zip(*found):
        for x, y in zip(a if isinstance(a, list) else [[a]], b if isinstance(b, list) else [[b]]):
            assert all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for p, q in zip(x, y))

