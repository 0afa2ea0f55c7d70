// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace toppings {

// CRC-32C (Castagnoli, reflected, as in iSCSI, RFC 3720) of what `crc` is the checksum of (0:
// nothing) followed by `bytes` more. With SSE4.2 about as fast as a core reads from its L2 cache.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) noexcept;

// The same for CPUs without the instruction.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes) noexcept;

}  // namespace toppings
