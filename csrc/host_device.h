// Marks functions that run on the host and on a GPU alike.
#pragma once

#ifdef __CUDACC__
#define FASTCOMPRESS_HD __host__ __device__
#else
#define FASTCOMPRESS_HD
#endif
