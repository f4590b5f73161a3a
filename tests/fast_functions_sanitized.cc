// The core of fast_functions under AddressSanitizer and UndefinedBehaviorSanitizer: random shapes, strides and sizes
// against plain loops, every array allocated to the byte; then addresses beyond 2^31 in a sparse mapping.
// test_fast_functions.py builds and runs this. Prints what it did; ends with 1, or a sanitizer's report, on the first
// difference.

#include "../SWIG_fast_functions/fast_functions.cc"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

namespace {

std::mt19937_64 generator(7);

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// Post-processing by flooding from every voxel, as one would write it first.
std::vector<uint8_t> flooded(std::vector<uint8_t> voxels, const int64_t (&shape)[3], double threshold, bool top2) {
  const int64_t X = shape[0], Y = shape[1], Z = shape[2], size = X * Y * Z;
  std::vector<int64_t> component(size, -1), sizes;
  int64_t foreground = 0;
  for (int64_t seed = 0; seed < size; ++seed) {
    if (!voxels[seed] || component[seed] >= 0) continue;
    std::vector<int64_t> front{seed};
    component[seed] = static_cast<int64_t>(sizes.size());
    sizes.push_back(0);
    while (!front.empty()) {
      const int64_t at = front.back(), x = at / (Y * Z), y = at / Z % Y, z = at % Z;
      front.pop_back();
      ++sizes.back(), ++foreground;
      auto visit = [&](bool inside, int64_t next) {
        if (!inside || !voxels[next] || component[next] >= 0) return;
        component[next] = component[seed];
        front.push_back(next);
      };
      visit(x > 0, at - Y * Z), visit(x < X - 1, at + Y * Z);
      visit(y > 0, at - Z), visit(y < Y - 1, at + Z);
      visit(z > 0, at - 1), visit(z < Z - 1, at + 1);
    }
  }
  if (foreground == 0 || foreground >= size / 2) return voxels;
  std::vector<int64_t> sorted = sizes;
  std::sort(sorted.rbegin(), sorted.rend());
  const double bar = threshold * static_cast<double>(sorted[top2 && sorted.size() > 1 ? 1 : 0]);
  for (int64_t at = 0; at < size; ++at)
    if (voxels[at] && static_cast<double>(sizes[component[at]]) < bar) voxels[at] = 0;
  return voxels;
}

void random_post_processing(int cases) {
  for (int i = 0; i < cases; ++i) {
    const int64_t longest = random_int(1, 200);
    const int64_t shape[3] = {random_int(1, 7), random_int(1, 7), random_int(1, longest)};
    const int64_t size = shape[0] * shape[1] * shape[2], set_of_100 = random_int(0, 60);
    std::vector<uint8_t> before(size);
    for (auto& voxel : before) voxel = random_int(0, 99) < set_of_100 ? static_cast<uint8_t>(random_int(1, 255)) : 0;
    const double threshold = static_cast<double>(random_int(0, 5)) / 4;
    const bool top2 = random_int(0, 1);
    const std::vector<uint8_t> expected = flooded(before, shape, threshold, top2);

    for (int64_t threads = 1; threads <= shape[0]; ++threads) {
      std::unique_ptr<uint8_t[]> narrow(new uint8_t[size]), wide(new uint8_t[size]);
      std::copy(before.begin(), before.end(), narrow.get());
      std::copy(before.begin(), before.end(), wide.get());
      remove_small_components<int32_t>({narrow.get(), {shape[0], shape[1], shape[2]}}, threshold, top2, threads);
      remove_small_components<int64_t>({wide.get(), {shape[0], shape[1], shape[2]}}, threshold, top2, threads);
      require(std::equal(expected.begin(), expected.end(), narrow.get()), "post_processing of a random volume");
      require(std::equal(expected.begin(), expected.end(), wide.get()), "the same with 64-bit offsets");
    }
  }
}

// A view of random strides, signs and order of axes, in an allocation that ends where the view ends.
struct RandomView {
  std::unique_ptr<uint8_t[]> memory;
  Mask mask;

  explicit RandomView(const std::vector<int64_t>& shape) {
    std::vector<size_t> order(shape.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    mask.shape = shape;
    mask.strides.resize(shape.size());
    int64_t stride = random_int(0, 2) ? 1 : random_int(1, 3), first = 0, last = 0;
    for (size_t axis : order) {
      const int kind = static_cast<int>(random_int(0, 9));
      mask.strides[axis] = kind == 0 ? 0 : kind < 4 ? -stride : stride;
      const int64_t reach = std::max<int64_t>(shape[axis] - 1, 0) * mask.strides[axis];
      (reach < 0 ? first : last) += reach;
      stride *= std::max<int64_t>(shape[axis], 1) + (random_int(0, 3) ? 0 : 1);
    }
    memory.reset(new uint8_t[last - first + 1]);
    for (int64_t i = 0; i <= last - first; ++i) memory[i] = static_cast<uint8_t>(random_int(0, 1) * random_int(1, 255));
    mask.voxels = memory.get() - first;
  }
};

void count_plainly(const Mask& A, const Mask& G, const uint8_t* a, const uint8_t* g, size_t axis, uint32_t P[3]) {
  if (axis == A.shape.size()) {
    P[0] += *a != 0, P[1] += *g != 0, P[2] += *a && *g;
    return;
  }
  for (int64_t i = 0; i < A.shape[axis]; ++i)
    count_plainly(A, G, a + i * A.strides[axis], g + i * G.strides[axis], axis + 1, P);
}

void random_DSC_computation(int cases) {
  for (int i = 0; i < cases; ++i) {
    std::vector<int64_t> shape(random_int(0, 4));
    const int64_t longest = shape.size() == 1 ? 10000 : shape.size() == 2 ? 200 : 12;
    for (auto& length : shape) length = random_int(0, 30) ? random_int(1, longest) : 0;
    const RandomView A(shape), G(shape);
    uint32_t P[3] = {1, 2, 3}, expected[3] = {};
    DSC_computation(A.mask, G.mask, P);
    count_plainly(A.mask, G.mask, A.mask.voxels, G.mask.voxels, 0, expected);
    require(std::equal(P, P + 3, expected), "DSC_computation of random views");
  }
}

// A volume of 2.3e9 voxels, of which only the few pages that are written take memory.
void beyond_2_to_31() {
  const int64_t X = 3, Y = 1024, Z = 750001, size = X * Y * Z, far = int64_t{1} << 31;
  void* mapping = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(mapping != MAP_FAILED, "mmap of 2.3e9 bytes");
  madvise(mapping, size, MADV_HUGEPAGE);  // the same with a thousandth of the page faults, where there are huge pages
  uint8_t* F = static_cast<uint8_t*>(mapping);
  auto at = [&](int64_t x, int64_t y, int64_t z) { return F + (x * Y + y) * Z + z; };
  for (int64_t x = 0; x < X; ++x) std::memset(at(x, 1000, Z - 90), 5, 80);  // one organ through all planes, 240 voxels
  std::memset(at(2, 1023, Z - 130), 6, 130);  // up to the last voxel, more than half as many
  std::memset(at(2, 1010, 10), 7, 119);        // fewer than half as many
  require(at(2, 1010, 10) - F > far, "the specks should lie beyond 2^31");

  const Mask all{F, {X, Y, Z}, {Y * Z, Z, 1}};
  uint32_t P[3];
  DSC_computation(all, all, P);
  require(P[0] == 240 + 130 + 119 && P[1] == P[0] && P[2] == P[0], "DSC_computation beyond 2^31");
  post_processing({F, {X, Y, Z}}, all, 0.5, false);
  require(*at(0, 1000, Z - 90) == 5 && *at(2, 1000, Z - 11) == 5 && F[size - 1] == 6, "what post_processing keeps");
  require(*at(2, 1010, 10) == 0 && *at(2, 1010, 128) == 0, "what post_processing removes");

  const Mask corners{at(0, 1000, Z - 90), {2, 2}, {2 * Y * Z, 23 * Z + 89}};  // the last one is the last voxel
  const Mask from_the_end{F + size - 1, {2, 2}, {-2 * Y * Z, -23 * Z - 89}};
  DSC_computation(corners, from_the_end, P);
  require(P[0] == 3 && P[1] == 3 && P[2] == 2, "strides beyond 2^31");
  munmap(mapping, size);
}

}  // namespace

int main() {
  random_post_processing(400);
  random_DSC_computation(3000);
  beyond_2_to_31();
  std::puts("400 volumes, 3000 pairs of views and a volume of 2.3e9 voxels are as expected");
}
