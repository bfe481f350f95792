import colorsys
import itertools

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_photos, run

import selective_search as ss
from common import InputError
from plumbing.files import ImageFolder
from scenes import Scenes


def random_image(seed, height, width, levels=256):
    """Blotches of colour, with as many levels a channel: few of them make many equal edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, levels, (height // 3 + 1, width // 3 + 1, 3)) * (255 // (levels - 1))
    fine = coarse.repeat(3, 0).repeat(3, 1)[:height, :width]
    return np.uint8(fine)


# ------------------------------------------------------------------- segmentation, slow and literal


def slow_edges(x):
    height, width, _ = x.shape
    edges = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for row in range(height):
            for column in range(width):
                if row + dy < height and 0 <= column + dx < width:
                    gap = x[row, column].astype(float) - x[row + dy, column + dx]
                    edges.append((np.float32(np.sqrt((gap ** 2).sum())), row * width + column,
                                  (row + dy) * width + column + dx))
    return sorted(edges, key=lambda edge: edge[0])


def slow_segment(edges, pixels, k, min_size):
    """Felzenszwalb and Huttenlocher, Algorithm 1, with components as sets of pixels."""
    component = [{p} for p in range(pixels)]
    internal = {}  # the heaviest edge of a component's minimum spanning tree

    def merge(a, b, weight):
        union = component[a] | component[b]
        for p in union:
            component[p] = union
        internal[id(union)] = weight, union  # kept alive, so that the id stays its own

    def limit(p):
        return internal.get(id(component[p]), (0,))[0] + k / len(component[p])

    for weight, a, b in edges:
        if component[a] is not component[b] and weight <= min(limit(a), limit(b)):
            merge(a, b, weight)
    for weight, a, b in edges:
        if component[a] is not component[b] and \
                min(len(component[a]), len(component[b])) < min_size:
            merge(a, b, weight)
    return [min(component[p]) for p in range(pixels)]


def same_partition(one, two):
    return len({*zip(list(one), list(two))}) == len({*one}) == len({*two})


@pytest.mark.parametrize("height, width", [(13, 17), (30, 24), (1, 40), (40, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("levels, k, min_size", [(256, 100, 1), (256, 30, 10), (3, 100, 12),
                                                 (4, 400, 5), (2, 5, 30)])
def test_segmentation_equals_a_slow_union_find(height, width, levels, k, min_size):
    for seed in range(2):
        x = random_image(seed, height, width, levels).astype(np.float32)
        if seed:  # no two edges alike
            x = ss.smooth(x, 0.8)
        edges = slow_edges(x)
        a, b, weight = ss.grid_edges(x)
        if not seed:
            assert [*zip(a, b)] == [edge[1:] for edge in edges]
        np.testing.assert_allclose(weight, [edge[0] for edge in edges], rtol=1e-5, atol=1e-4)
        found = ss.segment(a, b, weight, height * width, k, min_size)
        slow = slow_segment([*zip(weight, a.tolist(), b.tolist())], height * width, k, min_size)
        assert same_partition(found.tolist(), slow)
        assert {*found} == {*range(found.max() + 1)}
        assert np.bincount(found).min() >= min(min_size, height * width)


def test_segmentation_of_more_than_one_pass():
    """Edges of which most are left when components have come to their end."""
    x = np.random.default_rng(0).uniform(0, 255, (40, 50, 3)).astype(np.float32)
    x[:, 25:] = x[:, 25:] / 10 + 100
    edges = ss.grid_edges(x)
    for k in (50, 500, 3000):
        slow = slow_segment([*zip(edges[2], edges[0].tolist(), edges[1].tolist())], 2000, k, 8)
        found = ss.segment(*edges, 2000, k, 8)
        assert 1 < found.max() + 1 < 250 and same_partition(found.tolist(), slow)


def test_smoothing_is_a_gaussian_with_a_repeated_border():
    x = np.random.default_rng(0).uniform(0, 255, (20, 15, 3)).astype(np.float32)
    padded = torch.nn.functional.pad(torch.from_numpy(x).permute(2, 0, 1), (9, 9, 9, 9),
                                     mode="replicate")
    for sigma, taps in ((0.8, 9), (1.0, 9)):
        expected = torchvision.transforms.functional.gaussian_blur(padded, [taps] * 2, [sigma] * 2)
        np.testing.assert_allclose(ss.smooth(x, sigma),
                                   expected[:, 9:-9, 9:-9].permute(1, 2, 0), atol=1e-2)
    flat = np.full((5, 6, 3), 7, np.float32)
    np.testing.assert_allclose(ss.smooth(flat, 0.8), flat, rtol=1e-6)


def test_colour_spaces():
    rgb = random_image(0, 9, 30)
    hsv, lab = ss.colour_space(rgb, "hsv"), ss.colour_space(rgb, "lab")
    assert hsv.dtype == lab.dtype == np.float32
    for pixel, found in zip(rgb.reshape(-1, 3), hsv.reshape(-1, 3)):
        gap = np.abs(found - 255 * np.array(colorsys.rgb_to_hsv(*(pixel / 255))))
        assert gap.max() < 2
    known = np.uint8([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]])  # at D50
    expected = [[0, 0, 0], [100, 0, 0], [54.3, 80.8, 69.9], [29.6, 68.3, -112]]
    lab = ss.colour_space(known, "lab")[0] * [100 / 255, 1, 1] - [0, 128, 128]
    np.testing.assert_allclose(lab, expected, atol=1.2)


# ------------------------------------------------------------------------ similarities and grouping

TERMS = "colour texture size fill"


def regions_of(x, label):
    return ss.describe(ss.pixel_bins(x), np.asarray(label))


def test_similarities_by_hand():
    colour = np.zeros((3, 75), np.float32)
    colour[0, [0, 30, 60]] = 1 / 3
    colour[1, [0, 31, 60]] = 1 / 3
    colour[2, [1, 31, 61]] = 1 / 3
    texture = np.zeros((3, 240), np.float32)
    texture[0, 0], texture[1, :4], texture[2, 1] = 1, 0.25, 1
    regions = ss.Regions(colour, texture, np.float32([20, 10, 30]),
                         np.float32([[0, 0, 5, 4], [4, 0, 8, 4], [0, 4, 6, 10]]))
    others, area = np.array([1, 2]), 100

    def found(terms):
        return ss.similarity(regions, 0, others, area, terms).tolist()

    assert found("colour") == pytest.approx([2 / 3, 0])
    assert found("texture") == pytest.approx([0.25, 0])
    assert found("size") == pytest.approx([0.7, 0.5])
    # hulls: 0 0 8 4, of 32 pixels, and 0 0 6 10, of 60
    assert found("fill") == pytest.approx([1 - (32 - 30) / 100, 1 - (60 - 50) / 100])
    assert found(TERMS) == pytest.approx([2 / 3 + 0.25 + 0.7 + 0.98, 0.5 + 0.9])
    assert found("texture size fill") == pytest.approx([0.25 + 0.7 + 0.98, 1.4])


def test_histograms_by_hand():
    x = np.zeros((4, 6, 3), np.float32)
    x[:, 3:] = [255, 100, 10.3]
    bins = ss.pixel_bins(x)
    assert bins.shape == (24, 27) and bins.min() >= 0 and bins.max() < 315
    assert bins[0, :3].tolist() == [0, 25, 50]
    assert bins[5, :3].tolist() == [24, 25 + 9, 50 + 1]
    # one vertical edge: of its 8 directions, right and the two beside it, in every row alike
    slope = (bins[2 * 6 + 2, 3:].reshape(8, 3) - 75) % 10
    assert slope[0, 0] == 9 and (slope[[2, 4, 6]] == 0).all() and slope[4, 0] == 0
    assert slope[1, 0] == slope[7, 0] == 7  # 1 / sqrt 2 of ten bins
    assert slope[0, 1] == 3 and slope[0, 2] == 0
    regions = regions_of(x, [[0] * 3 + [1] * 3] * 4)
    assert regions.size.tolist() == [12, 12]
    assert regions.box.tolist() == [[0, 0, 3, 4], [3, 0, 6, 4]]
    for histogram in (regions.colour, regions.texture):
        np.testing.assert_allclose(histogram.sum(1), 1, rtol=1e-5)
    assert regions.colour[1, [24, 34, 51]].tolist() == pytest.approx([1 / 3] * 3)


def test_a_joined_region_is_the_region_of_the_joined_pixels():
    x = random_image(3, 21, 30).astype(np.float32)
    label = np.random.default_rng(0).integers(0, 5, (21, 30))
    regions = regions_of(x, label)
    ss.join(regions, 1, 4)
    ss.join(regions, 1, 0)
    union = np.where(np.isin(label, (0, 4)), 1, label)
    expected = regions_of(x, np.unique(union, return_inverse=True)[1].reshape(21, 30))
    for found, want in zip(regions, expected):
        np.testing.assert_allclose(found[1], want[0], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[2], want[1], rtol=1e-6)  # untouched


def slow_group(x, label, terms):
    """Algorithm 1 with regions as sets of pixels, each described anew from its pixels."""
    regions = {frozenset(np.flatnonzero(label.ravel() == i)) for i in np.unique(label)}
    width, boxes = label.shape[1], []
    owner = {p: region for region in regions for p in region}
    ends = [*zip(*(e.tolist() for e in ss.grid_edges(x)[:2]))]

    def box(region):
        y, xs = np.divmod(sorted(region), width)
        return [xs.min(), y.min(), xs.max() + 1, y.max() + 1]

    def alike(pair):
        two = np.zeros(label.size, int)
        one, other = pair
        two[[*one]], two[[*other]] = 1, 2
        full = np.unique(two, return_inverse=True)[1].reshape(label.shape)
        described = regions_of(x, full)
        rows = [full.ravel()[next(iter(region))] for region in pair]
        return ss.similarity(described, rows[0], np.array(rows[1:]), label.size, terms)[0]

    boxes += [box(region) for region in regions]
    while len(regions) > 1:
        touching = {tuple(sorted({owner[a], owner[b]}, key=min)) for a, b in ends
                    if owner[a] is not owner[b]}
        pair = max(sorted(touching, key=lambda p: (min(p[0]), min(p[1]))), key=alike)
        union = pair[0] | pair[1]
        regions = regions - {*pair} | {union}
        owner.update({p: union for p in union})
        boxes.append(box(union))
    return boxes


@pytest.mark.parametrize("terms", [TERMS, "texture size fill"])
def test_grouping_equals_a_slow_one(terms):
    for seed in range(3):
        x = ss.smooth(random_image(seed, 15, 18).astype(np.float32), 0.8)
        edges = ss.grid_edges(x)
        label = ss.segment(*edges, 270, 40, 8)
        n = label.max() + 1
        assert n > 4
        near = np.zeros((n, n), bool)
        for a, b in zip(*edges[:2]):
            if label[a] != label[b]:
                near[label[a], label[b]] = near[label[b], label[a]] = True
        regions = regions_of(x, label.reshape(15, 18))
        before = [value.copy() for value in regions]
        found = ss.group(regions, near, 270, terms)
        assert len(found) == 2 * n - 1 and found[-1].tolist() == [0, 0, 18, 15]
        assert all(np.array_equal(a, b) for a, b in zip(before, regions))  # its input is left
        assert sorted(found.tolist()) == sorted(slow_group(x, label.reshape(15, 18), terms))


# -------------------------------------------------------------------------------------- proposals


def overlap(one, two):
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if min(width, height) <= 0:
        return 0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)]
    return width * height / (sum(areas) - width * height)


def test_finds_what_is_drawn():
    image = np.full((90, 120, 3), (200, 190, 180), np.uint8)
    drawn = [(10, 10, 50, 40), (60, 20, 110, 80), (72, 30, 90, 50)]
    for (x1, y1, x2, y2), colour in zip(drawn, ((30, 60, 200), (20, 120, 30), (220, 30, 40))):
        image[y1:y2, x1:x2] = colour
    for strategy in ("single", "fast"):
        boxes = ss.selective_search(image, strategy)
        assert boxes.dtype == np.float32 and boxes[0].tolist() == [0, 0, 120, 90]
        for truth in drawn:
            assert max(overlap(truth, box) for box in boxes.tolist()) > 0.85
        assert len(np.unique(boxes, axis=0)) == len(boxes)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert (np.diff(area) <= 0).all() and area.min() > 0
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [120, 90]).all()


def test_scenes_are_found_and_fast_finds_more():
    scenes, best = Scenes(12, size=96, seed=5), {}
    for strategy in ("single", "fast"):
        best[strategy] = []
        for i in range(12):
            image, boxes, *_ = scenes.labelled(i)
            found = ss.propose(image, strategy, 224).tolist()
            best[strategy] += [max(overlap(truth, box) for box in found)
                               for truth in ss.keep_object_like(boxes.numpy(), 96, 96).tolist()]
    assert np.mean(best["fast"]) > 0.85 and np.mean(np.array(best["fast"]) > 0.5) > 0.95
    assert 0.65 < np.mean(best["single"]) < np.mean(best["fast"])


def test_the_same_image_gives_the_same_boxes():
    image = random_image(7, 60, 80)
    before = image.copy()
    first, second = ss.selective_search(image), ss.selective_search(image.copy(order="F"))
    assert np.array_equal(first, second) and np.array_equal(image, before)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (3, 1), (2, 2), (5, 4), (6, 900)])
def test_odd_sizes(height, width):
    for image in (random_image(1, height, width), np.full((height, width, 3), 9, np.uint8)):
        boxes = ss.selective_search(image)
        assert boxes[0].tolist() == [0, 0, width, height]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= [width, height]).all()
        proposed = ss.propose(torch.from_numpy(image).permute(2, 0, 1), "single", 224)
        assert proposed.dtype == np.int16 and proposed.shape[1:] == (4,)


def test_one_colour_and_grey():
    assert ss.selective_search(np.full((50, 70, 3), 255, np.uint8)).tolist() == [[0, 0, 70, 50]]
    grey = random_image(0, 60, 60)[..., :1].repeat(3, 2)
    assert len(ss.selective_search(grey)) > 5


def test_what_is_no_image():
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8),
                  np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"want \(H, W, 3\) uint8"):
            ss.selective_search(image)


def test_the_filter_by_hand():
    boxes = np.array([[0, 0, 30, 30], [0, 0, 29, 30], [0, 0, 80, 80], [0, 0, 81, 80],
                      [0, 0, 60, 20], [0, 0, 61, 20], [5, 5, 25, 65], [0, 0, 20, 61]])
    kept = ss.keep_object_like(boxes, 100, 100)
    assert kept.tolist() == boxes[[0, 2, 4, 6]].tolist()
    assert ss.keep_object_like(boxes[:1], 30, 100).tolist() == [[0, 0, 30, 30]]
    assert len(ss.keep_object_like(boxes[:1], 400, 100)) == 0
    assert ss.keep_object_like(np.zeros((0, 4)), 9, 9).shape == (0, 4)
    assert len(ss.keep_object_like(np.int16([[0, 0, 15000, 15000]]), 30000, 30000)) == 1


def test_proposals_are_in_the_images_own_pixels():
    image = np.full((300, 420, 3), 240, np.uint8)
    image[60:200, 100:310] = (200, 30, 30)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for size in (100, 224, 1000):
        boxes = ss.propose(tensor, "single", size)
        assert max(overlap((100, 60, 310, 200), box) for box in boxes.tolist()) > 0.9
        assert np.array_equal(boxes, ss.keep_object_like(boxes, 420, 300))
    wide = ss.propose(torch.zeros(3, 2, 33000, dtype=torch.uint8), "single", 224)
    assert wide.shape == (0, 4) and wide.dtype == np.int16


# --------------------------------------------------------------------------------- files, commands


class Killed(Scenes):
    """Three scenes, and then the user's patience ends."""

    def __getitem__(self, i):
        if i == 3:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_a_search_goes_on_where_it_was_stopped(tmp_path, capsys):
    ss.search(Scenes(6, 48, 0), tmp_path / "whole.npz", "single", 224, 0)
    with pytest.raises(KeyboardInterrupt):
        ss.search(Killed(6, 48, 0), tmp_path / "again.npz", "single", 224, 0)
    with pytest.raises(InputError, match="holds 3 of 6 images"):
        ss.read_proposals(tmp_path / "again.npz")
    (tmp_path / "again.npz.tmp").write_bytes(b"PK")  # a kill in the midst of writing
    scenes = Scenes(6, 48, 0)
    read = []
    scenes.numbered = lambda i: (read.append(i), Scenes.numbered(scenes, i))[1]
    ss.search(scenes, tmp_path / "again.npz", "single", 224, 0)
    assert read == [3, 4, 5]
    whole, again = (ss.read_proposals(tmp_path / f"{n}.npz") for n in ("whole", "again"))
    assert all(np.array_equal(whole[key], again[key]) for key in whole)
    assert whole["boxes"].dtype == np.int16 and whole["offsets"][-1] == len(whole["boxes"]) > 6
    for i in range(6):
        expected = ss.propose(scenes[i], "single", 224)
        assert np.array_equal(whole["boxes"][slice(*whole["offsets"][i:i + 2])], expected)
    assert "6/6 images" in capsys.readouterr().out
    for other in (Scenes(5, 48, 0), Scenes(6, 48, 1)):
        with pytest.raises(InputError, match="other images or settings .single 224"):
            ss.search(other, tmp_path / "whole.npz", "single", 224, 0)
    with pytest.raises(InputError, match="other images or settings"):
        ss.search(Scenes(6, 48, 0), tmp_path / "whole.npz", "fast", 224, 0)


def test_the_command(tmp_path):
    """Workers, folders in folders, a broken file."""
    make_photos(tmp_path / "data" / "a b", 3)
    make_photos(tmp_path / "data", 2, size=(300, 200), seed=1)
    (tmp_path / "data" / "0001.jpg").write_bytes(b"\xff\xd8 no more")
    words = ["selective_search.py", "--data", tmp_path / "data", "--out", tmp_path / "p.npz"]
    code, out, err = run(*words, "--workers", 2)
    assert code == 0 and not err, err
    assert "5/5 images" in out and "1 cannot be decoded" in out
    code, out, err = run(*words, "--workers", 0)  # finds nothing left to do
    assert code == 0 and "5/5 images" not in out and "1 cannot be decoded" in out
    with np.load(tmp_path / "p.npz") as file:  # without pickle
        names, offsets, boxes = file["names"], file["offsets"], file["boxes"]
    assert names.tolist() == ["0000.jpg", "0001.jpg", "a b/0000.jpg", "a b/0001.jpg",
                              "a b/0002.jpg"]
    images = ImageFolder(tmp_path / "data")
    for i in range(5):
        mine = boxes[offsets[i]:offsets[i + 1]]
        expected = np.zeros((0, 4)) if i == 1 else ss.propose(images[i], "fast", 224)
        assert np.array_equal(mine, expected)
    assert len(boxes) > 10


def test_bad_input(tmp_path, photos):
    for words, message in ((["--data", tmp_path / "none"], "no such folder"),
                           (["--data", photos, "--size", 0], "--size: 0 is not at least 16"),
                           (["--data", photos, "--workers", -1], "--workers: -1 is not at least")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            ss.main([*map(str, words), "--out", str(tmp_path / "p.npz")])
    (tmp_path / "text").write_text("no zip file")
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    np.savez(tmp_path / "odd.npz", names=["a"], settings="", offsets=[0, 2], sizes=[[8, 8]],
             boxes=np.eye(4)[:1])
    for name, message in (("none", "no such file"), ("text", "holds no proposals"),
                          ("other.npz", "holds no proposals"), ("odd.npz", "do not fit")):
        with pytest.raises(InputError, match=message):
            ss.read_proposals(tmp_path / name)


def test_ctrl_c_is_one_line(tmp_path, photos, monkeypatch, capsys):
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return np.int16([[0, 0, 1, 1]])
    monkeypatch.setattr(ss, "propose", interrupted)
    with pytest.raises(SystemExit) as stopped:
        ss.main(["--data", str(photos), "--out", str(tmp_path / "p.npz"), "--workers", "0"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"
    with pytest.raises(InputError, match="holds 4 of 120 images"):
        ss.read_proposals(tmp_path / "p.npz")


@pytest.mark.parametrize("strategy, runs", [
    ("single", [("hsv", TERMS, 100)]),
    ("fast", [*itertools.product(("hsv", "lab"), (TERMS, "texture size fill"), (50, 100))])])
def test_proposals_are_those_of_each_colour_measure_and_k(strategy, runs):
    """Of segments of k pixels or more, in a Gaussian of 0.8 pixels; by the slow grouping."""
    image, expected = random_image(2, 30, 36), set()
    for colour, terms, k in runs:
        x = ss.colour_space(image, colour)
        a, b, weight = ss.grid_edges(ss.smooth(x, 0.8))
        label = slow_segment([*zip(weight, a.tolist(), b.tolist())], 1080, k, k)
        label = np.unique(label, return_inverse=True)[1].reshape(30, 36)
        expected |= {tuple(map(int, box)) for box in slow_group(x, label, terms)}
    assert len(expected) > 8
    found = ss.selective_search(image, strategy).astype(int).tolist()
    assert {*map(tuple, found)} == expected


def test_a_search_is_saved_every_minute(tmp_path, monkeypatch):
    """A kill leaves no time to save."""
    clock, saved = itertools.count(0, 61), []

    class Looks(Scenes):
        def __getitem__(self, i):
            if i == 3:
                saved.append(ss.read_proposals(tmp_path / "p.npz", finished=False)["offsets"])
            return super().__getitem__(i)

    monkeypatch.setattr(ss.time, "monotonic", lambda: next(clock))
    ss.search(Looks(5, 48, 0), tmp_path / "p.npz", "single", 224, 0)
    assert len(saved) == 1 and len(saved[0]) > 1
