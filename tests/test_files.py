"""Image files of every kind, turned, deep, hidden, broken; what is said of them."""
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image

from common import InputError
from plumbing.files import ImageFiles, ImageFolder, read_image, read_size


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
    read = {p.name: read_image(p) for p in tmp_path.iterdir()}
    assert all(x.shape == (3, 4, 6) and x.dtype == torch.uint8 for x in read.values())
    expected = torch.from_numpy(rgb).permute(2, 0, 1)
    assert torch.equal(read["rgb.png"], expected) and torch.equal(read["alpha.png"], expected)
    assert torch.equal(read["grey.png"], expected[:1].expand(3, -1, -1))
    assert torch.equal(read["deep.png"], expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "late.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_upright(tmp_path, extension, orientation):
    """A red, green, blue and white corner, in their places whatever way a file stores them."""
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
    assert read_size(path) == ((90, 60), orientation)
    pixels = read_image(path)
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
    black_or_white = np.random.default_rng(0).integers(0, 2, (60, 90, 1), dtype=np.uint8) * 255
    rgb = black_or_white.repeat(3, axis=2)
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
    assert read_size(tmp_path / "x.tif") == ((90, 60), orientation)
    assert np.array_equal(read_image(tmp_path / "x.tif").permute(1, 2, 0), rgb)


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
    assert read_size(path) == ((90, 60), 1) and read_image(path).shape == (3, 60, 90)


def tiff(values, **tags):
    """A TIFF of 16 bits without compression, (H, W) or (3, H, W) uint16, as PIL writes none."""
    pixels = values.astype("<u2").tobytes()
    channels = 1 if values.ndim == 2 else 3
    height, width = values.shape[-2:]
    entries = {256: [width], 257: [height], 258: [16] * channels, 259: [1],
               262: [1 + (channels > 1)],
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
    assert np.array_equal(read_image(path)[0], values >> 8)
    for content in (tiff(values, t262=0), tiff(np.stack([values] * 3))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="PIL misreads TIFFs of 16 bits that are planar, or"):
            read_image(path)
    photo = Image.fromarray(np.stack([values.astype(np.uint8)] * 3, axis=2))
    for name, mark, offset in (("x.jp2", b"ihdr", 14), ("x.j2k", b"\xff\x4f\xff\x51", 42)):
        photo.save(tmp_path / name)
        assert read_image(tmp_path / name).shape == (3, 8, 8)
        data = bytearray((tmp_path / name).read_bytes())
        assert data[data.index(mark) + offset] == 7  # one less than 8 bits
        data[data.index(mark) + offset] = 11
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="colour of more than 8 bits in JPEG 2000"):
            read_image(tmp_path / name)


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
        difference = read_image(path).permute(1, 2, 0).numpy() - want.astype(int)
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
    assert len(said) == 1 and f"x.{extension}' uses {bits} of its 16 bits" in said[0]
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
    for line, mode in zip(said, "FI", strict=True):
        assert f"(its values (PIL's mode {mode}) have no known range: save it with 8 bits, " in line


def test_hidden_copies_and_other_files_are_left_out_and_counted(tmp_path, capsys):
    make_photos(tmp_path / ".root" / "photos", 3)
    for folder in (".ipynb_checkpoints", "__MACOSX", "deep/@eaDir/SYNO", ".thumbnails"):
        make_photos(tmp_path / ".root" / "photos" / folder, 2)
    folder = tmp_path / ".root" / "photos"  # below a hidden folder itself
    for name in ("._0000.jpg", ".DS_Store", ".0007.jpg.icloud", "a.heic", "b.HEIC", "notes",
                 "c.txt", ".git/config", "@eaDir.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "0000.jpg").read_bytes() * (name[0] == "@"))
    images = ImageFolder(folder)
    assert images.names == ["0000.jpg", "0001.jpg", "0002.jpg", "@eaDir.jpg"]
    said, = capsys.readouterr().out.splitlines()
    start, left_out = said.split("; left out: ")
    assert start == f"{folder}: 4 images"
    assert sorted(left_out.split(", ")) == ["1 .icloud", "1 .txt", "1 without extension", "2 .heic",
                                            "9 hidden"]
    assert len(ImageFolder(folder / ".thumbnails")) == 2 and capsys.readouterr().out == ""


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
    few = ImageFiles(images.paths[:20])
    for number in (1, 2):  # at least three
        few.broken[:number] = True
        assert few.report(said.append, "left out") == number
    few.broken[2] = True
    with pytest.raises(InputError, match="^3 of 20 images cannot be decoded: over 1%$"):
        few.report(said.append, "left out")
    with pytest.raises(InputError, match="^4 of 301 images cannot be decoded: over 1%$"):
        images.report(said.append, "left out")


def test_ten_broken_files_are_named_at_a_time():
    images, said = ImageFiles([f"{i}.jpg" for i in range(2000)]), []
    images.broken[:15] = True
    for named in (10, 15, 15):
        assert images.report(said.append, "left out") == 15
        assert len(said) == named
    assert [line.split("'")[1] for line in said] == [f"{i}.jpg" for i in range(15)]


# ---------------------------------------------------------------------------------- large photos


CROPS = ((32, 0.5),)  # sqrt(0.5 80 60 3/4) is 42: an eighth of 640 x 480 is enough


def photo(width, height, mode="RGB"):
    """A smooth image, the same for the same size."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, len(mode)), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse, mode).resize((width, height), Image.BICUBIC)


def assert_reduced(path, reduction, tolerance=2.0):
    """The file's reduced pixels are the means of its upright pixels; numbered are all of them."""
    files, whole = ImageFiles([str(path)]), read_image(path)
    _, pixels, found = files.reduced(0, CROPS)
    assert found == reduction and torch.equal(files.numbered(0)[1], whole)
    means = torch.nn.functional.avg_pool2d(whole.float(), reduction)
    assert pixels.dtype == torch.uint8 and pixels.shape == means.shape
    assert (pixels - means).abs().mean() < (tolerance if reduction > 1 else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_photos_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(640, 480).save(tmp_path / "even.jpg", exif=exif)
    assert_reduced(tmp_path / "even.jpg", 8)
    photo(644, 484).save(tmp_path / "fourth.jpg", exif=exif)
    assert_reduced(tmp_path / "fourth.jpg", 8 if orientation == 1 else 4)
    photo(647, 487).save(tmp_path / "odd.jpg", exif=exif)
    assert_reduced(tmp_path / "odd.jpg", 8 if orientation == 1 else 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(subsampling=0),
                                     dict(quality=30)])
def test_reduced_jpegs_of_every_kind(tmp_path, mode, options):
    photo(640, 480, mode).save(tmp_path / "0.jpg", **options)
    assert_reduced(tmp_path / "0.jpg", 8)


def test_only_large_jpegs_are_reduced(tmp_path):
    photo(640, 480).save(tmp_path / "0.mpo", save_all=True, append_images=[photo(640, 480)])
    assert_reduced(tmp_path / "0.mpo", 8)
    for extension in ("png", "tiff", "webp", "bmp", "ppm"):
        photo(640, 480).save(tmp_path / f"0.{extension}")
        assert_reduced(tmp_path / f"0.{extension}", 1)
    for width, height, reduction in ((424, 424, 8), (423, 423, 4), (103, 300, 2), (64, 900, 2),
                                     (63, 900, 1), (500, 33, 1), (20, 20, 1)):
        photo(width, height).save(tmp_path / "1.jpg")
        assert_reduced(tmp_path / "1.jpg", reduction, 4)


def test_broken_files_are_found_at_any_size(tmp_path):
    photo(640, 480).save(tmp_path / "0.jpg")
    content = (tmp_path / "0.jpg").read_bytes()
    for i, cut in enumerate((0, 2, 100, 300, 700, 0.5, 0.8, 0.95, 1.0), 1):
        end = cut if isinstance(cut, int) else int(cut * len(content))
        (tmp_path / f"{i}.jpg").write_bytes(content[:end])
    found = []
    for crops in ((), CROPS):
        files = ImageFiles([str(tmp_path / f"{i}.jpg") for i in range(10)])
        taken = [files.reduced(i, crops)[0] for i in range(10)]
        found.append((files.broken.tolist(), taken))
    assert found[0] == found[1] and 7 <= sum(found[0][0]) < 9
