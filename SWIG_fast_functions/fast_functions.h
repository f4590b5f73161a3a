// The two inner loops of OrganSegRSTN's testing stages: post-processing and Dice counts.
// A voxel is set where its byte is not 0. Sizes and strides are 64-bit; strides are in bytes, as in Python's buffers.
#pragma once

#include <cstdint>
#include <vector>

// A volume that is changed in place: C-contiguous, the last axis being the fastest.
struct Volume {
  uint8_t* voxels;
  int64_t shape[3];
};

// A mask that is only read: any number of axes, any strides (0 and negative ones too).
struct Mask {
  const uint8_t* voxels;  // the voxel at index (0, 0, ...)
  std::vector<int64_t> shape, strides;
};

// Keeps the 6-connected components of F of at least `threshold` times the size of the largest one (of the second
// largest if top2 and there are two) and sets the others to 0. F stays as it is if floor(voxels / 2) or more are set.
// S, the seed volume, must have F's shape and has no effect. Throws std::invalid_argument naming the argument.
void post_processing(Volume F, const Mask& S, double threshold, bool top2);

// Counts the voxels set in A, in G, and in both, into P: the Dice coefficient is 2 P[2] / (P[0] + P[1]).
// Throws std::invalid_argument if the shapes differ, std::overflow_error (P unchanged) if a count does not fit 32 bits.
void DSC_computation(const Mask& A, const Mask& G, uint32_t P[3]);
