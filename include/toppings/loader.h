// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/slot_table.h>

namespace toppings {

// Copies the image of an acquired slot into its range, layer after layer, one copy each, and
// publishes every layer as it arrives. Layers that are published already are left alone, so that a
// second call never writes what an operator may be reading. Returns when all layers are there. The
// caller holds a pin until then; two threads must not load one slot at the same time. Throws
// invalid_argument for a slot that isn't pinned.
TOPPINGS_EXPORT void load(SlotTable& table, int slot);

}  // namespace toppings
