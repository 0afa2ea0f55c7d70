# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured, toppings itself included. Each file says how it is called."""

from __future__ import annotations

from pathlib import Path

from peers.interface import Absent, Peer
from peers.native import find_native_peers
from peers.peft_layer import PeftLayer
from peers.toppings_operator import ToppingsOperator
from peers.torch_variants import Addmm, Bmm, Loop
from peers.vllm_operators import find_vllm

__all__ = ["Absent", "Peer", "find_peers"]


def find_peers(root: Path) -> tuple[list[Peer], list[Absent]]:
    """toppings first; then those that are installed, and those that aren't."""
    found = [ToppingsOperator(), Loop(), Addmm(), Bmm(), PeftLayer(), find_vllm(root)]
    found += find_native_peers(root)
    peers = [peer for peer in found if not isinstance(peer, Absent)]
    return peers, [peer for peer in found if isinstance(peer, Absent)]
