"""Faults as they happen, to real processes and files; stress.py has those that take longer."""
import csv
import io
import os
import pickle
import re
import signal
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fork, make_photos, start_processes
from PIL import Image
from test_runs import BARLOW, DETCO, DUPR, MOCO, SOCO, assert_identical, refusal
from torch.utils._pytree import tree_leaves

import barlow_twins
import common
import detco
import dupr
import finetune_fasterrcnn
import linear_probe
import moco_v2
import selective_search
import soco
import vicreg
import visualize


def until(condition, processes, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
        time.sleep(0.001)


def ended(processes, seconds=60):
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def loaders(process):
    """The process ids of what a process has forked."""
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()
            and f"PPid:\t{process.pid}\n" in (p / "status").read_text()]


@pytest.mark.beside
@pytest.mark.parametrize("script, workers, processes", [(BARLOW, 1, 1), (MOCO, 0, 2)])
def test_killed_twice_ends_bit_identical(tmp_path, script, workers, processes):
    """Once while a checkpoint is written, once at any moment after the next one."""
    def start(name, *more):
        words = [*script, "--epochs", 7, "--workers", workers, "--out", tmp_path / name]
        return fork(*words, processes=processes, log=tmp_path / "log")

    whole, killed = start("whole"), start("killed")
    checkpoint, half = (tmp_path / "killed" / f"checkpoint.pt{end}" for end in ("", ".tmp"))
    until(lambda: checkpoint.exists() and half.exists(), killed)
    for process in killed[::-1]:
        process.kill()
    assert set(ended(killed)) == {-signal.SIGKILL}
    first = common.load_checkpoint(checkpoint)["step"]  # whole, whatever became of the other
    killed = start("killed")
    before = checkpoint.stat().st_mtime_ns
    until(lambda: checkpoint.stat().st_mtime_ns != before, killed)
    time.sleep(0.2 * np.random.default_rng().random())
    killed[-1].kill()  # of two processes the other one follows
    assert ended(killed)[-1] == -signal.SIGKILL
    assert first < common.load_checkpoint(checkpoint)["step"] < 14
    assert set(ended([*start("killed"), *whole])) == {0}, (tmp_path / "log").read_text()
    states = [common.load_checkpoint(tmp_path / name / "checkpoint.pt")
              for name in ("whole", "killed")]
    assert states[0]["step"] == 14
    assert_identical(*states)
    logs = [[row[:-1] for row in rows] for rows in (  # without images/s
        list(csv.reader((tmp_path / name / "log.csv").open())) for name in ("whole", "killed"))]
    assert logs[0] == logs[1]
    if script is BARLOW:
        assert {p.name for p in (tmp_path / "killed").iterdir()} == {
            "args.json", "checkpoint.pt", "curves.png", "lock", "log.csv", "backbone.pt",
            "correlation.png"}
    text = (tmp_path / "log").read_text()
    assert text.count("going on after step") == 2
    # but for that of a loading process from which the killed one was just taking a batch
    handing = (r'Traceback .*\n  File "\S+/resource_sharer.py", .* in _serve\n'
               r"(?:  .*\n)+(?:EOF|Connection|BrokenPipe)\w*Error.*")
    assert "Traceback" not in re.sub(handing, "", text)
    assert text.count("another process has ended") == processes - 1
    assert not half.exists()


@pytest.mark.beside
def test_a_signal_to_every_process_is_a_stop_like_any_other(tmp_path):
    """As a scheduler sends it: to the loading processes too."""
    words = [*MOCO, "--epochs", 50, "--workers", 2, "--out", tmp_path / "run"]
    processes = fork(*words, log=tmp_path / "log")
    until((tmp_path / "run" / "checkpoint.pt").exists, processes)
    children = loaders(processes[0])
    assert len(children) == 2
    for number in (*children, processes[0].pid):
        os.kill(number, signal.SIGTERM)
    began = time.monotonic()
    assert ended(processes) == [128 + signal.SIGTERM] and time.monotonic() - began < 10
    assert "stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert not any(Path(f"/proc/{number}").exists() for number in children)


@pytest.mark.beside
def test_a_killed_loading_process_is_one_line(tmp_path):
    words = [*MOCO, "--epochs", 50, "--workers", 2, "--out", tmp_path / "run"]
    processes = fork(*words, log=tmp_path / "log")
    until((tmp_path / "run" / "checkpoint.pt").exists, processes)
    os.kill(loaders(processes[0])[0], signal.SIGKILL)  # as the kernel does when memory runs out
    assert ended(processes) == [1]
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert re.match(r"error: (DataLoader worker \(pid|another process has ended)",
                    text.splitlines()[-1]), text  # whichever torch notices first


@pytest.mark.beside
def test_two_runs_in_one_folder(tmp_path):
    words = [*MOCO, "--epochs", 50, "--workers", 0, "--out", tmp_path / "run"]
    first = fork(*words, log=tmp_path / "first")
    until((tmp_path / "run" / "checkpoint.pt").exists, first)
    second = fork(*words, "--fresh", log=tmp_path / "second")
    assert ended(second) == [1]
    lines = (tmp_path / "second").read_text().splitlines()
    assert [line for line in lines if not line.startswith("warning")] == [
        f"error: another run is at work in {tmp_path / 'run'}: wait, or give another --out"]
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    first[0].kill()
    assert ended(first) == [-signal.SIGKILL]


@pytest.mark.beside
def test_no_room_for_a_checkpoint(tmp_path):
    """A file that may not grow: the old checkpoint stays, the run ends, two processes as one."""
    words = [*MOCO, "--workers", 0, "--out", tmp_path / "run"]
    assert ended(fork(*words, "--epochs", 1, log=tmp_path / "log")) == [0]
    saved = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    state = common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    state["args"]["epochs"] = 3
    common.save_checkpoint(tmp_path / "run" / "checkpoint.pt", **state)
    saved = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        again = fork(*words, processes=processes, log=log, file_size=len(saved) // 2)
        assert ended(again) == [1] * processes
        lines = log.read_text().splitlines()
        assert lines[-1].startswith("error: ") and "File too large" in lines[-1]
        assert "Traceback" not in log.read_text() and log.read_text().count("error: ") == 1
        assert str(tmp_path / "run") in lines[-1]
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved
        assert not (tmp_path / "run" / "checkpoint.pt.tmp").exists()


NUMBERS = [  # arguments, processes, the line that ends the run, or None where it works
    ("--batch-size 2 --bn-groups 2", 2, "one value of each channel|needs two images a process"),
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


@pytest.mark.beside
def test_numbers_that_do_not_go_together_and_some_that_do(tmp_path):
    started = [start_numbers(MOCO, flags, processes, tmp_path) for flags, processes, _ in NUMBERS]
    for each, (_, _, message) in zip(started, NUMBERS):
        assert_ends_with(each, message)


# -------------------------------------------------------------------------------------- checkpoints


TINY = [*MOCO[1:], "--epochs", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    moco_v2.main([*TINY, "--out", str(folder)])
    return (folder / "checkpoint.pt").read_bytes()


def changed(state, name, value):
    """A checkpoint in which one entry is another, or is gone."""
    state = {**state, "model": {**state["model"]}, "args": {**state["args"]}}
    place = next(each for each in (state, state["args"], state["model"]) if name in each)
    place[name] = value
    if value is None:
        del place[name]
    return state


@pytest.mark.parametrize("name, value, message", [
    ("method", "detco", "is a checkpoint of detco, not of moco_v2"),
    ("queue_size", 32, "queue_size 32 (now 16)"),
    ("arch", "resnet34", "arch resnet34 (now resnet18"), ("tau", None, "tau None (now 0.2)"),
    ("args", None, "does not fit: 'args'"), ("step", "two", "does not fit: invalid literal"),
    ("optimizer", None, "does not fit: 'optimizer'"), ("optimizer", [1], "does not fit: "),
    ("queue.keys", torch.zeros(32, 16), "does not fit: Error(s) in loading state_dict"),
    ("queue.keys", None, "does not fit: Error(s) in loading state_dict"),
])
def test_a_checkpoint_of_something_else(tmp_path, finished, name, value, message):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(finished)
    torch.save(changed(common.load_checkpoint(path), name, value), path)
    before = path.read_bytes()
    assert message in refusal(moco_v2.main, [*TINY, "--out", tmp_path])
    assert path.read_bytes() == before


def test_a_damaged_checkpoint(tmp_path, finished):
    path, number = tmp_path / "checkpoint.pt", len(finished)
    for content in (b"", finished[:number // 2], finished[:-1], finished[1:],
                    b"no checkpoint"):
        path.write_bytes(content)
        assert "holds no tensors that can be read" in refusal(moco_v2.main, [*TINY, "--out",
                                                                             tmp_path])
        assert path.read_bytes() == content


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_does_not_run(tmp_path):
    bad, touched = Malicious(tmp_path / "touched"), tmp_path / "touched"
    pickle.loads(pickle.dumps(bad))  # the trap works
    touched.unlink()
    torch.save(bad, tmp_path / "zip.pt")
    torch.save({"method": "moco_v2", "state_dict": bad}, tmp_path / "old.pt",
               _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": bad}))
    np.savez(tmp_path / "boxes.npz", names=np.array([bad]), settings="", offsets=[0], boxes=[[0]])
    (tmp_path / "run").mkdir()
    for name, main, words in (("zip.pt", moco_v2.main, [*TINY, "--out", tmp_path / "run"]),
                              ("zip.pt", finetune_fasterrcnn.main, ["--weights"]),
                              ("old.pt", finetune_fasterrcnn.main, ["--weights"]),
                              ("bare.pt", finetune_fasterrcnn.main, ["--eval-only"]),
                              ("old.pt", linear_probe.main, ["--weights"]),
                              ("bare.pt", visualize.main, ["features", "--weights"])):
        (tmp_path / "run" / "checkpoint.pt").write_bytes((tmp_path / name).read_bytes())
        with pytest.raises(SystemExit) as caught:
            main([*map(str, words), *([str(tmp_path / name)] if "--out" not in words else [])])
        assert "holds more than tensors" in caught.value.code
    words = [*SOCO[1:], "--workers", "0", "--out", tmp_path / "s", "--proposals",
             tmp_path / "boxes.npz"]
    assert "holds no proposals: Object arrays cannot be loaded" in refusal(soco.main, words)
    assert not touched.exists()


# ------------------------------------------------------------------------------------------- images


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
    return {"zero.jpg", "text.jpg", "cut.jpg", "dangling.jpg", "self.jpg",
            os.fsdecode(b"broken \xff\n.jpg")}


def test_folders_of_odd_images(tmp_path, capsys):
    """Every method's views of each, in two loading processes; proposals; and what is said."""
    broken = make_odd(tmp_path / "data")
    images = common.ImageFiles(tmp_path / "data")
    assert len(images) == 20 and "loop" not in " ".join(images.names)
    for module, words in ((moco_v2, MOCO), (detco, DETCO), (dupr, DUPR), (soco, SOCO),
                          (barlow_twins, BARLOW), (vicreg, BARLOW)):
        args = module.parse_args(words[1:])
        data = soco.Proposed(images, None) if module is soco else images
        cut = {detco: partial(detco.views, args=args), dupr: partial(dupr.two_views, args=args),
               soco: partial(soco.make_views, args=args)}.get(module) or partial(
                   module.two_views, size=32, scale=(0.2, 1.0))
        batches = [*common.load_batches(data, cut, 10, range(2), 0, workers=2)]
        pixels = [x for x in tree_leaves(batches) if torch.is_tensor(x) and x.dtype == torch.uint8]
        assert len(pixels) >= 4 and all(x.shape[:2] == (10, 3) for x in pixels)
    assert {images.names[i] for i in images.broken.nonzero().flatten()} == broken
    with pytest.raises(common.InputError, match="6 of 20 images cannot be decoded: over 1%"):
        common.measure_normalisation(common.ImageFiles(tmp_path / "data"))
    selective_search.search(images, tmp_path / "boxes.npz", "single", 64, 2)
    proposals = soco.read_proposals(tmp_path / "boxes.npz")
    assert proposals["names"].tolist() == images.names
    assert "6 cannot be decoded" in capsys.readouterr().out


@pytest.mark.beside
def test_a_broken_image_of_any_name_is_said_in_one_line(tmp_path):
    make_photos(tmp_path / "data", 120)
    (tmp_path / "data" / "0007.jpg").unlink()
    with open(os.fsencode(tmp_path) + b"/data/0007 \xff\n.jpg", "wb"):
        pass
    words = [*MOCO, "--data", tmp_path / "data", "--arch", "resnet18", "--crop-scale", "0.4"]
    words += ["--epochs", 1, "--batch-size", 40, "--queue-size", 40, "--workers", 1]
    run = fork(*words, "--out", tmp_path / "a", log=tmp_path / "log")
    assert ended(run) == [0], (tmp_path / "log").read_text()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "cannot" in line]
    assert len(said) == 1 and "0007 \\udcff\\n.jpg': another image stands in" in said[0]


def as_another_user(_number, folder):
    common.read_image(folder / "photos" / "0002.jpg")  # PIL's decoders, from where root may read
    if os.geteuid() == 0:  # who may read everything
        os.seteuid(65534)
    said = io.StringIO()
    with redirect_stdout(said):
        images = common.ImageFiles(folder / "photos")
    assert len(images) == 8 and images[1].shape == (3, 60, 80)
    assert images.broken.tolist() == [i == 1 for i in range(8)]
    assert f"cannot list '{folder}/photos/private': left out" in said.getvalue()
    if os.geteuid() != 65534:
        folder.chmod(0o555)
    assert "Permission denied" in refusal(moco_v2.main, [*TINY, "--out", folder / "out"])


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
