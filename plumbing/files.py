"""Image files of any kind -> pixels: RGB of 8 bits, upright; and what to say of the files."""
import math
import os
import struct
from collections import Counter
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from common import InputError, rank, world_size

Image.preinit()  # before all others, so that PIL tries the usual formats first
# the formats of photos
FORMATS = "AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()
EXTENSIONS = {extension for extension, format in Image.registered_extensions().items()
              if format in FORMATS}
# where archives, network drives and recycle bins keep copies, as in names that start with a dot
COPIES = "__macosx @eadir @recycle @recently-snapshot #recycle #snapshot $recycle.bin".split()


@contextmanager
def _open(path):
    """PIL's image of a file, not yet decoded."""
    with open(path, "rb") as file:  # given its path, PIL would read some turned TIFFs wrongly
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(16)
            raise UnidentifiedImageError(
                f"cannot identify image file {path!r}, which "
                + (f"starts with {start}" if start else "is empty")) from None
        with image:
            yield image


def _orientation(image):
    """The EXIF orientation of an open image, 1..8; 1, upright, also where its EXIF is damaged."""
    try:  # not a PNG's own method, which decodes the pixels, in search of EXIF behind them
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # SyntaxError, struct.error, ...
        value = None
    return value if value in range(1, 9) else 1


def _jpeg2000_bits(path):
    """The bits of a colour in a JPEG 2000 file."""
    with open(path, "rb") as file:
        start = file.read(128).ljust(128, b"\0")
    at = start.index(b"ihdr") + 14 if b"ihdr" in start else 42  # in segment SIZ of a bare stream
    return (start[at] & 127) + 1


def _refuse_misread(image, path):
    """Raise ValueError for an open image whose values PIL would not read as they are meant."""
    tags, why = getattr(image, "tag_v2", {}), None
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        why = f"its values (PIL's mode {image.mode}) have no known range"
    elif 16 in tags.get(258, ()) and (  # bits; white is 0; planar, without compression
            tags.get(262) == 0 or tags.get(284) == 2 and tags.get(259) == 1):
        why = "PIL misreads TIFFs of 16 bits that are planar, or in which 0 is white"
    elif image.format == "JPEG2000" and image.mode.startswith("RGB") and _jpeg2000_bits(path) > 8:
        why = "PIL misreads colour of more than 8 bits in JPEG 2000"
    if why:
        raise ValueError(f"{why}: save it with 8 bits, or as a PNG with 16")


def _reduction(width, height, turned, crops):
    """The largest r of 8, 4, 2 and 1 such that an image decoded at 1 / r of its sides has enough
    pixels for each of ``crops``: (pixels a side, least share of the image); a crop's width / height
    is 3/4 to 4/3."""
    for r in (8, 4, 2):
        w, h = width // r, height // r
        whole = not (turned and (width % r or height % r))  # else pixels are lost at another side
        if whole and all(side <= min(w, h, math.sqrt(share * w * h * 3 / 4))
                         for side, share in crops):
            return r
    return 1


def _decode(path, crops=()):
    """-> (3, H, W) uint8, RGB, upright; whether it was turned; its largest value, of 65535, where
    the file has 16 bits, else 65535; and its reduction, as ImageFiles.reduced says."""
    with _open(path) as image:
        _refuse_misread(image, path)
        grey, layout = image.mode.startswith("I"), ""  # grey of 16 bits; colour of 16 is RGB here
        if image.format != "JPEG":
            layout = str(image.tile)
        colour = not grey and (";16" in layout or "65535)" in layout)  # the latter of PPM
        if image.format == "PNG":
            image.load()  # its EXIF may stand behind the pixels
        turned, largest, reduction = _orientation(image) != 1, 65535, 1
        if crops and image.format in ("JPEG", "MPO"):
            (width, height), reduction = image.size, _reduction(*image.size, turned, crops)
            image.draft(None, (width // reduction, height // reduction))
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
        if grey:  # PIL's own conversion would clip 16 bits at 255
            values = np.array(image)
            image, largest = Image.fromarray((values >> 8).astype(np.uint8)), values.max() or 65535
        if image.mode != "RGB":
            image = image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if reduction > 1 and not turned:  # the last ones may be partly outside
            pixels = pixels[:, :height // reduction, :width // reduction]
        if colour:  # PIL keeps the high byte, but rounds a PPM's values
            largest = 257 * max(0, int(pixels.max()) - (image.format == "PPM"))
    return pixels, turned, int(largest), reduction


def read_image(path):
    """Decode an image file of any kind that PIL reads -> (3, H, W) uint8, RGB, turned upright as
    its EXIF orientation says.  Of 16 bits it takes the high byte, of several frames the first.

    Raises what PIL raises, and ValueError for values that PIL misreads, and for 32-bit integers and
    floats, whose range is unknown.
    """
    return _decode(path)[0]


def read_size(path):
    """(width, height) of an image file as read_image turns it, and its EXIF orientation, 1..8 (1:
    upright), from the header alone.  Raises what PIL raises."""
    with _open(path) as image:
        if image.format == "PNG" and _ends_with_text(path):
            image.load()
        orientation = _orientation(image)
        swap = orientation >= 5 and image.format != "TIFF"  # a TIFF's size is the upright one
        return image.size[::-1] if swap else image.size, orientation


def _ends_with_text(path):
    """Whether a PNG file has text or EXIF behind its pixels, where ExifTool writes it."""
    with open(path, "rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


class ImageFiles(Dataset):
    """Image files by path: item i is (3, H, W) uint8, as read_image reads it.

    A file that cannot be decoded is marked in ``broken`` (n,), a bool tensor shared by all workers,
    and the next one that can be takes its place.  Likewise ``turned`` marks the images whose EXIF
    orientation was not upright, and ``narrow`` those that use little of their 16 bits' range.
    """

    def __init__(self, paths):
        self.paths, self.reported = paths, set()
        self.flags = torch.zeros(3, len(paths), dtype=torch.bool).share_memory_()
        self.broken, self.turned, self.narrow = self.flags

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.numbered(index)[1]

    def numbered(self, index):
        """Image ``index``, or the one that takes its place -> its index, (3, H, W) uint8.

        Raises InputError if none of the images can be decoded.
        """
        return self.reduced(index)[:2]

    def reduced(self, index, crops=()):
        """As numbered, for ``crops`` of the image alone: its index, (3, h, w) uint8, reduction.

        A JPEG that is larger than the crops, as _reduction takes them, need is decoded at 1/2, 1/4
        or 1/8 of its size, its reduction 2, 4 or 8: h and w are H and W divided by it, rounded
        down.  Views then differ from those of all pixels by 0.1 to 0.8 grey levels
        on average (from blurred to noisy photos of 4000 x 3000).
        """
        if not 0 <= index < len(self.paths):
            raise IndexError(index)
        reason = ""
        for i in chain(range(index, len(self.paths)), range(index)):
            if not self.broken[i]:
                try:
                    pixels, turned, largest, reduction = _decode(self.paths[i], crops)
                    if turned or largest < 2 ** 14:
                        self.turned[i], self.narrow[i] = turned, largest < 2 ** 14
                    return i, pixels, reduction
                except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
                    self.broken[i], reason = True, f": {error}"
        raise InputError(f"none of the {len(self.paths)} images can be decoded{reason}")

    def report(self, say, consequence, tolerated=0.01, complete=False):
        """Name files that a process has found broken, each once, ten per call, with the reason.

        say: prints a line; consequence: what becomes of such an image; complete: whether all images
        have been read, so that it is known how many were turned upright, which is then said once.
        All processes call it.  Raises InputError if more than the share ``tolerated`` of the images
        are broken, and at least three (with tolerated=0, any).  Returns how many are.
        """
        flags = self.flags.to(torch.uint8)
        if world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        broken, turned, narrow = (row.nonzero().flatten().tolist() for row in flags)
        new = [i for i in broken if i not in self.reported][:10] if rank() == 0 else []
        for i in new:
            say(f"cannot decode {self.paths[i]!r} ({self.reason(i)}): {consequence} "
                f"({len(broken)} of {len(self)} so far)")
        self.reported.update(new)
        if complete and turned and self._first("turned"):
            say(f"{len(turned)} images turned upright, as their EXIF orientation says")
        if narrow and self._first("narrow"):
            path = self.paths[narrow[0]]
            bits = max(8, _decode(path)[2].bit_length())
            say(f"warning: {path!r} uses {bits} of its 16 bits, so it is read as nearly black: "
                f"multiply the values of such images ({len(narrow)} so far) by {2 ** (16 - bits)} "
                "and save them again")
        if len(broken) > max(2 if tolerated else 0, tolerated * len(self)):
            more = f": over {tolerated:.0%}" if tolerated else f": {self.paths[broken[0]]}"
            raise InputError(f"{len(broken)} of {len(self)} images cannot be decoded{more}")
        return len(broken)

    def _first(self, what):
        """Whether ``what`` is to be said: once, by the first process."""
        new = rank() == 0 and what not in self.reported
        self.reported.add(what)
        return new

    def reason(self, index):
        """Why image ``index`` cannot be decoded, in one line."""
        try:
            read_image(self.paths[index])
        except Exception as error:
            return " ".join(str(error).split())
        return "now it can be"


def list_images(root):
    """The paths of all images below a folder, in any layout, sorted; links are followed, to each
    folder once -> the paths; a Counter of the files left out, by extension, as "hidden", or as "of
    a run", whose figures are no photos."""
    root, paths, seen, left_out = os.fspath(root), [], set(), Counter()

    def unreadable(_error):
        left_out["folders that cannot be read"] += 1

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        inside = folder[len(root):].split(os.sep)
        copies = any(part.startswith(".") or part.lower() in COPIES for part in inside)
        key = os.path.realpath(folder), copies  # a link may lead out of a hidden folder
        if key in seen:
            subfolders.clear()
            continue
        seen.add(key)
        subfolders.sort()
        run = {"args.json", "log.csv"} <= {*files}
        copies = copies or run
        for file in files:
            hidden, extension = copies or file.startswith("."), os.path.splitext(file)[1].lower()
            if extension in EXTENSIONS and not hidden:
                paths.append(os.path.join(folder, file))
            elif extension in EXTENSIONS:
                left_out["of a run" if run else "hidden"] += 1
            elif not copies and (extension or not hidden):  # but a placeholder, .a.jpg.icloud
                left_out[extension or "without extension"] += 1
    return sorted(paths), left_out


class ImageFolder(ImageFiles):
    """All images below a folder, as list_images lists them; says what was left out, if anything.
    Raises InputError: no such folder, or no images in it."""

    def __init__(self, root):
        if not os.path.isdir(root):
            raise InputError(f"no such folder: {root}")
        self.root, (paths, left_out) = os.fspath(root), list_images(root)
        others = ", ".join(f"{number} {what}" for what, number in left_out.most_common())
        if not paths:
            raise InputError(f"no images below {root}" + (
                f", but {others}; looked for {' '.join(sorted(EXTENSIONS))}" if others else ""))
        if others and rank() == 0:
            print(f"{root}: {len(paths)} images; left out: {others}", flush=True)
        super().__init__(paths)

    @property
    def names(self):
        """The images' paths below the folder."""
        return [path[len(self.root):].lstrip("/") for path in self.paths]
