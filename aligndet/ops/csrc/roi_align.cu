// Kernels around roi_align.h. A block has ``blockDim.y`` results, each shared by ``blockDim.x`` threads, neighbours of
// which own neighbouring channels, so that reads and writes of a warp lie side by side.
#include "roi_align.h"

#define ALIGNDET_KERNELS(suffix, T, V)                                                                             \
  extern "C" __global__ void __launch_bounds__(128) roi_align_pool_##suffix(                                       \
      const __grid_constant__ aligndet::Call call) {                                                               \
    const int item = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);                                      \
    if (item >= call.items) return;                                                                                \
    for (int channel = threadIdx.x * V; channel < call.channels; channel += blockDim.x * V)                        \
      aligndet::pool_cell<T, V>(call, item, channel);                                                              \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) roi_align_gather_##suffix(                                     \
      const __grid_constant__ aligndet::Call call) {                                                               \
    const int item = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);                                      \
    if (item >= call.items) return;                                                                                \
    for (int channel = threadIdx.x * V; channel < call.channels; channel += blockDim.x * V)                        \
      aligndet::gather_pixel<T, V>(call, item, channel);                                                           \
  }

// Eight channels at a time where C and the addresses allow it (16 bytes of a 16 bit type), else one.
ALIGNDET_KERNELS(float32_1, float, 1)
ALIGNDET_KERNELS(float32_8, float, 8)
ALIGNDET_KERNELS(float16_1, aligndet::Half, 1)
ALIGNDET_KERNELS(float16_8, aligndet::Half, 8)
ALIGNDET_KERNELS(bfloat16_1, aligndet::Bfloat16, 1)
ALIGNDET_KERNELS(bfloat16_8, aligndet::Bfloat16, 8)

extern "C" __global__ void __launch_bounds__(128) roi_align_list(const __grid_constant__ aligndet::Call call) {
  const int item = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);  // one thread wide
  if (item < call.items) aligndet::list_regions(call, item);
}
