"""What a wheel holds: `rlhf_exp`, `conf/` as its package `rlhf_exp.conf`, and the Hydra plugins.

`conf/` stays at the top of the repository, where people look for it; pyproject.toml has the rest.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rlhf_exp*"]), "rlhf_exp.conf", "hydra_plugins"],
    package_dir={"rlhf_exp.conf": "conf"},
)
