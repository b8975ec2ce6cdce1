"""What latents mean, in numbers. One metric per file; plain numpy arrays in, plain numbers out, except `bound`, which runs the networks.

Factor metrics are blind to the scale of a code: give them *sampled* codes z ~ q(z|x), or live dimensions only.
"""
