"""What the tests share: folders of images, processes as a user and torchrun start them, a tiny run
of each command, and comparisons."""
import csv
import importlib
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare float32 on CPUs, also beside a GPU

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

torch.set_num_threads(1)  # with two threads and other load, tests took ten times as long

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from plumbing import drawing  # noqa: E402

# A run of seconds of each command: script and flags
MOCO = ("moco_v2.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --queue-size 16 "
        "--dim 16 --bn-groups 2 --log-every 2").split()
DETCO = ["detco.py", *MOCO[1:], "--local-size", "54"]
DUPR = ["dupr.py", *MOCO[1:], "--roi-size", *"2222", "--patch-keys", "6", "--rand-augment"]
SOCO = ("soco.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --small-size 32 "
        "--fpn-channels 8 --hidden 24 --dim 16 --log-every 2").split()
BARLOW = ("barlow_twins.py --scenes 16 --epochs 3 --batch-size 8 --image-size 32 --dim 16 "
          "--log-every 2").split()
VICREG = ["vicreg.py", *BARLOW[1:]]
DETECTOR = ("finetune_fasterrcnn.py --train-scenes 12 --test-scenes 4 --iterations 9 "
            "--batch-size 4 --fpn-channels 16 --rois 8 --min-size 64 --log-every 2 "
          "--precise-bn 2").split()


# ------------------------------------------------------------------------------- images and folders


def make_photos(folder, number, size=(80, 60), seed=0):
    """Smooth random colour JPEGs, (width, height) ``size``; no two are alike."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{i:04}.jpg", quality=95)
    return folder


def coordinates(width, height):
    """An image (3, H, W) uint8 whose pixels hold their own x and y."""
    x = torch.arange(width).expand(height, width)
    y = torch.arange(height).unsqueeze(1).expand(height, width)
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), 120)


@contextmanager
def folder():
    """A temporary folder: in memory if there is room, as the suite writes gigabytes."""
    room = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2 ** 32
    with tempfile.TemporaryDirectory(dir="/dev/shm" if room else None) as name:
        yield Path(name)


@pytest.fixture
def tmp_path():
    with folder() as path:
        yield path


def leave_curves_out(logs, path):
    """In place of draw_curves, which takes a third of the time of a run of few steps."""
    Path(path).touch()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(drawing, "draw_curves", leave_curves_out)


@pytest.fixture
def curves(no_curves, monkeypatch):
    """For a test that looks at the curves of a run."""
    monkeypatch.undo()


# ---------------------------------------------------------------------------------------- processes

PRELOADED = ["torchvision", "matplotlib.figure"]


def start_processes(function, args, processes):
    """function(number, *args) in each of so many processes, forked from one that has torch."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, args, processes, start_method="forkserver")


@contextmanager
def process_group(number, processes, folder):
    """In a function for start_processes: join the others, which meet in a file in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number,
                            world_size=processes)
    yield
    dist.destroy_process_group()


def _main(script, words, environment, log, file_size):
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as elsewhere
    os.environ.update(environment)
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if file_size:  # bytes that a file may have, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    torch.set_num_threads(1)
    drawing.draw_curves = leave_curves_out
    importlib.import_module(script).main(words)


def fork(script, *words, log, processes=1, file_size=0):
    """Start main(words) of a script in processes of its own, which write to the file ``log``: as
    command does, but without seconds of imports, and without torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        environment = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=processes, MASTER_PORT=port,
                           MASTER_ADDR="127.0.0.1") if processes > 1 else {}
        environment = {name: str(value) for name, value in environment.items()}
        started.append(context.Process(target=_main, args=(
            script.removesuffix(".py"), [*map(str, words)], environment, str(log), file_size)))
        started[-1].start()
    return started


def until(condition, processes, seconds=60):
    """Wait for a condition, while all of the processes live."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
        time.sleep(0.001)


def ended(processes, seconds=120):
    """Wait for the end of each -> their exit statuses; one that does not end is killed: None."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def command(*words, processes=0, **kwargs):
    """Start one of the project's scripts as a user does: python, or torchrun with ``processes``."""
    start = [sys.executable] if not processes else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}"]
    # one thread each: a thread count that torchrun changes would change sums of floats too
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([*start, *map(str, words)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            **kwargs)


def run(*words, processes=0):
    """The same, to its end: (exit status, stdout, stderr)."""
    process = command(*words, processes=processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# -------------------------------------------------------------------------------------- comparisons


def column(folder, name):
    """A column of a run's log, as text."""
    with open(folder / "log.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def refusal(main, words):
    """The one line with which main(words), in this process, refuses its input."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("error: ")
    assert "\n" not in line and len(line) < 400
    return line


def assert_identical(a, b, path="checkpoint"):
    """The same containers with the same content, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{path}[{i}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path
