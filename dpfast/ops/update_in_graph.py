"""``noisy_step_`` as an operator of a recorded graph: what is a number there, it reads from tensors.

A graph keeps the numbers with which it was recorded, and a key that is kept is noise that two batches share. Here key,
step and hyperparameters are values of two tensors, which every run of the graph is given anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields

import torch
from torch import Tensor

from dpfast.ops.noise import KEY_WORDS, Noise
from dpfast.ops.update import ROUNDINGS, SGD, Adam, noisy_step_

_RULES = {"SGD": (SGD, 4), "Adam": (Adam, 8)}  # the rest of their fields are true or false
NUMBERS = 4 + max(len(fields(rule)) for rule, _ in _RULES.values())
WORDS = KEY_WORDS + 3

_library = torch.library.Library("dpfast", "FRAGMENT")
_library.define(
    "noisy_step_in_graph_(Tensor[] summed, Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] first, "
    "Tensor(d!)[] second, Tensor(e!)[] third, Tensor(f!)[] masters, Tensor numbers, Tensor words, Tensor lost, "
    "SymInt[] parameters, SymInt[] offsets, str rule, str rounding, bool secure) -> ()"
)


def numbers_of(rule: SGD | Adam, noise: Noise) -> list[float]:
    """What :func:`noisy_step_in_graph_` takes as ``numbers``, for a float64 tensor of :data:`NUMBERS`."""
    numbers = [1.0, noise.std, noise.grid, noise.scale, *map(float, astuple(rule))]
    return numbers + [0.0] * (NUMBERS - len(numbers))


def words_of(noise: Noise, rounding_key: tuple[int, int]) -> list[int]:
    """What :func:`noisy_step_in_graph_` takes as ``words``, for an int64 tensor of :data:`WORDS`. A secret."""
    return [*noise.key, noise.step, *rounding_key]


def noisy_step_in_graph_(
    rule: type[SGD | Adam],
    params: Sequence[Tensor],
    summed: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    masters: Sequence[Tensor],
    parameters: Sequence[int],
    rounding: str,
    offsets: Sequence[int],
    numbers: Tensor,
    words: Tensor,
    lost: Tensor,
    secure: bool = False,
) -> None:
    """:func:`noisy_step_` of tensors that it has been given before, and has found nothing wrong with.

    | | what is written |
    |---|---|
    | ``numbers[0]`` is 0, as while the graph is recorded | nothing |
    | any of ``lost`` is true: a sample's norm is not finite, and so may be the sums | nothing |
    | else | what :func:`noisy_step_` writes, which is what is called |

    Where nothing is written, ``grads`` is what it was before: for float32 that is ``summed`` itself, without noise. The
    caller drops it.

    On a GPU the kernels read key, step and hyperparameters from its memory, so that a CUDA graph gets new ones at every
    replay. What they write is what :func:`noisy_step_` writes there, to the bit.

    Args:
        numbers: float64, where the parameters are: of :func:`numbers_of`, or zeros to write nothing.
        words: int64, where the parameters are: of :func:`words_of`.
        lost: ``[B]``: which samples are left out for their norm.
        secure: whether the noise is that of the secure mode, which has kernels of its own on a GPU.
    """
    first, second, third = (*states, [], [])[:3]
    torch.ops.dpfast.noisy_step_in_graph_(
        *(summed, grads, params, first, second, third, masters, numbers, words, lost),
        *(parameters, offsets, rule.__name__, rounding, secure),
    )


def _noisy_step_in_graph_(
    summed: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    third: Sequence[Tensor],
    masters: Sequence[Tensor],
    numbers: Tensor,
    words: Tensor,
    lost: Tensor,
    parameters: Sequence[int],
    offsets: Sequence[int],
    rule: str,
    rounding: str,
    secure: bool,
) -> None:
    writes, std, grid, scale, *of_rule = numbers.tolist()
    if not writes or bool(lost.any()):
        return
    *key, step, rounding_first, rounding_second = words.tolist()
    kind, split = _RULES[rule]
    flags = map(bool, of_rule[split : len(fields(kind))])
    states = [first] if kind is SGD else [first, second, third]
    noisy_step_(
        kind(*of_rule[:split], *flags),
        params,
        summed,
        grads,
        states,
        masters,
        parameters,
        Noise(tuple(key), step, std, grid, scale),
        rounding,
        (rounding_first, rounding_second),
        offsets,
        checked=True,
    )


def _on_cuda(
    summed: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    third: Sequence[Tensor],
    masters: Sequence[Tensor],
    numbers: Tensor,
    words: Tensor,
    lost: Tensor,
    parameters: Sequence[int],
    offsets: Sequence[int],
    rule: str,
    rounding: str,
    secure: bool,
) -> None:
    lists = [summed, grads, params, first, *([] if rule == "SGD" else [second, third]), masters]
    op = torch.ops.dpfast.noisy_sgd_in_graph_ if rule == "SGD" else torch.ops.dpfast.noisy_adam_in_graph_
    op(*lists, parameters, offsets, numbers, words, lost, secure, ROUNDINGS.index(rounding))


_library.impl("noisy_step_in_graph_", _noisy_step_in_graph_, "CPU")
_library.impl("noisy_step_in_graph_", _on_cuda, "CUDA")
