"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

In the paper's order; later papers' additions follow, under their names.

    t      1..T as in the paper: a whole number, or a tensor (B,)
    x      images, float32 (B, C, H, W) in [-1, 1]
    model  a callable (x_t, t) -> output, with t (B,) int64; any labels are already in it

Tables (T+1,) are indexed by the paper's t; 0 is clean data, beta_0 = 0 and alpha_bar_0 = 1.
They are made in float64: in float32, 1 - 0.9999 is wrong by 0.017%.
"""
import copy
import math
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

CHOICES = {"prediction": ("eps", "x0", "mean", "v"),
           "variance": ("beta", "posterior", "learned_range", "learned"),
           "loss": ("mse", "l1", "huber", "vlb", "hybrid")}


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """beta_1 .. beta_T on a straight line, float64 (T,); by default Section 4's."""
    if timesteps not in range(1, 10**6) or not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError("timesteps must be whole, in 1..999999, betas between 0 and 1")
    return torch.linspace(beta_start, beta_end, int(timesteps), dtype=torch.float64)


def at(table, t, x):
    """table[t] as (B or 1, 1, 1, 1), to multiply x. ValueError unless t is whole, in 1..T."""
    T = len(table) - 1
    if type(t) is int and 1 <= t <= T:  # saves a copy to the GPU
        return table[t].view([1] * x.ndim)
    t = torch.as_tensor(t)
    outside = t.is_cpu and ((t < 1) | (t > T)).any()  # not on a GPU: it would wait
    if outside or t.is_floating_point():
        raise ValueError(f"t must be whole numbers in 1..{T}, not {t.tolist()}")
    return table[t.long()].view(-1, *[1] * (x.ndim - 1))


def standard_normal(shape, device, generator=None):
    """A draw from N(0, I). generator: a torch.Generator, or a function shape -> noise."""
    if callable(generator):
        return generator(shape).to(device)
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


class GaussianDiffusion(torch.nn.Module):
    """The processes q and p_theta, and Algorithms 1 and 2.

    betas       beta_1 .. beta_T, above 1e-12 and below 1
    prediction  the model's output: "eps" (the paper), "x0", "mean" of q(x_{t-1} | x_t, x_0), or
                "v" (Salimans & Ho 2022, 2202.00512)
    variance    "beta" or "posterior" (Section 3.2), or from C more output channels:
                "learned" (log sigma_t^2), "learned_range" (iDDPM Eq. 15)
    loss        "mse" (L_simple, Eq. 14), "l1", "huber", "vlb" (the bound, Eq. 5), "hybrid"
                (iDDPM Eq. 16): only these two train a variance

    ValueError for other names. Its float32 tables (T+1,) move with .to(device)."""

    def __init__(self, betas, prediction="eps", variance="beta", loss="mse"):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 1e-12) & (betas < 1)).all():
            raise ValueError("betas must be a row of numbers above 1e-12 and below 1")
        self.prediction, self.variance, self.loss = prediction, variance, loss
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {', '.join(allowed)}; not {getattr(self, name)!r}")
        self.learns_variance = variance.startswith("learned")
        if loss == "hybrid" and not self.learns_variance:
            raise ValueError(f"hybrid is for learned variances: {variance} has no gradient")
        self.set_alpha_bar(F.pad((1 - betas).cumprod(0), (1, 0), value=1))
        T, last = self.timesteps, float(self.exact_alpha_bar[-1])
        if last < 1e-36:
            raise ValueError(f"alpha_bar_T = {last:.0e} is too small for float32: lower the betas")
        if last > 0.01:
            cure = f"beta_start={0.1 / T:.3g} to beta_end={20 / T:.3g}" if T > 20 else "cosine"
            warnings.warn(f"alpha_bar_T = {last:.3g} > 0.01: sampling assumes that x_T is noise. "
                          f"Try {cure}", stacklevel=2)

    def set_alpha_bar(self, alpha_bar):
        """Make all tables from alpha_bar_0 .. alpha_bar_T, float64 (T+1,)."""
        self.exact_alpha_bar = alpha_bar  # stays on the CPU: MPS has no float64
        self.timesteps = len(alpha_bar) - 1
        before, after = alpha_bar[:-1], alpha_bar[1:]  # alpha_bar_{t-1}, alpha_bar_t
        alpha = after / before
        beta = 1 - alpha
        beta_tilde = (1 - before) / (1 - after) * beta  # Eq. 7
        # sigma_1 is for Eq. 13 alone, which divides by it. beta_tilde_1 = 0, so beta_tilde_2 stands
        # in, for beta_1 too, as in Ho's code.
        stand_in = beta_tilde[1:2] if self.timesteps > 1 else beta
        fixed = beta if self.variance == "beta" else beta_tilde
        tables = {
            "beta": beta, "alpha": alpha, "alpha_bar": after, "one_minus_alpha_bar": 1 - after,
            "x_0_weight": before.sqrt() * beta / (1 - after),  # Eq. 7
            "x_t_weight": alpha.sqrt() * (1 - before) / (1 - after),  # Eq. 7
            "posterior_variance": beta_tilde,
            "log_posterior_variance": torch.cat([stand_in, beta_tilde[1:]]).log(),
            "log_fixed_variance": torch.cat([stand_in, fixed[1:]]).log()}
        for name, table in tables.items():
            clean = float(name in ("alpha", "alpha_bar"))  # entry 0
            self.register_buffer(name, F.pad(table, (1, 0), value=clean).float(), persistent=False)

    def _apply(self, fn, recurse=True):
        """.to(), .half() and the like move the tables but leave them float32."""
        return super()._apply(lambda table: table.to(fn(table).device), recurse)

    # ---- Section 2: the forward process
    def q_step(self, x_prev, t, noise=None):
        """x_t ~ N(sqrt(1 - beta_t) x_{t-1}, beta_t I) = q(x_t | x_{t-1}): one step (Eq. 2)."""
        noise = torch.randn_like(x_prev) if noise is None else noise
        return at(self.alpha, t, x_prev).sqrt() * x_prev + at(self.beta, t, x_prev).sqrt() * noise

    def q_sample(self, x_0, t, noise=None):
        """x_t ~ N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) = q(x_t | x_0): t steps (Eq. 4)."""
        noise = torch.randn_like(x_0) if noise is None else noise
        return (at(self.alpha_bar, t, x_0).sqrt() * x_0
                + at(self.one_minus_alpha_bar, t, x_0).sqrt() * noise)

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I) -> (mean, variance) (Eqs. 6, 7)."""
        mean = at(self.x_0_weight, t, x_t) * x_0 + at(self.x_t_weight, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)

    # ---- Algorithm 1: training
    def training_losses(self, model, x_0, t=None, noise=None):
        """Algorithm 1 for x_0 ~ q(x_0) (line 2) -> losses (B,). t (B,), noise: drawn if None."""
        if t is None:  # 3: t ~ Uniform({1, ..., T})
            t = torch.randint(1, self.timesteps + 1, (len(x_0),), device=x_0.device)
        eps = torch.randn_like(x_0) if noise is None else noise  # 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        t = torch.as_tensor(t, device=x_0.device).long().expand(len(x_0))
        output = model(x_t, t)
        if self.loss != "mse":
            return self.other_losses(output, x_0, x_t, t, eps)
        eps_theta, _ = self.split(output, x_t)
        squares = (self.target(x_0, x_t, t, eps) - eps_theta) ** 2  # 5: || eps - eps_theta ||^2
        return squares.flatten(1).mean(1)  # L_simple (Eq. 14), averaged over pixels

    def target(self, x_0, x_t, t, eps):
        """What the output should be. Given x_t, any of these yields the others, but their losses
        weigh t differently (Table 2 tries "mean")."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x_0
        if self.prediction == "mean":
            return self.q_posterior(x_0, x_t, t)[0]
        return (at(self.alpha_bar, t, x_t).sqrt() * eps  # v
                - at(self.one_minus_alpha_bar, t, x_t).sqrt() * x_0)

    # ---- Section 3.2: the reverse process
    def split(self, output, x_t):
        """A model's output -> (prediction, variance channels or None), each of x_t's shape."""
        shape = (len(x_t), (1 + self.learns_variance) * x_t.shape[1], *x_t.shape[2:])
        if output.shape != shape:
            raise ValueError(f"{self.variance} needs output of shape {shape}, not {output.shape}")
        return output.chunk(2, dim=1) if self.learns_variance else (output, None)

    def predict(self, output, x_t, t, clip=True):
        """The output as (eps, x_0). clip: x_0 to [-1, 1], as Ho's code does but not Algorithm 2.
        It helps: Eq. 15 multiplies an error of eps_theta by noise / signal, 157 at Ho's t = T."""
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
        return (x_t - signal * x_0) / noise, x_0  # eps fits the clipped x_0

    def p_mean_variance(self, output, x_t, t, clip=True):
        """p_theta(x_{t-1} | x_t) -> (mean, variance, predicted x_0). The mean is Eq. 7 at Eq. 15's
        x_0, which can be clipped. If it is not, this is Eq. 11 (by Eqs. 9, 10),
        (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t)."""
        _, x_0 = self.predict(output, x_t, t, clip)  # Eq. 15
        mean, _ = self.q_posterior(x_0, x_t, t)  # Eq. 7
        return mean, self.log_variance(output, x_t, t).exp(), x_0

    def log_variance(self, output, x_t, t):
        """log sigma_t^2, by Section 3.2 (B or 1, 1, 1, 1) or learned (x_t's shape)."""
        _, channels = self.split(output, x_t)
        if self.variance == "learned":
            return channels
        if self.variance == "learned_range":  # -1: beta_tilde_t, 1: beta_t
            v, log_beta = (channels + 1) / 2, at(self.beta, t, x_t).log()
            return v * log_beta + (1 - v) * at(self.log_posterior_variance, t, x_t)  # iDDPM Eq. 15
        return at(self.log_fixed_variance, t, x_t)

    # ---- Algorithm 2: sampling
    def sample(self, model, shape, x_T=None, clip=True, generator=None):
        """Algorithm 2 -> images x_0 of `shape`; x_T is drawn unless given."""
        for _, x_t, _ in self.sample_steps(model, shape, x_T, clip, generator):
            pass
        return x_t  # 6: return x_0

    @torch.no_grad()
    def sample_steps(self, model, shape, x_T=None, clip=True, generator=None):
        """`sample` step by step (Eq. 1): yields (t, x_t, predicted x_0) for t = T-1 .. 0."""
        draw = partial(standard_normal, shape, self.beta.device, generator)
        x_t = draw() if x_T is None else x_T    # 1: x_T ~ N(0, I)
        for t in range(self.timesteps, 0, -1):  # 2: for t = T .. 1
            z = draw() if t > 1 else 0          # 3: z ~ N(0, I)
            output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
            mean, variance, x_0 = self.p_mean_variance(output, x_t, t, clip)
            x_t = mean + variance.sqrt() * z    # 4: mu_theta + sigma_t z
            yield t - 1, x_t, x_0               # 5: end for

    # ---- Sections 3 and 4: the bound, interpolation
    @torch.no_grad()
    def bits_per_dim(self, model, x_0, clip=True, generator=None):
        """The bound on -log p_theta(x_0) (Eqs. 3, 5) in bits per dimension, for x_0 of 256 levels:
        {total (B,), prior (B,): L_T, terms (B, T): L_0 .. L_{T-1}, each from one draw}."""
        terms = []
        for t in range(1, self.timesteps + 1):
            x_t = self.q_sample(x_0, t, standard_normal(x_0.shape, x_0.device, generator))
            output = model(x_t, torch.full((len(x_0),), t, device=x_0.device))
            terms.append(self.vlb_terms(output, x_0, x_t, t, clip))
        terms, prior = torch.stack(terms, dim=1), self.prior_bits(x_0)
        return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}

    def prior_bits(self, x_0):
        """L_T, KL(q(x_T | x_0) || N(0, I)) (Eq. 5), in bits per dimension (B,)."""
        bar = float(self.exact_alpha_bar[-1])
        nats = (bar * x_0**2 - bar - math.log1p(-bar)) / 2
        return nats.flatten(1).mean(1) / math.log(2)

    def vlb_terms(self, output, x_0, x_t, t, clip=True):
        """L_{t-1}, KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), or at t = 1
        -log p_theta(x_0 | x_1) (Eq. 5), in bits per dimension (B,)."""
        true_mean, _ = self.q_posterior(x_0, x_t, t)
        mean, _, _ = self.p_mean_variance(output, x_t, t, clip)
        log_variance = self.log_variance(output, x_t, t)
        log_ratio = at(self.log_posterior_variance, t, x_t) - log_variance
        distance = (true_mean - mean) ** 2 * (-log_variance).exp() / 2  # Eq. 8; Eq. 12 if not clip
        nats = (distance + (torch.expm1(log_ratio) - log_ratio) / 2).flatten(1).mean(1)
        first = torch.as_tensor(t, device=x_t.device).expand(len(x_t)) == 1
        if first.any():
            variance = log_variance.expand_as(mean)[first].cpu().double().exp()
            log_p = self.decoder_log_likelihood(x_0[first], mean[first], variance)
            nats[first] = -log_p.flatten(1).mean(1).to(nats)
        return nats / math.log(2)

    @staticmethod
    def decoder_log_likelihood(x_0, mean, variance):
        """log p_theta(x_0 | x_1) per value, for x_0 of 256 levels (Eq. 13): the Gaussian's integral
        over a level's bin, mirrored into the lower tail, where log_ndtr is exact."""
        x, mean, sigma = (v.cpu().double() for v in (x_0, mean, variance.sqrt()))
        lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) / sigma)
        upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) / sigma)
        log_a = torch.special.log_ndtr(torch.minimum(lower, -upper))
        log_b = torch.special.log_ndtr(torch.minimum(upper, -lower))
        log_p = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-15)))
        return log_p.to(x_0)

    def interpolate(self, model, x_0, x_0_prime, weights, t, clip=True, generator=None):
        """Figure 8: images x_0, x_0' (C, H, W), mixed at time t by N weights (lambda), with the
        same noise for every weight -> (N, C, H, W)."""
        def shared_noise(shape):
            return standard_normal((1, *shape[1:]), x_0.device, generator).expand(shape)

        weights = torch.as_tensor(weights).to(x_0).view(-1, 1, 1, 1)
        shape = (len(weights), *x_0.shape)
        x_t, x_t_prime = (self.q_sample(x, t, shared_noise(shape)) for x in (x_0, x_0_prime))
        mixed = (1 - weights) * x_t + weights * x_t_prime
        chain = copy.copy(self)
        chain.timesteps = t  # Algorithm 2 from t down, with the same tables
        return chain.sample(model, shape, mixed, clip, shared_noise)

    # ---- DDIM (Song, Meng, Ermon 2020, 2010.02502)
    def visited_times(self, steps):
        """Evenly spaced t, from T down to 0: the ends of `steps` strides."""
        if steps not in range(1, self.timesteps + 1):
            raise ValueError(f"steps must be whole, in 1..{self.timesteps}, not {steps}")
        return np.linspace(self.timesteps, 0, int(steps) + 1).round().astype(int).tolist()

    def ddim_sample(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """`sample` in `steps` calls of the model. eta = 0 adds no noise; 1 is Algorithm 2 on
        `respace`'s chain, with variance "posterior"."""
        for _, x_t, _ in self.ddim_steps(model, shape, steps, eta, x_T, clip, generator):
            pass
        return x_t

    @torch.no_grad()
    def ddim_steps(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """`ddim_sample` step by step: yields (t, x_t, predicted x_0), down to t = 0."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0..1, not {eta}")
        draw = partial(standard_normal, shape, self.beta.device, generator)
        x_t = draw() if x_T is None else x_T
        for t, s in pairwise(self.visited_times(steps)):  # a stride t -> s
            bar_t, bar_s = self.exact_alpha_bar[[t, s]].tolist()
            sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))  # DDIM Eq. 16
            z = draw() if sigma > 0 else 0
            output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
            eps, x_0 = self.predict(output, x_t, t, clip)
            direction = math.sqrt(max(1 - bar_s - sigma**2, 0)) * eps
            x_t = math.sqrt(bar_s) * x_0 + direction + sigma * z  # DDIM Eq. 12
            yield s, x_t, x_0

    @torch.no_grad()
    def ddim_invert(self, model, x_0, steps=50):
        """An x_T from which ddim_sample (eta=0) draws x_0: DDIM backwards (DDIM Eq. 14). A step
        s -> t takes eps(x_s, t), as s may be 0. The error falls as 1 / steps."""
        x_s = x_0
        for s, t in pairwise(self.visited_times(steps)[::-1]):
            bar_s = float(self.exact_alpha_bar[s])
            output = model(x_s, torch.full((len(x_s),), t, device=x_s.device))
            eps, _ = self.predict(output, x_s, t, clip=False)
            x_0_hat = (x_s - math.sqrt(1 - bar_s) * eps) / math.sqrt(bar_s)
            x_s = self.q_sample(x_0_hat, t, eps)
        return x_s

    # ---- iDDPM (Nichol & Dhariwal 2021, 2102.09672)
    def other_losses(self, output, x_0, x_t, t, eps):
        """vlb: T L_{t-1}, whose mean over t is the bound without L_T. hybrid: L_simple + 0.001 vlb,
        where vlb trains only the variance (iDDPM Eq. 16)."""
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
    """float64 (T,): the betas of alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2)
    (iDDPM Eq. 17), clipped. s keeps beta_1 from vanishing."""
    if timesteps not in range(1, 10**6):
        raise ValueError("timesteps must be whole, in 1..999999")
    u = torch.arange(int(timesteps) + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(beta_min, beta_max)


def important_times(T, n, device, first=1):
    """t (n,) in first..T, drawn with p_t in proportion to 1/t + 5/T, roughly like the bound's
    terms, and weights 1 / (T p_t) (n,) that undo it (after iDDPM Section 3.3)."""
    likely = 1 / torch.arange(first, T + 1, device=device) + 5 / T
    k = torch.multinomial(likely, n, replacement=True)
    return first + k, likely.sum() / (T * likely[k])


def respace(diffusion, model, steps):
    """-> (diffusion, model): Algorithm 2 on `steps` of the times 1..T, with their alpha_bar. So
    the beta of a stride t -> s is 1 - alpha_bar_t / alpha_bar_s, not beta_t. The network sees the
    old t; a "mean" is converted through x_0, a "learned" variance keeps its ratio to beta_tilde."""
    short, times = copy.deepcopy(diffusion), torch.tensor(diffusion.visited_times(steps)[::-1])
    short.set_alpha_bar(diffusion.exact_alpha_bar[times])
    short.register_buffer("times", times, persistent=False)
    short.to(diffusion.beta.device)

    def strided_model(x_t, k):
        t = short.times[k]
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


# ---- Guidance (Dhariwal & Nichol 2021, 2105.05233; Ho & Salimans 2022, 2207.12598)

def classifier_free_guidance(network, y, scale, null):
    """network(x_t, t, y) -> a model: eps(null) + scale (eps(y) - eps(null)), in one call (Ho &
    Salimans Eq. 6, scale = 1 + w). null: "no label"; scale 0 unconditional, 1 conditional."""
    def model(x_t, t):
        both = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])
        with_y, without = network(*both).chunk(2)
        guided, C = without + scale * (with_y - without), x_t.shape[1]
        return torch.cat([guided[:, :C], with_y[:, C:]], dim=1)
    return model


def classifier_guidance(diffusion, model, log_prob, scale):
    """-> a model of eps - scale sqrt(1 - alpha_bar_t) grad log p(y | x_t) (Dhariwal & Nichol
    Algorithm 2); log_prob(x_t, t) -> (B,)."""
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
