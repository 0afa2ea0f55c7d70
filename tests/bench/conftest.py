# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

# The benchmark's modules import each other as a script's neighbours do.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
