"""The proof that the code is the paper: python -m unittest (offline); one test: python -m unittest -k decoder

Three oracles carry most of it. The Gaussian: if every pixel of x_0 is N(m, s^2), the best eps_theta is known
and each step affine, so losses, bits/dim, and mean and variance of a whole chain are known without training.
The points: if x_0 is one of a few images, the best eps_theta is a softmax over them; samples must be those.
And float64: formulas are worked out again from the paper. DDPM_LONG_TESTS=1: longer kill and mutation tests.
"""
import ast
import contextlib
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import warnings
import zipfile
import zlib
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import ddpm
import sample
import train
import unet
from ddpm import GaussianDiffusion, linear_beta_schedule

HERE = Path(__file__).parent
LONG = bool(os.environ.get("DDPM_LONG_TESTS"))
M, S = 0.3, 0.5                                     # the Gaussian oracle's data: x_0 ~ N(M, S^2)
STEEP = np.linspace(0.02, 0.4, 20)                  # a short schedule that ends in noise

os.environ.setdefault("OMP_NUM_THREADS", "1")        # of the processes started here
torch.set_num_threads(1)                            # the tensors are small; threads would wait for each other


def setUpModule():
    warnings.simplefilter("ignore", UserWarning)    # some schedules do not end in noise: tested where due


class Reference:
    """The paper's quantities in float64, from its formulas, without the project's tables; and two oracles."""

    def __init__(self, betas):
        self.T, self.beta = len(betas), np.concatenate([[0.0], betas])
        self.alpha = 1 - self.beta
        self.alpha_bar = np.array([np.prod(self.alpha[:t + 1]) for t in range(self.T + 1)])

    def posterior(self, t):
        """Weights of x_0 and x_t in mu-tilde, and beta-tilde (Eq. 7)."""
        beta, noise, before = self.beta[t], 1 - self.alpha_bar[t], self.alpha_bar[t - 1]
        weights = np.sqrt(before) * beta / noise, np.sqrt(self.alpha[t]) * (1 - before) / noise
        return *weights, (1 - before) / noise * beta

    def sigma2(self, t, variance):
        return self.beta[t] if variance == "beta" else self.posterior(t)[2]

    def gaussian_eps(self, x_t, t, m=M, s=S):
        """The perfect eps_theta for x_0 ~ N(m, s^2): E[eps | x_t]."""
        bar = torch.from_numpy(self.alpha_bar)[t][:, None, None, None]
        return ((1 - bar).sqrt() * (x_t.double() - bar.sqrt() * m) / (bar * s**2 + 1 - bar)).float()

    def propagate(self, variance):
        """Mean and variance of Algorithm 2's x_0 with gaussian_eps, exactly: every step is affine."""
        mean, var = 0.0, 1.0
        for t in range(self.T, 0, -1):
            # eps = k (x_t - sqrt(alpha_bar_t) M), and x_{t-1} = (x_t - w eps) / sqrt(alpha_t) + sigma z
            bar, w = self.alpha_bar[t], self.beta[t] / np.sqrt(1 - self.alpha_bar[t])
            k = np.sqrt(1 - bar) / (bar * S**2 + 1 - bar)
            mean = (mean - w * k * (mean - np.sqrt(bar) * M)) / np.sqrt(self.alpha[t])
            var = var * (1 - w * k) ** 2 / self.alpha[t] + (self.sigma2(t, variance) if t > 1 else 0)
        return mean, var

    def points_eps(self, x_t, t, points):
        """The perfect eps_theta when x_0 is one of `points` (K, C, H, W), each as likely."""
        bar, x = torch.from_numpy(self.alpha_bar)[t][:, None], x_t.double().flatten(1)
        points = points.double().flatten(1)
        distances = ((x[:, None] - bar[:, None].sqrt() * points) ** 2).sum(2)
        x_0 = torch.softmax(-distances / (2 * (1 - bar)), dim=1) @ points
        return ((x - bar.sqrt() * x_0) / (1 - bar).sqrt()).view_as(x_t).float()


PAPER, SHORT = Reference(np.linspace(1e-4, 0.02, 1000)), Reference(STEEP)
paper, short = partial(GaussianDiffusion, linear_beta_schedule()), partial(GaussianDiffusion, STEEP)


def as_prediction(diffusion, eps_model, channels, x_t, t):
    """What eps_model says, as `diffusion` wants to hear it."""
    eps, noise = eps_model(x_t, t), ddpm.at(diffusion.one_minus_alpha_bar, t, x_t).sqrt()
    x_0 = (x_t - noise * eps) / ddpm.at(diffusion.alpha_bar, t, x_t).sqrt()
    return with_channels(diffusion.target(x_0, x_t, t, eps), channels)


def with_channels(prediction, value):
    """A model's output (B, 2 C, ...), with one value in all variance channels; None: there are none."""
    return prediction if value is None else torch.cat([prediction, torch.full_like(prediction, value)], dim=1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Section2ForwardProcess(unittest.TestCase):
    def test_tables_are_section_4s_in_float64_then_rounded_once_and_index_0_is_clean_data(self):
        d, r = paper(), PAPER
        self.assertEqual(linear_beta_schedule().dtype, torch.float64)
        posterior = np.transpose([(0, 0, 0), *(r.posterior(t) for t in range(1, 1001))])
        tables = d.beta, d.alpha, d.alpha_bar, d.one_minus_alpha_bar, d.x_0_weight, d.x_t_weight, d.posterior_variance
        for table, exact in zip(tables, (r.beta, r.alpha, r.alpha_bar, 1 - r.alpha_bar, *posterior), strict=True):
            np.testing.assert_allclose(table, exact, rtol=3e-7)     # 1 - 0.9999 in float32 is off by 2e-4

    def test_tables_move_but_stay_float32_and_there_is_nothing_to_learn(self):
        self.assertEqual({table.dtype for table in paper().buffers()}, {torch.float32})
        for moved in (paper().half(), paper().to(torch.bfloat16), paper().double()):
            for a, b in zip(moved.buffers(), paper().buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        self.assertEqual({table.device.type for table in paper().to("meta").buffers()}, {"meta"})
        self.assertEqual(list(paper().parameters()), [])

    def test_eq4_is_what_eq2_gives_step_by_step(self):
        d, one, zero, many = paper(), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(90000, 1)
        signal, variance = 1.0, 0.0
        for t in range(1, 1001):
            a, b = float(d.q_step(one, t, noise=zero)), float(d.q_step(zero, t, noise=one))
            signal, variance = a * signal, a**2 * variance + b**2
            close([signal, variance], [d.q_sample(one, t, zero), d.q_sample(zero, t, one) ** 2], 2e-5)
        torch.manual_seed(0)                                                # noise is drawn if none is given
        close([d.q_step(many, 1000).std(), d.q_sample(many, 1000).std()], [math.sqrt(0.02), 1], 0.01)

    def test_the_posterior_is_bayes_rule_on_eq2_and_eq4_and_at_t_1_exactly_x_0(self):
        d, r, x_0, x_t = paper(), PAPER, noise(3, 1, 2, 2, seed=1), noise(3, 1, 2, 2, seed=2)
        for t in (2, 3, 500, 1000):
            # q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add
            before = r.alpha_bar[t - 1]
            precision = r.alpha[t] / r.beta[t] + 1 / (1 - before)
            weights = np.sqrt(before) / (1 - before), np.sqrt(r.alpha[t]) / r.beta[t]
            mean, variance = d.q_posterior(x_0, x_t, torch.full((3,), t))
            close(mean, (weights[0] * x_0.double() + weights[1] * x_t.double()) / precision)
            close(variance * precision, torch.ones(3, 1, 1, 1), 1e-6)
        mean, variance = d.q_posterior(x_0, x_t, 1)
        self.assertTrue(torch.equal(mean, x_0) and variance.max() == 0)

    def test_wrong_schedules_choices_times_and_strides_are_refused_with_what_is_allowed(self):
        linear, cosine, nan = linear_beta_schedule, ddpm.cosine_beta_schedule, float("nan")
        cases = [("too small for float32", GaussianDiffusion, linear(1000, 0.02, 0.98)),
                 ("no gradient", partial(short, loss="hybrid"))]
        cases += [("betas", GaussianDiffusion, b) for b in ([], [[0.1]], [0.0, 0.1], [1e-13], [0.1, 1.0], [nan], [-0.1])]
        cases += [("between 0 and 1", linear, 10, *ends) for ends in ((0, 0.5), (0.1, 1), (nan, 0.1))]
        cases += [("timesteps", schedule, T) for T in (0, -1, 2.5, 2e6) for schedule in (linear, cosine)]
        cases += [(f"{name}.*{', '.join(allowed)}.*'other'", partial(short, **{name: "other"}))
                  for name, allowed in ddpm.CHOICES.items()]
        cases += [(r"1\.\.20", f, torch.zeros(2, 1), t) for f in (short().q_sample, partial(short().training_losses, None))
                  for t in (0, 21, 2.5, torch.tensor([1, 21]), torch.tensor([1.5]))]
        cases += [(r"1\.\.20", short().ddim_sample, None, (1, 1), steps) for steps in (0, 21, 2.5)]
        cases += [(r"1\.\.20", ddpm.respace, short(), None, steps) for steps in (0, 21, 2.5)]
        cases += [("eta", short().ddim_sample, None, (1, 1), 5, eta) for eta in (1.5, -0.1, nan)]
        for said, function, *arguments in cases:
            self.assertRaisesRegex(ValueError, said, function, *arguments)

    def test_whatever_whole_numbers_t_is_made_of_the_model_gets_int64(self):
        x, seen, both = noise(2, 1, 3, 3), [], torch.tensor([7, 7])
        for t in (7, np.int64(7), torch.tensor(7), both.int(), both.to(torch.uint8)):
            self.assertTrue(torch.equal(short().q_sample(x, t, x), short().q_sample(x, both, x)))
            short().training_losses(lambda x_t, t: seen.append((t.dtype, t.tolist())) or x_t, x, t)
        self.assertEqual(seen, 5 * [(torch.int64, [7, 7])])

    def test_a_schedule_that_does_not_end_in_noise_warns_and_names_the_cure(self):
        for T, said in ((300, r"alpha_bar_T = 0\.0.*beta_start=0\.000333 to beta_end=0\.0"), (10, "cosine")):
            self.assertWarnsRegex(UserWarning, said, GaussianDiffusion, linear_beta_schedule(T))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for ends_in_noise in ((), (300, 1e-4 / 0.3, 0.02 / 0.3), (49, 0.02, 0.98), (20, 0.02, 0.4)):
                GaussianDiffusion(linear_beta_schedule(*ends_in_noise))


class Algorithm1Training(unittest.TestCase):
    def test_l_simple_is_the_mean_squared_error_of_eps(self):
        x_0, eps, t = noise(4, 2, 3, 3), noise(4, 2, 3, 3, seed=1), torch.tensor([1, 2, 10, 20])
        bar, calls = torch.from_numpy(SHORT.alpha_bar)[t][:, None, None, None], []
        x_t = bar.sqrt() * x_0.double() + (1 - bar).sqrt() * eps.double()
        model = lambda x_t, t: calls.append(t) or x_t / t[:, None, None, None]
        losses = short().training_losses(model, x_0, t, eps)
        close(losses, ((eps.double() - x_t / t[:, None, None, None]) ** 2).mean((1, 2, 3)))
        self.assertEqual(len(calls), 1)

    def test_t_is_uniform_on_1_to_T_with_both_ends_and_eps_is_standard_normal(self):
        torch.manual_seed(0)
        seen, x_0 = [], torch.zeros(40000, 1)
        squares = short().training_losses(lambda x_t, t: seen.append(t) or 0 * x_t, x_0)    # of eps
        close(torch.bincount(seen[0]) / 2000, [0] + 20 * [1], 0.1)
        close([squares.mean(), squares.var() / 2], [1, 1], 0.05)

    def test_the_gaussian_oracle_has_the_loss_that_theory_gives(self):
        x_0 = M + S * noise(16, 1, 64, 64)
        for t in (1, 5, 20):
            losses = short().training_losses(SHORT.gaussian_eps, x_0, t, noise(16, 1, 64, 64, seed=t))
            signal = SHORT.alpha_bar[t] * S**2
            close(losses.mean(), signal / (signal + 1 - SHORT.alpha_bar[t]), 0.02)          # Var[eps | x_t]

    def test_l1_and_huber_are_the_other_distances(self):
        x_0, eps = noise(2, 1, 4, 4), 3 * noise(2, 1, 4, 4, seed=1)
        huber = torch.where(eps.abs() < 1, eps**2 / 2, eps.abs() - 0.5)
        for loss, distance in (("l1", eps.abs()), ("huber", huber)):
            losses = short(loss=loss).training_losses(lambda x_t, t: 0 * x_t, x_0, 5, eps)
            close(losses, distance.mean((1, 2, 3)))


class Section3ReverseProcess(unittest.TestCase):
    def test_the_mean_is_eq7_after_eq15_and_without_the_clip_also_eq11(self):
        r, x_t, eps = PAPER, noise(1, 1, 4, 4).double(), noise(1, 1, 4, 4, seed=1).double()
        for t in (1, 2, 10, 500, 1000):
            x_0_weight, x_t_weight, _ = r.posterior(t)
            eq15 = (x_t - np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha_bar[t])
            eq11 = (x_t - r.beta[t] / np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha[t])
            for clip, expected in ((False, eq15), (True, eq15.clamp(-1, 1))):
                mean, _, x_0 = paper().p_mean_variance(eps.float(), x_t.float(), t, clip)
                close(x_0, expected, 1e-4)
                close(mean, x_0_weight * expected + x_t_weight * x_t)
                self.assertEqual(torch.allclose(mean.double(), eq11, atol=1e-4), not clip)

    def test_a_clipped_x_0_comes_with_the_eps_that_belongs_to_it(self):
        x_t = 3 * noise(2, 1, 4, 4)
        for prediction, t in product(ddpm.CHOICES["prediction"], (1, 7, 20)):
            eps, x_0 = short(prediction).predict(0.5 * x_t, x_t, t)
            self.assertLessEqual(float(x_0.abs().max()), 1)
            close(short().q_sample(x_0, t, eps), x_t)

    def test_beta_is_the_best_variance_for_standard_normal_data_and_the_posteriors_for_a_single_point(self):
        x = torch.zeros(1, 1, 1, 1)
        for (s, variance), t in product(((1, "beta"), (0, "posterior")), range(1, 21)):
            x_0_weight, _, tilde = SHORT.posterior(t)
            # Var[x_{t-1} | x_t] for x_0 ~ N(m, s^2) = beta-tilde + (weight of x_0)^2 Var[x_0 | x_t]
            given = s**2 * (1 - SHORT.alpha_bar[t]) / (SHORT.alpha_bar[t] * s**2 + 1 - SHORT.alpha_bar[t])
            best = tilde + x_0_weight**2 * given if t > 1 else SHORT.posterior(2)[2]    # stands in for both
            close(short(variance=variance).p_mean_variance(x, x, t)[1].flatten(), [best], 1e-6)


class Algorithm2Sampling(unittest.TestCase):
    def test_algorithm_2_is_the_papers_line_by_line_in_float64(self):
        r, shape = SHORT, (2, 1, 3, 3)
        for variance in ("beta", "posterior"):
            generator = seeded(7)
            x = torch.randn(shape, generator=generator).double()
            for t in range(20, 0, -1):
                z = torch.randn(shape, generator=generator).double() if t > 1 else 0
                eps = torch.sin(x) * t / 20
                x = (x - (1 - r.alpha[t]) / np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha[t])
                x = x + np.sqrt(r.sigma2(t, variance)) * z
            model = lambda x_t, t: torch.sin(x_t) * t[:, None, None, None] / 20
            close(short(variance=variance).sample(model, shape, clip=False, generator=seeded(7)), x, 1e-4)

    def test_samplers_start_at_x_T_show_the_model_int64_times_and_yield_every_step(self):
        d, shape, x_T, oracle = short(), (3, 1, 2, 2), noise(3, 1, 2, 2, seed=1), SHORT.gaussian_eps
        for steps_of, sample_of, *more in ((d.sample_steps, d.sample), (d.ddim_steps, d.ddim_sample, 4, 0.5)):
            times, seen = ([20, 15, 10, 5, 0] if more else list(range(20, -1, -1))), []
            model = lambda x_t, t, seen=seen: seen.append((x_t, t)) or oracle(x_t, t)
            steps = list(steps_of(model, shape, *more, x_T=x_T, generator=seeded(0)))
            self.assertEqual([t for t, _, _ in steps], times[1:])
            reached = [x_T, *(x_t for _, x_t, _ in steps[:-1])]
            for now, (x_t, t), before, (_, _, x_0) in zip(times[:-1], seen, reached, steps, strict=True):
                self.assertEqual((t.dtype, t.tolist()), (torch.int64, 3 * [now]))
                self.assertTrue(torch.equal(x_t, before))
                self.assertTrue(torch.equal(x_0, d.predict(oracle(x_t, t), x_t, t)[1]))
            same, other = (sample_of(oracle, shape, *more, x_T=x_T, generator=seeded(k)) for k in (0, 1))
            self.assertTrue(torch.equal(same, steps[-1][1]) and not torch.equal(other, same))

    def test_the_last_step_adds_no_noise_and_noise_may_come_from_a_function_of_the_shape(self):
        self.assertTrue(torch.equal(ddpm.standard_normal((2, 3), "cpu", torch.ones), torch.ones(2, 3)))
        drawn, shape = [], (2, 1, 3, 3)
        draw = lambda shape: drawn.append(shape) or noise(*shape, seed=len(drawn))
        *_, (t, x_t, x_0) = short().sample_steps(SHORT.gaussian_eps, shape, generator=draw)
        self.assertEqual((t, drawn), (0, 20 * [shape]))                     # x_T, and z at t = 20 .. 2
        close(x_t, x_0, 1e-6)                                               # the x_0 that was predicted

    def test_samples_of_the_gaussian_oracle_have_the_mean_and_variance_that_theory_propagates(self):
        bars = PAPER.alpha_bar[np.linspace(0, 1000, 26).round().astype(int)]
        strides = Reference(1 - bars[1:] / bars[:-1])
        for variance in ("beta", "posterior"):
            d, e = paper(variance=variance), short(variance=variance)
            for chain, model, r in ((d, PAPER.gaussian_eps, PAPER), (e, SHORT.gaussian_eps, SHORT),
                                    (*ddpm.respace(d, PAPER.gaussian_eps, 25), strides)):
                x = chain.sample(model, (1, 1, 200, 200), clip=False, generator=seeded(1))
                mean, var = r.propagate(variance)
                self.assertAlmostEqual(float(x.mean()), mean, delta=5 * math.sqrt(var / x.numel()))
                self.assertAlmostEqual(float(x.var()) / var, 1, delta=5 * math.sqrt(2 / x.numel()))
            close(PAPER.propagate(variance), [M, S**2], 0.01)       # the paper's chain returns the data's

    def test_figure_8_interpolates_with_one_noise_for_all_weights_and_one_t_for_both_ways(self):
        d, seen, a, b = short(), [], noise(1, 3, 3, seed=1), noise(1, 3, 3, seed=2)
        strip = d.interpolate(lambda x_t, t: seen.append(int(t[0])) or 0.2 * x_t, a, b, [0, 0.5, 0.5, 1], 7)
        self.assertEqual((seen, d.timesteps), ([7, 6, 5, 4, 3, 2, 1], 20))
        self.assertTrue(torch.equal(strip[1], strip[2]))
        # with eps = 0 each step is x / sqrt(alpha_t) + sigma z: the ends' mean is the middle, noise and all
        left, middle, right = d.interpolate(lambda x_t, t: 0 * x_t, a, b, [0, 0.5, 1], 7, clip=False)
        close((left + right) / 2, middle)
        points = torch.stack([a, b]).clamp(-1, 1)                           # and the ends are the images
        close(d.interpolate(partial(SHORT.points_eps, points=points), *points, [0, 1], 2), points, 1e-3)


class Section4Likelihood(unittest.TestCase):
    def test_the_decoder_is_eq13s_integral_also_far_in_the_tails(self):
        def exact(x, mean, sigma):
            x, mean = (x, mean) if x > mean else (-x, -mean)                # the mirror image
            above = lambda edge: math.erfc((edge - mean) / sigma / math.sqrt(2)) / 2    # exact if it is small
            return math.log((above(x - 1 / 255) if x > -1 else 1) - (above(x + 1 / 255) if x < 1 else 0))
        levels = data.to_model(torch.arange(256, dtype=torch.uint8)).double()
        for mean, sigma in ((0.0, 0.3), (0.4, 0.0074), (-0.9, 0.05), (1.2, 0.1), (0.0, 0.06)):
            got = GaussianDiffusion.decoder_log_likelihood(levels, 0 * levels + mean, 0 * levels + sigma**2)
            for x, value in zip(levels.tolist(), got.tolist()):
                if abs(x - mean) / sigma < 35:                              # beyond, erfc underflows
                    self.assertAlmostEqual(value, exact(x, mean, sigma), delta=1e-6 * max(1, abs(value)))
            self.assertTrue(torch.isfinite(got).all())
            self.assertAlmostEqual(float(got.exp().sum()), 1, delta=1e-6)   # the bins share the whole line

    def test_the_decoders_gradient_is_finite_everywhere(self):
        given = torch.tensor([[-1, 0, 1, 0.5], [-1, 0, 1, 50], [-10, 5, -20, -9]], requires_grad=True)
        x_0, mean, log_variance = given
        GaussianDiffusion.decoder_log_likelihood(x_0.detach(), mean, log_variance.exp()).sum().backward()
        self.assertTrue(torch.isfinite(given.grad).all())

    def test_every_term_of_the_bound_is_what_theory_gives_for_gaussian_data(self):
        r, x_0 = SHORT, M + S * noise(8, 1, 128, 128)
        for variance in ("beta", "posterior"):
            d, bar = short(variance=variance), r.alpha_bar[-1]
            bits = d.bits_per_dim(r.gaussian_eps, x_0, clip=False, generator=seeded(1))
            L_T = (bar * (S**2 + M**2) - bar - np.log(1 - bar)) / 2 / np.log(2)
            self.assertAlmostEqual(float(bits["prior"].mean()), L_T, delta=0.05 * L_T)
            for t in range(2, 21):
                x_0_weight, _, tilde = r.posterior(t)
                sigma2, bar = r.sigma2(t, variance), r.alpha_bar[t]
                spread = x_0_weight**2 * S**2 * (1 - bar) / (bar * S**2 + 1 - bar)  # of the means
                nats = (tilde / sigma2 - 1 - np.log(tilde / sigma2) + spread / sigma2) / 2
                got = float(bits["terms"][:, t - 1].mean())
                self.assertAlmostEqual(got, nats / np.log(2), delta=0.03 * nats + 1e-4)
            close(bits["total"], bits["prior"] + bits["terms"].sum(1))
        self.assertTrue(5e-6 < paper().prior_bits(x_0).mean() < 5e-5)       # the paper: 1e-5

    def test_the_bound_approaches_the_entropy_of_known_data_from_above(self):
        betas, s = linear_beta_schedule(250, 4e-4, 0.08), 0.25
        x_0 = data.to_model(data.to_pixels(s * noise(8, 1, 32, 32)))
        model = partial(Reference(betas).gaussian_eps, m=0.0, s=s)
        bits = GaussianDiffusion(betas).bits_per_dim(model, x_0, clip=False, generator=seeded(1))
        entropy = math.log2(s * math.sqrt(2 * math.pi * math.e) * 255 / 2)  # of N(0, s^2) in bins of 2/255
        self.assertTrue(-0.02 < bits["total"].mean() - entropy < 0.25)

    def test_eq12s_weights_are_what_the_bound_gives_to_the_error_of_eps(self):
        d, r, x_0, eps = short(variance="posterior"), SHORT, noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
        for t in (2, 9, 20):
            weight = r.beta[t] ** 2 / (2 * r.posterior(t)[2] * r.alpha[t] * (1 - r.alpha_bar[t]))
            bits = d.vlb_terms(eps + 0.1, x_0, d.q_sample(x_0, t, eps), t, clip=False)
            close(bits * math.log(2), [weight * 0.01], 1e-4)


class ImprovedDDPM(unittest.TestCase):
    def test_the_cosine_schedule_is_iddpm_eq17(self):
        for T in (1000, 50, 1):
            f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
            close(ddpm.cosine_beta_schedule(T), [min(1 - b / a, 0.999) for a, b in pairwise(f)], 1e-12)
        clipped = ddpm.cosine_beta_schedule(1000, beta_min=1e-4, beta_max=0.02)
        self.assertEqual((float(clipped.min()), float(clipped.max())), (1e-4, 0.02))
        self.assertTrue(torch.isfinite(GaussianDiffusion(ddpm.cosine_beta_schedule(4000)).alpha_bar).all())

    def test_learned_range_interpolates_logarithms_from_beta_tilde_to_beta(self):
        x = torch.zeros(1, 1, 1, 1)
        for t, (channel, v) in product((2, 10, 20), ((-1.0, 0), (1.0, 1), (0.0, 0.5), (0.5, 0.75))):
            expected = (1 - v) * math.log(SHORT.posterior(t)[2]) + v * math.log(SHORT.beta[t])
            for variance, log_variance in (("learned_range", expected), ("learned", channel)):
                _, got, _ = short(variance=variance).p_mean_variance(with_channels(x, channel), x, t)
                self.assertAlmostEqual(math.log(got), log_variance, delta=1e-5)

    def test_the_mean_of_l_vlb_over_t_is_the_bound_without_L_T(self):
        d, x_0 = short(variance="learned_range", loss="vlb"), noise(1, 1, 8, 8) / 3
        model, eps = partial(as_prediction, d, SHORT.gaussian_eps, 0.3), noise(20, 1, 8, 8, seed=1)
        losses = d.training_losses(model, x_0.expand_as(eps), torch.arange(1, 21), eps)
        same = iter(eps.split(1))
        bits = d.bits_per_dim(model, x_0, clip=False, generator=lambda shape: next(same))
        close(losses.mean(), bits["terms"].sum())

    def test_in_l_hybrid_the_mean_learns_from_l_simple_alone_and_the_variance_from_l_vlb_alone(self):
        x_0, eps, t = noise(4, 1, 4, 4).clamp(-1, 1), noise(4, 1, 4, 4, seed=1), torch.tensor([1, 2, 10, 20])
        output = (noise(4, 2, 4, 4, seed=2) - torch.tensor([0, 3]).view(2, 1, 1)).requires_grad_()
        for variance in ("learned_range", "learned"):
            gradients = {}
            for loss in ("mse", "vlb", "hybrid"):
                losses = short("eps", variance, loss).training_losses(lambda x_t, t: output, x_0, t, eps)
                gradients[loss], = torch.autograd.grad(losses.mean(), output)
            expected = torch.cat([gradients["mse"][:, :1], 0.001 * gradients["vlb"][:, 1:]], dim=1)
            close(gradients["hybrid"], expected, 1e-6)
            self.assertGreater(float(expected.abs().min()), 0)

    def test_every_prediction_works_with_every_variance_and_every_sampler_and_gives_the_same_samples(self):
        points, shape = noise(5, 1, 3, 3).clamp(-0.9, 0.9), (60, 1, 3, 3)
        for variance in ddpm.CHOICES["variance"]:
            channels, expected = {"learned_range": -0.4, "learned": -4.0}.get(variance), None
            for prediction in ddpm.CHOICES["prediction"]:
                d = short(prediction, variance)
                model = partial(as_prediction, d, partial(SHORT.points_eps, points=points), channels)
                got = [d.sample(model, shape, clip=False, generator=seeded(5)), d.ddim_invert(model, points, 20),
                       d.ddim_sample(model, shape, 7, generator=seeded(5)),
                       d.ddim_sample(model, shape, 20, eta=1.0, generator=seeded(5))]
                for chain, its_model in ((d, model), ddpm.respace(d, model, 7)):
                    got += [chain.sample(its_model, shape, generator=seeded(5)),
                            chain.bits_per_dim(its_model, points, generator=seeded(5))["terms"]]
                expected = expected or got
                for number, (a, b) in enumerate(zip(got, expected, strict=True)):
                    with self.subTest(prediction=prediction, variance=variance, number=number):
                        close(a, b, 2e-3)
            distance = (got[4][:, None] - points).flatten(2).norm(dim=2)    # from each of the points
            self.assertLess(float(distance.min(1).values.max()), 1e-3)
            self.assertEqual(len(distance.argmin(1).unique()), 5)

    def test_strides_visit_the_rounded_linspace_keep_its_alpha_bar_and_show_the_network_the_old_t(self):
        seen = []
        for steps in (1, 2, 3, 7, 50, 333, 999, 1000):
            chain, strided = ddpm.respace(paper(), lambda x_t, t: seen.append(int(t[0])) or 0 * x_t, steps)
            times = np.linspace(0, 1000, steps + 1).round().astype(int)     # from 0 to T, both included
            np.testing.assert_allclose(chain.alpha_bar, PAPER.alpha_bar[times], rtol=1e-6)
            seen.clear()
            chain.sample(strided, (1, 1, 1, 1))
            self.assertEqual(seen, times[:0:-1].tolist())

    def test_strides_of_any_length_of_a_steep_chain_return_what_the_model_predicts(self):
        d, shape = GaussianDiffusion(linear_beta_schedule(49, 0.02, 0.98), "x0"), (2, 1, 4, 4)
        model = lambda x_t, t: torch.full_like(x_t, 0.3)
        for steps in range(1, 50):                                          # alpha of a stride: down to 1e-27
            chain, strided = ddpm.respace(d, model, steps)
            for x_0 in (chain.sample(strided, shape), d.ddim_sample(model, shape, steps, eta=1.0)):
                self.assertLess(float((x_0 - 0.3).abs().max()), 1e-6)
            self.assertTrue(torch.isfinite(chain.bits_per_dim(strided, noise(*shape))["total"]).all(), steps)

    def test_a_directly_learned_variance_keeps_its_ratio_to_beta_tilde_on_a_strided_chain(self):
        d, x = short(variance="learned"), noise(1, 1, 2, 2)
        model = lambda x_t, t: with_channels(x_t, float(d.log_posterior_variance[t]) + 0.3)
        chain, strided = ddpm.respace(d, model, 7)
        for k in range(2, 8):
            _, variance, _ = chain.p_mean_variance(strided(x, torch.tensor([k])), x, k)
            close(variance / chain.posterior_variance[k], torch.full_like(x, math.exp(0.3)))

    def test_important_times_are_drawn_as_their_weights_say_so_that_a_mean_over_t_stays_the_mean(self):
        torch.manual_seed(0)
        for first in (1, 2):
            t, weights = ddpm.important_times(20, 200_000, "cpu", first)
            share, values = torch.bincount(t, minlength=21)[first:] / len(t), torch.arange(21.0) ** 2
            likely = 1 / torch.arange(first, 21) + 5 / 20
            close(share, likely / likely.sum(), 0.05)
            close(weights, 1 / (20 * (likely / likely.sum())[t - first]))
            close((weights * values[t]).mean(), values[first:].sum() / 20, 0.02)


class DDIM(unittest.TestCase):
    def test_a_step_is_ddim_eq12_with_eq16s_sigma_from_both_ends_of_the_stride(self):
        shape, oracle = (2, 1, 3, 3), SHORT.gaussian_eps
        for eta in (0.0, 0.5, 1.0):
            generator = seeded(1)
            x = torch.randn(shape, generator=generator).double()
            for t, s in pairwise((20, 17, 13, 10, 7, 3, 0)):
                (bar_t, bar_s), eps = SHORT.alpha_bar[[t, s]], oracle(x, torch.tensor([t, t]))
                sigma = eta * np.sqrt((1 - bar_s) / (1 - bar_t)) * np.sqrt(1 - bar_t / bar_s)
                x_0 = (x - np.sqrt(1 - bar_t) * eps) / np.sqrt(bar_t)
                z = torch.randn(shape, generator=generator).double() if sigma > 0 else 0
                x = np.sqrt(bar_s) * x_0 + np.sqrt(1 - bar_s - sigma**2) * eps + sigma * z
            close(short().ddim_sample(oracle, shape, 6, eta, clip=False, generator=seeded(1)), x, 1e-4)

    def test_with_eta_1_it_is_algorithm_2_with_the_posteriors_variance_on_the_whole_or_a_respaced_chain(self):
        d, shape, model = short(variance="posterior"), (2, 1, 4, 4), lambda x_t, t: torch.tanh(2 * x_t)
        for steps in (20, 6):
            chain, strided = ddpm.respace(d, model, steps)
            x_0 = d.ddim_sample(model, shape, steps, 1.0, generator=seeded(4))
            close(x_0, chain.sample(strided, shape, generator=seeded(4)), 1e-4)

    def test_with_eta_0_it_converges_to_the_odes_map_and_inversion_to_its_inverse(self):
        # which is known for Gaussian data: x_T and x_0 are equally many standard deviations from their means
        bar, x_T, x_0 = PAPER.alpha_bar[-1], noise(1, 1, 8, 8), M + S * noise(1, 1, 8, 8, seed=1)
        mean, std, errors = math.sqrt(bar) * M, math.sqrt(bar * S**2 + 1 - bar), []
        for steps in (50, 100, 200, 400):
            draw = partial(paper().ddim_sample, PAPER.gaussian_eps, x_T.shape, steps, clip=False)
            found = paper().ddim_invert(PAPER.gaussian_eps, x_0, steps)
            differences = (draw(x_T=x_T) - M - S * (x_T - mean) / std, found - mean - std * (x_0 - M) / S,
                           draw(x_T=found) - x_0)
            errors.append([float(difference.abs().max()) for difference in differences])
        for error in zip(*errors):                                          # half the stride, half the error
            self.assertTrue(error[-1] < 0.03 and all(a > 1.6 * b for a, b in pairwise(error)), error)


class Guidance(unittest.TestCase):
    # of classes 0 and 1, and of 2, "no label", which stands for N(0, 1) here
    eps = tuple(partial(PAPER.gaussian_eps, m=m, s=s) for m, s in ((-0.5, S), (0.5, S), (0.0, 1.0)))

    def network(self, x_t, t, y):
        return torch.stack([eps(x_t, t) for eps in self.eps])[y, torch.arange(len(y))]

    def test_scale_0_is_unconditional_1_conditional_and_3_is_three_times_the_way(self):
        x, t, y = noise(3, 1, 2, 2), torch.tensor([5, 500, 1000]), torch.tensor([0, 1, 0])
        conditional, unconditional = self.network(x, t, y), self.eps[2](x, t)
        for scale, n in product((0.0, 1.0, 3.0), (1, 3)):                   # a batch of one, too
            got = ddpm.classifier_free_guidance(self.network, y[:n], scale, 2)(x[:n], t[:n])
            close(got, (unconditional + scale * (conditional - unconditional))[:n])

    def test_it_is_one_call_on_a_doubled_batch_and_leaves_the_variance_channels_conditional(self):
        calls, x, y = [], noise(2, 1), torch.tensor([[1], [2]])
        network = lambda x_t, t, y: calls.append(len(x_t)) or torch.cat([x_t * y, 10.0 + y], dim=1)
        out = ddpm.classifier_free_guidance(network, y, 3.0, 5)(x, torch.tensor([1, 1]))
        self.assertEqual(calls, [4])
        close(out, torch.cat([x * (5 + 3 * (y - 5)), 10.0 + y], dim=1))

    def test_guidance_between_two_gaussians_samples_a_gaussian_with_the_mean_that_theory_gives(self):
        # N(0.5, S^2) guided away from N(0, 1): the score is linear, so the ODE is affine; propagate it
        scale, x_T, mean, factor = 2.0, noise(1, 1, 50, 50), 0.0, 1.0
        for bar_t, bar_s in pairwise(PAPER.alpha_bar[paper().visited_times(100)]):
            towards = scale * math.sqrt(1 - bar_t) / (bar_t * S**2 + 1 - bar_t)         # eps = k x_t + c
            k, c = towards + (1 - scale) * math.sqrt(1 - bar_t), -towards * math.sqrt(bar_t) * 0.5
            keep = math.sqrt(bar_s / bar_t)
            move = math.sqrt(1 - bar_s) - keep * math.sqrt(1 - bar_t)
            mean, factor = keep * mean + move * (k * mean + c), factor * (keep + move * k)
        model = ddpm.classifier_free_guidance(self.network, torch.tensor([1]), scale, 2)
        close(paper().ddim_sample(model, x_T.shape, 100, x_T=x_T, clip=False), mean + factor * x_T, 1e-3)
        self.assertGreater(mean, 0.6)                                       # pushed beyond the class mean

    def test_classifier_guidance_with_the_exact_classifier_gives_the_exact_conditional_model(self):
        # one pixel: the eps of the two classes' mixture, plus the classifier's shift, is the eps of one class
        def log_prob(x_t, t, y=1):
            bar = torch.from_numpy(PAPER.alpha_bar)[t][:, None]
            distances = (x_t.flatten(1) - bar.sqrt() * torch.tensor([-0.5, 0.5])) ** 2
            return torch.log_softmax(-distances / (2 * (bar * S**2 + 1 - bar)), dim=1)[:, y].float()

        def mixture(x_t, t):
            return sum(log_prob(x_t, t, y).exp().view(-1, 1, 1, 1) * self.eps[y](x_t, t) for y in (0, 1))
        x, t = noise(5, 1, 1, 1), torch.tensor([1, 50, 300, 700, 1000])
        unguided, conditional = mixture(x, t), self.eps[1](x, t)
        for prediction, scale in product(ddpm.CHOICES["prediction"], (0.0, 1.0, 3.0)):
            d = paper(prediction)
            model = ddpm.classifier_guidance(d, partial(as_prediction, d, mixture, None), log_prob, scale)
            with torch.inference_mode():
                eps, _ = d.predict(model(x, t), x, t, clip=False)
            close(eps, unguided + scale * (conditional - unguided), 2e-3)


class AppendixBNetwork(unittest.TestCase):
    x, t = noise(2, 1, 28, 28), torch.tensor([1, 900])

    def drawn(self, net):
        """The network with all weights drawn: at its zero start, gradients stop half-way."""
        torch.manual_seed(0)
        for weights in net.parameters():
            torch.nn.init.normal_(weights, std=0.1)
        return net

    def assert_every_parameter_gets_a_gradient(self, net, out):
        out.square().mean().backward()
        self.assertEqual([n for n, w in net.named_parameters() if w.grad is None or not w.grad.any()], [])

    def test_with_the_papers_settings_it_has_the_papers_number_of_parameters(self):
        with torch.device("meta"):
            net = unet.UNet(in_channels=3, image_size=32, patch=1, channels=128, multipliers=(1, 2, 2, 2),
                            blocks=2, attention=(16,), dropout=0.1)
        self.assertEqual(sum(p.numel() for p in net.parameters()), 35_746_307)

    def test_the_trained_network_in_assets_still_computes_what_it_learned(self):
        net, d, _ = train.load_checkpoint(HERE / "assets/fashion-mnist.pt", "cpu")
        x_0 = data.to_model(torch.from_numpy(data.read_idx(data.EXCERPT / "t10k-images-idx3-ubyte.gz")[:64, None]))
        losses = d.training_losses(net, x_0, torch.linspace(1, 1000, 64).long(), noise(64, 1, 28, 28))
        close(float(losses.mean()), 0.07494, 1e-3)                              # when it was trained

    def test_every_flag_of_the_network_reaches_it(self):
        flags = ("--channels 8 --multipliers 1,3 --blocks 2 --attention 8 --heads 2 --dropout 0.2 --patch 1 --block convnext "
                 "--embedding scale-shift --conditional --checkpointing --variance learned")
        with mock.patch.object(unet, "UNet") as made:
            unet.make_network(train.parse_args(flags.split()), (3, 16, 16), ("a", "b"))
        self.assertEqual([*made.call_args.kwargs.values()], [3, 6, 16, 1, 8, (1, 3), 2, (8,), 2, 0.2, True, True, 2, True])

    def test_any_size_and_channels_go_in_and_come_out_and_an_empty_batch(self):
        for out, patch, channels, multipliers in ((6, 2, 32, (1, 2)), (6, 1, 8, (1, 2)), (1, 4, 12, (1, 2, 3))):
            net = unet.UNet(3, out, patch=patch, channels=channels, multipliers=multipliers)
            for B, H, W in ((2, 28, 28), (2, 32, 32), (2, 17, 30), (2, 1, 1), (2, 3, 2), (0, 9, 9)):
                self.assertEqual(net(noise(B, 3, H, W), torch.tensor([0, 4000])[:B]).shape, (B, out, H, W))
        for dtype in (torch.float64, torch.bfloat16):
            self.assertEqual(unet.UNet().to(dtype)(self.x.to(dtype), self.t).dtype, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(unet.UNet(patch=1, channels=8)(self.x, self.t).dtype, torch.float32)

    def test_a_multiple_of_x_reaches_the_prediction_but_not_the_variance_channels(self):
        net = unet.UNet(1, 2)
        torch.nn.init.ones_(net.input_gain.bias)
        self.assertTrue(torch.equal(net(self.x, self.t), with_channels(self.x, 0.0)))

    def test_it_starts_at_zero_and_every_parameter_gets_a_gradient(self):
        for options in ({}, {"patch": 1}, {"convnext": True}, {"scale_shift": True}, {"num_classes": 3},
                        {"convnext": True, "scale_shift": True}, {"attention": (14, 7), "heads": 2}):
            with self.subTest(**options):
                net = unet.UNet(channels=16, **options)
                y = torch.tensor([0, 3]) if "num_classes" in options else None
                self.assertEqual(float(net(self.x, self.t, y).abs().max()), 0)
                self.assert_every_parameter_gets_a_gradient(net, self.drawn(net)(self.x, self.t, y))

    def test_the_output_depends_on_t_and_on_the_label(self):
        net, y = unet.UNet(channels=16, num_classes=3), torch.tensor([0, 0])
        self.assertEqual(float(net.embedding.labels.weight[-1].abs().max()), 0)         # "no label"
        out, none = self.drawn(net)(self.x, self.t, y), net(self.x, self.t)
        for other in (net(self.x, self.t + 1, y), net(self.x, self.t, y + 1), none):
            self.assertGreater(float((out - other).flatten(1).abs().amax(1).min()), 1e-4)
        self.assertTrue(torch.equal(net(self.x, self.t, y + 3), none))
        self.assertRaisesRegex(ValueError, "without labels", unet.UNet(), self.x, self.t, y)

    def test_attention_stands_at_the_sizes_asked_for_and_what_cannot_be_is_refused(self):
        # in the middle; then after 2 blocks on the way down and 2 on the way up, in the paper 3
        for patch, attention, count in ((2, (), 1), (2, (14,), 1 + 2 + 2), (2, (7, 14), 1 + 2 * (2 + 2)),
                                        (1, (14,), 1 + 2 + 3), (1, (7,), 1)):
            modules = unet.UNet(patch=patch, attention=attention, blocks=2).modules()
            self.assertEqual(sum(isinstance(module, unet.Attention) for module in modules), count)
        self.assertWarnsRegex(UserWarning, r"\[14, 7\]", unet.UNet, attention=(8,))
        for name, value in (("multipliers", ()), ("blocks", 0), ("patch", 0), ("heads", 3)):
            self.assertRaisesRegex(ValueError, name, unet.UNet, **{name: value})

    def test_checkpointing_changes_memory_and_nothing_else(self):
        results = []
        for checkpointing in (False, True):
            net, sizes = self.drawn(unet.UNet(channels=16, checkpointing=checkpointing)), []
            keep = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = (net(self.x, self.t) - self.x).square().mean()
            loss.backward()
            results.append((sum(sizes), [p.grad for p in net.parameters()]))
        (plain, gradients), (checkpointed, same_gradients) = results
        self.assertLess(checkpointed, plain / 2)
        torch.testing.assert_close(same_gradients, gradients)

    def test_the_embedding_of_t_is_sines_and_cosines_and_tells_all_t_apart(self):
        emb = unet.timestep_embedding(torch.arange(1001), 32)
        angles = np.outer(range(1001), 10000 ** (-np.arange(16) / 15))
        np.testing.assert_allclose(emb.numpy(), np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-4)
        self.assertGreater(float(torch.cdist(emb, emb).fill_diagonal_(9).min()), 1e-3)
        self.assertEqual(unet.timestep_embedding(torch.tensor([1]), 7).shape, (1, 7))

    def test_one_batch_can_be_overfitted(self):
        torch.manual_seed(0)
        d, net, t = paper(), unet.UNet(channels=16), torch.randint(1, 1001, (8,))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            loss = d.training_losses(net, noise(8, 1, 14, 14).tanh(), t, noise(8, 1, 14, 14, seed=1)).mean()
            loss.backward()
            optimizer.step()
        self.assertLess(float(loss), 0.2)

    def test_the_classifier_is_the_left_half_with_a_head_and_every_part_learns(self):
        net = self.drawn(unet.NoisyClassifier(unet.UNet(channels=16), 10))
        out = net(self.x, torch.tensor([0, 1000]))
        self.assertGreater(float((out - net(self.x, torch.tensor([50, 950]))).abs().amax(1).min()), 1e-4)
        self.assertEqual(out.shape, (2, 10))
        self.assert_every_parameter_gets_a_gradient(net, out)


# ---------------------------------------------------------------------------------------- data and files


def idx(array, code=8):
    """The bytes of an IDX file."""
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype({8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}[code]).tobytes()


def decode_png(path):
    """A PNG or APNG by the rules of the format -> its frames (H, W, C), every checksum compared."""
    content, chunks, at = Path(path).read_bytes(), [], 8
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        kind, body, crc = (content[at:][a:b] for a, b in ((4, 8), (8, 8 + size), (8 + size, 12 + size)))
        assert int.from_bytes(crc, "big") == zlib.crc32(kind + body), kind
        chunks.append((kind, body))
        at += 12 + size
    header, animation = dict(chunks)[b"IHDR"], dict(chunks).get(b"acTL", struct.pack(">II", 1, 0))
    assert chunks[0][0] == b"IHDR" and chunks[-1] == (b"IEND", b"") and header[10:] == bytes(3)
    (W, H), channels = struct.unpack(">II", header[:8]), {b"\x08\0": 1, b"\x08\x02": 3}[header[8:10]]
    bodies = [body if kind == b"IDAT" else body[4:] for kind, body in chunks if kind in (b"IDAT", b"fdAT")]
    numbers = [int.from_bytes(body[:4], "big") for kind, body in chunks if kind in (b"fcTL", b"fdAT")]
    assert numbers == list(range(len(numbers))) and animation == struct.pack(">II", len(bodies), 0)
    rows = [np.frombuffer(zlib.decompress(body), np.uint8).reshape(H, -1) for body in bodies]
    assert not any(frame[:, 0].any() for frame in rows)                         # no filter
    return [frame[:, 1:].reshape(H, W, channels) for frame in rows]


class InTemporaryFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def patched(self, *patches):
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def path(self, name, content=None):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        return path

    def save(self, name, array):
        np.save(self.path(name), array, allow_pickle=True)
        return str(self.path(name))

    def mutations(self, name, content, load, rounds):
        """Random damage ends in loaded data or a ValueError with the file's name, never in anything else."""
        rng, refused = random.Random(name), 0
        self.patched(mock.patch("sys.stdout", io.StringIO()))
        for _ in range(rounds * (20 if LONG else 1)):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(min(len(damaged), rng.choice((16, 128, 10**9))) + 1)
                end = at + rng.choice((0, 1, 1, 19, 10**9))             # insert, change, cut out, cut off
                damaged[at:end] = rng.randbytes(rng.choice((0, 1, 1, 19)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                                 # numpy's, about what it reads
                try:
                    load(self.path(name, bytes(damaged)))
                except ValueError as error:
                    self.assertIn(name, str(error))
                    refused += 1
        self.assertGreater(refused, rounds // 4)


class Pixels(InTemporaryFolder):
    def test_all_256_levels_survive_the_way_to_the_model_and_back(self):
        levels = torch.arange(256, dtype=torch.uint8)
        self.assertTrue(torch.equal(data.to_pixels(data.to_model(levels)), levels))
        close(data.to_model(levels), 2 * levels.double() / 255 - 1, 1e-6)
        self.assertEqual(data.to_pixels(torch.tensor([-9.0, 9.0])).tolist(), [0, 255])
        truncated = ((data.to_model(levels) + 1) * 127.5).to(torch.uint8)
        self.assertEqual(int((truncated != levels).sum()), 63)                  # why to_pixels rounds

    def test_a_grid_is_row_by_row_with_white_gaps_in_every_format(self):
        for n, gap, zoom, options in ((5, 2, 1, {}), (6, 0, 3, {"gap": 0, "zoom": 3})):
            images = torch.randint(0, 256, (n, 1, 3, 4), dtype=torch.uint8)
            h, w = 3 * zoom + gap, 4 * zoom + gap
            expected = np.full((2 * h, 3 * w), 255, np.uint8)
            for k in range(n):
                cell = images[k, 0].numpy().repeat(zoom, 0).repeat(zoom, 1)
                expected[k // 3 * h:, k % 3 * w:][:3 * zoom, :4 * zoom] = cell
            expected = expected[:2 * h - gap, :3 * w - gap]
            data.save_image(self.path("a.pgm"), images, 3, **options)
            header = f"P5\n{expected.shape[1]} {expected.shape[0]}\n255\n".encode()
            self.assertEqual(self.path("a.pgm").read_bytes(), header + expected.tobytes())
            data.save_image(self.path("a.PNG"), images, **options)
            np.testing.assert_array_equal(decode_png(self.path("a.PNG"))[0][:, :, 0], expected)
        colour = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
        pixels = colour[0].permute(1, 2, 0).numpy()
        data.save_image(self.path("a.ppm"), data.to_model(colour))
        self.assertEqual(self.path("a.ppm").read_bytes(), b"P6\n2 2\n255\n" + pixels.tobytes())
        data.save_movie(self.path("m.png"), [colour, 255 - colour])
        np.testing.assert_array_equal(decode_png(self.path("m.png")), [pixels, 255 - pixels])

    def test_pictures_that_cannot_be_and_a_full_disk_leave_an_older_file_and_no_half_of_a_new_one(self):
        grey, path = torch.zeros(1, 1, 2, 2), self.path("a.png", b"old")
        for images in (grey[:0], grey.expand(1, 2, 2, 2)):
            self.assertRaises(ValueError, data.save_image, path, images)

        class Full(io.FileIO):
            def write(self, content):
                if self.tell():
                    raise OSError(28, "No space left on device")
                return super().write(content[:9])

        with mock.patch("builtins.open", Full), self.assertRaisesRegex(OSError, "No space left.*a.png"):
            data.save_image(path, grey)
        with mock.patch("builtins.open", Full), self.assertRaises(OSError), data.atomic(path) as file:
            torch.save(torch.zeros(10**6), file)                            # which makes it a RuntimeError
        self.assertEqual([p.read_bytes() for p in self.folder.iterdir()], [b"old"])


class ReadingFiles(InTemporaryFolder):
    def test_idx_files_of_every_type_plain_or_gzipped_are_read(self):
        for code, dtype in data.IDX_TYPES.items():
            array = np.arange(24).reshape(2, 3, 4).astype(dtype)
            for content in (idx(array, code), gzip.compress(idx(array, code))):
                got = data.read_idx(self.path("x", content))
                np.testing.assert_array_equal(got, array)
                self.assertTrue(got.dtype.isnative and got.flags.writeable)

    def test_a_gzip_bomb_is_left_at_what_its_header_can_justify(self):
        path, read = self.path("bomb", gzip.compress(idx(np.zeros((2, 2), np.uint8)) + bytes(2**25))), []
        self.patched(mock.patch("gzip.GzipFile.read", lambda f, n, real=gzip.GzipFile.read: read.append(n) or real(f, n)))
        self.assertRaisesRegex(ValueError, "bomb", data.read_idx, path)
        self.assertTrue(0 < sum(read) < 100)

    def test_whatever_is_done_to_a_data_file_it_is_read_or_refused_by_name(self):
        array = np.random.default_rng(0).integers(0, 256, (3, 5, 5), np.uint8)
        npy = Path(self.save("array.npy", array)).read_bytes()
        self.mutations("plain-idx", idx(array), data.read_idx, 300)
        self.mutations("gzip-idx", gzip.compress(idx(array)), data.read_idx, 300)
        self.mutations("array.npy", npy, lambda path: data.load_dataset(str(path)), 300)
        self.mutations("cifar.tar.gz", gzip.compress(self.cifar()), data.read_cifar10, 100)
        self.mutations("cifar.tar", self.cifar(), data.read_cifar10, 100)

    def cifar(self):
        """A small archive of CIFAR-10's layout, and a link out of it."""
        content, link = io.BytesIO(), tarfile.TarInfo("cifar-10-batches-bin/../../evil")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        with tarfile.open(fileobj=content, mode="w") as archive:
            archive.addfile(link)
            for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                member.size = 2 * 3073
                records = [bytes([k + i] + [k] * 1024 + [i] * 1024 + [7] * 1024) for i in range(2)]
                archive.addfile(member, io.BytesIO(b"".join(records)))
        return content.getvalue()

    def test_cifar10s_binary_archive_is_read_in_memory_with_nothing_extracted(self):
        path = self.path("c.tar.gz", gzip.compress(self.cifar()))
        file, load = ("c.tar", hashlib.md5(path.read_bytes()).hexdigest()), data.load_dataset
        known = data.DATASETS["cifar10"]._replace(mirrors=(), files={"train": (file,), "test": (file,)})
        self.patched(mock.patch.dict(data.DATASETS, cifar10=known), mock.patch("sys.stdout", io.StringIO()))
        for split, expected in (("train", [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]), ("test", [5, 6])):
            images, labels = load("cifar10", split, self.folder)
            self.assertEqual((images.shape, labels.tolist()), ((len(expected), 3, 32, 32), expected))
            self.assertEqual(images[1].amax((1, 2)).tolist(), [labels[0], 1, 7])
        self.assertEqual(os.listdir(self.folder), [self.path("c.tar.gz", self.cifar()).name])   # of another MD5
        self.assertRaisesRegex(ValueError, "no good c.tar", load, "cifar10", "train", self.folder)


class DataSets(InTemporaryFolder):
    def setUp(self):
        super().setUp()
        self.said = io.StringIO()
        self.patched(mock.patch("sys.stdout", self.said))

    def test_npy_files_come_in_every_layout_with_labels_and_test_split_beside_them(self):
        for shape, expected in (((4, 5, 6), (4, 1, 5, 6)), ((4, 5, 6, 1), (4, 1, 5, 6)),
                                ((4, 5, 6, 3), (4, 3, 5, 6)), ((4, 3, 5, 6), (4, 3, 5, 6))):
            array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            images, labels = data.load_dataset(name := self.save("x.npy", array))
            self.save("x.npy", 255 - array)                                     # it is read once
            self.assertEqual((images.shape, images.dtype, labels.tolist()), (expected, torch.uint8, [0] * 4))
            channels_first = array if shape[-1] == 6 else np.moveaxis(array, 3, 1)
            np.testing.assert_array_equal(images.squeeze(1), channels_first.squeeze())
        self.assertEqual(len(data.load_dataset(name, "test")[0]), 4)
        self.assertIn("is its own test split", self.said.getvalue())
        self.save("x.labels.npy", np.array([3, 1, 0, 2], np.uint8))
        self.save("x.test.npy", np.full((2, 1, 5, 6), 200, np.uint8))
        self.assertEqual(data.load_dataset(name)[1].tolist(), [3, 1, 0, 2])
        self.assertRaisesRegex(ValueError, "x.test.labels.npy", data.load_dataset, name, "test")
        self.save("x.test.labels.npy", np.array([2, 3]))
        images, labels = data.load_dataset(name, "test")
        self.assertEqual((int(images.min()), labels.tolist()), (200, [2, 3]))

    def test_an_idx_file_is_a_data_set_with_the_others_beside_it_under_their_usual_names(self):
        for split, kind, n in (("train", "train", 6), ("test", "t10k", 4)):
            array = np.random.default_rng(n).integers(0, 256, (n, 7, 5), np.uint8)
            path = self.path(f"{kind}-images-idx3-ubyte", idx(array))
            self.path(f"{kind}-labels-idx1-ubyte", idx(2 * np.arange(n)))
            images, labels, classes = data.load_with_classes(str(path).replace("t10k", "train"), split)
            np.testing.assert_array_equal(images[:, 0], array)
            self.assertEqual((labels.tolist(), classes), ([*range(n)], ("0", "2", "4", "6", "8", "10")))
        alone = self.path("my-idx3-ubyte.gz", gzip.compress(idx(array)))
        self.assertEqual(data.load_dataset(str(alone))[1].tolist(), [0] * 4)

    def test_labels_with_gaps_and_strings_keep_their_values_as_names_found_in_any_case(self):
        name = self.save("x.npy", np.full((4, 7, 7), 99, np.uint8))
        for values, classes, expected in (([7, 0, 5, 7], ("0", "5", "7"), [2, 0, 1, 2]),
                                          (["Cat", "ant", "Cat", "bee"], ("Cat", "ant", "bee"), [0, 1, 0, 2])):
            self.save("x.labels.npy", np.array(values))
            _, labels, names = data.load_with_classes(name)
            self.assertEqual((labels.tolist(), names), (expected, classes))
        for text, found in (("CAT", [0, 0]), ("2", [2])):
            self.assertEqual(data.load_with_classes(name, only=text)[1].tolist(), found)
        cases = ("7", ("0", "5", "7")), ("a", ("A", "a", "1"))                  # a name is meant before an index
        self.assertEqual([data.find_label(*case) for case in cases], [2, 1])
        for text in ("dog", "3"):
            self.assertRaisesRegex(ValueError, "Cat, ant, bee", data.load_with_classes, name, only=text)

    def test_what_may_mean_two_things_is_refused_with_what_would_mend_it_and_dark_pixels_are_warned_of(self):
        for shape, said in (((3, 8, 8), r"x\[None\]"), ((8, 8, 3), r"x\[None\]"), ((5, 64), "reshape"),
                            ((2, 3, 5, 3), "transpose"), ((2, 1, 5, 3), "transpose"), ((2, 5, 3, 5), "1 or 3"),
                            ((4,), "1 or 3"), ((0, 8, 8), "1 or 3")):
            with self.subTest(shape), self.assertRaisesRegex(ValueError, f"x.npy.*{said}"):
                data.load_dataset(self.save("x.npy", np.ones(shape, np.uint8)))
        name = self.save("x.npy", np.ones((4, 8, 8), np.float32))
        self.assertRaisesRegex(ValueError, r"x.npy.*float32.*255 \* x", data.load_dataset, name)
        for brightest, said in ((99, "^$"), (1, "warning: .*x.npy.* 1 of 255")):
            data.load_dataset(self.save("x.npy", np.full((4, 8, 8), brightest, np.uint8)))
            self.assertRegex(self.said.getvalue(), said)

    def test_files_with_objects_are_never_unpickled_and_wrong_labels_are_refused(self):
        exploded = self.folder / "exploded"
        bomb = type("Bomb", (), {"__reduce__": lambda _: (os.mkdir, (str(exploded),))})()
        with self.assertRaisesRegex(ValueError, "x.npy.*objects"):
            data.load_dataset(self.save("x.npy", np.array([bomb, 1], object)))
        path = self.save("x.npy", np.full((2, 7, 7), 99, np.uint8))
        for labels in (np.zeros(3, np.int64), np.zeros(2), np.array([b"a", b"b"]), np.array([bomb, 1], object)):
            self.save("x.labels.npy", labels)
            self.assertRaisesRegex(ValueError, "labels", data.load_dataset, path)
        self.assertFalse(exploded.exists())

    def test_the_excerpt_is_the_first_600_and_100_images_of_each_class(self):
        for split, files in data.DATASETS["fashion-mnist"].files.items():
            with mock.patch("urllib.request.urlopen", side_effect=OSError("not asked")):
                images, labels = data.load_dataset("fashion-mnist", split, HERE / "data")
            if len(images) < 10_000:
                self.skipTest("needs all of Fashion-MNIST")
            first = [np.flatnonzero(labels == k)[:len(labels) // 100] for k in range(10)]
            keep = np.sort(np.concatenate(first))
            for (name, _), x in zip(files, (images[keep, 0], labels[keep])):
                self.assertEqual(gzip.decompress((data.EXCERPT / f"{name}.gz").read_bytes()), idx(x.numpy()))

    def test_the_excerpt_is_used_when_nothing_else_is_there_and_that_is_said(self):
        nowhere = {"fashion-mnist": data.DATASETS["fashion-mnist"]._replace(folders=(), mirrors=())}
        self.patched(mock.patch.dict(data.DATASETS, nowhere))
        load = lambda split: data.load_dataset("fashion-mnist", split, self.folder / "d")
        if (data.EXCERPT / "train-images-idx3-ubyte.gz").exists():              # the real one
            for split, n in (("train", 6000), ("test", 1000)):
                self.assertEqual(torch.bincount(load(split)[1]).tolist(), [n // 10] * 10)
        self.patched(mock.patch.object(data, "EXCERPT", self.folder))
        self.assertRaisesRegex(ValueError, "no good .*train-images", load, "train")
        for files in data.DATASETS["fashion-mnist"].files.values():
            for (name, _), array in zip(files, (np.full((2, 7, 7), 99), np.array([9, 1]))):
                self.path(f"{name}.gz", gzip.compress(idx(array)))
        for split in ("train", "test"):
            self.assertEqual((load(split)[0].shape, load(split)[1].tolist()), ((2, 1, 7, 7), [9, 1]))
        self.assertIn("using the tenth of Fashion-MNIST", self.said.getvalue())


class Server(http.server.BaseHTTPRequestHandler):
    """A mirror of any behaviour: /test/behaviour/file says what happens to that file."""

    def do_GET(self):
        _, behaviour, name = self.path.strip("/").split("/")
        content, released = self.server.files.get(name, b""), self.server.released
        self.server.requests.append(behaviour)
        if behaviour in ("404", "500"):
            return self.send_error(int(behaviour))
        self.send_response(302 if behaviour == "redirect" else 200)
        if behaviour == "redirect":
            self.send_header("Location", f"/x/good/{name}")
        self.send_header("Content-Length", str(0 if behaviour == "redirect" else len(content)))
        self.end_headers()
        sent = {"cut": content[:len(content) // 2], "stall": content[:10], "redirect": b"",
                "wrong": content[:-9] + b"x" * 9}.get(behaviour, content)
        with contextlib.suppress(OSError):
            for k in range(0, len(sent), 64):
                self.wfile.write(sent[k:k + 64])
                time.sleep(0.005 * (behaviour == "slow"))
            released.wait(20 * (behaviour == "stall"))

    log_message = lambda *_: None


class Downloading(InTemporaryFolder):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        self.server.released, self.server.requests = threading.Event(), []
        array = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
        contents = {"images": idx(array), "labels": idx(np.arange(9))}
        self.server.files = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
        checksums = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in contents.items())
        self.files = {"train": checksums}
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        for cleanup in (self.server.server_close, self.server.shutdown, self.server.released.set):
            self.addCleanup(cleanup)
        self.patched(mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}),
                     mock.patch.object(data, "TIMEOUT", 0.3), mock.patch("sys.stdout", io.StringIO()))

    def mirrors(self, *behaviours):
        here = f"127.0.0.1:{self.server.server_address[1]}/{self.id().rpartition('.')[2]}"
        return tuple(f"http://{here}/{behaviour}/" for behaviour in behaviours)

    def load(self, *behaviours, folders=(), more=()):
        mirrors = (*self.mirrors(*behaviours), *more)
        tiny = data.Dataset(tuple("012345678"), mirrors, self.files, folders)
        with mock.patch.dict(data.DATASETS, {"tiny": tiny}):
            return data.load_dataset("tiny", root=self.folder)

    def left(self):
        return sorted(p.name for p in self.folder.rglob("*") if p.is_file())

    def test_a_good_mirror_serves_the_files_once_and_they_are_found_the_next_time(self):
        images, labels = self.load("good")
        self.assertEqual((images.shape, labels.tolist()), ((9, 1, 8, 8), list(range(9))))
        self.load("404")
        self.assertEqual((self.server.requests, self.left()), (["good", "good"], ["images.gz", "labels.gz"]))

    def test_bad_mirrors_are_passed_over_slow_and_redirecting_ones_serve_and_nothing_is_left(self):
        for bad in ("404", "500", "cut", "wrong", "stall", "slow", "redirect"):
            with self.subTest(bad):
                self.server.requests.clear()
                self.assertEqual(len(self.load(bad, "good")[0]), 9)
                self.assertEqual(self.server.requests.count(bad), 2 if bad in ("slow", "redirect") else 1)
                self.assertEqual(self.left(), ["images.gz", "labels.gz"])
                for name in self.left():
                    self.path(f"tiny/{name}").unlink()

    def test_mirrors_that_failed_are_not_waited_for_twice(self):
        began = time.monotonic()
        for _ in range(3):
            self.assertRaisesRegex(ValueError, "no good", self.load, "stall", "404")
        self.assertEqual(self.server.requests, ["stall", "404"])
        self.assertLess(time.monotonic() - began, 3 * data.TIMEOUT)

    def test_when_nothing_works_the_error_names_every_place_and_the_ways_out(self):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        places = (*self.mirrors("404", "cut"), dead, "/nowhere/tiny", str(self.folder))
        with self.assertRaises(ValueError) as caught:
            self.load("404", "cut", more=(dead,), folders=("/nowhere/tiny",))
        for said in (*places, "--data-dir"):
            self.assertIn(said, str(caught.exception))
        self.assertRegex(sys.stdout.getvalue(), "(?s)404.*/cut/.*not used.*refused")
        self.assertEqual((self.left(), "\n" in str(caught.exception)), ([], False))

    def test_a_damaged_or_another_data_sets_file_is_reported_and_fetched_again(self):
        other = gzip.compress(idx(np.zeros((9, 8, 8), np.uint8)))
        for content, said in ((b"half a file", "IDX"), (other, "checksum")):
            self.path("tiny/images.gz", content)
            self.path("tiny/labels.gz", gzip.compress(idx(np.zeros(9, np.uint8))))
            self.assertEqual(self.load("good")[1].tolist(), [*range(9)])
            self.assertRegex(sys.stdout.getvalue(), f"not used: .*images.gz.*{said}")
            self.assertGreater(data.read_idx(self.path("tiny/images.gz")).max(), 0)


# ------------------------------------------------------------------------------------------ the commands


CPU = ("--device", "cpu", "--threads", "1")
SIGNALS = (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIGTERM)


class Commands(InTemporaryFolder):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 3, 60)
        self.images = (80 * self.labels[:, None, None] + rng.integers(0, 40, (60, 8, 8))).astype(np.uint8)
        self.npy, self.pt, self.png = self.data("data"), str(self.path("ddpm.pt")), str(self.path("s.png"))
        small = ("--channels", "8", "--batch-size", "8", "--timesteps", "20", "--steps", "6")
        self.new = ("--dataset", self.npy, *small, *CPU, "--out", self.pt)
        self.old = ("--out", self.pt, "--resume", *CPU)
        for number in SIGNALS:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        self.addCleanup(torch.set_num_threads, 1)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def data(self, name, changed=0):
        self.save(f"{name}.labels.npy", self.labels)
        return self.save(f"{name}.npy", np.r_[self.images[:-1], self.images[-1:] ^ changed])

    def run_main(self, script, *argv):
        """A script's main in this process -> (exit code, standard output, standard error)."""
        out, err, code, argv = io.StringIO(), io.StringIO(), 0, [str(a) for a in argv]
        main = sample.main if script is sample else lambda argv: train.train(train.parse_args(argv))
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(),
              mock.patch.object(warnings, "formatwarning"), mock.patch("sys.argv", [script.__name__])):
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                data.run_script(lambda: main(argv))
            except SystemExit as stop:                                      # a text is printed, and is a 1
                code = 1 if isinstance(stop.code, str) else stop.code
                err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
        return code, out.getvalue(), err.getvalue()

    def fine(self, script, *argv):
        code, said, err = self.run_main(script, *argv)
        self.assertEqual((code, err), (0, ""))
        return said

    def trained(self, *argv):
        return self.fine(train, *self.new, *argv)

    def sampled(self, *argv):
        return self.fine(sample, "--checkpoint", self.pt, *CPU, *argv)

    def refused(self, script, said, *argv):
        """One line on standard error, with `said` in it, and an exit code that is not 0."""
        code, _, err = self.run_main(script, *argv)
        self.assertEqual((code, err.count("\n")), (1, 1), err)
        self.assertRegex(err, said)

    def refused_samples(self, said, *argv):
        self.refused(sample, said, "--checkpoint", self.pt, *CPU, *argv)

    def run_of(self, *argv):
        """A training in hand."""
        with mock.patch("sys.stdout", io.StringIO()):
            return train.Run(train.parse_args([*self.new, *argv]))

    def weights(self, path=None):
        checkpoint = torch.load(path or self.pt, weights_only=True)
        checkpoint.get("training", {}).pop("log", None)                         # images/s are never the same
        return checkpoint

    def picture(self, name):
        return decode_png(self.folder / f"{name}.png")[0][:, :, 0]

    def small_picture(self, name):
        """A picture without gaps, and of each of its 8 x 8 pixels one."""
        picture = self.picture(name)
        rows, columns = (np.arange(size) for size in picture.shape)
        return picture[rows % 66 < 64][::8, columns % 66 < 64][:, ::8]

    def same(self, a, b):
        """Whether two checkpoints, or parts of them, are equal to the bit."""
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(self.same, a, b))
        return torch.equal(a, b) if torch.is_tensor(a) else a == b


class Training(Commands):
    def test_a_checkpoint_is_a_plain_dict_of_what_the_next_reader_needs_or_slim_without_training(self):
        said = self.trained("--dropout", "0.5")
        self.assertRegex(said, r"60 images 1x8x8, [\d,]+ parameters, .*cpu with 1 thread")
        self.assertRegex(said, r"step 6/6  loss \d+\.\d+  \d+ images/s  0.0 min left\n(?s:.*)Next: python")
        full = self.weights()
        self.assertEqual(" ".join(sorted(full)), "classes ema format settings shape source step training")
        self.assertEqual(" ".join(sorted(full["training"])), "model optimizers scaler")
        self.assertEqual((full["step"], full["shape"], full["classes"]), (6, (1, 8, 8), ("0", "1", "2")))
        network, diffusion, _ = train.load_checkpoint(self.pt, "cpu")
        self.assertTrue(self.same(dict(network.state_dict()), full["ema"]) and diffusion.timesteps == 20)
        x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
        self.assertTrue(torch.equal(network(x, t), network(x, t)))              # its dropout is off
        self.assertFalse(torch.equal(network.train()(x, t), network(x, t)))
        self.assertIn("go on: --init", self.trained("--dropout", "0.5", "--slim"))
        slim = self.weights()
        self.assertTrue(full.keys() - slim.keys() == {"training"} and self.same(full["ema"], slim["ema"]))
        self.refused(train, "ddpm.pt.*--slim", *self.old, "--steps", "9")

    def test_a_step_waits_for_no_number_from_the_device(self):
        asked = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                asked.append(str(function))
                return function(*args, **(kwargs or {}))

        unchecked = lambda table, t, x: table[t].view(-1, *[1] * (x.ndim - 1))  # on a CPU ddpm.at looks at t
        for options in (("--conditional", "--flip", "--accumulate", "2", "--dropout", "0.1"),
                        ("--loss", "huber", "--optimizer", "adam"), ("--classifier",)):
            run = self.run_of(*options, "--precision", "fp32")
            run.step()                                                          # sets up the optimisers
            with mock.patch.object(ddpm, "at", unchecked), Watch():
                run.step()
            self.assertEqual([name for name in asked if "_local_scalar_dense" in name], [], options)
        with Watch():
            torch.ones(1).item()
        self.assertTrue("aten.convolution.default" in asked and "_local_scalar_dense" in asked[-1])

    def test_the_rate_rises_from_above_0_and_falls_to_0_and_the_average_sees_the_last_step(self):
        run, rates = self.run_of("--steps", "10", "--lr", "0.1", "--warmup", "4", "--precision", "fp32"), []
        for _ in range(10):
            run.step()
            rates.append(float(run.lr))
        close(rates, [0.02, 0.04, 0.06, 0.08, 0.1, 0.5 / 6, 0.4 / 6, 0.3 / 6, 0.2 / 6, 0.1 / 6])
        run = self.run_of("--precision", "fp32", "--ema", "0.15", "--lr", "0.1", "--warmup", "0")
        average = [w.detach().clone() for w in run.averages]
        for decay in (0.1, 0.15, 0.15):                                         # (1 + n) / (10 + n), at most --ema
            run.step()
            average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, run.weights)]
        torch.testing.assert_close([w.detach() for w in run.averages], average)

    def test_every_loss_precision_and_block_trains(self):
        for options in ("--loss vlb --variance learned", "--loss l1", "--loss huber --precision bf16",
                        "--flip", "--precision fp16", "--block convnext --embedding scale-shift",
                        "--checkpointing", "--patch 1 --attention 4,8 --heads 2", "--timesteps 1", "--batch-size 1",
                        "--timesteps 49 --beta-start 0.02 --beta-end 0.98", "--optimizer adam"):
            with self.subTest(options):
                code, _, err = self.run_main(train, *self.new, "--steps", "2", "--slim", *options.split())
                self.assertEqual(code, 0, err)
        self.assertIn(f"{(self.labels == 2).sum()} images", self.trained("--only", "2"))

    def test_a_batch_is_drawn_anew_half_of_it_mirrored_and_a_share_of_its_labels_hidden(self):
        run, drawn = self.run_of("--conditional", "--flip", "--label-dropout", "0.3", "--batch-size", "4000"), []
        for _ in range(2):
            (x_0, y), known = run.batch(), torch.from_numpy(self.images)
            same, mirrored = ((data.to_pixels(x_0) == images).all((2, 3)) for images in (known, known.flip(2)))
            drawn.append((same | mirrored).int().argmax(1))
            self.assertTrue((same | mirrored).any(1).all() and ((y == 3) | (y == run.labels[drawn[-1]])).all())
            close([same.any(1).float().mean(), (y == 3).float().mean()], [0.5, 0.3], 0.05)
            self.assertGreater(int(torch.bincount(drawn[-1], minlength=60).min()), 30)      # of about 67
        self.assertLess(float((drawn[0] == drawn[1]).float().mean()), 0.05)

    def test_a_quarter_of_what_a_classifier_learns_from_is_clean(self):
        run, seen = self.run_of("--classifier", "--timesteps", "1000", "--batch-size", "4000", "--precision", "fp32"), []
        run.model = lambda x_t, t: seen.extend((x_t, t)) or torch.zeros(len(x_t), 3)
        x_0, y = run.batch()
        close(run.losses(x_0, y), torch.full((4000,), math.log(3)))
        close((seen[1] == 0).float().mean(), 0.25, 0.05)
        self.assertTrue(torch.equal((seen[0] == x_0).all(3).all(2)[:, 0], seen[1] == 0))

    def test_gradients_are_clipped_to_norm_1(self):
        run, norms, real = self.run_of("--optimizer", "adam", "--precision", "fp32"), [], train.Run.losses
        norm = lambda: norms.append(sum(w.grad.square().sum() for w in run.weights) ** 0.5)
        with (mock.patch.object(train.Run, "losses", lambda run, *batch: 1e6 * real(run, *batch)),
              mock.patch.object(run.optimizers[0], "step", norm)):
            run.step()
        close(norms, [1.0], 1e-3)

    def test_defaults_fit_the_schedule_its_T_and_the_variance(self):
        for flags, *expected in (("", "cosine", "mse", 0.01, False), ("--beta-end 0.03", "linear", "mse", 0.01, False),
                                 ("--variance learned", "cosine", "hybrid", 0.01, False),
                                 ("--optimizer adam --dataset cifar10", "cosine", "mse", 0.005, True)):
            args = train.parse_args(flags.split())
            self.assertEqual([args.schedule, args.loss, args.lr, args.flip], expected)
        for flags, ends in (("", [1e-4, 0.02]), ("--timesteps 100", [1e-3, 0.2]), ("--beta-start 0.001", [0.001, 0.02])):
            args = train.parse_args(["--schedule", "linear", *flags.split()])   # the paper's, scaled with T
            close(train.make_diffusion(args).beta[[1, -1]], ends)
        self.assertEqual([self.run_of("--precision", p).scaler.is_enabled() for p in ("bf16", "fp16")], [False, True])

    def test_the_loss_of_vlb_is_weighted_so_that_the_choice_of_t_is_undone(self):
        run = self.run_of("--loss", "vlb", "--precision", "fp32", "--batch-size", "8192", "--accumulate", "2")
        bits = lambda model, x_0, t: 0 * sum(w.sum() for w in run.weights) + t  # as if L_{t-1} = t
        with mock.patch.object(run.diffusion, "training_losses", bits):
            run.step()
        close(run.loss_sum, torch.tensor(10.5), 0.05)                           # the mean over t is printed

    def test_orthogonal_keeps_a_matrixs_directions_and_makes_its_singular_values_alike(self):
        G = noise(32, 288) @ torch.diag(torch.linspace(0.2, 3, 288))
        U, before, V = np.linalg.svd(G.double().numpy(), full_matrices=False)
        after = U.T @ train.orthogonal(G[None])[0].double().numpy() @ V.T
        self.assertGreater(before[0] / before[-1], 1.5)
        self.assertTrue((0.6 < np.diag(after)).all() and (np.diag(after) < 1.25).all(), np.diag(after))
        self.assertLess(np.abs(after - np.diag(np.diag(after))).max(), 1e-4)

    def test_muon_moves_convolutions_by_orthogonal_matrices_the_size_of_an_adam_step(self):
        network = unet.UNet(channels=8, multipliers=(1, 2))
        optimizers = train.make_optimizers(network, torch.tensor(0.01), muon=True)
        by_adam, by_muon = (o.param_groups[0]["params"] for o in optimizers)
        self.assertEqual({*by_adam, *by_muon}, {*network.parameters()})
        self.assertLessEqual({network.encoder.conv_in.weight, network.conv_out.weight}, {*by_adam})
        before, gradients = ({w: f(w) for w in network.parameters()}
                             for f in (lambda w: w.detach().clone(), lambda w: noise(*w.shape)))
        for w, gradient in gradients.items():
            w.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        for w in by_adam:                                                       # Adam's first step is a sign
            torch.testing.assert_close((before[w] - w).abs(), torch.full_like(w, 0.01), rtol=1e-2, atol=1e-4)
        for w in by_muon:
            direction = train.orthogonal(gradients[w].flatten(1)[None]).reshape(w.shape)
            size = 0.01 * 0.2 * max(len(w), w[0].numel()) ** 0.5
            torch.testing.assert_close(before[w] - w, size * direction, rtol=1e-3, atol=1e-5)

    def bad_gradient_at(self, *steps):
        """A patch under which a run's losses are not numbers in those steps."""
        real = train.Run.losses
        return mock.patch.object(train.Run, "losses", lambda run, *batch: real(run, *batch) * (
            math.nan if run.done + 1 in steps else 1))

    def test_a_single_bad_gradient_is_skipped_and_counted(self):
        for optimizer in ("muon", "adam"):
            with self.bad_gradient_at(2):
                self.assertIn("1 steps skipped", self.trained("--optimizer", optimizer))
                run, states = self.run_of("--optimizer", optimizer), []
                for _ in range(3):
                    run.step()
                    states.append([w.detach().clone() for w in run.weights])
            stayed = [self.same(a, b) for a, b in itertools.pairwise(states)]
            self.assertEqual(stayed, [True, False], optimizer)
        with self.bad_gradient_at(6):                                           # the last: saved all the same
            self.trained("--save-every", "5")
        self.assertEqual(self.weights()["step"], 6)

    def test_a_gradient_that_stays_not_finite_stops_the_run_and_leaves_the_good_checkpoint(self):
        self.trained()
        before = Path(self.pt).read_bytes()
        with self.bad_gradient_at(*range(2000)):
            self.refused(train, "not been finite for 6 steps.*Try a lower --lr", *self.new)
            self.patched(mock.patch("time.perf_counter", itertools.count().__next__))   # reports every step
            self.refused(train, "not been finite for 100 steps", *self.new, "--steps", "2000")
        self.assertEqual(Path(self.pt).read_bytes(), before)

    def test_the_number_of_threads_is_as_asked_and_measuring_it_changes_nothing(self):
        self.assertIn(" 3 thread", self.trained("--threads", "3"))
        torch.set_num_threads(1)
        measured = [a for a in self.new if a not in ("--threads", "1")]
        for options in (("--dropout", "0.1"), ("--loss", "vlb")):
            self.trained(*options)
            given = self.weights()["training"]
            self.fine(train, *measured, *options)
            self.assertTrue(self.same(self.weights()["training"], given), options)


class StopAndGoOn(Commands):
    def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(self):
        real, plan = train.Run.step, {}

        def step_and_signal(run):
            number = plan.pop(run.done + 1, None)
            for _ in range(0 if number is None else 1 if number == signal.SIGINT else 2):   # as from torchrun
                signal.raise_signal(number)
            return real(run)

        self.patched(mock.patch.object(train.Run, "step", step_and_signal))
        for options in (("--dropout", "0.1", "--conditional", "--flip", "--accumulate", "2"),
                        ("--loss", "vlb", "--variance", "learned_range"), ("--precision", "fp16")):
            self.trained(*options)
            whole, flags = self.weights(), (*self.new, *options)
            for step, number in zip((2, 3, 4), SIGNALS):
                signal.signal(number, signal.default_int_handler)               # nohup, say, ignores one
                plan[step] = number
                code, said, err = self.run_main(train, *flags)
                self.assertEqual((code, err, self.weights()["step"]), (128 + number, "", step))
                self.assertRegex(said, f"stopped at step {step}, saved in .*--resume")
                flags = self.old
            self.fine(train, *self.old)
            self.assertTrue(self.same(self.weights(), whole), options)

    def test_resume_takes_its_settings_from_the_checkpoint_and_is_refused_when_there_is_none(self):
        self.refused(train, "no .*ddpm.pt", *self.old)
        self.trained("--prediction", "v")
        self.assertRegex(self.fine(train, *self.old, "--channels", "8"), "has all (its )?6 steps")
        self.fine(train, *self.old, "--steps", "8")
        self.assertEqual((self.weights()["step"], self.weights()["settings"]["prediction"]), (8, "v"))
        self.refused(train, "8 steps already", *self.old, "--steps", "7")
        before = Path(self.pt).read_bytes()
        for flag, value, said in (("lr", "0.5", "0.01, not 0.5"), ("channels", "16", "8, not 16")):
            self.refused(train, f"keeps {flag} {said}", *self.old, "--steps", "9", f"--{flag}", value)
        self.assertEqual((Path(self.pt).read_bytes(), os.path.exists(f"{self.pt}.old")), (before, False))

    def test_data_that_moved_are_known_by_their_content_and_others_are_refused(self):
        self.trained()
        moved, other = self.data("moved"), self.data("other", changed=1)
        os.unlink(self.npy)
        go_on, pictures = (*self.old, "--steps", "8"), ("--n", "3", "--nearest", "n.png", "--out", self.png)
        self.refused(train, "data.npy", *go_on)
        self.refused_samples("data.npy", *pictures)
        self.refused(train, "ddpm.pt.*trained on other data", *go_on, "--dataset", other)
        self.refused_samples("ddpm.pt was trained on other data", *pictures, "--dataset", other)
        self.fine(train, *go_on, "--dataset", moved)
        self.assertEqual((self.weights()["step"], self.weights()["source"]["dataset"]), (8, moved))
        self.sampled(*pictures)

    def test_init_begins_with_the_averaged_weights_of_a_checkpoint(self):
        self.trained()
        start, flags = self.weights(), ["--init", "ddpm.pt", "--precision", "fp32", "--seed", "5", "--out", "new.pt"]
        self.trained(*flags, "--lr", "1e-12", "--ema", "0")
        torch.testing.assert_close(self.weights("new.pt")["ema"], start["ema"], rtol=0, atol=1e-6)
        self.assertFalse(self.same(start["ema"], start["training"]["model"]))
        self.refused(train, "--init .*ddpm.pt", *self.new, *flags, "--channels", "16")

    def test_training_again_keeps_the_older_models_as_old_old2_and_so_on(self):
        models = []
        for seed in "567":
            self.trained("--seed", seed, "--save-every", "2")                   # its own are replaced
            models.append(Path(self.pt).read_bytes())
        self.assertEqual([Path(self.pt + k).read_bytes() for k in (".old", ".old2", "")], models)
        self.assertEqual(len(list(self.folder.glob("ddpm*"))), 3)
        Path("link.pt").symlink_to(self.pt)
        self.trained("--out", "link.pt")                                        # a link stays one
        self.assertEqual((Path("link.pt").is_symlink(), Path("link.pt.old").read_bytes()), (True, models[-1]))

    def test_a_log_that_was_gone_on_with_has_every_step_once_and_previews_are_pictures(self):
        log, real = self.path("log.csv"), train.Run.step
        self.patched(mock.patch("time.perf_counter", itertools.count().__next__))       # reports every step
        with mock.patch.object(train.Run, "step", lambda run: sys.exit(9) if run.done == 5 else real(run)):
            self.run_main(train, *self.new, "--save-every", "3", "--log", log, "--preview", self.png)
        self.assertEqual((self.weights()["step"], log.read_text().count("\n")), (3, 1 + 5))
        self.assertEqual(self.picture("s").shape, (4 * 16 + 3 * 2, 4 * 16 + 3 * 2))
        self.fine(train, *self.old, "--log", log)
        header, *lines = log.read_text().splitlines()
        rows = np.array([line.split(",") for line in lines], float)
        self.assertEqual(header, "step,loss,learning_rate,images_per_second")
        self.assertEqual(rows[:, 0].tolist(), [1, 2, 3, 4, 5, 6])
        self.assertTrue((rows > 0).all() and (rows[:, 1] < 3).all())

    def test_killed_at_any_moment_the_newest_complete_checkpoint_is_there(self):
        rng, steps, flags = random.Random(1), [], [*self.new, "--steps", "1000000"]
        modified = lambda: os.stat(self.pt).st_mtime_ns if os.path.exists(self.pt) else 0
        for _ in range(200 if LONG else 2):
            before, command = modified(), [sys.executable, HERE / "train.py", *flags, "--save-every", "1"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and modified() == before:              # until it saves
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            self.assertEqual(process.communicate()[1], "")
            steps.append(train.load_checkpoint(self.pt, "cpu")[2]["step"])
            flags = self.old
        self.assertTrue(all(a < b for a, b in itertools.pairwise(steps)), steps)


class Sampling(Commands):
    def test_without_out_a_grid_goes_to_samples_pgm_and_png(self):
        self.trained()
        self.assertRegex(self.sampled("--n", "5"), "(?s)5 images drawn.*wrote samples.pgm,? samples.png")
        self.assertEqual(self.picture("samples").shape, (2 * 64 + 2, 3 * 64 + 2 * 2))   # 8 pixels shown as 64
        pixels = b"P5\n196 130\n255\n" + self.picture("samples").tobytes()
        self.assertEqual(Path("samples.pgm").read_bytes(), pixels)

    def test_an_image_depends_on_the_seed_and_its_number_and_not_on_n_or_the_batch_size(self):
        self.trained()
        pixels, flags = [], ("--steps", "4", "--precision", "fp32", "--out", "s.npy")
        for seed, n, size, *clip in ((1, 70, 256), (1, 70, 33), (1, 5, 2), (2**40, 5, 256), (1, 5, 256, "--no-clip")):
            self.sampled("--seed", seed, "--n", n, "--batch-size", size, *flags, *clip)
            pixels.append(np.load("s.npy").astype(int))
        self.assertEqual(len(np.unique(pixels[0].reshape(70, 64), axis=0)), 70)
        self.assertLessEqual(np.abs(pixels[0] - pixels[1]).max(), 1)    # sums in another order are rounded
        self.assertLessEqual(np.abs(pixels[0][:5] - pixels[2]).max(), 1)
        self.assertGreater(min(np.abs(pixels[2] - other).max() for other in pixels[3:]), 9)

    def test_every_sampler_draws_grids_strips_and_movies_of_the_right_size(self):
        self.trained("--variance", "learned_range", "--prediction", "v")
        outputs = ["--n", "3", "--out", "s.png", "--trajectory", "t.png", "--movie", "m.png", "--nearest", "n.png"]
        for steps, *options in ((1, "--steps", "1"), (7, "--steps", "7", "--batch-size", "2"), (20, "--sampler", "ddim"),
                                (3, "--sampler", "ddim", "--eta", "1", "--steps", "3")):
            said = self.sampled(*outputs, *options)
            self.assertIn("test images 0.0", said)                      # data.npy is its own test split
            self.assertEqual([self.small_picture(name).shape for name in "stn"],
                             [(16, 16), (3 * 2 * 8, 8 * min(11, steps + 1)), (3 * 8, 6 * 8)])
            self.assertEqual(len(decode_png("m.png")), steps + 1)

    def test_pictures_of_other_things_have_their_rows_and_columns_and_come_without_samples(self):
        self.trained()
        outputs = ["--forward", "f.png", "--interpolate", "i.png", "--steps", "5"]
        for clip in ((), ("--no-clip",)):
            self.sampled(*outputs, "--reconstruct", f"{'no-' * len(clip)}clip.png", *clip)
        f, r, i, free = (self.small_picture(name) for name in ("f", "clip", "i", "no-clip"))
        self.assertEqual([f.shape, r.shape, i.shape], [(8 * 8, 6 * 8), (10 * 8, 3 * 8), (4 * 8, 11 * 8)])
        for shown, image in ((f[:8, :8], 0), (r[8:16, :8], 1), (i[8:16, -8:], 1)):
            np.testing.assert_array_equal(shown, self.images[image])
        self.assertEqual((np.array_equal(r, free), list(self.folder.glob("samples*"))), (False, []))

    def test_labels_guidance_classifiers_and_scores_work_together(self):
        self.assertIn("sample.py --score", self.trained("--classifier", "--out", "c.pt"))
        self.trained("--conditional")
        self.sampled("--n", "7", "--out", "s.npy")
        self.assertEqual(np.load("s.labels.npy").tolist(), [0, 1, 2, 0, 1, 2, 0])
        self.sampled("--n", "6", "--guidance", "3", "--out", self.png)
        self.assertEqual(self.small_picture("s").shape, (16, 24))                     # a column per class
        said = self.sampled(*["--n", "4", "--label", "2", "--guidance", "0", "--out", "s.npy", "--score", "c.pt"],
                            "--nearest", "n.png")
        self.assertGreaterEqual(self.small_picture("n")[:, 8:].min(), 160)            # only images of class 2
        self.assertRegex(said, r"(?s)Frechet distance \d+\.\d+ .*right class: .*%")
        self.trained()
        self.sampled(*["--n", "2", "--label", "1", "--classifier", "c.pt", "--guidance", "2", "--out", "s.npy"])
        self.assertEqual(np.load("s.labels.npy").tolist(), [1, 1])
        self.sampled("--n", "2", "--out", "s.npy", "--steps", "2")
        self.assertFalse(Path("s.labels.npy").exists())                         # they would be others' labels

    def test_labels_guidance_classifiers_and_scores_that_cannot_be_say_why(self):
        self.trained("--classifier", "--beta-end", "0.6", "--out", "linear.pt", "--dataset", self.data("moved/data"))
        self.trained("--classifier", "--dataset", self.data("other", changed=1), "--out", "other.pt")
        self.trained("--conditional", "--label-dropout", "0", "--out", "labelled.pt")
        self.trained()
        for checkpoint, flags, said in (
                ("ddpm.pt", "--label 2", "labels"), ("ddpm.pt", "--guidance 2", "labels"), ("linear.pt", "", "classifier"),
                ("labelled.pt", "--guidance 0", "--label-dropout"), ("labelled.pt", "--label 7", "label '7'"),
                ("labelled.pt", "--classifier linear.pt", "--label-dropout"), ("ddpm.pt", "--score other.pt", "other data"),
                ("ddpm.pt", "--classifier ddpm.pt", "no classif"), ("ddpm.pt", "--classifier linear.pt", "another schedule"),
                ("ddpm.pt", "--classifier other.pt", "other.pt was trained on other data")):
            with self.subTest(flags):
                self.refused(sample, said, "--checkpoint", checkpoint, *CPU, *flags.split())
        self.sampled(*["--n", "4", "--out", "s.png", "--score", "linear.pt"])        # clean images have no schedule
        self.sampled(*["--n", "2", "--out", "s.png", "--checkpoint", "labelled.pt", "--guidance", "1"])

    def test_guidance_0_hides_the_label_1_shows_it_and_3_asks_for_both(self):
        network = mock.Mock(side_effect=lambda x_t, t, y: x_t, num_classes=3)
        for guidance, expected in ((0, "None"), (1, "tensor([1, 2])"), (3, "tensor([1, 2, 3, 3])")):
            model = sample.guided_model(mock.Mock(guidance=guidance), network, None, None, torch.tensor([1, 2]))
            model(noise(2, 1, 3, 3), torch.tensor([5, 5]))
            self.assertEqual(str(network.call_args.args[2]), expected)

    def test_the_frechet_distance_is_that_of_the_fitted_gaussians(self):
        f, g = noise(900, 4) @ noise(4, 4, seed=1) + 1, noise(700, 4, seed=2) @ noise(4, 4, seed=3)
        (m, C), (n, D) = ((x.mean(0), np.cov(x.T)) for x in (f.double().numpy(), g.double().numpy()))
        expected = ((m - n) ** 2).sum() + np.trace(C + D) - 2 * np.sqrt(np.linalg.eigvals(C @ D).real).sum()
        self.assertAlmostEqual(sample.frechet_distance(f, g), expected, delta=1e-6)

    def test_evaluate_clips_x_0_unless_told_not_to_and_gives_the_network_the_labels(self):
        self.trained("--conditional")
        bits = lambda *flags: self.sampled("--evaluate", "--n", "9", *flags).split("at step")[1]
        clipped, free = bits(), bits("--no-clip")
        self.save("data.labels.npy", (self.labels + 1) % 3)
        self.assertEqual(len({clipped, free, bits()}), 3)

    def test_evaluate_prints_the_bound_as_rate_and_distortion_and_random_terms_estimate_all_of_them(self):
        self.images, self.labels = self.images.repeat(2, 0), self.labels.repeat(2)
        self.data("data")
        self.trained()
        values, real = [], sample.chosen_times
        for chosen in (real, lambda T, B, _, device: real(T, B, True, device)):
            with mock.patch.object(sample, "chosen_times", chosen):
                said = self.sampled("--evaluate", "--n", "118")
            self.assertRegex(said, "118 test images.* at step 6")
            values.append([[float(x) for x in re.search(rf"{name} +(\S+) \+- ([\d.]+)", said).groups()]
                           for name in ("L_simple", "bits/dim <=", "rate", "distortion")])
            l_simple, bits, rate, distortion = (value for value, _ in values[-1])
            self.assertTrue(0.1 < l_simple < 3 and abs(bits - rate - distortion) < 2e-3, said)
        for (a, width), (b, exact_width) in zip(*values):
            self.assertLess(abs(a - b), 3 * (width + exact_width))
        self.assertNotEqual(*values)


WRONG = {train: """--steps 0: --steps|--lr nan: --lr|--lr -1: --lr|--lr 0: --lr|--ema 1: --ema
    |--seed -1: --seed|--batch-size two: --batch-size|--dropout 1: --dropout|--prediction x: --prediction
    |--heads 3: heads|--multipliers 1,x: --multipliers|--colour: unrecognized|--beta-end 1: between
    |--init none.pt: none.pt|--beta-end 0.5 --schedule cosine: --schedule linear|--loss hybrid: no gradient
    |--loss mse --variance learned: --loss mse does not train --variance learned|--dataset none.npy: none.npy
    |--dataset cats: cats|--timesteps 900 --beta-end 0.9: too small|--only 1 --conditional: exclude
    |--only boot: no label 'boot'|--out /nowhere/x.pt: /nowhere|--out /dev/null: cannot be written
    |--out .: cannot be written|--device toaster: toaster|--accumulate 3: 3 parts
    |--preview p.jpg: p.jpg|--classifier --preview p.png: --preview""", sample: """--n 0: --n|--steps -5: --steps|--seed -1: --seed
    |--eta 2 --sampler ddim: eta|--eta 0.5: --sampler ddim|--guidance inf: --guidance|--out x.jpg: x.jpg
    |--evaluate --out x.png: --out is about samples|--checkpoint none.pt: none.pt|--movie x.gif: x.gif
    |--steps 21: 1..20, not 21|--out /nowhere/x.png: /nowhere|--score nope.pt: nope.pt"""}


class WhatMustBeRefused(Commands):
    def test_wrong_flags_and_values_are_one_line_before_any_work(self):
        self.trained("--out", "good.pt")
        for script, flags in ((train, self.new), (sample, ("--checkpoint", "good.pt", *CPU))):
            for command, said in (line.strip().split(": ") for line in WRONG[script].split("|")):
                with self.subTest(command):
                    self.refused(script, said, *flags, *command.split())
        self.assertEqual([*self.folder.glob("*.p*")], [self.folder / "good.pt"])

    def test_outputs_over_inputs_or_each_other_are_refused_before_anything_is_written(self):
        self.trained()
        self.data("moved")
        before, again = {p.name: p.read_bytes() for p in self.folder.iterdir()}, f"../{self.folder.name}"
        for flags in (f"--out {self.npy}", f"--init ddpm.pt --out {again}/ddpm.pt", "--out x.png --preview x.png"):
            self.refused(train, "twice", *self.new, *flags.split())
        for flags in (f"--out {self.npy}", f"--dataset moved.npy --out {again}/moved.npy",
                      f"--out a.png --movie {again}/a.png", "--out a.png --trajectory A.png"):
            self.refused_samples("twice", "--n", "2", *flags.split())
        self.assertEqual({p.name: p.read_bytes() for p in self.folder.iterdir()}, before)

    def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(self):
        exploded = self.folder / "exploded"
        bomb = type("Bomb", (), {"__reduce__": lambda _: (os.mkdir, (str(exploded),))})()
        with open("plain", "wb") as file:
            pickle.dump(bomb, file)
        torch.save({"format": bomb}, "zipped")
        for path in ("plain", "zipped"):
            for script, flag in ((sample, "--checkpoint"), (train, "--init"), (train, "--resume --out")):
                flags = (*self.new, *flag.split()) if script is train else (flag,)
                self.refused(script, f"{path} is no checkpoint", *flags, path)
        self.assertFalse(exploded.exists())

    def test_a_checkpoint_with_wrong_or_missing_parts_is_one_line_with_the_files_name(self):
        self.trained()
        good, name = self.weights(), next(iter(self.weights()["ema"]))
        change = lambda part, **changed: {**good, part: {**good[part], **changed}}
        without = lambda part: {k: v for k, v in good.items() if k != part}
        w, draw, go_on = good["ema"][name], ("--checkpoint", self.pt, *CPU), (*self.old, "--steps", "9")
        both = [*map(without, ("format", "ema", "source")), {**good, "format": 7}, {**good, "ema": {}}, [1, 2],
                {**good, "settings": None}, {**good, "settings": {}}, {**good, "source": "x"},
                change("settings", dropout="x"), change("settings", timesteps=10**12), change("ema", **{name: w[:1]})]
        drawn = [change("settings", channels=10**9), change("settings", multipliers=(1,)), change("ema", **{name: w * math.nan})]
        trained = [without("step"), *(change("training", **{k: v}) for k, v in (("scaler", 3), ("optimizers", []), ("model", {})))]
        for script, flags, cases in ((sample, draw, [*both, *drawn, {**good, "shape": (1, 8, "8")}]),
                                     (train, go_on, [*both, *trained])):
            for k, checkpoint in enumerate(cases):
                torch.save(checkpoint, self.pt)
                with self.subTest(f"{script.__name__}, case {k}"):
                    self.refused(script, "ddpm.pt", *flags)

    def test_a_checkpoint_gets_no_more_memory_than_it_has_bytes(self):
        torch.save({"zeros": torch.zeros(10**6)}, "plain.pt")
        with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile(self.pt, "w", zipfile.ZIP_LZMA) as bomb:
            for entry in plain.infolist():
                bomb.writestr(entry.filename, plain.read(entry))
        with mock.patch.object(torch, "load", side_effect=AssertionError("it was unpacked")):
            self.refused_samples("ddpm.pt.*unpacks to more")

    def test_whatever_is_done_to_a_checkpoint_it_loads_or_is_refused_by_name(self):
        self.trained("--slim")
        load, good = lambda path: train.load_checkpoint(path, "cpu"), Path(self.pt).read_bytes()
        self.mutations("mutated.pt", good, load, 60)
        flipped = self.path("flipped.pt", good[:65_000] + bytes([good[65_000] ^ 1]) + good[65_001:])
        self.assertRaisesRegex(ValueError, "flipped.pt.*checksum", load, flipped)


class SeveralProcesses(Commands):
    def test_two_processes_train_what_two_parts_do_and_draw_what_one_does(self):
        flags = (*self.new, "--precision", "fp32", "--dropout", "0.1")
        self.fine(train, *flags, "--accumulate", "2")
        small = ["--n", "5", "--batch-size", "2", "--steps", "4", "--precision", "fp32"]
        draw = ("--checkpoint", self.pt, *small, *CPU, "--out")
        with socket.socket() as a, socket.socket() as b:
            ports = [s.bind(("127.0.0.1", 0)) or str(s.getsockname()[1]) for s in (a, b)]
        code = ("import os, data, sample, train\n"
                f"data.run_script(lambda: train.train(train.parse_args({[*flags, '--out', 'two.pt']})))\n"
                f"os.environ['MASTER_PORT'] = '{ports[1]}'\n"
                f"data.run_script(lambda: sample.main({[*draw, 'two.npy']}))")
        shared = {**os.environ, "PYTHONPATH": str(HERE), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        both = [subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, env={
            **shared, "MASTER_PORT": ports[0], "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        said = [process.communicate(timeout=60)[0] for process in both]
        self.assertEqual([process.returncode for process in both], [0, 0])
        self.assertEqual([(text.count("Next:"), text.count("wrote")) for text in said], [(1, 1), (0, 0)])
        torch.testing.assert_close(self.weights("two.pt")["ema"], self.weights()["ema"], rtol=1e-3, atol=1e-4)
        self.fine(sample, *draw, "one.npy")
        np.testing.assert_array_equal(np.load("one.npy"), np.load("two.npy"))


class TheReadme(Commands):
    def setUp(self):
        super().setUp()
        self.readme = (HERE / "README.md").read_text(encoding="utf-8")

    def test_every_command_in_the_readme_is_understood_and_runs(self):
        starts = r"(?:python|torchrun --nproc-per-node=\d+ --) (train|sample)\.py((?: [^`&#|\n]*)?)"
        commands = {(script, flags.strip()) for script, flags in re.findall(starts, self.readme)}
        self.assertGreater(len(commands), 15)
        self.trained("--conditional")
        self.trained("--classifier", "--out", self.path("c.pt"))
        os.chdir(self.path("work/assets/x").parents[1])
        for script, flags in sorted(commands):                                  # as written; then small
            argv = [a for a in shlex.split(flags) if a not in ("...", "--compile")]
            with self.subTest(f"{script}.py {flags}"):
                if script == "train":
                    self.run_a_training(argv)
                    continue
                args = sample.parse_args(argv)
                shutil.copy(self.pt, args.checkpoint)
                for path in filter(None, (args.classifier, "c.pt")):
                    shutil.copy(self.path("c.pt"), path)
                small = itertools.chain(*(p for p in (("--label", "1"), ("--score", "c.pt")) if p[0] in argv))
                small = (*argv, *small, "--n", "4", "--steps", "2", "--dataset", self.npy, *CPU)
                self.assertEqual(self.run_main(sample, *small)[0], 0)

    def run_a_training(self, argv):
        """After what --init or --resume goes on from was trained."""
        plain = [a for a, b in zip(argv, ["", *argv]) if a not in ("--resume", "--init") and b != "--init"]
        out = train.parse_args([a for a in argv if a != "--resume"]).out
        start = argv[argv.index("--init") + 1] if "--init" in argv else out
        small = (*self.new[:6], "--multipliers", "1,2", *CPU, *("--only", "1") * ("--only" in argv))
        for steps, flags, path in [(1, plain, start)] * (plain != argv) + [(2, argv, out)]:
            self.assertEqual(self.run_main(train, *flags, *small, "--steps", steps, "--out", path)[0], 0)

    def test_algorithms_1_and_2_stand_plainly_with_the_papers_line_numbers_and_no_branch(self):
        for name, lines in (("training_losses", "345"), ("sample_steps", "12345"), ("sample", "6")):
            source = inspect.getsource(getattr(GaussianDiffusion, name))
            self.assertEqual("".join(re.findall(r"# (\d)\b", source)), lines)
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(GaussianDiffusion.sample_steps)))
        self.assertFalse({type(node) for node in ast.walk(tree)} & {ast.If, ast.Try, ast.While, ast.Match})

    def test_every_test_name_flag_and_picture_in_the_readme_exists(self):
        known, here = set(), Path(__file__).parent
        tests = "".join(path.read_text(encoding="utf-8") for path in here.glob("test_*.py"))
        for script in (train, sample):
            with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
                script.parse_args(["--help"])
            known.update(re.findall(r"--[a-z][\w-]*", out.getvalue()))
        self.assertLessEqual({*re.findall(r"`(--[a-z][\w-]+)", self.readme)}, known)
        for name in re.findall(r"`(test_\w+)`", self.readme):
            self.assertIn(f"def {name}(", tests)
        for pattern in re.findall(r"-k (\w+)", self.readme):
            self.assertRegex(tests, rf"(class|def) \w*{pattern}")
        for block in re.findall(r"```python\n( +.*?)```", self.readme, re.DOTALL):      # the two algorithms
            self.assertIn(block, (HERE / "ddpm.py").read_text(encoding="utf-8"))
        table = re.search(r"\n\| the paper .*?\n\n", self.readme, re.DOTALL)[0]
        names = {n for row in table.strip().splitlines() for n in re.findall(r"`(\w+)`", row.split("|")[-2])}
        self.assertGreater(len(names), 20)
        for name in names:
            self.assertTrue(any(hasattr(place, name) for place in (ddpm, ddpm.GaussianDiffusion, train)), name)
        for path in re.findall(r"\]\((assets/[^)]*)\)", self.readme):
            self.assertTrue((HERE / path).exists(), path)


if __name__ == "__main__":
    unittest.main()
