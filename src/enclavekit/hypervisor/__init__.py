# SPDX-License-Identifier: Apache-2.0
"""Carriers of enclaves, behind one contract."""
