"""The built-in scenes: reproducible, labelled truthfully, and drawn once when cached."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import scenes
from scenes import CLASSES, Scenes, draw


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def extents(mask):
    """x1 y1 x2 y2 around the true pixels of a mask (h, w), pixel by pixel; None without any."""
    box = None
    for y, row in enumerate(mask.tolist()):
        for x, true in enumerate(row):
            if true and box is None:
                box = [x, y, x + 1, y + 1]
            elif true:
                box = [min(box[0], x), min(box[1], y), max(box[2], x + 1), max(box[3], y + 1)]
    return box


@pytest.mark.parametrize("size", [32, 96, 224])
def test_a_scene_is_what_it_says(size):
    for index in range(20):
        image, boxes, labels, masks, _ = draw(size, 1, index)
        assert image.shape == (3, size, size) and image.dtype == torch.uint8
        assert image.float().std() > 5  # not one flat colour
        assert 1 <= len(labels) <= 5 and boxes.shape == (len(labels), 4)
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64
        assert (0 <= labels).all() and (labels < len(CLASSES)).all()
        assert (boxes >= 0).all() and (boxes <= size).all()
        assert masks.shape == (len(labels), size, size) and masks.dtype == torch.bool
        assert [extents(mask) for mask in masks] == boxes.tolist()
        assert masks.sum(0).max() == 1  # each pixel shows one shape
        assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
        assert (boxes[:, 2:] - boxes[:, :2] <= 0.65 * size).all()


def test_seed_and_index_decide_alone():
    first = draw(48, 3, 7)
    np.random.seed(0), torch.manual_seed(0)
    draw(48, 3, 8)
    assert same(first, draw(48, 3, 7)) and same(first, Scenes(9, 48, 3).labelled(7))
    images = [draw(48, seed, index)[0] for seed in range(3) for index in range(3)]
    assert len({image.numpy().tobytes() for image in images}) == 9


def test_every_class_and_number_of_shapes_occurs():
    labels = [draw(32, 0, index)[2] for index in range(150)]
    assert {len(some) for some in labels} == {1, 2, 3, 4, 5}
    assert torch.cat(labels).bincount(minlength=6).min() > 40


def inside_polygon(x, y, corners):
    """Whether a ray from the point to the right crosses the outline an odd number of times."""
    odd = False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            odd = not odd
    return odd


def textbook_inside(name, x, y, r, turn):
    """Whether the point lies in the shape of radius r around (0, 0), turned to the left."""
    if name == "disc":
        return math.hypot(x, y) <= r
    if name == "ring":
        return 0.5 * r <= math.hypot(x, y) <= r
    if name == "cross":
        a, b = 0.96 * r, 0.28 * r
        corners = [(a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        corners += [(-b, -a), (b, -a), (b, -b)]
    else:
        tips = {"triangle": 3, "square": 4, "star": 5}[name]
        corners = []
        for k in range(tips):
            angle, half = 2 * math.pi * k / tips, math.pi / tips
            corners.append((r * math.cos(angle), r * math.sin(angle)))
            if name == "star":
                notch = 0.45 * r
                corners.append((notch * math.cos(angle + half), notch * math.sin(angle + half)))
    c, s = math.cos(turn), math.sin(turn)
    return inside_polygon(c * x - s * y, s * x + c * y, corners)


@pytest.mark.parametrize("label", range(6))
def test_shapes_are_the_textbook_ones(label):
    name, side, turn = CLASSES[label], 40.0, 0.4
    radius, area = scenes.SHAPES[name][:2]
    at = np.arange(-31, 31) + 0.5
    distance = scenes.signed_distance(label, at[None], at[:, None], side, turn)
    half = {"star": math.pi / 5, "cross": math.pi / 4}.get(name, 0)  # these point elsewhere at 0
    for i, y in enumerate(at):
        for j, x in enumerate(at):
            if abs(distance[i, j]) > 0.1:  # the table's numbers have three digits
                true = textbook_inside(name, x, y, radius * side, turn - half)
                assert (distance[i, j] < 0) == true, (x, y)
    assert (distance <= 0).sum() == pytest.approx(area * side**2, rel=0.03)


@pytest.mark.parametrize("name", ["triangle", "star"])
def test_tips_are_the_textbook_corners(name):
    """On the outline, where the shape ends: a little further out there is nothing of it.  From the
    uppermost one to the right and to the left by turns; mirrored, right and left are exchanged."""
    number, label = {"triangle": 3, "star": 5}[name], CLASSES.index(name)
    for turn in (0.1, 0.7, 2.5, 6.0):
        at = scenes.tips(label, 50, 40, 30, turn)
        assert at.shape == (5, 2) and np.isnan(at[number:]).all()
        at = at[:number] - [50, 40]
        assert np.hypot(*at.T) == pytest.approx(30 * scenes.SHAPES[name][0])
        assert abs(scenes.signed_distance(label, *at.T, 30, turn)).max() < 0.1
        assert (scenes.signed_distance(label, *(1.02 * at).T, 30, turn) > 0.1).all()
        assert (scenes.signed_distance(label, *(0.9 * at).T, 30, turn) < 0).all()
        angles = np.degrees(np.arctan2(at[:, 1], at[:, 0]))  # clockwise on a screen
        steps = (angles - angles[0]) % 360 * number / 360
        assert steps == pytest.approx([0, 1, number - 1, 2, number - 2][:number])
        assert at[0, 1] == at[:, 1].min()
    assert np.isnan(scenes.tips(CLASSES.index("disc"), 50, 40, 30, 1.0)).all()


def test_corners_of_a_scene():
    seen = []
    for index in range(30):
        _, boxes, labels, _, corners = draw(96, 1, index)
        assert corners.shape == (len(labels), 5, 3) and corners.dtype == torch.float32
        for (x1, y1, x2, y2), label, points in zip(boxes.tolist(), labels, corners):
            number = {"triangle": 3, "star": 5}.get(CLASSES[label], 0)
            there = points[:, 2] == 1
            assert not points[number:].any() and not points[~there].any()
            x, y, _ = points[there].T
            assert ((x >= 0) & (x < 96) & (y >= 0) & (y < 96)).all()
            inside = (x > x1 - 3) & (x < x2 + 3) & (y > y1 - 3) & (y < y2 + 3)
            seen += inside.tolist()
    assert len(seen) > 50 and np.mean(seen) > 0.9  # but those under a later shape


def paint_one(monkeypatch, which, size, index):
    """A scene with every shape dark but number `which` light: pixels (size, size) in 0..1, boxes,
    masks, and (label, side) of each shape."""
    texture, signed_distance, tried, shapes = scenes.texture, scenes.signed_distance, [], []

    def record(label, x, y, side, turn):
        tried.append((label, side))
        return signed_distance(label, x, y, side, turn)

    def grey(rng, x, y, size, behind):
        if not tried:  # the background
            return texture(rng, x, y, size, behind)
        shapes.append(tried[-1])
        light = len(shapes) - 1 == which
        return np.full((3, len(y), len(x)), 0.7 if light else 0.3, dtype=np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "texture", grey)
        patch.setattr(scenes, "signed_distance", record)
        image, boxes, labels, masks, _ = draw(size, 5, index)
    assert labels.tolist() == [label for label, _ in shapes]
    return image.float().mean(dim=0) / 255, boxes, masks, shapes


def test_boxes_are_tight_to_what_is_seen(monkeypatch):
    """Two pictures that differ in the grey of one shape differ where it is seen, in proportion to
    its own cover times what the later ones leave of it. Where outlines cross, that product is
    less than either cover: hence a box between two extents, and equal to one nearly always."""
    exact = total = 0
    for index in range(25):
        plain, boxes, masks, shapes = paint_one(monkeypatch, None, 48, index)
        for which, ((x1, y1, x2, y2), (label, side)) in enumerate(zip(boxes.tolist(), shapes)):
            seen = paint_one(monkeypatch, which, 48, index)[0] - plain
            seen = seen / seen.max()
            inner, outer = extents(seen > 0.53), extents(seen > 0.22)
            assert outer[0] <= x1 <= inner[0] and outer[1] <= y1 <= inner[1], (index, which)
            assert inner[2] <= x2 <= outer[2] and inner[3] <= y2 <= outer[3], (index, which)
            assert not (masks[which] & (seen <= 0.22)).any()
            assert not ((seen > 0.53) & ~masks[which]).any()
            area = scenes.SHAPES[CLASSES[label]][1] * side**2
            assert 0.47 * area < seen.sum() < 1.05 * area, "half of a shape is to be seen"
            exact += [x1, y1, x2, y2] == extents(seen >= 0.5)
            total += 1
    assert total > 50 and exact > 0.9 * total


def test_index_error():
    for cache in (False, True):
        some = Scenes(3, 32, 0, cache)
        assert len(some) == 3 and len(list(some)) == 3
        for i in (-1, 3, 100):
            with pytest.raises(IndexError):
                some[i]
            with pytest.raises(IndexError):
                some.labelled(i)


def test_cache_draws_once_and_gives_the_same(monkeypatch):
    plain, cached = Scenes(6, 32, 2), Scenes(6, 32, 2, cache=True)
    expected = [plain.labelled(i) for i in range(6)]
    assert len({len(labels) for _, _, labels, *_ in expected}) > 1
    assert all(same(cached.labelled(i), expected[i]) for i in range(6))
    monkeypatch.setattr(scenes, "draw", None)  # a call would raise
    for i in range(6):
        for tensor in (cached[i], *cached.labelled(i)):
            tensor.zero_()  # what a caller does to its own must not reach the cache
        assert same(cached.labelled(i), expected[i]) and torch.equal(cached[i], expected[i][0])
        assert [t.dtype for t in cached.labelled(i)] == [t.dtype for t in expected[i]]


def test_cache_is_shared_with_forked_workers(monkeypatch):
    cached = Scenes(10, 32, 4, cache=True)
    expected = [Scenes(10, 32, 4).labelled(i) for i in range(10)]
    loader = DataLoader(cached, batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), torch.stack([image for image, *_ in expected]))
    monkeypatch.setattr(scenes, "draw", None)  # here and in the workers of the second pass
    assert torch.equal(torch.cat(list(loader)), torch.stack([image for image, *_ in expected]))
    assert all(same(cached.labelled(i), expected[i]) for i in range(10))


def test_command_draws_a_contact_sheet(tmp_path, capsys):
    scenes.main(["--out", str(tmp_path / "sheet.png"), "--size", "32", "--seed", "1"])
    assert "images/s" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
