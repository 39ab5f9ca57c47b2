// The activations by their names in `surgeon.kernels.activations`.
#pragma once

#include <iterator>
#include <optional>
#include <string_view>

#include "layer.h"

namespace surgeon {

inline constexpr const char* ACTIVATIONS[] = {
#define ACTIVATION(name, ...) #name,
#include "activations.inc"
#undef ACTIVATION
};

inline std::optional<Activation> find_activation(std::string_view name) {
  for (size_t i = 0; i < std::size(ACTIVATIONS); ++i)
    if (name == ACTIVATIONS[i]) return Activation(i);
  return std::nullopt;
}

}  // namespace surgeon
