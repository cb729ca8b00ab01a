"""Algorithm 2 from a checkpoint; pictures; how good it is.

    python sample.py                                64 images by all T steps
    python sample.py --sampler ddim --steps 20      in a second
    python sample.py --checkpoint assets/fashion-mnist.pt --label Sandal --guidance 3
    python sample.py --n 2000 --out s.npy --score   for other tools; how good they are
    torchrun --nproc-per-node=8 -- sample.py --n 10000 --out s.npy
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import train
from ddpm import classifier_free_guidance, classifier_guidance, respace, standard_normal
from train import RANK, WORLD

BLOCK = 64                  # images that share a stream of random numbers
FEW = 100                   # images of which --evaluate takes all T terms


def parse_args(argv=None):
    """The settings, checked."""
    parser, count = data.Parser(__doc__), data.positive_integer
    flag = parser.section("what to draw")
    flag("--checkpoint", "ddpm.pt", "of train.py")
    flag("--n", None, "number of images (default: 64; --evaluate: all)", type=count)
    flag("--label", None, "class, by name or index (default: all in turn)")
    flag("--guidance", None, "0: no label, above 1: more of it (default: 1)", type=float)
    flag("--classifier", None, "guide by it instead")
    flag("--seed", 0, "image i depends on it and on i alone", type=int)
    flag = parser.section("how")
    flag("--sampler", "ddpm", "ddpm: Algorithm 2", choices=("ddpm", "ddim"))
    flag("--steps", None, "calls of the network (default: T; ddim: 50)", type=count)
    flag("--eta", None, "noise of ddim; 1: ddpm's (default: 0)", type=float)
    flag("--clip", True, "hold x_0 in [-1, 1]; Algorithm 2 as printed: --no-clip (default: on)",
         action=argparse.BooleanOptionalAction)
    flag("--batch-size", 256, "images at a time")
    flag("--precision", "auto", "see train.py", choices=("auto", "fp32", "bf16", "fp16"))
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best)")
    flag("--threads", None, "of the CPU (default: one or all, what is faster)", type=count)
    flag = parser.section("output")
    flag("--out", None, "picture or .npy (default: samples.pgm or .ppm, and .png)")
    flag("--columns", None, "of the grid (default: as rows, or one per class)", type=count)
    flag("--trajectory", None, "8 images and predicted x_0 on the way (Figure 6)")
    flag("--movie", None, "the way as an animated .png")
    flag = parser.section("how good it is")
    flag("--score", None, "Frechet distance by a classifier (default: that of assets/)", nargs="?",
         const=str(Path(__file__).parent / "assets/classifier.pt"))
    flag("--nearest", None, "10 samples and the 5 nearest training images")
    flag("--evaluate", False, f"L_simple and bits/dim of test images; all T terms of < {FEW}")
    flag("--dataset", None, "where the training's data are now")
    flag("--data-dir", "data", "see train.py")
    flag = parser.section("other pictures, without samples")
    flag("--forward", None, "images turning into noise, by Eq. 4 and, below, Eq. 2")
    flag("--reconstruct", None, "test images, their x_T by DDIM, and back")
    flag("--interpolate", None, "two test images mixed at x_T, T/4, T/2, 3T/4 (Figure 8)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63 or not math.isfinite(args.guidance or 0):
        raise ValueError("--seed is at least 0, --guidance a finite number")
    if args.eta is not None and (args.sampler != "ddim" or not 0 <= args.eta <= 1):
        raise ValueError("--eta is 0..1, for --sampler ddim")
    args.samples = not (args.evaluate or args.forward or args.reconstruct or args.interpolate)
    for k in ("label", "guidance", "classifier", "out", "trajectory", "movie", "score", "nearest"):
        if not args.samples and getattr(args, k) is not None:
            raise ValueError(f"--{k} is about samples, and this command draws none")
    return args


# Samples ----------------------------------


def draw(args, network, classifier, diffusion, shape, labels, device):
    """-> pixels (n, C, H, W), complete in process 0, and [x_t, predicted x_0] of the first 64 on
    their way."""
    began, frames, pixels = time.perf_counter(), [], torch.zeros(args.n, *shape, dtype=torch.uint8)
    for start in range(RANK * args.batch_size, args.n, WORLD * args.batch_size):
        size = min(args.batch_size, args.n - start)
        y = None if labels is None else labels[start:start + size].to(device)
        model = guided_model(args, network, classifier, diffusion, y)
        noise = noise_of_images(args.seed, start, size, device)
        x_T = noise((size, *shape))
        if device.type == "cuda" and not classifier:
            model = recorded(model, x_T)
        for k, (t, x_t, x_0) in enumerate(chain(args, diffusion, model, x_T, noise)):
            if start == 0 and k in np.linspace(0, args.steps, 41).round():
                frames.append([data.to_pixels(x[:64]).cpu() for x in (x_t, x_0)])
            if RANK == 0:
                data.progress(f"{start} of {args.n} images drawn, {size} more at t = {t}")
        if not torch.isfinite(x_t).all():
            raise ValueError(f"{args.checkpoint} draws no finite numbers; try --precision fp32")
        pixels[start:start + size] = data.to_pixels(x_t)
    if WORLD > 1:
        dist.reduce(pixels, 0)              # a sum: an image is 0 in all processes but one
    if RANK == 0:
        seconds = time.perf_counter() - began
        data.progress(f"{args.n} images in {seconds:.1f} s: "
                      f"{args.n * args.steps / seconds:,.0f} network evaluations/s", final=True)
    return pixels, frames


def chain(args, diffusion, model, x_T, noise):
    """Yields (t, x_t, predicted x_0) from x_T down to x_0."""
    yield "T", x_T, torch.zeros_like(x_T)
    shape, clip = x_T.shape, args.clip
    if args.sampler == "ddim":
        yield from diffusion.ddim_steps(model, shape, args.steps, args.eta or 0, x_T, clip, noise)
    else:
        if args.steps < diffusion.timesteps:
            diffusion, model = respace(diffusion, model, args.steps)
        yield from diffusion.sample_steps(model, shape, x_T, clip, noise)


def noise_of_images(seed, start, size, device):
    """-> noise(shape) for images start, .. Drawn in whole blocks, so that image i does not depend
    on --n, on --batch-size or on the number of processes."""
    streams = [torch.Generator(device).manual_seed(train.random_stream(seed, block))
               for block in range(start // BLOCK, math.ceil((start + size) / BLOCK))]

    def noise(shape):
        blocks = [standard_normal((BLOCK, *shape[1:]), device, stream) for stream in streams]
        return torch.cat(blocks)[start % BLOCK:][:size]

    return noise


def guided_model(args, network, classifier, diffusion, y):
    """A model (x_t, t) for images of labels y (B,) or None, guided as the flags say."""
    scale = 1.0 if args.guidance is None else args.guidance
    if classifier:
        log_prob = lambda x_t, t: -F.cross_entropy(classifier(x_t, t), y, reduction="none")
        return classifier_guidance(diffusion, network, log_prob, scale)
    if y is None or scale in (0, 1):
        return lambda x_t, t: network(x_t, t, y if scale else None)
    return classifier_free_guidance(network, y, scale, network.num_classes)


def recorded(model, x_T):
    """The model as a CUDA graph: its small kernels take longer to launch than to run."""
    x, t = x_T.clone(), torch.ones(len(x_T), dtype=torch.int64, device=x_T.device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        model(x, t)                                             # sets up what need not be recorded
        with torch.cuda.graph(graph, stream=stream):
            output = model(x, t)

    def replay(x_t, t_now):
        x.copy_(x_t)
        t.copy_(t_now)
        graph.replay()
        return output

    return replay


def choose_labels(args, network, checkpoint):
    """The label of each image, (n,), or None. ValueError for what cannot be."""
    classes, n = checkpoint["classes"], args.n
    if not args.classifier and network.num_classes is None:
        if args.label is None and args.guidance is None:
            return None
        raise ValueError(f"--label and --guidance need labels, and {args.checkpoint} knows none: "
                         "see train.py --conditional")
    hidden = args.classifier or checkpoint["settings"]["label_dropout"] > 0
    if args.guidance not in (None, 1) and not hidden:
        raise ValueError(f"no --guidance: {args.checkpoint} was trained with --label-dropout 0")
    if args.label is not None:
        return torch.full((n,), data.find_label(args.label, classes))
    args.columns = args.columns or len(classes)
    return torch.arange(n) % len(classes)


def write(args, pixels, labels, frames):
    """The files that samples and their frames go to."""
    for path in args.out:
        if not path.lower().endswith(".npy"):
            data.save_image(path, pixels, args.columns, zoom=args.zoom)
            continue
        beside = Path(path).with_suffix(".labels.npy")
        beside.unlink(missing_ok=True)                          # an older file's
        for name, array in ((path, pixels), (beside, labels)):
            if array is not None:
                with data.atomic(name) as file:
                    np.save(file, array.numpy())
    print("wrote", *args.out)
    if args.trajectory:
        shown = np.linspace(0, len(frames) - 1, min(11, len(frames))).astype(int)
        save_columns(args, args.trajectory, [torch.stack(frames[k], 1)[:8] for k in shown])
    if args.movie:
        data.save_movie(args.movie, [x for x, _ in frames], args.columns, zoom=args.zoom)
        print("wrote", args.movie)


def save_columns(args, path, columns):
    """A picture of columns (rows, C, H, W), or (rows, 2, C, H, W): two below each other."""
    data.save_image(path, torch.stack(columns, -4).flatten(0, -4), len(columns), zoom=args.zoom)
    print("wrote", path)


# Other pictures ---------------------------


def load_data(args, checkpoint, split):
    """Images and labels (of --label) of the checkpoint's data. ValueError if they have changed."""
    source, name = checkpoint["source"], args.dataset or checkpoint["source"]["dataset"]
    images, labels, classes = data.load_with_classes(name, split, args.data_dir,
                                                     checkpoint["settings"]["only"])
    same = (images.shape[1:], classes) == (checkpoint["shape"], checkpoint["classes"])
    if split == "train" and data.fingerprint(images, labels) != source["fingerprint"] or not same:
        raise ValueError(f"{args.checkpoint} was trained on other data than {name}: see --dataset")
    if args.label is not None:
        chosen = labels == data.find_label(args.label, classes)
        images, labels = images[chosen], labels[chosen]
    if len(images) < 2:
        raise ValueError(f"{name} ({split}) has fewer than two such images to compare with")
    return images, labels


def other_pictures(args, network, diffusion, checkpoint, device):
    """--forward, --reconstruct and --interpolate, of the first test images."""
    images, labels = load_data(args, checkpoint, "test")
    x_0, T = data.to_model(images[:10]).to(device), diffusion.timesteps
    steps, x_t, ends = args.steps or min(100, T), x_0[:4], x_0[:2]
    if args.forward:
        columns = [torch.stack([x_t, x_t], 1)]
        for t in range(1, T + 1):
            x_t = diffusion.q_step(x_t, t)
            if t in (round(k * T / 5) for k in range(1, 6)):
                columns.append(torch.stack([diffusion.q_sample(x_0[:4], t), x_t], 1))
        save_columns(args, args.forward, columns)
    if args.reconstruct:
        y = labels[:10].to(device) if network.num_classes else None
        model = guided_model(args, network, None, diffusion, y)
        x_T = diffusion.ddim_invert(model, x_0, steps)
        again = diffusion.ddim_sample(model, x_0.shape, steps, 0, x_T, args.clip)
        error = 127.5 * (again - x_0).square().mean().sqrt()
        print(f"root mean square error of {steps} steps: {error:.2f} of 255")
        save_columns(args, args.reconstruct, [x_0, x_T, again])
    if args.interpolate:
        if network.num_classes and checkpoint["settings"]["label_dropout"] == 0:
            raise ValueError("--interpolate has no labels, and this network knows no other images")
        weights = torch.linspace(0, 1, 9)
        x_T = slerp(*diffusion.ddim_invert(network, ends, steps), weights)
        rows = [diffusion.ddim_sample(network, x_T.shape, steps, 0, x_T, args.clip)]
        for t in (T // 4, T // 2, 3 * T // 4):
            rows.append(diffusion.interpolate(network, *ends, weights, max(t, 1), args.clip))
        rows = [torch.cat([ends[:1], row, ends[1:]]) for row in rows]
        save_columns(args, args.interpolate, torch.stack(rows, 1).unbind())


def slerp(a, b, weights):
    """From noise a to noise b (C, H, W) along an arc -> (len(weights), C, H, W) (DDIM, D.5)."""
    weights = torch.as_tensor(weights).to(a).view(-1, 1, 1, 1)
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-3)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / angle.sin()


# How good it is ---------------------------


def draw_nearest(args, pixels, known, test):
    """--nearest, and whether samples are nearer to training images than unseen test images are."""
    def nearest(images):
        x = images[:500].flatten(1).float()
        distances = [torch.cdist(x, part.flatten(1).float()) for part in known.split(5000)]
        distances, index = torch.cat(distances, 1).topk(min(5, len(known)), largest=False)
        return index, distances[:, 0].mean() / math.sqrt(x.shape[1])

    (index, samples), (_, unseen) = nearest(pixels), nearest(test)
    save_columns(args, args.nearest, [pixels[:10], *(known[k] for k in index[:10].T)])
    print("Root mean square distance to the nearest training image: samples "
          f"{samples:.1f} of 255, test images {unseen:.1f}")


def frechet_distance(f, g):
    """|m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of Gaussians fitted to features f (N, F) and g (M, F).
    For C = A^T A, D = B^T B, tr (C D)^(1/2) is the sum of the singular values of A B^T."""
    f, g = f.cpu().double(), g.cpu().double()
    A, B = (torch.linalg.qr(x - x.mean(0)).R / math.sqrt(max(len(x) - 1, 1)) for x in (f, g))
    squares = (f.mean(0) - g.mean(0)).square().sum() + A.square().sum() + B.square().sum()
    return float(squares - 2 * torch.linalg.svdvals(A @ B.T).sum())


def score(classifier, pixels, labels, known, test, device):
    """--score: how far the samples are from test images, and as many training images."""
    def features(images):
        parts = [data.to_model(part.to(device)) for part in images.split(500)]
        return torch.cat([classifier.features(x, x.new_zeros(len(x))) for x in parts])

    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    f, g, real = map(features, (pixels, test, known[order[:len(pixels)]]))
    guess = classifier.head(f).argmax(1).cpu()
    drawn = torch.bincount(guess, minlength=classifier.head.out_features).tolist()
    right = "" if labels is None else f"; right class: {(guess == labels).float().mean():.1%}"
    print(f"Frechet distance {frechet_distance(f, g):.3f} ({len(real)} training images: "
          f"{frechet_distance(real, g):.3f}); classes drawn: {drawn}{right}")


def evaluate(args, network, diffusion, checkpoint, device):
    """--evaluate: L_simple and the bound (Section 4.3) on test images, with 95% confidence."""
    images, labels = (part[:args.n] for part in load_data(args, checkpoint, "test"))
    N, T, parts = len(images), diffusion.timesteps, []
    for x_0, y in zip(images.split(500), labels.split(500)):
        x_0, y = data.to_model(x_0.to(device)), y.to(device) if network.num_classes else None
        sums = torch.zeros(4, len(x_0), device=device)
        sums[1] = diffusion.prior_bits(x_0)
        for t, weight in chosen_times(T, len(x_0), N < FEW, device):
            data.progress(f"{500 * len(parts)} of {N} images, {len(x_0)} more at t = {t[0]}")
            noise = torch.randn_like(x_0)
            x_t = diffusion.q_sample(x_0, t, noise)
            output = network(x_t, t, y)
            eps, x_0_hat = diffusion.predict(output, x_t, t, clip=False)
            bits, last = diffusion.vlb_terms(output, x_0, x_t, t), t == 1
            l_simple = (eps - noise).square().flatten(1).mean(1) / T
            error = (x_0_hat.clamp(-1, 1) - x_0).square().flatten(1).mean(1)
            sums += weight * torch.stack([l_simple, bits * ~last, bits * last, error * last])
        parts.append(sums.cpu().double())
    l_simple, rate, distortion, error = torch.cat(parts, dim=1)
    data.progress(f"{N:,} test images, {args.checkpoint} at step {checkpoint['step']}", final=True)
    for name, x in (("L_simple", l_simple), ("bits/dim <=", rate + distortion),
                    ("  rate", rate), ("  distortion", distortion)):
        confidence = f" +- {1.96 * x.std() / math.sqrt(N):.4f}" if N > 1 else ""
        print(f"{name:14}{x.mean():.4f}{confidence}")
    print(f"  RMSE of it  {127.5 * error.mean().sqrt():.2f} of 255")


def chosen_times(T, B, every, device):
    """Yields t (B,), weight (B,) whose weighted sums estimate sums over 1..T: 1, and of 2..T all,
    or four at random, about as likely as they are large (L_{t-1} falls like 1/t)."""
    ones, later = torch.ones(B, device=device), torch.arange(2, T + 1, device=device)
    yield ones.long(), ones
    if every or T == 1:                             # of few images, random terms say too little
        yield from ((t.expand(B), ones) for t in later)
        return
    chance = 1 / later + 5 / T
    for k in torch.multinomial(chance, 4 * B, replacement=True).view(4, B):
        yield later[k], chance.sum() / (4 * chance[k])


def load_classifier(path, device, checkpoint):
    """A classifier for the checkpoint's data, and its diffusion."""
    classifier, diffusion, other = train.load_checkpoint(path, device, classifier=True)
    a, b = checkpoint["source"], other["source"]
    key = "dataset" if a["dataset"] in data.DATASETS else "fingerprint"
    if a[key] != b[key] or other["classes"] != checkpoint["classes"]:
        raise ValueError(f"{path} was trained on other data or classes")
    return classifier, diffusion


def check_files(args, checkpoint):
    """Fill in --out. ValueError, before any work, for a file that cannot be written."""
    kinds = (".png", ".ppm") if checkpoint["shape"][0] == 3 else (".png", ".ppm", ".pgm")
    args.out = [args.out] if args.out else ["samples" + kinds[-1], "samples.png"] * args.samples
    pictures = [args.trajectory, args.nearest, args.forward, args.reconstruct, args.interpolate]
    for paths, allowed in (([args.movie], kinds[:1]), (pictures, kinds),
                           (args.out, (*kinds, ".npy"))):
        for path in filter(None, paths):
            data.check_suffix(path, allowed)
    if RANK == 0:
        source = checkpoint["source"]["dataset"]
        data.check_outputs([args.movie, *pictures, *args.out], [
            args.checkpoint, args.classifier, args.score, args.dataset, source])


@torch.no_grad()
def main(argv=None):
    """Load, draw, write."""
    args = parse_args(argv)
    device = train.pick_device(args.device)
    network, diffusion, checkpoint = train.load_checkpoint(args.checkpoint, device)
    shape, T, classifier = checkpoint["shape"], diffusion.timesteps, None
    if args.steps and args.steps > T:
        raise ValueError(f"--steps {args.steps} is more than the {T} that {args.checkpoint} has")
    args.zoom = max(1, round(64 / max(shape[1:])))      # 28 pixels are hard to see
    check_files(args, checkpoint)
    torch.manual_seed(args.seed)
    if not args.samples:
        if args.evaluate and RANK == 0:
            evaluate(args, network, diffusion, checkpoint, device)
        if (args.forward or args.reconstruct or args.interpolate) and RANK == 0:
            other_pictures(args, network, diffusion, checkpoint, device)
        return
    args.n, args.steps = args.n or 64, args.steps or (T if args.sampler == "ddpm" else min(50, T))
    labels = choose_labels(args, network, checkpoint)
    if args.classifier:
        classifier, its_diffusion = load_classifier(args.classifier, device, checkpoint)
        if not torch.equal(its_diffusion.exact_alpha_bar, diffusion.exact_alpha_bar):
            raise ValueError(f"{args.classifier} has another schedule: its t means other noise")
    if args.score:                                  # it sees clean images: any schedule will do
        judge, _ = load_classifier(args.score, device, checkpoint)
    if args.score or args.nearest:
        known, test = (load_data(args, checkpoint, split)[0] for split in ("train", "test"))
    if WORLD > 1:
        dist.init_process_group("gloo")
    dtype = train.pick_dtype(args.precision, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        train.set_threads(args.threads, device, lambda: network(
            torch.zeros(min(args.n, BLOCK), *shape), torch.ones(min(args.n, BLOCK)).long()))
        pixels, frames = draw(args, network, classifier, diffusion, shape, labels, device)
    if RANK == 0:
        write(args, pixels, labels, frames)
        if args.nearest:
            draw_nearest(args, pixels, known, test)
        if args.score:
            score(judge, pixels, labels, known, test, device)


if __name__ == "__main__":
    data.run_script(main)
