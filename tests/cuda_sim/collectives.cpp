// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cstring>

#include "cpu/convert.h"
#include "machine.h"
#include "sanitizers.h"
#include "text.h"

// Barriers and warp collectives: whoever comes last does the work for all.
namespace toppings::sim {
namespace {

// Instantiations of one template have descriptions of their own of the same place.
bool same(Site a, Site b) {
  return std::bit_cast<const void*>(a) == std::bit_cast<const void*>(b) ||
         (a.line() == b.line() && a.column() == b.column() &&
          std::strcmp(a.file_name(), b.file_name()) == 0);
}

// True for the last of `expected`. Everyone must come to the same instruction.
bool arrive(Meeting& meeting, unsigned expected, Collective kind, Site site) {
  Thread& thread = *machine->running;
  thread.waits_in = kind;
  thread.site = site;
  thread.points = 0;
  if (meeting.arrived == 0) {
    meeting.first = &thread;
  } else {
    const Thread& first = *meeting.first;
    if (kind != first.waits_in || !same(site, first.site)) {
      machine->complain("divergence: block " + text(thread.block) + ": expected thread " +
                        std::to_string(thread.number) + " in " +
                        std::string(name_of(first.waits_in)) + " (" + place(first.site) +
                        ") with thread " + std::to_string(first.number) + ", got " +
                        std::string(name_of(kind)) + " (" + place(site) + ")");
      machine->give_up();
    }
  }
  return ++meeting.arrived == expected;
}

// Returns when all lanes have come; the last one has done `work` before.
template <class Work>
void meet(Warp& warp, Collective kind, Site site, Work work) {
  if (arrive(warp.meeting, 32, kind, site)) {
    work();
    warp.meeting = {};
    ++warp.collectives;
    ++machine->report.warp_collectives;
    machine->close_requests(warp);
    machine->wake(warp);
  } else {
    machine->suspend(State::in_collective, site);
  }
}

Warp& warp_of_running() { return *machine->running->owner_warp; }
Exchange& exchange(Warp& warp) { return warp.exchanges[warp.collectives % 2]; }

float half_of(std::uint32_t word, bool upper, bool is_bf16) {
  const auto bits = static_cast<std::uint16_t>(upper ? word >> 16 : word);
  return is_bf16 ? cpu::to_float(cpu::bf16{bits}) : cpu::to_float(cpu::f16{bits});
}

void multiply(Exchange& data, bool is_bf16) {
  float a[16][16], b[16][8];  // [m][k], [k][n]
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, i = lane % 4 * 2;
    for (int upper = 0; upper < 2; ++upper) {
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][i + r / 2 * 8 + upper] = half_of(data.rows[lane][r], upper != 0, is_bf16);
      }
      for (int r = 0; r < 2; ++r) {
        b[i + r * 8 + upper][g] = half_of(data.b[lane][r], upper != 0, is_bf16);
      }
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sums[n] += a[m][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) data.products[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2] = sums[n];
  }
}

}  // namespace
}  // namespace toppings::sim

namespace toppings::cuda::simulator {

using namespace toppings::sim;

void sync_block(Site site) {
  const Ignored ignored;
  sim::Thread& thread = *machine->running;
  Block& block = *thread.owner;
  char* clock = &block.clocks[block.barriers % 2];
  if (with_tsan()) __tsan_release(clock);
  if (arrive(block.meeting, block.num_threads, Collective::sync_block, site)) {
    block.meeting = {};
    ++block.barriers;
    block.all_waited_for_previous = block.waited_for_previous;
    ++machine->report.barriers;
    for (Warp& warp : block.warps) {
      machine->close_requests(warp);
      machine->wake(warp);
    }
  } else {
    machine->suspend(State::in_collective, site);
  }
  if (with_tsan()) __tsan_acquire(clock);
}

void sync_warp(Site site) {
  const Ignored ignored;
  Warp& warp = warp_of_running();
  char* clock = &warp.clocks[warp.barriers % 2];
  if (with_tsan()) __tsan_release(clock);
  meet(warp, Collective::sync_warp, site, [&] { ++warp.barriers; });
  if (with_tsan()) __tsan_acquire(clock);
}

std::uint32_t shuffle(std::uint32_t value, unsigned source_lane, Site site) {
  const Ignored ignored;
  Warp& warp = warp_of_running();
  Exchange& data = exchange(warp);
  data.words[machine->running->lane] = value;
  meet(warp, Collective::shuffle, site, [] {});
  return data.words[source_lane];
}

std::uint32_t ballot(bool bit, Site site) {
  const Ignored ignored;
  Warp& warp = warp_of_running();
  Exchange& data = exchange(warp);
  data.words[machine->running->lane] = bit;
  meet(warp, Collective::ballot, site, [&] {
    std::uint32_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= data.words[lane] << lane;
    data.words[0] = bits;
  });
  return data.words[0];
}

void load_matrix(std::uint32_t* fragments, int matrices, bool transposed, const MatrixRow& row,
                 const void*, Site site) {
  const Ignored ignored;
  Warp& warp = warp_of_running();
  Exchange& data = exchange(warp);
  const unsigned lane = machine->running->lane;
  for (int i = 0; i < 4; ++i) data.rows[lane][i] = row.words[i];
  meet(warp, transposed ? Collective::load_matrix_transposed : Collective::load_matrix, site,
       [] {});
  const unsigned g = lane / 4, i = lane % 4;
  for (int m = 0; m < matrices; ++m) {
    const auto* rows = &data.rows[m * 8];
    if (transposed) {
      const auto half = [&](unsigned k) { return rows[k][g / 2] >> g % 2 * 16 & 0xffffu; };
      fragments[m] = half(i * 2) | half(i * 2 + 1) << 16;
    } else {
      fragments[m] = rows[g][i];
    }
  }
}

void mma_16x8x16(Collective type, float (&d)[4], const std::uint32_t (&a)[4],
                 const std::uint32_t (&b)[2], Site site) {
  const Ignored ignored;
  Warp& warp = warp_of_running();
  Exchange& data = exchange(warp);
  const unsigned lane = machine->running->lane;
  for (int i = 0; i < 4; ++i) data.rows[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) data.b[lane][i] = b[i];
  meet(warp, type, site, [&] { multiply(data, type == Collective::mma_bf16); });
  for (int i = 0; i < 4; ++i) d[i] += data.products[lane][i];
}

}  // namespace toppings::cuda::simulator
