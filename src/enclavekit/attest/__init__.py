# SPDX-License-Identifier: Apache-2.0
"""Attestation documents: read strictly, verified, judged by a policy."""
