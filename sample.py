"""Algorithm 2 from a checkpoint; pictures; how good it is.

    python sample.py                                            64 images by all T steps
    python sample.py --sampler ddim --steps 20                  in a second
    python sample.py --checkpoint assets/fashion-mnist.pt --label Sandal --guidance 3
    python sample.py --n 2000 --out s.npy --score               for other tools; how good they are
    torchrun --nproc-per-node=8 -- sample.py --n 10000 --out s.npy          the same on eight GPUs
"""
import argparse
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
from ddpm import classifier_free_guidance, classifier_guidance, respace, standard_normal

BLOCK = 64                  # images that share a stream of random numbers and are drawn together
CLASSIFIER = str(Path(__file__).parent / "assets" / "classifier.pt")


def parse_args(argv=None):
    """The settings, checked as far as they can be without the checkpoint."""
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    file, count = {"type": os.path.expanduser, "metavar": "FILE"}, {"type": train.whole}
    flag = parser.section("what to draw")
    flag("--checkpoint", "ddpm.pt", "made by train.py", **file)
    flag("--n", 64, "number of images")
    flag("--label", None, "class, by name or index (default: all in turn)")
    flag("--guidance", None, "0: no label, 1: the label, above: more of it (default: 1)",
         type=train.number)
    flag("--classifier", None, "guide by a classifier of train.py instead", **file)
    flag("--seed", 0, "image i depends on the seed and on i alone", type=int)
    flag = parser.section("how")
    flag("--sampler", "ddpm", "ddpm: Algorithm 2", choices=("ddpm", "ddim"))
    flag("--steps", None, "calls of the network (default: T for ddpm, 50 for ddim)", **count)
    flag("--eta", None, "noise of ddim: 0 none, 1 as much as ddpm (default: 0)", type=train.number)
    flag("--clip", True, "hold x_0 in [-1, 1] as the authors' code does, not Algorithm 2 as printed",
         action=argparse.BooleanOptionalAction)
    flag("--batch-size", 256, "images at a time")
    flag("--precision", "auto", "see train.py", choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network")
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best there is)")
    flag("--threads", None, "of the CPU (default: one or all, what is faster now)", **count)
    flag = parser.section("output")
    flag("--out", None, "grid in .pgm, .ppm or .png, or .npy: uint8 (N, C, H, W) and labels "
         "(default: samples.pgm, .ppm in colour, and samples.png)", **file)
    flag("--columns", None, "of the grid (default: as rows, or one per class)", **count)
    flag("--gap", 2, "pixels between images", type=int)
    flag("--zoom", None, "times that pixels are repeated (default: to about 64 an image)", **count)
    flag("--trajectory", None, "8 images on the way, above the x_0 predicted (Figure 6)", **file)
    flag("--movie", None, "the way as an animated .png", **file)
    flag = parser.section("how good it is")
    flag("--score", None, "Frechet distance to test images, in a classifier's features (default: "
         "that of assets/)", nargs="?", const=CLASSIFIER, **file)
    flag("--nearest", None, "10 samples beside the 5 training images nearest to each", **file)
    flag("--evaluate", False, "L_simple and bits/dim of test images, no samples")
    flag("--exact", None, "with --evaluate: all T terms, of so many images", **count)
    flag("--dataset", None, "where the data of the training are now, if they moved", **file)
    flag("--data-dir", "data", "see train.py", **file)
    flag = parser.section("other pictures, without samples")
    flag("--forward", None, "images turning into noise, by Eq. 4 and, below, by Eq. 2", **file)
    flag("--reconstruct", None, "test images, their x_T by DDIM, and back", **file)
    flag("--interpolate", None, "two test images mixed at x_T, T/4, T/2, 3T/4 (Figure 8)", **file)
    args = parser.parse_args(argv)
    if min(args.seed, args.gap) < 0:
        raise ValueError("--seed and --gap must be at least 0")
    if args.eta is not None and not (args.sampler == "ddim" and 0 <= args.eta <= 1):
        raise ValueError("--eta is 0..1, and belongs to --sampler ddim")
    args.samples = not (args.evaluate or args.forward or args.reconstruct or args.interpolate)
    for name in ("label", "guidance", "classifier", "out", "trajectory", "movie", "score", "nearest"):
        if not args.samples and getattr(args, name) is not None:
            raise ValueError(f"--{name} is about samples, which this command does not draw")
    return args


# ----------------------------------------------------------------------------------------- samples


def draw(args, network, classifier, diffusion, shape, labels, device):
    """-> the samples as pixels (n, C, H, W), None but in process 0, and frames of the first 64."""
    (rank, world, _), began, frames, mine = train.ranks(), time.perf_counter(), [], {}
    wanted = set(np.linspace(0, args.steps, 41).round())
    for k, start in enumerate(range(0, args.n, args.batch_size)):
        if k % world != rank:
            continue
        size = min(args.batch_size, args.n - start)
        y = None if labels is None else labels[start:start + size].to(device)
        model = guided_model(args, network, classifier, diffusion, y)
        noise = noise_of_images(args.seed, start, size, device)
        x_t = noise((size, *shape))
        if device.type == "cuda" and classifier is None and not args.compile:
            model = recorded(model, x_t)
        frames += [(x_t, torch.zeros_like(x_t))] if k == 0 else []
        for done, (t, x_t, x_0) in enumerate(chain(args, diffusion, model, x_t, noise), 1):
            if k == 0 and done in wanted:
                frames.append((x_t, x_0))
            if rank == 0:
                data.progress(f"{start} of {args.n} images drawn, {size} more at t = {t}")
        if not torch.isfinite(x_t).all():
            raise ValueError(f"{args.checkpoint} draws no finite numbers; try --precision fp32")
        mine[k] = data.to_pixels(x_t).cpu()
    everyone = [mine] * world
    if world > 1:
        dist.gather_object(mine, everyone if rank == 0 else None)
    if rank > 0:
        return None, []
    seconds = time.perf_counter() - began
    data.progress(f"{args.n} images, {args.steps} steps each, in {seconds:.1f} s: "
                  f"{args.n * args.steps / seconds:,.0f} network evaluations/s", final=True)
    batches = {k: pixels for part in everyone for k, pixels in part.items()}
    frames = [[data.to_pixels(x[:64]).cpu() for x in frame] for frame in frames]
    return torch.cat([batches[k] for k in sorted(batches)]), frames


def chain(args, diffusion, model, x_T, noise):
    """The steps (t, x_t, predicted x_0) from x_T down, as the flags say."""
    if args.sampler == "ddim":
        return diffusion.ddim_steps(model, x_T.shape, args.steps, args.eta or 0, x_T, args.clip, noise)
    if args.steps < diffusion.timesteps:
        diffusion, model = respace(diffusion, model, args.steps)
    return diffusion.sample_steps(model, x_T.shape, x_T, args.clip, noise)


def noise_of_images(seed, start, size, device):
    """-> noise(shape) for images start, .. A stream belongs to BLOCK images and is drawn for all of
    them, so image i does not depend on --n, on --batch-size or on the number of processes."""
    streams = [torch.Generator(device).manual_seed(train.random_stream(seed, block))
               for block in range(start // BLOCK, math.ceil((start + size) / BLOCK))]

    def noise(shape):
        blocks = [standard_normal((BLOCK, *shape[1:]), device, stream) for stream in streams]
        return torch.cat(blocks)[start % BLOCK:][:size]

    return noise


def guided_model(args, network, classifier, diffusion, y):
    """A model (x_t, t) for images of labels y (B,) or None, guided as the flags say."""
    scale = 1.0 if args.guidance is None else args.guidance
    if classifier is not None:
        def log_prob(x_t, t):
            return F.log_softmax(classifier(x_t, t), dim=1).gather(1, y[:, None])[:, 0]

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
    if not args.classifier:
        if network.num_classes is None and (args.label, args.guidance) == (None, None):
            return None
        if network.num_classes is None:
            raise ValueError(f"{args.checkpoint} was trained without labels, which --label and "
                             "--guidance need: see train.py --conditional, or name a --classifier")
        if args.guidance not in (None, 1) and checkpoint["settings"]["label_dropout"] == 0:
            raise ValueError(f"{args.checkpoint} was trained with --label-dropout 0: it knows no "
                             "image without a label, which --guidance needs")
    if args.label is not None:
        return torch.full((args.n,), data.find_label(args.label, checkpoint["classes"]))
    return torch.arange(args.n) % len(checkpoint["classes"])


def write(args, pixels, labels, frames, columns):
    """The files that the samples, and the frames of their way, go to."""
    look = {"gap": args.gap, "zoom": args.zoom}
    for path in map(Path, args.out):
        if path.suffix.lower() != ".npy":
            data.save_image(path, pixels, columns, **look)
            continue
        path.with_suffix(".labels.npy").unlink(missing_ok=True)     # an older file's
        for name, array in ((path, pixels), (path.with_suffix(".labels.npy"), labels)):
            if array is not None:
                with data.atomic(name) as file:
                    np.save(file, array.numpy())
    if args.trajectory:
        shown = np.linspace(0, len(frames) - 1, min(11, len(frames))).astype(int)
        strip = torch.stack([torch.stack(frames[k], dim=1) for k in shown], dim=2)[:8]
        data.save_image(args.trajectory, strip.flatten(0, 2), len(shown), **look)
    if args.movie:
        data.save_movie(args.movie, [x_t for x_t, _ in frames], args.columns, **look)
    print("wrote", ", ".join(filter(None, (*args.out, args.trajectory, args.movie))))


# ---------------------------------------------------------------------------------- other pictures


def load_data(args, checkpoint, split):
    """Images and labels that a checkpoint was trained on, or their test split; of one class, if
    --label or training's --only said so. ValueError if they have become something else."""
    source = checkpoint["source"]
    name = args.dataset or source["dataset"]
    images, labels, classes = data.load_with_classes(name, split, args.data_dir,
                                                     checkpoint["settings"]["only"])
    if (tuple(images.shape[1:]), classes) != (checkpoint["shape"], checkpoint["classes"]) or (
            split == "train" and data.fingerprint(images, labels) != source["fingerprint"]):
        raise ValueError(f"{args.checkpoint} was trained on other data than {name}: see --dataset")
    if args.label is not None:
        chosen = labels == data.find_label(args.label, classes)
        images, labels = images[chosen], labels[chosen]
    return images, labels


def other_pictures(args, network, diffusion, checkpoint, device):
    """--forward, --reconstruct and --interpolate, of the first test images."""
    images, labels = load_data(args, checkpoint, "test")
    if len(images) < 10:
        raise ValueError(f"there are {len(images)} test images, and these pictures need 10")
    x_0, y = data.to_model(images[:10]).to(device), labels[:10].to(device)
    T, look = diffusion.timesteps, {"gap": args.gap, "zoom": args.zoom}
    steps = args.steps or min(100, T)
    if args.forward:
        x, columns = x_0[:4], [x_0[:4], x_0[:4]]
        times = sorted({round(k * T / 5) for k in range(1, 6)})
        for t in range(1, T + 1):
            x = diffusion.q_step(x, t)
            columns += [diffusion.q_sample(x_0[:4], t), x] if t in times else []
        strips = torch.stack([torch.stack(columns[k::2], dim=1) for k in (0, 1)], dim=1)
        data.save_image(args.forward, strips.flatten(0, 2), 1 + len(times), **look)
    if args.reconstruct:
        model = lambda x_t, t: network(x_t, t, y if network.num_classes else None)
        x_T = diffusion.ddim_invert(model, x_0, steps)
        again = diffusion.ddim_sample(model, x_0.shape, steps, x_T=x_T, clip=args.clip)
        error = 127.5 * (again - x_0).square().mean().sqrt()
        print(f"reconstruction error, root mean square: {error:.2f} of 255, in {steps} steps")
        rows = torch.stack([x_0, x_T, again], dim=1).flatten(0, 1)
        data.save_image(args.reconstruct, rows, 3, **look)
    if args.interpolate:
        weights, (a, b) = torch.linspace(0, 1, 9), x_0[:2]
        x_T = slerp(*diffusion.ddim_invert(network, x_0[:2], steps), weights)
        strips = [diffusion.ddim_sample(network, x_T.shape, steps, x_T=x_T, clip=args.clip)]
        for t in (T // 4, T // 2, 3 * T // 4):
            strips.append(diffusion.interpolate(network, a, b, weights, max(t, 1), args.clip))
        rows = torch.cat([torch.cat([a[None], strip, b[None]]) for strip in strips])
        data.save_image(args.interpolate, rows, 11, **look)
    print("wrote", ", ".join(filter(None, (args.forward, args.reconstruct, args.interpolate))))


def slerp(a, b, weights):
    """From noise a to noise b (C, H, W) along an arc -> (len(weights), C, H, W) (DDIM, D.5). A
    straight line would pass through points of smaller norm than noise has."""
    weights = torch.as_tensor(weights, dtype=torch.float32, device=a.device).view(-1, 1, 1, 1)
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-3)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / angle.sin()


# ---------------------------------------------------------------------------------- how good it is


def draw_nearest(args, pixels, known, test):
    """--nearest, and whether samples are nearer to training images than test images, which nobody
    can have memorised."""
    def nearest(images):
        images = images[:500].flatten(1).float()
        distances = [torch.cdist(images, part.flatten(1).float()) for part in known.split(5000)]
        distances = torch.cat(distances, dim=1) / math.sqrt(images.shape[1])
        return distances.topk(min(5, len(known)), largest=False)

    (near, index), (near_test, _) = nearest(pixels), nearest(test)
    rows = torch.stack([pixels[:10], *(known[k] for k in index[:10].T)], dim=1)
    data.save_image(args.nearest, rows.flatten(0, 1), rows.shape[1], args.gap, args.zoom)
    print(f"wrote {args.nearest}. Root mean square distance to the nearest training image: samples "
          f"{near[:, 0].mean():.1f} of 255, test images {near_test[:, 0].mean():.1f}")


def frechet_distance(f, g):
    """Between Gaussians fitted to features f (N, F) and g (M, F): |m - n|^2 + tr(C + D - 2 (C
    D)^(1/2)), in float64."""
    (m, C), (n, D) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (f, g))
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T             # C^(1/2)
    cross = torch.linalg.eigvalsh(root @ D @ root).clamp(min=0).sqrt().sum()        # tr (C D)^(1/2)
    return float((m - n).square().sum() + torch.trace(C) + torch.trace(D) - 2 * cross)


@torch.inference_mode()
def score(classifier, pixels, labels, known, test, device):
    """--score: how far the samples are from test images, and as many training images."""
    def look(images):
        parts = [data.to_model(part.to(device)) for part in images.split(500)]
        features = torch.cat([classifier.features(x, torch.zeros(len(x), device=device).long())
                              for x in parts])
        return features.cpu(), classifier.head(features).argmax(1).cpu()

    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    (f, guess), (g, _), (real, _) = look(pixels), look(test), look(known[order[:len(pixels)]])
    drawn = torch.bincount(guess, minlength=classifier.head.out_features).tolist()
    accuracy = "" if labels is None else f"; right class: {(guess == labels).float().mean():.1%}"
    print(f"Frechet distance {frechet_distance(f, g):.3f} ({len(real)} training images: "
          f"{frechet_distance(real, g):.3f}); classes drawn: {drawn}{accuracy}")


@torch.inference_mode()
def evaluate(args, network, diffusion, checkpoint, device):
    """--evaluate: L_simple and the bound (Section 4.3) on test images, with 95% confidence."""
    images, labels = load_data(args, checkpoint, "test")
    T, N, rows = diffusion.timesteps, min(args.exact or len(images), len(images)), []
    exact = args.exact is not None or N < 100           # of few images, random terms say too little
    for start in range(0, N, 500):
        x_0 = data.to_model(images[start:min(start + 500, N)].to(device))
        y = labels[start:start + len(x_0)].to(device) if network.num_classes else None
        sums = torch.zeros(4, len(x_0), device=device)  # L_simple, rate, distortion, error of x_0
        sums[1] = diffusion.prior_bits(x_0)
        for t, weight in chosen_terms(T, len(x_0), exact, device):
            data.progress(f"{start} of {N} images, {len(x_0)} more at t = {int(t[0])}")
            noise = torch.randn_like(x_0)
            x_t = diffusion.q_sample(x_0, t, noise)
            output = network(x_t, t, y)
            eps, _ = diffusion.predict(output, x_t, t, clip=False)
            sums[0] += weight * (eps - noise).square().flatten(1).mean(1) / T
            sums[2 if t[0] == 1 else 1] += weight * diffusion.vlb_terms(output, x_0, x_t, t)
            if t[0] == 1:
                _, predicted = diffusion.predict(output, x_t, t)
                sums[3] = (predicted - x_0).square().flatten(1).mean(1)
        rows.append(sums.cpu().double())
    l_simple, rate, distortion, error = torch.cat(rows, dim=1)

    def shown(x):
        return f"{x.mean():.4f}" + (f" +- {1.96 * x.std() / math.sqrt(N):.4f}" if N > 1 else "")

    data.progress(f"{N:,} test images of {checkpoint['source']['dataset']}, {args.checkpoint} at step "
                  f"{checkpoint['step']}", final=True)
    print(f"L_simple    {shown(l_simple)}\nbits/dim <= {shown(rate + distortion)}, the sum of\n"
          f"  rate        {shown(rate)}   L_1 + .. + L_T\n"
          f"  distortion  {shown(distortion)}   L_0; RMSE {127.5 * error.mean().sqrt():.2f} of 255")


def chosen_terms(T, B, exact, device):
    """Pairs t (B,), weight (B,) whose weighted sums estimate sums over 1..T: t = 1, and of 2..T all,
    or four at random, about as likely as they are large (L_{t-1} falls like 1/t)."""
    ones, later = torch.ones(B, device=device), torch.arange(2, T + 1, device=device)
    yield ones.long(), ones
    if exact or T == 1:
        yield from ((t.expand(B), ones) for t in later)
        return
    probability = 1 / later + 5 / T
    probability = probability / probability.sum()
    for _ in range(4):
        pick = torch.multinomial(probability, B, replacement=True)
        yield later[pick], 1 / (4 * probability[pick])


def load_classifier(path, device, checkpoint):
    """A classifier for the checkpoint's data, and its diffusion. ValueError if it knows others."""
    classifier, diffusion, other = train.load_checkpoint(path, device, classifier=True)
    a, b = checkpoint["source"], other["source"]
    key = "dataset" if a["dataset"] in data.DATASETS else "fingerprint"
    if a[key] != b[key] or other["classes"] != checkpoint["classes"]:
        raise ValueError(f"{path} was trained on other data or classes")
    return classifier, diffusion


def main(argv=None):
    """Load, draw, write."""
    args, (rank, world, _) = parse_args(argv), train.ranks()
    device = train.pick_device(args.device)
    network, diffusion, checkpoint = train.load_checkpoint(args.checkpoint, device)
    shape, T, known, test, judge, classifier = checkpoint["shape"], diffusion.timesteps, *[None] * 4
    colour, args.zoom = shape[0] == 3, args.zoom or max(1, round(64 / max(shape[1:])))
    args.out = [] if not args.samples else [args.out] if args.out else [
        f"samples.{'ppm' if colour else 'pgm'}", "samples.png"]
    pictures = [args.trajectory, args.nearest, args.forward, args.reconstruct, args.interpolate]
    allowed = (".ppm", ".png") if colour else (".pgm", ".ppm", ".png")
    for path, suffixes in ((args.movie, (".png",)), *((path, allowed) for path in pictures),
                           *((path, (*allowed, ".npy")) for path in args.out)):
        if path:
            data.check_suffix(path, suffixes)
    if rank == 0:
        data.check_outputs([args.movie, *pictures, *args.out], [
            args.checkpoint, args.classifier, args.score, checkpoint["source"]["dataset"]])
    if args.steps and args.steps > T:
        raise ValueError(f"--steps {args.steps} is more than the {T} that {args.checkpoint} has")
    torch.manual_seed(args.seed)
    if not args.samples:
        if args.evaluate:
            evaluate(args, network, diffusion, checkpoint, device)
        if args.forward or args.reconstruct or args.interpolate:
            with torch.inference_mode():
                other_pictures(args, network, diffusion, checkpoint, device)
        return
    labels = choose_labels(args, network, checkpoint)
    args.steps = args.steps or (T if args.sampler == "ddpm" else min(50, T))
    if args.classifier:
        classifier, its_diffusion = load_classifier(args.classifier, device, checkpoint)
        if not torch.equal(its_diffusion.exact_alpha_bar, diffusion.exact_alpha_bar):
            raise ValueError(f"{args.classifier} has another schedule: its t means other noise")
    if args.score or args.nearest:
        known, test = (load_data(args, checkpoint, split)[0] for split in ("train", "test"))
        if args.score:                                  # it sees clean images: any schedule will do
            judge, _ = load_classifier(args.score, device, checkpoint)
    if world > 1:
        dist.init_process_group("gloo")
    if args.compile:
        network.compile()
    dtype = train.pick_dtype(args.precision, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.no_grad():
        if device.type == "cpu" and world == 1:
            x, t = torch.zeros(min(args.n, BLOCK), *shape), torch.ones(min(args.n, BLOCK)).long()
            torch.set_num_threads(args.threads or train.faster_threads(lambda: network(x, t)))
        pixels, frames = draw(args, network, classifier, diffusion, shape, labels, device)
    if rank == 0:
        in_turn = labels is not None and args.label is None
        columns = args.columns or (len(checkpoint["classes"]) if in_turn else None)
        write(args, pixels, labels, frames, columns)
        if args.nearest:
            draw_nearest(args, pixels, known, test)
        if judge:
            score(judge, pixels, labels, known, test, device)


if __name__ == "__main__":
    train.run_script(main)
