"""PyTorch diffusion checkpoints to jddim: read, recognise, rename, verify. Needs `jddim[convert]`."""
