#pragma once

#include <cstddef>
#include <cstdint>

namespace budwood::train {

/// CRC-32 of zlib and PNG (reflected polynomial 0xEDB88320). `crc` is the result for the bytes that
/// came before, so that data can be given piece by piece.
uint32_t crc32(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace budwood::train
