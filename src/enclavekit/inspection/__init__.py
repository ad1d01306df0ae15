# SPDX-License-Identifier: Apache-2.0
"""Looking into images: taking them apart, comparing them, finding what will not boot, drawing them."""
