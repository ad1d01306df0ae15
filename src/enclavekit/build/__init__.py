# SPDX-License-Identifier: Apache-2.0
"""The job of making an image."""

from enclavekit.build.application import Application
from enclavekit.build.image import DEFAULT_CMDLINES, BuildOptions, BuildResult, KernelChoice, build
from enclavekit.build.source import Access

__all__ = ["DEFAULT_CMDLINES", "Access", "Application", "BuildOptions", "BuildResult", "KernelChoice", "build"]
