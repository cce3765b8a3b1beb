// Packs rows of text and audio, one sample after another. pack_map computes where each row goes, pack_labels computes
// positions and labels, and pack_rows copies the rows.
//
// Model, for T packed rows of D elements of E bytes: pack_rows reads and writes T D E bytes.
#include <algorithm>

#include "../pack.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

int64_t* int64_data(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

// Addresses the rows of `rows`, followed by those of `audio`, by one index; -1 gives null.
struct TwoTables {
  const char* rows;
  const char* audio;
  int64_t num_rows, rows_stride, audio_stride;  // in bytes

  const char* row(int64_t i) const {
    if (i < 0) return nullptr;
    return i < num_rows ? rows + i * rows_stride : audio + (i - num_rows) * audio_stride;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_map(Tensor row_group, OptionalTensor ids, OptionalTensor cu_seqlens,
                                                    OptionalTensor lengths, Tensor audio_cu_seqlens,
                                                    int64_t num_embeddings, int64_t num_audio_rows, bool compact) {
  const Sequences sequences = read_sequences(row_group, row_group.dim(), cu_seqlens, lengths);
  const int64_t num_rows = sequences.rows;
  Tensor group_holder, id_holder;
  const int32_t* row_group_data = read_row_group(row_group, num_rows, group_holder);
  const int64_t* id = nullptr;
  if (ids.has_value()) {
    id_holder = read_int64("ids", *ids, num_rows);
    id = const_int64_data(id_holder);
  }
  const Tensor offsets = read_int64("audio_cu_seqlens", audio_cu_seqlens, audio_cu_seqlens.numel());
  const int64_t* audio_begin = const_int64_data(offsets);
  const int64_t num_audios = offsets.numel() - 1;
  STD_TORCH_CHECK(num_audios >= 0 && audio_begin[0] == 0 && std::is_sorted(audio_begin, audio_begin + num_audios + 1),
                  "audio_cu_seqlens must start at 0 and not decrease");
  const int64_t used_audio_rows = audio_begin[num_audios];
  STD_TORCH_CHECK(compact ? used_audio_rows == num_audio_rows : used_audio_rows <= num_audio_rows,
                  "audio_cu_seqlens must end at the number of audio rows, ", num_audio_rows, ", got ", used_audio_rows);

  const int64_t bound = pack_bound(num_rows, num_audios, num_audio_rows);
  std::vector<int64_t> sources;
  sources.reserve(bound);
  Tensor target = empty_cpu({num_rows + num_audio_rows}, ScalarType::Long);
  int64_t* to = int64_data(target);
  std::fill(to, to + num_rows + num_audio_rows, int64_t(-1));
  std::vector<int64_t> counts{0};
  int64_t audio = 0;
  for (int64_t b = 0; b < sequences.count(); ++b) {
    for (int64_t row = sequences.begin[b]; row < sequences.end[b]; ++row) {
      if (row_group_data[row] < kKeepRow) continue;
      if (row_group_data[row] == kKeepRow) {
        STD_TORCH_CHECK(id == nullptr || (0 <= id[row] && id[row] < num_embeddings), "ids must lie in [0, ",
                        num_embeddings, "), got ", id[row]);
        to[row] = int64_t(sources.size());
        sources.push_back(row);
      } else if (row == sequences.begin[b] || row_group_data[row] != row_group_data[row - 1]) {
        STD_TORCH_CHECK(audio < num_audios, "row_group has more audios than audio_cu_seqlens, ", num_audios);
        for (int64_t k = audio_begin[audio]; k < audio_begin[audio + 1]; ++k) {
          to[num_rows + k] = int64_t(sources.size());
          sources.push_back(num_rows + k);
        }
        ++audio;
      }
    }
    counts.push_back(int64_t(sources.size()));
  }
  STD_TORCH_CHECK(audio == num_audios, "audio_cu_seqlens has ", num_audios, " audios, but row_group has only ", audio);

  const int64_t count = int64_t(sources.size()), kept = compact ? count : bound;
  Tensor index = int64_tensor(sources.data(), count, kept, -1);
  if (id != nullptr) {
    int64_t* at = int64_data(index);
    for (int64_t t = 0; t < count; ++t)
      at[t] = sources[t] < num_rows ? id[sources[t]] : sources[t] - num_rows + num_embeddings;
  }
  return {index, int64_tensor(sources.data(), count, kept, -1), target, int32_tensor(counts)};
}

std::tuple<Tensor, Tensor> pack_labels(Tensor source, Tensor cu_seqlens, Tensor row_group, OptionalTensor labels) {
  const int64_t count = source.numel(), num_rows = row_group.numel();
  const Tensor sources = read_int64("source", source, count);
  const Tensor ends = read_int64("cu_seqlens", cu_seqlens, cu_seqlens.numel());
  const int64_t* from = const_int64_data(sources);
  Tensor group_holder, label_holder;
  const int32_t* row_group_data = read_row_group(row_group, num_rows, group_holder);
  const int64_t* label = nullptr;
  if (labels.has_value()) {
    label_holder = read_int64("labels", *labels, num_rows);
    label = const_int64_data(label_holder);
  }
  Tensor position = empty_cpu({count}, ScalarType::Long);
  Tensor packed = empty_cpu({label == nullptr ? 0 : count}, ScalarType::Long);
  int64_t* position_data = int64_data(position);
  int64_t* packed_data = int64_data(packed);
  const int64_t* cu = const_int64_data(ends);
  int64_t t = 0;
  for (int64_t b = 1; b < ends.numel(); ++b) {
    for (const int64_t begin = t, end = std::min(cu[b], count); t < end; ++t) {
      position_data[t] = t - begin;
      if (label != nullptr) packed_data[t] = packed_label(from[t], t == begin, row_group_data, num_rows, label);
    }
  }
  std::fill(position_data + t, position_data + count, int64_t(0));
  if (label != nullptr) std::fill(packed_data + t, packed_data + count, kIgnoredLabel);
  return {position, packed};
}

// `target` and `is_table` are used only by the gradient, in Python.
Tensor pack_rows(Tensor rows, Tensor audio, Tensor index, Tensor target, bool is_table) {
  STD_TORCH_CHECK(rows.dim() == 2 && audio.dim() == 2, "rows and audio must have two dimensions");
  const Rows text_rows = read_rows(rows);
  const Rows audio_rows = read_matrix("audio", audio, audio.size(0), text_rows.width, rows.scalar_type());
  const Tensor from_tensor = read_int64("index", index, index.numel());
  const int64_t* from = const_int64_data(from_tensor);
  const int64_t count = from_tensor.numel(), all = text_rows.count + audio_rows.count;
  for (int64_t t = 0; t < count; ++t)
    STD_TORCH_CHECK(-1 <= from[t] && from[t] < all, "index must lie in [-1, ", all, "), got ", from[t]);
  Tensor result;
  dispatch_dtype("rows", rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t row_bytes = text_rows.width * int64_t(sizeof(T));
    OutputRows out(count, text_rows.width, rows.scalar_type(), sizeof(T));
    char* data = static_cast<char*>(out.data());
    const TwoTables tables{reinterpret_cast<const char*>(text_rows.data<T>()),
                           reinterpret_cast<const char*>(audio_rows.data<T>()), text_rows.count,
                           text_rows.stride * int64_t(sizeof(T)), audio_rows.stride * int64_t(sizeof(T))};
    parallel(count, 2 * row_bytes, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last;) {
        const char* row = tables.row(from[t]);
        char* to = data + t * row_bytes;
        if (row == nullptr) {
          std::memset(to, 0, size_t(row_bytes));
          ++t;
          continue;
        }
        int64_t end = t + 1;  // rows that are also consecutive in memory are copied at once
        while (end < last && tables.row(from[end]) == row + (end - t) * row_bytes) ++end;
        std::memcpy(to, row, size_t((end - t) * row_bytes));
        t = end;
      }
    });
    result = out.finish(count);
  });
  return result;
}

}  // namespace fastcompress::cpu
