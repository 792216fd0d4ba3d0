// decode_kernel.cuh on a CPU, by emulated.h: results and the caches are held against float64 sums.
// Prints what is wrong; its exit code is 1 then. Arguments: rounds, groups of copies that a wait
// forgets.
#include "emulated_attention.h"

struct dim3 {
  unsigned x, y;
};

float2 make_float2(float x, float y) { return {x, y}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
float __fmul_rn(float x, float y) { return x * y; }
float __fdividef(float x, float y) { return x / y; }

namespace pyserve::gpu {

int64_t __shfl_sync(unsigned mask, int64_t x, int from) {
  const auto low = static_cast<uint32_t>(__shfl_sync(mask, static_cast<int>(x), from));
  return int64_t{__shfl_sync(mask, static_cast<int>(x >> 32), from)} << 32 | low;
}

struct {
  struct {
    operator unsigned() const { return machine::first_block % gridDim.x; }
  } x;
  struct {
    operator unsigned() const { return machine::first_block / gridDim.x; }
  } y;
} block_of_grid;
struct {
  unsigned y;
} size_of_grid;

template <class Kernel, class... Args>
cudaError_t launch_chained(Kernel kernel, dim3 grid, int num_threads, int num_bytes, cudaStream_t,
                           const Args&... args) {
  machine::body = [&] { kernel(args...); };
  gridDim.x = grid.x, size_of_grid.y = grid.y;
  machine::run_grid(grid.x * grid.y, 1, num_threads, num_bytes);
  return cudaSuccess;
}

#include "attention.h.inc"
#include "merge.cuh.inc"
#include "rotate.cuh.inc"
#include "score_scale.cuh.inc"
#include "swizzle.cuh.inc"
}  // namespace pyserve::gpu

#define blockIdx block_of_grid
#define gridDim size_of_grid
namespace pyserve::gpu::decode {
#include "decode_loader.cuh.inc"
#include "new_key.cuh.inc"
#include "decode_queries.cuh.inc"
#include "decode_kernel.cuh.inc"
}  // namespace pyserve::gpu::decode

using namespace pyserve::gpu;

namespace {

constexpr int kBlockSize = 16;
constexpr uint16_t kNan = 0x7fff;  // of both types

struct Row {
  int query_len, seq_len;
  bool is_padding = false;
};

struct Shape {
  int group, num_kv_heads, window, max_split;  // items have so many tiles at most
  bool has_rope;
};

template <class T, int kHeadDim, decode::Kind kKind>
struct Step {
  std::vector<Row> rows;
  Shape shape;
  AttentionDevice device{3, 1};
  std::vector<int32_t> starts{0}, lens, slots, table, work;
  std::vector<float> workspace = std::vector<float>(1 << 20), cos_sin;
  std::vector<T> keys, values, qkv, out;  // as they are when the step begins; qkv of all tokens
  std::vector<T> key_cache, value_cache;
  int num_blocks = 1, max_blocks = 0, max_len = 0;  // block 0 is nobody's

  int num_heads() const { return shape.group * shape.num_kv_heads; }
  int qkv_size() const { return (num_heads() + 2 * shape.num_kv_heads) * kHeadDim; }

  std::vector<T> randoms(size_t count) {
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<T> numbers(count);
    for (T& number : numbers) number = from_float<T>(normal(machine::random));
    return numbers;
  }

  void make_plan() {
    std::vector<AttentionItem> items;
    int partial = 0;
    for (int i = 0; i < static_cast<int>(rows.size()); ++i) {
      const auto [query_len, seq_len, is_padding] = rows[i];
      if (seq_len == 0) continue;
      const int visible = shape.window > 0 ? seq_len - query_len - shape.window + 1 : 0;
      const int first_tile = std::max(0, visible) / kKvTile;
      const int tiles = (seq_len - 1) / kKvTile + 1 - first_tile;
      const int splits = (tiles - 1) / shape.max_split + 1, first = static_cast<int>(items.size());
      for (int split = 0; split < splits; ++split) {
        const int begin = (first_tile + tiles * split / splits) * kKvTile;
        const int end = (first_tile + tiles * (split + 1) / splits) * kKvTile;
        items.push_back({i, 0, begin, std::min(end, seq_len), splits, split, first,
                         splits == 1 ? -1 : partial + split});
      }
      if (splits > 1) partial += splits;
    }
    const int num_ranges = num_decode_ranges(device, shape.num_kv_heads);
    const int offset = decode_items_offset(num_ranges), num_items = static_cast<int>(items.size());
    work.assign(offset + num_items * kItemWords, 0);
    work[kWorkNumDecodeRanges] = num_ranges;
    for (int i = 0; i <= num_ranges; ++i) {
      work[kDecodeStartsOffset + i] = num_items * i / num_ranges;
    }
    std::memcpy(&work[offset], items.data(), items.size() * sizeof(AttentionItem));
  }

  void make() {
    for (const Row& row : rows) {
      starts.push_back(starts.back() + row.query_len);
      lens.push_back(row.seq_len);
      slots.push_back(row.is_padding ? -1 : static_cast<int>(slots.size()));
      const int blocks = (row.seq_len + kBlockSize - 1) / kBlockSize;
      num_blocks += blocks, max_blocks = std::max(max_blocks, blocks);
      max_len = std::max(max_len, row.seq_len);
    }
    make_plan();
    std::vector<int> ids;
    for (int i = 1; i < num_blocks; ++i) ids.push_back(i);
    std::shuffle(ids.begin(), ids.end(), machine::random);
    table.assign(rows.size() * max_blocks, -1);
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int b = 0; b * kBlockSize < rows[i].seq_len && !rows[i].is_padding; ++b) {
        table[i * max_blocks + b] = ids.back();
        ids.pop_back();
      }
    }
    const size_t cache_size = size_t{1} * num_blocks * kBlockSize * shape.num_kv_heads * kHeadDim;
    keys = randoms(cache_size), values = randoms(cache_size);
    qkv = randoms(size_t{1} * starts.back() * qkv_size());
    out.assign(size_t{1} * starts.back() * num_heads() * kHeadDim, T{kNan});
    for (int position = 0; position < max_len; ++position) {
      for (int i = 0; i < kHeadDim; ++i) {
        const float angle = position * std::pow(100.0f, -2.0f * (i % (kHeadDim / 2)) / kHeadDim);
        cos_sin.push_back(i < kHeadDim / 2 ? std::cos(angle) : std::sin(angle));
      }
    }
    poison();
    key_cache = keys, value_cache = values;
  }

  size_t place(int row, int key, int kv_head) const {
    const int block = table[row * max_blocks + key / kBlockSize];
    return ((size_t{1} * block * kBlockSize + key % kBlockSize) * shape.num_kv_heads + kv_head) *
           kHeadDim;
  }

  // What no kernel may read is NaN: behind the end of a sequence, in front of what a window shows,
  // and with rope the step's own tokens.
  void poison() {
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto [query_len, seq_len, is_padding] = rows[i];
      if (is_padding) continue;
      for (int key = 0; key < seq_len || key % kBlockSize != 0; ++key) {
        const bool is_hidden = shape.window > 0 && key <= seq_len - query_len - shape.window;
        if (!is_hidden && key < (shape.has_rope ? seq_len - query_len : seq_len)) continue;
        for (int head = 0; head < shape.num_kv_heads; ++head) {
          std::fill_n(&keys[place(i, key, head)], kHeadDim, T{kNan});
          std::fill_n(&values[place(i, key, head)], kHeadDim, T{kNan});
        }
      }
    }
  }

  // A head of qkv, turned as the kernel does it where it is one of the queries or keys.
  std::vector<float> head_of(int token, int head, int position) const {
    const T* from = &qkv[size_t{1} * token * qkv_size() + head * kHeadDim];
    std::vector<float> x(kHeadDim);
    for (int i = 0; i < kHeadDim; ++i) x[i] = to_float(from[i]);
    if (!shape.has_rope || head >= num_heads() + shape.num_kv_heads) return x;
    const float* angles = &cos_sin[size_t{1} * position * kHeadDim];
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const float2 turned = rotate(x[i], x[i + kHeadDim / 2], angles[i], angles[i + kHeadDim / 2]);
      x[i] = to_float(from_float<T>(turned.x));
      x[i + kHeadDim / 2] = to_float(from_float<T>(turned.y));
    }
    return x;
  }

  // Puts the step's own tokens where the kernel is to have put them.
  void write_new() {
    for (size_t i = 0; i < rows.size() && shape.has_rope; ++i) {
      const auto [query_len, seq_len, is_padding] = rows[i];
      for (int j = 0; j < query_len && !is_padding; ++j) {
        const int position = seq_len - query_len + j;
        for (int head = 0; head < shape.num_kv_heads; ++head) {
          const int at = num_heads() + head;
          const auto key = head_of(starts[i] + j, at, position);
          const auto value = head_of(starts[i] + j, at + shape.num_kv_heads, position);
          for (int k = 0; k < kHeadDim; ++k) {
            keys[place(i, position, head) + k] = from_float<T>(key[k]);
            values[place(i, position, head) + k] = from_float<T>(value[k]);
          }
        }
      }
    }
  }

  decode::Decode arguments(float scale) {
    const int kv_heads = shape.num_kv_heads, token = kv_heads * kHeadDim;
    decode::Decode d{};
    AttentionParams& p = d.p;
    p.q = qkv.data(), p.q_token_stride = qkv_size(), p.q_head_stride = kHeadDim;
    p.out = out.data(), p.out_token_stride = num_heads() * kHeadDim, p.out_head_stride = kHeadDim;
    p.key_cache = key_cache.data(), p.value_cache = value_cache.data();
    p.key_block_stride = p.value_block_stride = kBlockSize * token;
    p.key_token_stride = p.value_token_stride = token;
    p.key_head_stride = p.value_head_stride = kHeadDim;
    p.block_table = table.data(), p.block_table_stride = max_blocks;
    p.row_slots = slots.data(), p.cu_seqlens_q = starts.data(), p.seq_lens = lens.data();
    p.num_tokens = starts.back(), p.num_rows = static_cast<int>(rows.size());
    p.num_heads = num_heads(), p.num_kv_heads = kv_heads, p.head_dim = kHeadDim;
    p.block_size_log2 = 4, p.window = shape.window, p.softmax_scale = scale;
    p.work = work.data(), p.workspace = workspace.data();
    p.num_slots = p.num_rows, p.num_blocks = num_blocks, p.max_blocks_per_seq = max_blocks;
    p.device = device;
    d.partials = decode_partials(p);
    if (shape.has_rope) {
      d.rope = {&qkv[num_heads() * kHeadDim], &qkv[(num_heads() + kv_heads) * kHeadDim],
                qkv_size(), cos_sin.data(), kHeadDim, max_len};
    }
    d.group = shape.group;
    d.items_offset = decode_items_offset(num_decode_ranges(device, kv_heads));
    d.scale = score_scale<true>(p);
    return d;
  }

  std::vector<double> exact(int row, int token, int head, int position, double scale) const {
    const auto q = head_of(token, head, position);
    std::vector<double> scores, result(kHeadDim);
    const int first = shape.window > 0 ? std::max(0, position - shape.window + 1) : 0;
    for (int key = first; key <= position; ++key) {
      const T* k = &keys[place(row, key, head / shape.group)];
      double sum = 0;
      for (int i = 0; i < kHeadDim; ++i) sum += double{q[i]} * to_float(k[i]);
      scores.push_back(sum * scale);
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - most);
    for (int key = first; key <= position; ++key) {
      const T* value = &values[place(row, key, head / shape.group)];
      for (int i = 0; i < kHeadDim; ++i) {
        result[i] += scores[key - first] / total * to_float(value[i]);
      }
    }
    return result;
  }

  int check() {
    const float scale = 1.0f / std::sqrt(float{kHeadDim});
    make();
    for (const auto& cache : {&key_cache, &value_cache}) {
      const auto* first = reinterpret_cast<const unsigned char*>(cache->data());
      machine::readable.emplace_back(first, first + cache->size() * sizeof(T));
    }
    const decode::Decode d = arguments(scale);
    const unsigned num_ranges = num_decode_ranges(device, shape.num_kv_heads);
    decode::launch_kind<T, kHeadDim, kKind>(
        d, {static_cast<unsigned>(shape.num_kv_heads), num_ranges}, nullptr);
    machine::readable.clear();
    write_new();
    int num_wrong = 0;
    for (size_t row = 0; row < rows.size(); ++row) {
      for (int i = 0; i < rows[row].query_len; ++i) {
        for (int head = 0; head < num_heads(); ++head) {
          const int token = starts[row] + i, position = rows[row].seq_len - rows[row].query_len + i;
          const T* found = &out[(size_t{1} * token * num_heads() + head) * kHeadDim];
          if (rows[row].seq_len == 0 || rows[row].is_padding) {
            num_wrong += found[0].bits != kNan;
            continue;
          }
          const auto wanted = exact(row, token, head, position, scale);
          for (int k = 0; k < kHeadDim; ++k) {
            num_wrong += !(std::abs(to_float(found[k]) - wanted[k]) <=
                           0.01 + 0.01 * std::abs(wanted[k]));
          }
        }
      }
    }
    num_wrong += std::memcmp(keys.data(), key_cache.data(), keys.size() * sizeof(T)) != 0;
    num_wrong += std::memcmp(values.data(), value_cache.data(), values.size() * sizeof(T)) != 0;
    for (int i = 0; i < 2 * shape.num_kv_heads; ++i) num_wrong += d.partials.arrivals[i] != 0;
    return num_wrong;
  }
};

int num_bad = 0;

template <class T, int kHeadDim, decode::Kind kKind>
void check(const std::vector<Row>& rows, Shape shape) {
  const int num_wrong = Step<T, kHeadDim, kKind>{rows, shape}.check();
  if (num_wrong == 0) return;
  ++num_bad;
  std::printf("head_dim %d, kind %d, group %d, window %d, rope %d: %d wrong\n", kHeadDim,
              static_cast<int>(kKind), shape.group, shape.window, shape.has_rope, num_wrong);
  machine::end_if_expected();
}

}  // namespace

int main(int, char** argv) {
  machine::num_too_early = std::atoi(argv[2]);
  const std::vector<Row> many(80, {1, 3}), mixed = {
      {1, 1}, {1, 130}, {0, 0}, {1, 20, true}, {1, 64}, {1, 65}, {1, 200}, {1, 17}};
  const std::vector<Row> queries = {{3, 70}, {4, 4}, {2, 129}, {1, 50}, {4, 67}};
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    machine::lands_late = round % 2 == 0;
    using decode::Kind;
    check<__nv_bfloat16, 128, Kind::kRope>(mixed, {4, 2, 0, 9, true});
    check<__nv_bfloat16, 128, Kind::kRope>(queries, {4, 1, 0, 1, true});
    check<__nv_bfloat16, 128, Kind::kRope>(many, {1, 1, 0, 9, true});
    check<__nv_bfloat16, 128, Kind::kPlain>(mixed, {3, 1, 40, 9, false});
    check<__half, 64, Kind::kRope>(queries, {4, 1, 20, 9, true});
    check<__half, 64, Kind::kPlain>(mixed, {7, 1, 0, 2, false});
    check<__nv_bfloat16, 256, Kind::kGeneral>(mixed, {2, 1, 0, 1, true});
    check<__nv_bfloat16, 256, Kind::kGeneral>(queries, {4, 1, 30, 9, false});
  }
  return num_bad == 0 ? 0 : 1;
}
