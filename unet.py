"""epsilon_theta(x_t, t): the U-Net of the paper's Appendix B, in a size that a laptop trains in minutes.

Nothing here knows about diffusion: a network takes images x (B, C, H, W), integers t (B,) and perhaps labels y (B,),
and returns images. From top to bottom: the embedding of t, the blocks, the encoder, the U-Net, a classifier,
how it is computed, and how its weights are updated. With

    UNet(in_channels=3, image_size=32, patch=1, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,),
         dropout=0.1)

it is the paper's CIFAR-10 network, with as many parameters (35,746,307). The defaults are made for minutes on
a CPU and differ in these places:

* patch=2: pixels are gathered 2 x 2 into channels on the way in and spread again on the way out. Feature maps at the
  full 28 x 28 are most of a U-Net's time and little of its capacity.
* with any patch above 1, only the residual blocks hand a skip connection across (the paper: every layer on the way
  down, hence one block more per level on the way up), and upsampling has a 1 x 1 convolution (the paper: 3 x 3). That
  is 1.5 times the speed.
* with any patch above 1, too, g(t) x is added to the output, g learned: near t = T, eps is nearly x_t, and need not be
  carried through a narrow network (after 500 steps of Adam on the linear schedule L_simple is 0.124 with it, 0.139
  without).
* fewer and narrower blocks, self-attention in the middle only, and no dropout.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim):
    """Sinusoidal position embedding of t (B,), integers >= 0 -> (B, dim) in [-1, 1] (Appendix B, after Vaswani et al.).

    Half the columns are sines, half cosines, of wavelengths from 2 pi to 20,000 pi; an odd last column is zero.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / max(half - 1, 1))
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def group_norm(channels):
    """GroupNorm as the paper has it, 32 groups of at least 4 channels; fewer groups where there are fewer channels."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zero(layer):
    """Start a layer at zero, so that the block that it ends starts as the identity (or the network at zero)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def condition(norm, h, emb, scale_shift):
    """Normalise h (B, C, H, W) and tell it emb (B, C): added before (the paper), or (B, 2 C) as a scale and a shift after
    ("adaptive group normalisation", iDDPM and Dhariwal & Nichol 2021)."""
    emb = emb[:, :, None, None]
    if not scale_shift:
        return norm(h + emb)
    scale, shift = emb.chunk(2, dim=1)
    return norm(h) * (1 + scale) + shift


# Blocks are called with (h, emb): h (B, C, H, W), and emb (B, E), which stands for t and y. Some ignore emb. Upsample alone
# is called with (h, size).


class ResNetBlock(nn.Module):
    """Two convolutions with the embedding between them and a shortcut around them (Appendix B)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.0, scale_shift=False):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = condition(self.norm2, h, self.emb(emb), self.scale_shift)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class ConvNeXtBlock(nn.Module):
    """A 7 x 7 convolution of each channel by itself, then a two-layer network at each pixel (Liu et al. 2022)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.0, scale_shift=False):
        super().__init__()
        self.scale_shift = scale_shift
        self.depthwise = nn.Conv2d(c_in, c_in, 7, padding=3, groups=c_in)
        self.norm = nn.GroupNorm(1, c_in)
        self.emb = nn.Linear(c_emb, 2 * c_in if scale_shift else c_in)
        self.expand = nn.Conv2d(c_in, 4 * c_out, 1)
        self.dropout = nn.Dropout(dropout)
        self.project = zero(nn.Conv2d(4 * c_out, c_out, 1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = condition(self.norm, self.depthwise(x), self.emb(emb), self.scale_shift)
        return self.shortcut(x) + self.project(self.dropout(F.gelu(self.expand(h))))


class Attention(nn.Module):
    """Self-attention over the H W pixels of a feature map."""

    def __init__(self, channels, heads=1):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))                       # each (B, heads, H W, C / heads)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Half the height and width, rounded up: by a convolution of stride 2 (the paper's), or the average of 2 x 2."""

    def __init__(self, channels, learned=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else None

    def forward(self, x, emb):
        return F.avg_pool2d(x, 2, ceil_mode=True) if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Grow to `size` (H, W) by repeating pixels, then a 3 x 3 convolution (the paper's), or none.

    kernel=1 is a 1 x 1 convolution, which may as well come first, at a quarter of the work.
    """

    def __init__(self, c_in, c_out, kernel=3, learned=True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2) if learned else nn.Identity()
        self.first = kernel == 1

    def forward(self, x, size):
        if self.first:
            return F.interpolate(self.conv(x), size=tuple(size), mode="nearest")
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Stage(nn.Sequential):
    """Blocks one after another, each called with (h, emb)."""

    checkpointing = False                        # compute again in the backward pass rather than remember

    def forward(self, h, emb):
        for block in self:
            again = self.checkpointing and self.training
            h = checkpoint(block, h, emb, use_reentrant=False) if again else block(h, emb)
        return h


class Embedding(nn.Module):
    """t (B,) and y (B,) or None -> emb (B, 4 channels): Appendix B's embedding of t, plus a row of a table for y.

    The table has num_classes + 1 rows. The last means "no label" and starts at zero; y=None means it.
    """

    def __init__(self, channels, num_classes=None):
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.labels = None
        if num_classes is not None:
            self.labels = nn.Embedding(num_classes + 1, 4 * channels)
            nn.init.zeros_(self.labels.weight[-1])

    def forward(self, t, y=None):
        emb = self.mlp(timestep_embedding(t, self.channels).to(self.mlp[0].weight.dtype))
        if self.labels is not None:
            emb = emb + (self.labels.weight[-1] if y is None else self.labels(y))
        elif y is not None:
            raise ValueError("this network was built without classes (num_classes=None): call it without labels")
        return F.silu(emb)                       # the paper's blocks each begin with it; once is enough


class Encoder(nn.Module):
    """The left half of the U: images (B, in_channels, H, W) -> the last feature map, and those that are handed across.

    widths are the levels' channels; make_block(c_in, c_out) and make_attention(level), a list of one or none, make the rest.
    """

    def __init__(self, in_channels, patch, widths, blocks, make_block, make_attention, learned_resampling=True):
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.stages, c = nn.ModuleList(), widths[0]
        self.skips = [c] if patch == 1 else []   # channels of each skip: every layer's (the paper), or each block's
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.stages.append(Stage(make_block(c, width), *make_attention(level)))
                self.skips.append(width)
                c = width
            if level + 1 < len(widths):
                self.stages.append(Downsample(width, learned_resampling))
                self.skips += [width] if patch == 1 else []

    def forward(self, x, emb):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        hs = [h] if self.patch == 1 else []
        for stage in self.stages:
            h = stage(h, emb)
            if self.patch == 1 or isinstance(stage, Stage):
                hs.append(h)
        return h, hs


class UNet(nn.Module):
    """epsilon_theta(x_t, t, y). UNet() is the network that train.py builds with no flag.

    in_channels, out_channels  of the images, and of the prediction (None: the same; twice as many for a learned variance)
    image_size                 only says which feature maps `attention` means; forward takes any H and W
    patch                      1: the paper's; 2: work on 2 x 2 pixels at a time, with all that the top of this file says
    channels, multipliers      level l has channels * multipliers[l] channels and 1 / (patch 2^l) of the size
    blocks                     residual blocks per level (with patch=1, one more on the way up)
    attention                  sizes of the feature maps that get self-attention; the middle always has it
    heads                      of the attention (1: the paper's)
    dropout                    inside the residual blocks
    convnext                   ConvNeXt blocks instead of the paper's ResNet blocks
    scale_shift                how blocks are told t: True: scale and shift, False: the paper's addition
    learned_resampling         False: averages down and repeated pixels up, without convolutions
    num_classes                None: no labels
    checkpointing              compute each block again in the backward pass rather than remember its inside
    """

    def __init__(self, in_channels=1, out_channels=None, image_size=28, patch=2, channels=32, multipliers=(1, 2), blocks=1,
                 attention=(), heads=1, dropout=0.0, convnext=False, scale_shift=False, learned_resampling=True,
                 num_classes=None, checkpointing=False):
        super().__init__()
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch, self.num_classes = patch, num_classes
        widths = [channels * m for m in multipliers]
        sizes = [math.ceil(image_size / (patch * 2**level)) for level in range(len(widths))]
        if set(attention) - set(sizes):
            warnings.warn(f"attention at {tuple(attention)[:20]}: the feature maps have sizes {tuple(sizes)}", stacklevel=2)

        def make_block(c_in, c_out):
            return (ConvNeXtBlock if convnext else ResNetBlock)(c_in, c_out, 4 * channels, dropout, scale_shift)

        def make_attention(level):
            return [Attention(widths[level], heads)] if sizes[level] in attention else []

        self.embedding = Embedding(channels, num_classes)
        self.encoder = Encoder(in_channels, patch, widths, blocks, make_block, make_attention, learned_resampling)
        c = widths[-1]
        self.middle = Stage(make_block(c, c), Attention(c, heads), make_block(c, c))
        self.up = nn.ModuleList()
        skips = list(self.encoder.skips)
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1 if patch == 1 else blocks):
                self.up.append(Stage(make_block(c + skips.pop(), widths[level]), *make_attention(level)))
                c = widths[level]
            if level > 0:
                narrow = patch > 1 and learned_resampling
                c_up = widths[level - 1] if narrow else c
                self.up.append(Upsample(c, c_up, 1 if narrow else 3, learned_resampling))
                c = c_up
        assert not skips
        self.norm_out = group_norm(c)
        self.conv_out = zero(nn.Conv2d(c, self.out_channels * patch**2, 3, padding=1))
        self.gate = zero(nn.Linear(4 * channels, in_channels)) if patch > 1 else None
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.checkpointing = checkpointing

    def forward(self, x, t, y=None):
        """x (B, in_channels, H, W), t (B,) integers >= 0, y (B,) int64 in 0..num_classes or None
        -> (B, out_channels, H, W), of x's type even where autocast computes in a shorter one."""
        H, W = x.shape[-2:]
        emb = self.embedding(t, y)
        h, hs = self.encoder(x, emb)
        h = self.middle(h, emb)
        for stage in self.up:
            if isinstance(stage, Upsample):
                h = stage(h, hs[-1].shape[-2:])
            else:
                h = stage(torch.cat([h, hs.pop()], dim=1), emb)
        assert not hs
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch)[..., :H, :W].to(x.dtype)
        if self.gate is None:
            return h
        more = self.out_channels - x.shape[1]                                # variance channels get nothing of x
        return h + F.pad(self.gate(emb)[:, :, None, None] * x, (0, 0, 0, 0, 0, more))


class NoisyClassifier(nn.Module):
    """p(y | x_t): the left half and the middle of a U-Net, which it takes over, with a head. At t = 0 images are clean."""

    def __init__(self, unet, num_classes):
        super().__init__()
        self.embedding, self.encoder, self.middle = unet.embedding, unet.encoder, unet.middle
        width = self.encoder.skips[-1]
        self.norm = group_norm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x, t):
        """x (B, C, H, W), t (B,) integers >= 0 -> (B, F): the last feature map, averaged over its pixels."""
        emb = self.embedding(t)
        h, _ = self.encoder(x, emb)
        h = self.middle(h, emb)
        return F.silu(self.norm(h)).mean(dim=(2, 3))

    def forward(self, x, t):
        """-> logits (B, num_classes)."""
        return self.head(self.features(x, t)).to(x.dtype)


# How it is computed, and how its weights are updated --------------------------------------------------------------------


def pick_dtype(precision, device):
    """-> the torch.dtype that autocast computes in. auto is bf16 where the hardware multiplies matrices in it, else fp32."""
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        units = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                 else device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
        precision = "bf16" if units else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def learning_rate(step, steps, peak, warmup):
    """Up in a straight line over the warm-up, the first step not at 0; then down in another, to 0 at the end."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (steps - step) / max(steps - warmup, 1)


@torch.no_grad()
def update_ema(ema, weights, decay, step):
    """ema <- decay ema + (1 - decay) weights, in place; a shorter memory at first, so that the start is forgotten."""
    torch._foreach_lerp_(ema, weights, 1 - min(decay, (1 + step) / (10 + step)))


class Optimizer(torch.optim.AdamW):
    """Adam; if `muon`, with momentum made orthogonal for the convolutions between feature maps, which is called Muon (Jordan
    et al. 2024, kellerjordan.github.io/posts/muon).

    Every direction of a weight matrix (C_out, C_in kh kw) then learns at the same pace; the scale gives a step the size of
    an Adam step (Liu et al. 2025, 2502.16982). torch.optim.Muon takes no convolutions, and computes in bfloat16, which is
    slow on CPUs without units for it.
    """

    def __init__(self, network, lr, weight_decay=0.0, muon=True):
        # beta_2 = 0.99 rather than Adam's 0.999: a run of minutes should not average gradients over most of itself.
        super().__init__(network.parameters(), lr, (0.9, 0.99), weight_decay=weight_decay, fused=True)
        self.convolutions = [w for name, w in network.named_parameters() if muon and w.ndim == 4 and w.shape[1] > 1
                             and "conv_in" not in name and "conv_out" not in name]
        for w in network.parameters():           # AdamW would do so at its first step; so a new run looks like a saved one
            self.state[w] = {"step": torch.zeros((), device=w.device),
                             "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        for w in self.convolutions:
            self.state[w] = {"momentum": torch.zeros_like(w)}

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)      # not Adam's, which looks for a "step" in Muon's states too

    @torch.no_grad()
    def step(self):
        """One step along the gradients, Muon's, then Adam's; those of Muon's weights are gone afterwards."""
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for w in self.convolutions:
            if w.grad is None:                                                        # frozen
                continue
            momentum = self.state[w]["momentum"].lerp_(w.grad, 0.05)
            G = w.grad.lerp(momentum, 0.95).flatten(1)                                # Nesterov's: a look ahead
            G = orthogonal(G) if len(G) <= G.shape[1] else orthogonal(G.T).T
            w.mul_(1 - lr * decay)
            w.sub_(G.reshape(w.shape), alpha=lr * 0.2 * math.sqrt(max(G.shape)))
            w.grad = None                                                             # so that Adam leaves it alone
        super().step()


def orthogonal(G):
    """Nearly the orthogonal matrix nearest to G (m, n), m <= n: five steps of a polynomial that pushes all singular values
    towards 1 (about 0.7 to 1.2 come out; of those that start very small, less)."""
    G = G / G.norm().clamp(min=1e-7)
    for _ in range(5):
        A = G @ G.T                                          # G <- 3.4445 G - 4.7750 A G + 2.0315 A A G
        G = torch.addmm(G, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), G, beta=3.4445)
    return G
