"""Layers inside of Inductor's graph: a pass that puts what they compute in the place of their operators.

``torch.compile`` traces a layer as the operators of :mod:`dpfast.capture.compiled_tap`, which Inductor would call as
they are. This pass, over the graph of forward and backward together, replaces them by the layer's own operators, which
Inductor fuses with those around them; and what their backward would record goes to one operator at the graph's end,
:mod:`dpfast.capture.graph_calls`. Where it does nothing, the operators are run: by other backends, for batches of any
size, and where a graph of this kind has not been thought of.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dpfast.capture import compiled_tap
from dpfast.capture.graph_calls import AT_INDICES, IN_16_BITS, INSIDE, OF_ANY_SIZE, UNUSUAL, GraphCall, GraphCalls
from dpfast.capture.tap import Call, Tap, Use, taps

logger = logging.getLogger(__name__)
AT_INDEX = ("scatter_add", "scatter_reduce", "index_put", "index_add", "index_reduce", "max_pool", "put_accumulate")
# What a graph knows of a node besides its values: checkpoints, and where it comes from.
KEPT = (
    "recompute",
    "ac_graph_id",
    "ac_region_id",
    "has_backward_hook",
    "partitioner_tag",
    "nn_module_stack",
    "stack_trace",
)


class LayersInGraph(CustomGraphPass):
    """The pass, :func:`expand`, as Inductor takes it."""

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))

    def __call__(self, graph: Graph) -> None:
        expand(graph)


def install() -> None:
    """Have Inductor run the pass, after those that are there."""
    there = config.joint_custom_pre_pass
    passes = [] if there is None else [*there] if isinstance(there, (list, tuple)) else [there]
    if not any(isinstance(each, LayersInGraph) for each in passes):
        config.joint_custom_pre_pass = [*passes, LayersInGraph()] if passes else LayersInGraph()


def expand(graph: Graph) -> None:
    """Layers' operators of a joint graph, replaced by what they compute; nothing is done if not all of them can be."""
    forwards = graph.find_nodes(op="call_function", target=torch.ops.dpfast.tapped.default)
    backwards = graph.find_nodes(op="call_function", target=torch.ops.dpfast.tapped_backward.default)
    if not backwards:
        return
    used = {node.args[4]: taps[node.args[4]] for node in forwards}
    made_by = {_key(node.args[:9]): node for node in forwards}
    gradient = _token_gradient(graph, backwards)
    known = all(_key((node.args[0], *node.args[2:10])) in made_by for node in backwards)
    outcome = INSIDE
    if not all(map(_is_static, forwards)):
        outcome = OF_ANY_SIZE
    elif not all(node.args[8] for node in forwards):
        outcome = IN_16_BITS
    elif adds_at_indices(graph):
        outcome = AT_INDICES
    elif gradient is None or not known or len({id(tap.recorder) for tap in used.values()}) > 1:
        outcome = UNUSUAL
    expansion = None
    if outcome is INSIDE:
        expansion = _Expansion(graph, forwards, backwards, made_by, gradient)
        try:
            expansion.trace()
        except Exception as error:  # a layer that cannot be traced on its own stays the operator that it is
            logger.warning("layers are not made a part of the compiled graph, as one cannot be traced: %s", error)
            outcome, expansion = UNUSUAL, None
    for tap in used.values():
        tap.recorder.compiled[tap.name] = outcome
    if expansion is not None:
        expansion.insert()


def adds_at_indices(graph: Graph) -> bool:
    """Whether the graph has sums that Inductor makes in place, one element at a time.

    Its scheduler (torch 2.13, on a CPU) put what reads such a sum before the sum, where a backprop of max pooling had
    several readers in several layouts: the backprop was zero. A layer's backprop has one reader more here.
    """
    return any(word in str(node.target) for node in graph.nodes for word in AT_INDEX)


class _Expansion:
    """What the operators of a graph become. Nothing of the graph is changed before everything is traced."""

    def __init__(self, graph: Graph, forwards: Any, backwards: Any, made_by: Any, gradient: Any):
        self.graph, self.forwards, self.backwards, self.made_by = graph, forwards, backwards, made_by
        self.gradient = gradient
        self.fake: Any = detect_fake_mode([node.meta["val"] for node in forwards])
        self.batch = forwards[0].args[0].meta["val"].shape[0]
        self.modules: dict[Node, GraphModule] = {}  # what takes a node's place
        self.traced: dict[Any, GraphModule] = {}  # the same, by what it depends on: equal layers are traced once
        self.saved: dict[Node, list[Node]] = {}  # what a layer's forward leaves for its backward

    def trace(self) -> None:
        for node in self.forwards:
            self._trace_forward(node)
        for node in self.backwards:
            if node.args[-1]:  # the input gradient is wanted
                self._trace_backward(node)

    def insert(self) -> None:
        for node in self.forwards:
            _, x, weight, bias, handle, number, *_ = node.args
            y, *self.saved[node] = self._inserted(node, [x, *_params(handle, number, weight, bias)])
            node.replace_all_uses_with(y)
        given: dict[Node, int] = {}
        graph_calls = GraphCalls([self._insert_backward(node, given) for node in self.backwards], self.batch)
        with self.graph.inserting_before(self.gradient):
            arguments = (self.forwards[0].args[0], list(given), graph_calls.name)
            end = self.graph.call_function(torch.ops.dpfast.clipped_in_graph.default, arguments)
            end.meta = {**self.gradient.meta}
        self.gradient.replace_all_uses_with(end)
        self.graph.eliminate_dead_code()
        for node in (*self.backwards, *self.forwards):
            if node in self.graph.nodes:
                self.graph.erase_node(node)
        self.graph.lint()

    def _trace_forward(self, node: Any) -> None:
        _, x, weight, bias, handle, number, _, autocast, _ = node.args
        tap, use = _of(handle, number)

        def run(x: Tensor, *params: Any) -> list[Tensor]:
            call = Call(tap, use.spec, self.batch)
            with compiled_tap.autocasting(x, autocast):
                return [call.forward(x, *params), *call.saved]

        values = [x, *_params(handle, number, weight, bias)]
        self.modules[node] = self._traced(run, ("forward", type(tap.layer), repr(use.spec), autocast), values)

    def _trace_backward(self, node: Any) -> None:
        _, G, x, weight, bias, handle, number, *_ = node.args
        tap, use = _of(handle, number)
        params = _params(handle, number, weight, bias)

        def run(G: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
            call = Call(tap, use.spec, self.batch)
            call.saved = tuple(rest[len(params) :])
            return [call.input_gradient(G, x, *rest[: len(params)]).contiguous()]

        (made,) = self.modules[self._forward_of(node)].graph.find_nodes(op="output")
        values = [G, x, *params, *made.args[0][1:]]
        self.modules[node] = self._traced(run, ("backward", type(tap.layer), repr(use.spec)), values)

    def _forward_of(self, node: Any) -> Node:
        return self.made_by[_key((node.args[0], *node.args[2:10]))]

    def _insert_backward(self, node: Any, given: dict[Node, int]) -> GraphCall:
        _, G, x, weight, bias, handle, number, shared, *_ = node.args
        tap, use = _of(handle, number)
        params = _params(handle, number, weight, bias)
        saved = self.saved[self._forward_of(node)]
        if node in self.modules:
            (gx,) = self._inserted(node, [G, x, *params, *saved])
            for user in [*node.users]:
                if user.target is operator.getitem and user.args[1] == 0:
                    user.replace_all_uses_with(gx)
        rows = 1 if shared else x.meta["val"].shape[0]
        layout = tap.recorder.layout_of(tap, rows, x.meta["val"].dim(), self.batch, use.spec)

        def place(part: Any) -> int:
            return given.setdefault(part, len(given))

        at = [None if p is None else place(p) for p in params]
        return GraphCall(tap, use, shared, place(G), place(x), tuple(at), tuple(map(place, saved)), layout)

    def _traced(self, run: Callable[..., list[Tensor]], kind: Any, inputs: Sequence[Any]) -> GraphModule:
        """``run`` on what these nodes hold."""
        values = [None if part is None else part.meta["val"] for part in inputs]
        key = (*kind, *(None if v is None else (v.shape, v.stride(), v.dtype, v.device) for v in values))
        if key not in self.traced:
            with self.fake, torch.no_grad():
                self.traced[key] = make_fx(run, decomposition_table=select_decomp_table())(*values)
        return self.traced[key]

    def _inserted(self, before: Node, inputs: Sequence[Any]) -> list[Node]:
        """The nodes that take the place of ``before``: what they return."""
        module, places = self.modules[before], iter(inputs)
        mine: dict[Node, Any] = {}
        about = {name: before.meta[name] for name in KEPT if name in before.meta}
        with self.graph.inserting_before(before):
            for node in module.graph.nodes:
                if node.op == "placeholder":
                    mine[node] = next(places)
                elif node.op == "output":
                    return [mine[out] for out in node.args[0]]
                elif node.op == "get_attr":
                    mine[node] = self._constant(getattr(module, node.target))
                else:
                    mine[node] = self.graph.node_copy(node, lambda theirs: mine[theirs])
                    mine[node].meta = {**about, **{k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")}}
        raise AssertionError("a traced function without an output")

    def _constant(self, value: Tensor) -> Node:
        """A tensor that a layer's code has made of numbers."""
        owner = self.graph.owning_module
        assert owner is not None
        name = f"_dpfast_constant_{sum(name.startswith('_dpfast_constant_') for name in vars(owner))}"
        setattr(owner, name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.fake.from_tensor(value) if not hasattr(value, "fake_mode") else value
        return node


def _of(handle: Any, number: Any) -> tuple[Tap, Use]:
    tap = taps[handle]
    return tap, tap.uses[number]


def _params(handle: Any, number: Any, *given: Any) -> list[Any]:
    """Those of weight and bias that the layer has."""
    return list(given[: len(_of(handle, number)[1].params)])


def _key(arguments: Any) -> tuple[Any, ...]:
    return tuple(arguments)


def _is_static(node: Any) -> bool:
    held = [part.meta["val"] for part in node.args if isinstance(part, Node)]
    return all(isinstance(size, int) for x in held for size in x.shape)


def _token_gradient(graph: Graph, backwards: Sequence[Node]) -> Node | None:
    """The node that is the token's gradient: a sum of what every backward operator has made of it, and of no more."""
    parts = [user for node in backwards for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    if len(parts) != len(backwards):
        return None
    known = set(parts)
    last = parts[0]
    for node in graph.nodes:  # in the order of the graph
        if node.target is torch.ops.aten.add.Tensor and all(part in known for part in node.args):
            known.add(node)
            last = node
    inside = all(user in known or user.op == "output" for node in known for user in node.users)
    ends = [node for node in known if any(user.op == "output" for user in node.users)]
    return last if inside and ends == [last] else None
