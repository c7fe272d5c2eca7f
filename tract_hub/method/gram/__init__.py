"""The Gram matrix of a layer's input, in pieces, and in what precision."""
