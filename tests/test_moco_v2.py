import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import start_processes
from torch.nn.parallel import DistributedDataParallel

import common
import moco_v2
from common import InputError

SMALL = dict(arch="resnet18", dim=16, queue_size=24, m=0.9, tau=0.2, bn_groups=4)


def plain_encoder(encoder):
    """The same weights in torchvision's own ResNet, with ordinary batch norm and the head as fc."""
    resnet = torchvision.models.resnet18()
    resnet.fc = copy.deepcopy(encoder.head)
    head = {f"fc.{k}": v for k, v in encoder.head.state_dict().items()}
    resnet.load_state_dict({**encoder.stages.state_dict(), **head})
    return resnet.train()


def by_name(encoder):
    """name in the plain encoder -> parameter of ours."""
    return {name.replace("stages.", "").replace("head.", "fc."): p
            for name, p in encoder.named_parameters()}


def transcribed_step(f_q, f_k, queue, velocity, x_q, x_k, order, groups, args):
    """Algorithm 1 of MoCo, line by line, with the batch of each of ``groups`` GPUs apart.

    queue: list of K vectors, oldest first.  Returns the loss; everything else changes in place.
    """
    def forward(f, x):
        return torch.cat([F.normalize(f(part), dim=1) for part in x.chunk(groups)])

    q = forward(f_q, x_q)
    with torch.no_grad():
        shuffled_keys = forward(f_k, x_k[order])
        k = torch.empty_like(shuffled_keys)
        for place, image in enumerate(order.tolist()):
            k[image] = shuffled_keys[place]
    l_pos = torch.stack([torch.dot(a, b) for a, b in zip(q, k)])[:, None]  # (B, 1)
    l_neg = torch.stack([torch.stack([torch.dot(a, n) for n in queue]) for a in q])  # (B, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / args["tau"]
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    gradients = torch.autograd.grad(loss, list(f_q.parameters()))
    with torch.no_grad():
        for (name, p), gradient in zip(f_q.named_parameters(), gradients):
            d = gradient + args["weight_decay"] * p
            velocity[name] = 0.9 * velocity[name] + d if name in velocity else d
            p -= args["lr"] * velocity[name]
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters()):
            p_k.copy_(args["m"] * p_k + (1 - args["m"]) * p_q)
    queue.extend(k)
    del queue[:len(k)]
    return loss.detach(), dict(zip(dict(f_q.named_parameters()), gradients))


def test_a_step_equals_the_papers_algorithm():
    torch.manual_seed(0)
    model = moco_v2.MoCo(**SMALL)
    f_q, f_k = plain_encoder(model.encoder_q), plain_encoder(model.encoder_k)
    for a, b in zip(f_q.parameters(), f_k.parameters()):
        assert torch.equal(a, b)  # it starts as a copy
    queue, velocity = list(model.queue.keys.clone()), {}
    args = dict(tau=0.2, m=0.9, lr=0.005, weight_decay=1e-4)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.005, momentum=0.9,
                                weight_decay=1e-4)
    start = 0
    for step in range(4):  # 4 x 16 keys: the queue of 24 wraps
        x_q, x_k = torch.randn(2, 16, 3, 32, 32)
        torch.manual_seed(100 + step)
        order = torch.randperm(16)  # the one that shuffled() draws
        torch.manual_seed(100 + step)
        loss, keys, parts = model(x_q, x_k)
        optimizer.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in by_name(model.encoder_q).items()}
        optimizer.step()
        common.momentum_update(model.encoder_q, model.encoder_k, model.m)
        model.queue.push(keys)

        expected, gradients = transcribed_step(f_q, f_k, queue, velocity, x_q, x_k, order, 4, args)
        torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
        for ours, plain in ((model.encoder_q, f_q), (model.encoder_k, f_k)):
            for name, p in plain.named_parameters():
                updated = by_name(ours)[name].detach()
                torch.testing.assert_close(updated, p.detach(), atol=1e-5, rtol=1e-4)
                p.data.copy_(updated)  # so that rounding does not grow over the steps
        start = (start + 16) % 24
        ours = torch.cat([model.queue.keys[start:], model.queue.keys[:start]])  # oldest first
        torch.testing.assert_close(ours, torch.stack(queue), atol=2e-5, rtol=1e-4)
        queue = list(ours)
        assert parts["loss_chance"].item() == pytest.approx(math.log(25))


def test_gradients_reach_the_query_encoder_alone():
    torch.manual_seed(0)
    model = moco_v2.MoCo(**SMALL)
    loss, keys, parts = model(*torch.randn(2, 8, 3, 32, 32))
    assert not keys.requires_grad and not any(p.requires_grad for p in parts.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert model.queue.keys.grad is None
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(8))


def test_the_keys_come_from_the_momentum_encoder():
    torch.manual_seed(0)
    model = moco_v2.MoCo(**SMALL)
    views = torch.randn(2, 8, 3, 32, 32)
    torch.manual_seed(1)
    _, before, _ = model(*views)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.manual_seed(1)
    _, same, _ = model(*views)
    assert torch.equal(before, same)  # the query encoder has no part in them
    common.momentum_update(model.encoder_q, model.encoder_k, 0.5)
    torch.manual_seed(1)
    _, after, _ = model(*views)
    assert (after - before).abs().max() > 1e-3


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = moco_v2.MoCo(queue_size=65536)
    assert model.queue.keys.shape == (65536, 128)
    count = sum(p.numel() for p in model.encoder_q.parameters())
    resnet50_without_fc = 25_557_032 - 2048 * 1000 - 1000
    assert count == resnet50_without_fc + (2048 * 2048 + 2048) + (2048 * 128 + 128)


def test_defaults_are_the_papers_unless_scenes_are_used():
    args = vars(moco_v2.parse_args(["--data", "somewhere"]))
    paper = dict(arch="resnet50", epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, dim=128,
                 image_size=224, crop_scale=0.2, queue_size=65536, momentum=0.999, tau=0.2,
                 bn_groups=8)
    assert {k: args[k] for k in paper} == paper
    small = moco_v2.parse_args([])
    assert small.arch == "resnet18" and small.queue_size < 4000
    assert moco_v2.parse_args(["--arch", "resnet34"]).arch == "resnet34"


# ---------------------------------------------------------------------- two processes, one process


def one_step(model, view_q, view_k):
    torch.manual_seed(3)
    loss, keys, _ = model(view_q, view_k)
    loss.backward()
    moco = getattr(model, "module", model)
    moco.queue.push(keys)
    return loss.detach(), moco


def half(number, groups, path):
    """Process ``number`` of two: half of the batch, half of the groups."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=number, world_size=2)
    state, views = torch.load(path / "in.pt", weights_only=True)
    model = moco_v2.MoCo(**{**SMALL, "bn_groups": groups // 2})
    model.load_state_dict(state)
    rows = slice(8 * number, 8 * number + 8)
    loss, moco = one_step(DistributedDataParallel(model, broadcast_buffers=False),
                          views[0][rows], views[1][rows])
    everyone = common.all_gather(loss[None])
    queues = common.all_gather(moco.queue.keys[None])
    assert torch.equal(queues[0], queues[1])
    if number == 0:
        torch.save([everyone.mean(), {n: p.grad for n, p in moco.encoder_q.named_parameters()},
                    moco.queue.state_dict()], path / "out.pt")
    small = common.Queue(5, 2)  # rank order, wrapping, refusal, by all processes alike
    small.push(torch.full((2, 2), float(number)))
    assert small.keys[:4, 0].tolist() == [0, 0, 1, 1] and small.oldest == 4
    small.push(torch.full((1, 2), 2.0 + number))
    assert small.keys[:, 0].tolist() == [3, 0, 1, 1, 2]
    with pytest.raises(InputError, match="6 .* 5"):
        small.push(torch.zeros(3, 2))
    images = torch.arange(6.0).view(6, 1) + 10 * number  # un-shuffled across processes
    assert torch.equal(common.shuffled(lambda x: x * 2, images), images * 2)
    with pytest.raises(InputError, match="3 .* 2"):
        common.batch_norm_groups(3, 12)
    with pytest.raises(InputError, match="15 .* 2"):
        common.batch_norm_groups(2, 15)
    dist.destroy_process_group()


@pytest.mark.parametrize("groups", [2, 4])
def test_two_processes_equal_one_with_the_same_groups(tmp_path, groups):
    torch.manual_seed(0)
    model = moco_v2.MoCo(**{**SMALL, "bn_groups": groups})
    views = torch.randn(2, 16, 3, 32, 32)
    torch.save([model.state_dict(), views], tmp_path / "in.pt")
    start_processes(half, (groups, tmp_path), 2)
    loss, gradients, queue = torch.load(tmp_path / "out.pt", weights_only=True)
    expected, _ = one_step(model, *views)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, p in model.encoder_q.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(queue["keys"], model.queue.keys, atol=1e-5, rtol=0)
    assert torch.equal(queue["oldest"], model.queue.oldest)


# -------------------------------------------------------------------------------- a whole short run


def test_training_equals_the_algorithm_on_the_same_views(tmp_path):
    """train() itself, first batch to last: order of the step, schedule, queue fill, checkpoint."""
    torch.set_num_threads(1)
    args = moco_v2.parse_args(f"--scenes 40 --epochs 2 --batch-size 16 --image-size 64 --workers 0 "
                              f"--queue-size 40 --bn-groups 2 --p-blur 0.5 "
                              f"--out {tmp_path}".split())
    moco_v2.main([str(x) for k, v in vars(args).items() if not isinstance(v, (bool, type(None)))
                  for x in ("--" + k.replace("_", "-"), v)])
    torch.manual_seed(args.seed)
    model = moco_v2.MoCo("resnet18", 128, 40, args.momentum, args.tau, 2)
    f_q, f_k = (plain_encoder(encoder).to(memory_format=torch.channels_last)
                for encoder in (model.encoder_q, model.encoder_k))
    from scenes import Scenes
    data = Scenes(40, size=96, seed=0)
    cut = partial(moco_v2.two_views, size=64, scale=(args.crop_scale, 1.0))
    queue, velocity = [], {}
    for step, (v_q, v_k) in zip([*range(4, 7), *range(4)],
                                [*common.load_batches(data, cut, 16, range(4, 7), 0, 0),
                                 *common.load_batches(data, cut, 16, range(4), 0, 0)]):
        torch.manual_seed(common.seed_for(0, step, 0))
        x_q, x_k = (common.photometric(v.pixels, p_blur=args.p_blur) for v in (v_q, v_k))
        order = torch.randperm(16)
        if step >= 4:  # the fill: 48 keys, of which the last 40 stay
            with torch.no_grad():
                keys = torch.cat([F.normalize(f_k(p), dim=1) for p in x_k[order].chunk(2)])
            queue = (queue + list(keys[order.argsort()]))[-40:]
        else:
            lr = args.lr * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 4))
            transcribed_step(f_q, f_k, queue, velocity, x_q, x_k, order, 2,
                             dict(tau=args.tau, m=args.momentum, lr=lr, weight_decay=1e-4))
    state = common.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and state["method"] == "moco_v2"
    model.load_state_dict(state["model"])
    oldest = int(model.queue.oldest)
    ours = torch.cat([model.queue.keys[oldest:], model.queue.keys[:oldest]])
    torch.testing.assert_close(ours, torch.stack(queue), atol=1e-4, rtol=1e-3)
    for ours, plain in ((model.encoder_q, f_q), (model.encoder_k, f_k)):
        for name, p in plain.named_parameters():
            torch.testing.assert_close(by_name(ours)[name].detach(), p.detach(), atol=1e-4,
                                       rtol=1e-3)
    backbone = common.load_checkpoint(tmp_path / "backbone.pt")
    assert all(torch.equal(v, model.encoder_q.stages.state_dict()[k]) for k, v in backbone.items())
    assert len(backbone) == len(model.encoder_q.stages.state_dict())
