"""Twins of layers that are faster on some device, each equal to the layer that it stands for."""
