// Marks functions that are compiled for both the host and the device.
#pragma once

#ifdef __CUDACC__
#define PYSERVE_HOST_DEVICE __host__ __device__
#else
#define PYSERVE_HOST_DEVICE
#endif
