"""Properties of secvit.py, train.py and the notebooks, one per test. `pytest` runs all of them."""

import copy
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # of this process and its children: two notebooks run beside it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the promises about bits hold on a CPU

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.elastic.utils.distributed import get_free_port
from torchvision.datasets import ImageFolder
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2

import train
from notebooks import draw
from secvit import (PAPER_TEXT, SECA, VARIANTS, Block, SecViT, SecViTConfig, cluster_labels,
                    cluster_order, count, create_secvit, group, load_weights, permute_rows, rotate,
                    rotation, row_numbers, similarity, ungroup)

HERE = Path(__file__).parent
SMALL = dict(depths=(1, 1, 2, 1), dims=(16, 32, 32, 64), heads=(2, 2, 4, 4), head_width=32,
             num_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- clustering


@pytest.mark.parametrize("l, clusters", [(96, 8), (63, 32), (101, 8), (49, 1), (5, 32)])
def test_clusters_are_equal_pieces_by_falling_similarity_and_ungroup_is_the_inverse(l, clusters):
    """If c does not divide l, the first clusters have one token more. The labels agree."""
    k = torch.randn(2, 3, l, 8)
    x = torch.stack((similarity(k), cluster_labels(k, clusters)), dim=-1)
    rows = row_numbers(cluster_order(k))
    parts = group(x, rows, clusters)
    assert torch.equal(ungroup(parts, rows), x)
    pieces = [piece for part in parts for piece in part.unflatten(1, (3, -1)).unbind(2)]
    expected = similarity(k).sort(descending=True).values.tensor_split(min(clusters, l), dim=-1)
    assert len(pieces) == len(expected)
    for number, (piece, sim) in enumerate(zip(pieces, expected)):
        assert torch.equal(piece[..., 0], sim) and (piece[..., 1] == number).all()


class OnGPU(torch.Tensor):
    is_cuda = True  # it says so: the branch for a GPU runs on the CPU


@pytest.mark.parametrize("dtype, d", [(torch.float32, 4), (torch.bfloat16, 4), (torch.float32, 3)])
def test_rows_move_on_a_gpu_as_on_the_cpu(dtype, d):
    """There, index_copy_ moves rows of whole 64-bit words, index_select all others."""
    rows = torch.randperm(7)
    inverse = rows.argsort()
    leaf = torch.randn(7, d, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = permute_rows(leaf.as_subclass(OnGPU), rows, inverse)
    assert ("aten::index_copy_" in {event.key for event in profiler.key_averages()}) == (d == 4)
    assert torch.equal(y.as_subclass(torch.Tensor), leaf[rows])
    for gradient in (torch.randn(7, d, dtype=dtype), torch.ones((), dtype=dtype).expand(7, d)):
        moved, = torch.autograd.grad(y, leaf, gradient, retain_graph=True)
        assert torch.equal(moved.as_subclass(torch.Tensor), gradient[inverse])


def test_similarity_is_the_cosine_to_the_mean_key_of_the_head_and_float32_under_autocast():
    k = torch.randn(2, 3, 500, 32) + 5  # cosines so close that half precision would tie them
    with torch.autocast("cpu", torch.bfloat16):
        s, half = similarity(k), similarity(k.bfloat16())
    assert torch.equal(s, similarity(k)) and half.dtype == torch.float32
    k = k.double()
    expected = F.cosine_similarity(k, k.mean(dim=2, keepdim=True), dim=-1)
    torch.testing.assert_close(similarity(k), expected)


# ---------------------------------------------------------------------------------------- attention


def naive_seca(seca, x, turn, clusters):
    """Eq. 2 to 6 with loops over pictures, heads and clusters."""
    b, h, w, c = x.shape
    q, k, v = (linear(x).unflatten(-1, (seca.heads, -1)) for linear in (seca.q, seca.k, seca.v))
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    y = torch.zeros_like(v).flatten(1, 2)
    for i in range(b):
        for head in range(seca.heads):
            Q, K, V = (t[i, :, :, head].flatten(0, 1) for t in (q, k, v))
            order = F.cosine_similarity(K, K.mean(0, keepdim=True)).argsort(descending=True)
            for part in order.tensor_split(clusters):
                weights = torch.softmax(Q[part] @ K[part].T / K.shape[1]**0.5, dim=-1)
                y[i, part, head] = weights @ V[part]
    y = y.reshape(b, h, w, c)
    if seca.lce is not None:
        v = v.reshape(b, h, w, c).permute(0, 3, 1, 2)
        local = F.conv2d(v, seca.lce.weight, seca.lce.bias, padding=2, groups=c)
        y = y + local.permute(0, 2, 3, 1)
    return seca.out_proj(y)


@pytest.mark.parametrize("h, w, clusters, limit, number", [
    pytest.param(8, 8, 4, 0, 4, id="equal clusters"),
    pytest.param(7, 9, 8, 0, 8, id="clusters that differ by one token"),
    pytest.param(3, 2, 8, 0, 6, id="more clusters than tokens"),
    pytest.param(8, 8, 2, 10, 7, id="a limit of the cluster size adds clusters"),
    pytest.param(5, 5, 1, 0, 1, id="one cluster is full attention")])
@pytest.mark.parametrize("lce, rope", [(True, True), (False, False)])
def test_seca_and_its_gradient_are_the_loop_over_clusters(h, w, clusters, limit, number, lce, rope):
    seca = SECA(24, heads=3, clusters=clusters, cluster_size=limit, lce=lce).double()
    x = torch.randn(2, h, w, 24, dtype=torch.float64, requires_grad=True)
    turn = rotation(h, w, 8, x) if rope else None
    outputs = seca(x, turn), naive_seca(seca, x, turn, number)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    sources = [x, *seca.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), sources) for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_rotary_position_is_relative_and_keeps_lengths():
    x = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 9, 9, 1, 16)
    q, k = rotate(x, rotation(9, 9, 16, x))[:, :, :, 0]
    torch.testing.assert_close(q[4, 5] @ k[2, 1], q[6, 8] @ k[4, 4])
    assert not torch.isclose(q[4, 5] @ k[2, 1], q[4, 5] @ k[1, 2])
    torch.testing.assert_close(q.norm(dim=-1), x[0, :, :, 0].norm(dim=-1))


# -------------------------------------------------------------------------------------------- model


COUNTS = {  # parameters; those of the paper's text alone; multiply-adds of the released model, G
    "tiny": (14981800, 13832104, 2.707), "small": (26776104, 25516968, 4.733),
    "base": (54682776, 53223960, 10.370), "large": (96495096, 94883704, 19.326)}


def test_counts_of_the_variants_which_the_file_prints(capsys):
    runpy.run_path(str(HERE / "secvit.py"), run_name="__main__")
    said = capsys.readouterr().out
    for name, config in VARIANTS.items():
        parameters, text, released = COUNTS[name]
        with torch.device("meta"):
            n, macs, _ = count(create_secvit(name))
            assert sum(p.numel() for p in create_secvit(name, **PAPER_TEXT).parameters()) == text
        # The release has Eq. 3's product with the centre as a matrix product: a counter sees it.
        center = sum(d * dim * l for d, dim, l in zip(config.depths, config.dims, (3136, 784, 196)))
        assert n == parameters and abs((macs + center) / 1e9 - released) < 6e-4
        assert f"{name:5}{parameters:11,}" in said


def test_counts_of_table_6():
    with torch.device("meta"):
        model = create_secvit("tiny", conv_stem=False)
        model.stages[0].eval()  # is frozen
        n, macs, attention = count(model)
        assert model.training and not model.stages[0].blocks[0].training
        less = [sum(p.numel() for p in create_secvit("tiny", **{part: False}).parameters())
                for part in ("lce", "cpe")]
    assert abs(n / 1e6 - 14.09) < 6e-3 and abs((macs - attention) / 1e9 - 2.11) < 6e-3
    assert [round(number / 1e6, 2) for number in less] == [14.89, 14.94]


def test_clusters_change_the_products_of_attention_alone():
    """QK^T and AV, of l x l / c x d multiply-adds each; cluster_size=98 adds none at 224 pixels."""
    rest = set()
    for clusters, limit in (((32, 8, 2, 1), 98), ((64, 16, 4, 1), 98), ((64, 8, 2, 1), 0)):
        config = replace(VARIANTS["tiny"], depths=(1,) * 4, clusters=clusters, cluster_size=limit)
        with torch.device("meta"):
            n, macs, attention = count(SecViT(config))
        stages = zip((3136, 784, 196, 49), clusters, config.dims)
        assert attention == sum(2 * l * l // c * d for l, c, d in stages)
        rest.add((n, macs - attention))
    assert len(rest) == 1


def test_every_field_changes_the_model():
    base = SecViTConfig(**SMALL, clusters=(8, 4, 2, 1))
    other = dict(
        depths=(1, 1, 1, 1), dims=(16, 32, 32, 32), heads=(1, 2, 4, 4), clusters=(4, 4, 2, 1),
        cluster_size=3, ffn_ratio=2, drop_path=0.9, num_classes=6, in_channels=1, conv_stem=False,
        cpe=False, lce=False, rope=False, ffn_conv=False, head_width=0,
        layer_scale=(0, 0, 0, 0.5), stem_gelu=True)
    assert {*other} == {field.name for field in fields(SecViTConfig)}

    def logits(**changes):
        torch.manual_seed(0)
        model = SecViT(replace(base, **changes))
        return model(torch.randn(2, model.config.in_channels, 64, 64)).tolist()
    assert logits() == logits()
    assert [name for name in other if logits(**{name: other[name]}) == logits()] == []


@pytest.mark.parametrize("h, w", [(32, 32), (33, 47), (224, 100)])
@pytest.mark.parametrize("conv_stem", [True, False])
def test_maps_of_any_size_from_32_up_go_into_an_fpn(h, w, conv_stem):
    model = SecViT(SecViTConfig(**SMALL | dict(num_classes=0), conv_stem=conv_stem)).eval()
    assert not any(name.startswith("head") for name, _ in model.named_parameters())
    x = torch.randn(1, 3, h, w)
    maps = model(x)
    assert [*maps] == ["0", "1", "2", "3"]
    for stride, dim, y in zip((4, 8, 16, 32), SMALL["dims"], maps.values()):
        up = stride - 1 if conv_stem else 0  # the convolutions round up, the patches down
        assert y.shape == (1, dim, (h + up) // stride, (w + up) // stride)
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), maps)
    pyramid = FeaturePyramidNetwork(SMALL["dims"], 8)(maps)
    assert [p.shape[2:] for p in pyramid.values()] == [y.shape[2:] for y in maps.values()]


@pytest.mark.parametrize("dtype, clusters, bound", [
    (torch.bfloat16, (1, 1, 1, 1), 0.02), (torch.float16, (1, 1, 1, 1), 0.003),
    # With more than one cluster, a rounded token may cross a border: its neighbours change.
    (torch.bfloat16, (32, 8, 2, 1), 0.12), (torch.float16, (32, 8, 2, 1), 0.12)])
def test_half_precision_stays_close(dtype, clusters, bound):
    model = create_secvit("tiny", depths=(1, 1, 1, 1), clusters=clusters).eval()
    load_weights(model, released_weights(model.config))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        exact = model.forward_features(x)
        with torch.autocast("cpu", dtype):
            half = model.forward_features(x)
    for name in exact:
        assert 0 < (half[name] - exact[name]).norm() / exact[name].norm() < bound


def test_layer_norm_stays_in_half_precision(monkeypatch):
    """On a GPU autocast makes it float32, and without autocast all types must be the same there."""
    def layer_norm(x, shape, weight, bias, eps, real=F.layer_norm):
        seen.append({x.dtype, weight.dtype, bias.dtype, torch.is_autocast_enabled("cpu")})
        return real(x, shape, weight, bias, eps)
    seen, block = [], Block(8, heads=2, clusters=2, layer_scale=1e-6)
    monkeypatch.setattr(F, "layer_norm", layer_norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(1, 4, 4, 8, dtype=torch.bfloat16))
    assert seen == [{torch.bfloat16, False}] * 2 and y.dtype == torch.bfloat16


ONE = dict(depths=(1,), dims=(16,), heads=(2,), clusters=(4,), layer_scale=(0,), head_width=0,
           num_classes=5)


def test_exported_models_take_any_batch_and_sides_in_multiples_of_32():
    plain = dict(conv_stem=False, cpe=False, lce=False, ffn_conv=False)  # the sizes take the time
    model = SecViT(SecViTConfig(**ONE, **plain)).eval()
    h, w = torch.export.dims("h", "w", min=1, max=8)
    free = ({0: torch.export.Dim("batch", min=1, max=64), 2: 32 * h, 3: 32 * w},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=free)
    smallest = 1 if torch.__version__ >= "2.15" else 2  # torch 2.11 guards against a batch of 1
    for shape in ((smallest, 3, 64, 64), (3, 3, 96, 64), (3, 3, 32, 128)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_a_traced_model_can_be_saved(tmp_path):
    model, x = SecViT(SecViTConfig(**ONE)).eval(), torch.randn(2, 3, 64, 64)
    torch.jit.trace(model, x, check_trace=False).save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), model(x))


def test_a_compiled_model_has_one_graph_for_each_picture_size():
    graphs, model = CompileCounter(), SecViT(SecViTConfig(**ONE)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=graphs)
    for h, w, number in ((64, 64, 1), (33, 57, 2), (64, 64, 2)):
        x = torch.randn(2, 3, h, w)
        torch.testing.assert_close(compiled(x), model(x))
        assert graphs.frame_count == number


def test_a_model_compiled_for_a_gpu_leaves_the_moving_of_rows_to_the_compiler():
    """On a fake GPU. The compiler cannot view its own buffers as words, which eager mode does."""
    called = []

    def keep(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        compiled = torch.compile(SECA(16, heads=2, clusters=3), fullgraph=True,
                                 backend=aot_autograd(fw_compiler=keep))
        compiled(torch.empty(2, 5, 5, 16))
    assert called.count("aten.index_select.default") == 4 and "aten.view.dtype" not in called


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_agrees_with_eager():
    seca = SECA(16, heads=2, clusters=3, lce=False)
    compiled = torch.compile(seca, fullgraph=True, options={"cpp.vec_isa_ok": False})  # soon built
    x = torch.randn(2, 5, 5, 16, requires_grad=True)
    outputs = [part(x, rotation(5, 5, 8, x)) for part in (seca, compiled)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in outputs))


def test_functional_transforms_work():
    """An ensemble by vmap; torch.func's gradient and forward mode."""
    models = [SecViT(SecViTConfig(**ONE)).double().eval() for _ in range(3)]
    x, direction = torch.randn(2, 1, 3, 48, 32, dtype=torch.float64)

    def call(*state):
        return torch.func.functional_call(models[0], state, (x,))
    together = torch.func.vmap(call)(*torch.func.stack_module_state(models))
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))

    each = torch.func.vmap(lambda picture: models[0](picture[None])[0])(x)
    torch.testing.assert_close(each, models[0](x))

    def loss(x):
        return models[0](x).square().sum()
    leaf = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slope = torch.func.jvp(loss, (x,), (direction,))[1]
    torch.testing.assert_close(slope, (gradient * direction).sum())


@pytest.mark.parametrize("changes", [{}, dict(cluster_size=5, rope=False), dict(conv_stem=False)])
def test_gradients_reach_every_parameter_and_add_in_one_order(changes):
    """On a GPU these operations are atomic: the order in which they add differs from run to run."""
    def atomic(forward):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            forward().square().sum().backward()
        names = str({event.key for event in profiler.key_averages()})
        return [name for name in ("index_add", "index_put", "scatter_add") if name in names]
    x, rows = torch.randn(3, requires_grad=True), torch.zeros(2, dtype=int)
    assert len(atomic(lambda: x.index_select(0, rows) + x[rows] + x.gather(0, rows))) == 3
    model = SecViT(SecViTConfig(**SMALL, layer_scale=(1e-2,) * 4, drop_path=0.1, **changes))
    assert atomic(lambda: model(torch.randn(2, 3, 72, 64))) == []
    # A bias that BN or softmax cancels has one, too: rounding errors.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_model_made_on_the_meta_device_is_initialised_like_any_other():
    config = SecViTConfig(**SMALL, layer_scale=(1e-6,) * 4)
    with torch.device("meta"):
        late = SecViT(config)
    models = SecViT(config), late.to_empty(device="cpu")
    for tensor in late.state_dict().values():
        tensor.fill_(7)
    for model in models:
        torch.manual_seed(1)
        model.apply(model.init_weights)
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=0, atol=0)


@pytest.mark.parametrize("make, words", [
    (lambda: create_secvit("huge"), ["'huge'", "tiny, small, base, large"]),
    (lambda: SecViTConfig(depths=(2, 2)), ["one entry per stage", "(2, 2)"]),
    (lambda: SecViTConfig(dims=(60, 128, 256, 512), heads=(7, 4, 8, 16)), ["60", "7"]),
    (lambda: SecViTConfig(dims=(12, 24, 48, 96)), ["12", "rope"]),
    (lambda: SecViTConfig(clusters=(32, 8, 0, 1)), ["clusters", "1 or more"]),
    (lambda: SecViTConfig(drop_path=1.0), ["drop_path"]),
    (lambda: SecViTConfig(depths=3), ["one entry per stage", "(3,)"]),
    (lambda: SecViTConfig(clusters=(4.5, 2, 2, 1)), ["clusters (4.5, 2, 2, 1)", "whole"]),
    (lambda: SecViTConfig(num_classes="10"), ["num_classes 10", "whole"]),
    (lambda: SecViTConfig(ffn_ratio=math.inf), ["ffn_ratio inf"]),
    (lambda: SecViT()(torch.zeros(1, 3, 31, 64)), ["31", "32 or more"]),
    (lambda: SecViT()(torch.zeros(1, 1, 64, 64)), ["(1, 1, 64, 64)", "3"]),
    (lambda: SecViT()(torch.zeros(3, 3, 64)), ["(3, 3, 64)", "batch"]),
    (lambda: SecViT()(torch.zeros(0, 3, 64, 64)), ["(0, 3, 64, 64)", "1 or"])])
def test_what_cannot_be_is_a_value_error_of_one_line(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


# --------------------------------------------------------------------------------- released weights


def released_weights(config):
    """The authors' checkpoint, with values from NumPy's frozen stream, a seed per key."""
    fill, dims, wide = {}, config.dims, config.head_width  # key: shape, mean, spread

    def layer(name, *shape):  # a norm has one dimension, a convolution four
        values = (1, 0.1) if len(shape) == 1 else (0, 0.7 / math.sqrt(math.prod(shape[1:])))
        fill[f"{name}.weight"], fill[f"{name}.bias"] = (shape, *values), (shape[:1], 0, 0.05)

    def layer_and_batch_norm(name, norm, *shape):
        layer(name, *shape)
        layer(norm, shape[0])
        fill[f"{norm}.running_mean"] = shape[:1], 0, 0.1
        fill[f"{norm}.running_var"] = shape[:1], 1.1, 0.2
        fill[f"{norm}.num_batches_tracked"] = (), 0, 0
    stem = (3, *[dims[0] // 2] * 3, dims[0])
    for i in range(4):
        name = "patch_embed.proj."
        layer_and_batch_norm(f"{name}{3 * i}", f"{name}{3 * i + 1}", stem[i + 1], stem[i], 3, 3)
    for i in range(3):
        name = f"layers.{i}.downsample"
        layer_and_batch_norm(f"{name}.reduction", f"{name}.norm", dims[i + 1], dims[i], 3, 3)
    for i, dim in enumerate(dims):
        fill[f"layers.{i}.RoPE.angle"] = (dim // config.heads[i] // 2,), 0, 1
        for block in (f"layers.{i}.blocks.{j}" for j in range(config.depths[i])):
            for name, *shape in (
                    ("norm1.norm", dim), ("norm2.norm", dim), ("pos", dim, 1, 3, 3),
                    ("attn.qkv", 3 * dim, dim, 1, 1), ("attn.lepe", dim, 1, 5, 5),
                    ("attn.out_proj", dim, dim, 1, 1), ("ffn.fc1", 3 * dim, dim, 1, 1),
                    ("ffn.dwconv", 3 * dim, 1, 3, 3), ("ffn.fc2", dim, 3 * dim, 1, 1)):
                layer(f"{block}.{name}", *shape)
            for name in ("gamma_1", "gamma_2") if config.layer_scale[i] else ():
                fill[f"{block}.{name}"] = (1, dim, 1, 1), 0.5, 0.1
    layer_and_batch_norm("proj", "norm", wide, dims[-1], 1, 1)
    layer("head", config.num_classes, wide, 1, 1)
    return {key: torch.as_tensor(mean + spread * np.random.RandomState(seed).standard_normal(shape))
            for seed, (key, (shape, mean, spread)) in enumerate(sorted(fill.items()))}


def golden_pictures():
    r = np.random.RandomState(2405)
    coarse = r.standard_normal((2, 3, 14, 14)).repeat(16, 2).repeat(16, 3)
    return torch.from_numpy(2 * coarse * r.standard_normal((2, 3, 1, 1))
                            + 0.3 * r.standard_normal((2, 3, 224, 224)))


GOLDEN = {  # of the authors' model, float64: logits; their std; mean, std and centre of each stage
    "tiny": [
        1.99667634, 1.98135119, -1.93002671, -0.772933136,
        2.01311904, 2.15882662, -2.41878737, -0.655030527, 1.84734196,
        0.0671845459, 1.26449043, -0.144382065, 1.53807903, -0.248721236, -1.66040172,
        0.136615075, 1.61781182, -2.82177236, 0.658269864, -0.10296006, 1.1857033,
        -0.0946279797, 7.03628878, -0.959139635, -0.0922869146, 1.3431858, 5.39190788,
        0.101445622, 6.69787795, -8.74274395, -11.2951817, -3.4304774, -24.4702078],
    "base": [
        188.036003, 312.29126, 145.191693, 239.129196,
        227.988261, 327.760664, 173.496965, 250.421427, 291.617295,
        -0.153970505, 2.38794728, -1.76663315, 1.14703047, 1.20761775, 1.06316945,
        0.0331232002, 8.11717728, -1.34771159, -0.111853614, -10.3309219, -1.9178807,
        -14.7349394, 459.310771, 57.1649303, 6.9767757, -197.058213, 1041.47833,
        -16.2084473, 1318.92563, 30.1421287, -455.65781, 211.210937, 528.725756]}


@pytest.mark.parametrize("name", GOLDEN)
def test_released_weights_give_the_released_outputs(name):
    model = create_secvit(name).double().eval()
    load_weights(model, {"model_ema": released_weights(model.config)})
    with torch.no_grad():
        maps = model.forward_features(golden_pictures())
        logits = model.head(maps["3"])
    numbers = [*logits[:, :4].flatten(), logits.std()]
    for y in maps.values():
        numbers += [y.mean(), y.std(), *y[0, :4, y.shape[2] // 2, y.shape[3] // 2]]
    expected = torch.tensor(GOLDEN[name], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(numbers), expected, rtol=1e-6, atol=0)


def test_wrong_weights_are_named_and_change_nothing():
    model = SecViT(SecViTConfig(**SMALL))
    before, weights = copy.deepcopy(model.state_dict()), released_weights(model.config)
    del weights["layers.1.blocks.0.ffn.fc1.bias"]
    weights |= {"extra.weight": torch.zeros(1), "head.weight": torch.zeros(7, 32, 1, 1)}
    with pytest.raises(ValueError) as error:
        load_weights(model, weights)
    for words in ("Missing key(s) in state_dict: \"stages.1.blocks.0.ffn.fc1.bias\"",
                  "Unexpected key(s) in state_dict: \"extra.weight\"", "size mismatch for head.5"):
        assert words in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [
    lambda weights: {"module." + name: weight for name, weight in weights.items()},
    lambda weights: {"_orig_mod.module." + name: weight for name, weight in weights.items()},
    lambda weights: dict(state_dict=weights, epoch=3, config=dict(lr=0.1)),
    lambda weights: dict(model={"module." + name: weight for name, weight in weights.items()})])
def test_weights_load_from_any_training_script(wrap, tmp_path):
    model, other = SecViT(SecViTConfig(**SMALL)), SecViT(SecViTConfig(**SMALL))
    model.proj, other.proj = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)  # a released name
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    assert not load_weights(other, tmp_path / "weights.pt")
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("field, there, here", [
    ("clusters", (8, 4, 2, 1), (32, 8, 2, 1)), ("cluster_size", 98, 0), ("rope", False, True),
    ("heads", (1, 2, 4, 4), (2, 2, 4, 4))])
def test_weights_of_a_model_that_computes_something_else_are_refused(field, there, here):
    other = SecViT(SecViTConfig(**SMALL | {field: there}, drop_path=0.3))
    checkpoint = dict(model=other.state_dict(), config=asdict(other.config))
    model = SecViT(SecViTConfig(**SMALL | {field: here}))
    with pytest.raises(ValueError, match=re.escape(f"{field} {there}, not {here}")):
        load_weights(model, checkpoint)
    load_weights(model, checkpoint["model"])  # whoever knows that they fit
    del checkpoint["config"][field]  # from before the field was there: its default
    if here == getattr(SecViTConfig(), field):
        load_weights(model, checkpoint)


def test_weights_load_into_a_backbone_and_under_a_new_head():
    weights = released_weights(SecViTConfig(**SMALL))
    backbone, other = (SecViT(SecViTConfig(**SMALL | dict(num_classes=n))) for n in (0, 10))
    own = other.head[5].weight.clone()
    assert not load_weights(backbone, weights)
    assert load_weights(other, {"model": weights}, new_head=True)
    assert torch.equal(other.head[5].weight, own)
    q = weights["layers.2.blocks.0.attn.qkv.weight"][:32, :, 0, 0].float()
    for model in (backbone, other):
        assert torch.equal(model.stages[2].blocks[0].attn.q.weight, q)


# ---------------------------------------------------------------------------------------- training

TINY = ["--set", "depths=1,1,1,1", "dims=8,8,16,16", "heads=1,1,2,2", "head_width=16",
        "clusters=4,2,2,1", "--workers", "0", "--size", "32"]
EXACT = [*TINY[:5], "clusters=1,1,1,1", "drop_path=0", *TINY[6:]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An ImageFolder of two classes, 12 pictures to train on and 5 to evaluate."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for place, color, number in (
            ("train/red", 0, 6), ("train/blue", 2, 6), ("val/red", 0, 3), ("val/blue", 2, 2)):
        (root / place).mkdir(parents=True)
        for i in range(number):
            picture = random.randint(0, 120, (40, 48, 3), dtype=np.uint8)
            picture[..., color] += 120
            Image.fromarray(picture).save(root / place / f"{i}.png")
    return root


def arguments(folder, out, *more, model=TINY):
    """Three epochs of three steps, with all that ImageNet's recipe does to pictures."""
    small = ("--batch 4 --epochs 3 --warmup 1 --lr 1e-3 --ema 0.9 --mixup 0.8 --cutmix 1 "
             "--erasing 0.25 --rand-augment 9 --repeats 3").split()
    return ["--data", str(folder), "--out", str(out), *model, *small, *more]


def printed(command, capsys):
    """What a command that succeeds prints."""
    capsys.readouterr()
    train.main(command)
    return capsys.readouterr().out


def last(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)


def weights(out):
    """All numbers of the model, of its average and of the optimiser, as one vector."""
    states = last(out)
    moments = [tensor for state in states["optimizer"]["state"].values()
               for tensor in state.values()]
    tensors = [*states["model"].values(), *states["ema"].values(), *moments]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(arguments(folder, out))
    return out


def test_a_run_leaves_its_record_and_its_best_weights(folder, whole, capsys):
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    best = torch.load(whole / "best.pt", weights_only=True)
    assert best["options"]["batch"] == 4 and best["options"]["mixup"] == 0.8
    assert best["record"]["top1"] == max(line["top1"] for line in lines)
    model = SecViT(SecViTConfig(**best["config"])).eval()
    load_weights(model, whole / "best.pt")
    transform = train.transforms(best["options"], 2)[1]
    right = [model(transform(picture)[None]).argmax().item() == label
             for picture, label in ImageFolder(folder / "val")]
    loss = best["record"]["val_loss"]
    said = f"top-1 {100 * sum(right) / 5:.2f} % of 5 pictures, loss {loss:.4f}, amp off"
    assert said in printed(["--eval", "--weights", whole / "best.pt"], capsys)
    assert best["record"]["top1"] == 100 * sum(right) / 5


@pytest.fixture
def at_step(monkeypatch):
    """at_step(number, act) has the next run call act(parts) before step `number`, once."""
    def patch(number, act):
        def patched(*arguments):
            acts.pop(arguments[-1], len)(arguments[0])
            return step(*arguments)
        acts, step = {number: act}, train.train_step
        monkeypatch.setattr(train, "train_step", patched)
    return patch


def terminate(parts=None, number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("steps, number", [
    (1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_weights(
        folder, whole, tmp_path, at_step, capsys, steps, number):
    at_step(steps - 1, partial(terminate, number=number))
    said = printed(arguments(folder, tmp_path, "--workers", "1"), capsys)
    assert f"saved after step {steps} of 9" in said
    assert f"--out {tmp_path}" in said and "\r" not in said  # no bar in a file
    assert last(tmp_path)["state"]["step"] == steps
    train.main(arguments(folder, tmp_path, "--workers", "0"))
    assert torch.equal(weights(tmp_path), weights(whole))


def test_a_second_signal_ends_at_once_but_not_the_echo_of_the_first(monkeypatch):
    ended = []
    monkeypatch.setattr(train, "SIGNALS", [])
    monkeypatch.setattr(os, "_exit", ended.append)
    train.catch_signals()
    for pause, code in ((0, []), (0, []), (1.1, [128 + signal.SIGTERM])):
        time.sleep(pause)
        terminate()
        assert ended == code


def test_a_run_that_fails_in_its_first_step_goes_on_from_its_weights(
        folder, whole, tmp_path, at_step):
    run, failed = (arguments(folder, tmp_path / name, "--weights", whole / "best.pt")
                   for name in ("run", "failed"))
    train.main(run)
    before = {*multiprocessing.active_children()}
    at_step(0, lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:  # which keeps the run's loaders alive
        train.main([*failed, "--workers", "1"])
    for worker in {*multiprocessing.active_children()} - before:
        worker.join(20)
        assert not worker.is_alive(), error  # it would hold up the exit of a script
    train.main(failed)
    assert torch.equal(weights(tmp_path / "failed"), weights(tmp_path / "run"))


def test_without_a_terminal_a_line_a_minute_says_where_a_run_is(
        folder, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 31))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = printed(arguments(folder, tmp_path), capsys)
    line = r"step \d of 9  loss \S+  lr \S+; an epoch takes about [\d:]+, [\d:]+ left"
    assert len(re.findall(line, said)) > 2


def test_a_finished_run_is_not_trained_again_and_more_epochs_go_on(folder, whole, tmp_path, capsys):
    """Also with a copy of its pictures; also one older than an option, which has its default."""
    out, data = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(folder, tmp_path / "data")
    train.main(arguments(data, out))
    assert torch.equal(weights(out), weights(whole))
    states = last(out)
    del states["options"]["smoothing"], states["steps"], states["pictures"]
    torch.save(states, out / "last.pt")
    (out / "best.pt").unlink()  # the next epoch's is the best then
    said = printed(arguments(data, out, "--epochs", "4"), capsys)
    assert "going on after step 9 of 12" in said and (out / "best.pt").exists()
    assert re.search(r"3 epochs are now 4: the learning rate goes on at \S+ instead of", said)
    assert [record["epoch"] for record in last(out)["state"]["history"]] == [1, 2, 3, 4]
    assert last(out)["options"]["smoothing"] == 0.1 and last(out)["options"]["epochs"] == 4


@pytest.mark.parametrize("part, gone", [("train", True), ("train", False), ("val", False)])
def test_a_run_whose_pictures_change_ends_with_its_epochs(
        folder, whole, tmp_path, at_step, capsys, part, gone):
    data, out = shutil.copytree(folder, tmp_path / "data"), tmp_path / "run"
    at_step(0, terminate)
    train.main(arguments(data, out))
    states = last(out)
    states["state"]["best"] = 101.0
    torch.save(states, out / "last.pt")
    shutil.copy(whole / "best.pt", out)
    red = data / part / "red"
    for number in range(1, 6):
        if gone:
            (red / f"{number}.png").unlink()
        else:
            shutil.copy(red / "0.png", red / f"a{number}.png")
    said, state = printed(arguments(data, out), capsys), last(out)["state"]
    assert "the pictures have changed since the run began" in said
    assert state["step"] == 9 and len(state["history"]) == 3
    assert (state["best"] == 101) == (part == "train")  # a score on other pictures counts no more


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A folder of six classes that differ in colour, and a run that learned them."""
    root, random = tmp_path_factory.mktemp("five"), np.random.RandomState(1)
    for number, name in enumerate(["ant", "bee", "cat", "dog", "elk", "fox"]):
        for part in ("train", "val"):
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(6):
                picture = random.randint(0, 60, (32, 32, 3), dtype=np.uint8)
                picture[..., number % 3] += 90 + 90 * (number > 2)
                Image.fromarray(picture).save(root / "data" / part / name / f"{i}.png")
    train.main(["--data", str(root / "data"), "--out", str(root / "run"), "--epochs", "15", *TINY,
                "--batch", "6", "--lr", "1e-2", "--min-crop", "0.9", "--smoothing", "0"])
    return root


def test_classes_are_compared_by_name(trained, tmp_path, capsys):
    """A checkpoint with its classes in another order gives the same; another name is refused."""
    best = torch.load(trained / "run" / "best.pt", weights_only=True)
    assert best["classes"] == ["ant", "bee", "cat", "dog", "elk", "fox"]
    shuffled = [3, 1, 5, 0, 2, 4]
    for key in ("head.5.weight", "head.5.bias"):
        best["model"][key] = best["model"][key][shuffled]
    best["classes"] = [best["classes"][i] for i in shuffled]
    torch.save(best, tmp_path / "best.pt")
    options = ["--data", trained / "data", "--workers", "0"]
    same = [printed(["--eval", "--weights", path, *options], capsys).splitlines()[-1]
            for path in (trained / "run" / "best.pt", tmp_path / "best.pt")]
    top1, = re.findall(r"top-1 (\S+) %, top-5 \S+ % of 36 pictures, loss \S+", same[0])
    assert same[0] == same[1] and float(top1) > 100 / 6  # better than chance
    # In the order of the weights; the average stays what it was.
    on = ["--out", tmp_path / "on", "--weights", tmp_path / "best.pt", "--epochs", "1", "--lr", "0",
          "--warmup", "0", "--ema", "1", *options]
    assert f"ema_top1 {float(top1):.4g} " in printed(on, capsys)
    data = shutil.copytree(trained / "data", tmp_path / "data")
    command = ["--data", str(data), "--out", str(tmp_path / "run"), *TINY, "--epochs", "1"]
    train.main(command)
    for part in ("train", "val"):
        (data / part / "cat").rename(data / part / "tom")
    assert "new are ['tom'], gone are ['cat']" in refused(command, capsys)
    command = ["--eval", "--weights", str(tmp_path / "best.pt"), "--data", str(data)]
    assert "new are ['tom'], gone are ['cat']" in refused(command, capsys)
    shutil.rmtree(data / "val" / "tom")
    said = printed(command, capsys)  # of those that are there
    assert re.search("has no pictures of cat\n(.*\n)*.* of 30 pictures", said)


def test_other_classes_are_fine_tuning_even_if_there_are_as_many(trained, tmp_path, capsys):
    """With a new classifier, its own preset, and the fields that --set had for the weights."""
    other = shutil.copytree(trained / "data", tmp_path / "data")
    for part in ("train", "val"):
        (other / part / "cat").rename(other / part / "tom")
    command = ["--data", other, "--weights", trained / "run" / "best.pt", "--epochs", "1",
               "--out", tmp_path / "run", "--set", "drop_path=0.3", "--workers", "0"]
    said, run = printed(command, capsys), last(tmp_path / "run")
    assert f"pictures from {other}; the classifier is a new one" in said and "fine-tuning" in said
    assert run["config"]["dims"] == (8, 8, 16, 16) and run["config"]["drop_path"] == 0.3
    assert run["options"]["lr"] == train.FINETUNE["lr"] and run["options"]["size"] == 32
    assert "tom" in run["classes"]


def test_predict_names_the_likeliest_classes(trained, tmp_path, capsys, monkeypatch):
    best, paths = trained / "run" / "best.pt", sorted((trained / "data" / "val").glob("*/0.png"))
    lines = printed(["--predict", *paths, "--weights", best], capsys).splitlines()
    assert len(lines) == 6 and all(line.count(" %") == 5 for line in lines)
    first = [line.split(": ")[1][:3] for line in lines]
    assert sum(name == path.parent.name for name, path in zip(first, paths)) >= 3  # chance is 1
    released = released_weights(VARIANTS["tiny"])  # of ImageNet, whose names torchvision has
    torch.save(dict(model=released), tmp_path / "released.pth")
    command = ["--predict", paths[0], "--weights", tmp_path / "released.pth"]
    assert printed(command, capsys).count(" %") == 5


# ---------------------------------------------------------------------------------------- bad input


class Stranger:
    """A pickle of it would run code."""

    def __reduce__(self):
        return (os.mkdir, ("stranger-was-here",))


@pytest.fixture(scope="session")
def mistakes(folder, whole, tmp_path_factory):
    """A working directory of files and folders that are not what they should be."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "digits").mkdir()
    (root / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], root / "list.pt")
    torch.save(dict(model=Stranger()), root / "code.pt")
    torch.save(dict(model=dict(w=torch.zeros(2))), root / "other.pt")
    for name, old, new in (("unsplit", "val", "test"), ("pink", "val/red", "val/pink"),
                           ("green", "train/red/0.png", "train/green/0.txt"),
                           ("pets", "train", "train")):
        shutil.copytree(folder, root / name)
        (root / name / new).parent.mkdir(exist_ok=True)
        (root / name / old).rename(root / name / new)
    shutil.copytree(folder, root / "single", ignore=shutil.ignore_patterns("blue"))
    flat = shutil.copytree(folder, root / "flat", ignore=shutil.ignore_patterns("red"))
    (flat / "val" / "blue").rename(flat / "val" / ".blue")
    shutil.copytree(folder, root / "more")
    shutil.copy(folder / "val" / "red" / "0.png", root / "more" / "val" / "red" / "more.png")
    for run in ("taken", "another", "half", "hostile"):
        shutil.copytree(whole, root / run)
    torch.save(dict(options=5, model=[]), root / "hostile" / "last.pt")
    states = last(whole)
    del states["model"]["stages.0.embed.0.weight"]
    torch.save(states, root / "another" / "last.pt")
    os.truncate(root / "half" / "last.pt", 5000)
    (root / "best").mkdir()
    shutil.copy(whole / "best.pt", root / "best")
    return root


def refused(arguments, capsys):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert train.command_line(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("train.py: error: ")
    return said


@pytest.mark.parametrize("command, words", [
    ("--model huge", "invalid choice: 'huge'"), ("--modle tiny", "--modle"),
    ("--epochs many", "invalid int value: 'many'"), ("--epochs 0", "--epochs 0 is not in 1"),
    ("--warmup 9 --epochs 1", "--warmup 9.0 is above --epochs 1"),
    ("--min-lr 0.1", "--min-lr 0.1 is above --lr 0.001"), ("--lr nan", "--lr nan is not in"),
    ("--set depth=1", "depth"), ("--set drop_path", "write a value like drop_path=0.1"),
    ("--set drop_path=2", "drop_path"),
    ("--set in_channels=1", "pictures decide num_classes"),
    ("--set lce=false", "write a value like lce=True or lce=False"),
    ("--set depths=1", "write a value like depths=2,2,9,2"), ("--micro 1", "use a larger --micro"),
    ("--data nowhere", "--data nowhere is no folder"), ("--data pets", "type ./pets for the"),
    ("--data unsplit", "unsplit needs val/ with a folder of pictures for each class: rename test/"),
    ("--data flat", "flat needs val/ with a folder of pictures for each class"),
    ("--data digits/", "digits/ needs train/"), ("--data single", "one class, red"),
    ("--data pink", "only in train are ['red'], only in val ['pink']"),
    ("--data green", "green/train/green has no picture that Pillow can read: add some"),
    ("--data=", "--data is empty"), ("--predict= --weights taken/best.pt", "--predict is empty"),
    ("--eval --predict a.png --weights taken/best.pt", "not allowed with argument"),
    ("--eval", "need --weights"), ("--predict a.png", "need --weights"),
    ("--predict text.pt --weights taken/best.pt", "text.pt cannot be read: cannot identify image"),
    ("--predict a.png --weights other.pt", "these are the weights of another model"),
    ("--weights missing.pt", "missing.pt cannot be read as a checkpoint: No such file"),
    ("--out text.pt --batch 4", "File exists: 'text.pt': choose another --out"),
    ("--out best", "best has a best.pt, but no last.pt: choose another --out"),
    ("--weights text.pt", "text.pt cannot be read"),
    ("--weights list.pt", "list.pt holds a list, not a dict"),
    ("--weights code.pt", "GLOBAL posix.mkdir"),
    ("--weights other.pt", 'Unexpected key(s) in state_dict: "w"'),
    ("--out taken --batch 8", "--batch 8: the run in taken has 4; for another run choose another"),
    ("--out taken --epochs 2", "--epochs 2: taken has done more, so type more"),
    ("--out taken --data more/", "--data more: the run in taken has other pictures"),
    ("--predict=a.png --predict=b.png --weights taken/best.pt", "a.png cannot be read"),
    ("--set lce=x --set drop_path=0", "--set lce=x: write a value like"),
    ("--out another", "weights of another model"), ("--out half", "last.pt cannot be read"),
    ("--out hostile", "a checkpoint is incomplete")])
def test_bad_input_is_one_line_and_changes_nothing(mistakes, capsys, monkeypatch, command, words):
    monkeypatch.chdir(mistakes)
    before = {path: path.stat().st_mtime_ns for path in mistakes.rglob("*")}
    assert words in refused(command.split(), capsys)
    assert {path: path.stat().st_mtime_ns for path in mistakes.rglob("*")} == before


def test_help_lets_no_process_wait(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "rendezvous", lambda url: iter([[train.dist.HashStore()]]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda **group: None)
    told = []
    monkeypatch.setattr(train.dist, "broadcast_object_list", told.append)
    train.main(["--help"])
    assert told == [[None]]  # nothing to do


def test_half_of_torchruns_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert "environment variable WORLD_SIZE expected, but not set" in refused([], capsys)


def test_ten_thousand_command_lines_never_give_a_traceback(capsys):
    random, accepted = np.random.RandomState(0), 0
    names = [name for name in train.PARSER._option_string_actions if name not in ("-h", "--help")]
    values = ("0 1 -1 3.5 nan inf 1e400 1e-400 tiny huge \0 é -x -- = a=b drop_path=nan dims=8 "
              "depths=() heads=[1,2 lce=None ffn_ratio='x' dims=1,2,3,4 layer_scale=(1,)*4 "
              "num_classes=-3 in_channels=1e9 clusters=64,16,4,1 digits bf16").split(" ")
    values += ["", " ", "9" * 400, "()" * 200]
    for _ in range(10000):
        words = []
        for name in random.choice([*names, "-x", ""], random.randint(1, 5)):
            words += [name, *random.choice(values, random.randint(0, 4))]
        try:
            train.model_config(train.choose(train.parse([str(word) for word in words]))[0], {}, 10)
            accepted += 1
        except ValueError:  # `work` turns it into a line
            pass
    assert accepted > 100


# ---------------------------------------------------------------------------------------- pictures


RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
BITS = np.unpackbits(RAMP.reshape(64, 1).astype(">u2").view(np.uint8), axis=1)
PALETTE = Image.new("P", (8, 8), 3)
PALETTE.putpalette([9, 9, 9] * 256)
UPRIGHT = Image.Exif()
UPRIGHT[0x112] = 6  # as the camera was held


@pytest.mark.parametrize("name, picture, expected", [
    ("16.png", Image.fromarray(RAMP), RAMP / 257), ("16.tif", Image.fromarray(RAMP), RAMP / 257),
    ("big.tif", Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()), RAMP / 257),
    ("32.tif", Image.fromarray(RAMP.astype(np.int32)), RAMP / 257),
    ("8.png", Image.fromarray((RAMP // 257).astype(np.uint8)), RAMP // 257),
    ("alpha.png", Image.new("RGBA", (8, 8), (200, 0, 0, 0)), 255 + 0 * RAMP),
    ("half.webp", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), 127 + 0 * RAMP),
    ("grey.png", Image.new("LA", (8, 8), (0, 0)), 255 + 0 * RAMP),
    ("palette.gif", PALETTE, 255 + 0 * RAMP),
    ("turned.jpg", Image.fromarray((RAMP // 257).astype(np.uint8)), np.rot90(RAMP // 257, -1)),
    ("clear.png", Image.fromarray(RAMP), np.where(RAMP, RAMP / 257, 255)),
    ("negative.tif", Image.fromarray(RAMP), 255 - RAMP / 257),
    ("12.tif", Image.frombytes("I;16", (6, 8), np.packbits(BITS[:, :12])), RAMP / 257),
    ("one.bmp", Image.new("1", (8, 8), 1), 255 + 0 * RAMP)])
def test_pictures_arrive_as_a_person_sees_them(tmp_path, name, picture, expected):
    options = {"half.webp": dict(lossless=True), "palette.gif": dict(transparency=3),
               "turned.jpg": dict(exif=UPRIGHT, quality=100), "clear.png": dict(transparency=0)}
    picture.save(tmp_path / name, **options.get(name, {}))
    changes = {"negative.tif": [(262, 1, 0)], "12.tif": [(256, 6, 8), (258, 16, 12)]}
    for tag, old, new in changes.get(name, ()):  # of a TIFF, which Pillow reads but cannot write
        file = (tmp_path / name).read_bytes()
        entries = [struct.pack("<HHII", tag, kind, 1, old) for kind in (3, 4)]
        entry, = (entry for entry in entries if entry in file)
        (tmp_path / name).write_bytes(file.replace(entry, entry[:8] + struct.pack("<I", new)))
    seen = train.open_picture(tmp_path / name)
    assert seen.mode == "RGB" and abs(np.asarray(seen, float) - expected[..., None]).max() <= 1


@pytest.mark.parametrize("values", [RAMP.astype(np.float32) / 65535, RAMP.astype(np.int32) * 9])
def test_a_picture_whose_range_nobody_knows_is_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match="^nobody knows the range of .* 8 or 16 bits$"):
        train.open_picture(tmp_path / "scan.tif")


def test_hidden_files_are_no_pictures_and_what_is_left_out_is_counted(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    for place in (".ipynb_checkpoints", "red/.ipynb_checkpoints"):
        shutil.copytree(folder / "train" / "blue", data / "train" / place)
    shutil.copy(folder / "train" / "red" / "0.png", data / "train" / "red" / "._0.png")
    Image.open(folder / "train" / "red" / "0.png").save(data / "train" / "red" / "0.GIF")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (data / "train" / "red" / name).touch()
    pictures, _, names = train.load_pictures(str(data))
    assert names == ["blue", "red"] and len(pictures) == 13
    assert "3 files in" in (said := capsys.readouterr().out) and ".heic, .txt" in said


# --------------------------------------------------------------------------------------- the recipe


def recipe(*changes):
    return train.choose(train.parse(["--data", "IMAGENET", *changes]), 1281167)[0]


def test_the_recipe_is_the_default_of_a_large_folder():
    options = recipe()
    expected = dict(size=224, epochs=300, batch=1024, lr=1e-3, warmup=5, weight_decay=0.05,
                    smoothing=0.1, rand_augment=9, mixup=0.8, cutmix=1.0, erasing=0.25, repeats=3)
    assert {name: options[name] for name in expected} == expected
    assert math.isclose(options["ema"], 0.99996 ** (1024 / 512))
    half = recipe("--batch", "512")
    assert math.isclose(half["lr"], 5e-4) and math.isclose(half["ema"], 0.99996)
    assert math.isclose(half["min_lr"], 5e-6)
    assert recipe("--batch", "512", "--lr", "0.002")["lr"] == 0.002
    assert [VARIANTS[name].drop_path for name in VARIANTS] == [0.1, 0.15, 0.4, 0.5]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 300)) / 2 for t in range(300)]
    for epoch, rate in {0: 1e-6, 1: 1e-6 + 999e-6 / 5, 5: cosine[5], 299: cosine[299]}.items():
        assert math.isclose(train.learning_rate(epoch, options), rate, rel_tol=1e-9)


@pytest.mark.parametrize("pictures", [3, 240, 3000, 99_999, 100_000])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_has_a_preset_by_its_size_and_the_average_forgets_the_first_weights(
        pictures, fresh):
    options, why = train.choose({"data": "mine"}, pictures, {}, fresh)
    steps = options["epochs"] * max(1, pictures // options["batch"])
    assert options["ema"] ** steps < 0.01 and options["warmup"] <= options["epochs"] / 10
    assert (options["batch"] == 1024) == (pictures == 100_000 and not fresh)
    assert ("fine-tuning" in why) == fresh
    assert steps >= 100 and options["micro"] * options["size"] ** 2 <= 8 * 224 ** 2  # on a CPU
    assert options["size"] == (224 if fresh or pictures == 100_000 else 64)
    assert (options["rand_augment"] == 9) == (not fresh and pictures in (3, 240, 100_000))


def test_only_the_weights_of_convolutions_and_linear_layers_decay():
    parts = train.build(recipe(), SecViT(SecViTConfig(**SMALL, layer_scale=(1e-6,) * 4)), {})
    decay, rest = parts["optimizer"].param_groups
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    matrices = {module.weight for module in parts["model"].modules()
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {*decay["params"]} == matrices
    assert {*rest["params"]} == {*parts["model"].parameters()} - matrices


def test_the_average_starts_at_the_first_weights_and_has_the_statistics_of_bn():
    states = dict(state=dict(step=1))
    parts = train.build(recipe() | dict(ema=0.9), SecViT(SecViTConfig(**SMALL)), states)
    assert states == {}  # a run that goes on frees what it has loaded
    live, average = ((m.head[5].bias.data, m.head[1].running_mean)
                     for m in (parts["model"], parts["ema"].module))
    for tensor, averaged in zip(live, average):
        assert torch.equal(tensor, averaged)
        tensor += 1
    parts["ema"].update_parameters(parts["model"])
    for tensor, averaged in zip(live, average):
        torch.testing.assert_close(averaged, tensor - 0.9)
    assert not parts["ema"].training


def near(count, p, n):
    """Whether `count` of n can be chance if each has probability p."""
    return abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))


def test_mixup_and_cutmix_have_half_of_the_batches_each_and_targets_mix_as_the_pictures_do():
    mix, blends = train.transforms(recipe(), 8)[2], 0
    constant = torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32)
    for _ in range(400):  # CutMix of two constants has two values
        mixed, targets = mix(constant, torch.arange(8))
        blends += len(mixed[0, 0].unique()) == 1
        torch.testing.assert_close(mixed[:, 0].mean((1, 2)), targets @ torch.arange(8.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert len({*targets.amax(1).tolist()}) == 1  # one lambda per batch
    assert near(blends, 0.5, 400)


def test_transforms_have_the_arguments_of_the_recipe():
    training, evaluation, mix = train.transforms(recipe(), 10)
    crop, flip, *_, erase = training.transforms
    assert (crop.scale, crop.ratio, flip.p) == ((0.08, 1), (3 / 4, 4 / 3), 0.5)
    assert (erase.p, erase.scale, erase.ratio) == (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3))
    erased = torch.stack([erase(torch.full((3, 48, 48), 9.0)) for _ in range(100)])
    assert len(erased.unique()) > 2000  # another number for each pixel
    assert [(type(t), t.alpha) for t in mix.transforms] == [(v2.MixUp, 0.8), (v2.CutMix, 1)]
    white = evaluation(Image.new("RGB", (300, 260), (255, 255, 255)))  # ImageNet's mean and spread
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(white, torch.tensor(expected)[:, None, None].expand(3, 224, 224))


def test_operations_of_randaugment_have_the_recipes_arguments():
    picture = Image.fromarray(np.random.RandomState(0).randint(20, 200, (40, 30, 3), np.uint8))
    cubic, fill = Image.Resampling.BICUBIC, dict(fillcolor=(124, 116, 104))
    moved = partial(picture.transform, (30, 40), Image.Transform.AFFINE, resample=cubic, **fill)
    expected = {  # at strength -0.9
        "AutoContrast": ImageOps.autocontrast(picture), "Equalize": ImageOps.equalize(picture),
        "Invert": ImageOps.invert(picture), "Rotate": picture.rotate(-27, cubic, **fill),
        "ShearX": moved((1, -0.27, 0, 0, 1, 0)), "ShearY": moved((1, 0, 0, -0.27, 1, 0)),
        "TranslateX": moved((1, 0, -0.405 * 30, 0, 1, 0)),
        "TranslateY": moved((1, 0, 0, 0, 1, -0.405 * 40)),
        "Posterize": ImageOps.posterize(picture, 1), "Solarize": ImageOps.solarize(picture, 26),
        "SolarizeAdd": picture.point([x + 99 * (x < 128) for x in range(256)] * 3),
        **{name: getattr(ImageEnhance, name)(picture).enhance(0.19)
           for name in ("Color", "Contrast", "Brightness", "Sharpness")}}
    assert expected.keys() == train.OPERATIONS.keys()
    for name, operation in train.OPERATIONS.items():
        difference = np.subtract(operation(picture, -0.9), expected[name], dtype=int)
        assert abs(difference).max() <= 1, name
    assert train.OPERATIONS["Posterize"](picture, 1.0) == ImageOps.posterize(picture, 1)  # not 0


def test_randaugment_draws_as_the_recipe_does(monkeypatch):
    drawn, numbers = [], []  # (operation, strength); how many per picture
    monkeypatch.setattr(train, "OPERATIONS", {
        name: lambda img, u, name=name: drawn.append((name, u)) or img
        for name in train.OPERATIONS})
    for _ in range(4000):
        before = len(drawn)
        train.rand_augment(None, 9.0)
        numbers.append(len(drawn) - before)
    assert near(numbers.count(0), 0.25, 4000) and near(numbers.count(2), 0.25, 4000)
    names, strengths = zip(*drawn)
    assert all(near(names.count(name), 1 / 15, len(names)) for name in train.OPERATIONS)
    assert near(sum(u < 0 for u in strengths), 0.5, len(names))
    size = torch.tensor(strengths).abs()  # normal around 0.9 with spread 0.05, cut off at 1
    assert size.max() == 1 and near((size == 1).sum().item(), 0.02275, len(names))
    assert near((size < 0.9).sum().item(), 0.5, len(names))
    assert near((size < 0.85).sum().item(), 0.15866, len(names))


def samples(monkeypatch, pictures, rank=0, world=1, batch=1024, micro=1024):
    """The batches of samples of one epoch for one process."""
    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(train, "WORLD", world)
    options = recipe() | dict(epochs=1, batch=batch, micro=micro)
    return list(train.schedule(pictures, max(1, pictures // batch), options))


def test_repeated_augmentation_deals_copies_to_different_places(monkeypatch):
    shares = [sum(samples(monkeypatch, 20, rank, 3, batch=6), []) for rank in range(3)]
    every = sum(shares, [])
    assert len(every) == len({sample[3] for sample in every}) == 18  # an epoch: 20 // 6 steps of 6
    copies = [sample[0] for sample in every]
    assert len({*copies}) == 6 and all(copies.count(index) == 3 for index in copies)
    for share in shares:  # the three copies of a picture are on three processes
        assert len({sample[0] for sample in share}) == len(share)


def test_a_step_has_the_same_pictures_on_any_processes_in_any_micro_steps(monkeypatch):
    def steps(world, number):
        micro = math.ceil(12 / world / number)
        shares = [samples(monkeypatch, 50, rank, world, 12, micro) for rank in range(world)]
        return [sorted(sum((batch for share in shares for batch in share[i : i + number]), []))
                for i in range(0, len(shares[0]), number)]
    assert len(steps(1, 1)) == 4
    assert steps(1, 1) == steps(1, 6) == steps(2, 3) == steps(4, 1) == steps(5, 1)


@pytest.mark.parametrize("pictures", [3, 200])
def test_a_data_set_smaller_than_a_batch_still_has_a_step(monkeypatch, pictures):
    batch, = samples(monkeypatch, pictures)
    assert len(batch) == 1024 and {sample[0] for sample in batch} == {*range(pictures)}


# ------------------------------------------------------------------------------------ any machine


WITHOUT = """  # what Windows lacks
import os, runpy, signal, sys
del signal.SIGCHLD, signal.SIGKILL, os.sched_getaffinity, os.fork
sys.modules["resource"] = sys.modules["fcntl"] = None
codes = []
for sys.argv in (["train.py", "--help"], ["train.py", "--epochs", "0"], sys.argv):
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
assert codes == [None, 2, None], codes
"""


def test_nothing_that_windows_lacks_is_needed(folder, tmp_path):
    out = tmp_path / ("ü \udce9" if sys.platform == "linux" else "ü")  # a byte that is not UTF-8
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments(folder, out, "--epochs", "1")], cwd=HERE,
        env=dict(os.environ, PYTHONIOENCODING="ascii"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--out names a run" in done.stdout and "--epochs 0 is not in" in done.stderr
    assert "best top-1" in done.stdout and "\\xfc" in done.stdout


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_start_once_a_run_in_each_way(folder, whole, tmp_path, monkeypatch, method):
    """As on macOS and Windows, and from Python 3.14 on."""
    def start(self):
        starts.append(self)
        begin(self)
    starts, begin = [], multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    monkeypatch.setattr(train, "DataLoader", partial(
        train.DataLoader, multiprocessing_context=method))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train.main(arguments(folder, tmp_path, "--workers", "1"))
    assert len(starts) == 2  # for three epochs: one reads to train, one to evaluate
    assert not any(worker.is_alive() for worker in starts)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert torch.equal(weights(tmp_path), weights(whole))


def test_more_processes_than_gpus_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "DEVICE", torch.device("cuda:0"))
    monkeypatch.setattr(train, "LOCAL_WORLD", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--nproc_per_node 8 is above the number of GPUs, 2" in refused([], capsys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_step_makes_nothing_on_another_device_and_waits_for_none(monkeypatch, dtype):
    """On fake CUDA tensors both are errors, on any machine: the wait comes after the last one.

    Without Mixup and CutMix, which draw their numbers on the CPU: fake ones are an error, too.
    """
    monkeypatch.setattr(train, "DEVICE", torch.device("cuda:0"))
    options = recipe("--batch", "6", "--micro", "2", "--amp", "bf16", "--size", "64")
    config, seen = SecViTConfig(**SMALL, layer_scale=(1e-6,) * 4, drop_path=0.1), []
    model = SecViT(config).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty_like(value, device="cuda")
                 for name, value in model.state_dict().items()}

        def forward(pictures):
            seen.append(forward.require_backward_grad_sync)
            y = torch.func.functional_call(model, state, pictures)
            assert (y.shape, y.device.type, y.dtype) == ((2, 5), "cuda", dtype)
            return y
        batches = [(torch.empty(2, 3, h, w, device="cuda", dtype=dtype),
                    torch.empty(2, device="cuda", dtype=torch.int64))
                   for h, w in ((64, 64), (70, 90), (64, 64))]
        backward = SimpleNamespace(backward=lambda: None)  # torch's, which needs a real GPU
        parts = dict(model=model, scaler=SimpleNamespace(scale=lambda loss: backward))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            train.train_step(parts, forward, batches, lambda *batch: batch, options, 0)
    assert seen == [False, False, True]


# ------------------------------------------------------------------------------ what a run survives

PATCHED = """  # gradient descent; a rank may die in two steps; each saves what it has done
import os, sys, torch, train
def step(*arguments):
    if str(train.RANK) == os.environ.get("DIES") and arguments[-1] in (2, 4):
        if not os.path.exists(f"dead{arguments[-1]}"):
            open(f"dead{arguments[-1]}", "w").close()
            os._exit(9)
    return train_step(*arguments)
def read(path):
    pictures.append(path)
    return open_picture(path)
def save(run, parts, state):
    done = parts["model"].state_dict(), pictures
    torch.save(done, f"{run['options']['out']}/rank{train.RANK}.pt")
    save_run(run, parts, state)
pictures = []
open_picture, train.open_picture = train.open_picture, read
train_step, train.train_step = train.train_step, step
save_run, train.save_run = train.save_run, save
torch.optim.AdamW = lambda groups, lr, fused: torch.optim.SGD(groups, lr)
train.main(sys.argv[1:])
"""
GRADUAL = ["--mixup", "0", "--cutmix", "0", "--erasing", "0", "--micro", "1", "--lr", "0.1",
           "--weight-decay", "0", "--epochs", "2", "--warmup", "0", "--size", "64"]


def torchrun(*command, cwd=HERE, **environment):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, command)],
                            env={**os.environ, "PYTHONPATH": str(HERE), **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd)


def test_processes_work_like_one_on_one_machine_or_two_that_lose_a_rank(
        folder, tmp_path, monkeypatch):
    """Equal weights on all ranks, and those of one process that takes four micro-steps.

    Rounding errors must stay small. AdamW makes whole steps of them where a gradient is 0, so this
    is SGD. They can change a cluster, so there is one. BN of two values keeps only their order, so
    the last maps are 2x2.
    """
    script = tmp_path / "patched.py"
    script.write_text(PATCHED)
    commands = [arguments(folder, tmp_path / name, *GRADUAL, model=EXACT)
                for name in ("one", "pair", "agents")]
    pair = torchrun("--standalone", "--nproc_per_node=2", script, *commands[1], cwd=tmp_path)
    endpoint = f"localhost:{get_free_port()}"
    agents = [torchrun(
        "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d",
        "--rdzv_id=job", f"--rdzv_endpoint={endpoint}", "--local_addr=localhost", script,
        *commands[2], cwd=tmp_path, DIES="1") for _ in range(2)]
    bad = torchrun("--standalone", "--nproc_per_node=2", HERE / "train.py", "--epochs", "0")
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: torch.optim.SGD(groups, lr))
    train.main(commands[0])
    said = [job.communicate()[0] for job in (pair, *agents, bad)]
    assert [job.returncode for job in (pair, *agents)] == [0, 0, 0], said
    assert bad.returncode and said[3].count("--epochs 0 is not in") == 1
    assert 'train.py", line' not in said[3]
    assert (tmp_path / "dead4").exists() and "2 process(es)" in said[0]
    models, pictures = zip(*(torch.load(tmp_path / run / f"rank{rank}.pt")
                             for run in ("pair", "agents") for rank in (0, 1)))
    evaluated = sorted(path for path in sum(pictures[:2], []) if "val" in Path(path).parts)
    assert evaluated == sorted(2 * [*map(str, folder.glob("val/*/*"))])  # each once an epoch
    for name, p in models[0].items():
        assert all(torch.equal(p, model[name]) for model in models[1:]), name
    train.seed_all("weights", 0)
    first = SecViT(train.model_config(train.parse(commands[0]), {}, 2))
    after = last(tmp_path / "one")["model"]
    moved = {name: (after[name] - p).abs().max() for name, p in first.named_parameters()}
    error = {name: (after[name] - models[0][name]).abs().max() for name in moved}
    assert max(moved.values()) > 0.005 and max(error.values()) < 1e-5
    losses = [last(tmp_path / run)["state"]["history"][1]["loss"] for run in ("one", "pair")]
    assert math.isclose(*losses, rel_tol=1e-4)


FORK = multiprocessing.get_context("forkserver")  # real processes that need not import torch anew
FORK.set_forkserver_preload(["train"])


def test_a_second_thread_may_train(folder, whole, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main, arguments(folder, tmp_path)).result()
        with pytest.raises(train.BadInput, match="nowhere"):
            pool.submit(train.main, ["--data", "nowhere"]).result()
    assert torch.equal(weights(tmp_path), weights(whole))


def train_and_die(arguments, number):
    """SIGKILL in the middle of the file that is written as number so and so."""
    fsync, calls = os.fsync, []

    def killed(descriptor):
        calls.append(1)
        if len(calls) == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    train.os.fsync = killed
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(arguments)


def test_kills_cost_nothing(folder, whole, tmp_path):
    """Whenever one comes, a run goes on from what it had written."""
    out = tmp_path / "run"
    for number in (1, 3, 5, 4, 6):
        process = FORK.Process(target=train_and_die, args=(arguments(folder, out), number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train.main(arguments(folder, out))
    assert torch.equal(weights(out), weights(whole))
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["images_per_s"] > 0 for record in records)
    best, expected = (torch.load(run / "best.pt")["model"] for run in (out, whole))
    assert all(torch.equal(best[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part, workers, step", [
    ("train", "0", 5), ("train", "1", 5), ("val", "0", 3)])  # the step that meets the picture
def test_an_unreadable_picture_is_named_and_costs_nothing(
        folder, whole, tmp_path, part, workers, step):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    broken = data / part / "blue" / "1.png"
    os.truncate(broken, 300)
    command = arguments(data, tmp_path / "run", "--workers", workers)
    with pytest.raises(train.Stopped, match=f"picture {broken} cannot be read"):
        train.main(command)
    assert last(tmp_path / "run")["state"]["step"] == step
    shutil.copy(folder / part / "blue" / "1.png", broken)
    train.main([*command, "--workers", "0"])
    assert torch.equal(weights(tmp_path / "run"), weights(whole))


def fail(error, parts, out):
    raise error


@pytest.mark.parametrize("number, act, message", [
    (3, partial(fail, torch.OutOfMemoryError("CUDA out of memory")), "type .* smaller --micro$"),
    (3, partial(fail, KeyboardInterrupt()), "stopped by Ctrl-C$"),  # as Python raises on SIGINT
    (3, partial(fail, BrokenPipeError()), "nobody reads what is printed: type the same .* pipe$"),
    pytest.param(
        3, lambda parts, out: (out / "last.pt.tmp").symlink_to("/dev/full"),
        "cannot write .*last.pt: No space left.* is intact.*same command",
        marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")),
    (3, lambda parts, out: (out / "last.pt.tmp").mkdir(), "cannot write .*last.pt: .* is intact"),
    (4, lambda parts, out: parts["model"].head[5].weight.data.fill_(math.inf),
     "the loss is nan in step 5.*; last.pt is from before: "),
    (5, lambda parts, out: parts["optimizer"].param_groups[0].update(lr=math.nan),
     "not finite after step 6.*; last.pt is from before: ")])  # the last step of an epoch
def test_what_stops_a_run_is_one_line_and_leaves_the_last_checkpoint(
        folder, tmp_path, at_step, capsys, number, act, message):
    at_step(number, partial(act, out=tmp_path))
    assert train.command_line(arguments(folder, tmp_path)) == 1
    line, = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert last(tmp_path)["state"]["step"] == 3 and weights(tmp_path).isfinite().all()
    assert not [path for path in tmp_path.glob("*.tmp") if path.is_file()]


# --------------------------------------------------------------------------------------- notebooks

LESSONS = sorted((HERE / "notebooks").glob("*.ipynb"))
LONGEST_FIRST = sorted(LESSONS, key=lambda path: path.stem[:2] not in ("07", "03", "05"))


def answers(cell):
    """An exercise with each of its wrong answers, unsolved, and with each other right answer."""
    check = cell.source[cell.source.index("\n# Check"):]
    unsolved = draw.unsolved(cell.source).partition("\n# Check")[0]
    for expected, texts in (("raises-exception", [unsolved, *cell.metadata["wrong"]]),
                            ("right", cell.metadata["right"])):
        for text in texts:
            yield nbformat.v4.new_code_cell(text + check, metadata=dict(tags=[expected]))


def run_lesson(path, folder):
    """Runs a copy: a check must refuse wrong answers, and say why right ones are right."""
    (folder / "notebooks").mkdir()
    shutil.copy(HERE / "secvit.py", folder)
    shutil.copy(HERE / "notebooks" / "draw.py", folder / "notebooks")
    lesson, cells = nbformat.read(path, as_version=4), []
    for cell in lesson.cells:
        if "\n# Check" in cell.source:
            cells += answers(cell)
            cell.metadata.tags = ["right"]
        cells.append(cell)
    lesson.cells = cells
    nbclient.NotebookClient(lesson, timeout=600, startup_timeout=600, resources=dict(
        metadata=dict(path=folder / "notebooks"))).execute()
    for cell in cells:
        tags, said = cell.metadata.get("tags", []), str(cell.get("outputs"))
        if "raises-exception" in tags:
            assert "'ename': 'AssertionError'" in said, f"passed, though wrong: {cell.source}"
        if "right" in tags:
            assert "Right" in said, f"failed, though right: {cell.source}"


@pytest.fixture(scope="session", autouse=True)
def running(tmp_path_factory, request):
    """The lessons of this session, two at a time, beside the other tests."""
    chosen = {item.callspec.params["path"] for item in request.session.items
              if item.originalname == "test_a_lesson_runs_and_its_checks_tell_right_answers"}
    pool = ProcessPoolExecutor(2, mp_context=FORK)
    yield {path: pool.submit(run_lesson, path, tmp_path_factory.mktemp(path.stem))
           for path in LONGEST_FIRST if path in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_one_form_and_is_stored_clean(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words = len(re.sub("<details>.*?</details>", "", text, flags=re.DOTALL).split())
    exercises = [cell for cell in code if "\n# Check" in cell.source]
    reference = path.stem.startswith("08")
    assert words <= (2500 if reference else 1300) and len(code) <= (16 if reference else 12)
    assert len(exercises) == (0 if reference else 3)
    assert all(len(cell.metadata["wrong"]) >= 2 and cell.metadata["right"] for cell in exercises)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any("execution" in cell.metadata for cell in code)  # the hours and minutes
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert not re.search(r"/(tmp|root|home|work|usr|opt)/|Warning|\r", output.get("text", ""))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_its_checks_tell_right_answers(path, running):
    running[path].result()


def test_copies_for_students_have_no_outputs_and_no_solutions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw.py", "--student", str(tmp_path)])
    runpy.run_path(str(HERE / "notebooks" / "draw.py"), run_name="__main__")
    for path in LESSONS:
        solved, copied = (nbformat.read(folder / path.name, as_version=4).cells
                          for folder in (path.parent, tmp_path))
        assert not any(cell.metadata or cell.get("outputs") for cell in copied)
        text, solution = ("\n".join(cell.source for cell in cells) for cells in (copied, solved))
        assert "SOLUTION" not in text and "For teachers" not in text
        assert text.count("...  # your lines") == solution.count("# BEGIN SOLUTION")
    assert {"draw.py", "secvit.py"} < {*os.listdir(tmp_path)}
