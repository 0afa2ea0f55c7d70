// SPDX-License-Identifier: Apache-2.0
#include <toppings/error.h>
#include <toppings/lora_plan.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/plan.h"

namespace toppings {
namespace {

// Up to here an insertion sort beats clearing a counter per slot.
constexpr std::int64_t kFewTokens = 64;

void check_sizes(std::int64_t tokens, std::int64_t num_slots) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max() / 2 - 1;
  if (tokens < 0 || tokens > kMax) {
    fail(Status::invalid_argument, "tokens", "0 to " + std::to_string(kMax),
         std::to_string(tokens));
  }
  if (num_slots < 0) {
    fail(Status::invalid_argument, "num_slots", ">= 0", std::to_string(num_slots));
  }
}

void check_slot(std::int32_t slot, std::int64_t token, std::int64_t num_slots) {
  if (slot < -1 || slot >= num_slots) {
    fail(Status::invalid_argument, "token_slots[" + std::to_string(token) + "]",
         "-1 to " + std::to_string(num_slots - 1), std::to_string(slot));
  }
}

// Both sort stably by slot and return how many tokens have one.
std::int64_t insertion_sort(const std::int32_t* token_slots, std::int64_t num_tokens,
                            std::int32_t* tokens) {
  std::int64_t count = 0;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    if (token_slots[t] < 0) continue;
    std::int64_t at = count++;
    for (; at > 0 && token_slots[tokens[at - 1]] > token_slots[t]; --at)
      tokens[at] = tokens[at - 1];
    tokens[at] = static_cast<std::int32_t>(t);
  }
  return count;
}

std::int64_t counting_sort(const std::int32_t* token_slots, std::int64_t num_tokens,
                           std::int64_t num_slots, std::int32_t* tokens) {
  static thread_local std::vector<std::int32_t> next;
  next.assign(static_cast<std::size_t>(num_slots) + 1, 0);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    if (token_slots[t] >= 0) ++next[token_slots[t] + 1];
  }
  for (std::int64_t slot = 0; slot < num_slots; ++slot) next[slot + 1] += next[slot];
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    if (token_slots[t] >= 0) tokens[next[token_slots[t]]++] = static_cast<std::int32_t>(t);
  }
  return next[num_slots];
}

}  // namespace

std::int64_t lora_plan_size(std::int64_t tokens, std::int64_t num_slots) {
  check_sizes(tokens, num_slots);
  return 2 * tokens + 2;
}

void lora_plan(const std::int32_t* token_slots, std::int64_t tokens, std::int64_t num_slots,
               std::int32_t* plan) {
  check_sizes(tokens, num_slots);
  for (std::int64_t t = 0; t < tokens; ++t) check_slot(token_slots[t], t, num_slots);

  std::int32_t* order = plan + 1;
  std::int32_t* begins = plan + 1 + tokens;
  const std::int64_t count = tokens <= kFewTokens
                                 ? insertion_sort(token_slots, tokens, order)
                                 : counting_sort(token_slots, tokens, num_slots, order);
  std::int32_t num_segments = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i == 0 || token_slots[order[i]] != token_slots[order[i - 1]])
      begins[num_segments++] = static_cast<std::int32_t>(i);
  }
  plan[0] = num_segments;
  begins[num_segments] = static_cast<std::int32_t>(count);
  std::fill(order + count, order + tokens, -1);
  std::fill(begins + num_segments + 1, begins + tokens + 1, -1);
}

namespace cpu {

void check_plan(const std::int32_t* plan, const std::int32_t* token_slots, std::int64_t num_tokens,
                std::int64_t num_slots) {
  check_sizes(num_tokens, num_slots);
  std::int64_t active = 0;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    check_slot(token_slots[t], t, num_slots);
    active += token_slots[t] >= 0;
  }
  // The list is right if it has as many entries as there are tokens with an adapter and they
  // strictly ascend by (slot, token): then none is missing or there twice.
  const PlanView view(plan, num_tokens);
  bool ok = view.num_segments >= 0 && view.num_segments <= num_tokens && view.begins[0] == 0;
  std::int64_t listed = 0;
  std::int32_t last_slot = -1;
  for (std::int32_t segment = 0; ok && segment < view.num_segments; ++segment) {
    const std::int32_t end = view.begins[segment + 1];
    ok = end > listed && end <= active;
    std::int32_t last_token = -1;
    for (; ok && listed < end; ++listed) {
      const std::int32_t token = view.tokens[listed];
      ok = token > last_token && token < num_tokens &&
           (last_token < 0 ? token_slots[token] > last_slot : token_slots[token] == last_slot);
      if (!ok) break;
      last_token = token;
      last_slot = token_slots[token];
    }
  }
  if (!ok || listed != active) {
    fail(Status::invalid_argument, "plan", "the one made from these token_slots", "another");
  }
}

}  // namespace cpu
}  // namespace toppings
