// Times work on the device: replays of a CUDA graph after the second-level cache has been overwritten. Under g++ it
// times calls on the host, so that the modes of the driver can be tried without a GPU.
#pragma once

#include <algorithm>
#include <chrono>

#include "memory.h"

namespace fastcompress::driver {

class Timer {
 public:
  // `flush_bytes`: more than the second-level cache holds.
  explicit Timer(size_t flush_bytes, int repetitions) : bytes_(flush_bytes), repetitions_(repetitions) {
#ifdef __CUDACC__
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    flush_ = allocate(bytes_);
#endif
  }
  Timer(const Timer&) = delete;
  ~Timer() {
#ifdef __CUDACC__
    release(flush_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
#endif
  }

  // Returns the median of the seconds that `launch(stream)` takes on the device.
  template <class Launch>
  double seconds(const Launch& launch) {
    std::vector<double> times;
#ifdef __CUDACC__
    launch(stream_);  // what is set up at the first launch cannot be in a graph
    check(cudaStreamSynchronize(stream_), "launch");
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    launch(stream_);
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
    for (int i = 0; i < repetitions_ + 3; ++i) {
      check(cudaMemsetAsync(flush_, i, bytes_, stream_), "flush");
      check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      check(cudaGraphLaunch(replay, stream_), "cudaGraphLaunch");
      check(cudaEventRecord(end_, stream_), "cudaEventRecord");
      check(cudaEventSynchronize(end_), "replay");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
      if (i >= 3) times.push_back(milliseconds / 1e3);  // the first replays warm up
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
#else
    for (int i = 0; i < repetitions_; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      launch(nullptr);
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
#endif
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

 private:
  size_t bytes_;
  int repetitions_;
#ifdef __CUDACC__
  cudaStream_t stream_{};
  cudaEvent_t begin_{}, end_{};
  void* flush_ = nullptr;
#endif
};

#ifdef __CUDACC__
constexpr int kRepetitions = 20;
constexpr size_t kFlushBytes = size_t(256) << 20;
#else
constexpr int kRepetitions = 1;
constexpr size_t kFlushBytes = 0;
#endif

}  // namespace fastcompress::driver
