"""The proof that the code is the paper: python -m unittest (offline, about a minute and a half); one test: python -m unittest -k decoder.

Three oracles carry most of it. The Gaussian: if every pixel of x_0 is N(m, s^2), the best possible eps_theta is known in
closed form (gaussian_eps), so losses, samplers, inversion and bits/dim can be held against known numbers without training;
with it every sampler's step is affine, so the mean and variance of a whole chain can be propagated exactly. The handful of
points: if x_0 is one of a few known images, the best eps_theta is a softmax over them (points_eps), and samples must be
those images. And float64: formulas are worked out again with numpy, from the paper, without this project's tables.

DDPM_LONG_TESTS=1 makes the kill and mutation tests as long as they should be before a release (minutes).
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
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import ddpm
import sample
import train
import unet
from ddpm import GaussianDiffusion, linear_beta_schedule

HERE = Path(__file__).parent
LONG = bool(os.environ.get("DDPM_LONG_TESTS"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
M, S = 0.3, 0.5                                       # the Gaussian oracle's data: x_0 ~ N(M, S^2)
STEEP = np.linspace(0.02, 0.4, 20)                    # a short schedule that ends in noise: alpha_bar_20 = 0.007

torch.set_num_threads(1)                              # the tensors are small; threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")         # in the processes started here, too


def setUpModule():
    warnings.simplefilter("ignore", UserWarning)      # short schedules warn that they do not end in noise: tested where due


class Reference:
    """The paper's quantities for t = 0 .. T in float64, from its formulas, with none of the project's tables."""

    def __init__(self, betas):
        self.T, self.beta = len(betas), np.concatenate([[0.0], np.asarray(betas, np.float64)])
        self.alpha = 1 - self.beta
        self.alpha_bar = np.array([np.prod(self.alpha[:t + 1]) for t in range(self.T + 1)])

    def posterior(self, t):
        """Weights of x_0 and x_t in mu-tilde, and beta-tilde (Eq. 7)."""
        ab, before = self.alpha_bar[t], self.alpha_bar[t - 1]
        return (np.sqrt(before) * self.beta[t] / (1 - ab), np.sqrt(self.alpha[t]) * (1 - before) / (1 - ab),
                (1 - before) / (1 - ab) * self.beta[t])

    def sigma2(self, t, variance):
        return self.beta[t] if variance == "beta" else self.posterior(t)[2]


def gaussian_eps(alpha_bar, m=M, s=S):
    """The perfect eps_theta for x_0 ~ N(m, s^2): E[eps | x_t]. alpha_bar: a table (T+1,)."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)

    def model(x_t, t):
        ab = alpha_bar[t][:, None, None, None]
        return ((1 - ab).sqrt() * (x_t.double() - ab.sqrt() * m) / (ab * s**2 + 1 - ab)).float()

    return model


def points_eps(alpha_bar, points):
    """The perfect eps_theta when x_0 is one of `points` (K, C, H, W), each as likely."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)

    def model(x_t, t):
        ab, x = alpha_bar[t][:, None], x_t.double().flatten(1)
        means = ab[:, None].sqrt() * points.double().flatten(1)
        weights = torch.softmax(-((x[:, None] - means) ** 2).sum(2) / (2 * (1 - ab)), dim=1)
        x_0 = weights @ points.double().flatten(1)
        return ((x - ab.sqrt() * x_0) / (1 - ab).sqrt()).view_as(x_t).float()

    return model


def as_prediction(diffusion, eps_model, channels=None):
    """A model that knows what eps_model knows, but says it as `diffusion` wants to hear it, with constant variance channels."""
    def model(x_t, t):
        eps = eps_model(x_t, t)
        signal, noise = ddpm.at(diffusion.alpha_bar, t).sqrt(), ddpm.at(diffusion.one_minus_alpha_bar, t).sqrt()
        output = diffusion.target((x_t - noise * eps) / signal, x_t, t, eps)
        return output if channels is None else torch.cat([output, torch.full_like(output, channels)], dim=1)

    return model


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
                               rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------- Section 2: the forward process


class Section2ForwardProcess(unittest.TestCase):
    def setUp(self):
        self.diffusion, self.ref = GaussianDiffusion(linear_beta_schedule()), Reference(np.linspace(1e-4, 0.02, 1000))

    def test_the_linear_schedules_defaults_are_section_4s(self):
        betas = linear_beta_schedule()
        self.assertEqual((betas.dtype, betas.shape), (torch.float64, (1000,)))
        close(betas, np.linspace(1e-4, 0.02, 1000), 1e-15)

    def test_index_0_is_clean_data(self):
        d = self.diffusion
        self.assertEqual([float(d.beta[0]), float(d.alpha[0]), float(d.alpha_bar[0])], [0, 1, 1])
        self.assertEqual(float(d.posterior_variance[0]), 0)
        for table in (d.beta, d.alpha, d.alpha_bar, d.posterior_variance):
            self.assertEqual((table.shape, table.dtype), ((1001,), torch.float32))

    def test_tables_are_the_float64_formulas_rounded_once(self):
        d, r = self.diffusion, self.ref
        for table, exact in ((d.alpha_bar, r.alpha_bar), (d.one_minus_alpha_bar, 1 - r.alpha_bar),
                             (d.posterior_variance[1:], [r.posterior(t)[2] for t in range(1, 1001)]),
                             (d.x_0_weight[1:], [r.posterior(t)[0] for t in range(1, 1001)]),
                             (d.x_t_weight[1:], [r.posterior(t)[1] for t in range(1, 1001)])):
            np.testing.assert_allclose(table.numpy(), exact, rtol=3e-7)
        in_float32 = float(1 - torch.tensor(0.9999))
        self.assertGreater(abs(in_float32 / 1e-4 - 1), 1e-4)                # what would be lost otherwise

    def test_no_table_is_float64_and_there_is_nothing_to_learn(self):
        self.assertEqual({b.dtype for b in self.diffusion.buffers()}, {torch.float32})
        self.assertEqual(list(self.diffusion.parameters()), [])

    def test_eq4_is_what_eq2_gives_step_by_step(self):
        d, one, zero = self.diffusion, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        signal, variance = 1.0, 0.0
        for t in range(1, 1001):
            a, b = float(d.q_step(one, t, noise=zero)), float(d.q_step(zero, t, noise=one))
            signal, variance = a * signal, a**2 * variance + b**2
            self.assertAlmostEqual(signal, float(d.q_sample(one, t, noise=zero)), delta=2e-5)
            self.assertAlmostEqual(variance, float(d.q_sample(zero, t, noise=one)) ** 2, delta=2e-5)

    def test_a_chain_of_steps_and_the_closed_form_agree_in_distribution(self):
        d = GaussianDiffusion(STEEP)
        x = x_0 = torch.full((4, 1, 100, 100), 0.7)
        for t in range(1, 11):
            x = d.q_step(x, t, noise=noise(*x.shape, seed=t))
        y = d.q_sample(x_0, 10, noise=noise(*x.shape, seed=99))
        self.assertAlmostEqual(float(x.mean()), float(y.mean()), delta=0.03)
        self.assertAlmostEqual(float(x.std()), float(y.std()), delta=0.02)

    def test_the_posterior_is_bayes_rule_on_eq2_and_eq4(self):
        r, x_0, x_t = self.ref, noise(3, 1, 2, 2, seed=1), noise(3, 1, 2, 2, seed=2)
        for t in (2, 3, 500, 1000):
            # q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add
            precision = r.alpha[t] / r.beta[t] + 1 / (1 - r.alpha_bar[t - 1])
            mean = (np.sqrt(r.alpha[t]) / r.beta[t] * x_t.double()
                    + np.sqrt(r.alpha_bar[t - 1]) / (1 - r.alpha_bar[t - 1]) * x_0.double()) / precision
            got_mean, got_variance = self.diffusion.q_posterior(x_0, x_t, torch.full((3,), t))
            close(got_mean, mean)
            np.testing.assert_allclose(got_variance.flatten().numpy(), 1 / precision, rtol=1e-6)

    def test_at_t_1_the_posterior_is_exactly_x_0(self):
        x_0 = noise(2, 1, 3, 3)
        mean, variance = self.diffusion.q_posterior(x_0, noise(2, 1, 3, 3, seed=1), 1)
        self.assertTrue(torch.equal(mean, x_0))
        self.assertEqual(float(variance.max()), 0)

    def test_wrong_schedules_choices_and_times_are_refused_with_what_is_allowed(self):
        for betas in ([], [[0.1]], [0.0, 0.1], [0.1, 1.0], [float("nan")], [-0.1]):
            with self.assertRaisesRegex(ValueError, "betas"):
                GaussianDiffusion(betas)
        for start, end in ((0, 0.5), (0.1, 1), (float("nan"), 0.1)):
            with self.assertRaisesRegex(ValueError, "strictly between 0 and 1"):
                linear_beta_schedule(10, start, end)
        for timesteps in (0, -1, 2.5):
            with self.assertRaisesRegex(ValueError, "timesteps"):
                linear_beta_schedule(timesteps)
        for choice in ({"prediction": "noise"}, {"variance": "fixed"}, {"loss": "l2"}):
            with self.assertRaisesRegex(ValueError, "must be one of"):
                GaussianDiffusion(STEEP, **choice)
        for t in (0, 21, torch.tensor([1, 21]), torch.tensor([0.5])):
            with self.assertRaisesRegex(ValueError, r"1\.\.20"):
                GaussianDiffusion(STEEP).q_sample(torch.zeros(2, 1, 1, 1), t)
        with self.assertRaisesRegex(ValueError, "too small for float32"):
            GaussianDiffusion(linear_beta_schedule(1000, 0.02, 0.98))
        with self.assertRaisesRegex(ValueError, r"must be \(B, C, H, W\), not \(5, 2\)"):       # and not broadcast to something else
            GaussianDiffusion(STEEP).training_loss(lambda x_t, t: x_t, torch.zeros(5, 2))

    def test_whatever_whole_numbers_t_is_made_of_the_model_gets_int64(self):
        d, x = GaussianDiffusion(STEEP), noise(2, 1, 3, 3)
        for t in (7, torch.tensor(7), torch.tensor([7, 7], dtype=torch.int32), torch.tensor([7, 7], dtype=torch.uint8), np.int64(7)):
            eps, _ = d.predict(lambda x_t, t: x_t * 0 + t[:, None, None, None] * (t.dtype == torch.int64), x, t, clip=False)
            close(eps, torch.full_like(x, 7), 1e-4)

    def test_a_schedule_that_does_not_end_in_noise_warns_and_names_the_cure(self):
        with self.assertWarnsRegex(UserWarning, r"alpha_bar_T = 0\.0\d+.*beta_start=0\.000333 to beta_end=0\.0667"):
            GaussianDiffusion(linear_beta_schedule(300))
        with self.assertWarnsRegex(UserWarning, "cosine"):
            GaussianDiffusion(linear_beta_schedule(10))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GaussianDiffusion(linear_beta_schedule())
            GaussianDiffusion(linear_beta_schedule(300, 1e-4 / 0.3, 0.02 / 0.3))
            GaussianDiffusion(linear_beta_schedule(49, 0.02, 0.98))          # a well-known short steep chain


# ---------------------------------------------------------------------------------------------------- Algorithm 1: training


class Algorithm1Training(unittest.TestCase):
    def test_algorithms_1_and_2_have_no_branch_and_no_option_in_their_bodies(self):
        for function in (GaussianDiffusion.training_losses, GaussianDiffusion.sample, GaussianDiffusion.training_loss):
            tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
            kinds = {type(node) for node in ast.walk(tree)}
            self.assertFalse(kinds & {ast.If, ast.IfExp, ast.BoolOp, ast.Try, ast.While, ast.Match}, function.__name__)

    def test_l_simple_is_the_mean_squared_error_of_eps(self):
        d, r = GaussianDiffusion(STEEP), Reference(STEEP)
        x_0, eps, t = noise(4, 2, 3, 3), noise(4, 2, 3, 3, seed=1), torch.tensor([1, 2, 10, 20])
        seen = []

        def model(x_t, t):
            seen.append((x_t, t))
            return 0.3 * x_t

        loss = d.training_loss(model, x_0, t, eps)
        ab = r.alpha_bar[t.numpy()][:, None, None, None]
        x_t = np.sqrt(ab) * x_0.double().numpy() + np.sqrt(1 - ab) * eps.double().numpy()
        each = ((eps.double().numpy() - 0.3 * x_t) ** 2).mean((1, 2, 3))
        close(loss, each.mean())
        close(d.training_losses(model, x_0, t, eps), each)
        close(seen[0][0], x_t)
        self.assertEqual((len(seen), seen[0][1].dtype, loss.shape), (2, torch.int64, ()))

    def test_t_is_uniform_on_1_to_T_with_both_ends(self):
        d = GaussianDiffusion(STEEP)
        torch.manual_seed(0)
        counts = torch.bincount(d.uniform_t(torch.zeros(40000, 1)), minlength=21)
        self.assertEqual(int(counts[0]), 0)
        self.assertLess(float((counts[1:] - 2000).abs().max()), 5 * math.sqrt(2000))

    def test_the_gaussian_oracle_has_the_loss_that_theory_gives(self):
        d, r = GaussianDiffusion(STEEP), Reference(STEEP)
        x_0 = M + S * noise(16, 1, 64, 64)
        for t in (1, 5, 20):
            # Var[eps | x_t] = ab s^2 / (ab s^2 + 1 - ab)
            ab = r.alpha_bar[t]
            loss = float(d.training_loss(gaussian_eps(r.alpha_bar), x_0, torch.full((16,), t), noise(16, 1, 64, 64, seed=t)))
            self.assertAlmostEqual(loss, ab * S**2 / (ab * S**2 + 1 - ab), delta=0.02)

    def test_l1_and_huber_are_the_other_distances(self):
        x_0, eps = noise(2, 1, 4, 4), 3 * noise(2, 1, 4, 4, seed=1)
        zero = lambda x_t, t: torch.zeros_like(x_t)
        close(GaussianDiffusion(STEEP, loss="l1").training_loss(zero, x_0, 5, eps), eps.abs().mean())
        huber = torch.where(eps.abs() < 1, eps**2 / 2, eps.abs() - 0.5).mean()
        close(GaussianDiffusion(STEEP, loss="huber").training_loss(zero, x_0, 5, eps), huber)


# ------------------------------------------------------------------------------------------- Section 3.2: the reverse process


class Section3ReverseProcess(unittest.TestCase):
    def test_without_the_clip_eq11_is_eq7_after_eq15(self):
        d, r, x_t = GaussianDiffusion(linear_beta_schedule()), Reference(np.linspace(1e-4, 0.02, 1000)), noise(1, 1, 4, 4)
        model = lambda x_t, t: torch.sin(3 * x_t)
        eps = torch.sin(3 * x_t).double()
        for t in (1, 2, 10, 500, 1000):
            mean, _, x_0 = d.p_mean_variance(model, x_t, t, clip=False)
            eq11 = (x_t.double() - r.beta[t] / np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha[t])
            eq15 = (x_t.double() - np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha_bar[t])
            a, b, _ = r.posterior(t)
            close(eq11, a * eq15 + b * x_t.double(), 1e-9)
            close(mean, eq11)
            torch.testing.assert_close(x_0.double(), eq15, rtol=1e-4, atol=1e-4)

    def test_with_the_clip_the_mean_is_eq7_at_the_clipped_x_0_and_no_longer_algorithm_2s(self):
        d, r, x_t = GaussianDiffusion(linear_beta_schedule()), Reference(np.linspace(1e-4, 0.02, 1000)), noise(1, 1, 4, 4)
        model = lambda x_t, t: torch.sin(3 * x_t)
        for t in (10, 500, 1000):
            mean, _, x_0 = d.p_mean_variance(model, x_t, t)
            unclipped, _, outside = d.p_mean_variance(model, x_t, t, clip=False)
            self.assertTrue(torch.equal(x_0, outside.clamp(-1, 1)))
            a, b, _ = r.posterior(t)
            close(mean, a * x_0.double() + b * x_t.double())
            self.assertGreater(float((mean - unclipped).abs().max()), 1e-4)

    def test_a_clipped_x_0_comes_with_the_eps_that_belongs_to_it(self):
        r, x_t = Reference(STEEP), 3 * noise(2, 1, 4, 4)
        for prediction in ddpm.CHOICES["prediction"]:
            d = GaussianDiffusion(STEEP, prediction)
            for t in (1, 7, 20):
                eps, x_0 = d.predict(lambda x_t, t: 0.5 * x_t, x_t, t)
                self.assertLessEqual(float(x_0.abs().max()), 1)
                close(np.sqrt(r.alpha_bar[t]) * x_0.double() + np.sqrt(1 - r.alpha_bar[t]) * eps.double(), x_t, 1e-5)

    def test_beta_is_the_best_variance_for_standard_normal_data_and_the_posteriors_for_a_single_point(self):
        d, r = {v: GaussianDiffusion(STEEP, variance=v) for v in ("beta", "posterior")}, Reference(STEEP)
        model, x = (lambda x_t, t: x_t), torch.zeros(1, 1, 1, 1)
        for t in range(2, 21):
            a, _, tilde = r.posterior(t)
            for s, variance in ((1.0, "beta"), (0.0, "posterior")):
                # Var[x_{t-1} | x_t] when x_0 ~ N(m, s^2) = beta-tilde + (weight of x_0)^2 Var[x_0 | x_t]
                given = s**2 * (1 - r.alpha_bar[t]) / (r.alpha_bar[t] * s**2 + 1 - r.alpha_bar[t])
                close(d[variance].p_mean_variance(model, x, t)[1].flatten()[0], tilde + a**2 * given, 1e-6)

    def test_at_t_1_beta_tilde_2_stands_in_for_both_variances(self):
        x = torch.zeros(1, 1, 1, 1)
        for variance in ("beta", "posterior"):
            d = GaussianDiffusion(linear_beta_schedule(), variance=variance)
            self.assertEqual(float(d.p_mean_variance(lambda x, t: x, x, 1)[1]), float(d.posterior_variance[2]))
            self.assertEqual(float(d.p_mean_variance(lambda x, t: x, x, 1000)[1]),
                             float((d.beta if variance == "beta" else d.posterior_variance)[1000]))

    def test_mean_variance_and_x_0_come_from_one_call_of_the_model(self):
        calls = []
        d = GaussianDiffusion(STEEP, variance="learned_range")

        def model(x_t, t):
            calls.append(t)
            return torch.cat([x_t, x_t], dim=1)

        d.p_mean_variance(model, noise(2, 1, 2, 2), 5)
        d.p_sample(model, noise(2, 1, 2, 2), 5)
        d.training_loss(model, noise(2, 1, 2, 2))
        d.vlb_terms(model, noise(2, 1, 2, 2), noise(2, 1, 2, 2), 5)
        self.assertEqual(len(calls), 4)

    def test_an_output_of_the_wrong_shape_is_refused_with_the_right_one(self):
        x = noise(2, 3, 4, 4)
        for variance, right, *wrong in (("beta", 3, 2, 6, 4, 4), ("learned", 6, 2, 3, 4, 4), ("learned_range", 6, 2, 4, 4, 4),
                                        ("beta", 3, 1, 3, 4, 4), ("beta", 3, 2, 3, 4, 1)):
            with self.assertRaisesRegex(ValueError, rf"of shape \(2, {right}, 4, 4\)"):
                GaussianDiffusion(STEEP, variance=variance).predict(lambda x, t, shape=wrong: torch.zeros(shape), x, 3)


# ---------------------------------------------------------------------------------------------------- Algorithm 2: sampling


def propagate(ref, variance, m=M, s=S):
    """Mean and variance of Algorithm 2's x_0 with the Gaussian oracle, exactly: every step is affine (float64)."""
    mean, var = 0.0, 1.0
    for t in range(ref.T, 0, -1):
        ab = ref.alpha_bar[t]
        # eps = k x_t + c, so x_{t-1} = (x_t - w (k x_t + c)) / sqrt(alpha_t) + sigma z
        k, w = np.sqrt(1 - ab) / (ab * s**2 + 1 - ab), ref.beta[t] / np.sqrt(1 - ab)
        c = -k * np.sqrt(ab) * m
        mean, var = (mean * (1 - w * k) - w * c) / np.sqrt(ref.alpha[t]), var * (1 - w * k) ** 2 / ref.alpha[t]
        var += ref.sigma2(t, variance) if t > 1 else 0
    return mean, var


class Algorithm2Sampling(unittest.TestCase):
    def test_algorithm_2_is_the_papers_line_by_line_in_float64(self):
        r, model = Reference(STEEP), lambda x_t, t: torch.sin(x_t) * ddpm.at(torch.linspace(0, 1, 21), t)
        for variance in ("beta", "posterior"):
            got = GaussianDiffusion(STEEP, variance=variance).sample(model, (2, 1, 3, 3), clip=False,
                                                                     generator=torch.Generator().manual_seed(7))
            g = torch.Generator().manual_seed(7)
            x = torch.randn(2, 1, 3, 3, generator=g).double()
            for t in range(20, 0, -1):
                z = torch.randn(2, 1, 3, 3, generator=g).double() if t > 1 else 0
                eps = torch.sin(x) * (t / 20)
                x = (x - (1 - r.alpha[t]) / np.sqrt(1 - r.alpha_bar[t]) * eps) / np.sqrt(r.alpha[t])
                x = x + np.sqrt(r.sigma2(t, variance)) * z
            close(got, x, 1e-4)

    def test_it_calls_the_model_at_T_to_1_and_reports_every_step(self):
        seen, told = [], []

        def model(x_t, t):
            seen.append((tuple(t.shape), t.dtype, int(t[0])))
            return torch.zeros_like(x_t)

        x = GaussianDiffusion(STEEP).sample(model, (3, 1, 2, 2), on_step=lambda t, x_t, x_0: told.append((t, x_t, x_0)))
        self.assertEqual(seen, [((3,), torch.int64, t) for t in range(20, 0, -1)])
        self.assertEqual([t for t, _, _ in told], list(range(20, -1, -1)))
        self.assertIsNone(told[0][2])
        self.assertTrue(torch.equal(told[-1][1], x))

    def test_the_last_step_adds_no_noise(self):
        d, x = GaussianDiffusion(STEEP), noise(2, 1, 3, 3)
        model = lambda x_t, t: 0.1 * x_t
        one, other = d.p_sample(model, x, 1, noise=noise(2, 1, 3, 3, seed=1)), d.p_sample(model, x, 1, noise=1e3 + x)
        self.assertTrue(torch.equal(one[0], other[0]))
        close(one[0], one[1], 1e-6)                                         # and what it returns is the predicted x_0

    def test_samples_of_the_gaussian_oracle_have_the_mean_and_variance_that_theory_propagates(self):
        r = Reference(STEEP)
        for variance in ("beta", "posterior"):
            x = GaussianDiffusion(STEEP, variance=variance).sample(gaussian_eps(r.alpha_bar), (4, 1, 128, 128), clip=False,
                                                                   generator=torch.Generator().manual_seed(1))
            mean, var = propagate(r, variance)
            self.assertAlmostEqual(float(x.mean()), mean, delta=5 * math.sqrt(var / x.numel()))
            self.assertAlmostEqual(float(x.var()) / var, 1, delta=5 * math.sqrt(2 / x.numel()))

    def test_the_papers_chain_of_1000_steps_returns_the_data_distribution(self):
        d = GaussianDiffusion(linear_beta_schedule())
        x = d.sample(gaussian_eps(d.exact_alpha_bar), (1, 1, 200, 200), clip=False, generator=torch.Generator().manual_seed(0))
        self.assertAlmostEqual(float(x.mean()), M, delta=0.01)
        self.assertAlmostEqual(float(x.std()), S, delta=0.01)
        mean, var = propagate(Reference(np.linspace(1e-4, 0.02, 1000)), "beta")
        self.assertAlmostEqual(mean, M, delta=0.01)
        self.assertAlmostEqual(math.sqrt(var), S, delta=0.01)

    def test_with_a_perfect_denoiser_of_a_handful_of_points_samples_are_those_points(self):
        points = noise(5, 1, 3, 3).clamp(-1, 1)
        for variance in ("beta", "posterior"):
            d = GaussianDiffusion(STEEP, variance=variance)
            x = d.sample(points_eps(d.exact_alpha_bar, points), (200, 1, 3, 3), generator=torch.Generator().manual_seed(0))
            distance = (x[:, None] - points).flatten(2).norm(dim=2)
            self.assertLess(float(distance.min(1).values.max()), 1e-3)
            self.assertEqual(len(distance.argmin(1).unique()), 5)           # each of them

    def test_same_generator_same_picture_and_x_T_is_taken_when_given(self):
        d, model = GaussianDiffusion(STEEP), lambda x_t, t: 0.5 * x_t
        draw = lambda **options: d.sample(model, (1, 1, 4, 4), generator=torch.Generator().manual_seed(3), **options)
        self.assertTrue(torch.equal(draw(), draw()))
        told = []
        draw(x_T=torch.full((1, 1, 4, 4), 9.0), on_step=lambda t, x_t, x_0: told.append(x_t))
        self.assertEqual(float(told[0].mean()), 9)

    def test_one_timestep_is_a_chain_too(self):
        d = GaussianDiffusion([0.9999])
        self.assertEqual(d.sample(lambda x_t, t: x_t, (2, 1, 2, 2)).shape, (2, 1, 2, 2))
        terms = d.bits_per_dim(lambda x_t, t: x_t, torch.zeros(2, 1, 2, 2))["terms"]
        self.assertTrue(torch.isfinite(terms).all() and terms.shape == (2, 1))

    def test_figure_8_interpolates_with_one_noise_for_all_weights_and_one_t_for_both_ways(self):
        d, seen = GaussianDiffusion(STEEP), []

        def model(x_t, t):
            seen.append(int(t[0]))
            return 0.2 * x_t

        a, b = noise(1, 3, 3, seed=1), noise(1, 3, 3, seed=2)
        strip = d.interpolate(model, a, b, [0, 0.5, 0.5, 1], 7, generator=torch.Generator().manual_seed(0))
        self.assertEqual(seen, [7, 6, 5, 4, 3, 2, 1])
        self.assertTrue(torch.equal(strip[1], strip[2]))
        # with eps = 0 each step is x / sqrt(alpha_t) + sigma z, so the mean of the ends is the middle, noise and all
        ends = d.interpolate(lambda x_t, t: 0 * x_t, a, b, [0, 0.5, 1], 7, clip=False)
        close((ends[0] + ends[2]) / 2, ends[1], 1e-5)
        points = torch.stack([a, b]).clamp(-1, 1)
        ends = d.interpolate(points_eps(d.exact_alpha_bar, points), *points, [0, 1], 2, generator=torch.Generator().manual_seed(0))
        close(ends, points, 1e-3)


# ------------------------------------------------------------------------- Sections 2, 3.3 and 4.3: the bound in bits per dim


class Section4Likelihood(unittest.TestCase):
    def test_the_decoder_is_eq13s_integral_also_far_in_the_tails(self):
        def exact(x, mean, sigma):                                          # by erfc, which is exact where it is small
            upper = lambda z: 0.5 * math.erfc(z / math.sqrt(2))             # P(Z > z)
            lo, hi = (x - 1 / 255 - mean) / sigma, (x + 1 / 255 - mean) / sigma
            if x < -0.999:
                return math.log(upper(-hi))
            if x > 0.999:
                return math.log(upper(lo))
            return math.log(upper(lo) - upper(hi) if lo > 0 else upper(-hi) - upper(-lo))

        levels = data.to_model(torch.arange(256, dtype=torch.uint8)).double()
        for mean, sigma in ((0.0, 0.3), (0.4, 0.0074), (-0.9, 0.05), (1.2, 0.1), (0.0, 0.06)):
            got = GaussianDiffusion.decoder_log_likelihood(levels, torch.full((256,), mean, dtype=torch.float64),
                                                           torch.full((256,), sigma**2, dtype=torch.float64))
            for x, value in zip(levels.tolist(), got.tolist()):
                if abs(x - mean) / sigma < 35:                              # beyond, erfc underflows; ours goes on
                    self.assertAlmostEqual(value, exact(x, mean, sigma), delta=1e-6 * max(1, abs(value)))
            self.assertTrue(torch.isfinite(got).all())
            self.assertAlmostEqual(float(got.exp().sum()), 1, delta=1e-6)   # the bins share the whole line

    def test_the_decoders_gradient_is_finite_everywhere(self):
        mean = torch.tensor([-1.0, 0.0, 1.0, 50.0], requires_grad=True)
        variance = torch.tensor([-10.0, 5.0, -20.0, -9.0]).exp().requires_grad_()
        GaussianDiffusion.decoder_log_likelihood(torch.tensor([-1.0, 0.0, 1.0, 0.5]), mean, variance).sum().backward()
        self.assertTrue(torch.isfinite(mean.grad).all() and torch.isfinite(variance.grad).all())

    def test_every_term_of_the_bound_is_what_theory_gives_for_gaussian_data(self):
        for variance in ("beta", "posterior"):
            d, r = GaussianDiffusion(STEEP, variance=variance), Reference(STEEP)
            x_0 = M + S * noise(8, 1, 128, 128)
            bits = d.bits_per_dim(gaussian_eps(r.alpha_bar), x_0, clip=False, generator=torch.Generator().manual_seed(0))
            ab = r.alpha_bar[-1]
            L_T = 0.5 * (ab * (S**2 + M**2) - ab - np.log(1 - ab)) / np.log(2)
            self.assertAlmostEqual(float(bits["prior"].mean()), L_T, delta=0.05 * L_T)
            for t in range(2, 21):
                a, _, tilde = r.posterior(t)
                sigma2, ab = r.sigma2(t, variance), r.alpha_bar[t]
                spread = a**2 * S**2 * (1 - ab) / (ab * S**2 + 1 - ab)      # E (mu-tilde - mu_theta)^2
                nats = 0.5 * (tilde / sigma2 - 1 - np.log(tilde / sigma2) + spread / sigma2)
                self.assertAlmostEqual(float(bits["terms"][:, t - 1].mean()), nats / np.log(2), delta=0.03 * nats + 1e-4)
            close(bits["total"], bits["prior"] + bits["terms"].sum(1))
            self.assertEqual((bits["terms"].shape, bits["total"].shape), ((8, 20), (8,)))

    def test_the_bound_approaches_the_entropy_of_known_data_from_above(self):
        s = 0.25
        betas = linear_beta_schedule(250, 4e-4, 0.08)
        d = GaussianDiffusion(betas, variance="beta")
        levels = data.to_pixels(s * noise(8, 1, 32, 32))
        total = d.bits_per_dim(gaussian_eps(d.exact_alpha_bar, 0.0, s), data.to_model(levels), clip=False)["total"].mean()
        entropy = math.log2(s * math.sqrt(2 * math.pi * math.e) * 255 / 2)  # of N(0, s^2) cut into bins of 2/255
        self.assertGreater(float(total), entropy - 0.02)
        self.assertLess(float(total), entropy + 0.25)

    def test_eq12s_weights_are_what_the_bound_gives_to_the_error_of_eps(self):
        d, r = GaussianDiffusion(STEEP, variance="posterior"), Reference(STEEP)
        x_0, eps = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
        for t in (2, 9, 20):
            model = lambda x_t, t: eps + 0.1
            weight = r.beta[t] ** 2 / (2 * r.posterior(t)[2] * r.alpha[t] * (1 - r.alpha_bar[t]))
            got = d.vlb_terms(model, x_0, d.q_sample(x_0, t, eps), t, clip=False) * math.log(2)
            close(got[0], weight * 0.01, 1e-4)

    def test_the_bound_is_the_same_whichever_of_images_tables_and_model_are_in_double_precision(self):
        for x, tables, model in itertools.product((torch.float32, torch.float64), repeat=3):
            d = GaussianDiffusion(STEEP).to(tables)
            x_0 = (noise(2, 1, 4, 4) / 3).to(x)
            bits = d.bits_per_dim(lambda x_t, t, to=model: x_t.to(to) / 2, x_0, generator=torch.Generator().manual_seed(0))["total"]
            again = GaussianDiffusion(STEEP).bits_per_dim(lambda x_t, t: x_t / 2, noise(2, 1, 4, 4) / 3,
                                                          generator=torch.Generator().manual_seed(0))["total"]
            if x == torch.float32:                                   # a generator draws other numbers in another precision
                close(bits, again, 1e-4)
            self.assertTrue(torch.isfinite(bits).all())

    def test_l_T_of_the_papers_schedule_is_about_1e_5_bits(self):
        bits = GaussianDiffusion(linear_beta_schedule()).prior_bits(torch.full((1, 1, 2, 2), 0.7))
        self.assertTrue(5e-6 < float(bits) < 5e-5, bits)


# ------------------------------------------------------------------------------------------- extensions, paper by paper


class ImprovedDDPM(unittest.TestCase):
    def test_the_cosine_schedule_is_iddpm_eq17(self):
        for T in (1000, 50, 1):
            f = lambda t, T=T: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
            close(ddpm.cosine_beta_schedule(T), [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)], 1e-12)
        clipped = ddpm.cosine_beta_schedule(1000, beta_min=1e-4, beta_max=0.02)
        self.assertEqual((float(clipped.min()), float(clipped.max())), (1e-4, 0.02))
        self.assertTrue(torch.isfinite(GaussianDiffusion(ddpm.cosine_beta_schedule(4000)).alpha_bar).all())

    def test_learned_range_interpolates_logarithms_from_beta_tilde_to_beta(self):
        d, x = GaussianDiffusion(STEEP, variance="learned_range"), torch.zeros(1, 1, 1, 1)
        for t in (2, 10, 20):
            low, high = math.log(d.posterior_variance[t]), math.log(d.beta[t])
            for v, expected in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2), (0.5, 0.25 * low + 0.75 * high)):
                variance = d.p_mean_variance(lambda x_t, t, v=v: torch.tensor([[[[0.0]], [[v]]]]), x, t)[1]
                self.assertAlmostEqual(math.log(variance), expected, delta=1e-5)
        d = GaussianDiffusion(STEEP, variance="learned")
        self.assertAlmostEqual(float(d.p_mean_variance(lambda x_t, t: torch.tensor([[[[0.0]], [[-3.0]]]]), x, 5)[1]),
                               math.exp(-3), delta=1e-6)

    def test_the_mean_of_l_vlb_over_t_is_the_bound_without_L_T(self):
        d = GaussianDiffusion(STEEP, variance="learned_range", loss="vlb")
        model, x_0 = as_prediction(d, gaussian_eps(d.exact_alpha_bar), 0.3), (M + S * noise(2, 1, 8, 8)).clamp(-1, 1)
        one = lambda t: torch.full((2,), t)
        eps = [noise(2, 1, 8, 8, seed=t) for t in range(20)]
        mean = torch.stack([d.training_losses(model, x_0, one(t), eps[t - 1]) for t in range(1, 21)]).mean(0)
        terms = [d.vlb_terms(model, x_0, d.q_sample(x_0, t, eps[t - 1]), t, clip=False) for t in range(1, 21)]
        close(mean, torch.stack(terms).sum(0), 1e-5)

    def test_in_l_hybrid_the_mean_learns_from_l_simple_alone_and_the_variance_from_l_vlb_alone(self):
        x_0, eps, t = noise(4, 1, 4, 4).clamp(-1, 1), noise(4, 1, 4, 4, seed=1), torch.tensor([1, 2, 10, 20])
        for variance in ("learned_range", "learned"):
            output = torch.cat([noise(4, 1, 4, 4, seed=2), noise(4, 1, 4, 4, seed=3) - 3], 1).requires_grad_()
            gradient = {}
            for loss in ("mse", "vlb", "hybrid"):
                d = GaussianDiffusion(STEEP, variance=variance, loss=loss)
                gradient[loss], = torch.autograd.grad(d.training_loss(lambda x_t, t, output=output: output, x_0, t, eps), output)
            close(gradient["hybrid"][:, :1], gradient["mse"][:, :1], 1e-6)
            close(gradient["hybrid"][:, 1:], 0.001 * gradient["vlb"][:, 1:], 1e-6)
            self.assertGreater(float(gradient["hybrid"][:, 1:].abs().min()), 0)
        with self.assertRaisesRegex(ValueError, "no gradient"):
            GaussianDiffusion(STEEP, loss="hybrid")

    def test_every_prediction_works_with_every_variance_and_every_sampler_and_gives_the_same_samples(self):
        points = noise(4, 1, 3, 3).clamp(-0.9, 0.9)
        shape = (6, 1, 3, 3)
        for variance in ddpm.CHOICES["variance"]:
            channels = {"learned_range": -0.4, "learned": -4.0}.get(variance)
            expected = None
            for prediction in ddpm.CHOICES["prediction"]:
                with self.subTest(prediction=prediction, variance=variance):
                    d = GaussianDiffusion(STEEP, prediction, variance)
                    model = as_prediction(d, points_eps(d.exact_alpha_bar, points), channels)
                    short, strided = ddpm.respace(d, model, 7)
                    seeded = lambda: torch.Generator().manual_seed(5)
                    x_0 = points[:2]
                    got = [d.sample(model, shape, generator=seeded()),
                           d.sample(model, shape, clip=False, generator=seeded()),
                           short.sample(strided, shape, generator=seeded()),
                           d.ddim_sample(model, shape, 7, generator=seeded()),
                           d.ddim_sample(model, shape, 20, eta=1.0, generator=seeded()),
                           d.ddim_invert(model, x_0, 20),
                           d.bits_per_dim(model, x_0, generator=seeded())["terms"],
                           short.bits_per_dim(strided, x_0, generator=seeded())["terms"]]
                    expected = expected or got
                    for a, b in zip(got, expected, strict=True):
                        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)

    def test_a_respaced_chain_has_the_old_alpha_bar_and_shows_the_network_the_old_t(self):
        d = GaussianDiffusion(linear_beta_schedule())
        seen = []
        for steps in (1, 7, 50, 999, 1000):
            short, model = ddpm.respace(d, lambda x_t, t: seen.append(int(t[0])) or 0 * x_t, steps)
            times = np.linspace(0, 1000, steps + 1).round().astype(int)
            np.testing.assert_allclose(short.alpha_bar.numpy(), d.exact_alpha_bar.numpy()[times], rtol=1e-6)
            seen.clear()
            short.sample(model, (1, 1, 1, 1))
            self.assertEqual(seen, times[:0:-1].tolist())
        for steps in (0, 1001):
            with self.assertRaisesRegex(ValueError, r"1\.\.1000"):
                ddpm.respace(d, None, steps)
        steep = GaussianDiffusion(linear_beta_schedule(49, 0.02, 0.98))          # 1 - alpha_bar_49 is 1 in float64
        short, model = ddpm.respace(steep, lambda x_t, t: 0 * x_t, 1)
        self.assertTrue(torch.isfinite(short.sample(model, (1, 1, 1, 1))).all())

    def test_a_directly_learned_variance_keeps_its_ratio_to_beta_tilde_on_a_strided_chain(self):
        d = GaussianDiffusion(STEEP, variance="learned")
        ratio = lambda x_t, t: torch.cat([0 * x_t, 0 * x_t + ddpm.at(d.log_posterior_variance, t) + 0.3], dim=1)
        short, model = ddpm.respace(d, ratio, 7)
        for k in range(2, 8):
            variance = short.p_mean_variance(model, noise(1, 1, 2, 2), k)[1]
            close(variance / short.posterior_variance[k], torch.full((1, 1, 2, 2), math.exp(0.3)))

    def test_a_respaced_chain_of_the_gaussian_oracle_has_the_mean_and_variance_that_theory_propagates(self):
        betas = np.linspace(1e-4, 0.02, 1000)
        alpha_bar = Reference(betas).alpha_bar
        times = np.linspace(0, 1000, 26).round().astype(int)
        for variance in ("beta", "posterior"):
            d = GaussianDiffusion(betas, variance=variance)
            short, model = ddpm.respace(d, gaussian_eps(alpha_bar), 25)
            x = short.sample(model, (4, 1, 100, 100), clip=False, generator=torch.Generator().manual_seed(2))
            mean, var = propagate(Reference(1 - alpha_bar[times[1:]] / alpha_bar[times[:-1]]), variance)
            self.assertAlmostEqual(float(x.mean()), mean, delta=5 * math.sqrt(var / x.numel()))
            self.assertAlmostEqual(float(x.var()) / var, 1, delta=5 * math.sqrt(2 / x.numel()))

    def test_importance_sampling_draws_by_eq18_once_all_t_are_known_and_stays_unbiased(self):
        sampler, losses = ddpm.ImportanceSampler(4, history=3), torch.tensor([8.0, 4.0, 2.0, 1.0])
        close(sampler.probabilities(), torch.full((4,), 0.25))
        t = torch.arange(1, 5).repeat(2)
        sampler.update(t, losses[t - 1])
        close(sampler.probabilities(), torch.full((4,), 0.25))              # two of three seen
        sampler.update(t, losses[t - 1])                                    # the fourth replaces the first
        close(sampler.probabilities(), 0.999 * losses / 15 + 0.001 / 4, 1e-6)
        drawn, weights = sampler.draw(100_000, torch.Generator().manual_seed(0))
        self.assertEqual((int(drawn.min()), int(drawn.max())), (1, 4))
        self.assertAlmostEqual(float((weights * losses[drawn - 1]).mean()), float(losses.mean()), delta=0.02)
        sampler.update(torch.tensor([1, 2]), torch.tensor([math.nan, math.inf]))                      # a bad step is forgotten
        close(sampler.probabilities(), 0.999 * losses / 15 + 0.001 / 4, 1e-6)
        other = ddpm.ImportanceSampler(4, history=3)
        other.load_state_dict(sampler.state_dict())
        close(other.probabilities(), sampler.probabilities())
        for extreme in (0.0, 3e38):
            other.losses.fill_(extreme)
            close(other.probabilities(), torch.full((4,), 0.25), 1e-6)


class DDIM(unittest.TestCase):
    def test_the_walk_starts_at_T_ends_at_0_and_is_the_rounded_linspace(self):
        d = GaussianDiffusion(linear_beta_schedule())
        for steps in (1, 2, 3, 10, 16, 50, 333, 999, 1000):
            walk = d.walk(steps)
            self.assertEqual(walk, np.round(np.linspace(0, 1000, steps + 1)).astype(int).tolist()[::-1])
            self.assertEqual((walk[0], walk[-1], len(set(walk))), (1000, 0, steps + 1))

    def test_a_step_is_ddim_eq12_with_eq16s_sigma_from_both_ends_of_the_stride(self):
        d, r, model = GaussianDiffusion(STEEP), Reference(STEEP), lambda x_t, t: torch.sin(x_t)
        for eta in (0.0, 0.5, 1.0):
            got = d.ddim_sample(model, (2, 1, 3, 3), 6, eta, clip=False, generator=torch.Generator().manual_seed(1))
            g = torch.Generator().manual_seed(1)
            x, walk = torch.randn(2, 1, 3, 3, generator=g).double(), np.round(np.linspace(0, 20, 7)).astype(int)[::-1]
            for t, s in itertools.pairwise(walk):
                ab_t, ab_s, eps = r.alpha_bar[t], r.alpha_bar[s], torch.sin(x)
                sigma = eta * np.sqrt((1 - ab_s) / (1 - ab_t)) * np.sqrt(1 - ab_t / ab_s)
                x_0 = (x - np.sqrt(1 - ab_t) * eps) / np.sqrt(ab_t)
                x = np.sqrt(ab_s) * x_0 + np.sqrt(1 - ab_s - sigma**2) * eps
                if sigma > 0:
                    x = x + sigma * torch.randn(2, 1, 3, 3, generator=g).double()
            close(got, x, 1e-4)

    def test_with_eta_1_it_is_algorithm_2_with_the_posteriors_variance_on_the_whole_chain_or_a_respaced_one(self):
        d, model = GaussianDiffusion(STEEP, variance="posterior"), lambda x_t, t: torch.tanh(x_t)
        for steps in (20, 6):
            a = d.ddim_sample(model, (2, 1, 4, 4), steps, 1.0, generator=torch.Generator().manual_seed(4))
            short, strided = ddpm.respace(d, model, steps)
            close(a, short.sample(strided, (2, 1, 4, 4), generator=torch.Generator().manual_seed(4)), 1e-4)

    def test_with_eta_0_it_converges_to_the_odes_map_which_is_known_for_gaussian_data(self):
        d, x_T = GaussianDiffusion(linear_beta_schedule()), noise(1, 1, 8, 8).double()
        ab, errors = float(d.exact_alpha_bar[-1]), []
        exact = M + S * (x_T - math.sqrt(ab) * M) / math.sqrt(ab * S**2 + 1 - ab)
        for steps in (50, 100, 200):
            x_0 = d.ddim_sample(gaussian_eps(d.exact_alpha_bar), x_T.shape, steps, x_T=x_T.float(), clip=False)
            errors.append(float((x_0 - exact).abs().max()))
        self.assertLess(errors[2], 0.03)
        self.assertTrue(errors[0] > 1.6 * errors[1] > 2.5 * errors[2], errors)     # first order: half the stride, half the error

    def test_inversion_finds_the_x_T_that_an_image_comes_from(self):
        d = GaussianDiffusion(linear_beta_schedule())
        model, x_0, errors = gaussian_eps(d.exact_alpha_bar), M + S * noise(1, 1, 8, 8), []
        for steps in (100, 400):
            x_T = d.ddim_invert(model, x_0, steps)
            errors.append(float((d.ddim_sample(model, x_0.shape, steps, x_T=x_T, clip=False) - x_0).abs().max()))
        self.assertLess(errors[1], 0.02)
        self.assertLess(errors[1], errors[0] / 2.5)
        ab = float(d.exact_alpha_bar[-1])
        close(x_T, math.sqrt(ab) * M + math.sqrt(ab * S**2 + 1 - ab) * (x_0 - M) / S, 0.03)

    def test_it_reports_as_algorithm_2_does_and_refuses_what_it_cannot_do(self):
        d, told = GaussianDiffusion(STEEP), []
        d.ddim_sample(lambda x_t, t: 0 * x_t, (1, 1, 1, 1), 4, on_step=lambda t, x_t, x_0: told.append((t, x_0 is None)))
        self.assertEqual(told, [(20, True), (15, False), (10, False), (5, False), (0, False)])
        for steps, eta, said in ((0, 0, "steps"), (21, 0, "steps"), (5, 1.5, "eta"), (5, -0.1, "eta"), (5, float("nan"), "eta")):
            with self.assertRaisesRegex(ValueError, said):
                d.ddim_sample(None, (1, 1, 1, 1), steps, eta)

    def test_strides_of_a_steep_chain_do_not_leave_the_real_numbers(self):
        d = GaussianDiffusion(linear_beta_schedule(49, 0.02, 0.98))          # 1 - alpha_bar_s - sigma^2 rounds below 0
        for steps in range(1, 50):
            x_0 = d.ddim_sample(gaussian_eps(d.exact_alpha_bar), (1, 1, 2, 2), steps, eta=1.0)
            self.assertTrue(torch.isfinite(x_0).all(), steps)

    def test_slerp_keeps_to_the_sphere_and_ends_where_it_should(self):
        a, b = noise(1, 8, 8, seed=1), noise(1, 8, 8, seed=2)
        b = b * a.norm() / b.norm()
        arc = sample.slerp(a, b, torch.linspace(0, 1, 5))
        close(arc[0], a)
        close(arc[4], b)
        close(arc.flatten(1).norm(dim=1), a.norm().expand(5), 1e-4)
        for seed in range(20):                             # of two equal noises, the cosine may round to more than 1
            a = noise(1, 8, 8, seed=seed)
            close(sample.slerp(a, a, [0.3])[0], a)


class Guidance(unittest.TestCase):
    def setUp(self):
        self.d = GaussianDiffusion(linear_beta_schedule())
        self.means, self.ab = torch.tensor([-0.5, 0.5]), self.d.exact_alpha_bar

    def network(self, x_t, t, y):
        """Class c is N(means[c], S^2); label 2 is "no label", which stands for N(0, 1) here."""
        per_class = [gaussian_eps(self.ab, -0.5), gaussian_eps(self.ab, 0.5), gaussian_eps(self.ab, 0.0, 1.0)]
        return torch.stack([per_class[int(c)](x[None], s[None])[0] for x, s, c in zip(x_t, t, y, strict=True)])

    def test_scale_0_is_unconditional_1_conditional_and_3_is_three_times_the_way(self):
        x, t, y = noise(3, 1, 2, 2), torch.tensor([5, 500, 1000]), torch.tensor([0, 1, 0])
        conditional, unconditional = self.network(x, t, y), self.network(x, t, torch.full((3,), 2))
        for scale in (0.0, 1.0, 3.0):
            got = ddpm.classifier_free_guidance(self.network, y, scale, 2)(x, t)
            close(got, unconditional + scale * (conditional - unconditional), 1e-5)
        close(ddpm.classifier_free_guidance(self.network, y[:1], 3.0, 2)(x[:1], t[:1]), got[:1], 1e-5)     # a batch of one

    def test_it_is_one_call_on_a_doubled_batch_and_leaves_the_variance_channels_conditional(self):
        calls = []

        def network(x_t, t, y):
            calls.append(len(x_t))
            return torch.cat([x_t * y[:, None, None, None], 10.0 + 0 * x_t + y[:, None, None, None]], dim=1)

        x = noise(2, 1, 2, 2)
        out = ddpm.classifier_free_guidance(network, torch.tensor([1, 2]), 3.0, 5)(x, torch.tensor([1, 1]))
        self.assertEqual(calls, [4])
        close(out[:, 1:].mean((1, 2, 3)), [11, 12])
        close(out[0, :1], x[0] * (5 + 3 * (1 - 5)), 1e-5)

    def test_guidance_between_two_gaussians_samples_a_gaussian_with_the_mean_that_theory_gives(self):
        # N(m, s^2) guided away from N(0, 1): the score is linear, so the ODE from x_T stays affine; propagate it
        scale, walk, mean, factor = 2.0, self.d.walk(100), 0.0, 1.0
        for t, s in itertools.pairwise(walk):
            ab_t, ab_s = (float(self.ab[k]) for k in (t, s))
            k = c = 0.0
            for weight, m, sd in ((scale, 0.5, S), (1 - scale, 0.0, 1.0)):
                slope = math.sqrt(1 - ab_t) / (ab_t * sd**2 + 1 - ab_t)
                k, c = k + weight * slope, c - weight * slope * math.sqrt(ab_t) * m
            keep, move = math.sqrt(ab_s / ab_t), math.sqrt(1 - ab_s) - math.sqrt(ab_s / ab_t * (1 - ab_t))
            mean, factor = keep * mean + move * (k * mean + c), factor * (keep + move * k)
        guided = lambda x_t, t: (scale * gaussian_eps(self.ab, 0.5)(x_t, t) + (1 - scale) * gaussian_eps(self.ab, 0.0, 1.0)(x_t, t))
        x_T = noise(1, 1, 50, 50)
        expected = mean + factor * x_T
        network = lambda x_t, t, y: torch.where((y == 2)[:, None, None, None], gaussian_eps(self.ab, 0.0, 1.0)(x_t, t),
                                                gaussian_eps(self.ab, 0.5)(x_t, t))
        model = ddpm.classifier_free_guidance(network, torch.tensor([1]), scale, 2)
        close(self.d.ddim_sample(model, x_T.shape, 100, x_T=x_T, clip=False), expected, 1e-3)
        close(guided(x_T, torch.tensor([500])), model(x_T, torch.tensor([500])), 1e-5)
        self.assertGreater(mean, 0.6)                                       # pushed beyond the class mean

    def test_classifier_guidance_with_the_exact_classifier_gives_the_exact_conditional_model(self):
        # one pixel, two classes N(-0.5, S^2) and N(0.5, S^2): the mixture's eps plus the classifier's shift is the class's eps
        def log_densities(x_t, t):
            ab = self.ab.float()[t][:, None]
            var = ab * S**2 + 1 - ab
            return -((x_t.flatten(1) - ab.sqrt() * self.means) ** 2) / (2 * var) - 0.5 * var.log()

        def mixture(x_t, t):
            w = torch.softmax(log_densities(x_t, t), 1)[:, :, None, None, None]
            return w[:, 0] * gaussian_eps(self.ab, -0.5)(x_t, t) + w[:, 1] * gaussian_eps(self.ab, 0.5)(x_t, t)

        log_prob = lambda x_t, t: torch.log_softmax(log_densities(x_t, t), 1)[:, 1]
        x, t = noise(5, 1, 1, 1), torch.tensor([1, 50, 300, 700, 1000])
        unguided, conditional = mixture(x, t), gaussian_eps(self.ab, 0.5)(x, t)
        for prediction, scale in itertools.product(ddpm.CHOICES["prediction"], (0.0, 1.0, 3.0)):
            d = GaussianDiffusion(linear_beta_schedule(), prediction)
            model = ddpm.classifier_guidance(d, as_prediction(d, mixture), log_prob, scale)
            with torch.inference_mode():
                eps, _ = d.predict(model, x, t, clip=False)
            torch.testing.assert_close(eps, unguided + scale * (conditional - unguided), rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------------- Appendix B: the network


class AppendixBNetwork(unittest.TestCase):
    def test_with_the_papers_settings_it_has_the_papers_number_of_parameters(self):
        with torch.device("meta"):
            net = unet.UNet(in_channels=3, image_size=32, patch=1, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
                            attention=(16,), dropout=0.1)
        self.assertEqual(sum(p.numel() for p in net.parameters()), 35_746_307)

    def test_any_size_and_channels_go_in_and_come_out(self):
        for options in ({}, {"patch": 1, "channels": 8}, {"patch": 4, "channels": 12, "multipliers": (1, 2, 3)},
                        {"learned_resampling": False}):
            net = unet.UNet(**options).eval()
            for H, W in ((28, 28), (32, 32), (17, 30), (1, 1), (3, 2)):
                self.assertEqual(net(torch.randn(2, 1, H, W), torch.tensor([0, 4000])).shape, (2, 1, H, W))
        self.assertEqual(unet.UNet(3, 6)(torch.randn(1, 3, 9, 9), torch.tensor([1])).shape, (1, 6, 9, 9))
        for dtype in (torch.float64, torch.bfloat16):
            self.assertEqual(unet.UNet().to(dtype)(torch.randn(2, 1, 8, 8, dtype=dtype), torch.tensor([1, 9])).dtype, dtype)

    def test_it_starts_at_zero_and_every_parameter_gets_a_gradient(self):
        for options in ({}, {"convnext": True}, {"scale_shift": True}, {"attention": (14, 7), "heads": 2}, {"num_classes": 3},
                        {"learned_resampling": False}):
            with self.subTest(**options):
                torch.manual_seed(0)
                net, t = unet.UNet(channels=16, **options), torch.tensor([1, 900])
                y = torch.tensor([0, 3]) if options.get("num_classes") else None
                x = torch.randn(2, 1, 28, 28)
                self.assertEqual(float(net(x, t, y).abs().max()), 0)
                for p in net.parameters():                                  # off the zero start, where gradients would stop
                    torch.nn.init.normal_(p, std=0.1)
                net(x, t, y).square().mean().backward()
                self.assertEqual([n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0], [])

    def test_the_output_depends_on_t_and_on_the_label(self):
        torch.manual_seed(0)
        net = unet.UNet(channels=16, num_classes=3)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x = torch.randn(1, 1, 28, 28)
        out = lambda t, y: net(x, torch.tensor([t]), None if y is None else torch.tensor([y]))
        self.assertGreater(float((out(1, 0) - out(2, 0)).abs().max()), 1e-4)
        self.assertGreater(float((out(1, 0) - out(1, 1)).abs().max()), 1e-4)
        self.assertTrue(torch.equal(out(1, 3), out(1, None)))
        fresh = unet.UNet(num_classes=3).embedding.labels.weight
        self.assertEqual(float(fresh[-1].abs().max()), 0)
        with self.assertRaisesRegex(ValueError, "without classes"):
            unet.UNet()(x, torch.tensor([1]), torch.tensor([0]))

    def test_attention_stands_at_the_sizes_asked_for(self):
        count = lambda **o: sum(isinstance(m, unet.Attention) for m in unet.UNet(blocks=2, **o).modules())
        middle = count()
        self.assertEqual(count(attention=(14,)) - middle, 2 + 2)
        self.assertEqual(count(attention=(7, 14)) - middle, 2 * (2 + 2))
        self.assertEqual(count(patch=1, attention=(14,)) - middle, 2 + 3)    # the paper's: one block more on the way up
        self.assertEqual(count(patch=1, attention=(7,)) - middle, 0)         # its feature maps are 28 and 14

    def test_checkpointing_changes_memory_and_nothing_else(self):
        x, t, gradients = torch.randn(2, 1, 28, 28), torch.tensor([3, 30]), []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            net = unet.UNet(channels=16, checkpointing=checkpointing)
            for p in net.parameters():                                      # off the zero start, where gradients would stop
                torch.nn.init.normal_(p, std=0.1)
            (net(x, t) - x).square().mean().backward()
            gradients.append([p.grad for p in net.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)

    def test_the_embedding_of_t_is_sines_and_cosines_and_tells_all_t_apart(self):
        emb = unet.timestep_embedding(torch.arange(0, 1001), 32)
        frequencies = 10000 ** (-np.arange(16) / 15)
        angles = np.arange(1001)[:, None] * frequencies
        np.testing.assert_allclose(emb.numpy(), np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-4)
        self.assertGreater(float(torch.cdist(emb, emb).fill_diagonal_(9).min()), 1e-3)
        self.assertEqual(unet.timestep_embedding(torch.tensor([1]), 7).shape, (1, 7))

    def test_one_batch_can_be_overfitted(self):
        torch.manual_seed(0)
        d, net = GaussianDiffusion(linear_beta_schedule()), unet.UNet(channels=16)
        x_0, t, eps = torch.rand(8, 1, 14, 14) * 2 - 1, torch.randint(1, 1001, (8,)), torch.randn(8, 1, 14, 14)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            loss = d.training_loss(net, x_0, t, eps)
            loss.backward()
            optimizer.step()
        self.assertLess(float(loss), 0.2)

    def test_the_classifier_is_the_left_half_with_a_head_and_every_part_learns(self):
        net = unet.NoisyClassifier(unet.UNet(channels=16), 10)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        out = net(torch.randn(2, 1, 28, 28), torch.tensor([0, 1000]))
        self.assertEqual(out.shape, (2, 10))
        out.square().mean().backward()
        self.assertEqual([n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0], [])


# ---------------------------------------------------------------------------------------------------------- data and files


def idx(array, code=8):
    """The bytes of an IDX file."""
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(data.IDX_TYPES[code]).tobytes()


def decode_png(content):
    """PNG and APNG files, read by the rules of the format: the frames, each (H, W, C), after every checksum was compared."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at:at + 8])
        body, crc = content[at + 8:at + 8 + size], struct.unpack(">I", content[at + 8 + size:at + 12 + size])[0]
        assert crc == zlib.crc32(kind + body), kind
        chunks.append((kind, body))
        at += 12 + size
    W, H, depth, colour, *rest = struct.unpack(">IIBBBBB", dict(chunks)[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0]) and chunks[0][0] == b"IHDR" and chunks[-1] == (b"IEND", b"")
    C = {0: 1, 2: 3}[colour]
    sequence = [struct.unpack(">I", body[:4])[0] for kind, body in chunks if kind in (b"fcTL", b"fdAT")]
    assert sequence == list(range(len(sequence)))
    frames = []
    for kind, body in chunks:
        if kind in (b"IDAT", b"fdAT"):
            rows = np.frombuffer(zlib.decompress(body if kind == b"IDAT" else body[4:]), np.uint8).reshape(H, 1 + W * C)
            assert not rows[:, 0].any()
            frames.append(rows[:, 1:].reshape(H, W, C))
    if len(frames) > 1:
        assert struct.unpack(">II", dict(chunks)[b"acTL"]) == (len(frames), 0)
    return frames


class InTemporaryFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def work_in(self, folder):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)

    def path(self, name, content=None):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        return path


class Pixels(InTemporaryFolder):
    def test_all_256_levels_survive_the_way_to_the_model_and_back(self):
        levels = torch.arange(256, dtype=torch.uint8)
        self.assertTrue(torch.equal(data.to_pixels(data.to_model(levels)), levels))
        close(data.to_model(levels), 2 * levels.double() / 255 - 1, 1e-6)
        self.assertEqual(data.to_pixels(torch.tensor([-9.0, 9.0])).tolist(), [0, 255])
        truncated = ((data.to_model(levels) + 1) * 127.5).to(torch.uint8)
        self.assertEqual(int((truncated != levels).sum()), 63)              # why to_pixels rounds

    def test_a_grid_is_row_by_row_in_every_format(self):
        images = torch.randint(0, 256, (5, 1, 3, 4), dtype=torch.uint8)
        expected = np.zeros((6, 12), np.uint8)
        for k in range(5):
            expected[k // 3 * 3:k // 3 * 3 + 3, k % 3 * 4:k % 3 * 4 + 4] = images[k, 0]
        for name, columns in (("a.pgm", None), ("a.pgm", 3)):
            data.save_image(self.path(name), images, columns)
            self.assertEqual(self.path(name).read_bytes(), b"P5\n12 6\n255\n" + expected.tobytes())
        data.save_image(self.path("a.png"), images)
        self.assertTrue((decode_png(self.path("a.png").read_bytes())[0][:, :, 0] == expected).all())
        colour = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
        data.save_image(self.path("a.ppm"), data.to_model(colour))
        pixels = colour[0].permute(1, 2, 0).numpy()
        self.assertEqual(self.path("a.ppm").read_bytes(), b"P6\n2 2\n255\n" + pixels.tobytes())
        data.save_image(self.path("b.PNG"), colour)
        self.assertTrue((decode_png(self.path("b.PNG").read_bytes())[0] == pixels).all())
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["a.pgm", "a.png", "a.ppm", "b.PNG"])

    def test_pictures_that_cannot_be_are_refused_and_nothing_is_left(self):
        grey, colour = torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)
        for name, images in (("a.jpg", grey), ("a.pgm", colour), ("a.png", torch.zeros(1, 2, 2, 2)), ("a.png", grey[:0])):
            with self.assertRaises(ValueError):
                data.save_image(self.path(name), images)
        with self.assertRaises(OSError):
            data.save_image(self.path("none") / "deep" / "a.png", grey)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_movie_is_an_animated_png_with_every_frame(self):
        frames = [torch.full((4, 1, 2, 2), 50 * k, dtype=torch.uint8) for k in range(4)]
        data.save_movie(self.path("m.png"), frames)
        decoded = decode_png(self.path("m.png").read_bytes())
        self.assertEqual([int(f.max()) for f in decoded], [0, 50, 100, 150])
        self.assertEqual(decoded[0].shape, (4, 4, 1))

    def test_an_older_file_keeps_its_content_under_a_free_name_also_if_another_process_takes_that_first(self):
        real, path = os.link, self.path("a.pt", b"old")

        def late(source, name):
            if str(name).endswith(".1.pt"):
                self.path("a.1.pt", b"another process's")
            real(source, name)

        with mock.patch("os.link", late), mock.patch("sys.stdout", io.StringIO()) as said:
            data.keep_older(str(path))
        self.assertIn("a.2.pt", said.getvalue())
        self.assertEqual({p.name: p.read_bytes() for p in self.folder.iterdir()},
                         {"a.pt": b"old", "a.1.pt": b"another process's", "a.2.pt": b"old"})

    def test_a_full_disk_leaves_the_older_file_and_no_half_of_a_new_one(self):
        path = self.path("a.png", b"old")

        class Full(io.FileIO):
            def write(self, content):
                super().write(content[:9])
                raise OSError(28, "No space left on device")

        with mock.patch("builtins.open", Full), self.assertRaisesRegex(OSError, "No space left on device.*a.png"):
            data.save_image(path, torch.zeros(1, 1, 2, 2))
        self.assertEqual([p.read_bytes() for p in self.folder.iterdir()], [b"old"])


class ReadingFiles(InTemporaryFolder):
    def test_idx_files_of_every_type_plain_or_gzipped_are_read(self):
        for code, dtype in data.IDX_TYPES.items():
            array = np.arange(24).reshape(2, 3, 4).astype(dtype)
            for content in (idx(array, code), gzip.compress(idx(array, code))):
                got = data.read_idx(self.path("x", content))
                np.testing.assert_array_equal(got, array)
                self.assertTrue(got.dtype.isnative and got.flags.writeable)

    def test_a_damaged_idx_file_is_refused_with_its_name(self):
        good = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
        bad = {"empty": b"", "magic": b"\1" + good[1:], "type": good[:2] + b"\7" + good[3:], "cut header": good[:10],
               "cut short": good[:-1], "goes on": good + b"x", "no dimensions": bytes([0, 0, 8, 0]),
               "too many dimensions": bytes([0, 0, 8, 255]) + struct.pack(">I", 1) * 255 + b"x",
               "too large though empty": bytes([0, 0, 8, 4]) + struct.pack(">4I", 0, *[2**32 - 1] * 3),
               "announces": good[:4] + b"\xff" * 12 + good[16:], "more than": good[:4] + struct.pack(">3I", 2, 3, 10**6) + good[16:],
               "cut gzip": gzip.compress(good)[:-9], "gzip checksum": gzip.compress(good)[:-8] + b"12345678",
               "directory": None}
        for name, content in bad.items():
            with self.subTest(name), self.assertRaisesRegex((ValueError, OSError), "some-file"):
                if content is None:
                    self.path("some-file").unlink()
                    self.path("some-file").mkdir()
                    data.read_idx(self.folder / "some-file")
                else:
                    data.read_idx(self.path("some-file", content))

    def test_a_gzip_bomb_is_left_at_what_its_header_can_justify(self):
        bomb = gzip.compress(idx(np.zeros((2, 2), np.uint8)) + bytes(2**28))
        path, read = self.path("bomb", bomb), []
        counted = lambda self, n, real=gzip.GzipFile.read: read.append(n) or real(self, n)
        with mock.patch.object(gzip.GzipFile, "read", counted), self.assertRaisesRegex(ValueError, "goes on"):
            data.read_idx(path)
        self.assertLess(sum(read), 100)

    def mutations(self, name, content, load, rounds):
        """Random damage ends in the loaded data or in a ValueError that names the file, never in anything else."""
        rng, outcomes = random.Random(name), {"loaded": 0, "refused": 0}
        for _ in range(rounds * (20 if LONG else 1)):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(min(len(damaged), rng.choice((16, 128, 10**9))))
                kind = rng.randrange(5)
                if kind == 0:
                    damaged[at] = rng.randrange(256)
                elif kind == 1:
                    damaged[at] ^= 1 << rng.randrange(8)
                elif kind == 2:
                    del damaged[at:at + rng.randrange(1, 20)]
                elif kind == 3:
                    damaged[at:at] = rng.randbytes(rng.randrange(1, 20))
                else:
                    del damaged[at:]
                damaged = damaged or bytearray(b"\0")
            path = self.path(name, bytes(damaged))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")                         # numpy's, about what it is made to read
                    load(path)
                outcomes["loaded"] += 1
            except ValueError as error:
                self.assertIn(name, str(error))
                outcomes["refused"] += 1
        self.assertGreater(outcomes["refused"], rounds // 4)
        if LONG:
            print(f"mutations of {name}: {outcomes}, seed {name!r}")

    def test_whatever_is_done_to_a_data_file_it_is_read_or_refused_by_name(self):
        array = np.random.default_rng(0).integers(0, 256, (3, 5, 5), np.uint8)
        self.mutations("plain-idx", idx(array), data.read_idx, 300)
        self.mutations("gzip-idx", gzip.compress(idx(array)), data.read_idx, 300)
        npy = io.BytesIO()
        np.save(npy, array)
        self.mutations("array.npy", npy.getvalue(), lambda path: data.load_dataset(str(path)), 300)
        self.mutations("cifar.tar.gz", gzip.compress(self.cifar()), data.read_cifar10, 150)
        self.mutations("cifar.tar", self.cifar(), data.read_cifar10, 150)

    def cifar(self, n=2, extra=()):
        """A small archive of CIFAR-10's layout."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for k, name in enumerate([f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]):
                records = b"".join(bytes([(k + i) % 10]) + bytes([k] * 1024 + [i] * 1024 + [7] * 1024) for i in range(n))
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(records)
                archive.addfile(member, io.BytesIO(records))
            for member in extra:
                archive.addfile(member)
        return content.getvalue()

    def test_cifar10s_binary_archive_is_read_in_memory_with_nothing_extracted(self):
        link = tarfile.TarInfo("cifar-10-batches-bin/../../evil")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        path = self.path("c.tar.gz", gzip.compress(self.cifar(extra=[link])))
        images, labels = data.read_cifar10(path, "train")
        self.assertEqual((images.shape, images.dtype), ((10, 3, 32, 32), np.uint8))
        self.assertEqual(labels.tolist(), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
        self.assertEqual([int(images[3, c].max()) for c in range(3)], [1, 1, 7])
        self.assertEqual(data.read_cifar10(path, "test")[1].tolist(), [5, 6])
        self.assertEqual([p.name for p in self.folder.iterdir()], ["c.tar.gz"])
        with self.assertRaisesRegex(ValueError, "MD5"):
            data.read_cifar10(path, "test", "0" * 32)
        tar = bytearray(self.cifar())
        tar[512] = 10                                                       # the first label
        with self.assertRaisesRegex(ValueError, "label of 10"):
            data.read_cifar10(self.path("c.tar", bytes(tar)))
        swapped = self.cifar().replace(b"test_batch.bin", b"tist_batch.bin")
        with self.assertRaisesRegex(ValueError, "no CIFAR-10|damaged"):
            data.read_cifar10(self.path("c.tar", swapped), "test")

    def save(self, name, array):
        np.save(self.path(name), array, allow_pickle=True)
        return str(self.path(name))

    def test_npy_files_come_in_every_layout_with_labels_and_test_split_beside_them(self):
        for shape, expected in (((4, 5, 6), (4, 1, 5, 6)), ((4, 5, 6, 1), (4, 1, 5, 6)), ((4, 5, 6, 3), (4, 3, 5, 6)),
                                ((4, 3, 5, 6), (4, 3, 5, 6)), ((4, 1, 5, 6), (4, 1, 5, 6))):
            array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            images, labels = data.load_dataset(self.save("x.npy", array))
            self.assertEqual((tuple(images.shape), images.dtype, labels.tolist()), (expected, torch.uint8, [0] * 4))
            self.assertEqual(int(images[1, 0, 2, 3]), int(array.reshape(4, 5, 6)[1, 2, 3] if array.size == 120 else
                             array[1, 2, 3, 0] if shape[3] == 3 else array[1, 0, 2, 3]))
        self.save("x.labels.npy", np.array([3, 1, 0, 2], np.uint8))
        self.save("x.test.npy", np.zeros((2, 1, 5, 6), np.uint8))
        self.assertEqual(data.load_dataset(str(self.path("x.npy")))[1].tolist(), [3, 1, 0, 2])
        with self.assertRaisesRegex(ValueError, "no .*x.test.labels.npy"):
            data.load_dataset(str(self.path("x.npy")), "test")
        self.save("x.test.labels.npy", np.array([2, 3], np.int64))
        self.assertEqual(data.load_dataset(str(self.path("x.npy")), "test")[1].tolist(), [2, 3])

    def test_progress_is_cut_to_a_terminals_width_but_a_line_that_stays_is_whole(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        with mock.patch.object(sys, "stdout", Terminal()) as out, mock.patch.object(data, "_last_said", 0.0), \
                mock.patch.dict(os.environ, {"COLUMNS": "40"}):
            data.say("a" * 100)
            data.say("b" * 100, done=True)
        self.assertEqual(out.getvalue(), "a" * 39 + "\r" + "b" * 100 + "\n")

    def test_npy_files_that_are_something_else_are_refused_and_never_unpickled(self):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(path_of_bomb),)

        path_of_bomb = self.folder / "exploded"
        good = np.zeros((2, 3, 3), np.uint8)
        for name, array in (("float", good.astype(np.float32)), ("flat", good[0, 0]), ("five channels", np.zeros((2, 5, 3, 5), np.uint8)),
                            ("none", good[:0]), ("pickle", np.array([Bomb()], object))):
            with self.subTest(name), self.assertRaisesRegex(ValueError, "x.npy"):
                data.load_dataset(self.save("x.npy", array))
        self.assertFalse(path_of_bomb.exists())
        path = self.save("x.npy", good)
        for labels in (np.zeros(3, np.int64), np.zeros(2), np.array([-1, 0]), np.array([0, 10**9])):
            self.save("x.labels.npy", labels)
            with self.assertRaisesRegex(ValueError, "x.labels.npy"):
                data.load_dataset(path)

    def test_unknown_names_and_splits_are_refused_with_the_known_ones(self):
        with self.assertRaisesRegex(ValueError, "fashion-mnist, mnist, cifar10"):
            data.load_dataset("imagenet")
        with self.assertRaisesRegex(ValueError, "train or test"):
            data.load_dataset("mnist", "validation")

    @unittest.skipUnless(FASHION.is_dir(), "needs the package dataset-fashion-mnist")
    def test_the_real_fashion_mnist_is_read_in_seconds_and_is_what_it_should_be(self):
        began = time.monotonic()
        images, labels = data.load_dataset("fashion-mnist", root=self.folder)
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual((images.shape, images.dtype, labels.dtype), ((60000, 1, 28, 28), torch.uint8, torch.int64))
        self.assertEqual(torch.bincount(labels).tolist(), [6000] * 10)
        self.assertEqual(data.DATASETS["fashion-mnist"].classes[int(labels[0])], "Ankle boot")


class Server(http.server.BaseHTTPRequestHandler):
    """A mirror of any behaviour: behaviours maps a path's first part to what happens to files[last part]."""

    def do_GET(self):
        behaviour, name = self.path.strip("/").split("/")
        content = self.server.files.get(name, b"")
        self.server.requests.append(behaviour)
        if behaviour in ("404", "500"):
            return self.send_error(int(behaviour))
        if behaviour == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/good/{name}")
            return self.end_headers()
        self.send_response(200)
        if behaviour != "endless":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if behaviour == "cut":
                self.wfile.write(content[:len(content) // 2])
            elif behaviour == "stall":
                self.wfile.write(content[:10])
                self.server.released.wait(20)
            elif behaviour == "slow":
                for k in range(0, len(content), 64):
                    self.wfile.write(content[k:k + 64])
                    time.sleep(0.005)
            elif behaviour == "endless":
                while not self.server.released.is_set():
                    self.wfile.write(bytes(2**16))
            elif behaviour == "wrong":
                self.wfile.write(content[:-9] + b"x" * 9)
            else:
                self.wfile.write(content)

    def log_message(self, *args):
        pass


class Downloading(InTemporaryFolder):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        self.server.released, self.server.requests = threading.Event(), []
        array = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
        contents = {"images": idx(array), "labels": idx(np.arange(9, dtype=np.uint8))}
        self.server.files = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
        self.files = {"train": tuple((name, hashlib.sha256(content).hexdigest()) for name, content in contents.items())}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.addCleanup(self.server.released.set)
        for patch in (mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}), mock.patch.object(data, "TIMEOUT", 0.5), mock.patch("sys.stdout", io.StringIO()),
                      mock.patch("sys.stderr", io.StringIO())):
            patch.start()
            self.addCleanup(patch.stop)

    def mirrors(self, *behaviours):
        return tuple(f"http://127.0.0.1:{self.server.server_address[1]}/{behaviour}/" for behaviour in behaviours)

    def load(self, *behaviours, folders=(), package=""):
        tiny = data.Dataset(tuple("012345678"), self.mirrors(*behaviours), self.files, folders, package)
        with mock.patch.dict(data.DATASETS, {"tiny": tiny}):
            return data.load_dataset("tiny", root=self.folder)

    def left(self):
        return sorted(p.name for p in self.folder.rglob("*") if p.is_file())

    def test_a_good_mirror_serves_the_files_once_and_they_are_found_the_next_time(self):
        images, labels = self.load("good")
        self.assertEqual((images.shape, labels.tolist()), ((9, 1, 8, 8), list(range(9))))
        self.load("404")
        self.assertEqual(self.server.requests, ["good", "good"])
        self.assertEqual(self.left(), ["images.gz", "labels.gz"])

    def test_bad_mirrors_are_passed_over_slow_and_redirecting_ones_serve_and_nothing_is_left(self):
        for bad in ("404", "500", "cut", "wrong", "stall", "slow", "redirect"):
            with self.subTest(bad):
                for path in self.folder.rglob("*.gz"):
                    path.unlink()
                self.assertEqual(len(self.load(bad, "good")[0]), 9)
                self.assertEqual(self.left(), ["images.gz", "labels.gz"])

    def test_a_body_without_an_end_is_cut_off_at_the_limit(self):
        with self.assertRaisesRegex(ValueError, "not the file"):
            data.fetch(self.mirrors("endless")[0] + "images.gz", self.folder / "images.gz", data.read_idx, limit=10**6)
        self.assertEqual(self.left(), [])

    def test_when_nothing_works_the_error_names_every_place_and_the_ways_out(self):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        tiny = data.Dataset((), (*self.mirrors("404", "cut"), dead), self.files, ("/nowhere/tiny",), "dataset-tiny")
        with mock.patch.dict(data.DATASETS, {"tiny": tiny}), self.assertRaises(ValueError) as caught:
            data.load_dataset("tiny", root=self.folder)
        for said in ("404", "cut off", dead, "/nowhere/tiny", "dataset-tiny", "--data-dir", str(self.folder)):
            self.assertIn(said, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(self.left(), [])

    def test_a_damaged_file_in_the_data_folder_is_reported_and_fetched_again(self):
        self.path("tiny/images.gz", b"half a file")
        self.load("good")
        self.assertRegex(sys.stderr.getvalue(), "not used: .*images.gz")
        self.assertEqual(data.read_idx(self.folder / "tiny" / "images.gz").shape, (9, 8, 8))

    def test_another_data_sets_file_of_the_same_name_is_not_mistaken_for_it(self):
        self.path("tiny/images.gz", gzip.compress(idx(np.zeros((9, 8, 8), np.uint8))))
        self.assertGreater(int(self.load("good")[0].max()), 0)
        self.assertRegex(sys.stderr.getvalue(), r"images.gz has the wrong checksum \(SHA-256\)")

    def test_a_system_packages_folder_and_unpacked_files_are_used_before_the_web(self):
        self.path("package/images.gz", self.server.files["images.gz"])
        self.path("tiny/labels", gzip.decompress(self.server.files["labels.gz"]))
        self.assertEqual(len(self.load("good", folders=(str(self.folder / "package"),))[0]), 9)
        self.assertEqual(self.server.requests, [])

    def test_two_processes_that_download_at_once_do_no_harm(self):
        code = (f"import data; data.DATASETS['tiny'] = data.Dataset((), {self.mirrors('slow')!r}, {self.files!r}); "
                f"assert len(data.load_dataset('tiny', root={str(self.folder)!r})[0]) == 9")
        both = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.DEVNULL) for _ in range(2)]
        self.assertEqual([process.wait(60) for process in both], [0, 0])
        self.assertEqual(self.left(), ["images.gz", "labels.gz"])

    def test_ctrl_c_in_the_middle_of_a_download_leaves_nothing(self):
        code = (f"import data; data.DATASETS['tiny'] = data.Dataset((), {self.mirrors('stall')!r}, {self.files!r}); "
                f"data.load_dataset('tiny', root={str(self.folder)!r})")
        process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not self.server.requests and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        self.assertNotEqual(process.wait(20), 0)
        self.assertEqual(self.left(), [])

    def test_what_a_killed_download_left_is_cleared_away_later(self):
        old, new = self.path("tiny/.images.gz.1.part", b"x"), self.path("tiny/.images.gz.2.part", b"x")
        os.utime(old, (0, 0))
        self.load("good")
        self.assertEqual((old.exists(), new.exists()), (False, True))


# -------------------------------------------------------------------------------------------------------------- the commands


SMALL = ("--channels", "8", "--batch-size", "8", "--timesteps", "20", "--device", "cpu")      # torchrun could not share one GPU


def torchrun(processes, *command, **options):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--",
                           *map(str, command)], capture_output=True, text=True, timeout=120, check=False, **options)


class Commands(InTemporaryFolder):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        classes = rng.integers(0, 3, 60)
        images = (80 * classes[:, None, None] + rng.integers(0, 40, (60, 8, 8))).astype(np.uint8)
        self.npy, self.pt = str(self.folder / "data.npy"), str(self.folder / "ddpm.pt")
        np.save(self.npy, images)
        np.save(self.folder / "data.labels.npy", classes)

    def run_main(self, script, *argv):
        """A script's main in this process -> (exit code, standard output, standard error)."""
        out, err = io.StringIO(), io.StringIO()
        argv = [str(a) for a in argv]
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(
                sys, "argv", [f"{script.__name__}.py", *argv]), warnings.catch_warnings():
            try:
                train.guarded(lambda: script.main(argv))
            except SystemExit as stop:
                code = stop.code
                if isinstance(code, str):
                    err.write(code + "\n")
                    code = 1
        return code, out.getvalue(), err.getvalue()

    def train(self, *argv, out=None):
        return self.run_main(train, "--dataset", self.npy, *SMALL, "--out", out or self.pt, *argv)

    def trained(self, *argv, out=None):
        code, said, err = self.train("--steps", "6", *argv, out=out)
        self.assertEqual((code, err), (0, ""))
        return said

    def sampled(self, *argv):
        code, said, err = self.run_main(sample, "--checkpoint", self.pt, "--data-dir", self.folder, "--device", "cpu", *argv)
        self.assertEqual((code, err), (0, ""))
        return said

    def refused(self, script, said, *argv, code=None):
        """One line on standard error, with `said` in it, and an exit code that is not 0."""
        got, _, err = self.run_main(script, *argv)
        self.assertEqual(err.count("\n"), 1, err)
        self.assertRegex(err, said)
        self.assertTrue(got == code if code is not None else got not in (0, None), got)

    def weights(self, path=None):
        return torch.load(path or self.pt, weights_only=True)

    def assert_same_state(self, a, b):
        for part in ("ema", "model"):
            for name in a[part]:
                self.assertTrue(torch.equal(a[part][name], b[part][name]), name)
        for k, moments in a["optimizer"].items():
            for name, value in moments.items():
                self.assertTrue(torch.equal(value, b["optimizer"][k][name]), name)
        self.assertTrue(torch.equal(a["rng"]["cpu"], b["rng"]["cpu"]))

    # -- train, then sample

    def test_two_commands_make_a_picture(self):
        said = self.trained()
        self.assertRegex(said, r"60 images 1x8x8, [\d,]+ parameters")
        self.assertRegex(said, r"step 6/6  loss \d+\.\d+  \d+ images/s  0:00:00 left\n")
        self.assertRegex(said, r"48 images, in .*Next: python sample.py")
        out = self.folder / "s.pgm"
        self.assertRegex(self.sampled("--n", "5", "--out", out), r"(?s)network evaluations/s.*wrote .*s\.pgm; --out samples\.png")
        self.assertTrue(out.read_bytes().startswith(b"P5\n24 16\n255\n"))

    def test_same_seed_same_picture_another_seed_another_and_every_batch_its_own_noise(self):
        self.trained()
        pixels = []
        for k, options in enumerate((("--seed", "1"), ("--seed", "1"), ("--seed", str(2**40)))):
            self.sampled("--n", "4", "--batch-size", "2", "--out", self.folder / f"{k}.npy", *options)
            pixels.append(np.load(self.folder / f"{k}.npy"))
        self.assertEqual((pixels[0].dtype, pixels[0].shape), (np.uint8, (4, 1, 8, 8)))
        self.assertTrue((pixels[0] == pixels[1]).all())
        self.assertFalse((pixels[0] == pixels[2]).all())
        self.assertFalse((pixels[0][:2] == pixels[0][2:]).all())

    def test_every_sampler_draws_grids_strips_and_movies_of_the_right_size(self):
        self.trained("--variance", "learned_range", "--loss", "hybrid", "--prediction", "v")
        for options in (("--steps", "1"), ("--steps", "7"), ("--sampler", "ddim"), ("--sampler", "ddim", "--eta", "1", "--steps", "3")):
            self.sampled("--n", "3", "--out", self.folder / "s.png", "--trajectory", self.folder / "t.png",
                         "--movie", self.folder / "m.png", "--nearest", self.folder / "n.png", *options)
            self.assertEqual(decode_png((self.folder / "n.png").read_bytes())[0].shape, (3 * 8, 6 * 8, 1))
            self.assertEqual(decode_png((self.folder / "s.png").read_bytes())[0].shape, (16, 16, 1))
            strip = decode_png((self.folder / "t.png").read_bytes())[0]
            steps = {"1": 1, "7": 7}.get(options[1], 20 if len(options) == 2 else 3)
            self.assertEqual(strip.shape[:2], (3 * 2 * 8, 8 * min(11, steps + 1)))
            self.assertEqual(len(decode_png((self.folder / "m.png").read_bytes())), steps + 1)

    def test_pictures_of_other_things_have_their_rows_and_columns_and_come_without_samples(self):
        self.trained()
        self.work_in(self.folder)
        names = {"--forward": (8 * 8, 6 * 8), "--reconstruct": (10 * 8, 3 * 8), "--interpolate": (4 * 8, 11 * 8)}
        self.sampled(*itertools.chain(*((flag, self.folder / f"{flag[2:]}.png") for flag in names)), "--steps", "5")
        pictures = {flag: decode_png((self.folder / f"{flag[2:]}.png").read_bytes())[0] for flag in names}
        self.assertEqual({flag: picture.shape[:2] for flag, picture in pictures.items()}, names)
        self.sampled("--reconstruct", self.folder / "free.png", "--steps", "5", "--no-clip")
        self.assertFalse(np.array_equal(decode_png((self.folder / "free.png").read_bytes())[0], pictures["--reconstruct"]))
        self.assertFalse(Path("samples.pgm").exists())

    def test_labels_guidance_classifiers_and_scores_work_together_or_say_why_not(self):
        self.trained("--conditional")
        classifier, out = str(self.folder / "c.pt"), self.folder / "s.npy"
        self.assertIn("sample.py --score", self.trained("--classifier", out=classifier))
        self.refused(sample, "two pictures", "--checkpoint", self.pt, "--out", "a.png", "--movie", "../" + Path.cwd().name + "/a.png",
                     code=2)
        self.refused(sample, "it is the data set", "--checkpoint", self.pt, "--out", self.npy, code=2)
        self.sampled("--n", "7", "--out", out)
        self.assertEqual(np.load(self.folder / "s.labels.npy").tolist(), [0, 1, 2, 0, 1, 2, 0])
        self.sampled("--n", "6", "--out", self.folder / "s.png", "--guidance", "3")
        self.assertEqual(decode_png((self.folder / "s.png").read_bytes())[0].shape, (16, 24, 1))      # a column per class
        said = self.sampled("--n", "4", "--label", "2", "--guidance", "0", "--out", out, "--score", classifier)
        self.assertRegex(said, r"Frechet distance \d+\.\d+ .*classes drawn: \[\d+, \d+, \d+\]; accuracy .*%")
        self.sampled("--n", "2", "--label", "1", "--classifier", classifier, "--guidance", "2", "--out", out, "--steps", "5")
        plain = str(self.folder / "plain.pt")
        self.trained(out=plain)
        self.sampled("--checkpoint", plain, "--n", "2", "--out", out, "--steps", "2")
        self.assertFalse((self.folder / "s.labels.npy").exists())                   # they would be other images' labels
        self.refused(sample, "no label '7': use an index 0..2 or one of 0, 1, 2", "--checkpoint", self.pt, "--label", "7")
        self.refused(sample, "holds a classifier", "--checkpoint", classifier)
        other = str(self.folder / "linear.pt")
        self.trained("--classifier", "--schedule", "linear", "--beta-end", "0.6", out=other)
        self.refused(sample, "another schedule", "--checkpoint", self.pt, "--classifier", other)
        self.sampled("--n", "4", "--out", out, "--score", other)                 # clean images have no schedule
        self.trained(out=self.pt)
        for flags in (("--label", "1"), ("--guidance", "2")):
            self.refused(sample, "trained without", "--checkpoint", self.pt, *flags)

    def test_class_names_are_found_in_any_case(self):
        classes = data.DATASETS["fashion-mnist"].classes
        self.assertEqual([data.find_label(t, classes) for t in ("Ankle boot", "ANKLE BOOT", "9", "t-shirt/top")], [9, 9, 9, 0])
        with self.assertRaisesRegex(ValueError, "Sandal, Shirt"):
            data.find_label("boots", classes)

    def test_a_loaded_network_has_its_dropout_off(self):
        self.trained("--dropout", "0.5")
        network, _, _ = train.load_checkpoint(self.pt, "cpu")
        x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
        self.assertTrue(torch.equal(network(x, t), network(x, t)))
        self.assertFalse(torch.equal(network.train()(x, t), network(x, t)))

    def test_a_batch_mirrors_half_of_the_images_and_hides_a_tenth_of_the_labels(self):
        args = train.parse_args(["--dataset", self.npy, *SMALL, "--batch-size", "4000", "--flip", "--conditional"])
        ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
        x_0, y = train.Run(args, ramp, torch.zeros(1, dtype=torch.int64), ("0", "1"), torch.device("cpu")).batch()
        mirrored = (x_0 == data.to_model(ramp).flip(-1)).flatten(1).all(1)
        self.assertTrue((mirrored ^ (x_0 == data.to_model(ramp)).flatten(1).all(1)).all())
        self.assertEqual(set(y.tolist()), {0, 2})
        for share, expected in ((mirrored, 0.5), (y == 2, 0.1)):
            self.assertAlmostEqual(float(share.float().mean()), expected, delta=0.04)               # 5 standard deviations

    def test_the_rate_rises_from_above_0_and_falls_to_0_and_the_average_sees_the_last_step(self):
        rates = [unet.learning_rate(step, 10, 1.0, 4) for step in range(11)]
        close(rates, [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
        self.trained("--ema", "0", "--precision", "fp32")
        torch.testing.assert_close(self.weights()["ema"], self.weights()["model"])

    def test_with_only_a_run_sees_one_class(self):
        said = self.trained("--only", "2")
        labels = np.load(self.folder / "data.labels.npy")
        self.assertIn(f"{(labels == 2).sum()} images", said)

    def test_evaluate_prints_l_simple_and_the_bound_split_into_rate_and_distortion(self):
        self.trained()
        for options in ((), ("--exact", "3")):
            code, said, err = self.run_main(train, "--evaluate", self.pt, *options)
            self.assertEqual((code, err), (0, ""))
            value = lambda name, said=said: float(re.search(rf"{name}\s+(\d+\.\d+)", said)[1])
            self.assertIn("by quarter of t", said)
            self.assertAlmostEqual(value("bits/dim <="), value("rate") + value("distortion"), delta=2e-3)

    def test_random_terms_of_the_bound_estimate_all_of_them(self):
        self.trained()
        totals = []
        for options in ((), ("--exact", "60")):
            said = self.run_main(train, "--evaluate", self.pt, *options)[1]
            totals.append([float(x) for x in re.search(r"bits/dim <= (\S+) \+- ([\d.]+)", said).groups()])
        self.assertLess(abs(totals[0][0] - totals[1][0]), 3 * (totals[0][1] + totals[1][1]), totals)

    def test_every_loss_precision_and_block_trains(self):
        for options in (("--loss", "vlb", "--variance", "learned"), ("--loss", "l1"), ("--loss", "huber", "--precision", "bf16"),
                        ("--precision", "fp16"), ("--block", "convnext", "--embedding", "scale-shift"), ("--accumulate", "4"),
                        ("--checkpointing",), ("--weight-decay", "0.1"), ("--patch", "1", "--attention", "4,8", "--heads", "2"),
                        ("--schedule", "cosine", "--beta-min", "1e-4", "--beta-max", "0.5"), ("--timesteps", "1"), ("--optimizer", "adam"),
                        ("--timesteps", "49", "--beta-start", "0.02", "--beta-end", "0.98"),
                        ("--batch-size", "1"), ("--flip",)):
            with self.subTest(options):
                code, _, err = self.train("--steps", "2", *options, out=str(self.folder / f"{options[-1]}.pt"))
                self.assertEqual(code, 0, err)

    def test_parts_of_a_batch_are_averaged_not_summed(self):
        norms, clip = [], torch.nn.utils.clip_grad_norm_                     # weights alone would not show it: clipping, Muon
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_",            # and Adam all forget a gradient's length
                               lambda weights, most: norms.append(clip(weights, most)) or norms[-1]):
            self.trained("--precision", "fp32")
            self.trained("--precision", "fp32", "--accumulate", "2", out=str(self.folder / "parts.pt"))
        close(norms[:6], norms[6:], 1e-3)
        torch.testing.assert_close(self.weights()["model"], self.weights(self.folder / "parts.pt")["model"], rtol=1e-3, atol=1e-4)

    def test_the_default_schedule_is_cosine_and_end_points_mean_the_linear_one(self):
        for schedule, *argv in (("cosine",), ("linear", "--beta-end", "0.03"), ("linear", "--schedule", "linear")):
            settings = train.settings_of(train.parse_args(argv))
            self.assertEqual(settings["schedule"], schedule)
        self.assertEqual((settings["beta_start"], settings["beta_end"]), (1e-4, 0.02))

    def test_orthogonal_keeps_a_matrixs_directions_and_makes_its_singular_values_alike(self):
        G = noise(32, 288) @ torch.diag(torch.linspace(0.2, 3, 288))
        U, before, V = np.linalg.svd(G.double().numpy(), full_matrices=False)
        after = U.T @ unet.orthogonal(G).double().numpy() @ V.T
        self.assertGreater(before[0] / before[-1], 1.5)
        self.assertTrue((0.6 < np.diag(after)).all() and (np.diag(after) < 1.25).all(), np.diag(after))
        self.assertLess(np.abs(after - np.diag(np.diag(after))).max(), 1e-4)

    def test_muon_moves_convolutions_by_orthogonal_matrices_the_size_of_an_adam_step(self):
        network = unet.UNet(channels=8, multipliers=(1, 2))
        names = {id(w): name for name, w in network.named_parameters()}
        optimizer = unet.Optimizer(network, 0.01)
        before = {name: w.detach().clone() for name, w in network.named_parameters()}
        for w in network.parameters():
            w.grad = noise(*w.shape)
        for w in optimizer.convolutions:                                    # a random square matrix may have a singular value near 0
            torch.nn.init.orthogonal_(w.grad.view(len(w), -1))
        optimizer.step()
        by_adam = [w for w in network.parameters() if all(w is not v for v in optimizer.convolutions)]
        self.assertTrue(by_adam and optimizer.convolutions)
        for w in by_adam:                                                   # Adam's first step is the gradient's sign
            torch.testing.assert_close((before[names[id(w)]] - w).abs(), torch.full_like(w, 0.01), rtol=1e-2, atol=1e-4)
        for w in optimizer.convolutions:
            old = before[names[id(w)]]
            self.assertEqual(w.ndim, 4)
            sizes = np.linalg.svd((w - old).detach().flatten(1).numpy(), compute_uv=False) / (0.01 * 0.2 * max(len(w), w[0].numel()) ** 0.5)
            self.assertTrue((0.5 < sizes).all() and (sizes < 1.3).all(), (names[id(w)], sizes))

    def test_weight_decay_shrinks_every_weight_by_the_rate_times_the_decay(self):
        network = unet.UNet(channels=8)
        optimizer = unet.Optimizer(network, 0.1, weight_decay=0.5)
        before = {name: w.detach().clone() for name, w in network.named_parameters()}
        for w in network.parameters():
            w.grad = torch.zeros_like(w)
        optimizer.step()
        for name, w in network.named_parameters():
            torch.testing.assert_close(w.detach(), 0.95 * before[name])

    # -- stop, go on, and never lose anything

    def stop_at(self, step, number, *argv, out=None):
        """Train, with a signal in the middle of a step."""
        real = train.Run.step

        def step_and_signal(run):
            if run.done + 1 == step:
                for _ in range(1 if number == signal.SIGINT else 2):         # twice, as from a cluster and torchrun's agent
                    signal.raise_signal(number)                         # os.kill would end the tests on Windows
            return real(run)

        self.addCleanup(signal.signal, number, signal.signal(number, signal.default_int_handler))    # nohup, say, ignores one
        with mock.patch.object(train.Run, "step", step_and_signal):
            return self.train("--steps", "6", *argv, out=out)

    def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(self):
        for options in (("--dropout", "0.1", "--conditional", "--flip"), ("--loss", "vlb", "--variance", "learned_range"),
                        ("--precision", "fp16")):
            with self.subTest(options):
                whole = str(self.folder / "whole.pt")
                self.trained(*options, out=whole)
                hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
                for step, number in ((2, signal.SIGINT), (3, hangup), (4, signal.SIGTERM)):
                    code, said, err = self.stop_at(step, number, "--resume", *options)
                    self.assertEqual((code, err), (128 + number, ""))
                    self.assertRegex(said, f"stopped at step {step}, saved in .*--resume")
                    self.assertEqual(self.weights()["step"], step)
                self.trained("--resume", *options)
                self.assert_same_state(self.weights(whole), self.weights())
                Path(self.pt).unlink()
                Path(whole).unlink()

    def test_resume_of_a_finished_run_says_so_and_more_steps_are_fine(self):
        self.trained("--resume")                                            # nothing yet: it starts
        self.assertIn("has all its 6 steps", self.trained("--resume"))
        code, _, _ = self.train("--steps", "8", "--resume", "--save-every", "1")
        self.assertEqual((code, self.weights()["step"]), (0, 8))

    def test_resume_with_other_settings_says_which_and_refuses(self):
        self.trained()
        before = Path(self.pt).read_bytes()
        for options, said in ((("--lr", "0.5"), r"lr was 0\.01 and is 0\.5"), (("--channels", "16"), "channels was 8 and is 16"),
                              (("--timesteps", "30"), "timesteps was 20"), (("--seed", "1"), "seed was 0")):
            self.refused(train, said, "--dataset", self.npy, *SMALL, "--out", self.pt, "--steps", "9", "--resume", *options)
        self.assertEqual(Path(self.pt).read_bytes(), before)

    def test_training_again_keeps_the_older_model_under_another_name(self):
        self.trained()
        first = Path(self.pt).read_bytes()
        self.assertIn("is now", self.trained("--seed", "5"))
        self.assertEqual((self.folder / "ddpm.1.pt").read_bytes(), first)
        self.trained("--seed", "6")
        self.assertTrue((self.folder / "ddpm.2.pt").exists())
        link, target = self.folder / "link.pt", self.folder / "target.pt"
        self.trained(out=str(target))
        link.symlink_to(target)
        self.trained("--seed", "5", out=str(link))                            # a link stays one, and its old target is kept
        self.assertEqual((self.folder / "link.1.pt").read_bytes(), first)
        self.assertTrue(link.is_symlink() and target.read_bytes() != first)

    def test_killed_at_any_moment_the_newest_complete_checkpoint_is_there_and_nothing_piles_up(self):
        rng, kills, steps = random.Random(1), 200 if LONG else 2, []
        command = [sys.executable, str(HERE / "train.py"), "--dataset", self.npy, *SMALL, "--out", self.pt, "--save-every", "1",
                   "--steps", "1000000", "--resume"]
        for _ in range(kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            began = Path(self.pt).stat().st_mtime_ns if Path(self.pt).exists() else 0
            while process.poll() is None and (not Path(self.pt).exists() or Path(self.pt).stat().st_mtime_ns == began):
                time.sleep(0.01)                                            # until it saves
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.wait()
            self.assertEqual(process.stderr.read(), "")
            process.stderr.close()
            steps.append(train.load_checkpoint(self.pt, "cpu")[2]["step"])
            self.assertLessEqual(len([p for p in self.folder.iterdir() if "ddpm" in p.name]), 2)
        self.assertTrue(all(a < b for a, b in itertools.pairwise(steps)), steps)
        if LONG:
            print(f"{kills} kills, seed 1: steps {steps[0]} .. {steps[-1]}")

    def test_a_gradient_that_stays_not_finite_stops_the_run_and_leaves_the_good_checkpoint(self):
        self.trained()
        before = Path(self.pt).read_bytes()
        with mock.patch.object(train.Run, "losses", lambda run, x_0, y, t, noise:
                               next(iter(run.weights)).sum() * torch.full((len(x_0),), math.nan)):
            self.refused(train, "not been finite for .* steps; .*Try a lower --lr", "--dataset", self.npy, *SMALL, "--out",
                         self.pt, "--steps", "2000", "--save-every", "5000")
            self.refused(train, "has not been finite for 6 steps", "--dataset", self.npy, *SMALL, "--out",
                         self.folder / "none.pt", "--steps", "6")
            self.assertIn("nothing to save", self.stop_at(3, signal.SIGTERM, out=str(self.folder / "none.pt"))[1])
        self.assertFalse((self.folder / "none.pt").exists())
        self.assertEqual(Path(self.pt).read_bytes(), before)

    def bad_gradient_at(self, step):
        """A patch under which a run's losses are not numbers in that step."""
        real = train.Run.losses
        return mock.patch.object(train.Run, "losses",
                                 lambda run, *batch: real(run, *batch) * (math.nan if run.done + 1 == step else 1))

    def test_a_single_bad_gradient_is_skipped_and_counted(self):
        with self.bad_gradient_at(2):
            self.assertIn("1 steps skipped", self.trained())
        self.assertTrue(all(torch.isfinite(w).all() for w in self.weights()["ema"].values()))

    def test_a_run_whose_last_step_is_skipped_is_saved_at_its_end(self):
        with self.bad_gradient_at(6):
            self.trained("--save-every", "5")
        self.assertEqual(self.weights()["step"], 6)
        self.assertIn("has all its 6 steps", self.trained("--resume"))

    # -- what must be refused

    def test_wrong_flags_are_one_line_and_exit_code_2(self):
        for script, said, *argv in (
                (train, "--steps: '0' is not a whole number of at least 1", "--steps", "0"), (train, "--lr", "--lr", "nan"),
                (train, "--lr", "--lr", "-1"), (train, "--batch-size", "--batch-size", "two"), (train, "--ema", "--ema", "1"),
                (train, "belong to --schedule linear", "--beta-end", "0.5", "--schedule", "cosine"),
                (train, "strictly between 0 and 1", "--beta-end", "1"), (train, "strictly", "--beta-start", "0"),
                (train, "--prediction", "--prediction", "noise"), (train, "no gradient", "--loss", "hybrid"),
                (train, "too small for float32", "--beta-end", "0.9"), (train, "--multipliers", "--multipliers", "1,x"),
                (train, "--heads", "--heads", "3"), (train, "equal parts", "--accumulate", "7"), (train, "--seed", "--seed", "-1"),
                (train, "--seed", "--seed", str(2**63)), (train, "unrecognized", "--colour"), (train, "--dropout", "--dropout", "1"),
                (sample, "--n", "--n", "0"), (sample, "--eta", "--eta", "2"), (sample, "--sampler ddim", "--eta", "0.5"),
                (sample, "--steps", "--steps", "-5"), (sample, "--guidance", "--guidance", "inf"),
                (sample, r"\.png", "--out", "x.jpg"), (sample, r"\.png", "--movie", "x.gif")):
            with self.subTest(argv):
                self.refused(script, said, *argv, code=2)

    def test_wrong_values_are_one_line_and_exit_code_2_too(self):
        small = ("--dataset", self.npy, *SMALL, "--steps", "2")
        for script, said, *argv in (
                (train, "unknown data set 'cats'", "--dataset", "cats"), (train, "none.npy", "--dataset", "none.npy"),
                (train, "no label 'boot'", *small, "--out", self.pt, "--only", "boot"),
                (train, "nowhere", *small, "--out", "/nowhere/ddpm.pt"), (train, "cannot be written", *small, "--out", self.folder),
                (train, "--device", *small, "--device", "toaster"), (train, "cannot be written", *small, "--out", "/dev/null"),
                (sample, "none.pt", "--checkpoint", "none.pt"), (train, "none.pt", "--evaluate", "none.pt")):
            with self.subTest(argv):
                self.refused(script, said, *argv, code=2)
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
            for device in ("cuda:1", "mps"):                    # all processes on one
                self.refused(train, f"--device {device}: torchrun", *small, "--out", self.pt, "--device", device, code=2)
        self.trained()
        for said, *argv in (("--steps 21 is more than the 20", "--steps", "21"), ("nowhere", "--out", "/nowhere/x.png"),
                            ("nope.pt", "--out", self.folder / "x.png", "--score", "nope.pt")):
            self.refused(sample, said, "--checkpoint", self.pt, *argv, code=2)

    def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(self):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(self_folder / "exploded"),)

        self_folder = self.folder
        Path(self.pt).write_bytes(pickle.dumps(Bomb()))
        self.refused(sample, "ddpm.pt is not a checkpoint", "--checkpoint", self.pt)
        torch.save({"format": Bomb()}, self.pt)
        self.refused(sample, "ddpm.pt is not a checkpoint", "--checkpoint", self.pt)
        self.refused(train, "ddpm.pt is not a checkpoint", "--dataset", self.npy, *SMALL, "--out", self.pt, "--resume")
        self.assertFalse((self.folder / "exploded").exists())

    def test_a_checkpoint_with_wrong_fields_is_refused_before_it_is_used(self):
        self.trained()
        good = self.weights()
        name, nested = next(iter(good["ema"])), ("a",)
        for _ in range(60):
            nested = (nested, nested)                                       # 2^60 strings for who prints it, a few bytes in a file
        settings = (("multipliers", nested), ("only", nested),
                    ("channels", 10**9), ("timesteps", 10**12), ("blocks", True), ("blocks", 1.0), ("surprise", 1), ("conditional", 1),
                    ("beta_end", 7.0), ("variance", "learned"), ("dataset", "photos"), ("multipliers", (1,)), ("multipliers", [1, 2]),
                    ("only", 7), ("only", (("a",),)), ("lr", torch.tensor(0.5)), ("classifier", True), ("flip", "no"), ("lr", good["ema"][name]))
        for field, value in (("format", 7), ("shape", (1, 8, "8")), ("shape", (1, 8, 8.0)), ("shape", (2, 8, 8)), ("shape", [1, 8, 8]), ("classes", [1, 2]),
                             ("classes", ("a" * 10**5, "b", "c")), ("classes", ("\033[2J", "b", "c")),
                             ("shape", (nested, 8, 8)), ("classes", (nested, "b", "c")), ("step", nested), ("ema", nested),
                             ("classes", ()), ("step", "many"), ("step", -1), ("settings", None), ("settings", {}),
                             *(("settings", {**good["settings"], flag: value}) for flag, value in settings),
                             ("ema", {**good["ema"], name: good["ema"][name][:1]}), ("ema", {}),
                             ("ema", {**good["ema"], name: good["ema"][name] * math.nan}),
                             ("ema", {**good["ema"], name: good["ema"][name].double()})):
            with self.subTest(field):
                torch.save({**good, field: value}, self.pt)
                self.refused(sample, "ddpm.pt", "--checkpoint", self.pt)
        for field in good:
            if field in ("step", "settings", "shape", "classes", "ema", "format"):
                torch.save({k: v for k, v in good.items() if k != field}, self.pt)
                self.refused(sample, "ddpm.pt", "--checkpoint", self.pt)
        views = {k: torch.zeros(()).expand(w.shape) for k, w in good["ema"].items()}       # one number seen as many
        torch.save({k: good[k] for k in ("format", "settings", "shape", "classes", "step")} | {"ema": views}, self.pt)
        self.refused(sample, "larger than itself", "--checkpoint", self.pt)
        for field, value in (("rng", {}), ("optimizer", []), ("optimizer", {0: {}}), ("optimizer", {}), ("model", {})):
            torch.save({**good, field: value}, self.pt)
            self.refused(train, "damaged", "--dataset", self.npy, *SMALL, "--out", self.pt, "--steps", "9", "--resume")

    def test_whatever_is_done_to_a_checkpoint_it_loads_or_is_refused_by_name(self):
        self.trained()
        ReadingFiles.mutations(self, "mutated.pt", Path(self.pt).read_bytes(),
                               lambda path: train.load_checkpoint(str(path), "cpu"), 60)

    # -- several processes

    def test_two_processes_train_what_one_does_and_draw_what_one_does(self):
        one = self.trained("--precision", "fp32")
        flags = ["--dataset", self.npy, *SMALL, "--steps", "6", "--precision", "fp32"]
        draw = ["--checkpoint", self.pt, "--n", "5", "--batch-size", "2", "--steps", "4", "--device", "cpu"]
        commands = ((HERE / "train.py", *flags, "--out", self.folder / "two.pt"),
                    (HERE / "sample.py", *draw, "--out", self.folder / "two.npy"))
        trained, drawn = (torchrun(2, *command) for command in commands)     # not side by side: they can take the same port
        self.assertEqual((trained.returncode, drawn.returncode), (0, 0), trained.stderr + drawn.stderr)
        self.assertEqual(trained.stdout.count("Next:"), 1)                   # the first process alone speaks
        self.assertEqual(one.count("Next:"), 1)
        torch.testing.assert_close(self.weights()["model"], self.weights(self.folder / "two.pt")["model"], rtol=1e-3, atol=1e-4)
        self.sampled(*draw[2:], "--out", self.folder / "one.npy")
        self.assertTrue((np.load(self.folder / "one.npy") == np.load(self.folder / "two.npy")).all())

    def test_a_process_that_dies_ends_the_others_with_an_error(self):
        began = time.monotonic()
        code = ("import os, train; real = train.Run.step\n"
                "def step(run):\n    if os.environ['RANK'] == '1' and run.done == 3: os._exit(9)\n    return real(run)\n"
                "train.Run.step = step; train.guarded(train.main)")
        self.path("dies.py", code.encode())
        done = torchrun(2, self.folder / "dies.py", "--dataset", self.npy, *SMALL, "--steps", "100000", "--out", self.pt,
                        env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertRegex(done.stderr, r"rank\s*: 1 [\s\S]*exitcode\s*: 9 ")          # it was this death and no other error
        self.assertLess(time.monotonic() - began, 60)

    # -- the README

    def test_every_command_in_the_readme_is_understood_and_runs(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        found = re.findall(r"(?:python|torchrun --nproc-per-node=\d+ --) (train|sample)\.py((?: [^`&#\n]*)?)", readme)
        self.assertGreater(len(found), 25)
        self.trained()
        self.trained("--classifier", out=str(self.folder / "classifier.pt"))
        self.trained("--conditional", out=str(self.folder / "conditional.pt"))
        self.trained(out=str(self.folder / "steps1000.pt"))
        self.work_in(self.folder)
        for script, flags in sorted(set(found)):
            with self.subTest(script + flags):
                argv = [a for a in shlex.split(flags) if a != "..."]
                if script == "train":
                    train.parse_args(argv)                                  # as written, then as small as can be
                    small = ["--dataset", self.npy, "--channels", "8", "--multipliers", "1,2", "--batch-size", "2", "--steps", "1"]
                    only = ["--only", "1"] if "--only" in argv else []
                    evaluated = ["--evaluate", self.pt] if "--evaluate" in argv else []
                    argv = [a for a in argv if a not in ("--resume", "--compile")]
                    out = [] if evaluated else ["--out", str(self.folder / "readme.pt")]
                    code, _, err = self.run_main(train, *argv, *small, *only, *evaluated, *out)
                else:
                    sample.parse_args(argv)
                    label = ["--label", "1"] if "--label" in argv else []
                    small = ["--n", "2", "--steps", "2", "--data-dir", str(self.folder)]
                    code, _, err = self.run_main(sample, *argv, *small, *label)
                self.assertEqual(code, 0, err)

    def test_progress_is_no_error_when_nobody_listens_any_more(self):
        listener, speaker = os.pipe()
        os.close(listener)
        with os.fdopen(speaker, "w") as pipe, mock.patch("sys.stdout", pipe):
            data.say("step 2", done=True)                            # without an error
            data.say("step 3", done=True)
        with mock.patch("sys.stdout", None):                        # as without a console
            data.say("step 1", done=True)

    def test_every_flag_is_explained_with_its_default(self):
        for script in (train, sample):
            out = io.StringIO()
            with mock.patch.dict(os.environ, {"COLUMNS": "120"}), contextlib.redirect_stdout(out), self.assertRaises(SystemExit) as stop:
                script.parse_args(["--help"])
            self.assertEqual(stop.exception.code, 0)
            usage, explained = out.getvalue().split("\n\n", 1)
            for flag in re.findall(r"--[a-z][\w-]*", usage):
                self.assertRegex(explained, rf"\n  (--\w+, )?{flag}(, --\S+)?( \S+)?(\n {{20,}}|  +)\S")
            self.assertGreater(out.getvalue().count("(default: "), 8)

    def test_every_test_that_the_readme_names_exists_and_every_name_in_its_table_too(self):
        readme, source = (HERE / "README.md").read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", readme):
            self.assertIn(f"def {name}(", source)
        for pattern in re.findall(r"-k (\w+)", readme):
            self.assertRegex(source, "import" if pattern == "name" else rf"(class|def) \w*{pattern}")
        for block in re.findall(r"```python\n( +.*?)```", readme, re.DOTALL):         # the two algorithms
            self.assertIn(block, (HERE / "ddpm.py").read_text(encoding="utf-8"))
        rows = [line.split("|")[-2] for line in readme.splitlines() if line.startswith("| ") and "the code" not in line]
        table = rows[:next(k for k, row in enumerate(rows) if "classifier_guidance" in row) + 1]
        names = set(re.findall(r"`(\w+)`", " ".join(table))) - {"variance"}
        self.assertGreater(len(names), 20)
        for name in names:
            self.assertTrue(hasattr(GaussianDiffusion(STEEP), name) or hasattr(ddpm, name), name)

    def test_importing_the_maths_the_network_and_the_data_costs_torch_and_numpy_and_no_more(self):
        code = ("import sys, torch, numpy; before = set(sys.modules); import ddpm, unet, data\n"
                "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
                "assert new <= {'ddpm', 'unet', 'data', 'torch', 'numpy', 'sympy', 'mpmath'}, new")
        subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
        for name, allowed in (("ddpm", set()), ("unet", set()), ("data", set()), ("train", {"data", "unet", "ddpm"}),
                              ("sample", {"data", "unet", "ddpm", "train"})):
            tree = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
            imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            ours = {"ddpm", "unet", "data", "train", "sample"}
            self.assertLessEqual(imported & ours, allowed)
            roots = {m.split(".")[0] for m in imported} - ours - set(sys.stdlib_module_names)
            self.assertLessEqual(roots, {"torch", "numpy"})


if __name__ == "__main__":
    unittest.main()
