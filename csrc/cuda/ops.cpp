// Host code of the CUDA ops that take sequences: checks tensors, allocates outputs, and launches kernels on the current
// stream. It reads from the device, and therefore waits, only if the caller requests an exact size or sets
// FASTCOMPRESS_CHECK=1.
#include "ops.h"

#include <algorithm>

#include "../pack.h"
#include "tensors.h"

namespace fastcompress::cuda {
namespace {

// ---- sequences ----

// Returns the batch as the caller passed it; `holder` keeps a contiguous copy of its integers alive.
BatchIn read_batch(const Tensor& like, int64_t rows_dim, const OptionalTensor& cu_seqlens,
                   const OptionalTensor& lengths, Tensor& holder) {
  BatchIn batch{nullptr, false, 1, 0, like.size(0), rows_dim == 2};
  const OptionalTensor& values = batch.padded ? lengths : cu_seqlens;
  STD_TORCH_CHECK(
      !(batch.padded ? cu_seqlens : lengths).has_value(),
      batch.padded ? "cu_seqlens is for packed input; use lengths" : "lengths is for padded input; use cu_seqlens");
  if (batch.padded) {
    batch.count = like.size(0);
    batch.padded_length = like.size(1);
    batch.rows = batch.count * batch.padded_length;
  }
  if (!values.has_value()) return batch;
  const char* name = batch.padded ? "lengths" : "cu_seqlens";
  STD_TORCH_CHECK(values->dim() == 1, name, " must have one dimension");
  const ScalarType type = values->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64");
  STD_TORCH_CHECK(!batch.padded || values->size(0) == batch.count, "lengths must have one value per sequence, ",
                  batch.count, ", got ", values->size(0));
  STD_TORCH_CHECK(batch.padded || values->size(0) >= 1, "cu_seqlens must start at 0");
  if (!batch.padded) batch.count = values->size(0) - 1;
  holder = torch::stable::contiguous(*values);
  batch.values = holder.const_data_ptr();
  batch.is_int64 = type == ScalarType::Long;
  return batch;
}

// Device memory that the kernels of one op share, in one allocation: State, sequences and tiles.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t rows_dim, const OptionalTensor& cu_seqlens, const OptionalTensor& lengths)
      : like_(like), batch_(read_batch(like, rows_dim, cu_seqlens, lengths, holder_)) {}

  const BatchIn& batch() const { return batch_; }
  const Sequences& sequences() const { return sequences_; }
  const Scratch& scratch() const { return scratch_; }

  // Allocates the memory, and launches the kernel that clears it and checks the batch and the audios.
  void prepare(int64_t num_tiles, Stream stream, const AudiosIn& audios = {}) {
    constexpr int64_t kStateWords = sizeof(State) / sizeof(int64_t);
    memory_ = empty_like(like_, {kStateWords + 2 * batch_.count + num_tiles}, ScalarType::Long);
    auto* words = static_cast<int64_t*>(memory_.mutable_data_ptr());
    sequences_ = {words + kStateWords, words + kStateWords + batch_.count, batch_.count};
    scratch_ = {reinterpret_cast<State*>(words), reinterpret_cast<uint64_t*>(words + kStateWords + 2 * batch_.count),
                num_tiles};
    check(launch_prepare(batch_, sequences_, scratch_, stream, audios), "prepare");
  }

  // Waits for the stream and returns the number of segments, or of packed rows. Raises if the input was invalid.
  int64_t read_count(Stream stream) const {
    STD_TORCH_CHECK(!is_capturing(stream),
                    "the number of segments or rows cannot be read while a CUDA graph is captured; pass compact=False");
    State state;
    check(read_back(&state, scratch_.state, sizeof state, stream), "reading the number of segments or rows");
    STD_TORCH_CHECK((state.error & kInvalidSequences) == 0, "cu_seqlens or lengths do not fit the input");
    STD_TORCH_CHECK((state.error & kInvalidIds) == 0, "ids are out of range");
    STD_TORCH_CHECK((state.error & kInvalidAudios) == 0,
                    "audio_cu_seqlens does not match the audios in row_group or the audio rows");
    STD_TORCH_CHECK(state.error == 0, "the number of segments exceeds the upper bound of the rule");
    return int64_t(state.total) - 1;
  }

 private:
  Tensor like_, holder_, memory_;
  BatchIn batch_;
  Sequences sequences_{};
  Scratch scratch_{};
};

// ---- results of an op that finds segments ----

struct Found {
  Tensor starts, lengths, cu_segments;
  SegmentsOut out;
};

// Returns the upper bound of the number of segments, which cu_segments must be able to express.
int64_t bound_segments(const Rule& rule, bool has_row_group, const BatchIn& batch) {
  const int64_t bound = max_segments(rule, has_row_group, batch.rows, batch.count);
  STD_TORCH_CHECK(bound < int64_t(1) << 31,
                  "the input must have fewer than 2^31 segments, because cu_segments is int32; ", batch.rows,
                  " rows can have ", bound);
  return bound;
}

Found allocate_segments(const Tensor& like, int64_t num_sequences, int64_t bound, bool compact) {
  Found found{empty_like(like, {bound}, ScalarType::Long),
              empty_like(like, {bound}, ScalarType::Long),
              empty_like(like, {num_sequences + 1}, ScalarType::Int),
              {}};
  found.out = {static_cast<int64_t*>(found.starts.mutable_data_ptr()),
               static_cast<int64_t*>(found.lengths.mutable_data_ptr()),
               static_cast<int32_t*>(found.cu_segments.mutable_data_ptr()), bound, !compact};
  return found;
}

// Returns the first `count` rows: a view if they are at least nine tenths of the memory, else a copy, so that the rest
// is freed.
Tensor first_rows(const Tensor& tensor, int64_t count) {
  if (count == tensor.size(0)) return tensor;
  Tensor rows = tensor;
  rows = torch::stable::narrow(rows, 0, 0, count);
  return 10 * count >= 9 * tensor.size(0) ? rows : torch::stable::clone(rows);
}

// Finds the segments of distances; the outputs still have the size of the upper bound. `workspace` must be prepared.
Found select(const Tensor& d, const Workspace& workspace, const int32_t* row_group, const Rule& rule, int64_t bound,
             bool compact, Stream stream) {
  const BatchIn& batch = workspace.batch();
  Found found = allocate_segments(d, batch.count, bound, compact);
  const Tensor flags = empty_like(d, {batch.rows}, ScalarType::Byte);
  const SelectParams p{d.const_data_ptr(),
                       batch.rows,
                       workspace.sequences(),
                       row_group,
                       rule,
                       static_cast<uint8_t*>(flags.mutable_data_ptr()),
                       found.out,
                       workspace.scratch()};
  check(launch_select(d.scalar_type() == ScalarType::Double, p, stream), "select_boundaries");
  return found;
}

}  // namespace

Tensor adjacent_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t lag) {
  STD_TORCH_CHECK(lag >= 1, "lag must be at least 1, got ", lag);
  const Scope scope(x);
  const Rows rows = read_rows(x);
  Workspace workspace(x, x.dim() - 1, cu_seqlens, lengths);
  workspace.prepare(0, scope.stream);
  const ScalarType type = accumulate_type(x.scalar_type());
  Tensor out = x.dim() == 3 ? empty_like(x, {x.size(0), x.size(1)}, type) : empty_like(x, {x.size(0)}, type);
  const DistanceParams p{rows_in(rows), workspace.sequences(), std::min(lag, std::max<int64_t>(1, rows.count)), nullptr,
                         out.mutable_data_ptr()};
  check(launch_adjacent_distance_fwd(dtype_of("x", x), p, scope.stream), "adjacent_distance");
  if (checks_at_once(scope.stream)) workspace.read_count(scope.stream);
  return out;
}

Tensor adjacent_distance_backward(Tensor grad, Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                  int64_t lag) {
  STD_TORCH_CHECK(lag >= 1, "lag must be at least 1, got ", lag);
  const Scope scope(x);
  const Rows rows = read_rows(x);
  STD_TORCH_CHECK(grad.numel() == rows.count && grad.scalar_type() == accumulate_type(x.scalar_type()),
                  "grad must have the shape and dtype of the distances");
  const Tensor grad_rows = torch::stable::contiguous(grad);
  Workspace workspace(x, x.dim() - 1, cu_seqlens, lengths);
  workspace.prepare(0, scope.stream);
  Tensor out = x.dim() == 3 ? empty_like(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type())
                            : empty_like(x, {x.size(0), x.size(1)}, x.scalar_type());
  const DistanceParams p{rows_in(rows), workspace.sequences(), std::min(lag, std::max<int64_t>(1, rows.count)),
                         grad_rows.const_data_ptr(), out.mutable_data_ptr()};
  check(launch_adjacent_distance_bwd(dtype_of("x", x), p, scope.stream), "adjacent_distance_backward");
  if (checks_at_once(scope.stream)) workspace.read_count(scope.stream);
  return out;
}

Tensor banded_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t window) {
  STD_TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
  const Scope scope(x);
  const Rows rows = read_rows(x);
  Workspace workspace(x, x.dim() - 1, cu_seqlens, lengths);
  workspace.prepare(0, scope.stream);
  const ScalarType type = accumulate_type(x.scalar_type());
  Tensor out =
      x.dim() == 3 ? empty_like(x, {x.size(0), x.size(1), window}, type) : empty_like(x, {x.size(0), window}, type);
  const int64_t lags = std::min(window, std::max<int64_t>(1, rows.count - 1));
  STD_TORCH_CHECK(lags < 450000, "window must be less than 450000, got ", window);  // blocks in a grid
  const Tensor dots = empty_like(x, {rows.count, lags + 1}, ScalarType::Double);
  const BandParams p{
      rows_in(rows),         workspace.sequences(), window, lags, static_cast<double*>(dots.mutable_data_ptr()),
      out.mutable_data_ptr()};
  check(launch_banded_distance(dtype_of("x", x), p, scope.stream), "banded_distance");
  if (checks_at_once(scope.stream)) workspace.read_count(scope.stream);
  return out;
}

Tensor greedy_boundaries(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, double threshold,
                         int64_t max_len) {
  STD_TORCH_CHECK(max_len >= 0, "max_len must not be negative, got ", max_len);
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const RowsIn in = rows_in(rows);
  const DType dtype = dtype_of("x", x);
  Workspace workspace(x, x.dim() - 1, cu_seqlens, lengths);
  workspace.prepare(0, scope.stream);
  const int64_t shared_bytes = greedy_shared_bytes(current_device(), dtype, in);
  const Tensor inverse_norms = empty_like(x, {rows.count}, ScalarType::Double);
  Tensor scratch;
  if (shared_bytes == 0)
    scratch = empty_like(x, {workspace.batch().count, 2 * padded_width(rows.width)}, accumulate_type(x.scalar_type()));
  Tensor out = x.dim() == 3 ? empty_like(x, {x.size(0), x.size(1)}, ScalarType::Bool)
                            : empty_like(x, {x.size(0)}, ScalarType::Bool);
  const GreedyParams p{in,
                       workspace.sequences(),
                       {1 - threshold, max_len},
                       static_cast<double*>(inverse_norms.mutable_data_ptr()),
                       shared_bytes == 0 ? scratch.mutable_data_ptr() : nullptr,
                       static_cast<uint8_t*>(out.mutable_data_ptr())};
  check(launch_greedy_boundaries(dtype, p, shared_bytes, scope.stream), "greedy_boundaries");
  if (checks_at_once(scope.stream)) workspace.read_count(scope.stream);
  return out;
}

Tensor min_variance_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths, OptionalTensor row_group,
                               double rate, int64_t max_len) {
  check_min_variance(d, rate, max_len);
  const Scope scope(d);
  const bool is_double = d.scalar_type() == ScalarType::Double;
  const Tensor distances = torch::stable::contiguous(
      is_double || d.scalar_type() == ScalarType::Float ? d : torch::stable::to(d, ScalarType::Float));
  Workspace workspace(d, d.dim() - 1, cu_seqlens, lengths);
  const BatchIn& batch = workspace.batch();
  Tensor holder;
  const int32_t* row_group_data = read_row_group(row_group, batch.rows, holder);
  workspace.prepare(0, scope.stream);
  Tensor out = d.dim() == 3 ? empty_like(d, {d.size(0), d.size(1)}, ScalarType::Bool)
                            : empty_like(d, {d.size(0)}, ScalarType::Bool);
  VarianceParams p{};
  p.d = distances.const_data_ptr();
  p.window = d.size(d.dim() - 1);
  p.rows = batch.rows;
  p.sequences = workspace.sequences();
  p.row_group = row_group_data;
  p.rate = rate;
  p.max_len = max_len;
  p.bound = row_group.has_value() ? batch.rows : batch.rows / kVarianceBlock + batch.count;
  plan_variance(current_device(), p);
  const Tensor blocks = empty_like(d, {p.bound * int64_t(sizeof(VarianceBlock))}, ScalarType::Byte);
  const Tensor scratch = empty_like(d, {p.thread_blocks * p.scratch_bytes}, ScalarType::Byte);
  p.blocks = static_cast<VarianceBlock*>(blocks.mutable_data_ptr());
  p.state = workspace.scratch().state;
  p.scratch = scratch.mutable_data_ptr();
  p.starts = static_cast<uint8_t*>(out.mutable_data_ptr());
  check(launch_min_variance(is_double, p, scope.stream), "min_variance_boundaries");
  if (checks_at_once(scope.stream)) workspace.read_count(scope.stream);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> select_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                                     OptionalTensor row_group, std::string rule_name, int64_t size,
                                                     double threshold, double prominence, int64_t min_len,
                                                     int64_t max_len, bool keep_tail, bool compact) {
  Rule rule = make_rule(rule_name, size, threshold, prominence, min_len, max_len, keep_tail);
  STD_TORCH_CHECK(d.dim() == 1 || d.dim() == 2, "d must have shape [N] or [B, T]");
  const Scope scope(d);
  round_threshold(rule, d.scalar_type());
  const bool is_wide = d.scalar_type() == ScalarType::Double || d.scalar_type() == ScalarType::Float;
  const Tensor scores = torch::stable::contiguous(is_wide ? d : torch::stable::to(d, ScalarType::Float));
  Workspace workspace(d, d.dim(), cu_seqlens, lengths);
  Tensor holder;
  const int32_t* row_group_data = read_row_group(row_group, workspace.batch().rows, holder);
  const int64_t bound = bound_segments(rule, row_group.has_value(), workspace.batch());
  workspace.prepare(select_tiles(workspace.batch().rows), scope.stream);
  Found found = select(scores, workspace, row_group_data, rule, bound, compact, scope.stream);
  if (compact || checks_at_once(scope.stream)) {
    const int64_t count = workspace.read_count(scope.stream);
    if (compact) return {first_rows(found.starts, count), first_rows(found.lengths, count), found.cu_segments};
  }
  return {found.starts, found.lengths, found.cu_segments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> segment_pool(Tensor x, OptionalTensor keys, OptionalTensor cu_seqlens,
                                                        OptionalTensor lengths, OptionalTensor row_group,
                                                        std::string rule_name, int64_t size, double threshold,
                                                        double prominence, int64_t min_len, int64_t max_len,
                                                        bool keep_tail, bool compact) {
  const Rule rule = make_rule(rule_name, size, threshold, prominence, min_len, max_len, keep_tail);
  STD_TORCH_CHECK(rule.prominence <= 0, "segment_pool does not compute prominences");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  Rows key_rows = rows;
  if (keys.has_value()) {
    key_rows = read_rows(*keys);
    STD_TORCH_CHECK(key_rows.count == rows.count, "keys must have the number of rows of x, ", rows.count, ", got ",
                    key_rows.count);
    STD_TORCH_CHECK(keys->scalar_type() == x.scalar_type(), "keys must have the dtype of x");
  }
  const DType dtype = dtype_of("x", x);
  Workspace workspace(x, x.dim() - 1, cu_seqlens, lengths);
  const BatchIn& batch = workspace.batch();
  Tensor holder;
  const int32_t* row_group_data = read_row_group(row_group, batch.rows, holder);
  const int64_t bound = bound_segments(rule, row_group.has_value(), batch);

  Found found;
  Tensor values;
  if (is_fused(rule)) {
    const PoolPlan plan = plan_pool(current_device(), dtype, rows_in(rows), rows_in(key_rows), rule);
    workspace.prepare(plan.num_tiles, scope.stream);
    found = allocate_segments(x, batch.count, bound, compact);
    values = empty_like(x, {found.out.bound, rows.width}, x.scalar_type());
    const PoolParams p{rows_in(rows), rows_in(key_rows),         workspace.sequences(), row_group_data, rule,
                       found.out,     values.mutable_data_ptr(), workspace.scratch(),   plan.tile_rows, plan.pitch};
    check(launch_segment_pool_fwd(dtype, p, plan, scope.stream), "segment_pool");
  } else {
    workspace.prepare(select_tiles(batch.rows), scope.stream);
    const Tensor d = empty_like(x, {batch.rows}, accumulate_type(x.scalar_type()));
    const DistanceParams p{rows_in(key_rows), workspace.sequences(), 1, nullptr, d.mutable_data_ptr()};
    check(launch_adjacent_distance_fwd(dtype, p, scope.stream), "adjacent_distance");
    found = select(d, workspace, row_group_data, rule, bound, compact, scope.stream);
  }
  int64_t count = found.out.bound;
  if (compact || checks_at_once(scope.stream)) {
    const int64_t known = workspace.read_count(scope.stream);
    if (compact) count = known;
  }
  const Tensor starts = first_rows(found.starts, count), segment_lengths = first_rows(found.lengths, count);
  if (!is_fused(rule))
    values =
        segment_reduce(x.dim() == 3 ? torch::stable::view(torch::stable::contiguous(x), {rows.count, rows.width}) : x,
                       starts, segment_lengths, "mean");
  return {first_rows(values, count), starts, segment_lengths, found.cu_segments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_map(Tensor row_group, OptionalTensor ids, OptionalTensor cu_seqlens,
                                                    OptionalTensor lengths, Tensor audio_cu_seqlens,
                                                    int64_t num_embeddings, int64_t num_audio_rows, bool compact) {
  const Scope scope(row_group);
  Workspace workspace(row_group, row_group.dim(), cu_seqlens, lengths);
  const BatchIn& batch = workspace.batch();
  const int64_t num_audios = audio_cu_seqlens.numel() - 1, bound = pack_bound(batch.rows, num_audios, num_audio_rows);
  STD_TORCH_CHECK(num_audios >= 0, "audio_cu_seqlens must start at 0");
  STD_TORCH_CHECK(batch.rows + num_audio_rows < int64_t(1) << 31, "the number of rows must be less than 2^31, got ",
                  batch.rows + num_audio_rows);
  Tensor group_holder, id_holder;
  const int32_t* row_group_data = read_row_group(row_group, batch.rows, group_holder);
  if (ids.has_value()) id_holder = read_int64("ids", *ids, batch.rows);
  const Tensor offsets = read_int64("audio_cu_seqlens", audio_cu_seqlens, num_audios + 1);
  const AudiosIn audios{const_int64_data(offsets), num_audios, num_audio_rows, compact};
  workspace.prepare(select_tiles(batch.rows), scope.stream, audios);
  Tensor index = empty_like(row_group, {bound}, ScalarType::Long);
  Tensor source = empty_like(row_group, {bound}, ScalarType::Long);
  Tensor target = empty_like(row_group, {batch.rows + num_audio_rows}, ScalarType::Long);
  Tensor packed_cu_seqlens = empty_like(row_group, {batch.count + 1}, ScalarType::Int);
  const PackMapParams p{workspace.sequences(),
                        batch.rows,
                        row_group_data,
                        ids.has_value() ? const_int64_data(id_holder) : nullptr,
                        audios,
                        num_embeddings,
                        static_cast<int64_t*>(index.mutable_data_ptr()),
                        static_cast<int64_t*>(source.mutable_data_ptr()),
                        static_cast<int64_t*>(target.mutable_data_ptr()),
                        static_cast<int32_t*>(packed_cu_seqlens.mutable_data_ptr()),
                        bound,
                        workspace.scratch()};
  check(launch_pack_map(p, scope.stream), "pack_map");
  if (compact || checks_at_once(scope.stream)) {
    const int64_t count = workspace.read_count(scope.stream);
    if (compact) return {first_rows(index, count), first_rows(source, count), target, packed_cu_seqlens};
  }
  return {index, source, target, packed_cu_seqlens};
}

std::tuple<Tensor, Tensor> pack_labels(Tensor source, Tensor cu_seqlens, Tensor row_group, OptionalTensor labels) {
  const Scope scope(source);
  const int64_t count = source.numel(), num_rows = row_group.numel();
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() >= 1,
                  "cu_seqlens must be int32 and start at 0");
  const Tensor sources = read_int64("source", source, count), ends = torch::stable::contiguous(cu_seqlens);
  Tensor group_holder, label_holder;
  const int32_t* row_group_data = read_row_group(row_group, num_rows, group_holder);
  if (labels.has_value()) label_holder = read_int64("labels", *labels, num_rows);
  Tensor position_ids = empty_like(source, {count}, ScalarType::Long);
  Tensor packed_labels = empty_like(source, {labels.has_value() ? count : 0}, ScalarType::Long);
  const PackLabelsParams p{const_int64_data(sources),
                           count,
                           static_cast<const int32_t*>(ends.const_data_ptr()),
                           ends.numel() - 1,
                           row_group_data,
                           num_rows,
                           labels.has_value() ? const_int64_data(label_holder) : nullptr,
                           static_cast<int64_t*>(position_ids.mutable_data_ptr()),
                           static_cast<int64_t*>(packed_labels.mutable_data_ptr())};
  check(launch_pack_labels(p, scope.stream), "pack_labels");
  return {position_ids, packed_labels};
}

// `target` and `is_table` are used only by the gradient, in Python.
Tensor pack_rows(Tensor rows, Tensor audio, Tensor index, Tensor target, bool is_table) {
  STD_TORCH_CHECK(rows.dim() == 2 && audio.dim() == 2, "rows and audio must have two dimensions");
  const Scope scope(rows);
  const Rows text_rows = read_rows(rows);
  const Rows audio_rows = read_matrix("audio", audio, audio.size(0), text_rows.width, rows.scalar_type());
  const int64_t count = index.numel();
  const Tensor from = read_int64("index", index, count);
  Tensor out = empty_like(rows, {count, text_rows.width}, rows.scalar_type());
  const ErrorFlag error(rows, scope.stream);
  const DType dtype = dtype_of("rows", rows);
  const int64_t size = size_of(dtype);
  const PackRowsParams p{rows_in(text_rows),
                         rows_in(audio_rows),
                         text_rows.stride * size,
                         audio_rows.stride * size,
                         text_rows.width * size,
                         const_int64_data(from),
                         count,
                         out.mutable_data_ptr(),
                         error.data};
  check(launch_pack_rows(dtype, p, scope.stream), "pack_rows");
  STD_TORCH_CHECK(!error.read(scope.stream), "index must lie in [-1, ", text_rows.count + audio_rows.count, ")");
  return out;
}

}  // namespace fastcompress::cuda
