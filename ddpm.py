"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv 2006.11239): the maths.

In the paper's order: forward process, Algorithm 1, reverse process, Algorithm 2, the bound. What
later papers added follows, under their names. "Eq. 4" is the paper's.

    t      1..T as in the paper: a whole number, or a tensor (B,)
    x      images, float32 (B, C, H, W) in [-1, 1]
    model  a callable (x_t, t) -> output, with t (B,) int64; labels are bound beforehand

Tables have T+1 entries. Entry 0 is clean data (beta_0 = 0, alpha_bar_0 = 1), so alpha_bar_{t-1}
needs no special case. They are made in float64: in float32, 1 - 0.9999 errs by 1.7e-4 of itself.
"""
import copy
import itertools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHOICES = {"prediction": ("eps", "x0", "mean", "v"),
           "variance": ("beta", "posterior", "learned_range", "learned"),
           "loss": ("mse", "l1", "huber", "vlb", "hybrid")}


def check_timesteps(timesteps):
    """ValueError unless T is a whole number in 1..10^6."""
    if timesteps != int(timesteps) or not 1 <= timesteps <= 10**6:
        raise ValueError(f"timesteps (T) must be a whole number in 1..10^6, not {timesteps}")


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """beta_1 .. beta_T on a straight line, float64 (T,); the defaults are Section 4's."""
    check_timesteps(timesteps)
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"beta must lie strictly between 0 and 1, not {beta_start} .. {beta_end}")
    return torch.linspace(beta_start, beta_end, int(timesteps), dtype=torch.float64)


def at(table, t, x):
    """Entries t of a table (T+1,), shaped to multiply x: (B, 1, 1, 1), or (1, 1, 1, 1) if t is a
    number. ValueError if t is not in 1..T; a t on a GPU is not checked, which would wait for it."""
    T = len(table) - 1
    if type(t) is int and 1 <= t <= T:
        return table[t].view([1] * x.ndim)
    if not torch.is_tensor(t) or t.device.type == "cpu":
        t = torch.as_tensor(t)
        if t.is_floating_point() or (t.numel() > 0 and not 1 <= t.min() <= t.max() <= T):
            raise ValueError(f"t must be whole numbers in 1..{T} (T), not {t.tolist()}")
        t = t.long()
    return table[t].view(-1, *[1] * (x.ndim - 1))


def standard_normal(shape, device, generator=None):
    """A draw from N(0, I). generator: a torch.Generator, or a function of the shape."""
    if callable(generator):
        return generator(shape).to(device)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


class GaussianDiffusion(nn.Module):
    """The forward process q, the reverse process p_theta, Algorithm 1 and Algorithm 2.

    betas       beta_1 .. beta_T, each above 1e-12 and below 1
    prediction  what the model's output is: "eps" (the paper), "x0", the "mean" of
                q(x_{t-1} | x_t, x_0), or "v" (Salimans & Ho 2022, 2202.00512)
    variance    sigma_t^2: "beta" or "posterior" (Section 3.2); or learned, from as many output
                channels again: "learned_range" (iDDPM Eq. 15), "learned" (they are log sigma_t^2)
    loss        "mse" (L_simple, Eq. 14), "l1", "huber"; or, to train learned variances too,
                "vlb" (the bound), "hybrid" (iDDPM Eq. 16)

    It holds float32 tables (T+1,) that move with .to(device): beta, alpha, alpha_bar,
    posterior_variance and more. Wrong choices are a ValueError.
    """

    def __init__(self, betas, prediction="eps", variance="beta", loss="mse"):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 1e-12) & (betas < 1)).all():
            raise ValueError("betas must be one row of numbers above 1e-12 and below 1")
        self.prediction, self.variance, self.loss = prediction, variance, loss
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {', '.join(allowed)}; not {getattr(self, name)!r}")
        self.learns_variance = variance.startswith("learned")
        if loss == "hybrid" and not self.learns_variance:
            raise ValueError(f"'hybrid' is for learned variances: {variance!r} has no gradient")
        self.set_alpha_bar(F.pad((1 - betas).cumprod(0), (1, 0), value=1.0))
        T, last = self.timesteps, float(self.exact_alpha_bar[-1])
        if last < 1e-36:
            raise ValueError(f"alpha_bar_T = {last:.0e} is too small for float32: smaller betas")
        if last > 0.01:
            cure = f"beta_start={0.1 / T:.3g} to beta_end={20 / T:.3g}" if T > 20 else "cosine"
            warnings.warn(f"alpha_bar_T = {last:.3g}: x_T is still part image, but sampling starts "
                          f"from pure noise. A schedule that ends in noise: {cure}", stacklevel=2)

    def set_alpha_bar(self, alpha_bar):
        """All tables from alpha_bar_0 = 1, .. alpha_bar_T, float64 (T+1,)."""
        self.exact_alpha_bar = alpha_bar  # float64, on the CPU: MPS has no float64
        self.timesteps = len(alpha_bar) - 1
        before, after = alpha_bar[:-1], alpha_bar[1:]  # alpha_bar_{t-1}, alpha_bar_t
        alpha = after / before
        beta = 1 - alpha
        beta_tilde = (1 - before) / (1 - after) * beta  # Eq. 7
        # beta_tilde_1 is 0, but Eq. 13 divides by sigma_1, and learned variances need a logarithm.
        # So beta_tilde_2 stands in, for beta_1 too, as in Ho's code. Samples do not see it.
        stand_in = beta_tilde[1:2] if self.timesteps > 1 else beta
        fixed_variance = beta if self.variance == "beta" else beta_tilde
        tables = {
            "beta": beta, "alpha": alpha, "alpha_bar": after, "one_minus_alpha_bar": 1 - after,
            "x_0_weight": before.sqrt() * beta / (1 - after),  # Eq. 7
            "x_t_weight": alpha.sqrt() * (1 - before) / (1 - after),  # Eq. 7
            "posterior_variance": beta_tilde,
            "log_posterior_variance": torch.cat([stand_in, beta_tilde[1:]]).log(),
            "log_fixed_variance": torch.cat([stand_in, fixed_variance[1:]]).log(),
        }
        for name, table in tables.items():
            table = F.pad(table, (1, 0), value=1.0 if name in ("alpha", "alpha_bar") else 0.0)
            self.register_buffer(name, table.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        """.to(), .half() and the like may move the tables, but not round them."""
        return super()._apply(lambda table: table.to(fn(table).device), recurse)

    # ---------------- Section 2: the forward process

    def q_step(self, x_prev, t, noise=None):
        """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I): one step (Eq. 2)."""
        noise = torch.randn_like(x_prev) if noise is None else noise
        return at(self.alpha, t, x_prev).sqrt() * x_prev + at(self.beta, t, x_prev).sqrt() * noise

    def q_sample(self, x_0, t, noise=None):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), at once (Eq. 4)."""
        noise = torch.randn_like(x_0) if noise is None else noise
        return (at(self.alpha_bar, t, x_0).sqrt() * x_0
                + at(self.one_minus_alpha_bar, t, x_0).sqrt() * noise)

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I) -> (mean, variance) (Eqs. 6, 7)."""
        mean = at(self.x_0_weight, t, x_t) * x_0 + at(self.x_t_weight, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)

    # ---------------- Algorithm 1: training

    def training_losses(self, model, x_0, t=None, noise=None):
        """Algorithm 1 for images x_0 ~ q(x_0) (line 2) -> losses (B,), averaged over pixels,
        not summed. t and noise are drawn unless given."""
        if t is None:                                               # 3: t ~ Uniform({1, ..., T})
            t = torch.randint(1, self.timesteps + 1, (len(x_0),), device=x_0.device)
        t = torch.as_tensor(t, device=x_0.device).long().expand(len(x_0))
        eps = torch.randn_like(x_0) if noise is None else noise     # 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        output = model(x_t, t)
        if self.loss != "mse":
            return self.other_losses(output, x_0, x_t, t, eps)
        eps_theta, _ = self.split(output, x_t)
        squares = (self.target(x_0, x_t, t, eps) - eps_theta) ** 2  # 5: || eps - eps_theta ||^2
        return squares.flatten(1).mean(1)  # L_simple, Eq. 14

    def target(self, x_0, x_t, t, eps):
        """What the model should say: eps, or what `prediction` names. With x_t, each gives the
        others; their losses differ in the weight of each t (Table 2 tries "mean")."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x_0
        if self.prediction == "mean":
            return self.q_posterior(x_0, x_t, t)[0]
        return (at(self.alpha_bar, t, x_t).sqrt() * eps  # v (Salimans & Ho 2022)
                - at(self.one_minus_alpha_bar, t, x_t).sqrt() * x_0)

    # ---------------- Section 3.2: the reverse process

    def split(self, output, x_t):
        """A model's output -> (prediction, variance channels or None), each of x_t's shape."""
        expected = (len(x_t), (1 + self.learns_variance) * x_t.shape[1], *x_t.shape[2:])
        if output.shape != expected:
            raise ValueError(f"variance {self.variance!r} needs a model output of shape {expected}"
                             f", not {tuple(output.shape)}")
        return output.chunk(2, dim=1) if self.learns_variance else (output, None)

    def predict(self, output, x_t, t, clip=True):
        """The noise and the image in x_t, by the model's output -> (eps, x_0).

        clip=True holds x_0 in [-1, 1], where images are. Algorithm 2 does not, but Ho's code does,
        and samples get better: Eq. 15 multiplies an error of eps_theta by the ratio of noise to
        signal, 157 at the paper's T.
        """
        prediction, _ = self.split(output, x_t)
        signal = at(self.alpha_bar, t, x_t).sqrt()
        noise = at(self.one_minus_alpha_bar, t, x_t).sqrt()  # Eq. 4: x_t = signal x_0 + noise eps
        if self.prediction == "eps":
            x_0 = (x_t - noise * prediction) / signal  # Eq. 15
        elif self.prediction == "x0":
            x_0 = prediction
        elif self.prediction == "mean":  # Eq. 7, solved for x_0
            x_0 = (prediction - at(self.x_t_weight, t, x_t) * x_t) / at(self.x_0_weight, t, x_t)
        else:  # v
            x_0 = signal * x_t - noise * prediction
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        return (x_t - signal * x_0) / noise, x_0  # the eps of the clipped x_0

    def p_mean_variance(self, output, x_t, t, clip=True):
        """p_theta(x_{t-1} | x_t), by the model's output -> (mean, variance, predicted x_0).

        The mean is Eq. 11, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t), as
        Eq. 7 at the x_0 of Eq. 15: equal (Eqs. 9, 10 say why), but here x_0 can be clipped.
        """
        _, x_0 = self.predict(output, x_t, t, clip)  # Eq. 15
        mean, _ = self.q_posterior(x_0, x_t, t)  # Eq. 7, hence Eq. 11
        return mean, self.log_variance(output, x_t, t).exp(), x_0

    def log_variance(self, output, x_t, t):
        """log sigma_t^2: from a table (Section 3.2), or from the model's variance channels."""
        _, channels = self.split(output, x_t)
        if self.variance == "learned":
            return channels
        if self.variance == "learned_range":  # -1..1 stands for beta_tilde_t..beta_t
            v, log_beta = (channels + 1) / 2, at(self.beta, t, x_t).log()
            return v * log_beta + (1 - v) * at(self.log_posterior_variance, t, x_t)  # iDDPM Eq. 15
        return at(self.log_fixed_variance, t, x_t)

    # ---------------- Algorithm 2: sampling

    def sample(self, model, shape, x_T=None, clip=True, generator=None):
        """Algorithm 2: images x_0 of `shape`, in about [-1, 1], from x_T, drawn unless given. For
        generator see standard_normal."""
        for _, x_t, _ in self.sample_steps(model, shape, x_T, clip, generator):
            pass
        return x_t                                                               # 6: return x_0

    @torch.no_grad()
    def sample_steps(self, model, shape, x_T=None, clip=True, generator=None):
        """`sample` step by step, Eq. 1: yields (t, x_t, predicted x_0) for t = T-1, .., 0."""
        device = self.beta.device
        x_t = standard_normal(shape, device, generator) if x_T is None else x_T  # 1: x_T ~ N(0, I)
        for t in range(self.timesteps, 0, -1):                                   # 2: for t = T .. 1
            z = standard_normal(shape, device, generator) if t > 1 else 0        # 3: z ~ N(0, I)
            output = model(x_t, torch.full((len(x_t),), t, device=device))
            mean, variance, x_0 = self.p_mean_variance(output, x_t, t, clip)     #    Eq. 11
            x_t = mean + variance.sqrt() * z                                     # 4: now x_{t-1}
            yield t - 1, x_t, x_0                                                # 5: end for

    # ---------------- Section 3: the bound

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, clip=True, generator=None):
        """The bound on -log p_theta(x_0) (Eqs. 3, 5) in bits per dimension, for x_0 of 256 levels.
        A dict: total (B,); prior (B,), L_T; terms (B, T), L_0 .. L_{T-1}, each from one draw."""
        terms = []
        for t in range(1, self.timesteps + 1):
            x_t = self.q_sample(x_0, t, standard_normal(x_0.shape, x_0.device, generator))
            output = model(x_t, torch.full((len(x_0),), t, device=x_0.device))
            terms.append(self.vlb_terms(output, x_0, x_t, t, clip))
        terms, prior = torch.stack(terms, dim=1), self.prior_bits(x_0)
        return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}

    def prior_bits(self, x_0):
        """L_T of Eq. 5, KL(q(x_T | x_0) || N(0, I)), in bits per dimension (B,)."""
        alpha_bar = float(self.exact_alpha_bar[-1])
        nats = (alpha_bar * x_0**2 - alpha_bar - math.log1p(-alpha_bar)) / 2
        return nats.flatten(1).mean(1) / math.log(2)

    def vlb_terms(self, output, x_0, x_t, t, clip=True):
        """L_{t-1} of Eq. 5, KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), or for t = 1
        -log p_theta(x_0 | x_1), Section 4.3's distortion; in bits per dimension (B,)."""
        true_mean, _ = self.q_posterior(x_0, x_t, t)
        mean, _, _ = self.p_mean_variance(output, x_t, t, clip)
        log_variance = self.log_variance(output, x_t, t)
        log_ratio = at(self.log_posterior_variance, t, x_t) - log_variance
        distance = (true_mean - mean) ** 2 * (-log_variance).exp() / 2  # Eq. 8; unclipped, Eq. 12
        nats = (distance + (torch.expm1(log_ratio) - log_ratio) / 2).flatten(1).mean(1)
        first = torch.as_tensor(t, device=x_t.device).expand(len(x_t)) == 1
        if first.any():
            variance = log_variance.expand_as(mean)[first].cpu().double().exp()
            log_p = self.decoder_log_likelihood(x_0[first], mean[first], variance)
            nats = nats.masked_scatter(first, -log_p.flatten(1).mean(1).to(nats.dtype))
        return nats / math.log(2)

    @staticmethod
    def decoder_log_likelihood(x_0, mean, variance):
        """log p_theta(x_0 | x_1) per value, for x_0 of 256 levels (Eq. 13): the Gaussian's integral
        over the level's bin, 2/255 wide; the outermost bins reach to infinity. It is taken in the
        tail where both ends are small, in float64: exact up to a sigma of 1e12."""
        x, mean, sigma = x_0.cpu().double(), mean.cpu().double(), variance.cpu().double().sqrt()
        lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) / sigma)
        upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) / sigma)
        a, b = torch.minimum(lower, -upper), torch.minimum(upper, -lower)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        log_p = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-15)))
        return log_p.to(x_0.dtype).to(x_0.device)

    # ---------------- Section 4.4: interpolation

    def interpolate(self, model, x_0, x_0_prime, weights, t, clip=True, generator=None):
        """Figure 8: images x_0, x_0' (C, H, W), mixed at time t -> (len(weights), C, H, W). The
        weights are the paper's lambda; all get the same noise."""
        def shared_noise(shape):
            return standard_normal((1, *shape[1:]), x_0.device, generator).expand(shape)

        x_t = self.q_sample(x_0[None], t, shared_noise((1, *x_0.shape)))
        x_t_prime = self.q_sample(x_0_prime[None], t, shared_noise((1, *x_0.shape)))
        weights = torch.as_tensor(weights).to(x_0).view(-1, 1, 1, 1)
        mixed = (1 - weights) * x_t + weights * x_t_prime
        chain = copy.copy(self)
        chain.timesteps = t  # Algorithm 2 from t down, with the same tables
        return chain.sample(model, mixed.shape, mixed, clip, generator=shared_noise)

    # ---------------- DDIM (Song, Meng, Ermon 2020, 2010.02502)

    def visited_times(self, steps):
        """The steps + 1 times, from T down to 0, of a chain of `steps` strides."""
        if steps not in range(1, self.timesteps + 1):
            raise ValueError(f"steps must be a whole number in 1..{self.timesteps}, not {steps}")
        return np.linspace(self.timesteps, 0, int(steps) + 1).round().astype(int).tolist()

    def ddim_sample(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """`sample` in `steps` calls of the model. eta = 0 adds no noise; 1 is Algorithm 2 on the
        chain of `respace`, with variance "posterior"."""
        for _, x_t, _ in self.ddim_steps(model, shape, steps, eta, x_T, clip, generator):
            pass
        return x_t

    @torch.no_grad()
    def ddim_steps(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """`ddim_sample` step by step: yields (t, x_t, the x_0 predicted on the way), to t = 0."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0..1, not {eta}")
        x_t = standard_normal(shape, self.beta.device, generator) if x_T is None else x_T
        for t, s in itertools.pairwise(self.visited_times(steps)):  # one stride, t -> s
            bar_t, bar_s = self.exact_alpha_bar[[t, s]].tolist()
            sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))  # DDIM Eq. 16
            z = standard_normal(shape, x_t.device, generator) if sigma > 0 else 0
            output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
            eps, x_0 = self.predict(output, x_t, t, clip)
            direction = math.sqrt(max(1 - bar_s - sigma**2, 0)) * eps
            x_t = math.sqrt(bar_s) * x_0 + direction + sigma * z  # DDIM Eq. 12
            yield s, x_t, x_0

    @torch.no_grad()
    def ddim_invert(self, model, x_0, steps=50):
        """The x_T from which ddim_sample (eta=0, clip=False) draws x_0, by its ODE (DDIM Eq. 14). A
        step s -> t takes eps at t: 0 was never trained. The error falls as 1 / steps."""
        x_s = x_0
        for s, t in itertools.pairwise(self.visited_times(steps)[::-1]):
            bar_s = float(self.exact_alpha_bar[s])
            output = model(x_s, torch.full((len(x_s),), t, device=x_s.device))
            eps, _ = self.predict(output, x_s, t, clip=False)
            x_0_hat = (x_s - math.sqrt(1 - bar_s) * eps) / math.sqrt(bar_s)
            x_s = self.q_sample(x_0_hat, t, eps)
        return x_s

    # ---------------- iDDPM (Nichol & Dhariwal 2021, 2102.09672)

    def other_losses(self, output, x_0, x_t, t, eps):
        """"vlb": T L_{t-1}, whose mean over t is the bound without L_T. "hybrid": L_simple + 0.001
        vlb, where vlb trains the variance alone (iDDPM Eq. 16). "l1", "huber": other distances."""
        if self.loss == "vlb":
            return self.timesteps * self.vlb_terms(output, x_0, x_t, t, clip=False)
        prediction, channels = self.split(output, x_t)
        distance = {"l1": F.l1_loss, "huber": F.huber_loss, "hybrid": F.mse_loss}[self.loss]
        target = self.target(x_0, x_t, t, eps)
        losses = distance(prediction, target, reduction="none").flatten(1).mean(1)
        if self.loss == "hybrid":
            output = torch.cat([prediction.detach(), channels], dim=1)
            losses += 0.001 * self.timesteps * self.vlb_terms(output, x_0, x_t, t, clip=False)
        return losses


def cosine_beta_schedule(timesteps=1000, s=0.008, beta_min=0.0, beta_max=0.999):
    """beta_t of alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), clipped to
    beta_min..beta_max; float64 (T,) (iDDPM Eq. 17). s keeps beta_1 from vanishing."""
    check_timesteps(timesteps)
    if beta_min > beta_max:
        raise ValueError(f"beta_min {beta_min} is above beta_max {beta_max}")
    u = torch.arange(int(timesteps) + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(beta_min, beta_max)


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


def respace(diffusion, model, steps):
    """-> (diffusion, model) of a chain of `steps` steps: Algorithm 2 on a subsequence of 1..T.

    It keeps alpha_bar at the times it visits, so the beta of a stride t -> s is
    1 - alpha_bar_t / alpha_bar_s, not beta_t. The network sees the old t. What depends on a step's
    length is translated: "mean", and "learned" variances by their ratio to beta_tilde.
    """
    times = torch.tensor(diffusion.visited_times(steps)[::-1])
    short = copy.deepcopy(diffusion)
    short.set_alpha_bar(diffusion.exact_alpha_bar[times])
    times, short = times.to(diffusion.beta.device), short.to(diffusion.beta.device)

    def strided_model(x_t, k):
        t = times[k]
        output = model(x_t, t)
        prediction, channels = diffusion.split(output, x_t)
        if diffusion.prediction == "mean":
            _, x_0 = diffusion.predict(output, x_t, t, clip=False)
            prediction, _ = short.q_posterior(x_0, x_t, k)
        if diffusion.variance == "learned":
            channels = (channels + at(short.log_posterior_variance, k, x_t)
                        - at(diffusion.log_posterior_variance, t, x_t))
        return prediction if channels is None else torch.cat([prediction, channels], dim=1)

    return short, strided_model


# ---------------- Guidance (Dhariwal & Nichol 2021, 2105.05233; Ho & Salimans 2022, 2207.12598)


def classifier_free_guidance(network, y, scale, null):
    """network(x_t, t, y) -> a model: eps(null) + scale (eps(y) - eps(null)), in one call (Ho &
    Salimans 2022, Eq. 6, with scale = 1 + w). y (B,) are labels, null means no label. scale 0 is
    unconditional, 1 conditional, more exaggerates."""
    def model(x_t, t):
        labels = torch.cat([y, torch.full_like(y, null)])
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        with_y, without = both.chunk(2)
        C = x_t.shape[1]
        guided = without[:, :C] + scale * (with_y[:, :C] - without[:, :C])
        return torch.cat([guided, with_y[:, C:]], dim=1)

    return model


def classifier_guidance(diffusion, model, log_prob, scale):
    """-> a model whose eps is eps - scale sqrt(1 - alpha_bar_t) grad log p(y | x_t) (Dhariwal &
    Nichol 2021, Algorithm 2). log_prob(x_t, t) -> (B,) knows noisy images."""
    def guided_model(x_t, t):
        output = model(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():  # samplers run without gradients
            x = x_t.clone().requires_grad_()
            gradient = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)[0]
        noise = at(diffusion.one_minus_alpha_bar, t, x_t).sqrt()
        eps, _ = diffusion.predict(output, x_t, t, clip=False)
        eps = eps - scale * noise * gradient
        x_0 = (x_t - noise * eps) / at(diffusion.alpha_bar, t, x_t).sqrt()  # Eq. 15
        return torch.cat([diffusion.target(x_0, x_t, t, eps), output[:, x_t.shape[1]:]], dim=1)

    return guided_model
