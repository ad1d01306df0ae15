# SPDX-License-Identifier: Apache-2.0
"""Keys that sign images, wherever they lie: in a PEM file, in AWS KMS, in a PKCS#11 token; and their certificates."""
