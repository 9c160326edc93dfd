"""The gaussians world: points of a mixture of Gaussians, whose denoiser is known in closed form."""
