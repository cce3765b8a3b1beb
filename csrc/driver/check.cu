// Compares the results of every kernel with those of the CPU kernels, bit for bit.
#include "check.h"

#include "case.h"

namespace fastcompress::driver {
namespace {

using cuda::RowsIn;

const Rule kRules[] = {
    {RuleKind::kLocalMax, 1, -1.0, 0, 0, 0, true}, {RuleKind::kLocalMax, 3, 0.125, 0, 0, 0, true},
    {RuleKind::kThreshold, 0, 0.5, 0, 0, 0, true}, {RuleKind::kUniform, 3, 0, 0, 0, 0, true},
    {RuleKind::kUniform, 50, 0, 0, 0, 0, false},
};
const Rule kWalked = {RuleKind::kThreshold, 0, 0.5, 0, 2, 5, true};

// Segments of 0 to 5 rows and one of more than two blocks of 64, with gaps. Tokens share their first row with the
// previous token, and have at least one row.
Found segments_of(int64_t rows, bool tokens) {
  Found found;
  Random random(11);
  for (int64_t row = random.below(3); row < rows;) {
    int64_t length = found.starts.size() == 3 ? 140 : random.below(6);
    length = std::min(std::max<int64_t>(length, tokens ? 2 : 0), rows - row);
    found.starts.push_back(row);
    found.lengths.push_back(length);
    row += tokens ? std::max<int64_t>(1, length - 1) : length + (random.below(4) == 0 ? 1 + random.below(3) : 0);
    if (tokens && row >= rows - 1) break;
  }
  return found;
}

template <class S>
Values<S> weights_of(int64_t count, uint64_t seed) {
  Values<S> weights;
  Random random(seed);
  for (int64_t i = 0; i < count; ++i) weights.push_back(S(std::abs(random.normal()) + 0.1));
  return weights;
}

// Values, starts, lengths and offsets of the segments that were found, followed by empty segments up to the bound.
template <class T>
void same_segments(Report& report, const char* what, const cuda::SegmentsOut& out, const Found& expected,
                   int64_t rows) {
  Values<int64_t> starts = expected.starts, lengths = expected.lengths;
  starts.resize(size_t(out.bound), rows);
  lengths.resize(size_t(out.bound), 0);
  report.same(what, out.starts, starts);
  report.same(what, out.lengths, lengths);
  report.same(what, out.cu_segments, expected.cu_segments);
}

void same_state(Report& report, const char* what, const cuda::State* state, bool hostile, int64_t total) {
  const cuda::State found = read(state, 1)[0];
  ++report.compared;
  if ((found.error != 0) != hostile) report.fail(what, "error flag " + std::to_string(found.error));
  if (total >= 0 && int64_t(found.total) - 1 != total) report.fail(what, "total " + std::to_string(found.total));
}

template <class T>
void check_pool(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  const Values<S> d = reference::distances(batch.x, batch.sequences, 1);
  for (const Rule& rule : kRules) {
    const Found expected = reference::select(d, batch.sequences, rule);
    const int64_t bound = batch.rows + 1;
    const RowsIn x = batch.x_in();
    const cuda::PoolPlan plan = cuda::plan_pool(cuda::current_device(), dtype_of<T>(), x, x, rule);
    cuda::PoolParams p{};
    p.x = p.keys = x;
    p.scratch = batch.prepare(plan.num_tiles, p.sequences);
    p.rule = rule;
    p.out = batch.segments_out(bound);
    T* values = batch.rows_out(bound);
    p.values = values;
    p.tile_rows = plan.tile_rows;
    p.pitch = plan.pitch;
    check(cuda::launch_segment_pool_fwd(dtype_of<T>(), p, plan, nullptr), "segment_pool");
    synchronize("segment_pool");
    same_segments<T>(report, "segment_pool", p.out, expected, batch.rows);
    Values<T> means = reference::reduce(batch.x, expected, Reduce::kMean);
    const Values<T> rest = reference::zeros<T>(bound * batch.shape.width - int64_t(means.size()));
    means.insert(means.end(), rest.begin(), rest.end());
    report.same("segment_pool", values, means);
    same_state(report, "segment_pool", p.scratch.state, batch.shape.hostile, int64_t(expected.starts.size()));
  }
}

template <class T>
void check_select(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  const Values<S> d = reference::distances(batch.x, batch.sequences, 1);
  for (const Rule& rule : {kRules[1], kWalked}) {
    cuda::SelectParams p{};
    p.d = batch.memory.input(d);
    p.rows = batch.rows;
    p.scratch = batch.prepare(cuda::select_tiles(batch.rows), p.sequences);
    p.rule = rule;
    p.flags = batch.memory.template output<uint8_t>(size_t(batch.rows));
    p.out = batch.segments_out(batch.rows + 1);
    check(cuda::launch_select(sizeof(S) == 8, p, nullptr), "select_boundaries");
    synchronize("select_boundaries");
    const Found expected = reference::select(d, batch.sequences, rule);
    same_segments<T>(report, "select_boundaries", p.out, expected, batch.rows);
    same_state(report, "select_boundaries", p.scratch.state, batch.shape.hostile, int64_t(expected.starts.size()));
  }
}

template <class T>
void check_distances(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  for (const int64_t lag : {1, 3}) {
    cuda::DistanceParams p{};
    p.x = batch.x_in();
    const cuda::Scratch scratch = batch.prepare(0, p.sequences);
    p.lag = lag;
    S* d = batch.memory.template output<S>(size_t(batch.rows));
    p.out = d;
    check(cuda::launch_adjacent_distance_fwd(dtype_of<T>(), p, nullptr), "adjacent_distance");
    const Values<S> grad = weights_of<S>(batch.rows, 5);
    T* grad_x = batch.rows_out(batch.rows);
    p.grad = batch.memory.input(grad);
    p.out = grad_x;
    check(cuda::launch_adjacent_distance_bwd(dtype_of<T>(), p, nullptr), "adjacent_distance_backward");
    synchronize("adjacent_distance");
    report.same("adjacent_distance", d, reference::distances(batch.x, batch.sequences, lag));
    report.same("adjacent_distance_backward", grad_x,
                reference::distances_backward(batch.x, batch.sequences, lag, grad));
    same_state(report, "adjacent_distance", scratch.state, batch.shape.hostile, -1);
  }
}

template <class T>
void check_greedy(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  cuda::GreedyParams p{};
  p.x = batch.x_in();
  batch.prepare(0, p.sequences);
  p.linkage = {0.6, 7};
  p.inverse_norms = batch.memory.template output<double>(size_t(batch.rows));
  const int64_t shared = cuda::greedy_shared_bytes(cuda::current_device(), dtype_of<T>(), p.x);
  if (shared == 0)
    p.scratch = batch.memory.template output<S>(size_t(2 * padded_width(batch.shape.width) * batch.in.count));
  p.starts = batch.memory.template output<uint8_t>(size_t(batch.rows));
  check(cuda::launch_greedy_boundaries(dtype_of<T>(), p, shared, nullptr), "greedy_boundaries");
  synchronize("greedy_boundaries");
  report.same("greedy_boundaries", p.starts, reference::greedy(batch.x, batch.sequences, p.linkage));
}

template <class T>
void check_given(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  const Found segments = segments_of(batch.rows, false);
  const int64_t count = int64_t(segments.starts.size()), rows = batch.rows;
  int32_t* error = batch.memory.input(Values<int32_t>{0});
  cuda::ReduceParams p{};
  p.x = batch.x_in();
  p.segments = {batch.memory.input(segments.starts), batch.memory.input(segments.lengths), count, rows, error};
  const Matrix<T> grad = features<T>(count, batch.shape.width, batch.shape.pad, 13);
  auto run = [&](auto launch, const char* what, int64_t out_rows) {
    T* out = batch.rows_out(out_rows);
    p.out = out;
    check(launch(dtype_of<T>(), p, nullptr), what);
    synchronize(what);
    return out;
  };
  for (const Reduce how : {Reduce::kMean, Reduce::kSum, Reduce::kMax, Reduce::kFirst, Reduce::kLast, Reduce::kMiddle}) {
    p.reduce = how;
    const T* y = run(cuda::launch_segment_reduce_fwd, "segment_reduce", count);
    const Values<T> expected = reference::reduce(batch.x, segments, how);
    report.same("segment_reduce", y, expected);
    if (how == Reduce::kMax) {
      const Matrix<T> best{expected, count, batch.shape.width, batch.shape.width};
      p.y = batch.rows_in(best);
      p.grad = batch.rows_in(grad);
      const T* grad_x = run(cuda::launch_segment_max_bwd, "segment_max_backward", rows);
      report.same("segment_max_backward", grad_x, reference::max_backward(batch.x, best, grad, segments));
      continue;
    }
    const RowsIn x = p.x;
    p.x = batch.rows_in(grad);
    const T* expanded = run(cuda::launch_segment_expand_fwd, "segment_expand", rows);
    report.same("segment_expand", expanded, reference::expand(grad, segments, rows, how));
    p.x = x;
  }
  p.reduce = Reduce::kMean;
  const Values<S> weights = weights_of<S>(rows, 17);
  p.weights = batch.memory.input(weights);
  const T* y = run(cuda::launch_segment_weighted_mean_fwd, "segment_weighted_mean", count);
  const Matrix<T> mean{reference::reduce(batch.x, segments, Reduce::kMean, weights.data()), count, batch.shape.width,
                       batch.shape.width};
  report.same("segment_weighted_mean", y, mean.data);
  p.y = batch.rows_in(mean);
  p.grad = batch.rows_in(grad);
  S* found_weights = batch.memory.template output<S>(size_t(rows));
  p.grad_weights = found_weights;
  const T* found_x = run(cuda::launch_segment_weighted_mean_bwd, "segment_weighted_mean_backward", rows);
  Values<T> grad_x;
  Values<S> grad_weights;
  reference::weighted_backward(batch.x, mean, grad, weights, segments, grad_x, grad_weights);
  report.same("segment_weighted_mean_backward", found_x, grad_x);
  report.same("segment_weighted_mean_backward", found_weights, grad_weights);
  report.same("error flag of given segments", error, {0});
}

template <class T>
void check_integrate(Batch<T>& batch, Report& report) {
  using S = accumulate_t<T>;
  const Found tokens = segments_of(batch.rows, true);
  const int64_t count = int64_t(tokens.starts.size()), rows = batch.rows;
  const Values<S> weights = weights_of<S>(rows, 19), first = weights_of<S>(count, 23),
                  divisors = weights_of<S>(count, 29);
  const Matrix<T> grad = features<T>(count, batch.shape.width, batch.shape.pad, 31);
  cuda::IntegrateParams p{};
  p.x = batch.x_in();
  p.grad = batch.rows_in(grad);
  p.tokens = {batch.memory.input(tokens.starts), batch.memory.input(tokens.lengths), count, rows, nullptr};
  p.weights = batch.memory.input(weights);
  p.first = batch.memory.input(first);
  for (const bool divide : {false, true}) {
    p.divisors = divide ? batch.memory.input(divisors) : nullptr;
    T* out = batch.rows_out(count);
    p.out = out;
    check(cuda::launch_integrate_rows_fwd(dtype_of<T>(), p, nullptr), "integrate_rows");
    synchronize("integrate_rows");
    report.same("integrate_rows", out,
                reference::integrate(batch.x, weights, first, divide ? divisors.data() : nullptr, tokens));
  }
  T* out = batch.rows_out(rows);
  S* found_weights = batch.memory.template output<S>(size_t(rows));
  S* found_first = batch.memory.template output<S>(size_t(count));
  p.out = out, p.grad_weights = found_weights, p.grad_first = found_first;
  check(cuda::launch_integrate_rows_bwd(dtype_of<T>(), p, nullptr), "integrate_rows_backward");
  synchronize("integrate_rows_backward");
  Values<T> grad_x;
  Values<S> grad_weights, grad_first;
  reference::integrate_backward(batch.x, grad, weights, first, tokens, grad_x, grad_weights, grad_first);
  report.same("integrate_rows_backward", out, grad_x);
  report.same("integrate_rows_backward", found_weights, grad_weights);
  report.same("integrate_rows_backward", found_first, grad_first);
}

template <class T>
void check_dtype(const Shape& shape, bool exact, const char* dtype, Report& report) {
  report.where = std::string(shape.name) + ", " + dtype;
  Batch<T> batch(shape, exact);
  check_pool(batch, report);
  check_select(batch, report);
  check_distances(batch, report);
  check_greedy(batch, report);
  check_given(batch, report);
  check_integrate(batch, report);
  check_pack(batch, report);
  if (!batch.memory.intact()) report.fail("memory", "a kernel wrote around a buffer");
}

}  // namespace

int check_kernels(bool brief) {
  // Rows that are moved by 16 bytes, rows that are moved by elements, rows as in a speech encoder, and offsets of
  // sequences that do not fit the rows.
  const Shape shapes[] = {{"aligned", {30, 0, 1, 77, 150}, 64, 0, 0, false},
                          {"unaligned", {40, 3, 0, 61, 170}, 33, 3, 1, false},
                          {"wide", {300}, 1280, 0, 0, false},
                          {"hostile offsets", {30, 0, 1, 77, 150}, 64, 0, 0, true}};
  const Shape short_shapes[] = {{"aligned", {30, 0, 11}, 64, 0, 0, false},
                                {"unaligned", {30, 0, 11}, 33, 3, 1, false},
                                {"hostile offsets", {30, 0, 11}, 64, 0, 0, true}};
  Report report;
  auto run = [&](const Shape& shape) {
    check_dtype<float>(shape, brief, "float32", report);
    check_dtype<double>(shape, brief, "float64", report);
    check_dtype<BFloat16>(shape, brief, "bfloat16", report);
    check_dtype<Half>(shape, brief, "float16", report);
  };
  if (brief)
    for (const Shape& shape : short_shapes) run(shape);
  else
    for (const Shape& shape : shapes) run(shape);
  std::printf("{\"check\": \"all\", \"compared\": %d, \"wrong\": %d}\n", report.compared, report.wrong);
  return report.wrong;
}

}  // namespace fastcompress::driver
