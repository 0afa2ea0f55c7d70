// SPDX-License-Identifier: Apache-2.0
// oneDNN called directly: two matmul primitives for each adapter, the second one with a sum.
// Weights are reordered once into the layout each primitive asks for. Several adapters are spread
// over the threads; for a single one, oneDNN spreads its own work.

#include <omp.h>

#include <dnnl.hpp>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "native.h"

namespace {

using dnnl::matmul;
using dnnl::memory;
using Arguments = std::unordered_map<int, memory>;

struct Step {
  matmul product;
  Arguments arguments;
};

class Prepared {
 public:
  Prepared(const Problem& problem, const Part* parts)
      : problem_(problem),
        type_(problem.bf16 != 0 ? memory::data_type::bf16 : memory::data_type::f32),
        streams_(omp_get_max_threads()) {
    for (dnnl::stream& stream : streams_) stream = dnnl::stream(engine_);
    for (std::int64_t i = 0; i < problem.calls * problem.parts; ++i) add(parts[i]);
  }

  void run(std::int64_t call) {
    const std::size_t first = call * problem_.parts * 2;
    const std::int64_t parts = problem_.parts;
    if (parts == 1) return run_part(first, 0);
#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < parts; ++i) run_part(first + 2 * i, omp_get_thread_num());
  }

 private:
  using Shape = std::pair<std::int64_t, std::int64_t>;  // tokens, rank

  void run_part(std::size_t step, int thread) {
    for (std::size_t i = step; i < step + 2; ++i) {
      steps_[i].product.execute(streams_[thread], steps_[i].arguments);
    }
  }

  void add(const Part& part) {
    const std::int64_t in = problem_.width_in;
    const std::int64_t out = problem_.width_out;
    const Shape shape{part.tokens, part.rank};
    void* v = memory_.allocate(part.tokens * part.rank * sizeof(float));
    // A is stored transposed, as [r, K].
    const memory::desc a({in, part.rank}, type_, memory::dims{1, in});
    add_step(shrinks_, shape, {part.tokens, in, part.rank}, false, part.x, a, part.a, v);
    std::vector<float> scaled(part.rank * out);
    const auto scale = problem_.bf16 != 0 ? peers::scale_bf16 : peers::scale_float;
    scale(part.b, static_cast<float>(part.scale), part.rank * out, scaled.data());
    const memory::desc b({part.rank, out}, type_, memory::dims{out, 1});
    add_step(expands_, shape, {part.tokens, part.rank, out}, true, v, b, scaled.data(), part.y);
  }

  struct Sizes {
    std::int64_t m, k, n;
  };
  using Cache = std::map<Shape, matmul::primitive_desc>;

  // left [m, k] * weights [k, n] into out [m, n].
  void add_step(Cache& cache, Shape shape, Sizes sizes, bool sum, const void* left,
                const memory::desc& weights, const void* weights_data, void* out) {
    auto found = cache.find(shape);
    if (found == cache.end()) {
      const memory::desc any({sizes.k, sizes.n}, type_, memory::format_tag::any);
      dnnl::primitive_attr attributes;
      dnnl::post_ops after;
      if (sum) after.append_sum(1.0F);
      attributes.set_post_ops(after);
      // The library's own scratchpad belongs to the thread that made the primitive.
      attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
      found = cache
                  .emplace(shape, matmul::primitive_desc(engine_, rows(sizes.m, sizes.k), any,
                                                         rows(sizes.m, sizes.n), attributes))
                  .first;
    }
    const matmul::primitive_desc& description = found->second;
    memory source(weights, engine_, const_cast<void*>(weights_data));
    memory packed = make(description.weights_desc());
    dnnl::reorder(source, packed).execute(streams_[0], source, packed);
    steps_.push_back(
        {matmul(description),
         {{DNNL_ARG_SRC, memory(description.src_desc(), engine_, const_cast<void*>(left))},
          {DNNL_ARG_WEIGHTS, packed},
          {DNNL_ARG_DST, memory(description.dst_desc(), engine_, out)},
          {DNNL_ARG_SCRATCHPAD, make(description.scratchpad_desc())}}});
  }

  memory::desc rows(std::int64_t count, std::int64_t width) const {
    return {{count, width}, type_, memory::format_tag::ab};
  }

  memory make(const memory::desc& description) {
    return {description, engine_, memory_.allocate(description.get_size())};
  }

  Problem problem_;
  memory::data_type type_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  std::vector<dnnl::stream> streams_;
  peers::HugeMemory memory_;
  Cache shrinks_, expands_;
  std::vector<Step> steps_;  // shrink and expand of each part
};

std::string error;

}  // namespace

extern "C" {

const char* toppings_peer_version() {
  static const std::string text = [] {
    const dnnl::version_t& version = *dnnl::version();
    return std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
           std::to_string(version.patch);
  }();
  return text.c_str();
}

void* toppings_peer_prepare(const Problem* problem, const Part* parts) {
  try {
    return std::make_unique<Prepared>(*problem, parts).release();
  } catch (const std::exception& exception) {
    error = exception.what();
    return nullptr;
  }
}

const char* toppings_peer_error() { return error.c_str(); }
void toppings_peer_run(void* prepared, std::int64_t call) {
  static_cast<Prepared*>(prepared)->run(call);
}
void toppings_peer_free(void* prepared) { delete static_cast<Prepared*>(prepared); }

}  // extern "C"
