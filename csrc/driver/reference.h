// Expected results of the driver, on the host. Every product, sum and division of rows is computed by the row kernels
// of the CPU ops (csrc/cpu/row_kernels.h), and the rules by rule.h, which the CPU ops share; this file only combines
// them as csrc/cpu/*.cpp do, without torch.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../cosine.h"
#include "../cpu/adjacent_distance.h"
#include "../cpu/row_kernels.h"
#include "../greedy_segments.h"
#include "../pack.h"
#include "../rule.h"
#include "../segment_reduce.h"

namespace fastcompress::driver {

template <class E>
using Values = std::vector<E>;

// A matrix of rows on the host.
template <class T>
struct Matrix {
  Values<T> data;
  int64_t count, width, stride;

  const T* row(int64_t i) const { return data.data() + i * stride; }
};

struct Spans {
  Values<int64_t> begin, end;
  int64_t count() const { return int64_t(begin.size()); }
};

struct Found {
  Values<int64_t> starts, lengths;
  Values<int32_t> cu_segments;

  SegmentList list() const { return {starts.data(), lengths.data(), int64_t(starts.size())}; }
};

namespace reference {

template <class T, class S = accumulate_t<T>>
Values<S> distances(const Matrix<T>& x, const Spans& sequences, int64_t lag) {
  Values<S> d(x.count, std::numeric_limits<S>::quiet_NaN());
  for (int64_t b = 0; b < sequences.count(); ++b) {
    const int64_t begin = sequences.begin[b], last = sequences.end[b] - lag;
    for (int64_t t = begin; t < std::min(begin + lag, last); ++t)
      score(x.row(t), x.stride * lag, (last - t + lag - 1) / lag + 1, x.width, d.data() + t, lag);
  }
  return d;
}

template <class T, class S = accumulate_t<T>>
Values<T> distances_backward(const Matrix<T>& x, const Spans& sequences, int64_t lag, const Values<S>& grad) {
  const auto& kernels = row_kernels<T>();
  Values<double> squares(x.count), cross(x.count), own_first(x.count), own_second(x.count);
  Values<uint8_t> pairs(x.count, 0);
  for (int64_t t = 0; t < x.count; ++t) squares[t] = kernels.dot(x.row(t), x.row(t), x.width);
  for (int64_t b = 0; b < sequences.count(); ++b) {
    for (int64_t t = sequences.begin[b]; t < sequences.end[b] - lag; ++t) {
      if (squares[t] == 0 && squares[t + lag] == 0) continue;
      const double a = clamped_norm(squares[t]), c = clamped_norm(squares[t + lag]), g = double(grad[t]);
      const double cosine = kernels.dot(x.row(t), x.row(t + lag), x.width) / (a * c);
      pairs[t] = 1;
      cross[t] = -g / (a * c);
      own_first[t] = a > kDistanceEps ? cosine / (a * a) * g : 0;
      own_second[t] = c > kDistanceEps ? cosine / (c * c) * g : 0;
    }
  }
  Values<T> out(x.count * x.width);
  for (int64_t t = 0; t < x.count; ++t) {
    const bool next = pairs[t], previous = t >= lag && pairs[t - lag];
    const double own = (next ? own_first[t] : 0) + (previous ? own_second[t - lag] : 0);
    kernels.combine(next || previous ? x.row(t) : nullptr, S(own), next ? x.row(t + lag) : nullptr,
                    S(next ? cross[t] : 0), previous ? x.row(t - lag) : nullptr, S(previous ? cross[t - lag] : 0),
                    x.width, out.data() + t * x.width);
  }
  return out;
}

template <class S>
Found select(const Values<S>& d, const Spans& sequences, const Rule& rule) {
  Found found;
  found.cu_segments.push_back(0);
  for (int64_t b = 0; b < sequences.count(); ++b) {
    const int64_t begin = sequences.begin[b], end = sequences.end[b];
    Walk(begin).advance(rule, Scores<S>{d.data(), nullptr}, begin, end, end, [&](int64_t start, int64_t length) {
      found.starts.push_back(start);
      found.lengths.push_back(length);
    });
    found.cu_segments.push_back(int32_t(found.starts.size()));
  }
  return found;
}

template <class T, class S = accumulate_t<T>>
Values<T> reduce(const Matrix<T>& x, const Found& segments, Reduce how, const S* weights = nullptr) {
  const SegmentList list = segments.list();
  Values<T> out(list.count * x.width);
  std::memset(static_cast<void*>(out.data()), 0, out.size() * sizeof(T));
  if (!picks_a_row(how)) {
    row_kernels<T>().reduce(x.data.data(), x.stride, weights, list, x.width, how, 0, out.data());
    return out;
  }
  for (int64_t m = 0; m < list.count; ++m)
    if (list.lengths[m] > 0)
      std::copy_n(x.row(picked_row(list.starts[m], list.lengths[m], how)), x.width, out.data() + m * x.width);
  return out;
}

template <class T>
Values<T> zeros(int64_t count) {
  Values<T> out(count);
  std::memset(static_cast<void*>(out.data()), 0, out.size() * sizeof(T));
  return out;
}

template <class T>
Values<T> expand(const Matrix<T>& y, const Found& segments, int64_t rows, Reduce how) {
  const SegmentList list = segments.list();
  Values<T> out = zeros<T>(rows * y.width);
  if (!picks_a_row(how)) {
    row_kernels<T>().expand(y.data.data(), y.stride, list, y.width, how == Reduce::kMean, out.data());
    return out;
  }
  for (int64_t m = 0; m < list.count; ++m)
    if (list.lengths[m] > 0)
      std::copy_n(y.row(m), y.width, out.data() + picked_row(list.starts[m], list.lengths[m], how) * y.width);
  return out;
}

template <class T>
Values<T> max_backward(const Matrix<T>& x, const Matrix<T>& y, const Matrix<T>& grad, const Found& segments) {
  Values<T> out = zeros<T>(x.count * x.width);
  const SegmentList list = segments.list();
  for (int64_t m = 0; m < list.count; ++m) {
    for (int64_t k = 0; k < x.width; ++k) {
      const auto maximum = widen(y.row(m)[k]);
      for (int64_t t = list.starts[m]; t < list.starts[m] + list.lengths[m]; ++t) {
        const auto value = widen(x.row(t)[k]);
        if (value != maximum && !(value != value && maximum != maximum)) continue;
        out[t * x.width + k] = grad.row(m)[k];
        break;
      }
    }
  }
  return out;
}

template <class T, class S = accumulate_t<T>>
void weighted_backward(const Matrix<T>& x, const Matrix<T>& y, const Matrix<T>& grad, const Values<S>& weights,
                       const Found& segments, Values<T>& grad_x, Values<S>& grad_weights) {
  const auto& kernels = row_kernels<T>();
  const SegmentList list = segments.list();
  grad_x = zeros<T>(x.count * x.width);
  grad_weights.assign(x.count, S(0));
  for (int64_t m = 0; m < list.count; ++m) {
    const int64_t start = list.starts[m], length = list.lengths[m];
    if (length == 0) continue;
    const S total = sum_of_weights(weights.data() + start, length);
    if (total == 0) continue;
    const double mean_slope = kernels.dot(grad.row(m), y.row(m), x.width);
    for (int64_t t = start; t < start + length; ++t) {
      const double slope = kernels.dot(grad.row(m), x.row(t), x.width) - mean_slope;
      grad_weights[t] = S(slope / double(total));
      kernels.combine(grad.row(m), weights[t] / total, nullptr, 0, nullptr, 0, x.width, grad_x.data() + t * x.width);
    }
  }
}

template <class T, class S = accumulate_t<T>>
Values<T> integrate(const Matrix<T>& x, const Values<S>& weights, const Values<S>& first, const S* divisors,
                    const Found& tokens) {
  Values<T> out(tokens.starts.size() * x.width);
  row_kernels<T>().integrate(x.data.data(), x.stride, first.data(), weights.data(), divisors, tokens.list(), x.width, 0,
                             out.data());
  return out;
}

// At most two tokens start in a row, as the inputs of the driver have it.
template <class T, class S = accumulate_t<T>>
void integrate_backward(const Matrix<T>& x, const Matrix<T>& grad, const Values<S>& weights, const Values<S>& first,
                        const Found& tokens, Values<T>& grad_x, Values<S>& grad_weights, Values<S>& grad_first) {
  const auto& kernels = row_kernels<T>();
  const SegmentList list = tokens.list();
  grad_x = zeros<T>(x.count * x.width);
  grad_weights.assign(x.count, S(0));
  grad_first.assign(list.count, S(0));
  int64_t next = 0;
  for (int64_t t = 0; t < x.count; ++t) {
    auto slope = [&](int64_t m) { return S(kernels.dot(grad.row(m), x.row(t), x.width)); };
    const bool covered = next > 0 && list.starts[next - 1] + list.lengths[next - 1] > t;
    const T* rows[3] = {covered ? grad.row(next - 1) : nullptr, nullptr, nullptr};
    S factors[3] = {weights[t], 0, 0};
    if (covered) grad_weights[t] = slope(next - 1);
    for (int i = 1; next < list.count && list.starts[next] == t; ++next, ++i) {
      grad_first[next] = slope(next);
      rows[i] = grad.row(next);
      factors[i] = first[next];
    }
    if (rows[0] == nullptr && rows[1] == nullptr) continue;
    kernels.combine(rows[0], factors[0], rows[1], factors[1], rows[2], factors[2], x.width,
                    grad_x.data() + t * x.width);
  }
}

template <class T, class S = accumulate_t<T>>
Values<uint8_t> greedy(const Matrix<T>& x, const Spans& sequences, const Linkage& linkage) {
  const auto& kernels = row_kernels<T>();
  Values<uint8_t> starts(x.count, 0);
  const size_t bytes = std::max<size_t>(64, size_t(padded_width(x.width)) * sizeof(S));
  S* total = static_cast<S*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  for (int64_t b = 0; b < sequences.count(); ++b) {
    bool joins = false;
    int64_t length = 1;
    double inverse = 0, dot, square;
    for (int64_t t = sequences.begin[b]; t < sequences.end[b]; ++t) {
      if (t == sequences.begin[b]) {
        inverse = inverse_norm(kernels.dot(x.row(t), x.row(t), x.width));
        starts[t] = 1;
        continue;
      }
      kernels.extend(total, joins, S(inverse), x.row(t), x.stride, x.width, &dot, &square);
      inverse = inverse_norm(square);
      joins = linkage.joins(dot, inverse, length);
      length = joins ? length + 1 : 1;
      starts[t] = !joins;
    }
  }
  std::free(total);
  return starts;
}

}  // namespace reference
}  // namespace fastcompress::driver
