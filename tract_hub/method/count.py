"""How many floating-point operations TrAct makes, as it makes them on this CPU."""

from __future__ import annotations

from tract_hub.method.gram import onednn
from tract_hub.method.gram.matrix import goes_by_lines
from tract_hub.method.gram.panels import LARGE, PANEL
from tract_hub.method.gram.patches import count_rows, output_size
from tract_hub.method.gram.sliding import taps
from tract_hub.method.operations import LinearCall


def gram_operations(call: LinearCall) -> int:
    """Count those of the Gram matrices of all groups: two for a product."""
    return 2 * call.groups * (_by_lines(call) if goes_by_lines(call) else _panelled(call))


def solve_operations(call: LinearCall) -> int:
    """Count those of all groups: n³ / 3 for the factor, 2 n² × outputs to solve with it twice."""
    n = call.in_features
    return call.groups * (n**3 // 3) + 2 * n * call.weight.numel()


def _by_lines(call: LinearCall) -> int:
    """The first ``stride`` kernel rows of each window times all of it; a few lines more."""
    convolution = call.convolution
    if convolution is None:
        return 0
    height, n = convolution.kernel[0], call.in_features
    lines, width = output_size(convolution, tuple(call.input.shape[2:]))
    fresh = n * min(convolution.stride[0], height) // height
    return call.input.shape[0] * width * (lines + taps(convolution) - 1) * fresh * n


def _panelled(call: LinearCall) -> int:
    """Each panel of lines times what is from its diagonal block on."""
    n = call.in_features
    height = onednn.PANEL if onednn.suits(call.input.reshape(1, -1)) else PANEL
    height = height if n >= LARGE else max(n, 1)
    return count_rows(call) * sum(
        min(height, n - start) * (n - start) for start in range(0, n, height)
    )
