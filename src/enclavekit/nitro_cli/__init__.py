# SPDX-License-Identifier: Apache-2.0
"""The commands, objects and exit codes that nitro-cli 1.5 has, for scripts that know them."""
