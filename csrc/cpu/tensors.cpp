// Sequences, segments and output memory of the CPU ops; see tensors.h.
#include "tensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

// Exists since torch 2.11; a weak reference lets the library load with torch 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace fastcompress {

namespace {

std::vector<int64_t> read_integers(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 1, name, " must have one dimension");
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  std::vector<int64_t> values(count);
  if (tensor.scalar_type() == ScalarType::Int) {
    const auto* p = static_cast<const int32_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = p[i * stride];
  } else {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
    const auto* p = static_cast<const int64_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = p[i * stride];
  }
  return values;
}

}  // namespace

Sequences read_sequences(const Tensor& like, int64_t rows_dim, const std::optional<Tensor>& cu_seqlens,
                         const std::optional<Tensor>& lengths) {
  Sequences s;
  if (rows_dim == 2) {
    STD_TORCH_CHECK(!cu_seqlens.has_value(), "cu_seqlens is for packed input; use lengths");
    const int64_t batch = like.size(0), padded = like.size(1);
    s.rows = batch * padded;
    std::vector<int64_t> sizes =
        lengths.has_value() ? read_integers("lengths", *lengths) : std::vector<int64_t>(batch, padded);
    STD_TORCH_CHECK(int64_t(sizes.size()) == batch, "lengths must have one value per sequence, ", batch, ", got ",
                    sizes.size());
    s.begin.resize(batch);
    s.end.resize(batch);
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(0 <= sizes[b] && sizes[b] <= padded, "lengths must lie in [0, ", padded, "], got ", sizes[b]);
      s.begin[b] = b * padded;
      s.end[b] = b * padded + sizes[b];
    }
    return s;
  }
  STD_TORCH_CHECK(!lengths.has_value(), "lengths is for padded input; use cu_seqlens");
  s.rows = like.size(0);
  if (!cu_seqlens.has_value()) {
    s.begin = {0};
    s.end = {s.rows};
    return s;
  }
  s.end = read_integers("cu_seqlens", *cu_seqlens);
  STD_TORCH_CHECK(!s.end.empty(), "cu_seqlens must have at least one value");
  STD_TORCH_CHECK(s.end.front() == 0, "cu_seqlens must start at 0, got ", s.end.front());
  STD_TORCH_CHECK(s.end.back() == s.rows, "cu_seqlens must end at the number of rows, ", s.rows, ", got ",
                  s.end.back());
  STD_TORCH_CHECK(std::is_sorted(s.end.begin(), s.end.end()), "cu_seqlens must not decrease");
  s.begin.assign(s.end.begin(), s.end.end() - 1);
  s.end.erase(s.end.begin());
  return s;
}

CheckedSegments read_segments(const Tensor& starts, const Tensor& lengths, int64_t rows, int64_t shared) {
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && lengths.scalar_type() == ScalarType::Long,
                  "starts and lengths must be int64");
  STD_TORCH_CHECK(starts.dim() == 1 && lengths.dim() == 1 && starts.size(0) == lengths.size(0),
                  "starts and lengths must have the same shape [M]");
  CheckedSegments s{torch::stable::contiguous(starts), torch::stable::contiguous(lengths), {}};
  s.list = {static_cast<const int64_t*>(s.starts.const_data_ptr()),
            static_cast<const int64_t*>(s.lengths.const_data_ptr()), starts.size(0)};
  int64_t earliest = 0;
  for (int64_t m = 0; m < s.list.count; ++m) {
    const int64_t start = s.list.starts[m], length = s.list.lengths[m];
    STD_TORCH_CHECK(length >= shared && start >= earliest && start <= rows && length <= rows - start,
                    shared == 0 ? "segments must be in order, without overlap"
                                : "tokens must be in order, have at least one row each, share only their first row",
                    " and lie inside ", rows, " rows");
    earliest = start + length - shared;
  }
  return s;
}

namespace {
constexpr size_t kAlignment = 64, kPage = 4096, kHugePage = size_t(2) << 20;
// Buffers of at least this size ask for huge pages. Writing 58 MB of fresh memory took 25.2 ms in small pages, 7.8 ms
// in huge pages, and 7.1 ms if the first huge page need not be split (AMD EPYC 9004, Linux 6.18, transparent huge pages
// on `madvise`).
constexpr size_t kHugeBytes = size_t(4) << 20;
// glibc maps larger blocks again for each request, and unmaps their tails without a copy. It serves smaller ones from
// warm memory once a block of the same size has been freed, so those are neither shrunk in place nor aligned to huge
// pages: pieces of other sizes left holes that tripled the time of later calls.
constexpr size_t kLargestRecycled = size_t(32) << 20;
// A result at least a tenth smaller than its buffer is copied instead. On one thread of the same machine that took 0.09
// ms for 523 of 751 rows of 1280 in fp32, where segment_pool takes 0.7 ms. More bytes than any machine has; smaller
// sizes can be rounded up without overflow.
constexpr size_t kLargest = size_t(1) << 62;

size_t round_up(size_t bytes) { return std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment); }
}  // namespace

OutputRows::OutputRows(int64_t max_rows, int64_t width, ScalarType dtype, size_t element_size)
    : width_(width), dtype_(dtype), row_bytes_(size_t(width) * element_size) {
  size_t wanted = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(size_t(max_rows), row_bytes_, &wanted) && wanted < kLargest,
                  "out of memory: ", max_rows, " rows of ", row_bytes_, " bytes");
  const size_t alignment = wanted < kLargestRecycled ? kAlignment : kHugePage;
  bytes_ = round_up(wanted);
  void* memory = nullptr;
  const int failed = posix_memalign(&memory, alignment, bytes_);
  STD_TORCH_CHECK(failed == 0, "out of memory: ", bytes_, " bytes for the result");
  memory_.reset(memory);
#ifdef MADV_HUGEPAGE
  if (bytes_ >= kHugeBytes) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes_) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint, so failure is ignored
  }
#endif
}

Tensor OutputRows::copy(int64_t rows) const {
  OutputRows exact(rows, width_, dtype_, row_bytes_ / size_t(width_));
  const char* from = static_cast<const char*>(data());
  char* to = static_cast<char*>(exact.data());
  parallel(rows, 2 * int64_t(row_bytes_), [&](int64_t begin, int64_t end) {
    std::memcpy(to + size_t(begin) * row_bytes_, from + size_t(begin) * row_bytes_, size_t(end - begin) * row_bytes_);
  });
  return exact.finish(rows);
}

Tensor OutputRows::finish(int64_t rows) {
  const size_t bytes = size_t(rows) * row_bytes_;
  const int64_t sizes[2] = {rows, width_}, strides[2] = {std::max<int64_t>(width_, 1), 1};
  if (torch_from_blob == nullptr || bytes == 0) {
    Tensor out = empty_cpu({rows, width_}, dtype_);
    if (bytes > 0) std::memcpy(out.mutable_data_ptr(), memory_.get(), bytes);
    return out;
  }
  if (bytes_ < kLargestRecycled && 10 * round_up(bytes) < 9 * bytes_) return copy(rows);
  if (bytes_ >= kLargestRecycled && bytes < bytes_) {
    if (void* smaller = std::realloc(memory_.get(), bytes)) {  // unmaps the tail
      (void)memory_.release();
      memory_.reset(smaller);
    }
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory_.get(), 2, sizes, strides, 0, shim_dtype(dtype_), aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { std::free(data); }, nullptr));
  (void)memory_.release();
  return Tensor(handle);
}

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

Tensor int64_tensor(const int64_t* values, int64_t count, int64_t padded_count, int64_t padding) {
  Tensor out = empty_cpu({padded_count}, ScalarType::Long);
  auto* p = static_cast<int64_t*>(out.mutable_data_ptr());
  std::copy(values, values + count, p);
  std::fill(p + count, p + padded_count, padding);
  return out;
}

Tensor int32_tensor(const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.empty() || values.back() <= std::numeric_limits<int32_t>::max(),
                  "offsets must fit in int32, got ", values.empty() ? 0 : values.back());
  Tensor out = empty_cpu({int64_t(values.size())}, ScalarType::Int);
  std::copy(values.begin(), values.end(), static_cast<int32_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace fastcompress
