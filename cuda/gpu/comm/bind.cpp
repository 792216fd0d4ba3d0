// The CUDA side of the ops between ranks: checks the arguments and calls the launchers of
// one_shot.cu, two_shot.cu and rows.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/comm.h"
#include "gpu/comm/comm.h"
#include "gpu/core/bind.h"

namespace pyserve {
namespace {

gpu::Peers peers_of(const PeerTable& table) {
  gpu::Peers peers{.buffers = {},
                   .tp_rank = static_cast<int32_t>(table[kPeerTpRank]),
                   .tp_size = static_cast<int32_t>(table.tp_size()),
                   .spin_ns = table[kPeerSpinNs],
                   .is_trial = table[kPeerIsTrial] != 0};
  for (int32_t r = 0; r < peers.tp_size; ++r) {
    peers.buffers[r] = reinterpret_cast<unsigned char*>(table.words[kPeerBuffers + r]);
  }
  return peers;
}

gpu::OneShotArea one_shot_area(const char* op, const PeerTable& table, int64_t num_bytes) {
  check_room(op, "a message", num_bytes, table[kPeerOneShotBytes]);
  return {.offset = table[kPeerOneShotOffset], .message_bytes = table[kPeerOneShotBytes]};
}

void all_reduce_add_norm(const Tensor& partial, const Tensor& residual, const Tensor& weight,
                         double eps, double offset, const Tensor& out, const Tensor& peers) {
  constexpr const char* kOp = "all_reduce_add_norm";
  const PeerTable table = peer_table(kOp, peers);
  const NormArgs args = norm_args({kOp, Place::kCuda}, partial, &residual, weight, out);
  const gpu::Dtype dtype = half_dtype(args.x);
  if (num_elements(args.x) == 0) return;
  const int64_t hidden = args.weight.size(0);
  PYSERVE_CHECK(hidden % 8 == 0 && hidden <= gpu::kMaxNormHidden, kOp, ": hidden is ", hidden,
                ", not a multiple of 8 up to ", gpu::kMaxNormHidden);
  check_aligned(args.weight);
  const Rows x_rows = aligned_rows(args.x), out_rows = aligned_rows(args.out);
  const Rows residual_rows = aligned_rows(args.residual);
  const gpu::AllReduceNormParams params{
      .peers = peers_of(table),
      .area = one_shot_area(kOp, table, x_rows.count * hidden * 2),
      .norm = {.x = args.x.data,
               .x_stride = x_rows.stride,
               .residual = args.residual.data,
               .residual_stride = residual_rows.stride,
               .weight = args.weight.data,
               .out = args.out.data,
               .out_stride = out_rows.stride,
               .num_rows = x_rows.count,
               .hidden = hidden,
               .eps = static_cast<float>(eps),
               .offset = static_cast<float>(offset),
               .dtype = dtype}};
  check_launch(kOp, gpu::launch_all_reduce_add_norm(params, current_stream(partial)));
}

void all_reduce_one_shot(const Tensor& x, const Tensor& peers) {
  constexpr const char* kOp = "all_reduce_one_shot";
  const PeerTable table = peer_table(kOp, peers);
  const View view = ViewReader{kOp, Place::kCuda}("x", x, -1);
  const int64_t num_vecs = message_vecs(view);
  const gpu::OneShotParams params{.peers = peers_of(table),
                                  .area = one_shot_area(kOp, table, num_vecs * 16),
                                  .x = view.data,
                                  .num_vecs = num_vecs,
                                  .dtype = half_dtype(view)};
  check_launch(kOp, gpu::launch_all_reduce_one_shot(params, current_stream(x)));
}

void all_reduce_two_shot(const Tensor& x, const Tensor& peers) {
  constexpr const char* kOp = "all_reduce_two_shot";
  const PeerTable table = peer_table(kOp, peers);
  const View view = ViewReader{kOp, Place::kCuda}("x", x, -1);
  const int64_t num_vecs = message_vecs(view), tp_size = table.tp_size();
  check_room(kOp, "a piece", (num_vecs + tp_size - 1) / tp_size * 16, table[kPeerPieceBytes]);
  const gpu::TwoShotParams params{.peers = peers_of(table),
                                  .reduce_offset = table[kPeerReduceOffset],
                                  .spread_offset = table[kPeerSpreadOffset],
                                  .piece_bytes = table[kPeerPieceBytes],
                                  .x = view.data,
                                  .num_vecs = num_vecs,
                                  .dtype = half_dtype(view)};
  check_launch(kOp, gpu::launch_all_reduce_two_shot(params, current_stream(x)));
}

void gather_rows(const Tensor& local, const std::optional<Tensor>& out, const Tensor& peers) {
  constexpr const char* kOp = "gather_rows";
  const PeerTable table = peer_table(kOp, peers);
  const GatherArgs args = gather_args({kOp, Place::kCuda}, table, local, out);
  const gpu::GatherParams params{.peers = peers_of(table),
                                 .offset = table[kPeerGatherOffset],
                                 .part_bytes = table[kPeerGatherBytes],
                                 .local = args.local.data,
                                 .local_stride = args.local_stride,
                                 .out = args.out.data,
                                 .out_part_stride = args.out_part_stride,
                                 .out_stride = args.out_stride,
                                 .num_rows = args.num_rows,
                                 .row_bytes = args.row_bytes};
  check_launch(kOp, gpu::launch_gather_rows(params, current_stream(local)));
}

void broadcast_tokens(const Tensor& tokens, const Tensor& peers) {
  constexpr const char* kOp = "broadcast_tokens";
  const PeerTable table = peer_table(kOp, peers);
  const View view = ViewReader{kOp, Place::kCuda}("tokens", tokens, 1, ScalarType::Int);
  PYSERVE_CHECK(view.size(0) <= kMaxPeerTokens, kOp, ": ", view.size(0), " tokens, at most ",
                kMaxPeerTokens);
  const gpu::TokensParams params{.peers = peers_of(table),
                                 .offset = table[kPeerTokensOffset],
                                 .tokens = view.ptr<int32_t>(),
                                 .num_tokens = static_cast<int32_t>(view.size(0))};
  check_launch(kOp, gpu::launch_broadcast_tokens(params, current_stream(tokens)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("all_reduce_add_norm", TORCH_BOX(&pyserve::all_reduce_add_norm));
  m.impl("all_reduce_one_shot", TORCH_BOX(&pyserve::all_reduce_one_shot));
  m.impl("all_reduce_two_shot", TORCH_BOX(&pyserve::all_reduce_two_shot));
  m.impl("gather_rows", TORCH_BOX(&pyserve::gather_rows));
  m.impl("broadcast_tokens", TORCH_BOX(&pyserve::broadcast_tokens));
}
