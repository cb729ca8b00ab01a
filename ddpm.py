"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv 2006.11239): the paper's maths.

    beta_t, alpha_t = 1 - beta_t, alpha_bar_t = alpha_1 ... alpha_t      how fast an image turns into noise, t = 1 .. T
    q(x_t | x_{t-1}), q(x_t | x_0), q(x_{t-1} | x_t, x_0)                the forward process: fixed, nothing to learn
    p_theta(x_{t-1} | x_t)                                               the reverse process, learned through eps_theta

They stand in the order in which one needs them: the forward process, Algorithm 1, the reverse process, Algorithm 2, the bound.

Conventions. "Eq. 4" is the paper's; other papers are named. t runs 1 .. T as in the paper; index 0 of every schedule
means clean data (beta_0 = 0, alpha_bar_0 = 1), so alpha_bar_{t-1} needs no special case. Images are float32 in [-1, 1].
A model is any callable (x_t, t) -> prediction, with x_t (B, C, H, W) and t (B,) int64; labels are bound before it comes
here (a lambda, or one of the guidance wrappers at the end). Schedules are worked out in float64 on the CPU and only then
rounded to float32: 1 - 0.9999 taken in float32 is off by 1.7e-4 of its value.
"""
import itertools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHOICES = {"prediction": ("eps", "x0", "mean", "v"), "variance": ("beta", "posterior", "learned_range", "learned"),
           "loss": ("mse", "l1", "huber", "vlb", "hybrid")}


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """beta_1 .. beta_T on a straight line, float64 (T,), by default Section 4's. ValueError if an end is not in (0, 1)."""
    for beta in (beta_start, beta_end):
        if not 0 < beta < 1:
            raise ValueError(f"beta must lie strictly between 0 and 1, not {beta}: a step with beta = 0 adds no noise, "
                             "so it has no reverse; beta = 1 leaves nothing of x_0, and Eq. 15 would divide by zero")
    return torch.linspace(beta_start, beta_end, whole(timesteps), dtype=torch.float64)


def at(coefficients, t):
    """The entries for t (B,) of a table (T+1,), as (B, 1, 1, 1): ready to multiply images."""
    return coefficients[t][:, None, None, None]


class GaussianDiffusion(nn.Module):
    """The forward process q, the reverse process p_theta, and the two algorithms.

    betas       beta_1 .. beta_T, (T,), each in (0, 1)
    prediction  what the model's output is: "eps" (the paper), "x0", the "mean" of q(x_{t-1} | x_t, x_0), or "v"
    variance    sigma_t^2: "beta" or "posterior" (Section 3.2), or learned, from as many output channels again:
                "learned_range" (iDDPM Eq. 15) or "learned" (the channels are log sigma_t^2)
    loss        "mse" (L_simple), "l1", "huber", "vlb" (the bound itself), "hybrid" (iDDPM Eq. 16)

    It holds tables (T+1,) in float32 that move with .to(device), and no parameters. Any other choice is a ValueError.
    """

    def __init__(self, betas, prediction="eps", variance="beta", loss="mse"):
        super().__init__()
        betas = torch.as_tensor(betas.detach().cpu() if torch.is_tensor(betas) else betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be one row of numbers strictly between 0 and 1")
        self.timesteps, self.prediction, self.variance, self.loss = len(betas), prediction, variance, loss
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        self.learns_variance = variance.startswith("learned")
        if loss == "hybrid" and not self.learns_variance:
            raise ValueError("loss 'hybrid' adds L_vlb for the variance alone (its mean is held fixed): with variance "
                             f"{variance!r} that term has no gradient. Use 'learned_range' or 'learned', or loss 'mse'")

        beta = F.pad(betas, (1, 0))                                              # beta_0 = 0: clean data
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)                                             # alpha_bar_0 = 1
        alpha_bar_before = F.pad(alpha_bar, (1, 0), value=1)[:-1]                # alpha_bar_{t-1}
        divisor = (1 - alpha_bar).clamp(min=betas[0])                            # 1 - alpha_bar_t, but not 0 at t = 0
        posterior_variance = (1 - alpha_bar_before) / divisor * beta             # Eq. 7: 0 at t = 1
        check_end(float(alpha_bar[-1]), self.timesteps)
        # At t = 1 posterior_variance is 0, but Eq. 13 divides by its root and iDDPM Eq. 15 takes its logarithm. beta-tilde_2
        # stands in, also in "beta", as in Ho's code. Samples do not see it (no noise is added at t = 1); the decoder L_0 does.
        stand_in = posterior_variance[2] if self.timesteps > 1 else beta[1]
        positive_posterior = torch.cat([stand_in.expand(2), posterior_variance[2:]])
        fixed_variance = torch.cat([stand_in.expand(2), beta[2:]]) if variance == "beta" else positive_posterior

        self.exact_alpha_bar = alpha_bar                                         # float64; stays on the CPU whatever .to() says
        tables = {
            "beta": beta, "alpha": alpha, "alpha_bar": alpha_bar, "one_minus_alpha_bar": 1 - alpha_bar,
            "posterior_variance": posterior_variance, "fixed_variance": fixed_variance,
            "x_0_weight": alpha_bar_before.sqrt() * beta / divisor,                                                 # Eq. 7
            "x_t_weight": alpha.sqrt() * (1 - alpha_bar_before) / divisor, "log_posterior_variance": positive_posterior.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def per_image(self, t, x):
        """t, a number or (B,), as int64 (B,) beside x (B, C, H, W). ValueError if x is no such batch or t is outside 1..T (which a
        GPU's t is not asked: it would stall)."""
        if x.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), not {tuple(x.shape)}; points (B, D) can be (B, D, 1, 1)")
        t = torch.as_tensor(t)
        if t.device.type == "cpu" and t.numel() and (t.is_floating_point() or t.min() < 1 or t.max() > self.timesteps):
            raise ValueError(f"t must be whole numbers in 1..{self.timesteps} (1..T, as in the paper), not {t.tolist()}")
        if t.device.type == "cpu" and t.ndim == 0:
            return torch.full((len(x),), int(t), device=x.device)               # nothing to copy, so a GPU need not wait
        return t.to(x.device, torch.int64).expand(len(x))

    # ------------------------------------------------------------------------------------ Section 2: the forward process

    def q_step(self, x_prev, t, noise=None):
        """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), one step of the chain (Eq. 2)."""
        t, noise = self.per_image(t, x_prev), self.normal_eps(x_prev, noise)
        return at(self.alpha, t).sqrt() * x_prev + at(self.beta, t).sqrt() * noise

    def q_sample(self, x_0, t, noise=None, generator=None):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), in one go (Eq. 4)."""
        t, noise = self.per_image(t, x_0), self.normal_eps(x_0, noise, generator)
        return at(self.alpha_bar, t).sqrt() * x_0 + at(self.one_minus_alpha_bar, t).sqrt() * noise

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0) = N(mu-tilde_t, beta-tilde_t I) -> mean (B, C, H, W), variance (B, 1, 1, 1) (Eqs. 6-7)."""
        t = self.per_image(t, x_t)
        return at(self.x_0_weight, t) * x_0 + at(self.x_t_weight, t) * x_t, at(self.posterior_variance, t)

    # ----------------------------------------------------------------------------------------------- Algorithm 1: training

    def training_loss(self, model, x_0, t=None, noise=None):
        """The number whose gradient Algorithm 1 steps along: the mean of training_losses over the batch x_0."""
        return self.training_losses(model, x_0, t, noise).mean()

    def training_losses(self, model, x_0, t=None, noise=None):
        """Algorithm 1, lines 3 to 5, for images x_0 (B, C, H, W) -> (B,). t and noise are drawn unless given."""
        t = self.uniform_t(x_0, t)                          # 3: t ~ Uniform({1, ..., T})
        eps = self.normal_eps(x_0, noise)                   # 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)                    #    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
        eps_theta = model(x_t, t)
        return self.distance(eps_theta, x_0, x_t, t, eps)   # 5: || eps - eps_theta(x_t, t) ||^2

    def uniform_t(self, x_0, t=None):
        """t ~ Uniform({1, ..., T}), T included: (B,) int64, unless t is given."""
        return torch.randint(1, self.timesteps + 1, (len(x_0),), device=x_0.device) if t is None else self.per_image(t, x_0)

    def normal_eps(self, x, noise=None, generator=None):
        """eps ~ N(0, I) of x's shape, unless `noise` is given. The generator may live on the CPU though x does not."""
        if noise is not None:
            return noise.to(x.device)
        device = generator.device if generator else x.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

    def distance(self, output, x_0, x_t, t, eps):
        """How far the model's output (B, ...) is from what it should be -> (B,): the paper's L_simple, or what `loss` says."""
        loss = {"vlb": self.l_vlb, "hybrid": self.l_hybrid}.get(self.loss, self.l_simple)
        return loss(output, x_0, x_t, t, eps)

    def l_simple(self, output, x_0, x_t, t, eps):
        """Eq. 14 for "mse", (B,); a mean over the pixels rather than a sum, so that it reads the same at every image size."""
        prediction, _ = self.split(output, x_t)
        pixelwise = {"l1": F.l1_loss, "huber": F.huber_loss}.get(self.loss, F.mse_loss)
        return pixelwise(prediction, self.target(x_0, x_t, t, eps), reduction="none").flatten(1).mean(1)

    def target(self, x_0, x_t, t, eps):
        """What the model is asked for, (B, C, H, W): the paper's eps (Eq. 14), or what `prediction` says.

        The paper tries the mean too (Table 2). Eq. 4 ties x_0, x_t and eps together, so whatever is predicted gives the
        others; as a loss, x0 and v (Salimans & Ho 2022) weight the times differently.
        """
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x_0
        if self.prediction == "mean":
            return self.q_posterior(x_0, x_t, t)[0]
        return at(self.alpha_bar, t).sqrt() * eps - at(self.one_minus_alpha_bar, t).sqrt() * x_0                 # v

    # --------------------------------------------------------------------------------- Section 3.2: the reverse process

    def split(self, output, x_t):
        """A model's output as (prediction, variance channels), each (B, C, H, W); the latter None if sigma_t is fixed."""
        B, C, H, W = x_t.shape
        expected = (B, 2 * C if self.learns_variance else C, H, W)
        if output.shape != expected:
            raise ValueError(f"variance {self.variance!r} needs a model output of shape {expected}, not {tuple(output.shape)}")
        return output.chunk(2, dim=1) if self.learns_variance else (output, None)

    def predict(self, model, x_t, t, clip=True):
        """One call of the model at x_t (B, C, H, W) -> (eps, x_0), its prediction seen as noise and as image.

        clip=True holds x_0 in [-1, 1], where images live. Algorithm 2 as printed does not clip; the authors' code does, and
        samples are better for it: Eq. 15 multiplies an error of eps_theta by sqrt(1 - alpha_bar_t) / sqrt(alpha_bar_t), 157 at
        the paper's t = T. eps is then the one that makes x_t out of the clipped x_0 (Eq. 4): with the network's own eps the clip
        would not reach Eq. 11 at all, and DDIM's eps would contradict its x_0.
        """
        t = self.per_image(t, x_t)
        output, _ = self.split(model(x_t, t), x_t)
        signal, spread = at(self.alpha_bar, t).sqrt(), at(self.one_minus_alpha_bar, t).sqrt()    # x_t = signal x_0 + spread eps
        if self.prediction == "eps":
            x_0 = (x_t - spread * output) / signal                                                    # Eq. 15
        elif self.prediction == "x0":
            x_0 = output
        elif self.prediction == "mean":                                                               # Eq. 7, solved for x_0
            x_0 = (output - at(self.x_t_weight, t) * x_t) / at(self.x_0_weight, t)
        else:                                                                                         # v
            x_0 = signal * x_t - spread * output
        if clip:
            x_0 = x_0.clamp(-1, 1)
        return (x_t - signal * x_0) / spread, x_0

    def p_mean_variance(self, model, x_t, t, clip=True):
        """p_theta(x_{t-1} | x_t) -> mean (B, C, H, W), variance, x_0 (B, C, H, W); one call of the model.

        The variance is (B, 1, 1, 1), or (B, C, H, W) if it is learned. The mean is Eq. 11 (Eqs. 9 and 10 lead there). With
        the pair (eps, x_0) of `predict` it is also Eq. 7 at that x_0, clipped or not.
        """
        t = self.per_image(t, x_t)
        output = model(x_t, t)
        eps, x_0 = self.predict(lambda x_t, t: output, x_t, t, clip)             # no second call: a model that knows its answer
        eps_weight = at(self.beta, t) / at(self.one_minus_alpha_bar, t).sqrt()
        mean = (x_t - eps_weight * eps) / at(self.alpha, t).sqrt()                                    # Eq. 11
        return mean, self.sigma_squared(self.split(output, x_t)[1], t), x_0

    def sigma_squared(self, channels, t):
        """The variance of p_theta: of a table (Section 3.2), or from the model's variance channels (B, C, H, W)."""
        if self.variance == "learned":
            return channels.exp()
        if self.variance == "learned_range":                     # -1 .. 1 runs from beta-tilde_t to beta_t (iDDPM Eq. 15)
            v = (channels + 1) / 2
            return (v * at(self.beta, t).log() + (1 - v) * at(self.log_posterior_variance, t)).exp()
        return at(self.fixed_variance, t)

    # ----------------------------------------------------------------------------------------------- Algorithm 2: sampling

    @torch.no_grad()
    def sample(self, model, shape, x_T=None, clip=True, generator=None, on_step=None):
        """Algorithm 2, the chain of Eq. 1: images x_0 of `shape` (B, C, H, W), about [-1, 1], from noise, in T calls of the model.

        on_step(t, x_t, x_0) is called first with (T, x_T, None), then after each step with the t it reached and the x_0
        predicted in it. x_T (B, C, H, W), if given, is where the chain starts.
        """
        x_t, on_step = self.begin(shape, x_T, generator, on_step)               # 1: x_T ~ N(0, I)
        for t in range(self.timesteps, 0, -1):                                  # 2: for t = T, ..., 1 do
            x_t, x_0_hat = self.p_sample(model, x_t, t, clip, generator)        # 3-4: x_{t-1} from x_t
            on_step(t - 1, x_t, x_0_hat)
        return x_t                                                              # 6: return x_0

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip=True, generator=None, noise=None):
        """Algorithm 2, lines 3 and 4 -> (x_{t-1}, the x_0 predicted on the way). `noise`, if given, is used as z."""
        t = self.per_image(t, x_t)
        z = self.normal_eps(x_t, noise, generator)
        z = z * (t > 1)[:, None, None, None]                                    # 3: z ~ N(0, I) if t > 1, else z = 0
        mean, variance, x_0_hat = self.p_mean_variance(model, x_t, t, clip)
        return mean + variance.sqrt() * z, x_0_hat                              # 4: Eq. 11 + sigma_t z

    def begin(self, shape, x_T, generator, on_step):
        """What samplers start from: x_T, drawn unless given, and on_step, a no-op unless given, told of x_T."""
        on_step = on_step or (lambda t, x_t, x_0: None)
        x_T = self.normal_eps(self.beta.new_empty(shape), x_T, generator)
        on_step(self.timesteps, x_T, None)
        return x_T, on_step

    # ------------------------------------------------------------------- Eq. 5: the variational bound, in bits per dimension

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, clip=True, generator=None):
        """The bound on -log2 p_theta(x_0) per dimension, for images x_0 (B, C, H, W) in [-1, 1] from 256 levels (Eq. 5).

        Returns a dict of float32: total (B,); prior (B,) = L_T; terms (B, T), column t-1 being L_{t-1} (L_0 first), each
        estimated with one draw of x_t. Section 4.3 calls L_0 distortion, and all the rest, L_T included, rate.
        """
        terms = torch.stack([self.vlb_terms(model, x_0, self.q_sample(x_0, t, generator=generator), t, clip)
                             for t in range(1, self.timesteps + 1)], dim=1)
        prior = self.prior_bits(x_0)
        return {"total": prior + terms.sum(1), "prior": prior, "terms": terms}

    def prior_bits(self, x_0):
        """L_T of Eq. 5, in bits per dimension (B,): KL(q(x_T | x_0) || N(0, I)); no model in it."""
        alpha_bar = float(self.exact_alpha_bar[-1])
        nats = (alpha_bar * x_0**2 - alpha_bar - math.log1p(-alpha_bar)) / 2
        return nats.flatten(1).mean(1) / math.log(2)

    def vlb_terms(self, model, x_0, x_t, t, clip=True):
        """L_{t-1} of Eq. 5 in bits per dimension (B,): KL(q(x_{t-1}|x_t,x_0) || p_theta(x_{t-1}|x_t)); L_0 at t = 1.

        For t > 1 and a fixed variance only the distance of the means (Eq. 8) depends on the model; without the clip that is a
        weighted distance of eps (Eq. 12).
        """
        t = self.per_image(t, x_t)
        mean, variance, _ = self.p_mean_variance(model, x_t, t, clip)
        log_ratio = at(self.log_posterior_variance, t) - variance.log()
        squared_distance = (self.q_posterior(x_0, x_t, t)[0] - mean) ** 2
        nats = (torch.expm1(log_ratio) - log_ratio + squared_distance / variance) / 2          # KL of two Gaussians
        first = t == 1
        if first.any():
            decoded = -self.decoder_log_likelihood(x_0[first], mean[first], variance[first])
            nats = nats.masked_scatter(first[:, None, None, None], decoded.to(nats.dtype))
        return nats.flatten(1).mean(1) / math.log(2)

    @staticmethod
    def decoder_log_likelihood(x_0, mean, variance):
        """log p_theta(x_0 | x_1) of Eq. 13, in nats per value, for x_0 in [-1, 1] from 256 levels.

        The Gaussian's integral over the bin of x_0's level, 2/255 wide; the outermost bins reach to infinity. log(Phi(b) -
        Phi(a)) is taken on the side where both are small, so the tails are exact and need no floor. In float64 on the CPU.
        """
        x, mean, sigma = x_0.cpu().double(), mean.cpu().double(), variance.cpu().double().sqrt()
        lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) / sigma)
        upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) / sigma)
        a, b = torch.minimum(lower, -upper), torch.minimum(upper, -lower)       # as it is, or its mirror image
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        inside = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-15)))
        return inside.to(x_0.dtype).to(x_0.device)

    # -------------------------------------------------------------------------------------------- Section 4.4: interpolation

    @torch.no_grad()
    def interpolate(self, model, x_0, x_0_prime, weights, t, clip=True, generator=None):
        """Section 4.4, Figure 8: two images (C, H, W) mixed at time t and decoded from there -> (len(weights), C, H, W).

        The weights are the paper's lambda. x_t ~ q(x_t | x_0) and x_t' are drawn once each; all weights share every step's z.
        """
        x_t, x_t_prime = (self.q_sample(x[None], t, generator=generator) for x in (x_0, x_0_prime))
        weights = torch.as_tensor(weights, dtype=torch.float32, device=x_0.device)[:, None, None, None]
        x = (1 - weights) * x_t + weights * x_t_prime
        for s in range(t, 0, -1):
            x, _ = self.p_sample(model, x, s, clip, noise=self.normal_eps(x_t, generator=generator))
        return x

    # ------------------------------------------------------- Nichol & Dhariwal 2021, "Improved DDPM": losses with a variance

    def l_vlb(self, output, x_0, x_t, t, eps):
        """T L_{t-1} in bits per dimension (B,), so that its mean over t is the bound without L_T. x_t contains eps."""
        return self.timesteps * self.vlb_terms(lambda x_t, t: output, x_0, x_t, t, clip=False)

    def l_hybrid(self, output, x_0, x_t, t, eps):
        """L_simple + 0.001 L_vlb (iDDPM Eq. 16), (B,); L_vlb teaches the variance alone, its mean being held fixed."""
        prediction, channels = self.split(output, x_t)
        held = torch.cat([prediction.detach(), channels], dim=1)
        return self.l_simple(output, x_0, x_t, t, eps) + 0.001 * self.l_vlb(held, x_0, x_t, t, eps)

    # ------------------------------------------ Song, Meng, Ermon 2020, "Denoising Diffusion Implicit Models": fewer steps

    def walk(self, steps):
        """steps + 1 times from T down to 0: round(linspace(0, T, steps + 1)), reversed. ValueError unless 1 <= steps <= T."""
        if steps not in range(1, self.timesteps + 1):
            raise ValueError(f"steps must be a whole number in 1..{self.timesteps} (T), not {steps}")
        return np.linspace(0, self.timesteps, int(steps) + 1).round().astype(int).tolist()[::-1]

    @torch.no_grad()
    def ddim_sample(self, model, shape, steps=50, eta=0.0, x_T=None, clip=True, generator=None, on_step=None):
        """Images (B, C, H, W) in `steps` calls of the model (DDIM Eq. 12, with Eq. 16's sigma); arguments as in `sample`.

        eta = 0 is deterministic; eta = 1 is Algorithm 2 with variance "posterior", on the chain of `respace` if steps < T.
        sigma goes with eta, so the variance with eta^2; some code scales the variance by eta itself.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0..1 (0: deterministic DDIM, 1: DDPM's noise), not {eta}")
        x_t, on_step = self.begin(shape, x_T, generator, on_step)
        times = self.walk(steps)
        for t, s in itertools.pairwise(times):                                 # a stride t -> s: both ends are needed
            alpha_bar_t, alpha_bar_s = self.exact_alpha_bar[[t, s]].tolist()
            sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
            eps, x_0_hat = self.predict(model, x_t, t, clip)
            z = self.normal_eps(x_t, generator=generator) if sigma > 0 else 0.0
            x_t = math.sqrt(alpha_bar_s) * x_0_hat + math.sqrt(max(1 - alpha_bar_s - sigma**2, 0)) * eps + sigma * z
            on_step(s, x_t, x_0_hat)
        return x_t

    @torch.no_grad()
    def ddim_invert(self, model, x_0, steps=50):
        """The x_T (B, C, H, W) from which ddim_sample (eta = 0, clip=False) draws x_0: its ODE, run backwards (DDIM Eq. 14).

        A step s -> t uses eps_theta(x_s, t), as s = 0 was never trained. The error of a round trip falls as 1/steps.
        """
        x_s, times = x_0, self.walk(steps)[::-1]
        for s, t in itertools.pairwise(times):
            alpha_bar_s = float(self.exact_alpha_bar[s])
            eps, _ = self.predict(model, x_s, t, clip=False)
            guess = (x_s - math.sqrt(1 - alpha_bar_s) * eps) / math.sqrt(alpha_bar_s)
            x_s = self.q_sample(guess, t, eps)
        return x_s


# Nichol & Dhariwal 2021, "Improved DDPM" (2102.09672): another schedule, fewer steps, t drawn by its loss -----------------


def cosine_beta_schedule(timesteps=1000, s=0.008, beta_min=0.0, beta_max=0.999):
    """beta_t of alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2); float64 (T,) (iDDPM Eq. 17).

    s > 0 keeps beta_1 from being too small; betas are clipped to beta_min..beta_max. ValueError unless T is whole and >= 1.
    """
    if beta_min > beta_max:
        raise ValueError(f"beta_min {beta_min} is above beta_max {beta_max}")
    u = torch.arange(whole(timesteps) + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(beta_min, beta_max)


def respace(diffusion, model, steps):
    """A chain of `steps` steps and a model for it: Algorithm 2, the bound and all else on a subsequence of the T times.

    The new chain has the old alpha_bar at those times, hence betas of 1 - alpha_bar_t / alpha_bar_s for a stride t -> s,
    never beta_t; the network still sees the old t. Its prediction is translated, through eps and x_0, into the new chain's
    terms. Two outputs depend on the length of a step and change with it: the "mean", and the "learned" variance, which keeps
    its ratio to beta-tilde. ValueError unless 1 <= steps <= T.
    """
    times = torch.tensor(diffusion.walk(steps)[::-1])
    if steps == diffusion.timesteps:
        return diffusion, model
    alpha_bar = diffusion.exact_alpha_bar[times]
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=1 - 2**-53)          # a long stride can round to beta = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # about alpha_bar_T: said when `diffusion` was made
        short = GaussianDiffusion(betas, diffusion.prediction, diffusion.variance, diffusion.loss).to(diffusion.beta.device)
    times = times.to(diffusion.beta.device)

    def strided_model(x_t, k):
        t = times[k]
        output = model(x_t, t)
        eps, x_0 = diffusion.predict(lambda x_t, t: output, x_t, t, clip=False)
        channels = output[:, x_t.shape[1]:]                  # none at all if sigma_t is fixed
        if diffusion.variance == "learned":
            channels = channels - at(diffusion.log_posterior_variance, t) + at(short.log_posterior_variance, k)
        return torch.cat([short.target(x_0, x_t, k, eps), channels], dim=1)

    return short, strided_model


class ImportanceSampler(nn.Module):
    """Draws t with probability proportional to sqrt(E[L_t^2]), which makes L_vlb less noisy (iDDPM Eq. 18).

    E is over the last `history` losses seen at t; until every t has that many, t is uniform. Every probability keeps a
    thousandth of the uniform one, so that no t is forgotten. Its memory is a buffer, so state_dict() resumes it.
    """

    def __init__(self, timesteps, history=10):
        super().__init__()
        self.register_buffer("losses", torch.full((timesteps, history), -1.0))           # newest first; -1: none yet

    def probabilities(self):
        """p_t for t = 1 .. T, (T,), summing to 1."""
        p = self.losses.double().square().mean(1).sqrt() + 1e-30
        if (self.losses < 0).any():
            p = torch.ones_like(p)
        return (0.999 * p / p.sum() + 0.001 / len(p)).float()

    def draw(self, n, generator=None):
        """t (n,) in 1..T, and weights (n,) = 1 / (T p_t): the mean of weights * losses is unbiased for uniform t."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t + 1, 1 / (len(p) * p[t])

    def update(self, t, losses):
        """Remember losses (n,) seen at t (n,), each in place of the oldest; those that are not finite are passed over."""
        finite = torch.isfinite(losses)
        for k, loss in zip((t[finite] - 1).tolist(), losses[finite].detach().clamp(min=0)):      # a KL may round to below 0
            self.losses[k] = torch.cat([loss[None], self.losses[k, :-1]])


# Guidance: models around models -----------------------------------------------------------------------------------------


def classifier_free_guidance(network, y, scale, null):
    """network(x_t, t, y) -> a model: eps(null) + scale (eps(y) - eps(null)) in one call on a doubled batch.

    y (B,) int64 are the labels, null the one that means "no label". scale 0 is unconditional, 1 conditional, and above 1
    exaggerates the label: scale = 1 + w for the w of Ho & Salimans 2022 (Eq. 6). Variance channels are the conditional ones.
    """
    def model(x_t, t):
        labels = torch.cat([y, torch.full_like(y, null)])
        conditional, unconditional = network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
        C = x_t.shape[1]
        guided = unconditional[:, :C] + scale * (conditional[:, :C] - unconditional[:, :C])
        return torch.cat([guided, conditional[:, C:]], dim=1)

    return model


def classifier_guidance(diffusion, model, log_prob, scale):
    """A model whose eps is shifted by - scale sqrt(1 - alpha_bar_t) grad log p(y | x_t) (Dhariwal & Nichol 2021, Alg. 2).

    log_prob(x_t, t) -> (B,) is a classifier of noisy images, log p of the label wanted. For every prediction and sampler.
    """
    def guided_model(x_t, t):
        output = model(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():       # samplers run without gradients; this one is needed
            x = x_t.clone().requires_grad_()
            gradient = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)[0]
        spread = at(diffusion.one_minus_alpha_bar, t).sqrt()
        eps, _ = diffusion.predict(lambda x_t, t: output, x_t, t, clip=False)
        eps = eps - scale * spread * gradient
        x_0 = (x_t - spread * eps) / at(diffusion.alpha_bar, t).sqrt()                                # Eq. 15
        return torch.cat([diffusion.target(x_0, x_t, t, eps), output[:, x_t.shape[1]:]], dim=1)

    return guided_model


# Small tools ------------------------------------------------------------------------------------------------------------


def check_end(alpha_bar_T, timesteps):
    """Warn if x_T is not nearly pure noise, which sampling starts from; ValueError if alpha_bar_T nears float32's smallest number."""
    if alpha_bar_T < 1e-36:
        raise ValueError(f"alpha_bar_T = {alpha_bar_T:.0e} is too small for float32: use fewer steps or smaller betas")
    if alpha_bar_T > 0.01:
        start, end = 0.1 / timesteps, 20 / timesteps                 # the paper's, times 1000/T
        cure = f"a linear schedule from beta_start={start:.3g} to beta_end={end:.3g}" if end < 1 else "the cosine schedule"
        warnings.warn(f"alpha_bar_T = {alpha_bar_T:.3g}: x_T keeps {math.sqrt(alpha_bar_T):.0%} of the image's amplitude, but "
                      "sampling starts from pure noise, which the network never saw; samples suffer. "
                      f"With T = {timesteps}, {cure} ends in noise", stacklevel=3)


def whole(timesteps):
    """T as an int; ValueError unless it is a whole number of at least 1."""
    if timesteps != int(timesteps) or timesteps < 1:
        raise ValueError(f"timesteps (T) must be a whole number of at least 1, not {timesteps}")
    return int(timesteps)
