// Marks functions that both host and device code call.
#pragma once

#ifdef __CUDACC__
#define PYSERVE_HOST_DEVICE __host__ __device__
#else
#define PYSERVE_HOST_DEVICE
#endif
