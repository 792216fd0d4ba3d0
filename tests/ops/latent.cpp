// latent_kernel.cuh and latent_merge.cuh on a CPU, by emulated.h: results are held against float64
// sums. Prints what is wrong; its exit code is 1 then. Arguments: rounds, groups of copies that a
// wait forgets.
#include "emulated_attention.h"

namespace pyserve::gpu {
#include "attention.h.inc"
#include "merge.cuh.inc"
#include "swizzle.cuh.inc"
}  // namespace pyserve::gpu

namespace pyserve::gpu::latent {
#include "latent_work.cuh.inc"

#include "latent_merge.cuh.inc"

#include "latent_kernel.cuh.inc"
}  // namespace pyserve::gpu::latent

using namespace pyserve::gpu;

namespace {

constexpr int kWidth = latent::kWidth, kBlockSize = 16;
constexpr uint16_t kPoison = 0x7fc1;

std::vector<__nv_bfloat16> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<__nv_bfloat16> values(count);
  for (auto& value : values) value = from_float<__nv_bfloat16>(normal(machine::random));
  return values;
}

struct Row {
  int query_len, seq_len;
};

// A step of rows whose blocks lie anywhere; `max_split` is what items have of KV tiles of 64 at
// most.
struct Step {
  std::vector<Row> rows;
  int num_heads, num_tiles, num_ranges, max_split;
  AttentionDevice device;
  std::vector<int32_t> starts{0}, lens, slots, table, work;
  std::vector<float> workspace;
  int num_blocks = 1, max_blocks = 0;  // block 0 is nobody's
  std::vector<__nv_bfloat16> cache, q, out;

  int group() const { return num_heads / num_tiles; }

  void add_item(std::vector<AttentionItem>& items, int row, int query_tile, int kv_end,
                int& partial) {
    const int tiles = (kv_end - 1) / kKvTile + 1, splits = (tiles - 1) / max_split + 1;
    const int first = static_cast<int>(items.size());
    for (int split = 0; split < splits; ++split) {
      const int begin = tiles * split / splits * kKvTile;
      const int end = split + 1 == splits ? kv_end : tiles * (split + 1) / splits * kKvTile;
      items.push_back(
          {row, query_tile, begin, end, splits, split, first, splits == 1 ? -1 : partial + split});
    }
    if (splits > 1) partial += splits;
  }

  void make() {
    std::vector<AttentionItem> decode, prefill;
    int partials[2] = {};
    for (int i = 0; i < static_cast<int>(rows.size()); ++i) {
      const Row& row = rows[i];
      starts.push_back(starts.back() + row.query_len);
      lens.push_back(row.seq_len);
      slots.push_back(row.seq_len == 0 ? -1 : i);
      max_blocks = std::max(max_blocks, (row.seq_len + kBlockSize - 1) / kBlockSize);
      if (row.seq_len == 0) continue;
      const int packed = row.query_len * group();
      if (packed <= kDecodeRows) {
        add_item(decode, i, 0, row.seq_len, partials[0]);
        continue;
      }
      for (int tile = 0; tile * kPrefillRows < packed; ++tile) {
        const int last = std::min((tile + 1) * kPrefillRows, packed) - 1;
        const int end = row.seq_len - row.query_len + last / group() + 1;
        add_item(prefill, i, tile, end, partials[1]);
      }
    }
    num_ranges = num_decode_ranges(device, num_tiles);
    const int offset = decode_items_offset(num_ranges);
    const int num_decode = static_cast<int>(decode.size());
    const int behind = offset + num_decode * kItemWords;
    work.assign(behind + prefill.size() * kItemWords, 0);
    work[kWorkNumDecodeItems] = num_decode;
    work[kWorkNumPrefillItems] = static_cast<int>(prefill.size());
    work[kWorkPrefillItemsOffset] = behind;
    work[kWorkNumDecodeRanges] = num_ranges;
    for (int i = 0; i <= num_ranges; ++i)
      work[kDecodeStartsOffset + i] = num_decode * i / num_ranges;
    const auto put = [&](int at, const std::vector<AttentionItem>& items) {
      if (!items.empty()) std::memcpy(&work[at], items.data(), items.size() * sizeof(items[0]));
    };
    put(offset, decode);
    put(behind, prefill);
    workspace.assign(1 << 24, 0.0f);
    table.assign(rows.size() * max_blocks, -1);
    std::vector<int> ids;
    for (const Row& row : rows) num_blocks += (row.seq_len + kBlockSize - 1) / kBlockSize;
    for (int i = 1; i < num_blocks; ++i) ids.push_back(i);
    std::shuffle(ids.begin(), ids.end(), machine::random);
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int b = 0; b * kBlockSize < rows[i].seq_len; ++b) {
        table[i * max_blocks + b] = ids.back();
        ids.pop_back();
      }
    }
    cache = randoms(size_t{1} * num_blocks * kBlockSize * kWidth, 1.0f);
    q = randoms(size_t{1} * starts.back() * num_heads * kWidth, 1.0f);
    out.assign(size_t{1} * starts.back() * num_heads * kLatentSize, {kPoison});
  }

  const __nv_bfloat16* kept(int row, int key) const {
    const int block = table[row * max_blocks + key / kBlockSize];
    return &cache[(size_t{1} * block * kBlockSize + key % kBlockSize) * kWidth];
  }

  // What behind the end of a sequence lies in its last block is NaN.
  void poison() {
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int key = rows[i].seq_len; key % kBlockSize != 0; ++key) {
        std::fill_n(const_cast<__nv_bfloat16*>(kept(i, key)), kWidth, __nv_bfloat16{kPoison});
      }
    }
  }

  AttentionParams params(float scale) {
    AttentionParams p{};
    p.q = q.data(), p.q_token_stride = num_heads * kWidth, p.q_head_stride = kWidth;
    p.out = out.data(), p.out_token_stride = num_heads * kLatentSize,
    p.out_head_stride = kLatentSize;
    p.key_cache = cache.data(), p.key_block_stride = kBlockSize * kWidth,
    p.key_token_stride = kWidth;
    p.block_table = table.data(), p.block_table_stride = max_blocks;
    p.row_slots = slots.data(), p.cu_seqlens_q = starts.data(), p.seq_lens = lens.data();
    p.num_tokens = starts.back(), p.num_rows = static_cast<int>(rows.size());
    p.num_heads = num_heads, p.num_kv_heads = num_tiles, p.head_dim = kLatentSize;
    p.block_size_log2 = 4, p.softmax_scale = scale, p.max_query_len = p.num_tokens;
    p.work = work.data(), p.workspace = workspace.data();
    p.num_slots = p.num_rows, p.num_blocks = num_blocks, p.max_blocks_per_seq = max_blocks;
    p.device = device;
    return p;
  }
};

// Of one query and head; weights are rounded to bfloat16, as where they are multiplied.
std::vector<double> exact(const Step& s, int row, int position, const __nv_bfloat16* q,
                          double scale) {
  std::vector<double> scores, result(kLatentSize);
  for (int key = 0; key <= position; ++key) {
    double sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += double{to_float(q[i])} * to_float(s.kept(row, key)[i]);
    scores.push_back(sum * scale);
  }
  const double most = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (double& score : scores) total += score = std::exp(score - most);
  for (int key = 0; key <= position; ++key) {
    for (int i = 0; i < kLatentSize; ++i) {
      result[i] += scores[key] / total * to_float(s.kept(row, key)[i]);
    }
  }
  return result;
}

int check(Step s) {
  const float scale = 0.05f;
  s.make();
  s.poison();
  const auto range = [](const std::vector<__nv_bfloat16>& of) {
    const auto* first = reinterpret_cast<const unsigned char*>(of.data());
    return std::pair{first, first + of.size() * 2};
  };
  machine::readable = {range(s.cache), range(s.q)};
  latent::launch_latent<__nv_bfloat16>(s.params(scale), nullptr);
  int num_wrong = 0;
  for (size_t row = 0; row < s.rows.size(); ++row) {
    for (int i = 0; i < s.rows[row].query_len; ++i) {
      for (int head = 0; head < s.num_heads; ++head) {
        const int token = s.starts[row] + i;
        const auto* out = &s.out[(size_t{1} * token * s.num_heads + head) * kLatentSize];
        if (s.rows[row].seq_len == 0) {
          num_wrong += out[0].bits != kPoison;
          continue;
        }
        const int position = s.rows[row].seq_len - s.rows[row].query_len + i;
        const auto wanted =
            exact(s, row, position, &s.q[(size_t{1} * token * s.num_heads + head) * kWidth], scale);
        for (int j = 0; j < kLatentSize; ++j) {
          num_wrong +=
              !(std::abs(to_float(out[j]) - wanted[j]) <= 0.01 + 0.01 * std::abs(wanted[j]));
        }
      }
    }
  }
  return num_wrong;
}

}  // namespace

int main(int, char** argv) {
  machine::num_too_early = std::atoi(argv[2]);
  const AttentionDevice device{3, 1};
  int num_bad = 0;
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    machine::lands_late = round % 2 == 0;
    emulated_device.smem_per_block = round / 2 % 2 == 0 ? latent::Layout<2>::kSmemBytes : 0;
    const Step steps[] = {
        {{{1, 1}, {1, 70}, {0, 0}, {1, 33}}, 16, 1, 0, 1, device},
        {{{2, 50}}, 6, 1, 0, 9, device},
        {{{1, 66}, {3, 67}}, 20, 2, 0, 1, device},
        {{{9, 72}}, 15, 1, 0, 1, device},
        {{{1, 33 * kKvTile + 5}}, 3, 1, 0, 1, {17, 1}},  // more parts than a warp has lanes
    };
    for (size_t i = 0; i < std::size(steps); ++i) {
      const int num_wrong = check(steps[i]);
      if (num_wrong == 0) continue;
      ++num_bad;
      std::printf("step %d, round %d: %d wrong\n", static_cast<int>(i), round, num_wrong);
      machine::end_if_expected();
    }
  }
  return num_bad == 0 ? 0 : 1;
}
