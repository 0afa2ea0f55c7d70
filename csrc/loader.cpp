// SPDX-License-Identifier: Apache-2.0
#include <toppings/loader.h>

#include <cstddef>

namespace toppings {

void load(SlotTable& table, int slot) {
  const std::shared_ptr<const Image> image = table.image(slot);
  const AdapterLayout& layout = image->layout();
  Device& device = table.arena()->device();
  for (int layer = 0; layer < layout.shape()->num_layers(); ++layer) {
    if (table.is_published(slot, layer)) continue;
    const auto bytes = static_cast<std::size_t>(layout.layer_bytes(layer));
    if (bytes > 0) device.copy(table.layer_data(slot, layer), image->layer_data(layer), bytes);
    table.publish(slot, layer);
  }
}

}  // namespace toppings
