"""Puts the project's folder on the path, and gives the tests small image folders of their own."""
import csv
import importlib
import multiprocessing
import os
import resource
import shutil
import socket

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare float32 on CPUs, also beside a GPU
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # beside other load, a test with two threads took ten times as long

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def make_photos(folder, number, size=(80, 60), seed=0):
    """Smooth random colour JPEGs, (width, height) ``size``; no two are alike."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{i:04}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), 120)


@contextmanager
def folder():
    """In memory where there is room, and removed after its test: a suite writes 8 GB, and each
    checkpoint waits for the disk."""
    room = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2 ** 32
    with tempfile.TemporaryDirectory(dir="/dev/shm" if room else None) as name:
        yield Path(name)


@pytest.fixture
def tmp_path():
    with folder() as path:
        yield path


# Tests marked `beside` only wait for processes of their own: a thread runs them beside the others,
# from the start, and what became of them is asked for at the end.

def pytest_configure(config):
    config.addinivalue_line("markers", "beside: waits for processes of its own alone")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session):
    thread = ThreadPoolExecutor(1)
    for item in session.items:
        if item.get_closest_marker("beside") and not session.config.option.collectonly:
            parameters = getattr(item, "callspec", None)
            item.beside = thread.submit(_beside, item.function,
                                        parameters.params if parameters else {})


def _beside(test, parameters):
    with folder() as path:
        test(tmp_path=path, **parameters)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "beside"):
        pyfuncitem.beside.result()
        return True


def start_processes(function, args, processes):
    """function(number, *args) in each of so many processes, forked from one that has torch."""
    multiprocessing.set_forkserver_preload(["torchvision"])
    torch.multiprocessing.start_processes(function, args, processes, start_method="forkserver")


def _main(script, words, environment, log, file_size):
    multiprocessing.set_start_method("fork", force=True)  # of the loading processes, as elsewhere
    os.environ.update(environment)
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if file_size:  # bytes that a file may have, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    torch.set_num_threads(1)
    importlib.import_module(script).main(words)


def fork(script, *words, log, processes=1, file_size=0):
    """Start main(words) of a script in processes of its own, which write to the file ``log``: as
    command does, but without seconds of imports, and without torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision"])
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


def coordinates(width, height):
    """An image (3, H, W) uint8 whose pixels hold their own x and y."""
    x = torch.arange(width).expand(height, width)
    y = torch.arange(height).unsqueeze(1).expand(height, width)
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


def column(folder, name):
    """A column of a run's log, as text."""
    with open(folder / "log.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


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
