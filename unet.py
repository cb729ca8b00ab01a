"""epsilon_theta(x_t, t, y): the U-Net of Appendix B, by default small enough for two CPU cores.

    UNet(in_channels=3, image_size=32, patch=1, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
         attention=(16,), dropout=0.1)

has the layout and the 35,746,307 parameters of the paper's CIFAR-10 network. With patch > 1,

* patch x patch pixels become channels: full-size maps cost most and help least;
* only residual blocks feed the way up; in the paper all layers on the way down do, hence one
  block more per level on the way up;
* upsampling convolves 1 x 1, not 3 x 3, for speed;
* a learned g(t) x is added to the output: near t = T, eps is almost x_t.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim):
    """t (B,) -> sines and cosines (B, dim) of wavelengths 2 pi .. 20,000 pi (Appendix B)."""
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, device=t.device) / max(half - 1, 1)
    angles = t[:, None].float() * exponents.exp()
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def group_norm(channels):
    """32 groups as in Ho's code, or fewer, so that each has at least 4 channels."""
    groups = [g for g in range(1, 33) if channels % g == 0 and channels >= 4 * g]
    return nn.GroupNorm(max(groups, default=1), channels)


def zero_init(layer):
    """Zero a last layer: at first, a block is its shortcut."""
    for w in layer.parameters():
        nn.init.zeros_(w)
    return layer


def norm_with_emb(norm, h, emb):
    """Add emb (B, C), normalise; or normalise, scale and shift by emb (B, 2 C) (iDDPM)."""
    emb = emb[:, :, None, None]
    if emb.shape[1] == h.shape[1]:
        return norm(h + emb)
    scale, shift = emb.chunk(2, dim=1)
    return norm(h) * (1 + scale) + shift


class ResNetBlock(nn.Module):
    """Two convolutions with the embedding between them, and a shortcut (Appendix B)."""
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
        h = F.silu(norm_with_emb(self.norm2, h, self.emb(emb)))
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
        h = norm_with_emb(self.norm, self.depthwise(x), self.emb(emb))
        return self.shortcut(x) + self.project(self.dropout(F.gelu(self.expand(h))))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map."""
    def __init__(self, channels, heads):
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


class Stage(nn.Sequential):
    """Blocks one after another, each called with h (B, C, H, W) and emb (B, E)."""
    def forward(self, h, emb):
        for block in self:
            twice = self.checkpointing and self.training
            h = checkpoint(block, h, emb, use_reentrant=False) if twice else block(h, emb)
        return h


class Resample(nn.Module):
    """The convolution between two levels; stride=2 halves the size, rounded up."""
    def __init__(self, c_in, c_out, kernel=3, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)

    def forward(self, h, emb):
        return self.conv(h)


class Embedding(nn.Module):
    """t (B,), y (B,) -> emb (B, 4*channels). The last label, zero at first, is for y=None."""
    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels, self.labels = channels, None
        width = 4 * channels
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes is not None:
            self.labels = nn.Embedding(num_classes + 1, width)
            nn.init.zeros_(self.labels.weight[-1])

    def forward(self, t, y):
        emb = self.mlp(timestep_embedding(t, self.channels).to(self.mlp[0].weight.dtype))
        if self.labels is not None:
            emb = emb + (self.labels.weight[-1] if y is None else self.labels(y))
        elif y is not None:
            raise ValueError("y is given to a network without labels")
        return F.silu(emb)  # in Ho's code, each block does it


class Encoder(nn.Module):
    """The left half of the U: images -> the feature maps of all its layers."""
    def __init__(self, patch, conv_in, stages):
        super().__init__()
        self.patch, self.conv_in, self.stages = patch, conv_in, nn.ModuleList(stages)

    def forward(self, x, emb):
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        hs = [self.conv_in(F.pixel_unshuffle(x, self.patch))]
        for stage in self.stages:
            hs.append(stage(hs[-1], emb))
        return hs


class UNet(nn.Module):
    """epsilon_theta(x_t, t, y). UNet() is what train.py builds with no flag.

    Level l: channels * multipliers[l] channels, size H / (patch 2^l). `attention` lists map
    sizes, for images of image_size; the middle always has it. scale_shift: t scales and
    shifts, or is added.
    """
    def __init__(self, in_channels=1, out_channels=None, image_size=28, patch=2, channels=32,
                 multipliers=(1, 2), blocks=1, attention=(), heads=1, dropout=0.0, convnext=False,
                 scale_shift=False, num_classes=None, checkpointing=False):
        super().__init__()
        widths = [channels * m for m in multipliers]
        if min(len(widths), blocks, patch) < 1 or any(w % heads for w in widths):
            raise ValueError(f"needed: multipliers; blocks, patch > 0; heads dividing {widths}")
        sizes = [math.ceil(image_size / (patch * 2**level)) for level in range(len(widths))]
        if set(attention) - set(sizes):
            warnings.warn(f"attention {attention}: feature maps have sizes {sizes}", stacklevel=2)
        self.out_channels = out_channels or in_channels
        self.patch, self.blocks, self.num_classes = patch, blocks, num_classes
        self.paper = paper = patch == 1
        Block = ConvNeXtBlock if convnext else ResNetBlock
        options = 4 * channels, dropout, scale_shift

        def make_stage(c_in, width, size):
            attend = [Attention(width, heads)] if size in attention else []
            return Stage(Block(c_in, width, *options), *attend)

        self.embedding = Embedding(channels, num_classes)
        conv_in = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        levels = list(zip(widths, sizes, [widths[0], *widths]))  # above: width of the level above
        down = []
        for width, size, above in levels:
            if down:
                down.append(Resample(above, above, stride=2))
            down += [make_stage(c, width, size) for c in [above] + [width] * (blocks - 1)]
        self.encoder = Encoder(patch, conv_in, down)
        self.width = c = widths[-1]
        self.middle = Stage(Block(c, c, *options), Attention(c, heads), Block(c, c, *options))
        self.up = nn.ModuleList()
        for width, size, above in reversed(levels):
            if self.up:
                self.up.append(Resample(c, c) if paper else Resample(c, width, 1))
                c = c if paper else width
            for c_skip in [width] * blocks + [above] * paper:
                self.up.append(make_stage(c + c_skip, width, size))
                c = width
        self.norm_out = group_norm(c)
        self.conv_out = zero_init(nn.Conv2d(c, self.out_channels * patch**2, 3, padding=1))
        self.input_gain = None if paper else zero_init(nn.Linear(4 * channels, in_channels))
        for module in self.modules():
            module.checkpointing = checkpointing

    def forward(self, x, t, y=None):
        """x (B, in_channels, H, W) of any size, t (B,) whole, >= 0, y (B,) in 0..num_classes or
        None -> (B, out_channels, H, W) of x's dtype. ValueError: y without num_classes."""
        B, C, H, W = x.shape
        if B == 0:
            return x.new_zeros(0, self.out_channels, H, W)
        emb = self.embedding(t, y)
        hs = self.encoder(x, emb)
        h = self.middle(hs[-1], emb)
        if not self.paper:  # no skip from what begins a level: conv_in, or Resample
            del hs[::self.blocks + 1]
        for stage in self.up:
            if isinstance(stage, Stage):
                h = stage(torch.cat([h, hs.pop()], dim=1), emb)
            elif self.paper:
                h = stage(F.interpolate(h, hs[-1].shape[2:]), emb)
            else:  # 1 x 1 can come first: the same, for a quarter of the work
                h = F.interpolate(stage(h, emb), hs[-1].shape[2:])
        assert not hs
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch)[..., :H, :W].to(x.dtype)
        if not self.paper:  # prediction channels only
            h[:, :C] += (self.input_gain(emb)[:, :, None, None] * x)[:, :self.out_channels]
        return h


class NoisyClassifier(nn.Module):
    """Logits of p(y | x_t): the left half and middle of a U-Net, and a head. t = 0: clean."""
    def __init__(self, unet, num_classes):
        super().__init__()
        self.embedding, self.encoder, self.middle = unet.embedding, unet.encoder, unet.middle
        self.norm = group_norm(unet.width)
        self.head = nn.Linear(unet.width, num_classes)

    def features(self, x, t):
        """-> (B, F): the last feature map, averaged over its pixels."""
        emb = self.embedding(t, None)
        h = self.middle(self.encoder(x, emb)[-1], emb)
        return F.silu(self.norm(h)).mean(dim=(2, 3))

    def forward(self, x, t):
        return self.head(self.features(x, t)).to(x.dtype)


def make_network(args, shape, classes):
    """The network of train.py's settings, for images of `shape` (C, H, W)."""
    C, H, _ = shape
    network = UNet(
        in_channels=C, out_channels=2 * C if args.variance.startswith("learned") else C,
        image_size=H, patch=args.patch, channels=args.channels, multipliers=args.multipliers,
        blocks=args.blocks, attention=args.attention, heads=args.heads, dropout=args.dropout,
        convnext=args.block == "convnext", scale_shift=args.embedding == "scale-shift",
        num_classes=len(classes) if args.conditional else None, checkpointing=args.checkpointing)
    return NoisyClassifier(network, len(classes)) if args.classifier else network


def to_device(network, device):
    """The network on a device, convolutions in a GPU's layout."""
    gpu = torch.device(device).type == "cuda"
    return network.to(device, memory_format=torch.channels_last if gpu else torch.preserve_format)
