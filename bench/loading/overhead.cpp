// SPDX-License-Identifier: Apache-2.0
// The loader's own work per layer: loads on a device whose calls cost nothing and are done at once.

#include <time.h>
#include <toppings/host_store.h>
#include <toppings/loader.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace toppings;

class NullEvent final : public Event {
 public:
  bool is_done() const override { return true; }
  bool wait_for(std::chrono::nanoseconds) const override { return true; }
  double seconds_since(const Event&) const override { return 1e-6; }
};

class NullStream final : public Stream {
 public:
  void copy(void*, const void*, std::size_t) override {}
  void record(Event&) override {}
  void wait(const Event&) override {}
  void write_value(std::uint32_t*, std::uint32_t) override {}
  void wait_value(const std::uint32_t*, std::uint32_t) override {}
  void synchronize() override {}
  void* native() const noexcept override { return nullptr; }
};

// kind cuda: with what is done only where the host doesn't wait, tables uploaded in stream order.
class NullDevice final : public Device {
 public:
  explicit NullDevice(DeviceKind kind) : kind_(kind) {}
  DeviceKind kind() const noexcept override { return kind_; }
  int index() const noexcept override { return 0; }
  std::string_view name() const noexcept override { return "null"; }
  bool is_in_place() const noexcept override { return false; }
  void* allocate(std::size_t bytes) override {
    const std::size_t rounded = (bytes + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, rounded);
    if (data == nullptr) std::abort();
    return std::memset(data, 0, rounded);
  }
  void deallocate(void* data, std::size_t) noexcept override { std::free(data); }
  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }
  void deallocate_host(void* data, std::size_t) noexcept override { std::free(data); }
  void page_lock(void*, std::size_t) override {}
  void page_unlock(void*) noexcept override {}
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<NullStream>(); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<NullEvent>(); }
  std::unique_ptr<Stream> wrap_stream(void*) override { return std::make_unique<NullStream>(); }
  void copy(void*, const void*, std::size_t) override {}

 private:
  DeviceKind kind_;
};

double cpu_seconds() {  // of all threads
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void measure(bool stream_order, int layers, int repeats, int cpu, double* wall, double* used) {
  const auto kind = stream_order ? DeviceKind::cuda : DeviceKind::host;
  const auto device = std::make_shared<NullDevice>(kind);
  const auto shape = std::make_shared<const ModelShape>(std::vector<std::vector<Projection>>(
      static_cast<std::size_t>(layers), {{.name = "p", .in = 16, .out = 16}}));
  const AdapterLayout layout(
      shape, DType::bf16,
      std::vector<std::vector<std::int64_t>>(static_cast<std::size_t>(layers), {1}));
  HostStore store(device, 4 * layout.bytes());
  std::vector<std::shared_ptr<const Image>> images;
  const std::vector<std::uint16_t> zeros(16);
  for (const char* digest : {"one", "other"}) {
    ImageBuilder builder = store.build(layout, digest);
    for (int layer = 0; layer < layers; ++layer) {
      builder.set(layer, 0, zeros.data(), zeros.data(), DType::bf16, 1.0F);
    }
    images.push_back(store.insert(std::move(builder)));
  }
  const auto table = std::make_shared<SlotTable>(
      shape, std::make_shared<Arena>(device, layers, layout.max_layer_bytes(), DType::bf16), 1);
  Loader loader(table, {.cpu = cpu});
  NullStream stream;
  for (int repeat = -2; repeat < repeats; ++repeat) {  // two warm up
    const int slot = table->acquire(images[static_cast<std::size_t>(repeat & 1)]).slot;
    const double cpu_before = cpu_seconds();
    const double wall_before = wall_seconds();
    Ticket ticket = loader.load(slot);
    if (stream_order) {
      for (int layer = 0; layer < layers; ++layer) ticket.wait(layer, stream);
    }
    ticket.wait_for_all(std::chrono::seconds(10));
    const double wall_after = wall_seconds();
    const double cpu_after = cpu_seconds();
    table->release(slot);
    if (repeat < 0) continue;
    wall[repeat] = (wall_after - wall_before) / layers;
    used[repeat] = (cpu_after - cpu_before) / layers;
  }
}

}  // namespace

// Seconds per layer of every repeat: from load() until all have arrived, and CPU time of all
// threads. stream_order: every layer is waited for as on a GPU. False when something was thrown.
extern "C" bool toppings_loader_overhead(int stream_order, int layers, int repeats, int cpu,
                                         double* wall, double* used) {
  try {
    measure(stream_order != 0, layers, repeats, cpu, wall, used);
    return true;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return false;
  }
}
