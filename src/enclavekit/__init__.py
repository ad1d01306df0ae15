# SPDX-License-Identifier: Apache-2.0
"""Build, run, inspect and trust enclave images."""

__version__ = "0.1.0"
