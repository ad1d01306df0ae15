# SPDX-License-Identifier: Apache-2.0
"""Guest kernels made for enclaves: configuration, compiler, build, and where each kernel can boot."""
