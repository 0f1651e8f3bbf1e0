"""Fits a LoRA patch onto the UNet of Stable Video Diffusion."""
