// The arguments of the ops between ranks, checked: the table of common/peers.h, and that a message
// fits the area which the table gives it.
#pragma once

#include <optional>

#include "../check.h"
#include "../peers.h"
#include "norm.h"

namespace pyserve {

// The table of common/peers.h, which lies on the host.
struct PeerTable {
  const int64_t* words;

  int64_t operator[](PeerWord word) const { return words[word]; }
  int64_t tp_size() const { return words[kPeerTpSize]; }
  bool is_leader() const { return words[kPeerTpRank] == 0; }
};

inline PeerTable peer_table(const char* op, const Tensor& peers) {
  const View view = ViewReader{op, Place::kCpu}("peers", peers, 1, ScalarType::Long);
  check_size(view, 0, kPeerWords);
  const PeerTable table{view.ptr<int64_t>()};
  PYSERVE_CHECK(table[kPeerMagicWord] == kPeerMagic, op, ": peers is no table of peers");
  const int64_t tp_size = table.tp_size(), tp_rank = table[kPeerTpRank];
  PYSERVE_CHECK(tp_size == 2 || tp_size == 4 || tp_size == 8, op, ": tp_size is ", tp_size,
                ", not 2, 4 or 8");
  PYSERVE_CHECK(tp_rank >= 0 && tp_rank < tp_size, op, ": tp_rank is ", tp_rank, " of ", tp_size);
  return table;
}

inline void check_room(const char* op, const char* what, int64_t bytes, int64_t room) {
  PYSERVE_CHECK(bytes <= room, op, ": ", what, " of ", bytes, " bytes, at most ", room);
}

inline void check_aligned(const View& view) {
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0, view.op, ": ", view.name,
                " must begin at a multiple of 16 bytes");
}

// Rows that a kernel reads 16 bytes at a time.
inline Rows aligned_rows(const View& view) {
  const Rows rows = rows_of(view);
  check_aligned(view);
  PYSERVE_CHECK(rows.stride % 8 == 0, view.op, ": the rows of ", view.name, " are ", rows.stride,
                " elements apart, which is no multiple of 8");
  return rows;
}

// The tensor of an all-reduce in place; returns how many vectors of 16 bytes it has.
inline int64_t message_vecs(const View& x) {
  const int64_t count = num_elements(x);
  PYSERVE_CHECK(count == 0 || rows_of(x).stride == x.size(x.dim - 1), x.op,
                ": x must be contiguous");
  PYSERVE_CHECK(count % 8 == 0, x.op, ": x has ", count, " elements, no multiple of 8");
  check_aligned(x);
  return count / 8;
}

struct GatherArgs {
  View local, out;  // out is there on the leader only
  int64_t num_rows, row_bytes, local_stride, out_stride, out_part_stride;  // strides are in bytes
};

inline GatherArgs gather_args(const ViewReader& read, const PeerTable& table, const Tensor& local,
                              const std::optional<Tensor>& out) {
  GatherArgs args{};
  args.local = read("local", local, 2);
  const ScalarType dtype = args.local.dtype;
  const bool is_float = dtype == ScalarType::Float;
  PYSERVE_CHECK(is_float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, read.op,
                ": local must be float32, bfloat16 or float16");
  const int64_t element = is_float ? 4 : 2;
  args.num_rows = args.local.size(0);
  args.row_bytes = args.local.size(1) * element;
  args.local_stride = args.local.stride(0) * element;
  PYSERVE_CHECK(out.has_value() == table.is_leader(), read.op,
                ": the leader has an out, and no other rank");
  check_room(read.op, "rows", args.num_rows * args.row_bytes, table[kPeerGatherBytes]);
  const bool is_wide = args.row_bytes % 16 == 0;
  const auto check_wide = [&](const View& view, int64_t stride) {
    if (!is_wide) return;
    check_aligned(view);
    PYSERVE_CHECK(stride % 16 == 0, read.op, ": a stride of ", view.name, " is ", stride,
                  " bytes, no multiple of 16");
  };
  check_wide(args.local, args.local_stride);
  if (!out.has_value()) return args;
  args.out = read("out", *out, 3);
  check_same_dtype(args.out, args.local);
  check_size(args.out, 0, table.tp_size());
  check_size(args.out, 1, args.num_rows);
  check_size(args.out, 2, args.local.size(1));
  args.out_part_stride = args.out.stride(0) * element;
  args.out_stride = args.out.stride(1) * element;
  check_wide(args.out, args.out_part_stride);
  check_wide(args.out, args.out_stride);
  return args;
}

}  // namespace pyserve
