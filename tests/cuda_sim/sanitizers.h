// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

// The sanitizers' interface to fibers. Weak: null in an executable that is linked without them, so
// that one simulator library serves all.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                  std::size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                   std::size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace toppings::sim {

inline bool with_asan() { return __asan_unpoison_memory_region != nullptr; }
inline bool with_tsan() { return __tsan_create_fiber != nullptr; }

inline void ignore_accesses(bool ignore) {
  if (!with_tsan()) return;
  (ignore ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
  (ignore ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)(__FILE__, __LINE__);
}

// While the simulator itself runs: it isn't instrumented, but what it calls is intercepted.
struct Ignored {
  Ignored() { ignore_accesses(true); }
  ~Ignored() { ignore_accesses(false); }
  Ignored(const Ignored&) = delete;
  Ignored& operator=(const Ignored&) = delete;
};

}  // namespace toppings::sim
