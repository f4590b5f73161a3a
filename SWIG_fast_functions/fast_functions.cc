// POST-PROCESSING. A mask's voxels come in runs along the last axis, and there are far fewer runs than voxels:
//
//   1. Runs. Each row is read 64 voxels at a time into the bits of a word. Beside the same word moved by one voxel, a
//      run starts where a bit is set and the one before is not, and ends where it is the other way round. Empty words,
//      nearly all of them in the mask of an organ, cost a load and a branch. If half of the volume turns out to be
//      set, the work ends here.
//   2. Union-find over runs. Two runs touch (6-connectivity) if they overlap in neighbouring rows: (x, y) has the
//      neighbours (x, y - 1) and (x - 1, y) before it. Both rows are in order: one walk along the two finds all pairs.
//   3. Threads. The volume is cut into slabs along the first axis. Each is labelled by itself, then the components of
//      two slabs are joined where runs touch across the seam.
//   4. Sizes are summed over runs, and only the runs of small components are written.
//
// DICE COUNTS. Comparing 16 voxels with 0 gives 16 bytes of 0 or -1, which 16 counters of a byte subtract, 255 times
// before they have to be emptied. Axes are first sorted by stride and fused, so that arrays of the same layout, C or
// other, become one long line. Other strides are walked voxel by voxel, in tiles where the two layouts differ.
//
// gcc and clang, any processor: words and the compilers' vector type, no intrinsics.

#include "fast_functions.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <future>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace {

constexpr int64_t kVoxelsPerThread = 1 << 20;  // less is done sooner than a thread is started
constexpr int64_t kMaxThreads = 16;            // more do not get more out of the memory

int64_t threads_for(int64_t voxels, int64_t pieces) {
  const int64_t cores = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, kMaxThreads);
  return std::max<int64_t>(1, std::min({cores, voxels / kVoxelsPerThread, pieces}));
}

// Does work(0) ... work(n - 1) side by side. What one of them throws is thrown here, after all have ended. (std::async
// without a policy falls back to doing the work here when no thread can be started.)
template <class Work>
void in_parallel(int64_t n, Work work) {
  std::vector<std::future<void>> others;
  for (int64_t i = 1; i < n; ++i) others.push_back(std::async(work, i));
  work(0);
  for (auto& other : others) other.get();
}

std::string to_string(const int64_t* shape, size_t axes) {
  std::ostringstream text;
  for (size_t i = 0; i < axes; ++i) text << (i ? ", " : "(") << shape[i];
  text << (axes == 0 ? "()" : axes == 1 ? ",)" : ")");
  return text.str();
}

// ------------------------------------------------------------------------------------------------ post-processing

// Voxels begin, begin + 1, ... end - 1 of the volume, all set, in one row.
template <class Index>
struct Run {
  Index begin, end;
};

// Neighbouring planes of the volume, labelled by themselves.
template <class Index>
struct Slab {
  int64_t first_row, last_row;   // the slab's rows, last_row not among them
  std::vector<Run<Index>> runs;  // in the order of the voxels
  std::vector<Index> row_runs;   // a row's first run; one more for the end
  std::vector<Index> label;      // a run's component, 0, 1, ... in this slab
  std::vector<int64_t> sizes;    // a component's voxels

  const Run<Index>* begin_of(int64_t row) const { return runs.data() + row_runs[row - first_row]; }
  const Run<Index>* end_of(int64_t row) const { return runs.data() + row_runs[row - first_row + 1]; }
};

template <class Index>
Index root(std::vector<Index>& parent, Index i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

// The smaller root becomes the root of both, so that a parent is never greater than its child.
template <class Index>
void unite(std::vector<Index>& parent, Index i, Index j) {
  i = root(parent, i), j = root(parent, j);
  parent[std::max(i, j)] = std::min(i, j);
}

// 64 voxels as the bits of a word, the first one lowest; 0 if they are all 0.
uint64_t set_bits(const uint8_t* voxels) {
  uint64_t words[8], any = 0, bits = 0;
  std::memcpy(words, voxels, 64);
  for (uint64_t word : words) any |= word;
  if (!any) return 0;
  constexpr uint64_t low7 = 0x7f7f7f7f7f7f7f7f;
  for (int i = 7; i >= 0; --i) {
    uint64_t word = words[i];
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    const uint64_t top_bits = (((word & low7) + low7) | word) & ~low7;  // a byte's top bit: is the byte not 0?
    bits = bits << 8 | ((top_bits >> 7) * 0x0102040810204080) >> 56;          // the eight of them side by side
  }
  return bits;
}

// Appends the runs of the row of voxels [begin, end) of a volume of `size` voxels; returns how many voxels are set.
template <class Index>
int64_t append_runs(const uint8_t* volume, int64_t begin, int64_t end, int64_t size, std::vector<Run<Index>>& runs) {
  int64_t count = 0;
  size_t closed = runs.size();
  uint64_t before = 0;  // is the voxel before these 64 set?
  for (int64_t at = begin; at < end; at += 64) {
    uint8_t last_voxels[64] = {};
    const bool inside = size - at >= 64;
    if (!inside) std::memcpy(last_voxels, volume + at, size - at);
    uint64_t bits = set_bits(inside ? volume + at : last_voxels);
    if (end - at < 64) bits &= (uint64_t{1} << (end - at)) - 1;  // the rest is the next row's
    if (!bits && !before) continue;

    const uint64_t moved = bits << 1 | before;
    for (uint64_t starts = bits & ~moved; starts; starts &= starts - 1)
      runs.push_back({static_cast<Index>(at + __builtin_ctzll(starts)), 0});
    for (uint64_t ends = moved & ~bits; ends; ends &= ends - 1)
      runs[closed++].end = static_cast<Index>(at + __builtin_ctzll(ends));
    before = bits >> 63;
    count += __builtin_popcountll(bits);
  }
  if (closed < runs.size()) runs[closed].end = static_cast<Index>(end);
  return count;
}

// Calls join(i, j) for runs *i of one row and *j of a row `distance` voxels further on that have voxels side by side.
template <class Index, class Join>
void for_touching_runs(const Run<Index>* i, const Run<Index>* i_end, const Run<Index>* j, const Run<Index>* j_end,
                       Index distance, Join join) {
  while (i < i_end && j < j_end) {
    if (i->begin + distance < j->end && j->begin < i->end + distance) join(i, j);
    if (i->end + distance < j->end) ++i; else ++j;
  }
}

// Finds the slab's runs and components. Ends early once `foreground`, shared by all slabs, reaches `limit`.
template <class Index>
void label_slab(const Volume& F, Slab<Index>& slab, int64_t limit, std::atomic<int64_t>& foreground) {
  const int64_t X = F.shape[0], Y = F.shape[1], Z = F.shape[2];
  auto& runs = slab.runs;
  auto& label = slab.label;
  slab.row_runs.reserve(slab.last_row - slab.first_row + 1);
  slab.row_runs.push_back(0);
  int64_t count = 0;  // in the plane
  for (int64_t row = slab.first_row; row < slab.last_row; ++row) {
    count += append_runs(F.voxels, row * Z, (row + 1) * Z, X * Y * Z, runs);
    slab.row_runs.push_back(static_cast<Index>(runs.size()));
    if ((row + 1) % Y == 0 && (foreground += std::exchange(count, 0)) >= limit) return;
    if (label.size() == runs.size()) continue;

    for (size_t i = label.size(); i < runs.size(); ++i) label.push_back(static_cast<Index>(i));
    auto join_with = [&](int64_t neighbour) {
      for_touching_runs(slab.begin_of(neighbour), slab.end_of(neighbour), slab.begin_of(row), slab.end_of(row),
                        static_cast<Index>((row - neighbour) * Z), [&](const Run<Index>* i, const Run<Index>* j) {
                          unite(label, static_cast<Index>(i - runs.data()), static_cast<Index>(j - runs.data()));
                        });
    };
    if (row % Y > 0) join_with(row - 1);
    if (row - Y >= slab.first_row) join_with(row - Y);
  }
  for (size_t i = 0; i < runs.size(); ++i) {  // from parents, which come before their children, to components
    const bool is_root = label[i] == static_cast<Index>(i);
    label[i] = is_root ? static_cast<Index>(slab.sizes.size()) : label[label[i]];
    if (is_root) slab.sizes.push_back(0);
    slab.sizes[label[i]] += runs[i].end - runs[i].begin;
  }
}

// Which of the components, given by size, stay.
std::vector<char> components_kept(const std::vector<int64_t>& sizes, double threshold, bool top2) {
  int64_t largest = 0, second = 0;
  for (int64_t size : sizes) {
    second = std::max(second, std::min(size, largest));
    largest = std::max(largest, size);
  }
  const double bar = threshold * static_cast<double>(top2 && second ? second : largest);
  std::vector<char> kept;
  for (int64_t size : sizes) kept.push_back(static_cast<double>(size) >= bar);
  return kept;
}

template <class Index>
void remove_small_components(const Volume& F, double threshold, bool top2, int64_t threads) {
  const int64_t X = F.shape[0], Y = F.shape[1], Z = F.shape[2];
  const int64_t limit = X * Y * Z / 2;
  std::atomic<int64_t> foreground{0};
  std::vector<Slab<Index>> slabs(threads);
  in_parallel(threads, [&](int64_t k) {
    slabs[k].first_row = X * k / threads * Y, slabs[k].last_row = X * (k + 1) / threads * Y;
    label_slab(F, slabs[k], limit, foreground);
  });
  if (foreground == 0 || foreground >= limit) return;

  std::vector<Index> first_component{0};  // of a slab, all slabs' components being numbered through
  for (auto& slab : slabs) first_component.push_back(static_cast<Index>(first_component.back() + slab.sizes.size()));
  std::vector<Index> parent(first_component.back());
  std::iota(parent.begin(), parent.end(), Index{0});
  auto component = [&](int64_t k, const Run<Index>* run) {
    return static_cast<Index>(first_component[k] + slabs[k].label[run - slabs[k].runs.data()]);
  };
  for (int64_t k = 1; k < threads; ++k)
    for (int64_t row = slabs[k].first_row; row < slabs[k].first_row + Y; ++row)
      for_touching_runs(slabs[k - 1].begin_of(row - Y), slabs[k - 1].end_of(row - Y), slabs[k].begin_of(row),
                        slabs[k].end_of(row), static_cast<Index>(Y * Z), [&](const Run<Index>* i, const Run<Index>* j) {
                          unite(parent, component(k - 1, i), component(k, j));
                        });

  std::vector<int64_t> sizes(parent.size());  // of whole components, at their roots; 0 elsewhere
  for (int64_t k = 0; k < threads; ++k)
    for (size_t i = 0; i < slabs[k].sizes.size(); ++i)
      sizes[root(parent, static_cast<Index>(first_component[k] + i))] += slabs[k].sizes[i];
  std::vector<char> kept = components_kept(sizes, threshold, top2);
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = kept[parent[i]];  // which is before i, so final

  in_parallel(threads, [&](int64_t k) {
    for (const Run<Index>& run : slabs[k].runs)
      if (!kept[component(k, &run)]) std::memset(F.voxels + run.begin, 0, run.end - run.begin);
  });
}

// ---------------------------------------------------------------------------------------------------- Dice counts

struct Counts {
  int64_t a = 0, g = 0, both = 0;

  Counts& operator+=(const Counts& other) {
    a += other.a, g += other.g, both += other.both;
    return *this;
  }
};

// One axis of the two arrays.
struct Axis {
  int64_t length, a_stride, g_stride;
};

// Two lines of voxels without gaps.
Counts count_contiguous(const uint8_t* a, const uint8_t* g, int64_t length) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  Counts counts;
  int64_t at = 0;
  while (length - at >= 16) {
    Bytes a_count{}, g_count{}, both_count{};
    for (const int64_t stop = std::min(at + 255 * 16, length - 15); at < stop; at += 16) {
      Bytes a_voxels, g_voxels;
      std::memcpy(&a_voxels, a + at, 16);
      std::memcpy(&g_voxels, g + at, 16);
      const Bytes a_set = reinterpret_cast<Bytes>(a_voxels != Bytes{});
      const Bytes g_set = reinterpret_cast<Bytes>(g_voxels != Bytes{});
      a_count -= a_set, g_count -= g_set, both_count -= a_set & g_set;
    }
    for (int i = 0; i < 16; ++i) counts += {a_count[i], g_count[i], both_count[i]};
  }
  for (; at < length; ++at) counts += {a[at] != 0, g[at] != 0, a[at] && g[at]};
  return counts;
}

Counts count_line(const uint8_t* a, const uint8_t* g, const Axis& line) {
  if (line.a_stride == 1 && line.g_stride == 1) return count_contiguous(a, g, line.length);
  Counts counts;
  for (int64_t i = 0; i < line.length; ++i, a += line.a_stride, g += line.g_stride)
    counts += {*a != 0, *g != 0, (*a != 0) & (*g != 0)};
  return counts;
}

// Two planes; in tiles where one is C-ordered and the other Fortran-ordered, so that both are read from the cache.
Counts count_plane(const uint8_t* a, const uint8_t* g, const Axis& rows, const Axis& columns) {
  constexpr int64_t tile = 64;
  const int64_t width = columns.a_stride == columns.g_stride ? columns.length : tile;
  Counts counts;
  for (int64_t row = 0; row < rows.length; row += tile)
    for (int64_t column = 0; column < columns.length; column += width)
      for (int64_t i = row; i < std::min(row + tile, rows.length); ++i)
        counts += count_line(a + i * rows.a_stride + column * columns.a_stride,
                             g + i * rows.g_stride + column * columns.g_stride,
                             {std::min(width, columns.length - column), columns.a_stride, columns.g_stride});
  return counts;
}

// Everything along the two axes or more from *axis, the outermost, to before *end.
Counts count_box(const uint8_t* a, const uint8_t* g, const Axis* axis, const Axis* end) {
  if (end - axis == 2) return count_plane(a, g, axis[0], axis[1]);
  Counts counts;
  for (int64_t i = 0; i < axis->length; ++i)
    counts += count_box(a + i * axis->a_stride, g + i * axis->g_stride, axis + 1, end);
  return counts;
}

// The axes of two arrays of one shape, in the order of memory, those that continue each other fused. Axes that run
// backwards are turned round, for which a and g move to the other end.
std::vector<Axis> axes_in_memory_order(const Mask& A, const Mask& G, const uint8_t*& a, const uint8_t*& g) {
  std::vector<Axis> axes;
  for (size_t i = 0; i < A.shape.size(); ++i) {
    Axis axis{A.shape[i], A.strides[i], G.strides[i]};
    if (axis.length == 1) continue;
    if (axis.a_stride + axis.g_stride < 0) {
      a += (axis.length - 1) * axis.a_stride, g += (axis.length - 1) * axis.g_stride;
      axis.a_stride *= -1, axis.g_stride *= -1;
    }
    axes.push_back(axis);
  }
  auto step = [](const Axis& axis) {  // the smaller stride; 0 (a broadcast axis) wraps to the largest
    const uint64_t a_step = std::abs(axis.a_stride), g_step = std::abs(axis.g_stride);
    return std::min(a_step - 1, g_step - 1);
  };
  std::stable_sort(axes.begin(), axes.end(), [&](const Axis& i, const Axis& j) { return step(i) > step(j); });
  std::vector<Axis> fused;
  for (const Axis& axis : axes) {
    const bool continues = !fused.empty() && fused.back().a_stride == axis.length * axis.a_stride &&
                           fused.back().g_stride == axis.length * axis.g_stride;
    if (continues) fused.back() = {fused.back().length * axis.length, axis.a_stride, axis.g_stride};
    else fused.push_back(axis);
  }
  return fused;
}

Counts count_voxels(const Mask& A, const Mask& G) {
  const int64_t voxels = std::accumulate(A.shape.begin(), A.shape.end(), int64_t{1}, std::multiplies<>());
  if (voxels == 0) return {};
  const uint8_t *a = A.voxels, *g = G.voxels;
  std::vector<Axis> axes = axes_in_memory_order(A, G, a, g);
  if (axes.empty()) axes.push_back({1, 1, 1});

  const Axis outer = axes.front();
  const int64_t threads = threads_for(voxels, outer.length);
  std::vector<Counts> parts(threads);
  in_parallel(threads, [&](int64_t k) {
    const int64_t begin = outer.length * k / threads, end = outer.length * (k + 1) / threads;
    std::vector<Axis> part{{1, 0, 0}};
    part.insert(part.end(), axes.begin(), axes.end());
    part[1].length = end - begin;
    const uint8_t *part_a = a + begin * outer.a_stride, *part_g = g + begin * outer.g_stride;
    parts[k] = count_box(part_a, part_g, part.data(), part.data() + part.size());
  });
  Counts counts;
  for (const Counts& part : parts) counts += part;
  return counts;
}

uint32_t to_uint32(int64_t count, const char* of) {
  if (count > std::numeric_limits<uint32_t>::max())
    throw std::overflow_error("P cannot hold the count of " + std::string(of) + ", " + std::to_string(count) +
                              ": it does not fit uint32");
  return static_cast<uint32_t>(count);
}

}  // namespace

void post_processing(Volume F, const Mask& S, double threshold, bool top2) {
  if (!std::equal(S.shape.begin(), S.shape.end(), F.shape, F.shape + 3))
    throw std::invalid_argument("S must have F's shape " + to_string(F.shape, 3) + ", not " +
                                to_string(S.shape.data(), S.shape.size()));
  if (!(threshold >= 0)) {  // nan too
    std::ostringstream message;
    message << "threshold must be 0 or more, not " << threshold;
    throw std::invalid_argument(message.str());
  }

  const int64_t voxels = F.shape[0] * F.shape[1] * F.shape[2];
  if (voxels == 0) return;
  const int64_t threads = threads_for(voxels, F.shape[0]);
  if (voxels <= std::numeric_limits<int32_t>::max()) remove_small_components<int32_t>(F, threshold, top2, threads);
  else remove_small_components<int64_t>(F, threshold, top2, threads);
}

void DSC_computation(const Mask& A, const Mask& G, uint32_t P[3]) {
  if (A.shape != G.shape)
    throw std::invalid_argument("G must have A's shape " + to_string(A.shape.data(), A.shape.size()) + ", not " +
                                to_string(G.shape.data(), G.shape.size()));
  const Counts counts = count_voxels(A, G);
  const uint32_t result[3] = {to_uint32(counts.a, "A"), to_uint32(counts.g, "G"), to_uint32(counts.both, "A and G")};
  std::copy(result, result + 3, P);
}
