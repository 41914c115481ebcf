"""SecViT in one file: a vision backbone with attention inside equal clusters of similar tokens.

Fan, Huang, Chen, He: "Semantic Equitable Clustering: A Simple, Fast and Effective Strategy for
Vision Transformer", arXiv 2405.13337v1 (later versions have another title).

The mean of the keys is the one cluster centre. Each head sorts its tokens once, by their cosine
similarity to it. The sorted sequence is cut into equal pieces, and attention runs inside each.

Axis names: b batch, n heads, l tokens (h * w), d channels of a head, c clusters, m tokens of a
cluster.

    model = secvit_tiny(num_classes=10)
    logits = model(images)                  # (b 3 height width) -> (b 10), 32 pixels or more
    maps = model.forward_features(images)   # {"0": stride 4, ..., "3": stride 32}, as an FPN wants
    features = maps["3"].mean((2, 3))       # (b 512), for k-NN or a linear probe

Departures from the paper's text: the default is the model that the authors released, since that one
has the reported sizes. It adds rotary position embedding, a convolution in the FFN, a wider head,
LayerScale in Base and Large, and has no GELU after the last stem convolution; `PAPER_TEXT` undoes
all but LayerScale. Appendix E's `forward` returns a name it never sets and leaves LCE out; Eq. 6
is followed here. Section 4.1 gives Tiny's 15M and 2.5G to SecViT-S; Table 1 is right.
"""

import argparse
import math
import re
import textwrap
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

# ----------------------------------------------------------------------- configurations (Table 8)


@dataclass(frozen=True)
class SecViTConfig:
    """All that defines a SecViT; each list has one entry per stage. ValueError for bad values."""

    depths: tuple = (2, 2, 9, 2)  # blocks
    dims: tuple = (64, 128, 256, 512)  # channels
    heads: tuple = (2, 4, 8, 16)
    clusters: tuple = (32, 8, 2, 1)  # Table 7; 1 is full attention
    # Upper limit on tokens per cluster, which adds clusters; 98 matches 224 px; 0: no limit
    cluster_size: int = 0
    ffn_ratio: float = 3  # hidden channels of the FFN, relative to its input
    drop_path: float = 0.0  # stochastic depth of the last block; the rate rises linearly from 0
    num_classes: int = 1000  # 0: no head, the model returns its feature maps
    in_channels: int = 3
    conv_stem: bool = True  # Table 6; False: 4x4 patch embedding and 2x2 patch merging
    cpe: bool = True  # Table 6
    lce: bool = True  # Table 6
    # Parts of the released model that the text does not mention:
    rope: bool = True  # rotary position embedding of queries and keys
    ffn_conv: bool = True  # 3x3 depth-wise convolution in the FFN
    head_width: int = 1024  # channels of a 1x1 convolution before the classifier; 0: none
    layer_scale: tuple = (0, 0, 0, 0)  # initial value of LayerScale; 0: none
    # A part of the text that the released model does not have:
    stem_gelu: bool = False  # GELU after the last convolution of the stem

    def __post_init__(self):
        lists = {name: getattr(self, name)
                 for name in ("depths", "dims", "heads", "clusters", "layer_scale")}
        for name, entries in lists.items():  # JSON's lists become tuples
            lists[name] = tuple(entries) if isinstance(entries, (list, tuple)) else (entries,)
            object.__setattr__(self, name, lists[name])
        if len({len(entries) for entries in lists.values()}) > 1 or not self.depths:
            raise ValueError(f"these lists must have one entry per stage: {lists}")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            least = name in ("depths", "dims", "heads", "clusters", "in_channels")
            kind = Real if name in ("ffn_ratio", "drop_path", "layer_scale") else Integral
            if not all(isinstance(entry, kind) and least <= entry < math.inf
                       for entry in lists.get(name, [value])):
                raise ValueError(f"{name} {value}: must be {least:d} or more"
                                 + " and whole" * (kind is Integral))
        for dim, heads in zip(self.dims, self.heads):
            factor = heads * 4 if self.rope else heads
            if dim % factor:
                raise ValueError(f"dims {self.dims}, heads {self.heads}: make {dim} a multiple of "
                                 f"{factor}{', or set rope=False' * self.rope}")
        if self.conv_stem and self.dims[0] % 2:
            raise ValueError(f"dims {self.dims}: the first must be even, for conv_stem")
        if self.drop_path >= 1 or self.ffn_ratio * min(self.dims) < 1:
            raise ValueError(f"drop_path {self.drop_path} must be below 1, and ffn_ratio "
                             f"{self.ffn_ratio} must leave the FFN a channel")


LATE = (0, 0, 1e-6, 1e-6)  # LayerScale in stages 3 and 4
VARIANTS = {  # stochastic depth is section 4.1's
    "tiny": SecViTConfig((2, 2, 9, 2), (64, 128, 256, 512), (2, 4, 8, 16), drop_path=0.1),
    "small": SecViTConfig((3, 4, 18, 4), (64, 128, 256, 512), (2, 4, 8, 16), drop_path=0.15),
    "base": SecViTConfig(
        (4, 8, 26, 8), (80, 160, 320, 512), (5, 5, 10, 16), drop_path=0.4, layer_scale=LATE),
    "large": SecViTConfig(
        (4, 8, 26, 8), (112, 224, 448, 640), (7, 7, 14, 20), drop_path=0.5, layer_scale=LATE),
}
REPORTED = {  # Table 1: parameters in M, FLOPs in G, ImageNet top-1 in %
    "tiny": (15, 2.5, 82.6), "small": (27, 4.4, 84.2), "base": (55, 9.7, 85.0),
    "large": (96, 18.1, 85.6)}
PAPER_TEXT = dict(rope=False, ffn_conv=False, head_width=0, stem_gelu=True)

# ------------------------------------------------------- semantic equitable clustering (Eq. 2 to 4)


def similarity(k):
    """Cosine similarity of each token to its head's centre. Keys (b n l d) -> (b n l)."""
    # Half precision is added up in float32, the result's type; a matrix product would be rounded.
    precise = torch.float64 if k.dtype == torch.float64 else torch.float32
    k = rearrange(k, "b n l d -> b l n d")  # the order in memory, in which the norm is fastest
    center = k.mean(dim=1, keepdim=True, dtype=precise)  # Eq. 2
    lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=precise) for x in (k, center)]
    product = torch.mul(*lengths).clamp_min(torch.finfo(precise).tiny)
    sim = (k * center).sum(-1) / product  # Eq. 3
    return rearrange(sim, "b l n -> b n l")


def cluster_order(k):
    """Token numbers, the most similar to the centre first. Keys (b n l d) -> (b n l)."""
    return similarity(k.detach()).argsort(dim=-1, descending=True)  # Eq. 3


def cluster_labels(k, clusters):
    """The cluster of each token, 0 the most similar to the centre. Keys (b n l d) -> (b n l)."""
    order = cluster_order(k)
    pieces = torch.zeros_like(order[0, 0]).tensor_split(min(clusters, order.shape[-1]))
    label = torch.cat([piece + number for number, piece in enumerate(pieces)])
    return order.scatter(-1, order, label.expand_as(order))


def row_numbers(order):
    """Rows of each token before and after sorting. Order (b n l) -> (b n l), (b n l).

    A row is the d channels of one token in one head. In memory, rows have the order (b l n) before
    sorting and (b n l) after it. Each result is the inverse permutation of the other.
    """
    b, n, l = order.shape
    numbers = torch.arange(order.numel(), device=order.device)
    first = rearrange(numbers, "(b l n) -> b n l", b=b, n=n)[..., :1]  # of each picture and head
    before = torch.add(first, order, alpha=n).flatten()
    after = before.scatter(0, before, numbers)  # a second sort would cost more
    return before.view(b, n, l), after.view(b, n, l)


class PermuteRows(torch.autograd.Function):
    """x (r d), rows (r), their inverse permutation (r) -> x[rows], (r d).

    The gradient is permuted by the inverse. torch's own would add rows to zeros, which takes atomic
    operations on a GPU. `in_words`: whether to move each row as 64-bit words.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rows, inverse, in_words):
        if not in_words:
            return x.index_select(0, rows)
        words = x.contiguous().view(torch.int64)
        return torch.empty_like(words).index_copy_(0, inverse, words).view(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, rows, inverse, ctx.in_words = inputs
        ctx.save_for_backward(rows, inverse)
        ctx.save_for_forward(rows, inverse)

    @staticmethod
    def backward(ctx, gradient):
        rows, inverse = ctx.saved_tensors
        return PermuteRows.apply(gradient, inverse, rows, ctx.in_words), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return PermuteRows.apply(tangent, *ctx.saved_tensors, ctx.in_words)


@torch.compiler.allow_in_graph  # torch.compile cannot look into a Function with a jvp
def permute(*arguments):
    return PermuteRows.apply(*arguments)


def permute_rows(x, rows, inverse):
    """x (r d), two from `row_numbers`, each (b n l) with r = b n l -> x[rows], (r d)."""
    if torch.jit.is_tracing():  # a trace holds torch's own operations only
        return x.index_select(0, rows.flatten())
    # In stage 1 on an H100 index_select takes 0.51 ms, index_copy_ of words 0.06 ms. A compiler
    # writes its own kernels, and cannot view its buffers as words.
    in_words = x.is_cuda and not torch.compiler.is_compiling() and x.shape[1] * x.itemsize % 8 == 0
    return permute(x, rows.flatten(), inverse.flatten(), in_words)


def group(x, rows, clusters):
    """Sorts the tokens of each head and cuts the sequence into c = min(clusters, l) clusters.

    x (b n l d), rows from `row_numbers` -> [(b (n c) m d)], one tensor where c divides l. Else two,
    clusters of m + 1 tokens before those of m, as torch.tensor_split does: nothing to pad or mask.
    """
    b, n, l, _ = x.shape
    x = permute_rows(rearrange(x, "b n l d -> (b l n) d"), *rows)
    x = rearrange(x, "(b n l) d -> b n l d", b=b, n=n)  # Eq. 3: Q*, K*, V*
    c = min(clusters, l)
    m, longer = l // c, l % c
    parts = x.tensor_split([longer * (m + 1)], dim=2) if longer else [x]
    return [rearrange(part, "b n (c m) d -> b (n c) m d", m=size)  # Eq. 4
            for part, size in zip(parts, (m + 1, m) if longer else (m,))]


def ungroup(parts, rows):
    """Puts grouped tokens back into their places. [(b (n c) m d)], rows -> (b n l d)."""
    b, n, _ = rows[0].shape
    parts = [rearrange(part, "b (n c) m d -> b n (c m) d", n=n) for part in parts]
    x = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    x = permute_rows(rearrange(x, "b n l d -> (b n l) d"), *reversed(rows))
    return rearrange(x, "(b l n) d -> b n l d", b=b, n=n)


# ------------------------------------------------------------------------- attention (Eq. 5 and 6)


def rotation(h, w, d, like):
    """Cosine and sine of each channel's rotary angle, (2 h w 1 d), in the dtype of `like`.

    Not in the paper: it is what the release does. The first half of the channels turns with the
    row, the second with the column, at frequencies from 1 down to 1 / 10000. Adjacent channels x, y
    become x cos a - y sin a, y cos a + x sin a. So they have the angles -a and a here.
    """
    precise = torch.float64 if like.dtype == torch.float64 else torch.float32
    frequency = torch.logspace(0, -4, d // 4, dtype=precise, device=like.device)
    frequency = torch.stack((-frequency, frequency), dim=-1).flatten()
    angles = [torch.arange(side, dtype=precise, device=like.device)[:, None] * frequency
              for side in (h, w)]
    row, column = (torch.stack((angle.cos(), angle.sin())).to(like.dtype) for angle in angles)
    row, column = row[:, :, None].expand(-1, h, w, -1), column[:, None].expand(-1, h, w, -1)
    return torch.cat((row, column), dim=-1)[..., None, :]


def rotate(x, turn):
    """Turns adjacent channels as points in a plane. x (b h w n d), turn from `rotation` -> as x."""
    cos, sin = turn.type_as(x)
    points = rearrange(x, "b h w n (p two) -> b h w n p two", two=2)
    if x.itemsize >= 4 and not torch.compiler.is_compiling():  # where complex numbers are fast
        turn = torch.complex(cos[..., 1::2], sin[..., 1::2])
        points = torch.view_as_real(torch.view_as_complex(points) * turn)
        return rearrange(points, "b h w n p two -> b h w n (p two)")
    swapped = rearrange(points.flip(-1), "b h w n p two -> b h w n (p two)")
    return torch.addcmul(x * cos, swapped, sin)


class DepthwiseConv(nn.Conv2d):
    """A depth-wise convolution on tokens, (b h w c) -> (b h w c). `residual` adds its input."""

    def __init__(self, dim, kernel, *, residual=False):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.residual = residual

    def forward(self, x):
        weight = self.weight
        if self.residual:  # a one in the middle of the kernel, which saves a pass over the tokens
            taps = weight[0].numel()
            one = torch.eye(taps, dtype=weight.dtype, device=weight.device)[taps // 2]
            weight = weight + one.view_as(weight[0])
        x = rearrange(x, "b h w c -> b c h w")  # a picture in channels_last memory, without a copy
        return rearrange(self._conv_forward(x, weight, self.bias), "b c h w -> b h w c")


def attention(q, k, v):
    """Softmax attention in each cluster (Eq. 5). Queries, keys, values (b n m d) -> (b n m d)."""
    if q.is_cpu and q.dtype == torch.bfloat16 and q.shape[2] <= 256:  # twice as fast here
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SECA(nn.Module):
    """Semantic equitable clustering attention, with local context enhancement (LCE)."""

    def __init__(self, dim, *, heads, clusters, cluster_size=0, lce=True):
        super().__init__()
        self.heads, self.clusters, self.cluster_size = heads, clusters, cluster_size
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lce = DepthwiseConv(dim, 5) if lce else None
        self.out_proj = nn.Linear(dim, dim)

    def qkv(self, x, turn=None):
        """Tokens (b h w c) and the turn from `rotation` -> queries, keys, values (b n l d)."""
        q, k, v = (rearrange(linear(x), "b h w (n d) -> b h w n d", n=self.heads)
                   for linear in (self.q, self.k, self.v))  # Eq. 2
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return [rearrange(t, "b h w n d -> b n (h w) d") for t in (q, k, v)]

    def forward(self, x, turn=None):
        """(b h w c) -> (b h w c)."""
        q, k, v = self.qkv(x, turn)
        clusters = self.clusters
        if self.cluster_size:  # enough to keep to the limit
            clusters = max(clusters, (k.shape[2] - 1) // self.cluster_size + 1)
        if clusters > 1:
            rows = row_numbers(cluster_order(k))  # Eq. 2, 3
            parts = zip(*(group(t, rows, clusters) for t in (q, k, v)))  # Eq. 3, 4
            y = ungroup([attention(*part) for part in parts], rows)  # Eq. 5
        else:
            y = attention(q, k, v)
        y, v = (rearrange(t, "b n (h w) d -> b h w (n d)", h=x.shape[1]) for t in (y, v))
        return self.out_proj(y if self.lce is None else y + self.lce(v))  # Eq. 6


# ------------------------------------------------------------------------------- block (Eq. 1)


class FFN(nn.Module):
    """Linear, GELU, linear; the release adds a depth-wise convolution with its own residual."""

    def __init__(self, dim, hidden, *, conv):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = DepthwiseConv(hidden, 3, residual=True) if conv else None

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        return self.fc2(x if self.dwconv is None else self.dwconv(x))


class LayerNorm(nn.LayerNorm):
    """Stays in half precision under autocast, where torch's layer norm on a GPU is float32."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # adds up in float32
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerScale(nn.Module):
    """A learned factor for each channel, so small at first that a branch adds almost nothing."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma, self.value = nn.Parameter(torch.empty(dim)), value

    def reset_parameters(self):
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x):
        return x * self.gamma.to(x.dtype)  # half precision stays so under autocast


class Block(nn.Module):
    """Conditional positional encoding (CPE), SECA, FFN. (b h w c) -> (b h w c)."""

    def __init__(self, dim, *, heads, clusters, cluster_size=0, ffn_ratio=3, drop_path=0.0,
                 layer_scale=0, cpe=True, lce=True, ffn_conv=True):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3) if cpe else None
        self.norm1, self.norm2 = LayerNorm(dim, eps=1e-6), LayerNorm(dim, eps=1e-6)
        self.attn = SECA(dim, heads=heads, clusters=clusters, cluster_size=cluster_size, lce=lce)
        self.ffn = FFN(dim, int(dim * ffn_ratio), conv=ffn_conv)
        self.scale1, self.scale2 = (
            LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, turn=None):
        x = x if self.cpe is None else x + self.cpe(x)  # Eq. 1, line 1
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), turn)))  # line 2
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))  # line 3


# -------------------------------------------------------------------------- backbone (Fig. 3a)


def embedding(inputs, dim, stride, *, conv_stem, gelu):
    """(b inputs h w) -> (b dim h/stride w/stride). Sides are rounded up (Appendix A), or down."""
    if not conv_stem:  # Table 6
        return nn.Sequential(nn.Conv2d(inputs, dim, stride, stride), nn.BatchNorm2d(dim))
    stem, layers = ((dim // 2, 2), (dim // 2, 1), (dim // 2, 1), (dim, 2)), []
    for outputs, step in stem if stride == 4 else ((dim, 2),):
        layers += [nn.Conv2d(inputs, outputs, 3, step, 1), nn.BatchNorm2d(outputs), nn.GELU()]
        inputs = outputs
    return nn.Sequential(*layers if gelu else layers[:-1])


class Stage(nn.Module):
    """An embedding that lowers the resolution, then blocks. (b c h w) -> (b c' h' w')."""

    def __init__(self, embed, blocks, rotary_dim):  # channels of a head; 0: no rotary embedding
        super().__init__()
        self.embed, self.blocks, self.rotary_dim = embed, nn.ModuleList(blocks), rotary_dim

    def forward(self, x):
        x = rearrange(self.embed(x), "b c h w -> b h w c")
        turn = rotation(*x.shape[1:3], self.rotary_dim, x) if self.rotary_dim else None
        for block in self.blocks:
            x = block(x, turn)
        return rearrange(x, "b h w c -> b c h w")


class SecViT(nn.Module):
    """Stages, then a classifier unless `config.num_classes` is 0."""

    def __init__(self, config=VARIANTS["tiny"]):
        super().__init__()
        self.config, cfg = config, config
        total = sum(cfg.depths)
        rates = iter([cfg.drop_path * i / max(total - 1, 1) for i in range(total)])
        self.stages, inputs = nn.ModuleList(), cfg.in_channels
        for i, dim in enumerate(cfg.dims):
            embed = embedding(inputs, dim, 2 if i else 4, conv_stem=cfg.conv_stem,
                              gelu=cfg.stem_gelu and not i)
            blocks = [
                Block(dim, heads=cfg.heads[i], clusters=cfg.clusters[i], ffn_ratio=cfg.ffn_ratio,
                      cluster_size=cfg.cluster_size, drop_path=next(rates), cpe=cfg.cpe,
                      layer_scale=cfg.layer_scale[i], lce=cfg.lce, ffn_conv=cfg.ffn_conv)
                for _ in range(cfg.depths[i])]
            self.stages.append(Stage(embed, blocks, dim // cfg.heads[i] if cfg.rope else 0))
            inputs = dim
        wide = cfg.head_width
        self.head = nn.Sequential(
            nn.Conv2d(dim, wide, 1) if wide else nn.Identity(), nn.BatchNorm2d(wide or dim),
            nn.SiLU() if wide else nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(wide or dim, cfg.num_classes)) if cfg.num_classes else None
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """Draws the weights of one layer. For `apply`, also after `to_empty` of a meta model."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward_features(self, x):
        """Pictures (b in_channels height width) -> {"0": (b c h w), ...}, one map for each stage.

        The strides are 4, 8, 16 and 32; sizes are rounded up (down without `conv_stem`). The maps
        are in channels_last memory: `flatten` works on them, `view` does not. ValueError for an
        empty batch, a side below 32 or another number of channels. torch.export takes any batch
        (with torch 2.11, of 2 or more) and multiples of 32 from 64 on as sides. torch.compile needs
        dynamic=False, since one graph for all sizes takes too long to build. A model from
        torch.jit.trace is right only for the size of picture that it was traced with.
        """
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[0] < 1 or x.shape[1] != channels or min(x.shape[2:]) < 32:
            raise ValueError(f"resize or convert pictures {tuple(x.shape)} to (batch of 1 or more, "
                             f"{channels}, height, width) with sides of 32 or more")
        x, maps = rearrange(x, "b c h w -> b h w c").contiguous(), {}  # channels_last, also in vmap
        x = rearrange(x, "b h w c -> b c h w")
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x)
        return maps

    def forward(self, x):
        """Logits (b num_classes), or what `forward_features` returns if there is no head."""
        maps = self.forward_features(x)
        return self.head(next(reversed(maps.values()))) if self.head else maps


def create_secvit(name, **changes):
    """The variant of that name, with fields of SecViTConfig changed. ValueError for other names."""
    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    return SecViT(replace(VARIANTS[name], **changes))


secvit_tiny, secvit_small, secvit_base, secvit_large = (
    partial(create_secvit, name) for name in VARIANTS)

# ----------------------------------------------------------------------------- weights and counts

RELEASED_NAMES = (  # what the released checkpoints call our parts; replaced from the top
    (".patch_embed.proj.", ".stages.0.embed."), (".layers.0.downsample.", ".stages.1.embed."),
    (".layers.1.downsample.", ".stages.2.embed."), (".layers.2.downsample.", ".stages.3.embed."),
    (".reduction.", ".0."), (".embed.norm.", ".embed.1."), (".layers.", ".stages."),
    (".norm1.norm.", ".norm1."), (".norm2.norm.", ".norm2."), (".pos.", ".cpe."),
    (".lepe.", ".lce."), (".gamma_1", ".scale1.gamma"), (".gamma_2", ".scale2.gamma"),
    (".proj.", ".head.0."), (".norm.", ".head.1."),
    (".head.weight", ".head.5.weight"), (".head.bias", ".head.5.bias"))


def read_checkpoint(path):
    """The dict in a checkpoint file. Only tensors and plain values load: it cannot run code.

    ValueError for any other file, or none.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of the released checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise almost anything
        _, refused, name = str(error).partition("GLOBAL ")  # a type that could run code
        why = (refused + name.split()[0] if refused else getattr(error, "strerror", None)
               or f"it is damaged, or no checkpoint ({type(error).__name__}): choose another file")
        raise ValueError(f"{path} cannot be read as a checkpoint: {why}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict: choose another")
    return checkpoint


def load_weights(model, checkpoint, *, new_head=False):
    """Loads our weights or the released ones into the model; a backbone ignores the head's.

    checkpoint: a file, or a dict of weights, which may lie under "model", "model_ema" or
    "state_dict", with names that may begin with "module." (DDP) or "_orig_mod." (torch.compile).
    With new_head=True the model keeps its own classifier where the number of classes differs;
    returns whether it did. ValueError names the weights that are missing, unexpected or of another
    shape, or the fields in which the checkpoint's configuration computes something else, and
    leaves the model as it was.
    """
    checkpoint = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    own, config, given = model.state_dict(), asdict(model.config), {}
    saved = checkpoint.get("config")
    if isinstance(saved, dict) and "depths" in saved:  # ours
        theirs = asdict(SecViTConfig()) | saved  # a field that is newer has its default
        free = {"num_classes", "drop_path", "layer_scale", "" if model.head else "head_width"}
        other = [f"{name} {theirs[name]}, not {config[name]}" for name in config
                 if theirs[name] != config[name] and name not in free]
        if other:
            raise ValueError(f"this checkpoint's model has {'; '.join(other)}: build that one, or "
                             "load only what lies under \"model\" if you know that it fits")
    checkpoint = next((checkpoint[name] for name in ("model", "model_ema", "state_dict")
                       if isinstance(checkpoint.get(name), dict)), checkpoint)
    for key, value in checkpoint.items():
        key = re.sub(r"^((module|_orig_mod)\.)*", "", str(key))
        for theirs, ours in RELEASED_NAMES if key not in own else ():
            key = f".{key}".replace(theirs, ours)[1:]
        if (key.endswith("RoPE.angle") or key == "n_averaged" or not torch.is_tensor(value)
                or key.startswith("head.") and not model.head):
            continue  # is computed here, or has no place in the model
        for name, weight in zip("qkv", value.chunk(3)) if ".qkv." in key else [("qkv", value)]:
            name = key.replace("qkv", name)
            if name in own and weight.squeeze().shape == own[name].squeeze().shape:
                weight = weight.reshape(own[name].shape)  # 1x1 convolutions are linear layers here
            given[name] = weight
    classifier = {key: own[key] for key in ("head.5.weight", "head.5.bias") if new_head
                  and key in given.keys() & own.keys() and given[key].shape != own[key].shape}
    trial = deepcopy(model)  # fails before the model has changed
    try:
        trial.load_state_dict(given | classifier)
    except RuntimeError as error:
        wrong = "; ".join(textwrap.shorten(line, 300) for line in str(error).splitlines()[1:7])
        hint = "; for other classes say new_head=True" if "head.5" in wrong else ""
        raise ValueError(f"these are the weights of another model: {wrong}{hint}") from None
    model.load_state_dict(given | classifier)
    return bool(classifier)


@torch.no_grad()
def count(model, size=224):
    """Parameters, multiply-adds of a size x size picture, and those of QK^T and AV among them.

    torch counts convolutions and matrix products only, so Eq. 3 (0.04 % in Tiny) is left out.
    """
    counter, weight = FlopCounterMode(display=False), next(model.parameters())
    picture = torch.zeros(1, weight.shape[1], size, size).to(weight)
    modes = [(module, module.training) for module in model.modules()]
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as the two products it stands for
        model.eval()(picture)
    for module, training in modes:
        module.training = training
    products = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops() // 2, products // 2


if __name__ == "__main__":
    print("Counted at 224x224 | reported in the paper, whose FLOPs are nearest to the last count")
    print("             parameters  multiply-adds  without QK^T, AV | params   FLOPs   top-1")
    for variant, (params, flops, top1) in REPORTED.items():
        with torch.device("meta"):  # shapes without numbers
            total, macs, products = count(create_secvit(variant))
        print(f"SecViT-{variant:5}{total:11,}{macs / 1e9:13.3f} G{(macs - products) / 1e9:16.3f} G"
              f" |{params:5} M{flops:6} G{top1:6} %")
