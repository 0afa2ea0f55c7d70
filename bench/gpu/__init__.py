# SPDX-License-Identifier: Apache-2.0
"""bench/ops.py --device cuda. Not named cuda: NVIDIA's Python packages are."""
