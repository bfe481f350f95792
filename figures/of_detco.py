"""DetCo's figures (2102.04803): where a level is active (Fig. 5 and 6), the nearest neighbours of
images (Fig. 7), and the similarity of positive and of negative pairs (Fig. 9)."""
import argparse
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import default_collate
from torchvision.transforms.v2.functional import resize

from common import InputError
from figures.backbones import load_all, pictures, squares
from plumbing.drawing import PAGE, image_grid, show
from plumbing.images import augment_colour
from plumbing.weights import LEVELS, load_checkpoint

FEWEST_BATCHES = 10  # in a histogram of the figure similarity


def pooled(stages, x):
    """Images (B, 3, H, W), or patches (B, 9, 3, h, w) of each -> the means of the levels over all
    positions and patches, a list of (B, C_i), unit length."""
    means = [level.mean((2, 3)) for level in stages(x.flatten(0, -4))]  # (B, C_i), or (9B, C_i)
    return [F.normalize(m.view(len(x), -1, m.shape[1]).mean(1), dim=1) for m in means]


def attention_map(features, size):
    """(B, C, h, w) -> (B, size, size): mean over channels, scaled to 0..1 in each image, bilinear
    (DetCo, Sec. 6.3.1); 0 where it is the same everywhere, as the layer norm of a Swin leaves it.
    """
    mean = features.mean(1, keepdim=True)  # (B, 1, h, w)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    magnitude = features.abs().mean((1, 2, 3), keepdim=True)
    scaled = torch.where(high - low > 1e-5 * magnitude, (mean - low) / (high - low), 0)
    return F.interpolate(scaled, (size, size), mode="bilinear")[:, 0]


def neighbours(features, number=9):
    """features (n, D), unit -> of each row the rows most like it, itself left out: their indices
    (n, number), best first, and cosines (DetCo, Sec. 6.3.2)."""
    best = (features @ features.T).fill_diagonal_(-np.inf).topk(min(number, len(features) - 1))
    return best.indices, best.values


def pair_similarity(q, k):
    """q, k (B, D), unit: row i of q and of k are a positive pair, any two others a negative one.
    Returns exp(cosine), its mean over positive and over negative pairs (DetCo, Sec. 6.4)."""
    # Differs: the paper names exp(q k / tau), but its values lie in 1..e: tau is 1 here
    pairs = (q @ k.T).exp()  # (B, B)
    positive = pairs.diagonal()
    return positive.mean(), (pairs.sum() - positive.sum()) / (len(q) * (len(q) - 1))


def attention(args, device):
    """Where the level is active, over the image (DetCo, Fig. 5 and 6)."""
    networks, items = load_all(args, device)
    items, rows = [*islice(items, args.rows)], []
    pixels = squares(items, args, device)
    figure, axes = image_grid([image.shape[1] / image.shape[2] for image, _ in items],
                              [1] * (1 + len(networks)),
                              f"mean of {args.level.capitalize()} over channels, "
                              "from the least (dark) to the most (light) of an image")
    for column, (label, stages, _) in enumerate(networks, 1):
        level = stages(pixels)[LEVELS.index(args.level)].float().cpu()
        for i, (mapped, (image, truth)) in enumerate(zip(attention_map(level, args.size), items)):
            show(axes[i, 0], image)
            show(axes[i, column], image)
            show(axes[i, column], image, "" if i else label, mapped, cmap="inferno", alpha=0.65)
            row = dict(weights=label, image=i, share_above_half=(mapped > 0.5).float().mean())
            if truth is not None:
                inside = torch.zeros(args.size, args.size, dtype=torch.bool)
                scale = torch.tensor([image.shape[2], image.shape[1]] * 2) / args.size
                for x1, y1, x2, y2 in (truth["boxes"] / scale).round().int().clamp(min=0).tolist():
                    inside[y1:y2, x1:x2] = True
                row.update(mean_in_boxes=mapped[inside].mean(), elsewhere=mapped[~inside].mean())
            rows.append(row)
    return figure, rows


def retrieval(args, device):
    """The nearest neighbours of the first images (DetCo, Fig. 7), and what share of all images'
    neighbours has a class in common with them."""
    (networks, items), small, classes, rows = load_all(args, device), [], [], []
    found = {label: [] for label in args.labels}
    for image, truth in items:
        x = squares([(image, truth)], args, device)
        for label, stages, _ in networks:
            found[label].append(pooled(stages, x)[LEVELS.index(args.level)].float().cpu())
        shape = [max(1, round(96 * side / max(image.shape[1:]))) for side in image.shape[1:]]
        small.append(resize(image, shape, antialias=True))
        classes.append({*truth["labels"].tolist()} if truth else set())
    if len(small) < 2:
        raise InputError("retrieval needs two images or more")
    names = sorted({name for own in classes for name in own})
    present = torch.tensor([[name in own for name in names] for own in classes]).float()  # (n, K)
    share = (present @ present.T > 0).fill_diagonal_(False)  # (n, n): a class in common
    annotated = truth is not None
    title = f"images most like the first, by the mean of {args.level.capitalize()}: cosine" + (
        "; framed: a class in common" if annotated else "")
    figure, axes = image_grid([1] * (min(args.rows, len(small)) * len(networks)), [1] * 10, title)
    for n, (label, parts) in enumerate(found.items()):
        nearest, cosine = neighbours(torch.cat(parts))  # (n, 9) each
        for i, line in enumerate(axes[n::len(networks)]):
            show(line[0], small[i], left=label)
            for ax, j, value in zip(line[1:], nearest[i].tolist(), cosine[i]):
                show(ax, small[j], below=f"{value:.3f}")
                if share[i, j]:
                    ax.spines[:].set(color="C5", linewidth=2.5)
        row = dict(weights=label, images=len(small), first_cosine=cosine[:, 0].mean(),
                   last_cosine=cosine[:, -1].mean())
        if annotated:
            row.update(share_a_class=share.gather(1, nearest).float().mean(),
                       of_any_pair=share.sum() / (len(small) * (len(small) - 1)))
        rows.append(row)
    return figure, rows


def load_encoders(path, stages, args, device):
    """The encoders of queries and of keys, each x -> a list of (B, D) of unit length; the index of
    --level in that list; and the recipe.  Of a checkpoint of DetCo they have its heads; otherwise
    both are ``pooled``, and the recipe is None.  Raises InputError: no local head at the level."""
    import detco
    saved, index = load_checkpoint(path) if path != "none" else {}, LEVELS.index(args.level)
    if saved.get("method") != "detco":
        # Differs: the paper's are embeddings of the heads; without heads the backbone's features
        # take their place, whose cosines are on another scale
        return partial(pooled, stages), partial(pooled, stages), index, None
    own = argparse.Namespace(**saved["args"])
    if own.no_local or not own.weights[index]:
        raise InputError(f"{path} has no local head at {args.level} (--no-local, --weights)")
    model = detco.DetCo(own.arch, own.dim, own.queue_size, weights=own.weights, bn_groups=1,
                        share_queue=own.share_queue).eval().to(device)
    model.load_state_dict(saved["model"])
    return model.encoder_q, model.encoder_k, model.levels.index(index), own


def similarity(args, device):
    """exp(cosine) of two global views, and of a local and a global one: the means of batches of 32
    images (DetCo, Fig. 9).  The first checkpoint of DetCo gives the recipe of the views."""
    import detco
    rows, encoders = [], [load_encoders(path, stages, args, device) for path, (_, stages, _)
                          in zip(args.weights, load_all(args, device)[0])]
    recipes = [own for *_, own in encoders if own]
    recipe = recipes[0] if recipes else detco.parse_args(["--data", args.data] if args.data else [])
    measured = {}
    for label, (encode_q, encode_k, i, own) in zip(args.labels, encoders):
        torch.manual_seed(args.seed)
        images, means = pictures(args), []
        for _ in range(args.images // 32):
            batch = [detco.cut_views(image, recipe) for image, _ in islice(images, 32)]
            if len(batch) < 32:
                break
            view_q, view_k, (local, corners), _ = default_collate(batch)
            q, k, patches = (augment_colour(view.pixels.to(device), p_blur=recipe.p_blur,
                                            mean=args.mean, std=args.std)
                             for view in (view_q, view_k, local))
            patches = detco.cut_patches(patches, corners.to(device), recipe.patch_size)
            k = encode_k(k)[i]
            means.append([pair_similarity(encode_q(x)[i], k) for x in (q, patches)])
        if len(means) < FEWEST_BATCHES:
            raise InputError("similarity is a histogram of means over 32 images each, and needs "
                             f"{32 * FEWEST_BATCHES} images or more")
        # (batches, global and local, positive and negative)
        measured[label, "heads" if own else "backbone"] = torch.tensor(means)
    figure = Figure((PAGE, 1.3 * len(measured) + 0.6))
    axes = figure.subplots(len(measured), 2, squeeze=False, sharex=True)
    everything = torch.stack([*measured.values()])
    bins = np.linspace(everything.min().item(), everything.max().item(), 41)
    for line, ((label, part), values) in zip(axes, measured.items()):
        row = dict(weights=label, embeddings_of=part, batches=len(values))
        line[0].set_ylabel(f"{label}, {part}\nbatches")
        for ax, kind, part in zip(line, ("positive", "negative"), values.unbind(2)):
            for query, means in zip(("global", "local"), part.unbind(1)):  # (batches,) each
                row[f"{kind}_{query}"] = mean = means.mean()
                ax.hist(means.numpy(), bins, alpha=0.6, label=f"{query}-global {mean:.3f}")
            row[f"{kind}_difference"] = (part[:, 0] - part[:, 1]).mean()
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2, frameon=False,
                      handlelength=0.8, columnspacing=1)
            ax.yaxis.get_major_locator().set_params(integer=True)
        rows.append(row)
    for ax, kind in zip(axes[0], ("positive", "negative")):
        ax.set_title(f"{kind} pairs", pad=22)
    figure.supxlabel("exp(cosine), mean over 32 images", fontsize=10)
    return figure, rows
