"""How the pixels reached a tensor, read from the graph that autograd keeps of its computation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from tract_hub.method.calls import LinearCall


class Kind(Enum):
    """What a tensor is, seen from the pixels."""

    PIXELS = "pixels"  # affine in the pixels through fixed operations
    NONLINEAR = "nonlinear"  # from the pixels, but no longer affine in them
    MIXED = "mixed"  # pixels that features were joined to, or that features warp
    FEATURES = "features"  # behind a first layer


@dataclass(frozen=True)
class Flow:
    """How the pixels reached a tensor."""

    kind: Kind | None = None  # None where it did not come from the pixels
    inputs: tuple[str, ...] = ()  # of the forward, whose pixels they are
    path: tuple[str, ...] = ()  # operations passed, in order
    passed: tuple[str, ...] = ()  # what normalised or shifted the pixels: learnt, or their own
    frozen: tuple[str, ...] = ()  # maps passed
    statistic: bool = False  # whether it is a few numbers an image, such as its mean
    parameters: frozenset[str] = frozenset()  # where ``kind`` is None: it was computed from these


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that reads something which came from the pixels."""

    call: LinearCall | None  # None where it is no operation that TrAct treats
    operation: str
    flow: Flow  # how the pixels reached its input
    parameters: tuple[str, ...]  # of which its weight is made, the main one first
    modules: tuple[str, ...] = ()  # whose forward was running, outermost first
    derived: bool = False  # whether the weight is not the parameter itself
    obstacle: str | None = None  # why it cannot be treated
    frozen: bool = False  # whether none of its parameters takes a gradient


NOTHING = Flow()

OWN_STATISTICS = "a standardisation by the image's own statistics"
ROUNDING = "a rounding"

# Names of autograd's nodes without "Backward0". Affine together in all tensors that hold values:
MOVES = frozenset(
    # views and copies
    "Alias AsStrided Clone Copy CopyBackwards CopySlices Diagonal Expand Lift Movedim Permute Real "
    "ReshapeAlias ReshapeCopy Select SelectView Slice Split SplitWithSizes Squeeze T ToCopy "
    "Transpose Unbind Unfold UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze View "
    "Complex ViewAsComplex ViewAsReal Conj ConjPhysical ResolveConj Imag Fill Zero "
    # joining and rearranging
    "Cat Stack ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D "
    "ReplicationPad2D ReplicationPad3D Flip Roll Repeat RepeatInterleave Gather Index IndexSelect "
    "IndexPut IndexPutImpl Take PixelShuffle PixelUnshuffle ChannelShuffle Im2Col Col2Im Rot90 "
    "SliceScatter SelectScatter Scatter AsStridedScatter MaskedSelect MaskedFill MaskedScatter "
    "Where IndexCopy IndexAdd ScatterAdd "
    # sums, and sums with fixed coefficients
    "Add Sub Rsub Neg Sum Mean Cumsum Tril Triu Trace FftR2C FftC2C FftC2R AvgPool2D AvgPool3D "
    "AdaptiveAvgPool2D AdaptiveAvgPool3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
    "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleLinear1D "
    "UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D UpsampleBilinear2DAa "
    "UpsampleBicubic2DAa".split()
)

LAYERS = frozenset(
    "Addbmm Addmm Addmv Baddbmm Bmm Convolution Dot Linear Mm Mv MkldnnConvolution".split()
)
"""Affine in any one of their tensors while the others are fixed; with a parameter, a layer."""

BIASES = dict.fromkeys(("Convolution", "Linear", "MkldnnConvolution"), 2)
BIASES |= dict.fromkeys(("Addbmm", "Addmm", "Addmv", "Baddbmm"), 0)
"""Place of the tensor that these add: a bias may be trained where the weight is frozen (BitFit)."""

FIRST_ONLY = frozenset(("Div", "GridSampler2D", "GridSampler3D"))
"""Affine in the first tensor, not in what divides it or says where to sample it."""

NORMALISATIONS = frozenset(
    "NativeBatchNorm CudnnBatchNorm NativeBatchNormLegit NativeBatchNormLegitNoTraining "
    "NativeLayerNorm NativeGroupNorm FusedRmsNorm".split()
)

_SHIFTS = MOVES | FIRST_ONLY | {"Mul", "Addcmul"}
"""With a parameter, these shift, scale or fill: the pixels stay pixels, no longer untouched."""

_QUIET = {"t", "clone", "alias", "detach", "view_as"}
"""Left out of a path."""


@dataclass
class Graph:
    """What autograd remembers of one forward."""

    leaves: Mapping[int, Flow]  # ``id`` of the tensors that are pixels, and of the parameters
    trainable: frozenset[str]  # names of parameters; the others are constants
    layers: list[LayerCall]  # is added to where no known function applied a layer to the pixels
    passed_layer: bool = False  # whether the pixels have passed a first layer by now
    _known: dict[Any, Flow] = field(default_factory=dict)  # holds the nodes: they stay themselves

    def flow(self, tensor: Tensor) -> Flow:
        """Say how the pixels reached a tensor."""
        last = tensor.grad_fn
        if last is None:
            return self.leaves.get(id(tensor), NOTHING)
        todo: list[Any] = [last]
        while last not in self._known:  # each node after those that it depends on
            node = todo.pop()
            below = [child for child, _ in node.next_functions]
            new = [child for child in below if child is not None and child not in self._known]
            if new:
                todo += [node, *new]
            elif node not in self._known:
                self._known[node] = self._of_node(node, below)
        return self._known[last]

    def put(self, tensor: Tensor, flow: Flow) -> None:
        """Note what a function made, down to what was known of the tensors that it was given.

        Its last node is not enough: where the output is a view that is written into, autograd goes
        on from what it is a view of.
        """
        todo: list[Any] = [tensor.grad_fn]
        self._known.pop(tensor.grad_fn, None)
        while todo:
            node = todo.pop()
            if node is not None and node not in self._known and not hasattr(node, "variable"):
                self._known[node] = flow
                todo += [child for child, _ in node.next_functions]

    def _of_node(self, node: Any, below: Sequence[Any]) -> Flow:
        if hasattr(node, "variable"):
            return self.leaves.get(id(node.variable), NOTHING)
        flows = [self._known[child] if child else NOTHING for child in below]
        flow = self._after(operation_of(node), flows)
        if self.passed_layer and flow.kind and isinstance(node, BackwardCFunction):
            return replace(flow, kind=Kind.FEATURES)  # such as checkpointed layers
        return flow

    def _after(self, operation: str, flows: list[Flow]) -> Flow:
        parameters = frozenset[str]().union(*(flow.parameters for flow in flows))
        reached = [flow for flow in flows if flow.kind]
        if not reached:
            return Flow(parameters=parameters)
        pictures = [flow for flow in reached if not flow.statistic]
        standardised = bool(pictures) and len(pictures) < len(reached) and operation in _SHIFTS
        counted = pictures if standardised else reached
        learnt = parameters & self.trainable
        kind = self._kind_after(operation, flows, counted, learnt)
        passed = [*(flow.passed for flow in counted)]
        frozen = [*(flow.frozen for flow in counted)]
        if kind is Kind.PIXELS:
            passed.append(tuple(sorted(learnt)))
            if operation in NORMALISATIONS and not learnt:
                passed.append((_in_words(operation),))
            if standardised:
                passed.append((OWN_STATISTICS,))
            if operation == "Round":
                passed.append((ROUNDING,))
            if operation in LAYERS:
                frozen.append(tuple(sorted(parameters - learnt)))
        return Flow(
            kind=kind,
            inputs=_joined(flow.inputs for flow in reached),
            path=_extended(counted[0].path, _in_words(operation)),
            passed=_joined(passed),
            frozen=_joined(frozen),
            statistic=not pictures,
        )

    def _kind_after(
        self, operation: str, flows: list[Flow], reached: list[Flow], learnt: frozenset[str]
    ) -> Kind:
        kinds = {flow.kind for flow in reached}
        if kinds & {Kind.FEATURES, Kind.MIXED}:
            joined = Kind.MIXED in kinds or any(
                flow.kind is Kind.PIXELS and not flow.frozen for flow in reached
            )
            return Kind.MIXED if joined and operation in _SHIFTS else Kind.FEATURES
        if Kind.NONLINEAR in kinds:
            return Kind.NONLINEAR
        bias = BIASES.get(operation)
        factors = (flow.parameters for place, flow in enumerate(flows) if place != bias)
        multiplied = learnt.intersection(chain(*factors))
        if operation in LAYERS and multiplied and len(reached) == 1:
            names = tuple(sorted(multiplied))
            self.layers.append(LayerCall(None, _in_words(operation), reached[0], names))
            return Kind.FEATURES
        if operation in NORMALISATIONS:  # behind a frozen map it is features that are normalised
            return Kind.NONLINEAR if any(flow.frozen for flow in reached) else Kind.PIXELS
        if operation in MOVES or operation == "Round":
            return Kind.PIXELS
        in_one = operation in LAYERS or operation in ("Mul", "Addcmul", "Lerp")
        in_first = operation in FIRST_ONLY and flows[0] is reached[0]
        return Kind.PIXELS if len(reached) == 1 and (in_one or in_first) else Kind.NONLINEAR


def operation_of(node: Any) -> str:
    """Name of a node of autograd, without its ending: ``"Convolution"``."""
    return re.sub(r"(Backward\w*)?$", "", str(node.name()).rpartition("::")[2], count=1)


def _in_words(operation: str) -> str:
    """``UnsafeView`` as ``unsafe_view``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation).lower()


def _extended(path: tuple[str, ...], operation: str) -> tuple[str, ...]:
    return path if operation in _QUIET or path[-1:] == (operation,) else (*path, operation)


def _joined(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for several in names for name in several))
