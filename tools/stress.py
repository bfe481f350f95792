"""Faults again and again, where one test of the suite would take too long (Linux; `disk` as root):

    python tools/stress.py kill [--methods moco_v2 ...] [--times 20] [--processes 1 2]
    python tools/stress.py torchrun      signals, restarts, two agents as two machines start them
    python tools/stress.py disk [--methods ...]         a file system that fills up
    python tools/stress.py numbers       batches, queues and processes that do not fit, for all
    python tools/stress.py files [--number 100000]      listing, and the memory of loader workers
    python tools/stress.py long [--steps 2000]          memory and open files over a run

Every fault happens to real processes of the commands, and what they end with is compared, tensor by
tensor, with an uninterrupted run.  kill: half of the kills while a checkpoint is being written,
the others at any moment, also before the first step; in one process, and to one of two, where the
other is ended too, as torchrun would, if it has not followed in 8 seconds.  A line for each case;
the exit status is 1 if anything was lost.
"""
import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import (BARLOW, DETCO, DETECTOR, DUPR, MOCO, SOCO, VICREG,  # noqa: E402
                      assert_identical, command, ended, fork, make_photos)
from test_faults import (HANDING_OVER, NUMBERS, assert_ends_with, loaders,  # noqa: E402
                         start_numbers)

from plumbing.files import ImageFolder  # noqa: E402
from plumbing.images import load_batches  # noqa: E402
from plumbing.weights import load_checkpoint  # noqa: E402

RUNS = {words[0].removesuffix(".py"): [*words, "--workers", "1"]
        for words in (MOCO, DETCO, DUPR, SOCO, BARLOW, VICREG, DETECTOR)}
LOST = []


def report(case, times, what, lost=None):
    """Print a line of the table: the fault, how often, what happened, and what was lost, if any."""
    print(f"{case} | {times} | {what} | {lost or 'nothing lost'}", flush=True)
    LOST.extend([lost] if lost else [])


def difference(one, other):
    """What differs between the checkpoints of two folders, or None."""
    states = [load_checkpoint(folder / "checkpoint.pt") for folder in (one, other)]
    try:
        assert_identical(*states)
    except AssertionError as error:
        return f"not identical: {str(error).splitlines()[0]}"
    results = [(folder / "ap.json").read_text() for folder in (one, other)
               if (folder / "ap.json").exists()]
    return "another AP" if len({*results}) > 1 else None


# --------------------------------------------------------------------------------------------- kill


def kill_one(processes, rng, at_save, out, seconds):
    """SIGKILL to one of the processes at the given moment, unless the run is over -> their ends."""
    half, until = out / "checkpoint.pt.tmp", time.monotonic() + seconds * rng.random()
    while any(p.is_alive() for p in processes):
        if half.exists() if at_save else time.monotonic() > until:
            processes[rng.integers(len(processes))].kill()
            break
        time.sleep(0.0005)
    return ended(processes, 8)  # one that still waits for the other to start is ended, by torchrun


def kill(args):
    for method in args.methods:
        for number in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                kill_method(method, number, args.times, Path(folder))


def kill_method(method, number, times, folder):
    rng, log = np.random.default_rng(), folder / "log"
    words = [*RUNS[method]]
    if method != "finetune_fasterrcnn":
        words += ["--epochs", "6"]
    if number > 1:  # loader workers would keep the sockets of a killed process open
        words += ["--workers", "0"]
    began = time.monotonic()
    lost = ended(fork(*words, "--out", folder / "whole", processes=number, log=log), 300)
    seconds, kills, at_saves, runs, lost = time.monotonic() - began, 0, 0, 0, any(lost)
    while kills < times and not lost:
        out, runs = folder / "killed", runs + 1
        shutil.rmtree(out, ignore_errors=True)
        codes, step = [None], 0
        while codes != [0] * number and not lost:
            started = fork(*words, "--out", out, processes=number, log=log)
            at_save = kills % 2 == 1
            codes = (kill_one(started, rng, at_save, out, seconds) if kills < times
                     else ended(started, 300))
            killed = -signal.SIGKILL in codes
            kills, at_saves = kills + killed, at_saves + (killed and at_save)
            if not killed and codes != [0] * number:
                lost = f"ended with {codes}: {log.read_text().splitlines()[-1]}"
            if (out / "checkpoint.pt").exists():
                now = load_checkpoint(out / "checkpoint.pt")["step"]
                lost = lost or (f"step {now} after {step}" if now < step else None)
                step = now
        lost = lost or difference(folder / "whole", out)
    said = re.sub(HANDING_OVER, "", log.read_text())
    if "Traceback" in said:
        lost = lost or f"a traceback: {said}"
    report(f"SIGKILL, {method}, {number} processes", f"{kills}, {at_saves} of them at a save",
           f"{runs} runs ended bit for bit as the uninterrupted one", lost)


# ----------------------------------------------------------------------------------------- torchrun


def until_saved(out, process):
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
        if time.monotonic() > deadline:
            break


def ranks(out):
    """The process ids of the run in a folder: the local rank of each."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
            environment = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
            parent = int((path / "status").read_text().split("PPid:\t")[1].split()[0])
        except (OSError, ValueError, IndexError):
            continue
        if str(out).encode() in words and b"LOCAL_RANK" in environment:
            found[int(path.name)] = int(environment[b"LOCAL_RANK"]), parent
    return {pid: rank for pid, (rank, parent) in found.items() if parent not in found}


def torchrun(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        words = [*RUNS["moco_v2"], "--epochs", "12"]
        whole = folder / "whole"
        ended(fork(*words, "--out", whole, processes=2, log=folder / "log"), 300)

        for case, number, to in (("SIGTERM to torchrun", signal.SIGTERM, "torchrun"),
                                 ("Ctrl-C, to all", signal.SIGINT, "group"),
                                 ("SIGTERM to one process", signal.SIGTERM, "rank"),
                                 ("SIGKILL to torchrun", signal.SIGKILL, "torchrun")):
            out = folder / case
            process = command(*words, "--out", out, processes=2)
            until_saved(out, process)
            mine = ranks(out)
            began = time.monotonic()
            if to == "group":
                os.killpg(process.pid, number)
                for pid in mine:  # torchrun gives them sessions of their own
                    os.kill(pid, number)
            else:
                os.kill(min(mine) if to == "rank" else process.pid, number)
            process.communicate(timeout=120)
            while any(Path(f"/proc/{pid}").exists() for pid in mine):
                time.sleep(0.05)
            seconds, code = time.monotonic() - began, process.returncode
            step = load_checkpoint(out / "checkpoint.pt")["step"]
            again = command(*words, "--out", out, processes=2)
            again.communicate(timeout=120)
            lost = difference(whole, out) if code and seconds < 30 else f"{code}, {seconds:.0f} s"
            report(case, 1, f"all gone after {seconds:.1f} s, status {code}, saved at step {step}; "
                   "the same command ended as the uninterrupted run", lost)
        restarts(words, whole, folder)
        agents(words, whole, folder)


def restarts(words, whole, folder):
    for rank in (0, 1):
        out = folder / f"restart {rank}"
        process = subprocess.Popen([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "--max-restarts=3", *words, "--out", out], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
        until_saved(out, process)
        os.kill(next(pid for pid, r in ranks(out).items() if r == rank), signal.SIGKILL)
        code = process.wait(300)
        report(f"torchrun --max-restarts 3, SIGKILL to process {rank}", 1,
               f"went on by itself, status {code}", difference(whole, out) or code)


def agents(words, whole, folder):
    """Two torchruns that meet on this machine as on two; then one of them is killed, twice."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def agent(out, port):
        return subprocess.Popen([
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_id={port}",
            "--max-restarts=3", *words, "--out", out], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)

    for kills in (0, 1, 2):
        out, port = folder / f"agents {kills}", int(np.random.default_rng().integers(20000, 30000))
        first = agent(out, port)
        time.sleep(1)
        second = agent(out, port)
        for _ in range(kills):
            until_saved(out, first)
            before = (out / "checkpoint.pt").stat().st_mtime_ns
            while (out / "checkpoint.pt").stat().st_mtime_ns == before:
                time.sleep(0.02)
            second.kill()
            second.wait()
            time.sleep(2)
            second = agent(out, port)
        codes = [first.wait(300), second.wait(300)]
        report(f"two agents, one of them killed and started again {kills} times", 1,
               f"ended as one agent's two processes, status {codes}",
               difference(whole, out) or any(codes))


# --------------------------------------------------------------------------------- numbers and disk


def numbers(args):
    for flags, processes, message in NUMBERS:
        for method in args.methods:
            words, lost = RUNS[method], None
            if message and (
                    "queue" in message and "--queue-size" not in words
                    or "one value" in message and method == "finetune_fasterrcnn"):
                continue  # it has no queue; its batch norm sees many values of one image
            with tempfile.TemporaryDirectory() as folder:
                try:
                    assert_ends_with(start_numbers(words, flags, processes, Path(folder)), message)
                except AssertionError as error:
                    lost = str(error)
            report(f"{method} {flags}, {processes} processes", 1,
                   f"one line: {message}" if message else "trains", lost)


def disk(args):
    """A tmpfs with room for the first checkpoint, not for the next beside it; then a larger one."""
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            whole, small = folder / "whole", folder / "small"
            log = folder / "log"
            ended(fork(*RUNS[method], "--out", whole, log=folder / "other"), 300)
            size = (whole / "checkpoint.pt").stat().st_size
            small.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs",
                            str(small)], check=True)
            try:
                words = [*RUNS[method], "--out", small / "run"]
                codes = ended(fork(*words, log=log), 300)
                line, step = log.read_text().splitlines()[-1], load_checkpoint(
                    small / "run" / "checkpoint.pt")["step"]
                right = codes == [1] and line.startswith("error: ") and "No space left" in line
                subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(small)], check=True)
                codes = ended(fork(*words, log=log), 300)
                lost = difference(whole, small / "run") or any(codes)
                report(f"full disk, {method}", 1, f"status 1, {line!r}, the checkpoint of step "
                       f"{step} intact; with room the same command ended as without the fault",
                       lost if right else line)
            finally:
                subprocess.run(["umount", str(small)], check=True)


# -------------------------------------------------------------------------------------------- files


def private(pid):
    """MiB of memory that a process shares with no other."""
    rows = dict(line.split(":") for line in
                Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(rows[f"Private_{kind}"].split()[0]) for kind in ("Clean", "Dirty")) / 1024


def files(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_photos(folder / "few", 10)  # a file may have some 65,000 names
        for i in range(args.number):
            if i % 1000 == 0:
                (folder / "data" / f"n{i:08}").mkdir(parents=True)
            os.link(folder / "few" / f"000{i % 10}.jpg",
                    folder / "data" / f"n{i // 1000 * 1000:08}" / f"n{i:08}_image.jpg")
        for number in (1000, args.number):
            if number < args.number:
                data = folder / "data" / "n00000000"
            else:
                data = folder / "data"
            began = time.monotonic()
            images = ImageFolder(data)
            listed = time.monotonic() - began
            loader = iter(load_batches(images, lambda image: image.float().mean(), 64,
                                              range(min(600, number // 64)), 0, workers=4))
            for _ in range(10):
                next(loader)
            began = [private(pid) for pid in (w.pid for w in loader._workers)]
            for _ in loader:
                pass
            loader = iter(load_batches(images, lambda image: image.float().mean(), 64,
                                              range(10 ** 6), 0, workers=4))
            for _ in range(600):
                next(loader)
            after = [private(w.pid) for w in loader._workers]
            report(f"{len(images)} files", 1, f"listed in {listed:.2f} s; own memory of each of "
                   f"4 loader workers: {np.mean(began):.1f} MiB after 10 batches of 64, "
                   f"{np.mean(after):.1f} MiB after 600")
            del loader


# --------------------------------------------------------------------------------------------- long


def long(args):
    # Freed memory goes back at once: what grows then is held, not kept in reserve by malloc
    os.environ.update(MALLOC_MMAP_THRESHOLD_="100000", MALLOC_TRIM_THRESHOLD_="100000")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            words = [*RUNS[method], "--scenes", 1600, "--epochs", math.ceil(args.steps / 200),
                     "--workers", 2, "--log-every", 50, "--out", folder / "run"]
            process = command(*words)
            table = folder / "run" / "log.csv"
            rows = []  # of step, memory and open files of the run, memory of its loader workers
            while process.poll() is None:
                time.sleep(2)
                try:
                    children = loaders(process) or [process.pid]  # before the first, after the last
                    step = int(table.read_text().splitlines()[-1].split(",")[0])
                    rows.append((step, private(process.pid), len(os.listdir(
                        f"/proc/{process.pid}/fd")), np.mean([private(c) for c in children])))
                except (OSError, ValueError, IndexError):
                    continue
            rows = np.array([r for r in rows if np.isfinite(r).all()])
            done = rows[:, 0] / args.steps  # matplotlib comes with the first curves
            before, after = rows[(done > 0.4) & (done <= 0.7)].mean(0), rows[done > 0.7].mean(0)
            grown = after[1:] / before[1:]
            report(f"{args.steps} steps of {method}", 1,
                   f"status {process.returncode}; over the middle and the last three tenths: "
                   f"{before[1]:.0f} and {after[1]:.0f} MiB, {before[2]:.0f} and "
                   f"{after[2]:.0f} open files, loader workers {before[3]:.0f} and "
                   f"{after[3]:.0f} MiB; log.csv {table.stat().st_size} bytes",
                   f"it grows: {grown}" if (grown > 1.1).any() or process.returncode else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("kill", "torchrun", "numbers", "disk", "files",
                                         "long"))
    parser.add_argument("--methods", nargs="+", choices=[*RUNS],
                        help="kill, numbers: all; others: moco_v2")
    parser.add_argument("--times", type=int, default=20, help="kill: of each method")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="kill")
    parser.add_argument("--number", type=int, default=100000, help="files")
    parser.add_argument("--steps", type=int, default=2000, help="long")
    args = parser.parse_args()
    every = args.what in ("kill", "numbers")
    args.methods = args.methods or ([*RUNS] if every else ["moco_v2"])
    dict(kill=kill, torchrun=torchrun, numbers=numbers, disk=disk, files=files, long=long)[
        args.what](args)
    sys.exit(bool(LOST))


if __name__ == "__main__":
    main()
