"""Algorithm 1 on real data.

    python train.py                                  Fashion-MNIST, in minutes on a laptop
    python train.py --resume                         go on after Ctrl-C, a crash, a reboot
    torchrun --nproc-per-node=8 -- train.py          the same on eight GPUs

It writes ddpm.pt, from which sample.py draws.
"""
import argparse
import copy
import datetime
import math
import os
import shlex
import signal
import sys
import time
import timeit
import warnings
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
            "compile"}                  # flags that a checkpoint does not store


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a ValueError."""

    def section(self, title):
        """-> a function that adds a flag: its default tells its type, and is shown."""
        group = self.add_argument_group(title)

        def flag(name, default, help, **options):
            kind = type(default)
            if default is False:
                options["action"] = "store_true"
            elif "action" not in options:
                parse = {int: whole, float: number}.get(kind, os.path.expanduser)
                options.setdefault("type", parse)
            help += f" (default: {default})" if kind in (int, float, str) else ""
            group.add_argument(name, default=default, help=help, **options)

        return flag

    def error(self, message):
        raise ValueError(message)


def whole(text):
    """A whole number above 0."""
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def number(text):
    """A number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


def numbers(text):
    """Whole numbers above 0, with commas between them."""
    return tuple(whole(part) for part in text.split(",") if part)


def parse_args(argv=None):
    """The settings, checked; with --resume, those of the checkpoint unless they are given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    choices, either = ddpm.CHOICES, argparse.BooleanOptionalAction
    flag = parser.section("data")
    flag("--dataset", "fashion-mnist", "mnist, cifar10, a FILE.npy or an IDX file")
    flag("--data-dir", "data", "where data are looked for, or downloaded to")
    flag("--only", None, "train on one class, by name or index")
    flag("--flip", None, "mirror half of the images (default: cifar10 only)", action=either)
    flag = parser.section("diffusion")
    flag("--timesteps", 1000, "T (paper: 1000)")
    flag("--schedule", None, "paper: linear (default: cosine)", choices=("cosine", "linear"))
    flag("--beta-start", None, "if linear (paper: 1e-4; default: 0.1 / T)", type=number)
    flag("--beta-end", None, "if linear (paper: 0.02; default: 20 / T)", type=number)
    flag("--prediction", "eps", "paper: eps", choices=choices["prediction"])
    flag("--variance", "beta", "paper: beta, posterior", choices=choices["variance"])
    flag("--loss", None, "paper: mse (default: mse; if learned: hybrid)", choices=choices["loss"])
    flag = parser.section("network")
    flag("--channels", 32, "at the highest resolution (paper: 128)")
    flag("--multipliers", "1,2", "of channels, by resolution (paper: 1,2,2,2)", type=numbers)
    flag("--blocks", 1, "per resolution (paper: 2)")
    flag("--attention", (), "at map sizes (paper: 16; default: middle alone)", type=numbers)
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
    flag("--lr", None, "paper: 2e-4 (default: muon 0.01, adam 0.005; falls to 0)", type=number)
    flag("--warmup", 100, "steps in which the rate rises", type=int)
    flag("--ema", 0.999, "decay of the averaged weights (paper: 0.9999)")
    flag("--precision", "auto", "paper: fp32; auto: bf16 if the hardware has it",
         choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network: a minute's wait")
    flag("--checkpointing", False, "compute blocks twice, to save memory")
    flag("--seed", 0, "of everything random", type=int)
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best there is)")
    flag("--threads", None, "of the CPU (default: one or all, what is faster now)", type=whole)
    flag = parser.section("output")
    flag("--out", None, "checkpoint (default: ddpm.pt, or classifier.pt)")
    flag("--save-every", 1000, "steps between checkpoints")
    flag("--slim", False, "save the averaged weights alone, to sample from")
    flag("--resume", False, "go on from --out, with its settings, exactly")
    flag("--init", None, "checkpoint whose averaged weights to begin with")
    flag("--log", None, "CSV file of step, loss, learning rate, images/s")
    flag("--preview", None, "picture of 16 samples, at every checkpoint")

    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))       # tells what is given from the rest
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
    for wrong, message in (
            (max(args.dropout, args.ema, args.label_dropout) >= 1,
             "--dropout, --ema and --label-dropout must be below 1"),
            (args.lr == 0 or not 0 <= args.warmup <= 10**9 or not 0 <= args.seed < 2**63,
             "--lr must be above 0, --warmup and --seed at least 0, and not so large"),
            (has_beta and not linear, "--beta-start and --beta-end belong to --schedule linear"),
            (learned and args.loss not in ("vlb", "hybrid"),
             f"--loss {args.loss} does not train --variance {args.variance}: use hybrid"),
            (bool(args.only) + args.conditional + args.classifier > 1,
             "--only, --conditional and --classifier exclude each other"),
            (args.resume and args.init, "--resume goes on as it is, --init begins anew"),
            (args.classifier and args.preview, "--preview is of samples: a classifier has none")):
        if wrong:
            raise ValueError(message)
    data.check_suffix(args.preview or "none.png", (".png", ".ppm", ".pgm"))
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
    if run.done >= args.steps:
        return run.say(f"{args.out} has all its {run.done} steps. To go on: --steps N", True)
    while run.done < args.steps and stop == 0:              # 1, 6: repeat until
        run.step()                                          # 2-5
        run.report()
        stop += len(signals)
        if run.world > 1:
            dist.all_reduce(stop)                           # all stop together
        if run.done % args.save_every == 0:
            run.save()
    run.save()
    if run.done < args.steps:
        saved = f"saved in {args.out}. To go on: --resume" if run.own_file else "nothing to save"
        run.say(f"stopped at step {run.done}, {saved}", True)
        sys.exit(128 + signals[0] if signals else 1)
    flag = "--score" if args.classifier else "--checkpoint"
    run.say(f"averaged weights are in {args.out}. Next: python sample.py {flag} "
            + shlex.quote(args.out), True)


class Run:
    """A training in progress. Random numbers come from (seed, step, part of the batch) alone: so a
    resumed run does what it would have done, and N processes what --accumulate N does in one. A
    step looks at no number on the device (but for the bound), so that a GPU never waits.

    The maths: step, add_gradient, batch, losses, descend. The rest keeps the books."""

    def __init__(self, args):
        self.args, self.device, (self.rank, self.world, _) = args, pick_device(args.device), ranks()
        device, gpu, parts = self.device, self.device.type == "cuda", self.world * args.accumulate
        self.say = data.progress if self.rank == 0 else lambda *_: None
        if args.batch_size % parts:
            raise ValueError(f"--batch-size {args.batch_size} does not divide into {parts} parts")
        if gpu:
            torch.cuda.set_stream(torch.cuda.Stream())      # the default one cannot be recorded
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if self.rank == 0:
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
            other = read_checkpoint(args.init)[2]
            differ = [f"--{k} {v}" for k, v in other["settings"].items() if v != vars(args)[k]
                      and k in ("channels", "multipliers", "blocks", "attention", "patch", "block",
                                "embedding", "conditional", "classifier", "variance")]
            with data.named_errors(f"--init {args.init} has another network {', '.join(differ)}"):
                self.network.load_state_dict(other["ema"])
        self.average = copy.deepcopy(self.network).eval()
        self.weights, self.averages = (list(n.parameters()) for n in (self.network, self.average))
        self.lr = torch.tensor(args.lr, device=device)
        self.optimizers = make_optimizers(self.network, self.lr, args.optimizer == "muon")
        self.importance, self.seen = ImportanceSampler(args.timesteps), []
        self.dtype = pick_dtype(args.precision, device, args, self.shape)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.done, self.own_file = 0, None
        if args.resume:
            self.restore()
        self.n = torch.tensor(float(self.done), device=device)
        self.loss_sum, self.skipped, self.skipped_in_a_row = torch.zeros(3, device=device)
        self.model = torch.compile(self.network) if args.compile else self.network
        if self.world > 1:
            self.model = DistributedDataParallel(self.model)
        can_record = gpu and parts == 1 and not args.compile and args.loss in ("mse", "l1", "huber")
        self.record_at = self.done + 3 if can_record else None
        if device.type == "cpu" and self.world == 1 and not args.threads:
            args.threads = faster_threads(lambda: self.losses(*self.batch()).mean().backward())
            self.network.zero_grad()
            self.seen.clear()
        torch.set_num_threads(threads := args.threads or torch.get_num_threads())
        cores = f", {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
        size, parameters = "x".join(map(str, self.shape)), sum(w.numel() for w in self.weights)
        self.say(f"{len(images):,} images {size}{', half of them mirrored' * args.flip}, "
                 f"{parameters:,} parameters, {device}, {str(self.dtype)[6:]}{cores}, "
                 f"steps {self.done} to {args.steps} of {args.batch_size} images", True)
        self.log = open_log(args.log, self.done) if args.log and self.rank == 0 else None
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
            torch.manual_seed(random_stream(self.args.seed, self.done, self.rank * parts + k))
            self.add_gradient(last=k == parts - 1)
        self.done += 1

    def add_gradient(self, last):
        """The gradient of a part of the batch; after the last part, the step along it."""
        if self.world > 1:
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
            everyone = [self.seen] * self.world
            if self.world > 1:
                dist.all_gather_object(everyone, self.seen)
            for seen in everyone:
                for t, loss in seen:
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
        if self.log:
            print(f"{done},{loss:.6g},{lr:.6g},{speed:.1f}", file=self.log, flush=True)

    def save(self):
        """Write --out, which is always whole, the old or the new; another run's file is kept."""
        args, path = self.args, self.args.out
        if self.rank > 0 or int(self.skipped_in_a_row) == self.done:
            return
        if not all(torch.isfinite(w).all() for w in self.weights):
            raise ValueError("the weights are not finite, and not saved. Try a lower --lr")
        if os.path.exists(path) and os.stat(path).st_mtime_ns != self.own_file:
            data.keep_older(path)
        training = {"model": self.network.state_dict(), "scaler": self.scaler.state_dict(),
                    "optimizers": [each.state_dict()["state"] for each in self.optimizers],
                    "importance": self.importance.losses}
        settings = {k: v for k, v in vars(args).items() if k not in NOT_KEPT}
        checkpoint = {"format": FORMAT, "settings": settings, "source": self.source,
                      "shape": self.shape, "classes": self.classes, "step": self.done,
                      "ema": self.average.state_dict()}
        with data.atomic(path) as file:
            torch.save(checkpoint if args.slim else {**checkpoint, "training": training}, file)
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


def open_log(path, step):
    """A CSV file to append to, without what an interrupted run wrote after `step`."""
    rows = ["step,loss,learning_rate,images_per_second\n"]
    if step > 0 and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            rows += [row for row in file if row[0].isdigit() and int(row.split(",")[0]) <= step]
    elif os.path.exists(path):
        data.keep_older(path)
    with data.atomic(path) as file:
        file.write("".join(rows).encode())
    return open(path, "a", encoding="utf-8")


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
        skip = self.found_inf > 0
        for w in weights:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        # On a GPU all matrices are one batch, filled up with zeros, which stay zeros: few kernels.
        for batch in [weights] if lr.is_cuda else [[w] for w in weights]:
            momenta = [self.state[w]["momentum"] for w in batch]
            gradients = [torch.where(skip, m, w.grad) for m, w in zip(momenta, batch)]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            gradients = torch._foreach_lerp(gradients, momenta, 0.95)       # Nesterov's look ahead
            matrices = [g.flatten(1) for g in gradients]
            matrices = [G.T if len(G) > G.shape[1] else G for G in matrices]
            m, n = (max(G.shape[k] for G in matrices) for k in (0, 1))
            padded = matrices[0][None]
            if len(batch) > 1:
                padded = torch.zeros(len(batch), m, n, device=lr.device)
                for P, G in zip(padded, matrices):
                    P[:len(G), :G.shape[1]] = G
            for w, P, G in zip(batch, orthogonal(padded), matrices):
                direction = P[:len(G), :G.shape[1]]
                direction = direction.T if len(w) > w[0].numel() else direction
                size = torch.where(skip, 0, lr) * 0.2 * math.sqrt(G.shape[1])
                w.addcmul_(direction.reshape(w.shape), size, value=-1)


def orthogonal(G):
    """Nearly the orthogonal matrices nearest to G (B, m, n), m <= n: five steps of a polynomial
    that pushes singular values towards 1 (0.7 to 1.2 come out, less if they are tiny)."""
    G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                      # G <- 3.4445 G - 4.7750 A G + 2.0315 A A G
        A = G @ G.mT
        G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), G, beta=3.4445)
    return G


class ImportanceSampler:
    """Draws t with p_t proportional to sqrt(E[L_t^2]), for a less noisy bound (iDDPM Eq. 18), once
    each t has `history` losses for the mean E. Before, and in 1 draw of 1000, p_t is uniform."""

    def __init__(self, timesteps, history=10):
        self.losses = torch.full((timesteps, history), -1.0)            # newest first; -1: none yet

    def draw(self, n):
        """t (n,) in 1..T, and weights (n,) = 1 / (T p_t) that undo the choice in a mean."""
        p = self.losses.double().square().mean(1).sqrt() + 1e-30
        p = torch.ones_like(p) if (self.losses < 0).any() else p
        p = 0.999 * p / p.sum() + 0.001 / len(p)
        t = torch.multinomial(p, n, replacement=True)
        return t + 1, (1 / (len(p) * p[t])).float()

    def remember(self, t, loss):
        """A loss at t, a number, in place of the oldest one there, if it is finite."""
        if math.isfinite(loss):
            self.losses[t - 1] = self.losses[t - 1].roll(1)
            self.losses[t - 1, 0] = max(loss, 0)


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


def ranks():
    """This process's number, how many there are, its number on this machine (from torchrun)."""
    get = os.environ.get
    return int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0))


def pick_device(name):
    """The device of that name, tried out, or the best there is; under torchrun, a GPU each."""
    _, world, local = ranks()
    mps = torch.backends.mps.is_available() and world == 1
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    with data.named_errors(f"--device {name} does not work here, try --device cpu"):
        device = torch.device(name)
        if world > 1 and (device.index is not None or device.type == "mps"):
            raise ValueError("torchrun's processes take a GPU each (cuda) or share the CPU")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")      # TF32, as convolutions have it anyway
        return device


def pick_dtype(precision, device, settings, shape):
    """What autocast computes in; auto: bf16 where the hardware has units for it, else fp32."""
    smallest = min(shape[1:]) / (settings.patch * 2 ** (len(settings.multipliers) - 1))
    if precision == "auto" and device.type == "cpu" and smallest <= 1:
        precision = "fp32"      # torch's bf16 convolutions give NaN on the way to maps 1 pixel wide
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        units = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                 else device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
        precision = "bf16" if units else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def faster_threads(work):
    """One thread or all, whichever does work() sooner: on a busy machine, often one."""
    def seconds(threads):
        torch.set_num_threads(threads)
        work()
        return timeit.timeit(work, number=4)

    return min({torch.get_num_threads(), 1}, key=seconds)


def run_script(main):
    """Run a script's main. What is wrong with a file, flag or machine is one line, no traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", "Grad strides do not match")          # of 1 x 1 convolutions
    torch.empty(2**25 - 2**16, dtype=torch.uint8)   # freed, it makes glibc reuse memory: faster
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error)
        if isinstance(error, MemoryError) or "allocate" in reason:
            reason = "out of memory. Try a smaller --batch-size, or a smaller network"
        elif type(error).__module__.startswith("torch._"):
            reason = f"--compile does not work here: {reason.splitlines()[0]}"
        elif isinstance(error, RuntimeError):
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {reason}")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda: train(parse_args()))
