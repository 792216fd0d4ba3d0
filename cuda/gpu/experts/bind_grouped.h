// The parameters that all grouped products share, from an op's checked arguments.
#pragma once

#include <algorithm>

#include "common/args/experts.h"
#include "gpu/core/bind.h"
#include "gpu/experts/experts.h"

namespace pyserve {

// Everything except the weight and its strides. sorted_x is passed on if the op was given one.
inline gpu::GroupedParams grouped_params(const GroupedArgs& args, Epilogue epilogue) {
  const bool has_room = args.sorted_x.sizes != nullptr;  // whether sorted_x has been read
  return {.x = args.x.data,
          .x_stride = args.x.stride(0),
          .order = args.order,
          .top_k = static_cast<int>(args.top_k),
          .weight = nullptr,
          .expert_stride = 0,
          .weight_stride = 0,
          .offsets = args.offsets.ptr<int32_t>(),
          .sorted_x = has_room ? args.sorted_x.data : nullptr,
          .sorted_x_stride = has_room ? args.sorted_x.stride(0) : 0,
          .out = args.out.data,
          .out_stride = args.out.stride(0),
          .max_group = static_cast<int>(std::min(args.max_group, args.max_rows())),
          .max_rows = static_cast<int>(args.max_rows()),
          .num_experts = static_cast<int>(args.num_experts()),
          .n = static_cast<int>(args.n()),
          .k = static_cast<int>(args.k()),
          .dtype = half_dtype(args.x),
          .epilogue = epilogue};
}

}  // namespace pyserve
