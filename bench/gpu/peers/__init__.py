# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured, toppings itself included. Each file says how it is called."""

from __future__ import annotations

from gpu.peers.interface import Absent, Peer
from gpu.peers.sglang_chunked import find_sglang
from gpu.peers.toppings_operator import ToppingsOperator
from gpu.peers.torch_variants import Bmm, GroupedMm, Loop
from gpu.peers.vllm_triton import find_vllm

__all__ = ["Absent", "Peer", "find_peers"]


def find_peers() -> tuple[list[Peer], list[Absent]]:
    """toppings first; then those that can be imported, and those that can't."""
    found = [ToppingsOperator(), Loop(), Bmm(), GroupedMm(), find_vllm(), find_sglang()]
    peers = [peer for peer in found if not isinstance(peer, Absent)]
    return peers, [peer for peer in found if isinstance(peer, Absent)]
