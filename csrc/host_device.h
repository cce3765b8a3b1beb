// Marks functions that are compiled for both the host and the GPU.
#pragma once

#ifdef __CUDACC__
#define FASTCOMPRESS_HD __host__ __device__
#else
#define FASTCOMPRESS_HD
#endif
