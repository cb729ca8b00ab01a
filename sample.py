"""Algorithm 2 from a checkpoint.

    python sample.py                                            64 images by all T steps, into samples.pgm (.ppm in colour)
    python sample.py --sampler ddim --steps 20 --out s.png      in a second, as a PNG
    python sample.py --checkpoint conditional.pt --label Sandal --guidance 3        after train.py --conditional
    python sample.py --n 10000 --out s.npy --score classifier.pt                    for other tools, and how good they are
    torchrun --nproc-per-node=8 -- sample.py --n 10000 --out s.npy                  the same on eight GPUs
"""
import argparse
import datetime
import functools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import train
import unet
from ddpm import classifier_free_guidance, classifier_guidance, respace

PICTURES = ("trajectory", "movie", "nearest", "forward", "reconstruct", "interpolate")      # flags that name a file to draw


def parse_args(argv=None):
    """The settings, checked as far as they can be without the checkpoint; data.WrongChoice says what is wrong."""
    parser = train.Parser(__doc__)
    flag = parser.section("what to draw")
    flag("--checkpoint", "ddpm.pt", "made by train.py", metavar="FILE.pt")
    flag("--n", 64, "number of images", type=train.count())
    flag("--label", None, "class to draw, by name or index (default: image i gets class i modulo their number)")
    flag("--guidance", None, "0: unconditional, 1: conditional, above: more so (default: 1)", type=train.NOT_NEGATIVE)
    flag("--classifier", None, "guide by this classifier (train.py --classifier) rather than by the network itself",
         metavar="FILE.pt")
    flag("--seed", 0, "same seed, device and batch size: same images, for any number of processes", type=train.SEED)

    flag = parser.section("how")
    flag("--sampler", "ddpm", "ddpm: the paper's Algorithm 2, on a subsequence if --steps is below T; ddim: Song et al.",
         choices=("ddpm", "ddim"))
    flag("--steps", None, "calls of the network per image (default: T for ddpm, 50 for ddim)", type=train.count())
    flag("--eta", None, "noise of ddim, 0: none, 1: as much as ddpm (default: 0)",
         type=train.number(float, "from 0 to 1", lambda x: 0 <= x <= 1))
    flag("--clip", True, "hold every predicted x_0 in [-1, 1], as the authors' code does; Algorithm 2 as printed is --no-clip",
         action=argparse.BooleanOptionalAction)
    flag("--batch-size", 256, "images at a time", type=train.count())
    flag("--precision", "auto", "as in train.py; auto asks what this machine does fast", choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network; a last batch of another size compiles again")
    flag("--device", None, "cpu, cuda, cuda:1, mps; default: the best there is")

    flag = parser.section("output")
    flag("--out", None, ".pgm, .ppm or .png: a grid; .npy: uint8 (N, C, H, W), with labels beside it if there are any "
         "(default: samples.pgm, or .ppm in colour)", metavar="FILE")
    flag("--columns", None, "of the grid (default: as many as rows; with classes, one each)", type=train.count())
    flag("--trajectory", None, "also a film strip of 8 images from x_T to x_0, each above its predicted x_0 (Figure 6)",
         metavar="FILE")
    flag("--movie", None, "also the reverse process as an animated PNG", metavar="FILE.png")
    flag("--nearest", None, "also 10 images, each beside the 5 training images nearest to it, and how near 500 are, beside test "
         "images: does it memorise?", metavar="FILE")
    flag("--score", None, "also the samples' Frechet distance to the test set in the features of this classifier, and its "
         "accuracy on their labels", metavar="FILE.pt")

    flag = parser.section("pictures of other things, instead (they are drawn without samples unless --out is given)")
    flag("--forward", None, "real images turning into noise: closed form (Eq. 4) above steps (Eq. 2)", metavar="FILE")
    flag("--reconstruct", None, "test images, their x_T by DDIM run backwards, and what DDIM makes of it", metavar="FILE")
    flag("--interpolate", None, "between two test images: through x_T (DDIM), and at t = T/4, T/2, 3T/4 (Figure 8)",
         metavar="FILE")
    flag("--data-dir", "data", "folder of the data set, for these and for --score")
    args = parser.parse_args(argv)
    if args.eta is not None and args.sampler != "ddim":
        parser.error("--eta belongs to --sampler ddim; ddpm's noise was chosen in training (--variance)")
    if args.score and args.n < 2:
        parser.error("--score needs at least 2 images, and means little below 1000")
    for name in ("out", *PICTURES):
        if getattr(args, name):
            allowed = {"out": (".pgm", ".ppm", ".png", ".npy"), "movie": (".png",)}.get(name, (".pgm", ".ppm", ".png"))
            data.check_suffix(getattr(args, name), allowed)
    return args


def check_files(args, checkpoint):
    """Settle where samples go, if they are wanted, and see to it that every file can be written, before any work is done."""
    colour, others = checkpoint["shape"][0] == 3, args.forward or args.reconstruct or args.interpolate
    if not args.out and (not others or args.trajectory or args.movie or args.nearest or args.score):
        args.out = "samples.ppm" if colour else "samples.pgm"
    paths = [path for path in (args.out, *(getattr(args, name) for name in PICTURES)) if path]
    taken = [os.path.realpath(path).casefold() for path in (*paths, checkpoint["settings"]["dataset"])]     # A.png may be a.png
    for path in paths:
        if taken.count(os.path.realpath(path).casefold()) > 1:
            raise data.WrongChoice(f"{path}: two pictures would go there, or it is the data set; give each a name of its own")
        if colour and Path(path).suffix.lower() == ".pgm":
            raise data.WrongChoice(f"{path}: a .pgm is grey, and {args.checkpoint} draws in colour; use .ppm or .png")
        if train.ranks()[0] == 0:
            data.check_writable(path)


class Recorder:
    """An on_step that keeps 41 frames of a chain of `steps` steps, or all, as pixels: (x_t, predicted x_0), each (N, C, H, W)."""

    def __init__(self, steps):
        self.wanted, self.calls, self.frames = set(np.linspace(0, steps, 41).round().astype(int).tolist()), 0, []

    def __call__(self, t, x_t, x_0):
        if self.calls in self.wanted:
            x_0 = torch.zeros_like(x_t) if x_0 is None else x_0             # nothing is predicted yet at x_T: grey
            self.frames.append([data.to_pixels(x[:64]).cpu() for x in (x_t, x_0)])
        self.calls += 1


def rows(*columns):
    """Columns of a picture, each (N, C, H, W), as its images row by row, and how many columns there are."""
    return torch.stack(columns, dim=1).flatten(0, 1), len(columns)


def sampler(args, diffusion):
    """-> sample(model, shape, generator=..., on_step=...) as the flags say, and the number of its steps."""
    T = diffusion.timesteps
    steps = args.steps or (T if args.sampler == "ddpm" else min(50, T))
    if steps > T:
        raise data.WrongChoice(f"--steps {steps} is more than the {T} that {args.checkpoint} was trained with")
    if args.sampler == "ddim":
        return functools.partial(diffusion.ddim_sample, steps=steps, eta=args.eta or 0.0, clip=args.clip), steps

    def sample(model, shape, **options):
        short, strided = respace(diffusion, model, steps)
        return short.sample(strided, shape, clip=args.clip, **options)

    return sample, steps


def load_classifier(path, device, checkpoint):
    """A classifier for images like the checkpoint's, its diffusion, and the names of its classes."""
    classifier, its_diffusion, other = train.load_checkpoint(path, device, classifier=True)
    if other["shape"] != checkpoint["shape"]:
        raise ValueError(f"{path} was trained on images {other['shape']}, not {checkpoint['shape']}")
    return classifier, its_diffusion, other["classes"]


def choose_labels(args, classes):
    """The label of each image, (n,) int64, or None if there are no classes. data.WrongChoice for a label that cannot be."""
    if classes is None:
        if args.label is not None or args.guidance is not None:
            raise data.WrongChoice(f"--label and --guidance need labels, and {args.checkpoint} was trained without: make one "
                                   "with train.py --conditional, or name a --classifier")
        return None
    if args.label is not None:
        return torch.full((args.n,), data.find_label(args.label, classes))
    return torch.arange(args.n) % len(classes)


def bind(args, network, classifier, diffusion, y):
    """network(x_t, t, y) -> a model (x_t, t) for images of the labels y (B,) or None, guided as the flags say."""
    scale, null = 1.0 if args.guidance is None else args.guidance, network.num_classes
    if classifier is not None:
        return classifier_guidance(diffusion, network, lambda x_t, t: log_prob(classifier, x_t, t, y), scale)
    if y is None or scale == 0:
        return network
    if scale == 1:
        return lambda x_t, t: network(x_t, t, y)
    return classifier_free_guidance(network, y, scale, null)


def log_prob(classifier, x_t, t, y):
    """log p(y | x_t), (B,)."""
    return F.log_softmax(classifier(x_t, t), dim=1).gather(1, y[:, None])[:, 0]


def draw(args, network, classifier, diffusion, checkpoint, labels, device, on_step):
    """The samples as pixels, uint8 (n, C, H, W), in process 0, and None in the others; on_step sees the first batch.

    Batch k has random numbers of its own and is drawn whole by one process, so the images do not depend on their number.
    """
    rank, world, _ = train.ranks()
    sample, steps = sampler(args, diffusion)
    starts, own, began = range(0, args.n, args.batch_size), {}, time.perf_counter()
    for k in range(rank, len(starts), world):
        size = min(args.batch_size, args.n - starts[k])
        y = None if labels is None else labels[starts[k]:starts[k] + size].to(device)
        model = bind(args, network, classifier, diffusion, y)
        seed = int(np.random.SeedSequence([args.seed, k]).generate_state(1, np.uint64)[0]) >> 1

        def report(t, x_t, x_0, first=k == 0, drawn=starts[k], size=size):
            if first:
                on_step(t, x_t, x_0)
            if rank == 0:
                data.say(f"{drawn} of {args.n} images drawn, {size} more at t = {t}")

        x_0 = sample(model, (size, *checkpoint["shape"]), on_step=report, generator=torch.Generator(device).manual_seed(seed))
        if not torch.isfinite(x_0).all():
            raise ValueError(f"{args.checkpoint} draws numbers that are not finite; try --precision fp32")
        own[k] = data.to_pixels(x_0).cpu()
    parts = [own]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(own, parts)
    if rank > 0:
        return None
    seconds = time.perf_counter() - began
    data.say(f"{args.n} images, {steps} steps each, in {seconds:.1f} s: {args.n / seconds:.1f} images/s, "
             f"{args.n * steps / seconds:,.0f} network evaluations/s", done=True)
    batches = {k: pixels for part in parts for k, pixels in part.items()}
    return torch.cat([batches[k] for k in range(len(starts))])


# ---------------------------------------------------------------------------------------------------------- other pictures


def held_out(args, checkpoint, n, device):
    """The first n test images of the checkpoint's data set, in [-1, 1], and their labels."""
    images, labels = train.load_like(checkpoint, "test", args.data_dir)
    if len(images) < n:
        raise ValueError(f"{checkpoint['settings']['dataset']} has {len(images)} test images, and this picture needs {n}")
    return data.to_model(images[:n]).to(device), labels[:n].to(device)


def draw_forward(args, diffusion, checkpoint, device):
    """--forward: for each of 4 images a row q(x_t | x_0) and a row that steps along the chain; t = 0, T/5, ... T."""
    x_0, _ = held_out(args, checkpoint, 4, device)
    times = sorted({round(k * diffusion.timesteps / 5) for k in range(6)})
    closed = [x_0] + [diffusion.q_sample(x_0, t) for t in times[1:]]
    x, stepped = x_0, [x_0]
    for t in range(1, diffusion.timesteps + 1):
        x = diffusion.q_step(x, t)
        if t in times:
            stepped.append(x)
    pairs = [rows(*column)[0] for column in zip(closed, stepped, strict=True)]
    data.save_image(args.forward, *rows(*pairs))


def draw_reconstruction(args, network, diffusion, checkpoint, device):
    """--reconstruct: columns of test images, their x_T, and the images that DDIM (eta = 0) draws from it."""
    x_0, y = held_out(args, checkpoint, 10, device)
    model = functools.partial(network, y=y if network.num_classes else None)
    steps = args.steps or min(100, diffusion.timesteps)
    x_T = diffusion.ddim_invert(model, x_0, steps)
    again = diffusion.ddim_sample(model, x_0.shape, steps, x_T=x_T, clip=args.clip)
    data.save_image(args.reconstruct, *rows(x_0, x_T, again))
    error = 127.5 * (again - x_0).square().mean().sqrt()
    print(f"reconstruction error, root mean square: {error:.2f} of 255, in {steps} steps")


def slerp(a, b, weights):
    """From noise a to noise b (C, H, W) along the arc between them -> (len(weights), C, H, W) (DDIM Appendix D.5).

    The straight line would pass through points of smaller norm than noise has.
    """
    weights = torch.as_tensor(weights, dtype=torch.float32, device=a.device)[:, None, None, None]
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)).clamp(-1, 1))
    if angle < 1e-4:
        return (1 - weights) * a + weights * b
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


def draw_interpolation(args, network, diffusion, checkpoint, device):
    """--interpolate: rows of 11 images from one test image to another: slerp of their x_T, then Figure 8 at three t."""
    x_0, _ = held_out(args, checkpoint, 2, device)
    T, weights = diffusion.timesteps, torch.linspace(0, 1, 9)
    steps = args.steps or min(100, T)
    a, b = diffusion.ddim_invert(network, x_0, steps)
    strips = [diffusion.ddim_sample(network, (9, *x_0.shape[1:]), steps, x_T=slerp(a, b, weights), clip=args.clip)]
    for t in (T // 4, T // 2, 3 * T // 4):
        strips.append(diffusion.interpolate(network, *x_0, weights, max(t, 1), clip=args.clip))
    strips = [torch.cat([x_0[:1], strip, x_0[1:]]) for strip in strips]
    data.save_image(args.interpolate, torch.cat(strips), columns=11)


# ----------------------------------------------------------------------------------------------------------------- quality


def draw_nearest(args, checkpoint, pixels):
    """--nearest: rows of a sample and the 5 training images at the smallest root mean square distance from it; and whether
    samples are nearer to the training set than test images, which nobody can have memorised."""
    known, test = (train.load_like(checkpoint, split, args.data_dir)[0] for split in ("train", "test"))

    def nearest(images):
        images = images[:500].flatten(1).float()
        distances = torch.cat([torch.cdist(images, part.flatten(1).float()) for part in known.split(5000)], dim=1)
        return (distances / math.sqrt(images.shape[1])).topk(min(5, len(known)), largest=False)

    (near, index), (near_test, _) = nearest(pixels), nearest(test)
    data.save_image(args.nearest, *rows(pixels[:10], *(known[k] for k in index[:10].T)))
    beside = "" if torch.equal(known, test) else f", {len(near_test)} test images {near_test[:, 0].mean():.1f}"
    print(f"wrote {args.nearest}; {len(near)} samples are on average {near[:, 0].mean():.1f} of 255 away from the training image "
          f"nearest to them{beside}")


def frechet_distance(f, g):
    """Between Gaussians fitted to features f (N, F) and g (M, F): |m - n|^2 + tr(C + D - 2 (C D)^(1/2)), in float64."""
    (m, C), (n, D) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (f, g))
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T              # C^(1/2)
    cross = torch.linalg.eigvalsh(root @ D @ root).clamp(min=0).sqrt().sum()         # tr((C D)^(1/2))
    return float((m - n).square().sum() + torch.trace(C) + torch.trace(D) - 2 * cross)


@torch.inference_mode()
def score(args, classifier, checkpoint, pixels, labels, device):
    """Print how far the samples are from the test set, what as many training images get, and the classifier's verdict."""
    def seen(images):
        parts = [data.to_model(part.to(device)) for part in images.split(500)]
        features = torch.cat([classifier.features(x, torch.zeros(len(x), dtype=torch.int64, device=device)) for x in parts])
        return features.cpu(), classifier.head(features).argmax(1).cpu()

    known, test = (train.load_like(checkpoint, split, args.data_dir)[0] for split in ("train", "test"))
    if len(known) < 2 or len(test) < 2:
        raise ValueError("--score needs at least 2 training and 2 test images")
    real = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:len(pixels)]]
    (f, guess), (g, _), (r, _) = seen(pixels), seen(test), seen(real)
    counts = torch.bincount(guess, minlength=len(checkpoint["classes"])).tolist()
    print(f"Frechet distance {frechet_distance(f, g):.3f} in {args.score}'s features ({len(pixels)} training images: "
          f"{frechet_distance(r, g):.3f}); classes drawn: {counts}"
          + ("" if labels is None else f"; accuracy on the labels asked for: {(guess == labels).float().mean():.1%}"))


def main(argv=None):
    """Load, draw, write."""
    args = parse_args(argv)
    rank, world, _ = train.ranks()
    device = train.pick_device(args.device)
    network, diffusion, checkpoint = train.load_checkpoint(args.checkpoint, device)
    check_files(args, checkpoint)
    classes, classifier, judge = checkpoint["classes"] if network.num_classes else None, None, None
    if args.classifier:
        classifier, its_diffusion, classes = load_classifier(args.classifier, device, checkpoint)
        if not torch.equal(its_diffusion.exact_alpha_bar, diffusion.exact_alpha_bar):
            raise ValueError(f"{args.classifier} was trained with another schedule: its t means other noise (see --schedule)")
    if args.score:                                   # looks at clean images only, for which any schedule will do
        judge, _, seen = load_classifier(args.score, device, checkpoint)
        if classes is not None and seen != classes:
            raise ValueError(f"{args.score} knows other classes than those to be drawn: it cannot tell whether labels are met")
    labels = choose_labels(args, classes)
    _, steps = sampler(args, diffusion)
    if args.compile:
        network.compile()
    if world > 1:                                    # it carries finished pixels only, and may wait for the slowest
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    torch.manual_seed(args.seed)
    if rank == 0:
        draw_others(args, network, diffusion, checkpoint, device)
    if args.out:
        film, dtype = Recorder(steps), unet.pick_dtype(args.precision, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pixels = draw(args, network, classifier, diffusion, checkpoint, labels, device, film)
        if rank == 0:
            write(args, classes, pixels, labels, film.frames)
            if args.nearest:
                draw_nearest(args, checkpoint, pixels)
            if judge:
                score(args, judge, checkpoint, pixels, labels, device)
    if world > 1:
        dist.destroy_process_group()


@torch.inference_mode()
def draw_others(args, network, diffusion, checkpoint, device):
    """The pictures that are not samples."""
    if args.forward:
        draw_forward(args, diffusion, checkpoint, device)
    if args.reconstruct:
        draw_reconstruction(args, network, diffusion, checkpoint, device)
    if args.interpolate:
        draw_interpolation(args, network, diffusion, checkpoint, device)
    for path in filter(None, (args.forward, args.reconstruct, args.interpolate)):
        print(f"wrote {path}")


def write(args, classes, pixels, labels, frames):
    """The files that the samples and the frames of their first batch go to."""
    columns = args.columns or (len(classes) if labels is not None and args.label is None else None)
    path = Path(args.out)
    if path.suffix.lower() == ".npy":
        with data.atomic(path) as file:
            np.save(file, pixels.numpy())
        path.with_suffix(".labels.npy").unlink(missing_ok=True)          # an older file's labels are not these images'
        if labels is not None:
            with data.atomic(path.with_suffix(".labels.npy")) as file:
                np.save(file, labels.numpy())
    else:
        data.save_image(path, pixels, columns)
    print(f"wrote {path}" + ("; --out samples.png for a PNG" if path.suffix == ".pgm" else ""))
    if args.trajectory:
        chosen = [frames[k] for k in np.linspace(0, len(frames) - 1, min(11, len(frames))).round().astype(int)]
        x_t, x_0 = (torch.stack(column, dim=1)[:8] for column in zip(*chosen, strict=True))        # (8, frames, C, H, W)
        data.save_image(args.trajectory, torch.stack([x_t, x_0], dim=1).flatten(0, 2), columns=len(chosen))
        print(f"wrote {args.trajectory}")
    if args.movie:
        data.save_movie(args.movie, [x_t for x_t, _ in frames], args.columns and min(args.columns, 8))      # of 64 images at most
        print(f"wrote {args.movie}")


if __name__ == "__main__":
    train.guarded(main)
