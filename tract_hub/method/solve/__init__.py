"""Division of a gradient by the damped Gram matrix."""
