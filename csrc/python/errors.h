// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace toppings::python {

// From now on toppings::Error arrives in Python as the class of toppings.errors that its status
// stands for (out_of_memory as MemoryError).
void register_errors();

}  // namespace toppings::python
