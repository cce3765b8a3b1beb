// Compares the kernels of packing with the definition of packing (fastcompress/reference/pack.py), on the host.
#include "case.h"

namespace fastcompress::driver {
namespace {

struct Packed {
  Values<int64_t> source, target;
  Values<int32_t> cu_seqlens{0};
};

Packed pack(const Spans& sequences, const Values<int32_t>& row_group, const Values<int64_t>& audio_begin) {
  const int64_t rows = int64_t(row_group.size()), audio_rows = audio_begin.back();
  Packed packed;
  packed.target.assign(size_t(rows + audio_rows), -1);
  size_t audio = 0;
  for (int64_t b = 0; b < sequences.count(); ++b) {
    for (int64_t row = sequences.begin[b]; row < sequences.end[b]; ++row) {
      if (row_group[row] < kKeepRow) continue;
      if (row_group[row] == kKeepRow) {
        packed.target[row] = int64_t(packed.source.size());
        packed.source.push_back(row);
      } else if (row == sequences.begin[b] || row_group[row] != row_group[row - 1]) {
        for (int64_t k = audio_begin[audio]; k < audio_begin[audio + 1]; ++k) {
          packed.target[rows + k] = int64_t(packed.source.size());
          packed.source.push_back(rows + k);
        }
        ++audio;
      }
    }
    packed.cu_seqlens.push_back(int32_t(packed.source.size()));
  }
  return packed;
}

}  // namespace

template <class T>
void check_pack(Batch<T>& batch, Report& report) {
  // Rows of text, dropped rows, and audios that replace runs of rows of one positive group.
  Values<int32_t> row_group;
  Random random(37);
  for (int64_t row = 0; row < batch.rows;) {
    const int64_t kind = random.below(8), length = 1 + random.below(kind < 2 ? 4 : 1);
    for (int64_t i = 0; i < length && row < batch.rows; ++i, ++row)
      row_group.push_back(kind == 0 ? -1 : kind == 1 ? int32_t(row + 1 - i) : 0);
  }
  Values<int64_t> audio_begin{0};
  for (int64_t b = 0; b < batch.sequences.count(); ++b)
    for (int64_t row = batch.sequences.begin[b]; row < batch.sequences.end[b]; ++row)
      if (row_group[row] > 0 && (row == batch.sequences.begin[b] || row_group[row] != row_group[row - 1]))
        audio_begin.push_back(audio_begin.back() + random.below(30));
  const int64_t rows = batch.rows, audio_rows = audio_begin.back();
  const Packed expected = pack(batch.sequences, row_group, audio_begin);
  const int64_t total = int64_t(expected.source.size());

  cuda::PackMapParams map{};
  map.rows = rows;
  map.row_group = batch.memory.input(row_group);
  map.audios = {batch.memory.input(audio_begin), int64_t(audio_begin.size()) - 1, audio_rows, true};
  map.num_embeddings = rows;
  map.bound = pack_bound(rows, map.audios.count, audio_rows);
  map.index = batch.memory.template output<int64_t>(size_t(map.bound));
  map.source = batch.memory.template output<int64_t>(size_t(map.bound));
  map.target = batch.memory.template output<int64_t>(size_t(rows + audio_rows));
  map.cu_seqlens = batch.memory.template output<int32_t>(size_t(batch.in.count + 1));
  map.scratch = batch.prepare(cuda::select_tiles(rows), map.sequences, map.audios);
  check(cuda::launch_pack_map(map, nullptr), "pack_map");
  synchronize("pack_map");
  Values<int64_t> source = expected.source;
  source.resize(size_t(map.bound), -1);
  report.same("pack_map", map.source, source);
  report.same("pack_map", map.index, source);
  report.same("pack_map", map.target, expected.target);
  report.same("pack_map", map.cu_seqlens, expected.cu_seqlens);

  Values<int64_t> labels(static_cast<size_t>(rows)), positions, packed_labels;
  for (int64_t row = 0; row < rows; ++row) labels[row] = 1000 + row;
  for (size_t b = 1; b < expected.cu_seqlens.size(); ++b)
    for (int64_t t = expected.cu_seqlens[b - 1]; t < expected.cu_seqlens[b]; ++t) {
      positions.push_back(t - expected.cu_seqlens[b - 1]);
      packed_labels.push_back(
          packed_label(expected.source[t], positions.back() == 0, row_group.data(), rows, labels.data()));
    }
  cuda::PackLabelsParams label{};
  label.source = map.source;
  label.count = total;
  label.cu_seqlens = map.cu_seqlens;
  label.num_sequences = batch.in.count;
  label.row_group = map.row_group;
  label.rows = rows;
  label.labels = batch.memory.input(labels);
  label.position_ids = batch.memory.template output<int64_t>(size_t(total));
  label.packed_labels = batch.memory.template output<int64_t>(size_t(total));
  check(cuda::launch_pack_labels(label, nullptr), "pack_labels");
  synchronize("pack_labels");
  report.same("pack_labels", label.position_ids, positions);
  report.same("pack_labels", label.packed_labels, packed_labels);

  const Matrix<T> audio = features<T>(audio_rows, batch.shape.width, batch.shape.pad, 41);
  const int64_t size = int64_t(sizeof(T)), width = batch.shape.width;
  cuda::PackRowsParams copy{};
  copy.rows = batch.x_in();
  copy.audio = batch.rows_in(audio);
  copy.rows_stride_bytes = copy.rows.stride * size;
  copy.audio_stride_bytes = copy.audio.stride * size;
  copy.row_bytes = width * size;
  copy.index = map.source;
  copy.count = map.bound;
  T* out = batch.rows_out(map.bound);
  copy.out = out;
  check(cuda::launch_pack_rows(dtype_of<T>(), copy, nullptr), "pack_rows");
  synchronize("pack_rows");
  Values<T> packed(static_cast<size_t>(map.bound * width));
  std::memset(static_cast<void*>(packed.data()), 0, packed.size() * sizeof(T));
  for (int64_t t = 0; t < total; ++t) {
    const int64_t i = expected.source[t];
    std::copy_n(i < rows ? batch.x.row(i) : audio.row(i - rows), width, packed.data() + t * width);
  }
  report.same("pack_rows", out, packed);
}

template void check_pack(Batch<float>&, Report&);
template void check_pack(Batch<double>&, Report&);
template void check_pack(Batch<BFloat16>&, Report&);
template void check_pack(Batch<Half>&, Report&);

}  // namespace fastcompress::driver
