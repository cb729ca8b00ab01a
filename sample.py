"""Algorithm 2 from a checkpoint: images, and how good they are.

    python sample.py
    python sample.py --checkpoint assets/fashion-mnist.pt --label Sandal --guidance 3
"""
import math
import time
from pathlib import Path

import numpy as np
import torch

import data
import train
from data import RANK, WORLD, progress
from ddpm import classifier_free_guidance, classifier_guidance, important_times, respace

BLOCK = 64  # images that share a stream of random numbers


def parse_args(argv=None):
    """The settings, checked."""
    parser, count = data.Parser(__doc__), data.positive_integer
    flag = parser.section("samples")
    flag("--checkpoint", "ddpm.pt", "what train.py wrote")
    flag("--dataset", None, "training data, if they moved")
    flag("--data-dir", "data", "see train.py")
    flag("--n", None, "images (default: 64; --evaluate: all)", type=count)
    flag("--label", None, "a class, by name or index (default: all in turn)")
    flag("--guidance", 1.0, "0 ignores the label, above 1 exaggerates it")
    flag("--classifier", None, "guide by this classifier")
    flag("--seed", 0, "same seed, same images, for any --n", type=int)
    flag("--sampler", "ddpm", "Algorithm 2, or DDIM's fewer steps", choices=("ddpm", "ddim"))
    flag("--steps", None, "network calls (default: T; ddim: 50)", type=count)
    flag("--eta", 0.0, "ddim's noise: 0 none, 1 beta_tilde")
    flag("--no-clip", False, "let x_0 leave [-1, 1], as Algorithm 2 does")
    flag("--batch-size", 256, "images at a time")
    flag("--precision", "auto", "of samples, see train.py", choices=("auto", *train.DTYPES))
    flag("--device", None, "see train.py")
    flag("--threads", None, "see train.py", type=count)
    flag = parser.section("output")
    flag("--out", None, "picture or .npy (default: samples.pgm or .ppm, and .png)")
    flag("--columns", None, "of the grid (default: one per class, or square)", type=count)
    flag("--zoom", None, "enlarge N times (default: to about 64 x 64)", type=count)
    flag("--trajectory", None, "picture of 8 chains and predicted x_0 (Figure 6)")
    flag("--movie", None, "animated .png of the chains")
    flag("--score", None, "Frechet distance, by a classifier (default: in assets/)",
         nargs="?", const=f"{data.EXCERPT}/classifier.pt")
    flag("--nearest", None, "10 samples, each with its 5 nearest training images")
    flag = parser.section("with test images, instead of samples")
    flag("--evaluate", False, "L_simple and bits/dim")
    flag("--forward", None, "picture of them becoming noise, by Eq. 4 and Eq. 2")
    flag("--reconstruct", None, "picture of them, to x_T and back by DDIM (100 steps)")
    flag("--interpolate", None, "picture of two, mixed at four t (Figures 8, 9)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63 or not math.isfinite(args.guidance):
        raise ValueError("--seed is 0 or more, --guidance finite")
    if args.eta and args.sampler != "ddim":
        raise ValueError("--eta is for --sampler ddim")
    args.samples = not (args.evaluate or args.forward or args.reconstruct or args.interpolate)
    for k in ("label", "guidance", "classifier", "out", "trajectory", "movie", "score", "nearest"):
        if not args.samples and vars(args)[k] != parser.get_default(k):
            raise ValueError(f"--{k} is about samples: none are drawn")
    return args


def draw(args, network, classifier, diffusion, shape, labels):
    """-> pixels (n, C, H, W) in process 0; <= 41 frames (<= 64, 2, C, H, W): x_t, predicted x_0."""
    pixels, frames = torch.zeros(args.n, *shape, dtype=torch.uint8), {}
    began = time.perf_counter()
    for start in range(RANK * args.batch_size, args.n, WORLD * args.batch_size):
        size = min(args.batch_size, args.n - start)
        y = None if labels is None else labels[start:start + size].to(args.device)
        model = guided_model(args, network, classifier, diffusion, y)
        noise = noise_of_images(args, start, size)
        x_T = noise((size, *shape))
        if args.device.type == "cuda" and not classifier:
            model = recorded(model, x_T)
        for k, (_, x_t, x_0) in enumerate(chain(args, diffusion, model, x_T, noise)):
            if start < (64 if WORLD == 1 else 1) and k in np.linspace(0, args.steps, 41).round():
                shown = data.to_pixels(torch.stack([x_t, x_0], 1)[:64 - start]).cpu()
                frames.setdefault(k, []).append(shown)
            if done := (start + size * k / args.steps) / args.n:
                left = (time.perf_counter() - began) * (1 / done - 1)
                progress(f"{done:.0%} of {args.n} images drawn, {left:.0f} s left", passing=True)
        if not torch.isfinite(x_t).all():
            raise ValueError(f"{args.checkpoint} draws NaN or infinity; try --precision fp32")
        pixels[start:start + size] = data.to_pixels(x_t)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
        torch.distributed.reduce(pixels, 0)  # a sum: an image is 0 in all processes but one
    progress(f"{args.n} images drawn in {time.perf_counter() - began:.1f} s")
    return pixels, [torch.cat(parts) for parts in frames.values()]


def chain(args, diffusion, model, x_T, noise):
    """Yields (t, x_t, predicted x_0) from x_T down to x_0."""
    yield "T", x_T, torch.zeros_like(x_T)
    shape, clip = x_T.shape, not args.no_clip
    if args.sampler == "ddim":
        yield from diffusion.ddim_steps(model, shape, args.steps, args.eta, x_T, clip, noise)
    else:
        if args.steps != diffusion.timesteps:
            diffusion, model = respace(diffusion, model, args.steps)
        yield from diffusion.sample_steps(model, shape, x_T, clip, noise)


def noise_of_images(args, start, size):
    """-> noise(shape) for images start, .., the same whatever --n and --batch-size are."""
    generators = [torch.Generator(args.device).manual_seed(train.random_stream(args.seed, block))
                  for block in range(start // BLOCK, math.ceil((start + size) / BLOCK))]

    def noise(shape):
        blocks = [torch.randn(BLOCK, *shape[1:], generator=g, device=g.device) for g in generators]
        return torch.cat(blocks)[start % BLOCK:][:size]

    return noise


def guided_model(args, network, classifier, diffusion, y):
    """A model (x_t, t) for labels y (B,) or None, guided as the flags say."""
    if classifier:
        log_prob = lambda x_t, t: classifier(x_t, t).log_softmax(1).gather(1, y[:, None])[:, 0]
        return classifier_guidance(diffusion, network, log_prob, args.guidance)
    if y is None or args.guidance in (0, 1):
        return lambda x_t, t: network(x_t, t, y if args.guidance else None)
    return classifier_free_guidance(network, y, args.guidance, network.num_classes)


def recorded(model, x_T):
    """The model as a CUDA graph, as in train.py."""
    x, t = x_T.clone(), x_T.new_ones(len(x_T)).long()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        model(x, t)  # one-time setup
        with torch.cuda.graph(graph, stream=stream):
            output = model(x, t)

    def replay(x_t, t_now):
        x.copy_(x_t)
        t.copy_(t_now)
        graph.replay()
        return output

    return replay


def choose_labels(args, network, checkpoint):
    """The label of each image, (n,), or None."""
    classes = checkpoint["classes"]
    if not args.classifier and not network.num_classes:
        if args.label is None and args.guidance == 1:
            return None
        raise ValueError(f"{args.checkpoint} knows no labels: see train.py --conditional")
    if args.label is not None:
        return torch.full((args.n,), data.find_label(args.label, classes))
    args.columns = args.columns or len(classes)
    return torch.arange(args.n) % len(classes)


def write(args, pixels, labels, frames):
    """Write the samples and their frames to files."""
    for path in args.out:
        if not path.lower().endswith(".npy"):
            data.save_image(path, pixels, args.columns, zoom=args.zoom)
            continue
        beside = data.companions(path)[0]
        for name, array in ((path, pixels), (beside, labels)):
            if array is None:  # older labels
                beside.unlink(missing_ok=True)
            else:
                with data.atomic(name) as file:
                    np.save(file, array.numpy())
    progress(f"wrote {' '.join(args.out)}")
    if args.trajectory:
        shown = np.linspace(0, len(frames) - 1, min(11, len(frames))).astype(int)
        save_rows(args, args.trajectory, torch.stack([frames[k][:8] for k in shown], 2))
    if args.movie:
        data.save_movie(args.movie, [x[:, 0] for x in frames], args.columns, zoom=args.zoom)
        progress(f"wrote {args.movie}")


def save_rows(args, path, rows):
    """A picture of rows (.., columns, C, H, W)."""
    data.save_image(path, rows.flatten(0, -4), rows.shape[-4], zoom=args.zoom)
    progress(f"wrote {path}")


def load_data(args, checkpoint, split):
    """The checkpoint's data, only of --label if given: images, labels. ValueError if changed."""
    images, labels, classes = data.load_with_classes(
        args.dataset, split, args.data_dir, checkpoint["settings"]["only"])
    same = (images.shape[1:], classes) == (checkpoint["shape"], checkpoint["classes"])
    if split == "train":
        same = data.fingerprint(images, labels) == checkpoint["source"]["fingerprint"]
    if not same:
        raise ValueError(f"{args.checkpoint} was trained on other data: see --dataset, --data-dir")
    if args.label is not None:
        chosen = labels == data.find_label(args.label, classes)
        images, labels = images[chosen], labels[chosen]
    if len(images) < 2:
        raise ValueError(f"{args.dataset} ({split}) has fewer than two such images")
    return images, labels


def other_pictures(args, network, diffusion, checkpoint):
    """--evaluate, --forward, --reconstruct, --interpolate, of test images."""
    images, labels = load_data(args, checkpoint, "test")
    if args.evaluate:
        evaluate(args, network, diffusion, checkpoint, images[:args.n], labels[:args.n])
    x_0, T = data.to_model(images[:10]).to(args.device), diffusion.timesteps
    if args.forward:
        x_t = x_0[:4]
        columns = [torch.stack([x_t, x_t], 1)]
        for t in range(1, T + 1):
            x_t = diffusion.q_step(x_t, t)
            if t in np.linspace(0, T, 6).round():
                columns.append(torch.stack([diffusion.q_sample(x_0[:4], t), x_t], 1))
        save_rows(args, args.forward, torch.stack(columns, 2))
    if args.reconstruct:
        y, steps = labels[:10].to(args.device), args.steps or min(100, T)
        model = lambda x_t, t: network(x_t, t, y if network.num_classes else None)
        x_T = diffusion.ddim_invert(model, x_0, steps)
        again = diffusion.ddim_sample(model, x_0.shape, steps, 0, x_T, not args.no_clip)
        save_rows(args, args.reconstruct, torch.stack([x_0, x_T, again], 1))
    if args.interpolate:
        (a, b), weights, rows = x_0[:2], torch.linspace(0, 1, 9), []
        for t in (T // 4, T // 2, 3 * T // 4, T):
            mixed = diffusion.interpolate(network, a, b, weights, max(t, 1), not args.no_clip)
            rows.append(torch.stack([a, *mixed, b]))
        save_rows(args, args.interpolate, torch.stack(rows))


def draw_nearest(args, pixels, known, test):
    """--nearest: how near samples and test images are to training images."""
    N = min(len(pixels), 500)
    x = torch.cat([pixels[:N], test[:500]]).flatten(1).float()
    distances = [torch.cdist(x, part.flatten(1).float()) for part in known.split(5000)]
    distances, index = torch.cat(distances, 1).topk(min(5, len(known)), largest=False)
    save_rows(args, args.nearest, torch.cat([pixels[:10, None], known[index[:N][:10]]], 1))
    rms = distances[:, 0] / math.sqrt(x.shape[1])
    print(f"RMS to training images: samples {rms[:N].mean():.1f}, test images {rms[N:].mean():.1f}")


def frechet_distance(f, g):
    """|m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of N(m, C), N(n, D) fitted to f (N, F), g (M, F)."""
    f, g = f.cpu().double(), g.cpu().double()
    A, B = (torch.linalg.qr(x - x.mean(0)).R / math.sqrt(max(len(x) - 1, 1)) for x in (f, g))
    # C = A^T A, D = B^T B: tr (C D)^(1/2) is the sum of the singular values of A B^T.
    squares = (f.mean(0) - g.mean(0)).square().sum() + A.square().sum() + B.square().sum()
    return float(squares - 2 * torch.linalg.svdvals(A @ B.T).sum())


def score(args, classifier, pixels, labels, known, test):
    """--score: how far samples, and as many training images, are from test images."""
    def features(images):
        parts = [data.to_model(part.to(args.device)) for part in images.split(args.batch_size)]
        return torch.cat([classifier.features(x, x.new_zeros(len(x))) for x in parts])

    f, g, real = map(features, (pixels, test, known[torch.randperm(len(known))[:len(pixels)]]))
    print(f"Frechet distance {frechet_distance(f, g):.3f} ({len(real)} training images: "
          f"{frechet_distance(real, g):.3f})")
    if labels is not None:
        right = classifier.head(f).argmax(1).cpu() == labels
        print(f"of the right class: {right.float().mean():.1%}")


def evaluate(args, network, diffusion, checkpoint, images, labels):
    """--evaluate: L_simple and the bound (Section 4.3), with 95% confidence."""
    N, T, parts = len(images), diffusion.timesteps, []
    batches = (x.to(args.device).split(args.batch_size) for x in (images, labels))
    for x_0, y in zip(*batches):
        x_0, y = data.to_model(x_0), y if network.num_classes else None
        sums = torch.zeros(4, len(x_0), device=args.device)
        sums[1:3] = diffusion.prior_bits(x_0)
        for t, weight in chosen_times(T, len(x_0), N < 100, args.device):
            progress(f"{args.batch_size * len(parts)} of {N} images, now t = {t[0]}", passing=True)
            noise = torch.randn_like(x_0)
            x_t = diffusion.q_sample(x_0, t, noise)
            output = network(x_t, t, y)
            eps, _ = diffusion.predict(output, x_t, t, clip=False)
            l_simple = (eps - noise).square().flatten(1).mean(1) / T
            bits = diffusion.vlb_terms(output, x_0, x_t, t, not args.no_clip)
            sums += weight * torch.stack([l_simple, bits, bits * (t > 1), bits * (t == 1)])
        parts.append(sums.cpu().double())
    progress(f"{N:,} test images, {args.checkpoint} at step {checkpoint['step']}")
    for name, x in zip(("L_simple", "bits/dim <=", "  rate", "  distortion"), torch.cat(parts, 1)):
        confidence = f" +- {1.96 * x.std() / math.sqrt(N):.4f}" if N > 1 else ""
        print(f"{name:14}{x.mean():.4f}{confidence}")


def chosen_times(T, B, every, device):
    """Yields t (B,), weight (B,) to sum over 1..T: t = 1, then all others, or four of them."""
    ones = torch.ones(B, device=device)
    yield ones.long(), ones
    if every or T == 1:
        yield from (((t * ones).long(), ones) for t in range(2, T + 1))
        return
    for _ in range(4):
        t, weight = important_times(T, B, device, first=2)
        yield t, weight * T / 4


def load_classifier(args, path, checkpoint, diffusion=None):
    """A classifier for the checkpoint's data and, if given, the diffusion's x_t."""
    classifier, its_diffusion, other = train.load_checkpoint(path, args.device, classifier=True)
    a, b = ((Path(c["source"]["dataset"]).name, c["classes"], c["shape"])
            for c in (checkpoint, other))
    if a != b:
        raise ValueError(f"{path} was trained on other data or classes")
    if diffusion and not torch.equal(its_diffusion.exact_alpha_bar, diffusion.exact_alpha_bar):
        raise ValueError(f"{path} has another schedule: its t means other noise")
    return classifier


def check_files(args, checkpoint):
    """Fill in --out. ValueError, before any work, for wrong outputs."""
    kinds = (".pgm", ".ppm", ".png")[checkpoint["shape"][0] // 3:]
    args.out = [args.out] if args.out else ["samples" + kinds[0], "samples.png"] * args.samples
    pictures = [args.trajectory, args.nearest, args.forward, args.reconstruct, args.interpolate]
    for path in filter(None, (*pictures, *args.out)):
        data.check_suffix(path, (*kinds, ".npy") if path in args.out else kinds)
    data.check_suffix(args.movie or "x.png", (".png",))
    data.check_outputs([args.movie, *pictures, *args.out],
                       [args.checkpoint, args.classifier, args.score, args.dataset])


@torch.no_grad()
def main(argv=None):
    """Load, draw, write."""
    args = parse_args(argv)
    args.device = train.pick_device(args.device)
    network, diffusion, checkpoint = train.load_checkpoint(args.checkpoint, args.device)
    shape, T = checkpoint["shape"], diffusion.timesteps
    args.zoom = args.zoom or max(1, round(64 / max(shape[1:])))
    args.dataset = args.dataset or checkpoint["source"]["dataset"]
    check_files(args, checkpoint)
    no_null = network.num_classes and checkpoint["settings"]["label_dropout"] == 0
    if no_null and (args.guidance != 1 or args.classifier or args.interpolate):
        raise ValueError(f"{args.checkpoint} was trained with --label-dropout 0: no guidance, "
                         "no --interpolate")
    x = torch.zeros(min(args.n or BLOCK, BLOCK), *shape)
    train.set_threads(args.threads, args.device, lambda: network(x, torch.ones(len(x))))
    torch.manual_seed(args.seed)
    if not args.samples:
        if RANK == 0:
            other_pictures(args, network, diffusion, checkpoint)
        return
    args.n, args.steps = args.n or 64, args.steps or (T if args.sampler == "ddpm" else min(50, T))
    labels = choose_labels(args, network, checkpoint)
    classifier = args.classifier and load_classifier(args, args.classifier, checkpoint, diffusion)
    judge = args.score and load_classifier(args, args.score, checkpoint)
    if args.score or args.nearest:
        known, test = (load_data(args, checkpoint, split)[0] for split in ("train", "test"))
    dtype = train.pick_dtype(args.precision, args.device)
    with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
        pixels, frames = draw(args, network, classifier, diffusion, shape, labels)
    if RANK == 0:
        write(args, pixels, labels, frames)
        if args.nearest:
            draw_nearest(args, pixels, known, test)
        if args.score:
            score(args, judge, pixels, labels, known, test)


if __name__ == "__main__":
    data.run_script(main)
