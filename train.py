"""Algorithm 1 on real data.

    python train.py                                     Fashion-MNIST on whatever this machine has: minutes on a laptop
    python train.py --resume                            go on after Ctrl-C, a reboot, or with a larger --steps
    torchrun --nproc-per-node=8 -- train.py             the same on eight GPUs; --batch-size is that of all together

It writes ddpm.pt, which sample.py draws from and `train.py --evaluate ddpm.pt` measures on the test set.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import io
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import ddpm
import unet

FORMAT = "ddpm checkpoint 3"
FREE = {"steps", "compile", "device", "data_dir", "out", "save_every", "resume", "evaluate", "exact"}    # may change on --resume

# ----------------------------------------------------------------------------------------------------- what can be set


def parse_args(argv=None):
    """The settings, checked; data.WrongChoice says what is wrong. Their types, count and so on, stand at the end of the file."""
    parser = Parser(__doc__)
    flag = parser.section("data")
    flag("--dataset", "fashion-mnist", "fashion-mnist, mnist, cifar10, or a FILE.npy of uint8 images")
    flag("--data-dir", "data", "folder where data sets are looked for first, and downloaded to")
    flag("--only", None, "train on the images of one class, by name or index", metavar="LABEL")
    flag("--flip", None, "mirror half of the images (the paper: CIFAR-10 yes; default here: cifar10 and .npy yes, others no: "
         "most shoes face one way)", action=argparse.BooleanOptionalAction)

    flag = parser.section("diffusion")
    flag("--timesteps", 1000, "T, the number of steps from image to noise (the paper: 1000)", type=count(1, 10**6))
    flag("--schedule", None, "of beta_t: iDDPM's cosine, or linear, the paper's (default: cosine, which took 12 to 26 per cent "
         "off the Frechet distance after 2000 steps; linear if --beta-start or --beta-end is given)",
         choices=("cosine", "linear"))
    flag("--beta-start", None, "beta_1 of the linear schedule (default: 0.0001, the paper's)", type=float)
    flag("--beta-end", None, "beta_T of the linear schedule (default: 0.02, the paper's)", type=float)
    flag("--beta-min", 0.0, "clip the cosine schedule's betas from below", type=FRACTION)
    flag("--beta-max", 0.999, "and from above", type=POSITIVE)
    flag("--prediction", "eps", "what the network predicts (the paper: eps)", choices=ddpm.CHOICES["prediction"])
    flag("--variance", "beta", "sigma_t^2 of the reverse process; learned_range is iDDPM's", choices=ddpm.CHOICES["variance"])
    flag("--loss", "mse", "mse is the paper's L_simple; vlb draws t by its loss (iDDPM Eq. 18)", choices=ddpm.CHOICES["loss"])

    flag = parser.section("network")
    flag("--channels", 32, "at the highest resolution (the paper: 128)", type=count(1, 2**14))
    flag("--multipliers", "1,2", "channels of each resolution, times --channels (the paper: 1,2,2,2)", type=numbers)
    flag("--blocks", 1, "residual blocks per resolution (the paper: 2)", type=count(1, 64))
    flag("--attention", "", "sizes of the feature maps that get attention, e.g. 7,14; the middle always does (the paper: 16)",
         type=numbers)
    flag("--heads", 1, "of the attention", type=count())
    flag("--dropout", 0.0, "in the residual blocks (the paper: 0.1 on CIFAR-10)", type=FRACTION)
    flag("--patch", 2, "pixels gathered into one along each side (the paper: 1)", type=count(1, 64))
    flag("--block", "resnet", "kind of residual block", choices=("resnet", "convnext"))
    flag("--embedding", "add", "how a block is told t", choices=("add", "scale-shift"))
    flag("--conditional", False, "learn the labels too, for --label and --guidance of sample.py")
    flag("--label-dropout", 0.1, "share of labels hidden in training, for guidance", type=FRACTION)
    flag("--classifier", False, "train a classifier of noisy images instead, for sample.py's --classifier and --score")

    flag = parser.section("optimisation")
    flag("--steps", 5500, "optimiser steps (the paper: 800000)", type=count())
    flag("--batch-size", 64, "images per step, of all processes together (the paper: 128)", type=count())
    flag("--accumulate", 1, "compute each batch in this many parts, to save memory", type=count())
    flag("--optimizer", "muon", "adam is the paper's; muon, orthogonalised momentum for convolutions, took 21 to "
         "33 per cent off the Frechet distance after 2000 steps", choices=("muon", "adam"))
    flag("--lr", None, "learning rate after the warm-up; it then falls to 0 (default: 0.01 for muon, 0.005 for adam; the paper: "
         "0.0002, constant)", type=POSITIVE)
    flag("--warmup", 100, "steps over which the rate rises", type=count(0))
    flag("--weight-decay", 0.0, "as in AdamW", type=NOT_NEGATIVE)
    flag("--ema", 0.999, "decay of the averaged weights, which samples are drawn with (the paper: 0.9999)", type=FRACTION)
    flag("--precision", "auto", "auto: bf16 where CUDA or the CPU (AVX512-BF16, AMX) has units for it, else fp32",
         choices=("auto", "fp32", "bf16", "fp16"))
    flag("--compile", False, "torch.compile the network: a minute's wait first; meant for GPUs")
    flag("--checkpointing", False, "compute blocks twice rather than remember them: less memory, more time")
    flag("--seed", 0, "of everything random", type=SEED)
    flag("--device", None, "cpu, cuda, cuda:1, mps; default: the best there is")

    flag = parser.section("output")
    flag("--out", None, "checkpoint to write (default: ddpm.pt; classifier.pt with --classifier)", metavar="FILE.pt")
    flag("--save-every", 1000, "steps between checkpoints; there is always one at the end", type=count())
    flag("--resume", False, "go on from --out, exactly as if it had never stopped; a finished run needs a larger --steps, and "
         "its rate first jumps up again")
    flag("--evaluate", None, "measure a checkpoint on the test set instead: L_simple and bits/dim", metavar="FILE.pt")
    flag("--exact", 0, "with --evaluate: all T terms of this many images, instead of random terms of all", type=count(0),
         metavar="IMAGES")

    return settled(parser.parse_args(argv), parser)


def settled(args, parser):
    """The settings with the defaults that depend on others filled in; settings that contradict each other are refused."""
    dataset = data.known(args.dataset)
    args.lr = args.lr or {"muon": 0.01, "adam": 0.005}[args.optimizer]
    args.out = args.out or ("classifier.pt" if args.classifier else "ddpm.pt")
    if args.flip is None:
        args.flip = dataset is None or dataset.flip
    if not 1 <= len(args.multipliers) <= 12 or max(args.multipliers) > 64:
        parser.error("--multipliers: 1 to 12 of them, and none above 64")
    if any(args.channels * m % args.heads for m in args.multipliers):
        parser.error(f"--heads {args.heads} must divide --channels {args.channels} times each of --multipliers")
    if (args.conditional or args.classifier) and args.only:
        parser.error("--conditional and --classifier need several classes, and --only leaves one")
    if args.conditional and args.classifier:
        parser.error("--conditional is for a network that draws, --classifier for one that tells what it sees")
    if args.exact and not args.evaluate:
        parser.error("--exact belongs to --evaluate")
    linear = args.beta_start is not None or args.beta_end is not None
    if linear and args.schedule not in (None, "linear"):
        parser.error("--beta-start and --beta-end belong to --schedule linear")
    args.schedule = args.schedule or ("linear" if linear else "cosine")
    if args.schedule == "linear":
        args.beta_start = 1e-4 if args.beta_start is None else args.beta_start
        args.beta_end = 0.02 if args.beta_end is None else args.beta_end
    if args.schedule != "cosine" and (args.beta_min, args.beta_max) != (0.0, 0.999):
        parser.error("--beta-min and --beta-max belong to --schedule cosine")
    try:
        make_diffusion(args)
    except ValueError as error:
        parser.error(str(error))
    return args


# --------------------------------------------------------------------------------------------------- the training loop


def train(args):
    """Algorithm 1: steps, until all are taken or someone stops it; a report every second, a checkpoint now and then."""
    run = prepare(args)
    if args.resume and run.done >= args.steps:
        run.say(f"{args.out} has all its {run.done} steps. To train on: --steps {2 * run.done}", done=True)
        return dist.destroy_process_group() if run.world > 1 else None
    began = reported = time.perf_counter()
    first, losses, taken = run.done, torch.zeros((), device=run.device), 0
    with interruptions() as stopped:
        while run.done < args.steps and not stop_agreed(stopped, run):          # 1: repeat, 6: until converged
            losses, taken = losses + run.step(), taken + 1                      # 2-5
            last, now = run.done == args.steps, time.perf_counter()
            if run.skipped_in_a_row >= 100 or (last and run.skipped == run.done):
                raise ValueError(f"the gradient has not been finite for {run.skipped_in_a_row} steps; {args.out} was left as it "
                                 "was. Try a lower --lr, or --precision fp32")
            if now - reported > 1 or last:
                speed, skipped = (run.done - first) / (now - began), f"  {run.skipped} steps skipped" if run.skipped else ""
                left = datetime.timedelta(seconds=round((args.steps - run.done) / speed))
                run.say(f"step {run.done}/{args.steps}  loss {losses.item() / taken:.4f}  {speed * args.batch_size:.0f} images/s  "
                        f"{left} left{skipped}", done=last)
                reported, losses, taken = now, torch.zeros_like(losses), 0
            if run.done % args.save_every == 0 and not run.skipped_in_a_row:
                run.save(args.out)
        run.save(args.out)
    if run.world > 1:
        dist.destroy_process_group()
    if run.done < args.steps:
        run.say(f"stopped at step {run.done}, saved in {args.out}. To go on: the same command with --resume"
                if run.skipped < run.done else "stopped before the first good step; there is nothing to save", done=True)
        sys.exit(128 + stopped[0] if stopped else 1)
    taken, time_taken = run.done - first, datetime.timedelta(seconds=round(time.perf_counter() - began))
    named = "" if args.out == "ddpm.pt" else f" --checkpoint {shlex.quote(args.out)}"
    run.say(f"{taken} steps, {taken * args.batch_size:,} images, in {time_taken}; averaged weights in "
            f"{args.out}. Next: python sample.py{f' --score {shlex.quote(args.out)}' if args.classifier else named}", done=True)


def prepare(args):
    """Device, data and network: a Run that is ready for its next step, whether its first or, with --resume, a later one."""
    rank, world, local = ranks()
    if args.batch_size % (world * args.accumulate):
        raise data.WrongChoice(f"--batch-size {args.batch_size} does not divide into {world * args.accumulate} equal parts "
                               "(processes x --accumulate)")
    device = pick_device(args.device)
    if device.type == "mps" and args.checkpointing and args.dropout:
        raise data.WrongChoice("--checkpointing with --dropout: on mps, blocks computed again would get other masks")
    if world > 1:
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=1), device_id=gpu)
    if rank == 0:
        data.check_writable(args.out)
    if local > 0:
        dist.barrier()                               # the first process of each machine fetches the data, the others wait
    images, labels, classes = data.load_chosen(args.dataset, args.only, "train", args.data_dir)
    if world > 1 and local == 0:
        dist.barrier()
    if (args.conditional or args.classifier) and len(classes) < 2:
        raise ValueError(f"{args.dataset} needs labels of two classes or more, in {args.dataset[:-4]}.labels.npy")
    run = (ClassifierRun if args.classifier else Run)(args, images, labels, classes, device)
    if args.resume and os.path.exists(args.out):
        run.restore(args.out)
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, run.done)
        if len(set(steps)) > 1:
            raise ValueError(f"--resume: not every machine has the same {args.out}; copy it to all of them")
    if run.done < args.steps:
        run.say(f"{len(images):,} images {'x'.join(map(str, images.shape[1:]))}, {sum(w.numel() for w in run.weights):,} "
                f"parameters, {device}, {str(run.dtype)[6:]}, steps {run.done} to {args.steps} of {args.batch_size} images",
                done=True)
    return run


@contextlib.contextmanager
def interruptions():
    """A list that Ctrl-C, SIGTERM and SIGHUP go into, so that the step in hand can be finished; a second Ctrl-C ends at once."""
    stopped = []

    def stop(signum, _):                             # under torchrun SIGTERM may come twice: to all, and from its agent
        if stopped and signum == signal.SIGINT:
            sys.exit(1)
        stopped.append(signum)

    wanted = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))       # SIGHUP: the terminal is gone
    handlers = {n: signal.signal(n, stop) for n in set(wanted) if signal.getsignal(n) != signal.SIG_IGN}       # as nohup has it
    try:
        yield stopped
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def stop_agreed(stopped, run):
    """Whether to stop: with several processes, all at the same step, before each of which they ask each other."""
    if run.world == 1:
        return bool(stopped)
    flag = torch.tensor(float(len(stopped)), device=run.device)
    dist.all_reduce(flag)
    return flag.item() > 0


class Run:
    """A training in progress: all that a checkpoint holds, and one step of it."""

    def __init__(self, args, images, labels, classes, device):
        torch.manual_seed(args.seed)
        self.args, self.images, self.labels, self.device = args, images.to(device), labels.to(device), device
        self.rank, self.world, _ = ranks()
        self.say = data.say if self.rank == 0 else (lambda text, done=False: None)
        self.done = self.skipped = self.skipped_in_a_row = 0      # steps, and those of them whose gradient was not finite
        self.saved = 0                            # the step at which --out was written; 0: a file there is another run's
        self.fixed = {"format": FORMAT, "settings": settings_of(args), "shape": tuple(images.shape[1:]), "classes": classes}
        self.network = to_device(make_network(args, self.fixed["shape"], classes), device)
        self.diffusion = make_diffusion(args).to(device)
        self.importance = ddpm.ImportanceSampler(args.timesteps)         # on the CPU: it takes losses one by one
        self.ema = copy.deepcopy(self.network)
        self.weights, self.averages = list(self.network.parameters()), list(self.ema.parameters())
        self.optimizer = unet.Optimizer(self.network, args.lr, args.weight_decay, muon=args.optimizer == "muon")
        self.dtype = unet.pick_dtype(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.model = torch.compile(self.network) if args.compile else self.network
        if self.world > 1:
            self.model = DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)

    def batch(self):
        """x_0 ~ q(x_0): images in [-1, 1] drawn with replacement, (B, C, H, W), and their labels (B,), some hidden."""
        index = torch.randint(len(self.images), (self.args.batch_size,), device=self.device)
        x_0, y = data.to_model(self.images[index]), self.labels[index]
        if self.args.flip:
            mirrored = torch.rand(len(x_0), device=self.device) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
        if self.args.conditional:
            hidden = torch.rand(len(y), device=self.device) < self.args.label_dropout
            y = y.masked_fill(hidden, self.network.num_classes)
        return x_0, y

    def draw_t(self, x_0):
        """t (B,) and the weights (B,) of their losses: uniform and 1, except for the bound itself (iDDPM Eq. 18)."""
        if self.args.loss == "vlb":
            t, weights = self.importance.draw(len(x_0))
            return t.to(self.device), weights.to(self.device)
        return self.diffusion.uniform_t(x_0), torch.ones(len(x_0), device=self.device)

    def losses(self, x_0, y, t, noise):
        """Algorithm 1's loss of each image, (B,)."""
        labels = y if self.args.conditional else None
        return self.diffusion.training_losses(lambda x_t, t: self.model(x_t, t, labels), x_0, t, noise)

    def step(self):
        """Lines 2 to 5 of Algorithm 1 -> the mean loss of this process's images, on the device.

        t and eps are drawn here and handed to training_losses: every process draws the whole batch from the same random numbers
        and works on its own part of it, so that the result does not depend on how many processes there are (but for --dropout:
        all of them have the same masks).
        """
        x_0, y = self.batch()                                           # 2: x_0 ~ q(x_0)
        t, importance = self.draw_t(x_0)                                # 3: t ~ Uniform({1, ..., T})
        eps = self.diffusion.normal_eps(x_0)                            # 4: eps ~ N(0, I)
        losses = self.backward(x_0, y, t, eps, importance)              # 5: the gradient of || eps - eps_theta(x_t, t) ||^2,
        self.descend()                                                  #    and a step along it
        unet.update_ema(self.averages, self.weights, self.args.ema, self.done)
        if self.args.loss == "vlb":
            self.remember(t, losses)
        self.done += 1
        return losses.mean()

    def backward(self, x_0, y, t, eps, importance):
        """Leave in the weights the gradient of the batch's mean loss, and return the losses of this process's part of it."""
        self.optimizer.zero_grad()
        size, losses = len(x_0) // (self.world * self.args.accumulate), []
        for k in range(self.args.accumulate):
            first = (self.rank * self.args.accumulate + k) * size
            part = slice(first, first + size)
            last = k == self.args.accumulate - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.model.no_sync():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    losses.append(self.losses(x_0[part], y[part], t[part], eps[part]))
                self.scaler.scale((losses[-1] * importance[part]).mean() / self.args.accumulate).backward()
        return torch.cat(losses).detach()

    def descend(self):
        """A step of the optimiser along the gradient, its norm held to 1; none if that is not finite."""
        self.optimizer.param_groups[0]["lr"] = unet.learning_rate(self.done, self.args.steps, self.args.lr, self.args.warmup)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()

    def remember(self, t, losses):
        """Tell the importance sampler every process's losses, (B,) at t (B,)."""
        everyone = torch.zeros_like(t, dtype=torch.float32)
        everyone[self.rank * len(losses):(self.rank + 1) * len(losses)] = losses
        if self.world > 1:
            dist.all_reduce(everyone)
        self.importance.update(t.cpu(), everyone.cpu())

    def state(self):
        """The tensors that steps change, by name; not copies."""
        return {"model": self.network.state_dict(), "ema": self.ema.state_dict(), "importance": self.importance.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"]}

    def save(self, path):
        """Write the checkpoint, if anything has changed: `path` is always a complete one, the old or the new. Another
        training's file of that name is renamed first."""
        if self.rank > 0 or self.done in (self.saved, self.skipped):          # skipped: there was no good step
            return
        if not all(torch.isfinite(w).all() for w in self.weights):
            raise ValueError(f"the weights are no longer finite numbers; {path} was left as it was. Try a lower --lr")
        if self.saved == 0 and os.path.exists(path):
            data.keep_older(path)
        self.saved = self.done
        content = io.BytesIO()                       # so that an error of the disk is the disk's, and not one of torch.save's
        torch.save({**self.fixed, **self.state(), "step": self.done, "scaler": self.scaler.state_dict(),
                    "rng": {name: stream.get_rng_state() for name, stream in random_streams(self.device).items()}}, content)
        with data.atomic(path) as file:
            file.write(content.getbuffer())

    def restore(self, path):
        """Go on from a checkpoint. ValueError if it was made with other settings, or is damaged."""
        _, _, checkpoint = load_checkpoint(path, "cpu", self.args.classifier)
        old, new = ({"shape": state["shape"], "classes": state["classes"], **state["settings"]}
                    for state in (checkpoint, self.fixed))
        if old != new:
            differ = ", ".join(f"{k} was {old[k]!r} and is {new[k]!r}" for k in new if old[k] != new[k])
            raise ValueError(f"--resume cannot go on from {path} with other settings: {differ[:500]}")
        with data.damaged(f"{path} is damaged"):
            state = self.state()
            copy_into(state, {name: checkpoint[name] for name in state})
            if not all(type(value) in (int, float) and math.isfinite(value) for value in checkpoint["scaler"].values()):
                raise ValueError("its scaler is not made of numbers")
            self.scaler.load_state_dict(checkpoint["scaler"])
            for name, stream in random_streams(self.device).items():
                if name == "cpu" or name in checkpoint["rng"]:         # a run may go on on another kind of device
                    stream.set_rng_state(checkpoint["rng"][name])
        self.done = self.saved = checkpoint["step"]                    # skipped steps are counted anew


class ClassifierRun(Run):
    """The same for a classifier of noisy images."""

    def draw_t(self, x_0):
        """t uniform on 0..T, with another quarter at 0, clean images: where sample.py --score looks."""
        t = torch.randint(0, self.args.timesteps + 1, (len(x_0),), device=self.device)
        return t * (torch.rand(len(x_0), device=self.device) > 0.25), torch.ones(len(x_0), device=self.device)

    def losses(self, x_0, y, t, noise):
        """-log p(y | x_t), (B,); x_0 itself at t = 0."""
        x_t = torch.where((t > 0)[:, None, None, None], self.diffusion.q_sample(x_0, t.clamp(min=1), noise), x_0)
        return F.cross_entropy(self.model(x_t, t), y, reduction="none")


def random_streams(device):
    """What a run draws random numbers from: the CPU, and its device if that is another."""
    return {"cpu": torch} if device.type == "cpu" else {"cpu": torch, device.type: getattr(torch, device.type)}


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(args):
    """Print the test set's L_simple and its bound in bits/dim, split as in Section 4.3, with 95% confidence intervals."""
    if ranks()[1] > 1:
        raise data.WrongChoice("--evaluate is work for one process: leave out torchrun")
    device = pick_device(args.device)
    network, diffusion, checkpoint = load_checkpoint(args.evaluate, device)
    images, labels = load_like(checkpoint, "test", args.data_dir)
    T, N = diffusion.timesteps, min(args.exact or len(images), len(images))
    torch.manual_seed(args.seed)
    parts = []
    for k in range(0, N, 500):
        x_0 = data.to_model(images[k:min(k + 500, N)].to(device))
        model = functools.partial(network, y=labels[k:k + len(x_0)].to(device) if network.num_classes else None)
        times, weights = choose_terms(T, len(x_0), args.exact > 0, device)
        rows = []
        for t in times:
            rows.append(measure(model, diffusion, x_0, t))
            data.say(f"{k} of {N} images, {len(x_0)} more at t = {int(t[0])}")
        prior = diffusion.prior_bits(x_0).expand_as(weights)
        parts.append(torch.stack([times, weights, prior, *torch.stack(rows, dim=1)]).cpu())
    times, weights, prior, terms, simple, squared_error = torch.cat(parts, dim=2).double()          # each (times, N)
    prior, rate, distortion, quarter = prior[0], (weights * terms)[1:].sum(0), terms[0], (times - 1) * 4 // T

    def shown(x):
        return f"{x.mean():.4f}" + (f" +- {1.96 * x.std() / math.sqrt(len(x)):.4f}" if len(x) > 1 else "")

    by_quarter = "  ".join(f"{(weights * simple)[quarter == q].sum() / weights[quarter == q].sum():.4f}"
                           if (quarter == q).any() else "-" for q in range(4))
    data.say(f"{checkpoint['settings']['dataset']}, test split, {N:,} images, {args.evaluate} at step {checkpoint['step']}",
             done=True)
    print(f"L_simple    {shown((weights * simple).sum(0) / T)}   by quarter of t: {by_quarter}\n"
          f"bits/dim <= {shown(prior + rate + distortion)}, the sum of\n"
          f"  rate        {shown(prior + rate)}   L_1 + ... + L_T, of which L_T {prior.mean():.9f}\n"
          f"  distortion  {shown(distortion)}   L_0; RMSE {127.5 * squared_error[0].mean().sqrt():.2f} of 255")


def choose_terms(T, B, every, device):
    """Times to measure for B images: t (R, B), and weights (R, B) that make sums over them estimate sums over 1 .. T.

    t = 1 always; of 2 .. T every one, or four at random, about as likely as they are large (L_{t-1} falls like 1/t).
    """
    first, later = torch.ones(1, B, dtype=torch.int64, device=device), torch.arange(2, T + 1, device=device)
    if every or T == 1:
        times = torch.cat([first, later[:, None].expand(-1, B)])
        return times, torch.ones_like(times, dtype=torch.float32)
    probability = 1 / later + 5 / T
    probability = probability / probability.sum()
    pick = torch.multinomial(probability, 4 * B, replacement=True).view(4, B)
    return torch.cat([first, later[pick]]), torch.cat([first.float(), 1 / (4 * probability[pick])])


def measure(model, diffusion, x_0, t):
    """One draw of x_t for each image -> L_{t-1} in bits/dim, L_simple, and x_0's squared error: (3, B). One model call."""
    noise = diffusion.normal_eps(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = model(x_t, t)
    answered = lambda x_t, t: output                             # no second call
    eps, _ = diffusion.predict(answered, x_t, t, clip=False)
    _, guess = diffusion.predict(answered, x_t, t)
    errors = ((error**2).flatten(1).mean(1) for error in (eps - noise, guess - x_0))
    return torch.stack([diffusion.vlb_terms(answered, x_0, x_t, t), *errors])


# --------------------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path, device, classifier=False):
    """A checkpoint of train.py -> (model with EMA weights, diffusion, the checkpoint's dict).

    The model is a UNet (x, t, y) in eval mode on `device`, or, if asked for, a classifier. Nothing in the file is run
    (weights_only), and every field is checked before it is used: ValueError says what is wrong with `path`.
    """
    if not os.path.exists(path):
        raise data.WrongChoice(f"there is no {path}: make it with python train.py, or name another one")
    with data.damaged(f"{path} is not a checkpoint of train.py, or is damaged"):
        with zipfile.ZipFile(path) as archive:       # what torch.save writes: an archive that is not compressed
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it unpacks to more than its size")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"this train.py reads {FORMAT!r} only")
        (C, H, W), classes, step = checkpoint["shape"], checkpoint["classes"], checkpoint["step"]
        if type(checkpoint["shape"]) is not tuple or C not in (1, 3) or not all(
                type(n) is int and 0 < n <= 2**14 for n in (C, H, W)):
            raise ValueError("its shape is not that of images")
        if type(step) is not int or not 0 <= step <= 10**9:
            raise ValueError("its step is not a number of steps")
        if type(classes) is not tuple or not 1 <= len(classes) <= 2**16 or not all(
                type(name) is str and len(name) <= 100 and name.isprintable() for name in classes):
            raise ValueError("its classes are not names")
        args = parse_args(argv_of(checkpoint["settings"]))
        if settings_of(args) != checkpoint["settings"]:
            raise ValueError("no flags give its settings")
        with torch.device("meta"):                   # takes no memory, whatever the settings ask for
            network = make_network(args, (C, H, W), classes)
        if sum(w.nbytes for w in network.state_dict().values()) > os.path.getsize(path):
            raise ValueError("its weights are larger than itself")
        copy_into(network.to_empty(device="cpu").state_dict(), checkpoint["ema"])
    if args.classifier != classifier:
        raise data.WrongChoice(f"{path} holds a {'classifier, and no ddpm' if args.classifier else 'ddpm, and no classifier'}: see "
                         "train.py --classifier")
    return to_device(network, device).eval(), make_diffusion(args).to(device), checkpoint


def settings_of(args):
    """What a checkpoint remembers, and --resume must find unchanged: every flag that is not in FREE."""
    return {name: value for name, value in vars(args).items() if name not in FREE}


def argv_of(settings):
    """The flags that give a checkpoint's settings, so that parse_args can check them as it checks a person's."""
    if settings.keys() != settings_of(parse_args([])).keys():
        raise ValueError("it has other settings than this train.py")
    for value in settings.values():
        if not (all(type(part) is int and 0 < part <= 10**9 for part in value) if type(value) is tuple
                else type(value) in (str, int, float, bool, type(None))):
            raise ValueError("its settings are not plain values")
    argv = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True or (value is False and name == "flip"):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and value is not False:
            argv.append(f"--{flag}={','.join(map(str, value)) if type(value) is tuple else value}")
    return argv


def copy_into(own, saved):
    """Copy saved tensors into a dict (of dicts) of tensors. ValueError unless names, shapes and types agree, and all is finite."""
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise ValueError("its weights are not those of its network")
    for name, tensor in own.items():
        if isinstance(tensor, dict):
            copy_into(tensor, saved[name])
        elif not isinstance(saved[name], torch.Tensor) or (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} does not have the shape or type of its network")
        elif not torch.isfinite(saved[name]).all():
            raise ValueError(f"{name} has numbers that are not finite")
        else:
            tensor.copy_(saved[name])


# ------------------------------------------------------------------------- from settings to data, devices and networks


def load_like(checkpoint, split, data_dir):
    """Images and labels of the data that a checkpoint was trained on. ValueError if they have become something else."""
    dataset = checkpoint["settings"]["dataset"]
    try:
        images, labels, _ = data.load_chosen(dataset, checkpoint["settings"]["only"], split, data_dir)
    except data.WrongChoice as error:
        raise data.WrongChoice(f"the checkpoint was trained on {dataset}, seen from another folder perhaps: {error}") from None
    if tuple(images.shape[1:]) != checkpoint["shape"] or labels.max() >= len(checkpoint["classes"]):
        raise ValueError(f"the checkpoint was trained on images {checkpoint['shape']} of {len(checkpoint['classes'])} classes, "
                         f"but {dataset} ({split}) holds {tuple(images.shape[1:])} of {int(labels.max()) + 1}")
    return images, labels


def make_diffusion(args):
    """The GaussianDiffusion that the settings ask for."""
    betas = (ddpm.linear_beta_schedule(args.timesteps, args.beta_start, args.beta_end) if args.schedule == "linear"
             else ddpm.cosine_beta_schedule(args.timesteps, beta_min=args.beta_min, beta_max=args.beta_max))
    return ddpm.GaussianDiffusion(betas, args.prediction, args.variance, args.loss)


def make_network(args, shape, classes):
    """The network that the settings ask for, for images of `shape` (C, H, W), with fresh weights."""
    C, H, _ = shape
    network = unet.UNet(
        in_channels=C, out_channels=2 * C if args.variance.startswith("learned") else C, image_size=H, patch=args.patch,
        channels=args.channels, multipliers=args.multipliers, blocks=args.blocks, attention=args.attention, heads=args.heads,
        dropout=args.dropout, convnext=args.block == "convnext", scale_shift=args.embedding == "scale-shift",
        num_classes=len(classes) if args.conditional else None, checkpointing=args.checkpointing)
    return unet.NoisyClassifier(network, len(classes)) if args.classifier else network


def to_device(network, device):
    """The network, there, its convolutions laid out as a GPU computes them."""
    return network.to(device, memory_format=torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format)


def ranks():
    """This process's number, how many there are, and its number on this machine, as torchrun tells it; 0, 1, 0 without."""
    return tuple(int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))


def pick_device(name):
    """The device of that name, tried out; the best there is if None; a GPU each for torchrun's processes.

    A GPU becomes the current one, and its matrix products may use TF32.
    """
    _, world, local = ranks()
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    try:
        device = torch.device(name or best)
        if world > 1 and (device.index is not None or device.type == "mps"):
            raise data.WrongChoice(f"--device {name}: torchrun's processes take a GPU each (--device cuda) or share the CPU")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")           # TF32, which convolutions have without being asked
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise data.WrongChoice(f"--device {name or best}: {str(error).splitlines()[0]}") from None


# --------------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a data.WrongChoice, one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise data.WrongChoice(message)

    def section(self, title):
        """-> a function that adds a flag to a new group of the help: (flag, default, help, ...)."""
        group = self.add_argument_group(title)

        def flag(name, default, help, **kind):
            shown = "" if default in (None, "") or isinstance(default, bool) else f" (default: {default})"
            kind |= {"action": "store_true"} if default is False else {}
            group.add_argument(name, default=default, help=help.replace("%", "%%") + shown, **kind)

        return flag


def number(kind, wanted, fits):
    """A flag's type: a finite number of `kind` that `fits`; `wanted` says so in words."""
    def parse(text):
        try:
            value = kind(text)
            if math.isfinite(value) and fits(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {wanted}")

    return parse


def count(least=1, most=10**9):
    """A flag's type: a whole number from `least` to `most`."""
    return number(int, f"of at least {least}" + (f" and at most {most:,}" if most < 10**9 else ""), lambda x: least <= x <= most)


def numbers(text):
    """A flag's type: whole numbers with commas between them; none at all if empty."""
    return tuple(count()(part) for part in text.split(",") if text)


SEED = number(int, "from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
FRACTION = number(float, "from 0 to below 1", lambda x: 0 <= x < 1)
POSITIVE = number(float, "above 0", lambda x: x > 0)
NOT_NEGATIVE = number(float, "of at least 0", lambda x: x >= 0)


def guarded(main):
    """Run a script's main; what went wrong with a person's file, flag or machine is one line, not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):                 # a name that a log cannot spell must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.simplefilter("once", UserWarning)
    warnings.filterwarnings("ignore", "Grad strides do not match")               # DistributedDataParallel, of 1 x 1 convolutions
    # Linux's malloc returns what a step frees to the kernel, and waits to get it back in the next one. Once a block of almost 32 MiB
    # has been freed, it keeps up to twice that (mallopt(3)): a tenth less time for a training step, a quarter for a sampling step.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except data.WrongChoice as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except (RuntimeError, MemoryError) as error:                 # the CPU's allocator says it in words, CUDA's by a type
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        sys.exit(f"{name}: out of memory. Try a smaller --batch-size, or a smaller network")


def main(argv=None):
    """Train, or evaluate, as the flags say."""
    args = parse_args(argv)
    (train if args.evaluate is None else evaluate)(args)


if __name__ == "__main__":
    guarded(main)
