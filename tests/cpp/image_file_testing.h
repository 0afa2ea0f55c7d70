// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/image_file.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "testing.h"

namespace toppings::testing {

// A folder of its own for each test, gone afterwards.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "toppings-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::size_t num_files() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

using Bytes = std::vector<char>;

inline Bytes bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_bytes(const std::string& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline void expect_equal(const Image& a, const Image& b) {
  EXPECT_EQ(a.digest(), b.digest());
  ASSERT_EQ(a.layout(), b.layout());
  const ModelShape& shape = *a.layout().shape();
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    const auto bytes = static_cast<std::size_t>(a.layout().layer_bytes(layer));
    EXPECT_EQ(std::memcmp(a.layer_data(layer), b.layer_data(layer), bytes), 0) << layer;
    for (int i = 0; i < static_cast<int>(shape.layer(layer).size()); ++i) {
      EXPECT_EQ(a.scale(layer, i), b.scale(layer, i));
    }
  }
}

}  // namespace toppings::testing
