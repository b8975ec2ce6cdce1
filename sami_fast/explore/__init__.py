"""A local page to play with a trained model: images in, latents moved by sliders, pictures out. It needs the extra `explore`."""
