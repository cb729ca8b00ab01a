"""Algorithm 1 on real data.

    python train.py                                  Fashion-MNIST, in minutes on a laptop
    python train.py --resume                         go on after Ctrl-C, a crash, a reboot
    torchrun --nproc-per-node=8 -- train.py          the same on eight GPUs

It writes ddpm.pt, from which sample.py draws.
"""
import argparse
import contextlib
import copy
import datetime
import math
import os
import signal
import sys
import time
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
PER_RUN = {"data_dir", "out", "save_every", "slim", "resume", "init", "log", "preview", "device",
           "compile"}                   # flags in which a run and its continuation may differ


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and whose complaint is a ValueError."""

    def section(self, title):
        """-> a function that adds a flag: its default, unless None, tells its type."""
        group = self.add_argument_group(title)

        def flag(name, default, help, **options):
            if default is False:
                options["action"] = "store_true"
            elif "choices" not in options and "action" not in options:
                options.setdefault("type", {int: whole, float: number}.get(type(default), str))
            shown = "" if default in (None, False, True, "") else f" (default: {default})"
            group.add_argument(name, default=default, help=help.strip() + shown, **options)

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
    """The settings, checked; with --resume, those of the checkpoint that is gone on from."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path, choices = os.path.expanduser, ddpm.CHOICES
    flag = parser.section("data")
    flag("--dataset", "fashion-mnist", "mnist, cifar10, a FILE.npy or an IDX file", type=path)
    flag("--data-dir", "data", "where data are looked for, or downloaded to", type=path)
    flag("--only", None, "train on one class, by name or index", metavar="LABEL")
    flag("--flip", None, "mirror half of the images (default: cifar10 only, as in the paper)",
         action=argparse.BooleanOptionalAction)
    flag = parser.section("diffusion")
    flag("--timesteps", 1000, "T (paper: 1000)")
    flag("--schedule", None, "paper: linear (default: cosine)", choices=("cosine", "linear"))
    flag("--beta-start", None, "beta_1 if linear (paper: 1e-4; default: 0.1 / T)", type=number)
    flag("--beta-end", None, "beta_T if linear (paper: 0.02; default: 20 / T)", type=number)
    flag("--prediction", "eps", "paper: eps", choices=choices["prediction"])
    flag("--variance", "beta", "paper: beta or posterior", choices=choices["variance"])
    flag("--loss", None, "paper: mse, L_simple (default: mse, or hybrid with a learned variance)",
         choices=choices["loss"])
    flag = parser.section("network")
    flag("--channels", 32, "at the highest resolution (paper: 128)")
    flag("--multipliers", "1,2", "of the channels, by resolution (paper: 1,2,2,2)", type=numbers)
    flag("--blocks", 1, "residual blocks per resolution (paper: 2)")
    flag("--attention", "", "sizes of feature maps that get it, besides the middle (paper: 16)",
         type=numbers)
    flag("--heads", 1, "of the attention (paper: 1)")
    flag("--dropout", 0.0, "in the residual blocks (paper: 0.1)")
    flag("--patch", 2, "pixels gathered along each side (paper: 1)")
    flag("--block", "resnet", "paper: resnet", choices=("resnet", "convnext"))
    flag("--embedding", "add", "how blocks are told t (paper: add)", choices=("add", "scale-shift"))
    flag("--conditional", False, "learn labels, for --label and --guidance of sample.py")
    flag("--label-dropout", 0.1, "share of labels hidden, for guidance")
    flag("--classifier", False, "train a classifier of noisy images instead")
    flag = parser.section("optimisation")
    flag("--steps", 5500, "of the optimiser (paper: 800,000)")
    flag("--batch-size", 64, "of all processes together (paper: 128)")
    flag("--accumulate", 1, "parts to compute a batch in, to save memory")
    flag("--optimizer", "muon", "paper: adam", choices=("muon", "adam"))
    flag("--lr", None, "after the warm-up; it then falls to 0 (paper: 2e-4, constant; default: 0.01 "
         "for muon, 0.005 for adam)", type=number)
    flag("--warmup", 100, "steps over which the rate rises", type=int)
    flag("--ema", 0.999, "decay of the averaged weights (paper: 0.9999)")
    flag("--precision", "auto", "auto: bf16 where the hardware has units for it (paper: fp32)",
         choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network: a minute's wait")
    flag("--checkpointing", False, "compute blocks twice, to save memory")
    flag("--seed", 0, "of everything random", type=int)
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best there is)")
    flag("--threads", None, "of the CPU (default: one or all, what is faster now)", type=whole)
    flag = parser.section("output")
    flag("--out", None, "checkpoint (default: ddpm.pt, or classifier.pt)", type=path)
    flag("--save-every", 1000, "steps between checkpoints")
    flag("--slim", False, "save the averaged weights alone, to sample from")
    flag("--resume", False, "go on from --out, with its settings, exactly")
    flag("--init", None, "checkpoint whose averaged weights to begin with", type=path)
    flag("--log", None, "CSV file of step, loss, learning rate, images/s", type=path)
    flag("--preview", None, "picture of 16 samples, at every checkpoint", type=path)

    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    args = argparse.Namespace(**{**defaults, **given})
    args.out = args.out or ("classifier.pt" if args.classifier else "ddpm.pt")
    if args.resume:
        old = read_checkpoint(args.out)["settings"]
        for k in given.keys() & old.keys() - {"dataset", "steps", "threads"}:
            if given[k] != old[k]:
                raise ValueError(f"--resume keeps the settings of {args.out}, but {k} was {old[k]} and "
                                 f"is {given[k]}. To begin anew with its weights: --init")
        vars(args).update({k: v for k, v in old.items() if k not in given})
    complete(args)
    return args


def complete(args):
    """Fill in the defaults that depend on other settings; refuse what would cost hours."""
    args.lr = {"muon": 0.01, "adam": 0.005}[args.optimizer] if args.lr is None else args.lr
    if not args.multipliers or not 0 < args.lr or min(args.warmup, args.seed) < 0 or max(
            args.dropout, args.ema, args.label_dropout) >= 1:
        raise ValueError("--lr is above 0, --warmup and --seed at least 0, --dropout, --ema and "
                         "--label-dropout below 1, and --multipliers like 1,2")
    linear = args.beta_start is not None or args.beta_end is not None
    args.schedule = args.schedule or ("linear" if linear else "cosine")
    if args.schedule == "linear":           # the paper's ends, scaled so that any T ends in noise
        args.beta_start = 0.1 / args.timesteps if args.beta_start is None else args.beta_start
        args.beta_end = 20 / args.timesteps if args.beta_end is None else args.beta_end
    elif linear:
        raise ValueError("--beta-start and --beta-end belong to --schedule linear")
    learned = args.variance.startswith("learned")
    args.loss = args.loss or ("hybrid" if learned else "mse")
    if learned and args.loss not in ("vlb", "hybrid"):
        raise ValueError(f"--loss {args.loss} does not train --variance {args.variance}: use hybrid")
    if bool(args.only) + args.conditional + args.classifier > 1:
        raise ValueError("--only, --conditional and --classifier exclude each other")
    if args.flip is None:
        args.flip = args.dataset in data.DATASETS and data.DATASETS[args.dataset].flip
    make_diffusion(args)


# ------------------------------------------------------------------------------- the training loop


def train(args):
    """Algorithm 1, until --steps are taken or someone stops it."""
    run = Run(args)
    if run.done >= args.steps:
        return run.say(f"{args.out} has all {run.done} steps. To go on: --steps {2 * run.done}")
    signals = catch_signals()
    while run.done < args.steps and not run.told_to_stop(signals):          # 1: repeat
        run.step()                                                          # 2-5
        run.report()
        if run.done % args.save_every == 0:
            run.save()
    run.save()                                                              # 6: until converged
    if run.done < args.steps:
        run.say(f"stopped at step {run.done}, saved in {args.out}. To go on: --resume")
        sys.exit(128 + signals[0] if signals else 1)
    flag = "--score" if args.classifier else "--checkpoint"
    run.say(f"averaged weights are in {args.out}. Next: python sample.py"
            + ("" if args.out == "ddpm.pt" else f" {flag} {args.out}"))


def catch_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP go into, so that the step in hand is finished and
    saved. A second Ctrl-C ends at once; under torchrun SIGTERM may come twice."""
    signals = []

    def remember(number, _):
        if signals and number == signal.SIGINT:
            sys.exit(1)
        signals.append(number)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:                      # nohup ignores SIGHUP
            signal.signal(number, remember)
    return signals


class Run:
    """A training in progress.

    Random numbers come from (seed, step, part of the batch) alone. So a resumed run does what it
    would have done, N processes do what --accumulate N does in one, and no stream is saved.
    Between two reports nothing looks at a number on the device, so that a GPU never has to wait.
    """

    def __init__(self, args):
        self.args, self.device, (self.rank, self.world, _) = args, pick_device(args.device), ranks()
        parts = self.world * args.accumulate
        if args.batch_size % parts:
            raise ValueError(f"--batch-size {args.batch_size} does not divide into {parts} parts")
        self.part_size, gpu = args.batch_size // parts, self.device.type == "cuda"
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, device_id=self.device if gpu else None)
        if self.rank == 0:
            data.check_outputs((args.out, args.log, args.preview), (args.dataset, args.init))
        images, labels, self.classes = data.load_with_classes(args.dataset, "train", args.data_dir,
                                                              args.only)
        if (args.conditional or args.classifier) and len(self.classes) < 2:
            raise ValueError(f"{args.dataset} has no labels of two classes or more")
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.shape, self.source = tuple(images.shape[1:]), {
            "dataset": args.dataset, "images": len(images),
            "fingerprint": data.fingerprint(images, labels)}

        torch.manual_seed(args.seed)
        self.diffusion = make_diffusion(args).to(self.device)
        self.network = to_device(make_network(args, self.shape, self.classes), self.device)
        if args.init:
            weights = load_checkpoint(args.init, "cpu", args.classifier)[0].state_dict()
            with data.named_errors(f"--init {args.init} has another network"):
                self.network.load_state_dict(weights)
        self.average = copy.deepcopy(self.network).eval()
        self.weights, self.averages = (list(n.parameters()) for n in (self.network, self.average))
        self.lr = torch.full((), args.lr, device=self.device)
        self.optimizers = make_optimizers(self.network, self.lr, args.optimizer == "muon")
        self.importance = ImportanceSampler(args.timesteps)
        self.dtype = pick_dtype(args.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.done, self.own_file, self.seen = 0, None, []
        if args.resume:
            self.restore()
        self.model = torch.compile(self.network) if args.compile else self.network
        if self.world > 1:
            self.model = DistributedDataParallel(self.model, [self.device] if gpu else None)
        if args.threads is None and self.device.type == "cpu" and self.world == 1:
            args.threads = faster_threads(lambda: self.losses(*self.batch()).mean().backward())
            self.network.zero_grad()
        torch.set_num_threads(args.threads or torch.get_num_threads())
        if gpu:                                         # a step is recorded on a stream of its own
            torch.cuda.set_stream(torch.cuda.Stream())
        self.log = open_log(args.log, self.done) if args.log and self.rank == 0 else None
        self.n, self.loss_sum, self.skipped, self.skipped_in_a_row = (      # counted on the device
            torch.full((), x, device=self.device) for x in (float(self.done), 0.0, 0.0, 0.0))
        self.first = self.reported = self.done
        self.reported_at = time.perf_counter()
        self.say(f"{len(images):,} images {'x'.join(map(str, self.shape))}"
                 f"{', half of them mirrored' * args.flip}, "
                 f"{sum(w.numel() for w in self.weights):,} parameters, {self.device}, "
                 f"{str(self.dtype)[6:]}, {torch.get_num_threads()} threads, "
                 f"steps {self.done} to {args.steps} of {args.batch_size} images")

    def step(self):
        """Lines 2 to 5 of Algorithm 1, for this process's parts of the batch."""
        can_be_recorded = (self.device.type == "cuda" and self.world == self.args.accumulate == 1
                           and not self.args.compile and self.args.loss in ("mse", "l1", "huber"))
        if can_be_recorded and self.done == self.first + 3:
            self.record()
        for k in range(self.args.accumulate):
            part = self.rank * self.args.accumulate + k
            torch.manual_seed(random_stream(self.args.seed, self.done, part))
            self.add_gradient(last=k == self.args.accumulate - 1)
        self.done += 1

    def add_gradient(self, last):
        """The gradient of a part of the batch; after the last part, the step along it."""
        x_0, y = self.batch()                                           # 2: x_0 ~ q(x_0)
        with contextlib.nullcontext() if last or self.world == 1 else self.model.no_sync():
            loss = self.losses(x_0, y).mean() / self.args.accumulate    # 3-5: see training_losses
            self.scaler.scale(loss).backward()                          # 5: take gradient
        self.loss_sum += loss.detach()
        if last:
            self.descend()                                              #    descent step

    def record(self):
        """From now on replay a step as one CUDA graph: its many small kernels take longer to launch
        than to run. A replay draws its random numbers from the seed that is set before it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self.add_gradient(last=True)
        self.add_gradient = lambda last: graph.replay()

    def batch(self):
        """Images drawn with replacement, in [-1, 1], and their labels, some of them hidden."""
        index = torch.randint(len(self.images), (self.part_size,), device=self.device)
        x_0, y = data.to_model(self.images[index]), self.labels[index]
        if self.args.flip:
            mirrored = torch.rand(len(x_0), 1, 1, 1, device=self.device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
        if self.args.conditional:
            hidden = torch.rand(len(y), device=self.device) < self.args.label_dropout
            y = y.masked_fill(hidden, len(self.classes))
        return x_0, y

    def losses(self, x_0, y):
        """What is minimised, for each image, (B,)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.args.classifier:
                return classifier_losses(self.model, self.diffusion, x_0, y)
            model = lambda x_t, t: self.model(x_t, t, y if self.args.conditional else None)
            if self.args.loss != "vlb":
                return self.diffusion.training_losses(model, x_0)
            t, weights = self.importance.draw(len(x_0))
            losses = self.diffusion.training_losses(model, x_0, t.to(self.device))
            self.seen.append(torch.stack([t.float(), losses.detach().cpu()], dim=1))
            return losses * weights.to(self.device)

    def descend(self):
        """A step along the gradient, its norm held to 1, and into the average of the weights. If
        the gradient is not finite, the step is left out and counted."""
        self.lr.copy_(learning_rate(self.n, self.args.steps, self.args.lr, self.args.warmup))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        bad = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(self.weights, 1.0))
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()           # they then leave their weights as they are
            optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        decay = torch.clamp((1 + self.n) / (10 + self.n), max=self.args.ema)    # forget the start
        update_ema(self.averages, self.weights, decay)
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        self.n += 1
        if self.seen:
            everyone, self.seen = [torch.cat(self.seen)] * self.world, []
            if self.world > 1:
                dist.all_gather(everyone := [x.clone() for x in everyone], everyone[0].clone())
            for t, loss in torch.cat(everyone):
                self.importance.remember(int(t), loss)

    def told_to_stop(self, signals):
        """Whether to stop. Processes ask each other, on the CPU, so that all stop at one step."""
        told = torch.tensor(len(signals))
        if self.world > 1:
            dist.all_reduce(told)
        return told.item() > 0

    def say(self, text, final=True):
        if self.rank == 0:
            data.progress(text, final)

    def report(self):
        """Once a second, and at the end: say how it goes. ValueError if it does not go at all."""
        seconds, last = time.perf_counter() - self.reported_at, self.done == self.args.steps
        if seconds < 1 and not last:
            return
        steps = self.done - self.reported
        loss, skipped, in_a_row, lr = torch.stack(
            [self.loss_sum / steps, self.skipped, self.skipped_in_a_row, self.lr]).tolist()
        self.loss_sum.zero_()
        self.reported, self.reported_at = self.done, time.perf_counter()
        if in_a_row >= 100 or last and skipped == self.args.steps:
            raise ValueError(f"the gradient has not been finite for {in_a_row:.0f} steps, which are "
                             "not saved. Try a lower --lr, or --precision fp32")
        left = datetime.timedelta(seconds=round((self.args.steps - self.done) * seconds / steps))
        speed = steps * self.args.batch_size / seconds
        self.say(f"step {self.done}/{self.args.steps}  loss {loss:.4f}  {speed:.0f} images/s  "
                 f"{left} left" + f"  {skipped:.0f} steps skipped" * (skipped > 0), final=last)
        if self.log:
            print(f"{self.done},{loss:.6g},{lr:.6g},{speed:.1f}", file=self.log, flush=True)

    def save(self):
        """Write the checkpoint: --out is always a complete one, the old or the new. A file that
        another run put there is kept under another name."""
        path = self.args.out
        if self.rank > 0 or self.done == 0 or int(self.skipped_in_a_row) > 0:
            return
        if not all(torch.isfinite(w).all() for w in self.weights):
            raise ValueError("the weights are no longer finite, and not saved. Try a lower --lr")
        if os.path.exists(path) and os.stat(path).st_mtime_ns != self.own_file:
            data.keep_older(path)
        checkpoint = {
            "format": FORMAT, "shape": self.shape, "classes": self.classes, "source": self.source,
            "settings": {k: v for k, v in vars(self.args).items() if k not in PER_RUN},
            "step": self.done, "ema": self.average.state_dict()}
        if not self.args.slim:
            checkpoint["training"] = {
                "model": self.network.state_dict(), "scaler": self.scaler.state_dict(),
                "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
                "importance": self.importance.losses}
        with data.atomic(path) as file:
            torch.save(checkpoint, file)
        self.own_file = os.stat(path).st_mtime_ns
        if self.args.preview:
            y = torch.arange(16, device=self.device) % len(self.classes)
            model = lambda x_t, t: self.average(x_t, t, y if self.args.conditional else None)
            x_0 = self.diffusion.ddim_sample(model, (16, *self.shape), min(20, self.args.timesteps),
                                             generator=torch.Generator().manual_seed(0))
            data.save_image(self.args.preview, x_0, zoom=2)

    def restore(self):
        """Go on from --out. ValueError if it has other data, or is damaged."""
        path = self.args.out
        average, _, checkpoint = load_checkpoint(path, "cpu", self.args.classifier)
        if checkpoint["source"]["fingerprint"] != self.source["fingerprint"]:
            raise ValueError(f"{path} was trained on other data, {checkpoint['source']['images']:,} "
                             "images: name them with --dataset, or begin with its weights, --init")
        if "training" not in checkpoint:
            raise ValueError(f"{path} was saved with --slim and cannot be resumed; but see --init")
        with data.named_errors(f"{path} is damaged"):
            training = checkpoint["training"]
            self.average.load_state_dict(average.state_dict())
            self.network.load_state_dict(training["model"])
            for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                optimizer.param_groups[0]["lr"] = self.lr
            self.scaler.load_state_dict(training["scaler"])
            self.importance.losses.copy_(training["importance"])
        self.done, self.own_file = checkpoint["step"], os.stat(path).st_mtime_ns


def classifier_losses(model, diffusion, x_0, y):
    """-log p(y | x_t) (B,): t uniform on 0..T, and a quarter of all at 0, where --score looks."""
    t = torch.randint(0, diffusion.timesteps + 1, (len(x_0),), device=x_0.device)
    t = t * (torch.rand(len(x_0), device=x_0.device) > 0.25)
    x_t = torch.where((t > 0)[:, None, None, None], diffusion.q_sample(x_0, t.clamp(min=1)), x_0)
    return F.cross_entropy(model(x_t, t), y, reduction="none")


def random_stream(*numbers):
    """A seed of its own for every (seed, step, part)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def open_log(path, step):
    """A CSV file to append to, without what an interrupted run wrote after `step`."""
    kept = "step,loss,learning_rate,images_per_second\n"
    if step > 0 and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept += "".join(line for line in file if line.endswith("\n") and line[0].isdigit()
                            and int(line.split(",")[0]) <= step)
    with data.atomic(path) as file:
        file.write(kept.encode())
    return open(path, "a", encoding="utf-8")


# --------------------------------------------------------------------- rate, average, optimiser, t


def learning_rate(n, steps, peak, warmup):
    """The rate of step n = 0, 1, .. (a tensor): up in a straight line, then down to 0 in another."""
    return peak * torch.minimum((n + 1) / (warmup + 1), (steps - n) / max(steps - warmup, 1))


@torch.no_grad()
def update_ema(average, weights, decay):
    """average <- decay average + (1 - decay) weights, in place."""
    difference = torch._foreach_sub(weights, average)
    torch._foreach_mul_(difference, 1 - decay)
    torch._foreach_add_(average, difference)


def make_optimizers(network, lr, muon):
    """Adam, and if `muon`, Muon for the convolutions between feature maps. lr is a 0-dim tensor."""
    by_muon = [w for name, w in network.named_parameters() if muon and w.ndim == 4
               and w.shape[1] > 1 and "conv_in" not in name and "conv_out" not in name]
    by_adam = [w for w in network.parameters() if all(w is not v for v in by_muon)]
    # beta_2 = 0.99: Adam's 0.999 would average over most of a run of minutes.
    adam = torch.optim.Adam(by_adam, lr, (0.9, 0.99), fused=True, capturable=lr.is_cuda)
    return [adam, Muon(by_muon, lr)] if by_muon else [adam]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, so that all directions of a weight matrix (C_out, C_in kh kw) learn
    at one pace (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in steps of Adam's size
    (Liu et al. 2025, 2502.16982). torch.optim.Muon takes no convolutions.
    """

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """One step, unless self.found_inf, on the device, is 1, as with torch's fused optimisers."""
        lr, skip = self.param_groups[0]["lr"], self.found_inf > 0
        batches = {}                        # on a GPU, weights of one shape are one batch
        for w in self.param_groups[0]["params"]:
            batches.setdefault(w.flatten(1).shape if w.is_cuda else w, []).append(w)
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        for weights in batches.values():
            momenta = [self.state[w]["momentum"] for w in weights]
            gradients = [torch.where(skip, m, w.grad) for m, w in zip(momenta, weights)]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            gradients = torch._foreach_lerp(gradients, momenta, 0.95)       # Nesterov's look ahead
            G = torch.stack([g.flatten(1) for g in gradients])
            G = orthogonal(G) if G.shape[1] <= G.shape[2] else orthogonal(G.mT).mT
            size = torch.where(skip, 0, lr) * 0.2 * math.sqrt(max(G.shape[1:]))
            for w, direction in zip(weights, G):
                w.sub_(size * direction.reshape(w.shape))


def orthogonal(G):
    """Nearly the orthogonal matrices nearest to G (B, m, n), m <= n: five steps of a polynomial
    that pushes singular values towards 1 (0.7 to 1.2 come out; less of those that are tiny)."""
    G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                      # G <- 3.4445 G - 4.7750 A G + 2.0315 A A G
        A = G @ G.mT
        G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), G, beta=3.4445)
    return G


class ImportanceSampler:
    """Draws t with p_t proportional to sqrt(E[L_t^2]), for a less noisy bound (iDDPM Eq. 18).

    E is over the last `history` losses at t; t is uniform until each has so many, and once in a
    thousand draws ever after."""

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
        """A loss at t, a 0-dim tensor, in place of the oldest one there, if it is finite."""
        if torch.isfinite(loss):
            self.losses[t - 1] = torch.cat([loss.clamp(min=0)[None], self.losses[t - 1, :-1]])


# ------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(path):
    """A checkpoint's dict. Nothing in the file is run. ValueError says what is wrong with it."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no {path}: make it with python train.py, or name another one")
    with data.named_errors(f"{path} is no checkpoint of train.py, or damaged"):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it unpacks to more than its size")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"this train.py reads {FORMAT!r} only")
        return checkpoint


def load_checkpoint(path, device, classifier=False):
    """A checkpoint of train.py -> (model with EMA weights, diffusion, the checkpoint's dict).

    The model is a UNet (x, t, y), or if asked for a classifier (x, t), in eval mode on `device`.
    """
    checkpoint = read_checkpoint(path)
    with data.named_errors(f"{path} is no checkpoint of train.py, or damaged"):
        args, (C, H, W) = argparse.Namespace(**checkpoint["settings"]), checkpoint["shape"]
        if C not in (1, 3) or not 0 < min(H, W) <= max(H, W) <= data.LARGEST_SIDE:
            raise ValueError("its shape is not that of images")
        with torch.device("meta"):          # takes no memory, whatever the settings ask for
            network = make_network(args, (C, H, W), checkpoint["classes"])
        if sum(w.nbytes for w in network.parameters()) > os.path.getsize(path):
            raise ValueError("its weights are larger than itself")
        network = network.to_empty(device="cpu")
        network.load_state_dict(checkpoint["ema"])
        if not all(torch.isfinite(w).all() for w in network.parameters()):
            raise ValueError("it has weights that are not finite")
        diffusion = make_diffusion(args)
    if args.classifier != classifier:
        kind = "a classifier, and no ddpm" if args.classifier else "a ddpm, and no classifier"
        raise ValueError(f"{path} holds {kind}: see train.py --classifier")
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


# ---------------------------------------------------------------------------------------- machines


def to_device(network, device):
    """The network there, its convolutions laid out as a GPU computes them."""
    gpu = torch.device(device).type == "cuda"
    return network.to(device, memory_format=torch.channels_last if gpu else torch.preserve_format)


def ranks():
    """This process's number, how many there are, its number on this machine (from torchrun)."""
    return tuple(int(os.environ.get(*each)) for each in
                 (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))


def pick_device(name):
    """The device of that name, tried out, or the best there is; under torchrun, a GPU each."""
    _, world, local = ranks()
    mps = torch.backends.mps.is_available() and world == 1
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if world > 1 and (device.index is not None or device.type == "mps"):
            raise ValueError("torchrun's processes take a GPU each (cuda) or share the CPU")
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")      # TF32, as convolutions have it anyway
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0][:200]}") from None


def pick_dtype(precision, device):
    """What autocast computes in; auto: bf16 where the hardware has units for it, else fp32."""
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        units = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                 else device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
        precision = "bf16" if units else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def faster_threads(work):
    """One thread or all, whichever does work() sooner: on a busy machine, threads that wait for
    each other are slower than one."""
    seconds = {}
    for threads in {torch.get_num_threads(), 1}:
        torch.set_num_threads(threads)
        work()
        began = time.perf_counter()
        for _ in range(4):
            work()
        seconds[threads] = time.perf_counter() - began
    return min(seconds, key=seconds.get)


def run_script(main):
    """Run a script's main. What is wrong with a file, flag or machine is one line, no traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", "Grad strides do not match")          # of 1 x 1 convolutions
    # malloc gives freed memory back to Linux, and waits to get it again in the next step. Once a
    # block of almost 32 MiB was freed it keeps more: a step takes a tenth less time.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith("torch._"):
            sys.exit(f"{name}: --compile does not work here: {str(error).splitlines()[0]}")
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate" in str(error):
            sys.exit(f"{name}: out of memory. Try a smaller --batch-size, or a smaller network")
        raise
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda: train(parse_args()))
