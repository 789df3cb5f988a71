"""Dropout that functions do, and not modules: attention of Transformers' models has it as an argument."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DROPOUTS = (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)
OF_TORCH = (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout)


class WithoutDropout(TorchFunctionMode):
    """Within, functions of dropout return what they are given, and attention drops nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS or func in OF_TORCH:
            x: Tensor = args[0] if args else kwargs["input"]
            return x
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = kwargs | {"dropout_p": 0.0}
        elif func is F.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs)
            args, kwargs = (), bound.arguments | {"dropout_p": 0.0}
        return func(*args, **kwargs)
