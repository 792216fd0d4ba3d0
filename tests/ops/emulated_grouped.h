// What kernels of experts take, for emulated.h's programs; included in namespace pyserve::gpu.
constexpr int64_t kMaxExperts = 512;

struct GroupedParams {
  const void* x;
  int64_t x_stride;
  const int32_t* order;
  int top_k;
  const void* weight;
  int64_t expert_stride, weight_stride;
  const int32_t* offsets;
  void* sorted_x;
  int64_t sorted_x_stride;
  void* out;
  int64_t out_stride;
  int max_rows, num_experts, n, k;
  Dtype dtype;
  Epilogue epilogue;

  int weight_rows() const { return static_cast<int>(rows_per_column(epilogue)) * n; }
  int mean_rows() const { return max_rows / num_experts; }
};
