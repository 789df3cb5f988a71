"""Rules of the operators that neural networks are made of: convolutions, normalisation, attention, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpfast.separation.labels import Label, Rows
from dpfast.separation.rules import Op, broadcast, moved, rule, together


def first(op: Op, names: Sequence[str] | None = None) -> Label:
    """Operators whose first dimension is a batch: each of its indices by itself."""
    given = op.given() if names is None else [x for x in (op.a.get(name) for name in names) if isinstance(x, Tensor)]
    label = together(op, [op.labels[x] for x in given])
    if isinstance(label, Rows) and label.dim not in (0, None):
        return op.lost() if label.dim == 1 else op.met()
    return label


LEAST_DIMS = {
    "pixel_shuffle": 4,
    "pixel_unshuffle": 4,
    "channel_shuffle": 3,
    "im2col": 4,
    "col2im": 3,
    "multinomial": 2,
}


def each_first(op: Op) -> list[Label]:
    label = first(op)
    if isinstance(label, Rows) and op.given()[0].dim() < LEAST_DIMS.get(op.name, 0):
        label = op.met()  # it was called without a batch
    if not isinstance(label, Rows) or label.dim is None:
        return [label for _ in op.out]
    fits = [x is not None and x.dim() > 0 and x.shape[0] == len(label.owners) for x in op.out]
    return [label if fit else op.lost() for fit in fits]


rule(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d max_unpool2d max_unpool3d "
    "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward avg_pool3d_backward "
    "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward mkldnn_max_pool2d "
    "adaptive_avg_pool2d_backward upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest1d_backward upsample_nearest2d_backward "
    "upsample_nearest3d_backward upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
    "upsample_trilinear3d_backward _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward "
    "grid_sampler_2d grid_sampler_3d grid_sampler_2d_backward grid_sampler_3d_backward pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle im2col col2im reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d reflection_pad1d_backward reflection_pad2d_backward "
    "reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward "
    "multinomial affine_grid_generator"
)(each_first)


@rule("convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution")
def convolution(op: Op) -> Label:
    x = "input" if "input" in op.a else "self"
    label = op[x]
    if isinstance(label, Rows) and label.dim == 1:
        label = _of_groups(op, label)
    else:
        label = first(op, (x,))
    return together(op, [label, *scales(op)])


def _of_groups(op: Op, label: Rows) -> Label:
    """Samples side by side in the channels, as vmap has them: apart if no group has channels of two."""
    groups, channels = op.a["groups"], op.a["weight"].shape[0]
    each = label.owners.each.reshape(groups, -1)
    if (each != each[:, :1]).any():
        return op.met()
    return op.labels.rows(1, each[:, 0].repeat(channels // groups), label.by_data)


@rule("convolution_backward")
def convolution_backward(op: Op) -> list[Label]:
    """Of the input, the weight and the bias."""
    grad, x = op["grad_output"], op["input"]
    if isinstance(grad, Rows) and isinstance(x, Rows) and grad.dim == x.dim == 1:
        label = together(op, [grad, _of_groups(op, x), op["weight"]])
        weights = replace(label, dim=0) if isinstance(label, Rows) else label
        return [x if isinstance(label, Rows) else label, weights, weights]
    label = together(op, [first(op, ("grad_output", "input")), op["weight"]])
    over = op.met(summed=True) if isinstance(label, Rows) else label
    return [label, over, over]


def scales(op: Op) -> list[Label]:
    """Labels of weight and bias: they are for all samples, and may be none's."""
    found = [op["weight"], op["bias"]]
    return [op.lost() if isinstance(label, Rows) else label for label in found]


@rule("native_layer_norm _fused_rms_norm native_layer_norm_backward _fused_rms_norm_backward")
def layer_norm(op: Op) -> list[Label]:
    x = op.a["input"]
    label = together(op, [op["grad_out"], op["input"], *scales(op)])
    if isinstance(label, Rows) and label.dim is not None and label.dim >= x.dim() - len(op.a["normalized_shape"]):
        label = op.met()
    over = op.met(summed=True) if isinstance(label, Rows) else label
    weights = "output_mask" in op.a
    return [over if weights and out is not None and out.shape != x.shape else label for out in op.out]


@rule("native_group_norm native_group_norm_backward")
def group_norm(op: Op) -> list[Label]:
    label = together(op, [first(op, ("grad_out", "input")), *scales(op)])
    over = op.met(summed=True) if isinstance(label, Rows) else label
    return [label if k == 0 or "output_mask" not in op.a else over for k in range(len(op.out))]


@rule(
    "native_batch_norm _native_batch_norm_legit _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm "
    "miopen_batch_norm native_batch_norm_backward _batch_norm_impl_index cudnn_batch_norm_backward "
    "_native_batch_norm_legit_no_training batch_norm_backward"
)
def batch_norm(op: Op) -> list[Label]:
    """By statistics of each channel over everything else: samples that are channels (an instance norm) stay apart."""
    x = op.a.get("input")
    assert x is not None
    beside = [op.labels[y] for y in op.given() if y.dim() != x.dim()]
    beside = [moved(other, lambda d: d + 1) for other in beside]  # of channels
    label = together(op, [*(op.labels[y] for y in op.given() if y.dim() == x.dim()), *beside])
    trained = op.a.get("training", op.a.get("train", op.name != "_native_batch_norm_legit_no_training"))
    channels = moved(label, lambda d: d - 1)
    if isinstance(label, Rows) and label.dim != 1 and label.dim is not None:
        channels = op.met()
        label = op.met() if trained else label
    for name in ("running_mean", "running_var") if trained else ():
        if isinstance(op.a.get(name), Tensor):  # written to, which the operator does not say
            op.labels.write(op.a[name], channels, op.lost())
    return [label if out is not None and out.dim() == x.dim() else channels for out in op.out]


@rule("embedding")
def embedding(op: Op) -> Label:
    if isinstance(op["weight"], Rows):
        return op.lost()
    return together(op, [op["indices"], op["weight"]])


@rule("embedding_dense_backward")
def embedding_backward(op: Op) -> Label:
    label = together(op, [op["grad_output"], op["indices"]])
    if not isinstance(label, Rows):
        return label
    ids, rows = op.a["indices"], op.a["num_weights"]
    if label.dim is not None and rows and rows % op.labels.batch == 0:  # a table of each sample's own, as vmap has it
        owners = torch.from_numpy(label.owners.each).view([-1 if d == label.dim else 1 for d in range(ids.dim())])
        if bool((ids.cpu() // (rows // op.labels.batch) == owners).all()):
            return op.labels.in_order(0, rows)
    return op.met(summed=True)


ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"
)


@rule(ATTENTION)
@rule(" ".join(f"{name}_backward" for name in ATTENTION.split()))
def attention(op: Op) -> list[Label]:
    """Over positions and features; each sample (dimension 0) and head (dimension 1) by itself."""
    masks = [op.a[name] for name in ("attn_mask", "attn_bias") if isinstance(op.a.get(name), Tensor)]
    found = [op.labels[x] for x in op.given() if all(x is not mask for mask in masks)]
    found += [broadcast(op, mask, 4) for mask in masks]
    if any(isinstance(label, Rows) and label.dim not in (0, 1, None) for label in found):
        return [op.met() for _ in op.out]
    label = together(op, found)
    return [label if x is not None and x.dim() >= 3 else None for x in op.out]


# By name: the tensors that a loss compares, beside which it may have weights for classes.
LOSSES = (
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss kl_div l1_loss multi_margin_loss "
    "multilabel_margin_loss_forward"
)


@rule(LOSSES)
def loss(op: Op) -> Label:
    label = pointwise_of(op, ("self", "target"))
    if not isinstance(label, Rows) or op.a["reduction"] == 0:
        return label
    return op.met(summed=op.a["reduction"] == 2 or not label.by_data)


@rule(" ".join(f"{name.removesuffix('_forward')}_backward" for name in LOSSES.split()))
def loss_backward(op: Op) -> Label:
    return pointwise_of(op, ("grad_output", "self", "target"))


def pointwise_of(op: Op, names: Sequence[str]) -> Label:
    given = [op.a[name] for name in (*names, "weight") if isinstance(op.a.get(name), Tensor)]
    ndim = max(x.dim() for x in given)
    return together(op, [broadcast(op, x, ndim) for x in given])


@rule("nll_loss_forward nll_loss2d_forward")
def nll_loss(op: Op) -> list[Label]:
    """The mean divides by how many targets count, and by their weights: by other samples' too, if that varies."""
    target = op.a["target"]
    weight = op.lost() if isinstance(op["weight"], Rows) else op["weight"]
    label = together(op, [op["target"], moved(op["self"], lambda d: d - (d > 1)), weight])
    if not isinstance(label, Rows) or op.a["reduction"] == 0:
        return [label, None]
    if isinstance(self := op["self"], Rows) and self.dim == 1:
        return [op.met(), None]
    if op.a["reduction"] == 2:
        return [op.met(summed=True), None]
    if label.dim is None:
        return [label, label]
    counted = (target != op.a["ignore_index"]).to(torch.float64)
    if op.a["weight"] is not None:
        weights = op.a["weight"].detach().to(torch.float64)
        counted = counted * weights[target.clamp(0, len(weights) - 1)]
    rest = [d for d in range(target.dim()) if d != label.dim]
    rows = counted.sum(rest).cpu() if rest else counted.cpu()
    each = torch.zeros(op.labels.batch, dtype=torch.float64)
    each.index_add_(0, torch.from_numpy(label.owners.each), rows)
    alike = bool((each == each[0]).all())
    # Class weights and a padding id among the classes: as many in each sample today, and others in another batch.
    alike = alike and not label.by_data and op.a["weight"] is None and op.a["ignore_index"] < 0
    return [op.met(summed=alike), None if alike else op.met()]


@rule("nll_loss_backward nll_loss2d_backward")
def nll_loss_backward(op: Op) -> Label:
    target = moved(op["target"], lambda d: d + (d > 0))
    grad = op["grad_output"]
    return together(op, [op["self"], target, moved(grad, lambda d: d + (d > 0)), op["total_weight"]])
