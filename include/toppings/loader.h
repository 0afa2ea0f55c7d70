// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/slot_table.h>

namespace toppings {

// Copies the image of an acquired slot into its range, layer after layer, one copy each, and publishes every layer as
// it arrives. Returns when all layers are there. Throws invalid_argument for a slot without an adapter.
TOPPINGS_EXPORT void load(SlotTable& table, int slot);

}  // namespace toppings
