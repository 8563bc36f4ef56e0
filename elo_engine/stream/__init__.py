"""A whole model in layer-major order, with a few of its layers on the device: layers outside, micro-batches inside."""
