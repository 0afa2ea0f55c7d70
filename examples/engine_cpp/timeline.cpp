// SPDX-License-Identifier: Apache-2.0
#include "timeline.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <string>

namespace {

constexpr std::size_t kBarColumns = 48;

// At least one column, so that nothing is invisible.
void draw(std::string& bar, double columns_per_second, double begin, double end, char mark) {
  const auto column = [&](double seconds) {
    const double at = std::max(seconds, 0.0) * columns_per_second;
    return std::min(static_cast<std::size_t>(at), kBarColumns - 1);
  };
  for (std::size_t i = column(begin); i <= column(end); ++i) bar[i] = mark;
}

}  // namespace

void print_timeline(const std::vector<LayerEvents>& layers) {
  double total = 1e-9;
  for (const LayerEvents& layer : layers) total = std::max({total, layer.arrived, layer.end});
  const double columns_per_second = static_cast<double>(kBarColumns) / total;
  std::printf("layer       KB   queued transfer  arrived    compute (ms)\n");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerEvents& layer = layers[i];
    std::string bar(kBarColumns, ' ');
    if (layer.transfer > 0) {
      draw(bar, columns_per_second, layer.queued, layer.arrived, '.');
      draw(bar, columns_per_second, layer.arrived - layer.transfer, layer.arrived, '=');
    }
    draw(bar, columns_per_second, layer.begin, layer.end, '#');
    std::printf("%5zu %8.1f %8.3f %8.3f %8.3f %8.3f - %8.3f |%s|\n", i,
                static_cast<double>(layer.bytes) / 1e3, layer.queued * 1e3, layer.transfer * 1e3,
                layer.arrived * 1e3, layer.begin * 1e3, layer.end * 1e3, bar.c_str());
  }
}
