// The arguments of linear_lora, checked. What starts, ranks and columns hold is the kernel's to check.
#pragma once

#include <optional>

#include "linear_w4a16.h"
#include "lora.h"

namespace pyserve {

// A linear by plain numbers, or with a group_size by 4-bit integers, and the adapters of its rows.
struct LinearLoraArgs {
  LinearArgs linear;
  const void* weight;
  int64_t weight_stride, group_size;
  Epilogue epilogue;
  LoraShrinkArgs lora;  // out: shrunk
  View b, columns, arrivals;
};

// Tensors of adapters, as the op is given them.
struct LoraTensors {
  const Tensor &a, &b, &starts, &ranks, &scales, &columns, &shrunk, &arrivals;
};

inline LinearLoraArgs linear_lora_args(const ViewReader& read, const Tensor& x,
                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& out, int64_t epilogue_number,
                                       const LoraTensors& lora, const NormTensors& norm) {
  constexpr auto kInt = ScalarType::Int;
  const Epilogue epilogue = epilogue_of(read.op, epilogue_number);
  LinearLoraArgs args{.linear = {},
                      .weight = nullptr,
                      .weight_stride = 0,
                      .group_size = 0,
                      .epilogue = epilogue,
                      .lora = lora_shrink_args(read, x, lora.a, lora.starts, lora.ranks,
                                               lora.scales, lora.shrunk, norm.x_squares),
                      .b = read("b", lora.b, 3),
                      .columns = read("columns", lora.columns, 1, kInt),
                      .arrivals = read("arrivals", lora.arrivals, 1, kInt)};
  if (dtype_of(weight) == kInt) {
    const LinearW4Args w4 =
        linear_w4_args(read, x, weight, bias, out, epilogue_number, norm);
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
  check_same_dtype(args.b, args.lora.a);
  check_size(args.b, 0, args.lora.num_slots());
  check_size(args.b, 1, args.linear.n() * rows_per_column(epilogue));
  check_size(args.b, 2, args.lora.max_rank());
  check_size(args.columns, 0, args.lora.num_parts() + 1);
  check_size(args.arrivals, 0, 1);
  return args;
}

}  // namespace pyserve
