"""Compiles the C library of ``paperscale.data.native`` into the wheel, where there is a C compiler.

Without one the wheel is pure Python, and images are decoded with Pillow; see ``paperscale.data.jpeg``.
"""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

NATIVE = "data/native"


class CompileNative(BuildHookInterface[Any]):
    """The build hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel's files are collected."""
        build = runpy.run_path(str(Path(self.root, "platform/paperscale", NATIVE, "build.py")))
        self.scratch = tempfile.TemporaryDirectory()
        target = Path(self.scratch.name, build["LIBRARY"])
        try:
            if version == "editable":  # its sources may change: kept by their hash
                build["cached"]()
                return
            build["compile_to"](target)
        except OSError as error:
            self.app.display_warning(f"images will be decoded with Pillow: {error}")
            return
        build_data["force_include"][str(target)] = f"paperscale/{NATIVE}/{target.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for the wheel."""
        self.scratch.cleanup()


def _platform() -> str:
    """Return this machine's platform as wheels name it, without a promise about older systems."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
