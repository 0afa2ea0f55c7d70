// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#include "sanitizers.h"

#ifndef __x86_64__
#error "the simulator's fibers are written for x86-64"
#endif

// Pushes what the ABI asks a function to preserve, changes the stack, pops it again. A jump,
// because the CPU would predict a return to where the other fiber came from. The floating point
// control words are the same in all fibers.
extern "C" void toppings_sim_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl toppings_sim_switch
.type toppings_sim_switch, @function
toppings_sim_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size toppings_sim_switch, . - toppings_sim_switch
)");

namespace toppings::sim {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStackBytes = 256 * 1024;  // touched pages only: most are never there
constexpr unsigned kNoSync = 1;  // a switch isn't a synchronization: only barriers are

// Of whoever resumes: the one OS thread.
void* resumer = nullptr;
void* resumer_tsan = nullptr;
void* resumer_fake_stack = nullptr;
const void* resumer_bottom = nullptr;
std::size_t resumer_bytes = 0;
Fiber* running = nullptr;

std::vector<Stack>& free_stacks() {
  static std::vector<Stack> stacks;
  return stacks;
}

Stack new_stack() {
  if (!free_stacks().empty()) {
    const Stack stack = free_stacks().back();
    free_stacks().pop_back();
    // A fiber that was given up left the guard zones of its frames behind.
    if (with_asan()) __asan_unpoison_memory_region(stack.memory, kStackBytes);
    return stack;
  }
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);  // an overflow is a crash, not a wrong result
  return {memory, with_tsan() ? __tsan_create_fiber(0) : nullptr};
}

}  // namespace

struct FiberMain {
  static void run() {
    Fiber& fiber = *running;
    if (with_asan()) {
      __sanitizer_finish_switch_fiber(nullptr, &resumer_bottom, &resumer_bytes);
    }
    fiber.entry_(fiber.argument_);
    fiber.returned_ = true;
    const Ignored ignored;
    fiber.suspend();
    __builtin_unreachable();
  }
};

void Fiber::start(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  returned_ = false;
  fake_stack_ = nullptr;
  stack_ = new_stack();
  // The switch pops six registers and returns into run(), which expects the alignment of a call.
  auto* top = reinterpret_cast<std::uintptr_t*>(static_cast<char*>(stack_.memory) + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<std::uintptr_t>(&FiberMain::run);
  for (int i = 0; i < 6; ++i) *--top = 0;
  pointer_ = top;
}

void Fiber::resume() {
  running = this;
  if (with_tsan()) {
    resumer_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(stack_.tsan_fiber, kNoSync);
  }
  if (with_asan()) __sanitizer_start_switch_fiber(&resumer_fake_stack, stack_.memory, kStackBytes);
  toppings_sim_switch(&resumer, pointer_);
  if (with_asan()) __sanitizer_finish_switch_fiber(resumer_fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  // A fiber that is given up must not leave its identity ignoring.
  ignore_accesses(false);
  if (with_tsan()) __tsan_switch_to_fiber(resumer_tsan, kNoSync);
  if (with_asan()) {
    __sanitizer_start_switch_fiber(returned_ ? nullptr : &fake_stack_, resumer_bottom,
                                   resumer_bytes);
  }
  toppings_sim_switch(&pointer_, resumer);
  if (with_asan()) {
    __sanitizer_finish_switch_fiber(fake_stack_, &resumer_bottom, &resumer_bytes);
  }
  ignore_accesses(true);
}

void Fiber::end() {
  if (stack_.memory == nullptr) return;
  free_stacks().push_back(stack_);
  stack_ = {};
}

}  // namespace toppings::sim
