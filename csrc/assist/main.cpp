// SPDX-License-Identifier: Apache-2.0
// toppings-assist: CPU workers in a process of their own. It ends with its engine, or on SIGTERM.

#include <toppings/assist/workers.h>
#include <toppings/error.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr std::chrono::milliseconds kLookAfter{20};

volatile std::sig_atomic_t stops = 0;

constexpr const char* kUsage =
    "usage: toppings-assist --channel NAME --region PATH... --cores LIST [--tokens-per-core N]\n"
    "  NAME   shared memory of the engine's channel\n"
    "  PATH   shared memory that weights lie in, in the engine's order\n"
    "  LIST   a thread on each of these cores, such as 2,3; -1: on any\n";

struct Arguments {
  std::string channel;
  std::vector<std::string> regions;
  toppings::assist::WorkersOptions options;
};

bool parse_int(std::string_view text, int& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse_list(std::string_view text, std::vector<int>& values) {
  for (;;) {
    const std::size_t comma = text.find(',');
    if (!parse_int(text.substr(0, comma), values.emplace_back())) return false;
    if (comma == std::string_view::npos) return true;
    text.remove_prefix(comma + 1);
  }
}

bool parse(int count, char** words, Arguments& arguments) {
  for (int i = 1; i < count; i += 2) {
    if (i + 1 == count) return false;
    const std::string_view name = words[i], value = words[i + 1];
    if (name == "--channel") {
      arguments.channel = value;
    } else if (name == "--region") {
      arguments.regions.emplace_back(value);
    } else if (name == "--cores") {
      if (!parse_list(value, arguments.options.cores)) return false;
    } else if (name == "--tokens-per-core") {
      if (!parse_int(value, arguments.options.tokens_per_core)) return false;
    } else {
      return false;
    }
  }
  return !arguments.channel.empty() && !arguments.options.cores.empty();
}

}  // namespace

int main(int count, char** words) {
  Arguments arguments;
  if (!parse(count, words, arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  struct sigaction action = {};
  action.sa_handler = [](int) { stops = 1; };
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  try {
    const toppings::assist::Workers workers(arguments.channel, arguments.regions,
                                            arguments.options);
    while (stops == 0 && !workers.is_engine_gone()) std::this_thread::sleep_for(kLookAfter);
  } catch (const toppings::Error& error) {
    std::fprintf(stderr, "toppings-assist: %s\n", error.what());
    return 1;
  }
  return 0;
}
