// The numbers of the layout of a matrix of 4-bit integers. pyserve/ops/w4a16.py explains the layout
// and its words strip, unit, block and record.
#pragma once

#include <cstdint>

namespace pyserve {

constexpr int64_t kStripRows = 16;
constexpr int64_t kW4BlockColumns = 64;
constexpr int64_t kW4BlockWords = 128;
constexpr int64_t kW4RecordWords = 16;
// The zero point in a record's word; the other bits are the scale.
constexpr uint32_t kW4ZeroMask = 0xff;

// The sizes of a unit, which follow from the group size.
struct W4Format {
  int64_t group_size, unit_blocks, unit_records;

  int64_t unit_columns() const { return unit_blocks * kW4BlockColumns; }
  int64_t unit_words() const {
    return unit_blocks * kW4BlockWords + unit_records * kW4RecordWords;
  }
};

constexpr W4Format kW4Formats[] = {{32, 1, 2}, {64, 1, 1}, {128, 2, 1}};

}  // namespace pyserve
