"""Packages of sami-fast; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # `kernels` and `configs` lie at the top of the tree and install inside the package: a PyPI package `kernels` exists.
    packages=[*find_packages(include=["sami_fast", "sami_fast.*"]), "sami_fast.kernels", "sami_fast.configs"],
    package_dir={"sami_fast": "sami_fast", "sami_fast.kernels": "kernels", "sami_fast.configs": "configs"},
    package_data={"sami_fast.configs": ["*.yaml"], "sami_fast.kernels": ["README.md"]},
)
