// The arithmetic of RoIAlign over several feature maps, for a GPU and for plain C++ alike.
//
// Maps are dense [B, H, W, C] (channels-last). A thread owns V neighbouring channels of one result: of one cell of one
// region going forward, of one pixel of one map going backward. Nothing is added up by atomics: a pixel gathers from the
// regions that touch it, in ascending order, so that its gradient is the same in every run. Sums are float32.
//
// No header is needed under NVRTC, which has none.
//
// Source: Mask R-CNN (arXiv:1703.06870), section 3; borders and rounding as in torchvision.ops.roi_align.
#pragma once

#ifdef __CUDACC__
#define ALIGNDET_HD __host__ __device__ __forceinline__
#else
#include <math.h>
#define ALIGNDET_HD inline
#endif

namespace aligndet {

constexpr int MAX_LEVELS = 8;
constexpr int TILE = 4;                   // px per side of the squares for which the regions touching them are listed
constexpr float MAX_SAMPLES = 1048576.f;  // per cell and axis; reached by cells a million px wide

// ---- numbers ----

struct Half {
  unsigned short bits;
};

struct Bfloat16 {
  unsigned short bits;
};

ALIGNDET_HD unsigned int bits_of(float value) {
  union {
    float value;
    unsigned int bits;
  } both;
  both.value = value;
  return both.bits;
}

ALIGNDET_HD float float_of(unsigned int bits) {
  union {
    unsigned int bits;
    float value;
  } both;
  both.bits = bits;
  return both.value;
}

ALIGNDET_HD float to_float(float value) { return value; }

ALIGNDET_HD float to_float(Bfloat16 value) { return float_of(static_cast<unsigned int>(value.bits) << 16); }

ALIGNDET_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const unsigned int sign = (value.bits & 0x8000u) << 16;
  const unsigned int rest = static_cast<unsigned int>(value.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return float_of(sign | 0x70000000u | rest);  // infinity, NaN
  // The exponents' biases differ by 112. A product is right for subnormal numbers too, which a shift of exponents is not.
  return float_of(sign | bits_of(float_of(rest) * float_of(0x77800000u)));
#endif
}

ALIGNDET_HD void from_float(float value, float &result) { result = value; }

ALIGNDET_HD void from_float(float value, Bfloat16 &result) {
  const unsigned int bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result.bits = static_cast<unsigned short>((bits >> 16) | 0x40u);  // NaN must not round to infinity
  } else {
    result.bits = static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // ties to even
  }
}

ALIGNDET_HD void from_float(float value, Half &result) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const unsigned int bits = bits_of(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  unsigned int half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | ((rest >> 13) & 0x3ffu);  // NaN
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (rest < 0x38800000u) {
    // Below 2^-14 halves are multiples of 2^-24: next to 0.5 floats are, too, so that one addition rounds.
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;  // ties to even
  }
  result.bits = static_cast<unsigned short>(sign | half);
#endif
}

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Chunk {
  T values[V];
};

template <class T, int V>
ALIGNDET_HD void load(const void *from, long long offset, float *to) {
  const Chunk<T, V> chunk = *reinterpret_cast<const Chunk<T, V> *>(static_cast<const T *>(from) + offset);
  for (int i = 0; i < V; ++i) to[i] = to_float(chunk.values[i]);
}

template <class T, int V>
ALIGNDET_HD void store(const float *from, void *to, long long offset) {
  Chunk<T, V> chunk;
  for (int i = 0; i < V; ++i) from_float(from[i], chunk.values[i]);
  *reinterpret_cast<Chunk<T, V> *>(static_cast<T *>(to) + offset) = chunk;
}

// ---- what a kernel is told; the same fields in the same order as in roi_align_cuda.py ----

struct Level {
  void *pixels;     // T [B, H, W, C]: features going forward, their gradient going backward
  float scale;      // of this map's px over those of the boxes
  int height;       // H
  int width;        // W
  int first_pixel;  // pixels of the maps before this one, over all images
  int first_tile;   // the same in squares of TILE
  int reserved;     // keeps the layout free of gaps
};

struct Call {
  Level levels[MAX_LEVELS];
  const float *boxes;       // [N, 4] x0, y0, x1, y1
  const long long *image;   // [N], 0 .. B-1
  const long long *level;   // [N], 0 .. L-1
  void *pooled;             // T [N, S, S, C]: result going forward, its gradient going backward
  unsigned int *touching;   // [tiles, words]: bit r % 32 of word r / 32 tells whether region r touches the tile
  int level_count;          // L
  int batch;                // B
  int channels;             // C
  int rois;                 // N
  int size;                 // S, cells per side
  int sampling_ratio;       // samples per cell and axis; 0: as many as the cell is wide in px, rounded up
  int aligned;              // whether pixel centres are at half-integers
  int words;                // N / 32, rounded up
  int items;                // results of this kernel: cells, (word, tile) pairs or pixels
  int reserved;
};

// ---- one axis of one region ----

struct Axis {
  float start;  // px of the map
  float cell;   // px; negative for inverted boxes
  int grid;     // samples per cell; 0 where there are none
  int length;   // px of the map
};

struct Tap {
  int low, high;
  float weight_low, weight_high;
};

struct Span {
  int begin, end;
};

struct Run {
  int cell;
  float weight;  // of one pixel in that cell
  int next;      // first sample behind the cell
};

ALIGNDET_HD Axis axis_of(float low, float high, int length, float scale, const Call &call) {
  const float offset = call.aligned ? 0.5f : 0.f;
  const float start = low * scale - offset;
  float extent = high * scale - offset - start;
  if (!call.aligned) extent = fmaxf(extent, 1.f);
  const float cell = extent / static_cast<float>(call.size);
  int grid = call.sampling_ratio;
  if (grid <= 0) grid = cell > 0.f ? static_cast<int>(fminf(ceilf(cell), MAX_SAMPLES)) : 0;
  if (!(fabsf(start) < 1e30f && fabsf(cell) < 1e30f)) grid = 0;  // infinite and undefined boxes have no samples
  return {start, cell, grid, length};
}

ALIGNDET_HD float coordinate(const Axis &axis, int cell, int sample) {
  return axis.start + static_cast<float>(cell) * axis.cell +
         (static_cast<float>(sample) + 0.5f) * axis.cell / static_cast<float>(axis.grid);
}

// The two pixels beside a coordinate and their weights; both 0 more than one px outside.
ALIGNDET_HD Tap tap_at(float where, int length) {
  if (!(where >= -1.f && where <= static_cast<float>(length))) return {0, 0, 0.f, 0.f};
  where = fmaxf(where, 0.f);
  const int low = static_cast<int>(where);
  if (low >= length - 1) return {length - 1, length - 1, 1.f, 0.f};
  const float part = where - static_cast<float>(low);
  return {low, low + 1, 1.f - part, part};
}

// Those samples of all cells, numbered cell * grid + sample, that can reach the pixels first .. last. A few more may be
// named, where rounding leaves it open; their weights are 0.
ALIGNDET_HD Span samples_near(const Axis &axis, int size, int first, int last) {
  const int total = size * axis.grid;
  const float step = axis.grid > 0 ? axis.cell / static_cast<float>(axis.grid) : 0.f;
  if (!(fabsf(step) > 1e-20f)) return {0, total};  // all samples in one place
  // Coordinates carry errors of some 1e-7 of the largest number met on the way.
  const float slack = 4e-6f * (fabsf(axis.start) + fabsf(axis.cell) * static_cast<float>(size) + 1.f);
  const float low = first <= 0 ? -1.f : static_cast<float>(first - 1);
  const float high = static_cast<float>(last >= axis.length - 1 ? axis.length : last + 1);
  const float a = (low - slack - axis.start) / step - 0.5f, b = (high + slack - axis.start) / step - 0.5f;
  const float from = fminf(a, b) * (1.f - (fminf(a, b) > 0.f ? 1e-6f : -1e-6f)) - 0.01f;
  const float to = fmaxf(a, b) * (1.f + (fmaxf(a, b) > 0.f ? 1e-6f : -1e-6f)) + 0.01f;
  const float most = static_cast<float>(total);
  Span span;
  span.begin = from > 0.f ? (from < most ? static_cast<int>(from) : total) : 0;
  span.end = to < 0.f ? 0 : (to < most - 1.f ? static_cast<int>(to) + 1 : total);
  return span;
}

// From sample ``begin`` to the end of its cell, not beyond ``end``: the weight of a pixel in that cell.
ALIGNDET_HD Run run_from(const Axis &axis, int begin, int end, int pixel) {
  const int cell = begin / axis.grid, stop = (cell + 1) * axis.grid < end ? (cell + 1) * axis.grid : end;
  float weight = 0.f;
  for (int number = begin; number < stop; ++number) {
    const Tap tap = tap_at(coordinate(axis, cell, number - cell * axis.grid), axis.length);
    if (tap.low == pixel) weight += tap.weight_low;
    if (tap.high == pixel) weight += tap.weight_high;  // the border's tap has 0 here
  }
  return {cell, weight, stop};
}

ALIGNDET_HD Axis rows_of(const Call &call, int roi, const Level &level) {
  return axis_of(call.boxes[4 * roi + 1], call.boxes[4 * roi + 3], level.height, level.scale, call);
}

ALIGNDET_HD Axis columns_of(const Call &call, int roi, const Level &level) {
  return axis_of(call.boxes[4 * roi], call.boxes[4 * roi + 2], level.width, level.scale, call);
}

// 1 / samples per cell. Grids have at least one sample per axis wherever there is something to divide.
ALIGNDET_HD float share_of(const Axis &rows, const Axis &columns) {
  return 1.f / fmaxf(static_cast<float>(rows.grid) * static_cast<float>(columns.grid), 1.f);
}

// ---- one result of each kernel ----

// The samples of ``cell`` that can reach the map at all, numbered within the cell.
ALIGNDET_HD Span samples_of_cell(const Axis &axis, int size, int cell) {
  const Span all = samples_near(axis, size, 0, axis.length - 1);
  const int begin = all.begin - cell * axis.grid, end = all.end - cell * axis.grid;
  return {begin > 0 ? begin : 0, end < axis.grid ? end : axis.grid};
}

// One cell: ``item`` = (roi * S + row) * S + column, channels ``channel`` .. channel + V - 1.
template <class T, int V>
ALIGNDET_HD void pool_cell(const Call &call, int item, int channel) {
  const int column = item % call.size, row = item / call.size % call.size, roi = item / call.size / call.size;
  const Level &level = call.levels[call.level[roi]];
  const Axis rows = rows_of(call, roi, level), columns = columns_of(call, roi, level);
  const Span down = samples_of_cell(rows, call.size, row), across = samples_of_cell(columns, call.size, column);
  const long long image_row = call.image[roi] * level.height;
  float sum[V] = {};
  for (int j = down.begin; j < down.end; ++j) {
    const Tap y = tap_at(coordinate(rows, row, j), rows.length);
    if (y.weight_low == 0.f && y.weight_high == 0.f) continue;
    const long long upper = (image_row + y.low) * level.width, lower = (image_row + y.high) * level.width;
    for (int i = across.begin; i < across.end; ++i) {
      const Tap x = tap_at(coordinate(columns, column, i), columns.length);
      if (x.weight_low == 0.f && x.weight_high == 0.f) continue;
      float a[V], b[V], c[V], d[V];
      load<T, V>(level.pixels, (upper + x.low) * call.channels + channel, a);
      load<T, V>(level.pixels, (upper + x.high) * call.channels + channel, b);
      load<T, V>(level.pixels, (lower + x.low) * call.channels + channel, c);
      load<T, V>(level.pixels, (lower + x.high) * call.channels + channel, d);
      const float wa = y.weight_low * x.weight_low, wb = y.weight_low * x.weight_high;
      const float wc = y.weight_high * x.weight_low, wd = y.weight_high * x.weight_high;
      for (int v = 0; v < V; ++v) sum[v] += wa * a[v] + wb * b[v] + wc * c[v] + wd * d[v];
    }
  }
  const float share = share_of(rows, columns);
  for (int v = 0; v < V; ++v) sum[v] *= share;
  store<T, V>(sum, call.pooled, static_cast<long long>(item) * call.channels + channel);
}

struct Place {
  int level, image, y, x;
};

// Where pixel or tile number ``item`` of all maps lies; ``side``: px per side of what is counted, 1 or TILE.
ALIGNDET_HD Place place_of(const Call &call, int item, int side) {
  int level = 0;
  while (level + 1 < call.level_count &&
         item >= (side == 1 ? call.levels[level + 1].first_pixel : call.levels[level + 1].first_tile)) {
    ++level;
  }
  const Level &map = call.levels[level];
  const int rest = item - (side == 1 ? map.first_pixel : map.first_tile);
  const int height = (map.height + side - 1) / side, width = (map.width + side - 1) / side;
  return {level, rest / width / height, rest / width % height, rest % width};
}

// One word of the lists: ``item`` = word * tiles + tile. Neighbouring threads read the same regions.
ALIGNDET_HD void list_regions(const Call &call, int item) {
  const int tiles = call.items / call.words, word = item / tiles, tile = item % tiles;
  const Place place = place_of(call, tile, TILE);
  const Level &level = call.levels[place.level];
  const int top = place.y * TILE, left = place.x * TILE;
  const int last = call.rois < 32 * word + 32 ? call.rois : 32 * word + 32;
  unsigned int bits = 0;
  for (int roi = 32 * word; roi < last; ++roi) {
    if (call.level[roi] != place.level || call.image[roi] != place.image) continue;
    const Span down = samples_near(rows_of(call, roi, level), call.size, top, top + TILE - 1);
    if (down.begin >= down.end) continue;
    const Span across = samples_near(columns_of(call, roi, level), call.size, left, left + TILE - 1);
    if (across.begin < across.end) bits |= 1u << (roi % 32);
  }
  call.touching[static_cast<long long>(tile) * call.words + word] = bits;
}

// What one region adds to the gradient of a pixel.
template <class T, int V>
ALIGNDET_HD void add_region(const Call &call, const Level &level, int roi, int y, int x, int channel, float *sum) {
  const Axis rows = rows_of(call, roi, level);
  const Span down = samples_near(rows, call.size, y, y);
  if (down.begin >= down.end) return;
  const Axis columns = columns_of(call, roi, level);
  const Span across = samples_near(columns, call.size, x, x);
  const float share = share_of(rows, columns);
  for (int j = down.begin; j < down.end;) {
    const Run row = run_from(rows, j, down.end, y);
    j = row.next;
    if (row.weight == 0.f) continue;
    for (int i = across.begin; i < across.end;) {
      const Run column = run_from(columns, i, across.end, x);
      i = column.next;
      if (column.weight == 0.f) continue;
      float gradient[V];
      const long long cell = (static_cast<long long>(roi) * call.size + row.cell) * call.size + column.cell;
      load<T, V>(call.pooled, cell * call.channels + channel, gradient);
      const float weight = share * row.weight * column.weight;
      for (int v = 0; v < V; ++v) sum[v] += weight * gradient[v];
    }
  }
}

ALIGNDET_HD int lowest_bit(unsigned int bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  int number = 0;
  while (!(bits >> number & 1u)) ++number;
  return number;
#endif
}

// The gradient of pixel number ``item`` of all maps, channels ``channel`` .. channel + V - 1.
template <class T, int V>
ALIGNDET_HD void gather_pixel(const Call &call, int item, int channel) {
  const Place place = place_of(call, item, 1);
  const Level &level = call.levels[place.level];
  const int high = (level.height + TILE - 1) / TILE, wide = (level.width + TILE - 1) / TILE;
  const long long tile = level.first_tile + (place.image * high + place.y / TILE) * wide + place.x / TILE;
  float sum[V] = {};
  for (int word = 0; word < call.words; ++word) {
    for (unsigned int bits = call.touching[tile * call.words + word]; bits; bits &= bits - 1) {
      add_region<T, V>(call, level, 32 * word + lowest_bit(bits), place.y, place.x, channel, sum);
    }
  }
  store<T, V>(sum, level.pixels, static_cast<long long>(item - level.first_pixel) * call.channels + channel);
}

}  // namespace aligndet
