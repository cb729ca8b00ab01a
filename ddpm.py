"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv 2006.11239): the maths.

    beta_t, alpha_t = 1 - beta_t, alpha_bar_t = alpha_1 ... alpha_t     how images turn into noise
    q(x_t | x_{t-1}), q(x_t | x_0), q(x_{t-1} | x_t, x_0)               the forward process: fixed
    p_theta(x_{t-1} | x_t)                                              the reverse one: learned

In the paper's order: forward process, Algorithm 1, reverse process, Algorithm 2, the bound. What
later papers added follows, under their names. "Eq. 4" is the paper's.

t runs 1..T, as in the paper: a whole number or a tensor (B,). Tables have T+1 entries; entry 0 is
clean data (beta_0 = 0, alpha_bar_0 = 1), so alpha_bar_{t-1} needs no special case. They are made in
float64, then rounded: 1 - 0.9999 taken in float32 is off by 1.7e-4. Images x are float32
(B, C, H, W) in [-1, 1]. A model is any callable (x_t, t) -> output with t (B,) int64; labels are
bound before it comes here.
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


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """beta_1 .. beta_T on a straight line, float64 (T,); the defaults are Section 4's."""
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"beta must lie strictly between 0 and 1, not {beta_start} .. {beta_end}: "
                         "beta = 0 adds no noise, and beta = 1 leaves nothing of the image")
    check_timesteps(timesteps)
    return torch.linspace(beta_start, beta_end, int(timesteps), dtype=torch.float64)


def at(table, t, x):
    """Entries t of a table (T+1,) as (B, 1, 1, 1), or (1, 1, 1, 1) for a number: they multiply x.

    ValueError if t is not in 1..T. A t on a GPU is not checked, since that would wait for the GPU.
    """
    T = len(table) - 1
    if not torch.is_tensor(t) or t.device.type == "cpu":
        t = torch.as_tensor(t)
        if t.is_floating_point() or (t.numel() > 0 and not 1 <= t.min() <= t.max() <= T):
            raise ValueError(f"t must be whole numbers in 1..{T} (T), not {t.tolist()}")
        t = int(t) if t.ndim == 0 else t.long()
    return table[t].view(-1, *[1] * (x.ndim - 1))


def standard_normal(shape, device, generator=None):
    """A draw from N(0, I). generator: a torch.Generator, or a function of the shape."""
    if callable(generator):
        return generator(shape).to(device)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


class GaussianDiffusion(nn.Module):
    """The forward process q, the reverse process p_theta, Algorithm 1 and Algorithm 2.

    betas       beta_1 .. beta_T, each strictly between 0 and 1
    prediction  what the model's output is: "eps" (the paper), "x0", the "mean" of
                q(x_{t-1} | x_t, x_0), or "v" (Salimans & Ho 2022)
    variance    sigma_t^2: "beta" or "posterior" (Section 3.2); or learned, from as many output
                channels again: "learned_range" (iDDPM Eq. 15), "learned" (they are log sigma_t^2).
                Only the losses "vlb" and "hybrid" train these channels
    loss        "mse" (L_simple), "l1", "huber", "vlb" (the bound), "hybrid" (iDDPM Eq. 16)

    It holds float32 tables (T+1,), beta, alpha, alpha_bar, posterior_variance and more, that move
    with .to(device); nothing to learn. Wrong choices are a ValueError.
    """

    def __init__(self, betas, prediction="eps", variance="beta", loss="mse"):
        super().__init__()
        betas = betas.detach().cpu() if torch.is_tensor(betas) else betas
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 1e-12) & (betas < 1)).all():
            raise ValueError("betas must be one row of numbers between 1e-12 and 1, 1 excluded")
        self.prediction, self.variance, self.loss = prediction, variance, loss
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {', '.join(allowed)}; not {getattr(self, name)!r}")
        self.learns_variance = variance.startswith("learned")
        if loss == "hybrid" and not self.learns_variance:
            raise ValueError(f"loss 'hybrid' is for learned variances: {variance!r} has no gradient")
        self.set_alpha_bar(F.pad((1 - betas).cumprod(0), (1, 0), value=1.0))
        check_ends_in_noise(float(self.exact_alpha_bar[-1]), self.timesteps)

    def set_alpha_bar(self, alpha_bar):
        """All tables from alpha_bar_0 = 1, alpha_bar_1, .. alpha_bar_T, float64 (T+1,)."""
        before, after = alpha_bar[:-1], alpha_bar[1:]                # alpha_bar_{t-1}, alpha_bar_t
        alpha = after / before
        beta = 1 - alpha
        posterior_variance = (1 - before) / (1 - after) * beta          # Eq. 7: 0 at t = 1
        # beta-tilde_1 is 0, but Eq. 13 divides by sigma_1, and learned variances need a logarithm.
        # So beta-tilde_2 stands in, for beta_1 too, as in Ho's code. Samples do not see it.
        stand_in = posterior_variance[1:2] if len(beta) > 1 else beta
        log_posterior_variance = torch.cat([stand_in, posterior_variance[1:]]).log()
        log_beta = torch.cat([stand_in, beta[1:]]).log()
        tables = {
            "beta": F.pad(beta, (1, 0)), "alpha": F.pad(alpha, (1, 0), value=1.0),
            "alpha_bar": alpha_bar, "one_minus_alpha_bar": 1 - alpha_bar,
            "posterior_variance": F.pad(posterior_variance, (1, 0)),
            "x_0_weight": F.pad(before.sqrt() * beta / (1 - after), (1, 0)),             # Eq. 7
            "x_t_weight": F.pad(alpha.sqrt() * (1 - before) / (1 - after), (1, 0)),      # Eq. 7
            "log_posterior_variance": F.pad(log_posterior_variance, (1, 0)),
            "log_fixed_variance": F.pad(log_beta if self.variance == "beta"
                                        else log_posterior_variance, (1, 0)),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.exact_alpha_bar = alpha_bar            # float64, stays on the CPU: MPS has no float64
        self.timesteps = len(beta)

    def _apply(self, fn, recurse=True):
        """.to(), .half() and the like may move the tables, but not round them."""
        return super()._apply(lambda table: table.to(fn(table).device), recurse)

    # ------------------------------------------------------------ Section 2: the forward process

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
        """q(x_{t-1} | x_t, x_0) = N(mu-tilde_t, beta-tilde_t I) -> (mean, variance) (Eqs. 6, 7)."""
        mean = at(self.x_0_weight, t, x_t) * x_0 + at(self.x_t_weight, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)

    # ------------------------------------------------------------------------ Algorithm 1: training

    def training_losses(self, model, x_0, t=None, noise=None):
        """Algorithm 1, lines 3 to 5, for images x_0 ~ q(x_0) -> losses (B,), averaged over pixels
        rather than summed, so as to read alike at every size. t and noise may be given."""
        if t is None:                                                   # 3: t ~ Uniform(1..T)
            t = torch.randint(1, self.timesteps + 1, (len(x_0),), device=x_0.device)
        t = torch.as_tensor(t, device=x_0.device).long().expand(len(x_0))
        eps = torch.randn_like(x_0) if noise is None else noise         # 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        output = model(x_t, t)
        eps_theta, _ = self.split(output, x_t)
        squares = (self.target(x_0, x_t, t, eps) - eps_theta) ** 2      # 5: || eps - eps_theta ||^2
        if self.loss == "mse":
            return squares.flatten(1).mean(1)
        return self.other_losses(output, x_0, x_t, t, eps)

    def target(self, x_0, x_t, t, eps):
        """What the model should say: eps (Eq. 14), or what `prediction` names. Each gives the rest by
        Eq. 4, but the loss weights times differently. The paper tries the mean too (Table 2)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x_0
        if self.prediction == "mean":
            return self.q_posterior(x_0, x_t, t)[0]
        return (at(self.alpha_bar, t, x_t).sqrt() * eps                 # v (Salimans & Ho 2022)
                - at(self.one_minus_alpha_bar, t, x_t).sqrt() * x_0)

    # ----------------------------------------------------------- Section 3.2: the reverse process

    def split(self, output, x_t):
        """A model's output as (prediction, variance channels), each of x_t's shape, or None."""
        expected = (len(x_t), (1 + self.learns_variance) * x_t.shape[1], *x_t.shape[2:])
        if output.shape != expected:
            raise ValueError(f"variance {self.variance!r} needs a model output of shape {expected}"
                             f", not {tuple(output.shape)}")
        return output.chunk(2, dim=1) if self.learns_variance else (output, None)

    def predict(self, output, x_t, t, clip=True):
        """The model's output at x_t as noise and as image -> (eps, x_0), each of x_t's shape.

        clip=True holds x_0 in [-1, 1], where images are: not in Algorithm 2 as printed, but in the
        authors' code, and samples get better, since Eq. 15 multiplies an error of eps_theta by
        sqrt(1 - alpha_bar_t) / sqrt(alpha_bar_t), 157 at the paper's t = T. eps is taken from the
        clipped x_0, so that Eq. 4 still holds for the pair.
        """
        prediction, _ = self.split(output, x_t)
        signal = at(self.alpha_bar, t, x_t).sqrt()                  # x_t = signal x_0 + noise eps
        noise = at(self.one_minus_alpha_bar, t, x_t).sqrt()
        if self.prediction == "eps":
            x_0 = (x_t - noise * prediction) / signal                   # Eq. 15
        elif self.prediction == "x0":
            x_0 = prediction
        elif self.prediction == "mean":                                 # Eq. 7, solved for x_0
            x_0 = (prediction - at(self.x_t_weight, t, x_t) * x_t) / at(self.x_0_weight, t, x_t)
        else:                                                           # v
            x_0 = signal * x_t - noise * prediction
        if clip:
            x_0 = x_0.clamp(-1, 1)
        return (x_t - signal * x_0) / noise, x_0

    def p_mean_variance(self, output, x_t, t, clip=True):
        """p_theta(x_{t-1} | x_t) from the model's output at x_t -> (mean, variance, x_0 predicted).

        The mean is Eq. 11, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t), as
        Eq. 7 at the x_0 of Eq. 15. Without the clip they are equal; but Eq. 7 also takes a clipped
        x_0, and stays exact where alpha_t is tiny.
        """
        _, x_0 = self.predict(output, x_t, t, clip)                     # Eq. 15
        mean, _ = self.q_posterior(x_0, x_t, t)                         # Eq. 7, hence Eq. 11
        return mean, self.log_variance(output, x_t, t).exp(), x_0

    def log_variance(self, output, x_t, t):
        """log sigma_t^2: from a table (Section 3.2), or from the model's variance channels."""
        _, channels = self.split(output, x_t)
        if self.variance == "learned":
            return channels
        if self.variance == "learned_range":        # -1..1 stands for beta-tilde_t..beta_t
            v = (channels + 1) / 2                                      # iDDPM Eq. 15
            return (v * at(self.beta, t, x_t).log()
                    + (1 - v) * at(self.log_posterior_variance, t, x_t))
        return at(self.log_fixed_variance, t, x_t)

    # ------------------------------------------------------------------------ Algorithm 2: sampling

    def sample(self, model, shape, x_T=None, clip=True, generator=None):
        """Algorithm 2, the chain of Eq. 1: images x_0 of `shape`, in about [-1, 1]. x_T is drawn
        unless it is given; for `generator` see standard_normal."""
        for _, x_t, _ in self.sample_steps(model, shape, x_T, clip, generator):
            pass
        return x_t                                                      # 6: return x_0

    @torch.no_grad()
    def sample_steps(self, model, shape, x_T=None, clip=True, generator=None):
        """`sample` step by step: yields (t, x_t, the x_0 predicted on the way), t = T-1, .., 0."""
        device = self.beta.device
        x_t = standard_normal(shape, device, generator) if x_T is None else x_T        # 1
        for t in range(self.timesteps, 0, -1):                          # 2: for t = T, ..., 1 do
            z = standard_normal(shape, device, generator) if t > 1 else 0              # 3
            output = model(x_t, torch.full((len(x_t),), t, device=device))
            mean, variance, x_0 = self.p_mean_variance(output, x_t, t, clip)           # Eq. 11
            x_t = mean + variance.sqrt() * z                            # 4: x_{t-1}
            yield t - 1, x_t, x_0                                       # 5: end for

    # ---------------------------------------------- Eq. 5: the variational bound, in bits per dim

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, clip=True, generator=None):
        """The bound on -log2 p_theta(x_0) per dimension, for x_0 from 256 levels (Eqs. 3, 5).

        A dict: total (B,), prior (B,) = L_T, and terms (B, T), column t-1 being L_{t-1} from one
        draw of x_t. Section 4.3 calls L_0 distortion, and all the rest rate.
        """
        terms = []
        for t in range(1, self.timesteps + 1):
            x_t = self.q_sample(x_0, t, standard_normal(x_0.shape, x_0.device, generator))
            output = model(x_t, torch.full((len(x_0),), t, device=x_0.device))
            terms.append(self.vlb_terms(output, x_0, x_t, t, clip))
        terms, prior = torch.stack(terms, dim=1), self.prior_bits(x_0)
        return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}

    def prior_bits(self, x_0):
        """L_T = KL(q(x_T | x_0) || N(0, I)) of Eq. 5 in bits per dimension, (B,)."""
        alpha_bar = float(self.exact_alpha_bar[-1])
        nats = (alpha_bar * x_0**2 - alpha_bar - math.log1p(-alpha_bar)) / 2
        return nats.flatten(1).mean(1) / math.log(2)

    def vlb_terms(self, output, x_0, x_t, t, clip=True):
        """L_{t-1} of Eq. 5 in bits per dimension (B,), from the model's output at x_t.

        For t > 1, the KL of two Gaussians. With a fixed variance the model enters by the distance
        of the means alone (Eq. 8); without the clip, that is a weighted error of eps (Eq. 12).
        """
        mean, variance, _ = self.p_mean_variance(output, x_t, t, clip)
        log_variance = self.log_variance(output, x_t, t)
        log_ratio = at(self.log_posterior_variance, t, x_t) - log_variance
        squared_distance = (self.q_posterior(x_0, x_t, t)[0] - mean) ** 2
        nats = (log_ratio.exp() - 1 - log_ratio + squared_distance * (-log_variance).exp()) / 2
        nats = nats.flatten(1).mean(1)
        first = torch.as_tensor(t, device=x_t.device).expand(len(x_t)) == 1
        if first.any():
            variance = log_variance.exp().expand_as(mean)[first]
            log_likelihood = self.decoder_log_likelihood(x_0[first], mean[first], variance)
            nats = nats.masked_scatter(first, -log_likelihood.flatten(1).mean(1).to(nats.dtype))
        return nats / math.log(2)

    @staticmethod
    def decoder_log_likelihood(x_0, mean, variance):
        """log p_theta(x_0 | x_1) of Eq. 13 in nats per value, for x_0 in [-1, 1] from 256 levels.

        The Gaussian's integral over the bin of x_0's level, 2/255 wide; the outermost bins reach to
        infinity. In float64, in the tail where both ends are small: exact up to a sigma of 1e12.
        """
        x, mean, sigma = x_0.cpu().double(), mean.cpu().double(), variance.cpu().double().sqrt()
        lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) / sigma)
        upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) / sigma)
        a, b = torch.minimum(lower, -upper), torch.minimum(upper, -lower)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        log_likelihood = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-15)))
        return log_likelihood.to(x_0.dtype).to(x_0.device)

    # ------------------------------------------------------------------ Section 4.4: interpolation

    def interpolate(self, model, x_0, x_0_prime, weights, t, clip=True, generator=None):
        """Figure 8: images x_0, x_0' (C, H, W), mixed at time t -> (len(weights), C, H, W). The
        weights are the paper's lambda, and share every draw of noise."""
        def shared_noise(shape):
            return standard_normal((1, *shape[1:]), x_0.device, generator).expand(shape)

        x_t, x_t_prime = (self.q_sample(x[None], t, shared_noise((1, *x.shape)))
                          for x in (x_0, x_0_prime))
        weights = torch.as_tensor(weights, dtype=torch.float32, device=x_0.device).view(-1, 1, 1, 1)
        mixed = (1 - weights) * x_t + weights * x_t_prime
        chain = copy.copy(self)
        chain.timesteps = t                         # Algorithm 2 from t down
        return chain.sample(model, mixed.shape, mixed, clip, generator=shared_noise)

    # -------------------------------------------- Nichol & Dhariwal 2021, "Improved DDPM": losses

    def other_losses(self, output, x_0, x_t, t, eps):
        """l1, huber, or: "vlb", T L_{t-1} in bits per dim, whose mean over t is the bound without
        L_T; "hybrid", L_simple + 0.001 vlb, where vlb trains the variance alone (iDDPM Eq. 16)."""
        if self.loss == "vlb":
            return self.timesteps * self.vlb_terms(output, x_0, x_t, t, clip=False)
        prediction, channels = self.split(output, x_t)
        distance = {"l1": F.l1_loss, "huber": F.huber_loss, "hybrid": F.mse_loss}[self.loss]
        losses = distance(prediction, self.target(x_0, x_t, t, eps), reduction="none")
        losses = losses.flatten(1).mean(1)
        if self.loss == "hybrid":
            output = torch.cat([prediction.detach(), channels], dim=1)
            losses += 0.001 * self.timesteps * self.vlb_terms(output, x_0, x_t, t, clip=False)
        return losses

    # ------------------------------- Song, Meng, Ermon 2020, "Denoising Diffusion Implicit Models"

    def visited_times(self, steps):
        """The steps + 1 times from T down to 0 that a chain of `steps` strides visits."""
        if steps not in range(1, self.timesteps + 1):
            raise ValueError(f"steps must be a whole number in 1..{self.timesteps}, not {steps}")
        return np.linspace(self.timesteps, 0, int(steps) + 1).round().astype(int).tolist()

    def ddim_sample(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """Images (B, C, H, W) in `steps` calls of the model; the rest as in `sample`. eta = 0 adds
        no noise; 1 is Algorithm 2 with variance "posterior", on `respace`'s chain if steps < T."""
        for _, x_t, _ in self.ddim_steps(model, shape, steps, eta, x_T, clip, generator):
            pass
        return x_t

    @torch.no_grad()
    def ddim_steps(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None):
        """`ddim_sample` step by step: yields (t, x_t, the x_0 predicted on the way) down to 0."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0..1, not {eta}")
        device = self.beta.device
        times = self.visited_times(steps)
        x_t = standard_normal(shape, device, generator) if x_T is None else x_T
        for t, s in itertools.pairwise(times):                          # one stride, t -> s
            bar_t, bar_s = self.exact_alpha_bar[[t, s]].tolist()
            sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))   # DDIM Eq. 16
            output = model(x_t, torch.full((len(x_t),), t, device=device))
            eps, x_0 = self.predict(output, x_t, t, clip)
            z = standard_normal(shape, device, generator) if sigma > 0 else 0
            x_t = (math.sqrt(bar_s) * x_0 + math.sqrt(max(1 - bar_s - sigma**2, 0)) * eps
                   + sigma * z)                                         # DDIM Eq. 12
            yield s, x_t, x_0

    @torch.no_grad()
    def ddim_invert(self, model, x_0, steps=50):
        """The x_T from which ddim_sample (eta=0, clip=False) draws x_0, by its ODE (DDIM Eq. 14). A
        step s -> t takes eps at t, since s = 0 was never trained. The error falls as 1 / steps."""
        x_s = x_0
        for s, t in itertools.pairwise(self.visited_times(steps)[::-1]):
            bar_s = float(self.exact_alpha_bar[s])
            output = model(x_s, torch.full((len(x_s),), t, device=x_s.device))
            eps, _ = self.predict(output, x_s, t, clip=False)
            predicted_x_0 = (x_s - math.sqrt(1 - bar_s) * eps) / math.sqrt(bar_s)
            x_s = self.q_sample(predicted_x_0, t, eps)
        return x_s


# Nichol & Dhariwal 2021, "Improved DDPM" (2102.09672): another schedule, fewer steps -----------


def cosine_beta_schedule(timesteps=1000, s=0.008, beta_min=0.0, beta_max=0.999):
    """beta_t of alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), clipped to
    beta_min..beta_max; float64 (T,) (iDDPM Eq. 17). s keeps beta_1 from being too small."""
    check_timesteps(timesteps)
    if beta_min > beta_max:
        raise ValueError(f"beta_min {beta_min} is above beta_max {beta_max}")
    u = torch.arange(int(timesteps) + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(beta_min, beta_max)


def respace(diffusion, model, steps):
    """-> (diffusion, model) of a chain of `steps` steps: Algorithm 2 on a subsequence of 1..T.

    It keeps alpha_bar at the times it visits, so a stride t -> s has the beta
    1 - alpha_bar_t / alpha_bar_s, never beta_t, and the network sees the old t. What depends on a
    step's length is translated: the "mean", and "learned" variances by their ratio to beta-tilde.
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


# Guidance: models around models ----------------------------------------------------------------


def classifier_free_guidance(network, y, scale, null):
    """network(x_t, t, y) -> a model: eps(null) + scale (eps(y) - eps(null)), in one call.

    y (B,) int64 are labels, and null means "no label". scale 0 is unconditional, 1 conditional,
    more exaggerates: 1 + w in Ho & Salimans 2022 (2207.12598, Eq. 6).
    """
    def model(x_t, t):
        labels = torch.cat([y, torch.full_like(y, null)])
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        conditional, unconditional = both.chunk(2)
        C = x_t.shape[1]
        guided = unconditional[:, :C] + scale * (conditional[:, :C] - unconditional[:, :C])
        return torch.cat([guided, conditional[:, C:]], dim=1)

    return model


def classifier_guidance(diffusion, model, log_prob, scale):
    """-> a model with eps - scale sqrt(1 - alpha_bar_t) grad log p(y | x_t) as its eps (Dhariwal &
    Nichol 2021, 2105.05233, Algorithm 2). log_prob(x_t, t) -> (B,) knows noisy images."""
    def guided_model(x_t, t):
        output = model(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():      # samplers run without gradients
            x = x_t.clone().requires_grad_()
            gradient = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)[0]
        noise = at(diffusion.one_minus_alpha_bar, t, x_t).sqrt()
        eps, _ = diffusion.predict(output, x_t, t, clip=False)
        eps = eps - scale * noise * gradient
        x_0 = (x_t - noise * eps) / at(diffusion.alpha_bar, t, x_t).sqrt()           # Eq. 15
        guided = diffusion.target(x_0, x_t, t, eps)
        return torch.cat([guided, output[:, x_t.shape[1]:]], dim=1)

    return guided_model


# Checks ------------------------------------------------------------------------------------------


def check_timesteps(timesteps):
    """ValueError unless T is a whole number in 1..10^6."""
    if timesteps != int(timesteps) or not 1 <= timesteps <= 10**6:
        raise ValueError(f"timesteps (T) must be a whole number in 1..10^6, not {timesteps}")


def check_ends_in_noise(alpha_bar_T, timesteps):
    """Warn if x_T is not nearly pure noise. ValueError if alpha_bar_T is too small for float32."""
    if alpha_bar_T < 1e-36:
        raise ValueError(f"alpha_bar_T = {alpha_bar_T:.0e} is too small for float32: smaller betas")
    if alpha_bar_T > 0.01:
        cure = (f"a linear schedule from beta_start={0.1 / timesteps:.3g} to beta_end="
                f"{20 / timesteps:.3g}" if timesteps > 20 else "the cosine schedule")
        warnings.warn(f"alpha_bar_T = {alpha_bar_T:.3g}: x_T is still part image, but sampling "
                      f"starts from pure noise. With T = {timesteps}, {cure} ends in noise", stacklevel=3)
