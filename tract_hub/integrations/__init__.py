"""Ways into published training code: they connect, and compute nothing."""
