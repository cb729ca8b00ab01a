"""Algorithm 2 from a checkpoint.

    python sample.py                                            64 images by all T steps, into samples.pgm (.ppm in colour)
    python sample.py --sampler ddim --steps 20 --out s.png      in a second, as a PNG
    python sample.py --label Sandal --guidance 3                from a checkpoint that train.py --conditional made
    python sample.py --n 10000 --out s.npy --score c.pt         for other tools, and its quality in a classifier's eyes
"""
import functools
import math
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from ddpm import classifier_free_guidance, classifier_guidance, respace, slerp
from train import (
    COUNT,
    SEED,
    Parser,
    find_label,
    guarded,
    load_checkpoint,
    number,
    pick_device,
    pick_dtype,
    ranks,
)


def parse_args(argv=None):
    """The settings, every one of them checked here; what is wrong is one line and exit code 2."""
    parser = Parser(__doc__)
    flag = parser.section("what to draw")
    flag("--checkpoint", "ddpm.pt", "made by train.py", metavar="FILE.pt")
    flag("--n", 64, "number of images", type=COUNT)
    flag("--label", None, "class to draw, by name or index (default: image i gets class i modulo their number)")
    flag("--guidance", None, "0: unconditional, 1: conditional, above: more so (default: 1)", type=number(float, 0))
    flag("--classifier", None, "guide by this classifier (train.py --classifier) rather than by the network itself",
         metavar="FILE.pt")
    flag("--seed", 0, "same seed, device and batch size: same images, for any number of processes", type=SEED)

    flag = parser.section("how")
    flag("--sampler", "ddpm", "ddpm: the paper's Algorithm 2, on a subsequence if --steps is below T; ddim: Song et al.",
         choices=("ddpm", "ddim"))
    flag("--steps", None, "calls of the network per image (default: T for ddpm, 50 for ddim)", type=COUNT)
    flag("--eta", None, "noise of ddim, 0: none, 1: as much as ddpm (default: 0)", type=number(float, 0, 1))
    flag("--batch-size", 256, "images at a time", type=COUNT)
    flag("--precision", "fp32", "as in train.py", choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network", action="store_true")
    flag("--device", None, "cpu, cuda, cuda:1, mps; default: the best there is")

    flag = parser.section("output")
    flag("--out", None, ".pgm, .ppm or .png: a grid; .npy: uint8 (N, C, H, W), with labels beside it if there are any "
         "(default: samples.pgm, or .ppm in colour)", metavar="FILE")
    flag("--columns", None, "of the grid (default: as many as rows; with classes, one each)", type=COUNT)
    flag("--trajectory", None, "also a film strip of 8 images from x_T to x_0, each above its predicted x_0 (Figure 6)",
         metavar="FILE")
    flag("--movie", None, "also the reverse process as an animated PNG", metavar="FILE.png")
    flag("--nearest", None, "also 10 images, each beside the 5 training images nearest to it: does it memorise?", metavar="FILE")
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
    grids = (".pgm", ".ppm", ".png")
    try:
        for path, allowed in ((args.out, (*grids, ".npy")), (args.movie, (".png",)), (args.trajectory, grids), (args.nearest, grids),
                              (args.forward, grids), (args.reconstruct, grids), (args.interpolate, grids)):
            if path:
                data.check_suffix(path, allowed)
    except ValueError as error:
        parser.error(str(error))
    for path in filter(None, (args.out, args.trajectory, args.movie, args.nearest, args.forward, args.reconstruct, args.interpolate)):
        data.check_writable(path)
    return args


class Recorder:
    """An on_step that keeps some frames of a chain of `steps` steps, as pixels: (x_t, predicted x_0), each (N, C, H, W)."""

    def __init__(self, steps, frames, images):
        self.wanted, self.images = set(np.linspace(0, steps, frames).round().astype(int).tolist()), images
        self.calls, self.frames = 0, []

    def __call__(self, t, x_t, x_0):
        if self.calls in self.wanted:
            x_0 = torch.zeros_like(x_t) if x_0 is None else x_0             # nothing is predicted yet at x_T: grey
            self.frames.append([data.to_pixels(x[:self.images]).cpu() for x in (x_t, x_0)])
        self.calls += 1


def rows(*columns):
    """Columns of a picture, each (N, C, H, W), as its images row by row, and how many columns there are."""
    return torch.stack(columns, dim=1).flatten(0, 1), len(columns)


def sampler(args, diffusion):
    """-> sample(model, shape, generator=..., on_step=...) as the flags say, and the number of its steps."""
    T = diffusion.timesteps
    steps = args.steps or (T if args.sampler == "ddpm" else min(50, T))
    if steps > T:
        raise ValueError(f"--steps {steps} is more than the {T} that {args.checkpoint} was trained with")
    if args.sampler == "ddim":
        return functools.partial(diffusion.ddim_sample, steps=steps, eta=args.eta or 0.0), steps

    def sample(model, shape, **options):
        short, strided = respace(diffusion, model, steps)
        return short.sample(strided, shape, **options)

    return sample, steps


def choose_labels(args, checkpoint):
    """The label of each image, (n,) int64, or None. ValueError for flags that the checkpoint has no answer to."""
    classes = checkpoint["classes"]
    if checkpoint["network"]["num_classes"] is None and not args.classifier:
        if args.label is not None or args.guidance is not None:
            raise ValueError(f"--label and --guidance need labels, and {args.checkpoint} was trained without: make one with "
                             "train.py --conditional, or name a --classifier")
        return None
    if args.label is not None:
        return torch.full((args.n,), find_label(args.label, classes))
    return torch.arange(args.n) % len(classes)


def bind(args, network, diffusion, checkpoint, y):
    """network(x_t, t, y) -> a model (x_t, t) for images of the labels y (B,) or None, guided as the flags say."""
    null = checkpoint["network"]["num_classes"]
    scale = 1.0 if args.guidance is None else args.guidance
    if args.classifier:
        classifier, _, other = load_checkpoint(args.classifier, y.device, "classifier")
        if other["diffusion"]["timesteps"] != diffusion.timesteps or other["shape"] != checkpoint["shape"]:
            raise ValueError(f"{args.classifier} was trained for other images or another T than {args.checkpoint}")

        def log_prob(x_t, t):
            return F.log_softmax(classifier(x_t, t), dim=1).gather(1, y[:, None])[:, 0]

        return classifier_guidance(diffusion, network, log_prob, scale)
    if null is None:
        return network
    if scale == 1:
        return lambda x_t, t: network(x_t, t, y)
    return classifier_free_guidance(network, y, scale, null)


def draw(args, network, diffusion, checkpoint, labels, device, on_step):
    """The samples as pixels, uint8 (n, C, H, W), in process 0, and None in the others; on_step sees the first batch.

    Batch k has random numbers of its own and is drawn whole by one process, so the images do not depend on their number.
    """
    rank, world, _ = ranks()
    sample, steps = sampler(args, diffusion)
    starts, own, began = range(0, args.n, args.batch_size), {}, time.monotonic()
    for k in range(rank, len(starts), world):
        size = min(args.batch_size, args.n - starts[k])
        y = None if labels is None else labels[starts[k]:starts[k] + size].to(device)
        model = bind(args, network, diffusion, checkpoint, y)
        seed = int(np.random.SeedSequence([args.seed, k]).generate_state(1, np.uint64)[0] >> 1)

        def report(t, x_t, x_0, first=k == 0, drawn=starts[k], size=size):
            if first:
                on_step(t, x_t, x_0)
            if rank == 0:
                data.say(f"{drawn} of {args.n} images drawn, {size} more at t = {t}")

        with torch.inference_mode():
            x_0 = sample(model, (size, *checkpoint["shape"]), on_step=report,
                         generator=torch.Generator(device).manual_seed(seed))
        if not torch.isfinite(x_0).all():
            raise ValueError(f"{args.checkpoint} draws numbers that are not finite")
        own[k] = data.to_pixels(x_0).cpu()
    parts = [own]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(own, parts)
    if rank > 0:
        return None
    seconds = time.monotonic() - began
    data.say(f"{args.n} images, {steps} steps each, in {seconds:.1f} s: {args.n / seconds:.1f} images/s, "
             f"{args.n * steps / seconds:,.0f} network evaluations/s", done=True)
    batches = {k: pixels for part in parts for k, pixels in part.items()}
    return torch.cat([batches[k] for k in range(len(starts))])


# ---------------------------------------------------------------------------------------------------------- other pictures


def held_out(args, checkpoint, n):
    """The first n test images of the checkpoint's data set, in [-1, 1], and their labels."""
    images, labels = data.load_dataset(checkpoint["training"]["dataset"], "test", args.data_dir)
    if tuple(images.shape[1:]) != checkpoint["shape"]:
        raise ValueError(f"{args.checkpoint} was trained on images {checkpoint['shape']}, but "
                         f"{checkpoint['training']['dataset']} now holds {tuple(images.shape[1:])}")
    return data.to_model(images[:n]), labels[:n]


def draw_forward(args, diffusion, checkpoint, device):
    """--forward: for each of 4 images a row q(x_t | x_0) and a row that steps along the chain; t = 0, T/5, ... T."""
    x_0 = held_out(args, checkpoint, 4)[0].to(device)
    times = np.linspace(0, diffusion.timesteps, 6).round().astype(int).tolist()
    closed = [x_0] + [diffusion.q_sample(x_0, t) for t in times[1:]]
    x, stepped = x_0, [x_0]
    for t in range(1, diffusion.timesteps + 1):
        x = diffusion.q_step(x, t)
        if t in times:
            stepped.append(x)
    pairs = [torch.stack(column, dim=1).flatten(0, 1) for column in zip(closed, stepped)]
    data.save_image(args.forward, *rows(*pairs))


def draw_reconstruction(args, network, diffusion, checkpoint, device):
    """--reconstruct: columns of test images, their x_T, and the images that DDIM (eta = 0) draws from it."""
    x_0, y = (z.to(device) for z in held_out(args, checkpoint, 10))
    model = network if checkpoint["network"]["num_classes"] is None else (lambda x_t, t: network(x_t, t, y))
    steps = args.steps or min(100, diffusion.timesteps)
    x_T = diffusion.ddim_invert(model, x_0, steps)
    again = diffusion.ddim_sample(model, x_0.shape, steps, x_T=x_T, clip=False)
    data.save_image(args.reconstruct, *rows(x_0, x_T, again))
    error = 127.5 * (again - x_0).square().mean().sqrt()
    print(f"reconstruction error, root mean square: {error:.2f} of 255, in {steps} steps")


def draw_interpolation(args, network, diffusion, checkpoint, device):
    """--interpolate: rows of 11 images from one test image to another: slerp of their x_T, then Figure 8 at three t."""
    x_0 = held_out(args, checkpoint, 2)[0].to(device)
    T, weights = diffusion.timesteps, torch.linspace(0, 1, 9)
    steps = args.steps or min(100, T)
    a, b = diffusion.ddim_invert(network, x_0, steps)
    strips = [diffusion.ddim_sample(network, (9, *x_0.shape[1:]), steps, x_T=slerp(a, b, weights))]
    for t in (T // 4, T // 2, 3 * T // 4):
        strips.append(diffusion.interpolate(network, *x_0, weights, max(t, 1)))
    strips = [torch.cat([x_0[:1], strip, x_0[1:]]) for strip in strips]
    data.save_image(args.interpolate, torch.cat(strips), columns=11)


# ----------------------------------------------------------------------------------------------------------------- quality


def draw_nearest(args, checkpoint, pixels):
    """--nearest: rows of a sample and the 5 training images at the smallest root mean square distance from it."""
    images, _ = data.load_dataset(checkpoint["training"]["dataset"], "train", args.data_dir)
    chosen = pixels[:10]
    distances = torch.cdist(chosen.flatten(1).float(), images.flatten(1).float()) / math.sqrt(images[0].numel())
    near, index = distances.topk(5, largest=False)
    data.save_image(args.nearest, *rows(chosen, *(images[k] for k in index.T)))
    print(f"wrote {args.nearest}; the nearest training images are {near[:, 0].mean():.1f} of 255 away on average")


def frechet_distance(f, g):
    """Between Gaussians fitted to features f (N, F) and g (M, F): |m - n|^2 + tr(C + D - 2 (C D)^(1/2)), in float64."""
    (m, C), (n, D) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (f, g))
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T              # C^(1/2)
    cross = torch.linalg.eigvalsh(root @ D @ root).clamp(min=0).sqrt().sum()         # tr((C D)^(1/2))
    return float((m - n).square().sum() + torch.trace(C) + torch.trace(D) - 2 * cross)


@torch.inference_mode()
def score(args, checkpoint, pixels, labels, device):
    """Print how far the samples are from the test set, what as many training images get, and the classifier's verdict."""
    classifier, _, other = load_checkpoint(args.score, device, "classifier")
    if other["shape"] != checkpoint["shape"]:
        raise ValueError(f"{args.score} judges images {other['shape']}, not {checkpoint['shape']}")
    if len(pixels) < 2:
        raise ValueError("--score needs at least 2 images, and means little below 1000")

    def seen(images):
        parts = [data.to_model(part.to(device)) for part in images.split(500)]
        features = torch.cat([classifier.features(x, torch.zeros(len(x), dtype=torch.int64, device=device)) for x in parts])
        return features.cpu(), classifier.head(features).argmax(1).cpu()

    name = checkpoint["training"]["dataset"]
    train, test = (data.load_dataset(name, split, args.data_dir)[0] for split in ("train", "test"))
    real = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:len(pixels)]]
    (f, guess), (g, _), (r, _) = seen(pixels), seen(test), seen(real)
    counts = torch.bincount(guess, minlength=len(checkpoint["classes"])).tolist()
    print(f"Frechet distance {frechet_distance(f, g):.3f} in {args.score}'s features ({len(pixels)} training images: "
          f"{frechet_distance(r, g):.3f}); classes drawn: {counts}"
          + ("" if labels is None else f"; accuracy on the labels asked for: {(guess == labels).float().mean():.1%}"))


def main(argv=None):
    """Load, draw, write."""
    args = parse_args(argv)
    rank, world, local = ranks()
    device = pick_device(args.device or (f"cuda:{local}" if world > 1 and torch.cuda.is_available() else None))
    network, diffusion, checkpoint = load_checkpoint(args.checkpoint, device)
    colour = checkpoint["shape"][0] == 3
    if colour and args.out and args.out.endswith(".pgm"):
        raise ValueError(f"--out {args.out}: a .pgm is grey, and {args.checkpoint} draws in colour; use .ppm, .png or .npy")
    labels = choose_labels(args, checkpoint)
    _, steps = sampler(args, diffusion)
    if args.compile:
        network = torch.compile(network)
    if world > 1:
        dist.init_process_group("gloo")              # it carries finished pixels only
    torch.manual_seed(args.seed)
    dtype = pick_dtype(args.precision, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if rank == 0:
            draw_others(args, network, diffusion, checkpoint, device)
        if args.out or not (args.forward or args.reconstruct or args.interpolate):
            args.out = args.out or ("samples.ppm" if colour else "samples.pgm")
            strip = Recorder(steps, 11 if args.trajectory else 0, 8)
            movie = Recorder(steps, 41 if args.movie else 0, 64)

            def on_step(t, x_t, x_0):
                strip(t, x_t, x_0)
                movie(t, x_t, x_0)

            pixels = draw(args, network, diffusion, checkpoint, labels, device, on_step)
            if rank == 0:
                write(args, checkpoint, pixels, labels, strip.frames, movie.frames)
                if args.nearest:
                    draw_nearest(args, checkpoint, pixels)
                if args.score:
                    score(args, checkpoint, pixels, labels, device)
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


def write(args, checkpoint, pixels, labels, strip, movie):
    """The files that the samples go to."""
    columns = args.columns or (len(checkpoint["classes"]) if labels is not None and args.label is None else None)
    if args.out.endswith(".npy"):
        with data.atomic(args.out) as file:
            np.save(file, pixels.numpy())
        if labels is not None:
            with data.atomic(f"{args.out[:-4]}.labels.npy") as file:
                np.save(file, labels.numpy())
    else:
        data.save_image(args.out, pixels, columns)
    print(f"wrote {args.out}" + ("; --out samples.png for a PNG" if args.out.endswith(".pgm") else ""))
    if strip:
        x_t, x_0 = (torch.stack(frames, dim=1) for frames in zip(*strip))                  # each (8, frames, C, H, W)
        data.save_image(args.trajectory, torch.stack([x_t, x_0], dim=1).flatten(0, 2), columns=len(strip))
        print(f"wrote {args.trajectory}")
    if movie:
        data.save_movie(args.movie, [x_t for x_t, _ in movie], args.columns and min(args.columns, 8))
        print(f"wrote {args.movie}")


if __name__ == "__main__":
    guarded(main)
