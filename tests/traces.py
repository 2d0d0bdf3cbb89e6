"""PyTorch's exporter, asked once for the same module: it takes seconds, and many tests export the same one."""

import hashlib
import io
from collections import OrderedDict
from typing import Any

import onnx
import torch
from torch import nn

from dcformer_deploy.export import trace

#: Graphs that are kept: tests of one file ask for the same few.
_MOST = 8


class Traces:
    """Stands for ``trace._trace``, which is ``real``. ``traced``: how often the exporter was really asked."""

    def __init__(self) -> None:
        self.real, self.traced = trace._trace, 0
        self._known = OrderedDict[str, onnx.ModelProto]()

    def __call__(self, module: nn.Module, example: tuple[torch.Tensor, ...], *rest: Any) -> onnx.ModelProto:
        key = _key(module, [(tuple(tensor.shape), tensor.dtype) for tensor in example], rest)
        if key not in self._known:
            self.traced += 1
            self._known[key] = self.real(module, example, *rest)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        copy = onnx.ModelProto()
        copy.CopyFrom(self._known[key])  # exports go on to change it
        return copy


def _key(module: nn.Module, *rest: Any) -> str:
    """Of what a graph depends on: the code of forwards, weights, what else modules hold, and how it is asked for.

    Not of functions that a forward calls: a test that patches one needs ``traced_anew``.
    """
    content = io.BytesIO()
    torch.save(module.eval(), content)
    forwards = [(name, getattr(part.forward, "__func__", part.forward)) for name, part in module.named_modules()]
    code = [(name, forward.__code__.co_code, forward.__code__.co_consts, forward.__code__.co_names)
            for name, forward in forwards]
    return hashlib.sha256(content.getvalue() + repr((code, rest)).encode()).hexdigest()
