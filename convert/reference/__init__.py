"""What jddim is compared with, in plain PyTorch: the Ho et al. UNet (`unet`) and the samplers (`ddim`)."""
