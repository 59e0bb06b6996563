"""Puts conf/, which lies beside the package in the repository, into the wheel as simsearch/conf.

Everything else stands in pyproject.toml. A `package-dir` of setuptools would do for wheels, but the import hook of an
editable install would then answer with its own conf/ for any other checkout that stands first on the path.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """The usual build step, and conf/; an editable install reads conf/ where it lies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "simsearch", "conf")
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
            shutil.copytree("conf", folder)


setup(cmdclass={"build_py": BuildWithConf})
