"""Tensors in, vectors out: resolving and loading models, layers, pooling, image and text encoders."""
