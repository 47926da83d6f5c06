"""What pyproject.toml cannot say: the folders configs/ and launch/ are installed within the package `limbeck`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["limbeck*", "trainer*", "strategies*"]), "limbeck.configs", "limbeck.launch"],
    package_dir={"limbeck.configs": "configs", "limbeck.launch": "launch"},
)
