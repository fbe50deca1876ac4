"""Twins of layers: each computes the same as a layer of the network, faster on some device."""
