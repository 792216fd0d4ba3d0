// The arguments of linear_lora, checked. The kernel checks the values of starts, ranks and columns.
#pragma once

#include <optional>

#include "linear_w4a16.h"
#include "lora.h"

namespace pyserve {

// The adapters of the linear that reads the result.
struct LoraNextArgs {
  View a;  // its data is null where there is none
  View ranks, scales, out;
};

// A linear with plain numbers, or with 4-bit integers if there is a group_size, and the adapters of
// its rows.
struct LinearLoraArgs {
  LinearArgs linear;
  const void* weight;
  int64_t weight_stride, group_size;
  Epilogue epilogue;
  LoraExpandArgs lora;  // its out is the linear's
  LoraNextArgs next{};
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

inline View lora_next_a(const ViewReader& read, const Tensor& tensor, const LoraExpandArgs& lora) {
  const View a = read("next_a", tensor, 4);
  check_same_dtype(a, lora.out);
  check_size(a, 0, lora.num_slots());
  check_size(a, 3, lora.n());
  return a;
}

struct LoraNextTensors {
  const std::optional<Tensor>&a, &ranks, &scales, &shrunk;
};

// Either all four tensors are given or none.
inline LoraNextArgs lora_next_args(const ViewReader& read, const LoraNextTensors& tensors,
                                   const LoraExpandArgs& lora) {
  const bool is_there = tensors.a.has_value();
  PYSERVE_CHECK(tensors.ranks.has_value() == is_there && tensors.scales.has_value() == is_there &&
                    tensors.shrunk.has_value() == is_there,
                read.op, ": next_a, next_ranks, next_scales and next_shrunk go together");
  if (!is_there) return {};
  const LoraNextArgs args{lora_next_a(read, *tensors.a, lora),
                          read("next_ranks", *tensors.ranks, 2, ScalarType::Int),
                          read("next_scales", *tensors.scales, 2, ScalarType::Float),
                          read("next_shrunk", *tensors.shrunk, 4, ScalarType::Float)};
  check_size(args.ranks, 0, args.a.size(0));
  check_size(args.ranks, 1, args.a.size(1));
  check_same_sizes(args.scales, args.ranks);
  check_size(args.out, 1, lora.num_tokens());
  check_size(args.out, 2, args.a.size(1));
  check_size(args.out, 3, args.a.size(2));
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
