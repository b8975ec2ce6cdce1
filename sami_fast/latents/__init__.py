"""What is done with latents: images drawn from them, axes found among them, and the pictures and files that show both."""
