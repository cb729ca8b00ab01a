"""Algorithm 1 on real data.

    python train.py                                  Fashion-MNIST, in minutes on a laptop
    python train.py --resume                         go on after Ctrl-C, a crash, a reboot
    torchrun --nproc-per-node=8 -- train.py          the same on eight GPUs

It writes ddpm.pt, from which sample.py draws.
"""
import argparse
import copy
import datetime
import itertools
import math
import os
import shlex
import signal
import sys
import time
import timeit
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import ddpm
import unet

FORMAT = "ddpm checkpoint 4"
NOT_KEPT = {"data_dir", "out", "save_every", "slim", "resume", "init", "log", "preview", "device",
            "compile"}                                      # settings that a checkpoint leaves out
RANK = int(os.environ.get("RANK", "0"))                       # torchrun sets these: which process,
WORLD = int(os.environ.get("WORLD_SIZE", "1"))                # of how many,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))           # and which on this machine


def parse_args(argv=None):
    """The settings, checked; with --resume, those of the checkpoint unless they are given."""
    parser, choices = data.Parser(__doc__), ddpm.CHOICES
    flag = parser.section("data")
    flag("--dataset", "fashion-mnist", "mnist, cifar10, a FILE.npy or an IDX file")
    flag("--data-dir", "data", "where data are looked for, or downloaded to")
    flag("--only", None, "train on one class, by name or index")
    flag("--flip", None, "mirror half of the images (default: cifar10 only)",
         action=argparse.BooleanOptionalAction)
    flag = parser.section("diffusion")
    flag("--timesteps", 1000, "T (paper: 1000)")
    flag("--schedule", None, "paper: linear (default: cosine)", choices=("cosine", "linear"))
    flag("--beta-start", None, "if linear (paper: 1e-4; default: 0.1 / T)", type=float)
    flag("--beta-end", None, "if linear (paper: 0.02; default: 20 / T)", type=float)
    flag("--prediction", "eps", "paper: eps", choices=choices["prediction"])
    flag("--variance", "beta", "paper: beta, posterior", choices=choices["variance"])
    flag("--loss", None, "paper: mse (default: mse; if learned: hybrid)", choices=choices["loss"])
    flag = parser.section("network")
    flag("--channels", 32, "at the highest resolution (paper: 128)")
    flag("--multipliers", "1,2", "of channels, by resolution (paper: 1,2,2,2)",
         type=data.positive_integers)
    flag("--blocks", 1, "per resolution (paper: 2)")
    flag("--attention", (), "at map sizes (paper: 16; default: middle alone)",
         type=data.positive_integers)
    flag("--heads", 1, "of the attention (paper: 1)")
    flag("--dropout", 0.0, "paper: 0.1")
    flag("--patch", 2, "pixels gathered along each side (paper: 1)")
    flag("--block", "resnet", "paper: resnet", choices=("resnet", "convnext"))
    flag("--embedding", "add", "of t (paper: add)", choices=("add", "scale-shift"))
    flag("--conditional", False, "learn labels, for sample.py's --label and --guidance")
    flag("--label-dropout", 0.1, "share of labels hidden, for guidance")
    flag("--classifier", False, "train a classifier of noisy images instead")
    flag = parser.section("optimisation")
    flag("--steps", 5500, "paper: 800,000")
    flag("--batch-size", 64, "of all processes together (paper: 128)")
    flag("--accumulate", 1, "parts to compute a batch in, to save memory")
    flag("--optimizer", "muon", "paper: adam", choices=("muon", "adam"))
    flag("--lr", None, "paper: 2e-4 (default: muon 0.01, adam 0.005; falls to 0)", type=float)
    flag("--warmup", 100, "steps in which the rate rises", type=int)
    flag("--ema", 0.999, "decay of the averaged weights (paper: 0.9999)")
    flag("--precision", "auto", "paper: fp32; auto: bf16 if the hardware has it",
         choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network: a minute's wait")
    flag("--checkpointing", False, "compute blocks twice, to save memory")
    flag("--seed", 0, "of everything random", type=int)
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best there is)")
    flag("--threads", None, "of the CPU (default: one or all, what is faster now)",
         type=data.positive_integer)
    flag = parser.section("output")
    flag("--out", None, "checkpoint (default: ddpm.pt, or classifier.pt)")
    flag("--save-every", 1000, "steps between checkpoints")
    flag("--slim", False, "save the averaged weights alone, to sample from")
    flag("--resume", False, "go on from --out, with its settings, exactly")
    flag("--init", None, "checkpoint whose averaged weights to begin with")
    flag("--log", None, "CSV file to add step, loss, rate and images/s to")
    flag("--preview", None, "picture of 16 samples, at every checkpoint")

    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))   # tells what is given from the rest
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    out = given.get("out") or ("classifier.pt" if "classifier" in given else "ddpm.pt")
    old = read_checkpoint(out)[2]["settings"] if "resume" in given else {}
    for k in given.keys() & old.keys() - {"dataset", "steps", "threads"}:
        if given[k] != old[k]:
            raise ValueError(f"--resume keeps {k}, which was {old[k]} and is {given[k]} "
                             "now. To begin anew with the weights of a checkpoint: --init")
    args = argparse.Namespace(**{**defaults, **old, **given, "out": out})

    if args.dataset not in data.DATASETS:
        args.dataset = os.path.abspath(args.dataset)
    T, learned = args.timesteps, args.variance.startswith("learned")
    has_beta = (args.beta_start, args.beta_end) != (None, None)
    linear = args.schedule == "linear" or (args.schedule is None and has_beta)
    dependent = {
        "flip": args.dataset in data.DATASETS and data.DATASETS[args.dataset].flip,
        "schedule": "linear" if linear else "cosine",
        "beta_start": 0.1 / T if linear else None,          # the paper's ends, scaled so that x_T
        "beta_end": 20 / T if linear else None,             # is noise for any T
        "loss": "hybrid" if learned else "mse",
        "lr": 0.01 if args.optimizer == "muon" else 0.005}
    vars(args).update({k: v for k, v in dependent.items() if getattr(args, k) is None})
    for fine, message in (
            (all(0 <= x < 1 for x in (args.dropout, args.ema, args.label_dropout)),
             "--dropout, --ema and --label-dropout are at least 0 and below 1"),
            (0 < args.lr < math.inf and 0 <= min(args.warmup, args.seed) and args.seed < 2**63,
             "--lr is above 0, --warmup and --seed are at least 0"),
            (linear or not has_beta, "--beta-start and --beta-end belong to --schedule linear"),
            (args.loss in ("vlb", "hybrid") or not learned,
             f"--loss {args.loss} does not train --variance {args.variance}: use hybrid"),
            (bool(args.only) + args.conditional + args.classifier <= 1,
             "--only, --conditional and --classifier exclude each other"),
            (not (args.resume and args.init), "--resume goes on as it is, --init begins anew"),
            (not (args.classifier and args.preview), "a classifier has no samples to --preview")):
        if not fine:
            raise ValueError(message)
    if args.preview:
        data.check_suffix(args.preview, (".png", ".ppm", ".pgm"))
    make_diffusion(args)                                    # refuses what cannot be
    return args


def train(args):
    """Algorithm 1, until --steps are taken or someone stops it."""
    run, signals, stop = Run(args), [], torch.tensor(0)

    def remember(number, _):        # the step in hand is finished; a second Ctrl-C ends at once
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores SIGHUP
            signal.signal(number, remember)
    while run.done < args.steps and stop == 0:              # 1, 6: repeat until
        run.step()                                          # 2-5
        run.report()
        stop += len(signals)
        if WORLD > 1:
            dist.all_reduce(stop)                           # all stop together
        if run.done % args.save_every == 0 or stop > 0 or run.done >= args.steps:
            run.save()
    if run.done < args.steps:
        saved = f"saved in {args.out}. To go on: --resume" if run.own_file else "nothing to save"
        run.say(f"stopped at step {run.done}, {saved}", True)
        sys.exit(128 + signals[0] if signals else 1)
    flag = "--score" if args.classifier else "--checkpoint"
    run.say(f"{args.out} has all its {run.done} steps. Next: python sample.py {flag} "
            f"{shlex.quote(args.out)}. To go on: --resume --steps N", True)


class Run:
    """A training in progress. Random numbers come from (seed, step, part of the batch) alone: so a
    resumed run does what it would have done, and N processes what --accumulate N does in one. A
    step looks at no number on the device (but for the bound), so that a GPU never waits.

    The maths: step, add_gradient, batch, losses, descend. The rest keeps the books."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        device, gpu, parts = self.device, self.device.type == "cuda", WORLD * args.accumulate
        self.say = data.progress if RANK == 0 else lambda *_: None
        if args.batch_size % parts:
            raise ValueError(f"--batch-size {args.batch_size} does not divide into {parts} parts")
        if gpu:
            torch.cuda.set_stream(torch.cuda.Stream())      # the default one cannot be recorded
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if RANK == 0:
            data.check_outputs((args.out, args.log, args.preview), (args.dataset, args.init))
        images, labels, self.classes = data.load_with_classes(args.dataset, "train", args.data_dir,
                                                              args.only)
        if (args.conditional or args.classifier) and len(self.classes) < 2:
            raise ValueError(f"{args.dataset} has no labels of two classes or more")
        self.images, self.labels = images.to(device), labels.to(device)
        self.part_size, self.shape = args.batch_size // parts, tuple(images.shape[1:])
        self.source = {"dataset": args.dataset, "images": len(images),
                       "fingerprint": data.fingerprint(images, labels)}

        torch.manual_seed(args.seed)
        self.diffusion = make_diffusion(args).to(device)
        self.network = to_device(make_network(args, self.shape, self.classes), device)
        if args.init:
            with data.named_errors(f"--init {args.init} needs the flags of its own network"):
                self.network.load_state_dict(read_checkpoint(args.init)[2]["ema"])
        self.average = copy.deepcopy(self.network).eval()
        self.weights, self.averages = (list(n.parameters()) for n in (self.network, self.average))
        self.lr = torch.tensor(args.lr, device=device)
        self.optimizers = make_optimizers(self.network, self.lr, args.optimizer == "muon")
        self.importance, self.seen = ddpm.ImportanceSampler(args.timesteps), []
        self.dtype = pick_dtype(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.done, self.own_file = 0, None
        if args.resume:
            self.restore()
        self.n = torch.tensor(float(self.done), device=device)
        self.loss_sum, self.skipped, self.skipped_in_a_row = torch.zeros(3, device=device)
        self.model = torch.compile(self.network) if args.compile else self.network
        if WORLD > 1:
            self.model = DistributedDataParallel(self.model)
        can_record = gpu and parts == 1 and not args.compile and args.loss in ("mse", "l1", "huber")
        self.record_at = self.done + 3 if can_record else None
        args.threads = set_threads(args.threads, device,
                                   lambda: self.losses(*self.batch()).mean().backward())
        self.network.zero_grad()
        self.seen.clear()
        cores = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        size, parameters = "x".join(map(str, self.shape)), sum(w.numel() for w in self.weights)
        self.say(f"{len(images):,} images {size}{', half of them mirrored' * args.flip}, "
                 f"{parameters:,} parameters, {device}, {str(self.dtype)[6:]}{cores}, "
                 f"steps {self.done} to {args.steps} of {args.batch_size} images", True)
        self.reported, self.reported_at = self.done, time.perf_counter()

    def step(self):
        """Lines 2 to 5 of Algorithm 1, for this process's parts of the batch."""
        if self.done == self.record_at:     # many small kernels take longer to launch than to run
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.add_gradient(last=True)
            self.add_gradient = lambda last: graph.replay()         # draws from the seed set before
        parts = self.args.accumulate
        for k in range(parts):
            torch.manual_seed(random_stream(self.args.seed, self.done, RANK * parts + k))
            self.add_gradient(last=k == parts - 1)
        self.done += 1

    def add_gradient(self, last):
        """The gradient of a part of the batch; after the last part, the step along it."""
        if WORLD > 1:
            self.model.require_backward_grad_sync = last    # average over processes at the end
        x_0, y = self.batch()                                       # 2: x_0 ~ q(x_0)
        loss = self.losses(x_0, y).mean() / self.args.accumulate    # 3-5: see training_losses
        self.scaler.scale(loss).backward()                          # 5: take gradient
        self.loss_sum += loss.detach()
        if last:
            self.descend()                                          #    descent step

    def batch(self):
        """Images drawn with replacement, in [-1, 1], and their labels, some of them hidden."""
        B, device = self.part_size, self.device
        index = torch.randint(len(self.images), (B,), device=device)
        x_0, y = data.to_model(self.images[index]), self.labels[index]
        if self.args.flip:
            mirrored = torch.rand(B, 1, 1, 1, device=device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
        if self.args.conditional:
            hidden = torch.rand(B, device=device) < self.args.label_dropout
            y = y.masked_fill(hidden, len(self.classes))
        return x_0, y

    def losses(self, x_0, y):
        """What is minimised, for each image, (B,)."""
        args, diffusion, B, device = self.args, self.diffusion, len(x_0), self.device
        model = lambda x_t, t: self.model(x_t, t, y if args.conditional else None)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            if args.classifier:             # a quarter are clean images, t = 0, as --score has them
                t = torch.randint(0, args.timesteps + 1, (B,), device=device)
                t = t * (torch.rand(B, device=device) > 0.25)
                x_t = diffusion.q_sample(x_0, t.clamp(min=1))
                x_t = torch.where((t > 0)[:, None, None, None], x_t, x_0)
                return F.cross_entropy(self.model(x_t, t), y, reduction="none")
            if args.loss != "vlb":
                return diffusion.training_losses(model, x_0)
            t, weights = self.importance.draw(B)
            losses = diffusion.training_losses(model, x_0, t.to(device))
            self.seen += zip(t.tolist(), losses.tolist())
            return losses * weights.to(device)

    def descend(self):
        """A step along the gradient, its norm at most 1, and into the averaged weights. If it is
        not finite, the optimisers leave the weights as they are."""
        args, n = self.args, self.n
        self.lr.copy_(learning_rate(n, args.steps, args.lr, args.warmup))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        bad = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(self.weights, 1.0))
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()
            optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        update_ema(self.averages, self.weights, torch.clamp((1 + n) / (10 + n), max=args.ema))
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        n += 1
        if self.seen:
            everyone = [self.seen] * WORLD
            if WORLD > 1:
                dist.all_gather_object(everyone, self.seen)
            for t, loss in itertools.chain(*everyone):
                self.importance.remember(t, loss)
            self.seen = []

    def report(self):
        """Once a second, and at the end: say how it goes. ValueError if it does not go at all."""
        args, done, now = self.args, self.done, time.perf_counter()
        steps, seconds = done - self.reported, now - self.reported_at
        if seconds < 1 and done < args.steps:
            return
        loss, skipped, in_a_row, lr = torch.stack(
            [self.loss_sum / steps, self.skipped, self.skipped_in_a_row, self.lr]).tolist()
        if in_a_row >= min(100, args.steps):
            raise ValueError(f"the gradient has not been finite for {in_a_row:.0f} steps. Try a "
                             "lower --lr, or --precision fp32")
        self.loss_sum.zero_()
        self.reported, self.reported_at = done, now
        speed = steps * args.batch_size / seconds
        left = datetime.timedelta(seconds=round((args.steps - done) * seconds / steps))
        self.say(f"step {done}/{args.steps}  loss {loss:.4f}  {speed:.0f} images/s  {left} left"
                 + f"  {skipped:.0f} steps skipped" * (skipped > 0), done == args.steps)
        if args.log and RANK == 0:
            with open(args.log, "a", encoding="utf-8") as file:
                if file.tell() == 0:
                    print("step,loss,learning_rate,images_per_second", file=file)
                print(f"{done},{loss:.6g},{lr:.6g},{speed:.1f}", file=file)

    def save(self):
        """Write --out, which is always whole, the old or the new; another run's file is kept."""
        args, path = self.args, self.args.out
        if RANK > 0 or int(self.skipped_in_a_row) == self.done:
            return
        if not all(torch.isfinite(w).all() for w in self.weights):
            raise ValueError("the weights are not finite, and not saved. Try a lower --lr")
        if os.path.exists(path) and os.stat(path).st_mtime_ns != self.own_file:
            data.keep_older(path)
        checkpoint = {
            "format": FORMAT, "shape": self.shape, "classes": self.classes, "source": self.source,
            "settings": {k: v for k, v in vars(args).items() if k not in NOT_KEPT},
            "step": self.done, "ema": self.average.state_dict()}
        if not args.slim:
            checkpoint["training"] = {
                "model": self.network.state_dict(), "scaler": self.scaler.state_dict(),
                "optimizers": [each.state_dict()["state"] for each in self.optimizers],
                "importance": self.importance.losses}
        with data.atomic(path) as file:
            torch.save(checkpoint, file)
        self.own_file = os.stat(path).st_mtime_ns
        if args.preview:
            y = torch.arange(16, device=self.device) % len(self.classes)
            model = lambda x_t, t: self.average(x_t, t, y if args.conditional else None)
            x_0 = self.diffusion.ddim_sample(model, (16, *self.shape), min(20, args.timesteps),
                                             generator=torch.Generator().manual_seed(0))
            data.save_image(args.preview, x_0, zoom=2)

    def restore(self):
        """Go on from --out."""
        path, (_, _, checkpoint) = self.args.out, read_checkpoint(self.args.out)
        with data.named_errors(f"{path} cannot be resumed"):
            if checkpoint["source"]["fingerprint"] != self.source["fingerprint"]:
                raise ValueError("it was trained on other data: see --dataset and --init")
            if "training" not in checkpoint:
                raise ValueError("it was saved with --slim: see --init")
            training = checkpoint["training"]
            self.average.load_state_dict(checkpoint["ema"])
            self.network.load_state_dict(training["model"])
            for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                optimizer.param_groups[0]["lr"] = self.lr
            self.scaler.load_state_dict(training["scaler"])
            self.importance.losses.copy_(training["importance"])
            self.done, self.own_file = checkpoint["step"], os.stat(path).st_mtime_ns


def random_stream(*numbers):
    """A seed of its own for every (seed, step, part)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def learning_rate(n, steps, peak, warmup):
    """The rate of step n = 0, 1, .. (a tensor): up in a straight line, and down to 0 in another."""
    return peak * torch.minimum((n + 1) / (warmup + 1), (steps - n) / max(steps - warmup, 1))


@torch.no_grad()
def update_ema(average, weights, decay):
    """average <- decay average + (1 - decay) weights, in place."""
    difference = torch._foreach_sub(weights, average)
    torch._foreach_mul_(difference, 1 - decay)
    torch._foreach_add_(average, difference)


def make_optimizers(network, lr, muon):
    """Adam, and if `muon`, Muon for the convolutions between feature maps. lr is a 0-dim tensor."""
    by_muon, by_adam = [], []
    for name, w in network.named_parameters():
        inner = w.ndim == 4 and w.shape[1] > 1 and "conv_in" not in name and "conv_out" not in name
        (by_muon if muon and inner else by_adam).append(w)
    # beta_2 = 0.99: Adam's 0.999 would average over most of a run of minutes.
    adam = torch.optim.Adam(by_adam, lr, (0.9, 0.99), fused=True, capturable=lr.is_cuda)
    return [adam, Muon(by_muon, lr)] if by_muon else [adam]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, so that all directions of a matrix (C_out, C_in kh kw) learn at one
    pace (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in steps of Adam's size (Liu et
    al. 2025, 2502.16982). torch.optim.Muon takes no convolutions."""

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """One step, unless self.found_inf, on the device, is 1, as torch's fused optimisers do."""
        weights, lr = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        batches = [[w] for w in weights]
        if lr.is_cuda:                      # matrices of one shape at once: fewer kernels
            by_shape = itertools.groupby(sorted(weights, key=lambda w: w.shape), lambda w: w.shape)
            batches = [list(batch) for _, batch in by_shape]
        for batch in batches:
            momenta = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in batch]
            gradients = [torch.where(self.found_inf > 0, m, w.grad) for m, w in zip(momenta, batch)]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)           # Nesterov's look ahead
            directions = orthogonal(torch.stack([G.flatten(1) for G in ahead]))
            size = torch.where(self.found_inf > 0, 0, lr) * 0.2 * math.sqrt(max(directions[0].shape))
            for w, direction in zip(batch, directions):
                w.addcmul_(direction.reshape(w.shape), size, value=-1)


def orthogonal(G):
    """Nearly the orthogonal matrices nearest to G (B, m, n): five steps of a polynomial that
    pushes singular values towards 1 (0.7 to 1.2 come out, less if they are tiny)."""
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                      # G <- 3.4445 G - 4.7750 A G + 2.0315 A A G
        A = G @ G.mT
        G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), G, beta=3.4445)
    return G


def read_checkpoint(path):
    """A checkpoint -> (network with averaged weights, diffusion, the file's dict), on the CPU.
    Nothing in the file is run, and nothing larger than it is allocated."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no {path}: python train.py makes one, and one comes with this "
                         "project, assets/fashion-mnist.pt")
    with data.named_errors(f"{path} is no checkpoint of train.py, or damaged"):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it unpacks to more than its size")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"this train.py reads {FORMAT!r} only")
        args, (C, H, W) = argparse.Namespace(**checkpoint["settings"]), checkpoint["shape"]
        if C not in (1, 3) or not 0 < min(H, W) or checkpoint["source"]["images"] < 1:
            raise ValueError("it is not about images")
        with torch.device("meta"):          # takes no memory, whatever the settings ask for
            network = make_network(args, (C, H, W), checkpoint["classes"])
        network.load_state_dict(dict(checkpoint["ema"]), assign=True)     # dict: a copy
        if not all(torch.isfinite(w).all() for w in network.parameters()):
            raise ValueError("it has weights that are not finite")
        return network, make_diffusion(args), checkpoint


def load_checkpoint(path, device, classifier=False):
    """A checkpoint of train.py -> (model with EMA weights, diffusion, the checkpoint's dict). The
    model is a UNet (x, t, y), or if asked for a classifier (x, t), in eval mode on `device`."""
    network, diffusion, checkpoint = read_checkpoint(path)
    if checkpoint["settings"]["classifier"] != classifier:
        kinds = ("a model that draws, and no classifier", "a classifier, which draws nothing")
        raise ValueError(f"{path} is {kinds[not classifier]}: see train.py --classifier")
    return to_device(network, device).eval(), diffusion.to(device), checkpoint


def make_diffusion(args):
    """The GaussianDiffusion that the settings ask for."""
    betas = (ddpm.linear_beta_schedule(args.timesteps, args.beta_start, args.beta_end)
             if args.schedule == "linear" else ddpm.cosine_beta_schedule(args.timesteps))
    return ddpm.GaussianDiffusion(betas, args.prediction, args.variance, args.loss)


def make_network(args, shape, classes):
    """The network that the settings ask for, for images of `shape` (C, H, W)."""
    C, H, _ = shape
    network = unet.UNet(
        in_channels=C, out_channels=2 * C if args.variance.startswith("learned") else C,
        image_size=H, patch=args.patch, channels=args.channels, multipliers=args.multipliers,
        blocks=args.blocks, attention=args.attention, heads=args.heads, dropout=args.dropout,
        convnext=args.block == "convnext", scale_shift=args.embedding == "scale-shift",
        num_classes=len(classes) if args.conditional else None, checkpointing=args.checkpointing)
    return unet.NoisyClassifier(network, len(classes)) if args.classifier else network


def to_device(network, device):
    """The network there, its convolutions laid out as a GPU computes them."""
    gpu = torch.device(device).type == "cuda"
    return network.to(device, memory_format=torch.channels_last if gpu else torch.preserve_format)


def pick_device(name):
    """The device of that name, tried out, or the best there is; under torchrun, a GPU each."""
    mps = torch.backends.mps.is_available() and WORLD == 1
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    with data.named_errors(f"--device {name} does not work here, try --device cpu"):
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")      # TF32, as convolutions have it anyway
        torch.zeros(1, device=device).item()
        return device


def pick_dtype(precision, device):
    """What autocast computes in; auto: bf16 where the hardware has units for it, else fp32."""
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        units = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                 else device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
        precision = "bf16" if units else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def set_threads(number, device, work):
    """Use so many CPU threads, or if None, one or all, whichever does work() sooner: on a busy
    machine, often one."""
    def seconds(threads):
        torch.set_num_threads(threads)
        work()
        return timeit.timeit(work, number=4)

    if number is None and device.type == "cpu" and WORLD == 1:
        number = min({torch.get_num_threads(), 1}, key=seconds)
    torch.set_num_threads(number or torch.get_num_threads())
    return number


if __name__ == "__main__":
    data.run_script(lambda: train(parse_args()))
