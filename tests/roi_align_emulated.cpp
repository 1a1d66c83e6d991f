// The CUDA source as plain C++: blocks and threads are loops, so that the kernels' own index arithmetic runs too.
#include <cstddef>
#include <cstring>

struct Index {
  unsigned int x, y, z;
};
static Index blockIdx, blockDim, threadIdx;

#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#include "roi_align.cu"

template <class Kernel>
static void run(Kernel kernel, const aligndet::Call &call, unsigned int blocks, unsigned int across, unsigned int down) {
  blockDim = {across, down, 1};
  for (unsigned int block = 0; block < blocks; ++block)
    for (unsigned int y = 0; y < down; ++y)
      for (unsigned int x = 0; x < across; ++x) {
        blockIdx = {block, 0, 0};
        threadIdx = {x, y, 0};
        kernel(call);
      }
}

extern "C" int emulate(const char *name, const aligndet::Call *call, int blocks, int across, int down) {
#define KERNEL(kernel) \
  if (!std::strcmp(name, #kernel)) return run(kernel, *call, blocks, across, down), 0;
  KERNEL(roi_align_list)
#define BOTH(suffix) KERNEL(roi_align_pool_##suffix) KERNEL(roi_align_gather_##suffix)
  BOTH(float32_1) BOTH(float32_8) BOTH(float16_1) BOTH(float16_8) BOTH(bfloat16_1) BOTH(bfloat16_8)
  return 1;
}

extern "C" std::size_t size_of_call() { return sizeof(aligndet::Call); }

extern "C" void halves(const unsigned short *from, float *to, int count) {
  for (int i = 0; i < count; ++i) to[i] = aligndet::to_float(aligndet::Half{from[i]});
}

extern "C" void bfloats(const unsigned short *from, float *to, int count) {
  for (int i = 0; i < count; ++i) to[i] = aligndet::to_float(aligndet::Bfloat16{from[i]});
}

extern "C" void to_halves(const float *from, aligndet::Half *to, int count) {
  for (int i = 0; i < count; ++i) aligndet::from_float(from[i], to[i]);
}

extern "C" void to_bfloats(const float *from, aligndet::Bfloat16 *to, int count) {
  for (int i = 0; i < count; ++i) aligndet::from_float(from[i], to[i]);
}
