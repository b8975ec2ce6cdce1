"""Triton kernels, reachable only as `sami_fast.kernels`: <op>.py holds the kernels of an op, then their launchers.

A launcher takes and returns tensors, knows nothing of autograd and has a twin of the same name and signature in `sami_fast.reference`.
"""

if __name__ != "sami_fast.kernels":
    raise ImportError("import sami_fast.kernels, not kernels: this folder is installed inside the package")
