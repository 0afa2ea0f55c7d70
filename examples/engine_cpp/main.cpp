// SPDX-License-Identifier: Apache-2.0
// What an engine does with a cold adapter, in C++ alone: reads a packed file, gives the adapter a
// slot, and computes a prefill layer by layer while later layers are still on their way. The link
// to the device is emulated; so are the activations. Exit status: 1 for wrong results, 2 for
// errors.
#include <toppings/arena.h>
#include <toppings/device.h>
#include <toppings/error.h>
#include <toppings/host_store.h>
#include <toppings/image_file.h>
#include <toppings/image_reader.h>
#include <toppings/loader.h>
#include <toppings/slot_table.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "prefill.h"
#include "timeline.h"

namespace {

using Clock = std::chrono::steady_clock;
using Adapter = std::shared_ptr<const toppings::Image>;

constexpr auto kForever = std::chrono::nanoseconds::max();
constexpr const char* kUsage =
    "usage: engine_cpp FILE [--generate] [--tokens N] [--gb-per-s X] [--latency-us X] "
    "[--budget-mb N]\n"
    "FILE is an adapter as `toppings pack` writes it; --generate writes a random one there "
    "first.\n"
    "OMP_NUM_THREADS is the number of threads that compute, by default one per core. On few cores "
    "leave one free: the link's thread needs it.\n";

struct Options {
  std::string path;
  bool generate = false;
  std::int64_t tokens = 256;
  double gb_per_second = 2;
  double latency_us = 10;
  std::int64_t budget_mb = 1024;
};

template <class T>
T parse_number(std::string_view name, std::string_view text, T least, T most) {
  T value{};
  const auto [end, error] = std::from_chars(text.begin(), text.end(), value);
  if (error != std::errc{} || end != text.end() || !(value >= least && value <= most)) {
    std::ostringstream message;
    message << name << ": expected a number from " << least << " to " << most << ", got '" << text
            << "'";
    throw std::invalid_argument(message.str());
  }
  return value;
}

Options parse(const std::vector<std::string_view>& words) {
  Options options;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string_view word = words[i];
    const auto number = [&]<class T>(T& value, T least, T most) {
      if (++i == words.size()) {
        throw std::invalid_argument(std::string(word) + ": expected a number, got nothing");
      }
      value = parse_number<T>(word, words[i], least, most);
    };
    if (word == "--generate") {
      options.generate = true;
    } else if (word == "--tokens") {
      number(options.tokens, std::int64_t{1}, std::int64_t{1} << 20);
    } else if (word == "--gb-per-s") {
      number(options.gb_per_second, 1e-3, 1e3);
    } else if (word == "--latency-us") {
      number(options.latency_us, 0.0, 1e6);
    } else if (word == "--budget-mb") {
      number(options.budget_mb, std::int64_t{1}, std::int64_t{1} << 20);
    } else if (word.starts_with("-") || !options.path.empty()) {
      throw std::invalid_argument("arguments: expected one file and known options, got '" +
                                  std::string(word) + "'");
    } else {
      options.path = word;
    }
  }
  if (options.path.empty()) throw std::invalid_argument("arguments: expected a file, got none");
  return options;
}

std::shared_ptr<const toppings::ModelShape> pretend_model() {
  constexpr std::int64_t kHidden = 1024, kKeys = 256, kInner = 2816;
  const std::vector<toppings::Projection> layer = {
      {"self_attn.q_proj", kHidden, kHidden}, {"self_attn.k_proj", kHidden, kKeys},
      {"self_attn.v_proj", kHidden, kKeys},   {"self_attn.o_proj", kHidden, kHidden},
      {"mlp.gate_proj", kHidden, kInner},     {"mlp.up_proj", kHidden, kInner},
      {"mlp.down_proj", kInner, kHidden}};
  return std::make_shared<toppings::ModelShape>(std::vector(16, layer));
}

std::vector<float> random_numbers(std::minstd_rand& random, std::int64_t count,
                                  std::int64_t terms) {
  const float most = 1 / std::sqrt(static_cast<float>(terms));
  std::uniform_real_distribution<float> uniform(-most, most);
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) number = uniform(random);
  return numbers;
}

// An adapter of one rank everywhere, filled block by block as from any source of weights.
Adapter add_random_adapter(toppings::HostStore& store,
                           const std::shared_ptr<const toppings::ModelShape>& shape,
                           toppings::DType dtype, std::int64_t rank, const std::string& digest) {
  std::vector<std::vector<std::int64_t>> ranks;
  for (int layer = 0; layer < shape->num_layers(); ++layer) {
    ranks.emplace_back(shape->layer(layer).size(), rank);
  }
  std::minstd_rand random;
  toppings::ImageBuilder builder =
      store.build(toppings::AdapterLayout(shape, dtype, ranks), digest);
  for (int layer = 0; layer < shape->num_layers(); ++layer) {
    for (int i = 0; i < static_cast<int>(shape->layer(layer).size()); ++i) {
      const auto& [name, in, out] = shape->layer(layer)[static_cast<std::size_t>(i)];
      const std::vector<float> a = random_numbers(random, rank * in, in);  // [rank, in]
      const std::vector<float> b = random_numbers(random, out * rank, 1);  // [out, rank]
      builder.set(layer, i, a.data(), b.data(), toppings::DType::f32,
                  2.0F / static_cast<float>(rank));
    }
  }
  return store.insert(std::move(builder));
}

Adapter read(const std::shared_ptr<toppings::HostStore>& store, const std::string& path) {
  toppings::ImageReader reader(store, 1);
  const std::shared_ptr<toppings::ReadTicket> ticket = reader.read(path);
  return ticket->wait_for(kForever);  // an engine would look again later
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

enum class Mode { layer_by_layer, everything_first };

struct Result {
  std::vector<LayerEvents> layers;
  double total = 0, warm_total = 0;
  double largest_error = 0;   // of the first and the last layer
  int background_layers = 0;  // of the other adapter that arrived during the prefill
};

void add_load_times(std::vector<LayerEvents>& layers,
                    const std::vector<toppings::LayerTimes>& times) {
  double before = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    LayerEvents& events = layers[i];
    events.bytes = times[i].bytes;
    events.queued = times[i].queued;
    events.transfer = times[i].transfer;
    // Who had to wait knows when the layer arrived. Otherwise: as soon as the link was free for it.
    if (events.arrived == 0) events.arrived = std::max(before, events.queued) + events.transfer;
    before = events.arrived;
  }
}

// A cold prefill with `adapter` while `background` is being loaded, then a warm one.
Result run(const std::shared_ptr<toppings::Device>& device, const Adapter& adapter,
           const Adapter& background, std::int64_t tokens, Mode mode) {
  const toppings::AdapterLayout& layout = adapter->layout();
  const int num_layers = layout.shape()->num_layers();
  const auto arena = std::make_shared<toppings::Arena>(
      device, num_layers, layout.max_layer_bytes() + background->layout().max_layer_bytes(),
      layout.dtype());
  const auto table = std::make_shared<toppings::SlotTable>(layout.shape(), arena, 2);
  toppings::Loader loader(table);
  const std::unique_ptr<toppings::Stream> stream = device->wrap_stream(nullptr);

  const int background_slot = table->acquire(background).slot;
  const int slot = table->acquire(adapter).slot;
  Prefill prefill(table, *adapter, slot, tokens);
  toppings::Ticket other = loader.load(background_slot, toppings::LoadPriority::prefetch);

  Result result;
  result.layers.resize(static_cast<std::size_t>(num_layers));
  const Clock::time_point start = Clock::now();
  toppings::Ticket ticket = loader.load(slot, toppings::LoadPriority::urgent);
  if (mode == Mode::everything_first) ticket.wait_for_all(kForever);
  for (int layer = 0; layer < num_layers; ++layer) {
    LayerEvents& events = result.layers[static_cast<std::size_t>(layer)];
    const bool is_late = !ticket.has_arrived(layer);
    ticket.wait(layer, *stream);
    events.begin = seconds_since(start);
    events.arrived = is_late ? events.begin : 0;
    prefill.compute(layer);
    events.end = seconds_since(start);
  }
  result.total = seconds_since(start);
  result.background_layers = other.num_arrived();

  add_load_times(result.layers, ticket.times());
  result.largest_error =
      std::max(prefill.largest_error(*adapter, 0), prefill.largest_error(*adapter, num_layers - 1));

  other.wait_for_all(kForever);
  const Clock::time_point warm_start = Clock::now();
  for (int layer = 0; layer < num_layers; ++layer) prefill.compute(layer);
  result.warm_total = seconds_since(warm_start);
  table->release(slot);
  table->release(background_slot);
  return result;
}

int serve(const Options& options) {
  const std::int64_t budget = options.budget_mb * 1'000'000;
  if (options.generate) {
    toppings::HostStore store(toppings::host_device(), budget);
    const Adapter random =
        add_random_adapter(store, pretend_model(), toppings::DType::bf16, 32, "random");
    toppings::write_image(*random, options.path);
  }
  const std::shared_ptr<toppings::Device> device =
      toppings::host_device(toppings::HostLink{.bytes_per_second = options.gb_per_second * 1e9,
                                               .latency_seconds = options.latency_us * 1e-6});
  const auto store = std::make_shared<toppings::HostStore>(device, budget);
  const Adapter adapter = read(store, options.path);
  const toppings::AdapterLayout& layout = adapter->layout();
  const Adapter background =
      add_random_adapter(*store, layout.shape(), layout.dtype(), 16, "background");

  std::printf("device: %s\n", std::string(device->name()).c_str());
  std::printf("adapter: %s, %d layers, rank <= %d, %s, %.1f MB; %lld tokens\n",
              adapter->digest().c_str(), layout.shape()->num_layers(), layout.max_rank(),
              std::string(toppings::name_of(layout.dtype())).c_str(),
              static_cast<double>(layout.bytes()) / 1e6, static_cast<long long>(options.tokens));
  const Result first = run(device, adapter, background, options.tokens, Mode::everything_first);
  const Result layerwise = run(device, adapter, background, options.tokens, Mode::layer_by_layer);
  print_timeline(layerwise.layers);
  std::printf("second adapter, at lower priority: %d of %d layers arrived meanwhile\n",
              layerwise.background_layers, layout.shape()->num_layers());
  std::printf("layer by layer:          %8.3f ms\n", layerwise.total * 1e3);
  std::printf("load, then compute:      %8.3f ms\n", first.total * 1e3);
  std::printf("loaded already:          %8.3f ms\n", layerwise.warm_total * 1e3);

  const double error = std::max(first.largest_error, layerwise.largest_error);
  std::printf("largest error: %.3f of what rounding can cause\n", error);
  if (error <= 1) return 0;
  std::fprintf(stderr, "results: expected an error of at most 1, got %g\n", error);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return serve(parse({argv + 1, argv + argc}));
  } catch (const toppings::Error& error) {
    std::fprintf(stderr, "engine_cpp: %s\n", error.what());
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "engine_cpp: %s\n%s", error.what(), kUsage);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "engine_cpp: %s\n", error.what());
  }
  return 2;
}
