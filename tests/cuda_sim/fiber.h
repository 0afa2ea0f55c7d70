// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace toppings::sim {

// With what ThreadSanitizer takes for the thread that runs on it: they are reused together, so that
// it sees no races in the frames of one fiber after another.
struct Stack {
  void* memory = nullptr;
  void* tsan_fiber = nullptr;
};

// A function with a stack of its own that runs in turns with whoever resumes it. Never unwound: a
// fiber that is given up just loses its stack.
class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber() = default;
  ~Fiber() { end(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(Entry entry, void* argument);
  void resume();   // until it suspends or returns
  void suspend();  // called within the fiber, in an Ignored scope
  void end();      // gives the stack back

 private:
  friend struct FiberMain;

  Stack stack_;
  void* pointer_ = nullptr;  // the stack pointer while it doesn't run
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool returned_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace toppings::sim
