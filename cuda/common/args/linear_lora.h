// The arguments of linear_lora, checked. The kernel checks the values of starts, ranks and columns.
#pragma once

#include <optional>

#include "linear_w4a16.h"
#include "lora.h"

namespace pyserve {

// A linear with plain numbers, or with 4-bit integers if there is a group_size, and the adapters of
// its rows.
struct LinearLoraArgs {
  LinearArgs linear;
  const void* weight;
  int64_t weight_stride, group_size;
  Epilogue epilogue;
  LoraExpandArgs lora;  // its out is the linear's
};

// The tensors of adapters, as the op is given them.
struct LoraTensors {
  const Tensor &shrunk, &b, &starts, &ranks, &columns;
};

inline LoraExpandArgs linear_lora_tensors(const ViewReader& read, const LoraTensors& tensors,
                                          const LinearArgs& linear, Epilogue epilogue) {
  constexpr auto kInt = ScalarType::Int;
  LoraExpandArgs args{read("shrunk", tensors.shrunk, 4, ScalarType::Float),
                      read("b", tensors.b, 3),
                      read("starts", tensors.starts, 1, kInt),
                      read("ranks", tensors.ranks, 2, kInt),
                      read("columns", tensors.columns, 1, kInt),
                      linear.out};
  check_size(args.b, 1, linear.n() * rows_per_column(epilogue));
  check_lora_expand(args);
  return args;
}

inline LinearLoraArgs linear_lora_args(const ViewReader& read, const Tensor& x,
                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& out, int64_t epilogue_number,
                                       const LoraTensors& tensors, const NormTensors& norm) {
  LinearLoraArgs args{.epilogue = epilogue_of(read.op, epilogue_number)};
  if (dtype_of(weight) == ScalarType::Int) {
    const LinearW4Args w4 = linear_w4_args(read, x, weight, bias, out, epilogue_number, norm);
    args.linear = w4;
    args.weight = w4.matrix.words;
    args.weight_stride = w4.matrix.strip_words();
    args.group_size = w4.matrix.format.group_size;
  } else {
    args.linear = linear_args(read, args.epilogue, x, weight, bias, out);
    read_epilogue(read, args.epilogue, args.linear.weight.size(0), bias, norm, args.linear);
    args.weight = args.linear.weight.data;
    args.weight_stride = args.linear.weight.stride(0);
  }
  args.lora = linear_lora_tensors(read, tensors, args.linear, args.epilogue);
  return args;
}

}  // namespace pyserve
