"""What pyproject.toml cannot say: ``make wheel`` (``KBITC_PREBUILD=1``) compiles CPU kernels into the wheel.

Any other build, and an editable install, is Python and sources alone: kernels are then compiled on first use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

IS_PREBUILT = os.environ.get("KBITC_PREBUILD") == "1"


class BuildWithKernels(build_py):
    """Compiles kernels for every machine of this one's architecture next to their sources' copies."""

    def run(self) -> None:
        """Copies the package, then the library."""
        super().run()
        if not IS_PREBUILT or self.editable_mode:
            return
        sys.path.insert(0, str(Path(__file__).parent))
        from kbitc.kernels.cpu import build

        library = build.build(build.kernel_recipe(for_any=True))
        self.copy_file(
            str(library), f"{self.build_lib}/kbitc/kernels/cpu/{build.PREBUILT.name}", preserve_mode=False
        )


class WithLibrary(Distribution):
    """Of a platform where there is a library in it."""

    def has_ext_modules(self) -> bool:
        """Whether it goes where platforms differ."""
        return IS_PREBUILT


class PlatformWheel(bdist_wheel):
    """Of a platform, and of any Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-PLATFORM``."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if IS_PREBUILT else (python, abi, platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=WithLibrary)
