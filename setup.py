"""What pyproject.toml cannot say: the packages, of which kernels/ is installed as xpo_fast.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["xpo_fast*"]), "xpo_fast.kernels"],
    package_dir={"xpo_fast.kernels": "kernels"},
)
