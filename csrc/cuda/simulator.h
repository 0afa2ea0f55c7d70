// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

// What the host bodies of ptx.cuh need from whoever runs kernels on a CPU: tests/cuda_sim defines
// it. Only g++ sees this; a kernel never calls it directly. The simulator's own code isn't
// instrumented by the sanitizers, so whatever touches a kernel's data is done in ptx.cuh.
namespace toppings::cuda::simulator {

// Where in a kernel an instruction stands. One pointer; equal pointers are the same place.
using Site = std::source_location;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What the running thread may know about itself.
struct Thread {
  Index thread, block, block_size, grid_size;
  unsigned lane = 0, warp = 0;
  std::byte* shared = nullptr;  // of its block
};

// Set before a thread is resumed.
extern const Thread* current;

// The collectives of a warp and the barrier of a block. Everyone must come to the same one.
enum class Collective : std::uint8_t {
  sync_block,
  sync_warp,
  shuffle,
  ballot,
  load_matrix,
  load_matrix_transposed,
  mma_bf16,
  mma_f16
};

void sync_block(Site site);
void sync_warp(Site site);
std::uint32_t shuffle(std::uint32_t value, unsigned source_lane, Site site);
std::uint32_t ballot(bool bit, Site site);
// A lane's own row comes in, its fragments go out.
struct MatrixRow {
  std::uint32_t words[4];
};
void load_matrix(std::uint32_t* fragments, int matrices, bool transposed, const MatrixRow& row,
                 const void* address, Site site);
void mma_16x8x16(Collective type, float (&d)[4], const std::uint32_t (&a)[4],
                 const std::uint32_t (&b)[2], Site site);

// Memory accesses, before they are made: bounds and alignment are checked, traffic is counted.
enum class Access : std::uint8_t {
  load,
  load_constant,  // nobody may write there during the launch
  store,
  atomic,
  copy
};
void access_shared(const void* address, int bytes, Access access, Site site);
void access_global(const void* address, int bytes, Access access, Site site);
// Whichever of them the address belongs to; nothing outside of a kernel.
void access_any(const void* address, int bytes, Access access, Site site);
void access_copy(const void* shared, const void* global, int bytes, int valid_bytes, Site site);

// cp.async. The bytes are read when the copy is issued; they are written, in ptx.cuh, when it is
// delivered: at once or as late as a wait allows.
struct Copy {
  void* shared = nullptr;
  int bytes = 0;
  std::uint32_t words[4] = {};
};
bool issue_copy(const Copy& copy, Site site);  // true: deliver at once
void commit_copies();
bool next_delivery(int groups_left, Copy& copy);  // false: nothing more to deliver

void wait_for_previous_kernel();

// Other threads may run here.
void scheduling_point(Site site);
// The same, for a thread that can't go on until another one writes something.
void wait_for_others(Site site);

}  // namespace toppings::cuda::simulator
