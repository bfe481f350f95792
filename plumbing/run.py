"""What every command does around its own work: processes, precision, and the folder of a run with
its log, checkpoint, resume, signals and curves."""
import csv
import fcntl
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import InputError, all_gather, all_reduce_sum, rank, world_size
from plumbing.batch_norm import synchronise_batch_norm
from plumbing.images import load_batches, seed_for, steps_per_epoch
from plumbing.weights import load_checkpoint, save_checkpoint, save_tensors

# ---------------------------------------------------------------------------- processes and devices


def launch(work, parse_args, argv=None):
    """Run a command, ``work(parse_args(argv), device)``, as one of torchrun's processes or alone.

    Answers bad input with one line and exit status 1.
    """
    local_rank, out = int(os.environ.get("LOCAL_RANK", 0)), None
    numbers = signal.SIGCHLD, signal.SIGINT, signal.SIGTERM  # torch's SIGCHLD handler raises too
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        try:
            args = parse_args(argv)
            out, device = args.out, setup()
            signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C does
            work(args, device)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except (RuntimeError, ConnectionError, EOFError) as error:  # EOFError: a loader worker is gone
        lost = re.search("DataLoader worker.* (exited|killed).*|by peer|remote process", str(error))
        if isinstance(error, RuntimeError) and not lost:
            raise
        worker = lost and lost[1]
        why = lost[0] if worker else "another process has ended"
        sys.exit(1 if local_rank and not worker else
                 f"error: {why}; run the same command again to resume")
    except (InputError, OSError) as error:
        if local_rank:  # the first process says what all know, and torchrun then ends the others;
            time.sleep(5)  # one that is still there has something of its own to say
        full_disk = isinstance(error, OSError) and error.filename is None
        where = f"{out}: " if full_disk else ""
        sys.exit(f"error: {where}" + str(error).rsplit("InputError: ", 1)[-1].strip())
    except KeyboardInterrupt as stopped:  # before the first step, or after the last
        if not local_rank:
            print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _interrupt(number, _frame):
    raise KeyboardInterrupt(number)


def setup():
    """Join the processes that torchrun started, if it did -> this process's device."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    if "RANK" in os.environ and not dist.is_initialized():
        get, store = os.environ.get, None
        # torchrun's own store still holds the addresses of the processes before a restart
        if get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.TCPStore(get("MASTER_ADDR"), int(get("MASTER_PORT")), is_master=False)
            store = dist.PrefixStore(f"restart {get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                rank=int(get("RANK")), world_size=int(get("WORLD_SIZE")))
        if not cuda:  # else one that ends on an error leaves others waiting to connect
            dist.barrier()
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"{local_rank + 1} processes, but {torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(local_rank)
        # a resumed run equals an uninterrupted one, but where RoI Align sums in no fixed order
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("high")  # TF32: finer than the bfloat16 that comes in
    return torch.device("cuda" if cuda else "cpu")


def distribute(model, device, sync_batch_norm=False):
    """Move a model to its device -> the model, and its wrapper for several processes (or itself).

    sync_batch_norm: share batch norm's statistics over processes.
    """
    model = model.to(device, memory_format=torch.channels_last)
    if world_size() == 1:
        return model, model
    if sync_batch_norm:
        synchronise_batch_norm(model)
    return model, DistributedDataParallel(model, broadcast_buffers=False,
                                          gradient_as_bucket_view=True)


def mixed_precision(args, device, side=math.inf):
    """The context of a forward pass, in bfloat16 or float32 as --precision says; weights, their
    gradients and the losses stay float32.  side: of the smallest images, in pixels.

    Raises InputError for bfloat16 on CPUs with images so small that Res4 is one position, where
    PyTorch (2.11, 2.15) leaves most of the gradient of Res5's first 3x3 weights uninitialised.
    """
    precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    processor = Path("/proc/cpuinfo")
    if precision == "bfloat16" and device.type == "cpu" and rank() == 0 and processor.exists() \
            and "bf16" not in processor.read_text():
        print("warning: this processor has no bfloat16 arithmetic: --precision bfloat16 is slower "
              "than float32 on it", flush=True)
    if precision == "bfloat16" and device.type == "cpu" and side <= 16:
        raise InputError(f"bfloat16 on CPUs needs images of more than 16 pixels, not {side}: "
                         "PyTorch's gradients are wrong there")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def free_memory(device):
    """Bytes that are free on a GPU, or for this process's container or machine; infinite where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free, group = [math.inf], Path("/sys/fs/cgroup")
    try:
        free.append(1024 * int(re.search(r"MemAvailable: *(\d+)",
                                         Path("/proc/meminfo").read_text())[1]))
        free.append(int((group / "memory.max").read_text())
                    - int((group / "memory.current").read_text()))
    except (OSError, TypeError, ValueError):  # "max" is no limit
        pass
    return min(free)


def gather_objects(mine):
    """An object of any kind in each process -> the list of all, in rank order."""
    if world_size() == 1:
        return [mine]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


# ---------------------------------------------------------------------------------------- the run


def check_queue(size, keys_per_step, m, images):
    """Refuse a queue shorter than one step's keys, or longer than 4,096 and the data set; warn of a
    long one for this data set, or for the momentum m of the key encoder.  images: their number."""
    if size > max(images, 4096):  # it would be filled for minutes or hours, with each image again
        raise InputError(f"{images} images are too few for a queue of {size} keys: --small sets a "
                         "recipe for few images")
    if size < keys_per_step:
        raise InputError(f"queue size {size} is less than the {keys_per_step} keys of a step")
    if rank() == 0 and size > images / 4:
        print(f"warning: a queue of {size} is more than a quarter of {images} images: an image "
              "meets its own earlier keys as negatives")
    drift = size / keys_per_step * (1 - m)
    if rank() == 0 and drift > 0.3:
        print(f"warning: (K/B)(1-m) is {drift:.2f} (MoCo's: 0.26): while a key is in the queue its "
              "encoder changes so much that old keys look different, whatever they show")


class Run:
    """The folder of a run, and what happens there after every step.

    args: the command's; method: its name, kept in the checkpoint; images: the data set; steps: how
    many there are in all (default: args.epochs of it), 0 where nothing trains; parts: name ->
    module or optimizer, all that a checkpoint must hold.  If the folder holds a checkpoint, the run
    resumes at once: ``step`` is the number of steps done.  ``measured``, a dict of numbers that are
    not of every step (nan elsewhere), goes into the log of the step that ends next.
    Raises InputError: no batch in the data, a checkpoint of another method, of other arguments or
    of other images.
    """

    FREE = ("out", "workers", "log_every", "fresh")  # arguments that may change when a run resumes

    def __init__(self, args, method, images, steps=None, **parts):
        self.method, self.images, self.parts = method, images, parts
        self.steps_per_epoch = 1 if steps == 0 else steps_per_epoch(images, args.batch_size)
        self.steps = args.epochs * self.steps_per_epoch if steps is None else steps
        self.args = {k: v for k, v in vars(args).items() if k not in self.FREE}
        self.batch_size, self.seed, self.workers = args.batch_size, args.seed, args.workers
        self.out, self.log_every, self.step = Path(args.out), args.log_every, 0
        self.checkpoint, self.table = self.out / "checkpoint.pt", self.out / "log.csv"
        groups = parts["optimizer"].param_groups if "optimizer" in parts else []
        self.initial_lrs = [group["lr"] for group in groups]
        self.window, self.signal, self.asked, self.last = [], 0, 0.0, {}
        self.measured = {}
        paths = "\n".join(getattr(images, "paths", ()))  # of scenes the arguments say all
        self.fingerprint = [len(images), zlib.crc32(os.fsencode(paths))]
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.out.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            self._lock()
        if args.fresh and rank() == 0:
            for old in ("checkpoint.pt", "backbone.pt", "detector.pt", "curves.png",
                        "correlation.png", "ap.json", "detections.png"):
                (self.out / old).unlink(missing_ok=True)
        if world_size() > 1:
            dist.barrier()
        if self.checkpoint.exists():
            self._resume()
        if all_gather(torch.tensor([self.step])).unique().numel() > 1:
            raise InputError(f"{self.out} is not one folder that all processes see")
        if rank() == 0:
            self._truncate_log()
            (self.out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        unused = "scenes" if self.args.get("data") else "data"
        self.say(f"{method}: " + ", ".join(
            f"{name} {value}" for name, value in self.args.items()
            if value is not None and value is not False and name != unused))
        self.start_clock()

    def start_clock(self):
        """Measure speed from now on: what comes before the first step does not count."""
        self.drawn = self.said = self.stepped = time.monotonic()
        self.began = self.logged = (self.drawn, self.step)

    def _lock(self):
        """Keep other runs out of the folder for as long as this process lives, however it ends."""
        self.lock = open(self.out / "lock", "a")
        for wait in [0.1] * 50 + [0]:  # what is left of a killed run ends with its step
            try:
                return fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(wait)
            except OSError:  # a file system without locks
                return None
        raise InputError(f"another run is at work in {self.out}: wait, or give another --out")

    def _resume(self):
        state = load_checkpoint(self.checkpoint)
        method = state.get("method") if isinstance(state, dict) else None
        if method != self.method:
            raise InputError(f"{self.checkpoint} is a checkpoint of {method}, not of {self.method}")
        try:
            # a flag that is not set may be one that an earlier version did not have
            old, new = ({k: v for k, v in args.items() if v is not None and v is not False}
                        for args in (state["args"], json.loads(json.dumps(self.args))))
            changed = [f"{k} {old.get(k)} (now {new.get(k)})" for k in sorted({*old, *new})
                       if old.get(k) != new.get(k)]
            then, now = state.get("fingerprint", self.fingerprint), self.fingerprint
            if then != now:
                others = "others" if now[0] == then[0] else now[0]
                changed.append(f"{then[0]} images (now {others})")
            if changed:
                raise InputError(f"{self.out} holds a run with other arguments or images: "
                                 f"{', '.join(changed)}; give the same ones, another --out, or "
                                 "--fresh to start over")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
        except InputError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.checkpoint} does not fit: "
                             f"{' '.join(str(error).split())[:200]}") from None
        self.say(f"{self.out}: resuming after step {self.step}" if self.step < self.steps else
                 f"{self.out}: finished, all {self.steps} steps are done; --fresh starts over")

    def _truncate_log(self):
        """Drop the rows of log.csv after the checkpoint's step: a killed run may have left some."""
        if self.table.exists():
            header, *rows = self.table.read_text(errors="replace").split("\n")
            rows = [r for r in rows if r.count(",") == header.count(",")
                    and r.split(",")[0].isdigit() and int(r.split(",")[0]) <= self.step]
            kept = self.table.with_suffix(".tmp")
            kept.write_text("".join(f"{r}\n" for r in [header, *rows]) if rows else "")
            os.replace(kept, self.table)

    def batches(self, data, draw, steps=None, collate_fn=None):
        """Yield (step, this process's batch) for the steps still to do, or for ``steps``, a range.

        draw, collate_fn: as load_batches takes them.  What follows a batch draws its random numbers
        (colours, shuffling) from (seed, step, rank).  From now on Ctrl-C and SIGTERM wait for
        ``stop_if_asked``; a second one does not.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)
        steps = range(self.step, self.steps) if steps is None else steps
        loader = load_batches(data, draw, self.batch_size, steps, self.seed, self.workers,
                              collate_fn)
        for step, batch in zip(steps, loader):
            torch.manual_seed(seed_for(self.seed, step, rank()))
            yield step, batch

    def _ask_to_stop(self, number, _frame):
        now = time.monotonic()
        if self.signal and now - self.asked > 2:  # earlier, it is torchrun that passes on the first
            raise KeyboardInterrupt(number)
        if not self.signal:
            self.signal, self.asked = number, now
            if rank() == 0:  # not print: it may be what was interrupted
                os.write(1, b"stopping after this step; once more to stop now\n")

    def fill_queues(self, queues, batches, encode, mixed=nullcontext()):
        """Before the first step, fill each queue with keys of real images.

        batches: a range of steps -> (step, *views) of each; here of steps after the last, which are
        never trained on.  encode: *views -> the keys (n, D) of each queue; mixed: its context, as
        mixed_precision returns it.
        """
        if self.step:
            return
        size = len(queues[0].keys)
        self.say(f"filling {len(queues)} queue{'s' if len(queues) > 1 else ''} of {size} keys")
        extra, began = math.ceil(size / self.batch_size), time.monotonic()
        for done, (_, *views) in enumerate(batches(range(self.steps, self.steps + extra))):
            if done >= 2 and time.monotonic() - self.said > 20:
                left = (extra - done) * (time.monotonic() - began) / done / 60
                self.say(f"filling: {done}/{extra} batches  {left:.1f} min left", rewrite=True)
            with mixed:  # not around the loop: the views' colours are float32
                keys = encode(*views)
            for queue, k in zip(queues, keys):
                queue.push(k)
            self.stop_if_asked()
        self.start_clock()

    def say(self, text, rewrite=False):
        """Print a line, once for all processes; on a terminal the next one may take its place."""
        self.said = time.monotonic()
        if rank() == 0 and not sys.stdout.isatty():
            print(text, flush=True)
        elif rank() == 0:
            text = text[:shutil.get_terminal_size().columns - 1] if rewrite else text
            print("\r\033[K" + text, end="" if rewrite else "\n", flush=True)

    def stop_if_asked(self):
        """After SIGTERM or Ctrl-C in any process: save, and end all processes with 128 +
        the signal's number.

        Save after a step of over 20 seconds too: torchrun gives a process 30 to end."""
        if self.parent not in (None, os.getppid()):
            os._exit(1)  # torchrun was killed: nothing else would end this process
        asked = torch.tensor([self.signal, time.monotonic() - self.stepped > 20])
        if world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        number, slow = asked.tolist()
        self.stepped = time.monotonic()
        if self.step and (number or slow):
            self._log()
            self.save(last=bool(number))
        if number:
            self.say(f"stopped by {signal.Signals(int(number)).name}; run the same command again "
                     f"to resume after step {self.step}")
            sys.exit(128 + int(number))

    def scale_learning_rates(self, factor):
        """Set the learning rate of each of the optimizer's parameter groups to its initial one
        times ``factor`` -> the first group's."""
        for group, initial in zip(self.parts["optimizer"].param_groups, self.initial_lrs):
            group["lr"] = initial * factor
        return self.initial_lrs[0] * factor

    def end_step(self, loss, lr, **parts):
        """Count a step, then log it, save it or stop after it, if one of these is due.

        loss and parts: 0-dim tensors, read only when a line is logged; lr: a number.
        """
        self.step += 1
        self.window.append(torch.stack([v.detach().float() for v in (loss, *parts.values())]))
        self.names, self.lr, done = ("loss", *parts), lr, self.step == self.steps
        epoch_ends = done or self.step % self.steps_per_epoch == 0
        if epoch_ends or self.step % self.log_every == 0 or \
                any(map(math.isfinite, self.measured.values())):
            self._log()
        if epoch_ends:
            self.save(last=done)
        if not done:
            self._say_progress()
            self.stop_if_asked()

    def _say_progress(self):
        """After two steps, and whenever nothing was said for 20 seconds: how long it takes."""
        now, (start, first) = time.monotonic(), self.began
        if self.logged[1] < self.step and (self.step - first == 2 or now - self.said > 20):
            each = (now - start) / (self.step - first)
            left, second = (self.steps - self.step) * each / 60, self.step - first == 2
            flag = "--epochs" if "epochs" in self.args else "--iterations"
            self.say(f"step {self.step}/{self.steps}  {each:.2g} s each  {left:.1f} min left"
                     + (f"  ({flag} sets how many)" if second else ""), rewrite=not second)

    def finish(self, stages, note="the pre-trained ResNet"):
        """Write a backbone, ResNetStages or SwinStages, to backbone.pt, and say so, and what seems
        wrong with the training, if anything."""
        last = self.last
        if last.get("loss", -math.inf) > 0.98 * last.get("loss_chance", math.inf):
            self.say(f"warning: the loss ends at chance ({last['loss']:.4g} of "
                     f"{last['loss_chance']:.4g}): more --epochs, a lower --lr or a shorter "
                     "--queue-size usually help")
        if last.get("directions", math.inf) < 2:
            self.say(f"warning: the embeddings fill {last['directions']:.2g} directions only, "
                     "which is an early phase, or collapse: more --epochs or a higher --lr help")
        if rank() == 0:
            save_tensors(stages.state_dict(), self.out / "backbone.pt")
        self.say(f"{self.out / 'backbone.pt'} is {note}")

    def draw_correlation(self, model, batches, mixed):
        """Draw how the dimensions of two views' embeddings correlate into correlation.png, for the
        batch of a step after the last, which is never trained on.

        model: embed, (B, 3, H, W) -> (B, D); batches, mixed: as fill_queues takes them.
        """
        _, *views = next(batches(range(self.steps, self.steps + 1)))
        model.eval()
        with torch.no_grad(), mixed:
            z1, z2 = (all_gather(model.embed(view).float()) for view in views)
        if rank() == 0:
            from plumbing.drawing import draw_correlation
            draw_correlation(z1, z2, self.out / "correlation.png")

    def _log(self):
        if not self.window:
            return
        values = all_reduce_sum(torch.stack(self.window)) / world_size()  # (steps, columns)
        values, self.window = values.cpu(), []  # the only place where the loop waits for the device
        wrong = (~values[:, 0].isfinite()).nonzero()
        if len(wrong):
            kept = f"{self.checkpoint} is the last good one" if self.checkpoint.exists() else "none"
            step = self.step - len(values) + 1 + int(wrong[0])
            raise InputError(f"the loss is not finite at step {step}; checkpoint: {kept}")
        if hasattr(self.images, "report"):
            self.images.report(self.say, "another image takes its place",
                               complete=self.step % self.steps_per_epoch == 0)
        now, (then, step_then), (start, step_start) = time.monotonic(), self.logged, self.began
        self.logged = (now, self.step)
        speed = (self.step - step_then) * self.batch_size / (now - then)
        left = (self.steps - self.step) * (now - start) / (self.step - step_start) / 60
        self.last = row = dict(zip(self.names, values.mean(0).tolist()), lr=self.lr,
                               **self.measured)
        self.measured = dict.fromkeys(self.measured, math.nan)
        if rank() == 0:
            epoch = round(self.step / self.steps_per_epoch, 4)
            line = dict(step=self.step, epoch=epoch, **row, images_per_s=round(speed, 1))
            with open(self.table, "a", newline="") as file:
                writer = csv.DictWriter(file, line, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(line)
        columns = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items()
                            if not math.isnan(value))
        self.say(f"epoch {math.ceil(self.step / self.steps_per_epoch)}/"
                 f"{math.ceil(self.steps / self.steps_per_epoch)}  step {self.step}/{self.steps}  "
                 f"{left:.1f} min left  {speed:.0f} images/s  {columns}", self.step < self.steps)

    def save(self, last=False):
        """Write the checkpoint of this step; on the last one, and once a minute, curves.png too.
        Raises InputError if the weights are not finite."""
        weights = [p for part in self.parts.values() if isinstance(part, nn.Module)
                   for p in part.parameters()]
        if not all(p.isfinite().all() for p in weights):
            raise InputError(f"the weights are not finite after step {self.step}: not saved")
        if rank() == 0:
            save_checkpoint(self.checkpoint, dict(
                {name: part.state_dict() for name, part in self.parts.items()},
                method=self.method, args=self.args, fingerprint=self.fingerprint,
                step=self.step))
            if last or time.monotonic() - self.drawn > 60:
                from plumbing.drawing import draw_curves, read_log
                draw_curves({"": read_log(self.table)}, self.out / "curves.png")
                self.drawn = time.monotonic()
