"""Two sides of a layer: a device with slots, and the host memory in which other experts lie."""
