"""Everyone's weight files -> a backbone.  Files are told apart by the names of their tensors."""
import argparse
import os
import re
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

from common import InputError, SwinStages, backbone_stages, rank

torch.serialization.add_safe_globals([argparse.Namespace])  # SoCo's files hold one
LEVELS = ["res2", "res3", "res4", "res5"]  # the names of a backbone's stages, in their order


def save_checkpoint(path, state):
    """Write ``state`` (a dict) whole or not at all: under a temporary name first, then renamed."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        Path(temporary).unlink(missing_ok=True)
        raise error.__context__ or error  # torch's own would hide a full disk or a killed worker


def load_checkpoint(path):
    """The content of a file that torch.save wrote, on the CPU.

    Only tensors and plain containers are read (weights_only=True), so no code in the file runs.
    Raises InputError if it holds anything else, or cannot be read.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}" + (
            " (a folder: name a file in it, such as backbone.pt)" if os.path.isdir(path) else ""))
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80" and start != b"\x80\x02\x8a\n":  # detectron2's .pkl; not torch's
        other = "a bare pickle"
    else:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's messages for a file that is cut off would mislead
            found = re.search(r"GLOBAL (\S+)", str(error))
            other = found and found[1]
    raise InputError(
        f"{path} holds more than tensors ({other}), and unpickling it can run code; README shows "
        "how to keep the tensors of a file that you trust" if other else
        f"{path} holds no tensors that can be read: it is empty, cut off or of another kind")


def save_tensors(state, path):
    """Write a state dict's tensors, contiguous and on the CPU."""
    save_checkpoint(path, {name: tensor.detach().cpu().contiguous().clone()
                           for name, tensor in state.items()})


def detectron2_name(name):
    """detectron2's name of the ResNet tensor that torchvision calls ``name``."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def child_number_name(name):
    """The name of the same tensor in nn.Sequential(*resnet.children()), as lightly's backbones."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    child, dot, rest = name.partition(".")
    return f"{numbers.get(child, child)}{dot}{rest}"


# matches the prefix of a momentum encoder, or of another average of the weights
AVERAGED = re.compile(r"(?i)(^|[._])(k|m|t|key|ema|swa|slow|avg)[._]|"
                      "averaged?|momentum|target|teacher")


def _dicts(content, path=""):
    """A dict and all dicts in it, each with its place, such as "model."."""
    if isinstance(content, dict):
        yield path, content
        for key, value in content.items():
            yield from _dicts(value, f"{path}{key}.")


def _find_backbone(stages, content, path):
    """Where the content of a file holds the backbone: the dict, the prefix of the names there, the
    function that gives their spelling of torchvision's names, and, to be shown, the prefixes of
    this and of other backbones in the file."""
    if isinstance(stages, SwinStages):
        kind, spellings = "Swin Transformer", [str]
        required = "features.0.0.weight", "features.1.0.norm1.weight"
    else:
        kind, spellings = "ResNet", [str, detectron2_name, child_number_name]
        required = "conv1.weight", "layer1.0.conv1.weight"  # both, as every block has a conv1
    found, names = [], []
    for place, state in _dicts(content):
        here = [name for name in state if isinstance(name, str)]
        names += [place + name for name in here if torch.is_tensor(state[name])]
        for spell in spellings:
            prefixes = [name.removesuffix(spell(required[0])) for name in here
                        if f".{name}".endswith(f".{spell(required[0])}")]
            found += [(state, place, prefix, spell) for prefix in prefixes
                      if all(prefix + spell(name) in state for name in required)]
    if not found:
        more = ", ..." if len(names) > 4 else ""
        held = ", ".join(names[:4]) + more if names else "no named tensors"
        raise InputError(f"{path} holds no {kind}: no {' and '.join(required)}, nor the same under "
                         f"other names that are known here, but {held}")
    # stable: otherwise the first one
    found.sort(key=lambda f: bool(AVERAGED.search(f[1] + f[2])))
    places = {place for _, place, _, _ in found}
    shown = [place + prefix if len(places) > 1 else prefix for _, place, prefix, _ in found]
    state, _, prefix, spell = found[0]
    # Res5 of a C4 detector, ours or detectron2's, is in its RoI heads
    state = {re.sub(r"\broi_heads\.(box_head\.)?(?=layer4\.|res5\.)", "backbone.", k): v
             for k, v in state.items() if isinstance(k, str)}
    return state, prefix, spell, shown


def load_backbone(stages, path):
    """Copy a pre-trained backbone into ``stages``, and say what was loaded.

    Reads torchvision's names (also those of our files, Barlow Twins', VICReg's and OpenSelfSup's)
    and, for a ResNet, detectron2's and lightly's, under any prefix (MoCo: module.encoder_q., SoCo:
    module.encoder.) and in dicts within dicts (VISSL).  Of several backbones it takes the trained
    one, not an average of it.
    Returns the file's other tensors by name.  Raises InputError, and loads nothing, if a tensor is
    missing, not finite or of another shape: half of a backbone looks like a bad method.
    """
    loaded, rest, (shown, *others) = _match(stages, load_checkpoint(path), path)
    for name, value in {**loaded, **rest}.items():
        if torch.is_tensor(value) and not value.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
    stages.load_state_dict(loaded, strict=False)
    rest = {name: value for name, value in rest.items() if torch.is_tensor(value)}
    if rank() == 0:
        missing = len(stages.state_dict()) - len(loaded)
        counters = " (batch norm counters, not needed)" if missing else ""
        some = f" ({', '.join([*rest][:3])}{', ...' if len(rest) > 3 else ''})" if rest else ""
        print(f"{path}: {len(loaded)} tensors loaded from '{shown}*', {missing} missing"
              f"{counters}, {len(rest)} unexpected{some}"
              + "".join(f"; not from '{other}*'" for other in others), flush=True)
    return rest


def _match(stages, content, path):
    """What load_backbone takes from the content of a file, by the names of ``stages``; the rest, by
    its own; the prefixes of this backbone and of others in the file."""
    state, prefix, spell, shown = _find_backbone(stages, content, path)
    loaded, rest = {}, dict(state)
    for name, tensor in stages.state_dict().items():
        theirs = prefix + spell(name)
        if theirs in state:
            loaded[name] = value = rest.pop(theirs)
            if not torch.is_tensor(value):
                raise InputError(f"{path}: {theirs} is no tensor")
            if tensor.is_floating_point() and not value.is_floating_point():  # it is quantised
                raise InputError(f"{path}: {theirs} holds {value.dtype}, not floats")
            if value.shape != tensor.shape:
                raise InputError(f"{path}: {theirs} is {tuple(value.shape)}, not "
                                 f"{tuple(tensor.shape)}: another architecture?")
        elif not name.endswith("num_batches_tracked"):
            raise InputError(f"{path}: {theirs} is missing: another architecture?")
    for name in rest:  # a ResNet-101 holds everything that a ResNet-50 does, and more
        if name.startswith(tuple(prefix + spell(f"{n}.") for n, _ in stages.named_children())):
            raise InputError(f"{path}: {name} has no place: another architecture?")
    return loaded, rest, shown


ARCHITECTURES = ("resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2 "
                 "resnext50_32x4d resnext101_32x8d resnext101_64x4d swin_t swin_s swin_b").split()


def find_architecture(path):
    """torchvision's name of the backbone in a file, or None if load_backbone would find none."""
    content = load_checkpoint(path)
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            stages = backbone_stages(arch)
        try:
            _match(stages, content, path)
            return arch
        except InputError:
            pass
    return None


PAPERS = {"moco_v2": "MoCo v2", "detco": "DetCo", "dupr": "DUPR", "soco": "SoCo",
          "barlow_twins": "Barlow Twins", "vicreg": "VICReg"}


def name_weights(args):
    """Fill in args.labels: by default, the folders of args.weights, methods as papers write them.

    Raises InputError if there are not as many names as files, or two alike.
    """
    folders = [Path(path) if os.path.isdir(path) else Path(path).parent for path in args.weights]
    names = [folder.absolute().name for folder in folders]
    args.labels = args.labels or ["random" if path == "none" else PAPERS.get(name, name)
                                  for path, name in zip(args.weights, names)]
    if len(args.labels) != len(args.weights):
        raise InputError(f"{len(args.labels)} --labels for {len(args.weights)} --weights")
    if len({*args.labels}) < len(args.labels):
        raise InputError(f"two of the names are alike, use --labels: {' '.join(args.labels)}")


def load_backbones(args, device, batch):
    """The networks of --weights, side by side: a list of (label, stages in eval mode, the file's
    other tensors).  ``none`` among the weights is a backbone as it is initialised from --seed, with
    batch norm's statistics of the images (B, 3, H, W) that batch() gives: left at 0 and 1, they
    would not normalise, and pre-training would get the credit for what batch norm does.

    Fills in args.labels, as name_weights does.  Raises InputError.
    """
    name_weights(args)
    archs = args.arch
    if not archs:
        archs = [find_architecture(path) if path != "none" else None for path in args.weights]
        usual = next(filter(None, archs), "resnet50" if args.data else "resnet18")
        archs = [arch or usual for arch in archs]  # random weights are compared with the others
    archs = archs * len(args.weights) if len(archs) == 1 else archs
    if len(archs) != len(args.weights):
        raise InputError(f"{len(archs)} --arch for {len(args.weights)} --weights")
    networks = []
    for label, path, arch in zip(args.labels, args.weights, archs):
        torch.manual_seed(args.seed)
        stages = backbone_stages(arch).eval()
        rest = load_backbone(stages, path) if path != "none" else {}
        networks.append((label, stages.to(device), rest))
        if path == "none":
            update_bn([batch()], stages)
    return networks
