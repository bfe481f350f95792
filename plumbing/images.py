"""Folders of images, views and their colours, and batches that depend on (seed, step) alone.

The way of an image: file -> loader worker: decode, cut the views with their exact rectangles
(uint8) -> batch -> device: colour, blur, normalise, for the whole batch at once.
"""
import os
import re
import signal
import struct
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from common import InputError, View, all_reduce_sum, rank, world_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seed_for(*numbers):
    """One 64-bit seed from several non-negative integers, such as (seed, epoch, image)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ------------------------------------------------------------------------------------------- files


Image.preinit()  # first, so that PIL tries the usual formats first when it opens a file
# Of the formats that PIL knows, those of photos, scans and drawings
FORMATS = "AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()
EXTENSIONS = {extension for extension, format in Image.registered_extensions().items()
              if format in FORMATS}
# Where network drives, archives and bins keep copies; as do names that start with a dot
COPIES = "__macosx @eadir @recycle @recently-snapshot #recycle #snapshot $recycle.bin".split()


@contextmanager
def _open(path):
    with open(path, "rb") as file:  # given a path, PIL maps a TIFF into memory, and misreads it
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(16)
            raise UnidentifiedImageError(f"cannot identify image file {path!r}, which "
                                         + (f"starts with {start}" if start else "is empty"))
        with image:
            yield image


def _orientation(image):
    """The EXIF orientation of an open image, 1..8; 1, upright, also where its EXIF is damaged."""
    try:  # not a PNG's own method, which decodes the pixels, in search of EXIF behind them
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # SyntaxError, struct.error, ...
        value = None
    return value if value in range(1, 9) else 1


def _refuse_misread(image, path):
    """Raise ValueError for an open image whose values PIL would not read as they are meant."""
    tags, why = getattr(image, "tag_v2", {}), None
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        why = f"its values (PIL's mode {image.mode}) have no known range"
    elif 16 in tags.get(258, ()) and (  # bits; white is 0; planar, without compression
            tags.get(262) == 0 or tags.get(284) == 2 and tags.get(259) == 1):
        why = "PIL misreads TIFFs of 16 bits that are planar, or in which 0 is white"
    elif image.format == "JPEG2000" and image.mode.startswith("RGB"):
        with open(path, "rb") as file:
            start = file.read(128)  # the depth: in the box ihdr, or in the segment SIZ
        if (start + bytes(128))[start.find(b"ihdr") + 14 if b"ihdr" in start else 42] & 127 > 7:
            why = "PIL misreads colour of more than 8 bits in JPEG 2000"
    if why:
        raise ValueError(f"{why}: save it with 8 bits, or as a PNG with 16")


def _decode(path):
    """-> (3, H, W) uint8, RGB, upright; whether it was turned; its largest value, of 65535 where
    the file has 16 bits, else 65535."""
    with _open(path) as image:
        _refuse_misread(image, path)
        deep, largest = image.mode.startswith("I"), 65535
        # 16 bits of each colour, of which PIL keeps the high byte
        deep_colour = image.format in ("PNG", "PPM", "SGI", "TIFF") and not deep and re.search(
            r";16|, 65535\)", str(image.tile))
        if image.format == "PNG":
            image.load()  # EXIF may stand behind the pixels
        turned = _orientation(image) != 1
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
        if deep:  # PIL's own conversion would clip 16 bits at 255
            values = np.array(image)
            image, largest = Image.fromarray((values >> 8).astype(np.uint8)), values.max() or 65535
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if deep_colour:
            rounded = image.format == "PPM"
            largest = 257 * max(0, int(pixels.max()) - rounded)
    return pixels, turned, int(largest)


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
        if not 0 <= index < len(self.paths):
            raise IndexError(index)
        reason = ""
        for i in chain(range(index, len(self.paths)), range(index)):
            if not self.broken[i]:
                try:
                    pixels, turned, largest = _decode(self.paths[i])
                    if turned or largest < 2 ** 14:
                        self.turned[i], self.narrow[i] = turned, largest < 2 ** 14
                    return i, pixels
                except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
                    self.broken[i], reason = True, f": {error}"
        raise InputError(f"none of the {len(self.paths)} images can be decoded{reason}")

    def report(self, say, consequence, tolerated=0.01, complete=False):
        """Name files that a process has found broken, each once, ten per call, with the reason.

        say: prints a line; consequence: what becomes of such an image; complete: whether all images
        have been read, so that it is known how many were turned upright, which is then said once.
        All processes call it.  Raises InputError if more than the share ``tolerated`` of the images
        are broken.  Returns how many are.
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
            say(f"warning: {path} uses {bits} of its 16 bits, so it is read as nearly black: multiply "
                f"the values of such images ({len(narrow)} so far) by {2 ** (16 - bits)} and save "
                "them again")
        if len(broken) > tolerated * len(self):
            share = f": over {tolerated:.0%}" if tolerated else ""
            raise InputError(f"{len(broken)} of {len(self)} images cannot be decoded{share}")
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
    folder once -> the paths; a Counter of the files left out, by extension or "hidden"."""
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
        for file in files:
            hidden, extension = copies or file.startswith("."), os.path.splitext(file)[1].lower()
            if extension in EXTENSIONS and not hidden:
                paths.append(os.path.join(folder, file))
            elif extension in EXTENSIONS:
                left_out["hidden"] += 1
            elif not copies and (extension or not hidden):  # but a placeholder, .a.jpg.icloud
                left_out[extension or "without extension"] += 1
    return sorted(paths), left_out


class ImageFolder(ImageFiles):
    """All images below a folder, as list_images lists them; says how many, and what was left out.
    Raises InputError: no such folder, or no images in it."""

    def __init__(self, root):
        if not os.path.isdir(root):
            raise InputError(f"no such folder: {root}")
        self.root, (paths, left_out) = os.fspath(root), list_images(root)
        others = ", ".join(f"{number} {what}" for what, number in left_out.most_common())
        if not paths:
            raise InputError(f"no images below {root}" + (
                f", but {others}; looked for {' '.join(sorted(EXTENSIONS))}" if others else ""))
        if rank() == 0:
            print(f"{root}: {len(paths)} images" + (f"; left out: {others}" if others else ""),
                  flush=True)
        super().__init__(paths)

    @property
    def names(self):
        """The images' paths below the folder."""
        return [path[len(self.root):].lstrip("/") for path in self.paths]


def open_images(data, scenes):
    """The images below the folder ``data``, or, if it is None, that many built-in scenes: a Dataset
    of (3, H, W) uint8 with ``names`` and ``numbered`` as ImageFolder has them."""
    if data is not None:
        return ImageFolder(data)
    from scenes import Scenes
    return Scenes(scenes, size=96, seed=0, cache=True)


# ------------------------------------------------------------------- views and batches (in workers)


def random_resized_crop(image, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random rectangle of the image (3, H, W) uint8, resized to size x size, flipped with p 0.5.

    scale: its share of the image's area; ratio: its width / height.  Returns a View.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
    pixels = resized_crop(image, top, left, height, width, [size, size], antialias=True)
    flipped = bool(torch.rand(()) < 0.5)
    box = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
    return View(pixels.flip(-1) if flipped else pixels, box, flipped)


def two_views(image, size, scale):
    """Two independent crops of one image (3, H, W), as random_resized_crop cuts them."""
    return [random_resized_crop(image, size, scale) for _ in range(2)]


class _Seeded(Dataset):
    """Item (epoch, index): ``draw(data[index])``, drawn from (seed, epoch, index) alone."""

    def __init__(self, data, draw, seed):
        self.data, self.draw, self.seed = data, draw, seed

    def __getitem__(self, key):
        epoch, index = key
        torch.manual_seed(seed_for(self.seed, epoch, index))
        return self.draw(self.data[index])


def leave_signals_to_trainer(_worker=None):
    """Start a loader worker: it leaves Ctrl-C and SIGTERM, which a scheduler sends to every process
    of a job, to the training process, and ends when SIGTERM comes from there."""
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


def steps_per_epoch(data, batch_size):
    """The number of whole batches in ``data``.

    Raises InputError if there is none, or if a batch cannot be shared out equally.
    """
    if batch_size % world_size():
        raise InputError(f"batch size {batch_size} does not divide over {world_size()} processes")
    if len(data) < batch_size:
        raise InputError(f"batch size {batch_size} is more than all {len(data)} images")
    return len(data) // batch_size


def load_batches(data, draw, batch_size, steps, seed, workers, collate_fn=None):
    """This process's share of the batches of ``steps`` (a range), as a DataLoader.

    draw: an item of ``data`` -> what goes into a batch, such as an image's views; batch_size is
    global.  A step's batch depends on (seed, step) alone, whatever step comes first and however
    many workers there are.  An epoch leaves out the images that do not fill a batch.
    """
    per_epoch, share = steps_per_epoch(data, batch_size), batch_size // world_size()

    def batches():
        for step in steps:
            epoch, part = divmod(step, per_epoch)
            if part == 0 or step == steps[0]:
                order = np.random.default_rng([seed, epoch]).permutation(len(data))
            start = part * batch_size + rank() * share
            yield [(epoch, int(i)) for i in order[start:start + share]]

    return DataLoader(_Seeded(data, draw, seed), batch_sampler=batches(), num_workers=workers,
                      collate_fn=collate_fn, worker_init_fn=leave_signals_to_trainer,
                      pin_memory=torch.cuda.is_available())


def map_numbers(function, numbers, workers):
    """Iterate over function(number) of each number, computed by so many loader workers."""
    return DataLoader(numbers, batch_size=None, num_workers=workers, collate_fn=function,
                      worker_init_fn=leave_signals_to_trainer)


# ------------------------------------------------- colour and blur (on the device, a batch at once)
# x (B, 3, H, W) float in 0..1; factor (B,): as torchvision.transforms.functional's adjust_*, but
# with a strength for each image.


def _grey(x):
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # (B, 1, H, W)


def _blend(x, other, factor):
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_brightness(x, factor):
    """factor 0: black; 1: unchanged."""
    return _blend(x, torch.zeros_like(x), factor)


def adjust_contrast(x, factor):
    """factor 0: the mean grey of each image; 1: unchanged."""
    return _blend(x, _grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), factor)


def adjust_saturation(x, factor):
    """factor 0: grey; 1: unchanged."""
    return _blend(x, _grey(x).expand_as(x), factor)


def adjust_hue(x, shift):
    """Turn the hue by ``shift`` (B,) of a full circle, -0.5..0.5; value and chroma stay."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == red, (green - blue) / divisor, torch.where(
        value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor))
    corner = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # of red, green, blue
    k = (corner + (hue + 6 * shift.view(-1, 1, 1)).unsqueeze(1)) % 6  # (B, 3, H, W)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma):
    """A Gaussian of ``sigma`` (B,) pixels, at most 2; 13 taps (3 sigma), one axis at a time."""
    taps = torch.arange(-6, 7, device=x.device)
    kernel = torch.softmax(-(taps / sigma.unsqueeze(1)) ** 2 / 2, dim=1)  # (B, 13), rows sum to 1
    kernel = kernel.repeat_interleave(3, dim=0)  # (3B, 13)
    y = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1).unsqueeze(0)  # (1, 3B, H+12, W+12)
    y = F.conv2d(y, kernel[:, None, :, None], groups=len(kernel))
    y = F.conv2d(y, kernel[:, None, None, :], groups=len(kernel))
    return y.view_as(x)


def augment_colour(pixels, jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_grey=0.2, p_blur=0.5,
                   p_solarize=0.0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Colour jitter, grey, blur, solarize and normalisation of a batch of views, on its device.

    pixels: (B, 3, H, W) uint8; jitter: strengths of brightness, contrast, saturation and hue; the
    p_* are the chances of each image, whose strengths are drawn for itself.  The order of the four
    parts of the jitter is drawn once for the batch.  mean, std: of red, green and blue in 0..1.
    Returns (B, 3, H, W) float32.
    """
    x = pixels.float() / 255
    number, device = len(x), x.device

    def chosen(p):  # drawn on the CPU, where the number of chosen images is then known
        return torch.rand(number) < p

    jittered = chosen(p_jitter)
    operations = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    for i in torch.randperm(4).tolist():
        change = (2 * torch.rand(number) - 1) * jitter[i]  # (B,) in -strength..strength
        change = torch.where(jittered, change, 0).to(device, non_blocking=True)
        x = operations[i](x, change if i == 3 else (1 + change).clamp(min=0))
    x = adjust_saturation(x, (~chosen(p_grey)).to(device, x.dtype, non_blocking=True))

    blurred, sigma = chosen(p_blur).nonzero().flatten(), 0.1 + 1.9 * torch.rand(number)
    if len(blurred):
        sigma = sigma[blurred].to(device, non_blocking=True)
        blurred = blurred.to(device, non_blocking=True)
        x = x.index_copy(0, blurred, gaussian_blur(x[blurred], sigma))
    if p_solarize:
        solarized = chosen(p_solarize).to(device, non_blocking=True).view(-1, 1, 1, 1)
        x = torch.where(solarized & (x >= 0.5), 1 - x, x)
    mean, std = (torch.tensor(v).to(device, non_blocking=True).view(3, 1, 1)
                 for v in (mean, std))
    return (x - mean) / std


def _channel_sums(images, index):
    """Number of pixels, sums and sums of squares of red, green and blue (3, 3), exact."""
    i, image = images.numbered(index)
    x = image.flatten(1).long()  # (3, HW)
    sums = torch.stack([torch.full((3,), x.shape[1]), x.sum(1), (x * x).sum(1)])
    return sums * (i == index)  # 0 where another image takes its place


def measure_normalisation(images, workers=0):
    """Mean and standard deviation of red, green and blue, over all pixels of all images.

    images: as open_images gives them; the processes share the work.  Prints them as the commands'
    flags take them, and returns two lists of 3, in 0..1.  Raises InputError as report does.
    """
    share = range(rank(), len(images), world_size())
    sums = torch.zeros(3, 3, dtype=torch.long)
    channel_sums = map_numbers(partial(_channel_sums, images), share, workers)
    for done, image_sums in enumerate(channel_sums, 1):
        sums += image_sums
        if done % 1000 == 0 and rank() == 0:
            print(f"{done} of {len(share)} images", flush=True)
    count, total, squares = all_reduce_sum(sums).double()  # (3,) each
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp(min=0).sqrt()
    number = len(images)
    if isinstance(images, ImageFiles):
        number -= images.report(print, "left out", complete=True)
    if rank() == 0:
        print(f"{number} images:  --mean {' '.join(f'{v:.4f}' for v in mean)}"
              f" --std {' '.join(f'{v:.4f}' for v in std)}", flush=True)
    return mean.tolist(), std.tolist()
