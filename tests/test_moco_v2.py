"""MoCo v2's algorithm, step by step.  What is true of every method is in test_methods.py."""
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import moco_v2
from plumbing.images import augment_colour, load_batches, seed_for, two_views
from plumbing.weights import load_checkpoint
from scenes import Scenes


def small(**options):
    return moco_v2.MoCo(**{**dict(arch="resnet18", dim=16, queue_size=24, m=0.9, tau=0.2,
                                  bn_groups=4), **options})


def batch(number):
    """view_q, view_k."""
    return [*torch.randn(2, number, 3, 32, 32)]


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
    model = small()
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
        order = torch.randperm(16)  # the one that encode_shuffled draws
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


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = moco_v2.MoCo(queue_size=65536)
    assert model.queue.keys.shape == (65536, 128)
    count = sum(p.numel() for p in model.encoder_q.parameters())
    resnet50_without_fc = 25_557_032 - 2048 * 1000 - 1000
    assert count == resnet50_without_fc + (2048 * 2048 + 2048) + (2048 * 128 + 128)


def test_training_equals_the_algorithm_on_the_same_views(tmp_path):
    """A whole run: the queue's filling, views, colours, schedule, steps, checkpoint."""
    torch.set_num_threads(1)
    flags = ("--scenes 40 --epochs 2 --batch-size 16 --image-size 64 --workers 0 --queue-size 40 "
             "--bn-groups 2 --p-blur 0.5 --optimizer sgd --lr 0.06 --weight-decay 1e-4").split()
    moco_v2.main([*flags, "--out", str(tmp_path)])
    args = moco_v2.parse_args(flags)
    torch.manual_seed(args.seed)
    model = moco_v2.MoCo("resnet18", 128, 40, args.momentum, args.tau, 2)
    f_q, f_k = (plain_encoder(encoder).to(memory_format=torch.channels_last)
                for encoder in (model.encoder_q, model.encoder_k))
    data = Scenes(40, size=96, seed=0)
    cut = partial(two_views, size=64, scale=(args.crop_scale, 1.0))
    queue, velocity = [], {}
    for step, (v_q, v_k) in zip([*range(4, 7), *range(4)],
                                [*load_batches(data, cut, 16, range(4, 7), 0, 0),
                                 *load_batches(data, cut, 16, range(4), 0, 0)]):
        torch.manual_seed(seed_for(0, step, 0))
        x_q, x_k = (augment_colour(v.pixels, p_blur=args.p_blur) for v in (v_q, v_k))
        order = torch.randperm(16)
        if step >= 4:  # the fill: 48 keys, of which the last 40 stay
            with torch.no_grad():
                keys = torch.cat([F.normalize(f_k(p), dim=1) for p in x_k[order].chunk(2)])
            queue = (queue + list(keys[order.argsort()]))[-40:]
        else:
            lr = args.lr * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 4))
            transcribed_step(f_q, f_k, queue, velocity, x_q, x_k, order, 2,
                             dict(tau=args.tau, m=args.momentum, lr=lr, weight_decay=1e-4))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and state["method"] == "moco_v2"
    model.load_state_dict(state["model"])
    oldest = int(model.queue.oldest)
    ours = torch.cat([model.queue.keys[oldest:], model.queue.keys[:oldest]])
    torch.testing.assert_close(ours, torch.stack(queue), atol=1e-4, rtol=1e-3)
    for ours, plain in ((model.encoder_q, f_q), (model.encoder_k, f_k)):
        for name, p in plain.named_parameters():  # 2e-4 apart, by rounding
            torch.testing.assert_close(by_name(ours)[name].detach(), p.detach(), atol=4e-4,
                                       rtol=1e-3)
