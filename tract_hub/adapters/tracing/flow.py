"""What is known of a tensor on its way from the pixels, and how each aten operation changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What a tensor is, seen from the pixels."""

    PIXELS = "pixels"  # affine in the pixels through fixed operations
    NONLINEAR = "nonlinear"  # from the pixels, but no longer affine in them
    FEATURES = "features"  # behind a first layer


@dataclass(frozen=True)
class Flow:
    """How the pixels reached a tensor.

    Attributes:
        kind: what the tensor is.
        path: aten operations passed, in order.
        trained: what normalised or shifted the pixels on the way by learnt amounts.

    """

    kind: Kind
    path: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tag:
    """What is known of one tensor's storage.

    Attributes:
        flow: how the pixels reached it; None where they did not.
        parameters: names of the parameters it was computed from.

    """

    flow: Flow | None = None
    parameters: frozenset[str] = field(default_factory=frozenset)


NOTHING = Tag()

MOVES = frozenset(
    # views and copies
    "alias as_strided clone contiguous copy detach diagonal expand lift_fresh movedim permute "
    "reshape select slice squeeze split split_with_sizes t transpose unbind unfold unsafe_split "
    "unsqueeze view view_as_real view_as_complex _conj _unsafe_view _reshape_alias _to_copy "
    "_reshape_copy real imag squeeze_copy _conj_physical conj_physical resolve_conj "
    # joining and rearranging
    "cat concat stack constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d flip roll repeat repeat_interleave "
    "gather index index_select index_put _index_put_impl take narrow pixel_shuffle im2col col2im "
    "pixel_unshuffle channel_shuffle rot90 slice_scatter select_scatter scatter as_strided_scatter "
    "unfold_backward masked_select masked_fill masked_scatter where "
    # sums, and sums with fixed coefficients
    "add sub rsub neg sum mean cumsum diff tril triu positive "
    "_fft_r2c _fft_c2c _fft_c2r avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa".split()
)
"""Jointly affine in all tensors that hold values."""

PRODUCTS = frozenset(
    "mul mm bmm matmul mv dot addmm baddbmm addbmm einsum convolution linear".split()
)
"""Affine in any one of their tensors while the others are fixed."""

LAYERS = PRODUCTS - {"mul"}
"""With a parameter, these are layers."""

CONSTANTS = frozenset(
    "new_empty new_empty_strided new_full new_ones new_zeros empty_like full_like ones_like "
    "zeros_like rand_like randn_like randint_like zero".split()
)
"""These take no more than a shape from their tensor."""

FIRST_ONLY = frozenset(("div", "grid_sampler_2d", "grid_sampler_3d"))
"""Affine in the first tensor, not in what divides it or says where to sample it."""

NORMALISATIONS = frozenset(
    "native_batch_norm cudnn_batch_norm _native_batch_norm_legit native_layer_norm "
    "_native_batch_norm_legit_no_training native_group_norm _fused_rms_norm batch_norm "
    "_batch_norm_with_update _batch_norm_no_update _batch_norm_impl_index".split()
)

SHIFTS = MOVES | NORMALISATIONS | FIRST_ONLY | {"mul"}
"""With a parameter, these shift, scale or fill: the pixels stay pixels, no longer untouched."""

_SELECTING = frozenset(["index", "index_select", "gather", "take", "masked_select", "index_put"])


def after(operation: str, tags: Sequence[Tag]) -> Tag:
    """Say what an operation makes of its tensors.

    Args:
        operation: aten's name without namespace, overload and the underscore of in-place.
        tags: of its tensor arguments, in order; the tensor that is divided, masked or selected
            from comes first.

    """
    if operation in CONSTANTS:
        return NOTHING
    parameters = frozenset[str]().union(*(tag.parameters for tag in tags))
    if operation in _SELECTING:  # what chooses the elements is not mixed into them
        tags = [tag for i, tag in enumerate(tags) if i == 0 or not _is(tag, Kind.NONLINEAR)]
        if not tags[0].flow and operation != "index_put":  # a table, looked up by the pixels
            operation = "table lookup"
    flows = [tag.flow for tag in tags if tag.flow]
    if not flows:
        return Tag(parameters=parameters)
    for kind in (Kind.FEATURES, Kind.NONLINEAR):
        for flow in flows:
            if flow.kind is kind:
                return Tag(flow)
    return Tag(_pixels_after(operation, tags, flows, sorted(parameters)))


def _pixels_after(
    operation: str, tags: Sequence[Tag], flows: Sequence[Flow], parameters: Sequence[str]
) -> Flow:
    path = _extend(flows[0].path, operation)
    trained = tuple(dict.fromkeys(name for flow in flows for name in flow.trained))
    if parameters and operation in LAYERS:
        return Flow(Kind.FEATURES, path)
    if operation in NORMALISATIONS:
        named = parameters or (operation,)
        return Flow(Kind.PIXELS, path, (*trained, *named))
    if not _is_affine(operation, tags, len(flows)) or (parameters and operation not in SHIFTS):
        return Flow(Kind.NONLINEAR, path)
    return Flow(Kind.PIXELS, path, (*trained, *parameters))


def _is_affine(operation: str, tags: Sequence[Tag], pixel_tensors: int) -> bool:
    if operation in MOVES:
        return True
    if operation in FIRST_ONLY:
        return all(tag.flow is None for tag in tags[1:])
    return operation in PRODUCTS and pixel_tensors == 1


def _is(tag: Tag, kind: Kind) -> bool:
    return tag.flow is not None and tag.flow.kind is kind


def _extend(path: tuple[str, ...], operation: str) -> tuple[str, ...]:
    quiet = operation in {"detach", "alias", "t", "lift_fresh", "clone"}
    return path if quiet or path[-1:] == (operation,) else (*path, operation)
