import itertools
import struct
import zlib
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import coordinates, make_photos, process_group, start_processes
from PIL import Image
from torchvision.transforms import functional as TF

from common import InputError, View
from plumbing import images as im
from plumbing.images import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, ImageFolder, augment_colour


# ------------------------------------------------------------------------------------------- files


def test_a_folder_of_any_layout_is_read_in_order(tmp_path):
    make_photos(tmp_path / "b" / "deep", 2)
    make_photos(tmp_path / "a with space", 1)
    Image.new("RGB", (5, 4)).save(tmp_path / "ünï.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    images = ImageFolder(str(tmp_path))
    assert images.names == ["a with space/0000.jpg", "b/deep/0000.jpg", "b/deep/0001.jpg",
                            "ünï.PNG"]
    assert images.paths == [f"{tmp_path}/{name}" for name in images.names]
    assert images[0].shape == (3, 60, 80) and images[0].dtype == torch.uint8
    assert len(images) == len(list(images)) == 4  # iteration ends
    for same in (tmp_path, f"{tmp_path}/", f"{tmp_path}/b/.."):
        assert ImageFolder(same).names == images.names


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    make_photos(tmp_path / "far", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far", target_is_directory=True)
    assert len(ImageFolder(str(tmp_path / "data"))) == 2
    make_photos(tmp_path / "data" / "real" / "deep", 2)
    make_photos(tmp_path / "data" / "real", 1)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "real", target_is_directory=True)
    names = ImageFolder(str(tmp_path / "data")).names  # each image once
    assert names == ["again/0000.jpg", "again/deep/0000.jpg", "again/deep/0001.jpg",
                     "link/0000.jpg", "link/0001.jpg"]


def test_every_kind_of_image_becomes_rgb_uint8(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    read = {p.name: im.read_image(p) for p in tmp_path.iterdir()}
    assert all(x.shape == (3, 4, 6) and x.dtype == torch.uint8 for x in read.values())
    expected = torch.from_numpy(rgb).permute(2, 0, 1)
    assert torch.equal(read["rgb.png"], expected) and torch.equal(read["alpha.png"], expected)
    assert torch.equal(read["grey.png"], expected[:1].expand(3, -1, -1))
    assert torch.equal(read["deep.png"], expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "late.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_upright(tmp_path, extension, orientation):
    """A red, a green, a blue and a white corner, in their places whatever way a file stores them."""
    upright = np.zeros((60, 90, 3), np.uint8)
    upright[:30, :45, 0] = upright[:30, 45:, 1] = upright[30:, :45, 2] = 255
    upright[30:, 45:] = 255
    # stored: as the tag undoes it
    undo = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1],
            4: lambda x: x[::-1], 5: lambda x: x.transpose(1, 0, 2),
            6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
            8: lambda x: np.rot90(x, 3)}
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif, path = Image.Exif(), tmp_path / f"a.{extension}"
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=95)
    if extension == "late.png":  # behind the pixels, where ExifTool writes it
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        length = 12 + int.from_bytes(data[start:start + 4], "big")
        end = data.index(b"IEND") - 4
        path.write_bytes(data[:start] + data[start + length:end] + data[start:start + length]
                         + data[end:])
    assert im.read_size(path) == ((90, 60), orientation)
    pixels = im.read_image(path)
    assert pixels.shape == (3, 60, 90)
    difference = (pixels.permute(1, 2, 0).numpy().astype(int) - upright)[5:-5, 5:-5]
    assert np.abs(np.delete(np.delete(difference, np.s_[20:30], 0), np.s_[35:45], 1)).max() < 30
    images, said = ImageFolder(tmp_path), []
    images.report(said.append, "left out", complete=True)
    assert said == []
    images[0]
    images.report(said.append, "left out")
    assert said == []  # once all have been read
    images.report(said.append, "left out", complete=True)
    images.report(said.append, "left out", complete=True)
    assert said == ["1 images turned upright, as their EXIF orientation says"][:orientation > 1]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [6, 8, 3])
def test_tiffs_of_every_mode_are_read_upright(tmp_path, mode, compression, orientation):
    """Those without compression PIL would map into memory, by the wrong size."""
    rgb = np.random.default_rng(0).integers(0, 2, (60, 90, 1), dtype=np.uint8) * np.uint8([[[255] * 3]])
    upright = Image.fromarray(rgb)
    turns = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
             3: Image.Transpose.ROTATE_180}
    stored, exif = upright.transpose(turns[orientation]), Image.Exif()
    exif[0x0112] = orientation
    if mode == "I;16":
        stored = Image.fromarray(np.array(stored)[..., 0].astype(np.uint16) * 257)
    else:
        stored = stored.convert(mode)
    stored.save(tmp_path / "x.tif", compression=compression, exif=exif)
    assert im.read_size(tmp_path / "x.tif") == ((90, 60), orientation)
    assert np.array_equal(im.read_image(tmp_path / "x.tif").permute(1, 2, 0), rgb)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_damaged_exif_is_no_orientation(tmp_path, extension):
    path, exif = tmp_path / f"x.{extension}", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"MM\0*")
    damaged = bytearray(data[:start] + b"??????" + data[start + 6:])
    if extension == "png":
        chunk = damaged.index(b"eXIf")
        length = int.from_bytes(damaged[chunk - 4:chunk], "big")
        damaged[chunk + 4 + length:chunk + 8 + length] = zlib.crc32(
            damaged[chunk:chunk + 4 + length]).to_bytes(4, "big")
    path.write_bytes(damaged)
    assert im.read_size(path) == ((90, 60), 1) and im.read_image(path).shape == (3, 60, 90)


def tiff(values, **tags):
    """A TIFF of 16 bits without compression, (H, W) or (3, H, W) uint16, as PIL writes none."""
    pixels = values.astype("<u2").tobytes()
    channels = 1 if values.ndim == 2 else 3
    height, width = values.shape[-2:]
    entries = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [1 + (channels > 1)],
               273: [len(pixels) // channels * i for i in range(channels)], 277: [channels],
               278: [height], 279: [len(pixels) // channels] * channels, 284: [1 + (channels > 1)]}
    entries.update({int(tag[1:]): [value] for tag, value in tags.items()})
    start = 8 + 2 + 12 * len(entries) + 4
    extra, directory, ahead = b"", b"", start + 6 * 4 * 3
    for tag, numbers in sorted(entries.items()):
        numbers = [number + ahead for number in numbers] if tag == 273 else numbers
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack("<I", start + len(extra))
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    return (struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4)
            + extra.ljust(6 * 4 * 3, b"\0") + pixels)


def test_what_pil_misreads_is_refused(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(values))
    assert np.array_equal(im.read_image(path)[0], values >> 8)
    for content in (tiff(values, t262=0), tiff(np.stack([values] * 3))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="PIL misreads TIFFs of 16 bits that are planar, or in"):
            im.read_image(path)
    photo = Image.fromarray(np.stack([values.astype(np.uint8)] * 3, axis=2))
    for name, mark, offset in (("x.jp2", b"ihdr", 14), ("x.j2k", b"\xff\x4f\xff\x51", 42)):
        photo.save(tmp_path / name)
        assert im.read_image(tmp_path / name).shape == (3, 8, 8)
        data = bytearray((tmp_path / name).read_bytes())
        assert data[data.index(mark) + offset] == 7  # one less than 8 bits
        data[data.index(mark) + offset] = 11
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="colour of more than 8 bits in JPEG 2000"):
            im.read_image(tmp_path / name)


def test_the_high_byte_of_16_bits_is_read(tmp_path):
    """As a photo of 8 bits, each of whose values is repeated in the low byte."""
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    deep = grey.astype(np.uint16) * 257
    colour = np.stack([deep, deep[::-1], deep], axis=2)
    Image.fromarray(deep).save(tmp_path / "grey.png")
    Image.fromarray(deep).save(tmp_path / "grey.tif")
    Image.fromarray(deep).save(tmp_path / "grey.jp2")
    for name, header, values in (("grey.pgm", "P5 20 12 65535", deep),
                                 ("twelve.pgm", "P5 20 12 4095", deep >> 4),
                                 ("colour.ppm", "P6 20 12 65535", colour)):
        (tmp_path / name).write_bytes(f"{header}\n".encode() + values.astype(">u2").tobytes())
    for path in tmp_path.iterdir():
        want = colour >> 8 if path.stem == "colour" else np.stack([grey] * 3, axis=2)
        difference = im.read_image(path).permute(1, 2, 0).numpy() - want.astype(int)
        assert np.abs(difference).max() <= 1, path  # PIL rounds a PGM of 12 bits to 16
    images, said = ImageFolder(tmp_path), []
    assert len([*images]) == 6
    images.report(said.append, "left out", complete=True)
    assert said == []


@pytest.mark.parametrize("bits, factor", [(8, 256), (10, 64), (12, 16), (14, 4)])
@pytest.mark.parametrize("extension", ["png", "tif", "pgm", "ppm", "rgb.png"])
def test_a_nearly_black_image_of_16_bits_is_pointed_out(tmp_path, bits, factor, extension):
    values = (np.arange(256).reshape(16, 16) * (2 ** bits - 1) // 255).astype(np.uint16)
    path = tmp_path / f"x.{extension}"
    if extension in ("pgm", "ppm"):
        kind, rows = (5, values) if extension == "pgm" else (6, np.repeat(values, 3, axis=1))
        path.write_bytes(b"P%d 16 16 65535\n" % kind + rows.astype(">u2").tobytes())
    elif extension == "rgb.png":
        path.write_bytes(png(values))
    else:
        Image.fromarray(values).save(path)
    images, said = ImageFiles([str(path)]), []
    images[0]
    for _ in range(2):  # once
        images.report(said.append, "left out")
    assert len(said) == 1 and f"x.{extension} uses {bits} of its 16 bits" in said[0]
    assert f"by {factor} and save" in said[0]


def png(values):
    """A PNG of 16-bit RGB, (H, W) uint16 in each colour: PIL writes none."""
    def chunk(kind, data):
        return (len(data).to_bytes(4, "big") + kind + data
                + zlib.crc32(kind + data).to_bytes(4, "big"))

    rows = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
    header = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header + bytes([16, 2, 0, 0, 0]))
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
            + chunk(b"IEND", b""))


def test_values_without_a_known_range_are_refused(tmp_path):
    ramp = np.linspace(0, 1, 200).reshape(10, 20)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp * 1e6).astype(np.int32)).save(tmp_path / "int.tif")
    make_photos(tmp_path / "more", 300)
    images, said = ImageFolder(tmp_path), []
    assert images.numbered(0)[0] == 2 == images.numbered(1)[0]
    images.report(said.append, "left out")
    for line, mode in zip(said, "FI"):
        assert f"(its values (PIL's mode {mode}) have no known range: save it with 8 bits, " in line


def test_hidden_copies_and_other_files_are_left_out_and_counted(tmp_path, capsys):
    make_photos(tmp_path / ".root" / "photos", 3)
    for folder in (".ipynb_checkpoints", "__MACOSX", "deep/@eaDir/SYNO", ".thumbnails"):
        make_photos(tmp_path / ".root" / "photos" / folder, 2)
    folder = tmp_path / ".root" / "photos"  # below a hidden folder itself
    for name in ("._0000.jpg", ".DS_Store", ".0007.jpg.icloud", "a.heic", "b.HEIC", "notes", "c.txt",
                 ".git/config", "@eaDir.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "0000.jpg").read_bytes() * (name[0] == "@"))
    images = ImageFolder(folder)
    assert images.names == ["0000.jpg", "0001.jpg", "0002.jpg", "@eaDir.jpg"]
    said, = capsys.readouterr().out.splitlines()
    start, left_out = said.split("; left out: ")
    assert start == f"{folder}: 4 images"
    assert sorted(left_out.split(", ")) == ["1 .icloud", "1 .txt", "1 without extension", "2 .heic",
                                            "9 hidden"]
    ImageFolder(folder / ".thumbnails")
    assert capsys.readouterr().out == f"{folder}/.thumbnails: 2 images\n"


def test_a_link_leads_out_of_a_hidden_folder(tmp_path, capsys):
    """As git-sync mounts data in a container."""
    make_photos(tmp_path / "data" / ".worktrees" / "abc", 3)
    (tmp_path / "data" / "current").symlink_to(tmp_path / "data" / ".worktrees" / "abc")
    (tmp_path / "data" / ".worktrees" / "up").symlink_to(tmp_path / "data")
    images = ImageFolder(tmp_path / "data")
    assert images.names == [f"current/000{i}.jpg" for i in range(3)]


def test_all_that_pil_reads_is_an_image(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    for name in ("jpg", "jpeg", "JPE", "jfif", "gif", "png", "bmp", "tif", "tiff", "webp", "ppm",
                 "jp2", "tga", "pcx"):
        photo.save(tmp_path / f"{name}.{name}")
    images = ImageFolder(tmp_path)
    assert len(images) == 14 and {image.shape for image in images} == {(3, 8, 9)}
    assert not images.broken.any()


def test_a_broken_image_is_marked_and_replaced(tmp_path):
    make_photos(tmp_path, 4)
    whole = (tmp_path / "0001.jpg").read_bytes()
    (tmp_path / "0001.jpg").write_bytes(whole[:len(whole) // 2])  # cut off
    (tmp_path / "0002.jpg").write_text("a text")
    images = ImageFolder(str(tmp_path))
    assert torch.equal(images[1], images[3]) and torch.equal(images[2], images[3])
    assert images.numbered(2)[0] == 3 and images.numbered(0)[0] == 0
    assert images.broken.tolist() == [False, True, True, False]
    for i in (0, 3):
        (tmp_path / f"000{i}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 4 images can be decoded: cannot identify"):
        ImageFolder(str(tmp_path))[0]


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no images below"):
        ImageFolder(str(tmp_path))


def test_images_of_a_folder_or_built_in_scenes(photos):
    folder, scenes = im.open_images(str(photos), 5), im.open_images(None, 5)
    assert len(folder) == 120 and len(scenes) == len(scenes.names) == 5
    for images, shape in ((folder, (3, 60, 80)), (scenes, (3, 96, 96))):
        index, image = images.numbered(4)
        assert index == 4 and torch.equal(image, images[4]) and image.shape == shape


def test_broken_files_are_named_once_each_with_the_reason(tmp_path):
    make_photos(tmp_path, 2)
    (tmp_path / "text.jpg").write_bytes(b"\xff\xd8 no more")
    names = ["text.jpg", "0000.jpg", "missing.jpg", *["0001.jpg"] * 298]
    images, said = ImageFiles([str(tmp_path / name) for name in names]), []
    images.report(said.append, "left out")
    assert said == []
    images[0], images[0]
    images.report(said.append, "left out")
    images.report(said.append, "left out")
    images[2]
    images.report(said.append, "another image takes its place")
    first, second = said
    name, start = repr(images.paths[0]), rb"b'\xff\xd8 no more'"
    assert first == (f"cannot decode {name} (cannot identify image file {name}, which starts with "
                     f"{start.decode()}): left out (1 of 301 so far)")
    assert f"missing.jpg' ([Errno 2] No such file or directory: '{tmp_path}" in second
    assert second.endswith("): another image takes its place (2 of 301 so far)")
    images.broken[3:5] = True  # 4 of 301
    with pytest.raises(InputError, match="^4 of 301 images cannot be decoded: over 1%$"):
        images.report(said.append, "left out")


def test_ten_broken_files_are_named_at_a_time():
    images, said = ImageFiles([f"{i}.jpg" for i in range(2000)]), []
    images.broken[:15] = True
    for named in (10, 15, 15):
        assert images.report(said.append, "left out") == 15
        assert len(said) == named
    assert [line.split("'")[1] for line in said] == [f"{i}.jpg" for i in range(15)]


# ------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("height, width, size", [(200, 250, 32), (101, 64, 48), (40, 240, 16)])
def test_crop_boxes_say_where_the_pixels_come_from(height, width, size):
    image = coordinates(width, height)
    torch.manual_seed(0)
    flips, shares = 0, []
    for _ in range(200):
        view = im.random_resized_crop(image, size, scale=(0.2, 1.0))
        assert view.pixels.shape == (3, size, size) and view.pixels.dtype == torch.uint8
        x1, y1, x2, y2 = view.box.tolist()
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        flips += view.flipped
        shares.append((x2 - x1) * (y2 - y1) / (width * height))
        x, y = view.pixels[0].float().mean(0), view.pixels[1].float().mean(1)  # (size,) each
        x = x.flip(0) if view.flipped else x
        inside = slice(2, -2)  # the resampling filter is cut off at the border
        centres = (torch.arange(size) + 0.5) / size
        assert (x - (x1 + centres * (x2 - x1) - 0.5)).abs()[inside].max() < 1.1
        assert (y - (y1 + centres * (y2 - y1) - 0.5)).abs()[inside].max() < 1.1
    assert 70 < flips < 130
    if height * 2 > width:  # a long strip cannot give large crops of these ratios
        assert min(shares) > 0.17 and max(shares) > 0.8


def test_two_views_are_two_independent_crops():
    image = coordinates(80, 60)
    torch.manual_seed(0)
    views = im.two_views(image, 16, (0.3, 0.9))
    torch.manual_seed(0)
    for view in views:
        expected = im.random_resized_crop(image, 16, (0.3, 0.9))
        assert torch.equal(view.pixels, expected.pixels) and torch.equal(view.box, expected.box)
    assert not torch.equal(views[0].box, views[1].box) and len(views) == 2


def draw(image):
    return im.random_resized_crop(image, 16), im.random_resized_crop(image, 24)


def views_of(data, workers, steps=range(3, 9), seed=5):
    return list(im.load_batches(data, draw, 8, steps, seed, workers))


def test_views_depend_on_seed_epoch_and_image_alone(photos):
    data = ImageFolder(photos)
    data.paths = data.paths[:20]  # 2 batches of 8 an epoch: steps 3..8 cross epochs
    zero = views_of(data, 0)
    assert isinstance(zero[0][0], View) and zero[0][0].flipped.dtype == torch.bool
    assert zero[0][1].pixels.shape == (8, 3, 24, 24) and zero[0][0].box.shape == (8, 4)
    for workers in (1, 2):
        for ours, theirs in zip(zero, views_of(data, workers), strict=True):
            for a, b in zip(ours, theirs):
                assert all(torch.equal(x, y) for x, y in zip(a, b))
    later = views_of(data, 0, range(6, 9))  # resumed: the same steps
    assert all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(zero[3:], later, strict=True))
    assert not torch.equal(zero[1][0].pixels, zero[3][0].pixels)  # another epoch
    assert not torch.equal(zero[0][0].pixels, views_of(data, 0, seed=6)[0][0].pixels)


def test_an_epoch_visits_images_once():
    data = torch.arange(23)
    steps = list(im.load_batches(data, lambda x: x, 5, range(8), 0, 0))
    for epoch in (torch.cat(steps[:4]), torch.cat(steps[4:])):
        assert len(epoch.unique()) == 20
    assert not torch.equal(torch.cat(steps[:4]), torch.cat(steps[4:]))


def test_seeds_of_several_numbers():
    seeds = {im.seed_for(*numbers) for numbers in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27 and all(0 <= seed < 2 ** 64 for seed in seeds)
    assert im.seed_for(3, 2 ** 40) == im.seed_for(3, 2 ** 40)


# ------------------------------------------------------------------------------------------ colour


@pytest.mark.parametrize("ours, theirs, factors", [
    (im.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_saturation, TF.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (im.adjust_hue, TF.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.5])])
def test_colour_operations_equal_torchvisions(ours, theirs, factors):
    x = torch.rand(5, 3, 33, 20, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = x[:, :1, 0]  # greys, black, white and ties between channels
    x[:, :, 1], x[:, :, 2] = 0, 1
    x[:, 0, 3], x[:, 1, 4] = x[:, 1, 3], x[:, 2, 4]
    got = ours(x, torch.tensor(factors))
    for image, factor, result in zip(x, factors, got):
        torch.testing.assert_close(result, theirs(image, factor), atol=2e-6, rtol=0)


def test_blur_equals_torchvisions():
    x = torch.rand(4, 3, 30, 21, generator=torch.Generator().manual_seed(0))
    sigmas = [0.1, 0.5, 1.3, 2.0]
    got = im.gaussian_blur(x, torch.tensor(sigmas))
    for image, sigma, result in zip(x, sigmas, got):
        expected = TF.gaussian_blur(image, [13, 13], [sigma, sigma])
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


PLAIN = dict(p_jitter=0, p_grey=0, p_blur=0)


def denormalised(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return x * std + mean


def test_without_chances_colours_are_only_normalised():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    x = augment_colour(pixels, **PLAIN)
    assert x.dtype == torch.float32
    expected = TF.normalize(pixels / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
    mean, std = [0.1, 0.2, 0.3], (0.5, 0.6, 0.7)
    x = augment_colour(pixels, **PLAIN, mean=mean, std=std)
    torch.testing.assert_close(x, TF.normalize(pixels / 255, mean, std), atol=1e-5, rtol=0)


def test_chances_and_strengths_are_each_images_own():
    torch.manual_seed(0)
    one = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(400, -1, -1, -1)
    plain = one[0] / 255

    def changed(**chances):
        x = denormalised(augment_colour(one, **{**PLAIN, **chances}))
        return x, (x - plain).abs().amax((1, 2, 3)) > 1e-3

    x, hit = changed(p_jitter=0.8)
    assert 280 < hit.sum() < 360
    assert len({round(v, 5) for v in x[hit].mean((1, 2, 3)).tolist()}) > 0.9 * int(hit.sum())
    x, hit = changed(p_grey=0.2)
    assert 50 < hit.sum() < 115
    assert (x[hit] - x[hit][:, :1]).abs().max() < 1e-5
    torch.testing.assert_close(x[hit][0, 0], TF.rgb_to_grayscale(plain)[0], atol=1e-5, rtol=0)
    x, hit = changed(p_blur=0.5)
    spread = x.flatten(1).std(1)
    assert 150 < hit.sum() < 240 and spread[hit].std() > 0.01  # sigmas differ
    x, hit = changed(p_solarize=0.2)
    assert 50 < hit.sum() < 115
    torch.testing.assert_close(x[hit][0], TF.solarize(plain, 0.5), atol=1e-5, rtol=0)


def test_strengths_stay_in_their_ranges():
    torch.manual_seed(0)
    flat = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8)
    off = dict(PLAIN, p_jitter=1)
    bright = denormalised(augment_colour(flat, jitter=(0.4, 0, 0, 0), **off))
    bright = bright.mean((1, 2, 3)) * 2.55  # (500,)
    assert 0.59 < bright.min() < 0.63 and 1.37 < bright.max() < 1.41
    assert abs(bright.mean() - 1) < 0.03
    red = flat * torch.tensor([1, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    hue = denormalised(augment_colour(red, jitter=(0, 0, 0, 0.1), **off))
    hue = hue[:, :, 0, 0]  # (500, 3)
    shift = (hue[:, 1] - hue[:, 2]) * 2.55 / 6  # 100 to 1 of a sixth of the circle
    assert -0.101 < shift.min() < -0.09 and 0.09 < shift.max() < 0.101


def test_the_order_of_the_jitter_varies_with_the_batch(monkeypatch):
    pixels, calls = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), []

    def recorded(name, function):
        def operation(x, change):
            calls.append(name)
            return function(x, change)

        return operation

    for name in ("adjust_brightness", "adjust_contrast", "adjust_hue"):
        monkeypatch.setattr(im, name, recorded(name, getattr(im, name)))
    for seed in range(20):
        torch.manual_seed(seed)
        augment_colour(pixels)
    assert len({tuple(calls[i:i + 3]) for i in range(0, 60, 3)}) == 6


# ---------------------------------------------------------------------------------- normalisation


def some_broken(folder):
    """Small and large photos, 1 of 106 broken -> the images, the mean and the deviation of all
    pixels that can be decoded, (3,) each."""
    make_photos(folder, 4)
    make_photos(folder / "large", 3, size=(300, 200), seed=1)
    whole = ImageFolder(folder)
    pixels = torch.cat([image.flatten(1) for image in whole], dim=1).double() / 255  # (3, all)
    broken = folder / "large" / "9.jpg"
    broken.write_bytes(b"no image")
    images = ImageFiles([*whole.paths * 15, str(broken)])
    return images, pixels.mean(1).tolist(), pixels.std(1, correction=0).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_normalisation_is_that_of_all_pixels(tmp_path, capsys, workers):
    images, mean, std = some_broken(tmp_path)
    found = im.measure_normalisation(images, workers)
    assert found[0] == pytest.approx(mean, rel=1e-12) and found[1] == pytest.approx(std, rel=1e-9)
    *_, broken, result = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"cannot decode {images.paths[-1]!r} (cannot identify image file ")
    assert broken.endswith("): left out (1 of 106 so far)")
    assert result == (f"105 images:  --mean {' '.join(f'{v:.4f}' for v in mean)} "
                      f"--std {' '.join(f'{v:.4f}' for v in std)}")
    with pytest.raises(InputError, match="^1 of 8 images cannot be decoded: over 1%$"):
        im.measure_normalisation(ImageFolder(tmp_path), workers)


def test_normalisation_of_scenes(capsys):
    scenes = im.open_images(None, 3)
    pixels = torch.cat([image.flatten(1) for image in scenes], dim=1).double() / 255
    mean, std = im.measure_normalisation(scenes)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-9)
    assert capsys.readouterr().out.startswith("3 images:  --mean 0.")


# ---------------------------------------------------------------------------------- two processes


def one_of_two(number, folder, images, mean, std):
    with process_group(number, 2, folder), open(folder / f"{number}.txt", "w") as out, \
            redirect_stdout(out):
        found = im.measure_normalisation(images)  # half of them each
        assert found[0] == pytest.approx(mean, rel=1e-12)
        assert found[1] == pytest.approx(std, rel=1e-9)
        one = ImageFiles(images.paths[:1])  # none for the second process
        expected = one[0].flatten(1).double().mean(1) / 255
        assert im.measure_normalisation(one)[0] == pytest.approx(expected.tolist(), rel=1e-12)

        files, said = ImageFiles(images.paths[:-1] * 2), []
        for i in (5, 70, 150, 200):
            files.paths[i] = images.paths[-1]
        files[(70, 150)[number]]
        files.report(said.append, "left out")
        files.report(said.append, "left out")
        assert len(said) == (2 if number == 0 else 0)
        assert all("9.jpg' (cannot identify" in line and "(2 of 210 so far)" in line
                   for line in said)
        files[(5, 200)[number]]
        with pytest.raises(InputError, match="4 of 210 images cannot be decoded: over 1%"):
            files.report(said.append, "left out")

        numbers = torch.arange(23)
        shares = torch.stack([*im.load_batches(numbers, lambda x: x, 6, range(8), 0, 0)])  # (8, 3)
        torch.save(shares, folder / f"{number}.pt")
        with pytest.raises(InputError, match="batch size 5 does not divide over 2 processes"):
            im.steps_per_epoch(numbers, 5)


def test_two_processes_share_the_images_and_say_what_is_broken_once(tmp_path):
    images, mean, std = some_broken(tmp_path / "data")
    start_processes(one_of_two, (tmp_path, images, mean, std), 2)
    out = (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""
    assert out.count("cannot decode") == 1  # whichever of them found it
    assert out.count("105 images:  --mean ") == out.count("1 images:  --mean ") == 1
    shares = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    whole = torch.stack([*im.load_batches(torch.arange(23), lambda x: x, 6, range(8), 0, 0)])
    assert torch.equal(torch.cat(shares, dim=1), whole)  # in rank order
    with pytest.raises(InputError, match="batch size 24 is more than all 23 images"):
        im.steps_per_epoch(torch.arange(23), 24)
