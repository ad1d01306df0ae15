# SPDX-License-Identifier: Apache-2.0
"""The parent VM with the real driver: what is behind /dev/nitro_enclaves, so that any machine can have it."""
