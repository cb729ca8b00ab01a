"""epsilon_theta(x_t, t, y): the U-Net of the paper's Appendix B, in a size that a laptop trains.

    UNet(in_channels=3, image_size=32, patch=1, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
         attention=(16,), dropout=0.1)

has the layout and the 35,746,307 parameters of the paper's CIFAR-10 network. UNet() is for
minutes on a CPU:
smaller, with a patch of 2. A patch above 1 changes this:

* Pixels are gathered patch x patch into channels, and spread again at the end: maps of full size
  cost most of the time and hold little of the capacity.
* Only residual blocks have skip connections. In the paper every layer on the way down has one,
  hence one block more per level on the way up.
* Upsampling convolves 1 x 1 (the paper: 3 x 3). With the skips this is 1.5 times as fast.
* A learned g(t) x is added to the output: near t = T, eps is almost x_t.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim):
    """Sinusoidal embedding of t (B,), whole numbers >= 0 -> (B, dim) in [-1, 1] (Appendix B). The
    wavelengths are 2 pi .. 20,000 pi, if dim >= 4."""
    half = dim // 2
    columns = torch.arange(half, device=t.device)
    frequencies = torch.exp(-math.log(10000) * columns / max(half - 1, 1))
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def group_norm(channels):
    """The paper's 32 groups, each of at least 4 channels; fewer in a narrow network."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zero_init(layer):
    """Start a layer at zero, so that the block it ends starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm_with_embedding(norm, h, emb):
    """Normalise h (B, C, H, W), with emb (B, C) added before (the paper), or with emb (B, 2 C) as
    a scale and a shift after (iDDPM)."""
    emb = emb[:, :, None, None]
    if emb.shape[1] == h.shape[1]:
        return norm(h + emb)
    scale, shift = emb.chunk(2, dim=1)
    return norm(h) * (1 + scale) + shift


class ResNetBlock(nn.Module):
    """Two convolutions with the embedding between them, and a shortcut around them (Appendix B)."""
    def __init__(self, c_in, c_out, c_emb, dropout, scale_shift):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(norm_with_embedding(self.norm2, h, self.emb(emb)))
        return self.shortcut(x) + self.conv2(self.dropout(h))


class ConvNeXtBlock(nn.Module):
    """A 7 x 7 convolution per channel, then a small network per pixel (Liu et al. 2022)."""
    def __init__(self, c_in, c_out, c_emb, dropout, scale_shift):
        super().__init__()
        self.depthwise = nn.Conv2d(c_in, c_in, 7, padding=3, groups=c_in)
        self.norm = nn.GroupNorm(1, c_in)
        self.emb = nn.Linear(c_emb, 2 * c_in if scale_shift else c_in)
        self.expand = nn.Conv2d(c_in, 4 * c_out, 1)
        self.dropout = nn.Dropout(dropout)
        self.project = zero_init(nn.Conv2d(4 * c_out, c_out, 1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = norm_with_embedding(self.norm, self.depthwise(x), self.emb(emb))
        return self.shortcut(x) + self.project(self.dropout(F.gelu(self.expand(h))))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map."""
    def __init__(self, channels, heads=1):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Half the height and width, rounded up."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.conv(x)


class Upsample(nn.Module):
    """Grow to `size` (H, W) by repeating pixels, then convolve. 1 x 1 convolves first: the same,
    for a quarter of the work."""
    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x, size):
        if self.conv.kernel_size == (1, 1):
            return F.interpolate(self.conv(x), size)
        return self.conv(F.interpolate(x, size))


class Stage(nn.Sequential):
    """Blocks one after another, each called with h (B, C, H, W) and emb (B, E)."""

    checkpointing = False  # once more, in the backward pass

    def forward(self, h, emb):
        for block in self:
            twice = self.checkpointing and self.training
            h = checkpoint(block, h, emb, use_reentrant=False) if twice else block(h, emb)
        return h


class Embedding(nn.Module):
    """t (B,) and y (B,) or None -> emb (B, 4 channels): a network on the sinusoids of t, plus row y
    of a table. The last row, zero at first, is "no label", which y=None means."""
    def __init__(self, channels, num_classes=None):
        super().__init__()
        self.channels, width = channels, 4 * channels
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = None
        if num_classes is not None:
            self.labels = nn.Embedding(num_classes + 1, width)
            nn.init.zeros_(self.labels.weight[-1])

    def forward(self, t, y=None):
        emb = self.mlp(timestep_embedding(t, self.channels).to(self.mlp[0].weight.dtype))
        if self.labels is not None:
            emb = emb + (self.labels.weight[-1] if y is None else self.labels(y))
        elif y is not None:
            raise ValueError("a network without num_classes must be called without labels")
        return F.silu(emb)  # in the paper, each block begins with it


class Encoder(nn.Module):
    """The left half of the U: images -> the last feature map and the list of skip connections."""
    def __init__(self, in_channels, patch, widths, blocks, make_stage):
        super().__init__()
        self.patch, self.paper, c = patch, patch == 1, widths[0]
        self.conv_in = nn.Conv2d(in_channels * patch**2, c, 3, padding=1)
        self.stages, self.skip_channels = nn.ModuleList(), [c] if self.paper else []
        for level, width in enumerate(widths):
            if level > 0:
                self.stages.append(Downsample(c))
                self.skip_channels += [c] if self.paper else []
            for _ in range(blocks):
                self.stages.append(make_stage(c, level))
                self.skip_channels.append(width)
                c = width

    def forward(self, x, emb):
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        hs = [h] if self.paper else []
        for stage in self.stages:
            h = stage(h, emb)
            if self.paper or isinstance(stage, Stage):
                hs.append(h)
        return h, hs


class UNet(nn.Module):
    """epsilon_theta(x_t, t, y). UNet() is the network that train.py builds with no flag.

    out_channels           None: in_channels
    channels, multipliers  level l has channels * multipliers[l] channels, 1 / 2^l of the size
    blocks                 residual blocks per level (patch=1: one more on the way up)
    attention              sizes of feature maps that get it, for image_size; so does the middle
    convnext, scale_shift  ConvNeXt for ResNet blocks; t as scale and shift, not added
    checkpointing          save memory by computing blocks twice
    """

    def __init__(self, in_channels=1, out_channels=None, image_size=28, patch=2, channels=32,
                 multipliers=(1, 2), blocks=1, attention=(), heads=1, dropout=0.0, convnext=False,
                 scale_shift=False, num_classes=None, checkpointing=False):
        super().__init__()
        if not 1 <= len(multipliers) <= 12 or not 1 <= blocks <= 64 or not 1 <= patch <= 64:
            raise ValueError("a U-Net has 1..12 multipliers, 1..64 blocks, a patch of 1..64")
        widths = [channels * m for m in multipliers]
        if any(width % heads for width in widths):
            raise ValueError(f"heads {heads} must divide the channels of every level, {widths}")
        sizes = [math.ceil(image_size / (patch * 2**level)) for level in range(len(widths))]
        if set(attention) - set(sizes):
            warnings.warn(f"attention {attention}: feature maps have sizes {sizes}", stacklevel=2)
        self.out_channels = out_channels or in_channels
        self.patch, self.num_classes, paper = patch, num_classes, patch == 1

        def make_block(c_in, c_out):
            kind = ConvNeXtBlock if convnext else ResNetBlock
            return kind(c_in, c_out, 4 * channels, dropout, scale_shift)

        def make_stage(c_in, level):
            stage = Stage(make_block(c_in, widths[level]))
            if sizes[level] in attention:
                stage.append(Attention(widths[level], heads))
            return stage

        self.embedding = Embedding(channels, num_classes)
        self.encoder = Encoder(in_channels, patch, widths, blocks, make_stage)
        c, skip_channels = widths[-1], list(self.encoder.skip_channels)
        self.middle = Stage(make_block(c, c), Attention(c, heads), make_block(c, c))
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1 if paper else blocks):
                self.up.append(make_stage(c + skip_channels.pop(), level))
                c = width
            if level > 0:
                c = width if paper else widths[level - 1]
                self.up.append(Upsample(width, c, kernel=3 if paper else 1))
        self.norm_out = group_norm(c)
        self.conv_out = zero_init(nn.Conv2d(c, self.out_channels * patch**2, 3, padding=1))
        self.input_gain = None if paper else zero_init(nn.Linear(4 * channels, in_channels))
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.checkpointing = checkpointing

    def forward(self, x, t, y=None):
        """x (B, in_channels, H, W) of any size, t (B,) whole numbers >= 0, y (B,) in 0..num_classes
        or None -> (B, out_channels, H, W), of x's dtype even under autocast."""
        if len(x) == 0:
            return x.new_zeros(0, self.out_channels, *x.shape[2:])
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
        h = F.pixel_shuffle(h, self.patch)[..., :x.shape[2], :x.shape[3]].to(x.dtype)
        if self.input_gain is None:
            return h
        gained = self.input_gain(emb)[:, :, None, None] * x  # not for variance channels
        return h + F.pad(gained, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))


class NoisyClassifier(nn.Module):
    """p(y | x_t): the left half and the middle of a U-Net, with a head. t = 0: clean images."""
    def __init__(self, unet, num_classes):
        super().__init__()
        self.embedding, self.encoder, self.middle = unet.embedding, unet.encoder, unet.middle
        width = self.encoder.skip_channels[-1]
        self.norm = group_norm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x, t):
        """x (B, C, H, W), t (B,) -> (B, F): the last feature map, averaged over its pixels."""
        emb = self.embedding(t)
        h, _ = self.encoder(x, emb)
        return F.silu(self.norm(self.middle(h, emb))).mean(dim=(2, 3))

    def forward(self, x, t):
        """-> logits (B, num_classes)."""
        return self.head(self.features(x, t)).to(x.dtype)
