"""Text to video in the unCLIP way: video CLIP, prior, and a cascade of diffusion U-Nets in pixel space."""
