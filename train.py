"""Algorithm 1 on real data. sample.py draws from its checkpoint, ddpm.pt.

    python train.py                             Fashion-MNIST in minutes, on a CPU
    python train.py --resume                    go on after Ctrl-C, a crash, a reboot
    torchrun --nproc-per-node=8 -- train.py     on eight GPUs (untested)
"""
import copy
import math
import os
import signal
import sys
import time
import timeit
import zipfile
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import ddpm
import unet
from data import LOCAL_RANK, RANK, WORLD, progress

FORMAT = "ddpm checkpoint 4"
NOT_KEPT = {"data_dir", "out", "save_every", "slim", "resume", "init", "log", "preview", "device",
            "compile"}  # settings that a checkpoint leaves out
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv=None):
    """The settings, checked; with --resume, those of the checkpoint."""
    parser = data.Parser(__doc__)
    choices, count, counts = ddpm.CHOICES, data.positive_integer, data.positive_integers
    flag = parser.section("data")
    flag("--dataset", "fashion-mnist", "also mnist, cifar10, FILE.npy or an IDX file")
    flag("--data-dir", "data", "where data are, or are put")
    flag("--only", None, "one class, by name or index")
    flag("--flip", None, "mirror half the images (cifar10: on)", action=BooleanOptionalAction)
    flag = parser.section("diffusion")
    flag("--timesteps", 1000, "T (paper: 1000)")
    flag("--schedule", None, "paper: linear (default: cosine)", choices=("cosine", "linear"))
    flag("--beta-start", None, "implies linear (paper: 1e-4; default: 0.1/T)", type=float)
    flag("--beta-end", None, "implies linear (paper: 0.02; default: 20/T)", type=float)
    flag("--prediction", "eps", "the network's output (paper: eps)", choices=choices["prediction"])
    flag("--variance", "beta", "sigma_t^2 (paper: beta, posterior)", choices=choices["variance"])
    flag("--loss", None, "paper: mse (default: mse; if learned: hybrid)", choices=choices["loss"])
    flag = parser.section("network")
    flag("--channels", 32, "at the highest resolution (paper: 128)")
    flag("--multipliers", "1,2", "of --channels, by resolution (paper: 1,2,2,2)", type=counts)
    flag("--blocks", 1, "residual blocks per resolution (paper: 2)")
    flag("--attention", (), "at these map sizes, besides the middle (paper: 16)", type=counts)
    flag("--heads", 1, "attention heads (paper: 1)")
    flag("--dropout", 0.0, "share of values set to 0 (paper: 0.1)")
    flag("--patch", 2, "work on N x N pixels at once (paper: 1)")
    flag("--block", "resnet", "kind of block (paper: resnet)", choices=("resnet", "convnext"))
    flag("--embedding", "add", "how t enters a block (paper: add)", choices=("add", "scale-shift"))
    flag("--conditional", False, "learn labels, for sample.py --label")
    flag("--label-dropout", 0.1, "share of labels hidden, for guidance")
    flag("--classifier", False, "train a classifier of noisy images")
    flag = parser.section("optimisation")
    flag("--steps", 5500, "when to stop (paper: 800,000)")
    flag("--batch-size", 64, "images in a step (paper: 128)")
    flag("--accumulate", 1, "batch in N parts, to save memory")
    flag("--optimizer", "muon", "paper: adam", choices=("muon", "adam"))
    flag("--lr", None, "learning rate (paper: 2e-4; default: muon 0.01, adam 0.005)", type=float)
    flag("--warmup", 100, "steps until the rate is --lr; then it falls to 0", type=int)
    flag("--ema", 0.999, "decay of the averaged weights (paper: 0.9999)")
    flag("--precision", "auto", "auto: bf16 if fast here, else fp32", choices=("auto", *DTYPES))
    flag("--compile", False, "torch.compile: takes a minute")
    flag("--checkpointing", False, "compute blocks twice, to save memory")
    flag("--seed", 0, "of all random draws", type=int)
    flag("--device", None, "cpu, cuda, cuda:1 or mps (default: the best)")
    flag("--threads", None, "CPU threads (default: the faster of one and all)", type=count)
    flag = parser.section("output")
    flag("--out", None, "checkpoint (default: ddpm.pt, or classifier.pt)")
    flag("--save-every", 1000, "steps between checkpoints")
    flag("--slim", False, "save the averaged weights alone: no --resume")
    flag("--resume", False, "go on from --out, with its settings")
    flag("--init", None, "start from this checkpoint's weights")
    flag("--log", None, "CSV of step, loss, rate, images/s")
    flag("--preview", None, "picture of 16 samples, at every checkpoint")

    args = parser.parse_args(argv)
    args.out = args.out or ("classifier.pt" if args.classifier else "ddpm.pt")
    if args.resume:
        old = load_checkpoint(args.out, "cpu", None)[2]["settings"]
        parser.set_defaults(**old, out=args.out)
        args = parser.parse_args(argv)  # only what is given can differ now
        for k in old.keys() - {"dataset", "steps", "threads"}:
            if getattr(args, k) != old[k]:
                raise ValueError(f"--resume keeps {k} {old[k]}, not {getattr(args, k)}; see --init")

    learned, betas = args.variance.startswith("learned"), {args.beta_start, args.beta_end} != {None}
    args.dataset = args.dataset if args.dataset in data.DATASETS else os.path.abspath(args.dataset)
    args.schedule = args.schedule or ("linear" if betas else "cosine")
    args.loss = args.loss or ("hybrid" if learned else "mse")
    args.flip = args.dataset == "cifar10" if args.flip is None else args.flip
    args.lr = (0.01 if args.optimizer == "muon" else 0.005) if args.lr is None else args.lr
    for fine, message in (
            (all(0 <= x < 1 for x in (args.dropout, args.ema, args.label_dropout)),
             "--dropout, --ema and --label-dropout are 0 or more, below 1"),
            (0 < args.lr < math.inf and 0 <= args.warmup < 2**63 and 0 <= args.seed < 2**63,
             "--lr is above 0, --warmup and --seed are 0 or more"),
            (args.schedule == "linear" or not betas, "--beta-.. need --schedule linear"),
            (args.loss in ("vlb", "hybrid") or not learned,
             f"--loss {args.loss} does not train --variance {args.variance}: use hybrid"),
            (bool(args.only) + args.conditional + args.classifier < 2,
             "--only, --conditional and --classifier exclude each other"),
            (not (args.preview and args.classifier), "a --classifier draws no --preview")):
        if not fine:
            raise ValueError(message)
    data.check_suffix(args.preview or "x.png", (".png",))
    make_diffusion(args)  # ValueError if invalid
    return args


def train(args):
    """Algorithm 1, until --steps are taken or someone stops it."""
    run, signals, stop = Run(args), [], torch.tensor(0)

    def remember(number, _):  # the step in hand is finished; a second Ctrl-C ends at once
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, remember)
    while run.done < args.steps and stop == 0:  # 1, 6: repeat until
        run.step()  # 2-5
        run.report()
        stop += len(signals)
        if WORLD > 1:
            dist.all_reduce(stop)  # all stop together
        if run.done % args.save_every == 0 and run.done < args.steps:
            run.save()
    run.save()
    more = f"To go on: --{'init' if args.slim else 'resume --out'} {args.out}"
    if run.done < args.steps:
        progress(f"stopped at step {run.done}, saved in {args.out}. {more}")
        sys.exit(128 + signals[0] if signals else 1)
    flag = "--score" if args.classifier else "--checkpoint"
    progress(f"{args.out} has all {run.done} steps. {more} --steps N. "
             f"Next: python sample.py {flag} {args.out}")


class Run:
    """A run in progress. Random numbers come from (seed, step, part of the batch): a resumed
    run does what it would have done, and N processes match --accumulate N. A step never
    waits for the GPU, except for the decoder (in vlb and hybrid)."""

    def __init__(self, args):
        self.args, self.device, self.done, self.own_file = args, pick_device(args.device), 0, None
        self.rows = ["step,loss,learning_rate,images_per_second\n"]
        device, gpu, parts = self.device, self.device.type == "cuda", WORLD * args.accumulate
        if args.batch_size % parts:
            raise ValueError(f"--batch-size {args.batch_size} does not divide into {parts} parts")
        if gpu:
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be recorded
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        data.check_outputs((args.out, args.log, args.preview), (args.dataset, args.init))
        images, labels, self.classes = data.load_with_classes(
            args.dataset, "train", args.data_dir, args.only)
        if (args.conditional or args.classifier) and len(self.classes) < 2:
            raise ValueError(f"{args.dataset} has fewer than two classes")
        self.images, self.labels = images.to(device), labels.to(device)
        self.part_size, self.shape = args.batch_size // parts, tuple(images.shape[1:])
        self.source = {"dataset": args.dataset, "images": len(images),
                       "fingerprint": data.fingerprint(images, labels)}

        torch.manual_seed(args.seed)
        self.diffusion = make_diffusion(args).to(device)
        self.network = unet.to_device(unet.make_network(args, self.shape, self.classes), device)
        if args.init:
            with data.named_errors(f"--init {args.init} (give its network's flags)"):
                self.network.load_state_dict(load_checkpoint(args.init, device, None)[2]["ema"])
        self.average = copy.deepcopy(self.network).eval()
        self.weights, self.averages = (list(n.parameters()) for n in (self.network, self.average))
        self.model = torch.compile(self.network) if args.compile else self.network
        if WORLD > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.lr = torch.tensor(args.lr, device=device)
        self.optimizers = make_optimizers(self.network, self.lr, args.optimizer == "muon")
        self.dtype = pick_dtype(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        args.threads = set_threads(args.threads, device,
                                   lambda: self.losses(*self.batch()).mean().backward())
        self.network.zero_grad()
        if args.resume:
            self.restore()
        self.n = torch.tensor(float(self.done), device=device)
        self.loss_sum, self.skipped, self.in_a_row = torch.zeros(3, device=device)
        plain = args.loss in ("mse", "l1", "huber") and not (args.compile or args.checkpointing)
        self.record_at = self.done + 3 if gpu and parts == 1 and plain else None
        if args.log and RANK == 0:
            log, rows = Path(args.log), "".join(self.rows)
            past = log.read_text(errors="replace") if log.exists() else ""
            if past and not (self.done and past.startswith(rows)):
                data.keep_older(log)
            log.write_text(rows)
        self.reported, self.reported_at = self.done, time.perf_counter()
        cores = f" with {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
        size, parameters = "x".join(map(str, self.shape)), sum(w.numel() for w in self.weights)
        progress(f"{len(images):,} images {size}{', half of them mirrored' * args.flip}, "
                 f"{parameters:,} parameters, {str(self.dtype)[6:]}, {device}{cores}, "
                 f"steps {self.done} to {args.steps} of {args.batch_size} images")

    def step(self):
        """Lines 2 to 5 of Algorithm 1, for this process's parts of the batch."""
        if self.done == self.record_at:  # small kernels take longer to launch than to run
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.add_gradient(last=True)
            self.add_gradient = lambda last: graph.replay()  # draws from the seed set below
        parts = self.args.accumulate
        for k in range(parts):
            torch.manual_seed(random_stream(self.args.seed, self.done, RANK * parts + k))
            self.add_gradient(last=k == parts - 1)
        self.done += 1

    def add_gradient(self, last):
        """Add the gradient of a part of the batch; after the last, descend."""
        if WORLD > 1:
            self.model.require_backward_grad_sync = last  # average over processes at the end
        x_0, y = self.batch()  # 2: x_0 ~ q(x_0)
        loss = self.losses(x_0, y).mean() / self.args.accumulate  # 3-5: see training_losses
        self.scaler.scale(loss).backward()  # 5: take gradient
        self.loss_sum += loss.detach()
        if last:
            self.descend()  # 5: descent step

    def batch(self):
        """Images, drawn with replacement, and their labels, some of them hidden."""
        args, B, device = self.args, self.part_size, self.device
        index = torch.randint(len(self.images), (B,), device=device)
        x_0, y = data.to_model(self.images[index]), self.labels[index]
        if args.flip:
            mirrored = torch.rand(B, 1, 1, 1, device=device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
        if args.conditional:
            hidden = torch.rand(B, device=device) < args.label_dropout
            y = y.masked_fill(hidden, len(self.classes))
        return x_0, y

    def losses(self, x_0, y):
        """What is minimised, for each image, (B,)."""
        args, diffusion, T, device = self.args, self.diffusion, self.args.timesteps, self.device
        model = lambda x_t, t: self.model(x_t, t, y if args.conditional else None)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            if args.classifier:  # a quarter are clean images, t = 0, as in --score
                t = torch.randint(-T // 3, T + 1, (len(x_0),), device=device).clamp(min=0)
                x_t = diffusion.q_sample(x_0, t.clamp(min=1))
                x_t = torch.where((t > 0)[:, None, None, None], x_t, x_0)
                return torch.nn.functional.cross_entropy(self.model(x_t, t), y, reduction="none")
            if args.loss != "vlb":
                return diffusion.training_losses(model, x_0)
            t, weights = ddpm.important_times(T, len(x_0), device)
            return diffusion.training_losses(model, x_0, t) * weights

    @torch.no_grad()
    def descend(self):
        """Descend by the gradient, clipped to norm 1, unless it is not finite. Then the EMA."""
        args, n = self.args, self.n
        up, down = (n + 1) / (args.warmup + 1), (args.steps - n) / max(args.steps - args.warmup, 1)
        self.lr.copy_(args.lr * torch.minimum(up, down))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        bad = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(self.weights, 1.0))
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()
            optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        decay = torch.clamp((1 + n) / (10 + n), max=args.ema)  # early weights are soon forgotten
        torch._foreach_mul_(self.averages, decay)
        torch._foreach_add_(self.averages, torch._foreach_mul(self.weights, 1 - decay))
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        n += 1

    def report(self):
        """Say how it goes, once a second and at the end."""
        args, done, now = self.args, self.done, time.perf_counter()
        steps, seconds = done - self.reported, now - self.reported_at
        if seconds < 1 and done < args.steps:
            return
        self.reported, self.reported_at = done, now
        loss, skipped, in_a_row = torch.stack(
            [self.loss_sum / steps, self.skipped, self.in_a_row]).tolist()
        self.loss_sum.zero_()
        if in_a_row >= min(100, args.steps):
            raise ValueError(f"the gradient has not been finite for {in_a_row:.0f} steps. "
                             "Try a lower --lr, or --precision fp32")
        speed = steps * args.batch_size / seconds
        left = (args.steps - done) * seconds / steps / 60
        bad = f"  {skipped:.0f} steps skipped" * (skipped > 0)
        progress(f"step {done}/{args.steps}  loss {loss:.4f}  {speed:.0f} images/s  "
                 f"{left:.1f} min left{bad}", passing=done < args.steps)
        self.rows.append(f"{done},{loss:.6g},{float(self.lr):.6g},{speed:.1f}\n")
        if args.log and RANK == 0:
            with open(args.log, "a") as file:
                file.write(self.rows[-1])

    def save(self):
        """Write --out and --preview. Keep another run's file as .old."""
        args, path = self.args, self.args.out
        if RANK > 0:
            return
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
                "log": self.rows}
        with data.atomic(path) as file:
            torch.save(checkpoint, file)
        self.own_file = os.stat(path).st_mtime_ns
        if args.preview:
            y = torch.arange(16, device=self.device) % len(self.classes)
            model = lambda x_t, t: self.average(x_t, t, y if args.conditional else None)
            steps, noise = min(20, args.timesteps), torch.Generator().manual_seed(0)
            x_0 = self.diffusion.ddim_sample(model, (16, *self.shape), steps, generator=noise)
            data.save_image(args.preview, x_0, zoom=2)

    def restore(self):
        """Go on from --out."""
        path, (_, _, checkpoint) = self.args.out, load_checkpoint(self.args.out, "cpu", None)
        with data.named_errors(f"{path} cannot be resumed"):
            if checkpoint["source"]["fingerprint"] != self.source["fingerprint"]:
                raise ValueError("it was trained on other data: see --dataset, --data-dir")
            if checkpoint["step"] > self.args.steps:
                raise ValueError(f"it has {checkpoint['step']} steps already")
            if "training" not in checkpoint:
                raise ValueError("it was saved with --slim: see --init")
            training = checkpoint["training"]
            self.average.load_state_dict(checkpoint["ema"])
            self.network.load_state_dict(training["model"])
            for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                optimizer.param_groups[0]["lr"] = self.lr
            self.scaler.load_state_dict(training["scaler"])
            self.rows = training["log"]
            self.done, self.own_file = checkpoint["step"], os.stat(path).st_mtime_ns


def random_stream(*numbers):
    """A seed of its own for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def make_optimizers(network, lr, muon):
    """Adam; if `muon`, Muon for convolutions between feature maps. lr: a 0-dim tensor."""
    by_muon, by_adam = [], []
    for name, w in network.named_parameters():
        inner = w.ndim == 4 and w.shape[1] > 1 and "conv_" not in name  # in, out
        (by_muon if muon and inner else by_adam).append(w)
    # beta_2 = 0.99: Adam's 0.999 averages over 1000 steps, which is slow here.
    adam = torch.optim.Adam(by_adam, lr, (0.9, 0.99), fused=True, capturable=lr.is_cuda)
    return [adam, Muon(by_muon, {"lr": lr})] if by_muon else [adam]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: all directions of a matrix (C_out, C_in kh kw) learn at one pace
    (Jordan 2024, kellerjordan.github.io/posts/muon), in steps of Adam's size (Liu et al. 2025,
    2502.16982). torch.optim.Muon takes no convolutions."""

    @torch.no_grad()
    def step(self):
        """One step, unless self.found_inf is 1, as in torch's fused optimisers."""
        weights, lr = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        batches: dict = {}
        for w in weights:  # on a GPU, matrices of one shape at once: fewer kernels
            batches.setdefault(w.shape if lr.is_cuda else w, []).append(w)
        for batch in batches.values():
            momenta = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in batch]
            gradients = [torch.where(self.found_inf > 0, m, w.grad) for m, w in zip(momenta, batch)]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # Nesterov's look ahead
            directions = orthogonal(torch.stack([G.flatten(1) for G in ahead]))
            size = torch.where(self.found_inf > 0, 0, lr) * 0.2 * max(directions[0].shape) ** 0.5
            for w, direction in zip(batch, directions):
                w.addcmul_(direction.reshape(w.shape), size, value=-1)


def orthogonal(G):
    """G (B, m, n), almost orthogonal: all but tiny singular values become 0.7 .. 1.2."""
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # a polynomial: G <- 3.4445 G - 4.7750 A G + 2.0315 A A G
        A = G @ G.mT
        G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), G, beta=3.4445)
    return G


def load_checkpoint(path, device, classifier=False):
    """-> (model with EMA weights, in eval mode; diffusion; the checkpoint's dict). classifier:
    False wants a UNet (x, t, y), True a classifier (x, t), or ValueError; None takes either.
    Runs no code in the file, unpacks no more than its size."""
    if not os.path.isfile(path):
        raise ValueError(f"no {path}: run train.py, or see assets/")
    with data.named_errors(f"{path} is no checkpoint of train.py, or damaged"):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > os.path.getsize(path) or archive.testzip():
                raise ValueError("it unpacks to more than its size, or has a wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"this train.py reads {FORMAT!r} only")
        args, (C, H, W) = Namespace(**checkpoint["settings"]), checkpoint["shape"]
        if C not in (1, 3) or min(H, W, checkpoint["source"]["images"]) < 1:
            raise ValueError("it is not about images")
        with torch.device("meta"):  # takes no memory
            network = unet.make_network(args, (C, H, W), checkpoint["classes"])
        network.load_state_dict(dict(checkpoint["ema"]), assign=True)  # assign would alter it
        if not all(torch.isfinite(w).all() for w in network.parameters()):
            raise ValueError("it has weights that are not finite")
        diffusion = make_diffusion(args)
    if classifier not in (None, args.classifier):
        raise ValueError(f"{path} is {'a' if args.classifier else 'no'} classifier: see train.py")
    return unet.to_device(network, device).eval(), diffusion.to(device), checkpoint


def make_diffusion(args):
    """The GaussianDiffusion of the settings."""
    T, start, end = args.timesteps, args.beta_start, args.beta_end
    if args.schedule == "cosine":
        betas = ddpm.cosine_beta_schedule(T)
    else:  # by default the paper's, scaled to T
        betas = ddpm.linear_beta_schedule(
            T, 0.1 / T if start is None else start, 20 / T if end is None else end)
    return ddpm.GaussianDiffusion(betas, args.prediction, args.variance, args.loss)


def pick_device(name):
    """The device of that name, tried out, or the best; under torchrun, a GPU each."""
    mps = torch.backends.mps.is_available() and WORLD == 1
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    with data.named_errors(f"--device {name} does not work here, try --device cpu"):
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it anyway
        torch.zeros(1, device=device).item()
        return device


def pick_dtype(precision, device):
    """What autocast computes in; auto: bf16 where there are units for it, else fp32."""
    if precision == "auto":
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        units = cpu.get("amx_bf16") or cpu.get("avx512_bf16") or (
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        precision = "bf16" if units else "fp32"
    return DTYPES[precision]


def set_threads(number, device, work):
    """Set CPU threads; None: one or all, the faster at work() (on a busy CPU, often one)."""
    def seconds(threads):
        torch.set_num_threads(threads)
        return timeit.timeit(work, setup=work, number=4)

    if number is None and device.type == "cpu" and WORLD == 1:
        number = min({torch.get_num_threads(), 1}, key=seconds)
    torch.set_num_threads(number or torch.get_num_threads())
    return number


if __name__ == "__main__":
    data.run_script(lambda: train(parse_args()))
