// How a matrix of 4-bit integers lies in memory: pyserve/ops/w4a16.py says it, here are its numbers.
#pragma once

#include <cstdint>

namespace pyserve {

constexpr int64_t kStripRows = 16;
constexpr int64_t kW4BlockColumns = 64;
constexpr int64_t kW4BlockWords = 128;
constexpr int64_t kW4RecordWords = 16;
constexpr uint32_t kW4ZeroMask = 0xff;  // of a record's word; the rest is the scale

// What follows from the group size.
struct W4Format {
  int64_t group_size, unit_blocks, unit_records;

  int64_t unit_columns() const { return unit_blocks * kW4BlockColumns; }
  int64_t unit_words() const {
    return unit_blocks * kW4BlockWords + unit_records * kW4RecordWords;
  }
};

constexpr W4Format kW4Formats[] = {{32, 1, 2}, {64, 1, 1}, {128, 2, 1}};

}  // namespace pyserve
