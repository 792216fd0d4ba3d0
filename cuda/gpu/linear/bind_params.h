// The parameters of linear's launchers, from an op's checked arguments.
#pragma once

#include "common/args/linear.h"
#include "gpu/core/bind.h"
#include "gpu/linear/linear.h"

namespace pyserve {

// Everything except the weight.
inline gpu::LinearParams linear_params(const LinearArgs& args, Epilogue epilogue, double eps) {
  gpu::LinearParams params{.x = args.x.data,
                           .x_stride = args.x.stride(0),
                           .weight = nullptr,
                           .weight_stride = 0,
                           .bias = args.bias,
                           .out = args.out.data,
                           .out_stride = args.out.stride(0),
                           .m = args.m(),
                           .n = args.n(),
                           .k = args.k(),
                           .dtype = half_dtype(args.x),
                           .epilogue = epilogue,
                           .x_squares = args.x_squares.data,
                           .x_squares_stride = args.x_squares.stride,
                           .eps = static_cast<float>(eps)};
  if (args.norm_weight != nullptr) {
    params.norm_weight = args.norm_weight;
    params.scaled = args.scaled.data;
    params.scaled_stride = args.scaled.stride(0);
    params.squares = args.squares.data;
    params.squares_stride = args.squares.stride;
  }
  return params;
}

}  // namespace pyserve
