"""Properties of secvit.py and train.py. `pytest` runs all of them on two CPU cores in minutes."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import secvit
import train
from secvit import (PAPER_TEXT, SECA, VARIANTS, SecViT, SecViTConfig, cluster_labels,
                    cluster_order, count, create_secvit, group, load_weights, rotate, rotation,
                    similarity, ungroup)

HERE = Path(__file__).parent
SMALL = dict(depths=(1, 1, 2, 1), dims=(16, 32, 32, 64), heads=(2, 2, 4, 4), head_width=32,
             num_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- clustering


@pytest.mark.parametrize("l, clusters", [(96, 8), (96, 32), (49, 1), (63, 32), (101, 8), (5, 32)])
def test_clusters_are_equal_or_differ_by_one_token(l, clusters):
    k = torch.randn(2, 3, l, 8)
    sizes = [part.shape[2] for part in group(k, cluster_order(k), clusters)
             for _ in range(len(part) // 2)]
    assert sum(sizes) == l and len(sizes) == min(clusters, l)
    assert max(sizes) - min(sizes) == (l % len(sizes) > 0)
    for labels in cluster_labels(k, clusters).flatten(0, 1):
        assert sorted(labels.bincount().tolist(), reverse=True) == sorted(sizes, reverse=True)


@pytest.mark.parametrize("l, clusters", [(96, 8), (63, 32), (5, 32), (7, 1)])
def test_ungroup_after_group_is_the_identity(l, clusters):
    order = torch.rand(2, 3, l).argsort(dim=-1)
    for x in (torch.randn(2, 3, l, 4), torch.randn(2, l, 3, 4).transpose(1, 2)):
        assert torch.equal(ungroup(group(x, order, clusters), order), x)


def test_group_is_a_gather_and_its_gradient_is_exact():
    x = torch.randn(2, 3, 11, 4, dtype=torch.float64, requires_grad=True)
    order = torch.rand(2, 3, 11).argsort(dim=-1)
    rows = torch.cat([rearrange(part, "(b c) n m d -> b n (c m) d", b=2) for part in group(x, order, 4)], 2)
    assert torch.equal(rows, x.gather(2, order[..., None].expand_as(x)))
    assert torch.autograd.gradcheck(lambda x: group(x, order, 4), x)
    assert torch.autograd.gradcheck(lambda x: ungroup(group(x, order, 4)[::1], order) ** 2, x)


def test_similarity_is_the_cosine_to_the_mean_key_of_the_head():
    k = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    for keys, s in zip(k.flatten(0, 1), similarity(k).flatten(0, 1)):
        mean = keys.mean(0)
        expected = torch.stack([key @ mean / key.norm() / mean.norm() for key in keys])
        torch.testing.assert_close(s, expected)


def test_similarity_is_float32_under_autocast():
    k = torch.randn(1, 1, 500, 32) + 5  # cosines so close that half precision would tie them
    with torch.autocast("cpu", torch.bfloat16):
        s = similarity(k)
        half = similarity(k.bfloat16())
    assert s.dtype == half.dtype == torch.float32
    assert len(s.unique()) > 490
    assert torch.equal(s, similarity(k))


@pytest.mark.parametrize("clusters", [2, 7, 32])
def test_labels_are_the_quantiles_of_the_similarity(clusters):
    k = torch.randn(2, 3, 64, 8)
    labels, s = cluster_labels(k, clusters), similarity(k)
    for label in range(clusters - 1):  # every token of a cluster is nearer than all of the next
        nearer = s.masked_fill(labels != label, math.inf).amin(-1)
        farther = s.masked_fill(labels != label + 1, -math.inf).amax(-1)
        assert (nearer >= farther).all()


# ---------------------------------------------------------------------------------------- attention


def naive_seca(seca, x, turn=None):
    """Eq. 2 to 6 with loops: over pictures, heads and clusters."""
    b, h, w, c = x.shape
    n, d = seca.heads, c // seca.heads
    q, k, v = (linear(x).reshape(b, h, w, n, d) for linear in (seca.q, seca.k, seca.v))
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    out = torch.zeros(b, h * w, n, d, dtype=x.dtype)
    for i in range(b):
        for head in range(n):
            Q, K, V = (t[i, :, :, head].reshape(h * w, d) for t in (q, k, v))
            k_c = K.mean(0)
            sim = torch.stack([key @ k_c / (key.norm() * k_c.norm()) for key in K])
            idx = sim.argsort(descending=True)
            for part in idx.tensor_split(min(seca.clusters, h * w)):
                out[i, part, head] = torch.softmax(Q[part] @ K[part].T / d**0.5, -1) @ V[part]
    y = out.reshape(b, h, w, c)
    if seca.lce is not None:
        weight, bias = seca.lce.weight, seca.lce.bias
        values = F.pad(v.reshape(b, h, w, c), (0, 0, 2, 2, 2, 2))
        for dy in range(5):
            for dx in range(5):
                y = y + weight[:, 0, dy, dx] * values[:, dy : dy + h, dx : dx + w]
        y = y + bias
    return seca.out_proj(y)


@pytest.mark.parametrize("h, w, clusters", [(8, 8, 4), (7, 9, 8), (3, 2, 8), (5, 5, 1)])
@pytest.mark.parametrize("lce, rope", [(True, True), (False, False)])
def test_seca_is_the_loop_over_clusters(h, w, clusters, lce, rope):
    seca = SECA(24, heads=3, clusters=clusters, lce=lce).double()
    x = torch.randn(2, h, w, 24, dtype=torch.float64)
    turn = rotation(h, w, 8, x) if rope else None
    torch.testing.assert_close(seca(x, turn), naive_seca(seca, x, turn), rtol=1e-10, atol=1e-12)


def test_one_cluster_is_full_attention():
    seca = SECA(24, heads=3, clusters=1, lce=False).double()
    reference = torch.nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    parts = (seca.q, seca.k, seca.v)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(seca.out_proj.state_dict())
    x = torch.randn(2, 6, 7, 24, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(seca(x).flatten(1, 2), reference(tokens, tokens, tokens)[0])


@pytest.mark.parametrize("clusters", [1, 4, 5])
def test_permuting_tokens_permutes_the_output(clusters):
    seca = SECA(16, heads=2, clusters=clusters, lce=False).double()
    x, p = torch.randn(2, 8, 8, 16, dtype=torch.float64), torch.randperm(64)
    shuffled = x.flatten(1, 2)[:, p].view_as(x)
    torch.testing.assert_close(seca(shuffled).flatten(1, 2), seca(x).flatten(1, 2)[:, p])


def test_rotary_position_is_relative_and_keeps_lengths():
    q, k = torch.randn(2, 1, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 9, 9, 1, 16)
    turn = rotation(9, 9, 16, q)
    q, k = rotate(q, turn)[0, :, :, 0], rotate(k, turn)[0, :, :, 0]
    torch.testing.assert_close(q[4, 5] @ k[2, 1], q[6, 8] @ k[4, 4])
    assert not torch.isclose(q[4, 5] @ k[2, 1], q[4, 5] @ k[1, 2])
    torch.testing.assert_close(q.norm(dim=-1), q[0, 0].norm().expand(9, 9))


# -------------------------------------------------------------------------------------------- model


def test_gradients_reach_every_parameter():
    model = SecViT(SecViTConfig(**SMALL, layer_scale=(1e-2,) * 4))
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    # BN takes a constant away, so the bias of a convolution before it has no gradient to speak of;
    # so has the key's bias without position, since softmax takes away what all keys share.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    dead = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert dead == []


COUNTS = {  # parameters; those of the paper's text alone; multiply-adds of the released model, G
    "tiny": (14981800, 13832104, 2.707), "small": (26776104, 25516968, 4.733),
    "base": (54682776, 53223960, 10.370), "large": (96495096, 94883704, 19.326)}


def products(config):
    """Multiply-adds of QK^T and AV at 224x224: two products of l x l / c x channels, each block."""
    stages = zip(config.depths, config.dims, config.clusters, (3136, 784, 196, 49))
    return sum(depth * 2 * l * l // clusters * dim for depth, dim, clusters, l in stages)


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_of_the_variants(name):
    parameters, text, released_macs = COUNTS[name]
    with torch.device("meta"):
        n, macs, attention = count(create_secvit(name))
        assert n == parameters
        assert sum(p.numel() for p in create_secvit(name, **PAPER_TEXT).parameters()) == text
    config = VARIANTS[name]
    assert attention == products(config)
    # The release has Eq. 3's product with the centre as a matrix product, which a counter sees.
    center = sum(depth * dim * l for depth, dim, l in zip(config.depths, config.dims, (
        3136, 784, 196)))
    assert abs((macs + center) / 1e9 - released_macs) < 6e-4


@pytest.mark.parametrize("changes, parameters, macs", [
    (dict(conv_stem=False), 14.09, 2.11), (dict(lce=False), 14.89, None),
    (dict(cpe=False), 14.95 - 0.005, None)])
def test_counts_of_table_6(changes, parameters, macs):
    with torch.device("meta"):
        n, everything, attention = count(create_secvit("tiny", **changes))
    assert abs(n / 1e6 - parameters) < 6e-3
    assert macs is None or abs((everything - attention) / 1e9 - macs) < 6e-3


def test_counts_of_table_7():
    table = ((64, 16, 4, 1), (64, 16, 2, 1), (64, 8, 2, 1), (32, 8, 2, 1))
    with torch.device("meta"):
        parameters, macs, attention = zip(*(
            count(create_secvit("small", clusters=clusters)) for clusters in table))
    assert len({*parameters}) == 1
    assert list(macs) == sorted({*macs})  # the fewer clusters, the more to multiply
    assert len({m - a for m, a in zip(macs, attention)}) == 1  # but in attention's products alone
    assert list(attention) == [products(replace(VARIANTS["small"], clusters=c)) for c in table]


def test_every_field_changes_the_model():
    base = SecViTConfig(**SMALL, clusters=(8, 4, 2, 1))
    other = dict(depths=(1, 1, 1, 1), dims=(16, 32, 32, 32), heads=(1, 2, 4, 4), ffn_ratio=2,
                 clusters=(4, 4, 2, 1), cluster_size=3, drop_path=0.9, num_classes=6, in_channels=1, rope=False,
                 conv_stem=False, cpe=False, lce=False, ffn_conv=False, head_width=0,
                 layer_scale=(0, 0, 0, 0.5), stem_gelu=True)
    assert {*other} == {field.name for field in fields(SecViTConfig)}

    def behaviour(config):
        torch.manual_seed(0)
        model = SecViT(config)
        shapes = [tuple(p.shape) for p in model.parameters()]
        return shapes, model(torch.randn(2, config.in_channels, 64, 64)).tolist()

    assert behaviour(base) == behaviour(replace(base))
    for name, value in other.items():
        assert behaviour(base) != behaviour(replace(base, **{name: value})), name


@pytest.mark.parametrize("h, w", [(32, 32), (33, 47), (250, 250), (75, 131), (224, 100)])
@pytest.mark.parametrize("conv_stem", [True, False])
def test_any_size_from_32_up(h, w, conv_stem):
    model = SecViT(SecViTConfig(**SMALL, conv_stem=conv_stem)).eval()
    with torch.no_grad():
        maps = model.forward_features(torch.randn(1, 3, h, w))
    assert list(maps) == ["0", "1", "2", "3"]
    for i, y in enumerate(maps.values()):
        stride = 4 * 2**i
        assert y.shape == (1, SMALL["dims"][i], *(-(-s // stride) if conv_stem else s // stride for s in (h, w)))
        assert y.isfinite().all()


def test_without_classes_it_is_a_backbone_for_an_fpn():
    from torchvision.ops import FeaturePyramidNetwork
    model = SecViT(SecViTConfig(**SMALL | dict(num_classes=0)))
    assert not any(name.startswith("head") for name, _ in model.named_parameters())
    pyramid = torch.nn.Sequential(model, FeaturePyramidNetwork(model.config.dims, 8))
    shapes = {name: tuple(y.shape) for name, y in pyramid(torch.randn(1, 3, 70, 90)).items()}
    assert shapes == {"0": (1, 8, 18, 23), "1": (1, 8, 9, 12), "2": (1, 8, 5, 6), "3": (1, 8, 3, 3)}


def test_channels_last_and_contiguous_pictures_agree():
    model = SecViT(SecViTConfig(**SMALL)).eval()
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(x), model(x.to(memory_format=torch.channels_last)))
    assert all(y.is_contiguous(memory_format=torch.channels_last)
               for y in model.forward_features(x).values())


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_stays_close(dtype, limit):
    config = replace(VARIANTS["tiny"], depths=(1, 1, 1, 1))
    for clusters, bound in (((1, 1, 1, 1), limit), (config.clusters, 0.12)):
        # With more than one cluster, a rounded token may cross a border: its neighbours change.
        model = SecViT(replace(config, clusters=clusters)).eval()
        load_weights(model, released_weights(config))
        x = torch.randn(2, 3, 96, 96)
        with torch.no_grad():
            exact = model.forward_features(x)
            with torch.autocast("cpu", dtype):
                half = model.forward_features(x)
        for name in exact:
            assert 0 < (half[name] - exact[name]).norm() / exact[name].norm() < bound


def test_export_and_fullgraph_agree_with_eager():
    model, x = SecViT(SecViTConfig(**SMALL)).eval(), torch.randn(2, 3, 50, 64)
    with torch.no_grad():
        expected = model(x)
        any_batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
        exported = torch.export.export(model, (x,), dynamic_shapes=any_batch).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(exported(x[:1]), expected[:1])
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(graph(x), expected)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_agrees_with_eager():
    block = secvit.Block(16, heads=2, clusters=3, ffn_ratio=2)
    x = torch.randn(2, 5, 5, 16, requires_grad=True)
    y = block(x, rotation(5, 5, 8, x))
    grad, = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(block, fullgraph=True)(x, rotation(5, 5, 8, x))
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), x)[0], grad)


@pytest.mark.parametrize("make, words", [
    (lambda: create_secvit("huge"), ["'huge'", "tiny, small, base, large"]),
    (lambda: SecViTConfig(depths=(2, 2)), ["entry a stage", "(2, 2)"]),
    (lambda: SecViTConfig(dims=(60, 128, 256, 512), heads=(7, 4, 8, 16)), ["60", "7"]),
    (lambda: SecViTConfig(dims=(12, 24, 48, 96)), ["12", "rope"]),
    (lambda: SecViTConfig(clusters=(32, 8, 0, 1)), ["clusters", "1 or more"]),
    (lambda: SecViTConfig(drop_path=1.0), ["drop_path"]),
    (lambda: SecViT(SecViTConfig(**SMALL))(torch.zeros(1, 3, 31, 64)), ["31", "32 or more"]),
    (lambda: SecViT(SecViTConfig(**SMALL))(torch.zeros(1, 1, 64, 64)), ["(1, 1, 64, 64)", "3"]),
    (lambda: SecViT(SecViTConfig(**SMALL))(torch.zeros(3, 64, 64)), ["(3, 64, 64)", "batch"]),
])
def test_what_cannot_be_is_a_value_error_of_one_line(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# --------------------------------------------------------------------------------- released weights


def released_shapes(config):
    """{key: shape} of the authors' checkpoint."""
    def conv(name, outputs, inputs, kernel):
        return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}

    def bn(name, dim):
        parts = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{part}": (dim,) for part in parts} | {f"{name}.num_batches_tracked": ()}

    dims, shapes = config.dims, {}
    for i, (inputs, outputs) in enumerate(zip(
            (3, dims[0] // 2, dims[0] // 2, dims[0] // 2), (dims[0] // 2,) * 3 + (dims[0],))):
        shapes |= conv(f"patch_embed.proj.{3 * i}", outputs, inputs, 3)
        shapes |= bn(f"patch_embed.proj.{3 * i + 1}", outputs)
    for i, dim in enumerate(dims):
        shapes[f"layers.{i}.RoPE.angle"] = (dim // config.heads[i] // 2,)
        for j in range(config.depths[i]):
            name = f"layers.{i}.blocks.{j}"
            for key, outputs, inputs, kernel in (
                    ("attn.qkv", 3 * dim, dim, 1), ("attn.lepe", dim, 1, 5), ("pos", dim, 1, 3),
                    ("attn.out_proj", dim, dim, 1), ("ffn.fc1", 3 * dim, dim, 1),
                    ("ffn.fc2", dim, 3 * dim, 1), ("ffn.dwconv", 3 * dim, 1, 3)):
                shapes |= conv(f"{name}.{key}", outputs, inputs, kernel)
            for key in ("norm1.norm", "norm2.norm"):
                shapes |= {f"{name}.{key}.weight": (dim,), f"{name}.{key}.bias": (dim,)}
            if config.layer_scale[i]:
                shapes |= {f"{name}.gamma_{g}": (1, dim, 1, 1) for g in (1, 2)}
        if i < 3:
            shapes |= conv(f"layers.{i}.downsample.reduction", dims[i + 1], dim, 3)
            shapes |= bn(f"layers.{i}.downsample.norm", dims[i + 1])
    return (shapes | conv("proj", 1024, dims[-1], 1) | bn("norm", 1024)
            | conv("head", config.num_classes, 1024, 1))


def released_weights(config):
    """Values from NumPy's frozen stream, one seed a key: those that GOLDEN was made with."""
    weights = {}
    for seed, (key, shape) in enumerate(sorted(released_shapes(config).items())):
        z = np.random.RandomState(seed).standard_normal(math.prod(shape)).reshape(shape)
        if key.endswith("num_batches_tracked"):
            z = np.zeros((), dtype=np.int64)
        elif key.endswith("running_var"):
            z = np.abs(1 + 0.2 * z) + 0.1
        elif key.endswith("running_mean"):
            z = 0.1 * z
        elif len(shape) == 1:
            z = 1 + 0.1 * z if key.endswith("weight") else 0.05 * z
        elif "gamma" in key:
            z = 0.5 + 0.1 * z
        else:
            z = 0.7 * z / math.sqrt(math.prod(shape[1:]))
        weights[key] = torch.from_numpy(z)
    return weights


def golden_pictures():
    r = np.random.RandomState(2405)
    coarse = r.standard_normal((2, 3, 14, 14)).repeat(16, 2).repeat(16, 3)
    return torch.from_numpy(2 * coarse * r.standard_normal((2, 3, 1, 1))
                            + 0.3 * r.standard_normal((2, 3, 224, 224)))


GOLDEN = {  # outputs of the authors' model in float64: logits, then mean, std and centre of stages
    "tiny": dict(
        logits=[[
            1.996676341579849, 1.981351189695498, -1.9300267131980287, -0.7729331355332147,
            3.2081283495336534, -2.191653472530824, -0.08085998979548413, 0.2786276548750052], [
            2.01311903682577, 2.1588266246806365, -2.418787371038575, -0.6550305269927506,
            3.280223050050948, -2.1097534256154726, -0.30186538249824946, 0.47002908504363294]],
        std=1.8473419648167055, top1=[322, 322], stages=[
            (0.06718454590901383, 1.2644904331552134, [
                -0.14438206507641896, 1.5380790286508779, -0.24872123608138624,
                -1.6604017235081199]),
            (0.13661507549471955, 1.6178118234723022, [
                -2.82177235511035, 0.658269863547233, -0.10296005959364624, 1.1857032955573497]),
            (-0.09462797973435344, 7.036288783246331, [
                -0.9591396352155621, -0.0922869145634328, 1.3431858007808553, 5.391907875934153]),
            (0.10144562185208132, 6.697877952930913, [
                -8.742743948868384, -11.295181678476741, -3.430477399439375, -24.470207848122243]),
        ]),
    "base": dict(
        logits=[[
            188.03600347159417, 312.2912599890157, 145.19169327230924, 239.12919607799085,
            446.7872625826188, -285.1962209730647, -327.9548300702792, 162.8418036246007], [
            227.98826069515562, 327.76066389544724, 173.49696536922818, 250.42142701934895,
            512.1298840088938, -294.55653105549237, -391.75158365304156, 170.98326002925188]],
        std=291.6172948085832, top1=[574, 574], stages=[
            (-0.1539705048011998, 2.38794727923519, [
                -1.766633146035916, 1.1470304724938982, 1.2076177454810448, 1.0631694472370634]),
            (0.033123200248446324, 8.117177281217751, [
                -1.3477115943104125, -0.11185361419145379, -10.330921853376923,
                -1.9178807025187115]),
            (-14.734939423205775, 459.3107705958027, [
                57.16493030433937, 6.976775703889458, -197.05821277024216, 1041.4783260081608]),
            (-16.208447301605954, 1318.9256327858961, [
                30.142128713466512, -455.65781028257754, 211.210937064333, 528.7257560903423]),
        ]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_released_weights_give_the_released_outputs(name):
    model = create_secvit(name).double().eval()
    load_weights(model, {"model_ema": released_weights(model.config)})
    with torch.no_grad():
        maps = model.forward_features(golden_pictures())
        logits = model.head(maps["3"])
    def close(value, expected):
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected).double(),
                                   rtol=1e-6, atol=0)
    golden = GOLDEN[name]
    for i in (0, 1):
        close(logits[i, :8], golden["logits"][i])
    close(logits.std(), golden["std"])
    assert logits.argmax(1).tolist() == golden["top1"]
    for y, (mean, std, center) in zip(maps.values(), golden["stages"]):
        close(y.mean(), mean)
        close(y.std(), std)
        close(y[0, :4, y.shape[2] // 2, y.shape[3] // 2], center)


def test_wrong_weights_are_named_and_change_nothing():
    config = replace(VARIANTS["tiny"], depths=(1, 1, 1, 1))
    model, weights = SecViT(config), released_weights(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del weights["layers.1.blocks.0.ffn.fc1.bias"]
    weights["extra.weight"] = torch.zeros(1)
    weights["head.weight"] = torch.zeros(7, 1024, 1, 1)
    with pytest.raises(ValueError) as error:
        load_weights(model, weights)
    for words in ("Missing key(s) in state_dict: \"stages.1.blocks.0.ffn.fc1.bias\"",
                  "Unexpected key(s) in state_dict: \"extra.weight\"", "size mismatch for head.5"):
        assert words in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_load_into_a_backbone_and_under_a_new_head():
    config = replace(VARIANTS["tiny"], depths=(1, 1, 1, 1))
    weights = released_weights(config)
    backbone, small = (SecViT(replace(config, num_classes=n)).double() for n in (0, 10))
    assert not load_weights(backbone, weights)
    own = small.head[5].weight.clone()
    assert load_weights(small, {"model": weights}, new_head=True)
    assert torch.equal(small.head[5].weight, own)
    q = weights["layers.2.blocks.0.attn.qkv.weight"][:256, :, 0, 0]
    assert torch.equal(small.stages[2].blocks[0].attn.q.weight, q)
    assert torch.equal(backbone.stages[2].blocks[0].attn.q.weight, q)


# ---------------------------------------------------------------------------------------- training

TINY = ["--set", "depths=1,1,1,1", "dims=8,8,16,16", "heads=1,1,2,2", "head_width=16",
        "clusters=4,2,2,1", "--workers", "0", "--size", "32"]
EXACT = ["--set", *TINY[1:5], "clusters=1,1,1,1", "drop_path=0", *TINY[6:]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An ImageFolder of two classes, 12 pictures to train on and 5 to evaluate."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for part, number in (("train", 6), ("val", 3)):
        for label, color in (("blue", 2), ("red", 0)):
            (root / part / label).mkdir(parents=True)
            for i in range(number - (part == "val") * color // 2):
                picture = random.randint(0, 120, (40, 48, 3), dtype=np.uint8)
                picture[..., color] += 120
                Image.fromarray(picture).save(root / part / label / f"{i}.png")
    return root


def arguments(folder, out, *more, model=TINY):
    small = ["--batch", "4", "--epochs", "3", "--warmup", "1", "--lr", "1e-3", "--ema", "0.9"]
    return ["--data", str(folder), "--out", str(out), *model, *small, *more]


def last(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def same(a, b):
    """Whether two nests of dicts and lists hold the same numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(out):
    state = last(out)
    return {name: state[name] for name in ("model", "ema", "optimizer")}


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(arguments(folder, out)) == 0
    return out


def test_a_run_leaves_its_record(folder, whole):
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert (whole / "curves.png").stat().st_size > 5000
    options = json.loads((whole / "config.json").read_text())["options"]
    assert options["batch"] == 4 and options["mixup"] == 0.8
    best = torch.load(whole / "best.pt", weights_only=True)
    model = SecViT(SecViTConfig(**best["config"]))
    load_weights(model, whole / "best.pt")
    assert best["record"]["top1"] == max(line["top1"] for line in lines)


def test_evaluation_repeats_the_accuracy_of_the_run(whole, capsys):
    best = torch.load(whole / "best.pt", weights_only=True)["record"]["top1"]
    assert train.main(["--eval", "--weights", str(whole / "best.pt")]) == 0
    assert f"top-1 {best:.2f} % of 5 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_weights(folder, whole, tmp_path, monkeypatch, steps):
    step, done = train.Run.step, []

    def interrupted(*arguments):
        done.append(1)
        monkeypatch.setattr(train, "SIGNALS", [0.0] * (len(done) == steps))
        return step(*arguments)
    monkeypatch.setattr(train.Run, "step", interrupted)
    assert train.main(arguments(folder, tmp_path / "run")) == 0
    assert last(tmp_path / "run")["place"]["step"] == (steps - 1) % 3 + 1
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run"), weights(whole))


def test_same_tells_weights_apart(whole):
    assert same(weights(whole), weights(whole))
    assert not same(weights(whole), weights(whole) | dict(model=weights(whole)["ema"]))


TWO = """
import sys, torch, train
save = train.Run.save
def save_each(run):
    save(run)
    states = dict(model=run.model.state_dict(), ema=run.ema.state_dict())
    torch.save(states, run.out / f"rank{train.rank()}.pt")
train.Run.save = save_each
train.make_optimizer = lambda model, options: torch.optim.SGD(model.parameters(), 1.0)
sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(*command, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, command)], text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_two_processes_train_like_one_with_the_same_batch(folder, tmp_path, monkeypatch):
    """Equal weights on both ranks, and those of one process that takes two turns a step.

    By gradient descent, on one cluster, with last maps of 2x2: where a gradient is 0, AdamW makes
    whole steps of rounding errors; clusters can part on them, and BN of two numbers a sign.
    """
    more = ["--mixup", "0", "--cutmix", "0", "--erasing", "0", "--micro", "2", "--lr",
            "0.1", "--epochs", "1", "--warmup", "0", "--size", "64"]
    (tmp_path / "both.py").write_text(TWO)
    run = torchrun("--standalone", "--nproc_per_node=2", tmp_path / "both.py",
                   *arguments(folder, tmp_path / "two", *more, model=EXACT))
    output = run.communicate()[0]
    assert run.returncode == 0, output
    ranks = [torch.load(tmp_path / "two" / f"rank{i}.pt") for i in (0, 1)]
    assert same(*ranks)
    monkeypatch.setattr(train, "make_optimizer", lambda model, _: torch.optim.SGD(
        model.parameters(), 1.0))
    one = arguments(folder, tmp_path / "one", *more, model=EXACT)
    assert train.main(one) == 0
    train.seed_all(0)
    first = SecViT(train.model_config(train.parse(one), 2))
    after = last(tmp_path / "one")["model"]
    moved = {name: (after[name] - p).abs().max() for name, p in first.named_parameters()}
    error = {name: (after[name] - ranks[0]["model"][name]).abs().max() for name in moved}
    assert max(moved.values()) > 0.005 and max(error.values()) < 1e-5


def test_weights_start_a_run_and_a_new_head_is_said(whole, tmp_path, capsys):
    more = ["--epochs", "1", "--weights", str(whole / "best.pt"), *TINY, "--batch", "512"]
    assert train.main(["--out", str(tmp_path / "run"), *more]) == 0
    assert "gives way to a new one for 10" in capsys.readouterr().out


def bad_checkpoint(tmp_path, what):
    path = tmp_path / "bad.pt"
    if what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("no checkpoint")
    elif what == "list":
        torch.save([1, 2], path)
    elif what == "truncated":
        torch.save(dict(model=dict(w=torch.zeros(1000))), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif what == "other":
        torch.save(dict(model=dict(w=torch.zeros(2))), path)
    elif what == "small":
        torch.save(dict(model={}, options=dict(model="small")), path)
    return path


@pytest.mark.parametrize("what, words", [
    ("empty", "not a checkpoint"), ("text", "not a checkpoint"), ("list", "holds a list"),
    ("truncated", "not a checkpoint"), ("other", "1 unexpected: w"), ("missing", "No such file"),
    ("small", "use --model small")])
def test_a_bad_checkpoint_is_one_line(tmp_path, capsys, what, words):
    path = bad_checkpoint(tmp_path, what)
    assert train.main(["--weights", str(path), "--out", str(tmp_path / "run"), *TINY]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and words in said
    assert not (tmp_path / "run").exists()  # the next try can have the folder


@pytest.mark.parametrize("arguments, words", [
    (["--model", "huge"], "invalid choice: 'huge'"), (["--modle", "tiny"], "--modle"),
    (["--epochs", "many"], "invalid int value: 'many'"), (["--epochs", "0"], "0 is not in"),
    (["--lr", "nan"], "--lr nan is not in"), (["--data", "nowhere"], "nowhere is no folder"),
    (["--set", "depth=1"], "depth"), (["--set", "drop_path"], "is not FIELD=VALUE"),
    (["--set", "drop_path=2"], "drop_path"), (["--set", "heads=3,3,3,3"], "dims"),
    (["--eval"], "--eval needs --weights"), (["--resume"], "--resume needs --out"),
    (["--resume", "--out", "nowhere"], "is not the record of a run"),
    (["--plot", "nowhere"], "no log.jsonl")])
def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("what, words", [("no val", "val"), ("empty class", "blue"),
                                         ("other classes", "green")])
def test_bad_folders_are_one_line(folder, tmp_path, capsys, what, words):
    shutil.copytree(folder, tmp_path / "data")
    if what == "no val":
        shutil.rmtree(tmp_path / "data" / "val")
    elif what == "empty class":
        shutil.rmtree(tmp_path / "data" / "train" / "blue")
        (tmp_path / "data" / "train" / "blue").mkdir()
    else:
        (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "green")
    assert train.main(arguments(tmp_path / "data", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


def test_bad_input_ends_a_real_process_with_2_and_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, HERE / "train.py", "--model", "huge"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "'huge'" in run.stderr


def test_a_folder_that_has_a_run_is_refused_and_left_alone(folder, whole, capsys):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    assert train.main(arguments(folder, whole)) == 2
    assert "--resume --out" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(whole), "--batch", "8"]) == 2
    assert "--batch 4, not 8" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


# --------------------------------------------------------------------------------------- the recipe


def recipe(*changes):
    return train.parse(["--data", "IMAGENET", *changes])


def test_the_recipe_is_the_default_of_a_folder():
    options = recipe()
    expected = dict(size=224, epochs=300, batch=1024, lr=1e-3, warmup=5, weight_decay=0.05,
                    smoothing=0.1, rand_augment=9, mixup=0.8, cutmix=1.0, erasing=0.25, repeats=3)
    assert {name: options[name] for name in expected} == expected
    assert math.isclose(options["ema"], 0.99996 ** (1024 / 512))
    half = recipe("--batch", "512")
    assert math.isclose(half["lr"], 5e-4) and math.isclose(half["ema"], 0.99996)
    assert recipe("--batch", "512", "--lr", "0.002")["lr"] == 0.002
    rates = [VARIANTS[name].drop_path for name in VARIANTS]
    assert rates == [0.1, 0.15, 0.4, 0.5]


def test_learning_rate_of_the_recipe():
    def cosine(epoch):
        return 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * epoch / 300))
    expected = {0: 1e-6, 1: 1e-6 + 999e-6 / 5, 5: cosine(5), 150: 5.05e-4, 299: cosine(299)}
    for epoch, rate in expected.items():
        assert math.isclose(train.learning_rate(epoch, recipe()), rate, rel_tol=1e-9)
    assert cosine(5) > 0.999e-3 and cosine(299) < 1.01e-5


def test_norms_biases_and_layer_scale_do_not_decay():
    model = SecViT(SecViTConfig(**SMALL, layer_scale=(1e-6,) * 4))
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = train.make_optimizer(model, recipe()).param_groups
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    for p in decay["params"]:
        assert names[id(p)].endswith("weight") and p.ndim > 1
    for p in rest["params"]:
        assert p.ndim == 1 and names[id(p)].endswith(("bias", "gamma", "weight"))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_mix_as_the_pictures_do(name):
    others = {"mixup", "cutmix", "erasing"} - {name}
    transform = train.BatchTransform(recipe() | dict.fromkeys(others, 0), 8)
    constant = torch.arange(8, dtype=torch.uint8)[:, None, None, None] * 30
    pictures, labels = constant.expand(8, 3, 64, 64), torch.arange(8)
    mixed, targets = transform(pictures, labels)
    plain = train.BatchTransform.normalise(pictures)[:, :1].mean((1, 2, 3))
    torch.testing.assert_close(mixed[:, :1].mean((1, 2, 3)), targets @ plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert len({*targets.amax(1).tolist()}) == 1  # one lambda a batch
    logits = torch.randn(8, 8)
    smooth = targets * 0.9 + 0.1 / 8
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1),
                               -(smooth * logits.log_softmax(1)).sum(1).mean())


def test_mixup_and_cutmix_have_half_of_the_batches_each():
    transform = train.BatchTransform(recipe("--erasing", "0"), 2)
    pictures = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    blends = 0
    for _ in range(400):
        mixed, _ = transform(pictures, torch.arange(2))
        blends += len(mixed[0, 0].unique()) == 1  # CutMix of two constants has two values
    assert abs(blends - 200) < 4.5 * math.sqrt(400 / 4)


def test_average_of_weights_is_the_closed_form_with_the_statistics_of_bn():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    model[0].weight.data.fill_(1.0)
    ema = train.make_ema(model, 0.9)
    for step in range(1, 6):
        model[0].weight.data.fill_(1.0 + step)
        model[1].running_mean.fill_(2.0 * step)
        ema.update_parameters(model)
    def average(values):  # 0.9^5 of the first and 0.1 * 0.9^k of the k-th from the last
        return 0.9**5 * values[0] + sum(0.1 * 0.9 ** (5 - i) * values[i] for i in range(1, 6))
    assert math.isclose(ema.module[0].weight.item(), average([1, 2, 3, 4, 5, 6]), rel_tol=1e-6)
    assert math.isclose(ema.module[1].running_mean.item(), average([0, 2, 4, 6, 8, 10]),
                        rel_tol=1e-6)
    assert not ema.training


def test_erasing_has_its_probability_and_its_area():
    transform = train.BatchTransform(recipe("--mixup", "0", "--cutmix", "0"), 2)
    pictures = torch.zeros(600, 3, 48, 48, dtype=torch.uint8)
    plain = train.BatchTransform.normalise(pictures[:1])
    erased, labels = transform(pictures, torch.zeros(600, dtype=torch.long))
    changed = (erased != plain).any(1)
    areas = changed.float().mean((1, 2))
    assert abs((areas > 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 600)
    areas = areas[areas > 0]
    assert areas.min() > 0.015 and areas.max() < 0.36 and areas.max() > 0.25
    assert abs(erased[changed[:, None].expand_as(erased)].std() - 1) < 0.05  # noise, each pixel


def test_crops_have_the_law_of_the_recipe():
    crop = train.train_transform(recipe()).transforms[0]
    picture = torch.zeros(3, 1000, 1000)
    boxes = [crop.make_params([picture]) for _ in range(500)]
    areas = torch.tensor([box["height"] * box["width"] / 1e6 for box in boxes])
    ratios = torch.tensor([box["width"] / box["height"] for box in boxes])
    assert 0.079 < areas.min() < 0.12 and areas.max() > 0.85
    assert abs(areas.mean() - 0.52) < 0.06  # of a uniform law from 0.08 to 1, less what sticks out
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.35


def test_operations_of_randaugment_have_the_recipes_arguments():
    picture = Image.fromarray(np.random.RandomState(0).randint(20, 200, (40, 40, 3), np.uint8))
    at_full = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45,
               "Color": 1.9, "Contrast": 1.9, "Brightness": 1.9, "Sharpness": 1.9, "Posterize": 1,
               "Solarize": 0, "SolarizeAdd": 110, "AutoContrast": None, "Equalize": None,
               "Invert": None}
    assert {name: row[0](1.0) for name, row in train.OPERATIONS.items()} == at_full
    for name, (argument, apply) in train.OPERATIONS.items():
        if name in ("Posterize", "Solarize", "SolarizeAdd"):  # no sign
            assert argument(-0.9) == argument(0.9)
        elif argument(1.0):
            neutral = 1 if at_full[name] == 1.9 else 0
            assert math.isclose(argument(-0.5) - neutral, neutral - argument(0.5))
        for u in (-1.0, -0.3, 0.3, 1.0):
            result = apply(picture, argument(u))
            assert result.size == picture.size and result.mode == "RGB"
            assert result.tobytes() != picture.tobytes()
    assert [train.OPERATIONS["Posterize"][0](u) for u in (0.1, 0.3, 0.5, 0.9)] == [4, 3, 2, 1]
    assert train.OPERATIONS["Solarize"][0](0.5) == 128
    assert train.OPERATIONS["SolarizeAdd"][0](0.9) == 99
    add = train.OPERATIONS["SolarizeAdd"][1]
    assert add(Image.new("RGB", (1, 1), (0, 127, 128)), 99).getpixel((0, 0)) == (99, 226, 128)


def test_randaugment_draws_as_the_recipe_does(monkeypatch):
    drawn = []  # (operation, strength)
    monkeypatch.setattr(train, "OPERATIONS", {
        name: (lambda u: u, lambda img, u, name=name: drawn.append((name, u)) or img)
        for name in train.OPERATIONS})
    augment, untouched, pictures = train.RandAugment(9.0), 0, 4000
    for _ in range(pictures):
        before = len(drawn)
        augment(None)
        untouched += len(drawn) == before
    def near(count, p, n):
        return abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
    assert near(untouched, 0.25, pictures) and near(len(drawn), 0.5, 2 * pictures)
    names, strengths = zip(*drawn)
    assert all(near(names.count(name), 1 / 15, len(names)) for name in train.OPERATIONS)
    strengths = torch.tensor(strengths)
    assert near((strengths < 0).sum().item(), 0.5, len(names))
    size = strengths.abs()
    assert size.max() == 1 and near((size == 1).sum().item(), 0.02275, len(names))  # 2 sigma
    assert abs(size.median() - 0.9) < 0.005 and abs((size - 0.9)[size < 0.9].abs().median()
                                                    - 0.6745 * 0.05) < 0.004


@pytest.mark.parametrize("world", [1, 2, 3])
def test_distributed_evaluation_counts_every_picture_once(world, monkeypatch):
    class Answers(torch.nn.Module):  # right about one picture in seven
        def forward(self, pictures):
            return F.one_hot((pictures[:, 0, 0, 0] > 0).long(), 2)

    colors = [255 * (i % 7 == 0) for i in range(1001)]
    val = [(Image.new("RGB", (32, 32), (color,) * 3), 1) for color in colors]
    shares = []
    monkeypatch.setattr(train, "world", lambda: world)
    monkeypatch.setattr(train, "total", lambda *numbers, device: shares.append(numbers) or (1, 1))
    options = train.parse(["--size", "32", "--workers", "0", "--batch", "96"])
    for rank in range(world):
        monkeypatch.setattr(train, "rank", lambda: rank)
        loader = train.loaders(options, val, val)[1]
        run = SimpleNamespace(device="cpu", options=options, autocast=contextlib.nullcontext)
        train.evaluate(Answers(), loader, run)
    right, count = map(sum, zip(*shares))
    assert len(shares) == world and (right, count) == (143, 1001)


def test_repeated_augmentation_deals_copies_to_different_places():
    options = recipe("--batch", "6")
    hands = [[key for batch in train.Batches(20, options, 1, rank, 3) for key in batch]
             for rank in range(3)]
    keys = sum(hands, [])
    assert len(keys) == len({key[3] for key in keys}) == 18  # an epoch: 20 // 6 steps of 6
    copies = [key[0] for key in keys]
    assert len({*copies}) == 6 and all(copies.count(index) == 3 for index in copies)
    for hand in hands:  # the three copies of a picture are on three processes
        assert len({key[0] for key in hand}) == len(hand)


@pytest.mark.parametrize("pictures", [3, 200])
def test_a_data_set_smaller_than_a_batch_still_has_a_step(pictures):
    keys = [key for batch in train.Batches(pictures, recipe(), 1) for key in batch]
    assert len(keys) == 1024 and {key[0] for key in keys} == {*range(pictures)}


# ------------------------------------------------------------------------------ what a run survives

FORK = multiprocessing.get_context("forkserver")  # real processes that need not import torch anew
FORK.set_forkserver_preload(["train"])


def child(arguments, hook=None, *values):
    """A process that trains; the hook changes train.py in it first."""
    process = FORK.Process(target=_child, args=(arguments, hook, *values))
    process.start()
    return process


def _child(arguments, hook, *values):
    torch.set_num_threads(2)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        file = open(values[0], "a") if values else open(os.devnull, "w")
        os.dup2(file.fileno(), number)
    sys.argv[0] = "train.py"
    if hook:
        hook(*values[1:])
    code = train.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def slow_steps(seconds):
    step = train.Run.step
    train.Run.step = lambda *arguments: (time.sleep(seconds), step(*arguments))[1]


def die_writing(number):
    """SIGKILL in the middle of the file that is written as number so and so."""
    fsync, calls = os.fsync, []

    def killed(descriptor):
        calls.append(1)
        if len(calls) == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    train.os.fsync = killed


def test_ten_kills_cost_nothing(folder, whole, tmp_path):
    out, random = tmp_path / "run", np.random.RandomState(0)
    command, resume = arguments(folder, out), ["--resume", "--out", str(out)]
    kills = 0
    while kills < 10:
        first = not (out / "config.json").exists()
        if kills % 2:
            process = child(command if first else resume, die_writing, os.devnull,
                            int(random.randint(1, 4)))
        else:
            process = child(command if first else resume, slow_steps, os.devnull, 0.05)
            process.join(random.uniform(0.05, 0.6))
            process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)  # 0: it ended before the kill came
        kills += process.exitcode == -signal.SIGKILL
        if (out / "last.pt").exists():
            assert 1 <= last(out)["place"]["epoch"] <= 3
        if (out / "last.pt").exists() and last(out)["place"]["epoch"] == 3:
            (out / "last.pt").unlink()  # as if it had died before: from the start again
    assert train.main(resume) == 0
    assert same(weights(out), weights(whole))
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    assert same(*(torch.load(run / "best.pt")["model"] for run in (out, whole)))


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_mid_epoch_and_says_how_to_go_on(folder, whole, tmp_path, number):
    out, log = tmp_path / "run", tmp_path / "log"
    process = child(arguments(folder, out, "--workers", "1"), slow_steps, log, 0.3)
    wait_for(lambda: log.exists() and "epoch 1/3" in log.read_text())
    time.sleep(0.4)  # in epoch 2
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    said = log.read_text()
    assert f"python train.py --resume --out {out}" in said and "Traceback" not in said
    assert last(out)["place"]["epoch"] == 1 and last(out)["place"]["step"] in (1, 2, 3)
    assert train.main(["--resume", "--out", str(out), "--workers", "0"]) == 0
    assert same(weights(out), weights(whole))


def test_a_second_signal_ends_at_once(folder, tmp_path):
    log = tmp_path / "log"
    process = child(arguments(folder, tmp_path / "run"), slow_steps, log, 20)
    wait_for(lambda: log.exists() and "pictures to train on" in log.read_text())
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(3)
    assert process.exitcode == -signal.SIGTERM


DYING = """
import os, sys, train
step, calls = train.Run.step, []
def dies(*arguments):
    calls.append(1)
    if len(calls) == 5 and train.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
    return step(*arguments)
train.Run.step = dies
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_dead_rank_restarts_and_two_agents_are_one_job(folder, tmp_path):
    """Two processes of one agent that lose one on the way, and two agents of a process each."""
    (tmp_path / "dying.py").write_text(DYING)
    one = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=1", tmp_path / "dying.py",
                   *arguments(folder, tmp_path / "restarted", model=EXACT))
    said = one.communicate()[0]
    assert one.returncode == 0, said
    assert said.count("epoch 1/3") == 1 and said.count("epoch 3/3") == 1
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=job",
               f"--rdzv_endpoint=localhost:{port}", "--local_addr=localhost", HERE / "train.py",
               *arguments(folder, tmp_path / "agents", model=EXACT)]
    agents = [torchrun(*command) for _ in range(2)]
    outputs = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "2 process(es)" in "".join(outputs)
    assert same(weights(tmp_path / "restarted"), weights(tmp_path / "agents"))


def test_unreadable_pictures_are_named_or_replaced_and_counted(folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    broken = data / "train" / "blue" / "2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (data / "train" / "red" / "1.png").write_bytes(b"")
    assert train.main(arguments(data, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--skip-broken" in said
    assert str(broken) in said or str(data / "train" / "red" / "1.png") in said
    out = tmp_path / "skipping"
    assert train.main(arguments(data, out, "--skip-broken", "--repeats", "1")) == 0
    assert capsys.readouterr().out.count("2 unreadable pictures replaced") == 3
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["broken"] for line in lines] == [2, 2, 2]


def full_disk(size):
    save = train.Run.save

    def fills(run):
        save(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train.Run.save = fills


def test_a_full_disk_leaves_the_last_checkpoint(folder, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = child(arguments(folder, out), full_disk, log, 20000)
    process.join()
    said = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in said
    assert "cannot write" in said and "File too large" in said and "--resume" in said
    assert last(out)["place"]["epoch"] == 1 and not list(out.glob("*.tmp"))
    assert train.main(["--resume", "--out", str(out)]) == 0


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, capsys):
    more = ["--lr", "10", "--weight-decay", "0.5", "--warmup", "0", "--epochs", "30"]
    assert train.main(arguments(folder, tmp_path / "run", *more)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the loss is" in said and "epoch" in said and "step" in said
    model = last(tmp_path / "run")["model"]
    assert all(value.isfinite().all() for value in model.values())


class Stranger:
    def __reduce__(self):
        return (os.mkdir, ("stranger-was-here",))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=Stranger()), "evil.pt")
    assert train.main(["--weights", "evil.pt", "--out", "run", *TINY]) == 2
    assert not (tmp_path / "stranger-was-here").exists()
    assert "evil.pt is not a checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_cannot_be_resumed(folder, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    state = last(whole)
    del state["model"]["stages.0.embed.0.weight"]
    torch.save(state, tmp_path / "run" / "last.pt")
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "is of another model" in capsys.readouterr().err
    (tmp_path / "run" / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:5000])
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "last.pt is not a checkpoint" in capsys.readouterr().err


def test_ten_thousand_command_lines_never_give_a_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    random, accepted = np.random.RandomState(0), 0
    names = ["--" + name.replace("_", "-") for name in train.OPTIONS] + [
        "--model", "--set", "--data", "--out", "--weights", "--resume", "--eval", "--plot", "--amp",
        "--device", "--workers", "--compile", "--skip-broken", "--no-compile", "-x", "--", ""]
    values = ["0", "1", "-1", "3.5", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 400, "tiny",
              "huge", "", " ", "\0", "é", "a=b", "=", "drop_path=nan", "dims=8", "depths=()",
              "heads=[1,2", "clusters=0,0,0,0", "lce=None", "ffn_ratio='x'", "dims=1,2,3,4",
              "layer_scale=(1,)*4", "num_classes=-3", "in_channels=1e9", "depths=1.5,1,1,1",
              "clusters=64,16,4,1", "drop_path=0.2", "digits", "bf16", "cpu", "--", "()" * 200]
    for _ in range(10000):
        words = []
        for _ in range(random.randint(1, 4)):
            words.append(names[random.randint(len(names))])
            words += [values[random.randint(len(values))] for _ in range(random.randint(0, 3))]
        try:
            options = train.parse(words)
            if "resume" not in options and "plot" not in options:
                train.model_config(options, 10)
                accepted += 1
        except train.Halt as halt:
            assert str(halt) and "\n" not in str(halt)
    assert accepted > 100


def test_a_log_file_has_a_line_for_each_epoch(folder, tmp_path):
    process = child(arguments(folder, tmp_path / "run"), None, tmp_path / "log")
    process.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [
        ["epoch", f"{i}/3"] for i in (1, 2, 3)]
    assert len(lines) < 9 and not any("\r" in line for line in lines)


# ------------------------------------------------------------------------------------ the benchmark


def test_the_benchmark_has_a_row_for_each_model(capsys, monkeypatch):
    monkeypatch.setattr(train, "in_fresh_process", lambda function, *arguments: 1.0)
    assert train.main(["--benchmark", "--size", "32", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    for name in ("SecViT-tiny", "one cluster", "unsorted", "swin_t"):
        rows = [line.split() for line in said.splitlines() if line.startswith(name)]
        assert len(rows) == 2 and all(len(row) >= 8 for row in rows)
    assert train.main(["--benchmark", "--size", "33"]) == 2


def test_unsorted_is_the_same_attention_on_the_tokens_as_they_come():
    seca = SECA(16, heads=2, clusters=4, lce=False).double()
    x = torch.randn(2, 4, 8, 16, dtype=torch.float64)
    with train.unsorted():
        y = seca(x)
    parts = [SECA(16, heads=2, clusters=1, lce=False).double() for _ in range(4)]
    for part, tokens, expected in zip(parts, x.chunk(4, 1), y.chunk(4, 1)):
        part.load_state_dict(seca.state_dict())
        torch.testing.assert_close(part(tokens), expected)
    assert not torch.allclose(seca(x), y)


# --------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_exercises_are_open(path, tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(HERE / "secvit.py", tmp_path)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources=dict(
        metadata=dict(path=tmp_path / "notebooks")))
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        number = client.code_cells_executed
        pytest.fail(f"{path.name}, code cell {number}: {error}", pytrace=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 15 <= len(notebook.cells) <= 30
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert len(cell.source.splitlines()) <= 15
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            text = output.get("text", "")
            assert not re.search(r"/(tmp|root|home|work|usr|opt)/|Warning|\r", text)
    assert sum("<details>" in cell.source for cell in notebook.cells) >= 2
