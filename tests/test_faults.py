"""Faults as they happen, to real processes and files: kills, full disks, odd files.  Those that
take longer are in tools/stress.py."""
import csv
import os
import pickle
import re
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (BARLOW, DETCO, DUPR, MOCO, SOCO, assert_identical, ended, fork, make_photos,
                      refusal, start_processes, until)
from PIL import Image
from torch.utils._pytree import tree_leaves

import detco
import dupr
import finetune_fasterrcnn
import linear_probe
import moco_v2
import selective_search
import soco
import visualize
from common import InputError
from plumbing.files import ImageFolder, read_image
from plumbing.images import load_batches, measure_normalisation, two_views
from plumbing.weights import load_checkpoint, save_checkpoint


def loaders(process):
    """The process ids of what a process has forked."""
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()
            and f"PPid:\t{process.pid}\n" in (p / "status").read_text()]


# -------------------------------------------------------------------------------------------- kills


# a traceback of a loader worker from which the killed process was just taking a batch
HANDING_OVER = (r'Traceback .*\n  File "\S+/resource_sharer.py", .* in _serve\n'
                r"(?:  .*\n)+(?:EOF|Connection|BrokenPipe)\w*Error.*")


def kill_twice(words, processes, folder):
    """A run of seven epochs, killed while a checkpoint is written, again at any moment after the
    next one, and then run to its end, beside an uninterrupted run."""
    def start(name):
        return fork(*words, "--epochs", 7, "--out", folder / name, processes=processes,
                    log=folder / "log")

    killed = start("killed")
    checkpoint, half = (folder / "killed" / f"checkpoint.pt{end}" for end in ("", ".tmp"))
    until(lambda: checkpoint.exists() and half.exists(), killed)
    for process in killed[::-1]:
        process.kill()
    assert set(ended(killed)) == {-signal.SIGKILL}
    first = load_checkpoint(checkpoint)["step"]  # whole, whatever became of the other
    killed = start("killed")
    before = checkpoint.stat().st_mtime_ns
    until(lambda: checkpoint.stat().st_mtime_ns != before, killed)
    time.sleep(0.2 * np.random.default_rng().random())
    killed[-1].kill()  # of two processes the other one follows
    assert ended(killed)[-1] == -signal.SIGKILL
    assert first < load_checkpoint(checkpoint)["step"] < 14
    assert set(ended([*start("killed"), *start("whole")])) == {0}, (folder / "log").read_text()
    assert not half.exists()


@pytest.mark.parametrize("words, processes", [([*BARLOW, "--workers", 1], 1),
                                              ([*MOCO, "--workers", 0], 2)])
def test_killed_twice_ends_bit_identical(tmp_path, words, processes):
    kill_twice(words, processes, tmp_path)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")]
    assert states[0]["step"] == 14
    assert_identical(*states)
    logs = [[row[:-1] for row in csv.reader((tmp_path / name / "log.csv").open())]
            for name in ("whole", "killed")]  # without images/s
    assert logs[0] == logs[1]
    files = {p.name for p in (tmp_path / "killed").iterdir()}
    assert files == {p.name for p in (tmp_path / "whole").iterdir()} >= {"backbone.pt", "log.csv"}
    text = (tmp_path / "log").read_text()
    assert text.count("resuming after step") == 2
    assert "Traceback" not in re.sub(HANDING_OVER, "", text) and "Warning" not in text
    assert text.count("another process has ended") == processes - 1


def test_signals_and_kills_of_workers_and_a_second_run_in_the_folder(tmp_path):
    """Three runs at once: a SIGTERM to every process of one, as a scheduler sends it; a killed
    loader worker; and a folder in which a second run starts."""
    def start(name, workers, *more, log=None):
        words = [*MOCO, "--epochs", 50, "--workers", workers, "--out", tmp_path / name, *more]
        return fork(*words, log=tmp_path / f"{log or name}.txt")

    signalled, bereft, first = start("signalled", 2), start("bereft", 2), start("first", 0)
    for name, processes in (("signalled", signalled), ("bereft", bereft), ("first", first)):
        until((tmp_path / name / "checkpoint.pt").exists, processes)
    second = start("first", 0, "--fresh", log="second")

    children = loaders(signalled[0])
    assert len(children) == 2
    for number in (*children, signalled[0].pid):
        os.kill(number, signal.SIGTERM)
    began = time.monotonic()
    assert ended(signalled) == [128 + signal.SIGTERM] and time.monotonic() - began < 10
    assert "stopped by SIGTERM" in (tmp_path / "signalled.txt").read_text()
    assert not any(Path(f"/proc/{number}").exists() for number in children)

    os.kill(loaders(bereft[0])[0], signal.SIGKILL)  # as the kernel does when memory runs out
    assert ended(bereft) == [1]
    text = (tmp_path / "bereft.txt").read_text()
    assert "Traceback" not in text
    assert re.match(r"error: (DataLoader worker \(pid|another process has ended)",
                    text.splitlines()[-1]), text  # whichever torch notices first

    assert ended(second) == [1]
    lines = (tmp_path / "second.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("warning")] == [
        f"error: another run is at work in {tmp_path / 'first'}: wait, or give another --out"]
    assert (tmp_path / "first" / "checkpoint.pt").exists()
    first[0].kill()
    assert ended(first) == [-signal.SIGKILL]


# ------------------------------------------------------------------------ processes that do not fit


NUMBERS = [  # arguments, processes, the line that ends the run, or None where it works
    ("--batch-size 2 --bn-groups 2", 2, "one value of each channel|needs two images per process"),
    ("--batch-size 9 --bn-groups 3 --queue-size 9", 3, None),  # an odd world, a queue of one batch
    ("--batch-size 8 --bn-groups 3", 3, "8 does not divide"),
    ("--batch-size 8 --queue-size 7", 1, "queue size 7 is less than the 8 keys of a step"),
    ("--lr 1e30", 1, "the loss is not finite at step 2; checkpoint: none")]


def start_numbers(words, flags, processes, folder):
    flags = flags.split()
    if "--queue-size" not in words:  # a method without a queue, and without groups
        flags = flags[:2]
    name = "-".join([words[0], *flags])
    return fork(*words, *flags, "--log-every", 1, "--workers", 0, "--out", folder / name,
                processes=processes, log=folder / f"{name}.txt"), folder / f"{name}.txt"


def assert_ends_with(started, message):
    processes, log = started
    assert ended(processes) == [message is not None] * len(processes), log.read_text()
    errors = {line for line in log.read_text().splitlines() if line.startswith("error: ")}
    assert "Traceback" not in log.read_text() and len(errors) == (message is not None)
    assert message is None or re.search(message, errors.pop())


def test_numbers_that_do_not_go_together_and_some_that_do(tmp_path):
    started = [start_numbers(MOCO, flags, processes, tmp_path) for flags, processes, _ in NUMBERS]
    for each, (_, _, message) in zip(started, NUMBERS):
        assert_ends_with(each, message)


# --------------------------------------------------------------------------------------- full disks


def test_no_room_for_a_checkpoint(tmp_path):
    """A file that may not grow: the old checkpoint stays, the run ends, two processes as one."""
    words = [*MOCO, "--workers", 0]
    assert ended(fork(*words, "--epochs", 1, "--out", tmp_path / "1", log=tmp_path / "log")) == [0]
    state = load_checkpoint(tmp_path / "1" / "checkpoint.pt")
    state["args"]["epochs"] = 3
    save_checkpoint(tmp_path / "1" / "checkpoint.pt", state)
    saved = (tmp_path / "1" / "checkpoint.pt").read_bytes()
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "checkpoint.pt").write_bytes(saved)
    started = {number: fork(*words, "--out", tmp_path / str(number), processes=number,
                            log=tmp_path / f"log{number}", file_size=len(saved) // 2)
               for number in (1, 2)}
    for number, processes in started.items():
        assert ended(processes) == [1] * number
        text, out = (tmp_path / f"log{number}").read_text(), tmp_path / str(number)
        last = text.splitlines()[-1]
        assert last.startswith(f"error: {out}: ") and "File too large" in last
        assert "Traceback" not in text and text.count("error: ") == 1
        assert (out / "checkpoint.pt").read_bytes() == saved
        assert not (out / "checkpoint.pt.tmp").exists()


# ---------------------------------------------------------------------------------------- odd files


class Malicious:
    """Its pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_does_not_run(tmp_path):
    """Whichever command reads it."""
    bad, touched = Malicious(tmp_path / "touched"), tmp_path / "touched"
    pickle.loads(pickle.dumps(bad))  # the trap works
    touched.unlink()
    torch.save(bad, tmp_path / "zip.pt")
    torch.save({"method": "moco_v2", "state_dict": bad}, tmp_path / "old.pt",
               _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": bad}))
    np.savez(tmp_path / "boxes.npz", names=np.array([bad]), settings="", offsets=[0], boxes=[[0]])
    for folder in ("m", "s"):
        (tmp_path / folder).mkdir()
    (tmp_path / "m" / "checkpoint.pt").write_bytes((tmp_path / "zip.pt").read_bytes())
    for main, *words in ((moco_v2.main, *MOCO[1:], "--out", tmp_path / "m"),
                         (finetune_fasterrcnn.main, "--weights", tmp_path / "zip.pt"),
                         (finetune_fasterrcnn.main, "--weights", tmp_path / "old.pt"),
                         (finetune_fasterrcnn.main, "--eval-only", tmp_path / "bare.pt"),
                         (linear_probe.main, "--weights", tmp_path / "old.pt"),
                         (visualize.main, "features", "--weights", tmp_path / "bare.pt")):
        assert "holds more than tensors" in refusal(main, words)
    words = [*SOCO[1:], "--workers", "0", "--out", tmp_path / "s", "--proposals",
             tmp_path / "boxes.npz"]
    assert "holds no proposals: Object arrays cannot be loaded" in refusal(soco.main, words)
    assert not touched.exists()


def make_odd(folder):
    """Images of every kind that may lie in a folder -> names of those that cannot be decoded."""
    rng = np.random.default_rng(0)

    def noise(height, width, *channels):
        return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)

    (folder / "x.jpg").mkdir(parents=True)
    for name, pixels, mode in (
            ("x.jpg/in a folder.jpg", noise(40, 50, 3), "RGB"),
            ("alpha.png", noise(40, 50, 4), "RGBA"), ("gray.png", noise(40, 50, 2), "LA"),
            ("cmyk.jpg", noise(40, 50, 4), "CMYK"), ("one.png", noise(1, 1, 3), "RGB"),
            ("panorama.jpg", noise(50, 20000, 3), "RGB"),
            ("tower.png", noise(20000, 50, 3), "RGB"), ("ünï\n図 'of'.jpg", noise(40, 50), "L")):
        Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).save(folder / name)
    Image.fromarray(rng.integers(0, 2 ** 16, (40, 50), np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(noise(40, 50) > 128).save(folder / "bits.png")
    Image.fromarray(noise(40, 50, 3)).convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(np.full((40, 50), np.nan, np.float32)).save(folder / "nan.tiff")
    whole = (folder / "panorama.jpg").read_bytes()
    cmyk = (folder / "cmyk.jpg").read_bytes()
    for name, content in ((b"latin \xe9.jpg", cmyk), (b"cut.jpg", whole[:len(whole) // 2]),
                          (b"text.jpg", b"no image"), (b"zero.jpg", b""),
                          (b"broken \xff\n.jpg", b"")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    for name, to in (("link.png", "alpha.png"), ("dangling.jpg", "nothing.jpg"),
                     ("self.jpg", "self.jpg"), ("loop", ".")):
        (folder / name).symlink_to(to)
    return {"nan.tiff", "zero.jpg", "text.jpg", "cut.jpg", "dangling.jpg", "self.jpg",
            os.fsdecode(b"broken \xff\n.jpg")}


def test_folders_of_odd_images(tmp_path, capsys):
    """Every method's views of each, in two loader workers; proposals; and what is said."""
    broken = make_odd(tmp_path / "data")
    images = ImageFolder(tmp_path / "data")
    assert len(images) == 20 and "loop" not in " ".join(images.names)
    for module, words, cut in ((detco, DETCO, detco.cut_views), (dupr, DUPR, dupr.cut_views),
                               (soco, SOCO, soco.make_views), (moco_v2, MOCO, None)):
        data = soco.Proposed(images, None) if module is soco else images
        draw = (partial(cut, args=module.parse_args(words[1:])) if cut else
                partial(two_views, size=32, scale=(0.2, 1.0)))  # as Barlow Twins and VICReg
        batches = [*load_batches(data, draw, 10, range(2), 0, workers=2)]
        pixels = [x for x in tree_leaves(batches) if torch.is_tensor(x) and x.dtype == torch.uint8]
        assert len(pixels) >= 4 and all(x.shape[:2] == (10, 3) for x in pixels)
    assert {images.names[i] for i in images.broken.nonzero().flatten()} == broken
    said = []
    with pytest.raises(InputError, match="^7 of 20 images cannot be decoded: over 1%$"):
        images.report(said.append, "left out")
    assert len(said) == 7 and not any("\n" in line for line in said)
    with pytest.raises(InputError, match="7 of 20 images cannot be decoded: over 1%"):
        measure_normalisation(ImageFolder(tmp_path / "data"))
    capsys.readouterr()
    selective_search.search(images, tmp_path / "boxes.npz", "single", 64, 2)
    proposals = soco.read_proposals(tmp_path / "boxes.npz")
    assert proposals["names"].tolist() == images.names
    assert "7 cannot be decoded" in capsys.readouterr().out


def test_a_broken_image_of_any_name_and_nothing_but_broken_images(tmp_path):
    make_photos(tmp_path / "one", 120)
    (tmp_path / "one" / "0007.jpg").unlink()
    (tmp_path / "all").mkdir()
    for name in (b"one/0007 \xff\n.jpg", *(b"all/%d.png" % i for i in range(50))):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
            pass
    words = [*MOCO, "--arch", "resnet18", "--crop-scale", "0.4", "--epochs", 1, "--batch-size", 40,
             "--queue-size", 40, "--workers", 1]
    started = {name: fork(*words, "--data", tmp_path / name, "--out", tmp_path / "runs" / name,
                          log=tmp_path / f"{name}.txt") for name in ("one", "all")}
    assert ended(started["all"]) == [1]
    line = (tmp_path / "all.txt").read_text().splitlines()[-1]
    assert line.startswith("error: none of the 50 images can be decoded: cannot identify image ")
    assert ended(started["one"]) == [0]
    said = [line for line in (tmp_path / "one.txt").read_text().splitlines() if "cannot" in line]
    assert len(said) == 1 and said[0].count("0007 \\udcff\\n.jpg'") == 2  # the name, the reason
    assert said[0].endswith(": another image takes its place (1 of 120 so far)")


def test_turned_and_nearly_black_photos_are_counted_once_by_two_processes(tmp_path):
    make_photos(tmp_path / "data", 40)
    exif = Image.Exif()
    exif[0x0112] = 8
    for i in (3, 17, 31):
        with Image.open(tmp_path / "data" / f"{i:04}.jpg") as image:
            image.save(tmp_path / "data" / f"{i:04}.jpg", exif=exif)
    Image.fromarray(np.full((60, 80), 4000, np.uint16)).save(tmp_path / "data" / "x-ray.png")
    words = [*MOCO, "--arch", "resnet18", "--crop-scale", "0.4", "--epochs", 2, "--batch-size", 40,
             "--queue-size", 40, "--workers", 1, "--data", tmp_path / "data", "--out",
             tmp_path / "o"]
    assert ended(fork(*words, log=tmp_path / "log.txt", processes=2)) == [0, 0]
    said = (tmp_path / "log.txt").read_text()
    # an epoch of 40 leaves out one of the 41, another one each time
    assert len(re.findall("^[23] images turned upright, as their EXIF", said, re.M)) == 1
    assert said.count("x-ray.png' uses 12 of its 16 bits") == 1 and "by 16 and save" in said


def as_another_user(_number, folder):
    read_image(folder / "photos" / "0002.jpg")  # PIL's decoders, from where root may read
    if os.geteuid() == 0:  # who may read everything
        os.seteuid(65534)
    images, said = ImageFolder(folder / "photos"), []
    assert len(images) == 8 and images[1].shape == (3, 60, 80)
    assert images.broken.tolist() == [i == 1 for i in range(8)]
    assert images.report(said.append, "left out") == 1
    assert "([Errno 13] Permission denied: " in said[0]
    if os.geteuid() != 65534:
        folder.chmod(0o555)
    assert "Permission denied" in refusal(moco_v2.main, [*MOCO[1:], "--out", folder / "out"])


def test_what_may_not_be_read_or_written():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_photos(folder / "photos", 8)
        make_photos(folder / "photos" / "private", 8)
        (folder / "photos" / "0001.jpg").chmod(0)
        (folder / "photos" / "private").chmod(0)
        folder.chmod(0o755)
        try:
            start_processes(as_another_user, (folder,), 1)
        finally:
            folder.chmod(0o755)
            (folder / "photos" / "private").chmod(0o755)
