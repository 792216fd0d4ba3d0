// The arguments of linear_lora, checked. What starts, ranks and columns hold is the kernel's to check.
#pragma once

#include <optional>

#include "linear_w4a16.h"

namespace pyserve {

// A linear by plain numbers, or with a group_size by 4-bit integers, and the adapters of its rows.
struct LinearLoraArgs {
  LinearArgs linear;
  const void* weight;
  int64_t weight_stride, group_size;
  Epilogue epilogue;
  View a, b, starts, ranks, scales, columns, sums, counter;

  int64_t num_slots() const { return a.size(0); }
  int64_t num_parts() const { return a.size(1); }
  int64_t max_rank() const { return a.size(2); }
};

// Tensors of adapters, as the op is given them.
struct LoraTensors {
  const Tensor &a, &b, &starts, &ranks, &scales, &columns, &sums, &counter;
};

inline void check_lora(const LinearLoraArgs& args) {
  check_same_dtype(args.a, args.linear.x);
  check_size(args.a, 3, args.linear.k());
  check_same_dtype(args.b, args.a);
  check_size(args.b, 0, args.num_slots());
  check_size(args.b, 1, args.linear.n() * rows_per_column(args.epilogue));
  check_size(args.b, 2, args.max_rank());
  check_size(args.starts, 0, args.num_slots() + 1);
  check_size(args.ranks, 0, args.num_slots());
  check_size(args.ranks, 1, args.num_parts());
  check_same_sizes(args.scales, args.ranks);
  check_size(args.columns, 0, args.num_parts() + 1);
  PYSERVE_CHECK(args.sums.size(0) >= 1 && args.sums.size(1) >= args.linear.m(), args.sums.op,
                ": sums has ", args.sums.size(0), " splits of ", args.sums.size(1), " rows");
  check_size(args.sums, 2, args.num_parts());
  check_size(args.sums, 3, args.max_rank());
  check_size(args.counter, 0, 1);
}

inline LinearLoraArgs linear_lora_args(const ViewReader& read, const Tensor& x,
                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& out, int64_t epilogue_number,
                                       const LoraTensors& lora, const NormTensors& norm) {
  constexpr auto kInt = ScalarType::Int, kLong = ScalarType::Long;
  const Epilogue epilogue = epilogue_of(read.op, epilogue_number);
  LinearLoraArgs args{.linear = {},
                      .weight = nullptr,
                      .weight_stride = 0,
                      .group_size = 0,
                      .epilogue = epilogue,
                      .a = read("a", lora.a, 4),
                      .b = read("b", lora.b, 3),
                      .starts = read("starts", lora.starts, 1, kInt),
                      .ranks = read("ranks", lora.ranks, 2, kInt),
                      .scales = read("scales", lora.scales, 2, ScalarType::Float),
                      .columns = read("columns", lora.columns, 1, kInt),
                      .sums = read("sums", lora.sums, 4, kLong),
                      .counter = read("counter", lora.counter, 1, kLong)};
  if (dtype_of(weight) == kInt) {
    const LinearW4Args w4 = linear_w4_args(read, x, weight, bias, out, epilogue_number, norm);
    args.linear = w4;
    args.weight = w4.matrix.words;
    args.weight_stride = w4.matrix.strip_words();
    args.group_size = w4.matrix.format.group_size;
  } else {
    args.linear = linear_args(read, epilogue, x, weight, bias, out);
    read_epilogue(read, epilogue, args.linear.weight.size(0), bias, norm, args.linear);
    args.weight = args.linear.weight.data;
    args.weight_stride = args.linear.weight.stride(0);
  }
  check_lora(args);
  return args;
}

}  // namespace pyserve
