"""Text to video in the unCLIP way: video CLIP, prior, and diffusion U-Nets in pixel space."""
