"""Triton kernels, reachable only as `sami_fast.kernels`; see README.md beside this file for what comes."""

if __name__ != "sami_fast.kernels":
    raise ImportError("import sami_fast.kernels, not kernels: this folder is installed inside the package")
